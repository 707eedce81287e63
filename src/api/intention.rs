//! `/v1/connect/intentions…` in Consul's shapes. Underneath are signed documents; both indexes are a document's version.
//!
//! The older endpoints go by id. Here that is a UUID of source and destination (`Intention::id`): the same on every node,
//! before and after a deletion, so that it leads to one intention without a register of ids.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::index::Topic;
use super::query::Blocking;
use super::write::{Expect, signer, write};
use super::{block, sift};
use crate::authz::{self, Decision, Intention, Party, Request, ShapeError, Table};
use crate::gossip::{DocumentBody, DocumentsView};
use crate::model::ServiceName;
use crate::policy::Draft;

/// Intentions of one answer, most exact first.
fn held(view: &DocumentsView, wanted: impl Fn(&Intention) -> bool) -> Vec<(&Intention, u64)> {
    let mut found: Vec<(&Intention, u64)> = view
        .documents
        .iter()
        .filter_map(|view| match &view.body {
            DocumentBody::Intention(Some(intention)) => Some((intention, view.digest.version)),
            _ => None,
        })
        .filter(|(intention, _)| wanted(intention))
        .collect();
    found.sort_by_key(|(intention, _)| (Reverse(intention.precedence()), intention.name()));
    found
}

fn shapes(found: &[(&Intention, u64)]) -> Vec<Value> {
    found.iter().map(|(intention, version)| authz::to_json(intention, *version)).collect()
}

/// Waits for a change of what operators signed, if the request asks for one; returns its index.
pub(super) async fn changed(call: &Call) -> Result<u64, Refusal> {
    let blocking = Blocking::parse(&call.query)?;
    Ok(block::wait(call, blocking, Topic::Policy).await?.1)
}

/// `GET /v1/connect/intentions`
pub(super) async fn list(call: Call) -> Result<Reply, Refusal> {
    drop(sift::filter::<Intention>(&call)?);
    let index = changed(&call).await?;
    let filter = sift::filter::<Intention>(&call)?;
    let view = call.shared.membership.documents();
    Reply::at_index(&call, &shapes(&held(&view, |one| filter.is_match(one))), index)
}

/// `GET /v1/connect/intentions/exact?source=&destination=`
pub(super) async fn read(call: Call) -> Result<Reply, Refusal> {
    let (source, destination) = ends(&call)?;
    let index = changed(&call).await?;
    let view = call.shared.membership.documents();
    let found = held(&view, |one| one.source == source && one.destination == destination);
    let Some((intention, version)) = found.first() else { return Ok(Reply::absent("Intention not found", index)) };
    Reply::at_index(&call, &authz::to_json(intention, *version), index)
}

/// `PUT /v1/connect/intentions/exact?source=&destination=`
pub(super) async fn put(call: Call) -> Result<Reply, Refusal> {
    let intention = body(&call, Some(ends(&call)?))?;
    write(&call.shared, Draft::intention(intention)?, Expect::Any).await?;
    Reply::json(&call, &true)
}

/// `POST /v1/connect/intentions`: writes an intention that must be new; answers with its id.
pub(super) async fn create(call: Call) -> Result<Reply, Refusal> {
    let intention = body(&call, None)?;
    let (id, name) = (intention.id(), intention.name());
    if !write(&call.shared, Draft::intention(intention)?, Expect::Version(0)).await? {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            format!("Duplicate intention found: {name} has ID {id}; write it by PUT /v1/connect/intentions/{id}"),
        ));
    }
    Reply::json(&call, &json!({"ID": id.to_string()}))
}

/// `GET /v1/connect/intentions/:id`
pub(super) async fn read_by_id(call: Call) -> Result<Reply, Refusal> {
    let id = id(&call)?;
    let index = changed(&call).await?;
    let view = call.shared.membership.documents();
    match by_id(&view, id) {
        Ok((intention, version)) => Reply::at_index(&call, &authz::to_json(intention, version), index),
        Err(absent) => Ok(Reply::absent(absent.text, index)),
    }
}

/// `PUT /v1/connect/intentions/:id`: writes what is there anew; source and destination stay, for the id is theirs.
pub(super) async fn put_by_id(call: Call) -> Result<Reply, Refusal> {
    let id = id(&call)?;
    let ends = {
        let view = call.shared.membership.documents();
        let (held, _) = by_id(&view, id)?;
        (held.source.clone(), held.destination.clone())
    };
    let intention = body(&call, Some(ends))?;
    write(&call.shared, Draft::intention(intention)?, Expect::Any).await?;
    Reply::json(&call, &json!({"ID": id.to_string()}))
}

/// `DELETE /v1/connect/intentions/:id`; true as well where there is none.
pub(super) async fn delete_by_id(call: Call) -> Result<Reply, Refusal> {
    let id = id(&call)?;
    signer(&call.shared)?;
    let view = call.shared.membership.documents();
    if let Ok((held, _)) = by_id(&view, id) {
        write(&call.shared, Draft::no_intention(&held.source, &held.destination)?, Expect::Any).await?;
    }
    Reply::json(&call, &true)
}

fn by_id(view: &DocumentsView, id: uuid::Uuid) -> Result<(&Intention, u64), Refusal> {
    let found = held(view, |one| one.id() == id).first().copied();
    found.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, format!("Unknown intention ID: {id}")))
}

fn id(call: &Call) -> Result<uuid::Uuid, Refusal> {
    let text = call.argument.as_str();
    text.parse().map_err(|_| Refusal::bad(format!("Invalid intention ID {text:?}: it is a UUID, as the list shows it")))
}

/// Reads the intention of a body, whose `ID`, if it has one, must be its own.
fn body(call: &Call, asked: Option<(Party, Party)>) -> Result<Intention, Refusal> {
    let body: Value =
        serde_json::from_slice(&call.body).map_err(|error| Refusal::bad(format!("Request decode failed: {error}")))?;
    let intention = authz::from_json(&body, asked)?;
    let given = body.get("ID").and_then(Value::as_str).unwrap_or_default();
    let id = intention.id().to_string();
    if given.is_empty() || given.eq_ignore_ascii_case(&id) {
        return Ok(intention);
    }
    Err(Refusal::bad(format!("Invalid intention ID {given:?}: that of {} is {id}; leave it out", intention.name())))
}

/// `DELETE /v1/connect/intentions/exact?source=&destination=`
pub(super) async fn delete(call: Call) -> Result<Reply, Refusal> {
    let (source, destination) = ends(&call)?;
    signer(&call.shared)?;
    let view = call.shared.membership.documents();
    let is_there = !held(&view, |one| one.source == source && one.destination == destination).is_empty();
    // Consul answers the same where there is nothing to delete.
    if is_there {
        write(&call.shared, Draft::no_intention(&source, &destination)?, Expect::Any).await?;
    }
    Reply::json(&call, &true)
}

/// `GET /v1/connect/intentions/match?by=source|destination&name=`
pub(super) async fn matching(call: Call) -> Result<Reply, Refusal> {
    let index = changed(&call).await?;
    let by_source = match call.query.given("by") {
        Some("source") => true,
        Some("destination") => false,
        _ => return Err(Refusal::bad("Invalid query parameter: by must be \"source\" or \"destination\"")),
    };
    let view = call.shared.membership.documents();
    let mut answer = BTreeMap::new();
    for name in call.query.all("name") {
        let party = party("name", name)?;
        let found = held(&view, |one| {
            let end = if by_source { &one.source } else { &one.destination };
            end.is_any() || *end == party
        });
        answer.insert(name.to_owned(), shapes(&found));
    }
    if answer.is_empty() {
        return Err(Refusal::bad("Missing query parameter: name"));
    }
    Reply::at_index(&call, &answer, index)
}

/// `GET /v1/connect/intentions/check?source=&destination=`; with `method`, `path` and `header=name:value` also over a request.
pub(super) async fn check(call: Call) -> Result<Reply, Refusal> {
    let (source, destination) = ends(&call)?;
    let Some(destination) = service(&destination) else {
        return Err(Refusal::bad("Invalid destination: a call goes to one service, not to `*`"));
    };
    let snapshot = call.shared.snapshot.load();
    let asked = Asked::parse(&call)?;
    let decision = asked.decide(&snapshot.policy, service(&source), destination);
    Reply::json(&call, &json!({"Allowed": decision.is_allowed(), "Rule": decision.rule()}))
}

/// What a question is about: a stream, or a request.
pub(super) struct Asked {
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) headers: HeaderMap,
}

impl Asked {
    pub(super) fn parse(call: &Call) -> Result<Self, Refusal> {
        let given = |name: &str| call.query.given(name).map(str::to_owned);
        let mut headers = HeaderMap::new();
        for pair in call.query.all("header") {
            let parsed = pair.split_once(':').and_then(|(name, value)| {
                Some((HeaderName::try_from(name.trim()).ok()?, HeaderValue::try_from(value.trim()).ok()?))
            });
            let (name, value) =
                parsed.ok_or_else(|| Refusal::bad("Invalid query parameter: header must be name:value"))?;
            headers.append(name, value);
        }
        let method = given("method").map(|method| method.to_ascii_uppercase());
        Ok(Self { method, path: given("path"), headers })
    }

    /// Whether it is about a request.
    pub(super) fn is_request(&self) -> bool {
        self.method.is_some() || self.path.is_some() || !self.headers.is_empty()
    }

    pub(super) fn decide<'t>(
        &self,
        table: &'t Table,
        source: Option<&ServiceName>,
        destination: &ServiceName,
    ) -> Decision<'t> {
        if !self.is_request() {
            return table.of_stream(source, destination, |_, _| {});
        }
        let method = self.method.as_deref().unwrap_or("GET");
        let request = Request { method, path: self.path.as_deref().unwrap_or("/"), headers: &self.headers };
        table.of_request(source, destination, &request, |_, _| {})
    }
}

/// The service that a party names.
pub(super) fn service(party: &Party) -> Option<&ServiceName> {
    match party {
        Party::Any => None,
        Party::Service(name) => Some(name),
    }
}

/// Reads `source` and `destination`.
pub(super) fn ends(call: &Call) -> Result<(Party, Party), Refusal> {
    let read = |name: &'static str| {
        let text = call.query.given(name);
        party(name, text.ok_or_else(|| Refusal::bad(format!("Missing query parameter: {name}")))?)
    };
    Ok((read("source")?, read("destination")?))
}

fn party(name: &str, text: &str) -> Result<Party, Refusal> {
    let bare = text.strip_prefix("default/").unwrap_or(text);
    bare.parse().map_err(|error| Refusal::bad(format!("Invalid {name}: {error}")))
}

impl From<ShapeError> for Refusal {
    fn from(error: ShapeError) -> Self {
        Self::bad(format!("Request decode failed: {error}"))
    }
}

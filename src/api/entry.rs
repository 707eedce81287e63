//! `/v1/config…` in Consul's shapes: config entries, kept as signed documents; and `/v1/discovery-chain`, what they make
//! of the requests to a service. What is written is held against all other entries.
//! Entries of the kind `service-intentions` are intentions (`service_intentions`).

use std::sync::Arc;

use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::sift::{self, Listing};
use super::write::{Expect, signer, write};
use super::{intention, service_intentions};
use crate::catalogue::Snapshot;
use crate::gossip::{DocumentBody, DocumentsView};
use crate::model::ServiceName;
use crate::policy::{Draft, ENTRY_KINDS, entry_ends};
use crate::{traffic, upstream};

/// The entries that are held, of one kind or of all, in order of kind and name.
fn held(view: &DocumentsView, wanted: impl Fn(&str, &str) -> bool) -> Vec<Value> {
    let mut found = Vec::new();
    for view in &view.documents {
        let DocumentBody::Config(Some(entry)) = &view.body else { continue };
        let Some((kind, name)) = entry_ends(&view.digest.id.name) else { continue };
        if !wanted(kind, name) {
            continue;
        }
        let mut shape = entry.clone();
        if let Value::Object(fields) = &mut shape {
            fields.retain(|key, _| {
                !["kind", "name", "createindex", "modifyindex"].contains(&key.to_ascii_lowercase().as_str())
            });
            let version = json!(view.digest.version);
            let own = [
                ("Kind", json!(kind)),
                ("Name", json!(name)),
                ("CreateIndex", version.clone()),
                ("ModifyIndex", version),
            ];
            fields.extend(own.map(|(key, value)| (key.to_owned(), value)));
        }
        found.push(shape);
    }
    found
}

/// `PUT /v1/config`: the body is the entry.
pub(super) async fn put(call: Call) -> Result<Reply, Refusal> {
    let value: Value =
        serde_json::from_slice(&call.body).map_err(|error| Refusal::bad(format!("Request decode failed: {error}")))?;
    let expect = expect(&call)?;
    if is_intentions(&value) {
        return Reply::json(&call, &service_intentions::put(&call, &value, expect).await?);
    }
    let draft = Draft::entry(value.to_string())?;
    fits(&call, &draft, Some(value)).await?;
    Reply::json(&call, &write(&call.shared, draft, expect).await?)
}

/// `GET /v1/config/:kind` and `/v1/config/:kind/:name`
pub(super) async fn read(call: Call) -> Result<Reply, Refusal> {
    let (kind, name) = path(&call)?;
    drop(sift::filter::<Listing<'_>>(&call)?);
    let index = intention::changed(&call).await?;
    let filter = sift::filter::<Listing<'_>>(&call)?;
    let view = call.shared.membership.documents();
    let mut found = if kind == service_intentions::KIND {
        service_intentions::held(&view, name)
    } else {
        held(&view, |of, own| of == kind && name.is_none_or(|name| name == own))
    };
    // A name is filter enough.
    found.retain(|entry| name.is_some() || filter.is_match(&Listing::of(entry)));
    match (name, found.first()) {
        (None, _) => Reply::at_index(&call, &found, index),
        (Some(_), Some(entry)) => Reply::at_index(&call, entry, index),
        (Some(name), None) => Ok(Reply::absent(format!("Config entry not found for {kind:?} / {name:?}"), index)),
    }
}

/// `DELETE /v1/config/:kind/:name`
pub(super) async fn delete(call: Call) -> Result<Reply, Refusal> {
    let (kind, name) = path(&call)?;
    let name = name.ok_or_else(|| Refusal::bad("Missing config entry name"))?;
    let expect = expect(&call)?;
    signer(&call.shared)?;
    let is_done = if kind == service_intentions::KIND {
        service_intentions::delete(&call, name, expect).await?
    } else {
        let view = call.shared.membership.documents();
        let is_there = !held(&view, |of, own| of == kind && own == name).is_empty();
        let draft = Draft::no_entry(kind, name)?;
        fits(&call, &draft, None).await?;
        !is_there || write(&call.shared, draft, expect).await?
    };
    if call.query.has("cas") { Reply::json(&call, &is_done) } else { Reply::json(&call, &json!({})) }
}

/// Holds what is to be written, or deleted, against itself and all other entries: off the threads of the control plane, for
/// compiling a few hundred expressions takes a while.
async fn fits(call: &Call, draft: &Draft, value: Option<Value>) -> Result<(), Refusal> {
    let view = call.shared.membership.documents();
    let id = draft.id().name.clone();
    let check = move || {
        let others = view.documents.iter().filter_map(|view| {
            let DocumentBody::Config(Some(entry)) = &view.body else { return None };
            let (kind, name) = entry_ends(&view.digest.id.name)?;
            Some((kind, name, entry))
        });
        let Some((kind, name)) = entry_ends(&id) else { return Ok(()) };
        traffic::check_write(others, (kind, name, value.as_ref()))
    };
    let checked = tokio::task::spawn_blocking(check).await.map_err(|error| Refusal::internal(error.to_string()))?;
    checked.map_err(|problems| Refusal::bad(format!("Invalid config entry: {problems}")))
}

/// `GET /v1/discovery-chain/:service`
pub(super) async fn discovery_chain(call: Call) -> Result<Reply, Refusal> {
    let service: ServiceName =
        call.argument.parse().map_err(|error| Refusal::bad(format!("Invalid service name: {error}")))?;
    // Chains are compiled of the same documents as intentions, in the same turn.
    let index = intention::changed(&call).await?;
    let snapshot = call.shared.snapshot.load();
    Reply::at_index(&call, &chain(&snapshot, &service)?, index)
}

/// Shows what becomes of the requests to a service.
pub(super) fn chain(snapshot: &Snapshot, service: &ServiceName) -> Result<Value, Refusal> {
    let declared = || snapshot.services.get(service).map(|entry| entry.protocol);
    let protocol = snapshot.traffic.protocol(service).or_else(declared).unwrap_or_default();
    let here = snapshot.nodes.get(&snapshot.local_node).map_or("", |node| &node.info.datacenter);
    let chain = chain_of(snapshot, service)?;
    let mut shown = traffic::show(&chain, protocol.as_str(), here);
    balanced(snapshot, &mut shown);
    let name = format!("chain:{service}");
    let ends = format!(":{service}");
    let is_about = |one: &&traffic::Quarantined| one.name == name || one.name.ends_with(&ends);
    let quarantined = snapshot.traffic.quarantined().iter().filter(is_about);
    let quarantined: Vec<Value> =
        quarantined.map(|one| json!({"Name": one.name, "Reason": one.reason, "OlderInForce": one.has_older})).collect();
    if let Some(fields) = shown.as_object_mut() {
        fields.insert("Quarantined".to_owned(), Value::from(quarantined));
    }
    Ok(shown)
}

/// Returns the chain of a service, or the one of a service that no entry is about.
pub(super) fn chain_of(snapshot: &Snapshot, service: &ServiceName) -> Result<Arc<traffic::Chain>, Refusal> {
    if let Some(chain) = snapshot.traffic.chain(service) {
        return Ok(Arc::clone(chain));
    }
    // What does not fit leaves a service as if no entry were about it.
    let plain = traffic::Entries::default().chain(service);
    plain.map(Arc::new).map_err(|problems| Refusal::internal(problems.to_string()))
}

/// Adds to each resolver how the service that it leads to is balanced.
fn balanced(snapshot: &Snapshot, shown: &mut Value) {
    let service_of = |shown: &Value, id: &str| {
        let target = shown.get("Chain")?.get("Targets")?.get(id)?;
        target.get("Service")?.as_str()?.parse::<ServiceName>().ok()
    };
    let whole = shown.clone();
    let nodes = shown.pointer_mut("/Chain/Nodes").and_then(Value::as_object_mut);
    for fields in nodes.into_iter().flat_map(|nodes| nodes.values_mut()).filter_map(Value::as_object_mut) {
        let target = fields.get("Resolver").and_then(|resolver| resolver.get("Target")).and_then(Value::as_str);
        if let Some(service) = target.and_then(|id| service_of(&whole, id)) {
            let shown = upstream::show_balance(snapshot.upstreams.balance(&service));
            fields.insert("LoadBalancer".to_owned(), shown);
        }
    }
}

fn is_intentions(entry: &Value) -> bool {
    let kind = entry.as_object().into_iter().flatten().find(|(key, _)| key.eq_ignore_ascii_case("kind"));
    kind.is_some_and(|(_, kind)| kind == service_intentions::KIND)
}

fn expect(call: &Call) -> Result<Expect, Refusal> {
    match call.query.given("cas") {
        None => Ok(Expect::Any),
        Some(text) => text.parse().map(Expect::Version).map_err(|_| Refusal::bad("Invalid cas: a version is a number")),
    }
}

fn path(call: &Call) -> Result<(&str, Option<&str>), Refusal> {
    let (kind, name) = match call.argument.trim_end_matches('/').split_once('/') {
        Some((kind, name)) => (kind, Some(name)),
        None => (call.argument.trim_end_matches('/'), None),
    };
    if ENTRY_KINDS.contains(&kind) || kind == service_intentions::KIND {
        return Ok((kind, name));
    }
    let known = ENTRY_KINDS.join(", ");
    Err(Refusal::bad(format!("invalid config entry kind: {kind}; there are {known}, {}", service_intentions::KIND)))
}

//! `/v1/event/…`: user events. Every agent has the newest 256; each shows those that are meant for it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::call::{Call, Meta, Refusal, Reply};
use super::query::ReadOptions;
use super::records::read;
use crate::gossip::{EVENT_BYTES_MAX, Space, Write};
use crate::lww::{Body, Scope};
use crate::registry::LocalState;

/// Longest payload, in bytes: with its base64 form and the filters an event fits [`EVENT_BYTES_MAX`].
const PAYLOAD_BYTES_MAX: usize = 2048;
/// Longest name, and longest filter, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// Largest compiled filter, in bytes.
const FILTER_BYTES_MAX: usize = 64 * 1024;

/// Compiles a filter as `?filter=` does its expressions: over bytes, bounded.
fn compile(filter: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(filter).unicode(false).size_limit(FILTER_BYTES_MAX).dfa_size_limit(FILTER_BYTES_MAX).build()
}

/// An event as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Event {
    name: String,
    /// In base64.
    payload: Option<String>,
    node: String,
    service: String,
    tag: String,
}

impl Event {
    /// Whether it is meant for this node, by its filters: expressions that are sought in the names.
    fn is_for(&self, node: &str, local: &LocalState) -> bool {
        // What `fire` refuses a peer may bring all the same: such an event is meant for nobody.
        if [&self.node, &self.service, &self.tag].iter().any(|filter| filter.len() > TEXT_BYTES_MAX) {
            return false;
        }
        let compiled = |filter: &str| if filter.is_empty() { Ok(None) } else { compile(filter).map(Some) };
        let (Ok(of_node), Ok(of_service), Ok(of_tag)) =
            (compiled(&self.node), compiled(&self.service), compiled(&self.tag))
        else {
            return false;
        };
        if of_node.is_some_and(|regex| !regex.is_match(node.as_bytes())) {
            return false;
        }
        let Some(of_service) = of_service else { return true };
        local.services.values().any(|service| {
            let record = &service.definition.record;
            let has_tag = |regex: &Regex| record.tags.iter().any(|tag| regex.is_match(tag.as_bytes()));
            of_service.is_match(record.name.as_str().as_bytes()) && of_tag.as_ref().is_none_or(has_tag)
        })
    }

    fn shape(&self, id: &str, ltime: u64) -> Value {
        json!({
            "ID": id,
            "Name": self.name,
            "Payload": self.payload,
            "NodeFilter": self.node,
            "ServiceFilter": self.service,
            "TagFilter": self.tag,
            "Version": 1,
            "LTime": ltime,
        })
    }
}

/// `PUT /v1/event/fire/:name`: the body is the payload.
pub(super) async fn fire(call: Call) -> Result<Reply, Refusal> {
    ReadOptions::parse(&call)?;
    let name = call.argument.clone();
    if name.is_empty() || name.len() > TEXT_BYTES_MAX {
        return Err(Refusal::bad(format!("Invalid event name: 1 to {TEXT_BYTES_MAX} bytes")));
    }
    if call.body.len() > PAYLOAD_BYTES_MAX {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("Payload has {} bytes; at most {PAYLOAD_BYTES_MAX} travel with an event", call.body.len()),
        ));
    }
    let filter = |key: &str| {
        let text = call.query.first(key).unwrap_or_default();
        let bad = |why: String| Refusal::bad(format!("Invalid {key} filter: {why}"));
        if text.len() > TEXT_BYTES_MAX {
            return Err(bad(format!("more than {TEXT_BYTES_MAX} bytes")));
        }
        compile(text).map_err(|error| bad(error.to_string()))?;
        Ok(text.to_owned())
    };
    let (node, service, tag) = (filter("node")?, filter("service")?, filter("tag")?);
    if !tag.is_empty() && service.is_empty() {
        return Err(Refusal::bad("Cannot provide tag filter without service filter"));
    }
    let payload = (!call.body.is_empty()).then(|| STANDARD.encode(&call.body));
    let event = Event { name, payload, node, service, tag };
    let id = uuid::Uuid::new_v4().to_string();
    let value = serde_json::to_vec(&event).map_err(|error| Refusal::internal(error.to_string()))?;
    if value.len() > EVENT_BYTES_MAX {
        let text = format!("Event has {} bytes with its filters; at most {EVENT_BYTES_MAX} travel", value.len());
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text));
    }
    let body = Body { flags: 0, value };
    call.shared.records.write(Space::Event, Write::Put { key: id.clone(), body }).await?;
    Reply::json(&call, &event.shape(&id, 0))
}

/// `GET /v1/event/list`: those that are meant for this node, oldest first.
pub(super) async fn list(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let answer = read(&call, Space::Event, Scope::Prefix(String::new()), options.blocking).await?;
    let local = call.shared.registry.state();
    let node = call.shared.node.name.as_str();
    let wanted = |key: &str, text: &str| call.query.given(key).is_none_or(|wanted| wanted == text);
    let mut rows = answer.rows;
    rows.sort_by(|(_, a), (_, b)| a.stamp.cmp(&b.stamp));
    let shapes = rows.iter().filter_map(|(id, row)| {
        let event: Event = serde_json::from_slice(&row.body.as_ref()?.value).ok()?;
        let is_wanted = wanted("name", &event.name)
            && wanted("node", &event.node)
            && wanted("service", &event.service)
            && wanted("tag", &event.tag);
        (is_wanted && event.is_for(node, &local)).then(|| event.shape(id, row.stamp.ms))
    });
    let shapes: Vec<Value> = shapes.collect();
    Reply::json_with(&call, &shapes, Meta { index: Some(answer.index), content_hash: None })
}

#[cfg(test)]
mod tests {
    use super::super::fake::Bench;
    use super::super::seam::Registry as _;
    use super::*;

    #[tokio::test]
    async fn an_event_is_listed_where_its_filters_lead_and_by_name() {
        let bench = Bench::new();
        let fired = bench.put("/v1/event/fire/deploy?node=n1", "v2").await.json();
        assert_eq!(fired["Payload"], "djI=");
        for query in ["node=other", "service=nothing", "service=web&tag=nothing"] {
            bench.put(&format!("/v1/event/fire/elsewhere?{query}"), "").await.json();
        }
        bench.put("/v1/event/fire/restart?service=we.", "").await.json();
        let names = |list: Value| -> Vec<String> {
            list.as_array().unwrap().iter().map(|event| event["Name"].as_str().unwrap().to_owned()).collect()
        };
        let all = bench.get("/v1/event/list").await;
        let index = all.index();
        assert_eq!(names(all.json()), ["deploy", "restart"]);
        assert_eq!(names(bench.get("/v1/event/list?name=deploy").await.json()), ["deploy"]);
        let waiting = bench.get(&format!("/v1/event/list?index={index}&wait=60s"));
        let (answer, _) = tokio::join!(waiting, bench.put("/v1/event/fire/third", ""));
        assert_eq!(names(answer.json()).len(), 3);
    }

    #[tokio::test]
    async fn a_bad_filter_and_a_large_payload_are_refused() {
        let bench = Bench::new();
        assert_eq!(bench.put("/v1/event/fire/x?node=(", "").await.status, StatusCode::BAD_REQUEST);
        assert_eq!(bench.put("/v1/event/fire/x?tag=a", "").await.status, StatusCode::BAD_REQUEST);
        let large = bench.put("/v1/event/fire/x", &"x".repeat(PAYLOAD_BYTES_MAX + 1)).await;
        assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(bench.get("/v1/event/list").await.json(), json!([]));
    }

    #[tokio::test]
    async fn an_event_whose_filters_no_agent_would_take_is_meant_for_nobody() {
        let bench = Bench::new();
        let local = bench.registry.state();
        let event = |node: &str| Event {
            name: "x".to_owned(),
            payload: None,
            node: node.to_owned(),
            service: String::new(),
            tag: String::new(),
        };
        assert!(event("").is_for("n1", &local) && event("n.").is_for("n1", &local));
        assert!(!event("(").is_for("n1", &local) && !event(&"|".repeat(257)).is_for("n1", &local));
    }

    #[tokio::test]
    async fn the_newest_256_are_kept() {
        let bench = Bench::new();
        for at in 0..300 {
            bench.put(&format!("/v1/event/fire/e{at}"), "").await.json();
        }
        let list = bench.get("/v1/event/list").await.json();
        assert_eq!(list.as_array().unwrap().len(), 256);
        assert_eq!(list[255]["Name"], "e299");
    }
}

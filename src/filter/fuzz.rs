//! What a client's `?filter=` or a config entry can say: see `crate::fuzz`.

#![allow(clippy::unwrap_used, reason = "a target fails by panicking")]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::{EXPRESSION_BYTES_MAX, Filter};
use crate::model::{
    Generation, HealthStatus, Instance, MemberStatus, NodeEntry, NodeInfo, Protocol, ServiceRecord, TextMap, Weights,
};

/// What parses can be written, and is the same filter when it is read again; every filter answers.
pub(crate) fn expression(bytes: &[u8]) -> bool {
    static RECORD: OnceLock<Instance> = OnceLock::new();
    let record = RECORD.get_or_init(instance);
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(filter) = Filter::parse::<Instance>(text) else { return false };
    let is_match = filter.is_match(record);
    let written = filter.to_string();
    // Quotes and escapes may make it longer than what was read.
    if written.len() <= EXPRESSION_BYTES_MAX {
        let again = Filter::parse::<Instance>(&written).expect("what was parsed can be written and parsed");
        assert_eq!(again.to_string(), written);
        assert_eq!(again.is_match(record), is_match, "{written}");
        let negated = format!("not ({written})");
        if let Ok(negated) = Filter::parse::<Instance>(&negated) {
            assert_ne!(negated.is_match(record), is_match, "{written}");
        }
    }
    true
}

/// `web-1` of `web` on `n1`, with something in every field.
pub(super) fn instance() -> Instance {
    let record = ServiceRecord {
        id: "web-1".parse().unwrap(),
        name: "web".parse().unwrap(),
        kind: Box::default(),
        tags: ["v1".into(), "blue".into()].into(),
        meta: [("rack", "r1".into()), ("a.b", "dotted".into())].into_iter().collect::<TextMap<Box<str>>>(),
        address: "10.1.0.7".into(),
        port: 8080,
        tagged_addresses: [("lan", ("10.1.0.7".into(), 80))].into_iter().collect(),
        weights: Weights { passing: 10, warning: 1 },
        protocol: Protocol::Http,
        enable_tag_override: true,
    };
    let info = NodeInfo {
        id: "0d5cbd38-6c93-4b5a-bd2c-1ab5b4c2e4f1".to_owned(),
        name: "n1".parse().unwrap(),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::from([("zone".to_owned(), "z1".to_owned())]),
        build: String::new(),
        issuer: false,
    };
    let node = NodeEntry {
        info: Arc::new(info),
        status: MemberStatus::Alive,
        generation: Generation { number: 1, nonce: 1 },
        checks: Vec::new(),
        external: None,
        create_index: 1,
        modify_index: 1,
    };
    Instance {
        node: Arc::new(node),
        record: Arc::new(record),
        checks: Box::default(),
        status: HealthStatus::Passing,
        create_index: 1,
        modify_index: 1,
    }
}

//! Nodes and instances for tests: what a test does not say is the least that there is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Generation, HealthStatus, Instance, MemberStatus, NodeEntry, NodeInfo, ServiceRecord};

/// The facts of a node at 10.0.0.1, in dc1, without meta; a test writes what matters to it:
/// `NodeInfo { datacenter: …, ..node_info("n1") }`.
pub(crate) fn node_info(name: &str) -> NodeInfo {
    NodeInfo {
        id: String::new(),
        name: name.parse().unwrap(),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: String::new(),
        issuer: false,
    }
}

/// The node of these facts, alive, without checks.
pub(crate) fn node_entry(info: NodeInfo) -> NodeEntry {
    NodeEntry {
        info: Arc::new(info),
        status: MemberStatus::Alive,
        generation: Generation::default(),
        checks: Vec::new(),
        external: None,
        create_index: 1,
        modify_index: 1,
    }
}

/// An instance on a node, passing, without checks.
pub(crate) fn instance(node: impl Into<Arc<NodeEntry>>, record: ServiceRecord) -> Instance {
    Instance {
        node: node.into(),
        record: Arc::new(record),
        checks: Box::default(),
        status: HealthStatus::Passing,
        create_index: 1,
        modify_index: 1,
    }
}

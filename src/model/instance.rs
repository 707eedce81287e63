//! A node and an instance as every agent sees them: what was published, and what follows from it there.
//!
//! Not here: how they come about and which there are (`catalogue`).

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use super::{CheckRecord, Generation, HealthStatus, MemberStatus, NodeInfo, NodeName, ServiceRecord, TextMap};

/// A node as the catalogue shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEntry {
    /// Its published facts.
    pub info: Arc<NodeInfo>,
    /// What the membership says; anything but `Alive` makes its instances critical (`serfHealth`).
    pub status: MemberStatus,
    /// Which life of it.
    pub generation: Generation,
    /// Its node-level checks, by id.
    pub checks: Vec<Arc<CheckRecord>>,
    /// Where no agent runs on it: what it is instead. Its `info` has no mesh port then, and its `status` is that of the agent
    /// where it was written.
    pub external: Option<Box<Outside>>,
    /// Index at which the node appeared.
    pub create_index: u64,
    /// Index of its last change.
    pub modify_index: u64,
}

/// What a node without an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// An IP address or a host name.
    pub address: Box<str>,
    /// `lan`, `wan` … -> address.
    pub tagged_addresses: TextMap<Box<str>>,
    /// The agent that tells of it.
    pub written_at: NodeName,
}

impl NodeEntry {
    /// Returns where it is: an IP address, or a host name of a node without an agent.
    pub fn address(&self) -> Cow<'_, str> {
        match &self.external {
            Some(outside) => Cow::Borrowed(&*outside.address),
            None => Cow::Owned(self.info.mesh_addr.ip().to_string()),
        }
    }

    /// Returns its IP address; none if it has but a name.
    pub fn ip(&self) -> Option<IpAddr> {
        match &self.external {
            Some(outside) => outside.address.parse().ok(),
            None => Some(self.info.mesh_addr.ip()),
        }
    }

    /// Returns the agent where it was written, if no agent runs on it.
    pub fn writer(&self) -> Option<&NodeName> {
        self.external.as_ref().map(|outside| &outside.written_at)
    }
}

/// An instance with all that decides whether it gets traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Where it runs.
    pub node: Arc<NodeEntry>,
    /// What its node published; shared with the replica.
    pub record: Arc<ServiceRecord>,
    /// Its own checks, by id; shared with the replica.
    pub checks: Box<[Arc<CheckRecord>]>,
    /// The worst of its checks, its node's checks and the membership.
    pub status: HealthStatus,
    /// Index at which it appeared.
    pub create_index: u64,
    /// Index of its last change.
    pub modify_index: u64,
}

//! Indexes of lists that the snapshot gives no index for: which nodes there are, which datacenters.
//!
//! Each list is remembered as it was last seen, with the snapshot's index of that moment. A change is stamped with the
//! index at which a reader first meets it: later than the change, and above every index that was given out before.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::catalogue::Snapshot;
use crate::model::{MemberStatus, NodeName};

use super::shape::SIDECAR_SUFFIX;

/// What a query can wait for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    /// The instances of one service, their checks and nodes.
    Service(String),
    /// Any service.
    Services,
    /// Which nodes there are, and their facts.
    Nodes,
    /// Any service or node.
    Everything,
    /// Who may call whom.
    Policy,
    /// Any service, and what gateways into the mesh lead to.
    Ingress,
}

impl Topic {
    /// Returns the index of its last change; 0: it was never there.
    pub(super) fn index(&self, snapshot: &Snapshot, lists: &ListIndexes) -> u64 {
        match self {
            Self::Service(name) => service(snapshot, name),
            Self::Services => services(snapshot),
            Self::Nodes => lists.nodes(snapshot),
            Self::Everything => lists.nodes(snapshot).max(services(snapshot)),
            Self::Policy => snapshot.policy_index,
            Self::Ingress => services(snapshot).max(snapshot.traffic_index),
        }
    }
}

/// The lists' indexes.
#[derive(Debug, Default)]
pub(super) struct ListIndexes {
    nodes: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The snapshot that was looked at last.
    at: u64,
    names: BTreeSet<NodeName>,
    changed: u64,
}

impl ListIndexes {
    /// Returns the index of the last change to the nodes: one that came, went or changed.
    fn nodes(&self, snapshot: &Snapshot) -> u64 {
        let shown = || snapshot.nodes.values().filter(|node| node.status != MemberStatus::Left);
        let newest = shown().map(|node| node.modify_index).max().unwrap_or(0);
        let mut seen = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if snapshot.index > seen.at {
            let names: BTreeSet<NodeName> = shown().map(|node| node.info.name.clone()).collect();
            if names != seen.names {
                seen.names = names;
                seen.changed = snapshot.index;
            }
            seen.at = snapshot.index;
        }
        // Of an older snapshot than the last one seen no newer change is told: its reader would wait past that.
        seen.changed.min(snapshot.index).max(newest).max(snapshot.externals.nodes_index())
    }
}

/// Returns the index of the last change to any service.
fn services(snapshot: &Snapshot) -> u64 {
    let living = snapshot.services.values().map(|service| service.modify_index);
    let mesh = living.chain(snapshot.gone_services.values().copied()).max().unwrap_or(0);
    mesh.max(snapshot.externals.services_index())
}

/// Returns the index of the last change to the service `name`; 0 if it never had an instance.
///
/// A synthetic proxy changes with its service.
fn service(snapshot: &Snapshot, name: &str) -> u64 {
    let owner = name.strip_suffix(SIDECAR_SUFFIX).filter(|_| !snapshot.services.contains_key(name));
    let name = owner.unwrap_or(name);
    let living = snapshot.services.get(name).map(|service| service.modify_index);
    let mesh = living.max(snapshot.gone_services.get(name).copied()).unwrap_or(0);
    mesh.max(snapshot.externals.service_index(name))
}

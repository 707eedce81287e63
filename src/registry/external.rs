//! Nodes that no agent runs on, written at this agent (`/v1/catalog/register`). Pure.
//!
//! A write sets what it names and leaves the rest: a node keeps its other services and checks. Their checks are not run: whoever
//! writes them says how they are.
//!
//! Invariants: a node that comes out fits the bounds below; a check about a service stands beside that service.
//! Not here: whether another has the name (`api`), the disk (`task`).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::RegistryError;
use crate::model::{CheckId, CheckRecord, Entry, ExternalRecord, InstanceId, NodeName, ServeScope, ServiceRecord};
use crate::wire;

/// Most nodes without an agent that are written at one agent.
pub const EXTERNAL_NODES_MAX: usize = 256;
/// Most bytes that they take on the wire, all together: every agent holds them, and they take the place of this agent's own
/// services and checks.
pub const EXTERNAL_BYTES_MAX: usize = 24 * 1024;
/// Most bytes of one node on disk, with what its checks say, which stays here.
const KEPT_BYTES_MAX: usize = 128 * 1024;

/// A node without an agent, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalNode {
    /// What others are told.
    pub record: Arc<ExternalRecord>,
    /// What stays here of its checks.
    pub notes: BTreeMap<CheckId, CheckNotes>,
}

/// What is not spread of a check of a node without an agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckNotes {
    /// What its writer saw.
    pub output: String,
    /// What its writer looks at, as JSON; empty: it did not say. Nobody runs it.
    pub definition: String,
}

/// The facts of a node without an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalFacts {
    /// A UUID; empty: none.
    pub id: String,
    /// An IP address or a host name.
    pub address: String,
    /// `lan`, `wan` … -> address.
    pub tagged_addresses: BTreeMap<String, String>,
    /// Free key-value pairs.
    pub meta: BTreeMap<String, String>,
}

/// What is written about a node without an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalWrite {
    /// Which node.
    pub node: NodeName,
    /// Its facts; none: they stay (`SkipNodeUpdate`).
    pub facts: Option<ExternalFacts>,
    /// A service to add or replace.
    pub service: Option<ServiceRecord>,
    /// Checks to add or replace, with what stays here of each.
    pub checks: Vec<(CheckRecord, CheckNotes)>,
}

/// What is taken away of a node without an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExternalPart {
    /// All of it.
    Node,
    /// A service and its checks.
    Service(InstanceId),
    /// A check.
    Check(CheckId),
}

impl ExternalNode {
    /// Returns what `write` makes of `held`.
    ///
    /// # Errors
    /// [`RegistryError::OutOfScope`]; `Invalid` for a node that is not there, or a check of a service that is not.
    pub(crate) fn written(
        held: Option<&Self>,
        write: ExternalWrite,
        scope: &ServeScope,
    ) -> Result<Self, RegistryError> {
        let ExternalWrite { node, facts, service, checks } = write;
        if let Some(service) = &service {
            let name = service.name.as_str();
            if !scope.covers(name) {
                return Err(RegistryError::OutOfScope { service: name.to_owned(), scope: scope.to_string() });
            }
        }
        let mut record = match (held, facts) {
            (held, Some(facts)) => {
                let (services, old) = held.map(|held| (&held.record.services, &held.record.checks)).unzip();
                ExternalRecord {
                    name: node,
                    id: facts.id.into(),
                    address: facts.address.into(),
                    tagged_addresses: facts.tagged_addresses.into_iter().map(boxed).collect(),
                    meta: facts.meta.into_iter().map(boxed).collect(),
                    services: services.cloned().unwrap_or_default(),
                    checks: old.cloned().unwrap_or_default(),
                }
            }
            (Some(held), None) => ExternalRecord::clone(&held.record),
            (None, None) => {
                return Err(RegistryError::Invalid(format!(
                    "node {:?} is not registered here: leave SkipNodeUpdate out and give its Address",
                    node.as_str()
                )));
            }
        };
        if let Some(service) = service {
            record.services = put(&record.services, service, |record| record.id.clone());
        }
        let mut notes = held.map(|held| held.notes.clone()).unwrap_or_default();
        for (check, note) in checks {
            if let Some(about) = check.service.as_ref()
                && !record.services.iter().any(|service| service.id == *about)
            {
                return Err(RegistryError::Invalid(format!(
                    "Invalid check: {:?} is about service {:?}, which node {:?} does not have: register that first, or in the same request",
                    check.id.as_str(),
                    about.as_str(),
                    record.name.as_str()
                )));
            }
            notes.insert(check.id.clone(), note);
            record.checks = put(&record.checks, check, |record| record.id.clone());
        }
        Ok(Self { record: Arc::new(record), notes })
    }

    /// Returns what is left of it without `part`; none: nothing.
    pub(super) fn without(&self, part: &ExternalPart) -> Option<Self> {
        let mut record = ExternalRecord::clone(&self.record);
        match part {
            ExternalPart::Node => return None,
            ExternalPart::Service(id) => {
                record.services = left(&record.services, |service| service.id != *id);
                record.checks = left(&record.checks, |check| check.service.as_ref() != Some(id));
            }
            ExternalPart::Check(id) => record.checks = left(&record.checks, |check| check.id != *id),
        }
        let mut notes = self.notes.clone();
        notes.retain(|id, _| record.checks.iter().any(|check| check.id == *id));
        Some(Self { record: Arc::new(record), notes })
    }

    /// Returns it without the services that `scope` does not cover, and how many these are.
    pub(super) fn within(self, scope: &ServeScope) -> (Self, usize) {
        let outside: Vec<InstanceId> = self
            .record
            .services
            .iter()
            .filter(|service| !scope.covers(service.name.as_str()))
            .map(|service| service.id.clone())
            .collect();
        let count = outside.len();
        let without = |node: Self, id| node.without(&ExternalPart::Service(id)).unwrap_or(node);
        (outside.into_iter().fold(self, without), count)
    }

    /// How many bytes it takes on the wire.
    fn bytes(&self) -> usize {
        let entry = Entry::External(Arc::clone(&self.record));
        wire::encode(&(entry.key(), entry)).map_or(usize::MAX, |bytes| bytes.len())
    }
}

/// How many bytes all of `nodes` take on the wire.
pub(super) fn bytes<'a>(nodes: impl IntoIterator<Item = &'a Arc<ExternalNode>>) -> usize {
    nodes.into_iter().map(|node| node.bytes()).fold(0, usize::saturating_add)
}

/// Refuses more nodes than are kept; returns how many bytes they take on the wire.
pub(super) fn are_bounded(nodes: &BTreeMap<NodeName, Arc<ExternalNode>>) -> Result<usize, RegistryError> {
    if nodes.len() > EXTERNAL_NODES_MAX {
        return Err(RegistryError::Invalid(format!(
            "this agent has {EXTERNAL_NODES_MAX} nodes without an agent already, which is the most: write this one at another agent, or deregister some"
        )));
    }
    for node in nodes.values() {
        let kept = wire::encode(node).map_or(usize::MAX, |bytes| bytes.len());
        if kept > KEPT_BYTES_MAX {
            return Err(RegistryError::Invalid(format!(
                "node {:?} would take {kept} bytes with the output of its checks; at most {KEPT_BYTES_MAX} are kept",
                node.record.name.as_str()
            )));
        }
    }
    let bytes = bytes(nodes.values());
    if bytes > EXTERNAL_BYTES_MAX {
        return Err(RegistryError::Invalid(format!(
            "the nodes without an agent that are written here would take {bytes} bytes; at most {EXTERNAL_BYTES_MAX} are spread through the mesh by one agent: write some at another agent, or shorten tags, meta and notes"
        )));
    }
    Ok(bytes)
}

fn boxed((key, value): (String, String)) -> (String, Box<str>) {
    (key, value.into())
}

/// Puts `new` into `list`, which is in order of `key`, in place of the one with its key.
fn put<T, K: Ord>(list: &[Arc<T>], new: T, key: impl Fn(&T) -> K) -> Box<[Arc<T>]> {
    let mut list = list.to_vec();
    match list.binary_search_by_key(&key(&new), |held| key(held)) {
        Ok(at) => {
            if let Some(held) = list.get_mut(at) {
                *held = Arc::new(new);
            }
        }
        Err(at) => list.insert(at, Arc::new(new)),
    }
    list.into()
}

fn left<T>(list: &[Arc<T>], stays: impl Fn(&T) -> bool) -> Box<[Arc<T>]> {
    list.iter().filter(|held| stays(held)).cloned().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::HealthStatus;
    use crate::registry::testing::named;

    /// A write of the node `node` at `address`, with a service of each of the names.
    pub(crate) fn write(node: &str, address: &str, service: Option<&str>) -> ExternalWrite {
        let facts = ExternalFacts {
            id: String::new(),
            address: address.to_owned(),
            tagged_addresses: BTreeMap::new(),
            meta: BTreeMap::from([("external-node".to_owned(), "true".to_owned())]),
        };
        let service = service.map(|name| named(name).record);
        ExternalWrite { node: node.parse().unwrap(), facts: Some(facts), service, checks: Vec::new() }
    }

    pub(crate) fn check(id: &str, about: Option<&str>, status: HealthStatus) -> (CheckRecord, CheckNotes) {
        let record = CheckRecord {
            id: id.parse().unwrap(),
            name: id.into(),
            status,
            notes: "".into(),
            service: about.map(|about| about.parse().unwrap()),
            kind: "".into(),
        };
        (record, CheckNotes { output: format!("{id} says so"), definition: String::new() })
    }

    fn all() -> ServeScope {
        "*".parse().unwrap()
    }

    #[test]
    fn a_write_sets_what_it_names_and_leaves_the_rest() {
        let first = ExternalNode::written(None, write("h1", "192.0.2.1", Some("db")), &all()).unwrap();
        let checks = vec![check("up", None, HealthStatus::Passing), check("c", Some("db"), HealthStatus::Warning)];
        let more = ExternalWrite { facts: None, checks, ..write("h1", "", Some("cache")) };
        let second = ExternalNode::written(Some(&first), more, &all()).unwrap();
        let services = |node: &ExternalNode| node.record.services.iter().map(|s| s.id.to_string()).collect::<Vec<_>>();
        let ids = |node: &ExternalNode| node.record.checks.iter().map(|c| c.id.to_string()).collect::<Vec<_>>();
        assert_eq!(
            (services(&second), ids(&second)),
            (vec!["cache".into(), "db".into()], vec!["c".into(), "up".into()])
        );
        assert_eq!(&*second.record.address, "192.0.2.1");
        assert_eq!(second.notes["c"].output, "c says so");

        let moved = ExternalNode::written(Some(&second), write("h1", "db.example", None), &all()).unwrap();
        assert_eq!((&*moved.record.address, services(&moved).len()), ("db.example", 2));

        let without = moved.without(&ExternalPart::Service("db".parse().unwrap())).unwrap();
        assert_eq!((services(&without), ids(&without)), (vec!["cache".into()], vec!["up".into()]));
        assert_eq!(without.notes.len(), 1, "what a check said goes with it");
        let bare = without.without(&ExternalPart::Check("up".parse().unwrap())).unwrap();
        assert!(ids(&bare).is_empty() && bare.notes.is_empty());
        assert_eq!(bare.without(&ExternalPart::Node), None);
    }

    #[test]
    fn what_is_not_there_or_outside_the_scope_is_refused() {
        #[track_caller]
        fn refused(write: ExternalWrite, scope: &str, want: &str) {
            let error = ExternalNode::written(None, write, &scope.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        refused(ExternalWrite { facts: None, ..write("h1", "", None) }, "*", "SkipNodeUpdate");
        refused(write("h1", "192.0.2.1", Some("db")), "web", "serve scope is `web`");
        let checks = vec![check("c", Some("nobody"), HealthStatus::Passing)];
        refused(ExternalWrite { checks, ..write("h1", "192.0.2.1", Some("db")) }, "*", "does not have");
        let both = ExternalNode::written(None, write("h1", "192.0.2.1", Some("db")), &all()).unwrap();
        let (narrow, left_out) = both.within(&"web".parse().unwrap());
        assert_eq!((narrow.record.services.len(), left_out), (0, 1));
    }

    #[test]
    fn nodes_are_bounded_in_number_and_in_bytes() {
        let node = |at: usize, meta: usize| {
            let mut write = write(&format!("h{at}"), "192.0.2.1", None);
            write.facts.as_mut().unwrap().meta.insert("k".to_owned(), "x".repeat(meta));
            Arc::new(ExternalNode::written(None, write, &all()).unwrap())
        };
        let of = |count: usize, meta: usize| -> BTreeMap<NodeName, Arc<ExternalNode>> {
            (0..count).map(|at| node(at, meta)).map(|node| (node.record.name.clone(), node)).collect()
        };
        assert!(are_bounded(&of(EXTERNAL_NODES_MAX, 1)).unwrap() < EXTERNAL_BYTES_MAX);
        let many = are_bounded(&of(EXTERNAL_NODES_MAX + 1, 1)).unwrap_err().to_string();
        assert!(many.contains("which is the most"), "{many}");
        let large = are_bounded(&of(60, 500)).unwrap_err().to_string();
        assert!(large.contains(&format!("at most {EXTERNAL_BYTES_MAX}")), "{large}");
        let mut loud = ExternalNode::clone(&node(1, 1));
        loud.notes
            .insert("c".parse().unwrap(), CheckNotes { output: "x".repeat(KEPT_BYTES_MAX), definition: String::new() });
        let loud = are_bounded(&BTreeMap::from([("h1".parse().unwrap(), Arc::new(loud))])).unwrap_err().to_string();
        assert!(loud.contains("output of its checks"), "{loud}");
    }
}

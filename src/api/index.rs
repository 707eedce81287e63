//! Indexes of lists that the snapshot gives no index for: which nodes there are, what is on each of them.
//!
//! Each list is remembered as it was last seen, with the snapshot's index of that moment. A change is stamped with the
//! index at which a reader first meets it: later than the change, and above every index that was given out before.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, PoisonError};

use crate::catalogue::Snapshot;
use crate::model::{MemberStatus, NodeEntry, NodeName, SIDECAR_SUFFIX};

/// Most names and ids of nodes that are gone whose indexes are remembered one by one.
const GONE_MAX: usize = 4096;

/// What a query can wait for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    /// The instances of one service, their checks and nodes.
    Service(String),
    /// Any service.
    Services,
    /// Which nodes there are, and their facts.
    Nodes,
    /// The node of this name or id: its facts, its checks, its instances.
    Node(String),
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
            Self::Node(key) => lists.node(snapshot, key),
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
    each: Mutex<EachNode>,
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

impl ListIndexes {
    /// Returns the index of the last change to the node of the name or id `key`, or to what is on it; of one that was never
    /// there that of the first look.
    fn node(&self, snapshot: &Snapshot, key: &str) -> u64 {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        each.look_at(snapshot);
        let index = each.nodes.get(key).map(|node| node.newest.max(node.changed));
        // Of an older snapshot than the last one seen no newer change is told: its reader would wait past that.
        index.or_else(|| each.gone.get(key).copied()).unwrap_or(each.floor).min(snapshot.index)
    }
}

/// What was seen of each node, by its name and by its id. Nothing is looked at before somebody asks for a node.
#[derive(Debug, Default)]
struct EachNode {
    /// The snapshot that was looked at last.
    at: u64,
    nodes: HashMap<Box<str>, SeenNode>,
    /// When nodes went that are gone; [`GONE_MAX`] at most.
    gone: HashMap<Box<str>, u64>,
    /// The index of every node that was never there, or is forgotten.
    floor: u64,
    /// With keys that nobody knows: no two sets of ids are made to look alike.
    hashing: RandomState,
}

/// What one name or id stands for.
#[derive(Debug, Default, Clone, Copy)]
struct SeenNode {
    /// The greatest index of a change to what is there.
    newest: u64,
    /// The sum of the hashes of what is there: the node and its instances' ids.
    held: u64,
    /// When something went.
    changed: u64,
}

impl EachNode {
    fn look_at(&mut self, snapshot: &Snapshot) {
        if snapshot.index <= self.at {
            return;
        }
        if self.at == 0 {
            self.floor = snapshot.index;
        }
        self.at = snapshot.index;
        let now = tally(snapshot, &self.hashing);
        for (key, node) in &now {
            let Some(seen) = self.nodes.get_mut(*key) else {
                self.gone.remove(*key);
                self.nodes.insert(Box::from(*key), SeenNode { changed: snapshot.index, ..*node });
                continue;
            };
            let changed = if seen.held == node.held { seen.changed } else { snapshot.index };
            *seen = SeenNode { changed, ..*node };
        }
        let gone = &mut self.gone;
        self.nodes.retain(|key, _| {
            let is_there = now.contains_key(&**key);
            if !is_there {
                gone.insert(key.clone(), snapshot.index);
            }
            is_there
        });
        if self.gone.len() > GONE_MAX {
            self.gone = HashMap::new();
            self.floor = snapshot.index;
        }
    }
}

/// Adds up what each name and id of a node stands for; nodes that left on purpose are not shown.
fn tally<'a>(snapshot: &'a Snapshot, hashing: &RandomState) -> HashMap<&'a str, SeenNode> {
    let mut tallies: HashMap<&str, SeenNode> = HashMap::new();
    let mut add = |node: &'a NodeEntry, id: &str, modified: u64| {
        if node.status == MemberStatus::Left {
            return;
        }
        let hash = hashing.hash_one((node.writer(), id));
        for key in [node.info.name.as_str(), node.info.id.as_str()] {
            let tally = tallies.entry(key).or_default();
            tally.held = tally.held.wrapping_add(hash);
            tally.newest = tally.newest.max(modified);
        }
    };
    for node in snapshot.listed_nodes() {
        add(node, "", node.modify_index);
    }
    for instance in snapshot.all_listed() {
        add(&instance.node, instance.record.id.as_str(), instance.modify_index);
    }
    tallies
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::fake::{Answer, Bench, is_pending, node_entry, service, snapshot, tokio_test_task};
    use super::*;
    use crate::model::{HealthStatus, NodeInfo};

    /// The views of one node.
    fn views(number: u8) -> [String; 4] {
        [
            format!("/v1/catalog/node/n{number}"),
            format!("/v1/catalog/node-services/uuid-{number}"),
            format!("/v1/catalog/node-services/n{number}"),
            format!("/v1/health/node/n{number}"),
        ]
    }

    /// Lets queries wait for the next change of each view.
    async fn watch(bench: &Bench, views: [String; 4]) -> Vec<tokio::task::JoinHandle<Answer>> {
        let mut waiting = Vec::new();
        for view in views {
            let index = bench.get(&view).await.index();
            waiting.push(tokio_test_task(bench.get(&format!("{view}?index={index}&wait=10m"))));
        }
        for (at, task) in waiting.iter_mut().enumerate() {
            assert!(is_pending(task).await, "view {at} waits");
        }
        waiting
    }

    async fn all_wait(waiting: &mut [tokio::task::JoinHandle<Answer>]) {
        for (at, task) in waiting.iter_mut().enumerate() {
            assert!(is_pending(task).await, "view {at} was woken");
        }
    }

    async fn all_wake(waiting: Vec<tokio::task::JoinHandle<Answer>>, index: u64) -> Vec<Answer> {
        let mut answers = Vec::new();
        for task in waiting {
            let answer = task.await.unwrap();
            assert_eq!(answer.index(), index);
            answers.push(answer);
        }
        answers
    }

    #[tokio::test(start_paused = true)]
    async fn views_of_a_node_sleep_through_changes_on_others_and_wake_at_their_own() {
        let bench = Bench::with(None, 16);
        let mut waiting = watch(&bench, views(1)).await;
        bench.publish(|next| {
            let db = service("db", &[node_entry(2, MemberStatus::Alive)], HealthStatus::Passing, next.index);
            next.services.insert(db.name.clone(), Arc::new(db));
        });
        all_wait(&mut waiting).await;
        let changed = bench.publish(|next| {
            let api = service("api", &[node_entry(1, MemberStatus::Alive)], HealthStatus::Passing, next.index);
            next.services.insert(api.name.clone(), Arc::new(api));
        });
        all_wake(waiting, changed).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_instance_that_goes_wakes_the_views_of_its_node_alone() {
        let bench = Bench::with(None, 16);
        let (waiting, mut others) = (watch(&bench, views(1)).await, watch(&bench, views(2)).await);
        let gone = bench.publish(|next| {
            // What stays keeps its index, as the catalogue keeps it.
            let mut web = service("web", &[node_entry(2, MemberStatus::Alive)], HealthStatus::Passing, 1003);
            web.modify_index = next.index;
            next.services.insert(web.name.clone(), Arc::new(web));
        });
        for answer in all_wake(waiting, gone).await {
            assert!(!answer.text.contains("web-1"), "{}", answer.text);
        }
        all_wait(&mut others).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_wakes_its_views_when_it_goes_and_when_it_comes() {
        let bench = Bench::with(None, 16);
        let (leaving, coming) = (watch(&bench, views(2)).await, watch(&bench, views(3)).await);
        let mut coming = coming;
        let left = bench.publish(|next| {
            next.nodes.remove("n2");
            next.services.clear();
        });
        all_wake(leaving, left).await;
        all_wait(&mut coming).await;
        let mut again = watch(&bench, views(2)).await;
        let came = bench.publish(|next| {
            let mut n3 = NodeEntry::clone(&node_entry(3, MemberStatus::Alive));
            n3.modify_index = next.index;
            next.nodes.insert(n3.info.name.clone(), Arc::new(n3));
        });
        all_wake(coming, came).await;
        all_wait(&mut again).await;
    }

    #[test]
    fn nodes_that_went_are_remembered_up_to_a_bound_and_then_no_change_is_missed() {
        let lists = ListIndexes::default();
        let mut snapshot = snapshot();
        let mut fill = |numbers: std::ops::Range<u32>| {
            snapshot.index += 1;
            let named = |number: u32| {
                let entry = node_entry(1, MemberStatus::Alive);
                let (id, name) = (format!("id-{number}"), format!("x{number}").parse().unwrap());
                let info = NodeInfo { id, name, ..NodeInfo::clone(&entry.info) };
                Arc::new(NodeEntry { info: info.into(), ..NodeEntry::clone(&entry) })
            };
            snapshot.nodes = numbers.map(named).map(|node| (node.info.name.clone(), node)).collect();
            (lists.node(&snapshot, "x0"), lists.node(&snapshot, "never"), snapshot.index)
        };
        let (_, first_look, first) = fill(0..10);
        assert_eq!(first_look, first, "what is not there can be waited for");
        let (gone, never, second) = fill(10..20);
        assert_eq!((gone, never), (second, first));
        assert_eq!(fill(10..20), (second, first, second + 1));
        // Each by its name and its id: a little more than are remembered.
        fill(20..20 + 2040);
        let (forgotten, never, last) = fill(0..0);
        assert_eq!((forgotten, never), (last, last));
        assert!(lists.each.lock().unwrap().gone.len() <= GONE_MAX);
    }
}

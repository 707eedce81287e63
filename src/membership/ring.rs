//! Who watches whom: living members on a ring of hashed names, each watched by the two before it.
//!
//! Random probing finds a crash after an exponentially distributed time: its 99th percentile is 4.6 periods. A watcher
//! with a fixed turn finds it within one. Random probes stay as the net for watchers that are gone or slow themselves.
//!
//! The ring also says with whom a node of a large mesh gossips: with those beside it and those at a few places that its
//! name leads to. Everybody is a neighbour of at least four others and of sixteen on average, so news crosses the mesh as
//! fast as among random members, and the connections it goes over are the same for days.

use std::collections::BTreeSet;

use crate::model::NodeName;

/// How many successors a node watches: one watcher may be slow or gone.
pub(super) const WATCHED: usize = 2;

/// Up to so many others are all neighbours. A neighbour costs a handshake (2.8 ms of a core) when it first appears: with
/// everybody as neighbour a start of 100 agents takes 5,000 of them, of 200 agents 20,000; with a few, 15 per agent.
pub(super) const ALL_NEIGHBOURS_MAX: usize = 32;
/// Neighbours beside the two on each side in a larger mesh: news by three of them at a time reaches 10,000 in the same
/// number of rounds as among random members.
const FAR_NEIGHBOURS: u64 = 12;

/// The living members and this node.
#[derive(Debug, Default)]
pub(super) struct Ring(BTreeSet<(u64, NodeName)>);

/// FNV-1a with a final mix: stable over builds, spread well enough; nothing depends on it being hard to guess, since a
/// watcher's word alone decides nothing.
fn place(name: &NodeName) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = name.as_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix);
    spread(hash)
}

/// Makes of numbers that are alike places that are not.
fn spread(hash: u64) -> u64 {
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// The first of all names: what a search from a place begins with.
fn least() -> NodeName {
    "0".parse().expect("a digit is a name, and none is less")
}

impl Ring {
    pub(super) fn insert(&mut self, name: &NodeName) {
        self.0.insert((place(name), name.clone()));
    }

    pub(super) fn remove(&mut self, name: &NodeName) {
        self.0.remove(&(place(name), name.clone()));
    }

    pub(super) fn contains(&self, name: &NodeName) -> bool {
        self.0.contains(&(place(name), name.clone()))
    }

    /// Returns how many stand before `name`, and how many there are in all.
    pub(super) fn rank(&self, name: &NodeName) -> (usize, usize) {
        (self.0.range(..(place(name), name.clone())).count(), self.0.len())
    }

    /// Returns with whom `name` gossips, without itself, in order of name.
    pub(super) fn neighbours(&self, name: &NodeName) -> Vec<NodeName> {
        let is_other = |member: &&NodeName| *member != name;
        if self.0.len() <= ALL_NEIGHBOURS_MAX + 1 {
            return self.0.iter().map(|(_, member)| member).filter(is_other).cloned().collect();
        }
        let at = (place(name), name.clone());
        let before = self.0.range(..&at).rev().chain(self.0.range(&at..).rev()).map(|(_, member)| member);
        let far = (1..=FAR_NEIGHBOURS).filter_map(|number| {
            let from = (spread(at.0 ^ number), least());
            self.0.range(&from..).chain(&self.0).map(|(_, member)| member).find(is_other)
        });
        let mut found: BTreeSet<&NodeName> = before.take(WATCHED).chain(far).chain(self.successors(name)).collect();
        found.remove(name);
        found.into_iter().cloned().collect()
    }

    /// Returns the next [`WATCHED`] members after `name`, without itself.
    pub(super) fn successors<'a>(&'a self, name: &'a NodeName) -> impl Iterator<Item = &'a NodeName> {
        let at = (place(name), name.clone());
        let after = self.0.range((std::ops::Bound::Excluded(at.clone()), std::ops::Bound::Unbounded));
        let before = self.0.range(..at);
        after.chain(before).take(WATCHED).map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn everybody_is_watched_by_two() {
        let names: Vec<NodeName> = (0..50).map(|number| format!("n{number}").parse().unwrap()).collect();
        let mut ring = Ring::default();
        for name in &names {
            ring.insert(name);
        }
        for name in &names {
            let watchers = names.iter().filter(|at| ring.successors(at).any(|watched| watched == name)).count();
            assert_eq!(watchers, 2, "{name}");
        }
        // By rank: each watches the next two.
        let ranks: BTreeMap<usize, &NodeName> = names.iter().map(|name| (ring.rank(name).0, name)).collect();
        assert_eq!(ranks.len(), 50);
        for (rank, name) in &ranks {
            let next = [1, 2].map(|ahead| ranks[&((rank + ahead) % 50)]);
            assert_eq!(ring.successors(name).collect::<Vec<_>>(), next);
        }
        ring.remove(&names[7]);
        assert!(names.iter().all(|at| ring.successors(at).all(|watched| *watched != names[7])));
    }

    #[test]
    fn in_a_large_mesh_everybody_is_the_neighbour_of_a_few_and_news_crosses_it_in_few_steps() {
        let names: Vec<NodeName> = (0..2000).map(|number| format!("n{number}").parse().unwrap()).collect();
        let mut ring = Ring::default();
        for name in &names {
            ring.insert(name);
        }
        let neighbours: BTreeMap<&NodeName, Vec<NodeName>> =
            names.iter().map(|name| (name, ring.neighbours(name))).collect();
        let mut chosen: BTreeMap<&NodeName, usize> = BTreeMap::new();
        for (name, near) in &neighbours {
            assert!(near.len() <= 16 && !near.contains(name), "{name}: {near:?}");
            for near in near {
                *chosen.entry(near).or_default() += 1;
            }
        }
        assert_eq!(chosen.len(), 2000);
        assert!(chosen.values().all(|times| *times >= 4), "two on each side at least");
        let mut reached: BTreeSet<&NodeName> = [&names[0]].into();
        for _ in 0..5 {
            let next: Vec<&NodeName> = reached.iter().flat_map(|name| &neighbours[*name]).collect();
            reached.extend(next);
        }
        assert_eq!(reached.len(), 2000, "in five steps");
        // In a small mesh everybody is.
        for name in names.iter().skip(ALL_NEIGHBOURS_MAX + 1) {
            ring.remove(name);
        }
        assert_eq!(ring.neighbours(&names[0]).len(), ALL_NEIGHBOURS_MAX);
    }

    #[test]
    fn a_ring_of_one_watches_nobody_and_of_two_each_other() {
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut ring = Ring::default();
        ring.insert(&a);
        assert_eq!(ring.successors(&a).count(), 0);
        ring.insert(&b);
        assert_eq!(ring.successors(&a).collect::<Vec<_>>(), [&b]);
    }
}

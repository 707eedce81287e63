//! Who watches whom: living members on a ring of hashed names, each watched by the two before it.
//!
//! Random probing finds a crash after an exponentially distributed time: its 99th percentile is 4.6 periods. A watcher
//! with a fixed turn finds it within one. Random probes stay as the net for watchers that are gone or slow themselves.

use std::collections::BTreeSet;

use crate::model::NodeName;

/// How many successors a node watches: one watcher may be slow or gone.
pub(super) const WATCHED: usize = 2;

/// The living members and this node.
#[derive(Debug, Default)]
pub(super) struct Ring(BTreeSet<(u64, NodeName)>);

/// FNV-1a with a final mix: stable over builds, spread well enough; nothing depends on it being hard to guess, since a
/// watcher's word alone decides nothing.
fn place(name: &NodeName) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = name.as_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix);
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
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
        ring.remove(&names[7]);
        assert!(names.iter().all(|at| ring.successors(at).all(|watched| *watched != names[7])));
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

//! News that wait for their turn, peer by peer.
//!
//! A pure core. Invariants: a peer's news go in the order in which they came; peers take turns, and a slow one holds no more
//! than its own places; how much waits is bounded.

use std::collections::{BTreeMap, VecDeque};

use super::Bounds;
use crate::gossip::MemberView;
use crate::model::NodeName;

/// What is on its way to one peer.
#[derive(Debug)]
struct Line<I> {
    to: MemberView,
    waiting: VecDeque<I>,
    under_way: usize,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Pushes<I> {
    bounds: Bounds,
    lines: BTreeMap<NodeName, Line<I>>,
    /// The peers that something waits for and that have a place, each once.
    turn: VecDeque<NodeName>,
    waiting: usize,
    under_way: usize,
}

impl<I> Pushes<I> {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, lines: BTreeMap::new(), turn: VecDeque::new(), waiting: 0, under_way: 0 }
    }

    /// Lets `item` wait for its turn; returns whether there is room for it.
    pub(super) fn push(&mut self, to: MemberView, item: I) -> bool {
        if self.waiting >= self.bounds.pushes_waiting_max {
            return false;
        }
        self.waiting += 1;
        let name = to.name.clone();
        let new = || Line { to: to.clone(), waiting: VecDeque::new(), under_way: 0 };
        let line = self.lines.entry(name.clone()).or_insert_with(new);
        // It may live elsewhere since.
        line.to = to;
        if line.waiting.is_empty() && line.under_way < self.bounds.pushes_per_peer_max {
            self.turn.push_back(name);
        }
        line.waiting.push_back(item);
        true
    }

    /// Takes a place for the next push, if there is one and one waits.
    pub(super) fn begin_next(&mut self) -> Option<(MemberView, I)> {
        if self.under_way >= self.bounds.pushes_max {
            return None;
        }
        let name = self.turn.pop_front()?;
        let line = self.lines.get_mut(&name)?;
        let item = line.waiting.pop_front()?;
        line.under_way += 1;
        self.waiting -= 1;
        self.under_way += 1;
        if !line.waiting.is_empty() && line.under_way < self.bounds.pushes_per_peer_max {
            self.turn.push_back(name);
        }
        Some((line.to.clone(), item))
    }

    /// Gives the place of a push to `to` back.
    pub(super) fn ended(&mut self, to: &NodeName) {
        let Some(line) = self.lines.get_mut(to) else { return };
        let was_full = line.under_way == self.bounds.pushes_per_peer_max;
        line.under_way -= 1;
        self.under_way -= 1;
        if line.waiting.is_empty() {
            if line.under_way == 0 {
                self.lines.remove(to);
            }
        } else if was_full {
            self.turn.push_back(to.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gossip::carrier::{test_bounds, test_member as member};

    #[test]
    fn peers_take_turns_and_one_that_is_slow_holds_no_more_than_its_places() {
        let mut pushes = Pushes::new(Bounds { pushes_max: 5, pushes_per_peer_max: 2, ..test_bounds() });
        for item in 0..4 {
            assert!(pushes.push(member("slow"), item));
        }
        for item in 10..13 {
            assert!(pushes.push(member("quick"), item));
        }
        let mut begun = Vec::new();
        while let Some((to, item)) = pushes.begin_next() {
            begun.push((to.name.to_string(), item));
        }
        assert_eq!(begun, [("slow", 0), ("quick", 10), ("slow", 1), ("quick", 11)].map(|(n, i)| (n.to_owned(), i)));
        pushes.ended(&"quick".parse().unwrap());
        assert_eq!(pushes.begin_next().map(|(_, item)| item), Some(12), "what waits for the slow one stands before it");
        assert!(pushes.begin_next().is_none());
        pushes.ended(&"slow".parse().unwrap());
        pushes.ended(&"slow".parse().unwrap());
        assert_eq!([pushes.begin_next(), pushes.begin_next()].map(|next| next.unwrap().1), [2, 3]);
        for name in ["quick", "quick", "slow", "slow"] {
            pushes.ended(&name.parse().unwrap());
        }
        assert!(pushes.lines.is_empty() && pushes.turn.is_empty() && pushes.waiting == 0 && pushes.under_way == 0);
    }

    #[test]
    fn how_much_runs_and_waits_is_bounded() {
        let mut pushes = Pushes::new(Bounds { pushes_max: 3, pushes_waiting_max: 8, ..test_bounds() });
        let taken = (0..20).filter(|at| pushes.push(member(&format!("n{at}")), *at)).count();
        assert_eq!(taken, 8);
        assert_eq!(std::iter::from_fn(|| pushes.begin_next()).count(), 3);
        assert!(pushes.push(member("n9"), 9), "what runs does not wait");
    }
}

//! Stamps of writes: a hybrid logical clock (Kulkarni et al., "Logical Physical Clocks", 2014) and the writer's name.

use serde::{Deserialize, Serialize};

use crate::model::NodeName;

/// How far a stamp may lie ahead of the reader's clock, in milliseconds: as far as certificates let clocks differ.
pub const AHEAD_MS_MAX: u64 = 60_000;

/// When something was written, and by whom; ordered so.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Wall time in milliseconds since 1970, or that of a later stamp that the writer had seen.
    pub ms: u64,
    /// Tells apart what was written within one millisecond.
    pub count: u32,
    /// The writer.
    pub node: NodeName,
}

/// Gives out stamps that are above all that it has given out or seen.
#[derive(Debug, Clone, Copy, Default)]
pub struct HybridClock {
    ms: u64,
    count: u32,
}

impl HybridClock {
    /// Returns the next stamp of `node` at `now_ms`.
    pub fn tick(&mut self, now_ms: u64, node: &NodeName) -> Stamp {
        if now_ms > self.ms {
            (self.ms, self.count) = (now_ms, 0);
        } else if let Some(count) = self.count.checked_add(1) {
            self.count = count;
        } else {
            (self.ms, self.count) = (self.ms.saturating_add(1), 0);
        }
        Stamp { ms: self.ms, count: self.count, node: node.clone() }
    }

    /// By how many milliseconds the next stamp lies ahead of `now_ms`.
    pub fn ahead_ms(&self, now_ms: u64) -> u64 {
        self.ms.saturating_sub(now_ms)
    }

    /// Notes a stamp of another writer.
    pub fn observe(&mut self, stamp: &Stamp) {
        (self.ms, self.count) = (self.ms, self.count).max((stamp.ms, stamp.count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_though_the_clock_stands_or_goes_back_and_pass_what_was_seen() {
        let (mut clock, node): (_, NodeName) = (HybridClock::default(), "a".parse().unwrap());
        let mut stamps = vec![clock.tick(10, &node), clock.tick(10, &node), clock.tick(5, &node)];
        clock.observe(&Stamp { ms: 20, count: u32::MAX, node: "b".parse().unwrap() });
        stamps.extend([clock.tick(11, &node), clock.tick(22, &node)]);
        assert!(stamps.is_sorted_by(|a, b| a < b), "{stamps:?}");
        assert_eq!(stamps.last().map(|stamp| (stamp.ms, stamp.count)), Some((22, 0)));
    }
}

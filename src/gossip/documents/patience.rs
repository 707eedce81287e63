//! Bounds what a peer's bad documents cost: each takes two checks of signatures, on the task that good ones wait for.
//!
//! A pure core: a bucket of refusals per peer.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::NodeName;

/// Documents of one peer that may be refused in a row. An honest peer brings some: those of a clock that is off, or of an
/// operator whose revocation it has not heard of.
const REFUSALS_MAX: u32 = 64;
/// One more is borne after this time.
const REFILL: Duration = Duration::from_secs(1);
/// Most peers that are remembered: more nodes with certificates than this do not misbehave at once.
const PEERS_MAX: usize = 1024;

/// What a refusal did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// There is patience left.
    Borne,
    /// There is none from here on: worth a line in the log.
    RanOut,
}

/// The buckets.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// How many refusals are in a peer's bucket, and when that was so.
    peers: BTreeMap<NodeName, (u32, Instant)>,
}

impl Patience {
    /// Whether documents of `peer` are refused unread.
    pub(super) fn is_out(&self, peer: &NodeName, now: Instant) -> bool {
        self.peers.get(peer).is_some_and(|&bucket| level(bucket, now) >= REFUSALS_MAX)
    }

    /// Notes that a document of `peer` was refused.
    pub(super) fn refused(&mut self, peer: &NodeName, now: Instant) -> After {
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(peer) {
            self.peers.retain(|_, bucket| level(*bucket, now) > 0);
            if self.peers.len() >= PEERS_MAX {
                self.peers.pop_first();
            }
        }
        let bucket = self.peers.entry(peer.clone()).or_insert((0, now));
        // The part of a second that is not yet paid back stays.
        let left = level(*bucket, now);
        let since = if left == 0 { now } else { bucket.1 + REFILL * (bucket.0 - left) };
        *bucket = (left + 1, since);
        if left + 1 == REFUSALS_MAX { After::RanOut } else { After::Borne }
    }
}

fn level((count, since): (u32, Instant), now: Instant) -> u32 {
    let paid = now.saturating_duration_since(since).as_secs() / REFILL.as_secs();
    count.saturating_sub(u32::try_from(paid).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn a_peer_that_floods_is_read_once_a_second_and_others_are_not_touched() {
        let (mut patience, begun) = (Patience::default(), clock::now());
        let (bad, good): (NodeName, NodeName) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let borne =
            (0..REFUSALS_MAX).map(|_| patience.refused(&bad, begun)).filter(|after| *after == After::Borne).count();
        assert_eq!(borne, 63, "the last one is told");
        assert!(patience.is_out(&bad, begun) && !patience.is_out(&good, begun));
        let mut read = 0;
        for ms in 0..10_000_u64 {
            let now = begun + Duration::from_millis(ms);
            if !patience.is_out(&bad, now) {
                read += 1;
                patience.refused(&bad, now);
            }
        }
        assert_eq!(read, 9, "one a second");
        assert!(!patience.is_out(&bad, begun + Duration::from_secs(11)));
    }

    #[test]
    fn the_memory_of_peers_is_bounded() {
        let (mut patience, now) = (Patience::default(), clock::now());
        for at in 0..PEERS_MAX + 10 {
            patience.refused(&format!("n{at}").parse().unwrap(), now);
        }
        assert_eq!(patience.peers.len(), PEERS_MAX);
    }
}

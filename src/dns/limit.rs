//! How much a stranger gets by UDP, where a source is easily forged: so many answers a second per source, then "ask by TCP",
//! then nothing.
//!
//! A fixed table of virtual clocks (GCRA), found by a seeded hash: sources that meet in a slot share its rate, and no number of
//! sources takes more memory. Pure: time comes from outside. Loopback is never asked about.

use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::time::Duration;

/// Sources that are told apart, on average.
const SLOTS: usize = 4096;
/// Answers a second for one source: a resolver of a busy host stays below it, and a victim of forged queries gets 1.2 MB/s at most.
const ANSWERS_PER_SECOND: u32 = 1000;
/// Answers that a source may have at once beyond its rate.
const BURST: u32 = 1000;
/// Of what is above the rate, every so many-th is told to come by TCP, so that an honest source is not shut out by forged ones.
const CUT_EVERY: u64 = 4;

/// What a query gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Its answer.
    Answer,
    /// An empty answer with TC: a source that is not forged comes back by TCP.
    Cut,
    /// Nothing.
    Drop,
}

/// The table.
#[derive(Debug)]
pub(super) struct Sources {
    hasher: foldhash::quality::RandomState,
    /// For each slot, when what it was given is used up, since the start.
    used_until: Vec<Duration>,
    refused: u64,
}

impl Sources {
    /// Makes an empty table.
    pub(super) fn new() -> Self {
        let hasher = foldhash::quality::RandomState::default();
        Self { hasher, used_until: vec![Duration::ZERO; SLOTS], refused: 0 }
    }

    /// Decides over one query of `source` at `now`, since the start.
    pub(super) fn admit(&mut self, source: IpAddr, now: Duration) -> Admission {
        let network = match source.to_canonical() {
            IpAddr::V4(v4) => u64::from(u32::from(v4)),
            // A host has 2^64 addresses of its own.
            IpAddr::V6(v6) => u64::try_from(u128::from(v6) >> 64).unwrap_or_default(),
        };
        let at = usize::try_from(self.hasher.hash_one(network) % 4096).unwrap_or_default();
        let Some(used_until) = self.used_until.get_mut(at) else { return Admission::Drop };
        let share = Duration::from_secs(1) / ANSWERS_PER_SECOND;
        let next = (*used_until).max(now) + share;
        if next <= now + share * BURST {
            *used_until = next;
            return Admission::Answer;
        }
        self.refused = self.refused.wrapping_add(1);
        if self.refused.is_multiple_of(CUT_EVERY) { Admission::Cut } else { Admission::Drop }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_then_its_rate_and_others_are_not_touched() {
        let mut sources = Sources::new();
        let (one, other) = ("192.0.2.1".parse().unwrap(), "198.51.100.7".parse().unwrap());
        let mut count = |ip, now_ms, queries: u32| {
            let now = Duration::from_millis(now_ms);
            let got: Vec<_> = (0..queries).map(|_| sources.admit(ip, now)).collect();
            let count = |what| got.iter().filter(|got| **got == what).count();
            (count(Admission::Answer), count(Admission::Cut))
        };
        assert_eq!(count(one, 0, BURST + 400), (1000, 100));
        assert_eq!(count(one, 100, 200), (100, 25));
        assert_eq!(count(other, 100, 10).0, 10, "unless the hash put both into one slot of 4096");
        assert_eq!(count(one, 60_000, 10).0, 10);
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_share_a_rate() {
        let mut sources = Sources::new();
        let answered = (0..5000_u32).filter(|at| {
            let ip = format!("2001:db8::{:x}", at + 1).parse().unwrap();
            sources.admit(ip, Duration::ZERO) == Admission::Answer
        });
        assert_eq!(answered.count(), 1000);
    }
}

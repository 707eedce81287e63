//! The timing of failure detection, and why it keeps its promises.
//!
//! ```text
//!   crash -> checked by one of two watchers (<= 1.1 s) -> verdict (0.6 s) -> accusations spread -> timer (min .. max) -> failed
//! ```
//!
//! A crash with N members, worst case of 99 in 100, no loss, everybody healthy:
//!
//! | part | N=20 | N=100 | N=1,000 |
//! |---|---|---|---|
//! | first check by one of two ring watchers, each once in 1.1 s with a phase of its own: (1 - t)^2 = 1 % | 0.99 s | 0.99 s | 0.99 s |
//! | verdict: 300 ms direct, 300 ms through helpers | 0.60 s | 0.60 s | 0.60 s |
//! | accusations reach everybody: log4 N hops, each at most the spreading pause and a packet's way, then rounds of 200 ms | 0.2 s | 0.4 s | 0.8 s |
//! | suspicion with three confirmations: 500 ms x max(1, log10 N) | 0.65 s | 1.00 s | 1.50 s |
//! | sum | 2.5 s | 3.0 s | 3.9 s |
//!
//! In the agent it is better than by chance: the two watchers of a member check half a period apart where their clocks agree
//! (`gossip::actor::beat`), so that the first check comes within 0.83 s, of two members of an odd number within 0.96 s.
//!
//! What it costs at rest, per node and second: 1.8 checks of the two watched and 0.25 random probes, as many answers, an
//! acknowledgement of QUIC's for each answer: 5 datagrams with 62 bytes of ours and 58 of UDP's and QUIC's.
//!
//! Promised are 3 s and, at 1,000, 5 s. Without confirmations the suspicion lasts three times as long.

use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use foca::PeriodicParams;

use super::packet::{ENVELOPE_BYTES_MAX, PACKET_BYTES_MAX};
use super::roster::FAILED_REAPED_AFTER;
use super::suspicion::Bounds;

/// How often one of this node's two ring successors is checked, unless told otherwise.
pub const WATCH_PERIOD: Duration = Duration::from_millis(550);

/// How a failure is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detector {
    /// Lifeguard (arXiv 1707.00788), accusers that are proven, and watchers on a ring.
    Lifeguard,
    /// SWIM as foca does it, for comparisons: fixed timers, one prober's word is believed by everybody.
    Plain,
}

/// The timing of SWIM. The module's documentation has the arithmetic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// How a failure is decided.
    pub detector: Detector,
    /// How often one random member is probed by foca: the net below the watchers.
    pub probe_period: Duration,
    /// How long foca waits for a direct answer before others are asked to probe.
    pub probe_rtt: Duration,
    /// How often one of this node's two ring successors is checked.
    pub watch_period: Duration,
    /// How long a check waits for the direct answer, and again as long for the helpers'.
    pub check_timeout: Duration,
    /// Suspicion of a confirmed suspect in a mesh of up to 10; it grows with the logarithm of the members.
    pub suspicion: Duration,
    /// How many times longer a suspicion without confirmations lasts.
    pub suspicion_stretch: u32,
    /// Confirmations that bring a suspicion down to its shortest.
    pub confirmations: u32,
    /// How often news is passed on.
    pub gossip_period: Duration,
    /// How often two members that are gone are called: heals a partition.
    pub recall_period: Duration,
    /// How long a failed member is remembered and called.
    pub reconnect_timeout: Duration,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            detector: Detector::Lifeguard,
            probe_period: Duration::from_secs(4),
            probe_rtt: Duration::from_millis(500),
            watch_period: WATCH_PERIOD,
            check_timeout: Duration::from_millis(300),
            suspicion: Duration::from_millis(500),
            suspicion_stretch: 3,
            confirmations: 3,
            gossip_period: Duration::from_millis(200),
            recall_period: Duration::from_secs(2),
            reconnect_timeout: FAILED_REAPED_AFTER,
        }
    }
}

impl Profile {
    /// SWIM without Lifeguard, tuned to about the same time to see a crash: what the simulator compares with.
    pub fn plain() -> Self {
        Self {
            detector: Detector::Plain,
            probe_period: Duration::from_millis(700),
            probe_rtt: Duration::from_millis(250),
            suspicion: Duration::from_millis(1500),
            suspicion_stretch: 1,
            confirmations: 0,
            ..Self::default()
        }
    }

    /// Returns how long suspicions last among `members`, this node included.
    pub(super) fn bounds(&self, members: usize) -> Bounds {
        let members = u32::try_from(members).unwrap_or(u32::MAX);
        let scale = f64::from(members.max(1)).log10().max(1.0);
        let min = match self.detector {
            Detector::Lifeguard => self.suspicion.mul_f64(scale),
            Detector::Plain => self.suspicion,
        };
        // Neither this node nor the suspect can confirm.
        let confirmations = self.confirmations.min(members.saturating_sub(2));
        Bounds { min, max: min * self.suspicion_stretch, confirmations }
    }

    pub(super) fn config(&self) -> foca::Config {
        let three = NonZeroUsize::MIN.saturating_add(2);
        let every = |frequency, num_members| Some(PeriodicParams { frequency, num_members });
        foca::Config {
            probe_period: self.probe_period,
            probe_rtt: self.probe_rtt,
            num_indirect_probes: three,
            // Of foca's updates, which take no bytes.
            max_transmissions: NonZeroU8::MIN,
            suspect_to_down_after: self.suspicion,
            // The roster decides when a gone member is forgotten.
            remove_down_after: None,
            max_packet_size: NonZeroUsize::MIN.saturating_add(PACKET_BYTES_MAX - ENVELOPE_BYTES_MAX - 1),
            notify_down_members: true,
            // Asked of neighbours instead (`detect`).
            periodic_announce: None,
            periodic_announce_to_down_members: every(self.recall_period, NonZeroUsize::MIN.saturating_add(1)),
            // News has a queue of its own (`news`).
            periodic_gossip: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_times_follow_from_the_profile() {
        #[track_caller]
        fn check(members: usize, spread: Duration, promised: Duration) {
            let profile = Profile::default();
            let bounds = profile.bounds(members);
            // 90 % of a watcher's turn: see the module's documentation.
            let first_check = (profile.watch_period * 2).mul_f64(0.9);
            let sum = first_check + profile.check_timeout * 2 + spread + bounds.min;
            assert!(sum <= promised, "{members}: {sum:?}");
            assert_eq!(bounds.max, bounds.min * 3);
        }
        check(20, Duration::from_millis(200), Duration::from_secs(3));
        check(100, Duration::from_millis(400), Duration::from_secs(3));
        check(1000, Duration::from_millis(800), Duration::from_secs(5));
    }

    #[test]
    fn a_mesh_of_two_needs_no_confirmation() {
        assert_eq!(Profile::default().bounds(2).confirmations, 0);
        assert_eq!(Profile::default().bounds(3).confirmations, 1);
        assert_eq!(Profile::default().bounds(50).confirmations, 3);
    }
}

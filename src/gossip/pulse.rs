//! Signs of life below SWIM: a peer's QUIC acknowledges what it was sent.
//!
//! A probe that is answered late looks like a probe that is not answered. The acknowledgement of its datagram is sent
//! by the peer's process, too, and says that it runs; what comes on the tunnels from there says the same. Neither says that
//! its gossip task does: so they count for [`TRUSTED_FOR`] from the first packet that nothing of SWIM's has followed, and then no
//! more.
//!
//! QUIC does not say when an acknowledgement came. It is dated at the look before the one that found it: it came then or
//! later, so it never puts off a sentence for longer than it may.
//!
//! Not here: what a sign of life puts off (`membership`).

use std::time::Duration;

use tokio::time::Instant;

/// How long acknowledgements alone speak for a peer: a task that stalls for longer is as good as gone.
const TRUSTED_FOR: Duration = Duration::from_secs(5);

/// What one link tells of its peer.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// When the first packet went out that nothing has followed.
    unanswered_since: Option<Instant>,
    /// Datagrams received when they were last counted.
    received: u64,
    /// Those that had come on its tunnels then; none: nobody has looked since the packet went out.
    tunnels: Option<u64>,
    /// When that was.
    looked_at: Option<Instant>,
}

impl Pulse {
    /// A packet went out; `received` counts the datagrams that have come on its connection.
    pub(super) fn sent(&mut self, received: u64, now: Instant) {
        if self.unanswered_since.is_none() {
            self.unanswered_since = Some(now);
            self.looked_at = Some(now);
            self.received = received;
            self.tunnels = None;
        }
    }

    /// A packet of SWIM's came.
    pub(super) fn heard(&mut self) {
        self.unanswered_since = None;
    }

    /// Tells whether something is awaited: only then is it worth counting.
    pub(super) fn is_waiting(&self) -> bool {
        self.unanswered_since.is_some()
    }

    /// Returns since when at the earliest something may have come, if it has since the last look: `received` counts what has
    /// come on the link's connections, `tunnels` on those of the data plane.
    pub(super) fn look(&mut self, received: u64, tunnels: u64, now: Instant) -> Option<Instant> {
        let is_trusted = self.unanswered_since.is_some_and(|since| now.saturating_duration_since(since) < TRUSTED_FOR);
        // Fewer than before: a connection has ended since.
        let has_come = received > self.received || self.tunnels.is_some_and(|before| tunnels > before);
        self.received = received;
        self.tunnels = Some(tunnels);
        let looked_at = self.looked_at.replace(now);
        looked_at.filter(|_| is_trusted && has_come)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_speaks_for_a_peer_once_and_not_for_ever() {
        let start = crate::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::default();
        assert!(!pulse.is_waiting() && pulse.look(3, 9, at(0)).is_none(), "nothing was asked");
        pulse.sent(3, at(0));
        assert_eq!(pulse.look(3, 9, at(1)), None, "nothing has come");
        assert_eq!(pulse.look(4, 9, at(2)), Some(at(1)), "it came after the look before");
        assert_eq!(pulse.look(4, 9, at(2)), None);
        pulse.sent(4, at(3));
        assert_eq!(pulse.look(5, 9, at(4)), Some(at(2)));
        assert_eq!(pulse.look(6, 9, at(5)), None, "its gossip has said nothing for too long");
        pulse.heard();
        pulse.sent(6, at(6));
        assert_eq!(pulse.look(7, 9, at(7)), Some(at(6)));
        assert_eq!(pulse.look(2, 9, at(8)), None, "a connection that ended takes its count along");
    }

    #[test]
    fn what_comes_on_the_tunnels_speaks_for_a_peer_from_the_first_look_on_and_not_for_ever() {
        let start = crate::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::default();
        pulse.sent(3, at(0));
        assert_eq!(pulse.look(3, 70, at(1)), None, "how much had come before is not known");
        assert_eq!(pulse.look(3, 71, at(2)), Some(at(1)));
        assert_eq!(pulse.look(3, 71, at(3)), None);
        assert_eq!(pulse.look(3, 90, at(6)), None, "its gossip has said nothing for too long");
        pulse.heard();
        pulse.sent(3, at(7));
        assert_eq!(pulse.look(3, 99, at(8)), None);
        assert_eq!(pulse.look(3, 5, at(9)), None, "a tunnel that ended takes its count along");
    }
}

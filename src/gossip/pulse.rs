//! Signs of life below SWIM: a peer's QUIC acknowledges what it was sent.
//!
//! A probe that is answered late looks like a probe that is not answered. The acknowledgement of its datagram is sent
//! by the peer's process, too, and says that it runs. It does not say that its gossip task does: so acknowledgements
//! count for [`TRUSTED_FOR`] from the first packet that nothing of SWIM's has followed, and then no more.
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
}

impl Pulse {
    /// A packet went out; `received` counts the datagrams that have come on its connection.
    pub(super) fn sent(&mut self, received: u64, now: Instant) {
        if self.unanswered_since.is_none() {
            self.unanswered_since = Some(now);
            self.received = received;
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

    /// Tells whether the peer has acknowledged anything since the last look.
    pub(super) fn look(&mut self, received: u64, now: Instant) -> bool {
        let is_trusted = self.unanswered_since.is_some_and(|since| now.saturating_duration_since(since) < TRUSTED_FOR);
        let has_come = received != self.received;
        self.received = received;
        is_trusted && has_come
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
        assert!(!pulse.is_waiting() && !pulse.look(3, at(0)), "nothing was asked");
        pulse.sent(3, at(0));
        assert!(!pulse.look(3, at(1)), "nothing has come");
        assert!(pulse.look(4, at(2)) && !pulse.look(4, at(2)));
        pulse.sent(4, at(3));
        assert!(pulse.look(5, at(4)));
        assert!(!pulse.look(6, at(5)), "its gossip has said nothing for too long");
        pulse.heard();
        pulse.sent(6, at(6));
        assert!(pulse.look(7, at(7)));
    }
}

//! How much of a tunnel its datagrams may take: half, while streams have something to send as well. A pure core.
//!
//! ```text
//!   datagram -> admits? --yes--> quinn: datagrams first, streams in what is left of each packet --> path
//!                  | no                                                                              |
//!                  `-> dropped             Departures: bytes that left, and when nothing was left <--'
//! ```
//!
//! quinn fills packets with datagrams before it looks at streams (no other order can be had), so a queue of datagrams that
//! never empties leaves streams nothing. Therefore what is given to quinn is bounded by what leaves: a bucket of
//! [`AHEAD_BYTES`], which gets a byte for every two that leave, whosever they are, and is full when nothing is left to send.
//!
//! Invariant: over any time in which streams wait, the datagrams that leave are at most half of all that leaves, and
//! `2 * AHEAD_BYTES` more (a bucket, and what was in the queue before). Where only datagrams wait, their queue empties, which
//! fills the bucket: they have the tunnel for themselves.
//! Not here: which flow's datagrams are admitted (whose come first), how much the path takes (`transport`).

/// Bytes of datagrams that may go ahead of all streams: 45 packets of an Ethernet, 0.5 ms at 1 Gbit/s, 26 ms at 20 Mbit/s.
pub(super) const AHEAD_BYTES: usize = 64 << 10;

/// What datagrams may still be admitted.
#[derive(Debug)]
pub(super) struct Share {
    /// Bytes.
    credit: u64,
    /// Bytes that had left at the last look.
    sent: u64,
    /// Of these, when last nothing was left.
    drained_at: u64,
}

impl Default for Share {
    fn default() -> Self {
        Self { credit: AHEAD_BYTES as u64, sent: 0, drained_at: 0 }
    }
}

impl Share {
    /// Admits a datagram of `bytes`, if it may go; `sent` bytes have left, and had when last nothing was left `drained_at`.
    pub(super) fn admits(&mut self, bytes: usize, sent: u64, drained_at: u64) -> bool {
        if self.drained_at == drained_at {
            self.add(sent.saturating_sub(self.sent) / 2);
        } else {
            self.add(AHEAD_BYTES as u64);
        }
        (self.sent, self.drained_at) = (sent, drained_at);
        let left = self.credit.checked_sub(bytes as u64);
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }

    /// Takes back a datagram that was admitted and did not go.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.add(bytes as u64);
    }

    fn add(&mut self, bytes: u64) {
        self.credit = (self.credit + bytes).min(AHEAD_BYTES as u64);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATAGRAM: u64 = 1_200;

    /// A connection whose path takes `RATE` bytes a turn, and which hears with the next turn that nothing was left.
    #[derive(Default)]
    struct Path {
        share: Share,
        queue: u64,
        sent: u64,
        drained_at: u64,
        has_drained: bool,
        datagrams: u64,
        streams: u64,
        dropped: u64,
        queue_max: u64,
    }

    const RATE: u64 = 10_000;

    impl Path {
        /// Offers datagrams and streams' bytes, and sends one turn's.
        fn turn(&mut self, datagrams: u64, streams: u64) {
            if std::mem::take(&mut self.has_drained) {
                self.drained_at = self.sent;
            }
            for _ in 0..datagrams {
                if self.share.admits(usize::try_from(DATAGRAM).unwrap(), self.sent, self.drained_at) {
                    self.queue += DATAGRAM;
                } else {
                    self.dropped += 1;
                }
            }
            self.queue_max = self.queue_max.max(self.queue);
            let first = self.queue.min(RATE);
            let then = streams.min(RATE - first);
            self.queue -= first;
            self.datagrams += first;
            self.streams += then;
            self.sent += first + then;
            self.has_drained = self.queue == 0 && then == streams && first + then < RATE;
        }
    }

    #[test]
    fn streams_keep_half_beside_a_flood_of_datagrams() {
        let mut path = Path::default();
        // A long time without datagrams saves nothing up.
        for _ in 0..1_000 {
            path.turn(0, u64::MAX);
        }
        let (sent, streams) = (path.sent, path.streams);
        for _ in 0..1_000 {
            path.turn(100, u64::MAX);
        }
        let (sent, streams, ahead) = (path.sent - sent, path.streams - streams, AHEAD_BYTES as u64);
        assert!(sent <= 2 * (streams + ahead), "{streams} of {sent}");
        assert!(path.datagrams * 2 + 2 * DATAGRAM >= sent, "{} of {sent}", path.datagrams);
    }

    #[test]
    fn datagrams_that_need_less_than_half_are_not_dropped_and_alone_they_have_the_path() {
        let mut path = Path::default();
        for _ in 0..1_000 {
            path.turn(4, u64::MAX);
        }
        assert_eq!(path.dropped, 0);
        let mut path = Path::default();
        for _ in 0..1_000 {
            path.turn(100, 0);
        }
        // Twice what goes ahead leaves before the queue is empty; to hear of that takes one turn.
        assert!(path.sent * 10 >= 1_000 * RATE * 9, "{}", path.sent);
    }

    #[test]
    fn what_did_not_go_counts_not() {
        let mut share = Share::default();
        for _ in 0..1_000 {
            assert!(share.admits(AHEAD_BYTES, 0, 0));
            share.give_back(AHEAD_BYTES);
        }
        assert!(share.admits(AHEAD_BYTES, 0, 0) && !share.admits(1, 0, 0));
    }

    proptest! {
        #[test]
        fn whatever_comes_streams_that_wait_keep_half_and_the_queue_is_bounded(
            before in prop::collection::vec((0_u64..60, 0_u64..30_000), 0..60),
            during in prop::collection::vec(0_u64..60, 1..200),
        ) {
            let mut path = Path::default();
            for (datagrams, streams) in before {
                path.turn(datagrams, streams);
            }
            let (sent, streams) = (path.sent, path.streams);
            for datagrams in during {
                path.turn(datagrams, u64::MAX);
            }
            // Twice: what was admitted before the connection heard that nothing was left, and what after that.
            let ahead = 2 * AHEAD_BYTES as u64;
            let (sent, streams) = (path.sent - sent, path.streams - streams);
            prop_assert!(sent <= 2 * (streams + ahead), "{streams} of {sent}");
            prop_assert!(path.queue_max <= ahead, "{}", path.queue_max);
        }
    }
}

//! What one peer may have of the gossip task: packets that wait for it, packets a second, packets that nobody can read.
//!
//! ```text
//!   connections of a peer -> ready: a place and the pace -> read -> the queue of all peers -> the task gives the place back
//! ```
//!
//! Whoever holds a member's key can send as fast as the path carries. What finds no place is left in the buffer of its
//! connection, where QUIC drops the oldest: no peer fills the queue that others need, and none takes more of the processor
//! than its pace.
//!
//! Invariants: all connections of a peer share one [`Share`], and a new connection brings no new one; it is kept for as long
//! as it differs from a fresh one.
//! Not here: what is read (`reading`), which packets are refused (`engine`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::clock;
use crate::gossip::engine::pace::Pace;
use crate::model::NodeName;

/// Most packets of one peer that wait for the task: sixteen peers at once fill its queue.
pub(super) const PLACES: usize = 64;
/// So many packets of one peer are read at once, as after a stop of some seconds, and then 500 a second. In a storm of news a
/// neighbour sends some forty a second.
const BURST: u32 = 512;
const EVERY: Duration = Duration::from_millis(2);
/// So many packets that cannot be read are forgiven in [`PATIENCE_SPAN`]: a newer agent may say what this one does not know.
pub(super) const PATIENCE: u32 = 64;
const PATIENCE_SPAN: Duration = Duration::from_secs(10);

/// What one peer has taken.
#[derive(Debug)]
pub(super) struct Share {
    places: Arc<Semaphore>,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    pace: Pace,
    /// Since when unreadable packets are counted, and how many have come.
    unreadable: Option<(Instant, u32)>,
}

impl Share {
    fn new(now: Instant) -> Self {
        let used = Used { pace: Pace::new(BURST, EVERY, now), unreadable: None };
        Self { places: Arc::new(Semaphore::new(PLACES)), used: Mutex::new(used) }
    }

    /// Waits until one more packet may be read; [`Share::took`] is told when it was. The place is free again once the packet
    /// was acted upon.
    ///
    /// # Cancel safety
    /// Cancelling takes nothing.
    pub(super) async fn ready(&self) -> OwnedSemaphorePermit {
        let place = Arc::clone(&self.places).acquire_owned().await.expect("nobody closes it");
        let at = self.used().pace.next_at();
        if at > clock::now() {
            tokio::time::sleep_until(at).await;
        }
        place
    }

    /// Returns a place if there is one, whatever the pace.
    pub(super) fn try_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// Notes that a packet was read. Several may have waited for one moment, on two connections and their streams: each counts.
    pub(super) fn took(&self, now: Instant) {
        self.used().pace.spend(now);
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whether a fresh one would be the same.
    fn is_fresh(&self, now: Instant) -> bool {
        let used = self.used();
        let is_forgiven = used.unreadable.is_none_or(|(since, _)| now >= since + PATIENCE_SPAN);
        is_forgiven && used.pace.is_whole(now) && self.places.available_permits() == PLACES
    }
}

/// Those of all peers.
#[derive(Debug, Default)]
pub(super) struct Shares(BTreeMap<NodeName, Arc<Share>>);

impl Shares {
    /// Returns that of `peer`, for one more connection.
    pub(super) fn of(&mut self, peer: &NodeName, now: Instant) -> Arc<Share> {
        self.0.retain(|_, share| Arc::strong_count(share) > 1 || !share.is_fresh(now));
        Arc::clone(self.0.entry(peer.clone()).or_insert_with(|| Arc::new(Share::new(now))))
    }

    /// Notes that a packet of `peer`'s cannot be read; true: it was one too many.
    pub(super) fn is_unreadable(&self, peer: &NodeName, now: Instant) -> bool {
        let Some(share) = self.0.get(peer) else { return false };
        let mut used = share.used();
        let (since, count) = used.unreadable.unwrap_or((now, 0));
        let (since, count) = if now >= since + PATIENCE_SPAN { (now, 0) } else { (since, count) };
        used.unreadable = Some((since, count.saturating_add(1)));
        count >= PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_reads_a_burst_at_once_and_then_at_its_pace_on_all_its_connections_together() {
        let begun = clock::now();
        let mut shares = Shares::default();
        let (one, other) = (shares.of(&name("a"), begun), shares.of(&name("a"), begun));
        for share in [&one, &other].into_iter().cycle().take(BURST as usize) {
            drop(share.ready().await);
            share.took(clock::now());
        }
        assert_eq!(clock::now(), begun);
        for _ in 0..500 {
            drop(one.ready().await);
            one.took(clock::now());
        }
        let took = clock::now() - begun;
        assert!((Duration::from_millis(900)..Duration::from_millis(1100)).contains(&took), "{took:?}");
        // A new connection in place of the old ones begins where they were.
        drop((one, other));
        let again = shares.of(&name("a"), clock::now());
        let before = clock::now();
        drop(again.ready().await);
        assert!(clock::now() > before);
        assert!(shares.of(&name("b"), before).used().pace.is_whole(before), "another peer has its own");
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_for_one_moment_count_each() {
        let (share, begun) = (Share::new(clock::now()), clock::now());
        let crowd = 16;
        for _ in 0..(BURST + 800) / crowd {
            let ready = (0..crowd).map(|_| share.ready());
            let places = futures_util::future::join_all(ready).await;
            for _place in &places {
                share.took(clock::now());
            }
        }
        let took = clock::now() - begun;
        assert!(took >= EVERY * (800 - 2 * crowd), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_packets_wait_and_no_more_until_one_was_acted_upon() {
        let share = Share::new(clock::now());
        let mut waiting = Vec::new();
        for _ in 0..PLACES {
            waiting.push(share.ready().await);
        }
        let mut next = std::pin::pin!(share.ready());
        assert!(tokio::time::timeout(Duration::from_secs(60), next.as_mut()).await.is_err());
        waiting.pop();
        let _place = next.await;
    }

    #[test]
    fn some_unreadable_packets_are_forgiven_in_ten_seconds_also_over_a_reconnect() {
        let now = clock::now();
        let mut shares = Shares::default();
        let at = |seconds| now + Duration::from_secs(seconds);
        assert!(!shares.is_unreadable(&name("a"), now), "who has no connection says nothing");
        drop(shares.of(&name("a"), now));
        assert_eq!((0..PATIENCE + 2).filter(|_| shares.is_unreadable(&name("a"), now)).count(), 2);
        drop(shares.of(&name("a"), at(9)));
        assert!(shares.is_unreadable(&name("a"), at(9)));
        assert!(!shares.is_unreadable(&name("a"), at(10)));
        // Who is as a newcomer would be is forgotten.
        drop(shares.of(&name("b"), at(30)));
        assert_eq!(shares.0.len(), 1);
    }
}

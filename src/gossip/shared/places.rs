//! Places for values that are received: so many at once in all, and a few of them for one peer.
//!
//! Invariants: who waits for a place of its own takes none of the others'; a peer without a place leaves nothing behind.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{RECEIVING_MAX, RECEIVING_OF_ONE_MAX};
use crate::model::NodeName;

/// The places.
#[derive(Debug)]
pub(in crate::gossip) struct Places {
    all: Arc<Semaphore>,
    by_peer: Mutex<BTreeMap<NodeName, Arc<Semaphore>>>,
}

impl Default for Places {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(RECEIVING_MAX)), by_peer: Mutex::default() }
    }
}

impl Places {
    /// Takes a place for a value of `peer`: first one of its own, then one of all. None: there never is one again.
    ///
    /// # Cancel safety
    /// Cancelling takes none.
    pub(super) async fn take(self: &Arc<Self>, peer: &NodeName) -> Option<Place> {
        let waiting = self.of(peer);
        let own = Arc::clone(&waiting.places).acquire_owned().await.ok()?;
        let one_of_all = Arc::clone(&self.all).acquire_owned().await.ok()?;
        Some(Place { _one_of_all: one_of_all, _own: own, _peer: waiting })
    }

    fn of(self: &Arc<Self>, peer: &NodeName) -> AtPeer {
        let mut by_peer = self.by_peer.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Semaphore::new(RECEIVING_OF_ONE_MAX));
        let places = Arc::clone(by_peer.entry(peer.clone()).or_insert_with(new));
        AtPeer { of: Arc::clone(self), peer: peer.clone(), places }
    }
}

/// A place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    // Dropped in this order: the peer's entry goes once its own place is back.
    _one_of_all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
    _peer: AtPeer,
}

/// One that has or waits for a place of a peer; the last one takes the peer's entry away.
#[derive(Debug)]
struct AtPeer {
    of: Arc<Places>,
    peer: NodeName,
    places: Arc<Semaphore>,
}

impl Drop for AtPeer {
    fn drop(&mut self) {
        let mut by_peer = self.of.by_peer.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's and this one's: each other that holds or waits has one more, and takes it under the lock.
        if Arc::strong_count(&self.places) == 2 {
            by_peer.remove(&self.peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn one_peer_takes_its_share_and_waits_without_a_place_of_the_others() {
        let places = Arc::new(Places::default());
        let liar = name("liar");
        let mut held = Vec::new();
        for _ in 0..RECEIVING_OF_ONE_MAX {
            held.push(places.take(&liar).await.unwrap());
        }
        let mut more: Vec<_> = (0..100).map(|_| Box::pin(places.take(&liar))).collect();
        for take in &mut more {
            assert!(take.as_mut().now_or_never().is_none(), "its own are taken");
        }
        for at in 0..RECEIVING_MAX - RECEIVING_OF_ONE_MAX {
            held.push(places.take(&name(&format!("n{at}"))).now_or_never().expect("others have theirs").unwrap());
        }
        assert!(places.take(&name("late")).now_or_never().is_none(), "all are taken");
        drop(more);
        drop(held.remove(0));
        assert!(places.take(&name("late")).now_or_never().is_some());
        drop(held);
        assert_eq!(places.all.available_permits(), RECEIVING_MAX);
        assert!(places.by_peer.lock().unwrap().is_empty(), "nothing is left behind");
    }
}

//! Places for what is received at once: so many over all peers, and so many for each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::NodeName;

/// So long a place is waited for at most: whoever holds them all keeps nobody waiting.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Hands out places. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::gossip) struct Places {
    all: Arc<Semaphore>,
    per_peer_max: usize,
    /// Those of the peers that hold one or wait for one: a peer's streams bound how many there are.
    peers: Arc<Mutex<BTreeMap<NodeName, Arc<Semaphore>>>>,
}

/// A place, given back when it is dropped.
#[derive(Debug)]
pub(in crate::gossip) struct Place {
    _own: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Places {
    /// Makes `most` places, of which one peer holds `per_peer_max` at most.
    pub(in crate::gossip) fn new(most: usize, per_peer_max: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(most)), per_peer_max, peers: Arc::default() }
    }

    /// Takes a place for `peer`; none: there is none within a second.
    ///
    /// # Cancel safety
    /// Cancelling gives the turn up.
    pub(in crate::gossip) async fn take(&self, peer: &NodeName) -> Option<Place> {
        let own = self.of_peer(peer);
        let taking = async {
            // Its own first: whoever waits for that keeps no place from others.
            let own = own.acquire_owned().await.ok()?;
            let of_all = Arc::clone(&self.all).acquire_owned().await.ok()?;
            Some(Place { _own: own, _of_all: of_all })
        };
        tokio::time::timeout(WAIT_MAX, taking).await.ok().flatten()
    }

    fn of_peer(&self, peer: &NodeName) -> Arc<Semaphore> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        // Who holds none and waits for none is forgotten.
        peers.retain(|_, own| Arc::strong_count(own) > 1);
        let new = || Arc::new(Semaphore::new(self.per_peer_max));
        Arc::clone(peers.entry(peer.clone()).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_what_it_can_leaves_places_to_others_and_all_together_have_so_many() {
        let (greedy, other, third): (NodeName, NodeName, NodeName) =
            ("n1".parse().unwrap(), "n2".parse().unwrap(), "n3".parse().unwrap());
        let places = Places::new(4, 2);
        let held = [places.take(&greedy).await.unwrap(), places.take(&greedy).await.unwrap()];
        assert!(places.take(&greedy).await.is_none(), "its places are taken, and it waits for a second");
        let others = [places.take(&other).await.unwrap(), places.take(&other).await.unwrap()];
        assert!(places.take(&third).await.is_none(), "all are taken");
        drop(held);
        let third = places.take(&third).await.unwrap();
        drop((others, third));
        let _again = places.take(&greedy).await.unwrap();
        assert_eq!(places.peers.lock().unwrap().len(), 1, "who holds none is forgotten");
    }
}

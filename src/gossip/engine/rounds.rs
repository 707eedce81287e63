//! What is done now and then: comparing, renewing the lease, ending others' leases, keeping peers.

use rand::RngExt as _;
use rand::seq::SliceRandom as _;

use super::{Engine, Event, Output, STORED_PEERS_MAX, SYNC_ROUNDS, Turn};
use crate::membership::Tracked;
use crate::model::MemberStatus;
use crate::store::StoredPeer;

/// One comparison in so many is made though a peer has just said the same hash: it brings the goodbyes that were missed.
const COMPARE_TICKS: u32 = 4;

impl Engine {
    /// Compares with a neighbour unless one has just agreed, refreshes the own lease, ends others' leases, saves peers.
    pub(super) fn tick(&mut self, turn: &Turn<'_>) {
        let jitter = self.rng.random_range(0.75..1.25);
        self.next_sync = turn.now + self.sync_interval.mul_f64(jitter);
        self.keep_word(turn);
        self.publish(turn);
        for node in self.replica.expire(turn.wall) {
            self.tell(Event::LeaseEnded(node.clone()));
            self.dirty.insert(node);
        }
        self.ticks = self.ticks.wrapping_add(1);
        let has_agreed = turn.now.checked_sub(self.sync_interval).is_some_and(|at| self.core.has_agreed_since(at));
        if (!has_agreed || self.ticks.is_multiple_of(COMPARE_TICKS))
            && let Some(peer) = self.core.neighbour()
        {
            self.start_sync(&peer, SYNC_ROUNDS);
        }
        self.save_peers();
    }

    /// Has the peers kept that changed, unless that runs.
    pub(super) fn save_peers(&mut self) {
        if !self.is_saving
            && let Some(peers) = self.unsaved_peers()
        {
            self.is_saving = true;
            self.has_saved = true;
            self.are_peers_dirty = false;
            self.outputs.push_back(Output::SavePeers(peers));
        }
    }

    /// Returns the peers to keep if they changed since [`Output::SavePeers`]: also at the end of the agent.
    pub fn unsaved_peers(&mut self) -> Option<Vec<StoredPeer>> {
        let peers = if self.are_peers_dirty { self.stored_peers() } else { Vec::new() };
        (!peers.is_empty()).then_some(peers)
    }

    fn stored_peers(&mut self) -> Vec<StoredPeer> {
        let stored = |member: &Tracked| StoredPeer {
            name: member.id.name.clone(),
            addr: member.id.addr,
            alive: member.status == MemberStatus::Alive,
        };
        let members = self.core.members().filter(|member| member.status != MemberStatus::Left);
        let mut peers: Vec<StoredPeer> = members.map(stored).collect();
        // Known from before and not heard of yet: still worth a call.
        for peer in &self.known_peers {
            if self.core.member(&peer.name).is_none() {
                peers.push(StoredPeer { alive: false, ..peer.clone() });
            }
        }
        // In a mesh larger than the list every node keeps others: not all lose the same ones.
        peers.shuffle(&mut self.rng);
        peers.sort_by_key(|peer| !peer.alive);
        peers.truncate(STORED_PEERS_MAX);
        peers
    }
}

//! Records: publishing the own, merging others', pulling what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{error, warn};

use super::{Actor, Done, PULLS_MAX, REFUSALS_MAX};
use crate::clock;
use crate::gossip::exchange::{self, Held};
use crate::gossip::trust::{Signer, Verifier};
use crate::membership::{BROADCAST_BYTES_MAX, Broadcast, MeshId};
use crate::model::{Entry, EntryKey, Generation, MemberStatus, NodeName};
use crate::replica::{Applied, ApplyError, Delta, Digest};
use crate::wire;

impl Actor {
    pub(super) fn held(&self, theirs: &[u64]) -> Held {
        let mut held = Held::default();
        // The lowest buckets that fit; the next round takes the others.
        for bucket in self.replica.differing(theirs) {
            let digests = self.replica.digests(&[bucket]);
            if !held.buckets.is_empty() && held.digests.len() + digests.len() > exchange::DIGESTS_MAX {
                break;
            }
            held.buckets.push(bucket);
            held.digests.extend(digests);
        }
        held
    }

    /// Returns what a peer lacks, as much as fits one frame.
    pub(super) fn deltas_for(&self, have: &[Digest]) -> Vec<Delta> {
        let mut deltas = Vec::new();
        let mut bytes = 0;
        for delta in have.iter().take(exchange::DIGESTS_MAX).filter_map(|digest| self.replica.delta_for(digest)) {
            bytes += wire::encode(&delta).map_or(wire::FRAME_BYTES_MAX, |encoded| encoded.len());
            if bytes > exchange::DELTAS_BYTES_MAX {
                break;
            }
            deltas.push(delta);
        }
        deltas
    }

    /// Publishes the own records if they changed or their lease needs it, and spreads them.
    pub(super) fn publish(&mut self, now: Instant) {
        let publication = Arc::clone(&self.publication.borrow());
        let mut records: BTreeMap<EntryKey, Entry> = publication.records.clone();
        records.insert(EntryKey::Node, Entry::Node(self.node.clone()));
        self.builder.set_local(publication.view.clone());
        match self.replica.publish(records, &Signer::new(&self.identity), clock::wall()) {
            Ok(Some(delta)) => {
                self.metrics.publishes.with_label_values(&["ok"]).inc();
                self.spread(&delta, now);
            }
            Ok(None) => {}
            Err(error) => {
                self.metrics.publishes.with_label_values(&["failed"]).inc();
                error!(%error, "own records cannot be published; the mesh keeps the old ones until they end");
            }
        }
        self.dirty.insert(self.node.name.clone());
    }

    pub(super) fn spread(&mut self, delta: &Delta, now: Instant) {
        let Digest { node, generation, version, hash } = delta.digest();
        let small = wire::encode(delta).ok().filter(|payload| payload.len() < BROADCAST_BYTES_MAX);
        let is_spread = small.is_some_and(|payload| {
            self.core.broadcast(&Broadcast::Delta { node: node.clone(), generation, version, hash, payload }, now)
        });
        if !is_spread {
            self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, now);
        }
    }

    pub(super) fn received(&mut self, from: &MeshId, broadcast: &Broadcast, now: Instant) {
        match broadcast {
            Broadcast::Delta { node, generation, version, hash, payload } => {
                let claimed = Digest { node: node.clone(), generation: *generation, version: *version, hash: *hash };
                match wire::decode::<Delta>(payload, BROADCAST_BYTES_MAX) {
                    Ok(delta) if delta.digest() == claimed => match self.merge(&delta) {
                        // Verified: passed on as it came.
                        Some(Applied::Updated) => {
                            self.core.broadcast(broadcast, now);
                        }
                        Some(Applied::Behind) => self.pull_whole(&from.name, &delta),
                        Some(Applied::Stale) | None => {}
                    },
                    Ok(_) | Err(_) => self.metrics.deltas.with_label_values(&["refused"]).inc(),
                }
            }
            Broadcast::IHave { node, generation, version, hash } => {
                let theirs = Digest { node: node.clone(), generation: *generation, version: *version, hash: *hash };
                if *node != self.node.name && !self.is_gone(node, *generation) {
                    let wanted = self.replica.wanted(&[theirs]);
                    self.pull(&from.name, node, wanted);
                }
            }
            // The core keeps statements for itself.
            Broadcast::Said(_) => {}
        }
    }

    /// Applies a delta from anybody; None if it does not count or is bad.
    pub(super) fn merge(&mut self, delta: &Delta) -> Option<Applied> {
        let Digest { node, generation, .. } = delta.digest();
        if self.is_gone(&node, generation) {
            return None;
        }
        let wall = clock::wall();
        let result = self.replica.apply(delta, &Verifier::new(&self.identity, wall), wall);
        let label = match &result {
            Ok(Applied::Updated) => "updated",
            Ok(Applied::Stale) => "stale",
            Ok(Applied::Behind) => "behind",
            Err(_) => "refused",
        };
        self.metrics.deltas.with_label_values(&[label]).inc();
        match result {
            Ok(applied) => {
                if matches!(applied, Applied::Updated) {
                    self.refusals.remove(&node);
                    self.attest(&node, clock::now());
                    self.dirty.insert(node);
                    self.are_members_dirty = true;
                }
                Some(applied)
            }
            Err(error) => {
                self.refused(&node, &error);
                None
            }
        }
    }

    /// Logs a refusal once per node, until something of it is accepted: a peer may repeat bad records at will.
    pub(super) fn refused(&mut self, node: &NodeName, error: &ApplyError) {
        if matches!(error, ApplyError::OwnName { .. }) {
            self.metrics.conflicts.inc();
        }
        if self.refusals.len() < REFUSALS_MAX && self.refusals.insert(node.clone()) {
            warn!(%node, %error, "records refused");
        }
    }

    /// Tells whether `node` left in this life or a later one: its records do not come back.
    pub(super) fn is_gone(&self, node: &NodeName, generation: Generation) -> bool {
        let has_left = |member: &crate::membership::Tracked| member.status == MemberStatus::Left;
        self.core.member(node).is_some_and(|member| has_left(member) && member.id.life.generation >= generation)
    }

    pub(super) fn pull_whole(&mut self, from: &NodeName, delta: &Delta) {
        let node = delta.node().clone();
        let none = Digest::none(node.clone());
        self.pull(from, &node, vec![none]);
    }

    pub(super) fn pull(&mut self, from: &NodeName, node: &NodeName, have: Vec<Digest>) {
        let Some(connection) = self.links.open(from).cloned() else { return };
        if have.is_empty() || self.pulls.len() >= PULLS_MAX || !self.pulls.insert(node.clone()) {
            return;
        }
        let (node, from) = (node.clone(), from.clone());
        self.work.spawn(async move {
            let result = exchange::pull(&connection, have).await;
            Done::Pulled { node, from, result }
        });
    }

    pub(super) fn take_pulled(&mut self, deltas: &[Delta], now: Instant) {
        for delta in deltas {
            if let Some(Applied::Updated) = self.merge(delta) {
                let Digest { node, generation, version, hash } = delta.digest();
                self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, now);
            }
        }
    }
}

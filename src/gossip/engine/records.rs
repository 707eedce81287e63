//! Records: publishing the own, merging others', pulling what is missing.

use std::sync::Arc;

use super::message::{Exchange, Message, Request, Stage, Step};
use super::{Engine, Event, PULLS_MAX, REFUSALS_MAX, Turn};
use crate::membership::{BROADCAST_BYTES_MAX, Broadcast, MeshId};
use crate::model::{Entry, EntryKey, Generation, MemberStatus, NodeName};
use crate::replica::{Applied, ApplyError, Delta, Digest};
use crate::wire;

impl Engine {
    /// Publishes the own records if they changed or their lease needs it, and spreads them.
    pub(super) fn publish(&mut self, turn: &Turn<'_>) {
        let mut records = self.records.clone();
        records.insert(EntryKey::Node, Entry::Node(Arc::new(self.node.clone())));
        match self.replica.publish(records, turn.signer, turn.wall) {
            Ok(Some(delta)) => {
                self.tell(Event::Published(Ok(())));
                self.spread(&delta, turn);
            }
            Ok(None) => {}
            Err(error) => self.tell(Event::Published(Err(error))),
        }
        self.dirty.insert(self.node.name.clone());
    }

    fn spread(&mut self, delta: &Delta, turn: &Turn<'_>) {
        let Digest { node, generation, version, hash } = delta.digest();
        let small = wire::encode(delta).ok().filter(|payload| payload.len() < BROADCAST_BYTES_MAX);
        let is_spread = small.is_some_and(|payload| {
            self.core.broadcast(&Broadcast::Delta { node: node.clone(), generation, version, hash, payload }, turn.now)
        });
        if !is_spread {
            self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, turn.now);
        }
    }

    pub(super) fn received(&mut self, from: &MeshId, broadcast: &Broadcast, turn: &Turn<'_>) {
        match broadcast {
            Broadcast::Delta { node, generation, version, hash, payload } => {
                let claimed = Digest { node: node.clone(), generation: *generation, version: *version, hash: *hash };
                match wire::decode::<Delta>(payload, BROADCAST_BYTES_MAX) {
                    Ok(delta) if delta.digest() == claimed => match self.merge(&delta, turn) {
                        // Verified: passed on as it came.
                        Some(Applied::Updated) => {
                            self.core.broadcast(broadcast, turn.now);
                        }
                        Some(Applied::Behind) => self.pull_whole(&from.name, &delta),
                        Some(Applied::Stale) | None => {}
                    },
                    Ok(_) | Err(_) => self.tell(Event::Delta("refused")),
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
    pub(super) fn merge(&mut self, delta: &Delta, turn: &Turn<'_>) -> Option<Applied> {
        let Digest { node, generation, .. } = delta.digest();
        if self.is_gone(&node, generation) {
            return None;
        }
        let result = self.replica.apply(delta, turn.verifier, turn.wall);
        self.tell(Event::Delta(match &result {
            Ok(Applied::Updated) => "updated",
            Ok(Applied::Stale) => "stale",
            Ok(Applied::Behind) => "behind",
            Err(_) => "refused",
        }));
        match result {
            Ok(applied) => {
                if matches!(applied, Applied::Updated) {
                    self.refusals.remove(&node);
                    self.attest(&node, turn);
                    self.revoked.remove(&node);
                    self.dirty.insert(node);
                    self.are_members_dirty = true;
                }
                Some(applied)
            }
            Err(error) => {
                self.refused(node, error);
                None
            }
        }
    }

    /// Tells of a refusal, as news once per node until something of it is accepted: a peer may repeat bad records at
    /// will.
    fn refused(&mut self, node: NodeName, error: ApplyError) {
        let is_news = self.refusals.len() < REFUSALS_MAX && self.refusals.insert(node.clone());
        self.tell(Event::Refused { node, error, is_news });
    }

    /// Tells whether `node` left in this life or a later one: its records do not come back.
    fn is_gone(&self, node: &NodeName, generation: Generation) -> bool {
        let has_left = |member: &crate::membership::Tracked| member.status == MemberStatus::Left;
        self.core.member(node).is_some_and(|member| has_left(member) && member.id.life.generation >= generation)
    }

    pub(super) fn pull_whole(&mut self, from: &NodeName, delta: &Delta) {
        let node = delta.node().clone();
        let none = Digest::none(node.clone());
        self.pull(from, &node, vec![none]);
    }

    fn pull(&mut self, from: &NodeName, node: &NodeName, have: Vec<Digest>) {
        if have.is_empty() || self.pulls.len() >= PULLS_MAX || !self.pulls.insert(node.clone()) {
            return;
        }
        let begin = Step::Say(Message::Request(Request::Pull(have)), Stage::Pulling);
        self.begin(from, Exchange::Pull(node.clone()), begin);
    }

    pub(super) fn take_pulled(&mut self, deltas: &[Delta], turn: &Turn<'_>) {
        for delta in deltas {
            if let Some(Applied::Updated) = self.merge(delta, turn) {
                let Digest { node, generation, version, hash } = delta.digest();
                self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, turn.now);
            }
        }
    }
}

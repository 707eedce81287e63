//! Records: publishing the own, merging others', pulling what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::message::{DIGESTS_MAX, Ending, Exchange, Message, Request, Stage, Step};
use super::{Engine, Event, PULLS_MAX, REFUSALS_MAX, Turn, WANTED_MAX};
use crate::membership::{BROADCAST_BYTES_MAX, Broadcast, MeshId};
use crate::model::{Entry, EntryKey, Generation, MemberStatus, NodeName};
use crate::replica::{Applied, ApplyError, Delta, Digest, NodeState, Replica};
use crate::wire;

/// How often one state is asked for; then comparisons bring it.
const PULL_TRIES_MAX: u8 = 3;

/// A pull that takes longer leaves its states to others that told of them, and goes on beside: a round trip and what loss may add.
pub(super) const PULL_PATIENCE: Duration = Duration::from_secs(1);

/// A state that another node holds and this one lacks.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Who told of it last, of those that were not asked yet.
    from: NodeName,
    /// What it is said to be; none: a delta did not fit, and it is wanted whole.
    theirs: Option<Digest>,
    tries: u8,
    /// Who is asked for it at this moment.
    asked: Option<Asked>,
    /// Who was asked last and did not bring it.
    in_vain: Option<NodeName>,
}

/// A pull that runs.
#[derive(Debug)]
struct Asked {
    peer: NodeName,
    /// From then on another may be asked as well.
    until: Instant,
}

impl Wanted {
    /// Returns what to ask with; none if it has come.
    fn lacks(&self, node: &NodeName, replica: &Replica) -> Option<Digest> {
        match &self.theirs {
            Some(theirs) => replica.wanted(std::slice::from_ref(theirs)).pop(),
            None => Some(Digest::none(node.clone())),
        }
    }

    /// From when on who told of it may be asked, `begun` being long ago; none: not before the pull that runs has ended.
    fn due(&self, begun: Instant) -> Option<Instant> {
        match &self.asked {
            None => Some(begun),
            Some(asked) if asked.peer != self.from && self.tries + 1 < PULL_TRIES_MAX => Some(asked.until),
            Some(_) => None,
        }
    }

    /// Notes that `peer` holds it. Who is asked for it, or was in vain, does not take another's place: it could say so again
    /// and again and never bring it.
    fn told_by(&mut self, peer: &NodeName) {
        let is_asked = self.asked.as_ref().is_some_and(|asked| asked.peer == *peer);
        if !is_asked && self.in_vain.as_ref() != Some(peer) {
            self.from = peer.clone();
        }
    }

    /// Notes that who is asked did not bring it yet.
    fn give_up(&mut self) {
        if let Some(asked) = self.asked.take() {
            self.tries = self.tries.saturating_add(1);
            self.in_vain = Some(asked.peer);
        }
    }
}

impl Engine {
    /// Publishes the own records if they changed or their lease needs it, and spreads them.
    pub(super) fn publish(&mut self, turn: &Turn<'_>) {
        let mut records = self.records.clone();
        records.insert(EntryKey::Node, Entry::Node(Arc::new(self.node.clone())));
        let before = self.replica.state(&self.node.name).map(NodeState::shared_chain);
        match self.replica.publish(records, turn.signer, turn.wall) {
            Ok(Some(delta)) => {
                let after = self.replica.state(&self.node.name).map(NodeState::shared_chain);
                self.has_new_chain |= before.is_some() && before != after;
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
                let is_newer = !self.replica.wanted(std::slice::from_ref(&theirs)).is_empty();
                if *node != self.node.name && !self.is_gone(node, *generation) && is_newer {
                    self.want(&from.name, node, Some(theirs));
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

    /// Wants the whole state of the delta's node from `from`: the delta's base is not at hand.
    pub(super) fn pull_whole(&mut self, from: &NodeName, delta: &Delta) {
        self.want(from, delta.node(), None);
    }

    /// Wants the state of `node` from `from`, which holds `theirs` of it (none: whatever it is, whole).
    fn want(&mut self, from: &NodeName, node: &NodeName, theirs: Option<Digest>) {
        if let Some(known) = self.wanted.get_mut(node) {
            // Who told last is the most likely to be reached.
            known.told_by(from);
            known.theirs = match (known.theirs.take(), theirs) {
                (Some(known), Some(theirs)) => Some(if theirs.is_newer_than(&known) { theirs } else { known }),
                _ => None,
            };
        } else if self.wanted.len() < WANTED_MAX {
            self.wanted
                .insert(node.clone(), Wanted { from: from.clone(), theirs, tries: 0, asked: None, in_vain: None });
        }
    }

    /// When the next pull may begin; none: there is nothing to begin.
    pub(super) fn pull_at(&self) -> Option<Instant> {
        let due = self.askable().map(|(_, due)| due).min()?;
        Some(due.max(self.pull_pace.next_at()))
    }

    /// Who may be asked for what is wanted, and from when on, for each state.
    fn askable(&self) -> impl Iterator<Item = (&NodeName, Instant)> {
        let has_room = self.pulls.len() < PULLS_MAX && !self.core.has_left();
        let wanted = self.wanted.values().filter(move |wanted| has_room && !self.pulls.contains(&wanted.from));
        wanted.filter_map(|wanted| Some((&wanted.from, wanted.due(self.started_at)?)))
    }

    /// Whom to ask next: who told of most that is wanted, and is not being asked.
    fn pull_from(&self, now: Instant) -> Option<NodeName> {
        let mut told: BTreeMap<&NodeName, usize> = BTreeMap::new();
        for (peer, _) in self.askable().filter(|(_, due)| *due <= now) {
            *told.entry(peer).or_default() += 1;
        }
        told.into_iter().max_by_key(|(_, count)| *count).map(|(peer, _)| peer.clone())
    }

    /// Pulls what is wanted, as far as the pace allows.
    pub(super) fn pull_wanted(&mut self, now: Instant) {
        while let Some(peer) = self.pull_from(now) {
            if !self.pull_pace.take(now) {
                return;
            }
            // Where the next one has to wait, this one is asked for everything: it may have heard of the others, too.
            let is_last = self.pull_pace.next_at() > now;
            let (replica, begun, mut have) = (&self.replica, self.started_at, Vec::new());
            self.wanted.retain(|node, wanted| {
                let is_due = wanted.due(begun).is_some_and(|due| due <= now);
                if !is_due || have.len() >= DIGESTS_MAX || !(is_last || wanted.from == peer) {
                    return true;
                }
                wanted.give_up();
                let lacks = wanted.lacks(node, replica);
                wanted.asked = lacks.is_some().then(|| Asked { peer: peer.clone(), until: now + PULL_PATIENCE });
                have.extend(lacks);
                wanted.asked.is_some()
            });
            if !have.is_empty() {
                self.pulls.insert(peer.clone());
                let begin = Step::Say(Message::Request(Request::Pull(have)), Stage::Pulling);
                self.begin(&peer, Exchange::Pull(peer.clone()), begin);
            }
        }
    }

    /// Notes how a pull from `peer` ended: what it did not bring is asked of whoever else told of it.
    pub(super) fn pull_ended(&mut self, peer: &NodeName, ending: Ending) {
        self.pulls.remove(peer);
        let replica = &self.replica;
        self.wanted.retain(|node, wanted| {
            if wanted.asked.as_ref().is_none_or(|asked| asked.peer != *peer) {
                return true;
            }
            wanted.give_up();
            let is_there = wanted.theirs.is_none() || wanted.lacks(node, replica).is_none();
            let has_source = ending == Ending::Complete || wanted.from != *peer;
            !is_there && has_source && wanted.tries < PULL_TRIES_MAX
        });
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

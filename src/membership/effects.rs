//! What leaves the core: foca's wishes, packets in their envelopes, news at its pace.

use std::time::Duration;

use bytes::Bytes;
use foca::{Identity as _, Member, OwnedNotification, Timer};
use rand::RngExt as _;
use tokio::time::Instant;

use super::packet::{self, Call, CallPacket, Envelope, Kind};
use super::statement::{Certainty, Statement};
use super::{BROADCAST_BYTES_MAX, Broadcast, Cause, Core, Detector, MeshId, Output, swim};
use crate::model::{MemberStatus, NodeName};

/// Shortest time between two rounds that spread news at once; what comes between waits for the next. Bounds a storm
/// (half of a mesh failing) to 40 rounds of three packets a second.
const SPREAD_PAUSE: Duration = Duration::from_millis(25);
/// Most signed lives on one feed; a packet holds about seven.
const FEED_LIVES_MAX: usize = 8;

/// The hash of all records, and how it compares with what peers say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records {
    own: Option<u64>,
    since: Instant,
    /// Since when peers' hashes differ from the own without a match between.
    unequal_since: Option<Instant>,
    next: Instant,
}

impl Records {
    /// Least time between two comparisons that the core asks for.
    const DIFFERS_EVERY: Duration = Duration::from_millis(500);
    /// A change is left so long to spread by itself, which takes less than a second.
    const SETTLED_AFTER: Duration = Duration::from_millis(400);
    const UNEQUAL_MAX: Duration = Duration::from_secs(1);

    pub(super) fn new(now: Instant) -> Self {
        Self { own: None, since: now, unequal_since: None, next: now }
    }

    pub(super) fn set_own(&mut self, hash: u64, now: Instant) {
        if self.own != Some(hash) {
            self.own = Some(hash);
            self.since = now;
        }
    }

    /// Takes a peer's hash; returns whether it is time to compare with it.
    pub(super) fn hear(&mut self, theirs: u64, now: Instant) -> bool {
        let Some(own) = self.own else { return false };
        if own == theirs {
            self.unequal_since = None;
            return false;
        }
        let unequal_since = *self.unequal_since.get_or_insert(now);
        let is_settled = now.saturating_duration_since(self.since) >= Self::SETTLED_AFTER;
        let is_long = now.saturating_duration_since(unequal_since) >= Self::UNEQUAL_MAX;
        if now < self.next || !(is_settled || is_long) {
            return false;
        }
        self.next = now + Self::DIFFERS_EVERY;
        true
    }
}

impl Core {
    pub(super) fn settle(&mut self, result: Result<(), foca::Error>, now: Instant) {
        if let Err(error) = result {
            tracing::debug!(%error, "membership step failed");
        }
        self.drain(Cause::Input, now);
    }

    /// Moves what foca asked for into outputs, timers and the roster.
    pub(super) fn drain(&mut self, cause: Cause, now: Instant) {
        let mut is_idle = false;
        while let Some(notification) = self.effects.to_notify() {
            match notification {
                OwnedNotification::MemberUp(id) => {
                    self.ring.insert(&id.name);
                    // The first to watch after a time alone: its turn does not lie in the past.
                    self.when.watch = self.when.watch.max(now);
                    self.change(&id.name, |roster| roster.back(&id, now));
                }
                OwnedNotification::MemberDown(id) => {
                    self.ring.remove(&id.name);
                    self.suspicions.remove(&id.name);
                    self.checks.forget(&id.name);
                    self.change(&id.name, |roster| roster.down(&id, now));
                }
                OwnedNotification::Rename(_, id) => {
                    self.suspicions.remove(&id.name);
                    self.checks.forget(&id.name);
                    self.change(&id.name, |roster| roster.renamed(&id, now));
                }
                OwnedNotification::Rejoin(id) => {
                    self.incarnation = 0;
                    self.sign_life();
                    self.outputs.push_back(Output::Renewed(id));
                }
                OwnedNotification::Idle => is_idle = true,
                OwnedNotification::Active | OwnedNotification::Defunct => {}
            }
        }
        while let Some((to, packet)) = self.effects.to_send() {
            // Who left is not called back. It is answered if it calls, so that it learns that it is taken for gone.
            let has_left = self.roster.find(&to.name).is_some_and(|member| member.status == MemberStatus::Left);
            if to.name != self.id().name && !(has_left && cause == Cause::Timer) {
                self.send_swim(to, &packet);
            }
        }
        while let Some((after, timer)) = self.effects.to_schedule() {
            self.schedule(after, timer, now);
        }
        if is_idle && !self.has_left && self.swim.num_members() == 0 {
            self.start_over(now);
        }
    }

    fn schedule(&mut self, after: Duration, timer: Timer<MeshId>, now: Instant) {
        let is_lifeguard = self.profile.detector == Detector::Lifeguard;
        let after = match &timer {
            Timer::ProbeRandomMember(_) | Timer::SendIndirectProbe { .. } if is_lifeguard => self.health.stretch(after),
            Timer::ChangeSuspectToDown { member_id, incarnation, .. } => {
                let (member, incarnation) = (member_id.clone(), *incarnation);
                if is_lifeguard {
                    // foca's probe failed: look closer before a word is said.
                    self.check(&member.name, now);
                    return;
                }
                self.accuse(&member.name, incarnation, Certainty::Silent, now);
                after
            }
            _ => after,
        };
        self.timer_number = self.timer_number.wrapping_add(1);
        self.timers.insert((now + after, self.timer_number), timer);
    }

    /// Begins anew under a renewed identity after the last member was lost.
    ///
    /// What is queued accuses all others. Once a partition heals, that would only make them refute; it goes with the
    /// old instance.
    fn start_over(&mut self, now: Instant) {
        let Some(id) = self.id().renew() else { return };
        let gone: Vec<Member<MeshId>> = self.swim.iter_membership_state().cloned().collect();
        self.swim = swim(id, &self.profile, &mut self.rng);
        // The old instance's timers would match the new one's tokens.
        self.timers.clear();
        self.checks.clear();
        self.suspicions.clear();
        self.incarnation = 0;
        self.sign_life();
        let result = self.swim.apply_many(gone.into_iter(), false, &mut self.effects);
        self.settle(result, now);
    }

    /// Sends a packet that foca made.
    fn send_swim(&mut self, to: MeshId, swim: &[u8]) {
        let kind = packet::kind_of(swim);
        let carries_hash = matches!(kind, Kind::Ping | Kind::Ack);
        let envelope = self.envelope(&to, carries_hash, None);
        let Ok(mut packet) = packet::wrap(&envelope, swim) else { return };
        if kind == Kind::Feed {
            self.add_lives(&to.name, &mut packet);
        }
        self.outputs.push_back(Output::Send { to, packet: Bytes::from(packet) });
    }

    /// Sends a message of weft's own to a member that is known.
    pub(super) fn send_call(&mut self, to: &NodeName, call: Call) {
        if let Some(to) = self.roster.find(to).map(|member| member.id.clone()) {
            self.send_call_to(to, call);
        }
    }

    pub(super) fn send_call_to(&mut self, to: MeshId, call: Call) {
        let carries_hash = matches!(call, Call::Check(_) | Call::Answer(_));
        let (src, src_incarnation) = (self.id().clone(), self.incarnation);
        let call = CallPacket { src, src_incarnation, dst: to.life, call };
        let envelope = self.envelope(&to, carries_hash, Some(call));
        if let Ok(packet) = packet::wrap(&envelope, &[]) {
            self.outputs.push_back(Output::Send { to, packet: Bytes::from(packet) });
        }
    }

    fn envelope(&self, to: &MeshId, carries_hash: bool, call: Option<CallPacket>) -> Envelope {
        let is_suspected = self.suspicions.get(&to.name).is_some_and(|suspicion| suspicion.life == to.life);
        let suspected = self.roster.find(&to.name).filter(|_| is_suspected).map(|member| member.incarnation);
        Envelope { set_hash: self.records.own.filter(|_| carries_hash), suspected, call }
    }

    /// Fills a feed with the signed words of random living members: repairs what spread past the receiver.
    fn add_lives(&mut self, to: &NodeName, packet: &mut Vec<u8>) {
        let is_shown = |status| matches!(status, MemberStatus::Alive | MemberStatus::Leaving);
        let living = self.roster.iter().filter(|member| is_shown(member.status) && member.id.name != *to);
        let proofs = living.filter_map(|member| member.proof.as_ref());
        // Reservoir sampling, as foca chooses members.
        let mut chosen = Vec::new();
        for (seen, proof) in proofs.enumerate() {
            if chosen.len() < FEED_LIVES_MAX {
                chosen.push(proof);
            } else if let Some(place) = chosen.get_mut(self.rng.random_range(0..=seen)) {
                *place = proof;
            }
        }
        for proof in chosen {
            if !packet::append(packet, &Broadcast::Said(Statement::Life(proof.clone()))) {
                break;
            }
        }
    }

    /// Queues a broadcast and sends it on as soon as the pace allows; returns whether it was taken.
    pub(super) fn spread(&mut self, broadcast: &Broadcast, now: Instant) -> bool {
        let Ok(bytes) = crate::wire::encode(broadcast) else { return false };
        if bytes.len() > BROADCAST_BYTES_MAX || !self.swim.add_broadcast(&bytes).unwrap_or(false) {
            return false;
        }
        let at = self.when.spread_last.map_or(now, |last| (last + SPREAD_PAUSE).max(now));
        if self.when.spread.is_none() {
            self.when.spread = Some(at);
        }
        self.spread_due(now);
        true
    }

    /// Sends waiting news to a few members.
    pub(super) fn spread_due(&mut self, now: Instant) {
        if self.when.spread.is_none_or(|at| at > now) {
            return;
        }
        self.when.spread = None;
        self.when.spread_last = Some(now);
        let result = self.swim.broadcast(&mut self.effects);
        self.settle(result, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_records_are_compared_soon_and_seldom() {
        let now = crate::clock::now();
        let at = |millis| now + Duration::from_millis(millis);
        let mut records = Records::new(now);
        assert!(!records.hear(1, now), "nothing is known of the own records");
        records.set_own(2, now);
        assert!(!records.hear(2, at(500)), "equal");
        assert!(!records.hear(1, at(399)), "the change may still spread by itself");
        assert!(records.hear(1, at(400)));
        assert!(!records.hear(1, at(899)), "at most two a second");
        // A hash that changes all the time does not put it off for ever.
        records.set_own(3, at(1300));
        assert!(records.hear(1, at(1400)));
    }
}

//! What leaves the core: foca's wishes, packets in their envelopes, news at its pace.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use foca::{Identity as _, Member, OwnedNotification, Timer};
use rand::seq::SliceRandom as _;
use tokio::time::Instant;

use super::demands::REPORT_COPIES;
use super::health::Lag;
use super::packet::{self, Call, CallPacket, Envelope, Kind};
use super::ring::ALL_NEIGHBOURS_MAX;
use super::statement::{Certainty, Leave, Statement};
use super::{
    Broadcast, Cause, Core, Detector, ForceLeaveError, LEAVE_FANOUT_MAX, MeshId, Output, PACKET_BYTES_MAX, swim,
};
use crate::model::{MemberStatus, NodeName};

/// Shortest time between two rounds that spread news at once; what comes between waits for the next. In unrest it is the
/// profile's period: a storm (half of a mesh coming back) takes five rounds of three packets a second.
const SPREAD_PAUSE: Duration = Duration::from_millis(25);
/// Least copies of one piece of news that a node sends: while a mesh comes up nobody knows how large it is.
const COPIES_MIN: u32 = 10;
/// How many times longer news waits in unrest while it does not fill a packet: a newcomer each 0.4 s is two items, and the
/// five rounds a second would carry one or two in each packet.
const UNREST_WAIT: u32 = 3;
/// Copies of a newcomer's records and word while there are many newcomers: by chance one in 50 members hears of none, and
/// comparing repairs that. With [`COPIES_MIN`] half of a starting mesh's packets would be repetitions.
const UNREST_COPIES: u32 = 4;
/// Longest that calls to the gone are put apart: about four minutes, so that no mesh forgets them.
const RECALL_STRETCH_MAX: u32 = 120;
/// To how many members at a time news goes.
pub(super) const FANOUT: usize = 3;
/// A probe of a member without a warm connection costs a handshake, 8 kB in all. So that this stays below 75 B/s, a node
/// whose probes all do (the share of strangers to its links grows with the mesh) probes once in this time; its watchers
/// find a crash in a mesh of any size.
const COLD_PROBE_PERIOD: Duration = Duration::from_mins(2);
/// With connections to so many peers, as many as a node of a large mesh has neighbours, news reaches everybody soon.
/// Further neighbours are met one per [`COLD_NEWS_PAUSE`]: a start of 100 agents would spend most of its time on
/// handshakes with neighbours that are none any more once all are there.
const LINKS_ENOUGH: usize = 16;
const COLD_NEWS_PAUSE: Duration = Duration::from_secs(5);
/// A gone member is called by one in so many of the living per period at least: the whole mesh calls it often enough.
const CALLERS_SHARE: usize = 8;

/// The hash of all records, and how it compares with what peers say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records {
    own: Option<u64>,
    since: Instant,
    /// Since when peers' hashes differ from the own without a match between.
    unequal_since: Option<Instant>,
    next: Instant,
    /// When a peer last said the own hash.
    agreed_at: Option<Instant>,
}

impl Records {
    /// Least time between two comparisons that the core asks for.
    const DIFFERS_EVERY: Duration = Duration::from_millis(500);
    /// A change is left so long to spread by itself, which takes less than a second.
    const SETTLED_AFTER: Duration = Duration::from_millis(400);
    const UNEQUAL_MAX: Duration = Duration::from_secs(1);

    pub(super) fn new(now: Instant) -> Self {
        Self { own: None, since: now, unequal_since: None, next: now, agreed_at: None }
    }

    pub(super) fn set_own(&mut self, hash: u64, now: Instant) {
        if self.own != Some(hash) {
            self.own = Some(hash);
            self.since = now;
        }
    }

    /// Returns when a peer last held the same, unless one has differed since.
    pub(super) fn agreed_at(&self) -> Option<Instant> {
        self.agreed_at.filter(|_| self.unequal_since.is_none())
    }

    /// Takes a peer's hash; returns whether it is time to compare with it, `lag` being this node's.
    pub(super) fn hear(&mut self, theirs: u64, lag: Lag, now: Instant) -> bool {
        let Some(own) = self.own else { return false };
        if own == theirs {
            self.unequal_since = None;
            self.agreed_at = Some(now);
            return false;
        }
        let unequal_since = *self.unequal_since.get_or_insert(now);
        let is_settled = now.saturating_duration_since(self.since) >= Self::SETTLED_AFTER;
        let is_long = now.saturating_duration_since(unequal_since) >= Self::UNEQUAL_MAX;
        if now < self.next || !(is_settled || is_long) {
            return false;
        }
        self.next = now + lag.lengthen(Self::DIFFERS_EVERY);
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
            if !matches!(notification, OwnedNotification::Active | OwnedNotification::Idle | OwnedNotification::Defunct)
            {
                self.ask_soon(now);
            }
            match notification {
                OwnedNotification::MemberUp(id) => {
                    self.ring.insert(&id.name);
                    self.unrest.came(&id.name, self.swim.num_members(), now);
                    // The first to watch after a time alone: its turn does not lie in the past.
                    self.when.watch = self.when.watch.max(now);
                    self.change(&id.name, |roster| roster.back(&id, now));
                }
                OwnedNotification::MemberDown(id) => {
                    self.ring.remove(&id.name);
                    self.suspicions.remove(&id.name);
                    self.checks.forget(&id.name);
                    self.change(&id.name, |roster| roster.down(&id, now));
                    self.when.failed_last = Some(now);
                    // Nobody was to be called until now: that is no lateness.
                    if self.when.recall < now {
                        self.when.recall = now + self.profile.recall_period;
                        self.when.recalled_last = now;
                    }
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
            Timer::ProbeRandomMember(_) if is_lifeguard => self.stretch(after.max(self.cold_probe_period()), now),
            Timer::SendIndirectProbe { .. } if is_lifeguard => self.stretch(after, now),
            Timer::PeriodicAnnounceDown(_) => after * self.recall_stretch(),
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

    /// Stretches a timer of the detection by how this node does, and how the mesh does.
    pub(super) fn stretch(&self, timer: Duration, now: Instant) -> Duration {
        self.unrest.stretch(self.health.stretch(timer), now)
    }

    /// Returns how seldom random members are probed because of those that no connection leads to.
    fn cold_probe_period(&self) -> Duration {
        let members = self.alive_count();
        let cold = u32::try_from(members.saturating_sub(ALL_NEIGHBOURS_MAX)).unwrap_or(u32::MAX);
        COLD_PROBE_PERIOD * cold / u32::try_from(members).unwrap_or(u32::MAX).max(1)
    }

    /// Returns how many times less often than after a partition the gone are called: few of them are called by many.
    fn recall_stretch(&self) -> u32 {
        let gone = self.roster.len().saturating_sub(self.alive_count()).max(1);
        u32::try_from(self.alive_count() / (CALLERS_SHARE * gone)).unwrap_or(u32::MAX).clamp(1, RECALL_STRETCH_MAX)
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
        self.news.clear();
        self.reports.clear();
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
        match kind {
            Kind::Feed => self.add_any_lives(&to.name, &mut packet),
            Kind::Ping | Kind::Ack => self.fill(&mut packet),
            Kind::TurnUndead | Kind::Other => {}
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
        let carries_news = matches!(call.call, Call::Check(_) | Call::Answer(_) | Call::News);
        let envelope = self.envelope(&to, carries_hash, Some(call));
        let Ok(mut packet) = packet::wrap(&envelope, &[]) else { return };
        if carries_news {
            self.fill(&mut packet);
        }
        self.outputs.push_back(Output::Send { to, packet: Bytes::from(packet) });
    }

    fn envelope(&self, to: &MeshId, carries_hash: bool, call: Option<CallPacket>) -> Envelope {
        let is_suspected = self.suspicions.get(&to.name).is_some_and(|suspicion| suspicion.life == to.life);
        let suspected = self.roster.find(&to.name).filter(|_| is_suspected).map(|member| member.incarnation);
        Envelope { set_hash: self.records.own.filter(|_| carries_hash), suspected, call }
    }

    /// Puts news into a packet, and reports of demand where it leaves room.
    fn fill(&mut self, packet: &mut Vec<u8>) {
        self.news.fill(packet, self.copies());
        self.reports.fill(packet, REPORT_COPIES);
    }

    /// Queues a broadcast and sends it on as soon as the pace allows; returns whether it was taken.
    pub(super) fn spread(&mut self, broadcast: &Broadcast, now: Instant) -> bool {
        if let Broadcast::Said(Statement::Demand(_)) = broadcast {
            return self.spread_demand(broadcast, now);
        }
        let is_restless = self.unrest.is_at(now);
        let most = if is_restless && self.is_repaired(broadcast) { UNREST_COPIES } else { u32::MAX };
        if !self.news.add_at_most(broadcast, most) {
            return false;
        }
        let pause = if is_restless { self.spread_period(now) } else { self.lag.lengthen(SPREAD_PAUSE) };
        let at = self.when.spread_last.map_or(now, |last| (last + pause).max(now));
        self.when.spread = Some(self.when.spread.map_or(at, |planned| planned.min(at)));
        self.spread_due(now);
        true
    }

    /// Sends waiting news to a few neighbours, and plans the next round while there is any.
    pub(super) fn spread_due(&mut self, now: Instant) {
        if self.when.spread.is_none_or(|at| at > now) {
            return;
        }
        self.when.spread = None;
        self.when.spread_last = Some(now);
        for to in self.next_neighbours(now) {
            // The last copies may have gone to the neighbour before.
            if self.has_news() {
                self.send_call(&to, Call::News);
            }
        }
        if self.has_news() {
            self.when.spread = Some(now + self.spread_period(now));
        }
    }

    /// How long after a round of news the next one comes. Where much happens, few full packets are worth more than many.
    fn spread_period(&self, now: Instant) -> Duration {
        let is_scanty = self.unrest.is_at(now) && self.news.weight() < PACKET_BYTES_MAX;
        let period = if is_scanty { self.profile.gossip_period * UNREST_WAIT } else { self.profile.gossip_period };
        self.lag.lengthen(period)
    }

    fn has_news(&self) -> bool {
        !self.news.is_empty() || !self.reports.is_empty()
    }

    /// Says goodbye to as many members as one round reaches, once it is signed. From this call on the core takes
    /// nothing in.
    pub fn leave(&mut self) {
        if self.has_left {
            return;
        }
        let id = self.id().clone();
        self.has_left = true;
        self.timers.clear();
        let (by, life) = (id.name.clone(), id.life);
        let leave = Leave { node: id.name, life, prune: false, by, signature: Vec::new() };
        self.outputs.push_back(Output::Sign(Statement::Leave(leave)));
    }

    /// Says goodbye for a failed member; with `prune` everybody forgets it.
    ///
    /// # Errors
    /// If there is no such member or it answers.
    pub fn force_leave(&mut self, name: &NodeName, prune: bool, now: Instant) -> Result<(), ForceLeaveError> {
        let member = self.roster.find(name).ok_or(ForceLeaveError::Unknown)?;
        if matches!(member.status, MemberStatus::Alive | MemberStatus::Leaving) {
            return Err(ForceLeaveError::Alive);
        }
        let by = self.id().name.clone();
        let leave = Leave { node: name.clone(), life: member.id.life, prune, by, signature: Vec::new() };
        self.change(name, |roster| {
            roster.leave(&leave, now);
        });
        if prune {
            self.forget(name);
        }
        self.outputs.push_back(Output::Sign(Statement::Leave(leave)));
        Ok(())
    }

    /// Says `leave`, which is this node's own, to as many neighbours as one round reaches.
    pub(super) fn spread_goodbye(&mut self, leave: &Leave) {
        self.news.clear();
        self.reports.clear();
        self.news.add(&Broadcast::Said(Statement::Leave(leave.clone())));
        let mut neighbours = self.ring.neighbours(&self.id().name);
        neighbours.shuffle(&mut self.rng);
        for to in neighbours.iter().take(LEAVE_FANOUT_MAX) {
            self.send_call(to, Call::News);
        }
        self.news.clear();
    }

    /// Returns whom news goes to next: each neighbour, and each that a connection leads to, once, in random order, before any
    /// twice. With [`LINKS_ENOUGH`] few are chosen that no connection leads to yet.
    fn next_neighbours(&mut self, now: Instant) -> Vec<NodeName> {
        let mut chosen = Vec::new();
        for _ in 0..2 {
            while chosen.len() < FANOUT
                && let Some(name) = self.turns.pop()
            {
                if self.ring.contains(&name) && !chosen.contains(&name) && self.is_for_news(&name, now) {
                    chosen.push(name);
                }
            }
            if self.turns.is_empty() {
                // Whoever took this node for a neighbour has a connection to it: it is one for this node as well.
                let neighbours = self.ring.neighbours(&self.id().name).into_iter();
                let all: BTreeSet<NodeName> = neighbours.chain(self.linked.iter().cloned()).collect();
                self.turns = all.into_iter().collect();
                self.turns.shuffle(&mut self.rng);
            }
        }
        chosen
    }

    fn is_for_news(&mut self, name: &NodeName, now: Instant) -> bool {
        if self.linked.len() < LINKS_ENOUGH || self.linked.contains(name) {
            return true;
        }
        if self.when.cold_news.is_some_and(|then| now < then) {
            return false;
        }
        self.when.cold_news = Some(now + COLD_NEWS_PAUSE);
        true
    }

    /// Whether others learn of it soon by other ways where this node says it too seldom: another's records by comparing, its
    /// first word by its records and by asking for lives.
    fn is_repaired(&self, broadcast: &Broadcast) -> bool {
        let own = &self.id().name;
        match broadcast {
            Broadcast::Delta { node, .. } | Broadcast::IHave { node, .. } => node != own,
            Broadcast::Said(Statement::Life(claim)) => claim.incarnation == 0 && claim.id.name != *own,
            Broadcast::Said(_) => false,
        }
    }

    /// How often one piece of news is sent on: four times per decade of members, as memberlist does on a LAN, so that by
    /// chance alone nobody is left out.
    fn copies(&self) -> u32 {
        // 1.2 times the binary logarithm is 4 times the decimal one.
        (((self.alive_count() + 2).ilog2() + 1) * 6 / 5).max(COPIES_MIN)
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
        assert!(!records.hear(1, Lag::default(), now), "nothing is known of the own records");
        records.set_own(2, now);
        assert!(!records.hear(2, Lag::default(), at(500)), "equal");
        assert!(!records.hear(1, Lag::default(), at(399)), "the change may still spread by itself");
        assert!(records.hear(1, Lag::default(), at(400)));
        assert!(!records.hear(1, Lag::default(), at(899)), "at most two a second");
        // A hash that changes all the time does not put it off for ever.
        records.set_own(3, at(1300));
        assert!(records.hear(1, Lag::default(), at(1400)));
        // A host whose timers are served late compares less often.
        let mut lag = Lag::default();
        (0..50).for_each(|_| lag.note(Duration::from_millis(120)));
        assert!(records.hear(1, lag, at(1900)));
        assert!(!records.hear(1, lag, at(3100)));
        assert!(records.hear(1, lag, at(3200)));
    }
}

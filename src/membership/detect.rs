//! Failure detection: watching, checking, accusing, judging; evidence from outside.
//!
//! ```text
//!   watch, foca's failed probe, another's accusation -> check -> failed: own vote, signed -> suspicion -> judge
//!   evidence_crashed ----------------------------------------------^      evidence_alive, answers: veto
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use foca::{Identity as _, Member, State};
use rand::RngExt as _;
use rand::seq::IteratorRandom as _;
use tokio::time::Instant;

use super::checks::{HELPERS, Settled, Step};
use super::packet::Call;
use super::statement::{Accusation, Certainty, Statement};
use super::suspicion::Suspicion;
use super::{Broadcast, Cause, Core, Detector, MemberStatus, MeshId, Output, REAP_EVERY, Tracked};
use crate::model::NodeName;

/// A wake-up later than this blames itself: longer than a loaded machine's scheduling, shorter than a check.
const LATE: Duration = Duration::from_millis(200);
/// An answer counts against a sentence for so long.
const VETO: Duration = Duration::from_secs(1);
/// How often a suspect is asked again by a node that found it silent: twelve times within the longest suspicion of
/// 20 members, so that lost packets alone never make a sentence.
const APPEAL_EVERY: Duration = Duration::from_millis(150);
/// Least time between two refutations: whoever accuses faster gains nothing.
const REFUTE_PAUSE: Duration = Duration::from_millis(500);
/// Least time between two returns under a new life on somebody's word that this one is over: whoever remembers a later
/// life of the name says so to every return, once per round trip.
const RENEW_PAUSE: Duration = Duration::from_secs(1);
/// Least time between two refutations that count against the own health: one liar must not slow this node down.
const BLAME_PAUSE: Duration = Duration::from_secs(5);
/// Members that look closer on average when somebody accuses a member, beside its watchers.
const SECOND_LOOKS: u32 = 2;
/// A member that was found gone is called again after one recall period, four, 16 and 64: 2 s to about 2 minutes. Each call
/// of one that is really gone costs a dial. After that the whole mesh calls it now and then.
const RECALL_FACTOR: u32 = 4;
const RECALL_STEPS: u32 = 3;
/// Most such calls at a time: half of a mesh may have failed, and one call of many heals a partition.
const RECALLED_AT_ONCE: usize = 4;

impl Core {
    /// Runs what is due at `now`. Call it once everything that has arrived was handed over.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.lag.note(now.saturating_duration_since(self.poll_timeout()));
        self.wake(now);
        let mut due = Vec::new();
        while let Some(entry) = self.timers.first_entry().filter(|entry| entry.key().0 <= now) {
            due.push(entry.remove());
        }
        // A late wake-up must not overtake: foca orders its own events.
        due.sort();
        for timer in due {
            let convicts = match &timer {
                foca::Timer::ChangeSuspectToDown { member_id, .. } => Some(member_id.clone()),
                _ => None,
            };
            // An error here says that the timer is out of date, or that a packet could not be encoded: both end with it.
            if let Err(error) = self.swim.handle_timer(timer, &mut self.effects) {
                tracing::debug!(%error, "membership timer failed");
            }
            self.drain(Cause::Timer, now);
            if let Some(id) = convicts {
                self.tell_plain_down(&id.name, now);
            }
        }
        if !self.has_left {
            self.watch(now);
            for step in self.checks.handle_timeout(now) {
                self.take_step(step, now);
            }
            self.judge(now);
            self.recall(now);
            self.ask_for_lives(now);
            self.spread_due(now);
            if self.when.refute.is_some_and(|at| at <= now) {
                self.refute(now);
            }
        }
        for name in self.roster.releasable(now) {
            self.change(&name, |roster| roster.release(&name, now));
        }
        if now >= self.when.reap {
            self.when.reap = now + REAP_EVERY;
            self.reap(now);
        }
    }

    /// Returns when [`Core::handle_timeout`] wants to run.
    pub fn poll_timeout(&self) -> Instant {
        let mut next = self.when.reap;
        let mut sooner = |at: Option<Instant>| next = at.map_or(next, |at| next.min(at));
        sooner(self.timers.first_key_value().map(|(key, _)| key.0));
        sooner(self.roster.holds().1);
        if self.has_left {
            return next;
        }
        sooner(self.checks.poll_timeout());
        sooner(self.when.spread);
        sooner(self.when.refute);
        if self.is_watching() {
            sooner(Some(self.when.watch));
        }
        if !self.gone.is_empty() || self.recalls_until().is_some_and(|end| self.when.recalled_last < end) {
            sooner(Some(self.when.recall));
        }
        if self.alive_count() > 0 {
            sooner(Some(self.when.announce));
        }
        let own = &self.id().name;
        let bounds = self.profile.bounds(self.alive_count() + 1);
        for suspicion in self.suspicions.values() {
            sooner(
                suspicion.deadline(&bounds, own, &self.unrest).filter(|_| self.profile.detector == Detector::Lifeguard),
            );
            sooner(suspicion.expires());
            sooner(Some(suspicion.next_appeal).filter(|_| suspicion.has_vote(own)));
        }
        next
    }

    /// Notes that `name` answered something of this node at `at`, outside of SWIM: an acknowledged packet of a
    /// connection. It is not declared failed within the second after.
    pub fn evidence_alive(&mut self, name: &NodeName, at: Instant) {
        self.hear_answer(name, at);
    }

    /// Notes that the host of `name` said that nothing listens at its port (ICMP port unreachable), or that its process has
    /// forgotten a connection and does not answer: it is failed here at once, and the others are told.
    pub fn evidence_crashed(&mut self, name: &NodeName, now: Instant) {
        self.wake(now);
        let Some(incarnation) = self.living(name) else { return };
        if let Some(member) = self.roster.find_mut(name) {
            member.heard = None;
        }
        self.checks.forget(name);
        self.accuse(name, incarnation, Certainty::Crashed, now);
        self.judge(now);
    }

    /// Asks `name` whether it lives, for a reason from outside: its host is said to refuse the port, or somebody claims its
    /// name. Either may be a lie, and a live one answers.
    pub fn question(&mut self, name: &NodeName, now: Instant) {
        self.check(name, now);
    }

    /// Those whose signs of life matter now: the members that are checked or accused, and those that are checked next.
    pub fn in_question(&self) -> BTreeSet<NodeName> {
        let watched = self.ring.successors(&self.id().name).cloned();
        watched.chain(self.checks.targets().cloned()).chain(self.suspicions.keys().cloned()).collect()
    }

    /// This node's place on the ring of the living, from 0, and how many they are with it. Each watches the next two.
    pub fn ring_rank(&self) -> (usize, usize) {
        self.ring.rank(&self.id().name)
    }

    /// Returns when `name` last answered this node; none before it did, and after it was declared failed.
    pub fn answered_at(&self, name: &NodeName) -> Option<Instant> {
        self.roster.find(name)?.heard
    }

    /// Takes `name` for failed: its certificate is revoked, so nobody answers it any more. Nothing is said of it, because every
    /// member learns that from the signed document; its answers up to here veto nothing. It is back when it shows a later life.
    pub fn expel(&mut self, name: &NodeName, now: Instant) {
        self.checks.forget(name);
        if self.living(name).is_some() {
            self.declare_down(name, now);
        }
    }

    /// Returns the incarnation of a member that foca holds as alive.
    pub(super) fn living(&self, name: &NodeName) -> Option<u16> {
        let member = self.roster.find(name)?;
        self.ring.contains(name).then_some(member.incarnation).filter(|_| *name != self.id().name)
    }

    fn is_watching(&self) -> bool {
        self.profile.detector == Detector::Lifeguard && self.alive_count() > 0
    }

    /// Doubts itself after a late wake-up, and leaves everybody the time that it slept. Whatever may end in a sentence calls it
    /// first: a process that goes on after SIGCONT may read a packet before its timers run. What it slept is counted once.
    pub(super) fn wake(&mut self, now: Instant) {
        let away = now.saturating_duration_since(self.when.called_last);
        self.when.called_last = self.when.called_last.max(now);
        if away <= LATE || self.profile.detector == Detector::Plain {
            return;
        }
        let late = away.min(now.saturating_duration_since(self.poll_timeout()));
        if late <= LATE {
            return;
        }
        self.stats.late_wakeups += 1;
        self.health.worsen(u8::try_from(late.as_secs().min(3)).unwrap_or(3) + 1);
        self.checks.postpone(late);
        for suspicion in self.suspicions.values_mut() {
            suspicion.postpone(late);
        }
    }

    /// Checks one of the watched in a wake-up that the owner has anyway, about once in [`super::WATCH_PERIOD`], if it is time; its
    /// own timer does where no more of them come. The wake-up came `late`.
    pub fn beat(&mut self, late: Duration, now: Instant) {
        self.lag.note(late);
        self.when.beat_last = Some(now);
        // They come by another clock than the timers do.
        if now + self.profile.watch_period / 2 >= self.when.watch {
            self.watch_next(now);
        }
    }

    /// Checks one of the two successors, in turn.
    fn watch(&mut self, now: Instant) {
        if now >= self.when.watch {
            self.watch_next(now);
        }
    }

    fn watch_next(&mut self, now: Instant) {
        if !self.is_watching() || self.has_left {
            return;
        }
        let period = self.profile.watch_period;
        let has_beats = self.when.beat_last.is_some_and(|at| now.saturating_duration_since(at) < period * 2);
        let grace = if has_beats { period / 4 } else { Duration::ZERO };
        self.when.watch = now + self.stretch(period, now) + grace;
        let own = self.id().name.clone();
        let watched: Vec<NodeName> = self.ring.successors(&own).cloned().collect();
        self.watch_turn = self.watch_turn.wrapping_add(1);
        let turn = self.watch_turn.checked_rem(watched.len()).unwrap_or(0);
        if let Some(name) = watched.get(turn) {
            self.check(name, now);
        }
    }

    /// Begins to check `name`, unless that is under way.
    pub(super) fn check(&mut self, name: &NodeName, now: Instant) {
        if self.living(name).is_none() {
            return;
        }
        let timeout = self.stretch(self.profile.check_timeout, now);
        if let Some(step) = self.checks.start(name, timeout, now) {
            self.take_step(step, now);
        }
    }

    pub(super) fn take_step(&mut self, step: Step, now: Instant) {
        match step {
            Step::Ask { target, number } => self.send_call(&target, Call::Check(number)),
            Step::AskHelpers { target, number, patience } => {
                let own = self.id().name.clone();
                let is_fit = |name: &&NodeName| **name != target && **name != own;
                let neighbours = self.ring.neighbours(&own);
                let helpers: Vec<NodeName> = neighbours.iter().filter(is_fit).cloned().sample(&mut self.rng, HELPERS);
                self.checks.asked(number, &helpers);
                let patience_ms = u16::try_from(patience.as_millis()).unwrap_or(u16::MAX);
                for helper in helpers {
                    self.send_call(&helper, Call::CheckFor { target: target.clone(), number, patience_ms });
                }
            }
            Step::Failed { target, silent_helpers } => {
                self.health.worsen(silent_helpers.saturating_add(1));
                if let Some(incarnation) = self.living(&target) {
                    self.accuse(&target, incarnation, Certainty::Silent, now);
                }
            }
            Step::Missed { asker, number, target } => {
                self.send_call(&asker, Call::Missed(number));
                // A witness, if its own senses can be trusted.
                if self.health.score() == 0
                    && let Some(incarnation) = self.living(&target)
                {
                    self.accuse(&target, incarnation, Certainty::Silent, now);
                }
            }
        }
    }

    /// Notes that `name` answered this node.
    pub(super) fn hear_answer(&mut self, name: &NodeName, at: Instant) {
        if let Some(member) = self.roster.find_mut(name) {
            member.heard = member.heard.max(Some(at));
        }
        for settled in self.checks.answered(name, at) {
            match settled {
                Settled::Own => self.health.improve(),
                Settled::For { asker, number } => self.send_call(&asker, Call::Reached(number)),
            }
        }
        let own = self.id().name.clone();
        if self.suspicions.get_mut(name).is_some_and(|suspicion| suspicion.retract(&own, at)) {
            self.stats.refuted += 1;
            self.drop_empty(name);
        }
    }

    pub(super) fn drop_empty(&mut self, name: &NodeName) {
        if self.suspicions.get(name).is_some_and(Suspicion::is_empty) {
            self.suspicions.remove(name);
        }
    }

    /// Returns until when an answer of `name` counts against a sentence; none if it does not any more.
    fn veto(&self, name: &NodeName, now: Instant) -> Option<Instant> {
        let until = self.roster.find(name).and_then(|member| member.heard)? + VETO;
        (until > now).then_some(until)
    }

    /// Adds this node's own vote against `name` and has it signed. An answer since the check began has ended the check, so
    /// there is nothing to veto here.
    pub(super) fn accuse(&mut self, name: &NodeName, incarnation: u16, certainty: Certainty, now: Instant) {
        let own = self.id().name.clone();
        let Some(life) = self.roster.find(name).map(|member| member.id.life) else { return };
        if self.profile.detector == Detector::Lifeguard {
            let suspicion = self.suspicions.entry(name.clone()).or_insert_with(|| Suspicion::new(life, now));
            suspicion.next_appeal = now + APPEAL_EVERY;
            if !suspicion.vote(&own, incarnation, certainty, &own, now) {
                return;
            }
        }
        self.stats.accusations += 1;
        let (accused, accuser) = (name.clone(), own);
        let word = Accusation { accused, life, incarnation, certainty, accuser, signature: Vec::new() };
        self.outputs.push_back(Output::Sign(Statement::Accuse(word)));
    }

    /// Looks closer after another's first word against `name`: its watchers do, and two others on average.
    pub(super) fn look_closer(&mut self, name: &NodeName, certainty: Certainty, now: Instant) {
        let own = self.id().name.clone();
        let is_watcher = self.ring.successors(&own).any(|watched| watched == name);
        let members = u32::try_from(self.alive_count()).unwrap_or(u32::MAX).max(1);
        if is_watcher || self.rng.random_ratio(SECOND_LOOKS.min(members), members) {
            self.check(name, now);
            if certainty == Certainty::Crashed {
                self.ask_port(name);
            }
        }
    }

    /// Has the host of `name` asked whether its port is closed.
    fn ask_port(&mut self, name: &NodeName) {
        if let Some(id) = self.roster.find(name).map(|member| member.id.clone()) {
            self.outputs.push_back(Output::AskPort(id));
        }
    }

    /// Declares failed whose time to refute is over, appeals to the other suspects, lets advice end.
    pub(super) fn judge(&mut self, now: Instant) {
        let own = self.id().name.clone();
        let bounds = self.profile.bounds(self.alive_count() + 1);
        let unrest = &self.unrest;
        let (mut failed, mut appeals) = (Vec::new(), Vec::new());
        for (name, suspicion) in &mut self.suspicions {
            self.stats.advisories_ignored += suspicion.expire(now) as u64;
            let is_due = suspicion.deadline(&bounds, &own, unrest).is_some_and(|at| at <= now);
            if is_due && self.profile.detector == Detector::Lifeguard {
                failed.push(name.clone());
            } else if suspicion.has_vote(&own) && suspicion.next_appeal <= now {
                suspicion.next_appeal = now + APPEAL_EVERY;
                appeals.push(name.clone());
            }
        }
        self.suspicions.retain(|_, suspicion| !suspicion.is_empty());
        for name in appeals {
            let number = self.checks.next_number();
            self.send_call(&name, Call::Check(number));
        }
        for name in failed {
            let Some(until) = self.veto(&name, now) else {
                self.declare_down(&name, now);
                continue;
            };
            self.stats.vetoes += 1;
            match self.suspicions.get_mut(&name) {
                // It answered just before it crashed, or two lie. Nobody repeats these votes for long, so they are kept
                // until it answers no more or refutes; its host can tell at once.
                Some(suspicion) if suspicion.is_certain() => {
                    suspicion.put_off(until);
                    self.ask_port(&name);
                }
                // It answers this node: the others' word is weighed again from the beginning.
                _ => {
                    self.suspicions.remove(&name);
                }
            }
            self.check(&name, now);
        }
    }

    /// Takes `name` for gone from here on.
    pub(super) fn declare_down(&mut self, name: &NodeName, now: Instant) {
        self.suspicions.remove(name);
        let Some(member) = self.roster.find(name) else { return };
        let down = Member::new(member.id.clone(), member.incarnation, State::Down);
        self.stats.failures += 1;
        let result = self.swim.apply_many(std::iter::once(down), false, &mut self.effects);
        self.settle(result, now);
    }

    /// Plain SWIM: the prober whose suspicion ended tells everybody, and is believed.
    fn tell_plain_down(&mut self, name: &NodeName, now: Instant) {
        let Some(member) = self.roster.find(name).filter(|member| member.status == MemberStatus::Failed) else {
            return;
        };
        let (life, incarnation) = (member.id.life, member.incarnation);
        if self.profile.detector == Detector::Plain && now == member.since() {
            self.stats.failures += 1;
            let (accused, accuser) = (name.clone(), self.id().name.clone());
            let certainty = Certainty::Crashed;
            let word = Accusation { accused, life, incarnation, certainty, accuser, signature: Vec::new() };
            self.outputs.push_back(Output::Sign(Statement::Accuse(word)));
        }
    }

    /// Calls two of the strangers that a peer called gone, and members that were found gone lately: all others may see
    /// them, and then nobody else calls (`recall_stretch` counts on the others).
    fn recall(&mut self, now: Instant) {
        if now < self.when.recall {
            return;
        }
        let last = std::mem::replace(&mut self.when.recalled_last, now);
        self.when.recall = now + self.profile.recall_period;
        let left = |name: &NodeName| self.roster.find(name).is_some_and(|member| member.status == MemberStatus::Left);
        let callable = self.gone.iter().filter(|(name, _)| !left(name)).map(|(_, id)| id);
        let mut called: Vec<MeshId> = callable.cloned().sample(&mut self.rng, 2);
        if self.alive_count() > 0 && self.recalls_until().is_some_and(|end| last < end) {
            let period = self.profile.recall_period;
            let step =
                |member: &Tracked, at: Instant| recall_step(at.saturating_duration_since(member.since()), period);
            let is_due = |member: &&Tracked| {
                member.status == MemberStatus::Failed
                    && !self.gone.contains_key(&member.id.name)
                    && step(member, now) > step(member, last.max(member.since()))
            };
            let due = self.roster.iter().filter(is_due).map(|member| member.id.clone());
            called.extend(due.sample(&mut self.rng, RECALLED_AT_ONCE));
        }
        for id in called {
            self.announce(id, now);
        }
    }

    /// Until when members that were found gone lately are called; none: nobody was.
    pub(super) fn recalls_until(&self) -> Option<Instant> {
        Some(self.when.failed_last? + self.profile.recall_period * (RECALL_FACTOR.pow(RECALL_STEPS) + 1))
    }

    /// Notes that this node is accused at `incarnation` of its present life.
    pub(super) fn accused(&mut self, incarnation: u16, now: Instant) {
        // Nobody can have heard of a later one.
        if incarnation > self.incarnation || self.when.refute.is_some() || self.has_left {
            return;
        }
        let at = self.when.refuted_last.map_or(now, |last| (last + REFUTE_PAUSE).max(now));
        if incarnation == self.incarnation {
            self.when.refute = Some(at);
            if at <= now {
                self.refute(now);
            }
        } else if let Some(claim) = self.own_life.clone().filter(|_| at <= now) {
            // Refuted already, and whoever says so has not heard of it.
            self.when.refuted_last = Some(now);
            self.spread(&Broadcast::Said(Statement::Life(claim)), now);
        }
    }

    fn refute(&mut self, now: Instant) {
        self.when.refute = None;
        self.when.refuted_last = Some(now);
        self.stats.refutations += 1;
        if self.when.blamed_last.is_none_or(|at| now.saturating_duration_since(at) >= BLAME_PAUSE) {
            self.when.blamed_last = Some(now);
            self.health.worsen(1);
        }
        self.raise_incarnation(now);
    }

    /// Says this node's word anew: its key is another, and nobody can check the old word any more.
    pub fn restate(&mut self, now: Instant) {
        if !self.has_left {
            self.raise_incarnation(now);
        }
    }

    /// Lives on under the next incarnation.
    fn raise_incarnation(&mut self, now: Instant) {
        let Some(next) = self.incarnation.checked_add(1).filter(|next| *next < u16::MAX) else {
            self.renew(now);
            return;
        };
        let suspected = Member::new(self.id().clone(), self.incarnation, State::Suspect);
        self.incarnation = next;
        self.sign_life();
        // foca raises its incarnation to the same and tells a few members.
        let result = self.swim.apply_many(std::iter::once(suspected), false, &mut self.effects);
        self.settle(result, now);
    }

    /// Notes that a peer takes this life for over.
    pub(super) fn told_gone(&mut self, now: Instant) {
        let is_early = |at: Instant| now.saturating_duration_since(at) < RENEW_PAUSE;
        if !self.has_left && !self.when.renewed_last.is_some_and(is_early) {
            self.renew(now);
        }
    }

    /// Comes back under the next life.
    pub(super) fn renew(&mut self, now: Instant) {
        self.when.renewed_last = Some(now);
        if let Some(renewed) = self.id().renew() {
            self.become_id(renewed.clone(), now);
            self.outputs.push_back(Output::Renewed(renewed));
        }
    }
}

/// Tells how many of the calls to a member that was found gone `age` ago are due.
fn recall_step(age: Duration, period: Duration) -> u32 {
    let periods = age.as_millis() / period.as_millis().max(1);
    periods.checked_ilog(RECALL_FACTOR.into()).map_or(0, |log| (log + 1).min(RECALL_STEPS + 1))
}

//! How well this node itself does: Lifeguard's local health multiplier (arXiv 1707.00788, section IV.A).
//!
//! A node that misses answers, whose helpers stay silent, that is suspected by others or wakes late is more likely slow
//! than the whole mesh is. It then waits longer before it says a word about anybody.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::NodeName;

/// Worst score; timers are stretched by one more than the score (memberlist's bound).
pub const LOCAL_HEALTH_WORST: u8 = 8;

/// The score: 0 is well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LocalHealth(u8);

impl LocalHealth {
    pub(super) fn score(self) -> u8 {
        self.0
    }

    pub(super) fn worsen(&mut self, by: u8) {
        self.0 = self.0.saturating_add(by).min(LOCAL_HEALTH_WORST);
    }

    pub(super) fn improve(&mut self) {
        self.0 = self.0.saturating_sub(1);
    }

    /// Stretches a timer.
    pub(super) fn stretch(self, timer: Duration) -> Duration {
        timer * (u32::from(self.0) + 1)
    }
}

/// A timer may be served so late on a host that has time enough.
const LAG_FREE: Duration = Duration::from_millis(20);
/// More counts as much: a process that was stopped is not slow.
const LAG_MAX: Duration = Duration::from_millis(200);
/// How many times the lag news waits for more to go with it. A host whose processes wait for a processor for 100 ms sends a
/// quarter of the packets: each costs it three wake-ups, and what it may send at most takes half of a core for 100 agents.
const LAG_FACTOR: u32 = 8;

/// How late this node's timers are served: the average of the last dozen. Where many agents share a host, nothing but
/// themselves can slow them down before they keep each other from work.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lag(Duration);

impl Lag {
    /// Notes that a timer was served so late.
    pub(super) fn note(&mut self, late: Duration) {
        self.0 = (self.0 * 7 + late.min(LAG_MAX)) / 8;
    }

    /// Lengthens a pause between packets that can wait.
    pub(super) fn lengthen(self, pause: Duration) -> Duration {
        pause + self.0.saturating_sub(LAG_FREE) * LAG_FACTOR
    }
}

/// So many members that came, came back or refuted an accusation within [`UNREST_SPAN`] are unrest, if they are one in
/// [`UNREST_SHARE`] of the living as well.
const UNREST_MIN: usize = 12;
const UNREST_SHARE: usize = 16;
pub(super) const UNREST_SPAN: Duration = Duration::from_secs(10);
/// How many times longer checks take in unrest.
const UNREST_STRETCH: u32 = 4;

/// How much has come and gone of late. While a mesh comes up everybody is busy with handshakes, and hosts that run many
/// agents have no time to answer; each false accusation costs every member a signature check and each refutation another
/// one, so that a mesh that doubts itself then is busy with nothing else. The local health sees only this node; many
/// newcomers, returns and refutations say that others are too slow as well. A member that crashes meanwhile is found some
/// seconds later. Each member counts once: one that raises its incarnation again and again makes nobody patient.
#[derive(Debug, Clone, Default)]
pub(super) struct Unrest {
    since: Option<Instant>,
    /// Who it was since then, at most as many as it takes.
    who: BTreeSet<NodeName>,
    until: Option<Instant>,
    /// Whom the peers that let this node in named and who has not come yet, and until when they are awaited.
    awaited: BTreeSet<NodeName>,
    awaited_until: Option<Instant>,
}

impl Unrest {
    /// None.
    #[cfg(test)]
    pub(super) const CALM: Self =
        Self { since: None, who: BTreeSet::new(), until: None, awaited: BTreeSet::new(), awaited_until: None };

    /// Notes that a peer knows `member` already: it is this node that comes, not the member. Of a mesh that starts all
    /// at once no peer knows more than a part.
    pub(super) fn expect(&mut self, member: NodeName, now: Instant) {
        self.awaited.insert(member);
        self.awaited_until = Some(now + UNREST_SPAN);
    }

    /// Notes that `member` came or came back; `living` members are there now.
    pub(super) fn came(&mut self, member: &NodeName, living: usize, now: Instant) {
        if self.awaited_until.is_some_and(|until| now >= until) {
            self.awaited.clear();
        }
        if !self.awaited.remove(member) {
            self.note(member, living, now);
        }
    }

    /// Notes that `member` came, came back or refuted an accusation; `living` members are there now.
    pub(super) fn note(&mut self, member: &NodeName, living: usize, now: Instant) {
        if self.since.is_none_or(|since| now >= since + UNREST_SPAN) {
            self.since = Some(now);
            self.who.clear();
        }
        let enough = UNREST_MIN.max(living / UNREST_SHARE);
        if self.who.len() < enough && !self.who.contains(member) {
            self.who.insert(member.clone());
        }
        if self.who.len() >= enough {
            self.until = Some(now + UNREST_SPAN);
        }
    }

    /// Stretches a timer.
    pub(super) fn stretch(&self, timer: Duration, now: Instant) -> Duration {
        if self.is_at(now) { timer * UNREST_STRETCH } else { timer }
    }

    /// Returns when something is over that began at `since` and takes `time` in calm: in unrest as many times longer as a
    /// check, and no longer than the unrest.
    pub(super) fn end_of(&self, since: Instant, time: Duration) -> Instant {
        let end = since + time;
        match self.until {
            Some(until) if end < until => (since + time * UNREST_STRETCH).min(until),
            _ => end,
        }
    }

    /// Whether it is restless at `now`.
    pub(super) fn is_at(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes the members `who`, each `apart` from the one before.
    fn crowd(unrest: &mut Unrest, who: std::ops::Range<u32>, living: usize, (begun, apart): (Instant, Duration)) {
        for (step, number) in (0..).zip(who) {
            unrest.note(&format!("n{number}").parse().unwrap(), living, begun + step * apart);
        }
    }

    #[test]
    fn many_newcomers_at_once_stretch_timers_for_a_while_and_a_few_or_slow_ones_do_not() {
        let (now, second) = (crate::clock::now(), Duration::from_secs(1));
        let at_once = (now, Duration::ZERO);
        let most = u32::try_from(UNREST_MIN).unwrap();
        let mut unrest = Unrest::default();
        crowd(&mut unrest, 1..most, 20, at_once);
        assert_eq!(unrest.stretch(second, now), second);
        unrest.note(&"last".parse().unwrap(), 20, now + second);
        assert_eq!(unrest.stretch(second, now + second), 4 * second);
        assert_eq!(unrest.stretch(second, now + 12 * second), second, "all are there");
        // One every two seconds, for minutes.
        // Whoever lets this node in knows them all, once.
        let mut unrest = Unrest::default();
        let all: Vec<NodeName> = (0..40).map(|number| format!("n{number}").parse().unwrap()).collect();
        let expect = |unrest: &mut Unrest| {
            for name in &all {
                unrest.expect(name.clone(), now);
            }
        };
        let came = |unrest: &mut Unrest, at: Instant| {
            for name in &all {
                unrest.came(name, 40, at);
            }
        };
        expect(&mut unrest);
        came(&mut unrest, now);
        assert_eq!(unrest.stretch(second, now), second);
        came(&mut unrest, now);
        assert_eq!(unrest.stretch(second, now), 4 * second, "they came again");
        let (mut unrest, later) = (Unrest::default(), now + UNREST_SPAN);
        expect(&mut unrest);
        came(&mut unrest, later);
        assert_eq!(unrest.stretch(second, later), 4 * second, "they were not there");

        let mut unrest = Unrest::default();
        crowd(&mut unrest, 0..100, 20, (now, 2 * second));
        assert_eq!(unrest.stretch(second, now + 198 * second), second);
        // Few of many.
        let mut unrest = Unrest::default();
        let share = u32::try_from(1000 / UNREST_SHARE).unwrap();
        crowd(&mut unrest, 1..share, 1000, at_once);
        assert_eq!(unrest.stretch(second, now), second);
        crowd(&mut unrest, share..share + 1, 1000, at_once);
        assert_eq!(unrest.stretch(second, now), 4 * second, "a sixteenth of all");
    }

    #[test]
    fn one_member_that_refutes_again_and_again_stretches_nothing() {
        let (now, second) = (crate::clock::now(), Duration::from_secs(1));
        let mut unrest = Unrest::default();
        for _ in 0..1000 {
            crowd(&mut unrest, 1..4, 20, (now, Duration::ZERO));
        }
        assert_eq!(unrest.stretch(second, now), second);
    }

    #[test]
    fn a_suspicion_lasts_longer_in_unrest_and_ends_with_it() {
        let (now, second) = (crate::clock::now(), Duration::from_secs(1));
        let mut unrest = Unrest::default();
        assert_eq!(unrest.end_of(now, second), now + second);
        crowd(&mut unrest, 0..12, 20, (now, Duration::ZERO));
        assert_eq!(unrest.end_of(now, second), now + 4 * second);
        assert_eq!(unrest.end_of(now, 3 * second), now + UNREST_SPAN);
        assert_eq!(unrest.end_of(now + 9 * second, second / 2), now + UNREST_SPAN);
        assert_eq!(unrest.end_of(now + 9 * second, 2 * second), now + 11 * second);
    }

    #[test]
    fn who_is_served_late_sends_less_often_and_one_pause_does_not_count() {
        let pause = Duration::from_millis(200);
        let mut lag = Lag::default();
        (0..50).for_each(|_| lag.note(Duration::from_millis(15)));
        assert_eq!(lag.lengthen(pause), pause, "a loaded machine");
        lag.note(Duration::from_secs(10));
        assert!(lag.lengthen(pause) < pause * 2, "SIGSTOP: {:?}", lag.lengthen(pause));
        (0..50).for_each(|_| lag.note(Duration::from_millis(120)));
        assert!(lag.lengthen(pause) > pause * 4, "{:?}", lag.lengthen(pause));
        (0..50).for_each(|_| lag.note(Duration::from_secs(1)));
        assert!(lag.lengthen(pause) < pause * 9, "{:?}", lag.lengthen(pause));
        (0..50).for_each(|_| lag.note(Duration::ZERO));
        assert_eq!(lag.lengthen(pause), pause);
    }

    #[test]
    fn timers_stretch_up_to_nine_times_and_recover_step_by_step() {
        let mut health = LocalHealth::default();
        let second = Duration::from_secs(1);
        assert_eq!(health.stretch(second), second);
        health.worsen(3);
        assert_eq!(health.stretch(second), 4 * second);
        health.worsen(200);
        assert_eq!(health.stretch(second), 9 * second);
        for _ in 0..20 {
            health.improve();
        }
        assert_eq!(health.score(), 0);
    }
}

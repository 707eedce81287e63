//! How well this node itself does: Lifeguard's local health multiplier (arXiv 1707.00788, section IV.A).
//!
//! A node that misses answers, whose helpers stay silent, that is suspected by others or wakes late is more likely slow
//! than the whole mesh is. It then waits longer before it says a word about anybody.

use std::time::Duration;

use tokio::time::Instant;

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

/// So many members that came, came back or refuted an accusation within [`UNREST_SPAN`] are unrest, if they are a tenth of the
/// living as well.
const UNREST_MIN: usize = 12;
pub(super) const UNREST_SPAN: Duration = Duration::from_secs(10);
/// How many times longer checks take in unrest.
const UNREST_STRETCH: u32 = 4;

/// How much has come and gone of late. While a mesh comes up everybody is busy with handshakes, and hosts that run many
/// agents have no time to answer; each false accusation costs every member a signature check and each refutation another
/// one, so that a mesh that doubts itself then is busy with nothing else. The local health sees only this node; many
/// newcomers, returns and refutations say that others are too slow as well. A member that crashes meanwhile is found some
/// seconds later.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unrest {
    since: Option<Instant>,
    count: usize,
    until: Option<Instant>,
}

impl Unrest {
    /// Notes a newcomer, a return or a refutation; `living` members are there now.
    pub(super) fn note(&mut self, living: usize, now: Instant) {
        if self.since.is_none_or(|since| now >= since + UNREST_SPAN) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count += 1;
        if self.count >= UNREST_MIN.max(living / 10) {
            self.until = Some(now + UNREST_SPAN);
        }
    }

    /// Stretches a timer.
    pub(super) fn stretch(self, timer: Duration, now: Instant) -> Duration {
        if self.is_at(now) { timer * UNREST_STRETCH } else { timer }
    }

    /// Whether it is restless at `now`.
    pub(super) fn is_at(self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_newcomers_at_once_stretch_timers_for_a_while_and_a_few_or_slow_ones_do_not() {
        let (now, second) = (crate::clock::now(), Duration::from_secs(1));
        let mut unrest = Unrest::default();
        (1..UNREST_MIN).for_each(|_| unrest.note(20, now));
        assert_eq!(unrest.stretch(second, now), second);
        unrest.note(20, now + second);
        assert_eq!(unrest.stretch(second, now + second), 4 * second);
        assert_eq!(unrest.stretch(second, now + 12 * second), second, "all are there");
        // One every two seconds, for minutes.
        let mut unrest = Unrest::default();
        (0..100).for_each(|step| unrest.note(20, now + step * 2 * second));
        assert_eq!(unrest.stretch(second, now + 198 * second), second);
        // Few of many.
        let mut unrest = Unrest::default();
        (0..50).for_each(|_| unrest.note(1000, now));
        assert_eq!(unrest.stretch(second, now), second);
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

//! A pace: some at once, then one in so much time. What is rare is not kept waiting, a storm is done in batches.
//!
//! The generic cell rate algorithm (ITU-T I.371): one instant says how much has been used.

use std::time::Duration;

use tokio::time::Instant;

/// How often something may be done.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Pace {
    every: Duration,
    /// How far ahead of the time it may be used.
    slack: Duration,
    /// When all of it is there again.
    whole_at: Instant,
}

impl Pace {
    /// Lets `burst` things be done at once (one at least), and one more after each `every`.
    pub(in super::super) fn new(burst: u32, every: Duration, now: Instant) -> Self {
        Self { every, slack: every * burst.saturating_sub(1), whole_at: now }
    }

    /// Takes the permission for one; false: not yet.
    pub(in super::super) fn take(&mut self, now: Instant) -> bool {
        if now < self.next_at() {
            return false;
        }
        self.spend(now);
        true
    }

    /// Takes one in any case: those to come wait for it.
    pub(in super::super) fn spend(&mut self, now: Instant) {
        self.whole_at = self.whole_at.max(now) + self.every;
    }

    /// Tells whether all of the burst is there.
    pub(in super::super) fn is_whole(&self, now: Instant) -> bool {
        self.whole_at <= now
    }

    /// When the next one may be done.
    pub(in super::super) fn next_at(&self) -> Instant {
        self.whole_at.checked_sub(self.slack).unwrap_or(self.whole_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_at_once_then_one_in_a_time_and_rest_brings_the_few_back() {
        let start = crate::clock::now() + Duration::from_mins(1);
        let at = |millis| start + Duration::from_millis(millis);
        let mut pace = Pace::new(3, Duration::from_millis(100), start);
        let taken = |pace: &mut Pace, now| (0..10).filter(|_| pace.take(now)).count();
        assert_eq!(taken(&mut pace, at(0)), 3);
        assert_eq!(pace.next_at(), at(100));
        assert_eq!([taken(&mut pace, at(99)), taken(&mut pace, at(100)), taken(&mut pace, at(250))], [0, 1, 1]);
        assert_eq!(taken(&mut pace, at(400)), 2, "one came back since, and one was left");
        assert_eq!(taken(&mut pace, at(5000)), 3, "never more than that");
    }
}

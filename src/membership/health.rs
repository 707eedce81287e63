//! How well this node itself does: Lifeguard's local health multiplier (arXiv 1707.00788, section IV.A).
//!
//! A node that misses answers, whose helpers stay silent, that is suspected by others or wakes late is more likely slow
//! than the whole mesh is. It then waits longer before it says a word about anybody.

use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::*;

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

//! Bounds what is logged of checks that change: a switch that takes a thousand checks down is a few lines and a count.

use crate::model::HealthStatus;

/// Changes between two counts that get a line each: what a person reads. The others are in the count.
pub(super) const LINES_MAX: usize = 10;

/// What was logged, and counted instead, since the last count.
#[derive(Debug, Default)]
pub(super) struct ChangeLog {
    lines: usize,
    more: Counts,
}

/// Changes without a line of their own, by the status that they led to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) passing: usize,
    pub(super) warning: usize,
    pub(super) critical: usize,
}

impl Counts {
    pub(super) fn all(self) -> usize {
        self.passing + self.warning + self.critical
    }
}

impl ChangeLog {
    /// Tells whether a change to `status` gets a line; if not, it is counted.
    pub(super) fn admit(&mut self, status: HealthStatus) -> bool {
        if self.lines < LINES_MAX {
            self.lines += 1;
            return true;
        }
        let count = match status {
            HealthStatus::Passing => &mut self.more.passing,
            HealthStatus::Warning => &mut self.more.warning,
            HealthStatus::Critical => &mut self.more.critical,
        };
        *count += 1;
        false
    }

    /// Ends the window; returns what was counted, if there was more than lines.
    pub(super) fn end(&mut self) -> Option<Counts> {
        let ended = std::mem::take(self);
        (ended.more != Counts::default()).then_some(ended.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_changes_get_a_line_and_all_others_one_count() {
        let mut log = ChangeLog::default();
        let lines = (0..1000).filter(|_| log.admit(HealthStatus::Critical)).count();
        assert_eq!(lines, LINES_MAX);
        assert!(!log.admit(HealthStatus::Passing));
        let counted = log.end().unwrap();
        assert_eq!((counted.critical, counted.passing, counted.all()), (1000 - LINES_MAX, 1, 1001 - LINES_MAX));
        assert_eq!(log.end(), None, "a new window begins");
        assert!(log.admit(HealthStatus::Warning));
        assert_eq!(log.end(), None);
    }
}

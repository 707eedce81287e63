//! The state of one check: thresholds, TTL, output. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::HealthStatus;
use crate::registry::{CheckDefinition, Probe};

/// What one run of a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: HealthStatus,
    pub(crate) output: String,
}

/// What an event changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    /// Nothing.
    None,
    /// The output alone.
    Output,
    /// The status.
    Status,
}

/// One check's status, driven by results and time.
#[derive(Debug)]
pub(crate) struct CheckState {
    success_before_passing: u32,
    failures_before_warning: u32,
    failures_before_critical: u32,
    output_bytes_max: usize,
    ttl: Option<Duration>,
    deregister_after: Option<Duration>,
    status: HealthStatus,
    output: String,
    successes: u32,
    failures: u32,
    expires: Option<Instant>,
    critical_since: Option<Instant>,
}

impl CheckState {
    /// Starts with the status that was `kept` from before, else with the definition's, and with the last output.
    pub(crate) fn new(
        definition: &CheckDefinition,
        kept: Option<HealthStatus>,
        mut output: String,
        now: Instant,
    ) -> Self {
        let ttl = match definition.probe {
            Probe::Ttl { ttl } => Some(ttl),
            _ => None,
        };
        let status = kept.unwrap_or(definition.initial);
        cut(&mut output, definition.output_bytes_max);
        Self {
            success_before_passing: definition.success_before_passing,
            failures_before_warning: definition.failures_before_warning,
            failures_before_critical: definition.failures_before_critical,
            output_bytes_max: definition.output_bytes_max,
            ttl,
            // A check of the node has no service to deregister.
            deregister_after: definition.service.as_ref().and(definition.deregister_critical_after),
            status,
            output,
            successes: 0,
            failures: 0,
            expires: ttl.map(|ttl| now + ttl),
            critical_since: (status == HealthStatus::Critical).then_some(now),
        }
    }

    pub(crate) fn status(&self) -> HealthStatus {
        self.status
    }

    pub(crate) fn output(&self) -> &str {
        &self.output
    }

    /// Takes the result of a run; the status follows once its threshold is reached, the output then with it.
    pub(crate) fn record(&mut self, outcome: Outcome, now: Instant) -> Change {
        let next = if outcome.status == HealthStatus::Critical {
            self.failures = self.failures.saturating_add(1);
            self.successes = 0;
            if self.failures >= self.failures_before_critical {
                HealthStatus::Critical
            } else if self.failures >= self.failures_before_warning {
                HealthStatus::Warning
            } else {
                return Change::None;
            }
        } else {
            self.successes = self.successes.saturating_add(1);
            self.failures = 0;
            if self.successes < self.success_before_passing {
                return Change::None;
            }
            outcome.status
        };
        self.set(next, outcome.output, now)
    }

    /// Takes the app's own word (TTL, maintenance): no thresholds, and the TTL begins again.
    pub(crate) fn refresh(&mut self, outcome: Outcome, now: Instant) -> Change {
        self.expires = self.ttl.map(|ttl| now + ttl);
        self.set(outcome.status, outcome.output, now)
    }

    /// Applies what is due: an expired TTL makes the check critical.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Change {
        let (Some(expires), Some(ttl)) = (self.expires, self.ttl) else { return Change::None };
        if now < expires {
            return Change::None;
        }
        self.expires = None;
        let last = std::mem::take(&mut self.output);
        let after = if last.is_empty() { String::new() } else { format!("; the last output was: {last}") };
        self.set(HealthStatus::Critical, format!("TTL of {ttl:?} expired{after}"), now)
    }

    /// Returns when `handle_timeout` or `deregister_due` has something to do.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        [self.expires, self.deregister_at()].into_iter().flatten().min()
    }

    /// Tells whether the check has been critical for so long that its service is to go.
    pub(crate) fn deregister_due(&self, now: Instant) -> bool {
        self.deregister_at().is_some_and(|at| now >= at)
    }

    /// Counts the critical time anew: the deregistration failed and is tried again later.
    pub(crate) fn postpone_deregistration(&mut self, now: Instant) {
        if self.critical_since.is_some() {
            self.critical_since = Some(now);
        }
    }

    fn deregister_at(&self) -> Option<Instant> {
        Some(self.critical_since? + self.deregister_after?)
    }

    fn set(&mut self, status: HealthStatus, mut output: String, now: Instant) -> Change {
        cut(&mut output, self.output_bytes_max);
        let change = match (status == self.status, output == self.output) {
            (true, true) => Change::None,
            (true, false) => Change::Output,
            (false, _) => Change::Status,
        };
        match status {
            HealthStatus::Critical => {
                self.critical_since.get_or_insert(now);
            }
            _ => self.critical_since = None,
        }
        self.status = status;
        self.output = output;
        change
    }
}

/// Cuts `text` to at most `bytes_max` bytes, between two characters.
pub(super) fn cut(text: &mut String, bytes_max: usize) {
    text.truncate(text.floor_char_boundary(bytes_max));
}

#[cfg(test)]
mod tests {
    use HealthStatus::{Critical, Passing, Warning};

    use super::*;
    use crate::registry::testing;

    fn outcome(status: HealthStatus, output: &str) -> Outcome {
        Outcome { status, output: output.to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn thresholds_hold_a_status_back() {
        #[track_caller]
        fn check(thresholds: [u32; 3], results: &[HealthStatus], want: &[HealthStatus]) {
            let mut definition = testing::ttl_check("c", None, 10);
            [
                definition.success_before_passing,
                definition.failures_before_warning,
                definition.failures_before_critical,
            ] = thresholds;
            let now = crate::clock::now();
            let mut state = CheckState::new(&definition, None, String::new(), now);
            let mut got = Vec::new();
            for status in results {
                state.record(outcome(*status, ""), now);
                got.push(state.status());
            }
            assert_eq!(got, want, "{thresholds:?} {results:?}");
        }
        check([0, 0, 0], &[Passing, Critical, Warning], &[Passing, Critical, Warning]);
        check([3, 0, 0], &[Passing, Passing, Passing], &[Critical, Critical, Passing]);
        check([2, 0, 0], &[Passing, Critical, Passing, Passing], &[Critical, Critical, Critical, Passing]);
        check([2, 0, 0], &[Passing, Warning], &[Critical, Warning]);
        check([0, 1, 3], &[Passing, Critical, Critical, Critical], &[Passing, Warning, Warning, Critical]);
        check([0, 2, 2], &[Passing, Critical, Critical], &[Passing, Passing, Critical]);
        check([0, 2, 2], &[Passing, Critical, Passing, Critical], &[Passing, Passing, Passing, Passing]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ttl_that_runs_out_is_critical_and_keeps_the_last_word() {
        let start = crate::clock::now();
        let mut state = CheckState::new(&testing::ttl_check("c", None, 10), None, String::new(), start);
        assert_eq!(state.refresh(outcome(Passing, "fine"), start), Change::Status);
        assert_eq!(state.refresh(outcome(Passing, "fine"), start), Change::None);
        assert_eq!(state.poll_timeout(), Some(start + Duration::from_secs(10)));
        // Each word begins the time again.
        assert_eq!(state.refresh(outcome(Passing, "good"), start + Duration::from_secs(4)), Change::Output);
        assert_eq!(state.poll_timeout(), Some(start + Duration::from_secs(14)));
        assert_eq!(state.handle_timeout(start + Duration::from_millis(13_999)), Change::None);
        assert_eq!(state.handle_timeout(start + Duration::from_secs(14)), Change::Status);
        assert_eq!((state.status(), state.output()), (Critical, "TTL of 10s expired; the last output was: good"));
        assert_eq!(state.poll_timeout(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn output_is_cut_between_characters() {
        let mut definition = testing::ttl_check("c", None, 10);
        definition.output_bytes_max = 5;
        let now = crate::clock::now();
        let mut state = CheckState::new(&definition, None, String::new(), now);
        state.refresh(outcome(Passing, "ääää"), now);
        assert_eq!(state.output(), "ää");
    }

    #[tokio::test(start_paused = true)]
    async fn only_unbroken_critical_time_counts_towards_deregistration() {
        let start = crate::clock::now();
        let minute = Duration::from_mins(1);
        let mut definition = testing::ttl_check("c", Some("web"), 3600);
        definition.deregister_critical_after = Some(minute);
        let mut state = CheckState::new(&definition, None, String::new(), start);
        assert!(!state.deregister_due(start + minute / 2) && state.deregister_due(start + minute));
        state.refresh(outcome(Passing, ""), start + minute / 2);
        assert!(!state.deregister_due(start + minute * 9));
        state.refresh(outcome(Critical, ""), start + minute);
        assert!(!state.deregister_due(start + minute * 3 / 2) && state.deregister_due(start + minute * 2));
    }
}

//! Leaves out, for a short and growing time, the instances whose connect just failed.

use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use crate::model::{Instance, InstanceId, NodeName};

/// How long an instance is left out after its first failure: by then the membership or a check has usually seen it.
pub const BACKOFF_START: Duration = Duration::from_secs(1);
/// The longest time that an instance is left out; each failure in a row doubles the time up to this.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Most instances remembered; beyond it the one that comes back first is forgotten.
pub const BACKOFF_INSTANCES_MAX: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Failure {
    in_a_row: u32,
    until: Instant,
}

/// Remembers which instances could not be connected to. One per worker.
#[derive(Debug, Default)]
pub struct ConnectBackoff {
    failures: HashMap<(NodeName, InstanceId), Failure>,
}

impl ConnectBackoff {
    /// Starts with no failures.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that connecting to `instance` failed at `now` and returns for how long it is left out.
    pub fn failed(&mut self, instance: &Instance, now: Instant) -> Duration {
        let key = key(instance);
        if self.failures.len() >= BACKOFF_INSTANCES_MAX && !self.failures.contains_key(&key) {
            self.make_room(now);
        }
        let failure = self.failures.entry(key).or_insert(Failure { in_a_row: 0, until: now });
        // Failures of attempts that ran side by side count once.
        if failure.in_a_row == 0 || failure.until <= now {
            let is_forgotten = now.saturating_duration_since(failure.until) > BACKOFF_MAX;
            failure.in_a_row = if is_forgotten { 1 } else { failure.in_a_row.saturating_add(1) };
            failure.until = now + delay(failure.in_a_row);
        }
        failure.until.saturating_duration_since(now)
    }

    /// Notes that connecting to `instance` worked: it counts as new.
    pub fn succeeded(&mut self, instance: &Instance) {
        if !self.failures.is_empty() {
            self.failures.remove(&key(instance));
        }
    }

    /// Tells whether `instance` is to be left out at `now`.
    pub fn is_avoided(&self, instance: &Instance, now: Instant) -> bool {
        // No failures is the common case: it costs nothing.
        !self.failures.is_empty() && self.failures.get(&key(instance)).is_some_and(|failure| failure.until > now)
    }

    /// Drops what is long over; if that is nothing, the failure that is over first.
    fn make_room(&mut self, now: Instant) {
        self.failures.retain(|_, failure| failure.until + BACKOFF_MAX > now);
        if self.failures.len() >= BACKOFF_INSTANCES_MAX {
            let first = self.failures.iter().min_by_key(|(_, failure)| failure.until).map(|(key, _)| key.clone());
            if let Some(first) = first {
                self.failures.remove(&first);
            }
        }
    }
}

/// Names an instance; two shared pointers, nothing is copied.
fn key(instance: &Instance) -> (NodeName, InstanceId) {
    (instance.node.info.name.clone(), instance.record.id.clone())
}

fn delay(in_a_row: u32) -> Duration {
    let doublings = in_a_row.saturating_sub(1).min(16);
    BACKOFF_START.saturating_mul(1 << doublings).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{instance, now};
    use super::*;
    use crate::model::HealthStatus;

    #[test]
    fn each_failure_in_a_row_doubles_the_time_up_to_the_bound() {
        let mut backoff = ConnectBackoff::new();
        let bad = instance("a", HealthStatus::Passing, 1);
        let mut now = now();
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let pause = backoff.failed(&bad, now);
            assert_eq!(pause, Duration::from_secs(seconds));
            assert!(backoff.is_avoided(&bad, now + pause - Duration::from_millis(1)));
            now += pause;
            assert!(!backoff.is_avoided(&bad, now));
        }
    }

    #[test]
    fn failures_side_by_side_count_once_and_a_success_or_a_long_quiet_forgets() {
        let mut backoff = ConnectBackoff::new();
        let bad = instance("a", HealthStatus::Passing, 1);
        let start = now();
        assert_eq!(backoff.failed(&bad, start), BACKOFF_START);
        assert_eq!(backoff.failed(&bad, start), BACKOFF_START);
        backoff.succeeded(&bad);
        assert!(!backoff.is_avoided(&bad, start));
        backoff.failed(&bad, start);
        assert_eq!(backoff.failed(&bad, start + BACKOFF_START), BACKOFF_START * 2);
        assert_eq!(backoff.failed(&bad, start + BACKOFF_MAX * 3), BACKOFF_START);
    }

    #[test]
    fn memory_is_bounded_and_the_one_that_comes_back_first_is_forgotten() {
        let mut backoff = ConnectBackoff::new();
        let start = now();
        let many: Vec<_> =
            (0..=BACKOFF_INSTANCES_MAX).map(|at| instance(&format!("n{at}"), HealthStatus::Passing, 1)).collect();
        for (at, bad) in (0u32..).zip(&many) {
            backoff.failed(bad, start + Duration::from_micros(1) * at);
        }
        assert_eq!(backoff.failures.len(), BACKOFF_INSTANCES_MAX);
        let end = start + Duration::from_millis(10);
        assert!(!backoff.is_avoided(&many[0], end));
        assert!(backoff.is_avoided(&many[1], end) && backoff.is_avoided(&many[BACKOFF_INSTANCES_MAX], end));
    }
}

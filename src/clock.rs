//! The one place that reads the clocks.
//!
//! Timers use the monotonic clock (`tokio::time::Instant`, paused in tests); certificate validity and leases use wall
//! time. Pure cores take both as arguments.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Wall time, in whole seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct UnixSeconds(pub u64);

impl UnixSeconds {
    /// Returns this time later by `by`, whole seconds, saturating.
    #[must_use]
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by.as_secs()))
    }

    /// Returns this time earlier by `by`, whole seconds, saturating at the epoch.
    #[must_use]
    pub fn minus(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(by.as_secs()))
    }

    /// Returns how far `self` lies after `earlier`; zero if it does not.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }
}

/// Reads the wall clock.
#[expect(clippy::disallowed_methods, reason = "the home of the clock")]
pub fn wall() -> UnixSeconds {
    UnixSeconds(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Reads the wall clock, in milliseconds since the Unix epoch.
#[expect(clippy::disallowed_methods, reason = "the home of the clock")]
pub fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Reads the wall clock, in nanoseconds since the Unix epoch.
#[expect(clippy::disallowed_methods, reason = "the home of the clock")]
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Reads how long this thread has worked; what a busy host did meanwhile is not counted.
pub fn thread_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Reads the monotonic clock: tokio's, so that tests can pause it.
pub fn now() -> tokio::time::Instant {
    tokio::time::Instant::now()
}

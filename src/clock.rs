//! The one place that reads the clocks.
//!
//! Timers use the monotonic clock (`tokio::time::Instant`, paused in tests); certificate validity and leases use wall
//! time. Pure cores take both as arguments.
//!
//! ```text
//!   system's clock ---------------------------> max -> wall, wall_ms, wall_ns
//!   floor: kept from the last run, goes on       ^
//!          with the monotonic clock -------------'    hold (at a start), let_go (nobody answers at that time)
//! ```
//!
//! The floor belongs to the process, as its clock does: nodes that share one share it. There is none unless a node found at
//! its start that the host's clock is behind the time that it last ran at (`node::kept_clock`).

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The most by which a kept time may be ahead of the system's clock and be believed: a host that takes its hardware clock
/// for another zone's is off by up to 14 h. A node's certificate has days left at any time, so nothing that is on disk ends by it.
pub const HELD_AHEAD_MAX: Duration = Duration::from_hours(24);

/// What the wall clock said at least when [`BASE`] was taken, in milliseconds since the Unix epoch; zero: there is no floor.
static FLOOR_MS: AtomicU64 = AtomicU64::new(0);
#[expect(clippy::disallowed_methods, reason = "the home of the clock; tokio's stands still in tests")]
static BASE: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);

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

/// How a time that was kept from an earlier run stands to the system's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The clock has gone on since.
    Past,
    /// The clock went back by so much: what was kept holds.
    Ahead(Duration),
    /// It is ahead by more than [`HELD_AHEAD_MAX`]: one of the two is far off, and the system's clock is believed.
    TooFar(Duration),
}

/// Judges a `kept` time by what the `system`'s clock says.
#[must_use]
pub fn judge(kept: UnixSeconds, system: UnixSeconds) -> Kept {
    match kept.since(system) {
        Duration::ZERO => Kept::Past,
        ahead if ahead <= HELD_AHEAD_MAX => Kept::Ahead(ahead),
        ahead => Kept::TooFar(ahead),
    }
}

/// Lets the wall clock of this process not go below `kept`, plus what passes from here on, if that is believable ([`judge`]).
pub fn hold(kept: UnixSeconds) -> Kept {
    let verdict = judge(kept, UnixSeconds(system().as_secs()));
    if let Kept::Ahead(_) = verdict {
        FLOOR_MS.fetch_max(floor_at_base(kept, BASE.elapsed()), Ordering::Relaxed);
    }
    verdict
}

/// Goes by the system's clock again.
pub fn let_go() {
    FLOOR_MS.store(0, Ordering::Relaxed);
}

/// Returns by how much [`wall`] is held ahead of the system's clock; zero if it is not.
pub fn held_ahead() -> Duration {
    floor().saturating_sub(system())
}

/// What is kept as of [`BASE`], of a time that counts `since` after it.
fn floor_at_base(kept: UnixSeconds, since: Duration) -> u64 {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    millis(Duration::from_secs(kept.0).saturating_sub(since))
}

fn floor() -> Duration {
    match FLOOR_MS.load(Ordering::Relaxed) {
        0 => Duration::ZERO,
        at_base_ms => Duration::from_millis(at_base_ms).saturating_add(BASE.elapsed()),
    }
}

#[expect(clippy::disallowed_methods, reason = "the home of the clock")]
fn system() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Reads the wall clock.
pub fn wall() -> UnixSeconds {
    UnixSeconds(system().max(floor()).as_secs())
}

/// Reads the wall clock as of the kernel's last tick: up to 10 ms late, and a fifth of the work. For what is asked with
/// every request.
pub fn wall_at_tick() -> UnixSeconds {
    use nix::time::{ClockId, clock_gettime};
    let tick = clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_or_else(|_| system(), Duration::from);
    UnixSeconds(tick.max(floor()).as_secs())
}

/// Reads the wall clock, in milliseconds since the Unix epoch.
pub fn wall_ms() -> u64 {
    u64::try_from(system().max(floor()).as_millis()).unwrap_or(u64::MAX)
}

/// Reads the wall clock, in nanoseconds since the Unix epoch.
pub fn wall_ns() -> u64 {
    u64::try_from(system().max(floor()).as_nanos()).unwrap_or(u64::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_time_holds_where_the_clock_went_back_by_a_day_at_most() {
        let kept = UnixSeconds(1_800_000_000);
        let hours = |count: u64| Duration::from_secs(count * 3600);
        for (system, verdict) in [
            (kept.plus(hours(1)), Kept::Past),
            (kept, Kept::Past),
            (kept.minus(hours(1)), Kept::Ahead(hours(1))),
            (kept.minus(hours(24)), Kept::Ahead(hours(24))),
            (kept.minus(hours(25)), Kept::TooFar(hours(25))),
            (UnixSeconds(0), Kept::TooFar(Duration::from_secs(kept.0))),
        ] {
            assert_eq!(judge(kept, system), verdict, "{system:?}");
        }
    }

    #[test]
    fn the_time_of_the_last_tick_is_that_of_the_wall() {
        let before = wall();
        let tick = wall_at_tick();
        // A tick before `before` may be of the second before it.
        assert!(before.minus(Duration::from_secs(1)) <= tick && tick <= wall(), "{tick:?} after {before:?}");
    }

    #[test]
    fn a_floor_goes_on_with_the_time_that_passes() {
        let kept = UnixSeconds(1_800_000_000);
        let at_base = floor_at_base(kept, Duration::from_millis(1500));
        assert_eq!(at_base, 1_800_000_000_000 - 1500, "1.5 s after the base it is what was kept");
        assert_eq!(floor_at_base(UnixSeconds(1), Duration::from_secs(5)), 0);
    }
}

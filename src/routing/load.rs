//! How long an instance takes to answer: Finagle's peak EWMA.
//!
//! A sample above the estimate is believed at once; below it the estimate falls with time, to half in seven seconds, also
//! without samples: an instance that was slow is tried again some day.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// After this long a sample counts 1/e (linkerd's default).
pub const DECAY: Duration = Duration::from_secs(10);
/// What a failed call counts as at least: failing fast attracts no calls (linkerd's default).
pub const PENALTY: Duration = Duration::from_secs(5);

/// One estimate, in nanoseconds.
#[derive(Debug)]
pub(super) struct PeakEwma {
    nanos: Cell<f64>,
    at: Cell<Option<Instant>>,
}

impl PeakEwma {
    pub(super) fn new() -> Self {
        Self { nanos: Cell::new(0.0), at: Cell::new(None) }
    }

    /// Takes a sample in.
    pub(super) fn observe(&self, sample: Duration, now: Instant) {
        let sample = sample.as_secs_f64() * 1e9;
        let next = match self.at.get() {
            Some(at) if sample < self.nanos.get() => {
                let kept = kept(now.saturating_duration_since(at));
                self.nanos.get() * kept + sample * (1.0 - kept)
            }
            _ => sample,
        };
        self.nanos.set(next);
        self.at.set(Some(now));
    }

    /// Takes in that an answer would have taken longer than `took`: the estimate may rise by it, and does not fall.
    pub(super) fn at_least(&self, took: Duration, now: Instant) {
        if took.as_secs_f64() * 1e9 > self.estimate(0.0, now) {
            self.observe(took, now);
        }
    }

    /// Returns the estimate at `now`; `unknown` before the first sample.
    pub(super) fn estimate(&self, unknown: f64, now: Instant) -> f64 {
        match self.at.get() {
            Some(at) => self.nanos.get() * kept(now.saturating_duration_since(at)),
            None => unknown,
        }
    }

    /// Returns the estimate, if there was a sample.
    pub(super) fn shown(&self, now: Instant) -> Option<Duration> {
        self.at.get().map(|_| Duration::from_secs_f64(self.estimate(0.0, now).max(0.0) / 1e9))
    }
}

/// How much of an estimate is left after `age`.
fn kept(age: Duration) -> f64 {
    // Most samples are microseconds apart: there exp(-x) is 1 - x.
    let x = age.as_secs_f64() / DECAY.as_secs_f64();
    if x < 1e-4 { 1.0 - x } else { (-x).exp() }
}

//! How many calls an instance bears at once, found out from its answers: a gradient controller, as Envoy's adaptive
//! concurrency filter has it.
//!
//! ```text
//!   measure: at most 3 at once, 50 answers -> the time without a queue
//!   then, every 100 ms: gradient = 1.25 x time without a queue / time now   (0.5 to 1)
//!                       limit    = limit x gradient + sqrt(limit)            measured anew every minute
//! ```
//!
//! While answers take no longer than without a queue the limit grows by its square root, room for a burst; once calls queue
//! up, it falls. What is over it goes to another instance, or is refused at once: a call that waits until its caller has
//! given up costs as much as one that is answered in time.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Calls at once while the time without a queue is measured (Envoy's default).
const MEASURE_LIMIT: u32 = 3;
/// Answers that the measurement takes (Envoy's default).
const MEASURE_ANSWERS: u32 = 50;
/// How often it is measured anew (Envoy's default).
const MEASURE_EVERY: Duration = Duration::from_mins(1);
/// How often the limit is set (Envoy's default).
const WINDOW: Duration = Duration::from_millis(100);
/// Answers may take this much longer than without a queue (Envoy's default).
const TOLERANCE: f64 = 1.25;
/// Bounds of the limit: no instance is shut off, and none gets what a worker cannot hold.
const LIMIT_MIN: f64 = 1.0;
const LIMIT_MAX: f64 = 10_000.0;

/// One instance's limit.
#[derive(Debug)]
pub(super) struct Gradient {
    limit: Cell<f64>,
    /// In seconds; none: being measured.
    unqueued: Cell<Option<f64>>,
    /// When the window, or what was measured, ends.
    window_end: Cell<Option<Instant>>,
    measured_end: Cell<Option<Instant>>,
    /// Of the window, or of the measurement.
    answers: Cell<u32>,
    seconds: Cell<f64>,
}

impl Gradient {
    pub(super) fn new() -> Self {
        Self {
            limit: Cell::new(f64::from(MEASURE_LIMIT)),
            unqueued: Cell::new(None),
            window_end: Cell::new(None),
            measured_end: Cell::new(None),
            answers: Cell::new(0),
            seconds: Cell::new(0.0),
        }
    }

    /// Returns how many calls may be under way.
    pub(super) fn limit(&self) -> u32 {
        if self.unqueued.get().is_none() {
            return MEASURE_LIMIT;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between the bounds")]
        let limit = self.limit.get() as u32;
        limit
    }

    /// Takes in that an answer took `took`.
    pub(super) fn observe(&self, took: Duration, now: Instant) {
        self.answers.set(self.answers.get().saturating_add(1));
        self.seconds.set(self.seconds.get() + took.as_secs_f64());
        let Some(unqueued) = self.unqueued.get() else {
            if self.answers.get() >= MEASURE_ANSWERS {
                self.unqueued.set(Some(self.mean()));
                self.measured_end.set(Some(now + MEASURE_EVERY));
                self.begin(now);
            }
            return;
        };
        if self.window_end.get().is_some_and(|end| now < end) {
            return;
        }
        // No answer takes no time.
        let gradient = (unqueued * TOLERANCE / self.mean().max(1e-9)).clamp(0.5, 1.0);
        let limit = self.limit.get();
        self.limit.set((limit * gradient + limit.sqrt()).clamp(LIMIT_MIN, LIMIT_MAX));
        self.begin(now);
        if self.measured_end.get().is_some_and(|end| now >= end) {
            self.unqueued.set(None);
        }
    }

    fn begin(&self, now: Instant) {
        self.window_end.set(Some(now + WINDOW));
        self.answers.set(0);
        self.seconds.set(0.0);
    }

    fn mean(&self) -> f64 {
        self.seconds.get() / f64::from(self.answers.get().max(1))
    }
}

//! What one worker knows of an instance: what is under way there, how long it takes, whether it fails.
//!
//! ```text
//!   Closed --failures in a row, or a success rate far below the others'--> Open --its time is over--> one real request
//!     ^                                                                     ^                            (HalfOpen)
//!     `--------------------------- it succeeds ------------------------------`-- it fails: for longer -------'
//! ```

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::gradient::Gradient;
use super::load::{PENALTY, PeakEwma};
use super::queue::Queue;
use super::usage::{Limited, Usage};
use crate::model::{InstanceId, NodeName, ServiceName};
use crate::upstream::{Ejection, Guard};

/// Ejections that wait to be told; those beyond are not told.
pub const NOTICES_MAX: usize = 256;

/// How a call ended, as far as it says something of the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered; not by a server error.
    Success,
    /// A server error of the app's own: 500 and the like.
    ServerError,
    /// No answer, or 502, 503, 504: the app, or what stands before it, does not work.
    GatewayFailure,
    /// Turned away by a limit (429, a limit of weft's own): no failure, and nothing that attracts calls.
    Rejected,
}

impl Outcome {
    /// Judges an HTTP status.
    pub fn of_status(status: u16) -> Self {
        match status {
            429 => Self::Rejected,
            502..=504 => Self::GatewayFailure,
            500..=599 => Self::ServerError,
            _ => Self::Success,
        }
    }

    /// Judges a gRPC status (by the HTTP status that gRPC's own mapping gives).
    pub fn of_grpc(code: u8) -> Self {
        match code {
            // RESOURCE_EXHAUSTED
            8 => Self::Rejected,
            // DEADLINE_EXCEEDED, UNAVAILABLE
            4 | 14 => Self::GatewayFailure,
            // UNKNOWN, INTERNAL, DATA_LOSS
            2 | 13 | 15 => Self::ServerError,
            _ => Self::Success,
        }
    }
}

/// Whether an instance takes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It does.
    Closed,
    /// It does not, until then.
    Open {
        /// When one request may try it.
        until: Instant,
    },
    /// One request tries it.
    HalfOpen {
        /// When its time was over.
        until: Instant,
    },
}

/// An instance that was taken out of the rotation, or came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The service.
    pub service: ServiceName,
    /// Where it runs.
    pub node: NodeName,
    /// Which one.
    pub instance: InstanceId,
    /// Until when it is out; none: it is back.
    pub until: Option<Instant>,
    /// What ejected it.
    pub cause: Cause,
}

/// What ejects an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Failures in a row.
    Consecutive,
    /// Its success rate.
    SuccessRate,
    /// The request that tried it failed.
    Trial,
}

impl Cause {
    /// Returns the metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive => "consecutive",
            Self::SuccessRate => "success_rate",
            Self::Trial => "trial",
        }
    }
}

/// What a worker knows of an instance.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) node: NodeName,
    pub(super) id: InstanceId,
    pub(super) pending: Cell<u32>,
    pub(super) delay: PeakEwma,
    pub(super) gradient: Gradient,
    /// Since when it may take calls; none: since the beginning.
    pub(super) came: Cell<Option<Instant>>,
    /// The catalogue lets it take calls.
    is_fit: Cell<bool>,
    pub(super) standing: Cell<Standing>,
    in_a_row: Cell<u32>,
    ejections: Cell<u32>,
    /// Of this interval.
    succeeded: Cell<u32>,
    failed: Cell<u32>,
}

impl Seat {
    pub(super) fn new(node: NodeName, id: InstanceId) -> Self {
        Self {
            node,
            id,
            pending: Cell::new(0),
            delay: PeakEwma::new(),
            gradient: Gradient::new(),
            came: Cell::new(None),
            is_fit: Cell::new(false),
            standing: Cell::new(Standing::Closed),
            in_a_row: Cell::new(0),
            ejections: Cell::new(0),
            succeeded: Cell::new(0),
            failed: Cell::new(0),
        }
    }

    pub(super) fn is_out(&self) -> bool {
        self.standing.get() != Standing::Closed
    }

    /// Notes whether the catalogue lets it take calls, which it does from `now` on where it did not before; none: since the
    /// beginning. An ejection changes nothing of it.
    pub(super) fn set_fit(&self, is_fit: bool, now: Option<Instant>) {
        if !self.is_fit.replace(is_fit) && is_fit {
            self.came.set(now);
        }
    }

    /// Ends `passed` intervals and begins the next one. Returns how many requests succeeded and failed in them.
    pub(super) fn close_intervals(&self, passed: u32) -> (u32, u32) {
        // An interval without an ejection makes the next one shorter (Envoy's rule).
        if !self.is_out() {
            self.ejections.set(self.ejections.get().saturating_sub(passed));
        }
        (self.succeeded.replace(0), self.failed.replace(0))
    }
}

/// What the seats of one pair of services share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) service: ServiceName,
    pub(super) guard: RefCell<Arc<Guard>>,
    pub(super) usage: Arc<Usage>,
    /// Who waits for an instance.
    pub(super) queue: RefCell<Queue>,
    /// Instances that the catalogue lets take calls, and how many of them are out.
    pub(super) fit: Cell<usize>,
    pub(super) out: Cell<usize>,
    /// The rotation has to be made anew.
    pub(super) is_stale: Cell<bool>,
    /// When the first of those that are out may be tried.
    pub(super) due: Cell<Option<Instant>>,
    /// What an answer takes, in nanoseconds; 0: not known.
    pub(super) typical: Cell<f64>,
    pub(super) notices: Rc<RefCell<Vec<Notice>>>,
}

impl Common {
    /// Takes `seat` out of the rotation, unless too many are out.
    pub(super) fn eject(&self, seat: &Seat, cause: Cause, now: Instant) {
        let guard = Arc::clone(&self.guard.borrow());
        let Ejection { percent_max, base, longest, .. } = guard.ejection;
        let most = self.fit.get().saturating_mul(percent_max as usize).checked_div(100).unwrap_or(0).max(1);
        let is_new = !seat.is_out();
        if percent_max == 0 || (is_new && self.out.get() >= most) {
            return;
        }
        let ejections = seat.ejections.get().saturating_add(1);
        let until = now + base.saturating_mul(ejections).min(longest);
        seat.ejections.set(ejections);
        seat.in_a_row.set(0);
        seat.standing.set(Standing::Open { until });
        if is_new {
            self.out.set(self.out.get().saturating_add(1));
        }
        self.due.set(Some(self.due.get().map_or(until, |due| due.min(until))));
        self.is_stale.set(true);
        self.tell(seat, Some(until), cause);
    }

    /// Counts a call as waiting; none: too many wait.
    pub(super) fn wait(&self) -> Option<Waiting> {
        let most = self.guard.borrow().limits.pending;
        self.usage.take(Limited::Pending, most).then(|| Waiting(Arc::clone(&self.usage)))
    }

    fn readmit(&self, seat: &Seat) {
        seat.standing.set(Standing::Closed);
        seat.in_a_row.set(0);
        self.out.set(self.out.get().saturating_sub(1));
        self.is_stale.set(true);
        self.tell(seat, None, Cause::Trial);
    }

    fn tell(&self, seat: &Seat, until: Option<Instant>, cause: Cause) {
        let mut notices = self.notices.borrow_mut();
        if notices.len() < NOTICES_MAX {
            let (service, node, instance) = (self.service.clone(), seat.node.clone(), seat.id.clone());
            notices.push(Notice { service, node, instance, until, cause });
        }
    }
}

/// Tells an instance's worker how a call ended. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Observer {
    pub(super) seat: Rc<Seat>,
    pub(super) common: Rc<Common>,
    pub(super) is_trial: bool,
}

impl Observer {
    /// Notes that the call ended with `outcome` after `took`.
    pub fn observe(&self, outcome: Outcome, took: Duration, now: Instant) {
        if outcome == Outcome::Success {
            self.time(took, now);
        } else {
            self.seat.delay.observe(took.max(PENALTY), now);
        }
        self.judge(outcome, now);
    }

    /// Notes how long an answer took to begin; whether it is a good one is not known yet.
    pub fn time(&self, took: Duration, now: Instant) {
        self.seat.delay.observe(took, now);
        if self.common.guard.borrow().limits.is_adaptive {
            self.seat.gradient.observe(took, now);
        }
        let (typical, took) = (self.common.typical.get(), took.as_secs_f64() * 1e9);
        self.common.typical.set(if typical == 0.0 { took } else { typical.mul_add(0.95, took * 0.05) });
    }

    /// Notes that nobody waits for the answer any longer, after `took`: it would have taken more.
    pub fn given_up(&self, took: Duration, now: Instant) {
        self.seat.delay.at_least(took, now);
    }

    /// Notes how a call ended whose time was noted before: gRPC says so after its last message.
    pub fn judge(&self, outcome: Outcome, now: Instant) {
        let (seat, common) = (&self.seat, &self.common);
        let (limit, counts_every_5xx) = {
            let guard = common.guard.borrow();
            (guard.ejection.consecutive, guard.ejection.counts_every_5xx)
        };
        let has_failed = match outcome {
            Outcome::Rejected => return,
            Outcome::Success => false,
            Outcome::ServerError => counts_every_5xx,
            Outcome::GatewayFailure => true,
        };
        let count = if has_failed { &seat.failed } else { &seat.succeeded };
        count.set(count.get().saturating_add(1));
        match (seat.standing.get(), has_failed) {
            (Standing::HalfOpen { .. }, true) if self.is_trial => common.eject(seat, Cause::Trial, now),
            (Standing::HalfOpen { .. }, false) if self.is_trial => common.readmit(seat),
            (Standing::Closed, true) => {
                seat.in_a_row.set(seat.in_a_row.get().saturating_add(1));
                if limit > 0 && seat.in_a_row.get() >= limit {
                    common.eject(seat, Cause::Consecutive, now);
                }
            }
            (Standing::Closed, false) => seat.in_a_row.set(0),
            // Calls from before the ejection, or while there are too few instances to leave any out.
            (Standing::Open { .. } | Standing::HalfOpen { .. }, _) => {}
        }
    }

    /// Asks for leave to repeat the request elsewhere; none: too many are being repeated.
    pub fn retry(&self) -> Option<Retry> {
        let most = self.common.guard.borrow().limits.retries;
        self.common.usage.take(Limited::Retries, most).then(|| Retry(Arc::clone(&self.common.usage)))
    }
}

/// A request that is repeated, while this lives.
#[derive(Debug)]
pub struct Retry(Arc<Usage>);

impl Drop for Retry {
    fn drop(&mut self) {
        self.0.give(Limited::Retries);
    }
}

/// Whether a call is a request or a connection of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// A request.
    Request,
    /// A connection.
    Connection,
}

impl Flow {
    pub(super) fn limited(self) -> Limited {
        match self {
            Self::Request => Limited::Requests,
            Self::Connection => Limited::Connections,
        }
    }
}

/// A call that is under way at an instance, while this lives.
#[derive(Debug)]
pub struct Load {
    observer: Observer,
    flow: Flow,
}

impl Load {
    pub(super) fn new(observer: Observer, flow: Flow) -> Self {
        let pending = &observer.seat.pending;
        pending.set(pending.get().saturating_add(1));
        Self { observer, flow }
    }

    /// Returns what takes notes of the call.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Counts the call as waiting for its stream; none: too many wait.
    pub fn wait(&self) -> Option<Waiting> {
        self.observer.common.wait()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let Observer { seat, common, is_trial } = &self.observer;
        seat.pending.set(seat.pending.get().saturating_sub(1));
        common.usage.give(self.flow.limited());
        if let (Standing::HalfOpen { until }, true) = (seat.standing.get(), is_trial) {
            // Nobody waited for the answer: the next request tries again.
            seat.standing.set(Standing::Open { until });
            common.due.set(Some(common.due.get().map_or(until, |due| due.min(until))));
        }
        let waker = common.queue.borrow_mut().call();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A call that waits for an instance or its stream, while this lives.
#[derive(Debug)]
pub struct Waiting(Arc<Usage>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.give(Limited::Pending);
    }
}

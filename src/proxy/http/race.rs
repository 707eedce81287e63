//! A request and its copies to other instances, of which the first answer wins.
//!
//! ```text
//!   first try ------------------------------- answered: passed on
//!       `- no head after the delay, budget --> second try ----- given up: its stream is reset, the app sees its caller leave
//! ```
//!
//! Invariants: a copy goes out only of a request whose method allows it and whose body is held whole, with nothing answered
//! yet, to an instance of the same target that was not asked; each is taken out of the budget of retries and counts among
//! the retries under way, and is the first that a limit refuses; one that is never sent gives both back; once a try failed no
//! other copy follows, what comes then is a retry. A retry is not hedged. An answer of 429 or 5xx is put aside as long as
//! another try may do better.
//! Not here: which requests, and after how long (`traffic::hedge`), one try (`routed`).

use std::rc::Rc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use super::attempt::{Upload, grpc_of};
use super::metrics::Flag;
use super::outbound::{Answer, Call};
use super::repeat::Sent;
use super::routed::{Leave, Outcome, Plan, Try, attempt_once, end_call, may_replay};
use super::{Dial, HttpState};
use crate::clock;
use crate::proxy::Tried;
use crate::proxy::head::Payload;
use crate::routing;
use crate::traffic::Resolved;
use crate::traffic::hedge::{Answers, Delay, Hedge};
use crate::upstream::Priority;

/// How a race ended.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// The try that the outcome is of.
    pub(super) by: Rc<Try>,
    /// A copy was answered first.
    pub(super) is_copy: bool,
    /// Which instances were tried by any of them.
    pub(super) tried: Tried,
}

/// Sends a request, and no copy.
pub(super) async fn alone<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    plan: &Plan<'_>,
    (pending, one): (Option<&Rc<Upload>>, Rc<Try>),
) -> Ended {
    let outcome = attempt_once(worker, call, plan, (&plan.leg.to, pending), &one).await;
    let tried = if matches!(outcome, Outcome::Answered(_)) { Tried::new() } else { one.tried.take() };
    Ended { outcome, by: one, is_copy: false, tried }
}

/// Sends a request, and copies of it as its route says, until one is answered or all failed.
pub(super) async fn race<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    plan: &Plan<'_>,
    (pending, first): (Option<&Rc<Upload>>, Rc<Try>),
) -> Ended {
    let hedge = plan.forward.hedge.as_ref();
    let Some(hedge) =
        hedge.filter(|hedge| call.payload != Payload::Upgrade && hedge.covers(&call.parts.method, plan.grpc))
    else {
        return alone(worker, call, plan, (pending, first)).await;
    };
    let state = worker.http();
    let begun = clock::now();
    let wait = match hedge.delay {
        Delay::Fixed(_) => hedge.wait(None, begun),
        Delay::Percentile(_) => state.answers(&plan.series(), |answers| hedge.wait(Some(answers), begun)),
    };
    // A copy has no place in a failover: it is to be quick, not to be answered at any price.
    let near = Resolved { failover: Vec::new(), ..Resolved::clone(&plan.leg.to) };
    let start =
        |one: Rc<Try>, to| Box::pin(async move { (attempt_once(worker, call, plan, (to, pending), &one).await, one) });
    let mut under_way = FuturesUnordered::new();
    under_way.push(start(Rc::clone(&first), &*plan.leg.to));
    let mut race = Race { plan, hedge, first, copies: Vec::new(), granted: Vec::new(), failed: None, may_send: true };
    let mut due = wait.map(|wait| Box::pin(tokio::time::sleep(wait)));
    loop {
        tokio::select! {
            biased;
            Some((outcome, by)) = under_way.next() => {
                let may_wait = !under_way.is_empty() && (pending.is_none() || race.all_sent());
                if matches!(&outcome, Outcome::Answered(answer) if !(may_wait && is_poor(answer))) {
                    race.settle(state, &by, begun);
                    return Ended { is_copy: race.is_copy(&by), tried: Tried::new(), outcome, by };
                }
                race.lose(state, outcome, by);
                if under_way.is_empty()
                    && let Some((outcome, by)) = race.failed.take()
                {
                    return Ended { is_copy: false, tried: race.tried(), outcome, by };
                }
            },
            () = async { match &mut due { Some(due) => due.await, None => std::future::pending().await } }, if race.may_send => {
                if let Some(copy) = race.copy(state, pending.map(|pending| &**pending)) {
                    under_way.push(start(copy, &near));
                }
                due = wait.filter(|_| race.may_send).map(|wait| Box::pin(tokio::time::sleep(wait)));
            }
        }
    }
}

/// What is known of a race under way.
struct Race<'r> {
    plan: &'r Plan<'r>,
    hedge: &'r Hedge,
    first: Rc<Try>,
    copies: Vec<Rc<Try>>,
    /// What the copies took.
    granted: Vec<Granted>,
    /// The most telling of the failures.
    failed: Option<(Outcome, Rc<Try>)>,
    may_send: bool,
}

/// What a copy took: given back if it is never sent.
struct Granted {
    copy: Rc<Try>,
    /// Held as long as there are copies: they count as retries under way.
    _leave: Option<routing::Retry>,
    /// When the budget granted it.
    at: tokio::time::Instant,
}

impl Race<'_> {
    /// Whether all that go on have taken what they send: an answer lets go of the body.
    fn all_sent(&self) -> bool {
        let mut all = std::iter::once(&self.first).chain(&self.copies);
        all.all(|one| one.is_over() || one.last.borrow().is_some())
    }

    fn is_copy(&self, one: &Rc<Try>) -> bool {
        !Rc::ptr_eq(one, &self.first)
    }

    /// Which instances were tried: each copy begins with what those before it have tried.
    fn tried(&self) -> Tried {
        self.copies.last().unwrap_or(&self.first).tried.borrow().clone()
    }

    fn count(&self, state: &HttpState, outcome: &str) {
        let service = self.plan.leg.to.target.service.as_str();
        state.traffic.hedges.with(&[service, outcome]).inc();
    }

    /// Prepares a copy, if there may be one.
    fn copy(&mut self, state: &HttpState, pending: Option<&Upload>) -> Option<Rc<Try>> {
        self.may_send = false;
        let whole = pending.is_none_or(|upload| upload.ended.get());
        if !whole || !may_replay(pending) {
            self.count(state, "body");
            return None;
        }
        let leave = self.first.leave();
        if matches!(leave, Leave::Refused) {
            self.count(state, "limit");
            return None;
        }
        let destination = &self.plan.leg.to.target.service;
        let at = clock::now();
        if !state.budget(destination).withdraw(at) {
            self.count(state, "budget");
            return None;
        }
        let copy = Try::after(self.tried().of(Priority::Spare), Sent::Again);
        let leave = if let Leave::Held(leave) = leave { Some(leave) } else { None };
        self.granted.push(Granted { copy: Rc::clone(&copy), _leave: leave, at });
        self.copies.push(Rc::clone(&copy));
        self.may_send = u32::try_from(self.copies.len()).is_ok_and(|copies| copies + 1 < self.hedge.requests);
        Some(copy)
    }

    /// Notes a try that failed.
    fn lose(&mut self, state: &HttpState, mut outcome: Outcome, by: Rc<Try>) {
        self.may_send = false;
        if self.is_copy(&by) {
            let is_refused = matches!(
                &outcome,
                Outcome::Final(refusal) | Outcome::Unreached(refusal) if refusal.flag == Flag::Overflow
            );
            let is_alone = matches!(outcome, Outcome::NoneLeft(_));
            self.count(
                state,
                if is_alone {
                    "no_instance"
                } else if is_refused {
                    "limit"
                } else {
                    "failed"
                },
            );
            // It was not sent: that says nothing of the request, and the first try goes on.
            if is_refused || is_alone {
                self.give_back(state, &by);
                return;
            }
        }
        if let Outcome::Answered(answer) = &mut outcome {
            end_call(Some(answer.as_mut()));
        }
        // With the request's time over, the body of an answer that was put aside would be cut off.
        let is_late = self.plan.deadline.is_some()
            && matches!(&outcome, Outcome::Final(refusal) if refusal.flag == Flag::Timeout);
        let outdoes =
            |worst: &Outcome| tells(&outcome) > tells(worst) || (is_late && matches!(worst, Outcome::Answered(_)));
        if self.failed.as_ref().is_none_or(|(worst, _)| outdoes(worst)) {
            self.failed = Some((outcome, by));
        }
    }

    /// Gives back what a copy took that was never sent.
    fn give_back(&mut self, state: &HttpState, copy: &Rc<Try>) {
        let Some(at) = self.granted.iter().position(|granted| Rc::ptr_eq(&granted.copy, copy)) else { return };
        let granted = self.granted.swap_remove(at);
        state.budget(&self.plan.leg.to.target.service).give_back(granted.at);
    }

    /// Notes what the others took until they were given up.
    fn settle(&self, state: &HttpState, winner: &Rc<Try>, begun: tokio::time::Instant) {
        let now = clock::now();
        for one in std::iter::once(&self.first).chain(&self.copies).filter(|one| !Rc::ptr_eq(one, winner)) {
            // One that failed has said so by itself.
            if let Some((observer, sent_at)) = one.last.borrow().as_ref().filter(|_| !one.is_over()) {
                observer.given_up(now - *sent_at, now);
            }
        }
        for copy in self.copies.iter().filter(|copy| !copy.is_over() || Rc::ptr_eq(copy, winner)) {
            self.count(state, if Rc::ptr_eq(copy, winner) { "won" } else { "lost" });
        }
        if matches!(self.hedge.delay, Delay::Percentile(_)) && (!self.first.is_over() || !self.is_copy(winner)) {
            state.answers(&self.plan.series(), |answers: &mut Answers| answers.note(now - begun, now));
        }
    }
}

/// Whether another answer may be a better one: the app had too much to do, or failed. Of gRPC an answer that is nothing but a
/// status says so.
fn is_poor(answer: &Answer) -> bool {
    let outcome = match grpc_of(&answer.head) {
        Some(code) => routing::Outcome::of_grpc(code),
        None => routing::Outcome::of_status(answer.head.status.as_u16()),
    };
    outcome != routing::Outcome::Success
}

/// How much a failure says: what an app answered most of all, and there what is tried again.
fn tells(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Poor(_) => 5,
        Outcome::Answered(_) => 4,
        Outcome::Silent(..) => 3,
        Outcome::Final(_) => 2,
        Outcome::Unreached(_) => 1,
        Outcome::NoneLeft(_) => 0,
    }
}

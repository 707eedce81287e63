//! Requests to a service that config entries are about: faults, route, rewriting, retries, mirror.
//!
//! ```text
//!   chain -> fault? -> route -> redirect
//!                        \--> leg -> rewrite -> intentions -> attempts (deadline, budget, backoff) -> answer, rewritten
//!                                                                \-- copy --> mirror, whose answer nobody waits for
//! ```
//!
//! Invariants: a request that no entry is about never comes here; intentions are asked about the service that is called in
//! the end, with the path and headers that it gets; an attempt follows another only within the deadline, and within the
//! budget and the limit of retries under way unless nothing had reached an app; then alone where somebody before this agent
//! repeats the request (`repeat`).
//! Not here: what the entries mean (`traffic`), one attempt (`attempt`), copies for mirrors (`mirror`).

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::time::Instant;
use tracing::debug;

use super::activity::Busy;
use super::answer::{Reason, Refusal};
use super::attempt::{self, Attempt, Failed, TimeLimit, Upload};
use super::body::{BodyLimit, TunnelBody, TunnelSend};
use super::metrics::{Exchange, Flag};
use super::outbound::{self, Answer, Call, Connection, Cut, Target};
use super::race::{Ended, alone, race};
use super::repeat::{self, Sent};
use super::{ATTEMPTS_MAX, Dial, HttpState, headers, key, mirror};
use crate::authz::Request as Admitted;
use crate::clock;
use crate::model::ServiceName;
use crate::proxy::head::Payload;
use crate::proxy::{Caller, OpenError, Opened, Source, StreamKind, Tried};
use crate::routing::{self, Observer};
use crate::trace::OpenSpan;
use crate::traffic::hedge::Answers;
use crate::traffic::retry::{NoRetry, Retry, asked_wait, plain_backoff};
use crate::traffic::{Abort, Action, Asked, Chain, Forward, Leg, Redirect, Resolved, Route};

/// Milliseconds that a caller gives a request, and that are left of them at the destination.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// A gRPC server's word on retries (gRPC A6): milliseconds to wait, or a negative number for none.
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// Routes with times of answers; beyond it all start anew.
const SERIES_MAX: usize = 4096;

/// How a request goes on.
pub(super) struct Plan<'c> {
    route: &'c Route,
    pub(super) forward: &'c Forward,
    pub(super) leg: &'c Leg,
    pub(super) source: &'c Source,
    /// When all must be over, and of what length that time was.
    pub(super) deadline: Option<(Instant, Duration)>,
    pub(super) grpc: bool,
    /// Somebody before this agent repeats the request: then this one does not, but for what reached no app.
    is_repeat: bool,
}

impl Plan<'_> {
    /// Under which name the times of its answers are kept.
    pub(super) fn series(&self) -> (ServiceName, Option<usize>) {
        (self.leg.to.target.service.clone(), self.route.at)
    }

    /// What is tried again.
    fn retry(&self) -> Option<&Retry> {
        self.forward.retry.as_ref().filter(|_| !self.is_repeat)
    }

    /// Whether the last of `made` attempts, which failed or was answered with what is tried again, asks for another one.
    fn asks_again(&self, call: &Call<'_>, answer: Option<&Answer>, made: usize) -> bool {
        match self.retry() {
            _ if self.is_repeat => false,
            Some(retry) => answer.is_some() || retry.covers_reset(),
            None => call.parts.method.is_idempotent() && made < ATTEMPTS_MAX,
        }
    }

    /// The wait before retry `number`, from 1.
    fn backoff(&self, number: u32) -> Duration {
        let draw = rand::random();
        self.retry().map_or_else(|| plain_backoff(number, draw), |retry| retry.backoff(number, draw))
    }
}

/// Answers a request to a service that has a chain.
///
/// # Errors
/// [`Cut`] if a fault resets its HTTP/2 stream.
pub(super) async fn answer<D: Dial>(
    connection: &Connection<D>,
    chain: Arc<Chain>,
    (mut request, authority, target): (Request<Incoming>, Option<Authority>, Rc<Target>),
    (busy, started, span): (Busy, Instant, Option<Box<OpenSpan>>),
) -> Result<Response<TunnelBody>, Cut> {
    let worker = &connection.worker;
    let grpc = headers::is_grpc(request.headers());
    let how = (request.version(), grpc);
    let mut exchange = Exchange::new(Rc::clone(&target.edge), started).traced(span);
    if let Some(faults) = &chain.faults {
        let (delay, abort) = faults.strike(&asked(&request), (rand::random(), rand::random()));
        let count = |kind| worker.http().traffic.faults.with(&[chain.service.as_str(), kind]).inc();
        if let Some(delay) = delay {
            count("delay");
            exchange.ends_well_as(Flag::Delay);
            tokio::time::sleep(delay).await;
        }
        if let Some(abort) = abort {
            count(if *abort == Abort::Reset { "reset" } else { "abort" });
            return break_off(connection, exchange, abort, (how, chain.service.as_str())).await;
        }
    }
    let Some(route) = chain.route(&asked(&request)) else { return Err(Cut) };
    let forward = match &route.action {
        Action::Redirect(redirect) => return Ok(redirected(exchange, redirect, route, (&request, authority.as_ref()))),
        Action::Forward(forward) => &**forward,
    };
    let Some(leg) = forward.split.leg(request.headers(), rand::random()) else { return Err(Cut) };
    let destination = &leg.to.target.service;
    let source = &target.caller.source;
    let target = if *destination == target.caller.destination {
        Rc::clone(&target)
    } else {
        let caller = Caller { source: source.clone(), destination: destination.clone() };
        let target = Target::of(&**worker, caller);
        let mut counted = Exchange::new(Rc::clone(&target.edge), started);
        counted.take_over(&mut exchange);
        exchange = counted;
        target
    };
    let payload = outbound::payload_of(&request);
    let upgraded = outbound::Upgrading::of(&mut request, payload).map(|it| it.idle_for(leg.to.idle_timeout));
    let (mut parts, body) = request.into_parts();
    let deadline = deadline(&mut parts.headers, forward, &leg.to, grpc);
    let authority = rewrite(&mut parts, authority, (route, forward, leg));
    let admitted = Admitted { method: parts.method.as_str(), path: parts.uri.path(), headers: &parts.headers };
    if let Err(refusal) = outbound::admit(&**worker, &target.caller, &admitted) {
        return Ok(outbound::refuse_request(exchange, refusal, how));
    }
    let uploads = (payload == Payload::Frames).then(|| Busy::new(&connection.activity));
    let plan = Plan { route, forward, leg, source, deadline, grpc, is_repeat: repeat::is_repeat(&parts.headers) };
    let (from, cookie, uploads) = (connection.from, Cell::default(), Cell::new(uploads));
    let (activity, id) = (&*connection.activity, OnceCell::new());
    let priority = connection.priority(&target.caller, &parts.headers);
    let kept = Rc::clone(&target);
    let call = Call { parts: &parts, authority, target: kept, payload, from, priority, cookie, uploads, activity, id };
    Ok(match attempts(worker, &call, &plan, (body, &mut exchange)).await {
        Err(refusal) => outbound::refuse_call(&**worker, exchange, refusal, how),
        Ok(mut answer) => {
            leg.response_headers.apply(&mut answer.head.headers);
            forward.response_headers.apply(&mut answer.head.headers);
            let limit = BodyLimit::new(deadline.map(|(at, _)| at), forward.idle_timeout, clock::now());
            // Trailers of HTTP/1.1 may be lost on the way.
            let is_said = grpc && how.0 == http::Version::HTTP_2;
            answer.limit = if is_said { limit.map(|limit| limit.said_in(timed_out(&call))) } else { limit };
            outbound::begin_answer(&mut answer, &call, &mut exchange, grpc);
            outbound::respond(worker, answer, exchange, upgraded, busy)
        }
    })
}

fn asked(request: &Request<Incoming>) -> Asked<'_> {
    let uri = request.uri();
    Asked { method: request.method().as_str(), path: uri.path(), query: uri.query(), headers: request.headers() }
}

/// Fails a request on purpose.
async fn break_off<D: Dial>(
    connection: &Connection<D>,
    mut exchange: Exchange,
    abort: &Abort,
    (how, service): ((http::Version, bool), &str),
) -> Result<Response<TunnelBody>, Cut> {
    let text = format!("a fault was injected on purpose: see config entry service-faults {service}");
    let refusal = |status| Refusal { status, flag: Flag::Fault, reason: Reason::Fault, text };
    match abort {
        Abort::Http(code) => {
            let status = StatusCode::from_u16(*code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            Ok(outbound::refuse_request(exchange, refusal(status), how))
        }
        Abort::Grpc(code) => {
            let mut response = refusal(StatusCode::OK).into_response(true);
            response.headers_mut().insert("grpc-status", HeaderValue::from(u16::from(*code)));
            exchange.finish(Flag::Fault);
            exchange.status(response.status());
            exchange.grpc(response.headers());
            Ok(response)
        }
        Abort::Reset => {
            exchange.finish(Flag::Fault);
            drop(exchange);
            if how.0 == http::Version::HTTP_2 {
                return Err(Cut);
            }
            connection.activity.cut();
            std::future::pending().await
        }
    }
}

/// Sends the caller elsewhere.
fn redirected(
    mut exchange: Exchange,
    redirect: &Redirect,
    route: &Route,
    (request, authority): (&Request<Incoming>, Option<&Authority>),
) -> Response<TunnelBody> {
    let own = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    let path = redirect.path.clone().or_else(|| route.path(own)).unwrap_or_else(|| own.to_owned());
    let host = redirect.host.as_deref().or_else(|| authority.map(Authority::as_str));
    // `//name/…` alone would name another host (RFC 3986 §4.2), and browsers read `\` as `/` (WHATWG URL §4.4).
    let is_elsewhere = redirect.host.is_some()
        || redirect.scheme.is_some()
        || ["//", "/\\"].iter().any(|start| path.starts_with(start));
    let location = match host.filter(|_| is_elsewhere) {
        Some(host) => format!("{}://{host}{path}", redirect.scheme.as_deref().unwrap_or("http")),
        None => path,
    };
    let mut response = Response::new(TunnelBody::text(Bytes::from(format!("{location}\n"))));
    *response.status_mut() = StatusCode::from_u16(redirect.code).unwrap_or(StatusCode::FOUND);
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    exchange.status(response.status());
    exchange.finish(Flag::None);
    response
}

/// What ends an answer of gRPC that has begun and takes too long.
fn timed_out(call: &Call<'_>) -> HeaderMap {
    let text = format!("service `{}` did not end its answer in time", call.target.caller.destination);
    let refusal = Refusal { status: StatusCode::GATEWAY_TIMEOUT, flag: Flag::Timeout, reason: Reason::Timeout, text };
    refusal.into_trailers()
}

/// Changes what is sent as the route and the leg say; returns the authority.
fn rewrite(
    parts: &mut Parts,
    authority: Option<Authority>,
    (route, forward, leg): (&Route, &Forward, &Leg),
) -> Option<Authority> {
    let path = parts.uri.path_and_query().and_then(|path| route.path(path.as_str()));
    if let Some(path) = path.and_then(|path| PathAndQuery::try_from(path).ok()) {
        parts.uri = Uri::from(path);
    }
    forward.request_headers.apply(&mut parts.headers);
    leg.request_headers.apply(&mut parts.headers);
    let host = forward.host.as_deref().and_then(|host| Authority::try_from(host).ok());
    host.or(authority)
}

/// Tells whether a caller gives its request a time limit of its own.
pub(super) fn is_limited(headers: &HeaderMap, grpc: bool) -> bool {
    headers.contains_key(if grpc { GRPC_TIMEOUT } else { TIMEOUT })
}

/// Takes the caller's own time limit out of its headers; returns the shorter of that and the route's.
fn deadline(headers: &mut HeaderMap, forward: &Forward, to: &Resolved, grpc: bool) -> Option<(Instant, Duration)> {
    let asked = if grpc {
        headers.remove(GRPC_TIMEOUT).and_then(|value| attempt::grpc_timeout(value.to_str().ok()?))
    } else {
        let millis = headers.remove(TIMEOUT).and_then(|value| value.to_str().ok()?.parse().ok());
        millis.map(Duration::from_millis)
    };
    let limit = forward.request_timeout.or(to.request_timeout).into_iter().chain(asked).min()?;
    Some((clock::now() + limit.min(Duration::from_hours(24)), limit))
}

/// The header that tells the destination what is left of the time.
fn time_left(plan: &Plan<'_>, now: Instant) -> Option<(HeaderName, String)> {
    let (at, _) = plan.deadline?;
    let millis = at.saturating_duration_since(now).as_millis().max(1);
    // At most 8 digits: 24 h have 86,400,000 ms.
    Some(if plan.grpc { (GRPC_TIMEOUT, format!("{millis}m")) } else { (TIMEOUT, millis.to_string()) })
}

/// One attempt, as others see it.
#[derive(Debug, Default)]
pub(super) struct Try {
    /// Which instances were tried, its own among them.
    pub(super) tried: RefCell<Tried>,
    /// Takes notes of it, and when it was sent.
    pub(super) last: RefCell<Option<(Observer, Instant)>>,
    is_over: Cell<bool>,
    sent: Sent,
}

impl Try {
    /// Another attempt after those that `tried` holds.
    pub(super) fn after(tried: Tried, sent: Sent) -> Rc<Self> {
        Rc::new(Self { tried: RefCell::new(tried), sent, ..Self::default() })
    }

    /// Asks for leave to repeat the request elsewhere.
    pub(super) fn leave(&self) -> Leave {
        match self.last.borrow().as_ref().map(|(observer, _)| observer.retry()) {
            None => Leave::Free,
            Some(Some(held)) => Leave::Held(held),
            Some(None) => Leave::Refused,
        }
    }

    /// Whether it came to an outcome.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.get()
    }
}

/// Whether a request may be repeated.
pub(super) enum Leave {
    /// Nobody limits it.
    Free,
    /// It may, and counts until this is dropped.
    Held(routing::Retry),
    /// As many are under way as may be.
    Refused,
}

/// What one attempt was.
pub(super) enum Outcome {
    Answered(Box<Answer>),
    /// Nothing had reached an app.
    Unreached(Refusal),
    /// There is no instance that was not tried.
    NoneLeft(Refusal),
    /// It broke, or took too long.
    Silent(Refusal, &'static str),
    /// It answered what is tried again.
    Poor(Box<Answer>),
    Final(Refusal),
}

/// Sends the request until an answer stands.
async fn attempts<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    plan: &Plan<'_>,
    (body, exchange): (Incoming, &mut Exchange),
) -> Result<Answer, Refusal> {
    let state = worker.http();
    let destination = &plan.leg.to.target.service;
    let pending = match call.payload {
        Payload::Frames => Some(attempt::begin_upload(body, call.parts, state, call.uploads.take()).await?),
        Payload::Empty | Payload::Upgrade => None,
    };
    mirror::mirror(worker, call, plan, pending.as_deref());
    let retry = plan.retry();
    let budget = call.target.budget(state);
    budget.deposit(clock::now());
    let times = retry.map_or(0, |retry| retry.times);
    let key = key::of_request(&**worker, call);
    let begin = || Tried::with_key(key).of(call.priority);
    let mut tried = begin();
    let (mut retries, mut unreached, mut made) = (0, 0, 0);
    // Held to the end: repeating a request may not make an outage worse.
    let mut leaves: Vec<routing::Retry> = Vec::new();
    let (mut kept, mut not_reached): (Option<Box<Answer>>, Option<Refusal>) = (None, None);
    // What another attempt followed: where nobody is left to ask, it says more than that.
    let mut last = None;
    let failure = loop {
        let one = Try::after(std::mem::take(&mut tried), if retries > 0 { Sent::Again } else { Sent::First });
        // The first attempt alone is hedged.
        let is_first = retries == 0 && not_reached.is_none();
        let is_hedged = plan.forward.hedge.is_some() && is_first && !plan.is_repeat;
        let ended = if is_hedged {
            Box::pin(race(worker, call, plan, (pending.as_ref(), one))).await
        } else {
            alone(worker, call, plan, (pending.as_ref(), one)).await
        };
        let Ended { outcome, by: one, is_copy, tried: so_far } = ended;
        tried = so_far.of(call.priority);
        let (failure, reason, answer) = match outcome {
            Outcome::Answered(answer) => {
                if is_copy {
                    exchange.ends_well_as(Flag::HedgeWon);
                }
                if retries > 0 {
                    state.traffic.saved.with(&[destination.as_str()]).inc();
                }
                return Ok(*answer);
            }
            Outcome::Final(refusal) => break refusal,
            Outcome::Unreached(refusal) => {
                unreached += 1;
                if unreached < ATTEMPTS_MAX.max(usize::try_from(times).unwrap_or(0) + 1)
                    && may_replay(pending.as_deref())
                {
                    not_reached = Some(refusal);
                    continue;
                }
                break refusal;
            }
            // All were tried: one that failed may do better by now, one that was not reached hardly.
            Outcome::NoneLeft(_) if retry.is_some() && retries > 0 && tried.count() > 0 && not_reached.is_none() => {
                tried = begin();
                continue;
            }
            Outcome::NoneLeft(refusal) => break last.or(not_reached).unwrap_or(refusal),
            Outcome::Silent(refusal, reason) => (refusal, reason, None),
            Outcome::Poor(answer) => {
                let status = answer.head.status;
                // One of these was the destination's.
                retries += u32::from(answer.is_second);
                let refusal = Refusal::reset(format!("service `{destination}` answered {status} to the last attempt"));
                (refusal, "status", Some(answer))
            }
        };
        made += 1;
        let is_asked_for = plan.asks_again(call, answer.as_deref(), made);
        let asks = |name: &HeaderName| answer.as_ref()?.head.headers.get(name);
        let wait = asked_wait(asks(&PUSHBACK), asks(&header::RETRY_AFTER));
        kept = answer.or(kept);
        if !is_asked_for {
            break failure;
        }
        let backoff = plan.backoff(retries + 1);
        let refused = match wait {
            _ if !may_replay(pending.as_deref()) => Some("body"),
            _ if retry.is_some() && retries >= times => Some("times"),
            Err(NoRetry) => Some("pushback"),
            Ok(wait) if !fits(plan, wait.unwrap_or(backoff)) => Some("deadline"),
            Ok(_) if !budget.withdraw(clock::now()) => Some("budget"),
            Ok(_) => held_back(&one, &mut leaves),
        };
        if let Some(why) = refused {
            state.traffic.not_retried.with(&[destination.as_str(), why]).inc();
            break failure;
        }
        end_call(kept.as_deref_mut());
        last = Some(failure);
        retries += 1;
        state.traffic.retries.with(&[destination.as_str(), reason]).inc();
        debug!(service = %destination, reason, retries, "another attempt follows");
        pause(wait.ok().flatten().unwrap_or(backoff)).await;
    };
    last_word(kept, failure, exchange)
}

/// Why the limit of concurrent retries forbids another attempt, if it does.
fn held_back(one: &Try, leaves: &mut Vec<routing::Retry>) -> Option<&'static str> {
    match one.leave() {
        Leave::Free => None,
        Leave::Held(leave) => {
            leaves.push(leave);
            None
        }
        Leave::Refused => Some("limit"),
    }
}

/// What an app said is a better answer than one of weft's own.
fn last_word(kept: Option<Box<Answer>>, failure: Refusal, exchange: &mut Exchange) -> Result<Answer, Refusal> {
    match kept {
        Some(answer) if failure.flag != Flag::Timeout => {
            exchange.ends_well_as(Flag::RetriesExhausted);
            Ok(*answer)
        }
        _ => Err(failure),
    }
}

async fn pause(wait: Duration) {
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}

/// The call of an answer that is kept is over: what is kept of it holds the tunnel alone.
pub(super) fn end_call(kept: Option<&mut Answer>) {
    if let Some(answer) = kept {
        answer.lease = answer.lease.clone();
    }
}

pub(super) fn may_replay(pending: Option<&Upload>) -> bool {
    pending.is_none_or(|upload| upload.replayable.get())
}

fn fits(plan: &Plan<'_>, wait: Duration) -> bool {
    plan.deadline.is_none_or(|(at, _)| clock::now() + wait < at)
}

/// Tries one instance, within what is left of the time.
pub(super) async fn attempt_once<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    plan: &Plan<'_>,
    (to, pending): (&Resolved, Option<&Rc<Upload>>),
    one: &Try,
) -> Outcome {
    let now = clock::now();
    let per_try = plan.forward.per_try_timeout.map(|limit| now + limit);
    let whole = plan.deadline.map(|(at, _)| at);
    let trying = Box::pin(try_instance(worker, call, plan, (to, pending), one));
    let Some(end) = per_try.into_iter().chain(whole).min() else {
        let outcome = trying.await;
        one.is_over.set(true);
        return outcome;
    };
    let ended = tokio::time::timeout_at(end, trying).await;
    one.is_over.set(true);
    let late = if ended.is_err() { one.last.borrow().clone() } else { None };
    if let Some((observer, sent_at)) = late {
        let now = clock::now();
        worker.observe(&observer, routing::Outcome::GatewayFailure, now - sent_at, now);
    }
    match ended {
        Ok(outcome) => outcome,
        Err(_) if per_try.is_some_and(|at| whole.is_none_or(|whole| at < whole)) => {
            Outcome::Silent(too_late(plan, "PerTryTimeout", plan.forward.per_try_timeout), "timeout")
        }
        Err(_) => Outcome::Final(too_late(plan, "timeout", plan.deadline.map(|(_, limit)| limit))),
    }
}

fn too_late(plan: &Plan<'_>, what: &str, limit: Option<Duration>) -> Refusal {
    let route = plan.route.at.map_or_else(|| "no route".to_owned(), |at| format!("route {at}"));
    let (target, limit) = (&plan.leg.to.target.id, limit.unwrap_or_default());
    Refusal {
        status: StatusCode::GATEWAY_TIMEOUT,
        flag: Flag::Timeout,
        reason: Reason::Timeout,
        text: format!("`{target}` did not answer within {limit:?}, the {what} of the request ({route} of its router)"),
    }
}

async fn try_instance<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    plan: &Plan<'_>,
    (resolved, pending): (&Resolved, Option<&Rc<Upload>>),
    one: &Try,
) -> Outcome {
    let state = worker.http();
    let destination = &resolved.target.service;
    let opened = match worker.open_to(plan.source, resolved, StreamKind::Http, &one.tried).await {
        Ok(opened) => opened,
        Err(OpenError::Unreachable { node, reason }) => {
            return Outcome::Unreached(attempt::unreachable(destination, &format!("node {node}: {reason}")));
        }
        Err(error @ OpenError::Full { .. }) => {
            return Outcome::Unreached(attempt::open_refusal(destination, error));
        }
        Err(error @ (OpenError::NoInstance { .. } | OpenError::FailsClosed { .. })) => {
            return Outcome::NoneLeft(no_instance(resolved, error));
        }
        Err(error @ OpenError::Overflow(_)) => return Outcome::Final(attempt::open_refusal(destination, error)),
        Err(error) => return Outcome::Final(no_instance(resolved, error)),
    };
    let Opened { send, recv, preamble, instance, lease, at } = opened;
    let head = match attempt::encode_head(state, call, time_left(plan, at).as_ref(), one.sent) {
        Ok(head) => head,
        Err(refusal) => return Outcome::Final(refusal),
    };
    // With a deadline of its operators' for all of it, nothing else limits one part; a caller's own only shortens.
    let has_limit = plan.forward.request_timeout.or(resolved.request_timeout).is_some();
    let limit = match (plan.forward.idle_timeout, has_limit) {
        // Of gRPC as well: its apps are silent for no longer either.
        (Some(idle), _) => TimeLimit::AfterRequest(idle),
        (None, true) => TimeLimit::None,
        (None, false) => TimeLimit::of(&call.parts.headers, state.limits.response),
    };
    let again = plan.retry().filter(|retry| retry.times > 0);
    let attempt = Attempt { worker, call, head, pending, limit, again };
    let seen = lease.observer().map(|observer| (observer.clone(), at));
    one.last.borrow_mut().clone_from(&seen);
    let outcome = attempt.run(TunnelSend::new(send), recv, preamble, lease).await;
    if let Some((observer, sent_at)) = &seen {
        attempt::observe(&**worker, (observer, *sent_at), &outcome, call);
    }
    match &outcome {
        Err(Failed::Unreached(_)) => worker.connect_failed(&instance),
        Ok(_) | Err(Failed::Answered(_)) => worker.connected(&instance),
        Err(Failed::Silent(_) | Failed::Final(_)) => {}
    }
    match outcome {
        Ok(answer) => Outcome::Answered(Box::new(answer)),
        Err(Failed::Unreached(refusal)) => Outcome::Unreached(refusal),
        Err(Failed::Silent(refusal)) => Outcome::Silent(refusal, "reset"),
        Err(Failed::Answered(answer)) => Outcome::Poor(answer),
        Err(Failed::Final(refusal)) => Outcome::Final(refusal),
    }
}

fn no_instance(resolved: &Resolved, error: OpenError) -> Refusal {
    let mut refusal = attempt::open_refusal(&resolved.target.service, error);
    if resolved.target.view.is_some() || !resolved.failover.is_empty() {
        let others: Vec<&str> = resolved.failover.iter().map(|target| &*target.id).collect();
        let failover = if others.is_empty() { String::new() } else { format!(", nor has {}", others.join(", ")) };
        let why = match refusal.reason {
            Reason::FailsClosed => format!(" ({})", refusal.text),
            _ => String::new(),
        };
        let target = &resolved.target.id;
        refusal.text = format!("target `{target}` has no instance that can take the request{failover}{why}");
    }
    refusal
}

impl HttpState {
    /// Asks the times of a route's latest answers.
    pub(super) fn answers<T>(&self, series: &(ServiceName, Option<usize>), ask: impl FnOnce(&mut Answers) -> T) -> T {
        let mut answers = self.answers.borrow_mut();
        if answers.len() >= SERIES_MAX && !answers.contains_key(series) {
            answers.clear();
        }
        ask(answers.entry(series.clone()).or_insert_with(|| Answers::new(clock::now())))
    }
}

//! Tries of one request: instance after instance, with the body kept for another try as long as it is short.
//!
//! ```text
//!   open -> head + kept frames -> rest of the body (beside) -> status byte + head: the answer
//!     \______ not reached, or nothing answered to an idempotent request: the next instance ______/
//! ```
//!
//! Invariants: a request that may have reached an app is repeated only if it is idempotent, within the budget of retries and
//! the limit of those under way, and by this agent alone (`repeat`); one whose body is no longer held whole is never
//! repeated. Not here: which instance is next (`proxy::pick`), the answer's body (`outbound`).

use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http_body::Body;
use hyper::body::Incoming;
use quinn::RecvStream;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::debug;

use super::activity::Busy;
use super::answer::{Reason, Refusal};
use super::body::{self, BodyError, TunnelSend};
use super::headers;
use super::metrics::Flag;
use super::outbound::{Answer, Call};
use super::priority::PRIORITY;
use super::repeat::{self, Sent};
use super::{ATTEMPTS_MAX, Dial, HttpState, REPLAY_BYTES_MAX, key};
use crate::clock;
use crate::model::ServiceName;
use crate::proxy::head::{HeadError, HeadWriter, Inbox, Payload, ResponseHead};
use crate::proxy::worker::within;
use crate::proxy::{Lease, OpenError, Opened, StreamKind, Tried};
use crate::routing::{self, Limited, Observer, Outcome};
use crate::traffic::retry::{Retry, plain_backoff};
use crate::upstream::Priority;

/// A request's body while attempts may still need it again.
pub(super) struct Upload {
    body: RefCell<Incoming>,
    /// Encoded frames, for another attempt.
    pub(super) replay: RefCell<Vec<Bytes>>,
    replay_bytes: Cell<usize>,
    pub(super) replayable: Cell<bool>,
    /// The body came to its end.
    pub(super) ended: Cell<bool>,
    held: Held,
    /// Who is told of the whole body; in its place nothing, where it is too long to be kept.
    wanted: RefCell<Option<oneshot::Sender<Option<Vec<Bytes>>>>>,
    _busy: Option<Busy>,
}

/// A body that waits for the app to ask for it (`Expect: 100-continue`).
#[derive(Default)]
struct Held {
    is_held: Cell<bool>,
    asked: Notify,
}

impl Held {
    /// Waits until the app asks, or is silent for too long.
    async fn released(&self, send: &TunnelSend) -> Result<(), BodyError> {
        tokio::select! {
            biased;
            _silent = tokio::time::timeout(EXPECT_TIMEOUT, self.asked.notified()) => {
                self.is_held.set(false);
                Ok(())
            }
            error = send.stopped() => Err(error),
        }
    }
}

impl Upload {
    /// Returns the frames of the body once it has come whole; none of one that is too long to be kept. Whoever waits is told
    /// where it does not come to its end, and stands in nobody's way.
    pub(super) fn whole(&self) -> oneshot::Receiver<Option<Vec<Bytes>>> {
        let (sender, receiver) = oneshot::channel();
        if self.ended.get() {
            let _nobody_waits = sender.send(Some(self.replay.borrow().clone()));
        } else {
            self.wanted.replace(Some(sender));
        }
        receiver
    }

    /// Keeps frames for another attempt, or who wants the whole body, up to the bound.
    fn keep(&self, chunks: &[Bytes]) {
        if !self.replayable.get() && self.wanted.borrow().is_none() {
            return;
        }
        let bytes = chunks.iter().fold(self.replay_bytes.get(), |sum, chunk| sum.saturating_add(chunk.len()));
        self.replay_bytes.set(bytes);
        if bytes > REPLAY_BYTES_MAX {
            if let Some(wanted) = self.wanted.take() {
                let _nobody_waits = wanted.send(None);
            }
            self.settle();
        } else {
            self.replay.borrow_mut().extend_from_slice(chunks);
        }
    }

    /// Keeps nothing any more for another attempt: one was answered, or the body is too long.
    fn settle(&self) {
        self.replayable.set(false);
        if self.wanted.borrow().is_none() {
            self.replay.borrow_mut().clear();
        }
    }

    /// Notes that the body came to its end.
    fn end(&self) {
        self.ended.set(true);
        let Some(wanted) = self.wanted.take() else { return };
        let frames = if self.replayable.get() { self.replay.borrow().clone() } else { self.replay.take() };
        let _nobody_waits = wanted.send(Some(frames));
    }
}

/// A body that the app answered without asking for. Its stream is reset when this is dropped, with the answer: a destination
/// whose request breaks off breaks the answer off as well.
pub(super) struct Unsent {
    _uploading: Pin<Box<dyn Future<Output = Result<(), BodyError>>>>,
}

impl std::fmt::Debug for Unsent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unsent")
    }
}

/// An app that does not ask for an awaited body within this time gets it: it may not know how to ask, and callers wait no
/// longer themselves (curl and Go: 1 s).
const EXPECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Interim answers to one request that are passed on: apps send one or two.
pub(super) const INTERIM_MAX: usize = 8;

/// Sends the rest of a body; a failure resets the stream, and reading the answer says why.
async fn upload<D: Dial>(worker: Rc<D>, upload: Rc<Upload>, mut send: TunnelSend) -> Result<(), BodyError> {
    let mut chunks = Vec::with_capacity(2);
    if upload.held.is_held.get() {
        upload.held.released(&send).await?;
    }
    loop {
        let frame = body::next_frame(|cx| Pin::new(&mut *upload.body.borrow_mut()).poll_frame(cx), &send).await?;
        let Some(frame) = frame else { break };
        body::encode_frame(frame, worker.http(), &mut chunks)?;
        upload.keep(&chunks);
        send.write(&mut chunks).await?;
        chunks.clear();
    }
    upload.end();
    send.finish();
    Ok(())
}

/// How one attempt failed.
pub(super) enum Failed {
    /// The request did not reach an app: another instance may take it.
    Unreached(Refusal),
    /// The stream broke with nothing answered: only what is idempotent may be tried again.
    Silent(Refusal),
    /// It answered what the route tries again; the answer may still be passed on.
    Answered(Box<Answer>),
    Final(Refusal),
}

/// Sends the request, whose head was there `began`, until an instance answers or attempts run out.
pub(super) async fn attempts<D: Dial>(
    worker: &Rc<D>,
    call: &Call<'_>,
    body: Incoming,
    began: Instant,
) -> Result<Answer, Refusal> {
    let state = worker.http();
    let destination = &call.target.caller.destination;
    let mut head = encode_head(state, call, None, Sent::First)?;
    let limit = TimeLimit::of(&call.parts.headers, state.limits.response);
    let pending = match call.payload {
        Payload::Frames => Some(begin_upload(body, call.parts, state, call.uploads.take()).await?),
        Payload::Empty | Payload::Upgrade => None,
    };
    let budget = call.target.budget(state);
    // A body was waited for.
    let now = if pending.is_some() { clock::now() } else { began };
    budget.deposit(now);
    let tried = RefCell::new(Tried::with_key(key::of_request(&**worker, call)).of(call.priority).at(now));
    let (mut failure, mut repeats) = (None, 0);
    // Held to the end: repeating a request may not make an outage worse.
    let mut retries: Vec<routing::Retry> = Vec::new();
    for made in 1..=ATTEMPTS_MAX {
        let opened = match worker.open(&call.target.caller, StreamKind::Http, &tried).await {
            Ok(opened) => opened,
            Err(OpenError::Unreachable { node, reason }) => {
                failure = Some(unreachable(destination, &format!("node {node}: {reason}")));
                continue;
            }
            Err(error @ OpenError::Full { .. }) => {
                failure = Some(open_refusal(destination, error));
                continue;
            }
            // No instance is left: what the tried ones said is the better answer.
            Err(error) => return Err(failure.unwrap_or_else(|| open_refusal(destination, error))),
        };
        let Opened { send, recv, preamble, instance, lease, at: sent_at } = opened;
        let observer = lease.observer().cloned();
        let attempt = Attempt { worker, call, head: head.clone(), pending: pending.as_ref(), limit, again: None };
        let outcome = attempt.run(TunnelSend::new(send), recv, preamble, lease).await;
        if let Some(observer) = &observer {
            observe(&**worker, (observer, sent_at), &outcome, call);
        }
        match &outcome {
            Err(Failed::Unreached(_)) => worker.connect_failed(&instance),
            Ok(_) => worker.connected(&instance),
            Err(Failed::Silent(_) | Failed::Answered(_) | Failed::Final(_)) => {}
        }
        let (refusal, is_silent) = match outcome {
            Ok(answer) => return Ok(answer),
            Err(Failed::Answered(answer)) => return Ok(*answer),
            Err(Failed::Final(refusal)) => return Err(refusal),
            Err(Failed::Unreached(refusal)) => (refusal, false),
            Err(Failed::Silent(refusal)) => (refusal, true),
        };
        let may_replay = pending.as_ref().is_none_or(|upload| upload.replayable.get());
        if is_silent {
            let may_repeat = call.parts.method.is_idempotent() && !repeat::is_repeat(&call.parts.headers);
            if !may_repeat || made == ATTEMPTS_MAX {
                return Err(refusal);
            }
            let leave = observer.as_ref().map(Observer::retry);
            let refused = match leave {
                _ if !may_replay => Some("body"),
                Some(None) => Some("limit"),
                Some(Some(_)) | None => (!budget.withdraw(clock::now())).then_some("budget"),
            };
            if let Some(why) = refused {
                state.traffic.not_retried.with(&[destination.as_str(), why]).inc();
                return Err(refusal);
            }
            retries.extend(leave.flatten());
            repeats += 1;
            state.traffic.retries.with(&[destination.as_str(), "reset"]).inc();
            head = encode_head(state, call, None, Sent::Again)?;
            tokio::time::sleep(plain_backoff(repeats, rand::random())).await;
        } else if !may_replay {
            return Err(refusal);
        }
        debug!(service = %destination, error = refusal.text, "another instance is tried");
        failure = Some(refusal);
    }
    Err(failure.unwrap_or_else(|| unreachable(destination, "no attempt was made")))
}

/// Takes what is there of the body.
pub(super) async fn begin_upload(
    mut body: Incoming,
    parts: &Parts,
    state: &HttpState,
    busy: Option<Busy>,
) -> Result<Rc<Upload>, Refusal> {
    // hyper answers `Expect: 100-continue` when the body is first asked for: the head goes ahead of it.
    let first = if parts.headers.contains_key(header::EXPECT) {
        body::First::default()
    } else {
        body::first(&mut body, state).await.map_err(|_| malformed_body())?
    };
    Ok(Rc::new(Upload {
        body: RefCell::new(body),
        replay: RefCell::new(first.frames),
        replay_bytes: Cell::new(first.bytes),
        replayable: Cell::new(true),
        ended: Cell::new(first.ended),
        held: Held { is_held: Cell::new(headers::awaits_continue(parts)), ..Held::default() },
        wanted: RefCell::default(),
        _busy: busy,
    }))
}

/// Encodes a request's head, with what weft adds; `left` is a header about the time that is left.
pub(super) fn encode_head(
    state: &HttpState,
    call: &Call<'_>,
    left: Option<&(HeaderName, String)>,
    sent: Sent,
) -> Result<Bytes, Refusal> {
    let Parts { method, uri, headers, .. } = call.parts;
    let hops = headers::next_hop(headers)?;
    let authority = call.authority.as_ref().map_or(&[][..], |authority| authority.as_str().as_bytes());
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let encoded = state.encode(|out| {
        let mut writer = HeadWriter::request(out, call.payload, method, (authority, path.as_bytes()));
        headers::write(headers, &mut writer);
        if let (Payload::Upgrade, Some(protocol)) = (call.payload, headers::upgrade(headers)) {
            writer.header(&header::UPGRADE, protocol.as_bytes());
        }
        let mut digits = [0; 3];
        writer.header(&headers::HOPS, decimal(hops, &mut digits));
        if call.priority != Priority::Normal {
            writer.header(&PRIORITY, call.priority.as_str().as_bytes());
        }
        if let Some((name, value)) = left {
            writer.header(name, value.as_bytes());
        }
        // Of a repetition further up as well: what follows from it is not repeated either.
        if sent == Sent::Again || headers.contains_key(repeat::RETRY) {
            writer.header(&repeat::RETRY, b"1");
        }
        if !headers.contains_key(headers::REQUEST_ID) {
            writer.header(&headers::REQUEST_ID, call.made_id());
        }
        writer.finish()
    });
    encoded.map_err(|error: HeadError| Refusal {
        status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        flag: Flag::Refused,
        reason: Reason::HeadTooLarge,
        text: error.to_string(),
    })
}

/// Writes a number without an allocation.
fn decimal(number: u8, digits: &mut [u8; 3]) -> &[u8] {
    let [hundreds, tens, ones] = digits;
    *hundreds = b'0' + number / 100;
    *tens = b'0' + number / 10 % 10;
    *ones = b'0' + number % 10;
    let zeros = if number >= 100 {
        0
    } else if number >= 10 {
        1
    } else {
        2
    };
    digits.get(zeros..).unwrap_or_default()
}

/// How long a response's head is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeLimit {
    /// A gRPC stream may answer with its first message, whenever that comes.
    None,
    /// From the end of the request.
    AfterRequest(Duration),
    /// From the beginning: the caller's own `grpc-timeout`.
    Deadline(Duration),
}

impl TimeLimit {
    pub(super) fn of(headers: &HeaderMap, limit: Duration) -> Self {
        if !headers::is_grpc(headers) {
            return Self::AfterRequest(limit);
        }
        let timeout = headers.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(grpc_timeout);
        timeout.map_or(Self::None, Self::Deadline)
    }

    /// Returns when the time is over.
    async fn over(self, uploading: impl Fn() -> bool) {
        match self {
            Self::None => std::future::pending().await,
            Self::Deadline(limit) => tokio::time::sleep(limit).await,
            Self::AfterRequest(limit) => loop {
                let ended = !uploading();
                tokio::time::sleep(limit).await;
                if ended {
                    return;
                }
            },
        }
    }
}

/// Parses `grpc-timeout`: at most 8 digits and a unit.
pub(super) fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number.saturating_mul(3600)),
        "M" => Duration::from_secs(number.saturating_mul(60)),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// One try at one instance.
pub(super) struct Attempt<'a, D> {
    pub(super) worker: &'a Rc<D>,
    pub(super) call: &'a Call<'a>,
    pub(super) head: Bytes,
    pub(super) pending: Option<&'a Rc<Upload>>,
    pub(super) limit: TimeLimit,
    /// Which answers are tried again.
    pub(super) again: Option<&'a Retry>,
}

impl<D: Dial> Attempt<'_, D> {
    pub(super) async fn run(
        self,
        mut send: TunnelSend,
        mut recv: RecvStream,
        preamble: Bytes,
        lease: Lease,
    ) -> Result<Answer, Failed> {
        let mut chunks = [preamble, self.head.clone()];
        let mut with_body = Vec::new();
        let chunks = match self.pending {
            Some(upload) => {
                with_body.extend(chunks.into_iter().chain(upload.replay.borrow().iter().cloned()));
                &mut with_body[..]
            }
            None => &mut chunks[..],
        };
        let Some(written) = within(self.worker.http().limits.response, send.write(chunks)).await else {
            return Err(Failed::Silent(self.broke(&std::io::Error::from(std::io::ErrorKind::TimedOut))));
        };
        match written {
            // A peer that stops the stream has said why on the other half.
            Ok(()) | Err(BodyError::Write(quinn::WriteError::Stopped(_))) => {}
            Err(error) => return Err(Failed::Silent(self.broke(&error))),
        }
        let mut kept = None;
        let mut uploading = None;
        match self.pending {
            Some(pending) if !pending.ended.get() => {
                uploading = Some(Box::pin(upload(Rc::clone(self.worker), Rc::clone(pending), send)));
            }
            None if self.call.payload == Payload::Upgrade => kept = Some(send),
            _ => send.finish(),
        }
        let mut inbox = Inbox::default();
        let result = {
            let answer = pin!(self.read_answer(&mut recv, &mut inbox));
            self.in_time(answer, &mut uploading).await
        };
        let mut head = result?;
        let is_second = head.headers.remove(repeat::RETRY).is_some();
        if is_second {
            let destination = self.destination();
            self.call.target.budget(self.worker.http()).spend(clock::now());
            self.worker.http().traffic.retries.with(&[destination.as_str(), "stale"]).inc();
        }
        // While the body still goes up its end is not known: then what was answered stands.
        if uploading.is_none()
            && self.again.is_some_and(|retry| retry.covers_answer(head.status.as_u16(), grpc_of(&head)))
        {
            let answer = Answer { head, recv, inbox, send: kept, limit: None, lease, unsent: None, is_second };
            return Err(Failed::Answered(Box::new(answer)));
        }
        let mut unsent = None;
        if let Some(pending) = self.pending {
            pending.settle();
            // An app that answers well before it asks may still read: as without weft, the caller is free to send.
            if pending.held.is_held.get() && head.status.is_success() {
                pending.held.asked.notify_one();
            } else if pending.held.is_held.get() {
                unsent = uploading.take().map(|uploading| Unsent { _uploading: uploading });
            }
        }
        if let Some(uploading) = uploading {
            let lease = lease.clone();
            self.worker.spawn(async move {
                let _lease = lease;
                if let Err(error) = uploading.await {
                    debug!(error = %error, "request body aborted");
                }
            });
        }
        Ok(Answer { head, recv, inbox, send: kept, limit: None, lease, unsent, is_second })
    }

    /// Waits for the answer while the body goes up.
    async fn in_time(
        &self,
        mut answer: Pin<&mut impl Future<Output = Result<ResponseHead, Failed>>>,
        uploading: &mut Option<Pin<Box<impl Future<Output = Result<(), BodyError>>>>>,
    ) -> Result<ResponseHead, Failed> {
        // A body that the peer stopped does not end, but it goes up no longer: the answer is due.
        let goes_up = Cell::new(uploading.is_some());
        let mut over = pin!(self.limit.over(|| goes_up.get()));
        loop {
            tokio::select! {
                biased;
                head = answer.as_mut() => return head,
                result = async { match uploading { Some(uploading) => uploading.as_mut().await, None => std::future::pending().await } } => {
                    *uploading = None;
                    goes_up.set(false);
                    match result {
                        // A caller that left is noticed by hyper as well; a peer that stopped reading answers.
                        Ok(()) | Err(BodyError::Write(quinn::WriteError::Stopped(_))) => {}
                        Err(BodyError::App(_)) => return Err(Failed::Final(malformed_body())),
                        Err(error) => return Err(Failed::Silent(self.broke(&error))),
                    }
                }
                () = over.as_mut() => return Err(Failed::Final(Refusal {
                    status: StatusCode::GATEWAY_TIMEOUT,
                    flag: Flag::Timeout,
                    reason: Reason::Timeout,
                    text: format!("service `{}` did not answer in time", self.destination()),
                })),
            }
        }
    }

    /// Reads the status byte and the response's head.
    async fn read_answer(&self, recv: &mut RecvStream, inbox: &mut Inbox) -> Result<ResponseHead, Failed> {
        let (mut reached, mut interims) = (false, 0_usize);
        loop {
            if !reached && let Some(status) = inbox.take_u8() {
                self.reached(status)?;
                reached = true;
            }
            if reached {
                match inbox.take_response() {
                    Ok(Some(head)) if headers::is_interim(head.status) => {
                        interims = interims.saturating_add(1);
                        // What is too much stays here; a 100 lets the body go, however many came before it.
                        if interims <= INTERIM_MAX || head.status == StatusCode::CONTINUE {
                            self.pass_interim(&head);
                        }
                        continue;
                    }
                    Ok(Some(head)) => return Ok(head),
                    Ok(None) => {}
                    Err(error) => return Err(Failed::Final(self.broke(&error))),
                }
            }
            let failed = |refusal| if reached { Failed::Final(refusal) } else { Failed::Silent(refusal) };
            match recv.read_chunk(usize::MAX, true).await {
                Ok(Some(chunk)) => inbox.push(chunk.bytes),
                Ok(None) => return Err(failed(self.broke(&BodyError::Truncated))),
                Err(error) => return Err(failed(self.broke(&error))),
            }
        }
    }

    /// Passes an interim answer on; 100 is hyper's to say, once it is asked for the body.
    fn pass_interim(&self, head: &ResponseHead) {
        if head.status == StatusCode::CONTINUE {
            if let Some(pending) = self.pending {
                pending.held.asked.notify_one();
            }
        } else if self.call.parts.version == http::Version::HTTP_11 {
            self.call.activity.send_interim(&headers::interim_text(head));
        }
    }

    /// Judges the status byte.
    fn reached(&self, status: u8) -> Result<(), Failed> {
        let destination = self.destination();
        match status {
            0 => Ok(()),
            1 => Err(Failed::Unreached(unreachable(
                destination,
                "its application refuses connections or this request unread, or does not speak the registered protocol",
            ))),
            2 => Err(Failed::Unreached(unreachable(
                destination,
                "its node does not have the instance, or it is registered without a port",
            ))),
            3 => Err(Failed::Final(Refusal::denied(format!("service `{destination}` does not admit this caller")))),
            4 => Err(Failed::Unreached(unreachable(destination, "its node is shutting down"))),
            _ => Err(Failed::Final(self.broke(&HeadError::Malformed("status byte")))),
        }
    }

    fn destination(&self) -> &ServiceName {
        &self.call.target.caller.destination
    }

    fn broke(&self, error: &dyn std::error::Error) -> Refusal {
        Refusal::reset(format!("the connection to service `{}` broke before it answered: {error}", self.destination()))
    }
}

/// Returns the gRPC status of an answer that is nothing but its head.
pub(super) fn grpc_of(head: &ResponseHead) -> Option<u8> {
    if head.payload != Payload::Empty {
        return None;
    }
    head.headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

fn malformed_body() -> Refusal {
    Refusal {
        status: StatusCode::BAD_REQUEST,
        flag: Flag::CallerGone,
        reason: Reason::BadRequest,
        text: "the request's body is malformed or ended early".to_owned(),
    }
}

pub(super) fn unreachable(destination: &ServiceName, why: &str) -> Refusal {
    Refusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        flag: Flag::ConnectFailure,
        reason: Reason::ConnectFailure,
        text: format!("no instance of service `{destination}` could be connected; the last: {why}"),
    }
}

fn overflow(destination: &ServiceName, what: Limited) -> Refusal {
    let text = match what {
        Limited::Priority => {
            format!("service `{destination}` is so busy that only requests of a higher x-weft-priority are sent there")
        }
        Limited::Instances => {
            format!("every instance of service `{destination}` has as many requests from here as it may, for too long")
        }
        _ => format!("service `{destination}` has as many {} under way from here as its limits allow", what.as_str()),
    };
    Refusal { status: StatusCode::SERVICE_UNAVAILABLE, flag: Flag::Overflow, reason: Reason::Overflow(what), text }
}

/// Notes how an attempt ended that was `sent_at` then.
pub(super) fn observe<D: Dial>(
    worker: &D,
    (observer, sent_at): (&Observer, Instant),
    attempt: &Result<Answer, Failed>,
    call: &Call<'_>,
) {
    let now = clock::now();
    match outcome_of(attempt, call) {
        Some(outcome) => worker.observe(observer, outcome, now - sent_at, now),
        None if attempt.is_ok() => observer.time(now - sent_at, now),
        None => {}
    }
}

/// Judges an attempt by what came of it; none: it says nothing of the instance.
fn outcome_of(attempt: &Result<Answer, Failed>, call: &Call<'_>) -> Option<Outcome> {
    let of_head = |head: &ResponseHead| match head.headers.get("grpc-status") {
        Some(status) => Some(grpc_outcome(status)),
        // It is said after the last message.
        None if headers::is_grpc(&call.parts.headers) && head.status == StatusCode::OK => None,
        None => Some(Outcome::of_status(head.status.as_u16())),
    };
    match attempt {
        Ok(answer) => of_head(&answer.head),
        Err(Failed::Answered(answer)) => of_head(&answer.head),
        Err(Failed::Unreached(_) | Failed::Silent(_)) => Some(Outcome::GatewayFailure),
        Err(Failed::Final(refusal)) => matches!(refusal.flag, Flag::Reset | Flag::Timeout | Flag::ConnectFailure)
            .then_some(Outcome::GatewayFailure),
    }
}

/// Judges a `grpc-status`; what is no code counts as 2, UNKNOWN.
pub(super) fn grpc_outcome(status: &HeaderValue) -> Outcome {
    Outcome::of_grpc(status.to_str().ok().and_then(|text| text.parse().ok()).unwrap_or(2))
}

pub(super) fn open_refusal(destination: &ServiceName, error: OpenError) -> Refusal {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    match error {
        OpenError::UnknownService => Refusal {
            status,
            flag: Flag::NoRoute,
            reason: Reason::UnknownService,
            text: format!("no service `{destination}` is registered in the mesh"),
        },
        OpenError::NoInstance { total, critical } => Refusal {
            status,
            flag: Flag::NoHealthy,
            reason: Reason::NoHealthyInstance,
            text: format!("service `{destination}` has no healthy instance ({critical} of {total} are critical)"),
        },
        OpenError::FailsClosed { out, fit } => Refusal {
            status,
            flag: Flag::NoHealthy,
            reason: Reason::FailsClosed,
            text: format!("service `{destination}` fails closed: {out} of {fit} instances that pass are ejected"),
        },
        OpenError::Unreachable { node, reason } => unreachable(destination, &format!("node {node}: {reason}")),
        OpenError::Overflow(what) => overflow(destination, what),
        OpenError::Full { .. } => overflow(destination, Limited::Pending),
        OpenError::Draining => Refusal {
            status,
            flag: Flag::NoHealthy,
            reason: Reason::Draining,
            text: "this agent is shutting down".to_owned(),
        },
    }
}

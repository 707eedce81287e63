//! The caller's side: a server on the app's connection, one tunnel stream per request.
//!
//! ```text
//!   connection (HTTP/1.1 or HTTP/2 by its preface) -> request -> check -> target -> open a stream, at most 3 times
//!        preamble + head + first body bytes ->   ... rest of the body (a task of its own)
//!        <- status byte + head                   <- body, trailers
//! ```
//!
//! Framing is read strictly, by hyper: a request whose length is in doubt (differing Content-Length, a folded header, a
//! final coding other than chunked, a broken chunk) gets 400 and its connection ends. Content-Length beside
//! Transfer-Encoding: chunked alone counts, Content-Length is left out, and the connection ends after the answer (RFC
//! 9112 §6.3 allows it). Nothing is smuggled either way: the tunnel's own frames carry the body, and the app's connection
//! is framed anew from them.
//!
//! Floods: 256 streams a connection; hyper's defaults close a connection after 20 resets that are not yet accepted and
//! 1024 stream errors of the caller's.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use quinn::RecvStream;
use tokio::net::TcpStream;
use tracing::debug;

use super::activity::{Activity, Busy, End, Speaks, Watched, watch};
use super::answer::{Reason, Refusal};
use super::body::{self, BodyError, TunnelBody, TunnelSend};
use super::headers;
use super::metrics::{Edge, Exchange, Flag, Reporter};
use super::pool::WorkerExec;
use super::upgrade::{self, Raw};
use super::{ATTEMPTS_MAX, Dial, HttpState, REPLAY_BYTES_MAX};
use crate::model::ServiceName;
use crate::proxy::head::{HEAD_BYTES_MAX, HeadError, HeadWriter, Inbox, Payload, ResponseHead};
use crate::proxy::{Caller, OpenError, Opened, Route, Source, StreamKind, Tried};

/// Concurrent requests of one HTTP/2 caller.
const H2_STREAMS_MAX: u32 = 256;
/// HTTP/2 windows towards the caller: as towards apps.
const H2_STREAM_WINDOW: u32 = 1024 * 1024;
const H2_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// How an HTTP/2 connection begins; no HTTP/1.1 method begins like it (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI";
/// Endings of a Host that names a mesh service; the longest first.
const HOST_SUFFIXES: [&str; 3] = [".service.consul", ".service.weft", ".weft"];

/// Where a request goes and what counts it.
struct Target {
    caller: Caller,
    edge: Rc<Edge>,
}

/// What the requests of one connection share.
struct Connection<D> {
    worker: Rc<D>,
    /// None: by Host.
    fixed: Option<Rc<Target>>,
    /// The last Host and its target: callers mostly stay with one.
    last: RefCell<Option<(Authority, Rc<Target>)>>,
    activity: Arc<Activity>,
}

/// Serves a caller's connection until it ends.
///
/// # Cancel safety
/// Dropping the future closes the connection and resets the streams of its requests.
pub(crate) async fn serve<D: Dial>(worker: Rc<D>, stream: TcpStream, route: Route) {
    // A failure costs latency only.
    let _nodelay = stream.set_nodelay(true);
    let state = worker.http();
    let fixed = match route {
        Route::ByHost => None,
        Route::Service(caller) => Some(Rc::new(Target { edge: edge_of(&*worker, &caller), caller })),
    };
    let speaks_h2 = match tokio::time::timeout(state.limits.idle, begins_with_preface(&stream)).await {
        Ok(Ok(speaks_h2)) => speaks_h2,
        Ok(Err(error)) => {
            debug!(error = %error, "caller left before its first request");
            return;
        }
        Err(_) => return,
    };
    let activity = Arc::<Activity>::default();
    let io = Watched::new(stream, &activity);
    let connection = Rc::new(Connection {
        worker: Rc::clone(&worker),
        fixed,
        last: RefCell::default(),
        activity: Arc::clone(&activity),
    });
    let service = service_fn(move |request| {
        let connection = Rc::clone(&connection);
        async move { Ok::<_, Infallible>(request_of(&connection, request).await) }
    });
    let ended = if speaks_h2 {
        let mut builder = http2::Builder::new(WorkerExec(Rc::clone(&worker)));
        builder
            .max_concurrent_streams(H2_STREAMS_MAX)
            .initial_stream_window_size(H2_STREAM_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX));
        let mut served = pin!(builder.serve_connection(io, service));
        tokio::select! {
            ended = served.as_mut() => ended,
            _end = watch(&*worker, &activity, Speaks::Http2) => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        }
    } else {
        let mut builder = http1::Builder::new();
        // hyper's own header timeout also ends idle connections and costs a timer per request: `watch` does it.
        builder.max_buf_size(HEAD_BYTES_MAX).max_header_size(HEAD_BYTES_MAX).header_read_timeout(None);
        let mut served = pin!(builder.serve_connection(io, service).with_upgrades());
        tokio::select! {
            ended = served.as_mut() => ended,
            end = watch(&*worker, &activity, Speaks::Http1) => {
                if end == End::Slow {
                    debug!("caller's request head did not arrive in time");
                    return;
                }
                served.as_mut().graceful_shutdown();
                served.await
            }
        }
    };
    if let Err(error) = ended {
        debug!(error = %error, "caller's connection ended");
    }
}

/// Tells whether a connection speaks HTTP/2, without taking its bytes.
async fn begins_with_preface(stream: &TcpStream) -> std::io::Result<bool> {
    let mut start = [0; PREFACE.len()];
    loop {
        let count = stream.peek(&mut start).await?;
        let seen = start.get(..count).unwrap_or_default();
        if count == 0 || !PREFACE.starts_with(seen) || count == PREFACE.len() {
            return Ok(count == PREFACE.len() && seen == PREFACE);
        }
        // Only a caller that sends its first three bytes one by one comes here.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn edge_of<D: Dial>(worker: &D, caller: &Caller) -> Rc<Edge> {
    let source = match &caller.source {
        Source::Service(name) => Some(name),
        Source::Node => None,
    };
    worker.http().edge(Reporter::Source, source, Some(&caller.destination))
}

impl<D: Dial> Connection<D> {
    /// Finds where a request goes.
    fn target(&self, authority: Option<&Authority>) -> Result<Rc<Target>, Refusal> {
        if let Some(fixed) = &self.fixed {
            return Ok(Rc::clone(fixed));
        }
        let refusal = |status, reason, text| Refusal { status, flag: Flag::NoRoute, reason, text };
        let unknown_host = |host: &str| {
            let text = format!("Host `{host}` names no service of the mesh: use NAME.weft or NAME.service.consul");
            refusal(StatusCode::NOT_FOUND, Reason::UnknownHost, text)
        };
        let Some(authority) = authority else { return Err(unknown_host("")) };
        if let Some((last, target)) = &*self.last.borrow()
            && last == authority
        {
            return Ok(Rc::clone(target));
        }
        let Some(name) = service_of_host(authority.host()) else { return Err(unknown_host(authority.host())) };
        if !self.worker.snapshot().peek().services.contains_key(&name) {
            return Err(refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                Reason::UnknownService,
                format!("no service `{name}` is registered in the mesh"),
            ));
        }
        let caller = Caller { source: Source::Node, destination: name };
        let target = Rc::new(Target { edge: edge_of(&*self.worker, &caller), caller });
        *self.last.borrow_mut() = Some((authority.clone(), Rc::clone(&target)));
        Ok(target)
    }
}

/// Returns the service that a host names (hosts ignore case; names are taken in lower case).
fn service_of_host(host: &str) -> Option<ServiceName> {
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    HOST_SUFFIXES.iter().find_map(|suffix| host.strip_suffix(suffix))?.parse().ok()
}

/// A caller's request, taken apart.
struct Call<'a> {
    parts: &'a Parts,
    authority: Option<Authority>,
    target: Rc<Target>,
    payload: Payload,
}

/// Answers one request.
async fn request_of<D: Dial>(connection: &Connection<D>, mut request: Request<Incoming>) -> Response<TunnelBody> {
    let busy = Busy::new(&connection.activity);
    let started = crate::clock::now();
    let grpc = headers::is_grpc(request.headers());
    let version = request.version();
    let checked = headers::check(&request);
    let found = checked.and_then(|authority| Ok((connection.target(authority.as_ref())?, authority)));
    let (target, authority) = match found {
        Ok(found) => found,
        Err(refusal) => {
            let edge = match &connection.fixed {
                Some(target) => Rc::clone(&target.edge),
                None => connection.worker.http().edge(Reporter::Source, None, None),
            };
            return refuse_request(Exchange::new(edge, started), refusal, (version, grpc));
        }
    };
    let mut exchange = Exchange::new(Rc::clone(&target.edge), started);
    let payload = match (request.body().is_end_stream(), headers::upgrade(request.headers())) {
        (true, Some(_)) => Payload::Upgrade,
        (true, None) => Payload::Empty,
        (false, _) => Payload::Frames,
    };
    let upgraded = (payload == Payload::Upgrade).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let call = Call { parts: &parts, authority, target, payload };
    match attempts(&connection.worker, &call, body).await {
        Err(refusal) => refuse_request(exchange, refusal, (version, grpc)),
        Ok(mut answer) => {
            let bodiless = matches!(answer.head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
            if bodiless || parts.method == Method::HEAD {
                answer.head.payload = Payload::Empty;
            }
            exchange.status(answer.head.status);
            if grpc {
                exchange.grpc(&answer.head.headers);
            }
            respond(&connection.worker, answer, exchange, upgraded, busy)
        }
    }
}

/// Refuses a request; one that breaks HTTP's rules ends its HTTP/1.1 connection, for what follows it is in doubt.
fn refuse_request(exchange: Exchange, refusal: Refusal, (version, grpc): (Version, bool)) -> Response<TunnelBody> {
    let in_doubt = matches!(refusal.reason, Reason::BadRequest | Reason::HeadTooLarge);
    let mut response = refuse(exchange, refusal, grpc);
    if in_doubt && version < Version::HTTP_2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn refuse(mut exchange: Exchange, refusal: Refusal, grpc: bool) -> Response<TunnelBody> {
    exchange.finish(refusal.flag);
    let response = refusal.into_response(grpc);
    exchange.status(response.status());
    exchange.grpc(response.headers());
    response
}

/// A response's head and what is left of its stream.
struct Answer {
    head: ResponseHead,
    recv: RecvStream,
    inbox: Inbox,
    /// On an upgrade: the other direction.
    send: Option<TunnelSend>,
}

/// Hands the answer to hyper.
fn respond<D: Dial>(
    worker: &Rc<D>,
    answer: Answer,
    mut exchange: Exchange,
    upgraded: Option<OnUpgrade>,
    busy: Busy,
) -> Response<TunnelBody> {
    let Answer { head, mut recv, mut inbox, send } = answer;
    let ResponseHead { payload, status, headers } = head;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    let body = match (payload, send.zip(upgraded)) {
        (Payload::Upgrade, Some((send, upgraded))) if switches => {
            exchange.finish(Flag::None);
            worker.spawn(async move {
                let _busy = busy;
                match upgraded.await.map(hyper::upgrade::Upgraded::downcast::<Watched>) {
                    Ok(Ok(parts)) => {
                        let raw = Raw { stream: parts.io.into_inner(), read: parts.read_buf };
                        upgrade::relay(raw, send, recv, inbox.take()).await;
                    }
                    Ok(Err(_)) => debug!("upgrade of a foreign connection"),
                    Err(error) => debug!(error = %error, "caller left before the upgrade"),
                }
            });
            let mut response = Response::new(TunnelBody::default());
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            return response;
        }
        _ if switches || payload == Payload::Upgrade => {
            let text = "the destination switched protocols unasked".to_owned();
            return refuse(exchange, Refusal::reset(text), false);
        }
        (Payload::Frames, _) => TunnelBody::stream(recv, inbox, &headers, Some((exchange, busy))),
        _ => {
            // Reads the FIN that came with the head: dropping the stream before it would send STOP_SENDING.
            let _fin = futures_util::FutureExt::now_or_never(recv.read_chunk(1, true));
            exchange.finish(Flag::None);
            TunnelBody::default()
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// A request's body while attempts may still need it again.
struct Upload {
    body: RefCell<Incoming>,
    /// Encoded frames, for another attempt.
    replay: RefCell<Vec<Bytes>>,
    replay_bytes: Cell<usize>,
    replayable: Cell<bool>,
    /// The body came to its end.
    ended: Cell<bool>,
}

impl Upload {
    /// Keeps frames for another attempt, up to the bound.
    fn keep(&self, chunks: &[Bytes]) {
        if !self.replayable.get() {
            return;
        }
        let bytes = chunks.iter().fold(self.replay_bytes.get(), |sum, chunk| sum.saturating_add(chunk.len()));
        self.replay_bytes.set(bytes);
        if bytes > REPLAY_BYTES_MAX {
            self.settle();
        } else {
            self.replay.borrow_mut().extend_from_slice(chunks);
        }
    }

    /// Keeps nothing any more: an attempt was answered, or the body is too long.
    fn settle(&self) {
        self.replayable.set(false);
        self.replay.borrow_mut().clear();
    }
}

/// Sends the rest of a body; a failure resets the stream, and reading the answer says why.
async fn upload<D: Dial>(worker: Rc<D>, upload: Rc<Upload>, mut send: TunnelSend) -> Result<(), BodyError> {
    let mut chunks = Vec::with_capacity(2);
    loop {
        let frame = body::next_frame(|cx| Pin::new(&mut *upload.body.borrow_mut()).poll_frame(cx), &send).await?;
        let Some(frame) = frame else { break };
        body::encode_frame(frame, worker.http(), &mut chunks)?;
        upload.keep(&chunks);
        send.write(&mut chunks).await?;
        chunks.clear();
    }
    upload.ended.set(true);
    send.finish();
    Ok(())
}

/// How one attempt failed.
enum Failed {
    /// The request did not reach an app: another instance may take it.
    Unreached(Refusal),
    /// The stream broke with nothing answered: only what is idempotent may be tried again.
    Silent(Refusal),
    Final(Refusal),
}

/// Sends the request until an instance answers or attempts run out.
async fn attempts<D: Dial>(worker: &Rc<D>, call: &Call<'_>, body: Incoming) -> Result<Answer, Refusal> {
    let state = worker.http();
    let destination = &call.target.caller.destination;
    let head = encode_head(state, call)?;
    let limit = TimeLimit::of(&call.parts.headers, state.limits.response);
    let pending = match call.payload {
        Payload::Frames => Some(begin_upload(body, &call.parts.headers, state).await?),
        Payload::Empty | Payload::Upgrade => None,
    };
    let mut tried = Tried::default();
    let mut failure = None;
    for _ in 0..ATTEMPTS_MAX {
        let opened = match worker.open(&call.target.caller, StreamKind::Http, &mut tried).await {
            Ok(opened) => opened,
            Err(OpenError::Unreachable { node, reason }) => {
                failure = Some(unreachable(destination, &format!("node {node}: {reason}")));
                continue;
            }
            // No instance is left: what the tried ones said is the better answer.
            Err(error) => return Err(failure.unwrap_or_else(|| open_refusal(destination, error))),
        };
        let Opened { send, recv, preamble, .. } = opened;
        let attempt = Attempt { worker, call, head: head.clone(), pending: pending.as_ref(), limit };
        let (refusal, again) = match attempt.run(TunnelSend::new(send), recv, preamble).await {
            Ok(answer) => return Ok(answer),
            Err(Failed::Final(refusal)) => return Err(refusal),
            Err(Failed::Unreached(refusal)) => (refusal, true),
            Err(Failed::Silent(refusal)) => (refusal, call.parts.method.is_idempotent()),
        };
        if !again || !pending.as_ref().is_none_or(|upload| upload.replayable.get()) {
            return Err(refusal);
        }
        debug!(service = %destination, error = refusal.text, "another instance is tried");
        failure = Some(refusal);
    }
    Err(failure.unwrap_or_else(|| unreachable(destination, "no attempt was made")))
}

/// Takes what is there of the body.
async fn begin_upload(mut body: Incoming, headers: &HeaderMap, state: &HttpState) -> Result<Rc<Upload>, Refusal> {
    // hyper answers `Expect: 100-continue` when the body is first asked for: the head goes ahead of it.
    let first = if headers.contains_key(header::EXPECT) {
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
    }))
}

/// Encodes a request's head, with what weft adds.
fn encode_head(state: &HttpState, call: &Call<'_>) -> Result<Bytes, Refusal> {
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
        if !headers.contains_key(headers::REQUEST_ID) {
            let id = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
            writer.header(&headers::REQUEST_ID, id.hyphenated().encode_lower(&mut [0; 36]).as_bytes());
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
enum TimeLimit {
    /// A gRPC stream may answer with its first message, whenever that comes.
    None,
    /// From the end of the request.
    AfterRequest(Duration),
    /// From the beginning: the caller's own `grpc-timeout`.
    Deadline(Duration),
}

impl TimeLimit {
    fn of(headers: &HeaderMap, limit: Duration) -> Self {
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
fn grpc_timeout(text: &str) -> Option<Duration> {
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
struct Attempt<'a, D> {
    worker: &'a Rc<D>,
    call: &'a Call<'a>,
    head: Bytes,
    pending: Option<&'a Rc<Upload>>,
    limit: TimeLimit,
}

impl<D: Dial> Attempt<'_, D> {
    async fn run(self, mut send: TunnelSend, mut recv: RecvStream, preamble: Bytes) -> Result<Answer, Failed> {
        let mut chunks = vec![preamble, self.head.clone()];
        if let Some(upload) = self.pending {
            chunks.extend_from_slice(&upload.replay.borrow());
        }
        match send.write(&mut chunks).await {
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
        let head = result?;
        if let Some(pending) = self.pending {
            pending.settle();
        }
        if let Some(uploading) = uploading {
            self.worker.spawn(async move {
                if let Err(error) = uploading.await {
                    debug!(error = %error, "request body aborted");
                }
            });
        }
        Ok(Answer { head, recv, inbox, send: kept })
    }

    /// Waits for the answer while the body goes up.
    async fn in_time(
        &self,
        mut answer: Pin<&mut impl Future<Output = Result<ResponseHead, Failed>>>,
        uploading: &mut Option<Pin<Box<impl Future<Output = Result<(), BodyError>>>>>,
    ) -> Result<ResponseHead, Failed> {
        let still_uploading = || self.pending.is_some_and(|pending| !pending.ended.get());
        let mut over = pin!(self.limit.over(still_uploading));
        loop {
            tokio::select! {
                biased;
                head = answer.as_mut() => return head,
                result = async { match uploading { Some(uploading) => uploading.as_mut().await, None => std::future::pending().await } } => {
                    *uploading = None;
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
        let mut reached = false;
        loop {
            if !reached && let Some(status) = inbox.take_u8() {
                self.reached(status)?;
                reached = true;
            }
            if reached {
                match inbox.take_response() {
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

    /// Judges the status byte.
    fn reached(&self, status: u8) -> Result<(), Failed> {
        let destination = self.destination();
        match status {
            0 => Ok(()),
            1 => Err(Failed::Unreached(unreachable(destination, "its application refuses connections"))),
            2 => Err(Failed::Unreached(unreachable(destination, "its node does not have the instance"))),
            3 => Err(Failed::Final(Refusal {
                status: StatusCode::FORBIDDEN,
                flag: Flag::Refused,
                reason: Reason::Forbidden,
                text: format!("service `{destination}` does not admit this caller"),
            })),
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

fn malformed_body() -> Refusal {
    Refusal {
        status: StatusCode::BAD_REQUEST,
        flag: Flag::CallerGone,
        reason: Reason::BadRequest,
        text: "the request's body is malformed or ended early".to_owned(),
    }
}

fn unreachable(destination: &ServiceName, why: &str) -> Refusal {
    Refusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        flag: Flag::ConnectFailure,
        reason: Reason::ConnectFailure,
        text: format!("no instance of service `{destination}` could be connected; the last: {why}"),
    }
}

fn open_refusal(destination: &ServiceName, error: OpenError) -> Refusal {
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
        OpenError::Unreachable { node, reason } => unreachable(destination, &format!("node {node}: {reason}")),
        OpenError::Draining => Refusal {
            status,
            flag: Flag::NoHealthy,
            reason: Reason::Draining,
            text: "this agent is shutting down".to_owned(),
        },
    }
}

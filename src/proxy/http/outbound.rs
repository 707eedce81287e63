//! The caller's side: a server on the app's connection, one tunnel stream per request.
//!
//! ```text
//!   connection (HTTP/1.1 or HTTP/2 by its preface) -> request -> check -> target -> `attempt`: at most 3 streams
//!        preamble + head + first body bytes ->   ... rest of the body (a task of its own)
//!        <- status byte + head                   <- body, trailers
//! ```
//!
//! Framing is read strictly: a request whose length is in doubt (`gate`) or whose head is malformed (hyper) gets 400 and
//! its connection ends. Nothing is smuggled: the tunnel's own frames carry the body, and the app's connection is framed anew
//! from them.
//!
//! Leaving HTTP: an upgrade passes as the app answers it; over HTTP/2 a WebSocket comes by an extended CONNECT (RFC 8441) and
//! is asked for as over HTTP/1.1. Any other CONNECT is refused with 501: weft leads to services, and is no way to elsewhere.
//! A refused upgrade ends its HTTP/1.1 connection, since what follows the request may not be HTTP.
//!
//! Floods: 256 streams a connection; hyper's defaults close a connection after 20 resets that are not yet accepted and
//! 1024 stream errors of the caller's. PING and SETTINGS are answered one at a time, so who does not read the answers is
//! not read either.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service as _, service_fn};
use hyper::upgrade::OnUpgrade;
use quinn::RecvStream;
use tokio::net::TcpStream;
use tracing::debug;

use super::Dial;
use super::activity::{Activity, Busy, End, Speaks, Watched};
use super::answer::{Reason, Refusal};
use super::attempt::{Unsent, attempts};
use super::body::{BodyLimit, TunnelBody, TunnelSend};
use super::headers;
use super::metrics::{Edge, Exchange, Flag};
use super::pool::WorkerExec;
use super::upgrade::{self, Raw};
use super::{HttpState, priority, repeat, routed};
use crate::authz::Request as Asked;
use crate::model::ServiceName;
use crate::proxy::head::{HEAD_BYTES_MAX, Inbox, Payload, ResponseHead};
use crate::proxy::metrics::Reporter;
use crate::proxy::relay::IDLE_TIMEOUT;
use crate::proxy::{Caller, Lease, Route, Source};
use crate::trace::{self, OpenSpan, Side};
use crate::traffic::retry::Budget;
use crate::traffic::{Chain, Exposed, Gateway, Traffic};
use crate::upstream::Priority;

/// Concurrent requests of one HTTP/2 caller.
const H2_STREAMS_MAX: u32 = 256;
/// HTTP/2 windows towards the caller: as towards apps.
const H2_STREAM_WINDOW: u32 = 1024 * 1024;
const H2_CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
/// How an HTTP/2 connection begins; no HTTP/1.1 method begins like it (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI";
/// How often a connection that sent only the beginning of that is looked at.
const PEEK_PAUSE_MIN: Duration = Duration::from_millis(1);
const PEEK_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Endings of a Host that names a mesh service; the longest first.
const HOST_SUFFIXES: [&str; 3] = [".service.consul", ".service.weft", ".weft"];

/// Where a request goes and what counts it.
pub(super) struct Target {
    pub(super) caller: Caller,
    pub(super) edge: Rc<Edge>,
    /// What a gateway changes of its head.
    edits: Option<Arc<Exposed>>,
    /// Of the retries to it.
    budget: OnceCell<Arc<Budget>>,
    /// How a request goes that no entry is about, where it has to go by a chain.
    plain: OnceCell<Option<Arc<Chain>>>,
}

impl Target {
    /// Where requests of `caller` go, unchanged.
    pub(super) fn of<D: Dial>(worker: &D, caller: Caller) -> Rc<Self> {
        Rc::new(Self::changed(worker, caller, None))
    }

    fn changed<D: Dial>(worker: &D, caller: Caller, edits: Option<Arc<Exposed>>) -> Self {
        let edge = edge_of(worker, &caller);
        Self { caller, edge, edits, budget: OnceCell::new(), plain: OnceCell::new() }
    }

    /// Returns the budget of the retries to it.
    pub(super) fn budget(&self, state: &HttpState) -> &Budget {
        self.budget.get_or_init(|| state.budget(&self.caller.destination))
    }

    /// Returns the chain of a service that no entry is about.
    fn plain_chain(&self) -> Option<Arc<Chain>> {
        let chain = || Traffic::default().plain_chain(&self.caller.destination).ok().map(Arc::new);
        self.plain.get_or_init(chain).clone()
    }
}

/// How the requests of a connection find where they go.
enum Leads {
    /// All to one service.
    To(Rc<Target>),
    /// To the service that each names.
    ByHost,
    /// As a gateway's entry says of the host that each names.
    ByGateway { gateway: ServiceName, port: u16 },
}

/// What a host was found to mean.
struct Last {
    authority: Authority,
    target: Rc<Target>,
    /// The entry of the gateway that said so.
    entry: Option<Arc<Gateway>>,
}

/// A request that gets no answer: its HTTP/2 stream is reset.
#[derive(Debug, thiserror::Error)]
#[error("a fault resets the stream")]
pub(super) struct Cut;

/// What the requests of one connection share.
pub(super) struct Connection<D> {
    pub(super) worker: Rc<D>,
    leads: Leads,
    /// The last Host and its target: callers mostly stay with one.
    last: RefCell<Option<Last>>,
    /// The Host of the last request.
    host: RefCell<Option<Authority>>,
    pub(super) activity: Arc<Activity>,
    pub(super) from: Option<IpAddr>,
}

/// Serves a caller's connection until it ends.
///
/// # Cancel safety
/// Dropping the future closes the connection and resets the streams of its requests.
pub(crate) fn serve<D: Dial>(worker: Rc<D>, stream: TcpStream, route: Route) -> impl Future<Output = ()> {
    let from = stream.peer_addr().ok().map(|addr| addr.ip());
    serve_from(worker, stream, route, from)
}

/// [`serve`], of a caller whose address is `from`.
pub(super) async fn serve_from<D: Dial>(worker: Rc<D>, stream: TcpStream, route: Route, from: Option<IpAddr>) {
    let state = worker.http();
    let leads = match route {
        Route::ByHost => Leads::ByHost,
        Route::Gateway { gateway, port } => Leads::ByGateway { gateway, port },
        Route::Service(caller) => Leads::To(Target::of(&*worker, caller)),
    };
    let speaks_h2 = match tokio::time::timeout(state.limits.idle, begins_with_preface(&stream, state.limits.head)).await
    {
        Ok(Ok(speaks_h2)) => speaks_h2,
        Ok(Err(error)) => {
            debug!(error = %error, "caller left before its first request");
            return;
        }
        Err(_) => return,
    };
    let speaks = if speaks_h2 { Speaks::Http2 } else { Speaks::Http1 };
    let activity = state.watchman.add(&worker, speaks);
    let io = Watched::new(stream, &activity, speaks, &state.malformed);
    let connection = Rc::new(Connection {
        worker: Rc::clone(&worker),
        leads,
        last: RefCell::default(),
        host: RefCell::default(),
        activity: Arc::clone(&activity),
        from,
    });
    let service = service_fn(move |request| {
        let connection = Rc::clone(&connection);
        async move { request_of(&connection, request).await }
    });
    let ended = if speaks_h2 {
        let mut builder = http2::Builder::new(WorkerExec(Rc::clone(&worker)));
        builder
            .max_concurrent_streams(H2_STREAMS_MAX)
            .initial_stream_window_size(H2_STREAM_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
            .enable_connect_protocol();
        // In a box, for it is moved a dozen times on its way through hyper and tokio, whole: 5.5 KB, of which a request is 0.3.
        let service = service_fn(move |request| Box::pin(service.call(request)));
        // The larger of the two by far: in a box, so that a connection of the other kind has no room for it.
        let mut served = Box::pin(builder.serve_connection(io, service));
        match activity.unless_ended(served.as_mut()).await {
            Ok(ended) => ended,
            Err(_end) => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        }
    } else {
        let mut builder = http1::Builder::new();
        // hyper's own header timeout also ends idle connections and costs a timer per request: the watchman does it.
        builder.max_buf_size(HEAD_BYTES_MAX).max_header_size(HEAD_BYTES_MAX).header_read_timeout(None);
        let (mut io, mut service) = (io, service);
        loop {
            // In a box, so that a connection that rests has no room for it.
            let mut served = Box::new(builder.serve_connection(io, service).with_upgrades());
            match activity.unless_ended(Pin::new(&mut *served)).await {
                Ok(ended) => break ended,
                Err(End::Slow) => return debug!("caller's request head did not arrive in time"),
                Err(End::Idle) => {
                    let Some(parts) = served.into_parts() else { return };
                    // A connection that rests is between two requests, so nothing was read ahead. Empty, it keeps 8 KiB alive.
                    let has_read_ahead = !parts.read_buf.is_empty();
                    drop(parts.read_buf);
                    if has_read_ahead || !activity.rest(parts.io.stream()).await {
                        return;
                    }
                    (io, service) = (parts.io, parts.service);
                    continue;
                }
                Err(End::Quiet) => {
                    Pin::new(&mut *served).graceful_shutdown();
                    if let Ok(ended) = activity.unless_cut(Pin::new(&mut *served)).await {
                        break ended;
                    }
                }
                Err(End::Cut) => {}
            }
            // RST, not FIN: that is the fault.
            let _closed = served.into_parts().map(|parts| parts.io.stream().set_zero_linger());
            return;
        }
    };
    if let Err(error) = ended {
        debug!(error = %error, "caller's connection ended");
    }
}

/// Tells whether a connection speaks HTTP/2, without taking its bytes; once one has come, within `limit`.
async fn begins_with_preface(stream: &TcpStream, limit: Duration) -> std::io::Result<bool> {
    let mut start = [0; PREFACE.len()];
    let (mut until, mut pause) = (None, PEEK_PAUSE_MIN);
    loop {
        let count = stream.peek(&mut start).await?;
        let seen = start.get(..count).unwrap_or_default();
        if count == 0 || !PREFACE.starts_with(seen) || count == PREFACE.len() {
            return Ok(count == PREFACE.len() && seen == PREFACE);
        }
        // Only a caller that sends its first three bytes one by one comes here.
        let now = crate::clock::now();
        if now >= *until.get_or_insert(now + limit) {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PEEK_PAUSE_MAX);
    }
}

pub(super) fn edge_of<D: Dial>(worker: &D, caller: &Caller) -> Rc<Edge> {
    let source = match &caller.source {
        Source::Service(name) => Some(name),
        Source::Node => None,
    };
    worker.http().edge(Reporter::Source, source, Some(&caller.destination))
}

impl<D: Dial> Connection<D> {
    /// Finds where a request goes.
    fn target(&self, authority: Option<&Authority>) -> Result<Rc<Target>, Refusal> {
        match &self.leads {
            Leads::To(target) => Ok(Rc::clone(target)),
            Leads::ByHost => self.target_of_host(authority),
            Leads::ByGateway { gateway, port } => self.target_of_gateway(authority, (gateway, *port)),
        }
    }

    fn target_of_host(&self, authority: Option<&Authority>) -> Result<Rc<Target>, Refusal> {
        let unknown = |host: &str| {
            unknown_host(format!("Host `{host}` names no service of the mesh: use NAME.weft or NAME.service.consul"))
        };
        let Some(authority) = authority else { return Err(unknown("")) };
        if let Some(last) = &*self.last.borrow()
            && last.authority == *authority
        {
            return Ok(Rc::clone(&last.target));
        }
        let Some(name) = service_of_host(authority.host()) else { return Err(unknown(authority.host())) };
        let snapshot = self.worker.snapshot().peek();
        // A name that only entries know may lead to another service.
        if !snapshot.services.contains_key(&name) && snapshot.traffic.chain(&name).is_none() {
            let (status, reason) = (StatusCode::SERVICE_UNAVAILABLE, Reason::UnknownService);
            return Err(Refusal { status, flag: Flag::NoRoute, reason, text: snapshot.why_unknown(name.as_str()) });
        }
        let target = Target::of(&*self.worker, Caller { source: Source::Node, destination: name });
        *self.last.borrow_mut() = Some(Last { authority: authority.clone(), target: Rc::clone(&target), entry: None });
        Ok(target)
    }

    /// Asks the gateway's entry as it is at this moment: a connection outlives changes.
    fn target_of_gateway(
        &self,
        authority: Option<&Authority>,
        (gateway, port): (&ServiceName, u16),
    ) -> Result<Rc<Target>, Refusal> {
        let snapshot = self.worker.snapshot().peek();
        let host = authority.map_or("", Authority::host);
        let unknown = || {
            unknown_host(format!(
                "Host `{host}` names no service that ingress gateway `{gateway}` leads to by port {port}"
            ))
        };
        let entry = snapshot.traffic.gateway(gateway).ok_or_else(unknown)?;
        if let Some(last) = &*self.last.borrow()
            && authority == Some(&last.authority)
            && last.entry.as_ref().is_some_and(|of| Arc::ptr_eq(of, entry))
        {
            return Ok(Rc::clone(&last.target));
        }
        let listener = entry.listeners.iter().find(|listener| listener.port == port && listener.protocol.is_http());
        let (name, exposed) = listener.and_then(|listener| listener.find(host)).ok_or_else(unknown)?;
        if exposed.service.is_none() && !snapshot.is_exposed_unnamed(&name) {
            return Err(unknown());
        }
        let caller = Caller { source: Source::Service(gateway.clone()), destination: name };
        let is_changed = !(exposed.request_headers.is_empty() && exposed.response_headers.is_empty());
        let edits = is_changed.then(|| Arc::clone(exposed));
        let target = Rc::new(Target::changed(&*self.worker, caller, edits));
        if let Some(authority) = authority {
            let (authority, entry) = (authority.clone(), Some(Arc::clone(entry)));
            *self.last.borrow_mut() = Some(Last { authority, target: Rc::clone(&target), entry });
        }
        Ok(target)
    }

    /// Returns what counts a request that goes nowhere.
    fn edge_of_none(&self) -> Rc<Edge> {
        let source = match &self.leads {
            Leads::To(target) => return Rc::clone(&target.edge),
            Leads::ByHost => None,
            Leads::ByGateway { gateway, .. } => Some(gateway),
        };
        self.worker.http().edge(Reporter::Source, source, None)
    }
}

fn unknown_host(text: String) -> Refusal {
    Refusal { status: StatusCode::NOT_FOUND, flag: Flag::NoRoute, reason: Reason::UnknownHost, text }
}

impl<D: Dial> Connection<D> {
    /// A connection of a caller at `from`.
    #[cfg(test)]
    pub(super) fn of_caller(worker: Rc<D>, from: IpAddr) -> Self {
        let (last, host, activity) = (RefCell::default(), RefCell::default(), Arc::default());
        Self { worker, leads: Leads::ByHost, last, host, activity, from: Some(from) }
    }

    /// Takes out of a request's head what its caller may not say.
    pub(super) fn believe(&self, headers: &mut HeaderMap) {
        // Before routes and intentions look at the head: they must not be asked about what somebody made up.
        let trusts = |from: IpAddr| from.is_loopback() || self.worker.snapshot().peek().traffic.trusts(from);
        if !self.from.is_some_and(trusts) {
            headers::forget_forwarded(headers, self.from);
            headers.remove(repeat::RETRY);
            // Who is outside could have everything recorded: a trace begins here.
            if self.worker.http().tracer.is_some() {
                trace::forget(headers);
            }
        }
    }

    /// Begins the span of a request that is recorded, and makes it the parent of what comes next.
    fn begin_span(&self, request: &mut Request<Incoming>, authority: Option<&Authority>) -> Option<Box<OpenSpan>> {
        let tracer = self.worker.http().tracer.as_ref()?;
        let asked = || {
            let how = (request.version(), headers::is_grpc(request.headers()));
            trace::Asked::of((request.method(), request.uri().path_and_query()), authority, how)
        };
        let span = tracer.begin(Side::Source, request.headers(), asked)?;
        span.context().inject(request.headers_mut());
        Some(span)
    }

    /// How much a request with `headers` matters.
    pub(super) fn priority(&self, caller: &Caller, headers: &HeaderMap) -> Priority {
        let snapshot = self.worker.snapshot().peek();
        let guard = snapshot.upstreams.guard(caller.source.service(), &caller.destination);
        priority::of_request(headers, &guard.limits, self.from)
    }
}

/// Returns the service that a host names (hosts ignore case; names are taken in lower case).
pub(in crate::proxy) fn service_of_host(host: &str) -> Option<ServiceName> {
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    HOST_SUFFIXES.iter().find_map(|suffix| host.strip_suffix(suffix))?.parse().ok()
}

/// A caller's request, taken apart.
pub(super) struct Call<'a> {
    pub(super) parts: &'a Parts,
    pub(super) authority: Option<Authority>,
    pub(super) target: Rc<Target>,
    pub(super) payload: Payload,
    /// Where the caller is.
    pub(super) from: Option<IpAddr>,
    /// How much it matters.
    pub(super) priority: Priority,
    /// A cookie that the caller gets with the answer.
    pub(super) cookie: Cell<Option<HeaderValue>>,
    /// Keeps the connection from resting while a body comes, also after the answer.
    pub(super) uploads: Cell<Option<Busy>>,
    /// The caller's connection, for interim answers.
    pub(super) activity: &'a Activity,
    /// The id that it gets, if it has none: all its attempts and copies have the same.
    pub(super) id: OnceCell<[u8; 36]>,
}

impl Call<'_> {
    /// Returns the id that the request gets.
    pub(super) fn made_id(&self) -> &[u8] {
        self.id.get_or_init(|| {
            let id = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
            let mut text = [0; 36];
            id.hyphenated().encode_lower(&mut text);
            text
        })
    }
}

/// An upgrade that the caller asks for.
pub(super) struct Upgrading {
    on: OnUpgrade,
    version: Version,
    /// How long nothing may move on it either way.
    idle: Duration,
}

impl Upgrading {
    /// Takes it from a request that asks for one.
    pub(super) fn of(request: &mut Request<Incoming>, payload: Payload) -> Option<Self> {
        (payload == Payload::Upgrade).then(|| Self {
            on: hyper::upgrade::on(&mut *request),
            version: request.version(),
            idle: IDLE_TIMEOUT,
        })
    }

    /// The same, ended by silence for so long, if an entry says so.
    pub(super) fn idle_for(self, idle: Option<Duration>) -> Self {
        Self { idle: idle.unwrap_or(self.idle), ..self }
    }
}

/// Answers one request; one whose connection may carry something else than HTTP next is the last.
async fn request_of<D: Dial>(
    connection: &Connection<D>,
    mut request: Request<Incoming>,
) -> Result<Response<TunnelBody>, Cut> {
    headers::websocket_of_h2(&mut request);
    let leaves_http = request.body().is_end_stream() && headers::leaves_http(&request);
    let mut response = answer_of(connection, request).await?;
    if leaves_http && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

async fn answer_of<D: Dial>(
    connection: &Connection<D>,
    mut request: Request<Incoming>,
) -> Result<Response<TunnelBody>, Cut> {
    let busy = Busy::new(&connection.activity);
    let started = crate::clock::now();
    let grpc = headers::is_grpc(request.headers());
    let version = request.version();
    if version == Version::HTTP_2 {
        headers::join_cookies(request.headers_mut());
    }
    let checked = headers::check(&request, &connection.host);
    connection.believe(request.headers_mut());
    let span = connection.begin_span(&mut request, checked.as_ref().ok().and_then(Option::as_ref));
    let found = checked.and_then(|authority| Ok((connection.target(authority.as_ref())?, authority)));
    let (target, authority) = match found {
        Ok(found) => found,
        Err(refusal) => {
            let exchange = Exchange::new(connection.edge_of_none(), started).traced(span);
            return Ok(refuse_request(exchange, refusal, (version, grpc)));
        }
    };
    let edits = target.edits.clone();
    if let Some(edits) = &edits {
        edits.request_headers.apply(request.headers_mut());
    }
    let chain = connection.worker.snapshot().peek().traffic.chain(&target.caller.destination).cloned();
    // A time limit counts from here, whatever the request waits for, and to the end of its response.
    let chain = chain.or_else(|| routed::is_limited(request.headers(), grpc).then(|| target.plain_chain()).flatten());
    if let Some(chain) = chain {
        // In a box: a request that no entry is about has no room for it.
        let began = (busy, started, span);
        let routed = Box::pin(routed::answer(connection, chain, (request, authority, target), began));
        return Ok(edited(edits, routed.await?));
    }
    let mut exchange = Exchange::new(Rc::clone(&target.edge), started).traced(span);
    let asked = Asked { method: request.method().as_str(), path: request.uri().path(), headers: request.headers() };
    if let Err(refusal) = admit(&*connection.worker, &target.caller, &asked) {
        return Ok(refuse_request(exchange, refusal, (version, grpc)));
    }
    let payload = payload_of(&request);
    let upgraded = Upgrading::of(&mut request, payload);
    let (parts, body) = request.into_parts();
    let uploads = (payload == Payload::Frames).then(|| Busy::new(&connection.activity));
    let (from, cookie, id) = (connection.from, Cell::default(), OnceCell::new());
    let (uploads, activity) = (Cell::new(uploads), &*connection.activity);
    let priority = connection.priority(&target.caller, &parts.headers);
    let call = Call { parts: &parts, authority, target, payload, from, priority, cookie, uploads, activity, id };
    let response = match attempts(&connection.worker, &call, body, started).await {
        Err(refusal) => refuse_call(&*connection.worker, exchange, refusal, (version, grpc)),
        Ok(mut answer) => {
            begin_answer(&mut answer, &call, &mut exchange, grpc);
            respond(&connection.worker, answer, exchange, upgraded, busy)
        }
    };
    Ok(edited(edits, response))
}

/// Changes an answer's head as the gateway wants it, by which its request came.
fn edited(edits: Option<Arc<Exposed>>, mut response: Response<TunnelBody>) -> Response<TunnelBody> {
    if let Some(edits) = edits {
        edits.response_headers.apply(response.headers_mut());
    }
    response
}

/// How a request's body comes.
pub(super) fn payload_of(request: &Request<Incoming>) -> Payload {
    match (request.body().is_end_stream(), headers::upgrade(request.headers())) {
        (true, Some(_)) => Payload::Upgrade,
        (true, None) => Payload::Empty,
        (false, _) => Payload::Frames,
    }
}

/// Notes an answer's head, gives the caller the cookie that was made for it, and notes that some answers have no body
/// whatever they say.
pub(super) fn begin_answer(answer: &mut Answer, call: &Call<'_>, exchange: &mut Exchange, grpc: bool) {
    let bodiless = matches!(answer.head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if bodiless || call.parts.method == Method::HEAD {
        answer.head.payload = Payload::Empty;
    }
    if let Some(cookie) = call.cookie.take() {
        answer.head.headers.append(header::SET_COOKIE, cookie);
    }
    exchange.answered();
    exchange.status(answer.head.status);
    if grpc {
        exchange.grpc(&answer.head.headers);
    }
}

/// Asks the intentions before anything is dialled: the destination would refuse as well, later.
pub(super) fn admit<D: Dial>(worker: &D, caller: &Caller, asked: &Asked<'_>) -> Result<(), Refusal> {
    let ends = (caller.source.service(), &caller.destination);
    let decided = worker.http().policy().request(&worker.snapshot().peek().policy, Reporter::Source, ends, asked);
    decided.map_err(|denied| Refusal::denied(denied.text(ends.0, ends.1)))
}

/// Refuses a request that came to nothing; what a limit refused is counted once, however many instances were full.
pub(super) fn refuse_call<D: Dial>(
    worker: &D,
    exchange: Exchange,
    refusal: Refusal,
    how: (Version, bool),
) -> Response<TunnelBody> {
    if let Reason::Overflow(what) = refusal.reason {
        worker.overflowed(what);
    }
    refuse_request(exchange, refusal, how)
}

/// Refuses a request; one that breaks HTTP's rules ends its HTTP/1.1 connection, for what follows it is in doubt.
pub(super) fn refuse_request(
    exchange: Exchange,
    refusal: Refusal,
    (version, grpc): (Version, bool),
) -> Response<TunnelBody> {
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
pub(super) struct Answer {
    pub(super) head: ResponseHead,
    pub(super) recv: RecvStream,
    pub(super) inbox: Inbox,
    /// On an upgrade: the other direction.
    pub(super) send: Option<TunnelSend>,
    /// How long its body may take.
    pub(super) limit: Option<Box<BodyLimit>>,
    pub(super) lease: Lease,
    /// The request's body, if nobody wants it.
    pub(super) unsent: Option<Unsent>,
    /// The destination has sent the request to its app a second time.
    pub(super) is_second: bool,
}

/// Hands the answer to hyper.
pub(super) fn respond<D: Dial>(
    worker: &Rc<D>,
    answer: Answer,
    mut exchange: Exchange,
    upgraded: Option<Upgrading>,
    busy: Busy,
) -> Response<TunnelBody> {
    let Answer { head, mut recv, mut inbox, send, limit, lease, unsent, is_second: _ } = answer;
    let ResponseHead { payload, status, headers } = head;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    // To an extended CONNECT any 2xx says that the handshake was accepted (RFC 8441 §5).
    if status.is_success() && upgraded.as_ref().is_some_and(|upgraded| upgraded.version >= Version::HTTP_2) {
        let text = format!("the application answered {status} to a WebSocket's handshake, without switching to it");
        return refuse(exchange, Refusal::reset(text), false);
    }
    let body = match (payload, send.zip(upgraded)) {
        (Payload::Upgrade, Some((send, upgraded))) if switches => {
            exchange.finish(Flag::None);
            let Upgrading { on, version, idle } = upgraded;
            worker.spawn(async move {
                let (_busy, _lease) = (busy, lease);
                match on.await {
                    Ok(upgraded) => upgrade::relay(Raw::of::<Watched>(upgraded), send, recv, inbox.take(), idle).await,
                    Err(error) => debug!(error = %error, "caller left before the upgrade"),
                }
            });
            let mut response = Response::new(TunnelBody::default());
            *response.headers_mut() = headers;
            headers::switched(&mut response, version);
            return response;
        }
        _ if switches || payload == Payload::Upgrade => {
            let text = "the destination switched protocols unasked".to_owned();
            return refuse(exchange, Refusal::reset(text), false);
        }
        (Payload::Frames, _) => {
            TunnelBody::stream(recv, inbox, &headers, Some((exchange, busy))).limited(limit).holding(lease, unsent)
        }
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

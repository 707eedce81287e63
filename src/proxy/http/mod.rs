//! HTTP between an app and its mesh: one QUIC stream per request.
//!
//! ```text
//!   app --HTTP/1.1, HTTP/2--> outbound --head + body frames on a fresh QUIC stream--> inbound --HTTP--> app
//!                              routes, retries, answers errors                        pool of app connections
//! ```
//!
//! Everything of one worker runs on its one thread: `Rc`, `Cell` and `RefCell`, no lock.
//!
//! Invariants: a message that is not whole at its end is aborted on the other side, never shortened; no header that
//! frames a message crosses the tunnel; the caller's identity comes from the tunnel's certificate alone.
//! Not here: choosing instances and tunnels (`proxy`), intentions, what entries say about a request (`traffic`).

mod activity;
mod answer;
mod app_h2;
mod attempt;
mod body;
mod call;
mod gate;
mod h2_connections;
mod headers;
pub(crate) mod inbound;
mod interims;
mod io;
pub(super) mod key;
pub(crate) mod metrics;
mod mirror;
pub(crate) mod outbound;
mod pool;
mod priority;
mod race;
mod repeat;
mod routed;
mod upgrade;
mod websocket;

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use self::activity::Watchman;
use self::metrics::{Edge, EdgeCache, HttpMetrics, TrafficSeries};
use self::pool::Pool;
use super::authorize::PolicyMetrics;
use super::head::RequestHead;
use super::metrics::Reporter;
use super::{Caller, OpenError, Opened, Source, StreamKind, Tried, Worker};
use crate::catalogue::SnapshotReader;
use crate::metrics::Expiring;
use crate::model::{Instance, ServiceName};
use crate::pki::PeerIdentity;
use crate::routing::{Limited, Observer, Outcome, OverRate, Rates, key_of};
use crate::trace::Tracer;
use crate::traffic::Resolved;
use crate::traffic::hedge::Answers;
use crate::traffic::retry::{Budget, Budgets};
use crate::upstream::{self, RateKey};
use bytes::{Bytes, BytesMut};
use foldhash::HashMap;
use http::HeaderValue;
use prometheus::IntCounterVec;
use tokio::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// What HTTP needs of its worker. [`Worker`] is one; the tests' loopback pair is the other.
pub(crate) trait Dial: 'static {
    /// Opens a stream to an instance that `tried` does not hold yet.
    fn open(
        self: &Rc<Self>,
        caller: &Caller,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> impl Future<Output = Result<Opened, OpenError>>;
    /// Opens a stream to an instance of a target that `tried` does not hold yet.
    fn open_to(
        self: &Rc<Self>,
        source: &Source,
        to: &Resolved,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> impl Future<Output = Result<Opened, OpenError>>;
    /// Notes that the app of `instance` was reached.
    fn connected(&self, _instance: &Instance) {}
    /// Notes that the app of `instance` was not reached: others come first for a while.
    fn connect_failed(&self, _instance: &Instance) {}
    /// Notes how a call ended.
    fn observe(&self, observer: &Observer, outcome: Outcome, took: Duration, now: Instant) {
        observer.observe(outcome, took, now);
    }
    /// Notes that a limit refused a request.
    fn overflowed(&self, _what: Limited) {}
    /// The catalogue.
    fn snapshot(&self) -> &SnapshotReader;
    /// Runs a task on the worker's thread; the worker ends it at the end of the drain.
    fn spawn(&self, future: impl Future<Output = ()> + 'static);
    /// Runs a task on the worker's thread that the drain does not wait for.
    fn spawn_untracked(&self, future: impl Future<Output = ()> + 'static);
    /// Returns what the drain waits for until it is dropped.
    fn task_token(&self) -> Option<TaskTrackerToken>;
    /// Tells whether the agent drains.
    fn stopping(&self) -> bool;
    /// The state of this module.
    fn http(&self) -> &HttpState;
}

impl Dial for Worker {
    async fn open(
        self: &Rc<Self>,
        caller: &Caller,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        Worker::open(self, caller, kind, tried).await
    }

    async fn open_to(
        self: &Rc<Self>,
        source: &Source,
        to: &Resolved,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        Worker::open_to(self, source, to, kind, tried).await
    }

    fn connected(&self, instance: &Instance) {
        Worker::connected(self, instance);
    }

    fn connect_failed(&self, instance: &Instance) {
        Worker::connect_failed(self, instance);
    }

    fn observe(&self, observer: &Observer, outcome: Outcome, took: Duration, now: Instant) {
        Worker::observe(self, observer, outcome, took, now);
    }

    fn overflowed(&self, what: Limited) {
        Worker::overflowed(self, what);
    }

    fn snapshot(&self) -> &SnapshotReader {
        Worker::snapshot(self)
    }

    fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        Worker::spawn(self, future);
    }

    fn spawn_untracked(&self, future: impl Future<Output = ()> + 'static) {
        Worker::spawn_untracked(self, future);
    }

    fn task_token(&self) -> Option<TaskTrackerToken> {
        Some(Worker::task_token(self))
    }

    fn stopping(&self) -> bool {
        Worker::stopping(self)
    }

    fn http(&self) -> &HttpState {
        &self.http
    }
}

/// Attempts of one request in all, over different instances: Envoy's usual setting.
const ATTEMPTS_MAX: usize = 3;
/// Body bytes kept for another attempt; beyond it the request is not replayed.
const REPLAY_BYTES_MAX: usize = 64 * 1024;
/// Body bytes that are awaited to go out with the head.
const FIRST_BYTES_MAX: usize = 16 * 1024;
/// Pieces up to this size are copied behind their frame header: cheaper than one more chunk in the send queue.
const COPY_BYTES_MAX: usize = 2048;
/// Growth step of the encode buffer: tens of heads per allocation.
const SCRATCH_BYTES: usize = 16 * 1024;
/// Callers whose identity header is kept ready: far above the peers that one worker serves at once.
const PEERS_MAX: usize = 4096;

/// Limits, with their defaults' reasons.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// A head that began must be whole after at most this: slow senders hold no connection. 30 s, as nginx and hyper.
    pub(crate) head: Duration,
    /// From the request's end to the response's head: 60 s, nginx' proxy_read_timeout. gRPC goes by `grpc-timeout`.
    pub(crate) response: Duration,
    /// A caller's connection without a request: 1 h, Envoy's idle timeout.
    pub(crate) idle: Duration,
    /// Connecting to an app on this host: 5 s, a full backlog answers nothing.
    pub(crate) connect: Duration,
    /// HTTP/2 connections of a worker to one app: 64, which have 6,400 streams and more where servers allow the usual 100 to
    /// 250; without an end, an app that allows one would get a connection for each request.
    pub(crate) app_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            response: Duration::from_mins(1),
            idle: Duration::from_hours(1),
            connect: Duration::from_secs(5),
            app_connections: 64,
        }
    }
}

/// One worker's HTTP state: pools and caches. Single-threaded.
pub(crate) struct HttpState {
    limits: Limits,
    edges: EdgeCache,
    policy: PolicyMetrics,
    /// What records spans, where they are exported.
    tracer: Option<Tracer>,
    limited: Expiring<IntCounterVec>,
    malformed: IntCounterVec,
    rates: Arc<Rates>,
    /// What chains did to requests.
    traffic: TrafficSeries,
    /// Retries that are granted, by destination.
    budgets: Arc<Budgets>,
    /// How long answers took, by destination and route, where a percentile hedges.
    answers: RefCell<HashMap<(ServiceName, Option<usize>), Answers>>,
    /// Copies that are on their way to mirrors.
    mirrors: Rc<Cell<usize>>,
    pool: Rc<Pool>,
    pub(crate) watchman: Rc<Watchman>,
    scratch: RefCell<BytesMut>,
    /// By the address of the identity, which the weak reference keeps from being given to another.
    peers: RefCell<HashMap<usize, (Weak<PeerIdentity>, HeaderValue)>>,
}

impl HttpState {
    /// Makes an empty state.
    pub(crate) fn new(metrics: HttpMetrics) -> Self {
        Self::with_limits(metrics, Limits::default())
    }

    /// Makes an empty state with other limits.
    pub(crate) fn with_limits(metrics: HttpMetrics, limits: Limits) -> Self {
        Self {
            limits,
            policy: metrics.policy.of_worker(),
            tracer: None,
            limited: metrics.limited.clone(),
            malformed: metrics.malformed.clone(),
            rates: Arc::new(Rates::new(crate::clock::now())),
            traffic: metrics.traffic.clone(),
            budgets: Arc::default(),
            answers: RefCell::default(),
            mirrors: Rc::default(),
            edges: EdgeCache::new(metrics),
            pool: Rc::default(),
            watchman: Rc::default(),
            scratch: RefCell::default(),
            peers: RefCell::default(),
        }
    }

    /// Shares the buckets of rate limits and the budgets of retries with other workers.
    pub(crate) fn sharing(self, rates: Arc<Rates>, budgets: Arc<Budgets>) -> Self {
        Self { rates, budgets, ..self }
    }

    /// Returns the retry budget of a destination.
    fn budget(&self, destination: &ServiceName) -> Arc<Budget> {
        self.budgets.of(destination)
    }

    /// Holds a request against the limits of its service at this instance.
    fn admit_rate(
        &self,
        table: &upstream::Table,
        service: &ServiceName,
        source: Option<&ServiceName>,
        head: &RequestHead,
    ) -> Result<(), OverRate> {
        let Some(rules) = table.rates(service) else { return Ok(()) };
        let key = |key: &RateKey| match key {
            RateKey::All => 0,
            RateKey::Source => source.map_or(1, |source| key_of(source.as_str().as_bytes())),
            RateKey::Header(name) => head.headers.get(name).map_or(1, |value| key_of(value.as_bytes())),
        };
        let admitted = self.rates.admit(service, rules, Some(head.path.path()), key, crate::clock::now());
        admitted.inspect_err(|_| self.limited.with(&[service.as_str()]).inc())
    }

    /// Holds a connection of bytes, or a flow of UDP, against the limits of its service at this instance; without headers, all
    /// count together where a header's values would be told apart.
    pub(crate) fn admit_stream_rate(
        &self,
        table: &upstream::Table,
        service: &ServiceName,
        source: Option<&ServiceName>,
    ) -> Result<(), OverRate> {
        let Some(rules) = table.rates(service) else { return Ok(()) };
        let key = |key: &RateKey| match key {
            RateKey::All => 0,
            RateKey::Source => source.map_or(1, |source| key_of(source.as_str().as_bytes())),
            RateKey::Header(_) => 1,
        };
        let admitted = self.rates.admit(service, rules, None, key, crate::clock::now());
        admitted.inspect_err(|_| self.limited.with(&[service.as_str()]).inc())
    }

    /// Begins the drain: every caller's connection ends after its current requests (`Connection: close`, GOAWAY).
    pub(crate) fn drain(&self) {
        self.watchman.drain();
    }

    /// Records spans as `tracer` says; none: nothing is recorded, and headers of traces pass as they come.
    pub(crate) fn tracing(self, tracer: Option<Tracer>) -> Self {
        Self { tracer, ..self }
    }

    /// Lets go of handles of metrics that are not used.
    pub(crate) fn let_go(&self) {
        self.edges.let_go();
    }

    /// Asks intentions and counts what they say.
    pub(crate) fn policy(&self) -> &PolicyMetrics {
        &self.policy
    }

    fn edge(&self, reporter: Reporter, source: Option<&ServiceName>, destination: Option<&ServiceName>) -> Rc<Edge> {
        self.edges.edge(reporter, source, destination)
    }

    /// Encodes into the worker's buffer and returns what was written.
    fn encode<E>(&self, write: impl FnOnce(&mut BytesMut) -> Result<(), E>) -> Result<Bytes, E> {
        let mut scratch = self.scratch.borrow_mut();
        if scratch.capacity() < 1024 {
            scratch.reserve(SCRATCH_BYTES);
        }
        match write(&mut scratch) {
            Ok(()) => Ok(scratch.split().freeze()),
            Err(error) => {
                scratch.clear();
                Err(error)
            }
        }
    }

    /// Returns the identity header for requests of `peer`.
    fn client_cert(&self, peer: &Rc<PeerIdentity>) -> Option<HeaderValue> {
        let key = Rc::as_ptr(peer).addr();
        let mut peers = self.peers.borrow_mut();
        if let Some((_, value)) = peers.get(&key) {
            return Some(value.clone());
        }
        let value = HeaderValue::try_from(format!("URI={}", peer.id)).ok()?;
        if peers.len() >= PEERS_MAX {
            peers.retain(|_, (peer, _)| peer.strong_count() > 0);
        }
        if peers.len() < PEERS_MAX {
            peers.insert(key, (Rc::downgrade(peer), value.clone()));
        }
        Some(value)
    }
}

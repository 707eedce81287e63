//! One data-plane worker: a thread, a current-thread runtime, and all that a request needs.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{debug, error, info, warn};

use super::calls::Calls;
use super::http::HttpState;
use super::http::metrics::HttpMetrics;
use super::inbound::Stream;
use super::metrics::{Edges, ProxyMetrics};
use super::open::OpenTunnels;
use super::preamble::{Preamble, StreamKind};
use super::runners::Runners;
use super::tunnel::{Lease, Tunnel, TunnelKey, Tunnels};
use super::udp::{UdpMetrics, UdpState};
use super::views::Views;
use super::{Died, Listeners, ProxyError, authorize, dead, inbound, inspect, listener};
use crate::catalogue::{Instance, ServiceEntry, SnapshotReader};
use crate::clock;
use crate::model::{HealthStatus, NodeName, ServiceName};
use crate::routing::{
    Ask, Balancer, ConnectBackoff, Flow, GroupView, Limited, NoInstance, Notice, Observer, Outcome, Picked, Rates,
    Shared, Tried, Turn, WAIT_MAX,
};
use crate::traffic::{Resolved, Target};
use crate::transport::{Credentials, Lane, LiveConnections, MeshPort, WorkerEndpoint};

/// Connections that one worker holds from local apps, and streams from peers: 5 KB each when idle.
pub(super) const CONNECTIONS_MAX: usize = 16_384;
/// A tunnel that was dialled for nearly all of the time that a call may wait gives a stream at once, or is full.
const STREAM_WAIT_MIN: Duration = Duration::from_millis(100);
/// How often unused tunnels are let go.
const SWEEP: Duration = Duration::from_secs(30);
/// Turns of vanished services are dropped at most this often, however fast the catalogue changes.
const FORGET_REST: Duration = Duration::from_secs(1);
/// Peers are told of the end within this time, or find out by themselves.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// A tunnel that carried a response stays open this long: closing drops what is in flight, and a few round trips later
/// it has arrived.
const CLOSE_LINGER: Duration = Duration::from_millis(300);
/// Application code of a connection that ends because the agent stops.
const CODE_STOPPING: u32 = 0;

/// Whose SVID a tunnel shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A registered service's.
    Service(ServiceName),
    /// The node's own.
    Node,
}

impl Source {
    /// Returns the service, if it is one.
    pub(crate) fn service(&self) -> Option<&ServiceName> {
        match self {
            Self::Service(service) => Some(service),
            Self::Node => None,
        }
    }
}

/// Who calls whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The caller.
    pub(crate) source: Source,
    /// The called service.
    pub(crate) destination: ServiceName,
}

/// Who calls which service, and how.
type Ends<'a> = (&'a Source, &'a ServiceName, StreamKind);

/// Where a local connection leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// To one service.
    Service(Caller),
    /// To whatever each request's authority names.
    ByHost,
    /// To whatever a gateway's entry says of each request's authority.
    Gateway {
        /// The gateway's name.
        gateway: ServiceName,
        /// Which of its listeners.
        port: u16,
    },
}

/// A stream to an instance; nothing is sent yet.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Towards the instance.
    pub(crate) send: quinn::SendStream,
    /// From the instance.
    pub(crate) recv: quinn::RecvStream,
    /// Goes out before anything else, best in one write with the first data.
    pub(crate) preamble: Bytes,
    /// Who was picked.
    pub(crate) instance: Arc<Instance>,
    /// To be held while either half is used.
    pub(crate) lease: Lease,
}

/// Why no stream came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OpenError {
    /// The catalogue has no such service.
    UnknownService,
    /// None of its instances may get the call.
    NoInstance {
        /// How many there are.
        total: usize,
        /// How many of them are critical.
        critical: usize,
    },
    /// The instance's node cannot be reached; another instance may do better.
    Unreachable {
        /// Which node.
        node: NodeName,
        /// Why.
        reason: String,
    },
    /// The instance's node takes no more streams for now; another instance may do better.
    Full {
        /// Which node.
        node: NodeName,
    },
    /// As much is under way as the limits allow.
    Overflow(Limited),
    /// This agent stops.
    Draining,
}

/// Why a tunnel gave no stream.
enum Unopened {
    /// It could not be dialled, or broke.
    Failed(String),
    /// It has as many streams as the peer allows.
    Full,
}

/// What a worker's thread is started with.
pub(super) struct Setup {
    pub(super) port: MeshPort,
    pub(super) lane: Lane,
    pub(super) index: usize,
    pub(super) reset_key: [u8; 64],
    pub(super) credentials: Arc<dyn Credentials>,
    pub(super) live: LiveConnections,
    pub(super) snapshot: SnapshotReader,
    pub(super) shared_http: Option<SocketAddr>,
    pub(super) listener_retry: Duration,
    pub(super) metrics: ProxyMetrics,
    pub(super) open: OpenTunnels,
    pub(super) http_metrics: HttpMetrics,
    pub(super) udp_metrics: UdpMetrics,
    pub(super) drain: CancellationToken,
    pub(super) drain_timeout: Duration,
    /// Holds one token per worker that still drains.
    pub(super) draining: TaskTracker,
    pub(super) listeners: Arc<watch::Sender<Listeners>>,
    pub(super) questions: mpsc::Receiver<inspect::Asked>,
    pub(super) balancing: Arc<Shared>,
    pub(super) rates: Arc<Rates>,
    pub(super) notices: mpsc::Sender<Notice>,
    pub(super) died: Arc<watch::Sender<Died>>,
}

/// Everything that a request needs. Lives on one thread.
pub(crate) struct Worker {
    pub(super) index: usize,
    pub(super) endpoint: WorkerEndpoint,
    pub(super) shared_http: Option<SocketAddr>,
    /// A port that cannot be bound is tried again after this long.
    pub(super) listener_retry: Duration,
    pub(super) listeners: Arc<watch::Sender<Listeners>>,
    pub(super) metrics: ProxyMetrics,
    pub(super) edges: Edges,
    /// The state of `proxy::http`.
    pub(crate) http: HttpState,
    /// The state of `proxy::udp`.
    pub(super) udp: UdpState,
    /// Connections from local apps.
    pub(super) connections: Rc<Cell<usize>>,
    /// Streams from peers.
    pub(super) streams: Rc<Cell<usize>>,
    /// When the last response was written to a peer.
    pub(super) responded_at: Cell<Option<Instant>>,
    /// Tasks that serve peers' streams.
    pub(super) runners: Runners<Stream>,
    /// Streams of peers that are served.
    pub(super) calls: Rc<Calls>,
    snapshot: SnapshotReader,
    tunnels: Tunnels,
    balancer: RefCell<Balancer>,
    backoff: RefCell<ConnectBackoff>,
    notices: mpsc::Sender<Notice>,
    /// Instances of the targets that chains lead to.
    views: RefCell<Views>,
    tasks: TaskTracker,
    draining: TaskTracker,
    drain: CancellationToken,
    closed: CancellationToken,
}

/// Starts a worker's thread and waits until its endpoint is up.
pub(super) fn start(setup: Setup) -> Result<JoinHandle<()>, ProxyError> {
    let worker = setup.index;
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let run = move || {
        let (died, drain) = (Arc::clone(&setup.died), setup.drain.clone());
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| thread(setup, &ready)));
        let reason = match ended {
            Ok(()) if drain.is_cancelled() => return,
            Ok(()) => "it ended by itself",
            Err(_panic) => "it panicked",
        };
        died.send_replace(Some((worker, reason.to_owned())));
    };
    let thread = std::thread::Builder::new().name(format!("weft-worker-{worker}")).spawn(run);
    let thread = thread.map_err(|source| ProxyError::Thread { worker, source })?;
    match started.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_gone) => Err(ProxyError::Died { worker, reason: "it panicked at its start".to_owned() }),
    }
}

type Ready = std::sync::mpsc::SyncSender<Result<(), ProxyError>>;

fn thread(setup: Setup, ready: &Ready) {
    let worker = setup.index;
    // The starter waits for exactly one message, so a send cannot block, and fails only if the starter is gone.
    // One queue for weft's and quinn's tasks: a local set beside the runtime costs a wake-up per turn between the two.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(source) => return drop(ready.send(Err(ProxyError::Thread { worker, source }))),
    };
    runtime.block_on(async {
        let drain_timeout = setup.drain_timeout;
        match Worker::new(setup) {
            Ok((worker, questions)) => {
                let _starter_is_gone = ready.send(Ok(()));
                Rc::new(worker).run(questions, drain_timeout).await;
            }
            Err(source) => drop(ready.send(Err(ProxyError::Endpoint { worker, source }))),
        }
    });
}

impl Worker {
    fn new(setup: Setup) -> Result<(Self, mpsc::Receiver<inspect::Asked>), crate::transport::BindError> {
        let endpoint = WorkerEndpoint::new(setup.port, setup.lane, &setup.reset_key, setup.credentials, setup.live)?;
        let worker = Self {
            index: setup.index,
            endpoint,
            shared_http: setup.shared_http,
            listener_retry: setup.listener_retry,
            listeners: setup.listeners,
            edges: Edges::new(setup.metrics.clone()),
            http: HttpState::new(setup.http_metrics).sharing(setup.rates),
            udp: UdpState::new(setup.udp_metrics),
            connections: Rc::default(),
            streams: Rc::default(),
            responded_at: Cell::new(None),
            runners: Runners::default(),
            calls: Rc::default(),
            snapshot: setup.snapshot,
            tunnels: Tunnels::new(setup.metrics.clone(), setup.open),
            metrics: setup.metrics,
            // Neither the workers of a node nor the nodes move in step.
            balancer: RefCell::new(Balancer::with_shared(rand::random(), setup.balancing)),
            backoff: RefCell::default(),
            notices: setup.notices,
            views: RefCell::default(),
            tasks: TaskTracker::new(),
            draining: setup.draining,
            drain: setup.drain,
            closed: CancellationToken::new(),
        };
        Ok((worker, setup.questions))
    }

    /// Serves until the drain of all workers is over. The loops run here: a panic of one is the worker's end.
    ///
    /// A socket that leaves the mesh port's group moves another into its place, and datagrams go to the wrong worker:
    /// so none closes while another has something open.
    async fn run(self: Rc<Self>, questions: mpsc::Receiver<inspect::Asked>, drain_timeout: Duration) {
        let sweep = async {
            loop {
                tokio::time::sleep(SWEEP).await;
                self.tunnels.sweep();
            }
        };
        let drains = self.draining.token();
        let drained = async {
            self.drain.cancelled().await;
            self.http.drain();
            self.tasks.close();
            self.draining.close();
            let all = async {
                self.tasks.wait().await;
                drop(drains);
                self.draining.wait().await;
                if let Some(at) = self.responded_at.get() {
                    tokio::time::sleep_until(at + CLOSE_LINGER).await;
                }
            };
            if tokio::time::timeout(drain_timeout, all).await.is_err() {
                info!(worker = self.index, open = self.tasks.len(), "drain timeout: cutting what is open");
            }
        };
        tokio::select! {
            () = drained => {}
            () = async { tokio::join!(listener::run(&self), inbound::run(&self), sweep, self.forget_vanished(), dead::run(&self), authorize::run(&self), inspect::run(&self, questions)); } => {}
        }
        self.closed.cancel();
        self.tunnels.clear();
        let close = self.endpoint.close(CODE_STOPPING.into(), "agent stops");
        let _peers_find_out = tokio::time::timeout(CLOSE_TIMEOUT, close).await;
    }

    /// Opens a stream to an instance of `caller.destination` that `tried` does not hold, and adds it there.
    ///
    /// After [`OpenError::Unreachable`] and [`OpenError::Full`], and after a status that allows it, the caller may ask again.
    ///
    /// # Cancel safety
    /// Cancelling leaves at most an unused stream, which is reset.
    pub(crate) async fn open(
        self: &Rc<Self>,
        caller: &Caller,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if self.closed.is_cancelled() {
            return Err(OpenError::Draining);
        }
        let service = || self.snapshot.peek().services.get(&caller.destination).cloned();
        let to = (&caller.source, &caller.destination, kind);
        let picked = self.pick_in_turn(to, || service().ok_or(OpenError::UnknownService), tried).await?;
        self.dial(to, picked, None).await
    }

    /// Opens a stream to an instance of the first target of `to` that has one which `tried` does not hold; adds it there.
    /// A target with as much under way as its limits allow has one: what is too much for it goes nowhere else.
    ///
    /// # Cancel safety
    /// As [`Worker::open`].
    pub(crate) async fn open_to(
        self: &Rc<Self>,
        source: &Source,
        to: &Resolved,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if self.closed.is_cancelled() {
            return Err(OpenError::Draining);
        }
        let mut first = None;
        for target in std::iter::once(&to.target).chain(&to.failover) {
            let ends = (source, &target.service, kind);
            match self.pick_in_turn(ends, || self.instances(target), tried).await {
                Ok(picked) => return self.dial(ends, picked, to.connect_timeout).await,
                Err(error @ OpenError::Overflow(_)) => return Err(error),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or(OpenError::UnknownService))
    }

    /// Picks an instance of what `service` returns; where all have as much as they bear, waits for a turn.
    ///
    /// # Cancel safety
    /// Cancelling leaves the queue; the next one is called.
    async fn pick_in_turn(
        &self,
        ends: Ends<'_>,
        service: impl Fn() -> Result<Arc<ServiceEntry>, OpenError>,
        tried: &RefCell<Tried>,
    ) -> Result<Picked, OpenError> {
        let found = service()?;
        let mut picked = self.pick(ends, &found, &mut tried.borrow_mut());
        if matches!(picked, Err(OpenError::Overflow(Limited::Instances))) {
            let entered = self.enter(ends, &found, &tried.borrow());
            picked = match entered {
                Some(Ok(turn)) => self.wait_in_turn(ends, service, tried, &turn).await,
                Some(Err(what)) => Err(OpenError::Overflow(what)),
                None => picked,
            };
        }
        picked
    }

    async fn wait_in_turn(
        &self,
        ends: Ends<'_>,
        service: impl Fn() -> Result<Arc<ServiceEntry>, OpenError>,
        tried: &RefCell<Tried>,
        turn: &Turn,
    ) -> Result<Picked, OpenError> {
        loop {
            let called = tokio::time::timeout_at(turn.until(), poll_fn(|context| turn.poll_called(context)));
            if called.await.is_err() {
                self.metrics.queued.with_label_values(&["timeout"]).inc();
                return Err(OpenError::Overflow(Limited::Instances));
            }
            tried.borrow_mut().is_called = true;
            let picked = service().and_then(|service| self.pick(ends, &service, &mut tried.borrow_mut()));
            tried.borrow_mut().is_called = false;
            if !matches!(picked, Err(OpenError::Overflow(Limited::Instances))) {
                self.metrics.queued.with_label_values(&[if picked.is_ok() { "served" } else { "refused" }]).inc();
                return picked;
            }
        }
    }

    /// Enters the queue of a service; none: such calls do not wait.
    fn enter(
        &self,
        (source, destination, kind): Ends<'_>,
        service: &ServiceEntry,
        tried: &Tried,
    ) -> Option<Result<Turn, Limited>> {
        if kind != StreamKind::Http || !tried.priority.waits() {
            return None;
        }
        let snapshot = self.snapshot.peek();
        let (source, now) = (source.service(), clock::now());
        let ask = Ask { snapshot: &snapshot, source, destination, service, flow: Flow::Request, now };
        Some(self.balancer.borrow_mut().enter(&ask, tried).map_err(|_| Limited::Pending))
    }

    /// Returns the instances of a target.
    pub(super) fn instances(&self, target: &Arc<Target>) -> Result<Arc<ServiceEntry>, OpenError> {
        let snapshot = self.snapshot.peek();
        let service = snapshot.services.get(&target.service).ok_or(OpenError::UnknownService)?;
        if target.view.is_none() {
            return Ok(Arc::clone(service));
        }
        let here = snapshot.nodes.get(&snapshot.local_node).map_or("", |node| &node.info.datacenter);
        Ok(self.views.borrow_mut().of(target, service, here))
    }

    /// Picks an instance of `service`, which are those of `destination` or some of them, that `tried` does not hold, and adds
    /// it there.
    fn pick(
        &self,
        (source, destination, kind): Ends<'_>,
        service: &ServiceEntry,
        tried: &mut Tried,
    ) -> Result<Picked, OpenError> {
        let snapshot = self.snapshot.peek();
        let flow = match kind {
            StreamKind::Http => Flow::Request,
            StreamKind::Tcp | StreamKind::Udp => Flow::Connection,
        };
        let (source, now) = (source.service(), clock::now());
        let ask = Ask { snapshot: &snapshot, source, destination, service, flow, now };
        let picked = self.balancer.borrow_mut().pick(&ask, tried, &self.backoff.borrow());
        match picked {
            // The balancer comes back to what was tried where there is nothing else; one call meets an instance once.
            Ok(picked) if !tried.contains(&picked.instance) => {
                tried.add(Arc::clone(&picked.instance));
                Ok(picked)
            }
            Err(NoInstance::Overflow { what, .. }) => Err(OpenError::Overflow(what)),
            Ok(_) | Err(_) => Err(no_instance(service)),
        }
    }

    /// Opens a stream to the picked instance of `destination`, connecting to its node within `limit` if there is one.
    async fn dial(
        self: &Rc<Self>,
        (source, destination, kind): Ends<'_>,
        Picked { instance, load }: Picked,
        limit: Option<Duration>,
    ) -> Result<Opened, OpenError> {
        let waiting = load.wait().ok_or(OpenError::Overflow(Limited::Pending))?;
        let node = &instance.node.info;
        let unreachable = |reason| OpenError::Unreachable { node: node.name.clone(), reason };
        let key = TunnelKey {
            source: source.service().cloned(),
            node: node.name.clone(),
            addr: node.mesh_addr,
            generation: instance.node.generation,
        };
        let opened = self.stream(&key, destination, limit).await;
        drop(waiting);
        let ((send, recv), tunnel) = match opened {
            Ok(opened) => opened,
            // As much is under way there as may be: no fault of the instance, so nothing is counted against it.
            Err(Unopened::Full) => return Err(OpenError::Full { node: node.name.clone() }),
            Err(Unopened::Failed(reason)) => {
                self.connect_failed(&instance);
                self.observe(load.observer(), Outcome::GatewayFailure, Duration::ZERO);
                return Err(unreachable(reason));
            }
        };
        let preamble = Preamble { kind, instance: instance.record.id.clone(), service: destination.clone() }.encode();
        Ok(Opened { send, recv, preamble, instance, lease: Lease::new(tunnel, load) })
    }

    /// Notes that a limit refused a call.
    pub(crate) fn overflowed(&self, what: Limited) {
        self.metrics.overflowed(what);
    }

    /// Notes how a call ended, and tells what that did to the instance.
    pub(crate) fn observe(&self, observer: &Observer, outcome: Outcome, took: Duration) {
        observer.observe(outcome, took, clock::now());
        self.tell_notices();
    }

    /// Passes on what was ejected or came back.
    pub(super) fn tell_notices(&self) {
        for notice in self.balancer.borrow().take_notices() {
            let Notice { service, node, instance, until, cause } = &notice;
            if let Some(until) = until {
                let out_for = until.saturating_duration_since(clock::now());
                self.metrics.ejections.with_label_values(&[cause.as_str()]).inc();
                info!(%service, %node, %instance, cause = cause.as_str(), ?out_for, "instance is ejected: it fails");
            } else {
                info!(%service, %node, %instance, "ejected instance is back: a request succeeded");
            }
            // The agent's ledger is behind by hundreds: others do without the hint.
            let _untold = self.notices.try_send(notice);
        }
    }

    /// Notes that `instance` could not be connected: it is left out for a while if there are others.
    pub(crate) fn connect_failed(&self, instance: &Instance) {
        let left_out = self.backoff.borrow_mut().failed(instance, clock::now());
        debug!(node = %instance.node.info.name, instance = %instance.record.id, ?left_out, "instance backs off");
    }

    /// Notes that the app of `instance` is connected.
    pub(crate) fn connected(&self, instance: &Instance) {
        self.backoff.borrow_mut().succeeded(instance);
    }

    /// Tells whom the next call to `service` goes to.
    pub(super) fn next(&self, ask: &Ask<'_>) -> Result<Arc<Instance>, NoInstance> {
        self.balancer.borrow_mut().peek(ask, &self.backoff.borrow())
    }

    /// Shows what this worker knows of the instances of a call.
    pub(super) fn group(&self, ask: &Ask<'_>) -> GroupView {
        self.balancer.borrow_mut().view(ask)
    }

    /// Tells whether `instance` could not be connected lately.
    pub(super) fn is_avoided(&self, instance: &Instance, now: Instant) -> bool {
        self.backoff.borrow().is_avoided(instance, now)
    }

    /// Drops the turns of services that are gone, as the catalogue changes.
    async fn forget_vanished(&self) {
        let mut changes = self.snapshot.subscribe();
        while changes.changed().await.is_ok() {
            let snapshot = Arc::clone(&changes.borrow_and_update());
            self.balancer.borrow_mut().forget_vanished(&snapshot);
            tokio::time::sleep(FORGET_REST).await;
        }
    }

    /// Opens a stream on the tunnel of `key`; a tunnel that turns out to be lost is dialled once more, in what is left of the
    /// time. A tunnel that does not come within `limit` has failed; one that gives no stream in that time is full.
    async fn stream(
        &self,
        key: &TunnelKey,
        destination: &ServiceName,
        limit: Option<Duration>,
    ) -> Result<((quinn::SendStream, quinn::RecvStream), Rc<Tunnel>), Unopened> {
        let patience = limit.map_or(WAIT_MAX, |limit| limit.min(WAIT_MAX));
        let until = clock::now() + patience;
        let left = || until.saturating_duration_since(clock::now()).max(STREAM_WAIT_MIN.min(patience));
        let dialling = self.tunnel(key, destination);
        let dialled = match limit {
            // A dial has a time limit of its own, and all who wait for it learn how it ended.
            None => dialling.await,
            Some(limit) => {
                let late = || Err(format!("no connection within {limit:?}, the connect timeout"));
                within(limit, dialling).await.unwrap_or_else(late)
            }
        };
        let mut tunnel = dialled.map_err(Unopened::Failed)?;
        let mut is_second = false;
        loop {
            let opened = within(left(), tunnel.connection.open_bi()).await;
            match opened {
                Some(Ok(streams)) => return Ok((streams, tunnel)),
                None => return Err(Unopened::Full),
                Some(Err(lost)) if is_second => return Err(Unopened::Failed(lost.to_string())),
                Some(Err(_lost)) => self.tunnels.forget(key, &tunnel),
            }
            is_second = true;
            let late = || Err(format!("the tunnel to {} was lost, and no other came in time", key.node));
            let again = within(left(), self.tunnel(key, destination)).await.unwrap_or_else(late);
            tunnel = again.map_err(Unopened::Failed)?;
        }
    }

    /// Returns a tunnel to a node that may serve `destination`.
    async fn tunnel(&self, key: &TunnelKey, destination: &ServiceName) -> Result<Rc<Tunnel>, String> {
        let tunnel = self.tunnels.get(key, &self.endpoint).await.map_err(|error| error.to_string())?;
        let scope = &tunnel.peer.scope;
        if !scope.covers(destination.as_str()) {
            self.metrics.outside_scope.inc();
            warn!(node = %key.node, %scope, service = %destination, "node announces a service outside its scope");
            return Err(format!("{} may not serve {destination}: its scope is `{scope}`", key.node));
        }
        Ok(tunnel)
    }

    /// Returns the tunnels.
    pub(super) fn tunnels(&self) -> &Tunnels {
        &self.tunnels
    }

    /// Asks a peer's host whether its mesh port is closed.
    pub(super) async fn is_port_refused(&self, addr: SocketAddr) -> bool {
        self.endpoint.is_port_refused(addr).await
    }

    /// Returns the catalogue.
    pub(crate) fn snapshot(&self) -> &SnapshotReader {
        &self.snapshot
    }

    /// Runs a task on this worker's thread, which ends it when it ends itself; a panic ends that task alone.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let panics = Panics(self.metrics.panics.clone());
        // `map`, for an async block would hold the future twice: as it came and as it runs.
        self.tasks.spawn_local(future.map(move |()| drop(panics)));
    }

    /// Runs a task that the drain does not wait for.
    pub(super) fn spawn_untracked(&self, future: impl Future<Output = ()> + 'static) {
        let panics = Panics(self.metrics.panics.clone());
        tokio::task::spawn_local(future.map(move |()| drop(panics)));
    }

    /// Runs a task that the drain does not wait for, until it ends or the handle is used.
    pub(super) fn spawn_abortable(&self, future: impl Future<Output = ()> + 'static) -> AbortHandle {
        spawn_abortable(&self.metrics.panics, future)
    }

    /// Returns what the drain waits for until it is dropped.
    pub(super) fn task_token(&self) -> TaskTrackerToken {
        self.tasks.token()
    }

    /// Tells whether the agent drains.
    pub(crate) fn stopping(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Waits until the agent drains.
    pub(super) async fn drains(&self) {
        self.drain.cancelled().await;
    }

    /// Waits until the drain is over.
    pub(super) async fn closes(&self) {
        self.closed.cancelled().await;
    }
}

/// Runs a task on this worker's thread until it ends or the handle is used; a panic, which is counted, ends it alone.
pub(super) fn spawn_abortable(
    panics: &prometheus::IntCounter,
    future: impl Future<Output = ()> + 'static,
) -> AbortHandle {
    let panics = Panics(panics.clone());
    tokio::task::spawn_local(future.map(move |()| drop(panics))).abort_handle()
}

/// Says how many instances there are, and how many of them are critical.
fn no_instance(service: &ServiceEntry) -> OpenError {
    let is_critical = |instance: &&Arc<Instance>| instance.status == HealthStatus::Critical;
    let critical = service.instances.iter().filter(is_critical).count();
    OpenError::NoInstance { total: service.instances.len(), critical }
}

/// Waits for `future` for at most `limit`; one that is ready at once costs no timer and no look at the clock.
///
/// # Cancel safety
/// That of `future`.
pub(crate) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    if let Poll::Ready(output) = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        return Some(output);
    }
    tokio::time::timeout(limit, future).await.ok()
}

/// Counts the panic that it is dropped by; the runtime catches it.
pub(super) struct Panics(prometheus::IntCounter);

impl Drop for Panics {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.inc();
            error!("a connection's task panicked; the worker goes on");
        }
    }
}

/// Counts something while it lives; a count has a bound.
pub(super) struct Slot(Rc<Cell<usize>>);

impl Slot {
    /// Takes one of `most`; none if all are taken.
    pub(super) fn take(count: &Rc<Cell<usize>>, most: usize) -> Option<Self> {
        (count.get() < most).then(|| {
            count.set(count.get() + 1);
            Self(Rc::clone(count))
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

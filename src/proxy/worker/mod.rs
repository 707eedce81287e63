//! One data-plane worker: a thread, a current-thread runtime, and all that a request needs.
//!
//! Its life is here; how a call gets a stream to an instance is `opening`.

mod opening;

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

use futures_util::FutureExt as _;
use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{debug, error, info};

pub(crate) use self::opening::{OpenError, Opened};
use super::calls::Calls;
use super::evening::{Evening, Handed};
use super::http::HttpState;
use super::http::metrics::HttpMetrics;
use super::inbound::Stream;
use super::metrics::{Edges, ProxyMetrics};
use super::open::OpenTunnels;
use super::paths::Paths;
use super::runners::Runners;
use super::tunnel::Tunnels;
use super::udp::{Accepted, Ports, UdpMetrics, UdpState};
use super::views::Views;
use super::{Died, Listeners, ProxyError, authorize, dead, inbound, inspect, listener};
use crate::catalogue::SnapshotReader;
use crate::clock;
use crate::hearsay::Seldom;
use crate::model::{Instance, ServiceName};
use crate::routing::{
    Ask, Balancer, ConnectBackoff, GroupView, Limited, NoInstance, Notice, Observer, Outcome, Rates, Shared,
};
use crate::trace::Tracer;
use crate::traffic::retry::Budgets;
use crate::transport::{Credentials, Lane, LiveConnections, MeshPort, WorkerEndpoint};

/// Connections that one worker holds from local apps, and streams from peers: 5 KB each when idle.
pub(super) const CONNECTIONS_MAX: usize = 16_384;
/// How often tunnels are looked at, and what is not used of them, of handles of metrics and of series is let go.
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

/// What a worker's thread is started with.
pub(super) struct Setup {
    pub(super) port: MeshPort,
    pub(super) lane: Lane,
    pub(super) index: usize,
    pub(super) reset_key: [u8; 64],
    /// Of where tunnels lead: drawn once for all workers.
    pub(super) dealing: u64,
    pub(super) credentials: Arc<dyn Credentials>,
    pub(super) live: LiveConnections,
    pub(super) snapshot: SnapshotReader,
    pub(super) shared_http: Option<SocketAddr>,
    pub(super) listener_retry: Duration,
    pub(super) metrics: ProxyMetrics,
    pub(super) open: OpenTunnels,
    pub(super) http_metrics: HttpMetrics,
    pub(super) tracer: Option<Tracer>,
    pub(super) udp_metrics: UdpMetrics,
    pub(super) udp_accepted: Arc<Accepted>,
    pub(super) udp_ports: Arc<Ports>,
    pub(super) drain: CancellationToken,
    pub(super) drain_timeout: Duration,
    /// Holds one token per worker that still drains.
    pub(super) draining: TaskTracker,
    pub(super) listeners: Arc<watch::Sender<Listeners>>,
    pub(super) questions: mpsc::Receiver<inspect::Asked>,
    pub(super) evening: Arc<Evening>,
    pub(super) handed: mpsc::Receiver<Handed>,
    pub(super) balancing: Arc<Shared>,
    pub(super) rates: Arc<Rates>,
    pub(super) budgets: Arc<Budgets>,
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
    /// The ports that take datagrams, of all workers.
    pub(super) udp_ports: Arc<Ports>,
    /// Connections from local apps.
    pub(super) connections: Rc<Cell<usize>>,
    /// How those are dealt: the same at all workers.
    pub(super) evening: Arc<Evening>,
    /// Streams from peers.
    pub(super) streams: Rc<Cell<usize>>,
    /// When the last response was written to a peer.
    pub(super) responded_at: Cell<Option<Instant>>,
    /// Tasks that serve peers' streams.
    pub(super) runners: Runners<Stream>,
    /// Streams of peers that are served.
    pub(super) calls: Rc<Calls>,
    /// Those of all tunnels, both ways.
    pub(super) paths: Rc<Paths>,
    snapshot: SnapshotReader,
    tunnels: Tunnels,
    balancer: RefCell<Balancer>,
    backoff: RefCell<ConnectBackoff>,
    notices: mpsc::Sender<Notice>,
    /// Nodes that announce what is outside their scope, at each call.
    outside_told: Seldom,
    /// Streams of peers that are not of their service's protocol.
    pub(super) unfit_told: Seldom,
    /// Instances of the targets that chains lead to.
    views: RefCell<Views>,
    tasks: TaskTracker,
    draining: TaskTracker,
    drain: CancellationToken,
    closed: CancellationToken,
}

/// What others ask of a worker.
struct Queues {
    questions: mpsc::Receiver<inspect::Asked>,
    handed: mpsc::Receiver<Handed>,
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
            Ok((worker, queues)) => {
                let _starter_is_gone = ready.send(Ok(()));
                Rc::new(worker).run(queues, drain_timeout).await;
            }
            Err(source) => drop(ready.send(Err(ProxyError::Endpoint { worker, source }))),
        }
    });
}

impl Worker {
    fn new(setup: Setup) -> Result<(Self, Queues), crate::transport::BindError> {
        let endpoint = WorkerEndpoint::new(
            setup.port,
            (setup.lane, setup.dealing),
            &setup.reset_key,
            setup.credentials,
            setup.live,
        )?;
        let paths = Paths::new(setup.metrics.paths.clone());
        let worker = Self {
            index: setup.index,
            endpoint,
            shared_http: setup.shared_http,
            listener_retry: setup.listener_retry,
            listeners: setup.listeners,
            edges: Edges::new(setup.metrics.clone()),
            http: HttpState::new(setup.http_metrics).sharing(setup.rates, setup.budgets).tracing(setup.tracer),
            udp: UdpState::new(setup.udp_metrics, setup.udp_accepted),
            udp_ports: setup.udp_ports,
            connections: Rc::default(),
            evening: setup.evening,
            streams: Rc::default(),
            responded_at: Cell::new(None),
            runners: Runners::default(),
            calls: Rc::default(),
            snapshot: setup.snapshot,
            tunnels: Tunnels::new(setup.metrics.clone(), setup.open, Rc::clone(&paths)),
            paths,
            metrics: setup.metrics,
            // Neither the workers of a node nor the nodes move in step.
            balancer: RefCell::new(Balancer::with_shared(rand::random(), setup.balancing)),
            backoff: RefCell::default(),
            notices: setup.notices,
            outside_told: Seldom::default(),
            unfit_told: Seldom::default(),
            views: RefCell::default(),
            tasks: TaskTracker::new(),
            draining: setup.draining,
            drain: setup.drain,
            closed: CancellationToken::new(),
        };
        Ok((worker, Queues { questions: setup.questions, handed: setup.handed }))
    }

    /// Serves until the drain of all workers is over. The loops run here: a panic of one is the worker's end.
    ///
    /// A socket that leaves the mesh port's group moves another into its place, and datagrams go to the wrong worker:
    /// so none closes while another has something open.
    async fn run(self: Rc<Self>, queues: Queues, drain_timeout: Duration) {
        let Queues { questions, handed } = queues;
        let sweep = async {
            loop {
                tokio::time::sleep(SWEEP).await;
                self.tunnels.sweep();
                self.paths.look();
                self.edges.let_go();
                self.udp.let_go();
                self.http.let_go();
                // The series are those of all workers; one that has stopped ends the agent.
                if self.index == 0 {
                    self.metrics.expire(clock::now());
                }
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
            () = async { tokio::join!(listener::run(&self), listener::take_handed(&self, handed), inbound::run(&self), sweep, self.forget_vanished(), dead::run(&self), authorize::run(&self), inspect::run(&self, questions)); } => {}
        }
        self.closed.cancel();
        self.tunnels.clear();
        let close = self.endpoint.close(CODE_STOPPING.into(), "agent stops");
        let _peers_find_out = tokio::time::timeout(CLOSE_TIMEOUT, close).await;
    }

    /// Notes that a limit refused a call.
    pub(crate) fn overflowed(&self, what: Limited) {
        self.metrics.overflowed(what);
    }

    /// Notes how a call ended, and tells what that did to the instance.
    pub(crate) fn observe(&self, observer: &Observer, outcome: Outcome, took: Duration, now: Instant) {
        observer.observe(outcome, took, now);
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
        self.evening.shun(self.index);
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

    /// Returns the tunnels.
    pub(super) fn tunnels(&self) -> &Tunnels {
        &self.tunnels
    }

    /// Asks a peer's host whether its mesh port is closed; what it said `lately` is an answer.
    pub(super) async fn is_port_refused(&self, addr: SocketAddr, lately: Duration) -> bool {
        self.endpoint.is_port_refused(addr, lately).await
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

    /// Returns what the drain of all workers waits for until it is dropped.
    pub(super) fn drain_token(&self) -> TaskTrackerToken {
        self.draining.token()
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

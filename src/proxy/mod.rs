//! The data plane: local ports into the mesh, tunnels between nodes, local apps behind them.
//!
//! ```text
//!            worker k of N: one thread, one runtime, one endpoint
//!   app -> listener -> outbound | http::outbound -> open -> tunnel ==QUIC==> inbound | http::inbound -> relay -> app
//!                      udp::outbound ------------------------------------------> udp::inbound
//! ```
//!
//! Invariants: workers share nothing but the snapshot and atomic metric handles; a panic in one connection ends that
//! connection; a stream of a peer is served only after its certificate was verified and the intentions allow it; losing
//! gossip changes nothing here, the last snapshot is served.
//! Not here: who is in the mesh (`gossip`), what is registered (`registry`), which instance is best (`routing`).

mod announce;
mod app_socket;
mod authorize;
mod calls;
mod dead;
mod ejections;
mod evening;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod head;
pub(crate) mod http;
mod inbound;
mod inspect;
mod listener;
#[doc(hidden)]
pub mod measured;
mod metrics;
mod open;
mod outbound;
mod paths;
mod preamble;
mod relay;
mod runners;
mod shares;
#[cfg(test)]
mod tests;
mod tunnel;
mod udp;
mod views;
mod worker;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::evening::Evening;
use self::metrics::ProxyMetrics;
use self::worker::Setup;
use crate::catalogue::SnapshotReader;
use crate::clock;
use crate::metrics::Metrics;
use crate::model::{Demand, EjectionsRecord, NodeName};
use crate::pki::Identity;
use crate::trace::Tracer;
use crate::transport::{BindError, Credentials, Lane, LiveConnections, MeshPort, NodeCredentials};

pub use inspect::{Inspector, Question, WorkerView};
pub use open::{OpenTunnel, OpenTunnels};
pub(crate) use preamble::StreamKind;
pub use shares::REPORTS_MAX;
pub(crate) use tunnel::Lease;
pub(crate) use worker::{Caller, OpenError, Opened, Route, Source, Worker};

pub(crate) use crate::routing::Tried;
use crate::routing::{NOTICES_MAX, Notice, Rates, Shared};

/// A local port that cannot be bound is tried again after this long: people wait for it, and a try costs nothing.
const LISTENER_RETRY: Duration = Duration::from_secs(5);

/// What the data plane runs on.
#[derive(Debug)]
pub struct ProxyParams<'a> {
    /// The mesh port's sockets, one per worker, in the order in which they were bound.
    pub sockets: Vec<MeshPort>,
    /// Key of stateless resets, kept on disk.
    pub reset_key: [u8; 64],
    /// Certificates of this node.
    pub identity: Arc<Identity>,
    /// What is served and where services are.
    pub snapshot: SnapshotReader,
    /// The HTTP port that routes by Host.
    pub shared_http: Option<SocketAddr>,
    /// Where open tunnels are entered, to be held against what is trusted.
    pub live: LiveConnections,
    /// What records spans; none: nothing is recorded.
    pub tracer: Option<Tracer>,
    /// Where the metrics go.
    pub metrics: &'a Metrics,
    /// Cancelled when the node stops: the drain begins.
    pub stop: CancellationToken,
    /// What is open is cut after this long.
    pub drain_timeout: Duration,
}

/// Why the data plane cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A worker's endpoint.
    #[error("data-plane worker {worker} cannot start")]
    Endpoint {
        /// Which worker.
        worker: usize,
        /// Why.
        #[source]
        source: BindError,
    },
    /// A worker's thread or runtime.
    #[error("data-plane worker {worker} gets no thread")]
    Thread {
        /// Which worker.
        worker: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The metrics are registered already.
    #[error("data-plane metrics cannot be registered")]
    Metrics(#[source] prometheus::Error),
    /// A worker ended by itself.
    #[error("data-plane worker {worker} died: {reason}")]
    Died {
        /// Which worker.
        worker: usize,
        /// What it said.
        reason: String,
    },
}

/// How a local port fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenerState {
    /// Connections are accepted.
    Listening,
    /// Datagrams are taken.
    ListeningUdp,
    /// The port cannot be bound; the text says why. It is tried again.
    Failed(String),
}

/// Every local port into the mesh.
pub type Listeners = BTreeMap<SocketAddr, ListenerState>;

/// The data plane.
#[derive(Debug)]
pub struct Proxy;

impl Proxy {
    /// Starts one worker per socket.
    ///
    /// # Errors
    /// [`ProxyError`]; the workers that had started are stopped.
    pub fn start(params: ProxyParams<'_>) -> Result<ProxyHandle, ProxyError> {
        let credentials = Arc::new(NodeCredentials(Arc::clone(&params.identity)));
        Self::start_with(params, credentials)
    }

    fn start_with(params: ProxyParams<'_>, credentials: Arc<dyn Credentials>) -> Result<ProxyHandle, ProxyError> {
        start(
            StartParams {
                sockets: params.sockets,
                reset_key: params.reset_key,
                snapshot: params.snapshot,
                shared_http: params.shared_http,
                stop: params.stop,
                drain_timeout: params.drain_timeout,
                listener_retry: LISTENER_RETRY,
                credentials,
                live: params.live,
                tracer: params.tracer,
            },
            params.metrics,
        )
    }
}

/// [`ProxyParams`] with the seam that tests replace.
struct StartParams {
    sockets: Vec<MeshPort>,
    reset_key: [u8; 64],
    snapshot: SnapshotReader,
    shared_http: Option<SocketAddr>,
    stop: CancellationToken,
    drain_timeout: Duration,
    listener_retry: Duration,
    credentials: Arc<dyn Credentials>,
    live: LiveConnections,
    tracer: Option<Tracer>,
}

fn start(params: StartParams, metrics: &Metrics) -> Result<ProxyHandle, ProxyError> {
    let proxy_metrics = ProxyMetrics::register(metrics).map_err(ProxyError::Metrics)?;
    let http_metrics = http::metrics::HttpMetrics::register(metrics).map_err(ProxyError::Metrics)?;
    let udp_metrics = udp::UdpMetrics::register(metrics).map_err(ProxyError::Metrics)?;
    let udp_accepted = Arc::<udp::Accepted>::default();
    let udp_ports = Arc::new(udp::Ports::new(params.sockets.len()));
    let listeners = Arc::new(watch::Sender::new(Listeners::new()));
    let died = Arc::new(watch::Sender::new(None));
    let drain = params.stop.child_token();
    let draining = TaskTracker::new();
    let balancing = Arc::<Shared>::default();
    let rates = Arc::new(Rates::new(clock::now()));
    let budgets = Arc::default();
    let (notices, noticed) = mpsc::channel(NOTICES_MAX);
    let workers = u8::try_from(params.sockets.len()).unwrap_or(u8::MAX);
    let mut handle = ProxyHandle {
        threads: Vec::new(),
        drain,
        died: Arc::clone(&died),
        listeners,
        open: OpenTunnels::default(),
        inspector: Inspector::default(),
        balancing: Arc::clone(&balancing),
        rates: Arc::clone(&rates),
        noticed,
    };
    let dealing = rand::random();
    let (evening, handed) = Evening::new(params.sockets.len());
    for ((index, port), handed) in (0..workers).zip(params.sockets).zip(handed) {
        let (questions_sender, questions) = inspect::queue();
        handle.inspector.0.push(questions_sender);
        let setup = Setup {
            questions,
            evening: Arc::clone(&evening),
            handed,
            balancing: Arc::clone(&balancing),
            rates: Arc::clone(&rates),
            budgets: Arc::clone(&budgets),
            notices: notices.clone(),
            port,
            lane: Lane::Worker { index, workers },
            index: usize::from(index),
            reset_key: params.reset_key,
            dealing,
            credentials: Arc::clone(&params.credentials),
            live: params.live.clone(),
            snapshot: params.snapshot.clone(),
            shared_http: params.shared_http,
            listener_retry: params.listener_retry,
            metrics: proxy_metrics.clone(),
            open: handle.open.clone(),
            http_metrics: http_metrics.clone(),
            tracer: params.tracer.clone(),
            udp_metrics: udp_metrics.clone(),
            udp_accepted: Arc::clone(&udp_accepted),
            udp_ports: Arc::clone(&udp_ports),
            drain: handle.drain.clone(),
            drain_timeout: params.drain_timeout,
            draining: draining.clone(),
            listeners: Arc::clone(&handle.listeners),
            died: Arc::clone(&died),
        };
        match worker::start(setup) {
            Ok(thread) => handle.threads.push(thread),
            Err(error) => {
                handle.drain.cancel();
                return Err(error);
            }
        }
    }
    Ok(handle)
}

/// Which worker died, and what it said.
type Died = Option<(usize, String)>;

/// Holds the workers. Dropping it leaves them to the `stop` token.
#[derive(Debug)]
pub struct ProxyHandle {
    threads: Vec<JoinHandle<()>>,
    drain: CancellationToken,
    died: Arc<watch::Sender<Died>>,
    listeners: Arc<watch::Sender<Listeners>>,
    open: OpenTunnels,
    inspector: Inspector,
    balancing: Arc<Shared>,
    rates: Arc<Rates>,
    noticed: mpsc::Receiver<Notice>,
}

/// Tells when a worker dies. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ProxyHealth(watch::Receiver<Died>);

impl ProxyHealth {
    /// Waits until a worker dies; never returns while all are well. The node then stops.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing.
    pub async fn failed(&self) -> ProxyError {
        let mut died = self.0.clone();
        match died.wait_for(Option::is_some).await.map(|died| died.clone()) {
            Ok(Some((worker, reason))) => ProxyError::Died { worker, reason },
            _ => std::future::pending().await,
        }
    }
}

impl ProxyHandle {
    /// Returns the list of open tunnels; it stays current.
    pub fn tunnels(&self) -> OpenTunnels {
        self.open.clone()
    }

    /// Returns what asks the workers what they would do.
    pub fn inspector(&self) -> Inspector {
        self.inspector.clone()
    }

    /// Returns how the local ports fare, and wakes at each change.
    pub fn listeners(&self) -> watch::Receiver<Listeners> {
        self.listeners.subscribe()
    }

    /// Returns the two tasks beside the workers: one that publishes to `ejected` what they ejected, one that makes the
    /// tables of hashes for what `snapshot` shows. They end with the workers, or when they are dropped.
    pub fn beside(
        &mut self,
        snapshot: SnapshotReader,
        ejected: watch::Sender<Arc<EjectionsRecord>>,
    ) -> (impl Future<Output = ()> + Send + use<>, impl Future<Output = ()> + Send + use<>) {
        let noticed = std::mem::replace(&mut self.noticed, mpsc::channel(1).1);
        (ejections::tell(noticed, ejected), ejections::tables(Arc::clone(&self.balancing), snapshot))
    }

    /// Returns the task that divides limits of the whole mesh: `reports` is what other nodes ask of them, `demand` gets
    /// what the others must hear. It ends with `reports`, or when it is dropped.
    pub fn divides(
        &self,
        snapshot: SnapshotReader,
        reports: mpsc::Receiver<(NodeName, Demand)>,
        demand: watch::Sender<Arc<Demand>>,
    ) -> impl Future<Output = ()> + Send + use<> {
        shares::divide(Arc::clone(&self.rates), snapshot, reports, demand)
    }

    /// Returns a watch over the workers, which outlives the handle.
    pub fn health(&self) -> ProxyHealth {
        ProxyHealth(self.died.subscribe())
    }

    /// Stops accepting, lets what is open end until the drain timeout, closes the tunnels and joins the workers.
    ///
    /// # Cancel safety
    /// Cancelling leaves the workers draining.
    pub async fn shutdown(self) {
        self.drain.cancel();
        let threads = self.threads;
        let join = move || threads.into_iter().for_each(|thread| drop(thread.join()));
        let _runtime_is_going = tokio::task::spawn_blocking(join).await;
    }
}

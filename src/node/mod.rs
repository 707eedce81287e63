//! The composition root: builds one agent from a [`Config`], starts its parts in order, stops them in order.
//!
//! ```text
//!   store -> mesh port -> wall time of the last run -> identity (stored | issuer | token) -> generation -> registry -> gossip -> proxy -> dns -> api -> ready
//!   stop:  leave -> drain the proxy -> api, dns, gossip, registry -> close QUIC -> join the tasks
//! ```
//!
//! Invariants: nothing is announced before the generation is on disk; a failed start leaves no task running; the first
//! task that panics stops the node.
//! Not here: what the parts do.

mod authority;
mod gateways;
mod glue;
mod host;
mod identity;
mod kept_clock;
mod reload;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::api::{Api, ApiConfig, ApiParams, ApiToken, ListenerState as ApiListener, NodeFacts};
use crate::catalogue::SnapshotReader;
use crate::clock;
use crate::config::{Config, OnTerminate, Storage};
use crate::dns::{Dns, DnsParams};
use crate::gossip::{self, Gossip, GossipHandle, GossipParams};
use crate::metrics::Metrics;
use crate::model::{Demand, EjectionsRecord, Generation, NodeInfo, NodeName};
use crate::otlp::{self, OriginFacts, OtlpParams};
use crate::pki::{DocumentKey, Identity};
use crate::prepared::Book;
use crate::proxy::{
    self, ListenerState, OpenTunnel, OpenTunnels, Proxy, ProxyError, ProxyHandle, ProxyHealth, ProxyParams,
};
use crate::registry::{Publication, Registry, RegistryHandle, RegistryParams};
use crate::store::{Store, StoreError};
use crate::supervise::{TaskFailure, Tasks};
use crate::telemetry::Chain;
use crate::trace::Tracer;
use crate::transport::{self, BindError, BoundSockets, ControlTransport};
use crate::workload::{WorkloadApi, WorkloadParams};

pub use identity::IdentityError;
pub use reload::{ConfigSource, ReloadError};

use host::HostThread;
use reload::Reloader;

/// File descriptors that 16,384 connections on each of many workers need; the hard limit caps it.
const OPEN_FILES_WANTED: u64 = 1 << 20;
/// The parts of a stopping node end within this time, or are cut.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Why an agent does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory.
    #[error("cannot use the store")]
    Store(#[from] StoreError),
    /// The data directory belongs to another name.
    #[error(
        "the data directory belongs to node `{stored}`: start with -node {stored}, or give `{given}` a -data-dir of its own"
    )]
    OtherNode {
        /// Whose it is.
        stored: NodeName,
        /// Who asks.
        given: NodeName,
    },
    /// No usable certificate.
    #[error("node has no identity")]
    Identity(#[from] IdentityError),
    /// The mesh port.
    #[error("cannot open the mesh port")]
    Bind(#[from] BindError),
    /// A part did not start.
    #[error("cannot start the {part}")]
    Part {
        /// Which.
        part: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A task panicked while the node ran.
    #[error("a part of the agent failed")]
    Failed(#[from] TaskFailure),
    /// A worker of the data plane ended.
    #[error("the data plane failed")]
    Worker(#[source] ProxyError),
}

fn part<E: Into<Box<dyn std::error::Error + Send + Sync>>>(part: &'static str) -> impl FnOnce(E) -> NodeError {
    move |source| NodeError::Part { part, source: source.into() }
}

/// A running agent.
pub struct Node {
    name: NodeName,
    api: Vec<SocketAddr>,
    dns: Option<Arc<Dns>>,
    gossip: GossipHandle,
    registry: RegistryHandle,
    snapshot: SnapshotReader,
    identity: Arc<Identity>,
    transport: ControlTransport,
    /// Taken when the data plane drains.
    proxy: Mutex<Option<ProxyHandle>>,
    health: ProxyHealth,
    tunnels: OpenTunnels,
    on_terminate: OnTerminate,
    tasks: Tasks,
    host: HostThread,
    reloader: Arc<Reloader>,
    /// Cancelled when the API was asked to leave, or a task panicked.
    leaving: CancellationToken,
    /// Cancelled by [`Node::shutdown`].
    terminated: CancellationToken,
    /// Cancelled when the data plane shall drain.
    drain: CancellationToken,
    /// Cancelled when everything else shall end.
    stop: CancellationToken,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("name", &self.name).field("api", &self.api).finish_non_exhaustive()
    }
}

impl Node {
    /// Starts an agent and returns once its listeners are up; finding the other nodes goes on in the background.
    ///
    /// Must be called inside a tokio runtime. One of a single thread is best, for gossip is all that runs there: API, DNS
    /// and data plane have threads of their own. A node without a stored certificate waits here, asking its seeds with
    /// jitter, until an issuer certifies or refuses it.
    ///
    /// # Errors
    /// [`NodeError`]; the tasks that had started are stopped.
    /// # Cancel safety
    /// Not cancel safe: what was started ends only with the process.
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let node = Box::pin(Self::build(config, None, stop)).await?;
        guard.disarm();
        Ok(node)
    }

    /// Starts an agent as [`Node::start`] does, whose configuration `source` reads again at each reload.
    ///
    /// # Errors
    /// As of [`Node::start`].
    /// # Cancel safety
    /// As of [`Node::start`].
    pub async fn start_reloadable(config: Config, source: ConfigSource) -> Result<Self, NodeError> {
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let node = Box::pin(Self::build(config, Some(source), stop)).await?;
        guard.disarm();
        Ok(node)
    }

    async fn build(config: Config, source: Option<ConfigSource>, stop: CancellationToken) -> Result<Self, NodeError> {
        announce(&config);
        let (leaving, drain) = (CancellationToken::new(), CancellationToken::new());
        let (tasks, metrics) = (Tasks::new(leaving.clone()), Metrics::new());
        let host = HostThread::start().map_err(part("thread of the API"))?;
        let (store, sockets) = (open_store(&config)?, bind_mesh(&config)?);
        let identity::Obtained { issuer, identity, operator } = identity::obtain(&config, &store).await?;
        let (documents, reset_key) = (glue::believe(&store, &identity)?, store.reset_key()?);
        let generation = Generation { number: store.next_generation()?, nonce: rand::random() };
        let (info, first_index) = (node_info(&config, &store, issuer.load().is_some())?, clock::wall_ms());

        let stopping = (tasks.clone(), stop.clone());
        let (registry, publication) =
            start_registry(&config, &store, &identity, (&metrics, &host), (stopping, first_index)).await?;
        let reloader = Arc::new(Reloader::new(source, config.clone(), registry.clone()));
        let control = ControlTransport::new(sockets.control, Arc::clone(&identity), reset_key)?;
        control.register(&metrics).map_err(part("transport's metrics"))?;
        let connections = glue::Connections::new(&control, &metrics).map_err(part("identity's metrics"))?;
        let (incoming_tx, incoming) = mpsc::channel(gossip::INCOMING_MAX);
        let (ejected, ejections) = watch::channel(Arc::default());
        let ((asked, demand), (demands, reports)) = (watch::channel(Arc::default()), mpsc::channel(proxy::REPORTS_MAX));
        let params = GossipParams {
            node: info.clone(),
            generation,
            transport: control.clone(),
            tunnels: connections.tunnels.clone(),
            incoming,
            identity: Arc::clone(&identity),
            publication,
            ejections,
            demand,
            demands,
            first_index,
            seeds: config.join.clone(),
            links_max: gossip::LINKS_MAX,
            known_peers: store.peers()?,
            peer_store: Arc::new(glue::PeerFile(store.clone())),
            sync_interval: gossip::SYNC_INTERVAL,
            reconnect_timeout: config.reconnect_timeout,
            stop: stop.clone(),
        };
        let documents = glue::documents(documents, &store, &connections, &issuer, config.default_policy);
        let shared = glue::shared(&store, config.kv_bytes_max);
        let (gossip, snapshot) = Gossip::start(params, documents, shared, &metrics, &tasks).map_err(part("gossip"))?;
        let joins = glue::join_server(&issuer, &identity, &gossip, &info, &store);
        tasks.spawn("aliases", until(stop.clone(), registry.clone().follow_catalogue(snapshot.clone())));
        tasks.spawn("accept", glue::accept(control.clone(), incoming_tx, joins, tasks.clone(), stop.clone()));
        let renewal = identity::Renewal {
            identity: Arc::clone(&identity),
            issuer,
            store: store.clone(),
            gossip: gossip.clone(),
            seeds: config.join.clone(),
            expiry: identity::expiry_gauge(&metrics, &identity).map_err(part("identity's metrics"))?,
            connections: connections.clone(),
            snapshot: snapshot.clone(),
        };
        tasks.spawn("renewal", renewal.run(stop.clone()));
        let plane = ProxyParams {
            tracer: host.within(async { start_export(&config, &info, &metrics, (&tasks, &stop)) }).await?,
            sockets: sockets.workers,
            reset_key,
            identity: Arc::clone(&identity),
            snapshot: snapshot.clone(),
            shared_http: config.shared_http_addr,
            live: connections.tunnels,
            metrics: &metrics,
            stop: drain.clone(),
            drain_timeout: config.drain_timeout,
        };
        let proxy = start_proxy(plane, ejected, (reports, asked), (&tasks, &stop))?;

        let mut node = Self {
            name: config.node_name.clone(),
            api: Vec::new(),
            dns: None,
            gossip,
            registry,
            snapshot,
            identity,
            transport: control,
            proxy: Mutex::new(None),
            health: proxy.health(),
            tunnels: proxy.tunnels(),
            on_terminate: config.on_terminate,
            tasks,
            host,
            reloader,
            leaving,
            terminated: CancellationToken::new(),
            drain,
            stop,
        };
        node.tell_policy();
        node.dns = node.start_dns(&config, &metrics).inspect_err(|_| node.drain.cancel())?;
        let api = node.start_api(&config, &info, &metrics, &proxy, (store, operator));
        node.api = node.host.within(api).await.inspect_err(|_| node.drain.cancel())?;
        node.proxy = Mutex::new(Some(proxy));
        let (http, scope) = (&node.api, node.identity.authority().scope().to_string());
        info!(node = %node.name, mesh = %info.mesh_addr, ?http, socket = ?config.api_socket, %generation, scope, "agent is up");
        Ok(node)
    }

    fn start_workload_api(&self, config: &Config, metrics: &Metrics) -> Result<(), NodeError> {
        let Some(config) = config.workload_api.clone() else { return Ok(()) };
        let (registry, identity) = (self.registry.clone(), Arc::clone(&self.identity));
        let (tasks, stop) = (&self.tasks, self.stop.clone());
        WorkloadApi::start(WorkloadParams { config, registry, identity, metrics, tasks, stop })
            .map_err(part("SPIFFE Workload API"))
    }

    fn start_dns(&self, config: &Config, metrics: &Metrics) -> Result<Option<Arc<Dns>>, NodeError> {
        let datacenter = config.datacenter.clone();
        let Some(config) = config.dns.clone() else { return Ok(None) };
        let (snapshot, tasks, stop) = (self.snapshot.clone(), &self.tasks, self.stop.clone());
        let round_trips = Arc::new(glue::MeasuredBy { gossip: self.gossip.clone(), here: self.name.clone() });
        let queries = Arc::new(ArcSwap::from_pointee(Book::default()));
        let following = glue::follow_queries(self.gossip.shared().clone(), Arc::clone(&queries));
        let params = DnsParams { config, datacenter, snapshot, round_trips, queries, metrics, tasks, stop };
        let dns = Arc::new(Dns::start(params).map_err(part("DNS"))?);
        self.reloader.add_dns(Arc::clone(&dns));
        self.tasks.spawn("prepared queries", until(self.stop.clone(), following));
        Ok(Some(dns))
    }

    fn tell_policy(&self) {
        let policy = Arc::clone(&self.snapshot.load().policy);
        info!(intentions = policy.guards().len(), default = %policy.default_action(), "policy is in force");
    }

    async fn start_api(
        &self,
        config: &Config,
        info: &NodeInfo,
        metrics: &Metrics,
        proxy: &ProxyHandle,
        (store, operator): (Store, Option<Arc<DocumentKey>>),
    ) -> Result<Vec<SocketAddr>, NodeError> {
        self.start_workload_api(config, metrics)?;
        let clock = kept_clock::keep(store.clone(), self.gossip.clone(), self.stop.clone());
        self.tasks.spawn("kept_clock", clock);
        let own_ip = config.mesh_bind.ip();
        let telling = gateways::tell(self.registry.clone(), self.snapshot.clone(), proxy.listeners(), own_ip);
        self.tasks.spawn("gateways", until(self.stop.clone(), telling));
        let policy_key = authority::load(config, operator, &self.identity)?;
        let gauge = authority::gauge(metrics).map_err(part("metrics"))?;
        if let Some(key) = &policy_key {
            self.tasks.spawn("authority", authority::watch(Arc::clone(key), gauge, self.stop.clone()));
        }
        let states = proxy.listeners();
        let snapshot = self.snapshot.clone();
        let listeners = move || {
            let snapshot = snapshot.load();
            let gateways =
                snapshot.gateway_ports().map(|port| (port.bind, format!("ingress gateway {}", port.gateway)));
            let upstreams = snapshot.local.upstreams.iter().map(|up| (up.bind, up.destination.to_string()));
            // Where both ask for a port, the upstream has it.
            let destinations: BTreeMap<SocketAddr, String> = gateways.chain(upstreams).collect();
            let shown = |(bind, state): (&SocketAddr, &ListenerState)| ApiListener {
                bind: bind.to_string(),
                destination: destinations.get(bind).cloned().unwrap_or_else(|| "by Host".to_owned()),
                state: match state {
                    ListenerState::Listening => "listening".to_owned(),
                    ListenerState::ListeningUdp => "listening (udp)".to_owned(),
                    ListenerState::Failed(why) => why.clone(),
                },
            };
            states.borrow().iter().map(shown).collect()
        };
        let served = Api::start(ApiParams {
            config: ApiConfig {
                listen: config.http_addr.into_iter().collect(),
                https: config.https.clone(),
                socket: config.api_socket.clone(),
                tokens: api_tokens(config),
                names: Vec::new(),
            },
            registry: self.registry.clone(),
            gossip: self.gossip.clone(),
            snapshot: self.snapshot.clone(),
            identity: Arc::clone(&self.identity),
            metrics: metrics.clone(),
            node: NodeFacts {
                id: info.id.clone(),
                name: info.name.clone(),
                datacenter: info.datacenter.clone(),
                mesh_addr: info.mesh_addr,
                version: info.build.clone(),
                revision: String::new(),
                workers: config.workers.get(),
                meta: info.meta.clone(),
            },
            listeners: Arc::new(listeners),
            token_uses: Arc::new(move || glue::token_uses(&store)),
            policy_key,
            inspect: glue::inspect(proxy.inspector()),
            reload: glue::reload(&self.reloader),
            upstream_ip: config
                .http_addr
                .map(|addr| addr.ip())
                .filter(IpAddr::is_loopback)
                .unwrap_or(config.upstream_ip),
            shutdown: self.leaving.clone(),
            tasks: &self.tasks,
            stop: self.stop.clone(),
        })
        .await
        .map_err(part("HTTP API"))?;
        if let Some(files) = served.files {
            self.reloader.add_https(files);
        }
        Ok(served.addrs)
    }

    /// Its name.
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// Where its HTTP API listens.
    pub fn api(&self) -> &[SocketAddr] {
        &self.api
    }

    /// Where its DNS listens; nowhere if it is off.
    pub fn dns(&self) -> &[SocketAddr] {
        self.dns.as_ref().map(|dns| dns.listening()).unwrap_or_default()
    }

    /// Talks to its membership.
    pub fn gossip(&self) -> &GossipHandle {
        &self.gossip
    }

    /// Talks to its registry.
    pub fn registry(&self) -> &RegistryHandle {
        &self.registry
    }

    /// Reads its catalogue.
    pub fn snapshot(&self) -> &SnapshotReader {
        &self.snapshot
    }

    /// Its certificates.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// The tunnels that are open to other nodes, oldest first.
    pub fn tunnels(&self) -> Vec<OpenTunnel> {
        self.tunnels.list()
    }

    /// Reads the configuration again: services, checks, log level, the CA file of checks, the certificate of HTTPS. What takes
    /// a restart stays as it is and is named in what is returned.
    ///
    /// # Errors
    /// [`ReloadError`]; nothing is changed then.
    /// # Cancel safety
    /// A cancelled reload may or may not have taken effect.
    pub async fn reload(&self) -> Result<Vec<String>, ReloadError> {
        self.reloader.reload().await
    }

    /// Asks the node to stop, as a termination signal does; [`Node::run_until_stopped`] does it.
    pub fn shutdown(&self) {
        self.terminated.cancel();
    }

    /// Runs until [`Node::shutdown`], `PUT /v1/agent/leave` or a failure; then leaves, drains and ends every task.
    ///
    /// # Errors
    /// [`NodeError::Failed`] or [`NodeError::Worker`] if a part of the agent failed.
    /// # Cancel safety
    /// Waiting is cancel safe; a stop that has begun and is cancelled goes on when this is called again.
    pub async fn run_until_stopped(&self) -> Result<(), NodeError> {
        let (outcome, says_goodbye) = tokio::select! {
            () = self.terminated.cancelled() => (Ok(()), self.on_terminate == OnTerminate::Leave),
            () = self.leaving.cancelled() => match self.tasks.failure() {
                Some(failure) => (Err(NodeError::Failed(failure)), false),
                None => (Ok(()), true),
            },
            died = self.health.failed() => {
                error!(error = %Chain(&died), "the data plane failed; the node stops");
                (Err(NodeError::Worker(died)), false)
            }
        };
        if says_goodbye && let Err(err) = self.gossip.leave().await {
            warn!(error = %Chain(&err), "could not say goodbye; the others will see this node as failed");
        }
        self.drain.cancel();
        let proxy = self.proxy.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(proxy) = proxy {
            proxy.shutdown().await;
        }
        self.stop.cancel();
        if tokio::time::timeout(STOP_LIMIT, self.tasks.join()).await.is_err() {
            warn!(limit = ?STOP_LIMIT, "parts of the agent did not end in time and are cut");
        }
        self.transport.close("agent stops");
        info!(node = %self.name, "agent has stopped");
        outcome
    }
}

/// Starts the registry with what the config files define.
async fn start_registry(
    config: &Config,
    store: &Store,
    identity: &Arc<Identity>,
    (metrics, host): (&Metrics, &HostThread),
    ((tasks, stop), first_index): ((Tasks, CancellationToken), u64),
) -> Result<(RegistryHandle, watch::Receiver<Arc<Publication>>), NodeError> {
    let scope_of = Arc::clone(identity);
    let params = RegistryParams {
        store: store.clone(),
        scope: Arc::new(move || scope_of.authority().scope().clone()),
        node: config.node_name.clone(),
        gateway_ip: config.mesh_bind.ip(),
        config: reload::definitions(config),
        check_settings: config.check_settings.clone(),
        metrics: metrics.clone(),
        tasks,
        stop,
        first_index,
    };
    host.within(Registry::start(params)).await.map_err(part("registry"))
}

/// Runs `task` until it or `stop` ends it.
async fn until(stop: CancellationToken, task: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = task => {}
    }
}

/// Starts the export of telemetry, if there is one.
fn start_export(
    config: &Config,
    info: &NodeInfo,
    metrics: &Metrics,
    (tasks, stop): (&Tasks, &CancellationToken),
) -> Result<Option<Tracer>, NodeError> {
    let Some(config) = config.otlp.clone() else { return Ok(None) };
    let origin = OriginFacts {
        id: info.id.clone(),
        node: info.name.to_string(),
        datacenter: info.datacenter.clone(),
        host: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()),
    };
    let params = OtlpParams { config, origin, metrics, tasks, stop: stop.clone() };
    otlp::start(params).map(Some).map_err(part("export of telemetry"))
}

/// Starts the data plane, and what goes on beside it: shared ejections, shares of the mesh's limits, tables of hashes.
fn start_proxy(
    params: ProxyParams<'_>,
    ejected: watch::Sender<Arc<EjectionsRecord>>,
    (reports, asked): (mpsc::Receiver<(NodeName, Demand)>, watch::Sender<Arc<Demand>>),
    (tasks, stop): (&Tasks, &CancellationToken),
) -> Result<ProxyHandle, NodeError> {
    let snapshot = params.snapshot.clone();
    let mut proxy = Proxy::start(params).map_err(part("data plane"))?;
    let (ledger, tables) = proxy.beside(snapshot.clone(), ejected);
    tasks.spawn("ejections", until(stop.clone(), ledger));
    tasks.spawn("shares", until(stop.clone(), proxy.divides(snapshot, reports, asked)));
    tasks.spawn("hash_tables", until(stop.clone(), tables));
    Ok(proxy)
}

/// Logs what the node starts with.
fn announce(config: &Config) {
    for warning in &config.warnings {
        warn!(%warning, "look at this setting");
    }
    let Config { node_name, datacenter, storage, mesh_bind, mesh_advertise, http_addr, join, workers, .. } = config;
    let (services, checks) = (config.services.len(), config.checks.len());
    info!(
        node = %node_name, datacenter, version = env!("CARGO_PKG_VERSION"), bind = %mesh_bind, advertise = %mesh_advertise,
        http = ?http_addr, seeds = ?join, data = ?storage, workers, services, checks, "agent starts"
    );
    // Secrets do not print (`config::Secret`).
    debug!(?config, "effective configuration");
}

/// Opens the store, which must be this node's, and takes up the wall time that stands beside it.
fn open_store(config: &Config) -> Result<Store, NodeError> {
    let store = match &config.storage {
        Storage::Memory => Store::in_memory()?,
        Storage::Directory(dir) => Store::open(dir)?,
    };
    claim_name(&store, &config.node_name)?;
    kept_clock::take_up(&store);
    Ok(store)
}

/// Opens the mesh port and says what the kernel gave.
fn bind_mesh(config: &Config) -> Result<BoundSockets, BindError> {
    let files_max = raise_open_files();
    let sockets = transport::bind(config.mesh_bind, config.workers.get())?;
    info!(addr = %sockets.addr, workers = config.workers, files_max, "mesh port is open");
    if !sockets.buffers.are_full() {
        let (send_bytes, receive_bytes) = (sockets.buffers.send_bytes, sockets.buffers.receive_bytes);
        warn!(
            send_bytes,
            receive_bytes,
            "small socket buffers: bulk transfers lose packets; raise net.core.rmem_max and net.core.wmem_max to 4194304"
        );
    }
    Ok(sockets)
}

/// The facts that the node publishes about itself.
fn node_info(config: &Config, store: &Store, is_issuer: bool) -> Result<NodeInfo, StoreError> {
    Ok(NodeInfo {
        id: store.node_id()?,
        name: config.node_name.clone(),
        mesh_addr: config.mesh_advertise,
        datacenter: config.datacenter.clone(),
        meta: config.node_meta.clone(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        issuer: is_issuer,
    })
}

/// Holds the data directory against the node's name. A first start that failed before it had anything to show for the name
/// has not claimed it.
fn claim_name(store: &Store, given: &NodeName) -> Result<(), NodeError> {
    match store.node_name()? {
        Some(stored) if stored == *given => Ok(()),
        Some(stored) if store.identity()?.is_some() || store.join_key()?.is_some() => {
            Err(NodeError::OtherNode { stored, given: given.clone() })
        }
        Some(_) | None => Ok(store.put_node_name(given)?),
    }
}

/// The tokens of the API: the admin token, which may do everything, and those that the configuration has digests of.
fn api_tokens(config: &Config) -> Vec<ApiToken> {
    config.admin_token.iter().chain(&config.api_tokens).cloned().collect()
}

/// Raises the limit of open files as far as it goes and returns it.
fn raise_open_files() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    let wanted = OPEN_FILES_WANTED.min(hard);
    if wanted > soft && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() {
        return wanted;
    }
    soft
}

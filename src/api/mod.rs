//! The agent's HTTP API: Consul's shapes under `/v1/…`, weft's own under `/v1/mesh/…`.
//!
//! ```text
//!   TCP, TLS, unix socket -> serve -> guard (token, Host, Origin) -> routes (one table) -> handler -> Reply | Refusal
//!                                                                          |
//!                            Snapshot (reads, blocking queries) <----------+----> registry, gossip (orders)
//!                                |
//!                                +--> watchers: one task wakes those whose topic changed
//! ```
//!
//! Invariants: [`routes::ROUTES`] is the only list of endpoints, the router and the check of `api/openapi.yaml` are made
//! from it; every error is plain text; a body is at most [`BODY_BYTES_MAX`]; reads answer from this agent's own state and
//! wait for nobody. Indexes (`X-Consul-Index`) are local to one agent: an index of another agent is answered at once.
//! Without `dc` a read shows the agent's own datacenter, as Consul does.
//! Not here: what a definition means (`registry::definition`), who is alive (`gossip`), what the data plane does.

mod agent;
mod block;
mod call;
mod catalog;
mod check;
mod connect;
mod definition;
mod documents;
mod entry;
mod event;
mod external;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gateway;
mod guard;
mod health;
mod held;
mod host;
mod index;
mod intention;
mod kv;
mod maintain;
mod mesh;
mod meter;
mod monitor;
mod near;
mod prepared;
mod query;
mod records;
mod routes;
mod seam;
mod secure;
mod serve;
mod service_intentions;
mod shape;
mod sift;
mod status;
mod watchers;
mod way;
mod why;
mod write;

#[cfg(test)]
mod coming;
#[cfg(test)]
mod doors_tests;
#[cfg(test)]
mod external_tests;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod lists_tests;
#[cfg(test)]
mod openapi;
#[cfg(test)]
mod pace_tests;
#[cfg(test)]
mod way_tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use crate::catalogue::SnapshotReader;
use crate::clock::UnixSeconds;
use crate::gossip::GossipHandle;
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::pki::{DocumentKey, Identity};
use crate::registry::RegistryHandle;
use crate::supervise::Tasks;
use crate::unix_socket::{SocketConfig, SocketError};

pub use guard::{ApiToken, Right};
pub use secure::{Certificate, FreshFiles, HttpsConfig, HttpsFiles};
pub use why::{BalancerView, Inspect, SeatView, WorkerView};

use index::ListIndexes;
use meter::Meter;
use near::Distances;
use seam::{Authority, Membership, Records, Registry};
use watchers::Watchers;

/// Largest request body, in bytes: Consul's bound for registrations is of this size.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Most blocking queries at once: each holds 22 KiB with its connection (`tests/bench/watchers`), so 350 MiB in all.
pub const BLOCKING_QUERIES_MAX: usize = 16_384;

/// Where and for whom the API listens.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Addresses to listen on; port 0 takes a free one. Any that is not loopback needs a token. There may be none where there is
    /// `https` or `socket`.
    pub listen: Vec<SocketAddr>,
    /// Where it listens for TLS.
    pub https: Option<HttpsConfig>,
    /// The unix socket that it serves too.
    pub socket: Option<SocketConfig>,
    /// Where there are any, every request must show one that has the right that it takes.
    pub tokens: Vec<ApiToken>,
    /// DNS names that a `Host` header may carry on a loopback listener, beside `localhost`, IP addresses and the node's name.
    pub names: Vec<String>,
}

/// What the API tells about its node.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    /// The node's UUID.
    pub id: String,
    /// Its name.
    pub name: NodeName,
    /// Its datacenter.
    pub datacenter: String,
    /// Where its mesh port is reached.
    pub mesh_addr: SocketAddr,
    /// weft's version.
    pub version: String,
    /// The commit that it was built from; empty if unknown.
    pub revision: String,
    /// Data-plane workers.
    pub workers: usize,
    /// Free key-value pairs.
    pub meta: std::collections::BTreeMap<String, String>,
}

/// An upstream listener of the data plane as `weft info` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerState {
    /// `127.0.0.1:9191`
    pub bind: String,
    /// The service that it leads to.
    pub destination: String,
    /// `listening`, or why it does not.
    pub state: String,
}

/// Returns the upstream listeners of this moment.
pub type Listeners = Arc<dyn Fn() -> Vec<ListenerState> + Send + Sync>;

/// How often a token was used at this agent, if it is an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenUse {
    /// The token's id.
    pub id: [u8; 16],
    /// Uses.
    pub uses: u32,
    /// The token's end.
    pub not_after: UnixSeconds,
}

/// Returns the uses of tokens of this moment, or why they cannot be read. Blocks on the disk.
pub type TokenUses = Arc<dyn Fn() -> Result<Vec<TokenUse>, String> + Send + Sync>;

/// Reads the agent's configuration again: what the operator should know, or why nothing was changed.
pub type Reload = Arc<dyn Fn() -> BoxFuture<'static, Result<Vec<String>, String>> + Send + Sync>;

/// What the API needs of the agent.
pub struct ApiParams<'a> {
    /// Where and for whom it listens.
    pub config: ApiConfig,
    /// Registers services and checks.
    pub registry: RegistryHandle,
    /// Membership.
    pub gossip: GossipHandle,
    /// The catalogue.
    pub snapshot: SnapshotReader,
    /// Certificates, for `/v1/mesh/info`.
    pub identity: Arc<Identity>,
    /// Where its metrics go and what `/v1/agent/metrics` shows.
    pub metrics: Metrics,
    /// The node.
    pub node: NodeFacts,
    /// The data plane's upstream listeners.
    pub listeners: Listeners,
    /// The uses of tokens.
    pub token_uses: TokenUses,
    /// Signs policy for clients; none: they are told to sign themselves.
    pub policy_key: Option<Arc<DocumentKey>>,
    /// Asks the data plane for `weft why`.
    pub inspect: Inspect,
    /// Reloads the configuration.
    pub reload: Reload,
    /// Where upstream ports bind that name no address: loopback.
    pub upstream_ip: IpAddr,
    /// Cancelled by `PUT /v1/agent/leave`: the node then leaves and stops.
    pub shutdown: CancellationToken,
    /// Where its tasks run.
    pub tasks: &'a Tasks,
    /// Stops the API: blocking queries answer at once, connections finish the request that they are in.
    pub stop: CancellationToken,
}

/// Why the API does not start.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// An address that others reach, and nothing to tell them apart.
    #[error(
        "refusing to serve the HTTP API on {addr} without an admin token: everybody who reaches the address could register and deregister services; set `admin_token_file` in the configuration file, or listen on a loopback address (-client 127.0.0.1)"
    )]
    TokenNeeded {
        /// The address.
        addr: SocketAddr,
    },
    /// Nothing to listen on.
    #[error(
        "the HTTP API has neither an address nor a socket to listen on: set -client, ports.https or addresses.http"
    )]
    NoAddress,
    /// The address is taken or not this host's.
    #[error(
        "cannot listen for HTTP on {addr}: {hint}; choose another address with -client or another port with `ports {{ http = N }}`"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What is wrong with it, in words.
        hint: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The unix socket cannot be opened.
    #[error(transparent)]
    Socket(SocketError),
    /// What HTTPS is served with cannot be used.
    #[error(
        "cannot serve HTTPS with {path}: {reason}; correct tls.https.cert_file and tls.https.key_file, or leave both out to use the node's own identity"
    )]
    Certificate {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What clients of HTTPS are checked by cannot be used.
    #[error("cannot check the clients of HTTPS by {path}: {reason}; correct tls.https.ca_file")]
    ClientCa {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A metric of that name exists.
    #[error("cannot register the metrics of the HTTP API")]
    Metrics(#[source] prometheus::Error),
}

/// The HTTP API, as it is served.
#[derive(Debug)]
pub struct Api {
    /// Where it listens, in order.
    pub addrs: Vec<SocketAddr>,
    /// The files of HTTPS, if it has any, to be read again at a reload.
    pub files: Option<Arc<HttpsFiles>>,
}

impl Api {
    /// Binds every address and starts to serve in `params.tasks`.
    ///
    /// # Errors
    /// [`ApiError`]; nothing is served then.
    pub async fn start(params: ApiParams<'_>) -> Result<Self, ApiError> {
        let ApiParams { config, registry, gossip, snapshot, identity, metrics, node, listeners, token_uses, .. } =
            params;
        let (policy_key, inspect, reload) = (params.policy_key, params.inspect, params.reload);
        let secured = config.https.as_ref().map(|https| secure::server(https, &identity)).transpose()?;
        let (tls, files) = secured.unzip();
        let listening = serve::bind(&config, tls).await?;
        let authority: Arc<dyn Authority> = Arc::<Identity>::clone(&identity);
        let certificates: Certificates = Arc::new(move || CertificateFacts::read(&identity));
        let meter = Meter::new(&metrics).map_err(ApiError::Metrics)?;
        let room = Arc::new(held::Room::new(meter.answers_refused.clone()));
        let shared = Shared {
            guard: guard::Guard::new(&config, &node.name),
            defaults_ip: params.upstream_ip,
            registry: Arc::new(registry),
            records: Arc::new(gossip.shared().clone()),
            membership: Arc::new(gossip),
            snapshot,
            certificates,
            authority,
            listeners,
            token_uses,
            policy_key,
            policy_writes: tokio::sync::Mutex::new(()),
            inspect,
            reload,
            meter,
            metrics,
            node,
            indexes: ListIndexes::default(),
            watchers: Watchers::default(),
            distances: Distances::default(),
            room,
            blocking_queries_max: BLOCKING_QUERIES_MAX,
            leave: params.shutdown,
            stop: params.stop.clone(),
        };
        let shared = Arc::new(shared);
        let router = routes::router(&shared);
        params.tasks.spawn("api watchers", watchers::run(shared));
        let addrs = listening.addrs.clone();
        params.tasks.spawn("api", serve::run(listening, router, serve::Limits::default(), params.stop));
        Ok(Self { addrs, files: files.flatten() })
    }
}

/// What every handler shares.
struct Shared {
    guard: guard::Guard,
    defaults_ip: IpAddr,
    registry: Arc<dyn Registry>,
    membership: Arc<dyn Membership>,
    /// What all agents share.
    records: Arc<dyn Records>,
    snapshot: SnapshotReader,
    certificates: Certificates,
    authority: Arc<dyn Authority>,
    listeners: Listeners,
    token_uses: TokenUses,
    policy_key: Option<Arc<DocumentKey>>,
    /// Held while a client's policy is signed and spread.
    policy_writes: tokio::sync::Mutex<()>,
    inspect: Inspect,
    reload: Reload,
    meter: Meter,
    metrics: Metrics,
    node: NodeFacts,
    indexes: ListIndexes,
    watchers: Watchers,
    distances: Distances,
    /// Of answers on their way.
    room: Arc<held::Room>,
    blocking_queries_max: usize,
    leave: CancellationToken,
    stop: CancellationToken,
}

/// Reads the certificates' facts of this moment.
type Certificates = Arc<dyn Fn() -> CertificateFacts + Send + Sync>;

/// What `/v1/mesh/info` shows of the node's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CertificateFacts {
    trust_domain: String,
    spiffe_id: String,
    serve_scope: String,
    node_ends: UnixSeconds,
    intermediate_ends: UnixSeconds,
}

impl CertificateFacts {
    fn read(identity: &Identity) -> Self {
        let authority = identity.authority();
        let svid = identity.node_svid();
        Self {
            trust_domain: authority.bundle().trust_domain.to_string(),
            spiffe_id: svid.id.to_string(),
            serve_scope: authority.scope().to_string(),
            node_ends: svid.not_after,
            intermediate_ends: authority.not_after(),
        }
    }
}

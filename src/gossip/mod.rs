//! The owner of membership, replica and catalogue: one task, fed by QUIC, by orders and by the registry.
//!
//! ```text
//!   accepted connections, datagrams, streams --\                                 /-> links: datagrams, streams
//!   orders (join, leave) ----------------------- select -> Engine::handle_* -> settle -> Snapshot, Members
//!   registry::Publication, timers -------------/                                 \-> exchanges (join, pull, sync)
//! ```
//!
//! The decisions are the engine's (`engine`, no input or output of its own); this module is its hands.
//!
//! Invariants:
//! - Membership, replica and catalogue change in one task alone; streams ask it by messages and never wait for each
//!   other through it.
//! - A record counts only when its own node's signature over it was checked, whoever passed it on.
//! - Every queue, frame, set of tasks and exchange has a bound, and losing any of them loses no data for good:
//!   anti-entropy repairs.
//! - A snapshot is published at most once per turn of the loop, and at a bounded rate for what others change.
//!
//! Not here: SWIM (`membership`), versions and merging (`replica`), TLS (`pki`, `transport`), health (`registry`).

mod actor;
mod carrier;
mod documents;
mod doubles;
pub mod engine;
mod exchange;
mod links;
mod metrics;
mod policy;
mod pulse;
mod reach;
mod shared;
mod talk;
mod targets;
#[cfg(test)]
mod tests;
mod traffic;
mod trust;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

#[cfg(any(test, fuzzing))]
pub(crate) use self::documents::fuzz_documents;
pub use self::documents::{
    ClockSkew, DocumentBody, DocumentStore, DocumentView, DocumentsHandle, DocumentsParams, DocumentsView, OfferError,
    OnTrust, Spread,
};
pub use self::links::LINKS_MAX;
#[cfg(any(test, fuzzing))]
pub(crate) use self::shared::fuzz_shared;
#[cfg(test)]
pub(crate) use self::shared::restless;
pub use self::shared::{
    Answer, Changes, EVENT_BYTES_MAX, EVENTS_MAX, KV_BYTES_DEFAULT, KV_KEY_BYTES_MAX, KV_VALUE_BYTES_MAX, SharedError,
    SharedHandle, SharedParams, SharedStore, Space, Write,
};
use crate::catalogue::SnapshotReader;
use crate::clock::UnixSeconds;
use crate::metrics::Metrics;
use crate::model::{Demand, EjectionsRecord, Generation, MemberStatus, NodeInfo, NodeName};
use crate::pki::{CertificateFacts, Identity, SpkiHash};
use crate::registry;
use crate::store::StoredPeer;
use crate::supervise::Tasks;
use crate::transport::{Accepted, ControlTransport, LiveConnections};

/// How often a random member is compared with, unless told otherwise.
pub const SYNC_INTERVAL: Duration = Duration::from_secs(5);
/// Most accepted connections that wait for the gossip task.
pub const INCOMING_MAX: usize = 64;
/// Most orders that wait for the gossip task.
const COMMANDS_MAX: usize = 64;

/// A member as `weft members` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberView {
    /// Its name.
    pub name: NodeName,
    /// Its mesh address.
    pub addr: SocketAddr,
    /// Alive, leaving, left, failed.
    pub status: MemberStatus,
    /// Which life.
    pub generation: Generation,
    /// Since when it is that.
    pub since: Instant,
    /// When it is forgotten, if it stays gone: a failed member after `reconnect_timeout`, one that left after a day.
    pub forgotten_at: Option<Instant>,
    /// Its published facts, once they have come.
    pub info: Option<Arc<NodeInfo>>,
}

/// What the membership holds, this node included, in order of name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// By name.
    pub members: Vec<MemberView>,
    /// Nobody else answers, though others are known or seeds are given: this node may be cut off.
    pub isolated: bool,
    /// Those that connections lead to in a mesh of more than 33; empty in a smaller one, where that is everybody.
    pub neighbours: BTreeSet<NodeName>,
}

/// The certificates under which a node publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCertificates {
    /// The node.
    pub node: NodeName,
    /// Its own.
    pub intermediate: CertificateFacts,
    /// Its issuer's.
    pub issuer: CertificateFacts,
    /// The root's that certifies the issuer, if it is believed here.
    pub root: Option<SpkiHash>,
    /// When its records end, unless it signs them anew.
    pub lease_ends: UnixSeconds,
    /// How long records are good for in a mesh of this size, by this node's count of it.
    pub lease: Duration,
}

/// Why an order to gossip failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GossipError {
    /// None of the addresses answered; the reasons are in the text, one per address.
    #[error("could not join through any of the addresses: {0}")]
    Join(String),
    /// No such member.
    #[error("no member is named {0:?}; `weft members` lists them")]
    UnknownMember(String),
    /// The member answers: it must leave by itself.
    #[error("{0} is alive; run `weft leave` there")]
    MemberAlive(NodeName),
    /// The node is stopping.
    #[error("agent is shutting down")]
    Closed,
}

/// Why gossip cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A metric's name is taken: gossip was started twice on one registry.
    #[error("cannot register gossip's metrics")]
    Metrics(#[source] prometheus::Error),
}

/// Keeps known peers for the next start.
pub trait PeerStore: Send + Sync + 'static {
    /// Replaces what is kept. May block: it is called outside the gossip task, one call at a time.
    fn save(&self, peers: Vec<StoredPeer>);
}

/// What gossip needs.
pub struct GossipParams {
    /// This node's facts; its mesh address is the one that others dial.
    pub node: NodeInfo,
    /// This start's generation, already on disk.
    pub generation: Generation,
    /// The control endpoint.
    pub transport: ControlTransport,
    /// The data plane's connections: what comes on them speaks for members whose gossip is late.
    pub tunnels: LiveConnections,
    /// Gossip connections that peers opened, in a channel of at most [`INCOMING_MAX`].
    pub incoming: mpsc::Receiver<Accepted>,
    /// Signs and verifies.
    pub identity: Arc<Identity>,
    /// What is registered here.
    pub publication: watch::Receiver<Arc<registry::Publication>>,
    /// The instances that this node has ejected.
    pub ejections: watch::Receiver<Arc<EjectionsRecord>>,
    /// What this node asks of limits that hold for the whole mesh.
    pub demand: watch::Receiver<Arc<Demand>>,
    /// Gets what others ask of them; one that does not fit is told again by its author.
    pub demands: mpsc::Sender<(NodeName, Demand)>,
    /// The first snapshot's index.
    pub first_index: u64,
    /// Where to join, as the operator wrote it (`-join`).
    pub seeds: Vec<String>,
    /// Most peers to hold connections to, [`LINKS_MAX`] unless a test wants fewer; the least recently used goes first.
    pub links_max: usize,
    /// Peers known from the last run.
    pub known_peers: Vec<StoredPeer>,
    /// Keeps peers for the next.
    pub peer_store: Arc<dyn PeerStore>,
    /// How often a random member is compared with; [`SYNC_INTERVAL`] unless told otherwise.
    pub sync_interval: Duration,
    /// How long a failed member is remembered and called.
    pub reconnect_timeout: Duration,
    /// Ends the task.
    pub stop: CancellationToken,
}

impl std::fmt::Debug for GossipParams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GossipParams")
            .field("node", &self.node.name)
            .field("seeds", &self.seeds)
            .finish_non_exhaustive()
    }
}

/// Starts gossip.
#[derive(Debug)]
pub struct Gossip;

impl Gossip {
    /// Starts the gossip task on the current runtime. The reader's first snapshot holds this node and its services.
    ///
    /// # Errors
    /// If the metrics are registered already.
    pub fn start(
        params: GossipParams,
        documents: DocumentsParams,
        shared: SharedParams,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<(GossipHandle, SnapshotReader), StartError> {
        let gossip_metrics = metrics::GossipMetrics::new(metrics).map_err(StartError::Metrics)?;
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let orders = documents::queue();
        let (desk, shared_orders) = shared::queue();
        let around = carrier::Around {
            own: params.node.name.clone(),
            transport: params.transport.clone(),
            gossip: commands.clone(),
            interval: params.sync_interval,
        };
        let identity = Arc::clone(&params.identity);
        let (stop, first_index) = (params.stop.clone(), params.first_index);
        let mut compiler = policy::Compiler::new(documents.default_policy, metrics).map_err(StartError::Metrics)?;
        // The data plane begins with what is on disk: nothing passes that was denied before the restart.
        let first = compiler.compile(&documents::views(&documents.set));
        let (tables, table) = watch::channel(first);
        let (settings, upstreams) = watch::channel(Arc::new(policy::upstreams(&documents::views(&documents.set))));
        let desks = exchange::Desks { documents: orders.0.clone(), shared: desk.clone() };
        let rules = actor::Rules { policy: table, upstreams };
        let (actor, members, reader) = actor::Actor::new(params, received, desks, rules, gossip_metrics);
        let task = shared::Task::new(
            shared,
            around.clone(),
            (first_index, stop.clone()),
            members.clone(),
            (desk.orders, shared_orders),
            metrics,
        );
        let (shared_task, shared) = task.map_err(StartError::Metrics)?;
        let task = documents::Task::new(documents, around, (identity, stop.clone()), members.clone(), orders, metrics);
        let (task, documents) = task.map_err(StartError::Metrics)?;
        tasks.spawn("gossip", actor.run());
        tasks.spawn("documents", task.run());
        tasks.spawn("shared", shared_task.run());
        tasks.spawn("policy", policy::run(compiler, documents.view.clone(), (tables, settings), stop));
        Ok((GossipHandle { commands, members, documents, shared }, reader))
    }
}

/// An order to the gossip task.
#[derive(Debug)]
enum Command {
    Join(Vec<String>, oneshot::Sender<Result<usize, GossipError>>),
    Leave(oneshot::Sender<()>),
    ForceLeave(NodeName, Prune, oneshot::Sender<Result<(), GossipError>>),
    /// Something else is to be believed: records may have to go.
    Trust,
    /// Asks for the open connection to a peer.
    Link(NodeName, oneshot::Sender<Option<quinn::Connection>>),
    /// Asks for the round trips of the open connections.
    RoundTrips(oneshot::Sender<BTreeMap<NodeName, Duration>>),
    /// Asks for the certificates under which nodes publish.
    Certificates(oneshot::Sender<Vec<NodeCertificates>>),
    /// Asks for the hash of all records.
    RecordsHash(oneshot::Sender<u64>),
    /// Asks for a connection to a peer, which is dialled if there is none.
    Reach(NodeName, actor::ReachReply),
}

/// Whether a member that is made to leave is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prune {
    Keep,
    Forget,
}

/// Talks to the gossip task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GossipHandle {
    commands: mpsc::Sender<Command>,
    members: watch::Receiver<Arc<Members>>,
    documents: DocumentsHandle,
    shared: SharedHandle,
}

impl GossipHandle {
    /// Talks to the owner of the shared maps.
    pub fn shared(&self) -> &SharedHandle {
        &self.shared
    }

    /// Talks to the owner of the signed documents.
    pub fn documents(&self) -> &DocumentsHandle {
        &self.documents
    }

    /// Tries each of `targets` (name, address, host:port; default port 8301) once; returns how many answered.
    ///
    /// # Errors
    /// [`GossipError::Join`] with every reason if none answered.
    /// # Cancel safety
    /// Cancelling forgets the answer; the attempts go on.
    pub async fn join(&self, targets: Vec<String>) -> Result<usize, GossipError> {
        self.order(|reply| Command::Join(targets, reply)).await?
    }

    /// Says goodbye to all and returns when it was sent (500 ms at most).
    ///
    /// # Errors
    /// [`GossipError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer; the goodbye is said.
    pub async fn leave(&self) -> Result<(), GossipError> {
        self.order(Command::Leave).await
    }

    /// Moves a failed member to left; with `prune` forgets it and its records.
    ///
    /// # Errors
    /// If there is no such member or it is alive.
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn force_leave(&self, name: NodeName, prune: bool) -> Result<(), GossipError> {
        let prune = if prune { Prune::Forget } else { Prune::Keep };
        self.order(|reply| Command::ForceLeave(name, prune, reply)).await?
    }

    /// The smoothed round trips of the connections that are open, by node. Members without one are dialled, up to
    /// [`LINKS_MAX`] in all: who asks again a second later learns of them too.
    ///
    /// # Errors
    /// [`GossipError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn round_trips(&self) -> Result<BTreeMap<NodeName, Duration>, GossipError> {
        self.order(Command::RoundTrips).await
    }

    /// The round trips that the agent of `peer` measures, as it tells them, within a second; none if there is no
    /// connection to it or it does not answer.
    ///
    /// # Errors
    /// [`GossipError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn round_trips_of(&self, peer: NodeName) -> Result<Option<BTreeMap<NodeName, Duration>>, GossipError> {
        let connection = self.order(|reply| Command::Link(peer.clone(), reply)).await?;
        let Some(connection) = connection else { return Ok(None) };
        let told = exchange::round_trips(&connection).await;
        Ok(told.inspect_err(|error| debug!(%peer, error = error.explain(None), "a peer told no round trips")).ok())
    }

    /// The certificates under which nodes publish, in order of node.
    ///
    /// # Errors
    /// [`GossipError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn certificates(&self) -> Result<Vec<NodeCertificates>, GossipError> {
        self.order(Command::Certificates).await
    }

    /// The hash of all records that are held here: two agents with equal hashes hold the same.
    ///
    /// # Errors
    /// [`GossipError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn records_hash(&self) -> Result<u64, GossipError> {
        self.order(Command::RecordsHash).await
    }

    /// The members.
    pub fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members.borrow())
    }

    /// Wakes at each change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Members>> {
        self.members.clone()
    }

    async fn order<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, GossipError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| GossipError::Closed)?;
        answer.await.map_err(|_| GossipError::Closed)
    }
}

//! The registry: which services run on this host, and whether they are healthy.
//!
//! ```text
//!   API -> RegistryHandle --+                     +-> watch<LocalState>   -> API (outputs included)
//!   config files -----------+-> Task <-> store    |
//!   checks/ (http, tcp) ----+    |  owns it all --+-> watch<Publication>  -> gossip, catalogue (no outputs)
//! ```
//!
//! Invariants: one task owns all of it; a registration is on disk before it is answered or published; a service
//! outside the node's serve scope is refused; two services never ask for one local port; what is published stays
//! under [`RECORDS_BYTES_MAX`]; an output that changes alone publishes nothing; a check's status outlives
//! re-registration, reload and restart.
//! Not here: what other nodes run (`catalogue`), Consul's JSON on the way out (`api`), the relaying (`proxy`).

mod checks;
pub mod definition;
mod external;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod metrics;
mod rules;
mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::catalogue::{LocalView, SnapshotReader};
use crate::metrics::Metrics;
use crate::model::{CheckId, Entry, EntryKey, HealthStatus, InstanceId, NodeName, ServeScope};
use crate::store::Store;
use crate::supervise::Tasks;

pub use self::checks::CheckSettings;
use self::checks::alias::{self, AliasTarget};
pub use self::definition::{CheckDefinition, Probe, ServiceDefinition, Target, UpstreamDefinition};
pub use self::external::{
    CheckNotes, EXTERNAL_BYTES_MAX, EXTERNAL_NODES_MAX, ExternalFacts, ExternalNode, ExternalPart, ExternalWrite,
};
pub use self::rules::RECORDS_BYTES_MAX;
pub(crate) use self::rules::stand_together;
use self::task::{Command, Order};

/// Orders that wait for the registry's task; a caller beyond that waits for room.
const COMMANDS_MAX: usize = 64;

/// A registered service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalService {
    /// As registered.
    pub definition: ServiceDefinition,
    /// Index at which it came.
    pub create_index: u64,
    /// Index of its last change.
    pub modify_index: u64,
}

/// A check with its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalCheck {
    /// As registered.
    pub definition: Arc<CheckDefinition>,
    /// Thresholds applied.
    pub status: HealthStatus,
    /// The last output, cut to `output_bytes_max`.
    pub output: String,
    /// The name of the service that it is about; empty: the node.
    pub service_name: String,
    /// Its service's tags.
    pub service_tags: Box<[Box<str>]>,
}

/// All that is registered on this node; what `/v1/agent/services` and `/checks` show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalState {
    /// By id.
    pub services: BTreeMap<InstanceId, Arc<LocalService>>,
    /// By id.
    pub checks: BTreeMap<CheckId, Arc<LocalCheck>>,
    /// Nodes without an agent that are written here, by name.
    pub externals: BTreeMap<NodeName, Arc<ExternalNode>>,
}

/// What the registry gives to gossip: own records and the data plane's view.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    /// Services and checks (never `EntryKey::Node`; gossip adds that).
    pub records: BTreeMap<EntryKey, Entry>,
    /// What the data plane serves here.
    pub view: LocalView,
}

/// Why a registration was refused; the API maps each to a status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// 404
    #[error("Unknown service ID {id:?}. Ensure that the service ID is passed, not the service name.")]
    UnknownService {
        /// What was asked for.
        id: String,
    },
    /// 404
    #[error("Unknown check ID {id:?}. Ensure that the check ID is passed, not the check name.")]
    UnknownCheck {
        /// What was asked for.
        id: String,
    },
    /// 400
    #[error("CheckID {id:?} does not have associated TTL")]
    NotTtl {
        /// What was asked for.
        id: String,
    },
    /// 403
    #[error(
        "this node may not serve {service:?}: its certificate's serve scope is `{scope}`; make a token with a wider -serve and join again, or register on a node whose scope covers it"
    )]
    OutOfScope {
        /// The service.
        service: String,
        /// The scope.
        scope: String,
    },
    /// 400: another service already has the upstream's address, the node is full (64 KiB of records), ….
    #[error("{0}")]
    Invalid(String),
    /// 500
    #[error("cannot keep the registration on disk: {0}; nothing was changed")]
    Store(String),
    /// 503
    #[error("agent is shutting down")]
    Closed,
}

/// Tells which services this node may serve, as its certificate says at the moment.
pub type ScopeSource = Arc<dyn Fn() -> ServeScope + Send + Sync>;

/// Which checks may run programs of this host (`script`) or of its containers (`docker`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ScriptPolicy {
    /// None.
    #[default]
    Off,
    /// Those of config files (`enable_local_script_checks`).
    Files,
    /// All (`enable_script_checks`): whoever may register a check runs programs as the agent's user.
    All,
}

/// What the node's files define; replaced as a whole at a reload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigDefinitions {
    /// Services, ids unique.
    pub services: Vec<ServiceDefinition>,
    /// Checks that stand alone, ids unique.
    pub checks: Vec<CheckDefinition>,
    /// Which checks may run programs.
    pub scripts: ScriptPolicy,
    /// What checks use of the host; none: as before.
    pub settings: Option<CheckSettings>,
}

/// What the registry needs.
pub struct RegistryParams {
    /// Where registrations are kept.
    pub store: Store,
    /// What this node may serve: `identity.authority().scope()`.
    pub scope: ScopeSource,
    /// This node's name.
    pub node: NodeName,
    /// Where gateways listen that name no address: the agent's bind address.
    pub gateway_ip: IpAddr,
    /// Services and checks from the node's files: not stored, replaced at a reload.
    pub config: ConfigDefinitions,
    /// What checks use of the host.
    pub check_settings: CheckSettings,
    /// Where the counters go.
    pub metrics: Metrics,
    /// Owns the registry's task.
    pub tasks: Tasks,
    /// Ends it.
    pub stop: CancellationToken,
    /// The first index; seeded from the wall clock, so that it never goes backwards across a restart.
    pub first_index: u64,
}

impl fmt::Debug for RegistryParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { store, config, first_index, .. } = self;
        let mut out = f.debug_struct("RegistryParams");
        out.field("store", store).field("config", config).field("first_index", first_index);
        out.finish_non_exhaustive()
    }
}

/// Why the registry did not start.
#[derive(Debug, thiserror::Error)]
pub enum RegistryStartError {
    /// The store cannot be read.
    #[error("cannot read the registered services")]
    Store(#[source] crate::store::StoreError),
    /// A service of a config file is refused.
    #[error("a service of the config files is refused")]
    Config(#[source] RegistryError),
    /// What checks use of the host cannot be used.
    #[error("cannot prepare the checks: {0}")]
    Checks(String),
    /// A metric's name is taken.
    #[error("cannot add the registry's metrics")]
    Metrics(#[source] prometheus::Error),
}

/// Starts the registry's task.
#[derive(Debug)]
pub struct Registry;

impl Registry {
    /// Loads what is stored, checks it against `params`, and starts the task and the checks.
    ///
    /// A stored service that the scope does not cover, or that a config file's service stands against, stays on disk
    /// and is left out, with a warning.
    ///
    /// # Errors
    /// [`RegistryStartError`].
    /// # Cancel safety
    /// Cancelling starts nothing.
    pub async fn start(
        params: RegistryParams,
    ) -> Result<(RegistryHandle, watch::Receiver<Arc<Publication>>), RegistryStartError> {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let tasks = params.tasks.clone();
        let stop = params.stop.clone();
        let task = task::Task::load(params, receiver).await?;
        let (state, publication, aliases) = task.subscribe();
        tasks.spawn("registry", task.run(stop));
        Ok((RegistryHandle { state, aliases, commands }, publication))
    }
}

/// Talks to the registry's task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RegistryHandle {
    state: watch::Receiver<Arc<LocalState>>,
    /// What alias checks follow on other nodes.
    aliases: watch::Receiver<Arc<BTreeSet<AliasTarget>>>,
    commands: mpsc::Sender<Command>,
}

impl RegistryHandle {
    /// Registers or replaces a service; returns when it is on disk and published.
    ///
    /// Checks of its id that the definition does not name stay, unless `replace_existing_checks`. A check that is
    /// registered again keeps its status.
    ///
    /// # Errors
    /// [`RegistryError`]; nothing is changed then.
    /// # Cancel safety
    /// A cancelled call may or may not have registered the service.
    pub async fn register_service(
        &self,
        definition: ServiceDefinition,
        replace_existing_checks: bool,
    ) -> Result<(), RegistryError> {
        self.order(Order::RegisterService { definition: Box::new(definition), replace_existing_checks }).await
    }

    /// Removes a service and its checks; one of a config file comes back at the next reload.
    ///
    /// # Errors
    /// [`RegistryError::UnknownService`], `Store`, `Closed`.
    pub async fn deregister_service(&self, id: InstanceId) -> Result<(), RegistryError> {
        self.order(Order::DeregisterService { id }).await
    }

    /// Registers or replaces a check by itself; [`Probe::Static`] is how maintenance is set.
    ///
    /// # Errors
    /// [`RegistryError::UnknownService`] if it is about a service that is not here; `Invalid`, `Store`, `Closed`.
    pub async fn register_check(&self, definition: CheckDefinition) -> Result<(), RegistryError> {
        self.order(Order::RegisterCheck { definition: Box::new(definition) }).await
    }

    /// Writes about a node without an agent; returns when it is on disk and published.
    ///
    /// Whether another node has the name is not looked at here.
    ///
    /// # Errors
    /// [`RegistryError::OutOfScope`], `Invalid`, `Store`, `Closed`; nothing is changed then.
    pub async fn register_external(&self, write: ExternalWrite) -> Result<(), RegistryError> {
        self.order(Order::RegisterExternal(Box::new(write))).await
    }

    /// Takes away a part of a node without an agent; what is not there is gone already.
    ///
    /// # Errors
    /// [`RegistryError::Store`], `Closed`.
    pub async fn deregister_external(&self, node: NodeName, part: ExternalPart) -> Result<(), RegistryError> {
        self.order(Order::DeregisterExternal { node, part }).await
    }

    /// Removes a check.
    ///
    /// # Errors
    /// [`RegistryError::UnknownCheck`], `Store`, `Closed`.
    pub async fn deregister_check(&self, id: CheckId) -> Result<(), RegistryError> {
        self.order(Order::DeregisterCheck { id }).await
    }

    /// Takes a word from a TTL check's app. The status is on disk a second later at most.
    ///
    /// # Errors
    /// [`RegistryError::UnknownCheck`], `NotTtl`, `Closed`.
    pub async fn update_ttl(&self, id: CheckId, status: HealthStatus, output: String) -> Result<(), RegistryError> {
        self.order(Order::UpdateTtl { id, status, output }).await
    }

    /// Replaces what came from config files (reload); all of it, or nothing if a part is refused.
    ///
    /// What is unchanged is not touched: its checks run on. The status of a check that changed stays.
    ///
    /// # Errors
    /// [`RegistryError`]; nothing is changed then, unless it is `Store` or `Closed`.
    pub async fn replace_config(&self, config: ConfigDefinitions) -> Result<(), RegistryError> {
        self.order(Order::ReplaceConfig(Box::new(config))).await
    }

    /// Lets the alias checks that stand for something on another node follow the catalogue; ends with the registry.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn follow_catalogue(self, snapshot: SnapshotReader) {
        let (mut targets, mut snapshots) = (self.aliases.clone(), snapshot.subscribe());
        let mut told = BTreeMap::new();
        loop {
            let wanted = Arc::clone(&targets.borrow_and_update());
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let found: BTreeMap<_, _> =
                wanted.iter().map(|target| (target.clone(), alias::remote(&snapshot, target))).collect();
            if found != told {
                told.clone_from(&found);
                if self.order(Order::NoteRemote { statuses: found }).await.is_err() {
                    return;
                }
            }
            // A snapshot comes with every change of the mesh: where nothing is followed nothing is looked at.
            let changed =
                async { if told.is_empty() { std::future::pending().await } else { snapshots.changed().await } };
            let woken = tokio::select! {
                woken = targets.changed() => woken,
                woken = changed => woken,
            };
            if woken.is_err() {
                return;
            }
        }
    }

    /// Returns what is registered.
    pub fn state(&self) -> Arc<LocalState> {
        Arc::clone(&self.state.borrow())
    }

    /// Returns a receiver that wakes at each change of a service or a status; outputs change under it without a word.
    pub fn subscribe(&self) -> watch::Receiver<Arc<LocalState>> {
        self.state.clone()
    }

    async fn order(&self, order: Order) -> Result<(), RegistryError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command { order, answer }).await.map_err(|_| RegistryError::Closed)?;
        answered.await.unwrap_or(Err(RegistryError::Closed))
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

//! Registry (seam; helper R keeps these types and writes the rest).
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::catalogue::LocalView;
use crate::model::{CheckId, Entry, EntryKey, HealthStatus, InstanceId, Protocol, ServiceName, ServiceRecord};

/// A service as its owner registered it: by the API or a file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServiceDefinition {
    /// What other nodes see.
    pub record: ServiceRecord,
    /// A unix socket instead of a port; empty: none.
    pub socket_path: String,
    /// Where mesh traffic is relayed to: `Proxy.LocalServiceAddress:LocalServicePort`, else the service's own address, else 127.0.0.1:port.
    pub app_addr: SocketAddr,
    /// Local ports that it asks for.
    pub upstreams: Vec<UpstreamDefinition>,
    /// Whether `Connect.SidecarService` was given: a synthetic `<id>-sidecar-proxy` is then shown.
    pub sidecar: bool,
    /// Whether `Connect.Native` was given.
    pub native: bool,
    /// Its checks, ids resolved (`service:<id>`, `service:<id>:1..n`).
    pub checks: Vec<CheckDefinition>,
}

/// One upstream of a service.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UpstreamDefinition {
    /// Where calls go.
    pub destination: ServiceName,
    /// The local port's address; default 127.0.0.1 (in an agent with `-client 127.0.0.N`: that address).
    pub bind: SocketAddr,
    /// `Config.protocol`.
    pub protocol: Option<Protocol>,
}

/// A check as it was registered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CheckDefinition {
    /// Unique on the node.
    pub id: CheckId,
    /// For people; default `Service '<name>' check`.
    pub name: String,
    /// For people.
    pub notes: String,
    /// The instance that it is about.
    pub service: Option<InstanceId>,
    /// What is done.
    pub probe: Probe,
    /// Status before the first result; default critical.
    pub initial: HealthStatus,
    /// Passing results in a row before it passes.
    pub success_before_passing: u32,
    /// Failures in a row before it warns.
    pub failures_before_warning: u32,
    /// Failures in a row before it is critical.
    pub failures_before_critical: u32,
    /// Output kept, in bytes; at most 4096.
    pub output_bytes_max: usize,
    /// Deregisters the service after it was critical for so long; at least 1 min.
    pub deregister_critical_after: Option<Duration>,
}

/// What a check does.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Probe {
    /// Requests a URL: 2xx passes, 429 warns, all else is critical.
    Http {
        /// `http://…`
        url: String,
        /// Default GET.
        method: String,
        /// Extra headers.
        headers: BTreeMap<String, Vec<String>>,
        /// Request body.
        body: String,
        /// Whether redirects stay unfollowed.
        disable_redirects: bool,
        /// How often; at least 1 s.
        interval: Duration,
        /// Default 10 s.
        timeout: Duration,
    },
    /// Connects.
    Tcp {
        /// `host:port`
        target: String,
        /// How often; at least 1 s.
        interval: Duration,
        /// Default 10 s.
        timeout: Duration,
    },
    /// Waits for the app to say that it lives.
    Ttl {
        /// Critical after so long without a word.
        ttl: Duration,
    },
    /// Set by hand (maintenance).
    Static,
}

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
    pub definition: CheckDefinition,
    /// Thresholds applied.
    pub status: HealthStatus,
    /// The last output, cut to `output_bytes_max`.
    pub output: String,
    /// The name of the service that it is about; empty: the node.
    pub service_name: String,
    /// Its service's tags.
    pub service_tags: Vec<String>,
}

/// All that is registered on this node; what `/v1/agent/services` and `/checks` show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalState {
    /// By id.
    pub services: BTreeMap<InstanceId, Arc<LocalService>>,
    /// By id.
    pub checks: BTreeMap<CheckId, Arc<LocalCheck>>,
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

/// Talks to the registry's task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RegistryHandle {
    #[expect(dead_code, reason = "seam")]
    state: watch::Receiver<Arc<LocalState>>,
}

impl RegistryHandle {
    /// Registers or replaces a service; returns when it is on disk and published.
    pub async fn register_service(
        &self,
        _definition: ServiceDefinition,
        _replace_existing_checks: bool,
    ) -> Result<(), RegistryError> {
        todo!()
    }
    /// Removes a service and its checks.
    pub async fn deregister_service(&self, _id: InstanceId) -> Result<(), RegistryError> {
        todo!()
    }
    /// Registers or replaces a check by itself.
    pub async fn register_check(&self, _definition: CheckDefinition) -> Result<(), RegistryError> {
        todo!()
    }
    /// Removes a check.
    pub async fn deregister_check(&self, _id: CheckId) -> Result<(), RegistryError> {
        todo!()
    }
    /// A word from a TTL check's app.
    pub async fn update_ttl(&self, _id: CheckId, _status: HealthStatus, _output: String) -> Result<(), RegistryError> {
        todo!()
    }
    /// What is registered.
    pub fn state(&self) -> Arc<LocalState> {
        todo!()
    }
    /// Wakes at each change (output included).
    pub fn subscribe(&self) -> watch::Receiver<Arc<LocalState>> {
        todo!()
    }
}

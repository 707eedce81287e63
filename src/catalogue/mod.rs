//! The derived, immutable view of the mesh that the data plane and the API read.
//!
//! ```text
//!   replica (who published what) + membership (who is alive) + registry (what is local) + intentions
//!                                                                        -> Builder -> Arc<Snapshot>
//! ```
//!
//! Invariants: a snapshot never changes; instances stand in order of (node, instance id); `index` grows with each
//! snapshot; an entry that did not change is shared with the snapshot before (its `Arc` and its `modify_index` stay).
//! Not here: deciding who is alive (`membership`), picking an instance (`routing`).

pub mod builder;
mod external;
mod ingress;
mod reports;
pub mod virtual_ip;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

pub use self::builder::Builder;
pub use self::external::Externals;
pub use self::ingress::{GatewayPort, LocalGateway, closed_port, closed_port_check, gateway_check};
pub use self::reports::Reports;
pub use self::virtual_ip::VirtualIps;
use crate::authz::{Action, Table};
use crate::model::{Instance, InstanceId, MemberStatus, NodeEntry, NodeName, Protocol, ServiceName};
use crate::traffic::Traffic;
use crate::upstream;

/// Everything that a node knows of the mesh at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Grows by at least one with each snapshot; seeded from wall-clock milliseconds, never 0. Local to this agent.
    pub index: u64,
    /// This node.
    pub local_node: NodeName,
    /// Every node whose record is held, alive or not.
    pub nodes: BTreeMap<NodeName, Arc<NodeEntry>>,
    /// Every service with at least one instance.
    pub services: BTreeMap<ServiceName, Arc<ServiceEntry>>,
    /// Index of the last change to each service that had an instance once and has none: blocking queries stay right.
    pub gone_services: BTreeMap<ServiceName, u64>,
    /// What the data plane serves on this host.
    pub local: Arc<LocalView>,
    /// Who may call whom.
    pub policy: Arc<Table>,
    /// Index of the last change to `policy`.
    pub policy_index: u64,
    /// How instances are called: balancing, limits, ejection.
    pub upstreams: Arc<upstream::Table>,
    /// Which instances the nodes have ejected.
    pub reports: Arc<Reports>,
    /// What operators say about requests.
    pub traffic: Arc<Traffic>,
    /// Index of the last change to `traffic`.
    pub traffic_index: u64,
    /// Nodes that no agent runs on and their services: found by who looks for them, never called through the mesh.
    pub externals: Arc<Externals>,
}

impl Snapshot {
    /// Returns the instances of `service` that discovery lists: the mesh's and those of nodes without an agent, in order of
    /// (node, id).
    pub fn listed(&self, service: &str) -> Vec<Arc<Instance>> {
        let of = |services: &BTreeMap<ServiceName, Arc<ServiceEntry>>| {
            services.get(service).map(|entry| entry.instances.clone()).unwrap_or_default()
        };
        let mut all = of(&self.services);
        let external = of(self.externals.services());
        if !external.is_empty() {
            all.extend(external);
            all.sort_by(|a, b| (&a.node.info.name, &a.record.id).cmp(&(&b.node.info.name, &b.record.id)));
        }
        all
    }

    /// Returns every instance that discovery lists, first those of the mesh.
    pub fn all_listed(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let mesh = self.services.values().flat_map(|service| service.instances.iter());
        mesh.chain(self.externals.instances())
    }

    /// Says why the data plane knows no service of this name.
    pub fn why_unknown(&self, service: &str) -> String {
        if self.externals.services().contains_key(service) {
            return format!(
                "service `{service}` is registered on nodes without an agent alone: the mesh does not call those"
            );
        }
        format!("no service `{service}` is registered in the mesh")
    }

    /// Finds the node of this name, in the mesh or else without an agent.
    pub fn listed_node(&self, name: &NodeName) -> Option<&Arc<NodeEntry>> {
        let mesh = self.nodes.get(name).filter(|node| node.status != MemberStatus::Left);
        mesh.or_else(|| self.externals.node(name)).or_else(|| self.nodes.get(name))
    }

    /// Returns every node that discovery lists, first those of the mesh.
    pub fn listed_nodes(&self) -> impl Iterator<Item = &Arc<NodeEntry>> {
        self.nodes.values().chain(self.externals.nodes())
    }

    /// Returns the snapshot of a node that knows nothing yet; everybody may call.
    pub fn empty(local_node: NodeName) -> Self {
        Self {
            index: 1,
            local_node,
            nodes: BTreeMap::new(),
            services: BTreeMap::new(),
            gone_services: BTreeMap::new(),
            local: Arc::new(LocalView::default()),
            policy: Arc::new(Table::empty(Action::Allow)),
            policy_index: 1,
            upstreams: Arc::default(),
            reports: Arc::default(),
            traffic: Arc::default(),
            traffic_index: 1,
            externals: Arc::default(),
        }
    }
}

/// A service as the catalogue shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Its name.
    pub name: ServiceName,
    /// Its protocol: that of the first instance in order.
    pub protocol: Protocol,
    /// In order of (node, instance id); never empty.
    pub instances: Vec<Arc<Instance>>,
    /// Index of the last change to any instance, its checks or its node.
    pub modify_index: u64,
}

/// What the data plane serves on this host: written by the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalView {
    /// Local ports that lead into the mesh.
    pub upstreams: Vec<UpstreamListener>,
    /// Instances that mesh traffic may be relayed to.
    pub instances: BTreeMap<InstanceId, LocalInstance>,
    /// Gateways by which calls come into the mesh, in order.
    pub gateways: Vec<LocalGateway>,
}

/// A local port that leads to a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UpstreamListener {
    /// Where the app connects to.
    pub bind: SocketAddr,
    /// Which registered service the app is; its SVID authenticates the calls.
    pub source: ServiceName,
    /// Where calls go.
    pub destination: ServiceName,
    /// How calls are parsed where nothing but `tcp` is said of the destination (`Config.protocol` of the upstream).
    pub protocol: Option<Protocol>,
}

/// A local instance that mesh traffic is relayed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalInstance {
    /// Its service.
    pub service: ServiceName,
    /// The app's own address, usually loopback.
    pub app_addr: SocketAddr,
    /// How its traffic is parsed.
    pub protocol: Protocol,
    /// Whether its TCP connections begin with a header of the PROXY protocol, version 2.
    pub wants_proxy_header: bool,
}

/// Writes snapshots. One owner; readers are cloned from [`Publisher::reader`].
#[derive(Debug)]
pub struct Publisher {
    cell: Arc<ArcSwap<Snapshot>>,
    changed: watch::Sender<Arc<Snapshot>>,
}

impl Publisher {
    /// Starts with `first`.
    pub fn new(first: Arc<Snapshot>) -> Self {
        let cell = Arc::new(ArcSwap::new(Arc::clone(&first)));
        Self { cell, changed: watch::Sender::new(first) }
    }

    /// Publishes `snapshot` to every reader.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.cell.store(Arc::clone(&snapshot));
        self.changed.send_replace(snapshot);
    }

    /// Returns a reader.
    pub fn reader(&self) -> SnapshotReader {
        SnapshotReader { cell: Arc::clone(&self.cell), changed: self.changed.subscribe() }
    }
}

/// Reads the newest snapshot. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SnapshotReader {
    cell: Arc<ArcSwap<Snapshot>>,
    changed: watch::Receiver<Arc<Snapshot>>,
}

impl SnapshotReader {
    /// Returns the newest snapshot without a lock.
    pub fn load(&self) -> Arc<Snapshot> {
        self.cell.load_full()
    }

    /// Borrows the newest snapshot without a lock or a shared counter: for the data plane, never across an await.
    pub fn peek(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.cell.load()
    }

    /// Returns a receiver that wakes at each new snapshot.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.changed.clone()
    }
}

#[cfg(test)]
mod memory_tests;

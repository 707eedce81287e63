//! What the names of a snapshot are, beyond the snapshot's own order: found without case, by address, by virtual IP.
//!
//! Each part is derived when the first query asks for it, once per snapshot; names in lower case, which are nearly all, need
//! none of them. The virtual IPs pass from zone to zone for as long as the names stay.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::catalogue::{ServiceEntry, Snapshot, SnapshotReader, VirtualIps};
use crate::model::{Instance, MemberStatus, NodeEntry, NodeName, ServiceName};

/// A snapshot, with what DNS derives from it.
#[derive(Debug)]
pub(super) struct Zone {
    snapshot: Arc<Snapshot>,
    folded: OnceLock<Folded>,
    pointers: OnceLock<HashMap<IpAddr, Vec<Pointer>>>,
    virtuals: OnceLock<Arc<VirtualIps>>,
    /// Those of the zone before, if it knew them.
    virtuals_before: Option<Arc<VirtualIps>>,
}

/// What an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Pointer {
    Node { name: NodeName, datacenter: String },
    Service { name: ServiceName, datacenter: String },
}

/// Names that are not in lower case, by their lower case, and what lies above node names with dots.
#[derive(Debug, Default)]
struct Folded {
    services: HashMap<String, ServiceName>,
    nodes: HashMap<String, NodeName>,
    above_nodes: BTreeSet<String>,
}

impl Zone {
    /// Takes `snapshot`; `before` is the zone that it follows.
    pub(super) fn new(snapshot: Arc<Snapshot>, before: Option<&Self>) -> Self {
        let virtuals_before =
            before.and_then(|before| before.virtuals.get().or(before.virtuals_before.as_ref()).cloned());
        Self {
            snapshot,
            folded: OnceLock::new(),
            pointers: OnceLock::new(),
            virtuals: OnceLock::new(),
            virtuals_before,
        }
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Finds a service by its name in lower case. Where names differ in case alone, the lower-case one answers, or else the
    /// first in order.
    pub(super) fn service(&self, lower: &str) -> Option<&Arc<ServiceEntry>> {
        let services = &self.snapshot.services;
        services.get(lower).or_else(|| services.get(self.folded().services.get(lower)?))
    }

    /// Finds a service on nodes without an agent, as [`Zone::service`] does.
    pub(super) fn external_service(&self, lower: &str) -> Option<&Arc<ServiceEntry>> {
        let services = self.snapshot.externals.services();
        if services.is_empty() {
            return None;
        }
        services.get(lower).or_else(|| services.get(self.folded().services.get(lower)?))
    }

    /// Finds a node that has not left, as [`Zone::service`] does; one of the mesh goes before one without an agent.
    pub(super) fn node(&self, lower: &str) -> Option<&Arc<NodeEntry>> {
        let nodes = &self.snapshot.nodes;
        let named = nodes.get(lower).or_else(|| nodes.get(self.folded().nodes.get(lower)?));
        let external = || {
            let name = || self.folded().nodes.get(lower).cloned().or_else(|| lower.parse().ok());
            let externals = &self.snapshot.externals;
            if externals.is_empty() { None } else { externals.node(&name()?) }
        };
        named.filter(|node| node.status != MemberStatus::Left).or_else(external)
    }

    /// Tells whether a node's name goes on to the left of `lower`: `b` lies above `a.b`.
    pub(super) fn is_above_a_node(&self, lower: &str) -> bool {
        self.folded().above_nodes.contains(lower)
    }

    /// Tells whether any node is in `datacenter`.
    pub(super) fn has_datacenter(&self, datacenter: &str) -> bool {
        self.snapshot.nodes.values().any(|node| node.info.datacenter == datacenter)
    }

    /// This agent's own node.
    pub(super) fn local_node(&self) -> Option<&Arc<NodeEntry>> {
        self.snapshot.nodes.get(&self.snapshot.local_node)
    }

    /// What `ip` belongs to: nodes, or else services with an address of their own, or else a virtual IP.
    pub(super) fn pointers(&self, ip: IpAddr) -> &[Pointer] {
        self.pointers.get_or_init(|| pointers(&self.snapshot)).get(&ip).map(Vec::as_slice).unwrap_or_default()
    }

    /// The node at `ip`; of several the first in order of name.
    pub(super) fn node_at(&self, ip: IpAddr) -> Option<&NodeName> {
        self.pointers(ip).iter().find_map(|pointer| match pointer {
            Pointer::Node { name, .. } => Some(name),
            Pointer::Service { .. } => None,
        })
    }

    pub(super) fn virtuals(&self) -> &VirtualIps {
        self.virtuals.get_or_init(|| {
            // Who went lately keeps its claim: see `catalogue::virtual_ip`.
            let names = || self.snapshot.services.keys().chain(self.snapshot.gone_services.keys());
            let kept = self.virtuals_before.as_ref().filter(|before| before.is_of(names()));
            kept.map_or_else(|| Arc::new(VirtualIps::of(names())), Arc::clone)
        })
    }

    fn folded(&self) -> &Folded {
        self.folded.get_or_init(|| {
            let mut folded = Folded::default();
            let is_mixed = |name: &str| name.bytes().any(|byte| byte.is_ascii_uppercase());
            let services = self.snapshot.services.keys().chain(self.snapshot.externals.services().keys());
            for name in services.filter(|name| is_mixed(name.as_str())) {
                folded.services.entry(name.as_str().to_ascii_lowercase()).or_insert_with(|| name.clone());
            }
            for name in self.snapshot.listed_nodes().map(|node| &node.info.name) {
                if is_mixed(name.as_str()) {
                    folded.nodes.entry(name.as_str().to_ascii_lowercase()).or_insert_with(|| name.clone());
                }
                let lower = name.as_str().to_ascii_lowercase();
                let dots = lower.match_indices('.').filter_map(|(at, _)| lower.get(at + 1..));
                folded.above_nodes.extend(dots.map(str::to_owned));
            }
            folded
        })
    }
}

/// Returns the address that `instance` has for its own.
fn own_address(instance: &Instance) -> Option<IpAddr> {
    instance.record.address.parse().ok()
}

fn pointers(snapshot: &Snapshot) -> HashMap<IpAddr, Vec<Pointer>> {
    let mut pointers: HashMap<IpAddr, Vec<Pointer>> = HashMap::new();
    for node in snapshot.listed_nodes().filter(|node| node.status != MemberStatus::Left) {
        let Some(ip) = node.ip() else { continue };
        let pointer = Pointer::Node { name: node.info.name.clone(), datacenter: node.info.datacenter.clone() };
        let known = pointers.entry(ip).or_default();
        // What the mesh's own nodes are called is nobody else's to say.
        if node.external.is_none() || known.is_empty() {
            known.push(pointer);
        }
    }
    for instance in snapshot.all_listed() {
        let Some(ip) = own_address(instance) else { continue };
        let datacenter = instance.node.info.datacenter.clone();
        let pointer = Pointer::Service { name: instance.record.name.clone(), datacenter };
        let known = pointers.entry(ip).or_default();
        let is_of_a_node = matches!(known.first(), Some(Pointer::Node { .. }));
        if !is_of_a_node && known.last() != Some(&pointer) {
            known.push(pointer);
        }
    }
    pointers
}

/// The zone of the newest snapshot.
#[derive(Debug)]
pub(super) struct ZoneCell {
    reader: SnapshotReader,
    /// Never held across a wait; all who take it run on one thread.
    newest: Mutex<Arc<Zone>>,
}

impl ZoneCell {
    pub(super) fn new(reader: SnapshotReader) -> Self {
        let zone = Zone::new(reader.load(), None);
        Self { reader, newest: Mutex::new(Arc::new(zone)) }
    }

    /// Returns the zone of the newest snapshot.
    pub(super) fn load(&self) -> Arc<Zone> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&newest.snapshot, &self.reader.peek()) {
            *newest = Arc::new(Zone::new(self.reader.load(), Some(&newest)));
        }
        Arc::clone(&newest)
    }
}

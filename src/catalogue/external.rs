//! Nodes that no agent runs on, with their services: for discovery alone.
//!
//! ```text
//!   records of each agent (signed, leased) --> shadowed by a mesh node of that name? --> nodes, services --> API, DNS
//! ```
//!
//! They are kept apart from the mesh's own nodes and instances: the data plane reads [`super::Snapshot::services`], where none
//! of these is, so that it cannot send a call to one. Whoever answers there has no identity to prove.
//!
//! Invariants: a name that a node of the mesh has is nobody else's; of two agents that write one name both are shown, and a
//! look-up by name finds that of the agent that lives and comes first; instances stand in order of (node, id, agent); what
//! did not change keeps its `Arc` and its index.
//! Not here: who may write them (`registry`), whose records count (`replica`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::ServiceEntry;
use super::builder::status_of;
use crate::model::{
    CheckRecord, ExternalRecord, Generation, Instance, InstanceId, MemberStatus, NodeEntry, NodeInfo, NodeName,
    Outside, Protocol, ServiceName, ServiceRecord,
};

/// Most services remembered after their last instance went: fewer than of the mesh's own, for they hardly ever go.
const GONE_MAX: usize = 1024;

/// Nodes without an agent, and what is on them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Externals {
    /// By name, then by the agent where each was written.
    nodes: BTreeMap<(NodeName, NodeName), Arc<NodeEntry>>,
    services: BTreeMap<ServiceName, Arc<ServiceEntry>>,
    /// Index of the last change to each service that had an instance here once and has none.
    gone: BTreeMap<ServiceName, u64>,
    /// Index of the last change to the nodes.
    nodes_index: u64,
}

impl Externals {
    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Returns the nodes, in order of name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeEntry>> {
        self.nodes.values()
    }

    /// Finds a node by its name: of several that of the first agent, in order of name, that is alive.
    pub fn node(&self, name: &NodeName) -> Option<&Arc<NodeEntry>> {
        let named = || self.named(name);
        named().find(|node| node.status == MemberStatus::Alive).or_else(|| named().next())
    }

    /// Finds the nodes of one name, by agent.
    pub fn named<'a>(&'a self, name: &NodeName) -> impl Iterator<Item = &'a Arc<NodeEntry>> + use<'a> {
        let name = name.clone();
        let from = (name.clone(), first_name());
        self.nodes.range(from..).take_while(move |((own, _), _)| *own == name).map(|(_, node)| node)
    }

    /// Returns the names that several agents tell of that are alive, each with those agents, in order.
    pub fn doubled(&self) -> BTreeMap<NodeName, Vec<NodeName>> {
        let mut by_name: BTreeMap<NodeName, Vec<NodeName>> = BTreeMap::new();
        for ((name, agent), node) in &self.nodes {
            if node.status == MemberStatus::Alive {
                by_name.entry(name.clone()).or_default().push(agent.clone());
            }
        }
        by_name.retain(|_, agents| agents.len() > 1);
        by_name
    }

    /// Returns the services; each has at least one instance.
    pub fn services(&self) -> &BTreeMap<ServiceName, Arc<ServiceEntry>> {
        &self.services
    }

    /// Returns every instance, service by service.
    pub fn instances(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.services.values().flat_map(|service| service.instances.iter())
    }

    /// Returns the index of the last change to the nodes; 0: there never was one.
    pub fn nodes_index(&self) -> u64 {
        self.nodes_index
    }

    /// Returns the index of the last change to the service `name`; 0: it never had an instance here.
    pub fn service_index(&self, name: &str) -> u64 {
        let living = self.services.get(name).map(|service| service.modify_index);
        living.max(self.gone.get(name).copied()).unwrap_or(0)
    }

    /// Returns the index of the last change to any service.
    pub fn services_index(&self) -> u64 {
        let living = self.services.values().map(|service| service.modify_index);
        living.chain(self.gone.values().copied()).max().unwrap_or(0)
    }
}

/// What sorts before every node's name that is written with letters and digits alone.
fn first_name() -> NodeName {
    "0".parse().expect("a digit is a name")
}

#[cfg(test)]
impl Externals {
    /// What follows these at `index` if `agent`, which is `status`, has written `records` in `dc1`, and nobody else anything.
    pub(crate) fn after(&self, agent: &str, status: MemberStatus, records: &[ExternalRecord], index: u64) -> Self {
        self.after_all(&[(agent, status, records)], index)
    }

    /// As [`Externals::after`], for several agents.
    pub(crate) fn after_all(&self, agents: &[(&str, MemberStatus, &[ExternalRecord])], index: u64) -> Self {
        let written = agents.iter().map(|(agent, status, records)| {
            let records = records.iter().cloned().map(Arc::new).collect();
            let (generation, datacenter) = (Generation::default(), "dc1".to_owned());
            (agent.parse().unwrap(), Written { records, status: *status, generation, datacenter })
        });
        derive(self, &written.collect(), |_| false, index)
    }
}

/// What one agent wrote, and what the membership says of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) records: Box<[Arc<ExternalRecord>]>,
    pub(super) status: MemberStatus,
    pub(super) generation: Generation,
    pub(super) datacenter: String,
}

/// Node, instance, and the agent that wrote it.
type InstanceKey = (NodeName, InstanceId, NodeName);

/// Makes what is shown at `index` of what the agents wrote; `before` is what was shown, `is_mesh` tells the names of the
/// mesh's own nodes.
pub(super) fn derive(
    before: &Externals,
    written: &BTreeMap<NodeName, Written>,
    is_mesh: impl Fn(&NodeName) -> bool,
    index: u64,
) -> Externals {
    let mut nodes = BTreeMap::new();
    let mut found: BTreeMap<ServiceName, BTreeMap<InstanceKey, Arc<Instance>>> = BTreeMap::new();
    for (agent, written) in written {
        for record in written.records.iter().filter(|record| !is_mesh(&record.name)) {
            let key = (record.name.clone(), agent.clone());
            let node = node_entry(before.nodes.get(&key), (agent, written), record, index);
            for instance in instances(before, &node, record, index) {
                let id = instance.record.id.clone();
                let of_service = found.entry(instance.record.name.clone()).or_default();
                of_service.insert((record.name.clone(), id, agent.clone()), instance);
            }
            nodes.insert(key, node);
        }
    }
    let services: BTreeMap<ServiceName, Arc<ServiceEntry>> = found
        .into_iter()
        .map(|(name, instances)| {
            let instances: Vec<Arc<Instance>> = instances.into_values().collect();
            let shown = before.services.get(&name).filter(|shown| same(&shown.instances, &instances)).cloned();
            let new = || ServiceEntry { name: name.clone(), protocol: Protocol::Tcp, instances, modify_index: index };
            let entry = shown.unwrap_or_else(|| Arc::new(new()));
            (name, entry)
        })
        .collect();
    let mut gone = before.gone.clone();
    gone.extend(before.services.keys().map(|name| (name.clone(), index)));
    gone.retain(|name, _| !services.contains_key(name));
    while gone.len() > GONE_MAX {
        let oldest = gone.iter().min_by_key(|(_, index)| **index).map(|(name, _)| name.clone());
        oldest.map(|oldest| gone.remove(&oldest));
    }
    let is_same = nodes.len() == before.nodes.len() && same(nodes.values(), before.nodes.values());
    Externals { nodes, services, gone, nodes_index: if is_same { before.nodes_index } else { index } }
}

/// Tells whether both hold the same values in memory.
fn same<'a, T: 'a>(left: impl IntoIterator<Item = &'a Arc<T>>, right: impl IntoIterator<Item = &'a Arc<T>>) -> bool {
    let mut right = right.into_iter();
    left.into_iter().all(|one| right.next().is_some_and(|other| Arc::ptr_eq(one, other))) && right.next().is_none()
}

/// The node's entry: the one that is shown if nothing about it changed.
fn node_entry(
    shown: Option<&Arc<NodeEntry>>,
    (agent, written): (&NodeName, &Written),
    record: &Arc<ExternalRecord>,
    index: u64,
) -> Arc<NodeEntry> {
    // It is reached by nobody's mesh port: the address is for those who read `mesh_addr` as the node's address, if it is one.
    let ip = record.address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let info = NodeInfo {
        id: record.id.to_string(),
        name: record.name.clone(),
        mesh_addr: SocketAddr::new(ip, 0),
        datacenter: written.datacenter.clone(),
        meta: record.meta.iter().map(|(key, value)| (key.to_owned(), value.to_string())).collect(),
        build: String::new(),
        issuer: false,
    };
    let outside = Outside {
        address: record.address.clone(),
        tagged_addresses: record.tagged_addresses.clone(),
        written_at: agent.clone(),
    };
    let entry = NodeEntry {
        info: Arc::new(info),
        status: written.status,
        generation: written.generation,
        checks: checks_of(record, None).cloned().collect(),
        external: Some(Box::new(outside)),
        create_index: shown.map_or(index, |shown| shown.create_index),
        modify_index: shown.map_or(index, |shown| shown.modify_index),
    };
    match shown.filter(|shown| ***shown == entry) {
        Some(shown) => Arc::clone(shown),
        None => Arc::new(NodeEntry { modify_index: index, ..entry }),
    }
}

/// The checks that are about `service`, or about the node.
fn checks_of<'a>(
    record: &'a ExternalRecord,
    service: Option<&'a InstanceId>,
) -> impl Iterator<Item = &'a Arc<CheckRecord>> {
    record.checks.iter().filter(move |check| check.service.as_ref() == service)
}

/// The node's instances: those that are shown, where nothing about them changed.
fn instances(before: &Externals, node: &Arc<NodeEntry>, record: &ExternalRecord, index: u64) -> Vec<Arc<Instance>> {
    // What its agent signed says of itself what it likes: an id counts once.
    let mut seen = BTreeSet::new();
    let once = record.services.iter().filter(|service| seen.insert(&service.id));
    let make = |service: &Arc<ServiceRecord>| {
        let checks: Vec<&Arc<CheckRecord>> = checks_of(record, Some(&service.id)).collect();
        let wanted = (&node.info.name, &service.id, node.writer());
        let shown = before.services.get(&service.name).and_then(|entry| {
            let place =
                |shown: &Arc<Instance>| (&shown.node.info.name, &shown.record.id, shown.node.writer()).cmp(&wanted);
            entry.instances.get(entry.instances.binary_search_by(place).ok()?)
        });
        let is_same = |shown: &&Arc<Instance>| {
            Arc::ptr_eq(&shown.node, node) && shown.record == *service && shown.checks.iter().eq(checks.iter().copied())
        };
        if let Some(shown) = shown.filter(is_same) {
            return Arc::clone(shown);
        }
        Arc::new(Instance {
            node: Arc::clone(node),
            record: Arc::clone(service),
            status: status_of(node, &checks),
            checks: checks.into_iter().cloned().collect(),
            create_index: shown.map_or(index, |shown| shown.create_index),
            modify_index: index,
        })
    };
    once.map(make).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{HealthStatus, TextMap, Weights};

    fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
        text.parse().unwrap()
    }

    fn service(id: &str, of: &str) -> Arc<ServiceRecord> {
        Arc::new(ServiceRecord {
            id: name(id),
            name: name(of),
            kind: Box::default(),
            tags: Box::default(),
            meta: TextMap::default(),
            address: Box::default(),
            port: 5432,
            tagged_addresses: TextMap::default(),
            weights: Weights::default(),
            protocol: Protocol::Tcp,
            enable_tag_override: false,
        })
    }

    fn check(id: &str, about: Option<&str>, status: HealthStatus) -> Arc<CheckRecord> {
        Arc::new(CheckRecord {
            id: name(id),
            name: Box::default(),
            status,
            notes: Box::default(),
            service: about.map(name),
            kind: Box::default(),
        })
    }

    fn record(node: &str, address: &str, services: &[&str], checks: &[Arc<CheckRecord>]) -> Arc<ExternalRecord> {
        Arc::new(ExternalRecord {
            name: name(node),
            id: Box::default(),
            address: address.into(),
            tagged_addresses: TextMap::default(),
            meta: TextMap::default(),
            services: services.iter().map(|of| service(&format!("{of}-1"), of)).collect(),
            checks: checks.into(),
        })
    }

    fn written(records: &[Arc<ExternalRecord>], status: MemberStatus) -> Written {
        let (generation, datacenter) = (Generation::default(), "dc1".to_owned());
        Written { records: records.into(), status, generation, datacenter }
    }

    fn nobody(_: &NodeName) -> bool {
        false
    }

    #[test]
    fn what_changed_gets_the_index_and_all_else_keeps_its_place_in_memory() {
        let at = |db: HealthStatus| {
            let checks = [check("c", Some("db-1"), db)];
            let records =
                [record("h1", "192.0.2.1", &["db", "cache"], &checks), record("h2", "x.example", &["db"], &[])];
            BTreeMap::from([(name("n1"), written(&records, MemberStatus::Alive))])
        };
        let first = derive(&Externals::default(), &at(HealthStatus::Passing), nobody, 5);
        assert_eq!((first.nodes_index(), first.services_index(), first.service_index("db")), (5, 5, 5));
        assert_eq!(derive(&first, &at(HealthStatus::Passing), nobody, 6), first, "nothing changed");
        let second = derive(&first, &at(HealthStatus::Critical), nobody, 7);
        assert_eq!((second.nodes_index(), second.service_index("db"), second.service_index("cache")), (5, 7, 5));
        let status = |shown: &Externals| shown.services()["db"].instances.iter().map(|i| i.status).collect::<Vec<_>>();
        assert_eq!(status(&second), [HealthStatus::Critical, HealthStatus::Passing]);
        assert!(Arc::ptr_eq(&first.services()["cache"], &second.services()["cache"]));
        assert!(Arc::ptr_eq(&first.services()["db"].instances[1], &second.services()["db"].instances[1]));
        let none = derive(&second, &BTreeMap::new(), nobody, 9);
        assert_eq!((none.nodes().count(), none.instances().count()), (0, 0));
        assert_eq!((none.nodes_index(), none.service_index("db"), none.service_index("never")), (9, 9, 0));
        let back = derive(&none, &at(HealthStatus::Passing), nobody, 10);
        assert_eq!(back.service_index("db"), 10);
    }

    #[test]
    fn a_mesh_node_s_name_is_its_own_and_of_two_agents_both_are_shown_the_living_first() {
        let (early, late) = (record("h1", "192.0.2.1", &["db"], &[]), record("h1", "192.0.2.2", &["db"], &[]));
        let stolen = record("n2", "192.0.2.3", &["db"], &[]);
        let by_agents = |first: MemberStatus| {
            BTreeMap::from([
                (name("n1"), written(&[Arc::clone(&early)], first)),
                (name("n3"), written(&[Arc::clone(&late), Arc::clone(&stolen)], MemberStatus::Alive)),
            ])
        };
        let is_mesh = |node: &NodeName| node.as_str().starts_with('n');
        let both = derive(&Externals::default(), &by_agents(MemberStatus::Alive), is_mesh, 1);
        let addresses =
            |shown: &Externals| shown.instances().map(|i| i.node.address().into_owned()).collect::<Vec<_>>();
        assert_eq!(addresses(&both), ["192.0.2.1", "192.0.2.2"], "n2 is a node of the mesh");
        let found = |shown: &Externals| shown.node(&name("h1")).unwrap().writer().cloned();
        assert_eq!(found(&both), Some(name("n1")));
        let failed = derive(&both, &by_agents(MemberStatus::Failed), is_mesh, 2);
        assert_eq!(found(&failed), Some(name("n3")));
        assert_eq!(failed.services()["db"].instances[0].status, HealthStatus::Critical, "its agent answers no more");
        assert_eq!(failed.services()["db"].instances[1].status, HealthStatus::Passing);
        assert_eq!(failed.named(&name("h2")).count(), 0);
    }

    #[test]
    fn an_id_that_an_agent_says_twice_counts_once() {
        let mut twice = ExternalRecord::clone(&record("h1", "192.0.2.1", &["db"], &[]));
        twice.services = [service("a", "db"), service("a", "cache")].into();
        let shown = derive(
            &Externals::default(),
            &BTreeMap::from([(name("n1"), written(&[Arc::new(twice)], MemberStatus::Alive))]),
            nobody,
            1,
        );
        assert_eq!(shown.instances().map(|i| i.record.name.as_str()).collect::<Vec<_>>(), ["db"]);
    }

    #[test]
    fn what_is_gone_is_remembered_in_bounds() {
        let mut shown = Externals::default();
        for at in 0..u64::try_from(GONE_MAX).unwrap() + 10 {
            let of = format!("s{at}");
            let records = [record("h1", "192.0.2.1", &[&of], &[])];
            shown =
                derive(&shown, &BTreeMap::from([(name("n1"), written(&records, MemberStatus::Alive))]), nobody, at + 1);
        }
        assert_eq!(shown.gone.len(), GONE_MAX);
        assert_eq!(shown.service_index("s0"), 0);
    }
}

//! Derives snapshots, one change at a time.
//!
//! ```text
//!   set_node(name, state, status) --> nodes ----\
//!                                 \-> instances -> touched services --> build() --> Arc<Snapshot>
//!   set_local(view) -----------------------------------------------/
//! ```
//!
//! Invariants: only services with an instance that changed, came or went are rebuilt, everything else keeps its `Arc` and
//! its `modify_index`; indexes never fall; what changes between two snapshots carries the later one's index.
//! Not here: when to build (`node` paces it), who is alive (`membership`), which records are accepted (`replica`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::external::{self, Written};
use super::{Externals, LocalView, Reports, ServiceEntry, Snapshot};
use crate::authz::{Action, Table};
use crate::model::{CheckRecord, HealthStatus, Instance, InstanceId, MemberStatus, NodeEntry, NodeName, ServiceName};
use crate::replica::NodeState;
use crate::traffic::Traffic;
use crate::upstream;

/// Most services remembered after their last instance went. Enough for a day of one new name every 20 s; beyond it the
/// oldest is forgotten, and a blocking query on it waits like one on a name that never was.
pub const GONE_SERVICES_MAX: usize = 4096;

type Edits = BTreeMap<(NodeName, InstanceId), Option<Arc<Instance>>>;

/// Builds snapshots from nodes and their status. One owner, the one that publishes.
#[derive(Debug)]
pub struct Builder {
    local: NodeName,
    /// The index of the snapshot that is being prepared.
    index: u64,
    nodes: BTreeMap<NodeName, Arc<NodeEntry>>,
    /// By node; each node's by id.
    by_node: BTreeMap<NodeName, Box<[Arc<Instance>]>>,
    services: BTreeMap<ServiceName, Arc<ServiceEntry>>,
    gone_services: BTreeMap<ServiceName, u64>,
    view: Arc<LocalView>,
    policy: Arc<Table>,
    policy_index: u64,
    upstreams: Arc<upstream::Table>,
    reports: Arc<Reports>,
    traffic: Arc<Traffic>,
    traffic_index: u64,
    /// Nodes without an agent, by the agent where they were written.
    written: BTreeMap<NodeName, Written>,
    externals: Arc<Externals>,
    /// `externals` does not say what `written` and the names of `nodes` say.
    are_externals_stale: bool,
    /// What became of a service's instances since the last snapshot; none: gone.
    touched: BTreeMap<ServiceName, Edits>,
    is_changed: bool,
}

impl Builder {
    /// Starts with nothing but the name of this node. The first snapshot has index `first_index`, or 1 if that is 0.
    pub fn new(local: NodeName, first_index: u64) -> Self {
        Self {
            local,
            index: first_index.max(1),
            nodes: BTreeMap::new(),
            by_node: BTreeMap::new(),
            services: BTreeMap::new(),
            gone_services: BTreeMap::new(),
            view: Arc::default(),
            policy: Arc::new(Table::empty(Action::Allow)),
            policy_index: first_index.max(1),
            upstreams: Arc::default(),
            reports: Arc::default(),
            traffic: Arc::default(),
            traffic_index: first_index.max(1),
            written: BTreeMap::new(),
            externals: Arc::default(),
            are_externals_stale: false,
            touched: BTreeMap::new(),
            is_changed: false,
        }
    }

    /// Takes over what `name` published and how the membership sees it; without a state, or before its facts are known,
    /// the node is not shown.
    pub fn set_node(&mut self, name: &NodeName, state: Option<&NodeState>, status: MemberStatus) {
        match state.and_then(|state| self.node_entry(name, state, status)) {
            Some((node, state)) => {
                let ejected = if status == MemberStatus::Alive { state.ejections() } else { &[] };
                self.set_reports(name, ejected);
                self.set_written(&node, state);
                self.set_instances(&node, state);
                self.set_entry(node);
            }
            None => self.forget(name),
        }
    }

    /// Takes over the nodes without an agent that were written at `node`.
    fn set_written(&mut self, node: &NodeEntry, state: &NodeState) {
        let name = &node.info.name;
        let records: Box<[_]> = state.externals().cloned().collect();
        // Who left takes along what was written there.
        if records.is_empty() || node.status == MemberStatus::Left {
            self.are_externals_stale |= self.written.remove(name).is_some();
            return;
        }
        let (status, generation) = (node.status, node.generation);
        let new = Written { records, status, generation, datacenter: node.info.datacenter.clone() };
        if self.written.get(name) != Some(&new) {
            self.written.insert(name.clone(), new);
            self.are_externals_stale = true;
        }
    }

    /// Takes over what the data plane serves on this host.
    pub fn set_local(&mut self, view: LocalView) {
        if *self.view != view {
            self.view = Arc::new(view);
            self.is_changed = true;
        }
    }

    /// Takes over how instances are called.
    pub fn set_upstreams(&mut self, upstreams: Arc<upstream::Table>) {
        self.upstreams = upstreams;
        self.is_changed = true;
    }

    /// Takes over which instances `node` has ejected.
    fn set_reports(&mut self, node: &NodeName, ejected: &[(NodeName, InstanceId)]) {
        if !self.reports.is_of(node, ejected) {
            self.reports = Arc::new(self.reports.with(node, ejected));
            self.is_changed = true;
        }
    }

    /// Takes over who may call whom.
    pub fn set_policy(&mut self, policy: Arc<Table>) {
        self.policy = policy;
        self.policy_index = self.index;
        self.is_changed = true;
    }

    /// Takes over what operators say about requests.
    pub fn set_traffic(&mut self, traffic: Arc<Traffic>) {
        self.traffic = traffic;
        self.traffic_index = self.index;
        self.is_changed = true;
    }

    /// Whether the next snapshot differs from the last one.
    pub fn has_changed(&self) -> bool {
        self.is_changed || self.are_externals_stale
    }

    /// Returns the next snapshot; none if nothing changed since the last one.
    pub fn build(&mut self) -> Option<Arc<Snapshot>> {
        self.derive_externals();
        if !std::mem::take(&mut self.is_changed) {
            return None;
        }
        for (name, edits) in std::mem::take(&mut self.touched) {
            self.rebuild_service(name, edits);
        }
        let index = self.index;
        self.index = self.index.saturating_add(1);
        Some(Arc::new(Snapshot {
            index,
            local_node: self.local.clone(),
            nodes: self.nodes.clone(),
            services: self.services.clone(),
            gone_services: self.gone_services.clone(),
            local: Arc::clone(&self.view),
            policy: Arc::clone(&self.policy),
            policy_index: self.policy_index,
            upstreams: Arc::clone(&self.upstreams),
            reports: Arc::clone(&self.reports),
            traffic: Arc::clone(&self.traffic),
            traffic_index: self.traffic_index,
            externals: Arc::clone(&self.externals),
        }))
    }

    /// Makes what is shown of nodes without an agent anew, if something about them may have changed.
    fn derive_externals(&mut self) {
        if !std::mem::take(&mut self.are_externals_stale) {
            return;
        }
        let is_mesh = |name: &NodeName| self.nodes.get(name).is_some_and(|node| node.status != MemberStatus::Left);
        let externals = external::derive(&self.externals, &self.written, is_mesh, self.index);
        if externals != *self.externals {
            self.externals = Arc::new(externals);
            self.is_changed = true;
        }
    }

    /// Returns the node's entry: the one that is shown if nothing about it changed.
    fn node_entry<'a>(
        &self,
        name: &NodeName,
        state: &'a NodeState,
        status: MemberStatus,
    ) -> Option<(Arc<NodeEntry>, &'a NodeState)> {
        let info = state.info.as_ref()?;
        let is_shown = |entry: &&Arc<NodeEntry>| {
            entry.info == *info
                && entry.status == status
                && entry.generation == state.generation
                && entry.checks.iter().eq(node_checks(state))
        };
        let shown = self.nodes.get(name);
        if let Some(entry) = shown.filter(is_shown) {
            return Some((Arc::clone(entry), state));
        }
        let entry = NodeEntry {
            info: Arc::clone(info),
            status,
            generation: state.generation,
            checks: node_checks(state).cloned().collect(),
            external: None,
            create_index: shown.map_or(self.index, |entry| entry.create_index),
            modify_index: self.index,
        };
        Some((Arc::new(entry), state))
    }

    fn set_entry(&mut self, node: Arc<NodeEntry>) {
        let name = node.info.name.clone();
        if self.nodes.get(&name).is_none_or(|shown| !Arc::ptr_eq(shown, &node)) {
            self.nodes.insert(name, node);
            self.is_changed = true;
            self.are_externals_stale |= !self.written.is_empty();
        }
    }

    /// Replaces the node's instances, keeping those that did not change.
    fn set_instances(&mut self, node: &Arc<NodeEntry>, state: &NodeState) {
        let name = &node.info.name;
        let before = self.by_node.remove(name).unwrap_or_default();
        let mut checks = instance_checks(state);
        let mut after: Vec<Arc<Instance>> = Vec::with_capacity(before.len());
        for record in state.services() {
            let checks = checks.remove(&record.id).unwrap_or_default();
            let shown = by_id(&before, &record.id);
            let is_same = |instance: &&Arc<Instance>| {
                Arc::ptr_eq(&instance.node, node)
                    && instance.record == *record
                    && instance.checks.iter().eq(checks.iter().copied())
            };
            if let Some(instance) = shown.filter(is_same) {
                after.push(Arc::clone(instance));
                continue;
            }
            if let Some(instance) = shown.filter(|instance| instance.record.name != record.name) {
                self.take_out(name, instance);
            }
            let instance = Arc::new(Instance {
                node: Arc::clone(node),
                record: Arc::clone(record),
                status: status_of(node, &checks),
                checks: checks.into_iter().cloned().collect(),
                create_index: shown.map_or(self.index, |instance| instance.create_index),
                modify_index: self.index,
            });
            self.put_in(name, &instance);
            after.push(instance);
        }
        for instance in before.iter().filter(|instance| by_id(&after, &instance.record.id).is_none()) {
            self.take_out(name, instance);
        }
        if !after.is_empty() {
            self.by_node.insert(name.clone(), after.into());
        }
    }

    fn forget(&mut self, name: &NodeName) {
        self.set_reports(name, &[]);
        self.are_externals_stale |= self.written.remove(name).is_some();
        if self.nodes.remove(name).is_some() {
            self.is_changed = true;
            self.are_externals_stale |= !self.written.is_empty();
        }
        for instance in self.by_node.remove(name).unwrap_or_default() {
            self.take_out(name, &instance);
        }
    }

    fn put_in(&mut self, node: &NodeName, instance: &Arc<Instance>) {
        self.touch(node, instance, Some(Arc::clone(instance)));
    }

    fn take_out(&mut self, node: &NodeName, instance: &Instance) {
        self.touch(node, instance, None);
    }

    fn touch(&mut self, node: &NodeName, instance: &Instance, after: Option<Arc<Instance>>) {
        let edits = self.touched.entry(instance.record.name.clone()).or_default();
        edits.insert((node.clone(), instance.record.id.clone()), after);
        self.is_changed = true;
    }

    fn rebuild_service(&mut self, name: ServiceName, edits: Edits) {
        let shown = self.services.get(&name).map(|entry| entry.instances.as_slice()).unwrap_or_default();
        let instances = edited(shown, edits);
        let Some(first) = instances.first() else {
            // A service that came and went between two snapshots was never shown.
            if self.services.remove(&name).is_some() {
                self.remember_gone(name);
            }
            return;
        };
        let protocol = first.record.protocol;
        let entry = ServiceEntry { name: name.clone(), protocol, instances, modify_index: self.index };
        self.gone_services.remove(&name);
        self.services.insert(name, Arc::new(entry));
    }

    fn remember_gone(&mut self, name: ServiceName) {
        self.gone_services.insert(name, self.index);
        if self.gone_services.len() > GONE_SERVICES_MAX {
            let oldest = self.gone_services.iter().min_by_key(|(_, index)| **index).map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                self.gone_services.remove(&oldest);
            }
        }
    }
}

/// Merges `edits` into `shown`; both are in order of (node, id), and so is the result.
fn edited(shown: &[Arc<Instance>], edits: Edits) -> Vec<Arc<Instance>> {
    let mut instances = Vec::with_capacity(shown.len() + edits.len());
    let mut edits = edits.into_iter().peekable();
    for instance in shown {
        let at = (&instance.node.info.name, &instance.record.id);
        while let Some((_, before)) = edits.next_if(|((node, id), _)| (node, id) < at) {
            instances.extend(before);
        }
        match edits.next_if(|((node, id), _)| (node, id) == at) {
            Some((_, edit)) => instances.extend(edit),
            None => instances.push(Arc::clone(instance)),
        }
    }
    instances.extend(edits.filter_map(|(_, edit)| edit));
    instances.shrink_to_fit();
    instances
}

/// Finds an instance in a list in order of id.
fn by_id<'a>(instances: &'a [Arc<Instance>], id: &InstanceId) -> Option<&'a Arc<Instance>> {
    let at = instances.binary_search_by(|instance| instance.record.id.cmp(id)).ok()?;
    instances.get(at)
}

/// Returns the checks that are about the whole node, in order of id.
fn node_checks(state: &NodeState) -> impl Iterator<Item = &Arc<CheckRecord>> {
    state.checks().filter(|check| check.service.is_none())
}

/// Returns the checks that are about an instance, in order of id.
fn instance_checks(state: &NodeState) -> BTreeMap<&InstanceId, Vec<&Arc<CheckRecord>>> {
    let mut checks: BTreeMap<&InstanceId, Vec<&Arc<CheckRecord>>> = BTreeMap::new();
    for check in state.checks() {
        if let Some(service) = &check.service {
            checks.entry(service).or_default().push(check);
        }
    }
    checks
}

/// Returns the worst of the instance's checks, its node's checks and the membership: whoever does not stay alive gets no
/// new traffic.
pub(super) fn status_of(node: &NodeEntry, checks: &[&Arc<CheckRecord>]) -> HealthStatus {
    if node.status != MemberStatus::Alive {
        return HealthStatus::Critical;
    }
    HealthStatus::worst(node.checks.iter().chain(checks.iter().copied()).map(|check| check.status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixSeconds;
    use crate::model::{CheckId, Entry, EntryKey, ExternalRecord, Generation, NodeInfo, ServiceRecord, TextMap};
    use crate::replica::{HeadSigner, Params, Replica};

    const ALIVE: MemberStatus = MemberStatus::Alive;

    #[test]
    fn nothing_is_built_where_nothing_changed() {
        let mut builder = Builder::new(name("a"), 7);
        assert!(builder.build().is_none());
        let mut a = Node::new("a");
        a.publish([service("w", "web")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        assert_eq!(builder.build().unwrap().index, 7);
        builder.set_node(&name("a"), a.state(), ALIVE);
        builder.set_local(LocalView::default());
        assert!(builder.build().is_none());
    }

    #[test]
    fn a_change_of_one_service_leaves_the_others_alone() {
        let mut builder = Builder::new(name("a"), 1);
        let (mut a, mut b) = (Node::new("a"), Node::new("b"));
        a.publish([service("w", "web"), service("p", "pay")]);
        b.publish([service("w", "web"), service("d", "db")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        builder.set_node(&name("b"), b.state(), ALIVE);
        let first = builder.build().unwrap();
        a.publish([service("w", "web"), service("p", "pay"), check("c", Some("w"), HealthStatus::Warning)]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        let second = builder.build().unwrap();
        assert_eq!(second.index, 2);
        for same in ["pay", "db"] {
            assert!(Arc::ptr_eq(&first.services[same], &second.services[same]), "{same}");
        }
        assert!(Arc::ptr_eq(&first.nodes["a"], &second.nodes["a"]));
        let (before, after) = (&first.services["web"], &second.services["web"]);
        assert_eq!((before.modify_index, after.modify_index), (1, 2));
        assert_eq!(after.instances[0].status, HealthStatus::Warning);
        assert_eq!((after.instances[0].create_index, after.instances[0].modify_index), (1, 2));
        assert!(Arc::ptr_eq(&before.instances[1], &after.instances[1]));
    }

    #[test]
    fn the_worst_of_checks_node_and_membership_decides() {
        #[track_caller]
        fn status(checks: &[Entry], member: MemberStatus) -> HealthStatus {
            let mut node = Node::new("a");
            node.publish(std::iter::once(service("w", "web")).chain(checks.iter().cloned()));
            let mut builder = Builder::new(name("a"), 1);
            builder.set_node(&name("a"), node.state(), member);
            builder.build().unwrap().services["web"].instances[0].status
        }
        let warning = check("c", Some("w"), HealthStatus::Warning);
        assert_eq!(status(&[], ALIVE), HealthStatus::Passing);
        assert_eq!(status(std::slice::from_ref(&warning), ALIVE), HealthStatus::Warning);
        assert_eq!(status(&[warning, check("n", None, HealthStatus::Critical)], ALIVE), HealthStatus::Critical);
        assert_eq!(status(&[check("x", Some("other"), HealthStatus::Critical)], ALIVE), HealthStatus::Passing);
        for member in [MemberStatus::Leaving, MemberStatus::Left, MemberStatus::Failed] {
            assert_eq!(status(&[], member), HealthStatus::Critical);
        }
    }

    #[test]
    fn a_failed_node_changes_all_its_services_and_no_other() {
        let mut builder = Builder::new(name("a"), 1);
        let (mut a, mut b) = (Node::new("a"), Node::new("b"));
        a.publish([service("w", "web")]);
        b.publish([service("w", "web"), service("d", "db")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        builder.set_node(&name("b"), b.state(), ALIVE);
        let first = builder.build().unwrap();
        builder.set_node(&name("b"), b.state(), MemberStatus::Failed);
        let second = builder.build().unwrap();
        assert_eq!(second.nodes["b"].modify_index, 2);
        assert_eq!(second.nodes["b"].create_index, 1);
        assert_eq!(second.services["db"].instances[0].status, HealthStatus::Critical);
        assert_eq!(second.services["web"].instances.len(), 2);
        assert!(Arc::ptr_eq(&first.services["web"].instances[0], &second.services["web"].instances[0]));
    }

    #[test]
    fn a_service_that_goes_leaves_its_index_and_comes_back_clean() {
        let mut builder = Builder::new(name("a"), 1);
        let mut a = Node::new("a");
        a.publish([service("w", "web")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        builder.build().unwrap();
        // The instance takes another service's name: the old service goes, the new one comes.
        a.publish([service("w", "shop")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        let renamed = builder.build().unwrap();
        assert_eq!(renamed.services.keys().map(ServiceName::as_str).collect::<Vec<_>>(), ["shop"]);
        assert_eq!(renamed.gone_services["web"], 2);
        builder.set_node(&name("a"), None, ALIVE);
        let empty = builder.build().unwrap();
        assert!(empty.nodes.is_empty() && empty.services.is_empty());
        assert_eq!(empty.gone_services["shop"], 3);
        a.publish([service("w", "web")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        let back = builder.build().unwrap();
        assert_eq!(back.services["web"].modify_index, 4);
        assert_eq!(back.gone_services.keys().map(ServiceName::as_str).collect::<Vec<_>>(), ["shop"]);
    }

    #[test]
    fn the_oldest_gone_service_is_forgotten_first() {
        let mut builder = Builder::new(name("a"), 1);
        let mut a = Node::new("a");
        let mut last = None;
        for at in 0..=GONE_SERVICES_MAX + 1 {
            a.publish([service("w", &format!("s{at}"))]);
            builder.set_node(&name("a"), a.state(), ALIVE);
            last = builder.build();
        }
        let gone = &last.unwrap().gone_services;
        assert_eq!(gone.len(), GONE_SERVICES_MAX);
        assert!(!gone.contains_key("s0") && gone.contains_key("s1"));
    }

    #[test]
    fn a_node_without_facts_is_not_shown() {
        let mut replica = Replica::new(name("a"), Generation { number: 1, nonce: 1 }, Params::default());
        let entry = service("w", "web");
        replica.publish([(entry.key(), entry)].into(), &Unsigned, UnixSeconds(0)).unwrap();
        let mut builder = Builder::new(name("a"), 1);
        builder.set_node(&name("a"), replica.state(&name("a")), ALIVE);
        assert!(builder.build().is_none());
    }

    #[test]
    fn what_an_agent_writes_of_others_goes_with_it_and_yields_to_a_node_of_that_name() {
        let mut builder = Builder::new(name("a"), 1);
        let (mut a, mut db) = (Node::new("a"), Node::new("db-host"));
        a.publish([service("w", "web"), external("db-host", "db")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        let shown = builder.build().unwrap();
        assert_eq!(shown.services.keys().map(ServiceName::as_str).collect::<Vec<_>>(), ["web"], "never the mesh's");
        let instances = shown.listed("db");
        assert_eq!((instances.len(), instances[0].status), (1, HealthStatus::Passing));
        assert_eq!(instances[0].node.writer(), Some(&name("a")));

        builder.set_node(&name("a"), a.state(), MemberStatus::Failed);
        let failed = builder.build().unwrap();
        assert_eq!(failed.listed("db")[0].status, HealthStatus::Critical);
        builder.set_node(&name("a"), a.state(), ALIVE);
        builder.build().unwrap();

        // A change of the agent's own services is none of what was written there.
        let before = builder.build();
        assert!(before.is_none());
        a.publish([service("w", "shop"), external("db-host", "db")]);
        builder.set_node(&name("a"), a.state(), ALIVE);
        let other = builder.build().unwrap();
        let kept = other.externals.service_index("db");
        assert!(kept < other.index, "{kept}");

        db.publish([service("s", "ssh")]);
        builder.set_node(&name("db-host"), db.state(), ALIVE);
        let taken = builder.build().unwrap();
        assert!(taken.listed("db").is_empty(), "the mesh's node has the name");
        assert_eq!(taken.externals.service_index("db"), taken.index);
        builder.set_node(&name("db-host"), db.state(), MemberStatus::Left);
        assert_eq!(builder.build().unwrap().listed("db").len(), 1);
        builder.set_node(&name("a"), a.state(), MemberStatus::Left);
        assert!(builder.build().unwrap().listed("db").is_empty(), "its agent left");
        assert_eq!(builder.written.len(), 0);
    }

    struct Unsigned;

    impl HeadSigner for Unsigned {
        fn chain(&self) -> Vec<Vec<u8>> {
            Vec::new()
        }
        fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, String> {
            Ok(Vec::new())
        }
    }

    /// A node with the replica that it publishes through.
    struct Node {
        name: NodeName,
        replica: Replica,
    }

    impl Node {
        fn new(text: &str) -> Self {
            let replica = Replica::new(name(text), Generation { number: 1, nonce: 1 }, Params::default());
            Self { name: name(text), replica }
        }

        fn publish(&mut self, entries: impl IntoIterator<Item = Entry>) {
            let info = Entry::Node(Arc::new(NodeInfo {
                id: String::new(),
                name: self.name.clone(),
                mesh_addr: "10.0.0.1:8301".parse().unwrap(),
                datacenter: String::new(),
                meta: BTreeMap::new(),
                build: String::new(),
                issuer: false,
            }));
            let records: BTreeMap<EntryKey, Entry> =
                entries.into_iter().chain([info]).map(|entry| (entry.key(), entry)).collect();
            self.replica.publish(records, &Unsigned, UnixSeconds(0)).unwrap();
        }

        fn state(&self) -> Option<&NodeState> {
            self.replica.state(&self.name)
        }
    }

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn service(id: &str, service: &str) -> Entry {
        Entry::Service(Arc::new(ServiceRecord {
            port: 80,
            ..ServiceRecord::new(id.parse().unwrap(), service.parse().unwrap())
        }))
    }

    fn external(node: &str, of: &str) -> Entry {
        let Entry::Service(record) = service("x", of) else { unreachable!() };
        Entry::External(Arc::new(ExternalRecord {
            name: name(node),
            id: Box::default(),
            address: "192.0.2.7".into(),
            tagged_addresses: TextMap::default(),
            meta: TextMap::default(),
            services: [record].into(),
            checks: Box::default(),
        }))
    }

    fn check(id: &str, about: Option<&str>, status: HealthStatus) -> Entry {
        let id: CheckId = id.parse().unwrap();
        let service = about.map(|about| about.parse().unwrap());
        Entry::Check(Arc::new(CheckRecord {
            id,
            name: Box::default(),
            status,
            notes: Box::default(),
            service,
            kind: Box::default(),
        }))
    }
}

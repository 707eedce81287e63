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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Instance, LocalView, NodeEntry, ServiceEntry, Snapshot};
use crate::model::{CheckRecord, HealthStatus, InstanceId, MemberStatus, NodeName, ServiceName};
use crate::replica::NodeState;

/// Most services remembered after their last instance went. Enough for a day of one new name every 20 s; beyond it the
/// oldest is forgotten, and a blocking query on it waits like one on a name that never was.
pub const GONE_SERVICES_MAX: usize = 4096;

/// Builds snapshots from nodes and their status. One owner, the one that publishes.
#[derive(Debug)]
pub struct Builder {
    local: NodeName,
    /// The index of the snapshot that is being prepared.
    index: u64,
    nodes: BTreeMap<NodeName, Arc<NodeEntry>>,
    by_node: BTreeMap<NodeName, BTreeMap<InstanceId, Arc<Instance>>>,
    by_service: BTreeMap<ServiceName, BTreeMap<(NodeName, InstanceId), Arc<Instance>>>,
    services: BTreeMap<ServiceName, Arc<ServiceEntry>>,
    gone_services: BTreeMap<ServiceName, u64>,
    view: Arc<LocalView>,
    touched: BTreeSet<ServiceName>,
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
            by_service: BTreeMap::new(),
            services: BTreeMap::new(),
            gone_services: BTreeMap::new(),
            view: Arc::default(),
            touched: BTreeSet::new(),
            is_changed: false,
        }
    }

    /// Takes over what `name` published and how the membership sees it; without a state, or before its facts are known,
    /// the node is not shown.
    pub fn set_node(&mut self, name: &NodeName, state: Option<&NodeState>, status: MemberStatus) {
        match state.and_then(|state| self.node_entry(name, state, status)) {
            Some((node, state)) => {
                self.set_instances(&node, state);
                self.set_entry(node);
            }
            None => self.forget(name),
        }
    }

    /// Takes over what the data plane serves on this host.
    pub fn set_local(&mut self, view: LocalView) {
        if *self.view != view {
            self.view = Arc::new(view);
            self.is_changed = true;
        }
    }

    /// Returns the next snapshot; none if nothing changed since the last one.
    pub fn build(&mut self) -> Option<Arc<Snapshot>> {
        if !std::mem::take(&mut self.is_changed) {
            return None;
        }
        for name in std::mem::take(&mut self.touched) {
            self.rebuild_service(name);
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
        }))
    }

    /// Returns the node's entry: the one that is shown if nothing about it changed.
    fn node_entry<'a>(
        &self,
        name: &NodeName,
        state: &'a NodeState,
        status: MemberStatus,
    ) -> Option<(Arc<NodeEntry>, &'a NodeState)> {
        let info = state.info.as_deref()?;
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
            info: info.clone(),
            status,
            generation: state.generation,
            checks: node_checks(state).cloned().collect(),
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
        }
    }

    /// Replaces the node's instances, keeping those that did not change.
    fn set_instances(&mut self, node: &Arc<NodeEntry>, state: &NodeState) {
        let name = &node.info.name;
        let mut before = self.by_node.remove(name).unwrap_or_default();
        let mut checks = instance_checks(state);
        let mut after = BTreeMap::new();
        for (id, record) in &state.services {
            let checks = checks.remove(id).unwrap_or_default();
            let shown = before.remove(id);
            let is_same = |instance: &&Arc<Instance>| {
                Arc::ptr_eq(&instance.node, node)
                    && instance.record == *record
                    && instance.checks.iter().eq(checks.iter().copied())
            };
            if let Some(instance) = shown.as_ref().filter(is_same) {
                after.insert(id.clone(), Arc::clone(instance));
                continue;
            }
            if let Some(instance) = shown.as_deref().filter(|instance| instance.record.name != record.name) {
                self.take_out(name, instance);
            }
            let instance = Arc::new(Instance {
                node: Arc::clone(node),
                record: record.clone(),
                status: status_of(node, &checks),
                checks: checks.into_iter().cloned().collect(),
                create_index: shown.map_or(self.index, |instance| instance.create_index),
                modify_index: self.index,
            });
            self.put_in(name, &instance);
            after.insert(id.clone(), instance);
        }
        for instance in before.values() {
            self.take_out(name, instance);
        }
        if !after.is_empty() {
            self.by_node.insert(name.clone(), after);
        }
    }

    fn forget(&mut self, name: &NodeName) {
        if self.nodes.remove(name).is_some() {
            self.is_changed = true;
        }
        for instance in self.by_node.remove(name).unwrap_or_default().values() {
            self.take_out(name, instance);
        }
    }

    fn put_in(&mut self, node: &NodeName, instance: &Arc<Instance>) {
        let service = instance.record.name.clone();
        let key = (node.clone(), instance.record.id.clone());
        self.by_service.entry(service.clone()).or_default().insert(key, Arc::clone(instance));
        self.touch(service);
    }

    fn take_out(&mut self, node: &NodeName, instance: &Instance) {
        let service = &instance.record.name;
        if let Some(instances) = self.by_service.get_mut(service) {
            instances.remove(&(node.clone(), instance.record.id.clone()));
            if instances.is_empty() {
                self.by_service.remove(service);
            }
        }
        self.touch(service.clone());
    }

    fn touch(&mut self, service: ServiceName) {
        self.touched.insert(service);
        self.is_changed = true;
    }

    fn rebuild_service(&mut self, name: ServiceName) {
        let instances: Vec<Arc<Instance>> =
            self.by_service.get(&name).map(|instances| instances.values().cloned().collect()).unwrap_or_default();
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

/// Returns the checks that are about the whole node, in order of id.
fn node_checks(state: &NodeState) -> impl Iterator<Item = &CheckRecord> {
    state.checks.values().filter(|check| check.service.is_none())
}

/// Returns the checks that are about an instance, in order of id.
fn instance_checks(state: &NodeState) -> BTreeMap<&InstanceId, Vec<&CheckRecord>> {
    let mut checks: BTreeMap<&InstanceId, Vec<&CheckRecord>> = BTreeMap::new();
    for check in state.checks.values() {
        if let Some(service) = &check.service {
            checks.entry(service).or_default().push(check);
        }
    }
    checks
}

/// Returns the worst of the instance's checks, its node's checks and the membership: whoever does not stay alive gets no
/// new traffic.
fn status_of(node: &NodeEntry, checks: &[&CheckRecord]) -> HealthStatus {
    if node.status != MemberStatus::Alive {
        return HealthStatus::Critical;
    }
    HealthStatus::worst(node.checks.iter().chain(checks.iter().copied()).map(|check| check.status))
}

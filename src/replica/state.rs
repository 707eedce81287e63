//! The state of one node as one replica holds it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::head::{Base, Change, Delta, Digest, NodeHead};
use crate::clock::UnixSeconds;
use crate::model::{
    CheckId, CheckRecord, EJECTIONS_MAX, EjectionsRecord, Entry, EntryKey, ExternalRecord, Generation, InstanceId,
    NodeInfo, NodeName, ServeScope, ServiceName, ServiceRecord,
};
use crate::wire::{self, WireError};

/// What one node published, checked against its signature.
#[derive(Debug, Clone)]
pub struct NodeState {
    /// Which life of the node.
    pub generation: Generation,
    /// Counts the node's heads in this life.
    pub version: u64,
    /// The state is dropped then unless a newer head comes: end of the lease or of the certificate, the earlier.
    pub not_after: UnixSeconds,
    /// The node's facts; none until it published them.
    pub info: Option<Arc<NodeInfo>>,
    /// The version that changed the facts last.
    info_version: u64,
    /// By id.
    services: Box<[Held<ServiceRecord>]>,
    /// By id.
    checks: Box<[Held<CheckRecord>]>,
    ejections: Option<Held<EjectionsRecord>>,
    /// By name.
    externals: Box<[Held<ExternalRecord>]>,
    withheld: Withheld,
    /// Removed keys with the version that removed them (or a later one), oldest first.
    grave: VecDeque<(u64, EntryKey)>,
    /// Deltas from a version below this one cannot be made: removals since then are forgotten.
    grave_floor: u64,
    pub(super) signed: Arc<Signed>,
    /// The first version known to stand under the chain in `signed`.
    pub(super) chain_since: u64,
    /// A second head of this version has been reported.
    pub(super) fork_reported: bool,
}

/// A record, shared with the catalogue, and the version that changed it last.
#[derive(Debug)]
struct Held<T> {
    version: u64,
    record: Arc<T>,
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self { version: self.version, record: Arc::clone(&self.record) }
    }
}

/// What is published and signed, but outside the node's scope: held only so that hashes agree.
#[derive(Debug, Clone, Default)]
struct Withheld {
    services: BTreeSet<InstanceId>,
    checks: BTreeSet<CheckId>,
    /// As a whole: a node of which one service is outside.
    externals: BTreeSet<NodeName>,
}

/// A head with what proves it.
#[derive(Debug)]
pub(super) struct Signed {
    pub(super) head: NodeHead,
    pub(super) digest: Digest,
    pub(super) signature: Vec<u8>,
    pub(super) chain: Arc<Vec<Vec<u8>>>,
}

/// The entries of a state while it is built aside.
#[derive(Debug, Default)]
pub(super) struct Draft {
    info: Option<Held<NodeInfo>>,
    services: BTreeMap<InstanceId, Held<ServiceRecord>>,
    checks: BTreeMap<CheckId, Held<CheckRecord>>,
    ejections: Option<Held<EjectionsRecord>>,
    externals: BTreeMap<NodeName, Held<ExternalRecord>>,
    withheld: Withheld,
    grave: VecDeque<(u64, EntryKey)>,
    grave_floor: u64,
}

impl Draft {
    /// Starts from nothing: removals before `floor` are unknown.
    pub(super) fn from_nothing(floor: u64) -> Self {
        Self { grave_floor: floor, ..Self::default() }
    }

    /// Starts from `state`, scope not applied.
    pub(super) fn from_state(state: &NodeState) -> Self {
        let info = state.info.clone().map(|record| Held { version: state.info_version, record });
        Self {
            info,
            services: state.services.iter().map(|held| (held.record.id.clone(), held.clone())).collect(),
            checks: state.checks.iter().map(|held| (held.record.id.clone(), held.clone())).collect(),
            ejections: state.ejections.clone(),
            externals: state.externals.iter().map(|held| (held.record.name.clone(), held.clone())).collect(),
            withheld: Withheld::default(),
            grave: state.grave.clone(),
            grave_floor: state.grave_floor,
        }
    }

    /// Sets an entry as changed by `version`.
    pub(super) fn set(&mut self, version: u64, entry: Entry) {
        match entry {
            Entry::Node(record) => self.info = Some(Held { version, record }),
            Entry::Service(record) => drop(self.services.insert(record.id.clone(), Held { version, record })),
            Entry::Check(record) => drop(self.checks.insert(record.id.clone(), Held { version, record })),
            Entry::Ejections(record) => self.ejections = Some(Held { version, record }),
            Entry::External(record) => drop(self.externals.insert(record.name.clone(), Held { version, record })),
        }
    }

    /// Removes `key` and remembers that `version` did so, among the last `grave_max` removals.
    pub(super) fn remove(&mut self, version: u64, key: EntryKey, grave_max: usize) {
        match &key {
            EntryKey::Node => self.info = None,
            EntryKey::Service(id) => drop(self.services.remove(id)),
            EntryKey::Check(id) => drop(self.checks.remove(id)),
            EntryKey::Ejections => self.ejections = None,
            EntryKey::External(name) => drop(self.externals.remove(name)),
        }
        self.grave.push_back((version, key));
        while self.grave.len() > grave_max {
            if let Some((forgotten, _)) = self.grave.pop_front() {
                self.grave_floor = self.grave_floor.max(forgotten);
            }
        }
    }

    /// Encodes every entry with the version that changed it, in order of key: what the state hash covers.
    pub(super) fn encode(&self) -> Result<Vec<u8>, WireError> {
        let single = (self.info.clone(), self.ejections.clone());
        let lists = (self.services.values(), self.checks.values(), self.externals.values());
        let entries: Vec<(u64, Entry)> = entries(single, lists).collect();
        wire::encode(&entries)
    }

    /// Puts aside the services outside `scope` and their checks, and nodes without an agent that have such a service; returns
    /// the services' names.
    pub(super) fn withhold(&mut self, scope: &ServeScope) -> Vec<ServiceName> {
        let is_outside = |record: &ServiceRecord| !scope.covers(record.name.as_str());
        let refused: Vec<&Held<ServiceRecord>> =
            self.services.values().filter(|held| is_outside(&held.record)).collect();
        let has_refused = |held: &&Held<ExternalRecord>| held.record.services.iter().any(|service| is_outside(service));
        let externals: Vec<&Held<ExternalRecord>> = self.externals.values().filter(has_refused).collect();
        if refused.is_empty() && externals.is_empty() {
            return Vec::new();
        }
        let services: BTreeSet<InstanceId> = refused.iter().map(|held| held.record.id.clone()).collect();
        let is_about_refused =
            |check: &CheckRecord| check.service.as_ref().is_some_and(|service| services.contains(service));
        let about = self.checks.values().filter(|held| is_about_refused(&held.record));
        let checks = about.map(|held| held.record.id.clone()).collect();
        let of_externals = externals.iter().flat_map(|held| held.record.services.iter());
        let outside = of_externals.filter(|record| is_outside(record)).map(|record| record.name.clone());
        let mut names: Vec<ServiceName> = refused.iter().map(|held| held.record.name.clone()).chain(outside).collect();
        names.sort();
        names.dedup();
        let externals = externals.iter().map(|held| held.record.name.clone()).collect();
        self.withheld = Withheld { services, checks, externals };
        names
    }

    /// Makes it a state under `signed`, which is valid until `not_after`.
    pub(super) fn finish(
        mut self,
        signed: Signed,
        chain_since: u64,
        not_after: UnixSeconds,
        names: &mut Names,
    ) -> NodeState {
        self.share_texts(names);
        let Self { info, services, checks, ejections, externals, withheld, mut grave, grave_floor } = self;
        // A key that came back needs no removal.
        grave.retain(|(_, key)| match key {
            EntryKey::Node => info.is_none(),
            EntryKey::Service(id) => !services.contains_key(id),
            EntryKey::Check(id) => !checks.contains_key(id),
            EntryKey::Ejections => ejections.is_none(),
            EntryKey::External(name) => !externals.contains_key(name),
        });
        let (info_version, info) = info.map_or((0, None), |held| (held.version, Some(held.record)));
        NodeState {
            generation: signed.head.generation,
            version: signed.head.version,
            not_after,
            info,
            info_version,
            services: services.into_values().collect(),
            checks: checks.into_values().collect(),
            ejections,
            externals: externals.into_values().collect(),
            withheld,
            grave,
            grave_floor,
            signed: Arc::new(signed),
            chain_since,
            fork_reported: false,
        }
    }

    /// Lets each service be named by the text in `names`, and each check name its service by the text that the service has.
    fn share_texts(&mut self, names: &mut Names) {
        for held in self.services.values_mut() {
            let name = names.share(&held.record.name);
            if !name.shares_text(&held.record.name) {
                Arc::make_mut(&mut held.record).name = name;
            }
        }
        for held in self.checks.values_mut() {
            let Some(about) = &held.record.service else { continue };
            let Some((id, _)) = self.services.get_key_value(about) else { continue };
            if !id.shares_text(about) {
                let id = id.clone();
                Arc::make_mut(&mut held.record).service = Some(id);
            }
        }
    }
}

/// The services' names, one text each however many instances there are.
#[derive(Debug, Default)]
pub(super) struct Names {
    texts: BTreeSet<ServiceName>,
    /// From this many on those that nothing has any more are taken out.
    purge_at: usize,
}

/// Names below which none is taken out.
const NAMES_PURGE_MIN: usize = 64;

impl Names {
    fn share(&mut self, name: &ServiceName) -> ServiceName {
        if let Some(known) = self.texts.get(name) {
            return known.clone();
        }
        if self.texts.len() >= self.purge_at {
            self.texts.retain(ServiceName::is_shared);
            self.purge_at = self.texts.len().saturating_mul(2).max(NAMES_PURGE_MIN);
        }
        self.texts.insert(name.clone());
        name.clone()
    }
}

/// Returns entries with the version that changed each, in order of key.
fn entries<'a>(
    (info, ejections): (Option<Held<NodeInfo>>, Option<Held<EjectionsRecord>>),
    (services, checks, externals): (
        impl Iterator<Item = &'a Held<ServiceRecord>>,
        impl Iterator<Item = &'a Held<CheckRecord>>,
        impl Iterator<Item = &'a Held<ExternalRecord>>,
    ),
) -> impl Iterator<Item = (u64, Entry)> {
    let info = info.into_iter().map(|held| (held.version, Entry::Node(held.record)));
    let services = services.map(|held| (held.version, Entry::Service(Arc::clone(&held.record))));
    let checks = checks.map(|held| (held.version, Entry::Check(Arc::clone(&held.record))));
    let ejections = ejections.into_iter().map(|held| (held.version, Entry::Ejections(held.record)));
    let externals = externals.map(|held| (held.version, Entry::External(Arc::clone(&held.record))));
    info.chain(services).chain(checks).chain(ejections).chain(externals)
}

impl NodeState {
    /// The chain that its head was signed under: node intermediate, issuer.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.signed.chain
    }

    /// The same, to be held.
    pub(crate) fn shared_chain(&self) -> Arc<Vec<Vec<u8>>> {
        Arc::clone(&self.signed.chain)
    }

    /// Returns whose state it is.
    pub fn node(&self) -> &NodeName {
        &self.signed.head.node
    }

    /// Returns the version that is held.
    pub fn digest(&self) -> &Digest {
        &self.signed.digest
    }

    /// Returns its instances within its scope, by id.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceRecord>> {
        let records = self.services.iter().map(|held| &held.record);
        records.filter(|record| !self.withheld.services.contains(&record.id))
    }

    /// Returns its checks by id, without those of instances outside its scope.
    pub fn checks(&self) -> impl Iterator<Item = &Arc<CheckRecord>> {
        let records = self.checks.iter().map(|held| &held.record);
        records.filter(|record| !self.withheld.checks.contains(&record.id))
    }

    /// Returns the instances that it has ejected.
    pub fn ejections(&self) -> &[(NodeName, InstanceId)] {
        let instances = self.ejections.as_ref().map(|held| &*held.record.instances).unwrap_or_default();
        instances.get(..EJECTIONS_MAX).unwrap_or(instances)
    }

    /// Returns the nodes without an agent that were written here and have no service outside its scope, by name.
    pub fn externals(&self) -> impl Iterator<Item = &Arc<ExternalRecord>> {
        let records = self.externals.iter().map(|held| &held.record);
        records.filter(|record| !self.withheld.externals.contains(&record.name))
    }

    /// Returns the keys of what the node published outside its scope.
    pub fn withheld(&self) -> impl Iterator<Item = EntryKey> {
        let Withheld { services, checks, externals } = &self.withheld;
        let services = services.iter().cloned().map(EntryKey::Service);
        let checks = checks.iter().cloned().map(EntryKey::Check);
        services.chain(checks).chain(externals.iter().cloned().map(EntryKey::External))
    }

    /// Returns every key that the node published, whether shown or withheld.
    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> {
        self.entries().map(|(_, entry)| entry.key())
    }

    fn entries(&self) -> impl Iterator<Item = (u64, Entry)> {
        let info = self.info.clone().map(|record| Held { version: self.info_version, record });
        let lists = (self.services.iter(), self.checks.iter(), self.externals.iter());
        entries((info, self.ejections.clone()), lists)
    }

    /// Tells whether `entry` stands under its key.
    pub(super) fn holds(&self, entry: &Entry) -> bool {
        match entry {
            Entry::Node(info) => self.info.as_ref() == Some(info),
            Entry::Service(service) => find(&self.services, |record| record.id.cmp(&service.id)) == Some(service),
            Entry::Check(check) => find(&self.checks, |record| record.id.cmp(&check.id)) == Some(check),
            Entry::Ejections(ejections) => self.ejections.as_ref().map(|held| &held.record) == Some(ejections),
            Entry::External(external) => {
                find(&self.externals, |record| record.name.cmp(&external.name)) == Some(external)
            }
        }
    }

    /// Returns how many removals are remembered.
    pub fn grave_len(&self) -> usize {
        self.grave.len()
    }

    /// Returns the way from `have` to this state; none if `have` is this state or newer.
    pub(super) fn delta_from(&self, have: &Digest) -> Option<Delta> {
        let digest = self.digest();
        if !digest.is_newer_than(have) {
            return None;
        }
        let is_partial = have.version != 0
            && have.generation == digest.generation
            && have.version < digest.version
            && have.version >= self.grave_floor;
        let (base, after) = if is_partial { (Base::Version(have.version), have.version) } else { (Base::Nothing, 0) };
        let changed = self.entries().filter(|(version, _)| *version > after);
        let changes = changed.map(|(version, entry)| Change { version, entry });
        let removed = self.grave.iter().filter(|(version, _)| is_partial && *version > after);
        let has_chain = is_partial && self.chain_since <= after;
        Some(Delta {
            head: self.signed.head.clone(),
            signature: self.signed.signature.clone(),
            chain: (!has_chain).then(|| self.signed.chain.as_ref().clone()),
            base,
            changes: changes.collect(),
            removed: removed.map(|(_, key)| key.clone()).collect(),
        })
    }
}

/// Finds a record in a list in order of id.
fn find<T>(held: &[Held<T>], order: impl Fn(&T) -> Ordering) -> Option<&Arc<T>> {
    let at = held.binary_search_by(|held| order(&held.record)).ok()?;
    held.get(at).map(|held| &held.record)
}

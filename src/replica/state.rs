//! The state of one node as one replica holds it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::Serialize;

use super::head::{Base, Change, Delta, Digest, NodeHead};
use crate::clock::UnixSeconds;
use crate::model::{
    CheckId, CheckRecord, Entry, EntryKey, Generation, InstanceId, NodeInfo, NodeName, ServeScope, ServiceName,
    ServiceRecord,
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
    /// Its instances within its scope.
    pub services: BTreeMap<InstanceId, ServiceRecord>,
    /// Its checks, without those of instances outside its scope.
    pub checks: BTreeMap<CheckId, CheckRecord>,
    /// Published and signed, but outside the node's scope: kept only so that hashes agree.
    withheld: BTreeMap<EntryKey, Entry>,
    /// Every key with the version that changed it last.
    changed: BTreeMap<EntryKey, u64>,
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

/// A head with what proves it.
#[derive(Debug)]
pub(super) struct Signed {
    pub(super) head: NodeHead,
    pub(super) digest: Digest,
    pub(super) signature: Vec<u8>,
    pub(super) chain: Arc<Vec<Vec<u8>>>,
}

/// Encodes exactly as [`Entry`] does.
#[derive(Serialize)]
enum EntryRef<'a> {
    Node(&'a NodeInfo),
    Service(&'a ServiceRecord),
    Check(&'a CheckRecord),
}

impl EntryRef<'_> {
    fn to_entry(&self) -> Entry {
        match *self {
            Self::Node(info) => Entry::Node(info.clone()),
            Self::Service(service) => Entry::Service(service.clone()),
            Self::Check(check) => Entry::Check(check.clone()),
        }
    }
}

/// The entries of a state while it is built aside.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    info: Option<Arc<NodeInfo>>,
    services: BTreeMap<InstanceId, ServiceRecord>,
    checks: BTreeMap<CheckId, CheckRecord>,
    withheld: BTreeMap<EntryKey, Entry>,
    changed: BTreeMap<EntryKey, u64>,
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
        let mut draft = Self {
            info: state.info.clone(),
            services: state.services.clone(),
            checks: state.checks.clone(),
            withheld: BTreeMap::new(),
            changed: state.changed.clone(),
            grave: state.grave.clone(),
            grave_floor: state.grave_floor,
        };
        state.withheld.values().cloned().for_each(|entry| draft.put(entry));
        draft
    }

    fn put(&mut self, entry: Entry) {
        match entry {
            Entry::Node(info) => self.info = Some(Arc::new(info)),
            Entry::Service(service) => drop(self.services.insert(service.id.clone(), service)),
            Entry::Check(check) => drop(self.checks.insert(check.id.clone(), check)),
        }
    }

    /// Sets an entry as changed by `version`.
    pub(super) fn set(&mut self, version: u64, entry: Entry) {
        self.changed.insert(entry.key(), version);
        self.put(entry);
    }

    /// Removes `key` and remembers that `version` did so, among the last `grave_max` removals.
    pub(super) fn remove(&mut self, version: u64, key: EntryKey, grave_max: usize) {
        self.changed.remove(&key);
        match &key {
            EntryKey::Node => self.info = None,
            EntryKey::Service(id) => drop(self.services.remove(id)),
            EntryKey::Check(id) => drop(self.checks.remove(id)),
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
        let entries: Vec<(u64, EntryRef<'_>)> = self
            .changed
            .iter()
            .filter_map(|(key, version)| Some((*version, find(key, self.info.as_ref(), &self.services, &self.checks)?)))
            .collect();
        wire::encode(&entries)
    }

    /// Puts aside the services outside `scope` and their checks; returns the services' names.
    pub(super) fn withhold(&mut self, scope: &ServeScope) -> Vec<ServiceName> {
        let refused: BTreeMap<InstanceId, ServiceRecord> =
            self.services.extract_if(.., |_, service| !scope.covers(service.name.as_str())).collect();
        if refused.is_empty() {
            return Vec::new();
        }
        let is_about_refused =
            |check: &CheckRecord| check.service.as_ref().is_some_and(|service| refused.contains_key(service));
        let checks: Vec<_> = self.checks.extract_if(.., |_, check| is_about_refused(check)).collect();
        self.withheld.extend(checks.into_iter().map(|(id, check)| (EntryKey::Check(id), Entry::Check(check))));
        let mut names: Vec<ServiceName> = refused.values().map(|service| service.name.clone()).collect();
        names.sort();
        names.dedup();
        let services = refused.into_iter().map(|(id, service)| (EntryKey::Service(id), Entry::Service(service)));
        self.withheld.extend(services);
        names
    }

    /// Makes it a state under `signed`, which is valid until `not_after`.
    pub(super) fn finish(mut self, signed: Signed, chain_since: u64, not_after: UnixSeconds) -> NodeState {
        // A key that came back needs no removal.
        self.grave.retain(|(_, key)| !self.changed.contains_key(key));
        NodeState {
            generation: signed.head.generation,
            version: signed.head.version,
            not_after,
            info: self.info,
            services: self.services,
            checks: self.checks,
            withheld: self.withheld,
            changed: self.changed,
            grave: self.grave,
            grave_floor: self.grave_floor,
            signed: Arc::new(signed),
            chain_since,
            fork_reported: false,
        }
    }
}

fn find<'a>(
    key: &EntryKey,
    info: Option<&'a Arc<NodeInfo>>,
    services: &'a BTreeMap<InstanceId, ServiceRecord>,
    checks: &'a BTreeMap<CheckId, CheckRecord>,
) -> Option<EntryRef<'a>> {
    match key {
        EntryKey::Node => info.map(|info| EntryRef::Node(info)),
        EntryKey::Service(id) => services.get(id).map(EntryRef::Service),
        EntryKey::Check(id) => checks.get(id).map(EntryRef::Check),
    }
}

impl NodeState {
    /// The chain that its head was signed under: node intermediate, issuer.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.signed.chain
    }

    /// Returns whose state it is.
    pub fn node(&self) -> &NodeName {
        &self.signed.head.node
    }

    /// Returns the version that is held.
    pub fn digest(&self) -> &Digest {
        &self.signed.digest
    }

    /// Returns the keys of what the node published outside its scope.
    pub fn withheld(&self) -> impl Iterator<Item = &EntryKey> {
        self.withheld.keys()
    }

    /// Returns every key that the node published, whether shown or withheld.
    pub(super) fn keys(&self) -> impl Iterator<Item = &EntryKey> {
        self.changed.keys()
    }

    /// Returns the entry under `key` as it was published.
    pub(super) fn entry(&self, key: &EntryKey) -> Option<Entry> {
        let shown = find(key, self.info.as_ref(), &self.services, &self.checks).map(|entry| entry.to_entry());
        shown.or_else(|| self.withheld.get(key).cloned())
    }

    /// Tells whether `entry` stands under its key, without a copy.
    pub(super) fn holds(&self, entry: &Entry) -> bool {
        match entry {
            Entry::Node(info) => self.info.as_deref() == Some(info),
            Entry::Service(service) => self.services.get(&service.id) == Some(service),
            Entry::Check(check) => self.checks.get(&check.id) == Some(check),
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
        let changes = self.changed.iter().filter(|(_, version)| **version > after).filter_map(|(key, version)| {
            let entry = self.entry(key)?;
            Some(Change { version: *version, entry })
        });
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

//! What is shown of what is registered: to the API with outputs, to gossip without.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use super::Task;
use crate::catalogue::{LocalGateway, LocalInstance, LocalView, UpstreamListener};
use crate::clock;
use crate::model::{CheckId, Entry, EntryKey, HealthStatus, INGRESS_GATEWAY};
use crate::registry::checks::alias::{AliasTarget, Fact, Word, resolve};
use crate::registry::checks::{Change, Outcome};
use crate::registry::definition::META_PROXY_PROTOCOL;
use crate::registry::rules::{self, Spread};
use crate::registry::{LocalCheck, LocalState, Probe, Publication};

/// What changed since the last publication.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Services or checks came, went or were replaced.
    pub(super) structure: bool,
    /// A status changed.
    status: bool,
    /// Checks whose status or output changed.
    checks: BTreeSet<CheckId>,
}

impl Dirty {
    pub(super) fn note(&mut self, id: &CheckId, change: Change) {
        self.status |= change == Change::Status;
        self.checks.insert(id.clone());
    }

    /// What aliases of other nodes say may have changed.
    pub(super) fn note_remote(&mut self) {
        self.status = true;
    }
}

impl Task {
    /// Shows what is registered to the readers, each only what changed for it.
    pub(super) fn publish(&mut self) {
        if self.dirty.structure || self.dirty.status {
            self.follow_aliases();
        }
        let dirty = std::mem::take(&mut self.dirty);
        if dirty.structure {
            self.publish_all();
            return;
        }
        if dirty.checks.is_empty() {
            return;
        }
        let shown = dirty.checks.iter().filter_map(|id| Some((id, &self.checks.get(id)?.shown)));
        let changed: Vec<(&CheckId, &Arc<LocalCheck>)> = shown.collect();
        self.state.send_if_modified(|held| {
            // In place, unless a reader holds on to it.
            let state = Arc::make_mut(held);
            for (id, check) in &changed {
                state.checks.insert((*id).clone(), Arc::clone(check));
            }
            // An output alone is there for who looks, and wakes nobody.
            dirty.status
        });
        if !dirty.status {
            return;
        }
        let records = match self.spread {
            Spread::Each => {
                changed.iter().map(|(_, check)| rules::check_record(&check.definition, check.status)).collect()
            }
            Spread::Summed => rules::summed_records(self.statuses()),
        };
        self.publication.send_if_modified(|held| {
            let entry = |record| (EntryKey::Check(record_id(&record)), Entry::Check(record.into()));
            let news: Vec<_> = records.into_iter().map(entry).collect();
            let news: Vec<_> = news.into_iter().filter(|(key, entry)| held.records.get(key) != Some(entry)).collect();
            if news.is_empty() {
                return false;
            }
            Arc::make_mut(held).records.extend(news);
            true
        });
        self.count();
    }

    fn publish_all(&mut self) {
        let state = LocalState {
            services: self.services.iter().map(|(id, held)| (id.clone(), Arc::clone(&held.shown))).collect(),
            checks: self.checks.iter().map(|(id, held)| (id.clone(), Arc::clone(&held.shown))).collect(),
            externals: self.externals.clone(),
        };
        let services: Vec<_> = self.definitions().collect();
        // What is held was let in by this rule.
        let alone: Vec<_> = self.alone(None).collect();
        self.spread = rules::hold_together(&services, &alone, self.external_bytes()).unwrap_or(Spread::Summed);
        let records = match self.spread {
            Spread::Each => {
                self.statuses().map(|(definition, status)| rules::check_record(definition, status)).collect()
            }
            Spread::Summed => rules::summed_records(self.statuses()),
        };
        let mut publication = publication(&state, self.gateway_ip);
        let entry = |record| (EntryKey::Check(record_id(&record)), Entry::Check(record.into()));
        publication.records.extend(records.into_iter().map(entry));
        let externals = self.externals.values().map(|node| Entry::External(Arc::clone(&node.record)));
        publication.records.extend(externals.map(|entry| (entry.key(), entry)));
        self.count();
        replace_if_changed(&self.state, state);
        replace_if_changed(&self.publication, publication);
        let remote = self.checks.values().filter_map(|check| self.remote_target(&check.shown.definition.probe));
        replace_if_changed(&self.wanted, remote.collect::<BTreeSet<AliasTarget>>());
    }

    fn statuses(&self) -> impl Iterator<Item = (&crate::registry::CheckDefinition, HealthStatus)> {
        self.checks.values().map(|check| (&*check.shown.definition, check.state.status()))
    }

    fn count(&self) {
        self.metrics.externals.set(i64::try_from(self.externals.len()).unwrap_or(i64::MAX));
        self.metrics.show(self.services.len(), self.checks.values().map(|check| check.state.status()));
    }

    /// What an alias follows on another node, if it is such a one.
    fn remote_target(&self, probe: &Probe) -> Option<AliasTarget> {
        let Probe::Alias { node: Some(node), service } = probe else { return None };
        let is_own = node == self.node.as_str();
        (!is_own).then(|| AliasTarget { node: Some(node.clone()), service: service.clone() })
    }

    /// Lets alias checks say what what they follow says.
    fn follow_aliases(&mut self) {
        let is_alias = |probe: &Probe| matches!(probe, Probe::Alias { .. });
        if !self.checks.values().any(|check| is_alias(&check.shown.definition.probe)) {
            return;
        }
        let now = clock::now();
        let targets = self
            .checks
            .iter()
            .filter_map(|(id, held)| Some((id.clone(), self.remote_target(&held.shown.definition.probe)?)));
        let mut said: BTreeMap<CheckId, Outcome> = BTreeMap::new();
        for (id, target) in targets {
            // Before the catalogue was asked it says what it said before the restart.
            said.extend(self.remote.get(&target).map(|outcome| (id, outcome.clone())));
        }
        self.apply(said, now);
        let facts: Vec<Fact<'_>> = self
            .checks
            .iter()
            .map(|(id, held)| {
                let definition = &*held.shown.definition;
                let word = match &definition.probe {
                    Probe::Alias { service, .. } if self.remote_target(&definition.probe).is_none() => {
                        Word::Follows(service.as_ref())
                    }
                    _ => Word::Status(held.state.status()),
                };
                Fact { id, owner: definition.service.as_ref(), word }
            })
            .collect();
        let said = resolve(&facts, |id| self.services.contains_key(id));
        let said = said.into_iter().map(|(id, outcome)| (id.clone(), outcome)).collect();
        self.apply(said, now);
    }

    fn apply(&mut self, said: BTreeMap<CheckId, Outcome>, now: tokio::time::Instant) {
        for (id, outcome) in said {
            let Some(check) = self.checks.get_mut(&id) else { continue };
            let change = check.state.refresh(outcome, now);
            self.note_change(&id, change);
        }
    }
}

fn record_id(record: &crate::model::CheckRecord) -> CheckId {
    record.id.clone()
}

fn replace_if_changed<T: PartialEq>(sender: &watch::Sender<Arc<T>>, value: T) {
    sender.send_if_modified(|held| {
        let changed = **held != value;
        if changed {
            *held = Arc::new(value);
        }
        changed
    });
}

/// Derives what other nodes and the data plane get of the services; gateways without an address of their own listen on
/// `gateway_ip`.
fn publication(state: &LocalState, gateway_ip: IpAddr) -> Publication {
    let mut records = BTreeMap::new();
    let mut view = LocalView::default();
    let (mut upstreams, mut gateways) = (BTreeSet::new(), BTreeSet::new());
    for (id, service) in &state.services {
        let definition = &service.definition;
        let record = &definition.record;
        records.insert(EntryKey::Service(id.clone()), Entry::Service(record.clone().into()));
        upstreams.extend(definition.upstreams.iter().map(|upstream| UpstreamListener {
            bind: upstream.bind,
            source: record.name.clone(),
            destination: upstream.destination.clone(),
            protocol: upstream.protocol,
        }));
        if *record.kind == *INGRESS_GATEWAY {
            let ip = Some(definition.app_addr.ip()).filter(|ip| !ip.is_unspecified());
            gateways.insert(LocalGateway { service: record.name.clone(), ip: ip.unwrap_or(gateway_ip) });
        }
        // A service without a port only calls; there is nothing to relay to.
        if definition.app_addr.port() > 0 {
            let (service, app_addr, protocol) = (record.name.clone(), definition.app_addr, record.protocol);
            let wants_proxy_header = record.meta.get(META_PROXY_PROTOCOL).is_some();
            view.instances.insert(id.clone(), LocalInstance { service, app_addr, protocol, wants_proxy_header });
        }
    }
    view.upstreams = upstreams.into_iter().collect();
    view.gateways = gateways.into_iter().collect();
    Publication { records, view }
}

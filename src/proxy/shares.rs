//! What stands beside the workers for limits of the whole mesh: measures what is asked here, hears what is asked elsewhere,
//! and sets this node's shares.
//!
//! It sleeps while no config entry has such a limit for a service that runs here. Not here: the shares (`routing::quota`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use crate::catalogue::{Snapshot, SnapshotReader};
use crate::clock;
use crate::model::{Demand, MemberStatus, NodeName, ServiceName};
use crate::routing::quota::{Asked, Quotas, TICK};
use crate::routing::{Rates, SharedBucket};
use crate::upstream::RateRules;

/// Reports of others that wait; one that does not fit is told again by its author.
pub const REPORTS_MAX: usize = 2048;

/// The living nodes that have an instance of `service`.
fn mates(snapshot: &Snapshot, service: &ServiceName) -> BTreeSet<NodeName> {
    let instances = snapshot.services.get(service).map(|entry| entry.instances.as_slice()).unwrap_or_default();
    let is_there = |status: MemberStatus| matches!(status, MemberStatus::Alive | MemberStatus::Leaving);
    let living = instances.iter().filter(|instance| is_there(instance.node.status));
    living.map(|instance| instance.node.info.name.clone()).collect()
}

/// The limits that this node has a share of, and who shares them.
#[derive(Default)]
struct Shared {
    rules: Vec<(ServiceName, Arc<RateRules>)>,
    mates: BTreeMap<ServiceName, Arc<BTreeSet<NodeName>>>,
}

impl Shared {
    fn of(snapshot: &Snapshot) -> Self {
        let mut shared = Self::default();
        for (service, rules) in snapshot.upstreams.shared_rates() {
            let nodes = mates(snapshot, service);
            if nodes.contains(&snapshot.local_node) {
                shared.rules.push((service.clone(), Arc::clone(rules)));
                shared.mates.insert(service.clone(), Arc::new(nodes));
            }
        }
        shared
    }
}

/// Divides the limits of the whole mesh, until gossip ends. A report for the others goes to `demand`.
pub(super) async fn divide(
    rates: Arc<Rates>,
    snapshot: SnapshotReader,
    mut reports: mpsc::Receiver<(NodeName, Demand)>,
    demand: watch::Sender<Arc<Demand>>,
) {
    let mut changes = snapshot.subscribe();
    let own = snapshot.load().local_node.clone();
    let mut quotas = Quotas::new(own, rand::random(), clock::now());
    let mut shared = Shared::of(&snapshot.load());
    quotas.set_mates(shared.mates.clone(), clock::now());
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            report = reports.recv() => match report {
                Some((node, demand)) => quotas.handle_demand(&node, &demand, clock::now()),
                None => return,
            },
            // What changed is read with the next tick while there are ticks: a busy catalogue is not read more often.
            changed = changes.changed(), if shared.rules.is_empty() => {
                if changed.is_err() {
                    return;
                }
                shared = Shared::of(&changes.borrow_and_update());
                quotas.set_mates(shared.mates.clone(), clock::now());
            }
            _ = ticks.tick(), if !shared.rules.is_empty() => {
                if changes.has_changed().unwrap_or(false) {
                    shared = Shared::of(&changes.borrow_and_update());
                    quotas.set_mates(shared.mates.clone(), clock::now());
                }
                let now = clock::now();
                let buckets: Vec<SharedBucket> =
                    shared.rules.iter().flat_map(|(service, rules)| rates.take_asked(service, rules)).collect();
                let asked: Vec<Asked> = buckets.iter().map(|bucket| bucket.asked.clone()).collect();
                let divided = quotas.tick(&asked, now);
                let shares: BTreeMap<u64, f64> = divided.shares.into_iter().collect();
                for bucket in &buckets {
                    let Asked { limit, service, per_second, .. } = &bucket.asked;
                    let share = shares.get(limit).copied().unwrap_or_else(|| quotas.floor(service, *per_second));
                    rates.set_share(bucket, share, now);
                }
                if let Some(report) = divided.report {
                    demand.send_replace(Arc::new(report));
                }
            }
        }
    }
}

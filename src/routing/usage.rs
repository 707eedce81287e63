//! How much is under way, and how much may be.
//!
//! Counts are the agent's: its workers share them, without a lock. A worker finds its pair's counts once, when it first
//! calls there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arc_swap::ArcSwap;

use super::tables::HashTable;
use crate::model::ServiceName;

/// Pairs whose counts the workers share; beyond it each worker counts for itself.
pub const PAIRS_MAX: usize = 4096;

/// What a limit is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Connections of bytes.
    Connections,
    /// Calls that wait for a stream.
    Pending,
    /// Requests.
    Requests,
    /// Repeated requests.
    Retries,
    /// Calls to each instance.
    Instances,
    /// What is left for calls that matter so little.
    Priority,
}

impl Limited {
    /// Returns the word of `x-weft-overflow` and of the metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "pending",
            Self::Requests => "requests",
            Self::Retries => "retries",
            Self::Instances => "instances",
            Self::Priority => "priority",
        }
    }
}

/// The counts of one pair of services.
#[derive(Debug, Default)]
pub(super) struct Usage {
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
}

impl Usage {
    fn of(&self, what: Limited) -> &AtomicU32 {
        match what {
            Limited::Connections => &self.connections,
            Limited::Pending => &self.pending,
            Limited::Requests | Limited::Instances | Limited::Priority => &self.requests,
            Limited::Retries => &self.retries,
        }
    }

    /// Counts one more unless `most` are counted.
    pub(super) fn take(&self, what: Limited, most: u32) -> bool {
        let count = self.of(what);
        if count.fetch_add(1, Ordering::Relaxed) < most {
            return true;
        }
        count.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Tells whether `most` are counted.
    pub(super) fn is_full(&self, what: Limited, most: u32) -> bool {
        self.of(what).load(Ordering::Relaxed) >= most
    }

    /// Counts one less.
    pub(super) fn give(&self, what: Limited) {
        self.of(what).fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns the counts: connections, pending, requests, retries.
    pub(super) fn counts(&self) -> [u32; 4] {
        [&self.connections, &self.pending, &self.requests, &self.retries].map(|count| count.load(Ordering::Relaxed))
    }
}

type Pairs = BTreeMap<(Option<ServiceName>, ServiceName), Arc<Usage>>;

/// What the balancers of all workers share: counts, and tables of hashes.
#[derive(Debug, Default)]
pub struct Shared {
    pairs: ArcSwap<Pairs>,
    tables: ArcSwap<BTreeMap<ServiceName, Arc<HashTable>>>,
}

impl Shared {
    /// Returns the counts of a pair.
    pub(super) fn usage(&self, pair: &(Option<ServiceName>, ServiceName)) -> Arc<Usage> {
        if let Some(usage) = self.pairs.load().get(pair) {
            return Arc::clone(usage);
        }
        let fresh = Arc::<Usage>::default();
        self.pairs.rcu(|pairs| {
            let mut pairs = Pairs::clone(pairs);
            // Nobody counts in what the map alone holds.
            if pairs.len() >= PAIRS_MAX {
                pairs.retain(|_, usage| Arc::strong_count(usage) > 2);
            }
            if pairs.len() < PAIRS_MAX {
                pairs.entry(pair.clone()).or_insert_with(|| Arc::clone(&fresh));
            }
            pairs
        });
        self.pairs.load().get(pair).map_or(fresh, Arc::clone)
    }

    /// Returns the newest table of a service.
    pub(super) fn table(&self, service: &ServiceName) -> Option<Arc<HashTable>> {
        self.tables.load().get(service).cloned()
    }

    /// Returns all tables.
    pub fn tables(&self) -> Arc<BTreeMap<ServiceName, Arc<HashTable>>> {
        self.tables.load_full()
    }

    /// Puts all tables in place.
    pub fn set_tables(&self, tables: BTreeMap<ServiceName, Arc<HashTable>>) {
        self.tables.store(Arc::new(tables));
    }
}

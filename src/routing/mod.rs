//! Picks the instance that a connection or request goes to, and keeps what is sick or too much away.
//!
//! ```text
//!   Snapshot {service, upstreams, reports} --> Balancer::pick --> Picked {instance, Load}
//!                                                ^    ^             | Observer: outcome, time
//!          Tried, ConnectBackoff leave out ------'    `-- Seat -----'   --> ejected: Notice --> the node's own records
//!   Shared {counts, tables of hashes}, Rates: of all workers, in atomics      quota: a node's share of the mesh's rates
//! ```
//!
//! Invariants: a critical instance is never picked; in turns every instance is picked as often as its weight says; what was
//! tried or just failed is left out as long as there is anything else; an ejected instance is picked for one trial alone
//! once its time is over, unless too few others are left; what is counted is given back; nothing is allocated unless
//! something changed since the last pick; who waits is called in order of priority. State is bounded, and local to one worker but for counts, tables and buckets.
//! Not here: how often to try (`proxy`), who is healthy (`catalogue`), connecting (`transport`).

mod backoff;
mod balance;
mod draw;
mod gradient;
mod load;
mod queue;
pub mod quota;
mod rate;
mod seat;
mod tables;
mod usage;

pub use self::backoff::{BACKOFF_INSTANCES_MAX, BACKOFF_MAX, BACKOFF_START, ConnectBackoff};
pub use self::balance::{
    Ask, Balancer, GroupView, NoInstance, Picked, REPORTERS_MIN, SERVICES_MAX, SeatView, TRIED_MAX, Tried, ZONE_META,
};
pub use self::draw::key_of;
pub use self::load::{DECAY, PENALTY};
pub use self::queue::{Turn, WAIT_MAX};
pub use self::rate::{KEYS_MAX, OverRate, Rates, SHARED_KEYS_MAX, SharedBucket};
pub use self::seat::{Cause, Flow, Load, NOTICES_MAX, Notice, Observer, Outcome, Retry, Standing, Waiting};
pub use self::tables::{HashTable, MAGLEV_PLACES, MEMBERS_MAX, Member, TABLES_MAX};
pub use self::usage::{Limited, PAIRS_MAX, Shared};

#[cfg(test)]
mod test_support {
    use std::sync::Arc;

    use crate::catalogue::ServiceEntry;
    use crate::model::{HealthStatus, Instance, Protocol, ServiceRecord, Weights, fixture};

    pub(super) fn now() -> tokio::time::Instant {
        use std::sync::LazyLock;
        // One moment for all tests: nothing here depends on when they run.
        static START: LazyLock<tokio::time::Instant> = LazyLock::new(crate::clock::now);
        *START
    }

    /// An instance of `web` on `node`, with warning weight 1.
    pub(super) fn instance(node: &str, status: HealthStatus, weight: u32) -> Arc<Instance> {
        let record = ServiceRecord {
            port: 80,
            weights: Weights { passing: weight, warning: 1 },
            protocol: Protocol::Http,
            ..ServiceRecord::new("w".parse().unwrap(), "web".parse().unwrap())
        };
        let node = fixture::node_entry(fixture::node_info(node));
        Arc::new(Instance { status, ..fixture::instance(node, record) })
    }

    /// The service `web` at `modify_index`.
    pub(super) fn service(modify_index: u64, instances: impl IntoIterator<Item = Arc<Instance>>) -> ServiceEntry {
        let instances = instances.into_iter().collect();
        ServiceEntry { name: "web".parse().unwrap(), protocol: Protocol::Http, instances, modify_index }
    }
}

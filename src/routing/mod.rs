//! Picks the instance that a connection or request goes to.
//!
//! ```text
//!   Snapshot -- service --> Balancer::pick (weights, status) -- Tried, ConnectBackoff leave out --> Instance
//!                              ^                                             ^
//!                              `--- one per worker, nothing shared ----------'  failed / succeeded
//! ```
//!
//! Invariants: a critical instance is never picked; over one turn every instance is picked as often as its weight says;
//! what was tried or just failed is left out as long as there is anything else; nothing is allocated unless the service
//! changed since the last pick. State is bounded and local to one worker.
//! Not here: how often to try (`proxy`), who is healthy (`catalogue`), connecting (`transport`).

mod backoff;
mod balance;

pub use self::backoff::{BACKOFF_INSTANCES_MAX, BACKOFF_MAX, BACKOFF_START, ConnectBackoff};
pub use self::balance::{Balancer, NoInstance, SERVICES_MAX, TRIED_MAX, Tried};

#[cfg(test)]
mod test_support {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use crate::catalogue::{Instance, NodeEntry, ServiceEntry};
    use crate::model::{Generation, HealthStatus, MemberStatus, NodeInfo, Protocol, ServiceRecord, TextMap, Weights};

    pub(super) fn now() -> tokio::time::Instant {
        use std::sync::LazyLock;
        // One moment for all tests: nothing here depends on when they run.
        static START: LazyLock<tokio::time::Instant> = LazyLock::new(crate::clock::now);
        *START
    }

    /// An instance of `web` on `node`, with warning weight 1.
    pub(super) fn instance(node: &str, status: HealthStatus, weight: u32) -> Arc<Instance> {
        let info = NodeInfo {
            id: String::new(),
            name: node.parse().unwrap(),
            mesh_addr: "10.0.0.1:8301".parse().unwrap(),
            datacenter: String::new(),
            meta: BTreeMap::new(),
            build: String::new(),
            issuer: false,
        };
        let entry = NodeEntry {
            info: info.into(),
            status: MemberStatus::Alive,
            generation: Generation::default(),
            checks: Vec::new(),
            create_index: 1,
            modify_index: 1,
        };
        let record = ServiceRecord {
            id: "w".parse().unwrap(),
            name: "web".parse().unwrap(),
            kind: Box::default(),
            tags: Box::default(),
            meta: TextMap::default(),
            address: Box::default(),
            port: 80,
            tagged_addresses: TextMap::default(),
            weights: Weights { passing: weight, warning: 1 },
            protocol: Protocol::Http,
            enable_tag_override: false,
        };
        let node = Arc::new(entry);
        let record = Arc::new(record);
        Arc::new(Instance { node, record, checks: Box::default(), status, create_index: 1, modify_index: 1 })
    }

    /// The service `web` at `modify_index`.
    pub(super) fn service(modify_index: u64, instances: impl IntoIterator<Item = Arc<Instance>>) -> ServiceEntry {
        let instances = instances.into_iter().collect();
        ServiceEntry { name: "web".parse().unwrap(), protocol: Protocol::Http, instances, modify_index }
    }
}

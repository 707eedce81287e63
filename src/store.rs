//! Store (seam; helper R writes it): redb, one file `weft.redb` in the data directory, mode 0600.
use std::net::SocketAddr;
use std::path::Path;

use crate::model::{CheckId, HealthStatus, InstanceId, NodeName};
use crate::registry::{CheckDefinition, ServiceDefinition};

/// Why the store failed; the text says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// A peer worth dialling at the next start.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredPeer {
    /// Its name.
    pub name: NodeName,
    /// Its mesh address.
    pub addr: SocketAddr,
    /// Whether it was alive when last heard of: alive ones are dialled first.
    pub alive: bool,
}

/// What the agent keeps on disk. Every write is durable (fsync) when the call returns. Cheap to clone (`Arc` inside); calls block.
#[derive(Debug, Clone)]
pub struct Store {}

impl Store {
    /// Opens or makes `dir/weft.redb`; a corrupt file is an error that names the file and what to do, never deleted. Locked against a second agent.
    pub fn open(_dir: &Path) -> Result<Self, StoreError> {
        todo!()
    }
    /// In memory, for `-dev` and tests.
    pub fn in_memory() -> Result<Self, StoreError> {
        todo!()
    }
    /// Adds one to the generation, on disk, and returns it.
    pub fn next_generation(&self) -> Result<u64, StoreError> {
        todo!()
    }
    /// A UUID made at first use.
    pub fn node_id(&self) -> Result<String, StoreError> {
        todo!()
    }
    /// 64 random bytes made at first use: QUIC's stateless-reset key.
    pub fn reset_key(&self) -> Result<[u8; 64], StoreError> {
        todo!()
    }
    /// `NodeAuthority::to_bytes`.
    pub fn identity(&self) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }
    /// Replaces it.
    pub fn put_identity(&self, _bytes: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// The name that this data directory belongs to.
    pub fn node_name(&self) -> Result<Option<NodeName>, StoreError> {
        todo!()
    }
    /// Sets it.
    pub fn put_node_name(&self, _name: &NodeName) -> Result<(), StoreError> {
        todo!()
    }
    /// Known peers.
    pub fn peers(&self) -> Result<Vec<StoredPeer>, StoreError> {
        todo!()
    }
    /// Replaces them.
    pub fn put_peers(&self, _peers: &[StoredPeer]) -> Result<(), StoreError> {
        todo!()
    }
    /// API-registered services.
    pub fn services(&self) -> Result<Vec<ServiceDefinition>, StoreError> {
        todo!()
    }
    /// Adds or replaces one.
    pub fn put_service(&self, _definition: &ServiceDefinition) -> Result<(), StoreError> {
        todo!()
    }
    /// Removes one.
    pub fn remove_service(&self, _id: &InstanceId) -> Result<(), StoreError> {
        todo!()
    }
    /// Checks registered by themselves.
    pub fn checks(&self) -> Result<Vec<CheckDefinition>, StoreError> {
        todo!()
    }
    /// Adds or replaces one.
    pub fn put_check(&self, _definition: &CheckDefinition) -> Result<(), StoreError> {
        todo!()
    }
    /// Removes one.
    pub fn remove_check(&self, _id: &CheckId) -> Result<(), StoreError> {
        todo!()
    }
    /// Last status of each check, so that a restart does not flap.
    pub fn check_statuses(&self) -> Result<Vec<(CheckId, HealthStatus)>, StoreError> {
        todo!()
    }
    /// Sets one.
    pub fn put_check_status(&self, _id: &CheckId, _status: HealthStatus) -> Result<(), StoreError> {
        todo!()
    }
    /// Counts one use of token `id` and returns how many there were before (issuers). Kept until `not_after` + 1 day.
    pub fn count_token_use(&self, _id: [u8; 16], _not_after: u64) -> Result<u32, StoreError> {
        todo!()
    }
}

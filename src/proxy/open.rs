//! Which tunnels are open, for people: `weft info`, the demo. Written when a tunnel opens or ends, never by a request.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock::UnixSeconds;
use crate::model::{ServeScope, ServiceName, SpiffeId};

/// An open tunnel, as one side proved itself to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenTunnel {
    /// Whose certificate this side showed; none: the node's.
    pub source: Option<ServiceName>,
    /// Who the other side proved to be.
    pub peer: SpiffeId,
    /// Where it is.
    pub addr: SocketAddr,
    /// What it may serve.
    pub scope: ServeScope,
    /// When its chain ends.
    pub not_after: UnixSeconds,
}

#[derive(Debug, Default)]
struct Held {
    next: u64,
    tunnels: BTreeMap<u64, OpenTunnel>,
}

/// The list, shared by the workers.
#[derive(Debug, Clone, Default)]
pub struct OpenTunnels(Arc<Mutex<Held>>);

impl OpenTunnels {
    /// Returns what is open, oldest first.
    pub fn list(&self) -> Vec<OpenTunnel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).tunnels.values().cloned().collect()
    }

    /// Adds `tunnel` until the entry is dropped.
    pub(super) fn add(&self, tunnel: OpenTunnel) -> Entry {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.next += 1;
        let number = held.next;
        held.tunnels.insert(number, tunnel);
        Entry { list: self.clone(), number }
    }
}

/// Keeps one tunnel on the list.
#[derive(Debug)]
pub(super) struct Entry {
    list: OpenTunnels,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.list.0.lock().unwrap_or_else(PoisonError::into_inner).tunnels.remove(&self.number);
    }
}

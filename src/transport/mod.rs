//! Transport (seam; helper T1 keeps these and writes the rest).
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use crate::model::NodeName;
use crate::pki::{Identity, PeerIdentity, Plane};

/// The mesh port's sockets: one per data-plane worker, the last for control (gossip, join).
#[derive(Debug)]
pub struct BoundSockets {
    /// In order of worker.
    pub workers: Vec<UdpSocket>,
    /// Gossip and join.
    pub control: UdpSocket,
    /// Where they are bound.
    pub addr: SocketAddr,
}

/// Why the mesh port cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot bind the mesh port {addr} (UDP)")]
pub struct BindError {
    /// The address.
    pub addr: SocketAddr,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// Binds `addr` once per worker and once for control (SO_REUSEPORT, steered by connection id).
pub fn bind(_addr: SocketAddr, _workers: usize) -> Result<BoundSockets, BindError> {
    todo!()
}

/// Why a peer could not be connected. The text names the address and, for TLS failures, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConnectError(pub String);

/// A connection that a peer opened to the control socket.
#[derive(Debug)]
pub struct Accepted {
    /// Gossip or Join.
    pub plane: Plane,
    /// The connection, its handshake done.
    pub connection: quinn::Connection,
    /// Verified; none on the join plane.
    pub peer: Option<PeerIdentity>,
}

/// The control endpoint: gossip and join. Lives on the control runtime. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ControlTransport {}

impl ControlTransport {
    /// Starts the endpoint on `socket`.
    pub fn new(_socket: UdpSocket, _identity: Arc<Identity>, _reset_key: [u8; 64]) -> Result<Self, BindError> {
        todo!()
    }
    /// Dials `addr` for gossip; with `expect` only that node will do.
    pub async fn connect(
        &self,
        _addr: SocketAddr,
        _expect: Option<NodeName>,
    ) -> Result<(quinn::Connection, PeerIdentity), ConnectError> {
        todo!()
    }
    /// Waits for the next peer; handshakes run side by side, bounded. None when closed. Cancel safe.
    pub async fn accept(&self) -> Option<Accepted> {
        todo!()
    }
    /// Closes everything at once with a reason.
    pub fn close(&self, _reason: &str) {
        todo!()
    }
}

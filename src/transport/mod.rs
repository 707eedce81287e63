//! The mesh port: its sockets, the QUIC endpoints on them, and who stands at the other end.
//!
//! ```text
//!                 +- socket 0 - WorkerEndpoint 0   (tunnels; its own thread)
//!   UDP 8301 -BPF-+- ...
//!                 +- socket N-1 - WorkerEndpoint N-1
//!                 +- socket N - ControlTransport   (gossip, join; control runtime)
//! ```
//!
//! Invariants: every endpoint speaks TLS 1.3 with certificates of the mesh (join: the server's alone); a connection is
//! handed out only after its peer is verified; every count of handshakes, streams and bytes has a bound (`tune`).
//! Beside QUIC there is one more use of UDP: two bytes that ask whether a peer's port is still held (`port`). What hosts
//! say of QUIC's own packets is heard too (`refusals`).
//! Not here: what is sent (`gossip`, `proxy`), how certificates come to be (`pki`), which tunnels are kept (`proxy`).

mod bind;
mod congestion;
mod control;
mod credentials;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod live;
mod metrics;
mod port;
mod refusals;
mod socket;
mod steer;
mod timer;
mod tune;
mod worker;

pub use bind::{BindError, BoundSockets, SOCKET_BUFFER_BYTES, SocketBuffers, bind};
pub(crate) use congestion::{Departures, departures};
pub use control::{Accepted, ControlCounts, ControlTransport};
#[cfg(test)]
pub(crate) use credentials::ClientTls;
pub(crate) use credentials::{Credentials, NodeCredentials};
pub use error::ConnectError;
pub(crate) use live::LiveEntry;
pub use live::{Cause, Closed, LiveConnections};
pub use refusals::MeshPort;
pub(crate) use refusals::Refusals;
pub(crate) use steer::Lane;
pub use tune::client as client_config;
pub(crate) use tune::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, RETRY_FROM, TUNNEL_STREAMS, TUNNEL_STREAMS_MAX};
pub(crate) use worker::{Dialled, WorkerEndpoint, dialer};

//! The QUIC endpoint of one data-plane worker.

use std::cell::RefCell;
use std::hash::BuildHasher as _;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use foldhash::fast::FixedState;
use tokio::task::JoinSet;

use super::bind::BindError;
use super::credentials::{Credentials, peer_of};
use super::error::ConnectError;
use super::live::{LiveConnections, LiveEntry};
use super::port;
use super::refusals::{MeshPort, Refusals};
use super::socket::{MeshSocket, Reads};
use super::steer::{self, Lane};
use super::timer::ControlRuntime;
use super::tune;
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServiceName};
use crate::pki::{PeerIdentity, Plane};

/// SNI of every connection; names are checked by SPIFFE id, never by this.
pub(super) const SERVER_NAME: &str = "mesh.weft";

/// Bundles of tunnels of which the last dial failed, at most; all are forgotten when there are more.
const FAILURES_MAX: usize = 1_024;

/// How long a refusal speaks of a port: a restart takes longer than the rest of the way to who asks.
const REFUSAL_LIFE: Duration = Duration::from_secs(3);

/// A tunnel that was dialled.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) connection: quinn::Connection,
    pub(crate) peer: PeerIdentity,
    /// End of the certificate that this side showed.
    pub(crate) not_after: UnixSeconds,
    /// Keeps the connection under watch; to be held as long as anybody uses it.
    pub(crate) live: Option<LiveEntry>,
}

/// A worker's endpoint: accepts tunnels and dials them from the one mesh port.
#[derive(Debug)]
pub(crate) struct WorkerEndpoint {
    endpoint: quinn::Endpoint,
    local_ip: IpAddr,
    refusals: Refusals,
    credentials: Arc<dyn Credentials>,
    live: LiveConnections,
    lane: Lane,
    /// Gives each bundle of tunnels its number ([`steer::tunnel_id`]): the same in all workers of the agent.
    bundles: FixedState,
    /// How many dials of a bundle have failed since one did not.
    failures: RefCell<HashMap<u64, u32>>,
    _helpers: JoinSet<()>,
}

impl WorkerEndpoint {
    /// Starts the endpoint on `port`, on the current runtime; `dealing` is any number, the same for all workers of an agent.
    pub(crate) fn new(
        port: MeshPort,
        (lane, dealing): (Lane, u64),
        reset_key: &[u8; 64],
        credentials: Arc<dyn Credentials>,
        live: LiveConnections,
    ) -> Result<Self, BindError> {
        let mut local_ip = IpAddr::from([0, 0, 0, 0]);
        let server = |addr: SocketAddr| {
            local_ip = addr.ip();
            let tls = credentials.server(Plane::Tunnel).and_then(|tls| tune::server(Plane::Tunnel, tls));
            tls.map_err(|reason| BindError::Tls { addr, reason })
        };
        let refusals = port.refusals.clone();
        let (endpoint, helpers) = start(port, lane, reset_key, server)?;
        let (bundles, failures) = (FixedState::with_seed(dealing), RefCell::default());
        Ok(Self { endpoint, local_ip, refusals, credentials, live, lane, bundles, failures, _helpers: helpers })
    }

    /// Waits for the next attempt to connect; none when closed.
    pub(crate) async fn accept(&self) -> Option<quinn::Incoming> {
        self.endpoint.accept().await
    }

    /// Dials `node` at `addr`, speaking as `source` or, where that is none, as this node.
    pub(crate) async fn dial(
        &self,
        addr: SocketAddr,
        node: &NodeName,
        source: Option<&ServiceName>,
        limit: Duration,
    ) -> Result<Dialled, ConnectError> {
        let local = |reason| ConnectError::Local { addr, reason };
        let tls = self.credentials.client(Plane::Tunnel, source, Some(node.clone())).map_err(local)?;
        let mut config = tune::client(Plane::Tunnel, tls.config).map_err(local)?;
        let (lane, bundle) = (self.lane, self.bundles.hash_one((node, source)));
        if self.is_dealt(bundle) {
            config.initial_dst_cid_provider(Arc::new(move || steer::tunnel_id(lane, bundle)));
        }
        let connected = async {
            let connection = connect(&self.endpoint, config, addr, limit).await?;
            let (peer, live) = verified(&*self.credentials, &self.live, &connection, addr, Some(node))?;
            Ok((connection, peer, live))
        };
        let connected = connected.await;
        self.note_dial(bundle, connected.is_ok());
        let (connection, peer, live) = connected?;
        Ok(Dialled { connection, peer, not_after: tls.not_after, live })
    }

    /// Tells whether the next dial goes to the worker that is its due; every third of a row that failed goes to any: that
    /// one worker of the peer may be what fails.
    fn is_dealt(&self, bundle: u64) -> bool {
        self.failures.borrow().get(&bundle).is_none_or(|failures| failures % 3 != 2)
    }

    fn note_dial(&self, bundle: u64, is_open: bool) {
        let mut failures = self.failures.borrow_mut();
        if is_open {
            failures.remove(&bundle);
            return;
        }
        // Those of nodes that are gone for good are never heard of again.
        if failures.len() >= FAILURES_MAX && !failures.contains_key(&bundle) {
            failures.clear();
        }
        let count = failures.entry(bundle).or_default();
        *count = count.wrapping_add(1);
    }

    /// Tells whether `peer`'s host says that nobody has the port, or said so of a packet within `lately`, of which the last
    /// [`REFUSAL_LIFE`] are remembered at most; asked once, 250 ms at most. Silence is no. For those who know from elsewhere
    /// that the peer has failed.
    pub(crate) async fn is_port_refused(&self, peer: SocketAddr, lately: Duration) -> bool {
        self.refusals.is_heard(peer, lately.min(REFUSAL_LIFE)) || port::is_refused_once(self.local_ip, peer).await
    }

    /// Tells who the peer of an accepted connection is; the entry is to be held while the connection is served.
    pub(crate) fn peer(&self, connection: &quinn::Connection) -> Result<(PeerIdentity, Option<LiveEntry>), String> {
        peer_of(&*self.credentials, &self.live, connection)
    }

    /// Closes every connection and waits until the peers were told.
    pub(crate) async fn close(&self, code: quinn::VarInt, reason: &str) {
        self.endpoint.close(code, reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

/// Starts an endpoint on the current runtime, and what works for its socket: to be held as long.
pub(super) fn start(
    port: MeshPort,
    lane: Lane,
    reset_key: &[u8; 64],
    server: impl FnOnce(SocketAddr) -> Result<quinn::ServerConfig, BindError>,
) -> Result<(quinn::Endpoint, JoinSet<()>), BindError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let addr = port.socket.local_addr().map_err(|source| BindError::Refused { addr: unknown, source })?;
    let reads = if lane == Lane::Control { Reads::Single } else { Reads::Coalesced };
    let config = tune::endpoint(reset_key, lane);
    let refused = |source| BindError::Refused { addr, source };
    let socket = Arc::new(MeshSocket::new(port, config.get_max_udp_payload_size(), reads).map_err(refused)?);
    let mut helpers = JoinSet::new();
    helpers.spawn(Arc::clone(&socket).hear_refusals());
    helpers.spawn(Arc::clone(&socket).send_held());
    let runtime: Arc<dyn quinn::Runtime> = match lane {
        Lane::Control => Arc::new(ControlRuntime),
        Lane::Worker { .. } => Arc::new(quinn::TokioRuntime),
    };
    // The receive buffer first: making the TLS configuration takes memory and gives it back, and a buffer that lies on such
    // memory is cleared, so that all of it would be in memory from then on.
    let endpoint = quinn::Endpoint::new_with_abstract_socket(config, None, socket, runtime).map_err(refused)?;
    endpoint.set_server_config(Some(server(addr)?));
    Ok((endpoint, helpers))
}

/// Starts an endpoint that only dials, from a free port and for little traffic: a newcomer's, before it has a mesh port.
/// Both are to be held as long as it is used.
///
/// quinn's own would take a receive buffer of 3 MB. Memory that was used once has to be cleared when the workers' endpoints
/// take it for theirs, so that all of those buffers would be in memory from then on: 7 MB of an idle agent.
///
/// # Errors
/// The kernel's, about the socket.
pub(crate) fn dialer(local: IpAddr) -> io::Result<(quinn::Endpoint, JoinSet<()>)> {
    let config = quinn::EndpointConfig::default();
    let port = UdpSocket::bind((local, 0))?.into();
    let socket = Arc::new(MeshSocket::new(port, config.get_max_udp_payload_size(), Reads::Single)?);
    let mut helpers = JoinSet::new();
    helpers.spawn(Arc::clone(&socket).send_held());
    let endpoint = quinn::Endpoint::new_with_abstract_socket(config, None, socket, Arc::new(quinn::TokioRuntime))?;
    Ok((endpoint, helpers))
}

/// Dials `addr`; the handshake takes at most `limit`.
pub(super) async fn connect(
    endpoint: &quinn::Endpoint,
    config: quinn::ClientConfig,
    addr: SocketAddr,
    limit: Duration,
) -> Result<quinn::Connection, ConnectError> {
    let connecting = endpoint
        .connect_with(config, addr, SERVER_NAME)
        .map_err(|error| ConnectError::Local { addr, reason: error.to_string() })?;
    match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(ConnectError::from_quic(addr, &error)),
        Err(_elapsed) => Err(ConnectError::NoAnswer { addr }),
    }
}

/// Checks again who answered; with `expect` only that node will do.
pub(super) fn verified(
    credentials: &dyn Credentials,
    live: &LiveConnections,
    connection: &quinn::Connection,
    addr: SocketAddr,
    expect: Option<&NodeName>,
) -> Result<(PeerIdentity, Option<LiveEntry>), ConnectError> {
    let (peer, entry) = peer_of(credentials, live, connection).map_err(|reason| ConnectError::Tls { addr, reason })?;
    match expect {
        Some(wanted) if *wanted != peer.node => {
            Err(ConnectError::WrongNode { addr, wanted: wanted.clone(), found: peer.node })
        }
        _ => Ok((peer, entry)),
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;

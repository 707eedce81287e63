//! The control endpoint: gossip and join, on the control runtime.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::bind::BindError;
use super::credentials::{Credentials, NodeCredentials, peer_of};
use super::error::ConnectError;
use super::live::LiveConnections;
use super::metrics::{ControlMetrics, Outcome};
use super::port;
use super::refusals::{MeshPort, Refusals};
use super::steer::{self, Lane};
use super::tune::{self, HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, RETRY_FROM};
use super::worker::{connect, start, verified};
use crate::clock;
use crate::hearsay::{Excerpt, Seldom};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::pki::{Identity, PeerIdentity, Plane};

/// Application code of a connection that is closed because its peer is unknown.
const UNVERIFIED: u32 = 1;

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

/// What became of the attempts to connect to the control endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ControlCounts {
    /// Handed to the caller of [`ControlTransport::accept`].
    pub accepted: u64,
    /// Failed in the handshake, or took too long.
    pub failed: u64,
    /// Closed because the peer did not verify.
    pub unverified: u64,
}

/// The control endpoint: gossip and join. Lives on the control runtime. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ControlTransport {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoint: quinn::Endpoint,
    local_ip: IpAddr,
    refusals: Refusals,
    credentials: Arc<dyn Credentials>,
    /// The TLS side of newcomers, who have no certificate yet; others get the endpoint's own.
    join: Arc<quinn::ServerConfig>,
    handshakes: Mutex<JoinSet<Option<Accepted>>>,
    metrics: ControlMetrics,
    live: LiveConnections,
    /// Anybody can bring these about.
    unverified_told: Seldom,
    _helpers: JoinSet<()>,
}

impl ControlTransport {
    /// Starts the endpoint on `port`, on the current runtime.
    ///
    /// # Errors
    /// If TLS cannot be prepared or the runtime refuses the socket.
    pub fn new(port: impl Into<MeshPort>, identity: Arc<Identity>, reset_key: [u8; 64]) -> Result<Self, BindError> {
        Self::with(port.into(), Arc::new(NodeCredentials(identity)), &reset_key)
    }

    pub(super) fn with(
        port: MeshPort,
        credentials: Arc<dyn Credentials>,
        reset_key: &[u8; 64],
    ) -> Result<Self, BindError> {
        let server = |addr, plane| {
            let tls = credentials.server(plane).and_then(|tls| tune::server(plane, tls));
            tls.map_err(|reason| BindError::Tls { addr, reason })
        };
        let (mut join, mut local_ip) = (None, IpAddr::from([0, 0, 0, 0]));
        let refusals = port.refusals.clone();
        let (endpoint, helpers) = start(port, Lane::Control, reset_key, |addr| {
            local_ip = addr.ip();
            join = Some(server(addr, Plane::Join)?);
            server(addr, Plane::Gossip)
        })?;
        let join = Arc::new(join.expect("an endpoint that started has made its configuration"));
        Ok(Self {
            shared: Arc::new(Shared {
                endpoint,
                local_ip,
                refusals,
                credentials,
                join,
                handshakes: Mutex::default(),
                metrics: ControlMetrics::new(),
                live: LiveConnections::default(),
                unverified_told: Seldom::default(),
                _helpers: helpers,
            }),
        })
    }

    /// Dials `addr` for gossip; with `expect` only that node will do.
    ///
    /// The peer checks this side's certificate after this returns: a refusal shows at the first use.
    ///
    /// # Errors
    /// [`ConnectError`], after 10 s at most.
    ///
    /// # Cancel safety
    /// Cancelling gives the attempt up.
    pub async fn connect(
        &self,
        addr: SocketAddr,
        expect: Option<NodeName>,
    ) -> Result<(quinn::Connection, PeerIdentity), ConnectError> {
        let local = |reason| ConnectError::Local { addr, reason };
        let credentials = &*self.shared.credentials;
        let tls = credentials.client(Plane::Gossip, None, expect.clone()).map_err(local)?;
        let config = tune::client(Plane::Gossip, tls.config).map_err(local)?;
        let connection = connect(&self.shared.endpoint, config, addr, HANDSHAKE_TIMEOUT).await?;
        let (peer, entry) = verified(credentials, &self.shared.live, &connection, addr, expect.as_ref())?;
        if let Some(entry) = entry {
            // Gossip closes its connections itself.
            entry.until_closed();
        }
        Ok((connection, peer))
    }

    /// Waits for the next peer; handshakes run side by side, bounded. None when closed.
    ///
    /// Attempts are taken in only while somebody waits here.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing: handshakes go on and are handed out by the next call.
    pub async fn accept(&self) -> Option<Accepted> {
        let mut handshakes = self.shared.handshakes.lock().await;
        loop {
            let has_room = handshakes.len() < HANDSHAKES_MAX;
            tokio::select! {
                Some(ended) = handshakes.join_next() => {
                    if let Ok(Some(accepted)) = ended {
                        self.shared.metrics.count(accepted.plane, Outcome::Accepted);
                        return Some(accepted);
                    }
                }
                incoming = self.shared.endpoint.accept(), if has_room => {
                    let incoming = incoming?;
                    if handshakes.len() >= RETRY_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
                        self.shared.metrics.count(steer::control_plane(&incoming.orig_dst_cid()), Outcome::Retried);
                        let _cannot_fail_when_retry_is_allowed = incoming.retry();
                        continue;
                    }
                    handshakes.spawn(Arc::clone(&self.shared).handshake(incoming));
                }
            }
        }
    }

    /// Tells whether `peer`'s host says that nobody has the port: asked twice, half a second at most. Silence is no.
    ///
    /// # Cancel safety
    /// Cancelling gives the question up.
    pub async fn is_port_refused(&self, peer: SocketAddr) -> bool {
        port::is_refused(self.shared.local_ip, peer).await
    }

    /// Waits until `peer`'s host says, twice in a row, that nobody has the port; asks each time that `asks` changes (30 bytes of
    /// IP).
    ///
    /// # Cancel safety
    /// Cancelling ends the watch.
    pub async fn port_refused(&self, peer: SocketAddr, asks: watch::Receiver<()>) {
        port::refused(self.shared.local_ip, peer, asks).await;
    }

    /// Returns the hosts that refused a packet of the mesh port. Hints alone: whoever can forge a source address can forge
    /// one.
    pub(crate) fn refusals(&self) -> Refusals {
        self.shared.refusals.clone()
    }

    /// Returns the open gossip connections, to be held against what is trusted.
    pub fn live(&self) -> &LiveConnections {
        &self.shared.live
    }

    /// Returns what became of the attempts so far.
    pub fn counts(&self) -> ControlCounts {
        self.shared.metrics.counts()
    }

    /// Adds the endpoint's metrics: `weft_transport_control_attempts_total`, `weft_transport_control_connections`.
    ///
    /// # Errors
    /// If another control endpoint was added to `metrics`.
    pub fn register(&self, metrics: &Metrics) -> Result<(), prometheus::Error> {
        // The registry does not keep the endpoint alive.
        let shared = Arc::downgrade(&self.shared);
        let open = move || shared.upgrade().map_or(0, |shared| shared.endpoint.open_connections());
        self.shared.metrics.register(metrics, open)
    }

    /// Closes everything at once with a reason.
    pub fn close(&self, reason: &str) {
        self.shared.endpoint.close(0_u32.into(), reason.as_bytes());
    }

    /// Waits until the peers were told of [`ControlTransport::close`].
    pub async fn wait_idle(&self) {
        self.shared.endpoint.wait_idle().await;
    }
}

impl Shared {
    /// Finishes one attempt; none if it came to nothing.
    async fn handshake(self: Arc<Self>, incoming: quinn::Incoming) -> Option<Accepted> {
        let from = incoming.remote_address();
        let plane = steer::control_plane(&incoming.orig_dst_cid());
        let begun = match plane {
            Plane::Join => incoming.accept_with(Arc::clone(&self.join)),
            Plane::Gossip | Plane::Tunnel => incoming.accept(),
        };
        let connection = match begun {
            Ok(connecting) => tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await,
            Err(error) => Ok(Err(error)),
        };
        let (outcome, error) = match connection {
            Ok(Ok(connection)) => return self.admit(plane, from, connection),
            Ok(Err(error)) => (Outcome::Failed, error.to_string()),
            Err(late) => (Outcome::TimedOut, late.to_string()),
        };
        self.metrics.count(plane, outcome);
        debug!(%from, ?plane, error, "peer did not connect");
        None
    }

    /// Hands out a connection whose peer verifies; newcomers have nothing to verify yet.
    fn admit(&self, plane: Plane, from: SocketAddr, connection: quinn::Connection) -> Option<Accepted> {
        if plane == Plane::Join {
            return Some(Accepted { plane, connection, peer: None });
        }
        let verified = peer_of(&*self.credentials, &self.live, &connection);
        let verified = verified.map(|(peer, entry)| {
            if let Some(entry) = entry {
                entry.until_closed();
            }
            peer
        });
        match verified {
            Ok(peer) => Some(Accepted { plane, connection, peer: Some(peer) }),
            Err(error) => {
                self.metrics.count(plane, Outcome::Unverified);
                if let Some(left_out) = self.unverified_told.due(clock::now()) {
                    warn!(%from, error = %Excerpt(&error), left_out, "closing a gossip connection whose peer does not verify");
                }
                connection.close(UNVERIFIED.into(), b"peer is not verified");
                None
            }
        }
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;

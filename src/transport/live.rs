//! The open connections of one endpoint or of all workers, held against what is trusted as that changes.
//!
//! ```text
//!   verified -> add -> LiveEntry (lives as long as somebody uses the connection)
//!                        recheck(bundle, now): revoked, or ended and not renewed -> closed
//! ```
//!
//! A handshake checks a chain once; a connection may live for days. So each one's keys are remembered, and a revocation
//! closes the connections that were opened with them, in whatever thread they run. A connection outlives the leaf that it
//! was opened with (one hour) as long as its node's own certificate is good, or the node has renewed it: long streams
//! are not cut by a renewal.
//!
//! Invariant: a chain that is revoked between its check and its entry here is found: [`LiveConnections::add`] is followed
//! by another look at the revocations (`Credentials::recheck`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::UnixSeconds;
use crate::model::NodeName;
use crate::pki::{Presented, TrustBundle};

/// Application code of a connection whose peer is no longer believed.
const CODE_UNVERIFIED: u32 = 1;

#[derive(Debug)]
struct Live {
    connection: quinn::Connection,
    shown: Presented,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    live: BTreeMap<u64, Live>,
}

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A key of its chain, or its node, was revoked.
    Revoked,
    /// Its node's certificate ended and the node shows no newer one.
    Ended,
}

impl Cause {
    /// The cause as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Ended => "ended",
        }
    }
}

/// A connection that [`LiveConnections::recheck`] closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Whose it was.
    pub node: NodeName,
    /// Why.
    pub cause: Cause,
}

/// The table. Cloning shares it; written when a connection opens or ends, never by a request.
#[derive(Debug, Clone, Default)]
pub struct LiveConnections(Arc<Mutex<Table>>);

impl LiveConnections {
    /// Remembers `connection`, whose verified peer showed `shown`, until the entry is dropped.
    pub(crate) fn add(&self, connection: quinn::Connection, shown: Presented) -> LiveEntry {
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        table.live.insert(number, Live { connection, shown });
        LiveEntry { table: self.clone(), number: Some(number) }
    }

    /// Closes what `bundle` no longer believes; `is_current` tells whether a node shows a certificate that is good.
    pub fn recheck(
        &self,
        bundle: &TrustBundle,
        now: UnixSeconds,
        is_current: impl Fn(&NodeName) -> bool,
    ) -> Vec<Closed> {
        let mut closed = Vec::new();
        self.table().live.retain(|_, Live { connection, shown }| {
            if connection.close_reason().is_some() {
                return false;
            }
            let (cause, reason) = match bundle.revoked.check(shown) {
                Err(revoked) => (Cause::Revoked, revoked.to_string()),
                Ok(()) if now > shown.signers_end && !is_current(&shown.node) => {
                    (Cause::Ended, "the node's certificate has ended".to_owned())
                }
                Ok(()) => return true,
            };
            connection.close(CODE_UNVERIFIED.into(), reason.as_bytes());
            closed.push(Closed { node: shown.node.clone(), cause });
            false
        });
        closed
    }

    /// The nodes that an open connection leads to.
    pub fn nodes(&self) -> BTreeSet<NodeName> {
        let table = self.table();
        let open = table.live.values().filter(|live| live.connection.close_reason().is_none());
        open.map(|live| live.shown.node.clone()).collect()
    }

    /// How many datagrams have come on the connections that lead to `node`.
    pub fn received_from(&self, node: &NodeName) -> u64 {
        let held = {
            let table = self.table();
            let theirs = table.live.values().filter(|live| live.shown.node == *node);
            theirs.map(|live| live.connection.clone()).collect::<Vec<_>>()
        };
        // A look takes QUIC's lock, for which a worker may have to wait: not while the table is locked.
        held.iter().map(|connection| connection.stats().udp_rx.datagrams).sum()
    }

    /// How many are held.
    pub fn len(&self) -> usize {
        self.table().live.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps one connection in the table.
#[derive(Debug)]
pub(crate) struct LiveEntry {
    table: LiveConnections,
    /// None: the entry stays until its connection has closed.
    number: Option<u64>,
}

impl LiveEntry {
    /// Leaves the connection in the table until it has closed: for owners who close explicitly.
    pub(crate) fn until_closed(mut self) {
        self.number = None;
    }
}

impl Drop for LiveEntry {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let removed = self.table.table().live.remove(&number);
        // The last handle closes the connection: not while the table is locked.
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;
    use crate::pki::{EphemeralCa, Identity, Revocations, Revoked, ephemeral, spki};
    use crate::transport::ControlTransport;

    struct Node {
        identity: Arc<Identity>,
        transport: ControlTransport,
        addr: std::net::SocketAddr,
    }

    fn node(ca: &EphemeralCa, name: &str) -> Node {
        let now = clock::wall();
        let authority = ca.issuer().self_certify(&name.parse().unwrap(), &"*".parse().unwrap(), now).unwrap();
        let identity = Identity::new(authority, now).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let addr = socket.local_addr().unwrap();
        let transport = ControlTransport::new(socket, Arc::clone(&identity), [7; 64]).unwrap();
        Node { identity, transport, addr }
    }

    /// `from` connects to `to`; both ends.
    async fn connect(from: &Node, to: &Node) -> (quinn::Connection, quinn::Connection) {
        let (dialled, accepted) = tokio::join!(from.transport.connect(to.addr, None), to.transport.accept());
        (dialled.unwrap().0, accepted.unwrap().connection)
    }

    #[tokio::test]
    async fn a_revoked_peer_s_connections_are_closed_on_either_side_and_others_stay() {
        let ca = ephemeral(&"td".parse().unwrap(), clock::wall()).unwrap();
        let (a, b, c) = (node(&ca, "a"), node(&ca, "b"), node(&ca, "c"));
        let (from_a, _held_a) = connect(&a, &b).await;
        let (from_c, _held_c) = connect(&c, &b).await;
        let (to_a, _held) = connect(&b, &a).await;
        let key = spki(a.identity.authority().chain().first().unwrap()).unwrap();
        let revoked: Revocations = [Revoked::Key(key)].into_iter().collect();
        let bundle = TrustBundle { revoked, ..TrustBundle::clone(&b.identity.bundle()) };
        b.identity.set_bundle(bundle.clone(), clock::wall());
        let closed = b.transport.live().recheck(&bundle, clock::wall(), |_| true);
        let want = Closed { node: "a".parse().unwrap(), cause: Cause::Revoked };
        assert_eq!(closed, [want.clone(), want]);
        assert!(to_a.close_reason().is_some());
        let reason = tokio::time::timeout(Duration::from_secs(5), from_a.closed()).await.unwrap().to_string();
        assert!(reason.contains("is revoked"), "the peer is told: {reason}");
        assert!(from_c.close_reason().is_none());
        assert_eq!(b.transport.live().len(), 1);
        let received = |node: &str| b.transport.live().received_from(&node.parse().unwrap());
        assert!(received("c") > 0 && received("a") == 0, "each by its own connections");

        // A new handshake is refused, with the reason.
        let refused = tokio::select! {
            refused = b.transport.connect(a.addr, None) => refused.unwrap_err().to_string(),
            _ = a.transport.accept() => panic!("b goes on with a revoked peer"),
        };
        assert!(refused.contains("is revoked"), "{refused}");
    }

    #[tokio::test]
    async fn a_connection_outlives_its_leaf_and_ends_with_its_node_s_certificate_unless_that_was_renewed() {
        let ca = ephemeral(&"td".parse().unwrap(), clock::wall()).unwrap();
        let (a, b) = (node(&ca, "a"), node(&ca, "b"));
        let (_from_a, held) = connect(&a, &b).await;
        let (bundle, live) = (b.identity.bundle(), b.transport.live());
        let after = |hours: u64| clock::wall().plus(Duration::from_secs(hours * 3600));
        assert_eq!(live.recheck(&bundle, after(2), |_| false), [], "the leaf has ended, the node's certificate not");
        assert_eq!(live.recheck(&bundle, after(8 * 24), |_| true), [], "the node has renewed");
        let closed = live.recheck(&bundle, after(8 * 24), |_| false);
        assert_eq!(closed, [Closed { node: "a".parse().unwrap(), cause: Cause::Ended }]);
        assert!(held.close_reason().is_some() && live.is_empty());
    }
}

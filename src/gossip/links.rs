//! The QUIC connections to peers, at most one in use per node name.
//!
//! ```text
//!   send(to, packet) -> open: datagram, else a stream -> not open: queue and dial once
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::time::Instant;

use super::pulse::Pulse;
use crate::membership::MeshId;
use crate::model::NodeName;

/// Most peers with a connection, unless told otherwise: 9 MB of connection state; the least recently used goes first.
pub const LINKS_MAX: usize = 256;
/// Most connections of one peer that are read: two agents may dial each other at once.
const CONNECTIONS_PER_PEER_MAX: usize = 2;
/// Most packets that wait for one handshake: what SWIM sends to one member in about a second.
const WAITING_MAX: usize = 16;
/// After a failed dial the peer is not dialled again for so long.
const DIAL_PAUSE: Duration = Duration::from_secs(1);

/// What has to happen to a packet.
#[derive(Debug)]
pub(super) enum Sent {
    /// It is on its way.
    Datagram,
    /// It does not fit a datagram: send it on a stream of this connection.
    Stream(Connection, Bytes),
    /// It waits for a handshake that runs.
    Queued,
    /// It waits; this address has to be dialled.
    Dial(SocketAddr),
    /// It is given up, with the label of the metric.
    Dropped(&'static str),
}

#[derive(Debug, Default)]
struct Link {
    /// The newest last; that one is used.
    open: Vec<Connection>,
    /// Where the peer was dialled; none if it dialled.
    dialled: Option<SocketAddr>,
    is_dialling: bool,
    waiting: VecDeque<Bytes>,
    not_before: Option<Instant>,
    pulse: Pulse,
    used: u64,
}

/// All links, a bounded number.
#[derive(Debug)]
pub(super) struct Links {
    peers: BTreeMap<NodeName, Link>,
    most: usize,
    uses: u64,
}

impl Links {
    /// Makes room for links to `most` peers, one at least.
    pub(super) fn new(most: usize) -> Self {
        Self { peers: BTreeMap::new(), most: most.max(1), uses: 0 }
    }

    /// Returns the connection in use to `peer`.
    pub(super) fn open(&self, peer: &NodeName) -> Option<&Connection> {
        self.peers.get(peer)?.open.iter().rev().find(|connection| connection.close_reason().is_none())
    }

    /// Returns QUIC's smoothed round trip to each peer with an open connection.
    pub(super) fn round_trips(&self) -> BTreeMap<NodeName, Duration> {
        let open = self.peers.keys().filter_map(|peer| Some((peer.clone(), self.open(peer)?.rtt())));
        open.collect()
    }

    /// Returns how many peers have an open connection.
    pub(super) fn count(&self) -> usize {
        self.peers.values().filter(|link| !link.open.is_empty()).count()
    }

    /// Sends or queues `packet`.
    pub(super) fn send(&mut self, to: &MeshId, packet: Bytes, now: Instant) -> Sent {
        let link = self.touch(&to.name);
        link.open.retain(|connection| connection.close_reason().is_none());
        if link.dialled.is_some_and(|addr| addr != to.addr) {
            // It lives elsewhere: a packet to the old place reaches nobody.
            close_all(link, "peer moved");
        }
        // One from where the member lives, if there is one: somebody else may have come with a copy of its certificate.
        let at_home = link.open.iter().rev().find(|connection| connection.remote_address() == to.addr);
        if let Some(connection) = at_home.or(link.open.last()) {
            return match connection.send_datagram(packet.clone()) {
                Ok(()) => {
                    link.pulse.sent(received(&link.open), now);
                    Sent::Datagram
                }
                Err(SendDatagramError::ConnectionLost(_)) => Sent::Dropped("no_link"),
                Err(_) => Sent::Stream(connection.clone(), packet),
            };
        }
        if link.not_before.is_some_and(|then| now < then) {
            return Sent::Dropped("no_link");
        }
        if link.waiting.len() >= WAITING_MAX {
            // The newest knows most.
            link.waiting.pop_front();
        }
        link.waiting.push_back(packet);
        if link.is_dialling {
            return Sent::Queued;
        }
        link.is_dialling = true;
        Sent::Dial(to.addr)
    }

    /// Takes a connection that a peer opened or a join made.
    pub(super) fn accepted(&mut self, peer: &NodeName, connection: Connection) -> Vec<Bytes> {
        self.take(peer, connection, None)
    }

    /// Takes a dialled connection and returns the packets that waited.
    pub(super) fn dialled(&mut self, peer: &NodeName, addr: SocketAddr, connection: Connection) -> Vec<Bytes> {
        self.take(peer, connection, Some(addr))
    }

    fn take(&mut self, peer: &NodeName, connection: Connection, dialled: Option<SocketAddr>) -> Vec<Bytes> {
        let link = self.touch(peer);
        link.is_dialling = false;
        link.not_before = None;
        link.dialled = dialled;
        if link.open.len() >= CONNECTIONS_PER_PEER_MAX {
            link.open.remove(0).close(0u32.into(), b"replaced by a newer connection");
        }
        link.open.push(connection);
        link.waiting.drain(..).collect()
    }

    /// Notes that a packet of `peer`'s came.
    pub(super) fn heard(&mut self, peer: &NodeName) {
        if let Some(link) = self.peers.get_mut(peer) {
            link.pulse.heard();
        }
    }

    /// Returns the peers that have acknowledged something since the last call, while an answer of theirs is awaited, and
    /// since when at the earliest.
    pub(super) fn signs_of_life(&mut self, now: Instant) -> Vec<(NodeName, Instant)> {
        let waiting = self.peers.iter_mut().filter(|(_, link)| link.pulse.is_waiting());
        let answered = waiting.filter_map(|(name, link)| {
            let came_at = link.pulse.look(received(&link.open), now)?;
            Some((name.clone(), came_at))
        });
        answered.collect()
    }

    /// Notes that a dial failed; returns how many packets are lost with it.
    pub(super) fn dial_failed(&mut self, peer: &NodeName, now: Instant) -> usize {
        let Some(link) = self.peers.get_mut(peer) else { return 0 };
        link.is_dialling = false;
        link.not_before = Some(now + DIAL_PAUSE);
        let lost = link.waiting.len();
        link.waiting.clear();
        lost
    }

    /// Forgets a connection that ended.
    pub(super) fn ended(&mut self, peer: &NodeName, stable_id: usize) {
        if let Some(link) = self.peers.get_mut(peer) {
            link.open.retain(|connection| connection.stable_id() != stable_id);
            if link.open.is_empty() && !link.is_dialling {
                self.peers.remove(peer);
            }
        }
    }

    /// Closes everything to `peer`.
    pub(super) fn close(&mut self, peer: &NodeName, reason: &str) {
        if let Some(mut link) = self.peers.remove(peer) {
            close_all(&mut link, reason);
        }
    }

    /// Closes everything.
    pub(super) fn close_every(&mut self, reason: &str) {
        self.peers.values_mut().for_each(|link| close_all(link, reason));
        self.peers.clear();
    }

    fn touch(&mut self, peer: &NodeName) -> &mut Link {
        if self.peers.len() >= self.most && !self.peers.contains_key(peer) {
            let oldest = self.peers.iter().min_by_key(|(_, link)| link.used).map(|(name, _)| name.clone());
            if let Some(name) = oldest {
                self.close(&name, "idle");
            }
        }
        self.uses += 1;
        let link = self.peers.entry(peer.clone()).or_default();
        link.used = self.uses;
        link
    }
}

/// Datagrams that have come on `connections`.
fn received(connections: &[Connection]) -> u64 {
    connections.iter().map(|connection| connection.stats().udp_rx.datagrams).sum()
}

fn close_all(link: &mut Link, reason: &str) {
    link.open.drain(..).for_each(|connection| connection.close(0u32.into(), reason.as_bytes()));
    link.dialled = None;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Generation;

    fn id(name: &str) -> MeshId {
        MeshId::new(name.parse().unwrap(), "127.0.0.1:8301".parse().unwrap(), Generation::default())
    }

    #[test]
    fn one_dial_runs_per_peer_and_a_failed_one_pauses() {
        let now = crate::clock::now();
        let mut links = Links::new(LINKS_MAX);
        assert!(matches!(links.send(&id("a"), Bytes::from_static(b"1"), now), Sent::Dial(_)));
        for _ in 0..40 {
            assert!(matches!(links.send(&id("a"), Bytes::from_static(b"2"), now), Sent::Queued));
        }
        assert_eq!(links.dial_failed(&id("a").name, now), WAITING_MAX);
        assert!(matches!(links.send(&id("a"), Bytes::new(), now), Sent::Dropped("no_link")));
        assert!(matches!(links.send(&id("a"), Bytes::new(), now + DIAL_PAUSE), Sent::Dial(_)));
    }

    #[test]
    fn the_least_recently_used_link_makes_room() {
        let now = crate::clock::now();
        let mut links = Links::new(LINKS_MAX);
        for number in 0..LINKS_MAX + 10 {
            links.send(&id(&format!("n{number}")), Bytes::new(), now);
            links.send(&id("n0"), Bytes::new(), now);
        }
        assert_eq!(links.peers.len(), LINKS_MAX);
        assert!(links.peers.contains_key("n0") && !links.peers.contains_key("n1"));
    }
}

//! The QUIC connections to peers, at most one in use per node name.
//!
//! ```text
//!   send(to, packet) -> open: datagram, else a stream -> not open: queue and dial once, a few peers at a time
//! ```
//!
//! A mesh that starts at once on busy hosts wants a handshake with everybody from everybody. All side by side, none of them
//! ends before its time is over, all are begun anew, and the work done is lost: so only [`DIALS_MAX`] run, the peer that was
//! needed last comes next, and of two agents that dial each other one gives up ([`Links::accepted`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

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

/// Most dials that run at once because packets wait: a handshake takes 2.8 ms of a core for both sides, so 100 agents on two
/// cores that all begin with their limit are through in about a second, well within the 4 s of one dial.
const DIALS_MAX: usize = 8;
/// Most dials beside them that run at once because streams wait, of documents and shared records: pushing a document to 64
/// members at once that are 50 ms away takes half a second, of the two that a push has.
const STREAM_DIALS_MAX: usize = 16;

/// What a connection is dialled for: neither kind takes the other's places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Packets of the membership wait, or the round trip is wanted.
    Packets,
    /// Streams wait.
    Streams,
}

/// How many dials run, by purpose.
#[derive(Debug, Clone, Copy, Default)]
struct Dials {
    packets: usize,
    streams: usize,
}

impl Dials {
    fn has_place(self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Packets => self.packets < DIALS_MAX,
            Purpose::Streams => self.streams < STREAM_DIALS_MAX,
        }
    }

    fn of(&mut self, purpose: Purpose) -> &mut usize {
        match purpose {
            Purpose::Packets => &mut self.packets,
            Purpose::Streams => &mut self.streams,
        }
    }
}

/// What has to happen to a packet.
#[derive(Debug)]
pub(super) enum Sent {
    /// It is on its way.
    Datagram,
    /// It does not fit a datagram: send it on a stream of this connection.
    Stream(Connection, Bytes),
    /// It waits for a handshake that runs, or for its turn.
    Queued,
    /// It waits; this has to be dialled.
    Dial(Dial),
    /// It is given up, with the label of the metric.
    Dropped(&'static str),
}

/// A dial to make, and to tell of by [`Links::dialled`], [`Links::dial_failed`] or [`Links::dial_ended`].
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) to: MeshId,
    pub(super) purpose: Purpose,
    /// The peer's own connection has come: this one is not needed.
    pub(super) is_superseded: CancellationToken,
}

#[derive(Debug, Default)]
struct Link {
    /// The newest last; that one is used.
    open: Vec<Connection>,
    /// Where the peer was dialled; none if it dialled.
    dialled: Option<SocketAddr>,
    dial: Option<CancellationToken>,
    /// Waits for one of the dials that run to end.
    wanted: Option<(MeshId, Purpose)>,
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
    /// Dials that run.
    dials: Dials,
    /// Whether connections came or went since [`Links::take_changed`].
    is_changed: bool,
}

impl Links {
    /// Makes room for links to `most` peers, one at least.
    pub(super) fn new(most: usize) -> Self {
        Self { peers: BTreeMap::new(), most: most.max(1), uses: 0, dials: Dials::default(), is_changed: false }
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

    /// Returns to whom connections lead, if that may have changed since the last call.
    pub(super) fn take_changed(&mut self) -> Option<BTreeSet<NodeName>> {
        let open = |link: &Link| !link.open.is_empty();
        let names = || self.peers.iter().filter(|(_, link)| open(link)).map(|(name, _)| name.clone()).collect();
        std::mem::take(&mut self.is_changed).then(names)
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
        link.pulse.sent(0, now);
        if link.dial.is_some() {
            return Sent::Queued;
        }
        link.wanted = Some((to.clone(), Purpose::Packets));
        match self.next_dial() {
            Some(dial) => Sent::Dial(dial),
            None => Sent::Queued,
        }
    }

    /// Wants a connection to `to` for what it measures, after all that packets wait for; none has to make room for it.
    pub(super) fn acquaint(&mut self, to: &MeshId, now: Instant) {
        if self.is_full() {
            return;
        }
        let link = self.peers.entry(to.name.clone()).or_default();
        let is_paused = link.not_before.is_some_and(|then| now < then);
        if link.open.is_empty() && link.dial.is_none() && link.wanted.is_none() && !is_paused {
            link.wanted = Some((to.clone(), Purpose::Packets));
        }
    }

    /// Wants a connection to `to`; false: a dial has just failed, and it rests.
    pub(super) fn want(&mut self, to: &MeshId, purpose: Purpose, now: Instant) -> bool {
        let link = self.touch(&to.name);
        if link.not_before.is_some_and(|then| now < then) {
            return false;
        }
        link.open.retain(|connection| connection.close_reason().is_none());
        if link.open.is_empty() && link.dial.is_none() && link.wanted.is_none() {
            link.wanted = Some((to.clone(), purpose));
        }
        true
    }

    /// Tells whether packets wait for a connection to `peer`.
    pub(super) fn has_waiting(&self, peer: &NodeName) -> bool {
        self.peers.get(peer).is_some_and(|link| !link.waiting.is_empty())
    }

    /// Whether another peer would have to make room for the next one.
    pub(super) fn is_full(&self) -> bool {
        self.peers.len() >= self.most
    }

    /// Returns the dial to begin with, if one is wanted and few enough of its kind run: to the peer that was needed last.
    pub(super) fn next_dial(&mut self) -> Option<Dial> {
        let dials = self.dials;
        if !dials.has_place(Purpose::Packets) && !dials.has_place(Purpose::Streams) {
            return None;
        }
        let has_place = |link: &&mut Link| link.wanted.as_ref().is_some_and(|(_, purpose)| dials.has_place(*purpose));
        let link = self.peers.values_mut().filter(has_place).max_by_key(|link| link.used)?;
        let (to, purpose) = link.wanted.take()?;
        let is_superseded = CancellationToken::new();
        link.dial = Some(is_superseded.clone());
        *self.dials.of(purpose) += 1;
        Some(Dial { to, purpose, is_superseded })
    }

    /// Takes a connection that a peer opened or a join made.
    ///
    /// A dial of `own`'s that runs to the same peer ends if the peer's name is the lower one: both sides decide alike, so one
    /// connection is left.
    pub(super) fn accepted(&mut self, own: &NodeName, peer: &NodeName, connection: Connection) -> Vec<Bytes> {
        if let Some(dial) = self.peers.get(peer).and_then(|link| link.dial.as_ref()).filter(|_| peer < own) {
            dial.cancel();
        }
        self.take(peer, connection, None)
    }

    /// Takes a connection that a dial of [`Links::next_dial`] made, and returns the packets that waited.
    pub(super) fn dialled(&mut self, to: &MeshId, purpose: Purpose, connection: Connection) -> Vec<Bytes> {
        self.dial_ended(&to.name, purpose);
        self.take(&to.name, connection, Some(to.addr))
    }

    /// Notes that a dial ended, as it does when it is superseded.
    pub(super) fn dial_ended(&mut self, peer: &NodeName, purpose: Purpose) {
        let dials = self.dials.of(purpose);
        *dials = dials.saturating_sub(1);
        if let Some(link) = self.peers.get_mut(peer) {
            link.dial = None;
        }
    }

    fn take(&mut self, peer: &NodeName, connection: Connection, dialled: Option<SocketAddr>) -> Vec<Bytes> {
        let link = self.touch(peer);
        link.wanted = None;
        link.not_before = None;
        link.dialled = dialled;
        if link.open.len() >= CONNECTIONS_PER_PEER_MAX {
            link.open.remove(0).close(0u32.into(), b"replaced by a newer connection");
        }
        link.open.push(connection);
        let waiting = link.waiting.drain(..).collect();
        self.is_changed = true;
        waiting
    }

    /// Notes that a packet of `peer`'s came.
    pub(super) fn heard(&mut self, peer: &NodeName) {
        if let Some(link) = self.peers.get_mut(peer) {
            link.pulse.heard();
        }
    }

    /// Returns those of `peers` from whose processes something has come since it was last looked, here or on the tunnels, of
    /// which `tunnels` counts the datagrams, while an answer of theirs is awaited, and since when at the earliest. A look costs
    /// locks of QUIC's: only who is in question is looked at.
    pub(super) fn signs_of_life(
        &mut self,
        peers: impl IntoIterator<Item = NodeName>,
        tunnels: impl Fn(&NodeName) -> u64,
        now: Instant,
    ) -> Vec<(NodeName, Instant)> {
        let answered = peers.into_iter().filter_map(|name| {
            let link = self.peers.get_mut(&name).filter(|link| link.pulse.is_waiting())?;
            let came_at = link.pulse.look(received(&link.open), tunnels(&name), now)?;
            Some((name, came_at))
        });
        answered.collect()
    }

    /// Notes that a dial failed; returns how many packets are lost with it.
    pub(super) fn dial_failed(&mut self, peer: &NodeName, purpose: Purpose, now: Instant) -> usize {
        self.dial_ended(peer, purpose);
        let Some(link) = self.peers.get_mut(peer) else { return 0 };
        if !link.open.is_empty() {
            return 0;
        }
        link.not_before = Some(now + DIAL_PAUSE);
        let lost = link.waiting.len();
        link.waiting.clear();
        lost
    }

    /// Forgets a connection that ended.
    pub(super) fn ended(&mut self, peer: &NodeName, stable_id: usize) {
        self.is_changed = true;
        if let Some(link) = self.peers.get_mut(peer) {
            link.open.retain(|connection| connection.stable_id() != stable_id);
            if link.open.is_empty() && link.dial.is_none() && link.wanted.is_none() {
                self.peers.remove(peer);
            }
        }
    }

    /// Closes everything to `peer`.
    pub(super) fn close(&mut self, peer: &NodeName, reason: &str) {
        if let Some(mut link) = self.peers.remove(peer) {
            close_all(&mut link, reason);
            self.is_changed = true;
        }
    }

    /// Closes everything.
    pub(super) fn close_every(&mut self, reason: &str) {
        self.peers.values_mut().for_each(|link| close_all(link, reason));
        self.peers.clear();
    }

    fn touch(&mut self, peer: &NodeName) -> &mut Link {
        if self.is_full() && !self.peers.contains_key(peer) {
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
    use crate::transport::fixture::pair;

    fn id(name: &str) -> MeshId {
        MeshId::new(name.parse().unwrap(), "127.0.0.1:8301".parse().unwrap(), Generation::default())
    }

    fn dial_of(sent: Sent) -> Option<NodeName> {
        match sent {
            Sent::Dial(dial) => Some(dial.to.name),
            _ => None,
        }
    }

    #[test]
    fn one_dial_runs_per_peer_and_a_failed_one_pauses() {
        let now = crate::clock::now();
        let mut links = Links::new(LINKS_MAX);
        assert!(dial_of(links.send(&id("a"), Bytes::from_static(b"1"), now)).is_some());
        for _ in 0..40 {
            assert!(matches!(links.send(&id("a"), Bytes::from_static(b"2"), now), Sent::Queued));
        }
        assert_eq!(links.dial_failed(&id("a").name, Purpose::Packets, now), WAITING_MAX);
        assert!(matches!(links.send(&id("a"), Bytes::new(), now), Sent::Dropped("no_link")));
        assert!(dial_of(links.send(&id("a"), Bytes::new(), now + DIAL_PAUSE)).is_some());
    }

    #[test]
    fn few_dials_run_at_once_and_the_peer_needed_last_comes_next() {
        let now = crate::clock::now();
        let mut links = Links::new(LINKS_MAX);
        let send =
            |links: &mut Links, number: usize| dial_of(links.send(&id(&format!("n{number}")), Bytes::new(), now));
        for number in 0..DIALS_MAX {
            assert!(send(&mut links, number).is_some());
        }
        for number in [20, 21, 22, 20] {
            assert_eq!(send(&mut links, number), None);
        }
        assert!(links.next_dial().is_none(), "all places are taken");
        let next = |links: &mut Links, ended: &str| {
            links.dial_failed(&id(ended).name, Purpose::Packets, now);
            links.next_dial().map(|dial| dial.to.name.to_string())
        };
        assert_eq!(next(&mut links, "n0").as_deref(), Some("n20"));
        assert_eq!(next(&mut links, "n1").as_deref(), Some("n22"));
        assert_eq!(next(&mut links, "n20").as_deref(), Some("n21"));
        assert_eq!(next(&mut links, "n2"), None, "nobody waits");
        // A link that was closed while its dial ran gives its place back once.
        links.close(&id("n3").name, "test");
        links.dial_ended(&id("n3").name, Purpose::Packets);
        assert_eq!(links.dials.packets, DIALS_MAX - 2);
    }

    #[test]
    fn who_is_only_measured_is_dialled_last_and_takes_nobodys_place() {
        let now = crate::clock::now();
        let mut links = Links::new(DIALS_MAX + 3);
        for number in 0..DIALS_MAX {
            assert!(dial_of(links.send(&id(&format!("n{number}")), Bytes::new(), now)).is_some());
        }
        links.acquaint(&id("far"), now);
        links.acquaint(&id("n0"), now);
        assert_eq!(dial_of(links.send(&id("near"), Bytes::new(), now)), None);
        let next = |links: &mut Links, ended: &str| {
            links.dial_failed(&id(ended).name, Purpose::Packets, now);
            links.next_dial().map(|dial| dial.to.name.to_string())
        };
        assert_eq!(next(&mut links, "n0").as_deref(), Some("near"));
        assert_eq!(next(&mut links, "n1").as_deref(), Some("far"));
        assert_eq!(next(&mut links, "n2"), None, "one whose dial ran needs no second");
        links.acquaint(&id("n0"), now);
        assert_eq!(next(&mut links, "n3"), None, "it has just failed");
        links.acquaint(&id("last"), now);
        links.acquaint(&id("too-many"), now);
        assert_eq!(links.peers.len(), DIALS_MAX + 3);
    }

    #[test]
    fn streams_and_packets_do_not_take_each_others_dials() {
        let now = crate::clock::now();
        let mut links = Links::new(LINKS_MAX);
        let dialled = |links: &mut Links| std::iter::from_fn(|| links.next_dial()).collect::<Vec<_>>();
        for number in 0..STREAM_DIALS_MAX + 4 {
            assert!(links.want(&id(&format!("s{number}")), Purpose::Streams, now));
        }
        let begun = dialled(&mut links);
        assert_eq!(begun.len(), STREAM_DIALS_MAX);
        assert!(begun.iter().all(|dial| dial.purpose == Purpose::Streams));
        // A packet for one that waits for a place makes it one of the packets'.
        let waiting = id("s0");
        assert!(links.peers[&waiting.name].wanted.is_some());
        assert_eq!(dial_of(links.send(&waiting, Bytes::new(), now)), Some(waiting.name));
        for number in 1..DIALS_MAX {
            assert!(dial_of(links.send(&id(&format!("p{number}")), Bytes::new(), now)).is_some());
        }
        assert!(matches!(links.send(&id("late"), Bytes::new(), now), Sent::Queued));
        links.dial_failed(&begun[0].to.name, Purpose::Streams, now);
        let next = dialled(&mut links);
        assert_eq!(next.iter().map(|dial| dial.purpose).collect::<Vec<_>>(), [Purpose::Streams]);
        assert!(!links.want(&begun[0].to, Purpose::Streams, now), "it rests");
        assert!(links.want(&begun[0].to, Purpose::Streams, now + DIAL_PAUSE));
    }

    #[tokio::test]
    async fn two_connections_of_a_peer_are_read_and_the_newest_ones_stay() {
        let pairs = [pair().await, pair().await, pair().await];
        let mut links = Links::new(LINKS_MAX);
        let (own, peer) = (id("own").name, id("peer").name);
        for pair in &pairs {
            links.accepted(&own, &peer, pair.listener.clone());
        }
        let closed = pairs.each_ref().map(|pair| pair.listener.close_reason().is_some());
        assert_eq!(closed, [true, false, false]);
        assert_eq!(links.open(&peer).unwrap().stable_id(), pairs[2].listener.stable_id());
    }

    #[tokio::test]
    async fn a_packet_goes_to_where_the_member_lives_whoever_else_came_with_its_certificate() {
        let (home, copy) = (pair().await, pair().await);
        let mut links = Links::new(LINKS_MAX);
        let member = MeshId::new("peer".parse().unwrap(), home.listener.remote_address(), Generation::default());
        for pair in [&home, &copy] {
            links.accepted(&id("own").name, &member.name, pair.listener.clone());
        }
        let sent = links.send(&member, Bytes::from_static(b"for the member"), crate::clock::now());
        assert!(matches!(sent, Sent::Datagram), "{sent:?}");
        let read = tokio::time::timeout(Duration::from_secs(20), home.dialer.read_datagram()).await;
        assert_eq!(read.unwrap().unwrap(), &b"for the member"[..]);
    }

    #[tokio::test]
    async fn of_two_dials_that_meet_the_one_to_the_lower_name_gives_way() {
        for (peer, gives_way) in [("a", true), ("z", false)] {
            let pair = pair().await;
            let mut links = Links::new(LINKS_MAX);
            let Sent::Dial(dial) = links.send(&id(peer), Bytes::from_static(b"1"), crate::clock::now()) else {
                panic!("it dials")
            };
            let waiting = links.accepted(&id("m").name, &id(peer).name, pair.listener.clone());
            assert_eq!(waiting.len(), 1, "what waits goes over the one that came");
            assert_eq!(dial.is_superseded.is_cancelled(), gives_way, "{peer}");
        }
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

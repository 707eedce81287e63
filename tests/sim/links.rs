//! The QUIC connections between simulated agents: what `gossip::links` does, with the handshake as a delay, but for what
//! stands in [`super`]: dials at once, dials of both sides, which connection of several is taken.
//!
//! A handshake takes a round trip, a lost flight a second more (QUIC's first probe time-out); to an unreachable peer the
//! first flight is repeated until the time limit. Idle connections end after 10 min. A packet on a connection that the peer has lost is answered by a
//! stateless reset, which ends the sender's as well.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use weft::membership::MeshId;

use super::host::AckOwed;
use super::world::{Event, World};

/// As `gossip::links`.
const LINKS_MAX: usize = 256;
const WAITING_MAX: usize = 16;
const DIAL_PAUSE: Duration = Duration::from_secs(1);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(4);
const CONNECTIONS_PER_PEER_MAX: usize = 2;
/// As `transport::tune`.
const IDLE_MAX: Duration = Duration::from_mins(10);
/// QUIC's first probe time-out with an initial round trip of 333 ms.
const FIRST_PROBE: Duration = Duration::from_secs(1);

/// A connection as one side holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Connection {
    pub(crate) number: u64,
    /// Which start of the peer it leads to.
    pub(crate) peer_boot: u32,
    pub(crate) used: Duration,
    pub(crate) owed: AckOwed,
}

/// All that one agent holds towards one peer.
#[derive(Debug, Default)]
pub(crate) struct Link {
    pub(crate) open: Vec<Connection>,
    dialled: Option<SocketAddr>,
    is_dialling: bool,
    waiting: VecDeque<Bytes>,
    not_before: Option<Duration>,
    used: u64,
}

impl World {
    /// Returns the connection that `host` uses to `peer`.
    pub(crate) fn open_link(&self, host: usize, peer: usize) -> Option<Connection> {
        let link = self.hosts[host].process.as_ref()?.links.get(&peer)?;
        link.open.iter().rev().find(|connection| self.now - connection.used < IDLE_MAX).copied()
    }

    /// Sends a packet from `host` as the agent does: on the open connection, or after a handshake.
    pub(crate) fn send(&mut self, host: usize, to: &MeshId, packet: Bytes) {
        let Some(peer) = self.host_named(to) else {
            return self.dropped += 1;
        };
        self.make_room(host, peer);
        let now = self.now;
        let Some(process) = &mut self.hosts[host].process else { return };
        process.uses += 1;
        let link = process.links.entry(peer).or_default();
        link.used = process.uses;
        link.open.retain(|connection| now - connection.used < IDLE_MAX);
        if link.dialled.is_some_and(|addr| addr != to.addr) {
            link.open.clear();
            link.dialled = None;
        }
        if let Some(connection) = link.open.last_mut() {
            connection.used = now;
            let acks = connection.owed.goes(now);
            let connection = *connection;
            self.hosts[host].traffic.acks += acks;
            return self.put_on_wire(host, peer, connection, packet);
        }
        if link.not_before.is_some_and(|then| now < then) {
            return self.dropped += 1;
        }
        if link.waiting.len() >= WAITING_MAX {
            link.waiting.pop_front();
        }
        link.waiting.push_back(packet);
        if !std::mem::replace(&mut link.is_dialling, true) {
            let boot = process.boot;
            let (delay, addr) = (self.handshake(host, to.addr), to.addr);
            self.hosts[host].traffic.dials += 1;
            let begun = self.now;
            self.after(delay, Event::Dialled { from: host, boot, peer, addr, begun });
        }
    }

    fn put_on_wire(&mut self, from: usize, to: usize, connection: Connection, packet: Bytes) {
        let traffic = &mut self.hosts[from].traffic;
        traffic.packets += 1;
        traffic.packet_bytes += packet.len() as u64;
        if self.classes.is_some() {
            let (class, news) = weft::membership::class_of(&packet);
            self.classify(class, 1, (packet.len() - news) as u64);
            self.classify("news that rides along", 0, news as u64);
        }
        for delay in self.net.carry(from, to, &mut self.rng) {
            let packet = packet.clone();
            self.after(delay, Event::Packet { from, to, connection, packet });
        }
    }

    /// Returns how long a handshake with `addr` takes; more than the limit if it does not come to an end.
    pub(crate) fn handshake(&mut self, from: usize, addr: SocketAddr) -> Duration {
        let Some(to) = self.host_at(addr).filter(|to| self.net.passes(from, *to) && self.net.passes(*to, from)) else {
            return FIRST_PROBE;
        };
        let mut time = self.net.latency(from, to, &mut self.rng) + self.net.latency(to, from, &mut self.rng);
        for (a, b) in [(from, to), (to, from)] {
            let mut wait = FIRST_PROBE;
            while self.net.is_lost(a, b, &mut self.rng) && time < CONNECT_TIME_MAX {
                time += wait;
                wait *= 2;
            }
        }
        time.min(CONNECT_TIME_MAX)
    }

    /// Returns when the first flight of a dial that nobody answered is sent again: 1 s and 3 s after it was, and the end of
    /// the time limit; none after that.
    pub(crate) fn next_flight(&self, begun: Duration) -> Option<Duration> {
        let waited = self.now - begun;
        let wait = (waited.max(FIRST_PROBE) * 2).min(CONNECT_TIME_MAX.saturating_sub(waited));
        (!wait.is_zero()).then_some(wait)
    }

    /// Tells whether a handshake from `from` to `addr` that took `time` has succeeded, and with whom.
    pub(crate) fn reaches(&self, from: usize, addr: SocketAddr) -> Option<usize> {
        let to = self.host_at(addr)?;
        let is_reached = self.net.passes(from, to) && self.net.passes(to, from) && self.hosts[to].is_up();
        is_reached.then_some(to)
    }

    /// The end of a dial.
    pub(crate) fn dialled(&mut self, from: usize, boot: u32, peer: usize, addr: SocketAddr, begun: Duration) {
        if self.hosts[from].process.as_ref().is_none_or(|process| process.boot != boot) {
            return;
        }
        let name = self.hosts[peer].name.clone();
        let reached = self.reaches(from, addr).filter(|to| self.hosts[*to].name == name);
        match reached {
            Some(to) => {
                self.connect(from, to, Some(addr));
            }
            None => {
                if let Some(wait) = self.next_flight(begun) {
                    return self.after(wait, Event::Dialled { from, boot, peer, addr, begun });
                }
                let now = self.now;
                let process = self.hosts[from].process.as_mut().unwrap();
                if let Some(link) = process.links.get_mut(&peer) {
                    link.is_dialling = false;
                    link.not_before = Some(now + DIAL_PAUSE);
                    link.waiting.clear();
                }
            }
        }
    }

    /// Opens a connection between two running agents and sends what waited on either side; returns its number.
    pub(crate) fn connect(&mut self, from: usize, to: usize, dialled: Option<SocketAddr>) -> u64 {
        self.connections += 1;
        let (number, used) = (self.connections, self.now);
        let boots = [from, to].map(|host| self.hosts[host].process.as_ref().unwrap().boot);
        let ends = [(from, to, boots[1], dialled), (to, from, boots[0], None)];
        for (own, peer, peer_boot, dialled) in ends {
            self.make_room(own, peer);
            let process = self.hosts[own].process.as_mut().unwrap();
            process.uses += 1;
            let uses = process.uses;
            let link = process.links.entry(peer).or_default();
            link.used = uses;
            link.is_dialling = false;
            link.not_before = None;
            link.dialled = dialled;
            if link.open.len() >= CONNECTIONS_PER_PEER_MAX {
                link.open.remove(0);
            }
            let connection = Connection { number, peer_boot, used, owed: AckOwed::default() };
            link.open.push(connection);
            process.links_changed = true;
            for packet in std::mem::take(&mut link.waiting) {
                self.put_on_wire(own, peer, connection, packet);
            }
        }
        number
    }

    /// Tells whether `host` still holds the connection on which something arrived, and notes its use.
    pub(crate) fn holds(&mut self, host: usize, peer: usize, connection: Connection) -> bool {
        let now = self.now;
        let Some(process) = &mut self.hosts[host].process else { return false };
        if process.boot != connection.peer_boot {
            return false;
        }
        let open = process.links.get_mut(&peer).map(|link| &mut link.open);
        let found = open.and_then(|open| open.iter_mut().find(|held| held.number == connection.number));
        let acks = found.map(|held| {
            held.used = now;
            held.owed.came(now)
        });
        self.hosts[host].traffic.acks += acks.unwrap_or(0);
        acks.is_some()
    }

    /// Ends a connection at one side because the other has lost or closed it.
    pub(crate) fn connection_lost(&mut self, host: usize, peer: usize, number: u64) {
        let Some(process) = &mut self.hosts[host].process else { return };
        if let Some(link) = process.links.get_mut(&peer) {
            link.open.retain(|connection| connection.number != number);
            process.links_changed = true;
            if link.open.is_empty() && !link.is_dialling {
                process.links.remove(&peer);
            }
        }
    }

    /// Closes everything from `host` to `peer`; the peer hears of it.
    pub(crate) fn close(&mut self, host: usize, peer: usize) {
        let Some(link) = self.hosts[host].process.as_mut().and_then(|process| process.links.remove(&peer)) else {
            return;
        };
        if let Some(process) = &mut self.hosts[host].process {
            process.links_changed = true;
        }
        for connection in link.open {
            for delay in self.net.carry(host, peer, &mut self.rng) {
                let lost = Event::ConnectionLost { host: peer, peer: host, number: connection.number };
                self.after(delay, lost);
            }
        }
    }

    /// Closes one connection from `host` to `peer`; the peer hears of it.
    pub(crate) fn close_one(&mut self, host: usize, peer: usize, number: u64) {
        self.connection_lost(host, peer, number);
        for delay in self.net.carry(host, peer, &mut self.rng) {
            self.after(delay, Event::ConnectionLost { host: peer, peer: host, number });
        }
    }

    fn make_room(&mut self, host: usize, peer: usize) {
        let Some(process) = &self.hosts[host].process else { return };
        if process.links.len() < LINKS_MAX || process.links.contains_key(&peer) {
            return;
        }
        // The least recently used; uses are unique, so the order of the map does not matter.
        let oldest = process.links.iter().min_by_key(|(_, link)| link.used).map(|(peer, _)| *peer);
        if let Some(oldest) = oldest {
            self.close(host, oldest);
        }
    }
}

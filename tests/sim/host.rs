//! One machine: its disk, its clock, what is registered on it, and the agent while it runs.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use weft::gossip::engine::Engine;
use weft::membership::MeshId;
use weft::model::{
    CheckRecord, Entry, EntryKey, Generation, HealthStatus, NodeInfo, NodeName, Protocol, ServiceRecord,
};
use weft::store::StoredPeer;

use super::links::Link;
use super::trust::Signer;
use super::world::Event;

/// What survives a crash, if it was synced.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) generation: u64,
    pub(crate) peers: Vec<StoredPeer>,
}

/// What one host sent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    /// Packets of the membership.
    pub(crate) packets: u64,
    /// Their bytes, without QUIC, UDP and IP.
    pub(crate) packet_bytes: u64,
    /// UDP datagrams that carry messages on streams.
    pub(crate) stream_packets: u64,
    /// Bytes of these messages.
    pub(crate) stream_bytes: u64,
    /// UDP datagrams with nothing but an acknowledgement.
    pub(crate) acks: u64,
    /// Connections that it dialled.
    pub(crate) dials: u64,
}

/// A UDP datagram with a QUIC short header carries this beside its frames: IPv4 20, UDP 8, QUIC 1+8+2, tag 16.
pub(crate) const DATAGRAM_OVERHEAD: u64 = 55;
/// Type and length of a DATAGRAM frame; type, id, length of a STREAM frame.
pub(crate) const FRAME_OVERHEAD: u64 = 3;
/// An ACK frame, alone in its datagram.
pub(crate) const ACK_BYTES: u64 = DATAGRAM_OVERHEAD + 5;
/// QUIC acknowledges the second packet at once, a single one after so long unless something else goes that way before
/// (RFC 9000 §13.2.1; quinn's default).
const ACK_DELAY: Duration = Duration::from_millis(25);
/// One side's half of a handshake, with a chain of three certificates: initial flights are padded to 1,200 bytes.
pub(crate) const HANDSHAKE_BYTES: u64 = 4200;
/// Two watched ports asked every 550 ms, 2 bytes each under UDP and IPv4 (`gossip::actor::evidence`). No host of the
/// simulation has ports; the traffic is counted all the same.
pub(crate) const PORT_BYTES_PER_SECOND: f64 = PORTS_PER_SECOND * 30.0;
pub(crate) const PORTS_PER_SECOND: f64 = 2.0 / 0.55;

/// Comparing signed documents every 30 s while they are equal (`gossip::documents`): a question and an answer on a stream
/// and their acknowledgements, 450 bytes.
pub(crate) const DOCUMENTS_BYTES_PER_SECOND: f64 = 450.0 / 30.0;

impl Traffic {
    /// Estimates what this host sent in `time`, in bytes on the wire, ports asked and documents compared included.
    pub(crate) fn wire_bytes(&self, time: Duration) -> f64 {
        let datagrams = self.packets + self.stream_packets;
        let frames = self.packet_bytes + self.stream_bytes + datagrams * (DATAGRAM_OVERHEAD + FRAME_OVERHEAD);
        let quic = frames + self.acks * ACK_BYTES + self.dials * 2 * HANDSHAKE_BYTES;
        quic as f64 + (PORT_BYTES_PER_SECOND + DOCUMENTS_BYTES_PER_SECOND) * time.as_secs_f64()
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            packet_bytes: self.packet_bytes - before.packet_bytes,
            stream_packets: self.stream_packets - before.stream_packets,
            stream_bytes: self.stream_bytes - before.stream_bytes,
            acks: self.acks - before.acks,
            dials: self.dials - before.dials,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.packet_bytes += other.packet_bytes;
        self.stream_packets += other.stream_packets;
        self.stream_bytes += other.stream_bytes;
        self.acks += other.acks;
        self.dials += other.dials;
    }
}

/// What one side owes the other in acknowledgements. It is settled when the next packet comes or goes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AckOwed(Option<Duration>);

impl AckOwed {
    /// A packet came; returns how many datagrams with an acknowledgement alone have gone since the last call.
    pub(crate) fn came(&mut self, now: Duration) -> u64 {
        match self.0.take() {
            // Both at once.
            Some(since) if now - since <= ACK_DELAY => 1,
            Some(_) => {
                self.0 = Some(now);
                1
            }
            None => {
                self.0 = Some(now);
                0
            }
        }
    }

    /// A packet goes, and takes the acknowledgement along if it is not late.
    pub(crate) fn goes(&mut self, now: Duration) -> u64 {
        self.0.take().map_or(0, |since| u64::from(now - since > ACK_DELAY))
    }
}

/// The agent while it runs.
pub(crate) struct Process {
    pub(crate) engine: Engine,
    /// Counts the starts on this host: what belongs to an earlier one is void.
    pub(crate) boot: u32,
    pub(crate) links: HashMap<usize, Link>,
    /// Whether connections came or went since the engine was told.
    pub(crate) links_changed: bool,
    pub(crate) uses: u64,
    pub(crate) is_paused: bool,
    /// What arrived while it was stopped.
    pub(crate) inbox: VecDeque<Event>,
    /// The earliest wake-up that stands in the queue.
    pub(crate) wake_at: Option<Duration>,
    pub(crate) started: Duration,
    /// The last time that it was not running, or reachable, as it should: the oracle waits for a while after it.
    pub(crate) healthy_since: Duration,
}

/// One machine.
pub(crate) struct Host {
    pub(crate) name: NodeName,
    pub(crate) addr: SocketAddr,
    pub(crate) scope: String,
    /// An insider's engine calls itself so; its certificate says `name`.
    pub(crate) poses_as: Option<NodeName>,
    pub(crate) process: Option<Process>,
    pub(crate) disk: Disk,
    pub(crate) boots: u32,
    /// Seconds that its wall clock is ahead of the true one.
    pub(crate) wall_ahead: i64,
    pub(crate) records: BTreeMap<EntryKey, Entry>,
    pub(crate) seeds: Vec<String>,
    /// The bounds that its own replica keeps; an insider may publish beyond those of the others.
    pub(crate) replica: weft::replica::Params,
    pub(crate) traffic: Traffic,
    /// It said goodbye before it stopped, and somebody who has run ever since heard of it. A goodbye that nobody heard, or
    /// that nobody lives to tell, is a crash to everybody else.
    pub(crate) has_left: bool,
    /// Who holds this goodbye: host and start.
    pub(crate) told: BTreeSet<(usize, u32)>,
}

impl Host {
    pub(crate) fn new(number: usize, seeds: Vec<String>) -> Self {
        Self {
            name: name(number),
            addr: addr(number, 0),
            scope: "*".to_owned(),
            poses_as: None,
            process: None,
            disk: Disk::default(),
            boots: 0,
            wall_ahead: 0,
            records: BTreeMap::new(),
            seeds,
            replica: weft::replica::Params::default(),
            traffic: Traffic::default(),
            has_left: false,
            told: BTreeSet::new(),
        }
    }

    pub(crate) fn signer(&self, chain_bytes: usize) -> Signer {
        Signer::new(self.name.as_str(), &self.scope, chain_bytes)
    }

    pub(crate) fn info(&self) -> NodeInfo {
        NodeInfo {
            id: format!("{:-^36}", self.name.as_str()),
            name: self.poses_as.clone().unwrap_or_else(|| self.name.clone()),
            mesh_addr: self.addr,
            datacenter: "dc1".to_owned(),
            meta: BTreeMap::new(),
            build: "0.1.0".to_owned(),
            issuer: false,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.process.as_ref().is_some_and(|process| !process.is_paused)
    }

    /// The identity of the running agent.
    pub(crate) fn id(&self) -> Option<&MeshId> {
        self.process.as_ref().map(|process| process.engine.membership().id())
    }
}

pub(crate) fn name(number: usize) -> NodeName {
    format!("n{number}").parse().unwrap()
}

/// The address of host `number` after it moved `moves` times.
pub(crate) fn addr(number: usize, moves: u8) -> SocketAddr {
    let [_, high, low] = [number >> 16, number >> 8, number].map(|part| u8::try_from(part & 255).unwrap());
    SocketAddr::from(([10, moves, high, low], 8301))
}

pub(crate) fn generation(number: u64, nonce: u64) -> Generation {
    Generation { number, nonce }
}

/// A service as a host registers it, with one check.
pub(crate) fn service(id: &str, service: &str, tag: &str) -> [Entry; 2] {
    let record = ServiceRecord {
        tags: [tag.into()].into(),
        port: 8080,
        protocol: Protocol::Http,
        ..ServiceRecord::new(id.parse().unwrap(), service.parse().unwrap())
    };
    let check = CheckRecord {
        id: format!("check-{id}").parse().unwrap(),
        name: "http".into(),
        status: HealthStatus::Passing,
        notes: Box::default(),
        service: Some(id.parse().unwrap()),
        kind: "http".into(),
    };
    [Entry::Service(record.into()), Entry::Check(check.into())]
}

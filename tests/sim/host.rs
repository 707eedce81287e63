//! One machine: its disk, its clock, what is registered on it, and the agent while it runs.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use weft::gossip::engine::Engine;
use weft::membership::MeshId;
use weft::model::{
    CheckRecord, Entry, EntryKey, Generation, HealthStatus, NodeInfo, NodeName, Protocol, ServiceRecord, Weights,
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
    pub(crate) packets: u64,
    /// Bytes of membership packets, without QUIC, UDP and IP.
    pub(crate) packet_bytes: u64,
    /// Bytes of messages on streams.
    pub(crate) stream_bytes: u64,
    /// Connections that it dialled.
    pub(crate) dials: u64,
}

/// A UDP datagram with a QUIC short header carries this beside the packet: IPv4 20, UDP 8, QUIC 1+8+2, frame 3, tag 16.
const PACKET_OVERHEAD: u64 = 58;
/// QUIC acknowledges every second packet: half of IPv4 20, UDP 8, QUIC 11, ACK frame 6, tag 16.
const ACK_BYTES: u64 = 31;
/// One side's half of a handshake, with a chain of three certificates: initial flights are padded to 1,200 bytes.
const HANDSHAKE_BYTES: u64 = 4200;

impl Traffic {
    /// Estimates the bytes on the wire that this host sends and causes as acknowledgements.
    pub(crate) fn wire_bytes(&self) -> u64 {
        let streams = self.stream_bytes + self.stream_bytes / 1200 * PACKET_OVERHEAD;
        self.packet_bytes + self.packets * (PACKET_OVERHEAD + ACK_BYTES) + streams + self.dials * 2 * HANDSHAKE_BYTES
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            packet_bytes: self.packet_bytes - before.packet_bytes,
            stream_bytes: self.stream_bytes - before.stream_bytes,
            dials: self.dials - before.dials,
        }
    }
}

/// The agent while it runs.
pub(crate) struct Process {
    pub(crate) engine: Engine,
    /// Counts the starts on this host: what belongs to an earlier one is void.
    pub(crate) boot: u32,
    pub(crate) links: HashMap<usize, Link>,
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
    pub(crate) process: Option<Process>,
    pub(crate) disk: Disk,
    pub(crate) boots: u32,
    /// Seconds that its wall clock is ahead of the true one.
    pub(crate) wall_ahead: i64,
    pub(crate) records: BTreeMap<EntryKey, Entry>,
    pub(crate) seeds: Vec<String>,
    pub(crate) traffic: Traffic,
    /// It said goodbye before it stopped.
    pub(crate) has_left: bool,
}

impl Host {
    pub(crate) fn new(number: usize, seeds: Vec<String>) -> Self {
        Self {
            name: name(number),
            addr: addr(number, 0),
            scope: "*".to_owned(),
            process: None,
            disk: Disk::default(),
            boots: 0,
            wall_ahead: 0,
            records: BTreeMap::new(),
            seeds,
            traffic: Traffic::default(),
            has_left: false,
        }
    }

    pub(crate) fn signer(&self, chain_bytes: usize) -> Signer {
        Signer::new(self.name.as_str(), &self.scope, chain_bytes)
    }

    pub(crate) fn info(&self) -> NodeInfo {
        NodeInfo {
            id: format!("{:-^36}", self.name.as_str()),
            name: self.name.clone(),
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
        id: id.parse().unwrap(),
        name: service.parse().unwrap(),
        kind: String::new(),
        tags: vec![tag.to_owned()],
        meta: BTreeMap::new(),
        address: String::new(),
        port: 8080,
        tagged_addresses: BTreeMap::new(),
        weights: Weights::default(),
        protocol: Protocol::Http,
        enable_tag_override: false,
    };
    let check = CheckRecord {
        id: format!("check-{id}").parse().unwrap(),
        name: "http".to_owned(),
        status: HealthStatus::Passing,
        notes: String::new(),
        service: Some(id.parse().unwrap()),
        kind: "http".to_owned(),
    };
    [Entry::Service(record), Entry::Check(check)]
}

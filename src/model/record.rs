//! What a node publishes about itself: its own facts, its services and their checks.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::name::{CheckId, InstanceId, NodeName, ServiceName};
use super::text_map::TextMap;

/// Which life of a node: grows by one at each start, kept on disk before the node joins; the boot nonce, random per
/// start, decides between two lives with the same number (a disk restored from a copy).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// Starts at 1.
    pub number: u64,
    /// Random per start.
    pub nonce: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number)
    }
}

/// The facts about a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// A UUID, kept on disk: Consul's node ID.
    pub id: String,
    /// Its name.
    pub name: NodeName,
    /// Where its mesh port is reached.
    pub mesh_addr: SocketAddr,
    /// Its datacenter.
    pub datacenter: String,
    /// Free key-value pairs.
    pub meta: BTreeMap<String, String>,
    /// weft's version.
    pub build: String,
    /// Whether it can certify newcomers.
    pub issuer: bool,
}

/// How traffic to a service is parsed; declared at registration, never guessed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// Bytes; nothing is parsed.
    #[default]
    Tcp,
    /// HTTP/1.1 to the app; HTTP/1.1 or HTTP/2 from the caller.
    Http,
    /// HTTP/2 with prior knowledge to the app.
    Http2,
    /// HTTP/2 with prior knowledge, classified by `grpc-status`.
    Grpc,
    /// Datagrams; nothing is parsed.
    Udp,
}

impl Protocol {
    /// Tells whether requests are parsed.
    pub fn is_http(self) -> bool {
        !matches!(self, Self::Tcp | Self::Udp)
    }

    /// Returns the name as it stands in config (`tcp`, `http`, `http2`, `grpc`, `udp`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Udp => "udp",
        }
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" | "" => Ok(Self::Tcp),
            "http" => Ok(Self::Http),
            "http2" => Ok(Self::Http2),
            "grpc" => Ok(Self::Grpc),
            "udp" => Ok(Self::Udp),
            _ => Err(format!("protocol `{text}` is none of tcp, http, http2, grpc, udp")),
        }
    }
}

/// How much traffic an instance takes, by status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// While passing, 1 to 65535.
    pub passing: u32,
    /// While warning, 0 to 65535.
    pub warning: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

/// Consul's kind of a synthetic sidecar.
pub const CONNECT_PROXY: &str = "connect-proxy";
/// What the names and ids of synthetic sidecars end in.
pub const SIDECAR_SUFFIX: &str = "-sidecar-proxy";
/// Consul's kind of a service by which calls come into the mesh from outside.
pub const INGRESS_GATEWAY: &str = "ingress-gateway";

/// A service instance as other nodes see it: every agent holds those of the whole mesh, so its texts have no room to grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// Unique on its node.
    pub id: InstanceId,
    /// The service's name.
    pub name: ServiceName,
    /// Consul's kind: empty for a plain service, [`CONNECT_PROXY`], or [`INGRESS_GATEWAY`].
    pub kind: Box<str>,
    /// In the order given.
    pub tags: Box<[Box<str>]>,
    /// Free key-value pairs.
    pub meta: TextMap<Box<str>>,
    /// Where it is reached without the mesh; empty: the node's address.
    pub address: Box<str>,
    /// Its port without the mesh.
    pub port: u16,
    /// `lan`, `wan` … -> address and port.
    pub tagged_addresses: TextMap<(Box<str>, u16)>,
    /// Its share of the traffic.
    pub weights: Weights,
    /// How its traffic is parsed.
    pub protocol: Protocol,
    /// Consul's EnableTagOverride.
    pub enable_tag_override: bool,
}

impl ServiceRecord {
    /// An instance of which nothing is known but its names: plain TCP, of the least weight, without a port.
    pub fn new(id: InstanceId, name: ServiceName) -> Self {
        Self {
            id,
            name,
            kind: Box::default(),
            tags: Box::default(),
            meta: TextMap::default(),
            address: Box::default(),
            port: 0,
            tagged_addresses: TextMap::default(),
            weights: Weights::default(),
            protocol: Protocol::Tcp,
            enable_tag_override: false,
        }
    }
}

/// A check's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Healthy.
    Passing,
    /// Healthy, with a remark; left out by `?passing`.
    Warning,
    /// Not to be sent traffic.
    Critical,
}

impl HealthStatus {
    /// Returns Consul's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    /// Returns the worst of `statuses`; passing where there are none.
    pub fn worst(statuses: impl IntoIterator<Item = Self>) -> Self {
        statuses.into_iter().max().unwrap_or(Self::Passing)
    }
}

impl fmt::Display for HealthStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HealthStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "passing" | "pass" => Ok(Self::Passing),
            "warning" | "warn" => Ok(Self::Warning),
            "critical" | "fail" => Ok(Self::Critical),
            _ => Err(format!("status `{text}` is none of passing, warning, critical")),
        }
    }
}

/// A check as other nodes see it. Its output stays on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRecord {
    /// Unique on its node.
    pub id: CheckId,
    /// For people.
    pub name: Box<str>,
    /// The last result, thresholds applied.
    pub status: HealthStatus,
    /// For people.
    pub notes: Box<str>,
    /// The instance that it is about; none: the whole node.
    pub service: Option<InstanceId>,
    /// `http`, `tcp`, `ttl`.
    pub kind: Box<str>,
}

/// A node that no agent runs on (a database, somebody's endpoint), with its services: written at an agent, which tells of it
/// for as long as it is there itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRecord {
    /// Its name: no mesh node's.
    pub name: NodeName,
    /// A UUID; empty: none was given.
    pub id: Box<str>,
    /// An IP address or a host name.
    pub address: Box<str>,
    /// `lan`, `wan` … -> address.
    pub tagged_addresses: TextMap<Box<str>>,
    /// Free key-value pairs.
    pub meta: TextMap<Box<str>>,
    /// In order of id.
    pub services: Box<[Arc<ServiceRecord>]>,
    /// In order of id; what is about no service is about the node.
    pub checks: Box<[Arc<CheckRecord>]>,
}

/// Ejections of a node that it tells of: more say that the node itself is sick.
pub const EJECTIONS_MAX: usize = 32;

/// Instances that a node has ejected: a hint for others, which they weigh (`routing`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EjectionsRecord {
    /// At most [`EJECTIONS_MAX`] count, in order.
    pub instances: Box<[(NodeName, InstanceId)]>,
}

/// Limits of the whole mesh that a node tells its demand on at a time: a statement of them fits a broadcast.
pub const DEMANDS_MAX: usize = 32;

/// What a node's callers ask of limits that hold for the whole mesh (`routing` weighs it).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// The limit's number, and how many eighths of an octave the demand lies below the whole limit. At most
    /// [`DEMANDS_MAX`]; a limit that is not named is asked for next to nothing.
    pub limits: Box<[(u64, u8)]>,
}

/// Names one record of a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum EntryKey {
    /// The node's own facts.
    Node,
    /// An instance.
    Service(InstanceId),
    /// A check.
    Check(CheckId),
    /// The instances that the node has ejected.
    Ejections,
    /// A node without an agent.
    External(NodeName),
}

/// One record of a node; shared by all that hold it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The node's own facts.
    Node(Arc<NodeInfo>),
    /// An instance.
    Service(Arc<ServiceRecord>),
    /// A check.
    Check(Arc<CheckRecord>),
    /// The instances that the node has ejected.
    Ejections(Arc<EjectionsRecord>),
    /// A node without an agent.
    External(Arc<ExternalRecord>),
}

impl Entry {
    /// Returns the key that this record stands under.
    pub fn key(&self) -> EntryKey {
        match self {
            Self::Node(_) => EntryKey::Node,
            Self::Service(service) => EntryKey::Service(service.id.clone()),
            Self::Check(check) => EntryKey::Check(check.id.clone()),
            Self::Ejections(_) => EntryKey::Ejections,
            Self::External(external) => EntryKey::External(external.name.clone()),
        }
    }
}

/// What the membership knows of a member (serf's words and numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberStatus {
    /// Answers, or is suspected and may still refute.
    Alive,
    /// Said that it goes; still serves what it has.
    Leaving,
    /// Went on purpose.
    Left,
    /// Stopped answering.
    Failed,
}

impl MemberStatus {
    /// Returns serf's number, as `/v1/agent/members` gives it.
    pub fn code(self) -> u8 {
        match self {
            Self::Alive => 1,
            Self::Leaving => 2,
            Self::Left => 3,
            Self::Failed => 4,
        }
    }

    /// Returns the word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Leaving => "leaving",
            Self::Left => "left",
            Self::Failed => "failed",
        }
    }
}

/// Tells whether an address can be dialled: neither unspecified nor multicast.
pub fn is_dialable(addr: IpAddr) -> bool {
    !addr.is_unspecified() && !addr.is_multicast()
}

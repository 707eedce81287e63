//! Who a member is: its name, where it is reached and which life it lives.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::model::{Generation, NodeName};

/// One life of a member: the generation (one per start) and how often it came back within it.
///
/// The greater life wins a conflict; nothing that was said about a smaller one counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Life {
    /// Grows at each start.
    pub generation: Generation,
    /// Grows each time that the others took the member for failed and it came back.
    pub renewals: u32,
}

/// Stands for a name where whole lists of members are looked through: foca does so for each packet, and in a large mesh
/// names lie all over the memory. 128 bits of its SHA-256, since a newcomer may choose its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameKey([u64; 2]);

impl NameKey {
    fn of(name: &NodeName) -> Self {
        let hash = digest(&SHA256, name.as_str().as_bytes());
        let mut words =
            hash.as_ref().chunks_exact(8).map(|word| word.iter().fold(0, |sum, at| sum << 8 | u64::from(*at)));
        Self([words.next().unwrap_or_default(), words.next().unwrap_or_default()])
    }
}

/// A member as SWIM names it. Its address, in SWIM's sense, is the name alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Plain", into = "Plain")]
pub struct MeshId {
    /// Its name: unique among live members.
    pub name: NodeName,
    /// Which life.
    pub life: Life,
    /// Where its mesh port is reached.
    pub addr: SocketAddr,
    key: NameKey,
}

/// What is written of an identity.
#[derive(Serialize, Deserialize)]
#[serde(rename = "MeshId")]
struct Plain {
    name: NodeName,
    life: Life,
    addr: SocketAddr,
}

impl From<Plain> for MeshId {
    fn from(Plain { name, life, addr }: Plain) -> Self {
        Self { key: NameKey::of(&name), name, life, addr }
    }
}

impl From<MeshId> for Plain {
    fn from(MeshId { name, life, addr, .. }: MeshId) -> Self {
        Self { name, life, addr }
    }
}

impl PartialEq for MeshId {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key && self.life == other.life && self.addr == other.addr
    }
}

impl Eq for MeshId {}

impl PartialOrd for MeshId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for MeshId {
    fn cmp(&self, other: &Self) -> Ordering {
        (&self.name, self.life, self.addr).cmp(&(&other.name, other.life, other.addr))
    }
}

impl Hash for MeshId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.name, self.life, self.addr).hash(state);
    }
}

impl MeshId {
    /// Names the first life of `generation`.
    pub fn new(name: NodeName, addr: SocketAddr, generation: Generation) -> Self {
        Self::with_life(name, addr, Life { generation, renewals: 0 })
    }

    /// Names any life.
    pub fn with_life(name: NodeName, addr: SocketAddr, life: Life) -> Self {
        Self { key: NameKey::of(&name), name, life, addr }
    }

    /// Returns into which of `groups` groups the name falls.
    pub(super) fn group(&self, groups: usize) -> usize {
        let NameKey([high, _]) = self.key;
        usize::try_from(high % u64::try_from(groups.max(1)).unwrap_or(1)).unwrap_or(0)
    }

    /// Returns a number for this life and incarnation of it: a comparison's, no proof.
    pub(super) fn life_sum(&self, incarnation: u16) -> u32 {
        let NameKey([_, low]) = self.key;
        // The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit reaches every other.
        let mix = |value: u64| {
            let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            value ^ (value >> 31)
        };
        let Life { generation, renewals } = self.life;
        let within = u64::from(renewals) << 16 | u64::from(incarnation);
        let sum = mix(low ^ mix(generation.number ^ mix(generation.nonce ^ mix(within))));
        u32::try_from(sum >> 32).unwrap_or(0)
    }
}

impl foca::Identity for MeshId {
    type Addr = NameKey;

    fn renew(&self) -> Option<Self> {
        let renewals = self.life.renewals.checked_add(1)?;
        Some(Self { life: Life { renewals, ..self.life }, ..self.clone() })
    }

    fn addr(&self) -> NameKey {
        self.key
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        // The address decides between equal lives, so that everybody decides alike.
        (self.life, self.addr) > (adversary.life, adversary.addr)
    }
}

//! The wire form of SWIM packets and a look into them before foca acts on them.
//!
//! ```text
//!   packet = header | u16 number of updates | updates | (u16 length | broadcast)*      (foca's framing)
//! ```

use bytes::{Buf, BufMut};
use foca::{Header, Member, Message, State};
use serde::{Deserialize, Serialize};

use super::id::{Life, MeshId};
use crate::model::{Generation, NodeName};
use crate::wire::{self, WireError};

/// Largest packet, in bytes: fits the smallest QUIC datagram on a path with 1200-byte packets.
pub const PACKET_BYTES_MAX: usize = 1100;
/// Largest encoded broadcast, in bytes: fits a packet whose header names three members with 63-byte names.
pub const BROADCAST_BYTES_MAX: usize = 700;

#[derive(Serialize, Deserialize)]
struct WireHeader {
    src: MeshId,
    src_incarnation: u16,
    dst: MeshId,
    message: WireMessage,
}

#[derive(Serialize, Deserialize)]
enum WireMessage {
    Ping(u8),
    Ack(u8),
    PingReq(MeshId, u8),
    IndirectPing(MeshId, u8),
    IndirectAck(MeshId, u8),
    ForwardedAck(MeshId, u8),
    Announce,
    Feed,
    Gossip,
    Broadcast,
    TurnUndead,
}

impl From<&Message<MeshId>> for WireMessage {
    fn from(message: &Message<MeshId>) -> Self {
        match message.clone() {
            Message::Ping(number) => Self::Ping(number),
            Message::Ack(number) => Self::Ack(number),
            Message::PingReq { target, probe_number } => Self::PingReq(target, probe_number),
            Message::IndirectPing { origin, probe_number } => Self::IndirectPing(origin, probe_number),
            Message::IndirectAck { target, probe_number } => Self::IndirectAck(target, probe_number),
            Message::ForwardedAck { origin, probe_number } => Self::ForwardedAck(origin, probe_number),
            Message::Announce => Self::Announce,
            Message::Feed => Self::Feed,
            Message::Gossip => Self::Gossip,
            Message::Broadcast => Self::Broadcast,
            Message::TurnUndead => Self::TurnUndead,
        }
    }
}

impl From<WireMessage> for Message<MeshId> {
    fn from(message: WireMessage) -> Self {
        match message {
            WireMessage::Ping(number) => Self::Ping(number),
            WireMessage::Ack(number) => Self::Ack(number),
            WireMessage::PingReq(target, probe_number) => Self::PingReq { target, probe_number },
            WireMessage::IndirectPing(origin, probe_number) => Self::IndirectPing { origin, probe_number },
            WireMessage::IndirectAck(target, probe_number) => Self::IndirectAck { target, probe_number },
            WireMessage::ForwardedAck(origin, probe_number) => Self::ForwardedAck { origin, probe_number },
            WireMessage::Announce => Self::Announce,
            WireMessage::Feed => Self::Feed,
            WireMessage::Gossip => Self::Gossip,
            WireMessage::Broadcast => Self::Broadcast,
            WireMessage::TurnUndead => Self::TurnUndead,
        }
    }
}

/// What a member is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// Answers.
    Alive,
    /// Failed a probe and may refute.
    Suspect,
    /// Gone.
    Down,
}

/// What one node says about a member: an update of a packet, an entry of a welcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberEntry {
    /// The member.
    pub id: MeshId,
    /// SWIM's incarnation of this life.
    pub incarnation: u16,
    /// What it is said to be.
    pub standing: Standing,
}

impl From<&Member<MeshId>> for MemberEntry {
    fn from(member: &Member<MeshId>) -> Self {
        let standing = match member.state() {
            State::Alive => Standing::Alive,
            State::Suspect => Standing::Suspect,
            State::Down => Standing::Down,
        };
        Self { id: member.id().clone(), incarnation: member.incarnation(), standing }
    }
}

impl From<MemberEntry> for Member<MeshId> {
    fn from(entry: MemberEntry) -> Self {
        let state = match entry.standing {
            Standing::Alive => State::Alive,
            Standing::Suspect => State::Suspect,
            Standing::Down => State::Down,
        };
        Self::new(entry.id, entry.incarnation, state)
    }
}

/// Why a codec call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CodecError {
    /// The bytes are none of ours.
    #[error("malformed packet")]
    Wire(#[source] WireError),
    /// The packet is full.
    #[error("packet has no room left")]
    Full,
}

/// foca's codec over the wire encoding.
#[derive(Debug)]
pub(super) struct WireCodec;

fn put<T: Serialize>(value: &T, mut buf: impl BufMut) -> Result<(), CodecError> {
    let bytes = wire::encode(value).map_err(CodecError::Wire)?;
    if bytes.len() > buf.remaining_mut() {
        return Err(CodecError::Full);
    }
    buf.put_slice(&bytes);
    Ok(())
}

fn take<T: serde::de::DeserializeOwned>(mut buf: impl Buf) -> Result<T, CodecError> {
    let (value, used) = wire::decode_prefix(buf.chunk()).map_err(CodecError::Wire)?;
    buf.advance(used);
    Ok(value)
}

impl foca::Codec<MeshId> for WireCodec {
    type Error = CodecError;

    fn encode_header(&mut self, header: &Header<MeshId>, buf: impl BufMut) -> Result<(), CodecError> {
        let wire = WireHeader {
            src: header.src.clone(),
            src_incarnation: header.src_incarnation,
            dst: header.dst.clone(),
            message: WireMessage::from(&header.message),
        };
        put(&wire, buf)
    }

    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<MeshId>, CodecError> {
        let WireHeader { src, src_incarnation, dst, message } = take(buf)?;
        Ok(Header { src, src_incarnation, dst, message: message.into() })
    }

    fn encode_member(&mut self, member: &Member<MeshId>, buf: impl BufMut) -> Result<(), CodecError> {
        put(&MemberEntry::from(member), buf)
    }

    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<MeshId>, CodecError> {
        take::<MemberEntry>(buf).map(Member::from)
    }
}

/// A node's goodbye, its own or spoken for it by an operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// Who goes.
    pub node: NodeName,
    /// The last life that goes with it; a greater one is alive at once.
    pub life: Life,
    /// Whether the others forget it at once (`force-leave -prune`).
    pub prune: bool,
}

/// What rides on SWIM packets beside the membership.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Broadcast {
    /// A small change of a node's records; the payload is the replica's.
    Delta {
        /// Whose.
        node: NodeName,
        /// The generation that the change leads to.
        generation: Generation,
        /// The version that the change leads to.
        version: u64,
        /// The replica's hash of that version.
        hash: u64,
        /// The encoded delta.
        payload: Vec<u8>,
    },
    /// The sender holds a node's records of this version: whoever lacks them pulls.
    IHave {
        /// Whose.
        node: NodeName,
        /// Their generation.
        generation: Generation,
        /// Their version.
        version: u64,
        /// The replica's hash of that version.
        hash: u64,
    },
    /// A node goes.
    Leave(Leave),
}

/// Orders broadcasts: a newer one about the same node drives the older out of the queue, so that the queue holds at
/// most two per node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BroadcastKey {
    Records(NodeName, Generation, u64),
    Leave(NodeName, Life),
}

impl Broadcast {
    pub(super) fn key(&self) -> BroadcastKey {
        match self {
            Self::Delta { node, generation, version, .. } | Self::IHave { node, generation, version, .. } => {
                BroadcastKey::Records(node.clone(), *generation, *version)
            }
            Self::Leave(leave) => BroadcastKey::Leave(leave.node.clone(), leave.life),
        }
    }
}

impl foca::Invalidates for BroadcastKey {
    fn invalidates(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Records(a, generation, version), Self::Records(b, other_generation, other_version)) => {
                a == b && (generation, version) >= (other_generation, other_version)
            }
            (Self::Leave(a, life), Self::Leave(b, other_life)) => a == b && life >= other_life,
            _ => false,
        }
    }
}

/// Keeps what this node adds; what others sent is read by [`inspect`] and added once its owner has accepted it.
#[derive(Debug)]
pub(super) struct Spreader;

impl foca::BroadcastHandler<MeshId> for Spreader {
    type Key = BroadcastKey;
    type Error = WireError;

    fn receive_item(&mut self, data: &[u8], sender: Option<&MeshId>) -> Result<Option<BroadcastKey>, WireError> {
        match sender {
            Some(_) => Ok(None),
            None => wire::decode::<Broadcast>(data, BROADCAST_BYTES_MAX).map(|item| Some(item.key())),
        }
    }
}

/// What a packet says, read without acting on it.
#[derive(Debug)]
pub(super) struct Inspected<'a> {
    pub(super) src: MeshId,
    /// The sender takes this node for gone.
    pub(super) is_undead_call: bool,
    head: &'a [u8],
    /// Absent where the message carries no updates.
    updates: Option<Vec<(MemberEntry, &'a [u8])>>,
    tail: &'a [u8],
    pub(super) broadcasts: Vec<Broadcast>,
}

/// Reads the whole packet; total, and bounded by the packet's own length.
pub(super) fn inspect(packet: &[u8]) -> Result<Inspected<'_>, CodecError> {
    let (header, used) = wire::decode_prefix::<WireHeader>(packet).map_err(CodecError::Wire)?;
    let (head, mut rest) = packet.split_at_checked(used).ok_or(CodecError::Full)?;
    let mut updates = None;
    if rest.len() >= 2 && !matches!(header.message, WireMessage::Broadcast) {
        let mut list = Vec::new();
        for _ in 0..rest.get_u16() {
            let (entry, used) = wire::decode_prefix::<MemberEntry>(rest).map_err(CodecError::Wire)?;
            let (bytes, after) = rest.split_at_checked(used).ok_or(CodecError::Full)?;
            list.push((entry, bytes));
            rest = after;
        }
        updates = Some(list);
    }
    let tail = rest;
    let mut broadcasts = Vec::new();
    while rest.len() > 2 {
        let length = usize::from(rest.get_u16());
        let (item, after) = rest.split_at_checked(length).ok_or(CodecError::Full)?;
        broadcasts.push(wire::decode(item, BROADCAST_BYTES_MAX).map_err(CodecError::Wire)?);
        rest = after;
    }
    let is_undead_call = matches!(header.message, WireMessage::TurnUndead);
    Ok(Inspected { src: header.src, is_undead_call, head, updates, tail, broadcasts })
}

impl Inspected<'_> {
    /// Returns what the packet says of members.
    pub(super) fn entries(&self) -> impl Iterator<Item = &MemberEntry> {
        self.updates.iter().flatten().map(|(entry, _)| entry)
    }

    /// Writes the packet again without the updates that `keep` refuses; None if it keeps all.
    pub(super) fn without(&self, keep: impl Fn(&MemberEntry) -> bool) -> Option<Vec<u8>> {
        let updates = self.updates.as_ref()?;
        let kept: Vec<&[u8]> = updates.iter().filter(|(entry, _)| keep(entry)).map(|(_, bytes)| *bytes).collect();
        if kept.len() == updates.len() {
            return None;
        }
        let mut packet = self.head.to_vec();
        packet.put_u16(u16::try_from(kept.len()).unwrap_or(u16::MAX));
        packet.extend_from_slice(&kept.concat());
        packet.extend_from_slice(self.tail);
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use foca::Codec as _;
    use proptest::prelude::*;

    use super::*;

    fn id(name: &str, number: u64) -> MeshId {
        let generation = Generation { number, nonce: u64::MAX };
        MeshId::new(name.parse().unwrap(), "[2001:db8::1]:65535".parse().unwrap(), generation)
    }

    #[test]
    fn the_longest_names_leave_room_for_the_largest_broadcast() {
        let long = id(&"n".repeat(63), u64::MAX);
        let message = Message::PingReq { target: long.clone(), probe_number: 255 };
        let header = Header { src: long.clone(), src_incarnation: u16::MAX, dst: long, message };
        let mut bytes = Vec::new();
        WireCodec.encode_header(&header, &mut bytes).unwrap();
        assert!(bytes.len() + 2 + 2 + BROADCAST_BYTES_MAX <= PACKET_BYTES_MAX, "{}", bytes.len());
        assert_eq!(WireCodec.decode_header(&bytes[..]).unwrap(), header);
    }

    #[test]
    fn a_full_packet_is_left_clean() {
        let member = Member::alive(id("a", 1));
        let mut small = Vec::new().limit(4);
        assert!(matches!(WireCodec.encode_member(&member, &mut small), Err(CodecError::Full)));
        assert!(small.get_ref().is_empty());
    }

    #[test]
    fn a_packet_is_rewritten_without_refused_updates() {
        let header = Header { src: id("a", 1), src_incarnation: 0, dst: id("b", 1), message: Message::Gossip };
        let mut bytes = Vec::new();
        WireCodec.encode_header(&header, &mut bytes).unwrap();
        bytes.put_u16(2);
        WireCodec.encode_member(&Member::down(id("x", 1)), &mut bytes).unwrap();
        WireCodec.encode_member(&Member::alive(id("y", 1)), &mut bytes).unwrap();
        let item =
            Broadcast::IHave { node: "y".parse().unwrap(), generation: Generation::default(), version: 3, hash: 1 };
        let item_bytes = wire::encode(&item).unwrap();
        bytes.put_u16(u16::try_from(item_bytes.len()).unwrap());
        bytes.extend_from_slice(&item_bytes);

        let seen = inspect(&bytes).unwrap();
        assert_eq!(seen.broadcasts, std::slice::from_ref(&item));
        assert!(seen.without(|_| true).is_none());
        let cut = seen.without(|entry| entry.id.name.as_str() != "x").unwrap();
        let again = inspect(&cut).unwrap();
        assert_eq!(again.entries().map(|entry| entry.id.clone()).collect::<Vec<_>>(), [id("y", 1)]);
        assert_eq!(again.broadcasts, [item]);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _unused = inspect(&bytes);
        }

        #[test]
        fn a_damaged_packet_never_panics(at in 0usize..200, value in any::<u8>(), length in 0usize..220) {
            let header = Header { src: id("a", 1), src_incarnation: 0, dst: id("b", 1), message: Message::Feed };
            let mut bytes = Vec::new();
            WireCodec.encode_header(&header, &mut bytes).unwrap();
            bytes.put_u16(1);
            WireCodec.encode_member(&Member::alive(id("y", 1)), &mut bytes).unwrap();
            if let Some(byte) = bytes.get_mut(at) { *byte = value; }
            bytes.truncate(length);
            let _unused = inspect(&bytes);
        }
    }
}

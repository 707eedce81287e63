//! The wire form of SWIM packets and a look into them before foca acts on them.
//!
//! ```text
//!   packet = envelope | header | u16 | (u16 length | broadcast)*      foca's framing; the u16 counts nothing
//!          | envelope with a call | (u16 length | broadcast)*          weft's own questions, answers and news
//! ```
//!
//! foca's updates (who is alive, suspect, down) take no bytes: anybody could have made them up. What is said of members
//! travels as signed statements among the broadcasts.

use bytes::{Buf, BufMut};
use foca::{Header, Member, Message, State};
use serde::{Deserialize, Serialize};

use super::id::{Life, MeshId};
use super::lives::Sums;
use super::statement::Statement;
use crate::model::{Generation, NodeName};
use crate::wire::{self, WireError};

/// Largest packet, in bytes: fits the smallest QUIC datagram on a path with 1200-byte packets.
pub const PACKET_BYTES_MAX: usize = 1100;
/// Largest encoded broadcast, in bytes: fits a packet whose header names three members with 63-byte names.
pub const BROADCAST_BYTES_MAX: usize = 700;

/// Room for an envelope without a call in front of foca's packet: version, hash, incarnation, no call.
pub(super) const ENVELOPE_BYTES_MAX: usize = 16;

/// What weft adds to every packet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Envelope {
    /// The sender's hash of all records, on probes and answers.
    pub(super) set_hash: Option<u64>,
    /// The receiver is suspected at this incarnation (Lifeguard's buddy system).
    pub(super) suspected: Option<u16>,
    /// A message of weft's own; foca's packet follows only without it.
    pub(super) call: Option<CallPacket>,
}

/// A message of weft's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CallPacket {
    pub(super) src: MeshId,
    pub(super) src_incarnation: u16,
    /// The life that is meant.
    pub(super) dst: Life,
    pub(super) call: Call,
}

/// What is asked or answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Call {
    /// Are you there?
    Check(u32),
    /// Yes.
    Answer(u32),
    /// Check `target` for me and tell me within `patience_ms`.
    CheckFor { target: NodeName, number: u32, patience_ms: u16 },
    /// It answered.
    Reached(u32),
    /// It did not, and I am here (a nack).
    Missed(u32),
    /// You are taken for gone here.
    Gone,
    /// Nothing but the broadcasts behind it.
    News,
    /// These are the lives that I know: what do I lack?
    Lives(Sums),
}

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
    /// foca reads no updates.
    #[error("updates are not taken from packets")]
    Update,
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

    fn encode_member(&mut self, _member: &Member<MeshId>, _buf: impl BufMut) -> Result<(), CodecError> {
        Ok(())
    }

    fn decode_member(&mut self, _buf: impl Buf) -> Result<Member<MeshId>, CodecError> {
        Err(CodecError::Update)
    }
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
        #[serde(with = "wire::bytes")]
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
    /// Something that a node signed about members; the core keeps it for itself.
    Said(Statement),
}

/// What a packet says, read without acting on it.
#[derive(Debug)]
pub(super) struct Inspected {
    pub(super) src: MeshId,
    pub(super) src_incarnation: u16,
    /// The life of the receiver that is meant.
    pub(super) dst: Life,
    pub(super) set_hash: Option<u64>,
    pub(super) suspected: Option<u16>,
    pub(super) body: Body,
    pub(super) broadcasts: Vec<Broadcast>,
}

/// What a packet is for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// A message of weft's own.
    Call(Call),
    /// foca's, without anything that it would have to believe.
    Swim {
        /// What it takes.
        packet: Vec<u8>,
        /// Which kind.
        kind: Kind,
    },
}

/// What the core wants to know of foca's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ping,
    Ack,
    Feed,
    TurnUndead,
    Other,
}

impl From<&WireMessage> for Kind {
    fn from(message: &WireMessage) -> Self {
        match message {
            WireMessage::Ping(_) => Self::Ping,
            WireMessage::Ack(_) => Self::Ack,
            WireMessage::Feed => Self::Feed,
            WireMessage::TurnUndead => Self::TurnUndead,
            _ => Self::Other,
        }
    }
}

/// Returns the kind of a packet that foca made.
pub(super) fn kind_of(packet: &[u8]) -> Kind {
    wire::decode_prefix::<WireHeader>(packet).map_or(Kind::Other, |(header, _)| Kind::from(&header.message))
}

/// Names what a packet of this node's is for, and tells how many of its bytes are broadcasts that ride on it: for whoever
/// wants to know what a mesh sends.
pub fn class_of(packet: &[u8]) -> (&'static str, usize) {
    let Ok((envelope, used)) = wire::decode_prefix::<Envelope>(packet) else { return ("unreadable", 0) };
    let swim = packet.get(used..).unwrap_or_default();
    let class = match envelope.call.map(|call| call.call) {
        Some(Call::Check(_)) => "check",
        Some(Call::Answer(_)) => "answer",
        Some(Call::CheckFor { .. } | Call::Reached(_) | Call::Missed(_)) => "help",
        Some(Call::Gone) => "gone",
        Some(Call::News) => "news",
        Some(Call::Lives(_)) => "lives",
        None => {
            let Ok((header, used)) = wire::decode_prefix::<WireHeader>(swim) else { return ("unreadable", 0) };
            let class = match header.message {
                WireMessage::Ping(_) => "probe",
                WireMessage::Ack(_) => "probe's answer",
                WireMessage::Announce => "announce",
                WireMessage::Feed => "feed",
                _ => "other",
            };
            return (class, swim.len().saturating_sub(used + 2));
        }
    };
    (class, swim.len())
}

/// Puts `packet` of foca into `envelope`.
pub(super) fn wrap(envelope: &Envelope, packet: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut bytes = wire::encode(envelope)?;
    bytes.extend_from_slice(packet);
    Ok(bytes)
}

/// Appends `broadcast` to a packet that ends with broadcasts; returns whether it had room.
pub(super) fn append(packet: &mut Vec<u8>, broadcast: &Broadcast) -> bool {
    wire::encode(broadcast).is_ok_and(|bytes| append_bytes(packet, &bytes))
}

/// Bytes that an encoded broadcast takes in a packet.
pub(super) fn weight_of(bytes: &[u8]) -> usize {
    2 + bytes.len()
}

/// Appends an encoded broadcast, as [`append`] does.
pub(super) fn append_bytes(packet: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let Ok(length) = u16::try_from(bytes.len()) else { return false };
    if packet.len() + weight_of(bytes) > PACKET_BYTES_MAX {
        return false;
    }
    packet.put_u16(length);
    packet.extend_from_slice(bytes);
    true
}

/// Reads the whole packet; total, and bounded by the packet's own length. Broadcasts that `is_known` are left out.
pub(super) fn inspect(packet: &[u8], is_known: impl Fn(&[u8]) -> bool) -> Result<Inspected, CodecError> {
    let (envelope, used) = wire::decode_prefix::<Envelope>(packet).map_err(CodecError::Wire)?;
    let (_, swim) = packet.split_at_checked(used).ok_or(CodecError::Full)?;
    let Envelope { set_hash, suspected, call } = envelope;
    if let Some(CallPacket { src, src_incarnation, dst, call }) = call {
        let (body, broadcasts) = (Body::Call(call), take_broadcasts(swim, is_known)?);
        return Ok(Inspected { src, src_incarnation, dst, set_hash, suspected, body, broadcasts });
    }
    let (header, used) = wire::decode_prefix::<WireHeader>(swim).map_err(CodecError::Wire)?;
    let (head, mut rest) = swim.split_at_checked(used).ok_or(CodecError::Full)?;
    let mut packet = head.to_vec();
    if rest.len() >= 2 && !matches!(header.message, WireMessage::Broadcast) {
        let _counts_nothing = rest.get_u16();
        packet.put_u16(0);
    }
    let broadcasts = take_broadcasts(rest, is_known)?;
    let body = Body::Swim { packet, kind: Kind::from(&header.message) };
    let WireHeader { src, src_incarnation, dst, .. } = header;
    Ok(Inspected { src, src_incarnation, dst: dst.life, set_hash, suspected, body, broadcasts })
}

fn take_broadcasts(mut rest: &[u8], is_known: impl Fn(&[u8]) -> bool) -> Result<Vec<Broadcast>, CodecError> {
    let mut broadcasts = Vec::new();
    while rest.len() >= 2 {
        let length = usize::from(rest.get_u16());
        let (item, after) = rest.split_at_checked(length).ok_or(CodecError::Full)?;
        if !is_known(item) {
            broadcasts.push(wire::decode(item, BROADCAST_BYTES_MAX).map_err(CodecError::Wire)?);
        }
        rest = after;
    }
    if rest.is_empty() { Ok(broadcasts) } else { Err(CodecError::Wire(WireError::Trailing { bytes: rest.len() })) }
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
        let bytes_max = ENVELOPE_BYTES_MAX + bytes.len() + 2 + 2 + BROADCAST_BYTES_MAX;
        assert!(bytes_max <= PACKET_BYTES_MAX, "{bytes_max}");
        assert_eq!(WireCodec.decode_header(&bytes[..]).unwrap(), header);
    }

    #[test]
    fn a_full_packet_is_left_clean() {
        let header = Header { src: id("a", 1), src_incarnation: 0, dst: id("b", 1), message: Message::Gossip };
        let mut small = Vec::new().limit(4);
        assert!(matches!(WireCodec.encode_header(&header, &mut small), Err(CodecError::Full)));
        assert!(small.get_ref().is_empty());
    }

    #[test]
    fn the_fullest_envelope_fits_the_room_that_foca_leaves() {
        let envelope = Envelope { set_hash: Some(u64::MAX), suspected: Some(u16::MAX), call: None };
        let bytes = wire::encode(&envelope).unwrap().len();
        assert!(bytes <= ENVELOPE_BYTES_MAX, "{bytes}");
    }

    #[test]
    fn a_packet_reaches_foca_without_anything_that_it_would_have_to_believe() {
        let header = Header { src: id("a", 1), src_incarnation: 0, dst: id("b", 1), message: Message::Gossip };
        let mut swim = Vec::new();
        WireCodec.encode_header(&header, &mut swim).unwrap();
        let head = swim.clone();
        swim.put_u16(9);
        let item =
            Broadcast::IHave { node: "y".parse().unwrap(), generation: Generation::default(), version: 3, hash: 1 };
        let envelope = Envelope { set_hash: Some(7), suspected: Some(2), call: None };
        let mut bytes = wrap(&envelope, &swim).unwrap();
        assert!(append(&mut bytes, &item));

        let seen = inspect(&bytes, |_| false).unwrap();
        assert_eq!((seen.set_hash, seen.suspected, &seen.src), (Some(7), Some(2), &header.src));
        assert_eq!(seen.broadcasts, [item]);
        let Body::Swim { packet, kind: Kind::Other } = seen.body else { panic!("{:?}", seen.body) };
        assert_eq!(packet, [head, vec![0, 0]].concat());
    }

    #[test]
    fn a_call_carries_broadcasts_and_nothing_else() {
        let call = CallPacket { src: id("a", 1), src_incarnation: 3, dst: Life::default(), call: Call::Check(5) };
        let mut bytes = wire::encode(&Envelope { call: Some(call), ..Envelope::default() }).unwrap();
        assert_eq!(inspect(&bytes, |_| false).unwrap().body, Body::Call(Call::Check(5)));
        let item =
            Broadcast::IHave { node: "y".parse().unwrap(), generation: Generation::default(), version: 3, hash: 1 };
        assert!(append(&mut bytes, &item));
        assert_eq!(inspect(&bytes, |_| false).unwrap().broadcasts, [item]);
        bytes.push(0);
        assert!(inspect(&bytes, |_| false).is_err());
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _unused = inspect(&bytes, |_| false);
        }

        #[test]
        fn a_damaged_packet_never_panics(at in 0usize..200, value in any::<u8>(), length in 0usize..220) {
            let header = Header { src: id("a", 1), src_incarnation: 0, dst: id("b", 1), message: Message::Feed };
            let mut swim = Vec::new();
            WireCodec.encode_header(&header, &mut swim).unwrap();
            swim.put_u16(1);
            let mut bytes = wrap(&Envelope { set_hash: Some(1), ..Envelope::default() }, &swim).unwrap();
            let (node, generation) = ("y".parse().unwrap(), Generation::default());
            append(&mut bytes, &Broadcast::IHave { node, generation, version: 3, hash: 1 });
            if let Some(byte) = bytes.get_mut(at) { *byte = value; }
            bytes.truncate(length);
            let _unused = inspect(&bytes, |_| false);
        }
    }
}

//! Requests in, answers out: the header's rules, EDNS, and what fits.
//!
//! ```text
//!   bytes -> decode -> Ask(Request) | Refuse(bytes) | Ignore          Answers -> encode -> bytes of at most `limit`
//! ```
//!
//! Invariants: nothing is said to what is no query (no two servers answer each other for ever); an answer repeats the
//! question as it was written (the case of its letters is a nonce to some resolvers) and is never longer than the asker takes.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};

/// Bytes of a header (RFC 1035 §4.1.1).
const HEADER_BYTES: usize = 12;
/// Longest answer over UDP to whoever does not speak EDNS (RFC 1035 §4.2.1).
pub(super) const UDP_BYTES_PLAIN: u16 = 512;
/// Longest answer over UDP to another host: fits any path without fragments (DNS flag day 2020).
pub(super) const UDP_BYTES_MAX: u16 = 1232;
/// Longest answer over UDP to this host, whose loopback has no such bound.
pub(super) const UDP_BYTES_LOCAL_MAX: u16 = 4096;
/// Longest message over TCP: its length has two bytes.
pub(super) const TCP_BYTES_MAX: u16 = u16::MAX;

/// How a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// By UDP, from this host.
    UdpLocal,
    /// By UDP, from elsewhere.
    Udp,
    /// By TCP.
    Tcp,
}

impl Via {
    /// Returns the word for metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::UdpLocal | Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// A well-formed question.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) id: u16,
    pub(super) query: Query,
    pub(super) recursion_desired: bool,
    pub(super) checking_disabled: bool,
    /// What the asker takes by UDP, and whether it asks for DNSSEC; none: it does not speak EDNS.
    pub(super) edns: Option<Asker>,
    pub(super) via: Via,
}

/// What EDNS says of the asker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    pub(super) max_payload: u16,
    pub(super) dnssec_ok: bool,
}

impl Request {
    /// Returns the longest answer that may be sent, in bytes.
    pub(super) fn limit(&self) -> u16 {
        let most = match self.via {
            Via::Tcp => return TCP_BYTES_MAX,
            Via::Udp => UDP_BYTES_MAX,
            Via::UdpLocal => UDP_BYTES_LOCAL_MAX,
        };
        self.edns.map_or(UDP_BYTES_PLAIN, |asker| asker.max_payload.clamp(UDP_BYTES_PLAIN, most))
    }

    /// Tells whether the asker takes the 512 bytes of old alone.
    pub(super) fn is_plain_udp(&self) -> bool {
        self.edns.is_none() && self.via != Via::Tcp
    }

    fn answer(&self, code: ResponseCode) -> Message {
        let mut message = Message::new(self.id, MessageType::Response, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.checking_disabled = self.checking_disabled;
        message.metadata.response_code = code;
        message.queries.push(self.query.clone());
        if let Some(asker) = self.edns {
            message.edns = Some(edns(asker.dnssec_ok, self.via));
        }
        message
    }
}

fn edns(dnssec_ok: bool, via: Via) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(if via == Via::UdpLocal { UDP_BYTES_LOCAL_MAX } else { UDP_BYTES_MAX });
    edns.set_dnssec_ok(dnssec_ok);
    edns
}

/// What bytes turned out to be.
#[derive(Debug)]
pub(super) enum Decoded {
    /// A question.
    Ask(Request),
    /// No question that can be answered: these bytes say why.
    Refuse(ResponseCode, Vec<u8>),
    /// No query at all: nobody is answered.
    Ignore,
}

/// Reads what came.
pub(super) fn decode(bytes: &[u8], via: Via) -> Decoded {
    let [id_high, id_low, flags, _, questions, questions_low, ..] = *bytes else { return Decoded::Ignore };
    if bytes.len() < HEADER_BYTES || flags & 0x80 != 0 {
        return Decoded::Ignore;
    }
    let id = u16::from_be_bytes([id_high, id_low]);
    let op_code = OpCode::from_u8((flags >> 3) & 0x0f);
    let refuse = |code| {
        let mut message = Message::error_msg(id, op_code, code);
        message.metadata.recursion_desired = flags & 1 != 0;
        message.to_vec().map_or(Decoded::Ignore, |bytes| Decoded::Refuse(code, bytes))
    };
    if op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    // Looked at first: the decoder makes room for as many as the header claims.
    if u16::from_be_bytes([questions, questions_low]) != 1 {
        return refuse(ResponseCode::FormErr);
    }
    let Ok(message) = Message::read(&mut BinDecoder::new(bytes)) else { return refuse(ResponseCode::FormErr) };
    let Some(query) = message.queries.first() else { return refuse(ResponseCode::FormErr) };
    let request = Request {
        id,
        query: query.clone(),
        recursion_desired: message.metadata.recursion_desired,
        checking_disabled: message.metadata.checking_disabled,
        edns: message
            .edns
            .as_ref()
            .map(|edns| Asker { max_payload: edns.max_payload(), dnssec_ok: edns.flags().dnssec_ok }),
        via,
    };
    let is_version_known = message.edns.as_ref().is_none_or(|edns| edns.version() == 0);
    let is_transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    let code = match query.query_class() {
        _ if !is_version_known => ResponseCode::BADVERS,
        DNSClass::IN | DNSClass::ANY if !is_transfer => return Decoded::Ask(request),
        _ => ResponseCode::Refused,
    };
    Decoded::Refuse(code, fit(request.answer(code), request.limit()))
}

/// What is said to a question.
#[derive(Debug, Clone)]
pub(super) struct Answers {
    pub(super) code: ResponseCode,
    pub(super) records: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    /// Whether records were left out that the asker should come back for by TCP.
    pub(super) is_cut: bool,
}

impl Answers {
    /// Says `code` and nothing else.
    pub(super) fn code(code: ResponseCode) -> Self {
        Self { code, records: Vec::new(), authorities: Vec::new(), additionals: Vec::new(), is_cut: false }
    }
}

/// Whether names outside of the agent's domains are answered, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recursion {
    Available,
    None,
}

/// Writes an answer of weft's own.
pub(super) fn encode(request: &Request, answers: Answers, recursion: Recursion) -> Vec<u8> {
    let mut message = request.answer(answers.code);
    message.metadata.authoritative = answers.code != ResponseCode::Refused;
    message.metadata.recursion_available = recursion == Recursion::Available;
    message.metadata.truncation = answers.is_cut;
    message.answers = answers.records;
    message.authorities = answers.authorities;
    message.additionals = answers.additionals;
    fit(message, request.limit())
}

/// Writes an answer that says nothing but `code`.
pub(super) fn encode_code(request: &Request, code: ResponseCode, recursion: Recursion) -> Vec<u8> {
    let mut message = request.answer(code);
    message.metadata.recursion_available = recursion == Recursion::Available;
    fit(message, request.limit())
}

/// Writes an answer that says nothing but: ask again by TCP.
pub(super) fn encode_cut(request: &Request) -> Vec<u8> {
    let mut message = request.answer(ResponseCode::NoError);
    message.metadata.truncation = true;
    fit(message, request.limit())
}

/// Writes `found`, the message of another server, as the answer to `request`; its records are `age_s` seconds old.
pub(super) fn encode_found(request: &Request, found: &Message, age_s: u32) -> Vec<u8> {
    let mut message = request.answer(found.metadata.response_code);
    message.metadata.recursion_available = true;
    message.metadata.truncation = found.metadata.truncation;
    message.metadata.authentic_data = found.metadata.authentic_data;
    let aged = |record: &Record| {
        let mut record = record.clone();
        // The owner's letters are written as this asker wrote them.
        if record.name == request.query.name {
            record.name = request.query.name.clone();
        }
        record.ttl = record.ttl.saturating_sub(age_s);
        record
    };
    message.answers = found.answers.iter().map(aged).collect();
    message.authorities = found.authorities.iter().map(aged).collect();
    message.additionals = found.additionals.iter().map(aged).collect();
    fit(message, request.limit())
}

/// Encodes `message` in at most `limit` bytes: additional records go first, then answers, which is told by TC (RFC 2181 §9).
fn fit(mut message: Message, limit: u16) -> Vec<u8> {
    let limit = usize::from(limit);
    loop {
        // More than 64 KiB comes out cut, and says so.
        let Ok(bytes) = message.to_vec() else { return Vec::new() };
        let was_cut = bytes.get(2).is_some_and(|flags| flags & 2 != 0) && !message.metadata.truncation;
        if bytes.len() <= limit && !was_cut {
            return bytes;
        }
        // What is there beside the records makes this an upper bound of how many fit; it falls with each turn.
        let fewer = |count: usize| (count * limit / bytes.len().max(1)).min(count.saturating_sub(1));
        if !message.additionals.is_empty() {
            message.additionals.truncate(fewer(message.additionals.len()));
        } else if !message.answers.is_empty() {
            message.metadata.truncation = true;
            message.answers.truncate(fewer(message.answers.len()));
        } else if !message.authorities.is_empty() {
            message.metadata.truncation = true;
            message.authorities.clear();
        } else {
            return bytes;
        }
    }
}

/// Reads what a recursor sent.
pub(super) fn decode_found(bytes: &[u8]) -> Option<Message> {
    let [_, _, flags, _, 0, 1, ..] = *bytes else { return None };
    if bytes.len() < HEADER_BYTES || flags & 0x80 == 0 {
        return None;
    }
    Message::read(&mut BinDecoder::new(bytes)).ok()
}

/// Writes the question of `request` for a recursor, under `id`.
pub(super) fn encode_ask(request: &Request, id: u16) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = request.checking_disabled;
    message.queries.push(request.query.clone());
    message.edns = Some(edns(request.edns.is_some_and(|asker| asker.dnssec_ok), Via::Udp));
    message.to_vec().ok()
}

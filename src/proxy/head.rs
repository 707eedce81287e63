//! The framing of one HTTP exchange on one QUIC stream: heads, body frames, trailers. A pure codec.
//!
//! ```text
//!   request:   u16 length | payload | method | authority | path | count | headers      then body frames
//!   response:  u16 length | payload | u16 status | count | headers                            then body frames
//!   header:    name code, or 0 + text | value            text: varint length + bytes
//!   body:      varint n > 0 | n bytes   ...   [ 0 | u16 length | count | trailers ]           then the stream's FIN
//! ```
//!
//! Integers: varints as in RFC 9000 §16, others big-endian. A stream that ends inside a frame, or is reset, is an abort.
//! Invariants: a head has at most [`HEAD_BYTES_MAX`] bytes and [`HEADERS_MAX`] headers; decoding allocates nothing
//! beyond that, shares the received buffers, and never yields a header that frames a message (`transfer-encoding`,
//! `connection`, `host`, a second `content-length`): a peer cannot smuggle through us.
//! Not here: which headers are forwarded (`http::headers`), any I/O.

mod names;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use http::{Method, StatusCode};
use http_body::Frame;

use self::names::{METHODS, code_of, is_framing, name_of};

/// Longest head or trailer block, in bytes: what nginx and Envoy accept by default, and within the u16 length.
pub(crate) const HEAD_BYTES_MAX: usize = 60 * 1024;
/// Most headers in a head: 100 of the message, which is hyper's and Envoy's default, and room for those that weft adds.
pub(crate) const HEADERS_MAX: usize = 106;
/// Room for headers that a request's decoded head has at least. What is added to a request fits, and so does the answer's head, for
/// which hyper uses the same map: a map that grows is allocated and filled again, twice at an app with small requests.
const HEADERS_ROOM: usize = 12;

/// Why a head or frame cannot be encoded or decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    /// More bytes than [`HEAD_BYTES_MAX`].
    #[error("the head is longer than {HEAD_BYTES_MAX} bytes")]
    TooLarge,
    /// More headers than [`HEADERS_MAX`].
    #[error("the head has more than {HEADERS_MAX} headers")]
    TooManyHeaders,
    /// The peer breaks the framing.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

/// What follows a head on the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Nothing: FIN.
    Empty,
    /// Body frames.
    Frames,
    /// On a request: it asks for an upgrade. On a 101 response: raw bytes both ways.
    Upgrade,
}

impl Payload {
    fn code(self) -> u8 {
        match self {
            Self::Empty => 0,
            Self::Frames => 1,
            Self::Upgrade => 2,
        }
    }

    fn from_code(code: u8) -> Result<Self, HeadError> {
        match code {
            0 => Ok(Self::Empty),
            1 => Ok(Self::Frames),
            2 => Ok(Self::Upgrade),
            _ => Err(HeadError::Malformed("payload kind")),
        }
    }
}

/// A decoded request head.
#[derive(Debug)]
pub(crate) struct RequestHead {
    /// What follows.
    pub(crate) payload: Payload,
    /// The method.
    pub(crate) method: Method,
    /// The caller's Host or `:authority`; none: HTTP/1.0 without Host.
    pub(crate) authority: Option<Authority>,
    /// The same, as it came: the app's Host is made of it without a copy.
    pub(crate) host: Bytes,
    /// Path and query.
    pub(crate) path: PathAndQuery,
    /// The headers, without `host`.
    pub(crate) headers: HeaderMap,
}

/// A decoded response head.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    /// What follows.
    pub(crate) payload: Payload,
    /// The status.
    pub(crate) status: StatusCode,
    /// The headers.
    pub(crate) headers: HeaderMap,
}

/// Writes one head into a buffer.
///
/// Nothing stays in the buffer if [`HeadWriter::finish`] fails.
#[must_use = "a head is complete only after `finish`"]
pub(crate) struct HeadWriter<'a> {
    out: &'a mut BytesMut,
    start: usize,
    count_at: usize,
    count: usize,
}

impl<'a> HeadWriter<'a> {
    /// Begins a request head.
    pub(crate) fn request(out: &'a mut BytesMut, payload: Payload, method: &Method, target: (&[u8], &[u8])) -> Self {
        let start = Self::begin(out, payload);
        let code = (1_u8..).zip(&METHODS).find(|(_, known)| *known == method).map_or(0, |(code, _)| code);
        out.put_u8(code);
        if code == 0 {
            put_text(out, method.as_str().as_bytes());
        }
        let (authority, path) = target;
        put_text(out, authority);
        put_text(out, path);
        Self::headers(out, start)
    }

    /// Begins a response head.
    pub(crate) fn response(out: &'a mut BytesMut, payload: Payload, status: StatusCode) -> Self {
        let start = Self::begin(out, payload);
        out.put_u16(status.as_u16());
        Self::headers(out, start)
    }

    /// Begins a block of trailers, with the zero that tells it from data.
    pub(crate) fn trailers(out: &'a mut BytesMut) -> Self {
        out.put_u8(0);
        let start = out.len();
        out.put_u16(0);
        Self::headers(out, start)
    }

    fn begin(out: &mut BytesMut, payload: Payload) -> usize {
        let start = out.len();
        out.put_u16(0);
        out.put_u8(payload.code());
        start
    }

    fn headers(out: &'a mut BytesMut, start: usize) -> Self {
        let count_at = out.len();
        out.put_u8(0);
        Self { out, start, count_at, count: 0 }
    }

    /// Adds a header. Framing headers are left out.
    pub(crate) fn header(&mut self, name: &HeaderName, value: &[u8]) {
        match code_of(name) {
            Some(code) => self.out.put_u8(code),
            None if is_framing(name.as_str()) => return,
            None => {
                self.out.put_u8(0);
                put_text(self.out, name.as_str().as_bytes());
            }
        }
        put_text(self.out, value);
        self.count = self.count.saturating_add(1);
    }

    /// Ends the head.
    ///
    /// # Errors
    /// If the head breaks a bound; the buffer is as it was before.
    pub(crate) fn finish(self) -> Result<(), HeadError> {
        let Self { out, start, count_at, count } = self;
        let bytes = out.len().saturating_sub(start).saturating_sub(2);
        let error = match (u8::try_from(count), u16::try_from(bytes)) {
            _ if count > HEADERS_MAX => HeadError::TooManyHeaders,
            (Ok(count), Ok(length)) if bytes <= HEAD_BYTES_MAX => {
                if let Some(slot) = out.get_mut(count_at) {
                    *slot = count;
                }
                if let Some(slot) = out.get_mut(start..start.saturating_add(2)) {
                    slot.copy_from_slice(&length.to_be_bytes());
                }
                return Ok(());
            }
            _ => HeadError::TooLarge,
        };
        out.truncate(start);
        Err(error)
    }
}

/// Writes the header of a data frame of `bytes` bytes, which must not be 0.
pub(crate) fn put_data_header(out: &mut BytesMut, bytes: usize) {
    put_varint(out, bytes as u64);
}

fn put_text(out: &mut BytesMut, text: &[u8]) {
    put_varint(out, text.len() as u64);
    out.put_slice(text);
}

/// Writes a varint (RFC 9000 §16). Values above 2^62-1 cannot arise: they count bytes in memory, or streams.
pub(super) fn put_varint(out: &mut BytesMut, value: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "each arm's range fits its width")]
    match value {
        0..=0x3f => out.put_u8(value as u8),
        0x40..=0x3fff => out.put_u16(value as u16 | 0x4000),
        0x4000..=0x3fff_ffff => out.put_u32(value as u32 | 0x8000_0000),
        _ => out.put_u64(value | 0xc000_0000_0000_0000),
    }
}

/// Reads a varint; none: more bytes are needed, and `bytes` stands where it stood.
pub(super) fn take_varint(bytes: &mut Bytes) -> Option<u64> {
    let (value, rest) = split_varint(bytes)?;
    let used = bytes.len() - rest.len();
    bytes.advance(used);
    Some(value)
}

/// Returns the varint that `bytes` begin with, and what follows it.
fn split_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = 1_usize << (bytes.first()? >> 6);
    let (number, rest) = bytes.split_at_checked(length)?;
    let value = number.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    // Without the two bits that say how long it is.
    Some((value & (u64::MAX >> (66 - 8 * length)), rest))
}

/// Reads a head's block from its front. What it shares keeps the block's memory alive, and costs none.
struct Reader<'a> {
    block: &'a Bytes,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(block: &'a Bytes) -> Self {
        Self { block, rest: block }
    }

    fn byte(&mut self) -> Result<u8, HeadError> {
        let (first, rest) = self.rest.split_first().ok_or(HeadError::Malformed("head: it ends early"))?;
        self.rest = rest;
        Ok(*first)
    }

    fn text(&mut self) -> Result<&'a [u8], HeadError> {
        let split = split_varint(self.rest).and_then(|(length, rest)| {
            let length = usize::try_from(length).ok()?;
            rest.split_at_checked(length)
        });
        let (text, rest) = split.ok_or(HeadError::Malformed("head: a text is longer than the head"))?;
        self.rest = rest;
        Ok(text)
    }

    fn shared_text(&mut self) -> Result<Bytes, HeadError> {
        self.text().map(|text| self.block.slice_ref(text))
    }

    /// Reads `count | headers` up to the end of the block, into a map with room for so many.
    fn headers(mut self, room: usize) -> Result<HeaderMap, HeadError> {
        let count = usize::from(self.byte()?);
        if count > HEADERS_MAX {
            return Err(HeadError::TooManyHeaders);
        }
        let mut headers = HeaderMap::with_capacity(count.max(room));
        for _ in 0..count {
            let name = match self.byte()? {
                0 => {
                    let name = HeaderName::from_bytes(self.text()?).map_err(|_| HeadError::Malformed("header name"))?;
                    if is_framing(name.as_str()) {
                        return Err(HeadError::Malformed("head: a framing header"));
                    }
                    name
                }
                code => name_of(code).ok_or(HeadError::Malformed("header code"))?.clone(),
            };
            let value = self.shared_text()?;
            let value = HeaderValue::from_maybe_shared(value).map_err(|_| HeadError::Malformed("header value"))?;
            if name == header::CONTENT_LENGTH && (headers.contains_key(&name) || !is_length(value.as_bytes())) {
                return Err(HeadError::Malformed("content-length"));
            }
            headers.append(name, value);
        }
        if self.rest.is_empty() { Ok(headers) } else { Err(HeadError::Malformed("head: bytes after its end")) }
    }
}

/// Tells whether a content length is plain digits within u64 (RFC 9112 §6.2).
fn is_length(value: &[u8]) -> bool {
    (1..=19).contains(&value.len()) && value.iter().all(u8::is_ascii_digit)
}

/// Received bytes that are not decoded yet. Holds a chunk without copying; joins chunks only where a head spans them.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Bytes,
    spill: BytesMut,
    /// Bytes that the block under way needs before it is looked at again: trickled input costs no repeated copy.
    need: usize,
}

impl Inbox {
    /// Returns another that shares its bytes; none: they are more than `bytes_max`.
    pub(crate) fn copy(&mut self, bytes_max: usize) -> Option<Self> {
        self.settle();
        (self.bytes.len() <= bytes_max).then(|| Self { bytes: self.bytes.clone(), ..Self::default() })
    }

    /// Adds received bytes.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        if self.is_empty() {
            self.bytes = chunk;
            return;
        }
        if self.spill.is_empty() {
            self.spill.reserve(self.need.max(self.bytes.len().saturating_add(chunk.len())));
            self.spill.extend_from_slice(&std::mem::take(&mut self.bytes));
        }
        self.spill.extend_from_slice(&chunk);
    }

    /// Returns how many bytes wait to be decoded.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.spill.len()
    }

    /// Tells whether nothing waits to be decoded.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.spill.is_empty()
    }

    /// Takes everything: after an upgrade, bytes are raw.
    pub(crate) fn take(&mut self) -> Bytes {
        self.settle();
        std::mem::take(&mut self.bytes)
    }

    /// Takes one byte, if there is one.
    pub(crate) fn take_u8(&mut self) -> Option<u8> {
        self.settle();
        self.bytes.try_get_u8().ok()
    }

    /// Takes a whole head, undecoded, so that it can be decoded again for a second attempt.
    pub(crate) fn take_block(&mut self) -> Result<Option<Bytes>, HeadError> {
        if self.bytes.len().max(self.spill.len()) < self.need.max(2) {
            return Ok(None);
        }
        self.settle();
        let length = usize::from(self.bytes.first_chunk().map_or(0, |length| u16::from_be_bytes(*length)));
        if length > HEAD_BYTES_MAX {
            return Err(HeadError::TooLarge);
        }
        let need = length.saturating_add(2);
        if self.bytes.len() < need {
            self.need = need;
            return Ok(None);
        }
        self.need = 0;
        self.bytes.advance(2);
        Ok(Some(self.bytes.split_to(length)))
    }

    /// Decodes a response head; none: more bytes are needed.
    pub(crate) fn take_response(&mut self) -> Result<Option<ResponseHead>, HeadError> {
        let Some(block) = self.take_block()? else { return Ok(None) };
        let mut reader = Reader::new(&block);
        let payload = Payload::from_code(reader.byte()?)?;
        let status = u16::from_be_bytes([reader.byte()?, reader.byte()?]);
        let status = StatusCode::from_u16(status).map_err(|_| HeadError::Malformed("status"))?;
        let headers = reader.headers(0)?;
        Ok(Some(ResponseHead { payload, status, headers }))
    }

    /// Moves joined bytes to where they are decoded from.
    fn settle(&mut self) {
        if !self.spill.is_empty() {
            self.bytes = self.spill.split().freeze();
        }
    }
}

/// Decodes a block that [`Inbox::take_block`] gave.
pub(crate) fn decode_request(block: &Bytes) -> Result<RequestHead, HeadError> {
    let mut reader = Reader::new(block);
    let payload = Payload::from_code(reader.byte()?)?;
    let method = match usize::from(reader.byte()?).checked_sub(1) {
        None => Method::from_bytes(reader.text()?).map_err(|_| HeadError::Malformed("method"))?,
        Some(index) => METHODS.get(index).cloned().ok_or(HeadError::Malformed("method code"))?,
    };
    let host = reader.shared_text()?;
    let authority = if host.is_empty() {
        None
    } else {
        Some(Authority::from_maybe_shared(host.clone()).map_err(|_| HeadError::Malformed("authority"))?)
    };
    let path = reader.shared_text()?;
    let path = PathAndQuery::from_maybe_shared(path).map_err(|_| HeadError::Malformed("path"))?;
    let headers = reader.headers(HEADERS_ROOM)?;
    // An app would wait for the promised bytes and take the next request of its connection for them.
    if payload != Payload::Frames && headers.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0") {
        return Err(HeadError::Malformed("content-length without a body"));
    }
    Ok(RequestHead { payload, method, authority, host, path, headers })
}

/// Decodes body frames as their bytes arrive.
#[derive(Debug, Default)]
pub(crate) struct BodyDecoder {
    /// Bytes of the data frame under way that are still to come.
    remaining: u64,
    state: BodyState,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum BodyState {
    #[default]
    Data,
    Trailers,
    Ended,
}

impl BodyDecoder {
    /// Returns the next piece; none: more bytes are needed. Data frames are passed on in pieces as they arrive.
    pub(crate) fn next(&mut self, inbox: &mut Inbox) -> Result<Option<Frame<Bytes>>, HeadError> {
        loop {
            match self.state {
                BodyState::Trailers => {
                    let Some(block) = inbox.take_block()? else { return Ok(None) };
                    self.state = BodyState::Ended;
                    return Reader::new(&block).headers(0).map(Frame::trailers).map(Some);
                }
                BodyState::Ended if inbox.is_empty() => return Ok(None),
                BodyState::Ended => return Err(HeadError::Malformed("body: bytes after the trailers")),
                BodyState::Data => {}
            }
            inbox.settle();
            if self.remaining == 0 {
                match take_varint(&mut inbox.bytes) {
                    None => return Ok(None),
                    Some(0) => self.state = BodyState::Trailers,
                    Some(bytes) => self.remaining = bytes,
                }
                continue;
            }
            let ready = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(inbox.bytes.len());
            if ready == 0 {
                return Ok(None);
            }
            self.remaining = self.remaining.saturating_sub(ready as u64);
            return Ok(Some(Frame::data(inbox.bytes.split_to(ready))));
        }
    }

    /// Tells whether the stream may end here.
    pub(crate) fn may_end(&self, inbox: &Inbox) -> bool {
        self.remaining == 0 && self.state != BodyState::Trailers && inbox.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(headers: &[(&str, &str)]) -> Result<Bytes, HeadError> {
        request_with(Payload::Frames, headers)
    }

    fn request_with(payload: Payload, headers: &[(&str, &str)]) -> Result<Bytes, HeadError> {
        let mut out = BytesMut::new();
        let target = (&b"web:80"[..], &b"/a?b=c"[..]);
        let mut writer = HeadWriter::request(&mut out, payload, &Method::POST, target);
        for (name, value) in headers {
            writer.header(&HeaderName::try_from(*name).unwrap(), value.as_bytes());
        }
        writer.finish()?;
        Ok(out.freeze())
    }

    fn decode(bytes: Bytes) -> Result<Option<RequestHead>, HeadError> {
        let mut inbox = Inbox::default();
        inbox.push(bytes);
        take_request(&mut inbox)
    }

    fn take_request(inbox: &mut Inbox) -> Result<Option<RequestHead>, HeadError> {
        inbox.take_block()?.map(|block| decode_request(&block)).transpose()
    }

    #[test]
    fn a_decoded_head_has_room_for_what_is_added_and_nothing_of_it_is_a_copy() {
        let wire = request(&[("accept", "*/*")]).unwrap();
        let head = decode(wire.clone()).unwrap().unwrap();
        assert!(head.headers.capacity() >= HEADERS_ROOM, "{}", head.headers.capacity());
        assert_eq!(head.host, head.authority.unwrap().as_str());
        for part in [&head.host[..], head.headers["accept"].as_bytes()] {
            assert!(wire.as_ptr_range().contains(&part.as_ptr()), "{}", part.escape_ascii());
        }
    }

    #[test]
    fn the_wire_format_stands() {
        let wire = request(&[("accept", "*/*"), ("content-length", "5"), ("x-own", "1")]).unwrap();
        let mut expected = vec![0, 36, 1, 2, 6];
        expected.extend_from_slice(b"web:80\x06/a?b=c\x03\x01\x03*/*\x16\x015\x00\x05x-own\x011");
        expected[1] = u8::try_from(expected.len() - 2).unwrap();
        assert_eq!(wire, expected);

        let mut out = BytesMut::new();
        let mut writer = HeadWriter::response(&mut out, Payload::Empty, StatusCode::NOT_FOUND);
        writer.header(&header::SEC_WEBSOCKET_VERSION, b"13");
        writer.finish().unwrap();
        put_data_header(&mut out, 300);
        let mut writer = HeadWriter::trailers(&mut out);
        writer.header(&HeaderName::from_static("grpc-status"), b"0");
        writer.finish().unwrap();
        assert_eq!(&out[..], b"\x00\x08\x00\x01\x94\x01\x41\x0213\x41\x2c\x00\x00\x04\x01\x4a\x010");
    }

    #[test]
    fn bounds_hold_when_writing_and_leave_nothing_behind() {
        let long = "x".repeat(HEAD_BYTES_MAX);
        assert_eq!(request(&[("a", &long)]).unwrap_err(), HeadError::TooLarge);
        assert_eq!(request(&vec![("a", "b"); HEADERS_MAX + 1]).unwrap_err(), HeadError::TooManyHeaders);
        assert!(request(&vec![("a", "b"); HEADERS_MAX]).is_ok());
        let mut out = BytesMut::from(&b"kept"[..]);
        let mut writer = HeadWriter::response(&mut out, Payload::Empty, StatusCode::OK);
        writer.header(&header::ACCEPT, long.as_bytes());
        writer.finish().unwrap_err();
        assert_eq!(&out[..], b"kept");
    }

    #[test]
    fn a_peer_cannot_frame_a_message_by_a_header() {
        for name in ["transfer-encoding", "connection", "host", "keep-alive", "Transfer-Encoding"] {
            let mut block = BytesMut::new();
            block.put_slice(&[1, 0]);
            put_text(&mut block, name.as_bytes());
            put_text(&mut block, b"chunked");
            assert!(matches!(Reader::new(&block.freeze()).headers(0), Err(HeadError::Malformed(_))), "{name}");
        }
        for lengths in [&["5", "5"][..], &["5,5"], &["-1"], &["+5"], &[""], &["99999999999999999999"]] {
            let headers: Vec<_> = lengths.iter().map(|length| ("content-length", *length)).collect();
            assert_eq!(decode(request(&headers).unwrap()).unwrap_err(), HeadError::Malformed("content-length"));
        }
    }

    #[test]
    fn a_request_without_a_body_promises_no_bytes() {
        for payload in [Payload::Empty, Payload::Upgrade] {
            let promise = decode(request_with(payload, &[("content-length", "5")]).unwrap());
            assert_eq!(promise.unwrap_err(), HeadError::Malformed("content-length without a body"), "{payload:?}");
            assert!(decode(request_with(payload, &[("content-length", "0")]).unwrap()).unwrap().is_some());
        }
        assert!(decode(request_with(Payload::Frames, &[("content-length", "5")]).unwrap()).unwrap().is_some());
    }

    #[test]
    fn a_body_may_end_only_between_frames() {
        let mut out = BytesMut::new();
        put_data_header(&mut out, 3);
        out.put_slice(b"abc");
        let mut writer = HeadWriter::trailers(&mut out);
        writer.header(&header::ETAG, b"x");
        writer.finish().unwrap();
        let wire = out.freeze();
        for cut in 0..=wire.len() {
            let (mut inbox, mut decoder) = (Inbox::default(), BodyDecoder::default());
            inbox.push(wire.slice(..cut));
            while decoder.next(&mut inbox).unwrap().is_some() {}
            assert_eq!(decoder.may_end(&inbox), [0, 4, wire.len()].contains(&cut), "{cut}");
        }
    }

    fn arbitrary_headers() -> impl Strategy<Value = Vec<(String, String)>> {
        let name = prop_oneof![Just("accept".to_owned()), Just("grpc-status".to_owned()), "x-[a-z]{1,30}"];
        proptest::collection::vec((name, "[ -~]{0,200}"), 0..40)
    }

    proptest! {
        #[test]
        fn a_head_survives_the_wire_and_any_truncation_is_incomplete(
            headers in arbitrary_headers(), cut in 0.0..1.0_f64,
        ) {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let wire = request(&headers).unwrap();
            let head = decode(wire.clone()).unwrap().unwrap();
            prop_assert_eq!(head.payload, Payload::Frames);
            prop_assert_eq!(head.method, Method::POST);
            prop_assert_eq!(head.authority.as_ref().map(Authority::as_str), Some("web:80"));
            prop_assert_eq!(head.path.as_str(), "/a?b=c");
            let mut expected = HeaderMap::new();
            for (name, value) in headers {
                expected.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
            }
            prop_assert_eq!(head.headers, expected);

            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an index")]
            let cut = (wire.len() as f64 * cut) as usize;
            let mut inbox = Inbox::default();
            inbox.push(wire.slice(..cut));
            prop_assert!(take_request(&mut inbox).unwrap().is_none());
            inbox.push(wire.slice(cut..));
            prop_assert!(take_request(&mut inbox).unwrap().is_some());
            prop_assert!(inbox.is_empty());
        }

        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut inbox = Inbox::default();
            inbox.push(Bytes::from(bytes.clone()));
            let _unused = take_request(&mut inbox);
            let mut inbox = Inbox::default();
            inbox.push(Bytes::from(bytes.clone()));
            let _unused = inbox.take_response();
            let _unused = decode_request(&Bytes::from(bytes.clone()));
            let (mut inbox, mut decoder) = (Inbox::default(), BodyDecoder::default());
            inbox.push(Bytes::from(bytes));
            while let Ok(Some(_)) = decoder.next(&mut inbox) {}
        }

        #[test]
        fn a_body_arrives_whole_however_it_is_cut(data in proptest::collection::vec(1..300_usize, 0..8), step in 1..64_usize) {
            let mut out = BytesMut::new();
            let mut sent = Vec::new();
            for (index, bytes) in data.iter().enumerate() {
                put_data_header(&mut out, *bytes);
                let piece = vec![u8::try_from(index).unwrap(); *bytes];
                out.put_slice(&piece);
                sent.extend(piece);
            }
            let mut writer = HeadWriter::trailers(&mut out);
            writer.header(&header::ETAG, b"end");
            writer.finish().unwrap();
            let (mut inbox, mut decoder) = (Inbox::default(), BodyDecoder::default());
            let (mut got, mut trailers) = (Vec::new(), None);
            for chunk in out.chunks(step) {
                inbox.push(Bytes::copy_from_slice(chunk));
                while let Some(frame) = decoder.next(&mut inbox).unwrap() {
                    match frame.into_data() {
                        Ok(data) => got.extend_from_slice(&data),
                        Err(frame) => trailers = frame.into_trailers().ok(),
                    }
                }
            }
            prop_assert_eq!(got, sent);
            prop_assert_eq!(&trailers.unwrap()["etag"], "end");
            prop_assert!(decoder.may_end(&inbox));
        }
    }
}

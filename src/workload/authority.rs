//! Makes requests of gRPC clients readable for a strict HTTP/2 server.
//!
//! Over a unix socket many clients (gRPC's C core and with it Python, C++ and Ruby; Java) send the socket's path as `:authority`.
//! That is no authority (RFC 9113 §8.3.1), and hyper resets such a stream. There is nothing behind it to tell apart here: the
//! value is replaced, byte for byte, by one of the same length, before hyper reads it.
//!
//! ```text
//!   preface | frame | frame ...      HEADERS, whole: fields are walked, the value of a bad :authority becomes "www…"
//!                                    all else: passed on as it comes
//! ```
//!
//! Invariants: the same length goes out as came in, so frames and both ends' HPACK tables stay in step without any state
//! here (a table counts lengths, RFC 7541 §4.1); what is not understood is passed on as it is, for hyper to judge; at most
//! one frame is held. Not here: values in Huffman code, which those clients do not write for short strings.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

/// `PRI * HTTP/2.0…`, which a client sends first (RFC 9113 §3.4).
const PREFACE_BYTES: usize = 24;
/// Length, type, flags, stream.
const HEAD_BYTES: usize = 9;
/// Largest frame that hyper takes, by default; a larger one is hyper's to refuse.
const FRAME_BYTES_MAX: usize = 16_384;
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// `:authority` in the static table (RFC 7541 appendix A).
const AUTHORITY_INDEX: u64 = 1;
const AUTHORITY: &[u8] = b":authority";
/// Stands in the place of each byte of a bad value: a host's name, of any length.
const STAND_IN: u8 = b'w';

/// Walks the bytes of a connection, in pieces of any size.
#[derive(Debug)]
pub(super) struct Mender {
    /// Bytes to pass on without a look: the preface, or the rest of a frame.
    skip: usize,
    held: BytesMut,
}

impl Mender {
    pub(super) fn new() -> Self {
        Self { skip: PREFACE_BYTES, held: BytesMut::new() }
    }

    /// Takes `input` and appends what can be passed on to `out`.
    pub(super) fn push(&mut self, input: &[u8], out: &mut BytesMut) {
        self.held.extend_from_slice(input);
        while !self.held.is_empty() {
            if self.skip > 0 {
                let passed = self.skip.min(self.held.len());
                out.extend_from_slice(&self.held.split_to(passed));
                self.skip -= passed;
                continue;
            }
            let Some(head) = self.held.first_chunk::<HEAD_BYTES>() else { return };
            let [a, b, c, kind, flags, ..] = *head;
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
            if kind != HEADERS || flags & END_HEADERS == 0 || length > FRAME_BYTES_MAX {
                self.skip = HEAD_BYTES + length;
                continue;
            }
            if self.held.len() < HEAD_BYTES + length {
                return;
            }
            let mut frame = self.held.split_to(HEAD_BYTES + length);
            mend(flags, frame.get_mut(HEAD_BYTES..).unwrap_or_default());
            out.extend_from_slice(&frame);
        }
    }

    /// What is held when the connection ends.
    fn rest(&mut self) -> BytesMut {
        self.held.split()
    }
}

/// Replaces the value of a bad `:authority` in the payload of a HEADERS frame.
fn mend(flags: u8, payload: &mut [u8]) {
    let padded = usize::from(flags & PADDED != 0);
    let padding = if padded == 1 { payload.first().map_or(0, |padding| usize::from(*padding)) } else { 0 };
    let from = padded + if flags & PRIORITY != 0 { 5 } else { 0 };
    let until = payload.len().saturating_sub(padding);
    let Some(fields) = payload.get_mut(from..until) else { return };
    let Some(range) = authority_value(fields) else { return };
    if let Some(value) = fields.get_mut(range)
        && http::uri::Authority::try_from(&*value).is_err()
    {
        value.fill(STAND_IN);
    }
}

/// Finds the plain value of the first `:authority` that is written out in a block of fields (RFC 7541 §6).
fn authority_value(fields: &[u8]) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    while let Some(first) = fields.get(at).copied() {
        // An indexed field, and a change of the table's size, are a number alone.
        let prefix = match first {
            0x80.. => 7,
            0x40.. => 6,
            0x20.. => 5,
            _ => 4,
        };
        let index = number(fields, &mut at, prefix)?;
        if prefix == 7 || prefix == 5 {
            continue;
        }
        let is_authority = if index == 0 {
            let (name, is_plain) = text(fields, &mut at)?;
            is_plain && fields.get(name)? == AUTHORITY
        } else {
            index == AUTHORITY_INDEX
        };
        let (value, is_plain) = text(fields, &mut at)?;
        if is_authority {
            return is_plain.then_some(value);
        }
    }
    None
}

/// Reads an integer with a prefix of `bits` (RFC 7541 §5.1); none if it does not end or is absurd.
fn number(fields: &[u8], at: &mut usize, bits: u32) -> Option<u64> {
    let full = (1_u64 << bits) - 1;
    let mut value = u64::from(*fields.get(*at)?) & full;
    *at += 1;
    if value < full {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let next = *fields.get(*at)?;
        *at += 1;
        value += u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Reads a string (RFC 7541 §5.2): where it lies, and whether it is plain.
fn text(fields: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let is_plain = fields.get(*at)? & 0x80 == 0;
    let length = usize::try_from(number(fields, at, 7)?).ok()?;
    let range = *at..at.checked_add(length)?;
    fields.get(range.clone())?;
    *at = range.end;
    Some((range, is_plain))
}

/// The reading side of a connection, mended.
#[derive(Debug)]
pub(super) struct Mended<R> {
    inner: R,
    mender: Mender,
    out: BytesMut,
}

impl<R> Mended<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, mender: Mender::new(), out: BytesMut::new() }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Mended<R> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut piece = [0; 2048];
        while this.out.is_empty() {
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                this.out = this.mender.rest();
                break;
            }
            this.mender.push(read.filled(), &mut this.out);
        }
        let passed = this.out.len().min(buf.remaining());
        buf.put_slice(this.out.get(..passed).unwrap_or_default());
        this.out.advance(passed);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A literal field: representation byte, then a name if `name` is given, then a plain value.
    fn field(first: u8, name: Option<&[u8]>, value: &[u8]) -> Vec<u8> {
        let plain = |text: &[u8]| [&[u8::try_from(text.len()).unwrap()], text].concat();
        [vec![first], name.map(plain).unwrap_or_default(), plain(value)].concat()
    }

    fn mended(bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut mender, mut out) = (Mender::new(), BytesMut::new());
        PREFACE
            .iter()
            .chain(bytes)
            .copied()
            .collect::<Vec<u8>>()
            .chunks(piece)
            .for_each(|part| mender.push(part, &mut out));
        out.extend_from_slice(&mender.rest());
        assert!(out.starts_with(PREFACE));
        out.split_off(PREFACE.len()).to_vec()
    }

    #[test]
    fn a_path_in_the_place_of_the_authority_is_replaced_in_every_form_that_clients_write() {
        let path = b"%2Frun%2Fweft%2Fw.sock";
        let other = field(0x40, Some(b"workload.spiffe.io"), b"true");
        for literal in [
            field(0x40, Some(AUTHORITY), path),
            field(0x00, Some(AUTHORITY), path),
            field(0x10, Some(AUTHORITY), path),
            field(0x41, None, path),
            field(0x01, None, path),
            field(0x11, None, path),
        ] {
            let block = [&[0x83, 0x3f, 0xe1, 0x1f][..], &other, &literal, &other].concat();
            let padding = [&[3][..], &[0, 0, 0, 0, 7], &block, &[0; 3]].concat();
            for bytes in
                [frame(HEADERS, END_HEADERS, &block), frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &padding)]
            {
                let out = mended(&bytes, 7);
                assert_eq!(out.len(), bytes.len());
                let changed: Vec<u8> =
                    out.iter().zip(&bytes).filter(|(new, old)| new != old).map(|(new, _)| *new).collect();
                // The two bytes of the path that are a `w` already.
                assert_eq!(changed, [STAND_IN].repeat(path.len() - 2));
            }
        }
    }

    #[test]
    fn a_good_authority_and_everything_else_is_passed_on_as_it_is() {
        let path = b"/run/w.sock";
        for bytes in [
            frame(HEADERS, END_HEADERS, &field(0x41, None, b"localhost:80")),
            // Another field of that value, a field in Huffman code, a block that breaks off, frames of other kinds.
            frame(HEADERS, END_HEADERS, &field(0x44, None, path)),
            frame(HEADERS, END_HEADERS, &[0x41, 0x82, 1, 2]),
            frame(HEADERS, END_HEADERS, &[0x41, 0x0b, b'/']),
            frame(HEADERS, 0, &field(0x41, None, path)),
            frame(0, 0, &field(0x41, None, path)),
        ] {
            assert_eq!(mended(&bytes, 3), bytes);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_keep_their_number(bytes in proptest::collection::vec(any::<u8>(), 0..400), piece in 1_usize..50) {
            let out = mended(&bytes, piece);
            prop_assert_eq!(out.len(), bytes.len());
            prop_assert_eq!(out, mended(&bytes, bytes.len() + 30));
        }

        #[test]
        fn any_block_of_fields_is_walked_without_a_panic(block in proptest::collection::vec(any::<u8>(), 0..200), flags in any::<u8>()) {
            let bytes = frame(HEADERS, flags | END_HEADERS, &block);
            prop_assert_eq!(mended(&bytes, 64).len(), bytes.len());
        }
    }
}

//! The first bytes of every tunnel stream.
//!
//! ```text
//!   caller -> server   version 1 | kind | len | instance id | len | service name
//!                      u8          u8     varint  UTF-8       varint  UTF-8
//!   server -> caller   status u8
//! ```
//!
//! Kind 1 is TCP: the caller waits for the status, then bytes flow both ways. Kind 2 is HTTP: the request head follows
//! the preamble at once, and the status precedes the response head. Kind 3 is a flow of UDP: the stream stands for it and
//! carries none of its datagrams (`udp`); a second status may say why it ends. A varint is LEB128 of at most two bytes.
//! Bounds: 323 bytes in all; a name that its type refuses ends the stream.

#[cfg(any(test, fuzzing))]
use bytes::BytesMut;
use bytes::{Buf, Bytes};

use crate::model::name::{ID_BYTES_MAX, NAME_BYTES_MAX};
use crate::model::{InstanceId, NameError, ServiceName};

/// The only version.
const VERSION: u8 = 1;
/// Longest preamble: two head bytes, two lengths of two bytes at most, the id and the name.
pub(crate) const PREAMBLE_BYTES_MAX: usize = 2 + 2 + ID_BYTES_MAX + 2 + NAME_BYTES_MAX;

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// A TCP connection's bytes.
    Tcp,
    /// One HTTP request.
    Http,
    /// A flow of UDP, whose datagrams come beside it.
    Udp,
}

impl StreamKind {
    /// Returns the word of the log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Udp => "udp",
        }
    }
}

/// The server's answer to a preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamStatus {
    /// The app is connected.
    Ok,
    /// The app could not be connected, or refused the request unread.
    ConnectFailed,
    /// No such instance here, or it is not of that service, or not for such streams.
    UnknownInstance,
    /// The caller may not call the service.
    Forbidden,
    /// The agent is stopping.
    Draining,
    /// There are as many flows of UDP as there may be.
    Full,
    /// More connections or flows come than the service's rate limits let through.
    Limited,
}

impl StreamStatus {
    /// Returns the byte on the wire.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::ConnectFailed => 1,
            Self::UnknownInstance => 2,
            Self::Forbidden => 3,
            Self::Draining => 4,
            Self::Full => 5,
            Self::Limited => 6,
        }
    }

    /// Reads the byte of the wire; none if it stands for nothing.
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        let unserved = [Self::ConnectFailed, Self::UnknownInstance, Self::Forbidden, Self::Draining, Self::Full];
        let known = [Self::Ok, Self::Limited].into_iter().chain(unserved);
        known.into_iter().find(|status| status.byte() == byte)
    }

    /// Tells whether another instance may do better.
    pub(crate) fn may_retry(self) -> bool {
        matches!(self, Self::ConnectFailed | Self::UnknownInstance | Self::Draining | Self::Full)
    }
}

/// Where a stream leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) kind: StreamKind,
    pub(crate) instance: InstanceId,
    pub(crate) service: ServiceName,
}

/// Why bytes are no preamble.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PreambleError {
    /// A version that this agent does not speak.
    #[error("stream preamble has version {0}; this agent speaks {VERSION}")]
    Version(u8),
    /// A kind that this agent does not know.
    #[error("stream preamble has the unknown kind {0}")]
    Kind(u8),
    /// A length beyond its bound.
    #[error("stream preamble has a name of {bytes} bytes; at most {bytes_max} are allowed")]
    TooLong {
        /// What was announced.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// A name is not UTF-8.
    #[error("stream preamble has a name that is not UTF-8")]
    Utf8,
    /// A name breaks its rules.
    #[error("stream preamble has a malformed name")]
    Name(#[source] NameError),
}

impl Preamble {
    /// Returns the bytes on the wire.
    pub(crate) fn encode(&self) -> Bytes {
        let texts = [self.instance.as_str(), self.service.as_str()];
        let bytes = texts.iter().map(|text| text.len() + if text.len() > 0x7f { 2 } else { 1 }).sum::<usize>() + 2;
        // Exactly: a vector with room to spare costs `Bytes` an allocation of its own.
        let mut out = Vec::with_capacity(bytes);
        let kind = match self.kind {
            StreamKind::Tcp => 1,
            StreamKind::Http => 2,
            StreamKind::Udp => 3,
        };
        out.extend([VERSION, kind]);
        for text in texts {
            let low = u8::try_from(text.len() & 0x7f).unwrap_or_default();
            match u8::try_from(text.len() >> 7).unwrap_or_default() {
                0 => out.push(low),
                high => out.extend([low | 0x80, high]),
            }
            out.extend(text.as_bytes());
        }
        out.into()
    }

    /// Takes a preamble off the front of `buffer`; none if more bytes must come, and then `buffer` is unchanged.
    ///
    /// `find` gives the names of an instance and its service where it has them already, which costs less than to make them.
    ///
    /// # Errors
    /// [`PreambleError`] as soon as the bytes can be no preamble.
    pub(crate) fn decode_with(
        buffer: &mut (impl Buf + AsRef<[u8]>),
        find: impl FnOnce(&str, &str) -> Option<(InstanceId, ServiceName)>,
    ) -> Result<Option<Self>, PreambleError> {
        let bytes = buffer.as_ref().len();
        let mut rest = buffer.as_ref();
        let Some(version) = take(&mut rest) else { return Ok(None) };
        if version != VERSION {
            return Err(PreambleError::Version(version));
        }
        let kind = match take(&mut rest) {
            None => return Ok(None),
            Some(1) => StreamKind::Tcp,
            Some(2) => StreamKind::Http,
            Some(3) => StreamKind::Udp,
            Some(other) => return Err(PreambleError::Kind(other)),
        };
        let Some(instance) = text(&mut rest, ID_BYTES_MAX)? else { return Ok(None) };
        let read = |text: &str| text.parse::<InstanceId>().map_err(PreambleError::Name);
        let Some(service) = text(&mut rest, NAME_BYTES_MAX)? else { return read(instance).map(|_| None) };
        let (instance, service) = match find(instance, service) {
            Some(found) => found,
            None => (read(instance)?, service.parse().map_err(PreambleError::Name)?),
        };
        let used = bytes - rest.len();
        buffer.advance(used);
        Ok(Some(Self { kind, instance, service }))
    }

    /// As [`Preamble::decode_with`], without names at hand.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, PreambleError> {
        Self::decode_with(buffer, |_, _| None)
    }
}

fn take(rest: &mut &[u8]) -> Option<u8> {
    let (first, tail) = rest.split_first()?;
    *rest = tail;
    Some(*first)
}

fn text<'a>(rest: &mut &'a [u8], bytes_max: usize) -> Result<Option<&'a str>, PreambleError> {
    let Some(low) = take(rest) else { return Ok(None) };
    let mut bytes = usize::from(low & 0x7f);
    if low & 0x80 != 0 {
        let Some(high) = take(rest) else { return Ok(None) };
        bytes |= usize::from(high) << 7;
    }
    if bytes > bytes_max {
        return Err(PreambleError::TooLong { bytes, bytes_max });
    }
    let Some((head, tail)) = rest.split_at_checked(bytes) else { return Ok(None) };
    *rest = tail;
    std::str::from_utf8(head).map(Some).map_err(|_| PreambleError::Utf8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_wire_form_is_frozen() {
        let preamble =
            Preamble { kind: StreamKind::Tcp, instance: "web-1".parse().unwrap(), service: "web".parse().unwrap() };
        assert_eq!(&preamble.encode()[..], b"\x01\x01\x05web-1\x03web");
        let flow = Preamble { kind: StreamKind::Udp, ..preamble };
        assert_eq!(&flow.encode()[..], b"\x01\x03\x05web-1\x03web");
    }

    #[test]
    fn every_status_survives_its_byte() {
        for byte in 0..7 {
            assert_eq!(StreamStatus::from_byte(byte).unwrap().byte(), byte);
        }
        assert_eq!(StreamStatus::from_byte(7), None);
    }

    #[test]
    fn what_is_no_preamble_is_refused_at_once() {
        let check = |bytes: &[u8], want: &str| {
            let error = Preamble::decode(&mut BytesMut::from(bytes)).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        };
        check(&[2], "version 2");
        check(&[1, 9], "kind 9");
        check(&[1, 1, 0xff, 0x7f], "at most 255");
        check(&[1, 1, 1, b'a', 64], "at most 63");
        check(&[1, 1, 1, 0xff], "UTF-8");
        check(&[1, 1, 0], "malformed");
    }

    #[test]
    fn names_at_hand_are_used_and_only_whole_ones_are_asked_for() {
        let (instance, service) = ("web-1".parse::<InstanceId>().unwrap(), "web".parse::<ServiceName>().unwrap());
        let wire = Preamble { kind: StreamKind::Http, instance: instance.clone(), service: service.clone() }.encode();
        let at_hand = |found_instance: &str, found_service: &str| {
            assert_eq!((found_instance, found_service), ("web-1", "web"));
            Some((instance.clone(), service.clone()))
        };
        let read = Preamble::decode_with(&mut BytesMut::from(&wire[..]), at_hand).unwrap().unwrap();
        assert!(read.instance.shares_text(&instance) && read.service.shares_text(&service));
        for cut in 0..wire.len() {
            let read = Preamble::decode_with(&mut BytesMut::from(&wire[..cut]), |_, _| unreachable!("{cut}"));
            assert_eq!(read, Ok(None));
        }
        let other = Preamble::decode_with(&mut BytesMut::from(&wire[..]), |_, _| None).unwrap().unwrap();
        assert!((&other.instance, &other.service) == (&instance, &service) && !other.service.shares_text(&service));
    }

    proptest! {
        #[test]
        fn a_preamble_survives_the_wire_and_leaves_what_follows(
            instance in "[!-~]{1,255}", service in "[a-z0-9][a-z0-9._-]{0,62}", kind in 0..3_usize, rest: Vec<u8>,
        ) {
            let kind = [StreamKind::Tcp, StreamKind::Http, StreamKind::Udp][kind];
            let preamble = Preamble { kind, instance: instance.parse().unwrap(), service: service.parse().unwrap() };
            let wire = preamble.encode();
            prop_assert!(wire.len() <= PREAMBLE_BYTES_MAX);
            for cut in 0..wire.len() {
                prop_assert_eq!(Preamble::decode(&mut BytesMut::from(&wire[..cut])), Ok(None));
            }
            let mut buffer = BytesMut::from(&wire[..]);
            buffer.extend_from_slice(&rest);
            prop_assert_eq!(Preamble::decode(&mut buffer), Ok(Some(preamble)));
            prop_assert_eq!(&buffer[..], &rest[..]);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let _unused = Preamble::decode(&mut BytesMut::from(&bytes[..]));
        }
    }
}

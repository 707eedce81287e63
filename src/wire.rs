//! Encoding and framing: the only file that names bincode.
//!
//! A message is one version byte and a bincode body (standard configuration: little-endian, variable-length integers).
//! On a stream a frame is a big-endian `u32` length and that many bytes; every reader names its own bound.
//!
//! Invariants: decoding is total (no panic; memory grows with what is there, but for the mebibyte at most that serde reserves,
//! untouched, for a list that claims to be long), refuses trailing bytes and unknown versions, and `decode(encode(x)) == x`.
//! Not here: what the messages mean (`gossip`, `pki::join`), the request heads of the data plane (`proxy::head`).

use serde::{Serialize, de::DeserializeOwned};

/// The version that this build writes and reads.
pub const WIRE_VERSION: u8 = 1;

/// Largest frame that any plane accepts, in bytes: one node's whole state with its certificates, and room for the rest.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;

/// Why bytes are no message, or a message has no bytes.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Nothing there.
    #[error("message is empty")]
    Empty,
    /// A version that this build does not speak.
    #[error("message has version {found}; this agent speaks version {WIRE_VERSION}: upgrade the older agent")]
    Version {
        /// The version byte.
        found: u8,
    },
    /// Larger than the reader's bound.
    #[error("message has {bytes} bytes; at most {bytes_max} are accepted here")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The body does not decode.
    #[error("message does not decode")]
    Decode(#[source] bincode::error::DecodeError),
    /// The body decodes and bytes are left.
    #[error("message has {bytes} bytes after its end")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// The value does not encode.
    #[error("message does not encode")]
    Encode(#[source] bincode::error::EncodeError),
    /// The stream ended or failed inside a frame.
    #[error("stream ended inside a frame")]
    Stream(#[source] std::io::Error),
}

/// Largest message whose decoding gets the small limit: everything but what streams of gossip carry.
const SMALL_BYTES_MAX: usize = 16 * 1024;
/// What bincode charges against its limit for one byte of a message, at most: an integer of 64 bits, the length of each
/// text and list among them, counts as 8 bytes and takes one where it is small. A limit of the message's own length
/// refuses a frame full of small records.
const CHARGE_MAX: usize = 8;

fn config<const BYTES_MAX: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<BYTES_MAX>()
}

/// For `#[serde(with = "wire::bytes")]` on a list of bytes: the same encoding as without, read and written as a whole and
/// not byte by byte. Signatures and payloads are most of what gossip decodes.
pub(crate) mod bytes {
    use serde::de::{Deserializer, Error, SeqAccess, Visitor};
    use serde::ser::Serializer;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Whole;
        impl<'de> Visitor<'de> for Whole {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                }
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Whole)
    }
}

/// Encodes `value` as one message: version byte and body.
///
/// # Errors
/// [`WireError::Encode`] if serde refuses, [`WireError::TooLarge`] past [`FRAME_BYTES_MAX`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let mut bytes = vec![WIRE_VERSION];
    bincode::serde::encode_into_std_write(value, &mut bytes, config::<FRAME_BYTES_MAX>()).map_err(WireError::Encode)?;
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(WireError::TooLarge { bytes: bytes.len(), bytes_max: FRAME_BYTES_MAX });
    }
    Ok(bytes)
}

/// Decodes one message that fills `bytes`, which hold at most `bytes_max`.
///
/// # Errors
/// Every variant but `Encode` and `Stream`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], bytes_max: usize) -> Result<T, WireError> {
    if bytes.len() > bytes_max {
        return Err(WireError::TooLarge { bytes: bytes.len(), bytes_max });
    }
    let (value, used) = decode_prefix(bytes)?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(WireError::Trailing { bytes: left }),
    }
}

/// Decodes one message at the beginning of `bytes` and returns it with the number of bytes that it takes.
///
/// # Errors
/// [`WireError::Empty`], [`WireError::Version`] or [`WireError::Decode`].
pub fn decode_prefix<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), WireError> {
    let (version, body) = bytes.split_first().ok_or(WireError::Empty)?;
    if *version != WIRE_VERSION {
        return Err(WireError::Version { found: *version });
    }
    let decoded = if body.len() <= SMALL_BYTES_MAX {
        bincode::serde::decode_from_slice(body, config::<{ CHARGE_MAX * SMALL_BYTES_MAX }>())
    } else {
        bincode::serde::decode_from_slice(body, config::<{ CHARGE_MAX * FRAME_BYTES_MAX }>())
    };
    let (value, used) = decoded.map_err(WireError::Decode)?;
    Ok((value, used + 1))
}

/// Writes `message` as one frame and flushes nothing.
///
/// # Errors
/// [`WireError::Stream`] if the stream fails.
/// # Cancel safety
/// Not cancel safe: a cancelled write leaves half a frame; reset the stream.
pub async fn write_frame<W: tokio::io::AsyncWrite + Unpin>(stream: &mut W, message: &[u8]) -> Result<(), WireError> {
    use tokio::io::AsyncWriteExt as _;
    let length = u32::try_from(message.len())
        .map_err(|_| WireError::TooLarge { bytes: message.len(), bytes_max: FRAME_BYTES_MAX })?;
    // In one write: a stream that is woken between two would send two packets.
    let frame = [&length.to_be_bytes(), message].concat();
    stream.write_all(&frame).await.map_err(WireError::Stream)
}

/// Reads one frame of at most `bytes_max` bytes; memory grows with what arrives, not with what the length claims.
///
/// # Errors
/// [`WireError::TooLarge`] before anything is read of the body, [`WireError::Stream`] if the stream ends early.
/// # Cancel safety
/// Not cancel safe: a cancelled read loses bytes; reset the stream.
pub async fn read_frame<R: tokio::io::AsyncRead + Unpin>(
    stream: &mut R,
    bytes_max: usize,
) -> Result<Vec<u8>, WireError> {
    use tokio::io::AsyncReadExt as _;
    let mut length = [0u8; 4];
    stream.read_exact(&mut length).await.map_err(WireError::Stream)?;
    let bytes = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if bytes > bytes_max {
        return Err(WireError::TooLarge { bytes, bytes_max });
    }
    let mut frame = Vec::with_capacity(bytes.min(8 * 1024));
    let limit = u64::try_from(bytes).unwrap_or(u64::MAX);
    stream.take(limit).read_to_end(&mut frame).await.map_err(WireError::Stream)?;
    if frame.len() < bytes {
        return Err(WireError::Stream(std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Entry, Generation};

    #[test]
    fn whatever_fits_a_frame_is_read_again_though_its_numbers_are_small() {
        let many = vec![7u64; FRAME_BYTES_MAX - 16];
        let bytes = encode(&many).unwrap();
        assert!(bytes.len() > FRAME_BYTES_MAX - 16);
        assert_eq!(decode::<Vec<u64>>(&bytes, FRAME_BYTES_MAX).unwrap(), many);
    }

    #[test]
    fn golden_bytes_of_a_generation() {
        let bytes = encode(&Generation { number: 7, nonce: 300 }).unwrap();
        assert_eq!(bytes, [1, 7, 251, 44, 1]);
        assert_eq!(decode::<Generation>(&bytes, 16).unwrap(), Generation { number: 7, nonce: 300 });
    }

    #[test]
    fn bounds_versions_and_trailing_bytes_are_refused() {
        assert!(matches!(decode::<u8>(&[], 4), Err(WireError::Empty)));
        assert!(matches!(decode::<u8>(&[9, 1], 4), Err(WireError::Version { found: 9 })));
        assert!(matches!(decode::<u8>(&[1, 1, 1], 4), Err(WireError::Trailing { bytes: 1 })));
        assert!(matches!(decode::<u8>(&[1; 5], 4), Err(WireError::TooLarge { bytes: 5, bytes_max: 4 })));
        // A length of 2^60 elements with nothing behind it.
        assert!(decode::<Vec<u64>>(&[1, 253, 0, 0, 0, 0, 0, 0, 0, 16], 64).is_err());
    }

    #[test]
    fn a_list_that_claims_to_be_long_reserves_a_mebibyte_at_most() {
        // 2^32 elements of 32 bytes, with nothing behind.
        let claims = [1, 253, 0, 0, 0, 0, 1, 0, 0, 0];
        let held = allocation_counter::measure(|| assert!(decode::<Vec<[u8; 32]>>(&claims, 64).is_err())).bytes_max;
        assert!(held <= 1024 * 1024 + 1024, "{held} bytes");
    }

    #[test]
    fn a_full_frame_of_small_values_decodes() {
        for count in [SMALL_BYTES_MAX - 8, FRAME_BYTES_MAX - 8] {
            let numbers: Vec<u64> = vec![1; count];
            let bytes = encode(&numbers).unwrap();
            assert!(bytes.len() <= count + 8);
            assert_eq!(decode::<Vec<u64>>(&bytes, FRAME_BYTES_MAX).unwrap(), numbers);
            let texts = vec![String::from("a"); count / 2];
            assert_eq!(decode::<Vec<String>>(&encode(&texts).unwrap(), FRAME_BYTES_MAX).unwrap(), texts);
        }
        // A text of 200 KiB with nothing behind it, in a message that cannot hold one.
        assert!(decode::<String>(&[1, 252, 0, 32, 3, 0], 64).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _unused = decode::<Vec<Entry>>(&bytes, 600);
        }

        #[test]
        fn a_value_survives_the_wire(number in any::<u64>(), nonce in any::<u64>(), text in ".{0,64}") {
            let value = (Generation { number, nonce }, text);
            prop_assert_eq!(decode::<(Generation, String)>(&encode(&value).unwrap(), 4096).unwrap(), value);
        }
    }

    #[tokio::test]
    async fn a_frame_claims_no_memory_before_it_arrives() {
        let mut wire: &[u8] = &[0, 3, 0, 0, 1, 2];
        assert!(matches!(read_frame(&mut wire, FRAME_BYTES_MAX).await, Err(WireError::Stream(_))));
        let mut wire: &[u8] = &[0xff, 0, 0, 0];
        assert!(matches!(read_frame(&mut wire, FRAME_BYTES_MAX).await, Err(WireError::TooLarge { .. })));
    }
}

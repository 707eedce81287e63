//! The body of a revocation.

use serde::{Deserialize, Serialize};

use super::document::{DocumentError, decode_body};
use crate::pki::Revoked;
use crate::wire;

/// Most entries of one document.
pub const ENTRIES_MAX: usize = 64;
/// Longest reason, in bytes.
pub const REASON_BYTES_MAX: usize = 256;

/// What is taken back, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationBody {
    /// What is taken back; at most [`ENTRIES_MAX`]. None: what an older version took back is given again.
    pub entries: Vec<Revoked>,
    /// For people; at most [`REASON_BYTES_MAX`].
    pub reason: String,
}

impl RevocationBody {
    /// Writes the body.
    ///
    /// # Errors
    /// [`DocumentError::Decode`] if it does not encode.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DocumentError> {
        wire::encode(self).map_err(DocumentError::Decode)
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`DocumentError`]: malformed, not canonical, or over a bound.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        let body: Self = decode_body(bytes)?;
        let is_bounded = body.entries.len() <= ENTRIES_MAX && body.reason.len() <= REASON_BYTES_MAX;
        if is_bounded { Ok(body) } else { Err(DocumentError::NotCanonical) }
    }
}

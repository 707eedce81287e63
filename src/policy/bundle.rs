//! The body of a bundle: a root and its successor, each signed by the other's key.
//!
//! ```text
//!   root 1 <-- root-000002 --> root 2 <-- root-000003 --> root 3      whoever knows one end learns the other
//! ```
//!
//! The document itself is signed by the old root, the link in its body by the new one: so a node that was off walks
//! forwards from the root that it knows, and a newcomer that knows the last root only can still check what was signed under
//! the earlier ones.

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::document::{DocumentError, DocumentName, decode_body};
use crate::wire;

/// Most issuers that a rotation certifies anew: they must fit one document.
pub const LINK_ISSUERS_MAX: usize = 32;

/// A successor of a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootLink {
    /// DER of the new root.
    pub root: Vec<u8>,
    /// The new root's signature over the old root's certificate (`DocumentKey::sign_link`).
    pub proof: Vec<u8>,
    /// DER of the issuers' certificates under the new root; at most [`LINK_ISSUERS_MAX`].
    pub issuers: Vec<Vec<u8>>,
}

impl RootLink {
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
    /// [`DocumentError`]: malformed or not canonical.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        let link: Self = decode_body(bytes)?;
        if link.issuers.len() > LINK_ISSUERS_MAX { Err(DocumentError::NotCanonical) } else { Ok(link) }
    }

    /// The new root.
    pub fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from(self.root.clone())
    }
}

/// The name of the document that leads to root number `number`; the first root has number 1 and needs none.
///
/// Padded, so that the order of names is the order of the walk.
pub fn link_name(number: u32) -> DocumentName {
    format!("root-{number:06}").parse().expect("letters, a dash and digits")
}

//! The envelope: what is signed, by whom, and its one encoding.
//!
//! ```text
//!   Document = content (a message, signed as it stands) + certificate of the signer + signature
//! ```
//!
//! The hash is of the content alone: a signature that is written differently, or a renewed certificate of the same key,
//! makes no other document.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::authz::IntentionError;
use crate::clock::UnixSeconds;
use crate::model::TrustDomain;
use crate::pki::{DocumentKey, PkiError, SpkiHash};
use crate::wire::{self, WireError};

/// Largest document, in bytes, its certificate included.
pub const DOCUMENT_BYTES_MAX: usize = 64 * 1024;
/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 128;
/// Longest signature: ECDSA P-256 in DER has at most 72 bytes.
const SIGNATURE_BYTES_MAX: usize = 128;

/// What a document is about. On the wire the number of the variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DocumentKind {
    /// A root and its successor.
    Bundle,
    /// Keys, nodes, tokens and issuers that are taken back.
    Revocation,
    /// Who may call whom.
    Intention,
    /// A config entry.
    Config,
}

impl DocumentKind {
    /// Whether it is policy, of which there may be much; what else there is has a share of its own.
    pub fn is_policy(self) -> bool {
        matches!(self, Self::Intention | Self::Config)
    }
}

impl fmt::Display for DocumentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bundle => "bundle",
            Self::Revocation => "revocation",
            Self::Intention => "intention",
            Self::Config => "config",
        })
    }
}

/// A document's name, unique within its kind: 1 to 128 bytes of letters, digits, `-`, `_`, `.`, `:` and `*`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DocumentName(String);

impl DocumentName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DocumentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DocumentName {
    type Err = DocumentError;

    fn from_str(text: &str) -> Result<Self, DocumentError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:*".contains(&byte);
        if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(is_allowed) {
            return Err(DocumentError::Name);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for DocumentName {
    type Error = DocumentError;

    fn try_from(text: String) -> Result<Self, DocumentError> {
        text.parse()
    }
}

impl From<DocumentName> for String {
    fn from(name: DocumentName) -> Self {
        name.0
    }
}

/// Kind and name: which document, in whatever version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DocumentId {
    /// What it is about.
    pub kind: DocumentKind,
    /// Which one of that kind.
    pub name: DocumentName,
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

/// What is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The mesh that it is for.
    pub trust_domain: TrustDomain,
    /// Which document.
    pub id: DocumentId,
    /// Greater replaces smaller; the operators count it up.
    pub version: u64,
    /// Beginning.
    pub not_before: UnixSeconds,
    /// End: it is forgotten everywhere after this.
    pub not_after: UnixSeconds,
    /// The signer's key.
    pub signer: SpkiHash,
    /// What it says; its form is the kind's.
    pub body: Vec<u8>,
}

/// Why bytes are no document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The name is malformed.
    #[error("a document's name has 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_`, `.`, `:` or `*`")]
    Name,
    /// The bytes do not decode.
    #[error("these bytes are no document of this version of weft")]
    Decode(#[source] WireError),
    /// The same document can be written in one way only.
    #[error("the document is not in its canonical encoding: it was altered on its way")]
    NotCanonical,
    /// It is too large.
    #[error("the document has {bytes} bytes; at most {DOCUMENT_BYTES_MAX} are accepted: split it")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The intention breaks a bound.
    #[error("the intention is refused")]
    Intention(#[source] IntentionError),
    /// The config entry is malformed.
    #[error("the config entry is refused: {0}")]
    Entry(String),
    /// It cannot be signed.
    #[error("cannot sign the document")]
    Sign(#[source] PkiError),
    /// The signer's certificate would end before the document.
    #[error(
        "the document is to last until {} and the signer's certificate ends at {}: sign it with the root key, or renew \
         the operator's certificate",
        crate::pki::Utc(*.not_after), crate::pki::Utc(*.signer_ends)
    )]
    OutlivesSigner {
        /// The document's end.
        not_after: UnixSeconds,
        /// The certificate's end.
        signer_ends: UnixSeconds,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    content: Vec<u8>,
    certificate: Vec<u8>,
    signature: Vec<u8>,
}

/// A document with its signature, in canonical form; whether the signature is good is the set's to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    content: Content,
    signed: Vec<u8>,
    certificate: CertificateDer<'static>,
    signature: Vec<u8>,
    hash: [u8; 32],
}

/// Names a document, its version and its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentDigest {
    /// Which document.
    pub id: DocumentId,
    /// Which version.
    pub version: u64,
    /// The first 8 bytes, big-endian, of the content's SHA-256.
    pub hash: u64,
}

impl DocumentDigest {
    /// Tells whether this one replaces `other` of the same id: a greater version, or the same and the smaller hash.
    pub fn replaces(&self, other: &Self) -> bool {
        self.version > other.version || (self.version == other.version && self.hash < other.hash)
    }
}

impl Document {
    /// Signs `content`, whose signer and trust domain are set to the key's.
    ///
    /// # Errors
    /// [`DocumentError::OutlivesSigner`], [`DocumentError::TooLarge`], [`DocumentError::Sign`].
    pub fn sign(mut content: Content, key: &DocumentKey) -> Result<Self, DocumentError> {
        let (_, signer_ends) = key.validity().map_err(DocumentError::Sign)?;
        if content.not_after > signer_ends {
            return Err(DocumentError::OutlivesSigner { not_after: content.not_after, signer_ends });
        }
        content.signer = key.spki().map_err(DocumentError::Sign)?;
        content.trust_domain = key.bundle().map_err(DocumentError::Sign)?.trust_domain;
        let signed = wire::encode(&content).map_err(DocumentError::Decode)?;
        let signature = key.sign(&signed).map_err(DocumentError::Sign)?;
        let document = Self::new(content, signed, key.certificate().clone(), signature);
        let bytes = document.to_bytes().len();
        if bytes > DOCUMENT_BYTES_MAX { Err(DocumentError::TooLarge { bytes }) } else { Ok(document) }
    }

    fn new(content: Content, signed: Vec<u8>, certificate: CertificateDer<'static>, signature: Vec<u8>) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &signed).as_ref());
        Self { content, signed, certificate, signature, hash }
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`DocumentError::TooLarge`], [`DocumentError::Decode`], [`DocumentError::NotCanonical`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(DocumentError::TooLarge { bytes: bytes.len() });
        }
        let envelope: Envelope = wire::decode(bytes, DOCUMENT_BYTES_MAX).map_err(DocumentError::Decode)?;
        let content: Content = wire::decode(&envelope.content, DOCUMENT_BYTES_MAX).map_err(DocumentError::Decode)?;
        let is_canonical = wire::encode(&content).is_ok_and(|again| again == envelope.content)
            && wire::encode(&envelope).is_ok_and(|again| again == bytes)
            && envelope.signature.len() <= SIGNATURE_BYTES_MAX;
        if !is_canonical {
            return Err(DocumentError::NotCanonical);
        }
        Ok(Self::new(content, envelope.content, CertificateDer::from(envelope.certificate), envelope.signature))
    }

    /// Writes the document.
    pub fn to_bytes(&self) -> Vec<u8> {
        let envelope = Envelope {
            content: self.signed.clone(),
            certificate: self.certificate.to_vec(),
            signature: self.signature.clone(),
        };
        wire::encode(&envelope).expect("byte strings of bounded length encode")
    }

    /// What it says.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The bytes that are signed.
    pub fn signed_bytes(&self) -> &[u8] {
        &self.signed
    }

    /// The signer's certificate, unverified.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The signature, unverified.
    pub fn signature(&self) -> &[u8] {
        &self.signature
    }

    /// SHA-256 of the content.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Which document, version and content.
    pub fn digest(&self) -> DocumentDigest {
        let mut first = [0; 8];
        first.iter_mut().zip(&self.hash).for_each(|(to, from)| *to = *from);
        DocumentDigest { id: self.content.id.clone(), version: self.content.version, hash: u64::from_be_bytes(first) }
    }
}

/// Decodes a body in its one encoding.
pub(super) fn decode_body<T: Serialize + serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, DocumentError> {
    let value: T = wire::decode(body, DOCUMENT_BYTES_MAX).map_err(DocumentError::Decode)?;
    if wire::encode(&value).is_ok_and(|again| again == body) { Ok(value) } else { Err(DocumentError::NotCanonical) }
}

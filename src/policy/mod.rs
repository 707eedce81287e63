//! What operators decide for the whole mesh: signed documents, and the set of them that every node holds.
//!
//! ```text
//!   weft revoke, ca rotate --sign--> Document --offer--> DocumentSet --derive--> trusted roots, revocations
//!   weft intention, config                                                       intentions, config entries
//!                                                 ^ |
//!                                       peers ----+ +---- digests, newer, wanted (anti-entropy)
//! ```
//!
//! Invariants: a document counts only after its signature, its signer's rights and its form were checked, whoever passed
//! it on; (version, hash) orders the documents of one name, never a clock; two nodes that were offered the same documents
//! hold the same ones, in whatever order they came; what an operator's key said is void once the root takes that key back.
//! A pure core: no clock, task or socket.
//! Not here: how documents travel (`gossip::documents`), what a verifier does with them (`pki`), keys on disk (`pki::CaDir`).

mod bundle;
mod document;
mod draft;
mod ends;
#[cfg(test)]
mod golden;
mod revocation;
mod set;
mod written;

pub use bundle::{LINK_ISSUERS_MAX, RootLink, link_name};
pub use document::{
    Content, DOCUMENT_BYTES_MAX, Document, DocumentDigest, DocumentError, DocumentId, DocumentKind, DocumentName,
};
pub use draft::{Draft, DraftError};
pub use ends::{Notice, notice};
pub use revocation::{ENTRIES_MAX, REASON_BYTES_MAX, RevocationBody};
pub use set::{DOCUMENTS_MAX, DocumentSet, Fork, Held, HeldDigest, Offered, Refused, SET_BYTES_MAX, walk};
pub use written::{
    ConfigBody, ENTRY_BYTES_MAX, ENTRY_KINDS, INERT_KINDS, IntentionBody, check_entry, entry_ends, intention_ends,
};

/// How far ahead of this node's clock a document may begin: the tolerance of the rest of the mesh.
pub const SKEW_MAX: std::time::Duration = std::time::Duration::from_secs(60);

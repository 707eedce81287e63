//! Identity: who may speak for what, from the operator's root to a service's certificate of one hour.
//!
//! ```text
//!   root (10 y, offline) -+-> issuer (1 y) -> node intermediate (7 d, extension: node, scope) -> leaf (1 h)
//!     ca, token           +-> operator (1 y) -> join tokens        authority, identity            tls, verify
//! ```
//!
//! Invariants: only `verify` decides whom to believe; a chain is leaf, node intermediate, issuer, root and nothing else;
//! a leaf's node is the node of its intermediate's extension and its service lies inside the extension's scope; no key
//! signs two kinds of things with the same bytes (`certificate::signed_bytes`); every input of a peer is bounded.
//! Not here: the exchange in which a newcomer gets its certificate (`join`), connections (`transport`), how revocations
//! and roots spread (`policy`, `gossip`).

mod authority;
mod ca;
mod certificate;
mod document;
mod extension;
mod facts;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod identity;
mod issuer;
pub(crate) mod join;
mod operators;
mod own_root;
mod pem;
mod remembered;
mod revocation;
mod roots;
mod rotate;
mod server_check;
mod tls;
mod token;
mod verify;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope, ServiceName, SpiffeId, TrustDomain};
use crate::wire::WireError;

pub use authority::NodeAuthority;
pub use ca::{CaDir, CaError, EphemeralCa, IssuerEntry, TokenRecord, ephemeral};
pub(crate) use certificate::BACKDATE;
pub use certificate::root_digest;
pub use document::{
    DocumentKey, DocumentSigner, Signatory, Signed, root_of, spki, validity, verify_document, verify_link,
};
pub use facts::{CertificateFacts, facts_of};
pub use identity::{Identity, SERVICE_SVIDS_MAX};
pub use issuer::{Issuer, IssuerCell};
pub use join::JoinKey;
pub use operators::{OperatorEntry, adopt_certificate};
pub use own_root::{Checked, OwnRoot, Request, RootProblem};
pub use pem::pem;
pub use revocation::{Presented, Revocations, Revoked, SpkiHash, SpkiHashError};
pub(crate) use roots::host_roots;
pub use rotate::Rotation;
pub use server_check::ServerCheck;
pub(crate) use tls::JoinVerifier;
pub use tls::{ALPN_GOSSIP, ALPN_JOIN, ALPN_TUNNEL};
pub use token::{Token, TokenClaims, TokenError, create_token};
pub use verify::{
    NodeChain, Utc, VerifyError, check_revoked, root_bundle, root_key_of, verify_peer, verify_presented,
    verify_signed_by_node,
};

/// Which plane a connection is for; each has its own ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plane {
    /// `weft-tunnel/1`
    Tunnel,
    /// `weft-gossip/1`
    Gossip,
    /// `weft-join/1`: server-authenticated only.
    Join,
}

/// Who a verified peer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The leaf's id: a node's or a service's.
    pub id: SpiffeId,
    /// The node that the chain certifies.
    pub node: NodeName,
    /// What that node may serve.
    pub scope: ServeScope,
    /// When the first certificate of the chain ends.
    pub not_after: UnixSeconds,
}

/// What is trusted: the roots of one trust domain, but for what was taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// DER of every trusted root, the newest first.
    pub roots: Vec<CertificateDer<'static>>,
    /// What was taken back.
    pub revoked: Revocations,
}

/// A leaf certificate with its chain and key, ready for TLS.
pub struct Svid {
    /// Who it speaks for.
    pub id: SpiffeId,
    /// Leaf first, then node intermediate, then issuer.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key (PKCS#8).
    pub key: PrivateKeyDer<'static>,
    /// Beginning of validity.
    pub not_before: UnixSeconds,
    /// End of validity.
    pub not_after: UnixSeconds,
}

impl Svid {
    /// When it is to be renewed: within 50 to 80 % of its life, by `share` of 0 to 1.
    pub fn renew_at(&self, share: f64) -> UnixSeconds {
        let life = self.not_after.since(self.not_before);
        self.not_before.plus(life.mul_f64(0.3_f64.mul_add(share.clamp(0.0, 1.0), 0.5)))
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Svid({}, until {})", self.id, self.not_after.0)
    }
}

/// Why something about identity failed.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A peer's chain or signature is refused.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The CA directory cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A token is refused.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A certificate, key or signature cannot be made.
    #[error("cannot make {what}")]
    Make {
        /// What was to be made.
        what: &'static str,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// The node's certificate does not cover the service.
    #[error(
        "node `{node}` may not speak for service `{service}`: its certificate covers `{scope}`; \
         join again with a token whose -serve covers the service"
    )]
    OutsideScope {
        /// The node.
        node: NodeName,
        /// The service.
        service: ServiceName,
        /// What the node may serve.
        scope: ServeScope,
    },
    /// A signing certificate has ended, or this clock is wrong.
    #[error(
        "the {what}'s certificate is valid until {} and this host's clock says {}: check the clock; if it is right, {remedy}",
        verify::Utc(*.until), verify::Utc(*.now)
    )]
    Expired {
        /// Whose certificate.
        what: &'static str,
        /// Its end.
        until: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
        /// What to do.
        remedy: &'static str,
    },
    /// The serve scope does not fit a certificate.
    #[error(
        "serve scope has {bytes} bytes of text; at most {bytes_max} fit a certificate: use fewer or wider patterns"
    )]
    ScopeTooLong {
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// A stored identity does not decode.
    #[error("the stored identity is damaged; remove it and join again with a new token")]
    Stored(#[source] WireError),
    /// A key does not belong to the certificate it came with.
    #[error("the key does not belong to the certificate of node `{node}`; remove the identity and join again")]
    KeyMismatch {
        /// The node.
        node: NodeName,
    },
    /// rustls refuses a configuration.
    #[error("TLS cannot be configured")]
    Tls(#[source] rustls::Error),
}

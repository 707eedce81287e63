//! Identity (seam; see helper P).
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::clock::UnixSeconds;
use crate::model::{NamePattern, NodeName, ServeScope, ServiceName, SpiffeId, TrustDomain};

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

/// What is trusted: the roots of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// DER of every trusted root.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A leaf certificate with its chain and key, ready for TLS.
#[derive(Debug)]
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

/// Why something about identity failed. (Helper P: one enum per operation replaces this.)
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PkiError(pub String);

/// A node's own authority: its intermediate (7 days), its key, its scope.
#[derive(Debug)]
pub struct NodeAuthority {}

impl NodeAuthority {
    /// The node.
    pub fn node(&self) -> &NodeName {
        todo!()
    }
    /// What it may serve.
    pub fn scope(&self) -> &ServeScope {
        todo!()
    }
    /// What it trusts.
    pub fn bundle(&self) -> &TrustBundle {
        todo!()
    }
    /// End of the intermediate.
    pub fn not_after(&self) -> UnixSeconds {
        todo!()
    }
    /// Node intermediate first, then issuer: what others need to check this node's signatures.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        todo!()
    }
    /// Mints the node's leaf (1 h).
    pub fn mint_node(&self, _now: UnixSeconds) -> Result<Svid, PkiError> {
        todo!()
    }
    /// Mints a service's SVID (1 h); refused outside the scope.
    pub fn mint_service(&self, _service: &ServiceName, _now: UnixSeconds) -> Result<Svid, PkiError> {
        todo!()
    }
    /// Signs `message` with the intermediate's key (ECDSA P-256, SHA-256, DER).
    pub fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, PkiError> {
        todo!()
    }
    /// For the store (holds the private key).
    pub fn to_bytes(&self) -> Result<Vec<u8>, PkiError> {
        todo!()
    }
    /// From the store.
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, PkiError> {
        todo!()
    }
}

/// Checks a published chain `[node intermediate, issuer]` and `signature` over `message`; returns node and scope.
pub fn verify_signed_by_node(
    _chain: &[CertificateDer<'_>],
    _message: &[u8],
    _signature: &[u8],
    _bundle: &TrustBundle,
    _now: UnixSeconds,
) -> Result<(NodeName, ServeScope, UnixSeconds), PkiError> {
    todo!()
}

/// Checks a chain that a peer showed in TLS, leaf first.
pub fn verify_peer(
    _chain: &[CertificateDer<'_>],
    _bundle: &TrustBundle,
    _now: UnixSeconds,
) -> Result<PeerIdentity, PkiError> {
    todo!()
}

/// The live identity of a node: authority, current SVIDs (minted on first use, renewed at 50-80 % of life), bundle.
/// Shared by transport, proxy, gossip, API. Reads take no lock.
#[derive(Debug)]
pub struct Identity {}

impl Identity {
    /// Mints the node's leaf.
    pub fn new(_authority: NodeAuthority, _now: UnixSeconds) -> Result<Arc<Self>, PkiError> {
        todo!()
    }
    /// The authority in use (swapped at renewal).
    pub fn authority(&self) -> Arc<NodeAuthority> {
        todo!()
    }
    /// Swaps the authority after a renewal and mints everything anew.
    pub fn replace_authority(&self, _authority: NodeAuthority, _now: UnixSeconds) -> Result<(), PkiError> {
        todo!()
    }
    /// The node's current leaf.
    pub fn node_svid(&self) -> Arc<Svid> {
        todo!()
    }
    /// A service's current SVID, minted if there is none.
    pub fn service_svid(&self, _service: &ServiceName, _now: UnixSeconds) -> Result<Arc<Svid>, PkiError> {
        todo!()
    }
    /// Renews what is past its renewal point; returns when to call again.
    pub fn renew_due(&self, _now: UnixSeconds) -> Result<UnixSeconds, PkiError> {
        todo!()
    }
    /// rustls server side for one plane: node SVID by a resolver that always hands out the current one; client
    /// certificates required and checked by `verify_peer` (Join: none asked, and the root is appended to the chain).
    pub fn server_config(self: &Arc<Self>, _plane: Plane) -> Result<Arc<rustls::ServerConfig>, PkiError> {
        todo!()
    }
    /// rustls client side: shows `svid`, accepts only a server whose verified node is `expect` (None: any node of the domain).
    pub fn client_config(
        self: &Arc<Self>,
        _plane: Plane,
        _svid: &Svid,
        _expect: Option<NodeName>,
    ) -> Result<Arc<rustls::ClientConfig>, PkiError> {
        todo!()
    }
}

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TokenClaims {
    /// Unique.
    pub id: [u8; 16],
    /// Names that the newcomer may take.
    pub node: NamePattern,
    /// What it may serve.
    pub serve: ServeScope,
    /// End.
    pub not_after: UnixSeconds,
    /// How often it may be used; 0: without bound until it ends.
    pub uses: u32,
}

/// An issuer's key and certificate, loaded from `./ca/issuer-N`; signs node intermediates.
#[derive(Debug)]
pub struct Issuer {}

impl Issuer {
    /// Loads a directory; refuses a key that others can read.
    pub fn load(_dir: &Path) -> Result<Self, PkiError> {
        todo!()
    }
    /// Certifies itself: the first agent.
    pub fn self_certify(
        &self,
        _node: &NodeName,
        _serve: &ServeScope,
        _now: UnixSeconds,
    ) -> Result<NodeAuthority, PkiError> {
        todo!()
    }
    /// Its trust bundle.
    pub fn bundle(&self) -> &TrustBundle {
        todo!()
    }
}

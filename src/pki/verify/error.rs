//! Why a chain is not believed.

use super::super::revocation::SpkiHash;
use super::{CERTIFICATE_BYTES_MAX, Utc};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope, ServiceName, TrustDomain};
/// Why a chain or a signature is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The chain has the wrong number of certificates.
    #[error("chain has {found} certificates; weft's has {want}")]
    Length {
        /// How many it has.
        found: usize,
        /// How many it must have.
        want: usize,
    },
    /// A certificate is larger than any of weft's.
    #[error("certificate has {bytes} bytes; at most {CERTIFICATE_BYTES_MAX} are accepted")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// A certificate does not parse.
    #[error("{role} certificate does not parse")]
    Malformed {
        /// Its place in the chain.
        role: &'static str,
    },
    /// A certificate begins in the future.
    #[error(
        "{role} certificate is valid from {} and this host's clock says {}: check the clocks of both hosts (NTP)",
        Utc(*.from), Utc(*.now)
    )]
    NotYetValid {
        /// Its place in the chain.
        role: &'static str,
        /// Its beginning.
        from: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// A certificate has ended.
    #[error(
        "{role} certificate was valid until {} and this host's clock says {}: check the clocks of both hosts (NTP); \
         if they are right, the peer must renew its certificate or join again",
        Utc(*.until), Utc(*.now)
    )]
    Expired {
        /// Its place in the chain.
        role: &'static str,
        /// Its end.
        until: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// The peer belongs to another mesh.
    #[error("peer is of trust domain `{theirs}`, this node of `{ours}`: check the address, it belongs to another mesh")]
    TrustDomain {
        /// This node's.
        ours: TrustDomain,
        /// The peer's.
        theirs: TrustDomain,
    },
    /// No path to a trusted root.
    #[error(
        "chain leads to no root that this node trusts ({reason}): the peer was certified by another CA, join it again"
    )]
    Path {
        /// What path validation says.
        reason: String,
    },
    /// A certificate has not exactly one URI name.
    #[error("{role} certificate must have exactly one name, a SPIFFE URI")]
    Names {
        /// Its place in the chain.
        role: &'static str,
    },
    /// The URI is no SPIFFE id of weft's.
    #[error("{role} certificate has no SPIFFE id of weft's: {reason}")]
    Spiffe {
        /// Its place in the chain.
        role: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A signing certificate has a SPIFFE path, or a leaf has none that authenticates.
    #[error("{role} certificate must not carry the id `{id}`")]
    Id {
        /// Its place in the chain.
        role: &'static str,
        /// Its id.
        id: String,
    },
    /// A leaf may sign certificates, or a signing certificate may not, or a path length is wrong.
    #[error("{role} certificate has the wrong basic constraints or key usage: {rule}")]
    Usage {
        /// Its place in the chain.
        role: &'static str,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The scope extension is missing, malformed, or where it must not be.
    #[error("{role} certificate {rule}")]
    Extension {
        /// Its place in the chain.
        role: &'static str,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A leaf names another node than its intermediate.
    #[error("leaf speaks for node `{leaf}`, but node `{node}` made it")]
    OtherNode {
        /// The node in the leaf.
        leaf: NodeName,
        /// The node in the intermediate.
        node: NodeName,
    },
    /// A leaf names a service outside its node's scope.
    #[error("node `{node}` may not speak for service `{service}`: its certificate covers `{scope}`")]
    OutsideScope {
        /// The node.
        node: NodeName,
        /// The service.
        service: ServiceName,
        /// What the node may serve.
        scope: ServeScope,
    },
    /// The peer is not whom the caller dialled.
    #[error("peer is `{found}`, but `{expected}` was dialled: the address belongs to another node")]
    Unexpected {
        /// Whom the caller wants.
        expected: String,
        /// Who answered.
        found: String,
    },
    /// A signature over a message is wrong.
    #[error("signature is not node `{node}`'s: the message was altered or forged")]
    Signature {
        /// The claimed signer.
        node: NodeName,
    },
    /// The newcomer's token pins another root.
    #[error(
        "the peer's chain does not hold the root that the token pins: the token is of another CA, or the address \
         belongs to another mesh; check both"
    )]
    WrongRoot,
    /// A key of the chain is revoked.
    #[error(
        "{role} key {key} is revoked: an operator took it back (`weft revoke -list`); if its host is sound again, join it \
         with a new token"
    )]
    Revoked {
        /// Its place in the chain.
        role: &'static str,
        /// The key.
        key: SpkiHash,
    },
    /// The node's certificates are revoked.
    #[error(
        "the certificates that node `{node}` had at {} are revoked (`weft revoke -list`); if its host is sound again, \
         join it with a new token",
        Utc(*.until)
    )]
    NodeRevoked {
        /// The node.
        node: NodeName,
        /// Up to which beginning.
        until: UnixSeconds,
    },
    /// The issuer signed after it was retired.
    #[error(
        "issuer {key} is retired since {} and signed this certificate later: renew or join with another issuer",
        Utc(*.from)
    )]
    IssuerRetired {
        /// Its key.
        key: SpkiHash,
        /// Since when.
        from: UnixSeconds,
    },
}

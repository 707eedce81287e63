//! A node's own authority: its intermediate, with which it mints leaves and signs its state, no network needed.

use std::fmt;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::certificate::{
    CONTEXT_NODE, CONTEXT_RENEW, LEAF_LIFE, Validity, generate_key, leaf_params, private_key, sign,
};
use super::join::JoinKey;
use super::{PkiError, Revocations, Svid, TrustBundle, VerifyError, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope, ServiceName, SpiffeId, TrustDomain};
use crate::wire;

/// Largest stored identity, in bytes: a key, two certificates and sixteen roots.
const STORED_BYTES_MAX: usize = 96 * 1024;

/// A node's own authority: its intermediate (7 days), its key, its scope.
pub struct NodeAuthority {
    signer: rcgen::Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    node: NodeName,
    scope: ServeScope,
    not_before: UnixSeconds,
    not_after: UnixSeconds,
}

impl fmt::Debug for NodeAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeAuthority({}, serves `{}`, until {})", self.node, self.scope, self.not_after.0)
    }
}

/// What the store keeps. Node and scope are in the certificate; they stand here to be checked against it.
#[derive(Serialize, Deserialize)]
struct Stored {
    key: Vec<u8>,
    chain: Vec<Vec<u8>>,
    trust_domain: TrustDomain,
    roots: Vec<Vec<u8>>,
    node: NodeName,
    scope: ServeScope,
}

impl NodeAuthority {
    /// Puts an authority together from `[node intermediate, issuer]`, which is checked at `now`.
    pub(crate) fn new(
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        bundle: TrustBundle,
        now: UnixSeconds,
    ) -> Result<Self, PkiError> {
        let (node, scope, not_after) = verify::verify_node_chain(&chain, &bundle, now)?;
        let Some(certificate) = chain.first() else {
            return Err(verify::VerifyError::Length { found: 0, want: 2 }.into());
        };
        if verify::public_key_of(certificate)? != key.public_key_raw() {
            return Err(PkiError::KeyMismatch { node });
        }
        let (not_before, _) = verify::validity_of(certificate)?;
        let signer = rcgen::Issuer::from_ca_cert_der(certificate, key)
            .map_err(|source| PkiError::Make { what: "a node authority", source })?;
        Ok(Self { signer, chain, bundle, node, scope, not_before, not_after })
    }

    /// The node.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// What it may serve.
    pub fn scope(&self) -> &ServeScope {
        &self.scope
    }

    /// The roots that it was made under; what is trusted at this moment is [`Identity::bundle`](super::Identity::bundle).
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Beginning of the intermediate.
    pub fn not_before(&self) -> UnixSeconds {
        self.not_before
    }

    /// End of the intermediate, or of its issuer if that ends first.
    pub fn not_after(&self) -> UnixSeconds {
        self.not_after
    }

    /// Node intermediate first, then issuer: what others need to check this node's signatures.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Holds the own chain against what is revoked.
    ///
    /// # Errors
    /// What is revoked of it.
    pub fn check(&self, bundle: &TrustBundle) -> Result<(), VerifyError> {
        verify::check_revoked(&self.chain, bundle)
    }

    /// Whether the chain leads to the newest root of `bundle`.
    pub fn is_under(&self, bundle: &TrustBundle) -> bool {
        self.root(bundle).is_some_and(|root| bundle.roots.first() == Some(root))
    }

    /// The root that the chain leads to.
    pub(super) fn root<'b>(&self, bundle: &'b TrustBundle) -> Option<&'b CertificateDer<'static>> {
        verify::root_of(self.chain.last()?, bundle)
    }

    /// Mints the node's leaf (1 h).
    ///
    /// # Errors
    /// [`PkiError::Expired`] when the intermediate has ended.
    pub fn mint_node(&self, now: UnixSeconds) -> Result<Svid, PkiError> {
        self.mint(SpiffeId::Node { trust_domain: self.bundle.trust_domain.clone(), node: self.node.clone() }, now)
    }

    /// Mints a service's SVID (1 h); refused outside the scope.
    ///
    /// # Errors
    /// [`PkiError::OutsideScope`], [`PkiError::Expired`].
    pub fn mint_service(&self, service: &ServiceName, now: UnixSeconds) -> Result<Svid, PkiError> {
        if !self.scope.covers(service.as_str()) {
            let (node, scope) = (self.node.clone(), self.scope.clone());
            return Err(PkiError::OutsideScope { node, service: service.clone(), scope });
        }
        let trust_domain = self.bundle.trust_domain.clone();
        self.mint(SpiffeId::Service { trust_domain, service: service.clone(), node: self.node.clone() }, now)
    }

    /// Mints a leaf for any id: the scope is the caller's to check.
    pub(super) fn mint(&self, id: SpiffeId, now: UnixSeconds) -> Result<Svid, PkiError> {
        if now >= self.not_after {
            let remedy = "renew it from an issuer, or join again with a new token";
            return Err(PkiError::Expired { what: "node", until: self.not_after, now, remedy });
        }
        let validity = Validity::starting(now, LEAF_LIFE, Some(self.not_after));
        let key = generate_key()?;
        let certificate = leaf_params(&id, validity)?
            .signed_by(&key, &self.signer)
            .map_err(|source| PkiError::Make { what: "a leaf certificate", source })?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.chain.iter().cloned());
        let Validity { not_before, not_after } = validity;
        Ok(Svid { id, chain, key: private_key(&key), not_before, not_after })
    }

    /// Signs `message` with the intermediate's key (ECDSA P-256, SHA-256, DER).
    ///
    /// A context is signed with it, so that no message can pass for a certificate or a renewal.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, PkiError> {
        sign(self.signer.key(), CONTEXT_NODE, message)
    }

    /// The own key, for a certificate in place of this one.
    pub(crate) fn key(&self) -> Result<JoinKey, PkiError> {
        JoinKey::from_bytes(self.signer.key().serialize_der())
    }

    /// Signs a renewal's proof.
    pub(crate) fn sign_renewal(&self, message: &[u8]) -> Result<Vec<u8>, PkiError> {
        sign(self.signer.key(), CONTEXT_RENEW, message)
    }

    /// For the store (holds the private key).
    pub fn to_bytes(&self) -> Result<Vec<u8>, PkiError> {
        let bytes_of = |list: &[CertificateDer<'_>]| list.iter().map(|der| der.to_vec()).collect();
        let stored = Stored {
            key: self.signer.key().serialize_der(),
            chain: bytes_of(&self.chain),
            trust_domain: self.bundle.trust_domain.clone(),
            roots: bytes_of(&self.bundle.roots),
            node: self.node.clone(),
            scope: self.scope.clone(),
        };
        wire::encode(&stored).map_err(PkiError::Stored)
    }

    /// From the store. The intermediate may have ended: see [`Self::not_after`].
    ///
    /// # Errors
    /// [`PkiError::Stored`], [`PkiError::KeyMismatch`] or [`PkiError::Verify`] if the bytes are damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PkiError> {
        let stored: Stored = wire::decode(bytes, STORED_BYTES_MAX).map_err(PkiError::Stored)?;
        let certificates = |list: Vec<Vec<u8>>| list.into_iter().map(CertificateDer::from).collect::<Vec<_>>();
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(stored.key), &PKCS_ECDSA_P256_SHA256)
            .map_err(|source| PkiError::Make { what: "a key from the stored identity", source })?;
        let chain = certificates(stored.chain);
        let (trust_domain, roots) = (stored.trust_domain, certificates(stored.roots));
        let bundle = TrustBundle { trust_domain, roots, revoked: Revocations::default() };
        let Some(certificate) = chain.first() else {
            return Err(verify::VerifyError::Length { found: 0, want: 2 }.into());
        };
        // Checked at a time when it was valid: an ended certificate can still be renewed.
        let (at, _) = verify::validity_of(certificate)?;
        let at = chain.get(1).map_or(Ok(at), |issuer| verify::validity_of(issuer).map(|(from, _)| from.max(at)))?;
        let authority = Self::new(key, chain, bundle, at)?;
        if authority.node != stored.node || authority.scope != stored.scope {
            return Err(PkiError::KeyMismatch { node: stored.node });
        }
        Ok(authority)
    }
}

//! The replica's signatures over this node's identity.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use crate::clock::UnixSeconds;
use crate::pki::{Identity, NodeAuthority, TrustBundle, check_revoked, verify_signed_by_node};
use crate::replica::{HeadSigner, HeadVerifier, VerifiedHead};

/// Signs with one authority, so that chain and signature belong together while the identity is renewed.
#[derive(Debug)]
pub(super) struct Signer(Arc<NodeAuthority>);

impl Signer {
    pub(super) fn new(identity: &Identity) -> Self {
        Self(identity.authority())
    }
}

impl HeadSigner for Signer {
    fn chain(&self) -> Vec<Vec<u8>> {
        self.0.chain().iter().map(|certificate| certificate.to_vec()).collect()
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        self.0.sign(message).map_err(|error| error.to_string())
    }
}

/// Checks signatures against the trusted roots at one moment.
#[derive(Debug)]
pub(super) struct Verifier {
    bundle: Arc<TrustBundle>,
    now: UnixSeconds,
}

impl Verifier {
    pub(super) fn new(identity: &Identity, now: UnixSeconds) -> Self {
        Self { bundle: identity.bundle(), now }
    }
}

impl HeadVerifier for Verifier {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let verified = verify_signed_by_node(&chain, message, signature, &self.bundle, self.now);
        let (node, scope, not_after) = verified.map_err(|error| error.to_string())?;
        Ok(VerifiedHead { node, scope, not_after })
    }

    fn is_good(&self, chain: &[Vec<u8>]) -> bool {
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        check_revoked(&chain, &self.bundle).is_ok()
    }
}

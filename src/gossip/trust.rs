//! The replica's signatures over this node's identity.
//!
//! A member's certificates stand behind each of its words. Reading and checking them takes half as long as the signature over
//! the word, so what they say is kept as long as the same is trusted.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use rustls::pki_types::CertificateDer;

use crate::clock::UnixSeconds;
use crate::pki::{Identity, NodeAuthority, NodeChain, PkiError, TrustBundle, check_revoked};
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

/// Most chains that are kept, 2 MB; then all are read anew.
const CHAINS_MAX: usize = 4096;

/// The chains that were found good under one bundle, by their hash.
#[derive(Debug, Default)]
pub(super) struct Chains(RefCell<Kept>);

#[derive(Debug, Default)]
struct Kept {
    bundle: Option<Arc<TrustBundle>>,
    good: HashMap<[u8; 32], NodeChain>,
}

impl Chains {
    /// Calls `act` with what `chain` says, if it is good at `now` under `bundle`.
    fn with<T>(
        &self,
        chain: &[Vec<u8>],
        bundle: &Arc<TrustBundle>,
        now: UnixSeconds,
        act: impl FnOnce(&NodeChain) -> Result<T, PkiError>,
    ) -> Result<T, PkiError> {
        let mut kept = self.0.borrow_mut();
        if kept.bundle.as_ref().is_none_or(|of| !Arc::ptr_eq(of, bundle)) || kept.good.len() >= CHAINS_MAX {
            *kept = Kept { bundle: Some(Arc::clone(bundle)), good: HashMap::new() };
        }
        let hash = hash_of(chain);
        if let Some(known) = kept.good.get(&hash).filter(|known| known.is_good_at(now)) {
            return act(known);
        }
        let checked = NodeChain::check(&ders(chain), bundle, now)?;
        let result = act(&checked);
        kept.good.insert(hash, checked);
        result
    }
}

fn hash_of(chain: &[Vec<u8>]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for certificate in chain {
        context.update(&(certificate.len() as u64).to_le_bytes());
        context.update(certificate);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

fn ders(chain: &[Vec<u8>]) -> Vec<CertificateDer<'_>> {
    chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect()
}

/// Checks signatures against the trusted roots at one moment.
#[derive(Debug)]
pub(super) struct Verifier<'a> {
    bundle: Arc<TrustBundle>,
    chains: &'a Chains,
    now: UnixSeconds,
}

impl<'a> Verifier<'a> {
    pub(super) fn new(identity: &Identity, chains: &'a Chains, now: UnixSeconds) -> Self {
        Self { bundle: identity.bundle(), chains, now }
    }
}

impl HeadVerifier for Verifier<'_> {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let verified = self.chains.with(chain, &self.bundle, self.now, |chain| {
            chain.verify(message, signature)?;
            Ok(VerifiedHead { node: chain.node.clone(), scope: chain.scope.clone(), not_after: chain.not_after })
        });
        verified.map_err(|error| error.to_string())
    }

    fn is_good(&self, chain: &[Vec<u8>]) -> bool {
        check_revoked(&ders(chain), &self.bundle).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::pki::{Revocations, Revoked, ephemeral, spki};

    #[test]
    fn a_chain_is_read_once_and_again_when_what_is_trusted_or_the_time_is_another() {
        let now = clock::wall();
        let ca = ephemeral(&"td".parse().unwrap(), now).unwrap();
        let authority = ca.issuer().self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), now).unwrap();
        let identity = Identity::new(authority, now).unwrap();
        let signer = Signer::new(&identity);
        let (chain, signature) = (signer.chain(), signer.sign(b"word").unwrap());
        let chains = Chains::default();
        let verify = |message: &[u8], signature: &[u8], now| {
            Verifier::new(&identity, &chains, now).verify(&chain, message, signature).map(|head| head.node.to_string())
        };
        for _ in 0..2 {
            assert_eq!(verify(b"word", &signature, now).as_deref(), Ok("a"));
            assert!(verify(b"other", &signature, now).is_err());
            assert_eq!(chains.0.borrow().good.len(), 1);
        }
        let ended = UnixSeconds(now.0 + 8 * 24 * 3600);
        assert!(verify(b"word", &signature, ended).is_err(), "its certificate has ended");
        let key = spki(&CertificateDer::from(chain[0].as_slice())).unwrap();
        let revoked: Revocations = [Revoked::Key(key)].into_iter().collect();
        identity.set_bundle(TrustBundle { revoked, ..TrustBundle::clone(&identity.bundle()) }, now);
        assert!(verify(b"word", &signature, now).is_err(), "it is revoked");
        assert!(chains.0.borrow().good.is_empty());
    }
}

//! Signatures of certificates that were found good: the same few signers stand behind every handshake and every record.
//!
//! ```text
//!   (key, message, signature) -> SHA-256 -> known good? -> yes: 1 us      no: ECDSA, 60 us -> good: kept
//! ```
//!
//! Invariants: what is kept is a fact of mathematics, that this key made this signature of these bytes. Whether the
//! certificate is believed (validity, names, usage, place in the chain, revocation) is decided anew each time by
//! [`verify`](super::verify). Bad signatures are never kept; the number of good ones is bounded, the most recently met stay.
//! Not here: signatures of handshakes and messages, which come once.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustls::pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm};
use webpki::aws_lc_rs::ECDSA_P256_SHA256;

/// Most facts of one of the two generations; both take 200 KiB when full. A node has its own intermediate's and its leaf's.
const GENERATION_MAX: usize = 2048;

type Fact = [u8; 32];

/// ECDSA P-256 with SHA-256 that remembers what it found good.
#[derive(Debug)]
pub(super) struct Remembering(LazyLock<Mutex<Good>>);

#[derive(Debug, Default)]
struct Good {
    new: HashSet<Fact>,
    /// Goes when the new generation is full, but for what was met again.
    old: HashSet<Fact>,
}

impl Good {
    fn has(&mut self, fact: &Fact) -> bool {
        if self.new.contains(fact) {
            return true;
        }
        let is_known = self.old.contains(fact);
        if is_known {
            self.keep(*fact);
        }
        is_known
    }

    fn keep(&mut self, fact: Fact) {
        if self.new.len() >= GENERATION_MAX {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(fact);
    }
}

impl Remembering {
    /// Remembers nothing yet.
    pub(super) const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Good) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Two different inputs have two different encodings: what varies in length says how long it is, or comes last.
fn fact_of(public_key: &[u8], message: &[u8], signature: &[u8]) -> Fact {
    let mut context = Context::new(&SHA256);
    for part in [public_key, signature] {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    context.update(message);
    let mut fact = [0; 32];
    fact.copy_from_slice(context.finish().as_ref());
    fact
}

impl SignatureVerificationAlgorithm for Remembering {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let fact = fact_of(public_key, message, signature);
        if self.with(|good| good.has(&fact)) {
            return Ok(());
        }
        ECDSA_P256_SHA256.verify_signature(public_key, message, signature)?;
        self.with(|good| good.keep(fact));
        Ok(())
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        ECDSA_P256_SHA256.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        ECDSA_P256_SHA256.signature_alg_id()
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};

    use super::*;

    fn key() -> EcdsaKeyPair {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap()
    }

    fn sign(key: &EcdsaKeyPair, message: &[u8]) -> Vec<u8> {
        key.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }

    #[test]
    fn only_the_very_same_key_message_and_signature_are_known_again() {
        let algorithm = Remembering::new();
        let (signer, other) = (key(), key());
        let public = signer.public_key().as_ref();
        let (message, signature) = (b"a certificate".as_slice(), sign(&signer, b"a certificate"));
        let count = || algorithm.with(|good| good.new.len() + good.old.len());

        for _ in 0..3 {
            assert!(algorithm.verify_signature(public, message, &signature).is_ok());
            assert_eq!(count(), 1, "once");
        }
        let mut spoilt = signature.clone();
        *spoilt.last_mut().unwrap() ^= 1;
        assert!(algorithm.verify_signature(public, message, &spoilt).is_err());
        assert!(algorithm.verify_signature(public, b"a certificatf", &signature).is_err());
        assert!(algorithm.verify_signature(other.public_key().as_ref(), message, &signature).is_err());
        // What is bad now is bad later.
        assert!(algorithm.verify_signature(public, message, &spoilt).is_err());
        assert_eq!(count(), 1);
        // Bytes that moved from one part to the next are another fact.
        assert_ne!(fact_of(b"ab", b"c", b"d"), fact_of(b"a", b"bc", b"d"));
        assert_ne!(fact_of(b"a", b"c", b"bd"), fact_of(b"ab", b"c", b"d"));
    }

    #[test]
    fn what_is_met_again_outlasts_any_number_of_others() {
        let mut good = Good::default();
        let fact = |number: u32| {
            let mut fact = [0; 32];
            fact[..4].copy_from_slice(&number.to_le_bytes());
            fact
        };
        good.keep(fact(0));
        for number in 1..5 * u32::try_from(GENERATION_MAX).unwrap() {
            good.keep(fact(number));
            if number % 1000 == 0 {
                assert!(good.has(&fact(0)), "{number}");
            }
            assert!(good.new.len() <= GENERATION_MAX && good.old.len() <= GENERATION_MAX);
        }
        assert!(!good.has(&fact(1)), "met once");
    }
}

//! A deterministic stand-in for certificates: it signs with a hash, so that a forgery is refused and nothing is slow.

use std::time::Duration;

use weft::clock::UnixSeconds;
use weft::model::{NodeName, ServeScope};
use weft::replica::{HeadSigner, HeadVerifier, VerifiedHead};

/// Size of the two certificates that a head is proved with: what a node intermediate and an issuer take in DER.
pub(crate) const CHAIN_BYTES: usize = 1300;
/// Longest ECDSA P-256 signature in DER.
const SIGNATURE_BYTES: usize = 72;

/// Part of a certificate that differs between nodes: name and scope.
const TELLING_BYTES: usize = 80;

/// Signs as one node. The certificate reads `name|scope|padding`; it is padded only where somebody wants to see it, for there
/// is a signer for every event.
#[derive(Debug, Clone)]
pub(crate) struct Signer {
    certificate: Vec<u8>,
    bytes: usize,
}

impl Signer {
    pub(crate) fn new(name: &str, scope: &str, bytes: usize) -> Self {
        let mut certificate = Vec::with_capacity(TELLING_BYTES);
        for part in [name, "|", scope, "|"] {
            certificate.extend_from_slice(part.as_bytes());
        }
        certificate.resize(TELLING_BYTES.min(bytes).max(certificate.len()), b'.');
        Self { certificate, bytes }
    }
}

/// FNV-1a over both, eight bytes at a time, drawn out to the length of a signature.
fn signature(certificate: &[u8], message: &[u8]) -> Vec<u8> {
    let telling = certificate.get(..TELLING_BYTES).unwrap_or(certificate);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in telling.chunks(8).chain(message.chunks(8)) {
        let word = part.iter().fold(part.len() as u64, |word, byte| word << 8 | u64::from(*byte));
        hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    }
    hash.to_be_bytes().into_iter().cycle().take(SIGNATURE_BYTES).collect()
}

impl HeadSigner for Signer {
    fn chain(&self) -> Vec<Vec<u8>> {
        let mut certificate = self.certificate.clone();
        certificate.resize(self.bytes.max(certificate.len()), b'.');
        vec![certificate]
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(signature(&self.certificate, message))
    }
}

/// Checks what [`Signer`] signed.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) wall: UnixSeconds,
}

/// What every host of the simulation may serve.
const SCOPE: &str = "*";

impl HeadVerifier for Verifier {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], given: &[u8]) -> Result<VerifiedHead, String> {
        let certificate = chain.first().ok_or("no certificate")?;
        if signature(certificate, message) != given {
            return Err("bad signature".to_owned());
        }
        let text = String::from_utf8_lossy(certificate.get(..TELLING_BYTES).unwrap_or(certificate));
        let mut parts = text.split('|');
        let node = parts.next().unwrap_or_default().parse().map_err(|_| "bad name")?;
        let scope: ServeScope = parts.next().unwrap_or_default().parse().map_err(|_| "bad scope")?;
        Ok(VerifiedHead { node, scope, not_after: self.wall.plus(Duration::from_hours(24)) })
    }

    /// Large meshes hold few records; certificates are as good as known.
    fn chain_of(&self, node: &NodeName) -> Option<Vec<Vec<u8>>> {
        Some(Signer::new(node.as_str(), SCOPE, TELLING_BYTES).chain())
    }
}

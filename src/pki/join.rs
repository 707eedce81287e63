//! The join plane's messages. Each is one frame of at most [`JOIN_FRAME_BYTES_MAX`] bytes on one bidirectional stream.
//!
//! ```text
//!   newcomer                                   any node
//!   Hello{clock}                          ->
//!                                         <-   Welcome{clock, nonce, role}
//!   Request (to a proven issuer only)     ->
//!                                         <-   Answer
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use aws_lc_rs::digest;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::certificate::{CONTEXT_ISSUER, CONTEXT_RENEW, generate_key};
use super::{PkiError, SpkiHash, TrustBundle, VerifyError, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope};

/// Largest frame on the join plane, in bytes: a token, a signing request, a chain, the links between roots.
pub(crate) const JOIN_FRAME_BYTES_MAX: usize = 64 * 1024;
/// Most bytes of links between roots that one welcome carries.
pub(crate) const LINKS_BYTES_MAX: usize = 48 * 1024;
/// Most roots that a newcomer says it knows.
pub(crate) const KNOWN_ROOTS_MAX: usize = 16;
/// Most issuers that a node names.
pub(crate) const ISSUERS_MAX: usize = 16;
/// Label and context of the TLS exporter to which an issuer's proof is bound.
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER-weft-join";

/// The first frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) clock: UnixSeconds,
    /// SHA-256 of the roots that it believes, at most [`KNOWN_ROOTS_MAX`].
    pub(crate) knows: Vec<[u8; 32]>,
}

/// What the answering node is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Role {
    /// An issuer, proven by its own certificate and a signature over this TLS session.
    Issuer { certificate: Vec<u8>, proof: Vec<u8> },
    /// Not an issuer; these are, as far as it knows.
    Member { issuers: Vec<SocketAddr> },
}

/// The second frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) clock: UnixSeconds,
    pub(crate) nonce: [u8; 32],
    pub(crate) role: Role,
    /// Documents that lead to the newest root, where the newcomer does not know that one.
    pub(crate) links: Vec<Vec<u8>>,
}

/// The third frame.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    Join { token: String, node: NodeName, csr: Vec<u8> },
    Renew { csr: Vec<u8>, chain: Vec<Vec<u8>>, signature: Vec<u8> },
}

/// The last frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Granted { chain: Vec<Vec<u8>> },
    Denied(Denied),
}

/// Why there is no certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Denied {
    pub(crate) why: Why,
    /// For the newcomer's user.
    pub(crate) reason: String,
}

/// What the newcomer does about a denial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Why {
    /// The request is refused, by any issuer.
    Request,
    /// The certificate or key that was shown is revoked: another key and a new token are needed.
    Revoked,
    /// This issuer cannot, or not yet: another may, or it may later.
    Issuer,
}

impl Denied {
    pub(crate) fn new(why: Why, reason: impl Into<String>) -> Self {
        Self { why, reason: reason.into() }
    }
}

/// What the old key signs at a renewal.
pub(crate) fn renewal_message(csr: &[u8], nonce: &[u8; 32]) -> Vec<u8> {
    [nonce.as_slice(), csr].concat()
}

/// The key that a newcomer asks a certificate for. It is kept until the answer has come, so that a request that is
/// repeated after a lost answer is the same request: a token's use is counted once for it.
pub struct JoinKey(PrivatePkcs8KeyDer<'static>);

impl fmt::Debug for JoinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinKey(hidden)")
    }
}

impl JoinKey {
    /// Makes a key.
    ///
    /// # Errors
    /// [`PkiError::Make`] if the system has no randomness.
    pub fn new() -> Result<Self, PkiError> {
        Ok(Self(PrivatePkcs8KeyDer::from(generate_key()?.serialize_der())))
    }

    /// For the store: it holds the private key.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.secret_pkcs8_der().to_vec()
    }

    /// From the store.
    ///
    /// # Errors
    /// [`PkiError::Make`] if the bytes are no P-256 key.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, PkiError> {
        let key = Self(PrivatePkcs8KeyDer::from(bytes));
        key.pair().map(|_| key)
    }

    /// The key as the library takes it.
    pub(crate) fn pair(&self) -> Result<KeyPair, PkiError> {
        KeyPair::from_pkcs8_der_and_sign_algo(&self.0, &PKCS_ECDSA_P256_SHA256)
            .map_err(|source| PkiError::Make { what: "a key from the stored bytes", source })
    }
}

/// The hash of the key in a signing request, unverified; none if it is no signing request, or one with something behind it.
pub(crate) fn request_key(csr: &[u8]) -> Option<SpkiHash> {
    use x509_parser::prelude::FromDer as _;
    let parsed = x509_parser::certification_request::X509CertificationRequest::from_der(csr).ok()?;
    let ([], request) = parsed else { return None };
    let mut hash = [0; 32];
    let key = request.certification_request_info.subject_pki.raw;
    hash.copy_from_slice(digest::digest(&digest::SHA256, key).as_ref());
    Some(SpkiHash(hash))
}

/// Checks that the other end of a TLS session holds the key of an issuer.
pub(crate) fn verify_issuer(
    certificate: &CertificateDer<'_>,
    proof: &[u8],
    channel: &[u8],
    name: &NodeName,
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(), VerifyError> {
    verify::check_issuer(certificate, bundle, now)?;
    verify::verify_signature(certificate, name, CONTEXT_ISSUER, channel, proof)
}

/// Checks a renewal by the old chain and its key, up to `grace` after the chain's end; returns name and scope.
pub(crate) fn verify_renewal(
    chain: &[CertificateDer<'_>],
    message: &[u8],
    signature: &[u8],
    bundle: &TrustBundle,
    now: UnixSeconds,
    grace: Duration,
) -> Result<(NodeName, ServeScope), VerifyError> {
    let signer = chain.first().ok_or(VerifyError::Length { found: 0, want: 2 })?;
    let (_, until) = verify::validity_of(signer)?;
    // An ended chain is checked at its last second; past the grace it is checked at `now`, and refused.
    let at = if now <= until.plus(grace) { now.min(until) } else { now };
    let (node, scope, _) = verify::verify_node_chain(chain, bundle, at)?;
    verify::verify_signature(signer, &node, CONTEXT_RENEW, message, signature)?;
    Ok((node, scope))
}

//! The join plane's messages. Each is one frame of at most [`JOIN_FRAME_BYTES_MAX`] bytes on one bidirectional stream.
//!
//! ```text
//!   newcomer                                   any node
//!   Hello{clock}                          ->
//!                                         <-   Welcome{clock, nonce, role}
//!   Request (to a proven issuer only)     ->
//!                                         <-   Answer
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::certificate::{CONTEXT_ISSUER, CONTEXT_RENEW, generate_key};
use super::{PkiError, TrustBundle, VerifyError, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope};

/// Largest frame on the join plane, in bytes: a token, a signing request, a chain.
pub(crate) const JOIN_FRAME_BYTES_MAX: usize = 16 * 1024;
/// Most issuers that a node names.
pub(crate) const ISSUERS_MAX: usize = 16;
/// Label and context of the TLS exporter to which an issuer's proof is bound.
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER-weft-join";

/// The first frame.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) clock: UnixSeconds,
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
    Refused { reason: String },
}

/// What the old key signs at a renewal.
pub(crate) fn renewal_message(csr: &[u8], nonce: &[u8; 32]) -> Vec<u8> {
    [nonce.as_slice(), csr].concat()
}

/// Makes a node's key.
pub(crate) fn new_key() -> Result<KeyPair, PkiError> {
    generate_key()
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

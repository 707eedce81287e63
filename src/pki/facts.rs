//! What people want to know of a certificate.

use std::fmt::Write as _;

use rustls::pki_types::CertificateDer;

use super::SpkiHash;
use super::verify::{NODE, VerifyError, parse, seconds};
use crate::clock::UnixSeconds;

/// A certificate for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// The hash of its key.
    pub key: SpkiHash,
    /// Beginning.
    pub not_before: UnixSeconds,
    /// End.
    pub not_after: UnixSeconds,
}

/// Reads what an operator wants to know of a certificate, unchecked.
///
/// # Errors
/// If it does not parse.
pub fn facts_of(der: &CertificateDer<'_>) -> Result<CertificateFacts, VerifyError> {
    let certificate = parse(NODE, der)?;
    let mut serial = String::new();
    for byte in certificate.tbs_certificate.raw_serial() {
        // Writing to a String cannot fail.
        let _written = write!(serial, "{byte:02x}");
    }
    Ok(CertificateFacts {
        serial,
        key: SpkiHash::of(&certificate),
        not_before: seconds(certificate.validity().not_before),
        not_after: seconds(certificate.validity().not_after),
    })
}

//! What each kind of certificate holds, and the keys and signatures beneath.
//!
//! Not here: who may have which certificate (`issuer`, `authority`), what is believed (`verify`).

use std::time::Duration;

use aws_lc_rs::digest;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, SigningKey as _,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::{PkiError, extension};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, ServeScope, SpiffeId, TrustDomain};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// A root's life: it is replaced by rotation, by hand.
pub(super) const ROOT_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
/// An issuer's and an operator's life.
pub(super) const ISSUER_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// A node intermediate's life: how long a node works with no issuer in reach.
pub(super) const NODE_LIFE: Duration = DAY.saturating_mul(7);
/// A leaf's life.
pub(super) const LEAF_LIFE: Duration = Duration::from_secs(3600);
/// How far certificates begin in the past, for clocks that are a little slow.
pub(crate) const BACKDATE: Duration = Duration::from_secs(60);

/// A join token's claims.
pub(super) const CONTEXT_TOKEN: &str = "weft-token/1";
/// A document of the operators.
pub(super) const CONTEXT_DOCUMENT: &str = "weft-document/1";
/// A new root's word for the one before it.
pub(super) const CONTEXT_LINK: &str = "weft-root/1";
/// What a node publishes.
pub(super) const CONTEXT_NODE: &str = "weft-node/1";
/// A renewal's proof of the old key.
pub(crate) const CONTEXT_RENEW: &str = "weft-renew/1";
/// An issuer's proof, on the join plane, that it is one.
pub(crate) const CONTEXT_ISSUER: &str = "weft-issuer/1";

/// Returns the bytes that are signed for `message`: no two contexts share any, and none begins like a certificate.
pub(super) fn signed_bytes(context: &str, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(context.len() + 1 + message.len());
    bytes.extend_from_slice(context.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(message);
    bytes
}

/// Signs `message` for one purpose (ECDSA P-256, SHA-256, DER).
pub(super) fn sign(key: &KeyPair, context: &str, message: &[u8]) -> Result<Vec<u8>, PkiError> {
    key.sign(&signed_bytes(context, message)).map_err(|source| PkiError::Make { what: "a signature", source })
}

/// Makes a P-256 key.
pub(crate) fn generate_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|source| PkiError::Make { what: "a key", source })
}

/// Returns the key in the form that rustls takes.
pub(super) fn private_key(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

/// Returns the SHA-256 of a root certificate's DER: what a token pins.
pub fn root_digest(root: &CertificateDer<'_>) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest::digest(&digest::SHA256, root.as_ref()).as_ref());
    bytes
}

/// Begin and end of a certificate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Validity {
    pub(super) not_before: UnixSeconds,
    pub(super) not_after: UnixSeconds,
}

impl Validity {
    /// From [`BACKDATE`] before `now` until `life` after it, at most until `cap`.
    pub(super) fn starting(now: UnixSeconds, life: Duration, cap: Option<UnixSeconds>) -> Self {
        let end = now.plus(life);
        Self { not_before: now.minus(BACKDATE), not_after: cap.map_or(end, |cap| end.min(cap)) }
    }

    /// As [`Self::starting`], within a signer's own begin and end.
    pub(super) fn within(now: UnixSeconds, life: Duration, (from, until): (UnixSeconds, UnixSeconds)) -> Self {
        let Self { not_before, not_after } = Self::starting(now, life, Some(until));
        Self { not_before: not_before.max(from), not_after }
    }
}

fn make(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |source| PkiError::Make { what, source }
}

fn base(id: &SpiffeId, role: &str, name: &str, validity: Validity) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    let time = |at: UnixSeconds| {
        let seconds = i64::try_from(at.0).unwrap_or(i64::MAX);
        OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| make("a validity time")(rcgen::Error::Time))
    };
    params.not_before = time(validity.not_before)?;
    params.not_after = time(validity.not_after)?;
    let mut serial: [u8; 16] = rand::random();
    // Positive and of full length, as DER wants it.
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let uri = Ia5String::try_from(id.to_string()).map_err(make("a SPIFFE id"))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let mut subject = DistinguishedName::new();
    // X.520 bounds a common name to 64 characters; names are for people, the URI is what counts.
    subject.push(DnType::OrganizationalUnitName, format!("weft {role}"));
    subject.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    params.distinguished_name = subject;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn signing(mut params: CertificateParams, path_length: u8) -> CertificateParams {
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// The root: it signs issuers and operators.
pub(super) fn root_params(domain: &TrustDomain, now: UnixSeconds) -> Result<CertificateParams, PkiError> {
    let id = SpiffeId::Authority(domain.clone());
    let params = base(&id, "root", domain.as_str(), Validity::starting(now, ROOT_LIFE, None))?;
    Ok(signing(params, 2))
}

/// An issuer: it signs node intermediates.
pub(super) fn issuer_params(
    domain: &TrustDomain,
    name: &str,
    validity: Validity,
) -> Result<CertificateParams, PkiError> {
    Ok(signing(base(&SpiffeId::Authority(domain.clone()), "issuer", name, validity)?, 1))
}

/// A node intermediate: it signs that node's leaves and its state.
pub(super) fn node_params(
    domain: &TrustDomain,
    node: &NodeName,
    scope: &ServeScope,
    validity: Validity,
) -> Result<CertificateParams, PkiError> {
    let mut params = base(&SpiffeId::Authority(domain.clone()), "node", node.as_str(), validity)?;
    params.custom_extensions = vec![extension::encode(node, scope)?];
    Ok(signing(params, 0))
}

/// A node's or a service's leaf.
pub(super) fn leaf_params(id: &SpiffeId, validity: Validity) -> Result<CertificateParams, PkiError> {
    let name = id.service().map_or_else(|| id.node().map_or("", NodeName::as_str), |service| service.as_str());
    let mut params = base(id, "leaf", name, validity)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// An operator: it signs what `may` says and never authenticates a connection.
pub(super) fn operator_params(
    domain: &TrustDomain,
    name: &NodeName,
    may: &OperatorScope,
    validity: Validity,
) -> Result<CertificateParams, PkiError> {
    let id = SpiffeId::Operator { trust_domain: domain.clone(), name: name.clone() };
    let mut params = base(&id, "operator", name.as_str(), validity)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.custom_extensions = vec![extension::encode_operator(may)?];
    Ok(params)
}

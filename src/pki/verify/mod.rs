//! The verifier: the only place that decides which chain is believed.
//!
//! ```text
//!   bounds -> parse -> validity -> path (webpki, or link by link without a leaf) -> SPIFFE rules on each certificate
//! ```
//!
//! Invariants: at most four certificates of 4 KiB are looked at; a chain is exactly leaf, node intermediate, issuer, and a
//! root of the bundle; nothing of an unverified certificate reaches the caller, other than in an error's text.
//! Not here: what is revoked (`revocation`; the bundle carries it), TLS (`tls`).

mod error;

use std::fmt;

use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use time::OffsetDateTime;
use webpki::aws_lc_rs::ECDSA_P256_SHA256;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

pub use self::error::VerifyError;
use super::certificate::{CONTEXT_NODE, signed_bytes};
use super::extension::{self, NodeExtension};
use super::remembered::Remembering;
use super::revocation::{Presented, Revocations, SpkiHash};
use super::{PeerIdentity, PkiError, TrustBundle};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, ServeScope, SpiffeId, TrustDomain};

/// Most certificates in a chain: leaf, node, issuer and, on the join plane, the root.
pub(crate) const CHAIN_CERTIFICATES_MAX: usize = 4;
/// Largest certificate, in bytes: a scope of 2 KiB and room for the rest.
pub(crate) const CERTIFICATE_BYTES_MAX: usize = 4096;

/// Signers below a root: the issuer and the node.
pub(super) const ROOT_PATH_LENGTH: u32 = 2;

/// Signatures that weft's certificates carry; the process meets each many times.
static CERTIFICATES: Remembering = Remembering::new();

/// A wall time for people: `2026-01-31T12:00:00Z`.
pub struct Utc(pub UnixSeconds);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = i64::try_from(self.0.0).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        let Some(time) = time else { return write!(f, "{} s after 1970", self.0.0) };
        let (month, day) = (u8::from(time.month()), time.day());
        let (year, hour, minute, second) = (time.year(), time.hour(), time.minute(), time.second());
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// A certificate's place in the chain.
const LEAF: &str = "leaf";
pub(super) const NODE: &str = "node";
const ISSUER: &str = "issuer";
const ROOT: &str = "root";
const OPERATOR: &str = "operator";

/// Parses one certificate within the bounds.
pub(super) fn parse<'a>(role: &'static str, der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, VerifyError> {
    if der.len() > CERTIFICATE_BYTES_MAX {
        return Err(VerifyError::TooLarge { bytes: der.len() });
    }
    match X509Certificate::from_der(der.as_ref()) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(VerifyError::Malformed { role }),
    }
}

pub(super) fn seconds(time: x509_parser::time::ASN1Time) -> UnixSeconds {
    UnixSeconds(u64::try_from(time.timestamp()).unwrap_or(0))
}

/// Returns when a certificate ends, unchecked.
pub(super) fn validity_of(der: &CertificateDer<'_>) -> Result<(UnixSeconds, UnixSeconds), VerifyError> {
    let certificate = parse(NODE, der)?;
    Ok((seconds(certificate.validity().not_before), seconds(certificate.validity().not_after)))
}

/// Returns the SPKI hash of a certificate's key, unchecked.
pub(super) fn spki_of(der: &CertificateDer<'_>) -> Result<SpkiHash, VerifyError> {
    Ok(SpkiHash::of(&parse(NODE, der)?))
}

/// Returns the public key (the bit string of its SPKI), unchecked.
pub(super) fn public_key_of(der: &CertificateDer<'_>) -> Result<Vec<u8>, VerifyError> {
    Ok(parse(NODE, der)?.public_key().subject_public_key.data.to_vec())
}

/// Returns a certificate's SubjectPublicKeyInfo in DER, unchecked.
pub(super) fn spki_der_of(der: &CertificateDer<'_>) -> Result<Vec<u8>, VerifyError> {
    Ok(parse(NODE, der)?.public_key().raw.to_vec())
}

fn check_time(role: &'static str, certificate: &X509Certificate<'_>, now: UnixSeconds) -> Result<(), VerifyError> {
    let (from, until) = (seconds(certificate.validity().not_before), seconds(certificate.validity().not_after));
    if now < from {
        return Err(VerifyError::NotYetValid { role, from, now });
    }
    if now > until {
        return Err(VerifyError::Expired { role, until, now });
    }
    Ok(())
}

/// Returns the one SPIFFE id of a certificate.
fn spiffe_id(role: &'static str, certificate: &X509Certificate<'_>) -> Result<SpiffeId, VerifyError> {
    let names = certificate.subject_alternative_name().map_err(|_| VerifyError::Names { role })?;
    match names.map(|names| names.value.general_names.as_slice()) {
        Some([GeneralName::URI(uri)]) => {
            uri.parse().map_err(|err: crate::model::SpiffeError| VerifyError::Spiffe { role, reason: err.to_string() })
        }
        _ => Err(VerifyError::Names { role }),
    }
}

fn check_domain(id: &SpiffeId, ours: &TrustDomain) -> Result<(), VerifyError> {
    if id.trust_domain() == ours {
        return Ok(());
    }
    Err(VerifyError::TrustDomain { ours: ours.clone(), theirs: id.trust_domain().clone() })
}

/// Checks a signing certificate: no SPIFFE path, cA, keyCertSign, the path length of its place.
fn check_signing(
    role: &'static str,
    certificate: &X509Certificate<'_>,
    path_length: u32,
    domain: &TrustDomain,
) -> Result<(), VerifyError> {
    let id = spiffe_id(role, certificate)?;
    check_domain(&id, domain)?;
    if !matches!(id, SpiffeId::Authority(_)) {
        return Err(VerifyError::Id { role, id: id.to_string() });
    }
    let usage = |rule| VerifyError::Usage { role, rule };
    let constraints = certificate.basic_constraints().ok().flatten().map(|found| found.value);
    let constraints = constraints.filter(|found| found.ca).ok_or_else(|| usage("a signing certificate has cA"))?;
    if constraints.path_len_constraint.is_none_or(|length| length > path_length) {
        return Err(usage("its path length is that of its place"));
    }
    let key_usage = certificate.key_usage().ok().flatten();
    if !key_usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(usage("a signing certificate has keyCertSign"));
    }
    Ok(())
}

/// Checks that a certificate only authenticates: no cA, digitalSignature, no keyCertSign or cRLSign, no scope extension.
fn check_leaf(role: &'static str, certificate: &X509Certificate<'_>) -> Result<(), VerifyError> {
    let usage = |rule| VerifyError::Usage { role, rule };
    let constraints = certificate.basic_constraints().map_err(|_| usage("basic constraints are well-formed"))?;
    if constraints.is_some_and(|found| found.value.ca) {
        return Err(usage("a leaf has no cA"));
    }
    let key_usage = certificate.key_usage().ok().flatten().ok_or_else(|| usage("a leaf has a key usage"))?.value;
    if !key_usage.digital_signature() {
        return Err(usage("a leaf has digitalSignature"));
    }
    if key_usage.key_cert_sign() || key_usage.crl_sign() {
        return Err(usage("a leaf has neither keyCertSign nor cRLSign"));
    }
    if extension::read(certificate) != NodeExtension::Absent {
        return Err(VerifyError::Extension { role, rule: "must not carry a serve scope" });
    }
    Ok(())
}

/// What the signing part of a chain certifies.
struct Certified {
    node: NodeName,
    scope: ServeScope,
    not_after: UnixSeconds,
    shown: Presented,
}

/// Checks node intermediate and issuer by weft's rules, and that no key of the chain is revoked; the path is the caller's.
fn check_signers(
    leaf: Option<&X509Certificate<'_>>,
    node: &X509Certificate<'_>,
    issuer: &X509Certificate<'_>,
    bundle: &TrustBundle,
) -> Result<Certified, VerifyError> {
    check_signing(NODE, node, 0, &bundle.trust_domain)?;
    check_signing(ISSUER, issuer, 1, &bundle.trust_domain)?;
    if extension::read(issuer) != NodeExtension::Absent {
        return Err(VerifyError::Extension { role: ISSUER, rule: "must not carry a serve scope" });
    }
    match extension::read(node) {
        NodeExtension::Present(name, scope) => {
            let not_after = seconds(node.validity().not_after).min(seconds(issuer.validity().not_after));
            let shown = Presented {
                leaf: leaf.map(SpkiHash::of),
                intermediate: SpkiHash::of(node),
                issuer: SpkiHash::of(issuer),
                node: name.clone(),
                made: seconds(node.validity().not_before),
                signers_end: not_after,
            };
            bundle.revoked.check(&shown)?;
            Ok(Certified { node: name, scope, not_after, shown })
        }
        NodeExtension::Absent => Err(VerifyError::Extension { role: NODE, rule: "has no serve scope" }),
        NodeExtension::Malformed => Err(VerifyError::Extension { role: NODE, rule: "has a malformed serve scope" }),
    }
}

/// Reads a root as a trust anchor; none if it does not parse.
fn anchor_of<'r>(root: &'r CertificateDer<'_>) -> Option<TrustAnchor<'r>> {
    webpki::anchor_from_trusted_cert(root).ok()
}

/// Validates the path from `leaf` to a root of the bundle by webpki.
fn check_path(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
    usage: KeyUsage,
) -> Result<(), VerifyError> {
    let path = |err: webpki::Error| VerifyError::Path { reason: err.to_string() };
    let anchors: Vec<TrustAnchor<'_>> = bundle.roots.iter().filter_map(anchor_of).collect();
    let entity = EndEntityCert::try_from(leaf).map_err(path)?;
    let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.0));
    let verified =
        entity.verify_for_usage(&[&CERTIFICATES], &anchors, intermediates, time, usage, None, None).map_err(path)?;
    // A shorter path than the chain shown would be one with an idle certificate in it.
    if verified.intermediate_certificates().count() != intermediates.len() {
        return Err(VerifyError::Path { reason: "the chain has a certificate that the path does not need".to_owned() });
    }
    // webpki asks nothing of an anchor's validity.
    for (root, anchor) in bundle.roots.iter().filter_map(|root| Some((root, anchor_of(root)?))) {
        if anchor.subject_public_key_info == verified.anchor().subject_public_key_info {
            check_time(ROOT, &parse(ROOT, root)?, now)?;
        }
    }
    Ok(())
}

/// Checks one link: `signer` signed `certificate`. Names and signature; validity is checked elsewhere.
fn check_link(
    certificate: &X509Certificate<'_>,
    signer: &X509Certificate<'_>,
    signer_der: &CertificateDer<'_>,
) -> Result<(), VerifyError> {
    let path = |reason: &str| VerifyError::Path { reason: reason.to_owned() };
    if certificate.issuer().as_raw() != signer.subject().as_raw() {
        return Err(path("issuer and subject differ"));
    }
    if certificate.signature_algorithm != certificate.tbs_certificate.signature {
        return Err(path("signature algorithms differ"));
    }
    if certificate.signature_algorithm.algorithm != x509_parser::oid_registry::OID_SIG_ECDSA_WITH_SHA256 {
        return Err(path("signature is not ECDSA with SHA-256"));
    }
    let known = [
        x509_parser::oid_registry::OID_X509_EXT_BASIC_CONSTRAINTS,
        x509_parser::oid_registry::OID_X509_EXT_KEY_USAGE,
        x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME,
    ];
    if certificate.extensions().iter().any(|extension| extension.critical && !known.contains(&extension.oid)) {
        return Err(path("unknown critical extension"));
    }
    let entity = EndEntityCert::try_from(signer_der).map_err(|err| path(&err.to_string()))?;
    entity
        .verify_signature(&CERTIFICATES, certificate.tbs_certificate.as_ref(), &certificate.signature_value.data)
        .map_err(|err| path(&err.to_string()))
}

/// Checks `[node intermediate, issuer]` up to a root of the bundle, link by link: webpki takes no path that ends in a CA.
fn check_signing_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<NodeChain, VerifyError> {
    let [node_der, issuer_der] = chain else {
        return Err(VerifyError::Length { found: chain.len(), want: 2 });
    };
    let node = parse(NODE, node_der)?;
    let issuer = parse(ISSUER, issuer_der)?;
    check_domain(&spiffe_id(NODE, &node)?, &bundle.trust_domain)?;
    check_time(NODE, &node, now)?;
    check_time(ISSUER, &issuer, now)?;
    check_link(&node, &issuer, issuer_der)?;
    let mut refused = VerifyError::Path { reason: "no root".to_owned() };
    for root_der in &bundle.roots {
        let root = parse(ROOT, root_der)?;
        match check_link(&issuer, &root, root_der).and_then(|()| check_time(ROOT, &root, now)) {
            Ok(()) => {
                let Certified { node: name, scope, not_after, .. } = check_signers(None, &node, &issuer, bundle)?;
                let times = [&node, &issuer, &root].map(|certificate| certificate.validity());
                let from = times.map(|time| seconds(time.not_before)).into_iter().max().unwrap_or(now);
                let until = times.map(|time| seconds(time.not_after)).into_iter().min().unwrap_or(now);
                return Ok(NodeChain {
                    node: name,
                    scope,
                    not_after,
                    from,
                    until,
                    signer: node_der.clone().into_owned(),
                });
            }
            Err(err) => refused = err,
        }
    }
    Err(refused)
}

/// A published chain `[node intermediate, issuer]` that was found good under one bundle.
#[derive(Debug, Clone)]
pub struct NodeChain {
    /// The node that it certifies.
    pub node: NodeName,
    /// What the node may serve.
    pub scope: ServeScope,
    /// End of the intermediate, or of its issuer if that ends first.
    pub not_after: UnixSeconds,
    /// From when until when all of it is valid, its root included.
    from: UnixSeconds,
    until: UnixSeconds,
    signer: CertificateDer<'static>,
}

impl NodeChain {
    /// Checks a chain.
    ///
    /// # Errors
    /// [`PkiError::Verify`] with the rule that is broken.
    pub fn check(chain: &[CertificateDer<'_>], bundle: &TrustBundle, now: UnixSeconds) -> Result<Self, PkiError> {
        Ok(check_signing_chain(chain, bundle, now)?)
    }

    /// Whether a check at `now`, under the bundle of the first, would find the same: nothing but time can change that.
    pub fn is_good_at(&self, now: UnixSeconds) -> bool {
        (self.from..=self.until).contains(&now)
    }

    /// Checks that the node signed `message`.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if it did not.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), PkiError> {
        Ok(verify_signature(&self.signer, &self.node, CONTEXT_NODE, message, signature)?)
    }
}

/// Holds a published chain that was verified before against what is revoked, without checking a signature again.
///
/// # Errors
/// The rule that is broken.
pub fn check_revoked(chain: &[CertificateDer<'_>], bundle: &TrustBundle) -> Result<(), VerifyError> {
    let [node_der, issuer_der] = chain else {
        return Err(VerifyError::Length { found: chain.len(), want: 2 });
    };
    if bundle.revoked.is_empty() {
        return Ok(());
    }
    check_signers(None, &parse(NODE, node_der)?, &parse(ISSUER, issuer_der)?, bundle).map(drop)
}

/// Checks a published chain `[node intermediate, issuer]`; returns node, scope and the chain's end.
pub(super) fn verify_node_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(NodeName, ServeScope, UnixSeconds), VerifyError> {
    check_signing_chain(chain, bundle, now).map(|found| (found.node, found.scope, found.not_after))
}

/// Checks a message that a node signed for one purpose.
pub(super) fn verify_signature(
    signer: &CertificateDer<'_>,
    node: &NodeName,
    context: &str,
    message: &[u8],
    signature: &[u8],
) -> Result<(), VerifyError> {
    let refused = || VerifyError::Signature { node: node.clone() };
    let entity = EndEntityCert::try_from(signer).map_err(|_| refused())?;
    entity.verify_signature(ECDSA_P256_SHA256, &signed_bytes(context, message), signature).map_err(|_| refused())
}

/// Checks a published chain `[node intermediate, issuer]` and `signature` over `message`; returns node, scope and the
/// chain's end.
///
/// # Errors
/// [`PkiError::Verify`] with the rule that is broken.
pub fn verify_signed_by_node(
    chain: &[CertificateDer<'_>],
    message: &[u8],
    signature: &[u8],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(NodeName, ServeScope, UnixSeconds), PkiError> {
    let checked = NodeChain::check(chain, bundle, now)?;
    checked.verify(message, signature)?;
    Ok((checked.node, checked.scope, checked.not_after))
}

/// Checks a chain that a peer showed in TLS, leaf first.
///
/// # Errors
/// [`PkiError::Verify`] with the rule that is broken.
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<PeerIdentity, PkiError> {
    Ok(check_peer(chain, bundle, now)?)
}

/// As [`verify_peer`]; returns also what is to be remembered of the chain while the connection lives.
///
/// # Errors
/// [`PkiError::Verify`] with the rule that is broken.
pub fn verify_presented(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(PeerIdentity, Presented), PkiError> {
    Ok(check_presented(chain, bundle, now)?)
}

/// As [`verify_peer`], with the plain error.
pub(super) fn check_peer(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<PeerIdentity, VerifyError> {
    check_presented(chain, bundle, now).map(|(peer, _)| peer)
}

/// As [`check_peer`]; returns also what is to be remembered of the chain while the connection lives.
pub(super) fn check_presented(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(PeerIdentity, Presented), VerifyError> {
    let [leaf_der, node_der, issuer_der] = chain else {
        return Err(VerifyError::Length { found: chain.len(), want: 3 });
    };
    let leaf = parse(LEAF, leaf_der)?;
    let node = parse(NODE, node_der)?;
    let issuer = parse(ISSUER, issuer_der)?;
    let id = spiffe_id(LEAF, &leaf)?;
    // Before the path, so that a foreign mesh is called by its name.
    check_domain(&id, &bundle.trust_domain)?;
    check_time(LEAF, &leaf, now)?;
    check_time(NODE, &node, now)?;
    check_time(ISSUER, &issuer, now)?;
    check_leaf(LEAF, &leaf)?;
    check_path(leaf_der, chain.get(1..).unwrap_or_default(), bundle, now, KeyUsage::client_auth())?;
    let certified = check_signers(Some(&leaf), &node, &issuer, bundle)?;
    let Some(leaf_node) = id.node() else {
        return Err(VerifyError::Id { role: LEAF, id: id.to_string() });
    };
    if *leaf_node != certified.node {
        return Err(VerifyError::OtherNode { leaf: leaf_node.clone(), node: certified.node });
    }
    if let Some(service) = id.service()
        && !certified.scope.covers(service.as_str())
    {
        let (node, scope) = (certified.node, certified.scope);
        return Err(VerifyError::OutsideScope { node, service: service.clone(), scope });
    }
    let not_after = certified.not_after.min(seconds(leaf.validity().not_after));
    let peer = PeerIdentity { id, node: certified.node, scope: certified.scope, not_after };
    Ok((peer, certified.shown))
}

/// Checks an operator's certificate, which a root signs directly; returns the operator's name and what it may sign.
pub(super) fn check_operator(
    der: &CertificateDer<'_>,
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(NodeName, OperatorScope), VerifyError> {
    let certificate = parse(OPERATOR, der)?;
    let id = spiffe_id(OPERATOR, &certificate)?;
    check_domain(&id, &bundle.trust_domain)?;
    check_time(OPERATOR, &certificate, now)?;
    check_leaf(OPERATOR, &certificate)?;
    check_path(der, &[], bundle, now, KeyUsage::client_auth())?;
    check_key(OPERATOR, &certificate, bundle)?;
    let may = extension::read_operator(&certificate);
    let may =
        may.ok_or(VerifyError::Extension { role: OPERATOR, rule: "says nothing of what its operator may sign" })?;
    match id {
        SpiffeId::Operator { name, .. } => Ok((name, may)),
        other => Err(VerifyError::Id { role: OPERATOR, id: other.to_string() }),
    }
}

/// Reads what an operator's certificate says, unchecked: for listings.
pub(super) fn operator_of(der: &CertificateDer<'_>) -> Result<(NodeName, OperatorScope), VerifyError> {
    let certificate = parse(OPERATOR, der)?;
    let may = extension::read_operator(&certificate);
    let may =
        may.ok_or(VerifyError::Extension { role: OPERATOR, rule: "says nothing of what its operator may sign" })?;
    match spiffe_id(OPERATOR, &certificate)? {
        SpiffeId::Operator { name, .. } => Ok((name, may)),
        other => Err(VerifyError::Id { role: OPERATOR, id: other.to_string() }),
    }
}

/// Checks the validity of a root at `at`; whose root it is is the caller's to know.
pub(super) fn check_root_time(der: &CertificateDer<'_>, at: UnixSeconds) -> Result<(), VerifyError> {
    check_time(ROOT, &parse(ROOT, der)?, at)
}

/// Refuses a revoked key.
fn check_key(role: &'static str, certificate: &X509Certificate<'_>, bundle: &TrustBundle) -> Result<(), VerifyError> {
    let key = SpkiHash::of(certificate);
    if bundle.revoked.has_key(&key) { Err(VerifyError::Revoked { role, key }) } else { Ok(()) }
}

/// Checks an issuer's certificate, which a root signs directly.
pub(super) fn check_issuer(
    der: &CertificateDer<'_>,
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<(), VerifyError> {
    let issuer = parse(ISSUER, der)?;
    check_signing(ISSUER, &issuer, 1, &bundle.trust_domain)?;
    check_time(ISSUER, &issuer, now)?;
    if extension::read(&issuer) != NodeExtension::Absent {
        return Err(VerifyError::Extension { role: ISSUER, rule: "must not carry a serve scope" });
    }
    check_key(ISSUER, &issuer, bundle)?;
    let mut refused = VerifyError::Path { reason: "no root".to_owned() };
    for root_der in &bundle.roots {
        let root = parse(ROOT, root_der)?;
        match check_link(&issuer, &root, root_der).and_then(|()| check_time(ROOT, &root, now)) {
            Ok(()) => return Ok(()),
            Err(err) => refused = err,
        }
    }
    Err(refused)
}

/// Makes a bundle of one root for `domain`.
///
/// # Errors
/// [`PkiError::Verify`] if it is no root that weft can stand on, or names another trust domain.
pub fn root_bundle(root: &CertificateDer<'_>, domain: &TrustDomain) -> Result<TrustBundle, PkiError> {
    Ok(bundle_of(root, domain)?)
}

/// Makes a bundle of one root for `domain`.
pub(super) fn bundle_of(root: &CertificateDer<'_>, domain: &TrustDomain) -> Result<TrustBundle, VerifyError> {
    check_root(root, domain)?;
    let roots = vec![root.clone().into_owned()];
    Ok(TrustBundle { trust_domain: domain.clone(), roots, revoked: Revocations::default() })
}

/// Checks a root: self-signed, cA, keyCertSign, room for two signers below it, no name constraints.
///
/// A root that weft made names its trust domain, which must be `domain`; an operator's own may name none: what it signs
/// for weft does.
fn check_root(der: &CertificateDer<'_>, domain: &TrustDomain) -> Result<(), VerifyError> {
    let root = parse(ROOT, der)?;
    let names = root.subject_alternative_name().map_err(|_| VerifyError::Names { role: ROOT })?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    if names.iter().any(|name| matches!(name, GeneralName::URI(uri) if uri.starts_with("spiffe:"))) {
        let id = spiffe_id(ROOT, &root)?;
        check_domain(&id, domain)?;
        if !matches!(id, SpiffeId::Authority(_)) {
            return Err(VerifyError::Id { role: ROOT, id: id.to_string() });
        }
    }
    let usage = |rule| VerifyError::Usage { role: ROOT, rule };
    let constraints = root.basic_constraints().ok().flatten().map(|found| found.value);
    let constraints = constraints.filter(|found| found.ca).ok_or_else(|| usage("a root has cA"))?;
    if constraints.path_len_constraint.is_some_and(|length| length < ROOT_PATH_LENGTH) {
        return Err(usage("a root has no path length, or 2 at least"));
    }
    if !root.key_usage().ok().flatten().is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(usage("a root has keyCertSign"));
    }
    if !matches!(root.name_constraints(), Ok(None)) {
        return Err(usage("a root has no name constraints: they do not speak of SPIFFE ids"));
    }
    check_link(&root, &root, der)
}

/// Returns the trust domain that a certificate of weft's names, unchecked.
pub(super) fn domain_of(der: &CertificateDer<'_>) -> Result<TrustDomain, VerifyError> {
    Ok(spiffe_id(NODE, &parse(NODE, der)?)?.trust_domain().clone())
}

/// Finds the key of the root of `bundle` that certifies `issuer`; none if there is none.
pub fn root_key_of(issuer: &CertificateDer<'_>, bundle: &TrustBundle) -> Option<SpkiHash> {
    spki_of(root_of(issuer, bundle)?).ok()
}

/// Finds the root of `bundle` that certifies `issuer`; none if there is none.
pub(super) fn root_of<'b>(issuer: &CertificateDer<'_>, bundle: &'b TrustBundle) -> Option<&'b CertificateDer<'static>> {
    let issuer = parse(ISSUER, issuer).ok()?;
    bundle.roots.iter().find(|der| parse(ROOT, der).is_ok_and(|root| check_link(&issuer, &root, der).is_ok()))
}

#[cfg(test)]
mod tests;

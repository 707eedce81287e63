//! An issuer: signs node intermediates, offline of all other issuers.

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};

use super::certificate::{CONTEXT_ISSUER, NODE_LIFE, Validity, generate_key, node_params, sign};
use super::{CaError, NodeAuthority, PkiError, SpkiHash, TrustBundle, ca, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope};

/// The issuer of a node, if it is one; a rotation of the root brings it another certificate for its key.
#[derive(Debug, Default)]
pub struct IssuerCell(ArcSwapOption<Issuer>);

impl IssuerCell {
    /// Holds `issuer`.
    pub fn new(issuer: Option<Arc<Issuer>>) -> Arc<Self> {
        Arc::new(Self(ArcSwapOption::new(issuer)))
    }

    /// The issuer at this moment.
    pub fn load(&self) -> Option<Arc<Issuer>> {
        self.0.load_full()
    }

    /// The issuer, unless it is retired or revoked.
    pub fn active(&self, bundle: &TrustBundle, now: UnixSeconds) -> Option<Arc<Issuer>> {
        self.load().filter(|issuer| issuer.spki().is_ok_and(|key| bundle.revoked.may_issue(&key, now)))
    }

    /// Takes, of `certificates`, the one for the own key that the newest root of `bundle` signed; tells whether it did.
    pub fn adopt(&self, certificates: &[CertificateDer<'static>], bundle: &TrustBundle) -> bool {
        let (Some(issuer), Some(root)) = (self.load(), bundle.roots.first()) else { return false };
        if issuer.bundle.roots.first() == Some(root) {
            return false;
        }
        let Ok(own) = issuer.spki() else { return false };
        let is_own = |der: &&CertificateDer<'static>| verify::spki_of(der).is_ok_and(|key| key == own);
        // `Issuer::new` checks that the root signed it.
        let found = certificates.iter().filter(is_own).find_map(|der| issuer.recertified(der.clone(), root).ok());
        let Some(next) = found else { return false };
        self.0.store(Some(Arc::new(next)));
        true
    }
}

/// An issuer's key and certificate, loaded from `./ca/issuer-N`; signs node intermediates.
#[derive(Debug)]
pub struct Issuer {
    signer: rcgen::Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    bundle: TrustBundle,
    not_after: UnixSeconds,
}

impl Issuer {
    /// Loads a directory; refuses a key that others can read.
    ///
    /// # Errors
    /// [`PkiError::Ca`] naming the file and what to do, [`PkiError::Verify`] if the certificate is not its root's.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let key = ca::read_key(&dir.join("issuer.key"))?;
        let certificate_path = dir.join("issuer.crt");
        let certificate = ca::read_certificate(&certificate_path)?;
        let root = ca::read_certificate(&dir.join("root.crt"))?;
        if verify::public_key_of(&certificate)? != key.public_key_raw() {
            return Err(CaError::KeyMismatch { path: certificate_path }.into());
        }
        Self::new(key, certificate, &root)
    }

    /// Puts an issuer together; its certificate must be its root's.
    pub(super) fn new(
        key: KeyPair,
        certificate: CertificateDer<'static>,
        root: &CertificateDer<'_>,
    ) -> Result<Self, PkiError> {
        // The issuer's own certificate names the trust domain; its root may name none.
        let bundle = verify::bundle_of(root, &verify::domain_of(&certificate)?)?;
        let (not_before, not_after) = verify::validity_of(&certificate)?;
        // Whether it has ended is asked at each signature; here only whose it is.
        verify::check_issuer(&certificate, &bundle, not_before)?;
        let signer = rcgen::Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|source| PkiError::Make { what: "an issuer", source })?;
        Ok(Self { signer, certificate, bundle, not_after })
    }

    /// Certifies itself: the first agent.
    ///
    /// # Errors
    /// [`PkiError::Expired`] if the issuer's certificate has ended, [`PkiError::ScopeTooLong`].
    pub fn self_certify(
        &self,
        node: &NodeName,
        serve: &ServeScope,
        now: UnixSeconds,
    ) -> Result<NodeAuthority, PkiError> {
        let key = generate_key()?;
        let chain = self.certify(&key, node, serve, now)?;
        NodeAuthority::new(key, chain, self.bundle.clone(), now)
    }

    /// Its trust bundle.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The same key under another certificate, which `root` signed.
    fn recertified(&self, certificate: CertificateDer<'static>, root: &CertificateDer<'_>) -> Result<Self, PkiError> {
        let der = PrivatePkcs8KeyDer::from(self.signer.key().serialize_der());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256)
            .map_err(|source| PkiError::Make { what: "an issuer", source })?;
        Self::new(key, certificate, root)
    }

    /// The hash of its key.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if its certificate does not parse.
    pub fn spki(&self) -> Result<SpkiHash, PkiError> {
        Ok(verify::spki_of(&self.certificate)?)
    }

    /// Its own certificate.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Proves, bound to one TLS session by `channel`, that this is an issuer.
    pub(crate) fn prove(&self, channel: &[u8]) -> Result<Vec<u8>, PkiError> {
        sign(self.signer.key(), CONTEXT_ISSUER, channel)
    }

    /// Certifies the key of a signing request (whose own signature proves possession); nothing else of it is used.
    pub(crate) fn certify_request(
        &self,
        request: &[u8],
        node: &NodeName,
        scope: &ServeScope,
        now: UnixSeconds,
    ) -> Result<Vec<CertificateDer<'static>>, PkiError> {
        let failed = |source| PkiError::Make { what: "a certificate for this signing request", source };
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request)).map_err(failed)?;
        let key = &request.public_key;
        // An uncompressed point of P-256: 0x04 and two coordinates of 32 bytes.
        let is_p256 = key.der_bytes().len() == 65 && key.der_bytes().first() == Some(&4);
        if PublicKeyData::algorithm(key) != &PKCS_ECDSA_P256_SHA256 || !is_p256 {
            return Err(failed(rcgen::Error::UnsupportedSignatureAlgorithm));
        }
        self.certify(key, node, scope, now)
    }

    /// Signs a node intermediate; returns `[node intermediate, issuer]`.
    pub(super) fn certify(
        &self,
        key: &impl PublicKeyData,
        node: &NodeName,
        scope: &ServeScope,
        now: UnixSeconds,
    ) -> Result<Vec<CertificateDer<'static>>, PkiError> {
        if now >= self.not_after {
            let remedy = "make another issuer with `weft ca issuer`";
            return Err(PkiError::Expired { what: "issuer", until: self.not_after, now, remedy });
        }
        let validity = Validity::starting(now, NODE_LIFE, Some(self.not_after));
        let params = node_params(&self.bundle.trust_domain, node, scope, validity)?;
        let certificate = params
            .signed_by(key, &self.signer)
            .map_err(|source| PkiError::Make { what: "a node certificate", source })?;
        Ok(vec![certificate.der().clone(), self.certificate.clone()])
    }
}

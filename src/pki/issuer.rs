//! An issuer: signs node intermediates, offline of all other issuers.

use std::path::Path;

use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::certificate::{CONTEXT_ISSUER, NODE_LIFE, Validity, generate_key, node_params, sign};
use super::{CaError, NodeAuthority, PkiError, SpkiHash, TrustBundle, ca, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, ServeScope};

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
        let bundle = verify::bundle_of(root)?;
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

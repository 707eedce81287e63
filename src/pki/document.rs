//! Who signs the mesh's documents: the root, or an operator whom the root certifies. Both sides of the signature.
//!
//! Not here: what the documents say and which kinds an operator may sign (`policy`).

use std::fmt;
use std::path::Path;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;

use super::certificate::{CONTEXT_DOCUMENT, CONTEXT_LINK, sign};
use super::verify::{self, VerifyError};
use super::{CaDir, CaError, PkiError, SpkiHash, TrustBundle, ca, operators};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, TrustDomain};

/// Which key of a CA directory signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signatory {
    /// The root's own key.
    Root,
    /// The operator's key, which can be kept apart from the root's.
    Operator,
}

/// A key of a CA directory that signs documents.
pub struct DocumentKey {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    root: CertificateDer<'static>,
    domain: TrustDomain,
}

impl fmt::Debug for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DocumentKey(hidden)")
    }
}

impl DocumentKey {
    /// Loads the key of `signatory` from a CA directory; refuses a key that others can read.
    ///
    /// # Errors
    /// [`PkiError::Ca`] naming the file and what to do.
    pub fn load(ca_dir: &Path, signatory: Signatory) -> Result<Self, PkiError> {
        let (key, certificate) = match signatory {
            Signatory::Root => ("root.key", "root.crt"),
            Signatory::Operator => ("operator/operator.key", "operator/operator.crt"),
        };
        let root = ca::read_certificate(&ca_dir.join("root.crt"))?;
        if signatory == Signatory::Root && CaDir::open(ca_dir).is_offline() {
            return Err(CaError::Offline.into());
        }
        let domain = ca::domain_of(ca_dir, &root)?;
        let (key, path) = (ca::read_key(&ca_dir.join(key))?, ca_dir.join(certificate));
        Self::new(key, ca::read_certificate(&path)?, root, domain).ok_or_else(|| CaError::KeyMismatch { path }.into())
    }

    /// Loads an operator's file, as `weft ca operator create` wrote it: key, certificate and root in PEM.
    ///
    /// # Errors
    /// [`PkiError::Ca`] naming the file and what to do; others can read it.
    pub fn load_operator(path: &Path) -> Result<Self, PkiError> {
        let (key, certificate, root) = operators::read_file(path)?;
        let domain = verify::domain_of(&certificate)?;
        Self::new(key, certificate, root, domain).ok_or_else(|| CaError::KeyMismatch { path: path.to_owned() }.into())
    }

    /// What its certificate allows; everything if it is the root's.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if it is no operator's certificate at `now`.
    pub fn may(&self, now: UnixSeconds) -> Result<(DocumentSigner, OperatorScope), PkiError> {
        if self.certificate == self.root {
            return Ok((DocumentSigner::Root, OperatorScope::all()));
        }
        let (name, may) = verify::check_operator(&self.certificate, &self.bundle()?, now)?;
        Ok((DocumentSigner::Operator(name), may))
    }

    /// Puts a key together with its certificate; none if they do not belong together.
    pub(super) fn new(
        key: KeyPair,
        certificate: CertificateDer<'static>,
        root: CertificateDer<'static>,
        domain: TrustDomain,
    ) -> Option<Self> {
        let is_own = verify::public_key_of(&certificate).is_ok_and(|public| public == key.public_key_raw());
        is_own.then_some(Self { key, certificate, root, domain })
    }

    /// The certificate that documents carry.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The trust domain and root that it belongs to.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if the root is no root of weft's.
    pub fn bundle(&self) -> Result<TrustBundle, PkiError> {
        Ok(verify::bundle_of(&self.root, &self.domain)?)
    }

    /// The hash of its key.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if the certificate does not parse.
    pub fn spki(&self) -> Result<SpkiHash, PkiError> {
        Ok(verify::spki_of(&self.certificate)?)
    }

    /// Begin and end of its certificate.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if the certificate does not parse.
    pub fn validity(&self) -> Result<(UnixSeconds, UnixSeconds), PkiError> {
        Ok(verify::validity_of(&self.certificate)?)
    }

    /// Signs, with the key of a new root, for the root before it.
    ///
    /// # Errors
    /// [`PkiError::Make`] if the library refuses.
    pub fn sign_link(&self, old: &CertificateDer<'_>) -> Result<Vec<u8>, PkiError> {
        sign(&self.key, CONTEXT_LINK, old)
    }

    /// Signs a document's content.
    ///
    /// # Errors
    /// [`PkiError::Make`] if the library refuses.
    pub fn sign(&self, content: &[u8]) -> Result<Vec<u8>, PkiError> {
        sign(&self.key, CONTEXT_DOCUMENT, content)
    }
}

/// Checks that the key of root `new` signed for root `old`, and that both are roots, of no other trust domain.
///
/// # Errors
/// The rule that is broken.
pub fn verify_link(
    old: &CertificateDer<'_>,
    new: &CertificateDer<'_>,
    proof: &[u8],
    domain: &TrustDomain,
) -> Result<(), VerifyError> {
    for root in [old, new] {
        verify::bundle_of(root, domain)?;
    }
    let name = "root".parse().expect("a fixed, well-formed name");
    verify::verify_signature(new, &name, CONTEXT_LINK, old, proof)
}

/// Begin and end of any certificate, unverified.
///
/// # Errors
/// [`PkiError::Verify`] if it does not parse.
pub fn validity(certificate: &CertificateDer<'_>) -> Result<(UnixSeconds, UnixSeconds), PkiError> {
    Ok(verify::validity_of(certificate)?)
}

/// The hash of any certificate's key, unverified.
///
/// # Errors
/// [`PkiError::Verify`] if it does not parse.
pub fn spki(certificate: &CertificateDer<'_>) -> Result<SpkiHash, PkiError> {
    Ok(verify::spki_of(certificate)?)
}

/// Who signed a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentSigner {
    /// A trusted root.
    Root,
    /// An operator, certified by a trusted root.
    Operator(NodeName),
}

/// What a good signature of a document tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Who signed.
    pub signer: DocumentSigner,
    /// What it may sign; of the root: everything.
    pub may: OperatorScope,
    /// The hash of its key.
    pub key: SpkiHash,
}

/// Checks the signature of a document's content by the key of `certificate` at `at`.
///
/// # Errors
/// The rule that is broken; [`VerifyError::Expired`] names the clocks.
pub fn verify_document(
    certificate: &CertificateDer<'_>,
    content: &[u8],
    signature: &[u8],
    bundle: &TrustBundle,
    at: UnixSeconds,
) -> Result<Signed, VerifyError> {
    let (signer, name, may) = if bundle.roots.iter().any(|root| root == certificate) {
        verify::check_root_time(certificate, at)?;
        (DocumentSigner::Root, "root".parse().expect("a fixed, well-formed name"), OperatorScope::all())
    } else {
        let (name, may) = verify::check_operator(certificate, bundle, at)?;
        (DocumentSigner::Operator(name.clone()), name, may)
    };
    verify::verify_signature(certificate, &name, CONTEXT_DOCUMENT, content, signature)?;
    Ok(Signed { signer, may, key: verify::spki_of(certificate)? })
}

/// The hash of the key of that root of `bundle` which an operator's certificate stands under.
///
/// # Errors
/// [`VerifyError`] of the last root if it stands under none.
pub fn root_of(
    certificate: &CertificateDer<'_>,
    bundle: &TrustBundle,
    at: UnixSeconds,
) -> Result<SpkiHash, VerifyError> {
    let mut refused = VerifyError::Path { reason: "no root".to_owned() };
    for root in &bundle.roots {
        let alone = TrustBundle { roots: vec![root.clone()], ..bundle.clone() };
        match verify::check_operator(certificate, &alone, at) {
            Ok(_) => return verify::spki_of(root),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use super::super::ephemeral;
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    #[test]
    fn root_and_operator_sign_and_nobody_else_does() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let (root, operator) =
            (DocumentKey::load(&dir, Signatory::Root).unwrap(), DocumentKey::load(&dir, Signatory::Operator).unwrap());
        let bundle = root.bundle().unwrap();
        let check = |key: &DocumentKey, content: &[u8], at| {
            verify_document(key.certificate(), content, &key.sign(b"content").unwrap(), &bundle, at)
                .map(|found| found.signer)
        };
        assert_eq!(check(&root, b"content", NOW), Ok(DocumentSigner::Root));
        assert_eq!(check(&operator, b"content", NOW), Ok(DocumentSigner::Operator("operator".parse().unwrap())));
        assert!(matches!(check(&operator, b"other", NOW), Err(VerifyError::Signature { .. })));
        let late = UnixSeconds(NOW.0 + 400 * 86_400);
        assert!(matches!(check(&operator, b"content", late), Err(VerifyError::Expired { role: "operator", .. })));

        let foreign = ephemeral(&"td".parse().unwrap(), NOW).unwrap();
        let node = foreign.issuer().self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), NOW).unwrap();
        for (certificate, bundle) in
            [(&node.chain()[0], foreign.issuer().bundle()), (operator.certificate(), foreign.issuer().bundle())]
        {
            let signature = node.sign(b"content").unwrap();
            assert!(verify_document(certificate, b"content", &signature, bundle, NOW).is_err());
        }
    }

    #[test]
    fn a_revoked_operator_signs_nothing_more() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let key = DocumentKey::load(&dir, Signatory::Operator).unwrap();
        let mut bundle = key.bundle().unwrap();
        bundle.revoked = [super::super::Revoked::Key(key.spki().unwrap())].into_iter().collect();
        let refused = verify_document(key.certificate(), b"x", &key.sign(b"x").unwrap(), &bundle, NOW).unwrap_err();
        assert!(matches!(refused, VerifyError::Revoked { role: "operator", .. }), "{refused}");
    }
}

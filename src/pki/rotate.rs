//! A new root for an old CA directory, in two steps: made beside the old one, and put in its place once the mesh knows it.
//!
//! ```text
//!   dir/next/{root.key, root.crt, issuer-1.crt …, operator.crt}  --commit-->  dir/{root.key, root.crt, …}
//!                                                       the old root -->  dir/roots/1/{root.key, root.crt}
//! ```
//!
//! Issuers and operator keep their keys and get new certificates, so that nothing has to be copied between hosts: the
//! issuers' new certificates travel in the document that announces the root.
//! A run that breaks off is taken up by the next one.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;

use super::PkiError;
use super::ca::{self, CaDir, CaError};
use super::certificate::{ISSUER_LIFE, Validity, generate_key, issuer_params, operator_params, root_params};
use super::document::DocumentKey;
use super::operators::SigningRoot;
use super::own_root::{self, NextRoot, OwnRoot};
use crate::clock::UnixSeconds;
use crate::model::OperatorScope;

/// A root that is about to follow another.
#[derive(Debug)]
pub struct Rotation {
    /// Number of the new root; the first one of a mesh has number 1.
    pub number: u32,
    /// Signs the document that announces it.
    pub old: DocumentKey,
    /// The new root.
    pub root: CertificateDer<'static>,
    /// The new root's signature for the old one.
    pub proof: Vec<u8>,
    /// The issuers' new certificates.
    pub issuers: Vec<CertificateDer<'static>>,
}

/// Of the files of further operators among those of the next root.
const OPERATOR_PREFIX: &str = "operator.";

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Write { path, source }
}

impl CaDir {
    /// Makes the next root and certifies every issuer and the operator with it, or takes up what an earlier run made.
    ///
    /// # Errors
    /// [`CaError`]: a file cannot be read or written; the old root stays in use.
    ///
    /// `own`: a root that the operator brings in the place of a made one; needed where the one in use is such a root.
    pub fn prepare_rotation(&self, own: Option<OwnRoot<'_>>, now: UnixSeconds) -> Result<Rotation, PkiError> {
        let dir = self.path();
        let next = dir.join("next");
        if self.is_offline() {
            return Err(CaError::Offline.into());
        }
        if !next.join("root.key").exists() {
            if own.is_none() && self.has_own_root() {
                return Err(CaError::NextRootNeeded.into());
            }
            self.make_next(&next, own, now)?;
        }
        let root = ca::read_certificate(&next.join("root.crt"))?;
        let old = DocumentKey::load(dir, super::Signatory::Root)?;
        let key = ca::read_key(&next.join("root.key"))?;
        let path = next.join("root.crt");
        let domain = ca::domain_of(dir, &root)?;
        let new = DocumentKey::new(key, root.clone(), root.clone(), domain).ok_or(CaError::KeyMismatch { path })?;
        let proof = new.sign_link(old.certificate())?;
        let issuers = self.issuers()?.into_iter().map(|issuer| {
            let path = next.join(format!("{}.crt", issuer.name));
            if path.exists() { ca::read_certificate(&path).map(Some) } else { Ok(None) }
        });
        let issuers = issuers.filter_map(Result::transpose).collect::<Result<Vec<_>, CaError>>()?;
        Ok(Rotation { number: self.root_number()? + 1, old, root, proof, issuers })
    }

    fn make_next(&self, next: &Path, own: Option<OwnRoot<'_>>, now: UnixSeconds) -> Result<(), PkiError> {
        let dir = self.path();
        let domain = ca::domain_of(dir, &ca::read_certificate(&dir.join("root.crt"))?)?;
        let made = |source| PkiError::Make { what: "the next root", source };
        let root = if let Some(own) = own {
            own_root::next_root(own, &domain, now)?
        } else {
            let key = generate_key()?;
            let root = root_params(&domain, now)?.self_signed(&key).map_err(made)?;
            let validity = Validity::starting(now, ISSUER_LIFE, None);
            NextRoot { key, key_path: None, certificate: root.der().clone(), pem: root.pem(), validity }
        };
        let signer = rcgen::Issuer::from_ca_cert_der(&root.certificate, &root.key).map_err(made)?;
        let mut files: Vec<(String, String)> = Vec::new();
        for issuer in self.issuers()? {
            let own: KeyPair = ca::read_key(&dir.join(&issuer.name).join("issuer.key"))?;
            let name = issuer.name.replace('-', " ");
            let params = issuer_params(&domain, &name, root.validity)?;
            files.push((format!("{}.crt", issuer.name), params.signed_by(&own, &signer).map_err(made)?.pem()));
        }
        let own = ca::read_key(&dir.join("operator/operator.key"))?;
        let name = "operator".parse().expect("a fixed, well-formed name");
        files.push((
            "operator.crt".to_owned(),
            operator_params(&domain, &name, &OperatorScope::all(), root.validity)?
                .signed_by(&own, &signer)
                .map_err(made)?
                .pem(),
        ));
        let signing = SigningRoot { domain, key: root.key, certificate: root.certificate, pem: root.pem };
        for (name, pem) in self.operators_under(&signing, now)? {
            files.push((format!("{OPERATOR_PREFIX}{name}.crt"), [pem, signing.pem.clone()].concat()));
        }
        Ok(ca::build(next, |partial| {
            match &root.key_path {
                Some(path) => own_root::link(path, &partial.join("root.key"))?,
                None => ca::write(&partial.join("root.key"), &signing.key.serialize_pem(), 0o600)?,
            }
            ca::write(&partial.join("root.crt"), &signing.pem, 0o644)?;
            files.iter().try_for_each(|(name, pem)| ca::write(&partial.join(name), pem, 0o644))
        })?)
    }

    /// The number of the root in use: one more than the roots that it followed.
    fn root_number(&self) -> Result<u32, CaError> {
        let roots = self.path().join("roots");
        if !roots.is_dir() {
            return Ok(1);
        }
        let failed = |source| CaError::Read { path: roots.clone(), source };
        let count = fs::read_dir(&roots).map_err(failed)?.count();
        Ok(u32::try_from(count).unwrap_or(u32::MAX - 1) + 1)
    }

    /// Puts the prepared root in the old one's place, which is kept under `roots/`; returns where.
    ///
    /// # Errors
    /// [`CaError::Write`]; the next call goes on where this one stopped.
    pub fn commit_rotation(&self) -> Result<PathBuf, PkiError> {
        let dir = self.path();
        let (next, kept) = (dir.join("next"), dir.join("roots").join(self.root_number()?.to_string()));
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(write_error(to));
        for issuer in self.issuers()? {
            let (fresh, own) = (next.join(format!("{}.crt", issuer.name)), dir.join(&issuer.name));
            if fresh.exists() {
                rename(&fresh, &own.join("issuer.crt"))?;
                fs::copy(next.join("root.crt"), own.join("root.crt")).map_err(write_error(&own))?;
            }
        }
        if next.join("operator.crt").exists() {
            rename(&next.join("operator.crt"), &dir.join("operator/operator.crt"))?;
        }
        for operator in self.operators()? {
            let fresh = next.join(format!("{OPERATOR_PREFIX}{}.crt", operator.name));
            if fresh.exists() {
                rename(&fresh, &self.recorded(&operator.name))?;
            }
        }
        // The old root is moved as a whole: its directory appears only once it is complete.
        ca::build(&kept, |partial| {
            let (crt, key) = (partial.join("root.crt"), partial.join("root.key"));
            fs::copy(dir.join("root.crt"), &crt).map_err(write_error(&crt))?;
            // The key of an operator's own root stays where it is.
            match fs::read_link(dir.join("root.key")) {
                Ok(target) => own_root::link(&target, &key),
                Err(_) => fs::copy(dir.join("root.key"), &key).map(drop).map_err(write_error(&key)),
            }
        })?;
        for file in ["root.crt", "root.key"] {
            rename(&next.join(file), &dir.join(file))?;
        }
        fs::remove_dir(&next).map_err(write_error(&next))?;
        Ok(kept)
    }

    /// The certificate of the root before the one in use; none if there was none.
    ///
    /// # Errors
    /// [`CaError::Read`] if it cannot be read.
    pub fn previous_root(&self) -> Result<Option<CertificateDer<'static>>, PkiError> {
        let number = self.root_number()?;
        if number < 2 {
            return Ok(None);
        }
        let path = self.path().join("roots").join((number - 1).to_string()).join("root.crt");
        Ok(Some(ca::read_certificate(&path)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Issuer, Signatory, create_token, verify_link};
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    #[test]
    fn a_rotation_certifies_the_same_keys_anew_and_can_be_taken_up_again() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        ca.create_issuer(NOW).unwrap();
        let before = Issuer::load(&dir.join("issuer-2")).unwrap();
        let first = ca.prepare_rotation(None, NOW).unwrap();
        let again = ca.prepare_rotation(None, NOW).unwrap();
        assert_eq!((first.number, &first.root, first.issuers.len()), (2, &again.root, 2));
        verify_link(first.old.certificate(), &first.root, &first.proof, &"td".parse().unwrap()).unwrap();
        assert!(verify_link(&first.root, &first.root, &first.proof, &"td".parse().unwrap()).is_err());
        // Nothing changed yet: the mesh does not know the new root.
        assert_eq!(Issuer::load(&dir.join("issuer-2")).unwrap().bundle(), before.bundle());

        let kept = ca.commit_rotation().unwrap();
        assert_eq!(kept, dir.join("roots/1"));
        let after = Issuer::load(&dir.join("issuer-2")).unwrap();
        assert_eq!(after.spki().unwrap(), before.spki().unwrap());
        assert_eq!(after.bundle().roots, std::slice::from_ref(&first.root));
        let root = DocumentKey::load(&dir, Signatory::Root).unwrap();
        assert_eq!(root.certificate(), &first.root);
        assert_eq!(ca.previous_root().unwrap().as_ref(), Some(first.old.certificate()));
        let claims = super::super::TokenClaims {
            id: [0; 16],
            node: "*".parse().unwrap(),
            serve: "web".parse().unwrap(),
            not_after: NOW,
            uses: 0,
        };
        create_token(&dir, &claims).unwrap().verify(after.bundle(), NOW).unwrap();
        assert_eq!(ca.prepare_rotation(None, NOW).unwrap().number, 3);
    }
}

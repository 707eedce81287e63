//! Operators of a CA directory: who signs for the mesh, and what.
//!
//! ```text
//!   dir/operator/            the first operator, which may sign everything that operators may
//!   dir/operators/NAME.crt   the certificates of further ones; their keys leave the directory in one file each
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::ca::{self, CaDir, CaError};
use super::certificate::{Validity, generate_key, operator_params};
use super::{CertificateFacts, PkiError, facts_of, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope};

/// An operator of a CA directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorEntry {
    /// Its name.
    pub name: NodeName,
    /// What it may sign.
    pub may: OperatorScope,
    /// Its certificate.
    pub facts: CertificateFacts,
}

impl CaDir {
    /// Certifies an operator for `life` and writes its key, its certificate and the root to `out`. Needs the root key.
    ///
    /// # Errors
    /// [`CaError::Exists`] if the name or the file is taken, [`CaError::Read`] without the root key,
    /// [`CaError::RootExpired`], [`CaError::Write`].
    pub fn create_operator(
        &self,
        name: &NodeName,
        may: &OperatorScope,
        life: Duration,
        out: &Path,
        now: UnixSeconds,
    ) -> Result<UnixSeconds, PkiError> {
        let recorded = self.recorded(name);
        for path in [&recorded, &out.to_owned()] {
            if path.symlink_metadata().is_ok() {
                return Err(CaError::Exists { path: path.clone() }.into());
            }
        }
        if self.is_offline() {
            return Err(CaError::Offline.into());
        }
        let (key, root) = (ca::read_key(&self.path().join("root.key"))?, self.root()?);
        if verify::public_key_of(&root)? != key.public_key_raw() {
            return Err(CaError::KeyMismatch { path: self.path().join("root.crt") }.into());
        }
        let (_, until) = verify::validity_of(&root)?;
        if now >= until {
            return Err(CaError::RootExpired { until }.into());
        }
        let domain = ca::domain_of(self.path(), &root)?;
        let validity = Validity::starting(now, life, Some(until));
        let made = |source| PkiError::Make { what: "an operator", source };
        let signer = rcgen::Issuer::from_ca_cert_der(&root, &key).map_err(made)?;
        let own = generate_key()?;
        let certificate = operator_params(&domain, name, may, validity)?.signed_by(&own, &signer).map_err(made)?;
        let directory = self.path().join("operators");
        if !directory.is_dir() {
            ca::make_dir(&directory)?;
        }
        let root_path = self.path().join("root.crt");
        let root_pem =
            fs::read_to_string(&root_path).map_err(|source| CaError::Read { path: root_path.clone(), source })?;
        ca::write(out, &[own.serialize_pem(), certificate.pem(), root_pem].concat(), 0o600)?;
        // Last: a name is taken once its file is whole.
        ca::write(&recorded, &certificate.pem(), 0o644)?;
        Ok(validity.not_after)
    }

    /// Lists the operators: the first one, then the others in order of name.
    ///
    /// # Errors
    /// [`CaError::Read`] if the directory or a certificate cannot be read.
    pub fn operators(&self) -> Result<Vec<OperatorEntry>, PkiError> {
        let mut paths = vec![self.path().join("operator/operator.crt")];
        let directory = self.path().join("operators");
        if directory.is_dir() {
            let failed = |source| CaError::Read { path: directory.clone(), source };
            let entries = fs::read_dir(&directory).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()));
            let mut found = entries.collect::<Result<Vec<PathBuf>, _>>().map_err(failed)?;
            found.retain(|path| path.extension().is_some_and(|end| end == "crt"));
            found.sort();
            paths.extend(found);
        }
        paths.retain(|path| path.exists());
        paths.iter().map(|path| entry(path)).collect()
    }

    fn recorded(&self, name: &NodeName) -> PathBuf {
        self.path().join("operators").join(format!("{name}.crt"))
    }

    fn root(&self) -> Result<CertificateDer<'static>, CaError> {
        ca::read_certificate(&self.path().join("root.crt"))
    }
}

fn entry(path: &Path) -> Result<OperatorEntry, PkiError> {
    let certificate = ca::read_certificate(path)?;
    let facts = facts_of(&certificate)?;
    // Listed with what it says, though it may have ended or stand under an older root.
    let (name, may) = verify::operator_of(&certificate)?;
    Ok(OperatorEntry { name, may, facts })
}

/// Reads an operator's file: key, certificate, root. Only its owner may be able to read it.
pub(super) fn read_file(path: &Path) -> Result<(KeyPair, CertificateDer<'static>, CertificateDer<'static>), CaError> {
    let pem = ca::read_private(path)?;
    let bad = |what| CaError::Pem { path: path.to_owned(), what };
    let key = ca::key_of(&pem).ok_or_else(|| bad("P-256 private key"))?;
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok);
    match (certificates.next(), certificates.next()) {
        (Some(certificate), Some(root)) => Ok((key, certificate, root)),
        _ => Err(bad("operator's certificate followed by the root's")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DocumentKey, DocumentSigner, Issuer, Token, TokenClaims, TokenError, create_token};
    use super::*;
    use crate::model::Right;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn an_operator_is_certified_with_its_rights_and_listed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let (name, out) = ("alice".parse().unwrap(), temp.path().join("alice.operator"));
        let may: OperatorScope = "intentions,config:web*".parse().unwrap();
        let ends = ca.create_operator(&name, &may, DAY * 30, &out, NOW).unwrap();
        assert_eq!(ends, NOW.plus(DAY * 30));
        let key = DocumentKey::load_operator(&out).unwrap();
        assert_eq!(key.may(NOW).unwrap(), (DocumentSigner::Operator(name.clone()), may.clone()));
        assert!(key.may(NOW.plus(DAY * 31)).is_err());
        let listed: Vec<(String, String)> =
            ca.operators().unwrap().into_iter().map(|one| (one.name.to_string(), one.may.to_string())).collect();
        let want = [("operator", "*"), ("alice", "intentions,config:web*")];
        assert_eq!(listed, want.map(|(name, may)| (name.to_owned(), may.to_owned())));

        let taken = ca.create_operator(&name, &may, DAY, &temp.path().join("b"), NOW).unwrap_err();
        assert!(matches!(taken, PkiError::Ca(CaError::Exists { .. })));
        std::fs::set_permissions(&out, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let readable = DocumentKey::load_operator(&out).unwrap_err().to_string();
        assert!(readable.contains("chmod 600"), "{readable}");
    }

    #[test]
    fn an_operator_without_the_right_makes_no_tokens() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let out = temp.path().join("alice.operator");
        let may: OperatorScope = "intentions".parse().unwrap();
        assert!(!may.allows(Right::Tokens, ""));
        ca.create_operator(&"alice".parse().unwrap(), &may, DAY, &out, NOW).unwrap();
        // The file holds both: the key first, then its certificate.
        for file in ["operator.key", "operator.crt"] {
            std::fs::write(dir.join("operator").join(file), std::fs::read(&out).unwrap()).unwrap();
        }
        let claims = TokenClaims {
            id: [0; 16],
            node: "*".parse().unwrap(),
            serve: "web".parse().unwrap(),
            not_after: NOW,
            uses: 0,
        };
        let token: Token = create_token(&dir, &claims).unwrap();
        let issuer = Issuer::load(&dir.join("issuer-1")).unwrap();
        assert!(matches!(token.verify(issuer.bundle(), NOW), Err(TokenError::NotAllowed { .. })));
    }
}

//! Operators of a CA directory: who signs for the mesh, and what.
//!
//! ```text
//!   dir/operator/            the first operator, which may sign everything that operators may
//!   dir/operators/NAME.crt   the certificates of further ones; their keys leave the directory in one file each
//! ```
//!
//! A renewal and a rotation certify the same keys anew: the new certificate is put into the operator's file by its owner.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{KeyPair, PublicKeyData, SubjectPublicKeyInfo};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::ca::{self, CaDir, CaError};
use super::certificate::{Validity, generate_key, operator_params};
use super::{CertificateFacts, PkiError, facts_of, pem, verify};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, TrustDomain};

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
        let root = self.signing_root(now)?;
        let own = generate_key()?;
        let (certificate, until) = root.certify(name, may, &own, now.plus(life), now)?;
        let directory = self.path().join("operators");
        if !directory.is_dir() {
            ca::make_dir(&directory)?;
        }
        ca::write(out, &[own.serialize_pem(), certificate.clone(), root.pem].concat(), 0o600)?;
        // Last: a name is taken once its file is whole.
        ca::write(&recorded, &certificate, 0o644)?;
        Ok(until)
    }

    /// Certifies the key of operator `name` for another `life`, with the rights that it has; returns the file of the new
    /// certificate and its end. Needs the root key. See [`adopt_certificate`].
    ///
    /// # Errors
    /// [`CaError::Read`] if the directory knows no such operator or without the root key; else as
    /// [`CaDir::create_operator`].
    pub fn renew_operator(
        &self,
        name: &NodeName,
        life: Duration,
        now: UnixSeconds,
    ) -> Result<(PathBuf, UnixSeconds), PkiError> {
        let recorded = self.recorded(name);
        let held = ca::read_certificate(&recorded)?;
        let root = self.signing_root(now)?;
        let (certificate, until) = root.certify_again(&held, now.plus(life), now)?;
        let partial = recorded.with_extension("partial");
        // With the root, which may be another than that of the operator's file.
        ca::write(&partial, &[certificate, root.pem].concat(), 0o644)?;
        fs::rename(&partial, &recorded).map_err(|source| CaError::Write { path: recorded.clone(), source })?;
        Ok((recorded, until))
    }

    fn signing_root(&self, now: UnixSeconds) -> Result<SigningRoot, PkiError> {
        if self.is_offline() {
            return Err(CaError::Offline.into());
        }
        let (key, certificate) = (ca::read_key(&self.path().join("root.key"))?, self.root()?);
        if verify::public_key_of(&certificate)? != key.public_key_raw() {
            return Err(CaError::KeyMismatch { path: self.path().join("root.crt") }.into());
        }
        let (_, until) = verify::validity_of(&certificate)?;
        if now >= until {
            return Err(CaError::RootExpired { until }.into());
        }
        let path = self.path().join("root.crt");
        let pem = fs::read_to_string(&path).map_err(|source| CaError::Read { path: path.clone(), source })?;
        let domain = ca::domain_of(self.path(), &certificate)?;
        Ok(SigningRoot { domain, key, certificate, pem })
    }

    /// Certifies every further operator anew under `root`: its name and the certificate in PEM, which ends when the one in
    /// use does.
    pub(super) fn operators_under(
        &self,
        root: &SigningRoot,
        now: UnixSeconds,
    ) -> Result<Vec<(String, String)>, PkiError> {
        let mut renewed = Vec::new();
        for path in self.operator_files()? {
            let held = ca::read_certificate(&path)?;
            let (_, ends) = verify::validity_of(&held)?;
            if ends > now {
                let (name, _) = verify::operator_of(&held)?;
                renewed.push((name.to_string(), root.certify_again(&held, ends, now)?.0));
            }
        }
        Ok(renewed)
    }

    /// Lists the operators: the first one, then the others in order of name.
    ///
    /// # Errors
    /// [`CaError::Read`] if the directory or a certificate cannot be read.
    pub fn operators(&self) -> Result<Vec<OperatorEntry>, PkiError> {
        let mut paths = vec![self.path().join("operator/operator.crt")];
        paths.extend(self.operator_files()?);
        paths.retain(|path| path.exists());
        paths.iter().map(|path| entry(path)).collect()
    }

    /// The certificates of the further operators, in order of name.
    fn operator_files(&self) -> Result<Vec<PathBuf>, CaError> {
        let directory = self.path().join("operators");
        if !directory.is_dir() {
            return Ok(Vec::new());
        }
        let failed = |source| CaError::Read { path: directory.clone(), source };
        let entries = fs::read_dir(&directory).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()));
        let mut found = entries.collect::<Result<Vec<PathBuf>, _>>().map_err(failed)?;
        found.retain(|path| path.extension().is_some_and(|end| end == "crt"));
        found.sort();
        Ok(found)
    }

    pub(super) fn recorded(&self, name: &NodeName) -> PathBuf {
        self.path().join("operators").join(format!("{name}.crt"))
    }

    fn root(&self) -> Result<CertificateDer<'static>, CaError> {
        ca::read_certificate(&self.path().join("root.crt"))
    }
}

/// A root with its key.
pub(super) struct SigningRoot {
    pub(super) domain: TrustDomain,
    pub(super) key: KeyPair,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
}

impl SigningRoot {
    /// Certifies `key` until `ends`, or the root's own end; returns the certificate in PEM and its end.
    fn certify(
        &self,
        name: &NodeName,
        may: &OperatorScope,
        key: &impl PublicKeyData,
        ends: UnixSeconds,
        now: UnixSeconds,
    ) -> Result<(String, UnixSeconds), PkiError> {
        let (_, until) = verify::validity_of(&self.certificate)?;
        let validity = Validity::starting(now, Duration::from_secs(ends.0.saturating_sub(now.0)), Some(until));
        let made = |source| PkiError::Make { what: "an operator", source };
        let signer = rcgen::Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(made)?;
        let params = operator_params(&self.domain, name, may, validity)?;
        Ok((params.signed_by(key, &signer).map_err(made)?.pem(), validity.not_after))
    }

    /// Certifies the key, the name and the rights of a certificate that this directory keeps.
    fn certify_again(
        &self,
        held: &CertificateDer<'_>,
        ends: UnixSeconds,
        now: UnixSeconds,
    ) -> Result<(String, UnixSeconds), PkiError> {
        let (name, may) = verify::operator_of(held)?;
        let made = |source| PkiError::Make { what: "an operator", source };
        let key = SubjectPublicKeyInfo::from_der(&verify::spki_der_of(held)?).map_err(made)?;
        self.certify(&name, &may, &key, ends, now)
    }
}

/// Puts a newer certificate into an operator's file: the same key, certified again (`weft ca operator renew`, or a
/// rotation). `given` holds the certificate and, if the root is another now, the root's.
///
/// # Errors
/// [`CaError::Pem`] if `given` holds no certificate, [`CaError::KeyMismatch`] if it is another key's, [`PkiError::Verify`] if
/// the certificate is no operator's, [`CaError::Write`]; the file stays as it was.
pub fn adopt_certificate(path: &Path, given: &str) -> Result<OperatorEntry, PkiError> {
    let (key, _, root) = read_file(path)?;
    let mut given = CertificateDer::pem_slice_iter(given.as_bytes()).filter_map(Result::ok);
    let bad = || CaError::Pem { path: path.to_owned(), what: "certificate" };
    let certificate = given.next().ok_or_else(bad)?;
    if verify::public_key_of(&certificate)? != key.public_key_raw() {
        return Err(CaError::KeyMismatch { path: path.to_owned() }.into());
    }
    let (name, may) = verify::operator_of(&certificate)?;
    let root = given.next().unwrap_or(root);
    // A file whose certificate does not stand under its root would sign what nobody believes.
    let bundle = verify::bundle_of(&root, &verify::domain_of(&certificate)?)?;
    verify::check_operator(&certificate, &bundle, verify::validity_of(&certificate)?.1)?;
    let block = |der: &CertificateDer<'_>| pem::pem("CERTIFICATE", der);
    let partial = path.with_extension("partial");
    let _left_by_a_failed_run = fs::remove_file(&partial);
    ca::write(&partial, &[key.serialize_pem(), block(&certificate), block(&root)].concat(), 0o600)?;
    fs::rename(&partial, path).map_err(|source| CaError::Write { path: path.to_owned(), source })?;
    Ok(OperatorEntry { name, may, facts: facts_of(&certificate)? })
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
    fn an_operator_is_certified_again_and_its_file_takes_no_other_certificate() {
        let temp = tempfile::tempdir().unwrap();
        let ca = CaDir::init(&temp.path().join("ca"), &"td".parse().unwrap(), NOW).unwrap();
        let may: OperatorScope = "intentions:web*".parse().unwrap();
        let [alice, bob] = ["alice", "bob"].map(|name| {
            let out = temp.path().join(name);
            ca.create_operator(&name.parse().unwrap(), &may, DAY, &out, NOW).unwrap();
            out
        });
        let later = NOW.plus(DAY * 2);
        assert!(DocumentKey::load_operator(&alice).unwrap().may(later).is_err(), "it has ended");
        let (file, ends) = ca.renew_operator(&"alice".parse().unwrap(), DAY * 9, later).unwrap();
        assert_eq!(ends, later.plus(DAY * 9));
        let pem = std::fs::read_to_string(file).unwrap();
        let before = std::fs::read(&bob).unwrap();
        assert!(matches!(adopt_certificate(&bob, &pem), Err(PkiError::Ca(CaError::KeyMismatch { .. }))));
        assert!(adopt_certificate(&bob, "no certificate").is_err());
        assert_eq!(std::fs::read(&bob).unwrap(), before, "what was refused changed nothing");
        let old = DocumentKey::load_operator(&alice).unwrap().spki().unwrap();
        assert_eq!(adopt_certificate(&alice, &pem).unwrap().name.as_str(), "alice");
        let key = DocumentKey::load_operator(&alice).unwrap();
        assert_eq!(key.may(later).unwrap(), (DocumentSigner::Operator("alice".parse().unwrap()), may));
        assert_eq!(key.spki().unwrap(), old, "the same key");

        // A rotation certifies everybody whose certificate has not ended: of the two only alice.
        ca.prepare_rotation(None, later).unwrap();
        ca.commit_rotation().unwrap();
        let pem = std::fs::read_to_string(ca.recorded(&"alice".parse().unwrap())).unwrap();
        adopt_certificate(&alice, &pem).unwrap();
        let key = DocumentKey::load_operator(&alice).unwrap();
        let root = DocumentKey::load(ca.path(), super::super::Signatory::Root).unwrap();
        assert_eq!(key.bundle().unwrap().roots, root.bundle().unwrap().roots, "the new root");
        assert_eq!(key.validity().unwrap().1, ends, "as long as before");
        assert!(key.may(later).is_ok());
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

//! An operator's own root in the place of a made one, so that weft's certificates lead to the root that the rest of the
//! company trusts.
//!
//! ```text
//!   root.pem + key   init_under -> root.crt, root.key (a link: the key is not copied), issuer-1/, operator/
//!   root.pem alone   init_under -> root.crt, issuer-1/issuer.csr, operator/operator.csr, sign.cnf
//!                    whoever holds the key signs both    -> issuer.crt, operator.crt beside them -> check
//! ```
//!
//! Invariants: the root's key is read where it lies and never written; what is made under a root is verified against it
//! before a file is; a root that names no trust domain serves the one that its issuers and operators name.
//! What cannot be: a root that is not ECDSA P-256 (the verifier knows one algorithm, by design); an intermediate of the
//! company's as weft's root (chains are leaf, node, issuer, root: a fifth certificate would cost every handshake, and its
//! owner could certify issuers); rotation, further issuers and voiding an operator without the root's key.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::public_key::PublicKey;

use super::ca::{self, CaDir, CaError};
use super::certificate::{ISSUER_LIFE, Validity, generate_key};
use super::verify::{self, ROOT_PATH_LENGTH, Utc};
use super::{CertificateFacts, Issuer, PkiError, TrustBundle, VerifyError, facts_of};
use crate::clock::UnixSeconds;
use crate::model::{OperatorScope, TrustDomain};

/// The file that tells OpenSSL what to put into the certificates.
const SIGN_FILE: &str = "sign.cnf";

/// A root that the operator brings.
#[derive(Debug, Clone, Copy)]
pub struct OwnRoot<'a> {
    /// PEM file of its certificate.
    pub certificate: &'a Path,
    /// PEM file of its key; none: it stays offline, and its holder signs requests.
    pub key: Option<&'a Path>,
}

/// Why a certificate cannot be weft's root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootProblem {
    /// Another kind of key.
    #[error("its key is {found}; weft's chains are ECDSA P-256 throughout: bring a P-256 root")]
    Key {
        /// Which.
        found: String,
    },
    /// Another kind of signature.
    #[error("it is not signed with ecdsa-with-SHA256, the only signature that weft's verifier knows")]
    Signature,
    /// It is an intermediate.
    #[error(
        "it is signed by another certificate (an intermediate); weft's chains end at a self-signed root: bring the root \
         itself, its key may stay offline (leave -root-key out)"
    )]
    NotSelfSigned,
    /// It is a leaf.
    #[error("it is no CA (basic constraints without CA:TRUE)")]
    NotCa,
    /// Too little room below it.
    #[error("its path length is {found}; weft needs {ROOT_PATH_LENGTH} or none: issuers and nodes sign below it")]
    PathLength {
        /// What it is.
        found: u32,
    },
    /// It may not sign.
    #[error("its key usage lacks keyCertSign")]
    Usage,
    /// Name constraints.
    #[error("it carries name constraints, which say nothing of SPIFFE ids and are refused by the verifier")]
    NameConstraints,
    /// It has ended.
    #[error("it was valid until {} and this host's clock says {}", Utc(*.until), Utc(*.now))]
    Ended {
        /// Its end.
        until: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// It begins later.
    #[error("it is valid from {} and this host's clock says {}", Utc(*.from), Utc(*.now))]
    Early {
        /// Its beginning.
        from: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// It names another trust domain.
    #[error("it is the root of trust domain `{0}`: give -trust-domain {0}, or another root")]
    Domain(TrustDomain),
    /// The key is another's.
    #[error("{} is not its key", key.display())]
    OtherKey {
        /// The key's file.
        key: PathBuf,
    },
    /// Any other rule of the verifier's.
    #[error("{0}")]
    Other(VerifyError),
}

/// What is still to be signed by the holder of an offline root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The signing request.
    pub request: PathBuf,
    /// Where its certificate belongs.
    pub certificate: PathBuf,
    /// The section of `sign.cnf` that it is signed with.
    pub section: &'static str,
}

impl Request {
    fn issuer(dir: &Path) -> Self {
        let at = |name: &str| dir.join(name);
        Self { request: at("issuer.csr"), certificate: at("issuer.crt"), section: "issuer" }
    }

    fn operator(dir: &Path) -> Self {
        let at = |name: &str| dir.join(name);
        Self { request: at("operator.csr"), certificate: at("operator.crt"), section: "operator" }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (request, certificate, section) = (self.request.display(), self.certificate.display(), self.section);
        let sign = self.request.parent().and_then(Path::parent).unwrap_or(Path::new(".")).join(SIGN_FILE);
        write!(
            f,
            "openssl x509 -req -sha256 -days 365 -in {request} -CA ROOT.pem -CAkey ROOT.key -CAcreateserial \
             -extfile {} -extensions {section} -out {certificate}",
            sign.display()
        )
    }
}

/// What [`CaDir::check`] found.
#[derive(Debug)]
pub struct Checked {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// The root.
    pub root: CertificateFacts,
    /// Issuers and operator that are good, by directory.
    pub good: Vec<(String, CertificateFacts)>,
    /// What waits for a signature.
    pub waiting: Vec<Request>,
}

/// A root that passed, with its key if it is here.
struct Root {
    bundle: TrustBundle,
    certificate: CertificateDer<'static>,
    pem: String,
    /// What is signed with it, made at the moment of reading.
    validity: Validity,
    key: Option<(KeyPair, PathBuf)>,
}

/// Reads and checks `own` for `domain`.
fn read_root(own: OwnRoot<'_>, domain: &TrustDomain, now: UnixSeconds) -> Result<Root, PkiError> {
    let pem = ca::read(own.certificate)?;
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| CaError::Pem { path: own.certificate.to_owned(), what: "certificate" })?;
    let refused = |problem| CaError::OwnRoot { path: own.certificate.to_owned(), problem };
    check_root(&certificate, now).map_err(refused)?;
    let bundle = verify::bundle_of(&certificate, domain).map_err(|error| match error {
        VerifyError::TrustDomain { theirs, .. } => refused(RootProblem::Domain(theirs)),
        error => refused(RootProblem::Other(error)),
    })?;
    let validity = Validity::within(now, ISSUER_LIFE, verify::validity_of(&certificate)?);
    let key = own.key.map(|path| {
        let key = ca::read_key(path)?;
        if verify::public_key_of(&certificate)? != key.public_key_raw() {
            return Err(PkiError::from(refused(RootProblem::OtherKey { key: path.to_owned() })));
        }
        // The link must hold wherever the next verb runs.
        let path = fs::canonicalize(path).map_err(|source| CaError::Read { path: path.to_owned(), source })?;
        Ok((key, path))
    });
    Ok(Root { bundle, certificate, pem, validity, key: key.transpose()? })
}

/// Names what keeps a certificate from being weft's root, the plainest reason first.
fn check_root(der: &CertificateDer<'_>, now: UnixSeconds) -> Result<(), RootProblem> {
    let root = verify::parse("root", der).map_err(RootProblem::Other)?;
    if let Some(found) = other_key(&root) {
        return Err(RootProblem::Key { found });
    }
    if root.issuer().as_raw() != root.subject().as_raw() {
        return Err(RootProblem::NotSelfSigned);
    }
    if root.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
        return Err(RootProblem::Signature);
    }
    let constraints = root.basic_constraints().ok().flatten().map(|found| found.value);
    let constraints = constraints.filter(|found| found.ca).ok_or(RootProblem::NotCa)?;
    if let Some(found) = constraints.path_len_constraint.filter(|length| *length < ROOT_PATH_LENGTH) {
        return Err(RootProblem::PathLength { found });
    }
    if !root.key_usage().ok().flatten().is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(RootProblem::Usage);
    }
    if !matches!(root.name_constraints(), Ok(None)) {
        return Err(RootProblem::NameConstraints);
    }
    let (from, until) = (verify::seconds(root.validity().not_before), verify::seconds(root.validity().not_after));
    match now {
        now if now < from => Err(RootProblem::Early { from, now }),
        now if now >= until => Err(RootProblem::Ended { until, now }),
        _ => Ok(()),
    }
}

/// Names the kind of a key that is not P-256.
fn other_key(certificate: &X509Certificate<'_>) -> Option<String> {
    let key = certificate.public_key();
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if key.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        return (curve != Some(OID_EC_P256)).then(|| "on another curve than P-256".to_owned());
    }
    Some(match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => format!("RSA with {} bits", rsa.key_size()),
        _ => format!("of the kind {}", key.algorithm.algorithm),
    })
}

impl CaDir {
    /// Makes issuer and operator under a root that the operator brings: `dir` must not exist or be empty.
    ///
    /// With the root's key they are certified at once, and `root.key` is a link to it. Without, their signing requests are
    /// returned.
    ///
    /// # Errors
    /// [`CaError::OwnRoot`] with what is wrong with the root, [`CaError::Readable`], and as [`CaDir::init`].
    pub fn init_under(
        dir: &Path,
        trust_domain: &TrustDomain,
        own: OwnRoot<'_>,
        now: UnixSeconds,
    ) -> Result<(Self, Vec<Request>), PkiError> {
        ca::must_be_free(dir)?;
        let root = read_root(own, trust_domain, now)?;
        let Some((key, path)) = &root.key else {
            request_all(dir, trust_domain, &root)?;
            let requests = vec![Request::issuer(&dir.join("issuer-1")), Request::operator(&dir.join("operator"))];
            return Ok((Self::open(dir), requests));
        };
        let signer = ca::signer(&root.certificate, key)?;
        let issuer = ca::make_issuer(&signer, trust_domain, 1, root.validity)?;
        let operator = ca::make_operator(&signer, trust_domain, root.validity)?;
        verify::check_issuer(issuer.certificate.der(), &root.bundle, now)?;
        verify::check_operator(operator.certificate.der(), &root.bundle, now)?;
        ca::build(dir, |partial| {
            ca::write(&partial.join("root.crt"), &root.pem, 0o644)?;
            link(path, &partial.join("root.key"))?;
            let issuer_dir = partial.join("issuer-1");
            ca::make_dir(&issuer_dir)?;
            ca::write_pair(&issuer_dir, "issuer", &issuer)?;
            ca::write(&issuer_dir.join("root.crt"), &root.pem, 0o644)?;
            let operator_dir = partial.join("operator");
            ca::make_dir(&operator_dir)?;
            ca::write_pair(&operator_dir, "operator", &operator)
        })?;
        Ok((Self::open(dir), Vec::new()))
    }

    /// Whether the root's key lies elsewhere: it is an operator's own.
    pub fn has_own_root(&self) -> bool {
        fs::read_link(self.path().join("root.key")).is_ok() || self.is_offline()
    }

    /// Whether the root's key is not here and its holder signs requests.
    pub(super) fn is_offline(&self) -> bool {
        self.path().join("root.key").symlink_metadata().is_err() && self.path().join(SIGN_FILE).exists()
    }

    /// Makes the key and the signing request of issuer `number`.
    pub(super) fn request_issuer(&self, dir: &Path, number: u32) -> Result<Request, PkiError> {
        let root = ca::read(&self.path().join("root.crt"))?;
        let (key, request) = request(&format!("issuer {number}"), "issuer")?;
        ca::build(dir, |partial| write_request(partial, "issuer", &key, &request, Some(&root)))?;
        Ok(Request::issuer(dir))
    }

    /// Checks root, issuers and operator as the mesh will, and lists what is not signed yet.
    ///
    /// # Errors
    /// The first file that breaks a rule, and the rule.
    pub fn check(&self, now: UnixSeconds) -> Result<Checked, PkiError> {
        let dir = self.path();
        let path = dir.join("root.crt");
        let root = ca::read_certificate(&path)?;
        check_root(&root, now).map_err(|problem| CaError::OwnRoot { path, problem })?;
        let (mut good, mut waiting, mut domain) = (Vec::new(), Vec::new(), None);
        for name in self.issuer_names()? {
            let request = Request::issuer(&dir.join(&name));
            if !request.certificate.exists() {
                waiting.push(request);
                continue;
            }
            let found = |source: PkiError| CaError::Unusable { path: dir.join(&name), source: Box::new(source) };
            let issuer = Issuer::load(&dir.join(&name)).map_err(found)?;
            verify::check_issuer(issuer.certificate(), issuer.bundle(), now).map_err(|error| found(error.into()))?;
            domain = Some(issuer.bundle().trust_domain.clone());
            good.push((name, facts_of(issuer.certificate())?));
        }
        let request = Request::operator(&dir.join("operator"));
        if request.certificate.exists() {
            let found =
                |source: PkiError| CaError::Unusable { path: request.certificate.clone(), source: Box::new(source) };
            let operator = ca::read_certificate(&request.certificate)?;
            let key = ca::read_key(&dir.join("operator/operator.key"))?;
            if verify::public_key_of(&operator)? != key.public_key_raw() {
                return Err(CaError::KeyMismatch { path: request.certificate }.into());
            }
            let named = verify::domain_of(&operator).map_err(|error| found(error.into()))?;
            let bundle = verify::bundle_of(&root, domain.as_ref().unwrap_or(&named))?;
            verify::check_operator(&operator, &bundle, now).map_err(|error| found(error.into()))?;
            domain = Some(named);
            good.push(("operator".to_owned(), facts_of(&operator)?));
        } else {
            waiting.push(request);
        }
        let trust_domain = domain.map_or_else(|| domain_to_be(dir), Ok)?;
        Ok(Checked { trust_domain, root: facts_of(&root)?, good, waiting })
    }
}

/// A root that follows another.
pub(super) struct NextRoot {
    pub(super) key: KeyPair,
    /// Where the key lies, if it is the operator's own.
    pub(super) key_path: Option<PathBuf>,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
    /// What is signed with it.
    pub(super) validity: Validity,
}

/// Reads a root that the operator brings for a rotation.
pub(super) fn next_root(own: OwnRoot<'_>, domain: &TrustDomain, now: UnixSeconds) -> Result<NextRoot, PkiError> {
    let Root { certificate, pem, validity, key, .. } = read_root(own, domain, now)?;
    // It signs for the root before it, issuers and operator in one step.
    let (key, path) = key.ok_or(CaError::Offline)?;
    Ok(NextRoot { key, key_path: Some(path), certificate, pem, validity })
}

/// Links `to` to a key that stays where it is.
pub(super) fn link(key: &Path, to: &Path) -> Result<(), CaError> {
    symlink(key, to).map_err(|source| CaError::Write { path: to.to_owned(), source })
}

/// The trust domain that `sign.cnf` asks for: nothing is signed yet.
fn domain_to_be(dir: &Path) -> Result<TrustDomain, PkiError> {
    let path = dir.join(SIGN_FILE);
    let text = ca::read(&path)?;
    let named = text.lines().find_map(|line| line.strip_prefix("subjectAltName = URI:spiffe://"));
    let domain = named.and_then(|named| named.parse().ok());
    domain.ok_or_else(|| CaError::Pem { path, what: "trust domain" }.into())
}

fn request_all(dir: &Path, domain: &TrustDomain, root: &Root) -> Result<(), PkiError> {
    let issuer = request("issuer 1", "issuer")?;
    let operator = request("operator", "operator")?;
    Ok(ca::build(dir, |partial| {
        ca::write(&partial.join("root.crt"), &root.pem, 0o644)?;
        ca::write(&partial.join(SIGN_FILE), &sign_file(domain), 0o644)?;
        let (issuer_dir, operator_dir) = (partial.join("issuer-1"), partial.join("operator"));
        ca::make_dir(&issuer_dir)?;
        write_request(&issuer_dir, "issuer", &issuer.0, &issuer.1, Some(&root.pem))?;
        ca::make_dir(&operator_dir)?;
        write_request(&operator_dir, "operator", &operator.0, &operator.1, None)
    })?)
}

/// A key and its signing request. The request carries a subject alone: `sign.cnf` says the rest, so that whoever signs
/// reads in one place what is granted.
fn request(name: &str, role: &str) -> Result<(KeyPair, String), PkiError> {
    let key = generate_key()?;
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationalUnitName, format!("weft {role}"));
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let made = |source| PkiError::Make { what: "a signing request", source };
    let pem = params.serialize_request(&key).and_then(|request| request.pem()).map_err(made)?;
    Ok((key, pem))
}

fn write_request(dir: &Path, name: &str, key: &KeyPair, request: &str, root: Option<&str>) -> Result<(), CaError> {
    ca::write(&dir.join(format!("{name}.key")), &key.serialize_pem(), 0o600)?;
    ca::write(&dir.join(format!("{name}.csr")), request, 0o644)?;
    root.map_or(Ok(()), |root| ca::write(&dir.join("root.crt"), root, 0o644))
}

/// What the certificates must hold, for `openssl x509 -extfile`; other CAs take the same values.
fn sign_file(domain: &TrustDomain) -> String {
    let rights = super::extension::operator_line(&OperatorScope::all());
    format!(
        "# What the root's holder signs for weft. No other extension is needed; none of these may be left out.\n\
         [issuer]\n\
         basicConstraints = critical, CA:TRUE, pathlen:1\n\
         keyUsage = critical, keyCertSign, digitalSignature\n\
         subjectAltName = URI:spiffe://{domain}\n\
         subjectKeyIdentifier = hash\n\
         authorityKeyIdentifier = keyid\n\
         [operator]\n\
         basicConstraints = critical, CA:FALSE\n\
         keyUsage = critical, digitalSignature\n\
         subjectAltName = URI:spiffe://{domain}/operator/operator\n\
         subjectKeyIdentifier = hash\n\
         authorityKeyIdentifier = keyid\n\
         {rights}\n"
    )
}

#[cfg(test)]
#[path = "own_root_tests.rs"]
mod tests;

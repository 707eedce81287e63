//! The CA directory: the operator's root, issuers and operator key, as files.
//!
//! ```text
//!   dir/root.key  root.crt  issuer-1/{issuer.key,issuer.crt,root.crt}  operator/{operator.key,operator.crt}
//! ```
//!
//! Invariants: nothing is overwritten; keys have mode 0600, directories 0700; files appear under their names all at once,
//! by a rename of a finished `….partial` directory, so that a failed run leaves only that behind.
//! Not here: a CA that keeps state or runs as a service.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use super::certificate::{ISSUER_LIFE, Validity, generate_key, issuer_params, operator_params, root_params};
use super::document::DocumentKey;
use super::own_root::{Request, RootProblem};
use super::token::{Operator, Token, TokenClaims};
use super::verify::{self, Utc};
use super::{CertificateFacts, Issuer, PkiError, facts_of};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, TrustDomain};

/// Largest file that is read from a CA directory, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Most issuers in one directory.
const ISSUERS_MAX: u32 = 1000;

/// Why a CA directory cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Something is there already.
    #[error("{} exists already; nothing is overwritten: choose another -dir, or move it away", path.display())]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// An earlier run failed and left its files.
    #[error("{} is left from a run that failed; nothing uses it: remove it and run again", path.display())]
    LeftOver {
        /// The directory.
        path: PathBuf,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}; `weft ca init` makes this file", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can read a key.
    #[error("key {} can be read by others (mode {mode:04o}): run `chmod 600 {}`", path.display(), path.display())]
    Readable {
        /// The path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file holds no key or certificate.
    #[error("{} holds no {what} in PEM form: restore it from a backup", path.display())]
    Pem {
        /// The path.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A key does not belong to its certificate.
    #[error("the key beside {} does not belong to this certificate: restore both from one backup", path.display())]
    KeyMismatch {
        /// The certificate.
        path: PathBuf,
    },
    /// A root that the operator brings is no root for weft.
    #[error("{} cannot be weft's root: {problem}", path.display())]
    OwnRoot {
        /// The certificate.
        path: PathBuf,
        /// Why not.
        problem: RootProblem,
    },
    /// A certificate that the root's holder signed breaks a rule.
    #[error("{} is not as weft needs it: have it signed again with the section of sign.cnf", path.display())]
    Unusable {
        /// The file or directory.
        path: PathBuf,
        /// The rule.
        #[source]
        source: Box<PkiError>,
    },
    /// A key is encrypted.
    #[error("{} holds an encrypted key: decrypt it into a file of mode 0600 for this run (openssl pkcs8 -in FILE -out FILE)", path.display())]
    Encrypted {
        /// The file.
        path: PathBuf,
    },
    /// A rotation would leave the operator's own root.
    #[error("this CA stands on a root of your own: bring the next one, with -root-cert FILE -root-key FILE")]
    NextRootNeeded,
    /// The root's key is not here.
    #[error(
        "the root's key is not here, and the root alone can do this: link it for this run (ln -s KEY root.key in the CA directory), and give a new root with its -root-key"
    )]
    Offline,
    /// The root has ended.
    #[error("the root certificate was valid until {}: rotate the root", Utc(*.until))]
    RootExpired {
        /// Its end.
        until: UnixSeconds,
    },
    /// There is no such issuer.
    #[error("{} has no issuer `{name}`; `weft ca issuer list -ca {}` names them", dir.display(), dir.display())]
    UnknownIssuer {
        /// The directory.
        dir: PathBuf,
        /// The name given.
        name: String,
    },
    /// There are too many issuers.
    #[error("the directory has {ISSUERS_MAX} issuers already: remove old ones")]
    IssuersFull,
}

/// A key with its certificate.
pub(super) struct Pair {
    pub(super) key: KeyPair,
    pub(super) certificate: rcgen::Certificate,
}

fn make(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |source| PkiError::Make { what, source }
}

fn make_root(domain: &TrustDomain, now: UnixSeconds) -> Result<Pair, PkiError> {
    let key = generate_key()?;
    let certificate = root_params(domain, now)?.self_signed(&key).map_err(make("the root"))?;
    Ok(Pair { key, certificate })
}

pub(super) fn make_issuer(
    root: &rcgen::Issuer<'_, &KeyPair>,
    domain: &TrustDomain,
    number: u32,
    validity: Validity,
) -> Result<Pair, PkiError> {
    let key = generate_key()?;
    let params = issuer_params(domain, &format!("issuer {number}"), validity)?;
    let certificate = params.signed_by(&key, root).map_err(make("an issuer"))?;
    Ok(Pair { key, certificate })
}

pub(super) fn make_operator(
    root: &rcgen::Issuer<'_, &KeyPair>,
    domain: &TrustDomain,
    validity: Validity,
) -> Result<Pair, PkiError> {
    let name: NodeName = "operator".parse().expect("a fixed, well-formed name");
    let key = generate_key()?;
    let params = operator_params(domain, &name, &OperatorScope::all(), validity)?;
    let certificate = params.signed_by(&key, root).map_err(make("an operator"))?;
    Ok(Pair { key, certificate })
}

pub(super) fn signer<'k>(
    certificate: &CertificateDer<'_>,
    key: &'k KeyPair,
) -> Result<rcgen::Issuer<'static, &'k KeyPair>, PkiError> {
    rcgen::Issuer::from_ca_cert_der(certificate, key).map_err(make("a signer"))
}

/// A CA in memory: `weft agent -dev` and the demo.
#[derive(Debug)]
pub struct EphemeralCa {
    issuer: Arc<Issuer>,
    operator: Operator,
}

impl EphemeralCa {
    /// Its issuer.
    pub fn issuer(&self) -> &Arc<Issuer> {
        &self.issuer
    }

    /// The operator's key, which signs documents of every kind that operators may.
    ///
    /// # Errors
    /// [`PkiError::Make`] if the library refuses the key.
    pub fn document_key(&self) -> Result<DocumentKey, PkiError> {
        let key = KeyPair::from_pem_and_sign_algo(&self.operator.key.serialize_pem(), &PKCS_ECDSA_P256_SHA256);
        let key = key.map_err(make("an operator's key"))?;
        let (certificate, root) = (self.operator.certificate.clone(), self.operator.root.clone());
        let name = "operator".parse().expect("a fixed, well-formed name");
        let domain = verify::domain_of(&certificate)?;
        DocumentKey::new(key, certificate, root, domain).ok_or(PkiError::KeyMismatch { node: name })
    }

    /// Makes a token.
    ///
    /// # Errors
    /// [`PkiError::Expired`] if it would outlive the operator's certificate.
    pub fn token(&self, claims: &TokenClaims) -> Result<Token, PkiError> {
        self.operator.token(claims)
    }
}

/// Makes a CA in memory; its root key is gone when this returns.
///
/// # Errors
/// [`PkiError::Make`] if the system has no randomness.
pub fn ephemeral(trust_domain: &TrustDomain, now: UnixSeconds) -> Result<EphemeralCa, PkiError> {
    let root = make_root(trust_domain, now)?;
    let root_der = root.certificate.der();
    let root_signer = signer(root_der, &root.key)?;
    let validity = Validity::starting(now, ISSUER_LIFE, None);
    let issuer = make_issuer(&root_signer, trust_domain, 1, validity)?;
    let operator = make_operator(&root_signer, trust_domain, validity)?;
    let operator =
        Operator { key: operator.key, certificate: operator.certificate.der().clone(), root: root_der.clone() };
    let issuer = Issuer::new(issuer.key, issuer.certificate.der().clone(), root_der)?;
    Ok(EphemeralCa { issuer: Arc::new(issuer), operator })
}

/// A CA directory.
#[derive(Debug)]
pub struct CaDir {
    dir: PathBuf,
}

impl CaDir {
    /// Makes root, first issuer and operator in `dir`, which must not exist or be empty.
    ///
    /// # Errors
    /// [`CaError::Exists`] naming what is in the way, [`CaError::LeftOver`], [`CaError::Write`].
    pub fn init(dir: &Path, trust_domain: &TrustDomain, now: UnixSeconds) -> Result<Self, PkiError> {
        must_be_free(dir)?;
        let root = make_root(trust_domain, now)?;
        let root_signer = signer(root.certificate.der(), &root.key)?;
        let validity = Validity::starting(now, ISSUER_LIFE, None);
        let issuer = make_issuer(&root_signer, trust_domain, 1, validity)?;
        let operator = make_operator(&root_signer, trust_domain, validity)?;
        build(dir, |partial| {
            write_pair(partial, "root", &root)?;
            let issuer_dir = partial.join("issuer-1");
            make_dir(&issuer_dir)?;
            write_pair(&issuer_dir, "issuer", &issuer)?;
            write(&issuer_dir.join("root.crt"), &root.certificate.pem(), 0o644)?;
            let operator_dir = partial.join("operator");
            make_dir(&operator_dir)?;
            write_pair(&operator_dir, "operator", &operator)
        })?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Opens a directory that [`CaDir::init`] made; reads nothing yet.
    pub fn open(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes a further issuer, `issuer-2` and so on, and returns its directory. Needs the root key; where that is offline
    /// (`init_under` without it) the issuer's signing request is made, and returned too.
    ///
    /// # Errors
    /// [`CaError::Read`] without the root key, [`CaError::RootExpired`], [`CaError::Write`].
    pub fn create_issuer(&self, now: UnixSeconds) -> Result<(PathBuf, Option<Request>), PkiError> {
        let free = (2..=ISSUERS_MAX).map(|number| (number, self.dir.join(format!("issuer-{number}"))));
        let (number, dir) = free.into_iter().find(|(_, path)| !path.exists()).ok_or(CaError::IssuersFull)?;
        if self.is_offline() {
            let request = self.request_issuer(&dir, number)?;
            return Ok((dir, Some(request)));
        }
        let key = read_key(&self.dir.join("root.key"))?;
        let root_path = self.dir.join("root.crt");
        let root = read_certificate(&root_path)?;
        if verify::public_key_of(&root)? != key.public_key_raw() {
            return Err(CaError::KeyMismatch { path: root_path }.into());
        }
        let (from, until) = verify::validity_of(&root)?;
        if now >= until {
            return Err(CaError::RootExpired { until }.into());
        }
        let domain = domain_of(&self.dir, &root)?;
        let validity = Validity::within(now, ISSUER_LIFE, (from, until));
        let issuer = make_issuer(&signer(&root, &key)?, &domain, number, validity)?;
        let root_pem = fs::read_to_string(&root_path).map_err(|source| CaError::Read { path: root_path, source })?;
        build(&dir, |partial| {
            write_pair(partial, "issuer", &issuer)?;
            write(&partial.join("root.crt"), &root_pem, 0o644)
        })?;
        Ok((dir, None))
    }
}

/// An issuer of a CA directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerEntry {
    /// Its directory's name.
    pub name: String,
    /// Its certificate.
    pub facts: CertificateFacts,
}

/// A token that was made with a CA directory, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// When it was made.
    pub made: UnixSeconds,
    /// What it allows.
    pub claims: TokenClaims,
}

impl CaDir {
    /// Lists the issuers, in order of number, but for those whose certificate is not signed yet.
    ///
    /// # Errors
    /// [`CaError::Read`] if the directory or a certificate cannot be read.
    pub fn issuers(&self) -> Result<Vec<IssuerEntry>, PkiError> {
        let names = self.issuer_names()?;
        let is_signed = |name: &String| self.dir.join(name).join("issuer.crt").exists();
        names.into_iter().filter(is_signed).map(|name| self.issuer(&name)).collect()
    }

    /// The names of the issuers' directories, in order of number.
    pub(super) fn issuer_names(&self) -> Result<Vec<String>, CaError> {
        let failed = |source| CaError::Read { path: self.dir.clone(), source };
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("issuer-")?.parse::<u32>().ok());
            numbers.extend(number);
        }
        numbers.sort_unstable();
        Ok(numbers.into_iter().map(|number| format!("issuer-{number}")).collect())
    }

    /// Looks an issuer up by its directory's name.
    ///
    /// # Errors
    /// [`CaError::UnknownIssuer`], or [`CaError::Pem`] if its certificate is damaged.
    pub fn issuer(&self, name: &str) -> Result<IssuerEntry, PkiError> {
        let path = self.dir.join(name).join("issuer.crt");
        let is_plain = name.strip_prefix("issuer-").is_some_and(|number| number.parse::<u32>().is_ok());
        if !is_plain || !path.exists() {
            return Err(CaError::UnknownIssuer { dir: self.dir.clone(), name: name.to_owned() }.into());
        }
        let facts = facts_of(&read_certificate(&path)?)?;
        Ok(IssuerEntry { name: name.to_owned(), facts })
    }

    /// Notes that a token was made: what it allows, not its secret.
    ///
    /// # Errors
    /// [`CaError::Write`].
    pub fn record_token(&self, claims: &TokenClaims, made: UnixSeconds) -> Result<(), PkiError> {
        let dir = self.dir.join("tokens");
        if !dir.is_dir() {
            make_dir(&dir)?;
        }
        let path = dir.join(format!("{}.json", uuid::Uuid::from_bytes(claims.id)));
        let failed = |source: serde_json::Error| CaError::Write { path: path.clone(), source: source.into() };
        let text = serde_json::to_string_pretty(&TokenRecord { made, claims: claims.clone() }).map_err(failed)?;
        Ok(write(&path, &text, 0o600)?)
    }

    /// Lists the tokens that were made here, the oldest first.
    ///
    /// # Errors
    /// [`CaError::Read`] if a record cannot be read.
    pub fn tokens(&self) -> Result<Vec<TokenRecord>, PkiError> {
        let dir = self.dir.join("tokens");
        if !dir.is_dir() {
            return Ok(Vec::new());
        }
        let failed = |source| CaError::Read { path: dir.clone(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let record = serde_json::from_str::<TokenRecord>(&read(&path)?);
            records.push(record.map_err(|source| CaError::Read { path, source: source.into() })?);
        }
        records.sort_by_key(|record| (record.made, record.claims.id));
        Ok(records)
    }
}

/// Refuses a directory that is there and not empty.
pub(super) fn must_be_free(dir: &Path) -> Result<(), CaError> {
    if let Ok(mut entries) = fs::read_dir(dir) {
        if let Some(Ok(entry)) = entries.next() {
            return Err(CaError::Exists { path: entry.path() });
        }
    } else if dir.symlink_metadata().is_ok() {
        return Err(CaError::Exists { path: dir.to_owned() });
    }
    Ok(())
}

/// The trust domain of a CA directory: its root's, or, where an operator's own root names none, what that signed.
pub(super) fn domain_of(dir: &Path, root: &CertificateDer<'_>) -> Result<TrustDomain, PkiError> {
    if let Ok(domain) = verify::domain_of(root) {
        return Ok(domain);
    }
    let path = dir.join("operator/operator.crt");
    let path = if path.exists() { path } else { dir.join("issuer-1/issuer.crt") };
    Ok(verify::domain_of(&read_certificate(&path)?)?)
}

/// Fills `<dir>.partial` and renames it to `dir`; on failure the partial directory is removed as far as possible.
pub(super) fn build(dir: &Path, fill: impl FnOnce(&Path) -> Result<(), CaError>) -> Result<(), CaError> {
    let write_error = |path: &Path| {
        let path = path.to_owned();
        move |source| CaError::Write { path, source }
    };
    let dir = std::path::absolute(dir).map_err(write_error(dir))?;
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = dir.with_file_name(name);
    let parent = dir.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(write_error(parent))?;
    if partial.symlink_metadata().is_ok() {
        return Err(CaError::LeftOver { path: partial });
    }
    let built = make_dir(&partial).and_then(|()| fill(&partial)).and_then(|()| {
        // A rename replaces an empty directory and nothing else.
        fs::rename(&partial, &dir).map_err(write_error(&dir))?;
        fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(write_error(parent))
    });
    if built.is_err() {
        // What cannot be removed is named by the next run.
        let _unused = fs::remove_dir_all(&partial);
    }
    built
}

pub(super) fn make_dir(path: &Path) -> Result<(), CaError> {
    fs::DirBuilder::new().mode(0o700).create(path).map_err(|source| CaError::Write { path: path.to_owned(), source })
}

pub(super) fn write_pair(dir: &Path, name: &str, pair: &Pair) -> Result<(), CaError> {
    write(&dir.join(format!("{name}.key")), &pair.key.serialize_pem(), 0o600)?;
    write(&dir.join(format!("{name}.crt")), &pair.certificate.pem(), 0o644)
}

pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let written = || {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    written().map_err(|source| CaError::Write { path: path.to_owned(), source })
}

pub(super) fn read(path: &Path) -> Result<String, CaError> {
    let failed = |source| CaError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    fs::read_to_string(path).map_err(failed)
}

/// Reads a file that only its owner can read.
pub(super) fn read_private(path: &Path) -> Result<String, CaError> {
    let failed = |source| CaError::Read { path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CaError::Readable { path: path.to_owned(), mode });
    }
    read(path)
}

/// Reads a key that only its owner can read.
pub(super) fn read_key(path: &Path) -> Result<KeyPair, CaError> {
    let pem = read_private(path)?;
    if pem.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") || pem.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(CaError::Encrypted { path: path.to_owned() });
    }
    key_of(&pem).ok_or_else(|| CaError::Pem { path: path.to_owned(), what: "P-256 private key" })
}

/// The first private key of a PEM text; OpenSSL writes a block of parameters before a key, and keys in two forms.
pub(super) fn key_of(pem: &str) -> Option<KeyPair> {
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok()?;
    KeyPair::from_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256).ok()
}

/// Reads a certificate.
pub(super) fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, CaError> {
    let pem = read(path)?;
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| CaError::Pem { path: path.to_owned(), what: "certificate" })
}

#[cfg(test)]
mod tests {
    use super::super::token::create_token;
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn init_makes_a_ca_that_certifies_a_node_and_signs_tokens() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"prod.example".parse().unwrap(), NOW).unwrap();
        for (file, want) in [
            ("root.key", 0o600),
            ("issuer-1/issuer.key", 0o600),
            ("operator/operator.key", 0o600),
            ("issuer-1", 0o700),
            ("operator", 0o700),
            (".", 0o700),
        ] {
            assert_eq!(mode(&dir.join(file)), want, "{file}");
        }
        let issuer = Issuer::load(&dir.join("issuer-1")).unwrap();
        let authority = issuer.self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), NOW).unwrap();
        let svid = authority.mint_node(NOW).unwrap();
        verify::verify_peer(&svid.chain, issuer.bundle(), NOW).unwrap();
        let claims = TokenClaims {
            id: [0; 16],
            node: "*".parse().unwrap(),
            serve: "web".parse().unwrap(),
            not_after: NOW,
            uses: 0,
        };
        assert_eq!(create_token(&dir, &claims).unwrap().verify(issuer.bundle(), NOW).unwrap(), claims);
    }

    #[test]
    fn a_second_issuer_has_its_own_key_and_the_same_root() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        assert_eq!(ca.create_issuer(NOW).unwrap(), (dir.join("issuer-2"), None));
        assert_eq!(ca.create_issuer(NOW).unwrap(), (dir.join("issuer-3"), None));
        let (one, two) = (Issuer::load(&dir.join("issuer-1")).unwrap(), Issuer::load(&dir.join("issuer-2")).unwrap());
        assert_eq!(one.bundle(), two.bundle());
        let svid = two.self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), NOW).unwrap().mint_node(NOW).unwrap();
        verify::verify_peer(&svid.chain, one.bundle(), NOW).unwrap();
        assert_ne!(one.certificate(), two.certificate());
    }

    #[test]
    fn issuers_and_tokens_are_listed_without_their_secrets() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        ca.create_issuer(NOW).unwrap();
        let names: Vec<String> = ca.issuers().unwrap().into_iter().map(|issuer| issuer.name).collect();
        assert_eq!(names, ["issuer-1", "issuer-2"]);
        let key = Issuer::load(&dir.join("issuer-2")).unwrap().spki().unwrap();
        assert_eq!(ca.issuer("issuer-2").unwrap().facts.key, key);
        for unknown in ["issuer-3", "operator", "../ca", "issuer-1/.."] {
            assert!(matches!(ca.issuer(unknown), Err(PkiError::Ca(CaError::UnknownIssuer { .. }))), "{unknown}");
        }

        assert_eq!(ca.tokens().unwrap(), []);
        let claims = |id| TokenClaims {
            id: [id; 16],
            node: "web-*".parse().unwrap(),
            serve: "web".parse().unwrap(),
            not_after: NOW,
            uses: 1,
        };
        ca.record_token(&claims(2), NOW).unwrap();
        ca.record_token(&claims(1), UnixSeconds(NOW.0 + 1)).unwrap();
        let made: Vec<TokenClaims> = ca.tokens().unwrap().into_iter().map(|record| record.claims).collect();
        assert_eq!(made, [claims(2), claims(1)]);
    }

    #[test]
    fn nothing_is_overwritten_and_the_error_names_what_exists() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let root = fs::read(dir.join("root.key")).unwrap();
        let refused = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap_err();
        assert!(matches!(&refused, PkiError::Ca(CaError::Exists { path }) if path.starts_with(&dir)), "{refused}");
        assert_eq!(fs::read(dir.join("root.key")).unwrap(), root);

        fs::create_dir(temp.path().join("new.partial")).unwrap();
        let refused = CaDir::init(&temp.path().join("new"), &"td".parse().unwrap(), NOW).unwrap_err();
        assert!(matches!(refused, PkiError::Ca(CaError::LeftOver { .. })));
        assert!(!temp.path().join("new").exists());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_chmod() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
        let key = dir.join("issuer-1/issuer.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let text = Issuer::load(&dir.join("issuer-1")).unwrap_err().to_string();
        assert!(text.contains(&format!("chmod 600 {}", key.display())), "{text}");
    }

    #[test]
    fn a_key_of_another_issuer_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap().create_issuer(NOW).unwrap();
        fs::copy(dir.join("issuer-2/issuer.key"), dir.join("issuer-1/issuer.key")).unwrap();
        let refused = Issuer::load(&dir.join("issuer-1")).unwrap_err();
        assert!(matches!(refused, PkiError::Ca(CaError::KeyMismatch { .. })), "{refused}");
    }
}

use std::os::unix::fs::PermissionsExt as _;

use rcgen::{BasicConstraints, GeneralSubtree, IsCa, KeyUsagePurpose, NameConstraints, SanType};

use super::super::{DocumentKey, Signatory, TokenClaims, create_token, verify_peer};
use super::*;

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const DAY: u64 = 86_400;

/// A root as a company has one: it names nobody's trust domain.
fn company() -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CountryName, "CH");
    subject.push(DnType::OrganizationName, "Example Industries");
    subject.push(DnType::CommonName, "Example Root CA 1");
    params.distinguished_name = subject;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let at = |at: u64| time::OffsetDateTime::from_unix_timestamp(i64::try_from(at).unwrap()).unwrap();
    (params.not_before, params.not_after) = (at(NOW.0 - 10), at(NOW.0 + 100 * DAY));
    params
}

struct Files {
    temp: tempfile::TempDir,
    key: KeyPair,
}

impl Files {
    fn new(params: &CertificateParams) -> Self {
        let (temp, key) = (tempfile::tempdir().unwrap(), generate_key().unwrap());
        fs::write(temp.path().join("root.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        ca::write(&temp.path().join("own.key"), &key.serialize_pem(), 0o600).unwrap();
        Self { temp, key }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn init(&self, domain: &str, key: Option<&str>) -> Result<(CaDir, Vec<Request>), PkiError> {
        let (certificate, key) = (self.at("root.pem"), key.map(|key| self.at(key)));
        let own = OwnRoot { certificate: &certificate, key: key.as_deref() };
        CaDir::init_under(&self.at("ca"), &domain.parse().unwrap(), own, NOW)
    }
}

fn claims() -> TokenClaims {
    let (node, serve) = ("*".parse().unwrap(), "web".parse().unwrap());
    TokenClaims { id: [0; 16], node, serve, not_after: NOW, uses: 0 }
}

/// Certifies a node with the first issuer, and a token with the operator.
#[track_caller]
fn assert_works(dir: &Path, domain: &str) {
    let issuer = Issuer::load(&dir.join("issuer-1")).unwrap();
    assert_eq!(issuer.bundle().trust_domain.as_str(), domain);
    let node = issuer.self_certify(&"a".parse().unwrap(), &"web".parse().unwrap(), NOW).unwrap();
    let again = super::super::NodeAuthority::from_bytes(&node.to_bytes().unwrap()).unwrap();
    let peer = verify_peer(&again.mint_node(NOW).unwrap().chain, issuer.bundle(), NOW).unwrap();
    assert_eq!(peer.id.to_string(), format!("spiffe://{domain}/node/a"));
    let token = create_token(dir, &claims()).unwrap();
    assert_eq!(token.trust_domain().unwrap().as_str(), domain);
    token.verify(issuer.bundle(), NOW).unwrap();
}

#[test]
fn issuer_and_operator_stand_under_the_company_s_root_whose_key_is_not_copied() {
    let files = Files::new(&company());
    let (ca, requests) = files.init("prod.example", Some("own.key")).unwrap();
    assert_eq!(requests, []);
    let dir = files.at("ca");
    assert_works(&dir, "prod.example");
    assert_eq!(fs::read_link(dir.join("root.key")).unwrap(), fs::canonicalize(files.at("own.key")).unwrap());
    // Nothing outlives the root, or begins before it.
    let (from, until) = verify::validity_of(&ca::read_certificate(&dir.join("issuer-1/issuer.crt")).unwrap()).unwrap();
    assert_eq!((from, until), (UnixSeconds(NOW.0 - 10), UnixSeconds(NOW.0 + 100 * DAY)));
    assert!(ca.has_own_root());
    let root = DocumentKey::load(&dir, Signatory::Root).unwrap();
    assert_eq!(root.bundle().unwrap().trust_domain.as_str(), "prod.example");
    assert!(ca.create_issuer(NOW).unwrap().1.is_none());
    let found = ca.check(NOW).unwrap();
    let names: Vec<&str> = found.good.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names, found.waiting.len()), (vec!["issuer-1", "issuer-2", "operator"], 0));
    // Where the key is taken away, what needs it says so, and what does not goes on.
    fs::remove_file(files.at("own.key")).unwrap();
    assert!(matches!(ca.create_issuer(NOW), Err(PkiError::Ca(CaError::Read { .. }))));
    assert_works(&dir, "prod.example");
}

#[test]
fn one_root_above_two_meshes_keeps_them_apart() {
    let files = Files::new(&company());
    files.init("prod.example", Some("own.key")).unwrap();
    let prod = files.at("ca");
    fs::rename(&prod, files.at("prod")).unwrap();
    files.init("staging.example", Some("own.key")).unwrap();
    let (prod, staging) = (files.at("prod"), files.at("ca"));
    let [ours, theirs] = [&prod, &staging].map(|dir| Issuer::load(&dir.join("issuer-1")).unwrap());
    assert_eq!(ours.bundle().roots, theirs.bundle().roots);
    let node = theirs.self_certify(&"a".parse().unwrap(), &"web".parse().unwrap(), NOW).unwrap();
    let refused = verify_peer(&node.mint_node(NOW).unwrap().chain, ours.bundle(), NOW).unwrap_err();
    assert!(matches!(refused, PkiError::Verify(VerifyError::TrustDomain { .. })), "{refused}");
    assert!(create_token(&staging, &claims()).unwrap().verify(ours.bundle(), NOW).is_err());
    // An issuer of the one cannot pass for one of the other, whatever root is pinned.
    let bundle = TrustBundle { trust_domain: "prod.example".parse().unwrap(), ..theirs.bundle().clone() };
    assert!(verify::check_issuer(theirs.certificate(), &bundle, NOW).is_err());
}

#[test]
fn an_offline_root_signs_requests_and_what_came_back_is_checked() {
    let files = Files::new(&company());
    let (ca, requests) = files.init("prod.example", None).unwrap();
    let dir = files.at("ca");
    assert_eq!(requests.len(), 2);
    let shown = requests[0].to_string();
    assert!(shown.contains("issuer-1/issuer.csr") && shown.contains("-extensions issuer"), "{shown}");
    let found = ca.check(NOW).unwrap();
    assert_eq!((found.trust_domain.as_str(), found.waiting, found.good.len()), ("prod.example", requests, 0));
    assert!(ca.create_issuer(NOW).unwrap().1.is_some());
    assert!(matches!(ca.prepare_rotation(None, NOW), Err(PkiError::Ca(CaError::Offline))));
    assert!(matches!(DocumentKey::load(&dir, Signatory::Root), Err(PkiError::Ca(CaError::Offline))));

    // The root's holder, with another tool: rcgen in the place of OpenSSL (which the integration tests use).
    let root = ca::read_certificate(&files.at("root.pem")).unwrap();
    let signer = ca::signer(&root, &files.key).unwrap();
    let domain = "prod.example".parse().unwrap();
    let life = Validity::within(NOW, ISSUER_LIFE, (NOW, UnixSeconds(NOW.0 + DAY)));
    let own = |name: &str| ca::read_key(&dir.join(name)).unwrap();
    let sign = |params: CertificateParams, key: &str| params.signed_by(&own(key), &signer).unwrap().pem();
    let issuer = |domain: &TrustDomain| super::super::certificate::issuer_params(domain, "issuer 1", life).unwrap();
    // Signed for another mesh, or with the wrong section: named.
    let mut wide = issuer(&domain);
    wide.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    for (bent, want) in [(wide, "path length"), (issuer(&domain), "")] {
        fs::write(dir.join("issuer-1/issuer.crt"), sign(bent, "issuer-1/issuer.key")).unwrap();
        match (ca.check(NOW), want) {
            (Err(refused), want) if !want.is_empty() => {
                let text = format!("{refused}: {}", std::error::Error::source(&refused).unwrap());
                assert!(text.contains(want) && text.contains("issuer-1"), "{text}");
            }
            (checked, _) => assert_eq!(checked.unwrap().good.len(), 1),
        }
    }
    let (operator, all) = ("operator".parse().unwrap(), OperatorScope::all());
    let operator =
        super::super::certificate::operator_params(&"other".parse().unwrap(), &operator, &all, life).unwrap();
    fs::write(dir.join("operator/operator.crt"), sign(operator, "operator/operator.key")).unwrap();
    assert!(ca.check(NOW).is_err(), "an operator of another trust domain");
    let (operator, all) = ("operator".parse().unwrap(), OperatorScope::all());
    let operator = super::super::certificate::operator_params(&domain, &operator, &all, life).unwrap();
    fs::write(dir.join("operator/operator.crt"), sign(operator, "operator/operator.key")).unwrap();
    assert_eq!(ca.check(NOW).unwrap().waiting.len(), 1, "the second issuer's");
    assert_works(&dir, "prod.example");
}

#[test]
fn each_root_that_cannot_be_weft_s_is_refused_for_its_reason() {
    #[track_caller]
    fn check(bend: impl FnOnce(&mut CertificateParams), want: &str) {
        let mut params = company();
        bend(&mut params);
        let files = Files::new(&params);
        let text = files.init("prod.example", Some("own.key")).unwrap_err().to_string();
        assert!(text.contains("root.pem cannot be weft's root") && text.contains(want), "{text}");
        assert!(!files.at("ca").exists());
    }
    check(|root| root.is_ca = IsCa::ExplicitNoCa, "no CA");
    check(|root| root.is_ca = IsCa::Ca(BasicConstraints::Constrained(1)), "path length is 1; weft needs 2");
    check(|root| root.key_usages = vec![KeyUsagePurpose::CrlSign], "keyCertSign");
    let day = |day: u64| {
        let at = i64::try_from(NOW.0 + day * DAY).unwrap();
        time::OffsetDateTime::from_unix_timestamp(at).unwrap()
    };
    check(|root| root.not_before = day(1), "is valid from 2027-01-16");
    check(
        |root| (root.not_before, root.not_after) = (day(0) - time::Duration::days(9), day(0)),
        "valid until 2027-01-15",
    );
    let constraints =
        NameConstraints { permitted_subtrees: vec![GeneralSubtree::DnsName("x".into())], excluded_subtrees: vec![] };
    check(|root| root.name_constraints = Some(constraints), "name constraints");
    check(
        |root| root.subject_alt_names = vec![SanType::URI("spiffe://staging.example".try_into().unwrap())],
        "-trust-domain staging.example",
    );

    let files = Files::new(&company());
    let other = generate_key().unwrap();
    ca::write(&files.at("other.key"), &other.serialize_pem(), 0o600).unwrap();
    let text = files.init("td", Some("other.key")).unwrap_err().to_string();
    assert!(text.contains("other.key is not its key"), "{text}");
    fs::set_permissions(files.at("own.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let text = files.init("td", Some("own.key")).unwrap_err().to_string();
    assert!(text.contains("chmod 600"), "{text}");
    // An intermediate.
    let root = company();
    let by_root = rcgen::Issuer::from_params(&root, &files.key);
    let mut below = company();
    below.distinguished_name.push(DnType::CommonName, "Example Issuing CA");
    fs::write(files.at("root.pem"), below.signed_by(&other, &by_root).unwrap().pem()).unwrap();
    let text = files.init("td", Some("other.key")).unwrap_err().to_string();
    assert!(text.contains("intermediate") && text.contains("bring the root"), "{text}");
}

#[test]
fn a_rotation_leads_to_the_company_s_root_and_never_away_from_it_unasked() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("ca");
    let ca = CaDir::init(&dir, &"td".parse().unwrap(), NOW).unwrap();
    let files = Files::new(&company());
    let (certificate, key) = (files.at("root.pem"), files.at("own.key"));
    let own = OwnRoot { certificate: &certificate, key: Some(&key) };
    let rotation = ca.prepare_rotation(Some(own), NOW).unwrap();
    assert_eq!(rotation.root, ca::read_certificate(&certificate).unwrap());
    super::super::verify_link(rotation.old.certificate(), &rotation.root, &rotation.proof, &"td".parse().unwrap())
        .unwrap();
    ca.commit_rotation().unwrap();
    assert!(ca.has_own_root());
    assert_works(&dir, "td");
    assert!(matches!(ca.prepare_rotation(None, NOW), Err(PkiError::Ca(CaError::NextRootNeeded))));
    let next = Files::new(&company());
    let (certificate, key) = (next.at("root.pem"), next.at("own.key"));
    ca.prepare_rotation(Some(OwnRoot { certificate: &certificate, key: Some(&key) }), NOW).unwrap();
    let kept = ca.commit_rotation().unwrap();
    assert_eq!(fs::read_link(kept.join("root.key")).unwrap(), fs::canonicalize(files.at("own.key")).unwrap());
    assert_works(&dir, "td");
}

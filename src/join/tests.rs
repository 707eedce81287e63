use std::collections::HashMap;
use std::sync::Mutex;

use quinn::crypto::rustls::QuicServerConfig;

use super::*;
use crate::pki::{EphemeralCa, Identity, Revocations, Revoked, TokenClaims, ephemeral, verify_signed_by_node};

const DAY: Duration = Duration::from_secs(86_400);

#[derive(Default)]
struct Mesh {
    holders: HashMap<String, SocketAddr>,
    issuers: Vec<SocketAddr>,
    uses: Mutex<HashMap<[u8; 16], Vec<[u8; 32]>>>,
    revoked: Revocations,
    has_full_disk: bool,
    bundle: Option<Arc<TrustBundle>>,
    links: Vec<Vec<u8>>,
}

impl JoinTrust for Mesh {
    fn bundle(&self) -> Arc<TrustBundle> {
        Arc::clone(self.bundle.as_ref().unwrap())
    }

    fn links(&self) -> Vec<Vec<u8>> {
        self.links.clone()
    }
}

impl JoinDirectory for Mesh {
    fn live_holder(&self, name: &NodeName) -> Option<SocketAddr> {
        self.holders.get(name.as_str()).copied()
    }

    fn issuers(&self) -> Vec<SocketAddr> {
        self.issuers.clone()
    }
}

impl TokenLedger for Mesh {
    fn count_use(&self, id: [u8; 16], _not_after: u64, key: [u8; 32]) -> Result<Option<u32>, String> {
        if self.has_full_disk {
            return Err("no space left on the disk".to_owned());
        }
        let mut uses = self.uses.lock().unwrap();
        let keys = uses.entry(id).or_default();
        if keys.contains(&key) {
            return Ok(None);
        }
        keys.push(key);
        Ok(Some(u32::try_from(keys.len()).unwrap() - 1))
    }
}

/// A node that answers joins on a port of its own until it is dropped.
struct Seed {
    addr: SocketAddr,
    _tasks: tokio::task::JoinSet<()>,
}

fn seed(ca: &EphemeralCa, issuer: Option<Arc<Issuer>>, mesh: Mesh, certified: UnixSeconds) -> Seed {
    let bundle = TrustBundle { revoked: mesh.revoked.clone(), ..ca.issuer().bundle().clone() };
    seed_of(ca.issuer(), issuer, Mesh { bundle: Some(Arc::new(bundle)), ..mesh }, certified)
}

/// A seed that `certifier` certified and that believes the bundle of `mesh`.
fn seed_of(certifier: &Issuer, issuer: Option<Arc<Issuer>>, mesh: Mesh, certified: UnixSeconds) -> Seed {
    let authority = certifier.self_certify(&"seed".parse().unwrap(), &"*".parse().unwrap(), certified).unwrap();
    let identity = Identity::new(authority, certified).unwrap();
    let crypto = QuicServerConfig::try_from(identity.server_config_control().unwrap()).unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint = quinn::Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let mesh = Arc::new(mesh);
    let server = JoinServer::new(IssuerCell::new(issuer), Arc::clone(&mesh) as _, Arc::clone(&mesh) as _, mesh);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            if let Ok(connection) = incoming.await {
                server.serve(connection).await;
            }
        }
    });
    Seed { addr, _tasks: tasks }
}

fn ca(domain: &str) -> EphemeralCa {
    // Two months old, so that certificates of the past can be made.
    ephemeral(&domain.parse().unwrap(), clock::wall().minus(DAY * 60)).unwrap()
}

fn issuing(ca: &EphemeralCa, mesh: Mesh) -> Seed {
    seed(ca, Some(Arc::clone(ca.issuer())), mesh, clock::wall())
}

fn claims() -> TokenClaims {
    TokenClaims {
        id: [1; 16],
        node: "web-*".parse().unwrap(),
        serve: "web".parse().unwrap(),
        not_after: clock::wall().plus(DAY),
        uses: 1,
    }
}

async fn join(seed: &Seed, token: &Token, node: &str) -> Result<NodeAuthority, JoinError> {
    request_certificate(&[seed.addr], token, &JoinKey::new().unwrap(), &node.parse().unwrap(), clock::wall()).await
}

#[tokio::test]
async fn a_newcomer_gets_name_scope_and_bundle_and_survives_its_bytes() {
    let ca = ca("td");
    let seed = issuing(&ca, Mesh::default());
    let authority = join(&seed, &ca.token(&claims()).unwrap(), "web-1").await.unwrap();
    assert_eq!((authority.node().as_str(), authority.scope().to_string().as_str()), ("web-1", "web"));
    assert_eq!(authority.bundle(), ca.issuer().bundle());
    let stored = NodeAuthority::from_bytes(&authority.to_bytes().unwrap()).unwrap();
    assert_eq!(stored.chain(), authority.chain());
    assert!(NodeAuthority::from_bytes(&[1, 2, 3]).is_err());
}

#[tokio::test]
async fn a_node_that_is_no_issuer_names_one() {
    let ca = ca("td");
    let issuer = issuing(&ca, Mesh::default());
    let token = ca.token(&claims()).unwrap();
    let member = seed(&ca, None, Mesh { issuers: vec![issuer.addr], ..Mesh::default() }, clock::wall());
    assert_eq!(join(&member, &token, "web-1").await.unwrap().node().as_str(), "web-1");
    let lonely = seed(&ca, None, Mesh::default(), clock::wall());
    assert!(matches!(join(&lonely, &token, "web-1").await, Err(JoinError::NoIssuer { .. })));
}

#[tokio::test]
async fn each_refusal_says_what_is_wrong() {
    let ca = ca("td");
    let holder: SocketAddr = "10.0.0.9:8301".parse().unwrap();
    let seed = issuing(&ca, Mesh { holders: [("web-9".to_owned(), holder)].into(), ..Mesh::default() });
    let token = ca.token(&claims()).unwrap();
    let refused = |result: Result<NodeAuthority, JoinError>| match result.unwrap_err() {
        JoinError::Refused { reason, .. } => reason,
        other => panic!("{other}"),
    };
    assert!(refused(join(&seed, &token, "db-1").await).contains("nodes named `web-*`"));
    let taken = refused(join(&seed, &token, "web-9").await);
    assert!(taken.contains("10.0.0.9:8301") && taken.contains("127.0.0.1:"), "{taken}");
    let ended = TokenClaims { not_after: clock::wall().minus(DAY), ..claims() };
    assert!(refused(join(&seed, &ca.token(&ended).unwrap(), "web-1").await).contains("was valid until"));
    join(&seed, &token, "web-1").await.unwrap();
    assert!(refused(join(&seed, &token, "web-2").await).contains("good for 1 uses"));
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn strangers_that_are_refused_again_and_again_do_not_fill_the_log() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _logged = tracing::subscriber::set_default(subscriber);
    let ca = ca("td");
    let seed = issuing(&ca, Mesh::default());
    let token = ca.token(&claims()).unwrap();
    for number in 0..REFUSALS_TOLD_MAX * 2 {
        join(&seed, &token, &format!("db-{number}")).await.unwrap_err();
    }
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let told = text.lines().filter(|line| line.contains("join refused") && line.contains("nodes named `web-*`"));
    assert_eq!(told.count(), REFUSALS_TOLD_MAX as usize, "{text}");
}

#[tokio::test]
async fn a_token_of_another_ca_is_not_shown_to_the_seed() {
    let seed = issuing(&ca("td"), Mesh::default());
    let token = ca("td").token(&claims()).unwrap();
    let error = join(&seed, &token, "web-1").await.unwrap_err();
    let JoinError::Untrusted { source, .. } = &error else { panic!("{error}") };
    assert_eq!(**source, VerifyError::WrongRoot);
    assert!(error.to_string().contains("the token is of another CA"));
}

#[tokio::test]
async fn a_clock_an_hour_or_a_month_off_is_named_with_both_clocks() {
    let ca = ca("td");
    let seed = issuing(&ca, Mesh::default());
    let token = ca.token(&claims()).unwrap();
    for wrong in [clock::wall().minus(Duration::from_secs(3600)), clock::wall().plus(DAY * 30)] {
        let node = "web-1".parse().unwrap();
        let error =
            request_certificate(&[seed.addr], &token, &JoinKey::new().unwrap(), &node, wrong).await.unwrap_err();
        let JoinError::ClockSkew { ours, theirs, .. } = error else { panic!("{error}") };
        assert_eq!(ours, wrong);
        assert!(!is_skewed(theirs, clock::wall()));
    }
}

#[tokio::test]
async fn a_renewal_keeps_name_and_scope_until_30_days_after_the_end() {
    let ca = ca("td");
    let seed = issuing(&ca, Mesh::default());
    let aged = |age: Duration| {
        let at = clock::wall().minus(age);
        ca.issuer().self_certify(&"web-1".parse().unwrap(), &"web".parse().unwrap(), at).unwrap()
    };
    for age in [Duration::ZERO, DAY * 36] {
        let old = aged(age);
        let new =
            renew(&[seed.addr], &old, &JoinKey::new().unwrap(), old.bundle(), clock::wall()).await.unwrap().authority;
        assert_eq!((new.node(), new.scope()), (old.node(), old.scope()));
        assert!(new.not_after() > clock::wall().plus(DAY * 6));
        assert_ne!(new.chain().first(), old.chain().first());
        // For its own key: what the old certificate's key signed holds under the new one, and only then.
        let same = renew(&[seed.addr], &old, &old.key().unwrap(), old.bundle(), clock::wall()).await.unwrap().authority;
        let word = old.sign(b"word").unwrap();
        let holds =
            |by: &NodeAuthority| verify_signed_by_node(by.chain(), b"word", &word, by.bundle(), clock::wall()).is_ok();
        assert!(same.chain().first() != old.chain().first() && holds(&same) && !holds(&new));
    }
    let old = aged(DAY * 38);
    let error = renew(&[seed.addr], &old, &JoinKey::new().unwrap(), old.bundle(), clock::wall()).await.unwrap_err();
    assert!(matches!(&error, JoinError::Refused { reason, .. } if reason.contains("was valid until")), "{error}");
}

#[test]
fn a_renewal_needs_the_old_key_and_this_nonce() {
    let ca = ca("td");
    let now = clock::wall();
    let certify = || ca.issuer().self_certify(&"a".parse().unwrap(), &"web".parse().unwrap(), now).unwrap();
    let (old, other) = (certify(), certify());
    let message = renewal_message(b"csr", &[1; 32]);
    let check = |signature: &[u8]| {
        checks::verify_renewal(old.chain(), &message, signature, ca.issuer().bundle(), now, RENEW_GRACE)
    };
    check(&old.sign_renewal(&message).unwrap()).unwrap();
    let replayed = old.sign_renewal(&renewal_message(b"csr", &[2; 32])).unwrap();
    for forged in [other.sign_renewal(&message).unwrap(), old.sign(&message).unwrap(), replayed] {
        assert!(matches!(check(&forged), Err(VerifyError::Signature { .. })));
    }
}

#[tokio::test]
async fn nobody_and_no_seed_are_told_apart() {
    let token = ca("td").token(&claims()).unwrap();
    let node: NodeName = "web-1".parse().unwrap();
    let none = request_certificate(&[], &token, &JoinKey::new().unwrap(), &node, clock::wall()).await;
    assert!(matches!(none, Err(JoinError::NoSeeds)));
    let port_zero: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let nobody = request_certificate(&[port_zero], &token, &JoinKey::new().unwrap(), &node, clock::wall()).await;
    assert!(matches!(nobody, Err(JoinError::Unreachable { .. })));
}

fn refusal(result: Result<NodeAuthority, JoinError>) -> String {
    match result.unwrap_err() {
        JoinError::Refused { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_lost_answer_does_not_use_a_token_up_and_another_key_does() {
    let ca = ca("td");
    let seed = issuing(&ca, Mesh::default());
    let token = ca.token(&claims()).unwrap();
    let (key, node) = (JoinKey::new().unwrap(), "web-1".parse().unwrap());
    let first = request_certificate(&[seed.addr], &token, &key, &node, clock::wall()).await.unwrap();
    // The newcomer never saw the answer: the same request again, with the key that it kept.
    let kept = JoinKey::from_bytes(key.to_bytes()).unwrap();
    let again = request_certificate(&[seed.addr], &token, &kept, &node, clock::wall()).await.unwrap();
    assert_eq!(again.node(), first.node());
    let stolen = request_certificate(&[seed.addr], &token, &JoinKey::new().unwrap(), &node, clock::wall()).await;
    assert!(refusal(stolen).contains("good for 1 uses"));
}

#[tokio::test]
async fn a_revoked_token_key_or_node_gets_no_certificate() {
    let ca = ca("td");
    let token = ca.token(&claims()).unwrap();
    let with = |revoked: Revoked| Mesh { revoked: [revoked].into_iter().collect(), ..Mesh::default() };
    let by_token = issuing(&ca, with(Revoked::Token([1; 16])));
    assert!(refusal(join(&by_token, &token, "web-1").await).contains("token is revoked"));

    let old = ca.issuer().self_certify(&"web-1".parse().unwrap(), &"web".parse().unwrap(), clock::wall()).unwrap();
    let key = crate::pki::spki(&old.chain()[0]).unwrap();
    let until = clock::wall();
    for revoked in [Revoked::Key(key), Revoked::Node { node: "web-1".parse().unwrap(), until }] {
        let seed = issuing(&ca, with(revoked));
        let refused =
            renew(&[seed.addr], &old, &JoinKey::new().unwrap(), old.bundle(), clock::wall()).await.unwrap_err();
        assert!(matches!(&refused, JoinError::Revoked { reason, .. } if reason.contains("revoked")), "{refused}");
    }
}

#[tokio::test]
async fn a_retired_issuer_signs_nothing_and_names_others() {
    let ca = ca("td");
    let token = ca.token(&claims()).unwrap();
    let key = ca.issuer().spki().unwrap();
    let retired = Revoked::Issuer { key, from: clock::wall().minus(Duration::from_secs(1)) };
    let lonely = issuing(&ca, Mesh { revoked: [retired.clone()].into_iter().collect(), ..Mesh::default() });
    assert!(matches!(join(&lonely, &token, "web-1").await, Err(JoinError::NoIssuer { .. })));
}

/// A CA in a directory whose root was replaced: the issuer before and after, and the link between the roots.
fn rotated() -> (tempfile::TempDir, Issuer, Issuer, Vec<u8>) {
    use crate::pki::{CaDir, SpkiHash};
    use crate::policy::{Content, DocumentId, DocumentKind, RootLink, link_name};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    let made = clock::wall().minus(DAY * 2);
    let ca = CaDir::init(&path, &"td".parse().unwrap(), made).unwrap();
    let before = Issuer::load(&path.join("issuer-1")).unwrap();
    let rotation = ca.prepare_rotation(None, made).unwrap();
    let content = Content {
        trust_domain: "td".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Bundle, name: link_name(2) },
        version: 1,
        not_before: made,
        not_after: clock::wall().plus(DAY * 30),
        signer: SpkiHash([0; 32]),
        body: RootLink { root: rotation.root.to_vec(), proof: rotation.proof, issuers: Vec::new() }.to_bytes().unwrap(),
    };
    let link = Document::sign(content, &rotation.old).unwrap().to_bytes();
    ca.commit_rotation().unwrap();
    let after = Issuer::load(&path.join("issuer-1")).unwrap();
    (dir, before, after, link)
}

#[tokio::test]
async fn scenario_20_a_node_off_throughout_a_rotation_renews_by_walking_and_a_stranger_does_not() {
    let (dir, before, after, link) = rotated();
    let old = before.self_certify(&"web-1".parse().unwrap(), &"web".parse().unwrap(), clock::wall()).unwrap();
    let claims = claims();
    let token = crate::pki::create_token(&dir.path().join("ca"), &claims).unwrap();
    // The mesh believes both roots; the seed itself stands under the new one.
    let roots = [after.bundle().roots.clone(), before.bundle().roots.clone()].concat();
    let bundle = TrustBundle { roots, ..after.bundle().clone() };
    let new = after.bundle().clone();
    let after = Arc::new(after);
    let mesh = |links: Vec<Vec<u8>>| Mesh { bundle: Some(Arc::new(bundle.clone())), links, ..Mesh::default() };
    let with_links = seed_of(&after, Some(Arc::clone(&after)), mesh(vec![link]), clock::wall());
    let renewed = renew(&[with_links.addr], &old, &JoinKey::new().unwrap(), old.bundle(), clock::wall()).await.unwrap();
    assert_eq!(renewed.authority.bundle().roots, bundle.roots, "the newest first, then what was walked from");
    assert_eq!(renewed.links.len(), 1);
    // Whoever knows the new root already is shown no links.
    assert_eq!(join(&with_links, &token, "web-2").await.unwrap().bundle(), &new);

    let without = seed_of(&after, Some(Arc::clone(&after)), mesh(Vec::new()), clock::wall());
    let error = renew(&[without.addr], &old, &JoinKey::new().unwrap(), old.bundle(), clock::wall()).await.unwrap_err();
    assert!(
        matches!(&error, JoinError::Untrusted { source, .. } if matches!(**source, VerifyError::Path { .. })),
        "{error}"
    );
}

#[test]
fn a_signing_request_with_bytes_behind_it_names_no_key() {
    let key = JoinKey::new().unwrap().pair().unwrap();
    let mut csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    assert!(checks::request_key(&csr).is_some());
    csr.push(0);
    assert_eq!(checks::request_key(&csr), None);
}

#[tokio::test]
async fn an_issuer_s_own_failure_leads_to_the_next_issuer_and_a_refusal_does_not() {
    let ca = ca("td");
    let token = ca.token(&claims()).unwrap();
    let broken = issuing(&ca, Mesh { has_full_disk: true, ..Mesh::default() });
    let alone = join(&broken, &token, "web-1").await.unwrap_err();
    assert!(matches!(&alone, JoinError::Unable { reason, .. } if reason.contains("no space left")), "{alone}");

    let good = issuing(&ca, Mesh::default());
    let key = JoinKey::new().unwrap();
    let by = async |seeds: [&Seed; 2], node: &str| {
        let seeds = seeds.map(|seed| seed.addr);
        request_certificate(&seeds, &token, &key, &node.parse().unwrap(), clock::wall()).await
    };
    assert_eq!(by([&broken, &good], "web-1").await.unwrap().node().as_str(), "web-1");
    let holders = [("web-2".to_owned(), good.addr)].into();
    let refusing = issuing(&ca, Mesh { holders, ..Mesh::default() });
    assert!(refusal(by([&refusing, &good], "web-2").await).contains("is taken"));
}

#[tokio::test]
async fn a_name_is_certified_again_only_once_its_new_certificate_would_count_and_no_use_is_lost_meanwhile() {
    let ca = ca("td");
    let token = ca.token(&claims()).unwrap();
    let node = Revoked::Node { node: "web-1".parse().unwrap(), until: clock::wall() };
    let revoked: Revocations = [node].into_iter().collect();
    let early = issuing(&ca, Mesh { revoked, ..Mesh::default() });
    let refused = join(&early, &token, "web-1").await.unwrap_err();
    assert!(matches!(&refused, JoinError::Unable { reason, .. } if reason.contains("can be made in")), "{refused}");
    // The token's one use is left for a name that is free.
    assert_eq!(join(&early, &token, "web-2").await.unwrap().node().as_str(), "web-2");
    let earlier = clock::wall().minus(Duration::from_secs(61));
    let revoked = [Revoked::Node { node: "web-1".parse().unwrap(), until: earlier }].into_iter().collect();
    let later = issuing(&ca, Mesh { revoked, ..Mesh::default() });
    assert_eq!(join(&later, &token, "web-1").await.unwrap().node().as_str(), "web-1");
}

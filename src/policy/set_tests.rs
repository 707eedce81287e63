use std::time::Duration;

use proptest::prelude::*;

use super::super::document::Content;
use super::super::{Draft, DraftError};
use super::*;
use crate::authz::{Action, Intention};
use crate::pki::{CaDir, DocumentKey, Signatory};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const DAY: Duration = Duration::from_secs(86_400);

struct Mesh {
    dir: tempfile::TempDir,
    root: DocumentKey,
    operator: DocumentKey,
}

fn mesh() -> Mesh {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    CaDir::init(&path, &"td".parse().unwrap(), NOW).unwrap();
    let [root, operator] = [Signatory::Root, Signatory::Operator].map(|who| DocumentKey::load(&path, who).unwrap());
    Mesh { dir, root, operator }
}

impl Mesh {
    fn set(&self) -> DocumentSet {
        DocumentSet::new(&self.root.bundle().unwrap())
    }
}

fn content(name: &str, version: u64, entries: Vec<Revoked>) -> Content {
    Content {
        trust_domain: "set-by-sign".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Revocation, name: name.parse().unwrap() },
        version,
        not_before: NOW,
        not_after: NOW.plus(DAY * 30),
        signer: SpkiHash([0; 32]),
        body: RevocationBody { entries, reason: "a test".to_owned() }.to_bytes().unwrap(),
    }
}

fn key(byte: u8) -> SpkiHash {
    SpkiHash([byte; 32])
}

fn revoke(signer: &DocumentKey, name: &str, version: u64, byte: u8) -> Document {
    Document::sign(content(name, version, vec![Revoked::Key(key(byte))]), signer).unwrap()
}

#[test]
fn a_signed_revocation_counts_until_its_end() {
    let mesh = mesh();
    let mut set = mesh.set();
    let document = revoke(&mesh.operator, "a", 1, 7);
    assert_eq!(set.offer(document.clone(), NOW).unwrap(), Offered::Stored);
    assert_eq!(set.offer(document.clone(), NOW).unwrap(), Offered::Known);
    assert!(set.revocations().has_key(&key(7)) && set.bundle().revoked.has_key(&key(7)));
    assert!(set.expire(NOW.plus(DAY * 30)).is_empty());
    let late = NOW.plus(DAY * 30 + Duration::from_secs(1));
    assert_eq!(set.expire(late).len(), 1);
    assert!(set.is_empty() && !set.revocations().has_key(&key(7)) && set.set_hash() == 0);
    assert!(matches!(set.offer(document, late), Err(Refused::Ended { .. })));
}

#[test]
fn a_document_survives_its_bytes_and_no_other_bytes_are_it() {
    let mesh = mesh();
    let document = revoke(&mesh.operator, "a", 1, 7);
    let bytes = document.to_bytes();
    assert_eq!(Document::from_bytes(&bytes).unwrap(), document);
    assert!(Document::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    assert!(Document::from_bytes(&[bytes.as_slice(), &[0]].concat()).is_err());
    // The length of the content (below 251: one byte) written in three: the same value, another text.
    let at = bytes.iter().position(|byte| usize::from(*byte) == document.signed_bytes().len()).unwrap();
    let mut longer = bytes.clone();
    longer.splice(at..=at, [0xfb, bytes[at], 0]);
    assert!(matches!(Document::from_bytes(&longer), Err(DocumentError::NotCanonical)));
    assert!(matches!(Document::from_bytes(&vec![1; DOCUMENT_BYTES_MAX + 1]), Err(DocumentError::TooLarge { .. })));
}

#[test]
fn a_re_encoded_signature_is_the_same_document() {
    let mesh = mesh();
    let mut set = mesh.set();
    let (one, two) = (revoke(&mesh.operator, "a", 1, 7), revoke(&mesh.operator, "a", 1, 7));
    assert_ne!(one.signature(), two.signature(), "ECDSA signs with a fresh nonce");
    set.offer(one, NOW).unwrap();
    assert_eq!(set.offer(two, NOW).unwrap(), Offered::Known);
    assert_eq!(set.forks().count(), 0);
}

#[test]
fn altered_foreign_and_misplaced_documents_are_refused_each_for_its_reason() {
    let (ours, theirs) = (mesh(), mesh());
    let mut set = ours.set();
    let good = revoke(&ours.operator, "a", 1, 7);
    let foreign = revoke(&theirs.operator, "a", 1, 7);
    assert!(matches!(set.offer(foreign, NOW), Err(Refused::Signature(VerifyError::Path { .. }))));

    // The content of one, the signature of the other.
    let other = revoke(&ours.operator, "b", 1, 8);
    let envelope = (good.signed_bytes().to_vec(), other.certificate().to_vec(), other.signature().to_vec());
    let forged = Document::from_bytes(&crate::wire::encode(&envelope).unwrap()).unwrap();
    assert!(matches!(set.offer(forged, NOW), Err(Refused::Signature(VerifyError::Signature { .. }))));

    let early = Content { not_before: NOW.plus(Duration::from_secs(61)), ..content("a", 1, vec![]) };
    let early = Document::sign(early, &ours.operator).unwrap();
    let refused = set.offer(early, NOW).unwrap_err();
    assert!(matches!(refused, Refused::Early { .. }) && refused.to_string().contains("NTP"), "{refused}");

    let before_the_key = Content { not_before: NOW.minus(DAY), ..content("a", 1, vec![]) };
    let before_the_key = Document::sign(before_the_key, &ours.operator).unwrap();
    assert!(matches!(set.offer(before_the_key, NOW), Err(Refused::Span)));

    let too_long = Content { not_after: NOW.plus(DAY * 400), ..content("a", 1, vec![]) };
    assert!(matches!(Document::sign(too_long.clone(), &ours.operator), Err(DocumentError::OutlivesSigner { .. })));
    let by_root = Document::sign(too_long, &ours.root).unwrap();
    assert_eq!(set.offer(by_root, NOW).unwrap(), Offered::Stored, "the root outlives it");
    assert!(set.offer(good, NOW).is_ok());
}

#[test]
fn an_operator_leads_to_no_new_root() {
    let mesh = mesh();
    let body = RootLink {
        root: mesh.root.certificate().to_vec(),
        proof: mesh.operator.sign(b"x").unwrap(),
        issuers: Vec::new(),
    };
    let id = DocumentId { kind: DocumentKind::Bundle, name: link_name(2) };
    let bundle = Content { id, body: body.to_bytes().unwrap(), ..content("a", 1, vec![]) };
    let refused = mesh.set().offer(Document::sign(bundle, &mesh.operator).unwrap(), NOW).unwrap_err();
    assert!(matches!(refused, Refused::Signature(_)), "{refused}");
}

/// Certifies an operator in the mesh's own CA.
fn operator(mesh: &Mesh, name: &str, may: &str) -> DocumentKey {
    let dir = mesh.dir.path();
    let out = dir.join(format!("{name}.operator"));
    let ca = CaDir::open(&dir.join("ca"));
    ca.create_operator(&name.parse().unwrap(), &may.parse().unwrap(), DAY * 365, &out, NOW).unwrap();
    DocumentKey::load_operator(&out).unwrap()
}

fn intention(source: &str, destination: &str, action: Action) -> Draft {
    Draft::intention(Intention::plain(source.parse().unwrap(), destination.parse().unwrap(), action)).unwrap()
}

#[test]
fn an_operator_outside_its_scope_is_refused_and_the_root_is_not() {
    let mesh = mesh();
    let mut set = mesh.set();
    let ci = operator(&mesh, "ci", "intentions:web*,config:web");
    let entry = |name: &str| Draft::entry(format!("{{\"Kind\":\"service-defaults\",\"Name\":\"{name}\"}}")).unwrap();
    for (draft, is_allowed) in [
        (intention("a", "web-1", Action::Allow), true),
        (intention("*", "web", Action::Deny), true),
        (Draft::no_intention(&"a".parse().unwrap(), &"web-1".parse().unwrap()).unwrap(), true),
        (intention("web", "db", Action::Allow), false),
        (intention("a", "*", Action::Allow), false),
        (Draft::no_intention(&"a".parse().unwrap(), &"db".parse().unwrap()).unwrap(), false),
        (entry("web"), true),
        (entry("web-1"), false),
    ] {
        let id = draft.id().clone();
        let drafted = draft.clone().sign(1, None, &ci, NOW);
        assert_eq!(drafted.is_ok(), is_allowed, "{id}");
        // Who goes round the draft is refused by every set.
        let by_root = draft.sign(1, None, &mesh.root, NOW).unwrap();
        let forged = Document::sign(Content { not_after: NOW.plus(DAY), ..by_root.content().clone() }, &ci).unwrap();
        match set.offer(forged, NOW) {
            Ok(_) => assert!(is_allowed, "{id}"),
            Err(Refused::OutsideScope { .. }) => assert!(!is_allowed, "{id}"),
            Err(other) => panic!("{id}: {other}"),
        }
    }
    let by_root = intention("web", "db", Action::Allow).sign(1, None, &mesh.root, NOW).unwrap();
    assert_eq!(set.offer(by_root, NOW).unwrap(), Offered::Stored);
    let revocation = revoke(&ci, "a", 1, 7);
    assert!(matches!(set.offer(revocation, NOW), Err(Refused::OutsideScope { .. })));
}

#[test]
fn policy_whose_name_and_body_differ_is_refused() {
    let mesh = mesh();
    let mut set = mesh.set();
    let good = intention("web", "db", Action::Allow).sign(1, None, &mesh.operator, NOW).unwrap();
    for name in ["web:mail", "web", "web:", "a b"] {
        let Ok(name) = name.parse() else { continue };
        let id = DocumentId { kind: DocumentKind::Intention, name };
        let forged = Document::sign(Content { id, ..good.content().clone() }, &mesh.operator).unwrap();
        assert!(matches!(set.offer(forged, NOW), Err(Refused::Name { .. })));
    }
    let body = ConfigBody(Some("{\"Kind\":\"nonsense\",\"Name\":\"web\"}".to_owned())).to_bytes().unwrap();
    let id = DocumentId { kind: DocumentKind::Config, name: "nonsense:web".parse().unwrap() };
    let entry = Document::sign(Content { id, body, ..good.content().clone() }, &mesh.operator).unwrap();
    assert!(matches!(set.offer(entry, NOW), Err(Refused::Body(_))));
}

#[test]
fn what_is_deleted_does_not_come_back_and_a_revoked_operator_said_nothing() {
    let mesh = mesh();
    let (mut set, mut late) = (mesh.set(), mesh.set());
    let alice = operator(&mesh, "alice", "intentions");
    let written = intention("web", "db", Action::Allow).sign(1, None, &alice, NOW).unwrap();
    let ends = written.content().not_after;
    let deletion = Draft::no_intention(&"web".parse().unwrap(), &"db".parse().unwrap()).unwrap();
    let short = operator(&mesh, "short", "intentions");
    assert!(matches!(deletion.clone().sign(2, Some(ends.plus(DAY)), &short, NOW), Err(DraftError::EndsEarly { .. })));
    let deleted = deletion.sign(2, Some(ends), &alice, NOW).unwrap();
    set.offer(deleted, NOW).unwrap();
    assert_eq!(set.offer(written.clone(), NOW).unwrap(), Offered::Older);
    late.offer(written.clone(), NOW).unwrap();
    let ban = content("alice", 1, vec![Revoked::Key(alice.spki().unwrap())]);
    let ban = Document::sign(ban, &mesh.root).unwrap();
    for set in [&mut set, &mut late] {
        set.offer(ban.clone(), NOW).unwrap();
        assert_eq!(set.len(), 1, "only the ban is left");
        assert!(matches!(set.offer(written.clone(), NOW), Err(Refused::Signature(VerifyError::Revoked { .. }))));
    }
}

#[test]
fn policy_leaves_room_for_revocations() {
    let mesh = mesh();
    let mut set = mesh.set();
    let text =
        |at: usize| format!("{{\"Kind\":\"service-defaults\",\"Name\":\"s{at}\",\"Pad\":\"{}\"}}", "x".repeat(32_000));
    let mut refused = None;
    for at in 0..400 {
        let entry = Draft::entry(text(at)).unwrap().sign(1, None, &mesh.operator, NOW).unwrap();
        if set.offer(entry, NOW).is_err() {
            refused = Some(at);
            break;
        }
    }
    assert!(refused.is_some_and(|at| at > 150), "{refused:?}");
    assert_eq!(set.offer(revoke(&mesh.operator, "a", 1, 7), NOW).unwrap(), Offered::Stored);
}

#[test]
fn scenario_13_two_contents_of_one_version_end_the_same_everywhere_and_are_reported() {
    let mesh = mesh();
    let (one, two) = (revoke(&mesh.operator, "a", 5, 1), revoke(&mesh.root, "a", 5, 2));
    let (mut left, mut right) = (mesh.set(), mesh.set());
    left.offer(one.clone(), NOW).unwrap();
    right.offer(two.clone(), NOW).unwrap();
    left.offer(two, NOW).unwrap();
    right.offer(one, NOW).unwrap();
    assert_eq!(left.set_hash(), right.set_hash());
    assert_eq!(left.revocations(), right.revocations());
    for set in [&left, &right] {
        let forks: Vec<_> = set.forks().map(|fork| (fork.id.to_string(), fork.version)).collect();
        assert_eq!(forks, [("revocation/a".to_owned(), 5)]);
    }
    let newer = revoke(&mesh.operator, "a", 6, 3);
    assert_eq!(left.offer(newer, NOW).unwrap(), Offered::Stored);
    assert!(left.revocations().has_key(&key(3)) && !left.revocations().has_key(&key(1)));
}

#[test]
fn what_a_banned_operator_signed_is_void_before_and_after() {
    let mesh = mesh();
    let by_operator = revoke(&mesh.operator, "a", 1, 7);
    let ban = content("operator", 1, vec![Revoked::Key(mesh.operator.spki().unwrap())]);
    let (ban, powerless) =
        (Document::sign(ban.clone(), &mesh.root).unwrap(), Document::sign(ban, &mesh.operator).unwrap());
    let (mut first, mut second) = (mesh.set(), mesh.set());
    first.offer(by_operator.clone(), NOW).unwrap();
    first.offer(ban.clone(), NOW).unwrap();
    second.offer(ban, NOW).unwrap();
    assert!(matches!(second.offer(by_operator.clone(), NOW), Err(Refused::Signature(VerifyError::Revoked { .. }))));
    assert_eq!((first.set_hash(), first.len()), (second.set_hash(), 1));

    // An operator cannot make another's word void, nor its own: only the root can.
    let mut third = mesh.set();
    third.offer(powerless, NOW).unwrap();
    assert_eq!(third.offer(by_operator, NOW).unwrap(), Offered::Stored);
}

#[test]
fn two_sets_even_out_by_digests() {
    let mesh = mesh();
    let (mut left, mut right) = (mesh.set(), mesh.set());
    for number in 0..10 {
        left.offer(revoke(&mesh.operator, &format!("l{number}"), 1, number), NOW).unwrap();
        right.offer(revoke(&mesh.operator, &format!("r{number}"), 1, 100 + number), NOW).unwrap();
    }
    left.offer(revoke(&mesh.operator, "both", 2, 50), NOW).unwrap();
    right.offer(revoke(&mesh.operator, "both", 1, 51), NOW).unwrap();
    let deliver = |from: &DocumentSet, to: &mut DocumentSet| {
        let mut rounds = 0;
        loop {
            let newer = from.newer_than(&to.digests(), 0);
            if newer.is_empty() {
                return rounds;
            }
            rounds += 1;
            for bytes in newer {
                let document = Document::from_bytes(&bytes).unwrap();
                assert!(to.is_news(&document.digest()));
                to.offer(document, NOW).unwrap();
            }
        }
    };
    assert_eq!(deliver(&left, &mut right), 1, "ten small documents fit one frame");
    deliver(&right, &mut left);
    assert_eq!((left.set_hash(), left.len()), (right.set_hash(), 21));
    assert_eq!(left.revocations(), right.revocations());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_order_of_arrival_does_not_matter(seed in any::<u64>(), picks in proptest::collection::vec((0u8..4, 1u64..4, 0u8..3), 1..12)) {
        let mesh = mesh();
        let mut documents: Vec<Document> = picks
            .iter()
            .map(|(name, version, byte)| revoke(&mesh.operator, &format!("n{name}"), *version, *byte))
            .collect();
        let (mut one, mut two) = (mesh.set(), mesh.set());
        for document in &documents {
            one.offer(document.clone(), NOW).unwrap();
        }
        // Any permutation: a rotation and a reversal drawn from the seed.
        let by = usize::try_from(seed % documents.len() as u64).unwrap();
        documents.rotate_left(by);
        if seed % 2 == 0 {
            documents.reverse();
        }
        for document in &documents {
            two.offer(document.clone(), NOW).unwrap();
        }
        prop_assert_eq!(one.set_hash(), two.set_hash());
        prop_assert_eq!(one.revocations(), two.revocations());
    }

    #[test]
    fn garbage_is_no_document_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Document::from_bytes(&bytes).is_err());
    }
}

/// A mesh whose root was replaced `times` times; returns the links in order and the signing keys of each root.
fn rotated(times: usize) -> (tempfile::TempDir, Vec<Document>, Vec<DocumentKey>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    let ca = CaDir::init(&path, &"td".parse().unwrap(), NOW).unwrap();
    let mut keys = vec![DocumentKey::load(&path, Signatory::Root).unwrap()];
    let mut links = Vec::new();
    for _ in 0..times {
        let (link, root) = rotate(&ca);
        links.push(link);
        keys.push(root);
    }
    (dir, links, keys)
}

/// Puts a new root in the place of the one in use; returns the link and the new root's key.
fn rotate(ca: &CaDir) -> (Document, DocumentKey) {
    let rotation = ca.prepare_rotation(None, NOW).unwrap();
    let issuers = rotation.issuers.iter().map(|der| der.to_vec()).collect();
    let link = RootLink { root: rotation.root.to_vec(), proof: rotation.proof.clone(), issuers };
    let id = DocumentId { kind: DocumentKind::Bundle, name: link_name(rotation.number) };
    let content = Content { id, body: link.to_bytes().unwrap(), not_before: NOW, ..content("a", 1, vec![]) };
    let link = Document::sign(content, &rotation.old).unwrap();
    ca.commit_rotation().unwrap();
    (link, DocumentKey::load(ca.path(), Signatory::Root).unwrap())
}

#[test]
fn scenario_20_a_node_that_was_off_walks_from_its_root_to_the_newest() {
    let (_dir, links, keys) = rotated(3);
    let roots: Vec<_> = keys.iter().rev().map(|key| key.certificate().clone()).collect();
    let base = keys[0].bundle().unwrap();
    let bytes: Vec<Vec<u8>> = links.iter().map(Document::to_bytes).collect();
    assert_eq!(walk(&base, &bytes, NOW), roots);
    // Nobody skips a root: without the second link the walk ends at the second root.
    let gap = [bytes[0].clone(), bytes[2].clone()];
    assert_eq!(walk(&base, &gap, NOW), roots[2..]);
    // A newcomer that knows the newest root alone walks back, so that it can check what was signed under the older ones.
    let newest = keys[3].bundle().unwrap();
    let mut backwards = bytes.clone();
    backwards.reverse();
    assert_eq!(walk(&newest, &backwards, NOW), roots);
    assert!(walk(&mesh().root.bundle().unwrap(), &bytes, NOW).len() == 1, "another mesh's root leads nowhere");
}

#[test]
fn a_link_needs_the_signatures_of_both_roots() {
    let (_dir, links, keys) = rotated(1);
    let mut set = DocumentSet::new(&keys[0].bundle().unwrap());
    let good = RootLink::from_bytes(&links[0].content().body).unwrap();
    let thief = mesh();
    // The old root alone names a root whose key did not sign; and a stranger's root signs for ours.
    for (root, proof) in [
        (thief.root.certificate().to_vec(), good.proof.clone()),
        (good.root.clone(), thief.root.sign_link(keys[0].certificate()).unwrap()),
    ] {
        let body = RootLink { root, proof, issuers: Vec::new() }.to_bytes().unwrap();
        let forged = Content { body, ..links[0].content().clone() };
        let forged = Document::sign(forged, &keys[0]).unwrap();
        assert!(matches!(set.offer(forged, NOW), Err(Refused::Signature(_))));
    }
    let own = RootLink { proof: thief.root.sign_link(thief.root.certificate()).unwrap(), ..good };
    let stranger = Content { body: own.to_bytes().unwrap(), ..links[0].content().clone() };
    assert!(set.offer(Document::sign(stranger, &thief.root).unwrap(), NOW).is_err());
    assert_eq!(set.roots().len(), 1);
    set.offer(links[0].clone(), NOW).unwrap();
    assert_eq!(set.roots(), [keys[1].certificate().clone(), keys[0].certificate().clone()]);
    assert_eq!(set.next_root(), 3);
}

#[test]
fn an_old_root_that_is_taken_back_is_believed_no_more() {
    let (_dir, links, keys) = rotated(1);
    let mut set = DocumentSet::new(&keys[0].bundle().unwrap());
    set.offer(links[0].clone(), NOW).unwrap();
    assert_eq!(set.bundle().roots.len(), 2);
    let old = keys[0].spki().unwrap();
    let end = Document::sign(content("old", 1, vec![Revoked::Key(old)]), &keys[1]).unwrap();
    set.offer(end, NOW).unwrap();
    assert_eq!(set.bundle().roots, [keys[1].certificate().clone()]);
    assert_eq!(set.issuer_certificates().len(), 1);
}

/// A mesh whose root 2 followed root 1, in sets that know root 1 alone, root 2 alone, and both.
#[test]
fn an_old_root_that_is_taken_back_takes_along_all_that_stands_under_it_in_any_order() {
    let mesh = mesh();
    let (operator, old) = (&mesh.operator, &mesh.root);
    let ca = CaDir::open(&mesh.dir.path().join("ca"));
    let (link, new) = rotate(&ca);
    let spki = |key: &DocumentKey| key.spki().unwrap();
    let by_operator = revoke(operator, "by-operator", 1, 1);
    let by_old = revoke(old, "by-old", 1, 2);
    let by_new = revoke(&new, "by-new", 1, 3);
    let finish = Document::sign(content("finish", 1, vec![Revoked::Key(spki(old))]), &new).unwrap();
    // The thief of the old key was first, and takes the new one back.
    let theft = Document::sign(content("theft", 1, vec![Revoked::Key(spki(&new))]), old).unwrap();
    let all = [link, by_operator, by_old, by_new, finish, theft];
    let mut hashes = BTreeSet::new();
    for base in [old, &new] {
        for shift in 0..all.len() {
            let mut set = DocumentSet::new(&base.bundle().unwrap());
            // Twice: what came before what it stands on is offered again, as comparisons do.
            for document in all.iter().cycle().skip(shift).take(2 * all.len()) {
                let _refused = set.offer(document.clone(), NOW);
            }
            assert_eq!(set.bundle().roots, [new.certificate().clone()]);
            let held = [1, 2, 3].map(|byte| set.revocations().has_key(&key(byte)));
            assert_eq!((held, set.len()), ([false, false, true], 3), "the link, and what the new root signed");
            hashes.insert(set.set_hash());
            // And nothing new of the old one's.
            let late = [revoke(operator, "late", 1, 4), revoke(old, "late", 1, 4)];
            for document in late {
                assert!(matches!(set.offer(document, NOW), Err(Refused::Signature(VerifyError::Revoked { .. }))));
            }
        }
    }
    assert_eq!(hashes.len(), 1, "the same set everywhere");
}

#[test]
fn a_root_that_was_taken_back_leads_to_no_root_unheard_of() {
    let (_dir, links, keys) = rotated(1);
    let [old, new] = &keys[..] else { panic!("two roots") };
    let mut set = DocumentSet::new(&new.bundle().unwrap());
    let finish = Document::sign(content("finish", 1, vec![Revoked::Key(old.spki().unwrap())]), new).unwrap();
    set.offer(links[0].clone(), NOW).unwrap();
    set.offer(finish, NOW).unwrap();
    // With the old key: a third root, under a new number and in the place of the link that is known.
    let thief = mesh();
    for (number, version) in [(3, 1), (2, 1), (2, 2)] {
        let proof = thief.root.sign_link(old.certificate()).unwrap();
        let body = RootLink { root: thief.root.certificate().to_vec(), proof, issuers: Vec::new() };
        let id = DocumentId { kind: DocumentKind::Bundle, name: link_name(number) };
        let forged = Content { body: body.to_bytes().unwrap(), version, id, ..links[0].content().clone() };
        let refused = set.offer(Document::sign(forged, old).unwrap(), NOW).unwrap_err();
        assert!(matches!(refused, Refused::Signature(VerifyError::Revoked { .. })), "{number}.{version}: {refused}");
        assert_eq!(set.bundle().roots, [new.certificate().clone()]);
    }
}

#[test]
fn scenario_13_a_comparison_brings_the_losing_content_of_a_fork_to_be_reported() {
    let mesh = mesh();
    let (one, two) = (revoke(&mesh.operator, "a", 5, 1), revoke(&mesh.root, "a", 5, 2));
    let (mut left, mut right) = (mesh.set(), mesh.set());
    left.offer(one, NOW).unwrap();
    right.offer(two, NOW).unwrap();
    // Each side gives what it has, whoever wins.
    let (from_left, from_right) = (left.newer_than(&right.digests(), 0), right.newer_than(&left.digests(), 0));
    for (set, given) in [(&mut left, from_right), (&mut right, from_left)] {
        let [bytes] = given.as_slice() else { panic!("one document: {}", given.len()) };
        set.offer(Document::from_bytes(bytes).unwrap(), NOW).unwrap();
        assert_eq!(set.forks().count(), 1);
    }
    assert_eq!(left.set_hash(), right.set_hash());
    assert!(left.newer_than(&right.digests(), 0).is_empty());
}

#[test]
fn who_learned_of_a_fork_alone_tells_the_others_by_comparison() {
    let mesh = mesh();
    let (one, two) = (revoke(&mesh.operator, "a", 5, 1), revoke(&mesh.root, "a", 5, 2));
    let winner = if one.digest().replaces(&two.digest()) { &one } else { &two };
    let mut learned = mesh.set();
    for document in [&one, &two] {
        learned.offer(document.clone(), NOW).unwrap();
    }
    // Who holds the winner, and was offered nothing else; and who holds nothing at all.
    let mut holder = mesh.set();
    holder.offer(winner.clone(), NOW).unwrap();
    for mut set in [holder, mesh.set()] {
        for _round in 0..2 {
            assert_ne!(learned.set_hash(), set.set_hash());
            for bytes in learned.newer_than(&set.digests(), 0) {
                set.offer(Document::from_bytes(&bytes).unwrap(), NOW).unwrap();
            }
            if set.forks().count() == 1 {
                break;
            }
        }
        assert_eq!((set.forks().count(), set.set_hash()), (1, learned.set_hash()));
        assert_eq!(set.get(&winner.content().id).unwrap().document.hash(), winner.hash());
        assert!(set.newer_than(&learned.digests(), 0).is_empty() && learned.newer_than(&set.digests(), 0).is_empty());
    }
    // A newer version ends it, and so does the end of the losing content.
    learned.offer(revoke(&mesh.operator, "a", 6, 3), NOW).unwrap();
    assert!(learned.digests().iter().all(|held| !held.is_forked));
}

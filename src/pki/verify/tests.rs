use std::time::Duration;

use proptest::prelude::*;
use rcgen::{CertificateParams, CustomExtension, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};

use super::super::certificate::{
    ISSUER_LIFE, LEAF_LIFE, NODE_LIFE, Validity, generate_key, issuer_params, leaf_params, node_params, root_params,
    sign,
};
use super::super::revocation::Revoked;
use super::*;

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

/// A whole chain, each certificate of which a test can bend before it is signed.
struct Forge {
    root: CertificateParams,
    issuer: CertificateParams,
    node: CertificateParams,
    leaf: CertificateParams,
}

fn verify_bundle(root: CertificateDer<'static>) -> TrustBundle {
    TrustBundle { trust_domain: "td".parse().unwrap(), roots: vec![root], revoked: Revocations::default() }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl Forge {
    fn new(id: &str) -> Self {
        let domain = "td".parse().unwrap();
        let life = |life| Validity::starting(NOW, life, None);
        Self {
            root: root_params(&domain, NOW).unwrap(),
            issuer: issuer_params(&domain, "issuer 1", life(ISSUER_LIFE)).unwrap(),
            node: node_params(&domain, &"a".parse().unwrap(), &"web".parse().unwrap(), life(NODE_LIFE)).unwrap(),
            leaf: leaf_params(&id.parse().unwrap(), life(LEAF_LIFE)).unwrap(),
        }
    }

    fn sign(&self) -> (Vec<CertificateDer<'static>>, TrustBundle, KeyPair) {
        let [root, issuer, node, leaf] = [(); 4].map(|()| generate_key().unwrap());
        let root_der = self.root.self_signed(&root).unwrap().der().clone();
        let by_root = rcgen::Issuer::from_params(&self.root, &root);
        let by_issuer = rcgen::Issuer::from_params(&self.issuer, &issuer);
        let by_node = rcgen::Issuer::from_params(&self.node, &node);
        let chain = vec![
            self.leaf.signed_by(&leaf, &by_node).unwrap().der().clone(),
            self.node.signed_by(&node, &by_issuer).unwrap().der().clone(),
            self.issuer.signed_by(&issuer, &by_root).unwrap().der().clone(),
        ];
        (chain, verify_bundle(root_der), node)
    }

    fn verify(&self) -> Result<PeerIdentity, VerifyError> {
        let (chain, bundle, _) = self.sign();
        check_peer(&chain, &bundle, NOW)
    }
}

#[track_caller]
fn refused(bend: impl FnOnce(&mut Forge)) -> VerifyError {
    let mut forge = Forge::new("spiffe://td/svc/web/node/a");
    forge.verify().expect("the unbent chain is good");
    bend(&mut forge);
    forge.verify().unwrap_err()
}

#[test]
fn a_good_chain_names_the_peer_its_scope_and_the_first_end() {
    let peer = Forge::new("spiffe://td/node/a").verify().unwrap();
    assert_eq!((peer.node.as_str(), peer.scope.to_string().as_str()), ("a", "web"));
    assert_eq!(peer.not_after, NOW.plus(LEAF_LIFE));
}

#[test]
fn every_rule_for_a_leaf_holds() {
    let escalated = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://td/svc/db/node/a")]);
    assert!(matches!(escalated, VerifyError::OutsideScope { .. }), "{escalated}");
    let other = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://td/svc/web/node/b")]);
    assert!(matches!(other, VerifyError::OtherNode { .. }), "{other}");
    let node = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://td/node/b")]);
    assert!(matches!(node, VerifyError::OtherNode { .. }), "{node}");
    let foreign = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://other/node/a")]);
    assert!(matches!(foreign, VerifyError::TrustDomain { .. }), "{foreign}");
    let operator = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://td/operator/a")]);
    assert!(matches!(operator, VerifyError::Id { role: "leaf", .. }), "{operator}");
    let shape = refused(|f| f.leaf.subject_alt_names = vec![uri("spiffe://td/ns/x")]);
    assert!(matches!(shape, VerifyError::Spiffe { role: "leaf", .. }), "{shape}");
    let two = refused(|f| f.leaf.subject_alt_names.push(uri("spiffe://td/node/a")));
    assert!(matches!(two, VerifyError::Names { role: "leaf" }), "{two}");
    let none = refused(|f| f.leaf.subject_alt_names.clear());
    assert!(matches!(none, VerifyError::Names { role: "leaf" }), "{none}");
    let ca = refused(|f| f.leaf.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    assert!(matches!(ca, VerifyError::Usage { role: "leaf", .. }), "{ca}");
    for usages in [vec![], vec![KeyUsagePurpose::KeyAgreement]] {
        let usage = refused(|f| f.leaf.key_usages = usages);
        assert!(matches!(usage, VerifyError::Usage { role: "leaf", .. }), "{usage}");
    }
    for extra in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let usage = refused(|f| f.leaf.key_usages.push(extra));
        assert!(matches!(usage, VerifyError::Usage { role: "leaf", .. }), "{usage}");
    }
    let scope = refused(|f| f.leaf.custom_extensions = f.node.custom_extensions.clone());
    assert!(matches!(scope, VerifyError::Extension { role: "leaf", .. }), "{scope}");
}

#[test]
fn every_rule_for_signers_holds() {
    let path = refused(|f| f.node.subject_alt_names = vec![uri("spiffe://td/node/a")]);
    assert!(matches!(path, VerifyError::Id { role: "node", .. }), "{path}");
    let path = refused(|f| f.issuer.subject_alt_names = vec![uri("spiffe://td/node/a")]);
    assert!(matches!(path, VerifyError::Id { role: "issuer", .. }), "{path}");
    let domain = refused(|f| f.node.subject_alt_names = vec![uri("spiffe://other")]);
    assert!(matches!(domain, VerifyError::TrustDomain { .. }), "{domain}");
    let usage = refused(|f| f.node.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    assert!(matches!(usage, VerifyError::Usage { role: "node", .. }), "{usage}");
    let length = refused(|f| f.node.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(1)));
    assert!(matches!(length, VerifyError::Usage { role: "node", .. }), "{length}");
    let absent = refused(|f| f.node.custom_extensions.clear());
    assert!(matches!(absent, VerifyError::Extension { role: "node", rule: "has no serve scope" }), "{absent}");
    let issuer = refused(|f| f.issuer.custom_extensions = f.node.custom_extensions.clone());
    assert!(matches!(issuer, VerifyError::Extension { role: "issuer", .. }), "{issuer}");
    let malformed = refused(|f| {
        let oid: Vec<u64> = f.node.custom_extensions[0].oid_components().collect();
        f.node.custom_extensions = vec![CustomExtension::from_oid_content(&oid, vec![1, 2])];
    });
    assert!(matches!(malformed, VerifyError::Extension { role: "node", .. }), "{malformed}");
    let no_ca = refused(|f| f.node.is_ca = IsCa::ExplicitNoCa);
    assert!(matches!(no_ca, VerifyError::Path { .. }), "{no_ca}");
}

#[test]
fn times_outside_validity_name_both_times_and_the_clock() {
    let (chain, bundle, _) = Forge::new("spiffe://td/node/a").sign();
    let early = check_peer(&chain, &bundle, UnixSeconds(NOW.0 - 61)).unwrap_err();
    assert!(matches!(early, VerifyError::NotYetValid { role: "leaf", .. }) && early.to_string().contains("clock"));
    let late = check_peer(&chain, &bundle, UnixSeconds(NOW.0 + 3601)).unwrap_err();
    assert!(matches!(late, VerifyError::Expired { role: "leaf", .. }));
    assert!(late.to_string().contains("2027-01-15T09:00:00Z"), "{late}");
}

#[test]
fn chains_of_another_length_another_root_or_size_are_refused() {
    let (chain, bundle, _) = Forge::new("spiffe://td/node/a").sign();
    let (_, other, _) = Forge::new("spiffe://td/node/a").sign();
    assert!(matches!(check_peer(&chain, &other, NOW), Err(VerifyError::Path { .. })));
    assert!(matches!(check_peer(&chain[..2], &bundle, NOW), Err(VerifyError::Length { found: 2, .. })));
    let long = [chain.as_slice(), bundle.roots.as_slice()].concat();
    assert!(matches!(check_peer(&long, &bundle, NOW), Err(VerifyError::Length { found: 4, .. })));
    let mut huge = chain.clone();
    huge[0] = CertificateDer::from(vec![0; CERTIFICATE_BYTES_MAX + 1]);
    assert!(matches!(check_peer(&huge, &bundle, NOW), Err(VerifyError::TooLarge { .. })));
}

#[test]
fn a_nodes_signature_is_believed_for_its_own_message_and_context_only() {
    let (chain, bundle, key) = Forge::new("spiffe://td/node/a").sign();
    let (_, other, _) = Forge::new("spiffe://td/node/a").sign();
    let published = &chain[1..];
    let good = sign(&key, CONTEXT_NODE, b"state").unwrap();
    let (node, scope, _) = verify_signed_by_node(published, b"state", &good, &bundle, NOW).unwrap();
    assert_eq!((node.as_str(), scope.to_string().as_str()), ("a", "web"));
    let renewal = sign(&key, "weft-renew/1", b"state").unwrap();
    for (message, signature) in [(b"altered".as_slice(), &good), (b"state", &renewal), (b"state", &vec![])] {
        let refused = verify_signed_by_node(published, message, signature, &bundle, NOW).unwrap_err();
        assert!(matches!(refused, PkiError::Verify(VerifyError::Signature { .. })), "{refused}");
    }
    assert!(verify_signed_by_node(published, b"state", &good, &other, NOW).is_err());
    assert!(verify_signed_by_node(published, b"state", &good, &bundle, NOW.plus(NODE_LIFE + LEAF_LIFE)).is_err());
    assert!(verify_signed_by_node(&chain[..2], b"state", &good, &bundle, NOW).is_err());
}

#[test]
fn a_chain_that_was_checked_is_good_as_long_as_each_certificate_of_it() {
    let (chain, bundle, key) = Forge::new("spiffe://td/node/a").sign();
    let checked = NodeChain::check(&chain[1..], &bundle, NOW).unwrap();
    assert_eq!((checked.node.as_str(), checked.not_after), ("a", NOW.plus(NODE_LIFE)));
    let day = Duration::from_hours(24);
    for at in [UnixSeconds(NOW.0 - day.as_secs()), NOW, NOW.plus(NODE_LIFE), NOW.plus(NODE_LIFE + day)] {
        let again = NodeChain::check(&chain[1..], &bundle, at);
        assert_eq!(checked.is_good_at(at), again.is_ok(), "{at:?}");
    }
    let good = sign(&key, CONTEXT_NODE, b"state").unwrap();
    assert!(checked.verify(b"state", &good).is_ok() && checked.verify(b"other", &good).is_err());
}

#[test]
fn what_is_revoked_is_refused_from_a_peer_and_in_records() {
    let (chain, bundle, _) = Forge::new("spiffe://td/svc/web/node/a").sign();
    let (_, shown) = check_presented(&chain, &bundle, NOW).unwrap();
    let node = Revoked::Node { node: "a".parse().unwrap(), until: NOW };
    let keys = [shown.intermediate, shown.issuer, shown.leaf.unwrap()].map(Revoked::Key);
    // A published chain has no leaf.
    for (revoked, is_published) in keys.into_iter().chain([node]).zip([true, true, false, true]) {
        let what = format!("{revoked:?}");
        let bundle = TrustBundle { revoked: [revoked].into_iter().collect(), ..bundle.clone() };
        assert!(check_peer(&chain, &bundle, NOW).is_err(), "{what}");
        assert_eq!(NodeChain::check(&chain[1..], &bundle, NOW).is_err(), is_published, "{what}");
        assert_eq!(check_revoked(&chain[1..], &bundle).is_err(), is_published, "{what}");
    }
}

#[test]
fn each_certificate_of_a_chain_ends_the_chain() {
    type Bend = fn(&mut Forge);
    let bent = |bend: Bend| {
        let mut forge = Forge::new("spiffe://td/node/a");
        bend(&mut forge);
        let (chain, bundle, _) = forge.sign();
        (check_peer(&chain, &bundle, NOW), NodeChain::check(&chain[1..], &bundle, NOW))
    };
    let ended: [(&str, Bend); 3] = [
        ("node", |f| f.node.not_after = f.leaf.not_before),
        ("issuer", |f| f.issuer.not_after = f.leaf.not_before),
        ("root", |f| f.root.not_after = f.leaf.not_before),
    ];
    for (who, bend) in ended {
        let (peer, published) = bent(bend);
        assert!(matches!(&peer, Err(VerifyError::Expired { role, .. }) if *role == who), "{who}: {peer:?}");
        let is_ended = matches!(&published, Err(PkiError::Verify(VerifyError::Expired { role, .. })) if *role == who);
        assert!(is_ended, "{who}: {published:?}");
    }
    let (_, published) = bent(|f| f.issuer.not_after = f.leaf.not_after);
    assert_eq!(published.unwrap().not_after, NOW.plus(LEAF_LIFE), "the issuer ends before the node");
    let (_, published) = bent(|f| {
        let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
        unknown.set_criticality(true);
        f.node.custom_extensions.push(unknown);
    });
    assert!(published.unwrap_err().to_string().contains("critical"), "what nobody here understands");
}

#[test]
fn each_certificate_names_its_signer_and_none_is_idle() {
    let forge = Forge::new("spiffe://td/node/a");
    let [root, issuer, node, leaf] = [(); 4].map(|()| generate_key().unwrap());
    let bundle = verify_bundle(forge.root.self_signed(&root).unwrap().der().clone());
    let by_root = rcgen::Issuer::from_params(&forge.root, &root);
    let issuer_der = forge.issuer.signed_by(&issuer, &by_root).unwrap().der().clone();
    // The issuer's key signs, under another name than its certificate's.
    let mut renamed = forge.issuer.clone();
    renamed.distinguished_name.push(DnType::CommonName, "issuer 2");
    let by_renamed = rcgen::Issuer::from_params(&renamed, &issuer);
    let node_der = forge.node.signed_by(&node, &by_renamed).unwrap().der().clone();
    let refused = NodeChain::check(&[node_der, issuer_der.clone()], &bundle, NOW).unwrap_err();
    assert!(refused.to_string().contains("issuer and subject differ"), "{refused}");
    // The root signs the node itself: the issuer that is shown has nothing to do with it, and may be any.
    let node_der = forge.node.signed_by(&node, &by_root).unwrap().der().clone();
    let by_node = rcgen::Issuer::from_params(&forge.node, &node);
    let leaf_der = forge.leaf.signed_by(&leaf, &by_node).unwrap().der().clone();
    let refused = check_peer(&[leaf_der, node_der, issuer_der], &bundle, NOW).unwrap_err();
    assert!(refused.to_string().contains("does not need"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_chain_is_refused_without_a_panic(at in 0usize..3, byte in 0usize..400, bits in 1u8..) {
        let (mut chain, bundle, _) = Forge::new("spiffe://td/node/a").sign();
        let mut der = chain[at].to_vec();
        let byte = byte % der.len();
        der[byte] ^= bits;
        chain[at] = CertificateDer::from(der);
        prop_assert!(check_peer(&chain, &bundle, NOW).is_err());
    }
}

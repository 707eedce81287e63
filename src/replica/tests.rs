//! The replica's contract: convergence, atomicity, bounds.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::model::{CheckRecord, ExternalRecord, HealthStatus, NodeInfo, Protocol, ServeScope, ServiceRecord, TextMap};
use crate::wire;

const NOW: UnixSeconds = UnixSeconds(1_700_000_000);
const BYTES_MAX: usize = 256 * 1024;

/// Signs with a hash; its "certificate" reads `node|scope|serial`.
#[derive(Clone)]
struct FakeSigner {
    certificate: String,
}

impl FakeSigner {
    fn new(node: &str, scope: &str) -> Self {
        Self { certificate: format!("{node}|{scope}|1") }
    }
}

fn fake_signature(certificate: &[u8], message: &[u8]) -> Vec<u8> {
    sha256(&[b"secret", certificate, message].concat()).to_vec()
}

impl HeadSigner for FakeSigner {
    fn chain(&self) -> Vec<Vec<u8>> {
        vec![self.certificate.clone().into_bytes()]
    }
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(fake_signature(self.certificate.as_bytes(), message))
    }
}

struct FakeVerifier;

impl HeadVerifier for FakeVerifier {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let certificate = chain.first().ok_or("no certificate")?;
        if fake_signature(certificate, message) != signature {
            return Err("bad signature".to_owned());
        }
        let text = String::from_utf8(certificate.clone()).map_err(|error| error.to_string())?;
        let mut parts = text.split('|');
        let node = parts.next().unwrap_or_default().parse().map_err(|_| "bad name")?;
        let scope: ServeScope = parts.next().unwrap_or_default().parse().map_err(|_| "bad scope")?;
        Ok(VerifiedHead { node, scope, not_after: NOW.plus(Duration::from_hours(24)) })
    }
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn generation(number: u64) -> Generation {
    Generation { number, nonce: 9 }
}

fn replica(node: &str) -> Replica {
    Replica::new(name(node), generation(1), Params::default())
}

fn facts(node: &str) -> Entry {
    Entry::Node(Arc::new(NodeInfo {
        id: "id".to_owned(),
        name: name(node),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "0.1.0".to_owned(),
        issuer: false,
    }))
}

fn service(id: &str, service: &str, port: u16) -> Entry {
    Entry::Service(Arc::new(ServiceRecord {
        tags: ["v1".into()].into(),
        port,
        protocol: Protocol::Http,
        ..ServiceRecord::new(id.parse().unwrap(), service.parse().unwrap())
    }))
}

fn external(node: &str, services: &[&str]) -> Entry {
    let record = |of: &&str| match service(of, of, 1) {
        Entry::Service(record) => record,
        _ => unreachable!(),
    };
    Entry::External(Arc::new(ExternalRecord {
        name: name(node),
        id: Box::default(),
        address: "192.0.2.1".into(),
        tagged_addresses: TextMap::default(),
        meta: TextMap::default(),
        services: services.iter().map(record).collect(),
        checks: Box::default(),
    }))
}

fn check(id: &str, about: Option<&str>) -> Entry {
    Entry::Check(Arc::new(CheckRecord {
        id: id.parse().unwrap(),
        name: "check".into(),
        status: HealthStatus::Passing,
        notes: Box::default(),
        service: about.map(|about| about.parse().unwrap()),
        kind: "ttl".into(),
    }))
}

fn records(entries: impl IntoIterator<Item = Entry>) -> BTreeMap<EntryKey, Entry> {
    entries.into_iter().map(|entry| (entry.key(), entry)).collect()
}

fn publish(replica: &mut Replica, entries: impl IntoIterator<Item = Entry>) -> Option<Delta> {
    let signer = FakeSigner::new(replica.local.as_str(), "*");
    replica.publish(records(entries), &signer, NOW).unwrap()
}

fn apply(replica: &mut Replica, delta: &Delta) -> Result<Applied, ApplyError> {
    replica.apply(delta, &FakeVerifier, NOW)
}

/// Everything that a reader can see.
fn view(replica: &Replica) -> String {
    let shown = |(name, state): (&NodeName, &NodeState)| {
        let NodeState { generation, version, info, .. } = state;
        let (services, checks): (Vec<_>, Vec<_>) = (state.services().collect(), state.checks().collect());
        let externals: Vec<_> = state.externals().collect();
        format!("{name} {generation:?} {version} {info:?} {services:?} {checks:?} {externals:?}\n")
    };
    replica.nodes().map(shown).collect()
}

/// One round of anti-entropy between `a` and `b`, as gossip does it; returns whether anything moved.
fn synchronise(a: &mut Replica, b: &mut Replica, bytes_max: usize) -> bool {
    if a.set_hash() == b.set_hash() {
        return false;
    }
    let buckets = a.differing(&b.bucket_hashes());
    let theirs = b.digests(&buckets);
    let mut is_moved = false;
    for delta in a.newer_than(&buckets, &theirs, bytes_max) {
        is_moved |= pull_if_behind(b, a, &delta);
    }
    for have in a.wanted(&theirs) {
        let delta = b.delta_for(&have).unwrap();
        is_moved |= pull_if_behind(a, b, &delta);
    }
    is_moved
}

fn pull_if_behind(receiver: &mut Replica, sender: &Replica, delta: &Delta) -> bool {
    match apply(receiver, delta) {
        Ok(Applied::Behind) => {
            let whole = sender.delta_for(&Digest::none(delta.node().clone())).unwrap();
            matches!(apply(receiver, &whole), Ok(Applied::Updated))
        }
        other => matches!(other, Ok(Applied::Updated)),
    }
}

#[test]
fn a_published_state_is_the_same_on_the_other_side() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let first = publish(&mut a, [facts("a"), service("w1", "web", 80), check("c", Some("w1"))]).unwrap();
    assert_eq!(apply(&mut b, &first), Ok(Applied::Updated));
    let second = publish(&mut a, [facts("a"), service("w1", "web", 81)]).unwrap();
    assert!(!second.is_whole() && second.chain.is_none());
    assert_eq!((second.changes.len(), second.removed.len()), (1, 1));
    assert_eq!(apply(&mut b, &second), Ok(Applied::Updated));
    assert_eq!(apply(&mut b, &second), Ok(Applied::Stale));
    assert_eq!(apply(&mut b, &first), Ok(Applied::Stale));
    assert_eq!(view(&a), view(&b));
    assert_eq!(a.set_hash(), b.set_hash());
    assert_eq!(b.state(&name("a")).unwrap().services().count(), 1);
}

#[test]
fn nothing_is_published_when_nothing_changed_until_half_of_the_lease_is_gone() {
    let mut a = replica("a");
    let signer = FakeSigner::new("a", "*");
    let entries = || records([facts("a")]);
    assert!(a.publish(entries(), &signer, NOW).unwrap().is_some());
    assert!(a.publish(entries(), &signer, NOW.plus(Duration::from_secs(1300))).unwrap().is_none());
    let refresh = a.publish(entries(), &signer, NOW.plus(Duration::from_mins(30))).unwrap().unwrap();
    assert!(refresh.changes.is_empty() && refresh.chain.is_none());
    assert_eq!(refresh.digest().version, 2);
}

#[test]
fn leases_grow_with_the_mesh_so_that_renewals_cost_the_same_in_a_mesh_of_any_size() {
    let params = Params { lease_nodes: 2, lease_max: Duration::from_hours(3), ..Params::default() };
    let mut a = Replica::new(name("a"), generation(1), params);
    let signer = FakeSigner::new("a", "*");
    let ends = |replica: &mut Replica, now| {
        let delta = replica.publish(records([facts("a")]), &signer, now).unwrap()?;
        Some(delta.head.not_after.since(now))
    };
    assert_eq!(ends(&mut a, NOW), Some(Duration::from_hours(1)));
    for other in ["b", "c", "d", "e"] {
        let delta = publish(&mut replica(other), [facts(other)]).unwrap();
        apply(&mut a, &delta).unwrap();
    }
    // The present lease stays as it is; the next one is as long as five nodes make it.
    let later = NOW.plus(Duration::from_mins(10));
    assert_eq!(ends(&mut a, later), None);
    let half = NOW.plus(Duration::from_mins(31));
    assert_eq!(ends(&mut a, half), Some(Duration::from_hours(3)));
    assert_eq!(ends(&mut a, half.plus(Duration::from_mins(60))), None, "half of three hours is not over");
    assert!(ends(&mut a, half.plus(Duration::from_mins(91))).is_some());
}

#[test]
fn a_renewed_chain_is_published_and_sent_only_to_those_who_lack_it() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let first = publish(&mut a, [facts("a")]).unwrap();
    apply(&mut b, &first).unwrap();
    let renewed = FakeSigner { certificate: "a|*|2".to_owned() };
    let delta = a.publish(records([facts("a")]), &renewed, NOW).unwrap().unwrap();
    assert!(delta.chain.is_some() && delta.changes.is_empty());
    assert_eq!(apply(&mut b, &delta), Ok(Applied::Updated));
    let have = b.state(&name("a")).unwrap().digest().clone();
    let later = a.publish(records([facts("a"), service("w", "web", 1)]), &renewed, NOW).unwrap().unwrap();
    assert!(later.chain.is_none());
    assert_eq!(a.delta_for(&have).unwrap(), later);
    assert!(a.delta_for(&first.digest()).unwrap().chain.is_some());
    // Without the chain in between the receiver says so.
    let mut late = replica("c");
    apply(&mut late, &first).unwrap();
    assert_eq!(apply(&mut late, &later), Ok(Applied::Behind));
}

#[test]
fn a_gap_is_told_and_the_whole_state_closes_it() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    publish(&mut a, [facts("a")]).unwrap();
    let second = publish(&mut a, [facts("a"), service("w", "web", 1)]).unwrap();
    assert_eq!(apply(&mut b, &second), Ok(Applied::Behind));
    let whole = a.delta_for(&Digest::none(name("a"))).unwrap();
    assert_eq!(apply(&mut b, &whole), Ok(Applied::Updated));
    assert_eq!(a.set_hash(), b.set_hash());
    assert!(a.delta_for(&whole.digest()).is_none());
}

#[test]
fn a_delta_serves_every_receiver_between_its_base_and_its_head() {
    let mut a = replica("a");
    let first = publish(&mut a, [facts("a"), service("w", "web", 1)]).unwrap();
    let second = publish(&mut a, [facts("a"), service("w", "web", 2)]).unwrap();
    publish(&mut a, [facts("a"), service("x", "web", 3)]).unwrap();
    let wide = a.delta_for(&first.digest()).unwrap();
    assert!(!wide.is_whole());
    let mut b = replica("b");
    apply(&mut b, &first).unwrap();
    apply(&mut b, &second).unwrap();
    assert_eq!(apply(&mut b, &wide), Ok(Applied::Updated));
    assert_eq!(view(&a), view(&b));
}

#[test]
fn a_new_life_replaces_the_old_one_and_an_old_life_never_comes_back() {
    let mut old = replica("a");
    let stale = publish(&mut old, [facts("a"), service("w", "web", 1)]).unwrap();
    let mut new = Replica::new(name("a"), generation(2), Params::default());
    let fresh = publish(&mut new, [facts("a")]).unwrap();
    let mut b = replica("b");
    apply(&mut b, &stale).unwrap();
    assert_eq!(apply(&mut b, &fresh), Ok(Applied::Updated));
    assert_eq!(apply(&mut b, &stale), Ok(Applied::Stale));
    assert!(b.state(&name("a")).unwrap().services().next().is_none());
    // Its own name: an older life is nothing, a newer one is an alarm; neither is applied.
    assert_eq!(apply(&mut new, &stale), Ok(Applied::Stale));
    let before = view(&old);
    assert_eq!(apply(&mut old, &fresh), Err(ApplyError::OwnName { generation: generation(2) }));
    assert_eq!(view(&old), before);
    let mut restarted = Replica::new(name("a"), generation(2), Params::default());
    assert_eq!(apply(&mut restarted, &stale), Ok(Applied::Stale));
    assert_eq!(restarted.wanted(&[stale.digest()]), []);
    let newer = Digest { generation: generation(3), ..stale.digest() };
    assert_eq!(restarted.wanted(&[newer]), [Digest::none(name("a"))]);
}

#[test]
fn of_two_heads_of_one_version_the_smaller_hash_wins_everywhere_and_is_reported_once() {
    let (mut one, mut two) = (replica("a"), replica("a"));
    let left = publish(&mut one, [facts("a"), service("w", "web", 1)]).unwrap();
    let right = publish(&mut two, [facts("a"), service("w", "web", 2)]).unwrap();
    let (winner, loser) = if left.digest().hash < right.digest().hash { (left, right) } else { (right, left) };
    let (mut b, mut c) = (replica("b"), replica("c"));
    apply(&mut b, &winner).unwrap();
    apply(&mut c, &loser).unwrap();
    assert!(synchronise(&mut b, &mut c, BYTES_MAX));
    assert_eq!(b.set_hash(), c.set_hash());
    assert_eq!(c.state(&name("a")).unwrap().digest(), &winner.digest());
    let fork = Report::Fork { node: name("a"), generation: generation(1), version: 1 };
    assert_eq!(c.take_reports(), std::slice::from_ref(&fork));
    assert_eq!(apply(&mut b, &loser), Ok(Applied::Stale));
    assert_eq!(apply(&mut b, &loser), Ok(Applied::Stale));
    assert_eq!(b.take_reports(), [fork]);
}

#[test]
fn services_outside_the_scope_are_not_shown_and_hashes_agree_all_the_same() {
    let (mut a, mut b, mut c) = (replica("a"), replica("b"), replica("c"));
    let signer = FakeSigner::new("a", "web");
    let entries = [
        facts("a"),
        service("w", "web", 1),
        service("p", "payments", 2),
        check("cw", Some("w")),
        check("cp", Some("p")),
    ];
    let delta = a.publish(records(entries.clone()), &signer, NOW).unwrap().unwrap();
    assert_eq!(apply(&mut b, &delta), Ok(Applied::Updated));
    let state = b.state(&name("a")).unwrap();
    assert_eq!(state.services().map(|record| record.id.as_str()).collect::<Vec<_>>(), ["w"]);
    assert_eq!(state.checks().map(|record| record.id.as_str()).collect::<Vec<_>>(), ["cw"]);
    assert_eq!(state.withheld().count(), 2);
    let services = vec!["payments".parse().unwrap()];
    assert_eq!(b.take_reports(), [Report::OutOfScope { node: name("a"), version: 1, services }]);
    // What was withheld is passed on, and a wider certificate shows it.
    synchronise(&mut b, &mut c, BYTES_MAX);
    assert_eq!(b.set_hash(), c.set_hash());
    let wider = a.publish(records(entries), &FakeSigner::new("a", "*"), NOW).unwrap().unwrap();
    assert!(wider.changes.is_empty());
    assert_eq!(apply(&mut c, &wider), Ok(Applied::Updated));
    assert_eq!(c.state(&name("a")).unwrap().services().count(), 2);
    assert_eq!(c.state(&name("a")).unwrap().withheld().count(), 0);
}

#[test]
fn a_node_without_an_agent_with_one_service_outside_the_scope_is_withheld_whole() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let signer = FakeSigner::new("a", "db");
    let entries = [facts("a"), external("h1", &["db"]), external("h2", &["db", "payments"])];
    let delta = a.publish(records(entries), &signer, NOW).unwrap().unwrap();
    assert_eq!(apply(&mut b, &delta), Ok(Applied::Updated));
    let shown = |replica: &Replica| {
        let state = replica.state(&name("a")).unwrap();
        state.externals().map(|record| record.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(shown(&b), ["h1"]);
    let withheld: Vec<EntryKey> = b.state(&name("a")).unwrap().withheld().collect();
    assert_eq!(withheld, [EntryKey::External(name("h2"))]);
    let services = vec!["payments".parse().unwrap()];
    assert_eq!(b.take_reports(), [Report::OutOfScope { node: name("a"), version: 1, services }]);
    assert_eq!(a.set_hash(), b.set_hash());
}

#[test]
fn nodes_without_an_agent_come_change_and_go_by_deltas() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let first = publish(&mut a, [facts("a"), external("h1", &["db"]), external("h2", &["db"])]).unwrap();
    assert_eq!(apply(&mut b, &first), Ok(Applied::Updated));
    let change = publish(&mut a, [facts("a"), external("h1", &["db", "cache"])]).unwrap();
    assert_eq!((change.changes.len(), change.removed.as_slice()), (1, &[EntryKey::External(name("h2"))][..]));
    assert_eq!(apply(&mut b, &change), Ok(Applied::Updated));
    assert_eq!(view(&a), view(&b));
    let services: usize = b.state(&name("a")).unwrap().externals().map(|record| record.services.len()).sum();
    assert_eq!(services, 2);
    assert!(publish(&mut a, [facts("a"), external("h1", &["db", "cache"])]).is_none(), "the same again is no news");
}

#[test]
fn another_nodes_signature_is_refused() {
    let mut liar = replica("a");
    let forged = liar.publish(records([facts("a")]), &FakeSigner::new("mallory", "*"), NOW).unwrap().unwrap();
    let mut b = replica("b");
    let error = apply(&mut b, &forged).unwrap_err();
    assert_eq!(error, ApplyError::ForeignSigner { node: name("a"), signer: name("mallory") });
    assert_eq!(b.nodes().count(), 0);
}

#[test]
fn leases_end_and_absurd_ones_are_refused() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    publish(&mut b, [facts("b")]);
    let delta = publish(&mut a, [facts("a")]).unwrap();
    let hour = Duration::from_hours(1);
    let late = b.apply(&delta, &FakeVerifier, NOW.plus(hour)).unwrap_err();
    assert!(matches!(late, ApplyError::LeaseOver { .. }));
    // A lease of the longest and an hour's clock error are accepted: 73 h, of which this lease takes one.
    let early = b.apply(&delta, &FakeVerifier, NOW.minus(hour * 72 + Duration::from_secs(1))).unwrap_err();
    assert!(matches!(early, ApplyError::LeaseAhead { .. }));
    let alone = b.set_hash();
    apply(&mut b, &delta).unwrap();
    assert_eq!(b.expire(NOW.plus(hour).minus(Duration::from_secs(1))), []);
    assert_eq!(b.expire(NOW.plus(hour)), [name("a")]);
    assert_eq!(b.set_hash(), alone);
}

/// As [`FakeVerifier`], by certificates that end in a minute.
struct Ending;

impl HeadVerifier for Ending {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let verified = FakeVerifier.verify(chain, message, signature)?;
        Ok(VerifiedHead { not_after: NOW.plus(Duration::from_mins(1)), ..verified })
    }
}

#[test]
fn records_end_with_their_certificate_where_that_ends_before_the_lease() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let delta = publish(&mut a, [facts("a")]).unwrap();
    b.apply(&delta, &Ending, NOW).unwrap();
    assert_eq!(b.expire(NOW.plus(Duration::from_secs(59))), []);
    assert_eq!(b.expire(NOW.plus(Duration::from_mins(1))), [name("a")]);
}

#[test]
fn what_a_clock_ahead_signed_is_signed_anew_once_the_clock_is_right() {
    let mut a = replica("a");
    let signer = FakeSigner::new("a", "*");
    let mut signs = |now| a.publish(records([facts("a")]), &signer, now).unwrap().is_some();
    assert!(signs(NOW.plus(Duration::from_hours(2))));
    // Others might refuse a lease that ends so far ahead.
    assert!(signs(NOW));
    assert!(!signs(NOW), "once");
}

#[test]
fn the_own_state_outlives_its_lease_its_chain_and_whoever_forgets_it() {
    let mut a = replica("a");
    publish(&mut a, [facts("a"), service("w1", "web", 80)]).unwrap();
    let before = (view(&a), a.set_hash());
    assert_eq!(a.expire(NOW.plus(Duration::from_hours(100))), []);
    assert_eq!(a.drop_unless(|_| false), []);
    a.remove(&name("a"));
    assert_eq!((view(&a), a.set_hash()), before);
}

#[test]
fn another_life_of_the_own_name_is_an_error_and_a_past_one_is_not_asked_for() {
    let mut a = Replica::new(name("a"), generation(2), Params::default());
    publish(&mut a, [facts("a")]).unwrap();
    let (mut past, mut next) = (replica("a"), Replica::new(name("a"), generation(3), Params::default()));
    let (past, next) = (publish(&mut past, [facts("a")]).unwrap(), publish(&mut next, [facts("a")]).unwrap());
    let before = view(&a);
    assert_eq!(apply(&mut a, &past), Ok(Applied::Stale));
    assert_eq!(apply(&mut a, &next), Err(ApplyError::OwnName { generation: generation(3) }));
    assert_eq!(view(&a), before);
    // Before anything was published, too: the past was this node's own, and is over.
    let fresh = Replica::new(name("a"), generation(2), Params::default());
    for replica in [&a, &fresh] {
        assert_eq!(replica.wanted(&[past.digest()]), []);
        assert_eq!(replica.wanted(&[next.digest()]).len(), 1, "the proof of a twin");
    }
}

#[test]
fn a_delta_that_contradicts_itself_is_refused_for_what_is_wrong_with_it() {
    #[track_caller]
    fn check(delta: &Delta, spoil: impl Fn(&mut Delta), what: &'static str) {
        let (mut b, mut spoilt) = (replica("b"), delta.clone());
        spoil(&mut spoilt);
        assert_eq!(apply(&mut b, &spoilt), Err(ApplyError::Malformed { node: name("a"), what }));
        assert_eq!(b.nodes().count(), 0);
    }
    let mut a = replica("a");
    let whole = publish(&mut a, [facts("a"), service("w1", "web", 80)]).unwrap();
    let partial = publish(&mut a, [facts("a")]).unwrap();
    assert!(whole.is_whole() && !partial.is_whole() && partial.removed.len() == 1);
    let (key, set) = (partial.removed[0].clone(), &whole.changes[1]);

    let version = "an entry changed at a version that it does not lead over";
    check(&whole, |delta| delta.changes[1].version = 2, version);
    check(&partial, |delta| delta.changes.push(set.clone()), version);
    check(&whole, |delta| delta.changes.push(set.clone()), "an entry stands there twice");
    check(&whole, |delta| delta.changes[0].entry = facts("b"), "its facts name another node");
    check(&whole, |delta| delta.removed.push(key.clone()), "it removes keys from nothing");
    let both = |delta: &mut Delta| {
        delta.changes.push(set.clone());
        delta.changes[0].version = 2;
    };
    check(&partial, both, "it sets and removes one key");
    let many = |delta: &mut Delta| delta.removed = vec![key.clone(); Params::default().grave_max + 1];
    check(&partial, many, "it removes more keys than are remembered");
    let mut swapped = whole.clone();
    swapped.chain = Some(FakeSigner { certificate: "a|*|2".to_owned() }.chain());
    assert_eq!(apply(&mut replica("b"), &swapped), Err(ApplyError::Chain { node: name("a") }));
}

#[test]
fn bounds_hold_on_both_sides() {
    let mut a = replica("a");
    let many = (0..900).map(|at| service(&format!("w{at}"), &format!("web-{}", "x".repeat(50)), 1));
    let error = a.publish(records(many), &FakeSigner::new("a", "*"), NOW).unwrap_err();
    let PublishError::TooLarge { bytes, bytes_max: 65_536 } = error else { panic!("{error}") };
    assert!(bytes > 65_536);
    assert_eq!(a.nodes().count(), 0);
    // A peer that publishes more than its bound allows here.
    let wide = Params { node_bytes_max: 100_000, ..Params::default() };
    let mut peer = Replica::new(name("p"), generation(1), wide);
    let delta = publish(&mut peer, (0..1000).map(|at| service(&format!("w{at}"), &"x".repeat(50), 1))).unwrap();
    assert!(matches!(apply(&mut a, &delta), Err(ApplyError::TooLarge { what: "state", .. })));
    // One node more than fits.
    let narrow = Params { nodes_max: 1, ..Params::default() };
    let mut b = Replica::new(name("b"), generation(1), narrow);
    publish(&mut b, [facts("b")]).unwrap();
    let small = publish(&mut a, [facts("a")]).unwrap();
    assert_eq!(apply(&mut b, &small), Err(ApplyError::Full { node: name("a"), nodes_max: 1 }));
}

#[test]
fn ten_thousand_rounds_of_register_and_deregister_return_to_the_same_size() {
    let (mut a, mut b) = (replica("a"), replica("b"));
    let first = publish(&mut a, [facts("a")]).unwrap();
    apply(&mut b, &first).unwrap();
    for round in 0..10_000u32 {
        let up = publish(&mut a, [facts("a"), service(&format!("w{round}"), "web", 1)]).unwrap();
        let down = publish(&mut a, [facts("a")]).unwrap();
        // The other side misses some and catches up with the next.
        if round % 7 != 0 {
            pull_if_behind(&mut b, &a, &up);
        }
        pull_if_behind(&mut b, &a, &down);
    }
    for replica in [&a, &b] {
        let state = replica.state(&name("a")).unwrap();
        assert_eq!(state.keys().count(), 1);
        assert!(state.grave_len() <= 64);
    }
    assert_eq!(a.set_hash(), b.set_hash());
    // Whoever is behind the grave gets the whole state.
    assert!(a.delta_for(&first.digest()).unwrap().is_whole());
}

#[test]
fn new_nodes_come_first_and_the_answer_is_cut() {
    let mut a = replica("a");
    let mut b = replica("b");
    let mut seen = None;
    for at in 0..20 {
        let node = format!("n{at:02}");
        let mut peer = replica(&node);
        let first = publish(&mut peer, [facts(&node)]).unwrap();
        apply(&mut a, &first).unwrap();
        if at == 0 {
            apply(&mut b, &first).unwrap();
            let second = publish(&mut peer, [facts(&node), service("w", "web", 1)]).unwrap();
            apply(&mut a, &second).unwrap();
            seen = Some(name(&node));
        }
    }
    let all: Vec<u8> = (0..64).collect();
    let theirs = b.digests(&all);
    let deltas = a.newer_than(&all, &theirs, BYTES_MAX);
    assert_eq!(deltas.len(), 20);
    assert_eq!(deltas.last().map(|delta| delta.node().clone()), seen);
    let size = wire::encode(&deltas[0]).unwrap().len();
    assert_eq!(a.newer_than(&all, &theirs, size * 3).len(), 3);
    let mut rounds = 0;
    while synchronise(&mut b, &mut a, 1) | synchronise(&mut a, &mut b, size * 3) {
        rounds += 1;
    }
    assert!(rounds <= 20);
    assert_eq!(a.set_hash(), b.set_hash());
}

#[test]
fn golden_bytes_of_a_delta() {
    let mut a = replica("a");
    publish(&mut a, [facts("a"), service("w1", "web", 80)]).unwrap();
    let delta = publish(&mut a, [facts("a"), check("c1", None)]).unwrap();
    let bytes = wire::encode(&delta).unwrap();
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex.concat(), GOLDEN_DELTA);
    assert_eq!(wire::decode::<Delta>(&bytes, BYTES_MAX).unwrap(), delta);
}

const GOLDEN_DELTA: &str = concat!(
    "0101610109020c63334001faa0ebaa092b371fbf2c6f9bb7890da40de5b7bc6173360ed0e16cfc10ff53659a46c46de2b534",
    "572cdbd39011d44932ac37fbaf2da1a9e56bdbe2b435c7948b2041c8e9c5bd44a4821b414e1854bb2bcbd2489468a61b8905",
    "ea1bde7ec9cb719c00010101020202633105636865636b0000000374746c0101027731",
);

/// One step of a history: a publication of one of three nodes, and how the others hear of it.
#[derive(Debug, Clone)]
struct Step {
    writer: usize,
    services: Vec<(u8, u16)>,
    /// Which of the others the delta reaches, and how often.
    deliveries: Vec<(usize, u8)>,
}

fn step() -> impl Strategy<Value = Step> {
    let services = proptest::collection::vec((0u8..6, 0u16..4), 0..5);
    let deliveries = proptest::collection::vec((0usize..3, 1u8..3), 0..3);
    (0usize..3, services, deliveries).prop_map(|(writer, services, deliveries)| Step { writer, services, deliveries })
}

const NAMES: [&str; 3] = ["a", "b", "c"];

fn entries_of(step: &Step) -> Vec<Entry> {
    let services = step.services.iter().map(|(id, port)| service(&format!("s{id}"), "web", *port));
    std::iter::once(facts(NAMES[step.writer])).chain(services).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn replicas_converge_whatever_is_lost_doubled_or_reordered(
        steps in proptest::collection::vec(step(), 1..24),
        order in any::<u64>(),
    ) {
        let mut replicas = NAMES.map(replica);
        let mut in_flight = Vec::new();
        for (at, step) in (0u32..).zip(&steps) {
            let Some(delta) = publish(&mut replicas[step.writer], entries_of(step)) else { continue };
            for (to, times) in &step.deliveries {
                for _ in 0..*times {
                    in_flight.push((order.rotate_left(at * 7) % 97, *to, delta.clone()));
                }
            }
        }
        in_flight.sort_by_key(|(when, _, _)| *when);
        for (_, to, delta) in &in_flight {
            apply(&mut replicas[*to], delta).unwrap();
        }
        // Two rounds along a line of three reach everybody.
        let [a, b, c] = &mut replicas;
        for _ in 0..2 {
            synchronise(a, b, BYTES_MAX);
            synchronise(b, c, BYTES_MAX);
        }
        prop_assert_eq!(a.set_hash(), b.set_hash());
        prop_assert_eq!(b.set_hash(), c.set_hash());
        prop_assert_eq!(view(a), view(b));
        prop_assert_eq!(view(b), view(c));
    }

    #[test]
    fn merging_whole_states_is_commutative_associative_and_idempotent(
        steps in proptest::collection::vec(step(), 1..12),
        shuffle in proptest::collection::vec(any::<u64>(), 12),
    ) {
        let mut writers = NAMES.map(replica);
        // A second writer under each name makes forks.
        let mut doubles = NAMES.map(replica);
        let mut states = Vec::new();
        for (at, step) in steps.iter().enumerate() {
            let writer = if at % 3 == 2 { &mut doubles[step.writer] } else { &mut writers[step.writer] };
            publish(writer, entries_of(step));
            states.extend(writer.delta_for(&Digest::none(name(NAMES[step.writer]))));
        }
        let mut forward = replica("z");
        let mut shuffled = replica("z");
        for delta in &states {
            apply(&mut forward, delta).unwrap();
        }
        let mut order: Vec<usize> = (0..states.len()).collect();
        order.sort_by_key(|at| shuffle.get(*at).copied());
        for at in order.iter().chain(&order) {
            apply(&mut shuffled, &states[*at]).unwrap();
        }
        prop_assert_eq!(forward.set_hash(), shuffled.set_hash());
        prop_assert_eq!(view(&forward), view(&shuffled));
    }

    #[test]
    fn a_tampered_byte_never_yields_a_state_that_was_not_signed(
        at in any::<proptest::sample::Index>(),
        flip in 1u8..=255,
        is_whole in any::<bool>(),
    ) {
        let mut a = replica("a");
        let first = publish(&mut a, [facts("a"), service("w1", "web", 80), check("c1", Some("w1"))]).unwrap();
        let second = publish(&mut a, [facts("a"), service("w2", "web", 81), check("c1", Some("w2"))]).unwrap();
        let mut b = replica("b");
        apply(&mut b, &first).unwrap();
        let (before, signed) = (view(&b), view(&a));
        let delta = if is_whole { a.delta_for(&Digest::none(name("a"))).unwrap() } else { second };
        let mut bytes = wire::encode(&delta).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let Ok(tampered) = wire::decode::<Delta>(&bytes, BYTES_MAX) else { return Ok(()) };
        match apply(&mut b, &tampered) {
            // What is not signed (the base, removals of what is not there) may differ and lead to the signed state.
            Ok(Applied::Updated) => prop_assert_eq!(view(&b), signed),
            Ok(Applied::Stale | Applied::Behind) | Err(_) => prop_assert_eq!(view(&b), before),
        }
    }

    #[test]
    fn arbitrary_bytes_neither_panic_nor_apply(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(delta) = wire::decode::<Delta>(&bytes, BYTES_MAX) {
            let mut b = replica("b");
            prop_assert!(!matches!(apply(&mut b, &delta), Ok(Applied::Updated)));
        }
    }
}

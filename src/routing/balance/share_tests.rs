//! Shares of instances that are new, reported or of little weight, where calls have a key too.

use serde_json::json;

use super::super::seat::Outcome;
use super::super::tables::HashTable;
use super::super::test_support::{instance, now};
use super::tests::{Bench, many};
use super::*;

const PASSING: HealthStatus = HealthStatus::Passing;
const CRITICAL: HealthStatus = HealthStatus::Critical;
const KEYS: u64 = 2_000;
const POLICIES: [&str; 2] = ["ring_hash", "maglev"];

/// A bench whose calls have keys, with a table or before there is one.
fn keyed(policy: &str, slow_start: &str, has_table: bool, count: usize) -> Bench {
    let mut resolver = json!({"LoadBalancer": {"Policy": policy}});
    if !slow_start.is_empty() {
        resolver["LoadBalancer"]["SlowStart"] = slow_start.into();
    }
    let bench = Bench::with(1, &resolver, &json!({}), many(count));
    if has_table {
        tabled(&bench);
    }
    bench
}

/// Gives the workers the table of the catalogue.
fn tabled(bench: &Bench) {
    let service = Arc::clone(&bench.snapshot.services["web"]);
    let algorithm = bench.snapshot.upstreams.balance(&service.name).algorithm;
    let table = HashTable::new(algorithm, HashTable::members_of(&service)).unwrap();
    bench.balancer.shared.set_tables([(service.name.clone(), Arc::new(table))].into());
}

fn owners(bench: &mut Bench) -> Vec<String> {
    (0..KEYS).map(|key| bench.keyed(mix(key))).collect()
}

fn count(owners: &[String], of: &str) -> usize {
    owners.iter().filter(|owner| *owner == of).count()
}

/// Has two nodes report the instances of `of`; none where it is empty.
fn report(bench: &mut Bench, of: &[&str]) {
    let ejected: Vec<_> = of.iter().map(|node| (node.parse().unwrap(), "w".parse().unwrap())).collect();
    let reports = crate::catalogue::Reports::default().with(&"one".parse().unwrap(), &ejected);
    bench.snapshot.reports = Arc::new(reports.with(&"two".parse().unwrap(), &ejected));
}

#[test]
fn a_reported_instance_keeps_a_tenth_of_its_keys_and_all_others_keep_theirs() {
    for (policy, has_table) in POLICIES.into_iter().flat_map(|policy| [(policy, true), (policy, false)]) {
        let mut bench = keyed(policy, "", has_table, 20);
        let before = owners(&mut bench);
        let had = count(&before, "n0004");
        assert!((60..150).contains(&had), "{policy} {has_table}: {had}");
        report(&mut bench, &["n0004"]);
        let after = owners(&mut bench);
        let has = count(&after, "n0004");
        assert!((1..=had / 4).contains(&has), "{policy} {has_table}: {has} of {had} are left");
        for (was, is) in before.iter().zip(&after) {
            assert!(was == is || was == "n0004", "{policy} {has_table}: a key of {was} went to {is}");
        }
        // The rest goes to many, and always to the same.
        let heirs: std::collections::BTreeSet<&String> =
            before.iter().zip(&after).filter(|(was, is)| was != is).map(|(_, is)| is).collect();
        assert!(heirs.len() > 8, "{policy} {has_table}: {heirs:?}");
        assert_eq!(owners(&mut bench), after);
        report(&mut bench, &[]);
        assert_eq!(owners(&mut bench), before, "{policy} {has_table}");
    }
}

#[test]
fn a_new_instance_takes_its_keys_over_little_by_little_and_gives_none_back() {
    for policy in POLICIES {
        let mut bench = keyed(policy, "100s", true, 4);
        bench.pick();
        bench.set(2, many(5));
        tabled(&bench);
        let (mut shares, mut before): (Vec<usize>, Vec<String>) = (Vec::new(), Vec::new());
        for seconds in [0, 50, 100] {
            bench.now = now() + Duration::from_secs(seconds);
            let owners = owners(&mut bench);
            shares.push(count(&owners, "n0004"));
            for (was, is) in before.iter().zip(&owners) {
                assert!(was == is || is == "n0004", "{policy}: a key of {was} went to {is}");
            }
            before = owners;
        }
        // A fifth of all once it has its whole share: 400, with what a ring's points differ by.
        let [first, half, whole] = shares[..] else { panic!("{shares:?}") };
        assert!((300..520).contains(&whole), "{policy}: {shares:?}");
        assert!((whole / 20..whole / 5).contains(&first), "{policy}: {shares:?}");
        assert!((whole * 2 / 5..whole * 3 / 5).contains(&half), "{policy}: {shares:?}");
    }
}

#[test]
fn a_lone_instance_takes_every_key_whatever_it_is_lowered_to() {
    for policy in POLICIES {
        let mut bench = keyed(policy, "100s", false, 0);
        assert!(bench.try_pick(&Tried::new()).is_err());
        bench.set(2, many(1));
        tabled(&bench);
        assert_eq!(count(&owners(&mut bench), "n0000"), 2_000, "{policy}");
    }
}

#[test]
fn weights_count_for_keys_before_there_is_a_table() {
    for policy in POLICIES {
        let three = || [instance("a", PASSING, 1), instance("b", PASSING, 2), instance("c", PASSING, 7)];
        let mut bench = Bench::new(1, policy, three());
        let owners = owners(&mut bench);
        for (node, want) in [("a", 200), ("b", 400), ("c", 1_400)] {
            let got = count(&owners, node);
            assert!(got.abs_diff(want) < 70, "{policy}: {node} has {got} of 2,000, {want} wanted");
        }
    }
}

#[test]
fn an_instance_that_warns_keeps_the_part_of_its_keys_that_its_weight_has() {
    // The fake's warning weight is 1.
    let two = |status| [instance("a", PASSING, 10), instance("b", status, 10)];
    let mut bench = Bench::new(1, "maglev", two(PASSING));
    tabled(&bench);
    let had = count(&owners(&mut bench), "b");
    bench.set(2, two(HealthStatus::Warning));
    let has = count(&owners(&mut bench), "b");
    assert!((had / 20..had / 5).contains(&has), "{has} of {had}");
}

#[test]
fn slow_start_counts_from_when_calls_may_come_and_an_ejection_does_not_begin_it_anew() {
    let resolver = json!({"LoadBalancer": {"Policy": "random", "SlowStart": "100s"}});
    let guard = json!({"PassiveHealthCheck": {"MaxFailures": 1, "BaseEjectionTime": "10s"}});
    let four = |status| many(3).into_iter().chain([instance("new", status, 1)]);
    // Registered while it starts, or known to be critical from the beginning.
    for is_there_first in [false, true] {
        let mut bench = Bench::with(2, &resolver, &guard, many(3));
        if is_there_first {
            bench.set(1, four(CRITICAL));
        }
        bench.pick();
        bench.set(2, four(CRITICAL));
        bench.pick();
        bench.now = now() + Duration::from_secs(1_000);
        bench.set(3, four(PASSING));
        // A tenth of a share beside three whole ones: 323 of 10,000.
        let fresh = bench.count("new", 10_000);
        assert!((200..450).contains(&fresh), "{is_there_first}: {fresh}");
        bench.now += Duration::from_secs(100);
        bench.pick();
        let grown = bench.count("new", 10_000);
        assert!((2_300..2_700).contains(&grown), "{is_there_first}: {grown}");

        // Its trial showed that it bears calls.
        loop {
            let picked = bench.pick();
            let is_new = picked.instance.node.info.name.as_str() == "new";
            let outcome = if is_new { Outcome::GatewayFailure } else { Outcome::Success };
            picked.load.observer().observe(outcome, Duration::from_millis(1), bench.now);
            if is_new {
                break;
            }
        }
        assert_eq!(bench.count("new", 1_000), 0);
        bench.now += Duration::from_secs(10);
        bench.pick().load.observer().observe(Outcome::Success, Duration::from_millis(1), bench.now);
        let back = bench.count("new", 10_000);
        assert!((2_300..2_700).contains(&back), "{is_there_first}: {back}");

        // From critical it begins anew.
        bench.set(4, four(CRITICAL));
        bench.pick();
        bench.set(5, four(PASSING));
        let again = bench.count("new", 10_000);
        assert!((200..450).contains(&again), "{is_there_first}: {again}");
    }
}

//! Each algorithm, and what leaves instances out, by single calls.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::seat::{Cause, Outcome};
use super::super::tables::HashTable;
use super::super::test_support::{instance, now, service};
use super::*;
use crate::model::MemberStatus;
use crate::upstream;

const PASSING: HealthStatus = HealthStatus::Passing;
const WARNING: HealthStatus = HealthStatus::Warning;
const CRITICAL: HealthStatus = HealthStatus::Critical;
const SECOND: Duration = Duration::from_secs(1);

/// A balancer with the catalogue that it sees.
pub(super) struct Bench {
    pub(super) balancer: Balancer,
    pub(super) snapshot: Snapshot,
    pub(super) backoff: ConnectBackoff,
    pub(super) now: Instant,
    pub(super) flow: Flow,
}

impl Bench {
    /// Has `web` with `instances`, its balancing set by `policy`.
    pub(super) fn new(seed: u64, policy: &str, instances: impl IntoIterator<Item = Arc<Instance>>) -> Self {
        Self::with(seed, &json!({"LoadBalancer": {"Policy": policy}}), &json!({}), instances)
    }

    /// The same, with the whole resolver, and what guards calls of `api`.
    pub(super) fn with(
        seed: u64,
        resolver: &Value,
        guard: &Value,
        instances: impl IntoIterator<Item = Arc<Instance>>,
    ) -> Self {
        let mut snapshot = Snapshot::empty("here".parse().unwrap());
        upstream::check("service-resolver", resolver).unwrap();
        let defaults = json!({"UpstreamConfig": {"Defaults": guard}});
        upstream::check("service-defaults", &defaults).unwrap();
        snapshot.upstreams =
            Arc::new(upstream::table([("service-resolver", "web", resolver), ("service-defaults", "api", &defaults)]));
        let mut bench = Self {
            balancer: Balancer::new(seed),
            snapshot,
            backoff: ConnectBackoff::new(),
            now: now(),
            flow: Flow::Request,
        };
        bench.set(1, instances);
        bench
    }

    pub(super) fn set(&mut self, modify_index: u64, instances: impl IntoIterator<Item = Arc<Instance>>) {
        let service = Arc::new(service(modify_index, instances));
        self.snapshot.services.insert(service.name.clone(), service);
    }

    pub(super) fn try_pick(&mut self, tried: &Tried) -> Result<Picked, NoInstance> {
        let service = Arc::clone(&self.snapshot.services["web"]);
        let source: ServiceName = "api".parse().unwrap();
        let (destination, flow, now) = (&service.name, self.flow, self.now);
        let ask = Ask { snapshot: &self.snapshot, source: Some(&source), destination, service: &service, flow, now };
        self.balancer.pick(&ask, tried, &self.backoff)
    }

    pub(super) fn enter(&mut self, tried: &Tried) -> Result<Turn, NoInstance> {
        let service = Arc::clone(&self.snapshot.services["web"]);
        let source: ServiceName = "api".parse().unwrap();
        let (destination, flow, now) = (&service.name, self.flow, self.now);
        let ask = Ask { snapshot: &self.snapshot, source: Some(&source), destination, service: &service, flow, now };
        self.balancer.enter(&ask, tried)
    }

    pub(super) fn pick(&mut self) -> Picked {
        self.try_pick(&Tried::new()).unwrap()
    }

    pub(super) fn keyed(&mut self, key: u64) -> String {
        node(&self.try_pick(&Tried::with_key(Some(key))).unwrap().instance)
    }

    pub(super) fn picks(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| node(&self.pick().instance)).collect()
    }

    pub(super) fn count(&mut self, of: &str, among: usize) -> usize {
        self.picks(among).iter().filter(|picked| *picked == of).count()
    }

    /// Makes one call; if it meets `bad`, it fails.
    fn call(&mut self, bad: &str, outcome: Outcome) -> String {
        let Picked { instance, load } = self.pick();
        let name = node(&instance);
        load.observer().observe(
            if name == bad { outcome } else { Outcome::Success },
            Duration::from_millis(1),
            self.now,
        );
        name
    }

    pub(super) fn view(&mut self) -> GroupView {
        let service = Arc::clone(&self.snapshot.services["web"]);
        let source: ServiceName = "api".parse().unwrap();
        let (destination, flow, now) = (&service.name, self.flow, self.now);
        let ask = Ask { snapshot: &self.snapshot, source: Some(&source), destination, service: &service, flow, now };
        self.balancer.view(&ask)
    }

    fn is_out(&mut self, of: &str) -> bool {
        self.view().seats.iter().any(|seat| seat.node.as_str() == of && seat.standing != Standing::Closed)
    }
}

pub(super) fn node(instance: &Instance) -> String {
    instance.node.info.name.to_string()
}

pub(super) fn many(count: usize) -> Vec<Arc<Instance>> {
    (0..count).map(|at| instance(&format!("n{at:04}"), PASSING, 1)).collect()
}

fn in_zone(name: &str, zone: &str, status: HealthStatus) -> Arc<Instance> {
    let mut made = Arc::unwrap_or_clone(instance(name, status, 1));
    let node = Arc::make_mut(&mut made.node);
    Arc::make_mut(&mut node.info).meta.insert(ZONE_META.to_owned(), zone.to_owned());
    Arc::new(made)
}

#[test]
fn equal_weights_take_turns_in_order() {
    let three = || [instance("a", PASSING, 1), instance("b", PASSING, 1), instance("c", PASSING, 1)];
    assert_eq!(Bench::new(0, "round_robin", three()).picks(7), ["a", "b", "c", "a", "b", "c", "a"]);
    assert_eq!(Bench::new(1, "round_robin", three()).picks(2), ["b", "c"]);
}

#[test]
fn weights_are_met_exactly_over_a_turn_and_lie_apart() {
    let three = [instance("a", PASSING, 5), instance("b", PASSING, 2), instance("c", PASSING, 1)];
    let got = Bench::new(3, "weighted", three).picks(16);
    let count = |name: &str| got.iter().filter(|picked| *picked == name).count();
    assert_eq!((count("a"), count("b"), count("c")), (10, 4, 2));
    assert!(!got.windows(4).any(|four| four.iter().all(|picked| picked == "a")), "{got:?}");
}

#[test]
fn critical_instances_are_left_out_and_warning_ones_use_their_weight() {
    // The fake's warning weight is 1.
    let three = [instance("a", PASSING, 3), instance("b", WARNING, 9), instance("c", CRITICAL, 9)];
    let got = Bench::new(0, "round_robin", three).picks(8);
    assert_eq!(got.iter().filter(|picked| *picked == "a").count(), 6);
    assert_eq!(got.iter().filter(|picked| *picked == "b").count(), 2);
}

#[test]
fn tried_instances_come_only_when_no_other_is_left() {
    for policy in ["round_robin", "random", "least_request", "peak_ewma", "maglev"] {
        let mut bench = Bench::new(5, policy, many(3));
        let mut tried = Tried::with_key(Some(7));
        let mut seen = Vec::new();
        for _ in 0..3 {
            let picked = bench.try_pick(&tried).unwrap();
            seen.push(node(&picked.instance));
            tried.add(picked.instance);
        }
        seen.sort();
        assert_eq!(seen, ["n0000", "n0001", "n0002"], "{policy}");
        assert!(bench.try_pick(&tried).is_ok());
    }
}

#[test]
fn backed_off_instances_are_left_out_unless_all_are_and_untried_ones_go_first() {
    for policy in ["round_robin", "random", "least_request", "peak_ewma", "ring_hash"] {
        let mut bench = Bench::new(0, policy, [instance("a", PASSING, 1), instance("b", PASSING, 1)]);
        let (a, b) = {
            let service = &bench.snapshot.services["web"];
            (Arc::clone(&service.instances[0]), Arc::clone(&service.instances[1]))
        };
        bench.backoff.failed(&a, now());
        assert_eq!(bench.picks(4), ["b", "b", "b", "b"], "{policy}");
        let mut tried = Tried::with_key(Some(1));
        tried.add(Arc::clone(&b));
        assert_eq!(node(&bench.try_pick(&tried).unwrap().instance), "a", "{policy}");
        bench.backoff.failed(&b, now());
        assert!(bench.try_pick(&Tried::new()).is_ok());
    }
}

#[test]
fn the_one_healthy_instance_among_many_bad_ones_is_found() {
    for policy in ["round_robin", "random", "least_request", "peak_ewma"] {
        let mut instances: Vec<_> = (0..100).map(|at| instance(&format!("n{at:03}"), PASSING, 1 + at % 3)).collect();
        let good = instances.remove(57);
        let mut bench = Bench::new(0, policy, instances.iter().cloned().chain([Arc::clone(&good)]));
        for instance in &instances {
            bench.backoff.failed(instance, now());
        }
        for _ in 0..10 {
            assert!(Arc::ptr_eq(&bench.pick().instance, &good), "{policy}");
        }
    }
}

#[test]
fn a_changed_service_is_seen_at_the_next_pick() {
    let mut bench = Bench::new(0, "", [instance("a", PASSING, 1)]);
    assert_eq!(bench.picks(1), ["a"]);
    bench.set(2, [instance("b", PASSING, 1)]);
    assert_eq!(bench.picks(1), ["b"]);
}

#[test]
fn no_instance_says_why() {
    let mut bench = Bench::new(0, "", []);
    let name: ServiceName = "web".parse().unwrap();
    let error = |bench: &mut Bench| bench.try_pick(&Tried::new()).unwrap_err();
    assert_eq!(error(&mut bench), NoInstance::Empty { service: name.clone() });
    let mut gone = Arc::unwrap_or_clone(instance("b", CRITICAL, 1));
    Arc::make_mut(&mut gone.node).status = MemberStatus::Failed;
    let mut silent = Arc::unwrap_or_clone(instance("c", WARNING, 1));
    Arc::make_mut(&mut silent.record).weights.warning = 0;
    bench.set(2, [instance("a", CRITICAL, 1), gone.into(), silent.into()]);
    assert_eq!(
        error(&mut bench),
        NoInstance::AllCritical { service: name.clone(), critical: 2, unreachable: 1, weightless: 1 }
    );
    let empty = Snapshot::empty("here".parse::<NodeName>().unwrap());
    let unknown = bench.balancer.pick_by_name(&empty, &name, &Tried::new(), &ConnectBackoff::new(), now());
    assert_eq!(unknown.unwrap_err(), NoInstance::UnknownService { service: name });
}

#[test]
fn groups_of_vanished_services_are_dropped_and_their_number_is_bounded() {
    let mut bench = Bench::new(0, "", many(1));
    for at in 0..=SERVICES_MAX {
        let mut other = service(1, [instance("a", PASSING, 1)]);
        other.name = format!("s{at}").parse().unwrap();
        let (destination, now) = (&other.name, bench.now);
        let flow = Flow::Request;
        let ask = Ask { snapshot: &bench.snapshot, source: None, destination, service: &other, flow, now };
        bench.balancer.pick(&ask, &Tried::new(), &bench.backoff).unwrap();
        assert!(bench.balancer.groups.len() <= SERVICES_MAX);
    }
    bench.balancer.forget_vanished(&Snapshot::empty("here".parse().unwrap()));
    assert!(bench.balancer.groups.is_empty());
}

#[test]
fn a_choice_of_instances_has_turns_and_ejections_of_its_own_and_its_services_settings_and_limits() {
    let mut bench = Bench::with(
        0,
        &json!({"LoadBalancer": {"Policy": "round_robin"}}),
        &json!({"Limits": {"MaxConcurrentRequests": 2}}),
        many(3),
    );
    let web: ServiceName = "web".parse().unwrap();
    let source: ServiceName = "api".parse().unwrap();
    let mut choice = service(1, many(2));
    choice.name = "web..0123456789abcdef".parse().unwrap();
    let (now, flow) = (bench.now, Flow::Request);
    let Bench { balancer, snapshot, backoff, .. } = &mut bench;
    let ask = Ask { snapshot, source: Some(&source), destination: &web, service: &choice, flow, now };
    let mut count = std::collections::BTreeMap::new();
    for _ in 0..10 {
        let picked = balancer.pick(&ask, &Tried::new(), backoff).unwrap();
        *count.entry(node(&picked.instance)).or_insert(0) += 1;
    }
    assert_eq!(count.into_values().collect::<Vec<_>>(), [5, 5], "in turn, as the service's resolver says");
    // Requests to the choice and to all of the service are under way together.
    let whole = Arc::clone(&snapshot.services["web"]);
    let of_all = Ask { service: &whole, ..ask };
    let held =
        [balancer.pick(&ask, &Tried::new(), backoff).unwrap(), balancer.pick(&of_all, &Tried::new(), backoff).unwrap()];
    let over = balancer.pick(&ask, &Tried::new(), backoff).unwrap_err();
    assert_eq!(over, NoInstance::Overflow { service: web.clone(), what: Limited::Requests });
    drop(held);
    // What is ejected stays so while the service is there, and is told under the service's name.
    let sick = balancer.pick(&ask, &Tried::new(), backoff).unwrap();
    for _ in 0..5 {
        sick.load.observer().observe(Outcome::GatewayFailure, Duration::ZERO, now);
    }
    let notices = balancer.take_notices();
    assert_eq!(notices.iter().map(|notice| &notice.service).collect::<Vec<_>>(), [&web]);
    balancer.forget_vanished(snapshot);
    let out = balancer.view(&ask).seats.iter().filter(|seat| seat.standing != Standing::Closed).count();
    assert_eq!(out, 1);
    balancer.forget_vanished(&Snapshot::empty("here".parse().unwrap()));
    assert!(balancer.groups.is_empty());
}

#[test]
fn who_is_asked_for_next_is_who_comes_next() {
    for policy in ["round_robin", "random", "least_request", "peak_ewma"] {
        let mut bench = Bench::new(11, policy, many(7));
        for _ in 0..20 {
            let service = Arc::clone(&bench.snapshot.services["web"]);
            let source: ServiceName = "api".parse().unwrap();
            let ask = Ask {
                snapshot: &bench.snapshot,
                source: Some(&source),
                destination: &service.name,
                service: &service,
                flow: Flow::Request,
                now: bench.now,
            };
            let next = node(&bench.balancer.peek(&ask, &bench.backoff).unwrap());
            assert_eq!(node(&bench.pick().instance), next, "{policy}");
        }
    }
}

#[test]
fn five_failures_in_a_row_eject_and_one_real_request_brings_back() {
    let mut bench = Bench::new(0, "round_robin", many(4));
    let begun = bench.now;
    for _ in 0..4 * 4 {
        bench.call("n0001", Outcome::GatewayFailure);
    }
    assert!(!bench.is_out("n0001"));
    // What turns requests away is no failure, and a success begins the count anew.
    bench.call("n0001", Outcome::Rejected);
    for _ in 0..4 {
        bench.call("n0001", Outcome::GatewayFailure);
    }
    assert!(bench.is_out("n0001"));
    assert_eq!(bench.count("n0001", 100), 0);
    let notices = bench.balancer.take_notices();
    assert_eq!((notices.len(), notices[0].cause, notices[0].until), (1, Cause::Consecutive, Some(begun + SECOND * 30)));
    // Its time is over: one request tries it, and no other while that one is under way.
    bench.now = begun + SECOND * 30;
    let trial = bench.pick();
    assert_eq!(node(&trial.instance), "n0001");
    assert_eq!(bench.count("n0001", 100), 0);
    trial.load.observer().observe(Outcome::GatewayFailure, Duration::ZERO, bench.now);
    drop(trial);
    // It failed: twice as long.
    bench.now += SECOND * 59;
    assert_eq!(bench.count("n0001", 100), 0);
    bench.now += SECOND;
    let trial = bench.pick();
    assert_eq!(node(&trial.instance), "n0001");
    // A caller that leaves before the answer says nothing: the next request tries.
    drop(trial);
    assert_eq!(bench.call("", Outcome::Success), "n0001");
    assert!(!bench.is_out("n0001"));
    assert_eq!(bench.count("n0001", 100), 25);
    assert_eq!(bench.balancer.take_notices().last().unwrap().until, None);
}

#[test]
fn at_most_a_tenth_is_ejected_and_one_in_any_case() {
    for (instances, most) in [(4, 1), (19, 1), (20, 2), (40, 4)] {
        let mut bench = Bench::new(0, "round_robin", many(instances));
        for _ in 0..instances * 6 {
            let Picked { load, .. } = bench.pick();
            load.observer().observe(Outcome::GatewayFailure, Duration::ZERO, bench.now);
        }
        let out = bench.view().seats.iter().filter(|seat| seat.standing != Standing::Closed).count();
        assert_eq!(out, most, "of {instances}");
    }
}

#[test]
fn with_fewer_than_half_left_all_are_used_or_none() {
    for (fails_closed, left) in [(false, 4), (true, 0)] {
        let guard = json!({"PassiveHealthCheck": {"MaxEjectionPercent": 100, "FailClosed": fails_closed}});
        let mut bench = Bench::with(0, &json!({"LoadBalancer": {"Policy": "round_robin"}}), &guard, many(4));
        for at in 0..3 {
            for _ in 0..20 {
                if let Ok(Picked { instance, load }) = bench.try_pick(&Tried::new()) {
                    let is_bad = node(&instance) == format!("n000{at}");
                    let outcome = if is_bad { Outcome::ServerError } else { Outcome::Success };
                    load.observer().observe(outcome, Duration::ZERO, bench.now);
                }
            }
        }
        assert!(bench.view().panics);
        let mut seen: Vec<String> =
            (0..40).filter_map(|_| bench.try_pick(&Tried::new()).ok()).map(|picked| node(&picked.instance)).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), left);
        if fails_closed {
            let service = "web".parse().unwrap();
            assert_eq!(bench.try_pick(&Tried::new()).unwrap_err(), NoInstance::FailsClosed { service, out: 3, fit: 4 });
        }
    }
}

#[test]
fn an_instance_whose_success_rate_lies_far_below_the_others_is_ejected() {
    let mut bench = Bench::new(0, "round_robin", many(10));
    for round in 0..200 {
        for _ in 0..10 {
            // One in three fails, never five in a row.
            let outcome = if round % 3 == 0 { Outcome::ServerError } else { Outcome::Success };
            bench.call("n0003", outcome);
        }
    }
    assert!(!bench.is_out("n0003"));
    bench.now += SECOND * 10;
    bench.pick();
    assert!(bench.is_out("n0003"));
    assert_eq!(bench.balancer.take_notices()[0].cause, Cause::SuccessRate);
}

#[test]
fn limits_are_the_agent_s_and_refuse_at_once() {
    let guard = json!({"Limits": {"MaxConcurrentRequests": 3, "MaxConnections": 1, "MaxPendingRequests": 2,
        "MaxConcurrentRetries": 1}});
    let mut bench = Bench::with(0, &json!({}), &guard, many(2));
    let held: Vec<Picked> = (0..3).map(|_| bench.pick()).collect();
    let overflow = |bench: &mut Bench| match bench.try_pick(&Tried::new()) {
        Err(NoInstance::Overflow { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(overflow(&mut bench), Limited::Requests);
    // Another worker of the same agent is refused as well.
    let shared = Arc::clone(&bench.balancer.shared);
    let first = std::mem::replace(&mut bench.balancer, Balancer::with_shared(1, shared));
    assert_eq!(overflow(&mut bench), Limited::Requests);
    bench.flow = Flow::Connection;
    let connection = bench.pick();
    assert_eq!(overflow(&mut bench), Limited::Connections);
    let (one, two) = (connection.load.wait(), connection.load.wait());
    assert!(one.is_some() && two.is_some() && connection.load.wait().is_none());
    drop(one);
    assert!(connection.load.wait().is_some());
    let retry = connection.load.observer().retry();
    assert!(retry.is_some() && connection.load.observer().retry().is_none());
    bench.flow = Flow::Request;
    drop((held, first));
    assert_eq!(bench.view().under_way, [1, 1, 0, 1]);
    assert!(bench.try_pick(&Tried::new()).is_ok());
}

#[test]
fn a_limit_of_each_instance_leaves_out_who_is_full() {
    let guard = json!({"Limits": {"MaxRequestsPerInstance": 2}});
    let mut bench = Bench::with(0, &json!({"LoadBalancer": {"Policy": "random"}}), &guard, many(3));
    let held: Vec<Picked> = (0..6).map(|_| bench.pick()).collect();
    for at in 0..3 {
        assert_eq!(held.iter().filter(|picked| node(&picked.instance) == format!("n000{at}")).count(), 2);
    }
    let full = NoInstance::Overflow { service: "web".parse().unwrap(), what: Limited::Instances };
    assert_eq!(bench.try_pick(&Tried::new()).unwrap_err(), full);
}

#[test]
fn two_nodes_reports_lower_a_share_and_one_s_does_not() {
    let mut bench = Bench::new(3, "random", many(20));
    let report = |bench: &mut Bench, reporters: &[&str], of: &[&str]| {
        let ejected: Vec<_> = of.iter().map(|node| (node.parse().unwrap(), "w".parse().unwrap())).collect();
        let mut reports = crate::catalogue::Reports::default();
        for reporter in reporters {
            reports = reports.with(&reporter.parse().unwrap(), &ejected);
        }
        bench.snapshot.reports = Arc::new(reports);
    };
    // One liar, who also speaks as the accused's own node and as this one: 5 % each, as before.
    for reporters in [&["liar"][..], &["liar", "n0004"], &["liar", "here"]] {
        report(&mut bench, reporters, &["n0004"]);
        let share = bench.count("n0004", 10_000);
        assert!((400..600).contains(&share), "{reporters:?}: {share}");
    }
    // Two: a tenth of it. It is never nothing, so this node finds out by itself.
    report(&mut bench, &["one", "two"], &["n0004"]);
    let share = bench.count("n0004", 10_000);
    assert!((20..100).contains(&share), "{share}");
    // Never more of them than may be ejected: 2 of 20.
    report(&mut bench, &["one", "two"], &["n0004", "n0005", "n0006", "n0007"]);
    bench.pick();
    assert_eq!(bench.view().seats.iter().filter(|seat| seat.is_lowered).count(), 2);
    report(&mut bench, &[], &[]);
    assert!(bench.count("n0004", 10_000) > 400);
}

#[test]
fn a_zone_keeps_its_calls_until_too_little_of_it_is_fit_and_then_spills_without_a_cliff() {
    let here = in_zone("here", "z1", PASSING);
    for (fit, want) in [(10, 100), (8, 100), (7, 98), (5, 70), (1, 14), (0, 0)] {
        let near = (0..10).map(|at| in_zone(&format!("near{at}"), "z1", if at < fit { PASSING } else { CRITICAL }));
        let far = (0..10).map(|at| in_zone(&format!("far{at}"), "z2", PASSING));
        let mut bench = Bench::new(9, "random", near.chain(far));
        bench.snapshot.nodes.insert("here".parse().unwrap(), Arc::clone(&here.node));
        let kept = bench.picks(10_000).iter().filter(|picked| picked.starts_with("near")).count();
        let (kept, want) = (i64::try_from(kept).unwrap(), want * 100);
        assert!((kept - want).abs() <= 200, "{fit} of 10 fit: {kept} of 10,000 stayed, {want} wanted");
    }
}

#[test]
fn the_share_of_a_new_instance_grows_over_the_slow_start() {
    // Over 8 s nothing else has the shares looked at: ejections are, every ten.
    for slow_start in [100, 8] {
        let resolver = json!({"LoadBalancer": {"Policy": "random", "SlowStart": format!("{slow_start}s")}});
        let mut bench = Bench::with(2, &resolver, &json!({}), many(3));
        // Those of the beginning are not new.
        assert!((2_700..4_000).contains(&bench.count("n0000", 10_000)));
        bench.set(2, many(4));
        for (seconds, want) in [(0, 323), (slow_start / 2, 1_428), (slow_start, 2_500)] {
            bench.now = now() + SECOND * seconds;
            bench.pick();
            let got = bench.count("n0003", 10_000);
            assert!(got.abs_diff(want) < 200, "after {seconds} of {slow_start} s: {got} of 10,000, {want} wanted");
        }
    }
}

#[test]
fn a_key_comes_to_the_same_instance_with_and_without_a_table_and_passes_over_the_unfit() {
    for policy in ["ring_hash", "maglev"] {
        let mut bench = Bench::new(1, policy, many(20));
        assert!((0..100).all(|key| bench.keyed(key) == bench.keyed(key)), "{policy}: before there is a table");
        let service = Arc::clone(&bench.snapshot.services["web"]);
        let algorithm = bench.snapshot.upstreams.balance(&service.name).algorithm;
        let table = HashTable::new(algorithm, HashTable::members_of(&service)).unwrap();
        bench.balancer.shared.set_tables([(service.name.clone(), Arc::new(table))].into());
        let before: Vec<String> = (0..2_000u64).map(|key| bench.keyed(mix(key))).collect();
        // One turns critical: its keys go elsewhere, nobody else's do, and they come back.
        let sick = |at: usize| if at == 7 { CRITICAL } else { PASSING };
        bench.set(2, (0..20).map(|at| instance(&format!("n{at:04}"), sick(at), 1)));
        for (key, owner) in (0..2_000u64).zip(&before) {
            let got = bench.keyed(mix(key));
            assert_eq!(got == *owner, owner != "n0007", "{policy} {key}");
        }
        bench.set(3, many(20));
        assert!((0..2_000u64).zip(&before).all(|(key, owner)| bench.keyed(mix(key)) == *owner), "{policy}");
    }
}

#[test]
fn a_call_that_changes_nothing_allocates_nothing() {
    for policy in ["", "round_robin", "random", "least_request", "maglev"] {
        let mut bench = Bench::new(4, policy, many(50));
        let table = HashTable::new(Algorithm::Maglev, HashTable::members_of(&bench.snapshot.services["web"])).unwrap();
        bench.balancer.shared.set_tables([("web".parse().unwrap(), Arc::new(table))].into());
        let service = Arc::clone(&bench.snapshot.services["web"]);
        let source: ServiceName = "api".parse().unwrap();
        let tried = Tried::with_key(Some(9));
        let Bench { balancer, snapshot, backoff, now, flow } = &mut bench;
        let mut call = || {
            let destination = &service.name;
            let ask = Ask { snapshot, source: Some(&source), destination, service: &service, flow: *flow, now: *now };
            let picked = balancer.pick(&ask, &tried, backoff).unwrap();
            let observer = picked.load.observer().clone();
            drop(picked.load.wait());
            observer.observe(Outcome::Success, Duration::from_millis(1), *now);
            drop(balancer.take_notices());
        };
        call();
        assert_eq!(allocation_counter::measure(call).count_total, 0, "{policy}");
    }
}

proptest! {
    #[test]
    fn any_weights_are_met_exactly_over_one_turn(weights in proptest::collection::vec(0u32..40, 1..8), seed in any::<u64>()) {
        let named = weights.iter().enumerate().map(|(at, weight)| instance(&format!("n{at}"), PASSING, *weight));
        let mut bench = Bench::new(seed, "round_robin", named);
        // A passing instance counts at least 1; equal weights make the shortest turn.
        let weights: Vec<usize> = weights.iter().map(|weight| (*weight).max(1) as usize).collect();
        let got = bench.picks(weights.iter().sum());
        for (at, weight) in weights.iter().enumerate() {
            prop_assert_eq!(got.iter().filter(|picked| **picked == format!("n{at}")).count(), *weight);
        }
    }

    #[test]
    fn absurd_weights_neither_panic_nor_starve(weights in proptest::collection::vec(any::<u32>(), 1..50), at in 0usize..5) {
        let policy = ["round_robin", "random", "least_request", "peak_ewma", "maglev"][at];
        let named = weights.iter().enumerate().map(|(at, weight)| instance(&format!("n{at}"), PASSING, *weight));
        let mut bench = Bench::new(u64::MAX, policy, named);
        prop_assert_eq!(bench.picks(100).len(), 100);
    }

    #[test]
    fn whatever_happens_counts_come_back_to_nothing(calls in proptest::collection::vec((0u8..4, any::<bool>()), 1..200), seed in any::<u64>()) {
        let mut bench = Bench::new(seed, "", many(5));
        let mut held = Vec::new();
        for (outcome, keeps) in calls {
            bench.now += SECOND;
            let picked = bench.pick();
            let outcome = [Outcome::Success, Outcome::ServerError, Outcome::GatewayFailure, Outcome::Rejected][usize::from(outcome)];
            picked.load.observer().observe(outcome, Duration::from_millis(3), bench.now);
            if keeps {
                held.push(picked);
            }
            // At most one of five is out, whatever fails.
            prop_assert!(bench.view().seats.iter().filter(|seat| seat.standing != Standing::Closed).count() <= 1);
        }
        drop(held);
        prop_assert!(bench.view().seats.iter().all(|seat| seat.pending == 0));
        prop_assert_eq!(bench.view().under_way, [0, 0, 0, 0]);
    }
}

fn of(priority: Priority) -> Tried {
    Tried { priority, ..Tried::new() }
}

/// Whether a turn has come.
pub(super) fn is_called(turn: &Turn) -> bool {
    turn.poll_called(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
}

#[track_caller]
fn refuses(bench: &mut Bench, priority: Priority, want: Limited) {
    match bench.try_pick(&of(priority)) {
        Err(NoInstance::Overflow { what, .. }) => assert_eq!(what, want, "{priority}"),
        other => panic!("{priority}: {other:?}"),
    }
}

#[test]
fn who_waits_is_called_when_a_call_ends_the_most_urgent_first_and_nobody_passes_by() {
    let guard = json!({"Limits": {"MaxRequestsPerInstance": 2, "MaxPendingRequests": 3, "PriorityMax": "high"}});
    let mut bench = Bench::with(0, &json!({}), &guard, many(1));
    let high = of(Priority::High);
    let first = bench.try_pick(&high).unwrap();
    // Half of two is left: what says nothing has a part of it, and what may be left out has none.
    refuses(&mut bench, Priority::Sheddable, Limited::Priority);
    refuses(&mut bench, Priority::Normal, Limited::Instances);
    let second = bench.try_pick(&high).unwrap();
    refuses(&mut bench, Priority::High, Limited::Instances);
    assert!(bench.enter(&of(Priority::Low)).is_err(), "what may be refused does not wait");
    let normal = bench.enter(&of(Priority::Normal)).unwrap();
    let urgent = bench.enter(&high).unwrap();
    let late = bench.enter(&high).unwrap();
    assert!(matches!(bench.enter(&high), Err(NoInstance::Overflow { what: Limited::Pending, .. })));
    assert!(![&normal, &urgent, &late].into_iter().any(is_called));
    drop(first);
    assert!(is_called(&urgent) && !is_called(&late) && !is_called(&normal));
    // There is room, and it is not a newcomer's.
    refuses(&mut bench, Priority::High, Limited::Instances);
    let called = Tried { is_called: true, ..high.clone() };
    let third = bench.try_pick(&called).unwrap();
    drop(urgent);
    // The next one looks whether there is more room, and waits on.
    assert!(is_called(&late));
    assert!(bench.try_pick(&called).is_err());
    drop(second);
    // One that was called and gives up passes it on.
    drop(late);
    assert!(is_called(&normal));
    drop((normal, third));
    assert!(bench.try_pick(&of(Priority::Sheddable)).is_ok(), "nobody waits, and nothing is under way");
    assert_eq!(bench.view().under_way[1..3], [0, 0], "what waited is given back");
}

#[test]
fn a_call_that_is_given_up_raises_what_its_instance_is_expected_to_take_and_never_lowers_it() {
    let mut bench = Bench::new(0, "peak_ewma", many(1));
    let shown = |bench: &mut Bench| bench.view().seats[0].delay;
    bench.pick().load.observer().given_up(SECOND, bench.now);
    assert_eq!(shown(&mut bench), Some(SECOND));
    bench.pick().load.observer().given_up(SECOND / 100, bench.now);
    assert_eq!(shown(&mut bench), Some(SECOND));
}

//! Each algorithm against its theory, in simulated time and from a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use serde_json::json;

use super::super::seat::Outcome;
use super::super::tables::{HashTable, MAGLEV_PLACES};
use super::super::test_support::{instance, service};
use super::tests::{Bench, is_called, many, node};
use super::*;
use crate::upstream::{RING_POINTS, RING_POINTS_MAX};

const SEED: u64 = 20_260_721;

/// A call in the simulation.
struct Call {
    begun: Duration,
    at: usize,
    picked: Picked,
}

/// How long calls took, and how many each instance got.
struct Seen {
    took: Vec<Duration>,
    counts: Vec<usize>,
}

impl Seen {
    fn percentile(&mut self, part: usize) -> Duration {
        self.took.sort();
        self.took[(self.took.len() - 1) * part / 100]
    }
}

/// Sends `calls` calls, `rate` a second by chance (Poisson), to instances that serve one at a time in exponential times of
/// the means given.
fn simulate(bench: &mut Bench, means: &[Duration], rate: f64, calls: usize) -> Seen {
    let draw = Draw::new(SEED);
    let exponential = |mean: Duration| mean.mul_f64(-(1.0 - draw.unit()).ln());
    let start = bench.now;
    let mut queues: Vec<VecDeque<Call>> = means.iter().map(|_| VecDeque::new()).collect();
    // The next arrival, or the end of the call at the head of an instance's queue.
    let mut events = BinaryHeap::from([Reverse((Duration::ZERO, usize::MAX))]);
    let mut seen = Seen { took: Vec::new(), counts: vec![0; means.len()] };
    let mut sent = 0;
    while let Some(Reverse((time, at))) = events.pop() {
        bench.now = start + time;
        if at == usize::MAX {
            let picked = bench.pick();
            let at: usize = node(&picked.instance).trim_start_matches('n').parse().unwrap();
            seen.counts[at] += 1;
            queues[at].push_back(Call { begun: time, at, picked });
            if queues[at].len() == 1 {
                events.push(Reverse((time + exponential(means[at]), at)));
            }
            sent += 1;
            if sent < calls {
                events.push(Reverse((time + exponential(Duration::from_secs_f64(1.0 / rate)), usize::MAX)));
            }
            continue;
        }
        let call = queues[at].pop_front().unwrap();
        let took = time.saturating_sub(call.begun);
        assert_eq!(call.at, at);
        call.picked.load.observer().observe(Outcome::Success, took, bench.now);
        seen.took.push(took);
        if !queues[at].is_empty() {
            events.push(Reverse((time + exponential(means[at]), at)));
        }
    }
    seen
}

#[test]
fn peak_ewma_at_least_halves_the_tail_that_round_robin_has_with_one_slow_instance() {
    let mut means = vec![Duration::from_millis(5); 10];
    means[3] = Duration::from_millis(50);
    let mut p99 = BTreeMap::new();
    for policy in ["round_robin", "least_request", "random", "peak_ewma"] {
        let mut bench = Bench::new(SEED, policy, many(10));
        let mut seen = simulate(&mut bench, &means, 150.0, 40_000);
        println!(
            "{policy}: p50 {:?}, p99 {:?}, slow one's calls {}",
            seen.percentile(50),
            seen.percentile(99),
            seen.counts[3]
        );
        p99.insert(policy, seen.percentile(99));
    }
    assert!(p99["peak_ewma"] * 2 <= p99["round_robin"], "{p99:?}");
    assert!(p99["least_request"] < p99["random"], "{p99:?}");
}

#[test]
fn two_choices_keep_the_fullest_instance_near_the_mean_where_one_choice_does_not() {
    // n calls that stay, n instances: with one choice the fullest has about ln n / ln ln n of them, 5 or more at 1,000;
    // with two about ln ln n / ln 2 + 1, 4 at most (Azar et al., 1994; Mitzenmacher, 2001).
    let fullest = |policy: &str, flow: Flow| {
        let mut bench = Bench::new(SEED, policy, many(1_000));
        bench.flow = flow;
        let held: Vec<Picked> = (0..1_000).map(|_| bench.pick()).collect();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for picked in &held {
            *counts.entry(node(&picked.instance)).or_default() += 1;
        }
        counts.into_values().max().unwrap()
    };
    assert!(fullest("random", Flow::Request) >= 5);
    assert!(fullest("least_request", Flow::Request) <= 4);
    // Connections of bytes go by those that are open, whatever the default for requests is.
    assert!(fullest("", Flow::Connection) <= 4);
    assert!(fullest("peak_ewma", Flow::Connection) <= 4);
}

#[test]
fn random_draws_meet_the_weights_within_five_standard_deviations() {
    let weights = [1u32, 2, 3, 10];
    let named =
        weights.iter().enumerate().map(|(at, weight)| instance(&format!("n{at}"), HealthStatus::Passing, *weight));
    let mut bench = Bench::new(SEED, "random", named);
    let got = bench.picks(100_000);
    for (at, weight) in weights.iter().enumerate() {
        let share = f64::from(*weight) / 16.0;
        let (mean, deviation) = (100_000.0 * share, (100_000.0 * share * (1.0 - share)).sqrt());
        let count = u32::try_from(got.iter().filter(|picked| **picked == format!("n{at}")).count()).unwrap();
        assert!((f64::from(count) - mean).abs() < 5.0 * deviation, "weight {weight}: {count}, {mean} wanted");
    }
}

#[test]
fn fast_failures_attract_no_calls() {
    // Peak EWMA alone would send all calls to the instance that fails in no time.
    let guard = json!({"PassiveHealthCheck": {"MaxFailures": 0, "SuccessRate": {"Enabled": false}}});
    for outcome in [Outcome::GatewayFailure, Outcome::Rejected] {
        let mut bench = Bench::with(SEED, &json!({}), &guard, many(5));
        let mut failed = 0;
        for _ in 0..10_000 {
            bench.now += Duration::from_micros(500);
            let Picked { instance, load } = bench.pick();
            let (outcome, took) = match node(&instance).as_str() {
                "n0002" => (outcome, Duration::from_micros(100)),
                _ => (Outcome::Success, Duration::from_millis(5)),
            };
            failed += u32::from(outcome != Outcome::Success);
            load.observer().observe(outcome, took, bench.now);
        }
        assert!(failed <= 5, "{failed} of 10,000 met the one that fails");
    }
}

/// Counts keys by instance.
fn owners(table: &HashTable, keys: u64) -> Vec<String> {
    let owner = |key: u64| table.members()[table.walk(mix(key)).next().unwrap()].node.to_string();
    (0..keys).map(owner).collect()
}

fn table(algorithm: Algorithm, instances: Vec<Arc<Instance>>) -> HashTable {
    HashTable::new(algorithm, HashTable::members_of(&service(1, instances))).unwrap()
}

const RING: Algorithm = Algorithm::RingHash { points_min: RING_POINTS, points_max: RING_POINTS_MAX };

#[test]
fn a_ring_spreads_keys_and_moves_only_those_of_who_comes_or_goes() {
    let keys = 20_000;
    let before = owners(&table(RING, many(20)), keys);
    for at in 0..20 {
        let share = before.iter().filter(|owner| **owner == format!("n{at:04}")).count();
        // 100 points each: 10 % standard deviation of a share.
        assert!((650..1_400).contains(&share), "n{at:04} has {share} of {keys}, 1,000 wanted");
    }
    let after = owners(&table(RING, many(19)), keys);
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before == after, before != "n0019");
    }
}

#[test]
fn maglev_s_shares_are_even_and_a_removal_moves_few_other_keys() {
    let keys = 20_000;
    let full = table(Algorithm::Maglev, many(100));
    let mut places = vec![0u32; 100];
    for place in 0..u64::from(MAGLEV_PLACES) {
        places[full.walk(place).next().unwrap()] += 1;
    }
    let (least, most) = (places.iter().min().unwrap(), places.iter().max().unwrap());
    assert!(most - least <= 1, "places from {least} to {most}");
    let before = owners(&full, keys);
    let after = owners(&table(Algorithm::Maglev, many(99)), keys);
    let others = before.iter().zip(&after).filter(|(before, _)| *before != "n0099");
    let moved = others.filter(|(before, after)| before != after).count();
    // Some 2 % with 100 places for each member (Eisenbud et al., figure 11: less with more).
    assert!(moved * 100 <= before.len() * 4, "{moved} of {keys} keys of others moved");
}

#[test]
fn weights_count_in_tables() {
    for algorithm in [RING, Algorithm::Maglev] {
        let three = [("a", 1), ("b", 2), ("c", 5)].map(|(name, weight)| instance(name, HealthStatus::Passing, weight));
        let owners = owners(&table(algorithm, three.to_vec()), 40_000);
        for (name, want) in [("a", 5_000), ("b", 10_000), ("c", 25_000)] {
            let got = owners.iter().filter(|owner| *owner == name).count();
            assert!(got.abs_diff(want) < want / 5, "{algorithm:?}: {name} has {got}, {want} wanted");
        }
    }
}

/// Calls of `nodes` agents to 10 instances of which one always fails, two a second of each agent for a minute, evenly apart;
/// returns how many failed. What an agent ejects all others know `spread` later, and no longer than the ejection lasts; none:
/// nobody hears of it.
fn failures(nodes: u32, spread: Option<Duration>) -> u32 {
    let start = Bench::new(SEED, "random", many(10)).now;
    let mut benches: Vec<Bench> = (0..nodes)
        .map(|at| {
            let mut bench = Bench::new(SEED + u64::from(at), "random", many(10));
            bench.snapshot.local_node = format!("caller{at}").parse().unwrap();
            bench
        })
        .collect();
    let mut reports = Arc::new(crate::catalogue::Reports::default());
    // When it is known, whose word, and what that agent then says is ejected.
    let mut news: BTreeMap<(Instant, usize), Vec<(NodeName, InstanceId)>> = BTreeMap::new();
    let mut failed = 0;
    for number in 0..nodes * 120 {
        let now = start + Duration::from_millis(500) * number / nodes;
        while let Some(entry) = news.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, at), ejected) = entry.remove_entry();
            reports = Arc::new(reports.with(&benches[at].snapshot.local_node, &ejected));
        }
        let at = (number % nodes) as usize;
        let bench = &mut benches[at];
        bench.now = now;
        bench.snapshot.reports = Arc::clone(&reports);
        let Picked { instance, load } = bench.pick();
        let is_bad = node(&instance) == "n0004";
        failed += u32::from(is_bad);
        let outcome = if is_bad { Outcome::GatewayFailure } else { Outcome::Success };
        load.observer().observe(outcome, Duration::from_millis(5), bench.now);
        drop(load);
        for notice in bench.balancer.take_notices() {
            let (Some(spread), Some(until)) = (spread, notice.until) else { continue };
            news.insert((now + spread, at), vec![(notice.node, notice.instance)]);
            news.insert((until + spread, at), Vec::new());
        }
    }
    failed
}

#[test]
fn shared_ejections_save_most_of_the_requests_that_each_node_would_lose_by_itself() {
    // 200 ms for a step of gossip's, five at most between any two of some hundred agents.
    let step = Duration::from_millis(200);
    let alone = failures(300, None);
    println!("300 agents, 36,000 calls: {alone} failed where each learns by itself");
    let mut before = 0;
    for steps in [0, 1, 5, 25] {
        let shared = failures(300, Some(step * steps));
        println!("{shared} where reports are known {:?} later", step * steps);
        assert!(shared >= before, "what is known later saves no more: {shared}, {before}");
        assert!(shared * 2 <= alone || steps > 5, "{shared} of {alone}");
        before = shared;
    }
}

/// What an overloaded instance came to.
#[derive(Debug, Default)]
struct Overload {
    /// Which part of its capacity was answered within 250 ms.
    goodput: f64,
    /// Most calls under way, and most that waited.
    under_way_max: usize,
    waiting_max: usize,
    /// Which part of the calls of each priority was answered in time.
    served: BTreeMap<&'static str, f64>,
}

/// Sends `load` times what one instance bears, open loop, to it: 8 at once, 10 ms each. A fifth of the calls is high, half
/// says nothing, the rest is low. Counts from the third second on.
fn overload(limits: &serde_json::Value, load: f64) -> Overload {
    const SERVERS: usize = 8;
    const MIX: [Priority; 10] = {
        use Priority::{High, Low, Normal};
        [High, Normal, Low, Normal, Normal, High, Low, Normal, Normal, Low]
    };
    let (service, patience) = (Duration::from_millis(10), Duration::from_millis(250));
    let capacity = 800.0;
    let mut bench = Bench::with(SEED, &json!({}), &json!({"Limits": limits}), many(1));
    let (start, draw) = (bench.now, Draw::new(SEED));
    let exponential = |mean: Duration| mean.mul_f64(-(1.0 - draw.unit()).ln());
    let mut events = BinaryHeap::from([Reverse((Duration::ZERO, 0usize))]);
    let mut calls: BTreeMap<usize, (Duration, Duration, Picked)> = BTreeMap::new();
    let mut queue: VecDeque<usize> = VecDeque::new();
    let mut waiting: Vec<(usize, Duration, Turn)> = Vec::new();
    let (mut number, mut busy, mut seen) = (0, 0, Overload::default());
    let mut counts: BTreeMap<&'static str, (f64, f64)> = BTreeMap::new();
    let (warm, end) = (Duration::from_secs(3), Duration::from_secs(23));
    let priority = |number: usize| MIX[number % MIX.len()];
    while let Some(Reverse((time, ended))) = events.pop() {
        bench.now = start + time;
        if time >= end {
            break;
        }
        if ended == 0 {
            number += 1;
            let tried = Tried { priority: priority(number), ..Tried::new() };
            counts.entry(tried.priority.as_str()).or_default().1 += f64::from(u8::from(time > warm));
            match bench.try_pick(&tried) {
                Ok(picked) => {
                    calls.insert(number, (time, time, picked));
                    queue.push_back(number);
                }
                Err(NoInstance::Overflow { what: Limited::Instances, .. }) => {
                    waiting.extend(bench.enter(&tried).map(|turn| (number, time, turn)));
                }
                Err(_) => {}
            }
            events.push(Reverse((time + exponential(Duration::from_secs_f64(1.0 / (load * capacity))), 0)));
        } else {
            let (came, begun, picked) = calls.remove(&ended).unwrap();
            busy -= 1;
            picked.load.observer().observe(Outcome::Success, time.saturating_sub(begun), bench.now);
            let is_good = time.saturating_sub(came) <= patience && came > warm;
            counts.entry(priority(ended).as_str()).or_default().0 += f64::from(u8::from(is_good));
        }
        waiting.retain(|(_, _, turn)| turn.until() > bench.now);
        while let Some(at) = waiting.iter().position(|(_, _, turn)| is_called(turn)) {
            let (number, came, turn) = waiting.swap_remove(at);
            match bench.try_pick(&Tried { priority: priority(number), is_called: true, ..Tried::new() }) {
                Ok(picked) => {
                    calls.insert(number, (came, time, picked));
                    queue.push_back(number);
                }
                Err(_) => waiting.push((number, came, turn)),
            }
        }
        while busy < SERVERS
            && let Some(next) = queue.pop_front()
        {
            busy += 1;
            events.push(Reverse((time + exponential(service), next)));
        }
        seen.under_way_max = seen.under_way_max.max(calls.len());
        seen.waiting_max = seen.waiting_max.max(waiting.len());
    }
    let good: f64 = counts.values().map(|(good, _)| good).sum();
    seen.goodput = good / (capacity * end.saturating_sub(warm).as_secs_f64());
    seen.served = counts.into_iter().map(|(name, (good, all))| (name, good / all)).collect();
    seen
}

#[test]
fn at_three_times_the_capacity_nine_tenths_of_it_are_answered_in_time() {
    let without = overload(&json!({"MaxConcurrentRequests": 1_000_000}), 3.0);
    let adaptive = json!({"MaxConcurrentRequests": 1_000_000, "AdaptiveConcurrency": true, "PriorityMax": "high"});
    let with = overload(&adaptive, 3.0);
    println!("at three times the capacity: {without:?} without, {with:?} with AdaptiveConcurrency");
    assert!(without.goodput < 0.2, "{without:?}");
    assert!(with.goodput >= 0.9 && with.under_way_max <= 200 && with.waiting_max <= 500, "{with:?}");
    // What is high gets nearly all that it asks for, what is low hardly anything.
    assert!(with.served["high"] >= 0.95 && with.served["low"] <= 0.1, "{with:?}");
    assert!(with.served["high"] > with.served["normal"] && with.served["normal"] > with.served["low"], "{with:?}");
}

#[test]
fn a_queue_carries_bursts_that_a_limit_alone_would_refuse() {
    // As much as the servers are, at nine tenths of what they bear: Erlang's loss would be a quarter of it.
    let limits =
        |pending: u32| json!({"MaxRequestsPerInstance": 8, "MaxPendingRequests": pending, "PriorityMax": "normal"});
    let (without, with) = (overload(&limits(0), 0.9), overload(&limits(1_024), 0.9));
    println!("at nine tenths of the capacity: {without:?} without a queue, {with:?} with one");
    assert!(without.served["normal"] < 0.92, "{without:?}");
    assert!(with.served["normal"] >= 0.97 && with.waiting_max <= 100, "{with:?}");
}

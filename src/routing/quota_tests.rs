//! Shares by hand, and meshes of 3, 20 and 1,000 nodes in virtual time: what they let through together, against the bound.
//!
//! `cargo test --lib quota -- --nocapture` prints the figures of 3 and 20 nodes; with `--include-ignored` those of 1,000 too.

#![allow(clippy::cast_precision_loss, reason = "numbers of nodes and requests are small")]

use proptest::prelude::*;

use super::super::rate::Rates;
use super::super::test_support::now as start;
use super::*;
use crate::upstream::{Rate, RateKey, RatePath, RateRule, RateRules, RateScope};

const MS: Duration = Duration::from_millis(1);
/// A step of the simulation.
const STEP: Duration = Duration::from_millis(10);
/// Gossip's period, fan-out and copies, and what fits a packet: as in `membership`.
const FANOUT: usize = 3;
const COPIES: u8 = 6;
/// Up to so many others all are neighbours; so many are far away in a larger mesh: as in `membership`.
const NEIGHBOURS_ALL: usize = 32;
const NEIGHBOURS_FAR: usize = 12;
/// A report of one limit on the wire, and the room of a packet beside its head (`membership` tests the first).
const REPORT_BYTES: usize = 140;
const PACKET_ROOM: usize = 1000;
const PACKET_HEAD: usize = 100;

fn name(at: usize) -> NodeName {
    format!("n{at}").parse().unwrap()
}

fn web() -> ServiceName {
    "web".parse().unwrap()
}

fn mates(count: usize) -> BTreeMap<ServiceName, Arc<BTreeSet<NodeName>>> {
    BTreeMap::from([(web(), Arc::new((0..count).map(name).collect()))])
}

/// One node of the simulation.
struct Host {
    quotas: Quotas,
    rates: Rates,
    carry: f64,
    /// Reports that wait: how often each was sent, and whose; what was sent least goes first.
    queue: BTreeSet<(u8, usize)>,
    /// How often the report of each author was sent, where it waits.
    waiting: Vec<Option<u8>>,
    /// The newest number heard of each author.
    seen: Vec<u32>,
    /// With whom it gossips, and whose turn comes before any other's comes again, the next last.
    near: Vec<usize>,
    turns: Vec<usize>,
}

impl Host {
    fn wait(&mut self, author: usize) {
        if let Some(sent) = self.waiting[author].replace(0) {
            self.queue.remove(&(sent, author));
        }
        self.queue.insert((0, author));
    }

    /// Takes what fits a packet.
    fn pack(&mut self) -> Vec<(usize, u32)> {
        let fits: Vec<_> = self.queue.iter().take(PACKET_ROOM / REPORT_BYTES).copied().collect();
        for (sent, author) in &fits {
            self.queue.remove(&(*sent, *author));
            self.waiting[*author] = (sent + 1 < COPIES).then_some(sent + 1);
            self.queue.extend(self.waiting[*author].map(|sent| (sent, *author)));
        }
        fits.into_iter().map(|(_, author)| (author, self.seen[author])).collect()
    }
}

/// What a run showed.
#[derive(Debug, Default, Clone, Copy)]
struct Figures {
    /// The most that was let through in any window beyond the limit's rate times its length.
    excess: f64,
    /// Let through per second in the last ten seconds, of the limit.
    settled: f64,
    /// How long a node in the mean had not heard of another that it should have, in seconds.
    late: f64,
    /// Bytes of gossip a second of a node: in the busiest second, and in the mean of the last ten.
    busiest: f64,
    resting: f64,
}

fn below(draw: &Draw, most: usize) -> usize {
    usize::try_from(draw.below(most as u64)).unwrap()
}

/// With whom each gossips: with all in a small mesh, else with two on each side, a few places far away, and whoever chose it.
fn neighbours(count: usize, draw: &Draw) -> Vec<BTreeSet<usize>> {
    if count <= NEIGHBOURS_ALL + 1 {
        return (0..count).map(|at| (0..count).filter(|other| *other != at).collect()).collect();
    }
    let mut near = vec![BTreeSet::new(); count];
    for at in 0..count {
        let far: Vec<usize> = (0..NEIGHBOURS_FAR).map(|_| below(draw, count)).collect();
        for other in far.into_iter().chain([1, 2].map(|ahead| (at + ahead) % count)).filter(|other| *other != at) {
            near[at].insert(other);
            near[other].insert(at);
        }
    }
    near
}

struct Mesh {
    hosts: Vec<Host>,
    rules: Arc<RateRules>,
    limit: f64,
    now: Instant,
    draw: Draw,
    reports: BTreeMap<(usize, u32), Demand>,
    /// When the newest report of each author was made.
    made: BTreeMap<usize, (u32, Instant)>,
    flights: Vec<(Instant, usize, usize, u32)>,
    /// By how much more than the hold it took until a node heard a report, in seconds, of all nodes and reports.
    late: f64,
    bytes: u64,
    /// Nodes from this one on cannot be reached by those before it.
    split: Option<usize>,
}

impl Mesh {
    fn new(count: usize, limit: f64, burst: u32, seed: u64) -> Self {
        let rate = Rate { per_second: limit, burst };
        let rule = RateRule { path: RatePath::Any, key: RateKey::All, rate, scope: RateScope::Cluster };
        let (mates, began) = (mates(count), start());
        let host = |at: usize| {
            let mut quotas = Quotas::new(name(at), seed ^ at as u64, began);
            quotas.set_mates(mates.clone(), began);
            Host {
                quotas,
                rates: Rates::new(began),
                carry: 0.0,
                queue: BTreeSet::new(),
                waiting: vec![None; count],
                seen: vec![0; count],
                near: Vec::new(),
                turns: Vec::new(),
            }
        };
        let draw = Draw::new(seed);
        let mut hosts: Vec<Host> = (0..count).map(host).collect();
        for (host, near) in hosts.iter_mut().zip(neighbours(count, &draw)) {
            host.near = near.into_iter().collect();
        }
        Self {
            hosts,
            rules: Arc::new(RateRules { rules: vec![rule] }),
            limit,
            now: began,
            draw,
            reports: BTreeMap::new(),
            made: BTreeMap::new(),
            flights: Vec::new(),
            late: 0.0,
            bytes: 0,
            split: None,
        }
    }

    fn are_apart(&self, a: usize, b: usize) -> bool {
        self.split.is_some_and(|split| (a < split) != (b < split))
    }

    fn set_split(&mut self, split: Option<usize>) {
        self.split = split;
        let count = self.hosts.len();
        for at in 0..count {
            let with = (0..count).filter(|other| !self.are_apart(at, *other)).map(name).collect();
            let mates = BTreeMap::from([(web(), Arc::new(with))]);
            let now = self.now;
            self.hosts[at].quotas.set_mates(mates, now);
        }
    }

    fn tick(&mut self, at: usize) {
        let now = self.now;
        let host = &mut self.hosts[at];
        let buckets = host.rates.take_asked(&web(), &self.rules);
        let asked: Vec<Asked> = buckets.iter().map(|bucket| bucket.asked.clone()).collect();
        let divided = host.quotas.tick(&asked, now);
        for (bucket, (_, share)) in buckets.iter().zip(&divided.shares) {
            host.rates.set_share(bucket, *share, now);
        }
        if let Some(report) = divided.report {
            host.seen[at] += 1;
            let number = host.seen[at];
            host.wait(at);
            self.reports.remove(&(at, number.saturating_sub(1)));
            self.reports.insert((at, number), report);
            self.made.insert(at, (number, now));
        }
    }

    /// Whom news goes to next: each neighbour once, in random order, before any twice.
    fn next(&mut self, at: usize) -> usize {
        if self.hosts[at].turns.is_empty() {
            let mut turns = self.hosts[at].near.clone();
            for last in (1..turns.len()).rev() {
                turns.swap(last, below(&self.draw, last + 1));
            }
            self.hosts[at].turns = turns;
        }
        self.hosts[at].turns.pop().unwrap()
    }

    fn gossip(&mut self, at: usize) {
        for _ in 0..FANOUT.min(self.hosts.len() - 1) {
            if self.hosts[at].queue.is_empty() {
                return;
            }
            let to = self.next(at);
            let apart = self.are_apart(at, to);
            let latency = MS * u32::try_from(1 + self.draw.below(30)).unwrap();
            let packed = self.hosts[at].pack();
            self.bytes += (PACKET_HEAD + packed.len() * REPORT_BYTES) as u64;
            if !apart {
                let due = self.now + latency;
                self.flights.extend(packed.into_iter().map(|(author, number)| (due, to, author, number)));
            }
        }
    }

    fn deliver(&mut self) {
        let now = self.now;
        let due: Vec<_> = self.flights.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, to, author, number) in due {
            let host = &mut self.hosts[to];
            if host.seen[author] >= number || author == to {
                continue;
            }
            host.seen[author] = number;
            host.wait(author);
            if let Some(report) = self.reports.get(&(author, number)) {
                host.quotas.handle_demand(&name(author), report, now);
            }
            if let Some((newest, made)) = self.made.get(&author)
                && *newest == number
            {
                self.late += (now - *made).saturating_sub(hold(self.hosts.len())).as_secs_f64();
            }
        }
    }

    /// Runs for `seconds`; `offered` says how many requests a second come to a node at a time, `split` when there is a split.
    fn run(
        &mut self,
        seconds: u64,
        offered: impl Fn(usize, f64) -> f64,
        split: impl Fn(f64) -> Option<usize>,
    ) -> Figures {
        let (began, count) = (self.now, self.hosts.len());
        let (mut over, mut least, mut figures) = (0.0_f64, 0.0_f64, Figures::default());
        let (mut last, mut second_bytes) = (0_u64, 0);
        for step in 0..seconds * 100 {
            let at_seconds = (self.now - began).as_secs_f64();
            if split(at_seconds) != self.split {
                self.set_split(split(at_seconds));
            }
            let mut passed = 0_u32;
            for at in 0..count {
                let host = &mut self.hosts[at];
                host.carry += offered(at, at_seconds) * STEP.as_secs_f64();
                while host.carry >= 1.0 {
                    host.carry -= 1.0;
                    passed += u32::from(host.rates.admit(&web(), &self.rules, Some("/"), |_| 0, self.now).is_ok());
                }
                // Each node has its own phase.
                if (step + at as u64 * 7).is_multiple_of(25) {
                    self.tick(at);
                }
                if (step + at as u64 * 3).is_multiple_of(20) {
                    self.gossip(at);
                }
            }
            self.deliver();
            over += f64::from(passed) - self.limit * STEP.as_secs_f64();
            figures.excess = figures.excess.max(over - least);
            least = least.min(over);
            if step >= (seconds - 10) * 100 {
                last += u64::from(passed);
            }
            self.now += STEP;
            if step % 100 == 99 {
                let each = (self.bytes - second_bytes) as f64 / count as f64;
                second_bytes = self.bytes;
                figures.busiest = figures.busiest.max(each);
                figures.resting += if step >= (seconds - 10) * 100 { each / 10.0 } else { 0.0 };
            }
        }
        figures.settled = last as f64 / 10.0 / self.limit;
        figures.late = self.late / (count * (count - 1)) as f64;
        figures
    }
}

/// How many requests a second come to a node at a time.
type Offered = Box<dyn Fn(usize, f64) -> f64>;

/// Runs what is stated of `count` nodes: the limit is ten requests a second for each node, the burst a second's worth.
fn show(count: usize) {
    let nodes = count as f64;
    let (limit, each) = (10.0 * nodes, 10.0);
    let seconds = if count > 100 { 70 } else { 40 };
    let never = |_: f64| None;
    let half = |at: f64| (15.0..25.0).contains(&at).then_some(count / 2);
    println!(
        "{count} nodes, limit {limit}/s, burst {limit}; hold {:?}, rest {:?}, repeat {:?}",
        hold(count),
        rest(count),
        repeat(count)
    );
    println!(
        "  {:22} {:>8} {:>8} {:>8} {:>8} {:>10} {:>10}",
        "", "excess", "bound", "late s", "settled", "B/s most", "B/s rest"
    );
    let cases: [(&str, Offered, bool, f64); 6] = [
        ("steady, twice the limit", Box::new(move |_, _| 2.0 * each), false, 0.95),
        ("skewed: one in ten", Box::new(move |at, _| if at % 10 == 0 { 20.0 * each } else { each / 2.0 }), false, 0.85),
        (
            "burst on one",
            Box::new(move |at, t| if at == 0 && t > 5.0 { 2.0 * limit } else { each / 20.0 }),
            false,
            0.85,
        ),
        ("burst on all", Box::new(move |_, t| if t > 10.0 { 4.0 * each } else { 0.0 }), false, 0.85),
        (
            "one busy, then all",
            Box::new(move |at, t| {
                if t > 20.0 {
                    4.0 * each
                } else if at == 0 {
                    2.0 * limit
                } else {
                    0.0
                }
            }),
            false,
            0.85,
        ),
        ("split for 10 s", Box::new(move |_, _| 2.0 * each), true, 0.95),
    ];
    for (what, offered, has_split, settled_min) in cases {
        let mut mesh = Mesh::new(count, limit, u32::try_from(10 * count).unwrap(), 42);
        let figures = if has_split { mesh.run(seconds, offered, half) } else { mesh.run(seconds, offered, never) };
        // burst + a request for each node + what late reports and a split let through.
        let split = if has_split { limit * 10.0 } else { 0.0 };
        let bound = limit + nodes + limit * figures.late + split;
        let Figures { excess, settled, late, busiest, resting } = figures;
        println!("  {what:22} {excess:8.0} {bound:8.0} {late:8.2} {settled:8.3} {busiest:10.0} {resting:10.0}");
        assert!(excess <= bound, "{count} nodes, {what}: {excess} beyond the limit, bound {bound}");
        assert!(settled >= settled_min && settled <= 1.01, "{count} nodes, {what}: settles at {settled} of the limit");
    }
}

#[test]
fn three_nodes_stay_within_the_bound_and_use_the_limit() {
    show(3);
}

#[test]
fn twenty_nodes_stay_within_the_bound_and_use_the_limit() {
    show(20);
}

#[test]
#[ignore = "takes a minute; run by hand for the figures"]
fn a_thousand_nodes_stay_within_the_bound_and_use_the_limit() {
    show(1000);
}

/// The share of each of `demands` (of the whole limit; 0: silent), where all count alike.
fn divided(demands: &[f64]) -> Vec<f64> {
    let codes: Vec<u8> = demands.iter().map(|part| code_of(part.min(1.0))).collect();
    let limit = |own: usize| {
        let asked = Asked::of_all(1, web(), 1.0, 0);
        let mut limit = Limit::new(&asked, start());
        limit.granted = codes[own];
        for (_, code) in codes.iter().enumerate().filter(|(at, _)| *at != own) {
            limit.bins[usize::from(*code)] += 1;
        }
        limit
    };
    (0..demands.len()).map(|own| limit(own).part(demands.len())).collect()
}

#[track_caller]
fn close(found: &[f64], wanted: &[f64]) {
    let is_close = found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 0.02);
    assert!(is_close && found.len() == wanted.len(), "{found:?} is not {wanted:?}");
}

#[test]
fn shares_are_what_is_asked_up_to_a_common_level_and_equal_parts_of_the_rest() {
    close(&divided(&[0.0, 0.0, 0.0, 0.0]), &[0.25; 4]);
    close(&divided(&[1.0, 1.0, 1.0, 1.0]), &[0.25; 4]);
    close(&divided(&[1.0, 0.0, 0.0, 0.0]), &[0.9625, 0.0125, 0.0125, 0.0125]);
    // An eighth and a quarter are exact; the two others divide what is left.
    close(&divided(&[0.125, 0.25, 1.0, 1.0]), &[0.125, 0.25, 0.3125, 0.3125]);
    // Half is asked for; of the other half each gets a quarter.
    close(&divided(&[0.5, 0.0, 0.0, 0.0]), &[0.5 + 0.115, 0.0125 + 0.115, 0.0125 + 0.115, 0.0125 + 0.115]);
    close(&divided(&[0.3]), &[1.0]);
}

#[test]
fn a_liar_takes_no_more_than_what_is_above_equal_parts() {
    let shares = divided(&[1.0, 0.25, 0.25, 0.25]);
    assert!(shares.iter().all(|share| (share - 0.25).abs() < 1e-9), "{shares:?}");
    // A limit that is named again and again counts once, and a code that there is not counts as nothing.
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(4), start());
    let asked = [Asked::of_all(1, web(), 100.0, 0)];
    quotas.tick(&asked, start());
    let lie = Demand { limits: vec![(1, 0); 32].into() };
    quotas.handle_demand(&name(1), &lie, start());
    quotas.handle_demand(&name(9), &lie, start());
    quotas.handle_demand(&name(2), &Demand { limits: [(1, SILENT)].into() }, start());
    let limit = &quotas.limits[&1];
    assert_eq!(
        (limit.bins[0], limit.bins.iter().take(255).sum::<u16>()),
        (1, 1),
        "a stranger's word, or one word 32 times"
    );
}

#[test]
fn the_own_demand_counts_when_others_have_had_time_to_hear_of_it_and_theirs_at_once() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(2), start());
    let asked = |count| [Asked::of_all(1, web(), 100.0, count)];
    let at = |ms: u64| start() + Duration::from_millis(ms);
    for tick in 0..40 {
        quotas.tick(&asked(0), at(tick * 250));
    }
    let (mut reported, mut raised) = (None, None);
    for tick in 40..80 {
        let turn = quotas.tick(&asked(100), at(tick * 250));
        reported = reported.or(turn.report.map(|_| tick));
        raised = raised.or((turn.shares[0].1 > 60.0).then_some(tick));
    }
    let (reported, raised) = (reported.unwrap(), raised.unwrap());
    assert!(reported <= 43, "{reported}");
    let held = Duration::from_millis((raised - reported) * 250);
    assert!(held >= hold(2) && held <= hold(2) + Duration::from_secs(3), "{held:?}");
    quotas.handle_demand(&name(1), &Demand { limits: [(1, 0)].into() }, at(20_000));
    let share = quotas.tick(&asked(100), at(20_000)).shares[0].1;
    assert!((share - 50.0).abs() < 0.1, "{share}");
    // It fails: what it said is void. Alone, nobody has to be told.
    quotas.set_mates(mates(1), at(20_250));
    let turn = quotas.tick(&asked(0), at(20_250));
    assert!((turn.shares[0].1 - 100.0).abs() < 0.1 && turn.report.is_none());
}

#[test]
fn a_caller_s_limit_is_forgotten_when_it_rests_and_the_limit_of_all_is_not() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(2), start());
    let at = |seconds: u64| start() + Duration::from_secs(seconds);
    let turn = quotas.tick(&[Asked::of_all(1, web(), 10.0, 0), Asked::of_one(2, web(), 10.0, 1)], at(0));
    assert_eq!(turn.shares.iter().map(|(limit, _)| *limit).collect::<Vec<_>>(), [1, 2]);
    let idle = [Asked::of_all(1, web(), 10.0, 0), Asked::of_one(2, web(), 10.0, 0)];
    let mut last = Vec::new();
    for second in 1..200 {
        last = quotas.tick(&idle, at(second)).shares;
    }
    assert_eq!(last.iter().map(|(limit, _)| *limit).collect::<Vec<_>>(), [1]);
    // What is not divided has the floor.
    assert!((quotas.floor(&web(), 10.0) - 0.25).abs() < 1e-9);
}

#[test]
fn a_newcomer_has_an_equal_part_at_most_until_it_may_have_heard_of_all() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(1000), start());
    let asked = [Asked::of_all(1, web(), 100.0, 100)];
    let waits = rest(1000) + hold(1000);
    let (mut at, mut share) = (Duration::ZERO, 0.0);
    while at < waits + Duration::from_secs(20) {
        share = quotas.tick(&asked, start() + at).shares[0].1;
        assert!(at >= waits || share <= 0.1 + 1e-9, "{share} after {at:?}");
        at += TICK;
    }
    assert!(share > 50.0, "nobody else asks for any of it: {share}");
}

#[test]
fn reports_of_a_large_mesh_are_far_apart_however_demand_changes() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(1000), start());
    let mut reported = Vec::new();
    for tick in 0..2_400 {
        // A change each 15 s, for 10 minutes.
        let count = if tick / 60 % 2 == 0 { 100 } else { 1 };
        let at = start() + TICK * tick;
        if quotas.tick(&[Asked::of_all(1, web(), 100.0, count)], at).report.is_some() {
            reported.push(at);
        }
    }
    assert!(reported.len() > 5, "{}", reported.len());
    assert!(reported.windows(2).all(|pair| pair[1] - pair[0] >= rest(1000)), "{reported:?}");
}

#[test]
fn where_many_report_at_once_the_own_demand_counts_later() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(100), start());
    let (mut told, mut share, mut others) = (None, 0.0, 1..100);
    for tick in 0..200 {
        let (at, count) = (TICK * tick, if tick < 60 { 0 } else { 100 });
        let turn = quotas.tick(&[Asked::of_all(1, web(), 100.0, count)], start() + at);
        share = turn.shares[0].1;
        told = told.or(turn.report.map(|_| at));
        if let Some(told) = told {
            assert!(at >= told + rest(100) || share <= 1.0 + 1e-9, "{share} at {at:?}, told at {told:?}");
            for other in others.by_ref().take(4) {
                quotas.handle_demand(&name(other), &Demand { limits: [(1, 200)].into() }, start() + at);
            }
        }
    }
    assert!(hold(100) < rest(100) && share > 50.0, "{share}");
}

#[test]
fn a_report_counts_for_a_time_and_those_of_so_many_nodes_are_kept() {
    let mut quotas = Quotas::new(name(0), 1, start());
    quotas.set_mates(mates(2), start());
    let asked = [Asked::of_all(1, web(), 100.0, 1)];
    quotas.tick(&asked, start());
    let demand = Demand { limits: [(1, 0)].into() };
    quotas.handle_demand(&name(1), &demand, start());
    let counted = |quotas: &Quotas| (quotas.limits[&1].bins[0], quotas.told.len());
    let lasts = repeat(2) * (REPEATS_MISSED_MAX + 1);
    quotas.tick(&asked, start() + lasts.saturating_sub(TICK));
    assert_eq!(counted(&quotas), (1, 1));
    quotas.tick(&asked, start() + lasts + REPEAT_MIN);
    assert_eq!(counted(&quotas), (0, 0), "it was not repeated");

    for at in 1..TOLD_MAX + 10 {
        quotas.handle_demand(&name(at), &demand, start());
    }
    assert_eq!(counted(&quotas), (1, TOLD_MAX));
    quotas.handle_demand(&name(1), &Demand::default(), start());
    assert_eq!(counted(&quotas), (0, TOLD_MAX), "who is known is heard all the same");
}

proptest! {
    #[test]
    fn shares_are_never_more_than_the_limit_together_and_none_is_below_its_floor(
        demands in prop::collection::vec(prop_oneof![Just(0.0), 0.0..1.5_f64, 0.0..0.01_f64], 1..40),
    ) {
        let shares = divided(&demands);
        let sum: f64 = shares.iter().sum();
        prop_assert!(sum <= 1.0 + 1e-9, "{sum}");
        prop_assert!(sum >= 0.95 - 1e-9, "{sum} of the limit is given out");
        for share in &shares {
            prop_assert!(*share >= floor(demands.len()) - 1e-12, "{share}");
        }
    }

    /// What the bound rests on: a share falls with others' demand and rises with the own.
    #[test]
    fn a_share_falls_with_others_demand(
        mut demands in prop::collection::vec(prop_oneof![Just(0.0), 0.0..1.0_f64], 2..20),
        more in 0.0..1.0_f64,
    ) {
        let before = divided(&demands);
        demands[0] += more;
        let after = divided(&demands);
        prop_assert!(after[0] >= before[0] - 1e-9);
        for (before, after) in before.iter().zip(&after).skip(1) {
            prop_assert!(after <= &(before + 1e-9), "{after} after {before}");
        }
    }
}

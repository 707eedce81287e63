//! The figures that a mesh must reach, measured in the simulator.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::RngExt as _;
use weft::membership::Profile;
use weft::model::{MemberStatus, NodeName};

use super::host;
use super::processor::Machine;
use super::scenarios::{self, SECOND};
use super::stats::{self, Times, show};
use super::world::{Settings, World};

/// One line of the table.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) must: String,
    pub(crate) measured: String,
    pub(crate) is_reached: bool,
}

impl Figure {
    fn new(name: impl Into<String>, must: impl Into<String>, measured: impl Into<String>, is_reached: bool) -> Self {
        Self { name: name.into(), must: must.into(), measured: measured.into(), is_reached }
    }

    fn times(name: impl Into<String>, must: Duration, times: &Times) -> Self {
        let p99 = times.percentile(99.0);
        let measured = format!("p50 {}, p99 {}, max {}", show(times.percentile(50.0)), show(p99), show(times.max()));
        Self::new(name, format!("p99 {}", show(must)), measured, p99 <= must)
    }

    pub(crate) fn cells(&self) -> Vec<String> {
        let verdict = if self.is_reached { "reached" } else { "MISSED" };
        vec![self.name.clone(), self.must.clone(), self.measured.clone(), verdict.to_owned()]
    }
}

/// Times of several kills in meshes of `count` hosts.
pub(crate) fn kills(count: usize, runs: u64, loss: f64, settings: &Settings) -> Times {
    let mut times = Times::default();
    for seed in 0..runs {
        let mut world = if count > 200 {
            let mut world = World::preloaded(count, None, seed, settings.clone());
            // A thousand that come at once are many newcomers, with whom everybody is patient for a while.
            world.calm_down();
            world
        } else {
            World::joined(count, seed, settings.clone())
        };
        world.net.loss = loss;
        let kills = if count > 200 { 6 } else { 3 };
        for _ in 0..kills {
            times.add(scenarios::kill(&mut world));
        }
    }
    times
}

/// Times of several registrations in one mesh per seed.
pub(crate) fn registrations(count: usize, runs: u64, each: usize, loss: f64, settings: &Settings) -> Times {
    let mut times = Times::default();
    for seed in 0..runs {
        let mut world = scenarios::mesh(count, 1, seed, settings.clone());
        world.net.loss = loss;
        for _ in 0..each {
            times.add(scenarios::register(&mut world));
        }
    }
    times
}

/// Failures of healthy nodes that were seen while a quarter of the nodes paused and a tenth of the packets was lost.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct FalsePositives {
    pub(crate) at_healthy: usize,
    pub(crate) at_all: usize,
    pub(crate) node_hours: f64,
}

impl FalsePositives {
    fn show(&self) -> String {
        format!("{} ({} at all nodes) in {:.0} node-hours", self.at_healthy, self.at_all, self.node_hours)
    }

    fn add(&mut self, other: Self) {
        self.at_healthy += other.at_healthy;
        self.at_all += other.at_all;
        self.node_hours += other.node_hours;
    }
}

/// Runs `count` hosts for `time`; every fourth is stopped again and again, for 0.1 to 10 s, after 1 to 30 s each.
pub(crate) fn false_positives(count: usize, time: Duration, seed: u64, settings: &Settings) -> FalsePositives {
    let mut world = World::joined(count, seed, settings.clone());
    world.net.loss = 0.1;
    world.seen.clear();
    let mut due: BTreeSet<(Duration, usize)> = BTreeSet::new();
    for host in (0..count).filter(|host| host % 4 == 3) {
        let at = world.now + Duration::from_millis(world.rng.random_range(0..20_000));
        due.insert((at, host));
    }
    let end = world.now + time;
    let is_sick = |host: usize| host % 4 == 3;
    let nodes: BTreeMap<NodeName, usize> = (0..count).map(|host| (host::name(host), host)).collect();
    let mut found = FalsePositives { node_hours: count as f64 * time.as_secs_f64() / 3600.0, ..Default::default() };
    while let Some((at, host)) = due.pop_first().filter(|(at, _)| *at < end) {
        let wait = at.saturating_sub(world.now);
        world.run(wait);
        let pauses = world.hosts[host].process.as_ref().is_some_and(|process| process.is_paused);
        if pauses {
            world.resume(host);
            due.insert((world.now + Duration::from_millis(world.rng.random_range(1000..30_000)), host));
        } else {
            world.pause(host);
            // From 0.1 to 10 s, evenly in orders of magnitude.
            let pause = 0.1 * 100f64.powf(world.rng.random_range(0.0..1.0));
            due.insert((world.now + Duration::from_secs_f64(pause), host));
        }
        for seen in std::mem::take(&mut world.seen) {
            let node = nodes[&seen.node];
            if seen.after == Some(MemberStatus::Failed) && !is_sick(node) {
                found.at_all += 1;
                found.at_healthy += usize::from(!is_sick(seen.observer));
            }
        }
    }
    found
}

/// What a mesh sends while nothing happens, per host and second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Idle {
    pub(crate) wire_bytes: f64,
    pub(crate) packets: f64,
    pub(crate) packet_bytes: f64,
    pub(crate) stream_packets: f64,
    pub(crate) stream_bytes: f64,
    pub(crate) acks: f64,
    pub(crate) dials: f64,
}

/// Measures what `world` sends in `time`, in which nobody does anything.
pub(crate) fn idle(world: &mut World, time: Duration) -> Idle {
    let before: Vec<_> = world.hosts.iter().map(|host| host.traffic).collect();
    world.classes = Some(BTreeMap::new());
    world.run(time);
    let mut sum = host::Traffic::default();
    world.hosts.iter().zip(&before).for_each(|(host, before)| sum.add(&host.traffic.since(before)));
    let per = |part: u64| part as f64 / before.len() as f64 / time.as_secs_f64();
    let all = time * u32::try_from(before.len()).unwrap();
    Idle {
        wire_bytes: sum.wire_bytes(all) / all.as_secs_f64(),
        packets: per(sum.packets),
        packet_bytes: per(sum.packet_bytes),
        stream_packets: per(sum.stream_packets),
        stream_bytes: per(sum.stream_bytes),
        acks: per(sum.acks),
        dials: per(sum.dials),
    }
}

/// What each newcomer costs each member, sent: beside what a mesh at rest sends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) packets: f64,
    pub(crate) stream_packets: f64,
    pub(crate) acks: f64,
    pub(crate) dials: f64,
    /// Until all know all, from the last start on.
    pub(crate) took: Duration,
}

impl Cost {
    /// Counts what was sent since `before`, less what `rest` says of so much time; hosts that were not there count from zero.
    fn of(world: &World, before: &[host::Traffic], rest: Option<&Idle>, newcomers: usize, took: Duration) -> Self {
        let mut sum = host::Traffic::default();
        let zero = host::Traffic::default();
        let each = world.hosts.iter().zip(before.iter().chain(std::iter::repeat(&zero)));
        each.for_each(|(host, before)| sum.add(&host.traffic.since(before)));
        let pairs = (world.hosts.len() * newcomers) as f64;
        let at_rest = |of: fn(&Idle) -> f64| rest.map_or(0.0, of) * took.as_secs_f64() / newcomers as f64;
        Self {
            packets: sum.packets as f64 / pairs - at_rest(|idle| idle.packets),
            stream_packets: sum.stream_packets as f64 / pairs - at_rest(|idle| idle.stream_packets),
            acks: sum.acks as f64 / pairs - at_rest(|idle| idle.acks),
            dials: sum.dials as f64 / pairs - at_rest(|idle| idle.dials),
            took,
        }
    }

    fn show(&self) -> String {
        let Self { packets, stream_packets, acks, dials, took } = self;
        format!(
            "{packets:.2} packets, {stream_packets:.2} of streams, {acks:.2} acks, {dials:.3} dials; all after {}",
            show(*took)
        )
    }
}

/// Starts `count` hosts 15 ms apart and counts until all know all, and how long that takes from the last start on.
pub(crate) fn start(count: usize, seed: u64, settings: &Settings) -> Cost {
    let mut world = World::new(seed, settings.clone());
    world.add_hosts(count);
    for host in 0..count {
        world.start(host);
        world.run(Duration::from_millis(15));
    }
    let took = world.run_until(120 * SECOND, World::has_converged).expect("all know all");
    Cost::of(&world, &[], None, count, took)
}

/// What a start of many agents on one machine came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Crowd {
    /// Until all know all, from the last start on; none: not within the limit.
    pub(crate) took: Option<Duration>,
    /// How often an agent took another for failed.
    pub(crate) verdicts: usize,
    /// Packets of all agents together.
    pub(crate) packets: u64,
}

impl Crowd {
    pub(crate) fn show(&self) -> String {
        let took = self.took.map_or("not settled".to_owned(), |took| format!("all after {}", show(took)));
        format!("{took}; {} verdicts, {} packets", self.verdicts, self.packets)
    }
}

/// Starts `count` agents on one machine, `apart` from each other, and runs until all know all, `limit` at most.
pub(crate) fn crowd(count: usize, apart: Duration, machine: Machine, limit: Duration, seed: u64) -> Crowd {
    let mut world = World::new(seed, Settings { machine: Some(machine), ..Settings::default() });
    world.add_hosts(count);
    for host in 0..count {
        world.start(host);
        world.run(apart);
    }
    let took = world.run_until(limit, World::has_converged);
    let verdicts = world.seen.iter().filter(|seen| seen.after == Some(MemberStatus::Failed)).count();
    Crowd { took, verdicts, packets: world.hosts.iter().map(|host| host.traffic.packets).sum() }
}

/// Adds `newcomers` to a mesh of `count`, 15 ms apart, and counts for 20 s what that costs beside the rest.
pub(crate) fn newcomers(count: usize, newcomers: usize, seed: u64, settings: &Settings) -> Cost {
    let mut world = scenarios::mesh(count, 1, seed, settings.clone());
    world.run(60 * SECOND);
    let rest = idle(&mut world, 30 * SECOND);
    let before: Vec<_> = world.hosts.iter().map(|host| host.traffic).collect();
    world.add_hosts(newcomers);
    for host in count..count + newcomers {
        world.start(host);
        world.run(Duration::from_millis(15));
    }
    let took = world.run_until(60 * SECOND, World::has_converged).expect("all know all");
    world.run(20 * SECOND - took.min(20 * SECOND));
    Cost { took, ..Cost::of(&world, &before, Some(&rest), newcomers, 20 * SECOND) }
}

/// Stops a host for 10 s: (unrouted everywhere, back everywhere after it went on, others that flapped).
pub(crate) fn sigstop(count: usize, seed: u64, settings: &Settings) -> (Duration, Duration, usize) {
    let mut world = World::joined(count, seed, settings.clone());
    let idle = Duration::from_millis(world.rng.random_range(0..3000));
    world.run(idle);
    world.seen.clear();
    let name = world.hosts[1].name.clone();
    world.pause(1);
    let all_failed = |world: &World| world.all_see(1, Some(MemberStatus::Failed));
    let gone = world.run_until(10 * SECOND, all_failed).unwrap_or(10 * SECOND);
    world.run(10 * SECOND - gone);
    let stopped = world.seen.len();
    world.resume(1);
    let back = world.run_until(60 * SECOND, World::has_converged).expect("it comes back");
    world.run(20 * SECOND);
    let flapped = world.seen.iter().filter(|seen| seen.node != name);
    let after: BTreeSet<_> = flapped.map(|seen| seen.node.clone()).collect();
    assert!(stopped > 0 || gone >= 10 * SECOND);
    (gone, back, after.len())
}

/// Splits in halves for a minute: how long after the healing until all hold the same and know all, and third parties
/// that flapped.
pub(crate) fn split(count: usize, seed: u64, settings: &Settings) -> (Duration, usize) {
    let mut world = scenarios::mesh(count, 1, seed, settings.clone());
    world.split(|host| u8::from(host % 2 == 1));
    // Both sides go on: each registers something.
    world.run(30 * SECOND);
    for host in [0, 1] {
        world.register(host, host::service("late", "late", "in-the-dark"));
    }
    world.run(30 * SECOND);
    world.seen.clear();
    world.heal();
    let took = world.run_until(120 * SECOND, |world| world.has_converged() && world.is_equal());
    world.run(10 * SECOND);
    let same_side = |seen: &&super::world::Seen| {
        let node = world.hosts_named(seen.node.as_str()).next().unwrap_or(0);
        seen.after == Some(MemberStatus::Failed) && node % 2 == seen.observer % 2
    };
    let flaps = world.seen.iter().filter(same_side).count();
    world.assert_settled();
    (took.expect("it heals"), flaps)
}

/// One host leaves: how long until all others see it as left.
pub(crate) fn leave(count: usize, seed: u64, settings: &Settings) -> Times {
    let mut world = World::joined(count, seed, settings.clone());
    let idle = Duration::from_millis(world.rng.random_range(0..3000));
    world.run(idle);
    world.seen.clear();
    let begin = world.now;
    world.leave(2);
    world.run(SECOND / 3);
    world.crash(2);
    world.run_until(60 * SECOND, |world| world.all_see(2, Some(MemberStatus::Left)));
    let name = world.hosts[2].name.clone();
    let first = |observer: usize| {
        let gone = [Some(MemberStatus::Leaving), Some(MemberStatus::Left)];
        let seen =
            world.seen.iter().find(|seen| seen.observer == observer && seen.node == name && gone.contains(&seen.after));
        seen.map_or(60 * SECOND, |seen| seen.at - begin)
    };
    Times(world.running().map(first).collect())
}

/// A host dies and is back at another address at once: how long until all know it there.
pub(crate) fn readdressed(count: usize, seed: u64, settings: &Settings) -> Duration {
    let mut world = World::joined(count, seed, settings.clone());
    let idle = Duration::from_millis(world.rng.random_range(0..3000));
    world.run(idle);
    world.crash(3);
    world.run(SECOND / 2);
    world.readdress(3, host::addr(3, 1));
    world.start(3);
    let took = world.run_until(60 * SECOND, World::has_converged).expect("it is known again");
    world.seen.clear();
    world.run(20 * SECOND);
    assert!(world.seen.is_empty(), "no ghost of the old life: {:?}", world.seen);
    took
}

/// A part of the table.
pub(crate) type Group = (&'static str, fn(&Settings, &mut dyn FnMut(Figure)));

/// Everything that the mesh must reach and that a simulation can show, by group.
pub(crate) const GROUPS: [Group; 12] = [
    ("kill", kill_figures),
    ("kill-1000", |settings, report| kill_figure(1000, 1, 5, settings, report)),
    ("register", |settings, report| register_figures(20, 20, 5, settings, report)),
    ("register-1000", |settings, report| register_figures(1000, 1, 10, settings, report)),
    ("sigstop", sigstop_figures),
    ("split", split_figures),
    ("leave", leave_figures),
    ("readdress", readdress_figures),
    ("idle", idle_figures),
    ("idle-1000", large_idle_figure),
    ("newcomers", newcomer_figures),
    ("false-positives", false_positive_figures),
];

fn kill_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    kill_figure(20, 40, 3, settings, report);
    kill_figure(100, 10, 3, settings, report);
}

fn kill_figure(count: usize, runs: u64, must: u32, settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let times = kills(count, runs, 0.0, settings);
    report(Figure::times(format!("kill -9, N={count}: unrouted"), SECOND * must, &times));
}

fn register_figures(count: usize, runs: u64, each: usize, settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let quick = if count > 100 { SECOND } else { Duration::from_millis(300) };
    for (loss, must) in [(0.0, quick), (0.01, quick), (0.2, 3 * SECOND)] {
        let times = registrations(count, runs, each, loss, settings);
        report(Figure::times(format!("registration, N={count}, {} % loss", loss * 100.0), must, &times));
    }
}

fn sigstop_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let (mut gone, mut back, mut flaps) = (Times::default(), Times::default(), 0);
    for seed in 0..40 {
        let (unrouted, returned, flapped) = sigstop(20, seed, settings);
        gone.0.push(unrouted);
        back.0.push(returned);
        flaps += flapped;
    }
    report(Figure::times("SIGSTOP 10 s, N=20: unrouted everywhere", 3 * SECOND, &gone));
    report(Figure::times("  back everywhere after SIGCONT", SECOND, &back));
    report(Figure::new("  others that flapped", "0", flaps.to_string(), flaps == 0));
}

fn split_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let (mut healed, mut flaps) = (Times::default(), 0);
    for seed in 0..20 {
        let (took, flapped) = split(20, seed, settings);
        healed.0.push(took);
        flaps += flapped;
    }
    report(Figure::times("split 50/50 of 60 s, N=20: equal again", 5 * SECOND, &healed));
    report(Figure::new("  third parties that flapped", "0", flaps.to_string(), flaps == 0));
}

fn leave_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    for count in [20, 100] {
        let mut times = Times::default();
        (0..10).for_each(|seed| times.add(leave(count, seed, settings)));
        report(Figure::times(format!("leave, N={count}: seen"), SECOND / 2, &times));
    }
}

fn readdress_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let times = Times((0..40).map(|seed| readdressed(20, seed, settings)).collect());
    report(Figure::times("same name, new address, N=20: known", SECOND, &times));
}

/// From the end of the joining on, an hour passes: every lease is renewed at least once.
fn idle_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    for (count, services) in [(20, 1), (20, 100), (100, 1)] {
        let mut world = scenarios::mesh(count, services, 1, settings.clone());
        world.run(60 * SECOND);
        idle_figure(&mut world, count * services, 60 * 60 * SECOND, report);
    }
}

/// Leases last ten hours there: what an hour of renewals costs is measured with smaller meshes.
fn large_idle_figure(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let mut world = scenarios::mesh(1000, 1, 1, settings.clone());
    world.run(60 * SECOND);
    idle_figure(&mut world, 1000, 300 * SECOND, report);
}

/// What the bytes of an idle node are, per second: each class with what IP, UDP and QUIC add to it.
fn classes(world: &World, time: Duration, (acks, dials): (f64, f64)) -> String {
    let per = |part: u64| part as f64 / world.hosts.len() as f64 / time.as_secs_f64();
    let row = |class: &str, datagrams: f64, bytes: f64| {
        vec![class.to_owned(), format!("{datagrams:.3}/s"), format!("{bytes:.1} B/s")]
    };
    let counted = world.classes.iter().flatten().map(|(class, [datagrams, bytes])| {
        let overhead = datagrams * (host::DATAGRAM_OVERHEAD + host::FRAME_OVERHEAD);
        row(class, per(*datagrams), per(bytes + overhead))
    });
    let mut rows: Vec<Vec<String>> = counted.collect();
    rows.push(row("acknowledgements alone", acks, acks * host::ACK_BYTES as f64));
    rows.push(row("handshakes", dials, dials * 2.0 * host::HANDSHAKE_BYTES as f64));
    rows.push(row("ports asked", host::PORTS_PER_SECOND, host::PORT_BYTES_PER_SECOND));
    rows.push(row("documents compared", 1.0 / 30.0, host::DOCUMENTS_BYTES_PER_SECOND));
    stats::table(&rows)
}

fn idle_figure(world: &mut World, instances: usize, time: Duration, report: &mut dyn FnMut(Figure)) {
    world.worked = Some(Duration::ZERO);
    let Idle { wire_bytes, packets, packet_bytes, stream_packets, stream_bytes, acks, dials } = idle(world, time);
    let measured = format!(
        "{wire_bytes:.0} B/s ({packets:.2} packets of {:.0} B, {stream_packets:.2} of streams with {:.0} B, {acks:.2} acks, {dials:.4} dials, per s)",
        packet_bytes / packets.max(f64::MIN_POSITIVE),
        stream_bytes / stream_packets.max(f64::MIN_POSITIVE),
    );
    eprintln!("{}", classes(world, time, (acks, dials)));
    let name = format!("idle, N={}, {instances} instances", world.hosts.len());
    report(Figure::new(name, "1,000 B/s", measured, wire_bytes <= 1000.0));
    let worked = world.worked.take().unwrap_or_default();
    idle_cpu_figures(world, worked.as_secs_f64() / time.as_secs_f64(), packets + stream_packets + acks, report);
}

/// What of a core an idle agent takes: the engine's part as all engines together took it (`all`, in cores), and, where what a
/// datagram costs was given, the whole by the `datagrams` that each sends a second. Each of them is received by another.
///
/// The engine runs here among a thousand others, in caches that are never warm. The rest, QUIC and the kernel, is
/// extrapolated: it is not simulated.
fn idle_cpu_figures(world: &World, all: f64, datagrams: f64, report: &mut dyn FnMut(Figure)) {
    let count = world.hosts.len();
    let must = if count <= 20 { 0.1 } else { 1.0 };
    let engine = 100.0 * all / count as f64;
    let mut row = |name: &str, percent: f64, how: &str| {
        let measured = format!("{percent:.3} % of a core{how}");
        report(Figure::new(name, format!("{must} %"), measured, percent <= must));
    };
    let by_itself = format!(" (and {datagrams:.2} datagrams/s, whose QUIC is not in it)");
    row("  CPU, the engine alone", engine, &by_itself);
    if let Some(cost) = world.settings.packet_cost {
        let percent = engine + 100.0 * datagrams * cost.as_secs_f64();
        let how = format!(" (extrapolated: {datagrams:.2} datagrams/s at {} us each)", cost.as_micros());
        row("  CPU, QUIC and the kernel included", percent, &how);
    }
}

/// No bound is asked for: these are what changes of the gossip are held against.
fn newcomer_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    for (count, fresh) in [(20, 1), (100, 1), (200, 1), (200, 20)] {
        let cost = newcomers(count, fresh, 1, settings);
        report(Figure::new(
            format!("{fresh} newcomers, N={count}: sent by each member for each"),
            "",
            cost.show(),
            true,
        ));
    }
    for count in [20, 100, 200] {
        let cost = start(count, 1, settings);
        report(Figure::new(format!("start of {count}: sent by each for each"), "", cost.show(), true));
    }
}

/// One seed in so many is run with plain foca as well: its count is thousands per seed, and only its order of magnitude counts.
const PLAIN_SEEDS: u64 = 5;

/// Meshes of 20 for 900 node-hours, in which suspicions are shortest, and of 100 for 100. What was found so far is told on the
/// way. Beside it stands plain foca on the first of every [`PLAIN_SEEDS`] seeds: weft's count of all hours must be 1/50 of that.
fn false_positive_figures(settings: &Settings, report: &mut dyn FnMut(Figure)) {
    let plain = Settings { profile: Profile::plain(), ..settings.clone() };
    for (count, seeds, hours) in [(20, 15, 3), (100, 1, 1)] {
        let (mut weft, mut foca) = (FalsePositives::default(), FalsePositives::default());
        for seed in 0..seeds {
            weft.add(false_positives(count, Duration::from_hours(hours), seed, settings));
            if seed % PLAIN_SEEDS == 0 {
                foca.add(false_positives(count, Duration::from_hours(hours), seed, &plain));
            }
            eprintln!("N={count}: weft {}; plain foca {}", weft.show(), foca.show());
        }
        report(Figure::new(format!("false positives, N={count}"), "0", weft.show(), weft.at_healthy == 0));
        let is_reached = weft.at_healthy * 50 <= foca.at_healthy;
        report(Figure::new("  plain foca", "50 times as many", foca.show(), is_reached));
    }
}

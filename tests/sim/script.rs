//! Random lives of a mesh: faults and churn drawn from the seed, then quiet, then everything must hold.

use std::time::Duration;

use rand::RngExt as _;

use super::host::{self, service};
use super::scenarios::{SECOND, settle};
use super::world::{Settings, World};

/// What may happen in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent ends without a word; it starts again some time later, perhaps elsewhere.
    Crash,
    /// As a crash, and the disk forgets what it had acknowledged last.
    TornCrash,
    /// It says goodbye and stops; it may come back.
    Leave,
    /// SIGSTOP and SIGCONT.
    Pause,
    /// The hosts fall into two groups.
    Split,
    /// Nothing passes one way between two hosts.
    CutOneWay,
    /// One host loses most of what it sends, or of what it should receive.
    LossyHost,
    /// A wall clock jumps by up to half an hour.
    ClockJump,
    /// Services come and go.
    Churn,
    /// Every host stops at once, and starts again.
    PowerLoss,
}

const FAULTS: [(Fault, u32); 10] = [
    (Fault::Crash, 6),
    (Fault::TornCrash, 2),
    (Fault::Leave, 3),
    (Fault::Pause, 6),
    (Fault::Split, 3),
    (Fault::CutOneWay, 4),
    (Fault::LossyHost, 4),
    (Fault::ClockJump, 2),
    (Fault::Churn, 20),
    (Fault::PowerLoss, 1),
];

/// A host starts, or goes on, or the network heals, at that time.
#[derive(Debug, Clone, Copy)]
enum Repair {
    Start(usize),
    Resume(usize),
    Heal,
    Uncut(usize, usize),
    Lossless(usize),
}

/// Lives through `time` of faults with `count` hosts and then through quiet; panics if anything does not hold.
///
/// Returns how long the mesh took to settle.
pub(crate) fn live(count: usize, time: Duration, seed: u64, settings: Settings) -> Duration {
    let mut world = World::new(seed, settings);
    world.net.regions = world.rng.random_range(1..4);
    world.net.loss = [0.0, 0.01, 0.05, 0.2][world.rng.random_range(0..4)];
    world.net.duplicate = [0.0, 0.02][world.rng.random_range(0..2)];
    world.net.reorder = [0.0, 0.05][world.rng.random_range(0..2)];
    world.add_hosts(count);
    // Two seeds each: one may be gone for good.
    for host in 0..count {
        world.hosts[host].seeds =
            (0..2).filter(|seed| *seed != host).map(|seed| host::addr(seed, 0).to_string()).collect();
    }
    // In waves.
    for host in 0..count {
        world.start(host);
        if host % 5 == 4 {
            let pause = Duration::from_millis(world.rng.random_range(0..2000));
            world.run(pause);
        }
    }
    let mut repairs: Vec<(Duration, Repair)> = Vec::new();
    let end = world.now + time;
    while world.now < end {
        let pause = Duration::from_millis(world.rng.random_range(10..3000));
        run_with_repairs(&mut world, pause, &mut repairs);
        let before = world.digests();
        strike(&mut world, &mut repairs);
        world.run(Duration::from_millis(200));
        world.assert_nothing_older_than(&before);
        for host in world.running().collect::<Vec<_>>() {
            world.assert_bounds(host);
        }
    }
    repairs.sort_by_key(|(at, _)| *at);
    for (_, repair) in std::mem::take(&mut repairs) {
        mend(&mut world, repair);
    }
    world.heal();
    world.net.loss_in.fill(0.0);
    world.net.loss_out.fill(0.0);
    world.net.loss = world.net.loss.min(0.05);
    for host in &mut world.hosts {
        host.wall_ahead = host.wall_ahead.clamp(-60, 60);
    }
    let limit = 180 * SECOND;
    let took = world.run_until(limit, |world| world.has_converged() && world.is_equal());
    // Who missed a goodbye hears of it when it compares next.
    world.run(60 * SECOND);
    let still = settle(&mut world, limit);
    took.unwrap_or(limit + still)
}

fn run_with_repairs(world: &mut World, time: Duration, repairs: &mut Vec<(Duration, Repair)>) {
    let until = world.now + time;
    repairs.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    while let Some((at, repair)) = repairs.pop_if(|(at, _)| *at <= until) {
        let wait = at.saturating_sub(world.now);
        world.run(wait);
        mend(world, repair);
    }
    let rest = until.saturating_sub(world.now);
    world.run(rest);
}

fn mend(world: &mut World, repair: Repair) {
    match repair {
        Repair::Start(host) => {
            if world.hosts[host].process.is_none() {
                world.start(host);
            }
        }
        Repair::Resume(host) => {
            if world.hosts[host].process.as_ref().is_some_and(|process| process.is_paused) {
                world.resume(host);
            }
        }
        Repair::Heal => world.heal(),
        Repair::Uncut(from, to) => {
            world.net.cuts.remove(&(from, to));
        }
        Repair::Lossless(host) => {
            world.net.loss_in[host] = 0.0;
            world.net.loss_out[host] = 0.0;
        }
    }
}

fn strike(world: &mut World, repairs: &mut Vec<(Duration, Repair)>) {
    let up: Vec<usize> = (0..world.hosts.len()).filter(|host| world.hosts[*host].is_up()).collect();
    let Some(host) = (!up.is_empty()).then(|| up[world.rng.random_range(0..up.len())]) else { return };
    let other = world.rng.random_range(0..world.hosts.len());
    let later = world.now + Duration::from_millis(world.rng.random_range(100..20_000));
    let total = FAULTS.iter().map(|(_, weight)| weight).sum();
    let mut drawn = world.rng.random_range(0..total);
    let fault = FAULTS.iter().find_map(|(fault, weight)| match drawn.checked_sub(*weight) {
        Some(rest) => {
            drawn = rest;
            None
        }
        None => Some(*fault),
    });
    let fault = fault.unwrap_or(Fault::Churn);
    world.tell(format!("fault: {fault:?} at {}", world.hosts[host].name));
    match fault {
        Fault::Crash | Fault::TornCrash => {
            if fault == Fault::Crash {
                world.crash(host)
            } else {
                world.crash_torn(host)
            }
            // A seed keeps its address: the others would look for it in vain.
            if host > 1 && world.rng.random_bool(0.3) {
                let moves =
                    world.hosts[host].addr.ip().to_string().split('.').nth(1).map_or(0, |part| part.parse().unwrap());
                world.readdress(host, host::addr(host, u8::wrapping_add(moves, 1)));
            }
            repairs.push((later, Repair::Start(host)));
        }
        Fault::Leave => {
            world.leave(host);
            world.run(Duration::from_millis(300));
            let wait = Duration::from_secs(world.rng.random_range(1..30));
            world.crash(host);
            if host < 2 || world.rng.random_bool(0.7) {
                repairs.push((world.now + wait, Repair::Start(host)));
            }
        }
        Fault::Pause => {
            world.pause(host);
            repairs.push((later, Repair::Resume(host)));
        }
        Fault::Split => {
            let sides: Vec<u8> = world.hosts.iter().map(|_| 0).collect();
            let sides: Vec<u8> = sides.iter().map(|_| u8::from(world.rng.random_bool(0.5))).collect();
            world.split(|host| sides[host]);
            repairs.push((later, Repair::Heal));
        }
        Fault::CutOneWay => {
            world.net.cuts.insert((host, other));
            repairs.push((later, Repair::Uncut(host, other)));
        }
        Fault::LossyHost => {
            let loss = world.rng.random_range(0.3..0.95);
            if world.rng.random_bool(0.5) {
                world.net.loss_in[host] = loss
            } else {
                world.net.loss_out[host] = loss
            }
            repairs.push((later, Repair::Lossless(host)));
        }
        Fault::ClockJump => world.hosts[host].wall_ahead = world.rng.random_range(-1800..1800),
        Fault::Churn => churn(world, host),
        Fault::PowerLoss => {
            for host in 0..world.hosts.len() {
                if world.hosts[host].process.is_some() {
                    world.crash(host);
                    let boot = Duration::from_millis(world.rng.random_range(100..10_000));
                    repairs.push((world.now + boot, Repair::Start(host)));
                }
            }
        }
    }
}

/// Registers, changes and deregisters a few services; now and then a large one that must be pulled.
fn churn(world: &mut World, host: usize) {
    for _ in 0..world.rng.random_range(1..4) {
        let id = format!("s{}", world.rng.random_range(0..6));
        let size = if world.rng.random_bool(0.1) { 3000 } else { 4 };
        let tag = format!("{}-{}", world.now.as_millis(), "x".repeat(size));
        let entries = service(&id, &format!("service-{id}"), &tag);
        if world.rng.random_bool(0.4) {
            for entry in entries {
                world.hosts[host].records.remove(&entry.key());
            }
        } else {
            world.hosts[host].records.extend(entries.map(|entry| (entry.key(), entry)));
        }
    }
    world.publish(host);
}

//! The cluster scenarios that a mesh must survive, each as one run of a world; they measure and hold what must be true.

use std::time::Duration;

use rand::RngExt as _;
use weft::model::MemberStatus;

use super::host::{self, service};
use super::stats::Times;
use super::world::{Settings, World};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Kills a random host and returns when each other took it out of routing, from the kill.
pub(crate) fn kill(world: &mut World) -> Times {
    let idle = Duration::from_millis(world.rng.random_range(0..3000));
    world.run(idle);
    // Never the first: a large mesh follows its registrations. One of those that everybody knows in a partial view.
    let victims: Vec<usize> = world.running().filter(|host| *host != 0).take(15).collect();
    let victim = victims[world.rng.random_range(0..victims.len())];
    let name = world.hosts[victim].name.clone();
    world.seen.clear();
    let begin = world.now;
    world.crash(victim);
    let limit = 60 * SECOND;
    let took = world.run_until(limit, |world| world.all_see(victim, Some(MemberStatus::Failed)));
    assert!(took.is_some(), "{name} is seen as failed by all");
    let observers: Vec<usize> = world.running().collect();
    let first = |observer: usize| {
        let seen = world.seen.iter().find(|seen| seen.observer == observer && seen.node == name);
        seen.map_or(limit, |seen| seen.at - begin)
    };
    Times(observers.into_iter().map(first).collect())
}

/// Registers a service on a random host and returns when each other held it.
pub(crate) fn register(world: &mut World) -> Times {
    register_at(world, None)
}

/// Registers a service on `writer`, or on a random host, and returns when each other held it.
pub(crate) fn register_at(world: &mut World, writer: Option<usize>) -> Times {
    let idle = Duration::from_millis(world.rng.random_range(0..3000));
    world.run(idle);
    let writers: Vec<usize> = world.running().collect();
    let writer = writer.unwrap_or_else(|| writers[world.rng.random_range(0..writers.len())]);
    let name = world.hosts[writer].name.clone();
    let version = world.engine(writer).replica().state(&name).map_or(0, |state| state.version);
    world.arrivals.clear();
    world.watched = Some((name, version + 1));
    let begin = world.now;
    let tag = format!("at-{}", begin.as_millis());
    world.register(writer, service("web", "web", &tag));
    // Where replicas are not compared, nothing repairs what broadcasts missed: that counts with the whole limit.
    let repairs = world.settings.has_syncs;
    let limit = if repairs { 120 } else { 15 } * SECOND;
    let count = world.running().count();
    let took = world.run_until(limit, |world| world.arrivals.len() >= count);
    world.watched = None;
    let reached = world.arrivals.len();
    assert!(took.is_some() || (!repairs && reached * 1000 >= count * 999), "it reaches all: {reached} of {count}");
    let others = world.running().filter(|host| *host != writer);
    Times(others.map(|host| world.arrivals.get(&host).map_or(limit, |at| *at - begin)).collect())
}

/// Makes a mesh of `count` hosts with `services` on each, settled.
pub(crate) fn mesh(count: usize, services: usize, seed: u64, settings: Settings) -> World {
    let mut world = World::new(seed, settings);
    world.add_hosts(count);
    for host in 0..count {
        for number in 0..services {
            for entry in service(&format!("s{number}"), &format!("service-{}", number % 7), "v1") {
                world.hosts[host].records.insert(entry.key(), entry);
            }
        }
        world.start(host);
    }
    let took = world.run_until(120 * SECOND, |world| world.has_converged() && world.is_equal());
    assert!(took.is_some(), "{count} hosts join and hold the same");
    world.calm_down();
    world
}

/// Runs until everything is quiet again and holds what must be true then.
#[track_caller]
pub(crate) fn settle(world: &mut World, limit: Duration) -> Duration {
    let took = world.run_until(limit, |world| world.has_converged() && world.is_equal());
    if took.is_none() {
        world.assert_settled();
        panic!("not settled within {limit:?}");
    }
    world.assert_settled();
    took.unwrap()
}

pub(crate) fn address_of(number: usize) -> String {
    host::addr(number, 0).to_string()
}

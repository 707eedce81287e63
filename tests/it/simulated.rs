//! The cluster scenarios in the simulator (tests/sim), each over a fixed set of seeds; a failure prints its seed.
//!
//! Numbers of the names are those of the list of scenarios that the mesh must survive. What is about one core alone (1, 2,
//! 3, 17 in part) stands in `membership::sim` as well; what crosses a socket, a disk or a certificate in `netns_*`.

use std::collections::BTreeSet;
use std::time::Duration;

use weft::catalogue::Builder;
use weft::gossip::engine::{Engine, Sizes};
use weft::model::{EntryKey, MemberStatus};

use crate::sim::documents::Documents;
use crate::sim::figures;
use crate::sim::host::{self, service};
use crate::sim::processor::Machine;
use crate::sim::scenarios::{self, SECOND, mesh, settle};
use crate::sim::script;
use crate::sim::stats::Times;
use crate::sim::world::{Settings, World};

/// Runs `test` once per seed.
fn seeds(count: u64, test: impl FnMut(u64)) {
    (0..count).for_each(test);
}

fn joined(count: usize, seed: u64) -> World {
    World::joined(count, seed, Settings::default())
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let trace = |seed: u64| {
        let mut world = mesh(10, 2, seed, Settings::default());
        world.net.loss = 0.1;
        world.crash(4);
        world.run(20 * SECOND);
        let seen: Vec<_> = world.seen.iter().map(|seen| (seen.at, seen.observer, seen.node.clone())).collect();
        let sent: Vec<_> = world.hosts.iter().map(|host| host.traffic.packet_bytes).collect();
        (world.steps, seen, sent)
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}

#[test]
fn random_lives_end_with_everything_as_it_must_be() {
    seeds(5, |seed| {
        let settled = script::live(12, 30 * SECOND, seed, Settings::default());
        assert!(settled < 180 * SECOND);
    });
}

#[test]
fn a_newcomer_sees_alive_who_lost_a_life_that_it_was_told_is_over() {
    // In each of these runs somebody whose disk lost its last generation speaks to a newcomer that a peer told of that
    // generation's end, before it goes above it.
    for seed in [11, 27, 42, 49] {
        let settled = script::live(12, 60 * SECOND, seed, Settings::default());
        assert!(settled < 180 * SECOND, "seed {seed}");
    }
}

#[test]
fn scenario_02_nodes_that_stop_now_and_then_accuse_nobody_healthy() {
    let found = figures::false_positives(12, Duration::from_mins(3), 2, &Settings::default());
    assert_eq!(found.at_healthy, 0, "{found:?}");
}

/// A machine on which everything takes ten times as long as measured, so that few agents are as many as hundreds.
const SMALL: Machine = Machine { processors: 2, step: Duration::from_millis(2), handshake: Duration::from_millis(28) };

#[test]
fn agents_that_share_a_machine_too_small_for_them_settle_and_doubt_few() {
    seeds(2, |seed| {
        let crowd = figures::crowd(40, Duration::from_millis(15), SMALL, 120 * SECOND, seed);
        println!("40 agents on a small machine, seed {seed}: {}", crowd.show());
        assert!(crowd.took.is_some_and(|took| took <= 20 * SECOND), "{}", crowd.show());
        assert!(crowd.verdicts <= 5, "{}", crowd.show());
    });
}

#[test]
fn scenario_04_a_live_nodes_name_is_refused_with_both_addresses_and_a_dead_or_left_one_is_free() {
    seeds(3, |seed| {
        let mut world = joined(5, seed);
        let mut twin = host::Host::new(5, vec![scenarios::address_of(0)]);
        twin.name = host::name(2);
        let (here, there) = (twin.addr.to_string(), world.hosts[2].addr.to_string());
        world.add_host(twin);
        world.start(5);
        world.run(10 * SECOND);
        let refused = |(at, reason): &(usize, String)| *at == 5 && reason.contains(&here) && reason.contains(&there);
        assert!(world.join_failures.iter().any(refused), "{:?}", world.join_failures);
        for observer in [0, 1, 3, 4] {
            let member = world.engine(observer).membership().member(&host::name(2)).unwrap();
            assert_eq!((member.status, member.id.addr.to_string()), (MemberStatus::Alive, there.clone()));
        }
        // The other is gone: the name is free.
        world.crash(2);
        world.readdress(2, host::addr(99, 9));
        let is_known = |world: &World| {
            let others = [0, 1, 3, 4].into_iter();
            let mut seen = others.filter_map(|at| world.engine(at).membership().member(&host::name(2)));
            seen.all(|member| member.status == MemberStatus::Alive && Some(&member.id) == world.hosts[5].id())
        };
        assert!(world.run_until(90 * SECOND, is_known).is_some(), "the newcomer has the name");
    });
}

#[test]
fn scenario_04_a_name_that_left_or_died_is_free_at_once() {
    seeds(3, |seed| {
        for has_left in [true, false] {
            let mut world = joined(5, seed);
            if has_left {
                world.leave(2);
                world.run(SECOND / 3);
            }
            world.crash(2);
            let gone = if has_left { MemberStatus::Left } else { MemberStatus::Failed };
            assert!(world.run_until(10 * SECOND, |world| world.all_see(2, Some(gone))).is_some());
            // Another host, with a disk of its own, takes the name.
            let mut heir = host::Host::new(5, vec![scenarios::address_of(0)]);
            heir.name = host::name(2);
            world.add_host(heir);
            world.start(5);
            let has_name = |world: &World| {
                let seen = [0, 1, 3, 4].map(|at| world.engine(at).membership().member(&host::name(2)));
                seen.iter().flatten().filter(|member| Some(&member.id) == world.hosts[5].id()).count() == 4
            };
            let took = world.run_until(10 * SECOND, has_name);
            assert!(took.is_some_and(|took| took <= 2 * SECOND), "{gone:?}: {took:?}");
        }
    });
}

#[test]
fn scenario_05_a_restart_within_a_second_at_the_same_or_another_address_is_one_identity_at_once() {
    let times = Times((0..6).map(|seed| figures::readdressed(12, seed, &Settings::default())).collect());
    assert!(times.max() <= SECOND, "{times:?}");
    seeds(4, |seed| {
        let mut world = joined(12, seed);
        world.crash(3);
        world.run(SECOND / 5);
        world.start(3);
        let took = world.run_until(10 * SECOND, World::has_converged);
        assert!(took.is_some_and(|took| took <= SECOND), "{took:?}");
        world.seen.clear();
        world.run(20 * SECOND);
        assert!(world.seen.is_empty(), "no ghost: {:?}", world.seen);
    });
}

#[test]
fn scenario_05_a_disk_that_lost_its_generation_comes_back_above_it_without_a_storm() {
    seeds(6, |seed| {
        let mut world = joined(6, seed);
        world.crash_torn(1);
        world.run(Duration::from_millis(200) * u32::try_from(seed * 7).unwrap());
        world.start(1);
        let before: u64 = world.hosts.iter().map(|host| host.traffic.packets).sum();
        world.run(30 * SECOND);
        let sent = world.hosts.iter().map(|host| host.traffic.packets).sum::<u64>() - before;
        assert!(sent < 30 * 6 * 40, "{sent} packets in 30 s");
        settle(&mut world, 60 * SECOND);
    });
}

#[test]
fn scenario_06_a_stopped_node_is_unrouted_and_back_at_once_and_nobody_else_flaps() {
    seeds(5, |seed| {
        let (gone, back, flapped) = figures::sigstop(20, seed, &Settings::default());
        assert!(gone <= 3 * SECOND, "unrouted after {gone:?}");
        assert!(back <= SECOND, "back after {back:?}");
        assert_eq!(flapped, 0);
    });
}

#[test]
fn scenario_07_two_halves_go_on_and_are_equal_soon_after_the_network_heals() {
    seeds(4, |seed| {
        let (healed, flaps) = figures::split(20, seed, &Settings::default());
        assert!(healed <= 5 * SECOND, "{healed:?}");
        assert_eq!(flaps, 0);
    });
}

#[test]
fn scenario_08_half_return_after_a_power_loss_and_find_each_other_though_the_seed_is_gone() {
    seeds(3, |seed| {
        let mut world = joined(10, seed);
        // Peers are written with the rounds.
        world.run(15 * SECOND);
        (0..10).for_each(|host| world.crash(host));
        world.run(60 * SECOND);
        (5..10).for_each(|host| world.start(host));
        let took = world.run_until(60 * SECOND, World::has_converged);
        assert!(took.is_some_and(|took| took < 30 * SECOND), "{took:?}");
        settle(&mut world, 30 * SECOND);
    });
}

#[test]
fn scenario_09_a_node_cut_off_says_that_it_is_isolated_and_recovers_unaided() {
    seeds(2, |seed| {
        let mut world = joined(8, seed);
        world.split(|host| u8::from(host == 5));
        let isolated = world.run_until(60 * SECOND, |world| world.engine(5).is_isolated());
        assert!(isolated.is_some(), "it says so");
        let others = world.engine(5).membership().members();
        let failed = others.filter(|member| member.status == MemberStatus::Failed).count();
        assert!(failed <= 3, "it says so before it calls everybody else dead: {failed} of 7");
        assert!(!world.engine(0).is_isolated());
        world.run(300 * SECOND);
        world.seen.clear();
        world.heal();
        let took = settle(&mut world, 60 * SECOND);
        assert!(took < 35 * SECOND, "{took:?}");
        let others: BTreeSet<_> = world.seen.iter().filter(|seen| seen.observer != 5).map(|seen| &seen.node).collect();
        assert!(others.iter().all(|node| **node == host::name(5)), "only it came back: {others:?}");
    });
}

#[test]
fn scenario_10_a_leave_is_seen_by_all_at_once() {
    let mut times = Times::default();
    seeds(6, |seed| times.0.extend(figures::leave(20, seed, &Settings::default()).0));
    assert!(times.percentile(99.0) <= SECOND / 2, "{times:?}");
}

#[test]
fn scenario_11_hosts_that_lose_most_of_one_way_do_not_unsettle_the_healthy() {
    seeds(2, |seed| {
        let mut world = joined(30, seed);
        // One way, the one or the other.
        let lossy = if seed % 2 == 0 { &mut world.net.loss_in } else { &mut world.net.loss_out };
        lossy[7] = 0.8;
        world.seen.clear();
        world.run(120 * SECOND);
        let false_ones = world.false_positives(|host, _| host == 7);
        let at_healthy: Vec<_> = false_ones.iter().filter(|(_, observer, _)| *observer != 7).collect();
        assert!(at_healthy.is_empty(), "{at_healthy:?}");
    });
}

#[test]
fn scenario_12_a_joiner_gets_the_whole_catalogue_of_the_living_and_nothing_of_those_that_left() {
    seeds(2, |seed| {
        let mut world = mesh(12, 5, seed, Settings::default());
        world.leave(4);
        world.run(SECOND / 2);
        world.crash(4);
        world.crash(5);
        world.run(10 * SECOND);
        world.add_hosts(1);
        world.start(12);
        settle(&mut world, 30 * SECOND);
        // The dead node's records are held until its lease ends, and shown as failed.
        let engine = world.engine(12);
        assert!(engine.replica().state(&host::name(5)).is_some());
        let mut builder = Builder::new(host::name(12), 1);
        for (name, state) in engine.replica().nodes() {
            builder.set_node(name, Some(state), engine.status_of(name));
        }
        let snapshot = builder.build().unwrap();
        let statuses: Vec<_> = snapshot.nodes.values().map(|node| (node.info.name.to_string(), node.status)).collect();
        assert_eq!(statuses.len(), 12, "{statuses:?}");
        assert!(statuses.contains(&("n5".to_owned(), MemberStatus::Failed)), "{statuses:?}");
        // The lease ends by the wall clock, which may be moved: an hour of idling shows nothing more.
        world.hosts[12].wall_ahead = 3601;
        world.run(8 * SECOND);
        assert!(world.engine(12).replica().state(&host::name(5)).is_none(), "the lease has ended");
    });
}

#[test]
fn scenario_13_two_contents_of_one_document_end_as_the_same_one_everywhere_and_the_fork_is_reported() {
    seeds(2, |seed| {
        let mut world = joined(12, seed);
        world.net.loss = 0.05;
        let mut documents = Documents::new(&mut world);
        let first = documents.sign("stolen", 1, 1, None).to_bytes();
        documents.take(&mut world, 0, &first, true);
        documents.run(&mut world, 10 * SECOND);
        assert!(documents.are_equal() && documents.sets[7].len() == 1, "it reaches all");
        // The operator's key is used on both sides.
        world.split(|host| u8::from(host >= 6));
        documents.run(&mut world, 10 * SECOND);
        let [here, there] = [2, 3].map(|key| documents.sign("stolen", 2, key, None));
        documents.take(&mut world, 0, &here.to_bytes(), true);
        documents.take(&mut world, 11, &there.to_bytes(), true);
        documents.run(&mut world, 20 * SECOND);
        assert!(!documents.are_equal());
        world.heal();
        let took = documents.run_until(&mut world, 60 * SECOND, Documents::are_equal);
        assert!(took.is_some(), "equal again");
        let winner = if here.digest().replaces(&there.digest()) { &here } else { &there };
        for (host, set) in documents.sets.iter().enumerate() {
            let held = set.get(&winner.content().id).map(|held| held.document.hash());
            assert_eq!(held, Some(winner.hash()), "n{host} holds the one with the smaller hash");
            assert_eq!(set.forks().count(), 1, "n{host} reports the fork, whichever side it was on");
        }
    });
}

#[test]
fn scenario_14_what_was_deleted_in_the_dark_does_not_come_back_and_nothing_grows() {
    seeds(2, |seed| {
        let mut world = mesh(8, 3, seed, Settings::default());
        let before: Vec<Sizes> = (0..8).map(|host| world.engine(host).sizes()).collect();
        world.split(|host| u8::from(host >= 4));
        world.run(20 * SECOND);
        let gone = [EntryKey::Service("s1".parse().unwrap()), EntryKey::Check("check-s1".parse().unwrap())];
        gone.iter().for_each(|key| drop(world.hosts[2].records.remove(key)));
        world.publish(2);
        world.run(20 * SECOND);
        world.heal();
        settle(&mut world, 60 * SECOND);
        world.run(20 * SECOND);
        world.assert_settled();
        assert_no_larger(&world, &before);
    });
}

/// Nothing that the agents hold has grown since `before`.
#[track_caller]
fn assert_no_larger(world: &World, before: &[Sizes]) {
    for (host, before) in before.iter().enumerate() {
        let after = world.engine(host).sizes();
        assert!(after.grave_max <= 64 && after.core.timers <= before.core.timers + 64, "{before:?} {after:?}");
        assert_eq!((after.members, after.nodes), (before.members, before.nodes));
        assert_eq!((after.core.news, after.core.suspicions, after.refusals), (0, 0, 0), "{after:?}");
    }
}

#[test]
fn scenario_14_ten_thousand_rounds_of_registering_leave_nothing_behind() {
    let mut world = mesh(4, 1, 1, Settings::default());
    world.run(10 * SECOND);
    let before: Vec<Sizes> = (0..4).map(|host| world.engine(host).sizes()).collect();
    for round in 0..10_000u32 {
        let tag = round.to_string();
        world.register(1, service("w", "churn", &tag));
        world.run(Duration::from_millis(5));
        for key in [EntryKey::Service("w".parse().unwrap()), EntryKey::Check("check-w".parse().unwrap())] {
            world.hosts[1].records.remove(&key);
        }
        world.publish(1);
        world.run(Duration::from_millis(5));
    }
    settle(&mut world, 60 * SECOND);
    world.run(30 * SECOND);
    assert_no_larger(&world, &before);
}

#[test]
fn scenario_15_a_clock_an_hour_back_across_a_restart_keeps_its_name_and_its_records() {
    seeds(2, |seed| {
        let mut world = mesh(6, 2, seed, Settings::default());
        world.crash(3);
        world.hosts[3].wall_ahead = -3600 + 300;
        world.run(2 * SECOND);
        world.start(3);
        world.register(3, service("new", "new", "after-the-jump"));
        settle(&mut world, 30 * SECOND);
        // And in the middle of a run.
        world.hosts[4].wall_ahead = -1800;
        world.register(4, service("late", "late", "x"));
        settle(&mut world, 30 * SECOND);
    });
}

#[test]
fn scenario_16_poison_from_an_insider_is_quarantined_and_the_last_good_word_stands() {
    seeds(2, |seed| {
        let mut world = World::new(seed, Settings::default());
        world.add_hosts(8);
        // Its own replica takes what no other would, and its certificate covers `web` alone.
        world.hosts[5].replica.node_bytes_max = 200_000;
        world.hosts[5].scope = "web".to_owned();
        let good = service("good", "web", "v1");
        world.hosts[5].records.extend(good.clone().map(|entry| (entry.key(), entry)));
        (0..8).for_each(|host| world.start(host));
        assert!(world.run_until(60 * SECOND, |world| world.has_converged() && world.is_equal()).is_some());
        let mut documents = Documents::new(&mut world);
        let good_document = documents.sign("stolen", 1, 1, None).to_bytes();
        documents.take(&mut world, 0, &good_document, true);
        documents.run(&mut world, 10 * SECOND);

        // Signed as they should be: 70 KB of records, a service outside the scope, a document that says nothing.
        world.refusals.clear();
        for number in 0..25 {
            world.register(5, service(&format!("big{number}"), "web", &"x".repeat(2800)));
        }
        let absurd = documents.sign("stolen", 2, 1, Some(vec![0xff; 900])).to_bytes();
        for victim in (0..8).filter(|host| *host != 5) {
            documents.take(&mut world, victim, &absurd, true);
        }
        documents.run(&mut world, 30 * SECOND);
        assert_eq!(documents.refused.len(), 7, "each refuses it: {:?}", documents.refused);
        for host in (0..8).filter(|host| *host != 5) {
            let engine = world.engine(host);
            let state = engine.replica().state(&host::name(5)).expect("the last good state stands");
            assert!(state.services().any(|record| record.id.as_str() == "good"), "n{host}");
            assert!(state.services().map(|record| record.tags[0].len()).sum::<usize>() < 64 * 1024);
            assert!(world.refusals.contains(&(host, host::name(5))), "n{host} says why");
            assert_eq!(documents.sets[host].iter().next().unwrap().document.content().version, 1);
            assert!(documents.sets[host].revocations().has_key(&weft::pki::SpkiHash([1; 32])));
            assert!(engine.sizes().refusals <= 1);
            let status = engine.membership().member(&host::name(5)).unwrap().status;
            assert_eq!(status, MemberStatus::Alive, "its records are refused, it is not");
        }
        // It mends its ways.
        world.hosts[5].records.clear();
        world.register(5, good);
        world.register(5, service("more", "payments", "x"));
        let is_known = |world: &World| {
            (0..8).filter(|host| *host != 5).all(|host| {
                let state = world.engine(host).replica().state(&host::name(5)).unwrap();
                let names: Vec<&str> = state.services().map(|record| record.id.as_str()).collect();
                names == ["good"] && state.withheld().count() > 0
            })
        };
        assert!(world.run_until(30 * SECOND, is_known).is_some(), "the next good state counts, without `payments`");
    });
}

#[test]
fn scenario_17_an_insider_that_speaks_in_anothers_name_changes_nothing() {
    seeds(2, |seed| {
        let mut world = mesh(8, 1, seed, Settings::default());
        // TLS says n8; its engine calls itself n2, from a greater generation.
        let mut liar = host::Host::new(8, vec![scenarios::address_of(0)]);
        liar.poses_as = Some(host::name(2));
        liar.disk.generation = 1000;
        liar.records.extend(service("stolen", "payments", "x").map(|entry| (entry.key(), entry)));
        world.add_host(liar);
        world.seen.clear();
        world.start(8);
        world.run(60 * SECOND);
        for observer in 0..8 {
            let engine = world.engine(observer);
            assert!(
                observer == 2
                    || engine.membership().member(&host::name(2)).unwrap().id == *world.hosts[2].id().unwrap()
            );
            let state = engine.replica().state(&host::name(2)).unwrap();
            assert!(!state.services().any(|record| record.id.as_str() == "stolen"));
            assert_eq!(Engine::sizes(engine).nodes, 8);
            world.assert_bounds(observer);
        }
        let failures = world.seen.iter().filter(|seen| seen.observer != 8 && seen.after == Some(MemberStatus::Failed));
        assert_eq!(failures.count(), 0);
    });
}

#[test]
fn what_no_broadcast_brought_is_healed_by_comparing_within_seconds() {
    seeds(2, |seed| {
        let mut world = mesh(10, 1, seed, Settings::default());
        // Too large for a packet: it is announced, and every pull fails.
        world.settings.has_exchanges = false;
        world.register(4, service("big", "big", &"x".repeat(4000)));
        assert!(world.run_until(10 * SECOND, World::is_equal).is_none(), "nothing else heals it");
        world.settings.has_exchanges = true;
        let took = world.run_until(60 * SECOND, World::is_equal);
        assert!(took.is_some_and(|took| took <= 5 * SECOND), "{took:?}");
    });
}

#[test]
fn a_registration_and_a_kill_are_known_everywhere_in_time() {
    seeds(3, |seed| {
        let mut world = mesh(20, 1, seed, Settings::default());
        world.net.loss = 0.01;
        let times = scenarios::register(&mut world);
        assert!(times.percentile(90.0) <= Duration::from_millis(500), "{times:?}");
        world.net.loss = 0.0;
        let times = scenarios::kill(&mut world);
        assert!(times.max() <= 4 * SECOND, "{times:?}");
    });
}

/// Simulations of 10,000 agents stand on it: hosts would else tell each other of everybody, which no memory holds.
#[test]
fn who_knows_a_part_of_a_mesh_goes_on_knowing_that_part_and_sees_ends_in_it() {
    seeds(2, |seed| {
        let mut world = World::preloaded(600, Some(120), seed, Settings::default());
        world.seen.clear();
        world.run(10 * SECOND);
        assert!(world.seen.is_empty(), "nobody meets anybody: {:?}", world.seen.first());
        let times = scenarios::register_at(&mut world, Some(0));
        assert!(times.percentile(99.0) <= SECOND, "{times:?}");
        let times = scenarios::kill(&mut world);
        assert!(times.max() <= 5 * SECOND, "{times:?}");
    });
}

//! A seeded simulation of many cores over a network that loses, delays and splits, in virtual time.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::model::Generation;

/// What happened at a node, for the assertions.
type Log = Vec<(Duration, NodeName, NodeName, Option<MemberStatus>)>;

struct Mesh {
    start: Instant,
    now: Instant,
    rng: StdRng,
    nodes: BTreeMap<NodeName, Core>,
    flights: BTreeMap<(Instant, u64), (NodeName, MeshId, Bytes)>,
    flight_number: u64,
    loss: f64,
    /// Nodes on the far side; packets between the sides are lost.
    split: BTreeSet<NodeName>,
    log: Log,
    received: BTreeMap<NodeName, BTreeSet<u64>>,
}

fn name(number: usize) -> NodeName {
    format!("n{number}").parse().unwrap()
}

fn id(number: usize, generation: u64) -> MeshId {
    let addr = format!("10.0.{}.{}:8301", number / 250, number % 250 + 1).parse().unwrap();
    MeshId::new(name(number), addr, Generation { number: generation, nonce: 1 })
}

impl Mesh {
    fn new(count: usize, seed: u64) -> Self {
        let start = crate::clock::now();
        let mut mesh = Self {
            start,
            now: start,
            rng: StdRng::seed_from_u64(seed),
            nodes: BTreeMap::new(),
            flights: BTreeMap::new(),
            flight_number: 0,
            loss: 0.0,
            split: BTreeSet::new(),
            log: Vec::new(),
            received: BTreeMap::new(),
        };
        for number in 0..count {
            mesh.boot(number, 1);
        }
        mesh
    }

    fn boot(&mut self, number: usize, generation: u64) {
        let seed = self.rng.random();
        let mut core = Core::new(id(number, generation), Profile::default(), seed, self.now);
        if number != 0 {
            let target = self.nodes.get(&name(0)).map_or_else(|| id(0, 1), |seed| seed.id().clone());
            core.announce(target, self.now);
        }
        self.nodes.insert(name(number), core);
        self.flush(&name(number));
    }

    fn flush(&mut self, at: &NodeName) {
        let Some(core) = self.nodes.get_mut(at) else { return };
        let mut again = Vec::new();
        while let Some(output) = core.poll_output() {
            match output {
                Output::Send { to, packet } => {
                    assert!(packet.len() <= PACKET_BYTES_MAX);
                    let delay = Duration::from_millis(self.rng.random_range(1..30));
                    self.flight_number += 1;
                    if !self.rng.random_bool(self.loss) {
                        self.flights.insert((self.now + delay, self.flight_number), (at.clone(), to, packet));
                    }
                }
                Output::Changed { node, after, .. } => {
                    self.log.push((self.now - self.start, at.clone(), node, after));
                }
                Output::Received { broadcast: Broadcast::IHave { node, generation, version, hash }, .. } => {
                    if self.received.entry(at.clone()).or_default().insert(version) {
                        again.push(Broadcast::IHave { node, generation, version, hash });
                    }
                }
                Output::Received { .. } | Output::Conflict { .. } | Output::Renewed(_) => {}
            }
        }
        for broadcast in again {
            let now = self.now;
            self.nodes.get_mut(at).unwrap().broadcast(&broadcast, now);
        }
    }

    /// Runs until `done` or until `limit` has passed; returns how long it took.
    fn run(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (begin, end) = (self.now, self.now + limit);
        while !done(self) {
            let timer = self.nodes.iter().map(|(name, core)| (core.poll_timeout(), name.clone())).min();
            let flight = self.flights.first_key_value().map(|(key, _)| key.0);
            let (timer_at, at) = timer?;
            let next = flight.map_or(timer_at, |flight_at| flight_at.min(timer_at));
            if next > end {
                self.now = end;
                return None;
            }
            self.now = self.now.max(next);
            let node = if flight.is_some_and(|flight_at| flight_at <= timer_at) {
                let (_, (from, to, packet)) = self.flights.pop_first().unwrap();
                let is_cut = self.split.contains(&from) != self.split.contains(&to.name);
                match self.nodes.get_mut(&to.name).filter(|_| !is_cut) {
                    Some(core) => core.handle_packet(&from, &packet, self.now).unwrap(),
                    None => continue,
                }
                to.name
            } else {
                self.nodes.get_mut(&at).unwrap().handle_timeout(self.now);
                at
            };
            self.flush(&node);
        }
        Some(self.now - begin)
    }

    fn all_see(&self, of: usize, status: Option<MemberStatus>) -> bool {
        let others = self.nodes.iter().filter(|(at, _)| **at != name(of));
        others.map(|(_, core)| core.member(&name(of)).map(|member| member.status)).all(|seen| seen == status)
    }

    fn all_alive(&self) -> bool {
        let count = self.nodes.len();
        self.nodes.values().all(|core| core.alive_count() + 1 == count)
            && self
                .nodes
                .values()
                .flat_map(Core::members)
                .all(|member| self.nodes.get(&member.id.name).is_none_or(|core| *core.id() == member.id))
    }

    fn joined(count: usize, seed: u64) -> Self {
        let mut mesh = Self::new(count, seed);
        mesh.run(Duration::from_mins(1), Self::all_alive).expect("the join converges");
        mesh
    }
}

/// Runs `test` with many seeds and names the one that fails.
fn seeds(count: u64, test: impl Fn(u64) + std::panic::RefUnwindSafe) {
    for seed in 0..count {
        if let Err(panic) = std::panic::catch_unwind(|| test(seed)) {
            eprintln!("the simulation failed with seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_join_converges_within_seconds_though_packets_are_lost() {
    seeds(20, |seed| {
        let mut mesh = Mesh::new(12, seed);
        mesh.loss = 0.02;
        let took = mesh.run(40 * SECOND, Mesh::all_alive);
        // A lost announce is retried by the actor, on a stream; here the announce of a moment later stands for it.
        if took.is_none() {
            for number in 1..12 {
                let (now, to) = (mesh.now, mesh.nodes.get(&name(0)).unwrap().id().clone());
                mesh.nodes.get_mut(&name(number)).unwrap().announce(to, now);
                mesh.flush(&name(number));
            }
            assert!(mesh.run(40 * SECOND, Mesh::all_alive).is_some());
        }
    });
}

#[test]
fn a_crash_is_seen_by_all_within_five_seconds() {
    // With more members a probe round takes longer than the time that one prober needs.
    for (count, limit) in [(3, 5 * SECOND), (10, 6 * SECOND)] {
        seeds(60, |seed| {
            let mut mesh = Mesh::joined(count, seed);
            let idle = Duration::from_millis(mesh.rng.random_range(0..3000));
            mesh.run(idle, |_| false);
            mesh.nodes.remove(&name(2));
            let took = mesh.run(10 * SECOND, |mesh| mesh.all_see(2, Some(MemberStatus::Failed)));
            assert!(took.is_some_and(|took| took < limit), "{count} nodes: {took:?}");
        });
    }
}

#[test]
fn a_partition_of_a_minute_heals_and_no_third_party_flaps() {
    for (count, far) in [(6, 3), (5, 1), (3, 1)] {
        seeds(20, |seed| {
            let mut mesh = Mesh::joined(count, seed);
            mesh.split = (0..far).map(name).collect();
            mesh.run(60 * SECOND, |_| false);
            for (at, core) in &mesh.nodes {
                let side = if mesh.split.contains(at) { far } else { count - far };
                assert_eq!(core.alive_count() + 1, side, "{at} sees its own side");
            }
            let far_side = std::mem::take(&mut mesh.split);
            mesh.log.clear();
            let took = mesh.run(30 * SECOND, Mesh::all_alive);
            assert!(took.is_some(), "{count}/{far} heals");
            mesh.run(10 * SECOND, |_| false);
            let flap = mesh.log.iter().find(|(_, at, of, after)| {
                *after == Some(MemberStatus::Failed) && far_side.contains(at) == far_side.contains(of)
            });
            assert_eq!(flap, None, "{count}/{far}");
            assert!(mesh.all_alive());
        });
    }
}

#[test]
fn a_restart_is_one_live_identity_at_once() {
    seeds(30, |seed| {
        let mut mesh = Mesh::joined(5, seed);
        mesh.nodes.remove(&name(3));
        let pause = Duration::from_millis(mesh.rng.random_range(0..6000));
        mesh.run(pause, |_| false);
        mesh.boot(3, 2);
        let took = mesh.run(10 * SECOND, Mesh::all_alive);
        assert!(took.is_some_and(|took| took < 2 * SECOND), "{took:?}");
        mesh.log.clear();
        mesh.run(20 * SECOND, |_| false);
        assert!(mesh.all_alive(), "no ghost of the old life");
        assert!(mesh.log.is_empty(), "{:?}", mesh.log);
    });
}

#[test]
fn a_leave_is_seen_by_all_at_once_and_is_not_a_failure() {
    seeds(20, |seed| {
        let mut mesh = Mesh::joined(10, seed);
        let now = mesh.now;
        mesh.nodes.get_mut(&name(4)).unwrap().leave(now);
        mesh.flush(&name(4));
        let took = mesh.run(5 * SECOND, |mesh| mesh.all_see(4, Some(MemberStatus::Left)));
        assert!(took.is_some_and(|took| took < SECOND / 2), "{took:?}");
        assert!(mesh.log.iter().all(|(_, _, _, after)| *after != Some(MemberStatus::Failed)));
        // It comes back with the next start.
        mesh.nodes.remove(&name(4));
        mesh.boot(4, 2);
        assert!(mesh.run(5 * SECOND, Mesh::all_alive).is_some());
    });
}

#[test]
fn a_broadcast_reaches_nearly_all_within_a_second() {
    seeds(20, |seed| {
        let mut mesh = Mesh::joined(20, seed);
        let (now, own) = (mesh.now, mesh.nodes.get(&name(1)).unwrap().id().clone());
        let item = Broadcast::IHave { node: own.name, generation: own.life.generation, version: 7, hash: 0 };
        assert!(mesh.nodes.get_mut(&name(1)).unwrap().broadcast(&item, now));
        mesh.flush(&name(1));
        mesh.run(SECOND, |mesh| mesh.received.len() >= 19);
        // The rest is repaired by anti-entropy.
        assert!(mesh.received.len() >= 18, "{}", mesh.received.len());
    });
}

#[test]
fn a_failed_member_is_made_to_leave_and_a_live_one_refutes_it() {
    let mut mesh = Mesh::joined(4, 1);
    let (now, at) = (mesh.now, name(1));
    let refused = mesh.nodes.get_mut(&at).unwrap().force_leave(&name(3), false, now);
    assert_eq!(refused, Err(ForceLeaveError::Alive));
    mesh.split = [name(3)].into();
    mesh.run(10 * SECOND, |mesh| mesh.nodes.get(&name(1)).unwrap().alive_count() == 2);
    let now = mesh.now;
    mesh.nodes.get_mut(&at).unwrap().force_leave(&name(3), false, now).unwrap();
    mesh.flush(&at);
    let has_left = |mesh: &Mesh| {
        let status = |at: usize| mesh.nodes.get(&name(at)).unwrap().member(&name(3)).unwrap().status;
        (0..3).all(|at| status(at) == MemberStatus::Left)
    };
    assert!(mesh.run(5 * SECOND, has_left).is_some());
    // It was only cut off. Nobody calls it back, so it announces itself, as its actor does while it is alone.
    mesh.split.clear();
    let (now, to) = (mesh.now, mesh.nodes.get(&name(0)).unwrap().id().clone());
    mesh.nodes.get_mut(&name(3)).unwrap().announce(to, now);
    mesh.flush(&name(3));
    assert!(mesh.run(20 * SECOND, Mesh::all_alive).is_some());
    assert!(mesh.all_see(3, Some(MemberStatus::Alive)));
}

#[test]
fn a_packet_from_another_than_its_header_names_is_refused() {
    let now = crate::clock::now();
    let mut victim = Core::new(id(0, 1), Profile::default(), 1, now);
    let mut honest = Core::new(id(1, 1), Profile::default(), 2, now);
    honest.announce(id(0, 1), now);
    let Some(Output::Send { packet, .. }) = honest.poll_output() else { panic!("an announce") };
    assert_eq!(victim.handle_packet(&name(2), &packet, now), Err(Refused::Sender));
    assert_eq!(victim.alive_count(), 0);
    assert_eq!(victim.handle_packet(&name(1), &[0; 1101], now), Err(Refused::TooLarge));
    assert_eq!(victim.handle_packet(&name(1), b"garbage", now), Err(Refused::Malformed));

    let mut twin = Core::new(id(0, 2), Profile::default(), 3, now);
    twin.announce(id(1, 1), now);
    let Some(Output::Send { packet, .. }) = twin.poll_output() else { panic!("an announce") };
    assert_eq!(victim.handle_packet(&name(0), &packet, now), Err(Refused::OwnName));
    assert_eq!(victim.poll_output(), Some(Output::Conflict { theirs: id(0, 2) }));

    assert_eq!(
        victim.handle_packet(
            &name(1),
            &{
                honest.announce(id(0, 1), now);
                let Some(Output::Send { packet, .. }) = honest.poll_output() else { panic!("an announce") };
                packet
            },
            now
        ),
        Ok(())
    );
    assert_eq!(victim.alive_count(), 1);
}

#[test]
fn a_newer_claim_to_the_own_name_is_reported_and_goes_no_further() {
    let now = crate::clock::now();
    let mut core = Core::new(id(0, 1), Profile::default(), 1, now);
    let twin = MemberEntry { id: id(0, 9), incarnation: 0, standing: Standing::Alive };
    core.learn(vec![twin], now);
    assert_eq!(core.poll_output(), Some(Output::Conflict { theirs: id(0, 9) }));
    assert_eq!(core.members().count(), 0);
    core.outlive(id(0, 9).life, now);
    assert_eq!(core.id().life.generation.number, 10);
}

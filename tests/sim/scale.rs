//! Large meshes that exist at once: everybody knows everybody from the start, and no replica holds all.

use weft::gossip::engine::{JoinCause, JoinOutcome, Message, Request, Stage, Step, Welcomed};
use weft::membership::MeshId;
use weft::replica::Digest;

use super::world::{Settings, World};

impl World {
    /// Makes `count` hosts that know each other, without the hours of a real start: at 10,000 hosts the members alone are
    /// 10^8 entries. Replicas hold the own records and those of the first host, whose registrations can be followed.
    pub(crate) fn preloaded(count: usize, seed: u64, settings: Settings) -> Self {
        let mut world = Self::new(seed, settings);
        world.add_hosts(count);
        for host in 0..count {
            world.hosts[host].seeds.clear();
            world.start(host);
        }
        let ids: Vec<MeshId> = (0..count).map(|host| world.hosts[host].id().expect("it runs").clone()).collect();
        let ask = Message::Request(Request::Pull(vec![Digest::none(world.hosts[0].name.clone())]));
        let name = world.hosts[0].name.clone();
        let whole = world.turn(0, |engine, turn| engine.handle_message(&name, Stage::Asked, ask, turn));
        let Some(Step::Last(Message::Deltas(whole))) = whole else { panic!("a pull is answered") };
        for host in 0..count {
            let neighbour = ids[(host + 1) % count].clone();
            let joined = vec![Welcomed { id: neighbour, members: Vec::new(), farewells: Vec::new() }];
            let outcome = JoinOutcome { joined, ..JoinOutcome::default() };
            world.turn(host, |engine, turn| {
                engine.vouch_for(&ids, turn);
                engine.handle_joined(JoinCause::Order, outcome, turn);
                engine.handle_message(&name, Stage::Taking, Message::Deltas(whole.clone()), turn);
            });
            if count >= 5000 && host % 1000 == 999 {
                eprintln!("{} of {count} hosts know all", host + 1);
            }
        }
        world
    }
}

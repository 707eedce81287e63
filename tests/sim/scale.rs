//! Large meshes that exist at once: everybody knows everybody from the start, and no replica holds all.

use std::collections::BTreeSet;

use rand::RngExt as _;
use weft::gossip::engine::{JoinCause, JoinOutcome, Message, Request, Stage, Step, Welcomed};
use weft::membership::LifeClaim;
use weft::replica::Digest;

use super::world::{Settings, World};

/// Hosts that everybody knows: those whose ends are watched and whose registrations are followed.
const COMMON: usize = 32;
/// Those before each of them on the ring, whom everybody knows as well: they watch it and say when it is gone, and nobody
/// takes the word of an accuser that it does not know (`membership::inbound`). As `membership::ring`.
const WATCHERS: usize = 2;
/// Neighbours on the ring of watchers that a partial view holds, on each side.
const NEIGHBOURS: usize = 4;

/// The place of a host on the ring of watchers, as `membership::ring` has it: a partial view must hold the true neighbours.
fn place(world: &World, host: usize) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = world.hosts[host].name.as_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix);
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

impl World {
    /// Makes `count` hosts that know each other, without the hours of a real start. Replicas hold the own records and
    /// those of the first host, whose registrations can be followed.
    ///
    /// With a `view`, each knows its neighbours on the ring, [`COMMON`] hosts that all know with the [`WATCHERS`] of each, and so
    /// many random others: at 10,000 hosts the members alone would be 10^8 entries. An agent has no such view: it knows
    /// everybody. Probes and gossip go to random members either way. What of an accusation depends on knowing the accuser is
    /// true to life for the common hosts alone, so only their ends are measured; the second looks of others than the watchers
    /// (`membership::detect`) are lost on who does not know them, and so are the looks that unequal sums over lives ask for
    /// ([`World::has_partial_views`]), which makes the mesh here a little slower, never faster.
    pub(crate) fn preloaded(count: usize, view: Option<usize>, seed: u64, settings: Settings) -> Self {
        let mut world = Self::new(seed, Settings { has_syncs: false, ..settings });
        world.has_partial_views = view.is_some_and(|view| view < count);
        world.add_hosts(count);
        for host in 0..count {
            world.hosts[host].seeds.clear();
            world.start(host);
        }
        let word = |host: usize| world.hosts[host].process.as_ref()?.engine.membership().own_word().cloned();
        let words: Vec<LifeClaim> = (0..count).map(|host| word(host).expect("it runs and has signed")).collect();
        let mut ring: Vec<usize> = (0..count).collect();
        ring.sort_by_key(|host| place(&world, *host));
        let mut at_ring = vec![0; count];
        ring.iter().enumerate().for_each(|(at, host)| at_ring[*host] = at);
        let before = |host: usize, step: usize| ring[(at_ring[host] + count - step) % count];
        let common: BTreeSet<usize> = (0..COMMON.min(count))
            .flat_map(|host| (0..=WATCHERS.min(count - 1)).map(move |step| (host, step)))
            .map(|(host, step)| before(host, step))
            .collect();
        let name = world.hosts[0].name.clone();
        let ask = Message::Request(Request::Pull(vec![Digest::none(name.clone())]));
        let whole = world.turn(0, |engine, turn| engine.handle_message(&name, Stage::Asked, ask, turn));
        let Some(Step::Last(Message::Deltas(whole))) = whole else { panic!("a pull is answered") };
        let mut known: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); count];
        for host in 0..count {
            let chosen: Vec<usize> = match view.filter(|view| *view < count) {
                None => (0..count).collect(),
                Some(view) => {
                    let near =
                        (0..=2 * NEIGHBOURS).map(|step| ring[(at_ring[host] + count + step - NEIGHBOURS) % count]);
                    let near: Vec<usize> = near.chain(common.iter().copied()).collect();
                    // Both ways: each is chosen by as many as it chooses.
                    let random = (0..view / 2).map(|_| world.rng.random_range(0..count));
                    near.into_iter().chain(random).collect()
                }
            };
            for other in chosen.into_iter().filter(|other| *other != host) {
                known[host].insert(other);
                known[other].insert(host);
            }
        }
        for (host, known) in known.into_iter().enumerate() {
            let neighbour = words[ring[(at_ring[host] + 1) % count]].id.clone();
            let joined = vec![Welcomed { id: neighbour, members: Vec::new(), farewells: Vec::new() }];
            let outcome = JoinOutcome { joined, ..JoinOutcome::default() };
            let known = known.into_iter().map(|other| &words[other]);
            world.turn(host, |engine, turn| {
                engine.vouch_with(known, turn);
                engine.handle_joined(JoinCause::Order, outcome, turn);
                engine.handle_message(&name, Stage::Taking, Message::Deltas(whole.clone()), turn);
            });
        }
        world
    }
}

//! A seeded simulation of many cores over a network that loses, delays and splits, in virtual time.
//!
//! Signatures are stand-ins: a hash of signer and message, which only the simulation's owner of a node makes.

mod detection;
mod lies;
mod mesh;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;

use bytes::Bytes;

use super::health::UNREST_SPAN;
use super::*;
use crate::model::{Demand, Generation};

/// What happened at a node, for the assertions.
type Log = Vec<(Duration, NodeName, NodeName, Option<MemberStatus>)>;

struct Mesh {
    start: Instant,
    now: Instant,
    rng: StdRng,
    profile: Profile,
    nodes: BTreeMap<NodeName, Core>,
    wakes: BTreeSet<(Instant, NodeName)>,
    wake_of: BTreeMap<NodeName, Instant>,
    flights: BTreeMap<(Instant, u64), (NodeName, MeshId, Bytes)>,
    flight_number: u64,
    /// How long a packet takes, in milliseconds.
    delay_ms: Range<u64>,
    loss: f64,
    /// Share of packets that do not reach a node.
    deaf: BTreeMap<NodeName, f64>,
    /// Nodes on the far side; packets between the sides are lost.
    split: BTreeSet<NodeName>,
    /// Stopped nodes with what waits in their sockets.
    paused: BTreeMap<NodeName, Vec<(NodeName, Bytes)>>,
    /// Hosts that say "refused" when they are asked for the port of an agent that is gone.
    refuses: BTreeSet<NodeName>,
    /// Refusals on their way: to whom, whose.
    refusals: BTreeMap<(Instant, u64), (NodeName, NodeName)>,
    log: Log,
    received: BTreeMap<NodeName, BTreeSet<u64>>,
    /// Who heard of whose demand.
    demands: BTreeMap<(NodeName, NodeName), Demand>,
    differs: usize,
    bytes: u64,
    /// Between whom connections lead, from the first packet that arrived on.
    links: BTreeMap<NodeName, BTreeSet<NodeName>>,
}

fn name(number: usize) -> NodeName {
    format!("n{number}").parse().unwrap()
}

fn id(number: usize, generation: u64) -> MeshId {
    let addr = format!("10.0.{}.{}:8301", number / 250, number % 250 + 1).parse().unwrap();
    MeshId::new(name(number), addr, Generation { number: generation, nonce: 1 })
}

fn signature(signer: &NodeName, statement: &Statement) -> Vec<u8> {
    let mut hasher = DefaultHasher::new();
    (signer.as_str(), statement.message().unwrap()).hash(&mut hasher);
    hasher.finish().to_be_bytes().repeat(9)
}

/// What the owner of node `at` would answer.
fn signed(at: &NodeName, statement: Statement) -> Statement {
    let signature = signature(at, &statement);
    statement.with_signature(signature)
}

fn verdict(statement: &Statement) -> Verdict {
    let holds = statement.signature() == signature(statement.signer(), statement);
    if holds { Verdict::Holds } else { Verdict::Broken }
}

impl Mesh {
    fn new(count: usize, seed: u64) -> Self {
        Self::with(count, seed, Profile::default())
    }

    fn with(count: usize, seed: u64, profile: Profile) -> Self {
        let start = crate::clock::now();
        let mut mesh = Self {
            start,
            now: start,
            rng: StdRng::seed_from_u64(seed),
            profile,
            nodes: BTreeMap::new(),
            wakes: BTreeSet::new(),
            wake_of: BTreeMap::new(),
            flights: BTreeMap::new(),
            flight_number: 0,
            delay_ms: 1..30,
            loss: 0.0,
            deaf: BTreeMap::new(),
            split: BTreeSet::new(),
            paused: BTreeMap::new(),
            refuses: BTreeSet::new(),
            refusals: BTreeMap::new(),
            log: Vec::new(),
            received: BTreeMap::new(),
            demands: BTreeMap::new(),
            differs: 0,
            bytes: 0,
            links: BTreeMap::new(),
        };
        for number in 0..count {
            mesh.boot(number, 1);
        }
        mesh
    }

    /// Starts a node. It says hello to the first one and gets the members and their signed records from it.
    fn boot(&mut self, number: usize, generation: u64) {
        let (seed, now) = (self.rng.random(), self.now);
        let mut core = Core::new(id(number, generation), self.profile.clone(), seed, now);
        if number != 0
            && let Some(seed) = self.nodes.get(&name(0))
        {
            let entries = seed.entries(usize::MAX);
            core.meet(seed.id(), now);
            core.learn(entries.clone(), now);
            let living = entries.iter().filter(|entry| entry.standing != Standing::Down);
            for entry in living.filter(|entry| entry.id.name != name(number)) {
                let life = Life { renewals: 0, ..entry.id.life };
                core.attest(&MeshId::with_life(entry.id.name.clone(), entry.id.addr, life), now);
            }
            core.announce(seed.id().clone(), now);
        }
        self.nodes.insert(name(number), core);
        self.flush(&name(number));
    }

    fn kill(&mut self, number: usize) {
        self.nodes.remove(&name(number));
        self.links.remove(&name(number));
        for linked in self.links.values_mut() {
            linked.remove(&name(number));
        }
        if let Some(at) = self.wake_of.remove(&name(number)) {
            self.wakes.remove(&(at, name(number)));
        }
    }

    /// Kills a node whose host refuses the port. Only who asks the port hears of it, as in the agent: its watchers do,
    /// each beat, in turn (`gossip::actor::beat`). The others are answered if the host still answers (`is_generous`): hosts send few refusals.
    fn kill_refused(&mut self, number: usize, is_generous: bool) {
        self.kill(number);
        let watches = |core: &Core| core.watched().iter().any(|id| id.name == name(number));
        let watchers: Vec<NodeName> =
            self.nodes.iter().filter(|(_, core)| watches(core)).map(|(at, _)| at.clone()).collect();
        let first = self.rng.random_range(0..550);
        for (watcher, turn) in watchers.into_iter().zip(0..) {
            self.refuse(&watcher, &name(number), Duration::from_millis((first + turn * 275) % 550));
        }
        if is_generous {
            self.refuses.insert(name(number));
        }
    }

    /// Lets `to` hear that the port of `of` is refused, twice, when it has asked `after` from now.
    fn refuse(&mut self, to: &NodeName, of: &NodeName, after: Duration) {
        self.flight_number += 1;
        let at = self.now + after + Duration::from_millis(27);
        self.refusals.insert((at, self.flight_number), (to.clone(), of.clone()));
    }

    fn at(&mut self, number: usize) -> &mut Core {
        self.nodes.get_mut(&name(number)).unwrap()
    }

    fn flush(&mut self, at: &NodeName) {
        let now = self.now;
        let Some(core) = self.nodes.get_mut(at) else { return };
        let (mut again, mut asked) = (Vec::new(), Vec::new());
        while let Some(output) = core.poll_output() {
            match output {
                Output::Send { to, packet } => {
                    assert!(packet.len() <= PACKET_BYTES_MAX);
                    self.bytes += packet.len() as u64;
                    let delay = Duration::from_millis(self.rng.random_range(self.delay_ms.clone()));
                    self.flight_number += 1;
                    let deaf = self.deaf.get(&to.name).copied().unwrap_or(0.0);
                    if !self.rng.random_bool(self.loss) && !self.rng.random_bool(deaf) {
                        self.flights.insert((now + delay, self.flight_number), (at.clone(), to, packet));
                    }
                }
                Output::Changed { node, after, .. } => {
                    self.log.push((now - self.start, at.clone(), node, after));
                }
                Output::Received { broadcast: Broadcast::IHave { node, generation, version, hash }, .. } => {
                    if self.received.entry(at.clone()).or_default().insert(version) {
                        again.push(Broadcast::IHave { node, generation, version, hash });
                    }
                }
                Output::Sign(statement) => core.handle_signed(&signed(at, statement), now),
                Output::Verify(statement) => {
                    let verdict = verdict(&statement);
                    core.handle_verified(statement, verdict, now);
                }
                Output::AskPort(id) => asked.push(id.name),
                Output::Differs { .. } => self.differs += 1,
                Output::Demand { node, demand } => drop(self.demands.insert((at.clone(), node), demand)),
                Output::Received { .. } | Output::Conflict { .. } | Output::Renewed(_) => {}
            }
        }
        for broadcast in &again {
            core.broadcast(broadcast, now);
        }
        for of in asked.iter().filter(|of| self.refuses.contains(*of)).cloned().collect::<Vec<_>>() {
            self.refuse(at, &of, Duration::ZERO);
        }
        if !again.is_empty() {
            return self.flush(at);
        }
        let Some(core) = self.nodes.get(at) else { return };
        let wake = core.poll_timeout();
        if let Some(before) = self.wake_of.insert(at.clone(), wake) {
            self.wakes.remove(&(before, at.clone()));
        }
        if !self.paused.contains_key(at) {
            self.wakes.insert((wake, at.clone()));
        }
    }

    /// Stops a node: its timers stand still, its socket fills.
    fn pause(&mut self, number: usize) {
        let at = name(number);
        if let Some(wake) = self.wake_of.get(&at) {
            self.wakes.remove(&(*wake, at.clone()));
        }
        self.paused.insert(at, Vec::new());
    }

    /// Lets a node go on; the worst owner would run its timers before it reads its socket.
    fn resume(&mut self, number: usize, reads_first: bool) {
        let at = name(number);
        let inbox = self.paused.remove(&at).unwrap();
        let now = self.now;
        if !reads_first {
            self.at(number).handle_timeout(now);
            self.flush(&at);
        }
        for (from, packet) in inbox {
            let _refused = self.at(number).handle_packet(&from, &packet, now);
            self.flush(&at);
        }
        self.flush(&at);
    }

    fn deliver(&mut self, from: &NodeName, to: &MeshId, packet: Bytes) {
        if self.split.contains(from) != self.split.contains(&to.name) {
            return;
        }
        if let Some(inbox) = self.paused.get_mut(&to.name) {
            inbox.push((from.clone(), packet));
            return;
        }
        let now = self.now;
        if self.nodes.contains_key(&to.name) {
            self.link(from, &to.name);
        }
        if let Some(core) = self.nodes.get_mut(&to.name) {
            core.handle_packet(from, &packet, now).unwrap();
            self.flush(&to.name);
        }
    }

    /// Notes that a connection leads from one to the other, and back.
    fn link(&mut self, one: &NodeName, other: &NodeName) {
        if self.links.get(one).is_some_and(|linked| linked.contains(other)) {
            return;
        }
        for (at, peer) in [(one, other), (other, one)] {
            let linked = self.links.entry(at.clone()).or_default();
            linked.insert(peer.clone());
            if let Some(core) = self.nodes.get_mut(at) {
                core.set_linked(linked.clone());
            }
        }
    }

    /// Runs until `done` or until `limit` has passed; returns how long it took.
    fn run(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (begin, end) = (self.now, self.now + limit);
        while !done(self) {
            let timer = self.wakes.first().map(|(at, _)| *at);
            let flight = self.flights.first_key_value().map(|(key, _)| key.0);
            let refusal = self.refusals.first_key_value().map(|(key, _)| key.0);
            let next = [timer, flight, refusal].into_iter().flatten().min()?;
            if next > end {
                self.now = end;
                return None;
            }
            self.now = self.now.max(next);
            if flight.is_some_and(|at| Some(at) == Some(next)) {
                let (_, (from, to, packet)) = self.flights.pop_first().unwrap();
                self.deliver(&from, &to, packet);
            } else if refusal.is_some_and(|at| at == next) {
                let (_, (to, of)) = self.refusals.pop_first().unwrap();
                let now = self.now;
                if let Some(core) = self.nodes.get_mut(&to) {
                    core.evidence_crashed(&of, now);
                }
                self.flush(&to);
            } else {
                let (_, at) = self.wakes.pop_first().unwrap();
                let now = self.now;
                self.nodes.get_mut(&at).unwrap().handle_timeout(now);
                self.flush(&at);
            }
        }
        Some(self.now - begin)
    }

    fn pass(&mut self, time: Duration) {
        self.run(time, |_| false);
    }

    fn all_see(&self, of: usize, status: Option<MemberStatus>) -> bool {
        let others = self.nodes.iter().filter(|(at, _)| **at != name(of) && !self.paused.contains_key(*at));
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
        Self::joined_with(count, seed, Profile::default())
    }

    fn joined_with(count: usize, seed: u64, profile: Profile) -> Self {
        let mut mesh = Self::with(count, seed, profile);
        mesh.run(Duration::from_mins(1), Self::all_alive).expect("the join converges");
        // Until the newcomers are unrest no more.
        mesh.pass(UNREST_SPAN);
        mesh.log.clear();
        mesh
    }

    /// Returns the first time that somebody took `of` for failed.
    fn failures(&self) -> impl Iterator<Item = &(Duration, NodeName, NodeName, Option<MemberStatus>)> {
        self.log.iter().filter(|(_, _, _, after)| *after == Some(MemberStatus::Failed))
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

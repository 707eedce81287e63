//! The event loop: virtual time, hosts, what an engine wants carried out, faults by hand.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;
use weft::clock::UnixSeconds;
use weft::gossip::engine::{self, Engine, JoinCause, Output, Turn};
use weft::membership::{MeshId, Profile};
use weft::model::{Entry, MemberStatus, NodeName};
use weft::store::StoredPeer;

use super::host::{self, Host, Process};
use super::links::Connection;
use super::net::Net;
use super::processor::{Machine, Turns};
use super::streams::{Joining, Side, Talk};
use super::trust::{CHAIN_BYTES, Verifier};

/// The true wall time at the start of every run.
pub(crate) const WALL: u64 = 1_800_000_000;
/// Datagrams that a stopped process's socket holds: weft asks for 2 MiB, Linux grants some 200 KiB by default.
const INBOX_MAX: usize = 256;
/// The time that a write to disk takes until it is synced.
const SYNC_TIME: Duration = Duration::from_millis(20);

/// What a run is like.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) profile: Profile,
    pub(crate) sync_interval: Duration,
    /// Whether there are streams: without them nothing is compared or pulled, and the replicas stay small.
    pub(crate) has_exchanges: bool,
    /// Whether replicas are compared: without it each holds what broadcasts brought.
    pub(crate) has_syncs: bool,
    /// Size of each node's certificates.
    pub(crate) chain_bytes: usize,
    /// Most events that a failure prints, the last ones.
    pub(crate) events_kept: usize,
    /// The machine that all hosts are on; none: each has all the time that it needs.
    pub(crate) machine: Option<Machine>,
    /// What a UDP datagram costs a real agent beside its engine, sent and received: QUIC and the kernel. It goes into the
    /// figures of an idle agent's CPU, nowhere else.
    pub(crate) packet_cost: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            sync_interval: weft::gossip::SYNC_INTERVAL,
            has_exchanges: true,
            has_syncs: true,
            chain_bytes: CHAIN_BYTES,
            events_kept: 80,
            machine: None,
            packet_cost: None,
        }
    }
}

/// What happens at a moment.
#[derive(Debug)]
pub(crate) enum Event {
    Wake { host: usize, boot: u32 },
    Packet { from: usize, to: usize, connection: Connection, packet: Bytes },
    Dialled { from: usize, boot: u32, peer: usize, addr: SocketAddr, begun: Duration },
    ConnectionLost { host: usize, peer: usize, number: u64 },
    Frame { talk: u64, stream: u32, to: Side, bytes: Vec<u8> },
    StreamTimeout { talk: u64, stream: u32 },
    JoinDialled { attempt: u64, addr: SocketAddr, begun: Duration },
    JoinEnough { attempt: u64 },
    Synced { host: usize, boot: u32, peers: Vec<StoredPeer> },
    TurnOver { host: usize, events: Vec<Event> },
}

struct Scheduled {
    at: Duration,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A change of a member's status as one host saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) at: Duration,
    pub(crate) observer: usize,
    pub(crate) node: NodeName,
    pub(crate) before: Option<MemberStatus>,
    pub(crate) after: Option<MemberStatus>,
}

/// A mesh and everything around it.
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) settings: Settings,
    base: Instant,
    pub(crate) now: Duration,
    pub(crate) rng: StdRng,
    pub(crate) net: Net,
    pub(crate) hosts: Vec<Host>,
    by_addr: HashMap<SocketAddr, usize>,
    /// A host has another's name.
    has_twins: bool,
    /// Hosts know a part of the mesh, each another one ([`World::preloaded`]). Their sums over lives differ for ever, and the
    /// answers would tell everybody of everybody, as would the members that a newcomer is fed with; where all know all, equal sums
    /// are met with silence and a feed is no news. So both are sent and paid for, and nobody reads them.
    pub(crate) has_partial_views: bool,
    queue: BinaryHeap<Reverse<Scheduled>>,
    number: u64,
    pub(crate) turns: Turns,
    /// A host takes in what has arrived: its timers wait.
    pub(crate) is_draining: bool,
    pub(crate) connections: u64,
    pub(crate) talks: HashMap<u64, Talk>,
    pub(crate) joinings: HashMap<u64, Joining>,
    pub(crate) talk_number: u64,
    pub(crate) exchanges_begun: u64,
    /// Where somebody wants to know: UDP datagrams and bytes of ours by what they were for.
    pub(crate) classes: Option<BTreeMap<&'static str, [u64; 2]>>,
    /// Where somebody wants to know: how long all engines together have worked, by the clock of this thread.
    pub(crate) worked: Option<Duration>,
    pub(crate) dropped: u64,
    /// Events that were carried out.
    pub(crate) steps: u64,
    /// Every change of a member's status since it was last cleared.
    pub(crate) seen: Vec<Seen>,
    /// Whose records are watched for, from which version on, and when each host had them.
    pub(crate) watched: Option<(NodeName, u64)>,
    pub(crate) arrivals: HashMap<usize, Duration>,
    /// Records that were refused: by whom, whose.
    pub(crate) refusals: Vec<(usize, NodeName)>,
    /// Conflicts of names that agents reported: host and the other's address.
    pub(crate) conflicts: Vec<(usize, SocketAddr)>,
    /// Why attempts to join failed, by host.
    pub(crate) join_failures: Vec<(usize, String)>,
    last: VecDeque<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the simulation with seed {} failed at {:?}; its last events:", self.seed, self.now);
            for line in &self.last {
                eprintln!("  {line}");
            }
        }
    }
}

impl World {
    /// Makes a world without hosts.
    pub(crate) fn new(seed: u64, settings: Settings) -> Self {
        Self {
            seed,
            settings,
            base: weft::clock::now(),
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            net: Net::default(),
            hosts: Vec::new(),
            by_addr: HashMap::new(),
            has_twins: false,
            has_partial_views: false,
            queue: BinaryHeap::new(),
            number: 0,
            turns: Turns::default(),
            is_draining: false,
            connections: 0,
            talks: HashMap::new(),
            joinings: HashMap::new(),
            talk_number: 0,
            exchanges_begun: 0,
            classes: None,
            worked: None,
            dropped: 0,
            steps: 0,
            seen: Vec::new(),
            watched: None,
            arrivals: HashMap::new(),
            refusals: Vec::new(),
            conflicts: Vec::new(),
            join_failures: Vec::new(),
            last: VecDeque::new(),
        }
    }

    /// Makes `count` hosts that join through the first of them, `wave` at a time, a second apart, and runs until all
    /// know all.
    pub(crate) fn joined(count: usize, seed: u64, settings: Settings) -> Self {
        let mut world = Self::new(seed, settings);
        world.add_hosts(count);
        for host in 0..count {
            world.start(host);
        }
        let took = world.run_until(Duration::from_secs(60), Self::has_converged);
        assert!(took.is_some(), "{count} hosts join within a minute");
        world.calm_down();
        world
    }

    /// Lets the time pass in which a mesh with many newcomers is patient with everybody (`membership::health`).
    pub(crate) fn calm_down(&mut self) {
        if self.hosts.len() > 10 {
            self.run(Duration::from_secs(10));
        }
    }

    /// Adds hosts that have never run; each but the first has the first as its seed.
    pub(crate) fn add_hosts(&mut self, count: usize) {
        for _ in 0..count {
            let number = self.hosts.len();
            let seeds = if number == 0 { vec![] } else { vec![host::addr(0, 0).to_string()] };
            self.add_host(Host::new(number, seeds));
        }
    }

    pub(crate) fn add_host(&mut self, host: Host) {
        self.has_twins |= host.name != host::name(self.hosts.len());
        self.by_addr.insert(host.addr, self.hosts.len());
        self.hosts.push(host);
        self.net.add_host();
    }

    /// Gives a host another address.
    pub(crate) fn readdress(&mut self, host: usize, addr: SocketAddr) {
        self.by_addr.remove(&self.hosts[host].addr);
        self.by_addr.insert(addr, host);
        self.hosts[host].addr = addr;
    }

    pub(crate) fn host_at(&self, addr: SocketAddr) -> Option<usize> {
        self.by_addr.get(&addr).copied()
    }

    pub(crate) fn host_named(&self, id: &MeshId) -> Option<usize> {
        self.host_at(id.addr).filter(|host| self.hosts[*host].name == id.name)
    }

    pub(crate) fn hosts_named<'a>(&'a self, name: &str) -> impl Iterator<Item = usize> + use<'a> {
        let name: NodeName = name.parse().unwrap();
        // Hosts are named after their number; only a twin has another's name.
        let own = name.as_str().strip_prefix('n').and_then(|number| number.parse::<usize>().ok());
        let own = own.filter(|host| self.hosts.get(*host).is_some_and(|found| found.name == name));
        let others = if own.is_some() && !self.has_twins { 0..0 } else { 0..self.hosts.len() };
        let others = others.filter(move |host| Some(*host) != own && self.hosts[*host].name == name);
        own.into_iter().chain(others)
    }

    pub(crate) fn engine(&self, host: usize) -> &Engine {
        &self.hosts[host].process.as_ref().expect("it runs").engine
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].process.is_some())
    }

    // Time.

    pub(crate) fn after(&mut self, delay: Duration, event: Event) {
        self.number += 1;
        self.queue.push(Reverse(Scheduled { at: self.now + delay, number: self.number, event }));
    }

    /// Counts what is sent by what it is for.
    pub(crate) fn classify(&mut self, class: &'static str, datagrams: u64, bytes: u64) {
        if let Some(classes) = &mut self.classes {
            let sum = classes.entry(class).or_default();
            *sum = [sum[0] + datagrams, sum[1] + bytes];
        }
    }

    /// Runs for `time`.
    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Runs until `done` or until `limit` has passed; returns how long it took. `done` is asked every 10 ms.
    pub(crate) fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        const STEP: Duration = Duration::from_millis(10);
        let begin = self.now;
        loop {
            if done(self) {
                return Some(self.now - begin);
            }
            let until = (self.now + STEP).min(begin + limit);
            while self.queue.peek().is_some_and(|Reverse(next)| next.at <= until) {
                if let Some(Reverse(Scheduled { at, event, .. })) = self.queue.pop() {
                    self.now = self.now.max(at);
                    self.steps += 1;
                    if let Some(event) = self.arrive(event) {
                        self.happen(event);
                    }
                }
            }
            self.now = until;
            if until == begin + limit {
                return done(self).then_some(limit);
            }
        }
    }

    pub(crate) fn happen(&mut self, event: Event) {
        match event {
            Event::Wake { host, boot } => {
                let Some(process) = &mut self.hosts[host].process else { return };
                if process.boot != boot || process.wake_at != Some(self.now) {
                    return;
                }
                process.wake_at = None;
                if !process.is_paused {
                    self.turn(host, Engine::handle_timeout);
                }
            }
            Event::Packet { from, to, connection, packet } => self.packet(from, to, connection, packet),
            Event::Dialled { from, boot, peer, addr, begun } => self.dialled(from, boot, peer, addr, begun),
            Event::ConnectionLost { host, peer, number } => match &mut self.hosts[host].process {
                Some(process) if process.is_paused => {
                    process.inbox.push_back(Event::ConnectionLost { host, peer, number });
                }
                _ => self.connection_lost(host, peer, number),
            },
            Event::Frame { talk, stream, to, bytes } => self.frame(talk, stream, to, bytes),
            Event::StreamTimeout { talk, stream } => self.stream_timeout(talk, stream),
            Event::JoinDialled { attempt, addr, begun } => self.join_dialled(attempt, addr, begun),
            Event::JoinEnough { attempt } => {
                let host = self.joiner(attempt).and_then(|host| self.hosts[host].process.as_mut());
                match host.filter(|process| process.is_paused) {
                    Some(process) => process.inbox.push_back(Event::JoinEnough { attempt }),
                    None => self.join_over(attempt),
                }
            }
            Event::TurnOver { host, events } => self.turn_over(host, events),
            Event::Synced { host, boot, peers } => {
                let machine = &mut self.hosts[host];
                if machine.process.as_ref().is_some_and(|process| process.boot == boot) {
                    machine.disk.peers = peers;
                    machine.process.as_mut().unwrap().engine.peers_saved();
                }
            }
        }
    }

    fn packet(&mut self, from: usize, to: usize, connection: Connection, packet: Bytes) {
        if !self.net.passes(from, to) {
            return;
        }
        let Some(process) = &mut self.hosts[to].process else { return };
        if process.is_paused {
            if process.inbox.len() < INBOX_MAX {
                process.inbox.push_back(Event::Packet { from, to, connection, packet });
            }
            return;
        }
        if !self.holds(to, from, connection) {
            // A stateless reset.
            for delay in self.net.carry(to, from, &mut self.rng) {
                self.after(delay, Event::ConnectionLost { host: from, peer: to, number: connection.number });
            }
            return;
        }
        if self.has_partial_views && matches!(weft::membership::class_of(&packet).0, "lives" | "feed") {
            return;
        }
        let name = self.hosts[from].name.clone();
        self.turn(to, |engine, turn| engine.handle_packet(&name, &packet, turn));
    }

    // Agents.

    /// Calls into the engine of `host` and carries out what it wants; none if it does not run.
    pub(crate) fn turn<T>(&mut self, host: usize, act: impl FnOnce(&mut Engine, &Turn<'_>) -> T) -> Option<T> {
        self.tell_links(host);
        let machine = &mut self.hosts[host];
        let signer = machine.signer(self.settings.chain_bytes);
        let wall = wall_of(self.now, machine.wall_ahead);
        let verifier = Verifier { wall };
        let turn = Turn { now: self.base + self.now, wall, signer: &signer, verifier: &verifier };
        let engine = &mut machine.process.as_mut()?.engine;
        let begun = self.worked.map(|_| weft::clock::thread_time());
        let result = act(engine, &turn);
        // As the agent: what is due runs after every event, once what has arrived is handed over.
        if !self.is_draining && engine.poll_timeout() <= turn.now {
            engine.handle_timeout(&turn);
        }
        if let (Some(worked), Some(begun)) = (&mut self.worked, begun) {
            *worked += weft::clock::thread_time().saturating_sub(begun);
        }
        self.carry_out(host);
        Some(result)
    }

    /// Tells the engine of `host` to whom connections lead, if that changed.
    fn tell_links(&mut self, host: usize) {
        let Some(process) = &self.hosts[host].process else { return };
        if !process.links_changed {
            return;
        }
        let open = process.links.iter().filter(|(_, link)| !link.open.is_empty());
        let linked = open.map(|(peer, _)| self.hosts[*peer].name.clone()).collect();
        if let Some(process) = &mut self.hosts[host].process {
            process.links_changed = false;
            process.engine.set_linked(linked);
        }
    }

    fn carry_out(&mut self, host: usize) {
        loop {
            let Some(process) = &mut self.hosts[host].process else { return };
            let Some(output) = process.engine.poll_output() else { break };
            match output {
                Output::Send { to, packet } => self.send(host, &to, packet),
                Output::Close { peer, .. } => {
                    for peer in self.hosts_named(peer.as_str()).collect::<Vec<_>>() {
                        self.close(host, peer);
                    }
                }
                Output::Exchange { peer, exchange, message, stage } => {
                    self.begin(host, peer.as_str(), exchange, (message, stage));
                }
                Output::Join { targets } => self.start_join(host, JoinCause::Engine, &targets),
                Output::SavePeers(peers) => {
                    let boot = process.boot;
                    self.after(SYNC_TIME, Event::Synced { host, boot, peers });
                }
                // Hosts of this world do not refuse: a crash is silence.
                Output::AskPort(_) | Output::Demand { .. } => {}
                Output::Event(event) => self.note(host, event),
            }
        }
        self.look(host);
        self.set_alarm(host);
    }

    fn note(&mut self, host: usize, event: engine::Event) {
        match event {
            engine::Event::MemberChanged { node, before, after, .. } => {
                if before != after {
                    self.hear_of(host, &node, after);
                    self.tell(format!("{} sees {node}: {before:?} -> {after:?}", self.hosts[host].name));
                    self.seen.push(Seen { at: self.now, observer: host, node, before, after });
                }
            }
            engine::Event::Conflict { theirs, .. } => self.conflicts.push((host, theirs.addr)),
            engine::Event::Refused { node, .. } => self.refusals.push((host, node)),
            engine::Event::Joined { failed, peers, .. } => {
                if peers.is_empty() {
                    self.join_failures.extend(failed.into_iter().map(|(_, reason)| (host, reason)));
                }
            }
            engine::Event::Delta(_) | engine::Event::Published(Ok(())) => {}
            other => self.tell(format!("{}: {other:?}", self.hosts[host].name)),
        }
    }

    /// Notes that `observer` holds the goodbye of `node`.
    fn hear_of(&mut self, observer: usize, node: &NodeName, after: Option<MemberStatus>) {
        if matches!(after, Some(MemberStatus::Leaving | MemberStatus::Left))
            && let Some(boot) = self.hosts[observer].process.as_ref().map(|process| process.boot)
        {
            for left in self.hosts_named(node.as_str()).collect::<Vec<_>>() {
                self.hosts[left].told.insert((observer, boot));
            }
        }
    }

    /// Ends the process; goodbyes that nobody else holds are lost with it.
    fn end_process(&mut self, host: usize) {
        let Some(boot) = self.hosts[host].process.take().map(|process| process.boot) else { return };
        for at in 0..self.hosts.len() {
            self.hosts[at].told.remove(&(host, boot));
            if self.hosts[at].process.is_none() && self.hosts[at].told.is_empty() {
                self.hosts[at].has_left = false;
            }
        }
    }

    /// Remembers a line for the report of a failure.
    pub(crate) fn tell(&mut self, line: String) {
        if self.last.len() >= self.settings.events_kept {
            self.last.pop_front();
        }
        self.last.push_back(format!("{:>12.6} {line}", self.now.as_secs_f64()));
    }

    /// Looks whether what is watched for has come.
    fn look(&mut self, host: usize) {
        let Some(process) = &mut self.hosts[host].process else { return };
        let dirty: BTreeSet<NodeName> = process.engine.take_dirty();
        if let Some((node, version)) = &self.watched
            && dirty.contains(node)
            && process.engine.replica().state(node).is_some_and(|state| state.version >= *version)
        {
            self.arrivals.entry(host).or_insert(self.now);
        }
    }

    fn set_alarm(&mut self, host: usize) {
        let base = self.base;
        let Some(process) = &mut self.hosts[host].process else { return };
        let wanted = (process.engine.poll_timeout() - base).max(self.now);
        if process.wake_at.is_none_or(|at| wanted < at) {
            process.wake_at = Some(wanted);
            let boot = process.boot;
            self.after(wanted - self.now, Event::Wake { host, boot });
        }
    }

    // What a script does to hosts.

    /// Starts the agent on `host`: the next generation is on disk before it runs.
    pub(crate) fn start(&mut self, host: usize) {
        let seed: u64 = self.rng.random();
        let nonce: u64 = self.rng.random();
        self.tell(format!("{} starts", self.hosts[host].name));
        let machine = &mut self.hosts[host];
        machine.disk.generation += 1;
        machine.boots += 1;
        machine.has_left = false;
        machine.told.clear();
        let params = engine::Params {
            node: machine.info(),
            generation: host::generation(machine.disk.generation, nonce),
            profile: self.settings.profile.clone(),
            replica: machine.replica.clone(),
            records: machine.records.clone(),
            seeds: machine.seeds.clone(),
            known_peers: machine.disk.peers.clone(),
            sync_interval: self.settings.sync_interval,
        };
        let signer = machine.signer(self.settings.chain_bytes);
        let wall = wall_of(self.now, machine.wall_ahead);
        let turn = Turn { now: self.base + self.now, wall, signer: &signer, verifier: &Verifier { wall } };
        machine.process = Some(Process {
            engine: Engine::new(params, seed, &turn),
            boot: machine.boots,
            links: HashMap::new(),
            links_changed: false,
            uses: 0,
            is_paused: false,
            inbox: VecDeque::new(),
            wake_at: None,
            started: self.now,
            healthy_since: self.now,
        });
        self.carry_out(host);
    }

    /// Ends the agent on `host` at once; what was not synced is lost.
    pub(crate) fn crash(&mut self, host: usize) {
        self.tell(format!("{} crashes", self.hosts[host].name));
        self.end_process(host);
    }

    /// Ends it, and the disk forgets what it had acknowledged last: the generation, perhaps the peers.
    pub(crate) fn crash_torn(&mut self, host: usize) {
        self.crash(host);
        let disk = &mut self.hosts[host].disk;
        disk.generation = disk.generation.saturating_sub(1);
        if self.rng.random_bool(0.5) {
            disk.peers.clear();
        }
    }

    /// Stops the process: SIGSTOP.
    pub(crate) fn pause(&mut self, host: usize) {
        self.tell(format!("{} is stopped", self.hosts[host].name));
        if let Some(process) = &mut self.hosts[host].process {
            process.is_paused = true;
        }
    }

    /// Lets it go on. Its timers ran out long ago and act first, or, with an odd seed, what lies in its sockets is read before:
    /// both orders are ones that a runtime may choose.
    pub(crate) fn resume(&mut self, host: usize) {
        self.tell(format!("{} goes on", self.hosts[host].name));
        let now = self.now;
        let Some(process) = &mut self.hosts[host].process else { return };
        process.is_paused = false;
        process.healthy_since = now;
        let inbox = std::mem::take(&mut process.inbox);
        if self.seed % 2 == 1 {
            self.is_draining = true;
            for event in inbox {
                self.happen(event);
            }
            self.is_draining = false;
            self.turn(host, Engine::handle_timeout);
            return;
        }
        self.turn(host, Engine::handle_timeout);
        for event in inbox {
            self.after(Duration::from_micros(200), event);
        }
    }

    /// Leaves and stops as the agent does: it waits for its goodbye to go out.
    pub(crate) fn leave(&mut self, host: usize) {
        self.tell(format!("{} leaves", self.hosts[host].name));
        self.turn(host, Engine::leave);
        self.hosts[host].has_left = true;
    }

    /// Registers, or replaces, what is published here.
    pub(crate) fn register(&mut self, host: usize, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            self.hosts[host].records.insert(entry.key(), entry);
        }
        self.publish(host);
    }

    /// Publishes what stands in the host's records.
    pub(crate) fn publish(&mut self, host: usize) {
        let records = self.hosts[host].records.clone();
        self.turn(host, |engine, turn| engine.handle_records(records, turn));
    }

    /// Joins by an operator's order.
    pub(crate) fn join(&mut self, host: usize, targets: &[String]) {
        self.start_join(host, JoinCause::Order, targets);
    }

    /// Cuts the network into sides, by host.
    pub(crate) fn split(&mut self, side: impl Fn(usize) -> u8) {
        self.tell("the network is split".to_owned());
        for host in 0..self.hosts.len() {
            self.net.side[host] = side(host);
        }
    }

    /// Mends every cut.
    pub(crate) fn heal(&mut self) {
        self.tell("the network is whole".to_owned());
        self.net.cuts.clear();
        self.net.side.fill(0);
        let now = self.now;
        for process in self.hosts.iter_mut().filter_map(|host| host.process.as_mut()) {
            process.healthy_since = now;
        }
    }
}

fn wall_of(now: Duration, ahead: i64) -> UnixSeconds {
    UnixSeconds(WALL.saturating_add(now.as_secs()).saturating_add_signed(ahead))
}

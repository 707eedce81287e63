//! The gossip task: `select -> apply -> settle`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::exchange::{self, ExchangeError, Held, HelloReply, SyncReply, Trade};
use super::links::{Links, Sent};
use super::metrics::GossipMetrics;
use super::targets::{self, Outcome};
use super::trust::{Signer, Verifier};
use super::{Command, GossipError, GossipParams, MemberView, Members, PeerStore, Prune};
use crate::catalogue::builder::Builder;
use crate::catalogue::{LocalView, Publisher, Snapshot, SnapshotReader};
use crate::clock;
use crate::membership::{
    BROADCAST_BYTES_MAX, Broadcast, Core, ForceLeaveError, Leave, MemberEntry, MeshId, Output, PACKET_BYTES_MAX,
    Profile, Standing,
};
use crate::model::{Entry, EntryKey, Generation, MemberStatus, NodeInfo, NodeName, SpiffeId};
use crate::pki::Identity;
use crate::registry::Publication;
use crate::replica::{Applied, ApplyError, Delta, Digest, Params, Replica, Report};
use crate::store::StoredPeer;
use crate::transport::{Accepted, ControlTransport};
use crate::wire::{self, WireError};

/// Most messages from connections that wait; datagrams past it are dropped, streams wait.
const INPUTS_MAX: usize = 1024;
/// Most streams of one peer that are served at once.
const STREAMS_PER_PEER_MAX: usize = 16;
/// Most packets under way on streams at once.
const STREAM_SENDS_MAX: usize = 256;
/// Most comparisons begun at once.
const SYNCS_MAX: usize = 8;
/// Most pulls at once.
const PULLS_MAX: usize = 8;
/// Rounds of a periodic comparison, and of the first one after a join, which moves the whole catalogue.
const SYNC_ROUNDS: usize = 3;
const JOIN_SYNC_ROUNDS: usize = 64;
/// First and longest pause between attempts to join.
const JOIN_PAUSE_MIN: Duration = Duration::from_millis(500);
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Most known peers that are tried per attempt, beside the seeds.
const JOIN_PEERS_MAX: usize = 48;
/// Most peers that are kept on disk.
const STORED_PEERS_MAX: usize = 512;
/// Most nodes whose refused records are remembered as logged.
const REFUSALS_MAX: usize = 1024;
/// How long a goodbye has to leave the host: a handshake on a slow path and a retransmission.
const LEAVE_FLUSH: Duration = Duration::from_millis(300);

/// What connections and their streams tell or ask.
#[derive(Debug)]
pub(super) enum Input {
    Packet(NodeName, Bytes),
    Unreadable(&'static str),
    Hello(NodeName, MeshId, oneshot::Sender<HelloReply>),
    Pull(Vec<Digest>, oneshot::Sender<Vec<Delta>>),
    Summary(oneshot::Sender<(u64, Vec<Leave>)>),
    Sync(u64, Vec<Leave>, oneshot::Sender<SyncReply>),
    Differing(Vec<u64>, oneshot::Sender<Held>),
    Compare(Held, oneshot::Sender<Trade>),
    Deliver(NodeName, Trade, oneshot::Sender<Vec<Delta>>),
}

/// How a piece of work that the task began has ended.
#[derive(Debug)]
enum Done {
    Dialled(MeshId, Result<Connection, String>),
    Joined(Outcome, Option<oneshot::Sender<Result<usize, GossipError>>>),
    Synced(NodeName, Result<bool, ExchangeError>),
    Pulled { node: NodeName, from: NodeName, result: Result<Vec<Delta>, ExchangeError> },
    ConnectionEnded(NodeName, usize),
    Saved,
    PacketSent,
    LeaveFlushed(oneshot::Sender<()>),
}

#[derive(Debug)]
enum Event {
    Stop,
    Command(Command),
    Accepted(Accepted),
    Input(Input),
    Done(Done),
    Publication,
    Wake,
}

/// The task's state.
pub(super) struct Actor {
    node: NodeInfo,
    core: Core,
    replica: Replica,
    builder: Builder,
    publisher: Publisher,
    members: watch::Sender<Arc<Members>>,
    links: Links,
    transport: ControlTransport,
    identity: Arc<Identity>,
    publication: watch::Receiver<Arc<Publication>>,
    has_publication_ended: bool,
    commands: mpsc::Receiver<Command>,
    incoming: mpsc::Receiver<Accepted>,
    inputs: mpsc::Receiver<Input>,
    inputs_sender: mpsc::Sender<Input>,
    work: JoinSet<Done>,
    stop: CancellationToken,
    metrics: GossipMetrics,
    rng: StdRng,
    /// Nodes whose records or status changed in this turn.
    dirty: BTreeSet<NodeName>,
    are_members_dirty: bool,
    sync_interval: Duration,
    next_sync: Instant,
    syncs: BTreeSet<NodeName>,
    pulls: BTreeSet<NodeName>,
    stream_sends: usize,
    seeds: Vec<String>,
    known_peers: Vec<StoredPeer>,
    peer_store: Arc<dyn PeerStore>,
    is_saving: bool,
    are_peers_dirty: bool,
    join_pause: Duration,
    next_join: Instant,
    join_attempts: usize,
    is_joining: bool,
    conflict_seen: Option<MeshId>,
    /// Nodes whose records were refused and logged.
    refusals: BTreeSet<NodeName>,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Actor").field("core", &self.core).finish_non_exhaustive()
    }
}

impl Actor {
    pub(super) fn new(
        params: GossipParams,
        commands: mpsc::Receiver<Command>,
        metrics: GossipMetrics,
    ) -> (Self, watch::Receiver<Arc<Members>>, SnapshotReader) {
        let now = clock::now();
        let name = params.node.name.clone();
        let id = MeshId::new(name.clone(), params.node.mesh_addr, params.generation);
        let (inputs_sender, inputs) = mpsc::channel(INPUTS_MAX);
        let (members, members_reader) = watch::channel(Arc::default());
        let mut known_peers = params.known_peers;
        known_peers.retain(|peer| peer.name != name);
        known_peers.sort_by_key(|peer| !peer.alive);
        let mut actor = Self {
            core: Core::new(id, Profile::default(), rand::random(), now),
            replica: Replica::new(name.clone(), params.generation, Params::default()),
            builder: Builder::new(name.clone(), params.first_index),
            publisher: Publisher::new(Arc::new(empty_snapshot(name, params.first_index))),
            members,
            links: Links::default(),
            transport: params.transport,
            identity: params.identity,
            publication: params.publication,
            has_publication_ended: false,
            commands,
            incoming: params.incoming,
            inputs,
            inputs_sender,
            work: JoinSet::new(),
            stop: params.stop,
            metrics,
            rng: StdRng::seed_from_u64(rand::random()),
            dirty: BTreeSet::new(),
            are_members_dirty: true,
            next_sync: now + params.sync_interval,
            sync_interval: params.sync_interval,
            syncs: BTreeSet::new(),
            pulls: BTreeSet::new(),
            stream_sends: 0,
            seeds: params.seeds,
            known_peers,
            peer_store: params.peer_store,
            is_saving: false,
            are_peers_dirty: false,
            join_pause: JOIN_PAUSE_MIN,
            next_join: now,
            join_attempts: 0,
            is_joining: false,
            conflict_seen: None,
            refusals: BTreeSet::new(),
            node: params.node,
        };
        actor.publish(now);
        actor.settle(now);
        let reader = actor.publisher.reader();
        (actor, members_reader, reader)
    }

    /// Runs until the token ends it.
    pub(super) async fn run(mut self) {
        info!(node = %self.node.name, addr = %self.node.mesh_addr, generation = %self.generation(), "gossip started");
        loop {
            let event = self.select().await;
            if matches!(event, Event::Stop) {
                break;
            }
            let now = clock::now();
            self.apply(event, now);
            self.settle(now);
        }
        self.links.close_every("agent stops");
        self.work.shutdown().await;
        let peers = self.stored_peers();
        if self.are_peers_dirty && !peers.is_empty() {
            let store = Arc::clone(&self.peer_store);
            if let Err(error) = tokio::task::spawn_blocking(move || store.save(peers)).await {
                error!(%error, "known peers were not saved");
            }
        }
    }

    /// Waits for the next event. Cancel safe: every branch is.
    async fn select(&mut self) -> Event {
        let wake = self.core.poll_timeout().min(self.next_sync).min(self.join_at().unwrap_or(self.next_sync));
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(command) = self.commands.recv() => Event::Command(command),
            Some(accepted) = self.incoming.recv() => Event::Accepted(accepted),
            Some(input) = self.inputs.recv() => Event::Input(input),
            Some(done) = self.work.join_next() => match done {
                Ok(done) => Event::Done(done),
                Err(error) => {
                    error!(%error, "gossip work failed");
                    Event::Wake
                }
            },
            changed = self.publication.changed(), if !self.has_publication_ended => {
                self.has_publication_ended = changed.is_err();
                Event::Publication
            }
            () = tokio::time::sleep_until(wake) => Event::Wake,
        }
    }

    fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Command(command) => self.command(command, now),
            Event::Accepted(accepted) => self.accepted(accepted, now),
            Event::Input(input) => self.input(input, now),
            Event::Done(done) => self.done(done, now),
            Event::Publication => {
                self.publication.mark_unchanged();
                self.publish(now);
            }
            // What is due runs below.
            Event::Stop | Event::Wake => {}
        }
        if self.core.poll_timeout() <= now {
            self.core.handle_timeout(now);
        }
        if self.next_sync <= now {
            self.tick(now);
        }
        if self.join_at().is_some_and(|at| at <= now) {
            self.join_again(now);
        }
    }

    fn generation(&self) -> Generation {
        self.core.id().life.generation
    }

    // Orders.

    fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Join(targets, reply) => self.start_join(targets, Some(reply)),
            Command::Leave(reply) => {
                info!(node = %self.node.name, "leaving the mesh");
                self.core.leave(now);
                self.dirty.insert(self.node.name.clone());
                self.are_members_dirty = true;
                self.work.spawn(async move {
                    tokio::time::sleep(LEAVE_FLUSH).await;
                    Done::LeaveFlushed(reply)
                });
            }
            Command::ForceLeave(name, prune, reply) => {
                let result = self.core.force_leave(&name, prune == Prune::Forget, now);
                let result = result.map_err(|error| match error {
                    ForceLeaveError::Unknown => GossipError::UnknownMember(name.to_string()),
                    ForceLeaveError::Alive => GossipError::MemberAlive(name),
                });
                answer(reply, result);
            }
        }
    }

    fn start_join(&mut self, targets: Vec<String>, reply: Option<oneshot::Sender<Result<usize, GossipError>>>) {
        let join = targets::join_all(self.transport.clone(), self.core.id().clone(), targets);
        self.work.spawn(async move { Done::Joined(join.await, reply) });
    }

    /// When the next attempt to join is due: only while nobody else is alive, there is somebody to ask, and this
    /// node has not left.
    fn join_at(&self) -> Option<Instant> {
        let is_wanted = !self.is_joining && !self.core.has_left() && self.core.alive_count() == 0;
        let has_targets =
            !self.seeds.is_empty() || !self.known_peers.is_empty() || self.core.members().next().is_some();
        (is_wanted && has_targets).then_some(self.next_join)
    }

    fn join_again(&mut self, now: Instant) {
        let targets = self.join_targets();
        self.join_attempts = self.join_attempts.wrapping_add(1);
        let jitter = self.rng.random_range(0.5..1.0);
        self.next_join = now + self.join_pause.mul_f64(jitter);
        self.join_pause = (self.join_pause * 2).min(JOIN_PAUSE_MAX);
        if !targets.is_empty() {
            self.is_joining = true;
            self.start_join(targets, None);
        }
    }

    /// Every seed, and known peers in turn: members first, then those alive at the last run, then the others.
    fn join_targets(&self) -> Vec<String> {
        let members = self.core.members().filter(|member| member.status != MemberStatus::Left);
        let mut known: Vec<SocketAddr> = Vec::new();
        let stored = self.known_peers.iter().map(|peer| peer.addr);
        for addr in members.map(|member| member.id.addr).chain(stored) {
            if addr != self.node.mesh_addr && !known.contains(&addr) {
                known.push(addr);
            }
        }
        let begin = if known.is_empty() { 0 } else { (self.join_attempts * JOIN_PEERS_MAX) % known.len() };
        let (before, after) = known.split_at(begin);
        let turn = after.iter().chain(before).take(JOIN_PEERS_MAX).map(SocketAddr::to_string);
        let mut targets: Vec<String> = turn.collect();
        targets.extend(self.seeds.iter().filter(|seed| !targets.contains(seed)).cloned().collect::<Vec<_>>());
        targets
    }

    fn joined(&mut self, outcome: Outcome, reply: Option<oneshot::Sender<Result<usize, GossipError>>>, now: Instant) {
        let Outcome { joined, failed, outdated } = outcome;
        let reasons = failed.iter().map(|(target, why)| format!("{target}: {why}")).collect::<Vec<_>>().join("\n");
        if !failed.is_empty() && joined.is_empty() {
            warn!(targets = failed.len(), reasons, "could not join");
        } else if !failed.is_empty() {
            info!(targets = failed.len(), reasons, "joined, but not through all");
        }
        if let Some(life) = outdated {
            self.outlive(life, now);
        }
        let count = joined.len();
        self.metrics.exchanged("join", count > 0);
        for peer in joined {
            info!(peer = %peer.id.name, addr = %peer.id.addr, "joined through");
            let name = peer.id.name.clone();
            self.watch(&name, peer.connection.clone());
            let waiting = self.links.accepted(&name, peer.connection);
            let mut members = peer.members;
            members.push(MemberEntry { id: peer.id.clone(), incarnation: 0, standing: Standing::Alive });
            self.core.learn(members, now);
            self.core.learn_farewells(peer.farewells, now);
            self.core.announce(peer.id.clone(), now);
            self.resend(&peer.id, waiting, now);
            self.start_sync(&name, JOIN_SYNC_ROUNDS);
        }
        match reply {
            Some(reply) if count > 0 => answer(reply, Ok(count)),
            Some(reply) => answer(reply, Err(GossipError::Join(reasons))),
            None => self.is_joining = false,
        }
    }

    /// Takes a generation above the one that a peer remembers of this name, and publishes anew under it.
    fn outlive(&mut self, theirs: crate::membership::Life, now: Instant) {
        if theirs < self.core.id().life {
            return;
        }
        self.core.outlive(theirs, now);
        warn!(generation = %self.generation(), "a later life of this node is remembered; continuing above it");
        self.replica = Replica::new(self.node.name.clone(), self.generation(), Params::default());
        self.publish(now);
        self.next_join = now;
        self.are_members_dirty = true;
    }

    // Connections.

    fn accepted(&mut self, accepted: Accepted, now: Instant) {
        let Some(peer) = accepted.peer else {
            accepted.connection.close(0u32.into(), b"not a gossip connection");
            return;
        };
        if !matches!(peer.id, SpiffeId::Node { .. }) {
            warn!(peer = %peer.id, "a service's certificate does not speak for its node in gossip; refused");
            accepted.connection.close(0u32.into(), b"not a node's certificate");
            return;
        }
        if peer.node == self.node.name {
            self.conflict(&peer.node, accepted.connection.remote_address());
            accepted.connection.close(0u32.into(), b"own name");
            return;
        }
        self.watch(&peer.node, accepted.connection.clone());
        let waiting = self.links.accepted(&peer.node, accepted.connection);
        if let Some(id) = self.core.member(&peer.node).map(|member| member.id.clone()) {
            self.resend(&id, waiting, now);
        }
    }

    /// Reads everything that comes on `connection`.
    fn watch(&mut self, peer: &NodeName, connection: Connection) {
        let (peer, inputs, metrics) = (peer.clone(), self.inputs_sender.clone(), self.metrics.clone());
        self.work.spawn(async move {
            let stable_id = connection.stable_id();
            read_connection(peer.clone(), connection, inputs, metrics).await;
            Done::ConnectionEnded(peer, stable_id)
        });
    }

    fn resend(&mut self, to: &MeshId, packets: Vec<Bytes>, now: Instant) {
        for packet in packets {
            self.send(to, packet, now);
        }
    }

    fn send(&mut self, to: &MeshId, packet: Bytes, now: Instant) {
        let bytes = packet.len() as u64;
        match self.links.send(to, packet, now) {
            Sent::Datagram => {
                self.metrics.sent_datagram.inc();
                self.metrics.sent_bytes.inc_by(bytes);
            }
            Sent::Stream(connection, packet) if self.stream_sends < STREAM_SENDS_MAX => {
                self.stream_sends += 1;
                self.metrics.sent_stream.inc();
                self.metrics.sent_bytes.inc_by(bytes);
                self.work.spawn(async move {
                    // A packet may be lost, on a stream as well.
                    let _lost = tokio::time::timeout(exchange::TIME_MAX, send_on_stream(&connection, &packet)).await;
                    Done::PacketSent
                });
            }
            Sent::Stream(..) => self.metrics.dropped.with_label_values(&["streams"]).inc(),
            Sent::Queued => {}
            Sent::Dial(addr) => {
                let (transport, to) = (self.transport.clone(), to.clone());
                self.work.spawn(async move {
                    let dial = transport.connect(addr, Some(to.name.clone()));
                    let result = match tokio::time::timeout(targets::CONNECT_TIME_MAX, dial).await {
                        Ok(Ok((connection, _))) => Ok(connection),
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(_) => Err(format!("{addr} did not answer in time")),
                    };
                    Done::Dialled(to, result)
                });
            }
            Sent::Dropped(reason) => self.metrics.dropped.with_label_values(&[reason]).inc(),
        }
    }

    fn done(&mut self, done: Done, now: Instant) {
        match done {
            Done::Dialled(to, Ok(connection)) => {
                self.metrics.dials.with_label_values(&["ok"]).inc();
                self.watch(&to.name, connection.clone());
                let waiting = self.links.dialled(&to.name, to.addr, connection);
                self.resend(&to, waiting, now);
            }
            Done::Dialled(to, Err(reason)) => {
                debug!(peer = %to.name, %reason, "dial failed");
                self.metrics.dials.with_label_values(&["failed"]).inc();
                let lost = self.links.dial_failed(&to.name, now);
                self.metrics.dropped.with_label_values(&["no_link"]).inc_by(lost as u64);
            }
            Done::Joined(outcome, reply) => self.joined(outcome, reply, now),
            Done::Synced(peer, result) => {
                self.syncs.remove(&peer);
                self.metrics.exchanged("sync", result.is_ok());
                if let Err(error) = result {
                    debug!(%peer, error = error.explain(None), "sync failed");
                }
            }
            Done::Pulled { node, from, result } => {
                self.pulls.remove(&node);
                self.metrics.exchanged("pull", result.is_ok());
                match result {
                    Ok(deltas) => self.take_pulled(&deltas, now),
                    Err(error) => debug!(%from, error = error.explain(None), "pull failed"),
                }
            }
            Done::ConnectionEnded(peer, stable_id) => self.links.ended(&peer, stable_id),
            Done::Saved => self.is_saving = false,
            Done::PacketSent => self.stream_sends = self.stream_sends.saturating_sub(1),
            Done::LeaveFlushed(reply) => answer(reply, ()),
        }
    }

    // What comes from peers.

    fn input(&mut self, input: Input, now: Instant) {
        match input {
            Input::Packet(from, packet) => self.packet(&from, &packet, now),
            Input::Unreadable(reason) => self.metrics.refused.with_label_values(&[reason]).inc(),
            Input::Hello(peer, id, reply) => answer(reply, self.hello(&peer, &id)),
            Input::Pull(have, reply) => answer(reply, self.deltas_for(&have)),
            Input::Summary(reply) => answer(reply, (self.replica.set_hash(), self.core.farewells())),
            Input::Sync(set_hash, farewells, reply) => {
                self.core.learn_farewells(farewells, now);
                let is_same = set_hash == self.replica.set_hash();
                let differs = || SyncReply::Buckets(self.replica.bucket_hashes());
                answer(reply, if is_same { SyncReply::Same } else { differs() });
            }
            Input::Differing(theirs, reply) => answer(reply, self.held(&theirs)),
            Input::Compare(held, reply) => {
                let deltas = self.replica.newer_than(&held.buckets, &held.digests, exchange::DELTAS_BYTES_MAX);
                let mut wanted = self.replica.wanted(&held.digests);
                wanted.truncate(exchange::DIGESTS_MAX);
                answer(reply, Trade { deltas, wanted });
            }
            Input::Deliver(peer, trade, reply) => {
                for delta in &trade.deltas {
                    if let Some(Applied::Behind) = self.merge(delta) {
                        self.pull_whole(&peer, delta);
                    }
                }
                answer(reply, self.deltas_for(&trade.wanted));
            }
        }
    }

    fn packet(&mut self, from: &NodeName, packet: &[u8], now: Instant) {
        self.metrics.received.inc();
        self.metrics.received_bytes.inc_by(packet.len() as u64);
        if let Err(reason) = self.core.handle_packet(from, packet, now) {
            self.metrics.refused.with_label_values(&[reason.to_string()]).inc();
            if reason == crate::membership::Refused::Sender {
                warn!(peer = %from, "peer speaks in another member's name; its connection is closed");
                self.links.close(from, "the sender is not the member that the packet names");
            }
        }
    }

    fn hello(&mut self, peer: &NodeName, id: &MeshId) -> HelloReply {
        let own = self.core.id();
        if id.name != *peer {
            return HelloReply::Refused(format!("certified as {peer}, but calls itself {}", id.name));
        }
        if id.name == own.name {
            return HelloReply::Refused(format!("{} is the name of this agent, at {}", id.name, own.addr));
        }
        if self.core.has_left() {
            return HelloReply::Refused("this agent is leaving".to_owned());
        }
        if let Some(known) = self.core.member(peer)
            && let Some(refusal) = judge_newcomer(&known.id, known.status, id)
        {
            return refusal;
        }
        HelloReply::Welcome {
            id: own.clone(),
            members: self.core.entries(exchange::WELCOME_MEMBERS_MAX),
            farewells: self.core.farewells(),
        }
    }

    fn held(&self, theirs: &[u64]) -> Held {
        let mut held = Held::default();
        // The lowest buckets that fit; the next round takes the others.
        for bucket in self.replica.differing(theirs) {
            let digests = self.replica.digests(&[bucket]);
            if !held.buckets.is_empty() && held.digests.len() + digests.len() > exchange::DIGESTS_MAX {
                break;
            }
            held.buckets.push(bucket);
            held.digests.extend(digests);
        }
        held
    }

    /// Returns what a peer lacks, as much as fits one frame.
    fn deltas_for(&self, have: &[Digest]) -> Vec<Delta> {
        let mut deltas = Vec::new();
        let mut bytes = 0;
        for delta in have.iter().take(exchange::DIGESTS_MAX).filter_map(|digest| self.replica.delta_for(digest)) {
            bytes += wire::encode(&delta).map_or(wire::FRAME_BYTES_MAX, |encoded| encoded.len());
            if bytes > exchange::DELTAS_BYTES_MAX {
                break;
            }
            deltas.push(delta);
        }
        deltas
    }

    // Records.

    /// Publishes the own records if they changed or their lease needs it, and spreads them.
    fn publish(&mut self, now: Instant) {
        let publication = Arc::clone(&self.publication.borrow());
        let mut records: BTreeMap<EntryKey, Entry> = publication.records.clone();
        records.insert(EntryKey::Node, Entry::Node(self.node.clone()));
        self.builder.set_local(publication.view.clone());
        match self.replica.publish(records, &Signer::new(&self.identity), clock::wall()) {
            Ok(Some(delta)) => {
                self.metrics.publishes.with_label_values(&["ok"]).inc();
                self.spread(&delta, now);
            }
            Ok(None) => {}
            Err(error) => {
                self.metrics.publishes.with_label_values(&["failed"]).inc();
                error!(%error, "own records cannot be published; the mesh keeps the old ones until they end");
            }
        }
        self.dirty.insert(self.node.name.clone());
    }

    fn spread(&mut self, delta: &Delta, now: Instant) {
        let Digest { node, generation, version, hash } = delta.digest();
        let small = wire::encode(delta).ok().filter(|payload| payload.len() < BROADCAST_BYTES_MAX);
        let is_spread = small.is_some_and(|payload| {
            self.core.broadcast(&Broadcast::Delta { node: node.clone(), generation, version, hash, payload }, now)
        });
        if !is_spread {
            self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, now);
        }
    }

    fn received(&mut self, from: &MeshId, broadcast: &Broadcast, now: Instant) {
        match broadcast {
            Broadcast::Delta { node, generation, version, hash, payload } => {
                let claimed = Digest { node: node.clone(), generation: *generation, version: *version, hash: *hash };
                match wire::decode::<Delta>(payload, BROADCAST_BYTES_MAX) {
                    Ok(delta) if delta.digest() == claimed => match self.merge(&delta) {
                        // Verified: passed on as it came.
                        Some(Applied::Updated) => {
                            self.core.broadcast(broadcast, now);
                        }
                        Some(Applied::Behind) => self.pull_whole(&from.name, &delta),
                        Some(Applied::Stale) | None => {}
                    },
                    Ok(_) | Err(_) => self.metrics.deltas.with_label_values(&["refused"]).inc(),
                }
            }
            Broadcast::IHave { node, generation, version, hash } => {
                let theirs = Digest { node: node.clone(), generation: *generation, version: *version, hash: *hash };
                if *node != self.node.name && !self.is_gone(node, *generation) {
                    let wanted = self.replica.wanted(&[theirs]);
                    self.pull(&from.name, node, wanted);
                }
            }
            // The core keeps goodbyes for itself.
            Broadcast::Leave(_) => {}
        }
    }

    /// Applies a delta from anybody; None if it does not count or is bad.
    fn merge(&mut self, delta: &Delta) -> Option<Applied> {
        let Digest { node, generation, .. } = delta.digest();
        if self.is_gone(&node, generation) {
            return None;
        }
        let wall = clock::wall();
        let result = self.replica.apply(delta, &Verifier::new(&self.identity, wall), wall);
        let label = match &result {
            Ok(Applied::Updated) => "updated",
            Ok(Applied::Stale) => "stale",
            Ok(Applied::Behind) => "behind",
            Err(_) => "refused",
        };
        self.metrics.deltas.with_label_values(&[label]).inc();
        match result {
            Ok(applied) => {
                if matches!(applied, Applied::Updated) {
                    self.refusals.remove(&node);
                    self.dirty.insert(node);
                    self.are_members_dirty = true;
                }
                Some(applied)
            }
            Err(error) => {
                self.refused(&node, &error);
                None
            }
        }
    }

    /// Logs a refusal once per node, until something of it is accepted: a peer may repeat bad records at will.
    fn refused(&mut self, node: &NodeName, error: &ApplyError) {
        if matches!(error, ApplyError::OwnName { .. }) {
            self.metrics.conflicts.inc();
        }
        if self.refusals.len() < REFUSALS_MAX && self.refusals.insert(node.clone()) {
            warn!(%node, %error, "records refused");
        }
    }

    /// Tells whether `node` left in this life or a later one: its records do not come back.
    fn is_gone(&self, node: &NodeName, generation: Generation) -> bool {
        let has_left = |member: &crate::membership::Tracked| member.status == MemberStatus::Left;
        self.core.member(node).is_some_and(|member| has_left(member) && member.id.life.generation >= generation)
    }

    fn pull_whole(&mut self, from: &NodeName, delta: &Delta) {
        let node = delta.node().clone();
        let none = Digest::none(node.clone());
        self.pull(from, &node, vec![none]);
    }

    fn pull(&mut self, from: &NodeName, node: &NodeName, have: Vec<Digest>) {
        let Some(connection) = self.links.open(from).cloned() else { return };
        if have.is_empty() || self.pulls.len() >= PULLS_MAX || !self.pulls.insert(node.clone()) {
            return;
        }
        let (node, from) = (node.clone(), from.clone());
        self.work.spawn(async move {
            let result = exchange::pull(&connection, have).await;
            Done::Pulled { node, from, result }
        });
    }

    fn take_pulled(&mut self, deltas: &[Delta], now: Instant) {
        for delta in deltas {
            if let Some(Applied::Updated) = self.merge(delta) {
                let Digest { node, generation, version, hash } = delta.digest();
                self.core.broadcast(&Broadcast::IHave { node, generation, version, hash }, now);
            }
        }
    }

    // Rounds.

    /// Compares with a random member, refreshes the own lease, ends others' leases, saves peers.
    fn tick(&mut self, now: Instant) {
        let jitter = self.rng.random_range(0.75..1.25);
        self.next_sync = now + self.sync_interval.mul_f64(jitter);
        self.publish(now);
        for node in self.replica.expire(clock::wall()) {
            info!(%node, "records ended: their node has not renewed them");
            self.dirty.insert(node);
        }
        let count = self.core.alive_count();
        if count > 0 {
            let chosen = self.rng.random_range(0..count);
            let peer = self.core.alive().nth(chosen).cloned();
            if let Some(peer) = peer {
                self.start_sync(&peer.name, SYNC_ROUNDS);
                if self.links.open(&peer.name).is_none() {
                    // The announce opens the link; the comparison follows with the next round.
                    self.core.announce(peer, now);
                }
            }
        }
        if self.are_peers_dirty && !self.is_saving {
            let (store, peers) = (Arc::clone(&self.peer_store), self.stored_peers());
            if !peers.is_empty() {
                self.is_saving = true;
                self.are_peers_dirty = false;
                self.work.spawn_blocking(move || {
                    store.save(peers);
                    Done::Saved
                });
            }
        }
    }

    fn start_sync(&mut self, peer: &NodeName, rounds: usize) {
        let Some(connection) = self.links.open(peer).cloned() else { return };
        if self.syncs.len() >= SYNCS_MAX || !self.syncs.insert(peer.clone()) {
            return;
        }
        let sync = exchange::sync(connection, peer.clone(), self.inputs_sender.clone(), rounds);
        let peer = peer.clone();
        self.work.spawn(async move { Done::Synced(peer, sync.await) });
    }

    fn stored_peers(&self) -> Vec<StoredPeer> {
        let stored = |member: &crate::membership::Tracked| StoredPeer {
            name: member.id.name.clone(),
            addr: member.id.addr,
            alive: member.status == MemberStatus::Alive,
        };
        let members = self.core.members().filter(|member| member.status != MemberStatus::Left);
        let mut peers: Vec<StoredPeer> = members.map(stored).collect();
        // Known from before and not heard of yet: still worth a call.
        for peer in &self.known_peers {
            if self.core.member(&peer.name).is_none() {
                peers.push(StoredPeer { alive: false, ..peer.clone() });
            }
        }
        peers.sort_by_key(|peer| !peer.alive);
        peers.truncate(STORED_PEERS_MAX);
        peers
    }

    // The end of each turn.

    /// Carries out what the core wants and publishes what changed, once.
    fn settle(&mut self, now: Instant) {
        while let Some(output) = self.core.poll_output() {
            match output {
                Output::Send { to, packet } => self.send(&to, packet, now),
                Output::Received { from, broadcast } => self.received(&from, &broadcast, now),
                Output::Changed { node, before, after } => self.member_changed(node, before, after, now),
                Output::Conflict { theirs } => self.name_claimed(theirs),
                Output::Renewed(id) => {
                    info!(renewals = id.life.renewals, "the mesh took this node for gone; it is back");
                    self.are_members_dirty = true;
                }
            }
        }
        for report in self.replica.take_reports() {
            match report {
                Report::OutOfScope { node, services, .. } => {
                    warn!(%node, ?services, "services outside the node's serve scope are not shown");
                }
                Report::Fork { node, generation, version } => {
                    warn!(%node, %generation, version, "a node signed two states of one version: is its disk a copy?");
                }
            }
        }
        for name in std::mem::take(&mut self.dirty) {
            let status = self.status_of(&name);
            self.builder.set_node(&name, self.replica.state(&name), status);
        }
        if let Some(snapshot) = self.builder.build() {
            self.publisher.publish(snapshot);
        }
        if std::mem::take(&mut self.are_members_dirty) {
            self.show_members();
        }
        self.metrics.connections.set(i64::try_from(self.links.count()).unwrap_or(i64::MAX));
    }

    fn status_of(&self, name: &NodeName) -> MemberStatus {
        if *name == self.node.name {
            // What runs here is served until the agent stops.
            return if self.core.has_left() { MemberStatus::Leaving } else { MemberStatus::Alive };
        }
        // Records of a node that the membership has not heard of: it may be gone for long.
        self.core.member(name).map_or(MemberStatus::Failed, |member| member.status)
    }

    fn member_changed(
        &mut self,
        node: NodeName,
        before: Option<MemberStatus>,
        after: Option<MemberStatus>,
        now: Instant,
    ) {
        self.are_members_dirty = true;
        self.are_peers_dirty = true;
        if before != after {
            let addr = self.core.member(&node).map(|member| tracing::field::display(member.id.addr));
            match (before, after) {
                (None, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member joined"),
                (_, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member is back"),
                (_, Some(MemberStatus::Failed)) => warn!(member = %node, addr, "member failed"),
                (_, Some(MemberStatus::Leaving)) => info!(member = %node, addr, "member is leaving"),
                (_, Some(MemberStatus::Left)) => info!(member = %node, addr, "member left"),
                (_, None) => info!(member = %node, "member forgotten"),
            }
        }
        match after {
            None | Some(MemberStatus::Left) => {
                self.replica.remove(&node);
                self.links.close(&node, "member left");
            }
            // Its connection waits longer and longer between probes; once the path heals, a fresh one is faster.
            Some(MemberStatus::Failed) if before != after => self.links.close(&node, "member failed"),
            Some(_) => {}
        }
        let was_alive = matches!(before, Some(MemberStatus::Alive | MemberStatus::Leaving));
        if was_alive && self.core.alive_count() == 0 && !self.core.has_left() {
            if after == Some(MemberStatus::Failed) {
                warn!("no other member answers: this node may be cut off");
            }
            self.join_pause = JOIN_PAUSE_MIN;
            self.next_join = now + JOIN_PAUSE_MIN;
        }
        self.dirty.insert(node);
    }

    fn name_claimed(&mut self, theirs: MeshId) {
        self.metrics.conflicts.inc();
        if self.conflict_seen.as_ref() != Some(&theirs) {
            error!(
                name = %theirs.name, here = %self.node.mesh_addr, there = %theirs.addr,
                generation_here = %self.generation(), generation_there = %theirs.life.generation,
                "another node goes by this node's name; stop one of them or give it another name"
            );
            self.conflict_seen = Some(theirs);
        }
    }

    fn conflict(&self, name: &NodeName, there: SocketAddr) {
        self.metrics.conflicts.inc();
        error!(%name, here = %self.node.mesh_addr, %there, "a node with this node's name and certificate connected");
    }

    fn show_members(&self) {
        let info = |name: &NodeName| self.replica.state(name).and_then(|state| state.info.clone());
        let own = MemberView {
            name: self.node.name.clone(),
            addr: self.node.mesh_addr,
            status: self.status_of(&self.node.name),
            generation: self.generation(),
            info: Some(Arc::new(self.node.clone())),
        };
        let mut members = vec![own];
        members.extend(self.core.members().map(|member| MemberView {
            name: member.id.name.clone(),
            addr: member.id.addr,
            status: member.status,
            generation: member.id.life.generation,
            info: info(&member.id.name),
        }));
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for status in [MemberStatus::Alive, MemberStatus::Leaving, MemberStatus::Left, MemberStatus::Failed] {
            let count = members.iter().filter(|member| member.status == status).count();
            self.metrics.members.with_label_values(&[status.as_str()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.metrics.nodes.set(i64::try_from(self.replica.nodes().count()).unwrap_or(i64::MAX));
        let has_failed = members.iter().any(|member| member.status == MemberStatus::Failed);
        let isolated = self.core.alive_count() == 0 && has_failed && !self.core.has_left();
        self.members.send_replace(Arc::new(Members { members, isolated }));
    }
}

/// Decides on a newcomer whose name is known; None: let it in.
fn judge_newcomer(known: &MeshId, status: MemberStatus, newcomer: &MeshId) -> Option<HelloReply> {
    let (theirs, ours) = (newcomer.life.generation, known.life.generation);
    if theirs == ours || theirs.number > ours.number {
        return None;
    }
    let is_alive = matches!(status, MemberStatus::Alive | MemberStatus::Leaving);
    if is_alive && known.addr != newcomer.addr {
        return Some(HelloReply::Refused(format!(
            "the name {} is taken by a live node at {} (you are at {}); take another name, or stop that node first",
            known.name, known.addr, newcomer.addr
        )));
    }
    (known.life > newcomer.life).then_some(HelloReply::Outdated(known.life))
}

/// Answers if the other side still waits.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    // The stream may have timed out: then nobody needs the answer.
    let _unwanted = reply.send(value);
}

fn empty_snapshot(local_node: NodeName, index: u64) -> Snapshot {
    Snapshot {
        index,
        local_node,
        nodes: BTreeMap::new(),
        services: BTreeMap::new(),
        gone_services: BTreeMap::new(),
        local: Arc::new(LocalView::default()),
    }
}

async fn send_on_stream(connection: &Connection, packet: &[u8]) -> Result<(), ExchangeError> {
    let mut stream = connection.open_uni().await?;
    wire::write_frame(&mut stream, packet).await?;
    let _finished_before = stream.finish();
    Ok(())
}

/// Reads datagrams and streams of one connection until it ends.
async fn read_connection(peer: NodeName, connection: Connection, inputs: mpsc::Sender<Input>, metrics: GossipMetrics) {
    let mut streams = JoinSet::new();
    loop {
        let has_room = streams.len() < STREAMS_PER_PEER_MAX;
        tokio::select! {
            datagram = connection.read_datagram() => {
                let Ok(packet) = datagram else { return };
                if inputs.try_send(Input::Packet(peer.clone(), packet)).is_err() {
                    metrics.dropped.with_label_values(&["queue_full"]).inc();
                }
            }
            stream = connection.accept_uni(), if has_room => {
                let Ok(stream) = stream else { return };
                streams.spawn(read_packet(peer.clone(), stream, inputs.clone()));
            }
            stream = connection.accept_bi(), if has_room => {
                let Ok(stream) = stream else { return };
                let (peer, inputs) = (peer.clone(), inputs.clone());
                streams.spawn(async move {
                    if let Err(error) = exchange::serve(peer.clone(), stream, inputs).await {
                        debug!(%peer, error = error.explain(None), "exchange failed");
                    }
                });
            }
            Some(ended) = streams.join_next() => {
                if let Err(error) = ended {
                    error!(%peer, %error, "stream task failed");
                }
            }
        }
    }
}

/// Reads one packet that did not fit a datagram.
async fn read_packet(peer: NodeName, mut stream: quinn::RecvStream, inputs: mpsc::Sender<Input>) {
    let read = tokio::time::timeout(exchange::TIME_MAX, wire::read_frame(&mut stream, PACKET_BYTES_MAX));
    let input = match read.await {
        Ok(Ok(packet)) => Input::Packet(peer, packet.into()),
        Ok(Err(WireError::TooLarge { .. })) => Input::Unreadable("too_large"),
        Ok(Err(_)) | Err(_) => Input::Unreadable("malformed"),
    };
    // The actor is gone only when the agent stops.
    let _stopping = inputs.send(input).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(addr: &str, number: u64, nonce: u64) -> MeshId {
        MeshId::new("a".parse().unwrap(), addr.parse().unwrap(), Generation { number, nonce })
    }

    #[test]
    fn a_newcomer_with_a_live_nodes_name_is_refused_with_both_addresses() {
        let known = id("10.0.0.1:8301", 1, 5);
        let reply = judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.2:8301", 1, 9));
        let Some(HelloReply::Refused(text)) = reply else { panic!("{reply:?}") };
        assert!(text.contains("10.0.0.1:8301") && text.contains("10.0.0.2:8301"), "{text}");
    }

    #[test]
    fn a_restart_is_let_in_at_any_address_while_its_old_life_still_seems_alive() {
        let known = id("10.0.0.1:8301", 1, 5);
        assert!(judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.2:8301", 2, 0)).is_none());
        assert!(judge_newcomer(&known, MemberStatus::Alive, &known).is_none());
    }

    #[test]
    fn a_free_name_is_told_to_come_back_above_its_remembered_life() {
        let known = id("10.0.0.1:8301", 7, 5);
        let gone = judge_newcomer(&known, MemberStatus::Failed, &id("10.0.0.2:8301", 1, 0));
        assert!(matches!(gone, Some(HelloReply::Outdated(life)) if life == known.life));
        // The disk was lost, the address is the same: the old process cannot be alive.
        let same_addr = judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.1:8301", 1, 0));
        assert!(matches!(same_addr, Some(HelloReply::Outdated(_))));
    }
}

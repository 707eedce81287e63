//! The gossip task: `select -> apply -> settle`.

mod joining;
mod records;
mod view;

use std::collections::{BTreeMap, BTreeSet};
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
use super::{Command, GossipError, GossipParams, Members, PeerStore, Prune};
use crate::catalogue::builder::Builder;
use crate::catalogue::{LocalView, Publisher, Snapshot, SnapshotReader};
use crate::clock;
use crate::membership::{Core, ForceLeaveError, Leave, MeshId, Output, PACKET_BYTES_MAX, Profile};
use crate::model::{Generation, MemberStatus, NodeInfo, NodeName, SpiffeId};
use crate::pki::Identity;
use crate::registry::Publication;
use crate::replica::{Applied, Delta, Digest, Params, Replica, Report};
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
    started_at: Instant,
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
        let profile = Profile { reconnect_timeout: params.reconnect_timeout, ..Profile::default() };
        let mut actor = Self {
            core: Core::new(id, profile, rand::random(), now),
            started_at: now,
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

//! The gossip task: `select -> apply -> settle`, the engine's sockets, streams and log.

mod beat;
mod connections;
mod events;
mod evidence;
#[cfg(test)]
mod fixture;
mod reaching;
mod reading;
mod share;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use self::beat::{Beat, Rhythm};
use self::connections::Ended;
use self::evidence::{Challenge, Hint, Holder, Watches};
pub(super) use self::reaching::ReachReply;
use self::reaching::Reaching;
use self::share::Shares;
use super::doubles::Doubles;
use super::engine::pace::Pace;
use super::engine::{
    self, Ending, Engine, Exchange, Incumbent, JoinCause, MEMBER_LEFT, Message, Output, Request, Stage, Step, Turn,
};
use super::exchange::{self, Desks, ExchangeError};
use super::links::{Links, Purpose};
use super::metrics::GossipMetrics;
use super::policy::Compiled;
use super::targets::{self, DialError, Outcome, Thorough};
use super::trust::{Chains, Signer, Verifier};
use super::{Command, GossipError, GossipParams, Members, PeerStore, Prune};
use crate::alarm;
use crate::catalogue::builder::Builder;
use crate::catalogue::{Publisher, Snapshot, SnapshotReader};
use crate::clock;
use crate::membership::{ForceLeaveError, MeshId, Profile, Stats};
use crate::model::{Demand, EjectionsRecord, Entry, EntryKey, NodeName};
use crate::pki::Identity;
use crate::registry::Publication;
use crate::replica;
use crate::store::StoredPeer;
use crate::supervise::{catch, catch_blocking};
use crate::transport::{Accepted, ControlTransport, LiveConnections, Refusals};
use crate::upstream;

/// Most messages from connections that wait; datagrams past it are dropped, streams wait. Each peer has a share of it.
const INPUTS_MAX: usize = 1024;
/// So many changes of other nodes are shown as they come, and then all of them once in [`SHOW_EVERY`]: each time costs a list
/// of all members and a wake-up of every worker and of whoever else follows the catalogue. While a mesh starts, two or three
/// changes come with each newcomer. What this node does itself is shown at once.
const SHOW_BURST: u32 = 8;
const SHOW_EVERY: Duration = Duration::from_millis(100);
/// How long a goodbye waits for peers that say that they heard it: some round trips, retransmissions included. The
/// datagrams have left the host long before.
const LEAVE_TIME_MAX: Duration = Duration::from_millis(500);

/// What connections and their streams tell or ask.
#[derive(Debug)]
pub(super) enum Input {
    Packet {
        from: NodeName,
        packet: Bytes,
        /// One of the peer's.
        place: OwnedSemaphorePermit,
    },
    Unreadable {
        from: NodeName,
        reason: &'static str,
    },
    Heard {
        peer: NodeName,
        stage: Stage,
        message: Message,
        reply: oneshot::Sender<Step>,
    },
    /// A peer asks how far this node is from the others.
    RoundTrips(oneshot::Sender<BTreeMap<NodeName, Duration>>),
}

/// Who waits for the end of an attempt to join; nobody, if the engine began it.
type JoinReply = Option<oneshot::Sender<Result<usize, GossipError>>>;

/// How a piece of work that the task began has ended.
#[derive(Debug)]
enum Done {
    Dialled(MeshId, Purpose, Result<Connection, DialError>),
    /// The peer's own connection came first.
    Superseded(NodeName, Purpose),
    Joined(Outcome, JoinReply),
    Exchanged {
        peer: NodeName,
        exchange: Exchange,
        result: Result<(), ExchangeError>,
    },
    ConnectionEnded(Ended),
    Saved,
    PacketSent,
    LeaveLate,
    /// Nobody has the port of this life's address.
    PortRefused(MeshId),
    /// Whether the host that was asked once refuses.
    PortAsked(MeshId, bool),
    /// A member of which something says that it is gone has had its time to show that it lives.
    Doubted {
        id: MeshId,
        hint: Hint,
        since: Instant,
    },
    /// What the holder of a name that a newcomer claims from elsewhere said.
    Challenged(Challenge, Holder),
}

#[derive(Debug)]
enum Event {
    Stop,
    Command(Command),
    Accepted(Accepted),
    Input(Input),
    Done(Done),
    Publication,
    /// Hosts that are said to refuse packets of the mesh port.
    Refused(Vec<SocketAddr>),
    Policy,
    Upstreams,
    Demand,
    Wake,
}

/// What the documents make of themselves, for the data plane.
pub(super) struct Rules {
    pub(super) policy: watch::Receiver<Compiled>,
    pub(super) upstreams: watch::Receiver<Arc<upstream::Table>>,
}

/// The task's state.
pub(super) struct Actor {
    engine: Engine,
    builder: Builder,
    doubles: Doubles,
    publisher: Publisher,
    members: watch::Sender<Arc<Members>>,
    links: Links,
    transport: ControlTransport,
    /// The data plane's connections: what comes there is a sign of life, too.
    tunnels: LiveConnections,
    identity: Arc<Identity>,
    chains: Chains,
    publication: watch::Receiver<Arc<Publication>>,
    has_publication_ended: bool,
    rules: Rules,
    has_policy_ended: bool,
    has_upstreams_ended: bool,
    ejections: watch::Receiver<Arc<EjectionsRecord>>,
    has_ejections_ended: bool,
    demand: watch::Receiver<Arc<Demand>>,
    has_demand_ended: bool,
    demands: mpsc::Sender<(NodeName, Demand)>,
    commands: mpsc::Receiver<Command>,
    incoming: mpsc::Receiver<Accepted>,
    inputs: mpsc::Receiver<Input>,
    inputs_sender: mpsc::Sender<Input>,
    work: JoinSet<Done>,
    stop: CancellationToken,
    metrics: GossipMetrics,
    stream_sends: usize,
    peer_store: Arc<dyn PeerStore>,
    /// Who waits until this node's goodbye was heard.
    leaving: Vec<oneshot::Sender<()>>,
    is_goodbye_over: bool,
    watches: Watches,
    beat: Beat,
    /// Members whose ports are being asked because others say that they crashed.
    asked: BTreeSet<MeshId>,
    /// Members that are given time to show that they live.
    doubted: BTreeSet<MeshId>,
    challenges: usize,
    refusals: Refusals,
    /// The number of the newest refusal that was looked at.
    refused_until: u64,
    desks: Desks,
    told: events::Told,
    shares: Shares,
    reaching: Reaching,
    /// Nodes whose records or status are not in the catalogue yet.
    unshown: BTreeSet<NodeName>,
    are_members_unshown: bool,
    show_pace: Pace,
    /// What the metrics show of the membership.
    stats_shown: Stats,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Actor").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// Calls `act` with the time and the keys of this moment.
fn with_turn<T>((identity, chains): (&Identity, &Chains), now: Instant, act: impl FnOnce(&Turn<'_>) -> T) -> T {
    let wall = clock::wall();
    let (signer, verifier) = (Signer::new(identity), Verifier::new(identity, chains, wall));
    act(&Turn { now, wall, signer: &signer, verifier: &verifier })
}

impl Actor {
    pub(super) fn new(
        params: GossipParams,
        commands: mpsc::Receiver<Command>,
        desks: Desks,
        rules: Rules,
        metrics: GossipMetrics,
    ) -> (Self, watch::Receiver<Arc<Members>>, SnapshotReader) {
        let now = clock::now();
        let name = params.node.name.clone();
        let (inputs_sender, inputs) = mpsc::channel(INPUTS_MAX);
        let (members, members_reader) = watch::channel(Arc::default());
        let publication = Arc::clone(&params.publication.borrow());
        let start = engine::Params {
            node: params.node,
            generation: params.generation,
            profile: Profile { reconnect_timeout: params.reconnect_timeout, ..Profile::default() },
            replica: replica::Params::default(),
            records: publication.records.clone(),
            seeds: params.seeds,
            known_peers: params.known_peers,
            sync_interval: params.sync_interval,
        };
        let chains = Chains::default();
        let engine = with_turn((&params.identity, &chains), now, |turn| Engine::new(start, rand::random(), turn));
        let mut actor = Self {
            engine,
            builder: Builder::new(name.clone(), params.first_index),
            doubles: Doubles::default(),
            publisher: Publisher::new(Arc::new(empty_snapshot(name, params.first_index))),
            members,
            links: Links::new(params.links_max),
            refusals: params.transport.refusals(),
            told: events::Told::default(),
            shares: Shares::default(),
            refused_until: 0,
            transport: params.transport,
            tunnels: params.tunnels,
            identity: params.identity,
            chains,
            publication: params.publication,
            has_publication_ended: false,
            rules,
            has_policy_ended: false,
            has_upstreams_ended: false,
            ejections: params.ejections,
            has_ejections_ended: false,
            demand: params.demand,
            has_demand_ended: false,
            demands: params.demands,
            commands,
            incoming: params.incoming,
            inputs,
            inputs_sender,
            work: JoinSet::new(),
            stop: params.stop,
            metrics,
            stream_sends: 0,
            peer_store: params.peer_store,
            leaving: Vec::new(),
            is_goodbye_over: false,
            watches: Watches::default(),
            beat: Beat::new(Rhythm::of((0, 1), 0)),
            asked: BTreeSet::new(),
            doubted: BTreeSet::new(),
            challenges: 0,
            desks,
            reaching: Reaching::default(),
            unshown: BTreeSet::new(),
            are_members_unshown: false,
            show_pace: Pace::new(SHOW_BURST, SHOW_EVERY, now),
            stats_shown: Stats::default(),
        };
        actor.builder.set_local(publication.view.clone());
        actor.take_policy();
        actor.take_upstreams();
        actor.settle(now);
        let reader = actor.publisher.reader();
        (actor, members_reader, reader)
    }

    /// Runs until the token ends it.
    pub(super) async fn run(mut self) {
        let node = self.engine.node();
        info!(node = %node.name, addr = %node.mesh_addr, generation = %self.engine.generation(), "gossip started");
        loop {
            let event = self.select().await;
            if matches!(event, Event::Stop) {
                break;
            }
            self.step(event).await;
        }
        self.links.close_every("agent stops");
        self.work.shutdown().await;
        if let Some(peers) = self.engine.unsaved_peers() {
            let store = Arc::clone(&self.peer_store);
            if let Err(error) = tokio::task::spawn_blocking(move || store.save(peers)).await {
                error!(%error, "known peers were not saved");
            }
        }
    }

    /// Acts on `event` and on what is due.
    async fn step(&mut self, event: Event) {
        let now = clock::now();
        self.apply(event, now);
        if self.engine.poll_timeout() <= now {
            // Whoever reads sockets and connections has its turn: what lies there has come before the time was over.
            tokio::task::yield_now().await;
            let now = clock::now();
            self.drain_inputs(now);
            // What sockets say of peers comes before the verdict over them.
            let peers = self.engine.membership().in_question();
            self.tell_signs_of_life(peers, now);
            self.turn(now, Engine::handle_timeout);
        }
        self.keep_beat(now);
        self.settle(now);
    }

    /// Waits for the next event. Cancel safe: every branch is.
    async fn select(&mut self) -> Event {
        let others = [self.show_at(), self.beat.at()];
        let wake = others.into_iter().flatten().fold(self.engine.poll_timeout(), Ord::min);
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(command) = self.commands.recv() => Event::Command(command),
            Some(accepted) = self.incoming.recv() => Event::Accepted(accepted),
            Some(input) = self.inputs.recv() => Event::Input(input),
            Some(done) = self.work.join_next() => match done {
                Ok(done) => Event::Done(done),
                // A watch that is over.
                Err(error) if error.is_cancelled() => Event::Wake,
                Err(error) => {
                    error!(%error, "gossip work failed");
                    Event::Wake
                }
            },
            changed = self.publication.changed(), if !self.has_publication_ended => {
                self.has_publication_ended = changed.is_err();
                Event::Publication
            }
            addrs = self.refusals.next(&mut self.refused_until) => Event::Refused(addrs),
            changed = self.ejections.changed(), if !self.has_ejections_ended => {
                self.has_ejections_ended = changed.is_err();
                Event::Publication
            }
            changed = self.demand.changed(), if !self.has_demand_ended => {
                self.has_demand_ended = changed.is_err();
                if changed.is_ok() { Event::Demand } else { Event::Wake }
            }
            changed = self.rules.upstreams.changed(), if !self.has_upstreams_ended => {
                self.has_upstreams_ended = changed.is_err();
                Event::Upstreams
            }
            changed = self.rules.policy.changed(), if !self.has_policy_ended => {
                self.has_policy_ended = changed.is_err();
                Event::Policy
            }
            () = alarm::sleep_until(wake) => Event::Wake,
        }
    }

    fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Command(command) => self.command(command, now),
            Event::Accepted(accepted) => self.accepted(accepted, now),
            Event::Input(input) => self.input(input, now),
            Event::Done(done) => self.done(done, now),
            Event::Publication => {
                let publication = Arc::clone(&self.publication.borrow_and_update());
                self.builder.set_local(publication.view.clone());
                let ejections = Arc::clone(&self.ejections.borrow_and_update());
                let mut records = publication.records.clone();
                if !ejections.instances.is_empty() {
                    records.insert(EntryKey::Ejections, Entry::Ejections(ejections));
                }
                self.turn(now, |engine, turn| engine.handle_records(records, turn));
            }
            Event::Refused(addrs) => addrs.into_iter().for_each(|addr| self.refusal_heard(addr, now)),
            Event::Demand => {
                let demand = Demand::clone(&self.demand.borrow_and_update());
                self.metrics.demand_reports.with_label_values(&["sent"]).inc();
                self.turn(now, |engine, turn| engine.handle_demand(demand, turn));
            }
            Event::Policy => self.take_policy(),
            Event::Upstreams => self.take_upstreams(),
            // What is due runs afterwards.
            Event::Stop | Event::Wake => {}
        }
    }

    /// Publishes the newest table of intentions, and the newest chains, with the next snapshot.
    fn take_policy(&mut self) {
        let Compiled { table, traffic } = self.rules.policy.borrow_and_update().clone();
        self.builder.set_policy(table);
        self.builder.set_traffic(traffic);
    }

    /// Publishes the newest settings of how instances are called with the next snapshot.
    fn take_upstreams(&mut self) {
        let table = Arc::clone(&self.rules.upstreams.borrow_and_update());
        self.builder.set_upstreams(table);
    }

    /// Hands over what has arrived: it counts before anybody is taken for silent. One queue's length at most.
    fn drain_inputs(&mut self, now: Instant) {
        for _ in 0..INPUTS_MAX {
            let Ok(input) = self.inputs.try_recv() else { return };
            self.input(input, now);
        }
    }

    /// Lets the engine act with the time and the keys of this moment.
    fn turn<T>(&mut self, now: Instant, act: impl FnOnce(&mut Engine, &Turn<'_>) -> T) -> T {
        with_turn((&self.identity, &self.chains), now, |turn| act(&mut self.engine, turn))
    }

    // Orders.

    fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Join(targets, reply) => self.start_join(targets, Some(reply)),
            Command::Leave(reply) => {
                if self.is_goodbye_over {
                    return answer(reply, ());
                }
                info!(node = %self.engine.node().name, "leaving the mesh");
                self.leaving.push(reply);
                self.turn(now, Engine::leave);
                self.work.spawn(async move {
                    tokio::time::sleep(LEAVE_TIME_MAX).await;
                    Done::LeaveLate
                });
            }
            Command::ForceLeave(name, prune, reply) => {
                let is_pruned = prune == Prune::Forget;
                let result = self.turn(now, |engine, turn| engine.force_leave(&name, is_pruned, turn));
                let result = result.map_err(|error| match error {
                    ForceLeaveError::Unknown => GossipError::UnknownMember(name.to_string()),
                    ForceLeaveError::Alive => GossipError::MemberAlive(name),
                });
                answer(reply, result);
            }
            Command::Trust => self.turn(now, Engine::handle_trust),
            Command::Link(peer, reply) => answer(reply, self.links.open(&peer).cloned()),
            Command::RoundTrips(reply) => answer(reply, self.round_trips(now)),
            Command::Certificates(reply) => answer(reply, self.certificates()),
            Command::RecordsHash(reply) => answer(reply, self.engine.replica().set_hash()),
            Command::Reach(peer, reply) => self.reach(peer, reply, now),
        }
    }

    fn start_join(&mut self, targets: Vec<String>, reply: JoinReply) {
        let thorough = if reply.is_some() { Thorough::All } else { Thorough::Enough };
        let own = self.engine.membership().id().clone();
        let join = targets::join_all(self.transport.clone(), own, targets, thorough);
        self.work.spawn(async move { Done::Joined(join.await, reply) });
    }

    fn joined(&mut self, outcome: Outcome, reply: JoinReply, now: Instant) {
        let Outcome { join, connections } = outcome;
        let cause = if reply.is_some() { JoinCause::Order } else { JoinCause::Engine };
        let count = join.joined.len();
        self.metrics.exchanged("join", count > 0);
        let reasons: Vec<String> = join.failed.iter().map(|(target, why)| format!("{target}: {why}")).collect();
        for (peer, connection) in join.joined.iter().zip(connections) {
            self.watch(&peer.id.name, Some(peer.id.clone()), connection.clone());
            let waiting = self.links.accepted(&self.engine.membership().id().name, &peer.id.name, connection);
            self.resend(&peer.id, waiting, now);
            self.reached(&peer.id.name);
        }
        self.turn(now, |engine, turn| engine.handle_joined(cause, join, turn));
        match reply {
            Some(reply) if count > 0 => answer(reply, Ok(count)),
            Some(reply) => answer(reply, Err(GossipError::Join(reasons.join("\n")))),
            None => {}
        }
    }

    // Exchanges, and what is kept.

    fn begin(&mut self, peer: NodeName, exchange: Exchange, first: (Message, Stage), now: Instant) {
        let Some(connection) = self.links.open(&peer).cloned() else {
            self.turn(now, |engine, turn| engine.handle_end(&exchange, Ending::NoLink, turn));
            return;
        };
        let carried = exchange::begin(connection.clone(), peer.clone(), first, self.inputs_sender.clone());
        self.work.spawn(async move {
            let mut result = catch("exchange", carried).await.unwrap_or(Err(ExchangeError::Panicked));
            // Whoever takes a goodbye lets go of the connection, mostly before its answer is out.
            if matches!(exchange, Exchange::Goodbye(_)) && is_let_go(&connection) {
                result = Ok(());
            }
            Done::Exchanged { peer, exchange, result }
        });
    }

    fn save_peers(&mut self, peers: Vec<StoredPeer>) {
        let store = Arc::clone(&self.peer_store);
        self.work.spawn_blocking(move || {
            let _unsaved = catch_blocking("peers", || store.save(peers));
            Done::Saved
        });
    }

    fn done(&mut self, done: Done, now: Instant) {
        match done {
            Done::Superseded(peer, purpose) => self.superseded(&peer, purpose, now),
            Done::Dialled(to, purpose, dialled) => self.dial_ended(&to, purpose, dialled, now),
            Done::Joined(outcome, reply) => self.joined(outcome, reply, now),
            Done::Exchanged { peer, exchange, result } => {
                let kind = exchange.kind();
                self.metrics.exchanged(kind, result.is_ok());
                let ending = if result.is_ok() { Ending::Complete } else { Ending::Failed };
                if let Err(error) = result {
                    debug!(%peer, kind, error = error.explain(None), "exchange failed");
                }
                self.turn(now, |engine, turn| engine.handle_end(&exchange, ending, turn));
            }
            Done::ConnectionEnded(ended) => self.connection_ended(&ended, now),
            Done::Saved => self.engine.peers_saved(),
            Done::PacketSent => self.stream_sends = self.stream_sends.saturating_sub(1),
            Done::LeaveLate => self.goodbye_over(),
            Done::PortRefused(id) => self.port_refused(&id, now),
            Done::PortAsked(id, is_refused) => self.port_asked(&id, is_refused, now),
            Done::Doubted { id, hint, since } => self.doubted(&id, hint, since, now),
            Done::Challenged(challenge, holder) => self.challenged(challenge, holder, now),
        }
    }

    fn input(&mut self, input: Input, now: Instant) {
        match input {
            Input::Packet { from, packet, place } => {
                self.links.heard(&from);
                self.metrics.received.inc();
                self.metrics.received_bytes.inc_by(packet.len() as u64);
                self.turn(now, |engine, turn| engine.handle_packet(&from, &packet, turn));
                drop(place);
            }
            Input::RoundTrips(reply) => answer(reply, self.round_trips(now)),
            Input::Unreadable { from, reason } => {
                self.metrics.refused.with_label_values(&[reason]).inc();
                self.unreadable(&from);
            }
            Input::Heard { peer, message: Message::Request(Request::Hello(id)), reply, .. } => {
                self.greeted(Challenge { peer, id, reply }, now);
            }
            Input::Heard { peer, stage, message, reply } => {
                let step = self.turn(now, |engine, turn| engine.handle_message(&peer, stage, message, turn));
                answer(reply, step);
            }
        }
    }

    // The end of each turn.

    /// Carries out what the engine wants and publishes what changed, once, or soon.
    fn settle(&mut self, now: Instant) {
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::Send { to, packet } => self.send(&to, packet, now),
                Output::Close { peer, reason } => {
                    self.links.close(&peer, reason);
                    self.not_reached(&peer, reason);
                }
                Output::Exchange { peer, exchange, message, stage } => {
                    self.begin(peer, exchange, (message, stage), now);
                }
                Output::Join { targets } => self.start_join(targets, None),
                Output::SavePeers(peers) => self.save_peers(peers),
                Output::AskPort(id) => self.ask_port(id),
                Output::Demand { node, demand } => {
                    self.metrics.demand_reports.with_label_values(&["heard"]).inc();
                    // Its author tells it again.
                    let _is_full = self.demands.try_send((node, demand));
                }
                Output::Event(event) => self.event(event),
            }
        }
        if let Some(linked) = self.links.take_changed() {
            self.metrics.connections.set(i64::try_from(linked.len()).unwrap_or(i64::MAX));
            self.engine.set_linked(linked);
        }
        self.show_what_changed(now);
        let stats = self.engine.membership().stats();
        if stats != self.stats_shown {
            self.stats_shown = stats;
            self.metrics.show_membership(&stats);
        }
    }
}

/// Answers if the other side still waits.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    // The stream may have timed out: then nobody needs the answer.
    let _unwanted = reply.send(value);
}

/// Tells whether the peer closed the connection because this node left.
fn is_let_go(connection: &Connection) -> bool {
    let reason = connection.close_reason();
    matches!(reason, Some(quinn::ConnectionError::ApplicationClosed(close)) if close.reason == MEMBER_LEFT.as_bytes())
}

fn empty_snapshot(local_node: NodeName, index: u64) -> Snapshot {
    Snapshot { index, ..Snapshot::empty(local_node) }
}

//! Gossip without input or output: membership, replica and what ties them together, as one state machine.
//!
//! ```text
//!   packets, messages of exchanges,       handle_*(…, turn)          Send, Exchange, Join, Close, SavePeers, Event
//!   outcomes of joins, own records ------> Core + Replica ---------> poll_output()
//!   timer ------------------------------->  rounds, joining          poll_timeout()
//! ```
//!
//! The same engine runs in the agent (over QUIC, `gossip::actor`) and in the simulator (tests/sim).
//!
//! Invariants:
//! - No clock, socket, task or source of randomness: a [`Turn`] brings the time and the keys, the seed comes at the start.
//!   Equal inputs give equal outputs.
//! - Whoever calls a `handle_*` takes every output afterwards; one input causes a bounded number of them.
//! - A record counts only when its own node's signature over it was checked, whoever passed it on.
//! - Exchanges, remembered refusals and peers to keep are bounded by the constants below; losing an exchange loses no
//!   data for good: the next comparison repairs.
//!
//! Not here: connections (`gossip::links`), streams and their time limits (`gossip::exchange`), names to addresses
//! (`gossip::targets`), the catalogue and the log (`gossip::actor`).

mod answer;
mod goodbye;
mod joining;
mod message;
pub(super) mod pace;
mod records;
mod rounds;
#[cfg(test)]
mod tests;
mod vouch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use self::goodbye::Goodbye;
pub use self::goodbye::MEMBER_LEFT;
pub use self::joining::{Attempt, Incumbent, JoinCause, JoinOutcome, Welcomed};
pub use self::message::{
    DELTAS_BYTES_MAX, DIGESTS_MAX, Ending, Exchange, Held, HelloReply, Message, Request, Stage, Step, SyncReply, Trade,
    WELCOME_MEMBERS_MAX,
};
use self::pace::Pace;
use self::records::Wanted;
use crate::clock::UnixSeconds;
use crate::membership::{self, Core, ForceLeaveError, MeshId, Profile, Refused};
use crate::model::{Demand, Entry, EntryKey, Generation, MemberStatus, NodeInfo, NodeName};
use crate::replica::{self, ApplyError, HeadSigner, HeadVerifier, PublishError, Replica, Report};
use crate::store::StoredPeer;

/// Most comparisons begun at once.
pub const SYNCS_MAX: usize = 8;
/// Most pulls at once, one per peer.
pub const PULLS_MAX: usize = 8;
/// So many pulls begin as soon as somebody tells of what this node lacks, and then one in [`PULL_EVERY`]: while many nodes
/// start, each of which everybody has to learn of, one pull brings several.
const PULL_BURST: u32 = 8;
const PULL_EVERY: Duration = Duration::from_millis(200);
/// Most states that wait for a pull; comparisons bring the others.
pub const WANTED_MAX: usize = 1024;
/// Rounds of a periodic comparison, and of the first one after a join, which moves the whole catalogue.
const SYNC_ROUNDS: usize = 3;
const JOIN_SYNC_ROUNDS: usize = 64;
/// First and longest pause between attempts to join.
const JOIN_PAUSE_MIN: Duration = Duration::from_millis(500);
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(30);
/// A second renewal within this time makes a node ask whether a later life of it is remembered.
const DOUBT_TIME: Duration = Duration::from_secs(30);
/// Most known peers that are tried per attempt, beside the seeds.
const JOIN_PEERS_MAX: usize = 48;
/// Silence of everybody after which a node takes itself for isolated: it asks somebody every half second.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// A timer that is served so late says that this process did not run.
const SLEPT_MIN: Duration = Duration::from_secs(1);
/// Most peers that are kept on disk.
pub const STORED_PEERS_MAX: usize = 512;
/// Most nodes whose refused records are remembered as told.
pub const REFUSALS_MAX: usize = 1024;

/// What an engine starts with.
#[derive(Debug)]
pub struct Params {
    /// This node's facts; its mesh address is the one that others dial.
    pub node: NodeInfo,
    /// This start's generation, already on disk.
    pub generation: Generation,
    /// The timing of SWIM.
    pub profile: Profile,
    /// The bounds of the replica.
    pub replica: replica::Params,
    /// The own records, without the node's facts.
    pub records: BTreeMap<EntryKey, Entry>,
    /// Where to join, as the operator wrote it.
    pub seeds: Vec<String>,
    /// Peers known from the last run.
    pub known_peers: Vec<StoredPeer>,
    /// How often a random member is compared with.
    pub sync_interval: Duration,
}

/// The time and the keys of one call.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// Monotonic time: timers.
    pub now: Instant,
    /// Wall time: leases and certificates alone.
    pub wall: UnixSeconds,
    /// Signs the own records.
    pub signer: &'a dyn HeadSigner,
    /// Checks others'.
    pub verifier: &'a dyn HeadVerifier,
}

impl std::fmt::Debug for Turn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn").field("now", &self.now).field("wall", &self.wall).finish_non_exhaustive()
    }
}

/// What the owner of the engine has to do.
#[derive(Debug)]
pub enum Output {
    /// Send `packet` to `to`, as a datagram; it may be lost.
    Send {
        /// Who gets it.
        to: MeshId,
        /// At most [`membership::PACKET_BYTES_MAX`] bytes.
        packet: Bytes,
    },
    /// Close every connection to `peer`.
    Close {
        /// Whose.
        peer: NodeName,
        /// For the peer's log.
        reason: &'static str,
    },
    /// Say `message` on a new stream to `peer` and wait for what `stage` names; tell [`Engine::handle_end`] how it ended.
    Exchange {
        /// With whom.
        peer: NodeName,
        /// Its name.
        exchange: Exchange,
        /// The first message.
        message: Message,
        /// What is awaited then.
        stage: Stage,
    },
    /// Say hello to each of `targets` and tell [`Engine::handle_joined`] what came of it.
    Join {
        /// Addresses, or what the operator wrote.
        targets: Vec<String>,
    },
    /// Keep these peers for the next start, then call [`Engine::peers_saved`].
    SavePeers(Vec<StoredPeer>),
    /// A member told what it asks of limits that hold for the whole mesh.
    Demand {
        /// Who.
        node: NodeName,
        /// How much, in place of what it told before.
        demand: Demand,
    },
    /// Ask the port of this member; call [`Engine::evidence_crashed`] if its host refuses it. It may be given up.
    AskPort(MeshId),
    /// Something that is logged or counted.
    Event(Event),
}

/// What an operator or a metric is told.
#[derive(Debug)]
pub enum Event {
    /// A member came, went, or has another identity.
    MemberChanged {
        /// Who.
        node: NodeName,
        /// Where it is reached, if it is still known.
        addr: Option<SocketAddr>,
        /// What it was.
        before: Option<MemberStatus>,
        /// What it is.
        after: Option<MemberStatus>,
    },
    /// Nobody else answers: this node may be cut off.
    Isolated,
    /// Somebody answers again.
    Connected,
    /// So many peers have said that they heard this node's goodbye; no more are asked.
    GoodbyeHeard(usize),
    /// The others took this node for failed; it is back under a new identity.
    Renewed(MeshId),
    /// A peer remembered a later life of this name; this one goes on above it.
    Outlived(Generation),
    /// A statement about members could not be signed.
    Unsigned(String),
    /// A peer remembers a life of this name that cannot be: so far ahead that it is ignored.
    Implausible(Generation),
    /// Another node goes by this node's name.
    Conflict {
        /// The other.
        theirs: MeshId,
        /// Whether it is another than the last time.
        is_news: bool,
    },
    /// An attempt to join has ended.
    Joined {
        /// How many in a row, this one included, have brought nobody; 0 if this one has.
        in_vain: u32,
        /// Who let this node in.
        peers: Vec<MeshId>,
        /// Target and reason.
        failed: Vec<(String, String)>,
    },
    /// A packet was refused.
    PacketRefused {
        /// Who sent it.
        from: NodeName,
        /// Why.
        reason: Refused,
    },
    /// The own records were published, or could not be.
    Published(Result<(), PublishError>),
    /// A delta came; the label of the metric.
    Delta(&'static str),
    /// Records were refused.
    Refused {
        /// Whose.
        node: NodeName,
        /// Why.
        error: ApplyError,
        /// Whether it is the first time since something of this node was accepted.
        is_news: bool,
    },
    /// A node's certificate was revoked; its records are gone.
    Revoked(NodeName),
    /// A node's records ended with their lease.
    LeaseEnded(NodeName),
    /// The replica has something to say.
    Report(Report),
}

/// How much an engine holds, for tests of its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Other members, gone ones included.
    pub members: usize,
    /// What the membership holds beside them.
    pub core: membership::Sizes,
    /// Nodes whose records are held.
    pub nodes: usize,
    /// Most removals remembered of one node.
    pub grave_max: usize,
    /// Comparisons that it began.
    pub syncs: usize,
    /// Pulls that it began.
    pub pulls: usize,
    /// States that it wants to pull.
    pub wanted: usize,
    /// Nodes whose records were refused and told.
    pub refusals: usize,
    /// Outputs that nobody has taken yet.
    pub outputs: usize,
}

/// The gossip of one node.
pub struct Engine {
    node: NodeInfo,
    started_at: Instant,
    core: Core,
    replica: Replica,
    replica_params: replica::Params,
    records: BTreeMap<EntryKey, Entry>,
    rng: StdRng,
    outputs: VecDeque<Output>,
    /// Nodes whose records or status changed since they were taken.
    dirty: BTreeSet<NodeName>,
    are_members_dirty: bool,
    sync_interval: Duration,
    next_sync: Instant,
    ticks: u32,
    syncs: BTreeSet<NodeName>,
    /// Peers that are asked for states at this moment.
    pulls: BTreeSet<NodeName>,
    /// States that others hold and this node lacks, by node.
    wanted: BTreeMap<NodeName, Wanted>,
    pull_pace: Pace,
    seeds: Vec<String>,
    known_peers: Vec<StoredPeer>,
    is_saving: bool,
    /// Whether this life has kept any peers yet.
    has_saved: bool,
    are_peers_dirty: bool,
    join_pause: Duration,
    next_join: Instant,
    join_attempts: usize,
    /// Attempts of the engine's since the last one that brought somebody.
    joins_in_vain: u32,
    is_joining: bool,
    was_isolated: bool,
    /// When any peer was last heard.
    heard_at: Instant,
    goodbye: Option<Goodbye>,
    /// The last time that the others took this node for gone.
    renewed_at: Option<Instant>,
    /// They did so again soon after: a peer may remember a later life of this name.
    is_doubted: bool,
    conflict_seen: Option<MeshId>,
    /// Nodes whose records were refused and told.
    refusals: BTreeSet<NodeName>,
    /// Nodes whose certificate was revoked; they count as failed until they publish under another.
    revoked: BTreeSet<NodeName>,
    /// The own certificates are others since the last tick.
    has_new_chain: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("core", &self.core).finish_non_exhaustive()
    }
}

impl Engine {
    /// Makes the engine of a node that is alone, with its own records published.
    pub fn new(params: Params, seed: u64, turn: &Turn<'_>) -> Self {
        let now = turn.now;
        let name = params.node.name.clone();
        let id = MeshId::new(name.clone(), params.node.mesh_addr, params.generation);
        let mut rng = StdRng::seed_from_u64(seed);
        let ticks = rng.random_range(0..64);
        let mut known_peers = params.known_peers;
        known_peers.retain(|peer| peer.name != name);
        known_peers.sort_by_key(|peer| !peer.alive);
        let mut engine = Self {
            started_at: now,
            core: Core::new(id, params.profile, rng.random(), now),
            replica: Replica::new(name, params.generation, params.replica.clone()),
            replica_params: params.replica,
            records: params.records,
            rng,
            outputs: VecDeque::new(),
            dirty: BTreeSet::new(),
            are_members_dirty: true,
            next_sync: now + params.sync_interval,
            ticks,
            sync_interval: params.sync_interval,
            syncs: BTreeSet::new(),
            pulls: BTreeSet::new(),
            wanted: BTreeMap::new(),
            pull_pace: Pace::new(PULL_BURST, PULL_EVERY, now),
            seeds: params.seeds,
            known_peers,
            is_saving: false,
            has_saved: false,
            are_peers_dirty: false,
            join_pause: JOIN_PAUSE_MIN,
            next_join: now,
            join_attempts: 0,
            joins_in_vain: 0,
            is_joining: false,
            was_isolated: false,
            heard_at: now,
            goodbye: None,
            renewed_at: None,
            is_doubted: false,
            conflict_seen: None,
            refusals: BTreeSet::new(),
            revoked: BTreeSet::new(),
            has_new_chain: false,
            node: params.node,
        };
        engine.publish(turn);
        engine.settle(turn);
        engine
    }

    // What is known.

    /// This node's facts.
    pub fn node(&self) -> &NodeInfo {
        &self.node
    }

    /// When it was made.
    pub fn started_at(&self) -> Instant {
        self.started_at
    }

    /// The generation of this life.
    pub fn generation(&self) -> Generation {
        self.core.id().life.generation
    }

    /// Who is alive.
    pub fn membership(&self) -> &Core {
        &self.core
    }

    /// Tells to whom connections lead.
    pub fn set_linked(&mut self, linked: BTreeSet<NodeName>) {
        self.core.set_linked(linked);
    }

    /// Who published what.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// What the membership says of `name`, this node included.
    pub fn status_of(&self, name: &NodeName) -> MemberStatus {
        if *name == self.node.name {
            // What runs here is served until the agent stops.
            return if self.core.has_left() { MemberStatus::Leaving } else { MemberStatus::Alive };
        }
        if self.revoked.contains(name) {
            return MemberStatus::Failed;
        }
        // Records of a node that the membership has not heard of: it may be gone for long.
        self.core.member(name).map_or(MemberStatus::Failed, |member| member.status)
    }

    /// Tells whether nobody else answers, though there are others: this node may be cut off. Then what it says of others
    /// is what it last knew.
    pub fn is_isolated(&self) -> bool {
        self.was_isolated
    }

    /// Decides on it: nobody is left, or nobody was heard for [`SILENCE_MAX`]. A node whose own link is down so says it
    /// before it has called each of the others dead.
    fn find_isolation(&self, now: Instant) -> bool {
        let has_failed = || self.core.members().any(|member| member.status == MemberStatus::Failed);
        let is_silent = now.saturating_duration_since(self.heard_at) >= SILENCE_MAX;
        match self.core.alive_count() {
            0 => self.joins_in_vain > 0 || has_failed(),
            _ => is_silent,
        }
    }

    /// Returns how much is held.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            members: self.core.members().count(),
            core: self.core.sizes(),
            nodes: self.replica.nodes().count(),
            grave_max: self.replica.nodes().map(|(_, state)| state.grave_len()).max().unwrap_or(0),
            syncs: self.syncs.len(),
            pulls: self.pulls.len(),
            wanted: self.wanted.len(),
            refusals: self.refusals.len(),
            outputs: self.outputs.len(),
        }
    }

    /// Takes the names of the nodes whose records or status changed since the last call.
    pub fn take_dirty(&mut self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.dirty)
    }

    /// Tells whether the list of members changed since the last call.
    pub fn take_members_changed(&mut self) -> bool {
        std::mem::take(&mut self.are_members_dirty)
    }

    // What the owner tells.

    /// Acts on `packet` from the peer that TLS verified as `from`.
    pub fn handle_packet(&mut self, from: &NodeName, packet: &[u8], turn: &Turn<'_>) {
        self.heard_at = turn.now;
        if let Err(reason) = self.core.handle_packet(from, packet, turn.now) {
            self.tell(Event::PacketRefused { from: from.clone(), reason });
            if reason == Refused::Sender {
                let reason = "the sender is not the member that the packet names";
                self.outputs.push_back(Output::Close { peer: from.clone(), reason });
            }
        }
        self.settle(turn);
    }

    /// Notes how an exchange ended.
    pub fn handle_end(&mut self, exchange: &Exchange, ending: Ending, turn: &Turn<'_>) {
        match exchange {
            Exchange::Sync(peer) => {
                self.syncs.remove(peer);
                let member = self.core.member(peer).map(|member| member.id.clone());
                if let Some(id) = member.filter(|_| ending == Ending::NoLink) {
                    // The announce opens the link; the comparison follows with the next round.
                    self.core.announce(id, turn.now);
                }
            }
            Exchange::Pull(peer) => self.pull_ended(peer, ending),
            Exchange::Goodbye(_) => self.goodbye_ended(ending),
        }
        self.settle(turn);
    }

    /// Replaces the own records (without the node's facts) and publishes them if they differ.
    pub fn handle_records(&mut self, records: BTreeMap<EntryKey, Entry>, turn: &Turn<'_>) {
        self.records = records;
        self.publish(turn);
        self.settle(turn);
    }

    /// Tells the mesh what this node asks of limits that hold for all of it.
    pub fn handle_demand(&mut self, demand: Demand, turn: &Turn<'_>) {
        self.core.claim_demand(demand);
        self.settle(turn);
    }

    /// Drops the records of nodes whose certificates are no longer believed; those nodes count as failed at once.
    pub fn handle_trust(&mut self, turn: &Turn<'_>) {
        for node in self.replica.drop_unless(|chain| turn.verifier.is_good(chain)) {
            self.tell(Event::Revoked(node.clone()));
            self.outputs.push_back(Output::Close { peer: node.clone(), reason: "certificate revoked" });
            self.are_members_dirty = true;
            self.revoked.insert(node.clone());
            self.core.expel(&node, turn.now);
            self.dirty.insert(node);
        }
        self.settle(turn);
    }

    /// Notes that the peers of [`Output::SavePeers`] are kept.
    pub fn peers_saved(&mut self) {
        self.is_saving = false;
    }

    /// Says goodbye for a failed member; with `prune` everybody forgets it.
    ///
    /// # Errors
    /// If there is no such member or it answers.
    pub fn force_leave(&mut self, name: &NodeName, prune: bool, turn: &Turn<'_>) -> Result<(), ForceLeaveError> {
        let result = self.core.force_leave(name, prune, turn.now);
        self.settle(turn);
        result
    }

    /// Runs what is due.
    pub fn handle_timeout(&mut self, turn: &Turn<'_>) {
        if turn.now.saturating_duration_since(self.poll_timeout()) > SLEPT_MIN {
            // This process was stopped: what the others sent meanwhile has yet to be read.
            self.heard_at = turn.now;
        }
        if self.core.poll_timeout() <= turn.now {
            self.core.handle_timeout(turn.now);
        }
        if self.next_sync <= turn.now {
            self.tick(turn);
        }
        if self.join_at().is_some_and(|at| at <= turn.now) {
            self.join_again(turn.now);
        }
        self.settle(turn);
    }

    /// Checks a member in a wake-up that the owner has anyway, and that came `late`: see [`Core::beat`].
    pub fn beat(&mut self, late: Duration, turn: &Turn<'_>) {
        self.core.beat(late, turn.now);
        self.settle(turn);
    }

    /// Returns when [`Engine::handle_timeout`] wants to run.
    pub fn poll_timeout(&self) -> Instant {
        let next = self.core.poll_timeout().min(self.next_sync).min(self.join_at().unwrap_or(self.next_sync));
        let next = next.min(self.pull_at().unwrap_or(self.next_sync));
        if self.was_isolated || self.core.alive_count() == 0 || self.core.has_left() {
            return next;
        }
        next.min(self.heard_at + SILENCE_MAX)
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    // The end of each call.

    /// Acts on what the core says, until it says nothing more.
    fn settle(&mut self, turn: &Turn<'_>) {
        while let Some(output) = self.core.poll_output() {
            match output {
                membership::Output::Send { to, packet } => self.outputs.push_back(Output::Send { to, packet }),
                membership::Output::Received { from, broadcast } => self.received(&from, &broadcast, turn),
                membership::Output::Changed { node, before, after } => self.member_changed(node, before, after, turn),
                membership::Output::Conflict { theirs } => {
                    let is_news = self.conflict_seen.as_ref() != Some(&theirs);
                    self.conflict_seen = Some(theirs.clone());
                    self.tell(Event::Conflict { theirs, is_news });
                }
                membership::Output::Renewed(id) => {
                    self.are_members_dirty = true;
                    self.tell(Event::Renewed(id));
                    self.doubt(turn.now);
                }
                membership::Output::Sign(statement) => self.sign(statement, turn),
                membership::Output::Verify(statement) => self.verify(statement, turn),
                membership::Output::Demand { node, demand } => self.outputs.push_back(Output::Demand { node, demand }),
                membership::Output::AskPort(id) => self.outputs.push_back(Output::AskPort(id)),
                membership::Output::Differs { peer } => self.start_sync(&peer.name, SYNC_ROUNDS),
            }
        }
        self.pull_wanted(turn.now);
        // Before anything is sent again: an old hash on a probe would begin a comparison for nothing.
        self.core.set_state_hash(self.replica.set_hash(), turn.now);
        for report in self.replica.take_reports() {
            self.tell(Event::Report(report));
        }
        if !self.has_saved && self.core.alive_count() > 0 {
            // A crash right after the first join must find the way back, too.
            self.save_peers();
        }
        self.say_goodbyes();
        self.tell_isolation(turn.now);
    }

    fn tell(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    fn tell_isolation(&mut self, now: Instant) {
        if self.core.alive_count() > 0 {
            self.joins_in_vain = 0;
        }
        if self.core.has_left() {
            // Who goes is not connected again by it.
            return;
        }
        let is_isolated = self.find_isolation(now);
        if is_isolated != self.was_isolated {
            self.was_isolated = is_isolated;
            self.are_members_dirty = true;
            self.tell(if is_isolated { Event::Isolated } else { Event::Connected });
        }
    }

    fn member_changed(
        &mut self,
        node: NodeName,
        before: Option<MemberStatus>,
        after: Option<MemberStatus>,
        turn: &Turn<'_>,
    ) {
        self.are_members_dirty = true;
        self.are_peers_dirty = true;
        if after == Some(MemberStatus::Alive) {
            self.heard_at = turn.now;
        }
        let addr = self.core.member(&node).map(|member| member.id.addr);
        self.tell(Event::MemberChanged { node: node.clone(), addr, before, after });
        match after {
            None | Some(MemberStatus::Left) => {
                self.replica.remove(&node);
                // Nor is it called after the next start.
                self.known_peers.retain(|peer| peer.name != node);
                self.outputs.push_back(Output::Close { peer: node.clone(), reason: MEMBER_LEFT });
            }
            // Its connection waits longer and longer between probes; once the path heals, a fresh one is faster.
            Some(MemberStatus::Failed) if before != after => {
                self.outputs.push_back(Output::Close { peer: node.clone(), reason: "member failed" });
            }
            Some(_) => {}
        }
        let was_alive = matches!(before, Some(MemberStatus::Alive | MemberStatus::Leaving));
        if was_alive && self.core.alive_count() == 0 && !self.core.has_left() {
            self.join_pause = JOIN_PAUSE_MIN;
            self.next_join = turn.now + JOIN_PAUSE_MIN;
        }
        self.dirty.insert(node);
    }
}

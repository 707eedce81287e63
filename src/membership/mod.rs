//! Who is in the mesh: SWIM as a pure core, with foca as its engine and Lifeguard and proofs around it.
//!
//! ```text
//!   packet -> inspect: sender? own name? bound? -> calls, statements -> believed? --\      /-> roster: alive, leaving, left, failed
//!                                \-> foca: the list, random probes ------------------> drain -> outputs: packets, changes, broadcasts
//!   believed, own --> news --> neighbours, a few at a time -----------------------------^
//!   handle_timeout -> late? -> foca's timers, watch, checks, suspicions -> judge ---/
//! ```
//!
//! foca sends and answers random probes and holds the list of members. What is believed about them is decided
//! here: foca never reads what packets say of third parties, and its suspicions begin a check instead of a sentence.
//!
//! Invariants:
//! - The core owns no clock, socket, key or source of randomness: `now` and a seed come from outside, signatures are asked
//!   of the owner, so a run repeats.
//! - A packet counts only if the peer that TLS verified is the member that its header names.
//! - A life of a member is learned from that member itself, from its signed word, or from its signed records
//!   (`attest`): nobody can invent members, later lives or returns, nor say another's goodbye.
//! - The life that a peer gives a gone stranger yields to the stranger's own word; foca never takes up an older life than
//!   the roster knows.
//! - A member counts as failed on this node's own failed check or on the signed words of two others, after the time to
//!   refute; one liar's word is checked and never judged. An answer within the last second vetoes.
//! - Nothing that is said about an older life of a member changes what is known of a newer one.
//! - A broadcast is passed on only when it was verified: statements by the core, records when their owner hands them
//!   back (`broadcast`).
//! - Members, timers, broadcasts, checks, votes and signature checks are bounded.
//!
//! The owner hands over what has arrived before it calls [`Core::handle_timeout`]; the first call that comes late, whichever
//! it is, makes the core blame itself before it judges anybody.
//!
//! Not here: connections (`gossip`), keys (`pki`), what the broadcasts of records mean (`replica`), repair of lost ones
//! (`gossip::exchange`).

mod budget;
mod checks;
mod demands;
mod detect;
mod effects;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod health;
mod id;
mod inbound;
mod lives;
mod news;
mod output;
mod packet;
mod profile;
mod ring;
mod roster;
mod shown;
#[cfg(test)]
mod sim;
mod statement;
mod suspicion;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use foca::{AccumulatingRuntime, Foca, Member, NoCustomBroadcast, State, Timer};
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use budget::Budget;
use checks::Checks;
use demands::Demands;
pub use health::LOCAL_HEALTH_WORST;
use health::{Lag, LocalHealth, Unrest};
pub use id::{Life, MeshId};
use news::News;
pub use output::{ForceLeaveError, Output, Refused};
use packet::WireCodec;
pub use packet::{BROADCAST_BYTES_MAX, Broadcast, MemberEntry, PACKET_BYTES_MAX, Standing, class_of};
pub use profile::{Detector, Profile, WATCH_PERIOD};
use ring::{ALL_NEIGHBOURS_MAX, Ring};
pub use roster::Tracked;
use roster::{LEFT_REAPED_AFTER, Roster};
pub use shown::{Sizes, Stats};
pub use statement::{
    Accusation, Certainty, DemandClaim, Leave, LifeClaim, STATEMENT_SIGNATURE_BYTES_MAX, Statement, Verdict,
};
use suspicion::Suspicion;

use crate::model::{MemberStatus, NodeName};

/// Most members that are held, gone ones included: three times the largest mesh that the profile is made for.
pub const MEMBERS_MAX: usize = 30_000;
/// Furthest that a generation may lie above the known one: a start per second for twelve days. A greater jump would
/// use up the numbers that a name has left.
pub const GENERATION_JUMP_MAX: u64 = 1 << 20;
/// Most strangers that are held as gone on a peer's word: a peer may have made them up.
pub const STRANGERS_MAX: usize = 2048;
/// How often gone members are looked through for those to forget.
const REAP_EVERY: Duration = Duration::from_mins(1);
/// Most members told of a leave directly; the others hear it from them.
const LEAVE_FANOUT_MAX: usize = 32;
/// How often a neighbour is asked for signed lives: repairs those that spread past this node. Where one changed, others
/// may have that this node did not hear of: then after the shorter time, and each time half as long again.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(30);
const ANNOUNCE_SOON: Duration = Duration::from_secs(2);
/// Most goodbyes repeated in one exchange.
const FAREWELLS_MAX: usize = 256;

/// Why foca was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Input,
    Timer,
}

type Swim = Foca<MeshId, WireCodec, StdRng, NoCustomBroadcast>;

/// The membership of one node.
pub struct Core {
    profile: Profile,
    swim: Swim,
    effects: AccumulatingRuntime<MeshId>,
    roster: Roster,
    ring: Ring,
    timers: BTreeMap<(Instant, u64), Timer<MeshId>>,
    timer_number: u64,
    outputs: VecDeque<Output>,
    rng: StdRng,
    has_left: bool,
    goodbye: Option<Leave>,
    /// foca's incarnation of this node, which it does not tell.
    incarnation: u16,
    /// What [`Core::own_word`] tells.
    own_life: Option<LifeClaim>,
    health: LocalHealth,
    unrest: Unrest,
    lag: Lag,
    checks: Checks,
    suspicions: BTreeMap<NodeName, Suspicion>,
    /// Strangers that a peer calls gone: not in foca's list, called now and then, believed alive once they answer.
    gone: BTreeMap<NodeName, MeshId>,
    budget: Budget,
    records: effects::Records,
    news: News,
    /// Reports of demand on their way.
    reports: News,
    demands: Demands,
    /// Neighbours that news goes to before any gets some again, the next last.
    turns: Vec<NodeName>,
    /// Peers that a connection leads to, if the owner told.
    linked: BTreeSet<NodeName>,
    when: When,
    watch_turn: usize,
    stats: Stats,
}

/// When what is due next, and when it was done last.
#[derive(Debug, Clone, Copy)]
struct When {
    /// When the owner last called with something that may end in a sentence.
    called_last: Instant,
    reap: Instant,
    watch: Instant,
    /// When the owner last gave a wake-up for it.
    beat_last: Option<Instant>,
    recall: Instant,
    recalled_last: Instant,
    /// When a member was found gone for the last time.
    failed_last: Option<Instant>,
    /// News waits for this moment; none: no news.
    spread: Option<Instant>,
    spread_last: Option<Instant>,
    announce: Instant,
    /// When a member came, went or came back.
    changed_last: Instant,
    /// A refutation waits for this moment; none: nothing to refute.
    refute: Option<Instant>,
    refuted_last: Option<Instant>,
    /// Until then no news goes where no connection leads, as long as enough lead elsewhere.
    cold_news: Option<Instant>,
    renewed_last: Option<Instant>,
    blamed_last: Option<Instant>,
    /// When somebody was last made to look because it passed on a life that has failed.
    shown_last: Option<Instant>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("id", self.id()).field("roster", &self.roster).finish_non_exhaustive()
    }
}

fn swim(id: MeshId, profile: &Profile, rng: &mut StdRng) -> Swim {
    let seeded = StdRng::seed_from_u64(rng.random());
    Foca::new(id, profile.config(), seeded, WireCodec)
}

impl Core {
    /// Makes the core of the node `id`, alone. Its first output asks for the signature over this life.
    pub fn new(id: MeshId, profile: Profile, seed: u64, now: Instant) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut ring = Ring::default();
        ring.insert(&id.name);
        let swim = swim(id, &profile, &mut rng);
        let phase = profile.watch_period.mul_f64(rng.random_range(0.0..1.0));
        let when = When {
            called_last: now,
            reap: now + REAP_EVERY,
            watch: now + phase,
            beat_last: None,
            recall: now + profile.recall_period,
            recalled_last: now,
            failed_last: None,
            spread: None,
            spread_last: None,
            announce: now + ANNOUNCE_EVERY,
            changed_last: now,
            refute: None,
            refuted_last: None,
            cold_news: None,
            renewed_last: None,
            blamed_last: None,
            shown_last: None,
        };
        let mut core = Self {
            profile,
            swim,
            effects: AccumulatingRuntime::new(),
            roster: Roster::default(),
            ring,
            timers: BTreeMap::new(),
            timer_number: 0,
            outputs: VecDeque::new(),
            rng,
            has_left: false,
            goodbye: None,
            incarnation: 0,
            own_life: None,
            health: LocalHealth::default(),
            unrest: Unrest::default(),
            lag: Lag::default(),
            checks: Checks::default(),
            suspicions: BTreeMap::new(),
            gone: BTreeMap::new(),
            budget: Budget::new(now),
            records: effects::Records::new(now),
            news: News::default(),
            reports: News::default(),
            demands: Demands::default(),
            turns: Vec::new(),
            linked: BTreeSet::new(),
            when,
            watch_turn: 0,
            stats: Stats::default(),
        };
        core.sign_life();
        core
    }

    /// This node's identity.
    pub fn id(&self) -> &MeshId {
        self.swim.identity()
    }

    /// This node's own word for its present life, once it is signed.
    pub fn own_word(&self) -> Option<&LifeClaim> {
        self.own_life.as_ref()
    }

    /// Whether this node said goodbye.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// This node's goodbye, once it was said and signed.
    pub fn goodbye(&self) -> Option<&Leave> {
        self.goodbye.as_ref()
    }

    /// The members that this one watches closely, two at most.
    pub fn watched(&self) -> Vec<MeshId> {
        if self.has_left {
            return Vec::new();
        }
        let own = &self.id().name;
        self.ring.successors(own).filter_map(|name| Some(self.roster.find(name)?.id.clone())).collect()
    }

    /// When a member that stays as it is will be forgotten; none while it answers.
    pub fn forgotten_at(&self, member: &Tracked) -> Option<Instant> {
        match member.status {
            MemberStatus::Failed => Some(member.since() + self.profile.reconnect_timeout),
            MemberStatus::Left => Some(member.since() + LEFT_REAPED_AFTER),
            MemberStatus::Alive | MemberStatus::Leaving => None,
        }
    }

    /// The other members, in order of name.
    pub fn members(&self) -> impl Iterator<Item = &Tracked> {
        self.roster.iter()
    }

    /// One other member.
    pub fn member(&self, name: &NodeName) -> Option<&Tracked> {
        self.roster.find(name)
    }

    /// Others that answer (those that are leaving or held back included).
    pub fn alive(&self) -> impl Iterator<Item = &MeshId> {
        self.swim.iter_members().map(Member::id)
    }

    /// How many others answer.
    pub fn alive_count(&self) -> usize {
        self.swim.num_members()
    }

    /// Some member that a connection leads to, if there is one: with it comparing costs no handshake.
    pub fn neighbour(&mut self) -> Option<NodeName> {
        let neighbours = self.ring.neighbours(&self.id().name);
        let linked = neighbours.iter().filter(|name| self.linked.contains(*name)).choose(&mut self.rng).cloned();
        linked.or_else(|| neighbours.into_iter().choose(&mut self.rng))
    }

    /// Tells to whom connections lead now: news prefers them while a mesh comes up.
    pub fn set_linked(&mut self, linked: BTreeSet<NodeName>) {
        self.linked = linked;
    }

    /// The members that this one gossips with in a mesh of more than 33; none in a smaller one, where that is everybody.
    pub fn few_neighbours(&self) -> BTreeSet<NodeName> {
        if self.alive_count() <= ALL_NEIGHBOURS_MAX {
            return BTreeSet::new();
        }
        self.ring.neighbours(&self.id().name).into_iter().collect()
    }

    /// Whether a peer said since `since` that it holds what this node holds, and none has differed after it.
    pub fn has_agreed_since(&self, since: Instant) -> bool {
        self.records.agreed_at().is_some_and(|at| at >= since)
    }

    /// Forgets what this node wanted to say: the others know it.
    pub fn forget_news(&mut self) {
        self.news.clear();
        self.reports.clear();
        self.when.spread = None;
    }

    /// How much is held beside the members, for tests of its bounds.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            timers: self.timers.len(),
            news: self.news.len(),
            demands: (self.reports.len(), self.demands.len()),
            suspicions: self.suspicions.len(),
            votes_max: self.suspicions.values().map(Suspicion::len).max().unwrap_or(0),
            checks: self.checks.len(),
            strangers: self.gone.len(),
            turns: self.turns.len(),
            outputs: self.outputs.len(),
        }
    }

    /// What was counted, and how this node is.
    pub fn stats(&self) -> Stats {
        let suspected = self.suspicions.values().filter(|suspicion| suspicion.is_believed()).count();
        Stats { local_health: self.health.score(), suspected, held: self.roster.holds().0, ..self.stats }
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Says hello to `to`, which answers with members that it knows.
    pub fn announce(&mut self, to: MeshId, now: Instant) {
        if self.has_left || to.name == self.id().name {
            return;
        }
        let result = self.swim.announce(to, &mut self.effects);
        self.settle(result, now);
    }

    /// Spreads a broadcast about records; it must encode to at most [`BROADCAST_BYTES_MAX`] bytes.
    ///
    /// Returns whether it was taken.
    pub fn broadcast(&mut self, broadcast: &Broadcast, now: Instant) -> bool {
        !self.has_left && self.spread(broadcast, now)
    }

    /// Returns members that a newcomer should know of: the living first, at most `limit`.
    pub fn entries(&self, limit: usize) -> Vec<MemberEntry> {
        let living = self.swim.iter_members().map(MemberEntry::from);
        let down = self.swim.iter_membership_state().filter(|member| member.state() == State::Down);
        let gone =
            self.gone.values().map(|id| MemberEntry { id: id.clone(), incarnation: 0, standing: Standing::Down });
        living.chain(down.map(MemberEntry::from)).chain(gone).take(limit).collect()
    }

    /// Returns goodbyes that a peer may have missed.
    pub fn farewells(&self) -> Vec<Leave> {
        self.roster.farewells(FAREWELLS_MAX)
    }

    /// Takes over what a peer says of members, without spreading it.
    ///
    /// That a stranger is gone is believed until it answers; that it is alive takes a proof ([`Core::meet`],
    /// [`Core::attest`], its signed word). What is known already is not changed by it.
    pub fn learn(&mut self, entries: Vec<MemberEntry>, now: Instant) {
        if self.has_left {
            return;
        }
        let own = self.id().clone();
        for entry in entries {
            if claims_name(&own, &entry) {
                self.outputs.push_back(Output::Conflict { theirs: entry.id.clone() });
            }
            if entry.id.name == own.name {
                continue;
            }
            if entry.standing != Standing::Down {
                if self.living(&entry.id.name).is_none() {
                    self.unrest.expect(entry.id.name, now);
                }
                continue;
            }
            if self.roster.find(&entry.id.name).is_some() {
                self.stats.advisories_ignored += 1;
            } else if self.roster.len() < MEMBERS_MAX && self.gone.len() < STRANGERS_MAX {
                self.change(&entry.id.name, |roster| roster.down(&entry.id, now));
                if self.gone.is_empty() {
                    self.when.recall = now + self.profile.recall_period;
                }
                self.gone.insert(entry.id.name.clone(), entry.id);
            }
        }
    }

    /// Takes over goodbyes that a peer repeats, once their signatures were checked.
    pub fn learn_farewells(&mut self, farewells: Vec<Leave>, now: Instant) {
        for leave in farewells.into_iter().take(FAREWELLS_MAX) {
            // Only its own mouth or an operator's order prunes; a repetition never does.
            if !leave.prune {
                // Counted in one account, whoever repeats them.
                let account = self.id().name.clone();
                self.hear_leave(&account, leave, now);
            }
        }
    }

    /// Notes a member that this node shook hands with itself: `id` is what TLS verified.
    pub fn meet(&mut self, id: &MeshId, now: Instant) {
        if self.has_left || id.name == self.id().name {
            return;
        }
        self.drop_hearsay(id);
        if self.check_newcomer(id).is_ok() {
            self.accept(id, 0, now);
        }
    }

    /// Notes a member whose signed records were verified: a later life than the known one is alive, an older is not
    /// worth a word. A stranger that a peer calls gone has to answer first.
    pub fn attest(&mut self, id: &MeshId, now: Instant) {
        let is_later = match self.roster.find(&id.name) {
            Some(known) => id.life.generation > known.id.life.generation,
            None => true,
        };
        if is_later && !self.has_left && id.name != self.id().name && self.check_newcomer(id).is_ok() {
            self.accept(id, 0, now);
        }
    }

    /// Tells the core the hash of all records that this node holds: it rides on every probe and answer.
    pub fn set_state_hash(&mut self, hash: u64, now: Instant) {
        self.records.set_own(hash, now);
    }

    /// Takes a generation above `theirs`: for a node that lost its disk and whose name is free. Refused, with false,
    /// if that is more than [`GENERATION_JUMP_MAX`] ahead: the peer that says so is not to be believed.
    pub fn outlive(&mut self, theirs: Life, now: Instant) -> bool {
        let mut id = self.id().clone();
        if theirs < id.life || self.has_left {
            return true;
        }
        if theirs.generation.number > id.life.generation.number.saturating_add(GENERATION_JUMP_MAX) {
            self.stats.forged_lives += 1;
            return false;
        }
        id.life.generation.number = theirs.generation.number.saturating_add(1);
        id.life.renewals = 0;
        self.become_id(id, now);
        true
    }

    /// Goes on under `id`.
    fn become_id(&mut self, id: MeshId, now: Instant) {
        let result = self.swim.change_identity(id, &mut self.effects);
        self.incarnation = 0;
        self.when.refute = None;
        self.sign_life();
        self.settle(result, now);
    }

    fn sign_life(&mut self) {
        let claim = LifeClaim { id: self.id().clone(), incarnation: self.incarnation, signature: Vec::new() };
        self.own_life = None;
        self.outputs.push_back(Output::Sign(Statement::Life(claim)));
    }

    fn reap(&mut self, now: Instant) {
        for id in self.roster.due(self.profile.reconnect_timeout, now) {
            self.forget(&id.name);
        }
    }

    fn forget(&mut self, name: &NodeName) {
        let Some(member) = self.roster.forget(name) else { return };
        self.gone.remove(name);
        self.suspicions.remove(name);
        self.checks.forget(name);
        self.demands.forget(name);
        // Removes it only if it is down, and cannot fail.
        let _infallible = self.swim.handle_timer(Timer::RemoveDown(member.id), &mut self.effects);
        self.outputs.push_back(Output::Changed { node: name.clone(), before: Some(member.status), after: None });
    }

    /// Changes the roster and says so if a member's status or identity differs afterwards.
    fn change(&mut self, name: &NodeName, apply: impl FnOnce(&mut Roster)) {
        let before = self.roster.find(name).map(|member| (member.status, member.id.clone()));
        apply(&mut self.roster);
        let after = self.roster.find(name).map(|member| (member.status, member.id.clone()));
        if before != after {
            let (before, after) = (before.map(|(status, _)| status), after.map(|(status, _)| status));
            self.outputs.push_back(Output::Changed { node: name.clone(), before, after });
        }
    }
}

/// Tells whether `entry` says that another node lives under this node's name with a newer generation.
fn claims_name(own: &MeshId, entry: &MemberEntry) -> bool {
    entry.id.name == own.name && entry.standing != Standing::Down && entry.id.life.generation > own.life.generation
}

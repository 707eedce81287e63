//! Who is in the mesh: SWIM (foca) as a pure core.
//!
//! ```text
//!   packet -> inspect: sender? own name? bound? -> foca -> drain -> outputs: packets, changes, broadcasts
//!   timer queue ---------------------------------^            \-> roster: alive, leaving, left, failed
//! ```
//!
//! Invariants:
//! - The core owns no clock, socket or source of randomness: `now` and a seed come from outside, so a run repeats.
//! - A packet counts only if the peer that TLS verified is the member that its header names.
//! - Nothing that is said about an older life of a member changes what is known of a newer one.
//! - Nobody else's word about this node's name is passed on: a newer claim to it is reported as a conflict.
//! - A broadcast is passed on only when its owner hands it back (`broadcast`): verified first, spread then.
//! - Members, timers and broadcasts are bounded by [`MEMBERS_MAX`].
//!
//! Not here: connections (`gossip`), what the broadcasts mean (`replica`), repair of lost ones (`gossip::exchange`).

mod id;
mod packet;
mod roster;
#[cfg(test)]
mod sim;

use std::collections::{BTreeMap, VecDeque};
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use bytes::Bytes;
use foca::{AccumulatingRuntime, Foca, Identity as _, Member, OwnedNotification, PeriodicParams, State, Timer};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

pub use id::{Life, MeshId};
pub use packet::{BROADCAST_BYTES_MAX, Broadcast, Leave, MemberEntry, PACKET_BYTES_MAX, Standing};
use packet::{Spreader, WireCodec};
pub use roster::Tracked;
use roster::{Goodbye, LEFT_REAPED_AFTER, Roster};

use crate::model::{MemberStatus, NodeName};

/// Most members that are held, gone ones included: three times the largest mesh that the profile is made for.
pub const MEMBERS_MAX: usize = 30_000;
/// How often gone members are looked through for those to forget.
const REAP_EVERY: Duration = Duration::from_mins(1);
/// Most members told of a leave directly; the others hear it from them.
const LEAVE_FANOUT_MAX: usize = 32;
/// Most goodbyes repeated in one exchange.
const FAREWELLS_MAX: usize = 256;

/// The timing of SWIM. The default sees a crash within 5 s in a mesh of three: the last of three probe periods of a
/// round and the next (2.8 s), the suspicion (1.5 s), one round of gossip (0.2 s).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// How often one member is probed.
    pub probe_period: Duration,
    /// How long a direct answer may take before others are asked to probe.
    pub probe_rtt: Duration,
    /// How long a suspect may refute.
    pub suspicion: Duration,
    /// How often news is passed on.
    pub gossip_period: Duration,
    /// How often two members that are gone are called: heals a partition.
    pub recall_period: Duration,
    /// How long a failed member is remembered and called.
    pub reconnect_timeout: Duration,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            probe_period: Duration::from_millis(700),
            probe_rtt: Duration::from_millis(250),
            suspicion: Duration::from_millis(1500),
            gossip_period: Duration::from_millis(200),
            recall_period: Duration::from_secs(2),
            reconnect_timeout: roster::FAILED_REAPED_AFTER,
        }
    }
}

impl Profile {
    fn config(&self) -> foca::Config {
        let three = NonZeroUsize::MIN.saturating_add(2);
        let every = |frequency, num_members| Some(PeriodicParams { frequency, num_members });
        foca::Config {
            probe_period: self.probe_period,
            probe_rtt: self.probe_rtt,
            num_indirect_probes: three,
            // foca's figure for a large mesh; news ends by itself in a small one when all have it.
            max_transmissions: NonZeroU8::MIN.saturating_add(9),
            suspect_to_down_after: self.suspicion,
            // The roster decides when a gone member is forgotten.
            remove_down_after: None,
            max_packet_size: NonZeroUsize::MIN.saturating_add(PACKET_BYTES_MAX - 1),
            notify_down_members: true,
            periodic_announce: every(Duration::from_secs(30), NonZeroUsize::MIN),
            periodic_announce_to_down_members: every(self.recall_period, NonZeroUsize::MIN.saturating_add(1)),
            periodic_gossip: every(self.gossip_period, three),
        }
    }
}

/// Why a packet was refused. Its text is the label of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refused {
    /// Longer than [`PACKET_BYTES_MAX`].
    #[error("too_large")]
    TooLarge,
    /// Does not decode.
    #[error("malformed")]
    Malformed,
    /// The header names another member than TLS verified.
    #[error("sender")]
    Sender,
    /// The header names this node.
    #[error("own_name")]
    OwnName,
    /// A stranger while [`MEMBERS_MAX`] members are held.
    #[error("full")]
    Full,
    /// SWIM itself refused it.
    #[error("protocol")]
    Protocol,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Self; 6] =
        [Self::TooLarge, Self::Malformed, Self::Sender, Self::OwnName, Self::Full, Self::Protocol];
}

/// What the owner of the core has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send `packet` to `to`.
    Send {
        /// Who gets it.
        to: MeshId,
        /// At most [`PACKET_BYTES_MAX`] bytes.
        packet: Bytes,
    },
    /// A member's status or identity changed; `before` is absent for a newcomer, `after` for a forgotten one.
    Changed {
        /// The member.
        node: NodeName,
        /// What it was.
        before: Option<MemberStatus>,
        /// What it is.
        after: Option<MemberStatus>,
    },
    /// A broadcast about records came from `from`; hand it back to [`Core::broadcast`] if it is good and new.
    Received {
        /// Who sent it on; it holds what it speaks of.
        from: MeshId,
        /// `Delta` or `IHave`.
        broadcast: Broadcast,
    },
    /// Another node goes by this node's name.
    Conflict {
        /// The other's identity.
        theirs: MeshId,
    },
    /// The others took this node for failed; it is back under a new identity.
    Renewed(MeshId),
}

/// Why a member cannot be made to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForceLeaveError {
    /// No such member.
    Unknown,
    /// It answers.
    Alive,
}

/// Why foca was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Input,
    Timer,
}

type Swim = Foca<MeshId, WireCodec, StdRng, Spreader>;

/// The membership of one node.
pub struct Core {
    profile: Profile,
    swim: Swim,
    effects: AccumulatingRuntime<MeshId>,
    roster: Roster,
    timers: BTreeMap<(Instant, u64), Timer<MeshId>>,
    timer_number: u64,
    next_reap: Instant,
    outputs: VecDeque<Output>,
    rng: StdRng,
    has_left: bool,
    goodbye: Option<Leave>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("id", self.id()).field("roster", &self.roster).finish_non_exhaustive()
    }
}

fn swim(id: MeshId, profile: &Profile, rng: &mut StdRng) -> Swim {
    let seeded = StdRng::seed_from_u64(rng.random());
    Foca::with_custom_broadcast(id, profile.config(), seeded, WireCodec, Spreader)
}

impl Core {
    /// Makes the core of the node `id`, alone.
    pub fn new(id: MeshId, profile: Profile, seed: u64, now: Instant) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let swim = swim(id, &profile, &mut rng);
        Self {
            profile,
            swim,
            effects: AccumulatingRuntime::new(),
            roster: Roster::default(),
            timers: BTreeMap::new(),
            timer_number: 0,
            next_reap: now + REAP_EVERY,
            outputs: VecDeque::new(),
            rng,
            has_left: false,
            goodbye: None,
        }
    }

    /// This node's identity.
    pub fn id(&self) -> &MeshId {
        self.swim.identity()
    }

    /// Whether this node said goodbye.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// This node's goodbye, once it was said.
    pub fn goodbye(&self) -> Option<&Leave> {
        self.goodbye.as_ref()
    }

    /// The other members, in order of name.
    pub fn members(&self) -> impl Iterator<Item = &Tracked> {
        self.roster.iter()
    }

    /// When a member that stays as it is will be forgotten; none while it answers.
    pub fn forgotten_at(&self, member: &Tracked) -> Option<Instant> {
        match member.status {
            MemberStatus::Failed => Some(member.since + self.profile.reconnect_timeout),
            MemberStatus::Left => Some(member.since + LEFT_REAPED_AFTER),
            MemberStatus::Alive | MemberStatus::Leaving => None,
        }
    }

    /// One other member.
    pub fn member(&self, name: &NodeName) -> Option<&Tracked> {
        self.roster.find(name)
    }

    /// Others that answer (those that are leaving included).
    pub fn alive(&self) -> impl Iterator<Item = &MeshId> {
        self.swim.iter_members().map(Member::id)
    }

    /// How many others answer.
    pub fn alive_count(&self) -> usize {
        self.swim.num_members()
    }

    /// Acts on `packet` from the peer that TLS verified as `sender`.
    ///
    /// # Errors
    /// Why the packet was refused; nothing has changed then but what a part of it may have said before the fault.
    pub fn handle_packet(&mut self, sender: &NodeName, packet: &[u8], now: Instant) -> Result<(), Refused> {
        if packet.len() > PACKET_BYTES_MAX {
            return Err(Refused::TooLarge);
        }
        let inspected = packet::inspect(packet).map_err(|_| Refused::Malformed)?;
        let src = inspected.src.clone();
        if src.name != *sender {
            return Err(Refused::Sender);
        }
        if src.name == self.id().name {
            self.outputs.push_back(Output::Conflict { theirs: src });
            return Err(Refused::OwnName);
        }
        if self.has_left {
            return Ok(());
        }
        let is_full = self.roster.len() >= MEMBERS_MAX;
        if is_full && self.roster.find(&src.name).is_none() {
            return Err(Refused::Full);
        }
        let own = self.id().clone();
        let claims = inspected.entries().find(|entry| claims_name(&own, entry)).map(|entry| entry.id.clone());
        if let Some(theirs) = claims {
            self.outputs.push_back(Output::Conflict { theirs });
        }
        let roster = &self.roster;
        let keep = |entry: &MemberEntry| {
            if entry.id.name == own.name { entry.id == own } else { !is_full || roster.find(&entry.id.name).is_some() }
        };
        let cut = inspected.without(keep);
        // Goodbyes first: a member that said goodbye and goes down in one packet has left, not failed.
        for broadcast in inspected.broadcasts {
            match broadcast {
                Broadcast::Leave(leave) => self.hear_leave(&leave, now),
                records => self.outputs.push_back(Output::Received { from: src.clone(), broadcast: records }),
            }
        }
        let result = self.swim.handle_data(cut.as_deref().unwrap_or(packet), &mut self.effects);
        self.drain(Cause::Input, now);
        result.map_err(|_| Refused::Protocol)
    }

    /// Runs what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut due = Vec::new();
        while let Some(entry) = self.timers.first_entry().filter(|entry| entry.key().0 <= now) {
            due.push(entry.remove());
        }
        // A late wake-up must not overtake: foca orders its own events.
        due.sort();
        for timer in due {
            // An error here says that the timer is out of date, or that a packet could not be encoded: both end with it.
            if let Err(error) = self.swim.handle_timer(timer, &mut self.effects) {
                tracing::debug!(%error, "membership timer failed");
            }
            self.drain(Cause::Timer, now);
        }
        if now >= self.next_reap {
            self.next_reap = now + REAP_EVERY;
            self.reap(now);
        }
    }

    /// Returns when [`Core::handle_timeout`] wants to run.
    pub fn poll_timeout(&self) -> Instant {
        self.timers.first_key_value().map_or(self.next_reap, |(key, _)| key.0.min(self.next_reap))
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
        let Ok(bytes) = crate::wire::encode(broadcast) else { return false };
        if bytes.len() > BROADCAST_BYTES_MAX || self.has_left {
            return false;
        }
        let taken = self.swim.add_broadcast(&bytes).unwrap_or(false);
        let result = self.swim.broadcast(&mut self.effects);
        self.settle(result, now);
        taken
    }

    /// Returns members that a newcomer should know of: the living first, at most `limit`.
    pub fn entries(&self, limit: usize) -> Vec<MemberEntry> {
        let living = self.swim.iter_members().map(MemberEntry::from);
        let gone = self.swim.iter_membership_state().filter(|member| member.state() == State::Down);
        living.chain(gone.map(MemberEntry::from)).take(limit).collect()
    }

    /// Returns goodbyes that a peer may have missed.
    pub fn farewells(&self) -> Vec<Leave> {
        self.roster.farewells(FAREWELLS_MAX)
    }

    /// Takes over what a peer knows of members, without spreading it.
    pub fn learn(&mut self, entries: Vec<MemberEntry>, now: Instant) {
        if self.has_left {
            return;
        }
        let own = self.id().clone();
        let mut room = MEMBERS_MAX.saturating_sub(self.roster.len());
        let mut kept = Vec::new();
        for entry in entries {
            if claims_name(&own, &entry) {
                self.outputs.push_back(Output::Conflict { theirs: entry.id.clone() });
            }
            let is_stranger = self.roster.find(&entry.id.name).is_none();
            if entry.id.name == own.name || (is_stranger && room == 0) {
                continue;
            }
            if is_stranger {
                room -= 1;
                // foca says nothing of members that it first hears of as gone.
                if entry.standing == Standing::Down {
                    self.change(&entry.id.name, |roster| roster.down(&entry.id, now));
                }
            }
            kept.push(Member::from(entry));
        }
        let result = self.swim.apply_many(kept.into_iter(), false, &mut self.effects);
        self.settle(result, now);
    }

    /// Takes over goodbyes that a peer repeats.
    pub fn learn_farewells(&mut self, farewells: Vec<Leave>, now: Instant) {
        for leave in farewells.into_iter().take(FAREWELLS_MAX) {
            // Only its own mouth or an operator's order prunes; a repetition never does.
            self.hear_leave(&Leave { prune: false, ..leave }, now);
        }
    }

    /// Says goodbye to as many members as one round reaches. Afterwards the core is silent.
    pub fn leave(&mut self, now: Instant) {
        if self.has_left {
            return;
        }
        let mut config = self.profile.config();
        let fanout = self.alive_count().clamp(3, LEAVE_FANOUT_MAX);
        config.num_indirect_probes = NonZeroUsize::new(fanout).unwrap_or(NonZeroUsize::MIN);
        let id = self.id().clone();
        let leave = Leave { node: id.name, life: id.life, prune: false };
        let result = self.swim.set_config(config);
        self.settle(result, now);
        self.spread_leave(&leave);
        let result = self.swim.leave_cluster(&mut self.effects);
        self.has_left = true;
        self.goodbye = Some(leave);
        self.settle(result, now);
    }

    /// Takes note that `name` answered at `at`, outside of SWIM. Nothing follows from it yet.
    pub fn evidence_alive(&mut self, _name: &NodeName, _at: Instant) {}

    /// Takes note that nothing listens at a living member's address: it has failed, and the others are told at once.
    pub fn evidence_crashed(&mut self, name: &NodeName, now: Instant) {
        let is_alive = |member: &&Tracked| matches!(member.status, MemberStatus::Alive | MemberStatus::Leaving);
        let Some(id) = self.roster.find(name).filter(is_alive).map(|member| member.id.clone()) else { return };
        let known = self.swim.iter_members().find(|member| *member.id() == id).map(Member::incarnation);
        let Some(incarnation) = known.filter(|_| !self.has_left) else { return };
        let down = Member::new(id, incarnation, State::Down);
        let result = self.swim.apply_many(std::iter::once(down), true, &mut self.effects);
        self.settle(result, now);
        let result = self.swim.gossip(&mut self.effects);
        self.settle(result, now);
    }

    /// Says goodbye for a failed member; with `prune` everybody forgets it.
    ///
    /// # Errors
    /// If there is no such member or it answers.
    pub fn force_leave(&mut self, name: &NodeName, prune: bool, now: Instant) -> Result<(), ForceLeaveError> {
        let member = self.roster.find(name).ok_or(ForceLeaveError::Unknown)?;
        if matches!(member.status, MemberStatus::Alive | MemberStatus::Leaving) {
            return Err(ForceLeaveError::Alive);
        }
        let leave = Leave { node: name.clone(), life: member.id.life, prune };
        self.change(name, |roster| {
            roster.leave(&leave, now);
        });
        self.spread_leave(&leave);
        let result = self.swim.broadcast(&mut self.effects);
        self.settle(result, now);
        if prune {
            self.forget(name);
        }
        Ok(())
    }

    /// Takes a generation above `theirs`: for a node that lost its disk and whose name is free.
    pub fn outlive(&mut self, theirs: Life, now: Instant) {
        let mut id = self.id().clone();
        if theirs >= id.life && !self.has_left {
            id.life.generation.number = theirs.generation.number.saturating_add(1);
            id.life.renewals = 0;
            let result = self.swim.change_identity(id, &mut self.effects);
            self.settle(result, now);
        }
    }

    fn hear_leave(&mut self, leave: &Leave, now: Instant) {
        let own = self.id().clone();
        if leave.node == own.name {
            if leave.life >= own.life && leave.life.generation == own.life.generation && !self.has_left {
                self.refute(leave.life, now);
            }
            return;
        }
        let mut heard = Goodbye::Stale;
        self.change(&leave.node, |roster| heard = roster.leave(leave, now));
        if heard == Goodbye::News {
            self.spread_leave(leave);
            let is_gone = self.roster.find(&leave.node).is_some_and(|member| member.status == MemberStatus::Left);
            if leave.prune && is_gone {
                self.forget(&leave.node);
            }
        }
    }

    /// Comes back under a life above `said`: somebody said goodbye for this node, which is alive.
    fn refute(&mut self, said: Life, now: Instant) {
        let mut id = self.id().clone();
        id.life.renewals = said.renewals;
        if let Some(renewed) = id.renew() {
            let result = self.swim.change_identity(renewed.clone(), &mut self.effects);
            self.settle(result, now);
            self.outputs.push_back(Output::Renewed(renewed));
        }
    }

    fn spread_leave(&mut self, leave: &Leave) {
        let bytes = crate::wire::encode(&Broadcast::Leave(leave.clone()));
        let taken = bytes.ok().and_then(|bytes| self.swim.add_broadcast(&bytes).ok());
        if taken.is_none() {
            tracing::debug!(node = %leave.node, "goodbye cannot be spread");
        }
    }

    fn reap(&mut self, now: Instant) {
        // Members that were first heard of as gone are in foca's list alone.
        let unseen = self.swim.iter_membership_state().filter(|member| self.roster.find(&member.id().name).is_none());
        let unseen: Vec<MeshId> = unseen.map(|member| member.id().clone()).collect();
        for id in unseen {
            self.change(&id.name, |roster| roster.down(&id, now));
        }
        for id in self.roster.due(self.profile.reconnect_timeout, now) {
            self.forget(&id.name);
        }
    }

    fn forget(&mut self, name: &NodeName) {
        let Some(member) = self.roster.forget(name) else { return };
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

    fn settle(&mut self, result: Result<(), foca::Error>, now: Instant) {
        if let Err(error) = result {
            tracing::debug!(%error, "membership step failed");
        }
        self.drain(Cause::Input, now);
    }

    /// Moves what foca asked for into outputs, timers and the roster.
    fn drain(&mut self, cause: Cause, now: Instant) {
        let mut is_idle = false;
        while let Some(notification) = self.effects.to_notify() {
            match notification {
                OwnedNotification::MemberUp(id) => self.change(&id.name, |roster| roster.up(&id, now)),
                OwnedNotification::MemberDown(id) => self.change(&id.name, |roster| roster.down(&id, now)),
                OwnedNotification::Rename(_, id) => self.change(&id.name, |roster| roster.renamed(&id, now)),
                OwnedNotification::Rejoin(id) => self.outputs.push_back(Output::Renewed(id)),
                OwnedNotification::Idle => is_idle = true,
                OwnedNotification::Active | OwnedNotification::Defunct => {}
            }
        }
        while let Some((to, packet)) = self.effects.to_send() {
            // Who left is not called back. It is answered if it calls, so that it learns that it is taken for gone.
            let has_left = self.roster.find(&to.name).is_some_and(|member| member.status == MemberStatus::Left);
            if to.name != self.id().name && !(has_left && cause == Cause::Timer) {
                self.outputs.push_back(Output::Send { to, packet });
            }
        }
        while let Some((after, timer)) = self.effects.to_schedule() {
            self.timer_number = self.timer_number.wrapping_add(1);
            self.timers.insert((now + after, self.timer_number), timer);
        }
        if is_idle && !self.has_left && self.swim.num_members() == 0 {
            self.start_over(now);
        }
    }

    /// Begins anew under a renewed identity after the last member was lost.
    ///
    /// What is queued says that all others are down. Once a partition heals, that would make third parties take each
    /// other for failed; it goes with the old instance.
    fn start_over(&mut self, now: Instant) {
        let Some(id) = self.id().renew() else { return };
        let gone: Vec<Member<MeshId>> = self.swim.iter_membership_state().cloned().collect();
        self.swim = swim(id, &self.profile, &mut self.rng);
        // The old instance's timers would match the new one's tokens.
        self.timers.clear();
        let result = self.swim.apply_many(gone.into_iter(), false, &mut self.effects);
        self.settle(result, now);
    }
}

/// Tells whether `entry` says that another node lives under this node's name with a newer generation.
fn claims_name(own: &MeshId, entry: &MemberEntry) -> bool {
    entry.id.name == own.name && entry.standing != Standing::Down && entry.id.life.generation > own.life.generation
}

//! Picks the instance that takes the next call.
//!
//! ```text
//!   Group (instances, shares, tiers) -- due for a trial? --> that one, for one request
//!                                    -- key?             --> table of hashes, passing over who may not be called
//!                                    -- else             --> tier, then: turn | draw | best of some drawn
//! ```

#[cfg(test)]
mod breaker_tests;
mod group;
#[cfg(test)]
mod share_tests;
#[cfg(test)]
mod sim_tests;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use self::group::{Group, Place, Tier, weight};
pub use self::group::{REPORTERS_MIN, ZONE_META};
use super::backoff::ConnectBackoff;
use super::draw::{Draw, mix};
use super::queue::Turn;
use super::seat::{Common, Flow, Load, Notice, Observer, Standing};
use super::tables::member_key;
use super::usage::{Limited, Shared};
use crate::catalogue::{ServiceEntry, Snapshot};
use crate::model::{HealthStatus, Instance, InstanceId, NodeName, ServiceName};
use crate::upstream::{Algorithm, Limits, Priority};

/// Most services that one worker keeps a group for; beyond it all groups start anew.
pub const SERVICES_MAX: usize = 4096;
/// Most instances that one request remembers to have tried; beyond it the oldest is forgotten.
pub const TRIED_MAX: usize = 8;
/// Draws before the rest is searched in order.
const DRAWS_MAX: usize = 8;
/// Places of a table that are looked at for one that may be called, before the rest is searched.
const WALK_MAX: usize = 256;

/// Why no instance can be picked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoInstance {
    /// Nobody registered the service.
    #[error("no service is named {service}; `weft catalog services` lists them")]
    UnknownService {
        /// What was asked for.
        service: ServiceName,
    },
    /// The service is known without any instance.
    #[error("service {service} has no instance")]
    Empty {
        /// The service.
        service: ServiceName,
    },
    /// Every instance is critical, or takes no traffic by its weight.
    #[error(
        "service {service} has no healthy instance: {critical} critical ({unreachable} of them on nodes that are not alive), {weightless} with weight 0"
    )]
    AllCritical {
        /// The service.
        service: ServiceName,
        /// How many are critical.
        critical: usize,
        /// How many of these are on nodes that left, leave or failed.
        unreachable: usize,
        /// How many warn and have the warning weight 0.
        weightless: usize,
    },
    /// Too many instances failed, and the service fails closed.
    #[error(
        "service {service} has too few instances that do not fail: {out} of {fit} are ejected, and it fails closed"
    )]
    FailsClosed {
        /// The service.
        service: ServiceName,
        /// How many are ejected.
        out: usize,
        /// Of how many.
        fit: usize,
    },
    /// As much is under way as may be.
    #[error("service {service} has as many {} under way from here as its limits allow", .what.as_str())]
    Overflow {
        /// The service.
        service: ServiceName,
        /// What there is too much of.
        what: Limited,
    },
}

/// What one call brings along: its key and its priority, and the instances that it has tried, the last [`TRIED_MAX`] of them.
#[derive(Debug, Clone, Default)]
pub struct Tried {
    instances: [Option<Arc<Instance>>; TRIED_MAX],
    count: usize,
    /// Where the service is balanced by a key: this call's ([`super::key_of`]).
    pub key: Option<u64>,
    /// How much it matters.
    pub priority: Priority,
    /// It waited, and its turn has come.
    pub is_called: bool,
    /// The time, for a first pick that comes at once: it spares a look at the clock.
    pub now: Option<Instant>,
}

impl Tried {
    /// Starts with none.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts with none, and with a key.
    pub fn with_key(key: Option<u64>) -> Self {
        Self { key, ..Self::default() }
    }

    /// The same, for a call that matters so much.
    #[must_use]
    pub fn of(self, priority: Priority) -> Self {
        Self { priority, ..self }
    }

    /// The same, for a call whose first pick comes at once, `now`.
    #[must_use]
    pub fn at(self, now: Instant) -> Self {
        Self { now: Some(now), ..self }
    }

    /// Adds `instance`.
    pub fn add(&mut self, instance: Arc<Instance>) {
        if let Some(place) = self.instances.get_mut(self.count % TRIED_MAX) {
            *place = Some(instance);
        }
        self.count = self.count.saturating_add(1);
    }

    /// Returns how many were added.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tells whether `instance` was tried, also if the catalogue changed since.
    pub fn contains(&self, instance: &Instance) -> bool {
        let is_same = |tried: &Arc<Instance>| {
            tried.record.id == instance.record.id && tried.node.info.name == instance.node.info.name
        };
        self.count > 0 && self.instances.iter().flatten().any(is_same)
    }
}

/// Who asks for an instance of what.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The catalogue, the settings and the reports.
    pub snapshot: &'a Snapshot,
    /// The calling service; none: the node itself.
    pub source: Option<&'a ServiceName>,
    /// The called one: its settings hold.
    pub destination: &'a ServiceName,
    /// Its instances, or some of them under a name of their own.
    pub service: &'a ServiceEntry,
    /// What is to be carried.
    pub flow: Flow,
    /// This moment.
    pub now: Instant,
}

/// An instance, and the call that is under way there.
#[derive(Debug)]
pub struct Picked {
    /// Which one.
    pub instance: Arc<Instance>,
    /// To be held as long as the call lasts.
    pub load: Load,
}

/// An instance as one worker sees it, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeatView {
    /// Where it runs.
    pub node: NodeName,
    /// Which one.
    pub instance: InstanceId,
    /// Whether it takes calls.
    pub standing: Standing,
    /// Calls under way.
    pub pending: u32,
    /// How many may be, where that is found out by its answers.
    pub adaptive_limit: Option<u32>,
    /// What an answer is expected to take.
    pub delay: Option<Duration>,
    /// Its share is lowered by reports of other nodes.
    pub is_lowered: bool,
}

/// A group as one worker sees it, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupView {
    /// How calls are spread.
    pub algorithm: &'static str,
    /// Keys have a table.
    pub has_table: bool,
    /// Too few instances are left: ejections are not looked at.
    pub panics: bool,
    /// Under way from this agent: connections, waiting calls, requests, repeated requests.
    pub under_way: [u32; 4],
    /// The most of each.
    pub most: [u32; 4],
    /// Requests of this worker that wait for an instance.
    pub waiting: usize,
    /// The instances.
    pub seats: Vec<SeatView>,
}

/// How good a candidate is; smaller is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Preference {
    Fresh,
    BackedOff,
    Tried,
    TriedAndBackedOff,
}

/// What a pick looks at beside the group.
#[derive(Clone, Copy)]
struct Choice<'a, 'c> {
    group: &'a Group,
    tried: &'c Tried,
    backoff: &'c ConnectBackoff,
    draw: &'c Draw,
    limits: Limits,
    algorithm: Algorithm,
    now: Instant,
}

/// A candidate and how good it is.
type Found<'a> = (Preference, &'a Place);

impl<'a> Choice<'a, '_> {
    /// Judges the instance with number `at`; none: it takes no call at all.
    fn candidate(&self, at: usize) -> Option<Found<'a>> {
        let place = self.group.places.get(at)?;
        if is_full(place, &self.limits, self.tried.priority) {
            return None;
        }
        let preference =
            match (self.tried.contains(&place.instance), self.backoff.is_avoided(&place.instance, self.now)) {
                (false, false) => Preference::Fresh,
                (false, true) => Preference::BackedOff,
                (true, false) => Preference::Tried,
                (true, true) => Preference::TriedAndBackedOff,
            };
        Some((preference, place))
    }

    /// What it would cost to wait there; smaller is better.
    fn cost(&self, place: &Place) -> f64 {
        let pending = f64::from(place.seat.pending.get());
        match self.algorithm {
            Algorithm::PeakEwma => {
                (place.seat.delay.estimate(self.group.common.typical.get(), self.now) + 1.0) * (pending + 1.0)
            }
            _ => pending,
        }
    }

    fn place(self) -> Option<&'a Place> {
        if let (Some(key), true) = (self.tried.key, self.algorithm.is_hash()) {
            return self.by_key(key);
        }
        let [near, far] = &self.group.tiers;
        let is_near =
            self.group.near_share >= 1.0 || (self.group.near_share > 0.0 && self.draw.unit() < self.group.near_share);
        let (first, second) = if is_near { (near, far) } else { (far, near) };
        let best = self.in_tier(first);
        if let Some((Preference::Fresh, place)) = best {
            return Some(place);
        }
        let other = if second.len() == 0 { None } else { self.in_tier(second) };
        match (best, other) {
            (Some(best), Some(other)) => Some(better(best, other).1),
            (found, None) | (None, found) => found.map(|(_, place)| place),
        }
    }

    /// Finds the best of a tier.
    fn in_tier(&self, tier: &'a Tier) -> Option<Found<'a>> {
        let wanted = match self.algorithm {
            Algorithm::PeakEwma | Algorithm::Auto => 2,
            Algorithm::LeastRequest { choices } => usize::from(choices),
            _ => 1,
        };
        let wanted = wanted.min(tier.len());
        let mut best: Option<Found<'a>> = None;
        // The best of the fresh ones, how many there were, and the slot of the last.
        let mut fresh: Option<(f64, &'a Place)> = None;
        let (mut count, mut last) = (0, usize::MAX);
        // Drawing moves a turn past what is left out, so its share goes to all others and not to its neighbour.
        for _ in 0..tier.len().min(DRAWS_MAX).max(wanted * 2) {
            let slot = if self.algorithm == Algorithm::RoundRobin { tier.next() } else { tier.draw(self.draw) };
            if slot == last && wanted > 1 {
                continue;
            }
            let Some(found) = tier.at(slot).and_then(|at| self.candidate(at)) else { continue };
            if found.0 != Preference::Fresh {
                best = Some(best.map_or(found, |best| better(best, found)));
                continue;
            }
            if wanted == 1 {
                return Some(found);
            }
            let cost = self.cost(found.1);
            if fresh.is_none_or(|(least, _)| cost < least) {
                fresh = Some((cost, found.1));
            }
            (count, last) = (count + 1, slot);
            if count >= wanted {
                break;
            }
        }
        if let Some((_, place)) = fresh {
            return Some((Preference::Fresh, place));
        }
        let start = usize::try_from(self.draw.below(tier.len() as u64)).unwrap_or(0);
        for slot in (start..tier.len()).chain(0..start) {
            let Some(found) = tier.at(slot).and_then(|at| self.candidate(at)) else { continue };
            if found.0 == Preference::Fresh {
                return Some(found);
            }
            best = Some(best.map_or(found, |best| better(best, found)));
        }
        best
    }

    /// Finds the instance that has `key`, or the next one that may be called.
    fn by_key(&self, key: u64) -> Option<&'a Place> {
        let takes = |at: usize| {
            let place = self.group.places.get(at)?;
            let is_in = weight(&place.instance) > 0 && (self.group.panics || !place.seat.is_out());
            is_in.then(|| self.candidate(at)).flatten()
        };
        let mut best: Option<Found<'a>> = None;
        if let Some(hashed) = &self.group.hashed {
            for member in hashed.table.walk(key).take(WALK_MAX) {
                let Some(found) = hashed.places.get(member).copied().flatten().and_then(takes) else { continue };
                // A key that its instance does not keep walks on, and those of all others keep their places.
                if found.0 == Preference::Fresh && !found.1.keeps(key) {
                    continue;
                }
                if found.0 == Preference::Fresh {
                    return Some(found.1);
                }
                best = Some(best.map_or(found, |best| better(best, found)));
            }
        }
        // No table yet, or too many in a row may not be called: by the least of -ln(hash of key and instance) / share (Thaler
        // and Ravishankar, 1996, with weights).
        let all = (0..self.group.places.len()).filter_map(takes).map(|found| (found, score(key, found.1)));
        let found = all.min_by(|(one, its), (other, others)| one.0.cmp(&other.0).then_with(|| its.total_cmp(others)));
        let found = found.map(|(found, _)| found);
        match (best, found) {
            (Some(best), Some(found)) => Some(better(best, found).1),
            (one, None) | (None, one) => one.map(|(_, place)| place),
        }
    }
}

/// How far an instance is from having `key`: the nearest has it, each with the odds of its share.
fn score(key: u64, place: &Place) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit, and a share has fewer")]
    let (hash, share) =
        ((mix(key ^ member_key(&place.seat.node, &place.seat.id)) >> 11) as f64, place.share().max(1) as f64);
    // From 0 to 1, both excluded.
    let unit = (hash + 0.5) / 9_007_199_254_740_992.0;
    -unit.ln() / share
}

/// Whether an instance has all that calls of this priority may bring it.
fn is_full(place: &Place, limits: &Limits, priority: Priority) -> bool {
    let pending = place.seat.pending.get();
    let is_over = |most: u32| pending >= priority.part_of(most, limits.priority_max);
    limits.per_instance.is_some_and(is_over) || (limits.is_adaptive && is_over(place.seat.gradient.limit()))
}

fn better<'a>(best: Found<'a>, found: Found<'a>) -> Found<'a> {
    if best.0 <= found.0 { best } else { found }
}

/// The caller, if it has settings of its own; the name of the instances: the service's, or that of a choice among them.
type GroupKey = (Option<ServiceName>, ServiceName);

/// Picks instances. One per worker: no lock, and no state of another worker but counts.
#[derive(Debug)]
pub struct Balancer {
    groups: HashMap<GroupKey, Group>,
    draw: Draw,
    start: u64,
    shared: Arc<Shared>,
    notices: Rc<RefCell<Vec<Notice>>>,
}

impl Balancer {
    /// Starts with `seed`, another one on each worker, so that workers do not move in step.
    pub fn new(seed: u64) -> Self {
        Self::with_shared(seed, Arc::default())
    }

    /// As [`Balancer::new`], with what the workers share.
    pub fn with_shared(seed: u64, shared: Arc<Shared>) -> Self {
        Self { groups: HashMap::default(), draw: Draw::new(seed), start: seed, shared, notices: Rc::default() }
    }

    /// Picks an instance of the service `name` in `snapshot` for a request; see [`Balancer::pick`].
    ///
    /// # Errors
    /// Every variant of [`NoInstance`].
    pub fn pick_by_name(
        &mut self,
        snapshot: &Snapshot,
        name: &ServiceName,
        tried: &Tried,
        backoff: &ConnectBackoff,
        now: Instant,
    ) -> Result<Picked, NoInstance> {
        let unknown = || NoInstance::UnknownService { service: name.clone() };
        let service = snapshot.services.get(name).ok_or_else(unknown)?;
        let ask = Ask { snapshot, source: None, destination: name, service, flow: Flow::Request, now };
        self.pick(&ask, tried, backoff)
    }

    /// Picks the next instance: those in `tried` only if there is no other, those in `backoff` only if there is no other
    /// among the rest.
    ///
    /// # Errors
    /// Every variant of [`NoInstance`] but the first.
    pub fn pick(&mut self, ask: &Ask<'_>, tried: &Tried, backoff: &ConnectBackoff) -> Result<Picked, NoInstance> {
        let draw = self.draw.clone();
        let group = self.group(ask);
        let overflow = |what| NoInstance::Overflow { service: ask.destination.clone(), what };
        // Who comes late does not pass those who wait; who would not wait is refused.
        let is_late =
            ask.flow == Flow::Request && !tried.is_called && group.common.queue.borrow().is_before(tried.priority);
        let picked = if is_late {
            Err(overflow(if tried.priority.waits() { Limited::Instances } else { Limited::Priority }))
        } else {
            place(group, ask, tried, backoff, &draw)
        };
        let picked = picked.and_then(|(place, is_trial)| {
            let common = &group.common;
            let limits = common.guard.borrow().limits;
            let most = if ask.flow == Flow::Request { limits.requests } else { limits.connections };
            let what = ask.flow.limited();
            if !common.usage.take(what, tried.priority.part_of(most, limits.priority_max)) {
                let is_full = common.usage.is_full(what, most);
                return Err(overflow(if is_full { what } else { Limited::Priority }));
            }
            if is_trial && let Standing::Open { until } = place.seat.standing.get() {
                place.seat.standing.set(Standing::HalfOpen { until });
            }
            let observer = Observer { seat: Rc::clone(&place.seat), common: Rc::clone(common), is_trial };
            Ok(Picked { instance: Arc::clone(&place.instance), load: Load::new(observer, ask.flow) })
        });
        self.draw = draw;
        picked
    }

    /// Enters a call that [`Balancer::pick`] refused with [`Limited::Instances`] into the service's queue.
    ///
    /// # Errors
    /// [`NoInstance::Overflow`]: as many wait as may, or one that matters so little does not wait.
    pub fn enter(&mut self, ask: &Ask<'_>, tried: &Tried) -> Result<Turn, NoInstance> {
        let overflow = |what| NoInstance::Overflow { service: ask.destination.clone(), what };
        if ask.flow != Flow::Request || !tried.priority.waits() {
            return Err(overflow(Limited::Instances));
        }
        let common = &self.group(ask).common;
        let counted = common.wait().ok_or_else(|| overflow(Limited::Pending))?;
        Ok(Turn::enter(common, counted, tried.priority, ask.now))
    }

    /// Tells whom [`Balancer::pick`] would pick next, without moving on.
    ///
    /// # Errors
    /// As [`Balancer::pick`].
    pub fn peek(&mut self, ask: &Ask<'_>, backoff: &ConnectBackoff) -> Result<Arc<Instance>, NoInstance> {
        let draw = self.draw.clone();
        let group = self.group(ask);
        let turns = group.tiers.each_ref().map(|tier| tier.turn.get());
        let due = group.common.due.get();
        let found = place(group, ask, &Tried::new(), backoff, &draw).map(|(place, _)| Arc::clone(&place.instance));
        group.common.due.set(due);
        for (tier, turn) in group.tiers.iter().zip(turns) {
            tier.turn.set(turn);
        }
        found
    }

    /// Shows the group of a call.
    pub fn view(&mut self, ask: &Ask<'_>) -> GroupView {
        let group = self.group(ask);
        let limits = group.common.guard.borrow().limits;
        let seat = |(at, place): (usize, &Place)| SeatView {
            node: place.seat.node.clone(),
            instance: place.seat.id.clone(),
            standing: place.seat.standing.get(),
            pending: place.seat.pending.get(),
            adaptive_limit: limits.is_adaptive.then(|| place.seat.gradient.limit()),
            delay: place.seat.delay.shown(ask.now),
            is_lowered: group.lowered.contains(&at),
        };
        GroupView {
            algorithm: algorithm(group.balance.algorithm, ask.flow).as_str(),
            has_table: group.hashed.is_some(),
            panics: group.panics,
            under_way: group.common.usage.counts(),
            most: [limits.connections, limits.pending, limits.requests, limits.retries],
            waiting: group.common.queue.borrow().len(),
            seats: group.places.iter().enumerate().map(seat).collect(),
        }
    }

    /// Drops the groups of services that `snapshot` does not have.
    pub fn forget_vanished(&mut self, snapshot: &Snapshot) {
        // A choice of instances is in no catalogue: it stays as long as its service.
        self.groups.retain(|_, group| snapshot.services.contains_key(&group.common.service));
    }

    /// Takes what was ejected or came back since the last time.
    pub fn take_notices(&self) -> Vec<Notice> {
        let mut notices = self.notices.borrow_mut();
        if notices.is_empty() { Vec::new() } else { std::mem::take(&mut notices) }
    }

    /// Returns the service's group, as it is at this moment.
    fn group(&mut self, ask: &Ask<'_>) -> &mut Group {
        let name = ask.destination;
        // Names are shared pointers: looking up by entry copies nothing.
        let source = if ask.snapshot.upstreams.has_caller(ask.source) { ask.source.cloned() } else { None };
        let key = (source, ask.service.name.clone());
        if self.groups.len() >= SERVICES_MAX && !self.groups.contains_key(&key) {
            self.groups.clear();
        }
        let (shared, notices, start) = (&self.shared, &self.notices, self.start);
        match self.groups.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => {
                let group = entry.into_mut();
                group.refresh(ask, |balance| {
                    let is_hash =
                        balance.algorithm.is_hash() || ask.snapshot.upstreams.balance(name).algorithm.is_hash();
                    is_hash.then(|| shared.table(name)).flatten()
                });
                group
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                let common = Common {
                    service: name.clone(),
                    guard: RefCell::new(Arc::clone(ask.snapshot.upstreams.guard(ask.source, name))),
                    // All choices of a service's instances count together.
                    usage: shared.usage(&(entry.key().0.clone(), name.clone())),
                    queue: RefCell::default(),
                    fit: std::cell::Cell::new(0),
                    out: std::cell::Cell::new(0),
                    is_stale: std::cell::Cell::new(false),
                    due: std::cell::Cell::new(None),
                    typical: std::cell::Cell::new(0.0),
                    notices: Rc::clone(notices),
                };
                let is_hash = ask.snapshot.upstreams.balance(name).algorithm.is_hash();
                let hash = is_hash.then(|| shared.table(name)).flatten();
                entry.insert(Group::new(ask, common, hash, start))
            }
        }
    }
}

/// Returns the algorithm that decides over a call.
fn algorithm(set: Algorithm, flow: Flow) -> Algorithm {
    match (set, flow) {
        (Algorithm::Auto, Flow::Request) => Algorithm::PeakEwma,
        // How long a connection lasts says nothing of how good an instance is.
        (Algorithm::Auto | Algorithm::PeakEwma, Flow::Connection) => Algorithm::LeastRequest { choices: 2 },
        (set, _) => set,
    }
}

/// Finds the instance that takes a call, and tells whether the call tries it.
fn place<'a>(
    group: &'a Group,
    ask: &Ask<'_>,
    tried: &Tried,
    backoff: &ConnectBackoff,
    draw: &Draw,
) -> Result<(&'a Place, bool), NoInstance> {
    if group.common.due.get().is_some_and(|due| due <= ask.now)
        && let Some(place) = due(group, ask.now, tried)
    {
        return Ok((place, true));
    }
    let limits = group.common.guard.borrow().limits;
    let choice = Choice {
        group,
        tried,
        backoff,
        draw,
        limits,
        algorithm: algorithm(group.balance.algorithm, ask.flow),
        now: ask.now,
    };
    choice.place().map(|place| (place, false)).ok_or_else(|| why_none(group, ask.service, &limits, tried.priority))
}

/// Finds an ejected instance whose time is over, and notes when the next one's is.
fn due<'a>(group: &'a Group, now: Instant, tried: &Tried) -> Option<&'a Place> {
    let (mut next, mut found) = (None, None);
    for place in &group.places {
        let Standing::Open { until } = place.seat.standing.get() else { continue };
        let may = until <= now && weight(&place.instance) > 0 && !tried.contains(&place.instance);
        if may && found.is_none() {
            found = Some(place);
        } else {
            next = Some(next.map_or(until, |next: Instant| next.min(until)));
        }
    }
    group.common.due.set(next);
    found
}

fn why_none(group: &Group, service: &ServiceEntry, limits: &Limits, priority: Priority) -> NoInstance {
    if service.instances.is_empty() {
        return NoInstance::Empty { service: service.name.clone() };
    }
    let (fit, out) = (group.common.fit.get(), group.common.out.get());
    if fit > 0 && group.tiers.iter().all(|tier| tier.len() == 0) {
        return NoInstance::FailsClosed { service: service.name.clone(), out, fit };
    }
    if fit > 0 {
        let in_tiers = || group.tiers.iter().flat_map(|tier| (0..tier.len()).filter_map(move |slot| tier.at(slot)));
        let has_room = |at: usize| group.places.get(at).is_some_and(|place| !is_full(place, limits, Priority::High));
        // Who waits does so also for room that is kept for what matters more: calls that end make room for both.
        let is_outranked = !priority.waits() && in_tiers().any(has_room);
        let what = if is_outranked { Limited::Priority } else { Limited::Instances };
        return NoInstance::Overflow { service: service.name.clone(), what };
    }
    let critical = || service.instances.iter().filter(|instance| instance.status == HealthStatus::Critical);
    let is_unreachable = |instance: &&Arc<Instance>| instance.node.status != crate::model::MemberStatus::Alive;
    NoInstance::AllCritical {
        service: service.name.clone(),
        critical: critical().count(),
        unreachable: critical().filter(is_unreachable).count(),
        weightless: service.instances.len() - critical().count(),
    }
}

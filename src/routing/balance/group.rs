//! The instances of one service as one worker sees them, in the order and with the shares in which they take calls.
//!
//! Made anew when the catalogue, the settings, an ejection or the reports of other nodes change; a call only reads it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use super::super::draw::{Draw, mix};
use super::super::seat::{Cause, Common, Seat, Standing};
use super::super::tables::{HashTable, member_key};
use super::Ask;
use crate::catalogue::{Reports, ServiceEntry, Snapshot};
use crate::model::{HealthStatus, Instance, InstanceId, NodeEntry, NodeName};
use crate::upstream::{Balance, InPanic, Table};

/// Largest weight that counts (Consul's bound).
const WEIGHT_MAX: u32 = 65_535;
/// Weights are kept in this many parts where some are lowered.
const PARTS: u32 = 100;
/// What is left of the share of an instance that several nodes report, in parts: enough to find out by own calls.
const REPORTED_PARTS: u32 = 10;
/// Nodes that must report an instance before its share falls: one that lies changes nothing.
pub const REPORTERS_MIN: usize = 2;
/// The least share of a new instance, in parts (Envoy's: 10 %).
const FRESH_PARTS: u32 = 10;
/// Shares of new instances grow in so many steps.
const SLOW_START_STEPS: u32 = 20;
/// The node's meta that names its zone.
pub const ZONE_META: &str = "zone";

/// An instance with its share.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) seat: Rc<Seat>,
    pub(super) instance: Arc<Instance>,
    /// What part of its weight it has, of [`PARTS`]: less while it is new or reported.
    parts: u32,
}

impl Place {
    /// Its weight in parts, as it is at this moment.
    pub(super) fn share(&self) -> u64 {
        u64::from(weight(&self.instance)) * u64::from(self.parts)
    }

    /// Tells whether the instance keeps a key that a table gives it. Tables are made by the weight of who passes and is
    /// neither new nor reported; who has less keeps that part of its keys, the same ones at each call and on every node.
    pub(super) fn keeps(&self, key: u64) -> bool {
        let whole = u64::from(self.instance.record.weights.passing.clamp(1, WEIGHT_MAX)) * u64::from(PARTS);
        let share = self.share();
        // Turned, so that it says nothing of where the key's walk begins.
        share >= whole || mix(key.rotate_left(23) ^ member_key(&self.seat.node, &self.seat.id)) % whole < share
    }
}

/// An instance in a tier.
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Its number in the service's list.
    at: usize,
    /// The sum of all weights up to and with this one.
    weight_end: u64,
}

/// Instances among which a call is spread.
#[derive(Debug, Default)]
pub(super) struct Tier {
    slots: Vec<Slot>,
    /// The sum of all weights, or the number of slots where all weights are equal.
    length: u64,
    /// How far one turn moves; has no divisor in common with `length`, so that a round meets every place once.
    stride: u64,
    pub(super) turn: Cell<u64>,
}

impl Tier {
    fn new(weights: &[(usize, u64)], start: u64) -> Self {
        let heaviest = weights.iter().map(|(_, weight)| *weight).max().unwrap_or(0);
        let is_even = weights.iter().all(|(_, weight)| *weight == heaviest);
        let mut length = 0u64;
        let mut slots = Vec::with_capacity(weights.len());
        for (at, weight) in weights {
            length += if is_even { 1 } else { *weight };
            slots.push(Slot { at: *at, weight_end: length });
        }
        let stride = if is_even { 1 } else { stride(length) };
        Self { slots, length, stride, turn: Cell::new(start.checked_rem(length).unwrap_or(0)) }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Returns the number of the instance in slot `slot`.
    pub(super) fn at(&self, slot: usize) -> Option<usize> {
        self.slots.get(slot).map(|slot| slot.at)
    }

    /// Moves on and returns the slot whose turn it was.
    pub(super) fn next(&self) -> usize {
        let place = self.turn.get();
        let next = place + self.stride;
        self.turn.set(if next >= self.length { next - self.length } else { next });
        self.slot(place)
    }

    /// Draws a slot, each as often as its weight says.
    pub(super) fn draw(&self, draw: &Draw) -> usize {
        self.slot(draw.below(self.length))
    }

    fn slot(&self, place: u64) -> usize {
        if self.length == self.slots.len() as u64 {
            return usize::try_from(place).unwrap_or(0);
        }
        self.slots.partition_point(|slot| slot.weight_end <= place)
    }
}

/// Returns a step near the golden section of `length` and without a common divisor: turns of one instance lie apart.
fn stride(length: u64) -> u64 {
    let near = length.saturating_mul(618) / 1000;
    (near.max(1)..length).find(|step| gcd(*step, length) == 1).unwrap_or(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// From what a group was made.
#[derive(Debug, Clone)]
struct Origin {
    modify_index: u64,
    table: Arc<Table>,
    reports: Arc<Reports>,
    hash: Option<Arc<HashTable>>,
}

/// The table of hashes, its members by their number in the service's list.
#[derive(Debug)]
pub(super) struct Hashed {
    pub(super) table: Arc<HashTable>,
    pub(super) places: Vec<Option<usize>>,
}

type SeatKey = (NodeName, InstanceId);

/// The instances of one service.
#[derive(Debug)]
pub(super) struct Group {
    origin: Origin,
    pub(super) balance: Arc<Balance>,
    pub(super) common: Rc<Common>,
    seats: HashMap<SeatKey, Rc<Seat>>,
    pub(super) places: Vec<Place>,
    /// Instances of this node's zone, or all; and those elsewhere.
    pub(super) tiers: [Tier; 2],
    /// The part of the calls that stays with the first tier.
    pub(super) near_share: f64,
    pub(super) hashed: Option<Hashed>,
    /// Too few are left: ejections are not looked at.
    pub(super) panics: bool,
    /// Instances whose share others' reports have lowered.
    pub(super) lowered: Vec<usize>,
    interval_end: Instant,
    /// When shares of new instances grow the next time.
    grows_at: Option<Instant>,
}

impl Group {
    /// Makes a group; `start` sets where turns begin.
    pub(super) fn new(ask: &Ask<'_>, common: Common, hash: Option<Arc<HashTable>>, start: u64) -> Self {
        let interval_end = ask.now + common.guard.borrow().ejection.interval;
        let mut group = Self {
            origin: origin(ask, hash),
            balance: Arc::clone(ask.snapshot.upstreams.balance(ask.destination)),
            interval_end,
            common: Rc::new(common),
            seats: HashMap::default(),
            places: Vec::new(),
            tiers: [Tier::default(), Tier::default()],
            near_share: 1.0,
            hashed: None,
            panics: false,
            lowered: Vec::new(),
            grows_at: None,
        };
        for tier in &group.tiers {
            tier.turn.set(start);
        }
        group.seat(ask.service, None);
        group.arrange(ask.snapshot, ask.now);
        group
    }

    /// Takes over whatever changed since the last call.
    pub(super) fn refresh(&mut self, ask: &Ask<'_>, hash: impl FnOnce(&Balance) -> Option<Arc<HashTable>>) {
        let (origin_before, now) = (&self.origin, ask.now);
        let is_same_service = origin_before.modify_index == ask.service.modify_index;
        let is_same_table = Arc::ptr_eq(&origin_before.table, &ask.snapshot.upstreams);
        let is_same_reports = Arc::ptr_eq(&origin_before.reports, &ask.snapshot.reports);
        let is_over = now >= self.interval_end;
        let grows = self.grows_at.is_some_and(|at| now >= at);
        let hash = if self.balance.algorithm.is_hash() || !is_same_table { hash(&self.balance) } else { None };
        let is_same_hash = match (&hash, &origin_before.hash) {
            (Some(new), Some(old)) => Arc::ptr_eq(new, old),
            (new, old) => new.is_none() && old.is_none(),
        };
        if is_same_service && is_same_table && is_same_reports && is_same_hash && !is_over && !grows {
            if self.common.is_stale.replace(false) {
                self.arrange(ask.snapshot, now);
            }
            return;
        }
        if !is_same_table {
            self.balance = Arc::clone(ask.snapshot.upstreams.balance(ask.destination));
            *self.common.guard.borrow_mut() = Arc::clone(ask.snapshot.upstreams.guard(ask.source, ask.destination));
        }
        if !is_same_service {
            self.seat(ask.service, Some(now));
        }
        if is_over {
            self.close_intervals(now);
        }
        self.origin = origin(ask, hash);
        self.common.is_stale.set(false);
        self.arrange(ask.snapshot, now);
    }

    /// Gives every instance its seat; those that may take calls and could not before may from `now` on.
    fn seat(&mut self, service: &ServiceEntry, now: Option<Instant>) {
        let mut before = std::mem::take(&mut self.seats);
        self.places = service
            .instances
            .iter()
            .map(|instance| {
                let key = (instance.node.info.name.clone(), instance.record.id.clone());
                let seat = before.remove(&key);
                let seat = seat.unwrap_or_else(|| Rc::new(Seat::new(key.0.clone(), key.1.clone())));
                seat.set_fit(weight(instance) > 0, now);
                self.seats.insert(key, Rc::clone(&seat));
                Place { seat, instance: Arc::clone(instance), parts: PARTS }
            })
            .collect();
        // What went takes its ejection along.
        let out = self.places.iter().filter(|place| place.seat.is_out()).count();
        self.common.out.set(out);
    }

    /// Closes the intervals that are over: all calls since the last look count in the first of them, and none came in the rest.
    /// Ejects those whose success rate lies far below the others' (Envoy's rule).
    fn close_intervals(&mut self, now: Instant) {
        let (interval, rule) = {
            let guard = self.common.guard.borrow();
            (guard.ejection.interval.max(Duration::from_millis(1)), guard.ejection.success_rate.clone())
        };
        let quiet = now.saturating_duration_since(self.interval_end);
        let passed = u32::try_from(quiet.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX).saturating_add(1);
        self.interval_end = now + interval;
        let rate = |place: &Place| {
            let (succeeded, failed) = place.seat.close_intervals(passed);
            let (total, least) = (succeeded.saturating_add(failed), rule.as_ref()?.requests_min.max(1));
            (total >= least).then(|| (Rc::clone(&place.seat), f64::from(succeeded) / f64::from(total)))
        };
        let rated: Vec<(Rc<Seat>, f64)> = self.places.iter().filter_map(rate).collect();
        let Some(rule) = &rule else { return };
        if rated.len() < rule.instances_min as usize {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of instances")]
        let count = rated.len() as f64;
        let mean = rated.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rated.iter().map(|(_, rate)| (rate - mean) * (rate - mean)).sum::<f64>() / count;
        let least = mean - rule.deviations * variance.sqrt();
        for (seat, _) in rated.iter().filter(|(seat, rate)| *rate < least && !seat.is_out()) {
            self.common.eject(seat, Cause::SuccessRate, now);
        }
    }

    /// Puts the instances that take calls into their tiers.
    fn arrange(&mut self, snapshot: &Snapshot, now: Instant) {
        let ejection = self.common.guard.borrow().ejection.clone();
        let fit = self.places.iter().filter(|place| weight(&place.instance) > 0).count();
        let is_in = |place: &&Place| weight(&place.instance) > 0 && !place.seat.is_out();
        let left = self.places.iter().filter(is_in).count();
        self.common.fit.set(fit);
        self.panics = left * 100 < fit * ejection.panic_percent as usize;
        let uses_all = self.panics && ejection.in_panic == InPanic::UseAll;
        let uses_none = self.panics && ejection.in_panic == InPanic::FailClosed;
        let most = (fit * ejection.percent_max as usize / 100).max(1).saturating_sub(self.common.out.get());
        self.lowered = self.reported(snapshot, if ejection.percent_max == 0 { 0 } else { most });
        self.grows_at = None;
        let is_lessened = self.set_parts(now);
        let zone = self.balance.prefers_zone.then(|| zone_of(snapshot.nodes.get(&snapshot.local_node)?)).flatten();
        let (mut near, mut far) = (Vec::new(), Vec::new());
        let (mut near_all, mut near_fit) = (0u64, 0u64);
        for (at, place) in self.places.iter().enumerate() {
            let is_near = zone.is_none_or(|zone| zone_of(&place.instance.node) == Some(zone));
            let own = u64::from(weight(&place.instance));
            let takes = own > 0 && !uses_none && (uses_all || !place.seat.is_out());
            if is_near {
                near_all += u64::from(place.instance.record.weights.passing.clamp(1, WEIGHT_MAX));
                near_fit += if takes { own } else { 0 };
            }
            if takes {
                let tier = if is_near { &mut near } else { &mut far };
                tier.push((at, if is_lessened { place.share() } else { own }));
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "sums of weights of at most 16 bits")]
        let fitness = near_fit as f64 / near_all.max(1) as f64;
        self.near_share = match (near.is_empty(), far.is_empty()) {
            (false, true) => 1.0,
            (true, _) => 0.0,
            (false, false) => (fitness * self.balance.overprovisioning).min(1.0),
        };
        let [first, second] = &self.tiers;
        self.tiers = [Tier::new(&near, first.turn.get()), Tier::new(&far, second.turn.get())];
        self.hashed = self.origin.hash.clone().map(|table| self.hashed(table));
        let open = self.places.iter().filter_map(|place| match place.seat.standing.get() {
            Standing::Open { until } => Some(until),
            _ => None,
        });
        self.common.due.set(open.min());
    }

    fn hashed(&self, table: Arc<HashTable>) -> Hashed {
        let numbers: HashMap<(&NodeName, &InstanceId), usize> =
            self.places.iter().enumerate().map(|(at, place)| ((&place.seat.node, &place.seat.id), at)).collect();
        let places = table.members().iter().map(|member| numbers.get(&(&member.node, &member.id)).copied()).collect();
        Hashed { table, places }
    }

    /// Returns the instances that enough other nodes report, those with the most reports first, `most` of them.
    fn reported(&self, snapshot: &Snapshot, most: usize) -> Vec<usize> {
        if snapshot.reports.is_empty() || most == 0 {
            return Vec::new();
        }
        let own = &snapshot.local_node;
        let count = |place: &Place| snapshot.reports.reporters(&place.seat.node, &place.seat.id, own);
        let places = self.places.iter().enumerate();
        let fit = places.filter(|(_, place)| weight(&place.instance) > 0 && !place.seat.is_out());
        let mut reported: Vec<(usize, usize)> =
            fit.map(|(at, place)| (count(place), at)).filter(|(count, _)| *count >= REPORTERS_MIN).collect();
        reported.sort_by_key(|(count, at)| (std::cmp::Reverse(*count), *at));
        reported.into_iter().take(most).map(|(_, at)| at).collect()
    }

    /// Sets what part of its weight each instance has: all [`PARTS`], or less while it is new or reported. Tells whether one
    /// has less.
    fn set_parts(&mut self, now: Instant) -> bool {
        let window = self.balance.slow_start;
        let age = |place: &Place| place.seat.came.get().map(|came| now.saturating_duration_since(came));
        let is_new = |place: &Place| !window.is_zero() && age(place).is_some_and(|age| age < window);
        let has_new = self.places.iter().any(is_new);
        if has_new {
            self.grows_at = Some(now + (window / SLOW_START_STEPS).max(Duration::from_millis(1)));
        }
        for place in &mut self.places {
            place.parts = if is_new(place) { grown(age(place), window) } else { PARTS };
        }
        for at in &self.lowered {
            if let Some(place) = self.places.get_mut(*at) {
                place.parts = place.parts.min(REPORTED_PARTS);
            }
        }
        has_new || !self.lowered.is_empty()
    }
}

/// Returns the share of an instance of `age`, growing in a line over `window`.
fn grown(age: Option<Duration>, window: Duration) -> u32 {
    let Some(age) = age else { return PARTS };
    let part = age.as_secs_f64() / window.as_secs_f64() * f64::from(PARTS);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let part = part.clamp(0.0, f64::from(PARTS)) as u32;
    part.max(FRESH_PARTS)
}

fn origin(ask: &Ask<'_>, hash: Option<Arc<HashTable>>) -> Origin {
    Origin {
        modify_index: ask.service.modify_index,
        table: Arc::clone(&ask.snapshot.upstreams),
        reports: Arc::clone(&ask.snapshot.reports),
        hash,
    }
}

/// Returns the zone of a node; none: it has none.
fn zone_of(node: &NodeEntry) -> Option<&str> {
    node.info.meta.get(ZONE_META).map(String::as_str).filter(|zone| !zone.is_empty())
}

/// Returns the instance's share of the traffic; 0: none.
pub(super) fn weight(instance: &Instance) -> u32 {
    let weights = instance.record.weights;
    match instance.status {
        // A passing instance always takes part: peers may publish a 0 that the API refuses.
        HealthStatus::Passing => weights.passing.clamp(1, WEIGHT_MAX),
        HealthStatus::Warning => weights.warning.min(WEIGHT_MAX),
        HealthStatus::Critical => 0,
    }
}

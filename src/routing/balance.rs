//! Weighted round robin.

use std::sync::Arc;

use foldhash::HashMap;
use tokio::time::Instant;

use super::backoff::ConnectBackoff;
use crate::catalogue::{Instance, ServiceEntry, Snapshot};
use crate::model::{HealthStatus, ServiceName};

/// Most services that one worker keeps a turn for; beyond it all turns start anew.
pub const SERVICES_MAX: usize = 4096;
/// Most instances that one request remembers to have tried; beyond it the oldest is forgotten.
pub const TRIED_MAX: usize = 8;
/// Largest weight that counts (Consul's bound).
const WEIGHT_MAX: u32 = 65_535;
/// Draws in turn before the rest is searched in order.
const DRAWS_MAX: usize = 8;

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
}

/// The instances that one request has tried, the last [`TRIED_MAX`] of them.
#[derive(Debug, Clone, Default)]
pub struct Tried {
    instances: [Option<Arc<Instance>>; TRIED_MAX],
    count: usize,
}

impl Tried {
    /// Starts with none.
    pub fn new() -> Self {
        Self::default()
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

/// An instance that takes traffic.
#[derive(Debug, Clone)]
struct Slot {
    /// Its place in the service's list.
    at: usize,
    /// The sum of all weights up to and with this one.
    weight_end: u64,
}

/// The turn of one service.
#[derive(Debug, Clone)]
struct Turn {
    modify_index: u64,
    slots: Vec<Slot>,
    /// The sum of all weights, or the number of slots where all weights are equal.
    length: u64,
    /// How far one draw moves; has no divisor in common with `length`, so that a turn meets every place once.
    stride: u64,
    place: u64,
}

impl Turn {
    fn new(service: &ServiceEntry, start: u64) -> Self {
        let weights = || service.instances.iter().map(|instance| weight(instance));
        let heaviest = weights().max().unwrap_or(0);
        let is_even = weights().all(|weight| weight == 0 || weight == heaviest);
        let mut length = 0u64;
        let mut slots = Vec::new();
        for (at, weight) in weights().enumerate().filter(|(_, weight)| *weight > 0) {
            length += if is_even { 1 } else { u64::from(weight) };
            slots.push(Slot { at, weight_end: length });
        }
        let place = start.checked_rem(length).unwrap_or(0);
        let stride = if is_even { 1 } else { stride(length) };
        Self { modify_index: service.modify_index, slots, length, stride, place }
    }

    /// Moves on and returns the slot that was drawn, as its place in `slots`.
    fn draw(&mut self) -> usize {
        let place = self.place;
        let next = place + self.stride;
        self.place = if next >= self.length { next - self.length } else { next };
        if self.length == self.slots.len() as u64 {
            return usize::try_from(place).unwrap_or(0);
        }
        self.slots.partition_point(|slot| slot.weight_end <= place)
    }
}

/// How good a candidate is; smaller is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Preference {
    Fresh,
    BackedOff,
    Tried,
    TriedAndBackedOff,
}

/// Picks instances in weighted round robin. One per worker: no lock, and no state of another worker.
#[derive(Debug)]
pub struct Balancer {
    turns: HashMap<ServiceName, Turn>,
    start: u64,
}

impl Balancer {
    /// Starts with `seed`, another one on each worker, so that workers do not move in step.
    pub fn new(seed: u64) -> Self {
        Self { turns: HashMap::default(), start: seed }
    }

    /// Picks an instance of the service `name` in `snapshot`; see [`Balancer::pick`].
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
    ) -> Result<Arc<Instance>, NoInstance> {
        let unknown = || NoInstance::UnknownService { service: name.clone() };
        let service = snapshot.services.get(name).ok_or_else(unknown)?;
        self.pick(service, tried, backoff, now)
    }

    /// Picks the next instance of `service`: those in `tried` only if there is no other, those in `backoff` only if
    /// there is no other among the rest.
    ///
    /// # Errors
    /// [`NoInstance::Empty`] or [`NoInstance::AllCritical`].
    pub fn pick(
        &mut self,
        service: &ServiceEntry,
        tried: &Tried,
        backoff: &ConnectBackoff,
        now: Instant,
    ) -> Result<Arc<Instance>, NoInstance> {
        let turn = self.turn(service);
        let candidate = |slot: usize, slots: &[Slot]| {
            let instance = service.instances.get(slots.get(slot)?.at)?;
            let preference = match (tried.contains(instance), backoff.is_avoided(instance, now)) {
                (false, false) => Preference::Fresh,
                (false, true) => Preference::BackedOff,
                (true, false) => Preference::Tried,
                (true, true) => Preference::TriedAndBackedOff,
            };
            Some((preference, instance))
        };
        let mut best: Option<Found<'_>> = None;
        let mut drawn = 0;
        // Drawing moves the turn past what is left out, so its share goes to all others and not to its neighbour.
        for _ in 0..turn.slots.len().min(DRAWS_MAX) {
            drawn = turn.draw();
            let Some(found) = candidate(drawn, &turn.slots) else { continue };
            if found.0 == Preference::Fresh {
                return Ok(Arc::clone(found.1));
            }
            best = Some(best.map_or(found, |best| better(best, found)));
        }
        for slot in (drawn..turn.slots.len()).chain(0..drawn) {
            let Some(found) = candidate(slot, &turn.slots) else { continue };
            if found.0 == Preference::Fresh {
                return Ok(Arc::clone(found.1));
            }
            best = Some(best.map_or(found, |best| better(best, found)));
        }
        best.map(|(_, instance)| Arc::clone(instance)).ok_or_else(|| why_none(service))
    }

    /// Tells whom [`Balancer::pick`] would pick next, without moving on.
    ///
    /// # Errors
    /// As [`Balancer::pick`].
    pub fn peek(
        &self,
        service: &ServiceEntry,
        backoff: &ConnectBackoff,
        now: Instant,
    ) -> Result<Arc<Instance>, NoInstance> {
        let turn = self.turns.get(&service.name).map(|turn| (service.name.clone(), turn.clone()));
        let mut copy = Self { turns: turn.into_iter().collect(), start: self.start };
        copy.pick(service, &Tried::new(), backoff, now)
    }

    /// Drops the turns of services that `snapshot` does not have.
    pub fn forget_vanished(&mut self, snapshot: &Snapshot) {
        self.turns.retain(|name, _| snapshot.services.contains_key(name));
    }

    /// Returns the service's turn, made anew if the service changed; it goes on where it was.
    fn turn(&mut self, service: &ServiceEntry) -> &mut Turn {
        if self.turns.len() >= SERVICES_MAX && !self.turns.contains_key(&service.name) {
            self.turns.clear();
        }
        let start = self.start;
        // The name is a shared pointer: looking up by entry copies nothing.
        let turn = self.turns.entry(service.name.clone()).or_insert_with(|| Turn::new(service, start));
        if turn.modify_index != service.modify_index {
            *turn = Turn::new(service, turn.place);
        }
        turn
    }
}

/// A candidate and how good it is.
type Found<'a> = (Preference, &'a Arc<Instance>);

fn better<'a>(best: Found<'a>, found: Found<'a>) -> Found<'a> {
    if best.0 <= found.0 { best } else { found }
}

/// Returns the instance's share of the traffic; 0: none.
fn weight(instance: &Instance) -> u32 {
    let weights = instance.record.weights;
    match instance.status {
        // A passing instance always takes part: peers may publish a 0 that the API refuses.
        HealthStatus::Passing => weights.passing.clamp(1, WEIGHT_MAX),
        HealthStatus::Warning => weights.warning.min(WEIGHT_MAX),
        HealthStatus::Critical => 0,
    }
}

/// Returns a step near the golden section of `length` and without a common divisor: draws of one instance lie apart.
fn stride(length: u64) -> u64 {
    let near = length.saturating_mul(618) / 1000;
    (near.max(1)..length).find(|step| gcd(*step, length) == 1).unwrap_or(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn why_none(service: &ServiceEntry) -> NoInstance {
    if service.instances.is_empty() {
        return NoInstance::Empty { service: service.name.clone() };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::test_support::{instance, now, service};
    use super::*;
    use crate::model::{MemberStatus, NodeName};

    const PASSING: HealthStatus = HealthStatus::Passing;
    const WARNING: HealthStatus = HealthStatus::Warning;
    const CRITICAL: HealthStatus = HealthStatus::Critical;

    #[test]
    fn equal_weights_take_turns_in_order() {
        let service = service(1, [instance("a", PASSING, 1), instance("b", PASSING, 1), instance("c", PASSING, 1)]);
        assert_eq!(picks(&mut Balancer::new(0), &service, 7), ["a", "b", "c", "a", "b", "c", "a"]);
        assert_eq!(picks(&mut Balancer::new(1), &service, 2), ["b", "c"]);
    }

    #[test]
    fn weights_are_met_exactly_over_a_turn_and_lie_apart() {
        let service = service(1, [instance("a", PASSING, 5), instance("b", PASSING, 2), instance("c", PASSING, 1)]);
        let got = picks(&mut Balancer::new(3), &service, 16);
        let count = |name: &str| got.iter().filter(|picked| *picked == name).count();
        assert_eq!((count("a"), count("b"), count("c")), (10, 4, 2));
        assert!(!got.windows(4).any(|four| four.iter().all(|picked| picked == "a")), "{got:?}");
    }

    #[test]
    fn critical_instances_are_left_out_and_warning_ones_use_their_weight() {
        // The fake's warning weight is 1.
        let service = service(1, [instance("a", PASSING, 3), instance("b", WARNING, 9), instance("c", CRITICAL, 9)]);
        let got = picks(&mut Balancer::new(0), &service, 8);
        assert_eq!(got.iter().filter(|picked| *picked == "a").count(), 6);
        assert_eq!(got.iter().filter(|picked| *picked == "b").count(), 2);
    }

    #[test]
    fn tried_instances_come_only_when_no_other_is_left() {
        let service = service(1, [instance("a", PASSING, 1), instance("b", PASSING, 1), instance("c", PASSING, 1)]);
        let mut balancer = Balancer::new(0);
        let mut tried = Tried::new();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let picked = balancer.pick(&service, &tried, &ConnectBackoff::new(), now()).unwrap();
            seen.push(picked.node.info.name.to_string());
            tried.add(picked);
        }
        seen.sort();
        assert_eq!(seen, ["a", "b", "c"]);
        assert!(balancer.pick(&service, &tried, &ConnectBackoff::new(), now()).is_ok());
    }

    #[test]
    fn backed_off_instances_are_left_out_unless_all_are_and_untried_ones_go_first() {
        let service = service(1, [instance("a", PASSING, 1), instance("b", PASSING, 1)]);
        let mut backoff = ConnectBackoff::new();
        backoff.failed(&service.instances[0], now());
        let mut balancer = Balancer::new(0);
        for _ in 0..4 {
            let picked = balancer.pick(&service, &Tried::new(), &backoff, now()).unwrap();
            assert_eq!(picked.node.info.name.as_str(), "b");
        }
        let mut tried = Tried::new();
        tried.add(Arc::clone(&service.instances[1]));
        let picked = balancer.pick(&service, &tried, &backoff, now()).unwrap();
        assert_eq!(picked.node.info.name.as_str(), "a");
        backoff.failed(&service.instances[1], now());
        assert!(balancer.pick(&service, &Tried::new(), &backoff, now()).is_ok());
    }

    #[test]
    fn the_one_healthy_instance_among_many_bad_ones_is_found() {
        let mut instances: Vec<_> = (0..100).map(|at| instance(&format!("n{at:03}"), PASSING, 1 + at % 3)).collect();
        let good = instances.remove(57);
        let mut backoff = ConnectBackoff::new();
        for instance in &instances {
            backoff.failed(instance, now());
        }
        let service = service(1, instances.into_iter().chain([Arc::clone(&good)]));
        let mut balancer = Balancer::new(0);
        for _ in 0..10 {
            let picked = balancer.pick(&service, &Tried::new(), &backoff, now()).unwrap();
            assert!(Arc::ptr_eq(&picked, &good));
        }
    }

    #[test]
    fn a_changed_service_is_seen_at_the_next_pick() {
        let mut balancer = Balancer::new(0);
        assert_eq!(picks(&mut balancer, &service(1, [instance("a", PASSING, 1)]), 1), ["a"]);
        assert_eq!(picks(&mut balancer, &service(2, [instance("b", PASSING, 1)]), 1), ["b"]);
    }

    #[test]
    fn no_instance_says_why() {
        let mut balancer = Balancer::new(0);
        let mut pick =
            |service: &ServiceEntry| balancer.pick(service, &Tried::new(), &ConnectBackoff::new(), now()).unwrap_err();
        let name: ServiceName = "web".parse().unwrap();
        assert_eq!(pick(&service(1, [])), NoInstance::Empty { service: name.clone() });
        let mut gone = Arc::unwrap_or_clone(instance("b", CRITICAL, 1));
        Arc::make_mut(&mut gone.node).status = MemberStatus::Failed;
        let mut silent = Arc::unwrap_or_clone(instance("c", WARNING, 1));
        Arc::make_mut(&mut silent.record).weights.warning = 0;
        let error = pick(&service(2, [instance("a", CRITICAL, 1), gone.into(), silent.into()]));
        assert_eq!(
            error,
            NoInstance::AllCritical { service: name.clone(), critical: 2, unreachable: 1, weightless: 1 }
        );
        let empty = Snapshot::empty("here".parse::<NodeName>().unwrap());
        let unknown = balancer.pick_by_name(&empty, &name, &Tried::new(), &ConnectBackoff::new(), now());
        assert_eq!(unknown.unwrap_err(), NoInstance::UnknownService { service: name });
    }

    #[test]
    fn turns_of_vanished_services_are_dropped_and_their_number_is_bounded() {
        let mut balancer = Balancer::new(0);
        for at in 0..=SERVICES_MAX {
            let mut service = service(1, [instance("a", PASSING, 1)]);
            service.name = format!("s{at}").parse().unwrap();
            picks(&mut balancer, &service, 1);
            assert!(balancer.turns.len() <= SERVICES_MAX);
        }
        balancer.forget_vanished(&Snapshot::empty("here".parse().unwrap()));
        assert!(balancer.turns.is_empty());
    }

    proptest! {
        #[test]
        fn any_weights_are_met_exactly_over_one_turn(weights in proptest::collection::vec(0u32..40, 1..8), seed in any::<u64>()) {
            let named = weights.iter().enumerate().map(|(at, weight)| instance(&format!("n{at}"), PASSING, *weight));
            let service = service(1, named);
            // A passing instance counts at least 1; equal weights make the shortest turn.
            let weights: Vec<usize> = weights.iter().map(|weight| (*weight).max(1) as usize).collect();
            let got = picks(&mut Balancer::new(seed), &service, weights.iter().sum());
            for (at, weight) in weights.iter().enumerate() {
                prop_assert_eq!(got.iter().filter(|picked| **picked == format!("n{at}")).count(), *weight);
            }
        }

        #[test]
        fn absurd_weights_neither_panic_nor_starve(weights in proptest::collection::vec(any::<u32>(), 1..50)) {
            let named = weights.iter().enumerate().map(|(at, weight)| instance(&format!("n{at}"), PASSING, *weight));
            let service = service(1, named);
            prop_assert_eq!(picks(&mut Balancer::new(u64::MAX), &service, 100).len(), 100);
        }
    }

    fn picks(balancer: &mut Balancer, service: &ServiceEntry, count: usize) -> Vec<String> {
        let mut pick = || balancer.pick(service, &Tried::new(), &ConnectBackoff::new(), now()).unwrap();
        (0..count).map(|_| pick().node.info.name.to_string()).collect()
    }
}

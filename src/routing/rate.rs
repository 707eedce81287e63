//! Limits of requests: GCRA, the leaky bucket as a meter (ITU-T I.371, annex A).
//!
//! A key's whole state is one number, the time at which its bucket would be empty: it is kept in an atomic, so that the
//! workers of an agent share it without a lock. Keys that come by themselves (callers, header values) have a table of fixed
//! size: a key that is not known takes the place of one whose bucket is empty, which loses nothing, or, where more keys are
//! active than the table has places, of the one that is nearest to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::draw::mix;
use crate::model::ServiceName;
use crate::upstream::{Rate, RateKey, RateRules};

/// Keys of one rule: 64 KiB.
pub const KEYS_MAX: usize = 4096;
/// Places that a key may have.
const WAYS: usize = 4;
/// Services whose limits are kept.
const SERVICES_MAX: usize = 4096;

/// A request is over its limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OverRate {
    /// The limit.
    pub rate: Rate,
    /// When the next one will be let through, if no other comes before it.
    pub retry_after: Duration,
}

/// Takes one request out of the bucket whose emptying time is `empties`, in nanoseconds on a clock where `now` is.
fn take(empties: &AtomicU64, rate: Rate, now: u64) -> Result<(), Duration> {
    let each = nanos(1.0 / rate.per_second);
    let depth = each.saturating_mul(u64::from(rate.burst));
    let mut wait = 0;
    let taken = empties.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empties| {
        let next = empties.max(now).saturating_add(each);
        wait = next.saturating_sub(now).saturating_sub(depth);
        (wait == 0).then_some(next)
    });
    taken.map(drop).map_err(|_| Duration::from_nanos(wait))
}

fn nanos(seconds: f64) -> u64 {
    u64::try_from(Duration::from_secs_f64(seconds).as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Debug, Default)]
struct Slot {
    key: AtomicU64,
    empties: AtomicU64,
}

/// The buckets of one rule.
#[derive(Debug)]
struct Buckets(Box<[Slot]>);

impl Buckets {
    fn new(key: &RateKey) -> Self {
        let slots = if *key == RateKey::All { 1 } else { KEYS_MAX };
        Self((0..slots).map(|_| Slot::default()).collect())
    }

    /// Finds the bucket of `key`. Two that come at the same moment may count one request in each other's.
    fn of(&self, key: u64, now: u64) -> Option<&AtomicU64> {
        if self.0.len() == 1 {
            return self.0.first().map(|slot| &slot.empties);
        }
        // 0 is nobody's.
        let key = key.max(1);
        let sets = KEYS_MAX / WAYS;
        let set = usize::try_from(mix(key) % sets as u64).unwrap_or(0) * WAYS;
        let ways = self.0.get(set..set + WAYS)?;
        if let Some(slot) = ways.iter().find(|slot| slot.key.load(Ordering::Relaxed) == key) {
            return Some(&slot.empties);
        }
        let slot = ways.iter().min_by_key(|slot| slot.empties.load(Ordering::Relaxed))?;
        slot.key.store(key, Ordering::Relaxed);
        // The newcomer's bucket is empty, whoever had it.
        slot.empties.fetch_min(now, Ordering::Relaxed);
        Some(&slot.empties)
    }
}

/// The buckets of one service.
#[derive(Debug)]
struct Service {
    rules: Arc<RateRules>,
    buckets: Vec<Buckets>,
}

/// The buckets of an agent; its workers share them.
#[derive(Debug)]
pub struct Rates {
    services: ArcSwap<BTreeMap<ServiceName, Arc<Service>>>,
    start: Instant,
}

impl Rates {
    /// Starts with empty buckets at `start`.
    pub fn new(start: Instant) -> Self {
        Self { services: ArcSwap::default(), start }
    }

    /// Takes one request at `path` out of the bucket that `rules` give it; `key` is asked for what tells requests apart.
    ///
    /// # Errors
    /// [`OverRate`] if the bucket is full.
    pub fn admit(
        &self,
        service: &ServiceName,
        rules: &Arc<RateRules>,
        path: &str,
        key: impl FnOnce(&RateKey) -> u64,
        now: Instant,
    ) -> Result<(), OverRate> {
        let Some(at) = rules.rules.iter().position(|rule| rule.path.matches(path)) else { return Ok(()) };
        let Some(rule) = rules.rules.get(at) else { return Ok(()) };
        let buckets = self.buckets(service, rules);
        let now = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        let bucket = buckets.buckets.get(at).and_then(|buckets| buckets.of(key(&rule.key), now));
        let Some(bucket) = bucket else { return Ok(()) };
        take(bucket, rule.rate, now).map_err(|retry_after| OverRate { rate: rule.rate, retry_after })
    }

    /// Returns the service's buckets, made anew if its rules changed.
    fn buckets(&self, service: &ServiceName, rules: &Arc<RateRules>) -> Arc<Service> {
        let is_current = |held: &&Arc<Service>| Arc::ptr_eq(&held.rules, rules) || held.rules == *rules;
        if let Some(held) = self.services.load().get(service).filter(is_current) {
            return Arc::clone(held);
        }
        let buckets = rules.rules.iter().map(|rule| Buckets::new(&rule.key)).collect();
        let fresh = Arc::new(Service { rules: Arc::clone(rules), buckets });
        self.services.rcu(|services| {
            let mut services = BTreeMap::clone(services);
            if services.len() >= SERVICES_MAX {
                services.clear();
            }
            // Another worker was faster: its buckets count.
            if services.get(service).is_none_or(|held| !is_current(&held)) {
                services.insert(service.clone(), Arc::clone(&fresh));
            }
            services
        });
        self.services.load().get(service).map_or(fresh, Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_support::now;
    use super::*;
    use crate::upstream::{RatePath, RateRule};

    const MS: Duration = Duration::from_millis(1);

    fn rules(key: &RateKey, per_second: f64, burst: u32) -> Arc<RateRules> {
        let rule = |path, per_second| RateRule { path, key: key.clone(), rate: Rate { per_second, burst } };
        let slow = rule(RatePath::Prefix("/slow".to_owned()), per_second / 10.0);
        Arc::new(RateRules { rules: vec![slow, rule(RatePath::Any, per_second)] })
    }

    fn admit(rates: &Rates, rules: &Arc<RateRules>, path: &str, key: u64, at: Duration) -> Result<(), OverRate> {
        rates.admit(&"web".parse().unwrap(), rules, path, |_| key, now() + at)
    }

    #[test]
    fn a_burst_passes_and_then_one_at_each_interval() {
        let (rates, rules) = (Rates::new(now()), rules(&RateKey::All, 10.0, 5));
        let at_once = (0..20).filter(|_| admit(&rates, &rules, "/", 0, MS).is_ok()).count();
        assert_eq!(at_once, 5);
        let over = admit(&rates, &rules, "/", 0, MS * 31).unwrap_err();
        assert_eq!((over.retry_after, over.rate.burst), (MS * 70, 5));
        assert!(admit(&rates, &rules, "/", 0, MS * 100).is_err());
        assert!(admit(&rates, &rules, "/", 0, MS * 101).is_ok());
        assert!(admit(&rates, &rules, "/", 0, MS * 102).is_err());
        // Who is refused and asks again all the time is no worse off: 10 a second.
        let passed = (1_000..11_000).filter(|at| admit(&rates, &rules, "/", 0, MS * *at).is_ok()).count();
        assert_eq!(passed, 5 + 99);
    }

    #[test]
    fn the_first_rule_whose_path_matches_counts_alone() {
        let (rates, rules) = (Rates::new(now()), rules(&RateKey::All, 10.0, 1));
        assert!(admit(&rates, &rules, "/slow/a", 0, MS).is_ok());
        assert!(admit(&rates, &rules, "/fast", 0, MS).is_ok());
        assert!(admit(&rates, &rules, "/slow/b", 0, MS * 200).is_err());
        assert!(admit(&rates, &rules, "/fast", 0, MS * 200).is_ok());
        assert!(admit(&rates, &rules, "/slow/b", 0, MS * 1_001).is_ok());
    }

    #[test]
    fn keys_have_buckets_of_their_own_and_unknown_ones_take_empty_places_alone() {
        let (rates, rules) = (Rates::new(now()), rules(&RateKey::Source, 1.0, 2));
        for key in 1..=1_000 {
            let passed = (0..5).filter(|_| admit(&rates, &rules, "/", key, MS).is_ok()).count();
            assert_eq!(passed, 2, "key {key}");
        }
        // All buckets ran empty: a thousand others find places, and the first ones are not refused for it.
        for key in 5_001..=6_000 {
            assert!(admit(&rates, &rules, "/", key, Duration::from_secs(10)).is_ok());
        }
        assert!((1..=1_000).all(|key| admit(&rates, &rules, "/", key, Duration::from_secs(20)).is_ok()));
    }

    #[test]
    fn workers_share_a_bucket_and_changed_rules_begin_anew() {
        let rates = Arc::new(Rates::new(now()));
        let all = rules(&RateKey::All, 1.0, 1_000);
        let passed: usize = std::thread::scope(|scope| {
            let worker = || (0..2_000).filter(|_| admit(&rates, &all, "/", 0, MS).is_ok()).count();
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(passed, 1_000);
        assert!(admit(&rates, &rules(&RateKey::All, 1.0, 1_000), "/", 0, MS).is_err(), "the same rules, written anew");
        assert!(admit(&rates, &rules(&RateKey::All, 2.0, 1_000), "/", 0, MS).is_ok());
    }
}

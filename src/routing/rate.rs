//! Limits of requests: GCRA, the leaky bucket as a meter (ITU-T I.371, annex A).
//!
//! A key's whole state is one number, the time at which its bucket would be empty: it is kept in an atomic, so that the
//! workers of an agent share it without a lock. Keys that come by themselves (callers, header values) have a table of fixed
//! size: a key that is not known takes the place of one whose bucket is empty, which loses nothing, or, where more keys are
//! active than the table has places, of the one that is nearest to it.
//!
//! Of a limit that holds for the whole mesh a bucket is this node's share: its rate is set from outside (`quota`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::draw::{key_of, mix};
use super::quota::Asked;
use crate::model::ServiceName;
use crate::upstream::{Rate, RateKey, RatePath, RateRule, RateRules, RateScope};

/// Keys of one rule: 64 KiB.
pub const KEYS_MAX: usize = 4096;
/// Keys of one rule that holds for the whole mesh: callers, by their service.
pub const SHARED_KEYS_MAX: usize = 1024;
/// Longest time that one request fills a bucket: a share of next to nothing.
const EACH_MAX: Duration = Duration::from_hours(24);
/// How many times less than the limit passes where nobody has made shares yet: one request, until the next tick.
const UNKNOWN_PART: f64 = 1024.0;
/// Longest time after which who is over a share is told to come again.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Places that a key may have.
const WAYS: usize = 4;
/// Services whose limits are kept.
const SERVICES_MAX: usize = 4096;

/// A request is over its limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OverRate {
    /// The limit.
    pub rate: Rate,
    /// When the next one will be let through, if no other comes before it; of a share [`RETRY_MAX`] at most.
    pub retry_after: Duration,
}

/// Takes one request out of the bucket whose emptying time is `empties`, in nanoseconds on a clock where `now` is; each
/// request fills it for `each`, and it holds `depth`.
fn take(empties: &AtomicU64, (each, depth): (u64, u64), now: u64) -> Result<(), Duration> {
    let mut wait = 0;
    let taken = empties.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empties| {
        let next = empties.max(now).saturating_add(each);
        wait = next.saturating_sub(now).saturating_sub(depth);
        (wait == 0).then_some(next)
    });
    taken.map(drop).map_err(|_| Duration::from_nanos(wait))
}

fn nanos(seconds: f64) -> u64 {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or(EACH_MAX).min(EACH_MAX);
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Debug, Default)]
struct Slot {
    key: AtomicU64,
    empties: AtomicU64,
}

/// This node's share of one bucket of the whole mesh.
#[derive(Debug)]
struct Part {
    /// How long one request fills the bucket, in nanoseconds; 0: nobody has said yet.
    each: AtomicU64,
    /// Requests since the last look.
    asked: AtomicU32,
}

/// The buckets of one rule.
#[derive(Debug)]
struct Buckets {
    slots: Box<[Slot]>,
    /// One for each slot where the limit holds for the whole mesh.
    parts: Box<[Part]>,
    /// The limit's number, the same on every node.
    number: u64,
}

impl Buckets {
    fn new(service: &ServiceName, rule: &RateRule) -> Self {
        let slots = match (&rule.key, rule.scope) {
            (RateKey::All, _) => 1,
            (_, RateScope::Node) => KEYS_MAX,
            (_, RateScope::Cluster) => SHARED_KEYS_MAX,
        };
        let parts = if rule.scope == RateScope::Cluster { slots } else { 0 };
        let part = |_| Part { each: AtomicU64::new(0), asked: AtomicU32::new(0) };
        Self {
            slots: (0..slots).map(|_| Slot::default()).collect(),
            parts: (0..parts).map(part).collect(),
            number: number_of(service, rule),
        }
    }

    /// Finds the bucket of `key`. Two that come at the same moment may count one request in each other's.
    fn place(&self, key: u64, now: u64) -> Option<usize> {
        if self.slots.len() == 1 {
            return Some(0);
        }
        // 0 is nobody's.
        let key = key.max(1);
        let sets = self.slots.len() / WAYS;
        let set = usize::try_from(mix(key) % sets as u64).unwrap_or(0) * WAYS;
        let ways = self.slots.get(set..set + WAYS)?;
        if let Some(at) = ways.iter().position(|slot| slot.key.load(Ordering::Relaxed) == key) {
            return Some(set + at);
        }
        let (at, slot) = ways.iter().enumerate().min_by_key(|(_, slot)| slot.empties.load(Ordering::Relaxed))?;
        slot.key.store(key, Ordering::Relaxed);
        // The newcomer's bucket is empty, whoever had it.
        slot.empties.fetch_min(now, Ordering::Relaxed);
        if let Some(part) = self.parts.get(set + at) {
            part.each.store(0, Ordering::Relaxed);
            part.asked.store(0, Ordering::Relaxed);
        }
        Some(set + at)
    }

    fn admit(&self, key: u64, rate: Rate, now: u64) -> Result<(), Duration> {
        let Some((at, slot)) = self.place(key, now).and_then(|at| Some((at, self.slots.get(at)?))) else {
            return Ok(());
        };
        let Some(part) = self.parts.get(at) else {
            let each = nanos(1.0 / rate.per_second);
            return take(&slot.empties, (each, each.saturating_mul(u64::from(rate.burst))), now);
        };
        part.asked.fetch_add(1, Ordering::Relaxed);
        let each = match part.each.load(Ordering::Relaxed) {
            0 => nanos(UNKNOWN_PART / rate.per_second),
            each => each,
        };
        // A share can be small for a moment: who asks again finds out.
        take(&slot.empties, (each, depth(each, rate)), now).map_err(|wait| wait.min(RETRY_MAX))
    }

    /// Changes a share. What was left in the bucket stays, and no more: shares that move make no requests.
    fn set_part(&self, at: usize, rate: Rate, share: f64, now: u64) {
        let (Some(slot), Some(part)) = (self.slots.get(at), self.parts.get(at)) else { return };
        let each = nanos(1.0 / share).max(1);
        let before = match part.each.swap(each, Ordering::Relaxed) {
            // The first share: what nobody has asked of yet begins full.
            0 if slot.empties.load(Ordering::Relaxed) <= now => return,
            0 => nanos(UNKNOWN_PART / rate.per_second),
            before => before,
        };
        if before == each {
            return;
        }
        let (was, is) = (depth(before, rate), depth(each, rate));
        let _set = slot.empties.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empties| {
            let room = was.saturating_sub(empties.saturating_sub(now));
            let room = u128::from(room) * u128::from(each) / u128::from(before);
            Some(now.saturating_add(is.saturating_sub(u64::try_from(room).unwrap_or(u64::MAX))))
        });
    }
}

/// What a share's bucket holds: its part of the burst, and one request in any case.
fn depth(each: u64, rate: Rate) -> u64 {
    nanos(f64::from(rate.burst) / rate.per_second).max(each)
}

/// Numbers a limit the same on every node; how many requests it lets through changes nothing.
fn number_of(service: &ServiceName, rule: &RateRule) -> u64 {
    let path = match &rule.path {
        RatePath::Any => "any\0".to_owned(),
        RatePath::Exact(path) => format!("exact\0{path}"),
        RatePath::Prefix(path) => format!("prefix\0{path}"),
        RatePath::Regex(regex) => format!("regex\0{}", regex.as_str()),
    };
    let key = match &rule.key {
        RateKey::All => "all".to_owned(),
        RateKey::Source => "source".to_owned(),
        RateKey::Header(name) => format!("header\0{name}"),
    };
    key_of(format!("{service}\0{key}\0{path}").as_bytes())
}

/// The buckets of one service.
#[derive(Debug)]
struct Service {
    rules: Arc<RateRules>,
    buckets: Vec<Buckets>,
}

/// A bucket that is a share of one of the whole mesh.
#[derive(Debug, Clone)]
pub struct SharedBucket {
    /// What was asked of it.
    pub asked: Asked,
    service: Arc<Service>,
    rule: usize,
    at: usize,
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

    /// Takes one request at `path` out of the bucket that `rules` give it, or a connection of bytes, which has no path; `key`
    /// is asked for what tells calls apart. A path that may be read in several ways counts in the bucket of each; what one of
    /// them refuses is not put back into those before it.
    ///
    /// # Errors
    /// [`OverRate`] if a bucket is full.
    pub fn admit(
        &self,
        service: &ServiceName,
        rules: &Arc<RateRules>,
        path: Option<&str>,
        key: impl Fn(&RateKey) -> u64,
        now: Instant,
    ) -> Result<(), OverRate> {
        let of_stream = if path.is_none() { rules.of_stream() } else { None };
        let counted = path.into_iter().flat_map(|path| rules.of_path(path)).chain(of_stream);
        let mut buckets = None;
        for at in counted {
            let buckets = buckets.get_or_insert_with(|| self.buckets(service, rules));
            let (Some(rule), Some(bucket)) = (rules.rules.get(at), buckets.buckets.get(at)) else { continue };
            let admitted = bucket.admit(key(&rule.key), rule.rate, self.nanos(now));
            admitted.map_err(|retry_after| OverRate { rate: rule.rate, retry_after })?;
        }
        Ok(())
    }

    /// Counts what was asked since the last call of the limits of `service` that hold for the whole mesh.
    pub fn take_asked(&self, service: &ServiceName, rules: &Arc<RateRules>) -> Vec<SharedBucket> {
        let held = self.buckets(service, rules);
        let mut asked = Vec::new();
        for (rule, (buckets, limit)) in held.buckets.iter().zip(&rules.rules).enumerate() {
            for (at, part) in buckets.parts.iter().enumerate() {
                let count = part.asked.swap(0, Ordering::Relaxed);
                let key = buckets.slots.get(at).map_or(0, |slot| slot.key.load(Ordering::Relaxed));
                if limit.key != RateKey::All && key == 0 {
                    continue;
                }
                let number = if limit.key == RateKey::All { buckets.number } else { mix(buckets.number ^ key) };
                let (service, per_second) = (service.clone(), limit.rate.per_second);
                let of = if limit.key == RateKey::All { Asked::of_all } else { Asked::of_one };
                let asked_of = of(number, service, per_second, count);
                asked.push(SharedBucket { asked: asked_of, service: Arc::clone(&held), rule, at });
            }
        }
        asked
    }

    /// Lets `share` requests a second through a bucket from now on.
    pub fn set_share(&self, bucket: &SharedBucket, share: f64, now: Instant) {
        let rule = bucket.service.rules.rules.get(bucket.rule);
        if let (Some(rule), Some(buckets)) = (rule, bucket.service.buckets.get(bucket.rule)) {
            buckets.set_part(bucket.at, rule.rate, share, self.nanos(now));
        }
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Returns the service's buckets, made anew if its rules changed.
    fn buckets(&self, service: &ServiceName, rules: &Arc<RateRules>) -> Arc<Service> {
        let is_current = |held: &&Arc<Service>| Arc::ptr_eq(&held.rules, rules) || held.rules == *rules;
        if let Some(held) = self.services.load().get(service).filter(is_current) {
            return Arc::clone(held);
        }
        let buckets = rules.rules.iter().map(|rule| Buckets::new(service, rule)).collect();
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

    const MS: Duration = Duration::from_millis(1);

    fn rules(key: &RateKey, per_second: f64, burst: u32) -> Arc<RateRules> {
        let rule = |path, per_second| RateRule {
            path,
            key: key.clone(),
            rate: Rate { per_second, burst },
            scope: RateScope::Node,
        };
        let slow = rule(RatePath::Prefix("/slow".to_owned()), per_second / 10.0);
        Arc::new(RateRules { rules: vec![slow, rule(RatePath::Any, per_second)] })
    }

    fn admit(rates: &Rates, rules: &Arc<RateRules>, path: &str, key: u64, at: Duration) -> Result<(), OverRate> {
        rates.admit(&"web".parse().unwrap(), rules, Some(path), |_| key, now() + at)
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
    fn no_way_of_writing_a_path_leads_past_its_rule() {
        let ways = ["/%73low", "//slow", "/x/../slow", "/slow;v=1", "/x/%2e%2e/slow", "/%2573low", "/x%2f..%2fslow"];
        for way in ways {
            let (rates, rules) = (Rates::new(now()), rules(&RateKey::All, 10.0, 2));
            // The burst is two, for either rule: each way counts in that of `/slow`.
            assert!(
                admit(&rates, &rules, way, 0, MS).is_ok() && admit(&rates, &rules, "/slow", 0, MS).is_ok(),
                "{way}"
            );
            let over = admit(&rates, &rules, "/slow", 0, MS).unwrap_err();
            assert!((over.rate.per_second - 1.0).abs() < 1e-9, "{way}");
        }
        // And a generous rule that it begins as takes it from none.
        let (rates, rules) = (Rates::new(now()), rules(&RateKey::All, 10.0, 1));
        assert!(admit(&rates, &rules, "/slow/../fast", 0, MS).is_ok());
        assert!(admit(&rates, &rules, "/slow", 0, MS).is_err() && admit(&rates, &rules, "/fast", 0, MS).is_err());
    }

    #[test]
    fn a_connection_counts_by_the_rule_that_needs_no_path() {
        let (rates, rules) = (Rates::new(now()), rules(&RateKey::Source, 10.0, 2));
        let admit = |source: u64, at| rates.admit(&"web".parse().unwrap(), &rules, None, |_| source, now() + at);
        assert!(admit(1, MS).is_ok() && admit(1, MS).is_ok());
        assert!((admit(1, MS).unwrap_err().rate.per_second - 10.0).abs() < 1e-9);
        assert!(admit(2, MS).is_ok(), "another caller has its own");
        assert!(admit(1, MS * 101).is_ok() && admit(1, MS * 102).is_err());
        let paths_alone = Arc::new(RateRules { rules: rules.rules[..1].to_vec() });
        assert!((0..50).all(|_| rates.admit(&"db".parse().unwrap(), &paths_alone, None, |_| 0, now()).is_ok()));
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
    fn a_share_that_moves_makes_no_requests_and_loses_none() {
        let rate = Rate { per_second: 100.0, burst: 50 };
        let rule = RateRule { path: RatePath::Any, key: RateKey::All, rate, scope: RateScope::Cluster };
        let rules = Arc::new(RateRules { rules: vec![rule] });
        let (rates, web) = (Rates::new(now()), "web".parse().unwrap());
        let set = |share: f64, at: Duration| {
            let buckets = rates.take_asked(&web, &rules);
            rates.set_share(&buckets[0], share, now() + at);
            buckets[0].asked.count
        };
        let passed =
            |times: usize, at: Duration| (0..times).filter(|_| admit(&rates, &rules, "/", 0, at).is_ok()).count();
        // Before anybody has said a share, one request passes, and what is refused comes again soon.
        assert_eq!(passed(5, MS), 1);
        assert!(admit(&rates, &rules, "/", 0, MS).unwrap_err().retry_after <= RETRY_MAX);
        assert_eq!(set(50.0, MS * 2), 6);
        assert_eq!(passed(5, MS * 2), 0, "the first share is of what is left");
        // Half of the limit: half of the burst, half a second later.
        assert_eq!(passed(100, MS * 1_002), 25);
        for share in [100.0, 1.0, 100.0, 5.0, 100.0] {
            set(share, MS * 1_002);
            assert_eq!(passed(100, MS * 1_002), 0, "made by a share of {share}");
        }
        assert_eq!(passed(100, MS * 1_102), 10);
        // Ten are left; with a tenth of the limit five fit, and they stay when it is all again.
        assert_eq!(passed(0, MS * 1_202), 0);
        set(10.0, MS * 1_202);
        set(100.0, MS * 1_202);
        assert_eq!(passed(100, MS * 1_202), 5);
    }

    #[test]
    fn a_bucket_that_nobody_asked_of_begins_full() {
        let rate = Rate { per_second: 100.0, burst: 50 };
        let rule = RateRule { path: RatePath::Any, key: RateKey::All, rate, scope: RateScope::Cluster };
        let rules = Arc::new(RateRules { rules: vec![rule] });
        let (rates, web) = (Rates::new(now()), "web".parse().unwrap());
        rates.set_share(&rates.take_asked(&web, &rules)[0], 50.0, now() + MS);
        assert_eq!((0..100).filter(|_| admit(&rates, &rules, "/", 0, MS).is_ok()).count(), 25);
    }

    #[test]
    fn limits_of_the_mesh_have_a_number_for_each_caller_that_is_the_same_everywhere() {
        let rate = Rate { per_second: 100.0, burst: 50 };
        let rule = RateRule { path: RatePath::Any, key: RateKey::Source, rate, scope: RateScope::Cluster };
        let rules = Arc::new(RateRules { rules: vec![rule] });
        let numbers = |keys: &[u64]| {
            let rates = Rates::new(now());
            for key in keys {
                let _passed = admit(&rates, &rules, "/", *key, MS);
            }
            let asked = rates.take_asked(&"web".parse().unwrap(), &rules);
            let mut numbers: Vec<u64> = asked.iter().map(|bucket| bucket.asked.limit).collect();
            numbers.sort_unstable();
            numbers
        };
        assert_eq!(numbers(&[1, 2, 3]), numbers(&[3, 1, 2]));
        assert_eq!(numbers(&[1, 2, 3]).len(), 3);
        assert_eq!(numbers(&[]).len(), 0);
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

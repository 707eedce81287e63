//! Each node's share of limits that hold for the whole mesh.
//!
//! ```text
//!   asked here ------> demand --> report, if it changed by much --> gossip --> others' bins
//!   others' reports -> bins (256 of them, by size) --\
//!   own report, held back ---------------------------+--> water filling --> share --> Rates
//! ```
//!
//! A limit L is divided among its mates: the living nodes that have an instance of the service. Each gets what it asks
//! for up to a level that all have in common, so that all of L is given out (max-min fairness), and of what nobody asks
//! for an equal part. A node that says nothing counts as if it asked for [`FLOOR`] of an equal part, and has that much.
//!
//! Why the sum of the shares stays within L: a node counts its own demand at the least that it reported during a hold,
//! others' at the newest that it heard. So where each report reaches everybody within the hold, nobody counts itself at
//! more than anybody else counts it. A share falls with others' demand and rises with the own, and where all count alike
//! the shares are L together: so they are never more. Where many report at once, reports may take longer than the short
//! hold: then a node goes no higher than an equal part until it has held for longer; equal parts are L together as well.
//!
//! Invariants: what a node claims costs the others no more than all above their equal parts; a report counts for a time
//! alone; the bytes that reports cost are bounded by the rests below, however demand changes.
//! A pure core. Not here: buckets (`rate`), who signs and carries reports (`membership`), who is a mate (the owner).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::draw::Draw;
use crate::model::{DEMANDS_MAX, Demand, NodeName, ServiceName};

/// How often demand is measured and shares are made.
pub const TICK: Duration = Duration::from_millis(250);
/// What a node that says nothing has and counts as, of an equal part.
pub const FLOOR: f64 = 0.05;
/// Steps of a reported demand in an octave; it is rounded up, by 9 % at most.
const STEPS: f64 = 8.0;
/// A demand that is not reported.
const SILENT: u8 = u8::MAX;
/// A report follows a demand that rose by 19 % or fell by 30 %.
const RISE_STEPS: u8 = 2;
const FALL_STEPS: u8 = 4;
/// Ticks that a demand is averaged over at once, so that a rise is seen within 1 s, and ticks of the slow average that it
/// falls with: 4 s.
const WINDOW_TICKS: usize = 4;
/// A change is told when it has lasted, so that one report says it all and noise says nothing; sooner where the next report
/// may soon follow.
const SETTLE_MAX: Duration = Duration::from_secs(4);
const SLOW_TICKS: f64 = 16.0;
/// Shortest time between two reports of a node.
const REST_MIN: Duration = Duration::from_millis(500);
/// Reports of changes that all mates of a limit together send in a second, and repetitions.
const CHANGES_PER_SECOND: u32 = 25;
const REPEATS_PER_SECOND: u32 = 4;
/// Shortest time between two repetitions.
const REPEAT_MIN: Duration = Duration::from_secs(30);
/// A report that is not repeated in so many times counts no longer.
const REPEATS_MISSED_MAX: u32 = 3;
/// With so many rises heard during a hold, reports may be late.
const RISES_QUIET_MAX: usize = 8;
/// A limit that nobody asks for is forgotten here.
const IDLE_MAX: Duration = Duration::from_mins(1);
/// Limits that a node divides; others have their floor.
pub const LIMITS_MAX: usize = 4096;
/// Nodes whose reports are kept: as many as there are members at most.
const TOLD_MAX: usize = 30_000;

/// How long a report takes to reach all of `mates` where few are on their way: gossip's rounds are 200 ms apart.
pub fn hold(mates: usize) -> Duration {
    Duration::from_millis(1000 + 200 * u64::from(mates.max(1).ilog2()))
}

/// Shortest time between two reports of one of `mates`; also the long hold, and what a newcomer takes to hear of all.
pub fn rest(mates: usize) -> Duration {
    let mates = u32::try_from(mates).unwrap_or(u32::MAX);
    (Duration::from_secs(1) * mates / CHANGES_PER_SECOND).max(REST_MIN)
}

/// Time between two repetitions of a report of one of `mates`.
pub fn repeat(mates: usize) -> Duration {
    let mates = u32::try_from(mates).unwrap_or(u32::MAX);
    (Duration::from_secs(1) * mates / REPEATS_PER_SECOND).max(REPEAT_MIN)
}

/// What a code stands for, of the whole limit; [`SILENT`]: nothing.
fn part_of(code: u8) -> f64 {
    if code == SILENT { 0.0 } else { (-f64::from(code) / STEPS).exp2() }
}

/// The code of a part, rounded up; [`SILENT`] where it is too small to tell.
fn code_of(part: f64) -> u8 {
    if part <= 0.0 {
        return SILENT;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a byte")]
    let code = (-part.log2() * STEPS).floor().clamp(0.0, f64::from(SILENT)) as u8;
    code
}

/// What was asked of a limit since the last tick.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The limit's number, the same on every node.
    pub limit: u64,
    /// Whose calls it bounds.
    pub service: ServiceName,
    /// The limit, for the whole mesh.
    pub per_second: f64,
    /// Requests, let through or not.
    pub count: u32,
    /// Whether it is divided though nobody asks: it is not one of many callers'.
    is_lasting: bool,
}

impl Asked {
    /// What was asked of a limit of all callers together.
    pub fn of_all(limit: u64, service: ServiceName, per_second: f64, count: u32) -> Self {
        Self { limit, service, per_second, count, is_lasting: true }
    }

    /// What was asked of the limit of one caller.
    pub fn of_one(limit: u64, service: ServiceName, per_second: f64, count: u32) -> Self {
        Self { limit, service, per_second, count, is_lasting: false }
    }
}

/// What follows from a tick.
#[derive(Debug, Default)]
pub struct Divided {
    /// Requests a second that this node lets through, by limit.
    pub shares: Vec<(u64, f64)>,
    /// To be told to the others.
    pub report: Option<Demand>,
}

#[derive(Debug)]
struct Limit {
    service: ServiceName,
    per_second: f64,
    asked_at: Instant,
    window: VecDeque<u32>,
    slow: f64,
    /// What the others were told: from when on, which code. The first is what held at the longest hold's beginning.
    told: VecDeque<(Instant, u8)>,
    /// The code that this node counts itself at.
    granted: u8,
    /// The others' reports, by code.
    bins: Box<[u16; 256]>,
    /// When others' demand rose, the last times.
    rises: VecDeque<Instant>,
}

impl Limit {
    fn new(asked: &Asked, now: Instant) -> Self {
        Self {
            service: asked.service.clone(),
            per_second: asked.per_second,
            asked_at: now,
            window: VecDeque::with_capacity(WINDOW_TICKS),
            slow: 0.0,
            told: VecDeque::from([(now, SILENT)]),
            granted: SILENT,
            bins: Box::new([0; 256]),
            rises: VecDeque::with_capacity(RISES_QUIET_MAX),
        }
    }

    fn measure(&mut self, count: u32, now: Instant) {
        if count > 0 {
            self.asked_at = now;
        }
        if self.window.len() == WINDOW_TICKS {
            self.window.pop_front();
        }
        self.window.push_back(count);
        self.slow += (f64::from(count) / TICK.as_secs_f64() - self.slow) / SLOW_TICKS;
    }

    /// Requests a second.
    fn demand(&self) -> f64 {
        let sum: f64 = self.window.iter().map(|count| f64::from(*count)).sum();
        #[expect(clippy::cast_precision_loss, reason = "a few")]
        let mean = sum / (TICK.as_secs_f64() * WINDOW_TICKS as f64);
        mean.max(self.slow)
    }

    fn told_last(&self) -> u8 {
        self.told.back().map_or(SILENT, |(_, code)| *code)
    }

    /// The code of the present demand.
    fn code(&self, mates: usize) -> u8 {
        let part = (self.demand() / self.per_second).min(1.0);
        // What was told stays told until it is well below the floor.
        let least = if self.told_last() == SILENT { floor(mates) } else { floor(mates) / 2.0 };
        if part <= least { SILENT } else { code_of(part).min(SILENT - 1) }
    }

    fn is_news(&self, mates: usize) -> bool {
        let (told, code) = (self.told_last(), self.code(mates));
        if (told == SILENT) != (code == SILENT) {
            return true;
        }
        code.saturating_add(RISE_STEPS) <= told || code >= told.saturating_add(FALL_STEPS)
    }

    fn tell(&mut self, code: u8, now: Instant) {
        // A smaller demand counts at once: a greater code.
        self.granted = self.granted.max(code);
        self.told.push_back((now, code));
    }

    /// The least that was told during the last `time`.
    fn held(&self, time: Duration, now: Instant) -> u8 {
        let mut least = self.told_last();
        for (at, code) in self.told.iter().rev() {
            least = least.max(*code);
            if now.saturating_duration_since(*at) >= time {
                break;
            }
        }
        least
    }

    fn heard_rise(&mut self, now: Instant) {
        if self.rises.len() == RISES_QUIET_MAX {
            self.rises.pop_front();
        }
        self.rises.push_back(now);
    }

    fn is_quiet(&self, mates: usize, now: Instant) -> bool {
        let eighth_last = self.rises.front().filter(|_| self.rises.len() == RISES_QUIET_MAX);
        eighth_last.is_none_or(|at| now.saturating_duration_since(*at) >= hold(mates))
    }

    /// Lets the own demand count, as far as the others know of it.
    fn grant(&mut self, mates: usize, now: Instant) {
        let (short, long) = (hold(mates), rest(mates).max(hold(mates)));
        let known = self.held(short, now);
        let counts = if self.is_quiet(mates, now) {
            known
        } else {
            // Rounded to less than an equal part.
            let equal = code_of(equal_part(mates)).saturating_add(1);
            self.held(long, now).min(known.max(equal))
        };
        self.granted = self.granted.min(counts).max(self.told_last());
        while self.told.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= long) {
            self.told.pop_front();
        }
    }

    /// This node's part of the limit: water filling, and an equal part of what is left.
    fn part(&self, mates: usize) -> f64 {
        let floor = floor(mates);
        let own = part_of(self.granted).max(floor);
        let others: usize = self.bins.iter().take(usize::from(SILENT)).map(|count| usize::from(*count)).sum();
        let silent = mates.saturating_sub(1).saturating_sub(others);
        let mut left = 1.0 - floor * count(silent);
        let mut thirsty = others + 1;
        let mut is_own_due = true;
        // From the smallest demand up; the own one takes its place among them.
        for (code, number) in self.bins.iter().enumerate().take(usize::from(SILENT)).rev() {
            let part = part_of(u8::try_from(code).unwrap_or(SILENT)).max(floor);
            if is_own_due && own <= part {
                if own > left / count(thirsty) {
                    return left / count(thirsty);
                }
                (left, thirsty, is_own_due) = (left - own, thirsty - 1, false);
            }
            if *number == 0 {
                continue;
            }
            if part > left / count(thirsty) {
                // The level: nothing is left over, and who is smaller has what it asks for.
                return if is_own_due { left / count(thirsty) } else { own };
            }
            left -= part * f64::from(*number);
            thirsty -= usize::from(*number).min(thirsty);
        }
        if is_own_due {
            if own > left {
                return left;
            }
            left -= own;
        }
        own + left.max(0.0) / count(mates)
    }
}

#[expect(clippy::cast_precision_loss, reason = "numbers of nodes")]
fn count(number: usize) -> f64 {
    number as f64
}

fn equal_part(mates: usize) -> f64 {
    1.0 / count(mates.max(1))
}

fn floor(mates: usize) -> f64 {
    FLOOR * equal_part(mates)
}

/// What a node knows of limits that hold for the whole mesh.
#[derive(Debug)]
pub struct Quotas {
    own: NodeName,
    began: Instant,
    draw: Draw,
    limits: BTreeMap<u64, Limit>,
    /// Who divides the limits of a service, this node included.
    mates: BTreeMap<ServiceName, Arc<BTreeSet<NodeName>>>,
    told: BTreeMap<NodeName, (Demand, Instant)>,
    reported_at: Option<Instant>,
    /// Since when there is something to tell.
    news_since: Option<Instant>,
    repeat_at: Instant,
    expire_at: Instant,
    /// The greatest number of mates.
    most: usize,
}

impl Quotas {
    /// Starts without a limit.
    pub fn new(own: NodeName, seed: u64, now: Instant) -> Self {
        Self {
            own,
            began: now,
            draw: Draw::new(seed),
            limits: BTreeMap::new(),
            mates: BTreeMap::new(),
            told: BTreeMap::new(),
            reported_at: None,
            news_since: None,
            repeat_at: now,
            expire_at: now,
            most: 1,
        }
    }

    /// Sets who divides the limits of each service.
    pub fn set_mates(&mut self, mates: BTreeMap<ServiceName, Arc<BTreeSet<NodeName>>>, now: Instant) {
        if mates == self.mates {
            return;
        }
        let has_newcomer = mates.iter().any(|(service, nodes)| {
            self.mates.get(service).is_some_and(|before| nodes.iter().any(|node| !before.contains(node)))
        });
        self.mates = mates;
        self.most = self.mates.values().map(|nodes| nodes.len()).max().unwrap_or(1).max(1);
        self.limits.retain(|_, limit| self.mates.contains_key(&limit.service));
        if has_newcomer {
            // It knows of nobody's demand: all tell theirs again, one after the other.
            let after = rest(self.most).mul_f64(self.draw.unit());
            self.repeat_at = self.repeat_at.min(now + after);
        }
        let numbers: Vec<u64> = self.limits.keys().copied().collect();
        for number in numbers {
            self.fill(number);
        }
    }

    /// Takes over what `node` tells, in place of what it told before.
    pub fn handle_demand(&mut self, node: &NodeName, demand: &Demand, now: Instant) {
        if *node == self.own || (self.told.len() >= TOLD_MAX && !self.told.contains_key(node)) {
            return;
        }
        // A limit that is named twice would count as two nodes.
        let once: BTreeMap<u64, u8> = demand.limits.iter().take(DEMANDS_MAX).copied().collect();
        let demand = Demand { limits: once.into_iter().collect() };
        let before = self.told.insert(node.clone(), (demand.clone(), now));
        let before = before.map(|(demand, _)| demand).unwrap_or_default();
        self.count(node, &before, -1);
        self.count(node, &demand, 1);
        for (number, code) in &demand.limits {
            let was = before.limits.iter().find(|(other, _)| other == number).map_or(SILENT, |(_, code)| *code);
            if *code < was
                && let Some(limit) = self.limits.get_mut(number)
            {
                limit.heard_rise(now);
            }
        }
    }

    /// Adds a report to the bins, or takes it out.
    fn count(&mut self, node: &NodeName, demand: &Demand, by: i16) {
        for (number, code) in &demand.limits {
            let Some(limit) = self.limits.get_mut(number) else { continue };
            let is_mate = self.mates.get(&limit.service).is_some_and(|mates| mates.contains(node));
            if let Some(bin) = limit.bins.get_mut(usize::from(*code)).filter(|_| is_mate) {
                *bin = bin.saturating_add_signed(by);
            }
        }
    }

    /// Counts the reports about a limit anew.
    fn fill(&mut self, number: u64) {
        let Some(limit) = self.limits.get_mut(&number) else { return };
        let Some(mates) = self.mates.get(&limit.service) else { return };
        limit.bins.fill(0);
        for (_, (demand, _)) in self.told.iter().filter(|(node, _)| mates.contains(*node)) {
            let codes = demand.limits.iter().filter(|(other, _)| *other == number).map(|(_, code)| *code);
            for code in codes.take(1) {
                if let Some(bin) = limit.bins.get_mut(usize::from(code)) {
                    *bin = bin.saturating_add(1);
                }
            }
        }
    }

    /// How many nodes divide the limits of a service.
    pub fn mates(&self, service: &ServiceName) -> usize {
        self.mates.get(service).map_or(1, |mates| mates.len().max(1))
    }

    /// What a limit's newcomer is let through at the least, in requests a second.
    pub fn floor(&self, service: &ServiceName, per_second: f64) -> f64 {
        per_second * floor(self.mates(service))
    }

    /// Measures what was asked since the last tick, divides, and says what the others must hear. Every limit is named in
    /// each tick for as long as it holds.
    pub fn tick(&mut self, asked: &[Asked], now: Instant) -> Divided {
        self.expire(now);
        let counts: BTreeMap<u64, u32> = asked.iter().map(|one| (one.limit, one.count)).collect();
        for one in asked {
            self.open(one, now);
        }
        for (number, limit) in &mut self.limits {
            limit.measure(counts.get(number).copied().unwrap_or(0), now);
        }
        self.limits.retain(|_, limit| {
            let is_asked = now.saturating_duration_since(limit.asked_at) < IDLE_MAX;
            is_asked || limit.told_last() != SILENT || limit.granted != SILENT
        });
        let report = self.report(now);
        let mut shares = Vec::with_capacity(self.limits.len());
        for (number, limit) in &mut self.limits {
            let mates = self.mates.get(&limit.service).map_or(1, |mates| mates.len().max(1));
            limit.grant(mates, now);
            let mut part = limit.part(mates);
            if now.saturating_duration_since(self.began) < rest(mates) + hold(mates) {
                // Others' reports may not have come to this life yet: equal parts are safe where all begin.
                part = part.min(equal_part(mates));
            }
            shares.push((*number, part * limit.per_second));
        }
        Divided { shares, report }
    }

    fn open(&mut self, asked: &Asked, now: Instant) {
        if !self.limits.contains_key(&asked.limit) {
            if asked.count == 0 && !asked.is_lasting {
                return;
            }
            if self.limits.len() >= LIMITS_MAX {
                return;
            }
            self.limits.insert(asked.limit, Limit::new(asked, now));
            self.fill(asked.limit);
        }
        if let Some(limit) = self.limits.get_mut(&asked.limit) {
            limit.per_second = asked.per_second;
        }
    }

    /// Forgets reports that were not repeated.
    fn expire(&mut self, now: Instant) {
        if now < self.expire_at {
            return;
        }
        self.expire_at = now + REPEAT_MIN;
        // Where this node has no limit itself, it keeps what it hears for the time when it may have.
        let lasts = repeat(self.most.max(self.told.len())) * (REPEATS_MISSED_MAX + 1);
        let is_over = |at: &Instant| now.saturating_duration_since(*at) >= lasts;
        let over: Vec<NodeName> =
            self.told.iter().filter(|(_, (_, at))| is_over(at)).map(|(node, _)| node.clone()).collect();
        for node in over {
            if let Some((demand, _)) = self.told.remove(&node) {
                self.count(&node, &demand, -1);
            }
        }
    }

    fn report(&mut self, now: Instant) -> Option<Demand> {
        let mates =
            |limit: &Limit| self.mates.get(&limit.service).map_or(1, |mates: &Arc<BTreeSet<NodeName>>| mates.len());
        let may = self.reported_at.is_none_or(|at| now.saturating_duration_since(at) >= rest(self.most));
        // Alone nobody has to know.
        if !may || self.most < 2 {
            return None;
        }
        let is_news = self.limits.values().any(|limit| limit.is_news(mates(limit)));
        let is_told = self.limits.values().any(|limit| limit.told_last() != SILENT);
        let since = *self.news_since.get_or_insert(now);
        if !is_news {
            self.news_since = None;
        }
        let is_due = is_news && now.saturating_duration_since(since) >= rest(self.most).min(SETTLE_MAX);
        let is_repeated = is_told && now >= self.repeat_at;
        if !is_due && !is_repeated {
            return None;
        }
        self.news_since = None;
        let mut codes: Vec<(u8, u64)> = self
            .limits
            .iter()
            .map(|(number, limit)| (limit.code(mates(limit)), *number))
            .filter(|(code, _)| *code != SILENT)
            .collect();
        codes.sort_unstable();
        codes.truncate(DEMANDS_MAX);
        for (number, limit) in &mut self.limits {
            let code = codes.iter().find(|(_, other)| other == number).map_or(SILENT, |(code, _)| *code);
            limit.tell(code, now);
        }
        self.reported_at = Some(now);
        // Spread, so that those that began together do not go on so.
        self.repeat_at = now + repeat(self.most).mul_f64(0.75 + self.draw.unit() / 2.0);
        Some(Demand { limits: codes.into_iter().map(|(code, number)| (number, code)).collect() })
    }
}

#[cfg(test)]
#[path = "quota_tests.rs"]
mod tests;

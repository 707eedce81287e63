//! When another try of a request goes out while the first one is not answered (Dean and Barroso, "The Tail at Scale", 2013).
//!
//! ```text
//!   first try --- Hedge::wait ---> second try, elsewhere --- the same wait ---> third ...
//!        \_____________________________\______ the first answer wins, the others are cancelled
//! ```
//!
//! Invariants: only methods that may be repeated are hedged (RFC 9110 §9.2.2), those that write and those of gRPC only where
//! the route says so; a percentile that rests on too few answers hedges nothing; a try that is given up counts with the time that it had,
//! so that hedging does not move the percentile that it goes by.
//! A pure core. Not here: the budget (`retry`), sending and cancelling (`proxy`).

use std::time::Duration;

use http::Method;
use tokio::time::Instant;

/// Requests of one race, the first included: a third one halves what the second left, a fourth finds nothing.
pub const REQUESTS_MAX: u32 = 3;
/// Shortest wait: below it nearly every request would be sent twice.
pub const DELAY_MIN: Duration = Duration::from_millis(1);
/// Fewest answers that a percentile rests on: 5 of them are beyond the 95th.
pub const ANSWERS_MIN: u32 = 100;
/// Answers count for one to two of these.
const GENERATION: Duration = Duration::from_secs(10);
/// Buckets for each doubling: an answer's time is known to 19 %.
const STEPS: u32 = 4;
/// The first bucket ends here.
const FIRST: Duration = Duration::from_micros(100);
/// Twenty doublings of 0.1 ms: the last bucket begins at 105 s.
const BUCKETS: usize = 80;

/// How long the first try has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delay {
    /// So long.
    Fixed(Duration),
    /// As long as this percentage of the route's latest answers took; 50 to 99.
    Percentile(u8),
}

/// What a route hedges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hedge {
    /// When.
    pub delay: Delay,
    /// Tries of one request at once, the first included; 2 to [`REQUESTS_MAX`].
    pub requests: u32,
    /// PUT and DELETE, where they are repeated too.
    pub writes: Vec<Method>,
    /// The route's gRPC methods are idempotent.
    pub grpc: bool,
}

impl Hedge {
    /// Tells whether requests of `method` are hedged; of gRPC, whose calls all are POST, the route alone says so.
    pub fn covers(&self, method: &Method, is_grpc: bool) -> bool {
        // TRACE, OPTIONS, HEAD and GET are safe (RFC 9110 §9.2.1).
        method.is_safe() || self.writes.contains(method) || (self.grpc && is_grpc)
    }

    /// Returns how long a try has before the next one goes out; none: not known yet.
    pub fn wait(&self, answers: Option<&Answers>, now: Instant) -> Option<Duration> {
        match self.delay {
            Delay::Fixed(delay) => Some(delay),
            Delay::Percentile(percent) => Some(answers?.percentile(percent, now)?.max(DELAY_MIN)),
        }
    }
}

/// Answers of one generation, by how long they took.
#[derive(Debug, Clone)]
struct Generation {
    began: Instant,
    total: u32,
    buckets: [u32; BUCKETS],
}

impl Generation {
    fn new(began: Instant) -> Self {
        Self { began, total: 0, buckets: [0; BUCKETS] }
    }
}

/// How long the first tries of a route took, of late: 650 bytes.
#[derive(Debug, Clone)]
pub struct Answers {
    /// The one that is counted, and the one before it.
    generations: [Generation; 2],
}

impl Answers {
    /// Knows nothing yet.
    pub fn new(now: Instant) -> Self {
        Self { generations: [Generation::new(now), Generation::new(now)] }
    }

    /// Notes a first try that was answered, or given up, after `took`.
    pub fn note(&mut self, took: Duration, now: Instant) {
        let [current, before] = &mut self.generations;
        let age = now.saturating_duration_since(current.began);
        if age >= GENERATION {
            std::mem::swap(current, before);
            *current = Generation::new(now);
            if age >= GENERATION * 2 {
                *before = Generation::new(now);
            }
        }
        if let Some(bucket) = current.buckets.get_mut(bucket_of(took)) {
            *bucket = bucket.saturating_add(1);
            current.total = current.total.saturating_add(1);
        }
    }

    /// Returns the time within which `percent` of the answers came, rounded up to its bucket; none: too few came of late.
    pub fn percentile(&self, percent: u8, now: Instant) -> Option<Duration> {
        let is_late = |one: &&Generation| now.saturating_duration_since(one.began) < GENERATION * 3;
        let counted = || self.generations.iter().filter(is_late);
        let total: u64 = counted().map(|one| u64::from(one.total)).sum();
        if total < u64::from(ANSWERS_MIN) {
            return None;
        }
        let wanted = (total * u64::from(percent)).div_ceil(100);
        let mut seen = 0;
        for at in 0..BUCKETS {
            seen += counted().filter_map(|one| one.buckets.get(at)).map(|count| u64::from(*count)).sum::<u64>();
            if seen >= wanted {
                return Some(end_of(at));
            }
        }
        None
    }
}

fn bucket_of(took: Duration) -> usize {
    let doublings = (took.as_secs_f64() / FIRST.as_secs_f64()).max(1.0).log2();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not below zero, and far below 2^32")]
    let at = (doublings * f64::from(STEPS)).ceil() as usize;
    at.min(BUCKETS - 1)
}

fn end_of(bucket: usize) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "80 at most")]
    let doublings = bucket as f64 / f64::from(STEPS);
    FIRST.mul_f64(doublings.exp2())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::retry::Budget;
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn hedge(delay: Delay) -> Hedge {
        Hedge { delay, requests: 2, writes: Vec::new(), grpc: false }
    }

    #[test]
    fn only_what_may_be_repeated_is_hedged_and_writes_only_where_it_is_said() {
        let mut hedge = hedge(Delay::Fixed(MS));
        for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE] {
            assert!(hedge.covers(&method, false), "{method}");
        }
        for method in [Method::PUT, Method::DELETE, Method::POST, Method::PATCH, Method::CONNECT] {
            assert!(!hedge.covers(&method, true), "{method}");
        }
        hedge.writes = vec![Method::PUT];
        assert!(hedge.covers(&Method::PUT, false) && !hedge.covers(&Method::DELETE, false));
        hedge.grpc = true;
        assert!(hedge.covers(&Method::POST, true) && !hedge.covers(&Method::POST, false));
    }

    #[test]
    fn a_percentile_needs_enough_answers_and_forgets_old_ones() {
        let begun = crate::clock::now();
        let (mut answers, p95) = (Answers::new(begun), hedge(Delay::Percentile(95)));
        assert_eq!(p95.wait(None, begun), None);
        for number in 1..ANSWERS_MIN {
            answers.note(MS * 10 * (1 + number % 2), begun);
        }
        assert_eq!(p95.wait(Some(&answers), begun), None);
        answers.note(MS * 10, begun);
        let wait = p95.wait(Some(&answers), begun).unwrap();
        assert!((MS * 20..MS * 24).contains(&wait), "{wait:?}");
        // Faster ones in the two generations after it take its place.
        for later in [10, 20] {
            for _ in 0..1_000 {
                answers.note(MS, begun + MS * 1_000 * later);
            }
        }
        let wait = p95.wait(Some(&answers), begun + MS * 21_000).unwrap();
        assert!((MS..MS * 2).contains(&wait), "{wait:?}");
        // Nothing came for half a minute: nothing is known.
        assert_eq!(p95.wait(Some(&answers), begun + MS * 60_000), None);
    }

    proptest! {
        #[test]
        fn a_percentile_is_right_to_a_bucket(times in prop::collection::vec(100u64..60_000_000, 100..400), percent in 50u8..100) {
            let now = crate::clock::now();
            let mut answers = Answers::new(now);
            let mut times: Vec<Duration> = times.into_iter().map(Duration::from_micros).collect();
            for took in &times {
                answers.note(*took, now);
            }
            times.sort();
            let exact = times[(times.len() * usize::from(percent)).div_ceil(100) - 1];
            let told = answers.percentile(percent, now).unwrap();
            prop_assert!(told >= exact.mul_f64(0.999) && told <= exact.mul_f64(1.2), "{told:?}, exact {exact:?}");
        }
    }

    /// A small generator of its own, so that a run is the same on every machine.
    struct Draws(u64);

    impl Draws {
        fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from(u32::try_from(self.0 >> 32).unwrap()) / f64::from(u32::MAX)
        }
    }

    /// What became of 60,000 requests, 500 a second, to 30 instances that are drawn by chance.
    struct Run {
        p99: Duration,
        median: Duration,
        hedges: u32,
    }

    const REQUESTS: u32 = 60_000;

    /// `slow` of 30 instances take 200 ms, the others about 5.
    fn simulate(hedge: Option<&Hedge>, slow: f64) -> Run {
        let begun = crate::clock::now();
        let mut draws = Draws(20_261_121);
        let (mut answers, budget) = (Answers::new(begun), Budget::default());
        let (mut hedges, mut took) = (0, Vec::new());
        for number in 0..REQUESTS {
            let now = begun + MS * 2 * number;
            budget.deposit(now);
            let mut try_once = || {
                let is_slow = draws.unit() * 30.0 < slow;
                if is_slow { MS * 200 } else { (MS * 5).mul_f64(0.2 - 0.8 * (1.0 - draws.unit() * 0.999).ln()) }
            };
            let first = try_once();
            let mut whole = first;
            if let Some(wait) = hedge.and_then(|hedge| hedge.wait(Some(&answers), now))
                && first > wait
                && budget.withdraw(now + wait)
            {
                hedges += 1;
                whole = first.min(wait + try_once());
            }
            // The loser is given up when the winner answers.
            answers.note(first.min(whole), now + whole);
            took.push(whole);
        }
        took.sort();
        let at = |percent: usize| took[(took.len() - 1) * percent / 100];
        Run { p99: at(99), median: at(50), hedges }
    }

    #[test]
    fn a_hedge_takes_the_tail_that_one_slow_instance_of_thirty_makes() {
        let plain = simulate(None, 1.0);
        for delay in [Delay::Fixed(MS * 20), Delay::Percentile(95)] {
            let run = simulate(Some(&hedge(delay)), 1.0);
            println!(
                "{delay:?}: p99 {:?}, without {:?}; median {:?}; {} hedges of {REQUESTS}",
                run.p99, plain.p99, run.median, run.hedges
            );
            assert!(plain.p99 == MS * 200 && run.p99 * 3 < plain.p99, "{:?}", run.p99);
            assert!(run.hedges * 100 < REQUESTS * 8, "{} hedges", run.hedges);
        }
    }

    #[test]
    fn where_everything_is_slow_the_budget_bounds_what_hedging_adds() {
        let run = simulate(Some(&hedge(Delay::Fixed(MS * 20))), 30.0);
        // A fifth of the requests, ten a second, and what the first window has beyond.
        assert!(run.hedges <= REQUESTS / 5 + 10 * 120 + 200, "{} hedges of {REQUESTS}", run.hedges);
        assert!(run.hedges > REQUESTS / 6, "{} hedges", run.hedges);
    }
}

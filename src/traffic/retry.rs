//! What is tried again, after how long, and how often at most.
//!
//! ```text
//!   attempt -- failed, answered --> Retry::asks_for? -- yes --> Budget::withdraw -- yes --> backoff --> next attempt
//! ```
//!
//! Invariants: a backoff is drawn from 0 to its step (full jitter), and its step is at most `most`; within any window of
//! 10 s the retries that a budget grants are at most 20 % of the requests plus 10 a second, so that retries end where all
//! requests fail.
//! A pure core. Not here: whether a body can be sent again, which instance is next (`proxy`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use tokio::time::Instant;

use crate::model::ServiceName;

/// First step of the backoff: Envoy's default.
pub const BASE: Duration = Duration::from_millis(25);
/// The longest step is this many times the first one: Envoy's default.
const MOST_FACTOR: u32 = 10;
/// Share of the requests that may be retries, as in Linkerd and Finagle.
const BUDGET_PERCENT: u64 = 20;
/// Retries a second that are granted to a service with few requests.
const BUDGET_FLOOR: u64 = 10;
/// Destinations with a budget that is remembered.
pub const BUDGETS_MAX: usize = 4096;
/// Seconds over which requests and retries are counted.
const WINDOW_SECONDS: usize = 10;
/// A server that asks for a longer wait is not asked again: the caller can wait as well.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

/// When an attempt is followed by another. Connect failures always are, as nothing was sent to an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// The instance could not be connected.
    ConnectFailure,
    /// The stream broke before an answer; an attempt that took too long counts as one.
    Reset,
    /// Any status from 500 on, and what `Reset` covers.
    ServerError,
    /// 502, 503 or 504, and what `Reset` covers.
    GatewayError,
    /// 409.
    Conflict,
    /// 429.
    TooManyRequests,
    /// This status.
    Status(u16),
    /// This `grpc-status`, in an answer that is nothing but its head.
    Grpc(u8),
}

impl std::str::FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            // Before the head was sent a reset is a failure to connect: the app cannot have seen the request.
            "connect-failure" | "refused-stream" | "reset-before-request" => Self::ConnectFailure,
            "reset" => Self::Reset,
            "5xx" => Self::ServerError,
            "gateway-error" => Self::GatewayError,
            "retriable-4xx" => Self::Conflict,
            "envoy-ratelimited" => Self::TooManyRequests,
            "cancelled" => Self::Grpc(1),
            "deadline-exceeded" => Self::Grpc(4),
            "resource-exhausted" => Self::Grpc(8),
            "internal" => Self::Grpc(13),
            "unavailable" => Self::Grpc(14),
            _ => {
                return Err("must be one of 5xx, gateway-error, reset, reset-before-request, connect-failure, refused-stream, \
                            retriable-4xx, envoy-ratelimited, cancelled, deadline-exceeded, internal, resource-exhausted, \
                            unavailable"
                    .to_owned());
            }
        })
    }
}

/// What a route tries again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// How often at most, beyond the first attempt.
    pub times: u32,
    /// When, in order.
    pub conditions: Vec<Condition>,
    /// First step of the backoff.
    pub base: Duration,
    /// Longest step.
    pub most: Duration,
}

impl Retry {
    /// Fills in what is left open.
    pub fn new(times: u32, conditions: Vec<Condition>, base: Option<Duration>, most: Option<Duration>) -> Self {
        let base = base.unwrap_or(BASE.min(most.unwrap_or(BASE)));
        Self { times, conditions, base, most: most.unwrap_or(base * MOST_FACTOR) }
    }

    /// Whether an answer with this status asks for another attempt; `grpc` is its `grpc-status` if it is nothing but a head.
    pub fn covers_answer(&self, status: u16, grpc: Option<u8>) -> bool {
        self.conditions.iter().any(|condition| match condition {
            Condition::ServerError => status >= 500,
            Condition::GatewayError => (502..=504).contains(&status),
            Condition::Conflict => status == 409,
            Condition::TooManyRequests => status == 429,
            Condition::Status(code) => status == *code,
            Condition::Grpc(code) => grpc == Some(*code),
            Condition::ConnectFailure | Condition::Reset => false,
        })
    }

    /// Whether a stream that broke without an answer asks for another attempt.
    pub fn covers_reset(&self) -> bool {
        use Condition::{GatewayError, Reset, ServerError};
        self.conditions.iter().any(|condition| matches!(condition, Reset | ServerError | GatewayError))
    }

    /// The wait before attempt `number` (1 is the first retry); `draw` is uniform over its range.
    pub fn backoff(&self, number: u32, draw: u32) -> Duration {
        let doubled = self.base.saturating_mul(1u32.checked_shl(number.saturating_sub(1)).unwrap_or(u32::MAX));
        let step = doubled.min(self.most);
        step.mul_f64(f64::from(draw) / f64::from(u32::MAX))
    }
}

/// The wait before attempt `number` (1 is the first retry) of a request that no policy is about: as [`Retry::backoff`] with
/// the steps that are default.
pub fn plain_backoff(number: u32, draw: u32) -> Duration {
    Retry::new(0, Vec::new(), None, None).backoff(number, draw)
}

/// An answer asks that no other attempt follows, or for a wait that is longer than an attempt may be put off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRetry;

/// The wait that an answer asks for before another attempt: by its `grpc-retry-pushback-ms` (gRFC A6: milliseconds; what is
/// below 0, or no number, means that there is to be no retry), else by its `Retry-After` (RFC 9110 §10.2.3: seconds; a date is
/// left to the caller, who knows the time as well). None: it says nothing of it.
///
/// # Errors
/// [`NoRetry`].
pub fn asked_wait(
    pushback: Option<&HeaderValue>,
    retry_after: Option<&HeaderValue>,
) -> Result<Option<Duration>, NoRetry> {
    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().trim().to_owned();
    let wait = match (pushback.map(text), retry_after.map(text)) {
        (Some(millis), _) => Duration::from_millis(millis.parse().map_err(|_| NoRetry)?),
        (None, Some(date)) if date.ends_with(" GMT") => return Err(NoRetry),
        (None, Some(seconds)) => match seconds.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_no_number) => return Ok(None),
        },
        (None, None) => return Ok(None),
    };
    if wait > RETRY_AFTER_MAX { Err(NoRetry) } else { Ok(Some(wait)) }
}

/// One second's counts. Those who turn to a new second at once may lose a few of each other's counts.
#[derive(Debug, Default)]
struct Second {
    /// Which, since `origin`.
    number: AtomicU64,
    requests: AtomicU64,
    retries: AtomicU64,
}

/// How many retries one destination is still granted; the workers of an agent share it, without a lock.
#[derive(Debug, Default)]
pub struct Budget {
    seconds: [Second; WINDOW_SECONDS],
    origin: OnceLock<Instant>,
}

impl Budget {
    /// Counts a request.
    pub fn deposit(&self, now: Instant) {
        if let Some(second) = self.turn(self.number(now)) {
            second.requests.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Grants a retry, or not.
    pub fn withdraw(&self, now: Instant) -> bool {
        let number = self.number(now);
        let Some(second) = self.turn(number) else { return false };
        // Counted first: of two workers at the limit none goes beyond it.
        second.retries.fetch_add(1, Ordering::Relaxed);
        let requests = self.sum(number, |second| &second.requests);
        let granted = requests * BUDGET_PERCENT / 100 + BUDGET_FLOOR * WINDOW_SECONDS as u64;
        let is_granted = self.sum(number, |second| &second.retries) <= granted;
        if !is_granted {
            decrement(&second.retries);
        }
        is_granted
    }

    /// Counts a retry that nobody asked for: those to come wait for it.
    pub fn spend(&self, now: Instant) {
        if let Some(second) = self.turn(self.number(now)) {
            second.retries.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes back a retry that was granted at `taken` and not made.
    pub fn give_back(&self, taken: Instant) {
        let number = self.number(taken);
        // A second that is out of the window may have another one in its place.
        if let Some(second) = self.place(number).filter(|second| second.number.load(Ordering::Relaxed) == number) {
            decrement(&second.retries);
        }
    }

    fn number(&self, now: Instant) -> u64 {
        now.saturating_duration_since(*self.origin.get_or_init(|| now)).as_secs()
    }

    fn place(&self, number: u64) -> Option<&Second> {
        self.seconds.get(usize::try_from(number % WINDOW_SECONDS as u64).unwrap_or(0))
    }

    /// Sums up what is counted within the window that ends with second `number`.
    fn sum(&self, number: u64, of: impl Fn(&Second) -> &AtomicU64) -> u64 {
        let is_within = |second: &&Second| second.number.load(Ordering::Relaxed) + WINDOW_SECONDS as u64 > number;
        self.seconds.iter().filter(is_within).map(|second| of(second).load(Ordering::Relaxed)).sum()
    }

    /// Returns the counts of second `number`; the first who asks for it clears what its place held.
    fn turn(&self, number: u64) -> Option<&Second> {
        let second = self.place(number)?;
        let held = second.number.load(Ordering::Relaxed);
        if held < number && second.number.compare_exchange(held, number, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            second.requests.store(0, Ordering::Relaxed);
            second.retries.store(0, Ordering::Relaxed);
        }
        Some(second)
    }
}

/// Counts one less, down to none.
fn decrement(count: &AtomicU64) {
    let _none = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
}

/// The budgets of all destinations that an agent calls.
#[derive(Debug, Default)]
pub struct Budgets(ArcSwap<BTreeMap<ServiceName, Arc<Budget>>>);

impl Budgets {
    /// Returns that of a destination. Beyond [`BUDGETS_MAX`] those that nobody holds begin anew.
    pub fn of(&self, destination: &ServiceName) -> Arc<Budget> {
        if let Some(budget) = self.0.load().get(destination) {
            return Arc::clone(budget);
        }
        let fresh = Arc::<Budget>::default();
        self.0.rcu(|budgets| {
            let mut budgets = BTreeMap::clone(budgets);
            // The map itself, before and after, holds each twice.
            if budgets.len() >= BUDGETS_MAX {
                budgets.retain(|_, budget| Arc::strong_count(budget) > 2);
            }
            if budgets.len() < BUDGETS_MAX {
                budgets.entry(destination.clone()).or_insert_with(|| Arc::clone(&fresh));
            }
            budgets
        });
        self.0.load().get(destination).map_or(fresh, Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start() -> Instant {
        crate::clock::now()
    }

    fn retry(conditions: &[&str]) -> Retry {
        Retry::new(3, conditions.iter().map(|text| text.parse().unwrap()).collect(), None, None)
    }

    #[test]
    fn conditions_cover_what_their_names_say() {
        #[track_caller]
        fn check(condition: &str, answers: &[u16], is_reset: bool) {
            let retry = retry(&[condition]);
            let found: Vec<u16> = (200..600).filter(|status| retry.covers_answer(*status, None)).collect();
            assert_eq!(found, answers, "{condition}");
            assert_eq!(retry.covers_reset(), is_reset, "{condition}");
        }
        check("5xx", &(500..600).collect::<Vec<_>>(), true);
        check("gateway-error", &[502, 503, 504], true);
        check("reset", &[], true);
        check("connect-failure", &[], false);
        check("retriable-4xx", &[409], false);
        check("envoy-ratelimited", &[429], false);
        check("unavailable", &[], false);
        assert!(retry(&["unavailable"]).covers_answer(200, Some(14)));
        assert!(!retry(&["unavailable"]).covers_answer(200, Some(13)));
        assert!(Retry::new(1, vec![Condition::Status(418)], None, None).covers_answer(418, None));
        assert!("6xx".parse::<Condition>().unwrap_err().contains("gateway-error"));
    }

    #[test]
    fn a_server_s_word_on_retries_is_kept_and_grpc_s_goes_before_retry_after() {
        #[track_caller]
        fn check(pushback: Option<&str>, retry_after: Option<&str>, want: Result<Option<u64>, NoRetry>) {
            let [pushback, retry_after] =
                [pushback, retry_after].map(|text| text.map(|t| HeaderValue::try_from(t).unwrap()));
            let wait = asked_wait(pushback.as_ref(), retry_after.as_ref());
            assert_eq!(wait, want.map(|millis| millis.map(Duration::from_millis)), "{pushback:?} {retry_after:?}");
        }
        check(None, None, Ok(None));
        check(Some("0"), None, Ok(Some(0)));
        check(Some(" 250 "), Some("3600"), Ok(Some(250)));
        check(Some("10000"), None, Ok(Some(10_000)));
        for none in ["-1", "-250", "soon", "", "1.5", "10001", "99999999999999999999"] {
            check(Some(none), Some("1"), Err(NoRetry));
        }
        check(None, Some("2"), Ok(Some(2000)));
        check(None, Some("11"), Err(NoRetry));
        check(None, Some("Fri, 31 Dec 1999 23:59:59 GMT"), Err(NoRetry));
        check(None, Some("later"), Ok(None));
    }

    #[test]
    fn a_budget_ends_retries_where_everything_fails_and_grants_again_as_time_passes() {
        let (budget, begun) = (Budget::default(), start());
        for _ in 0..1_000 {
            budget.deposit(begun);
        }
        let granted = (0..1_000).filter(|_| budget.withdraw(begun)).count();
        assert_eq!(granted, 300, "20 % of 1,000 and 10 a second over 10 s");
        let later = begun + Duration::from_secs(9);
        assert!(!budget.withdraw(later));
        let all_old = begun + Duration::from_secs(10);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(all_old)).count(), 100);
        let much_later = begun + Duration::from_secs(100_000);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(much_later)).count(), 100);
    }

    #[test]
    fn a_retry_that_is_given_back_is_granted_again_once_and_only_within_its_window() {
        let (budget, begun) = (Budget::default(), start());
        assert_eq!((0..1_000).filter(|_| budget.withdraw(begun)).count(), 100);
        let later = begun + Duration::from_secs(5);
        assert!(!budget.withdraw(later));
        budget.give_back(begun);
        assert!(budget.withdraw(later));
        assert!(!budget.withdraw(later));
        let all_old = begun + Duration::from_secs(15);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(all_old)).count(), 100);
        budget.give_back(begun);
        assert!(!budget.withdraw(all_old));
        // Another second has the place that it was counted in.
        let in_its_place = begun + Duration::from_secs(30);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(in_its_place)).count(), 100);
        budget.give_back(begun);
        assert!(!budget.withdraw(in_its_place));
    }

    #[test]
    fn what_was_repeated_unasked_counts_as_well() {
        let (budget, begun) = (Budget::default(), start());
        (0..60).for_each(|_| budget.spend(begun));
        assert_eq!((0..1_000).filter(|_| budget.withdraw(begun)).count(), 40);
    }

    #[test]
    fn all_workers_of_an_agent_share_the_budget_of_a_destination() {
        let (budgets, begun) = (Budgets::default(), start());
        let web: ServiceName = "web".parse().unwrap();
        // Each asks by itself, as a worker does, and all at once.
        let granted: usize = std::thread::scope(|scope| {
            let worker = || (0..1_000).filter(|_| budgets.of(&web).withdraw(begun)).count();
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        // Two who meet at the limit may keep each other from it.
        assert!((90..=100).contains(&granted), "{granted}");
        assert_eq!((0..1_000).filter(|_| budgets.of(&"db".parse().unwrap()).withdraw(begun)).count(), 100);
    }

    #[test]
    fn budgets_are_bounded_and_those_in_use_stay() {
        let (budgets, begun) = (Budgets::default(), start());
        let name = |number: usize| format!("s{number}").parse::<ServiceName>().unwrap();
        budgets.0.store(Arc::new((0..BUDGETS_MAX).map(|number| (name(number), Arc::default())).collect()));
        let held = budgets.of(&name(0));
        (0..100).for_each(|_| assert!(held.withdraw(begun)));
        drop(budgets.of(&name(BUDGETS_MAX)));
        assert_eq!(budgets.0.load().len(), 2, "what nobody holds makes room");
        assert!(!budgets.of(&name(0)).withdraw(begun), "it goes on with what it was granted");
    }

    proptest! {
        #[test]
        fn a_backoff_is_within_its_step(base in 1u64..1000, factor in 1u32..20, number in 1u32..40, draw: u32) {
            let base = Duration::from_millis(base);
            let retry = Retry::new(3, Vec::new(), Some(base), Some(base * factor));
            let wait = retry.backoff(number, draw);
            prop_assert!(wait <= base * factor);
            prop_assert!(number > 20 || wait <= base * 2u32.pow(number - 1));
            prop_assert_eq!(retry.backoff(number, 0), Duration::ZERO);
        }

        #[test]
        fn a_budget_never_grants_more_than_its_share(steps in prop::collection::vec((0u64..3_000, any::<bool>()), 1..600)) {
            let (budget, begun) = (Budget::default(), start());
            let (mut now, mut requests, mut retries): (u64, Vec<u64>, Vec<u64>) = (0, vec![0], Vec::new());
            budget.deposit(begun);
            for (wait, is_retry) in steps {
                now += wait / 100;
                let at = begun + Duration::from_millis(now);
                if !is_retry {
                    budget.deposit(at);
                    requests.push(now);
                } else if budget.withdraw(at) {
                    retries.push(now);
                }
                // Whole seconds are counted: a window holds 9 s at least.
                let within = |all: &[u64]| all.iter().filter(|then| now / 1000 < **then / 1000 + 10).count();
                prop_assert!(within(&retries) <= within(&requests) / 5 + 100);
            }
        }
    }
}

//! How the instances of a service are called: what operators set, compiled once per change.
//!
//! ```text
//!   service-resolver NAME  LoadBalancer, PrioritizeByLocality  -> Balance of calls to NAME; of all: proxy-defaults
//!   service-defaults NAME  UpstreamConfig.{Defaults,Overrides} -> Guard of calls from NAME: Limits, Ejection
//!                          RateLimits                          -> RateRules of calls to NAME
//! ```
//!
//! Invariants: a field that is unknown, mistyped or out of its range is refused by its name, and all of them at once; a
//! part that is not given has weft's default; a compiled table never changes.
//! Not here: what the settings do (`routing`), which entries count (`policy`), routes and splits.

mod priority;
mod read;
mod shape;
mod show;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::authz::{self, READINGS_MAX, REGEX_INPUT_BYTES_MAX, readings};
use crate::model::ServiceName;

pub use self::priority::Priority;
pub use self::shape::{Problem, balance, check, limits, passive_health_check, rate_limits, table};
pub use self::show::{show_balance, show_rate};

/// Which instance takes the next call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// By what is parsed: [`Algorithm::PeakEwma`] for requests, [`Algorithm::LeastRequest`] for connections.
    #[default]
    Auto,
    /// The better of two drawn ones by expected waiting time (Finagle's peak EWMA).
    PeakEwma,
    /// The one with the fewest calls under way among `choices` drawn ones.
    LeastRequest {
        /// How many are drawn, 2 to 16.
        choices: u8,
    },
    /// In turn, each as often as its weight says.
    RoundRobin,
    /// Drawn, each as often as its weight says.
    Random,
    /// By the call's key on a ring of points (consistent hashing).
    RingHash {
        /// Fewest points, 1 to `points_max`.
        points_min: u32,
        /// Most points.
        points_max: u32,
    },
    /// By the call's key in Maglev's table of 65,537 places.
    Maglev,
}

impl Algorithm {
    /// Tells whether a call's key decides.
    pub fn is_hash(self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev)
    }

    /// Returns the name as it stands in a config entry.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "",
            Self::PeakEwma => "peak_ewma",
            Self::LeastRequest { .. } => "least_request",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
            Self::RingHash { .. } => "ring_hash",
            Self::Maglev => "maglev",
        }
    }
}

/// Points of a ring, unless told otherwise (Envoy's least).
pub const RING_POINTS: u32 = 1_024;
/// Most points of a ring: 16 bytes each, 1 MiB for a service.
pub const RING_POINTS_MAX: u32 = 65_536;

/// Where a call's key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashField {
    /// A request header's value.
    Header(http::HeaderName),
    /// A cookie's value.
    Cookie {
        /// Its name.
        name: String,
        /// Made by weft for callers that have none.
        make: Option<MadeCookie>,
    },
    /// The first value of a parameter of the query.
    Query(String),
    /// The caller's address.
    SourceIp,
}

/// A cookie that weft gives to callers without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeCookie {
    /// How long it lasts; none: the session.
    pub ttl: Option<Duration>,
    /// Its path.
    pub path: String,
}

/// One source of a call's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashPolicy {
    /// Where it is read.
    pub field: HashField,
    /// What follows is not looked at once this gave something.
    pub terminal: bool,
}

/// How calls to a service are spread.
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    /// Which instance is next.
    pub algorithm: Algorithm,
    /// What a call's key is made of, in order; empty: no call has a key.
    pub hash: Vec<HashPolicy>,
    /// A new instance's share grows to its full one over this time; zero: at once.
    pub slow_start: Duration,
    /// Whether instances in this node's zone come first.
    pub prefers_zone: bool,
    /// A zone keeps its calls until less than 1 / this of it is fit; 1.4 is Envoy's.
    pub overprovisioning: f64,
}

impl Default for Balance {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Auto,
            hash: Vec::new(),
            slow_start: Duration::ZERO,
            prefers_zone: true,
            overprovisioning: 1.4,
        }
    }
}

/// How much may be under way from one service of this node to another (Envoy's circuit breakers and their defaults).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of bytes.
    pub connections: u32,
    /// Calls that wait for a stream.
    pub pending: u32,
    /// Requests.
    pub requests: u32,
    /// Requests that are repeated after they may have reached an app. Envoy's 3 would lose most of what is under way when an
    /// agent dies and could be repeated; a budget bounds repetition in the long run.
    pub retries: u32,
    /// Calls to one instance, of one worker; none: no bound of its own.
    pub per_instance: Option<u32>,
    /// Finds out how many calls each instance bears at once, and sends it no more.
    pub is_adaptive: bool,
    /// What a request matters that claims nothing.
    pub priority: Priority,
    /// What a request may claim to matter at most.
    pub priority_max: Priority,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            pending: 1024,
            requests: 1024,
            retries: 1024,
            per_instance: None,
            is_adaptive: false,
            priority: Priority::Normal,
            priority_max: Priority::Normal,
        }
    }
}

/// Which instances take no calls because they failed (Envoy's outlier detection and its defaults).
#[derive(Debug, Clone, PartialEq)]
pub struct Ejection {
    /// Failures in a row that eject; 0: never.
    pub consecutive: u32,
    /// Whether every 5xx is a failure, or only 502, 503, 504 and what gave no answer.
    pub counts_every_5xx: bool,
    /// How often success rates are compared.
    pub interval: Duration,
    /// How long the first ejection lasts; the n-th lasts n times as long.
    pub base: Duration,
    /// The longest ejection.
    pub longest: Duration,
    /// Most instances out at once, in percent, and one in any case.
    pub percent_max: u32,
    /// Ejects those whose success rate lies far below the others'.
    pub success_rate: Option<SuccessRate>,
    /// With fewer than this percentage left, ejections are not looked at.
    pub panic_percent: u32,
    /// What happens below `panic_percent`.
    pub in_panic: InPanic,
}

/// What happens when too few instances are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPanic {
    /// All take calls.
    UseAll,
    /// None does: calls fail at once.
    FailClosed,
}

/// When success rates are compared, and by how much.
#[derive(Debug, Clone, PartialEq)]
pub struct SuccessRate {
    /// Fewest instances with enough requests.
    pub instances_min: u32,
    /// Fewest requests of an instance in an interval.
    pub requests_min: u32,
    /// How many standard deviations below the mean eject.
    pub deviations: f64,
}

impl Default for Ejection {
    fn default() -> Self {
        Self {
            consecutive: 5,
            counts_every_5xx: true,
            interval: Duration::from_secs(10),
            base: Duration::from_secs(30),
            longest: Duration::from_mins(5),
            percent_max: 10,
            success_rate: Some(SuccessRate { instances_min: 5, requests_min: 100, deviations: 1.9 }),
            panic_percent: 50,
            in_panic: InPanic::UseAll,
        }
    }
}

/// What keeps a sick service from making its callers sick.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guard {
    /// How much may be under way.
    pub limits: Limits,
    /// Who is left out.
    pub ejection: Ejection,
}

/// How many requests a second are let through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// On average.
    pub per_second: f64,
    /// At once, 1 or more.
    pub burst: u32,
}

/// Whose requests a rate counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RateKey {
    /// All together.
    All,
    /// Each calling service by itself.
    Source,
    /// Each value of a header by itself.
    Header(http::HeaderName),
}

/// Which paths a rate is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RatePath {
    /// Every one.
    Any,
    /// This one.
    Exact(String),
    /// Those that begin so.
    Prefix(String),
    /// Those that an expression matches as a whole.
    Regex(PathRegex),
}

/// An expression over paths, compiled. Equal if its text is.
#[derive(Debug, Clone)]
pub struct PathRegex {
    text: String,
    regex: regex::bytes::Regex,
}

impl PathRegex {
    /// Compiles an expression within the bounds of those in intentions.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(text: &str) -> Result<Self, authz::CompileError> {
        Ok(Self { text: text.to_owned(), regex: authz::whole(text)? })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for PathRegex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for PathRegex {}

impl RatePath {
    /// Tells whether the rule is about `path`.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => path.starts_with(prefix.as_str()),
            Self::Regex(regex) => path.len() <= REGEX_INPUT_BYTES_MAX && regex.regex.is_match(path.as_bytes()),
        }
    }
}

/// Where a rate holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RateScope {
    /// At each node by itself.
    #[default]
    Node,
    /// For all nodes that have an instance of the service, together.
    Cluster,
}

/// One limit of requests.
#[derive(Debug, Clone, PartialEq)]
pub struct RateRule {
    /// Which requests.
    pub path: RatePath,
    /// By what they are told apart.
    pub key: RateKey,
    /// How many.
    pub rate: Rate,
    /// Where.
    pub scope: RateScope,
}

/// The limits of what comes to a service at one instance: of requests the first rule whose path matches counts, of connections
/// the first that is about every path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RateRules {
    /// In order.
    pub rules: Vec<RateRule>,
}

impl RateRules {
    /// Returns the numbers of the rules that requests at `path` count in: of each reading of it ([`readings`]) the first rule
    /// that is about it. So no way of writing a path leads past the rule of what the app takes it for.
    pub fn of_path(&self, path: &str) -> impl Iterator<Item = usize> + use<> {
        let mut found = [None; READINGS_MAX];
        if self.rules.iter().all(|rule| rule.path == RatePath::Any) {
            found = [(!self.rules.is_empty()).then_some(0), None, None];
        } else {
            for (at, reading) in readings(path).into_iter().flatten().enumerate() {
                let rule = self.rules.iter().position(|rule| rule.path.matches(&reading));
                let is_known = found.contains(&rule);
                if let Some(place) = found.get_mut(at).filter(|_| !is_known) {
                    *place = rule;
                }
            }
        }
        found.into_iter().flatten()
    }

    /// Returns the number of the rule that connections of bytes and flows of UDP count in: they have no path, so it is the
    /// level's own.
    pub fn of_stream(&self) -> Option<usize> {
        self.rules.iter().position(|rule| rule.path == RatePath::Any)
    }
}

/// The guards of one calling service.
#[derive(Debug, Clone, Default)]
struct Callers {
    default: Option<Arc<Guard>>,
    overrides: BTreeMap<ServiceName, Arc<Guard>>,
}

/// All settings, compiled.
#[derive(Debug, Clone, Default)]
pub struct Table {
    balances: BTreeMap<ServiceName, Arc<Balance>>,
    callers: BTreeMap<ServiceName, Callers>,
    rates: BTreeMap<ServiceName, Arc<RateRules>>,
    default_balance: Arc<Balance>,
    default_guard: Arc<Guard>,
}

impl Table {
    /// Returns how calls to `destination` are spread.
    pub fn balance(&self, destination: &ServiceName) -> &Arc<Balance> {
        self.balances.get(destination).unwrap_or(&self.default_balance)
    }

    /// Returns what guards calls from `source` to `destination`.
    pub fn guard(&self, source: Option<&ServiceName>, destination: &ServiceName) -> &Arc<Guard> {
        let callers = source.and_then(|source| self.callers.get(source));
        let found = callers.and_then(|callers| callers.overrides.get(destination).or(callers.default.as_ref()));
        found.unwrap_or(&self.default_guard)
    }

    /// Tells whether calls of `source` have settings of their own.
    pub fn has_caller(&self, source: Option<&ServiceName>) -> bool {
        !self.callers.is_empty() && source.is_some_and(|source| self.callers.contains_key(source))
    }

    /// Returns the limits of requests to `destination`, if there are any.
    pub fn rates(&self, destination: &ServiceName) -> Option<&Arc<RateRules>> {
        if self.rates.is_empty() { None } else { self.rates.get(destination) }
    }

    /// Returns the services with a limit that holds for the whole mesh.
    pub fn shared_rates(&self) -> impl Iterator<Item = (&ServiceName, &Arc<RateRules>)> {
        self.rates.iter().filter(|(_, rules)| rules.rules.iter().any(|rule| rule.scope == RateScope::Cluster))
    }

    /// Returns the services that are balanced by a key.
    pub fn hashed(&self) -> impl Iterator<Item = (&ServiceName, &Arc<Balance>)> {
        self.balances.iter().filter(|(_, balance)| balance.algorithm.is_hash())
    }
}

//! What is counted per request. Handles are looked up once per (source, destination) and outcome and kept per worker,
//! so that a request formats nothing and takes no lock.
//!
//! Label values are bounded: services by the registered ones and `_unknown`, codes by HTTP and gRPC, flags by [`Flag`].
//! Handles that are not used are let go, so that the series of pairs and outcomes that are over expire.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use foldhash::HashMap;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts};
use tokio::time::Instant;

use crate::metrics::{Expiring, Held, Metrics};
use crate::model::ServiceName;
use crate::proxy::authorize::PolicySeries;
use crate::proxy::metrics::{Reporter, SECURITY_LABEL, Security};
use crate::trace::{Ended, OpenSpan, SpanContext};

/// Bounds of the duration buckets, in seconds: 0.1 ms to 60 s, about three per decade.
const BUCKETS: [f64; 18] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const LABELS: [&str; 7] = [
    "reporter",
    "source_service",
    "destination_service",
    "response_code",
    "grpc_response_status",
    "response_flags",
    SECURITY_LABEL,
];
/// Pairs kept per worker; beyond it the cache starts again (the series themselves stay).
const EDGES_MAX: usize = 4096;
/// The label of a caller that shows its node's own SVID. No service can have the name.
const NODE_LABEL: &str = "_node";
/// The label of a destination that is not registered.
const UNKNOWN_LABEL: &str = "_unknown";

/// The HTTP metrics of the agent. Cheap to clone: one per worker.
#[derive(Debug, Clone)]
pub(crate) struct HttpMetrics {
    requests: Expiring<IntCounterVec>,
    duration: Expiring<HistogramVec>,
    /// Requests over a rate limit.
    pub(super) limited: Expiring<IntCounterVec>,
    /// Callers' connections that ended because a request's framing was in doubt, by reason.
    pub(super) malformed: IntCounterVec,
    /// What is counted of decisions, over streams as well.
    pub(crate) policy: PolicySeries,
    /// What chains did to requests.
    pub(crate) traffic: TrafficSeries,
}

impl HttpMetrics {
    /// Makes the metrics and adds them to the registry.
    ///
    /// # Errors
    /// If they are there already.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let requests = Opts::new("weft_http_requests_total", "HTTP requests that ended, by outcome.");
        let duration = HistogramOpts::new(
            "weft_http_request_duration_seconds",
            "Time from a request's head to the end of its response.",
        );
        let requests = metrics.add_expiring(IntCounterVec::new(requests, &LABELS)?)?;
        let duration = metrics.add_expiring(HistogramVec::new(duration.buckets(BUCKETS.to_vec()), &LABELS)?)?;
        let limited = Opts::new("weft_http_rate_limited_total", "Requests refused by the rate limits of a service.");
        let limited = metrics.add_expiring(IntCounterVec::new(limited, &["destination_service"])?)?;
        let malformed = "Requests refused before they were read, for it is in doubt where they end.";
        let malformed = Opts::new("weft_http_malformed_total", malformed);
        let malformed = metrics.add(IntCounterVec::new(malformed, &["reason"])?)?;
        let (policy, traffic) = (PolicySeries::register(metrics)?, TrafficSeries::register(metrics)?);
        Ok(Self { requests, duration, limited, malformed, policy, traffic })
    }
}

/// What chains of config entries did to requests. Labels: services that entries name, and words of this module.
#[derive(Debug, Clone)]
pub(crate) struct TrafficSeries {
    /// By destination and reason.
    pub(crate) retries: Expiring<IntCounterVec>,
    /// By destination.
    pub(crate) saved: Expiring<IntCounterVec>,
    /// By destination and reason.
    pub(crate) not_retried: Expiring<IntCounterVec>,
    /// By destination and outcome.
    pub(crate) hedges: Expiring<IntCounterVec>,
    /// By destination and outcome.
    pub(crate) mirrored: Expiring<IntCounterVec>,
    /// By destination and kind.
    pub(crate) faults: Expiring<IntCounterVec>,
}

impl TrafficSeries {
    fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let add = |name: &str, help: &str, labels: &[&str]| {
            metrics.add_expiring(IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let by = |second: &'static str| ["destination_service", second];
        Ok(Self {
            retries: add(
                "weft_http_retries_total",
                "Attempts after the first one of requests that may have reached an app.",
                &by("reason"),
            )?,
            saved: add(
                "weft_http_retries_saved_total",
                "Requests that a retry brought an answer that no condition is about.",
                &["destination_service"],
            )?,
            not_retried: add(
                "weft_http_retries_refused_total",
                "Failed attempts that were not tried again, though a condition is about them.",
                &by("reason"),
            )?,
            hedges: add(
                "weft_http_hedges_total",
                "Copies of requests that went to another instance before the first one was answered, or were to.",
                &by("outcome"),
            )?,
            mirrored: add("weft_http_mirrored_total", "Requests that a mirror was to get a copy of.", &by("outcome"))?,
            faults: add("weft_http_faults_total", "Faults injected on purpose.", &by("kind"))?,
        })
    }
}

/// Why weft answered itself or a response did not end well (Envoy's letters).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flag {
    /// The app answered.
    None,
    /// The request itself was refused.
    Refused,
    /// No intention allows it.
    Denied,
    /// No route: the service is unknown.
    NoRoute,
    /// No healthy instance.
    NoHealthy,
    /// No instance could be connected.
    ConnectFailure,
    /// The stream or the app's connection broke.
    Reset,
    /// No answer in time.
    Timeout,
    /// As much is under way as the limits allow.
    Overflow,
    /// Over a rate limit.
    RateLimited,
    /// The caller went away.
    CallerGone,
    /// It failed on purpose.
    Fault,
    /// It waited on purpose.
    Delay,
    /// The last answer of all retries was passed on.
    RetriesExhausted,
    /// A hedge's copy was answered first.
    HedgeWon,
}

impl Flag {
    /// Returns the label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Refused => "DPE",
            Self::Denied => "RBAC",
            Self::NoRoute => "NR",
            Self::NoHealthy => "UH",
            Self::ConnectFailure => "UF",
            Self::Reset => "UR",
            Self::Timeout => "UT",
            Self::Overflow => "UO",
            Self::RateLimited => "RL",
            Self::CallerGone => "DC",
            Self::Fault => "FI",
            Self::Delay => "DI",
            Self::RetriesExhausted => "URX",
            Self::HedgeWon => "HW",
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outcome {
    /// 0: the caller left before there was one.
    status: u16,
    /// 0 to 16.
    grpc: Option<u8>,
    flag: Flag,
    security: Security,
}

/// The handles of one outcome.
#[derive(Debug)]
struct Series {
    outcome: Outcome,
    requests: Held<IntCounter>,
    duration: Held<Histogram>,
    /// Since [`EdgeCache::let_go`] last looked.
    is_used: Cell<bool>,
}

impl Series {
    fn record(&self, seconds: f64) {
        self.requests.inc();
        self.duration.observe(seconds);
        self.is_used.set(true);
    }
}

/// The series between one source and one destination.
#[derive(Debug)]
pub(crate) struct Edge {
    metrics: HttpMetrics,
    reporter: Reporter,
    source: Option<ServiceName>,
    destination: Option<ServiceName>,
    /// Few outcomes are ever seen; the first is nearly always the right one.
    series: RefCell<Vec<Series>>,
    /// Since [`EdgeCache::let_go`] last looked.
    is_used: Cell<bool>,
}

impl Edge {
    fn record(&self, outcome: Outcome, seconds: f64) {
        let mut series = self.series.borrow_mut();
        if let Some(found) = series.iter().find(|series| series.outcome == outcome) {
            return found.record(seconds);
        }
        let made = self.series(outcome);
        made.record(seconds);
        series.push(made);
    }

    fn series(&self, outcome: Outcome) -> Series {
        let reporter = self.reporter.as_str();
        let code = outcome.status.to_string();
        let grpc = outcome.grpc.map(|code| code.to_string()).unwrap_or_default();
        let source = self.source.as_ref().map_or(NODE_LABEL, ServiceName::as_str);
        let destination = self.destination.as_ref().map_or(UNKNOWN_LABEL, ServiceName::as_str);
        let (flag, security) = (outcome.flag.as_str(), outcome.security.as_str());
        let labels = [reporter, source, destination, code.as_str(), grpc.as_str(), flag, security];
        Series {
            outcome,
            requests: self.metrics.requests.with(&labels),
            duration: self.metrics.duration.with(&labels),
            is_used: Cell::default(),
        }
    }
}

type EdgeKey = (Reporter, Option<ServiceName>, Option<ServiceName>);

/// The edges that one worker has seen.
#[derive(Debug)]
pub(crate) struct EdgeCache {
    metrics: HttpMetrics,
    edges: RefCell<HashMap<EdgeKey, Rc<Edge>>>,
}

impl EdgeCache {
    pub(crate) fn new(metrics: HttpMetrics) -> Self {
        Self { metrics, edges: RefCell::default() }
    }

    /// Returns the edge; no source: the node itself; no destination: an unknown service.
    pub(crate) fn edge(
        &self,
        reporter: Reporter,
        source: Option<&ServiceName>,
        destination: Option<&ServiceName>,
    ) -> Rc<Edge> {
        let mut edges = self.edges.borrow_mut();
        let key = (reporter, source.cloned(), destination.cloned());
        if let Some(edge) = edges.get(&key) {
            edge.is_used.set(true);
            return Rc::clone(edge);
        }
        if edges.len() >= EDGES_MAX {
            edges.clear();
        }
        let edge = Rc::new(Edge {
            metrics: self.metrics.clone(),
            reporter,
            source: key.1.clone(),
            destination: key.2.clone(),
            series: RefCell::default(),
            is_used: Cell::new(true),
        });
        edges.insert(key, Rc::clone(&edge));
        edge
    }

    /// Lets go of the handles of pairs and outcomes that were not met since the last time.
    pub(crate) fn let_go(&self) {
        self.edges.borrow_mut().retain(|_, edge| {
            edge.series.borrow_mut().retain(|series| series.is_used.replace(false));
            edge.is_used.replace(false) || Rc::strong_count(edge) > 1
        });
    }
}

/// One request under way; counted when dropped. Until [`Exchange::finish`] it counts as left by the caller.
#[derive(Debug)]
pub(crate) struct Exchange {
    edge: Rc<Edge>,
    started: Instant,
    outcome: Outcome,
    /// What stands for a good end.
    good: Flag,
    /// Another counts in its place.
    is_moved: bool,
    /// What is recorded of it, where it is.
    span: Option<Box<OpenSpan>>,
}

impl Exchange {
    /// Starts the clock.
    pub(crate) fn new(edge: Rc<Edge>, started: Instant) -> Self {
        // What reaches the app's agent came by a tunnel; whether the caller's agent hears of another is to be seen.
        let security = match edge.reporter {
            Reporter::Source => Security::Unknown,
            Reporter::Destination => Security::MutualTls,
        };
        Self {
            edge,
            started,
            outcome: Outcome { status: 0, grpc: None, flag: Flag::CallerGone, security },
            good: Flag::None,
            is_moved: false,
            span: None,
        }
    }

    /// Ends `span` when it ends itself.
    pub(crate) fn traced(mut self, span: Option<Box<OpenSpan>>) -> Self {
        self.span = span;
        self
    }

    /// Returns the place of its span.
    pub(crate) fn context(&self) -> Option<SpanContext> {
        self.span.as_ref().map(|span| span.context())
    }

    /// Notes that another agent answered.
    pub(crate) fn answered(&mut self) {
        self.outcome.security = Security::MutualTls;
    }

    /// Notes the response's head.
    pub(crate) fn status(&mut self, status: http::StatusCode) {
        self.outcome.status = status.as_u16();
    }

    /// Notes `grpc-status`, from headers or trailers.
    pub(crate) fn grpc(&mut self, headers: &http::HeaderMap) {
        if let Some(value) = headers.get("grpc-status") {
            // Codes end at 16; what is no code counts as 2, UNKNOWN.
            let code = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|code| *code <= 16);
            self.outcome.grpc = Some(code.unwrap_or(2));
        }
    }

    /// Counts in place of `other`, which counts nothing.
    pub(crate) fn take_over(&mut self, other: &mut Self) {
        (self.good, other.is_moved) = (other.good, true);
        self.span = other.span.take();
    }

    /// Notes what is said of it if it ends well.
    pub(crate) fn ends_well_as(&mut self, flag: Flag) {
        self.good = flag;
    }

    /// Notes how it ended.
    pub(crate) fn finish(&mut self, flag: Flag) {
        self.outcome.flag = if flag == Flag::None { self.good } else { flag };
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.is_moved {
            return;
        }
        let took = crate::clock::now().saturating_duration_since(self.started);
        self.edge.record(self.outcome, took.as_secs_f64());
        if let Some(span) = self.span.take() {
            let (source, destination) = (self.edge.source.clone(), self.edge.destination.clone());
            let Outcome { status, grpc, flag, .. } = self.outcome;
            span.end(Ended { source, destination, status, grpc, flag: flag.as_str(), took });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_counts_once_with_its_outcome() {
        let metrics = Metrics::new();
        let cache = EdgeCache::new(HttpMetrics::register(&metrics).unwrap());
        let web: ServiceName = "web".parse().unwrap();
        let edge = cache.edge(Reporter::Source, None, Some(&web));
        for _ in 0..2 {
            let mut exchange = Exchange::new(Rc::clone(&edge), crate::clock::now());
            exchange.answered();
            exchange.status(http::StatusCode::OK);
            exchange.finish(Flag::None);
        }
        drop(Exchange::new(edge, crate::clock::now()));
        let served = cache.edge(Reporter::Destination, None, Some(&web));
        Exchange::new(served, crate::clock::now()).finish(Flag::Denied);
        let text = metrics.render().unwrap();
        let series = |security, reporter, code, flag| {
            format!(
                "weft_http_requests_total{{connection_security=\"{security}\",destination_service=\"web\",grpc_response_status=\"\",reporter=\"{reporter}\",response_code=\"{code}\",response_flags=\"{flag}\",source_service=\"_node\"}}"
            )
        };
        assert!(text.contains(&format!("{} 2", series("mutual_tls", "source", 200, "-"))), "{text}");
        assert!(text.contains(&format!("{} 1", series("unknown", "source", 0, "DC"))), "{text}");
        assert!(text.contains(&format!("{} 1", series("mutual_tls", "destination", 0, "RBAC"))), "{text}");
    }

    #[test]
    fn outcomes_that_are_over_are_no_series_beside_those_that_go_on_and_a_long_request_is_counted() {
        let metrics = Metrics::new();
        let cache = EdgeCache::new(HttpMetrics::register(&metrics).unwrap());
        let [web, api] = ["web", "api"].map(|name| name.parse::<ServiceName>().unwrap());
        let ended = |exchange: &mut Exchange, status| {
            exchange.status(status);
            exchange.finish(Flag::None);
        };
        let begin =
            |destination| Exchange::new(cache.edge(Reporter::Source, None, Some(destination)), crate::clock::now());
        let mut now = crate::clock::now();
        let mut pass = |minutes: u64, requests: u64| {
            for _ in 0..minutes * 2 {
                for _ in 0..requests {
                    ended(&mut begin(&web), http::StatusCode::OK);
                }
                now += std::time::Duration::from_secs(30);
                cache.let_go();
                metrics.expire(now);
            }
        };
        let count = |name: &str, code: &str| {
            let text = metrics.render().unwrap();
            let is_wanted = |line: &&str| [name, code].iter().all(|label| line.contains(&format!("\"{label}\"")));
            let line = text.lines().filter(|line| line.starts_with("weft_http_requests_total")).find(is_wanted);
            line.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        };
        ended(&mut begin(&web), http::StatusCode::BAD_GATEWAY);
        let mut long = begin(&api);
        pass(9, 1);
        assert_eq!((count("web", "200"), count("web", "502")), (Some(18), Some(1)));
        pass(3, 1);
        assert_eq!((count("web", "200"), count("web", "502")), (Some(24), None));
        assert!(!metrics.render().unwrap().contains("\"502\""), "its durations as well");
        // A request that lasts longer than series live is counted when it ends.
        pass(20, 0);
        assert_eq!(count("web", "200"), None);
        ended(&mut long, http::StatusCode::OK);
        drop(long);
        assert_eq!(count("api", "200"), Some(1));
        ended(&mut begin(&web), http::StatusCode::BAD_GATEWAY);
        assert_eq!(count("web", "502"), Some(1));
    }
}

//! What the data plane counts for TCP and tunnels. Handles are looked up once per pair of services and kept per worker, as
//! long as they are used: the series of pairs that call no more expire.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use foldhash::HashMap;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};
use tokio::time::Instant;

use super::paths::PathMetrics;
use super::relay::Count;
use crate::metrics::{Expiring, Held, Metrics};
use crate::model::ServiceName;
use crate::routing::Limited;

/// Labels of what is counted per pair of services.
pub(super) const EDGE_LABELS: [&str; 4] = ["reporter", "source_service", "destination_service", SECURITY_LABEL];
/// Istio's name for how the two ends know of each other.
pub(super) const SECURITY_LABEL: &str = "connection_security";
/// Pairs whose handles one worker keeps; beyond it the cache starts again (the series stay).
const EDGES_MAX: usize = 4_096;
/// Label of a caller that shows its node's own SVID; no service can have the name.
const NODE_LABEL: &str = "_node";

/// The handles of the whole agent. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ProxyMetrics {
    all: Metrics,
    opened: Expiring<IntCounterVec>,
    closed: Expiring<IntCounterVec>,
    active: Expiring<IntGaugeVec>,
    sent: Expiring<IntCounterVec>,
    received: Expiring<IntCounterVec>,
    /// Tunnels open, by side.
    pub(crate) tunnels: IntGaugeVec,
    /// Finished handshakes, by side.
    pub(crate) handshakes: IntCounterVec,
    /// Failed dials, by reason.
    pub(crate) dial_failures: IntCounterVec,
    /// Accepted attempts that came to nothing, by reason.
    pub(crate) refused: IntCounterVec,
    /// Calls kept from a node whose certificate does not cover the service.
    pub(crate) outside_scope: IntCounter,
    /// Connections to local ports that a worker gave to one with fewer.
    pub(crate) handed: IntCounter,
    /// Connections reset because the worker is full.
    pub(crate) overflow: IntCounter,
    /// Upstream ports that cannot be bound.
    pub(crate) listeners_failed: IntGauge,
    /// Datagrams in tunnels that belong to no open flow of UDP.
    pub(super) stray_datagrams: IntCounter,
    /// What the paths of tunnels are like.
    pub(super) paths: PathMetrics,
    /// Panics of worker tasks.
    pub(crate) panics: IntCounter,
    /// Instances taken out of the rotation.
    pub(super) ejections: IntCounterVec,
    /// Requests that waited for an instance.
    pub(super) queued: IntCounterVec,
    /// Calls beyond a limit.
    limited: IntCounterVec,
}

impl ProxyMetrics {
    /// Makes the metrics and adds them to the registry.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counters =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntCounterVec::new(Opts::new(name, help), labels)?);
        let gauges =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntGaugeVec::new(Opts::new(name, help), labels)?);
        let of_pairs = |name: &str, help: &str, labels: &[&str]| {
            metrics.add_expiring(IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let active = IntGaugeVec::new(Opts::new("weft_tcp_connections_active", "TCP connections open."), &EDGE_LABELS)?;
        let [reporter, source, destination, security] = EDGE_LABELS;
        let closed_labels = [reporter, source, destination, security, "response_flags"];
        Ok(Self {
            all: metrics.clone(),
            opened: of_pairs("weft_tcp_connections_opened_total", "TCP connections that began.", &EDGE_LABELS)?,
            closed: of_pairs(
                "weft_tcp_connections_closed_total",
                "TCP connections that ended, by reason.",
                &closed_labels,
            )?,
            active: metrics.add_expiring(active)?,
            sent: of_pairs("weft_tcp_sent_bytes_total", "Bytes from the called app to the caller.", &EDGE_LABELS)?,
            received: of_pairs(
                "weft_tcp_received_bytes_total",
                "Bytes from the caller to the called app.",
                &EDGE_LABELS,
            )?,
            tunnels: gauges("weft_quic_tunnels_open", "QUIC connections that carry traffic.", &["side"])?,
            handshakes: counters(
                "weft_quic_handshakes_total",
                "QUIC handshakes of tunnels that succeeded.",
                &["side"],
            )?,
            dial_failures: counters(
                "weft_quic_dial_failures_total",
                "Tunnels that could not be dialled.",
                &["reason"],
            )?,
            refused: counters(
                "weft_quic_refused_total",
                "Tunnels and streams of peers that were refused.",
                &["reason"],
            )?,
            outside_scope: metrics.add(IntCounter::new(
                "weft_proxy_outside_scope_total",
                "Calls kept from a node whose certificate does not cover the service.",
            )?)?,
            handed: metrics.add(IntCounter::new(
                "weft_proxy_connections_handed_total",
                "Connections to local ports that a worker gave to one with fewer.",
            )?)?,
            overflow: metrics.add(IntCounter::new(
                "weft_proxy_connections_overflow_total",
                "Connections reset because a worker holds its most.",
            )?)?,
            listeners_failed: metrics
                .add(IntGauge::new("weft_proxy_listeners_failed", "Upstream ports that cannot be bound.")?)?,
            stray_datagrams: metrics.add(IntCounter::new(
                "weft_udp_stray_datagrams_total",
                "Datagrams in tunnels that belong to no open flow.",
            )?)?,
            ejections: counters(
                "weft_balancer_ejections_total",
                "Instances taken out of the rotation by this agent's workers.",
                &["cause"],
            )?,
            queued: counters(
                "weft_balancer_queued_total",
                "Requests that waited because all instances had as much as they bear.",
                &["outcome"],
            )?,
            limited: counters(
                "weft_balancer_overflow_total",
                "Calls refused because as much was under way as the limits allow.",
                &["limit"],
            )?,
            paths: PathMetrics::register(metrics)?,
            panics: metrics.add(IntCounter::new("weft_proxy_panics_total", "Panics caught in worker tasks.")?)?,
        })
    }
}

impl ProxyMetrics {
    /// Drops the series of the agent that are idle for long enough.
    pub(super) fn expire(&self, now: Instant) {
        self.all.expire(now);
    }

    /// Counts a call that a limit refused.
    pub(super) fn overflowed(&self, what: Limited) {
        self.limited.with_label_values(&[what.as_str()]).inc();
    }
}

/// Which end reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reporter {
    /// The caller's agent.
    Source,
    /// The app's agent.
    Destination,
}

impl Reporter {
    /// Returns the label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What is known of the connection between the two agents of a call (Istio's values; its `none`, plain text, cannot occur).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Security {
    /// Both showed a certificate of the mesh.
    MutualTls,
    /// There was no word of another agent: weft answered itself, or the caller left first.
    Unknown,
}

impl Security {
    /// Returns the label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => "unknown",
        }
    }
}

/// The handles of one pair of services, at one end.
#[derive(Debug)]
pub(crate) struct Edge {
    reporter: Reporter,
    labels: [String; 4],
    metrics: ProxyMetrics,
    opened: Held<IntCounter>,
    active: Held<IntGauge>,
    sent: Held<IntCounter>,
    received: Held<IntCounter>,
}

impl Edge {
    /// Counts a connection that begins; it counts as closed when the guard goes.
    pub(crate) fn open(self: &Rc<Self>) -> OpenConnection {
        self.opened.inc();
        self.active.inc();
        Open { edge: Rc::clone(self), flag: "UR" }
    }
}

impl PerPair for Edge {
    type Metrics = ProxyMetrics;

    fn of(metrics: &ProxyMetrics, reporter: Reporter, labels: [&str; 4]) -> Self {
        Self {
            reporter,
            labels: labels.map(str::to_owned),
            metrics: metrics.clone(),
            opened: metrics.opened.with(&labels),
            active: metrics.active.with(&labels),
            sent: metrics.sent.with(&labels),
            received: metrics.received.with(&labels),
        }
    }

    fn closed(&self, flag: &'static str) {
        self.active.dec();
        let [reporter, source, destination, security] = &self.labels;
        self.metrics.closed.with(&[reporter, source, destination, security, flag]).inc();
    }
}

impl Count for Edge {
    fn up(&self, bytes: u64) {
        match self.reporter {
            Reporter::Source => self.received.inc_by(bytes),
            Reporter::Destination => self.sent.inc_by(bytes),
        }
    }

    fn down(&self, bytes: u64) {
        match self.reporter {
            Reporter::Source => self.sent.inc_by(bytes),
            Reporter::Destination => self.received.inc_by(bytes),
        }
    }
}

/// The handles that a pair of services has at one end.
pub(crate) trait PerPair: fmt::Debug {
    /// What they are handles of.
    type Metrics: fmt::Debug;

    /// Makes the handles of one pair; the labels are those of [`EDGE_LABELS`].
    fn of(metrics: &Self::Metrics, reporter: Reporter, labels: [&str; 4]) -> Self;

    /// Counts the end of what was open, with why it ended.
    fn closed(&self, flag: &'static str);
}

/// A connection, or a flow, that counts as open while this lives.
#[derive(Debug)]
pub(crate) struct Open<E: PerPair> {
    pub(super) edge: Rc<E>,
    pub(super) flag: &'static str,
}

impl<E: PerPair> Open<E> {
    /// Says why it ends.
    pub(crate) fn ends(&mut self, flag: &'static str) {
        self.flag = flag;
    }
}

impl<E: PerPair> Drop for Open<E> {
    fn drop(&mut self) {
        self.edge.closed(self.flag);
    }
}

/// An open connection.
pub(crate) type OpenConnection = Open<Edge>;

/// Who reports, the source (none: the node itself), the destination.
type Pair = (Reporter, Option<ServiceName>, ServiceName);

/// One worker's handles: those of connections, unless told otherwise.
#[derive(Debug)]
pub(crate) struct Edges<E: PerPair = Edge> {
    metrics: E::Metrics,
    held: RefCell<HashMap<Pair, Kept<E>>>,
}

/// Handles that are kept while they are used.
#[derive(Debug)]
struct Kept<E> {
    edge: Rc<E>,
    /// Since [`Edges::let_go`] last looked.
    is_used: Cell<bool>,
}

impl<E> Kept<E> {
    fn take(&self) -> Rc<E> {
        self.is_used.set(true);
        Rc::clone(&self.edge)
    }
}

impl<E: PerPair> Edges<E> {
    /// Holds nothing yet.
    pub(crate) fn new(metrics: E::Metrics) -> Self {
        Self { metrics, held: RefCell::default() }
    }

    /// Returns the handles of a pair; a source of none is the node itself.
    pub(crate) fn edge(&self, reporter: Reporter, source: Option<&ServiceName>, destination: &ServiceName) -> Rc<E> {
        let key = (reporter, source.cloned(), destination.clone());
        let mut held = self.held.borrow_mut();
        if let Some(kept) = held.get(&key) {
            return kept.take();
        }
        if held.len() >= EDGES_MAX {
            held.clear();
        }
        // Streams and flows go by a tunnel or not at all.
        let security = Security::MutualTls.as_str();
        let labels =
            [reporter.as_str(), source.map_or(NODE_LABEL, ServiceName::as_str), destination.as_str(), security];
        let kept = Kept { edge: Rc::new(E::of(&self.metrics, reporter, labels)), is_used: Cell::default() };
        let edge = kept.take();
        held.insert(key, kept);
        edge
    }

    /// Lets go of the handles of pairs of which nothing is open and nothing began since the last time.
    pub(crate) fn let_go(&self) {
        self.held.borrow_mut().retain(|_, kept| kept.is_used.replace(false) || Rc::strong_count(&kept.edge) > 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;

    #[test]
    fn a_pair_that_calls_no_more_is_no_series_and_a_silent_connection_keeps_its_own() {
        let metrics = Metrics::new();
        let proxy = ProxyMetrics::register(&metrics).unwrap();
        let edges: Edges = Edges::new(proxy.clone());
        let name = |text: &str| text.parse::<ServiceName>().unwrap();
        let [api, web, db] = ["api", "web", "db"].map(name);
        let mut now = clock::now();
        let mut pass = |minutes: u64| {
            for _ in 0..minutes * 2 {
                now += Duration::from_secs(30);
                edges.let_go();
                proxy.expire(now);
            }
        };
        let silent = edges.edge(Reporter::Source, Some(&api), &db);
        let mut connection = silent.open();
        edges.edge(Reporter::Source, Some(&api), &web).open().ends("-");
        let of_web = || metrics.render().unwrap().lines().filter(|line| line.contains("\"web\"")).count();
        pass(9);
        assert_eq!(of_web(), 5, "each of the five metrics of a pair");
        pass(3);
        assert_eq!(of_web(), 0);
        // The connection that was silent meanwhile counts where it is shown.
        silent.up(100);
        let line = |name: &str, count: u64| {
            let labels = "destination_service=\"db\",reporter=\"source\",source_service=\"api\"";
            format!("{name}{{connection_security=\"mutual_tls\",{labels}}} {count}\n")
        };
        assert!(metrics.render().unwrap().contains(&line("weft_tcp_received_bytes_total", 100)));
        assert!(metrics.render().unwrap().contains(&line("weft_tcp_connections_active", 1)));
        connection.ends("-");
        drop((connection, silent));
        pass(9);
        assert!(metrics.render().unwrap().contains(&line("weft_tcp_connections_active", 0)));
        pass(3);
        assert!(!metrics.render().unwrap().contains("\"db\""));
        edges.edge(Reporter::Source, Some(&api), &web).open().ends("-");
        assert_eq!(of_web(), 5, "it begins again");
    }
}

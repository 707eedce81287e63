//! What the data plane counts for UDP. Handles are looked up once per pair of services and kept per worker.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};
use tracing::info;

use super::table::Dropped;
use crate::metrics::Metrics;
use crate::proxy::metrics::{EDGE_LABELS, Edges, Open, PerPair, Reporter};

/// The handles of the whole agent. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct UdpMetrics {
    opened: IntCounterVec,
    closed: IntCounterVec,
    active: IntGaugeVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    sent: IntCounterVec,
    received: IntCounterVec,
    dropped: IntCounterVec,
    /// The limit of size was told in the log.
    is_limit_told: Arc<AtomicBool>,
}

impl UdpMetrics {
    /// Makes the metrics and adds them to the registry.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counters =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntCounterVec::new(Opts::new(name, help), labels)?);
        let [reporter, source, destination] = EDGE_LABELS;
        let closed_labels = [reporter, source, destination, "response_flags"];
        let dropped_labels = [reporter, source, destination, "reason"];
        Ok(Self {
            opened: counters("weft_udp_flows_opened_total", "UDP flows that began.", &EDGE_LABELS)?,
            closed: counters("weft_udp_flows_closed_total", "UDP flows that ended, by reason.", &closed_labels)?,
            active: metrics
                .add(IntGaugeVec::new(Opts::new("weft_udp_flows_active", "UDP flows open."), &EDGE_LABELS)?)?,
            sent_bytes: counters(
                "weft_udp_sent_bytes_total",
                "Bytes of datagrams from the called app to the caller.",
                &EDGE_LABELS,
            )?,
            received_bytes: counters(
                "weft_udp_received_bytes_total",
                "Bytes of datagrams from the caller to the called app.",
                &EDGE_LABELS,
            )?,
            sent: counters(
                "weft_udp_sent_datagrams_total",
                "Datagrams from the called app to the caller.",
                &EDGE_LABELS,
            )?,
            received: counters(
                "weft_udp_received_datagrams_total",
                "Datagrams from the caller to the called app.",
                &EDGE_LABELS,
            )?,
            dropped: counters("weft_udp_dropped_datagrams_total", "Datagrams dropped, by reason.", &dropped_labels)?,
            is_limit_told: Arc::default(),
        })
    }
}

/// The handles of one pair of services, at one end.
#[derive(Debug)]
pub(super) struct UdpEdge {
    reporter: Reporter,
    labels: [String; 3],
    metrics: UdpMetrics,
    opened: IntCounter,
    active: IntGauge,
    sent_bytes: IntCounter,
    received_bytes: IntCounter,
    sent: IntCounter,
    received: IntCounter,
}

impl UdpEdge {
    /// Counts a flow that begins; it counts as closed when the guard goes.
    pub(super) fn open(self: &Rc<Self>) -> OpenFlow {
        self.opened.inc();
        self.active.inc();
        Open { edge: Rc::clone(self), flag: "UR" }
    }

    /// Counts a datagram from the socket into the tunnel.
    pub(super) fn up(&self, bytes: usize) {
        match self.reporter {
            Reporter::Source => count(&self.received, &self.received_bytes, bytes),
            Reporter::Destination => count(&self.sent, &self.sent_bytes, bytes),
        }
    }

    /// Counts a datagram from the tunnel into the socket.
    pub(super) fn down(&self, bytes: usize) {
        match self.reporter {
            Reporter::Source => count(&self.sent, &self.sent_bytes, bytes),
            Reporter::Destination => count(&self.received, &self.received_bytes, bytes),
        }
    }

    /// Counts datagrams that are dropped.
    pub(super) fn dropped(&self, why: Dropped, datagrams: usize) {
        if datagrams > 0 {
            let [reporter, source, destination] = &self.labels;
            let labels = [reporter, source, destination, why.as_str()];
            self.metrics.dropped.with_label_values(&labels).inc_by(datagrams as u64);
        }
    }

    /// Counts a datagram that is too large for the tunnel, and says once what is not.
    pub(super) fn oversize(&self, bytes: usize, bytes_max: usize) {
        self.dropped(Dropped::Oversize, 1);
        if !self.metrics.is_limit_told.swap(true, Ordering::Relaxed) {
            let [reporter, _, service] = &self.labels;
            info!(
                %service, %reporter, bytes, bytes_max,
                "dropped a UDP datagram that is too large for the path between the nodes; others are counted alone \
                 (weft_udp_dropped_datagrams_total): let the app send smaller ones, or raise the path's MTU"
            );
        }
    }
}

fn count(datagrams: &IntCounter, total: &IntCounter, bytes: usize) {
    datagrams.inc();
    total.inc_by(bytes as u64);
}

impl PerPair for UdpEdge {
    type Metrics = UdpMetrics;

    fn of(metrics: &UdpMetrics, reporter: Reporter, labels: [&str; 3]) -> Self {
        Self {
            reporter,
            labels: labels.map(str::to_owned),
            metrics: metrics.clone(),
            opened: metrics.opened.with_label_values(&labels),
            active: metrics.active.with_label_values(&labels),
            sent_bytes: metrics.sent_bytes.with_label_values(&labels),
            received_bytes: metrics.received_bytes.with_label_values(&labels),
            sent: metrics.sent.with_label_values(&labels),
            received: metrics.received.with_label_values(&labels),
        }
    }

    fn closed(&self, flag: &'static str) {
        self.active.dec();
        let [reporter, source, destination] = &self.labels;
        self.metrics.closed.with_label_values(&[reporter, source, destination, flag]).inc();
    }
}

/// An open flow.
pub(super) type OpenFlow = Open<UdpEdge>;

/// One worker's handles of flows.
pub(super) type UdpEdges = Edges<UdpEdge>;

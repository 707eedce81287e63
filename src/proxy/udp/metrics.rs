//! What the data plane counts for UDP. Handles are looked up once per pair of services and kept per worker.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};
use tracing::info;

use super::table::Dropped;
use crate::metrics::{Expiring, Held, Metrics};
use crate::proxy::metrics::{EDGE_LABELS, Edges, Open, PerPair, Reporter};

/// The handles of the whole agent. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct UdpMetrics {
    opened: Expiring<IntCounterVec>,
    closed: Expiring<IntCounterVec>,
    active: Expiring<IntGaugeVec>,
    sent_bytes: Expiring<IntCounterVec>,
    received_bytes: Expiring<IntCounterVec>,
    sent: Expiring<IntCounterVec>,
    received: Expiring<IntCounterVec>,
    dropped: Expiring<IntCounterVec>,
    /// The limit of size was told in the log.
    is_limit_told: Arc<AtomicBool>,
}

impl UdpMetrics {
    /// Makes the metrics and adds them to the registry.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            metrics.add_expiring(IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let [reporter, source, destination, security] = EDGE_LABELS;
        let closed_labels = [reporter, source, destination, security, "response_flags"];
        let dropped_labels = [reporter, source, destination, security, "reason"];
        Ok(Self {
            opened: counters("weft_udp_flows_opened_total", "UDP flows that began.", &EDGE_LABELS)?,
            closed: counters("weft_udp_flows_closed_total", "UDP flows that ended, by reason.", &closed_labels)?,
            active: metrics
                .add_expiring(IntGaugeVec::new(Opts::new("weft_udp_flows_active", "UDP flows open."), &EDGE_LABELS)?)?,
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
    labels: [String; 4],
    metrics: UdpMetrics,
    opened: Held<IntCounter>,
    active: Held<IntGauge>,
    sent_bytes: Held<IntCounter>,
    received_bytes: Held<IntCounter>,
    sent: Held<IntCounter>,
    received: Held<IntCounter>,
    /// Each from its first time on: a flood takes no lock per datagram.
    dropped: RefCell<Vec<(Dropped, Held<IntCounter>)>>,
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
        if datagrams == 0 {
            return;
        }
        let mut dropped = self.dropped.borrow_mut();
        if let Some((_, counter)) = dropped.iter().find(|(known, _)| *known == why) {
            return counter.inc_by(datagrams as u64);
        }
        let [reporter, source, destination, security] = &self.labels;
        let counter = self.metrics.dropped.with(&[reporter, source, destination, security, why.as_str()]);
        counter.inc_by(datagrams as u64);
        dropped.push((why, counter));
    }

    /// Counts a datagram that is too large for the tunnel, and says once what is not.
    pub(super) fn oversize(&self, bytes: usize, bytes_max: usize) {
        self.dropped(Dropped::Oversize, 1);
        if !self.metrics.is_limit_told.swap(true, Ordering::Relaxed) {
            let [reporter, _, service, _] = &self.labels;
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

    fn of(metrics: &UdpMetrics, reporter: Reporter, labels: [&str; 4]) -> Self {
        Self {
            reporter,
            labels: labels.map(str::to_owned),
            metrics: metrics.clone(),
            opened: metrics.opened.with(&labels),
            active: metrics.active.with(&labels),
            sent_bytes: metrics.sent_bytes.with(&labels),
            received_bytes: metrics.received_bytes.with(&labels),
            sent: metrics.sent.with(&labels),
            received: metrics.received.with(&labels),
            dropped: RefCell::default(),
        }
    }

    fn closed(&self, flag: &'static str) {
        self.active.dec();
        let [reporter, source, destination, security] = &self.labels;
        self.metrics.closed.with(&[reporter, source, destination, security, flag]).inc();
    }
}

/// An open flow.
pub(super) type OpenFlow = Open<UdpEdge>;

/// One worker's handles of flows.
pub(super) type UdpEdges = Edges<UdpEdge>;

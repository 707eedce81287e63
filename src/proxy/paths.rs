//! The open tunnels of a worker: what their paths are like, for the metrics (round trips, windows, packets that were lost),
//! and whose they are.
//!
//! quinn counts per connection and tells nobody. Each worker looks at its tunnels now and then, not per packet, and adds up: no
//! series has a peer in it. What left after the last look is counted when a tunnel ends.
//! Not here: what follows from it (`transport::congestion`).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;

use foldhash::HashMap;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};

use crate::metrics::Metrics;
use crate::model::{Generation, NodeName};

/// Bounds of round trips, in seconds: from two hosts on one switch to the other side of the world.
const RTT_BUCKETS: [f64; 12] = [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];
/// Bounds of windows, in bytes: 16 KiB to 16 MiB, which is what a tunnel may have under way.
const WINDOW_BUCKETS: [f64; 6] = [16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

/// Sides of a tunnel, as the metrics call them: who opened it, and who let it in.
pub(super) const DIALER: &str = "dialer";
pub(super) const ACCEPTOR: &str = "acceptor";

/// Where tunnels came from, and in which life of their node.
pub(super) type Origin = (NodeName, SocketAddr, Generation);

/// The handles of the agent, by side. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct PathMetrics {
    rtt: HistogramVec,
    window: HistogramVec,
    sent: IntCounterVec,
    lost: IntCounterVec,
}

impl PathMetrics {
    /// Makes the metrics and adds them to the registry.
    pub(super) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str| metrics.add(IntCounterVec::new(Opts::new(name, help), &["side"])?);
        let histograms = |name: &str, help: &str, buckets: &[f64]| {
            metrics.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &["side"])?)
        };
        Ok(Self {
            rtt: histograms("weft_quic_rtt_seconds", "Smoothed round trips of open tunnels.", &RTT_BUCKETS)?,
            window: histograms(
                "weft_quic_congestion_window_bytes",
                "Congestion windows of open tunnels.",
                &WINDOW_BUCKETS,
            )?,
            sent: counters("weft_quic_packets_sent_total", "Packets of tunnels that were sent.")?,
            lost: counters("weft_quic_packets_lost_total", "Packets of tunnels that were sent and lost.")?,
        })
    }
}

/// The tunnels that one worker looks at.
pub(crate) struct Paths {
    metrics: PathMetrics,
    next: Cell<u64>,
    open: RefCell<HashMap<u64, Path>>,
}

struct Path {
    connection: quinn::Connection,
    side: &'static str,
    peer: NodeName,
    sent: u64,
    lost: u64,
}

impl Paths {
    /// Looks at nothing yet.
    pub(super) fn new(metrics: PathMetrics) -> Rc<Self> {
        Rc::new(Self { metrics, next: Cell::default(), open: RefCell::default() })
    }

    /// Looks at `connection`, which leads to `peer`, until what is returned is dropped.
    pub(super) fn watch(
        self: &Rc<Self>,
        connection: &quinn::Connection,
        side: &'static str,
        peer: &NodeName,
    ) -> Watched {
        let number = self.next.get();
        self.next.set(number + 1);
        let path = Path { connection: connection.clone(), side, peer: peer.clone(), sent: 0, lost: 0 };
        self.open.borrow_mut().insert(number, path);
        Watched { paths: Rc::clone(self), number }
    }

    /// Returns the tunnels that nodes have opened to this one, of those in whose name `life` finds one.
    pub(super) fn accepted(
        &self,
        life: impl Fn(&NodeName) -> Option<Generation>,
    ) -> BTreeMap<Origin, Vec<quinn::Connection>> {
        let mut found = BTreeMap::<_, Vec<_>>::new();
        for Path { connection, side, peer, .. } in self.open.borrow().values() {
            if *side == ACCEPTOR
                && let Some(life) = life(peer)
            {
                found.entry((peer.clone(), connection.remote_address(), life)).or_default().push(connection.clone());
            }
        }
        found
    }

    /// Looks at all.
    pub(super) fn look(&self) {
        for path in self.open.borrow_mut().values_mut() {
            let stats = self.count(path);
            self.metrics.rtt.with_label_values(&[path.side]).observe(stats.rtt.as_secs_f64());
            #[expect(clippy::cast_precision_loss, reason = "a window is far below 2^53")]
            self.metrics.window.with_label_values(&[path.side]).observe(stats.cwnd as f64);
        }
    }

    /// Adds what was sent and lost since the last look.
    fn count(&self, path: &mut Path) -> quinn::PathStats {
        let stats = path.connection.stats().path;
        let (sent, lost) = (stats.sent_packets.saturating_sub(path.sent), stats.lost_packets.saturating_sub(path.lost));
        self.metrics.sent.with_label_values(&[path.side]).inc_by(sent);
        self.metrics.lost.with_label_values(&[path.side]).inc_by(lost);
        (path.sent, path.lost) = (stats.sent_packets, stats.lost_packets);
        stats
    }
}

impl fmt::Debug for Paths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paths").field("open", &self.open.borrow().len()).finish_non_exhaustive()
    }
}

/// Keeps one tunnel under watch.
#[derive(Debug)]
pub(super) struct Watched {
    paths: Rc<Paths>,
    number: u64,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let path = self.paths.open.borrow_mut().remove(&self.number);
        if let Some(mut path) = path {
            self.paths.count(&mut path);
        }
    }
}

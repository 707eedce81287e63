//! What the control endpoint counts: connection attempts of peers, by plane and outcome.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, Opts};

use super::control::ControlCounts;
use crate::metrics::Metrics;
use crate::pki::Plane;

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Handed to the caller of `accept`.
    Accepted,
    /// TLS or QUIC failed.
    Failed,
    /// The handshake took too long.
    TimedOut,
    /// The peer's certificate does not verify.
    Unverified,
    /// Asked to prove its address first, under load.
    Retried,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Unverified => "unverified",
            Self::Retried => "retried",
        }
    }
}

/// The planes of the control endpoint.
const PLANES: [(Plane, &str); 2] = [(Plane::Gossip, "gossip"), (Plane::Join, "join")];

/// Counters of one control endpoint. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ControlMetrics {
    attempts: IntCounterVec,
}

impl ControlMetrics {
    pub(super) fn new() -> Self {
        let opts = Opts::new(
            "weft_transport_control_attempts_total",
            "Attempts of peers to connect for gossip or join, by outcome.",
        );
        let attempts =
            IntCounterVec::new(opts, &["plane", "outcome"]).expect("the name and the labels are well-formed");
        Self { attempts }
    }

    /// Counts an attempt.
    pub(super) fn count(&self, plane: Plane, outcome: Outcome) {
        let label = PLANES.iter().find(|(known, _)| *known == plane).map_or("gossip", |(_, label)| label);
        self.attempts.with_label_values(&[label, outcome.label()]).inc();
    }

    /// Returns the sums over the planes.
    pub(super) fn counts(&self) -> ControlCounts {
        let sum = |outcome: Outcome| {
            PLANES
                .iter()
                .map(|(_, plane)| self.attempts.with_label_values(&[*plane, outcome.label()]).get())
                .sum::<u64>()
        };
        ControlCounts {
            accepted: sum(Outcome::Accepted),
            failed: sum(Outcome::Failed) + sum(Outcome::TimedOut),
            unverified: sum(Outcome::Unverified),
        }
    }

    /// Adds the counters, and a gauge that asks `open` at each scrape.
    ///
    /// # Errors
    /// If another control endpoint was added to `metrics`.
    pub(super) fn register(
        &self,
        metrics: &Metrics,
        open: impl Fn() -> usize + Clone + Send + Sync + 'static,
    ) -> Result<(), prometheus::Error> {
        metrics.add(self.attempts.clone())?;
        let gauge =
            IntGauge::new("weft_transport_control_connections", "Gossip and join connections open, both ways.")?;
        metrics.add(Polled { gauge, read: open })?;
        Ok(())
    }
}

/// A gauge whose value is asked for at each scrape.
#[derive(Clone)]
struct Polled<F> {
    gauge: IntGauge,
    read: F,
}

impl<F: Fn() -> usize + Send + Sync> Collector for Polled<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.gauge.set(i64::try_from((self.read)()).unwrap_or(i64::MAX));
        self.gauge.collect()
    }
}

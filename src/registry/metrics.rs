//! What the registry counts.

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use crate::metrics::Metrics;
use crate::model::HealthStatus;

/// Bounds of a check's duration, in seconds: from a local answer to the default timeout.
const DURATION_BUCKETS: [f64; 9] = [0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0];

/// Bounds of how late a check starts, in seconds: from a timer's grain to a whole interval.
const DELAY_BUCKETS: [f64; 10] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 10.0];

/// Handles of the registry's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct RegistryMetrics {
    services: IntGauge,
    /// Nodes without an agent that are written here.
    pub(crate) externals: IntGauge,
    checks: IntGaugeVec,
    runs: IntCounterVec,
    durations: HistogramVec,
    delays: Histogram,
}

impl RegistryMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let services = IntGauge::new("weft_registry_services", "Services registered on this node")?;
        let externals =
            IntGauge::new("weft_registry_external_nodes", "Nodes without an agent that are written at this node")?;
        let checks = Opts::new("weft_registry_checks", "Checks registered on this node, by status");
        let runs = Opts::new("weft_registry_check_runs_total", "Runs of checks, by kind and result");
        let durations = HistogramOpts::new("weft_registry_check_duration_seconds", "Time that a run takes, by kind");
        let delay = "weft_registry_check_start_delay_seconds";
        let delays =
            HistogramOpts::new(delay, "How long after its time a check starts").buckets(DELAY_BUCKETS.to_vec());
        Ok(Self {
            services: metrics.add(services)?,
            externals: metrics.add(externals)?,
            checks: metrics.add(IntGaugeVec::new(checks, &["status"])?)?,
            runs: metrics.add(IntCounterVec::new(runs, &["kind", "result"])?)?,
            durations: metrics.add(HistogramVec::new(durations.buckets(DURATION_BUCKETS.to_vec()), &["kind"])?)?,
            delays: metrics.add(Histogram::with_opts(delays)?)?,
        })
    }

    pub(crate) fn count_run(&self, kind: &'static str, result: HealthStatus, took: Duration) {
        self.runs.with_label_values(&[kind, result.as_str()]).inc();
        self.durations.with_label_values(&[kind]).observe(took.as_secs_f64());
    }

    pub(crate) fn note_start(&self, late: Duration) {
        self.delays.observe(late.as_secs_f64());
    }

    /// Sets the gauges to what is registered.
    pub(crate) fn show(&self, services: usize, statuses: impl Iterator<Item = HealthStatus>) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.services.set(number(services));
        let mut counts = [(HealthStatus::Passing, 0), (HealthStatus::Warning, 0), (HealthStatus::Critical, 0)];
        for status in statuses {
            for (counted, count) in &mut counts {
                *count += usize::from(*counted == status);
            }
        }
        for (status, count) in counts {
            self.checks.with_label_values(&[status.as_str()]).set(number(count));
        }
    }
}

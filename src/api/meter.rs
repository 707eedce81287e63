//! The API's own metrics.

use std::time::Duration;

use http::StatusCode;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts};

use crate::metrics::Metrics;

/// Upper bounds of the duration buckets, in seconds: from 0.1 ms (a read from memory) to a slow disk or a join.
const BUCKETS_SECONDS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0];

/// Handles to the API's metrics.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    requests: IntCounterVec,
    duration: Histogram,
    /// Blocking queries that wait.
    pub(super) blocking: IntGauge,
    /// Answers for which there was no room.
    pub(super) answers_refused: IntCounter,
}

impl Meter {
    /// Registers them in `metrics`.
    pub(super) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let requests = Opts::new("weft_api_requests_total", "Requests to the HTTP API, by endpoint and status code.");
        let duration = HistogramOpts::new(
            "weft_api_request_duration_seconds",
            "Time to answer a request to the HTTP API; queries that waited for a change are left out.",
        );
        let duration = duration.buckets(BUCKETS_SECONDS.to_vec());
        let blocking = Opts::new("weft_api_blocking_queries", "Blocking queries that wait for a change.");
        let refused = "Answers of the HTTP API that were refused: others that wait for slow clients filled their room.";
        let refused = Opts::new("weft_api_answers_refused_total", refused);
        Ok(Self {
            requests: metrics.add(IntCounterVec::new(requests, &["endpoint", "code"])?)?,
            duration: metrics.add(Histogram::with_opts(duration)?)?,
            blocking: metrics.add(IntGauge::with_opts(blocking)?)?,
            answers_refused: metrics.add(IntCounter::with_opts(refused)?)?,
        })
    }

    /// Counts an answer; `endpoint` is a path of the route table, so that labels stay few. `took` is none for a query that waited.
    pub(super) fn count(&self, endpoint: &'static str, code: StatusCode, took: Option<Duration>) {
        self.requests.with_label_values(&[endpoint, code.as_str()]).inc();
        if let Some(took) = took {
            self.duration.observe(took.as_secs_f64());
        }
    }
}

/// Counts one blocking query for as long as it lives.
pub(super) struct BlockingPermit(IntGauge);

impl BlockingPermit {
    /// Takes a place among `max`; none if all are taken.
    pub(super) fn take(gauge: &IntGauge, max: usize) -> Option<Self> {
        gauge.inc();
        let permit = Self(gauge.clone());
        let taken = usize::try_from(gauge.get()).unwrap_or(usize::MAX);
        (taken <= max).then_some(permit)
    }
}

impl Drop for BlockingPermit {
    fn drop(&mut self) {
        self.0.dec();
    }
}

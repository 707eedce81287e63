//! The Workload API's own metrics.

use prometheus::{IntCounterVec, IntGauge, Opts};

use super::rpc::{Code, Method};
use crate::metrics::Metrics;

/// Handles to them.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    calls: IntCounterVec,
    streams: IntGauge,
}

impl Meter {
    /// Registers them in `metrics`.
    pub(super) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let calls = Opts::new("weft_workload_calls_total", "Calls of the SPIFFE Workload API, by how they began.");
        let streams = Opts::new("weft_workload_streams_active", "Streams of the SPIFFE Workload API that are open.");
        Ok(Self {
            calls: metrics.add(IntCounterVec::new(calls, &["method", "code"])?)?,
            streams: metrics.add(IntGauge::with_opts(streams)?)?,
        })
    }

    /// Counts a call by the status that it began with.
    pub(super) fn count(&self, method: Method, code: Code) {
        self.calls.with_label_values(&[method.as_str(), code.as_str()]).inc();
    }

    /// Counts one stream for as long as the value lives.
    pub(super) fn open(&self) -> OpenStream {
        self.streams.inc();
        OpenStream(self.streams.clone())
    }
}

/// One open stream.
#[derive(Debug)]
pub(super) struct OpenStream(IntGauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

//! DNS's own metrics.

use std::sync::OnceLock;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts};

use super::message::Via;
use crate::metrics::Metrics;

/// Types with a series of their own.
const TYPES: [(RecordType, &str); 8] = [
    (RecordType::A, "A"),
    (RecordType::AAAA, "AAAA"),
    (RecordType::SRV, "SRV"),
    (RecordType::TXT, "TXT"),
    (RecordType::PTR, "PTR"),
    (RecordType::SOA, "SOA"),
    (RecordType::NS, "NS"),
    (RecordType::ANY, "ANY"),
];
/// Codes with a series of their own.
const CODES: [(ResponseCode, &str); 7] = [
    (ResponseCode::NoError, "NOERROR"),
    (ResponseCode::NXDomain, "NXDOMAIN"),
    (ResponseCode::Refused, "REFUSED"),
    (ResponseCode::ServFail, "SERVFAIL"),
    (ResponseCode::FormErr, "FORMERR"),
    (ResponseCode::NotImp, "NOTIMP"),
    (ResponseCode::BADVERS, "BADVERS"),
];
const OTHER: &str = "other";

/// Why a query or connection got nothing.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dropped {
    /// What came is no query.
    NoQuery,
    /// Its source asks too much.
    Rate,
    /// Too many connections.
    Connections,
    /// The answer could not be sent.
    Unsent,
}

/// How a question for others ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Recursed {
    /// From the cache.
    Cached,
    /// A recursor answered.
    Answered,
    /// None answered.
    Failed,
    /// Too many were open.
    Overflow,
}

/// Handles to them.
#[derive(Debug)]
pub(super) struct Meter {
    queries: IntCounterVec,
    /// The series of `queries` that were needed so far: looking one up takes a lock.
    series: [[[OnceLock<IntCounter>; CODES.len() + 1]; TYPES.len() + 1]; 2],
    duration: Histogram,
    dropped: IntCounterVec,
    recursions: IntCounterVec,
    /// Answers of recursors that are kept.
    pub(super) cached: IntGauge,
    /// TCP connections that are open.
    pub(super) connections: IntGauge,
}

impl Meter {
    /// Registers them in `metrics`.
    pub(super) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let queries = Opts::new("weft_dns_queries_total", "DNS queries answered.");
        let duration = HistogramOpts::new("weft_dns_query_duration_seconds", "Time to answer from the catalogue.")
            .buckets(prometheus::exponential_buckets(2e-6, 2.0, 16)?);
        let dropped = Opts::new("weft_dns_dropped_total", "DNS queries and connections that got no answer.");
        let recursions = Opts::new("weft_dns_recursions_total", "DNS queries for names of others, by how they ended.");
        let cached = Opts::new("weft_dns_recursor_cache_entries", "Answers of recursors that are kept.");
        let connections = Opts::new("weft_dns_tcp_connections_active", "DNS connections by TCP that are open.");
        Ok(Self {
            queries: metrics.add(IntCounterVec::new(queries, &["transport", "type", "code"])?)?,
            series: Default::default(),
            duration: metrics.add(Histogram::with_opts(duration)?)?,
            dropped: metrics.add(IntCounterVec::new(dropped, &["reason"])?)?,
            recursions: metrics.add(IntCounterVec::new(recursions, &["result"])?)?,
            cached: metrics.add(IntGauge::with_opts(cached)?)?,
            connections: metrics.add(IntGauge::with_opts(connections)?)?,
        })
    }

    /// Counts an answer with `code`; without a type where the question could not be read.
    pub(super) fn count(&self, via: Via, kind: Option<RecordType>, code: ResponseCode) {
        let kind_at = TYPES.iter().position(|(own, _)| Some(*own) == kind).unwrap_or(TYPES.len());
        let code_at = CODES.iter().position(|(own, _)| *own == code).unwrap_or(CODES.len());
        let via_at = usize::from(via == Via::Tcp);
        let cell = self.series.get(via_at).and_then(|kinds| kinds.get(kind_at)).and_then(|codes| codes.get(code_at));
        let Some(cell) = cell else { return };
        let name = |name: Option<&'static str>| name.unwrap_or(OTHER);
        let counter = cell.get_or_init(|| {
            let kind = name(TYPES.get(kind_at).map(|(_, name)| *name));
            let code = name(CODES.get(code_at).map(|(_, name)| *name));
            self.queries.with_label_values(&[via.as_str(), kind, code])
        });
        counter.inc();
    }

    /// Notes how long an answer from the catalogue took.
    pub(super) fn took(&self, time: Duration) {
        self.duration.observe(time.as_secs_f64());
    }

    /// Counts what got nothing.
    pub(super) fn drop_one(&self, why: Dropped) {
        let reason = match why {
            Dropped::NoQuery => "no_query",
            Dropped::Rate => "rate",
            Dropped::Connections => "connections",
            Dropped::Unsent => "unsent",
        };
        self.dropped.with_label_values(&[reason]).inc();
    }

    /// Counts a question for others.
    pub(super) fn recursed(&self, how: Recursed) {
        let result = match how {
            Recursed::Cached => "cached",
            Recursed::Answered => "answered",
            Recursed::Failed => "failed",
            Recursed::Overflow => "overflow",
        };
        self.recursions.with_label_values(&[result]).inc();
    }
}

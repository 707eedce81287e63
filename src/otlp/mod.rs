//! OTLP: spans and metrics to a collector, over HTTP with protobuf.
//!
//! ```text
//!   workers -> trace::Tracer -> queue (2,048) -> batches (512) -> POST ENDPOINT/v1/traces    again later: 429, 502, 503, 504,
//!   registry of metrics ------ every interval ----------------> POST ENDPOINT/v1/metrics                  no connection
//! ```
//!
//! Invariants: nobody waits for a collector but the two tasks here; what waits is bounded, and what finds no room is dropped
//! and counted; a state of a collector is logged when it changes, and never per request; headers never print.
//! Not here: what is recorded (`trace`), which metrics there are (`metrics`), logs (`telemetry`), gRPC's form of OTLP.
//! Source: OTLP 1.5, opentelemetry-proto 1.5, semantic conventions 1.37.

mod client;
mod export;
mod message;
mod metrics;
mod spans;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Uri};
use prometheus::{IntCounter, IntCounterVec, Opts};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::client::Client;
use self::message::{Origin, Resource, Scope, text};
use crate::clock;
use crate::metrics::Metrics;
use crate::supervise::Tasks;
use crate::trace::{QUEUE_MAX, Share, Tracer};

/// How often metrics are sent, and how long a span waits at most: often enough to watch, a tenth of Prometheus' usual cost.
pub const INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
/// Shortest interval: below it the export would be a load of its own.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest interval.
pub const INTERVAL_MAX: Duration = Duration::from_hours(1);
/// Most headers that are sent along.
pub const HEADERS_MAX: usize = 32;

/// Where a collector takes OTLP/HTTP: `http://HOST:PORT`, `https://HOST/PREFIX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(Uri);

/// Why a text is no endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be http:// or https:// with a host, without user, query or fragment, such as \"http://127.0.0.1:4318\": \
     credentials belong into telemetry.otlp.headers, and /v1/traces is added"
)]
pub struct EndpointError;

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let uri: Uri = text.parse().map_err(|_| EndpointError)?;
        let is_http = uri.scheme() == Some(&Scheme::HTTP) || uri.scheme() == Some(&Scheme::HTTPS);
        let authority = uri.authority().ok_or(EndpointError)?;
        let is_plain = !authority.as_str().contains('@') && !text.contains(['#', '?']);
        let host = authority.host();
        // A port that is none (`:70000`, `:`) is part of the text alone.
        let has_port = authority.port_u16().is_some_and(|port| port > 0);
        let is_whole = !host.is_empty() && (has_port || authority.as_str().len() == host.len());
        if is_http && is_plain && is_whole { Ok(Self(uri)) } else { Err(EndpointError) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Endpoint {
    /// Tells whether it is spoken to by TLS.
    fn is_tls(&self) -> bool {
        self.0.scheme() == Some(&Scheme::HTTPS)
    }

    /// Returns host and port, an IPv6 address without its brackets.
    fn address(&self) -> (&str, u16) {
        let host = self.0.host().unwrap_or_default();
        let port = self.0.port_u16().unwrap_or(if self.is_tls() { 443 } else { 80 });
        (host.trim_start_matches('[').trim_end_matches(']'), port)
    }

    /// Returns the value of `Host`.
    fn host(&self) -> HeaderValue {
        let authority = self.0.authority().map_or("", |authority| authority.as_str());
        HeaderValue::try_from(authority).unwrap_or(HeaderValue::from_static(""))
    }

    /// Returns the path of a signal (OTLP/HTTP: the base and `/v1/NAME`).
    fn path(&self, signal: &str) -> String {
        format!("{}/v1/{signal}", self.0.path().trim_end_matches('/'))
    }
}

/// Whether metrics are exported beside spans.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ExportMetrics {
    /// Every interval.
    #[default]
    Yes,
    /// They are scraped.
    No,
}

/// How telemetry is exported. Valid where `config` made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpConfig {
    /// The collector.
    pub endpoint: Endpoint,
    /// How often: [`INTERVAL_MIN`] to [`INTERVAL_MAX`].
    pub interval: Duration,
    /// How many of the requests are recorded that no caller has decided about.
    pub share: Share,
    /// Sent along; their values are marked as sensitive, so that none is printed.
    pub headers: HeaderMap,
    /// Certificates of CAs (PEM) that are believed beside the host's.
    pub ca_file: Option<PathBuf>,
    /// Whether metrics are exported.
    pub metrics: ExportMetrics,
}

/// Whose telemetry it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginFacts {
    /// The node's id (`service.instance.id`).
    pub id: String,
    /// Its name.
    pub node: String,
    /// Its datacenter.
    pub datacenter: String,
    /// The host's name, if it has one.
    pub host: Option<String>,
}

/// What the export needs of the agent.
pub struct OtlpParams<'a> {
    /// Where to, and how.
    pub config: OtlpConfig,
    /// Who says it.
    pub origin: OriginFacts,
    /// What is exported, and where its own metrics go.
    pub metrics: &'a Metrics,
    /// Where its tasks run.
    pub tasks: &'a Tasks,
    /// Ends it, with what waits sent within two seconds.
    pub stop: CancellationToken,
}

/// Why nothing is exported.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// Nobody can be believed by TLS.
    #[error("cannot prepare TLS to the collector: {0}")]
    Roots(String),
    /// A metric of that name exists.
    #[error("cannot register the metrics of the export")]
    Metrics(#[source] prometheus::Error),
}

/// What is counted of the export itself.
#[derive(Debug, Clone)]
struct Meter {
    dropped: IntCounterVec,
    exports: IntCounterVec,
}

impl Meter {
    fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let dropped = Opts::new("weft_otlp_dropped_spans_total", "Spans that no collector got.");
        let exports = Opts::new("weft_otlp_exports_total", "Requests to the collector.");
        Ok(Self {
            dropped: metrics.add(IntCounterVec::new(dropped, &["reason"])?)?,
            exports: metrics.add(IntCounterVec::new(exports, &["signal", "result"])?)?,
        })
    }

    fn dropped(&self, reason: &str) -> IntCounter {
        self.dropped.with_label_values(&[reason])
    }
}

/// Starts the export in `params.tasks` and returns what records spans.
///
/// Must be called inside a tokio runtime; reads the host's roots where the endpoint is https, and connects to nobody yet.
///
/// # Errors
/// [`OtlpError`].
pub fn start(params: OtlpParams<'_>) -> Result<Tracer, OtlpError> {
    let OtlpParams { config, origin, metrics, tasks, stop } = params;
    let meter = Meter::new(metrics).map_err(OtlpError::Metrics)?;
    let (queue, spans) = mpsc::channel(QUEUE_MAX);
    let tracer = Tracer::new(config.share, queue, (meter.dropped("queue_full"), meter.dropped("stopped")));
    let origin = origin_of(origin);
    let exporter = |client| export::Exporter {
        client,
        endpoint: config.endpoint.to_string(),
        origin: origin.clone(),
        interval: config.interval,
        meter: meter.clone(),
        stop: stop.clone(),
    };
    tasks.spawn("otlp-traces", export::traces(exporter(Client::new(&config)?), spans));
    if config.metrics == ExportMetrics::Yes {
        let started_ns = clock::wall_ns();
        tasks.spawn("otlp-metrics", export::metrics(exporter(Client::new(&config)?), metrics.clone(), started_ns));
    }
    info!(endpoint = %config.endpoint, "telemetry is exported");
    Ok(tracer)
}

fn origin_of(facts: OriginFacts) -> Origin {
    let OriginFacts { id, node, datacenter, host } = facts;
    let mut attributes = vec![
        text("service.name", "weft"),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("service.instance.id", id),
        text("weft.node", node),
        text("weft.datacenter", datacenter),
    ];
    attributes.extend(host.map(|host| text("host.name", host)));
    let (name, version) = ("weft".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    Origin { resource: Resource { attributes }, scope: Scope { name, version } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_scheme_and_a_host_and_signals_have_paths_below_it() {
        #[track_caller]
        fn check(text: &str, address: (&str, u16), path: &str) {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.address(), endpoint.path("traces").as_str()), (address, path), "{text}");
        }
        check("http://127.0.0.1:4318", ("127.0.0.1", 4318), "/v1/traces");
        check("http://[::1]:4318/", ("::1", 4318), "/v1/traces");
        check("http://collector", ("collector", 80), "/v1/traces");
        check("https://otlp.example/a/b/", ("otlp.example", 443), "/a/b/v1/traces");
        for bad in [
            "",
            "127.0.0.1:4318",
            "collector",
            "grpc://collector:4317",
            "http://",
            "http://user:secret@collector",
            "http://collector?x=1",
            "http://collector#x",
            "http://collector:0",
            "http://collector:70000",
            "http://collector:",
            "http:///v1/traces",
        ] {
            assert_eq!(bad.parse::<Endpoint>(), Err(EndpointError), "{bad}");
        }
    }
}

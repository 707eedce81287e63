//! The block `telemetry`: `otlp`, and Consul's keys, which mean nothing here.

use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;

use super::problem::{Problem, Source};
use super::raw::{Given, Raw};
use crate::otlp::{Endpoint, ExportMetrics, HEADERS_MAX, INTERVAL_DEFAULT, INTERVAL_MAX, INTERVAL_MIN, OtlpConfig};
use crate::trace::Share;

/// Keys of Consul's `telemetry`: where its agents send metrics in forms that weft has not.
const CONSUL_ONLY: [&str; 13] = [
    "disable_compat_1.9",
    "disable_hostname",
    "disable_per_tenancy_usage_metrics",
    "dogstatsd_addr",
    "dogstatsd_tags",
    "enable_host_metrics",
    "filter_default",
    "metrics_prefix",
    "prefix_filter",
    "prometheus_retention_time",
    "retry_failed_connection",
    "statsd_address",
    "statsite_address",
];
/// Headers that are weft's to say.
const OWN_HEADERS: [&str; 7] =
    ["connection", "content-encoding", "content-length", "content-type", "host", "transfer-encoding", "user-agent"];

/// What files and flags say of the export.
#[derive(Debug, Default)]
pub(crate) struct RawOtlp {
    endpoint: Option<Given<String>>,
    interval: Option<Given<Duration>>,
    sampling: Option<Given<f64>>,
    ca_file: Option<Given<String>>,
    metrics: Option<Given<bool>>,
    headers: HeaderMap,
    /// Where the last of them was given.
    has_headers: Option<(Source, String)>,
}

impl Raw {
    /// Takes the block `telemetry`.
    pub(super) fn add_telemetry(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "telemetry", &value, "must be a block, such as telemetry { otlp { … } }");
        };
        for (name, value) in map {
            let key = format!("telemetry.{name}");
            match (name.as_str(), value) {
                ("otlp", Value::Object(map)) => {
                    for (name, value) in map {
                        self.add_otlp(source, &name, value);
                    }
                }
                ("otlp", other) => {
                    self.mistyped(source, &key, &other, "must be a block with `endpoint`, the collector's URL");
                }
                (name, _) if CONSUL_ONLY.contains(&name) || name.starts_with("circonus_") => {
                    self.warn(
                        source,
                        &key,
                        "has no effect: metrics are at /v1/agent/metrics, or exported by telemetry.otlp",
                    );
                }
                _ => self.unknown(source, &key),
            }
        }
    }

    /// Takes a key of `telemetry.otlp`.
    pub(super) fn add_otlp(&mut self, source: &Source, name: &str, value: Value) {
        let key = format!("telemetry.otlp.{name}");
        match name {
            "endpoint" => self.text(source, &key, value, |raw| &mut raw.otlp.endpoint),
            "interval" => self.duration(source, &key, &value, |raw| &mut raw.otlp.interval),
            "ca_file" => self.text(source, &key, value, |raw| &mut raw.otlp.ca_file),
            "metrics" => self.switch(source, &key, &value, |raw| &mut raw.otlp.metrics),
            "sampling_percent" => match value.as_f64() {
                Some(value) => self.otlp.sampling = Some(Given { value, source: source.clone(), key }),
                None => self.mistyped(source, &key, &value, "must be a number, 0 to 100"),
            },
            "headers" => self.otlp_headers(source, &key, value),
            _ => self.unknown(source, &key),
        }
    }

    /// No value is shown: they are credentials as a rule.
    fn otlp_headers(&mut self, source: &Source, key: &str, value: Value) {
        let Value::Object(map) = value else {
            let rule = "must be a block of texts, such as headers { x-api-key = \"…\" }";
            return self.problems.push(Problem::new(source.clone(), key, None, rule));
        };
        for (name, value) in map {
            let key = format!("{key}.{name}");
            let made = HeaderName::try_from(name.as_str()).ok().filter(|name| !OWN_HEADERS.contains(&name.as_str()));
            let text = value.as_str().and_then(|text| HeaderValue::try_from(text).ok());
            match (made, text) {
                (Some(name), Some(mut value)) => {
                    value.set_sensitive(true);
                    self.otlp.headers.insert(name, value);
                }
                (None, _) => {
                    let rule = "must be the name of a header that weft does not set itself";
                    self.problems.push(Problem::new(source.clone(), key.clone(), None, rule));
                }
                (Some(_), None) => {
                    let rule = "must be a text that a header can hold: printable ASCII";
                    self.problems.push(Problem::new(source.clone(), key.clone(), None, rule));
                }
            }
            self.otlp.has_headers = Some((source.clone(), key));
        }
    }
}

/// Resolves what was said; none: nothing is exported.
pub(super) fn otlp(raw: RawOtlp, problems: &mut Vec<Problem>) -> Option<OtlpConfig> {
    let interval = raw.interval.as_ref().map_or(INTERVAL_DEFAULT, |given| given.value);
    if let Some(given) = raw.interval.as_ref().filter(|_| !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval)) {
        let value = Some(format!("{interval:?}"));
        problems.push(Problem::new(given.source.clone(), given.key.clone(), value, "must be 1s to 1h"));
    }
    let share = raw.sampling.as_ref().map_or(Some(Share::default()), |given| parts(given.value));
    if let (Some(given), None) = (&raw.sampling, share) {
        problems.push(given.problem("must be 0 to 100, with two digits after the point at most"));
    }
    if let Some((source, key)) = raw.has_headers.filter(|_| raw.headers.len() > HEADERS_MAX) {
        let rule = format!("is one of {} headers; at most {HEADERS_MAX} are allowed", raw.headers.len());
        problems.push(Problem::new(source, key, None, rule));
    }
    if let Some(given) = &raw.ca_file {
        match CertificateDer::pem_file_iter(&given.value).map(|mut found| found.next()) {
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(error))) => problems.push(given.problem(format!("is no file of certificates in PEM: {error}"))),
            Ok(None) => problems.push(given.problem("holds no certificate in PEM")),
            Err(error) => problems.push(given.problem(format!("cannot be read: {error}"))),
        }
    }
    let Some(given) = raw.endpoint else {
        for key in
            [raw.interval.map(|given| (given.source, given.key)), raw.sampling.map(|given| (given.source, given.key))]
        {
            let rule = "has no effect without telemetry.otlp.endpoint, the collector's URL";
            problems.extend(key.map(|(source, key)| Problem::new(source, key, None, rule)));
        }
        return None;
    };
    let endpoint = match given.value.parse::<Endpoint>() {
        Ok(endpoint) => endpoint,
        Err(error) => {
            // A user's password may stand in it.
            problems.push(Problem::new(given.source, given.key, None, error.to_string()));
            return None;
        }
    };
    let is_off = raw.metrics.is_some_and(|given| !given.value);
    Some(OtlpConfig {
        endpoint,
        interval,
        share: share.unwrap_or_default(),
        headers: raw.headers,
        ca_file: raw.ca_file.map(|given| PathBuf::from(given.value)),
        metrics: if is_off { ExportMetrics::No } else { ExportMetrics::Yes },
    })
}

/// Turns percent into parts per ten thousand; none: it is none, or too fine.
fn parts(percent: f64) -> Option<Share> {
    let parts = percent * 100.0;
    let is_whole = (parts - parts.round()).abs() < 1e-6;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to lie within")]
    let parts = ((0.0..=f64::from(Share::ALL)).contains(&parts) && is_whole).then(|| parts.round() as u16)?;
    Share::of_parts(parts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> (Option<OtlpConfig>, String, usize) {
        let mut raw = Raw::default();
        raw.add_telemetry(&Source::Flag("-x"), value);
        let mut problems = std::mem::take(&mut raw.problems);
        let config = otlp(std::mem::take(&mut raw.otlp), &mut problems);
        (config, problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"), raw.warnings.len())
    }

    #[test]
    fn an_endpoint_is_all_that_an_export_needs() {
        let (config, problems, _) = read(json!({"otlp": {"endpoint": "http://127.0.0.1:4318"}}));
        let config = config.unwrap();
        assert_eq!((problems.as_str(), config.interval, config.share), ("", INTERVAL_DEFAULT, Share::default()));
        assert_eq!((config.metrics, config.headers.len()), (ExportMetrics::Yes, 0));
        let (config, problems, _) = read(json!({"otlp": {"endpoint": "https://otlp.example/x", "interval": "5s",
            "sampling_percent": 0.25, "metrics": false, "headers": {"Authorization": "Bearer hush"}}}));
        let config = config.unwrap();
        assert_eq!((problems.as_str(), config.share), ("", Share::of_parts(25).unwrap()));
        assert_eq!(config.metrics, ExportMetrics::No);
        assert_eq!(config.headers["authorization"], "Bearer hush");
        assert!(!format!("{config:?}").contains("hush"), "a header is a secret");
        assert_eq!(read(json!({})).0, None);
    }

    #[test]
    fn each_mistake_is_named_and_no_credential_is_shown() {
        #[track_caller]
        fn check(otlp: &Value, want: &str) {
            let (_, problems, _) = read(json!({"otlp": otlp}));
            assert!(problems.contains(want), "missing {want:?} in:\n{problems}");
            assert!(!problems.contains("hush"), "{problems}");
        }
        let with = |key: &str, value: Value| json!({"endpoint": "http://c:4318", key: value});
        check(&json!({"endpoint": "c:4317"}), "(telemetry.otlp.endpoint): must be http:// or https://");
        check(&json!({"endpoint": "http://u:hush@c"}), "credentials belong into telemetry.otlp.headers");
        check(&json!({"endpoint": 4318}), "must be a text in quotes");
        check(&json!({"interval": "5s"}), "(telemetry.otlp.interval): has no effect without telemetry.otlp.endpoint");
        check(&with("interval", json!("10ms")), "(telemetry.otlp.interval) = 10ms: must be 1s to 1h");
        for bad in [json!(100.01), json!(-1), json!(0.001)] {
            check(&with("sampling_percent", bad), "must be 0 to 100, with two digits");
        }
        check(&with("sampling_percent", json!("all")), "must be a number, 0 to 100");
        check(
            &with("headers", json!({"content-type": "hush"})),
            "(telemetry.otlp.headers.content-type): must be the name",
        );
        check(&with("headers", json!({"a b": "hush"})), "must be the name of a header");
        check(&with("headers", json!({"a": "hush\n"})), "must be a text that a header can hold");
        check(&with("headers", json!("hush")), "must be a block of texts");
        check(&with("ca_file", json!("/no/such")), "(telemetry.otlp.ca_file) = /no/such: cannot be read");
        check(&with("protocol", json!("grpc")), "telemetry.otlp.protocol): is not known");
        let many: serde_json::Map<String, Value> = (0..33).map(|at| (format!("x-{at}"), json!("hush"))).collect();
        check(&with("headers", Value::Object(many)), "is one of 33 headers; at most 32");
        let (_, problems, warnings) =
            read(json!({"statsd_address": "s:1", "circonus_api_url": "x", "disable_hostname": true}));
        assert_eq!((problems.as_str(), warnings), ("", 3), "Consul's files load");
        assert!(read(json!({"otpl": {}})).1.contains("(telemetry.otpl): is not known"));
    }
}

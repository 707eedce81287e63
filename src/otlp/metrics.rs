//! The registry's metrics as OTLP has them: OpenTelemetry's names where there are some, `weft.*` for the others.
//!
//! ```text
//!   weft_http_request_duration_seconds{reporter="source"}      -> http.client.request.duration, s
//!                                     {reporter="destination"} -> http.server.request.duration, s
//!   weft_MODULE_THING_UNIT_total{label}                        -> weft.MODULE.THING, unit, {weft.label}
//! ```
//!
//! Invariants: no two metrics get one name; whoever turns a name back by Prometheus' rules (dots to `_`, unit and `_total`
//! at the end) has the name of `api/metrics.md`. Sums are cumulative: a series that went and came again has a later start.
//! Not here: which metrics there are, sending.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};

use foldhash::HashMap;
use foldhash::fast::FixedState;
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

use super::message::{
    CUMULATIVE, Data, Gauge, Histogram, HistogramPoint, KeyValue, MetricMessage, MetricsRequest, Number, NumberPoint,
    Origin, ResourceMetrics, SCHEMA_URL, ScopeMetrics, Sum, number, text,
};
use super::spans::error;
use crate::trace::Side;

/// The histogram that has names of its own in the conventions.
const HTTP_DURATION: &str = "weft_http_request_duration_seconds";
/// Points of one request: some 600 KiB, far below what collectors take (20 MiB).
pub(super) const POINTS_MAX: usize = 2_000;
/// Units at the end of a name, with their codes (UCUM).
const UNITS: [(&str, &str); 3] = [("_seconds", "s"), ("_bytes", "By"), ("_days", "d")];

/// Since when each series counts.
#[derive(Debug)]
pub(super) struct Starts {
    /// When the registry was last read; at first, when the agent started.
    last_ns: u64,
    /// By the hash of name and labels: its start, and what it had counted.
    series: HashMap<u64, (u64, u64)>,
    seen: HashMap<u64, (u64, u64)>,
}

impl Starts {
    /// Nothing was read before `started_ns`, when the agent started.
    pub(super) fn new(started_ns: u64) -> Self {
        Self { last_ns: started_ns, series: HashMap::default(), seen: HashMap::default() }
    }

    /// Returns since when a series has counted `count`.
    fn of(&mut self, name: &str, labels: &[LabelPair], count: u64) -> u64 {
        let mut hasher = FixedState::with_seed(0).build_hasher();
        name.hash(&mut hasher);
        for label in labels {
            (label.name(), label.value()).hash(&mut hasher);
        }
        let key = hasher.finish();
        // A count that fell, or that was not there, begins after it was last looked at.
        let start = match self.series.get(&key) {
            Some((start, before)) if *before <= count => *start,
            Some(_) | None => self.last_ns,
        };
        self.seen.insert(key, (start, count));
        start
    }

    /// Ends a reading at `now_ns`: series that it did not meet are gone.
    fn end(&mut self, now_ns: u64) {
        self.series = std::mem::take(&mut self.seen);
        self.last_ns = now_ns;
    }
}

/// Turns what the registry holds at `now_ns` into requests of [`POINTS_MAX`] points at most.
pub(super) fn requests(
    origin: &Origin,
    families: &[MetricFamily],
    starts: &mut Starts,
    now_ns: u64,
) -> Vec<MetricsRequest> {
    let (mut requests, mut metrics, mut room) = (Vec::new(), Vec::new(), POINTS_MAX);
    for family in families {
        let mut named: BTreeMap<String, Vec<&Metric>> = BTreeMap::new();
        for metric in family.get_metric() {
            named.entry(name(family.name(), metric.get_label())).or_default().push(metric);
        }
        for (name, points) in named {
            let mut points = points.as_slice();
            while !points.is_empty() {
                let (these, rest) = points.split_at(points.len().min(room));
                metrics.extend(message(&name, family, these, (&mut *starts, now_ns)));
                (points, room) = (rest, room - these.len());
                if room == 0 {
                    requests.push(request(origin, std::mem::take(&mut metrics)));
                    room = POINTS_MAX;
                }
            }
        }
    }
    if !metrics.is_empty() {
        requests.push(request(origin, metrics));
    }
    starts.end(now_ns);
    requests
}

fn request(origin: &Origin, metrics: Vec<MetricMessage>) -> MetricsRequest {
    MetricsRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(origin.resource.clone()),
            scope_metrics: vec![ScopeMetrics { scope: Some(origin.scope.clone()), metrics }],
            schema_url: SCHEMA_URL.to_owned(),
        }],
    }
}

/// One metric with some of its points; none, if they are of no kind that OTLP has, or all without a value.
fn message(
    name: &str,
    family: &MetricFamily,
    points: &[&Metric],
    (starts, now_ns): (&mut Starts, u64),
) -> Option<MetricMessage> {
    let is_http = family.name() == HTTP_DURATION;
    let mut counted = |point: &Metric, count: u64| {
        let labels = point.get_label();
        let attributes = if is_http { http_attributes(labels) } else { attributes(labels) };
        (attributes, starts.of(family.name(), labels, count))
    };
    let data = match family.get_field_type() {
        MetricType::COUNTER => {
            let point = |point: &&Metric| {
                let count = whole(point.get_counter().get_value());
                let (attributes, start) = counted(point, count);
                NumberPoint {
                    start_time_unix_nano: start,
                    time_unix_nano: now_ns,
                    value: Some(Number::Int(i64::try_from(count).unwrap_or(i64::MAX))),
                    attributes,
                }
            };
            let data_points = points.iter().map(point).collect();
            Data::Sum(Sum { data_points, aggregation_temporality: CUMULATIVE, is_monotonic: true })
        }
        MetricType::GAUGE => {
            // "Never" is +Inf in Prometheus; many a store refuses it.
            let of_value = |point: &&&Metric| point.get_gauge().get_value().is_finite();
            let point = |point: &&Metric| NumberPoint {
                start_time_unix_nano: 0,
                time_unix_nano: now_ns,
                value: Some(Number::Double(point.get_gauge().get_value())),
                attributes: attributes(point.get_label()),
            };
            let data_points: Vec<NumberPoint> = points.iter().filter(of_value).map(point).collect();
            if data_points.is_empty() {
                return None;
            }
            Data::Gauge(Gauge { data_points })
        }
        MetricType::HISTOGRAM => {
            let point = |point: &&Metric| {
                let of = point.get_histogram();
                let (attributes, start) = counted(point, of.get_sample_count());
                histogram(of, attributes, (start, now_ns))
            };
            let data_points = points.iter().map(point).collect();
            Data::Histogram(Histogram { data_points, aggregation_temporality: CUMULATIVE })
        }
        MetricType::SUMMARY | MetricType::UNTYPED => return None,
    };
    let unit = unit(family.name()).map_or("", |(_, unit)| unit);
    let (name, description, unit) = (name.to_owned(), family.help().to_owned(), unit.to_owned());
    Some(MetricMessage { name, description, unit, data: Some(data) })
}

/// Counters count whole things.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
fn whole(count: f64) -> u64 {
    count as u64
}

/// Prometheus' buckets hold what is below their bound; OTLP's what is between two, and one more holds the rest.
fn histogram(
    of: &prometheus::proto::Histogram,
    attributes: Vec<KeyValue>,
    (start_ns, now_ns): (u64, u64),
) -> HistogramPoint {
    let (mut bucket_counts, mut explicit_bounds, mut below) = (Vec::new(), Vec::new(), 0);
    for bucket in of.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite()) {
        explicit_bounds.push(bucket.upper_bound());
        bucket_counts.push(bucket.cumulative_count().saturating_sub(below));
        below = bucket.cumulative_count();
    }
    bucket_counts.push(of.get_sample_count().saturating_sub(below));
    HistogramPoint {
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        count: of.get_sample_count(),
        sum: Some(of.get_sample_sum()),
        bucket_counts,
        explicit_bounds,
        attributes,
    }
}

/// Returns the name of a series of `family`.
fn name(family: &str, labels: &[LabelPair]) -> String {
    if family == HTTP_DURATION {
        let side = if side(labels) == Side::Source { "client" } else { "server" };
        return format!("http.{side}.request.duration");
    }
    let bare = family.strip_prefix("weft_").unwrap_or(family);
    let (module, thing) = bare.split_once('_').unwrap_or((bare, ""));
    let thing = thing.strip_suffix("_total").unwrap_or(thing);
    // A thing that is nothing but its unit keeps it.
    let thing = unit(family).and_then(|(end, _)| thing.strip_suffix(end)).unwrap_or(thing);
    format!("weft.{module}.{thing}")
}

/// Returns the unit at the end of a name, and its code; none: it counts things.
fn unit(family: &str) -> Option<(&'static str, &'static str)> {
    let bare = family.strip_suffix("_total").unwrap_or(family);
    UNITS.into_iter().find(|(end, _)| bare.ends_with(end))
}

fn label<'l>(labels: &'l [LabelPair], name: &str) -> &'l str {
    labels.iter().find(|label| label.name() == name).map_or("", LabelPair::value)
}

fn side(labels: &[LabelPair]) -> Side {
    if label(labels, "reporter") == "source" { Side::Source } else { Side::Destination }
}

fn attributes(labels: &[LabelPair]) -> Vec<KeyValue> {
    labels.iter().map(|label| text(&format!("weft.{}", label.name()), label.value())).collect()
}

/// The attributes of `http.*.request.duration`; methods are no label of weft's.
fn http_attributes(labels: &[LabelPair]) -> Vec<KeyValue> {
    let (side, status) = (side(labels), label(labels, "response_code").parse().unwrap_or(0_u16));
    let grpc = label(labels, "grpc_response_status").parse().ok();
    let (destination, flag) = (label(labels, "destination_service"), label(labels, "response_flags"));
    let mut attributes = vec![text("url.scheme", "http"), text("server.address", destination)];
    if status != 0 {
        attributes.push(number("http.response.status_code", status));
    }
    attributes.extend(grpc.map(|code: u8| number("rpc.grpc.status_code", code)));
    attributes.extend(error(side, (status, grpc, flag)).map(|error| text("error.type", error)));
    for name in ["source_service", "destination_service", "response_flags", "connection_security"] {
        attributes.push(text(&format!("weft.{name}"), label(labels, name)));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prometheus::{Gauge as PlainGauge, HistogramOpts, HistogramVec, IntCounterVec, Opts};

    use super::*;
    use crate::metrics::Metrics;
    use crate::otlp::message::{AnyValue, Value};
    use crate::otlp::spans::tests::origin;

    fn all(requests: &[MetricsRequest]) -> Vec<MetricMessage> {
        let metrics = requests.iter().flat_map(|request| &request.resource_metrics[0].scope_metrics[0].metrics);
        metrics.cloned().collect()
    }

    fn has(attributes: &[KeyValue], key: &str, want: Value) -> bool {
        attributes.contains(&KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(want) }) })
    }

    fn read(metrics: &Metrics, starts: &mut Starts, now_ns: u64) -> Vec<MetricMessage> {
        all(&requests(&origin(), &metrics.registry().gather(), starts, now_ns))
    }

    #[test]
    fn durations_of_requests_have_the_names_of_the_conventions_by_side() {
        let metrics = Metrics::new();
        let labels = [
            "reporter",
            "source_service",
            "destination_service",
            "response_code",
            "grpc_response_status",
            "response_flags",
            "connection_security",
        ];
        let opts = HistogramOpts::new(HTTP_DURATION, "Time.").buckets(vec![0.1, 1.0]);
        let took = metrics.add(HistogramVec::new(opts, &labels).unwrap()).unwrap();
        let good = took.with_label_values(&["source", "api", "web", "200", "", "-", "mutual_tls"]);
        for seconds in [0.05, 0.5, 0.5, 5.0] {
            good.observe(seconds);
        }
        took.with_label_values(&["destination", "api", "web", "200", "14", "-", "mutual_tls"]).observe(0.2);
        let shown = read(&metrics, &mut Starts::new(5), 9);
        let names: Vec<(&str, &str)> = shown.iter().map(|one| (one.name.as_str(), one.unit.as_str())).collect();
        assert_eq!(names, [("http.client.request.duration", "s"), ("http.server.request.duration", "s")]);
        let points = |at: usize| match &shown[at].data {
            Some(Data::Histogram(of)) if of.aggregation_temporality == CUMULATIVE => of.data_points.clone(),
            other => panic!("{other:?}"),
        };
        let [client] = points(0).try_into().unwrap();
        assert_eq!((client.start_time_unix_nano, client.time_unix_nano, client.count), (5, 9, 4));
        assert_eq!((client.bucket_counts, client.explicit_bounds), (vec![1, 2, 1], vec![0.1, 1.0]));
        assert!((client.sum.unwrap() - 6.05).abs() < 1e-9);
        assert!(has(&client.attributes, "http.response.status_code", Value::Number(200)), "{:?}", client.attributes);
        assert!(has(&client.attributes, "weft.connection_security", Value::Text("mutual_tls".to_owned())));
        assert!(!client.attributes.iter().any(|one| one.key == "error.type"));
        let server = &points(1)[0];
        assert!(has(&server.attributes, "rpc.grpc.status_code", Value::Number(14)));
        assert!(has(&server.attributes, "error.type", Value::Text("14".to_owned())));
    }

    #[test]
    fn a_count_that_falls_or_comes_anew_starts_later_and_what_is_never_is_left_out() {
        let metrics = Metrics::new();
        let calls = IntCounterVec::new(Opts::new("weft_tcp_sent_bytes_total", "Bytes."), &["service"]).unwrap();
        let calls = metrics.add(calls).unwrap();
        let never = metrics.add(PlainGauge::new("weft_policy_first_end_days", "Days.").unwrap()).unwrap();
        never.set(f64::INFINITY);
        let mut starts = Starts::new(100);
        let mut sum = |now_ns| {
            let shown = read(&metrics, &mut starts, now_ns);
            assert!(shown.iter().all(|one| one.name == "weft.tcp.sent" && one.unit == "By"), "{shown:?}");
            let point = |point: &NumberPoint| {
                assert!(has(&point.attributes, "weft.service", Value::Text("web".to_owned())));
                (point.start_time_unix_nano, point.value)
            };
            match shown.first().and_then(|one| one.data.clone()) {
                Some(Data::Sum(sum)) if sum.is_monotonic => sum.data_points.iter().map(point).collect(),
                None => Vec::new(),
                other => panic!("{other:?}"),
            }
        };
        calls.with_label_values(&["web"]).inc_by(7);
        assert_eq!(sum(200), [(100, Some(Number::Int(7)))]);
        calls.with_label_values(&["web"]).inc();
        assert_eq!(sum(300), [(100, Some(Number::Int(8)))]);
        calls.remove_label_values(&["web"]).unwrap();
        calls.with_label_values(&["web"]).inc_by(2);
        assert_eq!(sum(400), [(300, Some(Number::Int(2)))], "it began again between the two");
        calls.remove_label_values(&["web"]).unwrap();
        assert_eq!(sum(500), []);
        calls.with_label_values(&["web"]).inc_by(2);
        assert_eq!(sum(600), [(500, Some(Number::Int(2)))], "it was gone");
    }

    #[test]
    fn many_points_are_several_requests_of_bounded_size() {
        let metrics = Metrics::new();
        let calls = IntCounterVec::new(Opts::new("weft_a_calls_total", "Calls."), &["service"]).unwrap();
        let calls = metrics.add(calls).unwrap();
        let wanted = POINTS_MAX * 2 + 1;
        for at in 0..wanted {
            calls.with_label_values(&[at.to_string().as_str()]).inc();
        }
        let requests = requests(&origin(), &metrics.registry().gather(), &mut Starts::new(0), 1);
        let points: Vec<usize> = requests
            .iter()
            .map(|one| {
                let of = |metric: &MetricMessage| match &metric.data {
                    Some(Data::Sum(sum)) => sum.data_points.len(),
                    _ => 0,
                };
                one.resource_metrics[0].scope_metrics[0].metrics.iter().map(of).sum()
            })
            .collect();
        assert_eq!(points, [POINTS_MAX, POINTS_MAX, 1]);
    }

    #[test]
    fn every_name_leads_back_to_its_metric_and_to_no_other() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = std::fs::read_to_string(root.join("api/metrics.md")).unwrap();
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `weft_"));
        let (mut names, mut count) = (BTreeSet::new(), 0);
        for family in rows.filter_map(|row| row.split('`').next()).map(|name| format!("weft_{name}")) {
            count += 1;
            let made = name(&family, &[]);
            assert!(names.insert(made.clone()), "{family} and another are both {made}");
            if family == HTTP_DURATION {
                continue;
            }
            // As OpenTelemetry's specification translates to Prometheus.
            let mut back = made.replace('.', "_");
            if let Some((end, _)) = unit(&family)
                && !back.ends_with(end)
            {
                back.push_str(end);
            }
            if family.ends_with("_total") {
                back.push_str("_total");
            }
            assert_eq!(back, family);
        }
        assert!(count > 100, "found only {count} metrics");
    }
}

//! `weft top`: what passes between services, from two looks at the agent's metrics.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;

use weft::clock;
use weft::config::parse_duration;

use crate::cli::TopArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::table;

const HEADER: [&str; 8] = ["Source", "Destination", "Side", "Req/s", "Failed/s", "p50", "p99", "kB/s"];

/// What one pair of services did, as counters.
#[derive(Debug, Clone, Default, PartialEq)]
struct Counters {
    /// HTTP requests and TCP connections that ended.
    ended: f64,
    /// Those that did not end well: a flag other than `-`, or a 5xx.
    failed: f64,
    /// Bytes of TCP connections, both ways.
    bytes: f64,
    /// Requests by the upper bound of their time in seconds, ascending and cumulative.
    buckets: Vec<(f64, f64)>,
}

/// Source, destination, reporter.
type Pair = (String, String, String);

/// Shows rates again and again.
pub(crate) fn top(args: &TopArgs) -> Result<(), Failure> {
    let interval = parse_duration(&args.interval).map_err(Failure::text)?;
    if interval.is_zero() {
        return Err(Failure::text("cannot use -interval 0").hint("give a time such as 2s"));
    }
    let client = Client::new(&args.client)?;
    let look = || Ok::<_, Failure>((clock::now(), read(&client.get_text("/v1/agent/metrics?format=prometheus")?)));
    let (mut before_at, mut before) = look()?;
    let mut looks = 0;
    loop {
        std::thread::sleep(interval);
        let (at, now) = look()?;
        if std::io::stdout().is_terminal() {
            // Clears the screen, goes to its corner (ECMA-48).
            print!("\x1b[2J\x1b[H");
        }
        let seconds = (at - before_at).as_secs_f64().max(f64::EPSILON);
        let rows: Vec<[String; 8]> = now.iter().map(|(pair, now)| row(pair, now, before.get(pair), seconds)).collect();
        table::show(args.output.format, HEADER, &rows);
        (before_at, before) = (at, now);
        looks += 1;
        if looks == args.count {
            return Ok(());
        }
    }
}

fn row(pair: &Pair, now: &Counters, before: Option<&Counters>, seconds: f64) -> [String; 8] {
    let none = Counters::default();
    let before = before.unwrap_or(&none);
    // A counter that went back began anew with its agent.
    let since = |now: f64, before: f64| if now < before { now } else { now - before };
    let rate = |now: f64, before: f64| format!("{:.1}", since(now, before) / seconds);
    let buckets: Vec<(f64, f64)> = now
        .buckets
        .iter()
        .map(|(bound, count)| {
            let earlier = before
                .buckets
                .iter()
                .find(|(other, _)| other.total_cmp(bound).is_eq())
                .map_or(0.0, |(_, count)| *count);
            (*bound, since(*count, earlier))
        })
        .collect();
    let (source, destination, side) = pair.clone();
    [
        source,
        destination,
        side,
        rate(now.ended, before.ended),
        rate(now.failed, before.failed),
        quantile(&buckets, 0.5),
        quantile(&buckets, 0.99),
        format!("{:.1}", since(now.bytes, before.bytes) / seconds / 1e3),
    ]
}

/// The bound below which the part `q` of the requests lies; empty where there were none.
fn quantile(buckets: &[(f64, f64)], q: f64) -> String {
    let Some((_, all)) = buckets.last().filter(|(_, all)| *all > 0.0) else { return String::new() };
    match buckets.iter().find(|(_, count)| *count >= q * all) {
        Some((bound, _)) if bound.is_finite() => format!("<{:.1}ms", bound * 1e3),
        _ => "above".to_owned(),
    }
}

/// Reads the Prometheus text format, of it the calls.
fn read(text: &str) -> BTreeMap<Pair, Counters> {
    let mut pairs: BTreeMap<Pair, Counters> = BTreeMap::new();
    for line in text.lines() {
        let Some((name, labels, value)) = sample(line) else { continue };
        let label = |key: &str| labels.iter().find(|(name, _)| *name == key).map_or("", |(_, value)| *value);
        let wanted = [
            "weft_http_requests_total",
            "weft_http_request_duration_seconds_bucket",
            "weft_tcp_connections_closed_total",
            "weft_tcp_sent_bytes_total",
            "weft_tcp_received_bytes_total",
        ];
        if !wanted.contains(&name) {
            continue;
        }
        let pair = ["source_service", "destination_service", "reporter"].map(|key| label(key).to_owned());
        let counters = pairs.entry(pair.into()).or_default();
        match name {
            "weft_tcp_sent_bytes_total" | "weft_tcp_received_bytes_total" => counters.bytes += value,
            "weft_http_request_duration_seconds_bucket" => {
                // Rust reads `+Inf` as Prometheus writes it.
                let Ok(bound) = label("le").parse::<f64>() else { continue };
                let place = counters.buckets.partition_point(|(other, _)| *other < bound);
                match counters.buckets.get_mut(place) {
                    Some((other, count)) if other.total_cmp(&bound).is_eq() => *count += value,
                    _ => counters.buckets.insert(place, (bound, value)),
                }
            }
            _ => {
                counters.ended += value;
                if label("response_flags") != "-" || label("response_code").starts_with('5') {
                    counters.failed += value;
                }
            }
        }
    }
    pairs
}

/// Names and values of labels.
type Labels<'a> = Vec<(&'a str, &'a str)>;

/// Cuts `name{key="value",…} number`; names of services hold no quotes.
fn sample(line: &str) -> Option<(&str, Labels<'_>, f64)> {
    let (name, rest) = line.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    let pairs = labels.split("\",").filter_map(|pair| pair.trim_end_matches('"').split_once("=\""));
    Some((name, pairs.collect(), value.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "\
# TYPE weft_http_requests_total counter
weft_http_requests_total{destination_service=\"web\",reporter=\"source\",response_code=\"200\",response_flags=\"-\",source_service=\"api\"} 10
weft_http_requests_total{destination_service=\"web\",reporter=\"source\",response_code=\"503\",response_flags=\"UH\",source_service=\"api\"} 2
weft_http_request_duration_seconds_bucket{destination_service=\"web\",reporter=\"source\",source_service=\"api\",le=\"0.001\"} 6
weft_http_request_duration_seconds_bucket{destination_service=\"web\",reporter=\"source\",source_service=\"api\",le=\"0.01\"} 12
weft_http_request_duration_seconds_bucket{destination_service=\"web\",reporter=\"source\",source_service=\"api\",le=\"+Inf\"} 12
weft_tcp_sent_bytes_total{destination_service=\"db\",reporter=\"destination\",source_service=\"api\"} 4000
weft_proxy_panics_total 0
";

    #[test]
    fn two_looks_give_rates_and_times() {
        let before = read(FIRST);
        let now =
            read(&FIRST.replace("} 10\n", "} 110\n").replace("} 12\n", "} 112\n").replace("} 4000\n", "} 24000\n"));
        let rows: Vec<[String; 8]> = now.iter().map(|(pair, now)| row(pair, now, before.get(pair), 10.0)).collect();
        assert_eq!(rows[0], ["api", "db", "destination", "0.0", "0.0", "", "", "2.0"]);
        assert_eq!(rows[1], ["api", "web", "source", "10.0", "0.0", "<10.0ms", "<10.0ms", "0.0"]);
    }

    #[test]
    fn an_agent_that_began_anew_counts_from_nothing() {
        let now = read(FIRST);
        let mut before = now.clone();
        for counters in before.values_mut() {
            counters.ended += 1e6;
        }
        let pair = now.keys().find(|pair| pair.1 == "web").unwrap();
        assert_eq!(row(pair, &now[pair], before.get(pair), 1.0)[3], "12.0");
    }
}

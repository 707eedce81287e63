//! `weft top`: what passes between services, from two looks at the agent's metrics.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;

use weft::clock;
use weft::config::parse_duration;

use crate::cli::TopArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::{output, table};

const HEADER: [&str; 8] = ["Source", "Destination", "Side", "Req/s", "Failed/s", "p50", "p99", "kB/s"];

/// What one pair of services did between two looks.
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
        let pairs = between(&before, &now);
        let rows: Vec<[String; 8]> = pairs.iter().map(|(pair, counters)| row(pair, counters, seconds)).collect();
        table::show(args.output.format, HEADER, &rows);
        (before_at, before) = (at, now);
        looks += 1;
        if looks == args.count || output::has_no_reader() {
            return Ok(());
        }
    }
}

fn row(pair: &Pair, counters: &Counters, seconds: f64) -> [String; 8] {
    let rate = |count: f64| format!("{:.1}", count / seconds);
    let (source, destination, side) = pair.clone();
    [
        source,
        destination,
        side,
        rate(counters.ended),
        rate(counters.failed),
        quantile(&counters.buckets, 0.5),
        quantile(&counters.buckets, 0.99),
        format!("{:.1}", counters.bytes / seconds / 1e3),
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

/// Counters by name and labels, as they are written.
type Series = BTreeMap<String, f64>;

/// Reads the Prometheus text format, of it what counts calls.
fn read(text: &str) -> Series {
    const WANTED: [&str; 5] = [
        "weft_http_requests_total",
        "weft_http_request_duration_seconds_bucket",
        "weft_tcp_connections_closed_total",
        "weft_tcp_sent_bytes_total",
        "weft_tcp_received_bytes_total",
    ];
    let lines = text.lines().filter(|line| line.split_once('{').is_some_and(|(name, _)| WANTED.contains(&name)));
    let pairs = lines.filter_map(|line| line.rsplit_once(' '));
    pairs.filter_map(|(series, value)| Some((series.to_owned(), value.parse().ok()?))).collect()
}

/// What each pair did from `before` to `now`. Series by series: one that counts less than before began anew, with its agent
/// or because nothing had happened for long, and the others of its pair did not.
fn between(before: &Series, now: &Series) -> BTreeMap<Pair, Counters> {
    let mut pairs: BTreeMap<Pair, Counters> = BTreeMap::new();
    for (series, now) in now {
        let Some((name, labels)) = sample(series) else { continue };
        let label = |key: &str| labels.iter().find(|(name, _)| *name == key).map_or("", |(_, value)| *value);
        let earlier = before.get(series).filter(|earlier| *earlier <= now);
        let value = now - earlier.unwrap_or(&0.0);
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

/// Cuts `name{key="value",…}`; names of services hold no quotes.
fn sample(series: &str) -> Option<(&str, Labels<'_>)> {
    let (name, labels) = series.strip_suffix('}')?.split_once('{')?;
    let pairs = labels.split("\",").filter_map(|pair| pair.trim_end_matches('"').split_once("=\""));
    Some((name, pairs.collect()))
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
        let pairs = between(&before, &now);
        let rows: Vec<[String; 8]> = pairs.iter().map(|(pair, counters)| row(pair, counters, 10.0)).collect();
        assert_eq!(rows[0], ["api", "db", "destination", "0.0", "0.0", "", "", "2.0"]);
        assert_eq!(rows[1], ["api", "web", "source", "10.0", "0.0", "<10.0ms", "<10.0ms", "0.0"]);
    }

    #[test]
    fn what_began_anew_counts_from_nothing_and_what_expired_beside_it_does_not() {
        let now = read(FIRST);
        let ended = |before: &Series| {
            let pairs = between(before, &now);
            let (pair, counters) = pairs.iter().find(|(pair, _)| pair.1 == "web").unwrap();
            row(pair, counters, 1.0)[3].clone()
        };
        // The agent began anew.
        let before = read(&FIRST.replace("} 10\n", "} 1000\n").replace("} 2\n", "} 1000\n"));
        assert_eq!(ended(&before), "12.0");
        // Another outcome of the pair was idle for long.
        let expired = FIRST.replace("} 2\n", "} 2\nweft_http_requests_total{destination_service=\"web\",reporter=\"source\",response_code=\"502\",response_flags=\"UF\",source_service=\"api\"} 1000\n");
        assert_eq!(ended(&read(&expired)), "0.0");
    }
}

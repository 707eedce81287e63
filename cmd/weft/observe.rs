//! The verbs that follow a mesh: `event`, `monitor`, `rtt`, `debug`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;
use weft::clock;
use weft::config::parse_duration;

use crate::cli::{DebugArgs, EventArgs, MonitorArgs, RttArgs};
use crate::client::{Client, segment};
use crate::failure::Failure;
use crate::output;

/// What `weft debug` asks for, and the file that keeps it.
const COLLECTED: [(&str, &str); 12] = [
    ("/v1/agent/self", "self.json"),
    ("/v1/mesh/info", "info.json"),
    ("/v1/mesh/members", "members.json"),
    ("/v1/agent/services", "services.json"),
    ("/v1/agent/checks", "checks.json"),
    ("/v1/catalog/nodes", "nodes.json"),
    ("/v1/catalog/services", "catalog.json"),
    ("/v1/health/state/any", "health.json"),
    ("/v1/connect/intentions", "intentions.json"),
    ("/v1/mesh/documents", "documents.json"),
    ("/v1/mesh/certificates", "certificates.json"),
    ("/v1/status/leader", "leader.json"),
];

/// `weft event`
pub(crate) fn event(args: &EventArgs) -> Result<(), Failure> {
    if args.name.is_empty() {
        return Err(Failure::text("an event needs a name").hint("give -name=NAME"));
    }
    let limits = [("node", &args.node), ("service", &args.service), ("tag", &args.tag)];
    let limits = limits.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", segment(value.as_ref()?))));
    let limits = limits.collect::<Vec<String>>().join("&");
    let path = format!("/v1/event/fire/{}?{limits}", segment(&args.name));
    let path = path.trim_end_matches('?');
    let fired = Client::new(&args.client)?.put_bytes(path, args.payload.as_deref().unwrap_or_default())?;
    println!("Event ID: {}", fired.get("ID").and_then(Value::as_str).unwrap_or("?"));
    Ok(())
}

/// `weft monitor`
pub(crate) fn monitor(args: &MonitorArgs) -> Result<(), Failure> {
    let path = monitor_path(&args.log_level, args.log_json);
    let followed = Client::new(&args.client)?.stream(&path, None, output::pass_on);
    // Who reads no more has seen enough.
    if output::has_no_reader() { Ok(()) } else { followed }
}

fn monitor_path(level: &str, json: bool) -> String {
    format!("/v1/agent/monitor?loglevel={}{}", segment(level), if json { "&logjson=true" } else { "" })
}

/// `weft rtt`
pub(crate) fn rtt(args: &RttArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    let other_name = args.other.clone().map_or_else(|| own_name(&client), Ok)?;
    let nodes = client.get("/v1/coordinate/nodes")?;
    let find = |name: &str| {
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|node| node.get("Node").and_then(Value::as_str) == Some(name));
        node.and_then(Coordinate::parse).ok_or_else(|| {
            Failure::text(format!("there is no coordinate of node `{name}`"))
                .hint("`weft members` names the nodes; a coordinate takes some seconds after a node joined")
        })
    };
    let (node, other) = (find(&args.node)?, find(&other_name)?);
    let (mut seconds, mut way) = (node.seconds_to(&other), String::new());
    // A weft agent's coordinates are a star with itself in the middle: they are true of what ends there.
    if args.other.is_some() && node.is_of_a_star() && other.is_of_a_star() {
        let own = own_name(&client)?;
        if own != args.node && own != other_name {
            let there = measured(&client, &args.node, &other_name)?;
            let either =
                there.map_or_else(|| measured(&client, &other_name, &args.node), |seconds| Ok(Some(seconds)))?;
            match either {
                Some(between) => seconds = between,
                None => way = format!(" by way of {own}"),
            }
        }
    }
    println!("Estimated {} <-> {other_name} rtt{way}: {:.3} ms", args.node, seconds * 1e3);
    Ok(())
}

/// Returns the name of the asked agent's node.
fn own_name(client: &Client) -> Result<String, Failure> {
    let own = client.get("/v1/agent/self")?;
    Ok(own.pointer("/Config/NodeName").and_then(Value::as_str).unwrap_or_default().to_owned())
}

/// Returns the round trip that the agent of one node measured to another, in seconds; none: it does not answer, or has no
/// connection to that one.
fn measured(client: &Client, from: &str, to: &str) -> Result<Option<f64>, Failure> {
    let told = client.get(&format!("/v1/mesh/round-trips?from={}", segment(from)))?;
    Ok(told.get("Seconds").and_then(|seconds| seconds.get(to)?.as_f64()))
}

/// A network coordinate (Vivaldi with heights, as serf has them); times in seconds.
#[derive(Debug)]
struct Coordinate {
    vec: Vec<f64>,
    height: f64,
    adjustment: f64,
}

impl Coordinate {
    fn parse(node: &Value) -> Option<Self> {
        let coord = node.get("Coord")?;
        let number = |key: &str| coord.get(key).and_then(Value::as_f64);
        let vec = coord.get("Vec")?.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>()?;
        Some(Self { vec, height: number("Height")?, adjustment: number("Adjustment")? })
    }

    /// Tells whether all of it is its height, as of weft's coordinates.
    fn is_of_a_star(&self) -> bool {
        self.adjustment == 0.0 && self.vec.iter().all(|part| *part == 0.0)
    }

    /// The estimated round trip; the adjustments count unless they make it negative.
    fn seconds_to(&self, other: &Self) -> f64 {
        let squares: f64 = self.vec.iter().zip(&other.vec).map(|(a, b)| (a - b) * (a - b)).sum();
        let distance = squares.sqrt() + self.height + other.height;
        let adjusted = distance + self.adjustment + other.adjustment;
        if adjusted > 0.0 { adjusted } else { distance }
    }
}

/// `weft debug`
pub(crate) fn debug(args: &DebugArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    let duration = parse_duration(&args.duration).map_err(Failure::text)?;
    // Without an agent there is nothing to collect, and no directory is made.
    client.get("/v1/agent/self")?;
    let named = || PathBuf::from(format!("weft-debug-{}", clock::wall().0));
    let dir = args.output.clone().unwrap_or_else(named);
    fs::create_dir(&dir).with_context(|| format!("cannot make {}; give another -output", dir.display()))?;
    let mut missing = Vec::new();
    let mut keep = |file: &str, text: Result<String, Failure>| match text {
        Ok(text) => write(&dir, file, text.as_bytes()),
        Err(failure) => {
            missing.push(format!("{file}: {failure}\n"));
            Ok(())
        }
    };
    for (path, file) in COLLECTED {
        keep(file, client.get(path).map(|value| format!("{value:#}\n")))?;
    }
    keep("metrics-first.txt", client.get_text("/v1/agent/metrics?format=prometheus"))?;
    let mut log = Vec::new();
    let begun = clock::now();
    let followed = client.stream(&monitor_path("debug", false), Some(duration), |piece| {
        log.extend_from_slice(piece);
        Ok(())
    });
    // Where there is no log to follow, the metrics still get their time.
    std::thread::sleep(duration.saturating_sub(clock::now() - begun));
    keep("log.txt", followed.map(|()| String::from_utf8_lossy(&log).into_owned()))?;
    keep("metrics-last.txt", client.get_text("/v1/agent/metrics?format=prometheus"))?;
    if !missing.is_empty() {
        write(&dir, "missing.txt", missing.concat().as_bytes())?;
        eprintln!("warning: {} of the parts could not be had: {}", missing.len(), dir.join("missing.txt").display());
    }
    println!("Wrote {}.", dir.display());
    Ok(())
}

fn write(dir: &Path, file: &str, bytes: &[u8]) -> Result<(), Failure> {
    let path = dir.join(file);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_round_trip_of_two_coordinates_is_serf_s() {
        #[track_caller]
        fn check(a: &Value, b: &Value, want: f64) {
            let [a, b] = [a, b].map(|coord| Coordinate::parse(&json!({"Coord": coord})).unwrap());
            assert!((a.seconds_to(&b) - want).abs() < 1e-9, "{}", a.seconds_to(&b));
        }
        let at =
            |x: f64, height: f64, adjustment: f64| json!({"Vec": [x, 0.0], "Height": height, "Adjustment": adjustment});
        check(&at(0.003, 0.001, 0.0), &at(0.007, 0.002, 0.0), 0.007);
        check(&at(0.003, 0.001, 0.0005), &at(0.007, 0.002, 0.0005), 0.008);
        check(&at(0.0, 0.001, -0.5), &at(0.0, 0.001, 0.0), 0.002);
        assert!(Coordinate::parse(&json!({"Coord": {"Vec": ["x"]}})).is_none());
    }
}

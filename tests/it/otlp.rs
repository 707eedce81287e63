//! Spans and metrics of real agents at a foreign collector, which decodes them with the official messages of PyPI's
//! `opentelemetry-proto` (`tests/clients/install.sh`; see `clients` for what happens where it is missing).

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path};
use crate::app::App;
use crate::clients::{Running, found, installed};
use crate::http::Answer;
use crate::netns_policy::metric;
use crate::wait::{until, until_within};

const COLLECTOR: u16 = 4318;
const WEB: u16 = 7900;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";
/// The secret that is sent along.
const KEY: &str = "hush-4711";

/// Two agents that export to a collector: `n2` serves `web`, `n1` calls it.
struct Exporting {
    _ca: Ca,
    files: TempDir,
    python: PathBuf,
    n1: Agent,
    n2: Agent,
    _app: App,
    /// The collector's address: the loopback address before the agents'.
    last: u8,
}

impl Exporting {
    #[track_caller]
    fn start(last: u8) -> Option<Self> {
        let has_messages = |python: &PathBuf| {
            let import = Command::new(python).args(["-c", "import opentelemetry.proto.trace.v1.trace_pb2"]).output();
            import.is_ok_and(|out| out.status.success())
        };
        let python = installed("py/bin/python3").filter(has_messages);
        let [python] = found("opentelemetry-proto", [python])?;
        let (ca, files) = (Ca::init("otlp.test"), TempDir::new().unwrap());
        let config = files.path().join("otlp.hcl");
        let endpoint = format!("http://{}:{COLLECTOR}", loopback_ip(last));
        let text = format!(
            "telemetry {{\n  otlp {{\n    endpoint = \"{endpoint}\"\n    interval = \"1s\"\n    headers {{\n      x-key = \"{KEY}\"\n    }}\n  }}\n}}\n"
        );
        fs::write(&config, text).unwrap();
        let with = ["-config-file", path(&config)];
        let n1 = Agent::start(&Spec::loopback(last + 1, "n1", &[&["-issuer", path(&ca.issuer())][..], &with].concat()));
        let (token, seed) = (ca.token("n2", "*", "1h"), loopback_ip(last + 1).to_string());
        let n2 =
            Agent::start(&Spec::loopback(last + 2, "n2", &[&["-join", &seed, "-token", &token][..], &with].concat()));
        n1.wait_members(&["n1=1", "n2=1"]);
        let app = App::heads(None, SocketAddr::new(loopback_ip(last + 2), WEB));
        let web = json!({"Name": "web", "Address": loopback_ip(last + 2).to_string(), "Port": WEB, "Protocol": "http"});
        n2.put_ok("/v1/agent/service/register", &web.to_string());
        let upstream = json!({"DestinationName": "web", "LocalBindAddress": loopback_ip(last + 1).to_string(), "LocalBindPort": WEB});
        let caller =
            json!({"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}});
        n1.put_ok("/v1/agent/service/register", &caller.to_string());
        n1.wait_passing("web", &["web"]);
        let this = Self { _ca: ca, files, python, n1, n2, _app: app, last };
        until("web can be called", || match this.try_call(&[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(answer.body),
            Err(why) => Err(why),
        });
        Some(this)
    }

    fn try_call(&self, headers: &[(&str, &str)]) -> Result<Answer, String> {
        let headers = [&[("host", "web")], headers].concat();
        self.n1.call(SocketAddr::new(loopback_ip(self.last + 1), WEB), "GET", "/path?secret=1", &headers, "")
    }

    /// Calls with a trace of its own number; returns how long it took.
    #[track_caller]
    fn call_in_trace(&self, number: u32) -> Duration {
        let begun = Instant::now();
        let parent = format!("00-{number:032x}-{SPAN}-01");
        assert_eq!(self.try_call(&[("traceparent", &parent)]).unwrap().status, 200);
        begun.elapsed()
    }

    /// Says what becomes of the next requests: `take`, `busy`, `hang`.
    fn says(&self, mode: &str) {
        let (new, file) = (self.files.path().join("new"), self.mode_file());
        fs::write(&new, mode).unwrap();
        fs::rename(new, file).unwrap();
    }

    fn mode_file(&self) -> PathBuf {
        self.files.path().join("mode")
    }

    #[track_caller]
    fn collector(&self, mode: &str) -> Running {
        self.says(mode);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/collector.py");
        let (host, port) = (loopback_ip(self.last).to_string(), COLLECTOR.to_string());
        let mode = self.mode_file();
        let args = [path(&script), &host, &port, path(&mode)];
        let mut collector = Running::start(Command::new(&self.python).args(args));
        collector.wait_line("the collector is ready", |line| line == "ready");
        collector
    }
}

fn lines(collector: &Running, signal: &str) -> Vec<Value> {
    let printed = collector.printed();
    let told = printed.iter().filter(|line| *line != "ready");
    // A line that were left out would look like a span that was lost.
    let values = told.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")));
    values.filter(|value: &Value| value["signal"] == signal).collect()
}

fn span_of<'s>(spans: &'s [Value], node: &str) -> Result<&'s Value, String> {
    let found = spans.iter().find(|span| span["trace"] == TRACE && span["resource"]["weft.node"] == node);
    found.ok_or_else(|| format!("none of {node} in {spans:?}"))
}

#[track_caller]
fn check(value: &Value, want: &Value) {
    for (key, want) in want.as_object().unwrap() {
        assert_eq!(&value[key], want, "{key} in {value}");
    }
}

#[test]
fn a_collector_gets_the_spans_of_both_agents_in_one_chain_and_metrics_by_opentelemetry_s_names() {
    let Some(mesh) = Exporting::start(160) else { return };
    let collector = mesh.collector("take");
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let answer = mesh.try_call(&[("traceparent", &parent), ("tracestate", "a=1")]).unwrap();
    let [source, destination] = until("both spans arrive", || {
        let spans = lines(&collector, "span");
        Ok([span_of(&spans, "n1")?.clone(), span_of(&spans, "n2")?.clone()])
    });
    let id = |span: &Value| span["span"].as_str().unwrap().to_owned();
    // The caller's span, weft's two, the app's: each below the one before it.
    check(
        &source,
        &json!({"parent": SPAN, "kind": 3, "name": "GET web", "state": "a=1", "status": 0, "scope": "weft"}),
    );
    check(&destination, &json!({"parent": id(&source), "kind": 2, "name": "GET web", "state": "a=1", "flags": 0x301}));
    let seen = format!("traceparent: 00-{TRACE}-{}-01", id(&destination));
    assert!(answer.body.contains(&seen) && answer.body.contains("tracestate: a=1"), "{seen} is not in {}", answer.body);
    for span in [&source, &destination] {
        check(
            &span["attributes"],
            &json!({
            "http.request.method": "GET", "url.path": "/path", "url.scheme": "http", "http.response.status_code": 200,
            "network.protocol.version": "1.1", "server.address": "web", "weft.source_service": "caller",
            "weft.destination_service": "web", "weft.response_flags": "-"}),
        );
        check(&span["resource"], &json!({"service.name": "weft", "weft.datacenter": "dc1"}));
        assert!(!span.to_string().contains("secret"), "queries stay here: {span}");
        let (age, took) = (span["age"].as_f64().unwrap(), span["nanoseconds"].as_u64().unwrap());
        assert!((0.0..30.0).contains(&age) && (1..10_000_000_000).contains(&took), "{span}");
    }
    assert!(source["nanoseconds"].as_u64() > destination["nanoseconds"].as_u64(), "one lies within the other");

    for (node, name) in [("n1", "http.client.request.duration"), ("n2", "http.server.request.duration")] {
        let point = until(&format!("{name} of {node} arrives"), || {
            let points = lines(&collector, "point");
            let is_it = |point: &&Value| {
                point["name"] == name
                    && point["resource"]["weft.node"] == node
                    && point["attributes"]["http.response.status_code"] == 200
                    && point["value"].as_u64() > Some(1)
            };
            points.iter().rev().find(is_it).cloned().ok_or_else(|| format!("{} points", points.len()))
        });
        check(&point, &json!({"unit": "s", "kind": "histogram", "temporality": 2}));
        check(&point["attributes"], &json!({"server.address": "web", "weft.connection_security": "mutual_tls"}));
        let counts: u64 = point["counts"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
        assert_eq!(Some(counts), point["value"].as_u64(), "{point}");
        assert_eq!(point["counts"].as_array().unwrap().len(), point["bounds"].as_array().unwrap().len() + 1);
        let (sum, seconds) = (point["sum"].as_f64().unwrap(), point["seconds"].as_f64().unwrap());
        assert!((0.0..30.0).contains(&sum) && sum > 0.0 && (0.0..60.0).contains(&seconds), "{point}");
    }
    // The collector prints point by point: the rest of an export may be on its way.
    let first = |what: &str, is_it: &dyn Fn(&Value) -> bool| {
        until(&format!("{what} arrive"), || {
            let points = lines(&collector, "point");
            points.iter().find(|point| is_it(point)).cloned().ok_or_else(|| format!("{} points", points.len()))
        })
    };
    let sent = first("gossip's bytes", &|point| point["name"] == "weft.gossip.sent");
    check(&sent, &json!({"unit": "By", "kind": "sum", "temporality": 2}));
    let members = first("members", &|point| {
        point["name"] == "weft.membership.members" && point["attributes"] == json!({"weft.status": "alive"})
    });
    check(&members, &json!({"kind": "gauge", "value": 2.0}));
    assert!(lines(&collector, "request").iter().all(|request| request["key"] == KEY));
    for agent in [&mesh.n1, &mesh.n2] {
        assert!(!agent.log().contains(KEY), "a header is a secret:\n{}", agent.log());
    }
}

#[test]
fn a_collector_that_is_down_busy_or_silent_loses_no_span_and_slows_no_request() {
    const EACH: u32 = 40;
    let Some(mesh) = Exporting::start(164) else { return };
    let mut slowest = Duration::ZERO;
    let mut number = 0;
    let mut call_many = || {
        for _ in 0..EACH {
            number += 1;
            slowest = slowest.max(mesh.call_in_trace(number));
        }
    };
    // Nobody listens.
    call_many();
    until("the agents say so", || {
        let log = mesh.n1.log();
        if log.contains("does not take telemetry") { Ok(()) } else { Err(log) }
    });
    let collector = mesh.collector("busy");
    call_many();
    let asked = |mode: &'static str| {
        until(&format!("a collector that is {mode} is asked"), || {
            let requests = lines(&collector, "request");
            let met = requests.iter().filter(|one| one["mode"] == mode && one["path"] == "/v1/traces").count();
            if met >= 2 { Ok(()) } else { Err(format!("{requests:?}")) }
        });
    };
    asked("busy");
    mesh.says("hang");
    asked("hang");
    call_many();
    mesh.says("take");
    // An exchange that hangs is given up after 10 s.
    until_within(Duration::from_secs(60), "every span arrives", || {
        let spans = lines(&collector, "span");
        let of = |span: &Value| (span["trace"].to_string(), span["resource"]["weft.node"].to_string());
        let met: BTreeSet<(String, String)> = spans.iter().map(of).collect();
        if met.len() == 2 * 3 * EACH as usize { Ok(()) } else { Err(format!("{} of {}", met.len(), 6 * EACH)) }
    });
    assert!(slowest < Duration::from_secs(1), "a request took {slowest:?}");
    for agent in [&mesh.n1, &mesh.n2] {
        for reason in ["queue_full", "refused", "stopped"] {
            let dropped = metric(agent, &format!("weft_otlp_dropped_spans_total{{reason=\"{reason}\"}}"));
            assert!(dropped < 1.0, "{dropped} spans: {reason}");
        }
        until("both signals pass again", || {
            let log = agent.log();
            if log.matches("takes telemetry again").count() >= 2 { Ok(()) } else { Err(log) }
        });
        // Once per signal, however often it failed.
        let log = agent.log();
        assert_eq!(log.matches("does not take telemetry").count(), 2, "{log}");
        assert_eq!(log.matches("takes telemetry again").count(), 2, "{log}");
    }
}

//! Consul's clients, unmodified, against real agents: PyPI `py-consul`, npm `consul` with its `watch`, crates.io `rs-consul`, the
//! discovery of VictoriaMetrics (`consul_sd_configs`, as Prometheus has it), HAProxy's `server-template … resolvers`, nginx's `resolver`. `tests/clients/install.sh`
//! installs the first three beside the build, Debian has the others. Where one is missing its test says so, and fails if
//! `WEFT_REQUIRE_CLIENTS=1` (as .ci/run sets it). unbound and dnsmasq are in `dns`.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path, weft_ok};
use crate::app::App;
use crate::http::request;
use crate::wait::{PATIENCE, until, until_within};

/// Where `tests/clients/install.sh` put the clients, if it was run: beside the build, or where `WEFT_CLIENTS` says.
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().map(|target| target.join("clients"));
    let dir = std::env::var_os("WEFT_CLIENTS").map(PathBuf::from).or(beside)?;
    Some(dir.join(name)).filter(|path| path.exists())
}

/// A program of the system.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let dirs = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];
    dirs.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists())
}

/// Passes on what was found; says what is missing otherwise.
#[track_caller]
pub(crate) fn found<const N: usize>(what: &str, paths: [Option<PathBuf>; N]) -> Option<[PathBuf; N]> {
    if paths.iter().all(Option::is_some) {
        return Some(paths.map(Option::unwrap));
    }
    let required = std::env::var_os("WEFT_REQUIRE_CLIENTS").is_some_and(|v| v == "1");
    assert!(!required, "WEFT_REQUIRE_CLIENTS=1 and {what} is not installed");
    eprintln!("SKIPPED: {what} is not installed (tests/clients/install.sh, or Debian's package)");
    None
}

/// A client that runs until it ends or is dropped, and the lines that it printed on either stream.
pub(crate) struct Running {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Running {
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let streams: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let kept = Arc::clone(&lines);
            thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    kept.lock().unwrap().push(line);
                }
            });
        }
        Self { child, lines }
    }

    pub(crate) fn printed(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Waits for a line that `is_it` takes, beginning with the newest; the client must run on, or have ended well.
    #[track_caller]
    pub(crate) fn wait_line(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        self.wait_line_within(PATIENCE, what, is_it)
    }

    /// The same, for what takes longer than one step.
    #[track_caller]
    pub(crate) fn wait_line_within(&mut self, patience: Duration, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        until_within(patience, what, || {
            let printed = self.printed();
            if let Some(line) = printed.iter().rev().find(|line| is_it(line)) {
                return Ok(line.clone());
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "the client failed:\n{}", self.printed().join("\n"));
            }
            Err(printed.join("\n"))
        })
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    pub(crate) fn wait_end(&mut self) {
        let status = until("the client ends", || match self.child.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err(self.printed().join("\n")),
        });
        assert!(status.success(), "the client failed:\n{}", self.printed().join("\n"));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _already_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A client's part of the run: tells how long it took, and fails a test that took longer than [`PART_MAX`].
struct Part(Instant);

/// Installing and running all clients has 15 minutes: two tests run at a time, and each takes some seconds.
const PART_MAX: Duration = Duration::from_mins(2);

impl Drop for Part {
    fn drop(&mut self) {
        let took = self.0.elapsed();
        // Past the harness, which keeps what a good test prints to itself.
        let _lost =
            writeln!(std::io::stderr(), "{} took {:.1} s", thread::current().name().unwrap_or("?"), took.as_secs_f64());
        assert!(took < PART_MAX || thread::panicking(), "it took {took:?}, and {PART_MAX:?} is the limit");
    }
}

/// Two agents of one mesh, on this run's addresses `last` and the next.
struct Pair {
    _part: Part,
    _ca: Ca,
    _files: TempDir,
    first: Agent,
    second: Agent,
}

impl Pair {
    #[track_caller]
    fn start(last: u8) -> Self {
        let part = Part(Instant::now());
        let (ca, files) = (Ca::init("clients.test"), TempDir::new().unwrap());
        let kv = files.path().join("kv.hcl");
        fs::write(&kv, "kv { enabled = true }\n").unwrap();
        let with_kv = ["-config-file", path(&kv)];
        let first =
            Agent::start(&Spec::loopback(last, "n1", &[&["-issuer", path(&ca.issuer())][..], &with_kv].concat()));
        let token = ca.token("n2", "*", "1h");
        let seed = loopback_ip(last).to_string();
        let second = Agent::start(&Spec::loopback(
            last + 1,
            "n2",
            &[&["-join", &seed, "-token", &token][..], &with_kv].concat(),
        ));
        for agent in [&first, &second] {
            agent.wait_members(&["n1=1", "n2=1"]);
            agent.wait_nodes(&["n1", "n2"]);
        }
        Self { _part: part, _ca: ca, _files: files, first, second }
    }

    fn addresses(&self) -> [String; 2] {
        [self.first.api.ip().to_string(), self.second.api.ip().to_string()]
    }
}

/// Runs a client that registers, watches, and asks for the second agent to be killed.
#[track_caller]
fn drill(pair: Pair, client: &mut Command) {
    let mut client = Running::start(client.args(pair.addresses()));
    // A dozen steps, each of which has its own patience: a client that misses one ends with an error.
    client
        .wait_line_within(10 * PATIENCE, "the client asks to kill the second agent", |line| line == "kill the second");
    pair.second.kill();
    client.wait_line("the client saw it", |line| line == "done");
    client.wait_end();
}

#[test]
fn py_consul_registers_watches_and_fails_over() {
    let Some([python]) = found("py-consul", [installed("py/bin/python3")]) else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/py_consul.py");
    drill(Pair::start(200), Command::new(python).arg(script));
}

#[test]
fn npm_consul_registers_watches_and_fails_over() {
    let Some([node, module]) = found("npm's consul", [program("node"), installed("npm/node_modules/consul")]) else {
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/watch.js");
    drill(Pair::start(202), Command::new(node).arg(script).arg(module));
}

#[test]
fn rs_consul_watches_what_the_command_line_registers_and_fails_over() {
    let Some([client]) = found("rs-consul", [installed("rs/debug/rs_consul_client")]) else { return };
    let pair = Pair::start(204);
    let [one, two] = pair.addresses();
    let register = |agent: &Agent, id: &str, address: &str| {
        let file = agent.dir().join(format!("{id}.json"));
        let check = r#"{"ttl": "1h", "status": "passing"}"#;
        let text = format!(
            r#"{{"service": {{"name": "web", "id": "{id}", "address": "{address}", "port": 80, "check": {check}}}}}"#
        );
        fs::write(&file, text).unwrap();
        weft_ok(&["services", "register", &format!("-http-addr={}", agent.api), path(&file)]);
    };
    let mut client = Running::start(Command::new(client).arg(format!("http://{}", pair.first.api)).arg("web"));
    client.wait_line("two nodes", |line| line == "nodes 2");
    client.wait_line("no instance", |line| line == "1 ");
    register(&pair.first, "web-1", &one);
    client.wait_line("one instance", |line| line.ends_with(&format!(" web-1@{one}:80")));
    register(&pair.second, "web-2", &two);
    let both = format!(" web-1@{one}:80 web-2@{two}:80");
    client.wait_line("both instances", |line| line.ends_with(&both));
    let seen = client.printed().len();
    pair.second.put_ok("/v1/agent/check/fail/service:web-2", "");
    let newest = |printed: &[String]| printed.iter().skip(seen).cloned().collect::<Vec<String>>();
    until("the failed one is gone", || {
        let new = newest(&client.printed());
        if new.iter().any(|line| line.ends_with(&format!(" web-1@{one}:80"))) { Ok(()) } else { Err(new.join("\n")) }
    });
    pair.second.put_ok("/v1/agent/check/pass/service:web-2", "");
    until("it is back", || match client.printed().last() {
        Some(line) if line.ends_with(&both) => Ok(()),
        line => Err(format!("{line:?}")),
    });
    // The critical are seen without `passing`: rs-consul says `passing=false`.
    pair.first.put_ok("/v1/agent/check/fail/service:web-1", "");
    pair.first.wait_passing("web", &["web-2"]);
    pair.second.kill();
    until("the killed node's instance is gone", || match client.printed().last() {
        Some(line) if line.ends_with(' ') => Ok(()),
        line => Err(format!("{line:?}")),
    });
    let mut again = Running::start(
        Command::new(installed("rs/debug/rs_consul_client").unwrap())
            .arg(format!("http://{}", pair.first.api))
            .arg("web"),
    );
    again.wait_line("both are critical", |line| line == "all 2");
    let queries: u32 = client.printed().last().and_then(|line| line.split(' ').next()?.parse().ok()).unwrap();
    assert!(queries < 40, "it asked in a circle: {queries} queries");
}

#[test]
fn rs_consul_registers_sees_what_it_registered_and_fails_over() {
    let Some([client]) = found("rs-consul", [installed("rs/debug/rs_consul_client")]) else { return };
    let pair = Pair::start(236);
    let at = |agent: &Agent| format!("http://{}", agent.api);
    // rs-consul registers in the catalogue: instances on nodes that no agent runs on, one at each agent.
    let run = |agent: &Agent, words: &[&str]| {
        Running::start(Command::new(&client).arg(at(agent)).arg("db").args(words)).wait_end();
    };
    let mut watch = Running::start(Command::new(&client).arg(at(&pair.second)).arg("db"));
    watch.wait_line("no instance", |line| line == "1 ");
    run(&pair.first, &["write", "db-host-1", "192.0.2.1", "5432", "passing"]);
    watch.wait_line("the first", |line| line.ends_with(" db-1@192.0.2.1:5432"));
    run(&pair.second, &["write", "db-host-2", "192.0.2.2", "5432", "passing"]);
    watch.wait_line("both", |line| line.ends_with(" db-1@192.0.2.1:5432 db-1@192.0.2.2:5432"));
    // The first fails, is back, and goes: each time the other is what is left.
    let newest = |watch: &Running, want: &str| {
        until(&format!("the newest state ends in {want:?}"), || match watch.printed().last() {
            Some(line) if line.split_once(' ').is_some_and(|(_, seen)| seen == want) => Ok(()),
            line => Err(format!("{line:?}")),
        });
    };
    let (one, two) = ("db-1@192.0.2.1:5432", "db-1@192.0.2.2:5432");
    run(&pair.first, &["write", "db-host-1", "192.0.2.1", "5432", "critical"]);
    newest(&watch, two);
    run(&pair.first, &["write", "db-host-1", "192.0.2.1", "5432", "passing"]);
    newest(&watch, &format!("{one} {two}"));
    run(&pair.second, &["remove", "db-host-2"]);
    newest(&watch, one);
    // An agent that is killed takes what it told of out of service.
    pair.first.kill();
    newest(&watch, "");
}

/// Waits until a front end answers with exactly these apps' names.
#[track_caller]
fn wait_answers(front: SocketAddr, want: &[&str]) {
    until(&format!("{front} leads to {want:?}"), || {
        let mut seen = Vec::new();
        // Round robin over a handful of servers: sixteen requests meet each of them.
        for _ in 0..16 {
            let answer = request(front, "GET", "/x", &[], "")?;
            let name = answer.body.split(' ').next().unwrap_or_default().to_owned();
            seen.push(if answer.status == 200 { name } else { answer.status.to_string() });
        }
        seen.sort();
        seen.dedup();
        if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
    });
}

/// Registers `web` with an app of its own at each agent of the pair: names `one` and `two`, one port.
fn two_apps(pair: &Pair) -> [App; 2] {
    let [one, two] = [&pair.first, &pair.second].map(|agent| agent.api.ip());
    let first = App::http(None, SocketAddr::new(one, 0), "one");
    let second = App::http(None, SocketAddr::new(two, first.addr.port()), "two");
    for (agent, id) in [(&pair.first, "web-1"), (&pair.second, "web-2")] {
        let port = first.addr.port();
        agent.put_ok(
            "/v1/agent/service/register",
            &format!(r#"{{"ID":"{id}","Name":"web","Port":{port},"Check":{{"TTL":"1h","Status":"passing"}}}}"#),
        );
    }
    pair.first.wait_passing("web", &["web-1", "web-2"]);
    [first, second]
}

/// Takes the second instance out and back in, then kills its agent; the front end must follow, on DNS alone.
#[track_caller]
fn follow(pair: Pair, front: SocketAddr) {
    wait_answers(front, &["one", "two"]);
    pair.second.put_ok("/v1/agent/check/fail/service:web-2", "");
    wait_answers(front, &["one"]);
    pair.second.put_ok("/v1/agent/check/pass/service:web-2", "");
    wait_answers(front, &["one", "two"]);
    pair.second.kill();
    wait_answers(front, &["one"]);
}

#[test]
fn haproxy_fills_its_server_template_from_srv_records_and_follows() {
    let Some([haproxy]) = found("haproxy", [program("haproxy")]) else { return };
    let pair = Pair::start(206);
    let _apps = two_apps(&pair);
    let (agent, front) = (pair.first.api.ip(), SocketAddr::new(loopback_ip(208), 8080));
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("haproxy.cfg");
    fs::write(
        &file,
        format!(
            "defaults\n  mode http\n  timeout connect 2s\n  timeout client 20s\n  timeout server 20s\n\
             resolvers weft\n  nameserver agent {agent}:8600\n  accepted_payload_size 8192\n\
             frontend all\n  bind {front}\n  default_backend web\n\
             backend web\n  balance roundrobin\n  server-template web 5 _web._tcp.service.consul resolvers weft init-addr none\n"
        ),
    )
    .unwrap();
    let _haproxy = Running::start(Command::new(haproxy).args(["-db", "-f", path(&file)]));
    follow(pair, front);
}

#[test]
fn nginx_asks_for_the_name_again_and_follows() {
    let Some([nginx]) = found("nginx", [program("nginx")]) else { return };
    let pair = Pair::start(210);
    let [first, _second] = &two_apps(&pair);
    let (agent, front) = (pair.first.api.ip(), SocketAddr::new(loopback_ip(212), 8080));
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("nginx.conf");
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {}/{name};\n", dir.path().display()))
        .concat();
    fs::write(
        &file,
        format!(
            "daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n  access_log off;\n{paths}\
             \n  server {{\n    listen {front};\n    location / {{\n      resolver {agent}:8600 ipv6=off;\n      set $name web.service.consul;\n\
             \n      proxy_pass http://$name:{port};\n    }}\n  }}\n}}\n",
            dir = dir.path().display(),
            port = first.addr.port(),
        ),
    )
    .unwrap();
    let _nginx = Running::start(Command::new(nginx).args(["-p", path(dir.path()), "-e", "stderr", "-c", path(&file)]));
    follow(pair, front);
}

/// The instances that VictoriaMetrics scrapes with success, by their `service_id`.
fn scraped(scraper: SocketAddr) -> Result<Vec<String>, String> {
    let targets = request(scraper, "GET", "/api/v1/targets?state=active", &[], "")?;
    let targets: Value = serde_json::from_str(&targets.body).map_err(|e| e.to_string())?;
    let active = targets["data"]["activeTargets"].as_array().cloned().unwrap_or_default();
    let up = active.iter().filter(|target| target["health"] == "up");
    let mut up: Vec<String> =
        up.map(|target| target["labels"]["service_id"].as_str().unwrap_or("?").to_owned()).collect();
    up.sort();
    Ok(up)
}

#[test]
fn victoria_metrics_scrapes_what_it_discovers_and_follows() {
    let Some([scraper]) = found("victoria-metrics", [program("victoria-metrics")]) else { return };
    let pair = Pair::start(214);
    let at = SocketAddr::new(loopback_ip(216), 9090);
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("scrape.yml");
    // The agents' own metrics are the targets.
    let scrape = format!(
        r"
global: {{ scrape_interval: 1s, scrape_timeout: 1s }}
scrape_configs:
  - job_name: weft
    metrics_path: /v1/agent/metrics
    params: {{ format: [prometheus] }}
    consul_sd_configs:
      - server: {api}
        services: [weft]
        tags: [metrics]
    relabel_configs:
      - {{ source_labels: [__meta_consul_health], regex: passing, action: keep }}
      - {{ source_labels: [__meta_consul_service_id], target_label: service_id }}
      - {{ source_labels: [__meta_consul_service_metadata_team], regex: mesh, action: keep }}
",
        api = pair.first.api
    );
    fs::write(&file, scrape).unwrap();
    let _scraper = Running::start(Command::new(scraper).args([
        format!("-promscrape.config={}", path(&file)),
        "-promscrape.consulSDCheckInterval=1s".to_owned(),
        format!("-storageDataPath={}", dir.path().join("data").display()),
        format!("-httpListenAddr={at}"),
    ]));
    let register = |agent: &Agent, id: &str| {
        let body = format!(
            r#"{{"ID":"{id}","Name":"weft","Port":8500,"Tags":["metrics"],"Meta":{{"team":"mesh"}},"Check":{{"TTL":"1h","Status":"passing"}}}}"#
        );
        agent.put_ok("/v1/agent/service/register", &body);
    };
    let wait = |want: &[&str]| {
        until(&format!("VictoriaMetrics scrapes {want:?}"), || {
            let seen = scraped(at)?;
            if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    };
    register(&pair.first, "weft-1");
    wait(&["weft-1"]);
    register(&pair.second, "weft-2");
    wait(&["weft-1", "weft-2"]);
    pair.second.put_ok("/v1/agent/check/fail/service:weft-2", "");
    wait(&["weft-1"]);
    pair.second.put_ok("/v1/agent/check/pass/service:weft-2", "");
    wait(&["weft-1", "weft-2"]);
    pair.second.kill();
    wait(&["weft-1"]);
    pair.first.put_ok("/v1/agent/service/deregister/weft-1", "");
    wait(&[]);
}

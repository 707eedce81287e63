//! The command line: verbs against a real agent; those whose endpoints are still to come against a stand-in that says what
//! Consul says.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, WEFT, loopback_ip, path, weft, weft_ok};
use crate::clients::Running;
use crate::wait::until;

#[track_caller]
pub(crate) fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in:\n{text}");
    }
}

pub(crate) fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// An issuer of its own on this run's address `last`, with a service `web` and node meta.
#[track_caller]
pub(crate) fn alone(last: u8) -> (Ca, Agent, String) {
    alone_with(last, &[])
}

/// The same with `more` flags.
#[track_caller]
pub(crate) fn alone_with(last: u8, more: &[&str]) -> (Ca, Agent, String) {
    let ca = Ca::init("cli.test");
    let dir = TempDir::new().unwrap();
    let meta = dir.path().join("meta.hcl");
    fs::write(&meta, "node_meta {\n  rack = \"a1\"\n}\n").unwrap();
    let args = ["-issuer", path(&ca.issuer()), "-config-file", path(&meta)].map(str::to_owned);
    let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let agent = Agent::start(&Spec::loopback(last, "n1", &args));
    let check = r#"{"TTL":"1h","Status":"passing"}"#;
    agent.put_ok(
        "/v1/agent/service/register",
        &format!(r#"{{"ID":"web-1","Name":"web","Port":80,"Tags":["v1"],"Check":{check}}}"#),
    );
    agent.wait_passing("web", &["web-1"]);
    let at = format!("-http-addr={}", agent.api);
    (ca, agent, at)
}

/// What a stand-in saw of one request, and its answer.
fn serve_once(stream: &mut (impl std::io::Read + std::io::Write), answer: &str) -> String {
    let mut seen = Vec::new();
    let mut piece = [0; 4096];
    while !seen.windows(4).any(|w| w == b"\r\n\r\n") {
        let read = stream.read(&mut piece).unwrap();
        assert!(read > 0, "the request ended early");
        seen.extend_from_slice(&piece[..read]);
    }
    let text = String::from_utf8_lossy(&seen).into_owned();
    let length = text.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let head = seen.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    while seen.len() < head + length.unwrap_or(0) {
        let read = stream.read(&mut piece).unwrap();
        seen.extend_from_slice(&piece[..read]);
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{answer}", answer.len()).unwrap();
    String::from_utf8_lossy(&seen).into_owned()
}

/// Runs a verb against a stand-in that gives these answers, one a request; returns the output and the requests.
#[track_caller]
fn against(answers: &[&str], words: &[&str]) -> (String, Vec<String>) {
    asked(answers, |at| weft_ok(&[words, &[at]].concat()))
}

/// Runs `run` with the flag that leads to a stand-in as of [`against`]; returns what it made of it, and the requests: fewer
/// than there are answers where it asked for less.
pub(crate) fn asked<R>(answers: &[&str], run: impl FnOnce(&str) -> R) -> (R, Vec<String>) {
    let listener = TcpListener::bind((loopback_ip(230), 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let mut seen = Vec::new();
            for answer in answers {
                let mut stream = listener.accept().unwrap().0;
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                seen.push(serve_once(&mut stream, answer));
            }
            seen
        });
        let over = Over { is_over: &is_over, addr };
        let out = run(&format!("-http-addr={addr}"));
        drop(over);
        (out, seen.join().unwrap())
    })
}

/// Ends a stand-in that may still wait for a request, also where the verb fails the test.
struct Over<'a> {
    is_over: &'a AtomicBool,
    addr: SocketAddr,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.addr));
    }
}

#[test]
fn lists_are_aligned_narrowed_and_the_same_in_json() {
    let (_ca, agent, at) = alone(220);
    let ip = agent.api.ip().to_string();
    let nodes = weft_ok(&["catalog", "nodes", &at]);
    let columns: Vec<usize> = nodes.lines().map(|line| line.find("dc1").or_else(|| line.find("DC")).unwrap()).collect();
    assert_eq!(columns[0], columns[1], "the header stands over its column:\n{nodes}");
    assert_says(&weft_ok(&["catalog", "nodes", "-service=web", &at]), &["n1", &ip]);
    assert!(!weft_ok(&["catalog", "nodes", "-service=nobody", &at]).contains("n1"));
    assert_says(&weft_ok(&["catalog", "nodes", "-node-meta=rack=a1", &at]), &["n1"]);
    assert!(!weft_ok(&["catalog", "nodes", "-node-meta=rack=b2", &at]).contains("n1"));
    assert_eq!(weft_ok(&["catalog", "services", "-node-meta=rack=a1", &at]), "Service  Tags\nweb      v1\n");
    assert_eq!(weft_ok(&["catalog", "datacenters", &at]), "dc1\n");
    assert_eq!(weft_ok(&["catalog", "services", "-datacenter=dc1", &at]), "Service  Tags\nweb      v1\n");
    for words in [&["catalog", "services", "-datacenter=dc9", &at][..], &["catalog", "nodes", "-datacenter=dc9", &at]] {
        assert_says(&stderr(&weft(words)), &["No path to datacenter", "weft catalog datacenters"]);
    }
    let json: serde_json::Value =
        serde_json::from_str(&weft_ok(&["catalog", "services", "-format=json", &at])).unwrap();
    assert_eq!(json, serde_json::json!({"web": ["v1"]}));
    assert_says(&weft_ok(&["info", &at]), &["n1"]);
    assert_says(&weft_ok(&["members", "-status=alive|left", &at]), &["n1"]);
    assert!(!weft_ok(&["members", "-status=failed", &at]).contains("n1"));
    assert_says(&stderr(&weft(&["members", "-status=dead", &at])), &["alive, leaving, left or failed"]);
    assert_says(&stderr(&weft(&["validate", "/nowhere/a"])), &["/nowhere/a", "No such file"]);
    let told = weft(&["services", "register", "-name=hollow", "-protocol=http", &at]);
    assert_says(&stderr(&told), &["Port is not given: nobody can call the service through the mesh"]);
    assert_says(&weft_ok(&["catalog", "services", &at]), &["hollow"]);
    weft_ok(&["services", "deregister", "-id=hollow", &at]);
    assert_eq!(weft_ok(&["members", "-status=failed", "-format=json", &at]), "[]\n");
    assert_says(&weft_ok(&["members", "-status=alive", "-format=json", &at]), &["n1"]);
    assert_says(&weft_ok(&["catalog", "nodes", "-near=_agent", "-filter=Meta.rack == a1", &at]), &["n1"]);
    assert!(!weft_ok(&["catalog", "nodes", "-filter=Meta.rack == b2", &at]).contains("n1"));
    weft_ok(&["maint", "-enable", "-service=web-1", "-reason=disk", &at]);
    assert_eq!(weft_ok(&["maint", &at]), "Scope    ID     Reason\nservice  web-1  disk\n");
    let json: serde_json::Value = serde_json::from_str(&weft_ok(&["maint", "-format=json", &at])).unwrap();
    assert_eq!(json, serde_json::json!([{"Scope": "service", "ID": "web-1", "Reason": "disk"}]));
    weft_ok(&["maint", "-disable", "-service=web-1", &at]);
    assert_eq!(weft_ok(&["maint", &at]), "Scope  ID  Reason\n");
    assert_eq!(weft_ok(&["maint", "-format=json", &at]), "[]\n");
}

#[test]
fn a_ca_s_lists_are_tables_or_json() {
    let ca = Ca::init("cli.test");
    ca.token("web-*", "web", "1h");
    let dir = ca.dir();
    let nobody = format!("-http-addr={}:8500", loopback_ip(233));
    for words in [&["ca", "issuer", "list"][..], &["ca", "operator", "list"], &["token", "list"]] {
        let words = [words, &["-ca", path(&dir), &nobody]].concat();
        let table = weft_ok(&words);
        let json: serde_json::Value =
            serde_json::from_str(&weft_ok(&[&words[..], &["-format=json"]].concat())).unwrap();
        assert_eq!(json.as_array().unwrap().len(), table.lines().count() - 1, "{table}\n{json}");
        let states = json.as_array().unwrap().iter().all(|row| row["State"] == "good");
        assert!(states, "{json}");
    }
}

#[test]
fn a_watch_prints_once_or_runs_its_program_at_each_change() {
    let (_ca, agent, at) = alone(221);
    let once: serde_json::Value =
        serde_json::from_str(&weft_ok(&["watch", "-type=service", "-service=web", "-passingonly", &at])).unwrap();
    assert_eq!(once[0]["Service"]["ID"], "web-1");

    let dir = TempDir::new().unwrap();
    let file = dir.path().join("seen");
    // Each state is a line: the index, then the JSON.
    let program = format!("{{ printf '%s ' \"$WEFT_INDEX\"; cat; }} >> {}", path(&file));
    let words = ["watch", "-type=service", "-service=web", "-passingonly", &at, "--", &program];
    let _watch = Running::start(Command::new(WEFT).args(words));
    let states = || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let complete = text.lines().filter(|line| line.ends_with(']')).map(|line| {
            let (index, json) = line.split_once(' ').unwrap();
            let json: serde_json::Value = serde_json::from_str(json).unwrap();
            let ids = json.as_array().unwrap().iter().map(|one| one["Service"]["ID"].as_str().unwrap().to_owned());
            (index.parse::<u64>().unwrap(), ids.collect::<Vec<String>>())
        });
        complete.collect::<Vec<(u64, Vec<String>)>>()
    };
    let wait = |want: &[&[&str]]| {
        until(&format!("the program ran for {want:?}"), || {
            let seen = states();
            if seen.iter().map(|(_, ids)| ids).eq(want.iter()) { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    };
    wait(&[&["web-1"]]);
    agent.put_ok("/v1/agent/check/fail/service:web-1", "");
    wait(&[&["web-1"], &[]]);
    agent.put_ok("/v1/agent/check/pass/service:web-1", "");
    wait(&[&["web-1"], &[], &["web-1"]]);
    let indexes: Vec<u64> = states().iter().map(|(index, _)| *index).collect();
    assert!(indexes.is_sorted() && indexes[0] > 0, "{indexes:?}");
}

#[test]
fn a_watch_of_a_key_tells_that_it_is_not_there_that_it_came_and_that_it_went() {
    let (ca, dir) = (Ca::init("cli.test"), TempDir::new().unwrap());
    let kv = dir.path().join("kv.hcl");
    fs::write(&kv, "kv { enabled = true }\n").unwrap();
    let issuer = ca.issuer();
    let args = ["-issuer", path(&issuer), "-config-file", path(&kv)];
    let agent = Agent::start(&Spec::loopback(218, "n1", &args));
    let at = format!("-http-addr={}", agent.api);
    for view in [["watch", "-type=key", "-key=app/a", &at], ["watch", "-type=keyprefix", "-prefix=app/", &at]] {
        assert_eq!(weft_ok(&view), "null\n");
    }
    let file = |name: &str| dir.path().join(name);
    let start = |name: &str, view: [&str; 2]| {
        let seen = file(name);
        Running::start(
            Command::new(WEFT).args([&["watch"], &view[..], &[&at, "-shell=false", "tee", "-a", path(&seen)]].concat()),
        )
    };
    let _watches = [start("key", ["-type=key", "-key=app/a"]), start("prefix", ["-type=keyprefix", "-prefix=app/"])];
    // What the program saw: each state is a line; of each key its value.
    let value = |row: &serde_json::Value| row["Value"].as_str().map(str::to_owned);
    let states = |name: &str| -> Vec<Option<String>> {
        let text = fs::read_to_string(file(name)).unwrap_or_default();
        let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let of = |line: &str| {
            let json: serde_json::Value = serde_json::from_str(line).unwrap();
            if name == "key" { value(&json) } else { json.as_array().map(|rows| value(&rows[0]).unwrap()) }
        };
        lines.map(of).collect()
    };
    let wait = |want: &[Option<&str>]| {
        for name in ["key", "prefix"] {
            until(&format!("the program at the {name} ran for {want:?}"), || {
                let seen = states(name);
                let seen: Vec<Option<&str>> = seen.iter().map(Option::as_deref).collect();
                if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
            });
        }
    };
    wait(&[None]);
    agent.put_ok("/v1/kv/app/a", "1");
    wait(&[None, Some("MQ==")]);
    let deleted = agent.call(agent.api, "DELETE", "/v1/kv/app/a", &[], "").unwrap();
    assert_eq!(deleted.status, 200);
    wait(&[None, Some("MQ=="), None]);
}

#[test]
fn top_and_debug_show_a_real_agent() {
    let (_ca, _agent, at) = alone(222);
    assert_eq!(weft_ok(&["top", "-count=1", "-interval=100ms", "-format=json", &at]).trim(), "[]");
    assert_says(&weft_ok(&["top", "-count=1", "-interval=100ms", &at]), &["Source", "Req/s", "p99"]);
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("kept");
    assert_says(&weft_ok(&["debug", "-duration=100ms", "-output", path(&out), &at]), &[path(&out)]);
    assert_says(&fs::read_to_string(out.join("self.json")).unwrap(), &["\"NodeName\": \"n1\""]);
    assert_says(&fs::read_to_string(out.join("checks.json")).unwrap(), &["service:web-1"]);
    assert_says(&fs::read_to_string(out.join("metrics-last.txt")).unwrap(), &["weft_membership_members"]);
    let again = weft(&["debug", "-duration=1ms", "-output", path(&out), &at]);
    assert_eq!(again.status.code(), Some(1));
    assert_says(&stderr(&again), &["-output"]);
}

#[test]
fn event_rtt_and_monitor_speak_consul_s_endpoints() {
    let (out, seen) =
        against(&[r#"{"ID":"e-1","Name":"deploy"}"#], &["event", "-name=deploy", "-service=web", "v 1.4"]);
    assert_eq!(out, "Event ID: e-1\n");
    assert!(seen[0].starts_with("PUT /v1/event/fire/deploy?service=web HTTP/1.1\r\n"), "{}", seen[0]);
    assert!(seen[0].ends_with("\r\n\r\nv 1.4"), "{}", seen[0]);

    let coordinate = |node: &str, x: f64| {
        format!(r#"{{"Node":"{node}","Coord":{{"Vec":[{x},0],"Error":0.1,"Adjustment":0,"Height":0.0005}}}}"#)
    };
    let nodes = format!("[{},{}]", coordinate("a", 0.001), coordinate("b", 0.004));
    let (out, seen) = against(&[&nodes], &["rtt", "a", "b"]);
    assert_eq!(out, "Estimated a <-> b rtt: 4.000 ms\n");
    assert!(seen[0].starts_with("GET /v1/coordinate/nodes "), "{}", seen[0]);
    // A star, as weft's agents tell: of two others one is asked, and where neither can tell it is said.
    let star = format!("[{},{}]", coordinate("a", 0.0), coordinate("b", 0.0));
    let own = r#"{"Config":{"NodeName":"c"}}"#;
    let (alone, of_b) = (r#"{"From":"a","Seconds":{"a":0.0}}"#, r#"{"From":"b","Seconds":{"a":0.0025,"b":0.0}}"#);
    let (out, seen) = against(&[&star, own, alone, of_b], &["rtt", "a", "b"]);
    assert_eq!(out, "Estimated a <-> b rtt: 2.500 ms\n");
    assert!(seen[3].starts_with("GET /v1/mesh/round-trips?from=b "), "{}", seen[3]);
    let (out, _) = against(&[&star, own, alone, r#"{"From":"b","Seconds":{"b":0.0}}"#], &["rtt", "a", "b"]);
    assert_eq!(out, "Estimated a <-> b rtt by way of c: 1.000 ms\n");
    let (out, _) = against(&[r#"{"Config":{"NodeName":"b"}}"#, &nodes], &["rtt", "a"]);
    assert_eq!(out, "Estimated a <-> b rtt: 4.000 ms\n");

    let (out, seen) = against(&["line 1\nline 2\n"], &["monitor", "-log-level=debug", "-log-json"]);
    assert_eq!(out, "line 1\nline 2\n");
    assert!(seen[0].starts_with("GET /v1/agent/monitor?loglevel=debug&logjson=true "), "{}", seen[0]);
}

#[test]
fn address_and_token_come_from_flags_then_weft_s_then_consul_s_variables() {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let at = format!("unix://{}", path(&socket));
    let ask = |set: &dyn Fn(&mut Command)| {
        let mut command = Command::new(WEFT);
        command.args(["catalog", "datacenters"]).stdin(Stdio::null());
        without_settings(&mut command);
        set(&mut command);
        std::thread::scope(|scope| {
            let seen = scope.spawn(|| serve_once(&mut listener.accept().unwrap().0, r#"["dc7"]"#));
            let out = command.output().unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), "dc7\n", "{}", stderr(&out));
            seen.join().unwrap().to_ascii_lowercase()
        })
    };
    let nobody = "127.0.0.1:1";
    assert_says(&ask(&|c| _ = c.env("WEFT_HTTP_ADDR", &at).env("CONSUL_HTTP_ADDR", nobody)), &["host: localhost\r\n"]);
    let seen = ask(&|c| _ = c.env("CONSUL_HTTP_ADDR", &at).env("CONSUL_HTTP_TOKEN", "t-consul"));
    assert_says(&seen, &["x-consul-token: t-consul\r\n"]);
    let seen = ask(&|c| {
        c.env("WEFT_HTTP_ADDR", nobody)
            .env("WEFT_HTTP_TOKEN", "t-env")
            .arg(format!("-http-addr={at}"))
            .arg("-token=t-flag");
    });
    assert_says(&seen, &["x-consul-token: t-flag\r\n"]);
    let file = dir.path().join("token");
    fs::write(&file, "t-file\n").unwrap();
    let seen = ask(&|c| _ = c.env("WEFT_HTTP_ADDR", &at).env("CONSUL_HTTP_TOKEN_FILE", &file));
    assert_says(&seen, &["x-consul-token: t-file\r\n"]);
    let flag = format!("-token-file={}", path(&file));
    let seen = ask(&|c| _ = c.env("WEFT_HTTP_ADDR", &at).env("CONSUL_HTTP_TOKEN", "t-consul").arg(&flag));
    assert_says(&seen, &["x-consul-token: t-file\r\n"]);
    let seen = ask(&|c| _ = c.env("WEFT_HTTP_ADDR", &at).env("WEFT_HTTP_TOKEN", "t-env").arg(&flag));
    assert_says(&seen, &["x-consul-token: t-env\r\n"]);
}

/// Takes what the environment of this test says of agents out of a command's.
fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if ["WEFT_", "CONSUL_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
}

#[test]
fn who_asked_for_tls_in_consul_s_way_gets_it_and_what_weft_does_not_do_is_refused() {
    #[track_caller]
    fn says(out: &Output, words: &[&str]) {
        assert_eq!(out.status.code(), Some(1), "{}", stderr(out));
        assert_says(&stderr(out), words);
        assert!(!stderr(out).contains("t-secret"), "{}", stderr(out));
    }
    let listener = TcpListener::bind((loopback_ip(232), 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let run = |set: &dyn Fn(&mut Command)| {
        let mut command = Command::new(WEFT);
        without_settings(&mut command);
        command.args(["catalog", "datacenters"]).stdin(Stdio::null()).env("CONSUL_HTTP_TOKEN", "t-secret");
        set(&mut command);
        command.output().unwrap()
    };
    for at in [addr.to_string(), format!("http://{addr}")] {
        let seen = std::thread::scope(|scope| {
            let seen = scope.spawn(|| {
                let mut first = [0; 3];
                std::io::Read::read_exact(&mut listener.accept().unwrap().0, &mut first).unwrap();
                first
            });
            let out = run(&|c| _ = c.env("CONSUL_HTTP_SSL", "true").env("CONSUL_HTTP_ADDR", &at));
            assert_eq!(out.status.code(), Some(1));
            seen.join().unwrap()
        });
        // A TLS record of the handshake, and no request with a token.
        assert_eq!(seen[..2], [0x16, 3], "{at}");
    }
    let (plain, secure) = (format!("http://{addr}"), format!("https://{addr}"));
    says(&run(&|c| _ = c.env("CONSUL_HTTP_SSL", "yes")), &["CONSUL_HTTP_SSL is `yes`", "true or false"]);
    says(
        &run(&|c| _ = c.env("CONSUL_HTTP_AUTH", "u:p").env("CONSUL_HTTP_ADDR", &plain)),
        &["CONSUL_HTTP_AUTH", "-token"],
    );
    let at_https = |name: &str, value: &str| run(&|c| _ = c.env(name, value).env("CONSUL_HTTP_ADDR", &secure));
    says(&at_https("CONSUL_CAPATH", "/etc/ssl/certs"), &["CONSUL_CAPATH", "-ca-file"]);
    says(&at_https("CONSUL_HTTP_SSL_VERIFY", "false"), &["CONSUL_HTTP_SSL_VERIFY is false", "-ca-file"]);
    says(&at_https("CONSUL_CLIENT_CERT", "/c.pem"), &["-client-cert and -client-key"]);
}

/// A CA in PEM, and the files of a certificate of it and of its key, made by `file`.
fn client_of_a_ca(name: &str, file: &dyn Fn(&str, &str) -> String) -> (String, (String, String)) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&ca_key).unwrap().pem();
    let own = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&own, &rcgen::Issuer::new(params, ca_key)).unwrap();
    let files = (file(&format!("{name}.pem"), &leaf.pem()), file(&format!("{name}.key"), &own.serialize_pem()));
    (root, files)
}

#[test]
fn an_agent_without_plain_http_answers_clients_of_its_ca_over_tls_and_nobody_else() {
    let ca = Ca::init("cli.test");
    let dir = TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        path(&file).to_owned()
    };
    let made = rcgen::generate_simple_self_signed(["mesh.example".to_owned()]).unwrap();
    let (cert, key) = (file("cert.pem", &made.cert.pem()), file("key.pem", &made.signing_key.serialize_pem()));
    let (root, client) = client_of_a_ca("good.example", &file);
    let (other_root, stranger) = client_of_a_ca("bad.example", &file);
    let clients = file("clients.pem", &root);
    let https = format!(
        "    cert_file = \"{cert}\"\n    key_file = \"{key}\"\n    ca_file = \"{clients}\"\n    verify_incoming = true\n"
    );
    let config =
        file("https.hcl", &format!("ports {{\n  http = -1\n  https = 8501\n}}\ntls {{\n  https {{\n{https}  }}\n}}\n"));
    let issuer = ca.issuer();
    let spec = Spec::loopback(233, "n1", &["-issuer", path(&issuer), "-config-file", &config]);
    let agent = Agent::spawn(&spec, TempDir::new().unwrap());
    let at = format!("-http-addr=https://{}:8501", agent.api.ip());
    let ask = |verb: &str, own: Option<&(String, String)>| {
        let mut command = Command::new(WEFT);
        without_settings(&mut command);
        command.args([verb, &at, "-tls-server-name=mesh.example", "-ca-file", &cert]);
        if let Some((cert, key)) = own {
            // The variables of Consul's command line.
            command.env("CONSUL_CLIENT_CERT", cert).env("CONSUL_CLIENT_KEY", key);
        }
        command.output().unwrap()
    };
    until("the client of the CA is answered", || {
        let out = ask("members", Some(&client));
        if out.status.success() { Ok(()) } else { Err(format!("{}\n{}", stderr(&out), agent.log())) }
    });
    for own in [None, Some(&stranger)] {
        let refused = ask("members", own);
        assert_eq!(refused.status.code(), Some(1), "{own:?}");
        assert_says(&stderr(&refused), &["broke off", "-client-cert"]);
    }
    let plain = std::net::TcpStream::connect((agent.api.ip(), 8500)).unwrap_err();
    assert_eq!(plain.kind(), std::io::ErrorKind::ConnectionRefused);
    // Somebody else's client, with and without.
    let curl = |own: Option<&(String, String)>| {
        let mut command = Command::new("curl");
        let resolve = format!("mesh.example:8501:{}", agent.api.ip());
        // Names of others are refused at loopback (`api/openapi.yaml`), whatever the certificate says.
        command.args(["-sS", "-H", "Host: localhost", "--resolve", &resolve]);
        command.args(["--cacert", &cert, "-o", "/dev/null", "-w", "%{http_code}"]);
        own.iter().for_each(|(cert, key)| _ = command.args(["--cert", cert, "--key", key]));
        let out = command.arg("https://mesh.example:8501/v1/agent/self").output().ok()?;
        Some(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    match curl(Some(&client)) {
        None => eprintln!("SKIPPED in part: curl is not installed"),
        Some(code) => assert_eq!([code, curl(None).unwrap(), curl(Some(&stranger)).unwrap()], ["200", "000", "000"]),
    }
    // A reload takes another CA, as it takes another certificate.
    fs::write(&clients, other_root).unwrap();
    assert!(ask("members", Some(&client)).status.success(), "files alone change nothing");
    let reloaded = ask("reload", Some(&client));
    assert!(reloaded.status.success(), "{}", stderr(&reloaded));
    assert!(ask("members", Some(&stranger)).status.success());
    assert!(!ask("members", Some(&client)).status.success());
}

#[test]
fn services_are_registered_by_flags_or_from_standard_input() {
    let (_ca, agent, at) = alone(227);
    let words =
        ["services", "register", "-name=edge", "-kind=ingress-gateway", "-tag=a", "-tag=b", "-meta=k=v", "-port=80"];
    weft_ok(&[&words[..], &[&at]].concat());
    let edge = &agent.get("/v1/agent/services")["edge"];
    let shown = ["Kind", "Tags", "Meta", "Port"].map(|key| edge[key].clone());
    let want = serde_json::json!(["ingress-gateway", ["a", "b"], {"k": "v"}, 80]);
    assert_eq!(serde_json::json!(shown), want);
    let refused = weft(&["services", "register", "-name=x", "file.hcl", &at]);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));

    let mut command = Command::new(WEFT);
    command.args(["services", "register", "-", &at]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"service {\n  name = \"piped\"\n  port = 81\n}\n")
        .unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "Registered service: piped\n");
    assert_eq!(agent.get("/v1/agent/services")["piped"]["Port"], 81);
}

#[test]
fn failures_say_what_to_do_and_end_with_their_code() {
    let (_ca, _agent, at) = alone(223);
    #[track_caller]
    fn check(words: &[&str], code: i32, says: &[&str]) {
        let out = weft(words);
        assert_eq!(out.status.code(), Some(code), "{words:?}: {}", stderr(&out));
        assert_says(&stderr(&out), says);
    }
    check(&["nonsense"], 2, &["Usage"]);
    check(&["keyring", "-list"], 2, &["Usage", "weft ca rotate"]);
    check(&["agent", "-server", "-bootstrap-expect=3"], 2, &["-server is Consul's"]);
    check(&["watch", "-type=nonsense"], 2, &["keyprefix"]);
    check(&["watch", "-type=service", &at], 1, &["-service"]);
    check(&["members", "-http-addr=ftp://x"], 1, &["host:port", "unix:///"]);
    check(&["members", "-http-addr=unix:///nowhere.sock"], 1, &["unix:///nowhere.sock", "weft agent"]);
    check(&["services", "deregister", "nobody", &at], 1, &["404", "Unknown service ID", "weft catalog services -node"]);
    check(&["watch", "-type=key", "-key=a", &at], 1, &["501", "api/README.md"]);
    check(&["force-leave", "nobody", &at], 1, &["nobody", "weft members"]);
    check(&["config", "read", "-kind=service-defaults", "-name=nobody", &at], 1, &["404", "weft config list"]);
    check(&["config", "delete", "-kind=service-defaults", "-name=nobody", &at], 1, &["404", "weft config list"]);
    check(&["intention", "get", "a", "b", &at], 1, &["404", "weft intention list"]);
    check(&["intention", "get", "a", "b", "-format=json", &at], 1, &["404"]);
    check(&["config", "read", "-kind=service-defaults", "-name=nobody", "-format=json", &at], 1, &["404"]);
    check(&["watch", "-type=agent_service", &at], 2, &["-type=service"]);
    check(&["completion", "tcsh"], 2, &["bash", "zsh", "fish"]);
    check(&["top", "-interval=0s", &at], 1, &["-interval"]);
    check(&["event", "-name=", &at], 1, &["-name=NAME"]);
    // 2 would say that the call is denied.
    check(&["intention", "check", "web", &at], 1, &["Usage", "DESTINATION"]);
    check(&["intention", "check", "web", "db", &at], 0, &[]);
}

#[test]
fn a_renewed_certificate_of_https_is_shown_after_a_reload_and_a_broken_one_changes_nothing() {
    let ca = Ca::init("cli.test");
    let dir = TempDir::new().unwrap();
    let [cert, key, before, config] =
        ["cert.pem", "key.pem", "before.pem", "https.hcl"].map(|name| dir.path().join(name));
    let renew = || {
        let made = rcgen::generate_simple_self_signed(["mesh.example".to_owned()]).unwrap();
        fs::write(&cert, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    };
    renew();
    fs::copy(&cert, &before).unwrap();
    let files = format!("cert_file = \"{}\"\n    key_file = \"{}\"", path(&cert), path(&key));
    fs::write(&config, format!("ports {{\n  https = 8501\n}}\ntls {{\n  https {{\n    {files}\n  }}\n}}\n")).unwrap();
    let issuer = ca.issuer();
    let agent = Agent::start(&Spec::loopback(234, "n1", &["-issuer", path(&issuer), "-config-file", path(&config)]));
    let (plain, secure) = (format!("-http-addr={}", agent.api), format!("-http-addr=https://{}:8501", agent.api.ip()));
    let is_believed = |roots: &std::path::Path| {
        weft(&["members", &secure, "-tls-server-name=mesh.example", "-ca-file", path(roots)]).status.success()
    };
    assert!(is_believed(&before));
    renew();
    assert!(is_believed(&before) && !is_believed(&cert), "files alone change nothing");
    weft_ok(&["reload", &plain]);
    assert!(is_believed(&cert) && !is_believed(&before));
    fs::write(&key, "nothing").unwrap();
    let refused = weft(&["reload", &plain]);
    assert_eq!(refused.status.code(), Some(1));
    assert_says(&stderr(&refused), &["nothing was reloaded", "tls.https.key_file"]);
    assert!(is_believed(&cert));
}

#[test]
fn completions_complete_and_manual_pages_are_there() {
    let bash = weft_ok(&["completion", "bash"]);
    let script = format!(
        "{bash}\nCOMP_WORDS=(weft cat); COMP_CWORD=1; _weft weft cat weft; echo \"${{COMPREPLY[*]}}\"\n\
         COMP_WORDS=(weft catalog n); COMP_CWORD=2; _weft weft n catalog; echo \"${{COMPREPLY[*]}}\"\n\
         COMP_WORDS=(weft watch --pass); COMP_CWORD=2; _weft weft --pass watch; echo \"${{COMPREPLY[*]}}\"\n"
    );
    // Longer than an argument may be.
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("script");
    fs::write(&file, script).unwrap();
    let out = Command::new("bash").arg(&file).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "catalog\nnodes\n--passingonly\n", "{}", stderr(&out));
    assert_says(&weft_ok(&["completion", "zsh"]), &["#compdef weft", "force-leave"]);
    assert_says(&weft_ok(&["completion", "fish"]), &["complete -c weft", "force-leave"]);

    let dir = TempDir::new().unwrap();
    let man = dir.path().join("man1");
    weft_ok(&["man", path(&man)]);
    for page in
        ["weft.1", "weft-agent.1", "weft-catalog-nodes.1", "weft-intention-check.1", "weft-ca-operator-create.1"]
    {
        let text = fs::read_to_string(man.join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
        assert_says(&text, &[".TH", ".SH SYNOPSIS"]);
    }
}

#[test]
fn a_part_of_a_configuration_can_be_validated() {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        path(&file).to_owned()
    };
    let services = write(
        "services.hcl",
        "service {\n  name = \"web\"\n  port = 80\n  check {\n    http = \"http://127.0.0.1/\"\n    interval = \"10s\"\n  }\n}\n",
    );
    let out = weft(&["validate", &services]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert_says(&String::from_utf8_lossy(&out.stdout), &["Configuration is valid!"]);
    assert_says(&stderr(&out), &["part of a configuration", "data_dir"]);
    // What it does say must be right, and what it lacks is no noise beside that.
    let wrong = write("wrong.hcl", "service {\n  name = \"web\"\n  prot = 80\n}\n");
    let out = weft(&["validate", &services, &wrong]);
    assert_eq!(out.status.code(), Some(1));
    assert_says(&stderr(&out), &["wrong.hcl:", "prot"]);
    assert!(!stderr(&out).contains("data_dir"), "{}", stderr(&out));
    // Warnings are not lost on a part.
    let server = write("server.json", r#"{"server": true}"#);
    assert_says(&stderr(&weft(&["validate", &server])), &["warning:", "server"]);
}

#[test]
fn a_mass_change_of_checks_is_a_few_lines_and_a_count() {
    let ca = Ca::init("cli.test");
    let dir = TempDir::new().unwrap();
    // Nobody listens there; a refused connection is critical at once.
    let nobody = TcpListener::bind((loopback_ip(225), 0)).unwrap().local_addr().unwrap();
    let checks: Vec<String> = (0..200)
        .map(|n| format!(r#"{{"id": "c{n}", "name": "c", "tcp": "{nobody}", "interval": "1s", "status": "passing"}}"#))
        .collect();
    let file = dir.path().join("checks.json");
    fs::write(&file, format!(r#"{{"checks": [{}]}}"#, checks.join(","))).unwrap();
    let issuer = ca.issuer();
    let agent = Agent::start(&Spec::loopback(224, "n1", &["-issuer", path(&issuer), "-config-file", path(&file)]));
    until("all are critical", || {
        let list = agent.get("/v1/agent/checks");
        let critical = list.as_object().unwrap().values().filter(|check| check["Status"] == "critical").count();
        if critical == 200 { Ok(()) } else { Err(critical.to_string()) }
    });
    let log = until("the count is logged", || {
        let log = agent.log();
        if log.contains("more checks changed") { Ok(log) } else { Err(log) }
    });
    let lines = log.lines().filter(|line| line.contains("check changed")).count();
    // They turn within a second or, on a busy machine, some.
    assert!(lines <= 100, "{lines} lines of their own");
}

//! Agents on loopback addresses, without root.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use crate::agent::{Agent, Ca, Spec, demo_subnet, loopback_ip, path, weft, weft_ok};
use crate::app::App;
use crate::wait::until;

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in:\n{text}");
    }
}

/// An issuer of its own on this run's address `last`.
fn alone(last: u8, name: &'static str) -> (Ca, Agent) {
    let ca = Ca::init("loop.test");
    let agent = Agent::start(&Spec::loopback(last, name, &["-issuer", path(&ca.issuer())]));
    (ca, agent)
}

#[test]
fn two_agents_on_one_host_join_and_the_verbs_tell_it() {
    let (ca, n1) = alone(1, "n1");
    let token = ca.token("n2", "web", "1h");
    let n2 = Agent::start(&Spec::loopback(2, "n2", &["-join", &loopback_ip(1).to_string(), "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    let app = App::http(None, SocketAddr::new(loopback_ip(2), 0), "app");
    let file = n2.dir().join("web.hcl");
    let port = app.addr.port();
    fs::write(
        &file,
        format!(
            "service {{\n  name = \"web\"\n  address = \"{}\"\n  port = {port}\n  protocol = \"http\"\n}}\n",
            loopback_ip(2)
        ),
    )
    .unwrap();
    let at = |agent: &Agent| format!("-http-addr={}", agent.api);

    weft_ok(&["services", "register", &at(&n2), path(&file)]);
    n1.wait_passing("web", &["web"]);
    assert_says(&weft_ok(&["members", &at(&n1)]), &["n1", "n2", "alive", &format!("{}:8301", loopback_ip(2))]);
    assert_says(&weft_ok(&["catalog", "services", &at(&n1)]), &["web"]);
    assert_says(&weft_ok(&["catalog", "nodes", &at(&n1)]), &["n1", "n2"]);
    assert_says(&weft_ok(&["info", &at(&n1)]), &["loop.test", "n1", "Intentions = 0"]);
    assert_says(&weft_ok(&["version"]), &[env!("CARGO_PKG_VERSION")]);
    let json: serde_json::Value = serde_json::from_str(&weft_ok(&["members", "-format=json", &at(&n1)])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 2);
    weft_ok(&["services", "deregister", "-id=web", &at(&n2)]);
    n1.wait_passing("web", &[]);
    weft_ok(&["leave", &at(&n2)]);
    n1.wait_members(&["n1=1", "n2=3"]);
    let mut n2 = n2;
    let (status, log) = n2.wait_exit();
    assert!(status.success(), "{log}");
    assert_says(&log, &["the goodbye was heard heard=1"]);

    let nobody = weft(&["members", &format!("-http-addr={}:8500", loopback_ip(99))]);
    assert_eq!(nobody.status.code(), Some(1));
    assert_says(&String::from_utf8_lossy(&nobody.stderr), &[&format!("{}:8500", loopback_ip(99)), "weft agent"]);
}

#[test]
fn the_shared_http_port_routes_by_host() {
    let (_ca, n1) = {
        let ca = Ca::init("loop.test");
        let issuer = ca.issuer();
        let agent = Agent::start(&Spec::loopback(3, "n1", &["-issuer", path(&issuer), "-shared-http-port", "8480"]));
        (ca, agent)
    };
    let app = App::http(None, SocketAddr::new(loopback_ip(3), 0), "app");
    let port = app.addr.port();
    n1.put_ok(
        "/v1/agent/service/register",
        &format!(r#"{{"Name":"web","Address":"{}","Port":{port},"Protocol":"http"}}"#, loopback_ip(3)),
    );
    n1.wait_passing("web", &["web"]);
    let shared = SocketAddr::new(loopback_ip(3), 8480);
    let body = until("the shared port answers", || {
        let answer = n1.call(shared, "GET", "/p", &[("host", "web.weft")], "")?;
        if answer.status == 200 { Ok(answer.body) } else { Err(format!("{} {}", answer.status, answer.body)) }
    });
    assert_says(&body, &["app GET /p", "URI=spiffe://loop.test/node/n1"]);
    let lost = n1.call(shared, "GET", "/", &[("host", "nothing.weft")], "").unwrap();
    assert_eq!(lost.status, 503, "{}", lost.body);
    assert_says(&lost.body, &["nothing"]);
}

#[test]
fn what_cannot_start_says_why() {
    let ca = Ca::init("loop.test");
    let issuer = ca.issuer();
    let fails = |spec: &Spec<'_>| {
        let mut agent = Agent::spawn(spec, tempfile::TempDir::new().unwrap());
        let (status, log) = agent.wait_exit();
        assert!(!status.success(), "{log}");
        log
    };
    let issuing = |last: u8| Spec::loopback(last, "n1", &["-issuer", path(&issuer)]);

    let _udp = UdpSocket::bind((loopback_ip(10), 8301)).unwrap();
    assert_says(&fails(&issuing(10)), &[&format!("{}:8301", loopback_ip(10)), "in use"]);
    let _tcp = TcpListener::bind((loopback_ip(11), 8500)).unwrap();
    assert_says(&fails(&issuing(11)), &[&format!("{}:8500", loopback_ip(11)), "in use"]);
    assert_says(&fails(&Spec::loopback(12, "n1", &[])), &["-issuer", "-join", "-token"]);

    let dir = tempfile::TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let blocked = file.join("data");
    let log = fails(&Spec::loopback(13, "n1", &["-issuer", path(&issuer), "-data-dir", path(&blocked)]));
    assert_says(&log, &[path(&blocked)]);
}

/// Limits how long the files may be that an agent writes.
#[track_caller]
fn limit_files(agent: &Agent, limit: &str) {
    let (pid, limit) = (agent.pid().to_string(), format!("--fsize={limit}:unlimited"));
    let out = std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).output().expect("prlimit runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn an_agent_that_loses_its_disk_serves_on_says_so_and_keeps_again_what_it_is_told_once_it_can() {
    let ca = Ca::init("loop.test");
    let mut spec = Spec::loopback(244, "n1", &["-issuer", path(&ca.issuer())]);
    // A write beyond the limit fails, and is no signal; what is printed goes through a pipe, which knows no limit.
    let script = "trap '' XFSZ; exec \"$@\" > >(exec cat) 2>&1";
    spec.wrap = ["bash", "-c", script, "-"].map(str::to_owned).to_vec();
    let n1 = Agent::start(&spec);
    let join = loopback_ip(244).to_string();
    let n2 = Agent::start(&Spec::loopback(245, "n2", &["-join", &join, "-token", &ca.token("n2", "*", "1h")]));
    n1.wait_members(&["n1=1", "n2=1"]);
    let apps = [(&n1, "api"), (&n2, "web")].map(|(agent, name)| {
        let app = App::http(None, SocketAddr::new(agent.api.ip(), 0), name);
        let (ip, port) = (agent.api.ip().to_string(), app.addr.port());
        let body = serde_json::json!({"Name": name, "Address": ip, "Port": port, "Protocol": "http"});
        agent.put_ok("/v1/agent/service/register", &body.to_string());
        app
    });
    // Each calls what the other serves.
    for (agent, name) in [(&n1, "web"), (&n2, "api")] {
        let ip = agent.api.ip().to_string();
        let upstream = serde_json::json!({"DestinationName": name, "LocalBindAddress": ip, "LocalBindPort": 9191});
        let caller = serde_json::json!({"Name": "caller", "Port": 1,
            "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}});
        agent.put_ok("/v1/agent/service/register", &caller.to_string());
        agent.wait_passing(name, &[name]);
    }
    let call = |agent: &Agent, name: &str| {
        let answer = agent.call(SocketAddr::new(agent.api.ip(), 9191), "GET", "/", &[], "")?;
        if answer.status == 200 && answer.body.starts_with(name) { Ok(()) } else { Err(answer.body) }
    };
    until("n1 calls n2", || call(&n1, "web"));
    until("n2 calls n1", || call(&n2, "api"));

    limit_files(&n1, "0");
    let late = r#"{"Name": "late", "Port": 9}"#;
    let refused = n1.put("/v1/agent/service/register", late);
    assert_eq!(refused.status, 500, "{}", refused.body);
    assert_says(&refused.body, &["cannot keep the registration on disk", "nothing was changed"]);
    assert!(!n1.try_get("/v1/agent/services").unwrap().body.contains("late"));
    until("it says so", || if n1.log().contains("the disk refused") { Ok(()) } else { Err(n1.log()) });
    for _ in 0..20 {
        call(&n1, "web").unwrap();
        call(&n2, "api").unwrap();
    }
    // What others tell is known as before.
    n2.put_ok("/v1/agent/service/register", r#"{"Name": "other", "Port": 9}"#);
    n1.wait_passing("other", &["other"]);
    n2.put_ok("/v1/agent/service/deregister/other", "");
    n1.wait_passing("other", &[]);
    assert_eq!(n1.members().unwrap(), ["n1=1", "n2=1"]);

    limit_files(&n1, "unlimited");
    n1.put_ok("/v1/agent/service/register", late);
    n2.wait_passing("late", &["late"]);
    until("it says that it keeps again", || {
        let log = n1.log();
        if log.contains("opened the store again") { Ok(()) } else { Err(log) }
    });
    call(&n1, "web").unwrap();
    drop(apps);
}

#[test]
fn a_corrupt_store_is_named_and_kept() {
    let (_ca, n1) = alone(20, "n1");
    let data = n1.kill();
    let file = data.path().join("data/weft.redb");
    fs::write(&file, b"this is no database").unwrap();
    let mut again = Agent::spawn(&Spec::loopback(20, "n1", &[]), data);
    let (status, log) = again.wait_exit();
    assert!(!status.success());
    assert_says(&log, &["weft.redb", "corrupt"]);
    assert_eq!(fs::read(again.dir().join("data/weft.redb")).unwrap(), b"this is no database", "nothing is deleted");
}

#[test]
fn a_second_agent_on_the_same_data_directory_is_refused() {
    let (ca, n1) = alone(21, "n1");
    let data = n1.dir().join("data");
    let issuer = ca.issuer();
    let mut second = Agent::spawn(
        &Spec::loopback(22, "n1", &["-issuer", path(&issuer), "-data-dir", path(&data)]),
        tempfile::TempDir::new().unwrap(),
    );
    let (status, log) = second.wait_exit();
    assert!(!status.success());
    assert_says(&log, &["another"]);
    n1.wait_members(&["n1=1"]);
}

#[test]
fn a_first_start_that_failed_does_not_claim_the_data_directory_and_one_that_succeeded_does() {
    let ca = Ca::init("loop.test");
    let (data, issuer) = (tempfile::TempDir::new().unwrap(), ca.issuer());
    let start = |last: u8, name: &'static str, args: &[&str], data: tempfile::TempDir| {
        Agent::spawn(&Spec::loopback(last, name, &[&["-issuer", path(&issuer)], args].concat()), data)
    };
    // No host has it (RFC 5737).
    let nowhere = "192.0.2.1".parse().unwrap();
    let mut first =
        Agent::spawn(&Spec { bind: nowhere, ..Spec::loopback(24, "n1", &["-issuer", path(&issuer)]) }, data);
    let (status, log) = first.wait_exit();
    assert!(!status.success() && log.contains("192.0.2.1"), "{log}");
    let data = first.dir().join("data");
    let mut named = start(24, "n2", &["-data-dir", path(&data)], tempfile::TempDir::new().unwrap());
    named.wait_ready();
    named.put_ok("/v1/agent/leave", "");
    assert!(named.wait_exit().0.success());
    let mut other = start(24, "n3", &["-data-dir", path(&data)], tempfile::TempDir::new().unwrap());
    let (status, log) = other.wait_exit();
    assert!(!status.success(), "{log}");
    assert_says(&log, &["belongs to node `n2`"]);
}

#[test]
fn absurd_json_is_a_400_that_names_the_field() {
    let (_ca, n1) = alone(23, "n1");
    #[track_caller]
    fn check(n1: &Agent, body: &str, status: u16, words: &[&str]) {
        let answer = n1.put("/v1/agent/service/register", body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert_says(&answer.body, words);
    }
    check(&n1, "", 400, &["Request decode failed"]);
    check(&n1, "[]", 400, &[]);
    check(&n1, r#"{"Port":1}"#, 400, &["Missing service name"]);
    check(&n1, r#"{"Name":"web","Prot":1}"#, 400, &["Prot"]);
    check(&n1, r#"{"Name":"web","Port":70000}"#, 400, &["Port"]);
    check(&n1, r#"{"Name":"web","Address":"0.0.0.0"}"#, 400, &["Invalid service address"]);
    check(&n1, &"[".repeat(100_000), 400, &[]);
    check(&n1, &format!(r#"{{"Name":"{}"}}"#, "a".repeat(2 << 20)), 413, &[]);
    n1.wait_members(&["n1=1"]);
}

#[test]
fn registrations_survive_a_kill_and_check_results_a_stop() {
    let (_ca, n1) = alone(24, "n1");
    n1.put_ok("/v1/agent/service/register", r#"{"Name":"web","Port":80,"Check":{"TTL":"1h"}}"#);
    let data = n1.kill();
    let mut again = Agent::spawn(&Spec::loopback(24, "n1", &[]), data);
    again.wait_ready();
    assert!(again.get("/v1/agent/services")["web"].is_object(), "registered before the kill");
    again.put_ok("/v1/agent/check/pass/service:web", "");
    again.wait_passing("web", &["web"]);
    again.signal(nix::sys::signal::Signal::SIGTERM);
    let (status, log) = again.wait_exit();
    assert!(status.success(), "{log}");
    let third = Agent::spawn(&Spec::loopback(24, "n1", &[]), again.kill());
    third.wait_ready();
    third.wait_passing("web", &["web"]);
}

#[test]
fn an_api_beyond_loopback_needs_an_admin_token() {
    let ca = Ca::init("loop.test");
    let issuer = ca.issuer();
    let mut spec = Spec::loopback(25, "n1", &["-issuer", path(&issuer)]);
    spec.client = "0.0.0.0".parse().unwrap();
    let mut agent = Agent::spawn(&spec, tempfile::TempDir::new().unwrap());
    let (status, log) = agent.wait_exit();
    assert!(!status.success());
    assert_says(&log, &["admin"]);
}

#[test]
fn validate_reports_every_problem_at_once() {
    let dir = tempfile::TempDir::new().unwrap();
    let file = dir.path().join("bad.hcl");
    fs::write(&file, "node_name = \"a b\"\nnonsense = 1\nservice {\n  port = 1\n}\n").unwrap();
    let out = weft(&["validate", path(&file)]);
    assert_eq!(out.status.code(), Some(1));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_says(&text, &["node_name", "nonsense", "Missing service name", "bad.hcl"]);
}

#[test]
fn the_demo_shows_the_whole_path_and_ends() {
    let out = weft(&["demo", "--once", "-subnet", &demo_subnet()]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stderr));
    assert_says(&text, &["spiffe://", "p50", "p99", "alive", "TLS", "echo-1", "echo-2"]);
}

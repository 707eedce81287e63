//! Unmodified clients and servers of HTTP through two real agents: curl, nginx, h2load, nghttpx, grpcio, websockets, hypercorn,
//! Python's http.server. `tests/clients/install.sh` installs what is of PyPI, Debian has the others (see `clients`).

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::json;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path, weft_ok};
use crate::clients::{Running, found, installed, program};
use crate::netns_policy::operator;
use crate::wait::{PATIENCE, until};

/// What nginx serves: more than windows and buffers on the way hold.
const FILE_BYTES: usize = 24 << 20;
/// The apps' ports at the second agent.
const HTTP: u16 = 7801;
const GRPC: u16 = 7802;
const WS: u16 = 7803;
const NGINX: u16 = 7804;
const RAW: u16 = 7805;
const WS_H2: u16 = 7806;
/// The first of the addresses of the tests about entries and about the PROXY protocol.
const LAST: u8 = 240;

/// Two agents; the second serves `services` (name, port, protocol), the first calls them at the same ports of its own.
pub(crate) struct Pair {
    ca: Ca,
    pub(crate) first: Agent,
    pub(crate) second: Agent,
}

impl Pair {
    #[track_caller]
    pub(crate) fn start(last: u8, services: &[(&str, u16, &str)]) -> Self {
        let ca = Ca::init("edges.test");
        let first = Agent::start(&Spec::loopback(last, "n1", &["-issuer", path(&ca.issuer())]));
        let token = ca.token("n2", "*", "1h");
        let seed = loopback_ip(last).to_string();
        let second = Agent::start(&Spec::loopback(last + 1, "n2", &["-join", &seed, "-token", &token]));
        first.wait_members(&["n1=1", "n2=1"]);
        let mut upstreams = Vec::new();
        for (name, port, protocol) in services {
            let body =
                json!({"Name": name, "Address": loopback_ip(last + 1).to_string(), "Port": port, "Protocol": protocol});
            second.put_ok("/v1/agent/service/register", &body.to_string());
            let bind = loopback_ip(last).to_string();
            upstreams.push(json!({"DestinationName": name, "LocalBindAddress": bind, "LocalBindPort": port}));
        }
        let caller =
            json!({"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": upstreams}}}});
        first.put_ok("/v1/agent/service/register", &caller.to_string());
        for (name, port, _) in services {
            first.wait_passing(name, &[name]);
            let addr = SocketAddr::new(first.api.ip(), *port);
            until(&format!("{name} can be called"), || {
                std::net::TcpStream::connect(addr).map(drop).map_err(|e| e.to_string())
            });
        }
        Self { ca, first, second }
    }

    /// Signs `entry` and brings it to the mesh, in force on the first agent when this returns.
    #[track_caller]
    fn write(&self, entry: &serde_json::Value) {
        let file = self.ca.dir().join("entry.json");
        fs::write(&file, entry.to_string()).unwrap();
        let signer = self.ca.dir().join("alice.operator");
        if !signer.exists() {
            operator(&self.ca, "alice", "config");
        }
        let api = format!("-http-addr={}", self.first.api);
        weft_ok(&["config", "write", path(&file), "-operator", path(&signer), &api]);
    }

    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.first.api.ip(), port)
    }
}

fn run(program: &Path, args: &[&str]) -> (Output, String) {
    let out = Command::new(program).args(args).env_remove("http_proxy").env_remove("HTTP_PROXY").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out, text)
}

/// Starts nginx, which serves `dir`'s files at `addr`, over HTTP/1.1 and HTTP/2 without TLS.
fn nginx_at(nginx: &Path, dir: &TempDir, addr: SocketAddr) -> Running {
    let root = dir.path().join("www");
    fs::create_dir(&root).unwrap();
    let content: Vec<u8> = (0..FILE_BYTES).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    fs::write(root.join("file"), content).unwrap();
    fs::write(root.join("index.html"), "hello").unwrap();
    nginx_with(nginx, dir, &format!("listen {addr};\n    root {};", root.display()))
}

/// Starts nginx with one server of HTTP that is set up so.
fn nginx_with(nginx: &Path, dir: &TempDir, server: &str) -> Running {
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {}/{name};\n", dir.path().display()))
        .concat();
    let file = dir.path().join("nginx.conf");
    let text = format!(
        "daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log stderr;\nuser root;\nevents {{}}\nhttp {{\n  access_log off;\n{paths}\
         \n  server {{\n    {server}\n  }}\n}}\n",
        dir = dir.path().display(),
    );
    fs::write(&file, text).unwrap();
    Running::start(Command::new(nginx).args(["-p", path(dir.path()), "-e", "stderr", "-c", path(&file)]))
}

/// The Python that has grpcio and websockets.
fn python() -> Option<PathBuf> {
    installed("py/bin/python3").filter(|python| run(python, &["-c", "import grpc, websockets"]).0.status.success())
}

/// Starts the apps of edges.py at the address `last`.
#[track_caller]
fn serve(python: &Path, last: u8) -> Running {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/edges.py");
    let ports = [HTTP, GRPC, WS].map(|port| port.to_string());
    let host = loopback_ip(last).to_string();
    let mut apps = Running::start(Command::new(python).args([path(&script), "serve", &host]).args(&ports));
    apps.wait_line("the apps are ready", |line| line == "ready");
    apps
}

#[test]
fn curl_and_h2load_meet_nginx_through_the_mesh() {
    let programs = [program("nginx"), program("curl"), program("h2load")];
    let Some([nginx, curl, h2load]) = found("nginx, curl or h2load", programs) else { return };
    let pair = Pair::start(228, &[("files", NGINX, "http")]);
    let dir = TempDir::new().unwrap();
    let _nginx = nginx_at(&nginx, &dir, SocketAddr::new(loopback_ip(229), NGINX));
    let url = |target: &str| format!("http://{}/{target}", pair.at(NGINX));
    let got = dir.path().join("got");
    until("nginx answers", || match run(&curl, &["-sS", "-f", &url("")]) {
        (out, _) if out.status.success() => Ok(()),
        (_, text) => Err(text),
    });
    for version in ["--http1.1", "--http2-prior-knowledge", "--http2", "--http1.0"] {
        let (out, text) = run(&curl, &["-sS", "-f", version, "-m", "60", "-o", path(&got), &url("file")]);
        assert!(out.status.success(), "{version}: {text}");
        assert!(fs::read(&got).unwrap() == fs::read(dir.path().join("www/file")).unwrap(), "{version}");
    }
    let (_, head) = run(&curl, &["-sS", "-I", &url("file")]);
    assert!(head.starts_with("HTTP/1.1 200") && head.contains(&format!("{FILE_BYTES}")), "{head}");
    let (_, part) = run(&curl, &["-sS", "-i", "-r", "0-4", &url("index.html")]);
    assert!(part.contains("206 Partial") && part.ends_with("hello"), "{part}");
    let (_, answer) = run(&curl, &["-sS", "-i", "-p", "-x", &url(""), "http://elsewhere.test/"]);
    assert!(answer.contains("501"), "CONNECT is refused: {answer}");
    for args in [&["-n", "3000", "-c", "4", "-m", "16"][..], &["-n", "1000", "-c", "4", "--h1"]] {
        let (out, text) = run(&h2load, &[args, &[&url("")]].concat());
        let all = format!("{} succeeded, 0 failed", args[1]);
        assert!(out.status.success() && text.contains(&all), "{text}");
    }
}

#[test]
fn nginx_that_ends_connections_and_allows_few_streams_costs_no_request() {
    let programs = [program("nginx"), program("curl"), program("h2load")];
    let Some([nginx, curl, h2load]) = found("nginx, curl or h2load", programs) else { return };
    let pair = Pair::start(LAST + 6, &[("web", NGINX, "http2")]);
    let dir = TempDir::new().unwrap();
    let addr = SocketAddr::new(loopback_ip(LAST + 7), NGINX);
    // A GOAWAY after 100 requests (its default is 1,000) leaves out what is on its way by then: 20 of the 128 that are under way.
    let limits = "keepalive_requests 100; http2_max_concurrent_streams 20;";
    let _nginx =
        nginx_with(&nginx, &dir, &format!("listen {addr} http2;\n    {limits} location / {{ return 200 hello; }}"));
    let url = format!("http://{}/", pair.at(NGINX));
    until("nginx answers", || match run(&curl, &["-sS", "-f", &url]) {
        (out, _) if out.status.success() => Ok(()),
        (_, text) => Err(text),
    });
    let body = dir.path().join("body");
    fs::write(&body, "a body that is here as a whole").unwrap();
    for args in [&[][..], &["-d", path(&body)]] {
        let (out, text) = run(&h2load, &[&["-n", "6000", "-c", "8", "-m", "16"], args, &[url.as_str()]].concat());
        assert!(out.status.success() && text.contains("6000 succeeded, 0 failed"), "{args:?}: {text}");
        assert!(text.contains("6000 2xx"), "{args:?}: {text}");
    }
}

#[test]
fn grpcio_websockets_and_uploads_of_curl_work_through_the_mesh() {
    let Some([python, curl]) = found("grpcio, websockets or curl", [python(), program("curl")]) else { return };
    let pair = Pair::start(230, &[("uploads", HTTP, "http"), ("rpc", GRPC, "grpc"), ("ws", WS, "http")]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/edges.py");
    let _apps = serve(&python, 231);

    // What the app says of retries counts where there is somebody who would try again.
    let retries = json!({"Kind": "service-router", "Name": "rpc", "Routes": [
        {"Match": {"HTTP": {"PathExact": "/t.Test/pushback"}},
         "Destination": {"NumRetries": 3, "RetryOn": ["unavailable"], "RetryBackoff": {"BaseInterval": "1ms"}}}]});
    pair.write(&retries);

    let addrs = [GRPC, WS].map(|port| pair.at(port).to_string());
    let mut clients = Running::start(Command::new(&python).args([path(&script), "call"]).args(&addrs));
    clients.wait_line_within(10 * PATIENCE, "gRPC and WebSocket clients are done", |line| line == "done");
    clients.wait_end();
    let shown = [
        "grpc unary",
        "grpc streams",
        "grpc deadline",
        "grpc cancellation",
        "grpc trailers-only",
        "grpc pushback",
        "websocket",
    ];
    assert!(clients.printed().starts_with(&shown.map(str::to_owned)), "{:?}", clients.printed());

    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, vec![b'u'; 3 << 20]).unwrap();
    let url = |target: &str| format!("http://{}/{target}", pair.at(HTTP));
    let (_, sum) = run(Path::new("sha256sum"), &[path(&file)]);
    let sum = sum.split(' ').next().unwrap();
    // With a length and in chunks; awaited and not; over HTTP/2 too.
    for args in [
        &["-H", "Expect: 100-continue"][..],
        &["-H", "Expect:"],
        &["-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked"],
        &["--http2-prior-knowledge", "-H", "Expect:"],
    ] {
        let (out, text) = run(&curl, &[&["-sS", "-f", "-m", "30", "-T", path(&file)], args, &[&url("")]].concat());
        assert!(out.status.success() && text == sum, "{args:?}: {text}");
    }
    // The app says no, and nothing of the body leaves curl.
    let count = ["-sS", "-o", "/dev/null", "-w", "%{http_code} %{size_upload}", "--expect100-timeout", "20"];
    let (_, told) =
        run(&curl, &[&count[..], &["-H", "Expect: 100-continue", "-T", path(&file), &url("refused")]].concat());
    assert_eq!(told, "403 0");
}

#[test]
fn entries_route_break_end_and_limit_the_calls_of_grpcio() {
    let Some([python]) = found("grpcio", [python()]) else { return };
    let pair = Pair::start(LAST, &[("rpc", GRPC, "grpc")]);
    let _apps = serve(&python, LAST + 1);
    pair.write(&json!({"Kind": "service-router", "Name": "rpc", "Routes": [
        {"Match": {"HTTP": {"PathPrefix": "/t.Routed/"}}, "Destination": {"RequestHeaders": {"Set": {"asked": "by prefix"}}}},
        {"Match": {"HTTP": {"PathPrefix": "/t.Slow/"}}, "Destination": {"RequestTimeout": "500ms"}}]}));
    pair.write(&json!({"Kind": "service-faults", "Name": "rpc", "Faults": [
        {"Match": {"HTTP": {"PathPrefix": "/t.Broken/"}}, "Abort": {"GRPCStatus": 8}}]}));
    pair.write(
        &json!({"Kind": "service-defaults", "Name": "rpc", "Protocol": "grpc", "RateLimits": {"InstanceLevel": {
        "Routes": [{"PathPrefix": "/t.Rated/", "RequestsPerSecond": 0.1, "RequestsMaxBurst": 1}]}}}),
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/edges.py");
    let call = |what: &str, shown: &[&str]| {
        let addr = pair.at(GRPC).to_string();
        let mut clients = Running::start(Command::new(&python).args([path(&script), what, &addr]));
        clients.wait_line("the calls are done", |line| line == "done");
        clients.wait_end();
        let printed = clients.printed();
        assert_eq!(printed.iter().filter(|line| line.starts_with("grpc ")).collect::<Vec<_>>(), shown, "{printed:?}");
    };
    call("entries", &["grpc route", "grpc fault", "grpc timeout", "grpc rate"]);
    pair.write(&json!({"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": {"Defaults": {
        "Limits": {"MaxConcurrentRequests": 0}}}}));
    call("refused", &["grpc limit"]);
}

#[test]
fn websockets_cross_http2_on_the_caller_s_side_and_on_the_app_s() {
    let asgi = python().filter(|python| run(python, &["-c", "import hypercorn"]).0.status.success());
    let Some([python, nghttpx]) = found("websockets, hypercorn or nghttpx", [asgi, program("nghttpx")]) else { return };
    let pair = Pair::start(LAST + 10, &[("ws", WS, "http"), ("ws2", WS_H2, "http2")]);
    let _apps = serve(&python, LAST + 11);
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let listens = |what: &str, addr: SocketAddr| {
        until(what, || std::net::TcpStream::connect(addr).map(drop).map_err(|e| e.to_string()));
    };
    let app = SocketAddr::new(loopback_ip(LAST + 11), WS_H2);
    let mut server = Command::new(&python);
    server.current_dir(&clients).env("PYTHONDONTWRITEBYTECODE", "1");
    let _server = Running::start(server.args(["-m", "hypercorn", "--bind", &app.to_string(), "asgi:app"]));
    listens("hypercorn", app);
    // What speaks HTTP/1.1 to nghttpx reaches the mesh over HTTP/2 (RFC 8441).
    let over_h2 = |port: u16| {
        let front = SocketAddr::new(loopback_ip(LAST + 10), port + 100);
        let mut proxy = Command::new(&nghttpx);
        proxy.args(["--conf=/dev/null", "--single-process", "--workers=1", "--no-via"]);
        proxy.arg(format!("--frontend={},{};no-tls", front.ip(), front.port()));
        proxy.arg(format!("--backend={},{port};;proto=h2", pair.at(port).ip()));
        let proxy = Running::start(&mut proxy);
        listens("nghttpx", front);
        (proxy, front)
    };
    let ((_first, to_http1), (_second, to_http2)) = (over_h2(WS), over_h2(WS_H2));
    for (addr, over) in [(pair.at(WS_H2), Some("2")), (to_http1, None), (to_http2, Some("2"))] {
        let (script, addr) = (clients.join("edges.py"), addr.to_string());
        let mut client = Running::start(Command::new(&python).args([path(&script), "ws", &addr]).args(over));
        client.wait_line("the WebSocket is done", |line| line == "done");
        client.wait_end();
        assert_eq!(client.printed(), ["websocket", "done"], "{addr}");
    }
}

#[test]
fn nginx_behind_a_service_of_tcp_learns_who_calls_by_the_proxy_protocol() {
    let Some([nginx, curl]) = found("nginx or curl", [program("nginx"), program("curl")]) else { return };
    let pair = Pair::start(LAST + 2, &[("raw", RAW, "tcp")]);
    let raw = json!({"Name": "raw", "Address": loopback_ip(LAST + 3).to_string(), "Port": RAW, "Protocol": "tcp",
        "Meta": {"proxy-protocol": "v2"}});
    pair.second.put_ok("/v1/agent/service/register", &raw.to_string());
    let dir = TempDir::new().unwrap();
    let addr = SocketAddr::new(loopback_ip(LAST + 3), RAW);
    // What the header says of the certificate nginx has in variables from 1.23.2 on; examples/traffic/bytes.md shows it.
    let says = "return 200 \"$proxy_protocol_addr $proxy_protocol_server_addr:$proxy_protocol_server_port\";";
    let _nginx = nginx_with(&nginx, &dir, &format!("listen {addr} proxy_protocol;\n    location / {{ {says} }}"));
    let url = format!("http://{}/", pair.at(RAW));
    let told = until("nginx answers", || match run(&curl, &["-sS", "-f", &url]) {
        (out, text) if out.status.success() => Ok(text),
        (_, text) => Err(text),
    });
    let caller = loopback_ip(LAST + 2);
    assert_eq!(told, format!("{caller} {addr}"));
    // Whoever comes without a header, as past the mesh, is refused by nginx itself.
    let (out, text) = run(&curl, &["-sS", "-f", &format!("http://{addr}/")]);
    assert!(!out.status.success(), "{text}");
}

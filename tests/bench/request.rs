//! One request through two agents of this process, over loopback with mutual TLS: app, caller's agent, tunnel, server's
//! agent, app, and back. First without any config entry, then with every kind of entry of which no rule is about the
//! request, then without them again: what the first and the last differ by is noise.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use criterion::Criterion;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use weft::clock;
use weft::config::{Config, IdentitySource, PolicyAuthority, Secret};
use weft::model::{NodeName, Protocol, ServiceRecord};
use weft::node::Node;
use weft::pki::{self, CaDir, TokenClaims};
use weft::registry::{ServiceDefinition, UpstreamDefinition};

/// The agents' addresses: loopback ones that no other agent of this host is likely to have.
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 90, 0, 1);
const CALLER: Ipv4Addr = Ipv4Addr::new(127, 90, 0, 2);
/// The caller's upstream port.
const UPSTREAM: SocketAddr = SocketAddr::new(IpAddr::V4(CALLER), 9_191);
/// How long the catalogue may take to spread at the start.
const PATIENCE: Duration = Duration::from_secs(30);

const REQUEST: &[u8] = b"GET /hello HTTP/1.1\r\nhost: web.weft\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Measures the latency of one request on one keep-alive HTTP/1.1 connection: `proxied_request`, `…/entries_unmatched`,
/// `…/entries_deleted`.
pub(crate) fn proxied_request(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let app = TcpListener::bind((SERVER, 0)).expect("a free port");
    let web = service("web", app.local_addr().expect("it is bound"), Vec::new());
    std::thread::spawn(move || serve(&app));
    let destination = "web".parse().expect("a valid name");
    let upstream = UpstreamDefinition { destination, bind: UPSTREAM, protocol: Some(Protocol::Http) };
    let caller = service("caller", SocketAddr::from((CALLER, 1)), vec![upstream]);

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let ca = CaDir::init(&dir.path().join("ca"), &"bench.weft".parse().expect("a valid domain"), clock::wall())
        .expect("a fresh CA");
    let mut server = config("server", SERVER, web);
    server.identity =
        IdentitySource::Issuer { dir: ca.path().join("issuer-1"), serve: "*".parse().expect("a valid scope") };
    let operator = dir.path().join("bench.operator");
    let may = "intentions,config".parse().expect("valid rights");
    ca.create_operator(
        &"bench".parse().expect("a valid name"),
        &may,
        Duration::from_hours(1),
        &operator,
        clock::wall(),
    )
    .expect("the root key is there");
    server.policy_authority = PolicyAuthority::File(operator);
    let api = server.http_addr.expect("-dev has a port for its API");
    let apis = [api, SocketAddr::from((CALLER, api.port()))];
    let mut client = config("client", CALLER, caller);
    client.join = vec![server.mesh_bind.to_string()];
    client.identity = IdentitySource::Token(Secret::new(token(&ca)));
    let nodes = [start(&runtime, server), start(&runtime, client)];

    let mut connection = Connection::open();
    let mut measure = |name: &str| {
        c.bench_function(name, |bencher| {
            bencher.iter(|| connection.request().expect("a keep-alive connection answers"));
        });
    };
    measure("proxied_request");
    for entry in entries() {
        ask(apis[0], "PUT", "/v1/config", &entry.to_string());
    }
    for api in apis {
        wait_chain(api, |chain| chain.contains(NEVER));
    }
    measure("proxied_request/entries_unmatched");
    for entry in entries().iter().rev() {
        let [kind, name] = ["Kind", "Name"].map(|key| entry.get(key).and_then(Value::as_str).expect("each has it"));
        ask(apis[0], "DELETE", &format!("/v1/config/{kind}/{name}"), "");
    }
    for api in apis {
        wait_chain(api, |chain| !chain.contains(NEVER));
    }
    measure("proxied_request/entries_deleted");
    drop(connection);
    for node in nodes {
        node.shutdown();
        runtime.block_on(node.run_until_stopped()).expect("it stops in peace");
    }
}

/// The last one of the routes that match nothing.
const NEVER: &str = "/never/19";

/// Entries of every kind; none is about the request but a split to all of it and limits far above it.
fn entries() -> [Value; 7] {
    let route = |at: usize| {
        let http = match at % 4 {
            0 => json!({"PathExact": format!("/never/{at}")}),
            1 => json!({"PathPrefix": "/", "Header": [{"Name": "x-never", "Exact": at.to_string()}]}),
            2 => json!({"PathRegex": format!("/never/[0-9]+/{at}"), "Methods": ["GET", "PUT"]}),
            _ => json!({"PathPrefix": format!("/never/{at}"), "QueryParam": [{"Name": "never", "Present": true}]}),
        };
        let retried = json!({"NumRetries": 3, "RetryOn": ["5xx"], "RequestTimeout": "5s", "PerTryTimeout": "1s",
            "Hedge": {"Delay": "50ms"}, "Mirror": {"Service": "caller"}});
        json!({"Match": {"HTTP": http}, "Destination": retried})
    };
    let never = json!({"HTTP": {"PathPrefix": "/never/"}});
    [
        json!({"Kind": "proxy-defaults", "Name": "global", "TrustedHops": ["192.0.2.0/24"]}),
        json!({"Kind": "service-defaults", "Name": "web", "Protocol": "http", "RateLimits": {"InstanceLevel": {
            "RequestsPerSecond": 1_000_000, "Routes": [{"PathPrefix": "/never/", "RequestsPerSecond": 1}]}}}),
        json!({"Kind": "service-defaults", "Name": "caller", "Protocol": "http", "UpstreamConfig": {"Defaults": {
            "Limits": {"MaxConcurrentRequests": 500, "MaxRequestsPerInstance": 400},
            "PassiveHealthCheck": {"MaxFailures": 3}}}}),
        json!({"Kind": "service-resolver", "Name": "web", "ConnectTimeout": "5s",
            "Subsets": {"never": {"Filter": "Service.Meta.version == never"}},
            "Failover": {"never": {"Service": "caller"}}}),
        json!({"Kind": "service-splitter", "Name": "web", "Splits": [{"Weight": 100}]}),
        json!({"Kind": "service-router", "Name": "web", "Routes": (0..20).map(route).collect::<Vec<Value>>()}),
        json!({"Kind": "service-faults", "Name": "web", "Faults": [
            {"Match": never, "Delay": {"Duration": "1s"}}, {"Match": never, "Abort": {"HTTPStatus": 503}}]}),
    ]
}

/// Waits until the chain of `web` is as wanted.
fn wait_chain(api: SocketAddr, is_wanted: impl Fn(&str) -> bool) {
    let until = clock::now() + PATIENCE;
    while !is_wanted(&ask(api, "GET", "/v1/discovery-chain/web", "")) {
        assert!(clock::now() < until, "what was written does not spread");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks an agent's API; returns the answer, which must be 200.
fn ask(api: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(api).expect("the API listens");
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: {api}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(&[request.as_bytes(), body.as_bytes()].concat()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in text");
    assert!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
    answer
}

fn service(name: &str, app_addr: SocketAddr, upstreams: Vec<UpstreamDefinition>) -> ServiceDefinition {
    ServiceDefinition {
        record: ServiceRecord {
            port: app_addr.port(),
            protocol: Protocol::Http,
            ..ServiceRecord::new(name.parse().expect("a valid id"), name.parse().expect("a valid name"))
        },
        socket_path: String::new(),
        app_addr,
        upstreams,
        sidecar: false,
        native: false,
        checks: Vec::new(),
    }
}

fn config(node: &str, ip: Ipv4Addr, service: ServiceDefinition) -> Config {
    let name: NodeName = node.parse().expect("a valid name");
    let mut config = Config::dev(name, ip.into());
    config.shared_http_addr = None;
    config.dns = None;
    config.services = vec![service];
    config
}

fn token(ca: &CaDir) -> String {
    let claims = TokenClaims {
        id: [1; 16],
        node: "client".parse().expect("a valid pattern"),
        serve: "caller".parse().expect("a valid scope"),
        not_after: clock::wall().plus(Duration::from_mins(10)),
        uses: 1,
    };
    pki::create_token(ca.path(), &claims).expect("the CA is whole").to_string()
}

fn start(runtime: &Runtime, config: Config) -> Node {
    runtime.block_on(Box::pin(Node::start(config))).expect("the addresses are free")
}

/// The app: answers each request of each connection with the same bytes.
fn serve(app: &TcpListener) {
    for stream in app.incoming() {
        let Ok(stream) = stream else { return };
        std::thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut held = Vec::new();
    loop {
        while !held.ends_with(b"\r\n\r\n") {
            more(&mut stream, &mut held)?;
        }
        held.clear();
        stream.write_all(RESPONSE)?;
    }
}

fn more(stream: &mut TcpStream, held: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4_096];
    let bytes = stream.read(&mut buffer)?;
    if bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    held.extend(buffer.iter().take(bytes));
    Ok(())
}

/// The caller's connection to its upstream port.
struct Connection {
    stream: TcpStream,
    held: Vec<u8>,
}

impl Connection {
    /// Connects until a request is answered.
    fn open() -> Self {
        let until = clock::now() + PATIENCE;
        loop {
            match Self::connect() {
                Ok(connection) => return connection,
                Err(error) if clock::now() > until => panic!("no answer through the mesh: {error}"),
                Err(_not_yet) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Connects and sends a first request.
    fn connect() -> io::Result<Self> {
        let stream = TcpStream::connect(UPSTREAM)?;
        stream.set_nodelay(true)?;
        let mut connection = Self { stream, held: Vec::new() };
        connection.request()?;
        Ok(connection)
    }

    /// Sends one request and reads its response.
    fn request(&mut self) -> io::Result<()> {
        self.stream.write_all(REQUEST)?;
        self.held.clear();
        while !self.held.ends_with(b"\r\n\r\nok") {
            more(&mut self.stream, &mut self.held)?;
            // A refusal ends otherwise.
            if self.held.len() > 12 && !self.held.starts_with(b"HTTP/1.1 200") {
                return Err(io::Error::other(String::from_utf8_lossy(&self.held).into_owned()));
            }
        }
        Ok(())
    }
}

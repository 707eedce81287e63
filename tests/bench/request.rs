//! One request through two agents of this process, over loopback with mutual TLS: app, caller's agent, tunnel, server's
//! agent, app, and back.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use criterion::Criterion;
use tokio::runtime::Runtime;
use weft::clock;
use weft::config::{Config, IdentitySource, Secret};
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

/// Measures the latency of one request on one keep-alive HTTP/1.1 connection.
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
    let mut client = config("client", CALLER, caller);
    client.join = vec![server.mesh_bind.to_string()];
    client.identity = IdentitySource::Token(Secret::new(token(&ca)));
    let nodes = [start(&runtime, server), start(&runtime, client)];

    let mut connection = Connection::open();
    c.bench_function("proxied_request", |bencher| {
        bencher.iter(|| connection.request().expect("a keep-alive connection answers"));
    });
    drop(connection);
    for node in nodes {
        node.shutdown();
        runtime.block_on(node.run_until_stopped()).expect("it stops in peace");
    }
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

//! Nodes of the data plane on loopback, with throw-away certificates.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::super::{ListenerState, ProxyHandle, Question, StartParams, WorkerView, start};
use super::within;
use crate::authz::{Action, Table};
use crate::catalogue::{LocalInstance, LocalView, Publisher, ServiceEntry, Snapshot, UpstreamListener};
use crate::clock::{self, UnixSeconds};
use crate::metrics::Metrics;
use crate::model::{
    Generation, HealthStatus, Instance, MemberStatus, NodeEntry, NodeInfo, NodeName, Protocol, ServiceName,
    ServiceRecord, SpiffeId,
};
use crate::pki::{PeerIdentity, Plane, Presented};
use crate::traffic::{Entries, Ready, Resolved, Traffic};
use crate::transport::{ClientTls, Credentials, bind, client_config};
use crate::upstream;

/// Long enough for what is open to end by itself.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Where an instance of `web` is said to be: node, its mesh address, instance id.
pub(super) type Place<'a> = (&'a str, SocketAddr, &'a str);

/// Node `a` calls service `web`, of which node `b` has the instance `web-1`.
pub(super) struct Mesh {
    pub(super) a: Node,
    pub(super) b: Node,
    pub(super) app: TcpListener,
    pub(super) upstream: SocketAddr,
}

impl Mesh {
    pub(super) async fn start() -> Self {
        Self::start_with(&Authority::new(), "*", |_| Vec::new()).await
    }

    /// Starts both nodes; `b` may serve `scope`, and `more` adds instances to it and returns those of other nodes.
    pub(super) async fn start_with(
        authority: &Arc<Authority>,
        scope: &str,
        more: impl FnOnce(&mut LocalView) -> Vec<Place<'static>>,
    ) -> Self {
        Self::start_on(2, authority, scope, more).await
    }

    /// Starts both nodes with one worker each; what is open is cut `drain_timeout` after the drain began.
    pub(super) async fn start_draining_within(drain_timeout: Duration) -> Self {
        Self::start_as((1, drain_timeout), &Authority::new(), "*", |_| Vec::new()).await
    }

    /// As [`Mesh::start_with`], with so many workers on each node.
    pub(super) async fn start_on(
        workers: usize,
        authority: &Arc<Authority>,
        scope: &str,
        more: impl FnOnce(&mut LocalView) -> Vec<Place<'static>>,
    ) -> Self {
        Self::start_as((workers, DRAIN_TIMEOUT), authority, scope, more).await
    }

    /// The same, with so long a drain as well.
    pub(super) async fn start_as(
        how: (usize, Duration),
        authority: &Arc<Authority>,
        scope: &str,
        more: impl FnOnce(&mut LocalView) -> Vec<Place<'static>>,
    ) -> Self {
        let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut local = LocalView::default();
        serve(&mut local, "web-1", app.local_addr().unwrap());
        let mut places: Vec<Place<'_>> = more(&mut local);
        let ids: Vec<String> = local.instances.keys().map(ToString::to_string).collect();
        let b = Node::start_on(how, authority, "b", scope, local);
        places.extend(ids.iter().map(|id| ("b", b.addr, id.as_str())));
        let upstream = free_port();
        let a = Node::start_on(how, authority, "a", "*", upstreams(&[upstream]));
        a.publish(&[upstream], &places);
        a.sees(upstream, |state| state == Some(&ListenerState::Listening)).await;
        Self { a, b, app, upstream }
    }

    /// Returns both ends of a connection.
    pub(super) async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = within(TcpStream::connect(self.upstream)).await.unwrap();
        let (app, _) = within(self.app.accept()).await.unwrap();
        (client, app)
    }

    pub(super) async fn stop(self) {
        within(self.a.handle.shutdown()).await;
        within(self.b.handle.shutdown()).await;
    }
}

/// Adds an instance of `web`.
pub(super) fn serve(local: &mut LocalView, id: &str, app_addr: SocketAddr) {
    // An id says that its app asks for the header.
    let wants_proxy_header = id.ends_with("-announced");
    let instance = LocalInstance { service: name("web"), app_addr, protocol: Protocol::Tcp, wants_proxy_header };
    local.instances.insert(id.parse().unwrap(), instance);
}

/// Ports through which `app` calls `web`.
pub(super) fn upstreams(ports: &[SocketAddr]) -> LocalView {
    let upstream = |bind: &SocketAddr| UpstreamListener {
        bind: *bind,
        source: name("app"),
        destination: name("web"),
        protocol: None,
    };
    LocalView { upstreams: ports.iter().map(upstream).collect(), ..LocalView::default() }
}

pub(super) struct Node {
    pub(super) handle: ProxyHandle,
    pub(super) addr: SocketAddr,
    metrics: Metrics,
    publisher: Publisher,
}

impl Node {
    pub(super) fn start(authority: &Arc<Authority>, node: &str, scope: &str, local: LocalView) -> Self {
        Self::start_on((2, DRAIN_TIMEOUT), authority, node, scope, local)
    }

    fn start_on(
        (workers, drain_timeout): (usize, Duration),
        authority: &Arc<Authority>,
        node: &str,
        scope: &str,
        local: LocalView,
    ) -> Self {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), workers).unwrap();
        let first = Snapshot { index: 1, local: Arc::new(local), ..Snapshot::empty(node.parse().unwrap()) };
        let publisher = Publisher::new(Arc::new(first));
        let metrics = Metrics::new();
        let params = StartParams {
            live: crate::transport::LiveConnections::default(),
            tracer: None,
            sockets: bound.workers,
            reset_key: [7; 64],
            snapshot: publisher.reader(),
            shared_http: None,
            stop: CancellationToken::new(),
            drain_timeout,
            listener_retry: Duration::from_millis(20),
            credentials: Arc::new(authority.certify(node, scope)),
        };
        let handle = start(params, &metrics).unwrap();
        Self { handle, addr: bound.addr, metrics, publisher }
    }

    /// Publishes a snapshot with these upstream ports and instances.
    pub(super) fn publish(&self, ports: &[SocketAddr], places: &[Place<'_>]) {
        self.publish_local(upstreams(ports), places);
    }

    /// Publishes a snapshot with this local view and these instances.
    pub(super) fn publish_local(&self, local: LocalView, places: &[Place<'_>]) {
        let before = self.publisher.reader().load();
        let instances = places.iter().map(|(node, addr, id)| instance(node, *addr, id)).collect();
        let index = before.index + 1;
        let entry = ServiceEntry { name: name("web"), protocol: Protocol::Tcp, instances, modify_index: index };
        let services = BTreeMap::from([(name("web"), Arc::new(entry))]);
        let local = Arc::new(local);
        self.publisher.publish(Arc::new(Snapshot { index, services, local, ..Snapshot::clone(&before) }));
    }

    /// Publishes config entries: kind, name, JSON.
    pub(super) fn say(&self, list: &[(&str, &str, serde_json::Value)]) {
        let before = self.publisher.reader().load();
        let mut entries = Entries::default();
        for (kind, name, value) in list {
            entries.add(kind, name, Ready::new(kind, value).unwrap());
            upstream::check(kind, value).unwrap();
        }
        let traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        let upstreams = Arc::new(upstream::table(list.iter().map(|(kind, name, value)| (*kind, *name, value))));
        let index = before.index + 1;
        self.publisher.publish(Arc::new(Snapshot { index, upstreams, traffic, ..Snapshot::clone(&before) }));
    }

    /// The config entries that are in force.
    pub(super) fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.publisher.reader().load().traffic)
    }

    /// Publishes what the membership says of a node.
    pub(super) fn hears_of(&self, node: &str, mesh_addr: SocketAddr, status: MemberStatus) {
        let before = self.publisher.reader().load();
        let mut nodes = before.nodes.clone();
        nodes.insert(node.parse().unwrap(), Arc::new(NodeEntry { status, ..entry(node, mesh_addr) }));
        let index = before.index + 1;
        self.publisher.publish(Arc::new(Snapshot { index, nodes, ..Snapshot::clone(&before) }));
    }

    /// Publishes who may call whom.
    pub(super) fn decide(&self, default: Action) {
        let before = self.publisher.reader().load();
        let (index, policy) = (before.index + 1, Arc::new(Table::empty(default)));
        self.publisher.publish(Arc::new(Snapshot { index, policy, ..Snapshot::clone(&before) }));
    }

    /// Waits until what the workers know of calls from `app` to `web` is as wanted.
    pub(super) async fn knows(&self, is_wanted: impl Fn(&WorkerView) -> bool) {
        let to = Entries::default().chain(&name("web")).unwrap().stream;
        self.knows_of((name("web"), to), is_wanted).await;
    }

    /// The same, of calls to a name that leads there.
    pub(super) async fn knows_of(
        &self,
        (destination, to): (ServiceName, Arc<Resolved>),
        is_wanted: impl Fn(&WorkerView) -> bool,
    ) {
        let question = Question { source: Some(name("app")), destination, to };
        within(async { while !self.handle.inspector().ask(&question).await.iter().any(&is_wanted) {} }).await;
    }

    /// Waits until the state of `port` is as wanted.
    pub(super) async fn sees(&self, port: SocketAddr, is_wanted: impl Fn(Option<&ListenerState>) -> bool) {
        let mut listeners = self.handle.listeners();
        within(listeners.wait_for(|ports| is_wanted(ports.get(&port)))).await.unwrap();
    }

    /// Waits until the sum of [`Node::count`] is `wanted`: what is counted at the end of a connection comes a little late.
    pub(super) async fn counts(&self, name: &str, labels: &[&str], wanted: u64) {
        within(async {
            while self.count(name, labels) != wanted {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Returns the sum of the series whose line begins with `name` and has all of `labels`.
    pub(super) fn count(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.metrics.render().unwrap();
        let lines =
            text.lines().filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }
}

/// An endpoint that dials as node `node`, to do what no agent does.
pub(super) fn stranger(authority: &Arc<Authority>, node: &str) -> quinn::Endpoint {
    let tls = authority.certify(node, "*").client(Plane::Tunnel, None, None).unwrap();
    let mut endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    endpoint.set_default_client_config(client_config(Plane::Tunnel, tls.config).unwrap());
    endpoint
}

/// A node that lets others in, and gives their tunnels no stream.
pub(super) fn full(authority: &Arc<Authority>, node: &str) -> quinn::Endpoint {
    host(authority, node, 0)
}

/// A node that lets others in, and gives their tunnels so many streams.
pub(super) fn host(authority: &Arc<Authority>, node: &str, streams: u32) -> quinn::Endpoint {
    let tls = authority.certify(node, "*").server(Plane::Tunnel).unwrap();
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
    let mut transport = quinn::TransportConfig::default();
    transport.max_concurrent_bidi_streams(streams.into());
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    quinn::Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).unwrap()
}

/// A member that lives.
fn entry(node: &str, mesh_addr: SocketAddr) -> NodeEntry {
    let info = NodeInfo {
        id: String::new(),
        name: node.parse().unwrap(),
        mesh_addr,
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: String::new(),
        issuer: false,
    };
    NodeEntry {
        info: info.into(),
        status: MemberStatus::Alive,
        generation: Generation { number: 1, nonce: 1 },
        checks: Vec::new(),
        external: None,
        create_index: 1,
        modify_index: 1,
    }
}

/// An instance of `web` that passes.
fn instance(node: &str, mesh_addr: SocketAddr, id: &str) -> Arc<Instance> {
    let record = ServiceRecord { port: 80, ..ServiceRecord::new(id.parse().unwrap(), name("web")) };
    let (node, record, status) = (Arc::new(entry(node, mesh_addr)), Arc::new(record), HealthStatus::Passing);
    Arc::new(Instance { node, record, checks: Box::default(), status, create_index: 1, modify_index: 1 })
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// A port that nobody listens on.
pub(super) fn free_port() -> SocketAddr {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

/// A CA of the test, and who it has certified.
#[derive(Debug)]
pub(super) struct Authority {
    issuer: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
    known: Mutex<HashMap<Vec<u8>, PeerIdentity>>,
}

#[derive(Debug)]
struct TestCredentials {
    authority: Arc<Authority>,
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Authority {
    pub(super) fn new() -> Arc<Self> {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        Arc::new(Self { issuer, known: Mutex::default() })
    }

    fn certify(self: &Arc<Self>, node: &str, scope: &str) -> TestCredentials {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["mesh.weft".to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let node: NodeName = node.parse().unwrap();
        let id = SpiffeId::Node { trust_domain: "test.example".parse().unwrap(), node: node.clone() };
        let not_after = clock::wall().plus(Duration::from_hours(1));
        let peer = PeerIdentity { id, node, scope: scope.parse().unwrap(), not_after };
        self.known.lock().unwrap().insert(leaf.der().to_vec(), peer);
        TestCredentials { authority: Arc::clone(self), chain: vec![leaf.der().clone()], key: key.serialize_der() }
    }

    fn roots(&self) -> Arc<rustls::RootCertStore> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        Arc::new(roots)
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl TestCredentials {
    fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}

impl Credentials for TestCredentials {
    fn server(&self, _plane: Plane) -> Result<Arc<rustls::ServerConfig>, String> {
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(self.authority.roots(), provider()).build();
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.unwrap())
            .with_single_cert(self.chain.clone(), self.key())
            .unwrap();
        config.alpn_protocols = vec![b"weft-tunnel/1".to_vec()];
        Ok(Arc::new(config))
    }

    fn client(
        &self,
        _plane: Plane,
        _source: Option<&ServiceName>,
        _expect: Option<NodeName>,
    ) -> Result<ClientTls, String> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.authority.roots())
            .with_client_auth_cert(self.chain.clone(), self.key())
            .unwrap();
        config.alpn_protocols = vec![b"weft-tunnel/1".to_vec()];
        Ok(ClientTls { config: Arc::new(config), not_after: UnixSeconds(u64::MAX) })
    }

    fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<(PeerIdentity, Option<Presented>), String> {
        let leaf = chain.first().ok_or("no leaf")?;
        let known = self.authority.known.lock().unwrap().get(leaf.as_ref()).cloned();
        known.map(|peer| (peer, None)).ok_or_else(|| "unknown".to_owned())
    }
}

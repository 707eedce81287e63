//! Two nodes on loopback, with throw-away certificates: an app's connection goes through both.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::{ListenerState, ProxyHandle, StartParams, start};
use crate::catalogue::{
    Instance, LocalInstance, LocalView, NodeEntry, Publisher, ServiceEntry, Snapshot, UpstreamListener,
};
use crate::clock::{self, UnixSeconds};
use crate::metrics::Metrics;
use crate::model::{
    Generation, HealthStatus, MemberStatus, NodeInfo, NodeName, Protocol, ServiceName, ServiceRecord, SpiffeId, Weights,
};
use crate::pki::{PeerIdentity, Plane};
use crate::transport::{ClientTls, Credentials, bind};

#[tokio::test]
async fn each_side_may_end_first_and_the_other_direction_goes_on() {
    let mesh = Mesh::start("*").await;
    for client_first in [true, false] {
        let (mut client, mut app) = mesh.connect().await;
        let (first, second) = if client_first { (&mut client, &mut app) } else { (&mut app, &mut client) };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(read_all(second).await.unwrap(), b"question");
        second.write_all(b"answer").await.unwrap();
        second.shutdown().await.unwrap();
        assert_eq!(read_all(first).await.unwrap(), b"answer");
    }
    assert!(mesh.text().contains("weft_tcp_received_bytes_total{destination_service=\"web\",reporter=\"source\""));
    mesh.stop().await;
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let mesh = Mesh::start("*").await;
    let (mut client, mut app) = mesh.connect().await;
    app.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    within(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_of_one_side_is_a_reset_of_the_other() {
    let mesh = Mesh::start("*").await;
    for client_resets in [true, false] {
        for half_closed in [false, true] {
            let (mut client, mut app) = mesh.connect().await;
            let (resets, sees) = if client_resets { (&mut client, &mut app) } else { (&mut app, &mut client) };
            resets.write_all(b"x").await.unwrap();
            within(sees.read_exact(&mut [0])).await.unwrap();
            if half_closed {
                // The side that is to see the reset has sent its FIN and waits for the answer.
                sees.shutdown().await.unwrap();
                assert_eq!(within(resets.read(&mut [0])).await.unwrap(), 0);
            }
            reset(if client_resets { &client } else { &app });
            let mut sees = if client_resets {
                drop(client);
                app
            } else {
                drop(app);
                client
            };
            let error = read_all(&mut sees).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{client_resets} {half_closed}");
        }
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_instance_whose_app_is_gone_is_passed_over() {
    let mesh = Mesh::start_with("*", Layout::OneDead).await;
    for _ in 0..6 {
        let (mut client, mut app) = mesh.connect().await;
        app.write_all(b"!").await.unwrap();
        within(client.read_exact(&mut [0])).await.unwrap();
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_outside_its_scope_is_refused() {
    let mesh = Mesh::start("api-*").await;
    let mut client = within(TcpStream::connect(mesh.upstream)).await.unwrap();
    let error = read_all(&mut client).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    mesh.stop().await;
}

#[tokio::test]
async fn a_port_that_another_program_has_is_told() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let node = Node::start(&Authority::new(), "a", "*", |_| {}, &[taken.local_addr().unwrap()]);
    let mut listeners = node.handle.listeners();
    let shown = within(listeners.wait_for(|ports| !ports.is_empty())).await.unwrap().clone();
    let state = shown.values().next().unwrap();
    assert!(matches!(state, ListenerState::Failed(why) if why.contains("in use")), "{state:?}");
    node.handle.shutdown().await;
}

#[tokio::test]
async fn a_connection_that_is_open_ends_in_peace_while_the_agent_drains() {
    let mesh = Mesh::start("*").await;
    let (mut client, mut app) = mesh.connect().await;
    let (source, server) = (mesh.a.handle.drain.clone(), mesh.b.handle.drain.clone());
    source.cancel();
    server.cancel();
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut app).await.unwrap(), b"late");
    app.write_all(b"reply").await.unwrap();
    drop(app);
    assert_eq!(read_all(&mut client).await.unwrap(), b"reply");
    mesh.stop().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn bytes_arrive_whole_and_in_order_however_they_are_cut(
        up in proptest::collection::vec(1_usize..120_000, 1..12),
        down in proptest::collection::vec(1_usize..120_000, 1..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mesh = Mesh::start("*").await;
            let (client, app) = mesh.connect().await;
            let (mut client_in, mut client_out) = client.into_split();
            let (mut app_in, mut app_out) = app.into_split();
            let (_, _, at_app, at_client) = tokio::join!(
                send(&mut client_out, &up),
                send(&mut app_out, &down),
                read_all(&mut app_in),
                read_all(&mut client_in),
            );
            assert!(at_app.unwrap() == pattern(up.iter().sum()));
            assert!(at_client.unwrap() == pattern(down.iter().sum()));
            mesh.stop().await;
        });
    }
}

/// Bytes whose value depends on their place.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(31) ^ (at >> 8)) as u8).collect()
}

async fn send(out: &mut (impl AsyncWriteExt + Unpin), chunks: &[usize]) {
    let bytes = pattern(chunks.iter().sum());
    let mut rest = &bytes[..];
    for chunk in chunks {
        let (head, tail) = rest.split_at(*chunk);
        out.write_all(head).await.unwrap();
        rest = tail;
    }
    out.shutdown().await.unwrap();
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends in time")
}

async fn read_all(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    within(stream.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

/// Makes the next close send an RST.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    OneAlive,
    OneDead,
}

/// Node `a` calls service `web` on node `b`.
struct Mesh {
    a: Node,
    b: Node,
    app: TcpListener,
    upstream: SocketAddr,
}

impl Mesh {
    async fn start(scope_of_b: &str) -> Self {
        Self::start_with(scope_of_b, Layout::OneAlive).await
    }

    async fn start_with(scope_of_b: &str, layout: Layout) -> Self {
        let authority = Authority::new();
        let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let app_addr = app.local_addr().unwrap();
        let mut apps = vec![("web-1", app_addr)];
        if layout == Layout::OneDead {
            apps.push(("web-2", free_port()));
        }
        let b = Node::start(
            &authority,
            "b",
            scope_of_b,
            |local| {
                for (id, app_addr) in &apps {
                    let service = name("web");
                    let instance = LocalInstance { service, app_addr: *app_addr, protocol: Protocol::Tcp };
                    local.instances.insert(id.parse().unwrap(), instance);
                }
            },
            &[],
        );
        let upstream = free_port();
        let a = Node::start(&authority, "a", "*", |_| {}, &[upstream]);
        a.publish_service(b.addr, &apps);
        let mut listeners = a.handle.listeners();
        let is_open = |state: Option<&ListenerState>| state == Some(&ListenerState::Listening);
        within(listeners.wait_for(|ports| is_open(ports.get(&upstream)))).await.unwrap();
        Self { a, b, app, upstream }
    }

    /// Returns both ends of a connection.
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = within(TcpStream::connect(self.upstream)).await.unwrap();
        let (app, _) = within(self.app.accept()).await.unwrap();
        (client, app)
    }

    fn text(&self) -> String {
        self.a.metrics.render().unwrap()
    }

    async fn stop(self) {
        within(self.a.handle.shutdown()).await;
        within(self.b.handle.shutdown()).await;
    }
}

struct Node {
    handle: ProxyHandle,
    addr: SocketAddr,
    metrics: Metrics,
    publisher: Publisher,
    first: Snapshot,
}

impl Node {
    fn start(
        authority: &Arc<Authority>,
        node: &str,
        scope: &str,
        fill: impl FnOnce(&mut LocalView),
        upstreams: &[SocketAddr],
    ) -> Self {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), 2).unwrap();
        let upstream = |bind: &SocketAddr| UpstreamListener {
            bind: *bind,
            source: name("app"),
            destination: name("web"),
            protocol: None,
        };
        let mut local = LocalView { upstreams: upstreams.iter().map(upstream).collect(), instances: BTreeMap::new() };
        fill(&mut local);
        let first = Snapshot {
            index: 1,
            local_node: node.parse().unwrap(),
            nodes: BTreeMap::new(),
            services: BTreeMap::new(),
            gone_services: BTreeMap::new(),
            local: Arc::new(local),
        };
        let publisher = Publisher::new(Arc::new(first.clone()));
        let metrics = Metrics::new();
        let params = StartParams {
            sockets: bound.workers,
            reset_key: [7; 64],
            snapshot: publisher.reader(),
            shared_http: None,
            stop: CancellationToken::new(),
            drain_timeout: Duration::from_secs(5),
            credentials: Arc::new(authority.certify(node, scope)),
        };
        let handle = start(params, &metrics).unwrap();
        Self { handle, addr: bound.addr, metrics, publisher, first }
    }

    fn publish_service(&self, mesh_addr: SocketAddr, apps: &[(&str, SocketAddr)]) {
        let info = NodeInfo {
            id: String::new(),
            name: "b".parse().unwrap(),
            mesh_addr,
            datacenter: "dc1".to_owned(),
            meta: BTreeMap::new(),
            build: String::new(),
            issuer: false,
        };
        let node = Arc::new(NodeEntry {
            info,
            status: MemberStatus::Alive,
            generation: Generation { number: 1, nonce: 1 },
            checks: Vec::new(),
            create_index: 1,
            modify_index: 1,
        });
        let instance = |(id, _): &(&str, SocketAddr)| {
            let record = ServiceRecord {
                id: id.parse().unwrap(),
                name: name("web"),
                kind: String::new(),
                tags: Vec::new(),
                meta: BTreeMap::new(),
                address: String::new(),
                port: 80,
                tagged_addresses: BTreeMap::new(),
                weights: Weights::default(),
                protocol: Protocol::Tcp,
                enable_tag_override: false,
            };
            let status = HealthStatus::Passing;
            Arc::new(Instance {
                node: Arc::clone(&node),
                record,
                checks: vec![],
                status,
                create_index: 1,
                modify_index: 1,
            })
        };
        let instances = apps.iter().map(instance).collect();
        let entry = ServiceEntry { name: name("web"), protocol: Protocol::Tcp, instances, modify_index: 1 };
        let services = BTreeMap::from([(name("web"), Arc::new(entry))]);
        self.publisher.publish(Arc::new(Snapshot { index: 2, services, ..self.first.clone() }));
    }
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

/// A CA of the test, and who it has certified.
#[derive(Debug)]
struct Authority {
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
    fn new() -> Arc<Self> {
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
        let not_after = clock::wall().plus(Duration::from_secs(3600));
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

    fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, String> {
        let leaf = chain.first().ok_or("no leaf")?;
        self.authority.known.lock().unwrap().get(leaf.as_ref()).cloned().ok_or_else(|| "unknown".to_owned())
    }
}

//! Fakes of what the API talks to, and a client without a socket.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::held::Room;
use super::index::ListIndexes;
use super::meter::Meter;
use super::near::Distances;
use super::seam::{GossipOrder, Membership, Records, Registry, RegistryOrder};
use super::watchers::{self, Watchers};
use super::{
    ApiConfig, ApiToken, CertificateFacts, HttpsConfig, ListenerState, NodeFacts, Right, Shared, guard, routes,
};
use crate::catalogue::{Publisher, ServiceEntry, Snapshot};
use crate::clock::{self, UnixSeconds};
use crate::gossip::{
    Answer as RecordsAnswer, DocumentsView, GossipError, MemberView, Members, NodeCertificates, OfferError,
    SharedError, Space, Spread, Write,
};
use crate::lww::{Keep, Limits, Scope, Table};
use crate::metrics::Metrics;
use crate::model::{
    CheckRecord, Generation, HealthStatus, Instance, MemberStatus, NodeEntry, NodeInfo, NodeName, Protocol,
    ServiceRecord,
};
use crate::pki::{Identity, ephemeral};
use crate::policy::{Document, Offered};
use crate::registry::{
    CheckDefinition, LocalCheck, LocalService, LocalState, Probe, RegistryError, ServiceDefinition, UpstreamDefinition,
};

/// A registry that remembers its orders and answers each with `verdict`.
pub(super) struct FakeRegistry {
    pub(super) state: watch::Sender<Arc<LocalState>>,
    pub(super) orders: Mutex<Vec<RegistryOrder>>,
    pub(super) verdict: Mutex<Result<(), RegistryError>>,
}

impl Registry for FakeRegistry {
    fn state(&self) -> Arc<LocalState> {
        Arc::clone(&self.state.borrow())
    }

    fn subscribe(&self) -> watch::Receiver<Arc<LocalState>> {
        self.state.subscribe()
    }

    fn carry_out(&self, order: RegistryOrder) -> BoxFuture<'_, Result<(), RegistryError>> {
        self.orders.lock().unwrap().push(order);
        let verdict = self.verdict.lock().unwrap().clone();
        Box::pin(async move { verdict })
    }
}

/// A membership that remembers its orders and answers each with `verdict`.
pub(super) struct FakeMembers {
    pub(super) members: Members,
    pub(super) orders: Mutex<Vec<GossipOrder>>,
    pub(super) verdict: Mutex<Result<(), GossipError>>,
    /// Whose round trips were asked for.
    pub(super) asked: Mutex<Vec<NodeName>>,
}

impl Membership for FakeMembers {
    fn members(&self) -> Arc<Members> {
        Arc::new(self.members.clone())
    }

    fn carry_out(&self, order: GossipOrder) -> BoxFuture<'_, Result<(), GossipError>> {
        self.orders.lock().unwrap().push(order);
        let verdict = self.verdict.lock().unwrap().clone();
        Box::pin(async move { verdict })
    }

    fn offer(&self, document: Vec<u8>) -> BoxFuture<'_, Result<Spread, OfferError>> {
        let spread = Document::from_bytes(&document).map(|document| Spread {
            digest: document.digest(),
            offered: Offered::Stored,
            confirmed: 2,
            alive: 2,
        });
        Box::pin(async move { Ok(spread?) })
    }

    fn documents(&self) -> Arc<DocumentsView> {
        Arc::default()
    }

    fn round_trips(&self) -> BoxFuture<'_, Result<BTreeMap<NodeName, Duration>, GossipError>> {
        Box::pin(async { Ok(BTreeMap::from([("n2".parse().unwrap(), Duration::from_millis(3))])) })
    }

    /// `n2` is nearest to `n3`; nobody else can be asked.
    fn round_trips_of(
        &self,
        peer: NodeName,
    ) -> BoxFuture<'_, Result<Option<BTreeMap<NodeName, Duration>>, GossipError>> {
        let measured = [("n3", 1), ("n0", 5), ("n1", 9)];
        let told = measured.map(|(node, millis)| (node.parse().unwrap(), Duration::from_millis(millis)));
        let told = (peer.as_str() == "n2").then(|| told.into());
        self.asked.lock().unwrap().push(peer);
        Box::pin(async move { Ok(told) })
    }

    fn certificates(&self) -> BoxFuture<'_, Result<Vec<NodeCertificates>, GossipError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn records_hash(&self) -> BoxFuture<'_, Result<u64, GossipError>> {
        Box::pin(async { Ok(0xab) })
    }
}

/// What all agents share, on this one alone: a key-value store of 1 MiB and the events.
pub(super) struct FakeRecords {
    tables: Mutex<BTreeMap<Space, Table>>,
    changes: watch::Sender<()>,
}

impl FakeRecords {
    fn new() -> Self {
        let limits = |space| Limits {
            bytes_max: 1024 * 1024,
            rows_max: if space == Space::Event { 256 } else { 1000 },
            key_bytes_max: 512,
            value_bytes_max: 512 * 1024,
            tombstones_max: 100,
            tombstone_lease_ms: 1_000_000,
            keep: if space == Space::Event { Keep::Newest } else { Keep::All },
        };
        let tables = Space::ALL.into_iter().map(|space| (space, Table::new(limits(space), 5))).collect();
        Self { tables: Mutex::new(tables), changes: watch::Sender::new(()) }
    }

    /// Turns the key-value store off.
    pub(super) fn turn_off(&self) {
        self.tables.lock().unwrap().remove(&Space::Kv);
    }

    fn index(&self, space: Space, scope: &Scope) -> u64 {
        self.tables.lock().unwrap().get(&space).map_or(u64::MAX, |table| table.index_of(scope))
    }
}

impl Records for FakeRecords {
    fn read(&self, space: Space, scope: Scope) -> BoxFuture<'_, Result<RecordsAnswer, SharedError>> {
        let tables = self.tables.lock().unwrap();
        let answer = tables.get(&space).ok_or(SharedError::Off).map(|table| RecordsAnswer {
            rows: table.read(&scope).map(|(key, row, _)| (Arc::clone(key), row.clone())).collect(),
            index: table.index_of(&scope),
            newest: table.index(),
        });
        Box::pin(async move { answer })
    }

    fn changed(&self, space: Space, scope: Scope, index: u64) -> BoxFuture<'_, Result<(), SharedError>> {
        let mut changes = self.changes.subscribe();
        Box::pin(async move {
            while self.index(space, &scope) <= index {
                changes.changed().await.map_err(|_| SharedError::Closed)?;
            }
            Ok(())
        })
    }

    fn write(&self, space: Space, write: Write) -> BoxFuture<'_, Result<(), SharedError>> {
        let (node, now_ms) = ("n1".parse().unwrap(), clock::wall_ms());
        let mut tables = self.tables.lock().unwrap();
        let written = tables.get_mut(&space).ok_or(SharedError::Off).and_then(|table| {
            match write {
                Write::Put { key, body } => drop(table.put(&key, body, &node, now_ms)?),
                Write::Delete(scope) => {
                    let keys: Vec<Arc<str>> = table.read(&scope).map(|(key, ..)| Arc::clone(key)).collect();
                    for key in keys {
                        drop(table.delete(&key, &node, now_ms)?);
                    }
                }
            }
            table.purge(now_ms);
            Ok(())
        });
        self.changes.send_replace(());
        Box::pin(async move { written })
    }
}

/// An API over fakes: two nodes, `web-1` of `web` on each, a TTL check on the first.
pub(super) struct Bench {
    pub(super) router: Router,
    pub(super) registry: Arc<FakeRegistry>,
    pub(super) members: Arc<FakeMembers>,
    pub(super) records: Arc<FakeRecords>,
    /// KiB.
    pub(super) room: Arc<tokio::sync::Semaphore>,
    pub(super) publisher: Publisher,
    pub(super) identity: Arc<Identity>,
    pub(super) leave: CancellationToken,
    pub(super) stop: CancellationToken,
    pub(super) metrics: Metrics,
    /// Ends with the bench.
    _tasks: JoinSet<()>,
}

/// An answer, read whole.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) text: String,
}

impl Answer {
    #[track_caller]
    pub(super) fn json(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        serde_json::from_str(&self.text).unwrap()
    }

    #[track_caller]
    pub(super) fn index(&self) -> u64 {
        self.headers["x-consul-index"].to_str().unwrap().parse().unwrap()
    }
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(None, 2)
    }

    pub(super) fn with(token: Option<&str>, blocking_queries_max: usize) -> Self {
        let tokens = token.map(|token| ApiToken::new(token, Right::Operator)).into_iter().collect();
        Self::with_tokens(tokens, blocking_queries_max)
    }

    pub(super) fn with_tokens(tokens: Vec<ApiToken>, blocking_queries_max: usize) -> Self {
        let registry = Arc::new(FakeRegistry {
            state: watch::Sender::new(Arc::new(local_state())),
            orders: Mutex::default(),
            verdict: Mutex::new(Ok(())),
        });
        let members = Arc::new(FakeMembers {
            members: members(),
            orders: Mutex::default(),
            verdict: Mutex::new(Ok(())),
            asked: Mutex::default(),
        });
        let records = Arc::new(FakeRecords::new());
        let publisher = Publisher::new(Arc::new(snapshot()));
        let (leave, stop) = (CancellationToken::new(), CancellationToken::new());
        let (metrics, identity) = (Metrics::new(), identity());
        let config = ApiConfig { listen: Vec::new(), https: None, socket: None, tokens, names: Vec::new() };
        let node = node_facts();
        let meter = Meter::new(&metrics).unwrap();
        let room = Arc::new(Room::new(meter.answers_refused.clone()));
        let places = Arc::clone(room.places());
        let shared = Shared {
            guard: guard::Guard::new(&config, &node.name),
            defaults_ip: "127.0.0.7".parse().unwrap(),
            registry: Arc::<FakeRegistry>::clone(&registry),
            membership: Arc::<FakeMembers>::clone(&members),
            records: Arc::<FakeRecords>::clone(&records),
            snapshot: publisher.reader(),
            certificates: Arc::new(certificates),
            authority: Arc::<Identity>::clone(&identity),
            token_uses: Arc::new(|| Ok(Vec::new())),
            policy_key: None,
            policy_writes: tokio::sync::Mutex::new(()),
            inspect: Arc::new(|_, _, _| Box::pin(async { Vec::new() })),
            reload: Arc::new(|| {
                Box::pin(async { Ok(vec!["workers changed: it takes a restart of the agent".to_owned()]) })
            }),
            listeners: Arc::new(|| {
                let text = str::to_owned;
                vec![ListenerState { bind: text("127.0.0.1:9191"), destination: text("db"), state: text("listening") }]
            }),
            meter,
            metrics: metrics.clone(),
            node,
            indexes: ListIndexes::default(),
            watchers: Watchers::default(),
            distances: Distances::default(),
            room,
            blocking_queries_max,
            leave: leave.clone(),
            stop: stop.clone(),
        };
        let shared = Arc::new(shared);
        let router = routes::router(&shared);
        let mut tasks = JoinSet::new();
        tasks.spawn(watchers::run(shared));
        Self {
            _tasks: tasks,
            router,
            registry,
            members,
            records,
            room: places,
            publisher,
            identity,
            leave,
            stop,
            metrics,
        }
    }

    pub(super) fn send(&self, request: Request<Body>) -> impl Future<Output = Answer> + Send + 'static + use<> {
        let service = TowerToHyperService::new(self.router.clone());
        async move {
            let response = service.call(request).await.unwrap();
            let (parts, body) = response.into_parts();
            let bytes = body.collect().await.unwrap().to_bytes();
            Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
        }
    }

    /// GET; the body is not read.
    pub(super) async fn open(&self, uri: &str) -> axum::response::Response {
        let request = Request::builder().uri(uri).body(Body::empty()).unwrap();
        TowerToHyperService::new(self.router.clone()).call(request).await.unwrap()
    }

    pub(super) fn call(
        &self,
        method: Method,
        uri: &str,
        body: &str,
    ) -> impl Future<Output = Answer> + Send + 'static + use<> {
        self.send(Request::builder().method(method).uri(uri).body(Body::from(body.to_owned())).unwrap())
    }

    pub(super) fn get(&self, uri: &str) -> impl Future<Output = Answer> + Send + 'static + use<> {
        self.call(Method::GET, uri, "")
    }

    pub(super) fn put(&self, uri: &str, body: &str) -> impl Future<Output = Answer> + Send + 'static + use<> {
        self.call(Method::PUT, uri, body)
    }

    pub(super) fn orders(&self) -> Vec<RegistryOrder> {
        self.registry.orders.lock().unwrap().clone()
    }

    /// Publishes the newest snapshot, changed by `change`, under the next index; returns that.
    pub(super) fn publish(&self, change: impl FnOnce(&mut Snapshot)) -> u64 {
        let mut next = Snapshot::clone(&self.publisher.reader().load());
        next.index += 1;
        change(&mut next);
        let index = next.index;
        self.publisher.publish(Arc::new(next));
        index
    }
}

/// Runs `call` beside the test; aborted with it.
pub(super) fn tokio_test_task(call: impl Future<Output = Answer> + Send + 'static) -> tokio::task::JoinHandle<Answer> {
    #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
    tokio::spawn(call)
}

/// Tells whether `task` still waits after all others had their turn.
pub(super) async fn is_pending(task: &mut tokio::task::JoinHandle<Answer>) -> bool {
    tokio::time::timeout(std::time::Duration::from_millis(1), task).await.is_err()
}

/// A node that may serve `web`.
fn identity() -> Arc<Identity> {
    let now = clock::wall();
    let ca = ephemeral(&"prod.example".parse().unwrap(), now).unwrap();
    let own = ca.issuer().self_certify(&"n1".parse().unwrap(), &"web".parse().unwrap(), now).unwrap();
    Identity::new(own, now).unwrap()
}

fn certificates() -> CertificateFacts {
    CertificateFacts {
        trust_domain: "prod.example".to_owned(),
        spiffe_id: "spiffe://prod.example/node/n1".to_owned(),
        serve_scope: "web,api-*".to_owned(),
        node_ends: UnixSeconds(1_700_000_000),
        intermediate_ends: UnixSeconds(1_700_604_800),
    }
}

fn node_facts() -> NodeFacts {
    NodeFacts {
        id: "uuid-1".to_owned(),
        name: "n1".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        version: "0.1.0".to_owned(),
        revision: "abc".to_owned(),
        workers: 2,
        meta: BTreeMap::new(),
    }
}

fn info(number: u8) -> NodeInfo {
    NodeInfo {
        id: format!("uuid-{number}"),
        name: format!("n{number}").parse().unwrap(),
        mesh_addr: format!("10.0.0.{number}:8301").parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::from([("rack".to_owned(), format!("r{number}"))]),
        build: "0.1.0".to_owned(),
        issuer: number == 1,
    }
}

fn members() -> Members {
    let member = |number: u8, status| MemberView {
        name: format!("n{number}").parse().unwrap(),
        addr: format!("10.0.0.{number}:8301").parse().unwrap(),
        status,
        generation: Generation { number: 1, nonce: 1 },
        since: crate::clock::now(),
        forgotten_at: (number == 3).then(|| crate::clock::now() + std::time::Duration::from_hours(72)),
        info: (number < 3).then(|| Arc::new(info(number))),
    };
    let members = vec![member(1, MemberStatus::Alive), member(2, MemberStatus::Alive), member(3, MemberStatus::Failed)];
    Members { members, ..Members::default() }
}

pub(super) fn node_entry(number: u8, status: MemberStatus) -> Arc<NodeEntry> {
    Arc::new(NodeEntry {
        info: info(number).into(),
        status,
        generation: Generation { number: 1, nonce: 1 },
        checks: Vec::new(),
        external: None,
        create_index: 1000,
        modify_index: 1001,
    })
}

fn record() -> ServiceRecord {
    ServiceRecord {
        tags: ["v1".into(), "Blue".into()].into(),
        port: 8080,
        protocol: Protocol::Http,
        ..ServiceRecord::new("web-1".parse().unwrap(), "web".parse().unwrap())
    }
}

/// One service of one instance on each node in `nodes`, changed at `modify_index`.
pub(super) fn service(name: &str, nodes: &[Arc<NodeEntry>], status: HealthStatus, modify_index: u64) -> ServiceEntry {
    let instance = |node: &Arc<NodeEntry>| {
        let mut record = record();
        record.name = name.parse().unwrap();
        record.id = format!("{name}-1").parse().unwrap();
        let check = CheckRecord {
            id: format!("service:{name}-1").parse().unwrap(),
            name: "Service check".into(),
            status,
            notes: Box::default(),
            service: Some(record.id.clone()),
            kind: "ttl".into(),
        };
        let node = Arc::clone(node);
        let (record, checks) = (Arc::new(record), [Arc::new(check)].into());
        Arc::new(Instance { node, record, checks, status, create_index: 1002, modify_index })
    };
    let instances = nodes.iter().map(instance).collect();
    ServiceEntry { name: name.parse().unwrap(), protocol: Protocol::Http, instances, modify_index }
}

pub(super) fn snapshot() -> Snapshot {
    let nodes = [node_entry(1, MemberStatus::Alive), node_entry(2, MemberStatus::Alive)];
    let web = service("web", &nodes, HealthStatus::Passing, 1003);
    Snapshot {
        index: 1005,
        local_node: "n1".parse().unwrap(),
        nodes: nodes.iter().map(|node| (node.info.name.clone(), Arc::clone(node))).collect(),
        services: BTreeMap::from([(web.name.clone(), Arc::new(web))]),
        ..Snapshot::empty("n1".parse().unwrap())
    }
}

fn local_state() -> LocalState {
    let record = record();
    let check = CheckDefinition {
        id: "service:web-1".parse().unwrap(),
        name: "Service check".to_owned(),
        notes: String::new(),
        service: Some(record.id.clone()),
        probe: Probe::Ttl { ttl: std::time::Duration::from_secs(15) },
        initial: HealthStatus::Critical,
        success_before_passing: 0,
        failures_before_warning: 0,
        failures_before_critical: 0,
        output_bytes_max: 4096,
        deregister_critical_after: None,
    };
    let upstream = UpstreamDefinition {
        destination: "db".parse().unwrap(),
        bind: "127.0.0.1:9191".parse().unwrap(),
        protocol: None,
    };
    let definition = ServiceDefinition {
        record: record.clone(),
        socket_path: String::new(),
        app_addr: "127.0.0.1:8080".parse().unwrap(),
        upstreams: vec![upstream],
        sidecar: true,
        native: false,
        checks: vec![check.clone()],
    };
    let service = LocalService { definition, create_index: 1002, modify_index: 1003 };
    let local_check = LocalCheck {
        definition: Arc::new(check.clone()),
        status: HealthStatus::Passing,
        output: "all good".to_owned(),
        service_name: "web".to_owned(),
        service_tags: record.tags.clone(),
    };
    LocalState {
        services: BTreeMap::from([(record.id, Arc::new(service))]),
        checks: BTreeMap::from([(check.id, Arc::new(local_check))]),
        externals: BTreeMap::new(),
    }
}

/// Listens on a free port of loopback, without tokens.
pub(super) fn on_loopback(https: Option<HttpsConfig>) -> ApiConfig {
    ApiConfig {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        https,
        socket: None,
        tokens: Vec::new(),
        names: Vec::new(),
    }
}

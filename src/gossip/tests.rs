//! Whole agents' gossip over loopback, with certificates of a fresh CA.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;
use crate::catalogue::LocalView;
use crate::clock;
use crate::lww::{Row, Scope};
use crate::model::{Entry, EntryKey, Protocol, ServeScope, ServiceName, ServiceRecord};
use crate::pki::Plane;
use crate::policy::DocumentSet;
use crate::registry::Publication;

#[derive(Default)]
struct Kept(Mutex<Vec<StoredPeer>>);

impl PeerStore for Kept {
    fn save(&self, peers: Vec<StoredPeer>) {
        *self.0.lock().unwrap() = peers;
    }
}

/// What a node keeps of documents.
#[derive(Default)]
struct Documents(Mutex<BTreeMap<String, Vec<u8>>>);

/// Keeps shared records in memory.
#[derive(Debug, Default)]
struct Rows(Mutex<BTreeMap<String, Vec<u8>>>);

impl SharedStore for Rows {
    fn rows(&self, without: Option<&str>) -> Result<Vec<(String, Vec<u8>)>, String> {
        let is_wanted = |(name, _): &(String, Vec<u8>)| without.is_none_or(|without| !name.starts_with(without));
        Ok(self.0.lock().unwrap().clone().into_iter().filter(is_wanted).collect())
    }

    fn write(&self, changes: &Changes) -> Result<(), String> {
        let mut rows = self.0.lock().unwrap();
        for (name, bytes) in changes {
            match bytes {
                Some(bytes) => rows.insert(name.clone(), bytes.clone()),
                None => rows.remove(name),
            };
        }
        Ok(())
    }
}

impl DocumentStore for Documents {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), String> {
        self.0.lock().unwrap().insert(key.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), String> {
        self.0.lock().unwrap().remove(key);
        Ok(())
    }
}

struct Agent {
    handle: GossipHandle,
    reader: SnapshotReader,
    publication: watch::Sender<Arc<Publication>>,
    addr: SocketAddr,
    transport: ControlTransport,
    metrics: Metrics,
    stop: CancellationToken,
    /// Once cancelled it shakes no more hands; connections that are open go on.
    deaf: CancellationToken,
    tasks: Tasks,
}

fn start(ca: &crate::pki::EphemeralCa, name: &str, generation: u64, seeds: Vec<String>) -> Agent {
    start_by(ca.issuer(), name, generation, seeds)
}

fn start_by(issuer: &crate::pki::Issuer, name: &str, generation: u64, seeds: Vec<String>) -> Agent {
    start_with(issuer, name, generation, seeds, LINKS_MAX)
}

fn start_with(issuer: &crate::pki::Issuer, name: &str, generation: u64, seeds: Vec<String>, links_max: usize) -> Agent {
    let (params, Ends { accepted, publication }) = params(issuer, name, generation, seeds, links_max);
    let (addr, transport, stop) = (params.node.mesh_addr, params.transport.clone(), params.stop.clone());
    let tasks = Tasks::new(stop.clone());
    let accepting = transport.clone();
    let deaf = CancellationToken::new();
    let until = deaf.clone();
    tasks.spawn("accept", async move {
        while let Some(Some(next)) = until.run_until_cancelled(accepting.accept()).await {
            if next.plane == Plane::Gossip && accepted.send(next).await.is_err() {
                break;
            }
        }
    });
    let documents = DocumentsParams {
        set: DocumentSet::new(issuer.bundle()),
        default_policy: crate::authz::Action::Allow,
        store: Arc::new(Documents::default()),
        on_trust: Arc::new(|_, _| {}),
    };
    let metrics = Metrics::new();
    let shared = SharedParams { kv_bytes_max: Some(KV_BYTES_DEFAULT), store: Arc::new(Rows::default()) };
    let (handle, reader) = Gossip::start(params, documents, shared, &metrics, &tasks).unwrap();
    Agent { handle, reader, publication, addr, transport, metrics, stop, deaf, tasks }
}

/// The other ends of what gossip gets.
pub(super) struct Ends {
    accepted: mpsc::Sender<Accepted>,
    publication: watch::Sender<Arc<Publication>>,
}

/// What the gossip of a node on loopback needs.
pub(super) fn params(
    issuer: &crate::pki::Issuer,
    name: &str,
    generation: u64,
    seeds: Vec<String>,
    links_max: usize,
) -> (GossipParams, Ends) {
    let node: NodeName = name.parse().unwrap();
    let scope: ServeScope = "*".parse().unwrap();
    let authority = issuer.self_certify(&node, &scope, clock::wall()).unwrap();
    let identity = Identity::new(authority, clock::wall()).unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let mesh_addr = socket.local_addr().unwrap();
    let transport = ControlTransport::new(socket, Arc::clone(&identity), [7; 64]).unwrap();
    let (accepted, incoming) = mpsc::channel(INCOMING_MAX);
    let (publication, publications) = watch::channel(Arc::default());
    let info = NodeInfo {
        id: name.to_owned(),
        name: node,
        mesh_addr,
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "test".to_owned(),
        issuer: false,
    };
    let params = GossipParams {
        node: info,
        generation: Generation { number: generation, nonce: rand::random() },
        transport,
        tunnels: LiveConnections::default(),
        incoming,
        identity,
        publication: publications,
        ejections: watch::channel(Arc::default()).1,
        demand: watch::channel(Arc::default()).1,
        demands: mpsc::channel(1).0,
        first_index: 1,
        seeds,
        links_max,
        known_peers: Vec::new(),
        peer_store: Arc::new(Kept::default()),
        sync_interval: Duration::from_secs(1),
        reconnect_timeout: Duration::from_hours(72),
        stop: CancellationToken::new(),
    };
    (params, Ends { accepted, publication })
}

/// The records of a node that runs one service.
pub(super) fn records(name: &str, tag: String) -> BTreeMap<EntryKey, Entry> {
    let record = ServiceRecord {
        tags: [tag.into()].into(),
        port: 8080,
        protocol: Protocol::Http,
        ..ServiceRecord::new(name.parse().unwrap(), name.parse().unwrap())
    };
    BTreeMap::from([(EntryKey::Service(record.id.clone()), Entry::Service(record.into()))])
}

impl Agent {
    /// Ends without a goodbye.
    async fn kill(self) {
        self.stop.cancel();
        self.transport.close("killed");
        self.tasks.join().await;
    }

    #[track_caller]
    fn sees(&self, want: &[(&str, MemberStatus)]) -> impl Future<Output = ()> + use<> {
        let want: Vec<(String, MemberStatus)> =
            want.iter().map(|(name, status)| ((*name).to_owned(), *status)).collect();
        let mut members = self.handle.subscribe();
        async move {
            let shown = |members: &Members| {
                let list = members.members.iter().map(|member| (member.name.to_string(), member.status));
                list.collect::<Vec<_>>()
            };
            let wait = members.wait_for(|members| shown(members) == want);
            let is_seen = tokio::time::timeout(Duration::from_secs(30), wait).await.is_ok();
            assert!(is_seen, "wanted {want:?}, seen {:?}", shown(&members.borrow()));
        }
    }

    /// The sum over the series of a metric whose line begins with `start`.
    fn metric(&self, start: &str) -> usize {
        let text = self.metrics.render().unwrap();
        let of = |line: &str| line.strip_prefix(start)?.rsplit(' ').next()?.parse::<usize>().ok();
        text.lines().filter_map(of).sum()
    }

    async fn has_service(&self, name: &str) {
        let name: ServiceName = name.parse().unwrap();
        let mut snapshots = self.reader.subscribe();
        let wait = snapshots.wait_for(|snapshot| snapshot.services.contains_key(&name));
        tokio::time::timeout(Duration::from_secs(15), wait).await.expect("the service is seen").unwrap();
    }

    fn publish(&self, name: &str, tag: String) {
        let records = records(name, tag);
        self.publication.send_replace(Arc::new(Publication { records, view: LocalView::default() }));
    }
}

use MemberStatus::{Alive, Failed, Left};

#[tokio::test]
async fn three_agents_join_share_services_and_tell_a_leave_from_a_crash_and_a_restart() {
    let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
    let a = start(&ca, "a", 1, Vec::new());
    let seed = a.addr.to_string();
    let b = start(&ca, "b", 1, vec![seed.clone()]);
    let c = start(&ca, "c", 1, vec![seed.clone()]);
    let all = [("a", Alive), ("b", Alive), ("c", Alive)];
    tokio::join!(a.sees(&all), b.sees(&all), c.sees(&all));

    b.publish("web", "small".to_owned());
    tokio::join!(a.has_service("web"), c.has_service("web"));
    // Too large for a packet: pulled.
    a.publish("big", "x".repeat(8000));
    tokio::join!(b.has_service("big"), c.has_service("big"));

    // A crash, and the next life of the same name.
    c.kill().await;
    let failed = [("a", Alive), ("b", Alive), ("c", Failed)];
    tokio::join!(a.sees(&failed), b.sees(&failed));
    let c = start(&ca, "c", 2, vec![seed.clone()]);
    tokio::join!(a.sees(&all), b.sees(&all), c.sees(&all));
    tokio::join!(c.has_service("web"), c.has_service("big"));

    // A goodbye.
    c.handle.leave().await.unwrap();
    let left = [("a", Alive), ("b", Alive), ("c", Left)];
    tokio::join!(a.sees(&left), b.sees(&left));
    c.kill().await;

    // A second live b is refused with both addresses; a b without its disk comes back above its old life.
    let twin = start(&ca, "b", 1, Vec::new());
    let refused = twin.handle.join(vec![seed.clone()]).await.unwrap_err().to_string();
    assert!(refused.contains(&b.addr.to_string()) && refused.contains(&twin.addr.to_string()), "{refused}");
    twin.kill().await;
    b.kill().await;
    a.sees(&[("a", Alive), ("b", Failed), ("c", Left)]).await;
    let reborn = start(&ca, "b", 0, vec![seed]);
    a.sees(&left).await;
    reborn.kill().await;
    a.kill().await;
}

/// A signed revocation of `node`, by the operator of a CA directory.
fn revocation(ca: &std::path::Path, node: &str) -> Vec<u8> {
    use crate::pki::{DocumentKey, Revoked, Signatory, SpkiHash};
    use crate::policy::{Content, Document, DocumentId, DocumentKind, RevocationBody};
    let now = clock::wall();
    let entries = vec![Revoked::Node { node: node.parse().unwrap(), until: now }];
    let content = Content {
        trust_domain: "td".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Revocation, name: format!("node.{node}").parse().unwrap() },
        version: 1,
        not_before: now,
        not_after: now.plus(Duration::from_secs(3600)),
        signer: SpkiHash([0; 32]),
        body: RevocationBody { entries, reason: String::new() }.to_bytes().unwrap(),
    };
    let key = DocumentKey::load(ca, Signatory::Operator).unwrap();
    Document::sign(content, &key).unwrap().to_bytes()
}

#[tokio::test]
async fn a_forged_refusal_makes_a_member_answer_and_does_not_fail_it() {
    let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
    let a = start(&ca, "a", 1, Vec::new());
    let b = start(&ca, "b", 1, vec![a.addr.to_string()]);
    let both = [("a", Alive), ("b", Alive)];
    tokio::join!(a.sees(&both), b.sees(&both));
    a.transport.refusals().note(b.addr, clock::now());
    let deadline = clock::now() + Duration::from_secs(10);
    while !a.metrics.render().unwrap().contains("weft_gossip_refusals_answered_total 1") {
        assert!(clock::now() < deadline, "b did not answer");
        tokio::task::yield_now().await;
    }
    a.sees(&both).await;
    assert!(a.metrics.render().unwrap().contains("weft_gossip_ports_refused_total 0"), "b was not failed in between");
    tokio::join!(a.kill(), b.kill());
}

#[tokio::test]
async fn a_document_reaches_everybody_at_once_and_a_late_joiner_by_comparison() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    crate::pki::CaDir::init(&path, &"td".parse().unwrap(), clock::wall()).unwrap();
    let issuer = crate::pki::Issuer::load(&path.join("issuer-1")).unwrap();
    let names: Vec<String> = (0..8).map(|number| format!("n{number}")).collect();
    let mut agents = vec![start_by(&issuer, "n0", 1, Vec::new())];
    let seed = agents[0].addr.to_string();
    agents.extend(names[1..].iter().map(|name| start_by(&issuer, name, 1, vec![seed.clone()])));
    let all: Vec<(&str, MemberStatus)> = names.iter().map(|name| (name.as_str(), Alive)).collect();
    futures_util::future::join_all(agents.iter().map(|agent| agent.sees(&all))).await;

    let documents = agents[3].handle.documents();
    let begun = clock::now();
    let document = revocation(&path, "nobody");
    let spread = documents.offer(document.clone()).await.unwrap();
    println!("8 agents: {} of {} confirmed after {:?}", spread.confirmed, spread.alive, clock::now() - begun);
    assert_eq!(spread.alive, 7);
    // Offered again it is known, and pushed again to whoever was too busy to confirm in time.
    let confirmed = async { while documents.offer(document.clone()).await.unwrap().confirmed < 7 {} };
    tokio::time::timeout(Duration::from_secs(60), confirmed).await.expect("all seven confirm");
    let hash = documents.view().set_hash;
    assert_ne!(hash, 0);
    for agent in &agents {
        assert_eq!(agent.handle.documents().view().set_hash, hash);
    }
    // Garbage and a stranger's are refused.
    assert!(documents.offer(vec![1, 2, 3]).await.is_err());
    let other = dir.path().join("other");
    crate::pki::CaDir::init(&other, &"td".parse().unwrap(), clock::wall()).unwrap();
    assert!(matches!(documents.offer(revocation(&other, "n1")).await, Err(OfferError::Refused(_))));

    let late = start_by(&issuer, "late", 1, vec![seed]);
    let mut view = late.handle.documents().view.clone();
    let learned = view.wait_for(|view| view.set_hash == hash);
    tokio::time::timeout(Duration::from_secs(60), learned).await.expect("the joiner learns the document").unwrap();
    for agent in agents.into_iter().chain([late]) {
        agent.kill().await;
    }
}

#[tokio::test]
async fn a_push_that_fails_is_begun_again_while_an_operator_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    crate::pki::CaDir::init(&path, &"td".parse().unwrap(), clock::wall()).unwrap();
    let issuer = crate::pki::Issuer::load(&path.join("issuer-1")).unwrap();
    let a = start_by(&issuer, "a", 1, Vec::new());
    let seed = vec![a.addr.to_string()];
    let b = start_by(&issuer, "b", 1, seed.clone());
    let c = start_by(&issuer, "c", 1, seed);
    let all = [("a", Alive), ("b", Alive), ("c", Alive)];
    tokio::join!(a.sees(&all), b.sees(&all), c.sees(&all));

    c.kill().await;
    // Nobody has noticed yet: the order goes to both.
    let spread = a.handle.documents().offer(revocation(&path, "nobody")).await.unwrap();
    assert_eq!((spread.confirmed, spread.alive), (1, 2));
    assert_eq!(a.metric("weft_documents_pushes_total{result=\"failed\"}"), 2);
    tokio::join!(a.kill(), b.kill());
}

#[tokio::test]
async fn a_holder_that_shakes_no_hands_keeps_its_name_while_it_answers_and_a_closed_port_frees_it() {
    let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
    let a = start(&ca, "a", 1, Vec::new());
    let b = start(&ca, "b", 1, vec![a.addr.to_string()]);
    let both = [("a", Alive), ("b", Alive)];
    tokio::join!(a.sees(&both), b.sees(&both));
    // As on a machine under load: no handshake comes to an end.
    b.deaf.cancel();
    let twin = start(&ca, "b", 2, Vec::new());
    for _ in 0..3 {
        let refused = twin.handle.join(vec![a.addr.to_string()]).await.unwrap_err().to_string();
        assert!(refused.contains(&b.addr.to_string()) && refused.contains(&twin.addr.to_string()), "{refused}");
    }
    a.sees(&both).await;
    b.kill().await;
    let deadline = clock::now() + Duration::from_secs(15);
    while let Err(error) = twin.handle.join(vec![a.addr.to_string()]).await {
        assert!(clock::now() < deadline, "the name of a dead holder is free: {error}");
    }
    a.sees(&both).await;
    tokio::join!(a.kill(), twin.kill());
}

#[tokio::test]
async fn agents_with_fewer_links_than_peers_close_the_least_recently_used_and_stay_together() {
    const AGENTS: usize = 6;
    const LINKS: usize = 4;
    const PAIRS: usize = AGENTS * (AGENTS - 1) / 2;
    let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
    let names: Vec<String> = (0..AGENTS).map(|number| format!("n{number}")).collect();
    let all: Vec<(&str, MemberStatus)> = names.iter().map(|name| (name.as_str(), Alive)).collect();
    let mut agents = vec![start_with(ca.issuer(), "n0", 1, Vec::new(), LINKS)];
    let seed = agents[0].addr.to_string();
    for name in &names[1..] {
        agents.push(start_with(ca.issuer(), name, 1, vec![seed.clone()], LINKS));
        let so_far = &all[..agents.len()];
        futures_util::future::join_all(agents.iter().map(|agent| agent.sees(so_far))).await;
    }
    // More than every pair needs: connections have made room, and were dialled again.
    let deadline = clock::now() + Duration::from_secs(60);
    loop {
        let links = agents.iter().map(|agent| agent.metric("weft_gossip_connections"));
        let most = links.max().unwrap();
        assert!(most <= LINKS, "{most} links where {LINKS} are allowed");
        let dials: usize = agents.iter().map(|agent| agent.metric("weft_gossip_dials_total")).sum();
        if dials > PAIRS {
            break;
        }
        assert!(clock::now() < deadline, "{dials} dials");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    agents[1].publish("web", "small".to_owned());
    futures_util::future::join_all(agents.iter().map(|agent| agent.has_service("web"))).await;
    futures_util::future::join_all(agents.iter().map(|agent| agent.sees(&all))).await;
    for agent in agents {
        agent.kill().await;
    }
}

/// Waits until `wanted` holds of the keys that `agent` has.
async fn sees_keys(agent: &Agent, wanted: impl Fn(&BTreeMap<String, usize>) -> bool) {
    let (shared, all) = (agent.handle.shared(), Scope::Prefix(String::new()));
    let waiting = async {
        loop {
            let answer = shared.read(Space::Kv, all.clone()).await.unwrap();
            let value_bytes = |row: &Row| row.body.as_ref().map_or(0, |body| body.value.len());
            let keys = answer.rows.iter().map(|(key, row)| (key.to_string(), value_bytes(row))).collect();
            if wanted(&keys) {
                return;
            }
            shared.changed(Space::Kv, all.clone(), answer.index).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("the keys come");
}

#[tokio::test]
async fn a_write_reaches_the_others_whole_a_late_joiner_by_comparison_and_a_deletion_too() {
    let ca = crate::pki::ephemeral(&"td".parse().unwrap(), clock::wall()).unwrap();
    let put = |key: &str, bytes: usize| Write::Put {
        key: key.to_owned(),
        body: crate::lww::Body { flags: 0, value: vec![7; bytes] },
    };
    let a = start(&ca, "a", 1, Vec::new());
    let seed = a.addr.to_string();
    for at in 0..300 {
        a.handle.shared().write(Space::Kv, put(&format!("k/{at}"), 100)).await.unwrap();
    }
    a.handle.shared().write(Space::Kv, put("large", KV_VALUE_BYTES_MAX)).await.unwrap();
    let b = start(&ca, "b", 1, vec![seed]);
    sees_keys(&b, |keys| keys.len() == 301 && keys["large"] == KV_VALUE_BYTES_MAX).await;

    b.handle.shared().write(Space::Kv, put("by b", 0)).await.unwrap();
    sees_keys(&a, |keys| keys.contains_key("by b")).await;
    b.handle.shared().write(Space::Kv, Write::Delete(Scope::Prefix("k/".to_owned()))).await.unwrap();
    sees_keys(&a, |keys| keys.len() == 2).await;
    let refused = a.handle.shared().write(Space::Kv, put("larger", KV_VALUE_BYTES_MAX + 1)).await;
    assert!(matches!(refused, Err(SharedError::Refused(_))), "{refused:?}");
    tokio::join!(a.kill(), b.kill());
}

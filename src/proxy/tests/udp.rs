//! Flows of UDP through two nodes.

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::harness::{Authority, DRAIN_TIMEOUT, Mesh, Node, Place, host, serve, stranger, upstreams};
use super::within;
use crate::authz::Action;
use crate::catalogue::LocalView;
use crate::model::Protocol;
use crate::proxy::ListenerState;
use crate::proxy::preamble::{Preamble, StreamKind, StreamStatus};

const SOURCE: &str = "reporter=\"source\"";
const DESTINATION: &str = "reporter=\"destination\"";
/// A path carries this much at once: 1,200 bytes less QUIC's header, tag and frame.
const ALWAYS_FITS: usize = 1_150;

async fn socket() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

/// A port that is free for connections and for datagrams.
fn free_port() -> SocketAddr {
    loop {
        let addr = super::harness::free_port();
        if std::net::UdpSocket::bind(addr).is_ok() {
            return addr;
        }
    }
}

/// Adds instances of `web` that take datagrams.
fn serve_udp(local: &mut LocalView, apps: &[(&str, &UdpSocket)]) {
    local.instances.clear();
    for (id, app) in apps {
        serve(local, id, app.local_addr().unwrap());
    }
    local.instances.values_mut().for_each(|instance| instance.protocol = Protocol::Udp);
}

/// Node `a` calls `web` by UDP; these are its instances, on node `b`.
async fn mesh_of(apps: &[(&str, &UdpSocket)]) -> Mesh {
    mesh_on((1, DRAIN_TIMEOUT), apps).await
}

/// The same, with so many workers on each node and so long a drain.
async fn mesh_on(how: (usize, Duration), apps: &[(&str, &UdpSocket)]) -> Mesh {
    let with_apps = |local: &mut LocalView| {
        serve_udp(local, apps);
        Vec::new()
    };
    let mut mesh = Mesh::start_as(how, &Authority::new(), "*", with_apps).await;
    mesh.upstream = free_port();
    let places: Vec<Place<'_>> = apps.iter().map(|(id, _)| ("b", mesh.b.addr, *id)).collect();
    lead(&mesh, &places).await;
    mesh
}

/// Has the upstream port lead to instances by UDP.
async fn lead(mesh: &Mesh, places: &[Place<'_>]) {
    let mut local = upstreams(&[mesh.upstream]);
    local.upstreams.iter_mut().for_each(|upstream| upstream.protocol = Some(Protocol::Udp));
    mesh.a.publish_local(local, places);
    mesh.a.sees(mesh.upstream, |state| state == Some(&ListenerState::ListeningUdp)).await;
}

async fn client(mesh: &Mesh) -> UdpSocket {
    let client = socket().await;
    client.connect(mesh.upstream).await.unwrap();
    client
}

async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_507];
    let (bytes, from) = within(socket.recv_from(&mut buffer)).await.unwrap();
    buffer.truncate(bytes);
    (buffer, from)
}

/// Sends `payload` until `done`.
async fn insist<T>(client: &UdpSocket, payload: &[u8], done: impl Future<Output = T>) -> T {
    let sending = async {
        loop {
            // What the mesh drops is said by nobody.
            let _refused = client.send(payload).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        never = sending => never,
        done = done => done,
    }
}

/// An app that sends back what it gets.
fn echo(app: UdpSocket) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = vec![0; 65_507];
        loop {
            let (bytes, from) = app.recv_from(&mut buffer).await.unwrap();
            app.send_to(&buffer[..bytes], from).await.unwrap();
        }
    });
    tasks
}

/// What is already there.
fn drain(app: &UdpSocket) -> usize {
    std::iter::from_fn(|| app.try_recv_from(&mut [0; 64]).ok()).count()
}

#[tokio::test]
async fn two_callers_at_once_get_each_their_own_datagrams_whole() {
    let app = socket().await;
    let mesh = mesh_of(&[("web-1", &app)]).await;
    let _echo = echo(app);
    let clients = [client(&mesh).await, client(&mesh).await];
    let mut seed = 0x5eed_u64;
    println!("seed {seed:#x}");
    let mut sizes = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % (ALWAYS_FITS + 1)
    });
    for round in 0..100_u8 {
        let mut sent = [Vec::new(), Vec::new()];
        for (number, size) in sizes.by_ref().take(8).enumerate() {
            let who = number % 2;
            // Each byte says whose it is, but for an empty one.
            let payload = vec![round.wrapping_mul(2) | u8::try_from(who).unwrap(); size];
            clients[who].send(&payload).await.unwrap();
            sent[who].push(payload);
        }
        for (client, mut sent) in clients.iter().zip(sent) {
            let mut received = Vec::new();
            for _ in 0..sent.len() {
                received.push(receive(client).await.0);
            }
            // UDP promises no order.
            received.sort();
            sent.sort();
            assert!(received == sent, "round {round}: {:?}", received.iter().map(Vec::len).collect::<Vec<_>>());
        }
    }
    assert_eq!(mesh.a.count("weft_udp_flows_opened_total", &[SOURCE]), 2);
    assert_eq!(mesh.b.count("weft_udp_flows_active", &[DESTINATION]), 2);
    for (node, reporter) in [(&mesh.a, SOURCE), (&mesh.b, DESTINATION)] {
        node.counts("weft_udp_received_datagrams_total", &[reporter], 800).await;
        node.counts("weft_udp_sent_datagrams_total", &[reporter], 800).await;
    }
    let bytes = |name| (mesh.a.count(name, &[SOURCE]), mesh.b.count(name, &[DESTINATION]));
    let (received, sent) = (bytes("weft_udp_received_bytes_total"), bytes("weft_udp_sent_bytes_total"));
    assert!(received == sent && received.0 == received.1, "{received:?} {sent:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_datagram_that_is_too_large_is_dropped_and_counted_and_those_after_it_pass() {
    let app = socket().await;
    let mesh = mesh_of(&[("web-1", &app)]).await;
    let client = client(&mesh).await;
    let large = vec![0; 60_000];
    client.send(&large).await.unwrap();
    client.send(&[1; ALWAYS_FITS]).await.unwrap();
    let (payload, from) = receive(&app).await;
    assert_eq!(payload, [1; ALWAYS_FITS]);
    app.send_to(&large, from).await.unwrap();
    app.send_to(b"answer", from).await.unwrap();
    assert_eq!(receive(&client).await.0, b"answer");
    for (node, reporter) in [(&mesh.a, SOURCE), (&mesh.b, DESTINATION)] {
        node.counts("weft_udp_dropped_datagrams_total", &[reporter, "\"oversize\""], 1).await;
    }
    mesh.stop().await;
}

#[tokio::test]
async fn the_destination_decides_before_a_datagram_meets_the_app_and_again_as_intentions_change() {
    let app = socket().await;
    let mesh = mesh_of(&[("web-1", &app)]).await;
    let client = client(&mesh).await;
    mesh.b.decide(Action::Deny);
    let denied = ["\"denied\"", SOURCE];
    within(insist(&client, b"?", async {
        while mesh.a.count("weft_udp_dropped_datagrams_total", &denied) < 3 {
            tokio::task::yield_now().await;
        }
    }))
    .await;
    assert_eq!(drain(&app), 0);
    let (asked, dropped) = (mesh.a.count("weft_udp_flows_opened_total", &[SOURCE]), 3);
    assert!(asked < dropped, "it is asked for with every datagram");
    // Allowed: it is asked for again after a while.
    mesh.b.decide(Action::Allow);
    insist(&client, b"?", receive(&app)).await;
    // Denied again: the open flow ends.
    mesh.b.decide(Action::Deny);
    within(mesh.b.counts("weft_policy_cut_total", &[], 1)).await;
    mesh.b.counts("weft_udp_flows_active", &[DESTINATION], 0).await;
    let before = mesh.a.count("weft_udp_dropped_datagrams_total", &denied);
    drain(&app);
    within(insist(&client, b"?", async {
        while mesh.a.count("weft_udp_dropped_datagrams_total", &denied) < before + 3 {
            tokio::task::yield_now().await;
        }
    }))
    .await;
    assert_eq!(drain(&app), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_flow_stays_with_its_instance_and_moves_when_the_app_is_gone() {
    let apps = [socket().await, socket().await];
    let mesh = mesh_of(&[("web-1", &apps[0]), ("web-2", &apps[1])]).await;
    let client = client(&mesh).await;
    let [first, second] = apps;
    let is_first = insist(&client, b"?", async {
        tokio::select! { _ = receive(&first) => true, _ = receive(&second) => false }
    })
    .await;
    let (gone, other) = if is_first { (first, second) } else { (second, first) };
    for _ in 0..20 {
        insist(&client, b"?", receive(&gone)).await;
    }
    assert_eq!(drain(&other), 0, "a flow is not spread");
    drop(gone);
    insist(&client, b"?", receive(&other)).await;
    assert!(mesh.a.count("weft_udp_flows_closed_total", &[SOURCE, "\"UF\""]) >= 1);
    // So it does when the catalogue has it no more.
    let left = if is_first { "web-1" } else { "web-2" };
    lead(&mesh, &[("b", mesh.b.addr, left)]).await;
    within(insist(&client, b"?", async {
        while mesh.a.count("weft_udp_flows_closed_total", &[SOURCE, "\"UH\""]) == 0 {
            tokio::task::yield_now().await;
        }
    }))
    .await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_that_drains_hands_its_flows_over_and_its_answers_still_come() {
    let (here, there) = (socket().await, socket().await);
    let authority = Authority::new();
    let mut mesh = Mesh::start_on(1, &authority, "*", |local| {
        serve_udp(local, &[("web-1", &here)]);
        Vec::new()
    })
    .await;
    let mut local = LocalView::default();
    serve_udp(&mut local, &[("web-9", &there)]);
    let c = Node::start(&authority, "c", "*", local);
    mesh.upstream = free_port();
    lead(&mesh, &[("b", mesh.b.addr, "web-1")]).await;
    let client = client(&mesh).await;
    let (_, from) = insist(&client, b"?", receive(&here)).await;
    lead(&mesh, &[("b", mesh.b.addr, "web-1"), ("c", c.addr, "web-9")]).await;
    insist(&client, b"?", receive(&here)).await;
    // The app goes on answering what it got.
    let mut answering = JoinSet::new();
    answering.spawn(async move {
        loop {
            here.send_to(b"late", from).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let Mesh { a, b, .. } = mesh;
    let moved = async {
        insist(&client, b"?", receive(&there)).await;
        while client.try_recv(&mut [0; 16]).is_ok() {}
        assert_eq!(receive(&client).await.0, b"late");
        answering.abort_all();
    };
    let ((), ()) = tokio::join!(within(b.handle.shutdown()), within(moved));
    insist(&client, b"?", receive(&there)).await;
    // And its own agent's drain does not wait for a silent flow for a minute.
    tokio::join!(within(a.handle.shutdown()), within(c.handle.shutdown()));
}

#[tokio::test]
async fn flows_of_a_node_that_drains_stay_with_their_workers_while_others_have_none_left() {
    let app = socket().await;
    // Some workers have no flow, and have drained at once.
    let mesh = mesh_on((16, Duration::from_mins(1)), &[("web-1", &app)]).await;
    let _echo = echo(app);
    let mut clients = Vec::new();
    for _ in 0..12 {
        let client = client(&mesh).await;
        insist(&client, b"?", receive(&client)).await;
        clients.push(client);
    }
    let Mesh { a, b, .. } = mesh;
    let talking = async {
        for round in 0..50_u16 {
            for client in &clients {
                let answer = async {
                    // What was asked before may still be answered.
                    while receive(client).await.0 != round.to_be_bytes() {}
                };
                insist(client, &round.to_be_bytes(), answer).await;
            }
        }
    };
    tokio::join!(within(a.handle.shutdown()), talking);
    within(b.handle.shutdown()).await;
}

#[tokio::test]
async fn a_flow_id_means_nothing_outside_of_its_connection_and_its_time() {
    let app = socket().await;
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |local| {
        serve_udp(local, &[("web-1", &app)]);
        Vec::new()
    })
    .await;
    let endpoints = [stranger(&authority, "x"), stranger(&authority, "y")];
    let connect =
        async |endpoint: &quinn::Endpoint| within(endpoint.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let (owner, other) = (connect(&endpoints[0]).await, connect(&endpoints[1]).await);
    let stray = async |count| mesh.b.counts("weft_udp_stray_datagrams_total", &[], count).await;

    let (mut send, _recv) = ask(&owner, StreamKind::Udp).await.unwrap();
    let id = u8::try_from(send.id().index()).unwrap();
    let datagram = |payload: &[u8]| bytes::Bytes::from([&[id], payload].concat());
    owner.send_datagram(datagram(b"mine")).unwrap();
    assert_eq!(receive(&app).await.0, b"mine");
    other.send_datagram(datagram(b"theirs")).unwrap();
    stray(1).await;
    owner.send_datagram(vec![id + 1, b'x'].into()).unwrap();
    stray(2).await;
    owner.send_datagram(bytes::Bytes::new()).unwrap();
    stray(3).await;
    send.finish().unwrap();
    mesh.b.counts("weft_udp_flows_active", &[DESTINATION], 0).await;
    owner.send_datagram(datagram(b"late")).unwrap();
    stray(4).await;
    assert_eq!(drain(&app), 0);
    // Who may call by one protocol has no access to what another has on the same port.
    for kind in [StreamKind::Tcp, StreamKind::Http] {
        assert_eq!(ask(&owner, kind).await.unwrap_err(), StreamStatus::UnknownInstance);
    }
    let tcp = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let tunnel = within(endpoints[0].connect(tcp.b.addr, "mesh.weft").unwrap()).await.unwrap();
    assert_eq!(ask(&tunnel, StreamKind::Udp).await.unwrap_err(), StreamStatus::UnknownInstance);
    drop((owner, other, tunnel));
    mesh.stop().await;
    tcp.stop().await;
}

/// Opens a stream to `web-1` as a peer does.
async fn ask(
    tunnel: &quinn::Connection,
    kind: StreamKind,
) -> Result<(quinn::SendStream, quinn::RecvStream), StreamStatus> {
    ask_for(tunnel, kind, "web-1").await
}

/// Opens a stream to an instance of `web` as a peer does.
async fn ask_for(
    tunnel: &quinn::Connection,
    kind: StreamKind,
    instance: &str,
) -> Result<(quinn::SendStream, quinn::RecvStream), StreamStatus> {
    let (mut send, mut recv) = within(tunnel.open_bi()).await.unwrap();
    let preamble = Preamble { kind, instance: instance.parse().unwrap(), service: "web".parse().unwrap() };
    send.write_all(&preamble.encode()).await.unwrap();
    let mut status = [0];
    within(recv.read_exact(&mut status)).await.unwrap();
    match StreamStatus::from_byte(status[0]).unwrap() {
        StreamStatus::Ok => Ok((send, recv)),
        status => Err(status),
    }
}

/// Bytes that a narrow path carries in a millisecond: 32 Mbit/s.
const PATH_BYTES_PER_MS: usize = 4_000;
/// Packets that wait before it.
const PATH_PACKETS_MAX: usize = 64;

/// Returns the near end of a path to `to` that is narrow on the way back, and what carries it.
async fn narrow_path(to: SocketAddr) -> (SocketAddr, JoinSet<()>) {
    let (near, far) = (socket().await, socket().await);
    far.connect(to).await.unwrap();
    let addr = near.local_addr().unwrap();
    let mut carrying = JoinSet::new();
    carrying.spawn(async move {
        let (mut caller, mut waiting, mut credit) = (None, VecDeque::new(), 0);
        let mut turn = tokio::time::interval(Duration::from_millis(1));
        let (mut there, mut back) = (vec![0; 65_507], vec![0; 65_507]);
        loop {
            tokio::select! {
                Ok((bytes, from)) = near.recv_from(&mut there) => {
                    caller = Some(from);
                    let _lost = far.try_send(&there[..bytes]);
                }
                Ok(bytes) = far.recv(&mut back) => if waiting.len() < PATH_PACKETS_MAX {
                    waiting.push_back(back[..bytes].to_vec());
                },
                _ = turn.tick() => {
                    // Of a time in which nothing waits, no more is left than the largest packet.
                    credit = (credit + PATH_BYTES_PER_MS).min(8_000);
                    while let Some(packet) = waiting.pop_front_if(|packet: &mut Vec<u8>| packet.len() <= credit) {
                        credit -= packet.len();
                        let _lost = caller.map(|caller| near.try_send_to(&packet, caller));
                    }
                }
            }
        }
    });
    (addr, carrying)
}

#[tokio::test]
async fn a_flood_of_datagrams_leaves_streams_of_its_tunnel_their_half_of_a_narrow_path() {
    /// What is looked at: a second and a half of the path.
    const BYTES: usize = 6_000_000;
    let flood = socket().await;
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |local| {
        serve(local, "web-2", flood.local_addr().unwrap());
        local.instances.get_mut("web-2").unwrap().protocol = Protocol::Udp;
        Vec::new()
    })
    .await;
    let (near, _carrying) = narrow_path(mesh.b.addr).await;
    let endpoint = stranger(&authority, "x");
    let tunnel = within(endpoint.connect(near, "mesh.weft").unwrap()).await.unwrap();
    let (_asks, mut bytes) = ask(&tunnel, StreamKind::Tcp).await.unwrap();
    let (flow, _said) = ask_for(&tunnel, StreamKind::Udp, "web-2").await.unwrap();
    let id = u8::try_from(flow.id().index()).unwrap();
    tunnel.send_datagram(vec![id, b'?'].into()).unwrap();
    let (_, from) = receive(&flood).await;
    let (mut app, _) = within(mesh.app.accept()).await.unwrap();
    let mut apps = JoinSet::new();
    apps.spawn(async move {
        let chunk = vec![0; 64 << 10];
        while app.write_all(&chunk).await.is_ok() {}
    });
    // Six times what the path carries.
    apps.spawn(async move {
        let mut turn = tokio::time::interval(Duration::from_millis(1));
        loop {
            turn.tick().await;
            for _ in 0..PATH_BYTES_PER_MS * 6 / 1_000 {
                let _dropped = flood.send_to(&[0; 1_000], from).await;
            }
        }
    });
    let (mut of_streams, mut of_datagrams) = (0, 0);
    within(async {
        while of_streams + of_datagrams < BYTES {
            tokio::select! {
                chunk = bytes.read_chunk(usize::MAX, true) => of_streams += chunk.unwrap().unwrap().bytes.len(),
                datagram = tunnel.read_datagram() => of_datagrams += datagram.unwrap().len(),
            }
        }
    })
    .await;
    println!("streams {of_streams}, datagrams {of_datagrams}");
    // Half each; what is lost on the path, headers and the start are left out of account.
    assert!(of_streams * 5 >= BYTES * 2, "streams had {of_streams} of {BYTES}");
    assert!(of_datagrams * 4 >= BYTES, "datagrams had {of_datagrams} of {BYTES}");
    assert!(mesh.b.count("weft_udp_dropped_datagrams_total", &[DESTINATION, "\"congested\""]) > 0);
    drop((apps, tunnel));
    mesh.stop().await;
}

#[tokio::test]
async fn where_a_limit_is_reached_the_flow_that_is_silent_for_longest_gives_way() {
    let app = socket().await;
    let mesh = mesh_of(&[("web-1", &app)]).await;
    let limits = json!({"Limits": {"MaxConnections": 2}});
    mesh.a.say(&[("service-defaults", "app", json!({"UpstreamConfig": {"Defaults": limits}}))]);
    let _echo = echo(app);
    for at in 0..5_u8 {
        let client = client(&mesh).await;
        insist(&client, &[at], async { assert_eq!(receive(&client).await.0, [at]) }).await;
    }
    mesh.a.counts("weft_udp_flows_active", &[SOURCE], 2).await;
    assert_eq!(mesh.a.count("weft_udp_flows_closed_total", &[SOURCE, "\"UO\""]), 3);
    mesh.stop().await;
}

/// How many files this process may have open.
fn descriptors_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap_or(usize::MAX)
}

#[tokio::test]
async fn a_peer_with_as_many_flows_as_it_may_have_is_told_so_and_others_are_served() {
    // Each flow to an app is a socket.
    if descriptors_max() < 10_000 {
        return println!("skipped: at most {} files may be open (ulimit -n)", descriptors_max());
    }
    let app = socket().await;
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |local| {
        serve_udp(local, &[("web-1", &app)]);
        Vec::new()
    })
    .await;
    let endpoints = [stranger(&authority, "x"), stranger(&authority, "y")];
    let connect =
        async |endpoint: &quinn::Endpoint| within(endpoint.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let (greedy, other) = (connect(&endpoints[0]).await, connect(&endpoints[1]).await);
    let mut held = Vec::new();
    let refused = loop {
        match ask(&greedy, StreamKind::Udp).await {
            Ok(streams) => held.push(streams),
            Err(status) => break status,
        }
    };
    assert_eq!(refused, StreamStatus::Full, "after {}", held.len());
    let _of_other = ask(&other, StreamKind::Udp).await.unwrap();
    // A flow that ends leaves its place.
    let before = mesh.b.count("weft_udp_flows_active", &[DESTINATION]);
    drop(held.pop());
    mesh.b.counts("weft_udp_flows_active", &[DESTINATION], before - 1).await;
    let _again = ask(&greedy, StreamKind::Udp).await.unwrap();
    drop((held, greedy, other));
    mesh.stop().await;
}

/// Says to each flow of the first tunnel that there are as many as there may be.
async fn refuse_flows(endpoint: &quinn::Endpoint, refused: &Cell<usize>) {
    let tunnel = endpoint.accept().await.unwrap().await.unwrap();
    while let Ok((mut send, _recv)) = tunnel.accept_bi().await {
        send.write_all(&[StreamStatus::Full.byte()]).await.unwrap();
        refused.set(refused.get() + 1);
    }
}

#[tokio::test]
async fn a_node_that_has_as_many_flows_as_it_may_is_passed_over_and_nothing_counts_against_it() {
    let app = socket().await;
    let authority = Authority::new();
    let mut mesh = Mesh::start_on(1, &authority, "*", |local| {
        serve_udp(local, &[("web-1", &app)]);
        Vec::new()
    })
    .await;
    mesh.upstream = free_port();
    let endpoint = host(&authority, "c", 100);
    let there = ("c", endpoint.local_addr().unwrap(), "web-9");
    // In turns, and whatever failed once would be ejected.
    let resolver = json!({"LoadBalancer": {"Policy": "round_robin"}});
    let guard = json!({"UpstreamConfig": {"Defaults": {"PassiveHealthCheck": {"MaxFailures": 1}}}});
    mesh.a.say(&[("service-resolver", "web", resolver), ("service-defaults", "app", guard)]);
    lead(&mesh, &[("b", mesh.b.addr, "web-1"), there]).await;
    let _echo = echo(app);
    let refused = Cell::new(0);
    let calls = async {
        for at in 0..6_u8 {
            let client = client(&mesh).await;
            insist(&client, &[at], async { assert_eq!(receive(&client).await.0, [at]) }).await;
        }
        assert!(refused.get() >= 3, "it was its turn: {}", refused.get());
        assert_eq!(mesh.a.count("weft_balancer_ejections_total", &[]), 0);
        mesh.a.knows(|view| view.backing_off.is_empty()).await;
        // Where there is no other, the datagram is dropped as one too many.
        lead(&mesh, &[there]).await;
        let client = client(&mesh).await;
        insist(&client, b"?", async {
            while mesh.a.count("weft_udp_dropped_datagrams_total", &[SOURCE, "\"full\""]) == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    tokio::select! {
        () = refuse_flows(&endpoint, &refused) => unreachable!("the tunnel is open"),
        () = within(calls) => {}
    }
    mesh.stop().await;
}

/// Says to each flow of the first tunnel that it is open and is to move, and never ends it.
async fn send_flows_away(endpoint: &quinn::Endpoint, sent: &Cell<usize>) {
    let tunnel = endpoint.accept().await.unwrap().await.unwrap();
    let mut held = Vec::new();
    while let Ok((mut send, recv)) = tunnel.accept_bi().await {
        send.write_all(&[StreamStatus::Ok.byte(), StreamStatus::Draining.byte()]).await.unwrap();
        held.push((send, recv));
        sent.set(held.len());
    }
}

#[tokio::test]
async fn flows_that_a_destination_sends_away_and_never_ends_give_way_to_others() {
    let authority = Authority::new();
    let mut mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    mesh.upstream = free_port();
    let endpoint = host(&authority, "c", 100);
    let limits = json!({"Limits": {"MaxConnections": 2}});
    mesh.a.say(&[("service-defaults", "app", json!({"UpstreamConfig": {"Defaults": limits}}))]);
    lead(&mesh, &[("c", endpoint.local_addr().unwrap(), "web-9")]).await;
    let sent = Cell::new(0);
    let calls = async {
        let client = client(&mesh).await;
        insist(&client, b"?", async {
            while sent.get() < 8 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        mesh.a.counts("weft_udp_flows_active", &[SOURCE], 2).await;
        assert!(mesh.a.count("weft_udp_flows_closed_total", &[SOURCE, "\"UO\""]) >= 6, "they gave way");
    };
    tokio::select! {
        () = send_flows_away(&endpoint, &sent) => unreachable!("the tunnel is open"),
        () = within(calls) => {}
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_port_takes_what_the_service_s_protocol_says_as_that_changes() {
    let mesh = Mesh::start_on(2, &Authority::new(), "*", |_| Vec::new()).await;
    let port = free_port();
    mesh.a.publish(&[port], &[("b", mesh.b.addr, "web-1")]);
    for (protocol, want) in [
        ("tcp", ListenerState::Listening),
        ("udp", ListenerState::ListeningUdp),
        ("http", ListenerState::Listening),
        ("udp", ListenerState::ListeningUdp),
    ] {
        mesh.a.say(&[("service-defaults", "web", json!({"Protocol": protocol}))]);
        mesh.a.sees(port, |state| state == Some(&want)).await;
    }
    // Each worker closes its own socket.
    within(async { while tokio::net::TcpStream::connect(port).await.is_ok() {} }).await;
    mesh.stop().await;
}

#[tokio::test]
async fn flows_over_the_rate_of_their_service_get_nothing_through() {
    let app = socket().await;
    let mesh = mesh_of(&[("web-1", &app)]).await;
    let limits = json!({"InstanceLevel": {"RequestsPerSecond": 0.001, "RequestsMaxBurst": 1, "Per": "source"}});
    mesh.b.say(&[("service-defaults", "web", json!({"Protocol": "udp", "RateLimits": limits}))]);
    let (first, second) = (client(&mesh).await, client(&mesh).await);
    insist(&first, b"first", receive(&app)).await;
    let refused = within(async {
        while mesh.b.count("weft_quic_refused_total", &["\"rate\""]) == 0 {
            tokio::task::yield_now().await;
        }
    });
    insist(&second, b"second", refused).await;
    let mut buffer = [0; 64];
    while let Ok((bytes, _)) = app.try_recv_from(&mut buffer) {
        assert_eq!(&buffer[..bytes], b"first");
    }
    mesh.stop().await;
}

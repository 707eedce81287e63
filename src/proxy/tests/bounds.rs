//! What one peer, or one app that does not read, can take from the others: no more than its share.

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::harness::{Authority, Mesh, free_port, serve, stranger, upstreams};
use super::{CONNECTIONS, pattern, within};
use crate::authz::Action;
use crate::model::Protocol;
use crate::proxy::inbound::{CODE_TOO_MANY, STREAMS_PER_TUNNEL_MAX, TUNNELS_PER_PEER_MAX};
use crate::proxy::preamble::{Preamble, StreamKind, StreamStatus};

/// Apps that do not read, on one tunnel.
const SLOW: usize = 4;
/// What one reader that does read gets at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Slow connections hold at most: what TCP buffers on both hosts and a stream's window take.
const PIECES_MAX: usize = 400;

#[tokio::test]
async fn apps_that_do_not_read_stop_nobody_else_on_their_tunnel() {
    for client_is_slow in [true, false] {
        // One worker: all connections share one tunnel.
        let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| Vec::new()).await;
        let mut slow = Vec::new();
        for _ in 0..SLOW {
            let (client, app) = mesh.connect().await;
            slow.push(if client_is_slow { (app, client) } else { (client, app) });
        }
        let (client, app) = mesh.connect().await;
        let (mut writes, mut reads) = if client_is_slow { (app, client) } else { (client, app) };
        let piece = pattern(PIECE_BYTES);
        let mut stuck_for = 0;
        // The other connection goes on before, while and after the slow ones come to a stop.
        for _ in 0..PIECES_MAX {
            stuck_for = if fill(&slow) { 0 } else { stuck_for + 1 };
            if stuck_for == 8 {
                break;
            }
            let mut read = vec![0; PIECE_BYTES];
            let (written, read_all) =
                within(async { tokio::join!(writes.write_all(&piece), reads.read_exact(&mut read)) }).await;
            assert!(written.is_ok() && read_all.is_ok() && read == piece);
        }
        assert!(stuck_for == 8, "the connections whose reader is slow are never full");
        // Whoever reads again gets what was sent.
        let (_sender, mut receiver) = slow.swap_remove(0);
        let mut first = vec![0; PIECE_BYTES];
        within(receiver.read_exact(&mut first)).await.unwrap();
        assert!(first.iter().all(|byte| *byte == b's'));
        drop((slow, receiver, writes, reads));
        mesh.stop().await;
    }
}

/// Writes what the connections take; tells whether that was anything.
fn fill(slow: &[(TcpStream, TcpStream)]) -> bool {
    let bytes = vec![b's'; 64 << 10];
    let mut took = false;
    for (sender, _) in slow {
        while sender.try_write(&bytes).is_ok() {
            took = true;
        }
    }
    took
}

/// Asks for a TCP connection to the app on a fresh stream; none if the stream is not served.
async fn call(tunnel: &quinn::Connection) -> Option<(quinn::SendStream, quinn::RecvStream)> {
    let (mut send, mut recv) = tunnel.open_bi().await.ok()?;
    send.write_all(&preamble(StreamKind::Tcp)).await.ok()?;
    let mut status = [0];
    recv.read_exact(&mut status).await.ok()?;
    (status == [StreamStatus::Ok.byte()]).then_some((send, recv))
}

fn preamble(kind: StreamKind) -> bytes::Bytes {
    Preamble { kind, instance: "web-1".parse().unwrap(), service: "web".parse().unwrap() }.encode()
}

#[tokio::test]
async fn a_node_gets_its_share_of_tunnels_and_leaves_the_others_theirs() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let (greedy, modest) = (stranger(&authority, "x"), stranger(&authority, "y"));
    let dial =
        async |endpoint: &quinn::Endpoint| within(endpoint.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..TUNNELS_PER_PEER_MAX {
        held.push(dial(&greedy).await);
    }
    let last = held.last().unwrap();
    assert!(within(call(last)).await.is_some());
    let beyond = within(dial(&greedy).await.closed()).await;
    let quinn::ConnectionError::ApplicationClosed(closed) = beyond else { panic!("{beyond}") };
    assert_eq!(closed.error_code, CODE_TOO_MANY.into());
    assert_eq!(mesh.b.count("weft_quic_refused_total", &["reason=\"too_many\""]), 1);
    assert!(within(call(&dial(&modest).await)).await.is_some());
    // What it gives back it may take again.
    held.pop().unwrap().close(0_u32.into(), b"");
    within(async { while call(&dial(&greedy).await).await.is_none() {} }).await;
    drop(held);
    mesh.stop().await;
}

#[tokio::test]
async fn a_tunnel_gets_its_share_of_streams_and_leaves_the_others_theirs() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let (greedy, modest) = (stranger(&authority, "x"), stranger(&authority, "y"));
    let connect =
        async |endpoint: &quinn::Endpoint| within(endpoint.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let (greedy, modest) = (connect(&greedy).await, connect(&modest).await);
    // Requests whose head never comes hold their streams for longer than this test takes.
    let open = async || {
        let (mut send, recv) = within(greedy.open_bi()).await.unwrap();
        within(send.write_all(&preamble(StreamKind::Http))).await.unwrap();
        (send, recv)
    };
    let mut held = Vec::new();
    for _ in 0..STREAMS_PER_TUNNEL_MAX {
        held.push(open().await);
    }
    let (_send, mut recv) = open().await;
    let answer = within(recv.read_chunk(1, true)).await;
    assert!(matches!(answer, Ok(None) | Err(quinn::ReadError::Reset(_))), "{answer:?}");
    for (_, recv) in &mut held {
        assert!(recv.read_chunk(1, true).now_or_never().is_none(), "a stream within the bound was refused");
    }
    assert!(within(call(&modest)).await.is_some());
    // What it gives back it may take again.
    let (mut send, _recv) = held.pop().unwrap();
    send.reset(0_u32.into()).unwrap();
    within(async { while call(&greedy).await.is_none() {} }).await;
    drop(held);
    mesh.stop().await;
}

/// Streams of a peer that resets each of them.
const CHURN: usize = 5_000;

#[tokio::test]
async fn streams_that_are_reset_and_datagrams_of_no_flow_leave_nothing_behind_and_stop_nobody() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let (churning, modest) = (stranger(&authority, "x"), stranger(&authority, "y"));
    let connect =
        async |endpoint: &quinn::Endpoint| within(endpoint.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let (churning, modest) = (connect(&churning).await, connect(&modest).await);
    for _ in 0..CHURN {
        churning.send_datagram(vec![0; 1_000].into()).unwrap();
    }
    for turn in 0..CHURN {
        let (mut send, mut recv) = within(churning.open_bi()).await.unwrap();
        let head = preamble(if turn % 2 == 0 { StreamKind::Http } else { StreamKind::Tcp });
        let part = &head[..head.len() * (turn % 5) / 4];
        within(send.write_all(part)).await.unwrap();
        send.reset(8_u32.into()).unwrap();
        let _stopped = recv.stop(8_u32.into());
        if turn % 1000 == 0 {
            assert!(within(call(&modest)).await.is_some(), "another peer is not served after {turn}");
        }
    }
    assert!(mesh.b.count("weft_udp_stray_datagrams_total", &[]) > 0, "datagrams of no flow are dropped and counted");
    // All places are free again, of the tunnel and of the worker.
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(within(call(&churning)).await.expect("the churning peer is served once it stops"));
    }
    drop(held);
    mesh.stop().await;
}

#[tokio::test]
async fn an_http_instance_whose_app_is_gone_is_passed_over_and_left_alone_for_a_while() {
    let with_dead = |local: &mut crate::catalogue::LocalView| {
        serve(local, "web-2", free_port());
        local.instances.values_mut().for_each(|instance| instance.protocol = Protocol::Http);
        Vec::new()
    };
    let mesh = Mesh::start_on(2, &Authority::new(), "*", with_dead).await;
    let mut local = upstreams(&[mesh.upstream]);
    local.upstreams.iter_mut().for_each(|upstream| upstream.protocol = Some(Protocol::Http));
    mesh.a.publish_local(local, &[("b", mesh.b.addr, "web-1"), ("b", mesh.b.addr, "web-2")]);
    let requests = async {
        for _ in 0..CONNECTIONS {
            let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    };
    tokio::select! {
        never = answer(&mesh.app) => never,
        () = within(requests) => {}
    }
    // Half of the turns are the dead instance's; each of the two workers meets it once a second at most.
    let met = mesh.b.count("weft_http_requests_total", &["reporter=\"destination\"", "\"UF\""]);
    assert!((1..CONNECTIONS / 4).contains(&met), "{met}");
    mesh.stop().await;
}

#[tokio::test]
async fn bytes_never_come_to_an_app_that_takes_requests() {
    let authority = Authority::new();
    let registered = |protocol| {
        move |local: &mut crate::catalogue::LocalView| {
            local.instances.values_mut().for_each(|instance| instance.protocol = protocol);
            Vec::new()
        }
    };
    // As it is registered, and as an entry says that the registration means nothing else.
    for (protocol, entry) in [(Protocol::Http, None), (Protocol::Grpc, None), (Protocol::Tcp, Some("http"))] {
        let mesh = Mesh::start_on(1, &authority, "*", registered(protocol)).await;
        if let Some(said) = entry {
            mesh.b.say(&[("service-defaults", "web", serde_json::json!({"Protocol": said}))]);
        }
        let peer = stranger(&authority, "x");
        let tunnel = within(peer.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
        let forged = b"GET /admin HTTP/1.1\r\nhost: web\r\n\
                       x-forwarded-client-cert: URI=spiffe://test.example/svc/admin/node/b\r\n\r\n";
        if let Some((mut send, _recv)) = within(call(&tunnel)).await {
            within(send.write_all(forged)).await.unwrap();
            let (mut app, _) = within(mesh.app.accept()).await.unwrap();
            let mut seen = vec![0; forged.len()];
            within(app.read_exact(&mut seen)).await.unwrap();
            panic!("the app was told: {}", String::from_utf8_lossy(&seen));
        }
        // What does not wait for the status is refused as well.
        let (mut send, mut recv) = within(tunnel.open_bi()).await.unwrap();
        within(send.write_all(&[&preamble(StreamKind::Tcp)[..], forged].concat())).await.unwrap();
        let mut status = [0];
        within(recv.read_exact(&mut status)).await.unwrap();
        assert_eq!(status, [StreamStatus::UnknownInstance.byte()]);
        assert!(mesh.app.accept().now_or_never().is_none(), "the app was connected");
        assert_eq!(mesh.b.count("weft_quic_refused_total", &["reason=\"protocol\""]), 2);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_instance_takes_nothing_in_another_service_s_name() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let peer = stranger(&authority, "x");
    let tunnel = within(peer.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    let (mut send, mut recv) = within(tunnel.open_bi()).await.unwrap();
    // Who may call `free` may not by that call `web`.
    let (instance, service) = ("web-1".parse().unwrap(), "free".parse().unwrap());
    within(send.write_all(&Preamble { kind: StreamKind::Tcp, instance, service }.encode())).await.unwrap();
    let mut status = [0];
    within(recv.read_exact(&mut status)).await.unwrap();
    assert_eq!(status, [StreamStatus::UnknownInstance.byte()]);
    assert!(mesh.app.accept().now_or_never().is_none(), "the app was connected");
    mesh.stop().await;
}

#[tokio::test]
async fn the_destination_decides_before_a_connection_meets_the_app() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let peer = stranger(&authority, "x");
    let tunnel = within(peer.connect(mesh.b.addr, "mesh.weft").unwrap()).await.unwrap();
    for (action, want) in [(Action::Deny, StreamStatus::Forbidden), (Action::Allow, StreamStatus::Ok)] {
        assert!(mesh.app.accept().now_or_never().is_none(), "the app was connected");
        mesh.b.decide(action);
        let (mut send, mut recv) = within(tunnel.open_bi()).await.unwrap();
        within(send.write_all(&preamble(StreamKind::Tcp))).await.unwrap();
        let mut status = [0];
        within(recv.read_exact(&mut status)).await.unwrap();
        assert_eq!(status, [want.byte()]);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_app_is_called_by_the_protocol_that_an_entry_says() {
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| Vec::new()).await;
    let said = [("service-defaults", "web", serde_json::json!({"Protocol": "http2"}))];
    mesh.a.say(&said);
    mesh.b.say(&said);
    let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let (mut app, _) = within(mesh.app.accept()).await.unwrap();
    let mut preface = [0; 24];
    within(app.read_exact(&mut preface)).await.unwrap();
    assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    drop((client, app));
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_of_bytes_goes_on_by_requests_where_its_service_has_just_turned_to_them() {
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| Vec::new()).await;
    let http = [("service-defaults", "web", serde_json::json!({"Protocol": "http"}))];
    // The destination hears of it first.
    mesh.b.say(&http);
    let request = async {
        let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let turn = async {
        mesh.b.counts("weft_quic_refused_total", &["reason=\"protocol\""], 1).await;
        mesh.a.say(&http);
    };
    tokio::select! {
        never = answer(&mesh.app) => never,
        (said, ()) = within(async { tokio::join!(request, turn) }) => assert!(said.starts_with("HTTP/1.1 200"), "{said}"),
    }
    mesh.stop().await;
}

/// An app that answers every request of every connection.
pub(super) async fn answer(app: &TcpListener) {
    let serve = async |mut stream: TcpStream| {
        let mut head = Vec::new();
        while stream.read_buf(&mut head).await.is_ok_and(|bytes| bytes > 0) {
            if head.ends_with(b"\r\n\r\n") {
                head.clear();
                // The caller may be gone.
                let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            }
        }
    };
    // As many as there are requests, and as workers race to open: connections are kept and used again.
    let accept = async || serve(app.accept().await.unwrap().0).await;
    join_all((0..CONNECTIONS).map(|_| accept())).await;
    std::future::pending::<()>().await;
}

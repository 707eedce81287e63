//! Two nodes on loopback, with throw-away certificates: an app's connection goes through both.

mod bounds;
mod bytes;
mod dead;
mod drain;
mod harness;
mod limits;
mod listeners;
mod nat;
mod udp;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use self::harness::{Authority, Mesh, Node, free_port, full, serve, stranger};
use super::paths::{ACCEPTOR, DIALER, PathMetrics, Paths};
use crate::catalogue::LocalView;
use crate::metrics::Metrics;

/// Enough to tell a share of the turns from a few tries.
const CONNECTIONS: u64 = 40;
const SOURCE: &str = "reporter=\"source\"";

#[tokio::test]
async fn each_side_may_end_first_and_the_other_direction_goes_on() {
    let mesh = Mesh::start().await;
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
    mesh.a.counts("weft_tcp_received_bytes_total", &["reporter=\"source\""], 14).await;
    mesh.stop().await;
}

#[tokio::test]
async fn what_the_paths_of_tunnels_are_like_is_counted_by_side() {
    let authority = Authority::new();
    let (caller, server) = (stranger(&authority, "x"), full(&authority, "y"));
    let accepted = async { server.accept().await.unwrap().await.unwrap() };
    let dialled = caller.connect(server.local_addr().unwrap(), "mesh.weft").unwrap();
    let (accepted, dialled) = within(async { tokio::join!(accepted, dialled) }).await;
    let metrics = Metrics::new();
    let paths = Paths::new(PathMetrics::register(&metrics).unwrap());
    let dialled = dialled.unwrap();
    let watched =
        [paths.watch(&dialled, DIALER, &"y".parse().unwrap()), paths.watch(&accepted, ACCEPTOR, &"x".parse().unwrap())];
    let shown = |name: &str, part: &str, side: &str| {
        let text = metrics.render().unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{part}{{side=\"{side}\"}}")));
        line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
    };
    for looks in [1.0, 2.0] {
        paths.look();
        for side in ["dialer", "acceptor"] {
            assert!((shown("weft_quic_rtt_seconds", "_count", side) - looks).abs() < 0.5, "{side}");
            assert!(shown("weft_quic_rtt_seconds", "_sum", side) > 0.0, "{side}");
            assert!(shown("weft_quic_congestion_window_bytes", "_sum", side) >= looks * 10_000.0, "{side}");
        }
    }
    // A handshake takes some packets each way; what follows the last look is counted at the end.
    let before = shown("weft_quic_packets_sent_total", "", "dialer");
    assert!(before >= 2.0, "{before}");
    dialled.send_datagram(b"one more".as_slice().into()).unwrap();
    within(accepted.read_datagram()).await.unwrap();
    drop(watched);
    assert!(shown("weft_quic_packets_sent_total", "", "dialer") > before);
    // Nothing is looked at twice, and nothing that is gone.
    paths.look();
    assert!((shown("weft_quic_rtt_seconds", "_count", "dialer") - 2.0).abs() < 0.5);
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let mesh = Mesh::start().await;
    let (mut client, mut app) = mesh.connect().await;
    app.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    within(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
    drop((client, app));
    mesh.stop().await;
}

#[tokio::test]
async fn an_app_that_asks_is_told_who_calls_and_no_header_of_a_caller_is_believed() {
    let announced = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = announced.local_addr().unwrap();
    let mesh = Mesh::start_with(&Authority::new(), "*", |local| {
        local.instances.clear();
        serve(local, "web-announced", addr);
        Vec::new()
    })
    .await;
    let mut client = within(TcpStream::connect(mesh.upstream)).await.unwrap();
    // What a caller sends is the app's to read, whatever it looks like.
    let forged = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0cforged------";
    client.write_all(forged).await.unwrap();
    client.shutdown().await.unwrap();
    let (mut app, _) = within(announced.accept()).await.unwrap();
    let seen = within(read_all(&mut app)).await.unwrap();
    let length = 16 + usize::from(u16::from_be_bytes([seen[14], seen[15]]));
    let (header, rest) = seen.split_at(length);
    assert_eq!(
        (&header[..16], &header[16..20], &header[20..24]),
        (
            [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11"[..], &header[14..16]].concat().as_slice(),
            &[127, 0, 0, 1][..],
            &[127, 0, 0, 1][..]
        )
    );
    let at = u16::from_be_bytes([header[26], header[27]]);
    assert_eq!(at, addr.port());
    assert!(header.ends_with(b"/node/a"), "{}", String::from_utf8_lossy(header));
    assert_eq!(rest, forged);
    drop(app);
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_of_one_side_is_a_reset_of_the_other() {
    let mesh = Mesh::start().await;
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
async fn faults_that_are_about_no_request_alone_delay_and_reset_connections() {
    let mesh = Mesh::start().await;
    let say = |faults: serde_json::Value| mesh.a.say(&[("service-faults", "web", json!({ "Faults": faults }))]);
    let closed = |flag: &'static str| [SOURCE, flag];
    say(json!([{"Match": {"HTTP": {"PathPrefix": "/"}}, "Abort": {"Reset": true}}, {"Abort": {"Reset": true}}]));
    is_reset(mesh.upstream).await;
    mesh.a.counts("weft_tcp_connections_closed_total", &closed("\"FI\""), 1).await;

    // A status means nothing to bytes; a delay does.
    say(json!([{"Abort": {"HTTPStatus": 503}, "Delay": {"Duration": "200ms"}}]));
    let begun = crate::clock::now();
    let (client, app) = mesh.connect().await;
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    end_well(client, app).await;
    mesh.a.counts("weft_tcp_connections_closed_total", &closed("\"DI\""), 1).await;

    mesh.a.say(&[]);
    let (client, app) = mesh.connect().await;
    end_well(client, app).await;
    mesh.a.counts("weft_tcp_connections_closed_total", &closed("\"-\""), 1).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_silent_connection_is_reset_after_the_time_that_its_service_s_resolver_says_by_either_side() {
    let mesh = Mesh::start().await;
    let resolver = [("service-resolver", "web", json!({"IdleTimeout": "300ms"}))];
    for (says, silent) in [(&mesh.a, &mesh.b), (&mesh.b, &mesh.a)] {
        silent.say(&[]);
        says.say(&resolver);
        let (mut client, mut app) = mesh.connect().await;
        let begun = crate::clock::now();
        client.write_all(b"x").await.unwrap();
        app.read_exact(&mut [0]).await.unwrap();
        let error = read_all(&mut client).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(read_all(&mut app).await.is_err(), "it looks finished");
        assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
        says.counts("weft_tcp_connections_closed_total", &["\"SI\""], 1).await;
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_instance_whose_app_is_gone_is_passed_over_and_left_alone_for_a_while() {
    let with_dead = |local: &mut LocalView| {
        serve(local, "web-2", free_port());
        Vec::new()
    };
    let mesh = Mesh::start_with(&Authority::new(), "*", with_dead).await;
    for _ in 0..CONNECTIONS {
        round_trip(&mesh).await;
    }
    // Half of the turns are the dead instance's; each of the two workers meets it once a second at most.
    let met = mesh.b.count("weft_tcp_connections_closed_total", &["reporter=\"destination\"", "\"UF\""]);
    assert!((1..CONNECTIONS / 4).contains(&met), "{met}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_whose_certificate_lacks_the_service_gets_no_call_and_another_is_used() {
    let authority = Authority::new();
    let elsewhere = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut local = LocalView::default();
    serve(&mut local, "web-9", elsewhere.local_addr().unwrap());
    let outside = Node::start(&authority, "c", "api-*", local);
    let addr = outside.addr;
    let mesh = Mesh::start_with(&authority, "*", |_| vec![("c", addr, "web-9")]).await;
    for _ in 0..CONNECTIONS {
        round_trip(&mesh).await;
    }
    // Half of the turns are the other node's; each of the two workers meets it once a second at most.
    let kept_away = mesh.a.count("weft_proxy_outside_scope_total", &[]);
    assert!((1..CONNECTIONS / 4).contains(&kept_away), "{kept_away}");
    // The tunnel came up: it is the scope that keeps the calls away.
    assert_eq!(mesh.a.count("weft_quic_dial_failures_total", &[]), 0);
    assert!(outside.count("weft_quic_handshakes_total", &["acceptor"]) >= 1);
    assert_eq!(outside.count("weft_tcp_connections_opened_total", &[]), 0);
    mesh.stop().await;
    within(outside.handle.shutdown()).await;
}

#[tokio::test]
async fn a_service_that_only_a_node_outside_its_scope_announces_is_unreachable() {
    let mesh = Mesh::start_with(&Authority::new(), "api-*", |_| Vec::new()).await;
    is_reset(mesh.upstream).await;
    assert_eq!(mesh.a.count("weft_proxy_outside_scope_total", &[]), 1);
    mesh.a.counts("weft_tcp_connections_closed_total", &["\"UF\""], 1).await;
    assert_eq!(mesh.b.count("weft_tcp_connections_opened_total", &[]), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_flood_of_garbage_on_the_mesh_port_changes_nothing() {
    let mesh = Mesh::start().await;
    let (mut client, mut app) = mesh.connect().await;
    let before = mesh.b.count("weft_quic_handshakes_total", &[]);
    let flooder = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    for at in 0..4_000_u32 {
        let length = usize::try_from(at % 1_400).unwrap();
        let mut garbage: Vec<u8> = (0..length).map(|_| rand::random()).collect();
        if at % 3 == 0 && length > 7 {
            // As near to a first packet as garbage comes: a long header of version 1 that leads to a worker.
            garbage[..7].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8, rand::random::<u8>() % 128]);
        }
        // A full socket buffer drops the datagram, as the kernel does under a flood.
        let _dropped = flooder.send_to(&garbage, mesh.b.addr).await;
    }
    client.write_all(b"still").await.unwrap();
    within(app.read_exact(&mut [0; 5])).await.unwrap();
    drop((client, app));
    assert_eq!(mesh.b.count("weft_quic_handshakes_total", &[]), before);
    round_trip(&mesh).await;
    // Garbage that looks like a first packet may count as a handshake that failed; nothing else may come of it.
    let refused = |labels: &[&str]| mesh.b.count("weft_quic_refused_total", labels);
    assert_eq!(refused(&[]), refused(&["reason=\"handshake\""]));
    assert_eq!(mesh.b.count("weft_proxy_panics_total", &[]), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_that_is_open_ends_in_peace_while_the_agent_drains() {
    let mesh = Mesh::start().await;
    let (mut client, mut app) = mesh.connect().await;
    let (source, server) = (mesh.a.handle.drain.clone(), mesh.b.handle.drain.clone());
    source.cancel();
    server.cancel();
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut app).await.unwrap(), b"late");
    // More than one round trip carries: the agent must not close the tunnel before all has arrived.
    let reply = pattern(1 << 20);
    let answer = async {
        app.write_all(&reply).await.unwrap();
        drop(app);
    };
    let ((), read) = tokio::join!(answer, read_all(&mut client));
    assert!(read.unwrap() == reply);
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
            let mesh = Mesh::start().await;
            let (client, app) = mesh.connect().await;
            let (mut client_in, mut client_out) = client.into_split();
            let (mut app_in, mut app_out) = app.into_split();
            let ((), (), at_app, at_client) = tokio::join!(
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
    (0..bytes).map(|at| (at.wrapping_mul(31) ^ (at >> 8)).to_le_bytes()[0]).collect()
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

/// Opens a connection, passes a byte from the app to the client, and closes it.
async fn round_trip(mesh: &Mesh) {
    let (mut client, mut app) = mesh.connect().await;
    app.write_all(b"!").await.unwrap();
    within(client.read_exact(&mut [0])).await.unwrap();
}

/// Ends a connection by each side's FIN.
async fn end_well(mut client: TcpStream, mut app: TcpStream) {
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut app).await.unwrap(), b"");
    app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"");
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends in time")
}

async fn read_all(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    within(stream.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

/// Asserts that a new connection to `port` is reset. That may come before this side sees that it is connected at all:
/// then `connect` has the error, and no read.
async fn is_reset(port: SocketAddr) {
    let connect = async { read_all(&mut TcpStream::connect(port).await?).await };
    assert_eq!(within(connect).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// Makes the next close send an RST.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

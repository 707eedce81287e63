//! Upstream ports as the catalogue and the other programs of the host change.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::harness::{Authority, Mesh, Node, free_port, upstreams};
use super::{round_trip, within};
use crate::catalogue::{LocalGateway, LocalView};
use crate::model::ServiceName;
use crate::proxy::ListenerState;

#[tokio::test]
async fn a_port_that_another_program_has_is_told_and_opens_once_it_is_free() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = taken.local_addr().unwrap();
    let node = Node::start(&Authority::new(), "a", "*", upstreams(&[port]));
    let is_told =
        |state: Option<&ListenerState>| matches!(state, Some(ListenerState::Failed(why)) if why.contains("in use"));
    node.sees(port, is_told).await;
    assert_eq!(node.count("weft_proxy_listeners_failed", &[]), 1);
    drop(taken);
    node.sees(port, |state| state == Some(&ListenerState::Listening)).await;
    // There is no such service: the connection is accepted and reset, perhaps before this side looks at it.
    let refused =
        within(TcpStream::connect(port)).await.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    assert!(!refused);
    assert_eq!(node.count("weft_proxy_listeners_failed", &[]), 0);
    node.handle.shutdown().await;
}

#[tokio::test]
async fn connections_that_the_kernel_deals_unevenly_are_handed_to_the_worker_with_fewer() {
    let mesh = Mesh::start().await;
    let mut open = Vec::new();
    // That the kernel deals them evenly all the way is a chance of one in a million.
    for _ in 0..40 {
        open.push(mesh.connect().await);
    }
    assert!(mesh.a.count("weft_proxy_connections_handed_total", &[]) > 0);
    for (client, app) in &mut open {
        client.write_all(b"whole").await.unwrap();
        let mut read = [0; 5];
        within(app.read_exact(&mut read)).await.unwrap();
        assert_eq!(&read, b"whole");
    }
    drop(open);
    mesh.stop().await;
}

#[tokio::test]
async fn upstream_ports_follow_the_catalogue() {
    let mut mesh = Mesh::start().await;
    let (old, new) = (mesh.upstream, free_port());
    let places = [("b", mesh.b.addr, "web-1")];
    mesh.a.publish(&[old, new], &places);
    mesh.a.sees(new, |state| state == Some(&ListenerState::Listening)).await;
    round_trip(&mesh).await;
    mesh.upstream = new;
    round_trip(&mesh).await;
    mesh.a.publish(&[new], &places);
    mesh.a.sees(old, |state| state.is_none()).await;
    refuses(old).await;
    round_trip(&mesh).await;
    mesh.stop().await;
}

/// What the gateway `edge` says: these ports, each leading bytes to `web`.
fn edge(ports: &[SocketAddr]) -> (&'static str, &'static str, Value) {
    let listener = |port: &SocketAddr| json!({"Port": port.port(), "Services": [{"Name": "web"}]});
    ("ingress-gateway", "edge", json!({"Listeners": ports.iter().map(listener).collect::<Vec<Value>>()}))
}

#[tokio::test]
async fn a_gateway_s_ports_follow_its_entry_and_what_is_open_goes_on() {
    let mut mesh = Mesh::start().await;
    let (upstream, first, second) = (mesh.upstream, free_port(), free_port());
    let is_listening = |state: Option<&ListenerState>| state == Some(&ListenerState::Listening);
    let gateways = vec![LocalGateway { service: "edge".parse().unwrap(), ip: first.ip() }];
    mesh.a.publish_local(LocalView { gateways, ..upstreams(&[upstream]) }, &[("b", mesh.b.addr, "web-1")]);
    let of = |source: &str| ["reporter=\"source\"".to_owned(), format!("source_service=\"{source}\"")];
    let opened = |mesh: &Mesh, source: &str| {
        let labels = of(source);
        mesh.a.count("weft_tcp_connections_opened_total", &labels.each_ref().map(String::as_str))
    };

    mesh.a.say(&[edge(&[first])]);
    mesh.a.sees(first, is_listening).await;
    mesh.upstream = first;
    round_trip(&mesh).await;
    assert_eq!((opened(&mesh, "edge"), opened(&mesh, "app")), (1, 0), "the gateway calls in its own name");
    let (mut client, mut app) = mesh.connect().await;

    // Its first port goes, another comes; the upstream's port is not the gateway's to take.
    mesh.a.say(&[edge(&[second, upstream])]);
    mesh.a.sees(second, is_listening).await;
    mesh.a.sees(first, |state| state.is_none()).await;
    refuses(first).await;
    client.write_all(b"on").await.unwrap();
    let mut seen = [0; 2];
    within(app.read_exact(&mut seen)).await.unwrap();
    assert_eq!(&seen, b"on", "what was open goes on");
    for (port, source) in [(second, "edge"), (upstream, "app")] {
        let before = opened(&mesh, source);
        mesh.upstream = port;
        round_trip(&mesh).await;
        assert_eq!(opened(&mesh, source), before + 1, "{source}");
    }

    // Without its entry it has no port.
    mesh.a.say(&[]);
    mesh.a.sees(second, |state| state.is_none()).await;
    mesh.a.sees(upstream, is_listening).await;
    drop((client, app));
    mesh.stop().await;
}

#[tokio::test]
async fn a_gateway_s_port_that_another_program_has_is_told_and_opens_once_it_is_free() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = taken.local_addr().unwrap();
    let gateways = vec![LocalGateway { service: "edge".parse().unwrap(), ip: port.ip() }];
    let node = Node::start(&Authority::new(), "a", "*", LocalView { gateways, ..LocalView::default() });
    node.say(&[edge(&[port])]);
    node.sees(port, |state| matches!(state, Some(ListenerState::Failed(why)) if why.contains("in use"))).await;
    drop(taken);
    node.sees(port, |state| state == Some(&ListenerState::Listening)).await;
    node.handle.shutdown().await;
}

#[tokio::test]
async fn a_gateway_s_port_for_bytes_is_closed_while_its_service_takes_requests() {
    let mut mesh = Mesh::start().await;
    let port = free_port();
    let gateways = vec![LocalGateway { service: "edge".parse().unwrap(), ip: port.ip() }];
    mesh.a.publish_local(LocalView { gateways, ..upstreams(&[mesh.upstream]) }, &[("b", mesh.b.addr, "web-1")]);
    let is_listening = |state: Option<&ListenerState>| state == Some(&ListenerState::Listening);
    mesh.a.say(&[edge(&[port])]);
    mesh.a.sees(port, is_listening).await;
    // What it may not have is an upstream's all the same: of two that ask for one port the first has it.
    mesh.a.say(&[edge(&[port, mesh.upstream]), ("service-defaults", "web", json!({"Protocol": "http"}))]);
    let is_told = |state: Option<&ListenerState>| matches!(state, Some(ListenerState::Failed(why)) if why.contains("protocol http"));
    mesh.a.sees(port, is_told).await;
    mesh.a.sees(mesh.upstream, is_listening).await;
    refuses(port).await;
    mesh.a.say(&[edge(&[port])]);
    mesh.a.sees(port, is_listening).await;
    mesh.upstream = port;
    round_trip(&mesh).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_call_is_shown_as_it_is_carried_also_where_its_name_leads_elsewhere() {
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| Vec::new()).await;
    let redirect = ("service-resolver", "shop", json!({"Redirect": {"Service": "web"}}));
    for (protocol, algorithm) in [("http", "peak_ewma"), ("tcp", "least_request")] {
        mesh.a.say(&[redirect.clone(), ("service-defaults", "web", json!({"Protocol": protocol}))]);
        let shop: ServiceName = "shop".parse().unwrap();
        let to = Arc::clone(&mesh.a.traffic().chain(&shop).unwrap().stream);
        mesh.a.knows_of((shop, to), |view| view.group.algorithm == algorithm).await;
    }
    mesh.stop().await;
}

/// Waits until nobody listens on `port`: each worker closes its own socket.
async fn refuses(port: SocketAddr) {
    within(async {
        while TcpStream::connect(port).await.map_or_else(|error| error.kind(), |_| ErrorKind::Other)
            != ErrorKind::ConnectionRefused
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

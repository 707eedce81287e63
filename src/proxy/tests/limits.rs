//! What a worker does where an instance has as much as it bears, or cannot be connected in time.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::bounds::answer;
use super::harness::{Authority, DRAIN_TIMEOUT, Mesh, full, upstreams};
use super::{is_reset, round_trip, within};
use crate::model::{Protocol, ServiceName};
use crate::proxy::WorkerView;
use crate::routing::Standing;

/// One worker each; the app speaks HTTP.
pub(super) async fn of_http(authority: &Arc<Authority>) -> Mesh {
    of_requests(DRAIN_TIMEOUT, Protocol::Http, authority).await
}

/// The same with an app of `protocol`; what is open is cut `drain_timeout` after the drain began.
pub(super) async fn of_requests(drain_timeout: Duration, protocol: Protocol, authority: &Arc<Authority>) -> Mesh {
    let is_http = |local: &mut crate::catalogue::LocalView| {
        local.instances.values_mut().for_each(|instance| instance.protocol = protocol);
        Vec::new()
    };
    let mesh = Mesh::start_as((1, drain_timeout), authority, "*", is_http).await;
    mesh.a.publish_local(http_ports(&mesh), &[("b", mesh.b.addr, "web-1")]);
    mesh
}

fn http_ports(mesh: &Mesh) -> crate::catalogue::LocalView {
    let mut local = upstreams(&[mesh.upstream]);
    local.upstreams.iter_mut().for_each(|upstream| upstream.protocol = Some(Protocol::Http));
    local
}

/// One worker that may bring the app, which speaks HTTP, one request at a time.
async fn one_at_a_time() -> Mesh {
    let mesh = of_http(&Authority::new()).await;
    let limits = json!({"Limits": {"MaxRequestsPerInstance": 1, "MaxPendingRequests": 1}});
    mesh.a.say(&[("service-defaults", "app", json!({"UpstreamConfig": {"Defaults": limits}}))]);
    mesh
}

pub(super) async fn ask(mesh: &Mesh, headers: &str) -> TcpStream {
    let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
    let head = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{headers}\r\n");
    client.write_all(head.as_bytes()).await.unwrap();
    client
}

pub(super) async fn answer_of(mut client: TcpStream) -> String {
    let mut answer = String::new();
    within(client.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// Takes a request at the app.
pub(super) async fn take(app: &TcpListener) -> TcpStream {
    let (mut stream, _) = within(app.accept()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(within(stream.read_buf(&mut head)).await.unwrap() > 0);
    }
    stream
}

pub(super) async fn give(mut stream: TcpStream) {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await.unwrap();
}

#[tokio::test]
async fn a_request_waits_for_an_instance_in_a_queue_that_is_bounded_in_number_and_time() {
    let mesh = one_at_a_time().await;
    // Answers take 1.5 s here: so long may a burst wait.
    let client = ask(&mesh, "").await;
    let stream = take(&mesh.app).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    give(stream).await;
    assert!(answer_of(client).await.starts_with("HTTP/1.1 200"));

    let first = ask(&mesh, "").await;
    let held = take(&mesh.app).await;
    let second = ask(&mesh, "").await;
    mesh.a.knows(|view| view.group.waiting == 1).await;
    // One waits: there is no room for another, and what may be refused does not wait.
    for (header, why) in [("", "pending"), ("x-weft-priority: low\r\n", "priority")] {
        let answer = answer_of(ask(&mesh, header).await).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains(&format!("x-weft-overflow: {why}\r\n")), "{answer}");
    }
    give(held).await;
    assert!(answer_of(first).await.starts_with("HTTP/1.1 200"));
    let held = take(&mesh.app).await;
    // The app does not answer the second one: a third is refused when its time is over, and one whose caller left is
    // no longer in the queue.
    let gone = ask(&mesh, "").await;
    mesh.a.knows(|view| view.group.waiting == 1).await;
    drop(gone);
    mesh.a.knows(|view| view.group.waiting == 0).await;
    let late = answer_of(ask(&mesh, "").await).await;
    assert!(late.starts_with("HTTP/1.1 503") && late.contains("x-weft-overflow: instances\r\n"), "{late}");
    give(held).await;
    assert!(answer_of(second).await.starts_with("HTTP/1.1 200"));
    mesh.a.counts("weft_balancer_queued_total", &["served"], 1).await;
    mesh.a.counts("weft_balancer_queued_total", &["timeout"], 1).await;
    mesh.stop().await;
}

#[tokio::test]
async fn what_is_over_a_limit_of_connections_or_requests_is_refused_at_once_and_waits_for_nothing() {
    let limit = |name: &str| json!({"UpstreamConfig": {"Defaults": {"Limits": {name: 1}}}});
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| Vec::new()).await;
    mesh.a.say(&[("service-defaults", "app", limit("MaxConnections"))]);
    let (client, app) = mesh.connect().await;
    is_reset(mesh.upstream).await;
    mesh.a.counts("weft_tcp_connections_closed_total", &["\"UO\""], 1).await;
    mesh.a.counts("weft_balancer_overflow_total", &["\"connections\""], 1).await;
    drop((client, app));
    mesh.a.counts("weft_tcp_connections_active", &["reporter=\"source\""], 0).await;
    round_trip(&mesh).await;
    mesh.stop().await;

    let mesh = of_http(&Authority::new()).await;
    mesh.a.say(&[("service-defaults", "app", limit("MaxConcurrentRequests"))]);
    let first = ask(&mesh, "").await;
    let held = take(&mesh.app).await;
    let answer = answer_of(ask(&mesh, "").await).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-weft-overflow: requests\r\n"), "{answer}");
    assert_eq!(mesh.a.count("weft_balancer_queued_total", &[]), 0);
    give(held).await;
    assert!(answer_of(first).await.starts_with("HTTP/1.1 200"));
    mesh.stop().await;
}

#[tokio::test]
async fn why_shows_a_service_that_bears_no_more_and_not_what_others_fail_over_to() {
    let mesh = of_http(&Authority::new()).await;
    let limits = json!({"Limits": {"MaxRequestsPerInstance": 1}});
    let subset =
        json!({"Subsets": {"all": {"Filter": "Service.Port != 1"}}, "Failover": {"*": {"ServiceSubset": "all"}}});
    mesh.a.say(&[
        ("service-defaults", "app", json!({"UpstreamConfig": {"Defaults": limits}})),
        ("service-defaults", "web", json!({"Protocol": "http"})),
        ("service-resolver", "web", subset),
    ]);
    let client = ask(&mesh, "").await;
    let held = take(&mesh.app).await;
    let web: ServiceName = "web".parse().unwrap();
    let to = Arc::clone(&mesh.a.traffic().chain(&web).unwrap().stream);
    assert_eq!(to.failover.len(), 1);
    let target = to.target.id.clone();
    let is_full = |view: &WorkerView| view.target == target && view.why_none.contains("as its limits allow");
    mesh.a.knows_of((web, to), is_full).await;
    give(held).await;
    assert!(answer_of(client).await.starts_with("HTTP/1.1 200"));
    mesh.stop().await;
}

#[tokio::test]
async fn an_instance_that_is_not_connected_within_its_timeout_is_left_alone_for_a_while() {
    // Datagrams vanish here: a dial would take 3 s.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap();
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| vec![("c", addr, "web-9")]).await;
    mesh.a.say(&[("service-resolver", "web", json!({"ConnectTimeout": "200ms"}))]);
    let calls = async {
        loop {
            round_trip(&mesh).await;
        }
    };
    tokio::select! {
        () = calls => {}
        () = mesh.a.knows(|view| view.backing_off.iter().any(|(node, _)| node.as_str() == "c")) => {}
    }
    mesh.stop().await;
}

/// Turns between the app and a node that gives no stream; whatever failed once would be ejected.
fn in_turns(connect_timeout: &str) -> [(&'static str, &'static str, serde_json::Value); 2] {
    let resolver = json!({"ConnectTimeout": connect_timeout, "LoadBalancer": {"Policy": "round_robin"}});
    let guard = json!({"UpstreamConfig": {"Defaults": {"PassiveHealthCheck": {"MaxFailures": 1}}}});
    [("service-resolver", "web", resolver), ("service-defaults", "app", guard)]
}

/// Lets in whoever dials, and keeps all connections.
async fn accept_all(endpoint: &quinn::Endpoint) {
    let mut held = Vec::new();
    while let Some(incoming) = endpoint.accept().await {
        held.extend(incoming.await.ok());
    }
}

fn is_full_instance_in_use(view: &WorkerView) -> bool {
    let mut seats = view.group.seats.iter().filter(|seat| seat.node.as_str() == "c");
    view.backing_off.is_empty() && seats.any(|seat| seat.standing == Standing::Closed)
}

#[tokio::test]
async fn a_request_to_a_node_that_gives_no_stream_goes_to_another_and_counts_against_nobody() {
    let authority = Authority::new();
    let mesh = of_http(&authority).await;
    let endpoint = full(&authority, "c");
    let there = ("c", endpoint.local_addr().unwrap(), "web-9");
    mesh.a.publish_local(http_ports(&mesh), &[("b", mesh.b.addr, "web-1"), there]);
    let requests = async {
        // Time for the handshakes, and then little for a stream.
        for connect_timeout in ["2s", "300ms"] {
            mesh.a.say(&in_turns(connect_timeout));
            for _ in 0..2 {
                let answer = answer_of(ask(&mesh, "").await).await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
        }
        // It was its turn: the tunnel is there, and gave nothing.
        assert_eq!(mesh.a.count("weft_quic_handshakes_total", &["dialer"]), 2);
        mesh.a.knows(is_full_instance_in_use).await;
        assert_eq!(mesh.a.count("weft_balancer_overflow_total", &[]), 0, "nothing was refused");
        assert_eq!(mesh.a.count("weft_balancer_ejections_total", &[]), 0);

        // Where there is no other, the request is refused as one that waits too long.
        mesh.a.publish_local(http_ports(&mesh), &[there]);
        mesh.a.knows(|view| view.group.seats.len() == 1).await;
        let refused = answer_of(ask(&mesh, "").await).await;
        assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("x-weft-overflow: pending\r\n"), "{refused}");
        mesh.a.counts("weft_balancer_overflow_total", &["pending"], 1).await;
    };
    tokio::select! {
        () = accept_all(&endpoint) => unreachable!("the endpoint is open"),
        never = answer(&mesh.app) => never,
        () = within(requests) => {}
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_to_a_node_that_gives_no_stream_goes_to_another_as_well() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let endpoint = full(&authority, "c");
    let there = ("c", endpoint.local_addr().unwrap(), "web-9");
    mesh.a.publish(&[mesh.upstream], &[("b", mesh.b.addr, "web-1"), there]);
    let calls = async {
        for connect_timeout in ["2s", "300ms"] {
            mesh.a.say(&in_turns(connect_timeout));
            for _ in 0..2 {
                round_trip(&mesh).await;
            }
        }
        mesh.a.knows(is_full_instance_in_use).await;
        assert_eq!(mesh.a.count("weft_balancer_overflow_total", &[]), 0);
        mesh.a.publish(&[mesh.upstream], &[there]);
        mesh.a.knows(|view| view.group.seats.len() == 1).await;
        is_reset(mesh.upstream).await;
        mesh.a.counts("weft_tcp_connections_closed_total", &["\"UO\""], 1).await;
        assert_eq!(mesh.a.count("weft_balancer_overflow_total", &["pending"]), 1);
    };
    tokio::select! {
        () = accept_all(&endpoint) => unreachable!("the endpoint is open"),
        () = within(calls) => {}
    }
    mesh.stop().await;
}

#[tokio::test]
async fn connections_over_the_rate_of_their_service_are_reset_and_counted_against_no_instance() {
    let mesh = Mesh::start().await;
    let limits = json!({"InstanceLevel": {"RequestsPerSecond": 0.001, "RequestsMaxBurst": 3, "Per": "source"}});
    mesh.b.say(&[("service-defaults", "web", json!({ "RateLimits": limits }))]);
    for _ in 0..3 {
        round_trip(&mesh).await;
    }
    for over in 1..=20 {
        is_reset(mesh.upstream).await;
        mesh.a.counts("weft_tcp_connections_closed_total", &["reporter=\"source\"", "\"RL\""], over).await;
    }
    assert_eq!(mesh.b.count("weft_quic_refused_total", &["\"rate\""]), 20);
    assert_eq!(mesh.b.count("weft_http_rate_limited_total", &["\"web\""]), 20);
    // No breaker opened, and nothing backs off: without the limit the next one passes.
    mesh.b.say(&[]);
    round_trip(&mesh).await;
    mesh.a
        .knows(|view| {
            view.backing_off.is_empty() && view.group.seats.iter().all(|seat| seat.standing == Standing::Closed)
        })
        .await;
    mesh.stop().await;
}

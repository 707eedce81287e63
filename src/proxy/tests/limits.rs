//! What a worker does where an instance has as much as it bears, or cannot be connected in time.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::harness::{Authority, Mesh, upstreams};
use super::{round_trip, within};
use crate::model::Protocol;

/// One worker that may bring the app, which speaks HTTP, one request at a time.
async fn one_at_a_time() -> Mesh {
    let is_http = |local: &mut crate::catalogue::LocalView| {
        local.instances.values_mut().for_each(|instance| instance.protocol = Protocol::Http);
        Vec::new()
    };
    let mesh = Mesh::start_on(1, &Authority::new(), "*", is_http).await;
    let mut local = upstreams(&[mesh.upstream]);
    local.upstreams.iter_mut().for_each(|upstream| upstream.protocol = Some(Protocol::Http));
    mesh.a.publish_local(local, &[("b", mesh.b.addr, "web-1")]);
    let limits = json!({"Limits": {"MaxRequestsPerInstance": 1, "MaxPendingRequests": 1}});
    mesh.a.say(&[("service-defaults", "app", json!({"UpstreamConfig": {"Defaults": limits}}))]);
    mesh
}

async fn ask(mesh: &Mesh, headers: &str) -> TcpStream {
    let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
    let head = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{headers}\r\n");
    client.write_all(head.as_bytes()).await.unwrap();
    client
}

async fn answer_of(mut client: TcpStream) -> String {
    let mut answer = String::new();
    within(client.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// Takes a request at the app.
async fn take(app: &TcpListener) -> TcpStream {
    let (mut stream, _) = within(app.accept()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(within(stream.read_buf(&mut head)).await.unwrap() > 0);
    }
    stream
}

async fn give(mut stream: TcpStream) {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await.unwrap();
}

#[tokio::test]
async fn a_request_waits_for_an_instance_in_a_queue_that_is_bounded_in_number_and_time() {
    let mesh = one_at_a_time().await;
    // Answers take 1.5 s here: so long may a burst wait.
    let client = ask(&mesh, "").await;
    let stream = take(&mesh.app).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
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

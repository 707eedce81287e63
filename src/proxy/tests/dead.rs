//! What becomes of tunnels and dials when the membership says that a node failed.

use std::sync::mpsc;
use std::time::Duration;

use serde_json::json;
use tokio::net::{TcpStream, UdpSocket};

use super::harness::{Authority, Mesh, stranger};
use super::within;
use crate::model::MemberStatus;

/// Below the 15 s after which a silent tunnel is given up.
const BEFORE_IDLE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_dial_to_a_node_that_fails_is_given_up_and_its_caller_gets_another_instance() {
    // Takes datagrams and says nothing: a dial would take 3 s.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap();
    let mesh = Mesh::start_on(1, &Authority::new(), "*", |_| vec![("c", addr, "web-9")]).await;
    mesh.a.say(&[("service-resolver", "web", json!({"LoadBalancer": {"Policy": "round_robin"}}))]);
    let calls = async { tokio::join!(TcpStream::connect(mesh.upstream), TcpStream::connect(mesh.upstream)) };
    let (first, second) = within(calls).await;
    let _callers = (first.unwrap(), second.unwrap());
    within(silent.recv_from(&mut [0; 2_048])).await.unwrap();
    mesh.a.hears_of("c", addr, MemberStatus::Failed);
    for _ in 0..2 {
        within(mesh.app.accept()).await.unwrap();
    }
    mesh.a.counts("weft_quic_dial_failures_total", &["node_failed"], 1).await;
    mesh.stop().await;
}

#[tokio::test]
async fn tunnels_from_a_killed_node_end_and_those_of_one_that_is_wrongly_called_failed_go_on() {
    let authority = Authority::new();
    let mesh = Mesh::start_on(1, &authority, "*", |_| Vec::new()).await;
    let (to, of_killed) = (mesh.b.addr, std::sync::Arc::clone(&authority));
    let ((up, is_up), (kill, killed)) = (mpsc::channel(), mpsc::channel::<()>());
    let killed = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held = runtime.block_on(async {
            let endpoint = stranger(&of_killed, "x");
            (endpoint.connect(to, "mesh.weft").unwrap().await.unwrap(), endpoint)
        });
        up.send(held.1.local_addr().unwrap()).unwrap();
        killed.recv().unwrap();
        // Nobody is left who could say goodbye.
        drop(runtime);
        drop(held);
    });
    let x = is_up.recv().unwrap();
    let living = stranger(&authority, "y");
    let lives = within(living.connect(to, "mesh.weft").unwrap()).await.unwrap();
    mesh.b.counts("weft_quic_tunnels_open", &["acceptor"], 2).await;
    kill.send(()).unwrap();
    killed.join().unwrap();
    for (node, addr) in [("x", x), ("y", living.local_addr().unwrap())] {
        mesh.b.hears_of(node, addr, MemberStatus::Failed);
    }
    let ended = mesh.b.counts("weft_quic_tunnels_open", &["acceptor"], 1);
    tokio::time::timeout(BEFORE_IDLE, ended).await.expect("the tunnel ends with the word of its host");
    assert!(lives.close_reason().is_none(), "{:?}", lives.close_reason());
    mesh.stop().await;
}

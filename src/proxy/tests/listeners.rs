//! Upstream ports as the catalogue and the other programs of the host change.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpStream};

use super::harness::{Authority, Mesh, Node, free_port, upstreams};
use super::{round_trip, within};
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

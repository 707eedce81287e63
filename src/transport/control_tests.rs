use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use super::*;
use crate::clock;
use crate::pki::{ALPN_GOSSIP, EphemeralCa, JoinVerifier, ephemeral};
use crate::transport::bind;

#[tokio::test]
async fn gossip_peers_learn_who_the_other_is() {
    let ca = ca("td");
    let (a, b) = (Control::start(&ca, "a"), Control::start(&ca, "b"));
    let (dialled, accepted) =
        within(async { tokio::join!(a.transport.connect(b.addr, Some("b".parse().unwrap())), b.transport.accept()) })
            .await;
    let (connection, seen_by_a) = dialled.unwrap();
    let accepted = accepted.unwrap();
    assert_eq!(seen_by_a.node.as_str(), "b");
    assert_eq!(accepted.plane, Plane::Gossip);
    assert_eq!(accepted.peer.unwrap().node.as_str(), "a");
    assert_eq!(b.transport.counts(), ControlCounts { accepted: 1, ..ControlCounts::default() });
    let text = b.metrics.render().unwrap();
    assert!(text.contains("weft_transport_control_attempts_total{outcome=\"accepted\",plane=\"gossip\"} 1"), "{text}");
    assert!(text.contains("weft_transport_control_connections 1"), "{text}");
    drop(connection);
}

#[tokio::test]
async fn gossip_without_a_certificate_is_closed_and_counted() {
    let ca = ca("td");
    let b = Control::start(&ca, "b");
    // Steered to either side of the endpoint: that of newcomers does not speak gossip.
    for (plane, failed) in [(Plane::Gossip, 1), (Plane::Join, 2)] {
        let (_endpoint, connecting) = newcomer(&ca, b.addr, plane, ALPN_GOSSIP);
        // A client's handshake can be done before the server looks at its certificate.
        let closed = async {
            match connecting.await {
                Ok(connection) => connection.closed().await,
                Err(error) => error,
            }
        };
        let reason = b.refuses(closed).await;
        assert_eq!(b.failed(failed).await, ControlCounts { failed, ..ControlCounts::default() });
        if plane == Plane::Gossip {
            assert!(reason.to_string().contains("peer sent no certificates"), "{reason}");
        }
    }
}

#[tokio::test]
async fn a_newcomer_without_a_certificate_is_accepted_on_the_join_plane() {
    let ca = ca("td");
    let b = Control::start(&ca, "b");
    let (_endpoint, connecting) = newcomer(&ca, b.addr, Plane::Join, Plane::Join.alpn());
    let (dialled, accepted) = within(async { tokio::join!(connecting, b.transport.accept()) }).await;
    let accepted = accepted.unwrap();
    assert!(dialled.is_ok());
    assert_eq!((accepted.plane, accepted.peer), (Plane::Join, None));
}

#[tokio::test]
async fn an_address_that_has_become_another_nodes_is_refused_with_both_names() {
    let ca = ca("td");
    let (a, b) = (Control::start(&ca, "a"), Control::start(&ca, "b"));
    let text = b.refuses(a.transport.connect(b.addr, Some("c".parse().unwrap()))).await.unwrap_err().to_string();
    assert!(text.contains("node/b") && text.contains("node c") && text.contains("another node"), "{text}");
    assert_eq!(b.failed(1).await.accepted, 0);
}

#[tokio::test]
async fn a_node_of_another_ca_is_refused_with_a_text_that_says_so() {
    let (a, b) = (Control::start(&ca("td"), "a"), Control::start(&ca("td"), "b"));
    let text = b.refuses(a.transport.connect(b.addr, None)).await.unwrap_err().to_string();
    assert!(text.contains("refused here") && text.contains("another CA"), "{text}");
    assert_eq!(b.failed(1).await.accepted, 0);
}

#[tokio::test]
async fn a_flood_of_garbage_leaves_the_endpoint_as_it_was() {
    let ca = ca("td");
    let (a, b) = (Control::start(&ca, "a"), Control::start(&ca, "b"));
    let flooder = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let flood = async {
        for at in 0..4_000_usize {
            let mut garbage: Vec<u8> = (0..at % 1_400).map(|_| rand::random()).collect();
            if let Some(head) = garbage.get_mut(..7).filter(|_| at % 3 == 0) {
                // As near to a first packet as garbage comes: a long header of version 1 that leads here.
                head.copy_from_slice(&[0xc0, 0, 0, 0, 1, 8, rand::random::<u8>() | 0x80]);
            }
            // A full socket buffer drops the datagram, as the kernel does under a flood.
            let _dropped = flooder.send_to(&garbage, b.addr).await;
        }
    };
    b.refuses(flood).await;
    let (dialled, accepted) =
        within(async { tokio::join!(a.transport.connect(b.addr, None), b.transport.accept()) }).await;
    assert!(dialled.is_ok() && accepted.is_some());
    // Garbage that looks like a first packet may count as a handshake that failed; nothing else may come of it.
    let failed = b.transport.counts().failed;
    assert_eq!(b.transport.counts(), ControlCounts { accepted: 1, failed, unverified: 0 });
}

#[tokio::test]
async fn a_restart_with_the_key_kept_ends_the_peers_old_connections_at_once() {
    let ca = ca("td");
    let a = Control::start(&ca, "a");
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = socket.local_addr().unwrap();
    let identity = identity(&ca, "b");
    let run = |socket: UdpSocket| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        socket.set_nonblocking(true).unwrap();
        let entered = runtime.enter();
        let transport = ControlTransport::new(socket, Arc::clone(&identity), [7; 64]).unwrap();
        drop(entered);
        let accepting = transport.clone();
        // Kept: dropping it would close the connection in peace, as long as the runtime lives.
        let (accepted, kept) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            while let Some(next) = accepting.accept().await {
                let _test_ended = accepted.send(next);
            }
        });
        (runtime, transport, kept)
    };
    let (runtime, transport, kept) = run(socket);
    let (connection, _) = within(a.transport.connect(addr, None)).await.unwrap();
    kept.recv_timeout(Duration::from_secs(20)).unwrap();
    // A crash: its tasks end where they are, so nothing is said on the wire when the handles go, and the port is free.
    tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(20))).await.unwrap();
    drop((transport, kept));
    let rebound = within(async {
        loop {
            match UdpSocket::bind(addr) {
                Ok(socket) => return socket,
                Err(_still_held) => tokio::task::yield_now().await,
            }
        }
    });
    let (runtime, _restarted, _kept) = run(rebound.await);
    let reason = within(async {
        loop {
            let _ended = connection.send_datagram(vec![0; 40].into());
            tokio::select! {
                reason = connection.closed() => return reason,
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
    });
    assert_eq!(reason.await, quinn::ConnectionError::Reset);
    runtime.shutdown_background();
}

struct Control {
    transport: ControlTransport,
    addr: SocketAddr,
    metrics: Metrics,
    /// Their places in the port's group decide what the control socket gets.
    _workers: Vec<MeshPort>,
}

impl Control {
    fn start(ca: &EphemeralCa, node: &str) -> Self {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), 2).unwrap();
        let transport = ControlTransport::new(bound.control, identity(ca, node), [7; 64]).unwrap();
        let metrics = Metrics::new();
        transport.register(&metrics).unwrap();
        Self { transport, addr: bound.addr, metrics, _workers: bound.workers }
    }

    /// Runs `attempt` while this endpoint accepts; it must hand out nothing.
    async fn refuses<T>(&self, attempt: impl Future<Output = T>) -> T {
        within(async {
            tokio::select! {
                ended = attempt => ended,
                accepted = self.transport.accept() => panic!("accepted {accepted:?}"),
            }
        })
        .await
    }

    /// Accepts until so many attempts have failed; returns all counts.
    async fn failed(&self, wanted: u64) -> ControlCounts {
        self.refuses(async {
            while self.transport.counts().failed < wanted {
                tokio::task::yield_now().await;
            }
        })
        .await;
        self.transport.counts()
    }
}

/// Dials without a certificate, steered to `plane`.
fn newcomer(ca: &EphemeralCa, addr: SocketAddr, plane: Plane, alpn: &[u8]) -> (quinn::Endpoint, quinn::Connecting) {
    let verifier = JoinVerifier::trusting(ca.issuer().bundle().clone(), clock::wall());
    let mut tls = verifier.client_config().unwrap();
    tls.alpn_protocols = vec![alpn.to_vec()];
    let endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let config = tune::client(plane, Arc::new(tls)).unwrap();
    let connecting = endpoint.connect_with(config, addr, "mesh.weft").unwrap();
    (endpoint, connecting)
}

fn identity(ca: &EphemeralCa, node: &str) -> Arc<Identity> {
    let now = clock::wall();
    let authority = ca.issuer().self_certify(&node.parse().unwrap(), &"*".parse().unwrap(), now).unwrap();
    Identity::new(authority, now).unwrap()
}

fn ca(domain: &str) -> EphemeralCa {
    ephemeral(&domain.parse().unwrap(), clock::wall()).unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends in time")
}

//! How long a silent tunnel lives, where time is virtual once it is up; what a tunnel finds out and asks for.

use std::net::Ipv4Addr;

use tokio::net::UdpSocket as Forward;

use super::*;
use crate::clock;
use crate::pki::{Identity, ephemeral};
use crate::transport::live::LiveConnections;
use crate::transport::{NodeCredentials, bind};

/// Starts the endpoints of two nodes of one mesh, `a` and `b`; what else is returned is to be held.
fn start_two() -> [(WorkerEndpoint, SocketAddr, MeshPort); 2] {
    start_nodes(1).map(|(mut workers, addr, control)| (workers.remove(0), addr, control))
}

/// Like [`start_two`], with several workers each.
fn start_nodes(workers: u8) -> [(Vec<WorkerEndpoint>, SocketAddr, MeshPort); 2] {
    let ca = ephemeral(&"td".parse().unwrap(), clock::wall()).unwrap();
    ["a", "b"].map(|node| {
        let now = clock::wall();
        let authority = ca.issuer().self_certify(&node.parse().unwrap(), &"*".parse().unwrap(), now).unwrap();
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), usize::from(workers)).unwrap();
        let credentials = Arc::new(NodeCredentials(Identity::new(authority, now).unwrap()));
        let start = |(index, socket)| {
            let lane = Lane::Worker { index, workers };
            let credentials = Arc::<NodeCredentials>::clone(&credentials);
            WorkerEndpoint::new(socket, (lane, 5), &[7; 64], credentials, LiveConnections::default()).unwrap()
        };
        ((0..).zip(bound.workers).map(start).collect(), bound.addr, bound.control)
    })
}

#[tokio::test]
async fn the_workers_of_a_node_meet_as_many_workers_of_the_other() {
    let [(a, _, _a_control), (b, b_addr, _b_control)] = start_nodes(4);
    let b_name = "b".parse().unwrap();
    let mut met = Vec::new();
    for dialling in &a {
        let accept = async {
            let accepting = b.iter().map(|worker| Box::pin(worker.accept()));
            let (incoming, worker, _others) = futures_util::future::select_all(accepting).await;
            (incoming.unwrap().await.unwrap(), worker)
        };
        let dial = async { dialling.dial(b_addr, &b_name, None, Duration::from_secs(20)).await.unwrap() };
        let (_dialled, (_accepted, worker)) = tokio::join!(dial, accept);
        met.push(worker);
    }
    met.sort_unstable();
    assert_eq!(met, [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_dial_that_fails_again_and_again_meets_other_workers_too() {
    let [(a, ..), _b] = start_two();
    let mut dealt = Vec::new();
    for _ in 0..7 {
        dealt.push(a.is_dealt(1));
        a.note_dial(1, false);
    }
    assert_eq!(dealt, [true, true, false, true, true, false, true]);
    assert!(a.is_dealt(2));
    a.note_dial(1, true);
    assert!(a.is_dealt(1) && a.failures.borrow().is_empty());
    for bundle in 0..3 * u64::try_from(FAILURES_MAX).unwrap() {
        a.note_dial(bundle, false);
        assert!(a.failures.borrow().len() <= FAILURES_MAX);
    }
    // What a dial brings is noted.
    a.note_dial(1, true);
    let (bundle, nobody) = (a.bundles.hash_one((&"b".parse::<NodeName>().unwrap(), None::<&ServiceName>)), free_port());
    a.note_dial(bundle, true);
    a.dial(nobody, &"b".parse().unwrap(), None, Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(a.failures.borrow().get(&bundle), Some(&1));
}

/// An address that nobody has.
fn free_port() -> SocketAddr {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_tunnel_finds_room_for_jumbo_frames_and_asks_for_rarer_acknowledgements() {
    let [(a, _, _a_control), (b, b_addr, _b_control)] = start_two();
    let b_name = "b".parse().unwrap();
    let accept = async { b.accept().await.unwrap().await.unwrap() };
    let (dialled, accepted) = tokio::join!(a.dial(b_addr, &b_name, None, Duration::from_secs(20)), accept);
    let dialled = dialled.unwrap().connection;
    let sides = [&dialled, &accepted];
    // The loopback takes more than any Ethernet: the bound is what ends the search, 20 bytes below it at most.
    let searched = async {
        while sides.iter().any(|side| side.stats().path.current_mtu < 8_950) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), searched).await.expect("both sides find it");
    for side in sides {
        assert_eq!(side.stats().frame_tx.ack_frequency, 1, "acknowledgements are asked for once");
    }
    // Full batches of such packets arrive whole.
    let bytes: Vec<u8> = (0..4_u32 << 20).map(|at| (at / 1_000).to_le_bytes()[0]).collect();
    let send = async {
        let (mut send, _recv) = dialled.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
        send.stopped().await.unwrap();
    };
    let receive = async {
        let (_send, mut recv) = accepted.accept_bi().await.unwrap();
        recv.read_to_end(bytes.len()).await.unwrap()
    };
    let ((), received) = tokio::join!(send, receive);
    assert!(received == bytes);
}

#[tokio::test]
async fn a_silent_tunnel_lives_on_and_one_whose_path_is_cut_ends_after_15_seconds() {
    let [(a, _, _a_control), (b, b_addr, _b_control)] = start_two();
    let path = Path::to(b_addr).await;
    let dial = async {
        let b_name = "b".parse().unwrap();
        let dial = a.dial(path.front.local_addr().unwrap(), &b_name, None, Duration::from_secs(20));
        let accept = async { b.accept().await.unwrap().await.unwrap() };
        tokio::join!(dial, accept)
    };
    let (dialled, accepted) = tokio::select! {
        () = path.carry() => unreachable!("it carries for ever"),
        both = dial => both,
    };
    let dialled = dialled.unwrap().connection;

    tokio::time::pause();
    tokio::select! {
        () = path.carry() => unreachable!("it carries for ever"),
        () = tokio::time::sleep(Duration::from_mins(10)) => {}
    }
    assert_eq!((dialled.close_reason(), accepted.close_reason()), (None, None));

    // Nobody carries any more.
    let cut = clock::now();
    for (connection, side) in [(dialled, "dialer"), (accepted, "listener")] {
        assert_eq!(connection.closed().await, quinn::ConnectionError::TimedOut);
        // The last packet was heard at most 5 s (a keep-alive) before the cut; a packet that is sent afterwards, a
        // keep-alive as well, starts the time anew (RFC 9000 §10.1).
        let lasted = clock::now() - cut;
        let bounds = Duration::from_secs(10)..Duration::from_secs(21);
        assert!(bounds.contains(&lasted), "the {side}'s side ended after {lasted:?}");
    }
}

/// A router between the dialer and the listener.
struct Path {
    front: Forward,
    back: Forward,
    listener: SocketAddr,
    dialer: std::cell::Cell<Option<SocketAddr>>,
}

impl Path {
    async fn to(listener: SocketAddr) -> Self {
        let socket = async || Forward::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self { front: socket().await, back: socket().await, listener, dialer: std::cell::Cell::default() }
    }

    /// Forwards for ever.
    async fn carry(&self) {
        let (mut up, mut down) = (vec![0; 65_535], vec![0; 65_535]);
        loop {
            // A full socket buffer drops the datagram, as a network does.
            tokio::select! {
                got = self.front.recv_from(&mut up) => {
                    let (bytes, from) = got.unwrap();
                    self.dialer.set(Some(from));
                    let _dropped = self.back.send_to(&up[..bytes], self.listener).await;
                }
                got = self.back.recv_from(&mut down) => {
                    let (Ok((bytes, _)), Some(dialer)) = (got, self.dialer.get()) else { continue };
                    let _dropped = self.front.send_to(&down[..bytes], dialer).await;
                }
            }
        }
    }
}

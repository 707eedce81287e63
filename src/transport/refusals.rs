//! What hosts say of the mesh port's own packets: ICMP port unreachable.
//!
//! ```text
//!   QUIC packet --> peer's host, nobody there --> ICMP --> error queue of some socket of the port (`IP_RECVERR`)
//!                                                            |
//!                          MeshSocket: a call fails --> Refusals::drain --> who waits, and who asks about the last 3 s
//! ```
//!
//! A host sends six such messages in a row to one address and then one a second (Linux, `icmp_ratelimit`). A dead
//! peer's connections retransmit, and so take most of them: they reach the sockets that sent, not the question that
//! `port` asks beside them. So the sockets listen as well. The kernel hands a message to any socket of the group,
//! whoever sent: the group shares one [`Refusals`].
//!
//! Invariants: at most [`REFUSALS_MAX`] addresses are kept; a message counts as a hint alone, for both ports are known
//! and whoever can forge a source address can forge one: who acts on it looks for signs of life first.
//! Not here: what a refusal means (`gossip`, `proxy`).

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock;

/// Most addresses that are remembered; the oldest goes first. As many members as may fail together in a rack.
const REFUSALS_MAX: usize = 64;
/// Most messages that one failed call takes from the queue; the next failure takes more.
const DRAINED_MAX: usize = 256;
/// Destination unreachable, port unreachable: RFC 792 and RFC 4443 §3.1.
const PORT_UNREACHABLE: (u8, u8) = (3, 3);
const PORT_UNREACHABLE_V6: (u8, u8) = (1, 4);

/// One of the mesh port's sockets, with where its refusals go.
#[derive(Debug)]
pub struct MeshPort {
    pub(super) socket: UdpSocket,
    pub(super) refusals: Refusals,
}

impl MeshPort {
    pub(super) fn new(socket: UdpSocket, refusals: Refusals) -> Self {
        Self { socket, refusals }
    }
}

/// A socket that shares its port with no other.
impl From<UdpSocket> for MeshPort {
    fn from(socket: UdpSocket) -> Self {
        Self::new(socket, Refusals::default())
    }
}

impl AsFd for MeshPort {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The addresses whose hosts refused a packet of late. Cheap to clone; clones share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Refusals(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Heard {
    /// The newest last.
    addrs: VecDeque<Refusal>,
    /// How many have been taken down.
    count: u64,
}

#[derive(Debug, Clone, Copy)]
struct Refusal {
    addr: SocketAddr,
    at: Instant,
    /// From 1, in the order in which they were taken down: threads read their clocks in another one.
    number: u64,
}

impl Refusals {
    /// Asks the kernel for the messages about what `socket` sends.
    pub(super) fn listen(socket: &impl AsFd, is_v4: bool) -> nix::Result<()> {
        if is_v4 {
            setsockopt(socket, sockopt::Ipv4RecvErr, &true)
        } else {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)
        }
    }

    /// Takes what the error queue of `socket` holds.
    pub(super) fn drain(&self, socket: &impl AsRawFd) {
        for _ in 0..DRAINED_MAX {
            let mut space = nix::cmsg_space!([u8; 128]);
            let mut quoted = [0; 64];
            let mut slices = [IoSliceMut::new(&mut quoted)];
            let flags = MsgFlags::MSG_ERRQUEUE;
            let fd = socket.as_raw_fd();
            let Ok(message) = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut space), flags) else { return };
            let Some(to) = message.address.as_ref().and_then(peer) else { continue };
            if message.cmsgs().is_ok_and(|mut parts| parts.any(|part| is_port_unreachable(&part))) {
                self.note(to, clock::now());
            }
        }
    }

    /// Takes a refusal down.
    pub(crate) fn note(&self, addr: SocketAddr, now: Instant) {
        let mut heard = self.heard();
        heard.count += 1;
        let number = heard.count;
        heard.addrs.retain(|other| other.addr != addr);
        if heard.addrs.len() >= REFUSALS_MAX {
            heard.addrs.pop_front();
        }
        heard.addrs.push_back(Refusal { addr, at: now, number });
        drop(heard);
        self.0.news.notify_one();
    }

    /// Tells whether `addr` was refused within the last `span`.
    pub(crate) fn is_heard(&self, addr: SocketAddr, span: Duration) -> bool {
        let now = clock::now();
        self.heard().addrs.iter().any(|other| other.addr == addr && now.saturating_duration_since(other.at) <= span)
    }

    /// Waits for refusals after the one numbered `last`, 0 at first, and moves `last`: the newest of each address. For one
    /// waiter.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing.
    pub(crate) async fn next(&self, last: &mut u64) -> Vec<SocketAddr> {
        loop {
            let news = self.0.news.notified();
            let fresh: Vec<Refusal> =
                self.heard().addrs.iter().filter(|refusal| refusal.number > *last).copied().collect();
            if let Some(newest) = fresh.last() {
                *last = newest.number;
                return fresh.into_iter().map(|refusal| refusal.addr).collect();
            }
            news.await;
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_port_unreachable(part: &ControlMessageOwned) -> bool {
    match part {
        ControlMessageOwned::Ipv4RecvErr(error, _) => {
            error.ee_origin == nix::libc::SO_EE_ORIGIN_ICMP && (error.ee_type, error.ee_code) == PORT_UNREACHABLE
        }
        ControlMessageOwned::Ipv6RecvErr(error, _) => {
            error.ee_origin == nix::libc::SO_EE_ORIGIN_ICMP6 && (error.ee_type, error.ee_code) == PORT_UNREACHABLE_V6
        }
        _ => false,
    }
}

fn peer(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|addr| SocketAddr::V4((*addr).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|addr| SocketAddr::V6((*addr).into())))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    /// An address that was bound and is free again.
    fn closed(ip: IpAddr) -> SocketAddr {
        UdpSocket::bind((ip, 0)).unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_refused_packet_is_told_with_its_destination_and_one_that_is_taken_is_not() {
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let socket = UdpSocket::bind((ip, 0)).unwrap();
            Refusals::listen(&socket, ip.is_ipv4()).unwrap();
            let held = UdpSocket::bind((ip, 0)).unwrap();
            let refusals = Refusals::default();
            let gone = closed(ip);
            socket.send_to(&[1], held.local_addr().unwrap()).unwrap();
            refusals.drain(&socket);
            assert!(!refusals.is_heard(held.local_addr().unwrap(), Duration::MAX));
            // On loopback the message is there when the call returns.
            socket.send_to(&[1], gone).unwrap();
            assert!(socket.send_to(&[1], gone).is_err(), "the kernel tells with the next call");
            let mut last = 0;
            let mut waits = std::pin::pin!(refusals.next(&mut last));
            assert!(tokio::time::timeout(Duration::ZERO, waits.as_mut()).await.is_err());
            refusals.drain(&socket);
            assert_eq!(waits.await, [gone]);
            assert!(refusals.is_heard(gone, Duration::from_secs(60)));
        }
    }

    #[tokio::test]
    async fn a_refusal_that_was_met_earlier_and_taken_down_later_is_told_as_well() {
        let refusals = Refusals::default();
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let now = clock::now();
        let mut last = 0;
        // Two threads read their clocks, and the one that read first comes second.
        refusals.note(addr(1), now + Duration::from_millis(1));
        assert_eq!(refusals.next(&mut last).await, [addr(1)]);
        refusals.note(addr(2), now);
        let told = tokio::time::timeout(Duration::from_secs(10), refusals.next(&mut last)).await;
        assert_eq!(told.unwrap(), [addr(2)]);
        refusals.note(addr(1), now);
        refusals.note(addr(2), now);
        assert_eq!(refusals.next(&mut last).await, [addr(1), addr(2)]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_goes() {
        let refusals = Refusals::default();
        let addr = |port: usize| SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).unwrap()));
        for port in 1..=REFUSALS_MAX + 1 {
            refusals.note(addr(port), clock::now());
            refusals.note(addr(port), clock::now());
        }
        let is_heard = |port| refusals.is_heard(addr(port), Duration::MAX);
        assert!(!is_heard(1) && is_heard(2) && is_heard(REFUSALS_MAX + 1));
    }
}

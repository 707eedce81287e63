//! Asks a peer's kernel whether anybody still has the peer's mesh port.
//!
//! ```text
//!   connected UDP socket --two bytes--> peer:8301   process there: silence (the kernel drops them)
//!                        <--ICMP port unreachable-- process gone: the next receive fails with ECONNREFUSED
//! ```
//!
//! A killed process closes its sockets at once, and its host says so to whoever sends to the port: that is known a
//! round trip later, where SWIM needs a probe period and a suspicion. The QUIC sockets cannot tell: Linux reports such
//! errors to connected sockets alone, and quinn ends an endpoint whose receive fails with anything but a reset. So a
//! probe has a small socket of its own, from another port, and never carries data.
//!
//! A host sends few such messages: Linux six in a row to one address, then one a second. So nobody asks in a tight loop,
//! and who is not answered may ask again a second later.
//!
//! Invariants: silence says nothing (a firewall, a lost packet, a host without power, a live peer); a refusal counts
//! when two probes in a row met it, [`RECHECK`] apart, so that neither one stray ICMP message nor a port that is bound
//! anew within that time counts. Only what quotes this socket's own port reaches it (RFC 5927 §4.1: the kernel
//! compares addresses and ports), so a forger must see the traffic or guess a port.
//! Not here: what a refusal means for membership (`gossip`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::pin;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::socket::register;

/// Between the first refusal and the second.
const RECHECK: Duration = Duration::from_millis(25);
/// How long one answer may take: the round trip of a slow path.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(250);
/// A short QUIC header and a first byte that leads to the control socket: dropped by its filter as too short (`steer`).
const PAYLOAD: [u8; 2] = [0x40, 0x80];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Refused,
    Silent,
}

/// A socket that is connected to one peer's port.
#[derive(Debug)]
struct PortProbe(AsyncFd<UdpSocket>);

impl PortProbe {
    fn open(local: IpAddr, peer: SocketAddr) -> io::Result<Self> {
        let local = match (local, peer) {
            (IpAddr::V4(_), SocketAddr::V4(_)) | (IpAddr::V6(_), SocketAddr::V6(_)) => local,
            (_, SocketAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
            (_, SocketAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((local, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(peer)?;
        // For reading alone: a registration for writing wakes the thread once more after each probe that left.
        Ok(Self(register(socket, Interest::READABLE | Interest::ERROR)?))
    }

    /// Sends one probe and waits for a refusal until `over`; silence takes all of it.
    async fn ask(&self, over: impl Future<Output = ()>) -> Answer {
        let is_refusal = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        // The answer to an earlier probe may come out here.
        if self.0.get_ref().send(&PAYLOAD).is_err_and(|error| is_refusal(&error)) {
            return Answer::Refused;
        }
        let mut over = pin!(over);
        let heard = tokio::select! {
            heard = self.heard() => heard,
            () = &mut over => return Answer::Silent,
        };
        if heard.is_err_and(|error| is_refusal(&error)) {
            return Answer::Refused;
        }
        // Other errors speak of the path, data of a stranger: neither ends the pause.
        over.await;
        Answer::Silent
    }

    /// Sends one probe and waits for as long as an answer may take.
    async fn ask_once(&self) -> Answer {
        self.ask(tokio::time::sleep(ANSWER_TIME_MAX)).await
    }

    /// What the kernel or the peer says.
    async fn heard(&self) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE | Interest::ERROR, |socket| socket.recv(&mut [0; 1])).await
    }

    /// Asks again after a refusal.
    async fn is_refused_again(&self) -> bool {
        tokio::time::sleep(RECHECK).await;
        self.ask_once().await == Answer::Refused
    }
}

/// Asks once: tells whether `peer`'s host refused the port. For those who know from elsewhere that the peer has failed.
///
/// # Cancel safety
/// Cancelling gives the question up.
pub(super) async fn is_refused_once(local: IpAddr, peer: SocketAddr) -> bool {
    let Ok(probe) = PortProbe::open(local, peer) else { return false };
    probe.ask_once().await == Answer::Refused
}

/// Tells whether `peer`'s host refuses the port, now.
///
/// # Cancel safety
/// Cancelling gives the question up.
pub(super) async fn is_refused(local: IpAddr, peer: SocketAddr) -> bool {
    let Ok(probe) = PortProbe::open(local, peer) else { return false };
    probe.ask_once().await == Answer::Refused && probe.is_refused_again().await
}

/// Waits until `peer`'s host refuses the port; asks each time that `asks` changes.
///
/// # Cancel safety
/// Cancelling ends the watch.
pub(super) async fn refused(local: IpAddr, peer: SocketAddr, mut asks: watch::Receiver<()>) {
    loop {
        if let Ok(probe) = PortProbe::open(local, peer) {
            while probe.ask(next(&mut asks)).await == Answer::Silent {}
            if probe.is_refused_again().await {
                return;
            }
        }
        // Neither an address that cannot be bound nor a flapping port makes a tight loop.
        next(&mut asks).await;
    }
}

/// Waits until it is time to ask; for ever where nobody says so any more.
async fn next(asks: &mut watch::Receiver<()>) {
    if asks.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn a_port_that_somebody_has_is_silent_and_one_that_nobody_has_is_refused() {
        let held = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        let addr = held.local_addr().unwrap();
        assert!(!is_refused(LOOPBACK, addr).await && !is_refused_once(LOOPBACK, addr).await);
        drop(held);
        assert!(is_refused(LOOPBACK, addr).await && is_refused_once(LOOPBACK, addr).await);
        // From an address of the other family as well.
        assert!(is_refused(Ipv6Addr::LOCALHOST.into(), addr).await);
    }

    #[tokio::test]
    async fn a_watch_asks_when_it_is_told_to_and_ends_when_the_port_is_given_up_and_not_before() {
        let held = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        held.set_nonblocking(true).unwrap();
        let addr = held.local_addr().unwrap();
        let held = tokio::net::UdpSocket::from_std(held).unwrap();
        let (beat, asks) = watch::channel(());
        let mut refused = pin!(refused(LOOPBACK, addr, asks));
        let mut buffer = [0; 64];
        for _probe in 0..5 {
            tokio::select! {
                () = &mut refused => panic!("the port is held"),
                received = held.recv_from(&mut buffer) => assert_eq!(received.unwrap().0, PAYLOAD.len()),
            }
            tokio::select! {
                biased;
                () = &mut refused => panic!("the port is held"),
                _ = held.recv_from(&mut buffer) => panic!("nobody has said that it asks again"),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            beat.send_replace(());
        }
        drop(held);
        let beats = async {
            loop {
                beat.send_replace(());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = &mut refused => {}
            () = beats => unreachable!("it beats for ever"),
            () = tokio::time::sleep(Duration::from_secs(10)) => panic!("the refusal is not seen"),
        }
    }
}

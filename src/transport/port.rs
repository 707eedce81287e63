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
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::socket::register;
use crate::{alarm, clock};

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

    /// Sends one probe and waits for a refusal, `patience` at most; silence takes all of it.
    async fn ask(&self, patience: Duration) -> Answer {
        let until = clock::now() + patience;
        let is_refusal = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        // The answer to an earlier probe may come out here.
        if self.0.get_ref().send(&PAYLOAD).is_err_and(|error| is_refusal(&error)) {
            return Answer::Refused;
        }
        let mut end = alarm::sleep_until(until);
        let heard = tokio::select! {
            biased;
            heard = self.heard() => heard,
            () = &mut end => return Answer::Silent,
        };
        match heard {
            Err(error) if is_refusal(&error) => Answer::Refused,
            // Other errors speak of the path, data of a stranger: neither ends the pause.
            _ => {
                end.await;
                Answer::Silent
            }
        }
    }

    /// What the kernel or the peer says.
    async fn heard(&self) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE | Interest::ERROR, |socket| socket.recv(&mut [0; 1])).await
    }

    /// Asks again after a refusal.
    async fn is_refused_again(&self) -> bool {
        tokio::time::sleep(RECHECK).await;
        self.ask(ANSWER_TIME_MAX).await == Answer::Refused
    }
}

/// Asks once: tells whether `peer`'s host refused the port. For those who know from elsewhere that the peer has failed.
///
/// # Cancel safety
/// Cancelling gives the question up.
pub(super) async fn is_refused_once(local: IpAddr, peer: SocketAddr) -> bool {
    let Ok(probe) = PortProbe::open(local, peer) else { return false };
    probe.ask(ANSWER_TIME_MAX).await == Answer::Refused
}

/// Tells whether `peer`'s host refuses the port, now.
///
/// # Cancel safety
/// Cancelling gives the question up.
pub(super) async fn is_refused(local: IpAddr, peer: SocketAddr) -> bool {
    let Ok(probe) = PortProbe::open(local, peer) else { return false };
    probe.ask(ANSWER_TIME_MAX).await == Answer::Refused && probe.is_refused_again().await
}

/// When a watch asks: at wall times that are `phase` after a multiple of `every`. Several watches of one port that know
/// of each other take different phases; clocks that disagree make them fall anywhere, as phases by chance would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// The period, some milliseconds at least.
    pub every: Duration,
    /// Less than a period.
    pub phase: Duration,
}

impl Rhythm {
    /// Returns how long it is to the next beat that is not upon us: a quarter of a period at least.
    fn rest(self, wall_ms: u64) -> Duration {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (every, phase) = (millis(self.every).max(1), millis(self.phase));
        let since = wall_ms.wrapping_add(every).wrapping_sub(phase % every) % every;
        let rest = every - since;
        Duration::from_millis(if rest < every / 4 { rest + every } else { rest })
    }
}

/// Waits until `peer`'s host refuses the port; asks in `rhythm`.
///
/// # Cancel safety
/// Cancelling ends the watch.
pub(super) async fn refused(local: IpAddr, peer: SocketAddr, rhythm: Rhythm) {
    loop {
        if let Ok(probe) = PortProbe::open(local, peer) {
            while probe.ask(rhythm.rest(clock::wall_ms())).await == Answer::Silent {}
            if probe.is_refused_again().await {
                return;
            }
        }
        // Neither an address that cannot be bound nor a flapping port makes a tight loop.
        tokio::time::sleep(rhythm.every).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const RHYTHM: Rhythm = Rhythm { every: Duration::from_millis(20), phase: Duration::from_millis(7) };

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

    #[test]
    fn two_watches_ask_in_turn() {
        let every = Duration::from_millis(500);
        let beats = |phase| {
            let rhythm = Rhythm { every, phase: Duration::from_millis(phase) };
            let mut now: u64 = 1_700_000_000_123;
            std::iter::repeat_with(move || {
                now += u64::try_from(rhythm.rest(now).as_millis()).unwrap();
                now
            })
        };
        for (first, second) in beats(130).zip(beats(380)).take(20) {
            assert_eq!((first % 500, second % 500), (130, 380));
        }
        let gaps: Vec<u64> = beats(499).take(9).collect();
        assert!(gaps.windows(2).all(|pair| pair[1] - pair[0] == 500), "{gaps:?}");
        // A clock that is a little slow does not ask twice.
        assert_eq!(Rhythm { every, phase: Duration::ZERO }.rest(999), Duration::from_millis(501));
    }

    #[tokio::test]
    async fn a_watch_ends_when_the_port_is_given_up_and_not_before() {
        let held = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        held.set_nonblocking(true).unwrap();
        let addr = held.local_addr().unwrap();
        let held = tokio::net::UdpSocket::from_std(held).unwrap();
        let mut watch = std::pin::pin!(refused(LOOPBACK, addr, RHYTHM));
        for _probe in 0..5 {
            let mut buffer = [0; 64];
            tokio::select! {
                () = &mut watch => panic!("the port is held"),
                received = held.recv_from(&mut buffer) => assert_eq!(received.unwrap().0, PAYLOAD.len()),
            }
        }
        drop(held);
        tokio::time::timeout(Duration::from_secs(10), watch).await.expect("the refusal is seen");
    }
}

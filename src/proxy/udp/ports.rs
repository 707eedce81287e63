//! The sockets of the local ports that take datagrams: one per worker, all there before any takes one, all gone at once.
//!
//! ```text
//!   worker 0: Ports::open = probe alone, bind each deaf, let all hear --state published--> the others: Ports::find
//! ```
//!
//! The kernel deals datagrams over a port's sockets by a hash of their addresses and by how many sockets there are
//! (`SO_REUSEPORT`, socket(7)): with one more or less, most sources meet another worker, which knows nothing of their flow
//! and may pick another instance. Connections are not moved by that, so their ports are bound as each worker comes to it.
//! Invariants: no socket takes a datagram before the last one is bound; all stay bound until no worker uses one.
//! Not here: when a port is to be open (`listener`), what becomes of datagrams (`outbound`).

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::UdpSocket;

/// A filter that keeps nothing of a datagram, which is then dropped: `ret #0`, `BPF_RET | BPF_K` (linux/filter.h).
const DEAF: [SockFilter; 1] = [SockFilter::new(0x06, 0, 0, 0)];

/// The ports of all workers that take datagrams.
#[derive(Debug)]
pub(in crate::proxy) struct Ports {
    workers: usize,
    open: Mutex<HashMap<SocketAddr, Weak<Sockets>>>,
}

/// The sockets of one port in the order of the workers; bound until the last holder lets go.
#[derive(Debug)]
pub(in crate::proxy) struct Sockets(Vec<Socket>);

impl Ports {
    pub(in crate::proxy) fn new(workers: usize) -> Self {
        Self { workers, open: Mutex::default() }
    }

    /// Binds a port for all workers, or returns what is bound already.
    ///
    /// # Errors
    /// Somebody else has the port, or it cannot be bound; then nothing stays bound.
    pub(in crate::proxy) fn open(&self, addr: SocketAddr) -> io::Result<Arc<Sockets>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, sockets| sockets.strong_count() > 0);
        if let Some(sockets) = open.get(&addr).and_then(Weak::upgrade) {
            return Ok(sockets);
        }
        let sockets = Arc::new(Sockets::bind(addr, self.workers)?);
        open.insert(addr, Arc::downgrade(&sockets));
        Ok(sockets)
    }

    /// Returns the sockets of a port that is open.
    pub(in crate::proxy) fn find(&self, addr: SocketAddr) -> Option<Arc<Sockets>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&addr).and_then(Weak::upgrade)
    }
}

impl Sockets {
    /// Binds `addr` so many times. A datagram that comes before the last time is dropped, as one before the first is.
    fn bind(addr: SocketAddr, workers: usize) -> io::Result<Self> {
        let socket = || Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP));
        // With SO_REUSEPORT alone another program of the same user would share the port in silence.
        socket()?.bind(&addr.into())?;
        let bind = |_| {
            let socket = socket()?;
            socket.set_reuse_port(true)?;
            socket.set_nonblocking(true)?;
            socket.attach_filter(&DEAF)?;
            socket.bind(&addr.into())?;
            Ok(socket)
        };
        let sockets = (0..workers).map(bind).collect::<io::Result<Vec<Socket>>>()?;
        sockets.iter().try_for_each(Socket::detach_filter)?;
        Ok(Self(sockets))
    }

    /// Returns a worker's socket, to be used on its runtime; the port outlives it for as long as `self` is held.
    ///
    /// # Errors
    /// No descriptor is left, or there is no such worker.
    pub(super) fn of(&self, worker: usize) -> io::Result<UdpSocket> {
        let socket = self.0.get(worker).ok_or(io::ErrorKind::NotFound)?;
        UdpSocket::from_std(socket.try_clone()?.into())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// An address that was free a moment ago.
    fn free() -> SocketAddr {
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
    }

    /// How many datagrams wait at each socket.
    fn waiting(sockets: &Sockets) -> Vec<usize> {
        let count = |socket: &Socket| {
            let socket: UdpSocket = socket.try_clone().unwrap().into();
            std::iter::from_fn(|| socket.recv(&mut [0; 8]).ok()).count()
        };
        sockets.0.iter().map(count).collect()
    }

    /// Sets the flag, also when a test fails.
    struct Ends<'a>(&'a AtomicBool);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_source_that_sends_while_the_port_opens_meets_one_worker() {
        const WORKERS: usize = 16;
        let done = AtomicBool::new(false);
        let addr = free();
        let source = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        source.connect(addr).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // It is refused while the port is not open.
                    let _refused = source.send(b"x");
                }
            });
            let _ends = Ends(&done);
            for round in 0..200 {
                let sockets = Sockets::bind(addr, WORKERS).unwrap();
                let mut seen = vec![0; WORKERS];
                while seen.iter().all(|count| *count == 0) {
                    seen = waiting(&sockets);
                }
                assert_eq!(seen.iter().filter(|count| **count > 0).count(), 1, "round {round}: {seen:?}");
            }
        });
    }

    #[tokio::test]
    async fn a_port_stays_whole_until_the_last_worker_lets_go() {
        let ports = Ports::new(2);
        let addr = free();
        assert!(ports.find(addr).is_none());
        let first = ports.open(addr).unwrap();
        let second = ports.find(addr).unwrap();
        let used = first.of(0).unwrap();
        assert!(first.of(2).is_err(), "there are two workers");
        drop((used, first));
        let again = ports.open(addr).unwrap();
        assert!(Arc::ptr_eq(&second, &again), "what one worker let go of is still bound");
        drop(again);
        for source in (0..32).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()) {
            source.send_to(b"x", addr).unwrap();
        }
        let seen = waiting(&second);
        assert_eq!(seen.iter().sum::<usize>(), 32);
        assert!(seen.iter().all(|count| *count > 0), "each has its share: {seen:?}");
        drop(second);
        assert!(ports.find(addr).is_none());
        UdpSocket::bind(addr).expect("it is free for others");
    }

    #[test]
    fn a_port_that_another_program_has_is_in_use_even_if_it_would_share() {
        let addr = free();
        let other = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        other.set_reuse_port(true).unwrap();
        other.bind(&addr.into()).unwrap();
        let ports = Ports::new(2);
        assert_eq!(ports.open(addr).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(other);
        ports.open(addr).unwrap();
    }
}

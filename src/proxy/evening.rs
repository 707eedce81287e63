//! Which worker serves a connection of a local app: one that has no more of them than the others.
//!
//! ```text
//!   accept --seat()--> its own worker: served there
//!            `-------> another has fewer: Handed --queue--> served there
//! ```
//!
//! The kernel deals connections over the workers by a hash of their addresses. Many come out about even; of ten, which is
//! what a client of HTTP/2 or gRPC has, seven and more meet one of two workers every third time, for as long as they last,
//! and that worker's core is what the service gets. Envoy knows the same as `exact_balance`, HAProxy by the accept queues of
//! its threads.
//!
//! Invariant: a connection is counted from its seat on, at the worker that serves it, until it ends. Datagrams stay with the
//! worker that the kernel chose. Not here: how a connection is served (`listener`).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Connections on their way to a worker; one that finds no room is served where it was accepted.
const HANDED_MAX: usize = 256;
/// A worker keeps what it accepts while it has at most this part more than the one with the fewest: a hand-over costs some
/// microseconds, and evenness of a few percent brings nothing.
const SLACK: usize = 16;

/// What the workers know of each other's connections.
#[derive(Debug)]
pub(super) struct Evening(Box<[Place]>);

/// One worker. Its count lies apart from the others': each worker writes its own all the time.
#[derive(Debug)]
#[repr(align(64))]
struct Place {
    open: AtomicUsize,
    queue: mpsc::Sender<Handed>,
}

/// A connection that another worker has accepted.
#[derive(Debug)]
pub(super) struct Handed {
    stream: std::net::TcpStream,
    /// Who calls.
    from: IpAddr,
    /// The local port that it came to.
    pub(super) port: SocketAddr,
    seat: Seat,
}

/// A connection's place at a worker, which is counted while this lives.
#[derive(Debug)]
pub(super) struct Seat {
    evening: Arc<Evening>,
    worker: usize,
}

impl Evening {
    /// Makes it for so many workers; each gets what is handed to it from its queue, in the order of their numbers.
    pub(super) fn new(workers: usize) -> (Arc<Self>, Vec<mpsc::Receiver<Handed>>) {
        let (queues, receivers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(HANDED_MAX)).unzip();
        let places = queues.into_iter().map(|queue| Place { open: AtomicUsize::new(0), queue }).collect();
        (Arc::new(Self(places)), receivers)
    }

    /// Tells who is to serve a connection that `accepted` has, and counts it there. Below the number of workers.
    pub(super) fn seat(self: &Arc<Self>, accepted: usize) -> Seat {
        let open = |worker: usize| self.0.get(worker).map_or(0, |place| place.open.load(Ordering::Relaxed));
        let fewest = (0..self.0.len()).map(|worker| (open(worker), worker)).min();
        match fewest {
            Some((least, worker)) if open(accepted) > least + least / SLACK => self.seat_at(worker),
            _ => self.seat_at(accepted),
        }
    }

    fn seat_at(self: &Arc<Self>, worker: usize) -> Seat {
        if let Some(place) = self.0.get(worker) {
            place.open.fetch_add(1, Ordering::Relaxed);
        }
        Seat { evening: Arc::clone(self), worker }
    }

    /// Hands a connection to the worker of its seat. Gives it back, with a seat at `accepted`, where that has no room or
    /// is gone.
    ///
    /// # Errors
    /// The kernel's, about the connection, which is closed.
    pub(super) fn hand(
        self: &Arc<Self>,
        (stream, from): (TcpStream, IpAddr),
        port: SocketAddr,
        (seat, accepted): (Seat, usize),
    ) -> io::Result<Option<(TcpStream, Seat)>> {
        let to = seat.worker;
        let handed = Handed { stream: stream.into_std()?, from, port, seat };
        let Some(place) = self.0.get(to) else { return Ok(None) };
        match place.queue.try_send(handed) {
            Ok(()) => Ok(None),
            Err(mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back)) => {
                Ok(Some((TcpStream::from_std(back.stream)?, self.seat_at(accepted))))
            }
        }
    }
}

impl Handed {
    /// Takes the connection over, on the runtime of the worker that serves it: it, who calls, its seat.
    ///
    /// # Errors
    /// The kernel's, about the connection, which is closed.
    pub(super) fn take(self) -> io::Result<((TcpStream, IpAddr), Seat)> {
        Ok(((TcpStream::from_std(self.stream)?, self.from), self.seat))
    }
}

impl Seat {
    /// Tells whether `worker` serves the connection.
    pub(super) fn is_at(&self, worker: usize) -> bool {
        self.worker == worker
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(place) = self.evening.0.get(self.worker) {
            place.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn counts(evening: &Evening) -> Vec<usize> {
        evening.0.iter().map(|place| place.open.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn whatever_the_kernel_deals_no_worker_has_more_than_its_share() {
        for workers in [1, 2, 3, 8] {
            let (evening, _queues) = Evening::new(workers);
            // All of them to one worker.
            let mut seats: Vec<_> = (0..10 * workers).map(|_| evening.seat(workers - 1)).collect();
            assert_eq!(counts(&evening), vec![10; workers]);
            // Those of one worker end: what comes next fills its place, wherever it is accepted.
            seats.retain(|seat| !seat.is_at(0));
            seats.extend((0..10).map(|_| evening.seat(workers - 1)));
            assert_eq!(counts(&evening), vec![10; workers]);
            drop(seats);
            assert_eq!(counts(&evening), vec![0; workers]);
        }
    }

    #[test]
    fn many_stay_where_they_were_accepted_unless_that_has_a_sixteenth_more() {
        let (evening, _queues) = Evening::new(2);
        let even: Vec<_> = (0..320).map(|at| evening.seat(at % 2)).collect();
        let more: Vec<_> = (0..30).map(|_| evening.seat(0)).collect();
        let stayed = more.iter().filter(|seat| seat.is_at(0)).count();
        assert_eq!(stayed, 20, "11 until it has a sixteenth more, then every second");
        drop((even, more));
    }

    async fn connection() -> (TcpStream, TcpStream, IpAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (caller, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (stream, from) = accepted.unwrap();
        (caller.unwrap(), stream, from.ip())
    }

    #[tokio::test]
    async fn a_connection_that_is_handed_over_goes_on_there_and_one_without_room_stays() {
        let (evening, mut queues) = Evening::new(2);
        let port = SocketAddr::from((Ipv4Addr::LOCALHOST, 9000));
        let (mut caller, stream, from) = connection().await;
        caller.write_all(b"early").await.unwrap();
        let seat = evening.seat_at(1);
        assert!(evening.hand((stream, from), port, (seat, 0)).unwrap().is_none());
        assert_eq!(counts(&evening), [0, 1]);
        let handed = queues[1].recv().await.unwrap();
        assert_eq!(handed.port, port);
        let ((mut stream, who), seat) = handed.take().unwrap();
        assert_eq!(who, from);
        stream.write_all(b"hello").await.unwrap();
        let mut read = [0; 5];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"early");
        caller.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
        drop(seat);
        assert_eq!(counts(&evening), [0, 0]);

        // The other worker is gone: who accepted it serves it, and is counted for it.
        drop(queues);
        let (mut caller, stream, from) = connection().await;
        let (mut stream, seat) = evening.hand((stream, from), port, (evening.seat_at(1), 0)).unwrap().unwrap();
        assert!(seat.is_at(0));
        assert_eq!(counts(&evening), [1, 0]);
        stream.write_all(b"still").await.unwrap();
        caller.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"still");
    }
}

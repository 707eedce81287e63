//! Which worker serves a connection to a local port: one that has hardly more of them than the others.
//!
//! ```text
//!   accept --Listening::seat--> its own worker: served there
//!            `----------------> another has fewer: Handed --queue--> served there
//! ```
//!
//! The kernel deals connections over the workers by a hash of their addresses. Many come out about even; of ten, which is
//! what a client of HTTP/2 or gRPC has, seven and more meet one of two workers every third time, for as long as they last,
//! and that worker's core is what the service gets. Envoy knows the same as `exact_balance`, for each listener as here;
//! HAProxy by the accept queues of its threads.
//!
//! Invariants: a connection is counted from its seat on, at the worker that serves it, until it ends; nothing is handed to a
//! worker that does not listen on the port, or that could not reach somebody within [`SHUNNED_FOR`]: its connections end at
//! once, and it would have the fewest for just that. Every count here is a hint: a wrong one costs evenness and no
//! connection. Datagrams stay with the worker that the kernel chose. Not here: how a connection is served (`listener`).

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::clock;

/// Connections on their way to a worker; one that finds no room is served where it was accepted.
const HANDED_MAX: usize = 256;
/// A worker keeps what it accepts while it has at most a sixteenth more than the one with the fewest: a hand-over costs some
/// microseconds, and evenness of a few percent brings nothing.
const SLACK_PART: usize = 16;
/// Of many workers so many are looked at for each connection, other ones each time.
const LOOK_MAX: usize = 8;
/// How long a worker gets nothing from others after it could not reach somebody: as long as a failed dial is remembered.
const SHUNNED_FOR: Duration = Duration::from_secs(1);

/// What the workers know of each other's connections.
#[derive(Debug)]
pub(super) struct Evening {
    started: Instant,
    desks: Box<[Desk]>,
    ports: Mutex<HashMap<SocketAddr, Weak<Port>>>,
}

/// One worker, as the others see it.
#[derive(Debug)]
struct Desk {
    queue: mpsc::Sender<Handed>,
    /// Milliseconds after `started`.
    shunned_until: AtomicU64,
}

/// One port, at all workers.
#[derive(Debug)]
struct Port {
    evening: Arc<Evening>,
    addr: SocketAddr,
    places: Box<[Place]>,
}

/// One port at one worker. Places lie apart: mostly its own worker writes to one.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Place {
    open: AtomicUsize,
    /// Sockets of the worker that listen on the port: 1, or 0; 2 for a moment, while one takes the place of another.
    listening: AtomicUsize,
}

/// Says that a worker listens on a port, for as long as it lives.
#[derive(Debug)]
pub(super) struct Listening {
    port: Arc<Port>,
    worker: usize,
}

/// A connection that another worker has accepted. Dropped unserved, it is reset.
#[derive(Debug)]
pub(super) struct Handed {
    stream: Option<std::net::TcpStream>,
    /// Who calls.
    from: IpAddr,
    seat: Seat,
}

/// A connection's place at a worker, which is counted while this lives.
#[derive(Debug)]
pub(super) struct Seat {
    port: Arc<Port>,
    worker: usize,
    /// Keeps the workers from ending their drain before a connection that was handed over is served.
    drains: Option<TaskTrackerToken>,
}

impl Evening {
    /// Makes it for so many workers; each gets what is handed to it from its queue, in the order of their numbers.
    pub(super) fn new(workers: usize) -> (Arc<Self>, Vec<mpsc::Receiver<Handed>>) {
        Self::with_room(workers, HANDED_MAX)
    }

    fn with_room(workers: usize, room: usize) -> (Arc<Self>, Vec<mpsc::Receiver<Handed>>) {
        let (queues, receivers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(room)).unzip();
        let desks = queues.into_iter().map(|queue| Desk { queue, shunned_until: AtomicU64::new(0) }).collect();
        (Arc::new(Self { started: clock::now(), desks, ports: Mutex::default() }), receivers)
    }

    /// Notes that `worker` listens on `addr`.
    pub(super) fn listen(self: &Arc<Self>, addr: SocketAddr, worker: usize) -> Listening {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.retain(|_, port| port.strong_count() > 0);
        let port = ports.get(&addr).and_then(Weak::upgrade).unwrap_or_else(|| {
            let places = self.desks.iter().map(|_| Place::default()).collect();
            let port = Arc::new(Port { evening: Arc::clone(self), addr, places });
            ports.insert(addr, Arc::downgrade(&port));
            port
        });
        drop(ports);
        if let Some(place) = port.places.get(worker) {
            place.listening.fetch_add(1, Ordering::Relaxed);
        }
        Listening { port, worker }
    }

    /// Notes that `worker` could not reach somebody.
    pub(super) fn shun(&self, worker: usize) {
        if let Some(desk) = self.desks.get(worker) {
            desk.shunned_until.store(self.millis(clock::now() + SHUNNED_FOR), Ordering::Relaxed);
        }
    }

    fn is_shunned(&self, worker: usize) -> bool {
        let until = self.desks.get(worker).map_or(0, |desk| desk.shunned_until.load(Ordering::Relaxed));
        until > 0 && until > self.millis(clock::now())
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Port {
    fn open(&self, worker: usize) -> usize {
        self.places.get(worker).map_or(0, |place| place.open.load(Ordering::Relaxed))
    }

    fn is_open_at(&self, worker: usize) -> bool {
        self.places.get(worker).is_some_and(|place| place.listening.load(Ordering::Relaxed) > 0)
    }

    fn seat_at(self: &Arc<Self>, worker: usize) -> Seat {
        if let Some(place) = self.places.get(worker) {
            place.open.fetch_add(1, Ordering::Relaxed);
        }
        Seat { port: Arc::clone(self), worker, drains: None }
    }
}

impl Listening {
    /// Tells who is to serve a connection that was accepted here, and counts it there; a worker that `is_full` keeps nothing
    /// that another would take.
    pub(super) fn seat(&self, is_full: bool) -> Seat {
        let (port, workers) = (&self.port, self.port.places.len());
        let mine = port.open(self.worker);
        // Begun anywhere, so that not all hand to the same one.
        let begin = usize::from(rand::random::<u16>());
        let looked = (begin..begin + workers.min(LOOK_MAX)).map(|number| number % workers);
        let fewest = looked.filter(|worker| port.is_open_at(*worker)).min_by_key(|worker| port.open(*worker));
        let is_better = |other: &usize| {
            let least = port.open(*other);
            let is_uneven = mine > least + least / SLACK_PART || is_full && mine > least;
            is_uneven && !port.evening.is_shunned(*other)
        };
        port.seat_at(fewest.filter(is_better).unwrap_or(self.worker))
    }

    /// Hands a connection to the worker of its seat, which `drains` keeps running until it is served. Gives it back, with a
    /// seat here, where that has no room or is gone.
    ///
    /// # Errors
    /// The kernel's, about the connection, which is closed.
    pub(super) fn hand(
        &self,
        (stream, from): (TcpStream, IpAddr),
        mut seat: Seat,
        drains: TaskTrackerToken,
    ) -> io::Result<Option<(TcpStream, Seat)>> {
        let to = seat.worker;
        seat.drains = Some(drains);
        let handed = Handed { stream: Some(stream.into_std()?), from, seat };
        let Some(desk) = self.port.evening.desks.get(to) else { return Ok(None) };
        match desk.queue.try_send(handed) {
            Ok(()) => Ok(None),
            Err(mpsc::error::TrySendError::Full(mut back) | mpsc::error::TrySendError::Closed(mut back)) => {
                let Some(stream) = back.stream.take() else { return Ok(None) };
                Ok(Some((TcpStream::from_std(stream)?, self.port.seat_at(self.worker))))
            }
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(place) = self.port.places.get(self.worker) {
            place.listening.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Handed {
    /// Returns the local port that it came to.
    pub(super) fn port(&self) -> SocketAddr {
        self.seat.port.addr
    }

    /// Takes the connection over, on the runtime of the worker that serves it: it, who calls, its seat; none if it is gone.
    ///
    /// # Errors
    /// The kernel's, about the connection, which is closed.
    pub(super) fn take(mut self) -> io::Result<Option<((TcpStream, IpAddr), Seat)>> {
        let Some(stream) = self.stream.take() else { return Ok(None) };
        let mut seat = self.seat.port.seat_at(self.seat.worker);
        seat.drains = self.seat.drains.take();
        Ok(Some(((TcpStream::from_std(stream)?, self.from), seat)))
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            // Whoever called must not take this for a clean end.
            let _closed_by_a_fin = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
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
        if let Some(place) = self.port.places.get(self.worker) {
            place.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio_util::task::TaskTracker;

    use super::*;

    const PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9000);

    fn counts(of: &Listening) -> Vec<usize> {
        of.port.places.iter().map(|place| place.open.load(Ordering::Relaxed)).collect()
    }

    fn listening(evening: &Arc<Evening>, workers: usize) -> Vec<Listening> {
        (0..workers).map(|worker| evening.listen(PORT, worker)).collect()
    }

    #[tokio::test]
    async fn whatever_the_kernel_deals_no_worker_has_more_than_its_share() {
        for workers in [1, 2, 3, 8] {
            let (evening, _queues) = Evening::new(workers);
            let at = listening(&evening, workers);
            let last = &at[workers - 1];
            // All of them to one worker.
            let mut seats: Vec<_> = (0..10 * workers).map(|_| last.seat(false)).collect();
            assert_eq!(counts(last), vec![10; workers]);
            // Those of one worker end: what comes next fills its place, wherever it is accepted.
            seats.retain(|seat| !seat.is_at(0));
            seats.extend((0..10).map(|_| last.seat(false)));
            assert_eq!(counts(last), vec![10; workers]);
            // What is open at another port is another matter.
            let other = evening.listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 9001)), workers - 1);
            assert!(other.seat(false).is_at(workers - 1));
            drop(seats);
            assert_eq!(counts(last), vec![0; workers]);
        }
        // Of many workers only some are looked at, and still all come to be used.
        let (evening, _queues) = Evening::new(64);
        let at = listening(&evening, 64);
        let _seats: Vec<_> = (0..640).map(|_| at[63].seat(false)).collect();
        let most = counts(&at[0]).into_iter().max().unwrap();
        assert!(most <= 20, "{:?}", counts(&at[0]));
    }

    #[tokio::test]
    async fn many_stay_where_they_were_accepted_unless_that_has_a_sixteenth_more_or_is_full() {
        let (evening, _queues) = Evening::new(2);
        let at = listening(&evening, 2);
        let _even: Vec<_> = (0..320).map(|number| at[number % 2].seat(false)).collect();
        let more: Vec<_> = (0..30).map(|_| at[0].seat(false)).collect();
        let stayed = more.iter().filter(|seat| seat.is_at(0)).count();
        assert_eq!(stayed, 20, "11 until it has a sixteenth more, then every second");
        drop(more);
        let (one, two) = (at[0].seat(false), at[0].seat(true));
        assert!(one.is_at(0) && two.is_at(1));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_handed_to_who_does_not_listen_or_could_not_reach_somebody() {
        let (evening, _queues) = Evening::new(2);
        let mut at = listening(&evening, 2);
        tokio::time::advance(Duration::from_secs(10)).await;
        let _one = at[0].seat(false);
        evening.shun(1);
        assert!(at[0].seat(false).is_at(0));
        tokio::time::advance(SHUNNED_FOR).await;
        assert!(at[0].seat(false).is_at(1));
        // It closes the port, with another socket in its place for a moment.
        let again = evening.listen(PORT, 1);
        drop(at.pop());
        assert!(at[0].seat(false).is_at(1));
        drop(again);
        assert!(at[0].seat(false).is_at(0));
    }

    async fn connection() -> (TcpStream, (TcpStream, IpAddr)) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (caller, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (stream, from) = accepted.unwrap();
        (caller.unwrap(), (stream, from.ip()))
    }

    #[tokio::test]
    async fn a_connection_that_is_handed_over_goes_on_there_and_holds_up_the_drain() {
        let (evening, mut queues) = Evening::new(2);
        let at = listening(&evening, 2);
        let drains = TaskTracker::new();
        drains.close();
        let (mut caller, accepted) = connection().await;
        let from = accepted.1;
        caller.write_all(b"early").await.unwrap();
        assert!(at[0].hand(accepted, at[0].port.seat_at(1), drains.token()).unwrap().is_none());
        assert_eq!(counts(&at[0]), [0, 1]);
        let handed = queues[1].recv().await.unwrap();
        assert_eq!(handed.port(), PORT);
        let ((mut stream, who), seat) = handed.take().unwrap().unwrap();
        assert_eq!((who, counts(&at[0])), (from, vec![0, 1]));
        stream.write_all(b"hello").await.unwrap();
        let mut read = [0; 5];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"early");
        caller.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
        assert!(!drains.is_empty());
        drop(seat);
        assert!(drains.is_empty());
        assert_eq!(counts(&at[0]), [0, 0]);
    }

    #[tokio::test]
    async fn a_connection_without_room_is_served_where_it_was_accepted_and_one_that_nobody_serves_is_reset() {
        let (evening, mut queues) = Evening::with_room(2, 1);
        let at = listening(&evening, 2);
        let drains = TaskTracker::new();
        let (mut waiting, accepted) = connection().await;
        assert!(at[0].hand(accepted, at[0].port.seat_at(1), drains.token()).unwrap().is_none());
        for is_gone in [false, true] {
            if is_gone {
                drop(queues.pop());
                let error = waiting.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                assert_eq!(counts(&at[0]), [0, 0]);
            }
            let (mut caller, accepted) = connection().await;
            let (mut stream, seat) = at[0].hand(accepted, at[0].port.seat_at(1), drains.token()).unwrap().unwrap();
            assert!(seat.is_at(0));
            stream.write_all(b"still").await.unwrap();
            let mut read = [0; 5];
            caller.read_exact(&mut read).await.unwrap();
            assert_eq!(&read, b"still");
        }
        assert!(drains.is_empty());
    }
}

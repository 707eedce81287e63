//! The listeners and connections: bounded in number, bounded in patience, drained at the end.
//!
//! ```text
//!   TCP | TLS over TCP | unix socket -> seat (the oldest idle connection gives its up where all are taken) -> HTTP/1.1 -> router
//! ```
//!
//! A connection is idle while no request of it is under way: before the first head is whole, and between requests, once the
//! answer has left. So thousands that only sit there, or send a head byte by byte, keep nobody out; a blocking query, a
//! monitor and an answer that is being read keep their seat. A client that takes next to nothing of its answer for a while, or
//! whose request's body does not come, has a seat only as long as nobody else needs it; an answer that is taken more slowly
//! than [`Limits`] says is given up, for it holds memory, and one that holds room (`held`) is taken at a greater pace, and
//! given up sooner where another finds none.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::guard::{Arrival, Peer};
use super::held::{HoldsRoom, WantsRoom};
use super::{ApiConfig, ApiError, BLOCKING_QUERIES_MAX};
use crate::clock;
use crate::unix_socket;

/// Most connections at once, over all listeners: every blocking query and a quarter of that beside them.
pub(super) const CONNECTIONS_MAX: usize = BLOCKING_QUERIES_MAX + BLOCKING_QUERIES_MAX / 4;
/// Most that a connection buffers, in bytes: the longest head that is read. A filter of 4 KiB, escaped, fits; 20,480 connections that
/// each send as much and no more hold 640 MiB.
const BUFFER_BYTES_MAX: usize = 32 * 1024;
/// A client has so long to send a request's head, or to shake hands; also how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// At the end, requests under way have so long to finish.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after `accept` failed for want of descriptors or memory, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most connections at once, over all listeners.
    pub(super) connections_max: usize,
    /// An answer that the client keeps waiting for this long, and of which it takes less than its share of `taken_min`, gives
    /// its seat up to whoever needs it: 10 s.
    pub(super) stalled_after: Duration,
    /// An answer that the client keeps waiting, and of which it takes less than `taken_min` within this time, is given up: 60 s.
    pub(super) stalled_max: Duration,
    /// 64 KiB, of 60 s: a kilobyte a second is as good as nothing, and whoever takes a byte now and then holds as much as
    /// whoever takes none.
    pub(super) taken_min: usize,
    /// The same of an answer that holds room (`held`): 4 MiB, of 60 s, and half of the answer at least. So whatever its size,
    /// room is held for two such times at most, if an answer waits for its client throughout. Who is behind after
    /// `stalled_after` holds it until somebody finds none.
    pub(super) held_taken_min: usize,
    /// A request whose body has not come whole this long after it was first missed gives its seat up likewise: 2 s, for a
    /// MiB comes sooner.
    pub(super) body_after: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: CONNECTIONS_MAX,
            stalled_after: Duration::from_secs(10),
            stalled_max: Duration::from_mins(1),
            taken_min: 64 * 1024,
            held_taken_min: 4 * 1024 * 1024,
            body_after: Duration::from_secs(2),
        }
    }
}

/// Where clients come in.
enum Door {
    Tcp(TcpListener, Option<TlsAcceptor>),
    Unix(unix_socket::Listening),
}

/// Who came in.
enum Visitor {
    Tcp(TcpStream, Peer, Option<TlsAcceptor>),
    Unix(UnixStream),
}

impl Door {
    async fn accept(&self) -> io::Result<Visitor> {
        match self {
            Self::Tcp(listener, tls) => {
                let (stream, peer) = listener.accept().await?;
                Ok(Visitor::Tcp(stream, Peer(peer.ip().to_canonical()), tls.clone()))
            }
            Self::Unix(listening) => Ok(Visitor::Unix(listening.listener().accept().await?.0)),
        }
    }

    fn side(&self) -> Arrival {
        match self {
            Self::Tcp(listener, _) if listener.local_addr().is_ok_and(|addr| addr.ip().is_loopback()) => {
                Arrival::Loopback
            }
            Self::Tcp(..) => Arrival::Network,
            Self::Unix(_) => Arrival::Socket,
        }
    }
}

/// Bound listeners.
pub(super) struct Listening {
    doors: Vec<Door>,
    pub(super) addrs: Vec<SocketAddr>,
}

/// Binds every address of `config`, the one for TLS last; `tls` is there where `config` asks for it.
///
/// # Errors
/// [`ApiError::TokenNeeded`] before anything is bound, [`ApiError::Bind`] for the first address that fails,
/// [`ApiError::Socket`].
pub(super) async fn bind(config: &ApiConfig, tls: Option<Arc<ServerConfig>>) -> Result<Listening, ApiError> {
    if config.listen.is_empty() && config.https.is_none() && config.socket.is_none() {
        return Err(ApiError::NoAddress);
    }
    let plain = config.listen.iter().map(|addr| (addr, None));
    let secure = config.https.iter().map(|https| (&https.addr, tls.clone().map(TlsAcceptor::from)));
    let all: Vec<(&SocketAddr, Option<TlsAcceptor>)> = plain.chain(secure).collect();
    let exposed = all.iter().find(|(addr, _)| !addr.ip().is_loopback());
    if let (Some((addr, _)), true) = (exposed, config.tokens.is_empty()) {
        return Err(ApiError::TokenNeeded { addr: **addr });
    }
    let mut listening = Listening { doors: Vec::new(), addrs: Vec::new() };
    for (addr, acceptor) in all {
        let failed = |source: io::Error| ApiError::Bind { addr: *addr, hint: hint(&source), source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        listening.addrs.push(listener.local_addr().map_err(failed)?);
        listening.doors.push(Door::Tcp(listener, acceptor));
    }
    if let Some(socket) = &config.socket {
        listening.doors.push(Door::Unix(unix_socket::bind(socket).map_err(ApiError::Socket)?));
    }
    Ok(listening)
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the port is in use, perhaps by another agent",
        io::ErrorKind::AddrNotAvailable => "the address is none of this host's",
        io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege",
        _ => "the operating system refused",
    }
}

/// Serves within `limits` until `stop`, then lets requests under way finish.
pub(super) async fn run(listening: Listening, router: Router, limits: Limits, stop: CancellationToken) {
    let seats = Arc::new(Seats::new(limits));
    let mut acceptors = JoinSet::new();
    for door in listening.doors {
        acceptors.spawn(accept_all(door, router.clone(), Arc::clone(&seats), stop.clone()));
    }
    while acceptors.join_next().await.is_some() {}
}

/// Accepts at one door; owns and joins its connections.
async fn accept_all(door: Door, router: Router, seats: Arc<Seats>, stop: CancellationToken) {
    let from = door.side();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_ended) = connections.join_next() => continue,
            accepted = door.accept() => accepted,
        };
        let visitor = match accepted {
            Ok(visitor) => visitor,
            Err(error) => {
                warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let seat = tokio::select! {
            () = stop.cancelled() => break,
            seat = seats.take() => seat,
        };
        connections.spawn(connection(visitor, router.clone(), from, seat, stop.clone()));
    }
    drop(door);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("HTTP requests were cut off: they took longer than the drain allows");
    }
}

/// Serves one connection from loopback, for tests of its pace.
#[cfg(test)]
pub(super) async fn serve_alone<S>(stream: S, router: Router, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let seat = Arc::new(Seats::new(limits)).take().await;
    serve(stream, router, (Arrival::Loopback, None), &seat, CancellationToken::new()).await;
}

/// Shakes hands where the door is for TLS, then serves.
async fn connection(visitor: Visitor, router: Router, from: Arrival, seat: Arc<Seat>, stop: CancellationToken) {
    let (stream, peer, tls) = match visitor {
        Visitor::Unix(stream) => return serve(stream, router, (from, None), &seat, stop).await,
        Visitor::Tcp(stream, peer, tls) => (stream, peer, tls),
    };
    let from = (from, Some(peer));
    // Answers are single writes: waiting to fill a packet only adds delay. A failure changes nothing else.
    let _unset = stream.set_nodelay(true);
    let Some(tls) = tls else { return serve(stream, router, from, &seat, stop).await };
    let shaken = tokio::select! {
        () = stop.cancelled() => return,
        () = seat.given_up.cancelled() => return,
        shaken = tokio::time::timeout(HEADER_TIMEOUT, tls.accept(stream)) => shaken,
    };
    match shaken {
        Ok(Ok(stream)) => serve(stream, router, from, &seat, stop).await,
        Ok(Err(error)) => debug!(%error, "TLS handshake of an HTTP client failed"),
        Err(_late) => debug!("an HTTP client took too long to shake hands"),
    }
}

/// Serves one connection; after `stop` the request under way is its last.
async fn serve<S>(stream: S, router: Router, from: (Arrival, Option<Peer>), seat: &Arc<Seat>, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        let (arrival, peer) = from;
        request.extensions_mut().insert(arrival);
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        let busy = seat.work();
        let arriving = |body| Body::new(Arriving { body, seat: Arc::clone(seat), late: None, rests: false });
        let answered = service.call(request.map(arriving));
        async move {
            let answer = answered.await.map_err(|never: Infallible| never);
            answer.map(|answer| {
                let held_bytes = answer.extensions().get::<HoldsRoom>().map_or(0, |held| held.bytes);
                busy.0.held_bytes.store(held_bytes, Ordering::Relaxed);
                if let Some(WantsRoom { bytes }) = answer.extensions().get() {
                    busy.0.seats.make_room(*bytes);
                }
                answer.map(|body| Answer { body, busy })
            })
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(BUFFER_BYTES_MAX);
    let stream = Seated { stream, seat: Arc::clone(seat), stall: None };
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = seat.given_up.cancelled() => return,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout_at(clock::now() + DRAIN_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%error, "HTTP connection ended early");
    }
}

/// A request's body; while it does not come its connection counts as idle.
struct Arriving {
    body: hyper::body::Incoming,
    seat: Arc<Seat>,
    /// Runs from when a part was first missed.
    late: Option<Pin<Box<tokio::time::Sleep>>>,
    rests: bool,
}

impl http_body::Body for Arriving {
    type Data = bytes::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_pending() && !self.rests {
            let after = self.seat.seats.limits.body_after;
            let late = self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep(after)));
            if late.as_mut().poll(cx).is_ready() {
                self.rests = true;
                self.seat.rest();
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Arriving {
    /// It came, or nobody wants it: what is under way from here on is the answer.
    fn drop(&mut self) {
        if self.rests {
            self.seat.goes_on();
        }
    }
}

/// An answer's body; the request is under way until hyper has taken all of it.
struct Answer {
    body: Body,
    busy: Busy,
}

impl http_body::Body for Answer {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.busy.0.is_dry.store(polled.is_pending(), Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A connection; notes whether all that was written has left, and how much the client takes while it keeps some waiting.
struct Seated<S> {
    stream: S,
    seat: Arc<Seat>,
    /// Runs from when a write waits until enough was taken.
    stall: Option<Stall>,
}

/// How long a client has kept an answer waiting, and what it took meanwhile.
struct Stall {
    timer: Pin<Box<tokio::time::Sleep>>,
    /// The first time is over: the timer runs for the second.
    is_late: bool,
    taken: usize,
}

impl<S> Seated<S> {
    /// Notes what became of a write.
    fn wrote(&mut self, polled: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match &polled {
            Poll::Ready(Ok(bytes)) => self.took(*bytes),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => {
                if let Err(error) = self.waits(cx) {
                    return Poll::Ready(Err(error));
                }
            }
        }
        polled
    }

    /// Notes that the client took so much.
    fn took(&mut self, bytes: usize) {
        let least = self.least();
        if let Some(stall) = &mut self.stall {
            stall.taken = stall.taken.saturating_add(bytes);
            if stall.taken >= least {
                self.goes_on();
            }
        }
    }

    /// Notes that the client keeps an answer waiting.
    ///
    /// # Errors
    /// It does so for too long.
    fn waits(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let (Limits { stalled_after, stalled_max, .. }, least) = (self.seat.seats.limits, self.least());
        let begun = || Stall { timer: Box::pin(tokio::time::sleep(stalled_after)), is_late: false, taken: 0 };
        let stall = self.stall.get_or_insert_with(begun);
        while stall.timer.as_mut().poll(cx).is_ready() {
            if stall.is_late {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes next to nothing"));
            }
            stall.is_late = true;
            let left = stalled_max.saturating_sub(stalled_after);
            stall.timer.as_mut().reset(clock::now() + left);
            // Who keeps the pace so far keeps the seat as well.
            if stall.taken as u128 * stalled_max.as_nanos() < least as u128 * stalled_after.as_nanos() {
                self.seat.rest();
            }
        }
        Ok(())
    }

    /// What the client is to take within the time, in bytes.
    fn least(&self) -> usize {
        let Limits { taken_min, held_taken_min, .. } = self.seat.seats.limits;
        match self.seat.held_bytes.load(Ordering::Relaxed) {
            0 => taken_min,
            bytes => held_taken_min.max(bytes.div_ceil(2)),
        }
    }

    /// The client took enough, or all there is.
    fn goes_on(&mut self) {
        if self.stall.take().is_some() {
            self.seat.goes_on();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Seated<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Seated<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.seat.unflushed.store(true, Ordering::Relaxed);
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(polled, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes once its own buffer is empty; TLS may hold some back.
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        if polled.is_pending() {
            return self.waits(cx).map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending);
        }
        // A stall that ends takes the connection out of the idle ones; only then may it settle among them. There may be more
        // of the answer than hyper buffers: then its next part waits as well.
        if self.seat.is_read_up() {
            self.goes_on();
        }
        if self.seat.unflushed.swap(false, Ordering::Relaxed) {
            self.seat.settle();
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.seat.unflushed.store(true, Ordering::Relaxed);
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.wrote(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The places for connections.
#[derive(Debug)]
struct Seats {
    limits: Limits,
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

/// The idle connections, the one that is idle for longest first.
#[derive(Debug, Default)]
struct Idle {
    /// Grows by one with each that becomes idle.
    next: u64,
    seats: BTreeMap<u64, CancellationToken>,
    /// Those whose client is behind with an answer that holds room: how many bytes of it.
    holders: BTreeMap<u64, usize>,
    /// Newcomers that wait for a place.
    waiting: usize,
}

impl Seats {
    fn new(limits: Limits) -> Self {
        Self { limits, places: Arc::new(Semaphore::new(limits.connections_max)), idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up answers that hold room and whose clients are behind, those that are so for longest first, until `bytes` of
    /// them go. Who was refused finds room when it asks again.
    fn make_room(&self, bytes: usize) {
        let mut idle = self.idle();
        let mut going = 0;
        while going < bytes {
            let Some((number, held_bytes)) = idle.holders.pop_first() else { return };
            going = held_bytes.saturating_add(going);
            if let Some(given_up) = idle.seats.remove(&number) {
                given_up.cancel();
            }
        }
    }

    /// Takes a place; where none is free the connection that is idle for longest is closed, where none is idle the next one
    /// that becomes so.
    ///
    /// # Cancel safety
    /// Cancelling takes no place; an idle connection may have been closed for it.
    async fn take(self: &Arc<Self>) -> Arc<Seat> {
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_none) => {
                let _waits = Waits::begin(self);
                Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed")
            }
        };
        let seat = Seat {
            seats: Arc::clone(self),
            given_up: CancellationToken::new(),
            requests: AtomicUsize::new(0),
            unflushed: AtomicBool::new(false),
            is_dry: AtomicBool::new(false),
            held_bytes: AtomicUsize::new(0),
            number: Mutex::new(None),
            _place: place,
        };
        // Whoever waits at another door waits on: a newcomer that gave way at once would never be served.
        seat.rest_among(&mut self.idle());
        Arc::new(seat)
    }
}

/// A newcomer that waits for a place: closes the connection that is idle for longest, or has the next one closed.
struct Waits<'a>(&'a Seats);

impl<'a> Waits<'a> {
    fn begin(seats: &'a Seats) -> Self {
        let mut idle = seats.idle();
        idle.waiting += 1;
        if let Some((_, given_up)) = idle.seats.pop_first() {
            given_up.cancel();
        }
        Self(seats)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.idle().waiting -= 1;
    }
}

/// A connection's place.
#[derive(Debug)]
struct Seat {
    seats: Arc<Seats>,
    /// Cancelled when another connection gets the place.
    given_up: CancellationToken,
    /// Under way, up to the end of their answers.
    requests: AtomicUsize,
    /// Something was written and has not left.
    unflushed: AtomicBool,
    /// There is no more of the answer for the time being: it is made as it goes.
    is_dry: AtomicBool,
    /// The size of an answer that holds room, until it has left; 0 of others.
    held_bytes: AtomicUsize,
    /// Its number among the idle ones; none while a request is under way.
    number: Mutex<Option<u64>>,
    _place: OwnedSemaphorePermit,
}

impl Seat {
    /// Begins a request; it is over when the returned value is dropped.
    fn work(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.goes_on();
        Busy(Arc::clone(self))
    }

    /// Takes the connection out of the idle ones.
    fn goes_on(&self) {
        let mut idle = self.seats.idle();
        if let Some(number) = self.number.lock().unwrap_or_else(PoisonError::into_inner).take() {
            idle.seats.remove(&number);
            idle.holders.remove(&number);
        }
    }

    /// Makes the connection idle once nothing is under way and everything has left.
    fn settle(&self) {
        if self.requests.load(Ordering::Relaxed) == 0 && !self.unflushed.load(Ordering::Relaxed) {
            self.held_bytes.store(0, Ordering::Relaxed);
            self.rest();
        }
    }

    /// Tells whether a client that took all that was written took all there is.
    fn is_read_up(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0 || self.is_dry.load(Ordering::Relaxed)
    }

    /// Puts the connection among the idle ones, or gives its place to one that waits.
    fn rest(&self) {
        let mut idle = self.seats.idle();
        if idle.waiting > 0 {
            self.given_up.cancel();
        } else {
            self.rest_among(&mut idle);
        }
    }

    fn rest_among(&self, idle: &mut Idle) {
        let mut own = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        if own.is_none() {
            let number = idle.next;
            *own = Some(number);
            idle.seats.insert(number, self.given_up.clone());
            let held_bytes = self.held_bytes.load(Ordering::Relaxed);
            if held_bytes > 0 {
                idle.holders.insert(number, held_bytes);
            }
            idle.next += 1;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.goes_on();
    }
}

/// A request under way.
struct Busy(Arc<Seat>);

impl Drop for Busy {
    fn drop(&mut self) {
        // hyper has the whole answer, and flushes it next: that settles it.
        self.0.unflushed.store(true, Ordering::Relaxed);
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

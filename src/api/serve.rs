//! The listeners and connections: bounded in number, bounded in patience, drained at the end.
//!
//! ```text
//!   TCP | TLS over TCP | unix socket -> seat (the oldest idle connection gives its up where all are taken) -> HTTP/1.1 -> router
//! ```
//!
//! A connection is idle while no request of it is under way: before the first head is whole, and between requests. So
//! thousands that only sit there, or send a head byte by byte, keep nobody out; a blocking query is under way and keeps its seat.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::guard::{Arrival, Peer};
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
    if config.listen.is_empty() {
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

/// Serves at most `connections_max` at once until `stop`, then lets requests under way finish.
pub(super) async fn run(listening: Listening, router: Router, connections_max: usize, stop: CancellationToken) {
    let seats = Arc::new(Seats::new(connections_max));
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
        let answered = service.call(request.map(Body::new));
        let busy = seat.work();
        async move {
            let answer = answered.await.map_err(|never: Infallible| never);
            drop(busy);
            answer
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(BUFFER_BYTES_MAX);
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

/// The places for connections.
#[derive(Debug)]
struct Seats {
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

/// The idle connections, the one that is idle for longest first.
#[derive(Debug, Default)]
struct Idle {
    /// Grows by one with each that becomes idle.
    next: u64,
    seats: BTreeMap<u64, CancellationToken>,
}

impl Seats {
    fn new(connections_max: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(connections_max)), idle: Mutex::default() }
    }

    /// Takes a place; where none is free the connection that is idle for longest is closed, where none is idle it waits.
    ///
    /// # Cancel safety
    /// Cancelling takes no place; an idle connection may have been closed for it.
    async fn take(self: &Arc<Self>) -> Arc<Seat> {
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_none) => {
                self.close_oldest();
                Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed")
            }
        };
        let seat = Seat {
            seats: Arc::clone(self),
            given_up: CancellationToken::new(),
            number: Mutex::new(None),
            _place: place,
        };
        seat.rest();
        Arc::new(seat)
    }

    fn close_oldest(&self) {
        let oldest = self.idle.lock().unwrap_or_else(PoisonError::into_inner).seats.pop_first();
        if let Some((_, given_up)) = oldest {
            given_up.cancel();
        }
    }
}

/// A connection's place.
#[derive(Debug)]
struct Seat {
    seats: Arc<Seats>,
    /// Cancelled when another connection gets the place.
    given_up: CancellationToken,
    /// Its number among the idle ones; none while a request is under way.
    number: Mutex<Option<u64>>,
    _place: OwnedSemaphorePermit,
}

impl Seat {
    /// Begins a request; the connection is idle again when the returned value is dropped.
    fn work(self: &Arc<Self>) -> Busy {
        if let Some(number) = self.number.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.seats.idle.lock().unwrap_or_else(PoisonError::into_inner).seats.remove(&number);
        }
        Busy(Arc::clone(self))
    }

    fn rest(&self) {
        let mut idle = self.seats.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let number = idle.next;
        idle.next += 1;
        idle.seats.insert(number, self.given_up.clone());
        drop(idle);
        *self.number.lock().unwrap_or_else(PoisonError::into_inner) = Some(number);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(number) = self.number.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.seats.idle.lock().unwrap_or_else(PoisonError::into_inner).seats.remove(&number);
        }
    }
}

/// A request under way.
struct Busy(Arc<Seat>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.rest();
    }
}

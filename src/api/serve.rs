//! The listeners and connections: bounded in number, bounded in patience, drained at the end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::guard::Arrival;
use super::{ApiConfig, ApiError};
use crate::clock;

/// Most connections at once, over all listeners: at some 16 KiB each, 64 MiB.
const CONNECTIONS_MAX: usize = 4096;
/// A client has so long to send a request's head; also how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// At the end, requests under way have so long to finish.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after `accept` failed for want of descriptors or memory, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bound listeners.
pub(super) struct Listening {
    listeners: Vec<TcpListener>,
    pub(super) addrs: Vec<SocketAddr>,
}

/// Binds every address of `config`.
///
/// # Errors
/// [`ApiError::TokenNeeded`] before anything is bound, [`ApiError::Bind`] for the first address that fails.
pub(super) async fn bind(config: &ApiConfig) -> Result<Listening, ApiError> {
    if config.listen.is_empty() {
        return Err(ApiError::NoAddress);
    }
    let exposed = config.listen.iter().find(|addr| !addr.ip().is_loopback());
    if let (Some(addr), None) = (exposed, &config.token) {
        return Err(ApiError::TokenNeeded { addr: *addr });
    }
    let mut listening = Listening { listeners: Vec::new(), addrs: Vec::new() };
    for addr in &config.listen {
        let failed = |source: io::Error| ApiError::Bind { addr: *addr, hint: hint(&source), source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        listening.addrs.push(listener.local_addr().map_err(failed)?);
        listening.listeners.push(listener);
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

/// Serves until `stop`, then lets requests under way finish.
pub(super) async fn run(listening: Listening, router: Router, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut acceptors = JoinSet::new();
    for listener in listening.listeners {
        acceptors.spawn(accept_all(listener, router.clone(), Arc::clone(&permits), stop.clone()));
    }
    while acceptors.join_next().await.is_some() {}
}

/// Accepts on one listener; owns and joins its connections.
async fn accept_all(listener: TcpListener, router: Router, permits: Arc<Semaphore>, stop: CancellationToken) {
    let is_loopback = listener.local_addr().is_ok_and(|addr| addr.ip().is_loopback());
    let from = if is_loopback { Arrival::Loopback } else { Arrival::Network };
    let mut connections = JoinSet::new();
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = Arc::clone(&permits).acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_ended) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _peer)) => {
                let served = serve(stream, router.clone(), from, stop.clone());
                connections.spawn(async move {
                    served.await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("HTTP requests were cut off: they took longer than the drain allows");
    }
}

/// Serves one connection; after `stop` the request under way is its last.
async fn serve(stream: TcpStream, router: Router, from: Arrival, stop: CancellationToken) {
    // Answers are single writes: waiting to fill a packet only adds delay. A failure changes nothing else.
    let _unset = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(from);
        let answered = service.call(request.map(Body::new));
        async move { answered.await.map_err(|never: Infallible| never) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout_at(clock::now() + DRAIN_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%error, "HTTP connection ended early");
    }
}

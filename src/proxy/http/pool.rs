//! Connections from a worker to the apps on its host.
//!
//! HTTP/1.1: idle keep-alive connections per address, the last used first. HTTP/2: shared ones per address
//! (`h2_connections`), and one for each WebSocket.
//! Invariants: a connection waits here only after both its request and its response were whole; one that the app closed
//! is dropped at checkout. The drain waits for requests and their bodies, never for a connection to an app: its tasks are not tracked.
//! Not here: how many connections an app may get (a limit per route).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use hyper::client::conn::{http1, http2};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tracing::debug;

use super::Dial;
use super::app_h2::AppError;
use super::body::TunnelBody;
use super::h2_connections::{self, Connections};
use super::interims::Interims;
use super::io::AppIo;

/// Idle connections kept per app and worker: what 512 requests at once leave behind.
const IDLE_MAX: usize = 512;
/// An idle connection is closed after this: below the 60-75 s after which common servers close it.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// Longest head of an app's response, in bytes, as on the wire between agents.
pub(super) const HEAD_BYTES_MAX: usize = crate::proxy::head::HEAD_BYTES_MAX;
/// How often it is looked whether an app's SETTINGS have come: they are the first that it sends.
const SETTINGS_PAUSE_MIN: Duration = Duration::from_millis(1);
const SETTINGS_PAUSE_MAX: Duration = Duration::from_millis(100);

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Http1 {
    pub(super) sender: http1::SendRequest<TunnelBody>,
    /// Where its interim answers are heard.
    pub(super) interims: Arc<Interims>,
}

/// Why an app cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the app at {addr} refuses the connection")]
    Tcp {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("the app at {addr} does not accept the connection in time")]
    Timeout { addr: SocketAddr },
    #[error("the app at {addr} closed the connection before it took a request")]
    Closed { addr: SocketAddr },
    /// Another line of the log says why.
    #[error("there is no connection to the app at {addr}")]
    None { addr: SocketAddr },
    #[error("the app at {addr} does not speak HTTP/2")]
    Handshake {
        addr: SocketAddr,
        #[source]
        source: AppError,
    },
}

#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
}

/// The pool of one worker. The addresses are those of registered instances: few.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    idle: RefCell<HashMap<SocketAddr, VecDeque<Idle>>>,
    shared: RefCell<HashMap<SocketAddr, Rc<Connections>>>,
    sweeping: Cell<bool>,
}

/// Runs hyper's tasks for a caller's connection on the worker; the drain waits for them.
pub(crate) struct WorkerExec<D>(pub(crate) Rc<D>);

/// Runs hyper's tasks for a WebSocket to an app on the worker: one of them lives as long as the connection.
struct AppExec<D>(Rc<D>);

impl<D> Clone for WorkerExec<D> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Dial, F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for WorkerExec<D> {
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

impl<D> Clone for AppExec<D> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Dial, F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for AppExec<D> {
    fn execute(&self, future: F) {
        self.0.spawn_untracked(future);
    }
}

impl Pool {
    /// Returns an idle connection that still stands.
    pub(crate) async fn checkout(&self, addr: SocketAddr) -> Option<Http1> {
        loop {
            let idle = self.idle.borrow_mut().get_mut(&addr)?.pop_back()?;
            let Http1 { mut sender, interims } = idle.connection;
            if !sender.is_closed() && sender.ready().await.is_ok() {
                return Some(Http1 { sender, interims });
            }
        }
    }

    /// Keeps a connection whose last exchange was whole.
    pub(crate) fn put<D: Dial>(self: &Rc<Self>, worker: &Rc<D>, addr: SocketAddr, connection: Http1) {
        if connection.sender.is_closed() || worker.stopping() {
            return;
        }
        connection.interims.end();
        let mut idle = self.idle.borrow_mut();
        let queue = idle.entry(addr).or_default();
        if queue.len() >= IDLE_MAX {
            queue.pop_front();
        }
        queue.push_back(Idle { connection, since: crate::clock::now() });
        drop(idle);
        self.keep_sweeping(worker);
    }

    /// Closes from here on what is idle too long.
    pub(super) fn keep_sweeping<D: Dial>(self: &Rc<Self>, worker: &Rc<D>) {
        if !self.sweeping.replace(true) {
            worker.spawn_untracked(Rc::clone(self).sweep());
        }
    }

    /// Closes connections that were idle too long, until none is left.
    async fn sweep(self: Rc<Self>) {
        while self.sweeping.get() {
            tokio::time::sleep(IDLE_FOR / 2).await;
            let now = crate::clock::now();
            let mut idle = self.idle.borrow_mut();
            for queue in idle.values_mut() {
                while queue.front().is_some_and(|idle| now.saturating_duration_since(idle.since) >= IDLE_FOR) {
                    queue.pop_front();
                }
            }
            idle.retain(|_, queue| !queue.is_empty());
            let mut shared = self.shared.borrow_mut();
            // Who holds them may be opening one.
            shared.retain(|_, connections| connections.sweep() || Rc::strong_count(connections) > 1);
            self.sweeping.set(!idle.is_empty() || !shared.is_empty());
        }
    }

    /// Opens an HTTP/1.1 connection.
    pub(crate) async fn connect<D: Dial>(worker: &Rc<D>, addr: SocketAddr) -> Result<Http1, ConnectError> {
        let interims = Arc::<Interims>::default();
        let io = dial(worker, addr).await?.heard_by(Arc::clone(&interims));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (sender, connection) =
            builder.handshake(io).await.map_err(|error| ConnectError::Handshake { addr, source: error.into() })?;
        worker.spawn_untracked(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%addr, error = %error, "app connection ended");
            }
        });
        Ok(Http1 { sender, interims })
    }

    /// Returns the HTTP/2 connections to an app; there may be none.
    pub(super) fn shared(&self, addr: SocketAddr) -> Rc<Connections> {
        Rc::clone(self.shared.borrow_mut().entry(addr).or_default())
    }

    /// Opens an HTTP/2 connection for one WebSocket; none: the app's SETTINGS allow none (RFC 8441 §3).
    pub(crate) async fn connect_for_websocket<D: Dial>(
        worker: &Rc<D>,
        addr: SocketAddr,
    ) -> Result<Option<http2::SendRequest<TunnelBody>>, ConnectError> {
        let stream = dial(worker, addr).await?;
        // No stream may be opened until the app's SETTINGS have come: so it is seen that they have.
        let handshake = http2_builder(worker).initial_max_send_streams(0_usize).handshake(stream).await;
        let (sender, connection) = handshake.map_err(|error| ConnectError::Handshake { addr, source: error.into() })?;
        let told = async {
            let mut pause = SETTINGS_PAUSE_MIN;
            while connection.current_max_send_streams() == 0 {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(SETTINGS_PAUSE_MAX);
            }
        };
        let told = tokio::time::timeout(worker.http().limits.connect, told).await;
        told.map_err(|_| ConnectError::Timeout { addr })?;
        if !connection.is_extended_connect_protocol_enabled() {
            return Ok(None);
        }
        worker.spawn_untracked(async move {
            if let Err(error) = connection.await {
                debug!(%addr, error = %error, "app connection ended");
            }
        });
        Ok(Some(sender))
    }
}

fn http2_builder<D: Dial>(worker: &Rc<D>) -> http2::Builder<AppExec<D>> {
    let mut builder = http2::Builder::new(AppExec(Rc::clone(worker)));
    builder
        .initial_stream_window_size(h2_connections::STREAM_WINDOW)
        .initial_connection_window_size(h2_connections::CONNECTION_WINDOW)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX));
    builder
}

pub(super) async fn dial<D: Dial>(worker: &Rc<D>, addr: SocketAddr) -> Result<AppIo, ConnectError> {
    let limit = worker.http().limits.connect;
    let connected = tokio::time::timeout(limit, TcpStream::connect(addr)).await;
    let stream =
        connected.map_err(|_| ConnectError::Timeout { addr })?.map_err(|source| ConnectError::Tcp { addr, source })?;
    // A failure costs latency only.
    let _nodelay = stream.set_nodelay(true);
    Ok(AppIo::new(stream))
}

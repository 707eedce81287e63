//! An app's HTTP/2 connections, of one worker, and which of them takes a request.
//!
//! ```text
//!   request -> the first connection with room -> a stream of it, until request and answer are over
//!           -> none has: one more is opened, up to a limit; meanwhile all wait in one queue for either
//! ```
//!
//! Invariants: no request goes out before the app's SETTINGS have come, nor beyond the streams that they allow
//! (`SETTINGS_MAX_CONCURRENT_STREAMS`, RFC 9113 §5.1.2); nobody passes those that wait; a request that is given up while it
//! waits never goes out; what is left over after a burst is closed.
//! Not here: what goes over a stream (`app_h2`), a WebSocket's own connection (`pool`).

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use hyper_util::rt::TokioIo;
use tokio::sync::{Mutex, oneshot};
use tracing::debug;

use super::Dial;
use super::app_h2::{self, AppError, Begun};
use super::body::TunnelBody;
use super::call::CallError;
use super::io::AppIo;
use super::pool::{self, ConnectError, HEAD_BYTES_MAX};

/// HTTP/2 windows towards the app: a loopback without stalls; streams whose callers do not read leave room for 60 others.
pub(super) const STREAM_WINDOW: u32 = 1024 * 1024;
pub(super) const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
/// How many streams h2 takes to be allowed until SETTINGS come. None can say as many: they hold 32 bits.
const UNTOLD: usize = usize::MAX - 1;
/// After a further connection could not be opened, none is tried for this long.
const OPEN_PAUSE: Duration = Duration::from_secs(1);
/// A connection on which so many requests were given up since the app last answered takes no more: of an app that reads
/// nothing, h2 would keep them all.
const GIVEN_UP_MAX: usize = 256;

/// The connections to one app.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// In the order in which they were opened: those behind rest as soon as those in front have room for all.
    open: RefCell<Vec<Connection>>,
    /// Who begins a request has it; the others wait for it in the order in which they came.
    turn: Mutex<()>,
    /// One is being opened.
    is_opening: Cell<bool>,
    news: Rc<News>,
}

/// A connection.
struct Connection {
    /// Only its clones send: one that sends waits for the stream that it began last, by the waker of that stream's body.
    sender: SendRequest<Bytes>,
    load: Rc<Load>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("load", &self.load).finish_non_exhaustive()
    }
}

/// How much a connection carries.
#[derive(Debug)]
struct Load {
    /// Of the app's connections, from 1.
    number: u64,
    /// The last number when it ended.
    ended_at: Cell<u64>,
    under_way: Cell<usize>,
    /// Streams that the app allows.
    allowed: Cell<usize>,
    /// Requests that were given up since the app last answered one.
    given_up: Cell<usize>,
    /// The app answered on it.
    has_served: Cell<bool>,
    /// It carried something since the last sweep.
    was_used: Cell<bool>,
    news: Rc<News>,
}

/// What the connections have in common.
#[derive(Debug, Default)]
struct News {
    /// Who has the turn and waits for a stream or a connection.
    waiting: RefCell<Option<Waker>>,
    /// How many connections were begun.
    begun: Cell<u64>,
    /// How many ended with nothing answered.
    failed: Cell<u64>,
}

impl News {
    /// Wakes who waits.
    fn tell(&self) {
        if let Some(waiting) = self.waiting.take() {
            waiting.wake();
        }
    }

    /// Waits for the next; what is told before the first poll is missed.
    async fn next(&self) {
        let mut is_heard = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut is_heard, true) && self.waiting.borrow().is_none() {
                return Poll::Ready(());
            }
            self.waiting.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    fn fail(&self) {
        self.failed.set(self.failed.get() + 1);
        self.tell();
    }
}

/// A stream of a connection's, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    load: Rc<Load>,
    is_answered: Cell<bool>,
    /// Others were answered before it began: if the connection ends first, the app may just have closed what it took to rest.
    pub(super) is_on_kept: bool,
}

impl Taken {
    /// Notes that the app answers.
    pub(super) fn answered(&self) {
        self.is_answered.set(true);
        self.load.has_served.set(true);
        self.load.given_up.set(0);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let load = &self.load;
        load.under_way.set(load.under_way.get().saturating_sub(1));
        load.given_up.set(load.given_up.get() + usize::from(!self.is_answered.get()));
        load.was_used.set(true);
        load.news.tell();
    }
}

impl Connection {
    fn is_full(&self) -> bool {
        self.load.under_way.get() >= self.load.allowed.get()
    }

    /// Whether it takes requests, at once or later: none any more after a GOAWAY, nor once it is closed.
    fn is_open(&mut self) -> bool {
        let checked = self.sender.poll_ready(&mut Context::from_waker(Waker::noop()));
        self.load.given_up.get() < GIVEN_UP_MAX && !matches!(checked, Poll::Ready(Err(_)))
    }

    fn take(&self) -> Rc<Taken> {
        let load = Rc::clone(&self.load);
        load.under_way.set(load.under_way.get() + 1);
        Rc::new(Taken { is_answered: Cell::new(false), is_on_kept: load.has_served.get(), load })
    }
}

impl Connections {
    /// Begins `request` at the app at `addr`, on a connection with room for it; where there is none, waits for it.
    ///
    /// # Errors
    /// As any request to an app. Where none can be opened, for all that wait.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the queue: nothing was sent. A connection that is being opened for it is there for the next.
    pub(super) async fn begin<D: Dial>(
        self: &Rc<Self>,
        worker: &Rc<D>,
        addr: SocketAddr,
        request: Request<TunnelBody>,
    ) -> Result<Begun, CallError> {
        if let Ok(_nobody_waits) = self.turn.try_lock()
            && let Some(at) = self.with_room()
        {
            return self.begin_on(at, worker, request);
        }
        Box::pin(self.begin_in_turn(worker, addr, request)).await
    }

    /// Returns where the first connection with room is. Drops what is closed in front of it.
    fn with_room(&self) -> Option<usize> {
        let mut open = self.open.borrow_mut();
        let mut at = 0;
        while let Some(connection) = open.get_mut(at) {
            if connection.is_full() {
                at += 1;
            } else if connection.is_open() {
                return Some(at);
            } else {
                drop(open.remove(at));
            }
        }
        None
    }

    fn begin_on<D: Dial>(&self, at: usize, worker: &Rc<D>, request: Request<TunnelBody>) -> Result<Begun, CallError> {
        let (sender, taken) = {
            let open = self.open.borrow();
            let connection = open.get(at).expect("nothing was removed since it was found");
            (connection.sender.clone(), connection.take())
        };
        let begun = app_h2::send(worker, sender, request, taken);
        begun.map_err(|error| CallError::of_h2(AppError::H2(error)))
    }

    async fn begin_in_turn<D: Dial>(
        self: &Rc<Self>,
        worker: &Rc<D>,
        addr: SocketAddr,
        request: Request<TunnelBody>,
    ) -> Result<Begun, CallError> {
        let failed = self.news.failed.get();
        let _turn = self.turn.lock().await;
        loop {
            if let Some(at) = self.with_room() {
                return self.begin_on(at, worker, request);
            }
            self.open.borrow_mut().retain_mut(Connection::is_open);
            if self.open.borrow().is_empty() && self.news.failed.get() != failed {
                return Err(CallError::Connect(ConnectError::None { addr }));
            }
            if self.may_grow(worker) && !self.is_opening.replace(true) {
                worker.spawn_untracked(Rc::clone(self).grow(Rc::clone(worker), addr));
            }
            self.news.next().await;
        }
    }

    /// Whether one more connection is wanted. An app that allows no stream at all asks for patience.
    fn may_grow<D: Dial>(&self, worker: &Rc<D>) -> bool {
        let open = self.open.borrow();
        open.len() < worker.http().limits.app_connections && open.iter().all(|one| one.load.allowed.get() > 0)
    }

    /// Opens one more connection. Not by who waits, who may be given up, and gets a stream of another if one ends before.
    async fn grow<D: Dial>(self: Rc<Self>, worker: Rc<D>, addr: SocketAddr) {
        match self.open(&worker, addr).await {
            Ok(connection) => {
                self.open.borrow_mut().push(connection);
                worker.http().pool.keep_sweeping(&worker);
            }
            Err(error) => {
                debug!(%addr, error = %error, "no connection to the app");
                self.news.fail();
                // Where there is none at all, who comes next has it tried again.
                if !self.open.borrow().is_empty() {
                    tokio::time::sleep(OPEN_PAUSE).await;
                }
            }
        }
        self.is_opening.set(false);
        self.news.tell();
    }

    async fn open<D: Dial>(&self, worker: &Rc<D>, addr: SocketAddr) -> Result<Connection, ConnectError> {
        let io = pool::dial(worker, addr).await?;
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_max_send_streams(UNTOLD)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX));
        let handshake = builder.handshake(TokioIo::new(io)).await;
        let (sender, connection) =
            handshake.map_err(|source| ConnectError::Handshake { addr, source: AppError::H2(source) })?;
        self.news.begun.set(self.news.begun.get() + 1);
        let load = Rc::new(Load {
            number: self.news.begun.get(),
            ended_at: Cell::new(0),
            under_way: Cell::new(0),
            allowed: Cell::new(0),
            given_up: Cell::new(0),
            has_served: Cell::new(false),
            was_used: Cell::new(true),
            news: Rc::clone(&self.news),
        });
        let (tell, told) = oneshot::channel();
        worker.spawn_untracked(carry(addr, connection, Rc::clone(&load), tell));
        // An app that is busy answers as late as it answers requests.
        let told = tokio::time::timeout(worker.http().limits.response, told).await;
        match told.map_err(|_| ConnectError::Timeout { addr })? {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(ConnectError::Handshake { addr, source: AppError::H2(source) }),
            Err(_ended) => return Err(ConnectError::Closed { addr }),
        }
        let mut connection = Connection { sender, load };
        if connection.is_open() { Ok(connection) } else { Err(ConnectError::Closed { addr }) }
    }

    /// Uses none of those on that were there when that of `taken` was cut off: an app that dies ends them all, and the end of
    /// some may not be read yet.
    pub(super) fn forget(&self, taken: &Taken) {
        let ended_at = taken.load.ended_at.get();
        self.open.borrow_mut().retain(|one| one.load.number > ended_at);
        self.news.tell();
    }

    #[cfg(test)]
    pub(super) fn is_opening(&self) -> bool {
        self.is_opening.get()
    }

    /// Closes what is closed by the app, and what carried nothing since the last call; tells whether any is left.
    pub(super) fn sweep(&self) -> bool {
        let mut open = self.open.borrow_mut();
        open.retain_mut(|one| {
            let is_used = one.load.was_used.replace(false) || one.load.under_way.get() > 0;
            is_used && one.is_open()
        });
        !open.is_empty()
    }
}

/// Carries a connection to its end; `tell` is told as the app's SETTINGS have come.
async fn carry(
    addr: SocketAddr,
    mut connection: h2::client::Connection<TokioIo<AppIo>, Bytes>,
    load: Rc<Load>,
    tell: oneshot::Sender<Result<(), h2::Error>>,
) {
    let mut tell = Some(tell);
    let ended = poll_fn(|cx| {
        let ended = Pin::new(&mut connection).poll(cx);
        let allowed = connection.max_concurrent_send_streams();
        if allowed != UNTOLD && (load.allowed.replace(allowed) != allowed || tell.is_some()) {
            if let Some(tell) = tell.take() {
                let _nobody_waits = tell.send(Ok(()));
            }
            load.news.tell();
        }
        ended
    });
    let ended = ended.await;
    load.ended_at.set(load.news.begun.get());
    if load.has_served.get() {
        load.news.tell();
    } else {
        load.news.fail();
    }
    let Err(error) = ended else { return };
    debug!(%addr, error = %error, "app connection ended");
    if let Some(tell) = tell {
        let _nobody_waits = tell.send(Err(error));
    }
}

//! What a caller's connection is doing, so that slow and idle ones are ended.
//!
//! One watchman per worker looks at all connections; each is woken only when it has to end or may rest.
//!
//! A connection rests between two requests: hyper's state and its buffers, 16 KiB, are given back until bytes come. It
//! may only if no request and no upload is under way, no byte of a head has come and everything written has left.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::net::TcpStream;

use super::io::AppIo;
use super::{Dial, Limits};

/// Values of [`Activity::end`].
const SLOW: u8 = 1;
const QUIET: u8 = 2;
const IDLE: u8 = 3;
const CUT: u8 = 4;
/// Longest round of the watchman: a connection rests after one to two of them without a request.
const ROUND: Duration = Duration::from_millis(250);
/// Connections that are gone are taken out of the list from this length on.
const PURGE_MIN: usize = 64;

/// What the watchman sees and says of one connection. Atomic only because hyper's upgrades ask for `Send`.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    requests: AtomicU32,
    /// Bytes came while no request was under way.
    head_began: AtomicBool,
    is_http2: AtomicBool,
    /// Bytes were given to the connection and it has not said that they left.
    unflushed: AtomicBool,
    /// Holds no state of hyper's.
    rests: AtomicBool,
    /// An [`End`], once it is decided.
    end: AtomicU8,
    waker: AtomicWaker,
    /// Rounds in a row in which a head was not whole, and in which nothing was under way.
    slow_rounds: AtomicU32,
    idle_rounds: AtomicU32,
}

impl Activity {
    fn end(&self) -> Option<End> {
        match self.end.load(Ordering::Relaxed) {
            SLOW => Some(End::Slow),
            QUIET => Some(End::Quiet),
            CUT => Some(End::Cut),
            IDLE => {
                self.end.store(0, Ordering::Relaxed);
                self.is_at_rest().then_some(End::Idle)
            }
            _ => None,
        }
    }

    fn is_at_rest(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0
            && !self.head_began.load(Ordering::Relaxed)
            && !self.unflushed.load(Ordering::Relaxed)
    }

    /// Waits until bytes come from the caller; false if the connection should end instead.
    pub(crate) async fn rest(&self, stream: &TcpStream) -> bool {
        self.rests.store(true, Ordering::Relaxed);
        let readable = self.unless_ended(pin!(stream.readable())).await;
        self.rests.store(false, Ordering::Relaxed);
        matches!(readable, Ok(Ok(())))
    }

    /// Has the connection reset, whatever is under way.
    pub(crate) fn cut(&self) {
        self.tell(CUT);
    }

    fn tell(&self, end: u8) {
        self.end.store(end, Ordering::Relaxed);
        self.waker.wake();
    }

    /// Runs `served` until it is over or the watchman says how it should end.
    pub(crate) async fn unless_ended<F: Future>(&self, mut served: Pin<&mut F>) -> Result<F::Output, End> {
        poll_fn(|cx| {
            if let Some(end) = self.end() {
                return Poll::Ready(Err(end));
            }
            self.waker.register(cx.waker());
            served.as_mut().poll(cx).map(Ok)
        })
        .await
    }
}

/// Counts a request as under way.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Activity>);

impl Busy {
    pub(crate) fn new(activity: &Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Ordering::Relaxed);
        activity.head_began.store(false, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The caller's connection; notes that bytes came.
pub(crate) struct Watched {
    io: AppIo,
    activity: Arc<Activity>,
}

impl Watched {
    /// Wraps a connection.
    pub(crate) fn new(stream: TcpStream, activity: &Arc<Activity>) -> Self {
        Self { io: AppIo::new(stream), activity: Arc::clone(activity) }
    }

    /// Returns the connection.
    pub(crate) fn into_inner(self) -> TcpStream {
        self.io.into_inner()
    }

    /// Returns the connection, to wait on it.
    pub(crate) fn stream(&self) -> &TcpStream {
        self.io.stream()
    }
}

impl hyper::rt::Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if polled.is_ready() && self.activity.requests.load(Ordering::Relaxed) == 0 {
            self.activity.head_began.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl hyper::rt::Write for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        self.activity.unflushed.store(true, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        // hyper flushes once its own buffer is empty.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if let Poll::Ready(Ok(())) = flushed {
            self.activity.unflushed.store(false, Ordering::Relaxed);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        self.activity.unflushed.store(true, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    Http2,
}

/// Why a connection should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// A head is not whole in time: close at once.
    Slow,
    /// The agent drains, or nothing came for long: finish what is under way.
    Quiet,
    /// Nothing is under way: the connection may rest.
    Idle,
    /// A fault: reset at once.
    Cut,
}

/// Looks after the callers' connections of one worker.
#[derive(Debug, Default)]
pub(crate) struct Watchman {
    connections: RefCell<Vec<Weak<Activity>>>,
    /// From this many on those that are gone are taken out.
    purge_at: Cell<usize>,
    is_awake: Cell<bool>,
    is_draining: Cell<bool>,
}

impl Watchman {
    /// Begins to look after a connection.
    pub(crate) fn add<D: Dial>(self: &Rc<Self>, worker: &Rc<D>, speaks: Speaks) -> Arc<Activity> {
        let activity = Arc::<Activity>::default();
        activity.is_http2.store(speaks == Speaks::Http2, Ordering::Relaxed);
        if self.is_draining.get() || worker.stopping() {
            activity.tell(QUIET);
        }
        let mut connections = self.connections.borrow_mut();
        if connections.len() >= self.purge_at.get() {
            connections.retain(|connection| connection.strong_count() > 0);
            self.purge_at.set(connections.len().saturating_mul(2).max(PURGE_MIN));
        }
        connections.push(Arc::downgrade(&activity));
        if !self.is_awake.replace(true) {
            worker.spawn_untracked(Rc::clone(self).walk(Rc::clone(worker)));
        }
        activity
    }

    /// Counts the connections that rest.
    #[cfg(test)]
    pub(crate) fn resting(&self) -> usize {
        let connections = self.connections.borrow();
        connections.iter().filter_map(Weak::upgrade).filter(|one| one.rests.load(Ordering::Relaxed)).count()
    }

    /// Ends every connection after its current requests.
    pub(crate) fn drain(&self) {
        self.is_draining.set(true);
        for connection in self.connections.borrow().iter().filter_map(Weak::upgrade) {
            connection.tell(QUIET);
        }
    }

    /// Walks round until no connection is left.
    async fn walk<D: Dial>(self: Rc<Self>, worker: Rc<D>) {
        let limits = worker.http().limits;
        let round = ROUND.min(limits.head / 2);
        while self.is_awake.get() {
            tokio::time::sleep(round).await;
            let mut connections = self.connections.borrow_mut();
            connections.retain(|connection| match connection.upgrade() {
                Some(connection) => {
                    judge(&connection, round, &limits);
                    true
                }
                None => false,
            });
            self.is_awake.set(!connections.is_empty());
        }
    }
}

/// Looks at one connection, once per round.
fn judge(connection: &Activity, round: Duration, limits: &Limits) {
    let busy = connection.requests.load(Ordering::Relaxed) > 0;
    let is_http1 = !connection.is_http2.load(Ordering::Relaxed);
    let began = is_http1 && connection.head_began.load(Ordering::Relaxed);
    let count = |rounds: &AtomicU32, goes_on: bool| {
        let rounds_before = rounds.load(Ordering::Relaxed);
        let now = if goes_on { rounds_before.saturating_add(1) } else { 0 };
        rounds.store(now, Ordering::Relaxed);
        now
    };
    let slow = count(&connection.slow_rounds, !busy && began);
    let quiet = count(&connection.idle_rounds, !busy);
    // Seen unfinished in n rounds: for at least n - 1 of them, and for less than n + 1.
    if slow >= 2 && round.saturating_mul(slow) >= limits.head {
        connection.tell(SLOW);
    } else if round.saturating_mul(quiet) >= limits.idle {
        connection.tell(QUIET);
    } else if quiet >= 2 && is_http1 && !connection.rests.load(Ordering::Relaxed) && connection.is_at_rest() {
        connection.tell(IDLE);
    }
}

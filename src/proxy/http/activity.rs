//! What a caller's connection is doing, so that slow and idle ones are ended.
//!
//! One watchman per worker looks at all connections; each is woken only when it has to end or may rest.
//!
//! A connection rests between two requests: hyper's state and its buffers, 16 KiB, are given back until bytes come. It
//! may only if no request and no upload is under way, no byte of a head has come and everything written has left.
//! The allocator gives them back to the system only when it is called again: the watchman calls it.
//!
//! An interim answer (1xx) goes out between two writes of hyper's, which knows of none: nothing of the final answer is
//! written while one is awaited, and one that comes while earlier bytes still leave is left out.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::task::AtomicWaker;
use hyper::rt::{Read as _, Write as _};
use prometheus::IntCounterVec;
use tokio::net::TcpStream;
use tracing::debug;

use super::super::app_socket::poll_recv;
use super::gate::{Gate, Stop};
use super::io::AppIo;
use super::{Dial, Limits};

/// Values of [`Activity::end`].
const SLOW: u8 = 1;
const QUIET: u8 = 2;
const IDLE: u8 = 3;
const CUT: u8 = 4;
/// Longest round of the watchman: a connection rests after one to two of them without a request.
const ROUND: Duration = Duration::from_millis(250);
/// How long after a connection came to rest, or ended, the allocator is still called: mimalloc (3.x, `purge_delay`) gives
/// free pages back once they have been free for 1 s, and only when a page is taken or freed.
const GIVE_BACK: Duration = Duration::from_millis(1500);
/// A block that has a page of its own in mimalloc (over 512 KiB). Nothing is written to it, so it takes no memory; where it
/// comes to lie on some that was freed, that stays.
const OWN_PAGE_BYTES: usize = 1024 * 1024;
/// Connections that are gone are taken out of the list from this length on.
const PURGE_MIN: usize = 64;
/// Bytes of interim answers that wait to be sent; what is more is left out.
const INTERIM_BYTES_MAX: usize = 16 * 1024;
/// What is read at once to be looked at: hyper asks for no more.
const LOOK_BYTES: usize = 64 * 1024;

thread_local! {
    /// Where bytes are looked at; nothing stays in it.
    static LOOKED_AT: RefCell<Vec<u8>> = RefCell::new(vec![0; LOOK_BYTES]);
}

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
    /// Interim answers on their way to the caller.
    interim: Mutex<BytesMut>,
    has_interim: AtomicBool,
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

    /// Has an interim answer, as it goes on the wire, sent before anything else.
    pub(crate) fn send_interim(&self, head: &[u8]) {
        if self.is_http2.load(Ordering::Relaxed) || self.unflushed.load(Ordering::Relaxed) {
            return;
        }
        let mut interim = self.interim.lock().unwrap_or_else(PoisonError::into_inner);
        if interim.len().saturating_add(head.len()) <= INTERIM_BYTES_MAX {
            interim.extend_from_slice(head);
            self.has_interim.store(true, Ordering::Relaxed);
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

    /// A cut is not taken back: what ends a connection more gently comes too late for it. One that is to end does not rest.
    fn tell(&self, end: u8) {
        let told = self.end.load(Ordering::Relaxed);
        if told != CUT && (end != IDLE || told == 0) {
            self.end.store(end, Ordering::Relaxed);
        }
        self.waker.wake();
    }

    /// Runs `served` until it is over, or has to be cut.
    ///
    /// For what ends by itself after a word of the watchman's: that word is not said again.
    pub(crate) async fn unless_cut<F: Future>(&self, mut served: Pin<&mut F>) -> Result<F::Output, Cut> {
        poll_fn(|cx| {
            if self.end.load(Ordering::Relaxed) == CUT {
                return Poll::Ready(Err(Cut));
            }
            self.waker.register(cx.waker());
            served.as_mut().poll(cx).map(Ok)
        })
        .await
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

/// The caller's connection; notes that bytes came, and looks at them where they are HTTP/1.1.
pub(crate) struct Watched {
    io: AppIo,
    activity: Arc<Activity>,
    /// None: HTTP/2, which frames by itself.
    gate: Option<Gate>,
    malformed: IntCounterVec,
    /// What is left of an interim answer.
    sending: BytesMut,
}

impl Watched {
    /// Wraps a connection; requests whose framing is in doubt are counted in `malformed`.
    pub(crate) fn new(stream: TcpStream, activity: &Arc<Activity>, speaks: Speaks, malformed: &IntCounterVec) -> Self {
        Self {
            io: AppIo::new(stream),
            activity: Arc::clone(activity),
            gate: (speaks == Speaks::Http1).then(Gate::default),
            malformed: malformed.clone(),
            sending: BytesMut::new(),
        }
    }

    /// Reads what the gate lets pass; from a doubt on, nothing.
    fn read_through(
        &mut self,
        cx: &mut Context<'_>,
        mut buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let Self { io, gate: Some(gate), malformed, .. } = self else {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        };
        if gate.is_stopped() {
            return Poll::Ready(Ok(()));
        }
        LOOKED_AT.with_borrow_mut(|room| {
            let most = buf.remaining().min(room.len());
            let room = room.get_mut(..most).unwrap_or_default();
            let count = ready!(poll_recv(io.stream(), cx, room))?;
            let read = room.get(..count).unwrap_or_default();
            match gate.look(read) {
                Ok(()) => buf.put_slice(read),
                Err(Stop { at, doubt, in_head }) => {
                    malformed.with_label_values(&[doubt.as_str()]).inc();
                    debug!(?doubt, "a request is refused: it is in doubt where it ends");
                    buf.put_slice(read.get(..at).unwrap_or_default());
                    if in_head {
                        // Of at least one byte, so there is room. No head may hold it: hyper answers 400 and closes.
                        buf.put_slice(&[0]);
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }

    /// Sends what interim answers there are.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.activity.has_interim.load(Ordering::Relaxed) {
            self.activity.has_interim.store(false, Ordering::Relaxed);
            let mut interim = self.activity.interim.lock().unwrap_or_else(PoisonError::into_inner);
            self.sending.unsplit(interim.split());
        }
        while !self.sending.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &self.sending))?;
            if count == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.sending.advance(count);
        }
        Poll::Ready(Ok(()))
    }

    /// Returns the connection, to wait on it.
    pub(crate) fn stream(&self) -> &TcpStream {
        self.io.stream()
    }
}

impl From<Watched> for TcpStream {
    fn from(watched: Watched) -> Self {
        watched.io.into()
    }
}

impl hyper::rt::Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let polled = self.read_through(cx, buf);
        if polled.is_ready() && self.activity.requests.load(Ordering::Relaxed) == 0 {
            self.activity.head_began.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl hyper::rt::Write for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        self.activity.unflushed.store(true, Ordering::Relaxed);
        ready!(self.poll_interim(cx))?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        ready!(self.poll_interim(cx))?;
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
        ready!(self.poll_interim(cx))?;
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

/// A connection is to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut;

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
    /// For how long the allocator is still called.
    giving_back: Cell<Duration>,
    /// How often it was.
    #[cfg(test)]
    given_back: Cell<u32>,
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
            let before = connections.len();
            connections.retain(|connection| connection.strong_count() > 0);
            if connections.len() < before {
                self.giving_back.set(GIVE_BACK);
            }
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

    #[cfg(test)]
    pub(crate) fn is_awake(&self) -> bool {
        self.is_awake.get()
    }

    /// Counts the rounds in which the allocator was called.
    #[cfg(test)]
    pub(crate) fn given_back(&self) -> u32 {
        self.given_back.get()
    }

    /// Has what connections held given back to the system, for some time after the last of them let go of it.
    fn give_back(&self, round: Duration) {
        let left = self.giving_back.get();
        if left.is_zero() {
            return;
        }
        self.giving_back.set(left.saturating_sub(round));
        drop(std::hint::black_box(Vec::<u8>::with_capacity(OWN_PAGE_BYTES)));
        #[cfg(test)]
        self.given_back.set(self.given_back.get() + 1);
    }

    /// Walks round until no connection is left and what they held is given back.
    async fn walk<D: Dial>(self: Rc<Self>, worker: Rc<D>) {
        let limits = worker.http().limits;
        let round = ROUND.min(limits.head / 2);
        while self.is_awake.get() {
            tokio::time::sleep(round).await;
            self.give_back(round);
            let mut connections = self.connections.borrow_mut();
            connections.retain(|connection| {
                let lets_go = connection.upgrade().is_none_or(|connection| judge(&connection, round, &limits));
                if lets_go {
                    self.giving_back.set(GIVE_BACK);
                }
                connection.strong_count() > 0
            });
            self.is_awake.set(!connections.is_empty() || !self.giving_back.get().is_zero());
        }
    }
}

/// Looks at one connection, once per round; true if it is to rest from now on.
fn judge(connection: &Activity, round: Duration, limits: &Limits) -> bool {
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
        return true;
    }
    false
}

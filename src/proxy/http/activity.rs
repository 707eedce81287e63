//! What a caller's connection is doing, so that slow and idle ones are ended.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::Dial;

/// What the connection's watchman sees. Atomic only because hyper's upgrades ask for `Send`.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    requests: AtomicU32,
    /// Bytes came while no request was under way.
    head_began: AtomicBool,
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
    io: TokioIo<TcpStream>,
    activity: Arc<Activity>,
}

impl Watched {
    /// Wraps a connection.
    pub(crate) fn new(stream: TcpStream, activity: &Arc<Activity>) -> Self {
        Self { io: TokioIo::new(stream), activity: Arc::clone(activity) }
    }

    /// Returns the connection.
    pub(crate) fn into_inner(self) -> TcpStream {
        self.io.into_inner()
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
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
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
}

/// Returns when the connection should end.
pub(crate) async fn watch<D: Dial>(worker: &D, activity: &Activity, speaks: Speaks) -> End {
    let state = worker.http();
    // A head that is seen unfinished at two ticks took more than half of the limit and at most the whole of it.
    let tick = state.limits.head / 2;
    let (mut slow, mut idle) = (0_u32, Duration::ZERO);
    loop {
        tokio::select! {
            () = state.drain.cancelled() => return End::Quiet,
            () = tokio::time::sleep(tick) => {}
        }
        if worker.stopping() {
            return End::Quiet;
        }
        let busy = activity.requests.load(Ordering::Relaxed) > 0;
        let began = speaks == Speaks::Http1 && activity.head_began.load(Ordering::Relaxed);
        slow = if !busy && began { slow.saturating_add(1) } else { 0 };
        idle = if busy { Duration::ZERO } else { idle.saturating_add(tick) };
        if slow >= 2 {
            return End::Slow;
        }
        if idle >= state.limits.idle {
            return End::Quiet;
        }
    }
}

//! An app's TCP connection under hyper: a small message goes out by one `send`, not by a `writev`.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use super::interims::Interims;

/// Pieces up to this size together are copied into one: the copy costs less than the kernel's walk through a vector.
const JOIN_BYTES_MAX: usize = 4096;
/// Bytes of an answer's beginning that are read at once: more than that is worth another read.
const BEGINNING_BYTES_MAX: usize = 16 << 10;

thread_local! {
    /// Where pieces are joined; nothing stays in it.
    static JOINED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(JOIN_BYTES_MAX));
}

/// A connection of an app or to an app.
#[derive(Debug)]
pub(crate) struct AppIo {
    io: TokioIo<TcpStream>,
    /// Where an app's interim answers are heard.
    interims: Option<Arc<Interims>>,
}

impl AppIo {
    /// Wraps a connection.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { io: TokioIo::new(stream), interims: None }
    }

    /// The same, of an app whose interim answers are heard.
    pub(super) fn heard_by(self, interims: Arc<Interims>) -> Self {
        Self { interims: Some(interims), ..self }
    }

    fn note_sent(&self) {
        if let Some(interims) = &self.interims {
            interims.sent();
        }
    }

    /// Returns the connection, to wait on it.
    pub(crate) fn stream(&self) -> &TcpStream {
        self.io.inner()
    }

    /// Returns the connection, to read from it.
    pub(crate) fn stream_mut(&mut self) -> &mut TcpStream {
        self.io.inner_mut()
    }
}

impl From<AppIo> for TcpStream {
    fn from(io: AppIo) -> Self {
        io.io.into_inner()
    }
}

impl hyper::rt::Read for AppIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match this.interims.as_ref().filter(|interims| interims.is_expected()) {
            Some(interims) => read_beginning(this.io.inner_mut(), interims, cx, buf),
            None => Pin::new(&mut this.io).poll_read(cx, buf),
        }
    }
}

/// Reads an answer's beginning by way of a buffer of our own: what is in hyper's cannot be looked at.
// Apart, for its buffer is on the stack.
#[inline(never)]
fn read_beginning(
    stream: &mut TcpStream,
    interims: &Interims,
    cx: &mut Context<'_>,
    mut buf: hyper::rt::ReadBufCursor<'_>,
) -> Poll<io::Result<()>> {
    let mut beginning = [MaybeUninit::uninit(); BEGINNING_BYTES_MAX];
    let room = beginning.len().min(buf.remaining());
    let mut read = ReadBuf::uninit(beginning.get_mut(..room).unwrap_or_default());
    ready!(Pin::new(stream).poll_read(cx, &mut read))?;
    if !read.filled().is_empty() {
        interims.see(read.filled());
        buf.put_slice(read.filled());
    }
    Poll::Ready(Ok(()))
}

impl hyper::rt::Write for AppIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.note_sent();
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.note_sent();
        let bytes = bufs.iter().fold(0_usize, |sum, buf| sum.saturating_add(buf.len()));
        if bytes > JOIN_BYTES_MAX {
            return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        }
        JOINED.with_borrow_mut(|joined| {
            joined.clear();
            for buf in bufs {
                joined.extend_from_slice(buf);
            }
            Pin::new(&mut self.io).poll_write(cx, joined)
        })
    }
}

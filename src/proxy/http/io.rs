//! An app's TCP connection under hyper: a small message goes out by one `send`, not by a `writev`.
//! How it is read and written: `app_socket`.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::super::app_socket::{poll_recv, poll_send};
use super::interims::Interims;

/// Pieces up to this size together are copied into one: the copy costs less than the kernel's walk through a vector.
const JOIN_BYTES_MAX: usize = 4096;
/// Bytes of an answer's beginning that are read at once: more than that is worth another read.
const BEGINNING_BYTES_MAX: usize = 16 << 10;

thread_local! {
    /// Where pieces are joined; nothing stays in it.
    static JOINED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(JOIN_BYTES_MAX));
    /// Where an answer's beginning is looked at; nothing stays in it.
    static BEGINNING: RefCell<Vec<u8>> = RefCell::new(vec![0; BEGINNING_BYTES_MAX]);
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
            Some(interims) => read_beginning(this.io.inner(), interims, cx, buf),
            None => Pin::new(&mut this.io).poll_read(cx, buf),
        }
    }
}

/// Reads an answer's beginning by way of a buffer of our own: what is in hyper's cannot be looked at.
fn read_beginning(
    stream: &TcpStream,
    interims: &Interims,
    cx: &mut Context<'_>,
    mut buf: hyper::rt::ReadBufCursor<'_>,
) -> Poll<io::Result<()>> {
    BEGINNING.with_borrow_mut(|beginning| {
        let most = beginning.len().min(buf.remaining());
        let room = beginning.get_mut(..most).unwrap_or_default();
        let count = ready!(poll_recv(stream, cx, room))?;
        let read = room.get(..count).unwrap_or_default();
        if !read.is_empty() {
            interims.see(read);
            buf.put_slice(read);
        }
        Poll::Ready(Ok(()))
    })
}

impl hyper::rt::Write for AppIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.note_sent();
        poll_send(self.stream(), cx, buf)
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
            poll_send(self.stream(), cx, joined)
        })
    }
}

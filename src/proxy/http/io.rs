//! An app's TCP connection under hyper: a small message goes out by one `send`, not by a `writev`.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Pieces up to this size together are copied into one: the copy costs less than the kernel's walk through a vector.
const JOIN_BYTES_MAX: usize = 4096;

thread_local! {
    /// Where pieces are joined; nothing stays in it.
    static JOINED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(JOIN_BYTES_MAX));
}

/// A connection of an app or to an app.
#[derive(Debug)]
pub(crate) struct AppIo(TokioIo<TcpStream>);

impl AppIo {
    /// Wraps a connection.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(TokioIo::new(stream))
    }

    /// Returns the connection, to wait on it.
    pub(crate) fn stream(&self) -> &TcpStream {
        self.0.inner()
    }

    /// Returns the connection, to read from it.
    pub(crate) fn stream_mut(&mut self) -> &mut TcpStream {
        self.0.inner_mut()
    }
}

impl From<AppIo> for TcpStream {
    fn from(io: AppIo) -> Self {
        io.0.into_inner()
    }
}

impl hyper::rt::Read for AppIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for AppIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = bufs.iter().fold(0_usize, |sum, buf| sum.saturating_add(buf.len()));
        if bytes > JOIN_BYTES_MAX {
            return Pin::new(&mut self.0).poll_write_vectored(cx, bufs);
        }
        JOINED.with_borrow_mut(|joined| {
            joined.clear();
            for buf in bufs {
                joined.extend_from_slice(buf);
            }
            Pin::new(&mut self.0).poll_write(cx, joined)
        })
    }
}

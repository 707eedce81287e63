//! Reads and writes of apps' TCP sockets.
//!
//! A read of HTTP, or a write, that moves less than it could says that there is no more, until a new edge (epoll(7),
//! `EPOLLET`): readiness is cleared by it, and not by another call that finds nothing. What the other side has closed stays
//! noted. A read of bytes ends before an urgent one too (tcp(7)), with more behind it and no edge to come: readiness is cleared
//! by a read that finds nothing alone.
//!
//! The calls go to the kernel past the C library: there they are cancellation points of threads, which costs two atomic
//! operations each that no thread of ours needs. Readiness is tokio's.
//! Not here: what is carried (`relay`, `http/io`), who closes.

use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use rustix::buffer::spare_capacity;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What comes after the bytes of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Nothing is known: they leave at once.
    Unknown,
    /// The stream's end, at once: the kernel holds their last segment, so that it carries the FIN (`MSG_MORE`, tcp(7)).
    End,
}

impl Then {
    fn flags(self) -> SendFlags {
        match self {
            Self::Unknown => SendFlags::NOSIGNAL,
            Self::End => SendFlags::NOSIGNAL | SendFlags::MORE,
        }
    }
}

/// Reads what has come of HTTP into `room`, which is not empty; its bytes are counted, none at the stream's end.
///
/// # Cancel safety
/// Nothing is read unless it is returned.
pub(super) fn poll_recv(stream: &TcpStream, cx: &mut Context<'_>, room: &mut [u8]) -> Poll<io::Result<usize>> {
    let most = room.len();
    loop {
        ready!(stream.poll_read_ready(cx))?;
        let some = try_some(stream, Interest::READABLE, most, || {
            let (_read, count) = recv(stream, &mut *room, RecvFlags::empty())?;
            Ok(count)
        });
        if let Some(some) = some {
            return Poll::Ready(some);
        }
    }
}

/// Reads what has come into the room that `buffer` has left, at least a byte; none: nothing has come. 0 at the stream's end.
pub(super) fn try_recv(stream: &TcpStream, buffer: &mut Vec<u8>) -> Option<io::Result<usize>> {
    // As if it were always whole: see the head of this file.
    try_some(stream, Interest::READABLE, 0, || {
        let (count, _whole) = recv(stream, spare_capacity(buffer), RecvFlags::empty())?;
        Ok(count)
    })
}

/// Writes as much of `bytes` as the kernel takes.
///
/// # Cancel safety
/// Nothing is written unless it is counted in the answer.
pub(super) fn poll_send(stream: &TcpStream, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_write_ready(cx))?;
        if let Some(some) = try_send(stream, bytes, Then::Unknown) {
            return Poll::Ready(some);
        }
    }
}

/// Writes as much of `bytes` as the kernel takes; none: it takes nothing now.
pub(super) fn try_send(stream: &TcpStream, bytes: &[u8], then: Then) -> Option<io::Result<usize>> {
    try_some(stream, Interest::WRITABLE, bytes.len(), || Ok(send(stream, bytes, then.flags())?))
}

/// The same of `slices`, `bytes` together.
pub(super) fn try_send_slices(
    stream: &TcpStream,
    slices: &[IoSlice<'_>],
    bytes: usize,
    then: Then,
) -> Option<io::Result<usize>> {
    try_some(stream, Interest::WRITABLE, bytes, || {
        Ok(sendmsg(stream, slices, &mut SendAncillaryBuffer::default(), then.flags())?)
    })
}

/// Does what moves `most` bytes at once; none: not now.
fn try_some(
    stream: &TcpStream,
    interest: Interest,
    most: usize,
    mut moves: impl FnMut() -> io::Result<usize>,
) -> Option<io::Result<usize>> {
    let mut moved = None;
    let tried = stream.try_io(interest, || {
        let count = moves()?;
        if 0 < count && count < most {
            moved = Some(count);
            // Clears the readiness.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    match (moved, tried) {
        (Some(count), _) => Some(Ok(count)),
        (None, Err(error)) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
        (None, tried) => Some(tried),
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn each_byte_is_read_though_no_read_is_made_that_finds_nothing() {
        let (mut app, stream) = pair().await;
        let mut room = [0; 8];
        for turn in 0..100_u8 {
            app.write_all(&[turn; 3]).await.unwrap();
            let (mut read, most) = (Vec::<u8>::new(), 2 + usize::from(turn % 3));
            while read.len() < 3 {
                let count = poll_fn(|cx| poll_recv(&stream, cx, &mut room[..most])).await.unwrap();
                read.extend(&room[..count]);
            }
            assert_eq!(read, [turn; 3]);
            let is_ready = futures_util::FutureExt::now_or_never(stream.readable()).is_some();
            assert!(!is_ready || most < 4, "a read of {most} that brought 3 has drained it");
        }
        // The end is an edge of its own, and stays: it was seen with the last bytes or after them.
        app.write_all(b"!").await.unwrap();
        drop(app);
        for count in [1, 0] {
            assert_eq!(poll_fn(|cx| poll_recv(&stream, cx, &mut room)).await.unwrap(), count);
        }
    }

    #[tokio::test]
    async fn what_is_held_for_the_end_leaves_with_it() {
        let (mut app, stream) = pair().await;
        stream.set_nodelay(true).unwrap();
        stream.writable().await.unwrap();
        assert_eq!(try_send(&stream, b"al", Then::End).unwrap().unwrap(), 2);
        let slices = [IoSlice::new(b"l "), IoSlice::new(b"of it")];
        assert_eq!(try_send_slices(&stream, &slices, 7, Then::End).unwrap().unwrap(), 7);
        // On this host what is sent has come when the call returns.
        let come = socket2::SockRef::from(&app).peek(&mut [std::mem::MaybeUninit::uninit(); 16]);
        assert_eq!(come.unwrap_err().kind(), io::ErrorKind::WouldBlock, "not before the end");
        socket2::SockRef::from(&stream).shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = Vec::new();
        app.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"all of it");
    }
}

//! Carries one TCP connection over one QUIC stream.
//!
//! ```text
//!   app ==TCP==> up:   readable -> allocate -> try_read -> write_chunk ==QUIC==>
//!   app <==TCP== down: writev <- read_chunks                           <==QUIC==
//! ```
//!
//! | one side       | the other side                                                       |
//! |----------------|----------------------------------------------------------------------|
//! | FIN            | `finish()`, and back; the other direction goes on                    |
//! | RST            | RESET_STREAM and STOP_SENDING                                        |
//! | RESET_STREAM   | nothing more is written; RST once the other direction has ended      |
//! | STOP_SENDING   | nothing more is read; RST once the other direction has ended         |
//! | lost tunnel    | RST                                                                  |
//!
//! Invariants: bytes arrive whole and in order, or the receiver sees a reset: a cut-off transfer never looks complete,
//! even when the relay is dropped half-way; an idle connection holds no buffer.
//! Not here: who may connect (`inbound`), where to (`worker`).

use std::cell::Cell;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::app_socket::{self, Then};
use crate::clock;

/// First buffer of a direction: most requests fit.
const BUFFER_BYTES_MIN: usize = 16 << 10;
/// Largest buffer of a direction: 1.2x on bulk, and small transfers never get there (measured).
const BUFFER_BYTES_MAX: usize = 256 << 10;
/// Chunks (one per packet) that are taken from the stream for one `writev`, at first.
const CHUNKS_MIN: usize = 4;
/// Most of them. Each `writev` is a pass through TCP and wakes the app, and of a bulk transfer some hundred packets are there
/// at a time. The list of so many takes 4 KiB, which a connection keeps until it carries little.
const CHUNKS_MAX: usize = 128;
/// Silence in both directions after which a connection is reset, unless the service's resolver says otherwise.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_hours(1);
/// Application code of RESET_STREAM and STOP_SENDING: the TCP connection was reset.
pub(crate) const CODE_RESET: VarInt = VarInt::from_u32(1);

/// How a relayed connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// FIN both ways.
    Clean,
    /// One of the apps or tunnels reset it.
    Reset,
    /// Nothing moved for the idle timeout.
    Idle,
}

impl Ending {
    /// Returns the label `response_flags` (Envoy's letters).
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Clean => "-",
            Self::Reset => "UR",
            Self::Idle => "SI",
        }
    }
}

/// Bytes of both directions, as they move. `up` runs from the TCP side into the stream.
pub(crate) trait Count {
    /// TCP to QUIC.
    fn up(&self, bytes: u64);
    /// QUIC to TCP.
    fn down(&self, bytes: u64);
}

/// A TCP connection that ends in RST unless [`Tcp::close`] says that all is well.
pub(crate) struct Tcp {
    /// None: it was handed on, or closed with FIN.
    stream: Option<TcpStream>,
}

impl Tcp {
    /// Takes the connection over.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream: Some(stream) }
    }

    /// Hands the connection on.
    pub(crate) fn hand_on(mut self) -> Option<TcpStream> {
        self.stream.take()
    }

    /// Closes with FIN.
    fn close(mut self) {
        drop(self.stream.take());
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            // With SO_LINGER 0, close sends an RST (tcp(7)); a socket that is gone needs none.
            let _gone = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// A sending half that is reset on drop: quinn alone would finish it, and a cut-off transfer would look complete.
pub(crate) struct Sending {
    stream: SendStream,
    is_finished: bool,
}

impl Sending {
    /// Takes the half over.
    pub(crate) fn new(stream: SendStream) -> Self {
        Self { stream, is_finished: false }
    }

    /// Returns the stream, to write a status.
    pub(crate) fn stream(&mut self) -> &mut SendStream {
        &mut self.stream
    }

    /// Says that all bytes were written.
    pub(crate) fn finish(&mut self) {
        self.is_finished = true;
        // A stream that is stopped or lost has no end to announce.
        let _gone = self.stream.finish();
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.is_finished {
            let _gone = self.stream.reset(CODE_RESET);
        }
    }
}

/// What both directions of one connection share.
struct Shared<'a> {
    tcp: &'a TcpStream,
    /// The TCP connection is gone: both directions end.
    tcp_lost: CancellationToken,
    down_ended: CancellationToken,
    moved_at: Cell<Instant>,
}

/// How one direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Finished,
    Aborted,
}

/// Relays until both directions have ended or nothing moved for `idle`.
///
/// # Cancel safety
/// Cancelling resets both sides.
pub(crate) async fn relay(tcp: Tcp, send: Sending, recv: RecvStream, count: &impl Count, idle: Duration) -> Ending {
    let Some(stream) = &tcp.stream else { return Ending::Reset };
    let shared = Shared {
        tcp: stream,
        tcp_lost: CancellationToken::new(),
        down_ended: CancellationToken::new(),
        moved_at: Cell::new(clock::now()),
    };
    let ways = async {
        let down = async {
            let way = down(&shared, recv, count).await;
            if way == Way::Finished {
                // The app may have gone meanwhile; `up` notices that.
                let _gone = socket2::SockRef::from(shared.tcp).shutdown(Shutdown::Write);
            }
            shared.down_ended.cancel();
            way
        };
        futures_util::future::join(up(&shared, send, count), down).await
    };
    let ending = tokio::select! {
        ways = ways => match ways {
            (Way::Finished, Way::Finished) => Ending::Clean,
            _ => Ending::Reset,
        },
        () = silence(&shared.moved_at, idle) => Ending::Idle,
    };
    if ending == Ending::Clean {
        tcp.close();
    }
    ending
}

/// Returns when nothing has moved for `idle`; `moved_at` says when something did.
pub(crate) async fn silence(moved_at: &Cell<Instant>, idle: Duration) {
    loop {
        let until = moved_at.get() + idle;
        if until <= clock::now() {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

/// TCP to QUIC.
async fn up(shared: &Shared<'_>, mut send: Sending, count: &impl Count) -> Way {
    let mut stopped = pin!(send.stream.stopped());
    let mut buffer_bytes = BUFFER_BYTES_MIN;
    loop {
        tokio::select! {
            readable = shared.tcp.readable() => if readable.is_err() { return lost(shared) },
            // The peer reads no more, or the tunnel is gone; `down` says which.
            _ = &mut stopped => return Way::Aborted,
            () = shared.tcp_lost.cancelled() => return Way::Aborted,
        }
        let mut buffer = Vec::with_capacity(buffer_bytes);
        let Some(read) = app_socket::try_recv(shared.tcp, &mut buffer) else { continue };
        match read {
            // The kernel tells of a reset once: where `down` met it first, what is left looks like an end.
            Ok(0) if shared.tcp_lost.is_cancelled() => return Way::Aborted,
            Ok(0) => {
                send.finish();
                let way = after_fin(shared).await;
                if way == Way::Finished {
                    // A tunnel that closes drops what is in flight, and an agent that drains closes it right after this.
                    let _acknowledged = stopped.await;
                }
                return way;
            }
            Ok(bytes) => {
                buffer_bytes = resized(buffer_bytes, bytes, (BUFFER_BYTES_MIN, BUFFER_BYTES_MAX));
                moved(shared, bytes, |bytes| count.up(bytes));
                match write(shared, &mut send.stream, compact(buffer)).await {
                    Ok(()) => {}
                    Err(_stopped_or_lost) => return Way::Aborted,
                }
            }
            Err(_reset) => return lost(shared),
        }
    }
}

/// Writes to the stream, unless the app resets meanwhile.
async fn write(shared: &Shared<'_>, send: &mut SendStream, bytes: Bytes) -> Result<(), WriteError> {
    tokio::select! {
        biased;
        written = send.write_chunk(bytes) => written,
        () = reset(shared.tcp) => {
            shared.tcp_lost.cancel();
            Err(WriteError::ClosedStream)
        }
        () = shared.tcp_lost.cancelled() => Err(WriteError::ClosedStream),
    }
}

/// Waits after the app's FIN: it may still reset while the other direction runs, and only an error event tells.
async fn after_fin(shared: &Shared<'_>) -> Way {
    tokio::select! {
        () = shared.down_ended.cancelled() => Way::Finished,
        () = reset(shared.tcp) => lost(shared),
    }
}

/// Waits until the TCP connection fails.
async fn reset(tcp: &TcpStream) {
    if tcp.ready(Interest::ERROR).await.is_ok_and(|ready| !ready.is_error()) {
        std::future::pending::<()>().await;
    }
}

/// QUIC to TCP.
async fn down(shared: &Shared<'_>, mut recv: RecvStream, count: &impl Count) -> Way {
    let mut chunks = vec![Bytes::new(); CHUNKS_MIN];
    let mut ahead = None;
    loop {
        let read = if let Some(ending) = ahead.take() {
            ending
        } else {
            tokio::select! {
                read = recv.read_chunks(&mut chunks) => read,
                () = shared.tcp_lost.cancelled() => {
                    let _gone = recv.stop(CODE_RESET);
                    return Way::Aborted;
                }
            }
        };
        match read {
            Ok(Some(count_read)) => {
                let more = match chunks.get_mut(count_read..) {
                    None | Some([]) => Next::Unknown,
                    Some(room) => next(&mut recv, room).await,
                };
                let (count_read, then) = match more {
                    Next::Unknown => (count_read, Then::Unknown),
                    Next::Chunks(more) => (count_read + more, Then::Unknown),
                    Next::Ending(ending) => {
                        let then = if ending.is_ok() { Then::End } else { Then::Unknown };
                        ahead = Some(ending.map(|()| None));
                        (count_read, then)
                    }
                };
                let Some(filled) = chunks.get_mut(..count_read) else { continue };
                let bytes = filled.iter().map(Bytes::len).sum();
                if write_all(shared, filled, then).await.is_err() {
                    let _gone = recv.stop(CODE_RESET);
                    return lost(shared);
                }
                moved(shared, bytes, |bytes| count.down(bytes));
                let room = resized(chunks.len(), count_read, (CHUNKS_MIN, CHUNKS_MAX));
                if room != chunks.len() {
                    chunks = vec![Bytes::new(); room];
                }
            }
            Ok(None) => return Way::Finished,
            Err(ReadError::Reset(_)) => return Way::Aborted,
            Err(_lost_tunnel) => {
                shared.tcp_lost.cancel();
                return Way::Aborted;
            }
        }
    }
}

/// What a stream has beyond the chunks that were read.
enum Next {
    /// Nothing has come yet.
    Unknown,
    /// So many chunks more.
    Chunks(usize),
    /// Its end, or how it failed. quinn tells a reset once (0.11.12): the next read would say that the stream ended well.
    Ending(Result<(), ReadError>),
}

/// Looks what has come after all that was read; chunks go into `room`.
async fn next(recv: &mut RecvStream, room: &mut [Bytes]) -> Next {
    poll_fn(|cx| {
        Poll::Ready(match pin!(recv.read_chunks(room)).poll(cx) {
            Poll::Pending => Next::Unknown,
            Poll::Ready(Ok(Some(more))) => Next::Chunks(more),
            Poll::Ready(Ok(None)) => Next::Ending(Ok(())),
            Poll::Ready(Err(error)) => Next::Ending(Err(error)),
        })
    })
    .await
}

/// Writes every byte of `chunks` to the app and empties them.
async fn write_all(shared: &Shared<'_>, chunks: &mut [Bytes], then: Then) -> io::Result<()> {
    while chunks.iter().any(|chunk| !chunk.is_empty()) {
        match try_write(shared.tcp, chunks, then) {
            Some(Ok(mut bytes)) => {
                for chunk in chunks.iter_mut() {
                    let part = bytes.min(chunk.len());
                    chunk.advance(part);
                    bytes -= part;
                }
                shared.moved_at.set(clock::now());
            }
            None => tokio::select! {
                writable = shared.tcp.writable() => writable?,
                () = shared.tcp_lost.cancelled() => return Err(io::ErrorKind::ConnectionReset.into()),
            },
            Some(Err(error)) => return Err(error),
        }
    }
    // An empty slice of a buffer still holds the buffer.
    chunks.fill(Bytes::new());
    Ok(())
}

/// Writes what the socket takes of `chunks` at once. Not in the caller: the slices would live in every idle connection.
fn try_write(tcp: &TcpStream, chunks: &[Bytes], then: Then) -> Option<io::Result<usize>> {
    match chunks {
        [chunk] => app_socket::try_send(tcp, chunk, then),
        few if few.len() <= CHUNKS_MIN => try_write_slices::<CHUNKS_MIN>(tcp, few, then),
        many => try_write_slices::<CHUNKS_MAX>(tcp, many, then),
    }
}

fn try_write_slices<const SLICES: usize>(tcp: &TcpStream, chunks: &[Bytes], then: Then) -> Option<io::Result<usize>> {
    let (mut slices, mut count, mut bytes) = ([io::IoSlice::new(&[]); SLICES], 0, 0);
    for (slice, chunk) in slices.iter_mut().zip(chunks.iter().filter(|chunk| !chunk.is_empty())) {
        *slice = io::IoSlice::new(chunk);
        count += 1;
        bytes += chunk.len();
    }
    app_socket::try_send_slices(tcp, slices.get(..count)?, bytes, then)
}

/// Notes that the TCP connection is gone.
fn lost(shared: &Shared<'_>) -> Way {
    shared.tcp_lost.cancel();
    Way::Aborted
}

fn moved(shared: &Shared<'_>, bytes: usize, count: impl FnOnce(u64)) {
    shared.moved_at.set(clock::now());
    count(u64::try_from(bytes).unwrap_or(u64::MAX));
}

/// Returns the size, in bytes or chunks, of the buffer after one of size `room` that took `read`: grows what was filled,
/// shrinks what was mostly empty.
fn resized(room: usize, read: usize, (min, max): (usize, usize)) -> usize {
    if read >= room {
        (room * 2).min(max)
    } else if read < room / 4 {
        (room / 2).max(min)
    } else {
        room
    }
}

/// Copies a buffer that is mostly empty: quinn keeps what it is given until the peer has it.
fn compact(buffer: Vec<u8>) -> Bytes {
    if buffer.len() < buffer.capacity() / 8 { Bytes::copy_from_slice(&buffer) } else { buffer.into() }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::transport::fixture::pair_with;

    struct Uncounted;

    impl Count for Uncounted {
        fn up(&self, _: u64) {}
        fn down(&self, _: u64) {}
    }

    /// Both ends of a connection on which silence is no sign of anything.
    async fn tunnel() -> ([quinn::Endpoint; 2], quinn::Connection, quinn::Connection) {
        let mut patient = quinn::TransportConfig::default();
        patient.max_idle_timeout(None);
        let pair = pair_with(patient).await;
        (pair.endpoints, pair.dialer, pair.listener)
    }

    #[tokio::test]
    async fn an_hour_of_silence_ends_a_connection_and_each_byte_begins_it_anew() {
        let (_endpoints, near, far) = tunnel().await;
        let ((send, recv), (mut far_send, mut far_recv)) = streams((&near, &far)).await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();

        // From here on an hour is over at once if nothing happens in it.
        tokio::time::pause();
        let talk = async {
            for turn in 0..4 {
                tokio::time::sleep(Duration::from_mins(59)).await;
                if turn % 2 == 0 {
                    app.write_all(b"x").await.unwrap();
                    far_recv.read_exact(&mut [0]).await.unwrap();
                } else {
                    far_send.write_all(b"y").await.unwrap();
                    app.read_exact(&mut [0]).await.unwrap();
                }
            }
            clock::now()
        };
        let relayed = relay(Tcp::new(tcp), Sending::new(send), recv, &Uncounted, IDLE_TIMEOUT);
        let (ending, last) = tokio::join!(relayed, talk);
        assert_eq!(ending, Ending::Idle);
        let silence = clock::now() - last;
        assert!((Duration::from_mins(59)..Duration::from_mins(61)).contains(&silence), "{silence:?}");
        assert_eq!(app.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(far_recv.read(&mut [0]).await.unwrap_err(), ReadError::Reset(CODE_RESET));
    }

    /// A stream of `near`, opened, and its other end.
    async fn streams(
        (near, far): (&quinn::Connection, &quinn::Connection),
    ) -> ((SendStream, RecvStream), (SendStream, RecvStream)) {
        let mut here = near.open_bi().await.unwrap();
        here.0.write_all(b"!").await.unwrap();
        let mut there = far.accept_bi().await.unwrap();
        there.1.read_exact(&mut [0]).await.unwrap();
        (here, there)
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_known_with_its_last_bytes() {
        let (_endpoints, near, far) = tunnel().await;
        let ((_send, mut recv), (mut far_send, _far_recv)) = streams((&near, &far)).await;
        let mut chunks = vec![Bytes::new(); 4];
        far_send.write_all(b"first").await.unwrap();
        assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), Some(1));
        assert!(matches!(next(&mut recv, &mut chunks).await, Next::Unknown));
        // Both leave in one packet: the connection's driver runs after this.
        far_send.write_all(b"last").await.unwrap();
        far_send.finish().unwrap();
        assert_eq!(recv.read_chunks(&mut chunks[..1]).await.unwrap(), Some(1));
        assert_eq!(&chunks[0][..], b"last");
        assert!(matches!(next(&mut recv, &mut chunks).await, Next::Ending(Ok(()))));
    }

    #[tokio::test]
    async fn bytes_whose_tunnel_closed_behind_them_end_in_a_reset() {
        let (_endpoints, near, far) = tunnel().await;
        let ((send, recv), (mut far_send, _far_recv)) = streams((&near, &far)).await;
        far_send.write_all(b"half of it").await.unwrap();
        // What comes after it on another stream has come, so it has as well; then the tunnel goes.
        let (mut other, _) = far.open_bi().await.unwrap();
        other.write_all(b"?").await.unwrap();
        near.accept_bi().await.unwrap().1.read_exact(&mut [0]).await.unwrap();
        far.close(0_u32.into(), b"gone");
        near.closed().await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let ending = relay(Tcp::new(tcp), Sending::new(send), recv, &Uncounted, IDLE_TIMEOUT).await;
        assert_eq!(ending, Ending::Reset);
        let read = app.read_to_end(&mut Vec::new()).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn urgent_bytes_hold_up_none_of_those_behind_them() {
        let (_endpoints, near, far) = tunnel().await;
        let ((send, recv), (_far_send, mut far_recv)) = streams((&near, &far)).await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let app = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let app = socket2::SockRef::from(&app);
        let talk = async {
            assert_eq!(app.send(b".").unwrap(), 1);
            far_recv.read_exact(&mut [0]).await.unwrap();
            // A read ends before the urgent byte, which is no part of the stream (tcp(7)), whatever is behind it. All three have
            // come when the first is read, and raise one edge.
            assert_eq!(app.send(b"before").unwrap(), 6);
            assert_eq!(app.send_out_of_band(b"!").unwrap(), 1);
            assert_eq!(app.send(b"behind").unwrap(), 6);
            let mut read = [0; 12];
            tokio::time::timeout(Duration::from_secs(10), far_recv.read_exact(&mut read)).await.unwrap().unwrap();
            read
        };
        tokio::select! {
            ending = relay(Tcp::new(tcp), Sending::new(send), recv, &Uncounted, IDLE_TIMEOUT) => panic!("{ending:?}"),
            read = talk => assert_eq!(&read, b"beforebehind"),
        }
    }

    #[test]
    fn a_buffer_begins_small_grows_while_it_is_filled_and_shrinks_again() {
        let bounds = (BUFFER_BYTES_MIN, BUFFER_BYTES_MAX);
        let mut bytes = BUFFER_BYTES_MIN;
        for _ in 0..10 {
            bytes = resized(bytes, bytes, bounds);
        }
        assert_eq!(bytes, BUFFER_BYTES_MAX);
        assert_eq!(resized(bytes, bytes / 4, bounds), bytes);
        for _ in 0..10 {
            bytes = resized(bytes, 100, bounds);
        }
        assert_eq!(bytes, BUFFER_BYTES_MIN);
        // What is kept until the peer has it takes no more than it must.
        let mut little = Vec::with_capacity(BUFFER_BYTES_MAX);
        little.extend_from_slice(b"little");
        let little = compact(little);
        assert_eq!((little.len(), little.try_into_mut().unwrap().capacity()), (6, 6));
    }
}

//! The UDP socket under an endpoint: quinn's own, but a read that drained the socket is not followed by one that fails.
//!
//! ```text
//!   epoll edge -> recvmmsg: fewer datagrams than asked for? drained -> readiness is cleared without another recvmmsg
//! ```
//!
//! Invariant: a datagram that comes after the last read raises a new edge (epoll(7), `EPOLLET`), so none is left lying.
//! What the kernel says of earlier datagrams (ICMP) fails no call of the endpoint: it goes to `refusals`.
//! Saves a system call in every wake-up: one in twenty of a loaded agent. Not here: steering (`steer`), buffers (`bind`).

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::refusals::{MeshPort, Refusals};

/// Most bytes that the kernel coalesces into one read: the longest UDP datagram. quinn makes its receive buffer of 32
/// times the packet size times the segments; 64 segments of 6,500 bytes would take 13 MB per socket, and never fill.
const COALESCED_BYTES_MAX: u64 = 65_535;

/// A socket of the mesh port on the current runtime.
#[derive(Debug)]
pub(super) struct MeshSocket {
    io: UdpSocket,
    state: UdpSocketState,
    segments: usize,
    refusals: Refusals,
}

impl MeshSocket {
    /// Takes the socket over; `payload_bytes_max` is what the endpoint accepts in one packet.
    pub(super) fn new(port: MeshPort, payload_bytes_max: u64) -> io::Result<Self> {
        let MeshPort { socket, refusals } = port;
        Refusals::listen(&socket, socket.local_addr()?.is_ipv4())?;
        let state = UdpSocketState::new((&socket).into())?;
        let needed = COALESCED_BYTES_MAX.div_ceil(payload_bytes_max.max(1));
        let segments = usize::try_from(needed).map_or(1, |needed| needed.min(state.gro_segments()));
        Ok(Self { state, io: UdpSocket::from_std(socket)?, segments, refusals })
    }

    /// Takes in what the kernel says of earlier datagrams, for ever: a socket that neither sends nor receives hears of
    /// them too.
    pub(super) async fn hear_refusals(self: Arc<Self>) {
        while self.io.ready(Interest::ERROR).await.is_ok() {
            let _cleared: io::Result<()> = self.io.try_io(Interest::ERROR, || {
                self.refusals.drain(&self.io);
                Err(io::ErrorKind::WouldBlock.into())
            });
        }
    }
}

impl AsyncUdpSocket for MeshSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_io(Interest::WRITABLE, || match self.state.try_send((&self.io).into(), transmit) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                // What became of earlier packets is told in place of sending this one.
                self.refusals.drain(&self.io);
                self.state.send((&self.io).into(), transmit)
            }
            result => result,
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let mut drained = None;
            let read = self.io.try_io(Interest::READABLE, || {
                let datagrams = self.state.recv((&self.io).into(), buffers, meta)?;
                if datagrams < buffers.len().min(meta.len()) {
                    drained = Some(datagrams);
                    // Clears the readiness; what was read stands in `drained`.
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(datagrams)
            });
            if let Some(datagrams) = drained.or(read.ok()) {
                return Poll::Ready(Ok(datagrams));
            }
            // An error of an earlier datagram (ICMP).
            self.refusals.drain(&self.io);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.segments
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

type Waiting = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Waits for room in the socket's send buffer; one per connection, each with its own waker.
struct Writable {
    socket: Arc<MeshSocket>,
    waiting: Option<Waiting>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let socket = &this.socket;
        let waiting = this.waiting.get_or_insert_with(|| {
            let socket = Arc::clone(socket);
            Box::pin(async move { socket.io.writable().await })
        });
        let result = ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        Poll::Ready(result)
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn what_comes_after_a_draining_read_is_read_as_well() {
        let sender = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = MeshSocket::new(socket.into(), 1_472).unwrap();
        let to = socket.local_addr().unwrap();
        for round in 0..100_u8 {
            // Sometimes one, sometimes several between two reads.
            for _ in 0..=round % 3 {
                sender.send_to(&[round], to).unwrap();
            }
            let mut seen = 0;
            while seen <= round % 3 {
                let mut buffers = [[0; 64]; 8];
                let mut slices = buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
                let mut meta = [RecvMeta::default(); 8];
                let datagrams = std::future::poll_fn(|cx| socket.poll_recv(cx, &mut slices, &mut meta));
                let datagrams = datagrams.await.unwrap();
                for (buffer, meta) in buffers.iter().zip(&meta).take(datagrams) {
                    assert_eq!((buffer[0], meta.len % meta.stride), (round, 0));
                    seen += u8::try_from(meta.len / meta.stride).unwrap();
                }
            }
        }
    }

    #[tokio::test]
    async fn a_refused_datagram_fails_no_call_and_is_heard_by_a_socket_that_does_nothing() {
        let held = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let gone = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let refusals = Refusals::default();
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(MeshSocket::new(MeshPort::new(socket, refusals.clone()), 1_472).unwrap());
        let transmit =
            |destination| Transmit { destination, ecn: None, contents: &[7], segment_size: None, src_ip: None };
        // Nobody looks after the socket while this call waits.
        let mut last = None;
        socket.io.writable().await.unwrap();
        socket.try_send(&transmit(gone)).unwrap();
        tokio::select! {
            () = Arc::clone(&socket).hear_refusals() => unreachable!("it hears for ever"),
            heard = refusals.next(&mut last) => assert_eq!(heard, [gone]),
        }
        // The news of an earlier datagram costs no later one.
        socket.try_send(&transmit(gone)).unwrap();
        socket.try_send(&transmit(held.local_addr().unwrap())).unwrap();
        let mut byte = [0];
        held.recv(&mut byte).unwrap();
        assert_eq!((byte, refusals.next(&mut last).await), ([7], vec![gone]));
    }
}

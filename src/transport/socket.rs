//! The UDP socket under an endpoint: quinn's own, but a read that drained the socket is not followed by one that fails.
//!
//! ```text
//!   epoll edge -> recvmmsg: fewer datagrams than asked for? drained -> readiness is cleared without another recvmmsg
//! ```
//!
//! Invariant: a datagram that comes after the last read raises a new edge (epoll(7), `EPOLLET`), so none is left lying.
//! Full batches of one transfer are held until the tasks that are ready have run, and go to the kernel as one: quinn
//! makes batches of 10 segments, the kernel takes 64, and its work is per batch (`Held`). Nothing else is held; nor are jumbo
//! frames, of which two batches do not fit one call: holding is a copy.
//!
//! The registration is for reading alone: one for writing too wakes the thread after every datagram that left (the kernel
//! reports the room that it gave back), a fifth of an idle agent's wake-ups. Who meets a full send buffer registers a second
//! descriptor for as long as it waits (`room`).
//!
//! What the kernel says of earlier datagrams (ICMP) fails no call of the endpoint: it goes to `refusals`.
//! Saves a system call in every wake-up: one in twenty of a loaded agent. Not here: steering (`steer`), buffers (`bind`).

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::refusals::{MeshPort, Refusals};

/// Most bytes that the kernel coalesces into one read: the longest UDP datagram. quinn makes its receive buffer of 32
/// times the packet size times the segments; 64 segments of 8,972 bytes would take 18 MB per socket, and never fill.
const COALESCED_BYTES_MAX: u64 = 65_535;
/// Most bytes of one batch for the kernel: the longest UDP payload over IPv4.
const GSO_BYTES_MAX: usize = 65_507;
/// Batches of so many segments are worth holding: quinn's are 10 long at most, and full only in a bulk transfer. Where a peer
/// takes jumbo frames, batches to all are as long as fit those ([`MeshSocket::max_transmit_segments`]), and that many will do.
const HELD_FROM_SEGMENTS: usize = 8;
/// The most segments that quinn makes a batch of (its `MAX_TRANSMIT_SEGMENTS`).
const QUINN_SEGMENTS: usize = 10;
/// When a full socket is tried again if no descriptor is left to wait with.
const ROOM_RETRY: Duration = Duration::from_millis(5);

/// What one read may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// Datagrams that the kernel coalesced: quinn's buffer takes 2 MB.
    Coalesced,
    /// One datagram, for little traffic: 0.2 MB.
    Single,
}

/// Registers a socket with the current runtime, for `interest` alone.
#[expect(
    deprecated,
    reason = "unsound for types whose descriptor may change or close while registered; std's sockets keep theirs"
)]
pub(super) fn register(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    AsyncFd::with_interest(socket, interest)
}

/// A socket of the mesh port on the current runtime.
#[derive(Debug)]
pub(super) struct MeshSocket {
    io: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    segments: usize,
    /// The longest segment that was sent: batches for the kernel may have as many as fit ([`GSO_BYTES_MAX`]).
    longest: AtomicUsize,
    refusals: Refusals,
    held: Mutex<Held>,
    /// Wakes who sends what is held.
    holds: Notify,
    /// The kernel's send buffer was full; until somebody has seen that it has room.
    is_blocked: AtomicBool,
    /// What the waiting share: a duplicate of the descriptor, registered for writing, made after the buffer was full.
    room: Mutex<Weak<AsyncFd<UdpSocket>>>,
}

/// Batches of one transfer that go to the kernel as one. Empty most of the time.
#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    to: Option<Together>,
}

/// What batches have in common that may go as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Together {
    destination: SocketAddr,
    src_ip: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    segment: usize,
}

impl Together {
    /// None for a single datagram.
    fn of(transmit: &Transmit<'_>) -> Option<Self> {
        let segment = transmit.segment_size?;
        let Transmit { destination, src_ip, ecn, .. } = *transmit;
        (segment > 0).then_some(Self { destination, src_ip, ecn, segment })
    }
}

impl MeshSocket {
    /// Takes the socket over; `payload_bytes_max` is what the endpoint accepts in one packet.
    pub(super) fn new(port: MeshPort, payload_bytes_max: u64, reads: Reads) -> io::Result<Self> {
        let MeshPort { socket, refusals } = port;
        Refusals::listen(&socket, socket.local_addr()?.is_ipv4())?;
        let state = UdpSocketState::new((&socket).into())?;
        let segments = match reads {
            Reads::Coalesced => {
                let needed = COALESCED_BYTES_MAX.div_ceil(payload_bytes_max.max(1));
                usize::try_from(needed).map_or(1, |needed| needed.min(state.gro_segments()))
            }
            Reads::Single => {
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::UdpGroSegment, &false)?;
                1
            }
        };
        Ok(Self {
            state,
            io: register(socket, Interest::READABLE | Interest::ERROR)?,
            segments,
            longest: AtomicUsize::new(0),
            refusals,
            held: Mutex::default(),
            holds: Notify::new(),
            is_blocked: AtomicBool::new(false),
            room: Mutex::default(),
        })
    }

    /// Sends what is held when the tasks that were ready have run, for ever.
    pub(super) async fn send_held(self: Arc<Self>) {
        loop {
            self.holds.notified().await;
            // Another pass over the ready tasks: the connection has more.
            tokio::task::yield_now().await;
            while self.flush(&mut self.lock()).is_err() {
                // The socket is full. Nothing else can fail here.
                self.has_room().await;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is held; the error is `WouldBlock`.
    fn flush(&self, held: &mut Held) -> io::Result<()> {
        let Some(Together { destination, src_ip, ecn, segment }) = held.to else { return Ok(()) };
        let segment_size = Some(segment).filter(|segment| *segment < held.bytes.len());
        self.send(&Transmit { destination, ecn, contents: &held.bytes, segment_size, src_ip })?;
        held.bytes.clear();
        held.to = None;
        Ok(())
    }

    /// Adds `transmit` to what is held, if it may go with it; what cannot stay any longer is sent.
    fn hold(&self, transmit: &Transmit<'_>, held: &mut Held) -> io::Result<bool> {
        let Some(together) = Together::of(transmit) else { return Ok(false) };
        let bytes_max = GSO_BYTES_MAX.min(self.state.max_gso_segments() * together.segment);
        let long = HELD_FROM_SEGMENTS.min(self.max_transmit_segments());
        if bytes_max < 2 * long * together.segment {
            return Ok(false);
        }
        let is_joining = held.to == Some(together);
        let is_whole = transmit.contents.len().is_multiple_of(together.segment);
        let is_long = is_whole && transmit.contents.len() >= long * together.segment;
        if !is_joining && !is_long {
            return Ok(false);
        }
        if !is_joining || held.bytes.len() + transmit.contents.len() > bytes_max {
            self.flush(held)?;
        }
        if held.to.is_none() {
            held.to = Some(together);
            self.holds.notify_one();
        }
        held.bytes.extend_from_slice(transmit.contents);
        if !is_whole {
            // A shorter segment can only be the last. What blocks here is sent by `send_held`.
            let _sent_later = self.flush(held);
        }
        Ok(true)
    }

    /// Sends a batch; one that is too long, as quinn makes them until it has asked for [`Self::max_transmit_segments`]
    /// again, in pieces. The error is `WouldBlock`; pieces may have left by then, and QUIC drops what comes twice.
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let is_long = transmit.contents.len() > GSO_BYTES_MAX;
        let Some(segment) = transmit.segment_size.filter(|segment| is_long && (1..=GSO_BYTES_MAX).contains(segment))
        else {
            return self.send_piece(transmit);
        };
        let pieces = transmit.contents.chunks(GSO_BYTES_MAX / segment * segment);
        for contents in pieces {
            let segment_size = Some(segment).filter(|segment| *segment < contents.len());
            self.send_piece(&Transmit { contents, segment_size, ..*transmit })?;
        }
        Ok(())
    }

    fn send_piece(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = match self.state.try_send(self.io.get_ref().into(), transmit) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                // What became of earlier packets is told in place of sending this one.
                self.refusals.drain(self.io.get_ref());
                self.state.send(self.io.get_ref().into(), transmit)
            }
            result => result,
        };
        if sent.is_err() {
            // What an older registration knows is of before: a new one reports the buffer as it is.
            *self.room.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
            self.is_blocked.store(true, Ordering::Relaxed);
        }
        sent
    }

    fn register_for_room(&self) -> io::Result<Arc<AsyncFd<UdpSocket>>> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = room.upgrade() {
            return Ok(shared);
        }
        // epoll takes a descriptor once.
        let fresh = Arc::new(register(self.io.get_ref().try_clone()?, Interest::WRITABLE)?);
        *room = Arc::downgrade(&fresh);
        Ok(fresh)
    }

    /// Waits until the send buffer has room, or for as long as a try costs little.
    async fn has_room(&self) {
        let registered = self.register_for_room();
        let waited = match &registered {
            Ok(room) => room.writable().await.map(|mut ready| ready.retain_ready()),
            Err(_no_descriptor) => Err(io::ErrorKind::WouldBlock.into()),
        };
        if waited.is_err() {
            tokio::time::sleep(ROOM_RETRY).await;
        }
    }

    /// Takes in what the kernel says of earlier datagrams, for ever: a socket that neither sends nor receives hears of
    /// them too.
    pub(super) async fn hear_refusals(self: Arc<Self>) {
        while self.io.ready(Interest::ERROR).await.is_ok() {
            let _cleared: io::Result<()> = self.io.try_io(Interest::ERROR, |socket| {
                self.refusals.drain(socket);
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
        if let Some(segment) = transmit.segment_size
            && segment > self.longest.load(Ordering::Relaxed)
        {
            self.longest.store(segment, Ordering::Relaxed);
        }
        let mut held = self.lock();
        let was_for = held.to;
        if self.hold(transmit, &mut held)? {
            return Ok(());
        }
        // In the order in which the connection made them.
        if was_for.is_some_and(|held_for| held_for.destination == transmit.destination) {
            self.flush(&mut held)?;
        }
        drop(held);
        self.send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.io.poll_read_ready(cx))?.retain_ready();
            let mut drained = None;
            let read = self.io.try_io(Interest::READABLE, |socket| {
                let datagrams = self.state.recv(socket.into(), buffers, meta)?;
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
            self.refusals.drain(self.io.get_ref());
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = GSO_BYTES_MAX.checked_div(self.longest.load(Ordering::Relaxed)).unwrap_or(QUINN_SEGMENTS);
        self.state.max_gso_segments().min(fit.max(1))
    }

    fn max_receive_segments(&self) -> usize {
        self.segments
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

type Waiting = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// Waits for room in the socket's send buffer; one per connection, each with its own waker.
struct Writable {
    socket: Arc<MeshSocket>,
    waiting: Option<Waiting>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let socket = &this.socket;
        // A future per datagram would be an allocation per datagram.
        if this.waiting.is_none() && !socket.is_blocked.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let waiting = this.waiting.get_or_insert_with(|| {
            let socket = Arc::clone(socket);
            Box::pin(async move { socket.has_room().await })
        });
        ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        socket.is_blocked.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
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
        let socket = MeshSocket::new(socket.into(), 1_472, Reads::Coalesced).unwrap();
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
        let socket = Arc::new(MeshSocket::new(MeshPort::new(socket, refusals.clone()), 1_472, Reads::Single).unwrap());
        let transmit =
            |destination| Transmit { destination, ecn: None, contents: &[7], segment_size: None, src_ip: None };
        // Nobody looks after the socket while this call waits.
        let mut last = 0;
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

    const SEGMENT: usize = 1_200;

    fn mesh_socket(ip: IpAddr) -> Arc<MeshSocket> {
        let socket = std::net::UdpSocket::bind((ip, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Arc::new(MeshSocket::new(socket.into(), SEGMENT as u64, Reads::Coalesced).unwrap())
    }

    /// Sends `contents` in segments, as quinn does.
    fn send_batch(socket: &MeshSocket, destination: SocketAddr, contents: &[u8]) {
        let segment_size = Some(SEGMENT).filter(|segment| *segment < contents.len());
        let ecn = Some(EcnCodepoint::Ect0);
        socket.try_send(&Transmit { destination, ecn, contents, segment_size, src_ip: None }).unwrap();
    }

    /// Reads what came together: where from, its bytes, and how long its segments are.
    async fn read_together(socket: &MeshSocket) -> (SocketAddr, Vec<u8>, usize) {
        let mut buffer = vec![0; 1 << 16];
        let mut meta = [RecvMeta::default()];
        let read = std::future::poll_fn(|cx| socket.poll_recv(cx, &mut [IoSliceMut::new(&mut buffer)], &mut meta));
        assert_eq!(read.await.unwrap(), 1);
        assert_eq!(meta[0].ecn, Some(EcnCodepoint::Ect0));
        buffer.truncate(meta[0].len);
        (meta[0].addr, buffer, meta[0].stride)
    }

    #[tokio::test]
    async fn full_batches_of_one_transfer_leave_as_one_and_a_short_segment_is_the_last() {
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)] {
            let (sender, receiver) = (mesh_socket(ip), mesh_socket(ip));
            let to = receiver.local_addr().unwrap();
            let batches: Vec<Vec<u8>> = (0..4).map(|batch| vec![batch; 10 * SEGMENT]).collect();
            for batch in &batches[..2] {
                send_batch(&sender, to, batch);
            }
            // What is left of the transfer: three segments and a bit.
            send_batch(&sender, to, &batches[2][..=3 * SEGMENT]);
            let (from, bytes, stride) = read_together(&receiver).await;
            assert_eq!((from, stride), (sender.local_addr().unwrap(), SEGMENT));
            assert_eq!(bytes.len(), 23 * SEGMENT + 1, "in one piece");
            assert!(
                bytes[..20 * SEGMENT] == batches[..2].concat() && bytes[20 * SEGMENT..].iter().all(|byte| *byte == 2)
            );
            // Without an end they leave when the tasks that are ready have run, and as many as the kernel takes.
            for batch in batches.iter().chain(&batches) {
                send_batch(&sender, to, batch);
            }
            let mut pieces = Vec::new();
            let read = async {
                while pieces.iter().sum::<usize>() < 80 * SEGMENT {
                    pieces.push(read_together(&receiver).await.1.len());
                }
            };
            tokio::select! {
                () = Arc::clone(&sender).send_held() => unreachable!("it sends for ever"),
                () = read => {}
            }
            assert!(pieces.len() <= 3 && pieces.iter().all(|bytes| bytes % (10 * SEGMENT) == 0), "{pieces:?}");
        }
    }

    #[tokio::test]
    async fn jumbo_segments_leave_at_once_as_many_as_fit_and_a_batch_that_is_too_long_in_pieces() {
        const JUMBO: usize = 8_900;
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let (sender, receiver) = (mesh_socket(ip), mesh_socket(ip));
        let to = receiver.local_addr().unwrap();
        let send = |contents: &[u8], segment: usize| {
            let ecn = Some(EcnCodepoint::Ect0);
            let transmit = Transmit { destination: to, ecn, contents, segment_size: Some(segment), src_ip: None };
            sender.try_send(&transmit).unwrap();
        };
        assert!(sender.max_transmit_segments() >= QUINN_SEGMENTS);
        // As quinn makes it once it has found the path's MTU: it asks how many fit before the next.
        let batch: Vec<u8> = (0..10 * JUMBO).map(|at| u8::try_from(at / JUMBO).unwrap()).collect();
        send(&batch, JUMBO);
        assert_eq!(sender.max_transmit_segments(), 7);
        send(&batch[..7 * JUMBO], JUMBO);
        // Nobody sends what is held: nothing is.
        let mut pieces = Vec::new();
        for _ in 0..3 {
            let (_, bytes, stride) = read_together(&receiver).await;
            assert_eq!(stride, JUMBO);
            pieces.push(bytes);
        }
        let lengths: Vec<usize> = pieces.iter().map(Vec::len).collect();
        assert_eq!(lengths, [7 * JUMBO, 3 * JUMBO, 7 * JUMBO]);
        assert!(pieces[..2].concat() == batch && pieces[2] == batch[..7 * JUMBO]);
        // Short segments are still gathered, though batches are shorter now.
        for _ in 0..2 {
            send(&batch[..7 * SEGMENT], SEGMENT);
        }
        assert_eq!(sender.lock().bytes.len(), 14 * SEGMENT);
    }

    #[tokio::test]
    async fn what_is_sent_elsewhere_meanwhile_gets_there_and_no_transfer_meets_another() {
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let (sender, near, far) = (mesh_socket(ip), mesh_socket(ip), mesh_socket(ip));
        let to = [near.local_addr().unwrap(), far.local_addr().unwrap()];
        // Full batches to both, and between them single datagrams, as acknowledgements are.
        let mut sent = [Vec::new(), Vec::new()];
        for turn in 0..40_u8 {
            let at = usize::from(turn % 2);
            let length = if turn % 8 < 6 { 10 * SEGMENT } else { 40 };
            let contents = vec![turn; length];
            send_batch(&sender, to[at], &contents);
            sent[at].extend_from_slice(&contents);
        }
        sender.flush(&mut sender.lock()).unwrap();
        for (receiver, sent) in [near, far].iter().zip(sent) {
            let mut read = Vec::new();
            while read.len() < sent.len() {
                read.extend(read_together(receiver).await.1);
            }
            assert!(read == sent, "each gets what was for it, in order");
        }
    }

    #[tokio::test]
    async fn a_socket_with_room_lets_those_who_wait_go_on_and_keeps_no_second_descriptor() {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(MeshSocket::new(socket.into(), 1_472, Reads::Single).unwrap());
        for _round in 0..3 {
            socket.is_blocked.store(true, Ordering::Relaxed);
            let mut pollers = [Arc::clone(&socket).create_io_poller(), Arc::clone(&socket).create_io_poller()];
            for poller in &mut pollers {
                std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
            }
            assert!(!socket.is_blocked.load(Ordering::Relaxed));
            assert!(socket.room.lock().unwrap().upgrade().is_none());
        }
    }
}

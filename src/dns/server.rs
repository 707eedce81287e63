//! The sockets: UDP in batches, TCP with a bounded number of connections.
//!
//! ```text
//!   UDP --recvmmsg, up to 16--> answer at once -> sendmsg        names of others: a task each, at most 512
//!   TCP --length, message-----> the same, one after the other; idle for 10 s: closed
//! ```
//!
//! Invariants: what is answered from the catalogue waits for nothing; a stranger by UDP gets no more than its rate.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hickory_proto::op::ResponseCode;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::DnsConfig;
use super::answer::{Beside, Responder};
use super::limit::{Admission, Sources};
use super::message::{Decoded, Recursion, Request, Via, decode, encode, encode_code, encode_cut};
use super::metrics::{Dropped, Meter};
use super::near::{Distances, Near, Renewal, Trips};
use super::recurse::Recursor;
use super::zone::{Zone, ZoneCell};
use crate::clock;
use crate::prepared::Book;
use crate::supervise::Tasks;

/// Datagrams that are read at once.
const BATCH: usize = 16;
/// Room for one of them: as many of one source as the kernel puts together. Only pages that are written to take memory.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Most TCP connections at once: TCP is for what UDP does not carry.
const CONNECTIONS_MAX: usize = 256;
/// Most of one source that is not this host.
const CONNECTIONS_PER_SOURCE_MAX: usize = 16;
/// A connection that brings no whole query for so long is closed (RFC 7766 §6.2.3 asks for seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not take its answer within this time is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a socket failed, so that the loop does not spin.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// What a reload replaces.
#[derive(Debug)]
pub(super) struct Settings {
    responder: Responder,
    near: Option<Near>,
    pub(super) recursor: Option<Arc<Recursor>>,
}

impl Settings {
    pub(super) fn new(config: DnsConfig, datacenter: String, recursor: Option<Arc<Recursor>>) -> Self {
        Self { near: config.near, responder: Responder::new(config, datacenter), recursor }
    }

    fn recursion(&self) -> Recursion {
        if self.recursor.is_some() { Recursion::Available } else { Recursion::None }
    }
}

/// What all listeners share.
pub(super) struct Shared {
    pub(super) settings: Arc<ArcSwap<Settings>>,
    pub(super) distances: Arc<Distances>,
    /// The prepared queries, as they are at the moment.
    pub(super) queries: Arc<ArcSwap<Book>>,
    pub(super) zone: ZoneCell,
    pub(super) meter: Arc<Meter>,
    pub(super) sources: Mutex<Sources>,
    pub(super) places: Arc<Places>,
    pub(super) begun: Instant,
    pub(super) tasks: Tasks,
    pub(super) stop: CancellationToken,
}

/// What becomes of a message.
enum Handled {
    Say(Vec<u8>),
    /// Asks for a name of others, which is not in the cache.
    Recurse(Request),
    Nothing,
}

impl Shared {
    fn handle(&self, bytes: &[u8], via: Via, from: IpAddr, rng: &mut StdRng) -> Handled {
        let begun = clock::now();
        let request = match decode(bytes, via) {
            Decoded::Ask(request) => request,
            Decoded::Refuse(code, bytes) => {
                self.meter.count(via, None, code);
                return Handled::Say(bytes);
            }
            Decoded::Ignore => {
                self.meter.drop_one(Dropped::NoQuery);
                return Handled::Nothing;
            }
        };
        let kind = Some(request.query.query_type());
        let (zone, settings) = (self.zone.load(), self.settings.load());
        let trips = settings.near.and_then(|near| self.trips(near, &zone, from, begun));
        let queries = self.queries.load();
        let from_here = || self.trips(Near::Agent, &zone, from, begun);
        let beside = Beside { trips: trips.as_deref(), queries: &queries, from_here: &from_here };
        if let Some(answers) = settings.responder.answer(&zone, &request, &beside, rng) {
            self.meter.count(via, kind, answers.code);
            let bytes = encode(&request, answers, settings.recursion());
            self.meter.took(clock::now() - begun);
            return Handled::Say(bytes);
        }
        let Some(recursor) = &settings.recursor else {
            self.meter.count(via, kind, ResponseCode::Refused);
            return Handled::Say(encode_code(&request, ResponseCode::Refused, Recursion::None));
        };
        match recursor.cached(&request) {
            Some((code, bytes)) => {
                self.meter.count(via, kind, code);
                Handled::Say(bytes)
            }
            None => Handled::Recurse(request),
        }
    }

    /// Returns the round trips that order an answer to `from`, as far as they are known; has them renewed if they are old.
    fn trips(&self, near: Near, zone: &Zone, from: IpAddr, now: Instant) -> Option<Arc<Trips>> {
        let here = &zone.snapshot().local_node;
        let node = if near == Near::Agent || from.is_loopback() { here } else { zone.node_at(from)? };
        let (trips, renewal) = self.distances.of(node, now);
        if renewal == Renewal::Due {
            let (distances, node) = (Arc::clone(&self.distances), node.clone());
            self.tasks.spawn("dns-distance", async move { distances.ask(node, clock::now()).await });
        }
        trips
    }

    async fn recurse(&self, request: &Request) -> Vec<u8> {
        let settings = self.settings.load_full();
        let place = settings.recursor.as_ref().and_then(|recursor| Some((recursor, recursor.place()?)));
        let (code, bytes) = match place {
            Some((recursor, _place)) => recursor.ask(request).await,
            None => (ResponseCode::ServFail, encode_code(request, ResponseCode::ServFail, settings.recursion())),
        };
        self.meter.count(request.via, Some(request.query.query_type()), code);
        bytes
    }
}

/// A UDP socket that answers from the address that was asked, also where it is bound to all of them.
#[derive(Debug)]
struct Udp {
    io: UdpSocket,
    state: UdpSocketState,
}

impl Udp {
    fn receive(&self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> io::Result<usize> {
        self.io.try_io(Interest::READABLE, || self.state.recv((&self.io).into(), buffers, meta))
    }

    async fn send(&self, bytes: &[u8], from: &RecvMeta) -> io::Result<()> {
        let transmit =
            Transmit { destination: from.addr, ecn: None, contents: bytes, segment_size: None, src_ip: from.dst_ip };
        loop {
            let sent = self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), &transmit));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.io.writable().await?,
                sent => return sent,
            }
        }
    }
}

/// Serves one UDP socket until the agent stops.
pub(super) async fn udp(socket: std::net::UdpSocket, shared: Arc<Shared>) {
    let opened =
        UdpSocketState::new((&socket).into()).and_then(|state| Ok(Udp { io: UdpSocket::from_std(socket)?, state }));
    let udp = match opened {
        Ok(udp) => Arc::new(udp),
        Err(error) => return warn!(%error, "DNS cannot use its UDP socket; only TCP is answered"),
    };
    let mut rng = StdRng::seed_from_u64(rand::random());
    let mut storage = vec![0; BATCH * RECEIVE_BYTES];
    let mut meta = [RecvMeta::default(); BATCH];
    loop {
        let readable = tokio::select! {
            () = shared.stop.cancelled() => return,
            readable = udp.io.readable() => readable,
        };
        let received = readable.and_then(|()| {
            let mut buffers: Vec<IoSliceMut<'_>> = storage.chunks_mut(RECEIVE_BYTES).map(IoSliceMut::new).collect();
            udp.receive(&mut buffers, &mut meta)
        });
        let count = match received {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                debug!(%error, "DNS cannot receive");
                tokio::time::sleep(FAILURE_PAUSE).await;
                continue;
            }
        };
        for (meta, buffer) in meta.iter().take(count).zip(storage.chunks(RECEIVE_BYTES)) {
            let whole = buffer.get(..meta.len).unwrap_or_default();
            for datagram in whole.chunks(meta.stride.max(1)) {
                one_datagram(&udp, &shared, datagram, *meta, &mut rng).await;
            }
        }
    }
}

async fn one_datagram(udp: &Arc<Udp>, shared: &Arc<Shared>, datagram: &[u8], meta: RecvMeta, rng: &mut StdRng) {
    let is_local = meta.addr.ip().to_canonical().is_loopback();
    let via = if is_local { Via::UdpLocal } else { Via::Udp };
    if !is_local {
        let admission = {
            let mut sources = shared.sources.lock().unwrap_or_else(PoisonError::into_inner);
            sources.admit(meta.addr.ip(), clock::now() - shared.begun)
        };
        if admission != Admission::Answer {
            shared.meter.drop_one(Dropped::Rate);
            if let (Admission::Cut, Decoded::Ask(request)) = (admission, decode(datagram, via)) {
                let _best_effort = udp.send(&encode_cut(&request), &meta).await;
            }
            return;
        }
    }
    match shared.handle(datagram, via, meta.addr.ip().to_canonical(), rng) {
        Handled::Say(bytes) => say(udp, shared, &bytes, &meta).await,
        Handled::Nothing => {}
        Handled::Recurse(request) => {
            let (udp, own) = (Arc::clone(udp), Arc::clone(shared));
            shared.tasks.spawn("dns-recursion", async move {
                let bytes = own.recurse(&request).await;
                say(&udp, &own, &bytes, &meta).await;
            });
        }
    }
}

async fn say(udp: &Udp, shared: &Shared, bytes: &[u8], meta: &RecvMeta) {
    if let Err(error) = udp.send(bytes, meta).await {
        debug!(%error, "a DNS answer was not sent");
        shared.meter.drop_one(Dropped::Unsent);
    }
}

/// Accepts TCP connections until the agent stops.
pub(super) async fn tcp(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "DNS cannot use its TCP socket; only UDP is answered"),
    };
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!(%error, "DNS cannot accept a connection");
                tokio::time::sleep(FAILURE_PAUSE).await;
                continue;
            }
        };
        let Some(place) = shared.places.take(peer) else {
            shared.meter.drop_one(Dropped::Connections);
            continue;
        };
        let own = Arc::clone(&shared);
        shared.tasks.spawn("dns-connection", async move {
            own.meter.connections.inc();
            let ended = connection(stream, peer.ip().to_canonical(), &own).await;
            own.meter.connections.dec();
            drop(place);
            if let Err(error) = ended {
                debug!(%peer, %error, "a DNS connection ended early");
            }
        });
    }
}

async fn connection(mut stream: TcpStream, from: IpAddr, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut rng = StdRng::seed_from_u64(rand::random());
    loop {
        let message = tokio::select! {
            () = shared.stop.cancelled() => return Ok(()),
            message = tokio::time::timeout(IDLE_TIMEOUT, message(&mut stream)) => message,
        };
        // Silence and a goodbye are no failures.
        let Ok(message) = message else { return Ok(()) };
        let Some(message) = message? else { return Ok(()) };
        let answer = match shared.handle(&message, Via::Tcp, from, &mut rng) {
            Handled::Say(bytes) => bytes,
            Handled::Recurse(request) => shared.recurse(&request).await,
            Handled::Nothing => return Ok(()),
        };
        let bytes = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&bytes.to_be_bytes(), answer.as_slice()].concat();
        tokio::time::timeout(WRITE_TIMEOUT, stream.write_all(&framed)).await??;
    }
}

/// Reads a message behind its length; none at the end of the stream.
async fn message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let bytes = match stream.read_u16().await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(bytes)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Counts connections, in all and of strangers by source.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<(usize, BTreeMap<IpAddr, usize>)>);

/// A counted connection; given back when dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    stranger: Option<IpAddr>,
}

impl Places {
    fn take(self: &Arc<Self>, peer: SocketAddr) -> Option<Place> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, by_source) = &mut *places;
        if *all >= CONNECTIONS_MAX {
            return None;
        }
        let ip = peer.ip().to_canonical();
        let stranger = (!ip.is_loopback()).then_some(ip);
        if let Some(ip) = stranger {
            let own = by_source.entry(ip).or_default();
            if *own >= CONNECTIONS_PER_SOURCE_MAX {
                return None;
            }
            *own += 1;
        }
        *all += 1;
        Some(Place { places: Arc::clone(self), stranger })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, by_source) = &mut *places;
        *all = all.saturating_sub(1);
        let Some(ip) = self.stranger else { return };
        match by_source.get_mut(&ip) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(by_source.remove(&ip)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stranger_takes_every_connection_and_places_come_back() {
        let places = Arc::new(Places::default());
        let peer = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 1);
        let mut held: Vec<Place> =
            (0..CONNECTIONS_PER_SOURCE_MAX).map(|_| places.take(peer("192.0.2.1")).unwrap()).collect();
        assert!(places.take(peer("192.0.2.1")).is_none());
        while let Some(place) = places.take(peer("127.0.0.1")) {
            held.push(place);
        }
        assert_eq!(held.len(), CONNECTIONS_MAX);
        held.clear();
        let _one = places.take(peer("192.0.2.1")).unwrap();
        assert_eq!(places.0.lock().unwrap().0, 1);
    }
}

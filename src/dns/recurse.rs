//! Names of others: asked of the recursors, in order, and kept.
//!
//! An answer counts only if it comes from the recursor that was asked, under the random id and to the random port of the question,
//! and repeats the question. One that was cut is fetched again by TCP.
//! Not here: how long it is kept (`cache`), how it is written to the asker (`message`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::cache::{Cache, Key};
use super::message::{Recursion, Request, UDP_BYTES_MAX, decode_found, encode_ask, encode_code, encode_found};
use super::metrics::{Meter, Recursed};
use crate::clock;

/// Most questions that wait for recursors at once: each holds a socket. One above it is answered with SERVFAIL.
pub(super) const OPEN_MAX: usize = 512;

/// Asks recursors.
#[derive(Debug)]
pub(super) struct Recursor {
    servers: Vec<SocketAddr>,
    timeout: Duration,
    cache: Mutex<Cache>,
    places: Arc<Semaphore>,
    meter: Arc<Meter>,
}

impl Recursor {
    /// Will ask `servers`, each for `timeout`; none if there are none.
    pub(super) fn new(servers: Vec<SocketAddr>, timeout: Duration, meter: Arc<Meter>) -> Option<Self> {
        let places = Arc::new(Semaphore::new(OPEN_MAX));
        (!servers.is_empty()).then(|| Self { servers, timeout, cache: Mutex::default(), places, meter })
    }

    /// Tells whether it asks exactly `servers`, each for `timeout`.
    pub(super) fn is_of(&self, servers: &[SocketAddr], timeout: Duration) -> bool {
        self.servers == servers && self.timeout == timeout
    }

    /// Answers from the cache, if it can.
    pub(super) fn cached(&self, request: &Request) -> Option<(ResponseCode, Vec<u8>)> {
        let found = {
            let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.find(&Key::of(request), clock::now())
        };
        let (wire, age_s) = found?;
        let message = decode_found(&wire)?;
        self.meter.recursed(Recursed::Cached);
        Some((message.metadata.response_code, encode_found(request, &message, age_s)))
    }

    /// Takes a place among those that wait; none if all are taken.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok();
        if place.is_none() {
            self.meter.recursed(Recursed::Overflow);
        }
        place
    }

    /// Waits until nothing waits for a recursor.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn idle(&self) {
        let all = u32::try_from(OPEN_MAX).unwrap_or(u32::MAX);
        drop(self.places.acquire_many(all).await);
    }

    /// Asks one recursor after the other until one answers; SERVFAIL if none does.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is kept then.
    pub(super) async fn ask(&self, request: &Request) -> (ResponseCode, Vec<u8>) {
        for server in &self.servers {
            match self.ask_one(*server, request).await {
                Ok(found) => {
                    let answer = encode_found(request, &found.message, 0);
                    let code = found.message.metadata.response_code;
                    self.keep(request, found);
                    self.meter.recursed(Recursed::Answered);
                    return (code, answer);
                }
                Err(error) => debug!(%server, %error, "a recursor did not answer"),
            }
        }
        self.meter.recursed(Recursed::Failed);
        (ResponseCode::ServFail, encode_code(request, ResponseCode::ServFail, Recursion::Available))
    }

    fn keep(&self, request: &Request, found: Found) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.store(Key::of(request), &found.message, found.wire.into(), clock::now());
        self.meter.cached.set(i64::try_from(cache.len()).unwrap_or(i64::MAX));
    }

    async fn ask_one(&self, server: SocketAddr, request: &Request) -> io::Result<Found> {
        let id = rand::random();
        let question = encode_ask(request, id).ok_or_else(|| io::Error::other("the question cannot be written"))?;
        let found = tokio::time::timeout(self.timeout, by_udp(server, &question, request, id)).await??;
        let found = if found.message.metadata.truncation {
            tokio::time::timeout(self.timeout, by_tcp(server, &question, request, id)).await??
        } else {
            found
        };
        match found.message.metadata.response_code {
            // These say something of the recursor, not of the name: another may know more.
            code @ (ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::FormErr | ResponseCode::NotImp) => {
                Err(io::Error::other(format!("it answered {code}")))
            }
            _ => Ok(found),
        }
    }
}

/// What a recursor answered.
struct Found {
    message: Message,
    wire: Vec<u8>,
}

impl Found {
    /// Takes `wire` if it answers the question of `request` that was asked under `id`.
    fn to(request: &Request, id: u16, wire: &[u8]) -> Option<Self> {
        let message = decode_found(wire)?;
        let is_it = message.metadata.id == id
            && message.queries.first().is_some_and(|query| {
                query.name() == request.query.name()
                    && query.query_type() == request.query.query_type()
                    && query.query_class() == request.query.query_class()
            });
        is_it.then(|| Self { message, wire: wire.to_vec() })
    }
}

async fn by_udp(server: SocketAddr, question: &[u8], request: &Request, id: u16) -> io::Result<Found> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel drops what others send.
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; usize::from(UDP_BYTES_MAX)];
    loop {
        let bytes = socket.recv(&mut buffer).await?;
        if let Some(found) = Found::to(request, id, buffer.get(..bytes).unwrap_or_default()) {
            return Ok(found);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &[u8], request: &Request, id: u16) -> io::Result<Found> {
    let mut stream = TcpStream::connect(server).await?;
    let bytes = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&bytes.to_be_bytes(), question].concat()).await?;
    let bytes = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(bytes)];
    stream.read_exact(&mut buffer).await?;
    Found::to(request, id, &buffer).ok_or_else(|| io::Error::other("it answered something else by TCP"))
}

//! TCP from a local app into the mesh.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tracing::debug;

use super::http;
use super::metrics::Reporter;
use super::preamble::{StreamKind, StreamStatus};
use super::relay::{self, CODE_RESET, Sending, Tcp};
use super::tunnel::Lease;
use super::worker::{Caller, OpenError, Opened, Worker};
use crate::clock;
use crate::model::{Instance, ServiceName};
use crate::routing::{Limited, Outcome, Tried};
use crate::traffic::{Faults, Resolved};
use crate::upstream::HashField;

/// Attempts of one connection, over different instances.
const ATTEMPTS_MAX: usize = 3;
/// The destination connects its app within 3 s and answers.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Flags of connections that a fault reset, or delayed.
const FAULT: &str = "FI";
const DELAY: &str = "DI";

/// Carries `stream`, which comes from an app at `from`, to an instance of `caller.destination`; resets it if none can be had. Hands it back as it came where the
/// last instance that was asked takes no such streams: it may take requests by now, and no byte was read yet.
pub(super) async fn serve(
    worker: Rc<Worker>,
    (stream, from): (TcpStream, IpAddr),
    caller: Caller,
) -> Option<TcpStream> {
    let edge = worker.edges.edge(Reporter::Source, caller.source.service(), &caller.destination);
    let mut counted = edge.open();
    let faults = worker.snapshot().peek().traffic.chain(&caller.destination).and_then(|chain| chain.faults.clone());
    let struck = match faults {
        Some(faults) => Box::pin(strike(&faults)).await,
        None => None,
    };
    if struck == Some(FAULT) {
        // Dropped unclean: the app gets an RST.
        drop(Tcp::new(stream));
        counted.ends(FAULT);
        return None;
    }
    let to = worker.snapshot().peek().traffic.chain(&caller.destination).map(|chain| Arc::clone(&chain.stream));
    let decided = {
        let (table, source) = (&worker.snapshot().peek().policy, caller.source.service());
        let destination = to.as_ref().map_or(&caller.destination, |to| &to.target.service);
        worker.http.policy().stream(table, Reporter::Source, source, destination)
    };
    let tcp = Tcp::new(stream);
    if let Err(denied) = decided {
        debug!(rule = %denied.rule, service = %caller.destination, "a caller is denied");
        // Dropped unclean: the app gets an RST.
        drop(tcp);
        counted.ends("RBAC");
        return None;
    }
    // In a box: the connection lasts longer, and has no room for what led to it.
    let idle = to.as_ref().and_then(|to| to.idle_timeout).unwrap_or(relay::IDLE_TIMEOUT);
    match Box::pin(connect(&worker, &caller, StreamKind::Tcp, (to.as_deref(), Some(from)))).await {
        Ok(Connected { send, recv, lease: _lease, instance }) => {
            drop(instance);
            let flag = relay::relay(tcp, send, recv, &*edge, idle).await.flag();
            counted.ends(struck.filter(|_| flag == "-").unwrap_or(flag));
            None
        }
        Err(Refused { flag, limited, is_unknown }) => {
            if let Some(what) = limited {
                worker.overflowed(what);
            }
            counted.ends(flag);
            if is_unknown { tcp.hand_on() } else { None }
        }
    }
}

/// Puts a connection off or breaks it, on purpose; returns the flag that says so.
async fn strike(faults: &Faults) -> Option<&'static str> {
    let (delay, is_reset) = faults.strike_stream((rand::random(), rand::random()));
    if let Some(delay) = delay {
        tokio::time::sleep(delay).await;
    }
    if is_reset { Some(FAULT) } else { delay.map(|_| DELAY) }
}

/// A stream whose far end is connected.
pub(super) struct Connected {
    pub(super) send: Sending,
    pub(super) recv: quinn::RecvStream,
    /// To be held while either half is used.
    pub(super) lease: Lease,
    /// Who was picked.
    pub(super) instance: Arc<Instance>,
}

/// Why there is no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    /// That of the metrics.
    pub(super) flag: &'static str,
    /// The limit that refused it, if one did.
    pub(super) limited: Option<Limited>,
    /// The last instance that was asked is not there, or not for such streams.
    is_unknown: bool,
}

impl Refused {
    fn by(flag: &'static str, limited: Option<Limited>) -> Self {
        Self { flag, limited, is_unknown: false }
    }
}

/// Returns a stream whose far end is connected.
///
/// # Cancel safety
/// Cancelling resets the stream.
pub(super) async fn connect(
    worker: &Rc<Worker>,
    caller: &Caller,
    kind: StreamKind,
    (to, from): (Option<&Resolved>, Option<IpAddr>),
) -> Result<Connected, Refused> {
    let destination = to.map_or(&caller.destination, |to| &to.target.service);
    let tried = RefCell::new(Tried::with_key(key_of_stream(worker, destination, from)));
    let mut refused = None;
    for _ in 0..ATTEMPTS_MAX {
        let opened = match to {
            None => worker.open(caller, kind, &tried).await,
            Some(to) => worker.open_to(&caller.source, to, kind, &tried).await,
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(OpenError::Unreachable { node, reason }) => {
                debug!(service = %caller.destination, %node, reason, "instance is unreachable");
                refused = Some(Refused::by("UF", None));
                continue;
            }
            Err(OpenError::Full { node }) => {
                debug!(service = %caller.destination, %node, "the instance's node takes no more streams");
                refused = Some(Refused::by("UO", Some(Limited::Pending)));
                continue;
            }
            Err(OpenError::UnknownService) => return Err(Refused::by("NR", None)),
            Err(OpenError::NoInstance { .. } | OpenError::FailsClosed { .. }) => {
                return Err(refused.unwrap_or(Refused::by("UH", None)));
            }
            Err(OpenError::Overflow(what)) => return Err(Refused::by("UO", Some(what))),
            Err(OpenError::Draining) => return Err(Refused::by("DR", None)),
        };
        let Opened { send, recv, preamble, instance, lease, at } = opened;
        let limit = to.and_then(|to| to.connect_timeout).map_or(STATUS_TIMEOUT, |limit| limit.min(STATUS_TIMEOUT));
        let established = establish(send, recv, preamble, limit).await;
        let observe = |outcome| {
            if let Some(observer) = lease.observer() {
                let now = clock::now();
                worker.observe(observer, outcome, now - at, now);
            }
        };
        match established {
            Ok((send, recv)) => {
                worker.connected(&instance);
                observe(Outcome::Success);
                return Ok(Connected { send, recv, lease, instance });
            }
            // No fault of the instance's, and not to be gone round by asking another.
            Err(Some(StreamStatus::Limited)) => return Err(Refused::by("RL", None)),
            Err(Some(status)) if !status.may_retry() => return Err(Refused::by("RBAC", None)),
            // No fault of the instance's.
            Err(Some(StreamStatus::Full)) if kind == StreamKind::Udp => {
                debug!(service = %caller.destination, node = %instance.node.info.name, "the instance's node takes no more flows");
                refused = Some(Refused::by("UO", Some(Limited::Pending)));
            }
            Err(status) => {
                worker.connect_failed(&instance);
                observe(Outcome::GatewayFailure);
                debug!(service = %caller.destination, ?status, "instance was not connected");
                let is_unknown = status == Some(StreamStatus::UnknownInstance);
                refused = Some(Refused { is_unknown, ..Refused::by("UF", None) });
            }
        }
    }
    Err(refused.unwrap_or(Refused::by("UF", None)))
}

/// Returns the key of a connection, where its service is balanced by the caller's address: nothing else is known of it.
fn key_of_stream(worker: &Worker, destination: &ServiceName, from: Option<IpAddr>) -> Option<u64> {
    let snapshot = worker.snapshot().peek();
    let balance = snapshot.upstreams.balance(destination);
    let by_address = balance.hash.iter().any(|policy| policy.field == HashField::SourceIp);
    by_address.then(|| from.map(http::key::key_of_ip)).flatten()
}

/// Sends the preamble and waits for the status, at most `limit`: no byte of the app is at stake yet, so another attempt is
/// safe.
async fn establish(
    send: quinn::SendStream,
    mut recv: quinn::RecvStream,
    preamble: Bytes,
    limit: Duration,
) -> Result<(Sending, quinn::RecvStream), Option<StreamStatus>> {
    let mut send = Sending::new(send);
    let mut byte = [0];
    let exchange = async {
        send.stream().write_chunk(preamble).await.ok()?;
        recv.read_exact(&mut byte).await.ok()?;
        StreamStatus::from_byte(u8::from_be_bytes(byte))
    };
    match tokio::time::timeout(limit, exchange).await.ok().flatten() {
        Some(StreamStatus::Ok) => Ok((send, recv)),
        status => {
            let _gone = recv.stop(CODE_RESET);
            Err(status)
        }
    }
}

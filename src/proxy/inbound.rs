//! Tunnels from peers to local apps.
//!
//! ```text
//!   accept -> handshake -> verified peer -> accept_bi -> preamble -> authorize -> connect the app -> status -> relay
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use prometheus::IntGauge;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{debug, warn};

use super::announce;
use super::authorize::in_time;
use super::calls::{Admitted, Ticket};
use super::http;
use super::metrics::Reporter;
use super::paths::ACCEPTOR;
use super::preamble::{PREAMBLE_BYTES_MAX, Preamble, StreamKind, StreamStatus};
use super::relay::{self, CODE_RESET, Sending, Tcp};
use super::udp::{self, Datagrams};
use super::worker::{CONNECTIONS_MAX, Slot, Worker, within};
use crate::catalogue::LocalInstance;
use crate::clock;
use crate::hearsay::{Excerpt, Seldom};
use crate::model::{InstanceId, NodeName, Protocol, ServiceName};
use crate::pki::PeerIdentity;
use crate::transport::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, RETRY_FROM, TUNNEL_STREAMS, TUNNEL_STREAMS_MAX};

/// Tunnels that one worker accepts: 35 KB each, four times what one peer's pool holds.
const TUNNELS_MAX: usize = 4_096;
/// Tunnels of one peer node: one per service that calls from there, and as many again while certificates change.
pub(super) const TUNNELS_PER_PEER_MAX: usize = 256;
/// Streams of one tunnel at once: half of what the worker holds, so that no peer takes it all.
pub(super) const STREAMS_PER_TUNNEL_MAX: usize = CONNECTIONS_MAX / 2;
/// A preamble is one packet; a peer that does not send it holds a stream for nothing.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connecting to an app on this host: a full backlog answers nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Application code of a connection whose peer is unknown.
const CODE_UNVERIFIED: u32 = 1;
/// Application code of a connection beyond [`TUNNELS_PER_PEER_MAX`].
pub(super) const CODE_TOO_MANY: u32 = 4;

/// What the tunnels of a worker share.
#[derive(Default)]
struct Doors {
    /// Tunnels by peer node.
    per_peer: RefCell<BTreeMap<NodeName, usize>>,
    /// What peers bring about with each handshake.
    unverified_told: Seldom,
    crowds_told: Seldom,
}

/// Accepts tunnels until the worker closes.
pub(super) async fn run(worker: &Rc<Worker>) {
    let mut tunnels = JoinSet::new();
    let handshakes = Rc::new(Cell::new(0));
    let doors = Rc::<Doors>::default();
    loop {
        // Waiting attempts stay with the endpoint, which bounds them.
        let has_room = handshakes.get() < HANDSHAKES_MAX && tunnels.len() < TUNNELS_MAX;
        tokio::select! {
            Some(ended) = tunnels.join_next() => if ended.is_err_and(|error| error.is_panic()) {
                worker.metrics.panics.inc();
                warn!("a tunnel's task panicked; the worker goes on");
            },
            incoming = worker.endpoint.accept(), if has_room => {
                let Some(incoming) = incoming else { break };
                if handshakes.get() >= RETRY_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
                    let _cannot_fail_when_retry_is_allowed = incoming.retry();
                    continue;
                }
                let Some(slot) = Slot::take(&handshakes, HANDSHAKES_MAX) else { continue };
                tunnels.spawn_local(tunnel(Rc::clone(worker), incoming, slot, Rc::clone(&doors)));
            }
            () = tokio::time::sleep(Duration::from_millis(100)), if handshakes.get() >= HANDSHAKES_MAX => {}
        }
    }
}

/// Serves one peer's connection until it closes.
async fn tunnel(worker: Rc<Worker>, incoming: quinn::Incoming, handshake: Slot, doors: Rc<Doors>) {
    let from = incoming.remote_address();
    let refused = |reason: &str| worker.metrics.refused.with_label_values(&[reason]).inc();
    let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            refused("handshake");
            return debug!(%from, %error, "tunnel's handshake failed");
        }
        Err(_elapsed) => return refused("handshake_timeout"),
    };
    drop(handshake);
    let (peer, _live) = match worker.endpoint.peer(&connection) {
        Ok((peer, live)) => (Rc::new(peer), live),
        Err(error) => {
            refused("unverified");
            if let Some(left_out) = doors.unverified_told.due(clock::now()) {
                warn!(%from, error = %Excerpt(&error), left_out, "closing a tunnel whose peer does not verify");
            }
            return connection.close(CODE_UNVERIFIED.into(), b"peer is not verified");
        }
    };
    let Some(_place) = Place::take(&doors, &peer.node, worker.metrics.tunnels.with_label_values(&[ACCEPTOR])) else {
        refused("too_many");
        if let Some(left_out) = doors.crowds_told.due(clock::now()) {
            warn!(%from, node = %peer.node, max = TUNNELS_PER_PEER_MAX, left_out, "closing a tunnel: its node has too many");
        }
        return connection.close(CODE_TOO_MANY.into(), b"too many tunnels of this node");
    };
    worker.metrics.handshakes.with_label_values(&[ACCEPTOR]).inc();
    let _watched = worker.paths.watch(&connection, ACCEPTOR, &peer.node);
    streams(&worker, &connection, &peer).await;
}

/// A tunnel's place among those of its node, and in the metrics; given back when it is dropped, by a panic as well.
struct Place {
    doors: Rc<Doors>,
    node: NodeName,
    open: IntGauge,
}

impl Place {
    /// Takes one for a tunnel of `node`, and counts it in `open`; none if it has as many as it may.
    fn take(doors: &Rc<Doors>, node: &NodeName, open: IntGauge) -> Option<Self> {
        let mut per_peer = doors.per_peer.borrow_mut();
        let count = per_peer.get(node).copied().unwrap_or_default();
        if count >= TUNNELS_PER_PEER_MAX {
            return None;
        }
        per_peer.insert(node.clone(), count + 1);
        open.inc();
        Some(Self { doors: Rc::clone(doors), node: node.clone(), open })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.dec();
        let mut per_peer = self.doors.per_peer.borrow_mut();
        match per_peer.get_mut(&self.node) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(per_peer.remove(&self.node)),
        }
    }
}

/// Accepts streams; a tunnel that comes near its limit is given twice as many.
async fn streams(worker: &Rc<Worker>, connection: &quinn::Connection, peer: &Rc<PeerIdentity>) {
    let open = Rc::new(Cell::new(0));
    let datagrams = Rc::new(Datagrams::of(connection, &worker.metrics));
    let mut limit = TUNNEL_STREAMS;
    while let Ok((send, recv)) = connection.accept_bi().await {
        let Some(of_tunnel) = Slot::take(&open, STREAMS_PER_TUNNEL_MAX) else { continue };
        if open.get() >= limit as usize / 4 * 3 && limit < TUNNEL_STREAMS_MAX {
            limit = (limit * 2).min(TUNNEL_STREAMS_MAX);
            connection.set_max_concurrent_bi_streams(limit.into());
        }
        // Over the bound the halves are dropped: the caller sees a reset and tries another instance.
        let Some(of_worker) = Slot::take(&worker.streams, CONNECTIONS_MAX) else {
            worker.metrics.overflow.inc();
            drop(Sending::new(send));
            continue;
        };
        let token = worker.task_token();
        let from = connection.remote_address();
        let (peer, datagrams) = (Rc::clone(peer), Rc::clone(&datagrams));
        let stream = Stream { send, recv, from, peer, datagrams, held: (of_tunnel, of_worker, token) };
        if let Some(stream) = worker.runners.give(stream) {
            let serving = Rc::clone(worker);
            worker.spawn_untracked(async move {
                let serve = |stream| self::serve(&serving, stream);
                serving.runners.run(stream, serve).await;
            });
        }
    }
}

/// A stream of a peer, and what it counts in.
pub(super) struct Stream {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    /// Where the peer's agent is.
    from: SocketAddr,
    peer: Rc<PeerIdentity>,
    /// Of its tunnel.
    datagrams: Rc<Datagrams>,
    held: (Slot, Slot, TaskTrackerToken),
}

/// Serves one stream.
async fn serve(worker: &Rc<Worker>, stream: Stream) {
    let Stream { send, mut recv, from, peer, datagrams, held } = stream;
    let preamble = within(PREAMBLE_TIMEOUT, preamble(worker, &mut recv)).await;
    let Some((preamble, rest)) = preamble.flatten() else {
        worker.metrics.refused.with_label_values(&["preamble"]).inc();
        let _gone = recv.stop(CODE_RESET);
        return;
    };
    let local = match admit(worker, &preamble, &peer) {
        Ok(local) => local,
        Err(status) => return refuse(send, recv, status).await,
    };
    let ticket = worker.calls.enter(Rc::clone(&peer), preamble.service.clone());
    match preamble.kind {
        StreamKind::Http => {
            let stream = http::inbound::Stream { send, recv, rest, local, peer };
            let served = pin!(http::inbound::serve(Rc::clone(worker), stream, |head| ticket.admit_request(head)));
            ticket.unless_cut(served).await;
            worker.responded_at.set(Some(clock::now()));
        }
        StreamKind::Tcp => {
            // A connection may last for hours: it does not keep the runner with its room for a request.
            ticket.admit(Admitted::Stream);
            let header = local.wants_proxy_header.then(|| announce::header(from, local.app_addr, &peer.id));
            let call = TcpCall { send, recv, rest, app: local.app_addr, header, service: preamble.service, peer };
            let serving = Rc::clone(worker);
            worker.spawn(async move {
                serve_tcp(&serving, call, ticket).await;
                drop(held);
            });
        }
        StreamKind::Udp => {
            ticket.admit(Admitted::Stream);
            let (app, service) = (local.app_addr, preamble.service);
            let call = udp::inbound::FlowCall { send, recv, rest, app, service, peer, datagrams };
            let serving = Rc::clone(worker);
            worker.spawn(async move {
                udp::inbound::serve(&serving, call, ticket).await;
                drop(held);
            });
        }
    }
}

/// A TCP connection that a peer asks for.
struct TcpCall {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    rest: Bytes,
    app: SocketAddr,
    /// What the app is to be told of the caller.
    header: Option<Vec<u8>>,
    service: ServiceName,
    peer: Rc<PeerIdentity>,
}

/// Carries a TCP connection until it ends, or intentions end it.
async fn serve_tcp(worker: &Rc<Worker>, call: TcpCall, ticket: Ticket) {
    ticket.unless_cut(pin!(tcp(worker, call))).await;
}

/// Connects the app and relays.
async fn tcp(worker: &Rc<Worker>, call: TcpCall) {
    let TcpCall { send, mut recv, rest, app, header, service, peer } = call;
    let edge = worker.edges.edge(Reporter::Destination, peer.id.service(), &service);
    let idle = worker.snapshot().peek().traffic.idle_timeout(&service).unwrap_or(relay::IDLE_TIMEOUT);
    drop((peer, service));
    let mut counted = edge.open();
    let connecting = async {
        let mut app = TcpStream::connect(app).await?;
        if let Some(header) = header {
            app.write_all(&header).await?;
        }
        Ok::<_, std::io::Error>(app)
    };
    let Some(Ok(app)) = within(CONNECT_TIMEOUT, connecting).await else {
        counted.ends("UF");
        return refuse(send, recv, StreamStatus::ConnectFailed).await;
    };
    // Without Nagle's delay; a socket that refuses the option still carries bytes.
    let _slower = app.set_nodelay(true);
    let (app, mut send) = (Tcp::new(app), Sending::new(send));
    // Nothing follows a TCP preamble before the status has come, so `rest` is empty for a peer that keeps to it.
    if !rest.is_empty() || send.stream().write_all(&[StreamStatus::Ok.byte()]).await.is_err() {
        let _gone = recv.stop(CODE_RESET);
        return;
    }
    counted.ends(relay::relay(app, send, recv, &*edge, idle).await.flag());
}

/// Reads up to the end of the preamble; returns what came after it as well. None if there is no preamble.
async fn preamble(worker: &Worker, recv: &mut quinn::RecvStream) -> Option<(Preamble, Bytes)> {
    // It comes whole at most times, and then nothing of it is copied.
    let mut bytes = Bytes::new();
    loop {
        let chunk = recv.read_chunk(usize::MAX, true).await.ok()??;
        bytes = if bytes.is_empty() { chunk.bytes } else { [&bytes[..], &chunk.bytes].concat().into() };
        match Preamble::decode_with(&mut bytes, |instance, service| names(worker, instance, service)) {
            // Empty, it would keep alive what the packet came with, for as long as a TCP connection lasts.
            Ok(Some(preamble)) => return Some((preamble, if bytes.is_empty() { Bytes::new() } else { bytes })),
            Ok(None) if bytes.len() < PREAMBLE_BYTES_MAX => {}
            Ok(None) => return None,
            Err(error) => {
                debug!(%error, "stream begins with no preamble");
                return None;
            }
        }
    }
}

/// Returns the names of an instance of this node and its service, if there is one of these.
fn names(worker: &Worker, instance: &str, service: &str) -> Option<(InstanceId, ServiceName)> {
    let snapshot = worker.snapshot().peek();
    let (id, local) = snapshot.local.instances.get_key_value(instance)?;
    (local.service.as_str() == service).then(|| (id.clone(), local.service.clone()))
}

/// Finds the instance that a stream is for and asks whether its caller may.
fn admit(worker: &Worker, preamble: &Preamble, peer: &PeerIdentity) -> Result<LocalInstance, StreamStatus> {
    if worker.stopping() {
        return Err(StreamStatus::Draining);
    }
    let snapshot = worker.snapshot().peek();
    let local = snapshot.local.instances.get(&preamble.instance);
    let local = local.filter(|local| local.service == preamble.service).ok_or(StreamStatus::UnknownInstance)?;
    let protocol = snapshot.traffic.protocol(&preamble.service).unwrap_or(local.protocol);
    if !fits(preamble.kind, protocol) {
        worker.metrics.refused.with_label_values(&["protocol"]).inc();
        if let Some(left_out) = worker.unfit_told.due(clock::now()) {
            let (kind, protocol) = (preamble.kind.as_str(), protocol.as_str());
            warn!(peer = %peer.id, service = %preamble.service, kind, protocol, left_out, "refusing a stream that is not of its service's protocol");
        }
        return Err(StreamStatus::UnknownInstance);
    }
    // A request is decided over when its head has come.
    let decided = in_time(peer).and_then(|()| match preamble.kind {
        StreamKind::Http => Ok(()),
        StreamKind::Tcp | StreamKind::Udp => {
            let source = peer.id.service();
            worker.http.policy().stream(&snapshot.policy, Reporter::Destination, source, &preamble.service)
        }
    });
    decided.map_err(|denied| {
        debug!(peer = %peer.id, service = %preamble.service, rule = %denied.rule, "a caller is denied");
        worker.metrics.refused.with_label_values(&["forbidden"]).inc();
        StreamStatus::Forbidden
    })?;
    let is_limited = preamble.kind != StreamKind::Http && {
        let (table, source) = (&snapshot.upstreams, peer.id.service());
        worker.http.admit_stream_rate(table, &preamble.service, source).is_err()
    };
    if is_limited {
        debug!(peer = %peer.id, service = %preamble.service, "a caller is over its rate");
        worker.metrics.refused.with_label_values(&["rate"]).inc();
        return Err(StreamStatus::Limited);
    }
    let mut local = local.clone();
    local.protocol = protocol;
    Ok(local)
}

/// Tells whether a stream of `kind` may go to a service of `protocol`.
///
/// Bytes never go to an app that takes requests: nobody would have looked at their heads, so the app would believe what they
/// say of the caller, and neither permissions nor rates would hold. A request to a service of bytes is held against more than
/// a stream of bytes is, and passes: callers may learn of a change of the protocol before its instances do. Who may call a
/// service by TCP has no word in what listens by UDP on the same port, nor the other way.
fn fits(kind: StreamKind, protocol: Protocol) -> bool {
    match kind {
        StreamKind::Tcp => protocol == Protocol::Tcp,
        StreamKind::Http => protocol != Protocol::Udp,
        StreamKind::Udp => protocol == Protocol::Udp,
    }
}

/// Answers with a status other than ok.
pub(super) async fn refuse(mut send: quinn::SendStream, mut recv: quinn::RecvStream, status: StreamStatus) {
    // Dropping the half finishes it; a caller that is gone needs no answer.
    let _gone = send.write_all(&[status.byte()]).await;
    let _gone = recv.stop(CODE_RESET);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tunnel_s_place_comes_back_however_its_task_ends() {
        let (doors, open) = (Rc::<Doors>::default(), IntGauge::new("open", "Tunnels.").unwrap());
        let [a, b] = ["a", "b"].map(|name| name.parse::<NodeName>().unwrap());
        let mut held: Vec<Place> = std::iter::from_fn(|| Place::take(&doors, &a, open.clone())).collect();
        assert_eq!(held.len(), TUNNELS_PER_PEER_MAX);
        assert!(Place::take(&doors, &b, open.clone()).is_some(), "another node has its own");
        let doomed = held.pop();
        let tasks = tokio::task::LocalSet::new();
        let doomed = tasks.spawn_local(async move {
            let _doomed = doomed;
            panic!("inside a tunnel");
        });
        tasks.await;
        assert!(doomed.await.unwrap_err().is_panic());
        assert_eq!(open.get(), i64::try_from(held.len()).unwrap());
        let again = Place::take(&doors, &a, open.clone());
        assert!(again.is_some() && Place::take(&doors, &a, open.clone()).is_none());
        drop((held, again));
        assert_eq!((open.get(), doors.per_peer.borrow().len()), (0, 0), "nothing is kept of nodes that have none");
    }
}

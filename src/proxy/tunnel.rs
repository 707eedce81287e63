//! One worker's tunnels: QUIC connections to other nodes, one per (source service, destination node).
//!
//! ```text
//!   key (source, node, address, generation) -> slot -> dialling, shared by all who ask -> open | failed, for a second
//! ```
//!
//! Invariants: at most [`TUNNELS_MAX`] slots; a tunnel gets no new stream once its certificate has ended; streams
//! outlive the slot and hold a [`Lease`] on the tunnel, and quinn closes a connection when slot and streams are gone.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::sync::OnceCell;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::metrics::ProxyMetrics;
use super::open::{Entry, OpenTunnel, OpenTunnels};
use super::paths::{DIALER, Paths, Watched};
use super::udp::Datagrams;
use crate::clock::{self, UnixSeconds};
use crate::model::{Generation, NodeName, ServiceName};
use crate::pki::PeerIdentity;
use crate::routing::{Load, Observer};
use crate::transport::{ConnectError, Dialled, LiveEntry, WorkerEndpoint};

/// Slots of one worker: 35 KB each side, 36 MB in all.
const TUNNELS_MAX: usize = 1_024;
/// A tunnel without a new stream for this long leaves the pool.
const UNUSED_FOR: Duration = Duration::from_mins(5);
/// A failed dial answers those who ask within this time, so that a dead node is not dialled per request.
const FAILED_FOR: Duration = Duration::from_secs(1);
/// A dial takes at most this long: two lost packets at 300 ms round trip, and time is left for another instance.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
/// A certificate gets no new streams for this long before its end: clocks differ.
const CERTIFICATE_MARGIN: Duration = Duration::from_secs(30);

/// Which tunnel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TunnelKey {
    /// Whose SVID it shows; none: the node's.
    pub(crate) source: Option<ServiceName>,
    /// Who is at the other end.
    pub(crate) node: NodeName,
    /// Where.
    pub(crate) addr: SocketAddr,
    /// Which life of the node: a restarted one is dialled anew.
    pub(crate) generation: Generation,
}

/// An open tunnel.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) connection: quinn::Connection,
    pub(crate) peer: PeerIdentity,
    datagrams: Datagrams,
    not_after: UnixSeconds,
    gauge: prometheus::IntGauge,
    _listed: Entry,
    _watched: Watched,
    _live: Option<LiveEntry>,
}

/// Held by whoever uses a stream of a tunnel: while one does, the tunnel stays under watch (`transport::LiveConnections`),
/// and the call counts as under way at its instance. A copy keeps the tunnel alone. Empty where tests have no tunnel.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    tunnel: Option<Rc<Tunnel>>,
    load: Option<Load>,
}

impl Lease {
    pub(crate) fn new(tunnel: Rc<Tunnel>, load: Load) -> Self {
        Self { tunnel: Some(tunnel), load: Some(load) }
    }

    /// Counts the call alone, where tests have no tunnel.
    #[cfg(test)]
    pub(crate) fn of_load(load: Load) -> Self {
        Self { tunnel: None, load: Some(load) }
    }

    /// Returns the datagrams of the tunnel.
    pub(super) fn datagrams(&self) -> Option<&Datagrams> {
        self.tunnel.as_ref().map(|tunnel| &tunnel.datagrams)
    }

    /// Returns what takes notes of the call.
    pub(crate) fn observer(&self) -> Option<&Observer> {
        self.load.as_ref().map(Load::observer)
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        Self { tunnel: self.tunnel.clone(), load: None }
    }
}

impl Tunnel {
    fn is_usable(&self) -> bool {
        let ends = self.not_after.min(self.peer.not_after);
        self.connection.close_reason().is_none() && clock::wall_at_tick().plus(CERTIFICATE_MARGIN) < ends
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

#[derive(Debug)]
struct Slot {
    dialled: OnceCell<Result<Rc<Tunnel>, (ConnectError, Instant)>>,
    /// Ends the dial: its node has failed.
    given_up: CancellationToken,
    used_at: Cell<Instant>,
}

impl Slot {
    fn new() -> Rc<Self> {
        Rc::new(Self { dialled: OnceCell::new(), given_up: CancellationToken::new(), used_at: Cell::new(clock::now()) })
    }

    /// Tells whether a new asker is served by this slot.
    fn is_current(&self) -> bool {
        match self.dialled.get() {
            None => !self.given_up.is_cancelled(),
            Some(Ok(tunnel)) => tunnel.is_usable(),
            Some(Err((_, at))) => clock::now() < *at + FAILED_FOR,
        }
    }
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Tunnels {
    slots: RefCell<HashMap<TunnelKey, Rc<Slot>>>,
    metrics: ProxyMetrics,
    open: OpenTunnels,
    paths: Rc<Paths>,
}

impl Tunnels {
    /// Holds nothing yet.
    pub(crate) fn new(metrics: ProxyMetrics, open: OpenTunnels, paths: Rc<Paths>) -> Self {
        Self { slots: RefCell::default(), metrics, open, paths }
    }

    /// Returns the tunnel of `key`; dials it if there is none, together with all who ask meanwhile.
    ///
    /// # Cancel safety
    /// Cancelling the one who dials lets the next who waits dial.
    pub(crate) async fn get(&self, key: &TunnelKey, endpoint: &WorkerEndpoint) -> Result<Rc<Tunnel>, ConnectError> {
        let slot = self.slot(key);
        let dialled = slot.dialled.get_or_init(|| self.dial(key, endpoint, &slot.given_up)).await;
        dialled.clone().map_err(|(error, _)| error)
    }

    /// Returns the tunnel of `key` if it is open and may take a stream.
    pub(crate) fn opened(&self, key: &TunnelKey, now: Instant) -> Option<Rc<Tunnel>> {
        let slots = self.slots.borrow();
        let slot = slots.get(key)?;
        let Some(Ok(tunnel)) = slot.dialled.get() else { return None };
        tunnel.is_usable().then(|| {
            slot.used_at.set(now);
            Rc::clone(tunnel)
        })
    }

    /// Forgets `tunnel`, so that the next who asks dials anew.
    pub(crate) fn forget(&self, key: &TunnelKey, tunnel: &Rc<Tunnel>) {
        let mut slots = self.slots.borrow_mut();
        let is_same = |slot: &Rc<Slot>| matches!(slot.dialled.get(), Some(Ok(held)) if Rc::ptr_eq(held, tunnel));
        if slots.get(key).is_some_and(is_same) {
            slots.remove(key);
        }
    }

    /// Returns the keys of the tunnels that are open.
    pub(crate) fn keys(&self) -> Vec<TunnelKey> {
        let slots = self.slots.borrow();
        let is_open = |slot: &Rc<Slot>| matches!(slot.dialled.get(), Some(Ok(_)));
        slots.iter().filter(|(_, slot)| is_open(slot)).map(|(key, _)| key.clone()).collect()
    }

    /// Ends the dials to lives that `has_failed` names: who waits for one hears of it now, and may ask for another instance.
    pub(crate) fn give_up_dials(&self, has_failed: impl Fn(&TunnelKey) -> bool) {
        for (key, slot) in &*self.slots.borrow() {
            if slot.dialled.get().is_none() && has_failed(key) {
                slot.given_up.cancel();
            }
        }
    }

    /// Returns the open tunnels of `source` to `nodes`.
    pub(crate) fn open(&self, source: Option<&ServiceName>, nodes: &[&NodeName]) -> Vec<OpenTunnel> {
        let slots = self.slots.borrow();
        let of = slots.iter().filter(|(key, _)| key.source.as_ref() == source && nodes.contains(&&key.node));
        let open = of.filter_map(|(key, slot)| match slot.dialled.get() {
            Some(Ok(tunnel)) if tunnel.connection.close_reason().is_none() => Some(OpenTunnel {
                source: key.source.clone(),
                peer: tunnel.peer.id.clone(),
                addr: key.addr,
                scope: tunnel.peer.scope.clone(),
                not_after: tunnel.not_after.min(tunnel.peer.not_after),
            }),
            _ => None,
        });
        open.collect()
    }

    /// Closes the tunnel of `key` with all its streams.
    pub(crate) fn close(&self, key: &TunnelKey, code: quinn::VarInt, reason: &str) {
        let slot = self.slots.borrow_mut().remove(key);
        if let Some(Ok(tunnel)) = slot.as_ref().and_then(|slot| slot.dialled.get()) {
            tunnel.connection.close(code, reason.as_bytes());
        }
    }

    /// Lets go of tunnels that nobody used lately and of old failures.
    pub(crate) fn sweep(&self) {
        let now = clock::now();
        self.slots.borrow_mut().retain(|_, slot| {
            slot.dialled.get().is_none() || (slot.is_current() && now < slot.used_at.get() + UNUSED_FOR)
        });
    }

    /// Lets go of all.
    pub(crate) fn clear(&self) {
        self.slots.borrow_mut().clear();
    }

    fn slot(&self, key: &TunnelKey) -> Rc<Slot> {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get(key).filter(|slot| slot.is_current()) {
            slot.used_at.set(clock::now());
            return Rc::clone(slot);
        }
        if slots.len() >= TUNNELS_MAX && !slots.contains_key(key) {
            let oldest = slots.iter().min_by_key(|(_, slot)| slot.used_at.get()).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                slots.remove(&oldest);
            }
        }
        let slot = Slot::new();
        slots.insert(key.clone(), Rc::clone(&slot));
        slot
    }

    async fn dial(
        &self,
        key: &TunnelKey,
        endpoint: &WorkerEndpoint,
        given_up: &CancellationToken,
    ) -> Result<Rc<Tunnel>, (ConnectError, Instant)> {
        let dialled = tokio::select! {
            dialled = endpoint.dial(key.addr, &key.node, key.source.as_ref(), DIAL_TIMEOUT) => dialled,
            () = given_up.cancelled() => Err(ConnectError::NodeFailed { addr: key.addr, node: key.node.clone() }),
        };
        match dialled {
            Ok(Dialled { connection, peer, not_after, live }) => {
                self.metrics.handshakes.with_label_values(&[DIALER]).inc();
                let gauge = self.metrics.tunnels.with_label_values(&[DIALER]);
                gauge.inc();
                let listed = self.open.add(OpenTunnel {
                    source: key.source.clone(),
                    peer: peer.id.clone(),
                    addr: key.addr,
                    scope: peer.scope.clone(),
                    not_after: peer.not_after,
                });
                let datagrams = Datagrams::of(&connection, &self.metrics);
                let watched = self.paths.watch(&connection, DIALER, &key.node);
                Ok(Rc::new(Tunnel {
                    connection,
                    peer,
                    datagrams,
                    not_after,
                    gauge,
                    _listed: listed,
                    _watched: watched,
                    _live: live,
                }))
            }
            Err(error) => {
                self.metrics.dial_failures.with_label_values(&[error.kind()]).inc();
                Err((error, clock::now()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_that_nobody_waits_for_when_its_node_fails_is_not_taken_up_once_the_node_is_back() {
        let slot = Slot::new();
        assert!(slot.is_current());
        slot.given_up.cancel();
        assert!(!slot.is_current());
    }
}

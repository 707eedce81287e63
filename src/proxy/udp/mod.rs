//! UDP services: datagrams of local apps through the tunnels of the worker, and the answers back.
//!
//! ```text
//!   app -> upstream port -> outbound: FlowTable --stream: preamble, status--> inbound: may it? -> socket, connected
//!                              | source address = flow                           | to the instance
//!                              `======= DATAGRAM frame: flow's id, payload ======'-> app
//! ```
//!
//! A flow is what one source address of a local app sends to one upstream port. One bidirectional stream stands for it, as
//! in CONNECT-UDP (RFC 9298 §2): its preamble asks, its status answers, and the flow ends with the stream. So flows are
//! authorised, bounded, cut by changed intentions and drained by what does that for TCP; the stream carries no payload.
//! Invariants: no datagram leaves the caller's agent before the destination has admitted its flow, and none reaches the
//! app otherwise; datagrams are neither split, joined, repeated nor sent again; all that fills has a bound.
//! Not here: which instance takes a flow (`routing`), the order of use and the bounds (`table`), what datagrams leave to
//! the tunnel's streams (`share`).

mod carrier;
pub(super) mod inbound;
mod metrics;
pub(super) mod outbound;
mod ports;
mod share;
mod table;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(super) use self::carrier::Datagrams;
pub(super) use self::metrics::UdpMetrics;
pub(super) use self::ports::{Ports, Sockets};

use self::metrics::UdpEdges;
use self::table::FlowTable;
use super::worker::Slot;
use crate::model::NodeName;

/// Silence after which a flow ends, both ways together: Envoy's `idle_timeout` of its UDP proxy.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);
/// While an agent drains, a flow that is silent for this long has had its answer.
const DRAIN_IDLE: Duration = Duration::from_secs(2);
/// Flows of one worker's local ports together, each about 5 KB and a stream: half of what the worker carries of TCP.
const FLOWS_MAX: usize = 8_192;
/// Flows of one port and worker: the destination takes as many of one node.
const FLOWS_PER_PORT_MAX: usize = 4_096;
/// Flows to this host's apps, over all workers, each a descriptor: half of the connections that two workers may have.
const FLOWS_ACCEPTED_MAX: usize = 16_384;
/// Flows of one peer node among them: a quarter, so that it takes several peers to take them all.
const FLOWS_PER_PEER_MAX: usize = FLOWS_ACCEPTED_MAX / 4;
/// Datagrams that wait for one flow to open: a round trip or a handshake of an app that sends one per 20 ms.
const WAITING_MAX: usize = 16;
/// Bytes that wait for the flows of one port to open.
const WAITING_BYTES_MAX: usize = 256 << 10;
/// Datagrams taken from a socket before other tasks have their turn.
const BATCH: usize = 64;
/// Bytes taken from a socket before other tasks have their turn: what is taken leaves before the tunnel has no room for more.
const BATCH_BYTES: usize = share::AHEAD_BYTES / 2;
/// The largest payload that UDP has.
const PAYLOAD_BYTES_MAX: usize = 65_507;

/// The flows of one port.
type Flows = FlowTable<Rc<outbound::Flow>, Slot>;

/// The flows to the apps of this host. Workers share it: its lock is taken as a flow begins and ends, never for a datagram.
#[derive(Debug, Default)]
pub(super) struct Accepted(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    /// Of those that have one.
    per_peer: BTreeMap<NodeName, usize>,
}

impl Accepted {
    /// Counts a flow of `peer` while what is returned lives; none if there are as many as there may be.
    fn take(self: &Arc<Self>, peer: &NodeName) -> Option<Place> {
        let mut counts = self.counts();
        let of_peer = counts.per_peer.get(peer).copied().unwrap_or_default();
        if counts.all >= FLOWS_ACCEPTED_MAX || of_peer >= FLOWS_PER_PEER_MAX {
            return None;
        }
        counts.all += 1;
        counts.per_peer.insert(peer.clone(), of_peer + 1);
        Some(Place { accepted: Arc::clone(self), peer: peer.clone() })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A counted flow; given back when it is dropped.
struct Place {
    accepted: Arc<Accepted>,
    peer: NodeName,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.accepted.counts();
        counts.all = counts.all.saturating_sub(1);
        match counts.per_peer.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.per_peer.remove(&self.peer)),
        }
    }
}

/// What a worker holds for UDP.
pub(super) struct UdpState {
    edges: UdpEdges,
    /// Flows of local ports.
    opened: Rc<Cell<usize>>,
    /// Flows to the apps of this host.
    accepted: Arc<Accepted>,
    /// Where a datagram lies between socket and tunnel; no task keeps it over an await.
    buffer: RefCell<Box<[u8]>>,
}

impl UdpState {
    /// Holds nothing yet; all workers share `accepted`.
    pub(super) fn new(metrics: UdpMetrics, accepted: Arc<Accepted>) -> Self {
        Self { edges: UdpEdges::new(metrics), opened: Rc::default(), accepted, buffer: RefCell::default() }
    }

    /// Lets go of handles of metrics that are not used.
    pub(super) fn let_go(&self) {
        self.edges.let_go();
    }

    /// Reads datagrams by `read`, which says how long each is, until it fails or a batch is read; none: one was.
    /// The buffer takes no memory until the first datagram.
    fn read_batch<E>(&self, mut read: impl FnMut(&mut [u8]) -> Result<usize, E>) -> Option<E> {
        let mut buffer = self.buffer.borrow_mut();
        if buffer.is_empty() {
            *buffer = vec![0; PAYLOAD_BYTES_MAX].into();
        }
        let mut bytes = 0;
        for _ in 0..BATCH {
            match read(&mut buffer) {
                Ok(read) => bytes += read,
                Err(end) => return Some(end),
            }
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn a_batch_ends_with_its_bytes_its_number_or_the_socket() {
        let state = UdpState::new(UdpMetrics::register(&Metrics::new()).unwrap(), Arc::default());
        let read = |sizes: &mut dyn Iterator<Item = usize>| {
            let mut count = 0;
            let ended = state.read_batch(|_| sizes.next().inspect(|_| count += 1).ok_or("empty"));
            (count, ended)
        };
        assert_eq!(read(&mut std::iter::repeat(1)), (BATCH, None));
        assert_eq!(read(&mut std::iter::repeat(BATCH_BYTES / 2)), (2, None));
        assert_eq!(read(&mut std::iter::repeat_n(0, 3)), (3, Some("empty")));
    }

    #[test]
    fn the_flows_of_all_workers_together_are_bounded_and_a_peer_takes_a_quarter_of_them() {
        let accepted = Arc::<Accepted>::default();
        let metrics = UdpMetrics::register(&Metrics::new()).unwrap();
        let workers = [(); 3].map(|()| UdpState::new(metrics.clone(), Arc::clone(&accepted)));
        // At one worker and another, as its tunnels meet them.
        let mut turns = workers.iter().cycle();
        let mut take = |peer: &str| turns.next().unwrap().accepted.take(&peer.parse().unwrap());
        let mut held = Vec::new();
        for peer in ["a", "b", "c", "d"] {
            let before = held.len();
            held.extend(std::iter::from_fn(|| take(peer)));
            assert_eq!(held.len() - before, FLOWS_PER_PEER_MAX, "{peer}");
        }
        assert_eq!(held.len(), FLOWS_ACCEPTED_MAX);
        assert!(take("e").is_none(), "in all");
        held.pop();
        assert!(take("e").is_some());
        drop(held);
        assert_eq!(accepted.counts().all, 0);
        assert!(accepted.counts().per_peer.is_empty(), "who has no flow is forgotten");
        assert!(take("a").is_some());
    }
}

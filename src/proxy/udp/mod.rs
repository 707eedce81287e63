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
mod share;
mod table;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

pub(super) use self::carrier::Datagrams;
pub(super) use self::metrics::UdpMetrics;

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
/// Flows to one worker's apps, each a descriptor: half of the connections that it may have.
const FLOWS_ACCEPTED_MAX: usize = 8_192;
/// Flows of one peer node to one worker's apps: half of them all, so that no peer takes them all.
const FLOWS_PER_PEER_MAX: usize = FLOWS_ACCEPTED_MAX / 2;
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

/// What a worker holds for UDP.
pub(super) struct UdpState {
    edges: UdpEdges,
    /// Flows of local ports.
    opened: Rc<Cell<usize>>,
    /// Flows to local apps.
    accepted: Rc<Cell<usize>>,
    /// The same, by peer node.
    per_peer: RefCell<BTreeMap<NodeName, Rc<Cell<usize>>>>,
    /// Where a datagram lies between socket and tunnel; no task keeps it over an await.
    buffer: RefCell<Box<[u8]>>,
}

impl UdpState {
    /// Holds nothing yet.
    pub(super) fn new(metrics: UdpMetrics) -> Self {
        Self {
            edges: UdpEdges::new(metrics),
            opened: Rc::default(),
            accepted: Rc::default(),
            per_peer: RefCell::default(),
            buffer: RefCell::default(),
        }
    }

    /// Lets go of handles of metrics that are not used.
    pub(super) fn let_go(&self) {
        self.edges.let_go();
    }

    /// Counts a flow of `peer` while the slots live; none if there are as many as there may be.
    fn accept(&self, peer: &NodeName) -> Option<(Slot, Slot)> {
        let mut per_peer = self.per_peer.borrow_mut();
        if !per_peer.contains_key(peer) {
            per_peer.retain(|_, count| count.get() > 0);
            per_peer.insert(peer.clone(), Rc::default());
        }
        let of_peer = Slot::take(per_peer.get(peer)?, FLOWS_PER_PEER_MAX)?;
        Some((of_peer, Slot::take(&self.accepted, FLOWS_ACCEPTED_MAX)?))
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
        let state = UdpState::new(UdpMetrics::register(&Metrics::new()).unwrap());
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
    fn no_peer_takes_all_flows_and_places_come_back() {
        let state = UdpState::new(UdpMetrics::register(&Metrics::new()).unwrap());
        let [a, b, c] = ["a", "b", "c"].map(|name| name.parse::<NodeName>().unwrap());
        let mut held: Vec<_> = std::iter::from_fn(|| state.accept(&a)).collect();
        assert_eq!(held.len(), FLOWS_PER_PEER_MAX);
        let of_b: Vec<_> = std::iter::from_fn(|| state.accept(&b)).collect();
        assert_eq!(of_b.len(), FLOWS_ACCEPTED_MAX - FLOWS_PER_PEER_MAX);
        assert!(state.accept(&c).is_none(), "in all");
        held.pop();
        assert!(state.accept(&c).is_some());
        drop((held, of_b));
        assert!(state.accept(&"d".parse().unwrap()).is_some());
        assert_eq!(state.per_peer.borrow().len(), 1, "who has no flow is forgotten");
    }
}

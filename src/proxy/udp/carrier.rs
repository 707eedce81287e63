//! The datagrams of one tunnel: which flow each belongs to, and where it leaves the mesh.
//!
//! ```text
//!   flow -> Registered::send: has the tunnel room? id | payload ==DATAGRAM frame==> reader -> exits[id] -> socket
//! ```
//!
//! A flow's id is the index of the stream that stands for it (RFC 9297 §2.1 calls it the quarter stream ID), as a varint:
//! it means something within its connection alone and is never used twice there.
//! Invariants: a datagram leaves by the exit that its flow registered, to no address that it could name; whole, as one
//! datagram, or not at all; what belongs to no flow is counted and dropped at once, so that nothing piles up; datagrams
//! leave the tunnel's streams their part (`share`).
//! Not here: who may have a flow (`inbound`), which instance it goes to (`outbound`).

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use foldhash::HashMap;
use prometheus::IntCounter;
use quinn::SendDatagramError;
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Flows;
use super::metrics::UdpEdge;
use super::share::Share;
use super::table::Dropped;
use crate::clock;
use crate::proxy::head::{put_varint, take_varint};
use crate::proxy::metrics::ProxyMetrics;
use crate::proxy::worker::spawn_abortable;
use crate::transport::{Departures, departures};

/// Longest id on the wire.
const ID_BYTES_MAX: usize = 8;

/// Where the datagrams of a flow leave the mesh.
pub(super) enum Exit {
    /// At the caller: back to the app's source address.
    Caller {
        /// The upstream port's.
        socket: Rc<UdpSocket>,
        to: SocketAddr,
        number: u64,
        /// The flow counts as used.
        flows: Weak<RefCell<Flows>>,
        edge: Rc<UdpEdge>,
    },
    /// At the called app: by a socket that is connected to it.
    App { socket: Rc<UdpSocket>, pulse: Rc<Pulse>, edge: Rc<UdpEdge> },
}

/// What happens to a flow at the called app's side.
pub(super) struct Pulse {
    /// When a datagram went through last.
    pub(super) used_at: Cell<Instant>,
    /// Wakes once the app's host said that nobody has the port.
    pub(super) refused: Notify,
}

impl Exit {
    fn deliver(&self, payload: &[u8], now: Instant) {
        let (sent, edge) = match self {
            Self::Caller { socket, to, number, flows, edge } => {
                let sent = socket.try_send_to(payload, *to);
                if let (Ok(_), Some(flows)) = (&sent, flows.upgrade()) {
                    flows.borrow_mut().touch(*to, *number, now);
                }
                (sent, edge)
            }
            Self::App { socket, pulse, edge } => {
                let sent = socket.try_send(payload);
                match &sent {
                    Ok(_) => pulse.used_at.set(now),
                    // It is about an earlier datagram (udp(7)).
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => pulse.refused.notify_one(),
                    Err(_) => {}
                }
                (sent, edge)
            }
        };
        match sent {
            Ok(_) => edge.down(payload.len()),
            Err(_) => edge.dropped(Dropped::Socket, 1),
        }
    }
}

/// What the flows of one tunnel share.
struct Carrier {
    connection: quinn::Connection,
    exits: RefCell<HashMap<u64, Rc<Exit>>>,
    room: RefCell<Room>,
}

/// How much more the tunnel takes; where nobody notes what leaves, quinn's own bound alone.
struct Room {
    departures: Option<Arc<Departures>>,
    share: Share,
}

impl Room {
    fn of(departures: Option<Arc<Departures>>) -> Self {
        Self { departures, share: Share::default() }
    }

    fn admits(&mut self, bytes: usize) -> bool {
        let Some(departures) = &self.departures else { return true };
        self.share.admits(bytes, departures.sent(), departures.drained_at())
    }

    fn is_of(&self, departures: Option<&Arc<Departures>>) -> bool {
        match (&self.departures, departures) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (own, other) => own.is_none() && other.is_none(),
        }
    }
}

impl Carrier {
    /// Tells whether a datagram of `bytes` may go, and counts it.
    fn admits(&self, bytes: usize) -> bool {
        // quinn would drop older ones to make room, and tell nobody.
        if self.connection.datagram_send_buffer_space() < bytes {
            return false;
        }
        let mut room = self.room.borrow_mut();
        if room.admits(bytes) {
            return true;
        }
        // A peer that came to have another address has another path, which counts anew.
        let current = departures(&self.connection);
        if room.is_of(current.as_ref()) {
            return false;
        }
        *room = Room::of(current);
        room.admits(bytes)
    }
}

/// The datagrams of one tunnel, read as long as this lives.
pub(crate) struct Datagrams {
    carrier: Rc<Carrier>,
    reader: AbortHandle,
}

/// A flow that gets the datagrams of its id while this lives; to be held no longer than the tunnel's [`Datagrams`].
pub(super) struct Registered {
    carrier: Rc<Carrier>,
    id: u64,
}

impl Datagrams {
    /// Reads the datagrams of `connection`, on the worker's thread.
    pub(crate) fn of(connection: &quinn::Connection, metrics: &ProxyMetrics) -> Self {
        let room = RefCell::new(Room::of(departures(connection)));
        let carrier = Rc::new(Carrier { connection: connection.clone(), exits: RefCell::default(), room });
        let reading = read(Rc::clone(&carrier), metrics.stray_datagrams.clone());
        let reader = spawn_abortable(&metrics.panics, reading);
        Self { carrier, reader }
    }

    /// Has the datagrams of flow `id` leave by `exit`.
    pub(super) fn register(&self, id: u64, exit: Exit) -> Registered {
        self.carrier.exits.borrow_mut().insert(id, Rc::new(exit));
        Registered { carrier: Rc::clone(&self.carrier), id }
    }
}

impl fmt::Debug for Datagrams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datagrams").field("flows", &self.carrier.exits.borrow().len()).finish_non_exhaustive()
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Reads datagrams until the connection ends. What is buffered is read in one go: more comes only once other tasks ran.
async fn read(carrier: Rc<Carrier>, stray: IntCounter) {
    while let Ok(mut payload) = carrier.connection.read_datagram().await {
        let id = take_varint(&mut payload);
        let exit = id.and_then(|id| carrier.exits.borrow().get(&id).cloned());
        match exit {
            Some(exit) => exit.deliver(&payload, clock::now()),
            None => stray.inc(),
        }
    }
}

impl Registered {
    /// Sends a datagram of the flow, and counts it.
    pub(super) fn send(&self, payload: &[u8], edge: &UdpEdge) {
        let datagram = encode(self.id, payload);
        let (carrier, bytes) = (&self.carrier, datagram.len());
        let too_large = || {
            let overhead = bytes - payload.len();
            let bytes_max = carrier.connection.max_datagram_size().unwrap_or_default().saturating_sub(overhead);
            (payload.len() > bytes_max).then_some(bytes_max)
        };
        if !carrier.admits(bytes) {
            // What never could go is dropped for its size.
            return match too_large() {
                Some(bytes_max) => edge.oversize(payload.len(), bytes_max),
                None => edge.dropped(Dropped::Congested, 1),
            };
        }
        match carrier.connection.send_datagram(datagram) {
            Ok(()) => return edge.up(payload.len()),
            Err(SendDatagramError::TooLarge) => edge.oversize(payload.len(), too_large().unwrap_or_default()),
            // The tunnel is lost, which ends the flow.
            Err(_) => edge.dropped(Dropped::NoInstance, 1),
        }
        carrier.room.borrow_mut().share.give_back(bytes);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let exit = self.carrier.exits.borrow_mut().remove(&self.id);
        // Its handles may be the last: outside the borrow.
        drop(exit);
    }
}

fn encode(id: u64, payload: &[u8]) -> Bytes {
    let mut datagram = BytesMut::with_capacity(ID_BYTES_MAX + payload.len());
    put_varint(&mut datagram, id);
    datagram.put_slice(payload);
    datagram.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_is_frozen() {
        for (id, start) in [
            (0, &[0][..]),
            (63, &[63]),
            (64, &[0x40, 64]),
            (16_384, &[0x80, 0, 0x40, 0]),
            (1 << 30, &[0xc0, 0, 0, 0, 0x40, 0, 0, 0]),
        ] {
            let mut datagram = encode(id, b"payload");
            assert_eq!(&datagram[..], [start, b"payload"].concat());
            assert_eq!((take_varint(&mut datagram), &datagram[..]), (Some(id), &b"payload"[..]));
        }
        let mut cut_off = Bytes::from_static(&[0x80, 1]);
        assert_eq!(take_varint(&mut cut_off), None);
    }
}

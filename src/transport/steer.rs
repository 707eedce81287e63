//! Which socket of the mesh port a datagram belongs to: the first byte of the destination connection id says it.
//!
//! ```text
//!   byte:  0 ........ 127 | 128 ...... 191 | 192 ...... 255
//!          worker byte % N|  control: gossip|  control: join
//! ```
//!
//! The kernel runs [`program`] on each datagram; each endpoint hands out ids that begin with its own byte
//! ([`SteeringIds`]), and a dialer's first datagram carries a byte of the plane that it wants ([`first_id`]); those of tunnels
//! are dealt over the peer's workers ([`tunnel_id`]).
//! Invariant: a byte and a number of workers lead to one socket for as long as the sockets are open, so a peer that
//! changes its address keeps its worker.
//!
//! Not here: the sockets (`bind`). A datagram that is no QUIC lands anywhere and is dropped there, a short one before.

use std::io;
use std::net::UdpSocket;
use std::time::Duration;

use nix::libc::{self, sock_filter};
use quinn::{ConnectionId, ConnectionIdGenerator};
use rand::RngExt;

use crate::pki::Plane;

/// Length of every connection id, in bytes: one steering byte and 7 random ones; RFC 9000 §7.2 asks for 8 at least.
const ID_BYTES: usize = 8;
/// First byte that leads to the control socket.
const CONTROL_FROM: u8 = 128;
/// First byte of a dialer that wants the join plane; the control endpoint picks the TLS side by it.
const JOIN_FROM: u8 = 192;
/// Most workers: a worker's number is a byte below [`CONTROL_FROM`].
pub(crate) const WORKERS_MAX: usize = CONTROL_FROM as usize;

/// Which endpoint an id leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// The data-plane worker `index` of `workers`.
    Worker {
        /// Below `workers`.
        index: u8,
        /// 1 to [`WORKERS_MAX`].
        workers: u8,
    },
    /// The control endpoint.
    Control,
}

impl Lane {
    /// Returns a random first byte that leads here.
    fn first_byte(self) -> u8 {
        let random: u8 = rand::rng().random();
        match self {
            Self::Control => random | CONTROL_FROM,
            Self::Worker { index, workers } => {
                let workers = workers.max(1);
                // How many bytes below CONTROL_FROM leave the remainder `index`.
                let choices = (CONTROL_FROM - 1 - index.min(CONTROL_FROM - 1)) / workers + 1;
                index + workers * (random % choices)
            }
        }
    }
}

/// Makes connection ids that lead back to one endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SteeringIds(pub(crate) Lane);

impl ConnectionIdGenerator for SteeringIds {
    fn generate_cid(&mut self) -> ConnectionId {
        id_with(self.0.first_byte())
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Makes the destination id of a dialer's first datagram; that of a tunnel leads to a worker by chance, while
/// [`tunnel_id`] deals them.
pub(crate) fn first_id(plane: Plane) -> ConnectionId {
    let random: u8 = rand::rng().random();
    id_with(match plane {
        Plane::Tunnel => random % CONTROL_FROM,
        Plane::Gossip => CONTROL_FROM + random % (JOIN_FROM - CONTROL_FROM),
        Plane::Join => JOIN_FROM + random % (u8::MAX - JOIN_FROM + 1),
    })
}

/// Makes the destination id of the first datagram of a tunnel that `lane` dials.
///
/// The workers' tunnels of one `bundle` (any number that is the same for all workers: of one peer, as one source) lead to
/// as many different workers as the peer has; by chance, two of two meet one worker in every second bundle, for as long as
/// the tunnels last. Bundles begin anywhere, so that who has many peers loads all of their workers.
pub(crate) fn tunnel_id(lane: Lane, bundle: u64) -> ConnectionId {
    let (index, workers) = match lane {
        Lane::Worker { index, workers } => (index, workers.clamp(1, CONTROL_FROM)),
        Lane::Control => (0, 1),
    };
    // The workers' bytes follow each other and end below CONTROL_FROM, so that the remainders by which the peer's sockets are
    // chosen follow each other too, however many it has.
    let [begin, ..] = bundle.to_le_bytes();
    id_with(begin % (CONTROL_FROM - workers + 1) + index)
}

/// Tells which plane of the control endpoint a dialer wants, by the id of its first datagram.
pub(crate) fn control_plane(first: &[u8]) -> Plane {
    if first.first().is_some_and(|byte| *byte >= JOIN_FROM) { Plane::Join } else { Plane::Gossip }
}

fn id_with(first: u8) -> ConnectionId {
    let mut id: [u8; ID_BYTES] = rand::rng().random();
    if let Some(byte) = id.first_mut() {
        *byte = first;
    }
    ConnectionId::new(&id)
}

/// The steering program for `workers` workers; the control socket is the one bound after them.
///
/// A load past the end of a datagram makes the kernel return 0: the first worker drops what is no QUIC.
fn program(workers: u32) -> [sock_filter; 9] {
    [
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0),
        // The header form bit (RFC 9000 §17): a long header holds its destination id at byte 6, a short one at 1.
        instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0x80, 0, 2),
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 6),
        instruction(libc::BPF_JMP | libc::BPF_JA, 1, 0, 0),
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 1),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, u32::from(CONTROL_FROM), 2, 0),
        statement(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, workers),
        statement(libc::BPF_RET | BPF_A, 0),
        statement(libc::BPF_RET | libc::BPF_K, workers),
    ]
}

/// Has the kernel drop what arrives on `socket` and is too short for QUIC, without waking anybody.
///
/// Peers ask the port a few times a second whether anybody has it (`port`), and such a question wants no answer but the
/// refusal of a host where nobody does.
pub(super) fn drop_short(socket: &UdpSocket) -> io::Result<()> {
    let (least, accept, drop) = (UDP_HEADER_BYTES + QUIC_BYTES_MIN, u32::MAX, 0);
    socket2::SockRef::from(socket).attach_filter(
        &[
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0),
            instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, least, 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, accept),
            statement(libc::BPF_RET | libc::BPF_K, drop),
        ]
        .map(|one| socket2::SockFilter::new(one.code, one.jt, one.jf, one.k)),
    )
}

/// A filter of a UDP socket sees the packet from its UDP header on.
const UDP_HEADER_BYTES: u32 = 8;
/// The shortest packet of QUIC, a stateless reset (RFC 9000 §10.3).
const QUIC_BYTES_MIN: u32 = 21;

/// The accumulator as the source of a `RET` (linux/filter.h); libc has no name for it.
const BPF_A: u32 = 0x10;

fn statement(code: u32, k: u32) -> sock_filter {
    instruction(code, k, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or_default(), jt, jf, k }
}

/// Attaches the steering program to the group of sockets that `socket` belongs to.
pub(super) fn attach(socket: &UdpSocket, workers: usize) -> io::Result<()> {
    let workers = u32::try_from(workers).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut filter = program(workers);
    let len = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::AttachReusePortCbpf, &program)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_id_leads_back_to_its_endpoint() {
        for workers in [1_u8, 2, 3, 7, 64, 127, 128] {
            for index in [0, workers / 2, workers - 1] {
                let mut ids = SteeringIds(Lane::Worker { index, workers });
                for _ in 0..500 {
                    let byte = ids.generate_cid()[0];
                    assert!(byte < CONTROL_FROM && byte % workers == index, "{byte} of {workers} for {index}");
                }
            }
        }
        let mut ids = SteeringIds(Lane::Control);
        assert!((0..500).all(|_| ids.generate_cid()[0] >= CONTROL_FROM));
    }

    #[test]
    fn the_tunnels_of_one_bundle_lead_to_as_many_workers_as_there_are() {
        for (dialling, serving) in [(2, 2), (3, 3), (6, 6), (4, 2), (2, 4), (5, 12), (96, 96), (128, 128), (1, 2)] {
            for bundle in 0..500 {
                let lane = |index| Lane::Worker { index, workers: dialling };
                let met: HashSet<u8> = (0..dialling).map(|index| tunnel_id(lane(index), bundle)[0] % serving).collect();
                assert_eq!(met.len(), usize::from(dialling.min(serving)), "{dialling} of bundle {bundle} to {serving}");
                assert!((0..dialling).all(|index| tunnel_id(lane(index), bundle)[0] < CONTROL_FROM));
            }
        }
        let begins: HashSet<u8> =
            (0..500).map(|bundle| tunnel_id(Lane::Worker { index: 0, workers: 2 }, bundle)[0] % 2).collect();
        assert_eq!(begins.len(), 2, "one worker each: both are met");
    }

    #[test]
    fn a_dialers_first_id_names_its_plane() {
        for _ in 0..500 {
            assert!(first_id(Plane::Tunnel)[0] < CONTROL_FROM);
            let gossip = first_id(Plane::Gossip);
            assert!(gossip[0] >= CONTROL_FROM && control_plane(&gossip) == Plane::Gossip);
            assert_eq!(control_plane(&first_id(Plane::Join)), Plane::Join);
        }
    }
}

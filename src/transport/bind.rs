//! Binds the mesh port once per endpoint.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::refusals::{MeshPort, Refusals};
use super::steer::{self, WORKERS_MAX};

/// Socket buffers asked for, each way: the default of 208 KiB loses packets at bulk rates (1.3x measured).
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// The mesh port's sockets: one per data-plane worker, the last for control (gossip, join).
#[derive(Debug)]
pub struct BoundSockets {
    /// In order of worker.
    pub workers: Vec<MeshPort>,
    /// Gossip and join.
    pub control: MeshPort,
    /// Where they are bound.
    pub addr: SocketAddr,
    /// What the kernel gave of [`SOCKET_BUFFER_BYTES`].
    pub buffers: SocketBuffers,
}

/// The smallest buffers of the mesh port's sockets, in bytes: less than asked costs packets under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketBuffers {
    /// `net.core.wmem_max` bounds it.
    pub send_bytes: usize,
    /// `net.core.rmem_max` bounds it.
    pub receive_bytes: usize,
}

impl SocketBuffers {
    /// Tells whether the kernel gave what was asked for.
    pub fn are_full(self) -> bool {
        self.send_bytes >= SOCKET_BUFFER_BYTES && self.receive_bytes >= SOCKET_BUFFER_BYTES
    }
}

/// Why the mesh port cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else has the port.
    #[error("mesh port {addr} (UDP) is in use: another agent runs here, or give this one its own address with -bind")]
    InUse {
        /// The address.
        addr: SocketAddr,
    },
    /// The address is not this host's, or the kernel refused an option.
    #[error("cannot bind the mesh port {addr} (UDP)")]
    Refused {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The number of workers is outside 1 to 128.
    #[error("{workers} data-plane workers asked for; 1 to {WORKERS_MAX} are possible")]
    Workers {
        /// Their number.
        workers: usize,
    },
    /// The TLS side of the endpoint cannot be made.
    #[error("cannot prepare TLS for the mesh port {addr}: {reason}")]
    Tls {
        /// The address.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
}

/// Binds `addr` once per worker and once for control (SO_REUSEPORT, steered by connection id).
///
/// Port 0 takes a free port, the same for all.
///
/// # Errors
/// [`BindError`]; nothing stays bound.
pub fn bind(addr: SocketAddr, workers: usize) -> Result<BoundSockets, BindError> {
    if !(1..=WORKERS_MAX).contains(&workers) {
        return Err(BindError::Workers { workers });
    }
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { addr },
        _ => BindError::Refused { addr, source },
    };
    // With SO_REUSEPORT alone a second agent of the same user would share the port in silence.
    let addr = socket(addr, Sharing::Exclusive).and_then(|probe| probe.local_addr()).map_err(refused)?;
    let first = socket(addr, Sharing::Shared).map_err(refused)?;
    // The program is attached before the others join, and the order of binding is the index that it returns.
    steer::attach(&first, workers).map_err(refused)?;
    let mut sockets = vec![first];
    for _ in 0..workers {
        sockets.push(socket(addr, Sharing::Shared).map_err(refused)?);
    }
    let buffers = buffers(&sockets).map_err(refused)?;
    let refusals = Refusals::default();
    let mut ports: Vec<MeshPort> = sockets.into_iter().map(|socket| MeshPort::new(socket, refusals.clone())).collect();
    let control = ports.pop().ok_or(BindError::Workers { workers })?;
    Ok(BoundSockets { workers: ports, control, addr, buffers })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Exclusive,
    Shared,
}

fn socket(addr: SocketAddr, sharing: Sharing) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if sharing == Sharing::Shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    // Root may go beyond the sysctl; anybody else keeps what the line above got.
    let _not_root = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES);
    let _not_root = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SndBufForce, &SOCKET_BUFFER_BYTES);
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Reads back the buffers; the kernel reports twice what it gives to payload (socket(7)).
fn buffers(sockets: &[UdpSocket]) -> io::Result<SocketBuffers> {
    let mut least = SocketBuffers { send_bytes: usize::MAX, receive_bytes: usize::MAX };
    for socket in sockets {
        let socket = socket2::SockRef::from(socket);
        least.send_bytes = least.send_bytes.min(socket.send_buffer_size()? / 2);
        least.receive_bytes = least.receive_bytes.min(socket.recv_buffer_size()? / 2);
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_first_byte_of_the_connection_id_picks_the_socket() {
        const WORKERS: usize = 3;
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), WORKERS).unwrap();
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let sockets: Vec<&UdpSocket> = bound.workers.iter().chain([&bound.control]).map(|port| &port.socket).collect();
        for byte in 0..=255_u8 {
            let want = if byte >= 128 { WORKERS } else { usize::from(byte) % WORKERS };
            let short = [0x40, byte, 9, 9];
            let long = [0xc0, 0, 0, 0, 1, 8, byte, 9];
            for packet in [&short[..], &long[..]] {
                sender.send_to(packet, bound.addr).unwrap();
                // Loopback delivers before send_to returns, so each socket holds what it will ever get.
                for (at, socket) in sockets.iter().enumerate() {
                    let mut buffer = [0; 16];
                    let got = socket.recv(&mut buffer).ok();
                    assert_eq!(got.is_some(), at == want, "byte {byte}, socket {at}");
                }
            }
        }
    }

    #[test]
    fn a_datagram_too_short_to_hold_an_id_goes_to_one_socket() {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), 2).unwrap();
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for packet in [&[0x40][..], &[0xc0, 0, 0][..], &[]] {
            sender.send_to(packet, bound.addr).unwrap();
        }
        let received = |socket: &UdpSocket| (0..3).filter(|_| socket.recv(&mut [0; 16]).is_ok()).count();
        assert_eq!(received(&bound.workers.first().unwrap().socket), 3);
    }

    #[test]
    fn a_second_agent_on_the_port_is_told_that_it_is_in_use() {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), 2).unwrap();
        let error = bind(bound.addr, 2).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }));
        assert!(error.to_string().contains("is in use"), "{error}");
        drop(bound);
    }

    #[test]
    fn the_number_of_workers_is_bounded() {
        let addr = (Ipv4Addr::LOCALHOST, 0).into();
        assert!(matches!(bind(addr, 0), Err(BindError::Workers { workers: 0 })));
        assert!(matches!(bind(addr, 129), Err(BindError::Workers { workers: 129 })));
    }

    #[test]
    fn the_buffers_that_were_given_are_told() {
        let bound = bind((Ipv4Addr::LOCALHOST, 0).into(), 1).unwrap();
        assert!(bound.buffers.send_bytes > 0 && bound.buffers.receive_bytes > 0);
    }
}

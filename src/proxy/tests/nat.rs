//! A network between two nodes: it gives the caller another address whenever it is told, and loses, doubles and swaps packets.
//!
//! ```text
//!   a --> front | back --> b        a dials `front`; b sees `back`, which `migrate` replaces
//! ```

use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;

use rand::RngExt as _;
use rand::rngs::StdRng;
use tokio::net::UdpSocket;
use tokio::sync::Notify;

/// Longest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// The address translation of a router between two nodes.
pub(super) struct Nat {
    front: UdpSocket,
    back: RefCell<Rc<UdpSocket>>,
    server: SocketAddr,
    moved: Notify,
    /// One packet in this many is lost, one doubled, one swapped with the next; none at 0.
    trouble: u32,
    rng: RefCell<StdRng>,
}

/// What became of a packet.
enum Fate {
    Passes,
    Lost,
    Doubled,
    Late,
}

impl Nat {
    /// Leads to `server`.
    pub(super) async fn to(server: SocketAddr, trouble: u32, rng: StdRng) -> Self {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let back = RefCell::new(Rc::new(Self::socket().await));
        Self { front, back, server, moved: Notify::new(), trouble, rng: RefCell::new(rng) }
    }

    /// Where the caller dials.
    pub(super) fn addr(&self) -> SocketAddr {
        self.front.local_addr().unwrap()
    }

    /// Gives the caller a new address; what is on its way to the old one is lost.
    pub(super) async fn migrate(&self) {
        let back = Rc::new(Self::socket().await);
        self.back.replace(back);
        self.moved.notify_one();
    }

    async fn socket() -> UdpSocket {
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
    }

    /// Forwards for ever.
    pub(super) async fn run(&self) {
        let mut caller = None;
        let (mut up, mut down) = (vec![0; DATAGRAM_BYTES_MAX], vec![0; DATAGRAM_BYTES_MAX]);
        let (mut late_up, mut late_down) = (None, None);
        loop {
            let back = Rc::clone(&self.back.borrow());
            // A full socket buffer drops the datagram, as a network does.
            tokio::select! {
                got = self.front.recv_from(&mut up) => {
                    let (bytes, from) = got.unwrap();
                    caller = Some(from);
                    for packet in self.fates(&up[..bytes], &mut late_up) {
                        let _dropped = back.send_to(&packet, self.server).await;
                    }
                }
                got = back.recv_from(&mut down) => {
                    let Ok((bytes, _)) = got else { continue };
                    for packet in self.fates(&down[..bytes], &mut late_down) {
                        let Some(caller) = caller else { continue };
                        let _dropped = self.front.send_to(&packet, caller).await;
                    }
                }
                () = self.moved.notified() => {}
            }
        }
    }

    /// Returns what goes out when `packet` has come in.
    fn fates(&self, packet: &[u8], late: &mut Option<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut out = match self.fate() {
            Fate::Lost => vec![],
            Fate::Doubled => vec![packet.to_vec(); 2],
            Fate::Late if late.is_none() => {
                *late = Some(packet.to_vec());
                return vec![];
            }
            Fate::Passes | Fate::Late => vec![packet.to_vec()],
        };
        out.extend(late.take());
        out
    }

    fn fate(&self) -> Fate {
        if self.trouble == 0 {
            return Fate::Passes;
        }
        match self.rng.borrow_mut().random_range(0..self.trouble) {
            0 => Fate::Lost,
            1 => Fate::Doubled,
            2 => Fate::Late,
            _ => Fate::Passes,
        }
    }
}

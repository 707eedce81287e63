//! Flows from peers to local apps: a socket for each, connected to its instance.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tracing::debug;

use super::carrier::{Datagrams, Exit, Pulse, Registered};
use super::metrics::UdpEdge;
use super::{BATCH, DRAIN_IDLE, IDLE_TIMEOUT};
use crate::clock;
use crate::model::ServiceName;
use crate::pki::PeerIdentity;
use crate::proxy::calls::Ticket;
use crate::proxy::inbound::refuse;
use crate::proxy::metrics::Reporter;
use crate::proxy::preamble::StreamStatus;
use crate::proxy::relay::{CODE_RESET, Sending};
use crate::proxy::worker::Worker;

/// A flow that a peer asks for, and may have.
pub(in crate::proxy) struct FlowCall {
    pub(in crate::proxy) send: quinn::SendStream,
    pub(in crate::proxy) recv: quinn::RecvStream,
    /// What followed the preamble.
    pub(in crate::proxy) rest: Bytes,
    pub(in crate::proxy) app: SocketAddr,
    pub(in crate::proxy) service: ServiceName,
    pub(in crate::proxy) peer: Rc<PeerIdentity>,
    pub(in crate::proxy) datagrams: Rc<Datagrams>,
}

/// How a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The caller ended it, or its tunnel is lost.
    ByCaller,
    /// The app's host says that nobody has the port.
    Refused,
    /// It was silent.
    Idle,
    /// It was silent while this agent drains.
    Drained,
}

/// Carries a flow until it ends, or intentions end it.
pub(in crate::proxy) async fn serve(worker: &Rc<Worker>, call: FlowCall, ticket: Ticket) {
    ticket.unless_cut(pin!(flow(worker, call))).await;
}

async fn flow(worker: &Rc<Worker>, call: FlowCall) {
    let FlowCall { send, mut recv, rest, app, service, peer, datagrams } = call;
    let edge = worker.udp.edges.edge(Reporter::Destination, peer.id.service(), &service);
    let mut counted = edge.open();
    let Some(_place) = worker.udp.accepted.take(&peer.node) else {
        counted.ends("UO");
        debug!(node = %peer.node, %service, "as many flows as there may be: one is refused");
        // The caller tries another instance, or has one of its own flows give way.
        return refuse(send, recv, StreamStatus::Full).await;
    };
    drop(peer);
    let socket = match connect(app).await {
        Ok(socket) => Rc::new(socket),
        Err(error) => {
            counted.ends("UF");
            debug!(%app, %service, %error, "cannot open a socket towards the app");
            return refuse(send, recv, StreamStatus::ConnectFailed).await;
        }
    };
    let mut send = Sending::new(send);
    let pulse = Rc::new(Pulse { used_at: Cell::new(clock::now()), refused: Notify::new() });
    let exit = Exit::App { socket: Rc::clone(&socket), pulse: Rc::clone(&pulse), edge: Rc::clone(&edge) };
    // Before the status: what follows it finds its way.
    let registered = datagrams.register(send.stream().id().index(), exit);
    // Nothing follows the preamble: the datagrams do not come here.
    if !rest.is_empty() || send.stream().write_all(&[StreamStatus::Ok.byte()]).await.is_err() {
        let _gone = recv.stop(CODE_RESET);
        return;
    }
    let ending = App { socket, pulse, registered, edge }.carry(worker, &mut send, &mut recv).await;
    counted.ends(match ending {
        Ending::ByCaller => "-",
        Ending::Refused => "UF",
        Ending::Idle => "SI",
        Ending::Drained => "DR",
    });
    if ending == Ending::Refused {
        // The caller may find another instance; one that is gone needs no answer.
        let _gone = send.stream().write_all(&[StreamStatus::ConnectFailed.byte()]).await;
    }
    send.finish();
    let _gone = recv.stop(CODE_RESET);
}

/// The app's side of an open flow.
struct App {
    socket: Rc<UdpSocket>,
    pulse: Rc<Pulse>,
    registered: Registered,
    edge: Rc<UdpEdge>,
}

impl App {
    /// Carries the app's datagrams until the flow ends; those for the app come by the exit.
    async fn carry(&self, worker: &Worker, send: &mut Sending, recv: &mut quinn::RecvStream) -> Ending {
        let used_at = &self.pulse.used_at;
        let mut idle_max = IDLE_TIMEOUT;
        let mut timer = pin!(tokio::time::sleep_until(used_at.get() + idle_max));
        loop {
            tokio::select! {
                // Its end, a reset, or bytes where there are to be none.
                _ended = recv.read_chunk(1, true) => return Ending::ByCaller,
                readable = self.socket.readable() => match readable.and_then(|()| self.take(worker)) {
                    Ok(true) => tokio::task::yield_now().await,
                    Ok(false) => {}
                    Err(_refused) => return Ending::Refused,
                },
                () = self.pulse.refused.notified() => return Ending::Refused,
                () = &mut timer => {
                    let until = used_at.get() + idle_max;
                    if clock::now() >= until {
                        return if idle_max == IDLE_TIMEOUT { Ending::Idle } else { Ending::Drained };
                    }
                    timer.as_mut().reset(until);
                }
                () = worker.drains(), if idle_max == IDLE_TIMEOUT => {
                    idle_max = DRAIN_IDLE;
                    timer.as_mut().reset(used_at.get() + idle_max);
                    // New datagrams go elsewhere; the answers to those that came are carried.
                    if send.stream().write_all(&[StreamStatus::Draining.byte()]).await.is_err() {
                        return Ending::ByCaller;
                    }
                }
            }
        }
    }

    /// Sends on what the app has sent, as much as is one turn's; returns true if there may be more.
    ///
    /// # Errors
    /// That of a host without such an app.
    fn take(&self, worker: &Worker) -> io::Result<bool> {
        let ended = worker.udp.read_batch(|buffer| {
            let bytes = self.socket.try_recv(buffer)?;
            self.registered.send(buffer.get(..bytes).unwrap_or_default(), &self.edge);
            self.pulse.used_at.set(clock::now());
            Ok::<_, io::Error>(bytes)
        });
        match ended {
            None => Ok(true),
            Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => Err(error),
            Some(_) => Ok(false),
        }
    }
}

/// Returns a socket whose datagrams go to `app` and come from it alone.
async fn connect(app: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(app), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.connect(&app.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    // Until the reactor has seen it, it would take nothing.
    socket.writable().await?;
    // Between the choice of its port and its connection anybody could send to it.
    for _ in 0..BATCH {
        if socket.try_recv(&mut [0; 1]).is_err() {
            break;
        }
    }
    Ok(socket)
}

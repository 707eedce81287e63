//! Datagrams from local apps into the mesh, and the answers back: one task per upstream port, one per flow.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::debug;

use super::carrier::{Exit, Registered};
use super::metrics::UdpEdge;
use super::table::{Bounds, Dropped, FlowTable, Gone, Verdict};
use super::{DRAIN_IDLE, FLOWS_MAX, FLOWS_PER_PORT_MAX, Flows, IDLE_TIMEOUT, Sockets, WAITING_BYTES_MAX, WAITING_MAX};
use crate::catalogue::{ServiceEntry, Snapshot};
use crate::clock;
use crate::model::{HealthStatus, Instance};
use crate::proxy::listener;
use crate::proxy::metrics::Reporter;
use crate::proxy::outbound::{Connected, connect};
use crate::proxy::preamble::{StreamKind, StreamStatus};
use crate::proxy::relay::CODE_RESET;
use crate::proxy::worker::{Caller, Slot, Worker};
use crate::routing::Outcome;
use crate::traffic::Resolved;

/// Silent flows are looked for this often while there are flows.
const SWEEP: Duration = Duration::from_secs(1);
/// The same while the agent drains and waits for the last one.
const SWEEP_DRAINING: Duration = Duration::from_millis(100);
/// A flow that was denied is asked for again after this long: policy changes by people.
const DENIED_REST: Duration = Duration::from_secs(5);
/// A flow for which no instance was to be had: as a tunnel that cannot be dialled.
const FAILED_REST: Duration = Duration::from_secs(1);

const BOUNDS: Bounds = Bounds { flows: FLOWS_PER_PORT_MAX, waiting: WAITING_MAX, waiting_bytes: WAITING_BYTES_MAX };

/// An upstream port.
struct Port {
    worker: Rc<Worker>,
    addr: SocketAddr,
    socket: Rc<UdpSocket>,
    flows: Rc<RefCell<Flows>>,
}

/// An open flow.
pub(super) struct Flow {
    number: u64,
    caller: Caller,
    instance: Arc<Instance>,
    registered: Registered,
    edge: Rc<UdpEdge>,
    /// The snapshot by which it stood last.
    stood_at: Cell<u64>,
    /// Why it is to end.
    flag: Cell<&'static str>,
    ending: Notify,
    /// Wakes when its place at the instance is free.
    gone: Notify,
}

impl Flow {
    fn send(&self, payload: &[u8]) {
        self.registered.send(payload, &self.edge);
    }

    fn end(&self, flag: &'static str) {
        self.flag.set(flag);
        self.ending.notify_one();
    }
}

/// Ends the flows of a port that is closed, however its task ends.
struct Closing(Rc<RefCell<Flows>>);

impl Drop for Closing {
    fn drop(&mut self) {
        let gone = self.0.borrow_mut().expire(clock::now(), Duration::ZERO);
        gone.iter().filter_map(|gone| gone.handle.as_ref()).for_each(|flow| flow.end("-"));
    }
}

/// Returns what takes the datagrams that come to this worker of an upstream port, until the drain is over or it is dropped.
///
/// # Errors
/// No descriptor is left.
///
/// # Cancel safety
/// Cancelling ends the port's flows.
pub(in crate::proxy) fn listen(
    worker: Rc<Worker>,
    sockets: Arc<Sockets>,
    addr: SocketAddr,
) -> io::Result<impl Future<Output = ()>> {
    let socket = sockets.of(worker.index)?;
    Ok(async move {
        take_all(worker, socket, addr).await;
        // The other workers' flows may go on: while they do, none of the port's sockets goes.
        drop(sockets);
    })
}

async fn take_all(worker: Rc<Worker>, socket: UdpSocket, addr: SocketAddr) {
    // The drain waits for the flows and the port that they answer by.
    let _token = worker.task_token();
    let flows = Rc::new(RefCell::new(FlowTable::new(BOUNDS)));
    let _closing = Closing(Rc::clone(&flows));
    let port = Rc::new(Port { worker, addr, socket: Rc::new(socket), flows });
    let mut swept_at = clock::now();
    let mut is_draining = false;
    loop {
        let has_flows = !port.flows.borrow().is_empty();
        if is_draining && !has_flows {
            return;
        }
        let next = swept_at + if is_draining { SWEEP_DRAINING } else { SWEEP };
        tokio::select! {
            readable = port.socket.readable() => match readable {
                Ok(()) => if take(&port) {
                    tokio::task::yield_now().await;
                },
                Err(error) => return debug!(%addr, %error, "upstream port is lost"),
            },
            () = tokio::time::sleep_until(next), if has_flows => {
                swept_at = clock::now();
                port.sweep(swept_at, is_draining);
            }
            () = port.worker.drains(), if !is_draining => {
                is_draining = true;
                port.flows.borrow_mut().close();
            }
        }
    }
}

/// Takes what apps have sent, as much as is one turn's; returns true if there may be more.
fn take(port: &Rc<Port>) -> bool {
    let ended = port.worker.udp.read_batch(|buffer| {
        let (bytes, from) = port.socket.try_recv_from(buffer)?;
        port.datagram(from, buffer.get(..bytes).unwrap_or_default());
        Ok::<_, io::Error>(bytes)
    });
    // `WouldBlock`; there is no other error that lasts, for nothing is told of earlier datagrams (ip(7), IP_RECVERR).
    ended.is_none()
}

impl Port {
    /// Sends a datagram into its flow, which is opened if there is none.
    fn datagram(self: &Rc<Self>, from: SocketAddr, payload: &[u8]) {
        let mut verdict = self.judge(from, payload);
        if let Verdict::Send(flow) = &verdict {
            if self.stands(flow) {
                return flow.send(payload);
            }
            self.flows.borrow_mut().end(from, flow.number);
            flow.end("UH");
            verdict = self.judge(from, payload);
        }
        match verdict {
            Verdict::Send(flow) => flow.send(payload),
            Verdict::Open { number, gone } => {
                self.give_way(gone);
                self.worker.spawn(open(Rc::clone(self), from, number));
            }
            Verdict::Wait => {}
            Verdict::Drop(why) => self.dropped(why, 1),
        }
    }

    fn judge(&self, from: SocketAddr, payload: &[u8]) -> Verdict<Rc<Flow>> {
        let place = || Slot::take(&self.worker.udp.opened, FLOWS_MAX);
        self.flows.borrow_mut().datagram(from, payload, clock::now(), place)
    }

    /// Ends what gave way to another flow.
    fn give_way(&self, gone: Option<Gone<Rc<Flow>>>) {
        let Some(Gone { handle, lost }) = gone else { return };
        if let Some(flow) = handle {
            flow.end("UO");
        }
        self.dropped(Dropped::Full, lost);
    }

    /// Counts datagrams that meet no open flow.
    fn dropped(&self, why: Dropped, datagrams: usize) {
        if let (Some(caller), 1..) = (listener::caller(&self.worker, self.addr), datagrams) {
            self.worker
                .udp
                .edges
                .edge(Reporter::Source, caller.source.service(), &caller.destination)
                .dropped(why, datagrams);
        }
    }

    fn sweep(&self, now: Instant, is_draining: bool) {
        let (idle, flag) = if is_draining { (DRAIN_IDLE, "DR") } else { (IDLE_TIMEOUT, "SI") };
        let gone = self.flows.borrow_mut().expire(now, idle);
        for Gone { handle, lost } in gone {
            if let Some(flow) = handle {
                flow.end(flag);
            }
            self.dropped(Dropped::NoInstance, lost);
        }
    }

    /// Tells whether a flow is where it belongs; looks only if the catalogue changed since the last datagram.
    fn stands(&self, flow: &Flow) -> bool {
        let snapshot = self.worker.snapshot().peek();
        if flow.stood_at.get() == snapshot.index {
            return true;
        }
        flow.stood_at.set(snapshot.index);
        listener::caller(&self.worker, self.addr).as_ref() == Some(&flow.caller)
            && self.is_served(&snapshot, &flow.caller, &flow.instance)
    }

    /// Tells whether `instance` is one that a new flow might go to.
    fn is_served(&self, snapshot: &Snapshot, caller: &Caller, instance: &Instance) -> bool {
        let Some(to) = stream_target(snapshot, caller) else {
            return snapshot.services.get(&caller.destination).is_some_and(|service| serves(service, instance));
        };
        let mut targets = std::iter::once(&to.target).chain(&to.failover);
        targets.any(|target| self.worker.instances(target).is_ok_and(|service| serves(&service, instance)))
    }
}

/// Where the flows to a service go, if entries say so.
fn stream_target(snapshot: &Snapshot, caller: &Caller) -> Option<Arc<Resolved>> {
    snapshot.traffic.chain(&caller.destination).map(|chain| Arc::clone(&chain.stream))
}

/// Tells whether `service` has this life of `instance`, in health or with nothing healthier beside it.
fn serves(service: &ServiceEntry, instance: &Instance) -> bool {
    let is_critical = |other: &Arc<Instance>| other.status == HealthStatus::Critical;
    let is_same = |other: &&Arc<Instance>| {
        other.record.id == instance.record.id
            && other.node.info.name == instance.node.info.name
            && other.node.generation == instance.node.generation
    };
    let found = service.instances.iter().find(is_same);
    found.is_some_and(|found| !is_critical(found) || service.instances.iter().all(is_critical))
}

/// Opens a flow and keeps it until it ends.
async fn open(port: Rc<Port>, from: SocketAddr, number: u64) {
    let worker = &port.worker;
    let Some(caller) = listener::caller(worker, port.addr) else {
        // The upstream went while the datagram waited.
        port.flows.borrow_mut().end(from, number);
        return;
    };
    let edge = worker.udp.edges.edge(Reporter::Source, caller.source.service(), &caller.destination);
    let mut counted = edge.open();
    match Box::pin(establish(&port, &caller, from)).await {
        Ok(connected) => counted.ends(keep(&port, (from, number), caller, edge, connected).await),
        Err(flag) => {
            let (why, rest) = match flag {
                "RBAC" => (Dropped::Denied, DENIED_REST),
                "UO" | "RL" => (Dropped::Full, FAILED_REST),
                "DR" => (Dropped::Draining, FAILED_REST),
                _ => (Dropped::NoInstance, FAILED_REST),
            };
            let lost = port.flows.borrow_mut().rest(from, number, why, clock::now() + rest);
            edge.dropped(why, lost);
            counted.ends(flag);
        }
    }
}

/// Returns the stream of a new flow, or the flag that says why there is none.
async fn establish(port: &Port, caller: &Caller, from: SocketAddr) -> Result<Connected, &'static str> {
    let worker = &port.worker;
    let (to, decided) = {
        let snapshot = worker.snapshot().peek();
        let to = stream_target(&snapshot, caller);
        let destination = to.as_ref().map_or(&caller.destination, |to| &to.target.service);
        let source = caller.source.service();
        let decided = worker.http.policy().stream(&snapshot.policy, Reporter::Source, source, destination);
        (to, decided)
    };
    if let Err(denied) = decided {
        debug!(rule = %denied.rule, service = %caller.destination, "a caller is denied");
        return Err("RBAC");
    }
    let connect = || connect(worker, caller, StreamKind::Udp, (to.as_deref(), Some(from.ip())));
    let connected = match connect().await {
        // UDP does not say when it has done: a flow that leaves makes room, or the one that is silent for longest.
        Err(refused) if refused.flag == "UO" => {
            let oldest = port.flows.borrow_mut().evict();
            if let Some(oldest) = oldest {
                oldest.end("UO");
                oldest.gone.notified().await;
                drop(oldest);
                connect().await
            } else {
                Err(refused)
            }
        }
        connected => connected,
    };
    connected.map_err(|refused| {
        if let Some(what) = refused.limited {
            worker.overflowed(what);
        }
        refused.flag
    })
}

/// Carries a flow until it ends; returns why it did.
async fn keep(
    port: &Rc<Port>,
    (from, number): (SocketAddr, u64),
    caller: Caller,
    edge: Rc<UdpEdge>,
    connected: Connected,
) -> &'static str {
    let worker = &port.worker;
    let Connected { mut send, mut recv, lease, instance } = connected;
    let Some(datagrams) = lease.datagrams() else {
        port.flows.borrow_mut().end(from, number);
        return "UR";
    };
    let flows = Rc::downgrade(&port.flows);
    let exit = Exit::Caller { socket: Rc::clone(&port.socket), to: from, number, flows, edge: Rc::clone(&edge) };
    let registered = datagrams.register(send.stream().id().index(), exit);
    let flow = Rc::new(Flow {
        number,
        caller,
        instance,
        registered,
        edge,
        stood_at: Cell::new(worker.snapshot().peek().index),
        flag: Cell::new("-"),
        ending: Notify::new(),
        gone: Notify::new(),
    });
    let waiting = port.flows.borrow_mut().opened(from, number, Rc::clone(&flow));
    let flag = match waiting {
        Some(waiting) => {
            for payload in &waiting {
                flow.send(payload);
            }
            let leave = || port.flows.borrow_mut().leave(from, number, clock::now());
            let flag = follow(worker, &flow, &mut recv, leave).await;
            if flag == "UF" {
                worker.connect_failed(&flow.instance);
                if let Some(observer) = lease.observer() {
                    worker.observe(observer, Outcome::GatewayFailure, Duration::ZERO, crate::clock::now());
                }
            }
            port.flows.borrow_mut().end(from, number);
            flag
        }
        // It gave way, or its port was closed, while it opened.
        None => "UO",
    };
    send.finish();
    let _gone = recv.stop(CODE_RESET);
    drop(lease);
    flow.gone.notify_one();
    flag
}

/// Waits for a flow's end; `leave` is called when new datagrams are to go elsewhere before that.
async fn follow(worker: &Worker, flow: &Flow, recv: &mut quinn::RecvStream, leave: impl Fn()) -> &'static str {
    loop {
        tokio::select! {
            said = recv.read_chunk(1, true) => {
                let chunk = match said {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => return "-",
                    Err(_reset_or_lost) => return "UR",
                };
                match chunk.bytes.first().copied().and_then(StreamStatus::from_byte) {
                    Some(StreamStatus::ConnectFailed) => return "UF",
                    // What is on its way still comes. The destination ends the flow when it is silent; where it does not, the
                    // table does.
                    Some(StreamStatus::Draining) => {
                        debug!(node = %flow.instance.node.info.name, "instance's agent drains: the flow moves");
                        leave();
                    }
                    _ => return "UR",
                }
            }
            () = flow.ending.notified() => return flow.flag.get(),
            () = worker.closes() => return "DR",
        }
    }
}

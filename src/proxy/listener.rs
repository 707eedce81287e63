//! The local ports into the mesh: of upstreams, for connections or, to services of protocol udp, for datagrams; and of
//! gateways. Shared by the workers (SO_REUSEPORT), and evened out among them (`evening`).
//!
//! ```text
//!   snapshot.local.upstreams -+-> worker 0: probe alone, bind, publish state -> the others bind what is listening
//!   snapshot.gateway_ports() -+                                                 (of datagrams: take what worker 0 bound)
//! ```
//!
//! Invariants: a port that somebody else has is an error that `listeners` shows, never a port shared in silence; of two that
//! ask for one the first has it (shared HTTP port, upstreams, gateways by name), and the log names the other; where a port
//! leads is looked up for each connection, and how it is parsed follows what the service is said to take: bytes are never
//! carried where requests are due; a port of datagrams stays with one worker per source address (`udp::ports`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, info, warn};

use super::evening::{Handed, Listening, Seat};
use super::relay::Tcp;
use super::worker::{CONNECTIONS_MAX, Caller, Route, Slot, Source, Worker, within};
use super::{ListenerState, Listeners, http, outbound, udp};
use crate::catalogue::{GatewayPort, Snapshot, UpstreamListener};
use crate::model::{Protocol, ServiceName};
use crate::traffic::GatewayListener;

/// Connections that wait to be accepted, per worker and port; the kernel bounds it by `net.core.somaxconn`.
const BACKLOG: i32 = 1_024;
/// After an accept error that lasts (no file descriptors left) the port rests this long.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Local ports of one agent, those of its gateways included.
const LISTENERS_MAX: usize = 1_024;
/// A connection whose instance takes no bytes waits this long for news that the service takes requests: a change spreads
/// within a second.
const TURN_TIMEOUT: Duration = Duration::from_secs(1);

/// What a port takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Connections,
    Datagrams,
}

impl Takes {
    fn of(state: &ListenerState) -> Option<Self> {
        match state {
            ListenerState::Listening => Some(Self::Connections),
            ListenerState::ListeningUdp => Some(Self::Datagrams),
            ListenerState::Failed(_) => None,
        }
    }
}

/// Ports that are to be open, and those that may not be, each with the reason.
type Wanted = BTreeMap<SocketAddr, Result<Takes, String>>;

/// Ports that this worker listens on. When it goes, connections are not accepted; ports of datagrams drain by themselves.
#[derive(Default)]
struct Held {
    tasks: JoinSet<()>,
    ports: BTreeMap<SocketAddr, (Takes, AbortHandle)>,
}

/// Keeps this worker's listeners as the snapshot wants them; closes them when the drain begins.
pub(super) async fn run(worker: &Rc<Worker>) {
    let mut held = Held::default();
    if worker.index == 0 {
        lead(worker, &mut held).await;
    } else {
        follow(worker, &mut held).await;
    }
    drop(held);
    worker.closes().await;
}

/// Worker 0: decides which ports are open.
async fn lead(worker: &Rc<Worker>, held: &mut Held) {
    let mut changes = worker.snapshot().subscribe();
    let mut seen = None;
    let (mut states, mut told) = (Listeners::new(), BTreeSet::new());
    loop {
        let snapshot = Rc::new(changes.borrow_and_update().clone());
        tell_crowded(worker, &snapshot, &mut told);
        let wanted = wanted(worker, &snapshot, &states);
        let has_failed = held.has_ended() || states.values().any(|state| Takes::of(state).is_none());
        if seen.as_ref() != Some(&wanted) || has_failed {
            held.keep(&wanted);
            let open = |(addr, takes): (&SocketAddr, &Result<Takes, String>)| {
                let before = states.get(addr);
                let state = match takes {
                    Ok(takes) => open_first(worker, held, (*addr, *takes), before),
                    Err(reason) => unfit_port(*addr, reason, before),
                };
                (*addr, state)
            };
            states = wanted.iter().map(open).collect();
            let failed = states.values().filter(|state| Takes::of(state).is_none()).count();
            worker.metrics.listeners_failed.set(i64::try_from(failed).unwrap_or(i64::MAX));
            worker.listeners.send_if_modified(|published| {
                let is_new = *published != states;
                published.clone_from(&states);
                is_new
            });
            seen = Some(wanted);
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return worker.drains().await },
            () = tokio::time::sleep(worker.listener_retry) => {}
            () = worker.drains() => return,
        }
    }
}

/// The other workers: open what worker 0 has opened.
async fn follow(worker: &Rc<Worker>, held: &mut Held) {
    let mut changes = worker.listeners.subscribe();
    loop {
        let states = changes.borrow_and_update().clone();
        let is_open = |(addr, state): (SocketAddr, ListenerState)| Some((addr, Ok(Takes::of(&state)?)));
        let wanted: Wanted = states.into_iter().filter_map(is_open).collect();
        held.keep(&wanted);
        for (addr, takes) in wanted.into_iter().filter_map(|(addr, takes)| Some((addr, takes.ok()?))) {
            if let Err(error) = held.open(worker, addr, takes) {
                warn!(%addr, %error, worker = worker.index, "worker cannot share an upstream port; it is tried again");
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return worker.drains().await },
            () = tokio::time::sleep(worker.listener_retry) => {}
            () = worker.drains() => return,
        }
    }
}

/// Tells which ports are to be open, and for what. Where nobody knows the service, a port stays as it is: the last instance
/// may be gone for a moment.
fn wanted(worker: &Worker, snapshot: &Snapshot, states: &Listeners) -> Wanted {
    let takes = |upstream: &UpstreamListener| match protocol(snapshot, upstream) {
        Some(Protocol::Udp) => Takes::Datagrams,
        Some(_) => Takes::Connections,
        None => states.get(&upstream.bind).and_then(Takes::of).unwrap_or(Takes::Connections),
    };
    let upstreams = snapshot.local.upstreams.iter().filter(|upstream| worker.shared_http != Some(upstream.bind));
    let shared = worker.shared_http.into_iter().map(|addr| (addr, Ok(Takes::Connections)));
    let of_gateway = |port: &GatewayPort<'_>| match unfit(snapshot, port.listener) {
        None => Ok(Takes::Connections),
        Some(reason) => Err(reason),
    };
    let gateways = snapshot.gateway_ports().map(|port| (port.bind, of_gateway(&port)));
    let all = shared.chain(upstreams.map(|upstream| (upstream.bind, Ok(takes(upstream))))).chain(gateways);
    let mut wanted = Wanted::new();
    for (addr, takes) in all.take(LISTENERS_MAX) {
        wanted.entry(addr).or_insert(takes);
    }
    wanted
}

/// Says why a gateway's port for bytes cannot be open: its service takes something else. An entry that says so is refused
/// where it is written; a registration comes as it comes.
fn unfit(snapshot: &Snapshot, listener: &GatewayListener) -> Option<String> {
    let service = listener.stream()?;
    let protocol = known_protocol(snapshot, service).filter(|protocol| *protocol != Protocol::Tcp)?.as_str();
    Some(format!(
        "service `{service}` is of protocol {protocol}, and the listener is for bytes: give it a service of protocol tcp, or a \
         Protocol of http"
    ))
}

/// Notes that a port stays closed, in the log as well when that is new.
fn unfit_port(addr: SocketAddr, reason: &str, before: Option<&ListenerState>) -> ListenerState {
    let state = ListenerState::Failed(reason.to_owned());
    if before != Some(&state) {
        warn!(%addr, reason, "a gateway's port stays closed");
    }
    state
}

/// Logs ports of gateways that something else of this agent has, once for as long as it is so.
fn tell_crowded(worker: &Worker, snapshot: &Snapshot, told: &mut BTreeSet<(SocketAddr, ServiceName)>) {
    let mut owners: BTreeMap<SocketAddr, &ServiceName> = BTreeMap::new();
    let mut crowded = BTreeSet::new();
    for port in snapshot.gateway_ports() {
        let is_taken = worker.shared_http == Some(port.bind) || upstream(snapshot, port.bind).is_some();
        if is_taken || *owners.entry(port.bind).or_insert(port.gateway) != port.gateway {
            crowded.insert((port.bind, port.gateway.clone()));
        }
    }
    for (addr, gateway) in crowded.difference(told) {
        warn!(%addr, %gateway, "a gateway does not get a port that an upstream or another gateway of this agent has");
    }
    *told = crowded;
}

/// Opens a port after a probe that nobody else has it; an error is logged when it appears.
fn open_first(
    worker: &Rc<Worker>,
    held: &mut Held,
    (addr, takes): (SocketAddr, Takes),
    before: Option<&ListenerState>,
) -> ListenerState {
    let listening = match takes {
        Takes::Connections => ListenerState::Listening,
        Takes::Datagrams => ListenerState::ListeningUdp,
    };
    if held.ports.contains_key(&addr) {
        return listening;
    }
    let opened = match takes {
        Takes::Connections => bind(addr, Sharing::Exclusive).and_then(|_probe| held.open(worker, addr, takes)),
        Takes::Datagrams => worker.udp_ports.open(addr).and_then(|_held| held.open(worker, addr, takes)),
    };
    match opened {
        Ok(()) => {
            info!(%addr, ?takes, "local port is open");
            listening
        }
        Err(error) => {
            let state = ListenerState::Failed(match error.kind() {
                io::ErrorKind::AddrInUse => format!("{addr} is in use by another program"),
                _ => error.to_string(),
            });
            if before != Some(&state) {
                warn!(%addr, %error, "cannot listen on a local port; it is tried again");
            }
            state
        }
    }
}

impl Held {
    /// Closes what is not wanted.
    fn keep(&mut self, wanted: &Wanted) {
        while self.tasks.try_join_next().is_some() {}
        self.ports.retain(|addr, (takes, task)| {
            let stays = matches!(wanted.get(addr), Some(Ok(wanted)) if wanted == takes) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
    }

    /// Tells whether a port's task has ended by itself.
    fn has_ended(&self) -> bool {
        self.ports.values().any(|(_, task)| task.is_finished())
    }

    /// Opens a port unless it is open.
    fn open(&mut self, worker: &Rc<Worker>, addr: SocketAddr, takes: Takes) -> io::Result<()> {
        if self.ports.contains_key(&addr) {
            return Ok(());
        }
        let task = match takes {
            Takes::Connections => {
                let socket = bind(addr, Sharing::Shared)?;
                socket.listen(BACKLOG)?;
                let listener = TcpListener::from_std(socket.into())?;
                let listening = worker.evening.listen(addr, worker.index);
                self.tasks.spawn_local(accept(Rc::clone(worker), (listener, listening), addr))
            }
            Takes::Datagrams => {
                // Worker 0 has closed it again: the state that says so is on its way.
                let Some(sockets) = worker.udp_ports.find(addr) else { return Ok(()) };
                worker.spawn_abortable(udp::outbound::listen(Rc::clone(worker), sockets, addr)?)
            }
        };
        self.ports.insert(addr, (takes, task));
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Exclusive,
    Shared,
}

fn bind(addr: SocketAddr, sharing: Sharing) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(SocketProtocol::TCP))?;
    // Old connections in TIME_WAIT do not hold the port; a program that listens on it does.
    socket.set_reuse_address(true)?;
    if sharing == Sharing::Shared {
        socket.set_reuse_port(true)?;
    }
    // Without Nagle's delay: what is accepted has it from the listener (Linux). One that refuses it still carries bytes.
    let _slower = socket.set_tcp_nodelay(true);
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket)
}

/// Accepts until the port is closed.
async fn accept(worker: Rc<Worker>, (listener, listening): (TcpListener, Listening), addr: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => seat(&worker, &listening, (stream, from.ip()), addr),
            Err(error) if is_passing(&error) => debug!(%addr, %error, "a connection was gone before it was accepted"),
            Err(error) => {
                warn!(%addr, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// Tells whether an accept error is about one connection (accept(2)).
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Serves a connection here, or has the worker do so that has the fewest.
fn seat(worker: &Rc<Worker>, listening: &Listening, (stream, from): (TcpStream, IpAddr), addr: SocketAddr) {
    let seat = listening.seat(worker.connections.get() >= CONNECTIONS_MAX);
    if seat.is_at(worker.index) {
        return serve(worker, (stream, from), addr, seat);
    }
    match listening.hand((stream, from), seat, worker.drain_token()) {
        Ok(None) => worker.metrics.handed.inc(),
        Ok(Some((stream, seat))) => serve(worker, (stream, from), addr, seat),
        Err(error) => debug!(%addr, %error, "a connection was lost on its way to another worker"),
    }
}

/// Serves what other workers have accepted.
pub(super) async fn take_handed(worker: &Rc<Worker>, mut handed: mpsc::Receiver<Handed>) {
    while let Some(handed) = handed.recv().await {
        let addr = handed.port();
        match handed.take() {
            Ok(Some((connection, seat))) => serve(worker, connection, addr, seat),
            Ok(None) => {}
            Err(error) => debug!(%addr, %error, "a connection of another worker was lost on its way"),
        }
    }
}

/// Starts the task of one connection.
fn serve(worker: &Rc<Worker>, (stream, from): (TcpStream, IpAddr), addr: SocketAddr, seat: Seat) {
    let Some(slot) = Slot::take(&worker.connections, CONNECTIONS_MAX) else {
        worker.metrics.overflow.inc();
        // Dropped unclean: the app gets an RST.
        return drop(Tcp::new(stream));
    };
    let held = (slot, seat);
    let serving = Rc::clone(worker);
    match route(worker, addr) {
        Some((Route::Service(caller), Parse::Bytes)) => worker.spawn(async move {
            if let Some(stream) = outbound::serve(Rc::clone(&serving), (stream, from), caller).await {
                // In a box: a connection of bytes has no room for it.
                Box::pin(turn(serving, stream, addr)).await;
            }
            drop(held);
        }),
        Some((route, _)) => worker.spawn(async move {
            http::outbound::serve(serving, stream, route).await;
            drop(held);
        }),
        // The upstream went while the connection waited.
        None => drop(Tcp::new(stream)),
    }
}

/// Serves a connection whose bytes no instance takes by requests, once the port leads to a service that takes these: its
/// instances may learn of a change before their callers do. Resets it otherwise.
async fn turn(worker: Rc<Worker>, stream: TcpStream, addr: SocketAddr) {
    let stream = Tcp::new(stream);
    let mut changes = worker.snapshot().subscribe();
    let turned = async {
        loop {
            changes.mark_unchanged();
            if let Some((route, Parse::Http)) = route(&worker, addr) {
                return Some(route);
            }
            changes.changed().await.ok()?;
        }
    };
    let turned = within(TURN_TIMEOUT, turned).await.flatten();
    if let Some(route) = turned
        && let Some(stream) = stream.hand_on()
    {
        debug!(%addr, "a connection of bytes goes on by requests: its service has turned to them");
        http::outbound::serve(worker, stream, route).await;
    }
}

/// How a connection's bytes are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parse {
    Bytes,
    Http,
}

/// Finds where the port leads at this moment.
fn route(worker: &Worker, addr: SocketAddr) -> Option<(Route, Parse)> {
    if worker.shared_http == Some(addr) {
        return Some((Route::ByHost, Parse::Http));
    }
    let snapshot = worker.snapshot().peek();
    if let Some(upstream) = upstream(&snapshot, addr) {
        let protocol = protocol(&snapshot, upstream).unwrap_or_default();
        let parse = if protocol.is_http() { Parse::Http } else { Parse::Bytes };
        return Some((Route::Service(caller_of(upstream)), parse));
    }
    of_gateway(&snapshot, addr)
}

/// Finds where a gateway's port leads; nowhere once it is about to be closed.
fn of_gateway(snapshot: &Snapshot, addr: SocketAddr) -> Option<(Route, Parse)> {
    let port = snapshot.gateway_ports().find(|port| port.bind == addr)?;
    if unfit(snapshot, port.listener).is_some() {
        return None;
    }
    let gateway = port.gateway.clone();
    if port.listener.protocol.is_http() {
        return Some((Route::Gateway { gateway, port: addr.port() }, Parse::Http));
    }
    let destination = port.listener.stream()?.clone();
    Some((Route::Service(Caller { source: Source::Service(gateway), destination }), Parse::Bytes))
}

/// Finds who calls whom through a port at this moment.
pub(super) fn caller(worker: &Worker, addr: SocketAddr) -> Option<Caller> {
    upstream(&worker.snapshot().peek(), addr).map(caller_of)
}

fn upstream(snapshot: &Snapshot, addr: SocketAddr) -> Option<&UpstreamListener> {
    snapshot.local.upstreams.iter().find(|upstream| upstream.bind == addr)
}

fn caller_of(upstream: &UpstreamListener) -> Caller {
    Caller { source: Source::Service(upstream.source.clone()), destination: upstream.destination.clone() }
}

/// How the traffic of an upstream is parsed; none: nobody says so.
///
/// What is said of the service counts: its instances refuse bytes where they take requests. The upstream's own word is for
/// services of which nobody says anything, and those of `tcp`, which is what registrations say that say nothing; but an entry
/// that says `tcp` means it.
fn protocol(snapshot: &Snapshot, upstream: &UpstreamListener) -> Option<Protocol> {
    match (known_protocol(snapshot, &upstream.destination), upstream.protocol) {
        (None, own) => own,
        (Some(Protocol::Tcp), Some(own)) if snapshot.traffic.protocol(&upstream.destination).is_none() => Some(own),
        (known, _) => known,
    }
}

/// What is said of how a service's traffic is parsed: of itself, or of where its resolver leads streams to.
pub(super) fn known_protocol(snapshot: &Snapshot, service: &ServiceName) -> Option<Protocol> {
    let own = snapshot.protocol(service);
    if own.is_some_and(|own| own != Protocol::Tcp) {
        return own;
    }
    let chain = snapshot.traffic.chain(service);
    let target = chain.map(|chain| &chain.stream.target.service).filter(|target| *target != service);
    target.and_then(|target| snapshot.protocol(target)).or(own)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::catalogue::{LocalGateway, LocalView, ServiceEntry};
    use crate::traffic::{Entries, Ready, Traffic};

    /// A catalogue in which `web` is registered with this protocol, if at all, and these entries are in force.
    fn snapshot(registered: Option<Protocol>, list: &[(&str, &str, Value)]) -> Snapshot {
        let mut snapshot = Snapshot::empty("n1".parse().unwrap());
        if let Some(protocol) = registered {
            let name: ServiceName = "web".parse().unwrap();
            let entry = ServiceEntry { name: name.clone(), protocol, instances: Vec::new(), modify_index: 1 };
            snapshot.services.insert(name, Arc::new(entry));
        }
        let mut entries = Entries::default();
        for (kind, name, value) in list {
            entries.add(kind, name, Ready::new(kind, value).unwrap());
        }
        snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        snapshot
    }

    #[test]
    fn what_is_said_of_a_service_goes_before_the_upstream_s_own_word() {
        use Protocol::{Grpc, Http, Tcp, Udp};
        #[track_caller]
        fn check(said: (Option<Protocol>, Option<&str>), own: Option<Protocol>, want: Option<Protocol>) {
            let (registered, entry) = said;
            let defaults = |protocol: &str| ("service-defaults", "web", json!({"Protocol": protocol}));
            let entries: Vec<_> = entry.map(defaults).into_iter().collect();
            let upstream = UpstreamListener {
                bind: ([127, 0, 0, 1], 1).into(),
                source: "app".parse().unwrap(),
                destination: "web".parse().unwrap(),
                protocol: own,
            };
            let found = protocol(&snapshot(registered, &entries), &upstream);
            assert_eq!(found, want, "{registered:?}, entry {entry:?}, own {own:?}");
        }
        for own in [None, Some(Tcp), Some(Udp)] {
            check((None, None), own, own);
            check((Some(Tcp), None), own, own.or(Some(Tcp)));
            check((Some(Tcp), Some("tcp")), own, Some(Tcp));
            check((Some(Http), None), own, Some(Http));
            check((Some(Tcp), Some("grpc")), own, Some(Grpc));
            check((None, Some("http")), own, Some(Http));
        }
        // A registration that says nothing is one of tcp; an entry that says tcp means it.
        check((Some(Tcp), None), Some(Http), Some(Http));
        check((Some(Tcp), Some("tcp")), Some(Http), Some(Tcp));
        check((Some(Udp), None), Some(Http), Some(Udp));
    }

    #[test]
    fn a_connection_to_a_gateway_s_port_for_bytes_goes_nowhere_once_its_service_takes_requests() {
        let port: SocketAddr = ([127, 0, 0, 1], 7000).into();
        let edge =
            || ("ingress-gateway", "edge", json!({"Listeners": [{"Port": 7000, "Services": [{"Name": "web"}]}]}));
        for (protocol, leads) in [(Protocol::Tcp, true), (Protocol::Http, false), (Protocol::Grpc, false)] {
            let mut snapshot = snapshot(Some(protocol), &[edge()]);
            let gateways = vec![LocalGateway { service: "edge".parse().unwrap(), ip: port.ip() }];
            snapshot.local = Arc::new(LocalView { gateways, ..LocalView::default() });
            // Its listener may not have been closed yet.
            let found = of_gateway(&snapshot, port);
            assert_eq!(matches!(found, Some((Route::Service(_), Parse::Bytes))), leads, "{protocol:?}");
            assert_eq!(found.is_some(), leads, "{protocol:?}");
        }
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_parsed_as_what_takes_it_in_the_end() {
        let redirect = ("service-resolver", "shop", json!({"Redirect": {"Service": "web"}}));
        for registered in [Protocol::Http, Protocol::Tcp] {
            let snapshot = snapshot(Some(registered), std::slice::from_ref(&redirect));
            assert_eq!(known_protocol(&snapshot, &"shop".parse().unwrap()), Some(registered));
        }
        assert_eq!(known_protocol(&snapshot(None, std::slice::from_ref(&redirect)), &"shop".parse().unwrap()), None);
        // A registration that says nothing of the name itself is not the last word.
        let mut snapshot = snapshot(Some(Protocol::Http), &[redirect]);
        let name: ServiceName = "shop".parse().unwrap();
        let entry =
            ServiceEntry { name: name.clone(), protocol: Protocol::Tcp, instances: Vec::new(), modify_index: 1 };
        snapshot.services.insert(name.clone(), Arc::new(entry));
        assert_eq!(known_protocol(&snapshot, &name), Some(Protocol::Http));
    }

    #[test]
    fn what_a_port_accepts_sends_at_once() {
        let port = bind(SocketAddr::from(([127, 0, 0, 1], 0)), Sharing::Exclusive).unwrap();
        port.set_nonblocking(false).unwrap();
        port.listen(BACKLOG).unwrap();
        let port = std::net::TcpListener::from(port);
        let _app = std::net::TcpStream::connect(port.local_addr().unwrap()).unwrap();
        assert!(port.accept().unwrap().0.nodelay().unwrap(), "it is the listener's to give");
    }
}

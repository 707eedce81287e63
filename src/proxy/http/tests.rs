//! Both sides over a loopback QUIC connection, with real apps and callers.

mod app_h2;
mod cut_off;
mod edge;
mod floods;
mod flow;
mod forwarded;
mod framing;
mod gateway;
mod h2_connections;
mod hedged;
mod over_h2;
mod refused;
mod repeated;
mod rest;
mod routed;
mod traced;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::*;
use crate::catalogue::{LocalInstance, Publisher, ServiceEntry, Snapshot};
use crate::clock::UnixSeconds;
use crate::metrics::Metrics;
use crate::model::{Instance, NodeInfo, Protocol, ServeScope, ServiceRecord, SpiffeId, fixture};
use crate::proxy::head::HEADERS_MAX;
use crate::proxy::{Lease, Route, Source};
use crate::routing::{Ask, Balancer, ConnectBackoff, Flow, NoInstance};
use crate::transport::fixture::pair;

/// A worker whose instances are fixed connections, tried in turn.
struct Loopback {
    http: HttpState,
    metrics: Metrics,
    publisher: Publisher,
    reader: SnapshotReader,
    tunnels: RefCell<Vec<quinn::Connection>>,
    next: Cell<usize>,
    instance: Arc<Instance>,
    /// Picks as a worker does, if there is one.
    balancer: RefCell<Option<Balancer>>,
}

impl Dial for Loopback {
    async fn open(
        self: &Rc<Self>,
        caller: &Caller,
        _: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if self.balancer.borrow().is_some() {
            return self.open_picked(caller, tried).await;
        }
        let turn = self.next.replace(self.next.get() + 1);
        let tunnel = {
            let tunnels = self.tunnels.borrow();
            if tunnels.is_empty() {
                return Err(OpenError::NoInstance { total: 2, critical: 2 });
            }
            tunnels[turn % tunnels.len()].clone()
        };
        let (send, recv) = tunnel.open_bi().await.unwrap();
        Ok(Opened {
            send,
            recv,
            preamble: Bytes::from_static(b"P!"),
            instance: Arc::clone(&self.instance),
            lease: Lease::default(),
            at: crate::clock::now(),
        })
    }

    async fn open_to(
        self: &Rc<Self>,
        source: &Source,
        to: &Resolved,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if to.target.service.as_str() == "shadow" {
            self.next.set(1);
        }
        let caller = Caller { source: source.clone(), destination: to.target.service.clone() };
        self.open(&caller, kind, tried).await
    }

    fn snapshot(&self) -> &SnapshotReader {
        &self.reader
    }

    fn spawn_untracked(&self, future: impl Future<Output = ()> + 'static) {
        tokio::task::spawn_local(future);
    }

    fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        tokio::task::spawn_local(future);
    }

    fn task_token(&self) -> Option<TaskTrackerToken> {
        None
    }

    fn stopping(&self) -> bool {
        false
    }

    fn http(&self) -> &HttpState {
        &self.http
    }
}

impl Loopback {
    /// Picks among the connections from here on as a worker does: in turn, guarded by `guard`.
    fn balance(&self, guard: &serde_json::Value) {
        let instances = (0..self.tunnels.borrow().len()).map(|at| numbered(&self.instance, at)).collect();
        let entry = ServiceEntry { name: "web".parse().unwrap(), protocol: Protocol::Http, instances, modify_index: 2 };
        let resolver = serde_json::json!({"LoadBalancer": {"Policy": "round_robin"}});
        let defaults = serde_json::json!({"UpstreamConfig": {"Defaults": guard}});
        crate::upstream::check("service-defaults", &defaults).unwrap();
        let entries = [("service-resolver", "web", &resolver), ("service-defaults", "api", &defaults)];
        self.publisher.publish(Arc::new(Snapshot {
            services: BTreeMap::from([("web".parse().unwrap(), Arc::new(entry))]),
            upstreams: Arc::new(crate::upstream::table(entries)),
            ..Snapshot::clone(&self.reader.load())
        }));
        self.balancer.replace(Some(Balancer::new(0)));
    }

    async fn open_picked(&self, caller: &Caller, tried: &RefCell<Tried>) -> Result<Opened, OpenError> {
        let snapshot = self.reader.load();
        let service = &snapshot.services["web"];
        let (source, now) = (caller.source.service(), crate::clock::now());
        let ask = Ask { snapshot: &snapshot, source, destination: &service.name, service, flow: Flow::Request, now };
        let picked = {
            let mut balancer = self.balancer.borrow_mut();
            balancer.as_mut().unwrap().pick(&ask, &tried.borrow(), &ConnectBackoff::new())
        };
        let picked = match picked {
            Ok(picked) if !tried.borrow().contains(&picked.instance) => picked,
            Err(NoInstance::Overflow { what, .. }) => return Err(OpenError::Overflow(what)),
            Err(NoInstance::FailsClosed { out, fit, .. }) => return Err(OpenError::FailsClosed { out, fit }),
            _ => return Err(OpenError::NoInstance { total: service.instances.len(), critical: 0 }),
        };
        tried.borrow_mut().add(Arc::clone(&picked.instance));
        let at: usize = picked.instance.record.id.as_str().trim_start_matches("web-").parse().unwrap();
        let tunnel = self.tunnels.borrow()[at].clone();
        let (send, recv) = tunnel.open_bi().await.unwrap();
        let (preamble, lease) = (Bytes::from_static(b"P!"), Lease::of_load(picked.load));
        Ok(Opened { send, recv, preamble, instance: picked.instance, lease, at: now })
    }

    fn new(limits: Limits) -> Rc<Self> {
        let metrics = Metrics::new();
        let http = HttpState::with_limits(HttpMetrics::register(&metrics).unwrap(), limits);
        let instance = instance();
        let entry = ServiceEntry {
            name: "web".parse().unwrap(),
            protocol: Protocol::Http,
            instances: vec![Arc::clone(&instance)],
            modify_index: 1,
        };
        let publisher = Publisher::new(Arc::new(Snapshot {
            services: BTreeMap::from([("web".parse().unwrap(), Arc::new(entry))]),
            ..Snapshot::empty("n1".parse().unwrap())
        }));
        let reader = publisher.reader();
        let (tunnels, next, balancer) = (RefCell::default(), Cell::new(0), RefCell::new(None));
        Rc::new(Self { http, metrics, publisher, reader, tunnels, next, instance, balancer })
    }

    /// Adds an instance that the test itself serves at the far end of the returned tunnel.
    async fn add_tunnel(&self) -> (quinn::Connection, [quinn::Endpoint; 2]) {
        let pair = pair().await;
        self.tunnels.borrow_mut().push(pair.dialer);
        (pair.listener, pair.endpoints)
    }

    /// Adds an instance whose app listens at `app`.
    async fn add(self: &Rc<Self>, app: SocketAddr, protocol: Protocol) {
        let (accepted, endpoints) = self.add_tunnel().await;
        let peer = Rc::new(PeerIdentity {
            id: "spiffe://td/svc/api/node/n1".parse::<SpiffeId>().unwrap(),
            node: "n1".parse().unwrap(),
            scope: "*".parse::<ServeScope>().unwrap(),
            not_after: UnixSeconds(u64::MAX),
        });
        let local =
            LocalInstance { service: "web".parse().unwrap(), app_addr: app, protocol, wants_proxy_header: false };
        let worker = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _endpoints = endpoints;
            while let Ok((send, mut recv)) = accepted.accept_bi().await {
                let (worker, local, peer) = (Rc::clone(&worker), local.clone(), Rc::clone(&peer));
                tokio::task::spawn_local(async move {
                    let mut preamble = [0; 2];
                    if recv.read_exact(&mut preamble).await.is_ok() {
                        let stream = inbound::Stream { send, recv, rest: Bytes::new(), local, peer };
                        inbound::serve(worker, stream, |_| {}).await;
                    }
                });
            }
        });
    }

    /// Opens a port that leads to the mesh.
    async fn listen(self: &Rc<Self>, by_host: bool) -> SocketAddr {
        let caller = Caller { source: Source::Service("api".parse().unwrap()), destination: "web".parse().unwrap() };
        self.listen_as(if by_host { Route::ByHost } else { Route::Service(caller) }).await
    }

    /// Opens a port whose connections go by `route`.
    async fn listen_as(self: &Rc<Self>, route: Route) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let worker = Rc::clone(self);
        tokio::task::spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(outbound::serve(Rc::clone(&worker), stream, route.clone()));
            }
        });
        addr
    }
}

fn instance() -> Arc<Instance> {
    let info = NodeInfo { mesh_addr: "127.0.0.1:1".parse().unwrap(), ..fixture::node_info("n2") };
    let record = ServiceRecord {
        port: 80,
        protocol: Protocol::Http,
        ..ServiceRecord::new("web-1".parse().unwrap(), "web".parse().unwrap())
    };
    Arc::new(fixture::instance(fixture::node_entry(info), record))
}

/// `instance` under another id.
fn numbered(instance: &Instance, number: usize) -> Arc<Instance> {
    let mut instance = instance.clone();
    Arc::make_mut(&mut instance.record).id = format!("web-{number}").parse().unwrap();
    Arc::new(instance)
}

type AppBody = UnsyncBoxBody<Bytes, std::io::Error>;

fn text(text: String) -> AppBody {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync()
}

/// What the tests see of the app.
#[derive(Clone)]
struct App {
    /// One message per request, and `dropped` when a hanging request is given up.
    seen: mpsc::Sender<String>,
}

struct SaysDropped(mpsc::Sender<String>);

impl Drop for SaysDropped {
    fn drop(&mut self) {
        self.0.try_send("dropped".to_owned()).unwrap();
    }
}

impl App {
    async fn answer(self, mut request: Request<Incoming>) -> Result<Response<AppBody>, Infallible> {
        self.seen.try_send(format!("{} {}", request.method(), request.uri().path())).unwrap();
        let response = match request.uri().path() {
            "/echo" => Response::new(request.into_body().map_err(std::io::Error::other).boxed_unsync()),
            "/hang" => {
                let _guard = SaysDropped(self.seen);
                std::future::pending().await
            }
            "/upgrade" => {
                tokio::task::spawn_local(async move {
                    let mut io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                    let mut bytes = Vec::new();
                    io.write_all(b"hello ").await.unwrap();
                    io.read_to_end(&mut bytes).await.unwrap();
                    io.write_all(&bytes).await.unwrap();
                    io.shutdown().await.unwrap();
                });
                Response::builder()
                    .status(101)
                    .header("connection", "upgrade")
                    .header("upgrade", "raw")
                    .body(text(String::new()))
                    .unwrap()
            }
            "/trailers-only" => Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "5")
                .body(http_body_util::Empty::new().map_err(|never: Infallible| match never {}).boxed_unsync())
                .unwrap(),
            _ => {
                let mut lines: Vec<_> = request
                    .headers()
                    .iter()
                    .map(|(name, value)| format!("{name}={}", value.to_str().unwrap()))
                    .collect();
                lines.sort();
                Response::new(text(lines.join("\n")))
            }
        };
        Ok(response)
    }
}

/// Starts an app that speaks HTTP/1.1, or HTTP/2 if told so.
async fn app(protocol: Protocol) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(64);
    tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let app = App { seen: seen.clone() };
            let service = service_fn(move |request| app.clone().answer(request));
            tokio::task::spawn_local(async move {
                let io = TokioIo::new(stream);
                if protocol == Protocol::Http {
                    let mut builder = hyper::server::conn::http1::Builder::new();
                    builder.max_headers(HEADERS_MAX);
                    let _ended = builder.serve_connection(io, service).with_upgrades().await;
                } else {
                    let _ended = hyper::server::conn::http2::Builder::new(Local).serve_connection(io, service).await;
                }
            });
        }
    });
    (addr, messages)
}

#[derive(Clone)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}

/// Runs a test on one thread, with a deadline.
#[track_caller]
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(30), test).await.expect("the test hangs");
    });
}

struct Setup {
    worker: Rc<Loopback>,
    port: SocketAddr,
    messages: mpsc::Receiver<String>,
}

async fn setup_with(protocol: Protocol, limits: Limits) -> Setup {
    let worker = Loopback::new(limits);
    let (addr, messages) = app(protocol).await;
    worker.add(addr, protocol).await;
    let port = worker.listen(false).await;
    Setup { worker, port, messages }
}

async fn setup() -> Setup {
    setup_with(Protocol::Http, Limits::default()).await
}

/// Sends raw bytes and reads until the connection ends.
async fn raw(port: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(port).await.unwrap();
    // A refusal may end the connection before all was sent.
    let _sent = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

type Client<B> = hyper::client::conn::http1::SendRequest<B>;

async fn client<B>(port: SocketAddr) -> Client<B>
where
    B: http_body::Body + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = TokioIo::new(TcpStream::connect(port).await.unwrap());
    let (sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    tokio::task::spawn_local(async move {
        let _ended = connection.await;
    });
    sender
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder().uri(path).header("host", "web").body(Full::default()).unwrap()
}

async fn body_text(response: Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[test]
fn a_connection_carries_requests_one_after_another_and_the_app_learns_who_calls() {
    run(async {
        let setup = setup().await;
        let mut client = client(setup.port).await;
        for _ in 0..3 {
            client.ready().await.unwrap();
            let mut request = get("/");
            request.headers_mut().insert("x-forwarded-client-cert", "URI=spiffe://td/node/forged".parse().unwrap());
            let text = body_text(client.send_request(request).await.unwrap()).await;
            assert!(text.contains("x-forwarded-client-cert=URI=spiffe://td/svc/api/node/n1"), "{text}");
            assert!(text.contains("host=web") && text.contains("x-request-id=") && !text.contains("forged"), "{text}");
        }
        drop(client);
        let text = setup.worker.metrics.render().unwrap();
        for reporter in ["source", "destination"] {
            let series = format!(
                "weft_http_requests_total{{connection_security=\"mutual_tls\",destination_service=\"web\",grpc_response_status=\"\",reporter=\"{reporter}\",response_code=\"200\",response_flags=\"-\",source_service=\"api\"}} 3"
            );
            assert!(text.contains(&series), "{text}");
        }
        assert_eq!(setup.worker.publisher.reader().load().index, 1);
    });
}

#[test]
fn a_mebibyte_comes_back_whole() {
    run(async {
        let setup = setup().await;
        let body: Vec<u8> = (0..1024 * 1024_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        let mut client = client(setup.port).await;
        let request = Request::builder()
            .method("POST")
            .uri("/echo")
            .header("host", "web")
            .body(Full::new(Bytes::from(body.clone())));
        let response = client.send_request(request.unwrap()).await.unwrap();
        assert!(response.into_body().collect().await.unwrap().to_bytes() == body);
    });
}

#[test]
fn chunked_bodies_and_their_trailers_pass() {
    run(async {
        let setup = setup().await;
        let request = b"POST /echo HTTP/1.1\r\nhost: web\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
        let answer = raw(setup.port, request).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("transfer-encoding: chunked"), "{answer}");
        let body: String = answer.split("\r\n\r\n").nth(1).unwrap().split("\r\n").skip(1).step_by(2).collect();
        assert_eq!(body, "abcdefg");
    });
}

#[test]
fn an_app_that_answers_well_before_it_asks_for_the_body_still_gets_it() {
    run(async {
        let setup = setup().await;
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream
            .write_all(b"POST /echo HTTP/1.1\r\nhost: web\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        while !answer.ends_with("\r\n\r\n") {
            answer.push(char::from(stream.read_u8().await.unwrap()));
        }
        stream.write_all(b"ok").await.unwrap();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
    });
}

#[test]
fn after_an_upgrade_bytes_flow_both_ways_and_each_way_ends_by_itself() {
    run(async {
        let setup = setup().await;
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream
            .write_all(b"GET /upgrade HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n")
            .await
            .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"hello ") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101") && head.contains("upgrade: raw"), "{head}");
        stream.write_all(b"world").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "world");
    });
}

#[test]
fn a_caller_that_leaves_ends_the_request_at_the_app() {
    run(async {
        let mut setup = setup().await;
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream.write_all(b"GET /hang HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        assert_eq!(setup.messages.recv().await.unwrap(), "GET /hang");
        drop(stream);
        assert_eq!(setup.messages.recv().await.unwrap(), "dropped");
    });
}

#[test]
fn an_instance_that_cannot_be_connected_is_passed_over_with_the_body_sent_again() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        worker.add(closed, Protocol::Http).await;
        let (open, _messages) = app(Protocol::Http).await;
        worker.add(open, Protocol::Http).await;
        let port = worker.listen(false).await;
        let answer =
            raw(port, b"POST /echo HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 5\r\n\r\nagain").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("again"), "{answer}");

        worker.tunnels.borrow_mut().pop();
        let answer = raw(port, b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-weft-reason: connect_failure"), "{answer}");
        worker.tunnels.borrow_mut().pop();
        let answer = raw(port, b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
        assert!(answer.contains("x-weft-reason: no_healthy_instance") && answer.contains("2 of 2"), "{answer}");
    });
}

#[test]
fn the_shared_port_routes_by_host() {
    run(async {
        let setup = setup().await;
        let port = setup.worker.listen(true).await;
        for (host, status, reason) in [
            ("web.weft", 200, ""),
            ("WEB.service.consul:8080", 200, ""),
            ("web.service.weft", 200, ""),
            ("db.weft", 503, "unknown_service"),
            ("example.org", 404, "unknown_host"),
        ] {
            let answer =
                raw(port, format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(reason), "{host}: {answer}");
        }
    });
}

#[test]
fn grpc_streams_both_ways_at_once_and_ends_with_trailers() {
    run(async {
        let setup = setup_with(Protocol::Grpc, Limits::default()).await;
        let stream = TokioIo::new(TcpStream::connect(setup.port).await.unwrap());
        let (mut client, connection) = hyper::client::conn::http2::handshake(Local, stream).await.unwrap();
        tokio::task::spawn_local(async move {
            let _ended = connection.await;
        });
        let (sender, receiver) = mpsc::channel::<Frame<Bytes>>(4);
        let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|frame| (Ok::<_, Infallible>(frame), receiver))
        });
        let request = |path, body| {
            Request::builder()
                .method("POST")
                .uri(format!("http://web{path}"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(body)
                .unwrap()
        };
        let body = StreamBody::new(Box::pin(frames)).boxed_unsync();
        let response = client.send_request(request("/echo", body)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let mut body = response.into_body();
        for turn in 0..3_u8 {
            sender.send(Frame::data(Bytes::copy_from_slice(&[turn; 10]))).await.unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), vec![turn; 10]);
        }
        let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "7".parse().unwrap())]);
        sender.send(Frame::trailers(trailers)).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap()["grpc-status"], "7");

        let empty = http_body_util::Empty::new().boxed_unsync();
        let response = client.send_request(request("/trailers-only", empty)).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "5");
        assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("grpc_response_status=\"7\"") && text.contains("grpc_response_status=\"5\""), "{text}");
    });
}

//! What entries say, of callers and apps that both speak HTTP/2: requests and gRPC.

use std::collections::VecDeque;

use http::Method;
use http::request::Parts;
use serde_json::{Value, json};

use super::edge::{connect, h2_client};
use super::routed::{route, say};
use super::*;
use crate::routing::Cause;

/// What an app does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Say {
    /// Answers with this status and the text `ok`.
    Status(u16),
    /// Answers a call of gRPC with nothing but this status, and this word on retries.
    Grpc(&'static str, Option<&'static str>),
    /// Answers a call of gRPC with a message, and its status in trailers.
    Message,
    /// Answers a call of gRPC with a message, and no end.
    Stall,
    /// Never answers; tells when its stream is reset.
    Hang,
}

/// What an app was sent; none: its caller has left.
type Met = Option<(Parts, Vec<u8>)>;

/// An app over HTTP/2 that does so with one request after another; the last one stays.
async fn scripted(script: &[Say]) -> (SocketAddr, mpsc::Receiver<Met>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(64);
    let script: Rc<RefCell<VecDeque<Say>>> = Rc::new(RefCell::new(script.iter().copied().collect()));
    tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (seen, script) = (seen.clone(), Rc::clone(&script));
            tokio::task::spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    let next = {
                        let mut script = script.borrow_mut();
                        if script.len() > 1 { script.pop_front().unwrap() } else { script[0] }
                    };
                    tokio::task::spawn_local(serve(request, respond, next, seen.clone()));
                }
            });
        }
    });
    (addr, messages)
}

async fn serve(
    request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    say: Say,
    seen: mpsc::Sender<Met>,
) {
    let (head, mut body) = request.into_parts();
    let mut bytes = Vec::new();
    while let Some(Ok(chunk)) = body.data().await {
        bytes.extend_from_slice(&chunk);
    }
    let _nobody_looks = seen.try_send(Some((head, bytes)));
    let grpc = || Response::builder().header("content-type", "application/grpc");
    match say {
        Say::Status(status) => {
            let response = Response::builder().status(status).header("x-app", "1").body(()).unwrap();
            respond.send_response(response, false).unwrap().send_data(Bytes::from_static(b"ok"), true).unwrap();
        }
        Say::Grpc(status, pushback) => {
            let mut response = grpc().header("grpc-status", status);
            if let Some(pushback) = pushback {
                response = response.header("grpc-retry-pushback-ms", pushback);
            }
            respond.send_response(response.body(()).unwrap(), true).unwrap();
        }
        Say::Message => {
            let mut send = respond.send_response(grpc().body(()).unwrap(), false).unwrap();
            send.send_data(Bytes::from_static(b"\0\0\0\0\0"), false).unwrap();
            send.send_trailers(HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())])).unwrap();
        }
        Say::Stall => {
            let mut send = respond.send_response(grpc().body(()).unwrap(), false).unwrap();
            send.send_data(Bytes::from_static(b"\0\0\0\0\0"), false).unwrap();
            let _reset = std::future::poll_fn(|cx| send.poll_reset(cx)).await;
            let _nobody_looks = seen.try_send(None);
        }
        Say::Hang => {
            let _reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            let _nobody_looks = seen.try_send(None);
        }
    }
}

/// A worker whose balancer takes turns between apps over HTTP/2, the first app first, and a caller over HTTP/2.
struct Setup2 {
    worker: Rc<Loopback>,
    client: h2::client::SendRequest<Bytes>,
    apps: Vec<mpsc::Receiver<Met>>,
}

async fn start(scripts: &[&[Say]], entries: &[(&str, &str, Value)]) -> Setup2 {
    let worker = Loopback::new(Limits::default());
    let mut apps = Vec::new();
    for script in scripts {
        let (addr, messages) = scripted(script).await;
        worker.add(addr, Protocol::Http2).await;
        apps.push(messages);
    }
    say(&worker, entries);
    worker.balance(&json!({"PassiveHealthCheck": {"MaxFailures": 3}}));
    let client = h2_client(worker.listen(false).await).await;
    Setup2 { worker, client, apps }
}

/// An answer: its head, its body, its trailers.
type Answer = Response<(String, Option<HeaderMap>)>;

impl Setup2 {
    async fn ask(&self, request: Request<()>, body: &'static str) -> Result<Answer, h2::Error> {
        let mut client = self.client.clone().ready().await?;
        let (response, mut send) = client.send_request(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            send.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
        }
        let (head, mut body) = response.await?.into_parts();
        let mut bytes = Vec::new();
        while let Some(chunk) = body.data().await {
            bytes.extend_from_slice(&chunk?);
        }
        let trailers = body.trailers().await?;
        Ok(Response::from_parts(head, (String::from_utf8(bytes).unwrap(), trailers)))
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask(Request::builder().uri(format!("http://web{path}")).body(()).unwrap(), "").await.unwrap()
    }

    async fn call(&self, timeout: Option<&str>) -> Answer {
        self.ask(grpc(timeout), "\0\0\0\0\0").await.unwrap()
    }

    /// What the apps were sent since the last look.
    fn met(&mut self) -> Vec<usize> {
        let count = |app: &mut mpsc::Receiver<Met>| std::iter::from_fn(|| app.try_recv().ok()).flatten().count();
        self.apps.iter_mut().map(count).collect()
    }
}

fn grpc(timeout: Option<&str>) -> Request<()> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri("http://web/shop.Cart/Add")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    request.body(()).unwrap()
}

/// The status of a gRPC answer, in its head or its trailers.
fn status(answer: &Answer) -> &str {
    let trailers = answer.body().1.as_ref().unwrap_or(answer.headers());
    trailers["grpc-status"].to_str().unwrap()
}

#[test]
fn routes_rewrite_redirect_and_end_requests() {
    run(async {
        let router = json!({"Routes": [
            {"Match": {"HTTP": {"PathPrefix": "/api/", "Methods": ["GET"]}}, "Destination": {
                "PrefixRewrite": "/v2/", "HostRewrite": "inner.example:81", "RequestHeaders": {"Set": {"x-team": "shop"}},
                "ResponseHeaders": {"Add": {"x-by": "weft"}, "Remove": ["x-app"]}}},
            {"Match": {"HTTP": {"PathPrefix": "/old"}}, "Redirect": {"Code": 308, "PrefixRewrite": "/new"}},
            {"Match": {"HTTP": {"PathPrefix": "/timed"}}, "Destination": {"RequestTimeout": "200ms"}},
        ]});
        let mut setup = start(&[&[Say::Status(200), Say::Hang]], &[("service-router", "web", router)]).await;
        let answer = setup.get("/api/cart?item=1").await;
        assert_eq!((answer.status().as_u16(), &*answer.body().0), (200, "ok"));
        assert!(answer.headers()["x-by"] == "weft" && !answer.headers().contains_key("x-app"), "{answer:?}");
        let (head, _) = setup.apps[0].recv().await.unwrap().unwrap();
        assert_eq!(head.uri.to_string(), "http://inner.example:81/v2/cart?item=1");
        assert_eq!(head.headers["x-team"], "shop");

        let answer = setup.get("/old/x?y=1").await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["location"]), (308, &"/new/x?y=1".parse().unwrap()));

        let answer = setup.get("/timed").await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-weft-reason"]), (504, &"timeout".parse().unwrap()));
        assert!(setup.apps[0].recv().await.unwrap().is_some());
        assert!(setup.apps[0].recv().await.unwrap().is_none(), "the app sees that its caller left");
    });
}

#[test]
fn faults_delay_abort_and_reset_a_stream_alone() {
    run(async {
        let faults = json!({"Faults": [
            {"Match": {"HTTP": {"PathPrefix": "/slow"}}, "Delay": {"Duration": "200ms"}},
            {"Match": {"HTTP": {"PathPrefix": "/bad"}}, "Abort": {"HTTPStatus": 418}},
            {"Match": {"HTTP": {"PathPrefix": "/shop.Cart/"}}, "Abort": {"GRPCStatus": 8}},
            {"Match": {"HTTP": {"PathPrefix": "/rst"}}, "Abort": {"Reset": true}},
        ]});
        let setup = start(&[&[Say::Status(200)]], &[("service-faults", "web", faults)]).await;
        let begun = crate::clock::now();
        assert_eq!(setup.get("/slow").await.status(), 200);
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert_eq!(setup.get("/bad").await.status(), 418);
        let answer = setup.call(None).await;
        assert_eq!((answer.status().as_u16(), status(&answer)), (200, "8"));
        let request = Request::builder().uri("http://web/rst").body(()).unwrap();
        assert!(setup.ask(request, "").await.unwrap_err().is_reset());
        // The connection and its other streams go on.
        assert_eq!(setup.get("/").await.status(), 200);
    });
}

#[test]
fn retries_send_the_body_again_and_ask_other_instances() {
    run(async {
        let destination = json!({"NumRetries": 2, "RetryOn": ["5xx"], "RetryBackoff": {"BaseInterval": "1ms"}});
        let mut setup = start(&[&[Say::Status(503)], &[Say::Status(200)]], &[route(&destination)]).await;
        let request = Request::builder().method(Method::POST).uri("http://web/x").body(()).unwrap();
        assert_eq!(setup.ask(request, "body").await.unwrap().status(), 200);
        for app in &mut setup.apps {
            let (head, body) = app.recv().await.unwrap().unwrap();
            assert_eq!((head.uri.path(), &*body), ("/x", &b"body"[..]));
        }
        // What fails time and again is ejected, also where the caller sees nothing of it.
        for _ in 0..6 {
            assert_eq!(setup.get("/x").await.status(), 200);
        }
        let notices = setup.worker.balancer.borrow().as_ref().unwrap().take_notices();
        assert!(matches!(&notices[..], [one] if one.cause == Cause::Consecutive), "{notices:?}");
        assert_eq!(setup.met(), [2, 6], "three failures in a row eject");
    });
}

#[test]
fn grpc_retry_pushback_ms_puts_a_retry_off_or_forbids_it() {
    run(async {
        let destination = json!({"NumRetries": 1, "RetryOn": ["unavailable"], "RetryBackoff": {"BaseInterval": "1ms"}});
        for (pushback, wait, want) in
            [(None, 0, "0"), (Some("300"), 300, "0"), (Some("-1"), 0, "14"), (Some("soon"), 0, "14")]
        {
            let mut setup = start(&[&[Say::Grpc("14", pushback), Say::Message]], &[route(&destination)]).await;
            let begun = crate::clock::now();
            let answer = setup.call(None).await;
            let took = begun.elapsed();
            assert_eq!(status(&answer), want, "{pushback:?}");
            assert!(took >= Duration::from_millis(wait), "{pushback:?}: {took:?}");
            assert_eq!(setup.met(), [if want == "0" { 2 } else { 1 }], "{pushback:?}");
        }
    });
}

#[test]
fn a_grpc_deadline_is_kept_and_what_is_left_of_it_goes_along() {
    run(async {
        for entries in [vec![], vec![route(&json!({"RequestTimeout": "20s"}))]] {
            let mut setup = start(&[&[Say::Hang]], &entries).await;
            let answer = setup.call(Some("200m")).await;
            assert_eq!(status(&answer), "4");
            let (head, _) = setup.apps[0].recv().await.unwrap().unwrap();
            let left = head.headers["grpc-timeout"].to_str().unwrap().strip_suffix('m').unwrap();
            assert!((1..=200).contains(&left.parse::<u64>().unwrap()), "{left}");
        }
    });
}

#[test]
fn grpc_that_takes_too_long_once_it_has_begun_ends_with_its_status_and_not_as_if_it_were_whole() {
    run(async {
        for limit in [json!({"RequestTimeout": "300ms"}), json!({"IdleTimeout": "300ms"})] {
            let mut setup = start(&[&[Say::Stall]], &[route(&limit)]).await;
            let answer = setup.call(None).await;
            assert_eq!((&*answer.body().0, status(&answer)), ("\0\0\0\0\0", "4"), "{limit}");
            assert!(setup.apps[0].recv().await.unwrap().is_some());
            assert!(setup.apps[0].recv().await.unwrap().is_none(), "the app sees its caller leave");
            let text = setup.worker.metrics.render().unwrap();
            let is_counted = |line: &str| line.contains("grpc_response_status=\"4\"") && line.contains("\"UT\"");
            assert!(text.lines().any(is_counted), "{text}");
        }
        // Of anything else only a reset says so.
        let setup = start(&[&[Say::Stall]], &[route(&json!({"RequestTimeout": "300ms"}))]).await;
        let request = Request::builder().uri("http://web/").body(()).unwrap();
        assert!(setup.ask(request, "").await.unwrap_err().is_reset());
    });
}

#[test]
fn a_route_s_idle_timeout_ends_grpc_that_never_begins_to_answer() {
    run(async {
        let mut setup = start(&[&[Say::Hang]], &[route(&json!({"IdleTimeout": "200ms"}))]).await;
        assert_eq!(status(&setup.call(None).await), "4");
        assert!(setup.apps[0].recv().await.unwrap().is_some());
        assert!(setup.apps[0].recv().await.unwrap().is_none(), "the app sees its caller leave");
    });
}

#[test]
fn grpc_web_is_a_request_like_any_other() {
    run(async {
        let request = || {
            let post = Request::builder().method(Method::POST).uri("http://web/shop.Cart/Add");
            post.header("content-type", "application/grpc-web+proto").header("grpc-timeout", "50m").body(()).unwrap()
        };
        let limits = json!({"RequestTimeout": "300ms", "Hedge": {"Delay": "50ms", "GRPC": true}});
        let mut setup = start(&[&[Say::Hang], &[Say::Message]], &[route(&limits)]).await;
        let begun = crate::clock::now();
        let answer = setup.ask(request(), "\0\0\0\0\0").await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(300), "a word of its caller's for gRPC servers is not weft's");
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-weft-reason"]), (504, &"timeout".parse().unwrap()));
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/plain"), "{answer:?}");
        assert!(!answer.headers().contains_key("grpc-status") && answer.body().1.is_none(), "{answer:?}");
        let (head, body) = setup.apps[0].recv().await.unwrap().unwrap();
        assert_eq!((&head.headers["grpc-timeout"], &*body), (&"50m".parse().unwrap(), &b"\0\0\0\0\0"[..]));
        assert_eq!(setup.met()[1], 0, "it is not hedged");

        // What has begun and is not whole is reset: its trailers would be in its body.
        let setup = start(&[&[Say::Stall]], &[route(&json!({"RequestTimeout": "300ms"}))]).await;
        assert!(setup.ask(request(), "").await.unwrap_err().is_reset());
    });
}

#[test]
fn grpc_is_hedged_only_where_the_route_says_that_it_may_be_sent_twice() {
    run(async {
        let said = json!({"Hedge": {"Delay": "50ms", "GRPC": true}});
        let mut setup = start(&[&[Say::Hang], &[Say::Message]], &[route(&said)]).await;
        let answer = setup.call(None).await;
        assert_eq!((status(&answer), &*answer.body().0), ("0", "\0\0\0\0\0"));
        for app in &mut setup.apps {
            let (head, body) = app.recv().await.unwrap().unwrap();
            assert_eq!((head.uri.path(), &*body), ("/shop.Cart/Add", &b"\0\0\0\0\0"[..]));
        }
        assert!(setup.apps[0].recv().await.unwrap().is_none(), "the app of the loser sees its caller leave");
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("response_code=\"200\",response_flags=\"HW\""), "{text}");

        // A status that says that the app failed waits for the other, in whichever order they come.
        for first in ["14", "8", "13"] {
            let setup = start(&[&[Say::Hang], &[Say::Grpc(first, None)]], &[route(&said)]).await;
            assert_eq!(status(&setup.call(Some("400m")).await), "4", "{first}");
        }
        // One that the app means is an answer.
        let setup = start(&[&[Say::Hang], &[Say::Grpc("5", None)]], &[route(&said)]).await;
        assert_eq!(status(&setup.call(Some("20S")).await), "5");

        // A call whose body is not whole may be a stream: it is sent once.
        let setup = start(&[&[Say::Hang], &[Say::Message]], &[route(&said)]).await;
        let mut client = setup.client.clone().ready().await.unwrap();
        let (response, mut send) = client.send_request(grpc(Some("300m")), false).unwrap();
        send.send_data(Bytes::from_static(b"\0\0\0\0\0"), false).unwrap();
        assert_eq!(response.await.unwrap().headers()["grpc-status"], "4");
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("weft_http_hedges_total{destination_service=\"web\",outcome=\"body\"} 1"), "{text}");

        let plain = json!({"Hedge": {"Delay": "50ms", "Writes": ["PUT"]}});
        let mut setup = start(&[&[Say::Hang], &[Say::Message]], &[route(&plain)]).await;
        assert_eq!(status(&setup.call(Some("300m")).await), "4");
        assert_eq!(setup.met()[1], 0);
    });
}

#[test]
fn a_service_that_fails_closed_says_so() {
    run(async {
        let destination = json!({"RequestTimeout": "20s"});
        let setup = start(&[&[Say::Status(503)], &[Say::Status(200)]], &[route(&destination)]).await;
        let check = json!({"MaxFailures": 3, "PanicThreshold": 60, "FailClosed": true});
        setup.worker.balance(&json!({"PassiveHealthCheck": check}));
        say(&setup.worker, &[route(&destination)]);
        for entries in [vec![route(&destination)], vec![]] {
            say(&setup.worker, &entries);
            let mut answer = setup.get("/").await;
            for _ in 0..6 {
                answer = setup.get("/").await;
            }
            let (status, reason) = (answer.status().as_u16(), &answer.headers()["x-weft-reason"]);
            assert_eq!((status, reason.to_str().unwrap()), (503, "fails_closed"));
            let text = &answer.body().0;
            assert!(text.contains("`web` fails closed: 1 of 2 instances that pass are ejected"), "{text}");
        }
    });
}

#[test]
fn cookies_that_come_in_pieces_are_one_header_for_apps_routes_and_keys() {
    run(async {
        let router = json!({"Routes": [{"Match": {"HTTP": {"Header": [{"Name": "cookie", "Exact": "a=1; b=2; c=3"}]}},
            "Destination": {"RequestHeaders": {"Set": {"x-matched": "whole"}}}}]});
        let request = || {
            let pieces = Request::builder().uri("http://web/").header("cookie", "a=1").header("cookie", "b=2; c=3");
            pieces.body(()).unwrap()
        };
        let (addr, mut messages) = super::routed::scripted(&[super::routed::OK]).await;
        let worker = Loopback::new(Limits::default());
        worker.add(addr, Protocol::Http).await;
        let client = h2_client(worker.listen(false).await).await;
        let setup = Setup2 { worker, client, apps: Vec::new() };
        for entries in [vec![], vec![("service-router", "web", router)]] {
            say(&setup.worker, &entries);
            assert_eq!(setup.ask(request(), "").await.unwrap().status(), 200);
            let head = messages.recv().await.unwrap();
            let cookies: Vec<&str> = head.lines().filter(|line| line.starts_with("cookie: ")).collect();
            assert_eq!(cookies, ["cookie: a=1; b=2; c=3"]);
            assert_eq!(head.contains("x-matched: whole"), !entries.is_empty(), "{head}");
        }
    });
}

/// An app over HTTP/2 that takes WebSockets if `offers`: it sends back what comes, after `first`, and tells of each request.
async fn websockets(offers: bool) -> (SocketAddr, mpsc::Receiver<Request<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(8);
    tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let seen = seen.clone();
            tokio::task::spawn_local(async move {
                let mut builder = h2::server::Builder::new();
                if offers {
                    builder.enable_connect_protocol();
                }
                let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let (head, mut body) = request.into_parts();
                    let refuses = head.uri.path() == "/refused";
                    let _nobody_looks = seen.try_send(Request::from_parts(head, ()));
                    if refuses {
                        let response = Response::builder().status(403).body(()).unwrap();
                        respond.send_response(response, true).unwrap();
                        continue;
                    }
                    let chat = Response::builder().header("sec-websocket-protocol", "chat").body(()).unwrap();
                    let mut send = respond.send_response(chat, false).unwrap();
                    send.send_data(Bytes::from_static(b"first"), false).unwrap();
                    tokio::task::spawn_local(async move {
                        while let Some(Ok(chunk)) = body.data().await {
                            send.send_data(chunk, false).unwrap();
                        }
                        send.send_data(Bytes::new(), true).unwrap();
                    });
                }
            });
        }
    });
    (addr, messages)
}

const HANDSHAKE: &str = "GET /chat HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: WebSocket\r\n\
                         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

#[test]
fn a_websocket_to_an_app_over_http2_is_an_extended_connect() {
    run(async {
        let (addr, mut seen) = websockets(true).await;
        let worker = Loopback::new(Limits::default());
        worker.add(addr, Protocol::Http2).await;
        let port = worker.listen(false).await;
        // Of a caller over HTTP/1.1.
        let mut caller = TcpStream::connect(port).await.unwrap();
        caller.write_all(HANDSHAKE.as_bytes()).await.unwrap();
        let mut answer = String::new();
        while !answer.ends_with("first") {
            answer.push(char::from(caller.read_u8().await.unwrap()));
        }
        assert!(answer.starts_with("HTTP/1.1 101") && answer.contains("upgrade: websocket\r\n"), "{answer}");
        assert!(answer.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{answer}");
        assert!(answer.contains("sec-websocket-protocol: chat\r\n"), "{answer}");
        let request = seen.recv().await.unwrap();
        assert_eq!((request.method(), request.uri().path()), (&Method::CONNECT, "/chat"));
        assert_eq!(request.extensions().get::<h2::ext::Protocol>().unwrap().as_str(), "websocket");
        assert!(request.headers().contains_key("sec-websocket-version"));
        assert!(!request.headers().contains_key("sec-websocket-key"));
        caller.write_all(b"back").await.unwrap();
        caller.shutdown().await.unwrap();
        let mut rest = String::new();
        caller.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "back");

        // Of one over HTTP/2.
        let mut client = h2_client(port).await;
        while !client.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
        let (response, mut send) = client.send_request(connect("http://web/chat", Some("websocket")), false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        let mut body = response.into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "first");
        send.send_data(Bytes::from_static(b"back"), true).unwrap();
        assert_eq!(body.data().await.unwrap().unwrap(), "back");

        // A refusal is an answer like any other.
        let answer = raw(port, HANDSHAKE.replace("/chat", "/refused").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    });
}

#[test]
fn an_app_over_http2_that_takes_no_websockets_is_asked_for_none() {
    run(async {
        let (addr, mut seen) = websockets(false).await;
        let worker = Loopback::new(Limits::default());
        worker.add(addr, Protocol::Http2).await;
        let port = worker.listen(false).await;
        let answer = raw(port, HANDSHAKE.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 501") && answer.contains("x-weft-reason: no_websocket"), "{answer}");
        assert!(answer.contains("protocol http if it takes them over HTTP/1.1"), "{answer}");
        assert!(seen.try_recv().is_err());
    });
}

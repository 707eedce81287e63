//! The edges of HTTP: interim answers, `Expect`, upgrades, CONNECT, HEAD, trailers, loops, the drain.

use http::Method;
use http::header::{self, HeaderName};
use serde_json::json;

use super::routed::{route, say};
use super::*;
use crate::proxy::head::{HeadWriter, Payload, put_data_header};

/// One connection of an app that the test plays itself.
struct Played {
    listener: TcpListener,
    port: SocketAddr,
    worker: Rc<Loopback>,
}

impl Played {
    async fn start() -> Self {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
        let port = worker.listen(false).await;
        Self { listener, port, worker }
    }

    /// Sends a request and returns both ends, with the head that the app was sent.
    async fn begin(&self, request: &str) -> (TcpStream, TcpStream, String) {
        let mut caller = TcpStream::connect(self.port).await.unwrap();
        caller.write_all(request.as_bytes()).await.unwrap();
        let (mut app, _) = self.listener.accept().await.unwrap();
        let head = until(&mut app, "\r\n\r\n").await;
        (caller, app, head)
    }
}

/// Reads up to and with `end`, and no byte more.
pub(super) async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        match stream.read_u8().await {
            Ok(byte) => bytes.push(byte),
            Err(error) => panic!("{error} before {end:?}: {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
    String::from_utf8(bytes).unwrap()
}

pub(super) async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Tells whether nothing comes while everything else that can happen happens.
async fn is_silent(stream: &TcpStream) -> bool {
    // Not `readable`: what was read byte by byte leaves its mark.
    tokio::time::timeout(Duration::from_millis(200), stream.peek(&mut [0])).await.is_err()
}

const UPLOAD: &str =
    "POST /up HTTP/1.1\r\nhost: web\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";

#[test]
fn an_interim_answer_goes_ahead_of_the_final_one() {
    run(async {
        let played = Played::start().await;
        let get = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
        let (mut caller, mut app, _) = played.begin(get).await;
        for number in ["1", "2"] {
            let hints = format!("HTTP/1.1 103 Early Hints\r\nlink: </{number}>\r\nconnection: x-a\r\nx-a: b\r\n\r\n");
            app.write_all(hints.as_bytes()).await.unwrap();
            let seen = until(&mut caller, "\r\n\r\n").await;
            assert_eq!(seen, format!("HTTP/1.1 103 Early Hints\r\nlink: </{number}>\r\n\r\n"));
        }
        app.write_all(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        )
        .await
        .unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nok"), "nobody expected 100: {answer}");

        // HTTP/1.0 knows no interim answers.
        let (mut caller, mut app, _) = played.begin("GET / HTTP/1.0\r\nhost: web\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        assert!(rest(&mut caller).await.starts_with("HTTP/1.0 204"));
    });
}

#[test]
fn more_interim_answers_than_anybody_sends_are_not_passed_for_ever() {
    run(async {
        let played = Played::start().await;
        let get = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
        let (mut caller, mut app, _) = played.begin(get).await;
        app.write_all("HTTP/1.1 102 Processing\r\n\r\n".repeat(500).as_bytes()).await.unwrap();
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.matches("102 Processing").count() <= 8, "{answer}");
        assert!(answer.contains("HTTP/1.1 200 OK\r\n") && answer.contains("content-length"), "{answer}");
    });
}

#[test]
fn a_body_is_asked_for_when_the_app_asks_for_it() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, head) = played.begin(UPLOAD).await;
        assert!(head.contains("expect: 100-continue") && head.contains("content-length: 4"), "{head}");
        assert!(is_silent(&caller).await, "the caller is told to go on before the app says so");
        app.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        assert_eq!(until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        caller.write_all(b"body").await.unwrap();
        assert_eq!(until(&mut app, "body").await, "body");
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        assert!(rest(&mut caller).await.ends_with("ok"));
    });
}

#[test]
fn an_app_that_refuses_what_is_expected_never_gets_the_body() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, _) = played.begin(UPLOAD).await;
        app.write_all(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 3\r\n\r\n").await.unwrap();
        let head = until(&mut caller, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 417"), "{head}");
        // The answer stays whole though nobody sends the body.
        app.write_all(b"why").await.unwrap();
        assert_eq!(rest(&mut caller).await, "why");
        assert_eq!(rest(&mut app).await, "", "the app's connection ends: it is owed a body");
    });
}

#[test]
fn an_app_that_does_not_know_how_to_ask_gets_the_body_in_the_end() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, _) = played.begin(UPLOAD).await;
        assert_eq!(until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        caller.write_all(b"body").await.unwrap();
        assert_eq!(until(&mut app, "body").await, "body");
    });
}

#[test]
fn an_app_over_http2_gets_the_body_without_a_wait_for_its_word() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http2).await;
        let port = worker.listen(false).await;
        tokio::task::spawn_local(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let mut held = Vec::new();
            while let Some(Ok(request)) = connection.accept().await {
                held.push(request);
            }
        });
        let mut caller = TcpStream::connect(port).await.unwrap();
        let begun = crate::clock::now();
        caller.write_all(UPLOAD.as_bytes()).await.unwrap();
        assert_eq!(until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_caller_that_begins_the_preface_of_http2_and_stops_is_let_go() {
    run(async {
        let worker = Loopback::new(Limits { head: Duration::from_millis(100), ..Limits::default() });
        let port = worker.listen(false).await;
        let mut caller = TcpStream::connect(port).await.unwrap();
        caller.write_all(b"P").await.unwrap();
        let end = tokio::time::timeout(Duration::from_secs(10), caller.read_u8()).await;
        assert!(matches!(end, Ok(Err(_))), "{end:?}");
    });
}

const UPGRADE: &str = "GET /ws HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";

#[test]
fn bytes_flow_only_after_101_and_a_refused_upgrade_ends_the_connection() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, head) = played.begin(&format!("{UPGRADE}early")).await;
        assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
        assert!(is_silent(&app).await, "bytes of another protocol came before it was agreed on");
        let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nfirst";
        app.write_all(switch.as_bytes()).await.unwrap();
        assert_eq!(until(&mut app, "early").await, "early");
        let answer = until(&mut caller, "first").await;
        assert!(answer.starts_with("HTTP/1.1 101") && answer.contains("upgrade: websocket"), "{answer}");

        // Whatever follows a refused one reaches nobody, as a request or otherwise.
        let (mut caller, mut app, _) = played.begin(&format!("{UPGRADE}GET /next HTTP/1.1\r\nhost: web\r\n\r\n")).await;
        app.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("connection: close"), "{answer}");
        let after = tokio::time::timeout(Duration::from_millis(200), app.read_u8()).await;
        assert!(answer.ends_with("no") && !matches!(after, Ok(Ok(_))), "{answer} {after:?}");
    });
}

#[test]
fn an_upgraded_stream_outlives_the_timeouts_of_requests() {
    run(async {
        let setup = setup().await;
        let limits = json!({"RequestTimeout": "100ms", "IdleTimeout": "50ms"});
        say(&setup.worker, &[route(&limits)]);
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream.write_all(UPGRADE.replace("/ws", "/upgrade").as_bytes()).await.unwrap();
        until(&mut stream, "hello ").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream.write_all(b"world").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await, "world");
    });
}

#[test]
fn a_silent_upgraded_stream_is_reset_after_the_time_that_its_service_s_resolver_says_by_either_side() {
    run(async {
        let says = [("service-resolver", "web", json!({"IdleTimeout": "300ms"}))];
        // The caller's side takes the time from when the request came, the app's from when it switched.
        for (first, then) in [(&says[..], &[][..]), (&[][..], &says[..])] {
            let played = Played::start().await;
            say(&played.worker, first);
            let (mut caller, mut app, _) = played.begin(UPGRADE).await;
            say(&played.worker, then);
            let switched = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
            app.write_all(switched).await.unwrap();
            until(&mut caller, "\r\n\r\n").await;
            for end in [&mut caller, &mut app] {
                let error = end.read_u8().await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{first:?}");
            }
        }
    });
}

#[test]
fn an_app_that_resets_an_upgraded_connection_resets_the_caller_s() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, _) = played.begin(UPGRADE).await;
        app.write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nx")
            .await
            .unwrap();
        until(&mut caller, "\r\n\r\nx").await;
        app.set_zero_linger().unwrap();
        drop(app);
        let error = caller.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

/// Speaks HTTP/2 as a client.
pub(super) async fn h2_client(port: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let stream = TcpStream::connect(port).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::task::spawn_local(async move {
        let _ended = connection.await;
    });
    client.ready().await.unwrap()
}

pub(super) fn connect(uri: &str, protocol: Option<&'static str>) -> Request<()> {
    let mut request = Request::builder().method(Method::CONNECT).uri(uri).body(()).unwrap();
    if let Some(protocol) = protocol {
        request.extensions_mut().insert(h2::ext::Protocol::from_static(protocol));
    }
    request
}

#[test]
fn a_websocket_over_http2_is_an_upgrade_at_the_app() {
    run(async {
        let played = Played::start().await;
        let mut client = h2_client(played.port).await;
        // The server's first SETTINGS say so.
        while !client.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
        let (response, mut send) = client.send_request(connect("http://web/chat", Some("websocket")), false).unwrap();
        let (mut app, _) = played.listener.accept().await.unwrap();
        let head = until(&mut app, "\r\n\r\n").await;
        assert!(head.starts_with("GET /chat HTTP/1.1\r\n") && head.contains("host: web\r\n"), "{head}");
        assert!(head.contains("upgrade: websocket\r\n") && head.contains("sec-websocket-key: "), "{head}");
        let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                      sec-websocket-accept: x\r\nsec-websocket-protocol: chat\r\n\r\nfirst";
        app.write_all(switch.as_bytes()).await.unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let names: Vec<_> =
            response.headers().keys().map(http::HeaderName::as_str).filter(|name| *name != "date").collect();
        assert_eq!(names, ["sec-websocket-protocol"]);
        let mut body = response.into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "first");
        // Each way ends by itself.
        send.send_data(Bytes::from_static(b"last"), true).unwrap();
        assert_eq!(rest(&mut app).await, "last");
        app.write_all(b"more").await.unwrap();
        assert_eq!(body.data().await.unwrap().unwrap(), "more");
        drop(app);
        // An end by itself is a frame without data.
        let end = body.data().await;
        assert!(
            end.is_none_or(|data| data.unwrap().is_empty()) && body.is_end_stream(),
            "the app's end is the stream's"
        );

        // One that the app refuses is an answer like any other.
        let (response, _send) = client.send_request(connect("http://web/chat", Some("websocket")), false).unwrap();
        let (mut app, _) = played.listener.accept().await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert_eq!(response.into_body().data().await.unwrap().unwrap(), "no");
    });
}

#[test]
fn a_handshake_that_an_app_answers_with_200_and_no_switch_is_not_accepted() {
    run(async {
        let played = Played::start().await;
        let mut client = h2_client(played.port).await;
        while !client.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
        let (response, _send) = client.send_request(connect("http://web/chat", Some("websocket")), false).unwrap();
        let (mut app, _) = played.listener.accept().await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
        assert_eq!(response.await.unwrap().status(), StatusCode::BAD_GATEWAY);
    });
}

#[test]
fn connect_leads_nowhere_and_says_so() {
    run(async {
        let mut setup = setup().await;
        let answer = raw(setup.port, b"CONNECT other:22 HTTP/1.1\r\nhost: other:22\r\n\r\nSSH-2.0-x\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 501") && answer.contains("connection: close"), "{answer}");
        assert!(answer.contains("CONNECT is not offered"), "{answer}");
        let mut client = h2_client(setup.port).await;
        while !client.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
        for request in [connect("other:22", None), connect("http://web/", Some("connect-udp"))] {
            let (response, _send) = client.send_request(request, false).unwrap();
            assert_eq!(response.await.unwrap().status(), StatusCode::NOT_IMPLEMENTED);
        }
        assert!(setup.messages.try_recv().is_err(), "it reached the app");
    });
}

#[test]
fn head_says_how_long_the_body_would_be_and_sends_none() {
    run(async {
        let played = Played::start().await;
        let request = "HEAD /file HTTP/1.1\r\nhost: web\r\n\r\n";
        let (mut caller, mut app, head) = played.begin(request).await;
        assert!(head.starts_with("HEAD /file"), "{head}");
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1048576\r\n\r\n").await.unwrap();
        let answer = until(&mut caller, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("content-length: 1048576"), "{answer}");
        // Both connections go on: nothing is owed.
        caller.write_all(b"GET /next HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await.unwrap();
        assert!(until(&mut app, "\r\n\r\n").await.starts_with("GET /next"));
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        assert!(rest(&mut caller).await.ends_with("\r\n\r\nok"));
    });
}

#[test]
fn trailers_pass_both_ways_but_for_those_that_say_who_calls_or_frame_a_message() {
    run(async {
        let played = Played::start().await;
        let request = "POST / HTTP/1.1\r\nhost: web\r\nconnection: close, te\r\nte: trailers\r\n\
                       trailer: x-sum, x-forwarded-client-cert, content-length\r\ntransfer-encoding: chunked\r\n\r\n\
                       2\r\nhi\r\n0\r\nx-sum: 1\r\nx-forwarded-client-cert: URI=spiffe://td/forged\r\ncontent-length: 9\r\n\r\n";
        let (mut caller, mut app, head) = played.begin(request).await;
        assert!(head.contains("te: trailers\r\n"), "{head}");
        let body = until(&mut app, "\r\n\r\n").await;
        assert!(body.contains("x-sum: 1\r\n"), "{body}");
        assert!(!body.contains("forged") && !body.contains("content-length"), "{body}");
        let answer =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-res\r\n\r\n2\r\nok\r\n0\r\nx-res: 2\r\n\r\n";
        app.write_all(answer.as_bytes()).await.unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.contains("trailer: x-res") && answer.ends_with("0\r\nx-res: 2\r\n\r\n"), "{answer}");
    });
}

#[test]
fn an_agent_that_says_in_trailers_who_calls_is_not_believed() {
    run(async {
        let played = Played::start().await;
        let tunnel = played.worker.tunnels.borrow()[0].clone();
        let (mut send, _recv) = tunnel.open_bi().await.unwrap();
        // In the place of a preamble.
        let mut bytes = BytesMut::from(&[0, 0][..]);
        let mut writer = HeadWriter::request(&mut bytes, Payload::Frames, &Method::POST, (b"web", b"/"));
        writer.header(&header::TRAILER, b"x-sum, x-forwarded-client-cert, x_forwarded_client_cert");
        writer.finish().unwrap();
        put_data_header(&mut bytes, 2);
        bytes.extend_from_slice(b"hi");
        let mut writer = HeadWriter::trailers(&mut bytes);
        for name in ["x-sum", "x-forwarded-client-cert", "x_forwarded_client_cert"] {
            writer.header(&HeaderName::from_static(name), b"URI=spiffe://td/forged");
        }
        writer.finish().unwrap();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
        let (mut app, _) = played.listener.accept().await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        let body = until(&mut app, "\r\n\r\n").await;
        assert!(body.contains("x-sum: URI="), "{body}");
        assert!(!body.contains("client"), "{body}");
    });
}

#[test]
fn an_early_answer_ends_the_connection_that_still_owes_a_body() {
    run(async {
        let played = Played::start().await;
        let (mut caller, mut app, _) =
            played.begin("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 1000000\r\n\r\nabc").await;
        app.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        drop(app);
        let answer = until(&mut caller, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        // A request in the place of the body is the body.
        let _ended = caller.write_all(b"GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n").await;
        let next = tokio::time::timeout(Duration::from_millis(300), played.listener.accept()).await;
        if let Ok(Ok((mut app, _))) = next {
            let mut bytes = [0; 64];
            let count = app.read(&mut bytes).await.unwrap_or(0);
            assert!(!bytes[..count].starts_with(b"GET /smuggled"), "it reached the app as a request");
        }
    });
}

#[test]
fn a_service_that_calls_itself_is_told_so() {
    run(async {
        let worker = Loopback::new(Limits::default());
        // The instance's app is the port that leads to it.
        let port = worker.listen(false).await;
        worker.add(port, Protocol::Http).await;
        let answer = raw(port, b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 508") && answer.contains("a service calls itself"), "{answer}");
    });
}

#[test]
fn a_body_that_the_destination_stops_and_does_not_answer_is_answered_for_in_time() {
    run(async {
        let worker = Loopback::new(Limits { response: Duration::from_millis(100), ..Limits::default() });
        let (tunnel, _endpoints) = worker.add_tunnel().await;
        let port = worker.listen(false).await;
        tokio::task::spawn_local(async move {
            let (_send, mut recv) = tunnel.accept_bi().await.unwrap();
            recv.read_chunk(usize::MAX, true).await.unwrap();
            recv.stop(0_u32.into()).unwrap();
            std::future::pending::<()>().await;
        });
        let mut caller = TcpStream::connect(port).await.unwrap();
        caller.write_all(b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 100000\r\n\r\nabc").await.unwrap();
        let answer = until(&mut caller, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    });
}

#[test]
fn a_fault_resets_a_connection_that_drains() {
    run(async {
        let setup = setup().await;
        let faults = json!({"Faults": [{"Match": {"HTTP": {"PathPrefix": "/"}},
            "Delay": {"Duration": "200ms"}, "Abort": {"Reset": true}}]});
        say(&setup.worker, &[("service-faults", "web", faults)]);
        let mut caller = TcpStream::connect(setup.port).await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        while !setup.worker.metrics.render().unwrap().contains("kind=\"delay\"") {
            tokio::task::yield_now().await;
        }
        setup.worker.http().drain();
        let error = caller.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_drain_ends_connections_after_their_requests_and_says_so() {
    run(async {
        let played = Played::start().await;
        let get = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";
        let mut idle = client::<Full<Bytes>>(played.port).await;
        let (mut caller, mut app, _) = played.begin(get).await;
        let mut h2 = h2_client(played.port).await;
        let (response, _) = h2.send_request(Request::get("http://web/").body(()).unwrap(), true).unwrap();
        let (mut second, _) = played.listener.accept().await.unwrap();
        until(&mut second, "\r\n\r\n").await;
        played.worker.http().drain();
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        app.write_all(ok).await.unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.contains("connection: close\r\n") && answer.ends_with("ok"), "{answer}");
        second.write_all(ok).await.unwrap();
        assert_eq!(
            response.await.unwrap().into_body().data().await.unwrap().unwrap(),
            "ok",
            "what is under way ends well"
        );
        // GOAWAY: no stream after it.
        let refused = async {
            while let Ok(mut ready) = h2.clone().ready().await {
                if let Ok((response, _)) = ready.send_request(Request::get("http://web/").body(()).unwrap(), true) {
                    assert!(response.await.is_err());
                }
            }
        };
        refused.await;
        assert!(idle.ready().await.is_err() || idle.send_request(super::get("/")).await.is_err());
    });
}

#[test]
fn what_an_app_of_this_host_says_of_whom_it_asks_for_passes_with_its_own_id() {
    run(async {
        let setup = setup().await;
        let said = "x-forwarded-for: 203.0.113.9\r\nx-forwarded-proto: https\r\nforwarded: for=203.0.113.9\r\n\
                    x-request-id: mine\r\ntraceparent: 00-1-2-01\r\ntracestate: a=1,b=2\r\nb3: 1-2-1";
        let request = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{said}\r\n\r\n");
        let answer = raw(setup.port, request.as_bytes()).await;
        for line in said.split("\r\n").map(|line| line.replacen(": ", "=", 1)) {
            assert!(answer.contains(&line), "`{line}` is not in {answer}");
        }
        assert_eq!(answer.matches("x-request-id=").count(), 1, "{answer}");
    });
}

#[test]
fn a_request_that_an_app_has_begun_to_answer_is_not_sent_again() {
    run(async {
        let played = Played::start().await;
        let get = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let (mut caller, mut app, _) = played.begin(get).await;
        app.write_all(ok).await.unwrap();
        until(&mut caller, "\r\n\r\nok").await;

        // An app that closes a connection that was kept may not have seen the request: it is sent once more.
        caller.write_all(get.as_bytes()).await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        drop(app);
        let (mut app, _) = played.listener.accept().await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        app.write_all(ok).await.unwrap();
        assert!(until(&mut caller, "\r\n\r\nok").await.starts_with("HTTP/1.1 200"));

        // One that said something has.
        caller.write_all(get.as_bytes()).await.unwrap();
        until(&mut app, "\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n").await.unwrap();
        assert!(until(&mut caller, "\r\n\r\n").await.starts_with("HTTP/1.1 103"));
        drop(app);
        let answer = until(&mut caller, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("x-weft-reason: reset"), "{answer}");
        let again = tokio::time::timeout(Duration::from_millis(200), played.listener.accept()).await;
        assert!(again.is_err(), "the request was sent again");
    });
}

#[test]
fn an_app_that_refuses_a_request_once_its_body_was_asked_for_is_answered_for_once() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http2).await;
        let port = worker.listen(false).await;
        let (go, gone) = oneshot::channel::<()>();
        tokio::task::spawn_local(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            tokio::select! {
                _ = connection.accept() => unreachable!("there is one request"),
                _ = gone => respond.send_reset(h2::Reason::REFUSED_STREAM),
            }
            let _closed = connection.accept().await;
        });
        let mut caller = TcpStream::connect(port).await.unwrap();
        caller.write_all(UPLOAD.as_bytes()).await.unwrap();
        assert_eq!(until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        // Unread: but for what was said already, another instance could have it.
        go.send(()).unwrap();
        let answer = rest(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
        assert!(answer.contains("the application of `web` broke off before it answered"), "{answer}");
    });
}

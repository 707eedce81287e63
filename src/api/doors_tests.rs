//! How clients come in: tokens with rights, TLS, compressed answers, idle and slow connections.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use flate2::read::GzDecoder;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::fake::{Bench, node_entry, on_loopback, service};
use super::routes::ROUTES;
use super::{ApiConfig, ApiError, ApiToken, Certificate, HttpsConfig, Right, held, secure, serve};
use crate::model::{HealthStatus, MemberStatus};
use crate::pki::Plane;
use crate::unix_socket::SocketConfig;

/// Sends a GET and reads the answer up to the end of the connection.
async fn asked<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn no_answer_lets_another_page_read_it() {
    let bench = Bench::new();
    for route in ROUTES {
        let path = route.path.replace(['{', '}', '*'], "");
        // As a browser asks before it sends what needs leave.
        let asked = Request::options(&path).header("host", "127.0.0.1:8500").header("origin", "http://127.0.0.1:8500");
        let asked = asked.header("access-control-request-method", "PUT").body(Body::empty()).unwrap();
        let answer = bench.send(asked).await;
        assert_eq!((answer.status, answer.headers.contains_key("allow")), (StatusCode::OK, true), "{path}");
        let is_cors = |name: &http::HeaderName| name.as_str().starts_with("access-control-");
        assert!(!answer.headers.keys().any(is_cors), "{path}: {:?}", answer.headers);
    }
    let read = Request::get("/v1/catalog/nodes").header("host", "localhost").header("origin", "http://localhost");
    let answer = bench.send(read.body(Body::empty()).unwrap()).await;
    assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("access-control-")));
}

#[tokio::test]
async fn each_endpoint_takes_the_right_that_it_needs_and_no_less() {
    let rights = [Right::Read, Right::Services, Right::Operator];
    let tokens = rights.map(|right| ApiToken::new(right.as_str(), right)).to_vec();
    let bench = Bench::with_tokens(tokens, 2);
    for route in ROUTES {
        let path = route.path.replace("{*entry}", "service-defaults/x").replace("{service}", "web");
        let path = path
            .split('{')
            .map(|part| part.split_once('}').map_or(part, |(_, rest)| rest))
            .collect::<Vec<_>>()
            .join("x");
        for right in rights.into_iter().filter(|right| *right < route.right) {
            let answer = bench.call(route.method.clone(), &format!("{path}?token={}", right.as_str()), "").await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN, "{} {path} with {right:?}", route.method);
            assert!(answer.text.contains(route.right.as_str()), "{}", answer.text);
        }
        // What is not read is not for readers.
        let is_writing = ![Method::GET, Method::POST].contains(&route.method) && !path.ends_with("/authorize");
        assert!(!is_writing || route.right > Right::Read, "{} {path}", route.method);
    }
    let get = |token: &str| bench.get(&format!("/v1/agent/services?token={token}"));
    assert_eq!(get("read").await.status, StatusCode::OK);
    let body = r#"{"Name": "x"}"#;
    let register = |token: &str| bench.put(&format!("/v1/agent/service/register?token={token}"), body);
    assert_eq!(register("services").await.status, StatusCode::OK);
    assert_eq!(register("read").await.status, StatusCode::FORBIDDEN);
    assert_eq!(bench.put("/v1/agent/leave?token=services", "").await.status, StatusCode::FORBIDDEN);
    assert_eq!(bench.put("/v1/kv/a?token=services", "1").await.status, StatusCode::FORBIDDEN, "it is the whole mesh's");
    assert_eq!(bench.put("/v1/kv/a?token=operator", "1").await.status, StatusCode::OK);
    assert!(!bench.leave.is_cancelled());
    assert_eq!(bench.put("/v1/agent/leave?token=operator", "").await.status, StatusCode::OK);
    let leaf = "/v1/agent/connect/ca/leaf/web?token=";
    assert_eq!(bench.get(&format!("{leaf}read")).await.status, StatusCode::FORBIDDEN, "it has a private key");
    assert_eq!(bench.get(&format!("{leaf}services")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn who_signs_no_policy_does_not_call_a_change_done_that_changes_nothing() {
    let bench = Bench::new();
    for (method, path, body) in [
        (Method::DELETE, "/v1/connect/intentions/exact?source=web&destination=db", ""),
        (Method::DELETE, "/v1/connect/intentions/5b5c1c5e-4ab0-5a0f-8c1b-0f4f6c7a3a11", ""),
        (Method::DELETE, "/v1/config/service-defaults/db", ""),
        (Method::DELETE, "/v1/config/service-intentions/db", ""),
        (Method::PUT, "/v1/config", r#"{"Kind": "service-intentions", "Name": "db", "Sources": []}"#),
    ] {
        let answer = bench.call(method.clone(), path, body).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{method} {path}: {}", answer.text);
        assert!(answer.text.contains("policy_authority"), "{}", answer.text);
    }
}

#[tokio::test]
async fn a_body_is_waited_for_where_one_is_due_and_nowhere_else() {
    let bench = Bench::new();
    let ask = |method: Method, path: &str| {
        let request = Request::builder().method(method).uri(path).header("content-length", 1 << 30);
        // It never comes.
        bench.send(
            request
                .body(Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>()))
                .unwrap(),
        )
    };
    for (method, path, status) in [
        (Method::GET, "/v1/status/leader", StatusCode::OK),
        (Method::HEAD, "/v1/status/leader", StatusCode::OK),
        (Method::DELETE, "/v1/config/service-defaults/x", StatusCode::FORBIDDEN),
        (Method::PUT, "/v1/agent/service/deregister/web-1", StatusCode::PAYLOAD_TOO_LARGE),
        (Method::POST, "/v1/agent/connect/authorize", StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        assert_eq!(ask(method.clone(), path).await.status, status, "{method} {path}");
    }
}

#[tokio::test]
async fn long_answers_are_compressed_for_those_who_take_it() {
    let bench = Bench::new();
    bench.publish(|next| {
        let nodes: Vec<_> = (1..=50).map(|number| node_entry(number, MemberStatus::Alive)).collect();
        let web = service("web", &nodes, HealthStatus::Passing, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
    });
    let ask = |path: &str, codings: &str| {
        let request = Request::get(path).header("accept-encoding", codings).body(Body::empty()).unwrap();
        let service = TowerToHyperService::new(bench.router.clone());
        async move {
            let (parts, body) = service.call(request).await.unwrap().into_parts();
            (parts.headers, body.collect().await.unwrap().to_bytes())
        }
    };
    let path = "/v1/health/service/web";
    let (plain, whole) = ask(path, "identity, gzip;q=0").await;
    assert!(!plain.contains_key("content-encoding"));
    assert_eq!(plain["vary"], "Accept-Encoding");
    for codings in ["gzip", "deflate, GZIP;q=0.5", "br;q=1.0, gzip; q=0.8"] {
        let (headers, packed) = ask(path, codings).await;
        assert_eq!(headers["content-encoding"], "gzip", "{codings}");
        assert!(packed.len() * 5 < whole.len(), "{} of {}", packed.len(), whole.len());
        let mut read = Vec::new();
        GzDecoder::new(&*packed).read_to_end(&mut read).unwrap();
        assert_eq!(read, whole);
        assert_eq!(headers["x-consul-index"], plain["x-consul-index"]);
    }
    assert!(!ask("/v1/status/leader", "gzip").await.0.contains_key("content-encoding"), "a short one is not worth it");
}

#[tokio::test]
async fn idle_connections_and_slow_heads_keep_nobody_out() {
    const SEATS: usize = 8;
    let bench = Bench::new();
    let listening = serve::bind(&on_loopback(None), None).await.unwrap();
    let addr = listening.addrs[0];
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), seats(SEATS), bench.stop.clone()));
    // One that waits for a change: it is under way and keeps its seat.
    let mut waiting = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET /v1/health/service/web?index=1003 HTTP/1.1\r\nhost: {addr}\r\n\r\n");
    waiting.write_all(request.as_bytes()).await.unwrap();
    while !bench.metrics.render().unwrap().contains("weft_api_blocking_queries 1") {
        tokio::task::yield_now().await;
    }
    let mut others = Vec::new();
    for number in 0..10 * SEATS {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        match number % 3 {
            0 => {}
            1 => stream.write_all(b"GET / HTTP/1.1\r\nx-slow: ").await.unwrap(),
            _ => stream.write_all(format!("GET / HTTP/1.1\r\nhost: {addr}\r\n\r\n").as_bytes()).await.unwrap(),
        }
        others.push(stream);
        let answer = asked(TcpStream::connect(addr).await.unwrap(), "/v1/status/leader").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    // A head without end is cut, not kept.
    let mut flood = TcpStream::connect(addr).await.unwrap();
    let mut sent = 0;
    let line = [b"x: ".as_slice(), &[b'y'; 8000], b"\r\n"].concat();
    if flood.write_all(b"GET / HTTP/1.1\r\n").await.is_ok() {
        while sent < 100 * line.len() && flood.write_all(&line).await.is_ok() {
            sent += line.len();
        }
    }
    let mut answer = Vec::new();
    let _reset = flood.read_to_end(&mut answer).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    let answer = asked(TcpStream::connect(addr).await.unwrap(), "/v1/status/leader").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(bench.metrics.render().unwrap().contains("weft_api_blocking_queries 1"), "it still waits");
    drop(others);
    bench.stop.cancel();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("x-consul-index: 1003"), "{answer}");
    server.join_next().await.unwrap().unwrap();
}

fn seats(connections_max: usize) -> serve::Limits {
    serve::Limits { connections_max, ..serve::Limits::default() }
}

/// Waits until `answer` has come from a connection that got its seat while others are open.
async fn in_time<T>(answer: impl Future<Output = T>) -> T {
    // Far below the 30 s after which idle connections end by themselves.
    tokio::time::timeout(std::time::Duration::from_secs(15), answer).await.expect("it gets a seat")
}

#[tokio::test]
async fn a_newcomer_among_busy_connections_gets_the_seat_of_the_first_that_is_done() {
    let bench = Bench::new();
    let listening = serve::bind(&on_loopback(None), None).await.unwrap();
    let addr = listening.addrs[0];
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), seats(1), bench.stop.clone()));
    let mut waiting = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET /v1/health/service/web?index=1003&wait=2s HTTP/1.1\r\nhost: {addr}\r\n\r\n");
    waiting.write_all(request.as_bytes()).await.unwrap();
    while !bench.metrics.render().unwrap().contains("weft_api_blocking_queries 1") {
        tokio::task::yield_now().await;
    }
    // Nobody is idle when it comes, and the one that is done would be kept alive for 30 s.
    let answer = in_time(asked(TcpStream::connect(addr).await.unwrap(), "/v1/status/leader")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut first = String::new();
    in_time(waiting.read_to_string(&mut first)).await.unwrap();
    assert!(first.contains("x-consul-index: 1003"), "{first}");
}

/// Answers more than the buffers between two sockets hold.
fn long_answers() -> axum::Router {
    let body = vec![b'x'; LONG_BYTES];
    axum::Router::new().fallback(move || std::future::ready(body.clone()))
}

const LONG_BYTES: usize = 24 << 20;

#[tokio::test]
async fn an_answer_that_is_read_slowly_is_not_cut_for_a_newcomer() {
    let (listening, stop) = (serve::bind(&on_loopback(None), None).await.unwrap(), CancellationToken::new());
    let addr = listening.addrs[0];
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, long_answers(), seats(1), stop.clone()));
    let mut slow = TcpStream::connect(addr).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut read = vec![0; 64 * 1024];
    let mut count = slow.read(&mut read).await.unwrap();
    let mut newcomer = JoinSet::new();
    newcomer.spawn(async move { asked(TcpStream::connect(addr).await.unwrap(), "/").await.len() });
    while count < LONG_BYTES {
        let more = in_time(slow.read(&mut read)).await.unwrap();
        assert!(more > 0, "cut after {count} bytes");
        count += more;
    }
    assert!(in_time(newcomer.join_next()).await.unwrap().unwrap() > LONG_BYTES);
}

#[tokio::test]
async fn an_answer_that_nobody_reads_gives_its_seat_up_when_it_is_needed() {
    let (listening, stop) = (serve::bind(&on_loopback(None), None).await.unwrap(), CancellationToken::new());
    let addr = listening.addrs[0];
    let limits = serve::Limits { stalled_after: Duration::from_millis(100), ..seats(1) };
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, long_answers(), limits, stop.clone()));
    let mut stalled = TcpStream::connect(addr).await.unwrap();
    stalled.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut start = [0; 8];
    stalled.read_exact(&mut start).await.unwrap();
    let answer = in_time(asked(TcpStream::connect(addr).await.unwrap(), "/")).await;
    assert!(answer.len() > LONG_BYTES);
}

#[tokio::test]
async fn a_body_that_does_not_come_gives_its_seat_up_when_it_is_needed_and_one_that_comes_does_not() {
    for (body_after, is_cut) in [(Duration::from_millis(100), true), (Duration::from_mins(1), false)] {
        let bench = Bench::new();
        let listening = serve::bind(&on_loopback(None), None).await.unwrap();
        let addr = listening.addrs[0];
        let mut server = JoinSet::new();
        let limits = serve::Limits { body_after, ..seats(1) };
        server.spawn(serve::run(listening, bench.router.clone(), limits, bench.stop.clone()));
        let mut slow = TcpStream::connect(addr).await.unwrap();
        let framing = "connection: close\r\nexpect: 100-continue\r\ncontent-length: 2";
        let head = format!("PUT /v1/agent/service/register HTTP/1.1\r\nhost: {addr}\r\n{framing}\r\n\r\n");
        slow.write_all(head.as_bytes()).await.unwrap();
        // The request is under way once its body is asked for.
        let mut asked_for = [0; 25];
        in_time(slow.read_exact(&mut asked_for)).await.unwrap();
        assert!(asked_for.starts_with(b"HTTP/1.1 100 "), "{}", String::from_utf8_lossy(&asked_for));
        slow.write_all(b"{").await.unwrap();
        let mut newcomer = JoinSet::new();
        newcomer.spawn(async move { asked(TcpStream::connect(addr).await.unwrap(), "/v1/status/leader").await });
        if !is_cut {
            // Within its time nobody takes its seat: it is answered, whatever the answer is.
            slow.write_all(b"}").await.unwrap();
            let mut answer = String::new();
            in_time(slow.read_to_string(&mut answer)).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
        }
        let answer = in_time(newcomer.join_next()).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn an_answer_that_nobody_reads_gives_its_room_back_in_the_end() {
    let (listening, stop) = (serve::bind(&on_loopback(None), None).await.unwrap(), CancellationToken::new());
    let addr = listening.addrs[0];
    let (stalled_after, stalled_max) = (Duration::from_millis(50), Duration::from_millis(200));
    let limits = serve::Limits { stalled_after, stalled_max, ..seats(10) };
    let places = Arc::new(Semaphore::new(1));
    let of_answers = Arc::clone(&places);
    let router = Router::new().fallback(move || {
        let room = Arc::clone(&of_answers).try_acquire_owned().unwrap();
        async move { Response::new(held::body(vec![b'x'; LONG_BYTES], room)) }
    });
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, router, limits, stop.clone()));
    let mut stalled = TcpStream::connect(addr).await.unwrap();
    stalled.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut start = [0; 8];
    stalled.read_exact(&mut start).await.unwrap();
    drop(in_time(places.acquire()).await.unwrap());
    // Who reads all of it gives it back at once.
    assert!(in_time(asked(TcpStream::connect(addr).await.unwrap(), "/")).await.len() > LONG_BYTES);
    drop(in_time(places.acquire()).await.unwrap());
}

/// Reads up to the end of the connection, a piece every 20 ms: some 6 MiB a second. Returns how many bytes came.
async fn read_slowly(mut stream: TcpStream) -> usize {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let (mut piece, mut count) = (vec![0; 128 * 1024], 0);
    while let Ok(bytes @ 1..) = in_time(stream.read(&mut piece)).await {
        count += bytes;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    count
}

#[tokio::test]
async fn an_answer_that_holds_room_is_taken_at_a_pace_or_given_up_and_others_may_take_long() {
    let stop = CancellationToken::new();
    // No pace that this reader could keep, where room is held.
    let (stalled_max, held_taken_min) = (Duration::from_millis(1500), usize::MAX);
    let limits = serve::Limits { stalled_after: stalled_max / 10, stalled_max, held_taken_min, ..seats(10) };
    let places = Arc::new(Semaphore::new(1));
    let of_answers = Arc::clone(&places);
    let held = Router::new().fallback(move || {
        let room = Arc::clone(&of_answers).try_acquire_owned().unwrap();
        let mut response = Response::new(held::body(vec![b'x'; LONG_BYTES], room));
        response.extensions_mut().insert(held::HoldsRoom { bytes: LONG_BYTES });
        std::future::ready(response)
    });
    let mut server = JoinSet::new();
    let mut slow = Vec::new();
    for router in [held, long_answers()] {
        let listening = serve::bind(&on_loopback(None), None).await.unwrap();
        slow.push(TcpStream::connect(listening.addrs[0]).await.unwrap());
        server.spawn(serve::run(listening, router, limits, stop.clone()));
    }
    let [of_held, of_others] = slow.try_into().unwrap();
    let (of_held, of_others) = tokio::join!(read_slowly(of_held), read_slowly(of_others));
    assert!(of_held < LONG_BYTES, "all of it was read");
    drop(in_time(places.acquire()).await.unwrap());
    assert!(of_others > LONG_BYTES, "cut after {of_others} bytes");
}

#[tokio::test]
async fn an_answer_that_is_taken_at_its_pace_keeps_its_seat_though_it_waits_for_its_client() {
    // Some 6 MiB a second are taken, and two are enough.
    let (stalled_after, stalled_max) = (Duration::from_secs(1), Duration::from_secs(5));
    let limits = serve::Limits { stalled_after, stalled_max, taken_min: 10 << 20, ..seats(1) };
    let (listening, stop) = (serve::bind(&on_loopback(None), None).await.unwrap(), CancellationToken::new());
    let addr = listening.addrs[0];
    let mut server = JoinSet::new();
    let (begun, body) = (Arc::new(Notify::new()), vec![b'x'; LONG_BYTES]);
    let answers = Arc::clone(&begun);
    let router = Router::new().fallback(move || {
        answers.notify_one();
        std::future::ready(body.clone())
    });
    server.spawn(serve::run(listening, router, limits, stop.clone()));
    let slow = TcpStream::connect(addr).await.unwrap();
    let mut newcomer = JoinSet::new();
    newcomer.spawn(async move {
        begun.notified().await;
        asked(TcpStream::connect(addr).await.unwrap(), "/").await.len()
    });
    let count = read_slowly(slow).await;
    assert!(count > LONG_BYTES, "cut after {count} bytes");
    assert!(in_time(newcomer.join_next()).await.unwrap().unwrap() > LONG_BYTES);
}

#[tokio::test]
async fn who_has_read_all_there_is_is_not_late_however_long_the_next_part_takes() {
    let stop = CancellationToken::new();
    let stalled_max = Duration::from_secs(1);
    // So much that only what is read up ends a wait.
    let limits = serve::Limits { stalled_after: stalled_max / 10, stalled_max, taken_min: usize::MAX, ..seats(10) };
    let (parts, taken) = tokio::sync::mpsc::channel::<Vec<u8>>(1);
    let taken = Arc::new(std::sync::Mutex::new(Some(taken)));
    let router = Router::new().fallback(move || {
        let taken = taken.lock().unwrap().take().unwrap();
        let frames = futures_util::stream::unfold(taken, |mut taken| async move {
            let part = taken.recv().await?;
            Some((Ok::<_, std::convert::Infallible>(part), taken))
        });
        std::future::ready(Response::new(Body::from_stream(frames)))
    });
    let listening = serve::bind(&on_loopback(None), None).await.unwrap();
    let mut stream = TcpStream::connect(listening.addrs[0]).await.unwrap();
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, router, limits, stop.clone()));
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    for _ in 0..2 {
        parts.send(vec![b'x'; LONG_BYTES]).await.unwrap();
        let (mut piece, mut count) = (vec![0; 1 << 20], 0);
        // Once more than sockets hold is there to be read, it waits for the client.
        while count < LONG_BYTES {
            count += in_time(stream.read(&mut piece)).await.unwrap();
        }
        tokio::time::sleep(stalled_max + stalled_max / 4).await;
    }
    drop(parts);
    let mut end = Vec::new();
    in_time(stream.read_to_end(&mut end)).await.unwrap();
    assert!(end.ends_with(b"0\r\n\r\n"), "it is whole");
}

fn https_with(certificate: Certificate) -> HttpsConfig {
    HttpsConfig { addr: "127.0.0.1:0".parse().unwrap(), certificate, client_ca: None }
}

#[tokio::test]
async fn https_shows_the_node_s_own_identity_or_the_operator_s_certificate() {
    let bench = Bench::new();
    let temp = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["mesh.example".to_owned()]).unwrap();
    let (chain, key) = (temp.path().join("cert.pem"), temp.path().join("key.pem"));
    std::fs::write(&chain, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let files = Certificate::Files { chain: chain.clone(), key: key.clone() };

    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(made.cert.der().to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let by_name = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let by_name = Arc::new(by_name.with_root_certificates(roots).with_no_client_auth());
    let own = bench.identity.client_config(Plane::Tunnel, &bench.identity.node_svid(), None).unwrap();
    let mut by_spiffe = ClientConfig::clone(&own);
    by_spiffe.alpn_protocols = vec![b"http/1.1".to_vec()];
    for (certificate, client) in [(files.clone(), by_name), (Certificate::Own, Arc::new(by_spiffe))] {
        let https = https_with(certificate);
        let (tls, _) = secure::server(&https, &bench.identity).unwrap();
        let config = on_loopback(Some(https));
        let listening = serve::bind(&config, Some(tls)).await.unwrap();
        let addr = listening.addrs[1];
        let mut server = JoinSet::new();
        server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
        let name = ServerName::try_from("mesh.example").unwrap();
        let stream = TlsConnector::from(client).connect(name, TcpStream::connect(addr).await.unwrap()).await.unwrap();
        let answer = asked(stream, "/v1/status/leader").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\"10.0.0.1:8301\""), "{answer}");
        // Without TLS there is nothing to be had at this port.
        let mut plain = TcpStream::connect(addr).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _reset = plain.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    std::fs::write(&key, "nothing").unwrap();
    let refused = secure::server(&https_with(files), &bench.identity).unwrap_err();
    assert!(matches!(&refused, ApiError::Certificate { path, .. } if *path == key), "{refused}");
    assert!(refused.to_string().contains("tls.https.key_file"), "{refused}");
}

#[tokio::test]
async fn a_certificate_that_was_renewed_is_shown_to_the_next_connection() {
    let bench = Bench::new();
    let temp = tempfile::tempdir().unwrap();
    let (chain, key) = (temp.path().join("cert.pem"), temp.path().join("key.pem"));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    // Writes a certificate and returns a client that believes that one alone.
    let renew = || {
        let made = rcgen::generate_simple_self_signed(["mesh.example".to_owned()]).unwrap();
        std::fs::write(&chain, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(made.cert.der().to_vec())).unwrap();
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider));
        let client = client.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        TlsConnector::from(Arc::new(client.with_no_client_auth()))
    };
    let first = renew();
    let https = https_with(Certificate::Files { chain: chain.clone(), key: key.clone() });
    let (tls, files) = secure::server(&https, &bench.identity).unwrap();
    let files = files.unwrap();
    let config = on_loopback(Some(https));
    let listening = serve::bind(&config, Some(tls)).await.unwrap();
    let addr = listening.addrs[1];
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
    let is_believed = async |client: &TlsConnector| {
        let name = ServerName::try_from("mesh.example").unwrap();
        client.connect(name, TcpStream::connect(addr).await.unwrap()).await.is_ok()
    };
    assert!(is_believed(&first).await);
    let second = renew();
    assert!(is_believed(&first).await && !is_believed(&second).await, "files alone change nothing");
    assert!(files.show(files.read().unwrap()), "it is another");
    assert!(!is_believed(&first).await && is_believed(&second).await);
    assert!(!files.show(files.read().unwrap()), "it is the same");
    std::fs::write(&key, "nothing").unwrap();
    assert!(matches!(files.read(), Err(ApiError::Certificate { path, .. }) if path == key));
    assert!(is_believed(&second).await);
}

/// A CA of clients in PEM, and a client of it that believes `server`.
fn client_of_a_ca(server: &CertificateDer<'static>) -> (String, TlsConnector) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    // Two CAs of one name are told apart by their keys alone.
    let root = ca.self_signed(&key).unwrap();
    let own = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(["client.example".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&own, &rcgen::Issuer::new(ca, key)).unwrap();
    let private = rustls::pki_types::PrivatePkcs8KeyDer::from(own.serialize_der()).into();
    let client = client_that_believes(server).with_client_auth_cert(vec![leaf.der().clone()], private).unwrap();
    (root.pem(), TlsConnector::from(Arc::new(client)))
}

fn client_that_believes(
    server: &CertificateDer<'static>,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(server.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    client.with_root_certificates(roots)
}

#[tokio::test]
async fn https_lets_in_clients_of_the_ca_that_is_named_alone_and_a_reload_takes_another() {
    let bench = Bench::new();
    let temp = tempfile::tempdir().unwrap();
    let [chain, key, ca] = ["cert.pem", "key.pem", "ca.pem"].map(|name| temp.path().join(name));
    let made = rcgen::generate_simple_self_signed(["mesh.example".to_owned()]).unwrap();
    std::fs::write(&chain, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let server_root = made.cert.der().clone();
    let (first_ca, first) = client_of_a_ca(&server_root);
    let (second_ca, second) = client_of_a_ca(&server_root);
    let nobody = TlsConnector::from(Arc::new(client_that_believes(&server_root).with_no_client_auth()));
    std::fs::write(&ca, &first_ca).unwrap();
    let certificate = Certificate::Files { chain, key };
    let https = HttpsConfig { client_ca: Some(ca.clone()), ..https_with(certificate) };
    let (tls, files) = secure::server(&https, &bench.identity).unwrap();
    let files = files.unwrap();
    let listening = serve::bind(&on_loopback(Some(https.clone())), Some(tls)).await.unwrap();
    let addr = listening.addrs[1];
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
    // In TLS 1.3 a client hears of the refusal when it reads.
    let is_answered = async |client: &TlsConnector| {
        let name = ServerName::try_from("mesh.example").unwrap();
        let Ok(mut stream) = client.connect(name, TcpStream::connect(addr).await.unwrap()).await else { return false };
        let request = b"GET /v1/status/leader HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n";
        let mut answer = Vec::new();
        stream.write_all(request).await.is_ok()
            && stream.read_to_end(&mut answer).await.is_ok()
            && answer.starts_with(b"HTTP/1.1 200")
    };
    assert!(is_answered(&first).await);
    assert!(!is_answered(&second).await && !is_answered(&nobody).await);
    std::fs::write(&ca, &second_ca).unwrap();
    assert!(is_answered(&first).await, "files alone change nothing");
    assert!(files.show(files.read().unwrap()), "it is another");
    assert!(is_answered(&second).await && !is_answered(&first).await && !is_answered(&nobody).await);
    assert!(!files.show(files.read().unwrap()), "it is the same");
    std::fs::write(&ca, "nothing").unwrap();
    let unusable = files.read().unwrap_err();
    assert!(matches!(&unusable, ApiError::ClientCa { path, .. } if *path == ca), "{unusable}");
    // The node's own identity asks as well.
    std::fs::write(&ca, &first_ca).unwrap();
    let own = HttpsConfig { certificate: Certificate::Own, ..https };
    let (tls, files) = secure::server(&own, &bench.identity).unwrap();
    assert!(files.is_some_and(|files| !files.show(files.read().unwrap())));
    let listening = serve::bind(&on_loopback(Some(own)), Some(tls)).await.unwrap();
    let addr = listening.addrs[1];
    server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
    let believing = bench.identity.client_config(Plane::Tunnel, &bench.identity.node_svid(), None).unwrap();
    let mut believing = ClientConfig::clone(&believing);
    believing.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from("mesh.example").unwrap();
    let shaken = TlsConnector::from(Arc::new(believing)).connect(name, TcpStream::connect(addr).await.unwrap()).await;
    let mut stream = shaken.unwrap();
    // A certificate of the mesh is none of that CA.
    assert!(stream.read(&mut [0]).await.is_err());
}

#[tokio::test]
async fn what_has_neither_address_nor_socket_is_refused_and_a_socket_or_tls_alone_is_enough() {
    let bench = Bench::new();
    let nowhere = ApiConfig { listen: Vec::new(), ..on_loopback(None) };
    assert!(matches!(serve::bind(&nowhere, None).await, Err(ApiError::NoAddress)));
    let https = https_with(Certificate::Own);
    let (tls, _) = secure::server(&https, &bench.identity).unwrap();
    let secure_alone = ApiConfig { https: Some(https), ..nowhere.clone() };
    assert_eq!(serve::bind(&secure_alone, Some(tls)).await.unwrap().addrs.len(), 1);
    let temp = tempfile::tempdir().unwrap();
    let socket = SocketConfig { path: temp.path().join("http.sock"), group: None, key: "addresses.http" };
    let listening = serve::bind(&ApiConfig { socket: Some(socket), ..nowhere }, None).await.unwrap();
    assert!(listening.addrs.is_empty());
}

#[tokio::test]
async fn the_host_the_metrics_and_the_monitor_answer_in_consul_s_shapes() {
    let bench = Bench::new();
    let host = bench.get("/v1/agent/host").await.json();
    assert!(host["Memory"]["total"].as_u64().unwrap() > 0 && host["Host"]["os"] == "linux", "{host}");
    let metrics = bench.get("/v1/agent/metrics").await.json();
    let named = |list: &str, name: &str| -> Value {
        let found = metrics[list].as_array().unwrap().iter().find(|one| one["Name"] == name);
        found.cloned().unwrap_or_else(|| panic!("{list} has no {name}: {metrics}"))
    };
    assert_eq!(named("Gauges", "weft_api_blocking_queries")["Value"], 0.0);
    let hosts = named("Counters", "weft_api_requests_total");
    assert_eq!((&hosts["Count"], &hosts["Labels"]), (&json!(1), &json!({"code": "200", "endpoint": "/v1/agent/host"})));
    assert_eq!(named("Samples", "weft_api_request_duration_seconds")["Count"], 1);
    assert!(metrics["Timestamp"].as_str().unwrap().ends_with(" +0000 UTC"));
    for (query, text) in [("loglevel=loud", "Unknown log level: loud"), ("loglevel=off", "Unknown log level: off")] {
        let answer = bench.get(&format!("/v1/agent/monitor?{query}")).await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::BAD_REQUEST, text));
    }
    assert_eq!(bench.get("/v1/agent/metrics?format=xml").await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn the_unix_socket_asks_for_a_token_and_not_for_a_host() {
    let bench = Bench::with(Some("s3cret"), 2);
    let temp = tempfile::tempdir().unwrap();
    let socket = SocketConfig { path: temp.path().join("http.sock"), group: None, key: "addresses.http" };
    let config = ApiConfig { socket: Some(socket.clone()), ..on_loopback(None) };
    let listening = serve::bind(&config, None).await.unwrap();
    let twice = serve::bind(&config, None).await.err().unwrap();
    assert!(twice.to_string().contains("addresses.http"), "{twice}");
    let mut server = JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
    for (host, token, status) in [("anything", "s3cret", "200"), ("localhost", "wrong", "403")] {
        let mut stream = UnixStream::connect(&socket.path).await.unwrap();
        let request =
            format!("GET /v1/status/leader?token={token} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    bench.stop.cancel();
    server.join_next().await.unwrap().unwrap();
    assert!(!socket.path.exists(), "it goes with the agent");
}

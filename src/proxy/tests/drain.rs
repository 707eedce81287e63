//! What a node that drains refuses, and what it cuts at the end.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Authority, Mesh};
use super::limits::{answer_of, ask, give, of_http, of_requests, take};
use super::{is_reset, read_all, within};
use crate::clock;
use crate::model::Protocol;

/// Long enough for what this test does before it is over.
const DRAIN: Duration = Duration::from_secs(3);
/// Whoever is waited for in vain is waited for longer than `Mesh::stop` lets it.
const NEVER: Duration = Duration::from_hours(1);
/// More than a drain takes that has nothing to wait for: what was answered last is given 300 ms.
const SETTLED: Duration = Duration::from_secs(1);

#[tokio::test]
async fn what_is_open_when_the_drain_is_over_is_cut_on_both_sides_and_what_is_new_is_refused_meanwhile() {
    let mesh = Mesh::start_draining_within(DRAIN).await;
    let (mut client, mut app) = mesh.connect().await;
    let begun = clock::now();
    mesh.b.handle.drain.cancel();
    // No other node has an instance.
    is_reset(mesh.upstream).await;
    mesh.a.counts("weft_tcp_connections_closed_total", &["\"UF\""], 1).await;
    client.write_all(b"still").await.unwrap();
    within(app.read_exact(&mut [0; 5])).await.unwrap();
    // Nobody ends it: the drain does, and it does not look like an end that somebody meant.
    let (at_client, at_app) = tokio::join!(read_all(&mut client), read_all(&mut app));
    assert!(begun.elapsed() >= DRAIN, "cut after {:?}", begun.elapsed());
    assert_eq!(at_client.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(at_app.unwrap_err().kind(), ErrorKind::ConnectionReset);
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_that_drains_ends_its_requests_and_takes_no_other() {
    let mesh = of_http(&Authority::new()).await;
    let first = ask(&mesh, "").await;
    let held = take(&mesh.app).await;
    mesh.b.handle.drain.cancel();
    let late = answer_of(ask(&mesh, "").await).await;
    assert!(late.starts_with("HTTP/1.1 503") && late.contains("x-weft-reason: connect_failure"), "{late}");
    assert!(late.contains("its node is shutting down"), "{late}");
    give(held).await;
    let answer = answer_of(first).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_to_an_app_that_rests_is_not_waited_for() {
    let mesh = of_requests(NEVER, Protocol::Http, &Authority::new()).await;
    let client = ask(&mesh, "").await;
    let mut app = take(&mesh.app).await;
    app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert!(answer_of(client).await.starts_with("HTTP/1.1 200"));
    // It is kept: the next request comes on it.
    let client = ask(&mesh, "").await;
    assert!(within(app.read(&mut [0; 1_024])).await.unwrap() > 0);
    app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert!(answer_of(client).await.starts_with("HTTP/1.1 200"));
    mesh.stop().await;
    assert_eq!(read_all(&mut app).await.unwrap(), b"", "it ends with its agent");
}

#[tokio::test]
async fn nor_is_one_to_an_app_over_http_2() {
    let mesh = of_requests(NEVER, Protocol::Http2, &Authority::new()).await;
    let client = ask(&mesh, "").await;
    let (app, _) = within(mesh.app.accept()).await.unwrap();
    let answer = service_fn(|_| async { Ok::<_, Infallible>(http::Response::new(String::new())) });
    let served = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(app), answer);
    let calls = async {
        assert!(answer_of(client).await.starts_with("HTTP/1.1 200"));
        mesh.stop().await;
    };
    let (_gone, ()) = tokio::join!(served, calls);
}

#[tokio::test]
async fn a_body_whose_app_has_answered_already_still_goes_up_while_its_node_drains() {
    let mesh = of_requests(NEVER, Protocol::Http, &Authority::new()).await;
    let mut client = TcpStream::connect(mesh.upstream).await.unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\n\r\nfirst").await.unwrap();
    let (mut app, _) = within(mesh.app.accept()).await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"first") {
        assert!(within(app.read_buf(&mut request)).await.unwrap() > 0);
    }
    app.write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    within(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 202");
    mesh.b.handle.drain.cancel();
    let more = tokio::time::timeout(SETTLED, app.read(&mut [0; 1])).await;
    assert!(more.is_err(), "the app's connection ended before its request: {more:?}");
    client.write_all(b"other").await.unwrap();
    let mut rest = [0; 5];
    within(app.read_exact(&mut rest)).await.unwrap();
    assert_eq!(&rest, b"other");
    mesh.stop().await;
}

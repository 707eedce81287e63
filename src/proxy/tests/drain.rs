//! What a node that drains refuses, and what it cuts at the end.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Authority, Mesh};
use super::limits::{answer_of, ask, give, of_http, of_http_draining_within, take};
use super::{read_all, within};
use crate::clock;

/// Long enough for what this test does before it is over.
const DRAIN: Duration = Duration::from_secs(3);

#[tokio::test]
async fn what_is_open_when_the_drain_is_over_is_cut_on_both_sides_and_what_is_new_is_refused_meanwhile() {
    let mesh = Mesh::start_draining_within(DRAIN).await;
    let (mut client, mut app) = mesh.connect().await;
    let begun = clock::now();
    mesh.b.handle.drain.cancel();
    // No other node has an instance.
    let late = async { read_all(&mut TcpStream::connect(mesh.upstream).await?).await };
    assert_eq!(within(late).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
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
    // Whoever waited for it would wait longer than `stop` lets it.
    let mesh = of_http_draining_within(Duration::from_hours(1), &Authority::new()).await;
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

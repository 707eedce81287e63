//! Apps over HTTP/2 that a test leads request by request: bodies, interim answers, resets. Their connections: `h2_connections`.

use h2::Reason;
use h2::server::SendResponse;

use super::edge::{rest, until};
use super::*;
use crate::proxy::http::h2_connections::Connections;

/// A request as the app got it.
pub(super) type Led = (Request<h2::RecvStream>, SendResponse<Bytes>);

/// An app over HTTP/2, and a caller's port.
pub(super) struct App {
    pub(super) listener: TcpListener,
    pub(super) port: SocketAddr,
    pub(super) server: h2::server::Builder,
    pub(super) worker: Rc<Loopback>,
}

/// One connection of the app's.
pub(super) struct Link {
    pub(super) requests: mpsc::Receiver<Led>,
    /// Ends it gracefully.
    pub(super) leave: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Link {
    /// Takes the next request, of this path.
    pub(super) async fn asked(&mut self, path: &str) -> SendResponse<Bytes> {
        let (request, respond) = self.requests.recv().await.unwrap();
        assert_eq!(request.uri().path(), path);
        respond
    }
}

impl App {
    pub(super) async fn start() -> Self {
        Self::limited(h2::server::Builder::new(), usize::MAX).await
    }

    /// One whose connections, so many at most, allow one stream each.
    pub(super) async fn of_single_streams(connections: usize) -> Self {
        let mut server = h2::server::Builder::new();
        server.max_concurrent_streams(1);
        Self::limited(server, connections).await
    }

    pub(super) async fn limited(server: h2::server::Builder, app_connections: usize) -> Self {
        let worker = Loopback::new(Limits { app_connections, ..Limits::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http2).await;
        Self { port: worker.listen(false).await, listener, server, worker }
    }

    pub(super) async fn send(&self, request: &str) -> TcpStream {
        let mut caller = TcpStream::connect(self.port).await.unwrap();
        caller.write_all(request.as_bytes()).await.unwrap();
        caller
    }

    pub(super) fn connections(&self) -> Rc<Connections> {
        self.worker.http.pool.shared(self.listener.local_addr().unwrap())
    }

    /// Waits until so many requests wait for a stream.
    pub(super) async fn queues(&self, count: usize) {
        let connections = self.connections();
        // The pool's, this one, that of who opens one, and one of each that waits.
        while Rc::strong_count(&connections) != 2 + usize::from(connections.is_opening()) + count {
            tokio::task::yield_now().await;
        }
    }

    pub(super) async fn accept(&self) -> Link {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut connection = self.server.handshake(stream).await.unwrap();
        let (led, requests) = mpsc::channel(8);
        let (leave, mut leaves) = tokio::sync::oneshot::channel();
        tokio::task::spawn_local(async move {
            loop {
                tokio::select! {
                    biased;
                    Ok(()) = &mut leaves => {
                        connection.graceful_shutdown();
                        break;
                    }
                    accepted = connection.accept() => match accepted {
                        Some(Ok(request)) => led.try_send(request).unwrap(),
                        Some(Err(_)) | None => return,
                    },
                }
            }
            while let Some(Ok(request)) = connection.accept().await {
                led.try_send(request).unwrap();
            }
        });
        Link { requests, leave: Some(leave) }
    }
}

pub(super) fn head(status: u16) -> Response<()> {
    Response::builder().status(status).body(()).unwrap()
}

pub(super) async fn answers(mut caller: TcpStream, begins: &str) {
    let seen = rest(&mut caller).await;
    assert!(seen.starts_with(begins), "{seen}");
}

pub(super) const GET: &str = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";

#[test]
fn interim_answers_of_an_app_over_http2_go_ahead_of_the_final_one() {
    run(async {
        let app = App::start().await;
        let mut caller = app.send(GET).await;
        let mut link = app.accept().await;
        let (_request, mut respond) = link.requests.recv().await.unwrap();
        let hints = |number: &str| {
            let response = Response::builder().status(103).header("link", format!("</{number}>"));
            response.body(()).unwrap()
        };
        respond.send_informational(hints("1")).unwrap();
        assert_eq!(until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 103 Early Hints\r\nlink: </1>\r\n\r\n");
        // They come with the final answer, in one read.
        respond.send_informational(hints("2")).unwrap();
        respond.send_informational(hints("3")).unwrap();
        respond.send_response(head(200), false).unwrap().send_data("ok".into(), true).unwrap();
        let seen = rest(&mut caller).await;
        let expected = "HTTP/1.1 103 Early Hints\r\nlink: </2>\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </3>\r\n\r\nHTTP/1.1 200 OK\r\n";
        assert!(seen.starts_with(expected) && seen.ends_with("\r\n\r\n2\r\nok\r\n0\r\n\r\n"), "{seen}");
    });
}

#[test]
fn an_answer_that_an_app_over_http2_breaks_off_never_looks_whole() {
    run(async {
        let app = App::start().await;
        let mut caller = app.send(GET).await;
        let mut link = app.accept().await;
        for reason in [Reason::CANCEL, Reason::INTERNAL_ERROR, Reason::NO_ERROR] {
            let (_request, mut respond) = link.requests.recv().await.unwrap();
            let mut send = respond.send_response(head(200), false).unwrap();
            send.send_data("part".into(), false).unwrap();
            let seen = until(&mut caller, "part\r\n").await;
            assert!(seen.starts_with("HTTP/1.1 200"), "{seen}");
            send.send_reset(reason);
            // The last chunk, of no bytes, would say that the body is whole.
            let mut left = Vec::new();
            let _may_be_a_reset = caller.read_to_end(&mut left).await;
            assert!(left.is_empty(), "{reason:?}: {left:?}");
            caller = app.send(GET).await;
        }
    });
}

#[test]
fn an_app_over_http2_that_answers_early_may_leave_the_rest_of_the_request_unread() {
    run(async {
        let app = App::start().await;
        let post = "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\nconnection: close\r\n\r\nbegin";
        let mut caller = app.send(post).await;
        let mut link = app.accept().await;
        let (request, mut respond) = link.requests.recv().await.unwrap();
        assert_eq!(request.headers()["content-length"], "10");
        let mut send = respond.send_response(head(413), false).unwrap();
        send.send_data("too long".into(), true).unwrap();
        // h2 forgets what it has not written yet of a stream that is reset.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        respond.send_reset(Reason::NO_ERROR);
        let seen = until(&mut caller, "too long\r\n0\r\n\r\n").await;
        assert!(seen.starts_with("HTTP/1.1 413"), "{seen}");
    });
}

#[test]
fn a_body_goes_to_an_app_over_http2_as_fast_as_it_reads_and_to_its_last_byte() {
    run(async {
        let app = App::start().await;
        let body: Vec<u8> = (0..600_000_u32).flat_map(u32::to_be_bytes).collect();
        let head_of = format!("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\n\r\n", body.len());
        let caller = app.send(&head_of).await;
        let (mut from, mut to) = caller.into_split();
        let bytes = body.clone();
        let sent = tokio::task::spawn_local(async move {
            to.write_all(&bytes).await.unwrap();
            to
        });
        let mut link = app.accept().await;
        let (mut request, mut respond) = link.requests.recv().await.unwrap();
        let mut seen = Vec::new();
        while let Some(data) = request.body_mut().data().await {
            let data = data.unwrap();
            seen.extend_from_slice(&data);
            request.body_mut().flow_control().release_capacity(data.len()).unwrap();
        }
        assert!(seen == body, "{} of {} bytes", seen.len(), body.len());
        respond.send_response(head(204), true).unwrap();
        let mut status = [0; 12];
        from.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 204");
        drop(sent.await.unwrap());
    });
}

#[test]
fn an_app_over_http2_hears_that_a_caller_left_before_the_answer_and_inside_a_body() {
    run(async {
        let app = App::start().await;
        let mut link = None;
        for request in [GET, "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\n\r\nbegin"] {
            let caller = app.send(request).await;
            let link = match &mut link {
                Some(link) => link,
                none => none.insert(app.accept().await),
            };
            let (mut met, mut respond) = link.requests.recv().await.unwrap();
            drop(caller);
            let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
            assert_eq!(reason, Reason::CANCEL, "{request}");
            if request != GET {
                while let Some(Ok(_data)) = met.body_mut().data().await {}
                assert!(!met.body().is_end_stream(), "a body that broke off is not whole");
            }
        }
    });
}

#[test]
fn no_more_interim_answers_are_passed_on_than_anybody_sends_and_no_switch_of_protocols() {
    run(async {
        let app = App::start().await;
        let mut caller = app.send(GET).await;
        let mut link = app.accept().await;
        let (_request, mut respond) = link.requests.recv().await.unwrap();
        for status in [101].into_iter().chain([103; 30]) {
            respond.send_informational(head(status)).unwrap();
        }
        respond.send_response(head(204), true).unwrap();
        let seen = rest(&mut caller).await;
        assert_eq!(seen.matches("HTTP/1.1 103").count(), 8, "{seen}");
        assert!(seen.contains("HTTP/1.1 204") && !seen.contains("101"), "{seen}");
    });
}

pub(super) fn say_204(mut respond: SendResponse<Bytes>) {
    respond.send_response(head(204), true).unwrap();
}

#[test]
fn a_request_without_a_byte_needs_no_window_of_the_app_s() {
    run(async {
        let app = App::start().await;
        let long = 200_000;
        let mut stalled = app.send(&format!("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {long}\r\n\r\n")).await;
        let mut link = app.accept().await;
        let (mut request, _respond) = link.requests.recv().await.unwrap();
        stalled.write_all(&vec![0; long]).await.unwrap();
        // The whole window of the connection, of which nothing is given back.
        let mut held = 0;
        while held < 65_535 {
            held += request.body_mut().data().await.unwrap().unwrap().len();
        }
        let post = "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n";
        let caller = app.send(post).await;
        let (mut empty, mut respond) = link.requests.recv().await.unwrap();
        while let Some(data) = empty.body_mut().data().await {
            assert!(data.unwrap().is_empty(), "nothing but the end comes");
        }
        respond.send_response(head(204), true).unwrap();
        answers(caller, "HTTP/1.1 204").await;
    });
}

#[test]
fn a_body_is_kept_until_an_answer_comes_and_no_longer() {
    use crate::proxy::http::body::TunnelBody;
    let kept = || {
        let mut body = TunnelBody::text("body".into());
        body.keep();
        body
    };
    assert!(kept().rewound().is_some());
    let mut body = kept();
    body.let_go();
    assert!(body.rewound().is_none());
}

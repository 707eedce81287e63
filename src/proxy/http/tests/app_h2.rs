//! Apps over HTTP/2 that a test leads request by request: bodies, interim answers, resets, GOAWAY.

use h2::Reason;
use h2::server::SendResponse;

use super::edge::{rest, until};
use super::*;

/// A request as the app got it.
type Led = (Request<h2::RecvStream>, SendResponse<Bytes>);

/// An app over HTTP/2, and a caller's port.
struct App {
    listener: TcpListener,
    port: SocketAddr,
    server: h2::server::Builder,
    worker: Rc<Loopback>,
}

/// One connection of the app's.
struct Link {
    requests: mpsc::Receiver<Led>,
    /// Ends it gracefully.
    leave: Option<tokio::sync::oneshot::Sender<()>>,
}

impl App {
    async fn start() -> Self {
        Self::of_server(h2::server::Builder::new()).await
    }

    /// One whose connections are made by `server`.
    async fn of_server(server: h2::server::Builder) -> Self {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http2).await;
        Self { port: worker.listen(false).await, listener, server, worker }
    }

    async fn send(&self, request: &str) -> TcpStream {
        let mut caller = TcpStream::connect(self.port).await.unwrap();
        caller.write_all(request.as_bytes()).await.unwrap();
        caller
    }

    /// Waits until so many requests wait for their turn at the connection.
    async fn queues(&self, count: usize) {
        let place = self.worker.http.pool.shared(self.listener.local_addr().unwrap());
        // The pool's, this one, and one of each that waits.
        while Rc::strong_count(&place) != 2 + count {
            tokio::task::yield_now().await;
        }
    }

    /// Waits until the connection takes no more requests for now.
    async fn is_full(&self) {
        let place = self.worker.http.pool.shared(self.listener.local_addr().unwrap());
        while place.try_lock().unwrap().as_mut().unwrap().with_room().is_some() {
            tokio::task::yield_now().await;
        }
    }

    async fn accept(&self) -> Link {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut connection = self.server.handshake(stream).await.unwrap();
        let (led, requests) = mpsc::channel(8);
        let (leave, mut leaves) = tokio::sync::oneshot::channel();
        tokio::task::spawn_local(async move {
            loop {
                tokio::select! {
                    Ok(()) = &mut leaves => {
                        connection.graceful_shutdown();
                        break;
                    }
                    Some(Ok(request)) = connection.accept() => led.try_send(request).unwrap(),
                    else => return,
                }
            }
            while let Some(Ok(request)) = connection.accept().await {
                led.try_send(request).unwrap();
            }
        });
        Link { requests, leave: Some(leave) }
    }
}

fn head(status: u16) -> Response<()> {
    Response::builder().status(status).body(()).unwrap()
}

async fn answers(mut caller: TcpStream, begins: &str) {
    let seen = rest(&mut caller).await;
    assert!(seen.starts_with(begins), "{seen}");
}

const GET: &str = "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";

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
fn requests_after_a_goaway_go_by_a_new_connection() {
    run(async {
        let app = App::start().await;
        let mut callers = vec![app.send(GET).await];
        let mut first = app.accept().await;
        let (_request, mut under_way) = first.requests.recv().await.unwrap();
        first.leave.take().unwrap().send(()).unwrap();
        // The agent has read the GOAWAY when what was sent behind it has come.
        let mut send = under_way.send_response(head(200), false).unwrap();
        send.send_data("part".into(), false).unwrap();
        assert!(until(&mut callers[0], "part\r\n").await.starts_with("HTTP/1.1 200"));
        callers.push(app.send(GET).await);
        let mut second = app.accept().await;
        let (_request, mut respond) = second.requests.recv().await.unwrap();
        respond.send_response(head(204), true).unwrap();
        assert!(rest(&mut callers[1]).await.starts_with("HTTP/1.1 204"));
        // What was under way is not hurt.
        send.send_data(" and the rest".into(), true).unwrap();
        assert!(rest(&mut callers[0]).await.ends_with(" and the rest\r\n0\r\n\r\n"));
        // A third request stays with the second connection.
        let mut third = app.send(GET).await;
        let (_request, mut respond) = second.requests.recv().await.unwrap();
        respond.send_response(head(204), true).unwrap();
        assert!(rest(&mut third).await.starts_with("HTTP/1.1 204"));
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

#[test]
fn a_request_that_is_given_up_while_the_app_has_no_room_for_it_never_goes_out() {
    run(async {
        let mut server = h2::server::Builder::new();
        server.max_concurrent_streams(1);
        let app = App::of_server(server).await;
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
        // Once an answer has come, the app's SETTINGS have.
        let first = app.send(&get("/first")).await;
        let mut link = app.accept().await;
        let (_request, mut respond) = link.requests.recv().await.unwrap();
        respond.send_response(head(204), true).unwrap();
        answers(first, "HTTP/1.1 204").await;

        let under_way = app.send(&get("/under-way")).await;
        let (_request, mut respond) = link.requests.recv().await.unwrap();
        // One waits in h2 itself.
        let next = app.send(&get("/next")).await;
        app.is_full().await;
        let given_up = app.send(&get("/given-up")).await;
        app.queues(1).await;
        let waits = app.send(&get("/waits")).await;
        app.queues(2).await;
        drop(given_up);
        app.queues(1).await;
        respond.send_response(head(204), true).unwrap();
        answers(under_way, "HTTP/1.1 204").await;
        for (path, caller) in [("/next", next), ("/waits", waits)] {
            let (request, mut respond) = link.requests.recv().await.unwrap();
            assert_eq!(request.uri().path(), path);
            respond.send_response(head(204), true).unwrap();
            answers(caller, "HTTP/1.1 204").await;
        }
    });
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

//! What is sent again, by whom, and how often at most; and copies for mirrors.

use serde_json::json;

use super::routed::{HANG, OK, UNAVAILABLE, ask, counts, route, scripted, web};
use super::*;
use crate::proxy::http::mirror::MIRRORS_MAX;

/// An instance that breaks every stream with nothing answered, and how many it was sent.
async fn breaking(worker: &Loopback) -> Rc<Cell<u32>> {
    let (tunnel, endpoints) = worker.add_tunnel().await;
    let met = Rc::<Cell<u32>>::default();
    let counted = Rc::clone(&met);
    tokio::task::spawn_local(async move {
        let _endpoints = endpoints;
        while let Ok((mut send, mut recv)) = tunnel.accept_bi().await {
            counted.set(counted.get() + 1);
            send.reset(1_u32.into()).unwrap();
            recv.stop(1_u32.into()).unwrap();
        }
    });
    met
}

#[test]
fn where_every_stream_breaks_the_budget_bounds_what_is_sent_again_without_a_policy() {
    run(async {
        // Without an entry, and with a chain that says nothing of retries.
        for entries in [vec![], vec![route(&json!({"PrefixRewrite": "/"}))]] {
            let worker = Loopback::new(Limits::default());
            super::routed::say(&worker, &entries);
            let met = breaking(&worker).await;
            let port = worker.listen(false).await;
            let begun = crate::clock::now();
            // 500 requests over ten connections.
            let ask_all = async || {
                let mut client = client::<Full<Bytes>>(port).await;
                for _ in 0..50 {
                    client.ready().await.unwrap();
                    assert_eq!(client.send_request(get("/")).await.unwrap().status(), StatusCode::BAD_GATEWAY);
                }
            };
            futures_util::future::join_all((0..10).map(|_| ask_all())).await;
            let met = met.get();
            // A fifth of the requests, and ten a second over the window of ten seconds; more only if this took so long.
            let most = 500 + 500 / 5 + 10 * (10 + u32::try_from(begun.elapsed().as_secs()).unwrap());
            assert!(met <= most, "{met} streams of 500 requests");
            assert!(met > 600, "{met} streams of 500 requests: hardly any was sent again");
            let refused = "weft_http_retries_refused_total{destination_service=\"web\",reason=\"budget\"}";
            assert!(worker.metrics.render().unwrap().contains(refused));
        }
    });
}

/// An app that answers the first request of its first connection, and then takes each and closes, by RST if `resets`. Returns how many it took
/// after the first one, and the heads of these.
async fn closing(resets: bool) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(64);
    tokio::task::spawn_local(async move {
        let mut is_first = true;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            loop {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.unwrap() > 0 {}
                if !std::mem::take(&mut is_first) {
                    seen.try_send(String::from_utf8(head).unwrap()).unwrap();
                    if resets {
                        stream.set_zero_linger().unwrap();
                    }
                    break;
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
        }
    });
    (addr, messages)
}

#[test]
fn a_request_meets_an_app_as_often_as_its_route_says_whoever_repeats_it() {
    run(async {
        for (times, want, resets) in [(0, 2, false), (0, 2, true), (1, 2, false), (2, 3, true)] {
            let worker = Loopback::new(Limits::default());
            let (addr, mut messages) = closing(resets).await;
            worker.add(addr, Protocol::Http).await;
            super::routed::say(&worker, &[route(&json!({"NumRetries": times, "RetryOn": ["5xx"]}))]);
            let port = worker.listen(false).await;
            // Its connection is kept, and is stale for the next request.
            assert!(ask(port, "GET / HTTP/1.1").await.ends_with("ok"));
            let answer = ask(port, "GET /again HTTP/1.1").await;
            assert!(answer.starts_with("HTTP/1.1 502") && !answer.contains("x-weft-retry"), "{answer}");
            let heads: Vec<String> = std::iter::from_fn(|| messages.try_recv().ok()).collect();
            assert_eq!(heads.len(), want, "with {times} retries: {heads:?}");
            // The destination's own repetition is the second.
            let marked: Vec<bool> = heads.iter().map(|head| head.contains("x-weft-retry: 1\r\n")).collect();
            assert_eq!(marked, (0..want).map(|at| at >= 2).collect::<Vec<_>>(), "{heads:?}");
            counts(&worker, "weft_http_retries_total{destination_service=\"web\",reason=\"stale\"}", 1);
            // Each was taken out of the budget, the destination's own as well: of its hundred that many are left.
            let (budget, now) = (worker.http.budget(&"web".parse().unwrap()), crate::clock::now());
            let left = (0..1_000).filter(|_| budget.withdraw(now)).count();
            assert_eq!(left, 100 - (want - 1), "with {times} retries");
        }
    });
}

#[test]
fn what_somebody_else_repeats_is_not_tried_again_by_conditions() {
    run(async {
        let destination = json!({"NumRetries": 2, "RetryOn": ["5xx"]});
        for (said, want) in [("x-app: 1", 3), ("x-weft-retry: 1", 1), ("grpc-previous-rpc-attempts: 1", 1)] {
            let mut setup = web(&[UNAVAILABLE], &[route(&destination)]).await;
            let answer = ask(setup.port, &format!("GET / HTTP/1.1\r\n{said}")).await;
            assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("bad"), "{answer}");
            let heads: Vec<String> = std::iter::from_fn(|| setup.messages.try_recv().ok()).collect();
            assert_eq!(heads.len(), want, "{said}: {heads:?}");
            let is_marked = |at: usize| heads[at].contains("x-weft-retry: 1\r\n");
            assert_eq!(is_marked(0), said.starts_with("x-weft"), "whoever is called in turn learns of it: {heads:?}");
            assert!((1..want).all(is_marked), "{heads:?}");
        }
        // Streams that break are no exception, with a chain or without.
        for entries in [vec![], vec![route(&destination)]] {
            let worker = Loopback::new(Limits::default());
            super::routed::say(&worker, &entries);
            let met = breaking(&worker).await;
            let port = worker.listen(false).await;
            assert!(ask(port, "GET / HTTP/1.1\r\nx-weft-retry: 1").await.starts_with("HTTP/1.1 502"));
            assert_eq!(met.get(), 1);
        }
    });
}

#[test]
fn a_stranger_does_not_say_what_is_repeated() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let stranger = outbound::Connection::of_caller(Rc::clone(&worker), [192, 0, 2, 1].into());
        let app = outbound::Connection::of_caller(worker, [127, 0, 0, 1].into());
        for (connection, is_believed) in [(stranger, false), (app, true)] {
            let mut headers = HeaderMap::from_iter([(repeat::RETRY, "1".parse().unwrap())]);
            connection.believe(&mut headers);
            assert_eq!(headers.contains_key(repeat::RETRY), is_believed);
        }
    });
}

/// A POST to an app that is copied to another one, as far as the app has read it.
struct Upload {
    client: TcpStream,
    app: TcpStream,
    copies: mpsc::Receiver<String>,
    _worker: Rc<Loopback>,
}

/// Begins a POST of a body of `bytes`, of which `begun` comes with the head.
async fn begin_upload(bytes: usize, begun: &[u8]) -> Upload {
    let worker = Loopback::new(Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
    let (addr, copies) = scripted(&[HANG]).await;
    worker.add(addr, Protocol::Http).await;
    super::routed::say(&worker, &[route(&json!({"Mirror": {"Service": "shadow"}}))]);
    let mut client = TcpStream::connect(worker.listen(false).await).await.unwrap();
    let head = format!("POST /x HTTP/1.1\r\nhost: web\r\ncontent-length: {bytes}\r\n\r\n");
    client.write_all(&[head.as_bytes(), begun].concat()).await.unwrap();
    let (mut app, _) = listener.accept().await.unwrap();
    let (mut request, end) = (Vec::new(), [&b"\r\n\r\n"[..], begun].concat());
    while !request.ends_with(&end) {
        request.push(app.read_u8().await.unwrap());
    }
    Upload { client, app, copies, _worker: worker }
}

#[test]
fn a_body_that_comes_after_its_head_is_copied_once_it_is_whole() {
    run(async {
        let Upload { mut client, mut app, mut copies, _worker } = begin_upload(4, b"").await;
        // The head has gone on; the body comes only now, and goes on before anybody waits for a copy.
        client.write_all(b"body").await.unwrap();
        let mut body = [0; 4];
        app.read_exact(&mut body).await.unwrap();
        app.write_all(OK.as_bytes()).await.unwrap();
        let mut answer = vec![0; "HTTP/1.1 200".len()];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!((&answer[..], &body), (&b"HTTP/1.1 200"[..], b"body"));
        let copy = copies.recv().await.unwrap();
        assert!(copy.starts_with("POST /x HTTP/1.1") && copy.ends_with("\r\n\r\nbody"), "{copy}");
    });
}

#[test]
fn a_body_beyond_64_kib_is_copied_nowhere_and_counted() {
    run(async {
        let mut setup = web(&[OK], &[route(&json!({"Mirror": {"Service": "shadow"}}))]).await;
        let (addr, mut copies) = scripted(&[OK]).await;
        setup.worker.add(addr, Protocol::Http).await;
        for (bytes, outcome) in [(60 << 10, "sent"), (REPLAY_BYTES_MAX + 1, "body_too_long")] {
            let (head, body) = (format!("POST / HTTP/1.1\r\ncontent-length: {bytes}"), "b".repeat(bytes));
            let request = format!("{head}\r\nhost: web\r\nconnection: close\r\n\r\n{body}");
            assert!(raw(setup.port, request.as_bytes()).await.starts_with("HTTP/1.1 200"));
            assert!(setup.messages.recv().await.unwrap().ends_with(&body));
            let series = format!("weft_http_mirrored_total{{destination_service=\"shadow\",outcome=\"{outcome}\"}} 1");
            while !setup.worker.metrics.render().unwrap().contains(&series) {
                tokio::task::yield_now().await;
            }
            assert_eq!(copies.try_recv().is_ok(), outcome == "sent");
        }
    });
}

#[test]
fn a_body_whose_answer_has_begun_is_copied_whole_all_the_same() {
    run(async {
        let Upload { mut client, mut app, mut copies, _worker } = begin_upload(6, b"be").await;
        // Nothing is kept for another attempt from the answer's head on.
        app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await.unwrap();
        let mut answer = vec![0; "HTTP/1.1 200".len()];
        client.read_exact(&mut answer).await.unwrap();
        client.write_all(b"fore").await.unwrap();
        let mut rest = [0; 4];
        app.read_exact(&mut rest).await.unwrap();
        app.write_all(b"ok").await.unwrap();
        let copy = copies.recv().await.unwrap();
        assert!(copy.starts_with("POST /x HTTP/1.1") && copy.ends_with("\r\n\r\nbefore"), "{copy}");
    });
}

#[test]
fn copies_are_bounded_in_number_and_a_place_comes_back() {
    run(async {
        let setup = web(&[OK], &[route(&json!({"Mirror": {"Service": "shadow"}}))]).await;
        let (addr, mut copies) = scripted(&[OK]).await;
        setup.worker.add(addr, Protocol::Http).await;
        let mirrored = |outcome: &str, want| {
            let series = "weft_http_mirrored_total{destination_service=\"shadow\",outcome=";
            counts(&setup.worker, &format!("{series}\"{outcome}\"}}"), want);
        };
        let under_way = &setup.worker.http.mirrors;
        under_way.set(MIRRORS_MAX);
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        mirrored("too_many", 1);
        assert!(copies.try_recv().is_err());
        under_way.set(MIRRORS_MAX - 1);
        setup.worker.next.set(0);
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        copies.recv().await.unwrap();
        // An endless wait is cut off with the test.
        while under_way.get() != MIRRORS_MAX - 1 {
            tokio::task::yield_now().await;
        }
        mirrored("sent", 1);
    });
}

#[test]
fn an_upgrade_is_copied_nowhere_and_counted() {
    run(async {
        let setup = web(&[OK], &[route(&json!({"Mirror": {"Service": "shadow"}}))]).await;
        let (addr, mut copies) = scripted(&[OK]).await;
        setup.worker.add(addr, Protocol::Http).await;
        let request = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        assert!(raw(setup.port, request).await.starts_with("HTTP/1.1 200"));
        let series = "weft_http_mirrored_total{destination_service=\"shadow\",outcome=\"body_too_long\"}";
        counts(&setup.worker, series, 1);
        assert!(copies.try_recv().is_err());
    });
}

#[test]
fn a_copy_that_nobody_answers_is_given_up_after_fifteen_seconds() {
    run(async {
        let setup = web(&[OK], &[route(&json!({"Mirror": {"Service": "shadow"}}))]).await;
        let (addr, mut copies) = scripted(&[HANG]).await;
        setup.worker.add(addr, Protocol::Http).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        copies.recv().await.unwrap();
        let begun = crate::clock::now();
        // From here on time passes where nothing happens.
        tokio::time::pause();
        let failed = "weft_http_mirrored_total{destination_service=\"shadow\",outcome=\"failed\"} 1";
        while !setup.worker.metrics.render().unwrap().contains(failed) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let took = crate::clock::now() - begun;
        assert!((Duration::from_secs(13)..Duration::from_secs(16)).contains(&took), "{took:?}");
    });
}

#[test]
fn a_mirror_s_answer_is_read_up_to_a_mebibyte() {
    run(async {
        let setup = web(&[OK], &[route(&json!({"Mirror": {"Service": "shadow"}}))]).await;
        let shadow = TcpListener::bind("127.0.0.1:0").await.unwrap();
        setup.worker.add(shadow.local_addr().unwrap(), Protocol::Http).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        let (mut app, _) = shadow.accept().await.unwrap();
        let body = vec![b'x'; 64 << 20];
        app.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes()).await.unwrap();
        assert!(app.write_all(&body).await.is_err(), "all of it was read");
        counts(&setup.worker, "weft_http_mirrored_total{destination_service=\"shadow\",outcome=\"sent\"}", 1);
    });
}

/// Reads one request without a body and answers it; the connection stays open.
async fn answer_one(app: &mut TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && app.read_buf(&mut head).await.unwrap() > 0 {}
    app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
}

#[test]
fn what_somebody_else_repeats_goes_to_the_app_by_a_fresh_connection() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
        let port = worker.listen(false).await;
        let mut apps: Vec<TcpStream> = Vec::new();
        for (said, want) in [("x-app: 1", 1), ("x-app: 1", 1), ("x-weft-retry: 1", 2)] {
            let head = format!("GET / HTTP/1.1\r\n{said}");
            let mut asked = tokio::task::spawn_local(async move { ask(port, &head).await });
            let answer = loop {
                let next = async {
                    match apps.last() {
                        Some(app) => app.readable().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    answer = &mut asked => break answer.unwrap(),
                    accepted = listener.accept() => {
                        let (mut app, _) = accepted.unwrap();
                        answer_one(&mut app).await;
                        apps.push(app);
                    }
                    readable = next => {
                        readable.unwrap();
                        answer_one(apps.last_mut().unwrap()).await;
                    }
                }
            };
            assert!(answer.ends_with("ok"), "{answer}");
            assert_eq!(apps.len(), want, "{said}");
        }
    });
}

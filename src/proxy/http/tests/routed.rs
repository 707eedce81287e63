//! Requests to a service that config entries are about.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::*;
use crate::traffic::{Entries, Ready, Traffic};

/// An app that gives these answers, one per connection, and tells what it was sent. `hang`: none, and it tells `left` when
/// the caller goes; `late`: after 300 ms; the last one stays.
pub(super) async fn scripted(answers: &[&'static str]) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(64);
    let mut answers: VecDeque<&'static str> = answers.iter().copied().collect();
    tokio::task::spawn_local(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answer = if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0] };
            let seen = seen.clone();
            tokio::task::spawn_local(async move {
                let mut request = Vec::new();
                let is_whole = |request: &[u8]| {
                    let text = String::from_utf8_lossy(request).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
                    let length = head
                        .lines()
                        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
                    body.len() >= length.unwrap_or(0)
                };
                while !is_whole(&request) {
                    if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let _nobody_looks = seen.try_send(String::from_utf8_lossy(&request).into_owned());
                if answer.starts_with("late") {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                let text = answer.strip_prefix("hang").or(answer.strip_prefix("late")).unwrap_or(answer);
                stream.write_all(text.as_bytes()).await.unwrap();
                if answer.starts_with("hang") {
                    let _gone = stream.read_buf(&mut request).await;
                    let _nobody_looks = seen.try_send("left".to_owned());
                }
            });
        }
    });
    (addr, messages)
}

pub(super) const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\nx-app: 1\r\n\r\nok";
pub(super) const UNAVAILABLE: &str =
    "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbad";
pub(super) const HANG: &str = "hang";

/// A worker whose web is the scripted app, and what entries say of it.
pub(super) async fn web(answers: &[&'static str], entries: &[(&str, &str, Value)]) -> Setup {
    let worker = Loopback::new(Limits::default());
    let (addr, messages) = scripted(answers).await;
    worker.add(addr, Protocol::Http).await;
    say(&worker, entries);
    let port = worker.listen(false).await;
    Setup { worker, port, messages }
}

pub(super) fn say(worker: &Loopback, list: &[(&str, &str, Value)]) {
    let mut entries = Entries::default();
    for (kind, name, value) in list {
        entries.add(kind, name, Ready::new(kind, value).unwrap());
    }
    let traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
    assert_eq!(traffic.quarantined(), []);
    let snapshot = Snapshot { traffic, ..Snapshot::clone(&worker.reader.load()) };
    worker.publisher.publish(Arc::new(snapshot));
}

/// A router of `web` with one route for all.
pub(super) fn route(destination: &Value) -> (&'static str, &'static str, Value) {
    ("service-router", "web", json!({"Routes": [{"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": destination}]}))
}

pub(super) async fn ask(port: SocketAddr, head: &str) -> String {
    raw(port, format!("{head}\r\nhost: web\r\nconnection: close\r\n\r\n").as_bytes()).await
}

#[track_caller]
pub(super) fn counts(worker: &Loopback, series: &str, want: u64) {
    let text = worker.metrics.render().unwrap();
    let line =
        text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series} is not in {text}"));
    assert!(line.ends_with(&format!(" {want}")), "{line}");
}

#[test]
fn a_retry_saves_a_request_and_sends_its_body_again() {
    run(async {
        let mut setup = web(&[UNAVAILABLE, OK], &[route(&json!({"NumRetries": 2, "RetryOn": ["5xx"]}))]).await;
        let answer =
            raw(setup.port, b"POST /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbody")
                .await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
        let mut ids = Vec::new();
        for _ in 0..2 {
            let sent = setup.messages.recv().await.unwrap();
            assert!(sent.ends_with("\r\n\r\nbody"));
            ids.push(sent.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap().to_owned());
        }
        assert_eq!(ids[0], ids[1], "both attempts are one request");
        counts(&setup.worker, "weft_http_retries_total{destination_service=\"web\",reason=\"status\"}", 1);
        counts(&setup.worker, "weft_http_retries_saved_total{destination_service=\"web\"}", 1);
    });
}

#[test]
fn a_body_of_64_kib_is_sent_again_and_a_longer_one_is_not() {
    run(async {
        // Frames have headers, which are kept as well.
        for (bytes, is_kept) in [(REPLAY_BYTES_MAX - 1024, true), (REPLAY_BYTES_MAX + 1, false)] {
            let mut setup = web(&[UNAVAILABLE, OK], &[route(&json!({"NumRetries": 1, "RetryOn": ["5xx"]}))]).await;
            let body = "b".repeat(bytes);
            let request =
                format!("POST / HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: {bytes}\r\n\r\n{body}");
            let answer = raw(setup.port, request.as_bytes()).await;
            let met: Vec<String> = std::iter::from_fn(|| setup.messages.try_recv().ok()).collect();
            assert!(met.iter().all(|request| request.ends_with(&body)), "a body of {bytes} bytes came otherwise");
            if is_kept {
                assert!(answer.starts_with("HTTP/1.1 200") && met.len() == 2, "{bytes}: {answer}");
            } else {
                assert!(answer.starts_with("HTTP/1.1 503") && met.len() == 1, "{bytes}: {answer}");
                let refused = "weft_http_retries_refused_total{destination_service=\"web\",reason=\"body\"}";
                counts(&setup.worker, refused, 1);
            }
        }
    });
}

const GRPC: &str = "POST /shop.Cart/Add HTTP/1.1\r\ncontent-type: application/grpc\r\nte: trailers";

#[test]
fn grpc_is_tried_again_only_as_long_as_nothing_but_a_status_was_answered() {
    run(async {
        const ONLY_STATUS: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\n\
                                   content-length: 0\r\nconnection: close\r\n\r\n";
        const FINE: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 0\r\n\
                            content-length: 0\r\nconnection: close\r\n\r\n";
        // A message, and the same status after it.
        const BEGUN: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\
                             trailer: grpc-status\r\nconnection: close\r\n\r\n\
                             5\r\n\0\0\0\0\0\r\n0\r\ngrpc-status: 14\r\n\r\n";
        // It breaks off after its head.
        const BROKEN: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\
                              connection: close\r\n\r\n";
        let destination = json!({"NumRetries": 2, "RetryOn": ["unavailable", "reset"]});
        for (first, times) in [(ONLY_STATUS, 2), (BEGUN, 1), (BROKEN, 1)] {
            let mut setup = web(&[first, FINE], &[route(&destination)]).await;
            let answer = ask(setup.port, GRPC).await;
            let met = std::iter::from_fn(|| setup.messages.try_recv().ok()).count();
            assert_eq!(met, times, "{first:?}: {answer}");
            assert_eq!(answer.contains("grpc-status: 0\r\n"), times == 2, "{answer}");
            let text = setup.worker.metrics.render().unwrap();
            let status = if times == 2 { "grpc_response_status=\"0\"" } else { "grpc_response_status=\"14\"" };
            let is_counted = |line: &str| line.contains("reporter=\"source\"") && line.contains(status);
            // One that breaks off once its head has gone on is cut off, without a status.
            assert!(first == BROKEN || text.lines().any(is_counted), "{first:?}: {text}");
        }
    });
}

#[test]
fn a_grpc_timeout_is_kept_and_what_is_left_of_it_goes_along() {
    run(async {
        // Without an entry, with a route that allows more, and with one that allows less.
        for (limit, asked) in [(None, "200m"), (None, "200000u"), (Some("20s"), "200m"), (Some("200ms"), "10S")] {
            let entries: Vec<_> = limit.map(|limit| route(&json!({"RequestTimeout": limit}))).into_iter().collect();
            let mut setup = web(&[HANG], &entries).await;
            let begun = crate::clock::now();
            let answer = ask(setup.port, &format!("{GRPC}\r\ngrpc-timeout: {asked}")).await;
            assert!(answer.contains("grpc-status: 4\r\n"), "{limit:?}: {answer}");
            assert!(begun.elapsed() >= Duration::from_millis(200) && begun.elapsed() < Duration::from_secs(9));
            let head = setup.messages.recv().await.unwrap();
            let left = head.lines().find_map(|line| line.strip_prefix("grpc-timeout: ")?.strip_suffix('m')).unwrap();
            assert!((1..=200).contains(&left.parse::<u64>().unwrap()), "{limit:?}: {left}");
        }
    });
}

#[test]
fn when_retries_run_out_the_app_s_last_answer_is_passed_on_and_says_so_in_the_metrics() {
    run(async {
        let setup = web(&[UNAVAILABLE], &[route(&json!({"NumRetries": 2, "RetryOnStatusCodes": [503]}))]).await;
        let answer = ask(setup.port, "GET / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("bad"), "{answer}");
        counts(&setup.worker, "weft_http_retries_total{destination_service=\"web\",reason=\"status\"}", 2);
        counts(&setup.worker, "weft_http_retries_refused_total{destination_service=\"web\",reason=\"times\"}", 1);
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("reporter=\"source\",response_code=\"503\",response_flags=\"URX\""), "{text}");
    });
}

#[test]
fn without_conditions_no_answer_is_tried_again_and_503_is_in_no_default() {
    run(async {
        for entries in [vec![], vec![route(&json!({"NumRetries": 3}))]] {
            for (answer, head, status) in [(UNAVAILABLE, "GET / HTTP/1.1", "503"), ("", "POST / HTTP/1.1", "502")] {
                let mut setup = web(&[answer, OK], &entries).await;
                let said = ask(setup.port, head).await;
                assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{head}: {said}");
                assert_eq!(std::iter::from_fn(|| setup.messages.try_recv().ok()).count(), 1, "{head}");
            }
        }
    });
}

/// Answers that say when the request may be tried again, and one that says never.
const SOON: &str = "HTTP/1.1 503 Later\r\ncontent-length: 0\r\ngrpc-retry-pushback-ms: 300\r\n\r\n";
const SOON_GRPC: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\n\
                         grpc-retry-pushback-ms: 300\r\ncontent-length: 0\r\n\r\n";
const NEVER_GRPC: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\n\
                          grpc-retry-pushback-ms: -1\r\ncontent-length: 0\r\n\r\n";

#[test]
fn only_what_the_conditions_name_is_tried_again() {
    run(async {
        const ERROR: &str = "HTTP/1.1 500 Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        const LATER: &str = "HTTP/1.1 503 Later\r\ncontent-length: 0\r\nretry-after: 3600\r\nconnection: close\r\n\r\n";
        const BROKEN: &str = "";
        let gateway = || route(&json!({"NumRetries": 1, "RetryOn": ["gateway-error"]}));
        let setup = web(&[ERROR, OK], &[gateway()]).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 500"));
        // A server that asks for an hour is not asked again.
        let setup = web(&[LATER, OK], &[gateway()]).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 503"));
        counts(&setup.worker, "weft_http_retries_refused_total{destination_service=\"web\",reason=\"pushback\"}", 1);
        // An app that breaks off is answered for with 502: a gateway's error.
        let setup = web(&[BROKEN, OK], &[gateway()]).await;
        assert!(ask(setup.port, "POST / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        let setup = web(&[BROKEN, OK], &[route(&json!({"NumRetries": 1, "RetryOn": ["retriable-4xx"]}))]).await;
        let answer = ask(setup.port, "POST / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("content-length: "), "{answer}");
    });
}

#[test]
fn grpc_retry_pushback_ms_puts_a_retry_off_or_forbids_it() {
    run(async {
        let gateway = || route(&json!({"NumRetries": 1, "RetryOn": ["gateway-error"]}));
        // A server whose word on retries is no number, or one below zero, is not asked again.
        for word in ["soon", "-1", ""] {
            let later: &'static str = String::leak(format!(
                "HTTP/1.1 503 Later\r\ncontent-length: 0\r\ngrpc-retry-pushback-ms: {word}\r\n\r\n"
            ));
            let setup = web(&[later, OK], &[gateway()]).await;
            assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 503"), "{word:?}");
        }
        // One that names a time is asked again, and not before: of HTTP and of gRPC.
        let unavailable = json!({"NumRetries": 1, "RetryOn": ["unavailable", "gateway-error"],
            "RetryBackoff": {"BaseInterval": "1ms"}});
        for (answer, head) in [(SOON, "GET / HTTP/1.1"), (SOON_GRPC, GRPC)] {
            let setup = web(&[answer, OK], &[route(&unavailable)]).await;
            let begun = crate::clock::now();
            assert!(ask(setup.port, head).await.ends_with("ok"), "{answer}");
            assert!(begun.elapsed() >= Duration::from_millis(300), "{answer}: after {:?}", begun.elapsed());
        }
        let mut setup = web(&[NEVER_GRPC, OK], &[route(&unavailable)]).await;
        assert!(ask(setup.port, GRPC).await.contains("grpc-status: 14\r\n"));
        assert_eq!(std::iter::from_fn(|| setup.messages.try_recv().ok()).count(), 1);
    });
}

#[test]
fn a_timeout_answers_504_and_says_why_and_what_is_left_goes_along() {
    run(async {
        let mut setup = web(&[HANG], &[route(&json!({"RequestTimeout": "300ms"}))]).await;
        let begun = crate::clock::now();
        let answer = ask(setup.port, "GET / HTTP/1.1").await;
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
        assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("x-weft-reason: timeout"), "{answer}");
        assert!(answer.contains("`web` did not answer within 300ms, the timeout of the request (route 0"), "{answer}");
        let head = setup.messages.recv().await.unwrap();
        let left = head.lines().find_map(|line| line.strip_prefix("x-request-timeout-ms: ")).unwrap();
        assert!((1..=300).contains(&left.parse::<u64>().unwrap()), "{left}");

        // The caller's own limit counts if it is shorter; a resolver's where no route has one.
        let resolver = ("service-resolver", "web", json!({"RequestTimeout": "20s"}));
        for entries in [vec![resolver], vec![]] {
            let setup = web(&[HANG], &entries).await;
            let answer = ask(setup.port, "GET / HTTP/1.1\r\nx-request-timeout-ms: 100").await;
            assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
            assert!(answer.contains("did not answer within 100ms"), "{answer}");
        }
    });
}

#[test]
fn an_attempt_that_takes_too_long_is_followed_by_another() {
    run(async {
        let destination =
            json!({"RequestTimeout": "20s", "PerTryTimeout": "200ms", "NumRetries": 1, "RetryOn": ["reset"]});
        let setup = web(&[HANG, OK], &[route(&destination)]).await;
        let answer = ask(setup.port, "POST / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        counts(&setup.worker, "weft_http_retries_total{destination_service=\"web\",reason=\"timeout\"}", 1);
    });
}

#[test]
fn a_response_that_stalls_or_takes_too_long_is_cut_off() {
    run(async {
        const STALLS: &str = "hangHTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegins";
        // The answer has to begin before the time of the whole is over, on a machine that stands still for a while as well.
        for limit in [json!({"RequestTimeout": "3s"}), json!({"IdleTimeout": "300ms"})] {
            let setup = web(&[STALLS], &[route(&limit)]).await;
            let answer = ask(setup.port, "GET / HTTP/1.1").await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("begins"), "{answer}");
            let text = setup.worker.metrics.render().unwrap();
            assert!(text.contains("reporter=\"source\",response_code=\"200\",response_flags=\"UT\""), "{text}");
        }
        // The caller's own limit holds to the end of the body, without an entry as well.
        let setup = web(&[STALLS], &[]).await;
        let answer = ask(setup.port, "GET / HTTP/1.1\r\nx-request-timeout-ms: 3000").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("begins"), "{answer}");
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("reporter=\"source\",response_code=\"200\",response_flags=\"UT\""), "{text}");
    });
}

#[test]
fn a_deadline_ends_a_response_that_keeps_flowing() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
        say(&worker, &[route(&json!({"RequestTimeout": "300ms"}))]);
        let port = worker.listen(false).await;
        // An app that never stops: there is always something to read when the time is over.
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _head = stream.read(&mut [0; 4096]).await.unwrap();
            let mut piece = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000000\r\n\r\n".to_vec();
            while stream.write_all(&piece).await.is_ok() {
                piece = vec![b'x'; 32 << 10];
            }
        });
        let begun = crate::clock::now();
        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        let mut buffer = vec![0; 64 << 10];
        let mut read = 0;
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            read += count;
            assert!(begun.elapsed() < Duration::from_secs(5), "{read} bytes came in {:?}", begun.elapsed());
        }
        assert!(read > 100_000 && begun.elapsed() >= Duration::from_millis(300), "{read} bytes");
    });
}

#[test]
fn faults_delay_abort_and_reset() {
    run(async {
        let faults = json!({"Faults": [
            {"Match": {"HTTP": {"PathPrefix": "/slow"}}, "Delay": {"Duration": "200ms"}},
            {"Match": {"HTTP": {"PathPrefix": "/bad"}}, "Abort": {"HTTPStatus": 418}},
            {"Match": {"HTTP": {"PathPrefix": "/grpc"}}, "Abort": {"GRPCStatus": 8}},
            {"Match": {"HTTP": {"PathPrefix": "/rst"}}, "Abort": {"Reset": true}},
        ]});
        let setup = web(&[OK], &[("service-faults", "web", faults)]).await;
        let begun = crate::clock::now();
        assert!(ask(setup.port, "GET /slow HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        assert!(begun.elapsed() >= Duration::from_millis(200));
        let answer = ask(setup.port, "GET /bad HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 418") && answer.contains("service-faults web"), "{answer}");
        assert!(ask(setup.port, "GET /grpc HTTP/1.1").await.contains("grpc-status: 8"));
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream.write_all(b"GET /rst HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        for kind in ["delay", "reset"] {
            counts(&setup.worker, &format!("weft_http_faults_total{{destination_service=\"web\",kind=\"{kind}\"}}"), 1);
        }
        counts(&setup.worker, "weft_http_faults_total{destination_service=\"web\",kind=\"abort\"}", 2);
        let text = setup.worker.metrics.render().unwrap();
        for series in ["response_code=\"418\",response_flags=\"FI\"", "response_code=\"200\",response_flags=\"DI\""] {
            assert!(text.contains(&format!("reporter=\"source\",{series}")), "{series} is not in {text}");
        }
        // Without the entry all is as before.
        say(&setup.worker, &[]);
        assert!(ask(setup.port, "GET /rst HTTP/1.1").await.starts_with("HTTP/1.1 200"));
    });
}

#[test]
fn a_route_rewrites_path_host_and_headers_both_ways() {
    run(async {
        let router = json!({"Routes": [{"Match": {"HTTP": {"PathPrefix": "/api/"}}, "Destination": {
            "PrefixRewrite": "/v2/", "HostRewrite": "inner.example:81",
            "RequestHeaders": {"Set": {"x-team": "shop"}, "Remove": ["x-secret"]},
            "ResponseHeaders": {"Add": {"x-by": "weft"}, "Remove": ["x-app"]}}}]});
        let mut setup = web(&[OK], &[("service-router", "web", router)]).await;
        let answer = ask(setup.port, "GET /api/cart?item=1 HTTP/1.1\r\nx-secret: 1\r\nx-team: evil").await;
        assert!(answer.contains("x-by: weft") && !answer.contains("x-app"), "{answer}");
        let head = setup.messages.recv().await.unwrap();
        assert!(head.starts_with("GET /v2/cart?item=1 HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("host: inner.example:81") && head.contains("x-team: shop"), "{head}");
        assert!(!head.contains("x-secret") && !head.contains("evil"), "{head}");
    });
}

#[test]
fn a_redirect_sends_the_caller_elsewhere() {
    run(async {
        let router = json!({"Routes": [
            {"Match": {"HTTP": {"PathPrefix": "/old"}}, "Redirect": {"Code": 308, "PrefixRewrite": "/new"}},
            {"Match": {"HTTP": {"PathPrefix": "/root"}}, "Redirect": {"PrefixRewrite": "/"}},
            {"Match": {"HTTP": {"PathPrefix": "/tls"}}, "Redirect": {"Scheme": "https"}},
        ]});
        let setup = web(&[OK], &[("service-router", "web", router)]).await;
        let answer = ask(setup.port, "GET /old/x?y=1 HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 308") && answer.contains("location: /new/x?y=1\r\n"), "{answer}");
        // No caller is sent to another host by what it asks for.
        let answer = ask(setup.port, "GET /root//evil.example/ HTTP/1.1").await;
        assert!(answer.contains("location: http://web//evil.example/\r\n"), "{answer}");
        // Browsers read `\\` as `/`.
        let answer = ask(setup.port, "GET /root/\\evil.example/ HTTP/1.1").await;
        assert!(answer.contains("location: http://web/\\evil.example/\r\n"), "{answer}");
        let answer = ask(setup.port, "GET /tls?y HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 302") && answer.contains("location: https://web/tls?y\r\n"), "{answer}");
    });
}

#[test]
fn a_mirror_gets_a_copy_and_never_slows_the_original() {
    run(async {
        let mirror = json!({"Mirror": {"Service": "shadow"}});
        let mut setup = web(&[OK], &[route(&mirror)]).await;
        let (addr, mut copies) = scripted(&[HANG]).await;
        setup.worker.add(addr, Protocol::Http).await;
        let request = b"POST /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbody";
        // The mirror never answers: the original does not wait for it.
        let answer = tokio::time::timeout(Duration::from_secs(5), raw(setup.port, request)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (sent, copy) = (setup.messages.recv().await.unwrap(), copies.recv().await.unwrap());
        assert!(sent.ends_with("\r\n\r\nbody"), "{sent}");
        assert!(copy.starts_with("POST /x HTTP/1.1") && copy.ends_with("\r\n\r\nbody"), "{copy}");
    });
}

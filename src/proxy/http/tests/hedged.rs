//! Copies of requests to other instances, and attempts that a balancer picks and hears of.

use serde_json::{Value, json};

use super::routed::{HANG, OK, UNAVAILABLE, ask, counts, route, say, scripted};
use super::*;
use crate::routing::Cause;

const LATE_BAD: &str = "lateHTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
const LATE: &str = "lateHTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nfirst";

/// A worker whose balancer takes turns between apps, the first app first.
struct Balanced {
    worker: Rc<Loopback>,
    port: SocketAddr,
    apps: Vec<mpsc::Receiver<String>>,
}

async fn balanced(answers: &[&'static [&'static str]], destination: &Value, guard: &Value) -> Balanced {
    let worker = Loopback::new(Limits::default());
    let mut apps = Vec::new();
    for answers in answers {
        let (addr, messages) = scripted(answers).await;
        worker.add(addr, Protocol::Http).await;
        apps.push(messages);
    }
    say(&worker, &[route(destination)]);
    worker.balance(guard);
    let port = worker.listen(false).await;
    Balanced { worker, port, apps }
}

fn hedged(outcome: &str) -> String {
    format!("weft_http_hedges_total{{destination_service=\"web\",outcome=\"{outcome}\"}}")
}

#[test]
fn a_copy_answers_for_an_instance_that_does_not_and_the_app_of_the_loser_sees_its_caller_leave() {
    run(async {
        let mut setup = balanced(&[&[HANG], &[OK]], &json!({"Hedge": {"Delay": "50ms"}}), &json!({})).await;
        let begun = crate::clock::now();
        let answer = ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
        assert!(begun.elapsed() >= Duration::from_millis(50), "{:?}", begun.elapsed());
        for app in &mut setup.apps {
            assert!(app.recv().await.unwrap().starts_with("GET /x HTTP/1.1"));
        }
        assert_eq!(setup.apps[0].recv().await.unwrap(), "left");
        counts(&setup.worker, &hedged("won"), 1);
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("reporter=\"source\",response_code=\"200\",response_flags=\"HW\""), "{text}");
        assert!(!text.contains("weft_http_retries_total{"), "a copy is no retry: {text}");
    });
}

#[test]
fn the_first_answer_wins_also_if_it_is_the_first_one_s() {
    run(async {
        let mut setup = balanced(&[&[LATE], &[HANG]], &json!({"Hedge": {"Delay": "50ms"}}), &json!({})).await;
        let answer = ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(answer.ends_with("first"), "{answer}");
        assert!(setup.apps[1].recv().await.unwrap().starts_with("GET /x"));
        assert_eq!(setup.apps[1].recv().await.unwrap(), "left");
        counts(&setup.worker, &hedged("lost"), 1);
        // What is answered within the delay is not sent twice.
        let mut setup = balanced(&[&[OK], &[OK]], &json!({"Hedge": {"Delay": "10s"}}), &json!({})).await;
        ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(setup.apps[1].try_recv().is_err());
    });
}

#[test]
fn an_error_that_comes_first_waits_for_the_other_and_is_passed_on_if_that_is_no_better() {
    run(async {
        let hedge = json!({"Hedge": {"Delay": "50ms"}});
        let setup = balanced(&[&[LATE], &[UNAVAILABLE]], &hedge, &json!({})).await;
        let answer = ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(answer.ends_with("first"), "{answer}");
        counts(&setup.worker, &hedged("failed"), 1);
        let setup = balanced(&[&[LATE_BAD], &[UNAVAILABLE]], &hedge, &json!({})).await;
        let answer = ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        let timed = json!({"RequestTimeout": "400ms", "Hedge": {"Delay": "50ms"}});
        let setup = balanced(&[&[HANG], &[UNAVAILABLE]], &timed, &json!({})).await;
        let answer = ask(setup.port, "GET /x HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    });
}

#[test]
fn only_what_may_be_repeated_is_sent_twice_and_writes_only_where_it_is_said() {
    run(async {
        let plain = json!({"RequestTimeout": "400ms", "Hedge": {"Delay": "50ms"}});
        for method in ["POST", "PUT", "DELETE"] {
            let mut setup = balanced(&[&[HANG], &[OK]], &plain, &json!({})).await;
            let answer = ask(setup.port, &format!("{method} / HTTP/1.1")).await;
            assert!(answer.starts_with("HTTP/1.1 504"), "{method}: {answer}");
            assert!(setup.apps[1].try_recv().is_err(), "{method}");
        }
        // Nor what somebody before this agent repeats: one layer does.
        let mut setup = balanced(&[&[HANG], &[OK]], &plain, &json!({})).await;
        let answer = ask(setup.port, "GET / HTTP/1.1\r\nx-weft-retry: 1").await;
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
        assert!(setup.apps[1].try_recv().is_err());
        let mut setup =
            balanced(&[&[HANG], &[OK]], &json!({"Hedge": {"Delay": "50ms", "Writes": ["PUT"]}}), &json!({})).await;
        let put = b"PUT /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbody";
        assert!(raw(setup.port, put).await.starts_with("HTTP/1.1 200"));
        for app in &mut setup.apps {
            assert!(app.recv().await.unwrap().ends_with("\r\n\r\nbody"));
        }
        // A body that is not whole cannot be sent again.
        let mut setup =
            balanced(&[&[LATE], &[OK]], &json!({"Hedge": {"Delay": "50ms", "Writes": ["PUT"]}}), &json!({})).await;
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream.write_all(b"PUT /x HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\n\r\nbo").await.unwrap();
        while !setup.worker.metrics.render().unwrap().contains(&hedged("body")) {
            tokio::task::yield_now().await;
        }
        stream.write_all(b"dy").await.unwrap();
        assert!(setup.apps[0].recv().await.unwrap().ends_with("body"));
        assert!(setup.apps[1].try_recv().is_err());
    });
}

#[test]
fn a_copy_needs_another_instance_and_leave_to_repeat() {
    run(async {
        let hedge = json!({"Hedge": {"Delay": "50ms"}});
        let setup = balanced(&[&[LATE]], &hedge, &json!({})).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.ends_with("first"));
        counts(&setup.worker, &hedged("no_instance"), 1);
        let guard = json!({"Limits": {"MaxConcurrentRetries": 0}});
        let mut setup = balanced(&[&[LATE], &[OK]], &hedge, &guard).await;
        assert!(ask(setup.port, "GET / HTTP/1.1").await.ends_with("first"));
        counts(&setup.worker, &hedged("limit"), 1);
        assert!(setup.apps[1].try_recv().is_err());
    });
}

#[test]
fn a_race_that_nobody_wins_is_followed_by_a_retry_that_is_not_hedged() {
    run(async {
        let destination = json!({"Hedge": {"Delay": "50ms"}, "NumRetries": 1, "RetryOn": ["5xx"],
            "RetryBackoff": {"BaseInterval": "1ms"}});
        let mut setup = balanced(&[&[LATE_BAD], &[LATE_BAD], &[LATE]], &destination, &json!({})).await;
        let answer = ask(setup.port, "GET / HTTP/1.1").await;
        assert!(answer.ends_with("first"), "{answer}");
        counts(&setup.worker, &hedged("failed"), 1);
        counts(&setup.worker, "weft_http_retries_total{destination_service=\"web\",reason=\"status\"}", 1);
        for app in &mut setup.apps {
            assert!(app.try_recv().is_ok() && app.try_recv().is_err(), "each was asked once");
        }
    });
}

#[test]
fn attempts_of_a_route_with_retries_eject_the_instance_that_fails() {
    run(async {
        let destination = json!({"NumRetries": 2, "RetryOn": ["5xx"], "RetryBackoff": {"BaseInterval": "1ms"}});
        let mut setup = balanced(&[&[UNAVAILABLE], &[OK]], &destination, &json!({})).await;
        for _ in 0..20 {
            assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        }
        let notices = setup.worker.balancer.borrow().as_ref().unwrap().take_notices();
        let [notice] = &notices[..] else { panic!("{notices:?}") };
        assert_eq!((notice.instance.as_str(), notice.cause), ("web-0", Cause::Consecutive));
        let met = std::iter::from_fn(|| setup.apps[0].try_recv().ok()).count();
        assert_eq!(met, 5, "five failures in a row eject");
    });
}

#[test]
fn an_attempt_that_takes_too_long_counts_as_a_failure_of_its_instance() {
    run(async {
        let destination = json!({"PerTryTimeout": "500ms", "NumRetries": 1, "RetryOn": ["reset"],
            "RetryBackoff": {"BaseInterval": "1ms"}});
        let guard = json!({"PassiveHealthCheck": {"MaxFailures": 2}});
        let setup = balanced(&[&[HANG], &[OK]], &destination, &guard).await;
        for _ in 0..6 {
            assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        }
        let notices = setup.worker.balancer.borrow().as_ref().unwrap().take_notices();
        assert!(matches!(&notices[..], [one] if one.instance.as_str() == "web-0"), "{notices:?}");
    });
}

#[test]
fn grpc_calls_that_fail_in_their_trailers_eject_their_instance() {
    run(async {
        const FAILS: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\
                             connection: close\r\n\r\n5\r\n\0\0\0\0\0\r\n0\r\ngrpc-status: 14\r\n\r\n";
        const FINE: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\
                            connection: close\r\n\r\n5\r\n\0\0\0\0\0\r\n0\r\ngrpc-status: 0\r\n\r\n";
        let guard = json!({"PassiveHealthCheck": {"MaxFailures": 3}});
        let setup = balanced(&[&[FAILS], &[FINE]], &json!({"RequestTimeout": "20s"}), &guard).await;
        for _ in 0..6 {
            // By its HTTP status each is a success.
            let answer = ask(setup.port, "POST /a.B/C HTTP/1.1\r\ncontent-type: application/grpc").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        let notices = setup.worker.balancer.borrow().as_ref().unwrap().take_notices();
        let [notice] = &notices[..] else { panic!("{notices:?}") };
        assert_eq!((notice.instance.as_str(), notice.cause), ("web-0", Cause::Consecutive));
    });
}

#[test]
fn with_few_instances_retries_are_as_many_as_the_route_says() {
    run(async {
        let destination = json!({"NumRetries": 3, "RetryOn": ["5xx"], "RetryBackoff": {"BaseInterval": "1ms"}});
        let guard = json!({"PassiveHealthCheck": {"MaxFailures": 0}});
        for count in [1, 2] {
            let bad: &'static [&'static str] = &[UNAVAILABLE];
            let apps = vec![bad; count];
            let mut setup = balanced(&apps, &destination, &guard).await;
            assert!(ask(setup.port, "GET / HTTP/1.1").await.starts_with("HTTP/1.1 503"));
            let met: usize = setup.apps.iter_mut().map(|app| std::iter::from_fn(|| app.try_recv().ok()).count()).sum();
            assert_eq!(met, 4, "of {count} instances");
        }
        // Apps that refuse connections: each is asked once, and nobody a second time.
        let worker = Loopback::new(Limits::default());
        for _ in 0..2 {
            worker.add(closed_port().await, Protocol::Http).await;
        }
        say(&worker, &[route(&destination)]);
        worker.balance(&guard);
        let port = worker.listen(false).await;
        let answer = ask(port, "GET / HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-weft-reason: connect_failure"), "{answer}");
        let text = worker.metrics.render().unwrap();
        let met = text.lines().filter(|line| line.contains("reporter=\"destination\"") && line.contains("\"UF\""));
        let met: Vec<&str> = met.filter(|line| line.starts_with("weft_http_requests_total")).collect();
        assert!(matches!(&met[..], [line] if line.ends_with(" 2")), "{met:?}");
    });
}

#[test]
fn what_a_limit_refuses_says_which_and_low_priorities_are_refused_first() {
    run(async {
        let guard = json!({"Limits": {"MaxConcurrentRequests": 5, "PriorityMax": "high"}});
        let mut setup = balanced(&[&[HANG]], &json!({"RequestTimeout": "20s"}), &guard).await;
        // Three of five are under way: what may be left out has no more room, then what is low, then what says nothing.
        let mut held = Vec::new();
        for (level, refused_first) in [("sheddable", 3), ("low", 4), ("normal", 4), ("high", 5)] {
            while held.len() < refused_first {
                let mut stream = TcpStream::connect(setup.port).await.unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nx-weft-priority: high\r\n\r\n").await.unwrap();
                let head = setup.apps[0].recv().await.unwrap();
                assert!(head.contains("x-weft-priority: high\r\n"), "{head}");
                held.push(stream);
            }
            let answer = ask(setup.port, &format!("GET / HTTP/1.1\r\nx-weft-priority: {level}")).await;
            let why = if level == "high" { "requests" } else { "priority" };
            assert!(answer.starts_with("HTTP/1.1 503"), "{level}: {answer}");
            assert!(answer.contains(&format!("x-weft-overflow: {why}\r\n")), "{level}: {answer}");
        }
        // gRPC gets UNAVAILABLE, with the same header.
        let answer = ask(setup.port, "POST / HTTP/1.1\r\ncontent-type: application/grpc").await;
        assert!(answer.contains("grpc-status: 14\r\n") && answer.contains("x-weft-overflow: requests"), "{answer}");
    });
}

#[test]
fn a_mirror_s_copy_takes_no_room_that_a_request_may_need() {
    run(async {
        let guard = json!({"Limits": {"MaxConcurrentRequests": 10}});
        let destination = json!({"Mirror": {"Service": "shadow"}, "RequestTimeout": "20s"});
        let mut setup = balanced(&[&[HANG]], &destination, &guard).await;
        // Here copies go where the requests go. Once six of ten are under way they are left out.
        let mut held = Vec::new();
        for met in [2, 2, 2, 1, 1, 1, 1] {
            let mut stream = TcpStream::connect(setup.port).await.unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
            for _ in 0..met {
                setup.apps[0].recv().await.unwrap();
            }
            held.push(stream);
        }
        let failed = "weft_http_mirrored_total{destination_service=\"shadow\",outcome=\"failed\"} 4";
        // An endless wait is cut off with the test.
        while !setup.worker.metrics.render().unwrap().contains(failed) {
            tokio::task::yield_now().await;
        }
    });
}

/// A port that refuses connections.
async fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

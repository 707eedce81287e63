//! Connections at rest: when they come to it, what they hold; and sides that keep the other waiting.

use super::*;

/// Connections that are opened before the count begins: pools and caches are full then.
const WARM: usize = 8;
const CONNECTIONS: usize = 32;
/// hyper's buffers alone would be 16 KiB. What is counted is what both ends of it ask of the allocator, the caller's among them.
const BYTES_MAX: usize = 5 * 1024;

#[test]
fn a_connection_at_rest_holds_no_buffer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let limits = Limits { head: Duration::from_secs(2), ..Limits::default() };
    let setup = local.block_on(&runtime, setup_with(Protocol::Http, limits));
    let callers = Cell::new(Vec::new());
    let open = |count: usize| {
        let mut open = callers.take();
        let wanted = open.len() + count;
        local.block_on(&runtime, async {
            while open.len() < wanted {
                open.push(answered(setup.port).await);
            }
            let rest = async {
                while setup.worker.http().watchman.resting() < wanted {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), rest).await.expect("all rest");
        });
        callers.set(open);
    };
    open(WARM);
    let held = allocation_counter::measure(|| open(CONNECTIONS));
    let each = usize::try_from(held.bytes_current).unwrap() / CONNECTIONS;
    println!("{each} bytes per connection at rest");
    assert!(each <= BYTES_MAX, "{each} bytes per connection");
}

#[test]
fn a_silent_app_is_answered_for_in_time() {
    run(async {
        let limits = Limits { response: Duration::from_millis(50), ..Limits::default() };
        let setup = setup_with(Protocol::Http, limits).await;
        let answer = raw(setup.port, b"GET /hang HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("x-weft-reason: timeout"), "{answer}");
    });
}

#[test]
fn a_head_that_trickles_in_is_cut_off() {
    run(async {
        let limits = Limits { head: Duration::from_millis(40), ..Limits::default() };
        let setup = setup_with(Protocol::Http, limits).await;
        assert_eq!(raw(setup.port, b"GET / HTTP/1.1\r\nhost:").await, "");
    });
}

#[test]
fn a_connection_rests_between_requests_and_goes_on_with_the_next() {
    run(async {
        // Rounds of 50 ms; a head has time.
        let limits = Limits { head: Duration::from_millis(100), ..Limits::default() };
        let setup = setup_with(Protocol::Http, limits).await;
        let mut caller = client(setup.port).await;
        for round in 0..3 {
            let response = caller.send_request(get(&format!("/{round}"))).await.unwrap();
            assert!(body_text(response).await.contains("x-weft-hops=1"));
            let rests = async {
                while setup.worker.http().watchman.resting() == 0 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), rests).await.expect("it rests");
        }
    });
}

#[test]
fn what_a_connection_at_rest_held_is_given_back_and_then_nothing_is_done() {
    run(async {
        // Rounds of 50 ms.
        let limits = Limits { head: Duration::from_millis(100), ..Limits::default() };
        let setup = setup_with(Protocol::Http, limits).await;
        let watchman = &setup.worker.http().watchman;
        let over = async |wanted: u32| {
            while watchman.given_back() < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let caller = answered(setup.port).await;
        assert_eq!(watchman.given_back(), 0, "it does not rest yet");
        // mimalloc's second, and some of it on top: 30 rounds of 50 ms.
        tokio::time::timeout(Duration::from_secs(20), over(30)).await.expect("it rests, then the allocator is called");
        drop(caller);
        let asleep = async {
            while watchman.is_awake() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), asleep).await.expect("it is gone, and nothing is left to do");
        assert_eq!(watchman.given_back(), 60, "so it is for one that is gone");
    });
}

#[test]
fn a_connection_whose_request_is_under_way_does_not_rest() {
    run(async {
        let limits = Limits { head: Duration::from_millis(40), ..Limits::default() };
        let mut setup = setup_with(Protocol::Http, limits).await;
        // The app answers at once with what it was sent so far; the rest of the body is still owed.
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        stream.write_all(b"POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\n\r\n01234").await.unwrap();
        assert_eq!(setup.messages.recv().await.unwrap(), "POST /echo");
        // Many rounds of the watchman, counted by another connection that comes to rest meanwhile.
        for _ in 0..3 {
            let mut other = client(setup.port).await;
            let response = other.send_request(get("/")).await.unwrap();
            assert!(response.status().is_success());
            drop(response);
            while setup.worker.http().watchman.resting() == 0 {
                tokio::task::yield_now().await;
            }
            drop(other);
            while setup.worker.http().watchman.resting() > 0 {
                tokio::task::yield_now().await;
            }
        }
        stream.write_all(b"56789").await.unwrap();
        let mut answer = String::new();
        while !answer.ends_with("0123456789") && !answer.ends_with("\r\n0\r\n\r\n") {
            let mut bytes = [0; 1024];
            let count = stream.read(&mut bytes).await.unwrap();
            assert!(count > 0, "{answer}");
            answer.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
}

/// A connection whose one request is answered.
async fn answered(port: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let mut answer = [0; 4096];
    let count = stream.read(&mut answer).await.unwrap();
    assert!(answer[..count].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..count]));
    stream
}

//! How long a client may take over an answer that holds room, in virtual time.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Method, Request, StatusCode};
use http_body::Body as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use prometheus::IntCounter;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::call::{Coding, Reply, TEXT};
use super::fake::{Bench, node_entry, on_loopback, service};
use super::held::{FREE_BYTES_MAX, HoldsRoom, ROOM_KIB_MAX, Room};
use super::routes::ROUTES;
use super::serve::{self, Limits};
use crate::clock;
use crate::model::{HealthStatus, MemberStatus};

const GZIP: &str = "accept-encoding: gzip\r\n";
const MIB: usize = 1024 * 1024;
/// All the room that there is for answers.
const WHOLE_BYTES: usize = 64 * MIB;

/// Has an answer of `whole` bytes made and read, `a_second` of them each second; returns how many came, and after how long the
/// room was free again.
async fn read_at(whole: usize, a_second: usize) -> (usize, Duration) {
    let places = Arc::new(Semaphore::new(1));
    let of_answers = Arc::clone(&places);
    let router = Router::new().fallback(move || {
        let room = Arc::clone(&of_answers).try_acquire_owned().unwrap();
        let reply = Box::new(Reply::Text { body: "x".repeat(whole), content_type: TEXT });
        let of_others = Room::new(IntCounter::new("refused", "refused").unwrap());
        std::future::ready(Reply::Held { reply, room }.into_response(Coding::Identity, &of_others))
    });
    read_slowly(router, "/", "", &places, a_second).await
}

/// Asks for `path` with `headers`, and reads `a_second` bytes of the answer each second; returns how many came, and after how long all of
/// `places` were free again.
async fn read_slowly(
    router: Router,
    path: &str,
    headers: &str,
    places: &Arc<Semaphore>,
    a_second: usize,
) -> (usize, Duration) {
    let all = places.available_permits();
    let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
    let mut server = JoinSet::new();
    server.spawn(serve::serve_alone(theirs, router, Limits::default()));
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}connection: close\r\n\r\n");
    ours.write_all(head.as_bytes()).await.unwrap();
    let (begun, mut count, mut piece) = (clock::now(), 0, vec![0; a_second]);
    let mut reader = JoinSet::new();
    reader.spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            ticks.tick().await;
            let mut left = a_second;
            while left > 0 {
                match ours.read(&mut piece[..left]).await {
                    Ok(bytes @ 1..) => (count, left) = (count + bytes, left - bytes),
                    _end => return count,
                }
            }
        }
    });
    // It is taken once the request is there, which takes no time.
    for _ in 0..10_000 {
        if places.available_permits() < all {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert!(places.available_permits() < all, "{path} holds no room");
    drop(places.acquire_many(u32::try_from(all).unwrap()).await.unwrap());
    let held = clock::now() - begun;
    (reader.join_next().await.unwrap().unwrap(), held)
}

#[tokio::test(start_paused = true)]
async fn no_reader_holds_the_room_of_answers_for_more_than_two_minutes() {
    // A little above 4 MiB a minute: enough for a small answer, and a quarter of an hour for all the room.
    let (count, held) = read_at(WHOLE_BYTES, 5 * MIB / 60).await;
    assert!(count < WHOLE_BYTES && held <= Duration::from_secs(61), "{count} bytes, {held:?}");
    let (count, held) = read_at(5 * MIB, 5 * MIB / 60).await;
    assert!(count > 5 * MIB && held <= Duration::from_secs(61), "{count} bytes, {held:?}");
    // Whoever takes half of it in each minute gets all of it.
    let (count, held) = read_at(WHOLE_BYTES, 35 * MIB / 60).await;
    assert!(count > WHOLE_BYTES && held <= Duration::from_secs(121), "{count} bytes, {held:?}");
    // Just below is given up within the first.
    let (count, held) = read_at(WHOLE_BYTES, 30 * MIB / 60).await;
    assert!(count < WHOLE_BYTES && held <= Duration::from_secs(61), "{count} bytes, {held:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reader_of_keys_and_values_holds_their_room_no_longer() {
    let bench = Bench::new();
    // Nothing that gzip makes small: it would fit what the connection buffers.
    let mut noise = StdRng::seed_from_u64(1);
    let value: String = (0..500 * 1024).map(|_| char::from(noise.random_range(b' '..=b'~'))).collect();
    assert_eq!(bench.put("/v1/kv/a", &value).await.text, "true");
    for path in ["/v1/kv/a?raw", "/v1/kv/a", "/v1/kv/?recurse"] {
        // Next to nothing, and half of it in a minute: less than 4 MiB, and not all there is.
        for a_second in [16, value.len() / 120] {
            let (count, held) = read_slowly(bench.router.clone(), path, GZIP, &bench.room, a_second).await;
            assert!(count < value.len() * 4 / 5 && held <= Duration::from_secs(61), "{path}: {count} bytes, {held:?}");
        }
        let (count, held) = read_slowly(bench.router.clone(), path, GZIP, &bench.room, value.len() / 4).await;
        assert!(count > value.len() / 2 && held <= Duration::from_secs(10), "{path}: {count} bytes, {held:?}");
    }
}

/// An API whose `web` has 250 instances, with `tag_bytes` of tags each.
fn bench_with_a_long_list(tag_bytes: usize) -> Bench {
    let bench = Bench::new();
    bench.publish(|next| {
        let nodes: Vec<_> = (1..=250).map(|number| node_entry(number, MemberStatus::Alive)).collect();
        let mut web = service("web", &nodes, HealthStatus::Passing, next.index);
        for instance in &mut web.instances {
            let instance = Arc::make_mut(instance);
            Arc::make_mut(&mut instance.record).tags = ["x".repeat(tag_bytes).into()].into();
        }
        next.nodes = nodes.into_iter().map(|node| (node.info.name.clone(), node)).collect();
        next.services.insert(web.name.clone(), Arc::new(web));
    });
    bench
}

#[tokio::test(start_paused = true)]
async fn a_reader_of_a_list_holds_its_room_no_longer() {
    let bench = bench_with_a_long_list(1000);
    for path in ["/v1/health/service/web", "/v1/catalog/service/web", "/v1/health/state/any"] {
        let whole = usize::try_from(bench.open(path).await.body().size_hint().exact().unwrap()).unwrap();
        for a_second in [16, whole / 120] {
            let (count, held) = read_slowly(bench.router.clone(), path, "", &bench.room, a_second).await;
            // Some is under way when it is given up: what is between the two sides, and what the connection buffers.
            assert!(count < whole && held <= Duration::from_secs(61), "{path}: {count} of {whole} bytes, {held:?}");
        }
        let (count, held) = read_slowly(bench.router.clone(), path, "", &bench.room, whole / 20).await;
        assert!(count > whole && held <= Duration::from_secs(21), "{path}: {count} of {whole} bytes, {held:?}");
    }
}

#[tokio::test]
async fn every_long_answer_holds_room_and_no_short_one() {
    let bench = bench_with_a_long_list(0);
    bench.put("/v1/kv/a", &"x".repeat(100_000)).await;
    let (mut long, mut short) = (Vec::new(), Vec::new());
    // A monitor holds a bounded number of lines.
    let read = ROUTES.iter().filter(|route| route.method == Method::GET && !route.path.ends_with("/monitor"));
    for route in read {
        let path = route.path.replace("{*entry}", "service-defaults").replace("{*key}", "a").replace("{state}", "any");
        let path = path.replace("{service}", "web").replace("{name}", "web").replace("{id}", "web-1");
        let answer = bench.open(&path.replace("{node}", "n1")).await;
        let bytes = usize::try_from(answer.body().size_hint().exact().unwrap()).unwrap();
        let held_bytes = answer.extensions().get::<HoldsRoom>().map(|held| held.bytes);
        if bytes > FREE_BYTES_MAX {
            assert_eq!(held_bytes, Some(bytes), "{path}");
            let kib = ROOM_KIB_MAX - bench.room.available_permits();
            assert!(
                (bytes.div_ceil(1024)..=bytes.div_ceil(1024) + 1).contains(&kib) || path.starts_with("/v1/kv"),
                "{path}"
            );
            long.push(route.path);
        } else {
            short.push(route.path);
            assert!(held_bytes.is_none() || path.starts_with("/v1/kv"), "{path} has {bytes} bytes");
        }
        drop(answer);
        assert_eq!(bench.room.available_permits(), ROOM_KIB_MAX, "{path}");
    }
    let lists =
        ["/v1/catalog/nodes", "/v1/catalog/service/{name}", "/v1/health/service/{name}", "/v1/health/state/{state}"];
    assert!(lists.iter().all(|list| long.contains(list)), "{long:?}");
    // Where all room is taken, the short ones are answered.
    bench.room.forget_permits(ROOM_KIB_MAX);
    for path in lists {
        let path = path.replace("{name}", "web").replace("{state}", "any");
        let refused = bench.get(&path).await;
        assert_eq!(
            (refused.status, &refused.headers["retry-after"]),
            (StatusCode::TOO_MANY_REQUESTS, &"1".parse().unwrap())
        );
        assert!(refused.text.contains("ask again in a second"), "{}", refused.text);
        let packed = Request::get(&path).header("accept-encoding", "gzip").body(Body::empty()).unwrap();
        assert_eq!(TowerToHyperService::new(bench.router.clone()).call(packed).await.unwrap().status(), StatusCode::OK);
    }
    assert!(short.contains(&"/v1/agent/self"), "{short:?}");
    assert_eq!(bench.get("/v1/agent/self").await.status, StatusCode::OK);
    let counted = bench.metrics.render().unwrap();
    assert!(counted.contains("weft_api_answers_refused_total 4"), "{counted}");
}

#[tokio::test]
async fn a_judgement_keeps_its_status_without_room_and_an_error_is_short() {
    let bench = Bench::new();
    bench.registry.state.send_modify(|state| {
        let state = Arc::make_mut(state);
        for check in state.checks.values_mut() {
            let check = Arc::make_mut(check);
            (check.status, check.output) = (HealthStatus::Critical, "x".repeat(FREE_BYTES_MAX));
        }
    });
    let path = "/v1/agent/health/service/id/web-1";
    let judged = bench.get(path).await;
    assert_eq!((judged.status, judged.text.len() > FREE_BYTES_MAX), (StatusCode::SERVICE_UNAVAILABLE, true));
    bench.room.forget_permits(ROOM_KIB_MAX);
    let judged = bench.get(path).await;
    assert_eq!(judged.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(judged.text.starts_with("no room for an answer"), "{}", judged.text);
    let refused = bench.get(&format!("/v1/health/service/web?near={}", "%C3%A4".repeat(10_000))).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(refused.text.len() <= FREE_BYTES_MAX && refused.text.ends_with("ä ...\n"), "{} bytes", refused.text.len());
}

/// Asks on a connection that is kept, and reads the whole answer; returns its first bytes.
async fn asked_on(stream: &mut TcpStream, path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    head
}

/// Asks for the instances of `web`, and reads the first bytes of the answer.
async fn slow_reader(addr: std::net::SocketAddr) -> (TcpStream, [u8; 12]) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let head = format!("GET /v1/health/service/web HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    (stream, status)
}

#[tokio::test]
async fn slow_readers_of_lists_fill_the_room_and_no_more_and_give_way_to_who_asks_next() {
    // Some 25 MiB, for tags are shown twice: more than the buffers between two sockets hold, and five fill the room.
    let bench = bench_with_a_long_list(50 * 1024);
    let listening = serve::bind(&on_loopback(None), None).await.unwrap();
    let addr = listening.addrs[0];
    let mut server = JoinSet::new();
    // Who takes next to nothing is behind at once, and would be given up a minute later.
    let limits = Limits { stalled_after: Duration::from_millis(100), ..Limits::default() };
    server.spawn(serve::run(listening, bench.router.clone(), limits, bench.stop.clone()));
    // Who has read all of a long answer holds nothing, and is not behind.
    let mut done = TcpStream::connect(addr).await.unwrap();
    assert!(asked_on(&mut done, "/v1/health/service/web").await.starts_with("HTTP/1.1 200"));
    let mut readers = Vec::new();
    for _ in 0..5 {
        let (reader, status) = slow_reader(addr).await;
        assert_eq!(&status, b"HTTP/1.1 200");
        readers.push(reader);
    }
    let left = bench.room.available_permits();
    assert!(left < 20 * 1024, "{left} KiB are left");
    // The next ones are refused until one that is behind has given way.
    let asked = tokio::time::timeout(Duration::from_secs(30), async {
        let mut refused = 0;
        loop {
            let (mut reader, status) = slow_reader(addr).await;
            if &status == b"HTTP/1.1 200" {
                return (refused, reader);
            }
            refused += 1;
            assert_eq!(&status, b"HTTP/1.1 429");
            let mut text = String::new();
            reader.read_to_string(&mut text).await.unwrap();
            assert!(text.contains("retry-after: 1") && text.contains("no room for an answer"), "{text}");
        }
    });
    let (refused, mut newest) = asked.await.expect("one gives way");
    assert!(refused > 0, "a sixth was answered at once");
    // Small answers never wait for any of it, and who rested on its connection has it.
    assert!(asked_on(&mut done, "/v1/status/leader").await.starts_with("HTTP/1.1 200"));
    assert!(bench.metrics.render().unwrap().contains(&format!("weft_api_answers_refused_total {refused}")));
    let mut whole = Vec::new();
    newest.read_to_end(&mut whole).await.unwrap();
    assert!(whole.ends_with(b"]") && whole.len() > 25_000_000, "{} bytes", whole.len());
    // The first one was the first to go.
    let mut first = Vec::new();
    let _reset = readers.remove(0).read_to_end(&mut first).await;
    assert!(first.len() < 25_000_000, "{} bytes", first.len());
}

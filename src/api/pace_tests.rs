//! How long a client may take over an answer that holds room, in virtual time.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::call::{Coding, Reply, TEXT};
use super::fake::Bench;
use super::serve::{self, Limits};
use crate::clock;

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
        std::future::ready(Reply::Held { reply, room }.into_response(Coding::Identity))
    });
    read_slowly(router, "/", &places, a_second).await
}

/// Asks for `path`, and reads `a_second` bytes of the answer each second; returns how many came, and after how long all of
/// `places` were free again.
async fn read_slowly(router: Router, path: &str, places: &Arc<Semaphore>, a_second: usize) -> (usize, Duration) {
    let all = places.available_permits();
    let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
    let mut server = JoinSet::new();
    server.spawn(serve::serve_alone(theirs, router, Limits::default()));
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\naccept-encoding: gzip\r\nconnection: close\r\n\r\n");
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
            let (count, held) = read_slowly(bench.router.clone(), path, &bench.kv_answers, a_second).await;
            assert!(count < value.len() * 4 / 5 && held <= Duration::from_secs(61), "{path}: {count} bytes, {held:?}");
        }
        let (count, held) = read_slowly(bench.router.clone(), path, &bench.kv_answers, value.len() / 4).await;
        assert!(count > value.len() / 2 && held <= Duration::from_secs(10), "{path}: {count} bytes, {held:?}");
    }
}

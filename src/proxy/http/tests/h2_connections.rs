//! The connections to an app over HTTP/2: how many, what goes by which, and what becomes of requests when one ends.

use super::app_h2::{App, GET, answers, head, say_204};
use super::edge::{rest, until};
use super::floods::{DATA, GOAWAY, HEADERS, PREFACE, SETTINGS, frame};
use super::*;

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

fn get_of(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
}

#[test]
fn a_request_that_is_given_up_while_the_app_has_no_room_for_it_never_goes_out() {
    run(async {
        let app = App::of_single_streams(1).await;
        let under_way = app.send(&get_of("/under-way")).await;
        let mut link = app.accept().await;
        let respond = link.asked("/under-way").await;
        let first = app.send(&get_of("/first")).await;
        app.queues(1).await;
        let given_up = app.send(&get_of("/given-up")).await;
        app.queues(2).await;
        let last = app.send(&get_of("/last")).await;
        app.queues(3).await;
        drop(given_up);
        app.queues(2).await;
        say_204(respond);
        answers(under_way, "HTTP/1.1 204").await;
        for (path, caller) in [("/first", first), ("/last", last)] {
            say_204(link.asked(path).await);
            answers(caller, "HTTP/1.1 204").await;
        }
    });
}

#[test]
fn where_an_app_allows_no_more_streams_a_further_connection_has_them_up_to_a_limit() {
    run(async {
        let app = App::of_single_streams(2).await;
        let mut callers = vec![app.send(&get_of("/0")).await];
        let mut links = vec![app.accept().await];
        let first = links[0].asked("/0").await;
        callers.push(app.send(&get_of("/1")).await);
        links.push(app.accept().await);
        let second = links[1].asked("/1").await;
        // The others wait for a stream of either.
        for waiting in 1..=2 {
            callers.push(app.send(&get_of(&format!("/{}", waiting + 1))).await);
            app.queues(waiting).await;
        }
        say_204(second);
        let third = links[1].asked("/2").await;
        say_204(first);
        let fourth = links[0].asked("/3").await;
        say_204(third);
        say_204(fourth);
        for caller in callers {
            answers(caller, "HTTP/1.1 204").await;
        }
        // What one connection has room for goes by the first.
        let caller = app.send(&get_of("/alone")).await;
        say_204(links[0].asked("/alone").await);
        answers(caller, "HTTP/1.1 204").await;
    });
}

#[test]
fn connections_that_carried_nothing_between_two_sweeps_are_closed() {
    run(async {
        let app = App::of_single_streams(2).await;
        let long = app.send(&get_of("/long")).await;
        let mut first = app.accept().await;
        let held = first.asked("/long").await;
        let short = app.send(&get_of("/short")).await;
        let mut second = app.accept().await;
        say_204(second.asked("/short").await);
        answers(short, "HTTP/1.1 204").await;
        let connections = app.connections();
        assert!(connections.sweep() && connections.sweep(), "one is busy");
        assert!(second.requests.recv().await.is_none(), "the other one is closed");
        say_204(held);
        answers(long, "HTTP/1.1 204").await;
        assert!(connections.sweep(), "it was used");
        assert!(!connections.sweep());
        assert!(first.requests.recv().await.is_none());
    });
}

/// Takes a connection of an app that speaks frame by frame, which begins with `settings`.
async fn accept_raw(listener: &TcpListener, settings: &[u8]) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut preface = vec![0; PREFACE.len()];
    stream.read_exact(&mut preface).await.unwrap();
    stream.write_all(settings).await.unwrap();
    stream
}

/// Reads up to the next head of a request; none: the connection ends.
async fn next_head(stream: &mut TcpStream) -> Option<usize> {
    next_frame(stream, HEADERS).await
}

/// Reads the next frame of this kind; returns its length.
async fn next_frame(stream: &mut TcpStream, kind: u8) -> Option<usize> {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let length = usize::try_from(length).unwrap();
        stream.read_exact(&mut vec![0; length]).await.ok()?;
        if head[3] == kind {
            return Some(length);
        }
    }
}

/// SETTINGS that allow so many streams.
fn allows(streams: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&[0, 3][..], &streams.to_be_bytes()].concat())
}

/// `:status: 200` and the end of stream `id` (RFC 7541 §6.1).
fn ok_of(id: u32) -> Vec<u8> {
    frame(HEADERS, 5, id, &[0x88])
}

#[test]
fn no_request_goes_out_before_the_app_s_settings_or_beyond_what_they_allow() {
    run(async {
        let app = App::start().await;
        let caller = app.send(&get_of("/")).await;
        let mut stream = accept_raw(&app.listener, &[]).await;
        app.queues(1).await;
        // Whatever comes up to here is no request.
        stream.write_all(&allows(0)).await.unwrap();
        let mut ack = [0; 9];
        while ack[3] != SETTINGS || ack[4] != 1 {
            stream.read_exact(&mut ack).await.unwrap();
            assert_ne!(ack[3], HEADERS);
            let length = u32::from_be_bytes([0, ack[0], ack[1], ack[2]]);
            stream.read_exact(&mut vec![0; usize::try_from(length).unwrap()]).await.unwrap();
        }
        app.queues(1).await;
        stream.write_all(&allows(1)).await.unwrap();
        next_head(&mut stream).await.unwrap();
        stream.write_all(&ok_of(1)).await.unwrap();
        answers(caller, "HTTP/1.1 200").await;
    });
}

#[test]
fn an_app_that_does_not_speak_http2_is_not_reached() {
    run(async {
        for says in [&b""[..], b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n"] {
            let app = App::start().await;
            let caller = app.send(&get_of("/")).await;
            for _tried_elsewhere in 0..3 {
                drop(accept_raw(&app.listener, says).await);
            }
            answers(caller, "HTTP/1.1 503").await;
        }
    });
}

#[test]
fn an_app_that_ends_connections_as_it_begins_them_is_not_asked_on_and_on() {
    run(async {
        let app = App::start().await;
        let caller = app.send(&get_of("/")).await;
        let ends = [allows(100), frame(GOAWAY, 0, 0, &[0; 8])].concat();
        for _tried_elsewhere in 0..3 {
            drop(accept_raw(&app.listener, &ends).await);
        }
        answers(caller, "HTTP/1.1 503").await;
    });
}

#[test]
fn a_connection_that_is_opened_for_a_request_that_is_given_up_serves_the_next() {
    run(async {
        let app = App::start().await;
        let given_up = app.send(&get_of("/given-up")).await;
        let mut stream = accept_raw(&app.listener, &[]).await;
        app.queues(1).await;
        let waits = app.send(&get_of("/waits")).await;
        app.queues(2).await;
        drop(given_up);
        app.queues(1).await;
        stream.write_all(&allows(1)).await.unwrap();
        next_head(&mut stream).await.unwrap();
        stream.write_all(&ok_of(1)).await.unwrap();
        answers(waits, "HTTP/1.1 200").await;
    });
}

#[test]
fn where_no_further_connection_can_be_opened_a_request_gets_the_next_stream() {
    run(async {
        let app = App::of_single_streams(2).await;
        let first = app.send(&get_of("/first")).await;
        let mut link = app.accept().await;
        let respond = link.asked("/first").await;
        let waits = app.send(&get_of("/waits")).await;
        app.queues(1).await;
        let App { listener, .. } = app;
        drop(listener);
        say_204(respond);
        answers(first, "HTTP/1.1 204").await;
        say_204(link.asked("/waits").await);
        answers(waits, "HTTP/1.1 204").await;
    });
}

#[test]
fn a_connection_on_which_every_request_is_given_up_gives_way_to_another() {
    run(async {
        let app = App::start().await;
        let mut link = None;
        for _ in 0..256 {
            let caller = app.send(&get_of("/slow")).await;
            let link = match &mut link {
                Some(link) => link,
                none => none.insert(app.accept().await),
            };
            let mut respond = link.asked("/slow").await;
            drop(caller);
            let _reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
        }
        let caller = app.send(&get_of("/next")).await;
        let mut second = app.accept().await;
        say_204(second.asked("/next").await);
        answers(caller, "HTTP/1.1 204").await;
    });
}

/// How an app leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Leaves {
    /// With a GOAWAY that leaves the request out.
    Saying,
    /// By FIN.
    Silently,
    /// By RST.
    Reset,
    /// After an interim answer.
    Hinting,
}

#[test]
fn a_request_that_meets_the_end_of_a_kept_connection_goes_by_another_as_far_as_that_is_safe() {
    run(async {
        use Leaves::{Hinting, Reset, Saying, Silently};
        let post = |name: &str, length: usize| {
            format!("{name} / HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: {length}\r\n\r\nbody")
        };
        for (leaves, request, is_again) in [
            (Saying, get_of("/"), true),
            (Saying, post("POST", 4), true),
            (Silently, get_of("/"), true),
            (Reset, get_of("/"), true),
            // Who knows what it has done.
            (Silently, post("POST", 4), false),
            (Silently, post("PUT", 4), false),
            (Reset, get_of("/").replace("GET", "POST"), false),
            (Hinting, get_of("/"), false),
            // Somebody repeats it already.
            (Silently, get_of("/").replace("host", "x-weft-retry: 1\r\nhost"), false),
        ] {
            let app = App::start().await;
            let caller = app.send(&get_of("/first")).await;
            let mut kept = accept_raw(&app.listener, &allows(100)).await;
            next_head(&mut kept).await.unwrap();
            kept.write_all(&ok_of(1)).await.unwrap();
            answers(caller, "HTTP/1.1 200").await;

            let opened = app.worker.next.get();
            let caller = app.send(&request).await;
            next_head(&mut kept).await.unwrap();
            match leaves {
                Saying => kept.write_all(&frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0])).await.unwrap(),
                Reset => kept.set_zero_linger().unwrap(),
                // `:status: 103` (RFC 7541 §6.2.2).
                Hinting => kept.write_all(&frame(HEADERS, 4, 3, b"\x08\x03103")).await.unwrap(),
                Silently => {}
            }
            drop(kept);
            if is_again {
                let mut link = app.accept().await;
                let (mut asked, respond) = link.requests.recv().await.unwrap();
                let mut body = Vec::new();
                while let Some(data) = asked.body_mut().data().await {
                    body.extend_from_slice(&data.unwrap());
                }
                assert_eq!(body, if request.ends_with("body") { &b"body"[..] } else { b"" });
                say_204(respond);
                answers(caller, "HTTP/1.1 204").await;
            } else {
                let mut caller = caller;
                assert!(rest(&mut caller).await.contains("HTTP/1.1 502"), "{leaves:?} {request}");
            }
            assert_eq!(app.worker.next.get(), opened + 1, "{leaves:?} {request}: the caller's agent repeats nothing");
            let is_stale = app.worker.metrics.render().unwrap().contains("reason=\"stale\"} 1");
            assert_eq!(is_stale, is_again && leaves != Saying, "{leaves:?} {request}");
        }
    });
}

#[test]
fn a_request_that_one_connection_after_another_leaves_out_goes_on_to_the_next() {
    run(async {
        let app = App::start().await;
        let post = "POST / HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbody";
        let caller = app.send(post).await;
        let mut ended = Vec::new();
        for _ in 0..8 {
            let mut stream = accept_raw(&app.listener, &allows(100)).await;
            next_head(&mut stream).await.unwrap();
            stream.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await.unwrap();
            ended.push(stream);
        }
        let mut link = app.accept().await;
        say_204(link.asked("/").await);
        answers(caller, "HTTP/1.1 204").await;
        assert_eq!(app.worker.next.get(), 1, "the caller's agent repeats nothing");
    });
}

#[test]
fn a_body_that_is_left_out_goes_by_another_connection_from_its_beginning() {
    run(async {
        // Where more of it was read than is kept (16 KiB), the caller's agent has it (64 KiB), and sends it by another stream of
        // the tunnel.
        for (was_read, length, streams) in [(false, 8, 1), (true, 8, 1), (true, 20_000, 2)] {
            let app = App::start().await;
            let head = "POST / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n";
            let mut caller = app.send(&format!("{head}content-length: {length}\r\n\r\nhalf")).await;
            let mut first = accept_raw(&app.listener, &allows(100)).await;
            next_frame(&mut first, HEADERS).await.unwrap();
            let rest = vec![b'-'; length - 4];
            if was_read {
                caller.write_all(&rest).await.unwrap();
                let mut read = 0;
                while read < length {
                    read += next_frame(&mut first, DATA).await.unwrap();
                }
            }
            first.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await.unwrap();
            let mut link = app.accept().await;
            let (mut asked, respond) = link.requests.recv().await.unwrap();
            if !was_read {
                caller.write_all(&rest).await.unwrap();
            }
            let mut body = Vec::new();
            while let Some(data) = asked.body_mut().data().await {
                let data = data.unwrap();
                asked.body_mut().flow_control().release_capacity(data.len()).unwrap();
                body.extend_from_slice(&data);
            }
            assert!(body == [b"half", &rest[..]].concat(), "{} of {length} bytes", body.len());
            assert_eq!(app.worker.next.get(), streams, "{length} bytes");
            say_204(respond);
            answers(caller, "HTTP/1.1 204").await;
        }
    });
}

#[test]
fn an_app_that_dies_takes_all_its_connections_along() {
    run(async {
        let app = App::start().await;
        let mut links = Vec::new();
        let mut callers = Vec::new();
        for _ in 0..2 {
            callers.push(app.send(&get_of("/")).await);
            let mut stream = accept_raw(&app.listener, &allows(1)).await;
            next_head(&mut stream).await.unwrap();
            links.push(stream);
        }
        links[1].write_all(&ok_of(1)).await.unwrap();
        answers(callers.pop().unwrap(), "HTTP/1.1 200").await;
        // The end of the first is all that the agent knows: a request would find room on the other one.
        drop(links.remove(0));
        answers(callers.pop().unwrap(), "HTTP/1.1 502").await;
        let caller = app.send(&get_of("/again")).await;
        let mut link = app.accept().await;
        say_204(link.asked("/again").await);
        answers(caller, "HTTP/1.1 204").await;
    });
}

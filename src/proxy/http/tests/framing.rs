//! Heads over the bounds, framing in doubt, names in doubt: what is refused before an app sees it.

use super::*;

#[test]
fn heads_over_the_bounds_are_refused() {
    run(async {
        let mut setup = setup().await;
        let long = format!("GET / HTTP/1.1\r\nhost: web\r\nx-a: {}\r\n\r\n", "a".repeat(61 * 1024));
        let many = format!("GET / HTTP/1.1\r\nhost: web\r\n{}\r\n", "x-a: b\r\n".repeat(101));
        for request in [long, many] {
            let answer = raw(setup.port, request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
            assert!(setup.messages.try_recv().is_err());
        }
        let most = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{}\r\n", "x-a: b\r\n".repeat(98));
        assert_eq!(raw(setup.port, most.as_bytes()).await.split("x-a=b").count(), 99);
    });
}

#[test]
fn requests_whose_length_is_in_doubt_never_reach_the_app() {
    run(async {
        let mut setup = setup().await;
        for bad in [
            "content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
            "content-length: 5, 6\r\n\r\nabcdef",
            "content-length: 5\r\ncontent-length: 5\r\n\r\nabcde",
            "content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
            "content-length: +5\r\n\r\nabcde",
            "transfer-encoding: gzip\r\n\r\n",
            "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "transfer-encoding: identity\r\ncontent-length: 5\r\n\r\nabcde",
            "transfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
            "x-a: b\r\n c\r\ncontent-length: 0\r\n\r\n",
            "x-a : b\r\n\r\n",
            "x-a: b\0\r\n\r\n",
            "x-a: b\n\r\n",
            "x-a: b\rc\r\n\r\n",
            "x-a: b\r\n\n",
            " x-a: b\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n5\nabcde\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n5;a=\nb\r\nabcde\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n10000000000000000\r\n",
            "transfer-encoding: chunked\r\n\r\n0\r\nx-a: b\nx-c: d\r\n\r\n",
            "host: other\r\n\r\n",
            "host: web\r\n\r\n",
        ] {
            let answer = raw(setup.port, format!("POST / HTTP/1.1\r\nhost: web\r\n{bad}").as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 400"), "{bad:?}: {answer}");
            assert!(setup.messages.try_recv().is_err(), "{bad:?} reached the app");
        }
    });
}

#[test]
fn a_chunk_that_turns_out_bad_later_does_not_look_like_the_end() {
    run(async {
        let mut setup = setup().await;
        let mut stream = TcpStream::connect(setup.port).await.unwrap();
        let head = b"POST /echo HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
        stream.write_all(head).await.unwrap();
        assert_eq!(setup.messages.recv().await.unwrap(), "POST /echo");
        stream.write_all(b"zz\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(!answer.starts_with("HTTP/1.1 200") || !answer.ends_with("0\r\n\r\n"), "{answer}");
    });
}

#[test]
fn a_second_request_is_looked_at_like_the_first_and_what_is_refused_is_counted() {
    run(async {
        let mut setup = setup().await;
        let firsts = [
            "GET /first HTTP/1.1\r\nhost: web\r\n\r\n",
            "POST /first HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\nabc",
            "POST /first HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
            "GET /first HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        ];
        for first in firsts {
            let second = "POST /second HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
            let answer = raw(setup.port, format!("{first}{second}").as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("HTTP/1.1 400"), "{first}: {answer}");
            assert!(setup.messages.recv().await.unwrap().ends_with("/first"));
            assert!(setup.messages.try_recv().is_err(), "{first}: the second reached the app");
        }
        let text = setup.worker.metrics.render().unwrap();
        assert!(text.contains("weft_http_malformed_total{reason=\"two_framings\"} 4"), "{text}");
    });
}

#[test]
fn an_absolute_target_and_host_name_the_same_service_or_nobody_is_asked() {
    run(async {
        let mut setup = setup().await;
        for (target, host, status) in [("http://web/a", "web", 200), ("http://other/a", "web", 400)] {
            let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            let answer = raw(setup.port, request.as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert_eq!(setup.messages.try_recv().is_ok(), status == 200);
        }
    });
}

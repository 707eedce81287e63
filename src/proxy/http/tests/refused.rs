//! Apps over HTTP/2 that do not process a request: what is safe to send again, of any method, and what is not.

use super::floods::{GOAWAY, HEADERS, PREFACE, SETTINGS, frame};
use super::*;

/// What becomes of the first request.
#[derive(Debug, Clone, Copy)]
enum First {
    /// Its stream is reset with this reason.
    Reset(h2::Reason),
    /// It stands above the last stream that a GOAWAY of this reason names.
    LeftOut(h2::Reason),
}

/// An app that treats its first request so and answers the others with their body; tells of each that it answers.
async fn app_of(first: First) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, messages) = mpsc::channel(8);
    tokio::task::spawn_local(async move {
        if let First::LeftOut(reason) = first {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::task::spawn_local(leave_out(stream, reason));
        }
        let mut reset = match first {
            First::Reset(reason) => Some(reason),
            First::LeftOut(_) => None,
        };
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                if let Some(reason) = reset.take() {
                    respond.send_reset(reason);
                    continue;
                }
                let seen = seen.clone();
                tokio::task::spawn_local(async move {
                    let (mut body, mut bytes) = (request.into_body(), Vec::new());
                    while let Some(chunk) = body.data().await {
                        bytes.extend_from_slice(&chunk.unwrap());
                    }
                    seen.try_send(String::from_utf8(bytes.clone()).unwrap()).unwrap();
                    respond.send_response(Response::new(()), false).unwrap().send_data(bytes.into(), true).unwrap();
                });
            }
        }
    });
    (addr, messages)
}

/// Ends a connection, frame by frame, as it gets its first request: of that nothing was processed.
async fn leave_out(mut stream: TcpStream, reason: h2::Reason) {
    let mut preface = vec![0; PREFACE.len()];
    stream.read_exact(&mut preface).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; usize::try_from(length).unwrap()]).await.unwrap();
        if head[3] == HEADERS {
            break;
        }
    }
    let told = [0_u32.to_be_bytes(), u32::from(reason).to_be_bytes()].concat();
    stream.write_all(&frame(GOAWAY, 0, 0, &told)).await.unwrap();
    let _closed = stream.read_to_end(&mut Vec::new()).await;
}

#[test]
fn a_request_that_an_app_refuses_unread_is_sent_again_whatever_its_method() {
    run(async {
        use h2::Reason;
        for (first, is_again) in [
            (First::Reset(Reason::REFUSED_STREAM), true),
            (First::LeftOut(Reason::NO_ERROR), true),
            // Who knows what it has done.
            (First::Reset(Reason::INTERNAL_ERROR), false),
            (First::Reset(Reason::CANCEL), false),
            // The request may be why.
            (First::LeftOut(Reason::PROTOCOL_ERROR), false),
        ] {
            let worker = Loopback::new(Limits::default());
            let (addr, mut messages) = app_of(first).await;
            worker.add(addr, Protocol::Http2).await;
            let port = worker.listen(false).await;
            let post = "POST /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbody";
            let answer = raw(port, post.as_bytes()).await;
            if is_again {
                assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("body"), "{first:?}: {answer}");
                assert_eq!(messages.try_recv().as_deref(), Ok("body"), "{first:?}");
            } else {
                assert!(answer.starts_with("HTTP/1.1 502"), "{first:?}: {answer}");
            }
            assert!(messages.try_recv().is_err(), "{first:?}: it was sent too often");
        }
    });
}

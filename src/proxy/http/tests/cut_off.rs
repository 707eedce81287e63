//! Responses that an app does not end, or ends twice.

use super::*;

/// Starts an app that answers one request with `bytes`, and breaks off when told.
async fn cut_off(bytes: &'static str) -> (SocketAddr, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (cut, told) = oneshot::channel();
    tokio::task::spawn_local(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(bytes.as_bytes()).await.unwrap();
        told.await.unwrap();
    });
    (addr, cut)
}

const CUT_OFF: [&str; 3] = [
    "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n64\r\nbegun",
];

#[test]
fn a_response_that_the_app_cuts_off_is_not_ended_as_if_it_were_whole() {
    run(async {
        for bytes in CUT_OFF {
            let worker = Loopback::new(Limits::default());
            let (addr, cut) = cut_off(bytes).await;
            worker.add(addr, Protocol::Http).await;
            let mut client = client(worker.listen(false).await).await;
            let response = client.send_request(get("/")).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let mut body = response.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "begun");
            cut.send(()).unwrap();
            assert!(body.frame().await.unwrap().is_err(), "{bytes:?}");
        }
    });
}

#[test]
fn a_response_that_is_cut_off_at_its_head_is_no_success() {
    run(async {
        for bytes in CUT_OFF.into_iter().chain(["", "HTTP/1.1 200 OK\r\ncontent-"]) {
            let worker = Loopback::new(Limits::default());
            let (addr, cut) = cut_off(bytes).await;
            worker.add(addr, Protocol::Http).await;
            let port = worker.listen(false).await;
            cut.send(()).unwrap();
            let mut client = client(port).await;
            let response = client.send_request(get("/")).await.unwrap();
            let status = response.status();
            // What weft had read of the response when it broke decides between an error answer and a broken one.
            let whole = response.into_body().collect().await.is_ok();
            assert!(
                status == StatusCode::BAD_GATEWAY && whole || status == StatusCode::OK && !whole,
                "{bytes:?}: {status}"
            );
        }
    });
}

#[test]
fn a_response_with_two_lengths_goes_by_its_chunks() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let both = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n0\r\n\r\n";
        let (addr, _cut) = cut_off(both).await;
        worker.add(addr, Protocol::Http).await;
        let mut client = client(worker.listen(false).await).await;
        let response = client.send_request(get("/")).await.unwrap();
        assert_eq!(body_text(response).await, "begun");
    });
}

//! Bodies of any length: who is slower sets the pace, and what is on its way meanwhile is bounded.

use super::*;

/// What the body says that it will have.
const GIB: usize = 1 << 30;
/// What sockets, windows and buffers on the whole way hold at most: both TCP connections' buffers are the largest part.
const HELD_BYTES_MAX: usize = 64 << 20;
/// What is passed in all: well above that.
const PASSED_BYTES: usize = 80 << 20;
const PIECE_BYTES: usize = 64 << 10;
/// Bytes repeat after so many: no power of two, so that a piece that is lost or comes twice is seen.
const ROUND: usize = 251;
/// A writer that is not let go on for so long stands still.
const STILL: Duration = Duration::from_millis(300);

fn pattern() -> Vec<u8> {
    (0..ROUND + PIECE_BYTES).map(|at| (at % ROUND).to_le_bytes()[0]).collect()
}

/// Writes from byte `at` on until nobody takes any more; returns where that is.
async fn fill(stream: &mut TcpStream, mut at: usize) -> usize {
    let pattern = pattern();
    while let Ok(count) = tokio::time::timeout(STILL, stream.write(&pattern[at % ROUND..])).await {
        at += count.unwrap();
        assert!(at < HELD_BYTES_MAX, "nobody reads, and {at} bytes were taken");
    }
    at
}

/// Writes from byte `at` up to [`PASSED_BYTES`] while the other side reads all of them.
async fn pass((from, at): (&mut TcpStream, usize), to: &mut TcpStream) {
    let pattern = pattern();
    let writing = async {
        let mut at = at;
        while at < PASSED_BYTES {
            let piece = &pattern[at % ROUND..];
            let piece = &piece[..piece.len().min(PASSED_BYTES - at)];
            at += from.write(piece).await.unwrap();
        }
    };
    let reading = async {
        let (mut piece, mut at) = (vec![0; PIECE_BYTES], 0);
        while at < PASSED_BYTES {
            let count = to.read(&mut piece).await.unwrap();
            assert!(count > 0, "it ends after {at} bytes");
            assert!(piece[..count] == pattern[at % ROUND..][..count], "other bytes at {at}");
            at += count;
        }
    };
    tokio::join!(writing, reading);
}

/// Reads up to the end of a head, and no byte more.
async fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn an_app_whose_answer_nobody_reads_is_stopped_and_goes_on_when_somebody_does() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
        let mut caller = TcpStream::connect(worker.listen(false).await).await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        let (mut app, _) = listener.accept().await.unwrap();
        head(&mut app).await;
        app.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {GIB}\r\n\r\n").as_bytes()).await.unwrap();
        let at = fill(&mut app, 0).await;
        assert!(head(&mut caller).await.contains(&format!("content-length: {GIB}")));
        pass((&mut app, at), &mut caller).await;
    });
}

#[test]
fn a_caller_whose_upload_nobody_reads_is_stopped_and_goes_on_when_somebody_does() {
    run(async {
        let worker = Loopback::new(Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        worker.add(listener.local_addr().unwrap(), Protocol::Http).await;
        let mut caller = TcpStream::connect(worker.listen(false).await).await.unwrap();
        let post = format!("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {GIB}\r\n\r\n");
        caller.write_all(post.as_bytes()).await.unwrap();
        let (mut app, _) = listener.accept().await.unwrap();
        head(&mut app).await;
        let at = fill(&mut caller, 0).await;
        pass((&mut caller, at), &mut app).await;
    });
}

//! What a caller's connection holds while nothing is under way.

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

/// A connection whose one request is answered.
async fn answered(port: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let mut answer = [0; 4096];
    let count = stream.read(&mut answer).await.unwrap();
    assert!(answer[..count].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..count]));
    stream
}

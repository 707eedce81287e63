//! The API port among clients that only hold it: idle connections, heads that come byte by byte, heads without an end. Others are
//! answered, and what never ends is refused. Figures: `tests/bench/crowd/run.sh`.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::agent::{Agent, Ca, Spec, path};

/// Connections that say nothing: as many as the usual limit of 20,000 open files allows beside the agent's; `tests/bench/crowd` has 10,000.
const IDLE: usize = 8_000;
/// Connections that begin a head and go on with a byte now and then.
const SLOW: usize = 300;
/// A head that no client of ours has: refused long before.
const HEAD_BYTES: usize = 8 << 20;

#[test]
fn idle_slow_and_flooding_clients_keep_nobody_out() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let needed = u64::try_from(IDLE + SLOW + 500).unwrap();
    if hard < needed {
        eprintln!("SKIPPED: needs {needed} open files, and the hard limit is {hard}");
        return;
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
    let ca = Ca::init("crowd.test");
    let agent = Agent::start(&Spec::loopback(226, "n1", &["-issuer", path(&ca.issuer())]));
    let connect = || TcpStream::connect(agent.api).unwrap();

    let _idle: Vec<TcpStream> = (0..IDLE).map(|_| connect()).collect();
    let slow: Vec<TcpStream> = (0..SLOW)
        .map(|_| {
            let mut stream = connect();
            stream.write_all(b"GET / HTTP/1.1\r\nX-Slow: ").unwrap();
            stream
        })
        .collect();
    for _ in 0..20 {
        slow.iter().for_each(|mut stream| stream.write_all(b"x").unwrap());
        assert_eq!(agent.try_get("/v1/agent/self").unwrap().status, 200, "beside {IDLE} idle and {SLOW} slow ones");
    }
    // A head with too many headers, or one that is too long, is answered. Who still sends may see the end before the answer.
    for (head, is_long) in
        [("a: b\r\n".repeat(120), false), ("X-Long: ".to_owned() + &"y".repeat(80 * 1024) + "\r\n", true)]
    {
        let mut stream = connect();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let sent = write!(stream, "GET / HTTP/1.1\r\nHost: localhost\r\n{head}\r\n");
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let is_cut = is_long && (sent.is_err() || ended.is_err());
        assert!(is_cut || answer.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{answer}");
    }
    // A head without an end is refused while it is sent; the agent keeps some of it at most.
    let line = format!("X-Flood: {}\r\n", "y".repeat(8000));
    for _ in 0..8 {
        let mut stream = connect();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        let refused = (0..HEAD_BYTES / line.len()).any(|_| stream.write_all(line.as_bytes()).is_err());
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(refused || answer.starts_with("HTTP/1.1 431"), "the whole head was taken: {answer}");
        assert_eq!(agent.try_get("/v1/agent/self").unwrap().status, 200, "beside a head without an end");
    }
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}

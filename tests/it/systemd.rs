//! What an agent tells systemd: a datagram socket stands for it.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path};

/// Longest wait for a word: a member that is killed fails within seconds.
const LONGEST: Duration = Duration::from_mins(1);

/// Reads until a message has the line `want`; returns the lines that came before it, and those of its message.
#[track_caller]
fn wait_line(socket: &UnixDatagram, want: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let read = socket.recv(&mut piece).unwrap_or_else(|error| panic!("`{want}` did not come ({error}): {seen:?}"));
        let message = String::from_utf8_lossy(&piece[..read]).into_owned();
        seen.extend(message.lines().map(str::to_owned));
        if message.lines().any(|line| line == want) {
            return seen;
        }
    }
}

#[test]
fn systemd_sees_a_newcomer_wait_join_stand_alone_and_drain() {
    let (ca, dir) = (Ca::init("systemd.test"), TempDir::new().unwrap());
    let (seed, at) = (loopback_ip(234).to_string(), dir.path().join("notify"));
    let socket = UnixDatagram::bind(&at).unwrap();
    socket.set_read_timeout(Some(LONGEST)).unwrap();
    let token = dir.path().join("token");
    fs::write(&token, ca.token("n2", "*", "1h")).unwrap();
    let args = ["-join", &seed, "-token-file", path(&token)];
    let mut newcomer = Spec::loopback(235, "n2", &args);
    newcomer.wrap = vec!["env".to_owned(), format!("NOTIFY_SOCKET={}", path(&at))];
    let mut n2 = Agent::spawn(&newcomer, TempDir::new().unwrap());
    let first = wait_line(&socket, &format!("STATUS=waiting for a certificate: joining {seed}"));
    assert_eq!(first.len(), 1, "{first:?}");

    let issuer = ca.issuer();
    let n1 = Agent::start(&Spec::loopback(234, "n1", &["-issuer", path(&issuer)]));
    let up = wait_line(&socket, "READY=1");
    let both = "STATUS=2 members alive";
    // It may be the state at once.
    if !up.iter().any(|line| line == both) {
        wait_line(&socket, both);
    }
    drop(n1.kill());
    let since = wait_line(&socket, "STATUS=isolated: nobody else answers, 1 failed");
    assert!(since.len() < 10, "changes alone are told: {since:?}");

    n2.signal(Signal::SIGTERM);
    wait_line(&socket, "STOPPING=1");
    assert!(n2.wait_exit().0.success());
}

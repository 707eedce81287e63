//! `/v1/agent/monitor` over HTTP: lines while they are written, at the level that is asked for, to so many clients at once, and
//! no longer than a client listens.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, path};
use crate::wait::until;

/// Most monitors of one agent.
const MONITORS: usize = 16;

/// A client that reads the log.
struct Listener(BufReader<TcpStream>);

impl Listener {
    /// Asks; returns the answer's status line too, once its head is there.
    fn ask(agent: &Agent, query: &str) -> (String, Self) {
        let stream = TcpStream::connect(agent.api).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(&stream, "GET /v1/agent/monitor?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut listener = Self(BufReader::new(stream));
        let status = listener.line();
        while !listener.line().is_empty() {}
        (status, listener)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads to the end of the answer.
    fn rest(&mut self) -> String {
        let mut text = String::new();
        self.0.read_to_string(&mut text).unwrap();
        text
    }

    /// Reads until a line has `part`; returns it and all before it.
    fn read_to(&mut self, part: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while !seen.last().is_some_and(|line: &String| line.contains(part)) {
            // Each line is a chunk (RFC 9112 §7.1), with its size before it.
            seen.push(self.line());
        }
        seen
    }
}

#[test]
fn a_monitor_hears_lines_as_they_come_at_its_level_and_its_place_is_free_once_it_goes() {
    let ca = Ca::init("monitor.test");
    let files = TempDir::new().unwrap();
    let (issuer, dir) = (ca.issuer(), path(files.path()).to_owned());
    // The agent's own log is off: a monitor has a level of its own.
    let args = ["-issuer", path(&issuer), "-config-dir", &dir, "-log-level", "off"];
    let agent = Agent::start(&Spec::loopback(232, "n1", &args));
    let open = |query: &str| {
        let (status, listener) = Listener::ask(&agent, query);
        assert_eq!(status, "HTTP/1.1 200 OK");
        listener
    };
    let (mut info, mut warn, mut debug) = (open(""), open("loglevel=WARN"), open("loglevel=debug"));
    // A head that breaks off is a DEBUG, what a reload cannot take a WARN, the reload an INFO.
    TcpStream::connect(agent.api).unwrap().write_all(b"GET / HT").unwrap();
    assert!(debug.read_to("ended early").iter().any(|line| line.contains(" DEBUG ")));
    fs::write(files.path().join("a.hcl"), "datacenter = \"dc2\"\n").unwrap();
    agent.put_ok("/v1/agent/reload", "");
    let lines = info.read_to("configuration is reloaded");
    assert!(lines.iter().any(|line| line.contains(" INFO ")) && lines.iter().any(|line| line.contains(" WARN ")));
    assert!(!lines.iter().any(|line| line.contains(" DEBUG ")), "{lines:?}");
    let lines = warn.read_to("takes a restart");
    assert!(lines.iter().filter(|line| !line.is_empty()).all(|line| !line.contains(" INFO ")), "{lines:?}");

    // One JSON object a line, as a collector wants it; the command line reads it, too.
    let mut json = open("logjson=true");
    agent.put_ok("/v1/agent/reload", "");
    let lines = json.read_to("configuration is reloaded");
    let line: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!((&line["level"], &line["fields"]["message"]), (&"INFO".into(), &"configuration is reloaded".into()));

    // All places are taken: the next client is told, with a status of its own.
    let held: Vec<Listener> = (3..MONITORS).map(|_| open("")).collect();
    let (status, mut refused) = Listener::ask(&agent, "");
    assert_eq!(status, "HTTP/1.1 429 Too Many Requests");
    assert!(refused.rest().contains("16 monitors read the log already"));
    // Whoever goes away gives up the place, though no line is written meanwhile.
    drop(held);
    until("places are free again", || {
        let (status, _listener) = Listener::ask(&agent, "");
        if status.contains(" 200 ") { Ok(()) } else { Err(status) }
    });
    for query in ["loglevel=loud", "ns=a"] {
        assert_eq!(agent.try_get(&format!("/v1/agent/monitor?{query}")).unwrap().status, 400, "{query}");
    }
    // It ends with the agent.
    agent.put_ok("/v1/agent/leave", "");
    info.rest();
}

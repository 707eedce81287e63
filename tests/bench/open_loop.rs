//! A constant-rate HTTP/1.1 load: how long requests take when they come at their own times, whatever the server does.
//!
//! ```text
//!   open_loop HOST:PORT PATH CONNECTIONS RATE SECONDS     (needs std alone: rustc -O --edition 2024 open_loop.rs)
//!
//!   connection k is due at start + (k + n * CONNECTIONS) / RATE for its request n
//!   every TICK:  read what has come  ->  send what is due on connections that are free
//! ```
//!
//! A closed loop asks again only when it was answered, so a server that stalls is asked less just then and its worst times
//! are never seen (coordinated omission). Here a request that is due while its connection still waits for the last
//! response goes out late, and its time counts from when it was due. A request whose connection was free counts from when
//! it was sent: what this program overslept is no fault of the server's.
//!
//! One thread, so that the load generator takes little of the cores that the proxies need; times are therefore told to
//! about a quarter of a millisecond (the tick and the kernel's timer slack). Prints one JSON object; times in microseconds.
//! The first fifth of the run, one second at most, warms up and does not count.

#![allow(
    clippy::disallowed_methods,
    reason = "a load generator reads the clock; it shares nothing with the library but the folder"
)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// A response that takes longer is an error; it counts with this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two looks at the connections.
const TICK: Duration = Duration::from_micros(150);
/// Longest response head.
const HEAD_BYTES_MAX: usize = 16 << 10;

const USAGE: &str = "usage: open_loop HOST:PORT PATH CONNECTIONS RATE SECONDS";

/// What to ask for, and how often.
#[derive(Debug)]
struct Load {
    addr: String,
    request: Vec<u8>,
    connections: u32,
    /// Requests per second of all connections together.
    rate: f64,
    lasts: Duration,
}

impl Load {
    /// Time at the start that does not count.
    fn warm_up(&self) -> Duration {
        (self.lasts / 5).min(Duration::from_secs(1))
    }

    /// When request `turn` of connection `number` is due, after the start.
    fn due(&self, number: u32, turn: u32) -> Duration {
        let place = f64::from(turn) * f64::from(self.connections) + f64::from(number);
        Duration::from_secs_f64(place / self.rate)
    }
}

/// What was met.
#[derive(Debug, Default)]
struct Seen {
    /// Times of the requests that count, in microseconds.
    micros: Vec<u64>,
    /// Body bytes of the same.
    body_bytes: u64,
    errors: u64,
    /// Requests that went out late because the last response was not there.
    late: u64,
}

fn main() -> ExitCode {
    let Some(load) = parse(std::env::args().skip(1).collect()) else {
        eprintln!("{USAGE}");
        return ExitCode::FAILURE;
    };
    println!("{}", report(&load, &mut run(&load)));
    ExitCode::SUCCESS
}

fn parse(args: Vec<String>) -> Option<Load> {
    let [addr, path, connections, rate, seconds] = <[String; 5]>::try_from(args).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: b.mesh.test\r\n\r\n").into_bytes();
    let rate: f64 = rate.parse().ok().filter(|rate| *rate > 0.0)?;
    let connections = connections.parse().ok().filter(|connections| (1..=4_096).contains(connections))?;
    Some(Load { addr, request, connections, rate, lasts: Duration::try_from_secs_f64(seconds.parse().ok()?).ok()? })
}

fn report(load: &Load, all: &mut Seen) -> String {
    all.micros.sort_unstable();
    let counted_secs = load.lasts.saturating_sub(load.warm_up()).as_secs_f64();
    let at = |thousandth: usize| {
        let rank = (all.micros.len() * thousandth).div_ceil(1_000).saturating_sub(1);
        all.micros.get(rank).copied().unwrap_or_default()
    };
    let count = u32::try_from(all.micros.len()).unwrap_or(u32::MAX);
    let kilobits = u32::try_from(all.body_bytes / 125).unwrap_or(u32::MAX);
    format!(
        "{{\"rate\": {:.1}, \"reqs\": {count}, \"rps\": {:.1}, \"body_mbit_s\": {:.2}, \"p50_us\": {}, \"p90_us\": {}, \
         \"p99_us\": {}, \"p999_us\": {}, \"max_us\": {}, \"errors\": {}, \"late\": {}}}",
        load.rate,
        f64::from(count) / counted_secs,
        f64::from(kilobits) / 1_000.0 / counted_secs,
        at(500),
        at(900),
        at(990),
        at(999),
        at(1_000),
        all.errors,
        all.late,
    )
}

/// Sends the requests at their times until the last is answered.
fn run(load: &Load) -> Seen {
    let mut seen = Seen::default();
    let mut connections: Vec<_> = (0..load.connections).map(|number| Connection::open(load, number)).collect();
    let start = Instant::now();
    while connections.iter().any(|connection| connection.is_open(load)) {
        for connection in &mut connections {
            connection.turn(load, start, &mut seen);
        }
        thread::sleep(TICK);
    }
    seen
}

/// What is awaited on a connection.
#[derive(Debug, Clone, Copy)]
enum Awaited {
    /// So many bytes of a head have come.
    Head { held: usize },
    /// So many bytes of the body are missing.
    Body { missing: usize, all: usize },
}

/// A request that is on its way.
#[derive(Debug)]
struct Asked {
    /// Its time counts from here.
    from: Instant,
    sent: Instant,
    counts: bool,
    awaited: Awaited,
}

/// One connection; it is opened again after an error.
struct Connection {
    number: u32,
    /// The next request's.
    turn: u32,
    stream: Option<TcpStream>,
    asked: Option<Asked>,
    /// When the last response was whole, after the start.
    free_since: Duration,
    buffer: Vec<u8>,
}

impl Connection {
    /// A failure is met, and counted, by the first request.
    fn open(load: &Load, number: u32) -> Self {
        let stream = connect(load).ok();
        let (free_since, buffer) = (Duration::ZERO, vec![0; HEAD_BYTES_MAX]);
        Self { number, turn: 0, stream, asked: None, free_since, buffer }
    }

    /// Tells whether there is anything left to do.
    fn is_open(&self, load: &Load) -> bool {
        self.asked.is_some() || load.due(self.number, self.turn) < load.lasts
    }

    /// Reads what has come, sends what is due.
    fn turn(&mut self, load: &Load, start: Instant, seen: &mut Seen) {
        if let Some(asked) = self.asked.take() {
            self.go_on(asked, start, seen);
        }
        let due = load.due(self.number, self.turn);
        let now = start.elapsed();
        if self.asked.is_some() || now < due || due >= load.lasts {
            return;
        }
        self.turn += 1;
        let counts = due >= load.warm_up();
        let is_late = self.free_since > due;
        seen.late += u64::from(is_late && counts);
        let sent = start + now;
        let from = if is_late { start + due } else { sent };
        let asked = Asked { from, sent, counts, awaited: Awaited::Head { held: 0 } };
        match self.send(load) {
            Ok(()) => self.asked = Some(asked),
            Err(_refused) => self.failed(&asked, start, seen),
        }
    }

    fn send(&mut self, load: &Load) -> io::Result<()> {
        if self.stream.is_none() {
            self.stream = Some(connect(load)?);
        }
        let stream = self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        stream.write_all(&load.request)
    }

    /// Reads on; the request is done, fails, or waits again.
    fn go_on(&mut self, mut asked: Asked, start: Instant, seen: &mut Seen) {
        match self.read(&mut asked.awaited) {
            Ok(body_bytes) => {
                self.free_since = start.elapsed();
                if asked.counts {
                    seen.body_bytes += body_bytes;
                    seen.micros.push(micros(asked.from.elapsed()));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && asked.sent.elapsed() < PATIENCE => {
                self.asked = Some(asked);
            }
            Err(_lost_or_late) => self.failed(&asked, start, seen),
        }
    }

    fn failed(&mut self, asked: &Asked, start: Instant, seen: &mut Seen) {
        self.stream = None;
        self.free_since = start.elapsed();
        if asked.counts {
            seen.errors += 1;
            seen.micros.push(micros(asked.from.elapsed().max(PATIENCE)));
        }
    }

    /// Reads until the response is whole; returns the length of its body.
    fn read(&mut self, awaited: &mut Awaited) -> io::Result<u64> {
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let stream = self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        loop {
            let (used, room) = match *awaited {
                Awaited::Head { held } => (held, self.buffer.len()),
                Awaited::Body { missing: 0, all } => return u64::try_from(all).map_err(|_| malformed()),
                Awaited::Body { missing, .. } => (0, missing.min(self.buffer.len())),
            };
            let free = self.buffer.get_mut(used..room).filter(|free| !free.is_empty()).ok_or_else(malformed)?;
            let bytes = stream.read(free)?;
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            *awaited = match *awaited {
                Awaited::Body { missing, all } => Awaited::Body { missing: missing - bytes, all },
                Awaited::Head { .. } => {
                    let held = used + bytes;
                    let read = self.buffer.get(..held).ok_or_else(malformed)?;
                    match read.windows(4).position(|four| four == b"\r\n\r\n") {
                        None => Awaited::Head { held },
                        Some(end) => {
                            let all = read.get(..end).and_then(body_length).ok_or_else(malformed)?;
                            Awaited::Body { missing: all.saturating_sub(held - end - 4), all }
                        }
                    }
                }
            };
        }
    }
}

fn connect(load: &Load) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(&load.addr)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Returns the length of a 200 response's body; none for any other response, or one without `content-length`.
fn body_length(head: &[u8]) -> Option<usize> {
    let head = std::str::from_utf8(head).ok()?;
    let (status, headers) = head.split_once("\r\n")?;
    if status.split(' ').nth(1) != Some("200") {
        return None;
    }
    let length = |line: &str| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    };
    headers.lines().find_map(length)
}

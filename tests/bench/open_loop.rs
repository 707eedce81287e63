//! A constant-rate HTTP/1.1 load: how long requests take when they come at their own times, whatever the server does.
//!
//! ```text
//!   open_loop HOST:PORT PATH CONNECTIONS RATE SECONDS     (needs std alone: rustc -O --edition 2024 open_loop.rs)
//!
//!   connection k:  due at start + (k + n * CONNECTIONS) / RATE  ->  write, read the whole response  ->  n + 1
//! ```
//!
//! A closed loop asks again only when it was answered, so a server that stalls is asked less just then and its worst times
//! are never seen (coordinated omission). Here a request that is due while its connection still waits for the last
//! response goes out late, and its time counts from when it was due. A request whose connection was idle counts from when
//! it was sent: what the sleeping thread overslept is this program's fault. Prints one JSON object; times in microseconds.
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
/// Threads only write, read and sleep.
const STACK_BYTES: usize = 128 << 10;
/// Longest response head.
const HEAD_BYTES_MAX: usize = 64 << 10;

const USAGE: &str = "usage: open_loop HOST:PORT PATH CONNECTIONS RATE SECONDS";

/// What to ask for, and how often.
#[derive(Debug, Clone)]
struct Load {
    addr: String,
    request: Vec<u8>,
    connections: u32,
    /// Requests per second of all connections together.
    rate: f64,
    lasts: Duration,
}

/// What one connection met.
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
    // All threads are there before the first request is due.
    let start = Instant::now() + Duration::from_millis(200);
    let threads: Vec<_> = (0..load.connections)
        .filter_map(|number| {
            let load = load.clone();
            let run = move || Connection::new(&load).run(number, start);
            thread::Builder::new().stack_size(STACK_BYTES).spawn(run).ok()
        })
        .collect();
    let mut all = Seen::default();
    for thread in threads {
        let Ok(seen) = thread.join() else { return ExitCode::FAILURE };
        all.micros.extend(seen.micros);
        all.body_bytes += seen.body_bytes;
        all.errors += seen.errors;
        all.late += seen.late;
    }
    println!("{}", report(&load, &mut all));
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
    let counted_secs = load.lasts.saturating_sub(warm_up(load.lasts)).as_secs_f64();
    let at = |percent: usize| {
        let rank = (all.micros.len() * percent).div_ceil(1_000).saturating_sub(1);
        all.micros.get(rank).copied().unwrap_or_default()
    };
    let count = u32::try_from(all.micros.len()).unwrap_or(u32::MAX);
    let megabits = u32::try_from(all.body_bytes / 125_000).unwrap_or(u32::MAX);
    format!(
        "{{\"rate\": {:.1}, \"reqs\": {count}, \"rps\": {:.1}, \"body_mbit_s\": {:.2}, \"p50_us\": {}, \"p90_us\": {}, \
         \"p99_us\": {}, \"p999_us\": {}, \"max_us\": {}, \"errors\": {}, \"late\": {}}}",
        load.rate,
        f64::from(count) / counted_secs,
        f64::from(megabits) / counted_secs,
        at(500),
        at(900),
        at(990),
        at(999),
        at(1_000),
        all.errors,
        all.late,
    )
}

/// Time at the start that does not count.
fn warm_up(lasts: Duration) -> Duration {
    (lasts / 5).min(Duration::from_secs(1))
}

/// One connection; it is opened again after an error.
struct Connection<'a> {
    load: &'a Load,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(load: &'a Load) -> Self {
        Self { load, stream: None, buffer: vec![0; HEAD_BYTES_MAX] }
    }

    /// Sends the requests of connection `number` at their times.
    fn run(mut self, number: u32, start: Instant) -> Seen {
        let mut seen = Seen::default();
        let (counts_from, end) = (start + warm_up(self.load.lasts), start + self.load.lasts);
        // Connected ahead of time; a failure is met, and counted, by the first request.
        self.stream = self.connect().ok();
        for turn in 0_u32.. {
            let place = f64::from(turn) * f64::from(self.load.connections) + f64::from(number);
            let due = start + Duration::from_secs_f64(place / self.load.rate);
            if due >= end {
                break;
            }
            let early = due.saturating_duration_since(Instant::now());
            let from = if early.is_zero() {
                seen.late += u64::from(due >= counts_from && turn > 0);
                due
            } else {
                thread::sleep(early);
                Instant::now()
            };
            let answered = self.exchange();
            let took = from.elapsed();
            if due < counts_from {
                continue;
            }
            match answered {
                Ok(body_bytes) => {
                    seen.body_bytes += body_bytes;
                    seen.micros.push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
                }
                Err(_refused_or_lost) => {
                    seen.errors += 1;
                    seen.micros.push(u64::try_from(took.max(PATIENCE).as_micros()).unwrap_or(u64::MAX));
                }
            }
        }
        seen
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(&self.load.addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Sends one request and reads its response; returns the length of the body. An error closes the connection.
    fn exchange(&mut self) -> io::Result<u64> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        stream.write_all(&self.load.request)?;
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let mut held = 0;
        let (head_bytes, body_bytes) = loop {
            let free = self.buffer.get_mut(held..).filter(|free| !free.is_empty()).ok_or_else(malformed)?;
            let bytes = stream.read(free)?;
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            held += bytes;
            let read = self.buffer.get(..held).ok_or_else(malformed)?;
            if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = read.get(..end).ok_or_else(malformed)?;
                break (end + 4, body_length(head).ok_or_else(malformed)?);
            }
        };
        let mut missing = body_bytes.saturating_sub(held - head_bytes);
        while missing > 0 {
            let part = missing.min(self.buffer.len());
            let bytes = stream.read(self.buffer.get_mut(..part).ok_or_else(malformed)?)?;
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            missing -= bytes;
        }
        self.stream = Some(stream);
        u64::try_from(body_bytes).map_err(|_| malformed())
    }
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

//! Bodies of any length through two real agents: streamed, in memory that does not grow with them.

use std::fs;
use std::io::{self, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::agent::{Agent, loopback_ip};
use crate::edges::Pair;

/// The app's port at the second agent.
const BULK: u16 = 7810;
/// What an agent may take more while a body passes: windows, buffers and what the allocator keeps of them.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
static PIECE: [u8; 64 << 10] = [b'x'; 64 << 10];
/// Nothing moves for so long: something is wrong.
const STALLED: Duration = Duration::from_secs(20);

#[test]
fn a_long_body_passes_each_way_in_bounded_memory() {
    pass_both_ways(240, 256 << 20);
}

/// By hand: `cargo test --test it a_gibibyte -- --ignored --nocapture`, which prints how much each agent grew.
#[test]
#[ignore = "2 GiB through a development build take a minute: for a run by name"]
fn a_gibibyte_passes_each_way_in_bounded_memory() {
    pass_both_ways(242, 1 << 30);
}

#[track_caller]
fn pass_both_ways(last: u8, bytes: u64) {
    let listener = TcpListener::bind(SocketAddr::new(loopback_ip(last + 1), BULK)).unwrap();
    // It ends with the test's process.
    std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(serve(stream, bytes))));
    let pair = Pair::start(last, &[("bulk", BULK, "http")]);
    for (way, pass) in [("down", down as fn(SocketAddr, u64) -> u64), ("up", up)] {
        let agents = [&pair.first, &pair.second];
        let before = agents.map(|agent| {
            // The peak counts from here on (proc(5)).
            fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
            resident(agent, "VmRSS:")
        });
        assert_eq!(pass(pair.at(BULK), bytes), bytes, "{way}");
        for (agent, before) in agents.into_iter().zip(before) {
            let grown = resident(agent, "VmHWM:").saturating_sub(before);
            println!(
                "{bytes} bytes {way}: {} grew by {} KiB at most, from {} KiB",
                agent.name,
                grown >> 10,
                before >> 10
            );
            assert!(grown < GROWTH_BYTES_MAX, "{} grew by {grown} bytes as {bytes} went {way}", agent.name);
        }
    }
}

/// A line of /proc/PID/status, in bytes.
pub(crate) fn resident(agent: &Agent, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Answers one request of a connection: GET with that many bytes, POST with how many came.
fn serve(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let head = head(&mut reader)?;
    if head.starts_with("GET") {
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\nconnection: close\r\n\r\n")?;
        return send(&mut stream, bytes);
    }
    let came = io::copy(&mut reader.take(bytes), &mut io::sink())?.to_string();
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{came}", came.len())
}

fn head(reader: &mut impl io::BufRead) -> io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
    Ok(head)
}

fn send(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let piece = usize::try_from(left).unwrap_or(PIECE.len()).min(PIECE.len());
        stream.write_all(&PIECE[..piece])?;
        left -= piece as u64;
    }
    Ok(())
}

fn connect(at: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(STALLED)).unwrap();
    stream.set_write_timeout(Some(STALLED)).unwrap();
    stream
}

/// Reads a body; returns how long it was.
fn down(at: SocketAddr, _: u64) -> u64 {
    let mut stream = connect(at);
    stream.write_all(b"GET / HTTP/1.1\r\nhost: bulk\r\nconnection: close\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let head = head(&mut reader).unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    io::copy(&mut reader, &mut io::sink()).unwrap()
}

/// Sends a body; returns how much of it came.
fn up(at: SocketAddr, bytes: u64) -> u64 {
    let mut stream = connect(at);
    write!(stream, "POST / HTTP/1.1\r\nhost: bulk\r\nconnection: close\r\ncontent-length: {bytes}\r\n\r\n").unwrap();
    send(&mut stream, bytes).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer.rsplit("\r\n\r\n").next().unwrap().parse().unwrap()
}

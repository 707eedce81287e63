//! Small apps that tests put behind the mesh: they answer with their name and what they saw.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::runtime::Runtime;

use crate::lab::Host;

/// A running app; stops when dropped: its listener closes, open connections are cut.
pub(crate) struct App {
    /// Where it listens.
    pub(crate) addr: SocketAddr,
    stop: Arc<AtomicBool>,
    host: Option<Host>,
    accepting: Option<JoinHandle<()>>,
}

impl App {
    /// Starts an HTTP app that answers every request with `<name> <method> <path> <xfcc>` and keeps connections open.
    pub(crate) fn http(host: Option<&Host>, addr: SocketAddr, name: &str) -> Self {
        let name = name.to_owned();
        Self::start(host, addr, move |stream| answer_http(stream, &name, 200, Duration::ZERO))
    }

    /// Like [`App::http`], with another status, after a while.
    pub(crate) fn http_as(host: Option<&Host>, addr: SocketAddr, name: &str, status: u16, delay: Duration) -> Self {
        let name = name.to_owned();
        Self::start(host, addr, move |stream| answer_http(stream, &name, status, delay))
    }

    /// Starts an HTTP app that answers every request with the head that it was sent.
    pub(crate) fn heads(host: Option<&Host>, addr: SocketAddr) -> Self {
        Self::start(host, addr, |mut stream| {
            let Ok(reading) = stream.try_clone() else { return };
            let mut lines = BufReader::new(reading).lines();
            loop {
                // A head without a body each: it ends with an empty line.
                let head: Vec<String> =
                    lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
                let text = head.join("\n") + "\n";
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
                if head.is_empty() || stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        })
    }

    /// Starts an HTTP app that answers every request with 503 and counts them.
    pub(crate) fn broken(host: Option<&Host>, addr: SocketAddr) -> (Self, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&count);
        let app = Self::start(host, addr, move |mut stream| {
            let Ok(reading) = stream.try_clone() else { return };
            let mut lines = BufReader::new(reading).lines();
            // A head without a body each: it ends with an empty line.
            while lines.by_ref().map_while(Result::ok).any(|line| line.is_empty()) {
                counting.fetch_add(1, Ordering::SeqCst);
                if stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").is_err() {
                    return;
                }
            }
        });
        (app, count)
    }

    /// Starts an HTTP app that answers every request after `delay`, and counts those whose caller left before.
    pub(crate) fn slow(host: Option<&Host>, addr: SocketAddr, delay: Duration) -> (Self, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&count);
        let app = Self::start(host, addr, move |mut stream| {
            let Ok(reading) = stream.try_clone() else { return };
            let mut reader = BufReader::new(reading);
            // A head without a body each: it ends with an empty line.
            while reader.by_ref().lines().map_while(Result::ok).any(|line| line.is_empty()) {
                let _whole_seconds_are_taken = stream.set_read_timeout(Some(delay));
                if matches!(reader.fill_buf(), Ok(rest) if rest.is_empty()) {
                    counting.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                let _as_before = stream.set_read_timeout(None);
                if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow").is_err() {
                    return;
                }
            }
        });
        (app, count)
    }

    /// Starts a TCP app that speaks first (`hello from <name>\n`), then echoes until the peer's end, then says `bye\n`.
    pub(crate) fn tcp(host: Option<&Host>, addr: SocketAddr, name: &str) -> Self {
        let name = name.to_owned();
        Self::start(host, addr, move |stream| answer_tcp(stream, &name))
    }

    fn start(host: Option<&Host>, addr: SocketAddr, answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let bind = move || TcpListener::bind(addr).unwrap_or_else(|e| panic!("cannot bind {addr}: {e}"));
        let listener = match host {
            Some(host) => host.run(bind),
            None => bind(),
        };
        let addr = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let answer = Arc::new(answer);
        let stopping = Arc::clone(&stop);
        let accepting = std::thread::spawn(move || {
            // What is over is let go, or a long load takes every file that the test may open.
            let open: Arc<Mutex<HashMap<u64, TcpStream>>> = Arc::default();
            for (number, stream) in (0..).zip(listener.incoming()) {
                if stopping.load(Ordering::SeqCst) {
                    break;
                }
                let (stream, kept) = match stream.and_then(|stream| Ok((stream.try_clone()?, stream))) {
                    Ok(both) => both,
                    Err(e) => {
                        eprintln!("the app at {addr} takes no more connections: {e}");
                        break;
                    }
                };
                open.lock().unwrap().insert(number, kept);
                let (answer, open) = (Arc::clone(&answer), Arc::clone(&open));
                std::thread::spawn(move || {
                    answer(stream);
                    if let Some(ending) = open.lock().unwrap().remove(&number) {
                        let _already_closed = ending.shutdown(Shutdown::Both);
                    }
                });
            }
            for stream in open.lock().unwrap().values() {
                let _already_closed = stream.shutdown(Shutdown::Both);
            }
        });
        Self { addr, stop, host: host.cloned(), accepting: Some(accepting) }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let addr = self.addr;
        let wake = move || drop(TcpStream::connect(addr));
        match &self.host {
            Some(host) => host.run(wake),
            None => wake(),
        }
        if let Some(accepting) = self.accepting.take() {
            let _panicked = accepting.join();
        }
    }
}

/// An app that takes HTTP/1.1 and HTTP/2 on one port, and answers every request with its name; stops when dropped.
pub(crate) struct Either {
    runtime: Option<Runtime>,
}

impl Either {
    pub(crate) fn start(host: &Host, addr: SocketAddr, name: &'static str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = host.run(|| TcpListener::bind(addr)).unwrap_or_else(|e| panic!("cannot bind {addr}: {e}"));
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let answer = |_: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(name.to_owned())) };
            while let Ok((stream, _)) = listener.accept().await {
                let server = auto::Builder::new(TokioExecutor::new());
                tokio::spawn(async move {
                    let _ended_by_the_caller = server.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
                });
            }
        });
        Self { runtime: Some(runtime) }
    }
}

impl Drop for Either {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A path that begins with `/hang` takes three seconds more.
fn answer_http(stream: TcpStream, name: &str, status: u16, delay: Duration) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let (mut length, mut xfcc) = (0usize, String::new());
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap_or(0) == 0 {
                return;
            }
            let header = header.trim();
            if header.is_empty() {
                break;
            }
            if let Some((key, value)) = header.split_once(':') {
                match key.to_ascii_lowercase().as_str() {
                    "content-length" => length = value.trim().parse().unwrap_or(0),
                    "x-forwarded-client-cert" => xfcc = value.trim().to_owned(),
                    _ => {}
                }
            }
        }
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let text = format!("{name} {method} {path} {xfcc} {}", String::from_utf8_lossy(&body));
        let answer =
            format!("HTTP/1.1 {status} OK\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n{text}", text.len());
        std::thread::sleep(if path.starts_with("/hang") { delay + Duration::from_secs(3) } else { delay });
        if writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn answer_tcp(mut stream: TcpStream, name: &str) {
    if stream.write_all(format!("hello from {name}\n").as_bytes()).is_err() {
        return;
    }
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(bytes) if stream.write_all(&buffer[..bytes]).is_err() => return,
            Ok(_) => {}
        }
    }
    let _peer_gone = stream.write_all(b"bye\n");
}

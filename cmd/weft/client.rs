//! The client of an agent's HTTP API: one request, one connection.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::cli::ClientArgs;
use crate::failure::Failure;

/// Where an agent listens unless told otherwise.
const ADDR_DEFAULT: &str = "127.0.0.1:8500";
/// Largest answer: the catalogue of a very large mesh.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest exchange: joining tries several addresses, each with its own timeout.
const EXCHANGE_TIMEOUT: Duration = Duration::from_mins(1);

/// Talks to one agent.
#[derive(Debug)]
pub(crate) struct Client {
    addr: String,
    token: Option<String>,
}

impl Client {
    /// Takes address and token from the flags, else from the environment.
    pub(crate) fn new(args: &ClientArgs) -> Result<Self, Failure> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let addr = filled(&args.http_addr).or_else(|| filled(&args.consul_http_addr));
        let token = filled(&args.token).or_else(|| filled(&args.consul_http_token));
        Ok(Self { addr: parse_addr(addr.as_deref().unwrap_or(ADDR_DEFAULT))?, token })
    }

    /// Fetches JSON.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failure> {
        let body = self.exchange(http::Method::GET, path, Bytes::new())?;
        let value = serde_json::from_slice(&body).with_context(|| format!("{path} of {} sent no JSON", self.addr))?;
        Ok(value)
    }

    /// Sends an order.
    pub(crate) fn put(&self, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        self.exchange(http::Method::PUT, path, body)?;
        Ok(())
    }

    /// Sends an order that is answered with text.
    pub(crate) fn put_text(&self, path: &str) -> Result<String, Failure> {
        let answer = self.exchange(http::Method::PUT, path, Bytes::new())?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Sends an order to delete.
    pub(crate) fn delete(&self, path: &str) -> Result<(), Failure> {
        self.exchange(http::Method::DELETE, path, Bytes::new())?;
        Ok(())
    }

    /// Sends an order that is answered with JSON.
    pub(crate) fn put_for(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let answer = self.exchange(http::Method::PUT, path, Bytes::from(body.to_string()))?;
        let value = serde_json::from_slice(&answer).with_context(|| format!("{path} of {} sent no JSON", self.addr))?;
        Ok(value)
    }

    fn exchange(&self, method: http::Method, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let addr = &self.addr;
        runtime.block_on(async {
            match tokio::time::timeout(EXCHANGE_TIMEOUT, self.request(method, path, body)).await {
                Ok(answer) => answer,
                Err(_) => Err(Failure::text(format!("no answer from the agent at {addr} within {EXCHANGE_TIMEOUT:?}"))
                    .hint("look at the agent's log on that host")),
            }
        })
    }

    async fn request(&self, method: http::Method, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let addr = &self.addr;
        let stream = TcpStream::connect(addr.as_str()).await.with_context(|| format!("no agent answers at {addr}"));
        let stream = stream.map_err(|err| {
            Failure::from(err)
                .hint("start one with `weft agent …` (or `weft agent -dev`), or name its address with -http-addr")
        })?;
        let context = || format!("the exchange with {addr} broke off; is it a weft agent's HTTP API?");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(context)?;
        let mut request = http::Request::builder().method(method).uri(path).header(http::header::HOST, addr);
        if let Some(token) = &self.token {
            request = request.header("x-consul-token", token);
        }
        let request =
            request.body(Full::new(body)).context("cannot form the request: check -token for odd characters")?;
        let answer = async {
            let response = sender.send_request(request).await.with_context(context)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), RESPONSE_BYTES_MAX).collect().await;
            let body = body.map_err(anyhow::Error::from_boxed).with_context(context)?.to_bytes();
            if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
        };
        // The connection must be driven while the answer is awaited; it ends with the answer.
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            _closed = connection => answer.await,
        }
    }
}

/// Turns the agent's own words into a failure.
fn refusal(status: http::StatusCode, body: &[u8]) -> Failure {
    let text = String::from_utf8_lossy(body);
    let failure = Failure::text(format!("the agent refused ({}): {}", status.as_u16(), text.trim()));
    match status {
        http::StatusCode::UNAUTHORIZED | http::StatusCode::FORBIDDEN => {
            failure.hint("if a token is missing, pass -token or set WEFT_HTTP_TOKEN")
        }
        _ => failure,
    }
}

/// Takes `host:port`, `host` or `http://host:port`.
fn parse_addr(text: &str) -> Result<String, Failure> {
    let refuse = |why: &str| {
        Failure::text(format!("cannot use the agent address `{text}`: {why}")).hint("give -http-addr as host:port")
    };
    if text.starts_with("https://") || text.starts_with("unix://") {
        return Err(refuse("only plain HTTP over TCP is spoken here"));
    }
    let addr = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let addr = match addr.parse::<std::net::IpAddr>() {
        Ok(ip) => std::net::SocketAddr::new(ip, weft::config::HTTP_PORT_DEFAULT).to_string(),
        Err(_) if addr.contains(':') => addr.to_owned(),
        Err(_) => format!("{addr}:{}", weft::config::HTTP_PORT_DEFAULT),
    };
    let authority = addr.parse::<http::uri::Authority>().map_err(|_| refuse("it is no host and port"))?;
    match authority.port_u16() {
        Some(_) if !authority.host().is_empty() => Ok(addr),
        _ => Err(refuse("it is no host and port")),
    }
}

/// Escapes one segment of a path (RFC 3986 §2.3).
pub(crate) fn segment(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            escaped.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _written = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_people_write_them() {
        #[track_caller]
        fn check(text: &str, want: Option<&str>) {
            assert_eq!(parse_addr(text).ok().as_deref(), want, "{text}");
        }
        check("127.0.0.2:8500", Some("127.0.0.2:8500"));
        check("http://h.example:80/", Some("h.example:80"));
        check("127.0.0.2", Some("127.0.0.2:8500"));
        check("::1", Some("[::1]:8500"));
        check("[::1]:9", Some("[::1]:9"));
        check("h", Some("h:8500"));
        check("https://h:1", None);
        check("unix:///run/weft.sock", None);
        check("h:x", None);
        check("", None);
    }

    #[test]
    fn a_segment_cannot_leave_its_place_in_the_path() {
        assert_eq!(segment("web-1"), "web-1");
        assert_eq!(segment("../a b?c#d%"), "..%2Fa%20b%3Fc%23d%25");
    }

    #[test]
    fn an_agent_that_does_not_run_is_named_with_the_next_step() {
        // A listener that is dropped leaves a port that nobody answers on.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let client = Client { addr: free.to_string(), token: None };
        let text = client.get("/v1/agent/self").unwrap_err().to_string();
        assert!(text.contains(&format!("no agent answers at {free}")) && text.contains("weft agent -dev"), "{text}");
    }
}

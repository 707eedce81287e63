//! The client of an agent's HTTP API: one request, one connection, over TCP, TLS or a unix socket.

use std::fmt;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::cli::ClientArgs;
use crate::failure::Failure;
use crate::tls::{self, Trust};

/// The header of an answer that can be waited on.
const INDEX: &str = "x-consul-index";
/// Where an agent listens unless told otherwise.
const ADDR_DEFAULT: &str = "127.0.0.1";
/// Consul's port of HTTPS.
const HTTPS_PORT: u16 = 8501;
/// Largest answer: the catalogue of a very large mesh.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest exchange: joining tries several addresses, each with its own timeout.
const EXCHANGE_TIMEOUT: Duration = Duration::from_mins(1);
/// What a blocking query takes beyond its wait: the agent's jitter of a sixteenth, and the answer's way.
const BLOCKING_MARGIN: Duration = Duration::from_secs(30);

/// Where an agent's API is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    /// `host:port`
    Tcp(String),
    /// `host:port`, over TLS.
    Tls(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => f.write_str(addr),
            Self::Tls(addr) => write!(f, "https://{addr}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Talks to one agent.
#[derive(Debug)]
pub(crate) struct Client {
    addr: Address,
    token: Option<String>,
    /// Of TLS.
    trust: Trust,
}

/// One request.
struct Ask<'a> {
    method: http::Method,
    path: &'a str,
    body: Bytes,
    timeout: Option<Duration>,
}

/// What an agent answered.
struct Answer {
    index: Option<u64>,
    body: Bytes,
}

impl Client {
    /// Takes address and token from the flags, else from the environment.
    pub(crate) fn new(args: &ClientArgs) -> Result<Self, Failure> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let addr = filled(&args.http_addr).or_else(|| filled(&args.consul_http_addr));
        // By how it was given: a token before a file, weft's own names before Consul's, as with the address.
        let from_file = |file: &Option<String>| filled(file).map(|file| token_of(&file)).transpose();
        let token = match filled(&args.token) {
            Some(token) => Some(token),
            None => match from_file(&args.token_file)? {
                Some(token) => Some(token),
                None => filled(&args.consul_http_token)
                    .map_or_else(|| from_file(&args.consul_http_token_file), |token| Ok(Some(token)))?,
            },
        };
        let scheme = match switch("CONSUL_HTTP_SSL", filled(&args.consul_http_ssl).as_deref())? {
            Some(true) => Scheme::Https,
            _ => Scheme::Given,
        };
        let addr = parse_addr(addr.as_deref().unwrap_or(ADDR_DEFAULT), scheme)?;
        refuse_unknown(args, &addr)?;
        let cert = filled(&args.client_cert).or_else(|| filled(&args.consul_client_cert));
        let key = filled(&args.client_key).or_else(|| filled(&args.consul_client_key));
        let own = match (cert, key) {
            (Some(cert), Some(key)) => Some((PathBuf::from(cert), PathBuf::from(key))),
            (None, None) => None,
            _ => {
                return Err(Failure::text("a client certificate needs its key, and a key its certificate")
                    .hint("give both -client-cert and -client-key (WEFT_CLIENT_CERT, WEFT_CLIENT_KEY)"));
            }
        };
        let roots = filled(&args.ca_file).or_else(|| filled(&args.consul_cacert)).map(PathBuf::from);
        let name = filled(&args.tls_server_name).or_else(|| filled(&args.consul_tls_server_name));
        Ok(Self { addr, token, trust: Trust { roots, name, own } })
    }

    /// Fetches JSON; `null` for a key that is not there.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failure> {
        let answer = self.exchange(http::Method::GET, path, Bytes::new())?;
        self.json(path, &answer)
    }

    /// Fetches text.
    pub(crate) fn get_text(&self, path: &str) -> Result<String, Failure> {
        let answer = self.exchange(http::Method::GET, path, Bytes::new())?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Fetches JSON, as [`Client::get`], and its index, waiting for up to `wait` while the index is `index`; with 0 it does not wait.
    pub(crate) fn get_after(&self, path: &str, index: u64, wait: Duration) -> Result<(Value, u64), Failure> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{joint}index={index}&wait={}s", wait.as_secs());
        let timeout = Some(wait + wait / 16 + BLOCKING_MARGIN);
        let answer = self.run(&Ask { method: http::Method::GET, path: &path, body: Bytes::new(), timeout })?;
        let index = answer.index.ok_or_else(|| Failure::text(format!("{path} of {} cannot be watched", self.addr)))?;
        Ok((self.json(&path, &answer.body)?, index))
    }

    /// Sends an order.
    pub(crate) fn put(&self, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        self.put_text(path, body).map(drop)
    }

    /// Sends an order that is answered with text.
    pub(crate) fn put_text(&self, path: &str, body: Option<&Value>) -> Result<String, Failure> {
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let answer = self.exchange(http::Method::PUT, path, body)?;
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
        self.json(path, &answer)
    }

    /// Sends an order to delete that is answered with JSON.
    pub(crate) fn delete_for(&self, path: &str) -> Result<Value, Failure> {
        let answer = self.exchange(http::Method::DELETE, path, Bytes::new())?;
        self.json(path, &answer)
    }

    /// Sends bytes with an order that is answered with JSON.
    pub(crate) fn put_bytes(&self, path: &str, body: &str) -> Result<Value, Failure> {
        let answer = self.exchange(http::Method::PUT, path, Bytes::copy_from_slice(body.as_bytes()))?;
        self.json(path, &answer)
    }

    /// Hands on a response piece by piece, until its end, `for_at_most`, or until `take` says that it is enough.
    pub(crate) fn stream(
        &self,
        path: &str,
        for_at_most: Option<Duration>,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), Failure> {
        let ask = Ask { method: http::Method::GET, path, body: Bytes::new(), timeout: None };
        let following = self.converse(&ask, async |response| {
            let mut body = response.into_body();
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame.context("the agent's stream broke off")?.into_data() {
                    take(&data)?;
                }
            }
            Ok(())
        });
        runtime()?.block_on(async {
            match for_at_most {
                // The time is over: what came is what was wanted.
                Some(longest) => tokio::time::timeout(longest, following).await.unwrap_or(Ok(())),
                None => following.await,
            }
        })
    }

    fn json(&self, path: &str, body: &Bytes) -> Result<Value, Failure> {
        let value = serde_json::from_slice(body).with_context(|| format!("{path} of {} sent no JSON", self.addr))?;
        Ok(value)
    }

    fn exchange(&self, method: http::Method, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        Ok(self.run(&Ask { method, path, body, timeout: Some(EXCHANGE_TIMEOUT) })?.body)
    }

    fn run(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let asked = self.converse(ask, async |response: http::Response<hyper::body::Incoming>| {
            let index = response.headers().get(INDEX).and_then(|value| value.to_str().ok()?.parse().ok());
            if is_absence(ask.path, &response) {
                return Ok(Answer { index, body: Bytes::from_static(b"null") });
            }
            let body = Limited::new(response.into_body(), RESPONSE_BYTES_MAX).collect().await;
            let body = body.map_err(anyhow::Error::from_boxed).with_context(|| broke_off(&self.addr))?;
            Ok(Answer { index, body: body.to_bytes() })
        });
        let longest = ask.timeout.unwrap_or(EXCHANGE_TIMEOUT);
        runtime()?.block_on(async {
            match tokio::time::timeout(longest, asked).await {
                Ok(answer) => answer,
                Err(_) => Err(Failure::text(format!("no answer from the agent at {} within {longest:?}", self.addr))
                    .hint("look at the agent's log on that host")),
            }
        })
    }

    /// Sends `ask`; gives a response of success, or of absence, to `read`.
    async fn converse<T>(
        &self,
        ask: &Ask<'_>,
        read: impl AsyncFnOnce(http::Response<hyper::body::Incoming>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let no_agent = |err| {
            Failure::from(anyhow::Error::new(err).context(format!("no agent answers at {}", self.addr)))
                .hint("start one with `weft agent …` (or `weft agent -dev`), or name its address with -http-addr (host:port, https://host:port, unix:///PATH)")
        };
        match &self.addr {
            Address::Tcp(addr) => {
                let stream = TcpStream::connect(addr.as_str()).await.map_err(no_agent)?;
                self.converse_over(stream, addr, ask, read).await
            }
            Address::Tls(addr) => {
                let stream = TcpStream::connect(addr.as_str()).await.map_err(no_agent)?;
                let host = host_of(addr);
                let shaken = tls::shake(stream, host, &self.trust).await;
                let stream = shaken.map_err(|err| {
                    Failure::from(err.context(format!("the agent at {} is not believed", self.addr))).hint(
                        "give its CA with -ca-file; a node's own certificate is checked by -tls-server-name=spiffe://DOMAIN/node/NAME",
                    )
                })?;
                self.converse_over(stream, addr, ask, read).await
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(no_agent)?;
                self.converse_over(stream, "localhost", ask, read).await
            }
        }
    }

    async fn converse_over<T>(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        host: &str,
        ask: &Ask<'_>,
        read: impl AsyncFnOnce(http::Response<hyper::body::Incoming>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let context = || broke_off(&self.addr);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(context)?;
        let mut request = http::Request::builder().method(&ask.method).uri(ask.path).header(http::header::HOST, host);
        if let Some(token) = &self.token {
            request = request.header("x-consul-token", token);
        }
        let request = request
            .body(Full::new(ask.body.clone()))
            .context("cannot form the request: check -token for odd characters")?;
        let answer = async {
            let response = sender.send_request(request).await.with_context(context)?;
            let status = response.status();
            if status.is_success() || is_absence(ask.path, &response) {
                return read(response).await;
            }
            let body = Limited::new(response.into_body(), RESPONSE_BYTES_MAX).collect().await;
            Err(refusal(ask.path, status, &body.map_err(anyhow::Error::from_boxed).with_context(context)?.to_bytes()))
        };
        // The connection must be driven while the answer is awaited; it ends with the answer.
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            _closed = connection => answer.await,
        }
    }
}

/// Tells whether `response` says that a key is not there, at an index: an answer, `null`, that can be waited on as any other. So
/// a key is answered that was never written, or is gone. Of what else is asked for by name the agent's words are told.
fn is_absence<B>(path: &str, response: &http::Response<B>) -> bool {
    path.starts_with("/v1/kv/")
        && response.status() == http::StatusCode::NOT_FOUND
        && response.headers().contains_key(INDEX)
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn broke_off(addr: &Address) -> String {
    let next = match addr {
        Address::Tls(_) => "does it ask for a certificate (-client-cert and -client-key)?",
        Address::Tcp(_) | Address::Unix(_) => "is it a weft agent's HTTP API?",
    };
    format!("the exchange with {addr} broke off; {next}")
}

/// Turns the agent's own words into a failure.
fn refusal(path: &str, status: http::StatusCode, body: &[u8]) -> Failure {
    let text = String::from_utf8_lossy(body);
    let failure = Failure::text(format!("the agent refused ({}): {}", status.as_u16(), text.trim()));
    match next_step(path, status, &text) {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Says what to do about a refusal, where the agent's words do not.
fn next_step(path: &str, status: http::StatusCode, text: &str) -> Option<&'static str> {
    match status {
        http::StatusCode::UNAUTHORIZED | http::StatusCode::FORBIDDEN => {
            Some("if a token is missing, pass -token or set WEFT_HTTP_TOKEN")
        }
        http::StatusCode::NOT_IMPLEMENTED => Some("api/README.md lists what weft refuses, and what to use instead"),
        http::StatusCode::NOT_FOUND if path.starts_with("/v1/agent/service/") => {
            Some("`weft info` names the agent's node, `weft catalog services -node NODE` the IDs of its services")
        }
        http::StatusCode::NOT_FOUND if path.starts_with("/v1/connect/intentions/") => {
            Some("`weft intention list` shows all")
        }
        http::StatusCode::NOT_FOUND if path.starts_with("/v1/config/") => Some("`weft config list` names all entries"),
        _ if text.contains("No path to datacenter") => Some("`weft catalog datacenters` names them"),
        _ => None,
    }
}

/// Reads a token: the file's only line.
fn token_of(file: &str) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the token in {file}"))?;
    match text.trim() {
        "" => Err(Failure::text(format!("{file} holds no token"))),
        token => Ok(token.to_owned()),
    }
}

/// What decides between HTTP and HTTPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    /// The address, HTTP where it says nothing.
    Given,
    /// Always HTTPS but for a unix socket, as `CONSUL_HTTP_SSL=true` says: nobody who asked for TLS gets less.
    Https,
}

/// Reads a switch of Consul's environment, in Go's spellings; none if it is not set.
fn switch(name: &str, text: Option<&str>) -> Result<Option<bool>, Failure> {
    match text {
        None => Ok(None),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
        Some(other) => Err(Failure::text(format!("{name} is `{other}`: it must be true or false"))),
    }
}

/// Refuses what Consul's environment asks for and weft does not do: passed over, it would weaken what its author meant.
fn refuse_unknown(args: &ClientArgs, addr: &Address) -> Result<(), Failure> {
    let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if is_set(&args.consul_http_auth) {
        return Err(Failure::text("CONSUL_HTTP_AUTH is set, and weft has no user names and passwords")
            .hint("unset it, and show a token: -token, -token-file or WEFT_HTTP_TOKEN"));
    }
    if !matches!(addr, Address::Tls(_)) {
        return Ok(());
    }
    if is_set(&args.consul_capath) {
        return Err(Failure::text("CONSUL_CAPATH is set, and weft reads no directory of CA certificates")
            .hint("unset it, and name one PEM file that holds them all: -ca-file, WEFT_CACERT or CONSUL_CACERT"));
    }
    let verify = args.consul_http_ssl_verify.as_deref().filter(|text| !text.is_empty());
    if switch("CONSUL_HTTP_SSL_VERIFY", verify)? == Some(false) {
        return Err(Failure::text(
            "CONSUL_HTTP_SSL_VERIFY is false, and weft always checks an agent's certificate: the token would go to whoever answers",
        )
        .hint("unset it, and name the CA with -ca-file; -tls-server-name says which name the certificate has"));
    }
    Ok(())
}

/// Takes `host:port`, `host`, `http://host:port`, `https://host:port` or `unix:///path`.
fn parse_addr(given: &str, scheme: Scheme) -> Result<Address, Failure> {
    let refuse = |why: &str| {
        Failure::text(format!("cannot use the agent address `{given}`: {why}"))
            .hint("give -http-addr as host:port, https://host:port or unix:///path")
    };
    if let Some(path) = given.strip_prefix("unix://") {
        return if path.starts_with('/') {
            Ok(Address::Unix(PathBuf::from(path)))
        } else {
            Err(refuse("the socket's path must begin with /"))
        };
    }
    let unnamed = if scheme == Scheme::Https { HTTPS_PORT } else { weft::config::HTTP_PORT_DEFAULT };
    let plain = (given.strip_prefix("http://").unwrap_or(given), unnamed);
    let (rest, port) = given.strip_prefix("https://").map_or(plain, |rest| (rest, HTTPS_PORT));
    let addr = rest.trim_end_matches('/');
    let addr = match addr.parse::<std::net::IpAddr>() {
        Ok(ip) => std::net::SocketAddr::new(ip, port).to_string(),
        Err(_) if addr.contains(':') => addr.to_owned(),
        Err(_) => format!("{addr}:{port}"),
    };
    let authority = addr.parse::<http::uri::Authority>().map_err(|_| refuse("it is no host and port"))?;
    match authority.port_u16() {
        Some(_) if !authority.host().is_empty() && port == HTTPS_PORT => Ok(Address::Tls(addr)),
        Some(_) if !authority.host().is_empty() => Ok(Address::Tcp(addr)),
        _ => Err(refuse("it is no host and port")),
    }
}

/// Cuts the port off, and the brackets of an IPv6 address.
fn host_of(addr: &str) -> &str {
    let host = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
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
            let read = |scheme| parse_addr(text, scheme).ok().map(|addr| addr.to_string());
            assert_eq!(read(Scheme::Given).as_deref(), want, "{text}");
            // With TLS asked for nothing but a socket goes without.
            let secure = read(Scheme::Https);
            assert_eq!(secure.is_some(), want.is_some(), "{text}");
            assert!(secure.is_none_or(|addr| addr.starts_with("https://") || addr.starts_with("unix://")), "{text}");
        }
        let default = |scheme| parse_addr(ADDR_DEFAULT, scheme).unwrap().to_string();
        assert_eq!([Scheme::Given, Scheme::Https].map(default), ["127.0.0.1:8500", "https://127.0.0.1:8501"]);
        check("127.0.0.2:8500", Some("127.0.0.2:8500"));
        check("http://h.example:80/", Some("h.example:80"));
        check("127.0.0.2", Some("127.0.0.2:8500"));
        check("::1", Some("[::1]:8500"));
        check("[::1]:9", Some("[::1]:9"));
        check("h", Some("h:8500"));
        check("https://h:1", Some("https://h:1"));
        check("https://10.0.0.1/", Some("https://10.0.0.1:8501"));
        check("unix:///run/weft.sock", Some("unix:///run/weft.sock"));
        check("unix://run/weft.sock", None);
        check("h:x", None);
        check("", None);
    }

    #[test]
    fn the_host_of_an_address_has_neither_port_nor_brackets() {
        assert_eq!(["h.test:1", "10.0.0.1:8501", "[::1]:8501"].map(host_of), ["h.test", "10.0.0.1", "::1"]);
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
        let client = Client { addr: Address::Tcp(free.to_string()), token: None, trust: Trust::default() };
        let text = client.get("/v1/agent/self").unwrap_err().to_string();
        assert!(text.contains(&format!("no agent answers at {free}")) && text.contains("weft agent -dev"), "{text}");
    }
}

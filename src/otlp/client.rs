//! One exchange of OTLP/HTTP: a POST of protobuf, and what the collector says to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use http::header::{CONNECTION, CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::message::ExportResponse;
use super::{Endpoint, OtlpConfig, OtlpError};
use crate::pki::host_roots;
use crate::telemetry::Chain;

/// Longest answer that is read, in bytes: a collector says a line or two.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Longest part of a collector's words that is logged, in bytes.
const WORDS_BYTES_MAX: usize = 200;
/// A collector is not asked to wait for longer by its own `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(5);
/// A whole exchange, from the look-up of the name on: the default of OpenTelemetry's exporters.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// Spans.
    Traces,
    /// Metrics.
    Metrics,
}

impl Signal {
    /// Returns its name: that of its path.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
        }
    }
}

/// What a collector took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Taken {
    /// All of it.
    Whole,
    /// Less: how many it refused, and what it said.
    Partly(u64, String),
}

/// Why a collector took nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CarryError {
    /// It may take the same later; after so long, if it says so.
    #[error("{why}")]
    Later {
        /// What it asks for.
        after: Option<Duration>,
        /// What went wrong.
        why: String,
    },
    /// It will never take this.
    #[error("{why}")]
    Never {
        /// What went wrong.
        why: String,
    },
}

/// Carries requests to a collector.
pub(super) trait Carry: Send + Sync + 'static {
    /// Sends one request.
    ///
    /// # Errors
    /// [`CarryError`].
    fn carry(&self, signal: Signal, body: Bytes) -> impl Future<Output = Result<Taken, CarryError>> + Send;
}

/// Carries them over HTTP/1.1, with TLS for https.
pub(super) struct Client {
    endpoint: Endpoint,
    headers: HeaderMap,
    tls: Option<Arc<ClientConfig>>,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl Client {
    /// Prepares to speak to the collector. Reads the host's roots for https: blocks on the disk.
    ///
    /// # Errors
    /// [`OtlpError::Roots`].
    pub(super) fn new(config: &OtlpConfig) -> Result<Self, OtlpError> {
        let tls = if config.endpoint.is_tls() {
            let roots = host_roots(config.ca_file.as_deref()).map_err(OtlpError::Roots)?;
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| OtlpError::Roots(error.to_string()))?;
            Some(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
        } else {
            None
        };
        Ok(Self { endpoint: config.endpoint.clone(), headers: config.headers.clone(), tls })
    }

    async fn open(&self) -> Result<Box<dyn Io>, String> {
        let (host, port) = self.endpoint.address();
        let stream = TcpStream::connect((host, port)).await.map_err(|error| format!("cannot connect: {error}"))?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is no name of a TLS server"))?;
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
        let stream = connector.connect(name, stream).await.map_err(|error| format!("TLS handshake: {error}"))?;
        Ok(Box::new(stream))
    }

    async fn exchange(&self, signal: Signal, body: Bytes) -> Result<(StatusCode, HeaderMap, Bytes), String> {
        let stream = self.open().await?;
        let mut builder = hyper::client::conn::http1::Builder::new();
        builder.max_buf_size(ANSWER_BYTES_MAX);
        let handshake = builder.handshake::<_, Full<Bytes>>(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(|error| Chain(&error).to_string())?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() =
            self.endpoint.path(signal.as_str()).parse().map_err(|_| "the path is no path".to_owned())?;
        let headers = request.headers_mut();
        headers.extend(self.headers.clone());
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("weft/", env!("CARGO_PKG_VERSION"))));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        headers.insert(HOST, self.endpoint.host());
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| Chain(&error).to_string())?;
            read(response).await
        };
        // The connection has to be driven beside the exchange; it may end first, with all of the answer already read.
        match select(std::pin::pin!(answer), std::pin::pin!(connection)).await {
            Either::Left((answer, _connection)) => answer,
            Either::Right((_ended, answer)) => answer.await,
        }
    }
}

impl Carry for Client {
    async fn carry(&self, signal: Signal, body: Bytes) -> Result<Taken, CarryError> {
        match tokio::time::timeout(TIMEOUT, self.exchange(signal, body)).await {
            Ok(Ok((status, headers, answer))) => judge(status, &headers, &answer),
            Ok(Err(why)) => Err(CarryError::Later { after: None, why }),
            Err(_) => Err(CarryError::Later { after: None, why: format!("no answer within {TIMEOUT:?}") }),
        }
    }
}

async fn read(response: Response<Incoming>) -> Result<(StatusCode, HeaderMap, Bytes), String> {
    let (parts, mut body) = response.into_parts();
    let mut answer = Vec::new();
    while answer.len() < ANSWER_BYTES_MAX {
        // An answer that breaks off does not undo the status.
        let Some(Ok(frame)) = body.frame().await else { break };
        if let Ok(data) = frame.into_data() {
            answer.extend_from_slice(data.get(..ANSWER_BYTES_MAX.min(data.len())).unwrap_or_default());
        }
    }
    Ok((parts.status, parts.headers, answer.into()))
}

/// Judges an answer as OTLP says (OTLP 1.5, "Full Success", "Partial Success", "Failures", "OTLP/HTTP Throttling").
fn judge(status: StatusCode, headers: &HeaderMap, answer: &[u8]) -> Result<Taken, CarryError> {
    if status.is_success() {
        let partial = ExportResponse::decode(answer).ok().and_then(|response| response.partial_success);
        return Ok(match partial {
            Some(partial) if partial.rejected > 0 => {
                Taken::Partly(partial.rejected.unsigned_abs(), words(&partial.error_message))
            }
            _ => Taken::Whole,
        });
    }
    let said = words(&String::from_utf8_lossy(answer));
    let why = if said.is_empty() { format!("it answered {status}") } else { format!("it answered {status}: {said}") };
    if matches!(status.as_u16(), 429 | 502 | 503 | 504) {
        let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let after = seconds.map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
        return Err(CarryError::Later { after, why });
    }
    Err(CarryError::Never { why })
}

/// Returns what of a collector's words may stand in a log line.
fn words(text: &str) -> String {
    let cut = text.get(..text.floor_char_boundary(WORDS_BYTES_MAX)).unwrap_or_default();
    cut.chars().filter(|c| !c.is_control() && *c != char::REPLACEMENT_CHARACTER).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::otlp::message::PartialSuccess;

    #[test]
    fn what_may_be_sent_again_is_told_from_what_may_not() {
        #[track_caller]
        fn later(status: u16, retry_after: Option<&'static str>, want: Option<u64>) {
            let mut headers = HeaderMap::new();
            headers.extend(retry_after.map(|text| (RETRY_AFTER, HeaderValue::from_static(text))));
            let judged = judge(StatusCode::from_u16(status).unwrap(), &headers, b"busy\n");
            let Err(CarryError::Later { after, why }) = judged else { panic!("{judged:?}") };
            assert_eq!(after, want.map(Duration::from_secs));
            assert!(why.contains(&status.to_string()) && why.ends_with(": busy"), "{why}");
        }
        for status in [429, 502, 503, 504] {
            later(status, None, None);
            later(status, Some("7"), Some(7));
            later(status, Some("86400"), Some(300));
            later(status, Some("Sun, 06 Nov 1994 08:49:37 GMT"), None);
        }
        for status in [301, 400, 401, 404, 413, 500] {
            let judged = judge(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), b"");
            assert!(matches!(judged, Err(CarryError::Never { .. })), "{judged:?}");
        }
    }

    #[test]
    fn a_part_that_is_refused_is_read_from_the_answer() {
        let answer = |rejected| {
            let partial_success = Some(PartialSuccess { rejected, error_message: "no\x1b[31m room".to_owned() });
            let response = ExportResponse { partial_success }.encode_to_vec();
            judge(StatusCode::OK, &HeaderMap::new(), &response)
        };
        assert_eq!(answer(3), Ok(Taken::Partly(3, "no[31m room".to_owned())));
        assert_eq!(answer(0), Ok(Taken::Whole));
        assert_eq!(judge(StatusCode::OK, &HeaderMap::new(), b"no protobuf"), Ok(Taken::Whole));
        assert_eq!(words(&"x".repeat(1_000)).len(), WORDS_BYTES_MAX);
    }
}

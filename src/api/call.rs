//! One request on its way through a handler, and what comes out of it.

use std::io::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use super::query::Query;
use super::{Shared, held};
use crate::gossip::GossipError;
use crate::registry::RegistryError;
use crate::registry::definition::DefinitionError;

/// Shortest body that is compressed, in bytes: a smaller one fits a packet either way.
const GZIP_BYTES_MIN: usize = 1024;

/// What an endpoint does with a request.
pub(super) type Handler = fn(Call) -> BoxFuture<'static, Result<Reply, Refusal>>;

/// A request that passed the guard.
pub(super) struct Call {
    pub(super) shared: Arc<Shared>,
    pub(super) query: Query,
    pub(super) headers: HeaderMap,
    /// Where the connection comes from; none by the unix socket.
    pub(super) peer: Option<IpAddr>,
    /// The path's parameter, decoded; empty where the path has none.
    pub(super) argument: String,
    pub(super) body: Bytes,
}

/// A good answer.
#[derive(Debug)]
pub(super) enum Reply {
    /// 200 without a body.
    Empty,
    /// 200 with JSON; with the index of the answer where the endpoint has one.
    Json { body: Vec<u8>, meta: Meta },
    /// 200 with text.
    Text { body: String, content_type: &'static str },
    /// A status with bytes, at an index.
    Bytes { status: StatusCode, body: Vec<u8>, content_type: &'static str, meta: Meta },
    /// 200 with text that goes on until the client or the agent has enough.
    Stream { body: Body, content_type: &'static str },
    /// An answer that holds room until it has left.
    Held { reply: Box<Reply>, room: OwnedSemaphorePermit },
    /// A status that is the answer itself.
    Judged { status: StatusCode, body: Vec<u8>, content_type: &'static str },
}

/// The headers that an answer carries.
#[derive(Debug, Default)]
pub(super) struct Meta {
    /// `X-Consul-Index`, and with it `X-Consul-KnownLeader` and `X-Consul-LastContact`.
    pub(super) index: Option<u64>,
    /// `X-Consul-ContentHash`.
    pub(super) content_hash: Option<String>,
}

impl Meta {
    fn write(self, headers: &mut HeaderMap) {
        if let Some(index) = self.index {
            headers.insert("x-consul-index", HeaderValue::from(index));
            headers.insert("x-consul-knownleader", HeaderValue::from_static("true"));
            headers.insert("x-consul-lastcontact", HeaderValue::from_static("0"));
        }
        if let Some(hash) = self.content_hash.and_then(|hash| HeaderValue::try_from(hash).ok()) {
            headers.insert("x-consul-contenthash", hash);
        }
    }
}

impl Reply {
    /// Answers with `value`.
    pub(super) fn json<T: Serialize>(call: &Call, value: &T) -> Result<Self, Refusal> {
        Self::json_with(call, value, Meta::default())
    }

    /// Answers with `value` at `index`.
    pub(super) fn at_index<T: Serialize>(call: &Call, value: &T, index: u64) -> Result<Self, Refusal> {
        Self::json_with(call, value, Meta { index: Some(index.max(1)), content_hash: None })
    }

    /// Answers with `value` and the headers of `meta`; indented where the query says `pretty`.
    pub(super) fn json_with<T: Serialize>(call: &Call, value: &T, meta: Meta) -> Result<Self, Refusal> {
        let written =
            if call.query.has("pretty") { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
        let body = written.map_err(|error| Refusal::internal(format!("answer does not encode: {error}")))?;
        Ok(Self::Json { body, meta })
    }

    /// Answers 404 in words, at `index`: who waits for what is not there yet asks again with it.
    pub(super) fn absent(text: impl Into<String>, index: u64) -> Self {
        let meta = Meta { index: Some(index.max(1)), content_hash: None };
        Self::Bytes { status: StatusCode::NOT_FOUND, body: text.into().into_bytes(), content_type: TEXT, meta }
    }

    pub(super) fn into_response(self, coding: Coding) -> Response {
        self.respond(coding, None)
    }

    fn respond(self, coding: Coding, room: Option<OwnedSemaphorePermit>) -> Response {
        let mut response = Response::new(Body::empty());
        match self {
            Self::Empty => {}
            Self::Held { reply, room } => {
                let mut response = reply.respond(coding, Some(room));
                let bytes = http_body::Body::size_hint(response.body()).lower();
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                response.extensions_mut().insert(held::HoldsRoom { bytes });
                return response;
            }
            Self::Text { body, content_type } => {
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                coding.write(&mut response, body.into_bytes(), room);
            }
            Self::Stream { body, content_type } => {
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                *response.body_mut() = body;
            }
            Self::Judged { status, body, content_type } => {
                *response.status_mut() = status;
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                *response.body_mut() = Body::from(body);
            }
            Self::Bytes { status, body, content_type, meta } => {
                *response.status_mut() = status;
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                // They are a client's own: a browser must neither guess nor run them.
                headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
                headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
                meta.write(headers);
                *response.body_mut() = body_of(body, room);
            }
            Self::Json { body, meta } => {
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                meta.write(headers);
                coding.write(&mut response, body, room);
            }
        }
        response
    }
}

/// How an answer's body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
}

impl Coding {
    /// Takes gzip where the client does (RFC 9110 §12.5.3).
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let lines = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|line| line.to_str().ok());
        let takes = |coding: &str| {
            let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
            let weight = weight.trim().strip_prefix("q=").map_or(Ok(1.0), str::parse::<f32>);
            name.trim().eq_ignore_ascii_case("gzip") && weight.is_ok_and(|weight| weight > 0.0)
        };
        if lines.flat_map(|line| line.split(',')).any(takes) { Self::Gzip } else { Self::Identity }
    }

    /// Makes `body` that of `response`, compressed if it is worth it; it holds `room` until it has left.
    fn write(self, response: &mut Response, body: Vec<u8>, room: Option<OwnedSemaphorePermit>) {
        if body.len() < GZIP_BYTES_MIN {
            *response.body_mut() = body_of(body, room);
            return;
        }
        response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        let body = match self {
            Self::Identity => body,
            Self::Gzip => {
                response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                // Lists of instances are alike: the fastest level makes a tenth of them.
                let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
                let written = encoder.write_all(&body).and_then(|()| encoder.finish());
                written.expect("a vector takes what is written")
            }
        };
        *response.body_mut() = body_of(body, room);
    }
}

fn body_of(bytes: Vec<u8>, room: Option<OwnedSemaphorePermit>) -> Body {
    match room {
        Some(room) => held::body(bytes, room),
        None => Body::from(bytes),
    }
}

/// An answer that is an error: status and plain text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    /// 400
    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    /// 403
    pub(super) fn forbidden(text: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, text)
    }

    /// 500
    pub(super) fn internal(text: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, text)
    }

    pub(super) fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.text));
        *response.status_mut() = self.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(TEXT));
        response
    }
}

/// The content type of errors and other text.
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

impl From<RegistryError> for Refusal {
    fn from(error: RegistryError) -> Self {
        let status = match &error {
            RegistryError::UnknownService { .. } | RegistryError::UnknownCheck { .. } => StatusCode::NOT_FOUND,
            RegistryError::NotTtl { .. } | RegistryError::Invalid(_) => StatusCode::BAD_REQUEST,
            RegistryError::OutOfScope { .. } => StatusCode::FORBIDDEN,
            RegistryError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            RegistryError::Closed => StatusCode::SERVICE_UNAVAILABLE,
        };
        let text = match status {
            StatusCode::FORBIDDEN => format!("Permission denied: {error}"),
            _ => error.to_string(),
        };
        Self::new(status, text)
    }
}

impl From<GossipError> for Refusal {
    fn from(error: GossipError) -> Self {
        let status = match &error {
            GossipError::Join(_) => StatusCode::INTERNAL_SERVER_ERROR,
            GossipError::UnknownMember(_) => StatusCode::NOT_FOUND,
            GossipError::MemberAlive(_) => StatusCode::BAD_REQUEST,
            GossipError::Closed => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<DefinitionError> for Refusal {
    fn from(error: DefinitionError) -> Self {
        Self::bad(error.to_string())
    }
}

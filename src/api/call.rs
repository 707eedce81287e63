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

use super::Shared;
use super::held::{FREE_BYTES_MAX, ROOM_KIB_MAX, Room, WantsRoom};
use super::query::Query;
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
    /// An answer whose room was taken before it was made.
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

    /// Makes the response; where `room` has none for it, one that says so.
    pub(super) fn into_response(self, coding: Coding, room: &Room) -> Response {
        self.respond(coding, None, room)
    }

    fn respond(self, coding: Coding, taken: Option<OwnedSemaphorePermit>, room: &Room) -> Response {
        let mut response = Response::new(Body::empty());
        let body = match self {
            Self::Empty => return response,
            Self::Held { reply, room: taken } => return reply.respond(coding, Some(taken), room),
            Self::Stream { body, content_type } => {
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                *response.body_mut() = body;
                return response;
            }
            Self::Judged { status, body, content_type } => {
                return judged(status, body, content_type, taken, room);
            }
            Self::Text { body, content_type } => {
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                coding.pack(&mut response, body.into_bytes())
            }
            Self::Bytes { status, body, content_type, meta } => {
                *response.status_mut() = status;
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
                // They are a client's own: a browser must neither guess nor run them.
                headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
                headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
                meta.write(headers);
                body
            }
            Self::Json { body, meta } => {
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                meta.write(headers);
                coding.pack(&mut response, body)
            }
        };
        match room.fill(&mut response, body, taken) {
            Ok(()) => response,
            Err(refusal) => refusal.into_response(),
        }
    }
}

/// Answers with a status that is the answer itself: it stays, whether or not there is room for `body`.
fn judged(
    status: StatusCode,
    body: Vec<u8>,
    content_type: &'static str,
    taken: Option<OwnedSemaphorePermit>,
    room: &Room,
) -> Response {
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Err(refusal) = room.fill(&mut response, body, taken) {
        response = refusal.into_response();
    }
    *response.status_mut() = status;
    response
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

    /// Compresses `body` if it is worth it, and says so in `response`.
    fn pack(self, response: &mut Response, body: Vec<u8>) -> Vec<u8> {
        if body.len() < GZIP_BYTES_MIN {
            return body;
        }
        response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        match self {
            Self::Identity => body,
            Self::Gzip => {
                response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                // Lists of instances are alike: the fastest level makes a tenth of them.
                let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
                let written = encoder.write_all(&body).and_then(|()| encoder.finish());
                written.expect("a vector takes what is written")
            }
        }
    }
}

/// An answer that is an error: status and plain text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: String,
    /// The answer for which there was no room, in bytes; none where it is refused for another reason.
    wants_bytes: Option<usize>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), wants_bytes: None }
    }

    /// 429: answers that others read fill the room for them, and one of `bytes` is to wait.
    pub(super) fn without_room(bytes: usize) -> Self {
        let text = format!(
            "no room for an answer of {bytes} bytes: {} MiB of answers wait for clients that read slowly; ask again in a \
             second, or for less of it (a filter, a narrower prefix, gzip)",
            ROOM_KIB_MAX / 1024
        );
        Self { wants_bytes: Some(bytes), ..Self::new(StatusCode::TOO_MANY_REQUESTS, text) }
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
        let mut response = Response::new(Body::from(cut(self.text)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(TEXT));
        if let Some(bytes) = self.wants_bytes {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            response.extensions_mut().insert(WantsRoom { bytes });
        }
        response
    }
}

/// Cuts a text that may repeat what a client sent, which is up to 1 MiB: it needs no room then.
pub(super) fn cut(mut text: String) -> String {
    if text.len() > FREE_BYTES_MAX {
        text.truncate(text.floor_char_boundary(FREE_BYTES_MAX - CUT.len()));
        text.push_str(CUT);
        text.shrink_to_fit();
    }
    text
}

/// Ends a text that was cut.
const CUT: &str = " ...\n";

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

//! Answers that weft gives itself.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};

use super::body::TunnelBody;
use super::metrics::Flag;
use crate::model::ServiceName;
use crate::routing::{Limited, OverRate};

/// Says why weft answered itself, in one word.
pub(crate) const REASON: HeaderName = HeaderName::from_static("x-weft-reason");
/// What is left of a limit, and the limit (draft-ietf-httpapi-ratelimit-headers-10).
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// Says which limit refused a request (Envoy's `x-envoy-overloaded`).
pub(crate) const OVERFLOW: HeaderName = HeaderName::from_static("x-weft-overflow");
/// gRPC's UNAVAILABLE: what its clients retry by.
const GRPC_UNAVAILABLE: &str = "14";
/// gRPC's DEADLINE_EXCEEDED.
const GRPC_DEADLINE: &str = "4";
/// gRPC's PERMISSION_DENIED.
const GRPC_DENIED: &str = "7";
/// gRPC's RESOURCE_EXHAUSTED.
const GRPC_EXHAUSTED: &str = "8";
/// gRPC's INTERNAL: the request itself was refused.
const GRPC_INTERNAL: &str = "13";

/// Why weft answered itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Reason {
    /// The request breaks HTTP's rules.
    BadRequest,
    /// The head is over the bounds.
    HeadTooLarge,
    /// It went round in the mesh.
    Loop,
    /// The host names no service of the mesh.
    UnknownHost,
    /// No such service.
    UnknownService,
    /// No instance passes its checks.
    NoHealthyInstance,
    /// No instance could be connected.
    ConnectFailure,
    /// The connection broke.
    Reset,
    /// No answer in time.
    Timeout,
    /// The destination does not admit the caller.
    Forbidden,
    /// As much is under way as the limits allow; the word is the limit's.
    Overflow(Limited),
    /// Over a rate limit.
    RateLimited(OverRate),
    /// The agent stops.
    Draining,
    /// It fails on purpose.
    Fault,
    /// The app takes no WebSockets.
    NoWebsocket,
    /// Too many instances failed, and the service fails closed.
    FailsClosed,
}

impl Reason {
    /// Returns the word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::HeadTooLarge => "head_too_large",
            Self::Loop => "loop",
            Self::UnknownHost => "unknown_host",
            Self::UnknownService => "unknown_service",
            Self::NoHealthyInstance => "no_healthy_instance",
            Self::ConnectFailure => "connect_failure",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::Forbidden => "forbidden",
            Self::Overflow(_) => "overflow",
            Self::RateLimited(_) => "rate_limited",
            Self::Draining => "draining",
            Self::Fault => "fault",
            Self::NoWebsocket => "no_websocket",
            Self::FailsClosed => "fails_closed",
        }
    }
}

impl Reason {
    /// Returns the headers that say more: which limit, and when to come again.
    fn headers(self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        match self {
            Self::Overflow(what) => drop(headers.insert(OVERFLOW, HeaderValue::from_static(what.as_str()))),
            Self::RateLimited(OverRate { rate, retry_after }) => {
                // Whole seconds, rounded up: who comes then is let through.
                let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
                let window = (f64::from(rate.burst) / rate.per_second).ceil();
                let texts = [
                    (header::RETRY_AFTER, seconds.to_string()),
                    (RATE_LIMIT, format!("\"weft\";r=0;t={seconds}")),
                    (RATE_LIMIT_POLICY, format!("\"weft\";q={};w={window}", rate.burst)),
                ];
                for (name, text) in texts {
                    headers.extend(HeaderValue::try_from(text).map(|value| (name, value)));
                }
            }
            _ => {}
        }
        headers
    }
}

/// An answer of weft's own, before it is rendered.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The status.
    pub(crate) status: StatusCode,
    /// The metrics' word.
    pub(crate) flag: Flag,
    /// The header's word.
    pub(crate) reason: Reason,
    /// A sentence for people.
    pub(crate) text: String,
}

impl Refusal {
    /// The connection or stream broke before a response: 502.
    pub(crate) fn reset(text: String) -> Self {
        Self { status: StatusCode::BAD_GATEWAY, flag: Flag::Reset, reason: Reason::Reset, text }
    }

    /// No intention allows the request: 403.
    pub(crate) fn denied(text: String) -> Self {
        Self { status: StatusCode::FORBIDDEN, flag: Flag::Denied, reason: Reason::Forbidden, text }
    }

    /// The app takes no WebSockets: 501.
    pub(crate) fn no_websocket(service: &ServiceName) -> Self {
        Self {
            status: StatusCode::NOT_IMPLEMENTED,
            flag: Flag::Refused,
            reason: Reason::NoWebsocket,
            text: format!(
                "the application of `{service}` speaks HTTP/2 and takes no WebSockets over it (RFC 8441): register it with protocol http if \
                 it takes them over HTTP/1.1"
            ),
        }
    }

    /// Over a rate limit: 429.
    pub(crate) fn rate_limited(service: &ServiceName, over: OverRate) -> Self {
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            flag: Flag::RateLimited,
            reason: Reason::RateLimited(over),
            text: format!("service `{service}` takes {} requests a second", over.rate.per_second),
        }
    }

    /// Renders it as the trailers of an answer of gRPC that has begun.
    pub(crate) fn into_trailers(self) -> HeaderMap {
        let response = self.into_response(true);
        let mut trailers = HeaderMap::new();
        for name in ["grpc-status", "grpc-message"] {
            trailers.extend(response.headers().get(name).map(|value| (HeaderName::from_static(name), value.clone())));
        }
        trailers
    }

    /// Renders the answer; gRPC callers get a trailers-only response with a gRPC status.
    pub(crate) fn into_response(self, grpc: bool) -> Response<TunnelBody> {
        let reason = HeaderValue::from_static(self.reason.as_str());
        let reason_headers = self.reason.headers();
        if grpc {
            let code = match self.flag {
                Flag::Refused => GRPC_INTERNAL,
                Flag::Denied => GRPC_DENIED,
                Flag::Timeout => GRPC_DEADLINE,
                Flag::RateLimited => GRPC_EXHAUSTED,
                _ => GRPC_UNAVAILABLE,
            };
            let mut response = Response::new(TunnelBody::default());
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from_static(code));
            headers.insert("grpc-message", HeaderValue::from_static(self.reason.as_str()));
            headers.insert(REASON, reason);
            headers.extend(reason_headers);
            return response;
        }
        let mut response = Response::new(TunnelBody::text(Bytes::from(format!("weft: {}\n", self.text))));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(REASON, reason);
        headers.extend(reason_headers);
        response
    }
}

//! What methods and header names are written as: codes in place of the common ones.

use std::sync::LazyLock;

use http::Method;
use http::header::{self, HeaderName};

/// Methods by code less one. The order is wire format: append only.
pub(super) const METHODS: [Method; 9] = [
    Method::GET,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::HEAD,
    Method::OPTIONS,
    Method::PATCH,
    Method::TRACE,
    Method::CONNECT,
];

/// Header names by code less one. The order is wire format: append only, at most 255.
static NAMES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
    let mut names = vec![
        header::ACCEPT,
        header::ACCEPT_CHARSET,
        header::ACCEPT_ENCODING,
        header::ACCEPT_LANGUAGE,
        header::ACCEPT_RANGES,
        header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        header::ACCESS_CONTROL_ALLOW_METHODS,
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        header::ACCESS_CONTROL_MAX_AGE,
        header::ACCESS_CONTROL_REQUEST_HEADERS,
        header::ACCESS_CONTROL_REQUEST_METHOD,
        header::AGE,
        header::ALLOW,
        header::ALT_SVC,
        header::AUTHORIZATION,
        header::CACHE_CONTROL,
        header::CONTENT_DISPOSITION,
        header::CONTENT_ENCODING,
        header::CONTENT_LANGUAGE,
        header::CONTENT_LENGTH,
        header::CONTENT_LOCATION,
        header::CONTENT_RANGE,
        header::CONTENT_SECURITY_POLICY,
        header::CONTENT_TYPE,
        header::COOKIE,
        header::DATE,
        header::ETAG,
        header::EXPECT,
        header::EXPIRES,
        header::FORWARDED,
        header::FROM,
        header::IF_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_NONE_MATCH,
        header::IF_RANGE,
        header::IF_UNMODIFIED_SINCE,
        header::LAST_MODIFIED,
        header::LINK,
        header::LOCATION,
        header::MAX_FORWARDS,
        header::ORIGIN,
        header::PRAGMA,
        header::RANGE,
        header::REFERER,
        header::REFERRER_POLICY,
        header::RETRY_AFTER,
        header::SERVER,
        header::SET_COOKIE,
        header::STRICT_TRANSPORT_SECURITY,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::USER_AGENT,
        header::VARY,
        header::VIA,
        header::WWW_AUTHENTICATE,
        header::X_CONTENT_TYPE_OPTIONS,
        header::X_FRAME_OPTIONS,
        header::SEC_WEBSOCKET_ACCEPT,
        header::SEC_WEBSOCKET_EXTENSIONS,
        header::SEC_WEBSOCKET_KEY,
        header::SEC_WEBSOCKET_PROTOCOL,
        header::SEC_WEBSOCKET_VERSION,
    ];
    names.extend(
        [
            "x-request-id",
            "traceparent",
            "tracestate",
            "b3",
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-weft-hops",
            "x-weft-reason",
            "grpc-status",
            "grpc-message",
            "grpc-timeout",
            "grpc-encoding",
            "grpc-accept-encoding",
            "sec-fetch-mode",
            "sec-fetch-site",
            "sec-fetch-dest",
        ]
        .map(HeaderName::from_static),
    );
    names
});

/// Codes by the name's length: a name is found by a few comparisons of equal length.
static CODES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let longest = NAMES.iter().map(|name| name.as_str().len()).max().unwrap_or(0);
    let mut codes = vec![Vec::new(); longest.saturating_add(1)];
    for (code, name) in (1..=u8::MAX).zip(NAMES.iter()) {
        if let Some(bucket) = codes.get_mut(name.as_str().len()) {
            bucket.push(code);
        }
    }
    codes
});

pub(super) fn name_of(code: u8) -> Option<&'static HeaderName> {
    NAMES.get(usize::from(code).checked_sub(1)?)
}

pub(super) fn code_of(name: &HeaderName) -> Option<u8> {
    let bucket = CODES.get(name.as_str().len())?;
    bucket.iter().copied().find(|code| name_of(*code) == Some(name))
}

/// Names that frame or route a message: never sent, refused when a peer sends them.
pub(super) fn is_framing(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "transfer-encoding"
            | "host"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authorization"
            | "proxy-authenticate"
    )
}

//! gRPC as far as two server-streaming methods need it: paths, metadata, statuses, trailers.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method as Verb, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Limited, StreamBody};

use super::attest::Caller;
use super::feed::{Feed, Source, Subject};
use super::message::{REQUEST_BYTES_MAX, unframe};
use super::metrics::{Meter, OpenStream};

/// The metadata that every call must carry, so that no browser or proxy calls by mistake (SPIFFE Workload Endpoint §3).
const SECURITY_HEADER: &str = "workload.spiffe.io";
/// A client has so long to send its empty request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The statuses of gRPC that are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Ok,
    InvalidArgument,
    PermissionDenied,
    Unimplemented,
    Unavailable,
}

impl Code {
    /// Its number.
    fn number(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::InvalidArgument => 3,
            Self::PermissionDenied => 7,
            Self::Unimplemented => 12,
            Self::Unavailable => 14,
        }
    }

    /// Its name, for a label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// How a call ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) code: Code,
    pub(super) message: String,
}

impl Status {
    fn new(code: Code, message: &str) -> Self {
        Self { code, message: message.to_owned() }
    }

    /// Writes `grpc-status` and `grpc-message`.
    fn write(&self, headers: &mut HeaderMap) {
        headers.insert("grpc-status", HeaderValue::from(u16::from(self.code.number())));
        let message = HeaderValue::try_from(percent_encoded(&self.message));
        headers.extend(message.ok().map(|message| (http::HeaderName::from_static("grpc-message"), message)));
    }
}

/// The methods, for a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Stream(Subject),
    Other,
}

impl Method {
    fn of(path: &str) -> Self {
        match path {
            "/SpiffeWorkloadAPI/FetchX509SVID" => Self::Stream(Subject::Svids),
            "/SpiffeWorkloadAPI/FetchX509Bundles" => Self::Stream(Subject::Bundles),
            _ => Self::Other,
        }
    }

    /// Its name.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stream(Subject::Svids) => "FetchX509SVID",
            Self::Stream(Subject::Bundles) => "FetchX509Bundles",
            Self::Other => "other",
        }
    }
}

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Answers one call of `caller`.
pub(super) async fn answer<B>(request: Request<B>, source: Arc<Source>, caller: Caller, meter: Meter) -> Answer
where
    B: Body + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B::Data: Send,
{
    let method = Method::of(request.uri().path());
    let opened = open(method, request, source, caller).await;
    meter.count(method, opened.as_ref().map_or_else(|refused| refused.code, |_| Code::Ok));
    match opened {
        Ok((first, feed)) => streaming(first, feed, meter.open()),
        Err(status) => refusal(&status),
    }
}

/// Checks the call and waits for the stream's first message.
async fn open<B>(
    method: Method,
    request: Request<B>,
    source: Arc<Source>,
    caller: Caller,
) -> Result<(Bytes, Feed), Status>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if request.headers().get(SECURITY_HEADER).is_none_or(|value| value != "true") {
        return Err(Status::new(Code::InvalidArgument, "the metadata `workload.spiffe.io: true` is missing"));
    }
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if request.method() != Verb::POST || !request.headers().get(http::header::CONTENT_TYPE).is_some_and(is_grpc) {
        return Err(Status::new(Code::InvalidArgument, "a call is a POST of application/grpc"));
    }
    let Method::Stream(subject) = method else {
        let what = "weft issues X.509-SVIDs: FetchX509SVID and FetchX509Bundles";
        return Err(Status::new(Code::Unimplemented, what));
    };
    let read = tokio::time::timeout(REQUEST_TIMEOUT, Limited::new(request.into_body(), REQUEST_BYTES_MAX).collect());
    let body = read.await.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes);
    // The request has no field that means anything: its content is not looked at.
    if body.is_none_or(|body| unframe(&body).is_none()) {
        return Err(Status::new(Code::InvalidArgument, "a request is one small message, uncompressed"));
    }
    let mut feed = Feed::new(source, subject, caller);
    let first = feed.next().await?;
    Ok((first, feed))
}

fn head() -> http::response::Builder {
    Response::builder().status(StatusCode::OK).header(http::header::CONTENT_TYPE, "application/grpc")
}

/// An answer without messages: gRPC's trailers in the place of headers.
fn refusal(status: &Status) -> Answer {
    let mut answer = head().body(Empty::new().boxed_unsync()).expect("a fixed, well-formed head");
    status.write(answer.headers_mut());
    answer
}

/// What is left to say.
enum Rest {
    First(Bytes, Feed),
    Next(Feed),
    Ended,
}

/// An answer that says `first` and whatever `feed` brings, until the client goes or the feed ends.
fn streaming(first: Bytes, feed: Feed, open: OpenStream) -> Answer {
    let frames = stream::unfold((Rest::First(first, feed), open), |(rest, open)| async move {
        let (frame, rest) = match rest {
            Rest::First(first, feed) => (Frame::data(first), Rest::Next(feed)),
            Rest::Next(mut feed) => match feed.next().await {
                Ok(message) => (Frame::data(message), Rest::Next(feed)),
                Err(status) => {
                    let mut trailers = HeaderMap::new();
                    status.write(&mut trailers);
                    (Frame::trailers(trailers), Rest::Ended)
                }
            },
            Rest::Ended => return None,
        };
        Some((Ok(frame), (rest, open)))
    });
    head().body(StreamBody::new(frames).boxed_unsync()).expect("a fixed, well-formed head")
}

/// Writes a message as gRPC's `grpc-message`: what is not printable ASCII, and `%`, as `%XX`.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _written = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_encoded_as_grpc_wants_it() {
        assert_eq!(percent_encoded("plain `text`, 100 %"), "plain `text`, 100 %25");
        assert_eq!(percent_encoded("a\nü"), "a%0A%C3%BC");
    }
}

//! One request to the app, on a connection of the pool's; by which other one it goes where that one ends.
//!
//! Invariants: the app has no request twice that is not idempotent, and none three times by this agent's doing.
//! Not here: what goes over a stream of HTTP/2 (`app_h2`), what becomes of the answer (`inbound`).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode, Uri, uri};

use super::Dial;
use super::app_h2::{self, AppBody, AppError};
use super::body::TunnelBody;
use super::headers;
use super::interims::Interims;
use super::pool::{ConnectError, Http1, Pool};
use super::repeat;
use super::websocket::Handshake;
use crate::catalogue::LocalInstance;
use crate::model::Protocol;
use crate::proxy::head::{self, HeadWriter, Payload, RequestHead};
use crate::trace::SpanContext;

/// How often a request that was left out by its app goes by another connection. Each of those took other requests.
const LEFT_OUT_MAX: usize = 8;

/// An app's answer, and the connection to give back.
pub(super) struct Answered {
    pub(super) response: Response<AppBody>,
    /// The flag tells whether the app has taken the whole request: only then the connection is used again.
    pub(super) reusable: Option<(Http1, Option<Rc<Cell<bool>>>)>,
}

/// Whether the app has the request for the second time, by this agent's doing.
#[derive(Debug, Default)]
pub(super) struct Second(Cell<bool>);

impl Second {
    /// Tells the caller's agent, which counts it among its own retries.
    pub(super) fn write(&self, writer: &mut HeadWriter<'_>) {
        if self.0.get() {
            writer.header(&repeat::RETRY, b"1");
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Connect(ConnectError),
    /// It processed nothing of the request, and says so.
    #[error("the app refused the request unread")]
    Refused(#[source] AppError),
    /// As above, by ending the connection for no fault of the request's: another one may take it.
    #[error("the app ended the connection before it read the request")]
    LeftOut(#[source] AppError),
    /// The connection, which had served others, ended with nothing answered: the app may have been about to close it.
    #[error("the app's connection ended before it answered")]
    Stale(#[source] AppError),
    /// It takes no WebSockets over HTTP/2.
    #[error("the app's SETTINGS allow no WebSocket over HTTP/2 (RFC 8441)")]
    NoWebsocket,
    #[error(transparent)]
    App(AppError),
}

impl CallError {
    /// That of a request over HTTP/2: a refused stream, or one that a graceful GOAWAY left out, was not processed (RFC 9113
    /// §8.7, §6.8). A GOAWAY for an error leaves streams out as well, but the next app may give the same answer.
    pub(super) fn of_h2(error: AppError) -> Self {
        match error.h2().filter(|h2| h2.is_remote()) {
            Some(h2) if h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM) => Self::Refused(error),
            Some(h2) if h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR) => Self::LeftOut(error),
            _ => Self::App(error),
        }
    }
}

/// Where the interim answers to one request are heard: of the connection that it took last.
#[derive(Debug, Default)]
pub(super) struct Told(RefCell<Option<Arc<Interims>>>);

impl Told {
    /// Begins a request on the connection of `interims`.
    async fn listen(&self, interims: &Arc<Interims>) {
        poll_fn(|cx| {
            interims.begin(cx);
            Poll::Ready(())
        })
        .await;
        self.0.replace(Some(Arc::clone(interims)));
    }

    /// Notes one that an app over HTTP/2 sent; the task of `cx` is woken. Tells whether it is passed on.
    pub(super) fn hear(&self, cx: &Context<'_>, status: StatusCode, headers: HeaderMap) -> bool {
        let mut told = self.0.borrow_mut();
        let interims = told.get_or_insert_with(|| {
            let interims = Arc::<Interims>::default();
            interims.begin(cx);
            interims
        });
        interims.put(status, headers)
    }

    /// Tells whether there ever was one.
    pub(super) fn were_any(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(|interims| interims.were_any())
    }

    /// Waits for the next one.
    pub(super) async fn next(&self) -> (StatusCode, HeaderMap) {
        poll_fn(|cx| self.0.borrow().as_ref().map_or(Poll::Pending, |interims| interims.poll_next(cx))).await
    }
}

/// Sends the request to the app and waits for the head of its response.
///
/// A kept connection may have been closed by the app just then: if it took nothing of the request, or nothing that
/// must not be repeated, a fresh one is tried once. What somebody else repeats goes by a fresh one at once, and once.
pub(super) async fn call<D: Dial>(
    worker: &Rc<D>,
    local: &LocalInstance,
    (head, body): (RequestHead, TunnelBody),
    block: &Bytes,
    (added, told, second): (Added<'_>, &Told, &Second),
) -> Result<Answered, CallError> {
    let state = worker.http();
    let addr = local.app_addr;
    let repeatable = head.payload == Payload::Empty && head.method.is_idempotent();
    let is_repeat = head.headers.contains_key(repeat::RETRY);
    let is_asked_for = head.payload == Payload::Frames && headers::expects_continue(&head.headers);
    let handshake = Handshake::of(&head).filter(|_| is_multiplexed(local));
    let mut request = build(head, body, local, added);
    if let Some(handshake) = handshake {
        let response = Box::pin(handshake.call(worker, addr, request)).await?;
        return Ok(Answered { response, reusable: None });
    }
    if is_multiplexed(local) {
        let again = Again { block, second, may_repeat: repeatable && !is_repeat };
        let response = call_multiplexed(worker, local, request, (added, told, is_asked_for), again).await?;
        return Ok(Answered { response, reusable: None });
    }
    let pooled = if is_repeat { None } else { state.pool.checkout(addr).await };
    if let Some(mut connection) = pooled {
        let whole = request.body_mut().whole();
        told.listen(&connection.interims).await;
        let mut error = match connection.sender.try_send_request(request).await {
            Ok(response) => {
                let response = response.map(AppBody::Http1);
                return Ok(Answered { response, reusable: Some((connection, whole)) });
            }
            Err(error) => error,
        };
        request = match error.take_message() {
            // What the connection said before it took the request is not about it.
            Some(message) => {
                told.0.take();
                message
            }
            // An app that said something has the request.
            None if repeatable && is_stale(error.error()) && !connection.interims.were_any() => {
                match head::decode_request(block) {
                    Ok(head) => {
                        second.0.set(true);
                        build(head, TunnelBody::default(), local, added)
                    }
                    Err(_) => return Err(CallError::App(error.into_error().into())),
                }
            }
            None => return Err(CallError::App(error.into_error().into())),
        };
    }
    let whole = request.body_mut().whole();
    let mut connection = Pool::connect(worker, addr).await.map_err(CallError::Connect)?;
    told.listen(&connection.interims).await;
    match connection.sender.send_request(request).await {
        Ok(response) => Ok(Answered { response: response.map(AppBody::Http1), reusable: Some((connection, whole)) }),
        Err(error) => Err(CallError::App(error.into())),
    }
}

/// What sending a request again takes.
struct Again<'a> {
    block: &'a Bytes,
    second: &'a Second,
    /// It is safe if the app has it already.
    may_repeat: bool,
}

/// Sends the request to an app over HTTP/2.
///
/// What the app leaves out goes by other connections, some times: servers end each after so many requests (nginx: 1,000),
/// and leave out what is on its way by then. A body can be sent again as long as no more of it was read than is kept.
async fn call_multiplexed<D: Dial>(
    worker: &Rc<D>,
    local: &LocalInstance,
    mut request: Request<TunnelBody>,
    (added, told, mut is_asked_for): (Added<'_>, &Told, bool),
    again: Again<'_>,
) -> Result<Response<AppBody>, CallError> {
    let mut left_out = 0;
    loop {
        let (error, body) = match app_h2::call(worker, local.app_addr, request, (told, is_asked_for)).await {
            Ok(response) => return Ok(response),
            Err(failed) => failed,
        };
        match &error {
            CallError::LeftOut(_) if left_out < LEFT_OUT_MAX => left_out += 1,
            CallError::Stale(_) if again.may_repeat && !again.second.0.get() => again.second.0.set(true),
            _ => return Err(error),
        }
        let (Some(body), Ok(head)) = (body, head::decode_request(again.block)) else { return Err(error) };
        request = build(head, body, local, added);
        is_asked_for = false;
    }
}

/// Tells whether the app's connection carries many requests at once.
pub(super) fn is_multiplexed(local: &LocalInstance) -> bool {
    matches!(local.protocol, Protocol::Http2 | Protocol::Grpc)
}

/// Tells whether a reused connection ended before it answered anything.
fn is_stale(error: &hyper::Error) -> bool {
    // An app that closes with bytes unread, or dies, sends RST in place of FIN: it means the same.
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    let is_reset = cause.is_some_and(|cause| {
        matches!(cause.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe)
    });
    is_reset || error.is_incomplete_message() || error.is_canceled() || error.is_closed()
}

/// What weft adds to an app's request.
#[derive(Clone, Copy)]
pub(super) struct Added<'a> {
    /// Who calls.
    pub(super) client_cert: Option<&'a HeaderValue>,
    /// The span that the app's own are below.
    pub(super) context: Option<SpanContext>,
}

/// Makes the app's request from a decoded head.
///
/// hyper moves it some twenty times: what is large stays behind a pointer.
fn build(head: RequestHead, body: TunnelBody, local: &LocalInstance, added: Added<'_>) -> Request<TunnelBody> {
    let RequestHead { payload, method, authority, host, path, mut headers } = head;
    super::headers::forget_identity(&mut headers);
    if let Some(value) = added.client_cert {
        headers.insert(super::headers::CLIENT_CERT, value.clone());
    }
    if let Some(context) = added.context {
        context.inject(&mut headers);
    }
    let uri = if is_multiplexed(local) {
        headers.remove(header::UPGRADE);
        let mut parts = uri::Parts::default();
        parts.scheme = Some(uri::Scheme::HTTP);
        parts.authority = authority.or_else(|| local.app_addr.to_string().parse().ok());
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).unwrap_or_default()
    } else {
        let host = match authority {
            Some(_) => HeaderValue::from_maybe_shared(host).ok(),
            None => HeaderValue::try_from(local.app_addr.to_string()).ok(),
        };
        if let Some(host) = host {
            headers.insert(header::HOST, host);
        }
        if payload == Payload::Upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        } else {
            headers.remove(header::UPGRADE);
            if headers.contains_key(header::TE) {
                headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
            }
        }
        Uri::from(path)
    };
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    request
}

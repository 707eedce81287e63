//! Requests to an app over HTTP/2, and its answers.
//!
//! ```text
//!   request -> a handle of the app's shared connection -> stream: head, body (a task of its own, unless it is there whole)
//!                 interim heads, head, body as it is read <--'
//! ```
//!
//! By h2 itself: hyper's client takes every request by a queue to its connection's task and every answer by a task of its
//! own back, and tells of no interim answer.
//! Invariants: a header that frames a message of HTTP/1.1 fails its request (h2 looks at them); a request that nobody waits for any more is reset
//! (CANCEL), with its body; an answer that the app breaks off never looks whole; the app's window opens as its bytes are read.
//! Not here: which connections there are (`pool`), WebSockets, which have one each, by hyper (`websocket`).

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;

use super::Dial;
use super::body::TunnelBody;
use super::inbound::{CallError, Told};
use super::io::AppIo;

/// HTTP/2 windows towards the app: a loopback without stalls; streams whose callers do not read leave room for 60 others.
pub(super) const STREAM_WINDOW: u32 = 1024 * 1024;
pub(super) const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
/// Longest list of headers that an app may answer, in bytes: as on the wire between agents.
pub(super) const HEADER_LIST_MAX: usize = crate::proxy::head::HEAD_BYTES_MAX;
/// Streams that are opened before the app's SETTINGS have come: as hyper and Go.
const STREAMS_UNTOLD: usize = 100;

/// Why an app's connection, of either kind, carries no message any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    /// Over HTTP/1.1, a WebSocket's, or a caller's.
    #[error(transparent)]
    Hyper(#[from] hyper::Error),
    /// Over HTTP/2.
    #[error(transparent)]
    H2(#[from] h2::Error),
}

impl AppError {
    /// Returns what HTTP/2 says, if it does.
    pub(super) fn h2(&self) -> Option<&h2::Error> {
        match self {
            Self::H2(error) => Some(error),
            Self::Hyper(error) => {
                let mut causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
                causes.find_map(|cause| cause.downcast_ref())
            }
        }
    }
}

/// An answer's body.
#[derive(Debug)]
pub(crate) enum AppBody {
    /// Of an app over HTTP/1.1.
    Http1(Incoming),
    /// Of an app over HTTP/2.
    Http2(RecvStream),
}

impl Body for AppBody {
    type Data = Bytes;
    type Error = AppError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AppError>>> {
        match &mut *self {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(AppError::Hyper),
            Self::Http2(stream) => poll_stream(stream, cx).map_err(AppError::H2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(stream) => stream.is_end_stream(),
        }
    }
}

fn poll_stream(stream: &mut RecvStream, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
    let next = match ready!(stream.poll_data(cx)) {
        Some(Ok(data)) => {
            // Read is as good as passed on: how much lies between here and the caller is bounded by the tunnel's stream.
            Some(stream.flow_control().release_capacity(data.len()).map(|()| Frame::data(data)))
        }
        Some(Err(error)) => Some(Err(error)),
        None => ready!(stream.poll_trailers(cx)).transpose().map(|trailers| trailers.map(Frame::trailers)),
    };
    // An app that answered before the request was whole may send this code once its answer is whole (RFC 9113 §8.1).
    Poll::Ready(next.filter(|next| next.as_ref().err().and_then(h2::Error::reason) != Some(Reason::NO_ERROR)))
}

/// A handle of an app's HTTP/2 connection.
#[derive(Debug, Clone)]
pub(crate) struct Http2(SendRequest<Bytes>);

impl Http2 {
    /// Begins HTTP/2 on `io`; also returns what carries the connection and has to run until it ends.
    pub(super) async fn handshake(io: AppIo) -> Result<(Self, impl Future<Output = Result<(), h2::Error>>), h2::Error> {
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_max_send_streams(STREAMS_UNTOLD)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEADER_LIST_MAX).unwrap_or(u32::MAX));
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
        Ok((Self(sender), connection))
    }

    /// Tells whether it takes requests: none any more after a GOAWAY, nor once it is closed.
    pub(super) fn is_open(&mut self) -> bool {
        self.check().is_ok()
    }

    /// A handle that has sent nothing itself waits for nothing.
    fn check(&mut self) -> Result<(), h2::Error> {
        match self.0.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(checked) => checked,
            Poll::Pending => Ok(()),
        }
    }

    /// Begins a request; one that the connection does not take any more is given back.
    fn begin<D: Dial>(mut self, worker: &Rc<D>, request: Request<TunnelBody>) -> Result<Begun, Untaken> {
        if let Err(error) = self.check() {
            return Err(Untaken { error, request: Some(Box::new(request)) });
        }
        let (parts, body) = request.into_parts();
        let mut request = Request::from_parts(parts, ());
        // A length that is known is told, as over HTTP/1.1; that there is nothing, only where something is usual.
        if let Some(length) = body.size_hint().exact()
            && (length > 0
                || !matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT))
            && !request.headers().contains_key(header::CONTENT_LENGTH)
        {
            request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        let is_whole = body.is_end_stream();
        let (response, stream) =
            self.0.send_request(request, is_whole).map_err(|error| Untaken { error, request: None })?;
        let upload = if is_whole { None } else { Upload::begin(worker, body, stream) };
        Ok(Begun { response, upload })
    }
}

/// A request that was not sent.
struct Untaken {
    error: h2::Error,
    /// None: it is the request that cannot be sent.
    request: Option<Box<Request<TunnelBody>>>,
}

/// A request whose answer has not come. Dropping it resets its stream.
struct Begun {
    response: ResponseFuture,
    upload: Option<Upload>,
}

impl Begun {
    /// Waits for the answer's head; `told` hears of the interim ones before it.
    async fn answer(mut self, told: &Told) -> Result<Response<AppBody>, h2::Error> {
        let response = poll_fn(|cx| {
            if let Poll::Ready(Some(interim)) = self.response.poll_informational(cx) {
                let (head, ()) = interim?.into_parts();
                told.hear(cx, head.status, head.headers);
                // What goes ahead of the final answer does so where both are there.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Pin::new(&mut self.response).poll(cx)
        });
        let response = response.await?;
        if let Some(upload) = self.upload {
            upload.goes_on();
        }
        Ok(response.map(AppBody::Http2))
    }
}

/// A request's body on its way. Dropping it before the answer has come ends it, and its stream with it.
struct Upload(oneshot::Sender<()>);

impl Upload {
    /// Sends what is there of `body`; none: that is all. The rest has a task of its own.
    fn begin<D: Dial>(worker: &Rc<D>, body: TunnelBody, stream: SendStream<Bytes>) -> Option<Self> {
        let mut upload = Box::pin(send_body(body, stream));
        if upload.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return None;
        }
        let (goes_on, is_wanted) = oneshot::channel();
        worker.spawn_untracked(async move {
            tokio::select! {
                biased;
                () = upload.as_mut() => {}
                Err(_given_up) = is_wanted => {}
            }
        });
        Some(Self(goes_on))
    }

    /// The answer has come: who answers early may read on.
    fn goes_on(self) {
        let _it_is_over = self.0.send(());
    }
}

/// Sends a request's body to its end; where it breaks off, the stream is reset.
async fn send_body(mut body: TunnelBody, mut stream: SendStream<Bytes>) {
    loop {
        // A byte of room is room for a frame: h2 holds what is more, and no more than that one.
        stream.reserve_capacity(1);
        let frame = poll_fn(|cx| {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(()));
            }
            while stream.capacity() == 0 {
                match ready!(stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Poll::Ready(Err(())),
                }
            }
            Pin::new(&mut body).poll_frame(cx).map(Ok)
        });
        let sent = match frame.await {
            // The app wants no more.
            Err(()) => return,
            Ok(None) => return drop(stream.send_data(Bytes::new(), true)),
            Ok(Some(Err(_broke_off))) => return stream.send_reset(Reason::CANCEL),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    let is_last = body.is_end_stream();
                    let sent = stream.send_data(data, is_last);
                    if is_last {
                        return;
                    }
                    sent
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => return drop(stream.send_trailers(trailers)),
                    Err(_of_no_known_kind) => Ok(()),
                },
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Sends `request` to the app at `addr` and waits for the answer's head.
///
/// # Errors
/// As any request to an app; a connection that takes no more requests is left for a new one, once.
///
/// # Cancel safety
/// Dropping the future resets the request's stream.
pub(super) async fn call<D: Dial>(
    worker: &Rc<D>,
    addr: SocketAddr,
    request: Request<TunnelBody>,
    (told, is_asked_for): (&Told, bool),
) -> Result<Response<AppBody>, CallError> {
    let of_h2 = |error| CallError::of_h2(AppError::H2(error));
    let mut begun = shared(worker, addr).await?.begin(worker, request);
    if let Err(Untaken { request: Some(request), .. }) = begun {
        begun = shared(worker, addr).await?.begin(worker, *request);
    }
    let begun = begun.map_err(|untaken| of_h2(untaken.error))?;
    // Many apps over HTTP/2 ask for no body. This one is there: it is asked for in its place.
    if is_asked_for {
        poll_fn(|cx| {
            told.hear(cx, StatusCode::CONTINUE, HeaderMap::new());
            Poll::Ready(())
        })
        .await;
    }
    begun.answer(told).await.map_err(of_h2)
}

/// Returns the app's shared connection.
async fn shared<D: Dial>(worker: &Rc<D>, addr: SocketAddr) -> Result<Http2, CallError> {
    let pool = &worker.http().pool;
    match pool.opened(addr) {
        Some(connection) => Ok(connection),
        None => Box::pin(pool.shared(worker, addr)).await.map_err(CallError::Connect),
    }
}

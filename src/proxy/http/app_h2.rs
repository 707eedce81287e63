//! Requests to an app over HTTP/2, and its answers.
//!
//! ```text
//!   request -> a stream of a connection to the app: head, body (a task of its own, unless it is there whole)
//!                 interim heads, head, body as it is read <--'
//! ```
//!
//! By h2 itself: hyper's client takes every request by a queue to its connection's task and every answer by a task of its
//! own back, and tells of no interim answer.
//! Invariants: a header that frames a message of HTTP/1.1 fails its request (h2 looks at them); a request that nobody waits
//! for any more is reset (CANCEL), with its body; an answer that the app breaks off never looks whole; the app's window opens
//! as its bytes are read.
//! Not here: which connections there are (`h2_connections`), WebSockets, which have one each, by hyper (`websocket`).

use std::cell::RefCell;
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
use tokio::sync::oneshot;

use super::body::TunnelBody;
use super::call::{CallError, Told};
use super::h2_connections::Taken;
use super::headers;
use super::{Dial, FIRST_BYTES_MAX};

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
    Http2(RecvStream, #[expect(dead_code, reason = "keeps the stream's place until it is over")] Rc<Taken>),
}

impl Body for AppBody {
    type Data = Bytes;
    type Error = AppError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AppError>>> {
        match &mut *self {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(AppError::Hyper),
            Self::Http2(stream, _) => poll_stream(stream, cx).map_err(AppError::H2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(stream, _) => stream.is_end_stream(),
        }
    }
}

fn poll_stream(stream: &mut RecvStream, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
    // An app that answers before the request is whole may reset the stream behind its answer's end, with NO_ERROR (RFC 9113 §8.1).
    // h2 keeps that to itself: what comes here, of any code, came before the end.
    Poll::Ready(match ready!(stream.poll_data(cx)) {
        Some(Ok(data)) => {
            // Read is as good as passed on: how much lies between here and the caller is bounded by the tunnel's stream.
            Some(stream.flow_control().release_capacity(data.len()).map(|()| Frame::data(data)))
        }
        Some(Err(error)) => Some(Err(error)),
        None => ready!(stream.poll_trailers(cx)).transpose().map(|trailers| trailers.map(Frame::trailers)),
    })
}

/// Sends `request` where there is room for it, which `taken` keeps.
pub(super) fn send<D: Dial>(
    worker: &Rc<D>,
    mut sender: SendRequest<Bytes>,
    request: Request<TunnelBody>,
    taken: Rc<Taken>,
) -> Result<Begun, h2::Error> {
    let (parts, mut body) = request.into_parts();
    let mut request = Request::from_parts(parts, ());
    // A length that is known is told, as over HTTP/1.1; that there is nothing, only where something is usual.
    if let Some(length) = body.size_hint().exact()
        && (length > 0 || !matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT))
        && !request.headers().contains_key(header::CONTENT_LENGTH)
    {
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    if body.is_end_stream() {
        let (response, _) = sender.send_request(request, true)?;
        return Ok(Begun { response, body: None, upload: None, taken });
    }
    body.keep();
    let (response, stream) = sender.send_request(request, false)?;
    let body = Rc::new(RefCell::new(Some(body)));
    let upload = Upload::begin(worker, Rc::clone(&body), (stream, Rc::clone(&taken)));
    Ok(Begun { response, body: Some(body), upload, taken })
}

/// A request whose answer has not come. Dropping it resets its stream.
pub(super) struct Begun {
    response: ResponseFuture,
    /// None: it has none.
    body: Option<SharedBody>,
    upload: Option<Upload>,
    taken: Rc<Taken>,
}

/// A request's body, until it is taken back from who sends it.
type SharedBody = Rc<RefCell<Option<TunnelBody>>>;

impl Begun {
    /// Waits for the answer's head; `told` hears of the interim ones before it.
    async fn answer(&mut self, told: &Told) -> Result<Response<AppBody>, h2::Error> {
        let response = poll_fn(|cx| {
            let mut is_news = false;
            while let Poll::Ready(Some(interim)) = self.response.poll_informational(cx) {
                let (head, ()) = interim?.into_parts();
                is_news |= headers::is_interim(head.status) && told.hear(cx, head.status, head.headers);
            }
            // What goes ahead of the final answer does so where both are there.
            if is_news {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Pin::new(&mut self.response).poll(cx)
        });
        let response = response.await?;
        self.taken.answered();
        // It is sent once: nothing after an answer's head is left out.
        if let Some(body) = self.body.take()
            && let Some(body) = body.borrow_mut().as_mut()
        {
            body.let_go();
        }
        if let Some(upload) = self.upload.take() {
            upload.goes_on();
        }
        Ok(response.map(|stream| AppBody::Http2(stream, Rc::clone(&self.taken))))
    }
}

/// A request's body on its way. Dropping it before the answer has come ends it, and its stream with it.
struct Upload(oneshot::Sender<()>);

impl Upload {
    /// Sends what is there of `body`; none: that is all. The rest has a task of its own.
    fn begin<D: Dial>(
        worker: &Rc<D>,
        body: SharedBody,
        (stream, taken): (SendStream<Bytes>, Rc<Taken>),
    ) -> Option<Self> {
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
            drop((upload, taken));
        });
        Some(Self(goes_on))
    }

    /// The answer has come: who answers early may read on.
    fn goes_on(self) {
        let _it_is_over = self.0.send(());
    }
}

/// Sends a request's body to its end; where it breaks off, the stream is reset. Only data waits for the app's window, and
/// nothing of it is reserved before there is data: an upload that pauses takes no room from others.
async fn send_body(body: SharedBody, mut stream: SendStream<Bytes>) {
    let mut is_first = true;
    loop {
        let frame = poll_fn(|cx| match stream.poll_reset(cx) {
            // The app wants no more, or nobody does.
            Poll::Ready(_) => Poll::Ready(Err(())),
            Poll::Pending => match body.borrow_mut().as_mut() {
                Some(body) => Pin::new(body).poll_frame(cx).map(Ok),
                None => Poll::Ready(Err(())),
            },
        });
        let data = match frame.await {
            Err(()) => return,
            Ok(None) => return drop(stream.send_data(Bytes::new(), true)),
            Ok(Some(Err(_broke_off))) => return stream.send_reset(Reason::CANCEL),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => data,
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => return drop(stream.send_trailers(trailers)),
                    Err(_of_no_known_kind) => continue,
                },
            },
        };
        // What is little goes with the head: h2 keeps it until there is room, and most bodies are no more than that.
        let goes_at_once = std::mem::take(&mut is_first) && data.len() <= FIRST_BYTES_MAX;
        if !goes_at_once && !data.is_empty() && !has_window(&mut stream).await {
            return;
        }
        let is_last = body.borrow().as_ref().is_none_or(Body::is_end_stream);
        if stream.send_data(data, is_last).is_err() || is_last {
            return;
        }
    }
}

/// Waits until the app takes a byte, which is room for a piece of a body: h2 keeps what is more, and no more than that one
/// piece. Tells whether it does: it may want no more.
async fn has_window(stream: &mut SendStream<Bytes>) -> bool {
    stream.reserve_capacity(1);
    poll_fn(|cx| {
        while stream.capacity() == 0 {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(false);
            }
            match ready!(stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(false),
            }
        }
        Poll::Ready(true)
    })
    .await
}

/// Sends `request` to the app at `addr` and waits for the answer's head; one for which the app has no room waits its turn.
///
/// # Errors
/// As any request to an app, with the body if it can be sent again from its beginning.
///
/// # Cancel safety
/// Dropping the future resets the request's stream; one that waits for room never goes out.
pub(super) async fn call<D: Dial>(
    worker: &Rc<D>,
    addr: SocketAddr,
    request: Request<TunnelBody>,
    (told, is_asked_for): (&Told, bool),
) -> Result<Response<AppBody>, (CallError, Option<TunnelBody>)> {
    let begun = worker.http().pool.shared(addr).begin(worker, addr, request).await;
    let mut begun = begun.map_err(|error| (error, None))?;
    // Many apps over HTTP/2 ask for no body. This one is there: it is asked for in its place.
    if is_asked_for {
        poll_fn(|cx| {
            let _is_the_first = told.hear(cx, StatusCode::CONTINUE, HeaderMap::new());
            Poll::Ready(())
        })
        .await;
    }
    let error = match begun.answer(told).await {
        Ok(response) => return Ok(response),
        Err(error) => error,
    };
    let is_cut_off = error.is_io();
    if is_cut_off {
        worker.http().pool.shared(addr).forget(&begun.taken);
    }
    let error = match CallError::of_h2(AppError::H2(error)) {
        CallError::App(error) if is_cut_off && begun.taken.is_on_kept && !told.were_any() => CallError::Stale(error),
        error => error,
    };
    let body = begun.body.map_or_else(|| Some(TunnelBody::default()), |body| body.take()?.rewound());
    Err((error, body))
}

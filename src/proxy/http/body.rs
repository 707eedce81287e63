//! Bodies: from a tunnel stream to hyper, and from hyper to a tunnel stream.

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use quinn::{RecvStream, SendStream, VarInt, WriteError};
use tokio::time::{Instant, Sleep};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::activity::Busy;
use super::app_h2::{AppBody, AppError};
use super::attempt::{Unsent, grpc_outcome};
use super::metrics::{Exchange, Flag};
use super::{COPY_BYTES_MAX, FIRST_BYTES_MAX, HttpState, headers};
use crate::proxy::Lease;
use crate::proxy::head::{self, BodyDecoder, HeadError, HeadWriter, Inbox};

/// Code of RESET_STREAM when a message is aborted.
const ABORTED: VarInt = VarInt::from_u32(1);
/// Most bytes taken from a stream at once: bounds what one slow receiver holds.
const READ_BYTES_MAX: usize = 64 * 1024;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The peer reset the stream, or the tunnel broke.
    #[error("the mesh peer aborted the message")]
    Read(#[source] quinn::ReadError),
    /// The peer breaks the framing.
    #[error("the mesh peer sent a malformed message")]
    Malformed(#[source] HeadError),
    /// The stream ended inside the message.
    #[error("the message ended early")]
    Truncated,
    /// The app's or caller's side failed.
    #[error("the app aborted the message")]
    App(#[source] AppError),
    /// The response took longer than its route allows.
    #[error("the response did not come in time")]
    TimedOut,
    /// The peer wants no more, or the tunnel broke.
    #[error("the mesh peer stopped reading")]
    Write(#[source] WriteError),
}

/// A sending half that is reset when dropped unfinished: quinn alone would end it as if the message were whole.
#[derive(Debug)]
pub(crate) struct TunnelSend {
    stream: SendStream,
    open: bool,
    /// An answer's status byte went out, with an interim head.
    has_status: bool,
}

impl TunnelSend {
    pub(crate) fn new(stream: SendStream) -> Self {
        Self { stream, open: true, has_status: false }
    }

    /// Undoes [`TunnelSend::put_status`] where nothing was sent.
    pub(crate) fn take_status_back(&mut self, had: bool) {
        self.has_status = had;
    }

    /// Notes that the status byte goes out; tells whether it had before.
    pub(crate) fn put_status(&mut self) -> bool {
        std::mem::replace(&mut self.has_status, true)
    }

    /// Tells whether the status byte went out.
    pub(crate) fn has_status(&self) -> bool {
        self.has_status
    }

    /// Writes all chunks.
    pub(crate) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), BodyError> {
        self.stream.write_all_chunks(chunks).await.map_err(BodyError::Write)
    }

    /// Ends the message.
    pub(crate) fn finish(&mut self) {
        self.open = false;
        // An error means that the peer stopped the stream: then it does not care for the end.
        let _stopped = self.stream.finish();
    }

    /// Waits until the peer stops the stream or the tunnel breaks.
    pub(crate) async fn stopped(&self) -> BodyError {
        match self.stream.stopped().await {
            Ok(code) => BodyError::Write(WriteError::Stopped(code.unwrap_or(ABORTED))),
            Err(quinn::StoppedError::ConnectionLost(error)) => BodyError::Write(WriteError::ConnectionLost(error)),
            Err(quinn::StoppedError::ZeroRttRejected) => BodyError::Write(WriteError::ZeroRttRejected),
        }
    }
}

impl Drop for TunnelSend {
    fn drop(&mut self) {
        if self.open {
            let _closed = self.stream.reset(ABORTED);
        }
    }
}

/// A message's body for hyper: read from a tunnel stream, or a text of weft's own. Where there is none, it is nothing; the
/// rest is in a box, for hyper moves a request and its body some twenty times.
#[derive(Debug, Default)]
pub(crate) struct TunnelBody(Option<Box<Message>>);

const _: () = assert!(size_of::<TunnelBody>() == size_of::<usize>());

/// What is left of a message's body.
#[derive(Debug, Default)]
struct Message {
    recv: Option<RecvStream>,
    inbox: Inbox,
    decoder: BodyDecoder,
    text: Bytes,
    exchange: Option<(Exchange, Busy)>,
    /// Set when the message came to its end.
    whole: Option<Rc<Cell<bool>>>,
    /// Bytes that the message's `content-length` still promises.
    promised: Option<u64>,
    failed: bool,
    /// All that came of it so far, and its promise, as long as that is little: with it the message can be read again.
    kept: Option<(Inbox, Option<u64>)>,
    limit: Option<Box<BodyLimit>>,
    lease: Lease,
    unsent: Option<Unsent>,
    /// What the drain waits for: an app may read on when it has answered.
    held: Option<TaskTrackerToken>,
}

/// How long a response may take.
#[derive(Debug)]
pub(crate) struct BodyLimit {
    deadline: Option<Instant>,
    idle: Option<Duration>,
    sleep: Pin<Box<Sleep>>,
    /// Said in trailers when the time is over; none: the message breaks off.
    last_word: Option<HeaderMap>,
}

impl BodyLimit {
    /// Ends at `deadline`, and after `idle` without a byte; none: neither.
    pub(crate) fn new(deadline: Option<Instant>, idle: Option<Duration>, now: Instant) -> Option<Box<Self>> {
        let due = Self::due(deadline, idle, now)?;
        Some(Box::new(Self { deadline, idle, sleep: Box::pin(tokio::time::sleep_until(due)), last_word: None }))
    }

    /// The same, of a response that says in `trailers` that it took too long: they do not let it look whole.
    pub(crate) fn said_in(mut self: Box<Self>, trailers: HeaderMap) -> Box<Self> {
        self.last_word = Some(trailers);
        self
    }

    fn due(deadline: Option<Instant>, idle: Option<Duration>, now: Instant) -> Option<Instant> {
        let idle = idle.map(|idle| now + idle);
        deadline.into_iter().chain(idle).min()
    }

    /// Notes that bytes came.
    fn touch(&mut self) {
        if self.idle.is_some()
            && let Some(due) = Self::due(self.deadline, self.idle, crate::clock::now())
        {
            self.sleep.as_mut().reset(due);
        }
    }
}

impl TunnelBody {
    /// Reads frames from `recv`, beginning with what `inbox` holds. `exchange` ends with the body.
    pub(crate) fn stream(
        recv: RecvStream,
        inbox: Inbox,
        headers: &HeaderMap,
        exchange: Option<(Exchange, Busy)>,
    ) -> Self {
        let length = headers.get(http::header::CONTENT_LENGTH);
        let promised = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let mut message = Box::<Message>::default();
        (message.recv, message.inbox) = (Some(recv), inbox);
        (message.exchange, message.promised) = (exchange, promised);
        Self(Some(message))
    }

    /// Holds the tunnel while the body is read, and the request's stream if its body was not wanted.
    pub(super) fn holding(mut self, lease: Lease, unsent: Option<Unsent>) -> Self {
        if let Some(message) = &mut self.0 {
            (message.lease, message.unsent) = (lease, unsent);
        }
        self
    }

    /// Keeps `token`, which the drain waits for, until the body ends.
    pub(super) fn held_by(mut self, token: Option<TaskTrackerToken>) -> Self {
        if let Some(message) = &mut self.0 {
            message.held = token;
        }
        self
    }

    /// Ends early at `limit`.
    pub(crate) fn limited(mut self, limit: Option<Box<BodyLimit>>) -> Self {
        if let Some(message) = &mut self.0 {
            message.limit = limit;
        }
        self
    }

    /// Holds a text of weft's own.
    pub(crate) fn text(text: Bytes) -> Self {
        let mut message = Box::<Message>::default();
        message.text = text;
        Self(Some(message))
    }

    /// Returns a flag that is set once the message came whole; none: it is whole.
    pub(crate) fn whole(&mut self) -> Option<Rc<Cell<bool>>> {
        self.0.as_mut()?.whole()
    }

    /// Keeps what is here and what comes, before anything is taken of it, up to [`FIRST_BYTES_MAX`].
    pub(super) fn keep(&mut self) {
        if let Some(message) = &mut self.0 {
            let promised = message.promised;
            message.kept = message.inbox.copy(FIRST_BYTES_MAX).map(|inbox| (inbox, promised));
        }
    }

    /// Keeps nothing any more: what lasts would hold on to the buffers that its beginning came in.
    pub(super) fn let_go(&mut self) {
        if let Some(message) = &mut self.0 {
            message.kept = None;
        }
    }

    /// Returns the message as it was when it was told to keep itself; none: more was read than is kept.
    pub(super) fn rewound(mut self) -> Option<Self> {
        if let Some(message) = &mut self.0 {
            let (inbox, promised) = message.kept.take().filter(|_| !message.failed)?;
            (message.inbox, message.promised, message.decoder) = (inbox, promised, BodyDecoder::default());
        }
        Some(self)
    }
}

impl Message {
    /// Reads once.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let Some(recv) = &mut self.recv else { return Poll::Ready(Ok(())) };
        let chunk = {
            let mut read = pin!(recv.read_chunk(READ_BYTES_MAX, true));
            match read.as_mut().poll(cx) {
                Poll::Ready(chunk) => chunk,
                Poll::Pending => return Poll::Pending,
            }
        };
        match chunk {
            Ok(Some(chunk)) => {
                self.kept = self.kept.take().and_then(|(mut kept, promised)| {
                    let is_little = kept.len() + chunk.bytes.len() <= FIRST_BYTES_MAX;
                    is_little.then(|| {
                        kept.push(chunk.bytes.clone());
                        (kept, promised)
                    })
                });
                self.inbox.push(chunk.bytes);
            }
            Ok(None) => {
                self.recv = None;
                if !self.decoder.may_end(&self.inbox) {
                    return Poll::Ready(Err(BodyError::Truncated));
                }
            }
            Err(error) => {
                self.recv = None;
                return Poll::Ready(Err(BodyError::Read(error)));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn fail(&mut self, error: BodyError) -> BodyError {
        self.failed = true;
        self.recv = None;
        if let Some((mut exchange, _busy)) = self.exchange.take() {
            exchange.finish(if matches!(error, BodyError::TimedOut) { Flag::Timeout } else { Flag::Reset });
        }
        error
    }

    /// Ends the message, for its time is over.
    fn time_out(&mut self) -> Result<Frame<Bytes>, BodyError> {
        let last_word = self.limit.as_mut().and_then(|limit| limit.last_word.take());
        if let (Some(trailers), Some((exchange, _))) = (&last_word, &mut self.exchange) {
            exchange.grpc(trailers);
        }
        let error = self.fail(BodyError::TimedOut);
        last_word.map(Frame::trailers).ok_or(error)
    }

    fn whole(&mut self) -> Option<Rc<Cell<bool>>> {
        if self.is_end_stream() {
            return None;
        }
        Some(Rc::clone(self.whole.get_or_insert_default()))
    }

    fn end(&mut self) {
        drop(self.unsent.take());
        if let Some(whole) = &self.whole {
            whole.set(true);
        }
        if let Some((mut exchange, _busy)) = self.exchange.take() {
            exchange.finish(Flag::None);
        }
    }

    /// Notes a frame on its way to hyper.
    fn pass(&mut self, frame: &Frame<Bytes>, cx: &mut Context<'_>) -> Result<(), BodyError> {
        if let (Some(trailers), Some((exchange, _))) = (frame.trailers_ref(), &mut self.exchange) {
            exchange.grpc(trailers);
            if let (Some(observer), Some(status)) = (self.lease.observer(), trailers.get("grpc-status")) {
                observer.judge(grpc_outcome(status), crate::clock::now());
            }
        }
        if let (Some(data), Some(promised)) = (frame.data_ref(), &mut self.promised) {
            let left = promised.checked_sub(data.len() as u64);
            *promised =
                left.ok_or(BodyError::Malformed(HeadError::Malformed("body: longer than its content-length")))?;
        }
        // The end is looked for at once: with it hyper ends the message in the same write, and it may not ask again.
        if self.inbox.is_empty()
            && let Poll::Ready(Err(error)) = self.fill(cx)
        {
            return Err(error);
        }
        if let (Some(0), Some((exchange, _))) = (self.promised, &mut self.exchange) {
            exchange.finish(Flag::None);
        }
        Ok(())
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self;
        if !this.text.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.text)))));
        }
        loop {
            if this.failed {
                return Poll::Ready(None);
            }
            // A deadline ends also what keeps flowing; idleness shows below, where nothing is there.
            if this.limit.as_ref().and_then(|limit| limit.deadline).is_some_and(|at| at <= crate::clock::now()) {
                return Poll::Ready(Some(this.time_out()));
            }
            match this.decoder.next(&mut this.inbox) {
                Ok(Some(mut frame)) => {
                    // As in a head: an agent that sends it may be anybody's.
                    if let Some(trailers) = frame.trailers_mut() {
                        headers::forget_identity(trailers);
                    }
                    if let Err(error) = this.pass(&frame, cx) {
                        return Poll::Ready(Some(Err(this.fail(error))));
                    }
                    if let Some(limit) = &mut this.limit {
                        limit.touch();
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Ok(None) if this.recv.is_none() => {
                    if this.promised.is_some_and(|promised| promised > 0) {
                        return Poll::Ready(Some(Err(this.fail(BodyError::Truncated))));
                    }
                    this.end();
                    return Poll::Ready(None);
                }
                Ok(None) => match this.fill(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(this.fail(error)))),
                    Poll::Pending => {
                        let over = this.limit.as_mut().is_some_and(|limit| limit.sleep.as_mut().poll(cx).is_ready());
                        return if over { Poll::Ready(Some(this.time_out())) } else { Poll::Pending };
                    }
                },
                Err(error) => return Poll::Ready(Some(Err(this.fail(BodyError::Malformed(error))))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let is_read = self.text.is_empty() && self.recv.is_none() && self.inbox.is_empty();
        is_read && !self.failed && self.promised.is_none_or(|promised| promised == 0)
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.recv, self.promised) {
            (None, _) if self.inbox.is_empty() => SizeHint::with_exact(self.text.len() as u64),
            (_, Some(promised)) => SizeHint::with_exact(promised),
            _ => SizeHint::default(),
        }
    }
}

impl Body for TunnelBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.0.as_mut().map_or(Poll::Ready(None), |message| message.poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|message| message.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), |message| message.size_hint())
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // hyper drops a whole body without asking for its end where it knows the end by itself.
        // At a length that is exhausted it has the whole message, though not its FIN.
        if self.is_end_stream() || (self.promised == Some(0) && !self.failed) {
            self.end();
        }
    }
}

/// The beginning of a body that was there when its head was sent.
#[derive(Debug, Default)]
pub(crate) struct First {
    /// Encoded frames.
    pub(crate) frames: Vec<Bytes>,
    /// Bytes of data in them.
    pub(crate) bytes: usize,
    /// The trailers, if they came.
    pub(crate) trailers: Option<HeaderMap>,
    /// The body is whole.
    pub(crate) ended: bool,
}

/// Takes what is there of `body`, at most about [`FIRST_BYTES_MAX`], giving hyper one turn to bring it.
pub(crate) async fn first<B>(body: &mut B, state: &HttpState) -> Result<First, BodyError>
where
    B: Body<Data = Bytes, Error: Into<AppError>> + Unpin,
{
    let mut first = First::default();
    let mut yielded = false;
    loop {
        if body.is_end_stream() {
            first.ended = true;
            return Ok(first);
        }
        if first.bytes >= FIRST_BYTES_MAX {
            return Ok(first);
        }
        let polled = std::future::poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Some(frame)),
            Poll::Pending if yielded => Poll::Ready(None),
            Poll::Pending => {
                yielded = true;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        });
        match polled.await {
            None => return Ok(first),
            Some(None) => first.ended = true,
            Some(Some(Err(error))) => return Err(BodyError::App(error.into())),
            Some(Some(Ok(frame))) => {
                first.bytes = first.bytes.saturating_add(frame.data_ref().map_or(0, Bytes::len));
                first.trailers = encode_frame(frame, state, &mut first.frames)?;
                if first.trailers.is_some() {
                    first.ended = true;
                }
            }
        }
        if first.ended {
            return Ok(first);
        }
    }
}

/// Encodes one frame into chunks; returns the trailers if it was those.
pub(crate) fn encode_frame(
    frame: Frame<Bytes>,
    state: &HttpState,
    chunks: &mut Vec<Bytes>,
) -> Result<Option<HeaderMap>, BodyError> {
    let data = match frame.into_data() {
        Ok(data) => data,
        Err(frame) => {
            let Ok(trailers) = frame.into_trailers() else { return Ok(None) };
            let encoded = state.encode(|out| {
                let mut writer = HeadWriter::trailers(out);
                headers::write_trailers(&trailers, &mut writer);
                writer.finish()
            });
            chunks.push(encoded.map_err(BodyError::Malformed)?);
            return Ok(Some(trailers));
        }
    };
    if data.is_empty() {
        return Ok(None);
    }
    let copied = data.len() <= COPY_BYTES_MAX;
    let header = state.encode(|out| {
        head::put_data_header(out, data.len());
        if copied {
            out.extend_from_slice(&data);
        }
        Ok::<(), HeadError>(())
    });
    chunks.push(header.map_err(BodyError::Malformed)?);
    if !copied {
        chunks.push(data);
    }
    Ok(None)
}

/// Waits for the next frame of `body`, or for the peer to stop reading.
pub(crate) async fn next_frame<E: Into<AppError>>(
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, E>>>,
    send: &TunnelSend,
) -> Result<Option<Frame<Bytes>>, BodyError> {
    // Mostly a frame is there; only a wait pays for the watch on the stream.
    let ready = std::future::poll_fn(|cx| Poll::Ready(poll(cx))).await;
    let frame = match ready {
        Poll::Ready(frame) => frame,
        Poll::Pending => tokio::select! {
            biased;
            frame = std::future::poll_fn(poll) => frame,
            error = send.stopped() => return Err(error),
        },
    };
    frame.transpose().map_err(|error| BodyError::App(error.into()))
}

/// Sends the rest of `body` and ends the message; returns its trailers.
pub(crate) async fn pump(
    body: &mut AppBody,
    send: &mut TunnelSend,
    state: &HttpState,
) -> Result<Option<HeaderMap>, BodyError> {
    let mut chunks = Vec::with_capacity(2);
    let mut trailers = None;
    while let Some(frame) = next_frame(|cx| Pin::new(&mut *body).poll_frame(cx), send).await? {
        trailers = encode_frame(frame, state, &mut chunks)?.or(trailers);
        send.write(&mut chunks).await?;
        chunks.clear();
    }
    send.finish();
    Ok(trailers)
}

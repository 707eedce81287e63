//! The destination's side: one request from a tunnel stream to the app, and its response back.
//!
//! ```text
//!   head -> connection from the pool (or: status 1, another instance is tried; so where the app refuses it unread) -> request -> status 0 + head + body -> FIN
//!                                                                  status 0 + interim heads (1xx) go ahead of it __/
//! ```

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::header::{self, HeaderMap};
use http::{Response, StatusCode, Version};
use quinn::{RecvStream, SendStream};
use tracing::debug;

use super::answer::{REASON, Reason, Refusal};
use super::app_h2::AppBody;
use super::body::{self, BodyError, First, TunnelBody, TunnelSend};
use super::call::{Added, Answered, CallError, Second, Told, call, is_multiplexed};
use super::headers;
use super::io::AppIo;
use super::metrics::{Exchange, Flag};
use super::upgrade::{self, Raw};
use super::{Dial, HttpState};
use crate::catalogue::LocalInstance;
use crate::pki::PeerIdentity;
use crate::proxy::authorize::{in_time, request_of};
use crate::proxy::head::{self, HeadError, HeadWriter, Inbox, Payload, RequestHead};
use crate::proxy::metrics::Reporter;
use crate::proxy::relay::IDLE_TIMEOUT;
use crate::proxy::worker::within;
use crate::trace::{self, OpenSpan, Side};

/// Status bytes that begin every answer (the tunnel code writes the others).
const STATUS_OK: u8 = 0;
const STATUS_CONNECT_FAILED: u8 = 1;

/// Why an exchange ended without a whole response.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("the request's head did not arrive in time")]
    HeadTimeout,
    #[error("the request's head is malformed")]
    Head(#[source] HeadError),
    #[error("the message was cut off")]
    Body(#[source] BodyError),
    #[error("the stream ended inside the request's head")]
    Truncated,
}

/// A stream that carries one request.
pub(crate) struct Stream {
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    /// What was read beyond the preamble.
    pub(crate) rest: Bytes,
    /// Where it goes.
    pub(crate) local: LocalInstance,
    /// Who sends it.
    pub(crate) peer: Rc<PeerIdentity>,
}

/// Serves one request; `on_admitted` gets the head of one that may pass, and once more, alone in its memory, of one that
/// lasts.
///
/// # Cancel safety
/// Dropping the future resets the stream and closes the app's connection.
pub(crate) async fn serve<D: Dial>(worker: Rc<D>, stream: Stream, on_admitted: impl Fn(Bytes)) {
    let id = stream.recv.id();
    let service = stream.local.service.clone();
    if let Err(error) = exchange(&worker, stream, on_admitted).await {
        debug!(stream = %id, %service, error = %error, "request aborted");
    }
}

async fn exchange<D: Dial>(worker: &Rc<D>, stream: Stream, on_admitted: impl Fn(Bytes)) -> Result<(), ServeError> {
    let state = worker.http();
    let Stream { send, mut recv, rest, local, peer } = stream;
    let (mut send, local, peer) = (TunnelSend::new(send), &local, &peer);
    let mut inbox = Inbox::default();
    inbox.push(rest);
    let read = read_head(&mut recv, &mut inbox);
    let block = within(state.limits.head, read).await.ok_or(ServeError::HeadTimeout)??;
    let head = head::decode_request(&block).map_err(ServeError::Head)?;
    let is_grpc = headers::is_grpc(&head.headers);
    let edge = state.edge(Reporter::Destination, peer.id.service(), Some(&local.service));
    let span = begin_span(state, local, &head, is_grpc);
    let mut exchange = Exchange::new(edge, crate::clock::now()).traced(span);
    // No wait between the decision and its note: a change of intentions meets either.
    let decided = in_time(peer).and_then(|()| {
        let (table, ends) = (&worker.snapshot().peek().policy, (peer.id.service(), &local.service));
        state.policy().request(table, Reporter::Destination, ends, &request_of(&head))
    });
    if let Err(denied) = decided {
        let refusal = Refusal::denied(denied.text(peer.id.service(), &local.service));
        return turn_away(state, &mut send, refusal, (&mut exchange, is_grpc)).await;
    }
    let admitted = {
        let table = &worker.snapshot().peek().upstreams;
        state.admit_rate(table, &local.service, peer.id.service(), &head)
    };
    if let Err(over) = admitted {
        let refusal = Refusal::rate_limited(&local.service, over);
        return turn_away(state, &mut send, refusal, (&mut exchange, is_grpc)).await;
    }
    on_admitted(block.clone());
    let is_upgrade = head.payload == Payload::Upgrade;
    let (request_body, raw) = match head.payload {
        Payload::Frames => (TunnelBody::stream(recv, inbox, &head.headers, None).held_by(worker.task_token()), None),
        Payload::Upgrade => (TunnelBody::default(), Some((recv, inbox))),
        Payload::Empty => {
            // Reads the FIN that came with the head: dropping the stream before it would send STOP_SENDING.
            let read = recv.read_chunk(1, true);
            let _fin = read.now_or_never();
            (TunnelBody::default(), None)
        }
    };
    let client_cert = state.client_cert(peer);
    // Of the connection that the request takes.
    let told = Told::default();
    let added = Added { client_cert: client_cert.as_ref(), context: exchange.context() };
    let second = Second::default();
    let answered = {
        let call = pin!(call(worker, local, (head, request_body), &block, (added, &told, &second)));
        answer(state, &mut send, &told, call).await?
    };
    // A head shares its memory with all that came in one read of the socket: an exchange that lasts keeps its own.
    let lasting = || {
        on_admitted(Bytes::copy_from_slice(&block));
        drop(block);
    };
    let Answered { mut response, reusable } = match answered {
        Ok(answered) => answered,
        Err(error @ (CallError::Connect(_) | CallError::Refused(_) | CallError::LeftOut(_))) => {
            debug!(service = %local.service, error = %error, "app not reached");
            // The status byte is said once.
            if send.has_status() {
                return broke_off(state, &mut send, (local, &mut exchange, &second), is_grpc).await;
            }
            exchange.finish(Flag::ConnectFailure);
            send.write(&mut [Bytes::from_static(&[STATUS_CONNECT_FAILED])]).await.map_err(ServeError::Body)?;
            send.finish();
            return Ok(());
        }
        Err(CallError::NoWebsocket) => {
            let refusal = Refusal::no_websocket(&local.service);
            return turn_away(state, &mut send, refusal, (&mut exchange, is_grpc)).await;
        }
        Err(CallError::App(error) | CallError::Stale(error)) => {
            debug!(service = %local.service, error = %error, "app broke off");
            return broke_off(state, &mut send, (local, &mut exchange, &second), is_grpc).await;
        }
    };

    exchange.status(response.status());
    if is_grpc {
        exchange.grpc(response.headers());
    }
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return match raw {
            Some(raw) if is_upgrade => {
                exchange.finish(Flag::None);
                drop(exchange);
                lasting();
                let idle = worker.snapshot().peek().traffic.idle_timeout(&local.service);
                Box::pin(switch(state, send, raw, (response, idle.unwrap_or(IDLE_TIMEOUT)))).await
            }
            _ => Err(ServeError::Head(HeadError::Malformed("101 without an upgrade"))),
        };
    }
    let result = relay(state, &mut send, (&mut response, &second), (&mut exchange, is_grpc), lasting).await;
    if result.is_ok()
        && let Some((sender, whole)) = reusable
        && whole.is_none_or(|whole| whole.get())
    {
        state.pool.put(worker, local.app_addr, sender);
    }
    result
}

/// Waits for the final answer and sends the interim ones that come before it, as long as the caller's agent wants one.
async fn answer(
    state: &HttpState,
    send: &mut TunnelSend,
    told: &Told,
    mut call: Pin<&mut impl Future<Output = Result<Answered, CallError>>>,
) -> Result<Result<Answered, CallError>, ServeError> {
    loop {
        tokio::select! {
            biased;
            interim = told.next() => {
                let answered = {
                    let mut sending = pin!(send_interim(state, send, interim));
                    // What the app says while this waits for room is read on: of an app over HTTP/2 it would be kept without end.
                    let answered = tokio::select! {
                        biased;
                        sent = sending.as_mut() => {
                            sent?;
                            continue;
                        }
                        answered = call.as_mut() => answered,
                    };
                    sending.await?;
                    answered
                };
                while let Some(interim) = told.next().now_or_never() {
                    send_interim(state, send, interim).await?;
                }
                return Ok(answered);
            }
            answered = call.as_mut() => return Ok(answered),
            error = send.stopped() => return Err(ServeError::Body(error)),
        }
    }
}

/// Sends an interim answer ahead of the final one; one that no head can hold is left out.
async fn send_interim(
    state: &HttpState,
    send: &mut TunnelSend,
    (status, headers): (StatusCode, HeaderMap),
) -> Result<(), ServeError> {
    let has_status = send.put_status();
    let encoded = state.encode(|out| {
        put_status(out, has_status);
        let mut writer = HeadWriter::response(out, Payload::Empty, status);
        headers::write(&headers, &mut writer);
        writer.finish()
    });
    let Ok(encoded) = encoded else {
        send.take_status_back(has_status);
        return Ok(());
    };
    send.write(&mut [encoded]).await.map_err(ServeError::Body)
}

fn put_status(out: &mut BytesMut, has_status: bool) {
    if !has_status {
        out.extend_from_slice(&[STATUS_OK]);
    }
}

async fn read_head(recv: &mut RecvStream, inbox: &mut Inbox) -> Result<Bytes, ServeError> {
    loop {
        if let Some(block) = inbox.take_block().map_err(ServeError::Head)? {
            return Ok(block);
        }
        match recv.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => inbox.push(chunk.bytes),
            Ok(None) => return Err(ServeError::Truncated),
            Err(error) => return Err(ServeError::Body(BodyError::Read(error))),
        }
    }
}

/// Sends the app's response; `lasting` is told of one that does not come at once.
async fn relay(
    state: &HttpState,
    send: &mut TunnelSend,
    (response, second): (&mut Response<AppBody>, &Second),
    (exchange, is_grpc): (&mut Exchange, bool),
    lasting: impl FnOnce(),
) -> Result<(), ServeError> {
    let app_broke = |error, exchange: &mut Exchange| {
        if matches!(error, BodyError::App(_)) {
            exchange.finish(Flag::Reset);
        }
        ServeError::Body(error)
    };
    let first = match body::first(response.body_mut(), state).await {
        Ok(first) => first,
        Err(BodyError::App(error)) if is_grpc => {
            debug!(error = %error, "app broke off");
            return break_off_begun(state, send, response, exchange).await;
        }
        // Nothing was sent yet: an error answer is clearer than a reset, and does not make the caller's side try again.
        Err(BodyError::App(error)) => {
            debug!(error = %error, "app broke off");
            let refusal = Refusal::reset("the application broke off inside its response".to_owned());
            exchange.finish(Flag::Reset);
            exchange.status(refusal.status);
            return refuse_after(state, send, (refusal, second), is_grpc).await;
        }
        Err(error) => return Err(ServeError::Body(error)),
    };
    let First { frames: mut chunks, ended, mut trailers, bytes } = first;
    let payload = if ended && bytes == 0 && trailers.is_none() { Payload::Empty } else { Payload::Frames };
    let has_status = send.put_status();
    let encoded = state.encode(|out| {
        put_status(out, has_status);
        let mut writer = HeadWriter::response(out, payload, response.status());
        headers::write(response.headers(), &mut writer);
        second.write(&mut writer);
        writer.finish()
    });
    let Ok(encoded) = encoded else {
        send.take_status_back(has_status);
        exchange.finish(Flag::Reset);
        let refusal = Refusal {
            reason: Reason::HeadTooLarge,
            ..Refusal::reset("the application's response has too many or too long headers".to_owned())
        };
        return refuse_after(state, send, (refusal, second), is_grpc).await;
    };
    chunks.insert(0, encoded);
    send.write(&mut chunks).await.map_err(ServeError::Body)?;
    if ended {
        send.finish();
    } else {
        lasting();
        trailers = match body::pump(response.body_mut(), send, state).await {
            Ok(trailers) => trailers,
            Err(error) => return Err(app_broke(error, exchange)),
        };
    }
    if let Some(trailers) = trailers {
        exchange.grpc(&trailers);
    }
    exchange.finish(Flag::None);
    Ok(())
}

/// Says that the app of a gRPC call broke off after its head: in trailers, for an answer that is nothing but a status would
/// be tried again, and what has begun to answer is committed (gRFC A6).
async fn break_off_begun(
    state: &HttpState,
    send: &mut TunnelSend,
    response: &Response<AppBody>,
    exchange: &mut Exchange,
) -> Result<(), ServeError> {
    let trailers = Refusal::reset("the application broke off inside its response".to_owned()).into_trailers();
    exchange.finish(Flag::Reset);
    exchange.grpc(&trailers);
    let has_status = send.put_status();
    let encoded = state.encode(|out| {
        put_status(out, has_status);
        let mut writer = HeadWriter::response(out, Payload::Frames, response.status());
        headers::write(response.headers(), &mut writer);
        writer.finish()?;
        let mut writer = HeadWriter::trailers(out);
        headers::write_trailers(&trailers, &mut writer);
        writer.finish()
    });
    send.write(&mut [encoded.map_err(ServeError::Head)?]).await.map_err(ServeError::Body)?;
    send.finish();
    Ok(())
}

/// Says that the app broke off.
async fn broke_off(
    state: &HttpState,
    send: &mut TunnelSend,
    (local, exchange, second): (&LocalInstance, &mut Exchange, &Second),
    is_grpc: bool,
) -> Result<(), ServeError> {
    let refusal = Refusal::reset(format!("the application of `{}` broke off before it answered", local.service));
    exchange.finish(Flag::Reset);
    exchange.status(refusal.status);
    refuse_after(state, send, (refusal, second), is_grpc).await
}

/// Sends an answer of weft's own to a request that no app has seen, and counts it.
async fn turn_away(
    state: &HttpState,
    send: &mut TunnelSend,
    refusal: Refusal,
    (exchange, is_grpc): (&mut Exchange, bool),
) -> Result<(), ServeError> {
    exchange.finish(refusal.flag);
    exchange.status(refusal.status);
    refuse_after(state, send, (refusal, &Second::default()), is_grpc).await
}

/// Sends an answer of weft's own.
async fn refuse_after(
    state: &HttpState,
    send: &mut TunnelSend,
    (refusal, second): (Refusal, &Second),
    grpc: bool,
) -> Result<(), ServeError> {
    let reason = refusal.reason;
    let text = Bytes::from(format!("weft: {}\n", refusal.text));
    let response = refusal.into_response(grpc);
    let payload = if grpc { Payload::Empty } else { Payload::Frames };
    let has_status = send.put_status();
    let encoded = state.encode(|out| {
        put_status(out, has_status);
        let mut writer = HeadWriter::response(out, payload, response.status());
        headers::write(response.headers(), &mut writer);
        writer.header(&REASON, reason.as_str().as_bytes());
        if !grpc {
            writer.header(&header::CONTENT_LENGTH, text.len().to_string().as_bytes());
        }
        second.write(&mut writer);
        writer.finish()?;
        if !grpc {
            head::put_data_header(out, text.len());
            out.extend_from_slice(&text);
        }
        Ok(())
    });
    send.write(&mut [encoded.map_err(ServeError::Head)?]).await.map_err(ServeError::Body)?;
    send.finish();
    Ok(())
}

/// Sends a 101 and relays raw bytes until both sides end, or nothing moves for `idle`.
async fn switch(
    state: &HttpState,
    mut send: TunnelSend,
    (recv, mut inbox): (RecvStream, Inbox),
    (mut response, idle): (Response<AppBody>, Duration),
) -> Result<(), ServeError> {
    let upgraded = hyper::upgrade::on(&mut response);
    let has_status = send.put_status();
    let encoded = state.encode(|out| {
        put_status(out, has_status);
        let mut writer = HeadWriter::response(out, Payload::Upgrade, response.status());
        headers::write(response.headers(), &mut writer);
        if let Some(protocol) = response.headers().get(header::UPGRADE) {
            writer.header(&header::UPGRADE, protocol.as_bytes());
        }
        writer.finish()
    });
    let upgraded = upgraded.await.map_err(|error| ServeError::Body(BodyError::App(error.into())))?;
    send.write(&mut [encoded.map_err(ServeError::Head)?]).await.map_err(ServeError::Body)?;
    upgrade::relay(Raw::of::<AppIo>(upgraded), send, recv, inbox.take(), idle).await;
    Ok(())
}

/// Begins the span of a request whose caller's agent had it recorded.
fn begin_span(state: &HttpState, local: &LocalInstance, head: &RequestHead, is_grpc: bool) -> Option<Box<OpenSpan>> {
    let version = if is_multiplexed(local) { Version::HTTP_2 } else { Version::HTTP_11 };
    let asked = || trace::Asked::of((&head.method, Some(&head.path)), head.authority.as_ref(), (version, is_grpc));
    state.tracer.as_ref()?.begin(Side::Destination, &head.headers, asked)
}

//! WebSockets of apps over HTTP/2 (RFC 8441): an upgrade is asked for by an extended CONNECT, and answered as an upgrade.
//!
//! ```text
//!   upgrade, as weft's own head has it -> a connection of its own -> SETTINGS allow it? -> CONNECT, `:protocol` websocket
//!                                101, `sec-websocket-accept` <- 200 __/            \__ no: 501, and the app meets nothing
//! ```
//!
//! Invariants: an app whose SETTINGS do not allow it gets no extended CONNECT (§3); each WebSocket has a connection, as over
//! HTTP/1.1: one that lasts for days takes no stream from the requests, and holds nobody up who shares its window.
//! Not here: callers over HTTP/2 (`headers`), the bytes after it (`upgrade`).

use std::net::SocketAddr;
use std::rc::Rc;

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode};

use super::Dial;
use super::app_h2::AppBody;
use super::body::TunnelBody;
use super::call::CallError;
use super::pool::Pool;
use crate::proxy::head::{Payload, RequestHead};

const WEBSOCKET: &str = "websocket";
/// What a server joins to the caller's key to show that it understood (RFC 6455 §1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A WebSocket that a caller asks for.
pub(super) struct Handshake {
    key: Option<HeaderValue>,
}

impl Handshake {
    /// Reads it from a request's head; none: that asks for something else.
    pub(super) fn of(head: &RequestHead) -> Option<Self> {
        let asked = head.headers.get(header::UPGRADE).filter(|_| head.payload == Payload::Upgrade)?;
        let is_it = asked.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes());
        is_it.then(|| Self { key: head.headers.get(header::SEC_WEBSOCKET_KEY).cloned() })
    }

    /// Asks the app at `addr`; what it accepts is answered as an app over HTTP/1.1 would.
    ///
    /// # Errors
    /// [`CallError::NoWebsocket`] if the app takes none; else as any request.
    pub(super) async fn call<D: Dial>(
        self,
        worker: &Rc<D>,
        addr: SocketAddr,
        mut request: Request<TunnelBody>,
    ) -> Result<Response<AppBody>, CallError> {
        let sender = Pool::connect_for_websocket(worker, addr).await.map_err(CallError::Connect)?;
        let mut sender = sender.ok_or(CallError::NoWebsocket)?;
        *request.method_mut() = Method::CONNECT;
        request.extensions_mut().insert(hyper::ext::Protocol::from_static(WEBSOCKET));
        // HTTP/2 needs no proof (RFC 8441 §5): it is made here.
        request.headers_mut().remove(header::SEC_WEBSOCKET_KEY);
        let mut response = sender.send_request(request).await.map_err(|error| CallError::of_h2(error.into()))?;
        if response.status() == StatusCode::OK {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(header::UPGRADE, HeaderValue::from_static(WEBSOCKET));
            headers.extend(self.accept().map(|accept| (header::SEC_WEBSOCKET_ACCEPT, accept)));
        }
        Ok(response.map(AppBody::Http1))
    }

    /// The proof for the caller (RFC 6455 §4.2.2); none: it gave no key.
    fn accept(&self) -> Option<HeaderValue> {
        let joined = [self.key.as_ref()?.as_bytes(), GUID].concat();
        let text = base64::engine::general_purpose::STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, &joined));
        HeaderValue::try_from(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_of_a_handshake_is_that_of_the_rfc() {
        let key = Some(HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        assert_eq!(Handshake { key }.accept().unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(Handshake { key: None }.accept(), None);
    }
}

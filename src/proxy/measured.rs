//! The steps of a request's path that `cargo bench` measures one by one. For benchmarks alone; nothing in the agent calls it.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method};

use super::head::{self, HeadWriter, Inbox, Payload};
use super::{authorize, http::outbound};
use crate::authz::{Request, Table};
use crate::model::ServiceName;
use crate::pki::PeerIdentity;

/// Appends a request head to `out`; false if it breaks a bound.
pub fn encode_request(out: &mut BytesMut, method: &Method, target: (&str, &str), headers: &HeaderMap) -> bool {
    let (authority, path) = target;
    let mut writer = HeadWriter::request(out, Payload::Empty, method, (authority.as_bytes(), path.as_bytes()));
    for (name, value) in headers {
        writer.header(name, value.as_bytes());
    }
    writer.finish().is_ok()
}

/// Decodes a request head; returns the number of its headers, none if it is malformed.
pub fn decode_request(wire: Bytes) -> Option<usize> {
    let mut inbox = Inbox::default();
    inbox.push(wire);
    let block = inbox.take_block().ok()??;
    head::decode_request(&block).ok().map(|head| head.headers.len())
}

/// Returns the service that a host names.
pub fn service_of_host(host: &str) -> Option<ServiceName> {
    outbound::service_of_host(host)
}

/// Tells whether `peer` may send this request to `service`: what the destination asks of each.
pub fn is_authorized(table: &Table, peer: &PeerIdentity, service: &ServiceName, request: &Request<'_>) -> bool {
    authorize::in_time(peer).is_ok() && table.of_request(peer.id.service(), service, request, |_, _| {}).is_allowed()
}

//! Requests that are sent again: one layer repeats them, never two.
//!
//! ```text
//!   app A -> agent A --retry, `x-weft-retry`--> agent B -> app B --the header passed on--> agent B -> ...
//!                      its conditions decide      a fresh connection: nothing to repeat    no conditions here
//! ```
//!
//! Who repeats a request says so, and everybody behind it lets it fail. The one repetition that a destination makes by itself
//! (an app that closed an idle connection just then) is told to the caller's agent with the answer, and counts as one of its
//! own.

use http::header::{HeaderMap, HeaderName};

/// On a request: an app may have seen it before. On an answer: the destination has repeated the request. Apps get the former,
/// and pass it on with what they call for it, as they do with the headers of traces.
pub(super) const RETRY: HeaderName = HeaderName::from_static("x-weft-retry");
/// How often a gRPC library has sent the call before (gRFC A6).
const GRPC_PREVIOUS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");

/// Whether an app may have seen a request before, as far as the agent knows that sends it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Sent {
    /// It goes out for the first time; what did not reach an app does not count.
    #[default]
    First,
    /// It is a retry, or a copy beside another attempt.
    Again,
}

/// Whether somebody before this agent repeats the request: then nobody else does, but for what reached no app.
pub(super) fn is_repeat(headers: &HeaderMap) -> bool {
    headers.contains_key(RETRY) || headers.contains_key(GRPC_PREVIOUS)
}

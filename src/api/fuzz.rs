//! What a client's query string can say: see `crate::fuzz`.

#![allow(clippy::unwrap_used, reason = "a target fails by panicking")]

use super::query::{Blocking, Query, parse_duration};

/// A query that is taken is bounded, waits no longer than is allowed, and its durations are those that files have too.
pub(crate) fn query(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(uri) = format!("/v1/health/service/web?{text}").parse() else { return };
    let Ok(query) = Query::parse(&uri) else { return };
    let Ok(blocking) = Blocking::parse(&query) else { return };
    assert!(blocking.wait.as_secs() <= 600 && !blocking.wait.is_zero());
    let _either = query.switch("passing");
    for value in query.all("wait") {
        let (Some(here), Ok(there)) = (parse_duration(value), crate::config::parse_duration(value)) else { continue };
        // The one counts in floats, the other in whole nanoseconds.
        let slack = there / 1_000_000 + std::time::Duration::from_nanos(1000);
        assert!(here.abs_diff(there) <= slack, "{value}: {here:?} and {there:?}");
    }
}

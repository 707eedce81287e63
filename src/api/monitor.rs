//! `/v1/agent/monitor`: the agent's log, line by line, for as long as the client listens.

use std::convert::Infallible;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::StatusCode;

use super::call::{Call, Refusal, Reply, TEXT};
use crate::telemetry::{self, LogFormat};

/// `GET /v1/agent/monitor?loglevel=`: `info` unless a level is named; `logjson` gives one object a line.
pub(super) async fn monitor(call: Call) -> Result<Reply, Refusal> {
    let level = call.query.given("loglevel").unwrap_or(telemetry::FILTER_DEFAULT);
    let level = telemetry::level(level).ok_or_else(|| Refusal::bad(format!("Unknown log level: {level}")))?;
    let format = if call.query.switch("logjson")? { LogFormat::Json } else { LogFormat::Text };
    let lines = telemetry::monitor(level, format).map_err(|error| {
        let status = match error {
            telemetry::MonitorError::TooMany => StatusCode::TOO_MANY_REQUESTS,
            telemetry::MonitorError::NotLogging => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal::new(status, error.to_string())
    })?;
    let stop = call.shared.stop.clone();
    let body = stream::unfold((lines, stop), |(mut lines, stop)| async move {
        let line = tokio::select! {
            () = stop.cancelled() => None,
            line = lines.next() => line,
        };
        line.map(|line| (Ok::<Bytes, Infallible>(line), (lines, stop)))
    });
    Ok(Reply::Stream { body: Body::from_stream(body), content_type: TEXT })
}

//! Reads of what all agents share, with Consul's blocking queries.

use super::block::{take_place, with_jitter};
use super::call::{Call, Refusal};
use super::query::Blocking;
use crate::clock;
use crate::gossip::{Answer, SharedError, Space};
use crate::lww::{Refused, Scope};
use http::StatusCode;

/// Reads `scope`; waits first while its index is not above the one that the client has.
///
/// # Errors
/// 501 where the map is off, 429 if too many queries wait.
/// # Cancel safety
/// Cancelling gives the place back.
pub(super) async fn read(call: &Call, space: Space, scope: Scope, blocking: Blocking) -> Result<Answer, Refusal> {
    let (shared, records) = (&call.shared, &call.shared.records);
    let answer = records.read(space, scope.clone()).await?;
    // An index above all that was given out here is another agent's.
    let is_foreign = blocking.index > answer.newest;
    if blocking.index == 0 || is_foreign || answer.index > blocking.index {
        return Ok(answer);
    }
    // Who sleeps holds no values.
    drop(answer);
    let _permit = take_place(call)?;
    let deadline = clock::now() + with_jitter(blocking.wait);
    tokio::select! {
        () = shared.stop.cancelled() => {}
        changed = tokio::time::timeout_at(deadline, records.changed(space, scope.clone(), blocking.index)) => {
            if let Ok(changed) = changed {
                changed?;
            }
        }
    }
    Ok(records.read(space, scope).await?)
}

impl From<SharedError> for Refusal {
    fn from(error: SharedError) -> Self {
        if let SharedError::Refused(Refused::Ahead { ahead_ms }) = &error {
            let text = format!(
                "this agent's clock was ahead: it wrote {ahead_ms} ms in the future, and others would refuse what it writes \
                 until that time has come; set the clock right (NTP) and restart this agent, then write again"
            );
            return Self::new(StatusCode::SERVICE_UNAVAILABLE, text);
        }
        let status = match &error {
            SharedError::Off => StatusCode::NOT_IMPLEMENTED,
            SharedError::Refused(Refused::Full { .. } | Refused::Deletions { .. }) => StatusCode::INSUFFICIENT_STORAGE,
            SharedError::Refused(Refused::Value { .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            SharedError::Refused(Refused::Key { .. }) => StatusCode::BAD_REQUEST,
            SharedError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            SharedError::Crowded => StatusCode::TOO_MANY_REQUESTS,
            SharedError::Refused(Refused::Ahead { .. }) | SharedError::Closed => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

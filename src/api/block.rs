//! Blocking queries: wait until what was asked for changes, the time is up, or the agent stops.
//!
//! A query is woken by each snapshot and goes back to sleep unless its own index moved: other services' changes cost it
//! one comparison.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::watch;

use super::call::{Call, Refusal};
use super::meter::BlockingPermit;
use super::query::Blocking;
use crate::catalogue::Snapshot;
use crate::clock;

/// The wait is lengthened by up to a part of this size, so that queries that began together do not end together.
const JITTER_PART: u32 = 16;

/// Returns the snapshot to answer from and the index of the answer.
///
/// `changed` gives the index of the last change to what was asked for; 0: it was never there. Then the answer has the
/// snapshot's index, and only the appearance ends the wait. An index above the snapshot's own is another agent's, or of
/// a clock set back: it is answered at once.
///
/// # Errors
/// 429 if too many queries wait.
/// # Cancel safety
/// Cancelling gives the place back.
pub(super) async fn wait(
    call: &Call,
    blocking: Blocking,
    changed: impl Fn(&Snapshot) -> u64,
) -> Result<(Arc<Snapshot>, u64), Refusal> {
    let mut updates = call.shared.snapshot.subscribe();
    let mut snapshot = updates.borrow_and_update().clone();
    let has_news = |snapshot: &Snapshot| changed(snapshot) > blocking.index;
    let is_foreign = blocking.index > snapshot.index;
    if blocking.index > 0 && !is_foreign && !has_news(&snapshot) {
        let _permit = take_place(call)?;
        let deadline = clock::now() + with_jitter(blocking.wait);
        while !has_news(&snapshot) {
            let woken = tokio::select! {
                () = call.shared.stop.cancelled() => break,
                woken = tokio::time::timeout_at(deadline, updates.changed()) => woken,
            };
            // Late, or the publisher is gone: the newest state is the answer.
            if !matches!(woken, Ok(Ok(()))) {
                break;
            }
            snapshot = updates.borrow_and_update().clone();
        }
    }
    let index = match changed(&snapshot) {
        0 => snapshot.index,
        index => index,
    };
    Ok((snapshot, index))
}

/// As [`wait`], for what lies outside the snapshot: `read` gives the answer with its index, `changes` wakes when that may
/// have changed.
///
/// # Errors
/// 429 if too many queries wait; what `read` refuses.
/// # Cancel safety
/// Cancelling gives the place back.
pub(super) async fn wait_on<T>(
    call: &Call,
    blocking: Blocking,
    mut changes: watch::Receiver<()>,
    read: impl Fn() -> Result<(T, u64), Refusal>,
) -> Result<(T, u64), Refusal> {
    changes.mark_unchanged();
    let (mut answer, mut index) = read()?;
    // Zero asks for no wait; an index above is another agent's.
    if index != blocking.index {
        return Ok((answer, index));
    }
    let _permit = take_place(call)?;
    let deadline = clock::now() + with_jitter(blocking.wait);
    while index == blocking.index {
        let woken = tokio::select! {
            () = call.shared.stop.cancelled() => break,
            woken = tokio::time::timeout_at(deadline, changes.changed()) => woken,
        };
        (answer, index) = read()?;
        if !matches!(woken, Ok(Ok(()))) {
            break;
        }
    }
    Ok((answer, index))
}

/// Takes a place among the waiting queries.
pub(super) fn take_place(call: &Call) -> Result<BlockingPermit, Refusal> {
    let max = call.shared.blocking_queries_max;
    BlockingPermit::take(&call.shared.meter.blocking, max).ok_or_else(|| {
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, format!("Too many blocking queries: {max} wait already"))
    })
}

/// Lengthens `wait` by a random part.
pub(super) fn with_jitter(wait: Duration) -> Duration {
    wait + (wait / JITTER_PART).mul_f64(rand::random::<f64>())
}

//! Blocking queries: wait until what was asked for changes, the time is up, or the agent stops.
//!
//! A query sleeps until its own topic changes (`watchers`): other services' changes do not wake it, and it holds no snapshot.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::watch;

use super::call::{Call, Refusal};
use super::index::Topic;
use super::meter::BlockingPermit;
use super::query::Blocking;
use crate::catalogue::Snapshot;
use crate::clock;

/// The wait is lengthened by up to a part of this size, so that queries that began together do not end together.
const JITTER_PART: u32 = 16;

/// Returns the snapshot to answer from and the index of the answer: that of the last change to `topic`.
///
/// A topic that was never there gives the snapshot's index, and only the appearance ends the wait. An index above the
/// snapshot's own is another agent's, or of a clock set back: it is answered at once.
///
/// # Errors
/// 429 if too many queries wait.
/// # Cancel safety
/// Cancelling gives the place back.
pub(super) async fn wait(call: &Call, blocking: Blocking, topic: Topic) -> Result<(Arc<Snapshot>, u64), Refusal> {
    let shared = &call.shared;
    let newest = || {
        let snapshot = shared.snapshot.load();
        let index = topic.index(&snapshot, &shared.indexes);
        (snapshot, index)
    };
    let (mut snapshot, mut index) = newest();
    let is_foreign = blocking.index > snapshot.index;
    if blocking.index > 0 && !is_foreign && index <= blocking.index {
        let _permit = take_place(call)?;
        let mut watcher = shared.watchers.watch(topic.clone(), index);
        let deadline = clock::now() + with_jitter(blocking.wait);
        loop {
            (snapshot, index) = newest();
            if index > blocking.index {
                break;
            }
            drop(snapshot);
            let is_woken = tokio::select! {
                () = shared.stop.cancelled() => false,
                woken = tokio::time::timeout_at(deadline, watcher.changed()) => woken.is_ok(),
            };
            if !is_woken {
                (snapshot, index) = newest();
                break;
            }
        }
    }
    let index = if index == 0 { snapshot.index } else { index };
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

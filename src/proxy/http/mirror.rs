//! Copies of requests for mirrors, whose answers nobody waits for.
//!
//! ```text
//!   request --- head, body as it comes ---> instance -> answer
//!      `- head, and the body once it has come whole ---> mirror -> read and dropped
//! ```
//!
//! Invariants: a copy delays nothing: it takes what is kept for another attempt; it has bounds of its own in number, time and
//! bytes, and gives way to whatever matters. Not here: which requests are copied (`traffic`).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::Dial;
use super::attempt::{self, Upload};
use super::body::TunnelSend;
use super::outbound::Call;
use super::repeat::Sent;
use super::routed::Plan;
use crate::proxy::head::{Inbox, Payload};
use crate::proxy::{Opened, Source, StreamKind, Tried};
use crate::traffic::{Resolved, is_hit};
use crate::upstream::Priority;

/// Copies on their way to mirrors at once, per worker; more requests are not copied.
pub(super) const MIRRORS_MAX: usize = 256;
/// A copy is given up after this long, the time that its body takes to come included.
const MIRROR_TIME_MAX: Duration = Duration::from_secs(15);
/// Bytes that are read of a mirror's answer, so that its app sees no broken connection.
const MIRROR_ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Counts a copy on its way.
struct Copying(Rc<Cell<usize>>);

impl Drop for Copying {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

/// Sends a copy of a share of the requests elsewhere; nobody waits for it. A body that is short enough to be kept for another
/// attempt goes along once it has come whole.
pub(super) fn mirror<D: Dial>(worker: &Rc<D>, call: &Call<'_>, plan: &Plan<'_>, pending: Option<&Upload>) {
    let Some(mirror) = plan.forward.mirror.as_ref().filter(|mirror| is_hit(mirror.share, rand::random())) else {
        return;
    };
    let state = worker.http();
    let service = mirror.to.service.clone();
    let count = {
        let mirrored = state.traffic.mirrored.clone();
        move |outcome: &str| mirrored.with(&[service.as_str(), outcome]).inc()
    };
    if call.payload == Payload::Upgrade {
        return count("body_too_long");
    }
    if state.mirrors.get() >= MIRRORS_MAX {
        return count("too_many");
    }
    let Ok(head) = attempt::encode_head(state, call, None, Sent::First) else { return count("failed") };
    state.mirrors.set(state.mirrors.get() + 1);
    let copying = Copying(Rc::clone(&state.mirrors));
    let whole = pending.map(Upload::whole);
    let to = Resolved::plain(Arc::clone(&mirror.to));
    let (source, sending) = (plan.source.clone(), Rc::clone(worker));
    worker.spawn_untracked(async move {
        let _copying = copying;
        let copied = async {
            let frames = match whole {
                None => Vec::new(),
                Some(whole) => match whole.await {
                    Ok(Some(frames)) => frames,
                    Ok(None) => return "body_too_long",
                    Err(_it_never_came_whole) => return "failed",
                },
            };
            let is_sent = Box::pin(copy(&sending, &source, &to, (head, frames))).await.is_some();
            if is_sent { "sent" } else { "failed" }
        };
        count(tokio::time::timeout(MIRROR_TIME_MAX, copied).await.unwrap_or("failed"));
    });
}

/// Sends a copy and reads its answer to the end, or to the bound.
async fn copy<D: Dial>(
    worker: &Rc<D>,
    source: &Source,
    to: &Resolved,
    (head, frames): (Bytes, Vec<Bytes>),
) -> Option<()> {
    // A copy for a mirror gives way to whatever matters.
    let tried = Tried::new().of(Priority::Spare);
    let opened = worker.open_to(source, to, StreamKind::Http, &RefCell::new(tried)).await.ok()?;
    let Opened { send, mut recv, preamble, lease, .. } = opened;
    let _lease = lease;
    let mut send = TunnelSend::new(send);
    let mut chunks = vec![preamble, head];
    chunks.extend(frames);
    send.write(&mut chunks).await.ok()?;
    send.finish();
    let mut read: usize = 0;
    let mut inbox = Inbox::default();
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await.ok()? {
        if read == 0 {
            inbox.push(chunk.bytes.clone());
            if inbox.take_u8() != Some(0) {
                return None;
            }
        }
        read = read.saturating_add(chunk.bytes.len());
        if read > MIRROR_ANSWER_BYTES_MAX {
            break;
        }
    }
    (read > 0).then_some(())
}

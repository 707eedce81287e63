//! Writing policy for clients of the API: signed by this agent, if it has the right of an operator.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use super::Shared;
use super::call::Refusal;
use crate::catalogue::Externals;
use crate::clock::{self, UnixSeconds};
use crate::gossip::DocumentView;
use crate::pki::DocumentKey;
use crate::policy::{DocumentId, DocumentKind, Draft, DraftError};

/// How long a write waits for its own effect on this node; it is a matter of milliseconds.
const EFFECT_TIME_MAX: Duration = Duration::from_secs(2);

/// What a write must find to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expect {
    /// Anything.
    Any,
    /// This version; 0: nothing.
    Version(u64),
}

/// Finds a document that is held, deleted or not.
pub(super) fn held(shared: &Shared, id: &DocumentId) -> Option<(u64, UnixSeconds, bool)> {
    let view = shared.membership.documents();
    let found = view.documents.iter().find(|view| view.digest.id == *id)?;
    Some((found.digest.version, found.not_after, is_there(found)))
}

/// Whether a document of policy says something.
pub(super) fn is_there(view: &DocumentView) -> bool {
    use crate::gossip::DocumentBody::{Config, Intention};
    matches!(view.body, Intention(Some(_)) | Config(Some(_)))
}

/// The key that policy of clients is signed by. A call that turns out to change nothing asks for it too: what an agent may not
/// do it does not call done.
///
/// # Errors
/// 403 where this agent signs nothing.
pub(super) fn signer(shared: &Shared) -> Result<&DocumentKey, Refusal> {
    shared.policy_key.as_deref().ok_or_else(|| {
        Refusal::forbidden(
            "Permission denied: this agent signs no policy for clients. Sign it yourself (`weft intention`, `weft config` \
             with WEFT_OPERATOR=FILE), or send the request with the admin token to an agent that has `policy_authority` set",
        )
    })
}

/// Signs the next version of `draft` and spreads it; returns once it counts here. False: `expect` is not met.
///
/// # Errors
/// 403 where this agent signs nothing or its operator may not, and what the documents refuse.
pub(super) async fn write(shared: &Shared, draft: Draft, expect: Expect) -> Result<bool, Refusal> {
    let key = signer(shared)?;
    // One after the other: two writers would else sign one version twice.
    let _turn = shared.policy_writes.lock().await;
    let id = draft.id().clone();
    let held = held(shared, &id);
    let version = held.map_or(0, |(version, ..)| version);
    let shown = held.filter(|(.., is_there)| *is_there).map_or(0, |(version, ..)| version);
    if let Expect::Version(wanted) = expect
        && wanted != shown
    {
        return Ok(false);
    }
    let document = draft.sign(version + 1, held.map(|(_, ends, _)| ends), key, clock::wall())?;
    let (before, traffic_before) = {
        let snapshot = shared.snapshot.load();
        (snapshot.policy_index, snapshot.traffic_index)
    };
    shared.membership.offer(document.to_bytes()).await?;
    match id.kind {
        DocumentKind::Intention => in_effect(shared, id.name.as_str(), version + 1, before).await,
        DocumentKind::Config => entries_in_effect(shared, traffic_before).await,
        DocumentKind::Bundle | DocumentKind::Revocation => {}
    }
    Ok(true)
}

/// Waits until the table of this node's data plane is newer than `before` and holds `version`, or no longer.
pub(super) async fn in_effect(shared: &Shared, name: &str, version: u64, before: u64) {
    let mut updates = shared.snapshot.subscribe();
    let waiting = async {
        loop {
            let snapshot = updates.borrow_and_update().clone();
            let quarantined = snapshot.policy.quarantined().iter().find(|one| one.name == name);
            let guard = snapshot.policy.guard(name).map(|guard| guard.origin().version);
            let shown = quarantined.map(|one| one.version).or(guard);
            // None: it is deleted, once the table is a new one.
            if snapshot.policy_index > before && shown.is_none_or(|shown| shown >= version) {
                return;
            }
            if updates.changed().await.is_err() {
                return;
            }
        }
    };
    let _late = tokio::time::timeout(EFFECT_TIME_MAX, waiting).await;
}

/// Waits until the chains of this node's data plane are newer than `before`.
pub(super) async fn entries_in_effect(shared: &Shared, before: u64) {
    let mut updates = shared.snapshot.subscribe();
    let is_newer = updates.wait_for(|snapshot| snapshot.traffic_index > before);
    let _late = tokio::time::timeout(EFFECT_TIME_MAX, is_newer).await;
}

/// Waits until nodes without an agent are shown as others than in `before`.
pub(super) async fn externals_in_effect(shared: &Shared, before: &Arc<Externals>) {
    let mut updates = shared.snapshot.subscribe();
    let is_newer = updates.wait_for(|snapshot| !Arc::ptr_eq(&snapshot.externals, before));
    let _late = tokio::time::timeout(EFFECT_TIME_MAX, is_newer).await;
}

impl From<DraftError> for Refusal {
    fn from(error: DraftError) -> Self {
        let text = crate::telemetry::Chain(&error).to_string();
        match &error {
            DraftError::Document(_) | DraftError::Compile(_) => Self::bad(text),
            DraftError::NotAllowed { .. } | DraftError::EndsEarly { .. } => {
                Self::forbidden(format!("Permission denied: {text}"))
            }
            DraftError::Key(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, text),
        }
    }
}

//! What one stream says: a message at once, and another whenever it would be a different one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::attest::{Caller, META_USER};
use super::message;
use super::rpc::{Code, Status};
use super::wallet::Wallet;
use crate::clock::{self, UnixSeconds};
use crate::pki::Identity;
use crate::registry::LocalState;
use crate::telemetry::Chain;

/// Most certificates in one message: with chains and sixteen roots of the largest size they stay below the 4 MiB at which
/// gRPC clients refuse a message.
pub(super) const SVIDS_MAX: usize = 48;
/// A stream looks at the wall clock at least so often: it may jump.
const LOOK: Duration = Duration::from_secs(30);

/// What is streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// The caller's certificates, each with the roots.
    Svids,
    /// The roots alone.
    Bundles,
}

/// Where all streams take their news from.
#[derive(Debug)]
pub(super) struct Source {
    registry: watch::Receiver<Arc<LocalState>>,
    identity: Arc<Identity>,
    wallet: Wallet,
    /// One line is enough.
    is_overflow_told: AtomicBool,
    stop: CancellationToken,
}

impl Source {
    pub(super) fn new(
        registry: watch::Receiver<Arc<LocalState>>,
        identity: Arc<Identity>,
        stop: CancellationToken,
    ) -> Self {
        let wallet = Wallet::new(Arc::clone(&identity));
        Self { registry, identity, wallet, is_overflow_told: AtomicBool::new(false), stop }
    }

    /// Cancelled when the agent stops.
    pub(super) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Says what `caller` is to know at `now`, and when to look again.
    fn say(&self, subject: Subject, caller: &Caller, now: UnixSeconds) -> Result<(Bytes, UnixSeconds), Status> {
        let state = Arc::clone(&self.registry.borrow());
        let bundle = self.identity.bundle();
        let own = caller.services(&state);
        if own.is_empty() {
            return Err(denied(caller));
        }
        let soon = now.plus(LOOK);
        if subject == Subject::Bundles {
            return Ok((message::frame(&message::bundles(&bundle)), soon));
        }
        let registered: BTreeSet<_> = state.services.values().map(|service| &service.definition.record.name).collect();
        self.wallet.retain(&registered);
        if own.len() > SVIDS_MAX && !self.is_overflow_told.swap(true, Ordering::Relaxed) {
            warn!(
                uid = caller.uid,
                services = own.len(),
                svids_max = SVIDS_MAX,
                "a user has more services than fit a message; the last by name get no certificate"
            );
        }
        let (mut made, mut refused) = (Vec::new(), None);
        for service in own.iter().take(SVIDS_MAX) {
            match self.wallet.svid(service, now) {
                Ok(kept) => made.push(kept),
                Err(error) => refused = Some(error),
            }
        }
        if let (true, Some(error)) = (made.is_empty(), refused) {
            return Err(Status { code: Code::Unavailable, message: Chain(&error).to_string() });
        }
        let first = made.iter().map(|kept| kept.renew_at).min().unwrap_or(soon);
        let message = message::svids(made.iter().map(|kept| &*kept.svid), &bundle);
        Ok((message::frame(&message), first.min(soon)))
    }
}

fn denied(caller: &Caller) -> Status {
    let uid = caller.uid;
    let message = format!(
        "no identity issued: no service that is registered on this node names user {uid}; register it with Meta \
         \"{META_USER}\" = \"{uid}\""
    );
    Status { code: Code::PermissionDenied, message }
}

/// The state of one stream.
#[derive(Debug)]
pub(super) struct Feed {
    source: Arc<Source>,
    subject: Subject,
    caller: Caller,
    registry: watch::Receiver<Arc<LocalState>>,
    identity: watch::Receiver<()>,
    said: Option<Bytes>,
}

impl Feed {
    pub(super) fn new(source: Arc<Source>, subject: Subject, caller: Caller) -> Self {
        let (registry, identity) = (source.registry.clone(), source.identity.subscribe());
        Self { source, subject, caller, registry, identity, said: None }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The status with which the stream ends: the caller's identities are gone, or the agent stops.
    /// # Cancel safety
    /// Cancelling loses no message.
    pub(super) async fn next(&mut self) -> Result<Bytes, Status> {
        loop {
            self.registry.mark_unchanged();
            self.identity.mark_unchanged();
            let now = clock::wall();
            let (message, look_at) = self.source.say(self.subject, &self.caller, now)?;
            if self.said.as_ref() != Some(&message) {
                self.said = Some(message.clone());
                return Ok(message);
            }
            let pause = look_at.since(now).clamp(Duration::from_secs(1), LOOK);
            let is_open = tokio::select! {
                () = self.source.stop.cancelled() => false,
                changed = self.registry.changed() => changed.is_ok(),
                changed = self.identity.changed() => changed.is_ok(),
                () = tokio::time::sleep(pause) => true,
            };
            if !is_open {
                let message = "the agent stops; connect again".to_owned();
                return Err(Status { code: Code::Unavailable, message });
            }
        }
    }
}

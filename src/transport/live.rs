//! The open connections of one endpoint or of all workers, held against what is trusted as that changes.
//!
//! ```text
//!   verified -> add -> LiveEntry (lives as long as somebody uses the connection)
//!                        recheck(bundle, now): revoked, or ended and not renewed -> closed
//! ```
//!
//! A handshake checks a chain once; a connection may live for days. So each one's keys are remembered, and a revocation
//! closes the connections that were opened with them, in whatever thread they run. A connection outlives the leaf that it
//! was opened with (one hour) as long as its node's own certificate is good, or the node has renewed it: long streams
//! are not cut by a renewal.
//!
//! Invariant: a chain that is revoked between its check and its entry here is found: [`LiveConnections::add`] is followed
//! by another look at the revocations (`Credentials::recheck`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::UnixSeconds;
use crate::model::NodeName;
use crate::pki::{Presented, TrustBundle};

/// Application code of a connection whose peer is no longer believed.
const CODE_UNVERIFIED: u32 = 1;

#[derive(Debug)]
struct Live {
    connection: quinn::Connection,
    shown: Presented,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    live: BTreeMap<u64, Live>,
}

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A key of its chain, or its node, was revoked.
    Revoked,
    /// Its node's certificate ended and the node shows no newer one.
    Ended,
}

impl Cause {
    /// The cause as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Ended => "ended",
        }
    }
}

/// A connection that [`LiveConnections::recheck`] closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Whose it was.
    pub node: NodeName,
    /// Why.
    pub cause: Cause,
}

/// The table. Cloning shares it; written when a connection opens or ends, never by a request.
#[derive(Debug, Clone, Default)]
pub struct LiveConnections(Arc<Mutex<Table>>);

impl LiveConnections {
    /// Remembers `connection`, whose verified peer showed `shown`, until the entry is dropped.
    pub(crate) fn add(&self, connection: quinn::Connection, shown: Presented) -> LiveEntry {
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        table.live.insert(number, Live { connection, shown });
        LiveEntry { table: self.clone(), number: Some(number) }
    }

    /// Closes what `bundle` no longer believes; `is_current` tells whether a node shows a certificate that is good.
    pub fn recheck(
        &self,
        bundle: &TrustBundle,
        now: UnixSeconds,
        is_current: impl Fn(&NodeName) -> bool,
    ) -> Vec<Closed> {
        let mut closed = Vec::new();
        self.table().live.retain(|_, Live { connection, shown }| {
            if connection.close_reason().is_some() {
                return false;
            }
            let (cause, reason) = match bundle.revoked.check(shown) {
                Err(revoked) => (Cause::Revoked, revoked.to_string()),
                Ok(()) if now > shown.signers_end && !is_current(&shown.node) => {
                    (Cause::Ended, "the node's certificate has ended".to_owned())
                }
                Ok(()) => return true,
            };
            connection.close(CODE_UNVERIFIED.into(), reason.as_bytes());
            closed.push(Closed { node: shown.node.clone(), cause });
            false
        });
        closed
    }

    /// How many are held.
    pub fn len(&self) -> usize {
        self.table().live.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps one connection in the table.
#[derive(Debug)]
pub(crate) struct LiveEntry {
    table: LiveConnections,
    /// None: the entry stays until its connection has closed.
    number: Option<u64>,
}

impl LiveEntry {
    /// Leaves the connection in the table until it has closed: for owners who close explicitly.
    pub(crate) fn until_closed(mut self) {
        self.number = None;
    }
}

impl Drop for LiveEntry {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let removed = self.table.table().live.remove(&number);
        // The last handle closes the connection: not while the table is locked.
        drop(removed);
    }
}

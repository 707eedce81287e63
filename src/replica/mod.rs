//! Replicated state with a single writer: every node owns its records, signs them, and everybody holds all.
//!
//! ```text
//!   publish(records) --> head n+1, signed --> Delta ~~gossip~~> apply: order, lease, signature, hash -> swap
//!                                                                 |
//!   set_hash  differs? -> bucket_hashes -> differing -> digests -> newer_than / wanted -> delta_for  (anti-entropy)
//! ```
//!
//! The invariant, as a formula. A replica maps nodes to states; for one node
//!
//! ```text
//!   merge(a, b) = max by (generation, version, -hash)           hash = first 8 bytes of SHA-256(head)
//!   merge(R, S) = { node: merge(R[node], S[node]) }             a node that is missing is less than any state
//! ```
//!
//! The maximum of a total order is commutative, associative and idempotent, so replicas that have seen the same heads
//! hold the same states, in whatever order, however often and over whomever they came. The head names the hash of
//! everything that was published, so equal heads mean equal states.
//!
//! Further invariants:
//! - a state is exactly what its owner signed: a delta is built aside, compared with the head's hash, its signature
//!   verified, and only then swapped in; anything else leaves the replica as it was;
//! - a node speaks only for itself (the head's node is the certificate's) and, for what the catalogue sees, only for the
//!   services of its scope; what is outside is kept aside, since hashes stay over what was published;
//! - every head is a lease: what is not refreshed goes away everywhere, so removals of whole nodes need no tombstones;
//! - every size that a peer can influence has a bound in [`Params`].
//!
//! Not here: sockets, timers and when to synchronise (`gossip`); how certificates are checked (`pki`, by
//! [`HeadVerifier`]); who is alive (`membership`); what the data plane sees (`catalogue`).

mod head;
mod outcome;
mod state;
mod sync;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use self::head::{Base, NodeHead, chain_hash, sha256};
pub use self::head::{Delta, Digest, HeadSigner, HeadVerifier, VerifiedHead};
pub use self::outcome::{Applied, ApplyError, PublishError, Report};
pub use self::state::NodeState;
use self::state::{Draft, Names, Signed};
pub use self::sync::BUCKETS;
use crate::clock::UnixSeconds;
use crate::model::{Entry, EntryKey, Generation, NodeName};
use crate::wire::WireError;

/// The bounds of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// Largest state of one node, encoded. Some 300 instances; fits one frame with its chain.
    pub node_bytes_max: usize,
    /// Most nodes held. A mesh of 10,000 with room for the names of last hour.
    pub nodes_max: usize,
    /// Removals remembered per node. Whoever is further behind gets the whole state.
    pub grave_max: usize,
    /// How long a head is valid in a mesh of up to [`Params::lease_nodes`]. An hour of silence costs a node its records.
    pub lease: Duration,
    /// In a larger mesh leases are longer in proportion, so that their renewal costs everybody the same in a mesh of any size:
    /// a renewal is 300 bytes that each node sends ten times, 50 B/s of an idle node's traffic.
    pub lease_nodes: usize,
    /// Longest lease: as long as a failed member is remembered.
    pub lease_max: Duration,
    /// How far ahead a head's end may lie: the longest lease and an hour of clock error.
    pub lease_ahead_max: Duration,
    /// Largest chain, encoded. Two ECDSA certificates take 2 KiB.
    pub chain_bytes_max: usize,
    /// Largest signature. ECDSA P-256 in DER takes 72 bytes.
    pub signature_bytes_max: usize,
    /// Reports kept until they are taken; further ones are counted.
    pub reports_max: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            node_bytes_max: 64 * 1024,
            nodes_max: 16_384,
            grave_max: 64,
            lease: Duration::from_hours(1),
            lease_nodes: 25,
            lease_max: Duration::from_hours(72),
            lease_ahead_max: Duration::from_hours(73),
            chain_bytes_max: 16 * 1024,
            signature_bytes_max: 256,
            reports_max: 256,
        }
    }
}

/// One node's copy of everybody's state. One owner; readers get what they need through the catalogue.
#[derive(Debug)]
pub struct Replica {
    local: NodeName,
    generation: Generation,
    params: Params,
    nodes: BTreeMap<NodeName, NodeState>,
    names: Names,
    /// Per bucket: the heads' hashes, combined by exclusive or.
    buckets: [u64; BUCKETS],
    reports: VecDeque<Report>,
    reports_lost: u64,
    /// How long the own head was signed for.
    lease: Duration,
}

impl Replica {
    /// Makes the empty replica of node `local` in its life `generation`.
    pub fn new(local: NodeName, generation: Generation, params: Params) -> Self {
        Self {
            local,
            generation,
            params,
            nodes: BTreeMap::new(),
            names: Names::default(),
            buckets: [0; BUCKETS],
            reports: VecDeque::new(),
            reports_lost: 0,
            lease: Duration::ZERO,
        }
    }

    /// Publishes `records` as the whole state of this node and returns the way from the last version to it.
    ///
    /// `records` holds the node's facts, services and checks, each under its own key. Returns none where nothing changed,
    /// less than half of the lease is gone and the chain is the same.
    ///
    /// # Errors
    /// Every variant of [`PublishError`]; the state is unchanged.
    pub fn publish(
        &mut self,
        records: BTreeMap<EntryKey, Entry>,
        signer: &dyn HeadSigner,
        now: UnixSeconds,
    ) -> Result<Option<Delta>, PublishError> {
        let misplaced = records.iter().find(|(key, entry)| entry.key() != **key || !self.is_local_entry(entry));
        if let Some((key, _)) = misplaced {
            return Err(PublishError::Misplaced { key: key.clone() });
        }
        let chain = signer.chain();
        let chain_hash = chain_hash(&chain).map_err(PublishError::Encode)?;
        let before = self.nodes.get(&self.local);
        let have = before.map_or_else(|| Digest::none(self.local.clone()), |state| state.digest().clone());
        let version = have.version.checked_add(1).ok_or(PublishError::Exhausted)?;
        let has_same_chain = before.is_some_and(|state| state.signed.head.chain_hash == chain_hash);
        let (draft, is_changed) = self.draft_own(records, version);
        if has_same_chain && !is_changed && !before.is_some_and(|state| self.is_refresh_due(state, now)) {
            return Ok(None);
        }
        let chain_bytes = chain.iter().map(Vec::len).sum();
        if chain_bytes > self.params.chain_bytes_max {
            return Err(PublishError::ChainTooLarge { bytes: chain_bytes, bytes_max: self.params.chain_bytes_max });
        }
        let encoded = draft.encode().map_err(|source| self.publish_too_large(source))?;
        if encoded.len() > self.params.node_bytes_max {
            return Err(PublishError::TooLarge { bytes: encoded.len(), bytes_max: self.params.node_bytes_max });
        }
        let lease = self.next_lease();
        let head = NodeHead {
            node: self.local.clone(),
            generation: self.generation,
            version,
            state_hash: sha256(&encoded),
            not_after: now.plus(lease),
            chain_hash,
        };
        let message = head.message().map_err(PublishError::Encode)?;
        let signature = signer.sign(&message).map_err(PublishError::Sign)?;
        let chain_since = before.filter(|_| has_same_chain).map_or(version, |state| state.chain_since);
        let not_after = head.not_after;
        let signed = Signed { digest: head.digest(), head, signature, chain: Arc::new(chain) };
        let state = draft.finish(signed, chain_since, not_after, &mut self.names);
        let delta = state.delta_from(&have);
        self.lease = lease;
        self.swap_in(state);
        Ok(delta)
    }

    /// Merges `delta` and says what became of it.
    ///
    /// # Errors
    /// Every variant of [`ApplyError`]; the replica is unchanged.
    pub fn apply(
        &mut self,
        delta: &Delta,
        verifier: &dyn HeadVerifier,
        now: UnixSeconds,
    ) -> Result<Applied, ApplyError> {
        let node = delta.node();
        let digest = delta.digest();
        let held = self.nodes.get(node);
        let order = held.map_or(Ordering::Greater, |state| digest.rank_cmp(state.digest()));
        let is_fork = held.is_some_and(|state| digest.forks_from(state.digest()));
        if digest.version == 0 {
            return Err(ApplyError::Malformed { node: node.clone(), what: "its version is 0" });
        }
        if order != Ordering::Greater && !is_fork {
            return Ok(Applied::Stale);
        }
        if *node == self.local && held.is_none() && digest.generation <= self.generation {
            return Ok(Applied::Stale);
        }
        self.check_bounds(delta, now)?;
        let Some(chain) = self.chain_of(delta)? else { return Ok(Applied::Behind) };
        let verified = verify(delta, &chain, verifier)?;
        if *node == self.local {
            return Err(ApplyError::OwnName { generation: digest.generation });
        }
        if order != Ordering::Greater {
            self.report_fork(&digest);
            return Ok(Applied::Stale);
        }
        if held.is_none() && self.nodes.len() >= self.params.nodes_max {
            return Err(ApplyError::Full { node: node.clone(), nodes_max: self.params.nodes_max });
        }
        let Some(mut draft) = self.draft_from(delta)? else { return Ok(Applied::Behind) };
        let out_of_scope = draft.withhold(&verified.scope);
        let has_same_chain = held.filter(|state| state.signed.head.chain_hash == delta.head.chain_hash);
        let chain_since = match delta.base {
            Base::Version(_) => has_same_chain.map_or(digest.version, |state| state.chain_since),
            Base::Nothing => digest.version,
        };
        let not_after = delta.head.not_after.min(verified.not_after);
        let head = delta.head.clone();
        let signed = Signed { head, digest: digest.clone(), signature: delta.signature.clone(), chain };
        let state = draft.finish(signed, chain_since, not_after, &mut self.names);
        self.swap_in(state);
        if is_fork {
            self.report_fork(&digest);
        }
        if !out_of_scope.is_empty() {
            let node = digest.node.clone();
            self.report(Report::OutOfScope { node, version: digest.version, services: out_of_scope });
        }
        Ok(Applied::Updated)
    }

    /// Returns what `node` published.
    pub fn state(&self, node: &NodeName) -> Option<&NodeState> {
        self.nodes.get(node)
    }

    /// Returns everybody's state, in order of name, this node's own included.
    pub fn nodes(&self) -> impl Iterator<Item = (&NodeName, &NodeState)> {
        self.nodes.iter()
    }

    /// Forgets `node`; its own state a node never forgets. Whoever still holds it may bring it back.
    pub fn remove(&mut self, node: &NodeName) {
        if *node == self.local {
            return;
        }
        if let Some(state) = self.nodes.remove(node) {
            self.toggle(state.digest());
        }
    }

    /// Forgets every other node whose chain `is_good` refuses, and returns their names, in order.
    pub fn drop_unless(&mut self, is_good: impl Fn(&[Vec<u8>]) -> bool) -> Vec<NodeName> {
        let is_bad = |(name, state): &(&NodeName, &NodeState)| **name != self.local && !is_good(&state.signed.chain);
        let bad: Vec<NodeName> = self.nodes.iter().filter(is_bad).map(|(name, _)| name.clone()).collect();
        for node in &bad {
            self.remove(node);
        }
        bad
    }

    /// Forgets every other node whose lease or certificate ended by `now` and returns their names, in order.
    pub fn expire(&mut self, now: UnixSeconds) -> Vec<NodeName> {
        let is_over = |(name, state): &(&NodeName, &NodeState)| **name != self.local && state.not_after <= now;
        let ended: Vec<NodeName> = self.nodes.iter().filter(is_over).map(|(name, _)| name.clone()).collect();
        for node in &ended {
            self.remove(node);
        }
        ended
    }

    /// Takes what was reported since the last call, oldest first.
    pub fn take_reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.reports).into()
    }

    /// Returns how many reports found no room since the start.
    pub fn reports_lost(&self) -> u64 {
        self.reports_lost
    }

    fn is_local_entry(&self, entry: &Entry) -> bool {
        !matches!(entry, Entry::Node(info) if info.name != self.local)
    }

    fn publish_too_large(&self, error: WireError) -> PublishError {
        match error {
            WireError::TooLarge { bytes, .. } => {
                PublishError::TooLarge { bytes, bytes_max: self.params.node_bytes_max }
            }
            other => PublishError::Encode(other),
        }
    }

    /// Builds the own state at `version` and tells whether it differs from the one before.
    fn draft_own(&self, records: BTreeMap<EntryKey, Entry>, version: u64) -> (Draft, bool) {
        let Some(before) = self.nodes.get(&self.local) else {
            let mut draft = Draft::from_nothing(version);
            for entry in records.into_values() {
                draft.set(version, entry);
            }
            return (draft, true);
        };
        let mut draft = Draft::from_state(before);
        let removed: Vec<EntryKey> = before.keys().filter(|key| !records.contains_key(key)).collect();
        let mut is_changed = !removed.is_empty();
        for key in removed {
            draft.remove(version, key, self.params.grave_max);
        }
        for entry in records.into_values().filter(|entry| !before.holds(entry)) {
            draft.set(version, entry);
            is_changed = true;
        }
        (draft, is_changed)
    }

    /// Returns how long the own head is valid, by how many nodes are known.
    pub fn next_lease(&self) -> Duration {
        let times = self.nodes.len().div_ceil(self.params.lease_nodes.max(1)).max(1);
        let lease = self.params.lease.saturating_mul(u32::try_from(times).unwrap_or(u32::MAX));
        lease.min(self.params.lease_max.max(self.params.lease))
    }

    /// Tells whether half of the lease is gone. A node-specific eighth earlier, so that a mesh that started at one
    /// moment does not refresh at one moment.
    fn is_refresh_due(&self, state: &NodeState, now: UnixSeconds) -> bool {
        // Nodes that came or went since change the next lease and not this one: no renewal of all at once.
        let lease = self.lease.as_secs();
        let early = state.digest().hash.checked_rem(lease / 8).unwrap_or(0);
        // A lease that ends further ahead than a whole one was signed by a clock that went back since.
        let left = state.not_after.since(now).as_secs();
        left <= lease / 2 + early || left > lease
    }

    /// Checks sizes, order and lease: what needs no signature.
    fn check_bounds(&self, delta: &Delta, now: UnixSeconds) -> Result<(), ApplyError> {
        let Delta { head, signature, chain, changes, removed, .. } = delta;
        let Params { chain_bytes_max, signature_bytes_max, grave_max, .. } = self.params;
        let node = || head.node.clone();
        let malformed = |what| Err(ApplyError::Malformed { node: node(), what });
        let too_large = |what, bytes, bytes_max| Err(ApplyError::TooLarge { node: node(), what, bytes, bytes_max });
        if head.not_after <= now {
            return Err(ApplyError::LeaseOver { node: node(), not_after: head.not_after, now });
        }
        if head.not_after > now.plus(self.params.lease_ahead_max) {
            return Err(ApplyError::LeaseAhead { node: node(), not_after: head.not_after, now });
        }
        if signature.len() > signature_bytes_max {
            return too_large("signature", signature.len(), signature_bytes_max);
        }
        let chain_bytes = chain.iter().flatten().map(Vec::len).sum();
        if chain_bytes > chain_bytes_max {
            return too_large("certificate chain", chain_bytes, chain_bytes_max);
        }
        if removed.len() > grave_max {
            return malformed("it removes more keys than are remembered");
        }
        if delta.base == Base::Nothing && !removed.is_empty() {
            return malformed("it removes keys from nothing");
        }
        let after = if let Base::Version(version) = delta.base { version } else { 0 };
        let mut seen = BTreeSet::new();
        for change in changes {
            if change.version <= after || change.version > head.version {
                return malformed("an entry changed at a version that it does not lead over");
            }
            if matches!(&change.entry, Entry::Node(info) if info.name != head.node) {
                return malformed("its facts name another node");
            }
            if !seen.insert(change.entry.key()) {
                return malformed("an entry stands there twice");
            }
        }
        if removed.iter().any(|key| seen.contains(key)) {
            return malformed("it sets and removes one key");
        }
        Ok(())
    }

    /// Returns the chain that the head names: the delta's or the one that is held; none if neither is at hand.
    fn chain_of(&self, delta: &Delta) -> Result<Option<Arc<Vec<Vec<u8>>>>, ApplyError> {
        let held = self.nodes.get(delta.node()).filter(|state| state.signed.head.chain_hash == delta.head.chain_hash);
        match (&delta.chain, held) {
            (Some(chain), _) if chain_hash(chain).ok() != Some(delta.head.chain_hash) => {
                Err(ApplyError::Chain { node: delta.node().clone() })
            }
            (_, Some(state)) => Ok(Some(Arc::clone(&state.signed.chain))),
            (Some(chain), None) => Ok(Some(Arc::new(chain.clone()))),
            (None, None) => Ok(None),
        }
    }

    /// Builds the state that `delta` leads to; none if that takes a base that is not held.
    fn draft_from(&self, delta: &Delta) -> Result<Option<Draft>, ApplyError> {
        let node = delta.node();
        let mut draft = match delta.base {
            Base::Nothing => Draft::from_nothing(delta.head.version),
            Base::Version(base) => {
                let is_base = |state: &&NodeState| {
                    state.generation == delta.head.generation && (base..delta.head.version).contains(&state.version)
                };
                match self.nodes.get(node).filter(is_base) {
                    Some(state) => Draft::from_state(state),
                    None => return Ok(None),
                }
            }
        };
        for key in &delta.removed {
            draft.remove(delta.head.version, key.clone(), self.params.grave_max);
        }
        for change in &delta.changes {
            draft.set(change.version, change.entry.clone());
        }
        let bytes_max = self.params.node_bytes_max;
        let too_large = |bytes| ApplyError::TooLarge { node: node.clone(), what: "state", bytes, bytes_max };
        let encoded = draft.encode().map_err(|error| match error {
            WireError::TooLarge { bytes, .. } => too_large(bytes),
            _ => ApplyError::Malformed { node: node.clone(), what: "its state does not encode" },
        })?;
        if sha256(&encoded) != delta.head.state_hash {
            return match delta.base {
                // The base may be another one than the sender's (a fork); the whole state settles it.
                Base::Version(_) => Ok(None),
                Base::Nothing => Err(ApplyError::StateHash { node: node.clone() }),
            };
        }
        if encoded.len() > bytes_max {
            return Err(too_large(encoded.len()));
        }
        Ok(Some(draft))
    }

    fn swap_in(&mut self, state: NodeState) {
        self.toggle(state.digest());
        if let Some(before) = self.nodes.insert(state.node().clone(), state) {
            self.toggle(before.digest());
        }
    }

    /// Adds a head to its bucket's hash or takes it out: exclusive or is its own inverse.
    fn toggle(&mut self, digest: &Digest) {
        if let Some(bucket) = self.buckets.get_mut(sync::bucket_of(&digest.node)) {
            *bucket ^= digest.hash;
        }
    }

    fn report_fork(&mut self, digest: &Digest) {
        let Some(state) = self.nodes.get_mut(&digest.node) else { return };
        if std::mem::replace(&mut state.fork_reported, true) {
            return;
        }
        let Digest { node, generation, version, .. } = digest.clone();
        self.report(Report::Fork { node, generation, version });
    }

    fn report(&mut self, report: Report) {
        if self.reports.len() < self.params.reports_max {
            self.reports.push_back(report);
        } else {
            self.reports_lost = self.reports_lost.saturating_add(1);
        }
    }
}

/// Verifies the delta's head under `chain`.
fn verify(delta: &Delta, chain: &[Vec<u8>], verifier: &dyn HeadVerifier) -> Result<VerifiedHead, ApplyError> {
    let node = delta.node().clone();
    let message = delta
        .head
        .message()
        .map_err(|_| ApplyError::Malformed { node: node.clone(), what: "its head does not encode" })?;
    let verified = verifier
        .verify(chain, &message, &delta.signature)
        .map_err(|reason| ApplyError::Signature { node: node.clone(), reason })?;
    if verified.node != node {
        return Err(ApplyError::ForeignSigner { node, signer: verified.node });
    }
    Ok(verified)
}

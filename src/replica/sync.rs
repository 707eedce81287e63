//! Anti-entropy: what two replicas tell each other to become equal.

use std::collections::BTreeMap;

use super::head::{Delta, Digest, prefix, sha256};
use super::{NodeState, Replica};
use crate::model::NodeName;
use crate::wire;

/// Buckets that nodes are spread over, by the hash of their name: at 10,000 nodes one differing head costs 160 digests.
pub const BUCKETS: usize = 64;

/// Returns the bucket of `node`.
pub(super) fn bucket_of(node: &NodeName) -> usize {
    usize::try_from(prefix(&sha256(node.as_str().as_bytes())) % BUCKETS as u64).unwrap_or(0)
}

impl Replica {
    /// Returns the hash of all heads: equal hashes mean equal replicas. Costs 64 operations, whatever is held.
    pub fn set_hash(&self) -> u64 {
        self.buckets.iter().fold(0, |hash, bucket| hash ^ bucket)
    }

    /// Returns the hash of each bucket's heads, [`BUCKETS`] of them.
    pub fn bucket_hashes(&self) -> Vec<u64> {
        self.buckets.to_vec()
    }

    /// Returns the buckets whose hash is another than in `theirs`; all of them if `theirs` has the wrong length.
    pub fn differing(&self, theirs: &[u64]) -> Vec<u8> {
        let differs = |bucket: &usize| theirs.len() != BUCKETS || self.buckets.get(*bucket) != theirs.get(*bucket);
        (0..BUCKETS).filter(differs).filter_map(|bucket| u8::try_from(bucket).ok()).collect()
    }

    /// Returns the digests of every node in `buckets`, in order of name.
    pub fn digests(&self, buckets: &[u8]) -> Vec<Digest> {
        self.within(buckets).map(|state| state.digest().clone()).collect()
    }

    /// Returns the ways to what is held in `buckets` and is newer than `theirs`: nodes that they never saw first, each
    /// group in order of name, up to `bytes_max` encoded bytes in all.
    ///
    /// Whatever had no room comes in a later round. A delta larger than `bytes_max` by itself never comes: one whole
    /// state with its chain takes less than 96 KiB.
    pub fn newer_than(&self, buckets: &[u8], theirs: &[Digest], bytes_max: usize) -> Vec<Delta> {
        let theirs = newest(theirs);
        let (known, unknown): (Vec<&NodeState>, Vec<&NodeState>) =
            self.within(buckets).partition(|state| theirs.contains_key(state.node()));
        let mut bytes_left = bytes_max;
        let mut deltas = Vec::new();
        for state in unknown.into_iter().chain(known) {
            let delta = match theirs.get(state.node()) {
                Some(have) => state.delta_from(have),
                None => state.delta_from(&Digest::none(state.node().clone())),
            };
            let Some(delta) = delta else { continue };
            let bytes = wire::encode(&delta).map_or(usize::MAX, |message| message.len());
            match bytes_left.checked_sub(bytes) {
                Some(left) => bytes_left = left,
                // Something else may be smaller, but only until the answer has begun to fill.
                None if deltas.is_empty() => continue,
                None => break,
            }
            deltas.push(delta);
        }
        deltas
    }

    /// Returns, for every node of which `theirs` names something newer, the digest of what is held here
    /// ([`Digest::none`] where nothing is): what to ask them with.
    pub fn wanted(&self, theirs: &[Digest]) -> Vec<Digest> {
        let ours = |node: &NodeName| {
            self.nodes.get(node).map_or_else(|| Digest::none(node.clone()), |state| state.digest().clone())
        };
        // Of its own name a node wants nothing but the proof that somebody else lives under it.
        let is_own_past = |their: &Digest| their.node == self.local && their.generation < self.generation;
        newest(theirs)
            .into_values()
            .filter(|their| !is_own_past(their))
            .filter_map(|their| Some(ours(&their.node)).filter(|our| their.is_newer_than(our)))
            .collect()
    }

    /// Returns the way from `have` to what is held of its node; none if nothing newer is held.
    pub fn delta_for(&self, have: &Digest) -> Option<Delta> {
        self.nodes.get(&have.node)?.delta_from(have)
    }

    fn within(&self, buckets: &[u8]) -> impl Iterator<Item = &NodeState> {
        let mut is_wanted = [false; BUCKETS];
        for bucket in buckets {
            if let Some(wanted) = is_wanted.get_mut(usize::from(*bucket)) {
                *wanted = true;
            }
        }
        let states = self.nodes.values();
        states.filter(move |state| is_wanted.get(bucket_of(state.node())).copied().unwrap_or(false))
    }
}

/// Indexes digests by node; of several of one node the newest counts.
fn newest(digests: &[Digest]) -> BTreeMap<&NodeName, &Digest> {
    let mut by_node: BTreeMap<&NodeName, &Digest> = BTreeMap::new();
    for digest in digests {
        let held = by_node.entry(&digest.node).or_insert(digest);
        if digest.is_newer_than(held) {
            *held = digest;
        }
    }
    by_node
}

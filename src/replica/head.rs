//! Heads, deltas and digests: what travels.
//!
//! Not here: when a delta is accepted (`replica`), how it is carried (`gossip`).

use std::cmp::Ordering;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::clock::UnixSeconds;
use crate::model::{Entry, EntryKey, Generation, NodeName, ServeScope};
use crate::wire::{self, WireError};

/// Keeps a head's signature from passing as a signature over anything else that the same key signs.
const HEAD_CONTEXT: &[u8] = b"weft-node-head-1\0";

/// Signs heads with the key of the node's intermediate.
pub trait HeadSigner {
    /// Returns the certificates (DER) that others need to check the signature, the signer's first.
    fn chain(&self) -> Vec<Vec<u8>>;
    /// Signs `message`.
    ///
    /// # Errors
    /// A text for people, if the key cannot sign.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String>;
}

/// What a chain and a signature prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedHead {
    /// The node that the chain certifies.
    pub node: NodeName,
    /// What it may serve.
    pub scope: ServeScope,
    /// End of the chain's validity.
    pub not_after: UnixSeconds,
}

/// Checks the signatures of heads.
pub trait HeadVerifier {
    /// Checks `chain` against the trusted roots and `signature` over `message` against the chain's first certificate.
    ///
    /// # Errors
    /// A text for people, if anything does not hold.
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String>;

    /// Returns the certificates of `node` if they are at hand beside its records; by default they never are.
    fn chain_of(&self, node: &NodeName) -> Option<Vec<Vec<u8>>> {
        let _ = node;
        None
    }

    /// Tells whether a chain that was verified before is still believed: nothing of it was revoked since. Cheap.
    fn is_good(&self, _chain: &[Vec<u8>]) -> bool {
        true
    }
}

/// Names one version of one node's state.
///
/// The derived order sorts by node; which of two digests of one node is newer is [`Digest::is_newer_than`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest {
    /// Whose state.
    pub node: NodeName,
    /// Which life of the node.
    pub generation: Generation,
    /// Counts the node's heads in this life, from 1; 0: nothing is held.
    pub version: u64,
    /// The first 8 bytes of the head's SHA-256; decides between two heads of one version (a fork).
    pub hash: u64,
}

impl Digest {
    /// Returns the digest of somebody who holds nothing of `node`: asking with it yields the whole state.
    pub fn none(node: NodeName) -> Self {
        Self { node, generation: Generation::default(), version: 0, hash: u64::MAX }
    }

    /// Tells whether this state replaces `other`: the greater (generation, version), then the smaller hash.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.rank_cmp(other) == Ordering::Greater
    }

    /// Orders two digests of one node by age. Digests of version 0 mean "nothing" and are equal.
    pub(super) fn rank_cmp(&self, other: &Self) -> Ordering {
        if self.version == 0 || other.version == 0 {
            return self.version.cmp(&other.version);
        }
        (self.generation, self.version).cmp(&(other.generation, other.version)).then(other.hash.cmp(&self.hash))
    }

    /// Tells whether both name the same version with different contents.
    pub(super) fn forks_from(&self, other: &Self) -> bool {
        self.version != 0
            && (self.generation, self.version) == (other.generation, other.version)
            && self.hash != other.hash
    }
}

/// What a node signs about its own state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeHead {
    pub(super) node: NodeName,
    pub(super) generation: Generation,
    pub(super) version: u64,
    /// SHA-256 over the canonical encoding of all entries, each with the version that changed it.
    pub(super) state_hash: [u8; 32],
    /// End of the lease.
    pub(super) not_after: UnixSeconds,
    /// SHA-256 over the encoding of the chain that proves the signature.
    pub(super) chain_hash: [u8; 32],
}

impl NodeHead {
    /// Returns the bytes that are signed and hashed.
    pub(super) fn message(&self) -> Result<Vec<u8>, WireError> {
        let mut message = HEAD_CONTEXT.to_vec();
        message.extend(wire::encode(self)?);
        Ok(message)
    }

    pub(super) fn digest(&self) -> Digest {
        // A head is a few hundred bytes of parsed values: it always encodes. If it did not, the hash of nothing would
        // make it lose every comparison of hashes.
        let hash = self.message().map_or(u64::MAX, |message| prefix(&sha256(&message)));
        Digest { node: self.node.clone(), generation: self.generation, version: self.version, hash }
    }
}

/// What a delta builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Base {
    /// Nothing: the delta is the whole state.
    Nothing,
    /// A version of the same generation.
    Version(u64),
}

/// One entry with the version that changed it last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) entry: Entry,
}

/// The way from one version of a node's state to a later one, signed by that node whoever carries it.
///
/// It is atomic: a receiver reaches exactly the signed state, or stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    pub(super) head: NodeHead,
    #[serde(with = "wire::bytes")]
    pub(super) signature: Vec<u8>,
    /// Only where the receiver may lack it: certificates make up most of a small delta.
    pub(super) chain: Option<Vec<Vec<u8>>>,
    pub(super) base: Base,
    /// Ascending by key.
    pub(super) changes: Vec<Change>,
    /// Keys removed after the base.
    pub(super) removed: Vec<EntryKey>,
}

impl Delta {
    /// Returns the version that the delta leads to.
    pub fn digest(&self) -> Digest {
        self.head.digest()
    }

    /// Returns whose state it is.
    pub fn node(&self) -> &NodeName {
        &self.head.node
    }

    /// Tells whether the delta is the whole state with its chain: it needs nothing at the receiver.
    pub fn is_whole(&self) -> bool {
        self.base == Base::Nothing
    }
}

/// Hashes a chain of certificates.
pub(super) fn chain_hash(chain: &[Vec<u8>]) -> Result<[u8; 32], WireError> {
    wire::encode(&chain).map(|bytes| sha256(&bytes))
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// Returns the first 8 bytes as a number.
pub(super) fn prefix(hash: &[u8; 32]) -> u64 {
    hash.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

//! What comes of publishing and applying: outcomes, refusals, reports.

use crate::clock::UnixSeconds;
use crate::model::{EntryKey, Generation, NodeName, ServiceName};
use crate::wire::WireError;

/// What became of a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The node's state is the delta's.
    Updated,
    /// What is held is as new or newer.
    Stale,
    /// The delta builds on something that is not held (a version, a chain): pull the whole state, with [`Digest::none`](super::Digest::none).
    Behind,
}

/// Why own records could not be published; the state is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// More than a node may publish.
    #[error(
        "this node's records take {bytes} bytes; at most {bytes_max} can be shared: deregister services, shorten their metadata or spread them over more nodes"
    )]
    TooLarge {
        /// Their size, encoded.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The certificates are larger than others accept.
    #[error("this node's certificate chain takes {bytes} bytes; at most {bytes_max} can be shared")]
    ChainTooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// A record stands under a key that is not its own, or the node's facts name another node.
    #[error("record {key:?} does not belong under this key on this node")]
    Misplaced {
        /// Where it stands.
        key: EntryKey,
    },
    /// The key cannot sign.
    #[error("cannot sign this node's records: {0}")]
    Sign(String),
    /// The records cannot be encoded.
    #[error("cannot encode this node's records")]
    Encode(#[source] WireError),
    /// 2^64 versions in one life.
    #[error("this node has used up its versions; restart it")]
    Exhausted,
}

/// Why a delta was refused; the replica is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Another life of this node's own name, newer than this one: two nodes share a name, or the disk is an old copy.
    #[error("a newer life ({generation}) of this node's name is in the mesh: another node may have the same name")]
    OwnName {
        /// The other life.
        generation: Generation,
    },
    /// The lease is over.
    #[error("records of {node} ended at {not_after:?}, now is {now:?}: check the clocks of both nodes")]
    LeaseOver {
        /// Whose.
        node: NodeName,
        /// The end.
        not_after: UnixSeconds,
        /// This node's clock.
        now: UnixSeconds,
    },
    /// The lease ends too far ahead.
    #[error("records of {node} claim to last until {not_after:?}, now is {now:?}: check the clocks of both nodes")]
    LeaseAhead {
        /// Whose.
        node: NodeName,
        /// The end.
        not_after: UnixSeconds,
        /// This node's clock.
        now: UnixSeconds,
    },
    /// The bound on nodes is reached.
    #[error("records of {node} are refused: {nodes_max} nodes are held already")]
    Full {
        /// Whose.
        node: NodeName,
        /// The bound.
        nodes_max: usize,
    },
    /// The state or a part of the delta is over its bound.
    #[error("{what} of {node} takes {bytes} bytes; at most {bytes_max} are accepted")]
    TooLarge {
        /// Whose.
        node: NodeName,
        /// Which part.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The delta contradicts itself.
    #[error("delta of {node} is malformed: {what}")]
    Malformed {
        /// Whose.
        node: NodeName,
        /// How.
        what: &'static str,
    },
    /// The chain is not the one that the head names.
    #[error("delta of {node} comes with another certificate chain than its head names")]
    Chain {
        /// Whose.
        node: NodeName,
    },
    /// The chain or the signature does not hold.
    #[error("signature over the records of {node} is refused: {reason}")]
    Signature {
        /// Whose.
        node: NodeName,
        /// Why.
        reason: String,
    },
    /// The signer is another node.
    #[error("records of {node} are signed by {signer}")]
    ForeignSigner {
        /// Whose.
        node: NodeName,
        /// Who signed.
        signer: NodeName,
    },
    /// A whole state does not have the signed hash.
    #[error("records of {node} are not those that it signed")]
    StateHash {
        /// Whose.
        node: NodeName,
    },
}

/// Something that an operator should hear of; a state is not refused for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A node published services that its certificate does not cover; they are not shown.
    OutOfScope {
        /// The node.
        node: NodeName,
        /// At which version.
        version: u64,
        /// The services.
        services: Vec<ServiceName>,
    },
    /// A node signed two different heads of one version; the one with the smaller hash holds everywhere.
    Fork {
        /// The node.
        node: NodeName,
        /// In which life.
        generation: Generation,
        /// At which version.
        version: u64,
    },
}

//! What a [`Core`](super::Core) hands to its owner, and why it refuses.

use bytes::Bytes;

use super::{Broadcast, MeshId, Statement};
use crate::model::{Demand, MemberStatus, NodeName};

/// Why a packet was refused. Its text is the label of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refused {
    /// Longer than [`PACKET_BYTES_MAX`](super::PACKET_BYTES_MAX).
    #[error("too_large")]
    TooLarge,
    /// Does not decode.
    #[error("malformed")]
    Malformed,
    /// The header names another member than TLS verified.
    #[error("sender")]
    Sender,
    /// The header names this node.
    #[error("own_name")]
    OwnName,
    /// A stranger while [`MEMBERS_MAX`](super::MEMBERS_MAX) members are held.
    #[error("full")]
    Full,
    /// The generation lies more than [`GENERATION_JUMP_MAX`](super::GENERATION_JUMP_MAX) above the known one.
    #[error("generation")]
    Generation,
    /// SWIM itself refused it.
    #[error("protocol")]
    Protocol,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Self; 7] =
        [Self::TooLarge, Self::Malformed, Self::Sender, Self::OwnName, Self::Full, Self::Generation, Self::Protocol];
}

/// What the owner of the core has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send `packet` to `to`.
    Send {
        /// Who gets it.
        to: MeshId,
        /// At most [`PACKET_BYTES_MAX`](super::PACKET_BYTES_MAX) bytes.
        packet: Bytes,
    },
    /// A member's status or identity changed; `before` is absent for a newcomer, `after` for a forgotten one.
    Changed {
        /// The member.
        node: NodeName,
        /// What it was.
        before: Option<MemberStatus>,
        /// What it is.
        after: Option<MemberStatus>,
    },
    /// A broadcast about records came from `from`; hand it back to [`Core::broadcast`](super::Core::broadcast) if it is
    /// good and new.
    Received {
        /// Who sent it on; it holds what it speaks of.
        from: MeshId,
        /// `Delta` or `IHave`.
        broadcast: Broadcast,
    },
    /// Another node goes by this node's name.
    Conflict {
        /// The other's identity.
        theirs: MeshId,
    },
    /// The others took this node for failed; it is back under a new identity.
    Renewed(MeshId),
    /// Sign [`Statement::message`] with the node's key and hand the statement back to
    /// [`Core::handle_signed`](super::Core::handle_signed).
    Sign(Statement),
    /// Check the signature with the signer's certificates and hand the statement back to
    /// [`Core::handle_verified`](super::Core::handle_verified).
    Verify(Statement),
    /// Others met a refusal at this member's port: ask it, and call
    /// [`Core::evidence_crashed`](super::Core::evidence_crashed) if it refuses. At most one per accusation that counts, and one a second for each member that answers while two accuse it.
    AskPort(MeshId),
    /// A member told what it asks of limits that hold for the whole mesh, in place of what it told before.
    Demand {
        /// Who.
        node: NodeName,
        /// How much.
        demand: Demand,
    },
    /// `peer` holds other records than this node: compare with it. At most two a second.
    Differs {
        /// Whose hash differs.
        peer: MeshId,
    },
}

/// Why a member cannot be made to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForceLeaveError {
    /// No such member.
    Unknown,
    /// It answers.
    Alive,
}

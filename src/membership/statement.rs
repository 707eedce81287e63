//! What a node says under its own signature, so that others can pass it on and nobody can say it for it.
//!
//! ```text
//!   Output::Sign -> owner signs with the node's key -> Core::handle_signed -> spread
//!   from a peer: news? known signer? budget? -> Output::Verify -> owner checks -> Core::handle_verified -> acted on, passed on
//! ```
//!
//! Not here: keys and chains (the owner's), what a statement changes (`inbound`).

use serde::{Deserialize, Serialize};

use super::id::{Life, MeshId};
use crate::model::{Demand, NodeName};
use crate::wire::{self, WireError};

/// Keeps these signatures from passing as signatures over anything else that the same key signs.
const CONTEXT: &[u8] = b"weft-membership-1\0";
/// Largest signature, in bytes. ECDSA P-256 in DER takes 72.
pub const STATEMENT_SIGNATURE_BYTES_MAX: usize = 128;

/// "I live this life at this address": a start, a return, or a refutation (greater incarnation).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeClaim {
    /// Who, where, which life. The signer is the member itself.
    pub id: MeshId,
    /// SWIM's incarnation of this life.
    pub incarnation: u16,
    /// By the member's key.
    #[serde(with = "wire::bytes")]
    pub signature: Vec<u8>,
}

/// A node's goodbye, its own or spoken for it by an operator at another node once it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// Who goes.
    pub node: NodeName,
    /// The last life that goes with it; a greater one is alive at once.
    pub life: Life,
    /// Whether the others forget it at once (`force-leave -prune`).
    pub prune: bool,
    /// Who says so: the signer. Another than `node` is heard about failed members alone.
    pub by: NodeName,
    /// By the key of `by`.
    #[serde(with = "wire::bytes")]
    pub signature: Vec<u8>,
}

/// How an accuser knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Certainty {
    /// No answer, neither to the accuser nor through helpers.
    Silent,
    /// The host answered that nothing listens there (refused port), or its process has forgotten a connection (stateless reset) and
    /// does not answer.
    Crashed,
}

/// "I found this member dead": one accuser's first-hand word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accusation {
    /// Who.
    pub accused: NodeName,
    /// In which life.
    pub life: Life,
    /// At which incarnation; the accused refutes by exceeding it.
    pub incarnation: u16,
    /// How the accuser knows.
    pub certainty: Certainty,
    /// Who says so: the signer.
    pub accuser: NodeName,
    /// By the accuser's key.
    #[serde(with = "wire::bytes")]
    pub signature: Vec<u8>,
}

/// "So much is asked of me": what a member's callers want of limits that hold for the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DemandClaim {
    /// Who: the signer.
    pub node: NodeName,
    /// In which life.
    pub life: Life,
    /// Grows with each claim of this life.
    pub number: u32,
    /// How much.
    pub demand: Demand,
    /// By the member's key.
    #[serde(with = "wire::bytes")]
    pub signature: Vec<u8>,
}

/// Anything that a node signs for the membership.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Statement {
    /// A member lives.
    Life(LifeClaim),
    /// A member goes.
    Leave(Leave),
    /// A member is accused.
    Accuse(Accusation),
    /// A member tells its demand.
    Demand(DemandClaim),
}

impl Statement {
    /// Returns whose signature it needs.
    pub fn signer(&self) -> &NodeName {
        match self {
            Self::Life(claim) => &claim.id.name,
            Self::Leave(leave) => &leave.by,
            Self::Accuse(accusation) => &accusation.accuser,
            Self::Demand(claim) => &claim.node,
        }
    }

    /// Returns the signature; empty if it has none yet.
    pub fn signature(&self) -> &[u8] {
        match self {
            Self::Life(claim) => &claim.signature,
            Self::Leave(leave) => &leave.signature,
            Self::Accuse(accusation) => &accusation.signature,
            Self::Demand(claim) => &claim.signature,
        }
    }

    /// Puts `signature` in the place of the one it has.
    #[must_use]
    pub fn with_signature(mut self, signature: Vec<u8>) -> Self {
        let place = match &mut self {
            Self::Life(claim) => &mut claim.signature,
            Self::Leave(leave) => &mut leave.signature,
            Self::Accuse(accusation) => &mut accusation.signature,
            Self::Demand(claim) => &mut claim.signature,
        };
        *place = signature;
        self
    }

    /// Returns the bytes that are signed.
    ///
    /// # Errors
    /// [`WireError`] if it does not encode, which parsed values never do.
    pub fn message(&self) -> Result<Vec<u8>, WireError> {
        let mut message = CONTEXT.to_vec();
        message.extend(wire::encode(&self.clone().with_signature(Vec::new()))?);
        Ok(message)
    }
}

/// What the owner found out about a statement's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The signer signed it.
    Holds,
    /// It did not.
    Broken,
    /// The signer's certificates are not at hand.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::BROADCAST_BYTES_MAX;
    use crate::membership::packet::Broadcast;
    use crate::model::{DEMANDS_MAX, Generation};

    #[test]
    fn the_longest_statement_fits_a_broadcast() {
        let long: NodeName = "n".repeat(63).parse().unwrap();
        let generation = Generation { number: u64::MAX, nonce: u64::MAX };
        let life = Life { generation, renewals: u32::MAX };
        let signature = vec![255; STATEMENT_SIGNATURE_BYTES_MAX];
        let (accused, accuser) = (long.clone(), long);
        let incarnation = u16::MAX;
        let demand = Demand { limits: vec![(u64::MAX, u8::MAX); DEMANDS_MAX].into() };
        let node = accuser.clone();
        let claim = DemandClaim { node, life, number: u32::MAX, demand, signature: signature.clone() };
        let accusation = Accusation { accused, life, incarnation, certainty: Certainty::Crashed, accuser, signature };
        let bytes = wire::encode(&Broadcast::Said(Statement::Accuse(accusation))).unwrap();
        assert!(bytes.len() <= BROADCAST_BYTES_MAX / 2, "{}", bytes.len());
        let bytes = wire::encode(&Broadcast::Said(Statement::Demand(claim))).unwrap();
        assert!(bytes.len() <= BROADCAST_BYTES_MAX, "{}", bytes.len());
    }

    #[test]
    fn the_signature_is_not_part_of_what_is_signed_and_everything_else_is() {
        let leave = Leave {
            node: "a".parse().unwrap(),
            life: Life::default(),
            prune: false,
            by: "a".parse().unwrap(),
            signature: Vec::new(),
        };
        let plain = Statement::Leave(leave.clone()).message().unwrap();
        let signed = Statement::Leave(leave.clone()).with_signature(vec![1]);
        assert_eq!(signed.signature(), [1]);
        assert_eq!(signed.message().unwrap(), plain);
        let pruned = Leave { prune: true, ..leave.clone() };
        let other = Leave { by: "b".parse().unwrap(), ..leave };
        for statement in [pruned, other] {
            assert_ne!(Statement::Leave(statement).message().unwrap(), plain);
        }
    }
}

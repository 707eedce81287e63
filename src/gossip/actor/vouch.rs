//! Signatures that the membership asks for, and lives that signed records prove.

use tokio::time::Instant;
use tracing::warn;

use super::Actor;
use crate::clock;
use crate::gossip::trust::{Signer, Verifier};
use crate::membership::{MeshId, Statement, Verdict};
use crate::model::{Generation, NodeName};
use crate::replica::{HeadSigner as _, HeadVerifier as _};

impl Actor {
    /// Signs with the node's key. A statement that cannot be signed goes back without: a goodbye still ends the core.
    pub(super) fn sign(&mut self, statement: Statement, now: Instant) {
        let message = statement.message().map_err(|error| error.to_string());
        let signature = message.and_then(|message| Signer::new(&self.identity).sign(&message)).unwrap_or_else(|error| {
            warn!(%error, "a statement about the membership cannot be signed; others will not pass it on");
            Vec::new()
        });
        self.core.handle_signed(statement.with_signature(signature), now);
    }

    /// Checks with the certificates that the signer's records came with.
    pub(super) fn verify(&mut self, statement: Statement, now: Instant) {
        let verdict = match (self.replica.state(statement.signer()), statement.message()) {
            (Some(state), Ok(message)) => {
                let verifier = Verifier::new(&self.identity, clock::wall());
                match verifier.verify(state.chain(), &message, statement.signature()) {
                    Ok(verified) if verified.node == *statement.signer() => Verdict::Holds,
                    Ok(_) | Err(_) if is_ahead(&statement, state.digest().generation) => Verdict::Unknown,
                    Ok(_) | Err(_) => Verdict::Broken,
                }
            }
            _ => Verdict::Unknown,
        };
        self.core.handle_verified(statement, verdict, now);
    }

    /// Tells the membership of the life that the records of `node` prove.
    pub(super) fn attest(&mut self, node: &NodeName, now: Instant) {
        let Some(state) = self.replica.state(node) else { return };
        let Some(addr) = state.info.as_ref().map(|info| info.mesh_addr) else { return };
        let id = MeshId::new(node.clone(), addr, state.digest().generation);
        self.core.attest(&id, now);
    }
}

/// Tells whether `statement` speaks of a later life than the records at hand, whose key may be another.
fn is_ahead(statement: &Statement, held: Generation) -> bool {
    matches!(statement, Statement::Life(claim) if claim.id.life.generation > held)
}

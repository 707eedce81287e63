//! Signatures that the membership asks for, and lives that signed records prove.

use super::{Engine, Event, Turn};
use crate::membership::{MeshId, Statement, Verdict};
use crate::model::NodeName;

impl Engine {
    /// Signs with the node's key. A statement that cannot be signed goes back without: a goodbye still ends the core.
    pub(super) fn sign(&mut self, statement: Statement, turn: &Turn<'_>) {
        let message = statement.message().map_err(|error| error.to_string());
        let signature = message.and_then(|message| turn.signer.sign(&message)).unwrap_or_else(|error| {
            self.tell(Event::Unsigned(error));
            Vec::new()
        });
        self.core.handle_signed(statement.with_signature(signature), turn.now);
    }

    /// Checks with the certificates that the signer's records came with.
    pub(super) fn verify(&mut self, statement: Statement, turn: &Turn<'_>) {
        let verdict = match (self.replica.state(statement.signer()), statement.message()) {
            (Some(state), Ok(message)) => {
                match turn.verifier.verify(state.chain(), &message, statement.signature()) {
                    Ok(verified) if verified.node == *statement.signer() => Verdict::Holds,
                    // A signer that has renewed its certificate since looks like this until its records came.
                    Ok(_) | Err(_) => Verdict::Broken,
                }
            }
            _ => Verdict::Unknown,
        };
        self.core.handle_verified(statement, verdict, turn.now);
    }

    /// Tells the membership of the life that the records of `node` prove.
    pub(super) fn attest(&mut self, node: &NodeName, turn: &Turn<'_>) {
        let Some(state) = self.replica.state(node) else { return };
        let Some(addr) = state.info.as_ref().map(|info| info.mesh_addr) else { return };
        let id = MeshId::new(node.clone(), addr, state.digest().generation);
        self.core.attest(&id, turn.now);
    }
}

//! What the membership is given from outside: signatures, lives that signed records prove, evidence of connections.

use tokio::time::Instant;

use super::{Engine, Event, Turn};
use crate::membership::{LifeClaim, MeshId, Statement, Verdict};
use crate::model::NodeName;
use crate::replica::NodeState;

impl Engine {
    /// Signs with the node's key. A statement that cannot be signed goes back without: a goodbye still ends the core.
    pub(super) fn sign(&mut self, statement: Statement, turn: &Turn<'_>) {
        let message = statement.message().map_err(|error| error.to_string());
        let signature = message.and_then(|message| turn.signer.sign(&message)).unwrap_or_else(|error| {
            self.tell(Event::Unsigned(error));
            Vec::new()
        });
        self.core.handle_signed(&statement.with_signature(signature), turn.now);
    }

    /// Says the own word anew a tick after the own certificates have changed, if it does not hold under them: the key is another.
    /// The records that bring the certificates are everywhere by then.
    pub(super) fn keep_word(&mut self, turn: &Turn<'_>) {
        let Some(word) = self.core.own_word().cloned() else { return };
        if !std::mem::take(&mut self.has_new_chain) {
            return;
        }
        let word = Statement::Life(word);
        let holds = word.message().is_ok_and(|message| {
            let chain = turn.signer.chain();
            turn.verifier.verify(&chain, &message, word.signature()).is_ok()
        });
        if !holds {
            self.core.restate(turn.now);
        }
    }

    /// Checks with the certificates that the signer's records came with.
    pub(super) fn verify(&mut self, statement: Statement, turn: &Turn<'_>) {
        let state = self.replica.state(statement.signer());
        let elsewhere = if state.is_none() { turn.verifier.chain_of(statement.signer()) } else { None };
        let chain = state.map(NodeState::chain).or(elsewhere.as_deref());
        let verdict = match (chain, statement.message()) {
            (Some(chain), Ok(message)) => match turn.verifier.verify(chain, &message, statement.signature()) {
                Ok(verified) if verified.node == *statement.signer() => Verdict::Holds,
                // A later life may have another key: its records will tell.
                Ok(_) | Err(_) if state.is_none_or(|state| is_ahead(&statement, state)) => Verdict::Unknown,
                Ok(_) | Err(_) => Verdict::Broken,
            },
            _ => Verdict::Unknown,
        };
        self.core.handle_verified(statement, verdict, turn.now);
    }

    /// Notes that `peer` acknowledged a packet of this node at `at` or later, outside of SWIM: it is not declared failed
    /// within the second after.
    pub fn evidence_alive(&mut self, peer: &NodeName, at: Instant, turn: &Turn<'_>) {
        self.core.evidence_alive(peer, at);
        self.settle(turn);
    }

    /// Notes that the host of `peer` refuses its port, or that it has forgotten a connection and does not answer: failed at
    /// once, and the others are told.
    pub fn evidence_crashed(&mut self, peer: &NodeName, turn: &Turn<'_>) {
        self.core.evidence_crashed(peer, turn.now);
        self.settle(turn);
    }

    /// Asks `peer` whether it lives: its host is said to refuse the port, or its name is claimed, by somebody who may lie.
    pub fn question(&mut self, peer: &NodeName, turn: &Turn<'_>) {
        self.core.question(peer, turn.now);
        self.settle(turn);
    }

    /// Takes `members` for met, without a word to them, and what this node has to say for said: for a beginning that
    /// somebody else vouches for (a simulator's).
    pub fn vouch_for<'a>(&mut self, members: impl IntoIterator<Item = &'a MeshId>, turn: &Turn<'_>) {
        for id in members {
            self.core.meet(id, turn.now);
        }
        self.core.forget_news();
        self.settle(turn);
    }

    /// As [`Engine::vouch_for`], with the members' own words: what they say when they are asked is no news then, where all
    /// would tell each other of all.
    pub fn vouch_with<'a>(&mut self, words: impl IntoIterator<Item = &'a LifeClaim>, turn: &Turn<'_>) {
        for word in words {
            self.core.meet_by_word(word, turn.now);
        }
        self.core.forget_news();
        self.settle(turn);
    }

    /// Tells the membership of the life that the records of `node` prove.
    pub(super) fn attest(&mut self, node: &NodeName, turn: &Turn<'_>) {
        let Some(state) = self.replica.state(node) else { return };
        let Some(addr) = state.info.as_ref().map(|info| info.mesh_addr) else { return };
        let id = MeshId::new(node.clone(), addr, state.digest().generation);
        self.core.attest(&id, turn.now);
    }
}

/// Tells whether `statement` speaks of a later life than the records at hand.
fn is_ahead(statement: &Statement, held: &NodeState) -> bool {
    matches!(statement, Statement::Life(claim) if claim.id.life.generation > held.digest().generation)
}

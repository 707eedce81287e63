//! What each message of an exchange changes, and what is said next.

use super::joining::Incumbent;
use super::message::{DELTAS_BYTES_MAX, DIGESTS_MAX, Exchange, Held, Message, Request, Stage, Step, SyncReply, Trade};
use super::{Engine, Output, SYNCS_MAX, Turn};
use crate::model::NodeName;
use crate::replica::{Applied, Delta, Digest};
use crate::wire;

impl Engine {
    /// Acts on `message` of an exchange with the peer that TLS verified as `peer` and says what comes next.
    ///
    /// A message that the stage does not name ends the exchange.
    pub fn handle_message(&mut self, peer: &NodeName, stage: Stage, message: Message, turn: &Turn<'_>) -> Step {
        let step = match (stage, message) {
            (Stage::Asked, Message::Request(request)) => self.asked(peer, request, turn),
            (Stage::Comparing, Message::Held(held)) => Step::Say(Message::Trade(self.compare(&held)), Stage::Taking),
            (Stage::Taking, Message::Deltas(deltas)) => {
                self.deliver(peer, &deltas, turn);
                Step::Done
            }
            (Stage::Pulling, Message::Deltas(deltas)) => {
                self.take_pulled(&deltas, turn);
                Step::Done
            }
            (Stage::Opening { rounds_left }, Message::Sync(SyncReply::Buckets(theirs))) => {
                Step::Say(Message::Held(self.held(&theirs)), Stage::Trading { rounds_left })
            }
            (Stage::Trading { rounds_left }, Message::Trade(trade)) => {
                self.deliver(peer, &trade.deltas, turn);
                Step::Say(Message::Deltas(self.deltas_for(&trade.wanted)), Stage::Ending { rounds_left })
            }
            // The peer has taken what it was given: the next round sees the result.
            (Stage::Ending { rounds_left }, Message::End) if rounds_left > 0 => {
                Step::Again(self.summary(), Stage::Opening { rounds_left: rounds_left - 1 })
            }
            _ => Step::Done,
        };
        self.settle(turn);
        step
    }

    fn asked(&mut self, peer: &NodeName, request: Request, turn: &Turn<'_>) -> Step {
        match request {
            Request::Hello(id) => Step::Last(Message::Hello(self.hello(peer, &id, Incumbent::Unasked))),
            Request::Goodbye(leave) => {
                // Nobody else's goodbye is taken this way.
                if leave.node == *peer {
                    self.core.learn_farewells(vec![leave], turn.now);
                }
                Step::Last(Message::Noted)
            }
            Request::Pull(have) => Step::Last(Message::Deltas(self.deltas_for(&have))),
            Request::Sync { set_hash, farewells } => {
                self.core.learn_farewells(farewells, turn.now);
                if set_hash == self.replica.set_hash() {
                    return Step::Last(Message::Sync(SyncReply::Same));
                }
                let buckets = SyncReply::Buckets(self.replica.bucket_hashes());
                Step::Say(Message::Sync(buckets), Stage::Comparing)
            }
            // The carrier's.
            Request::Documents(_) | Request::Shared(_) | Request::RoundTrips => Step::Done,
        }
    }

    /// Begins a comparison with `peer` of at most `rounds` rounds, unless one runs or too many do.
    pub(super) fn start_sync(&mut self, peer: &NodeName, rounds: usize) {
        if self.syncs.len() >= SYNCS_MAX || !self.syncs.insert(peer.clone()) {
            return;
        }
        let begin = Step::Say(self.summary(), Stage::Opening { rounds_left: rounds.saturating_sub(1) });
        self.begin(peer, Exchange::Sync(peer.clone()), begin);
    }

    pub(super) fn begin(&mut self, peer: &NodeName, exchange: Exchange, step: Step) {
        if let Step::Say(message, stage) = step {
            self.outputs.push_back(Output::Exchange { peer: peer.clone(), exchange, message, stage });
        }
    }

    fn summary(&self) -> Message {
        let farewells = self.core.farewells();
        Message::Request(Request::Sync { set_hash: self.replica.set_hash(), farewells })
    }

    fn held(&self, theirs: &[u64]) -> Held {
        let mut held = Held::default();
        // The lowest buckets that fit; the next round takes the others.
        for bucket in self.replica.differing(theirs) {
            let digests = self.replica.digests(&[bucket]);
            if !held.buckets.is_empty() && held.digests.len() + digests.len() > DIGESTS_MAX {
                break;
            }
            held.buckets.push(bucket);
            held.digests.extend(digests);
        }
        held
    }

    fn compare(&self, held: &Held) -> Trade {
        let deltas = self.replica.newer_than(&held.buckets, &held.digests, DELTAS_BYTES_MAX);
        let mut wanted = self.replica.wanted(&held.digests);
        wanted.truncate(DIGESTS_MAX);
        Trade { deltas, wanted }
    }

    /// Merges what a sync brought.
    fn deliver(&mut self, peer: &NodeName, deltas: &[Delta], turn: &Turn<'_>) {
        for delta in deltas {
            if let Some(Applied::Behind) = self.merge(delta, turn) {
                self.pull_whole(peer, delta);
            }
        }
    }

    /// Returns what a peer lacks, as much as fits one frame.
    fn deltas_for(&self, have: &[Digest]) -> Vec<Delta> {
        let mut deltas = Vec::new();
        let mut bytes = 0;
        for delta in have.iter().take(DIGESTS_MAX).filter_map(|digest| self.replica.delta_for(digest)) {
            bytes += wire::encode(&delta).map_or(wire::FRAME_BYTES_MAX, |encoded| encoded.len());
            if bytes > DELTAS_BYTES_MAX {
                break;
            }
            deltas.push(delta);
        }
        deltas
    }
}

//! Finds the lives that this node has not heard of: asks a neighbour, with 32 sums over the lives that it knows.
//!
//! ```text
//!   Lives(sums) -> neighbour: sums equal? silence.  differ? -> News with signed lives of the names whose sums differ
//!                                                           -> CheckFor a member of those names that has failed there
//!   a signed life of a member that has failed here -> CheckFor it, to who passed it on
//! ```
//!
//! News spreads in a bounded number of copies and may miss a node; records compare generations, and a life that a member
//! came back to within one (`renewals`), or said again when it refuted an accusation (its incarnation), is in no record. Random
//! lives would have to hit the one that is missing. An incarnation counts: who has missed two refutations takes no accusation
//! of that member for one of now, and holds it for alive when all others have found it gone.
//!
//! That a member is gone does not travel. Who has missed the accusations is made to look itself.
//!
//! Invariants: an answer is two packets; equal sums cost nothing; sums prove nothing, the signed lives do.

use std::time::Duration;

use tokio::time::Instant;

use super::packet::{self, Broadcast, Call, CallPacket, Envelope};
use super::statement::{LifeClaim, Statement};
use super::{ANNOUNCE_EVERY, ANNOUNCE_SOON, Core, Detector, MeshId, Output};
use crate::model::{MemberStatus, NodeName};
use rand::RngExt as _;
use rand::seq::IteratorRandom as _;

/// Least time between two hints to look, to whoever passes on lives of those that have failed.
const SHOW_PAUSE: Duration = Duration::from_millis(200);
/// Most signed lives in one packet; it holds about seven.
const LIVES_MAX: usize = 8;
/// Into how many groups names fall: of 1,000 members one group has about 30.
pub(super) const GROUPS: usize = 32;

/// A sum over the lives of each group of names.
pub(super) type Sums = [u32; GROUPS];

impl Core {
    /// Asks a neighbour for signed lives: soon after a member came or went, and then less and less often.
    pub(super) fn ask_for_lives(&mut self, now: Instant) {
        if now < self.when.announce {
            return;
        }
        let since = now.saturating_duration_since(self.when.changed_last);
        self.when.announce = now + (since / 2).clamp(ANNOUNCE_SOON, ANNOUNCE_EVERY);
        if let Some(neighbour) = self.neighbour() {
            let sums = self.sums();
            self.send_call(&neighbour, Call::Lives(sums));
        }
    }

    /// Makes the next question come soon: where one member changed, others may have that this node did not hear of.
    pub(super) fn ask_soon(&mut self, now: Instant) {
        self.when.changed_last = now;
        let soon = now + ANNOUNCE_SOON.mul_f64(self.rng.random_range(0.75..1.25));
        self.when.announce = self.when.announce.clamp(now, soon);
    }

    /// Answers with lives of the names whose sums differ.
    pub(super) fn answer_lives(&mut self, to: &NodeName, theirs: &Sums) {
        let own = self.sums();
        if own == *theirs {
            return;
        }
        let Some(to) = self.roster.find(to).map(|member| member.id.clone()) else { return };
        let call =
            CallPacket { src: self.id().clone(), src_incarnation: self.incarnation, dst: to.life, call: Call::News };
        let Ok(mut packet) = packet::wrap(&Envelope { call: Some(call), ..Envelope::default() }, &[]) else { return };
        let empty = packet.len();
        let differs: Vec<bool> = own.iter().zip(theirs).map(|(own, theirs)| own != theirs).collect();
        self.add_lives(&to.name, &differs, &mut packet);
        if packet.len() > empty {
            self.outputs.push_back(Output::Send { to: to.clone(), packet: packet.into() });
        }
        let differs = |id: &MeshId| differs.get(id.group(GROUPS)).copied().unwrap_or(false);
        let failed = self.roster.iter().filter(|member| member.status == MemberStatus::Failed && differs(&member.id));
        if let Some(target) = failed.map(|member| member.id.name.clone()).choose(&mut self.rng) {
            self.make_look(&to.name, target);
        }
    }

    /// `sender` passed on a life that has failed here.
    pub(super) fn hear_failed_life(&mut self, sender: &NodeName, target: NodeName, now: Instant) {
        // News of its last word may have been under way.
        if self.when.shown_last.is_none_or(|at| now.saturating_duration_since(at) >= SHOW_PAUSE) {
            self.when.shown_last = Some(now);
            self.make_look(sender, target);
        }
    }

    /// Lets `who` find out itself that `target` does not answer.
    fn make_look(&mut self, who: &NodeName, target: NodeName) {
        if self.profile.detector == Detector::Lifeguard && *who != target {
            let patience_ms = u16::try_from(self.profile.check_timeout.as_millis()).unwrap_or(u16::MAX);
            // What it answers is not followed up.
            let number = self.checks.next_number();
            self.send_call(who, Call::CheckFor { target, number, patience_ms });
        }
    }

    /// A sum over the living of each group, by what they said of themselves.
    pub(super) fn sums(&self) -> Sums {
        let mut sums = [0; GROUPS];
        // What its own signed word says: no other can be shown.
        let said = |id: &MeshId, word: Option<&LifeClaim>| {
            word.filter(|word| word.id.life == id.life).map_or(0, |word| word.incarnation)
        };
        let living = self.roster.iter().filter(|member| is_living(member.status));
        let living = living.map(|member| (&member.id, said(&member.id, member.proof.as_ref())));
        for (id, incarnation) in living.chain([(self.id(), said(self.id(), self.own_life.as_ref()))]) {
            if let Some(slot) = sums.get_mut(id.group(GROUPS)) {
                *slot ^= id.life_sum(incarnation);
            }
        }
        sums
    }

    /// Adds the signed words of random living members of the groups that `differs` names.
    fn add_lives(&mut self, to: &NodeName, differs: &[bool], packet: &mut Vec<u8>) {
        let in_question = |claim: &&LifeClaim| differs.get(claim.id.group(GROUPS)).copied().unwrap_or(false);
        let living = self.roster.iter().filter(|member| is_living(member.status) && member.id.name != *to);
        let proofs = living.filter_map(|member| member.proof.as_ref()).chain(&self.own_life).filter(in_question);
        // Reservoir sampling, as foca chooses members.
        let mut chosen = Vec::new();
        for (seen, proof) in proofs.enumerate() {
            if chosen.len() < LIVES_MAX {
                chosen.push(proof);
            } else if let Some(place) = chosen.get_mut(self.rng.random_range(0..=seen)) {
                *place = proof;
            }
        }
        for proof in chosen {
            if !packet::append(packet, &Broadcast::Said(Statement::Life(proof.clone()))) {
                break;
            }
        }
    }

    /// Fills a feed: who announced itself may know nobody yet.
    pub(super) fn add_any_lives(&mut self, to: &NodeName, packet: &mut Vec<u8>) {
        self.add_lives(to, &[true; GROUPS], packet);
    }
}

fn is_living(status: MemberStatus) -> bool {
    matches!(status, MemberStatus::Alive | MemberStatus::Leaving)
}

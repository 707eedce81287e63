//! Finds the lives that this node has not heard of: asks a neighbour, with 32 sums over the lives that it knows.
//!
//! ```text
//!   Lives(sums) -> neighbour: sums equal? silence.  differ? -> News with signed lives of the names whose sums differ
//! ```
//!
//! News spreads in a bounded number of copies and may miss a node; records compare generations, and a life that a member
//! came back to within one (`renewals`) is in no record. Random lives would have to hit the one that is missing.
//!
//! Invariants: an answer is one packet; equal sums cost nothing; sums prove nothing, the signed lives do.

use tokio::time::Instant;

use super::packet::{self, Broadcast, Call, CallPacket, Envelope};
use super::statement::{LifeClaim, Statement};
use super::{ANNOUNCE_EVERY, ANNOUNCE_SOON, Core, Output};
use crate::model::{MemberStatus, NodeName};
use rand::RngExt as _;

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
            self.outputs.push_back(Output::Send { to, packet: packet.into() });
        }
    }

    fn sums(&self) -> Sums {
        let mut sums = [0; GROUPS];
        let living = self.roster.iter().filter(|member| is_living(member.status)).map(|member| &member.id);
        for id in living.chain([self.id()]) {
            let (group, sum) = id.life_sum(GROUPS);
            if let Some(slot) = sums.get_mut(group) {
                *slot ^= sum;
            }
        }
        sums
    }

    /// Adds the signed words of random living members of the groups that `differs` names.
    fn add_lives(&mut self, to: &NodeName, differs: &[bool], packet: &mut Vec<u8>) {
        let in_question = |claim: &&LifeClaim| differs.get(claim.id.life_sum(GROUPS).0).copied().unwrap_or(false);
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

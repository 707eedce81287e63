//! What comes in: packets, statements, signatures.
//!
//! ```text
//!   statement -> own name? -> news? -> signer fit to say it? -> budget -> Verify -> holds: act, pass on
//! ```

use foca::{Member, State};
use tokio::time::Instant;

use super::packet::{self, Body, Broadcast, Call, Inspected, Kind};
use super::roster::Goodbye;
use super::statement::{Accusation, Certainty, Leave, LifeClaim, STATEMENT_SIGNATURE_BYTES_MAX, Statement, Verdict};
use super::suspicion::Suspicion;
use super::{Cause, Core, Detector, GENERATION_JUMP_MAX, MEMBERS_MAX, MeshId, Output, PACKET_BYTES_MAX, Refused};
use crate::model::{MemberStatus, NodeName};

impl Core {
    /// Acts on `packet` from the peer that TLS verified as `sender`.
    ///
    /// # Errors
    /// Why the packet was refused; nothing has changed then but what a part of it may have said before the fault.
    pub fn handle_packet(&mut self, sender: &NodeName, packet: &[u8], now: Instant) -> Result<(), Refused> {
        self.wake(now);
        if packet.len() > PACKET_BYTES_MAX {
            return Err(Refused::TooLarge);
        }
        // What this node passes on itself it has taken in: in a storm that is most of what comes.
        let inspected = packet::inspect(packet, |item| self.news.holds(item) || self.reports.holds(item))
            .map_err(|_| Refused::Malformed)?;
        let Inspected { src, src_incarnation, dst, set_hash, suspected, body, broadcasts } = inspected;
        if src.name != *sender {
            return Err(Refused::Sender);
        }
        if src.name == self.id().name {
            self.outputs.push_back(Output::Conflict { theirs: src });
            return Err(Refused::OwnName);
        }
        if self.has_left {
            return Ok(());
        }
        self.drop_hearsay(&src);
        self.check_newcomer(&src)?;
        let is_meant = dst == self.id().life;
        // Goodbyes and records are good whomever the packet was for.
        for broadcast in broadcasts {
            match broadcast {
                Broadcast::Said(statement) => self.hear(sender, statement, now),
                records => self.outputs.push_back(Output::Received { from: src.clone(), broadcast: records }),
            }
        }
        let result = match body {
            Body::Swim { kind: Kind::TurnUndead, .. } => {
                if is_meant {
                    self.told_gone(now);
                }
                Ok(())
            }
            // foca, which may not know the name, would take it up: it never holds an older life than the roster.
            Body::Swim { .. } if self.is_outlived(&src) => {
                self.send_call_to(src.clone(), Call::Gone);
                Ok(())
            }
            Body::Swim { packet, kind } => {
                let result = self.swim.handle_data(&packet, &mut self.effects);
                self.drain(Cause::Input, now);
                self.note_incarnation(&src, src_incarnation, now);
                if self.living(&src.name).is_some() {
                    self.gone.remove(&src.name);
                }
                if kind == Kind::Ack && self.is_current(&src) {
                    self.hear_answer(&src.name, now);
                }
                result.map_err(|_| Refused::Protocol)
            }
            Body::Call(call) => {
                self.hear_call(&src, src_incarnation, call, is_meant, now);
                Ok(())
            }
        };
        if is_meant && let Some(incarnation) = suspected {
            self.accused(incarnation, now);
        }
        if self.is_current(&src) && set_hash.is_some_and(|theirs| self.records.hear(theirs, self.lag, now)) {
            self.outputs.push_back(Output::Differs { peer: src });
        }
        result
    }

    /// Takes a statement back that the owner was asked to sign; without a signature it is not spread.
    pub fn handle_signed(&mut self, statement: &Statement, now: Instant) {
        let own = self.id().clone();
        let is_signed = !statement.signature().is_empty();
        let is_spread = match statement {
            Statement::Life(claim) => claim.id == own && claim.incarnation == self.incarnation && !self.has_left,
            Statement::Leave(leave) => leave.by == own.name,
            Statement::Accuse(word) => word.accuser == own.name && !self.has_left,
            Statement::Demand(claim) => self.is_own_demand(claim),
        };
        if is_signed && is_spread {
            if let Statement::Life(claim) = statement {
                self.own_life = Some(claim.clone());
            }
            if let Statement::Leave(leave) = statement
                && let Some(member) = self.roster.find_mut(&leave.node)
            {
                member.sign_farewell(leave);
            }
            if !self.has_left {
                self.spread(&Broadcast::Said(statement.clone()), now);
            }
        }
        if let Statement::Leave(leave) = statement
            && leave.node == own.name
            && self.has_left
        {
            self.goodbye = Some(leave.clone());
            if is_signed {
                self.spread_goodbye(leave);
            }
        }
    }

    /// Takes a statement back that the owner was asked to verify.
    pub fn handle_verified(&mut self, statement: Statement, verdict: Verdict, now: Instant) {
        self.wake(now);
        match verdict {
            Verdict::Holds if !self.has_left => {}
            Verdict::Holds | Verdict::Unknown => return,
            Verdict::Broken => {
                self.stats.signatures_broken += 1;
                if matches!(statement, Statement::Life(_) | Statement::Leave(_)) {
                    self.stats.forged_lives += 1;
                }
                return;
            }
        }
        let is_news = match &statement {
            Statement::Life(claim) => self.take_life(claim, now),
            Statement::Leave(leave) => self.take_leave(leave, now),
            Statement::Accuse(word) => self.take_accusation(word, now),
            Statement::Demand(claim) => self.take_demand(claim, now),
        };
        if is_news {
            self.spread(&Broadcast::Said(statement), now);
        }
    }

    /// Corrects the life that a peer gave a gone stranger, once that one speaks for itself as `id`: the peer may have made
    /// it up, or the stranger's disk may have lost it. Others who know of a later life will say so to the member.
    pub(super) fn drop_hearsay(&mut self, id: &MeshId) {
        let Some(said) = self.gone.get_mut(&id.name).filter(|said| said.life != id.life) else { return };
        if self.roster.find(&id.name).is_some_and(|member| member.has_outlived(id)) {
            return;
        }
        *said = id.clone();
        self.change(&id.name, |roster| roster.correct(id));
    }

    /// Whether a later life of the name than `id` is known.
    fn is_outlived(&self, id: &MeshId) -> bool {
        self.roster.find(&id.name).is_some_and(|known| known.id.life > id.life)
    }

    /// Checks the bounds on who may be a member.
    pub(super) fn check_newcomer(&mut self, id: &MeshId) -> Result<(), Refused> {
        match self.roster.find(&id.name) {
            None if self.roster.len() >= MEMBERS_MAX => Err(Refused::Full),
            Some(known)
                if id.life.generation.number > known.id.life.generation.number.saturating_add(GENERATION_JUMP_MAX) =>
            {
                self.stats.forged_lives += 1;
                Err(Refused::Generation)
            }
            _ => Ok(()),
        }
    }

    /// Makes `id` a living member: it is proven.
    pub(super) fn accept(&mut self, id: &MeshId, incarnation: u16, now: Instant) {
        self.gone.remove(&id.name);
        if self.is_current(id) {
            self.note_incarnation(id, incarnation, now);
            return;
        }
        let alive = Member::new(id.clone(), incarnation, State::Alive);
        let result = self.swim.apply_many(std::iter::once(alive), false, &mut self.effects);
        self.settle(result, now);
        self.note_incarnation(id, incarnation, now);
    }

    /// Whether `id` is the life of its name that counts as living here.
    fn is_current(&self, id: &MeshId) -> bool {
        self.living(&id.name).is_some() && self.roster.find(&id.name).is_some_and(|member| member.id == *id)
    }

    /// Notes the incarnation that `id` itself said or signed.
    fn note_incarnation(&mut self, id: &MeshId, incarnation: u16, now: Instant) {
        let own = self.id().name.clone();
        let Some(member) = self.roster.find_mut(&id.name).filter(|member| member.id.life == id.life) else { return };
        if incarnation <= member.incarnation {
            return;
        }
        member.incarnation = incarnation;
        self.unrest.note(&id.name, self.swim.num_members(), now);
        if let Some(suspicion) = self.suspicions.get_mut(&id.name) {
            let was_believed = suspicion.is_believed();
            suspicion.void_below(incarnation, &own, now);
            if was_believed && !suspicion.is_believed() {
                self.stats.refuted += 1;
            }
            self.drop_empty(&id.name);
        }
    }

    fn hear_call(&mut self, src: &MeshId, incarnation: u16, call: Call, is_meant: bool, now: Instant) {
        // A stranger that a peer called gone is not: it speaks.
        let is_dead = self.living(&src.name).is_none() && !self.gone.contains_key(&src.name);
        let is_gone = self.is_outlived(src)
            || (is_dead && self.roster.find(&src.name).is_some_and(|known| known.id.life == src.life));
        if call == Call::Gone {
            if is_meant {
                self.told_gone(now);
            }
            return;
        }
        if is_gone {
            // As foca does with packets of its own: who asks under a life that is over is told so.
            if matches!(call, Call::Check(_)) {
                self.send_call_to(src.clone(), Call::Gone);
            }
            return;
        }
        self.accept(src, incarnation, now);
        match call {
            Call::Check(number) => self.send_call(&src.name, Call::Answer(number)),
            Call::Answer(_) => self.hear_answer(&src.name, now),
            Call::CheckFor { target, number, patience_ms } => {
                let patience = std::time::Duration::from_millis(patience_ms.into());
                if self.living(&target).is_some() {
                    if let Some(step) = self.checks.start_for(&src.name, number, &target, patience, now) {
                        self.take_step(step, now);
                    }
                } else if self.roster.find(&target).is_some() {
                    // Found dead here already: silence would speak against the asker.
                    self.send_call(&src.name, Call::Missed(number));
                }
            }
            Call::Reached(number) => {
                if let Some(target) = self.checks.reached(&src.name, number) {
                    self.hear_answer(&target, now);
                }
            }
            Call::Missed(number) => self.checks.missed(&src.name, number),
            Call::Lives(sums) => self.answer_lives(&src.name, &sums),
            Call::Gone | Call::News => {}
        }
    }

    /// Hears a statement that `sender` passed on.
    fn hear(&mut self, sender: &NodeName, statement: Statement, now: Instant) {
        match statement {
            _ if statement.signature().len() > STATEMENT_SIGNATURE_BYTES_MAX => self.stats.statements_dropped += 1,
            Statement::Life(claim) => self.hear_life(sender, claim, now),
            Statement::Leave(leave) => self.hear_leave(sender, leave, now),
            Statement::Accuse(word) => self.hear_accusation(sender, word, now),
            Statement::Demand(claim) => self.hear_demand(sender, claim, now),
        }
    }

    pub(super) fn verify(&mut self, sender: &NodeName, statement: Statement, now: Instant) {
        if self.budget.take(sender, now) {
            self.outputs.push_back(Output::Verify(statement));
        } else {
            self.stats.statements_dropped += 1;
        }
    }

    /// Tells whether `claim` says more than is known.
    fn is_life_news(&self, claim: &LifeClaim) -> bool {
        match self.roster.find(&claim.id.name) {
            None => true,
            Some(known) => {
                // Heard from the member itself already: its word is what the others can be shown.
                let is_same = claim.id == known.id && claim.incarnation == known.incarnation;
                let is_shown = known.proof.as_ref().is_some_and(|proof| proof.incarnation >= claim.incarnation);
                (claim.id.life, claim.incarnation) > (known.id.life, known.incarnation) || (is_same && !is_shown)
            }
        }
    }

    fn hear_life(&mut self, sender: &NodeName, claim: LifeClaim, now: Instant) {
        let own = self.id();
        if claim.id.name == own.name {
            // A twin that holds this node's key, or nothing.
            if claim.id.life.generation > own.life.generation {
                self.verify(sender, Statement::Life(claim), now);
            }
        } else if self.is_life_news(&claim) && self.check_newcomer(&claim.id).is_ok() {
            self.verify(sender, Statement::Life(claim), now);
        } else if self.has_failed(&claim.id) {
            self.hear_failed_life(sender, claim.id.name, now);
        }
    }

    /// Tells whether this life of a member, or a later one, was found gone here.
    fn has_failed(&self, id: &MeshId) -> bool {
        let known = self.roster.find(&id.name);
        known.is_some_and(|known| known.status == MemberStatus::Failed && known.id.life >= id.life)
    }

    /// Acts on a member's own word; returns whether others should hear it.
    fn take_life(&mut self, claim: &LifeClaim, now: Instant) -> bool {
        if claim.id.name == self.id().name {
            self.outputs.push_back(Output::Conflict { theirs: claim.id.clone() });
            return false;
        }
        if !self.is_life_news(claim) || self.check_newcomer(&claim.id).is_err() {
            return false;
        }
        if self.gone.get(&claim.id.name).is_some_and(|gone| gone.life >= claim.id.life) {
            // Its word may be older than the news of its end: it has to answer for itself.
            return false;
        }
        self.accept(&claim.id, claim.incarnation, now);
        if let Some(member) = self.roster.find_mut(&claim.id.name).filter(|member| member.id == claim.id) {
            member.proof = Some(claim.clone());
        }
        true
    }

    /// Notes a member by its own word, which somebody else vouches for; nothing is passed on.
    pub fn meet_by_word(&mut self, word: &LifeClaim, now: Instant) {
        if !self.has_left && word.id.name != self.id().name {
            self.drop_hearsay(&word.id);
            let _is_news = self.take_life(word, now);
        }
    }

    pub(super) fn hear_leave(&mut self, sender: &NodeName, leave: Leave, now: Instant) {
        let own = self.id();
        if leave.node == own.name {
            // Spoken for this node, which is alive.
            if leave.by != own.name && leave.life == own.life {
                self.verify(sender, Statement::Leave(leave), now);
            }
        } else if self.may_leave(&leave) {
            self.verify(sender, Statement::Leave(leave), now);
        }
    }

    /// Tells whether `leave` is news from a mouth that may say it: the member's own, or another's about the very life that
    /// failed. A later one may be alive, and would seem to be leaving for ever.
    fn may_leave(&self, leave: &Leave) -> bool {
        let has_failed = || {
            let known = self.roster.find(&leave.node).map(|member| member.id.life);
            self.living(&leave.node).is_none() && known == Some(leave.life)
        };
        self.roster.is_news(leave) && (leave.by == leave.node || has_failed())
    }

    /// Acts on a goodbye; returns whether others should hear it.
    fn take_leave(&mut self, leave: &Leave, now: Instant) -> bool {
        if leave.node == self.id().name {
            if leave.life == self.id().life {
                self.told_gone(now);
            }
            return false;
        }
        if !self.may_leave(leave) {
            return false;
        }
        let mut heard = Goodbye::Stale;
        self.change(&leave.node, |roster| heard = roster.leave(leave, now));
        if self.living(&leave.node).is_some() {
            self.depart(&leave.node, now);
        }
        let has_left = |member: &super::Tracked| member.status == MemberStatus::Left;
        if leave.prune && self.roster.find(&leave.node).is_some_and(has_left) {
            self.forget(&leave.node);
        }
        heard == Goodbye::News
    }

    /// Takes a living member that said goodbye for gone.
    fn depart(&mut self, name: &NodeName, now: Instant) {
        let Some(member) = self.roster.find(name) else { return };
        let down = Member::new(member.id.clone(), member.incarnation, State::Down);
        let result = self.swim.apply_many(std::iter::once(down), false, &mut self.effects);
        self.settle(result, now);
    }

    /// Tells whether `word` would add a vote.
    fn is_accusation_news(&self, word: &Accusation) -> bool {
        let Some(known) = self.roster.find(&word.accused) else { return false };
        // One ahead: the refutation of the present one may still be on its way here.
        let is_near = (known.incarnation..=known.incarnation.saturating_add(1)).contains(&word.incarnation);
        let is_about_now = known.id.life == word.life && is_near;
        let is_fit = self.living(&word.accused).is_some()
            && self.living(&word.accuser).is_some()
            && word.accuser != word.accused;
        let case = self.suspicions.get(&word.accused);
        is_about_now && is_fit && case.is_none_or(|case| case.wants(&word.accuser, word.incarnation, word.certainty))
    }

    fn hear_accusation(&mut self, sender: &NodeName, word: Accusation, now: Instant) {
        let own = self.id();
        if word.accused == own.name {
            if word.life == own.life {
                let is_sentence = word.certainty == Certainty::Crashed && self.profile.detector == Detector::Plain;
                if is_sentence { self.told_gone(now) } else { self.accused(word.incarnation, now) }
            }
        } else if word.accuser != own.name && self.is_accusation_news(&word) {
            self.verify(sender, Statement::Accuse(word), now);
        }
    }

    /// Counts another's vote; returns whether others should hear it.
    fn take_accusation(&mut self, word: &Accusation, now: Instant) -> bool {
        if !self.is_accusation_news(word) {
            return false;
        }
        if self.profile.detector == Detector::Plain && word.certainty == Certainty::Crashed {
            self.declare_down(&word.accused, now);
            return true;
        }
        if !self.budget.accuse(&word.accuser, now) {
            self.stats.statements_dropped += 1;
            return false;
        }
        let own = self.id().name.clone();
        let case = self.suspicions.entry(word.accused.clone()).or_insert_with(|| Suspicion::new(word.life, now));
        case.vote(&word.accuser, word.incarnation, word.certainty, &own, now);
        if case.is_believed() {
            self.judge(now);
        } else if self.profile.detector == Detector::Lifeguard {
            self.look_closer(&word.accused, word.certainty, now);
        }
        true
    }
}

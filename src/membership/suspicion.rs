//! Who accuses a member, and when that is enough (Lifeguard, arXiv 1707.00788, section IV.B).
//!
//! ```text
//!   one other's vote -> advisory: checked, never judged
//!   own vote, or two others' -> believed: timer from max down to min with every further accuser -> failed
//!   refutation (greater incarnation) -> votes about the smaller one are void
//! ```
//!
//! Invariants: an accuser counts once, so repeats shorten nothing; one accuser alone never decides for another node;
//! at most [`ACCUSERS_MAX`] votes of others are kept about one member.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::health::Unrest;
use super::id::Life;
use super::statement::Certainty;
use crate::model::NodeName;

/// Most other accusers kept of one member: more shorten nothing.
pub(super) const ACCUSERS_MAX: usize = 8;
/// How long a vote counts that nobody else confirmed.
const VOTE_LIFE: Duration = Duration::from_secs(10);

/// Shortest and longest suspicion, and how many confirmations lie between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) min: Duration,
    pub(super) max: Duration,
    pub(super) confirmations: u32,
}

impl Bounds {
    /// Returns how long a suspicion with so many accusers beyond the first lasts.
    pub(super) fn timeout(&self, confirmed: u32) -> Duration {
        if self.confirmations == 0 || confirmed >= self.confirmations {
            return self.min;
        }
        let share = f64::from(confirmed + 1).ln() / f64::from(self.confirmations + 1).ln();
        self.max.saturating_sub(self.max.saturating_sub(self.min).mul_f64(share))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Vote {
    incarnation: u16,
    certainty: Certainty,
    at: Instant,
}

/// The case against one life of one member, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suspicion {
    pub(super) life: Life,
    votes: BTreeMap<NodeName, Vote>,
    believed_since: Option<Instant>,
    /// When the suspect is asked again by this node, which found it silent itself.
    pub(super) next_appeal: Instant,
    /// No sentence before this moment: the suspect had just answered.
    put_off: Option<Instant>,
}

impl Suspicion {
    pub(super) fn new(life: Life, now: Instant) -> Self {
        Self { life, votes: BTreeMap::new(), believed_since: None, next_appeal: now, put_off: None }
    }

    /// Tells whether a vote of `accuser` about `incarnation` would add something.
    pub(super) fn wants(&self, accuser: &NodeName, incarnation: u16, certainty: Certainty) -> bool {
        match self.votes.get(accuser) {
            Some(vote) => {
                vote.incarnation < incarnation || (vote.certainty, certainty) == (Certainty::Silent, Certainty::Crashed)
            }
            None => self.votes.len() < ACCUSERS_MAX,
        }
    }

    /// Counts a vote; `own` is this node's name. Returns whether it added something.
    pub(super) fn vote(
        &mut self,
        accuser: &NodeName,
        incarnation: u16,
        certainty: Certainty,
        own: &NodeName,
        now: Instant,
    ) -> bool {
        // What this node found out itself has room beside eight others' words.
        let is_own_first = accuser == own && !self.has_vote(own);
        if !is_own_first && !self.wants(accuser, incarnation, certainty) {
            return false;
        }
        self.votes.insert(accuser.clone(), Vote { incarnation, certainty, at: now });
        self.settle(own, now);
        true
    }

    /// Voids the votes about incarnations below `incarnation`, and those that have waited too long for another.
    pub(super) fn void_below(&mut self, incarnation: u16, own: &NodeName, now: Instant) {
        self.votes.retain(|_, vote| vote.incarnation >= incarnation);
        self.settle(own, now);
    }

    /// Takes this node's own vote back: it has heard the suspect at `at`. False if there is none, or it is of later.
    pub(super) fn retract(&mut self, own: &NodeName, at: Instant) -> bool {
        if self.votes.get(own).is_none_or(|vote| vote.at > at) {
            return false;
        }
        self.votes.remove(own);
        self.settle(own, at);
        true
    }

    /// Voids an advisory vote that nobody confirmed in time; returns how many.
    pub(super) fn expire(&mut self, now: Instant) -> usize {
        if self.believed_since.is_some() {
            return 0;
        }
        let before = self.votes.len();
        self.votes.retain(|_, vote| now.saturating_duration_since(vote.at) < VOTE_LIFE);
        before - self.votes.len()
    }

    fn settle(&mut self, own: &NodeName, now: Instant) {
        let is_believed = self.has_vote(own) || self.votes.len() >= 2;
        self.believed_since = is_believed.then(|| self.believed_since.unwrap_or(now));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.votes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.votes.len()
    }

    pub(super) fn has_vote(&self, of: &NodeName) -> bool {
        self.votes.contains_key(of)
    }

    pub(super) fn is_believed(&self) -> bool {
        self.believed_since.is_some()
    }

    /// Returns when the member counts as failed, later in `unrest`; none while the case is advisory.
    pub(super) fn deadline(&self, bounds: &Bounds, own: &NodeName, unrest: &Unrest) -> Option<Instant> {
        let since = self.believed_since?;
        let confirmed = u32::try_from(self.votes.len().saturating_sub(1)).unwrap_or(u32::MAX);
        if self.has_crashed_for(own) {
            return Some(since);
        }
        let at = if self.is_certain() { since } else { unrest.end_of(since, bounds.timeout(confirmed)) };
        Some(self.put_off.map_or(at, |until| until.max(at)))
    }

    /// Tells whether two have met the refusal: there is nothing to wait for.
    pub(super) fn is_certain(&self) -> bool {
        self.votes.values().filter(|vote| vote.certainty == Certainty::Crashed).count() >= 2
    }

    fn has_crashed_for(&self, own: &NodeName) -> bool {
        self.votes.get(own).is_some_and(|vote| vote.certainty == Certainty::Crashed)
    }

    /// Leaves the suspect unsentenced until `until`; the votes stay.
    pub(super) fn put_off(&mut self, until: Instant) {
        self.put_off = Some(until);
    }

    /// Returns when an advisory vote ends; none where there is none.
    pub(super) fn expires(&self) -> Option<Instant> {
        if self.believed_since.is_some() {
            return None;
        }
        self.votes.values().map(|vote| vote.at + VOTE_LIFE).min()
    }

    /// Moves every time by `by`: this node slept, and nobody could answer it meanwhile.
    pub(super) fn postpone(&mut self, by: Duration) {
        self.believed_since = self.believed_since.map(|since| since + by);
        self.put_off = self.put_off.map(|until| until + by);
        for vote in self.votes.values_mut() {
            vote.at += by;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: &Unrest = &Unrest::CALM;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn bounds() -> Bounds {
        Bounds { min: Duration::from_secs(1), max: Duration::from_secs(3), confirmations: 3 }
    }

    fn case(votes: &[(&str, Certainty)], now: Instant) -> Suspicion {
        let mut case = Suspicion::new(Life::default(), now);
        for (accuser, certainty) in votes {
            case.vote(&name(accuser), 0, *certainty, &name("own"), now);
        }
        case
    }

    #[test]
    fn scenario_01_independent_confirmations_shorten_suspicion_and_repeats_do_not() {
        use Certainty::Silent;
        let now = crate::clock::now();
        let wait = |votes: &[(&str, Certainty)]| {
            case(votes, now).deadline(&bounds(), &name("own"), CALM).map(|deadline| deadline - now)
        };
        let alone = wait(&[("own", Silent)]).unwrap();
        assert_eq!(alone, Duration::from_secs(3));
        assert_eq!(wait(&[("own", Silent), ("own", Silent), ("own", Silent)]), Some(alone));
        let one = wait(&[("own", Silent), ("a", Silent)]).unwrap();
        assert_eq!(wait(&[("own", Silent), ("a", Silent), ("a", Silent)]), Some(one));
        let two = wait(&[("own", Silent), ("a", Silent), ("b", Silent)]).unwrap();
        let three = wait(&[("own", Silent), ("a", Silent), ("b", Silent), ("c", Silent)]).unwrap();
        // log(2)/log(4) is half of the way.
        assert_eq!(one, Duration::from_secs(2));
        assert!(alone > one && one > two && two > three, "{alone:?} {one:?} {two:?} {three:?}");
        assert_eq!(three, Duration::from_secs(1));
        assert_eq!(wait(&[("own", Silent), ("a", Silent), ("b", Silent), ("c", Silent), ("d", Silent)]), Some(three));
    }

    #[test]
    fn one_other_is_advice_and_two_are_believed() {
        use Certainty::{Crashed, Silent};
        let now = crate::clock::now();
        let own = name("own");
        assert_eq!(case(&[("a", Silent)], now).deadline(&bounds(), &own, CALM), None);
        assert_eq!(case(&[("a", Crashed)], now).deadline(&bounds(), &own, CALM), None);
        assert!(case(&[("a", Silent), ("b", Silent)], now).deadline(&bounds(), &own, CALM).is_some());
        // Refused ports are certain: this node's own, or two others'.
        assert_eq!(case(&[("own", Crashed)], now).deadline(&bounds(), &own, CALM), Some(now));
        assert_eq!(case(&[("a", Crashed), ("b", Crashed)], now).deadline(&bounds(), &own, CALM), Some(now));
        assert!(case(&[("a", Crashed), ("b", Silent)], now).deadline(&bounds(), &own, CALM).unwrap() > now);
    }

    #[test]
    fn a_sentence_that_is_put_off_keeps_its_votes() {
        let now = crate::clock::now();
        let mut suspicion = case(&[("a", Certainty::Crashed), ("b", Certainty::Crashed)], now);
        suspicion.put_off(now + Duration::from_secs(1));
        assert_eq!(suspicion.deadline(&bounds(), &name("own"), CALM), Some(now + Duration::from_secs(1)));
        // What this node meets itself is not kept waiting.
        suspicion.vote(&name("own"), 0, Certainty::Crashed, &name("own"), now);
        assert_eq!(suspicion.deadline(&bounds(), &name("own"), CALM), Some(now));
    }

    #[test]
    fn a_refutation_voids_older_votes_and_advice_ends() {
        let now = crate::clock::now();
        let own = name("own");
        let mut suspicion = case(&[("own", Certainty::Silent), ("a", Certainty::Silent)], now);
        suspicion.vote(&name("b"), 5, Certainty::Silent, &own, now);
        suspicion.void_below(1, &own, now);
        assert!(!suspicion.is_believed() && suspicion.has_vote(&name("b")));
        assert_eq!(suspicion.expire(now + VOTE_LIFE - Duration::from_millis(1)), 0);
        assert_eq!(suspicion.expire(now + VOTE_LIFE), 1);
        assert!(suspicion.is_empty());
    }

    #[test]
    fn votes_are_bounded() {
        let now = crate::clock::now();
        let mut suspicion = case(&[], now);
        for number in 0..100 {
            suspicion.vote(&name(&format!("n{number}")), 0, Certainty::Silent, &name("own"), now);
        }
        assert_eq!(suspicion.votes.len(), ACCUSERS_MAX);
        assert!(suspicion.vote(&name("own"), 0, Certainty::Crashed, &name("own"), now), "the own word has room");
    }
}

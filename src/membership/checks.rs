//! Checks of single members: a direct question, then helpers that answer either way (Lifeguard's nacks).
//!
//! ```text
//!   start: Check ...half: again... timeout: CheckFor -> 3 helpers ...half: Check again... 2 x timeout: failed
//!                                      helper: Check, again; Answer -> Reached | 80 % of the patience -> Missed (nack)
//! ```
//!
//! A datagram may be lost, so each question is put twice. A helper that says neither `Reached` nor `Missed` speaks
//! against the asker's own link and not against the target.
//!
//! Not here: what a failed check means (`detect`), who is checked when (`detect`), the packets (`packet`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::NodeName;

/// Most checks open at once, own ones and those for others together.
const OPEN_MAX: usize = 512;
/// Most checks open for one asker.
const PER_ASKER_MAX: usize = 8;
/// How many helpers are asked.
pub(super) const HELPERS: usize = 3;
/// Bounds on the time that an asker leaves its helpers.
const PATIENCE_MIN: Duration = Duration::from_millis(50);
const PATIENCE_MAX: Duration = Duration::from_secs(5);

/// For whom a member is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum For {
    Own { helpers: BTreeSet<NodeName>, has_asked: bool },
    Peer { asker: NodeName, number: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Check {
    target: NodeName,
    reason: For,
    /// How long each of the two stages lasts.
    timeout: Duration,
    began: Instant,
    next: Instant,
    ends: Instant,
}

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Put the question to `target`.
    Ask { target: NodeName, number: u32 },
    /// Ask helpers; [`Checks::asked`] is told whom.
    AskHelpers { target: NodeName, number: u32, patience: Duration },
    /// An own check failed; so many helpers said nothing at all.
    Failed { target: NodeName, silent_helpers: u8 },
    /// A check for `asker` failed.
    Missed { asker: NodeName, number: u32, target: NodeName },
}

/// What an answer settles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Settled {
    /// A check of this node's own.
    Own,
    /// One for another: tell it.
    For { asker: NodeName, number: u32 },
}

/// Every open check, by number.
#[derive(Debug, Default)]
pub(super) struct Checks {
    open: BTreeMap<u32, Check>,
    number: u32,
}

impl Checks {
    /// Begins an own check; none if one of this target is open or there are too many.
    pub(super) fn start(&mut self, target: &NodeName, timeout: Duration, now: Instant) -> Option<Step> {
        let is_open = |check: &Check| check.target == *target && matches!(check.reason, For::Own { .. });
        if self.open.values().any(is_open) {
            return None;
        }
        let reason = For::Own { helpers: BTreeSet::new(), has_asked: false };
        let (next, ends) = (now + timeout / 2, now + timeout * 2);
        self.open(Check { target: target.clone(), reason, timeout, began: now, next, ends })
    }

    /// Begins a check for `asker`, which waits for `patience`.
    pub(super) fn start_for(
        &mut self,
        asker: &NodeName,
        number: u32,
        target: &NodeName,
        patience: Duration,
        now: Instant,
    ) -> Option<Step> {
        let is_theirs = |check: &&Check| matches!(&check.reason, For::Peer { asker: of, .. } if of == asker);
        if self.open.values().filter(is_theirs).count() >= PER_ASKER_MAX {
            return None;
        }
        let patience = patience.clamp(PATIENCE_MIN, PATIENCE_MAX);
        let reason = For::Peer { asker: asker.clone(), number };
        let (next, ends) = (now + patience.mul_f64(0.4), now + patience.mul_f64(0.8));
        self.open(Check { target: target.clone(), reason, timeout: patience, began: now, next, ends })
    }

    fn open(&mut self, check: Check) -> Option<Step> {
        if self.open.len() >= OPEN_MAX {
            return None;
        }
        let number = self.next_number();
        let target = check.target.clone();
        self.open.insert(number, check);
        Some(Step::Ask { target, number })
    }

    /// Returns a fresh number, for a question that is not followed up.
    pub(super) fn next_number(&mut self) -> u32 {
        self.number = self.number.wrapping_add(1);
        self.number
    }

    /// Notes that `helpers` were asked for check `number`.
    pub(super) fn asked(&mut self, number: u32, helpers: &[NodeName]) {
        if let Some(Check { reason: For::Own { helpers: asked, .. }, .. }) = self.open.get_mut(&number) {
            asked.extend(helpers.iter().cloned());
        }
    }

    /// Notes an answer of `from` at `at`: every check of it that had begun is settled, whichever of them was answered.
    pub(super) fn answered(&mut self, from: &NodeName, at: Instant) -> Vec<Settled> {
        let is_settled = |check: &Check| check.target == *from && check.began <= at;
        let settled: Vec<u32> =
            self.open.iter().filter(|(_, check)| is_settled(check)).map(|(number, _)| *number).collect();
        let closed = settled.into_iter().filter_map(|number| self.open.remove(&number));
        let settle = |check: Check| match check.reason {
            For::Own { .. } => Settled::Own,
            For::Peer { asker, number } => Settled::For { asker, number },
        };
        closed.map(settle).collect()
    }

    /// Notes that `helper` reached the target of check `number`; returns the target if that helper was asked.
    pub(super) fn reached(&mut self, helper: &NodeName, number: u32) -> Option<NodeName> {
        match self.open.get(&number) {
            Some(Check { reason: For::Own { helpers, .. }, .. }) if helpers.contains(helper) => {
                self.open.remove(&number).map(|check| check.target)
            }
            _ => None,
        }
    }

    /// Notes that `helper` missed the target as well: it is there itself.
    pub(super) fn missed(&mut self, helper: &NodeName, number: u32) {
        if let Some(Check { reason: For::Own { helpers, .. }, .. }) = self.open.get_mut(&number) {
            helpers.remove(helper);
        }
    }

    /// Ends every check of `target` without a verdict.
    pub(super) fn forget(&mut self, target: &NodeName) {
        self.open.retain(|_, check| check.target != *target);
    }

    pub(super) fn clear(&mut self) {
        self.open.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Returns who is checked.
    pub(super) fn targets(&self) -> impl Iterator<Item = &NodeName> {
        self.open.values().map(|check| &check.target)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.open.values().map(|check| check.next.min(check.ends)).min()
    }

    /// Returns what is due at `now`.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut over = Vec::new();
        for (number, check) in &mut self.open {
            if check.ends <= now {
                over.push(*number);
            } else if check.next <= now {
                let (target, number) = (check.target.clone(), *number);
                match &mut check.reason {
                    For::Own { has_asked, .. } => {
                        let asks_helpers = !*has_asked && now + check.timeout >= check.ends;
                        check.next = now + check.timeout / 2;
                        if asks_helpers {
                            *has_asked = true;
                            steps.push(Step::AskHelpers { target, number, patience: check.timeout });
                            continue;
                        }
                    }
                    For::Peer { .. } => check.next = check.ends,
                }
                steps.push(Step::Ask { target, number });
            }
        }
        for number in over {
            let Some(Check { target, reason, .. }) = self.open.remove(&number) else { continue };
            steps.push(match reason {
                For::Own { helpers, .. } => {
                    Step::Failed { target, silent_helpers: u8::try_from(helpers.len()).unwrap_or(u8::MAX) }
                }
                For::Peer { asker, number } => Step::Missed { asker, number, target },
            });
        }
        steps
    }

    /// Moves every time by `by`: this node slept, and the answers may lie in its socket.
    pub(super) fn postpone(&mut self, by: Duration) {
        for check in self.open.values_mut() {
            check.next += by;
            check.ends += by;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(300);

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Runs to the end and returns what was done when.
    fn run(checks: &mut Checks, begin: Instant) -> Vec<(u128, Step)> {
        let mut done = Vec::new();
        while let Some(at) = checks.poll_timeout() {
            done.extend(checks.handle_timeout(at).into_iter().map(|step| ((at - begin).as_millis(), step)));
        }
        done
    }

    #[test]
    fn a_silent_member_is_asked_twice_then_through_helpers_then_failed() {
        let now = crate::clock::now();
        let mut checks = Checks::default();
        let Some(Step::Ask { number, .. }) = checks.start(&name("x"), TIMEOUT, now) else { panic!("asks") };
        assert_eq!(checks.start(&name("x"), TIMEOUT, now), None, "one check of a member at a time");
        let target = name("x");
        let ask = Step::Ask { target: target.clone(), number };
        let help = Step::AskHelpers { target: target.clone(), number, patience: TIMEOUT };
        let failed = Step::Failed { target, silent_helpers: 0 };
        assert_eq!(run(&mut checks, now), [(150, ask.clone()), (300, help), (450, ask), (600, failed)]);
    }

    #[test]
    fn helpers_that_say_nothing_are_counted_and_nacks_are_not() {
        let now = crate::clock::now();
        let mut checks = Checks::default();
        let Some(Step::Ask { number, .. }) = checks.start(&name("x"), TIMEOUT, now) else { panic!("asks") };
        checks.handle_timeout(now + TIMEOUT);
        checks.asked(number, &[name("a"), name("b"), name("c")]);
        checks.missed(&name("a"), number);
        assert_eq!(checks.reached(&name("stranger"), number), None);
        let steps = checks.handle_timeout(now + TIMEOUT * 2);
        assert_eq!(steps, [Step::Failed { target: name("x"), silent_helpers: 2 }]);
    }

    #[test]
    fn a_helper_tells_either_way_before_the_asker_gives_up() {
        let now = crate::clock::now();
        let mut checks = Checks::default();
        assert!(checks.start_for(&name("asker"), 7, &name("x"), TIMEOUT, now).is_some());
        let done = run(&mut checks, now);
        let missed = Step::Missed { asker: name("asker"), number: 7, target: name("x") };
        assert_eq!(done.last(), Some(&(240, missed)));
        assert!(checks.start_for(&name("asker"), 8, &name("x"), TIMEOUT, now).is_some());
        assert_eq!(checks.answered(&name("x"), now - Duration::from_millis(1)), [], "a sign from before it began");
        assert_eq!(checks.answered(&name("x"), now), [Settled::For { asker: name("asker"), number: 8 }]);
        assert_eq!(checks.poll_timeout(), None);
    }

    #[test]
    fn one_asker_cannot_fill_the_table() {
        let now = crate::clock::now();
        let mut checks = Checks::default();
        let opened = (0..100).filter(|at| checks.start_for(&name("a"), *at, &name("x"), TIMEOUT, now).is_some());
        assert_eq!(opened.count(), PER_ASKER_MAX);
        assert!(checks.start_for(&name("b"), 1, &name("x"), TIMEOUT, now).is_some());
    }

    #[test]
    fn checks_are_bounded_whoever_they_are_for() {
        let now = crate::clock::now();
        let mut checks = Checks::default();
        let opened = (0..1000).filter(|at| checks.start(&name(&format!("x{at}")), TIMEOUT, now).is_some());
        assert_eq!(opened.count(), OPEN_MAX);
        assert_eq!(checks.start_for(&name("asker"), 1, &name("x"), TIMEOUT, now), None);
        checks.forget(&name("x7"));
        assert!(checks.start_for(&name("asker"), 1, &name("x"), TIMEOUT, now).is_some());
    }
}

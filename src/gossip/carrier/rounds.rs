//! When to compare, and with whom.
//!
//! ```text
//!   rounds, 5 s or 30 s apart ------------------\
//!   the first others, one that comes or is back -+-> a place -> comparison -> Equal: rounds become rare
//!   again: after 1, 2, 4, 8, 16 s -------------/        ^                     Differed: rounds become frequent
//!        ^                                   no place --+                     Failed: the same, and the peer is asked again
//!        \----------------------------------------------/
//! ```
//!
//! A pure core: no clock, no task; randomness comes as a seed.
//!
//! Invariants: at most so many comparisons as there are places run, one with each peer, and one of them is a repeated one:
//! where many fail the host may be too busy for more; a comparison that failed, or found no place, is begun again soon, until
//! it would be as rare as the rounds, which go on with others meanwhile; what is remembered of peers is bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use crate::gossip::MemberView;
use crate::model::NodeName;

/// Members that a node compares with when it finds the first others alive: one of three may withhold what it has.
const JOIN_COMPARES: usize = 3;
/// In a mesh so large that connections lead to a few, the first that no connection leads to are asked a while later: by then
/// some do, and a newcomer costs no handshakes for this.
const JOIN_REST: Duration = Duration::from_secs(1);
/// Most members that are remembered as seen before: more than a membership holds.
const SEEN_MAX: usize = 32_768;
/// How many times rarer rounds are while the last comparison found nothing: what the pushes missed is found by comparing
/// with members that come back, and at last by these.
const QUIET_FACTOR: u32 = 6;
/// A comparison that failed is begun again after this time, then after twice as long each time: a connection that gave way to
/// another one is replaced within it, and a handshake that lost a packet is through.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// Most peers that are asked again: where more fail at once it is the host's fault or the network's, and the rounds do.
const AGAIN_MAX: usize = 8;

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::gossip) enum Found {
    /// Both sides held the same, or can do nothing about it.
    Equal,
    /// They did not.
    Differed,
    /// Nothing: it broke off.
    Failed,
}

/// A peer whose comparison is begun again.
#[derive(Debug, Clone, Copy)]
struct Again {
    /// How often it has failed in a row.
    failures: u32,
    at: Instant,
}

/// The rhythm of one carrier's comparisons.
#[derive(Debug)]
pub(super) struct Rounds {
    interval: Duration,
    at_once_max: usize,
    rng: StdRng,
    next_round: Instant,
    is_quiet: bool,
    under_way: BTreeSet<NodeName>,
    again: BTreeMap<NodeName, Again>,
    /// The others that answered when it was last looked.
    known_alive: BTreeSet<NodeName>,
    /// The others that have ever answered.
    seen: BTreeSet<NodeName>,
    /// Whom this node has asked as a newcomer; at most [`JOIN_COMPARES`].
    asked_first: BTreeSet<NodeName>,
}

impl Rounds {
    /// Begins; the first round comes after `interval`.
    pub(super) fn new(interval: Duration, at_once_max: usize, seed: u64, now: Instant) -> Self {
        Self {
            interval,
            at_once_max,
            rng: StdRng::seed_from_u64(seed),
            next_round: now + interval,
            is_quiet: false,
            under_way: BTreeSet::new(),
            again: BTreeMap::new(),
            known_alive: BTreeSet::new(),
            seen: BTreeSet::new(),
            asked_first: BTreeSet::new(),
        }
    }

    /// When there is something to begin.
    pub(super) fn wake_at(&self) -> Instant {
        let may_repeat = self.under_way.len() < self.at_once_max && !self.is_repeating();
        let waiting = self.again.values().filter(|_| may_repeat);
        waiting.map(|again| again.at).fold(self.next_round, Ord::min)
    }

    /// Whether a round begins.
    pub(super) fn is_round_due(&self, now: Instant) -> bool {
        self.next_round <= now
    }

    /// Begins a round; returns the member to compare with.
    ///
    /// It is a neighbour where the mesh is large (`near` is not empty: what differs spreads over neighbours as well, and a random
    /// member would cost a handshake each time), one that did not fail, and one that a connection leads to (`linked`), if there is one.
    pub(super) fn round(
        &mut self,
        alive: &[MemberView],
        near: &BTreeSet<NodeName>,
        linked: &BTreeSet<NodeName>,
        now: Instant,
    ) -> Option<MemberView> {
        let pause = if self.is_quiet { self.quiet_interval() } else { self.interval };
        self.next_round = now + self.jittered(pause);
        let is_near = |member: &&MemberView| near.is_empty() || near.contains(&member.name);
        let candidates: Vec<&MemberView> = alive.iter().filter(is_near).collect();
        let is_newcomer = self.has_first_to_ask(alive);
        let rank = |member: &MemberView| {
            let is_asked = is_newcomer && self.asked_first.contains(&member.name);
            (is_asked, self.again.contains_key(&member.name), !linked.contains(&member.name))
        };
        let best = candidates.iter().map(|member| rank(member)).min()?;
        let chosen: Vec<&MemberView> = candidates.into_iter().filter(|member| rank(member) == best).collect();
        let partner = (*chosen.choose(&mut self.rng)?).clone();
        if is_newcomer {
            self.asked_first.insert(partner.name.clone());
            self.ask_first_soon(alive, now);
        }
        self.begin(&partner.name, now).then_some(partner)
    }

    /// Whether this node has asked fewer others than a newcomer should, and there are more.
    fn has_first_to_ask(&self, alive: &[MemberView]) -> bool {
        self.asked_first.len() < JOIN_COMPARES && alive.iter().any(|member| !self.asked_first.contains(&member.name))
    }

    /// Puts the next round forward while a newcomer has others to ask.
    fn ask_first_soon(&mut self, alive: &[MemberView], now: Instant) {
        if self.has_first_to_ask(alive) {
            self.next_round = self.next_round.min(now + JOIN_REST);
        }
    }

    /// Begins a comparison that is to be repeated by now; returns its member.
    pub(super) fn repeat(&mut self, alive: &[MemberView], now: Instant) -> Option<MemberView> {
        // The rounds go on with others where one is gone.
        self.again.retain(|peer, again| again.at > now || alive.iter().any(|member| member.name == *peer));
        if self.is_repeating() {
            return None;
        }
        let due = self.again.iter().filter(|(_, again)| again.at <= now).min_by_key(|(_, again)| again.at);
        let peer = due?.0.clone();
        let member = alive.iter().find(|member| member.name == peer)?.clone();
        self.begin(&peer, now).then_some(member)
    }

    /// Whether a repeated comparison runs.
    fn is_repeating(&self) -> bool {
        self.under_way.iter().any(|peer| self.again.contains_key(peer))
    }

    /// Begins comparisons as the list of members changes; returns with whom.
    ///
    /// A newcomer asks the first that it finds. Whoever is not new asks those that come back, some three of all of them each:
    /// they may hold what was said in another part of a mesh that was split. Those that were never there ask by themselves:
    /// in a mesh so large that connections lead to a few (`near` is not empty) they are left alone.
    pub(super) fn members_changed(
        &mut self,
        alive: &[MemberView],
        near: &BTreeSet<NodeName>,
        linked: &BTreeSet<NodeName>,
        now: Instant,
    ) -> Vec<MemberView> {
        let is_small = near.is_empty();
        let mut asked: Vec<MemberView> = if self.has_first_to_ask(alive) {
            let is_first = |member: &&MemberView| {
                !self.asked_first.contains(&member.name) && (is_small || linked.contains(&member.name))
            };
            let first: Vec<&MemberView> = alive.iter().filter(is_first).collect();
            let left = JOIN_COMPARES - self.asked_first.len();
            first.sample(&mut self.rng, left).map(|member| (*member).clone()).collect()
        } else {
            let share = (alive.len() / JOIN_COMPARES).max(1);
            let fresh = alive.iter().filter(|member| !self.known_alive.contains(&member.name));
            let fresh = fresh.filter(|member| is_small || self.seen.contains(&member.name));
            fresh.filter(|_| self.rng.random_range(0..share) == 0).cloned().collect()
        };
        if self.has_first_to_ask(alive) {
            self.asked_first.extend(asked.iter().map(|member| member.name.clone()));
            self.ask_first_soon(alive, now);
        }
        self.known_alive = alive.iter().map(|member| member.name.clone()).collect();
        if self.seen.len() >= SEEN_MAX {
            self.seen.clear();
        }
        self.seen.extend(self.known_alive.iter().cloned());
        self.again.retain(|peer, _| self.known_alive.contains(peer));
        asked.retain(|member| self.begin(&member.name, now));
        asked
    }

    /// Notes how a comparison that was begun ended.
    pub(super) fn ended(&mut self, peer: &NodeName, found: Found, now: Instant) {
        self.under_way.remove(peer);
        if found == Found::Failed {
            let failures = self.again.get(peer).map_or(0, |again| again.failures);
            self.ask_again(peer, failures + 1, now);
        } else {
            self.again.remove(peer);
        }
        self.is_quiet = found == Found::Equal;
        if !self.is_quiet {
            self.differs(now);
        }
    }

    /// Notes that news did not reach `peer`.
    pub(super) fn missed(&mut self, peer: &NodeName, now: Instant) {
        if !self.again.contains_key(peer) {
            self.ask_again(peer, 0, now);
        }
        self.differs(now);
    }

    /// Notes that somebody lacks something: it is looked after soon.
    pub(super) fn differs(&mut self, now: Instant) {
        self.is_quiet = false;
        self.next_round = self.next_round.min(now + self.interval);
    }

    /// Takes a place for a comparison with `peer`; without one, `peer` is asked again.
    fn begin(&mut self, peer: &NodeName, now: Instant) -> bool {
        if self.under_way.contains(peer) {
            return false;
        }
        if self.under_way.len() < self.at_once_max {
            return self.under_way.insert(peer.clone());
        }
        if !self.again.contains_key(peer) {
            self.ask_again(peer, 0, now);
        }
        false
    }

    fn ask_again(&mut self, peer: &NodeName, failures: u32, now: Instant) {
        let pause = AGAIN_FIRST * 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
        if pause >= self.quiet_interval() {
            // As rare as the rounds, which come to it in their turn.
            self.again.remove(peer);
        } else if self.again.len() < AGAIN_MAX || self.again.contains_key(peer) {
            let at = now + self.jittered(pause);
            self.again.insert(peer.clone(), Again { failures, at });
        }
    }

    fn quiet_interval(&self) -> Duration {
        self.interval * QUIET_FACTOR
    }

    fn jittered(&mut self, pause: Duration) -> Duration {
        pause.mul_f64(self.rng.random_range(0.75..1.25))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::gossip::carrier::test_member as member;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn names(members: &[MemberView]) -> Vec<String> {
        members.iter().map(|member| member.name.to_string()).collect()
    }

    /// Rounds and a clock that stands until it is moved, between the members of `all`, which connections lead to.
    struct Run {
        rounds: Rounds,
        all: Vec<MemberView>,
        begun: Instant,
        now: Instant,
    }

    impl Run {
        fn new(count: usize, at_once_max: usize, seed: u64) -> Self {
            let now = clock::now();
            let all = (1..=count).map(|at| member(&format!("n{at}"))).collect();
            Self { rounds: Rounds::new(INTERVAL, at_once_max, seed, now), all, begun: now, now }
        }

        fn linked(&self) -> BTreeSet<NodeName> {
            self.all.iter().map(|member| member.name.clone()).collect()
        }

        /// The list changed, in a small mesh.
        fn members_changed(&mut self) -> Vec<MemberView> {
            let linked = self.linked();
            self.rounds.members_changed(&self.all, &BTreeSet::new(), &linked, self.now)
        }

        /// Moves on to what is due next, and returns the seconds since the beginning and whom it asks.
        fn step(&mut self) -> (f64, Vec<MemberView>) {
            self.now = self.now.max(self.rounds.wake_at());
            let mut asked: Vec<MemberView> = self.rounds.repeat(&self.all, self.now).into_iter().collect();
            if self.rounds.is_round_due(self.now) {
                let linked = self.linked();
                asked.extend(self.rounds.round(&self.all, &BTreeSet::new(), &linked, self.now));
            }
            ((self.now - self.begun).as_secs_f64(), asked)
        }

        fn end_all(&mut self, asked: &[MemberView], found: Found) {
            for member in asked {
                self.rounds.ended(&member.name, found, self.now);
            }
        }
    }

    #[test]
    fn a_comparison_that_failed_is_begun_again_after_1_2_4_8_and_16_seconds_and_rounds_go_on_with_others() {
        for seed in 0..50 {
            let mut run = Run::new(3, 4, seed);
            let first = run.members_changed();
            assert_eq!(first.len(), 3, "seed {seed}");
            for member in &first {
                let found = if member.name.as_str() == "n2" { Found::Failed } else { Found::Equal };
                run.rounds.ended(&member.name, found, run.now);
            }
            // n2 fails whenever it is asked, the others never do.
            let mut at = Vec::new();
            while run.now - run.begun < Duration::from_secs(40) {
                let (seconds, asked) = run.step();
                for member in &asked {
                    let fails = member.name.as_str() == "n2";
                    if fails && at.len() < 5 {
                        at.push(seconds);
                    }
                    run.rounds.ended(&member.name, if fails { Found::Failed } else { Found::Equal }, run.now);
                }
            }
            let mut before = 0.0;
            for (seconds, want) in at.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0]) {
                let pause = seconds - before;
                assert!((0.75 * want..1.25 * want).contains(&pause), "seed {seed}: {at:?}");
                before = *seconds;
            }
            assert_eq!(at.len(), 5, "seed {seed}");
        }
    }

    #[test]
    fn one_success_ends_the_repeats_and_what_is_equal_is_compared_every_30_seconds() {
        let mut run = Run::new(3, 4, 1);
        let first = run.members_changed();
        run.end_all(&first, Found::Equal);
        run.rounds.missed(&run.all[0].name, run.now);
        let (seconds, asked) = run.step();
        assert!(seconds < 1.25 && names(&asked) == ["n1"], "{seconds}: {asked:?}");
        run.end_all(&asked, Found::Failed);
        let (seconds, asked) = run.step();
        assert!(seconds < 2.5 && names(&asked) == ["n1"], "{seconds}: {asked:?}");
        run.end_all(&asked, Found::Equal);
        // The round that was put forward for the difference, and then the rare ones.
        let (seconds, asked) = run.step();
        assert!((3.75..8.0).contains(&seconds), "{seconds}");
        run.end_all(&asked, Found::Equal);
        for _ in 0..5 {
            let before = run.now;
            let (_, asked) = run.step();
            assert_eq!(asked.len(), 1);
            assert!(run.now - before >= Duration::from_millis(22_500), "{:?}", run.now - before);
            run.end_all(&asked, Found::Equal);
        }
    }

    #[test]
    fn a_round_avoids_those_that_failed_and_a_peer_that_is_gone_is_not_asked_again() {
        let mut run = Run::new(2, 4, 3);
        let first = run.members_changed();
        run.end_all(&first, Found::Equal);
        run.rounds.ended(&run.all[0].name, Found::Failed, run.now);
        run.rounds.next_round = run.now;
        let (_, asked) = run.step();
        assert_eq!(names(&asked), ["n2"]);
        run.end_all(&asked, Found::Equal);
        // Nobody else is there: it is better than nobody.
        let gone = run.all.pop().unwrap();
        run.rounds.next_round = run.now;
        let (_, asked) = run.step();
        assert_eq!(names(&asked), ["n1"]);
        run.end_all(&asked, Found::Failed);
        run.all = vec![gone];
        assert!(run.members_changed().is_empty());
        assert!(run.rounds.again.is_empty(), "n1 is not alive");
    }

    #[test]
    fn places_and_what_is_remembered_are_bounded_and_who_found_no_place_is_asked_when_there_is_one() {
        let mut run = Run::new(20, 2, 4);
        let first = run.members_changed();
        assert_eq!(first.len(), 2, "of three that are chosen at the join two find a place");
        assert_eq!(run.rounds.again.len(), 1);
        assert_eq!(run.rounds.wake_at(), run.rounds.next_round, "nobody is woken for a place that is not there");
        run.end_all(&first, Found::Equal);
        let (seconds, asked) = run.step();
        assert!(seconds < 1.25, "{seconds}");
        assert_eq!(asked.len(), 1);
        for member in &run.all {
            run.rounds.missed(&member.name, run.now);
        }
        assert_eq!(run.rounds.again.len(), AGAIN_MAX);
        assert_eq!(run.rounds.wake_at(), run.rounds.next_round, "one is repeated at a time");
        run.end_all(&asked, Found::Equal);
        assert!(run.rounds.wake_at() < run.now + Duration::from_millis(1250));
    }

    /// A node of a large mesh, whose neighbours are the first eight and to whom connections lead to `linked`.
    fn large(count: usize, linked: &[&str]) -> (Run, BTreeSet<NodeName>, BTreeSet<NodeName>) {
        let run = Run::new(count, 4, 5);
        let near = run.all.iter().take(8).map(|member| member.name.clone()).collect();
        (run, near, linked.iter().map(|name| name.parse().unwrap()).collect())
    }

    #[test]
    fn a_newcomer_of_a_large_mesh_asks_three_others_over_connections_that_there_are() {
        let (mut run, near, linked) = large(100, &["n1"]);
        let asked = run.rounds.members_changed(&run.all, &near, &linked, run.now);
        assert_eq!(names(&asked), ["n1"], "no other connection leads anywhere");
        run.end_all(&asked, Found::Equal);
        let linked: BTreeSet<NodeName> = ["n1", "n4", "n7"].map(|name| name.parse().unwrap()).into();
        let mut second = Vec::new();
        for _ in 0..2 {
            let at = run.rounds.wake_at();
            assert!(at <= run.now + JOIN_REST);
            run.now = at;
            let asked: Vec<MemberView> = run.rounds.round(&run.all, &near, &linked, at).into_iter().collect();
            second.extend(names(&asked));
            run.end_all(&asked, Found::Equal);
        }
        second.sort();
        assert_eq!(second, ["n4", "n7"]);
        assert!(run.rounds.wake_at() > run.now + INTERVAL, "then the rounds are rare");
    }

    #[test]
    fn in_a_large_mesh_newcomers_are_left_alone_and_those_that_come_back_are_asked() {
        let (mut run, near, linked) = large(100, &["n1", "n2", "n3"]);
        let asked = run.rounds.members_changed(&run.all, &near, &linked, run.now);
        assert_eq!(asked.len(), 3);
        run.end_all(&asked, Found::Equal);
        let (all, mut asked) = (run.all.clone(), Vec::new());
        for new in 0..200 {
            run.all.push(member(&format!("new{new}")));
            asked.extend(run.rounds.members_changed(&run.all, &near, &linked, run.now));
        }
        assert_eq!(names(&asked), [""; 0]);
        // Most of them were cut off, again and again: of 300 that see each of 200 come back some three ask it.
        let mut asked = 0;
        for _ in 0..20 {
            run.rounds.members_changed(&all, &near, &linked, run.now);
            let back = run.rounds.members_changed(&run.all, &near, &linked, run.now);
            run.end_all(&back, Found::Equal);
            asked += back.len();
        }
        assert!((10..80).contains(&asked), "{asked}");
    }
}

//! What each member is to an operator: alive, leaving, left or failed.
//!
//! Flap damping: bad news counts at once, good news of a member that keeps failing is held. Its third return from
//! `failed` within a minute is shown after 5 s, each further one after twice as long, a minute at most.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::id::MeshId;
use super::statement::{Leave, LifeClaim};
use crate::model::{MemberStatus, NodeName};

/// How long a failed member is remembered (serf's default): it may come back after a long weekend.
pub(super) const FAILED_REAPED_AFTER: Duration = Duration::from_hours(72);
/// How long a member that left is remembered (serf's default).
pub(super) const LEFT_REAPED_AFTER: Duration = Duration::from_hours(24);

/// The time over which returns from `failed` are counted.
const RETURNS_WINDOW: Duration = Duration::from_mins(1);
/// The return that is held first.
const RETURNS_HELD_FROM: usize = 3;
/// Most returns remembered: the hold has long reached its greatest length.
const RETURNS_MAX: usize = 8;
/// First and longest hold.
const HOLD_MIN: Duration = Duration::from_secs(5);
const HOLD_MAX: Duration = Duration::from_mins(1);

/// One member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// Its newest identity.
    pub id: MeshId,
    /// What it is.
    pub status: MemberStatus,
    /// SWIM's incarnation of this life, as far as it is proven.
    pub(super) incarnation: u16,
    /// The member's own signed word for this life; none until it came.
    pub(super) proof: Option<LifeClaim>,
    /// When it last answered this node.
    pub(super) heard: Option<Instant>,
    since: Instant,
    farewell: Option<Leave>,
    /// When it came back from `failed`, the newest last.
    returns: VecDeque<Instant>,
}

impl Tracked {
    fn said_goodbye(&self) -> bool {
        self.farewell.as_ref().is_some_and(|leave| leave.life >= self.id.life)
    }

    /// Whether its own goodbye is of a later life than `id`.
    pub(super) fn has_outlived(&self, id: &MeshId) -> bool {
        self.farewell.as_ref().is_some_and(|leave| leave.by == leave.node && leave.life > id.life)
    }

    /// Since when it has its status.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Notes the signature over a goodbye that this node spoke for the member.
    pub(super) fn sign_farewell(&mut self, leave: &Leave) {
        if self.farewell.as_ref().is_some_and(|known| known.life == leave.life && known.signature.is_empty()) {
            self.farewell = Some(leave.clone());
        }
    }

    /// Returns how long this return from `failed` is held back.
    fn hold(&mut self, now: Instant) -> Duration {
        self.returns.retain(|at| now.saturating_duration_since(*at) < RETURNS_WINDOW);
        self.returns.push_back(now);
        if self.returns.len() > RETURNS_MAX {
            self.returns.pop_front();
        }
        match self.returns.len().checked_sub(RETURNS_HELD_FROM) {
            Some(more) => (HOLD_MIN * 2_u32.saturating_pow(u32::try_from(more).unwrap_or(u32::MAX))).min(HOLD_MAX),
            None => Duration::ZERO,
        }
    }
}

/// Every other member that is known. Bounded by the core, which refuses names past its limit.
#[derive(Debug, Default)]
pub(super) struct Roster {
    members: BTreeMap<NodeName, Tracked>,
    /// Members that are back and not shown yet, with the end of their hold.
    held: BTreeMap<NodeName, Instant>,
}

/// What a goodbye changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goodbye {
    /// It was known, or is about an older life or a stranger.
    Stale,
    /// It was news.
    News,
}

impl Roster {
    pub(super) fn find(&self, name: &NodeName) -> Option<&Tracked> {
        self.members.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Tracked> {
        self.members.values()
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Notes that `id` answers; a goodbye of this life or a later one still stands.
    pub(super) fn up(&mut self, id: &MeshId, now: Instant) {
        self.set(id, now, |member| if member.said_goodbye() { MemberStatus::Leaving } else { MemberStatus::Alive });
    }

    /// Notes that a member that was gone answers as `id`: as [`Roster::up`], but held back if that happens often.
    pub(super) fn back(&mut self, id: &MeshId, now: Instant) {
        let member = self.members.get_mut(&id.name).filter(|member| member.status == MemberStatus::Failed);
        let hold = member.map_or(Duration::ZERO, |member| member.hold(now));
        if hold.is_zero() {
            self.up(id, now);
        } else {
            self.set(id, now, |member| member.status);
            self.held.insert(id.name.clone(), now + hold);
        }
    }

    /// Shows a member whose hold is over.
    pub(super) fn release(&mut self, name: &NodeName, now: Instant) {
        if self.held.remove(name).is_some()
            && let Some(id) = self.members.get(name).map(|member| member.id.clone())
        {
            self.up(&id, now);
        }
    }

    /// Returns the members whose hold is over at `now`.
    pub(super) fn releasable(&self, now: Instant) -> Vec<NodeName> {
        self.held.iter().filter(|(_, ends)| **ends <= now).map(|(name, _)| name.clone()).collect()
    }

    /// Returns how many are held back, and when the first hold ends.
    pub(super) fn holds(&self) -> (usize, Option<Instant>) {
        (self.held.len(), self.held.values().min().copied())
    }

    pub(super) fn find_mut(&mut self, name: &NodeName) -> Option<&mut Tracked> {
        self.members.get_mut(name)
    }

    /// Notes that `id` is gone.
    pub(super) fn down(&mut self, id: &MeshId, now: Instant) {
        self.held.remove(&id.name);
        self.set(id, now, |member| if member.said_goodbye() { MemberStatus::Left } else { MemberStatus::Failed });
    }

    /// Notes that a member that is known by hearsay alone calls itself `id`, which may be an earlier life. What others
    /// said of its going goes with the life that they made of it.
    pub(super) fn correct(&mut self, id: &MeshId) {
        let Some(member) = self.members.get_mut(&id.name) else { return };
        member.id = id.clone();
        member.incarnation = 0;
        member.proof = None;
        member.farewell = member.farewell.take().filter(|leave| leave.by == leave.node);
    }

    /// Notes that a member has a new identity with the standing of the old.
    pub(super) fn renamed(&mut self, id: &MeshId, now: Instant) {
        self.set(id, now, |member| match member.status {
            MemberStatus::Leaving if !member.said_goodbye() => MemberStatus::Alive,
            MemberStatus::Left if !member.said_goodbye() => MemberStatus::Failed,
            status => status,
        });
    }

    fn set(&mut self, id: &MeshId, now: Instant, status: impl Fn(&Tracked) -> MemberStatus) {
        let member = self.members.entry(id.name.clone()).or_insert_with(|| Tracked {
            id: id.clone(),
            status: MemberStatus::Alive,
            incarnation: 0,
            proof: None,
            heard: None,
            since: now,
            farewell: None,
            returns: VecDeque::new(),
        });
        if id.life < member.id.life {
            return;
        }
        if *id != member.id {
            member.id = id.clone();
            member.incarnation = 0;
            member.proof = None;
        }
        let status = status(member);
        if member.status != status {
            member.status = status;
            member.since = now;
        }
    }

    /// Tells whether `leave` says something new.
    pub(super) fn is_news(&self, leave: &Leave) -> bool {
        self.members.get(&leave.node).is_some_and(|member| {
            leave.life >= member.id.life && member.farewell.as_ref().is_none_or(|known| known.life < leave.life)
        })
    }

    pub(super) fn leave(&mut self, leave: &Leave, now: Instant) -> Goodbye {
        if !self.is_news(leave) {
            return Goodbye::Stale;
        }
        let Some(member) = self.members.get_mut(&leave.node) else { return Goodbye::Stale };
        member.farewell = Some(leave.clone());
        let status = match member.status {
            MemberStatus::Alive | MemberStatus::Leaving => MemberStatus::Leaving,
            MemberStatus::Failed | MemberStatus::Left => MemberStatus::Left,
        };
        if member.status != status {
            member.status = status;
            member.since = now;
        }
        Goodbye::News
    }

    pub(super) fn forget(&mut self, name: &NodeName) -> Option<Tracked> {
        self.held.remove(name);
        self.members.remove(name)
    }

    /// Returns the members that have been gone for so long that they are forgotten.
    pub(super) fn due(&self, failed_for: Duration, now: Instant) -> Vec<MeshId> {
        let is_due = |member: &&Tracked| match member.status {
            MemberStatus::Failed => now.saturating_duration_since(member.since) >= failed_for,
            MemberStatus::Left => now.saturating_duration_since(member.since) >= LEFT_REAPED_AFTER,
            MemberStatus::Alive | MemberStatus::Leaving => false,
        };
        self.members.values().filter(is_due).map(|member| member.id.clone()).collect()
    }

    /// Returns at most `limit` goodbyes that others may have missed.
    pub(super) fn farewells(&self, limit: usize) -> Vec<Leave> {
        let leave = |member: &Tracked| {
            let leave = member.farewell.clone().filter(|_| member.said_goodbye());
            // A goodbye that could not be signed tells others nothing.
            leave.filter(|leave| !leave.signature.is_empty())
        };
        self.members.values().filter_map(leave).take(limit).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Generation;

    fn id(number: u64, renewals: u32) -> MeshId {
        let addr = "127.0.0.1:8301".parse().unwrap();
        let mut id = MeshId::new("a".parse().unwrap(), addr, Generation { number, nonce: 0 });
        id.life.renewals = renewals;
        id
    }

    fn leave(of: &MeshId) -> Leave {
        Leave { node: of.name.clone(), life: of.life, prune: false, by: of.name.clone(), signature: vec![1] }
    }

    fn status(roster: &Roster) -> MemberStatus {
        roster.find(&id(1, 0).name).unwrap().status
    }

    #[test]
    fn left_and_failed_are_told_apart_whichever_word_comes_first() {
        let now = crate::clock::now();
        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        assert_eq!(roster.leave(&leave(&id(1, 0)), now), Goodbye::News);
        assert_eq!(status(&roster), MemberStatus::Leaving);
        roster.down(&id(1, 0), now);
        assert_eq!(status(&roster), MemberStatus::Left);

        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        roster.down(&id(1, 0), now);
        assert_eq!(status(&roster), MemberStatus::Failed);
        assert_eq!(roster.leave(&leave(&id(1, 0)), now), Goodbye::News);
        assert_eq!(status(&roster), MemberStatus::Left);
        assert_eq!(roster.leave(&leave(&id(1, 0)), now), Goodbye::Stale);
    }

    #[test]
    fn a_later_life_is_alive_at_once_and_old_words_do_nothing() {
        let now = crate::clock::now();
        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        roster.leave(&leave(&id(1, 0)), now);
        roster.down(&id(1, 0), now);
        roster.up(&id(2, 0), now);
        assert_eq!(status(&roster), MemberStatus::Alive);
        roster.down(&id(1, 0), now);
        assert_eq!(roster.leave(&leave(&id(1, 0)), now), Goodbye::Stale);
        assert_eq!(status(&roster), MemberStatus::Alive);
        roster.leave(&leave(&id(2, 0)), now);
        roster.renamed(&id(2, 1), now);
        assert_eq!(status(&roster), MemberStatus::Alive);
    }

    #[test]
    fn the_gone_are_reaped_after_their_time() {
        let now = crate::clock::now();
        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        roster.down(&id(1, 0), now);
        assert!(
            roster
                .due(FAILED_REAPED_AFTER, now + FAILED_REAPED_AFTER.saturating_sub(Duration::from_secs(1)))
                .is_empty()
        );
        assert_eq!(roster.due(FAILED_REAPED_AFTER, now + FAILED_REAPED_AFTER), [id(1, 0)]);
        assert_eq!(roster.due(Duration::from_hours(8), now + Duration::from_hours(8)), [id(1, 0)]);
        roster.leave(&leave(&id(1, 0)), now);
        assert_eq!(roster.due(FAILED_REAPED_AFTER, now + LEFT_REAPED_AFTER), [id(1, 0)]);
    }

    #[test]
    fn bad_news_counts_at_once_and_the_good_news_of_a_flapping_member_is_held() {
        let mut now = crate::clock::now();
        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        let mut holds = Vec::new();
        for round in 1..=6 {
            roster.down(&id(1, round - 1), now);
            assert_eq!(status(&roster), MemberStatus::Failed);
            now += Duration::from_secs(1);
            roster.back(&id(1, round), now);
            let hold = roster.holds().1.map_or(Duration::ZERO, |ends| ends - now);
            holds.push(hold.as_secs());
            assert_eq!(status(&roster) == MemberStatus::Alive, hold.is_zero(), "{round}");
        }
        assert_eq!(holds, [0, 0, 5, 10, 20, 40]);
        let name = id(1, 0).name;
        assert!(roster.releasable(now + Duration::from_secs(39)).is_empty());
        assert_eq!(roster.releasable(now + Duration::from_secs(40)), std::slice::from_ref(&name));
        roster.release(&name, now + Duration::from_secs(40));
        assert_eq!(status(&roster), MemberStatus::Alive);
        // A minute of calm, and it counts from the beginning.
        now += Duration::from_secs(120);
        roster.down(&id(1, 6), now);
        roster.back(&id(1, 7), now);
        assert_eq!(status(&roster), MemberStatus::Alive);
    }

    #[test]
    fn a_held_member_that_fails_again_is_not_released() {
        let now = crate::clock::now();
        let mut roster = Roster::default();
        roster.up(&id(1, 0), now);
        for round in 1..=3 {
            roster.down(&id(1, round - 1), now);
            roster.back(&id(1, round), now);
        }
        assert_eq!(roster.holds().0, 1);
        roster.down(&id(1, 3), now);
        assert_eq!(roster.holds(), (0, None));
        assert_eq!(status(&roster), MemberStatus::Failed);
    }
}

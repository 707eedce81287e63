//! What each member is to an operator: alive, leaving, left or failed.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::id::{Life, MeshId};
use super::packet::Leave;
use crate::model::{MemberStatus, NodeName};

/// How long a failed member is remembered unless told otherwise (serf's default): it may come back after a long weekend.
pub(super) const FAILED_REAPED_AFTER: Duration = Duration::from_hours(72);
/// How long a member that left is remembered (serf's default).
pub(super) const LEFT_REAPED_AFTER: Duration = Duration::from_hours(24);

/// One member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// Its newest identity.
    pub id: MeshId,
    /// What it is.
    pub status: MemberStatus,
    /// Since when it is that.
    pub since: Instant,
    farewell: Option<Life>,
}

impl Tracked {
    fn said_goodbye(&self) -> bool {
        self.farewell.is_some_and(|life| life >= self.id.life)
    }
}

/// Every other member that is known. Bounded by the core, which refuses names past its limit.
#[derive(Debug, Default)]
pub(super) struct Roster {
    members: BTreeMap<NodeName, Tracked>,
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

    /// Notes that `id` is gone.
    pub(super) fn down(&mut self, id: &MeshId, now: Instant) {
        self.set(id, now, |member| if member.said_goodbye() { MemberStatus::Left } else { MemberStatus::Failed });
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
            since: now,
            farewell: None,
        });
        if id.life < member.id.life {
            return;
        }
        member.id = id.clone();
        let status = status(member);
        if member.status != status {
            member.status = status;
            member.since = now;
        }
    }

    pub(super) fn leave(&mut self, leave: &Leave, now: Instant) -> Goodbye {
        let Some(member) = self.members.get_mut(&leave.node) else { return Goodbye::Stale };
        if leave.life < member.id.life || member.farewell.is_some_and(|known| known >= leave.life) {
            return Goodbye::Stale;
        }
        member.farewell = Some(leave.life);
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
        self.members.remove(name)
    }

    /// Returns the members that have been gone for so long that they are forgotten: failed ones after `failed_for`.
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
            let life = member.farewell.filter(|_| member.said_goodbye())?;
            Some(Leave { node: member.id.name.clone(), life, prune: false })
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
        Leave { node: of.name.clone(), life: of.life, prune: false }
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
}

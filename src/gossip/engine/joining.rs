//! Joining: whom to ask, what an answer changes, and whom to let in.

use std::net::SocketAddr;

use rand::RngExt as _;
use tokio::time::Instant;

use super::message::{HelloReply, WELCOME_MEMBERS_MAX};
use super::{
    DOUBT_TIME, Engine, Event, JOIN_PAUSE_MAX, JOIN_PAUSE_MIN, JOIN_PEERS_MAX, JOIN_SYNC_ROUNDS, Output, Turn,
};
use crate::membership::{Leave, Life, MemberEntry, MeshId};
use crate::model::{MemberStatus, NodeName};
use crate::replica::Replica;

/// A peer that let this node in.
#[derive(Debug, Clone)]
pub struct Welcomed {
    /// Who it is.
    pub id: MeshId,
    /// The members that it knows.
    pub members: Vec<MemberEntry>,
    /// The goodbyes that it remembers.
    pub farewells: Vec<Leave>,
}

/// What became of an attempt to join.
#[derive(Debug, Clone, Default)]
pub struct JoinOutcome {
    /// Who let this node in; a connection to each is open.
    pub joined: Vec<Welcomed>,
    /// Target and reason.
    pub failed: Vec<(String, String)>,
    /// A later life of this node that a peer remembers.
    pub outdated: Option<Life>,
}

/// Who began an attempt to join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinCause {
    /// [`Output::Join`].
    Engine,
    /// An operator.
    Order,
}

/// What an answer to a hello means to the node that said it.
#[derive(Debug, Clone)]
pub enum Attempt {
    /// It is in.
    Joined(Welcomed),
    /// A later life of its name is remembered.
    Outdated(Life),
}

/// What became of asking the holder of a name whether it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incumbent {
    /// Nobody was asked.
    Unasked,
    /// It answered at its address, or nothing says that it is gone.
    Answers,
    /// Its host says that nobody has its port.
    Silent,
}

impl Attempt {
    /// Judges the `reply` of the peer that TLS verified as `peer`, reached at `addr`.
    ///
    /// # Errors
    /// Why the node is not in, for people.
    pub fn judge(reply: HelloReply, peer: &NodeName, addr: SocketAddr) -> Result<Self, String> {
        match reply {
            HelloReply::Welcome { id, members, farewells } if id.name == *peer => {
                Ok(Self::Joined(Welcomed { id, members, farewells }))
            }
            HelloReply::Welcome { id, .. } => {
                Err(format!("{addr} is certified as {peer} and calls itself {}", id.name))
            }
            HelloReply::Refused(reason) => Err(format!("{addr} refused: {reason}")),
            HelloReply::Outdated(life) => Ok(Self::Outdated(life)),
        }
    }
}

impl Engine {
    /// When the next attempt to join is due: only while nobody else is alive or the others keep taking this node for
    /// gone, there is somebody to ask, and this node has not left.
    pub(super) fn join_at(&self) -> Option<Instant> {
        let is_alone = self.core.alive_count() == 0;
        let is_wanted = !self.is_joining && !self.core.has_left() && (is_alone || self.is_doubted);
        let has_targets =
            !self.seeds.is_empty() || !self.known_peers.is_empty() || self.core.members().next().is_some();
        (is_wanted && has_targets).then_some(self.next_join)
    }

    pub(super) fn join_again(&mut self, now: Instant) {
        let targets = self.join_targets();
        self.join_attempts = self.join_attempts.wrapping_add(1);
        let jitter = self.rng.random_range(0.5..1.0);
        self.next_join = now + self.join_pause.mul_f64(jitter);
        self.join_pause = (self.join_pause * 2).min(JOIN_PAUSE_MAX);
        if !targets.is_empty() {
            self.is_joining = true;
            self.outputs.push_back(Output::Join { targets });
        }
    }

    /// Notes that the others took this node for gone. Where it happens again and again they remember a later life, which
    /// a hello brings to light: the disk may have lost the last generation.
    pub(super) fn doubt(&mut self, now: Instant) {
        let before = self.renewed_at.replace(now);
        if before.is_some_and(|at| now.saturating_duration_since(at) < DOUBT_TIME) && !self.is_doubted {
            self.is_doubted = true;
            self.join_pause = JOIN_PAUSE_MIN;
            self.next_join = now;
        }
    }

    /// Every seed, and known peers in turn: members first, then those alive at the last run, then the others.
    fn join_targets(&self) -> Vec<String> {
        let members = self.core.members().filter(|member| member.status != MemberStatus::Left);
        let mut known: Vec<SocketAddr> = Vec::new();
        let stored = self.known_peers.iter().map(|peer| peer.addr);
        for addr in members.map(|member| member.id.addr).chain(stored) {
            if addr != self.node.mesh_addr && !known.contains(&addr) {
                known.push(addr);
            }
        }
        let begin = if known.is_empty() { 0 } else { (self.join_attempts * JOIN_PEERS_MAX) % known.len() };
        let (before, after) = known.split_at(begin);
        let turn = after.iter().chain(before).take(JOIN_PEERS_MAX).map(SocketAddr::to_string);
        let mut targets: Vec<String> = turn.collect();
        targets.extend(self.seeds.iter().filter(|seed| !targets.contains(seed)).cloned().collect::<Vec<_>>());
        targets
    }

    /// Takes over what an attempt to join brought.
    pub fn handle_joined(&mut self, cause: JoinCause, outcome: JoinOutcome, turn: &Turn<'_>) {
        let JoinOutcome { joined, failed, outdated } = outcome;
        if cause == JoinCause::Engine {
            self.is_joining = false;
            self.is_doubted = false;
            self.joins_in_vain = if joined.is_empty() { self.joins_in_vain.saturating_add(1) } else { 0 };
        }
        let in_vain = self.joins_in_vain;
        self.tell(Event::Joined { in_vain, peers: joined.iter().map(|peer| peer.id.clone()).collect(), failed });
        if let Some(life) = outdated {
            self.outlive(life, turn);
        }
        for peer in joined {
            self.core.meet(&peer.id, turn.now);
            self.core.learn(peer.members, turn.now);
            self.core.learn_farewells(peer.farewells, turn.now);
            self.core.announce(peer.id.clone(), turn.now);
            self.start_sync(&peer.id.name, JOIN_SYNC_ROUNDS);
        }
        self.settle(turn);
    }

    /// Takes a generation above the one that a peer remembers of this name, and publishes anew under it.
    fn outlive(&mut self, theirs: Life, turn: &Turn<'_>) {
        if theirs < self.core.id().life {
            return;
        }
        if !self.core.outlive(theirs, turn.now) {
            self.tell(Event::Implausible(theirs.generation));
            return;
        }
        self.tell(Event::Outlived(self.generation()));
        // What is forgotten here leaves the catalogue too, until the others tell it again.
        self.dirty.extend(self.replica.nodes().map(|(name, _)| name.clone()));
        self.replica = Replica::new(self.node.name.clone(), self.generation(), self.replica_params.clone());
        self.publish(turn);
        self.next_join = turn.now;
        self.are_members_dirty = true;
    }

    /// Returns the living member whose name `id` claims from another address: whether that one still answers decides,
    /// since a restart elsewhere and a copy of its disk look alike.
    pub fn incumbent(&self, peer: &NodeName, id: &MeshId) -> Option<&MeshId> {
        let known = self.core.member(peer).filter(|_| id.name == *peer)?;
        let is_alive = matches!(known.status, MemberStatus::Alive | MemberStatus::Leaving);
        (is_alive && known.id.addr != id.addr).then_some(&known.id)
    }

    /// Answers the hello of the peer that TLS verified as `peer`.
    pub fn hello(&self, peer: &NodeName, id: &MeshId, incumbent: Incumbent) -> HelloReply {
        let own = self.core.id();
        if id.name != *peer {
            return HelloReply::Refused(format!("certified as {peer}, but calls itself {}", id.name));
        }
        if id.name == own.name {
            return HelloReply::Refused(format!("{} is the name of this agent, at {}", id.name, own.addr));
        }
        if self.core.has_left() {
            return HelloReply::Refused("this agent is leaving".to_owned());
        }
        if let Some(known) = self.core.member(peer) {
            let status = if incumbent == Incumbent::Silent { MemberStatus::Failed } else { known.status };
            if let Some(refusal) = judge_newcomer(&known.id, status, id, incumbent) {
                return refusal;
            }
        }
        HelloReply::Welcome {
            id: own.clone(),
            members: self.core.entries(WELCOME_MEMBERS_MAX),
            farewells: self.core.farewells(),
        }
    }
}

/// Decides on a newcomer whose name is known; None: let it in.
fn judge_newcomer(known: &MeshId, status: MemberStatus, newcomer: &MeshId, incumbent: Incumbent) -> Option<HelloReply> {
    let (theirs, ours) = (newcomer.life.generation, known.life.generation);
    let is_alive = matches!(status, MemberStatus::Alive | MemberStatus::Leaving);
    let is_later = theirs == ours || theirs.number > ours.number;
    if is_later && !(is_alive && incumbent == Incumbent::Answers) {
        return None;
    }
    if is_alive && known.addr != newcomer.addr {
        return Some(HelloReply::Refused(format!(
            "the name {} is taken by a live node at {} (you are at {}); take another name, or stop that node first",
            known.name, known.addr, newcomer.addr
        )));
    }
    (known.life > newcomer.life).then_some(HelloReply::Outdated(known.life))
}

#[cfg(test)]
mod tests {
    use Incumbent::{Answers, Silent, Unasked};

    use super::*;
    use crate::model::Generation;

    fn id(addr: &str, number: u64, nonce: u64) -> MeshId {
        MeshId::new("a".parse().unwrap(), addr.parse().unwrap(), Generation { number, nonce })
    }

    #[test]
    fn a_newcomer_with_a_live_nodes_name_is_refused_with_both_addresses() {
        let known = id("10.0.0.1:8301", 1, 5);
        let reply = judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.2:8301", 1, 9), Unasked);
        let Some(HelloReply::Refused(text)) = reply else { panic!("{reply:?}") };
        assert!(text.contains("10.0.0.1:8301") && text.contains("10.0.0.2:8301"), "{text}");
    }

    #[test]
    fn a_restart_is_let_in_at_any_address_while_its_old_life_still_seems_alive() {
        let known = id("10.0.0.1:8301", 1, 5);
        assert!(judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.2:8301", 2, 0), Unasked).is_none());
        assert!(judge_newcomer(&known, MemberStatus::Alive, &known, Unasked).is_none());
    }

    #[test]
    fn a_copy_of_a_living_nodes_disk_is_refused_with_both_addresses_and_a_silent_holder_gives_way() {
        let known = id("10.0.0.1:8301", 1, 5);
        let copy = id("10.0.0.2:8301", 2, 9);
        let reply = judge_newcomer(&known, MemberStatus::Alive, &copy, Answers);
        let Some(HelloReply::Refused(text)) = reply else { panic!("{reply:?}") };
        assert!(text.contains("10.0.0.1:8301") && text.contains("10.0.0.2:8301"), "{text}");
        assert!(judge_newcomer(&known, MemberStatus::Failed, &copy, Silent).is_none());
        // A lost disk at a new address: the name is free, above the life that is remembered.
        let lost = judge_newcomer(&known, MemberStatus::Failed, &id("10.0.0.2:8301", 1, 0), Silent);
        assert!(matches!(lost, Some(HelloReply::Outdated(_))));
    }

    #[test]
    fn a_free_name_is_told_to_come_back_above_its_remembered_life() {
        let known = id("10.0.0.1:8301", 7, 5);
        let gone = judge_newcomer(&known, MemberStatus::Failed, &id("10.0.0.2:8301", 1, 0), Unasked);
        assert!(matches!(gone, Some(HelloReply::Outdated(life)) if life == known.life));
        // The disk was lost, the address is the same: the old process cannot be alive.
        let same_addr = judge_newcomer(&known, MemberStatus::Alive, &id("10.0.0.1:8301", 1, 0), Unasked);
        assert!(matches!(same_addr, Some(HelloReply::Outdated(_))));
    }
}

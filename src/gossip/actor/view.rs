//! What others see of the membership: log lines, the list of members, the gauges.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Actor, JOIN_PAUSE_MIN};
use crate::gossip::{MemberView, Members};
use crate::membership::MeshId;
use crate::model::{MemberStatus, NodeName};

impl Actor {
    pub(super) fn status_of(&self, name: &NodeName) -> MemberStatus {
        if *name == self.node.name {
            // What runs here is served until the agent stops.
            return if self.core.has_left() { MemberStatus::Leaving } else { MemberStatus::Alive };
        }
        // Records of a node that the membership has not heard of: it may be gone for long.
        self.core.member(name).map_or(MemberStatus::Failed, |member| member.status)
    }

    pub(super) fn member_changed(
        &mut self,
        node: NodeName,
        before: Option<MemberStatus>,
        after: Option<MemberStatus>,
        now: Instant,
    ) {
        self.are_members_dirty = true;
        self.are_peers_dirty = true;
        if before != after {
            let addr = self.core.member(&node).map(|member| tracing::field::display(member.id.addr));
            match (before, after) {
                (None, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member joined"),
                (_, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member is back"),
                (_, Some(MemberStatus::Failed)) => warn!(member = %node, addr, "member failed"),
                (_, Some(MemberStatus::Leaving)) => info!(member = %node, addr, "member is leaving"),
                (_, Some(MemberStatus::Left)) => info!(member = %node, addr, "member left"),
                (_, None) => info!(member = %node, "member forgotten"),
            }
        }
        match after {
            None | Some(MemberStatus::Left) => {
                self.replica.remove(&node);
                self.links.close(&node, "member left");
            }
            // Its connection waits longer and longer between probes; once the path heals, a fresh one is faster.
            Some(MemberStatus::Failed) if before != after => self.links.close(&node, "member failed"),
            Some(_) => {}
        }
        let was_alive = matches!(before, Some(MemberStatus::Alive | MemberStatus::Leaving));
        if was_alive && self.core.alive_count() == 0 && !self.core.has_left() {
            if after == Some(MemberStatus::Failed) {
                warn!("no other member answers: this node may be cut off");
            }
            self.join_pause = JOIN_PAUSE_MIN;
            self.next_join = now + JOIN_PAUSE_MIN;
        }
        self.dirty.insert(node);
    }

    pub(super) fn name_claimed(&mut self, theirs: MeshId) {
        self.metrics.conflicts.inc();
        if self.conflict_seen.as_ref() != Some(&theirs) {
            error!(
                name = %theirs.name, here = %self.node.mesh_addr, there = %theirs.addr,
                generation_here = %self.generation(), generation_there = %theirs.life.generation,
                "another node goes by this node's name; stop one of them or give it another name"
            );
            self.conflict_seen = Some(theirs);
        }
    }

    pub(super) fn conflict(&self, name: &NodeName, there: SocketAddr) {
        self.metrics.conflicts.inc();
        error!(%name, here = %self.node.mesh_addr, %there, "a node with this node's name and certificate connected");
    }

    pub(super) fn show_members(&self) {
        let info = |name: &NodeName| self.replica.state(name).and_then(|state| state.info.clone());
        let own = MemberView {
            name: self.node.name.clone(),
            addr: self.node.mesh_addr,
            status: self.status_of(&self.node.name),
            generation: self.generation(),
            since: self.started_at,
            forgotten_at: None,
            info: Some(Arc::new(self.node.clone())),
        };
        let mut members = vec![own];
        members.extend(self.core.members().map(|member| MemberView {
            name: member.id.name.clone(),
            addr: member.id.addr,
            status: member.status,
            generation: member.id.life.generation,
            since: member.since,
            forgotten_at: self.core.forgotten_at(member),
            info: info(&member.id.name),
        }));
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for status in [MemberStatus::Alive, MemberStatus::Leaving, MemberStatus::Left, MemberStatus::Failed] {
            let count = members.iter().filter(|member| member.status == status).count();
            self.metrics.members.with_label_values(&[status.as_str()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.metrics.nodes.set(i64::try_from(self.replica.nodes().count()).unwrap_or(i64::MAX));
        let has_failed = members.iter().any(|member| member.status == MemberStatus::Failed);
        let isolated = self.core.alive_count() == 0 && has_failed && !self.core.has_left();
        self.members.send_replace(Arc::new(Members { members, isolated }));
    }
}

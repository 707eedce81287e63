//! What members ask of limits that hold for the whole mesh, on its way: signed by each, passed on by all.
//!
//! ```text
//!   claim_demand -> Sign -> a queue of its own -> behind the news of a packet, at gossip's pace
//!   from a peer: a living member's? a later one? not too soon? -> Verify -> Output::Demand, passed on
//! ```
//!
//! Invariants: one report of each member, the latest, waits and is remembered; reports never take the place of news of
//! members or records, and cost no more packets than one round of gossip each period; one that is lost is repaired by its
//! author, who says it again (`routing`).
//!
//! Not here: what a demand changes (`routing`).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::id::Life;
use super::packet::Broadcast;
use super::statement::{DemandClaim, Statement};
use super::{Core, Output};
use crate::model::{DEMANDS_MAX, Demand, NodeName};

/// A member's next report is not heard before: an author leaves half a second and more between two.
const REPORT_REST: Duration = Duration::from_millis(100);
/// How often a node passes one report on: by chance one in 400 misses a node, until its author says it again.
pub(super) const REPORT_COPIES: u32 = 6;

/// The latest report of each member.
#[derive(Debug, Default)]
pub(super) struct Demands {
    /// At most one of each member: it goes with it.
    heard: BTreeMap<NodeName, (Life, u32, Instant)>,
    /// The number of the own last one.
    number: u32,
}

impl Demands {
    fn is_news(&self, claim: &DemandClaim, now: Instant) -> bool {
        self.heard.get(&claim.node).is_none_or(|(life, number, at)| {
            (claim.life, claim.number) > (*life, *number) && now.saturating_duration_since(*at) >= REPORT_REST
        })
    }

    pub(super) fn forget(&mut self, node: &NodeName) {
        self.heard.remove(node);
    }

    pub(super) fn len(&self) -> usize {
        self.heard.len()
    }
}

impl Core {
    /// Tells the mesh what this node asks of limits, in place of what it told before.
    pub fn claim_demand(&mut self, demand: Demand) {
        if self.has_left {
            return;
        }
        self.demands.number += 1;
        let (node, life) = (self.id().name.clone(), self.id().life);
        let claim = DemandClaim { node, life, number: self.demands.number, demand, signature: Vec::new() };
        self.outputs.push_back(Output::Sign(Statement::Demand(claim)));
    }

    /// Whether `claim` is the newest word of this node.
    pub(super) fn is_own_demand(&self, claim: &DemandClaim) -> bool {
        let own = self.id();
        claim.node == own.name && claim.life == own.life && claim.number == self.demands.number && !self.has_left
    }

    fn is_demand_news(&self, claim: &DemandClaim, now: Instant) -> bool {
        claim.demand.limits.len() <= DEMANDS_MAX
            && claim.node != self.id().name
            && self.living(&claim.node).is_some()
            && self.roster.find(&claim.node).is_some_and(|member| member.id.life == claim.life)
            && self.demands.is_news(claim, now)
    }

    pub(super) fn hear_demand(&mut self, sender: &NodeName, claim: DemandClaim, now: Instant) {
        if self.is_demand_news(&claim, now) {
            self.verify(sender, Statement::Demand(claim), now);
        }
    }

    /// Tells the owner of a member's demand; returns whether others should hear it.
    pub(super) fn take_demand(&mut self, claim: &DemandClaim, now: Instant) -> bool {
        if !self.is_demand_news(claim, now) {
            return false;
        }
        self.demands.heard.insert(claim.node.clone(), (claim.life, claim.number, now));
        self.outputs.push_back(Output::Demand { node: claim.node.clone(), demand: claim.demand.clone() });
        true
    }

    /// Queues a report: it goes with the next round of gossip, or the one after.
    pub(super) fn spread_demand(&mut self, broadcast: &Broadcast, now: Instant) -> bool {
        if !self.reports.add(broadcast) {
            return false;
        }
        let at = self.when.spread_last.map_or(now, |last| (last + self.profile.gossip_period).max(now));
        self.when.spread = Some(self.when.spread.map_or(at, |planned| planned.min(at)));
        self.spread_due(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::BROADCAST_BYTES_MAX;
    use crate::model::Generation;
    use crate::wire;

    #[test]
    fn a_report_of_one_limit_is_as_small_as_the_simulation_of_shares_takes_it_to_be() {
        let life = Life { generation: Generation { number: 70_000, nonce: u64::MAX }, renewals: 0 };
        let demand = Demand { limits: [(u64::MAX, 8)].into() };
        let node = "web-1234".parse().unwrap();
        let claim = DemandClaim { node, life, number: 1000, demand, signature: vec![1; 72] };
        let bytes = wire::encode(&Broadcast::Said(Statement::Demand(claim))).unwrap();
        // Two bytes of length stand before it in a packet.
        assert!(bytes.len() + 2 <= 140 && bytes.len() <= BROADCAST_BYTES_MAX, "{}", bytes.len());
    }
}

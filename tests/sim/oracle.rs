//! What must hold, said plainly: who runs, who is seen by whom, who holds what.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use weft::membership::MeshId;
use weft::model::{Entry, EntryKey, MemberStatus, NodeName};
use weft::replica::Digest;

use super::world::World;

/// Sizes that an engine may reach, by the number of hosts that ever had a name.
const SYNCS_MAX: usize = weft::gossip::engine::SYNCS_MAX;
/// Eight others' votes about a member, and the own.
const VOTES_MAX: usize = 9;
/// Checks that a core may have open.
const CHECKS_MAX: usize = 512;

impl World {
    /// Tells whether every running agent sees exactly the running ones alive, each under its present identity.
    pub(crate) fn has_converged(&self) -> bool {
        let running: BTreeMap<&NodeName, usize> = self
            .running()
            .filter(|host| !self.hosts[*host].has_left)
            .map(|host| (&self.hosts[host].name, host))
            .collect();
        running.values().all(|observer| {
            let members = self.engine(*observer).membership().members();
            let is_present = |id: &MeshId| running.get(&id.name).is_some_and(|host| self.hosts[*host].id() == Some(id));
            // Who is back and held because it flaps is not shown as alive yet.
            let mut count = 1;
            for member in members.filter(|member| member.status == MemberStatus::Alive) {
                if !is_present(&member.id) {
                    return false;
                }
                count += 1;
            }
            count == running.len()
        })
    }

    /// Tells whether all running agents hold the same records.
    pub(crate) fn is_equal(&self) -> bool {
        let mut hashes = self.running().map(|host| self.engine(host).replica().set_hash());
        hashes.next().is_none_or(|first| hashes.all(|hash| hash == first))
    }

    /// Tells how every other running agent sees `host`.
    pub(crate) fn all_see(&self, host: usize, status: Option<MemberStatus>) -> bool {
        let name = &self.hosts[host].name;
        let others = self.running().filter(|observer| *observer != host);
        others
            .map(|at| self.engine(at).membership().member(name).map(|member| member.status))
            .all(|seen| seen == status)
    }

    /// Holds everything that must be true after quiet.
    #[track_caller]
    pub(crate) fn assert_settled(&self) {
        for observer in self.running() {
            self.assert_members(observer);
            self.assert_records(observer);
            self.assert_bounds(observer);
        }
        assert!(self.is_equal(), "all replicas are equal");
    }

    /// No healthy node stays down, the gone are not alive, one live identity per name.
    #[track_caller]
    fn assert_members(&self, observer: usize) {
        let core = self.engine(observer).membership();
        let at = &self.hosts[observer].name;
        for (other, host) in self.hosts.iter().enumerate().filter(|(other, _)| *other != observer) {
            let seen = core.member(&host.name);
            match host.id().filter(|_| !host.has_left) {
                Some(id) => {
                    let seen = seen.unwrap_or_else(|| panic!("{at} does not know {}", host.name));
                    assert_eq!(seen.status, MemberStatus::Alive, "{at} sees {} (host {other}), which runs", host.name);
                    assert_eq!(&seen.id, id, "{at} knows {} under its present identity", host.name);
                }
                None => {
                    let is_alive = seen.is_some_and(|member| member.status == MemberStatus::Alive);
                    assert!(!is_alive, "{at} sees {}, which is gone, alive", host.name);
                    if host.has_left
                        && let Some(member) = seen
                    {
                        assert_ne!(member.status, MemberStatus::Failed, "{at} takes {} for failed: it left", host.name);
                    }
                }
            }
        }
    }

    /// Each running node's records are exactly what is registered there; who left has none.
    #[track_caller]
    fn assert_records(&self, observer: usize) {
        let replica = self.engine(observer).replica();
        let at = &self.hosts[observer].name;
        for host in &self.hosts {
            let state = replica.state(&host.name);
            if host.has_left {
                assert!(state.is_none(), "{at} holds records of {}, which left", host.name);
                continue;
            }
            if host.process.is_none() {
                continue;
            }
            let state = state.unwrap_or_else(|| panic!("{at} has no records of {}", host.name));
            let services = state.services().map(|record| Entry::Service(Arc::clone(record)));
            let checks = state.checks().map(|record| Entry::Check(Arc::clone(record)));
            let held: BTreeMap<EntryKey, Entry> = services.chain(checks).map(|entry| (entry.key(), entry)).collect();
            assert_eq!(held, host.records, "{at} holds what is registered on {}", host.name);
            assert_eq!(state.info.as_deref(), Some(&host.info()), "{at} holds the facts of {}", host.name);
        }
    }

    /// Nothing has grown beyond its bound, and nothing is left over.
    #[track_caller]
    pub(crate) fn assert_bounds(&self, observer: usize) {
        let at = &self.hosts[observer].name;
        let engine = self.engine(observer);
        let sizes = engine.sizes();
        let names = self.hosts.len();
        assert!(sizes.syncs <= SYNCS_MAX && sizes.pulls <= weft::gossip::engine::PULLS_MAX, "{at}: {sizes:?}");
        assert!(sizes.members < names && sizes.nodes <= names, "{at}: {sizes:?} of {names} names");
        assert!(sizes.refusals <= names && sizes.wanted <= names, "{at}: {sizes:?}");
        let core = sizes.core;
        // foca keeps a few timers per probe and per suspect.
        assert!(core.timers <= 64 + 4 * names, "{at}: {sizes:?}");
        assert!(core.suspicions < names.max(2) && core.votes_max <= VOTES_MAX, "{at}: {sizes:?}");
        // Three pieces of news per name and one per accusation.
        assert!(core.news <= (3 + VOTES_MAX) * names && core.strangers <= names, "{at}: {sizes:?}");
        assert!(core.checks <= CHECKS_MAX && core.turns < names.max(2), "{at}: {sizes:?}");
        assert_eq!(core.outputs, 0, "{at}");
        assert!(sizes.grave_max <= 64, "{at}: {sizes:?}");
        assert_eq!(sizes.outputs, 0, "{at}");
    }

    /// Healthy nodes that healthy observers saw fail since the log was cleared: (time, observer, node).
    pub(crate) fn false_positives(
        &self,
        is_sick: impl Fn(usize, Duration) -> bool,
    ) -> Vec<(Duration, usize, NodeName)> {
        let failed = self.seen.iter().filter(|seen| seen.after == Some(MemberStatus::Failed));
        let about_healthy = failed.filter(|seen| {
            let node = self.hosts_named(seen.node.as_str()).next();
            node.is_some_and(|node| !is_sick(node, seen.at) && self.hosts[node].process.is_some())
        });
        about_healthy.map(|seen| (seen.at, seen.observer, seen.node.clone())).collect()
    }

    /// What every running agent holds, for a look whether anything older wins: (observer's boot, digests).
    pub(crate) fn digests(&self) -> Vec<Option<(u32, BTreeMap<NodeName, Digest>)>> {
        let digests = |host: &super::host::Host| {
            let process = host.process.as_ref()?;
            let nodes = process.engine.replica().nodes();
            Some((process.boot, nodes.map(|(name, state)| (name.clone(), state.digest().clone())).collect()))
        };
        self.hosts.iter().map(digests).collect()
    }

    /// Nothing that is held is older than what the same agent held `before`.
    #[track_caller]
    pub(crate) fn assert_nothing_older_than(&self, before: &[Option<(u32, BTreeMap<NodeName, Digest>)>]) {
        for ((host, then), after) in self.hosts.iter().zip(before).zip(self.digests()) {
            let (Some((then_boot, then)), Some((boot, after))) = (then, after) else { continue };
            if *then_boot != boot {
                continue;
            }
            for (node, digest) in &after {
                if let Some(old) = then.get(node) {
                    assert!(!old.is_newer_than(digest), "{}: {node} went back from {old:?} to {digest:?}", host.name);
                }
            }
        }
    }
}

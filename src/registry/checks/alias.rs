//! Alias checks: a check that follows another service or node. Pure.
//!
//! An alias has the worst status of what it stands for; where that is an alias itself, of what that one stands for, and
//! so on. Aliases that stand for each other in a ring count for nothing: only checks that look at something do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Outcome;
use crate::catalogue::Snapshot;
use crate::model::{CheckId, HealthStatus, Instance, InstanceId, MemberStatus};

/// What an alias stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AliasTarget {
    /// The node, by name or id; none: this one.
    pub(crate) node: Option<String>,
    /// The service; none: the node as a whole.
    pub(crate) service: Option<InstanceId>,
}

/// What a check says of its owner.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Word<'a> {
    /// It looked.
    Status(HealthStatus),
    /// It follows a service of this node, or the node.
    Follows(Option<&'a InstanceId>),
}

/// A check of this node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fact<'a> {
    pub(crate) id: &'a CheckId,
    /// The service that it is about; none: the node.
    pub(crate) owner: Option<&'a InstanceId>,
    pub(crate) word: Word<'a>,
}

/// Returns what each alias of `facts` says, given the services that are here.
pub(crate) fn resolve<'a>(facts: &[Fact<'a>], has: impl Fn(&InstanceId) -> bool) -> BTreeMap<&'a CheckId, Outcome> {
    let mut own: BTreeMap<Option<&InstanceId>, (HealthStatus, &CheckId)> = BTreeMap::new();
    let mut edges: BTreeMap<Option<&InstanceId>, BTreeSet<Option<&InstanceId>>> = BTreeMap::new();
    for fact in facts {
        match fact.word {
            Word::Status(status) => {
                let worst = own.entry(fact.owner).or_insert((status, fact.id));
                if status > worst.0 {
                    *worst = (status, fact.id);
                }
            }
            Word::Follows(target) => {
                edges.entry(fact.owner).or_default().insert(target);
            }
        }
    }
    let judge = |target: Option<&'a InstanceId>| {
        if let Some(service) = target.filter(|service| !has(service)) {
            let output = format!("there is no service with the ID {:?} on this node", service.as_str());
            return Outcome { status: HealthStatus::Critical, output };
        }
        let (mut seen, mut open) = (BTreeSet::from([target]), vec![target]);
        let mut worst: Option<(HealthStatus, &CheckId)> = None;
        while let Some(owner) = open.pop() {
            let found = own.get(&owner).copied();
            worst = worst.into_iter().chain(found).max_by_key(|(status, _)| *status);
            open.extend(edges.get(&owner).into_iter().flatten().copied().filter(|next| seen.insert(*next)));
        }
        match worst {
            None => Outcome { status: HealthStatus::Passing, output: "No checks found.".to_owned() },
            Some((HealthStatus::Passing, _)) => {
                Outcome { status: HealthStatus::Passing, output: "All checks passing.".to_owned() }
            }
            Some((status, id)) => Outcome { status, output: format!("Aliased check {:?} is {status}", id.as_str()) },
        }
    };
    let follows = |fact: &Fact<'a>| match fact.word {
        Word::Follows(target) => Some((fact.id, judge(target))),
        Word::Status(_) => None,
    };
    facts.iter().filter_map(follows).collect()
}

/// Returns what an alias of something on another node says, as the catalogue shows it.
pub(crate) fn remote(snapshot: &Snapshot, target: &AliasTarget) -> Outcome {
    let critical = |output| Outcome { status: HealthStatus::Critical, output };
    let wanted = target.node.as_deref().unwrap_or_default();
    let is_it = |name: &str, id: &str| name == wanted || id == wanted;
    let found = snapshot.listed_nodes().find(|node| is_it(node.info.name.as_str(), &node.info.id));
    let Some(node) = found else { return critical(format!("there is no node {wanted:?}")) };
    if node.status != MemberStatus::Alive {
        return critical(format!("node {wanted:?} is not alive"));
    }
    let checks = match &target.service {
        None => node.checks.as_slice(),
        Some(id) => {
            let is_there = |instance: &&Arc<Instance>| {
                instance.node.info.name == node.info.name && instance.node.writer() == node.writer()
            };
            let mut instances = snapshot.all_listed().filter(is_there);
            match instances.find(|instance| instance.record.id == *id) {
                Some(instance) => &*instance.checks,
                None => {
                    return critical(format!("there is no service with the ID {:?} on node {wanted:?}", id.as_str()));
                }
            }
        }
    };
    match checks.iter().max_by_key(|check| check.status) {
        None => Outcome { status: HealthStatus::Passing, output: "No checks found.".to_owned() },
        Some(check) if check.status == HealthStatus::Passing => {
            Outcome { status: HealthStatus::Passing, output: "All checks passing.".to_owned() }
        }
        Some(check) => {
            let (id, status) = (check.id.as_str(), check.status);
            Outcome { status, output: format!("Aliased check {id:?} is {status}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_has_the_worst_status_of_all_that_it_stands_for() {
        use HealthStatus::{Critical, Passing, Warning};
        let service = |name: &str| -> InstanceId { name.parse().unwrap() };
        let check = |name: &str| -> CheckId { name.parse().unwrap() };
        let (a, b, c, gone) = (service("a"), service("b"), service("c"), service("gone"));
        let ids: Vec<CheckId> = (0..9).map(|at| check(&at.to_string())).collect();
        let fact = |at: usize, owner, word| Fact { id: &ids[at], owner, word };
        let facts = [
            fact(0, Some(&a), Word::Follows(Some(&b))),
            fact(1, Some(&b), Word::Follows(Some(&c))),
            fact(2, Some(&b), Word::Status(Passing)),
            fact(3, Some(&c), Word::Status(Warning)),
            fact(4, None, Word::Follows(Some(&gone))),
            fact(5, Some(&c), Word::Follows(Some(&a))),
            fact(6, Some(&a), Word::Follows(None)),
            fact(7, None, Word::Status(Passing)),
        ];
        let found = resolve(&facts, |id| *id != gone);
        let status = |at: usize| found[&ids[at]].status;
        // 0 and 1 reach c, and 6 the node, whose alias of what is gone is no look at anything.
        assert_eq!([0, 1, 4, 5, 6].map(status), [Warning, Warning, Critical, Warning, Passing]);
        assert_eq!(found[&ids[0]].output, "Aliased check \"3\" is warning");
        let ring = [fact(0, Some(&a), Word::Follows(Some(&b))), fact(1, Some(&b), Word::Follows(Some(&a)))];
        assert_eq!(resolve(&ring, |_| true)[&ids[0]].output, "No checks found.");
    }
}

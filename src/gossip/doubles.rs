//! Nodes without an agent that several living agents tell of: two wrote one name while they could not see each other.
//!
//! Both are shown, for nobody can tell which is meant; an operator deregisters one. Each agent says so once for each name in
//! its run, in lines of at most [`NAMED_MAX`] names, and `weft_gossip_external_conflicts` for as long as it is so.
//! Not here: refusing a name that is known to be taken (`api::external`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use crate::catalogue::Externals;
use crate::model::NodeName;

/// Names in one line of the log; the others are counted.
const NAMED_MAX: usize = 5;
/// Agents that are named of one name.
const AGENTS_MAX: usize = 4;
/// Names that are remembered as told: what one agent may write, four times; those beyond are only counted by the metric.
const TOLD_MAX: usize = 1024;

/// What was told so far.
#[derive(Debug, Default)]
pub(super) struct Doubles {
    seen: Arc<Externals>,
    told: BTreeSet<NodeName>,
}

/// How it stands after a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct News {
    /// How many names several living agents tell of.
    pub(super) count: usize,
    /// Those that were not told yet, each with its agents; empty: none.
    pub(super) names: String,
}

impl Doubles {
    /// Looks at what the agents wrote; none if it is what was seen last.
    pub(super) fn look(&mut self, externals: &Arc<Externals>) -> Option<News> {
        if Arc::ptr_eq(&self.seen, externals) {
            return None;
        }
        self.seen = Arc::clone(externals);
        let doubled: BTreeMap<NodeName, Vec<NodeName>> = externals.doubled();
        let mut fresh: Vec<(&NodeName, &Vec<NodeName>)> = Vec::new();
        for (name, agents) in &doubled {
            if self.told.len() < TOLD_MAX && self.told.insert(name.clone()) {
                fresh.push((name, agents));
            }
        }
        let mut names = String::new();
        for (at, (name, agents)) in fresh.iter().take(NAMED_MAX).enumerate() {
            let shown: Vec<&str> = agents.iter().take(AGENTS_MAX).map(NodeName::as_str).collect();
            let comma = if at == 0 { "" } else { ", " };
            let _infallible = write!(names, "{comma}{name} (by {})", shown.join(", "));
        }
        if fresh.len() > NAMED_MAX {
            let _infallible = write!(names, " and {} more", fresh.len() - NAMED_MAX);
        }
        Some(News { count: doubled.len(), names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ExternalRecord, MemberStatus, TextMap};

    const ALIVE: MemberStatus = MemberStatus::Alive;

    fn record(node: &str) -> ExternalRecord {
        ExternalRecord {
            name: node.parse().unwrap(),
            id: Box::default(),
            address: "192.0.2.7".into(),
            tagged_addresses: TextMap::default(),
            meta: TextMap::default(),
            services: Box::default(),
            checks: Box::default(),
        }
    }

    /// What is shown if these agents wrote these nodes.
    fn shown(written: &[(&str, MemberStatus, &[&str])]) -> Arc<Externals> {
        let records: Vec<Vec<ExternalRecord>> =
            written.iter().map(|(_, _, nodes)| nodes.iter().map(|node| record(node)).collect()).collect();
        let of =
            written.iter().zip(&records).map(|((agent, status, _), records)| (*agent, *status, records.as_slice()));
        Arc::new(Externals::default().after_all(&of.collect::<Vec<_>>(), 1))
    }

    #[test]
    fn a_name_that_two_living_agents_tell_of_is_told_once_with_both() {
        let mut doubles = Doubles::default();
        let one = shown(&[("n1", ALIVE, &["db", "a"]), ("n2", ALIVE, &["b"])]);
        assert_eq!(doubles.look(&one), Some(News { count: 0, names: String::new() }));
        assert_eq!(doubles.look(&one), None, "nothing changed");
        let two = shown(&[("n1", ALIVE, &["db", "a"]), ("n2", ALIVE, &["b", "db"])]);
        assert_eq!(doubles.look(&two), Some(News { count: 1, names: "db (by n1, n2)".to_owned() }));
        let again = shown(&[("n1", ALIVE, &["db"]), ("n2", ALIVE, &["db"])]);
        assert_eq!(doubles.look(&again), Some(News { count: 1, names: String::new() }), "told already");
        // Another agent takes over what a failed one told of: as it should be.
        let taken_over = shown(&[("n1", MemberStatus::Failed, &["db"]), ("n2", ALIVE, &["db"])]);
        assert_eq!(doubles.look(&taken_over), Some(News { count: 0, names: String::new() }));
    }

    #[test]
    fn many_names_are_one_line_and_what_is_remembered_is_bounded() {
        let mut doubles = Doubles::default();
        let names: Vec<String> = (0..TOLD_MAX + 7).map(|at| format!("h{at:04}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let news = doubles.look(&shown(&[("n1", ALIVE, &names), ("n2", ALIVE, &names)])).unwrap();
        assert_eq!(news.count, names.len());
        assert!(news.names.starts_with("h0000 (by n1, n2), h0001 (by n1, n2), "), "{}", news.names);
        assert!(
            news.names.ends_with(&format!("h0004 (by n1, n2) and {} more", TOLD_MAX - NAMED_MAX)),
            "{}",
            news.names
        );
        assert_eq!(doubles.told.len(), TOLD_MAX);
    }
}

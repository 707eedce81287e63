//! Which instances the nodes have ejected, as each of them says in its own records.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{InstanceId, NodeName};

type Ejected = Arc<[(NodeName, InstanceId)]>;

/// What the nodes that are alive say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reports {
    by_reporter: BTreeMap<NodeName, Ejected>,
    reporters: BTreeMap<(NodeName, InstanceId), Vec<NodeName>>,
}

impl Reports {
    /// Tells whether nobody says anything.
    pub fn is_empty(&self) -> bool {
        self.by_reporter.is_empty()
    }

    /// Counts the nodes but `own` that say that they have ejected an instance; what a node says of its own instances does
    /// not count.
    pub fn reporters(&self, node: &NodeName, id: &InstanceId, own: &NodeName) -> usize {
        // Looked up while a group is made anew, never by a call.
        let reporters = self.reporters.get(&(node.clone(), id.clone()));
        reporters.map_or(0, |all| all.iter().filter(|reporter| *reporter != own && *reporter != node).count())
    }

    /// Returns the nodes that say that they have ejected an instance.
    pub fn by(&self, node: &NodeName, id: &InstanceId) -> &[NodeName] {
        self.reporters.get(&(node.clone(), id.clone())).map(Vec::as_slice).unwrap_or_default()
    }

    /// Tells whether `ejected` is what `reporter` says.
    pub(super) fn is_of(&self, reporter: &NodeName, ejected: &[(NodeName, InstanceId)]) -> bool {
        self.by_reporter.get(reporter).map(|said| &**said).unwrap_or_default() == ejected
    }

    /// Returns the reports with `ejected` as what `reporter` says.
    #[must_use]
    pub fn with(&self, reporter: &NodeName, ejected: &[(NodeName, InstanceId)]) -> Self {
        let mut by_reporter = self.by_reporter.clone();
        if ejected.is_empty() {
            by_reporter.remove(reporter);
        } else {
            by_reporter.insert(reporter.clone(), ejected.into());
        }
        let mut reporters: BTreeMap<_, Vec<NodeName>> = BTreeMap::new();
        for (reporter, ejected) in &by_reporter {
            for instance in ejected.iter() {
                let all = reporters.entry(instance.clone()).or_default();
                // An instance that is named twice is ejected once.
                if all.last() != Some(reporter) {
                    all.push(reporter.clone());
                }
            }
        }
        Self { by_reporter, reporters }
    }
}

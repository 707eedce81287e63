//! Which instance a call goes to: round robin over those that may get traffic.
//!
//! The smallest balancer that keeps the promises of [`super::Worker::open`]; `routing` replaces it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::catalogue::{Instance, ServiceEntry};
use crate::model::{HealthStatus, InstanceId, NodeName, ServiceName};

/// Services whose turn is remembered; beyond it the turns start again.
const TURNS_MAX: usize = 4_096;

/// The instances that a call has met already: at most the attempts of one call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tried(Vec<(NodeName, InstanceId)>);

impl Tried {
    /// Adds an instance.
    pub(crate) fn add(&mut self, instance: &Instance) {
        self.0.push((instance.node.info.name.clone(), instance.record.id.clone()));
    }

    /// Tells whether the instance was met.
    pub(crate) fn contains(&self, instance: &Instance) -> bool {
        self.0.iter().any(|(node, id)| *node == instance.node.info.name && *id == instance.record.id)
    }
}

/// No instance may get the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoInstance {
    /// How many the service has.
    pub(crate) total: usize,
    /// How many of them are critical.
    pub(crate) critical: usize,
}

/// Whose turn it is, per service.
#[derive(Debug, Default)]
pub(crate) struct Picker {
    turns: HashMap<ServiceName, usize>,
}

impl Picker {
    /// Picks the next instance that is not critical and not in `avoid`.
    pub(crate) fn pick(&mut self, service: &ServiceEntry, avoid: &Tried) -> Result<Arc<Instance>, NoInstance> {
        if self.turns.len() >= TURNS_MAX {
            self.turns.clear();
        }
        let total = service.instances.len();
        let turn = self.turns.entry(service.name.clone()).or_default();
        let from = *turn % total.max(1);
        let (before, after) = service.instances.split_at_checked(from).unwrap_or((&[], &[]));
        let mut order = after.iter().chain(before).enumerate();
        let usable = |instance: &Arc<Instance>| instance.status != HealthStatus::Critical && !avoid.contains(instance);
        if let Some((skipped, instance)) = order.find(|(_, instance)| usable(instance)) {
            *turn = from + skipped + 1;
            return Ok(Arc::clone(instance));
        }
        let critical = service.instances.iter().filter(|i| i.status == HealthStatus::Critical).count();
        Err(NoInstance { total, critical })
    }
}

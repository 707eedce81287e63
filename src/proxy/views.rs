//! The instances of a target: those of its service that belong to its subset and datacenter, chosen once per change.

use std::sync::Arc;

use foldhash::HashMap;

use crate::catalogue::ServiceEntry;
use crate::model::ServiceName;
use crate::traffic::Target;

/// Most targets that one worker keeps a choice for; beyond it all are chosen anew.
const VIEWS_MAX: usize = 4096;

/// What was chosen, and from what.
struct View {
    target: Arc<Target>,
    service: Arc<ServiceEntry>,
    chosen: Arc<ServiceEntry>,
}

/// The choices of one worker.
#[derive(Default)]
pub(super) struct Views {
    by_name: HashMap<ServiceName, View>,
    made: u64,
}

impl Views {
    /// Returns the instances of `service` that `target` takes, seen from a node in datacenter `here`. They stand in an entry
    /// of their own name, under which the balancer keeps their turn; its `modify_index` is the choice's, not the service's.
    pub(super) fn of(&mut self, target: &Arc<Target>, service: &Arc<ServiceEntry>, here: &str) -> Arc<ServiceEntry> {
        let Some(name) = &target.view else { return Arc::clone(service) };
        // The chains of several services may lead to the same subset, each with a target of its own.
        let is_newest = |view: &&View| {
            Arc::ptr_eq(&view.service, service) && (Arc::ptr_eq(&view.target, target) || view.target == *target)
        };
        if let Some(view) = self.by_name.get(name).filter(is_newest) {
            return Arc::clone(&view.chosen);
        }
        if self.by_name.len() >= VIEWS_MAX {
            self.by_name.clear();
        }
        self.made += 1;
        let taken = service.instances.iter().filter(|instance| target.takes(instance, here));
        let chosen = Arc::new(ServiceEntry {
            name: name.clone(),
            protocol: service.protocol,
            instances: taken.cloned().collect(),
            modify_index: self.made,
        });
        let (target, service) = (Arc::clone(target), Arc::clone(service));
        self.by_name.insert(name.clone(), View { target, service, chosen: Arc::clone(&chosen) });
        chosen
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Protocol;
    use crate::traffic::{Entries, Ready, Traffic};

    fn targets(filter: &str) -> [Arc<Target>; 2] {
        let mut entries = Entries::default();
        let subsets = json!({"Subsets": {"v2": {"Filter": filter}}, "DefaultSubset": "v2"});
        entries.add("service-resolver", "web", Ready::new("service-resolver", &subsets).unwrap());
        let redirect = json!({"Redirect": {"Service": "web", "ServiceSubset": "v2"}});
        entries.add("service-resolver", "shop", Ready::new("service-resolver", &redirect).unwrap());
        let traffic = Traffic::new(entries, &Traffic::default(), Vec::new());
        ["web", "shop"].map(|name| Arc::clone(&traffic.chain(&name.parse().unwrap()).unwrap().stream.target))
    }

    #[test]
    fn two_chains_that_lead_to_one_subset_share_its_view() {
        let [own, redirected] = targets("Service.Meta.version == v2");
        assert!(!Arc::ptr_eq(&own, &redirected) && own.view == redirected.view);
        let name = "web".parse().unwrap();
        let service = Arc::new(ServiceEntry { name, protocol: Protocol::Http, instances: Vec::new(), modify_index: 1 });
        let mut views = Views::default();
        let first = views.of(&own, &service, "dc1");
        for target in [&redirected, &own, &redirected] {
            assert!(Arc::ptr_eq(&first, &views.of(target, &service, "dc1")), "chosen anew");
        }
        // A subset that is redefined has a view of its own, though an older chain stays in force beside it.
        let [other, _] = targets("Service.Meta.version == v3");
        assert!(!Arc::ptr_eq(&first, &views.of(&other, &service, "dc1")));
        assert!(Arc::ptr_eq(&first, &views.of(&own, &service, "dc1")), "evicted by another of its name");
    }
}

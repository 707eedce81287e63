//! All guards, found by destination and source.

use std::collections::BTreeMap;
use std::sync::Arc;

use foldhash::HashMap;
use http::HeaderMap;

use super::compile::Guard;
use super::intention::{Action, Party};
use crate::model::ServiceName;

/// What permissions look at.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    /// The method, in upper case.
    pub method: &'r str,
    /// The path, with or without its query.
    pub path: &'r str,
    /// The headers.
    pub headers: &'r HeaderMap,
}

/// What is decided, and by what.
#[derive(Debug, Clone, Copy)]
pub struct Decision<'t> {
    /// What becomes of the call.
    pub action: Action,
    /// The intention that decided; none: the default.
    pub by: Option<&'t Arc<Guard>>,
}

impl Decision<'_> {
    /// Whether the call passes.
    pub fn is_allowed(&self) -> bool {
        self.action == Action::Allow
    }

    /// Name of the intention that decided, or `default`.
    pub fn rule(&self) -> &str {
        self.by.map_or("default", |guard| guard.name())
    }
}

/// An intention that could not be made ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// `source:destination`.
    pub name: String,
    /// Version of the document.
    pub version: u64,
    /// Why.
    pub reason: String,
    /// The version that stays in force in its place; none: its calls are denied.
    pub in_force: Option<u64>,
}

/// By source.
#[derive(Debug, Default)]
struct Sources {
    exact: HashMap<ServiceName, Arc<Guard>>,
    any: Option<Arc<Guard>>,
}

/// Every intention, ready to decide. Immutable.
#[derive(Debug)]
pub struct Table {
    default: Action,
    exact: HashMap<ServiceName, Sources>,
    any: Sources,
    guards: BTreeMap<Arc<str>, Arc<Guard>>,
    quarantined: Vec<Quarantined>,
}

impl Table {
    /// A table without intentions.
    pub fn empty(default: Action) -> Self {
        Self::new(default, [], Vec::new())
    }

    /// Puts guards together; of two with one name the later counts.
    pub fn new(default: Action, guards: impl IntoIterator<Item = Arc<Guard>>, quarantined: Vec<Quarantined>) -> Self {
        let guards: BTreeMap<Arc<str>, Arc<Guard>> =
            guards.into_iter().map(|guard| (Arc::clone(guard.name()), guard)).collect();
        let mut table =
            Self { default, exact: HashMap::default(), any: Sources::default(), guards: BTreeMap::new(), quarantined };
        for guard in guards.values() {
            let intention = guard.intention();
            let sources = match &intention.destination {
                Party::Any => &mut table.any,
                Party::Service(name) => table.exact.entry(name.clone()).or_default(),
            };
            match &intention.source {
                Party::Any => sources.any = Some(Arc::clone(guard)),
                Party::Service(name) => drop(sources.exact.insert(name.clone(), Arc::clone(guard))),
            }
        }
        table.guards = guards;
        table
    }

    /// What is decided where no intention does.
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// Every intention, in order of name.
    pub fn guards(&self) -> impl ExactSizeIterator<Item = &Arc<Guard>> {
        self.guards.values()
    }

    /// Looks one up by `source:destination`.
    pub fn guard(&self, name: &str) -> Option<&Arc<Guard>> {
        self.guards.get(name)
    }

    /// What could not be made ready.
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// The intentions about a call, the most exact first. A caller without a service is known by wildcards alone.
    pub fn matching(
        &self,
        source: Option<&ServiceName>,
        destination: &ServiceName,
    ) -> impl Iterator<Item = &Arc<Guard>> {
        let of_destination = self.exact.get(destination);
        let exact = of_destination.and_then(|sources| sources.exact.get(source?));
        let any_source = of_destination.and_then(|sources| sources.any.as_ref());
        let any_destination = source.and_then(|source| self.any.exact.get(source));
        [exact, any_source, any_destination, self.any.any.as_ref()].into_iter().flatten()
    }

    /// Decides over a stream of bytes; `on_audit` hears what audited intentions would have decided.
    pub fn of_stream(
        &self,
        source: Option<&ServiceName>,
        destination: &ServiceName,
        on_audit: impl FnMut(&Guard, Action),
    ) -> Decision<'_> {
        self.decide(source, destination, Guard::stream, on_audit)
    }

    /// Decides over a request; `on_audit` hears what audited intentions would have decided.
    pub fn of_request(
        &self,
        source: Option<&ServiceName>,
        destination: &ServiceName,
        request: &Request<'_>,
        on_audit: impl FnMut(&Guard, Action),
    ) -> Decision<'_> {
        self.decide(source, destination, |guard| guard.request(request, self.default), on_audit)
    }

    fn decide(
        &self,
        source: Option<&ServiceName>,
        destination: &ServiceName,
        ask: impl Fn(&Guard) -> Action,
        mut on_audit: impl FnMut(&Guard, Action),
    ) -> Decision<'_> {
        if self.guards.is_empty() {
            return Decision { action: self.default, by: None };
        }
        for guard in self.matching(source, destination) {
            let action = ask(guard);
            if guard.is_enforced() {
                return Decision { action, by: Some(guard) };
            }
            on_audit(guard, action);
        }
        Decision { action: self.default, by: None }
    }
}

//! What operators say about requests: config entries, compiled to one chain per service that the data plane asks.
//!
//! ```text
//!   config entries (JSON) --Ready::new--> Ready --Traffic::new--> Traffic { Chain per service } --> Snapshot --> proxy
//!    service-router, -splitter, -resolver, -defaults, -faults, proxy-defaults, ingress-gateway
//!
//!   Chain: faults -> routes (first match) -> redirect | split -> target, failover targets
//!   Gateway: port -> host -> service
//! ```
//!
//! An entry is read strictly: every problem is named at once with its field's path. References (subsets, circles) are held
//! against all other entries where one is written ([`check_write`]). What comes by gossip may still not fit (documents arrive
//! in any order, and other nodes may be newer): then the entry's last good version stays, and where the chain of a service
//! cannot be made, its last good chain; a service without one is called as if no entry were about it.
//!
//! Invariants: a chain is immutable, asked without a lock, and leads to at least one target; nothing here denies anything
//! (`authz` does); regular expressions are bounded in number and size, and match in linear time.
//! A pure core. Not here: signatures (`policy`), off which thread chains are made (`gossip`), which instance of a target is
//! next (`routing`), sending, waiting and trying again (`proxy`).

mod chain;
mod compile;
mod entry;
mod fields;
mod gateway;
pub mod hedge;
mod hops;
mod matcher;
mod read;
pub mod retry;
mod show;
mod subset;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use serde_json::Value;

pub use chain::{
    Action, Chain, Faults, Forward, Leg, Mirror, Resolved, Route, SHARES, Split, Subset, Target, is_hit, stable_hash,
};
pub use compile::{Entries, Ready, Router};
pub use entry::{Abort, HeaderEdit, Redirect, Sticky};
pub use fields::{Problem, Problems};
pub use gateway::{Exposed, Gateway, GatewayListener};
pub use hops::{Network, TrustedHops};
pub use matcher::{Asked, HeaderTest, Match, Matcher, QueryTest, TextTest};
pub use read::{PATH_REGEXES_MAX, ROUTES_MAX};
pub use show::show;
pub use subset::Filter;

use crate::model::{Protocol, ServiceName};

/// Kinds of entries that are read here.
pub const KINDS: [&str; 7] = [
    "service-defaults",
    "proxy-defaults",
    "service-router",
    "service-splitter",
    "service-resolver",
    "service-faults",
    "ingress-gateway",
];

/// Something that is not in force as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// `kind:name` of an entry, or `chain:service`.
    pub name: String,
    /// Why.
    pub reason: String,
    /// Whether an older version stays in force.
    pub has_older: bool,
}

/// The chains of all services. Immutable.
#[derive(Debug, Default)]
pub struct Traffic {
    chains: HashMap<ServiceName, Arc<Chain>>,
    entries: Entries,
    has_protocols: bool,
    quarantined: Vec<Quarantined>,
}

impl Traffic {
    /// Compiles `entries`; where that fails, what `before` has of the service stays. `quarantined` are entries that could
    /// not be read.
    pub fn new(entries: Entries, before: &Self, mut quarantined: Vec<Quarantined>) -> Self {
        let mut chains: HashMap<ServiceName, Arc<Chain>> = HashMap::default();
        for service in entries.services() {
            if chains.contains_key(service) {
                continue;
            }
            match entries.chain(service) {
                Ok(chain) => drop(chains.insert(service.clone(), Arc::new(chain))),
                Err(problems) => {
                    let older = before.chains.get(service);
                    let name = format!("chain:{service}");
                    if !quarantined.iter().any(|one| one.name == name) {
                        quarantined.push(Quarantined {
                            name,
                            reason: problems.to_string(),
                            has_older: older.is_some(),
                        });
                    }
                    if let Some(older) = older {
                        chains.insert(service.clone(), Arc::clone(older));
                    }
                }
            }
        }
        let has_protocols = entries.has_protocols();
        Self { chains, entries, has_protocols, quarantined }
    }

    /// The chain of a service; none: no entry is about its requests.
    pub fn chain(&self, service: &ServiceName) -> Option<&Arc<Chain>> {
        if self.chains.is_empty() { None } else { self.chains.get(service) }
    }

    /// How a service's traffic is parsed, if an entry says so.
    pub fn protocol(&self, service: &ServiceName) -> Option<Protocol> {
        if self.has_protocols { self.entries.protocol(service) } else { None }
    }

    /// How long nothing may move either way on connections of bytes to a service, and on upgraded ones; none: no entry says so.
    pub fn idle_timeout(&self, service: &ServiceName) -> Option<Duration> {
        self.entries.idle_timeout(service)
    }

    /// What the gateways of this name listen on, and whom calls that come there are for.
    pub fn gateway(&self, name: &ServiceName) -> Option<&Arc<Gateway>> {
        self.entries.gateways().get(name)
    }

    /// All gateways that an entry is about, in order of name.
    pub fn gateways(&self) -> impl Iterator<Item = (&ServiceName, &Arc<Gateway>)> {
        self.entries.gateways().iter()
    }

    /// Whether a caller at `addr` may say for whom it asks.
    pub fn trusts(&self, addr: IpAddr) -> bool {
        self.entries.trusted_hops().holds(addr)
    }

    /// How many services have a chain.
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Whether no service has a chain.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// What is not in force as it was written.
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// The chain that a service would have if no entry were about it, for people.
    ///
    /// # Errors
    /// As [`Entries::chain`].
    pub fn plain_chain(&self, service: &ServiceName) -> Result<Chain, Problems> {
        self.entries.chain(service)
    }
}

/// An entry that is to be written: kind, name, and its JSON; none: it is to be deleted.
pub type Written<'v> = (&'v str, &'v str, Option<&'v Value>);

/// Holds an entry that is to be written, or deleted, against itself and against the `others` that are in force.
///
/// # Errors
/// Every problem of the entry, and every reference that leads nowhere because of it.
pub fn check_write<'v>(
    others: impl IntoIterator<Item = (&'v str, &'v str, &'v Value)>,
    (kind, name, value): Written<'_>,
) -> Result<(), Problems> {
    let (ready, own) = match value.map(|value| Ready::read(kind, value)) {
        Some((ready, problems)) => (Some(ready), problems),
        None => (None, Problems::default()),
    };
    let mut entries = Entries::default();
    for (kind, name, value) in others {
        if let Ok(ready) = Ready::new(kind, value) {
            entries.add(kind, name, ready);
        }
    }
    let broken = |entries: &Entries| {
        let mut found = Problems::default();
        let chains = entries.services().filter_map(|service| entries.chain(service).err());
        for problem in chains.chain([entries.gateway_conflicts()]).flat_map(|problems| problems.0) {
            if !found.0.contains(&problem) {
                found.0.push(problem);
            }
        }
        found
    };
    let before = broken(&entries);
    match ready {
        Some(ready) => entries.add(kind, name, ready),
        None => entries.remove(kind, name),
    }
    let mut after = broken(&entries);
    // What was wrong already does not keep anybody from writing something else.
    after.0.retain(|problem| !before.0.contains(problem));
    if own.0.is_empty() {
        return after.or(());
    }
    // Where something is wrong by itself it says nothing of where it leads, and others' ways through it neither.
    let own_ways = format!("{kind}:{name} ");
    let mut found = own.clone();
    for problem in after.0 {
        let place = problem.path.strip_prefix(&own_ways);
        if place.is_some_and(|place| !own.0.iter().any(|one| one.path.starts_with(place))) {
            found.add(problem.path, problem.rule);
        }
    }
    Err(found)
}

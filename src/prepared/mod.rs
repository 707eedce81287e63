//! Prepared queries: which one a name means, and whom it finds.
//!
//! ```text
//!   rows of all agents --> Book --find(name)--> Definition --execute(snapshot)--> Found {instances, where}
//! ```
//!
//! HTTP and DNS execute them by the same functions. Names are looked for without case, as Consul does.
//!
//! Invariants: a peer may bring what no agent would take, and such a query is found by nobody; what one execution looks at is
//! bounded, and other datacenters are no part of it while somebody is in the first place; an expression is compiled once for
//! each book, and only that of the template which a name means.
//! Not here: where queries are kept (`gossip::shared`), the order of instances, Consul's JSON (`api`), records (`dns`).

mod definition;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use regex::bytes::Regex;

use crate::catalogue::Snapshot;
use crate::lww::Row;
use crate::model::{HealthStatus, Instance, MemberStatus, NodeName};

pub(crate) use self::definition::{Definition, ServiceQuery};

/// Most datacenters and targets that one execution looks at.
const PLACES_MAX: usize = 32;

/// The prepared queries of one moment.
#[derive(Debug, Default)]
pub struct Book {
    /// The oldest first: of two that got one name on two agents at once, it counts.
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    id: Arc<str>,
    definition: Definition,
    /// Its expression; or why no agent executes it.
    checked: OnceLock<Result<Option<Regex>, String>>,
}

impl Kept {
    fn regex(&self) -> Result<Option<&Regex>, &String> {
        self.checked.get_or_init(|| self.definition.check()).as_ref().map(Option::as_ref)
    }

    fn counts(&self) -> bool {
        self.regex().is_ok()
    }
}

impl Book {
    /// Reads rows as they are kept: the key is a query's id.
    pub(crate) fn of<'a>(rows: impl IntoIterator<Item = &'a (Arc<str>, Row)>) -> Self {
        let mut kept: Vec<(u64, Kept)> = rows
            .into_iter()
            .filter_map(|(id, row)| {
                let kept = Kept { id: Arc::clone(id), definition: decode(row)?, checked: OnceLock::new() };
                Some((row.stamp.ms, kept))
            })
            .collect();
        kept.sort_by_key(|(ms, _)| *ms);
        Self { kept: kept.into_iter().map(|(_, kept)| kept).collect() }
    }

    /// Finds a query by its id, by its name, or by the template that says most of the name, which it renders.
    pub(crate) fn find(&self, wanted: &str) -> Option<Definition> {
        let by_id = self.kept.iter().find(|kept| *kept.id == *wanted && kept.counts());
        let is_named = |kept: &&Kept| {
            let definition = &kept.definition;
            let is_it = !definition.name.is_empty() && definition.name.eq_ignore_ascii_case(wanted);
            is_it && !definition.is_template() && kept.counts()
        };
        if let Some(kept) = by_id.or_else(|| self.kept.iter().find(is_named)) {
            return Some(kept.definition.clone());
        }
        let fits = |kept: &&Kept| {
            let name = kept.definition.name.as_str();
            let begins = wanted.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
            begins && kept.definition.is_template()
        };
        let mut templates: Vec<&Kept> = self.kept.iter().filter(fits).collect();
        // Stable: of two that say as much the older counts. They are compiled one by one until one counts: peers may bring a thousand.
        templates.sort_by_key(|kept| Reverse(kept.definition.name.len()));
        let kept = templates.into_iter().find(|kept| kept.counts())?;
        kept.definition.render(wanted, kept.regex().ok()?)
    }

    /// Tells whether a query other than `id` has this name.
    pub(crate) fn is_taken(&self, name: &str, id: &str) -> bool {
        let has_name = |kept: &Kept| kept.definition.name.eq_ignore_ascii_case(name) && kept.counts();
        self.kept.iter().any(|kept| *kept.id != *id && has_name(kept))
    }
}

#[cfg(test)]
impl Book {
    /// What clients sent, each as if it had been written after the one before, with the ids `1`, `2` ….
    pub(crate) fn of_bodies(bodies: &[serde_json::Value]) -> Self {
        let kept = |(at, body): (usize, &serde_json::Value)| Kept {
            id: Arc::from((at + 1).to_string()),
            definition: Definition::parse(body.to_string().as_bytes()).unwrap(),
            checked: OnceLock::new(),
        };
        Self { kept: bodies.iter().enumerate().map(kept).collect() }
    }
}

/// Reads a row as it is.
fn decode(row: &Row) -> Option<Definition> {
    serde_json::from_slice(&row.body.as_ref()?.value).ok()
}

/// Reads a row that an agent would execute.
pub(crate) fn decode_checked(row: &Row) -> Option<Definition> {
    decode(row).filter(|definition| definition.check().is_ok())
}

/// Whom a query finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    /// The instances, those of nodes without an agent among them.
    Services,
    /// Where the mesh reaches them: their own instances stand for their agents.
    Mesh,
}

/// What an execution found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// In order of (node, id).
    pub(crate) instances: Vec<Arc<Instance>>,
    /// Where.
    pub(crate) datacenter: String,
    /// How many places were empty before.
    pub(crate) failovers: usize,
}

/// Looks in `datacenter`, and where nobody is there in the places of the query's failover, in order. `from_here` returns this
/// agent's round trips; it is asked where the nearest datacenters are to be known.
pub(crate) fn execute<'a>(
    snapshot: &Snapshot,
    query: &ServiceQuery,
    datacenter: &str,
    ends: Ends,
    from_here: impl FnOnce() -> &'a BTreeMap<NodeName, Duration>,
) -> Found {
    let instances = pick(snapshot, query, &query.service, datacenter, ends);
    let mut found = Found { instances, datacenter: datacenter.to_owned(), failovers: 0 };
    if !found.instances.is_empty() {
        return found;
    }
    let places = failovers(snapshot, query, datacenter, from_here).into_iter().take(PLACES_MAX - 1);
    for (failovers, (service, datacenter)) in (1..).zip(places) {
        let instances = pick(snapshot, query, &service, &datacenter, ends);
        found = Found { instances, datacenter, failovers };
        if !found.instances.is_empty() {
            break;
        }
    }
    found
}

/// Where to look when there is nobody in `own`: services and datacenters, in order.
fn failovers<'a>(
    snapshot: &Snapshot,
    query: &ServiceQuery,
    own: &str,
    from_here: impl FnOnce() -> &'a BTreeMap<NodeName, Duration>,
) -> Vec<(String, String)> {
    let service = &query.service;
    let mut places = Vec::new();
    if query.failover.nearest_n > 0 {
        let datacenters = nearest(snapshot, own, query.failover.nearest_n, from_here());
        places.extend(datacenters.into_iter().map(|datacenter| (service.clone(), datacenter)));
    }
    let named = query.failover.datacenters.iter().map(|datacenter| (service.clone(), datacenter.clone()));
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    let targets = query.failover.targets.iter();
    let targets = targets.map(|target| (or(&target.service, service), or(&target.datacenter, own)));
    for place in named.chain(targets) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places.retain(|(other, datacenter)| other != service || datacenter != own);
    places
}

/// The `most` datacenters other than `own` whose nearest node is nearest; those of which no node was measured come last.
fn nearest(snapshot: &Snapshot, own: &str, most: usize, from_here: &BTreeMap<NodeName, Duration>) -> Vec<String> {
    let mut trips: BTreeMap<&str, Duration> = BTreeMap::new();
    for node in snapshot.nodes.values().filter(|node| node.status == MemberStatus::Alive) {
        let trip = from_here.get(&node.info.name).copied().unwrap_or(Duration::MAX);
        let shortest = trips.entry(&node.info.datacenter).or_insert(Duration::MAX);
        *shortest = trip.min(*shortest);
    }
    trips.remove(own);
    let mut datacenters: Vec<(Duration, &str)> = trips.into_iter().map(|(name, trip)| (trip, name)).collect();
    datacenters.sort_unstable();
    datacenters.into_iter().take(most).map(|(_, name)| name.to_owned()).collect()
}

/// The instances of `service` in `datacenter` that the query takes.
fn pick(snapshot: &Snapshot, query: &ServiceQuery, service: &str, datacenter: &str, ends: Ends) -> Vec<Arc<Instance>> {
    let mut held = match ends {
        Ends::Services => snapshot.listed(service),
        Ends::Mesh => snapshot.services.get(service).map(|entry| entry.instances.clone()).unwrap_or_default(),
    };
    held.retain(|instance| instance.node.info.datacenter == datacenter && takes(query, instance));
    held
}

fn takes(query: &ServiceQuery, instance: &Instance) -> bool {
    let (record, node) = (&instance.record, &instance.node);
    let has = |tag: &str| record.tags.iter().any(|own| own.eq_ignore_ascii_case(tag));
    let tags = query.tags.iter().all(|tag| match tag.strip_prefix('!') {
        Some(unwanted) => !has(unwanted),
        None => has(tag),
    });
    let node_meta = query.node_meta.iter().all(|(key, value)| node.info.meta.get(key) == Some(value));
    let service_meta =
        query.service_meta.iter().all(|(key, value)| record.meta.get(key).is_some_and(|own| **own == **value));
    let status = if query.ignore_check_ids.is_empty() {
        instance.status
    } else {
        let counts = |id: &str| !query.ignore_check_ids.iter().any(|ignored| ignored == id);
        let checks = instance.checks.iter().chain(&node.checks).filter(|check| counts(check.id.as_str()));
        let member = if node.status == MemberStatus::Alive || !counts("serfHealth") {
            HealthStatus::Passing
        } else {
            HealthStatus::Critical
        };
        checks.map(|check| check.status).fold(member, HealthStatus::max)
    };
    let healthy = if query.only_passing { status == HealthStatus::Passing } else { status != HealthStatus::Critical };
    tags && node_meta && service_meta && healthy && node.status != MemberStatus::Left
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::catalogue::ServiceEntry;
    use crate::lww::{Body, Stamp};
    use crate::model::{NodeEntry, NodeInfo, Protocol, ServiceRecord, fixture};

    fn raw(ms: u64, value: Vec<u8>) -> (Arc<str>, Row) {
        let stamp = Stamp { ms, count: 0, node: "n1".parse().unwrap() };
        let body = Some(Arc::new(Body { flags: 0, value }));
        (Arc::from(ms.to_string()), Row { stamp, sum: 0, body, created: 1, modified: 1 })
    }

    #[test]
    fn a_name_means_one_query_in_any_case_and_the_longest_template_else() {
        let template = json!({"Type": "name_prefix_match", "Regexp": "^geo-(.*)$"});
        let book = Book::of_bodies(&[
            json!({"Name": "Web", "Service": {"Service": "a"}}),
            json!({"Name": "web", "Service": {"Service": "b"}}),
            json!({"Name": "geo-", "Template": template, "Service": {"Service": "${match(1)}"}}),
            json!({"Name": "g", "Template": {"Type": "name_prefix_match"}, "Service": {"Service": "${name.suffix}"}}),
        ]);
        let service = |wanted: &str| book.find(wanted).map(|found| found.service.service);
        assert_eq!(service("WEB").as_deref(), Some("a"), "the older of two");
        assert_eq!(service("2").as_deref(), Some("b"), "by its id");
        assert_eq!(service("geo-db").as_deref(), Some("db"));
        assert_eq!(service("gx").as_deref(), Some("x"));
        assert_eq!(service("nobody"), None);
        assert!(book.is_taken("WEB", "1") && !book.is_taken("geo", ""));
    }

    #[test]
    fn of_two_with_one_name_the_older_counts_wherever_it_stands() {
        let of = |service: &str| json!({"Name": "q", "Service": {"Service": service}}).to_string().into_bytes();
        let book = Book::of(&[raw(9, of("late")), raw(3, of("early"))]);
        assert_eq!(book.find("Q").unwrap().service.service, "early");
    }

    #[test]
    fn of_the_templates_that_fit_a_name_only_the_one_that_it_means_is_compiled() {
        let template = |name: &str| {
            let template = json!({"Type": "name_prefix_match", "Regexp": "^(.*)$"});
            json!({"Name": name, "Template": template, "Service": {"Service": "${match(1)}"}})
        };
        let bodies: Vec<_> = std::iter::repeat_n("", 20).chain(["geo-"]).map(template).collect();
        let book = Book::of_bodies(&bodies);
        for name in ["geo-db", "other"] {
            assert_eq!(book.find(name).unwrap().service.service, name);
        }
        assert_eq!(book.kept.iter().filter(|kept| kept.checked.get().is_some()).count(), 2);
    }

    /// A mesh of these nodes, each with its datacenter; those in `serving` have an instance of `web`.
    fn mesh(nodes: &[(&str, &str)], serving: &[&str]) -> Snapshot {
        let node = |(name, datacenter): &(&str, &str)| {
            let info = NodeInfo { datacenter: (*datacenter).to_owned(), ..fixture::node_info(name) };
            (info.name.clone(), Arc::new(fixture::node_entry(info)))
        };
        let nodes: BTreeMap<NodeName, Arc<NodeEntry>> = nodes.iter().map(node).collect();
        let instance = |name: &&str| {
            let record = ServiceRecord::new("web-1".parse().unwrap(), "web".parse().unwrap());
            Arc::new(fixture::instance(Arc::clone(&nodes[*name]), record))
        };
        let instances = serving.iter().map(instance).collect();
        let web = ServiceEntry { name: "web".parse().unwrap(), protocol: Protocol::Tcp, instances, modify_index: 1 };
        let services = BTreeMap::from([(web.name.clone(), Arc::new(web))]);
        Snapshot { nodes, services, ..Snapshot::empty("n1".parse().unwrap()) }
    }

    #[test]
    fn how_far_others_are_is_asked_only_where_nobody_is_here_and_the_nearest_are_wanted() {
        let snapshot = mesh(&[("n1", "dc1"), ("n2", "dc2"), ("n3", "dc3"), ("n4", "dc3")], &["n1", "n2", "n3"]);
        let query = |failover: serde_json::Value| {
            let body = json!({"Service": {"Service": "web", "Failover": failover}});
            Definition::parse(body.to_string().as_bytes()).unwrap().service
        };
        let (near, named) = (query(json!({"NearestN": 2})), query(json!({"Datacenters": ["dc2"]})));
        for (query, datacenter, want) in [(&near, "dc1", ("dc1", 0)), (&named, "dc9", ("dc2", 1))] {
            let found = execute(&snapshot, query, datacenter, Ends::Services, || unreachable!("nobody asked for it"));
            assert_eq!((found.datacenter.as_str(), found.failovers), want);
        }
        // Of a datacenter its nearest node counts; one of which nobody was measured comes last.
        for (measured, want) in [
            (&[("n2", 9), ("n3", 20), ("n4", 5)][..], "dc3"),
            (&[("n2", 9), ("n3", 20)][..], "dc2"),
            (&[("n3", 9)][..], "dc3"),
            (&[][..], "dc1"),
        ] {
            let trip = |(node, ms): &(&str, u64)| (node.parse().unwrap(), Duration::from_millis(*ms));
            let trips: BTreeMap<NodeName, Duration> = measured.iter().map(trip).collect();
            let found = execute(&snapshot, &near, "dc9", Ends::Services, || &trips);
            assert_eq!((found.datacenter.as_str(), found.failovers), (want, 1), "{measured:?}");
        }
    }

    #[test]
    fn what_no_agent_would_take_is_found_by_nobody() {
        let bad = |value: &serde_json::Value| value.to_string().into_bytes();
        let book = Book::of(&[
            raw(0, b"no json".to_vec()),
            raw(1, bad(&json!({"Name": "q", "Service": {"Service": ""}}))),
            raw(2, bad(&json!({"Name": "t", "Template": {"Type": "x"}, "Service": {"Service": "a"}}))),
            raw(
                3,
                bad(
                    &json!({"Name": "u", "Template": {"Type": "name_prefix_match", "Regexp": "("}, "Service": {"Service": "a"}}),
                ),
            ),
        ]);
        for name in ["q", "t", "tx", "u", "ux", "1", "2", "3", "4"] {
            assert_eq!(book.find(name), None, "{name}");
        }
    }

    #[test]
    fn a_time_to_live_is_whole_seconds() {
        let with = |ttl: &str| {
            let body = json!({"Service": {"Service": "a"}, "DNS": {"TTL": ttl}}).to_string();
            Definition::parse(body.as_bytes()).unwrap().ttl_s()
        };
        assert_eq!((with(""), with("9s"), with("1500ms"), with("2m")), (None, Some(9), Some(1), Some(120)));
    }
}

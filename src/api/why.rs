//! `/v1/mesh/why`: everything that decides over a call, and what would have to change.
//!
//! Any node answers. The intentions and the catalogue are the same everywhere; what only the caller's agent knows (whom
//! its workers would pick, whom they leave out, their tunnels) is this agent's own, and the answer says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::entry;
use super::intention::{Asked, ends, service};
use super::mesh::rfc3339;
use super::query::refuse_tenancy;
use super::way::Way;
use crate::authz::{Decision, Guard, Mode, Rule, Table};
use crate::catalogue::Snapshot;
use crate::clock::{self, UnixSeconds};
use crate::gossip::NodeCertificates;
use crate::model::{HealthStatus, Instance, InstanceId, MemberStatus, NodeName, Protocol, ServiceName};
use crate::pki;
use crate::traffic::{Resolved, Target};

/// Most places of a split about which the workers are asked.
const LEGS_ASKED_MAX: usize = 16;
/// Most nodes that a remedy names.
const NODES_NAMED_MAX: usize = 5;

/// One data-plane worker's view of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerView {
    /// Which worker.
    pub worker: usize,
    /// About which of the call's legs.
    pub leg: usize,
    /// The target that it would call.
    pub target: String,
    /// Whom its next call goes to.
    pub next: Option<(NodeName, InstanceId)>,
    /// Why it goes to nobody.
    pub why_none: String,
    /// Instances that it could not connect lately.
    pub backing_off: Vec<(NodeName, InstanceId)>,
    /// What it knows of the instances.
    pub balancer: BalancerView,
    /// Its tunnels for such calls: node, who answered there, and when that certificate ends.
    pub tunnels: Vec<(NodeName, String, UnixSeconds)>,
}

/// What one worker knows of the instances of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BalancerView {
    /// How calls are spread.
    pub policy: &'static str,
    /// Keys have a table.
    pub has_table: bool,
    /// Too few instances are left: ejections are not looked at.
    pub panics: bool,
    /// Under way from this agent: connections, waiting calls, requests, repeated requests.
    pub under_way: [u32; 4],
    /// The most of each.
    pub most: [u32; 4],
    /// Requests of this worker that wait for an instance.
    pub waiting: usize,
    /// The instances.
    pub seats: Vec<SeatView>,
}

/// What one worker knows of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeatView {
    /// Where it runs.
    pub node: NodeName,
    /// Which one.
    pub instance: InstanceId,
    /// `closed` (takes calls), `open` (ejected), `half-open` (one request tries it).
    pub breaker: &'static str,
    /// How much longer it is ejected.
    pub out_for: Option<Duration>,
    /// Calls under way.
    pub pending: u32,
    /// How many may be, where that is found out by its answers.
    pub adaptive_limit: Option<u32>,
    /// What an answer is expected to take.
    pub delay: Option<Duration>,
    /// Its share is lowered by reports of other nodes.
    pub is_lowered: bool,
}

/// Asks the data plane's workers what they would do with a call of a service, to the one that it names, which leads there.
pub type Inspect =
    Arc<dyn Fn(Option<ServiceName>, ServiceName, Arc<Resolved>) -> BoxFuture<'static, Vec<WorkerView>> + Send + Sync>;

/// `GET /v1/mesh/why?source=&destination=[&method=&path=&header=name:value]`
pub(super) async fn why(call: Call) -> Result<Reply, Refusal> {
    refuse_tenancy(&call)?;
    let (source, destination) = ends(&call)?;
    let asked = Asked::parse(&call)?;
    let Some(destination) = service(&destination).cloned() else {
        return Err(Refusal::bad("Invalid destination: a call goes to one service, not to `*`"));
    };
    let source = service(&source);
    let shared = &call.shared;
    let snapshot = shared.snapshot.load();
    let certificates = shared.membership.certificates().await?;
    let chain = entry::chain_of(&snapshot, &destination)?;
    let way = Way::of(&snapshot, &chain, source, &asked);
    let workers = ask_workers(&call, source, &destination, &way).await;
    let source_name = source.map_or("*", ServiceName::as_str);
    let local = source.is_some_and(|source| {
        shared.registry.state().services.values().any(|local| local.definition.record.name == *source)
    });
    let decision = way.deciding().map(|leg| &leg.decision);
    let decided = way.deciding().map_or(&destination, |leg| &leg.to.target.service);
    let rule = decision.map_or("", Decision::rule);
    let answer = json!({
        "Source": source_name,
        "Destination": destination,
        "Request": asked.is_request().then(|| json!({"Method": asked.method, "Path": asked.path})),
        "AskedNode": shared.node.name,
        "SourceIsHere": local,
        "Allowed": decision.is_none_or(Decision::is_allowed),
        "Verdict": verdict(&snapshot, &way, &workers),
        "Policy": policy(&snapshot.policy, source, decided, rule),
        "Way": way.shown(),
        "Chain": entry::chain(&snapshot, &destination).ok().filter(|_| snapshot.traffic.chain(&destination).is_some()),
        "Protocol": snapshot.protocol(&destination).map(Protocol::as_str),
        "Instances": instances(&call, &snapshot, &way, (&workers, &certificates)),
        "Workers": workers.iter().map(worker).collect::<Vec<Value>>(),
        "SourceCertificate": source.filter(|_| local).and_then(|source| source_certificate(&call, source)),
        "SourceInstances": source.map(|source| sources(&call, &snapshot, source, &certificates)),
        "Data": data(&call, &snapshot, &certificates),
        "ToChange": remedies(&snapshot, source, &way, &asked),
    });
    Reply::json(&call, &answer)
}

/// Asks the workers about each place that calls go to, [`LEGS_ASKED_MAX`] of them.
async fn ask_workers(
    call: &Call,
    source: Option<&ServiceName>,
    destination: &ServiceName,
    way: &Way<'_>,
) -> Vec<WorkerView> {
    let mut views = Vec::new();
    for (leg, to) in way.places().into_iter().take(LEGS_ASKED_MAX) {
        let seen = (call.shared.inspect)(source.cloned(), destination.clone(), Arc::clone(to)).await;
        views.extend(seen.into_iter().map(|view| WorkerView { leg, ..view }));
    }
    views
}

/// Says in one line what becomes of the call.
fn verdict(snapshot: &Snapshot, way: &Way<'_>, workers: &[WorkerView]) -> String {
    if let Some(redirect) = way.redirect() {
        return format!("answered here with {}: a route sends its callers elsewhere", redirect.code);
    }
    let Some(leg) = way.deciding() else { return "goes nowhere".to_owned() };
    let by = rule_text(leg.decision.by.map(|guard| &**guard), &snapshot.policy);
    let leads_elsewhere = way.legs.iter().any(|leg| leg.to.target.id != way.named().as_str());
    let of = if leads_elsewhere { format!(", at {}", leg.to.target.id) } else { String::new() };
    if !leg.decision.is_allowed() {
        return format!("denied by {by}{of}");
    }
    let places = way.places();
    let has_next = |at: usize| workers.iter().any(|view| view.leg == at && view.next.is_some());
    let without: Vec<&str> =
        places.iter().take(LEGS_ASKED_MAX).filter(|(at, _)| !has_next(*at)).map(|(_, to)| &*to.target.id).collect();
    match (without.len(), places.len().min(LEGS_ASKED_MAX)) {
        (0, _) => format!("allowed by {by}{of}"),
        (none, all) if none == all => "allowed, but there is no instance to send it to".to_owned(),
        _ => format!("allowed by {by}{of}, but there is no instance of {}", without.join(", ")),
    }
}

/// What would have to change for all of the call's ways to pass.
fn remedies(snapshot: &Snapshot, source: Option<&ServiceName>, way: &Way<'_>, asked: &Asked) -> Vec<String> {
    let mut change: Vec<String> = Vec::new();
    for leg in &way.legs {
        let service = &leg.to.target.service;
        let mut found = Vec::new();
        if !leg.decision.is_allowed() {
            let by = leg.decision.by.map(|guard| &**guard);
            found.push(policy_remedy(&snapshot.policy, by, source, service, asked));
        }
        // One place that has somebody is enough.
        let places: Vec<Vec<String>> = std::iter::once(&leg.to.target)
            .chain(&leg.to.failover)
            .map(|target| catalogue_remedy(snapshot, way, target))
            .collect();
        if places.iter().all(|remedy| !remedy.is_empty()) {
            found.extend(places.into_iter().flatten());
        }
        found.retain(|one| !change.contains(one));
        change.extend(found);
    }
    change
}

fn rule_text(by: Option<&Guard>, table: &Table) -> String {
    match by {
        Some(guard) => format!("intention {} (precedence {})", guard.name(), guard.intention().precedence()),
        None => format!("the default ({}), for no intention is about it", table.default_action()),
    }
}

/// Every intention about the call, and which one decides.
fn policy(table: &Table, source: Option<&ServiceName>, destination: &ServiceName, rule: &str) -> Value {
    let shape = |guard: &Arc<Guard>| {
        let intention = guard.intention();
        let says = match &intention.rule {
            Rule::Action(action) => action.to_string(),
            Rule::Permissions(list) => format!("{} permissions, else {}", list.len(), table.default_action()),
        };
        json!({
            "Name": &**guard.name(),
            "Precedence": intention.precedence(),
            "Says": says,
            "Audit": intention.mode == Mode::Audit,
            "Version": guard.origin().version,
            "Signer": guard.origin().signer,
            "Decides": **guard.name() == *rule,
            "Description": intention.description,
        })
    };
    let considered: Vec<Value> = table.matching(source, destination).map(shape).collect();
    let quarantined: Vec<Value> = table
        .quarantined()
        .iter()
        .filter(|one| considered.iter().any(|shown| shown.get("Name").and_then(Value::as_str) == Some(&one.name)))
        .map(|one| json!({"Name": one.name, "Version": one.version, "Reason": one.reason, "InForce": one.in_force}))
        .collect();
    json!({"Rule": rule, "Default": table.default_action().as_str(), "Considered": considered, "Quarantined": quarantined})
}

fn policy_remedy(
    table: &Table,
    by: Option<&Guard>,
    source: Option<&ServiceName>,
    destination: &ServiceName,
    asked: &Asked,
) -> String {
    let source_name = source.map_or("*", ServiceName::as_str);
    let create = format!("weft intention create -allow {source_name} {destination}");
    let Some(guard) = by else { return format!("no intention is about it and the default is deny: {create}") };
    if let Some(one) = table.quarantined().iter().find(|one| one.name == **guard.name()) {
        return format!(
            "version {} of intention {} is quarantined ({}): write it anew",
            one.version, one.name, one.reason
        );
    }
    match &guard.intention().rule {
        Rule::Permissions(_) if !asked.is_request() => {
            format!("intention {} has permissions, which deny plain streams: ask with -method and -path", guard.name())
        }
        Rule::Permissions(_) => {
            format!("a permission of intention {} that allows the request, before any that denies it", guard.name())
        }
        Rule::Action(_) if guard.intention().precedence() < 9 => {
            format!("a more exact intention than {}: {create}", guard.name())
        }
        Rule::Action(_) => format!("intention {} itself: {create} -replace", guard.name()),
    }
}

fn catalogue_remedy(snapshot: &Snapshot, way: &Way<'_>, target: &Target) -> Vec<String> {
    let destination = &target.service;
    let Some(entry) = snapshot.services.get(destination) else {
        if let Some(external) = snapshot.externals.services().get(destination) {
            let nodes: BTreeSet<&str> = external.instances.iter().map(|one| one.node.info.name.as_str()).collect();
            return vec![format!(
                "`{destination}` is registered on nodes without an agent alone ({}): discovery lists it, and the mesh calls none of it, for nobody there can prove who it is. Dial it directly, or run an agent beside it and register it there",
                nodes.into_iter().take(NODES_NAMED_MAX).collect::<Vec<_>>().join(", ")
            )];
        }
        return vec![format!(
            "no service `{destination}` is registered: register it on a node whose certificate covers it"
        )];
    };
    let taken: Vec<&Arc<Instance>> = entry.instances.iter().filter(|one| way.takes(target, one)).collect();
    if taken.is_empty() && !entry.instances.is_empty() {
        let (id, count) = (&target.id, entry.instances.len());
        return vec![format!(
            "none of the {count} instances of {destination} belongs to {id}: register one that its service-resolver takes, or lead the route elsewhere"
        )];
    }
    if taken.iter().any(|one| one.status != HealthStatus::Critical) {
        return Vec::new();
    }
    let why = |one: &&Arc<Instance>| {
        let (node, id) = (&one.node.info.name, &one.record.id);
        if one.node.status != MemberStatus::Alive {
            return format!("node {node} of {id} is {}: start its agent", one.node.status.as_str());
        }
        format!("{id} on {node} is critical: its check {} must pass", failing(one).join(", "))
    };
    taken.iter().map(why).collect()
}

/// The checks for which an instance is out.
fn failing(one: &Instance) -> Vec<&str> {
    let all = one.checks.iter().chain(&one.node.checks);
    all.filter(|check| check.status == HealthStatus::Critical).map(|check| check.id.as_str()).collect()
}

/// The chain of a node's certificates below the service's own, which the node renews by itself every hour.
fn chain(call: &Call, shown: &NodeCertificates) -> Value {
    let bundle = call.shared.authority.bundle().0;
    let root = bundle.roots.iter().find(|root| pki::spki(root).ok() == shown.root);
    let root_ends = root.and_then(|root| pki::validity(root).ok()).map(|(_, ends)| rfc3339(ends));
    json!({
        "Serial": shown.intermediate.serial,
        "Ends": rfc3339(shown.intermediate.not_after),
        "IssuerEnds": rfc3339(shown.issuer.not_after),
        "Root": shown.root.map(|root| root.to_string()),
        "RootEnds": root_ends,
    })
}

/// Where the caller is registered: any node knows its instances and their nodes' certificates.
fn sources(call: &Call, snapshot: &Snapshot, source: &ServiceName, certificates: &[NodeCertificates]) -> Vec<Value> {
    let instances = snapshot.services.get(source).map(|entry| entry.instances.as_slice()).unwrap_or_default();
    let shape = |one: &Arc<Instance>| {
        let node = &one.node.info.name;
        let certificate = certificates.iter().find(|shown| shown.node == *node);
        json!({
            "Node": node,
            "ID": one.record.id,
            "NodeStatus": one.node.status.as_str(),
            "Certificate": certificate.map(|shown| chain(call, shown)),
            "RecordsAgeSeconds": certificate.map(age),
        })
    };
    instances.iter().map(shape).collect()
}

/// The instances of the services that calls may go to: whom a target takes, and whom none does.
fn instances(
    call: &Call,
    snapshot: &Snapshot,
    way: &Way<'_>,
    (workers, certificates): (&[WorkerView], &[NodeCertificates]),
) -> Vec<Value> {
    let targets = way.targets();
    let mut services: Vec<&ServiceName> = Vec::new();
    for target in &targets {
        if !services.contains(&&target.service) {
            services.push(&target.service);
        }
    }
    let entries = services.into_iter().filter_map(|service| snapshot.services.get(service));
    let mut shown = Vec::new();
    for (entry, one) in entries.flat_map(|entry| entry.instances.iter().map(move |one| (entry, one))) {
        let of_service = targets.iter().filter(|target| target.service == entry.name);
        let (taking, others): (Vec<&&Arc<Target>>, Vec<_>) = of_service.partition(|target| way.takes(target, one));
        let ids = |targets: &[&&Arc<Target>]| targets.iter().map(|target| target.id.clone()).collect::<Vec<String>>();
        let left_out = taking.is_empty().then(|| format!("left out: it is none of {}", ids(&others).join(", ")));
        let stands_in = !way.legs.iter().any(|leg| taking.iter().any(|target| leg.to.target == ***target));
        let mut shape = instance(call, one, workers, certificates);
        if let Value::Object(fields) = &mut shape {
            let why = fields.get("Why").and_then(Value::as_str).unwrap_or_default();
            let why = match left_out {
                Some(left_out) => left_out,
                None if stands_in => format!("stands in for others; {why}"),
                None => why.to_owned(),
            };
            let more = [("Service", json!(entry.name)), ("Targets", json!(ids(&taking))), ("Why", json!(why))];
            fields.extend(more.map(|(name, value)| (name.to_owned(), value)));
        }
        shown.push(shape);
    }
    shown
}

fn instance(call: &Call, one: &Instance, workers: &[WorkerView], certificates: &[NodeCertificates]) -> Value {
    let key = (one.node.info.name.clone(), one.record.id.clone());
    let of = |wanted: fn(&WorkerView, &(NodeName, InstanceId)) -> bool| {
        workers.iter().filter(|view| wanted(view, &key)).map(|view| view.worker).collect::<BTreeSet<usize>>()
    };
    let next = of(|view, key| view.next.as_ref() == Some(key));
    let backing_off = of(|view, key| view.backing_off.contains(key));
    let asked = workers.iter().map(|view| view.worker).collect::<BTreeSet<usize>>().len();
    let checks = one
        .checks
        .iter()
        .chain(&one.node.checks)
        .map(|check| json!({"CheckID": check.id, "Status": check.status.as_str()}));
    let why = match one.status {
        HealthStatus::Critical if one.node.status != MemberStatus::Alive => {
            format!("out: its node is {}", one.node.status.as_str())
        }
        HealthStatus::Critical => format!("out: critical by {}", failing(one).join(", ")),
        _ if !backing_off.is_empty() && backing_off.len() == asked => {
            "last: it could not be connected lately".to_owned()
        }
        _ if !workers.is_empty() && breaker(workers, &key) == "open" => {
            "ejected: it failed; one request tries it when its time is over".to_owned()
        }
        HealthStatus::Warning => "takes calls, by its weight while it warns".to_owned(),
        HealthStatus::Passing => "takes calls".to_owned(),
    };
    let certificate = certificates.iter().find(|shown| shown.node == one.node.info.name);
    json!({
        "Node": one.node.info.name,
        "ID": one.record.id,
        "Address": one.node.info.mesh_addr.to_string(),
        "NodeStatus": one.node.status.as_str(),
        "Status": one.status.as_str(),
        "Checks": checks.collect::<Vec<Value>>(),
        "Weight": one.record.weights.passing,
        "Why": why,
        "NextOfWorkers": next,
        "BackingOffOnWorkers": backing_off,
        "Breaker": breaker(workers, &key),
        "ReportedBy": call.shared.snapshot.load().reports.by(&key.0, &key.1),
        "Certificate": certificate.map(|shown| chain(call, shown)),
        "RecordsAgeSeconds": certificate.map(age),
    })
}

/// The worst that the workers say of an instance.
fn breaker(workers: &[WorkerView], (node, id): &(NodeName, InstanceId)) -> &'static str {
    let seats = workers.iter().flat_map(|view| &view.balancer.seats);
    let of = seats.filter(|seat| seat.node == *node && seat.instance == *id).map(|seat| seat.breaker);
    let rank = |word: &&str| ["closed", "half-open", "open"].iter().position(|known| known == word);
    of.max_by_key(rank).unwrap_or("closed")
}

/// How long ago a node signed its records, if it counts the members as this one does (leases grow with the mesh).
fn age(shown: &NodeCertificates) -> u64 {
    let left = shown.lease_ends.since(clock::wall());
    shown.lease.saturating_sub(left).as_secs()
}

fn worker(view: &WorkerView) -> Value {
    let tunnels =
        view.tunnels.iter().map(|(node, peer, ends)| json!({"Node": node, "Peer": peer, "Ends": rfc3339(*ends)}));
    json!({
        "Worker": view.worker,
        "Target": view.target,
        "Next": view.next.as_ref().map(|(node, id)| json!({"Node": node, "ID": id})),
        "WhyNone": view.why_none,
        "Balancing": (!view.balancer.policy.is_empty()).then(|| balancing(&view.balancer)),
        "Tunnels": tunnels.collect::<Vec<Value>>(),
    })
}

fn balancing(view: &BalancerView) -> Value {
    let seat = |seat: &SeatView| {
        json!({
            "Node": seat.node,
            "ID": seat.instance,
            "Breaker": seat.breaker,
            "OpenForSeconds": seat.out_for.map(|left| left.as_secs()),
            "UnderWay": seat.pending,
            "AdaptiveLimit": seat.adaptive_limit,
            "ExpectedMs": seat.delay.map(|delay| (delay.as_secs_f64() * 1e6).round() / 1e3),
            "LoweredByReports": seat.is_lowered,
        })
    };
    let [connections, pending, requests, retries] =
        std::array::from_fn(|at| json!({"UnderWay": view.under_way.get(at), "Most": view.most.get(at)}));
    json!({
        "Policy": view.policy,
        "HasTable": view.has_table,
        "Panics": view.panics,
        "Waiting": view.waiting,
        "Limits": {"Connections": connections, "Pending": pending, "Requests": requests, "Retries": retries},
        "Instances": view.seats.iter().map(seat).collect::<Vec<Value>>(),
    })
}

fn source_certificate(call: &Call, source: &ServiceName) -> Option<Value> {
    let (svid, _) = call.shared.authority.svid(source).ok()?;
    let own = (call.shared.certificates)();
    Some(json!({
        "ID": svid.id.to_string(),
        "Ends": rfc3339(svid.not_after),
        "NodeEnds": rfc3339(own.intermediate_ends),
    }))
}

fn data(call: &Call, snapshot: &Snapshot, certificates: &[NodeCertificates]) -> Value {
    let (members, documents) = (call.shared.membership.members(), call.shared.membership.documents());
    let mut by_status: BTreeMap<&str, usize> = BTreeMap::new();
    for member in &members.members {
        *by_status.entry(member.status.as_str()).or_default() += 1;
    }
    json!({
        "SnapshotIndex": snapshot.index,
        "PolicyIndex": snapshot.policy_index,
        "Intentions": snapshot.policy.guards().len(),
        "DocumentsHash": format!("{:016x}", documents.set_hash),
        "Members": by_status,
        "Isolated": members.isolated,
        "DocumentsComparedSeconds": documents.compared_at.map(|at| clock::wall().since(at).as_secs()),
        "OldestRecordsSeconds": certificates.iter().map(age).max(),
    })
}

//! `/v1/health/…`: checks of the mesh, and instances with their checks.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::catalog::Pick;
use super::index::Topic;
use super::near::RoundTrips;
use super::query::ReadOptions;
use super::shape::{Check, Told};
use super::{Shared, block, catalog, gateway, shape, sift};
use crate::catalogue::Snapshot;
use crate::model::{HealthStatus, Instance, NodeEntry, NodeName};
use crate::registry::LocalState;

/// `GET /v1/health/service/:name`
pub(super) async fn service(call: Call) -> Result<Reply, Refusal> {
    let topic = Topic::Service(call.argument.clone());
    entries(call, topic, catalog::instances).await
}

/// `GET /v1/health/connect/:name`: where the mesh reaches the service's instances.
pub(super) async fn connect(call: Call) -> Result<Reply, Refusal> {
    let topic = Topic::Service(call.argument.clone());
    entries(call, topic, catalog::proxies).await
}

/// `GET /v1/health/ingress/:name`: the gateways by which the service is reached from outside.
pub(super) async fn ingress(call: Call) -> Result<Reply, Refusal> {
    entries(call, Topic::Ingress, gateway::instances).await
}

async fn entries(call: Call, topic: Topic, pick: Pick) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let passing_only = call.query.switch("passing")?;
    drop(sift::filter::<Instance>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, topic).await?;
    let trips = RoundTrips::wanted(&call, &options).await?;
    let filter = sift::filter::<Instance>(&call)?;
    let local = call.shared.registry.state();
    let mut instances = pick(&call, &snapshot, &local, &options);
    instances.retain(|i| (!passing_only || i.status == HealthStatus::Passing) && filter.is_match(&**i));
    if let Some(trips) = trips {
        trips.order(&mut instances, |instance| instance.node.info.name.as_str());
    }
    let entries = instances.iter().map(|instance| entry(&call.shared, instance, &local));
    Reply::at_index(&call, &entries.collect::<Vec<Value>>(), index)
}

/// An instance with its node and its checks.
pub(super) fn entry(shared: &Shared, instance: &Instance, local: &LocalState) -> Value {
    let told = Told::of(shared, &instance.node, local);
    let mut checks = node_checks(&instance.node, told);
    checks.extend(instance_checks(instance, told));
    json!({
        "Node": shape::node(&instance.node),
        "Service": shape::health_service(instance, catalog::local_of(shared, &instance.node, local)),
        "Checks": checks,
    })
}

/// `GET /v1/health/checks/:name`: the checks of one service's instances.
pub(super) async fn checks(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<Check<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Service(call.argument.clone())).await?;
    let trips = RoundTrips::wanted(&call, &options).await?;
    let local = call.shared.registry.state();
    let instances = catalog::instances(&call, &snapshot, &local, &options);
    let checks =
        instances.iter().flat_map(|instance| instance_checks(instance, Told::of(&call.shared, &instance.node, &local)));
    answer(&call, checks.collect(), trips, index)
}

/// `GET /v1/health/node/:name`: every check on one node.
pub(super) async fn node(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<Check<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Node(call.argument.clone())).await?;
    let local = call.shared.registry.state();
    let name = call.argument.as_str();
    let checks = all_checks(&call.shared, &snapshot, &local, &options, |node| node.info.name.as_str() == name);
    answer(&call, checks, None, index)
}

/// `GET /v1/health/state/:state`: every check in one state, or in `any`.
pub(super) async fn state(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let wanted = call.argument.as_str();
    if !["any", "passing", "warning", "critical"].contains(&wanted) {
        let text = format!("Invalid state {wanted:?}: it is one of any, passing, warning, critical");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
    }
    drop(sift::filter::<Check<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Everything).await?;
    let trips = RoundTrips::wanted(&call, &options).await?;
    let local = call.shared.registry.state();
    let mut checks = all_checks(&call.shared, &snapshot, &local, &options, |_| true);
    checks.retain(|check| wanted == "any" || check.status == wanted);
    answer(&call, checks, trips, index)
}

/// Answers with those of `checks` that the query's filter passes, nearest first where distances are given.
fn answer(call: &Call, mut checks: Vec<Check<'_>>, trips: Option<RoundTrips>, index: u64) -> Result<Reply, Refusal> {
    let filter = sift::filter::<Check<'_>>(call)?;
    checks.retain(|check| filter.is_match(check));
    if let Some(trips) = trips {
        trips.order(&mut checks, |check| check.node);
    }
    Reply::at_index(call, &checks, index)
}

/// Returns the checks of the nodes that `wanted` picks: node by node, the node's own first, then by service and id.
fn all_checks<'a>(
    shared: &Shared,
    snapshot: &'a Snapshot,
    local: &'a LocalState,
    options: &ReadOptions,
    wanted: impl Fn(&NodeEntry) -> bool,
) -> Vec<Check<'a>> {
    let mut checks = Vec::new();
    // So that a list of all nodes does not look at each instance for each of them.
    let mut by_node: BTreeMap<(&NodeName, Option<&NodeName>), Vec<&Arc<Instance>>> = BTreeMap::new();
    for instance in snapshot.all_listed().filter(|instance| wanted(&instance.node)) {
        by_node.entry((&instance.node.info.name, instance.node.writer())).or_default().push(instance);
    }
    let shown = snapshot.listed_nodes().filter(|node| catalog::is_shown(node, options) && wanted(node));
    let mut nodes: Vec<&Arc<NodeEntry>> = shown.collect();
    nodes.sort_by(|a, b| a.info.name.cmp(&b.info.name));
    for node in nodes {
        let told = Told::of(shared, node, local);
        checks.extend(node_checks(node, told));
        let here = by_node.get(&(&node.info.name, node.writer())).into_iter().flatten().copied();
        checks.extend(here.flat_map(|instance| instance_checks(instance, told)));
    }
    checks
}

fn node_checks<'a>(node: &'a NodeEntry, told: Told<'a>) -> Vec<Check<'a>> {
    let own = node.checks.iter().map(|check| Check::published(check, node, None, told));
    std::iter::once(Check::serf(node)).chain(own).collect()
}

fn instance_checks<'a>(instance: &'a Instance, told: Told<'a>) -> impl Iterator<Item = Check<'a>> {
    instance.checks.iter().map(move |check| Check::published(check, &instance.node, Some(instance), told))
}

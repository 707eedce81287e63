//! `/v1/catalog/…`: nodes and services of the mesh, read from the snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::index::Topic;
use super::near::RoundTrips;
use super::query::{Query, ReadOptions};
use super::sift::{Listed, OfNode};
use super::{Shared, block, shape, sift};
use crate::catalogue::Snapshot;
use crate::model::{CONNECT_PROXY, Instance, MemberStatus, NodeEntry, NodeName, ServiceRecord, TextMap};
use crate::registry::LocalState;

/// `GET /v1/catalog/datacenters`: the agent's own first, then by name.
pub(super) async fn datacenters(call: Call) -> Result<Reply, Refusal> {
    let snapshot = call.shared.snapshot.load();
    let own = call.shared.node.datacenter.as_str();
    let known = snapshot.nodes.values().filter(|node| node.status != MemberStatus::Left);
    let others: BTreeSet<&str> =
        known.map(|node| node.info.datacenter.as_str()).filter(|datacenter| *datacenter != own).collect();
    let all: Vec<&str> = std::iter::once(own).chain(others).collect();
    Reply::json(&call, &all)
}

/// `GET /v1/catalog/nodes`
pub(super) async fn nodes(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<NodeEntry>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Nodes).await?;
    let trips = RoundTrips::wanted(&call, &options).await?;
    let filter = sift::filter::<NodeEntry>(&call)?;
    let shown = snapshot.listed_nodes().filter(|node| is_shown(node, &options) && filter.is_match(&***node));
    let mut shown: Vec<&Arc<NodeEntry>> = shown.collect();
    shown.sort_by(|a, b| a.info.name.cmp(&b.info.name));
    if let Some(trips) = trips {
        trips.order(&mut shown, |node| node.info.name.as_str());
    }
    let shapes: Vec<Value> = shown.into_iter().map(|node| shape::node(node)).collect();
    Reply::at_index(&call, &shapes, index)
}

/// `GET /v1/catalog/services`: names with the union of their instances' tags.
pub(super) async fn services(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<Listed<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Services).await?;
    let filter = sift::filter::<Listed<'_>>(&call)?;
    let local = call.shared.registry.state();
    let synthetic = sidecars(&call.shared, &snapshot, &local);
    let shown = snapshot.all_listed().chain(&synthetic).filter(|instance| is_shown(&instance.node, &options));
    let mut tags: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for instance in shown.filter(|instance| filter.is_match(&Listed(instance))) {
        let of_service = tags.entry(instance.record.name.as_str()).or_default();
        of_service.extend(instance.record.tags.iter().map(AsRef::as_ref));
    }
    Reply::at_index(&call, &tags, index)
}

/// `GET /v1/catalog/service/:name`
pub(super) async fn service(call: Call) -> Result<Reply, Refusal> {
    list(call, instances).await
}

/// `GET /v1/catalog/connect/:name`: where the mesh reaches the service's instances.
pub(super) async fn connect(call: Call) -> Result<Reply, Refusal> {
    list(call, proxies).await
}

/// Which instances of the service that the path names are listed, in order of (node, id), as the query's tags and options
/// filter them.
pub(super) type Pick = fn(&Call, &Snapshot, &LocalState, &ReadOptions) -> Vec<Arc<Instance>>;

async fn list(call: Call, pick: Pick) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<Listed<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Service(call.argument.clone())).await?;
    let trips = RoundTrips::wanted(&call, &options).await?;
    let filter = sift::filter::<Listed<'_>>(&call)?;
    let local = call.shared.registry.state();
    let mut instances = pick(&call, &snapshot, &local, &options);
    instances.retain(|instance| filter.is_match(&Listed(instance)));
    if let Some(trips) = trips {
        trips.order(&mut instances, |instance| instance.node.info.name.as_str());
    }
    let shape = |instance: &Arc<Instance>| {
        shape::catalog_service(instance, local_of(&call.shared, instance.node.as_ref(), &local))
    };
    Reply::at_index(&call, &instances.iter().map(shape).collect::<Vec<Value>>(), index)
}

/// `GET /v1/catalog/node/:node`: the node with its services by id; `null` if it is unknown.
pub(super) async fn node(call: Call) -> Result<Reply, Refusal> {
    let collect = |services: Vec<(String, Value)>| json!(services.into_iter().collect::<BTreeMap<String, Value>>());
    of_node(call, collect).await
}

/// `GET /v1/catalog/node-services/:node`: the same, with its services in a list.
pub(super) async fn node_services(call: Call) -> Result<Reply, Refusal> {
    of_node(call, |services| services.into_iter().map(|(_, shape)| shape).collect()).await
}

async fn of_node(call: Call, collect: fn(Vec<(String, Value)>) -> Value) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    drop(sift::filter::<OfNode<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Node(call.argument.clone())).await?;
    let filter = sift::filter::<OfNode<'_>>(&call)?;
    // Consul takes the node's UUID as well.
    let by_name = call.argument.parse().ok().and_then(|name: NodeName| snapshot.listed_node(&name));
    let by_id = || snapshot.listed_nodes().find(|node| node.info.id == call.argument && !node.info.id.is_empty());
    let found = by_name.or_else(by_id).filter(|node| is_shown(node, &options));
    let Some(node) = found else { return Reply::at_index(&call, &Value::Null, index) };
    let local = call.shared.registry.state();
    let synthetic = sidecars(&call.shared, &snapshot, &local);
    let is_here = |instance: &&Arc<Instance>| {
        instance.node.info.name == node.info.name && instance.node.writer() == node.writer()
    };
    let here = snapshot.all_listed().chain(&synthetic).filter(is_here);
    let own = local_of(&call.shared, node, &local);
    let mut services: Vec<(String, Value)> = here
        .filter(|instance| filter.is_match(&OfNode(instance)))
        .map(|instance| (instance.record.id.to_string(), shape::node_service(instance, own)))
        .collect();
    services.sort_by(|(a, _), (b, _)| a.cmp(b));
    Reply::at_index(&call, &json!({"Node": shape::node(node), "Services": collect(services)}), index)
}

/// Tells whether the catalogue shows `node` to a reader with `options`: a node that left on purpose is not shown.
pub(super) fn is_shown(node: &NodeEntry, options: &ReadOptions) -> bool {
    node.status != MemberStatus::Left
        && node.info.datacenter == options.datacenter
        && options.node_meta.iter().all(|(key, value)| node.info.meta.get(key) == Some(value))
}

/// Returns the instances of the service that the path names, in order of (node, id), as the query filters them.
pub(super) fn instances(
    call: &Call,
    snapshot: &Snapshot,
    local: &LocalState,
    options: &ReadOptions,
) -> Vec<Arc<Instance>> {
    let name = call.argument.as_str();
    let published = snapshot.listed(name).into_iter();
    let synthetic = sidecars(&call.shared, snapshot, local).into_iter().filter(|i| i.record.name.as_str() == name);
    let shown = published.chain(synthetic).filter(|instance| is_shown(&instance.node, options));
    shown.filter(|instance| has_tags(&instance.record, &call.query)).collect()
}

/// Tells whether `record` has every tag of the query; case is no matter.
pub(super) fn has_tags(record: &ServiceRecord, query: &Query) -> bool {
    let has = |tag: &str| record.tags.iter().any(|own| own.eq_ignore_ascii_case(tag));
    query.all("tag").filter(|tag| !tag.is_empty()).all(has)
}

/// Returns `local` where `node` is this agent's own: only then it tells something about the node's services.
pub(super) fn local_of<'a>(shared: &Shared, node: &NodeEntry, local: &'a LocalState) -> Option<&'a LocalState> {
    (node.info.name == shared.node.name).then_some(local)
}

/// Returns the mesh endpoints of the service that the path names: every agent is its services' proxy.
pub(super) fn proxies(
    call: &Call,
    snapshot: &Snapshot,
    _local: &LocalState,
    options: &ReadOptions,
) -> Vec<Arc<Instance>> {
    let published = snapshot.services.get(call.argument.as_str()).into_iter().flat_map(|service| &service.instances);
    let shown = published.filter(|instance| is_shown(&instance.node, options));
    shown.filter(|instance| has_tags(&instance.record, &call.query)).filter_map(|owner| proxy(owner)).collect()
}

/// Makes the synthetic proxies of this agent's services, where no record of that name is published.
fn sidecars(shared: &Shared, snapshot: &Snapshot, local: &LocalState) -> Vec<Arc<Instance>> {
    let own: &NodeName = &shared.node.name;
    let with_sidecar = local.services.values().filter(|service| service.definition.sidecar);
    let proxies = with_sidecar.filter_map(|service| {
        let record = &service.definition.record;
        if snapshot.services.contains_key(shape::sidecar_id(record.name.as_str()).as_str()) {
            return None;
        }
        let entry = snapshot.services.get(&record.name)?;
        let owner = entry.instances.iter().find(|i| i.record.id == record.id && i.node.info.name == *own)?;
        proxy(owner)
    });
    proxies.collect()
}

/// Makes the synthetic proxy of `owner`: its node's mesh port, as healthy as the owner. None for a name or id that is too
/// long for its suffix.
pub(super) fn proxy(owner: &Instance) -> Option<Arc<Instance>> {
    let proxy = ServiceRecord {
        id: shape::sidecar_id(owner.record.id.as_str()).parse().ok()?,
        name: shape::sidecar_id(owner.record.name.as_str()).parse().ok()?,
        kind: CONNECT_PROXY.into(),
        // The mesh port is where the node is, not where the app is.
        address: Box::default(),
        port: owner.node.info.mesh_addr.port(),
        tagged_addresses: TextMap::default(),
        ..ServiceRecord::clone(&owner.record)
    };
    Some(Arc::new(Instance { record: Arc::new(proxy), ..Instance::clone(owner) }))
}

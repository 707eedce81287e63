//! `/v1/catalog/…`: nodes and services of the mesh, read from the snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::call::{Call, Refusal, Reply};
use super::query::{self, Query, ReadOptions};
use super::{Shared, block, index, shape};
use crate::catalogue::{Instance, NodeEntry, Snapshot};
use crate::model::{MemberStatus, NodeName, ServiceRecord, TextMap};
use crate::registry::LocalState;

/// `GET /v1/catalog/datacenters`: the agent's own first, then by name.
pub(super) async fn datacenters(call: Call) -> Result<Reply, Refusal> {
    query::refuse_tenancy(&call)?;
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
    let (snapshot, index) =
        block::wait(&call, options.blocking, |snapshot| call.shared.indexes.nodes(snapshot)).await?;
    let shown = snapshot.nodes.values().filter(|node| is_shown(node, &options));
    let shapes: Vec<Value> = shown.map(|node| shape::node(node)).collect();
    Reply::at_index(&call, &shapes, index)
}

/// `GET /v1/catalog/services`: names with the union of their instances' tags.
pub(super) async fn services(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let (snapshot, index) = block::wait(&call, options.blocking, index::services).await?;
    let local = call.shared.registry.state();
    let synthetic = sidecars(&call.shared, &snapshot, &local);
    let published = snapshot.services.values().flat_map(|service| service.instances.iter());
    let mut tags: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for instance in published.chain(&synthetic).filter(|instance| is_shown(&instance.node, &options)) {
        let of_service = tags.entry(instance.record.name.as_str()).or_default();
        of_service.extend(instance.record.tags.iter().map(AsRef::as_ref));
    }
    Reply::at_index(&call, &tags, index)
}

/// `GET /v1/catalog/service/:name`
pub(super) async fn service(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let name = call.argument.as_str();
    let (snapshot, index) = block::wait(&call, options.blocking, |snapshot| index::service(snapshot, name)).await?;
    let local = call.shared.registry.state();
    let instances = instances(&call, &snapshot, &local, &options);
    let shape = |instance: &Arc<Instance>| {
        shape::catalog_service(instance, local_of(&call.shared, instance.node.as_ref(), &local))
    };
    Reply::at_index(&call, &instances.iter().map(shape).collect::<Vec<Value>>(), index)
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
    let published = snapshot.services.get(name).into_iter().flat_map(|service| service.instances.iter().cloned());
    let synthetic = sidecars(&call.shared, snapshot, local).into_iter().filter(|i| i.record.name.as_str() == name);
    let shown = published.chain(synthetic).filter(|instance| is_shown(&instance.node, options));
    shown.filter(|instance| has_tags(&instance.record, &call.query)).collect()
}

/// Tells whether `record` has every tag of the query; case is no matter.
fn has_tags(record: &ServiceRecord, query: &Query) -> bool {
    let has = |tag: &str| record.tags.iter().any(|own| own.eq_ignore_ascii_case(tag));
    query.all("tag").filter(|tag| !tag.is_empty()).all(has)
}

/// Returns `local` where `node` is this agent's own: only then it tells something about the node's services.
pub(super) fn local_of<'a>(shared: &Shared, node: &NodeEntry, local: &'a LocalState) -> Option<&'a LocalState> {
    (node.info.name == shared.node.name).then_some(local)
}

/// Makes the synthetic proxies of this agent's services, where no record of that name is published.
fn sidecars(shared: &Shared, snapshot: &Snapshot, local: &LocalState) -> Vec<Arc<Instance>> {
    let own: &NodeName = &shared.node.name;
    let Some(node) = snapshot.nodes.get(own) else { return Vec::new() };
    let with_sidecar = local.services.values().filter(|service| service.definition.sidecar);
    let proxies = with_sidecar.filter_map(|service| {
        let record = &service.definition.record;
        let name = shape::sidecar_id(record.name.as_str());
        if snapshot.services.contains_key(name.as_str()) {
            return None;
        }
        let entry = snapshot.services.get(&record.name)?;
        let owner = entry.instances.iter().find(|i| i.record.id == record.id && i.node.info.name == *own)?;
        // A name or id too long for its suffix has no synthetic entry.
        let proxy = ServiceRecord {
            id: shape::sidecar_id(record.id.as_str()).parse().ok()?,
            name: name.parse().ok()?,
            kind: shape::CONNECT_PROXY.into(),
            port: shared.node.mesh_addr.port(),
            tagged_addresses: TextMap::default(),
            ..record.clone()
        };
        Some(Arc::new(Instance {
            node: Arc::clone(node),
            record: Arc::new(proxy),
            checks: Box::default(),
            status: owner.status,
            create_index: owner.create_index,
            modify_index: owner.modify_index,
        }))
    });
    proxies.collect()
}

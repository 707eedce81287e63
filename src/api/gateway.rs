//! Gateways into the mesh: `/v1/health/ingress`, by which a service is reached from outside, and
//! `/v1/catalog/gateway-services`, which services a gateway leads to.

use std::sync::Arc;

use serde_json::{Value, json};

use super::block;
use super::call::{Call, Refusal, Reply};
use super::catalog::{has_tags, is_shown};
use super::index::Topic;
use super::query::ReadOptions;
use super::shape::put_if;
use crate::catalogue::Snapshot;
use crate::model::{INGRESS_GATEWAY, Instance, ServiceName};
use crate::registry::LocalState;

/// Returns the gateways' instances by which the service that the path names is reached, in order of (node, id).
pub(super) fn instances(
    call: &Call,
    snapshot: &Snapshot,
    _local: &LocalState,
    options: &ReadOptions,
) -> Vec<Arc<Instance>> {
    let found = snapshot.ingress(&call.argument).into_iter().map(|(instance, _port)| instance);
    let shown = found.filter(|instance| is_shown(&instance.node, options) && has_tags(&instance.record, &call.query));
    let mut gateways: Vec<Arc<Instance>> = shown.collect();
    gateways.sort_by(|a, b| (&a.node.info.name, &a.record.id).cmp(&(&b.node.info.name, &b.record.id)));
    // One may lead there by several ports.
    gateways.dedup_by(|a, b| Arc::ptr_eq(a, b));
    gateways
}

/// `GET /v1/catalog/gateway-services/:gateway`
pub(super) async fn services(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Ingress).await?;
    let rows = call.argument.parse().map(|gateway: ServiceName| rows(&snapshot, &gateway)).unwrap_or_default();
    Reply::at_index(&call, &rows, index)
}

/// Shows each port and service of a gateway's entry; what the service `*` stands for at this moment is marked.
fn rows(snapshot: &Snapshot, gateway: &ServiceName) -> Vec<Value> {
    let mut rows = Vec::new();
    for listener in snapshot.traffic.gateway(gateway).iter().flat_map(|entry| &entry.listeners) {
        let row = |service: &ServiceName| {
            json!({
                "Gateway": {"Name": gateway},
                "Service": {"Name": service},
                "GatewayKind": INGRESS_GATEWAY,
                "Port": listener.port,
                "Protocol": listener.protocol.as_str(),
                "CreateIndex": snapshot.traffic_index,
                "ModifyIndex": snapshot.traffic_index,
            })
        };
        for exposed in &listener.services {
            if let Some(service) = &exposed.service {
                let mut named = row(service);
                put_if(&mut named, "Hosts", !exposed.hosts.is_empty(), || json!(exposed.hosts));
                rows.push(named);
                continue;
            }
            let is_meant =
                |service: &&ServiceName| snapshot.is_exposed_unnamed(service) && !listener.names(service.as_str());
            for service in snapshot.services.keys().filter(is_meant) {
                let mut unnamed = row(service);
                put_if(&mut unnamed, "FromWildcard", true, || json!(true));
                rows.push(unnamed);
            }
        }
    }
    rows
}

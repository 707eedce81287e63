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
use super::sift;
use crate::catalogue::Snapshot;
use crate::filter::{self, Fields, Kind};
use crate::model::{INGRESS_GATEWAY, Instance, Protocol, ServiceName};
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
    drop(sift::filter::<Row<'_>>(&call)?);
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Ingress).await?;
    let filter = sift::filter::<Row<'_>>(&call)?;
    let gateway: Option<ServiceName> = call.argument.parse().ok();
    let rows = gateway.iter().flat_map(|gateway| rows(&snapshot, gateway));
    let shapes: Vec<Value> =
        rows.filter(|row| filter.is_match(row)).map(|row| row.shape(snapshot.traffic_index)).collect();
    Reply::at_index(&call, &shapes, index)
}

/// A service that a gateway leads to, by one of its ports.
struct Row<'a> {
    gateway: &'a ServiceName,
    service: &'a ServiceName,
    port: u16,
    protocol: Protocol,
    /// Those that its entry names.
    hosts: &'a [Box<str>],
    /// The service `*` stands for it at this moment.
    is_from_wildcard: bool,
}

impl Row<'_> {
    fn shape(&self, index: u64) -> Value {
        let mut shape = json!({
            "Gateway": {"Name": self.gateway},
            "Service": {"Name": self.service},
            "GatewayKind": INGRESS_GATEWAY,
            "Port": self.port,
            "Protocol": self.protocol.as_str(),
            "CreateIndex": index,
            "ModifyIndex": index,
        });
        put_if(&mut shape, "Hosts", !self.hosts.is_empty(), || json!(self.hosts));
        put_if(&mut shape, "FromWildcard", self.is_from_wildcard, || json!(true));
        shape
    }
}

impl Fields for Row<'_> {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("FromWildcard", Kind::Flag),
        ("Gateway.Name", Kind::Text),
        ("GatewayKind", Kind::Text),
        ("Hosts", Kind::Texts),
        ("Port", Kind::Number),
        ("Protocol", Kind::Text),
        ("Service.Name", Kind::Text),
    ];

    fn value(&self, name: &str) -> filter::Value<'_> {
        match name {
            "FromWildcard" => filter::Value::Flag(self.is_from_wildcard),
            "Gateway.Name" => filter::Value::text(self.gateway.as_str()),
            "GatewayKind" => filter::Value::text(INGRESS_GATEWAY),
            "Hosts" => filter::Value::Texts(self.hosts),
            "Port" => filter::Value::Number(self.port.into()),
            "Protocol" => filter::Value::text(self.protocol.as_str()),
            "Service.Name" => filter::Value::text(self.service.as_str()),
            _ => filter::Value::Absent,
        }
    }
}

/// Returns each port and service of a gateway's entry, in its order; for `*` what it stands for at this moment.
fn rows<'a>(snapshot: &'a Snapshot, gateway: &'a ServiceName) -> Vec<Row<'a>> {
    let mut rows = Vec::new();
    for listener in snapshot.traffic.gateway(gateway).iter().flat_map(|entry| &entry.listeners) {
        let row = |service: &'a ServiceName, hosts: &'a [Box<str>], is_from_wildcard| {
            let (port, protocol) = (listener.port, listener.protocol);
            Row { gateway, service, port, protocol, hosts, is_from_wildcard }
        };
        for exposed in &listener.services {
            if let Some(service) = &exposed.service {
                rows.push(row(service, &exposed.hosts, false));
                continue;
            }
            let is_meant =
                |service: &&ServiceName| snapshot.is_exposed_unnamed(service) && !listener.names(service.as_str());
            rows.extend(snapshot.services.keys().filter(is_meant).map(|service| row(service, &[], true)));
        }
    }
    rows
}

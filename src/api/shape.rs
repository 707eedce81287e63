//! Consul's JSON shapes.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::Shared;
use super::definition::of as definition_of;
use crate::model::{
    CONNECT_PROXY, CheckId, CheckRecord, HealthStatus, Instance, MemberStatus, NodeEntry, SIDECAR_SUFFIX,
    ServiceRecord, Weights,
};
use crate::registry::{ExternalNode, LocalCheck, LocalState, ServiceDefinition};

/// The check that every node has: what the membership says of it.
const SERF_HEALTH: &str = "serfHealth";

/// The id, and the service name, of the synthetic proxy of the service `id`.
pub(super) fn sidecar_id(id: &str) -> String {
    format!("{id}{SIDECAR_SUFFIX}")
}

fn weights(weights: Weights) -> Value {
    json!({"Passing": weights.passing, "Warning": weights.warning})
}

fn tagged_addresses(record: &ServiceRecord) -> Value {
    let pairs = record.tagged_addresses.iter();
    pairs.map(|(tag, (address, port))| (tag.to_owned(), json!({"Address": address, "Port": port}))).collect()
}

/// The `Proxy` part of `record`: whole for a synthetic proxy of this agent, whose registrations are `local`; of another
/// node's it is known what it stands before.
fn proxy(record: &ServiceRecord, local: Option<&LocalState>) -> Value {
    if *record.kind != *CONNECT_PROXY {
        return json!({"Mode": "", "MeshGateway": {}, "Expose": {}});
    }
    let mut services = local.into_iter().flat_map(|local| local.services.values());
    let owner = services.find(|service| sidecar_id(service.definition.record.id.as_str()) == record.id.as_str());
    let before = |text: &str| text.strip_suffix(SIDECAR_SUFFIX).unwrap_or(text).to_owned();
    owner.map_or_else(
        || {
            json!({
                "DestinationServiceName": before(record.name.as_str()),
                "DestinationServiceID": before(record.id.as_str()),
                "Mode": "",
                "MeshGateway": {},
                "Expose": {},
            })
        },
        |service| proxy_of(&service.definition),
    )
}

/// The `TaggedAddresses` of a node: its address, or what was written of a node without an agent.
fn node_addresses<'a>(node: &'a NodeEntry, address: &'a str) -> BTreeMap<&'a str, &'a str> {
    let mut addresses = BTreeMap::from(["lan", "wan"].map(|tag| (tag, address)));
    if let Some(outside) = &node.external {
        addresses.extend(outside.tagged_addresses.iter().map(|(tag, address)| (tag, &**address)));
    }
    addresses
}

/// A node, as health endpoints nest it and `catalog/nodes` lists it.
pub(super) fn node(node: &NodeEntry) -> Value {
    let address = node.address();
    json!({
        "ID": node.info.id,
        "Node": node.info.name,
        "Address": address,
        "Datacenter": node.info.datacenter,
        "TaggedAddresses": node_addresses(node, &address),
        "Meta": node.info.meta,
        "CreateIndex": node.create_index,
        "ModifyIndex": node.modify_index,
    })
}

/// An instance, as health endpoints nest it.
pub(super) fn health_service(instance: &Instance, local: Option<&LocalState>) -> Value {
    let record = &instance.record;
    let mut shape = json!({
        "ID": record.id,
        "Service": record.name,
        "Tags": record.tags,
        "Address": record.address,
        "Meta": record.meta,
        "Port": record.port,
        "Weights": weights(record.weights),
        "EnableTagOverride": record.enable_tag_override,
        "Proxy": proxy(record, local),
        "Connect": {},
        "CreateIndex": instance.create_index,
        "ModifyIndex": instance.modify_index,
    });
    put_if(&mut shape, "Kind", !record.kind.is_empty(), || json!(record.kind));
    put_if(&mut shape, "TaggedAddresses", !record.tagged_addresses.is_empty(), || tagged_addresses(record));
    shape
}

/// An instance, as `catalog/service` lists it.
pub(super) fn catalog_service(instance: &Instance, local: Option<&LocalState>) -> Value {
    let (record, node) = (&instance.record, &instance.node);
    let address = node.address();
    json!({
        "ID": node.info.id,
        "Node": node.info.name,
        "Address": address,
        "Datacenter": node.info.datacenter,
        "TaggedAddresses": node_addresses(node, &address),
        "NodeMeta": node.info.meta,
        "ServiceKind": record.kind,
        "ServiceID": record.id,
        "ServiceName": record.name,
        "ServiceTags": record.tags,
        "ServiceAddress": record.address,
        "ServiceTaggedAddresses": tagged_addresses(record),
        "ServiceWeights": weights(record.weights),
        "ServiceMeta": record.meta,
        "ServicePort": record.port,
        "ServiceSocketPath": "",
        "ServiceEnableTagOverride": record.enable_tag_override,
        "ServiceProxy": proxy(record, local),
        "ServiceConnect": {},
        "CreateIndex": instance.create_index,
        "ModifyIndex": instance.modify_index,
    })
}

/// An instance among its node's services, as `catalog/node` lists it.
pub(super) fn node_service(instance: &Instance, local: Option<&LocalState>) -> Value {
    let mut shape = health_service(instance, local);
    put_if(&mut shape, "Kind", true, || json!(instance.record.kind));
    put_if(&mut shape, "TaggedAddresses", true, || tagged_addresses(&instance.record));
    shape
}

/// A service of this agent, as `agent/services` lists it: empty parts are left out.
pub(super) fn agent_service(definition: &ServiceDefinition, datacenter: &str) -> Value {
    let record = &definition.record;
    let mut shape = json!({
        "ID": record.id,
        "Service": record.name,
        "Tags": record.tags,
        "Meta": record.meta,
        "Port": record.port,
        "Address": record.address,
        "Weights": weights(record.weights),
        "EnableTagOverride": record.enable_tag_override,
        "Datacenter": datacenter,
    });
    put_if(&mut shape, "Kind", !record.kind.is_empty(), || json!(record.kind));
    put_if(&mut shape, "SocketPath", !definition.socket_path.is_empty(), || json!(definition.socket_path));
    put_if(&mut shape, "TaggedAddresses", !record.tagged_addresses.is_empty(), || tagged_addresses(record));
    put_if(&mut shape, "Connect", definition.native, || json!({"Native": true}));
    shape
}

/// The synthetic proxy of `definition`: the agent itself, at its mesh port.
pub(super) fn agent_sidecar(definition: &ServiceDefinition, datacenter: &str, mesh_port: u16) -> Value {
    let record = &definition.record;
    json!({
        "Kind": CONNECT_PROXY,
        "ID": sidecar_id(record.id.as_str()),
        "Service": sidecar_id(record.name.as_str()),
        "Tags": record.tags,
        "Meta": record.meta,
        "Port": mesh_port,
        "Address": record.address,
        "Weights": weights(record.weights),
        "EnableTagOverride": record.enable_tag_override,
        "Datacenter": datacenter,
        "Proxy": proxy_of(definition),
    })
}

/// The `Proxy` part of the synthetic proxy of `definition`.
fn proxy_of(definition: &ServiceDefinition) -> Value {
    let upstreams = definition.upstreams.iter().map(|upstream| {
        let config = upstream.protocol.map_or_else(|| json!({}), |protocol| json!({"protocol": protocol.as_str()}));
        json!({
            "DestinationType": "service",
            "DestinationName": upstream.destination,
            "Datacenter": "",
            "LocalBindAddress": upstream.bind.ip().to_string(),
            "LocalBindPort": upstream.bind.port(),
            "Config": config,
            "MeshGateway": {},
        })
    });
    json!({
        "DestinationServiceName": definition.record.name,
        "DestinationServiceID": definition.record.id,
        "LocalServiceAddress": definition.app_addr.ip().to_string(),
        "LocalServicePort": definition.app_addr.port(),
        "Mode": "",
        "Upstreams": upstreams.collect::<Vec<_>>(),
        "MeshGateway": {},
        "Expose": {},
    })
}

/// What this agent knows of a node's checks beside what all know.
#[derive(Debug, Clone, Copy)]
pub(super) enum Told<'a> {
    Nothing,
    /// It is this agent's own node.
    Own(&'a LocalState),
    /// It was written here, and no agent runs on it.
    Written(&'a ExternalNode),
}

impl<'a> Told<'a> {
    pub(super) fn of(shared: &Shared, node: &NodeEntry, local: &'a LocalState) -> Self {
        match node.writer() {
            None if node.info.name == shared.node.name => Self::Own(local),
            Some(writer) if *writer == shared.node.name => {
                local.externals.get(&node.info.name).map_or(Self::Nothing, |node| Self::Written(node))
            }
            _ => Self::Nothing,
        }
    }

    fn output(self, id: &CheckId) -> &'a str {
        let output = match self {
            Self::Nothing => None,
            Self::Own(local) => local.checks.get(id).map(|check| check.output.as_str()),
            Self::Written(node) => node.notes.get(id).map(|notes| notes.output.as_str()),
        };
        output.unwrap_or_default()
    }

    /// What the writer of a check says that it does; the agent's own checks show theirs in `agent/checks`.
    fn definition(self, id: &CheckId) -> BTreeMap<String, Value> {
        let Self::Written(node) = self else { return BTreeMap::new() };
        let kept = node.notes.get(id).map(|notes| notes.definition.as_str()).unwrap_or_default();
        serde_json::from_str(kept).unwrap_or_default()
    }
}

/// A check, in the one shape that agent and health endpoints share.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Check<'a> {
    pub(super) node: &'a str,
    #[serde(rename = "CheckID")]
    pub(super) id: &'a str,
    pub(super) name: &'a str,
    pub(super) status: &'static str,
    pub(super) notes: &'a str,
    pub(super) output: &'a str,
    #[serde(rename = "ServiceID")]
    pub(super) service_id: &'a str,
    pub(super) service_name: &'a str,
    pub(super) service_tags: &'a [Box<str>],
    pub(super) r#type: &'a str,
    exposed_port: u16,
    definition: BTreeMap<String, Value>,
    create_index: u64,
    modify_index: u64,
}

impl<'a> Check<'a> {
    /// What the membership says of `node`.
    pub(super) fn serf(node: &'a NodeEntry) -> Self {
        let (status, output) = match (node.status, &node.external) {
            (MemberStatus::Alive, None) => (HealthStatus::Passing, "Agent alive and reachable"),
            (MemberStatus::Alive, Some(_)) => {
                (HealthStatus::Passing, "No agent runs here; the agent where it was registered is alive")
            }
            (MemberStatus::Leaving | MemberStatus::Left, _) => (HealthStatus::Critical, "Agent has left or is leaving"),
            (MemberStatus::Failed, None) => (HealthStatus::Critical, "Agent not live or unreachable"),
            (MemberStatus::Failed, Some(_)) => (
                HealthStatus::Critical,
                "No agent runs here; the agent where it was registered is not live or unreachable",
            ),
        };
        Self {
            node: node.info.name.as_str(),
            id: SERF_HEALTH,
            name: "Serf Health Status",
            status: status.as_str(),
            notes: "",
            output,
            service_id: "",
            service_name: "",
            service_tags: &[],
            r#type: "",
            exposed_port: 0,
            definition: BTreeMap::new(),
            create_index: node.create_index,
            modify_index: node.modify_index,
        }
    }

    /// A check of the catalogue: of `instance`, or of `node` as a whole.
    pub(super) fn published(
        check: &'a CheckRecord,
        node: &'a NodeEntry,
        instance: Option<&'a Instance>,
        told: Told<'a>,
    ) -> Self {
        let indexes = instance.map_or((node.create_index, node.modify_index), |i| (i.create_index, i.modify_index));
        Self {
            node: node.info.name.as_str(),
            id: check.id.as_str(),
            name: &check.name,
            status: check.status.as_str(),
            notes: &check.notes,
            output: told.output(&check.id),
            service_id: instance.map_or("", |instance| instance.record.id.as_str()),
            service_name: instance.map_or("", |instance| instance.record.name.as_str()),
            service_tags: instance.map_or(&[], |instance| &instance.record.tags),
            r#type: &check.kind,
            exposed_port: 0,
            definition: told.definition(&check.id),
            create_index: indexes.0,
            modify_index: indexes.1,
        }
    }

    /// A check of this agent.
    pub(super) fn local(check: &'a LocalCheck, node: &'a str) -> Self {
        let definition = &check.definition;
        Self {
            node,
            id: definition.id.as_str(),
            name: &definition.name,
            status: check.status.as_str(),
            notes: &definition.notes,
            output: &check.output,
            service_id: definition.service.as_ref().map_or("", |id| id.as_str()),
            service_name: &check.service_name,
            service_tags: &check.service_tags,
            r#type: definition.probe.kind(),
            exposed_port: 0,
            definition: definition_of(definition),
            create_index: 0,
            modify_index: 0,
        }
    }
}

/// Adds `key` to the object `shape` where `wanted`.
pub(super) fn put_if(shape: &mut Value, key: &str, wanted: bool, value: impl FnOnce() -> Value) {
    if let (true, Some(object)) = (wanted, shape.as_object_mut()) {
        object.insert(key.to_owned(), value());
    }
}

//! `?filter=`: what clients may ask of each kind of record.
//!
//! A filter is parsed before a query waits, so that a bad one is refused at once, and again after it: regular expressions are
//! large, and thousands of queries wait at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::call::{Call, Refusal};
use super::shape::{self, Check};
use crate::authz::{Intention, Rule};
use crate::filter::{Fields, Filter, Kind, Value};
use crate::model::{CONNECT_PROXY, Instance, NodeEntry};
use crate::registry::ServiceDefinition;

/// Parses the query's filter for records of the type `T`; without one everything passes.
///
/// # Errors
/// 400 naming what is wrong and what exists.
pub(super) fn filter<T: Fields>(call: &Call) -> Result<Filter, Refusal> {
    let text = call.query.first("filter").unwrap_or_default();
    Filter::parse::<T>(text).map_err(|error| Refusal::bad(format!("Invalid filter: {error}")))
}

impl Fields for NodeEntry {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Address", Kind::Text),
        ("Datacenter", Kind::Text),
        ("ID", Kind::Text),
        ("Meta", Kind::Pairs),
        ("Node", Kind::Text),
        ("TaggedAddresses", Kind::Pairs),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            "Address" => Value::Text(self.address()),
            "Datacenter" => Value::text(&self.info.datacenter),
            "ID" => Value::text(&self.info.id),
            "Meta" => Value::Pairs(&self.info.meta),
            "Node" => Value::text(self.info.name.as_str()),
            "TaggedAddresses" => Value::Pairs(self),
            _ => Value::Absent,
        }
    }
}

/// An instance as `catalog/service` lists it.
pub(super) struct Listed<'a>(pub(super) &'a Instance);

impl Fields for Listed<'_> {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Address", Kind::Text),
        ("Datacenter", Kind::Text),
        ("ID", Kind::Text),
        ("Node", Kind::Text),
        ("NodeMeta", Kind::Pairs),
        ("ServiceAddress", Kind::Text),
        ("ServiceEnableTagOverride", Kind::Flag),
        ("ServiceID", Kind::Text),
        ("ServiceKind", Kind::Text),
        ("ServiceMeta", Kind::Pairs),
        ("ServiceName", Kind::Text),
        ("ServicePort", Kind::Number),
        ("ServiceProxy.DestinationServiceID", Kind::Text),
        ("ServiceProxy.DestinationServiceName", Kind::Text),
        ("ServiceTaggedAddresses", Kind::Addresses),
        ("ServiceTags", Kind::Texts),
        ("ServiceWeights.Passing", Kind::Number),
        ("ServiceWeights.Warning", Kind::Number),
        ("TaggedAddresses", Kind::Pairs),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            "Address" | "Datacenter" | "ID" | "Node" | "TaggedAddresses" => self.0.node.value(name),
            "NodeMeta" => Value::Pairs(&self.0.node.info.meta),
            "ServiceName" => self.0.value("Service.Service"),
            _ => match name.split_at_checked("Service".len()) {
                Some(("Service", rest)) => self.0.value(&format!("Service.{rest}")),
                _ => Value::Absent,
            },
        }
    }
}

/// An instance among its node's services.
pub(super) struct OfNode<'a>(pub(super) &'a Instance);

/// The fields of a service where nothing but services stands.
const SERVICE_FIELDS: &[(&str, Kind)] = &[
    ("Address", Kind::Text),
    ("Connect.Native", Kind::Flag),
    ("EnableTagOverride", Kind::Flag),
    ("ID", Kind::Text),
    ("Kind", Kind::Text),
    ("Meta", Kind::Pairs),
    ("Port", Kind::Number),
    ("Proxy.DestinationServiceID", Kind::Text),
    ("Proxy.DestinationServiceName", Kind::Text),
    ("Service", Kind::Text),
    ("TaggedAddresses", Kind::Addresses),
    ("Tags", Kind::Texts),
    ("Weights.Passing", Kind::Number),
    ("Weights.Warning", Kind::Number),
];

impl Fields for OfNode<'_> {
    const FIELDS: &'static [(&'static str, Kind)] = SERVICE_FIELDS;

    fn value(&self, name: &str) -> Value<'_> {
        self.0.value(&format!("Service.{name}"))
    }
}

/// A service of this agent, or its synthetic proxy.
pub(super) struct Own<'a> {
    pub(super) definition: &'a ServiceDefinition,
    /// The port of the mesh, for the proxy; none for the service itself.
    pub(super) mesh_port: Option<u16>,
}

impl Fields for Own<'_> {
    const FIELDS: &'static [(&'static str, Kind)] = SERVICE_FIELDS;

    fn value(&self, name: &str) -> Value<'_> {
        let record = &self.definition.record;
        match (name, self.mesh_port) {
            ("ID", Some(_)) => Value::Text(Cow::Owned(shape::sidecar_id(record.id.as_str()))),
            ("Service", Some(_)) => Value::Text(Cow::Owned(shape::sidecar_id(record.name.as_str()))),
            ("Kind", Some(_)) => Value::text(CONNECT_PROXY),
            ("Port", Some(port)) => Value::Number(u64::from(port)),
            ("ID", None) | ("Proxy.DestinationServiceID", Some(_)) => Value::text(record.id.as_str()),
            ("Service", None) | ("Proxy.DestinationServiceName", Some(_)) => Value::text(record.name.as_str()),
            ("Kind", None) => Value::text(&record.kind),
            ("Port", None) => Value::Number(u64::from(record.port)),
            ("Connect.Native", proxy) => Value::Flag(self.definition.native && proxy.is_none()),
            ("Proxy.DestinationServiceID" | "Proxy.DestinationServiceName", None) => Value::text(""),
            ("TaggedAddresses", None) => Value::Addresses(&record.tagged_addresses),
            ("Address", _) => Value::text(&record.address),
            ("EnableTagOverride", _) => Value::Flag(record.enable_tag_override),
            ("Meta", _) => Value::Pairs(&record.meta),
            ("Tags", _) => Value::Texts(&record.tags),
            ("Weights.Passing", _) => Value::Number(u64::from(record.weights.passing)),
            ("Weights.Warning", _) => Value::Number(u64::from(record.weights.warning)),
            _ => Value::Absent,
        }
    }
}

impl Fields for Check<'_> {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("CheckID", Kind::Text),
        ("Name", Kind::Text),
        ("Node", Kind::Text),
        ("Notes", Kind::Text),
        ("Output", Kind::Text),
        ("ServiceID", Kind::Text),
        ("ServiceName", Kind::Text),
        ("ServiceTags", Kind::Texts),
        ("Status", Kind::Text),
        ("Type", Kind::Text),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            "CheckID" => Value::text(self.id),
            "Name" => Value::text(self.name),
            "Node" => Value::text(self.node),
            "Notes" => Value::text(self.notes),
            "Output" => Value::text(self.output),
            "ServiceID" => Value::text(self.service_id),
            "ServiceName" => Value::text(self.service_name),
            "ServiceTags" => Value::Texts(self.service_tags),
            "Status" => Value::text(self.status),
            "Type" => Value::text(self.r#type),
            _ => Value::Absent,
        }
    }
}

/// A member, as `agent/members` lists it.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) addr: String,
    pub(super) port: u16,
    pub(super) status: u8,
    pub(super) tags: BTreeMap<String, String>,
}

impl Fields for Member {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Addr", Kind::Text),
        ("Name", Kind::Text),
        ("Port", Kind::Number),
        ("Status", Kind::Number),
        ("Tags", Kind::Pairs),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            "Addr" => Value::text(&self.addr),
            "Name" => Value::text(&self.name),
            "Port" => Value::Number(u64::from(self.port)),
            "Status" => Value::Number(u64::from(self.status)),
            "Tags" => Value::Pairs(&self.tags),
            _ => Value::Absent,
        }
    }
}

impl Fields for Intention {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Action", Kind::Text),
        ("Description", Kind::Text),
        ("DestinationNS", Kind::Text),
        ("DestinationName", Kind::Text),
        ("ID", Kind::Text),
        ("Meta", Kind::Pairs),
        ("Precedence", Kind::Number),
        ("SourceNS", Kind::Text),
        ("SourceName", Kind::Text),
        ("SourceType", Kind::Text),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            // One with permissions has none: the text is empty, as Consul's is.
            "Action" => Value::text(match &self.rule {
                Rule::Action(action) => action.as_str(),
                Rule::Permissions(_) => "",
            }),
            "Description" => Value::text(&self.description),
            "DestinationNS" | "SourceNS" => Value::text("default"),
            "DestinationName" => Value::text(self.destination.as_str()),
            "ID" => Value::Text(Cow::Owned(self.id().to_string())),
            "Meta" => Value::Pairs(&self.meta),
            "Precedence" => Value::Number(u64::from(self.precedence())),
            "SourceName" => Value::text(self.source.as_str()),
            "SourceType" => Value::text("consul"),
            _ => Value::Absent,
        }
    }
}

/// A config entry in a list: what entries of every kind have, and the protocol of those that say one.
pub(super) struct Listing<'a> {
    kind: &'a str,
    name: &'a str,
    protocol: &'a str,
    meta: BTreeMap<String, String>,
}

impl<'a> Listing<'a> {
    /// Reads them from the entry's shape; its own keys may be in any case.
    pub(super) fn of(entry: &'a Json) -> Self {
        let field = |wanted: &str| {
            let mut fields = entry.as_object().into_iter().flatten();
            fields.find(|(key, _)| key.eq_ignore_ascii_case(wanted)).map(|(_, value)| value)
        };
        let text = |name| field(name).and_then(Json::as_str).unwrap_or_default();
        let pairs = field("Meta").and_then(Json::as_object).into_iter().flatten();
        let meta = pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect();
        Self { kind: text("Kind"), name: text("Name"), protocol: text("Protocol"), meta }
    }
}

impl Fields for Listing<'_> {
    const FIELDS: &'static [(&'static str, Kind)] =
        &[("Kind", Kind::Text), ("Meta", Kind::Pairs), ("Name", Kind::Text), ("Protocol", Kind::Text)];

    fn value(&self, name: &str) -> Value<'_> {
        match name {
            "Kind" => Value::text(self.kind),
            "Meta" => Value::Pairs(&self.meta),
            "Name" => Value::text(self.name),
            "Protocol" => Value::text(self.protocol),
            _ => Value::Absent,
        }
    }
}

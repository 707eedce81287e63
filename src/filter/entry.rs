//! An instance as health endpoints and a resolver's subsets see it: `Node.…`, `Service.…`, `Checks`.

use std::borrow::Cow;

use super::{Fields, Kind, Pairs, Value};
use crate::model::{CONNECT_PROXY, Instance, NodeEntry, SIDECAR_SUFFIX, ServiceRecord};

impl Fields for Instance {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Checks", Kind::List),
        ("Node.Address", Kind::Text),
        ("Node.Datacenter", Kind::Text),
        ("Node.ID", Kind::Text),
        ("Node.Meta", Kind::Pairs),
        ("Node.Node", Kind::Text),
        ("Node.TaggedAddresses", Kind::Pairs),
        ("Service.Address", Kind::Text),
        ("Service.Connect.Native", Kind::Flag),
        ("Service.EnableTagOverride", Kind::Flag),
        ("Service.ID", Kind::Text),
        ("Service.Kind", Kind::Text),
        ("Service.Meta", Kind::Pairs),
        ("Service.Port", Kind::Number),
        ("Service.Proxy.DestinationServiceID", Kind::Text),
        ("Service.Proxy.DestinationServiceName", Kind::Text),
        ("Service.Service", Kind::Text),
        ("Service.TaggedAddresses", Kind::Addresses),
        ("Service.Tags", Kind::Texts),
        ("Service.Weights.Passing", Kind::Number),
        ("Service.Weights.Warning", Kind::Number),
    ];

    fn value(&self, name: &str) -> Value<'_> {
        let (info, record) = (&self.node.info, &self.record);
        match name {
            // The node's own, and what the membership says of it.
            "Checks" => Value::List(self.checks.len() + self.node.checks.len() + 1),
            "Node.Address" => Value::Text(self.node.address()),
            "Node.Datacenter" => Value::text(&info.datacenter),
            "Node.ID" => Value::text(&info.id),
            "Node.Meta" => Value::Pairs(&info.meta),
            "Node.Node" => Value::text(info.name.as_str()),
            "Node.TaggedAddresses" => Value::Pairs(&*self.node),
            "Service.Address" => Value::text(&record.address),
            // Its own agent alone knows whether a service is native; lists of the catalogue show of none that it is.
            "Service.Connect.Native" => Value::Flag(false),
            "Service.EnableTagOverride" => Value::Flag(record.enable_tag_override),
            "Service.ID" => Value::text(record.id.as_str()),
            "Service.Kind" => Value::text(&record.kind),
            "Service.Meta" => Value::Pairs(&record.meta),
            "Service.Port" => Value::Number(u64::from(record.port)),
            "Service.Proxy.DestinationServiceID" => Value::text(behind(record, record.id.as_str())),
            "Service.Proxy.DestinationServiceName" => Value::text(behind(record, record.name.as_str())),
            "Service.Service" => Value::text(record.name.as_str()),
            "Service.TaggedAddresses" => Value::Addresses(&record.tagged_addresses),
            "Service.Tags" => Value::Texts(&record.tags),
            "Service.Weights.Passing" => Value::Number(u64::from(record.weights.passing)),
            "Service.Weights.Warning" => Value::Number(u64::from(record.weights.warning)),
            _ => Value::Absent,
        }
    }
}

/// Returns the part of `own`, an id or a name of `record`, that is of the service behind a synthetic sidecar; empty of all else.
fn behind<'a>(record: &ServiceRecord, own: &'a str) -> &'a str {
    if *record.kind == *CONNECT_PROXY { own.strip_suffix(SIDECAR_SUFFIX).unwrap_or(own) } else { "" }
}

/// A node's tagged addresses, as lists show them: `lan` and `wan` are its address unless others were written.
impl Pairs for NodeEntry {
    fn text(&self, key: &str) -> Option<Cow<'_, str>> {
        let written = self.external.as_ref().and_then(|outside| outside.tagged_addresses.get(key));
        match (written, key) {
            (Some(address), _) => Some(Cow::Borrowed(address)),
            (None, "lan" | "wan") => Some(self.address()),
            (None, _) => None,
        }
    }

    fn has_none(&self) -> bool {
        false
    }
}

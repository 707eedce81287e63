//! An instance as health endpoints and a resolver's subsets see it: `Node.…`, `Service.…`, `Checks`.

use super::{Fields, Kind, Value};
use crate::model::Instance;

impl Fields for Instance {
    const FIELDS: &'static [(&'static str, Kind)] = &[
        ("Checks", Kind::List),
        ("Node.Address", Kind::Text),
        ("Node.Datacenter", Kind::Text),
        ("Node.ID", Kind::Text),
        ("Node.Meta", Kind::Pairs),
        ("Node.Node", Kind::Text),
        ("Service.Address", Kind::Text),
        ("Service.EnableTagOverride", Kind::Flag),
        ("Service.ID", Kind::Text),
        ("Service.Kind", Kind::Text),
        ("Service.Meta", Kind::Pairs),
        ("Service.Port", Kind::Number),
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
            "Service.Address" => Value::text(&record.address),
            "Service.EnableTagOverride" => Value::Flag(record.enable_tag_override),
            "Service.ID" => Value::text(record.id.as_str()),
            "Service.Kind" => Value::text(&record.kind),
            "Service.Meta" => Value::Pairs(&record.meta),
            "Service.Port" => Value::Number(u64::from(record.port)),
            "Service.Service" => Value::text(record.name.as_str()),
            "Service.TaggedAddresses" => Value::Addresses(&record.tagged_addresses),
            "Service.Tags" => Value::Texts(&record.tags),
            "Service.Weights.Passing" => Value::Number(u64::from(record.weights.passing)),
            "Service.Weights.Warning" => Value::Number(u64::from(record.weights.warning)),
            _ => Value::Absent,
        }
    }
}

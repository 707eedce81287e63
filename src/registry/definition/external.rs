//! Nodes without an agent from Consul's JSON: the bodies of `/v1/catalog/register` and `/v1/catalog/deregister`.
//!
//! What Consul fills in by itself (indexes, a check's `ServiceName` and `ServiceTags`) may come back with a body that was read
//! from an answer; it says nothing.

use std::net::IpAddr;

use serde_json::Value;

use super::check::refuse_tenancy;
use super::fields::{Field, Fields};
use super::service::{invalid, meta_is_bounded, tagged_addresses, weights};
use super::{DefinitionError, OUTPUT_BYTES_MAX};
use crate::model::record::is_dialable;
use crate::model::{CheckId, CheckRecord, HealthStatus, InstanceId, NameError, NodeName, Protocol, ServiceRecord};
use crate::registry::{CheckNotes, ExternalFacts, ExternalPart, ExternalWrite};

/// Longest host name, in bytes (RFC 1035 §2.3.4, without the dot at its end).
const HOST_BYTES_MAX: usize = 253;
/// Longest `Definition` of a check, in bytes of JSON.
const DEFINITION_BYTES_MAX: usize = 4096;
/// The check that every node has: it tells of the agent where the node was written.
const SERF_HEALTH: &str = "serfHealth";

/// A body that was read, and the datacenter that it names; empty: none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InDatacenter<T> {
    /// What it says.
    pub body: T,
    /// Where.
    pub datacenter: String,
}

/// Decodes the body of a catalogue registration.
///
/// # Errors
/// [`DefinitionError`]; its text is the answer's body.
pub fn external_from_json(value: &Value) -> Result<InDatacenter<ExternalWrite>, DefinitionError> {
    let mut fields = Fields::of(&Field { path: String::new(), value })?;
    let node = node(&mut fields)?;
    let datacenter = fields.text(&["datacenter"])?;
    let address = fields.text(&["address"])?;
    let id = fields.text(&["id"])?;
    let tagged_addresses = fields.pairs(&["taggedaddresses"])?;
    let meta = fields.pairs(&["nodemeta"])?;
    let keeps_facts = fields.flag(&["skipnodeupdate"])?;
    fields.refuse(&["locality"], "a locality")?;
    let service = fields.take(&["service"])?.filter(|field| !field.is_empty());
    let service = service.map(|field| service_of(&field)).transpose()?;
    let mut given: Vec<Field<'_>> = fields.take(&["check"])?.into_iter().collect();
    if let Some(field) = fields.take(&["checks"])? {
        given.extend(field.elements()?);
    }
    let checks = given.iter().filter(|field| !field.is_empty()).map(|field| check_of(field, &node));
    let checks = checks.collect::<Result<Vec<_>, _>>()?;
    end(fields)?;

    let facts = if keeps_facts {
        None
    } else {
        address_is_right(&address)?;
        if !id.is_empty() && uuid::Uuid::parse_str(&id).is_err() {
            return Err(DefinitionError::Invalid { path: "ID".into(), problem: format!("{id:?} is no UUID") });
        }
        for (tag, address) in &tagged_addresses {
            let of_tag = |_| wrong_address(&format!("TaggedAddresses.{tag}"), address);
            address_is_right(address).map_err(of_tag)?;
        }
        meta_is_bounded(&meta)?;
        Some(ExternalFacts { id, address, tagged_addresses, meta })
    };
    for (at, (check, _)) in checks.iter().enumerate() {
        if checks.iter().take(at).any(|(other, _)| other.id == check.id) {
            return Err(DefinitionError::Check(format!("two checks have the id {:?}", check.id.as_str())));
        }
    }
    Ok(InDatacenter { body: ExternalWrite { node, facts, service, checks }, datacenter })
}

/// Decodes the body of a catalogue deregistration: a service goes before a check, and without either all goes.
///
/// # Errors
/// [`DefinitionError`]; its text is the answer's body.
pub fn removal_from_json(value: &Value) -> Result<InDatacenter<(NodeName, ExternalPart)>, DefinitionError> {
    let mut fields = Fields::of(&Field { path: String::new(), value })?;
    let node = node(&mut fields)?;
    let datacenter = fields.text(&["datacenter"])?;
    // Consul takes it and looks at the name alone.
    let _address = fields.text(&["address"])?;
    let (service, check) = (fields.text(&["serviceid"])?, fields.text(&["checkid"])?);
    end(fields)?;
    let part = match (service.as_str(), check.as_str()) {
        ("", "") => ExternalPart::Node,
        ("", id) => ExternalPart::Check(id.parse().map_err(|error| invalid("check ID", &error))?),
        (id, _) => ExternalPart::Service(id.parse().map_err(|error| invalid("service ID", &error))?),
    };
    Ok(InDatacenter { body: (node, part), datacenter })
}

fn node(fields: &mut Fields<'_>) -> Result<NodeName, DefinitionError> {
    let text = fields.text(&["node"])?;
    if text.is_empty() {
        let problem = "the node has no name: give Node".to_owned();
        return Err(DefinitionError::Invalid { path: "Node".into(), problem });
    }
    text.parse().map_err(|error| invalid("Node", &error))
}

/// Ends a body: what older clients put beside it is the header's business.
fn end(mut fields: Fields<'_>) -> Result<(), DefinitionError> {
    let _token = fields.take(&["writerequest"])?;
    refuse_tenancy(&mut fields)?;
    without_indexes(fields)
}

fn without_indexes(mut fields: Fields<'_>) -> Result<(), DefinitionError> {
    let _set_by_the_catalogue = (fields.take(&["createindex"])?, fields.take(&["modifyindex"])?);
    fields.finish()
}

fn wrong_address(path: &str, address: &str) -> DefinitionError {
    let start: String = address.chars().take(64).collect();
    let problem = format!("{start:?} is neither an IP address that can be dialled nor a host name");
    DefinitionError::Invalid { path: path.to_owned(), problem }
}

/// Takes an IP address that can be dialled, or a host name (RFC 1123 §2.1; underscores as they are used).
fn address_is_right(address: &str) -> Result<(), DefinitionError> {
    if let Ok(ip) = address.parse::<IpAddr>() {
        return if is_dialable(ip) { Ok(()) } else { Err(wrong_address("Address", address)) };
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let host = address.strip_suffix('.').unwrap_or(address);
    // A name of digits alone is an address that was written wrong.
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let is_host = host.len() <= HOST_BYTES_MAX
        && host.split('.').all(is_label)
        && !host.rsplit('.').next().is_some_and(is_number);
    if is_host { Ok(()) } else { Err(wrong_address("Address", address)) }
}

/// Reads a service in the shape in which the catalogue shows it: its name stands under `Service`.
fn service_of(field: &Field<'_>) -> Result<ServiceRecord, DefinitionError> {
    let mut fields = Fields::of(field)?;
    let (name, id) = (fields.text(&["service"])?, fields.text(&["id"])?);
    let address = fields.text(&["address"])?;
    let port = fields.port(&["port"])?;
    let tags = fields.texts(&["tags"])?;
    let meta = fields.pairs(&["meta"])?;
    let tagged_addresses = tagged_addresses(&mut fields)?;
    let weights = weights(&mut fields)?;
    let enable_tag_override = fields.flag(&["enabletagoverride"])?;
    fields.refuse(&["kind"], "a proxy or gateway that no agent runs")?;
    for name in ["proxy", "connect"] {
        fields.refuse(&[name], "a proxy on a node without an agent")?;
    }
    fields.refuse(&["socketpath"], "a unix socket")?;
    fields.refuse(&["locality"], "a locality")?;
    fields.refuse(&["ports"], "a list of ports")?;
    fields.refuse(&["peername"], "a peering")?;
    refuse_tenancy(&mut fields)?;
    without_indexes(fields)?;

    if name.is_empty() {
        return Err(DefinitionError::MissingServiceName);
    }
    let id = if id.is_empty() { &name } else { &id };
    let id: InstanceId = id.parse().map_err(|error| invalid("service ID", &error))?;
    if address.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified()) {
        return Err(DefinitionError::ServiceAddress);
    }
    meta_is_bounded(&meta)?;
    let pairs = |(tag, (address, port)): (String, (String, u16))| (tag, (address.into(), port));
    Ok(ServiceRecord {
        id,
        name: name.parse().map_err(|error| invalid("service name", &error))?,
        kind: Box::default(),
        tags: tags.into_iter().map(Into::into).collect(),
        meta: meta.into_iter().map(|(key, value)| (key, value.into())).collect(),
        address: address.into(),
        port,
        tagged_addresses: tagged_addresses.into_iter().map(pairs).collect(),
        weights,
        // The mesh does not carry its traffic.
        protocol: Protocol::Tcp,
        enable_tag_override,
    })
}

fn check_of(field: &Field<'_>, node: &NodeName) -> Result<(CheckRecord, CheckNotes), DefinitionError> {
    let mut fields = Fields::of(field)?;
    let refuse = |problem: String| DefinitionError::Check(format!("{}: {problem}", field.path));
    let (id, name, of) = (fields.text(&["checkid", "id"])?, fields.text(&["name"])?, fields.text(&["node"])?);
    let status = match fields.text(&["status"])?.as_str() {
        "passing" => HealthStatus::Passing,
        "warning" => HealthStatus::Warning,
        "critical" | "" => HealthStatus::Critical,
        _ => return Err(DefinitionError::Status),
    };
    let (notes, output) = (fields.text(&["notes"])?, fields.text(&["output"])?);
    let (service, kind) = (fields.text(&["serviceid"])?, fields.text(&["type"])?);
    let _of_the_service = (fields.text(&["servicename"])?, fields.texts(&["servicetags"])?);
    for name in ["interval", "timeout"] {
        fields.refuse(&[name], "a time outside of Definition")?;
    }
    fields.refuse(&["exposedport"], "an exposed port")?;
    fields.refuse(&["peername"], "a peering")?;
    let definition = fields.take(&["definition"])?.filter(|field| !field.is_empty());
    let definition =
        definition.map(|field| field.map().map(|map| Value::Object(map.clone()).to_string())).transpose()?;
    let definition = definition.unwrap_or_default();
    refuse_tenancy(&mut fields)?;
    without_indexes(fields)?;

    if definition.len() > DEFINITION_BYTES_MAX {
        return Err(refuse(format!("its Definition has {} bytes; at most {DEFINITION_BYTES_MAX}", definition.len())));
    }
    if !of.is_empty() && of != node.as_str() {
        return Err(refuse(format!("it names node {of:?}, and the request is about {:?}", node.as_str())));
    }
    let (id, name) = match (id.is_empty(), name.is_empty()) {
        (true, true) => return Err(DefinitionError::MissingCheckName),
        (true, false) => (name.clone(), name),
        (false, true) => (id.clone(), id),
        (false, false) => (id, name),
    };
    if id == SERF_HEALTH {
        return Err(refuse(format!(
            "the ID {SERF_HEALTH:?} is taken: it tells whether the agent lives where the node was written; give another CheckID"
        )));
    }
    let id: CheckId = id.parse().map_err(|error: NameError| refuse(error.to_string()))?;
    let about = |id: String| id.parse::<InstanceId>().map_err(|error: NameError| refuse(error.to_string()));
    let service = Some(service).filter(|id| !id.is_empty()).map(about).transpose()?;
    let record = CheckRecord { id, name: name.into(), status, notes: notes.into(), service, kind: kind.into() };
    Ok((record, CheckNotes { output: cut(output), definition }))
}

/// Cuts an output to what is kept of one.
fn cut(mut output: String) -> String {
    output.truncate(output.floor_char_boundary(OUTPUT_BYTES_MAX));
    output
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn read(value: &Value) -> ExternalWrite {
        external_from_json(value).unwrap().body
    }

    #[test]
    fn the_body_of_consul_s_page_is_read_whole() {
        let body = json!({
            "Datacenter": "dc1",
            "ID": "40e4a748-2192-161a-0510-9bf59fe950b5",
            "Node": "t2.320",
            "Address": "192.168.10.10",
            "TaggedAddresses": {"lan": "192.168.10.10", "wan": "10.0.10.10"},
            "NodeMeta": {"somekey": "somevalue"},
            "Service": {
                "ID": "redis1", "Service": "redis", "Tags": ["primary", "v1"], "Address": "127.0.0.1",
                "TaggedAddresses": {"lan": {"address": "127.0.0.1", "port": 8000}},
                "Meta": {"redis_version": "4.0"}, "Port": 8000, "Namespace": "default"
            },
            "Check": {
                "Node": "t2.320", "CheckID": "service:redis1", "Name": "Redis health check", "Notes": "Script based",
                "Status": "passing", "ServiceID": "redis1",
                "Definition": {"TCP": "localhost:8888", "Interval": "5s", "Timeout": "1s"},
                "Namespace": "default"
            },
            "SkipNodeUpdate": false
        });
        let read = external_from_json(&body).unwrap();
        assert_eq!(read.datacenter, "dc1");
        let ExternalWrite { node, facts, service, checks } = read.body;
        let (facts, service) = (facts.unwrap(), service.unwrap());
        assert_eq!((node.as_str(), facts.address.as_str()), ("t2.320", "192.168.10.10"));
        assert_eq!(
            (facts.tagged_addresses["wan"].as_str(), facts.meta["somekey"].as_str()),
            ("10.0.10.10", "somevalue")
        );
        assert_eq!((service.id.as_str(), service.name.as_str(), service.port), ("redis1", "redis", 8000));
        let (check, notes) = &checks[0];
        assert_eq!((check.id.as_str(), check.status), ("service:redis1", HealthStatus::Passing));
        assert_eq!(check.service.as_ref().unwrap().as_str(), "redis1");
        assert!(notes.definition.contains("localhost:8888"), "{}", notes.definition);
    }

    #[test]
    fn what_is_left_out_has_consul_s_defaults() {
        let write = read(&json!({"node": "h1", "address": "db.example.com.", "service": {"service": "db"},
                                 "checks": [{"name": "up"}, {"checkid": "c", "status": "warning", "serviceid": "db"}]}));
        assert_eq!(write.service.unwrap().id.as_str(), "db");
        let shown: Vec<_> = write.checks.iter().map(|(c, _)| (c.id.as_str(), &*c.name, c.status)).collect();
        assert_eq!(shown, [("up", "up", HealthStatus::Critical), ("c", "c", HealthStatus::Warning)]);
        assert_eq!(read(&json!({"Node": "h1", "SkipNodeUpdate": true})).facts, None);
        // As py-consul and older libraries send it.
        read(&json!({"node": "h1", "address": "192.0.2.1", "WriteRequest": {"Token": "t"}, "service": null}));
        let long = "ä".repeat(OUTPUT_BYTES_MAX);
        let write = read(&json!({"Node": "h1", "Address": "192.0.2.1", "Check": {"Name": "c", "Output": long}}));
        assert_eq!(write.checks[0].1.output.len(), OUTPUT_BYTES_MAX);
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_place() {
        #[track_caller]
        fn refused(change: &Value, want: &str) {
            let mut body = json!({"Node": "h1", "Address": "192.0.2.1"});
            body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let error = external_from_json(&body).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        refused(&json!({"Node": ""}), "no name");
        refused(&json!({"Node": "a b"}), "node name");
        refused(&json!({"Address": ""}), "Address");
        for address in ["0.0.0.0", "::", "224.0.0.1", "10.0.0", "a..b", "-x", "http://x", "10.0.0.1:80", "a b"] {
            refused(&json!({"Address": address}), "neither an IP address");
        }
        refused(&json!({"TaggedAddresses": {"wan": "0.0.0.0"}}), "TaggedAddresses.wan");
        refused(&json!({"ID": "7"}), "is no UUID");
        refused(&json!({"Colour": 1}), "Colour");
        refused(&json!({"Service": {"ID": "x"}}), "Missing service name");
        refused(&json!({"Service": {"Service": "db", "Address": "0.0.0.0"}}), "Invalid service address");
        refused(&json!({"Service": {"Service": "db", "Kind": "terminating-gateway"}}), "no agent runs");
        refused(
            json!({"Service": {"Service": "db", "Connect": {"Native": true}}}),
            "a proxy on a node without an agent",
        );
        refused(&json!({"Check": {"Status": "passing"}}), "Missing check name");
        refused(&json!({"Check": {"Name": "c", "Status": "good"}}), "Status for checks");
        refused(&json!({"Check": {"Name": "c", "Node": "h2"}}), "the request is about");
        refused(&json!({"Check": {"CheckID": "serfHealth"}}), "is taken");
        refused(
            &json!({"Check": {"Name": "c", "Definition": {"X": "y".repeat(DEFINITION_BYTES_MAX)}}}),
            "at most 4096",
        );
        refused(&json!({"Checks": [{"Name": "c"}, {"Name": "c"}]}), "two checks");
        refused(&json!({"Partition": "x"}), "Partition");
    }

    #[test]
    fn a_removal_says_what_goes() {
        #[track_caller]
        fn check(body: &Value, want: &ExternalPart) {
            assert_eq!(removal_from_json(body).unwrap().body.1, *want, "{body}");
        }
        check(&json!({"Node": "h1", "Datacenter": "dc1", "Address": "192.0.2.1"}), &ExternalPart::Node);
        let service = ExternalPart::Service("a".parse().unwrap());
        check(&json!({"Node": "h1", "ServiceID": "a", "CheckID": "c"}), &service);
        check(&json!({"Node": "h1", "CheckID": "c"}), &ExternalPart::Check("c".parse().unwrap()));
        assert!(removal_from_json(&json!({"ServiceID": "a"})).is_err());
        assert!(removal_from_json(&json!({"Node": "h1", "Service": "a"})).is_err());
    }
}

//! What services and checks of one node have to respect of each other. Pure.

use std::collections::BTreeMap;

use super::{CheckDefinition, RegistryError, ServiceDefinition, UpstreamDefinition};
use crate::model::{CheckId, CheckRecord, Entry, HealthStatus, ServeScope};
use crate::wire;

/// Most bytes that a node's services and checks take on the wire: the node's state is bounded to 64 KiB, and its own
/// facts need the rest.
pub const RECORDS_BYTES_MAX: usize = 60 * 1024;

/// Most bytes of one definition on disk: its request bodies and headers are not in the records.
const DEFINITION_BYTES_MAX: usize = 64 * 1024;

/// Returns a check as other nodes see it.
pub(super) fn check_record(definition: &CheckDefinition, status: HealthStatus) -> CheckRecord {
    CheckRecord {
        id: definition.id.clone(),
        name: definition.name.as_str().into(),
        status,
        notes: definition.notes.as_str().into(),
        service: definition.service.clone(),
        kind: definition.probe.kind().into(),
    }
}

/// Refuses a service that the node's certificate does not cover.
pub(super) fn in_scope(service: &ServiceDefinition, scope: &ServeScope) -> Result<(), RegistryError> {
    let name = service.record.name.as_str();
    if scope.covers(name) {
        return Ok(());
    }
    Err(RegistryError::OutOfScope { service: name.to_owned(), scope: scope.to_string() })
}

/// Holds all services and the checks that stand alone against each other.
pub(super) fn hold_together(services: &[&ServiceDefinition], alone: &[&CheckDefinition]) -> Result<(), RegistryError> {
    check_ids_are_unique(services, alone)?;
    upstreams_do_not_collide(services)?;
    sizes_are_bounded(services, alone)
}

fn owner(check: &CheckDefinition) -> String {
    check.service.as_ref().map_or_else(|| "the node".to_owned(), |service| format!("service {:?}", service.as_str()))
}

fn check_ids_are_unique(services: &[&ServiceDefinition], alone: &[&CheckDefinition]) -> Result<(), RegistryError> {
    let mut seen: BTreeMap<&CheckId, &CheckDefinition> = BTreeMap::new();
    let of_services = services.iter().flat_map(|service| &service.checks);
    for check in of_services.chain(alone.iter().copied()) {
        if let Some(first) = seen.insert(&check.id, check) {
            let (id, first, second) = (check.id.as_str(), owner(first), owner(check));
            return Err(RegistryError::Invalid(format!(
                "Invalid check: {first} and {second} both have a check with the ID {id:?}; give one of them another CheckID"
            )));
        }
    }
    Ok(())
}

/// Tells whether two upstreams ask for one port of one address.
fn collide(a: &UpstreamDefinition, b: &UpstreamDefinition) -> bool {
    let (left, right) = (a.bind.ip(), b.bind.ip());
    a.bind.port() == b.bind.port() && (left == right || left.is_unspecified() || right.is_unspecified())
}

fn upstreams_do_not_collide(services: &[&ServiceDefinition]) -> Result<(), RegistryError> {
    let mut by_port: BTreeMap<u16, Vec<(&ServiceDefinition, &UpstreamDefinition)>> = BTreeMap::new();
    for service in services {
        for upstream in &service.upstreams {
            let taken = by_port.entry(upstream.bind.port()).or_default();
            // Two instances of one service on a host share a port that means the same to both.
            let is_shared = |(first, other): &&(&ServiceDefinition, &UpstreamDefinition)| {
                first.record.name == service.record.name && first.record.id != service.record.id && *other == upstream
            };
            let clash = taken.iter().find(|held| collide(held.1, upstream) && !is_shared(held));
            if let Some((first, other)) = clash {
                let (a, b) = (first.record.id.as_str(), service.record.id.as_str());
                let (from, to) = (&other.destination, &upstream.destination);
                return Err(RegistryError::Invalid(format!(
                    "Invalid upstream: {} is asked for by service {a:?} (to {from}) and by service {b:?} (to {to}); give one of them another LocalBindPort",
                    upstream.bind
                )));
            }
            taken.push((service, upstream));
        }
    }
    Ok(())
}

fn sizes_are_bounded(services: &[&ServiceDefinition], alone: &[&CheckDefinition]) -> Result<(), RegistryError> {
    let bytes_of = |entry: &Entry| wire::encode(&(entry.key(), entry)).map_or(usize::MAX, |bytes| bytes.len());
    let check_bytes =
        |check: &CheckDefinition| bytes_of(&Entry::Check(check_record(check, HealthStatus::Critical).into()));
    let mut total = alone.iter().fold(0, |sum: usize, check| sum.saturating_add(check_bytes(check)));
    for service in services {
        let bytes = wire::encode(service).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > DEFINITION_BYTES_MAX {
            let id = service.record.id.as_str();
            return Err(RegistryError::Invalid(format!(
                "Invalid service: {id:?} has a definition of {bytes} bytes; at most {DEFINITION_BYTES_MAX} are kept"
            )));
        }
        total = total.saturating_add(bytes_of(&Entry::Service(service.record.clone().into())));
        total = service.checks.iter().fold(total, |sum, check| sum.saturating_add(check_bytes(check)));
    }
    for check in alone {
        let bytes = wire::encode(check).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > DEFINITION_BYTES_MAX {
            let id = check.id.as_str();
            return Err(RegistryError::Invalid(format!(
                "Invalid check: {id:?} has a definition of {bytes} bytes; at most {DEFINITION_BYTES_MAX} are kept"
            )));
        }
    }
    if total > RECORDS_BYTES_MAX {
        return Err(RegistryError::Invalid(format!(
            "this node's services and checks would take {total} bytes; at most {RECORDS_BYTES_MAX} are spread through the mesh: deregister some, or shorten tags, meta and notes"
        )));
    }
    Ok(())
}

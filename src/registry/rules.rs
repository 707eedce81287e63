//! What services and checks of one node have to respect of each other. Pure.

use std::collections::BTreeMap;

use super::task::Origin;
use super::{CheckDefinition, Probe, RegistryError, ScriptPolicy, ServiceDefinition, UpstreamDefinition};
use crate::model::{CheckId, CheckRecord, Entry, HealthStatus, InstanceId, ServeScope};
use crate::wire;

/// Most bytes that a node's services and checks take on the wire: the node's state is bounded to 64 KiB, and its own
/// facts need the rest.
pub const RECORDS_BYTES_MAX: usize = 60 * 1024;

/// The id of a service's checks told as one begins so.
const SUM_PREFIX: &str = "checks:";
/// The id of the node's own checks told as one.
const SUM_OF_NODE: &str = "checks";

/// Most bytes of one definition on disk: its request bodies and headers are not in the records.
const DEFINITION_BYTES_MAX: usize = 64 * 1024;

/// How checks are told to other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spread {
    /// Each check by itself.
    Each,
    /// All checks of a service, or of the node, as one: with each by itself the node's records would be too large.
    Summed,
}

/// Returns the checks of each service, and of the node, as one record: the worst of them. What is set by hand stays by
/// itself.
pub(super) fn summed_records<'a>(
    checks: impl Iterator<Item = (&'a CheckDefinition, HealthStatus)>,
) -> Vec<CheckRecord> {
    let mut records = Vec::new();
    let mut sums: BTreeMap<Option<&InstanceId>, (usize, HealthStatus)> = BTreeMap::new();
    for (definition, status) in checks {
        if definition.probe == Probe::Static {
            records.push(check_record(definition, status));
            continue;
        }
        let (count, worst) = sums.entry(definition.service.as_ref()).or_insert((0, status));
        *count += 1;
        *worst = (*worst).max(status);
    }
    let sum = |(service, (count, status)): (Option<&InstanceId>, (usize, HealthStatus))| {
        let id = match service {
            Some(service) => format!("{SUM_PREFIX}{service}"),
            None => SUM_OF_NODE.to_owned(),
        };
        Some(CheckRecord {
            id: id.parse().ok()?,
            name: format!("{count} checks").into(),
            status,
            notes: "".into(),
            service: service.cloned(),
            kind: "summary".into(),
        })
    };
    records.extend(sums.into_iter().filter_map(sum));
    records
}

/// Refuses checks that run programs where the agent's configuration does not allow them.
pub(super) fn may_run(checks: &[CheckDefinition], policy: ScriptPolicy, origin: Origin) -> Result<(), RegistryError> {
    let allowed = match origin {
        Origin::Api => policy == ScriptPolicy::All,
        Origin::Config => policy != ScriptPolicy::Off,
    };
    match checks.iter().find(|check| check.probe.runs_a_program()) {
        Some(check) if !allowed => {
            let (id, kind) = (check.id.as_str(), check.probe.kind());
            Err(RegistryError::Invalid(format!(
                "Invalid check: {id:?} is a {kind} check, and checks that run programs are disabled on this agent: set enable_script_checks = true in its configuration, or enable_local_script_checks = true for those of its files alone"
            )))
        }
        _ => Ok(()),
    }
}

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

/// Says what keeps the services and checks of a configuration from standing together on one node.
///
/// # Errors
/// [`RegistryError::Invalid`], with what to change.
pub(crate) fn stand_together(services: &[ServiceDefinition], alone: &[CheckDefinition]) -> Result<(), RegistryError> {
    hold_together(&services.iter().collect::<Vec<_>>(), &alone.iter().collect::<Vec<_>>(), 0).map(drop)
}

/// Holds all services and the checks that stand alone against each other; tells how the checks fit into the records, of
/// which `taken` bytes are nodes without an agent.
pub(super) fn hold_together(
    services: &[&ServiceDefinition],
    alone: &[&CheckDefinition],
    taken: usize,
) -> Result<Spread, RegistryError> {
    check_ids_are_unique(services, alone)?;
    upstreams_do_not_collide(services)?;
    sizes_are_bounded(services, alone, taken)
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

fn sizes_are_bounded(
    services: &[&ServiceDefinition],
    alone: &[&CheckDefinition],
    taken: usize,
) -> Result<Spread, RegistryError> {
    let bytes_of = |entry: &Entry| wire::encode(&(entry.key(), entry)).map_or(usize::MAX, |bytes| bytes.len());
    let sum = |sizes: &mut dyn Iterator<Item = usize>| sizes.fold(0_usize, usize::saturating_add);
    for service in services {
        let bytes = wire::encode(service).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > DEFINITION_BYTES_MAX {
            let id = service.record.id.as_str();
            return Err(RegistryError::Invalid(format!(
                "Invalid service: {id:?} has a definition of {bytes} bytes; at most {DEFINITION_BYTES_MAX} are kept"
            )));
        }
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
    let of_services = services.iter().map(|service| bytes_of(&Entry::Service(service.record.clone().into())));
    let own = sum(&mut of_services.chain([taken]));
    // A status takes as many bytes whatever it is, so that no result changes how checks are told.
    let checks = || services.iter().flat_map(|service| &service.checks).chain(alone.iter().copied());
    let status = HealthStatus::Critical;
    let each = sum(&mut checks().map(|check| bytes_of(&Entry::Check(check_record(check, status).into()))));
    if own.saturating_add(each) <= RECORDS_BYTES_MAX {
        return Ok(Spread::Each);
    }
    let summed = summed_records(checks().map(|check| (check, status)));
    let total = own.saturating_add(sum(&mut summed.into_iter().map(|record| bytes_of(&Entry::Check(record.into())))));
    if total > RECORDS_BYTES_MAX {
        return Err(RegistryError::Invalid(format!(
            "this node's services and checks would take {total} bytes, with {taken} of nodes without an agent; at most {RECORDS_BYTES_MAX} are spread through the mesh: deregister some, or shorten tags, meta and notes"
        )));
    }
    Ok(Spread::Summed)
}

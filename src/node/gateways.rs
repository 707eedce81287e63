//! Tells discovery how the ports of this host's gateways fare, by a check of each gateway's service.
//!
//! ```text
//!   registry (gateways) + snapshot (their entries) + listeners (their ports) -> check `gateway:<id>` in the registry
//! ```
//!
//! Critical where not one of its ports is open, a warning where some are not; the output says which and why. A gateway
//! without an entry has no ports, and passes. The check is a TTL's whose time does not run out: what another check of that
//! id says is left alone.
//! Not here: opening the ports (`proxy`), what an entry says (`traffic`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::debug;

use crate::catalogue::{GatewayPort, Snapshot, SnapshotReader};
use crate::model::{CheckId, HealthStatus, INGRESS_GATEWAY, InstanceId, ServiceName};
use crate::proxy::{ListenerState, Listeners};
use crate::registry::definition::OUTPUT_BYTES_MAX;
use crate::registry::{CheckDefinition, LocalService, LocalState, Probe, RegistryError, RegistryHandle};

/// What the check's id begins with.
const PREFIX: &str = "gateway:";
/// No agent runs for so long.
const NEVER: Duration = Duration::from_hours(24 * 365 * 10);
/// What the registry refused (a full node, a full disk) is tried again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What a gateway's check says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    status: HealthStatus,
    output: String,
}

/// A gateway that is registered here.
struct Here {
    id: InstanceId,
    check: CheckId,
    name: ServiceName,
    ip: IpAddr,
}

/// Keeps the checks of this host's gateways as their ports are; `own_ip` is where those listen that name no address. Ends
/// with the registry or the data plane.
///
/// # Cancel safety
/// Cancelling leaves the checks as they are.
pub(super) async fn tell(
    registry: RegistryHandle,
    snapshot: SnapshotReader,
    mut listeners: watch::Receiver<Listeners>,
    own_ip: IpAddr,
) {
    let (mut registered, mut snapshots) = (registry.subscribe(), snapshot.subscribe());
    let mut told = BTreeMap::new();
    loop {
        let state = Arc::clone(&registered.borrow_and_update());
        let gateways = gateways(&state, own_ip);
        let verdicts: Vec<Verdict> = {
            let (snapshot, states) = (snapshots.borrow_and_update(), listeners.borrow_and_update());
            gateways.iter().map(|gateway| verdict(&snapshot, &states, gateway)).collect()
        };
        told.retain(|id, _| gateways.iter().any(|gateway| gateway.id == *id));
        let mut is_refused = false;
        for (gateway, verdict) in gateways.iter().zip(verdicts) {
            let is_held = state.checks.get(&gateway.check).is_some_and(|check| check.status == verdict.status);
            if is_held && told.get(&gateway.id) == Some(&verdict) {
                continue;
            }
            if let Err(error) = say(&registry, gateway, &verdict, &state).await {
                debug!(check = %gateway.check, %error, "cannot say how a gateway's ports fare");
                is_refused = true;
            }
            told.insert(gateway.id.clone(), verdict);
        }
        let retry =
            async { if is_refused { tokio::time::sleep(RETRY_AFTER).await } else { std::future::pending().await } };
        // A snapshot comes with every change of the mesh: without a gateway nobody looks at it.
        let changed = async {
            if gateways.is_empty() {
                return std::future::pending().await;
            }
            tokio::select! {
                changed = snapshots.changed() => changed,
                changed = listeners.changed() => changed,
            }
        };
        let woken = tokio::select! {
            () = retry => {
                told.clear();
                Ok(())
            }
            woken = registered.changed() => woken,
            woken = changed => woken,
        };
        if woken.is_err() {
            return;
        }
    }
}

fn gateways(state: &LocalState, own_ip: IpAddr) -> Vec<Here> {
    let of_kind = state.services.iter().filter(|(_, service)| *service.definition.record.kind == *INGRESS_GATEWAY);
    let here = |(id, service): (&InstanceId, &Arc<LocalService>)| {
        let given = Some(service.definition.app_addr.ip()).filter(|ip| !ip.is_unspecified());
        // An id may be too long for its prefix; its gateway then goes without.
        let check = format!("{PREFIX}{id}").parse().ok()?;
        Some(Here { id: id.clone(), check, name: service.definition.record.name.clone(), ip: given.unwrap_or(own_ip) })
    };
    of_kind.filter_map(here).collect()
}

fn verdict(snapshot: &Snapshot, listeners: &Listeners, gateway: &Here) -> Verdict {
    let (mut open, mut failed) = (0_usize, Vec::new());
    let of_this = |port: &GatewayPort<'_>| *port.gateway == gateway.name && port.bind.ip() == gateway.ip;
    for port in snapshot.gateway_ports().filter(of_this) {
        let number = port.bind.port();
        if snapshot.local.upstreams.iter().any(|upstream| upstream.bind == port.bind) {
            failed.push(format!("port {number}: an upstream of this agent has it"));
        } else if let Some(ListenerState::Failed(why)) = listeners.get(&port.bind) {
            failed.push(format!("port {number}: {why}"));
        } else {
            // Those that were not tried yet among them: that takes milliseconds.
            open += 1;
        }
    }
    let status = match (open, failed.is_empty()) {
        (_, true) => HealthStatus::Passing,
        (0, false) => HealthStatus::Critical,
        (_, false) => HealthStatus::Warning,
    };
    let output = match (open, failed.is_empty()) {
        (0, true) => format!("no ports: there is no config entry ingress-gateway {} with any", gateway.name),
        (open, true) => format!("ports open: {open}"),
        (open, false) => format!("ports open: {open}; {}", failed.join("; ")),
    };
    Verdict { status, output }
}

async fn say(
    registry: &RegistryHandle,
    gateway: &Here,
    verdict: &Verdict,
    state: &LocalState,
) -> Result<(), RegistryError> {
    if !state.checks.contains_key(&gateway.check) {
        registry.register_check(definition(gateway, verdict.status)).await?;
    }
    match registry.update_ttl(gateway.check.clone(), verdict.status, verdict.output.clone()).await {
        // Somebody's own check of this id, or one that went meanwhile.
        Err(RegistryError::NotTtl { .. } | RegistryError::UnknownCheck { .. }) => Ok(()),
        other => other,
    }
}

fn definition(gateway: &Here, initial: HealthStatus) -> CheckDefinition {
    CheckDefinition {
        id: gateway.check.clone(),
        name: "Gateway ports".to_owned(),
        notes: String::new(),
        service: Some(gateway.id.clone()),
        probe: Probe::Ttl { ttl: NEVER },
        initial,
        success_before_passing: 0,
        failures_before_warning: 0,
        failures_before_critical: 0,
        output_bytes_max: OUTPUT_BYTES_MAX,
        deregister_critical_after: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::catalogue::{LocalGateway, LocalView, UpstreamListener};
    use crate::traffic::{Entries, Ready, Traffic};

    fn at(port: u16) -> std::net::SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn a_gateway_is_critical_without_an_open_port_and_warns_where_one_is_missing() {
        let mut snapshot = Snapshot::empty("n1".parse().unwrap());
        let here = Here {
            id: "edge-1".parse().unwrap(),
            check: "gateway:edge-1".parse().unwrap(),
            name: "edge".parse().unwrap(),
            ip: at(0).ip(),
        };
        let gateways = vec![LocalGateway { service: here.name.clone(), ip: here.ip }];
        snapshot.local = Arc::new(LocalView { gateways: gateways.clone(), ..LocalView::default() });
        let said = |snapshot: &Snapshot, states: &[(u16, ListenerState)]| {
            let states: Listeners = states.iter().map(|(port, state)| (at(*port), state.clone())).collect();
            let Verdict { status, output } = verdict(snapshot, &states, &here);
            (status, output)
        };
        let none = "no ports: there is no config entry ingress-gateway edge with any".to_owned();
        assert_eq!(said(&snapshot, &[]), (HealthStatus::Passing, none));

        let listeners = json!([{"Port": 80, "Services": [{"Name": "a"}]}, {"Port": 81, "Services": [{"Name": "b"}]}]);
        let ready = Ready::new("ingress-gateway", &json!({"Listeners": listeners})).unwrap();
        let mut entries = Entries::default();
        entries.add("ingress-gateway", "edge", ready);
        snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        let failed = || ListenerState::Failed("taken".to_owned());
        let open = ListenerState::Listening;
        assert_eq!(said(&snapshot, &[(80, open.clone())]), (HealthStatus::Passing, "ports open: 2".to_owned()));
        let one = (HealthStatus::Warning, "ports open: 1; port 81: taken".to_owned());
        assert_eq!(said(&snapshot, &[(80, open.clone()), (81, failed())]), one);
        let both = (HealthStatus::Critical, "ports open: 0; port 80: taken; port 81: taken".to_owned());
        assert_eq!(said(&snapshot, &[(80, failed()), (81, failed())]), both);

        // The port is open, and it is not the gateway's.
        let upstream = UpstreamListener {
            bind: at(80),
            source: "app".parse().unwrap(),
            destination: "web".parse().unwrap(),
            protocol: None,
        };
        snapshot.local = Arc::new(LocalView { gateways, upstreams: vec![upstream], ..LocalView::default() });
        let crowded = (HealthStatus::Warning, "ports open: 1; port 80: an upstream of this agent has it".to_owned());
        assert_eq!(said(&snapshot, &[(80, open.clone()), (81, open)]), crowded);
    }
}

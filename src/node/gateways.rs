//! Tells discovery how the ports of this host's gateways fare, by checks of each gateway's service.
//!
//! ```text
//!   registry (gateways) + snapshot (their entries) + listeners (their ports)
//!                                             -> checks `gateway:<id>`, `gateway:<id>:<port>` in the registry
//! ```
//!
//! The first is critical where not one of the ports is open, a warning where some are not; its output says which and why. A
//! gateway without an entry has no ports, and passes. The second is a warning that is there for each port which is closed
//! while another one is open: outputs stay on their host, and by it every agent knows which ports are no way in. The checks
//! are TTLs whose time does not run out: what another check of such an id says is left alone.
//! Not here: opening the ports (`proxy`), what an entry says (`traffic`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::debug;

use crate::catalogue::{GatewayPort, Snapshot, SnapshotReader, closed_port, closed_port_check, gateway_check};
use crate::model::{CheckId, HealthStatus, INGRESS_GATEWAY, InstanceId, ServiceName};
use crate::proxy::{ListenerState, Listeners};
use crate::registry::definition::OUTPUT_BYTES_MAX;
use crate::registry::{CheckDefinition, LocalService, LocalState, Probe, RegistryError, RegistryHandle};

/// How the checks are run: not at all, for no agent runs for so long.
const PROBE: Probe = Probe::Ttl { ttl: Duration::from_hours(24 * 365 * 10) };
/// What the registry refused (a full node, a full disk) is tried again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What a gateway's checks say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    status: HealthStatus,
    output: String,
    /// Ports that are closed while others are open.
    closed: BTreeSet<u16>,
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
            let is_held = state.checks.get(&gateway.check).is_some_and(|check| check.status == verdict.status)
                && told_closed(&state, gateway) == verdict.closed;
            if is_held && told.get(&gateway.id) == Some(&verdict) {
                continue;
            }
            if let Err(error) = say(&registry, gateway, &verdict, &state).await {
                debug!(check = %gateway.check, %error, "cannot say how a gateway's ports fare");
                is_refused = true;
            }
            told.insert(gateway.id.clone(), verdict);
        }
        for id in orphans(&state, &gateways) {
            // What went meanwhile is gone as it should be; what the disk refuses is tried again with the next change.
            let _gone = registry.deregister_check(id).await;
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
        let check = gateway_check(id)?;
        Some(Here { id: id.clone(), check, name: service.definition.record.name.clone(), ip: given.unwrap_or(own_ip) })
    };
    of_kind.filter_map(here).collect()
}

/// Returns the checks of ours about services that are no gateways any more, but were registered anew under their ids.
fn orphans(state: &LocalState, gateways: &[Here]) -> Vec<CheckId> {
    let is_orphan = |check: &&CheckDefinition| {
        check.probe == PROBE
            && check.service.as_ref().is_some_and(|service| {
                let is_ours =
                    closed_port(service, &check.id).is_some() || gateway_check(service).as_ref() == Some(&check.id);
                is_ours && !gateways.iter().any(|gateway| gateway.id == *service)
            })
    };
    let checks = state.checks.values().map(|check| &*check.definition);
    checks.filter(is_orphan).map(|check| check.id.clone()).collect()
}

/// Returns the ports of a gateway that the registry has a check of ours about.
fn told_closed(state: &LocalState, gateway: &Here) -> BTreeSet<u16> {
    let of_this = state.checks.values().map(|check| &*check.definition);
    let of_this = of_this.filter(|check| check.service.as_ref() == Some(&gateway.id) && check.probe == PROBE);
    of_this.filter_map(|check| closed_port(&gateway.id, &check.id)).collect()
}

fn verdict(snapshot: &Snapshot, listeners: &Listeners, gateway: &Here) -> Verdict {
    let (mut open, mut failed, mut closed) = (0_usize, Vec::new(), BTreeSet::new());
    let of_this = |port: &GatewayPort<'_>| *port.gateway == gateway.name && port.bind.ip() == gateway.ip;
    for port in snapshot.gateway_ports().filter(of_this) {
        let number = port.bind.port();
        let why = if snapshot.local.upstreams.iter().any(|upstream| upstream.bind == port.bind) {
            "an upstream of this agent has it"
        } else if let Some(ListenerState::Failed(why)) = listeners.get(&port.bind) {
            why.as_str()
        } else {
            // Those that were not tried yet among them: that takes milliseconds.
            open += 1;
            continue;
        };
        failed.push(format!("port {number}: {why}"));
        closed.insert(number);
    }
    if open == 0 {
        // The gateway is critical as a whole: nothing is to be told apart.
        closed.clear();
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
    Verdict { status, output, closed }
}

/// Writes what a verdict says: which ports are closed before that the gateway is well but for them, and that it is not
/// before they are open or gone.
async fn say(
    registry: &RegistryHandle,
    gateway: &Here,
    verdict: &Verdict,
    state: &LocalState,
) -> Result<(), RegistryError> {
    let told = told_closed(state, gateway);
    for port in &verdict.closed {
        let Some(id) = closed_port_check(&gateway.id, *port).filter(|id| !state.checks.contains_key(id)) else {
            continue;
        };
        let notes = "closed: weft info on this host says why".to_owned();
        let check = definition((id, format!("Gateway port {port}")), gateway, HealthStatus::Warning);
        registry.register_check(CheckDefinition { notes, ..check }).await?;
    }
    if !state.checks.contains_key(&gateway.check) {
        let named = (gateway.check.clone(), "Gateway ports".to_owned());
        registry.register_check(definition(named, gateway, verdict.status)).await?;
    }
    match registry.update_ttl(gateway.check.clone(), verdict.status, verdict.output.clone()).await {
        // Somebody's own check of this id, or one that went meanwhile.
        Ok(()) | Err(RegistryError::NotTtl { .. } | RegistryError::UnknownCheck { .. }) => {}
        Err(other) => return Err(other),
    }
    for id in told.difference(&verdict.closed).filter_map(|port| closed_port_check(&gateway.id, *port)) {
        match registry.deregister_check(id).await {
            Ok(()) | Err(RegistryError::UnknownCheck { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

fn definition((id, name): (CheckId, String), gateway: &Here, initial: HealthStatus) -> CheckDefinition {
    CheckDefinition {
        id,
        name,
        notes: String::new(),
        service: Some(gateway.id.clone()),
        probe: PROBE,
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
            let Verdict { status, output, closed } = verdict(snapshot, &states, &here);
            (status, output, closed.into_iter().collect::<Vec<u16>>())
        };
        let none = "no ports: there is no config entry ingress-gateway edge with any".to_owned();
        assert_eq!(said(&snapshot, &[]), (HealthStatus::Passing, none, vec![]));

        let listeners = json!([{"Port": 80, "Services": [{"Name": "a"}]}, {"Port": 81, "Services": [{"Name": "b"}]}]);
        let ready = Ready::new("ingress-gateway", &json!({"Listeners": listeners})).unwrap();
        let mut entries = Entries::default();
        entries.add("ingress-gateway", "edge", ready);
        snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        let failed = || ListenerState::Failed("taken".to_owned());
        let open = ListenerState::Listening;
        assert_eq!(said(&snapshot, &[(80, open.clone())]), (HealthStatus::Passing, "ports open: 2".to_owned(), vec![]));
        let one = (HealthStatus::Warning, "ports open: 1; port 81: taken".to_owned(), vec![81]);
        assert_eq!(said(&snapshot, &[(80, open.clone()), (81, failed())]), one);
        let both = (HealthStatus::Critical, "ports open: 0; port 80: taken; port 81: taken".to_owned(), vec![]);
        assert_eq!(said(&snapshot, &[(80, failed()), (81, failed())]), both);

        // The port is open, and it is not the gateway's.
        let upstream = UpstreamListener {
            bind: at(80),
            source: "app".parse().unwrap(),
            destination: "web".parse().unwrap(),
            protocol: None,
        };
        snapshot.local = Arc::new(LocalView { gateways, upstreams: vec![upstream], ..LocalView::default() });
        let told = "ports open: 1; port 80: an upstream of this agent has it".to_owned();
        let crowded = (HealthStatus::Warning, told, vec![80]);
        assert_eq!(said(&snapshot, &[(80, open.clone()), (81, open)]), crowded);
    }
}

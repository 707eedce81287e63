//! Gateways into the mesh: the ports that those of this host have, and those of any host that lead to a service.
//!
//! Where gateways are is what nodes publish (services of the kind `ingress-gateway`), what they listen on and where that
//! leads is what operators sign (`traffic::gateway`): here the two come together. A port that an agent could not open has a
//! check of its own there, by which the other agents know that it leads nowhere.
//! Not here: listening and carrying (`proxy`), keeping those checks (`node::gateways`).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{Instance, Snapshot};
use crate::model::{CheckId, CheckRecord, HealthStatus, INGRESS_GATEWAY, InstanceId, Protocol, ServiceName};
use crate::traffic::GatewayListener;

/// What the ids of checks about a gateway's ports begin with.
const CHECK_PREFIX: &str = "gateway:";

/// Names the check of a gateway's ports taken together; none: its id is too long for that.
pub fn gateway_check(gateway: &InstanceId) -> Option<CheckId> {
    format!("{CHECK_PREFIX}{gateway}").parse().ok()
}

/// Names the check of one port of a gateway, which is there while the port is closed and another one is open; none: the
/// gateway's id is too long for that.
pub fn closed_port_check(gateway: &InstanceId, port: u16) -> Option<CheckId> {
    format!("{CHECK_PREFIX}{gateway}:{port}").parse().ok()
}

/// Returns the port that a check of a gateway is about, if [`closed_port_check`] named it.
pub fn closed_port(gateway: &InstanceId, check: &CheckId) -> Option<u16> {
    let port = check.as_str().strip_prefix(CHECK_PREFIX)?.strip_prefix(gateway.as_str())?.strip_prefix(':')?;
    port.parse().ok()
}

/// A gateway that is registered on this host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalGateway {
    /// Its name: that of its entry, and the source of the calls that come by it.
    pub service: ServiceName,
    /// Where it listens.
    pub ip: IpAddr,
}

/// A port that a gateway of this host is to have.
#[derive(Debug, Clone, Copy)]
pub struct GatewayPort<'s> {
    /// Where.
    pub bind: SocketAddr,
    /// Whose.
    pub gateway: &'s ServiceName,
    /// What its entry says of it.
    pub listener: &'s GatewayListener,
}

impl Snapshot {
    /// Returns the ports of this host's gateways, in order of the gateways' names; two gateways may ask for one.
    pub fn gateway_ports(&self) -> impl Iterator<Item = GatewayPort<'_>> {
        let here = self.local.gateways.iter();
        let known = here.filter_map(|local| Some((local, self.traffic.gateway(&local.service)?)));
        known.flat_map(|(local, entry)| {
            entry.listeners.iter().map(move |listener| GatewayPort {
                bind: SocketAddr::new(local.ip, listener.port),
                gateway: &local.service,
                listener,
            })
        })
    }

    /// Tells how the traffic of a service is parsed, as an entry or else its registration says.
    pub fn protocol(&self, service: &ServiceName) -> Option<Protocol> {
        self.traffic.protocol(service).or_else(|| Some(self.services.get(service)?.protocol))
    }

    /// Tells whether a gateway whose entry names the service `*` leads to this one: it is there, takes requests, and is no
    /// gateway itself.
    pub fn is_exposed_unnamed(&self, service: &ServiceName) -> bool {
        let entry = self.services.get(service);
        let is_gateway = entry.and_then(|entry| entry.instances.first()).is_some_and(|one| is_gateway(one));
        let is_there = entry.is_some() || self.traffic.chain(service).is_some();
        is_there && !is_gateway && self.protocol(service).is_some_and(Protocol::is_http)
    }

    /// Tells whether a port leads to `service`, whose name may come in any case where the entry names it.
    fn leads_to(&self, listener: &GatewayListener, service: &str) -> bool {
        let is_unnamed = || service.parse::<ServiceName>().is_ok_and(|name| self.is_exposed_unnamed(&name));
        listener.names(service) || (listener.leads_to_every() && is_unnamed())
    }

    /// Returns the gateways' instances by which calls of `service` come into the mesh, healthy or not, each with the port; in
    /// order of gateway, node, instance. A port that its agent says is closed, while others are open, is left out.
    pub fn ingress(&self, service: &str) -> Vec<(Arc<Instance>, u16)> {
        let mut found = Vec::new();
        for (name, gateway) in self.traffic.gateways() {
            let Some(entry) = self.services.get(name) else { continue };
            let leading = gateway.listeners.iter().filter(|listener| self.leads_to(listener, service));
            let ports: Vec<u16> = leading.map(|listener| listener.port).collect();
            for instance in entry.instances.iter().filter(|instance| is_gateway(instance)) {
                let open = ports.iter().filter(|port| !is_closed(instance, **port));
                found.extend(open.map(|port| (Arc::clone(instance), *port)));
            }
        }
        found
    }
}

fn is_gateway(instance: &Instance) -> bool {
    *instance.record.kind == *INGRESS_GATEWAY
}

fn is_closed(gateway: &Instance, port: u16) -> bool {
    let says_so = |check: &CheckRecord| {
        check.status != HealthStatus::Passing && closed_port(&gateway.record.id, &check.id) == Some(port)
    };
    gateway.checks.iter().any(|check| says_so(check))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::catalogue::{LocalView, ServiceEntry};
    use crate::model::{ServiceRecord, fixture};
    use crate::traffic::{Entries, Ready, Traffic};

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    fn service(snapshot: &mut Snapshot, of: &str, kind: &str, protocol: Protocol) {
        let record = ServiceRecord { kind: kind.into(), ..ServiceRecord::new(of.parse().unwrap(), name(of)) };
        let instance = Arc::new(fixture::instance(fixture::node_entry(fixture::node_info("n1")), record));
        let entry = ServiceEntry { name: name(of), protocol, instances: vec![instance], modify_index: 1 };
        snapshot.services.insert(name(of), Arc::new(entry));
    }

    /// Gateway `edge`, here and on node n1, service `web` that takes requests and `db` that does not; entries of gateways by
    /// name.
    fn snapshot(gateways: &[(&str, Value)]) -> Snapshot {
        let mut snapshot = Snapshot::empty("n1".parse().unwrap());
        service(&mut snapshot, "edge", INGRESS_GATEWAY, Protocol::Tcp);
        service(&mut snapshot, "web", "", Protocol::Http);
        service(&mut snapshot, "db", "", Protocol::Tcp);
        let mut entries = Entries::default();
        for (name, listeners) in gateways {
            let ready = Ready::new("ingress-gateway", &json!({"Listeners": listeners})).unwrap();
            entries.add("ingress-gateway", name, ready);
        }
        snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        let ip = [127, 0, 0, 1].into();
        let gateways =
            vec![LocalGateway { service: name("edge"), ip }, LocalGateway { service: name("unwritten"), ip }];
        snapshot.local = Arc::new(LocalView { gateways, ..LocalView::default() });
        snapshot
    }

    #[test]
    fn a_gateway_has_the_ports_of_its_entry_where_it_is_registered() {
        let listeners = json!([{"Port": 80, "Protocol": "http", "Services": [{"Name": "web"}]}, {"Port": 81, "Services": [{"Name": "db"}]}]);
        let snapshot = snapshot(&[("edge", listeners.clone()), ("elsewhere", listeners)]);
        let ports: Vec<String> =
            snapshot.gateway_ports().map(|port| format!("{} {}", port.gateway, port.bind)).collect();
        assert_eq!(ports, ["edge 127.0.0.1:80", "edge 127.0.0.1:81"]);
    }

    #[test]
    fn the_gateways_of_a_service_are_those_that_run_and_lead_to_it() {
        let every = json!([
            {"Port": 80, "Protocol": "http", "Services": [{"Name": "*"}]},
            {"Port": 81, "Protocol": "http", "Services": [{"Name": "web", "Hosts": ["x"]}]},
            {"Port": 82, "Services": [{"Name": "absent"}]},
        ]);
        // Entries alone, and services that are no gateways, lead nowhere.
        let others = json!([{"Port": 90, "Protocol": "http", "Services": [{"Name": "web"}]}]);
        let snapshot = snapshot(&[("edge", every), ("unwritten", others.clone()), ("db", others)]);
        let ports = |service: &str| -> Vec<(String, u16)> {
            let found = snapshot.ingress(service);
            found.into_iter().map(|(instance, port)| (instance.record.name.to_string(), port)).collect()
        };
        let edge = |port| ("edge".to_owned(), port);
        assert_eq!(ports("web"), [edge(80), edge(81)]);
        assert_eq!(ports("WEB"), [edge(81)], "named in any case");
        assert_eq!(ports("absent"), [edge(82)], "named, it need not be there");
        for none in ["db", "edge", "nobody", "-"] {
            assert_eq!(ports(none), [], "{none}");
        }
    }

    #[test]
    fn a_port_that_could_not_be_opened_is_no_way_into_the_mesh() {
        let listeners = json!([
            {"Port": 80, "Protocol": "http", "Services": [{"Name": "web"}]},
            {"Port": 81, "Protocol": "http", "Services": [{"Name": "web"}]},
            {"Port": 8, "Services": [{"Name": "db"}]},
        ]);
        let mut snapshot = snapshot(&[("edge", listeners)]);
        let gateway: InstanceId = "edge".parse().unwrap();
        let id = |port| closed_port_check(&gateway, port).unwrap();
        let mut says = |checks: &[(CheckId, HealthStatus)]| {
            let check = |(id, status): &(CheckId, HealthStatus)| {
                let (name, notes, kind) = Default::default();
                Arc::new(CheckRecord { id: id.clone(), name, status: *status, notes, service: None, kind })
            };
            let entry = Arc::make_mut(snapshot.services.get_mut("edge").unwrap());
            Arc::make_mut(&mut entry.instances[0]).checks = checks.iter().map(check).collect();
            ["web", "db"].map(|of| snapshot.ingress(of).into_iter().map(|(_, port)| port).collect::<Vec<u16>>())
        };
        let warning = HealthStatus::Warning;
        let one = says(&[(gateway_check(&gateway).unwrap(), warning), (id(80), warning)]);
        assert_eq!(one, [vec![81], vec![8]], "neither the check of all nor a port that begins alike");
        assert_eq!(says(&[(id(80), warning), (id(81), warning)]), [vec![], vec![8]]);
        assert_eq!(says(&[(id(80), HealthStatus::Passing)]), [vec![80, 81], vec![8]]);
        let other: InstanceId = "edg".parse().unwrap();
        assert_eq!(says(&[(closed_port_check(&other, 80).unwrap(), warning)]), [vec![80, 81], vec![8]]);
    }
}

//! `ingress-gateway`: the ports by which calls come into the mesh, and which service a call that comes there is for.
//!
//! ```text
//!   port --tcp--> the listener's one service
//!       \--http--> host of the request: exact -> *.suffix, the longest -> NAME.ingress.* -> *
//! ```
//!
//! Hosts have no case, port or final dot. A service without `Hosts` has the host `NAME.ingress.*`, as in Consul; the service
//! `*` stands for every service that takes requests, each under that name of its own, where nothing else does.
//! Not here: which hosts run a gateway and whether a service that `*` stands for is there (`catalogue`), listening and
//! carrying (`proxy`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::entry::{Entry, HeaderEdit};
use super::fields::{Node, Object, Problems, says_nothing};
use super::read::route::edits;
use crate::model::{Protocol, ServiceName};

/// Most ports of one gateway.
const LISTENERS_MAX: usize = 64;
/// Most services of one port; an entry of 32 KiB has no room for more with a host each.
const SERVICES_MAX: usize = 512;
/// Most hosts of one service.
const HOSTS_MAX: usize = 64;
/// Longest host (RFC 1035 §2.3.4, without the dots at the ends).
const HOST_BYTES_MAX: usize = 253;
/// Longest part of a host between two dots.
const LABEL_BYTES_MAX: usize = 63;
/// What stands between a service's name and the rest of the host that it has by itself.
const OWN_HOST: &str = ".ingress.";

/// A gateway's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// As they were written; no two have one port.
    pub listeners: Vec<GatewayListener>,
}

/// One port of a gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayListener {
    /// From 1.
    pub port: u16,
    /// How what comes is parsed: never datagrams.
    pub protocol: Protocol,
    /// At least one; of a port for bytes exactly one.
    pub services: Vec<Arc<Exposed>>,
    hosts: Hosts,
}

/// A service that a port leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// None: every service that takes requests.
    pub service: Option<ServiceName>,
    /// In lower case; empty: `NAME.ingress.*`.
    pub hosts: Vec<Box<str>>,
    /// Of the request, before routes and intentions look at it.
    pub request_headers: HeaderEdit,
    /// Of the response.
    pub response_headers: HeaderEdit,
}

/// Which service a host means.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Hosts {
    exact: BTreeMap<String, Arc<Exposed>>,
    /// What follows `*.`.
    suffixes: BTreeMap<String, Arc<Exposed>>,
    /// Services without hosts, by their names in lower case.
    own: BTreeMap<String, Arc<Exposed>>,
    /// The service `*`.
    every: Option<Arc<Exposed>>,
    /// The host `*`.
    any: Option<Arc<Exposed>>,
}

impl GatewayListener {
    /// Finds whom a request to `host` (without a port) is for. What was found for the service `*` need not exist.
    pub fn find(&self, host: &str) -> Option<(ServiceName, &Arc<Exposed>)> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.len() > HOST_BYTES_MAX {
            return None;
        }
        let host = host.to_ascii_lowercase();
        let named = |found: &Arc<Exposed>| found.service.clone();
        let hosts = &self.hosts;
        if let Some(found) = hosts.exact.get(&host).or_else(|| hosts.by_suffix(&host)) {
            return Some((named(found)?, found));
        }
        if let Some((own, rest)) = host.split_once(OWN_HOST)
            && !rest.is_empty()
        {
            if let Some(found) = hosts.own.get(own) {
                return Some((named(found)?, found));
            }
            if let (Some(found), Ok(name)) = (&hosts.every, own.parse()) {
                return Some((name, found));
            }
        }
        let found = hosts.any.as_ref()?;
        Some((named(found)?, found))
    }

    /// Returns the service of a port for bytes.
    pub fn stream(&self) -> Option<&ServiceName> {
        if self.protocol.is_http() { None } else { self.services.first()?.service.as_ref() }
    }

    /// Tells whether the port leads to `service` by its name (in any case).
    pub fn names(&self, service: &str) -> bool {
        let named = self.services.iter().filter_map(|exposed| exposed.service.as_ref());
        named.map(ServiceName::as_str).any(|name| name.eq_ignore_ascii_case(service))
    }

    /// Tells whether what comes by the port can be carried to services of `protocol`: requests to those that take them, bytes
    /// to those that take bytes. Instances refuse bytes where requests are due, for nobody would look at their heads.
    pub(super) fn takes(&self, protocol: Protocol) -> bool {
        protocol != Protocol::Udp && protocol.is_http() == self.protocol.is_http()
    }

    /// Tells whether the port leads to every service that takes requests.
    pub fn leads_to_every(&self) -> bool {
        self.hosts.every.is_some()
    }
}

impl Hosts {
    fn by_suffix(&self, host: &str) -> Option<&Arc<Exposed>> {
        if self.suffixes.is_empty() {
            return None;
        }
        let mut rests = host.match_indices('.').filter(|(at, _)| *at > 0).filter_map(|(at, _)| host.get(at + 1..));
        rests.find_map(|rest| self.suffixes.get(rest))
    }

    /// Enters a service; names what is entered twice.
    fn enter(&mut self, exposed: &Arc<Exposed>, path: &str, problems: &mut Problems) {
        let Some(service) = &exposed.service else {
            self.every = Some(Arc::clone(exposed));
            return;
        };
        if exposed.hosts.is_empty() {
            self.own.insert(service.as_str().to_ascii_lowercase(), Arc::clone(exposed));
        }
        for host in &exposed.hosts {
            let before = match host.strip_prefix('*') {
                Some("") => self.any.replace(Arc::clone(exposed)),
                Some(rest) => self.suffixes.insert(rest.trim_start_matches('.').to_owned(), Arc::clone(exposed)),
                None => self.exact.insert(host.to_string(), Arc::clone(exposed)),
            };
            if before.is_some() {
                problems.add(format!("{path}.Hosts"), format!("have {host:?}, which this listener has already"));
            }
        }
    }
}

/// Reads what an entry of this kind has of its own.
pub(super) fn read(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    no_tls(object, problems);
    no_limits(object, &["Defaults"], problems);
    let listeners = object.list("Listeners", LISTENERS_MAX, problems);
    let listeners: Vec<GatewayListener> = listeners.iter().filter_map(|node| listener(node, problems)).collect();
    let mut ports = BTreeSet::new();
    for listener in &listeners {
        if !ports.insert(listener.port) {
            problems.add("Listeners", format!("have port {} twice: give its services to one listener", listener.port));
        }
    }
    Entry::Gateway(Gateway { listeners })
}

fn listener(node: &Node<'_>, problems: &mut Problems) -> Option<GatewayListener> {
    let mut object = node.object(problems);
    let path = object.path_of("Port");
    let port = if let Some(given) = object.take("Port") {
        let port = given.value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        if port.is_none() {
            problems.add(path, "must be a port from 1 to 65535");
        }
        port
    } else {
        problems.add(path, "is missing: a listener has a port from 1 to 65535");
        None
    };
    let protocol = protocol(&mut object, problems);
    no_tls(&mut object, problems);
    no_limits(&mut object, &["MaxConnections", "MaxPendingRequests", "MaxConcurrentRequests"], problems);
    let nodes = object.list("Services", SERVICES_MAX, problems);
    let mut services: Vec<Arc<Exposed>> = Vec::with_capacity(nodes.len());
    let mut hosts = Hosts::default();
    for node in &nodes {
        let Some(exposed) = exposed(node, protocol, problems).map(Arc::new) else { continue };
        if services.iter().any(|other| other.service == exposed.service) {
            let name = exposed.service.as_ref().map_or("*", ServiceName::as_str);
            problems.add(&*node.path, format!("is {name}, which this listener has already: give it all hosts at once"));
        }
        hosts.enter(&exposed, &node.path, problems);
        services.push(exposed);
    }
    let path = object.path_of("Services");
    match (nodes.len(), protocol.is_http()) {
        (0, _) => problems.add(path, "are missing: a listener leads to a service"),
        (1, _) | (_, true) => {}
        (count, false) => {
            problems.add(path, format!("are {count}: bytes name nobody, so a port of protocol tcp has one"));
        }
    }
    object.finish(problems);
    Some(GatewayListener { port: port?, protocol, services, hosts })
}

fn protocol(object: &mut Object<'_>, problems: &mut Problems) -> Protocol {
    let path = object.path_of("Protocol");
    let Some(text) = object.text("Protocol", problems) else { return Protocol::Tcp };
    match text.parse() {
        Ok(protocol) if protocol != Protocol::Udp => protocol,
        _ => {
            problems.add(path, format!("must be tcp, http, http2 or grpc, and is {text:?}"));
            // What follows is held against the milder rules: one mistake is one problem.
            Protocol::Http
        }
    }
}

fn exposed(node: &Node<'_>, protocol: Protocol, problems: &mut Problems) -> Option<Exposed> {
    let mut object = node.object(problems);
    object.tenancy(problems);
    no_tls(&mut object, problems);
    let limits = ["MaxConnections", "MaxPendingRequests", "MaxConcurrentRequests", "PassiveHealthCheck"];
    no_limits(&mut object, &limits, problems);
    let path = object.path_of("Name");
    let service = match object.text("Name", problems) {
        None => {
            problems.add(path, "is missing: the service, or *");
            None
        }
        Some("*") if !protocol.is_http() => {
            problems.add(path, "is *, and bytes name nobody: a port of protocol tcp names its service");
            None
        }
        Some("*") => Some(None),
        Some(text) => match text.parse::<ServiceName>() {
            Ok(name) => Some(Some(name)),
            Err(error) => {
                problems.add(path, format!("is no service's name: {error}"));
                None
            }
        },
    };
    let path = object.path_of("Hosts");
    let given = object.texts("Hosts", HOSTS_MAX, problems);
    if !given.is_empty() && !protocol.is_http() {
        problems.add(&*path, "are refused: bytes name no host, so a port of protocol tcp has none");
    }
    if !given.is_empty() && service == Some(None) {
        problems.add(&*path, "are refused for the service *: each service is at NAME.ingress.*");
    }
    let hosts = given.into_iter().filter_map(|(path, text)| host(text, path, problems)).collect();
    let request_headers = edits(&mut object, "RequestHeaders", problems);
    let response_headers = edits(&mut object, "ResponseHeaders", problems);
    let has_edits = !request_headers.is_empty() || !response_headers.is_empty();
    if has_edits && !protocol.is_http() {
        problems.add(&*node.path, "changes headers, and bytes have none: the listener's protocol is tcp");
    }
    object.finish(problems);
    Some(Exposed { service: service?, hosts, request_headers, response_headers })
}

/// Reads a host: a name, `*.` and a name, or `*`; in lower case.
fn host(text: &str, path: String, problems: &mut Problems) -> Option<Box<str>> {
    let host = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let name = host.strip_prefix("*.").unwrap_or(&host);
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_label = |label: &str| (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(is_letter);
    if host == "*" || (host.len() <= HOST_BYTES_MAX && name.split('.').all(is_label)) {
        return Some(host.into());
    }
    let start: String = text.chars().take(LABEL_BYTES_MAX).collect();
    problems.add(path, format!("must be a host without a port, `*.` and the end of hosts, or `*`, and is {start:?}"));
    None
}

/// Takes `TLS`, which must say nothing.
fn no_tls(object: &mut Object<'_>, problems: &mut Problems) {
    let Some(mut tls) = object.object("TLS", problems) else { return };
    let path = tls.path_of("Enabled");
    if tls.flag("Enabled", problems) {
        problems.add(
            path,
            "is refused: gateways of this version speak no TLS; end it before them (a load balancer, nginx, HAProxy), or \
             lead a port of protocol tcp to a service that speaks TLS itself",
        );
    }
    tls.refuse(&["TLSMinVersion", "TLSMaxVersion", "CipherSuites", "SDS"], problems);
    tls.finish(problems);
}

/// Takes Consul's limits of a gateway, which stand elsewhere.
fn no_limits(object: &mut Object<'_>, names: &[&str], problems: &mut Problems) {
    for name in names {
        if let Some(node) = object.take(name).filter(|node| !says_nothing(node.value)) {
            let rule = "is refused here: what a gateway may have under way stands in service-defaults of the gateway's name, UpstreamConfig";
            problems.add(node.path, rule);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Entries, Ready, Traffic, check_write};
    use super::*;

    #[track_caller]
    fn gateway(value: &Value) -> Arc<Gateway> {
        match Ready::new("ingress-gateway", value) {
            Ok(Ready::Gateway(gateway)) => gateway,
            Ok(other) => panic!("{other:?}"),
            Err(problems) => panic!("{problems}"),
        }
    }

    #[track_caller]
    fn refused(value: &Value, want: &[&str]) {
        let problems = Ready::new("ingress-gateway", value).map(|_| ()).expect_err("it is refused");
        let mut said: Vec<String> = problems.0.iter().map(ToString::to_string).collect();
        for want in want {
            let at = said
                .iter()
                .position(|one| one.contains(want))
                .unwrap_or_else(|| panic!("{want:?} is not in {said:#?}"));
            said.remove(at);
        }
        assert!(said.is_empty(), "more than is wrong: {said:#?}");
    }

    fn listener(services: &Value) -> Value {
        json!({"Kind": "ingress-gateway", "Name": "edge", "Listeners": [{"Port": 80, "Protocol": "http", "Services": services}]})
    }

    #[test]
    fn the_most_exact_host_wins_and_hosts_have_neither_case_nor_final_dot() {
        let gateway = gateway(&listener(&json!([
            {"Name": "shop", "Hosts": ["Shop.example.", "*.shop.example"]},
            {"Name": "wide", "Hosts": ["*.example"]},
            {"Name": "web"},
            {"Name": "Big"},
            {"Name": "*"},
            {"Name": "rest", "Hosts": ["*"]},
        ])));
        let port = &gateway.listeners[0];
        let finds = |host: &str| port.find(host).map(|(name, _)| name.to_string());
        for (host, want) in [
            ("shop.example", "shop"),
            ("SHOP.Example.", "shop"),
            ("a.shop.example", "shop"),
            ("a.b.shop.example", "shop"),
            ("other.example", "wide"),
            ("web.ingress.example", "wide"),
            ("web.ingress.consul", "web"),
            ("WEB.ingress.dc1.weft", "web"),
            ("big.ingress.weft", "Big"),
            ("other.ingress.weft", "other"),
            ("web.ingress", "rest"),
            ("web.ingress.", "rest"),
            ("-.ingress.weft", "rest"),
            ("example", "rest"),
            (".example", "rest"),
            ("", "rest"),
        ] {
            assert_eq!(finds(host).as_deref(), Some(want), "{host}");
        }
        assert_eq!(finds(&"a.".repeat(128)), None, "longer than any name");
        assert!(port.names("WEB") && !port.names("other") && port.leads_to_every());
        assert_eq!(port.stream(), None);
    }

    #[test]
    fn a_host_that_nothing_is_about_leads_nowhere() {
        let gateway = gateway(&listener(&json!([{"Name": "shop", "Hosts": ["*.shop.example"]}, {"Name": "web"}])));
        for host in ["shop.example", "shop.ingress.weft", "other.ingress.weft", "", "webs.ingress.weft", "x"] {
            assert!(gateway.listeners[0].find(host).is_none(), "{host}");
        }
    }

    #[test]
    fn a_port_for_bytes_leads_to_its_one_service() {
        let gateway = gateway(&json!({"Listeners": [{"port": 5432, "services": [{"name": "db"}]}], "Meta": {"a": "b"},
            "TLS": {"Enabled": false, "CipherSuites": []}, "Defaults": {"MaxConnections": 0}}));
        let port = &gateway.listeners[0];
        assert_eq!((port.port, port.protocol), (5432, Protocol::Tcp));
        assert_eq!(port.stream().map(ServiceName::as_str), Some("db"));
    }

    #[test]
    fn every_problem_is_named_with_its_field() {
        refused(
            &json!({"TLS": {"Enabled": true, "TLSMinVersion": "TLSv1_2"}, "Defaults": {"MaxConnections": 5}, "Colour": 1, "Listeners": [
                {"Port": 0, "Protocol": "http", "Services": [{"Name": "web", "Hosts": ["a.example:80", "*.b.*", "b..c", "ok.example"]}]},
                {"Protocol": "udp", "Services": [{"Name": "web", "TLS": {"SDS": {"ClusterName": "x"}}}], "TLS": {"Enabled": true}},
                {"Port": 81, "Services": [{"Name": "*"}, {"Name": "b", "Hosts": ["x"], "RequestHeaders": {"Set": {"a": "b"}}}]},
                {"Port": 82, "Protocol": "grpc", "Services": []},
                {"Port": 83, "Protocol": "http", "Services": [
                    {"Name": "*", "Hosts": ["x"]}, {"Name": "c", "Hosts": ["y", "Y"]}, {"Name": "c"}, {"Name": "d", "Hosts": ["y"]}, {"Name": "/"}, {},
                    {"Name": "e", "MaxConnections": 3, "ResponseHeaders": {"Set": {"host": "x"}}, "Namespace": "n"}]},
                {"Port": 83, "Services": [{"Name": "db"}]},
            ]}),
            &[
                "TLS.Enabled is refused: gateways of this version speak no TLS",
                "TLS.TLSMinVersion is refused",
                "Defaults is refused here",
                "Colour is no field",
                "Listeners[0].Port must be a port",
                "Listeners[0].Services[0].Hosts[0] must be a host without a port",
                "Listeners[0].Services[0].Hosts[1] must be",
                "Listeners[0].Services[0].Hosts[2] must be",
                "Listeners[1].Port is missing",
                "Listeners[1].Protocol must be tcp, http, http2 or grpc, and is \"udp\"",
                "Listeners[1].Services[0].TLS.SDS is refused",
                "Listeners[1].TLS.Enabled is refused",
                "Listeners[2].Services[0].Name is *, and bytes name nobody",
                "Listeners[2].Services[1].Hosts are refused",
                "Listeners[2].Services[1] changes headers",
                "Listeners[2].Services are 2",
                "Listeners[3].Services are missing",
                "Listeners[4].Services[0].Hosts are refused for the service *",
                "Listeners[4].Services[1].Hosts have \"y\", which this listener has already",
                "Listeners[4].Services[2] is c, which this listener has already",
                "Listeners[4].Services[3].Hosts have \"y\", which this listener has already",
                "Listeners[4].Services[4].Name is no service's name",
                "Listeners[4].Services[5].Name is missing",
                "Listeners[4].Services[6].MaxConnections is refused here",
                "Listeners[4].Services[6].ResponseHeaders.Set",
                "Listeners[4].Services[6].Namespace is refused",
                "Listeners have port 83 twice",
            ],
        );
    }

    #[test]
    fn an_entry_whose_service_speaks_otherwise_is_refused_whichever_of_the_two_is_written_last() {
        let edge = listener(&json!([{"Name": "web"}, {"Name": "*"}]));
        let defaults = |protocol: &str| json!({"Protocol": protocol});
        let with = |held: &[(&str, &str, &Value)], new: (&str, &str, &Value)| {
            check_write(held.iter().copied(), (new.0, new.1, Some(new.2))).map_err(|problems| problems.to_string())
        };
        let (tcp, http) = (defaults("tcp"), defaults("http"));
        let (edge, of_tcp, of_http) =
            (("ingress-gateway", "edge", &edge), ("service-defaults", "web", &tcp), ("service-defaults", "web", &http));
        for (held, new) in [(of_tcp, edge), (edge, of_tcp)] {
            let said = with(&[held], new).unwrap_err();
            assert!(
                said.contains("ingress-gateway:edge Listeners[0].Services[0] is web, whose protocol is tcp"),
                "{said}"
            );
        }
        assert_eq!(with(&[of_http], edge), Ok(()));
        assert_eq!(with(&[], edge), Ok(()));
        // Bytes go to no app that takes requests.
        let bytes = json!({"Listeners": [{"Port": 90, "Services": [{"Name": "web"}]}]});
        let bytes = ("ingress-gateway", "bytes", &bytes);
        for (held, new) in [(of_http, bytes), (bytes, of_http)] {
            let said = with(&[held], new).unwrap_err();
            let want = "ingress-gateway:bytes Listeners[0].Services[0] is web, whose protocol is http";
            assert!(said.contains(want) && said.contains("the listener's is tcp"), "{said}");
        }
        assert_eq!(with(&[of_tcp], bytes), Ok(()));
    }

    #[test]
    fn an_entry_that_is_taken_out_leaves_no_gateway() {
        let name: ServiceName = "edge".parse().unwrap();
        let mut entries = Entries::default();
        let ready = Ready::new("ingress-gateway", &listener(&json!([{"Name": "web"}]))).unwrap();
        entries.add("ingress-gateway", "edge", ready);
        assert!(!entries.is_empty());
        let traffic = Traffic::new(entries.clone(), &Traffic::default(), Vec::new());
        assert!(traffic.gateway(&name).is_some() && traffic.gateways().count() == 1 && traffic.is_empty());
        entries.remove("ingress-gateway", "edge");
        assert!(entries.is_empty());
        assert!(Traffic::new(entries, &traffic, Vec::new()).gateway(&name).is_none());
    }
}

//! Every row of api/dns.md, against the small mesh of `fuzz`; and answers as they stand on the wire.

use std::collections::BTreeSet;
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::answer::{Beside, Responder};
use super::fuzz::mesh;
use super::message::{Decoded, Recursion, Via, decode, encode, encode_found};
use super::near::Trips;
use super::zone::{Zone, ZoneCell};
use super::{DnsConfig, DomainName};
use crate::catalogue::{Externals, Publisher, Snapshot};
use crate::model::{
    CheckRecord, ExternalRecord, HealthStatus, MemberStatus, Protocol, ServiceRecord, TextMap, Weights,
};
use crate::prepared::Book;

/// How a question is asked.
#[derive(Clone, Copy)]
struct How {
    via: Via,
    /// Bytes by EDNS.
    edns: Option<u16>,
    seed: u64,
}

const LOCAL: How = How { via: Via::UdpLocal, edns: Some(4096), seed: 1 };
const PLAIN: How = How { edns: None, ..LOCAL };

struct Server {
    responder: Responder,
    zone: Zone,
    trips: Option<Trips>,
    /// This agent's own.
    from_here: Option<Arc<Trips>>,
    queries: Book,
}

impl Server {
    fn new() -> Self {
        Self::with(|_| {}, mesh())
    }

    fn with(change: impl FnOnce(&mut DnsConfig), snapshot: Snapshot) -> Self {
        let mut config = DnsConfig::on(Vec::new());
        change(&mut config);
        Self {
            responder: Responder::new(config, "dc1".to_owned()),
            zone: Zone::new(Arc::new(snapshot), None),
            trips: None,
            from_here: None,
            queries: Book::default(),
        }
    }

    /// The answer as it stands on the wire; none if the name is somebody else's.
    fn wire(&self, name: &str, kind: RecordType, how: How) -> Option<Vec<u8>> {
        let Decoded::Ask(request) = decode(&question(name, kind, how), how.via) else { panic!("{name} is a question") };
        let mut rng = StdRng::seed_from_u64(how.seed);
        let from_here = || self.from_here.clone();
        let beside = Beside { trips: self.trips.as_ref(), queries: &self.queries, from_here: &from_here };
        let answers = self.responder.answer(&self.zone, &request, &beside, &mut rng)?;
        Some(encode(&request, answers, Recursion::None))
    }

    fn message(&self, name: &str, kind: RecordType, how: How) -> Message {
        Message::from_vec(&self.wire(name, kind, how).unwrap_or_else(|| panic!("{name} is one of ours"))).unwrap()
    }

    /// `CODE: answers | authority | additional`, each sorted, as dig would print them less class and TTL.
    fn shown(&self, name: &str, kind: RecordType) -> String {
        show(&self.message(name, kind, LOCAL))
    }

    #[track_caller]
    fn check(&self, name: &str, kind: RecordType, want: &str) {
        assert_eq!(self.shown(name, kind), want, "{name} {kind}");
    }
}

fn question(name: &str, kind: RecordType, how: How) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(bytes) = how.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(bytes);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

fn show(message: &Message) -> String {
    let section = |records: &[hickory_proto::rr::Record]| {
        let mut lines: Vec<String> =
            records.iter().map(|record| format!("{} {} {}", record.name, record.record_type(), record.data)).collect();
        lines.sort();
        lines.join(", ")
    };
    let code = match message.metadata.response_code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::NXDomain => "NXDOMAIN",
        _ => "OTHER",
    };
    let sections = [&message.answers, &message.authorities, &message.additionals].map(|records| section(records));
    format!("{code}: {}", sections.join(" | ").trim_end_matches([' ', '|']))
}

const SOA: &str = "weft. SOA ns.weft. hostmaster.weft. 5000 3600 600 86400 0";

fn nothing(domain_soa: &str) -> String {
    format!("NXDOMAIN:  | {domain_soa}")
}

fn no_data() -> String {
    format!("NOERROR:  | {SOA}")
}

#[test]
fn services_have_the_addresses_of_their_healthy_instances() {
    let server = Server::new();
    let check = |name: &str, want: &str| server.check(name, RecordType::A, want);
    check("web.service.weft.", "NOERROR: web.service.weft. A 10.0.0.1, web.service.weft. A 192.0.2.10");
    check("web.service.dc1.weft.", "NOERROR: web.service.dc1.weft. A 10.0.0.1, web.service.dc1.weft. A 192.0.2.10");
    check("v1.web.service.weft.", "NOERROR: v1.web.service.weft. A 10.0.0.1");
    check("V2.WEB.Service.Consul.", "NOERROR: V2.WEB.Service.Consul. A 192.0.2.10");
    check("mixed.service.weft.", "NOERROR: mixed.service.weft. A 10.0.0.1");
    check("far.service.dc2.weft.", "NOERROR: far.service.dc2.weft. A 10.0.2.1");
    for absent in [
        "far.service.weft.",
        "web.service.dc2.weft.",
        "web.service.dc9.weft.",
        "v3.web.service.weft.",
        "sick.service.weft.",
        "no.service.weft.",
        "a.b.web.service.weft.",
        "far.ingress.weft.",
        "web.ingress.dc9.weft.",
        "q.query.weft.",
        "x.y.z.weft.",
    ] {
        check(absent, &nothing(SOA));
    }
    check("no.service.consul.", &nothing(&SOA.replace("weft", "consul")));
    server.check("six.service.weft.", RecordType::AAAA, "NOERROR: six.service.weft. AAAA 2001:db8::3");
    server.check("six.service.weft.", RecordType::ANY, "NOERROR: six.service.weft. AAAA 2001:db8::3");
    server.check("named.service.weft.", RecordType::A, "NOERROR: named.service.weft. CNAME app.example.org.");
}

#[test]
fn a_service_s_healthy_gateways_answer_at_the_ports_of_their_entry() {
    let server = Server::new();
    server.check(
        "web.ingress.weft.",
        RecordType::A,
        "NOERROR: web.ingress.weft. A 10.0.0.1, web.ingress.weft. A 192.0.2.20",
    );
    server.check("mixed.ingress.dc2.weft.", RecordType::A, "NOERROR: mixed.ingress.dc2.weft. A 10.0.2.1");
    let want = "NOERROR: web.ingress.weft. SRV 1 10 8080 n1.node.dc1.weft., web.ingress.weft. SRV 1 2 8080 c0000214.addr.dc1.weft. |  | \
                c0000214.addr.dc1.weft. A 192.0.2.20, n1.node.dc1.weft. A 10.0.0.1";
    server.check("web.ingress.weft.", RecordType::SRV, want);
    let six = server.shown("six.ingress.dc2.consul.", RecordType::SRV);
    assert!(six.starts_with("NOERROR: six.ingress.dc2.consul. SRV 1 10 9000 m1.node.dc2.consul."), "{six}");
    // Discovery still lists the gateway itself as it is registered.
    server.check("edge.service.dc2.weft.", RecordType::A, "NOERROR: edge.service.dc2.weft. A 10.0.2.1");
    let careful = Server::with(|config| config.only_passing = true, mesh());
    careful.check("web.ingress.weft.", RecordType::A, "NOERROR: web.ingress.weft. A 10.0.0.1");
}

#[test]
fn srv_records_lead_to_names_whose_addresses_come_along() {
    let server = Server::new();
    let want = "NOERROR: web.service.weft. SRV 1 10 80 n1.node.dc1.weft., web.service.weft. SRV 1 2 81 c000020a.addr.dc1.weft. |  | \
                c000020a.addr.dc1.weft. A 192.0.2.10, n1.node.dc1.weft. A 10.0.0.1";
    server.check("web.service.weft.", RecordType::SRV, want);
    server.check(
        "_web._tcp.service.weft.",
        RecordType::SRV,
        &want.replace("web.service.weft. SRV", "_web._tcp.service.weft. SRV"),
    );
    server.check(
        "_web._v2.service.consul.",
        RecordType::SRV,
        "NOERROR: _web._v2.service.consul. SRV 1 2 81 c000020a.addr.dc1.consul. |  | c000020a.addr.dc1.consul. A 192.0.2.10",
    );
    server.check("_web._v9.service.weft.", RecordType::SRV, &nothing(SOA));
    server.check("_web._tcp.service.weft.", RecordType::A, &no_data());
    server.check("named.service.weft.", RecordType::SRV, "NOERROR: named.service.weft. SRV 1 10 9 app.example.org.");
    let six = "20010db8000000000000000000000003.addr.dc1.weft.";
    server.check(
        "six.service.weft.",
        RecordType::SRV,
        "NOERROR: six.service.weft. SRV 1 10 6 N3.x.node.dc1.weft. |  | N3.x.node.dc1.weft. AAAA 2001:db8::3",
    );
    // Both kinds of targets resolve.
    server.check("c000020a.addr.dc1.weft.", RecordType::A, "NOERROR: c000020a.addr.dc1.weft. A 192.0.2.10");
    server.check("c000020a.addr.dc1.weft.", RecordType::AAAA, &no_data());
    server.check(six, RecordType::AAAA, &format!("NOERROR: {six} AAAA 2001:db8::3"));
    server.check("n3.X.node.dc1.weft.", RecordType::AAAA, "NOERROR: n3.X.node.dc1.weft. AAAA 2001:db8::3");
    server.check("c000020a.addr.dc9.weft.", RecordType::A, &nothing(SOA));
}

#[test]
fn nodes_have_an_address_and_their_meta() {
    let server = Server::new();
    server.check("n1.node.weft.", RecordType::A, "NOERROR: n1.node.weft. A 10.0.0.1");
    server.check("n1.node.dc1.consul.", RecordType::A, "NOERROR: n1.node.dc1.consul. A 10.0.0.1");
    server.check("m1.node.dc2.weft.", RecordType::A, "NOERROR: m1.node.dc2.weft. A 10.0.2.1");
    server.check("n1.node.weft.", RecordType::AAAA, &no_data());
    server.check("n1.node.weft.", RecordType::TXT, "NOERROR: n1.node.weft. TXT plain, n1.node.weft. TXT rack=a");
    server.check("x.node.weft.", RecordType::A, &no_data());
    for absent in ["n9.node.weft.", "m1.node.weft.", "n1.node.dc2.weft."] {
        server.check(absent, RecordType::A, &nothing(SOA));
    }
    let mut snapshot = mesh();
    Arc::make_mut(snapshot.nodes.get_mut("n2").unwrap()).status = MemberStatus::Left;
    let server = Server::with(|_| {}, snapshot);
    server.check("n2.node.weft.", RecordType::A, &nothing(SOA));
    assert!(server.wire("2.0.0.10.in-addr.arpa.", RecordType::PTR, LOCAL).is_none());
}

#[test]
fn prepared_queries_are_executed_by_name_id_and_template() {
    let with_ttl = |config: &mut DnsConfig| config.service_ttl.by_name = [("web".to_owned(), 3)].into();
    let mut server = Server::with(with_ttl, mesh());
    let template = serde_json::json!({"Type": "name_prefix_match", "Regexp": "^geo-(.*)$"});
    server.queries = Book::of_bodies(&[
        serde_json::json!({"Name": "any-web", "Service": {"Service": "web"}, "DNS": {"TTL": "9s"}}),
        serde_json::json!({"Name": "only", "Service": {"Service": "web", "OnlyPassing": true}}),
        serde_json::json!({"Name": "geo-", "Template": template, "Service": {"Service": "${match(1)}"}}),
        serde_json::json!({"Name": "a.b", "Service": {"Service": "web", "Tags": ["v2"]}}),
        serde_json::json!({"Name": "away", "Service": {"Service": "far", "Failover": {"Datacenters": ["dc2"]}}}),
        serde_json::json!({"Name": "mesh", "Service": {"Service": "web", "Connect": true}}),
        serde_json::json!({"Name": "all", "Service": {"Service": "many"}}),
        serde_json::json!({"Name": "near", "Service": {"Service": "web", "Near": "_agent"}}),
    ]);
    let a = RecordType::A;
    let both = "NOERROR: any-web.query.weft. A 10.0.0.1, any-web.query.weft. A 192.0.2.10";
    server.check("any-web.query.weft.", a, both);
    server.check("ANY-Web.query.dc1.consul.", a, &both.replace("any-web.query.weft", "ANY-Web.query.dc1.consul"));
    server.check("1.query.weft.", a, &both.replace("any-web.query", "1.query"));
    server.check("only.query.weft.", a, "NOERROR: only.query.weft. A 10.0.0.1");
    server.check("geo-six.query.weft.", RecordType::AAAA, "NOERROR: geo-six.query.weft. AAAA 2001:db8::3");
    server.check("a.b.query.weft.", a, "NOERROR: a.b.query.weft. A 192.0.2.10");
    server.check("away.query.weft.", a, "NOERROR: away.query.weft. A 10.0.2.1");
    server.check("away.query.dc2.weft.", a, "NOERROR: away.query.dc2.weft. A 10.0.2.1");
    let srv = "NOERROR: any-web.query.weft. SRV 1 10 80 n1.node.dc1.weft., any-web.query.weft. SRV 1 2 81 c000020a.addr.dc1.weft. |  | \
               c000020a.addr.dc1.weft. A 192.0.2.10, n1.node.dc1.weft. A 10.0.0.1";
    server.check("any-web.query.weft.", RecordType::SRV, srv);
    server.check("_any-web._tcp.query.weft.", RecordType::SRV, &srv.replace("any-web.query", "_any-web._tcp.query"));
    server.check("only.query.weft.", RecordType::TXT, &no_data());
    let mesh = server.shown("mesh.query.weft.", RecordType::SRV);
    assert!(
        mesh.contains("SRV 1 10 8301 n1.node.dc1.weft.") && mesh.contains("SRV 1 2 8301 n2.node.dc1.weft."),
        "{mesh}"
    );
    for absent in ["no.query.weft.", "geo-nobody.query.weft.", "any-web.query.dc9.weft.", "x.any-web.query.weft."] {
        server.check(absent, a, &nothing(SOA));
    }

    // Its own time to live, or that of the service.
    let ttl = |name: &str| server.message(name, a, LOCAL).answers[0].ttl;
    assert_eq!((ttl("any-web.query.weft."), ttl("only.query.weft.")), (9, 3));
    // Bounds of an answer are those of services.
    assert_eq!(server.message("all.query.weft.", a, PLAIN).answers.len(), 3);
    let cut = server.message("all.query.weft.", RecordType::SRV, How { edns: Some(1232), via: Via::Udp, ..LOCAL });
    assert!(cut.metadata.truncation && !cut.answers.is_empty());
    // It says itself whether the nearest come first.
    let far = [("n1", 9), ("n2", 1)].map(|(node, ms)| (node.parse().unwrap(), std::time::Duration::from_millis(ms)));
    server.from_here = Some(Arc::new(far.into()));
    for seed in 0..10 {
        let first = server.message("near.query.weft.", a, How { seed, ..LOCAL }).answers[0].data.to_string();
        assert_eq!(first, "192.0.2.10");
    }
}

#[test]
fn nodes_without_an_agent_are_found_like_others_and_never_by_the_mesh() {
    let mut snapshot = mesh();
    let record = |node: &str, address: &str, own: &str, status: HealthStatus| ExternalRecord {
        name: node.parse().unwrap(),
        id: Box::default(),
        address: address.into(),
        tagged_addresses: TextMap::default(),
        meta: [("rack", "z1".into())].into_iter().collect(),
        services: [Arc::new(ServiceRecord {
            id: "db-1".parse().unwrap(),
            name: "db".parse().unwrap(),
            kind: Box::default(),
            tags: ["primary".into()].into(),
            meta: TextMap::default(),
            address: own.into(),
            port: 5432,
            tagged_addresses: TextMap::default(),
            weights: Weights::default(),
            protocol: Protocol::Tcp,
            enable_tag_override: false,
        })]
        .into(),
        checks: [Arc::new(CheckRecord {
            id: "c".parse().unwrap(),
            name: Box::default(),
            status,
            notes: Box::default(),
            service: Some("db-1".parse().unwrap()),
            kind: Box::default(),
        })]
        .into(),
    };
    let passing = HealthStatus::Passing;
    let records = [
        record("Db-Host", "192.0.2.77", "", passing),
        record("saas", "db.example.org", "", passing),
        record("sick-host", "192.0.2.78", "", HealthStatus::Critical),
        record("z-own", "192.0.2.79", "192.0.2.80", passing),
    ];
    snapshot.externals = Arc::new(Externals::default().after("n1", MemberStatus::Alive, &records, 5));
    let server = Server::with(|_| {}, snapshot);
    let a = RecordType::A;
    server.check("db.service.weft.", a, "NOERROR: db.service.weft. A 192.0.2.77, db.service.weft. A 192.0.2.80");
    let alias = "NOERROR: primary.db.service.weft. CNAME db.example.org.";
    server.check("primary.db.service.weft.", RecordType::AAAA, alias);
    let srv = "NOERROR: db.service.weft. SRV 1 1 5432 c000024d.addr.dc1.weft., db.service.weft. SRV 1 1 5432 c0000250.addr.dc1.weft., \
               db.service.weft. SRV 1 1 5432 db.example.org. |  | c000024d.addr.dc1.weft. A 192.0.2.77, c0000250.addr.dc1.weft. A 192.0.2.80";
    server.check("db.service.weft.", RecordType::SRV, srv);
    server.check("db-host.node.weft.", a, "NOERROR: db-host.node.weft. A 192.0.2.77");
    server.check("db-host.node.weft.", RecordType::TXT, "NOERROR: db-host.node.weft. TXT rack=z1");
    server.check("saas.node.dc1.weft.", a, "NOERROR: saas.node.dc1.weft. CNAME db.example.org.");
    server.check(
        "78.2.0.192.in-addr.arpa.",
        RecordType::PTR,
        "NOERROR: 78.2.0.192.in-addr.arpa. PTR sick-host.node.dc1.weft.",
    );
    for absent in ["db.connect.weft.", "db.virtual.weft.", "db.service.dc2.weft.", "other.node.weft."] {
        server.check(absent, a, &nothing(SOA));
    }
    let mut snapshot = mesh();
    snapshot.externals = Arc::new(Externals::default().after("n1", MemberStatus::Failed, &records, 5));
    Server::with(|_| {}, snapshot).check("db.service.weft.", a, &nothing(SOA));
}

#[test]
fn names_above_others_are_there_without_data() {
    let server = Server::new();
    for name in [
        "service.weft.",
        "_tcp.service.weft.",
        "node.weft.",
        "service.dc2.weft.",
        "dc1.weft.",
        "query.weft.",
        "virtual.weft.",
    ] {
        for kind in [RecordType::A, RecordType::SRV, RecordType::TXT, RecordType::NS] {
            server.check(name, kind, &no_data());
        }
    }
    server.check("service.dc9.weft.", RecordType::A, &nothing(SOA));
    server.check("dc9.weft.", RecordType::A, &nothing(SOA));
    server.check("web.service.weft.", RecordType::TXT, &no_data());
    server.check("web.service.weft.", RecordType::AAAA, &no_data());
}

#[test]
fn the_apex_has_soa_and_ns() {
    let server = Server::new();
    server.check("weft.", RecordType::SOA, &format!("NOERROR: {SOA}"));
    server.check("weft.", RecordType::NS, "NOERROR: weft. NS ns.weft. |  | ns.weft. A 10.0.0.1");
    server.check("weft.", RecordType::A, &no_data());
    server.check("ns.weft.", RecordType::A, "NOERROR: ns.weft. A 10.0.0.1");
}

#[test]
fn the_mesh_and_virtual_ips_have_names() {
    let server = Server::new();
    server.check(
        "web.connect.weft.",
        RecordType::A,
        "NOERROR: web.connect.weft. A 10.0.0.1, web.connect.weft. A 10.0.0.2",
    );
    server.check(
        "v2.web.service.weft.",
        RecordType::SRV,
        "NOERROR: v2.web.service.weft. SRV 1 2 81 c000020a.addr.dc1.weft. |  | c000020a.addr.dc1.weft. A 192.0.2.10",
    );
    server.check(
        "six.connect.weft.",
        RecordType::SRV,
        "NOERROR: six.connect.weft. SRV 1 10 8301 N3.x.node.dc1.weft. |  | N3.x.node.dc1.weft. AAAA 2001:db8::3",
    );
    server.check("sick.connect.weft.", RecordType::A, &nothing(SOA));

    let shown = server.shown("web.virtual.weft.", RecordType::A);
    let ip = shown.rsplit(' ').next().unwrap().to_owned();
    assert!(ip.parse::<std::net::Ipv4Addr>().unwrap().octets()[0] >= 240, "{shown}");
    // A service without a healthy instance keeps its own, another zone has the same, and the address leads back.
    assert!(server.shown("sick.virtual.weft.", RecordType::A).starts_with("NOERROR: sick.virtual.weft. A 2"));
    assert_eq!(Server::new().shown("WEB.virtual.weft.", RecordType::A), shown.replace("web", "WEB"));
    let mut octets: Vec<&str> = ip.split('.').collect();
    octets.reverse();
    let pointer = format!("{}.in-addr.arpa.", octets.join("."));
    server.check(&pointer, RecordType::PTR, &format!("NOERROR: {pointer} PTR web.virtual.weft."));
    server.check("web.virtual.weft.", RecordType::AAAA, &no_data());
    server.check("no.virtual.weft.", RecordType::A, &nothing(SOA));
    server.check("web.virtual.dc9.weft.", RecordType::A, &nothing(SOA));
    server.check("0.0.0.240.in-addr.arpa.", RecordType::PTR, "NXDOMAIN: ");
}

#[test]
fn addresses_lead_back_to_names_and_those_of_others_are_not_answered() {
    let server = Server::new();
    let check = |name: &str, want: &str| server.check(name, RecordType::PTR, &format!("NOERROR: {name} PTR {want}"));
    check("1.0.0.10.in-addr.arpa.", "n1.node.dc1.weft.");
    check("10.2.0.192.in-addr.arpa.", "web.service.dc1.weft.");
    check("3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", "N3.x.node.dc1.weft.");
    for name in ["9.9.9.9.in-addr.arpa.", "example.org.", "weft.com.", "."] {
        assert!(server.wire(name, RecordType::PTR, LOCAL).is_none(), "{name}");
    }
}

#[test]
fn only_passing_and_limits_and_ttls_are_followed() {
    let passing = Server::with(|config| config.only_passing = true, mesh());
    passing.check("web.service.weft.", RecordType::A, "NOERROR: web.service.weft. A 10.0.0.1");
    let limited = Server::with(|config| config.a_record_limit = 1, mesh());
    assert_eq!(limited.message("web.service.weft.", RecordType::A, LOCAL).answers.len(), 1);
    assert_eq!(limited.message("web.service.weft.", RecordType::SRV, LOCAL).answers.len(), 2);
    let timed = Server::with(
        |config| {
            config.node_ttl_s = 7;
            config.service_ttl.by_name =
                [("web", 5), ("m*", 3), ("*", 1)].map(|(name, ttl)| (name.to_owned(), ttl)).into();
        },
        mesh(),
    );
    let ttl = |name: &str| timed.message(name, RecordType::ANY, LOCAL).answers[0].ttl;
    assert_eq!(
        ["web.service.weft.", "mixed.service.weft.", "six.service.weft.", "n1.node.weft."].map(ttl),
        [5, 3, 1, 7]
    );
    let other = Server::with(
        |config| {
            config.domain = "Mesh.Example.com.".parse().unwrap();
            config.alt_domain = None;
        },
        mesh(),
    );
    other.check("n1.node.mesh.example.com.", RecordType::A, "NOERROR: n1.node.mesh.example.com. A 10.0.0.1");
    assert!(other.wire("n1.node.weft.", RecordType::A, LOCAL).is_none());
    for bad in ["", ".", "a..b", "a b", &"a".repeat(64), &"a.".repeat(60)] {
        assert!(bad.parse::<DomainName>().is_err(), "{bad}");
    }
}

#[test]
fn answers_are_shuffled_and_three_at_a_time_to_whoever_takes_512_bytes() {
    let server = Server::new();
    let firsts: BTreeSet<String> = (0..20)
        .map(|seed| {
            server.message("many.service.weft.", RecordType::A, How { seed, ..LOCAL }).answers[0].data.to_string()
        })
        .collect();
    assert!(firsts.len() > 10, "{firsts:?}");
    let plain = server.message("many.service.weft.", RecordType::A, PLAIN);
    assert_eq!((plain.answers.len(), plain.metadata.truncation), (3, false));
    let told = Server::with(|config| config.enable_truncate = true, mesh());
    assert!(told.message("many.service.weft.", RecordType::A, PLAIN).metadata.truncation);
    assert!(!told.message("web.service.weft.", RecordType::A, PLAIN).metadata.truncation, "nothing was cut");
}

#[test]
fn what_does_not_fit_is_cut_and_says_so() {
    #[track_caller]
    fn check(server: &Server, kind: RecordType, how: How, limit: usize, want: (usize, bool)) {
        let wire = server.wire("many.service.weft.", kind, how).unwrap();
        let message = Message::from_vec(&wire).unwrap();
        assert!(wire.len() <= limit, "{} bytes", wire.len());
        assert_eq!((message.answers.len(), message.metadata.truncation), want);
        assert_eq!(message.edns.is_some(), how.edns.is_some());
    }
    let server = Server::with(|config| config.udp_answer_limit = 0, mesh());
    // Header 12, question 23, 16 for each address; OPT 11.
    check(&server, RecordType::A, PLAIN, 512, (29, true));
    check(&server, RecordType::A, How { edns: Some(100), ..LOCAL }, 512, (29, true));
    check(&server, RecordType::A, How { edns: Some(1232), ..LOCAL }, 1232, (74, true));
    check(&server, RecordType::A, LOCAL, 4096, (100, false));
    check(&server, RecordType::A, How { via: Via::Udp, ..LOCAL }, 1232, (74, true));
    check(&server, RecordType::A, How { via: Via::Tcp, ..PLAIN }, 65_535, (100, false));
    // Their addresses are left out first, without a word: they can be asked for.
    let srv = server.message("many.service.weft.", RecordType::SRV, LOCAL);
    assert!(srv.metadata.truncation && srv.additionals.is_empty() && srv.answers.len() > 60, "{}", srv.answers.len());
    let all = server.message("many.service.weft.", RecordType::SRV, How { via: Via::Tcp, ..LOCAL });
    assert_eq!((all.answers.len(), all.additionals.len(), all.metadata.truncation), (100, 100, false));
}

#[test]
fn an_answer_stands_on_the_wire_as_it_should() {
    let server = Server::new();
    let wire = server.wire("V1.wEb.service.weft.", RecordType::A, PLAIN).unwrap();
    let mut want = vec![0x12, 0x34, 0x85, 0x00, 0, 1, 0, 1, 0, 0, 0, 0];
    want.extend(b"\x02V1\x03wEb\x07service\x04weft\x00\x00\x01\x00\x01");
    want.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 10, 0, 0, 1]);
    assert_eq!(wire, want);

    let wire = server.wire("_web._v2.service.weft.", RecordType::SRV, How { edns: Some(1232), ..LOCAL }).unwrap();
    let mut want = vec![0x12, 0x34, 0x85, 0x00, 0, 1, 0, 1, 0, 0, 0, 2];
    want.extend(b"\x04_web\x03_v2\x07service\x04weft\x00\x00\x21\x00\x01");
    want.extend([0xc0, 12, 0, 33, 0, 1, 0, 0, 0, 0, 0, 30, 0, 1, 0, 2, 0, 81]);
    // RFC 2782: the target of SRV is not compressed.
    want.extend(b"\x08c000020a\x04addr\x03dc1\x04weft\x00");
    want.extend(b"\xc0\x39\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\xc0\x00\x02\x0a");
    want.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(wire, want);

    let wire = server.wire("no.service.weft.", RecordType::A, PLAIN).unwrap();
    let mut want = vec![0x12, 0x34, 0x85, 0x03, 0, 1, 0, 0, 0, 1, 0, 0];
    want.extend(b"\x02no\x07service\x04weft\x00\x00\x01\x00\x01");
    want.extend([0xc0, 23, 0, 6, 0, 1, 0, 0, 0, 0, 0, 38]);
    want.extend(b"\x02ns\xc0\x17\x0ahostmaster\xc0\x17");
    want.extend([0, 0, 0x13, 0x88, 0, 0, 0x0e, 0x10, 0, 0, 2, 0x58, 0, 1, 0x51, 0x80, 0, 0, 0, 0]);
    assert_eq!(wire, want);
}

#[test]
fn what_is_no_question_is_refused_by_its_name_or_left_alone() {
    #[track_caller]
    fn refused(bytes: &[u8], want: ResponseCode) {
        let Decoded::Refuse(code, answer) = decode(bytes, Via::UdpLocal) else { panic!("not refused") };
        let message = Message::from_vec(&answer).unwrap();
        // BADVERS and BADSIG are one number, and the decoder says the latter.
        let numbers = [code, message.metadata.response_code, want].map(u16::from);
        assert_eq!((numbers, message.metadata.id), ([u16::from(want); 3], 0x1234));
    }
    let plain = question("web.service.weft.", RecordType::A, PLAIN);
    let edited = |at: usize, byte: u8| {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        bytes
    };
    refused(&edited(2, 4 << 3), ResponseCode::NotImp);
    refused(&edited(2, 5 << 3), ResponseCode::NotImp);
    refused(&edited(5, 0), ResponseCode::FormErr);
    refused(&edited(5, 2), ResponseCode::FormErr);
    refused(&edited(4, 255), ResponseCode::FormErr);
    refused(&plain[..20], ResponseCode::FormErr);
    refused(&edited(plain.len() - 1, 3), ResponseCode::Refused);
    refused(&question("weft.", RecordType::AXFR, PLAIN), ResponseCode::Refused);
    let mut version = question("web.service.weft.", RecordType::A, LOCAL);
    let at = version.len() - 5;
    version[at] = 1;
    refused(&version, ResponseCode::BADVERS);
    for nothing in [&edited(2, 0x81)[..], &plain[..11], &[]] {
        assert!(matches!(decode(nothing, Via::UdpLocal), Decoded::Ignore));
    }
    let Decoded::Ask(request) = decode(&edited(plain.len() - 1, 255), Via::Tcp) else { panic!("any class is ours") };
    assert_eq!(request.query.query_class(), DNSClass::ANY);
}

#[test]
fn instances_come_nearest_first_and_what_nobody_measured_stays_shuffled_behind() {
    let mut server = Server::new();
    let firsts = |server: &Server, name: &str| -> BTreeSet<String> {
        let first = |seed| {
            let answer = server.message(name, RecordType::SRV, How { seed, ..LOCAL });
            let hickory_proto::rr::RData::SRV(srv) = &answer.answers[0].data else { panic!("an SRV record") };
            srv.target.to_string()
        };
        (0..32).map(first).collect()
    };
    assert_eq!(firsts(&server, "web.service.weft.").len(), 2, "shuffled");
    let (near, far) = (std::time::Duration::from_millis(1), std::time::Duration::from_millis(9));
    server.trips = Some(Trips::from([("n1".parse().unwrap(), far), ("n2".parse().unwrap(), near)]));
    assert_eq!(firsts(&server, "web.service.weft."), ["c000020a.addr.dc1.weft.".to_owned()].into());
    server.trips = Some(Trips::from([("n1".parse().unwrap(), far)]));
    assert_eq!(firsts(&server, "web.service.weft."), ["n1.node.dc1.weft.".to_owned()].into());
    assert!(firsts(&server, "many.service.weft.").len() > 8, "equals stay shuffled");
    let here = server.zone.node_at("10.0.0.2".parse().unwrap()).map(ToString::to_string);
    assert_eq!((here.as_deref(), server.zone.node_at("192.0.2.10".parse().unwrap())), (Some("n2"), None));
}

#[test]
fn what_a_recursor_found_is_written_in_the_letters_of_whoever_asks_and_ages() {
    let mut found = Message::new(7, MessageType::Response, OpCode::Query);
    found.add_query(Query::query(Name::from_ascii("a.example.").unwrap(), RecordType::A));
    let record = |name: &str, ttl| {
        let data = hickory_proto::rr::RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into());
        hickory_proto::rr::Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
    };
    found.answers = vec![record("a.example.", 60), record("b.example.", 5)];
    let Decoded::Ask(request) = decode(&question("A.exAmple.", RecordType::A, PLAIN), Via::UdpLocal) else { panic!() };
    let message = Message::from_vec(&encode_found(&request, &found, 20)).unwrap();
    assert_eq!(show(&message), "NOERROR: A.exAmple. A 192.0.2.1, b.example. A 192.0.2.1");
    assert!(!message.metadata.authoritative && message.metadata.recursion_available);
    assert_eq!((message.metadata.id, message.answers[0].ttl, message.answers[1].ttl), (0x1234, 40, 0));
    found.answers = (0..100).map(|_| record("a.example.", 60)).collect();
    let wire = encode_found(&request, &found, 0);
    assert!(wire.len() <= 512 && Message::from_vec(&wire).unwrap().metadata.truncation);
}

#[test]
fn the_next_question_sees_a_change_and_names_that_stay_keep_their_virtual_ips() {
    let publisher = Publisher::new(Arc::new(mesh()));
    let cell = ZoneCell::new(publisher.reader());
    let first = cell.load();
    assert!(Arc::ptr_eq(&first, &cell.load()), "nothing changed");
    let address = |zone: &Zone, name: &str| zone.virtuals().address(&name.parse().unwrap());
    let web = address(&first, "web").unwrap();
    let mut changed = mesh();
    let entry = Arc::make_mut(changed.services.get_mut("web").unwrap());
    for instance in &mut entry.instances {
        Arc::make_mut(instance).status = HealthStatus::Critical;
    }
    publisher.publish(Arc::new(changed.clone()));
    let second = cell.load();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(std::ptr::eq(first.virtuals(), second.virtuals()), "the names are the same: nothing is counted anew");
    let server = Server { zone: Zone::new(Arc::new(changed.clone()), Some(&second)), ..Server::new() };
    server.check("web.service.weft.", RecordType::A, &nothing(SOA));
    // A name that went is still reckoned with, and one that comes is added.
    changed.services.remove("web");
    changed.gone_services.insert("web".parse().unwrap(), 1);
    publisher.publish(Arc::new(changed.clone()));
    assert!(std::ptr::eq(cell.load().virtuals(), second.virtuals()));
    changed.gone_services.clear();
    publisher.publish(Arc::new(changed));
    assert_eq!(address(&cell.load(), "web"), None);
    assert_eq!(address(&second, "web"), Some(web));
}

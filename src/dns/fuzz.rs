//! What a fuzzer calls: bytes as a query, and as what a recursor sends; and the small mesh that they meet.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a target fails by panicking")]

use std::sync::{Arc, OnceLock};

use hickory_proto::op::ResponseCode;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::json;

use super::DnsConfig;
use super::answer::{Beside, Responder};
use super::message::{
    Decoded, Recursion, Request, Via, decode, decode_found, encode, encode_ask, encode_code, encode_found,
};
use super::zone::Zone;
use crate::catalogue::{ServiceEntry, Snapshot};
use crate::lww::{Body, Row, Stamp};
use crate::model::{
    HealthStatus, INGRESS_GATEWAY, Instance, NodeEntry, NodeInfo, NodeName, Protocol, ServiceName, ServiceRecord,
    Weights, fixture,
};
use crate::prepared::Book;
use crate::traffic::{Entries, Ready, Traffic};

/// A message: the first byte says who reads it.
pub(crate) fn message(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => asked(bytes, Via::UdpLocal),
        1 => asked(bytes, Via::Udp),
        2 => asked(bytes, Via::Tcp),
        _ => found(bytes),
    }
}

/// A query gets an answer that is its own, whole, and no longer than its asker takes; nothing else gets one.
fn asked(bytes: &[u8], via: Via) {
    static PLACE: OnceLock<(Responder, Zone, Book)> = OnceLock::new();
    let (responder, zone, queries) = PLACE.get_or_init(|| {
        let config = DnsConfig::on(Vec::new());
        (Responder::new(config, "dc1".to_owned()), Zone::new(Arc::new(mesh()), None), queries())
    });
    let mut rng = StdRng::seed_from_u64(1);
    let (answer, limit) = match decode(bytes, via) {
        Decoded::Ignore => {
            assert!(bytes.len() < 12 || bytes[2] & 0x80 != 0, "a query that got nothing");
            return;
        }
        Decoded::Refuse(_, answer) => (answer, 4096),
        Decoded::Ask(request) => {
            let limit = usize::from(request.limit());
            let beside = Beside { trips: None, queries, from_here: &|| None };
            let answer = match responder.answer(zone, &request, &beside, &mut rng) {
                Some(answers) => encode(&request, answers, Recursion::Available),
                None => encode_code(&request, ResponseCode::Refused, Recursion::None),
            };
            let echoed = decode_found(&answer).expect("an answer is a message");
            assert_eq!(echoed.queries, std::slice::from_ref(&request.query));
            assert!(echoed.queries[0].name().eq_case(request.query.name()), "the question's letters");
            assert!(encode_ask(&request, 7).is_some(), "what was read can be asked");
            (answer, limit)
        }
    };
    assert!(answer.len() <= limit && answer.len() >= 12, "{} bytes", answer.len());
    assert_eq!(answer[..2], bytes[..2], "the id");
    assert!(answer[2] & 0x80 != 0 && matches!(decode(&answer, via), Decoded::Ignore), "an answer is no query");
}

/// Queries whose names and templates a question can meet.
fn queries() -> Book {
    let query = |at: u64, value: &str| {
        let stamp = Stamp { ms: at, count: 0, node: "n1".parse().unwrap() };
        let body = Some(Arc::new(Body { flags: 0, value: value.into() }));
        (Arc::from(at.to_string()), Row { stamp, sum: 0, body, created: 1, modified: 1 })
    };
    Book::of(&[
        query(1, r#"{"Name": "q", "Service": {"Service": "many"}}"#),
        query(
            2,
            r#"{"Name": "t-", "Template": {"Type": "name_prefix_match", "Regexp": "^t-(.*)$"}, "Service": {"Service": "${match(1)}"}}"#,
        ),
    ])
}

/// What a recursor sends becomes an answer within the asker's bound.
fn found(bytes: &[u8]) {
    let Some(message) = decode_found(bytes) else { return };
    let query = message.queries[0].clone();
    for (via, limit) in [(Via::UdpLocal, 512), (Via::Tcp, 65_535)] {
        let request =
            Request { id: 9, query: query.clone(), recursion_desired: true, checking_disabled: false, edns: None, via };
        let answer = encode_found(&request, &message, 3);
        assert!(answer.len() <= limit, "{} bytes", answer.len());
        assert!(decode_found(&answer).is_some(), "an answer is a message");
    }
}

/// Nodes n1 (this one, with meta), n2 and N3.x of dc1, m1 of dc2, and services that use every row of the table.
pub(super) fn mesh() -> Snapshot {
    let node = |name: &str, ip: &str, datacenter: &str, meta: &[(&str, &str)]| {
        Arc::new(fixture::node_entry(NodeInfo {
            mesh_addr: format!("{ip}:8301").parse().unwrap(),
            datacenter: datacenter.to_owned(),
            meta: meta.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..fixture::node_info(name)
        }))
    };
    let n1 = node("n1", "10.0.0.1", "dc1", &[("rack", "a"), ("rfc1035-note", "plain")]);
    let n2 = node("n2", "10.0.0.2", "dc1", &[]);
    let n3 = node("N3.x", "[2001:db8::3]", "dc1", &[]);
    let m1 = node("m1", "10.0.2.1", "dc2", &[]);
    let mut snapshot = Snapshot { index: 5_000_000, ..Snapshot::empty("n1".parse::<NodeName>().unwrap()) };
    for node in [&n1, &n2, &n3, &m1] {
        snapshot.nodes.insert(node.info.name.clone(), Arc::clone(node));
    }
    let passing = HealthStatus::Passing;
    add(&mut snapshot, &n1, "web", "", &["v1"], 80, passing);
    add(&mut snapshot, &n2, "web", "192.0.2.10", &["v2"], 81, HealthStatus::Warning);
    add(&mut snapshot, &n2, "web", "192.0.2.11", &["v1"], 82, HealthStatus::Critical);
    add(&mut snapshot, &n3, "six", "", &[], 6, passing);
    add(&mut snapshot, &m1, "far", "", &[], 7, passing);
    add(&mut snapshot, &n1, "Mixed", "", &[], 8, passing);
    add(&mut snapshot, &n1, "named", "app.example.org", &[], 9, passing);
    add(&mut snapshot, &n1, "sick", "", &[], 10, HealthStatus::Critical);
    add(&mut snapshot, &n1, "edge", "", &[], 1, passing);
    add(&mut snapshot, &n2, "edge", "192.0.2.20", &[], 2, HealthStatus::Warning);
    add(&mut snapshot, &n2, "edge", "192.0.2.21", &[], 3, HealthStatus::Critical);
    add(&mut snapshot, &m1, "edge", "", &[], 4, passing);
    make_gateway(&mut snapshot, "edge");
    for at in 0..100 {
        add(&mut snapshot, &n1, "many", &format!("198.51.100.{at}"), &[], 1000 + at, passing);
    }
    snapshot
}

/// Makes a service a gateway: `web` and `Mixed` by port 8080, `six` by 9000.
fn make_gateway(snapshot: &mut Snapshot, name: &str) {
    let entry = Arc::make_mut(snapshot.services.get_mut(name).unwrap());
    for instance in &mut entry.instances {
        Arc::make_mut(&mut Arc::make_mut(instance).record).kind = INGRESS_GATEWAY.into();
    }
    let listeners = json!({"Listeners": [
        {"Port": 8080, "Protocol": "http", "Services": [{"Name": "web"}, {"Name": "Mixed", "Hosts": ["m.example"]}]},
        {"Port": 9000, "Services": [{"Name": "six"}]}]});
    let mut entries = Entries::default();
    entries.add(INGRESS_GATEWAY, name, Ready::new(INGRESS_GATEWAY, &listeners).unwrap());
    snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
}

fn add(
    snapshot: &mut Snapshot,
    node: &Arc<NodeEntry>,
    service: &str,
    address: &str,
    tags: &[&str],
    port: u16,
    status: HealthStatus,
) {
    let name: ServiceName = service.parse().unwrap();
    let record = ServiceRecord {
        tags: tags.iter().map(|tag| Box::from(*tag)).collect(),
        address: address.into(),
        port,
        weights: Weights { passing: 10, warning: 2 },
        ..ServiceRecord::new(format!("{service}-{port}").parse().unwrap(), name.clone())
    };
    let instance = Arc::new(Instance { status, ..fixture::instance(Arc::clone(node), record) });
    let entry = snapshot.services.entry(name.clone()).or_insert_with(|| {
        Arc::new(ServiceEntry { name, protocol: Protocol::Tcp, instances: Vec::new(), modify_index: 1 })
    });
    Arc::make_mut(entry).instances.push(instance);
}

//! The steps of one request in the agents, one by one: head, host, instance, permission.

use std::hint::black_box;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use criterion::Criterion;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::{Value, json};
use weft::authz::{self, Action, Guard, Origin, Request, Table};
use weft::catalogue::{Builder, Snapshot};
use weft::clock::{self, UnixSeconds};
use weft::model::{MemberStatus, ServiceName};
use weft::pki::PeerIdentity;
use weft::proxy::measured;
use weft::routing::{Balancer, ConnectBackoff, Tried};
use weft::traffic::{Asked, Chain, Entries, Ready, Traffic};

use super::{name, publisher, service};

/// What a browser sends with a request for a page, and what weft adds.
const HEADERS: [(&str, &str); 10] = [
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    ("accept-encoding", "gzip, deflate, br"),
    ("accept-language", "en-GB,en;q=0.5"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    ("cookie", "session=0123456789abcdef0123456789abcdef"),
    ("referer", "https://shop.example/cart"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("x-team", "shop"),
    ("x-weft-hops", "1"),
    ("x-request-id", "6e2e5bd4-0f3e-4f0c-9a43-1b1a4b8f0a11"),
];

/// Encodes and decodes the head of a bare request and of a browser's.
pub(crate) fn heads(c: &mut Criterion) {
    let browser = HEADERS.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
    for (kind, headers) in [("bare", HeaderMap::new()), ("10_headers", browser.into_iter().collect())] {
        let mut out = BytesMut::new();
        let target = ("web.weft", "/cart?item=42");
        assert!(measured::encode_request(&mut out, &Method::GET, target, &headers), "the head is within its bounds");
        let wire: Bytes = out.split().freeze();
        c.bench_function(&format!("head/encode_{kind}_{}_bytes", wire.len()), |bencher| {
            bencher.iter(|| {
                out.clear();
                measured::encode_request(&mut out, &Method::GET, black_box(target), black_box(&headers))
            });
        });
        assert_eq!(measured::decode_request(wire.clone()), Some(headers.len()));
        c.bench_function(&format!("head/decode_{kind}_{}_bytes", wire.len()), |bencher| {
            bencher.iter(|| measured::decode_request(black_box(&wire).clone()));
        });
    }
}

/// A catalogue of `nodes` nodes with `each` instances, of `services` services in turn.
fn catalogue(nodes: usize, each: usize, services: usize) -> Arc<Snapshot> {
    let mut builder = Builder::new(name("node-0"), 1);
    for at in 0..nodes {
        let node = format!("node-{at}");
        let replica = publisher(&node, (at * each..(at + 1) * each).map(|number| service(number % services, 80)));
        builder.set_node(&name(&node), replica.state(&name(&node)), MemberStatus::Alive);
    }
    builder.build().expect("nodes were set")
}

/// Picks an instance of a service that has 10, 1,000 or 5,000.
pub(crate) fn route(c: &mut Criterion) {
    for instances in [10, 1_000, 5_000] {
        let snapshot = catalogue(instances, 1, 1);
        let wanted: ServiceName = "service-0".parse().expect("a valid name");
        let (mut balancer, tried, backoff) = (Balancer::new(7), Tried::new(), ConnectBackoff::new());
        let now = clock::now();
        c.bench_function(&format!("route_and_balance/{instances}_instances"), |bencher| {
            bencher.iter(|| balancer.pick_by_name(black_box(&snapshot), &wanted, &tried, &backoff, now).is_ok());
        });
    }
}

/// Finds a service by the Host of a request and picks an instance, with 2 and with 1,000 services (5,000 instances).
pub(crate) fn hosts(c: &mut Criterion) {
    for (services, snapshot) in [(2, catalogue(2, 1, 2)), (1_000, catalogue(250, 20, 1_000))] {
        let hosts: Vec<String> = (0..services).map(|at| format!("Service-{at}.weft")).collect();
        let (mut balancer, tried, backoff) = (Balancer::new(7), Tried::new(), ConnectBackoff::new());
        let (mut turn, now) = (hosts.iter().cycle(), clock::now());
        c.bench_function(&format!("host_to_instance/{services}_services"), |bencher| {
            bencher.iter(|| {
                let host = turn.next().expect("a cycle");
                let service = measured::service_of_host(black_box(host)).expect("a host of the mesh");
                balancer.pick_by_name(&snapshot, &service, &tried, &backoff, now).expect("it has instances")
            });
        });
    }
}

/// `count` intentions, half of them with permissions, and one about every service; and `more`.
fn intentions(count: usize, more: &[Value]) -> Table {
    let usual = (0..count).map(|at| {
        let ends = json!({"SourceName": format!("caller-{}", at % 40), "DestinationName": format!("web-{}", at / 40)});
        let says = match at % 2 {
            0 => json!({"Action": "allow"}),
            _ => json!({"Permissions": [
                {"Action": "deny", "HTTP": {"PathPrefix": "/admin"}},
                {"Action": "allow", "HTTP": {"PathRegex": "/v[0-9]+/.*", "Methods": ["GET", "PUT"]}},
                {"Action": "allow", "HTTP": {"PathPrefix": "/", "Header": [{"Name": "x-team", "Exact": "shop"}]}},
            ]}),
        };
        let (Value::Object(mut fields), Value::Object(says)) = (ends, says) else { unreachable!() };
        fields.extend(says);
        Value::Object(fields)
    });
    let guards = usual.chain(more.iter().cloned()).map(|value| {
        let intention = authz::from_json(&value, None).expect("an intention");
        Arc::new(Guard::compile(intention, Origin::default()).expect("it compiles"))
    });
    Table::new(Action::Deny, guards, Vec::new())
}

/// Intentions that make a decision long: look-ups that miss or only audit, and 64 permissions of which none or the last matches.
fn long_ways(table: &mut Vec<Value>) {
    let permissions = |last: &str| -> Value {
        let header = |at: usize| json!([{"Name": "user-agent", "Regex": format!(".*Chrome/{at}[0-9]+.*")}]);
        let one = |at: usize| match at {
            0..16 => json!({"Action": "deny", "HTTP": {"PathRegex": format!("/v[0-9]+/({at}|x{at})/.*")}}),
            16..32 => json!({"Action": "deny", "HTTP": {"PathPrefix": "/c", "Header": header(at)}}),
            32..63 => json!({"Action": "deny", "HTTP": {"PathPrefix": format!("/cart/{at}"), "Methods": ["PUT"]}}),
            _ => json!({"Action": "allow", "HTTP": {"PathPrefix": last}}),
        };
        (0..64).map(one).collect()
    };
    table.extend([
        json!({"SourceName": "*", "DestinationName": "*", "Action": "allow"}),
        json!({"SourceName": "audited", "DestinationName": "web-7", "Action": "deny", "Audit": true}),
        json!({"SourceName": "*", "DestinationName": "web-7", "Action": "deny", "Audit": true}),
        json!({"SourceName": "audited", "DestinationName": "*", "Action": "deny", "Audit": true}),
        json!({"SourceName": "regex", "DestinationName": "web-7", "Permissions": [
            {"Action": "allow", "HTTP": {"PathRegex": "/(cart|shop|v[0-9]+)(/.*)?", "Methods": ["GET"]}}]}),
        json!({"SourceName": "last-of-64", "DestinationName": "web-7", "Permissions": permissions("/")}),
        json!({"SourceName": "none-of-64", "DestinationName": "web-7", "Permissions": permissions("/nowhere")}),
    ]);
    // Many wildcards on both sides: none is about the call.
    table.extend(
        (0..200).map(|at| json!({"SourceName": "*", "DestinationName": format!("other-{at}"), "Action": "deny"})),
    );
    table.extend(
        (0..200).map(|at| json!({"SourceName": format!("other-{at}"), "DestinationName": "*", "Action": "deny"})),
    );
}

/// Decides whether a caller's request may pass: by an action, by the third of three permissions, by nothing, and the long ways.
/// A path that is not in its normal form is decided over twice.
pub(crate) fn authorize(c: &mut Criterion) {
    let headers: HeaderMap = HEADERS
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .into_iter()
        .collect();
    let mut long = Vec::new();
    long_ways(&mut long);
    let (short, long) = (intentions(1_000, &[]), intentions(1_000 - long.len(), &long));
    assert_eq!((short.guards().len(), long.guards().len()), (1_000, 1_000));
    let plain = "/cart?item=42";
    for (kind, table, caller, path, wanted) in [
        ("action", &short, "caller-4", plain, true),
        ("permissions", &short, "caller-5", plain, true),
        ("none", &short, "api", plain, false),
        ("permissions_not_normal", &short, "caller-5", "/shop/../cart?item=42", true),
        ("any_to_any_after_misses", &long, "api", plain, true),
        ("any_to_any_after_three_audits", &long, "audited", plain, true),
        ("regex", &long, "regex", plain, true),
        ("regex_no_match", &long, "regex", "/elsewhere/of/some/length?item=42", false),
        ("last_of_64_permissions_32_regexes", &long, "last-of-64", plain, true),
        ("none_of_64_permissions_32_regexes", &long, "none-of-64", plain, false),
    ] {
        let request = Request { method: "GET", path, headers: &headers };
        let peer = PeerIdentity {
            id: format!("spiffe://bench.weft/svc/{caller}/node/node-1").parse().expect("a valid id"),
            node: name("node-1"),
            scope: "*".parse().expect("a valid scope"),
            not_after: UnixSeconds(u64::MAX),
        };
        let service: ServiceName = "web-7".parse().expect("a valid name");
        assert_eq!(measured::is_authorized(table, &peer, &service, &request), wanted, "{kind}");
        c.bench_function(&format!("authorize/1000_intentions_{kind}"), |bencher| {
            bencher.iter(|| measured::is_authorized(table, black_box(&peer), black_box(&service), black_box(&request)));
        });
    }
}

/// A chain of `count` routes of every kind, of which none takes the path of the last one.
fn routed(count: usize) -> Chain {
    let route = |at: usize| {
        let http = match at * 20 / count {
            0..8 => json!({"PathExact": format!("/shop/{at}/cart")}),
            8..14 => json!({"PathPrefix": format!("/api/v{at}/")}),
            14..16 => json!({"PathRegex": format!("/v[0-9]+/res{at}(/.*)?")}),
            16..18 => json!({"Header": [{"Name": "x-tenant", "Exact": format!("tenant-{at}")}], "PathPrefix": "/"}),
            18 => json!({"QueryParam": [{"Name": "item", "Exact": at.to_string()}]}),
            _ => {
                json!({"PathPrefix": format!("/z{at}"), "Methods": ["GET"], "Header": [{"Name": "x-team", "Prefix": "sh"}]})
            }
        };
        json!({"Match": {"HTTP": http}, "Destination": {"Service": format!("web-{}", at % 50)}})
    };
    let entry = json!({"Routes": (0..count).map(route).collect::<Vec<Value>>()});
    let mut entries = Entries::default();
    entries.add("service-router", "web", Ready::new("service-router", &entry).expect("a valid router"));
    entries.chain(&"web".parse().expect("a valid name")).expect("a valid chain")
}

/// Finds the route of a request among 10 and 1,000: the first rule, one by header, one by expression, the last, none; and
/// asks for the chain of a service that has none.
pub(crate) fn chain(c: &mut Criterion) {
    let with = |tenant: &'static str| -> HeaderMap {
        let usual = HEADERS.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        usual.into_iter().chain([(HeaderName::from_static("x-tenant"), HeaderValue::from_static(tenant))]).collect()
    };
    for count in [100, 1_000] {
        let chain = routed(count);
        let headers = if count == 100 { with("tenant-85") } else { with("tenant-850") };
        let (none, last) = (with("none"), format!("/z{}/x", count - 1));
        let regex = format!("/v42/res{}/items/7", count * 3 / 4);
        for (kind, path, headers, want) in [
            ("first_exact", "/shop/0/cart", &none, Some(0)),
            ("header", "/elsewhere", &headers, Some(count * 85 / 100)),
            ("regex", &*regex, &none, Some(count * 3 / 4)),
            ("last_prefix", &*last, &none, Some(count - 1)),
            ("none", "/elsewhere/of/some/length", &none, None),
        ] {
            let asked = Asked { method: "GET", path, query: Some("item=none&page=2"), headers };
            assert_eq!(chain.route(&asked).expect("a route").at, want, "{kind}");
            c.bench_function(&format!("chain/{count}_routes_{kind}"), |bencher| {
                bencher.iter(|| chain.route(black_box(&asked)).is_some());
            });
        }
    }
    let (traffic, service) = (Traffic::default(), "web".parse().expect("a valid name"));
    c.bench_function("chain/no_entries", |bencher| bencher.iter(|| black_box(&traffic).chain(&service).is_some()));
}

//! What clients see of lists: filters, order by distance, the mesh's endpoints, coordinates.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::fake::{Bench, is_pending, node_entry, service, tokio_test_task};
use super::guard::Peer;
use super::shape::Check;
use super::sift::{Listed, Listing, Member, OfNode, Own};
use crate::authz;
use crate::filter::{Fields, Filter};
use crate::model::{HealthStatus, INGRESS_GATEWAY, MemberStatus, Protocol};
use crate::registry::{CheckDefinition, LocalCheck, Probe};
use crate::traffic::{Entries, Ready, Traffic};

/// Reads `path` and returns the texts at `pointer` of each record.
async fn listed(bench: &Bench, path: &str, pointer: &str) -> Vec<String> {
    let answer = bench.get(path).await;
    assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
    let text = |record: &Value| record.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    answer.json().as_array().unwrap().iter().map(text).collect()
}

/// Percent-encodes what a query may not hold.
fn encoded(filter: &str) -> String {
    filter.replace('%', "%25").replace(' ', "%20").replace('"', "%22").replace('`', "%60").replace('&', "%26")
}

#[tokio::test]
async fn every_list_takes_a_filter_on_its_own_fields() {
    let bench = Bench::new();
    for (path, filter, pointer, want) in [
        ("/v1/catalog/nodes", "Meta.rack == r2", "/Node", &["n2"][..]),
        ("/v1/catalog/service/web", "NodeMeta.rack == r1 and v1 in ServiceTags", "/Node", &["n1"]),
        ("/v1/catalog/service/web", "ServicePort == 8081", "/Node", &[]),
        ("/v1/catalog/nodes", "TaggedAddresses.lan == `10.0.0.2`", "/Node", &["n2"]),
        ("/v1/catalog/service/web", "TaggedAddresses[\"wan\"] == `10.0.0.1`", "/Node", &["n1"]),
        ("/v1/health/service/web", "Node.TaggedAddresses.lan == `10.0.0.2`", "/Node/Node", &["n2"]),
        ("/v1/health/service/web", "virtual in Node.TaggedAddresses", "/Node/Node", &[]),
        ("/v1/health/service/web", "Service.Connect.Native == true", "/Node/Node", &[]),
        (
            "/v1/health/connect/web",
            "Service.Proxy.DestinationServiceName == web and Node.Node == n2",
            "/Service/ID",
            &["web-1-sidecar-proxy"],
        ),
        ("/v1/catalog/connect/web", "ServiceProxy.DestinationServiceID != `web-1`", "/Node", &[]),
        ("/v1/catalog/service/web", "ServiceProxy.DestinationServiceName is empty", "/Node", &["n1", "n2"]),
        (
            "/v1/catalog/connect/web",
            "ServiceKind == connect-proxy and Node != n1",
            "/ServiceID",
            &["web-1-sidecar-proxy"],
        ),
        ("/v1/health/service/web", "Node.Node matches `2$` and Checks is not empty", "/Node/Node", &["n2"]),
        (
            "/v1/health/connect/web",
            "Service.Port == 8301 and Node.Node == n1",
            "/Service/Service",
            &["web-sidecar-proxy"],
        ),
        ("/v1/health/checks/web", "Node == n2 and Status == passing", "/Node", &["n2"]),
        ("/v1/health/node/n1", "CheckID == serfHealth", "/CheckID", &["serfHealth"]),
        ("/v1/health/state/any", "ServiceName is empty", "/Node", &["n1", "n2"]),
        ("/v1/agent/members", "Status == 4 and Tags.role == node", "/Name", &["n3"]),
    ] {
        let path = format!("{path}?filter={}", encoded(filter));
        assert_eq!(listed(&bench, &path, pointer).await, want, "{path}");
    }
    for (path, filter, want) in [
        ("/v1/agent/services", "Kind is empty", &["web-1"][..]),
        ("/v1/agent/services", "Proxy.DestinationServiceID == `web-1`", &["web-1-sidecar-proxy"]),
        ("/v1/agent/services", "Connect.Native == true", &[]),
        ("/v1/agent/services", "Kind == connect-proxy and Port == 8301", &["web-1-sidecar-proxy"]),
        ("/v1/agent/checks", "ServiceName == web and Output contains good", &["service:web-1"]),
        ("/v1/agent/checks", "Type == http", &[]),
        ("/v1/catalog/services", "ServiceName == web", &["web"]),
    ] {
        let found = bench.get(&format!("{path}?filter={}", encoded(filter))).await.json();
        let keys: Vec<&String> = found.as_object().unwrap().keys().collect();
        assert_eq!(keys, want, "{path} {filter}");
    }
}

#[tokio::test]
async fn a_bad_filter_is_refused_before_the_wait_and_says_what_exists() {
    let bench = Bench::new();
    for path in [
        "/v1/catalog/nodes",
        "/v1/catalog/services",
        "/v1/catalog/service/web",
        "/v1/catalog/connect/web",
        "/v1/catalog/node/n1",
        "/v1/catalog/node-services/n1",
        "/v1/health/service/web",
        "/v1/health/connect/web",
        "/v1/health/checks/web",
        "/v1/health/node/n1",
        "/v1/health/state/any",
        "/v1/agent/services",
        "/v1/agent/checks",
        "/v1/agent/members",
        "/v1/connect/intentions",
        "/v1/config/service-defaults",
        "/v1/config/service-intentions",
    ] {
        let answer = bench.get(&format!("{path}?index=1005&filter=Nope%20==%201")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path}");
        assert!(answer.text.starts_with("Invalid filter: selector Nope is not valid; there are "), "{}", answer.text);
    }
}

#[tokio::test]
async fn every_kind_of_record_reads_each_of_its_fields() {
    #[track_caller]
    fn check<T: Fields>(record: &T) {
        for (name, kind) in T::FIELDS {
            assert_eq!(record.value(name).kind(), Some(*kind), "{name}");
        }
    }
    let bench = Bench::new();
    let node = node_entry(1, MemberStatus::Alive);
    let web = service("web", &[Arc::clone(&node)], HealthStatus::Passing, 1);
    let instance = &web.instances[0];
    check(&*node);
    check(&Listed(instance));
    check(&OfNode(instance));
    let state = bench.registry.state.borrow().clone();
    let own = &state.services.values().next().unwrap().definition;
    check(&Own { definition: own, mesh_port: None });
    check(&Check::serf(&node));
    check(&Check::local(state.checks.values().next().unwrap(), "n1"));
    check(&authz::from_json(&json!({"SourceName": "a", "DestinationName": "b", "Action": "allow"}), None).unwrap());
    check(&Listing::of(&json!({"Kind": "service-defaults", "name": "web", "Meta": {"team": "a"}})));
    let (name, addr) = ("n1".to_owned(), "10.0.0.1".to_owned());
    check(&Member { name, addr, port: 8301, status: 1, tags: [("dc".to_owned(), "dc1".to_owned())].into() });
}

#[tokio::test]
async fn near_this_agent_orders_by_measured_round_trips() {
    let bench = Bench::new();
    // n3 has no connection, so no measure; n0 comes first by name alone.
    four(&bench);
    for (path, pointer) in [
        ("/v1/health/service/web", "/Node/Node"),
        ("/v1/catalog/service/web", "/Node"),
        ("/v1/catalog/nodes", "/Node"),
        ("/v1/health/checks/web", "/Node"),
    ] {
        assert_eq!(listed(&bench, path, pointer).await, ["n0", "n1", "n2", "n3"], "{path}");
        for near in ["_agent", "n1"] {
            let near = format!("{path}?near={near}");
            assert_eq!(listed(&bench, &near, pointer).await, ["n1", "n2", "n0", "n3"], "{near}");
        }
    }
    assert!(bench.members.asked.lock().unwrap().is_empty(), "nobody else was asked");
}

/// Four nodes, and an instance of `web` on each.
fn four(bench: &Bench) {
    bench.publish(|next| {
        let nodes = [0, 1, 2, 3].map(|number| node_entry(number, MemberStatus::Alive));
        let web = service("web", &nodes, HealthStatus::Passing, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
        next.nodes = nodes.iter().map(|node| (node.info.name.clone(), Arc::clone(node))).collect();
    });
}

#[tokio::test(start_paused = true)]
async fn near_another_node_is_what_that_node_measured_asked_once_in_a_while() {
    let bench = Bench::new();
    four(&bench);
    let path = "/v1/health/service/web?near=n2";
    for _ in 0..3 {
        assert_eq!(listed(&bench, path, "/Node/Node").await, ["n2", "n3", "n0", "n1"]);
    }
    assert_eq!(listed(&bench, "/v1/catalog/nodes?near=n2", "/Node").await, ["n2", "n3", "n0", "n1"]);
    assert_eq!(bench.members.asked.lock().unwrap().len(), 1, "one answer for all of them");
    tokio::time::advance(std::time::Duration::from_secs(6)).await;
    assert_eq!(listed(&bench, path, "/Node/Node").await, ["n2", "n3", "n0", "n1"]);
    assert_eq!(bench.members.asked.lock().unwrap().len(), 2);
    // One that cannot be asked comes first, the others stay in their order; one that is not there orders nothing.
    assert_eq!(listed(&bench, "/v1/catalog/nodes?near=n3", "/Node").await, ["n3", "n0", "n1", "n2"]);
    assert_eq!(listed(&bench, "/v1/catalog/nodes?near=n9", "/Node").await, ["n0", "n1", "n2", "n3"]);
    assert_eq!(bench.members.asked.lock().unwrap().len(), 3);
    assert_eq!(bench.get("/v1/catalog/nodes?near=a/b").await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn near_ip_is_the_node_that_asks() {
    let bench = Bench::new();
    four(&bench);
    let ask = |peer: Option<&str>, forwarded: Option<&str>| {
        let mut request = http::Request::get("/v1/catalog/nodes?near=_ip");
        if let Some(ip) = peer {
            request = request.extension(Peer(ip.parse().unwrap()));
        }
        if let Some(list) = forwarded {
            request = request.header("x-forwarded-for", list);
        }
        let answer = bench.send(request.body(axum::body::Body::empty()).unwrap());
        async move {
            let all = answer.await.json();
            all.as_array().unwrap().iter().map(|node| node["Node"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        }
    };
    let here = ["n1", "n2", "n0", "n3"];
    assert_eq!(ask(None, None).await, here, "by the unix socket");
    assert_eq!(ask(Some("127.0.0.1"), None).await, here);
    assert_eq!(ask(Some("10.0.0.1"), None).await, here);
    assert_eq!(ask(Some("10.0.0.2"), None).await, ["n2", "n3", "n0", "n1"]);
    assert_eq!(ask(Some("127.0.0.1"), Some("10.0.0.2, 10.0.0.9")).await, ["n2", "n3", "n0", "n1"]);
    assert_eq!(ask(Some("192.0.2.1"), None).await, ["n0", "n1", "n2", "n3"], "no node is there");
}

#[tokio::test]
async fn the_distance_of_coordinates_is_the_measured_round_trip() {
    let bench = Bench::new();
    let all = bench.get("/v1/coordinate/nodes").await.json();
    let height = |at: usize| all[at]["Coord"]["Height"].as_f64().unwrap();
    assert_eq!((&all[0]["Node"], &all[1]["Node"]), (&json!("n1"), &json!("n2")));
    assert!((height(0) + height(1) - 0.003).abs() < 1e-9, "{all}");
    let one = bench.get("/v1/coordinate/node/n2").await.json();
    assert_eq!(one, json!([all[1]]));
    assert_eq!(one[0]["Coord"]["Vec"].as_array().unwrap().len(), 8);
    assert_eq!(bench.get("/v1/coordinate/node/n9").await.status, StatusCode::NOT_FOUND);
    let from = |node: &str| bench.get(&format!("/v1/mesh/round-trips?from={node}"));
    assert_eq!(from("").await.json(), json!({"From": "n1", "Seconds": {"n1": 0.0, "n2": 0.003}}));
    let told = json!({"From": "n2", "Seconds": {"n0": 0.005, "n1": 0.009, "n2": 0.0, "n3": 0.001}});
    assert_eq!(from("n2").await.json(), told);
    assert_eq!(from("n9").await.status, StatusCode::NOT_FOUND);
    assert_eq!(from("a/b").await.status, StatusCode::BAD_REQUEST);
    let datacenters = bench.get("/v1/coordinate/datacenters").await.json();
    assert_eq!(
        (&datacenters[0]["Datacenter"], &datacenters[0]["Coordinates"][0]["Node"]),
        (&json!("dc1"), &json!("n1"))
    );
    let answer = bench.put("/v1/coordinate/update", "{}").await;
    assert_eq!(answer.status, StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test]
async fn the_mesh_s_endpoints_are_the_agents_of_healthy_instances() {
    let bench = Bench::new();
    bench.publish(|next| {
        let nodes = [node_entry(1, MemberStatus::Alive), node_entry(2, MemberStatus::Alive)];
        let mut db = service("db", &nodes[..1], HealthStatus::Passing, next.index);
        db.instances.extend(service("db", &nodes[1..], HealthStatus::Critical, next.index).instances);
        next.services.insert(db.name.clone(), Arc::new(db));
    });
    let all = bench.get("/v1/health/connect/db").await.json();
    assert_eq!(all.as_array().unwrap().len(), 2);
    let first = &all[0]["Service"];
    assert_eq!(
        (&first["Kind"], &first["Port"], &first["Address"]),
        (&json!("connect-proxy"), &json!(8301), &json!(""))
    );
    let proxy = json!({"DestinationServiceName": "db", "DestinationServiceID": "db-1", "Mode": "", "MeshGateway": {}, "Expose": {}});
    assert_eq!(first["Proxy"], proxy);
    assert_eq!(listed(&bench, "/v1/health/connect/db?passing", "/Node/Node").await, ["n1"]);
    assert_eq!(listed(&bench, "/v1/catalog/connect/db", "/ServiceName").await, ["db-sidecar-proxy"; 2]);
    assert_eq!(bench.get("/v1/health/connect/none").await.json(), json!([]));
}

#[tokio::test]
async fn gateways_are_listed_by_the_services_that_they_lead_to() {
    let bench = Bench::new();
    let listeners = json!({"Listeners": [
        {"Port": 8080, "Protocol": "http", "Services": [{"Name": "web", "Hosts": ["shop.example"]}, {"Name": "*"}]},
        {"Port": 9000, "Services": [{"Name": "db"}]}, {"Port": 9001, "Services": [{"Name": "db"}]}]});
    let before = bench.publish(|next| {
        let nodes = [node_entry(1, MemberStatus::Alive), node_entry(2, MemberStatus::Alive)];
        let mut edge = service("edge", &nodes[..1], HealthStatus::Passing, next.index);
        edge.instances.extend(service("edge", &nodes[1..], HealthStatus::Critical, next.index).instances);
        for instance in &mut edge.instances {
            Arc::make_mut(&mut Arc::make_mut(instance).record).kind = INGRESS_GATEWAY.into();
        }
        let api = service("api", &nodes[..1], HealthStatus::Passing, next.index);
        let mut db = service("db", &nodes[..1], HealthStatus::Passing, next.index);
        db.protocol = Protocol::Tcp;
        for service in [edge, api, db] {
            next.services.insert(service.name.clone(), Arc::new(service));
        }
    });
    assert_eq!(bench.get("/v1/health/ingress/db").await.json(), json!([]), "without an entry there is no gateway");
    // Whoever waits for a service's gateways is woken by the entry.
    let waiting = bench.get(&format!("/v1/health/ingress/db?index={before}&wait=60s"));
    let entered = async {
        tokio::task::yield_now().await;
        bench.publish(|next| {
            let mut entries = Entries::default();
            entries.add(INGRESS_GATEWAY, "edge", Ready::new(INGRESS_GATEWAY, &listeners).unwrap());
            next.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
            next.traffic_index = next.index;
        })
    };
    let (woken, index) = tokio::join!(waiting, entered);
    let nodes = |found: &Value| -> Vec<String> {
        let node = |one: &Value| {
            format!("{} {}", one["Node"]["Node"].as_str().unwrap(), one["Service"]["Kind"].as_str().unwrap())
        };
        found.as_array().unwrap().iter().map(node).collect()
    };
    assert_eq!(
        (nodes(&woken.json()), woken.index()),
        (vec!["n1 ingress-gateway".to_owned(), "n2 ingress-gateway".to_owned()], index)
    );
    assert_eq!(listed(&bench, "/v1/health/ingress/web?passing", "/Node/Node").await, ["n1"]);
    assert_eq!(bench.get("/v1/health/ingress/edge").await.json(), json!([]));

    let row = |service: &str, port: u16, protocol: &str| {
        json!({"Gateway": {"Name": "edge"}, "Service": {"Name": service}, "GatewayKind": "ingress-gateway", "Port": port,
            "Protocol": protocol, "CreateIndex": index, "ModifyIndex": index})
    };
    let with = |mut row: Value, key: &str, value: Value| {
        row[key] = value;
        row
    };
    let want = json!([
        with(row("web", 8080, "http"), "Hosts", json!(["shop.example"])),
        with(row("api", 8080, "http"), "FromWildcard", json!(true)),
        row("db", 9000, "tcp"),
        row("db", 9001, "tcp"),
    ]);
    assert_eq!(bench.get("/v1/catalog/gateway-services/edge").await.json(), want);
    assert_eq!(bench.get("/v1/catalog/gateway-services/nobody").await.json(), json!([]));
    for (filter, rows) in [
        ("Port == 9001", &[3][..]),
        ("Protocol == http and FromWildcard == false", &[0]),
        ("\"shop.example\" in Hosts", &[0]),
        ("Service.Name == db", &[2, 3]),
        ("Gateway.Name != edge", &[]),
    ] {
        let path =
            format!("/v1/catalog/gateway-services/edge?filter={}", filter.replace(' ', "%20").replace('"', "%22"));
        let want: Vec<&Value> = rows.iter().map(|row: &usize| &want[*row]).collect();
        assert_eq!(bench.get(&path).await.json(), json!(want), "{filter}");
    }
    let refused = bench.get("/v1/catalog/gateway-services/edge?filter=Colour%20==%20red").await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.text);
}

#[tokio::test]
async fn what_is_not_there_yet_has_an_index_to_wait_with() {
    let bench = Bench::new();
    let paths = [
        "/v1/config/service-defaults/web?pretty",
        "/v1/connect/intentions/exact?source=a&destination=b",
        "/v1/connect/intentions/00000000-0000-0000-0000-000000000000?pretty",
        "/v1/coordinate/node/n9?pretty",
    ];
    for (number, path) in (5..).zip(paths) {
        let absent = bench.get(path).await;
        assert_eq!(absent.status, StatusCode::NOT_FOUND, "{path}");
        assert!(!absent.text.is_empty(), "{path} says what is missing");
        let mut waiting = tokio_test_task(bench.get(&format!("{path}&index={}&wait=10m", absent.index())));
        assert!(is_pending(&mut waiting).await, "{path}");
        let index = bench.publish(|snapshot| {
            snapshot.policy_index = snapshot.index;
            let node = node_entry(number, MemberStatus::Alive);
            snapshot.nodes.insert(node.info.name.clone(), node);
        });
        let woken = waiting.await.unwrap();
        assert_eq!((woken.status, woken.index()), (StatusCode::NOT_FOUND, index), "{path}");
    }
}

#[tokio::test]
async fn maintenance_is_a_kind_of_its_own_among_this_agent_s_checks() {
    let bench = Bench::new();
    bench.registry.state.send_modify(|state| {
        let state = Arc::make_mut(state);
        let web = Arc::clone(state.checks.values().next().unwrap());
        let mut definition = CheckDefinition::clone(&web.definition);
        (definition.id, definition.probe) = ("_node_maintenance".parse().unwrap(), Probe::Static);
        let id = definition.id.clone();
        state.checks.insert(id, Arc::new(LocalCheck { definition: Arc::new(definition), ..LocalCheck::clone(&web) }));
    });
    let checks = bench.get("/v1/agent/checks").await.json();
    let kinds = ["_node_maintenance", "service:web-1"].map(|id| checks[id]["Type"].clone());
    assert_eq!(kinds, ["maintenance", "ttl"], "{checks}");
}

#[tokio::test]
async fn a_node_is_shown_with_its_services_by_id_or_in_a_list() {
    let bench = Bench::new();
    let node = bench.get("/v1/catalog/node/n2").await.json();
    assert_eq!((&node["Node"]["Node"], &node["Services"]["web-1"]["Service"]), (&json!("n2"), &json!("web")));
    assert_eq!(node["Services"].as_object().unwrap().len(), 1);
    let own = bench.get("/v1/catalog/node-services/uuid-1").await.json();
    let ids: Vec<&Value> = own["Services"].as_array().unwrap().iter().map(|service| &service["ID"]).collect();
    assert_eq!(ids, ["web-1", "web-1-sidecar-proxy"]);
    let only = bench.get("/v1/catalog/node-services/n1?filter=Kind%20is%20empty").await.json();
    assert_eq!(only["Services"].as_array().unwrap().len(), 1);
    let unknown = bench.get("/v1/catalog/node/n9").await;
    assert_eq!((unknown.text.as_str(), unknown.index()), ("null", 1005));
}

#[test]
fn intentions_and_config_entries_are_found_by_their_fields() {
    #[track_caller]
    fn check<T: Fields>(record: &T, filter: &str, want: bool) {
        assert_eq!(Filter::parse::<T>(filter).unwrap().is_match(record), want, "{filter}");
    }
    let body = json!({"SourceName": "*", "DestinationName": "db", "Action": "deny", "Description": "old", "Meta": {"team": "a"}});
    let deny = authz::from_json(&body, None).unwrap();
    check(&deny, "DestinationName == db and SourceName == `*` and Precedence == 8", true);
    check(&deny, "Action == allow or Meta.team != a", false);
    let paths = json!({"SourceName": "a", "DestinationName": "db", "Permissions": [{"Action": "allow", "HTTP": {"PathExact": "/"}}]});
    check(&authz::from_json(&paths, None).unwrap(), "Action is empty", true);
    let entry = json!({"Kind": "service-defaults", "Name": "web", "protocol": "http", "meta": {"team": "a"}});
    check(&Listing::of(&entry), "Name matches `^w` and Protocol == http and team in Meta", true);
    check(&Listing::of(&entry), "Meta.team == b", false);
}

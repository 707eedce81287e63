//! What clients see of lists: filters, order by distance, the mesh's endpoints, coordinates.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::fake::{Bench, node_entry, service};
use super::shape::Check;
use super::sift::{Listed, Member, OfNode, Own};
use crate::filter::Fields;
use crate::model::{HealthStatus, MemberStatus};

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
    let (name, addr) = ("n1".to_owned(), "10.0.0.1".to_owned());
    check(&Member { name, addr, port: 8301, status: 1, tags: [("dc".to_owned(), "dc1".to_owned())].into() });
}

#[tokio::test]
async fn near_this_agent_orders_by_measured_round_trips() {
    let bench = Bench::new();
    bench.publish(|next| {
        // n3 has no connection, so no measure; n0 comes first by name alone.
        let nodes = [0, 1, 2, 3].map(|number| node_entry(number, MemberStatus::Alive));
        let web = service("web", &nodes, HealthStatus::Passing, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
        next.nodes = nodes.iter().map(|node| (node.info.name.clone(), Arc::clone(node))).collect();
    });
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
    let answer = bench.get("/v1/catalog/nodes?near=n2").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.text.contains("say near=_agent, or ask that node's agent"), "{}", answer.text);
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

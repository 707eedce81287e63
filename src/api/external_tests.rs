//! Nodes without an agent in the API: written here, listed like others, left out of the mesh.

use std::sync::Arc;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::fake::{Bench, snapshot};
use super::guard::{ApiToken, Right};
use super::seam::RegistryOrder;
use crate::model::{ExternalRecord, MemberStatus};
use crate::registry::definition::external_from_json;
use crate::registry::{ExternalNode, ExternalPart};

fn body(node: &str) -> Value {
    json!({
        "Node": node,
        "Address": "db.example.org",
        "TaggedAddresses": {"wan": "198.51.100.7"},
        "NodeMeta": {"external-node": "true"},
        "Service": {"ID": "db-1", "Service": "db", "Tags": ["primary"], "Port": 5432},
        "Checks": [
            {"CheckID": "up", "Name": "Is up", "Status": "warning", "Output": "slow"},
            {"CheckID": "db", "Status": "passing", "ServiceID": "db-1", "Definition": {"TCP": "db.example.org:5432"}},
        ],
    })
}

/// What a registration of `body` makes.
fn node(body: &Value) -> ExternalNode {
    let write = external_from_json(body).unwrap().body;
    ExternalNode::written(None, write, &"*".parse().unwrap()).unwrap()
}

fn record(name: &str) -> ExternalRecord {
    ExternalRecord::clone(&node(&body(name)).record)
}

/// Shows what the agent of `writer`, which is `status`, wrote; returns the index.
fn show(bench: &Bench, writer: &str, status: MemberStatus, records: &[ExternalRecord]) -> u64 {
    bench.publish(|snapshot| {
        snapshot.externals = Arc::new(snapshot.externals.after(writer, status, records, snapshot.index));
    })
}

#[tokio::test]
async fn a_registration_reaches_the_registry_and_says_true() {
    let bench = Bench::new();
    let answer = bench.put("/v1/catalog/register", &body("h1").to_string()).await;
    assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "true"));
    let write = external_from_json(&body("h1")).unwrap().body;
    assert_eq!(bench.orders(), [RegistryOrder::RegisterExternal(Box::new(write))]);
    let answer = bench.put("/v1/catalog/deregister", r#"{"Node": "h1", "ServiceID": "db-1"}"#).await;
    assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "true"));
    let part = ExternalPart::Service("db-1".parse().unwrap());
    assert_eq!(bench.orders()[1], RegistryOrder::DeregisterExternal { node: "h1".parse().unwrap(), part });
    assert_eq!(bench.call(Method::POST, "/v1/catalog/register", "{}").await.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn names_of_the_mesh_and_of_other_agents_are_refused_with_what_to_do() {
    let bench = Bench::new();
    show(&bench, "n2", MemberStatus::Alive, &[record("h2")]);
    // n1 is this agent, n2 alive, n3 failed; h2 is written at n2.
    for (name, want) in
        [("n1", "node of the mesh"), ("n2", "node of the mesh"), ("n3", "node of the mesh"), ("h2", "agent of n2")]
    {
        for verb in ["register", "deregister"] {
            let text = if verb == "register" { body(name) } else { json!({"Node": name}) };
            let refused = bench.put(&format!("/v1/catalog/{verb}"), &text.to_string()).await;
            assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{verb} {name}");
            assert!(refused.text.contains(want), "{}", refused.text);
        }
    }
    assert!(bench.orders().is_empty());
    // One whose agent does not answer may be written elsewhere.
    show(&bench, "n2", MemberStatus::Failed, &[record("h2")]);
    assert_eq!(bench.put("/v1/catalog/register", &body("h2").to_string()).await.status, StatusCode::OK);
    let mut other = body("h1");
    other["Datacenter"] = json!("dc9");
    let refused = bench.put("/v1/catalog/register", &other.to_string()).await;
    assert_eq!((refused.status, refused.text.as_str()), (StatusCode::INTERNAL_SERVER_ERROR, "No path to datacenter"));
    let refused = bench.put("/v1/catalog/register", r#"{"Node": "h1", "Address": "192.0.2.1", "Colour": 1}"#).await;
    assert_eq!(
        (refused.status, refused.text.as_str()),
        (StatusCode::BAD_REQUEST, "Request decode failed: unknown field `Colour`")
    );
}

#[tokio::test]
async fn writing_takes_the_right_that_registrations_take() {
    let tokens = [("r", Right::Read), ("s", Right::Services)].map(|(token, right)| ApiToken::new(token, right));
    let bench = Bench::with_tokens(tokens.into(), 2);
    for verb in ["register", "deregister"] {
        let text = if verb == "register" { body("h1") } else { json!({"Node": "h1"}) };
        for (token, want) in [("r", StatusCode::FORBIDDEN), ("s", StatusCode::OK)] {
            let answer = bench.put(&format!("/v1/catalog/{verb}?token={token}"), &text.to_string()).await;
            assert_eq!(answer.status, want, "{verb} {token}: {}", answer.text);
        }
    }
}

#[tokio::test]
async fn every_list_of_discovery_shows_them_and_no_list_of_the_mesh() {
    let bench = Bench::new();
    show(&bench, "n2", MemberStatus::Alive, &[record("h1")]);
    let nodes = bench.get("/v1/catalog/nodes").await.json();
    let names: Vec<&str> = nodes.as_array().unwrap().iter().map(|node| node["Node"].as_str().unwrap()).collect();
    assert_eq!(names, ["h1", "n1", "n2"]);
    assert_eq!(nodes[0]["Address"], "db.example.org");
    assert_eq!(nodes[0]["TaggedAddresses"], json!({"lan": "db.example.org", "wan": "198.51.100.7"}));
    assert_eq!(nodes[0]["Meta"]["external-node"], "true");
    assert_eq!(bench.get("/v1/catalog/services").await.json()["db"], json!(["primary"]));
    let listed = bench.get("/v1/catalog/service/db").await.json();
    assert_eq!((&listed[0]["Node"], &listed[0]["ServicePort"]), (&json!("h1"), &json!(5432)));
    let of_node = bench.get("/v1/catalog/node/h1").await.json();
    assert_eq!(of_node["Services"]["db-1"]["Service"], "db");
    assert_eq!(bench.get("/v1/catalog/node-services/h1").await.json()["Services"].as_array().unwrap().len(), 1);
    let health = bench.get("/v1/health/service/db").await.json();
    let checks: Vec<&str> =
        health[0]["Checks"].as_array().unwrap().iter().map(|c| c["CheckID"].as_str().unwrap()).collect();
    assert_eq!(checks, ["serfHealth", "up", "db"]);
    assert_eq!(bench.get("/v1/health/service/db?passing").await.json(), json!([]), "its node warns");
    let warning = bench.get("/v1/health/state/warning").await.json();
    assert_eq!((&warning[0]["Node"], &warning[0]["Name"]), (&json!("h1"), &json!("Is up")));
    assert_eq!(bench.get("/v1/health/node/h1").await.json().as_array().unwrap().len(), 3);
    assert_eq!(bench.get("/v1/health/checks/db").await.json()[0]["ServiceID"], "db-1");
    let by_address = "/v1/catalog/nodes?filter=Address%20==%20%22db.example.org%22";
    assert_eq!(bench.get(by_address).await.json().as_array().unwrap().len(), 1);
    let by_node = "/v1/health/service/db?filter=Node.Address%20contains%20%22example%22";
    assert_eq!(bench.get(by_node).await.json().as_array().unwrap().len(), 1);
    let query = json!({"Name": "q", "Service": {"Service": "db"}}).to_string();
    bench.call(Method::POST, "/v1/query", &query).await.json();
    assert_eq!(bench.get("/v1/query/q/execute").await.json()["Nodes"][0]["Node"]["Node"], "h1");

    for path in ["/v1/catalog/connect/db", "/v1/health/connect/db"] {
        assert_eq!(bench.get(path).await.json(), json!([]), "{path}");
    }
    let why = bench.get("/v1/mesh/why?source=web&destination=db").await.json();
    let remedy =
        why["ToChange"].as_array().unwrap().iter().any(|one| one.as_str().unwrap().contains("without an agent"));
    assert!(remedy, "{why}");

    show(&bench, "n2", MemberStatus::Failed, &[record("h1")]);
    let failed = bench.get("/v1/health/state/critical").await.json();
    assert_eq!((&failed[0]["Node"], &failed[0]["CheckID"]), (&json!("h1"), &json!("serfHealth")));
    assert!(failed[0]["Output"].as_str().unwrap().contains("where it was registered"), "{failed}");
}

#[tokio::test]
async fn a_change_wakes_who_waits_for_it_and_nobody_else() {
    let bench = Bench::new();
    let at = show(&bench, "n2", MemberStatus::Alive, &[record("h1")]);
    let seen = bench.get("/v1/health/service/db").await.index();
    assert_eq!(seen, at);
    let nodes = bench.get("/v1/catalog/nodes").await.index();
    let waiting = bench.get(&format!("/v1/health/service/db?index={seen}&wait=60s"));
    let others = bench
        .get(&format!("/v1/health/service/web?index={}&wait=50ms", bench.get("/v1/health/service/web").await.index()));
    let change = async {
        let mut changed = record("h1");
        let mut service = crate::model::ServiceRecord::clone(&changed.services[0]);
        service.port = 5433;
        changed.services = [Arc::new(service)].into();
        show(&bench, "n2", MemberStatus::Alive, &[changed])
    };
    let (answer, other, index) = tokio::join!(waiting, others, change);
    assert_eq!((answer.index(), &answer.json()[0]["Service"]["Port"]), (index, &json!(5433)));
    assert!(other.index() < index, "the wait for another service timed out");
    assert!(bench.get("/v1/catalog/nodes").await.index() >= nodes);
    let gone = bench.get(&format!("/v1/health/service/db?index={index}&wait=60s"));
    let (gone, _) = tokio::join!(gone, async { show(&bench, "n2", MemberStatus::Alive, &[]) });
    assert_eq!(gone.json(), json!([]));
}

#[tokio::test]
async fn what_a_check_said_is_shown_where_it_was_written() {
    let bench = Bench::new();
    let kept = node(&body("h1"));
    bench.registry.state.send_modify(|state| {
        Arc::make_mut(state).externals.insert("h1".parse().unwrap(), Arc::new(kept.clone()));
    });
    for (writer, output, definition) in [("n1", "slow", json!({"TCP": "db.example.org:5432"})), ("n2", "", json!({}))] {
        show(&bench, writer, MemberStatus::Alive, &[record("h1")]);
        let checks = bench.get("/v1/health/node/h1").await.json();
        assert_eq!((&checks[1]["CheckID"], &checks[1]["Output"]), (&json!("up"), &json!(output)), "{writer}");
        assert_eq!((&checks[2]["CheckID"], &checks[2]["Definition"]), (&json!("db"), &definition), "{writer}");
    }
    assert_eq!(snapshot().externals.nodes().count(), 0, "the bench begins with none");
}

//! What clients see: shapes, statuses, headers, waiting.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Method, Request, StatusCode};
use serde_json::json;

use super::fake::{Answer, Bench, is_pending, node_entry, on_loopback, service, snapshot, tokio_test_task};
use super::guard::Arrival;
use super::seam::{GossipOrder, RegistryOrder};
use super::{ApiConfig, ApiError, ApiToken, BODY_BYTES_MAX, Right, serve};
use crate::clock;
use crate::gossip::GossipError;
use crate::model::{HealthStatus, MemberStatus};
use crate::registry::RegistryError;

#[track_caller]
fn refused(answer: &Answer, status: u16, text: &str) {
    assert_eq!((answer.status.as_u16(), answer.text.as_str()), (status, text));
    assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8");
}

#[tokio::test]
async fn agent_services_lists_a_plain_service_and_its_synthetic_proxy() {
    let want = json!({
        "web-1": {"ID": "web-1", "Service": "web", "Tags": ["v1", "Blue"], "Meta": {}, "Port": 8080, "Address": "",
            "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": false, "Datacenter": "dc1"},
        "web-1-sidecar-proxy": {"Kind": "connect-proxy", "ID": "web-1-sidecar-proxy", "Service": "web-sidecar-proxy",
            "Tags": ["v1", "Blue"], "Meta": {}, "Port": 8301, "Address": "", "Weights": {"Passing": 1, "Warning": 1},
            "EnableTagOverride": false, "Datacenter": "dc1",
            "Proxy": {"DestinationServiceName": "web", "DestinationServiceID": "web-1",
                "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 8080, "Mode": "",
                "Upstreams": [{"DestinationType": "service", "DestinationName": "db", "Datacenter": "",
                    "LocalBindAddress": "127.0.0.1", "LocalBindPort": 9191, "Config": {}, "MeshGateway": {}}],
                "MeshGateway": {}, "Expose": {}}},
    });
    assert_eq!(Bench::new().get("/v1/agent/services").await.json(), want);
}

#[tokio::test]
async fn health_service_nests_node_service_and_checks() {
    let answer = Bench::new().get("/v1/health/service/web").await;
    let want = json!({
        "Node": {"ID": "uuid-1", "Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1",
            "TaggedAddresses": {"lan": "10.0.0.1", "wan": "10.0.0.1"}, "Meta": {"rack": "r1"},
            "CreateIndex": 1000, "ModifyIndex": 1001},
        "Service": {"ID": "web-1", "Service": "web", "Tags": ["v1", "Blue"], "Address": "", "Meta": {}, "Port": 8080,
            "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": false,
            "Proxy": {"Mode": "", "MeshGateway": {}, "Expose": {}}, "Connect": {},
            "CreateIndex": 1002, "ModifyIndex": 1003},
        "Checks": [
            {"Node": "n1", "CheckID": "serfHealth", "Name": "Serf Health Status", "Status": "passing", "Notes": "",
                "Output": "Agent alive and reachable", "ServiceID": "", "ServiceName": "", "ServiceTags": [],
                "Type": "", "ExposedPort": 0, "Definition": {}, "CreateIndex": 1000, "ModifyIndex": 1001},
            {"Node": "n1", "CheckID": "service:web-1", "Name": "Service check", "Status": "passing", "Notes": "",
                "Output": "all good", "ServiceID": "web-1", "ServiceName": "web", "ServiceTags": ["v1", "Blue"],
                "Type": "ttl", "ExposedPort": 0, "Definition": {}, "CreateIndex": 1002, "ModifyIndex": 1003}],
    });
    let got = answer.json();
    assert_eq!(got[0], want);
    assert_eq!(got[1]["Node"]["Node"], "n2");
    assert_eq!(got[1]["Checks"][1]["Output"], "", "another node's output stays there");
    assert_eq!(answer.index(), 1003);
    assert_eq!(answer.headers["x-consul-knownleader"], "true");
    assert_eq!(answer.headers["x-consul-lastcontact"], "0");
    assert_eq!(answer.headers["content-type"], "application/json");
}

#[tokio::test]
async fn catalog_service_is_flat() {
    let want = json!({"ID": "uuid-1", "Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1",
        "TaggedAddresses": {"lan": "10.0.0.1", "wan": "10.0.0.1"}, "NodeMeta": {"rack": "r1"}, "ServiceKind": "",
        "ServiceID": "web-1", "ServiceName": "web", "ServiceTags": ["v1", "Blue"], "ServiceAddress": "",
        "ServiceTaggedAddresses": {}, "ServiceWeights": {"Passing": 1, "Warning": 1}, "ServiceMeta": {},
        "ServicePort": 8080, "ServiceSocketPath": "", "ServiceEnableTagOverride": false,
        "ServiceProxy": {"Mode": "", "MeshGateway": {}, "Expose": {}}, "ServiceConnect": {},
        "CreateIndex": 1002, "ModifyIndex": 1003});
    assert_eq!(Bench::new().get("/v1/catalog/service/web").await.json()[0], want);
}

#[tokio::test]
async fn lists_of_the_catalogue_have_consuls_shapes() {
    let bench = Bench::new();
    let services = bench.get("/v1/catalog/services").await.json();
    assert_eq!(services, json!({"web": ["Blue", "v1"], "web-sidecar-proxy": ["Blue", "v1"]}));
    assert_eq!(bench.get("/v1/catalog/datacenters").await.json(), json!(["dc1"]));
    let nodes = bench.get("/v1/catalog/nodes?node-meta=rack:r2").await.json();
    assert_eq!(nodes.as_array().unwrap().len(), 1);
    assert_eq!(nodes[0]["Node"], "n2");
    let proxy = bench.get("/v1/catalog/service/web-sidecar-proxy").await.json();
    assert_eq!(proxy[0]["ServiceKind"], "connect-proxy");
    assert_eq!(proxy[0]["ServiceProxy"]["DestinationServiceID"], "web-1");
    assert_eq!(bench.get("/v1/health/service/none").await.json(), json!([]));
}

#[tokio::test]
async fn members_self_and_status_agree_on_the_representative() {
    let bench = Bench::new();
    let members = bench.get("/v1/agent/members").await.json();
    let want = json!({"Name": "n1", "Addr": "10.0.0.1", "Port": 8301,
        "Tags": {"dc": "dc1", "role": "node", "id": "uuid-1", "build": "0.1.0"}, "Status": 1, "ProtocolMin": 1,
        "ProtocolMax": 5, "ProtocolCur": 2, "DelegateMin": 2, "DelegateMax": 5, "DelegateCur": 4});
    assert_eq!(members[0], want);
    assert_eq!((&members[2]["Status"], &members[2]["Tags"]), (&json!(4), &json!({"role": "node"})));
    let about = bench.get("/v1/agent/self").await.json();
    let keys: Vec<&String> = about.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["Config", "Coord", "DebugConfig", "Member", "Meta", "Stats", "xDS"]);
    assert_eq!(about["Member"], want);
    assert_eq!(about["Stats"]["consul"]["leader_addr"], "10.0.0.1:8301");
    assert_eq!(about["Stats"]["serf_lan"], json!({"members": "3", "failed": "1", "left": "0"}));
    assert_eq!(about["Stats"]["weft"], json!({"isolated": "false"}));
    assert_eq!(bench.get("/v1/status/leader").await.json(), "10.0.0.1:8301");
    assert_eq!(bench.get("/v1/status/peers").await.json(), json!(["10.0.0.1:8301", "10.0.0.2:8301"]));
}

#[tokio::test]
async fn mesh_members_tell_how_long_each_is_what_it_is_and_when_it_is_forgotten() {
    let shown = Bench::new().get("/v1/mesh/members").await.json();
    assert_eq!(shown["Isolated"], false);
    let mut failed = shown["Members"][2].clone();
    let left = failed["ForgottenInSeconds"].take().as_u64().unwrap();
    assert!((72 * 3600 - 60..=72 * 3600).contains(&left), "{left}");
    assert!(failed["Seconds"].take().as_u64().unwrap() < 60);
    let want = json!({"Name": "n3", "Address": "10.0.0.3:8301", "Status": "failed", "Seconds": null,
        "ForgottenInSeconds": null, "Generation": 1, "Build": null, "Datacenter": null});
    assert_eq!(failed, want);
    assert_eq!(shown["Members"][0]["ForgottenInSeconds"], json!(null));
}

#[tokio::test]
async fn mesh_info_tells_what_weft_info_prints() {
    let want = json!({"Node": "n1", "NodeID": "uuid-1", "Datacenter": "dc1", "Version": "0.1.0",
        "TrustDomain": "prod.example", "SpiffeID": "spiffe://prod.example/node/n1", "ServeScope": "web,api-*",
        "Certificates": {"NodeEnds": "2023-11-14T22:13:20Z", "IntermediateEnds": "2023-11-21T22:13:20Z"},
        "MeshAddress": "10.0.0.1:8301", "Workers": 2,
        "UpstreamListeners": [{"Bind": "127.0.0.1:9191", "Destination": "db", "State": "listening"}],
        "Members": {"Alive": 2, "Known": 3}, "Isolated": false, "RecordsHash": "00000000000000ab", "Clock": null,
        "Policy": {"Intentions": 0, "Default": "allow", "Quarantined": [], "Forks": 0, "SignsForClients": false}});
    assert_eq!(Bench::new().get("/v1/mesh/info").await.json(), want);
}

#[tokio::test]
async fn certificates_for_native_apps_have_consul_s_shape() {
    let bench = Bench::new();
    let roots = bench.get("/v1/connect/ca/roots").await.json();
    assert_eq!(roots["TrustDomain"], "prod.example");
    assert_eq!((&roots["Roots"][0]["ID"], &roots["Roots"][0]["Active"]), (&roots["ActiveRootID"], &json!(true)));
    assert!(roots["Roots"][0]["RootCert"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----\n"));
    let leaf = bench.get("/v1/agent/connect/ca/leaf/web").await.json();
    assert_eq!(leaf["ServiceURI"], "spiffe://prod.example/svc/web/node/n1");
    assert_eq!(leaf["CertPEM"].as_str().unwrap().matches("BEGIN CERTIFICATE").count(), 3);
    assert!(leaf["PrivateKeyPEM"].as_str().unwrap().starts_with("-----BEGIN PRIVATE KEY-----\n"));
    let outside = bench.get("/v1/agent/connect/ca/leaf/db").await;
    assert_eq!(outside.status.as_u16(), 403, "{}", outside.text);

    let ask = |uri: &str| {
        let body = json!({"Target": "web", "ClientCertURI": uri, "ClientCertSerial": "01"}).to_string();
        bench.call(Method::POST, "/v1/agent/connect/authorize", &body)
    };
    assert_eq!(ask("spiffe://prod.example/svc/api/node/n2").await.json()["Authorized"], true);
    assert_eq!(ask("spiffe://other/svc/api/node/n2").await.json()["Authorized"], false);
    assert_eq!(ask("spiffe://prod.example").await.json()["Authorized"], false);
}

#[tokio::test]
async fn roots_and_leaf_block_until_they_change() {
    let bench = Bench::new();
    let now = crate::clock::wall();
    let leaf = bench.get("/v1/agent/connect/ca/leaf/web").await;
    let roots = bench.get("/v1/agent/connect/ca/roots").await;
    assert!(leaf.index() > 1_000_000_000_000, "the index does not go back over a restart");
    let again = bench.get("/v1/agent/connect/ca/leaf/web").await;
    assert_eq!((again.index(), &again.text), (leaf.index(), &leaf.text));
    let uri = format!("/v1/agent/connect/ca/leaf/web?index={}&wait=10m", leaf.index());
    let waiting = tokio_test_task(bench.get(&uri));
    let watching = tokio_test_task(bench.get(&format!("/v1/connect/ca/roots?index={}&wait=10m", roots.index())));
    while !bench.metrics.render().unwrap().contains("weft_api_blocking_queries 2") {
        tokio::task::yield_now().await;
    }
    // Another service's certificate wakes nobody for good.
    assert_eq!(bench.get("/v1/agent/connect/ca/leaf/db").await.status.as_u16(), 403);
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished() && !watching.is_finished());

    bench.identity.renew_due(now.plus(std::time::Duration::from_secs(3000))).unwrap();
    let renewed = waiting.await.unwrap();
    assert!(renewed.index() > leaf.index());
    assert_ne!(renewed.json()["SerialNumber"], leaf.json()["SerialNumber"]);
    assert!(!watching.is_finished(), "a leaf is no root");

    let mut bundle = crate::pki::TrustBundle::clone(&bench.identity.bundle());
    let other = crate::pki::ephemeral(&"prod.example".parse().unwrap(), now).unwrap();
    bundle.roots.insert(0, other.issuer().bundle().roots[0].clone());
    bench.identity.set_bundle(bundle, now);
    let rotated = watching.await.unwrap();
    assert!(rotated.index() > roots.index());
    assert_eq!(rotated.json()["Roots"].as_array().unwrap().len(), 2);
    // An index above is another agent's, or of a clock set back: it is answered at once.
    let ahead = bench.get(&format!("/v1/connect/ca/roots?index={}&wait=10m", rotated.index() + 7)).await;
    assert_eq!(ahead.index(), rotated.index());
    bench.stop.cancel();
    let stopped = bench.get(&format!("/v1/connect/ca/roots?index={}&wait=10m", rotated.index())).await;
    assert_eq!(stopped.index(), rotated.index());
}

#[tokio::test]
async fn a_document_that_is_none_is_refused_and_lists_are_empty() {
    let bench = Bench::new();
    for (body, want) in [
        ("{", "no JSON"),
        ("{}", "base64"),
        (r#"{"Document":"!"}"#, "not base64"),
        (r#"{"Document":"AQ=="}"#, "no document"),
    ] {
        let answer = bench.put("/v1/mesh/document", body).await;
        assert_eq!(answer.status.as_u16(), 400);
        assert!(answer.text.contains(want), "{}", answer.text);
    }
    let held = bench.get("/v1/mesh/documents").await.json();
    assert_eq!(held, json!({"SetHash": "0000000000000000", "Documents": []}));
    assert_eq!(bench.get("/v1/mesh/certificates").await.json(), json!([]));
    assert_eq!(bench.get("/v1/mesh/tokens").await.json(), json!([]));
}

#[tokio::test]
async fn tags_must_all_be_there_and_passing_leaves_out_the_rest() {
    let bench = Bench::new();
    let count = |uri: &'static str| {
        let answer = bench.get(uri);
        async move { answer.await.json().as_array().unwrap().len() }
    };
    assert_eq!(count("/v1/health/service/web?tag=v1&tag=blue").await, 2);
    assert_eq!(count("/v1/health/service/web?tag=v1&tag=green").await, 0);
    bench.publish(|next| {
        let nodes = [node_entry(1, MemberStatus::Alive)];
        let web = service("web", &nodes, HealthStatus::Warning, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
    });
    assert_eq!(count("/v1/health/service/web").await, 1);
    assert_eq!(count("/v1/health/service/web?passing").await, 0);
    assert_eq!(count("/v1/health/service/web?passing=false").await, 1);
    assert_eq!(count("/v1/health/state/warning").await, 1);
    assert_eq!(count("/v1/health/state/any").await, 3);
    assert_eq!(count("/v1/health/node/n1").await, 2);
    assert_eq!(count("/v1/health/checks/web").await, 1);
    refused(
        &bench.get("/v1/health/state/odd").await,
        400,
        "Invalid state \"odd\": it is one of any, passing, warning, critical",
    );
}

#[tokio::test]
async fn a_failed_node_is_critical_and_one_that_left_is_not_shown() {
    let bench = Bench::new();
    bench.publish(|next| {
        let nodes = [node_entry(1, MemberStatus::Failed), node_entry(2, MemberStatus::Left)];
        next.nodes = nodes.iter().map(|node| (node.info.name.clone(), Arc::clone(node))).collect();
        let web = service("web", &nodes, HealthStatus::Critical, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
    });
    let web = bench.get("/v1/health/service/web").await.json();
    assert_eq!(web.as_array().unwrap().len(), 1);
    assert_eq!(web[0]["Checks"][0]["Output"], "Agent not live or unreachable");
    assert_eq!(web[0]["Checks"][0]["Status"], "critical");
    assert_eq!(bench.get("/v1/catalog/nodes").await.json().as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn registration_goes_to_the_registry_and_its_refusals_keep_their_text() {
    let bench = Bench::new();
    let uri = "/v1/agent/service/register?replace-existing-checks=true";
    let answer = bench.put(uri, r#"{"Name":"db","Port":5432}"#).await;
    assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, ""));
    let orders = bench.orders();
    let Some(RegistryOrder::RegisterService { definition, replace_existing_checks: true }) = orders.first() else {
        panic!("{orders:?}");
    };
    assert_eq!(definition.record.name.as_str(), "db");
    let noted = bench.put(uri, r#"{"Name":"db","Proxy":{"Config":{"envoy_stats_bind_addr":"0.0.0.0:1"}}}"#).await;
    assert_eq!(noted.status, StatusCode::OK);
    assert!(noted.text.starts_with("Proxy.Config.envoy_stats_bind_addr has no effect: "), "{}", noted.text);
    for (error, status) in [
        (RegistryError::UnknownService { id: "x".to_owned() }, 404),
        (RegistryError::Invalid("127.0.0.1:1 is taken".to_owned()), 400),
        (RegistryError::Store("disk full".to_owned()), 500),
        (RegistryError::Closed, 503),
    ] {
        *bench.registry.verdict.lock().unwrap() = Err(error.clone());
        refused(&bench.put("/v1/agent/service/deregister/x", "").await, status, &error.to_string());
    }
    let out_of_scope = RegistryError::OutOfScope { service: "db".to_owned(), scope: "web".to_owned() };
    *bench.registry.verdict.lock().unwrap() = Err(out_of_scope);
    let answer = bench.put("/v1/agent/service/register", r#"{"Name":"db","Port":5432}"#).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.text.starts_with("Permission denied: ") && answer.text.contains("serve scope is `web`"));
}

#[tokio::test]
async fn bad_bodies_are_refused_in_words() {
    #[track_caller]
    fn check(answer: &Answer, status: u16, part: &str) {
        assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
        assert!(answer.text.contains(part), "{}", answer.text);
    }
    let bench = Bench::new();
    let register = "/v1/agent/service/register";
    check(&bench.put(register, "").await, 400, "Request decode failed: ");
    check(&bench.put(register, "{").await, 400, "Request decode failed: ");
    check(&bench.put(register, &"[".repeat(1000)).await, 400, "recursion limit");
    check(&bench.put(register, r#"{"Port":1}"#).await, 400, "Missing service name");
    check(&bench.put(register, r#"{"Name":"web","Colour":"red"}"#).await, 400, "Colour");
    check(&bench.put(register, &" ".repeat(BODY_BYTES_MAX + 1)).await, 413, "larger than 1048576 bytes");
    let announced = Request::put(register).header("content-length", "9999999999").body(Body::empty()).unwrap();
    check(&bench.send(announced).await, 413, "larger than");
    let update = "/v1/agent/check/update/c";
    check(&bench.put(update, r#"{"Status":"odd"}"#).await, 400, "Invalid check status: \"odd\"");
    check(&bench.put(update, r#"{"Stat":"odd"}"#).await, 400, "unknown field \"Stat\"");
    check(&bench.put(update, "[]").await, 400, "must be an object");
    assert_eq!(bench.orders(), []);
}

#[tokio::test]
async fn ttl_checks_take_words_in_four_ways() {
    let bench = Bench::new();
    for (uri, body, status, output) in [
        ("/v1/agent/check/pass/c?note=fine", "", HealthStatus::Passing, "fine"),
        ("/v1/agent/check/warn/c", "", HealthStatus::Warning, ""),
        ("/v1/agent/check/fail/c", "", HealthStatus::Critical, ""),
        ("/v1/agent/check/update/c", r#"{"status":"warning","OUTPUT":"hm"}"#, HealthStatus::Warning, "hm"),
    ] {
        assert_eq!(bench.put(uri, body).await.status, StatusCode::OK);
        let want = RegistryOrder::UpdateTtl { id: "c".parse().unwrap(), status, output: output.to_owned() };
        assert_eq!(bench.orders().last(), Some(&want));
    }
    assert_eq!(bench.put("/v1/agent/check/deregister/service:web-1%2F2", "").await.status, StatusCode::OK);
    assert_eq!(bench.orders().last(), Some(&RegistryOrder::DeregisterCheck("service:web-1/2".parse().unwrap())));
    let checks = bench.get("/v1/agent/checks").await.json();
    assert_eq!(checks["service:web-1"]["Output"], "all good");
    assert_eq!(checks["service:web-1"]["Type"], "ttl");
}

#[tokio::test]
async fn membership_orders_reach_gossip_and_leave_stops_the_node() {
    let bench = Bench::new();
    assert_eq!(bench.put("/v1/agent/join/%5B::1%5D:8301", "").await.status, StatusCode::OK);
    assert_eq!(bench.put("/v1/agent/force-leave/n3?prune", "").await.status, StatusCode::OK);
    let orders = bench.members.orders.lock().unwrap().clone();
    let force = GossipOrder::ForceLeave { name: "n3".parse().unwrap(), prune: true };
    assert_eq!(orders, [GossipOrder::Join("[::1]:8301".to_owned()), force]);
    let unknown = GossipError::UnknownMember("n9".to_owned());
    *bench.members.verdict.lock().unwrap() = Err(unknown.clone());
    refused(&bench.put("/v1/agent/force-leave/n9", "").await, 404, &unknown.to_string());
    assert!(!bench.leave.is_cancelled());
    assert_eq!(bench.put("/v1/agent/leave", "").await.status, StatusCode::OK);
    assert!(bench.leave.is_cancelled());
}

#[tokio::test]
async fn what_is_no_endpoint_is_refused_with_its_reason() {
    let bench = Bench::new();
    let unknown = "Invalid URL path: not a recognized HTTP API endpoint";
    refused(&bench.get("/v1/connect/nonsense").await, 404, unknown);
    refused(&bench.get("/v1/catalog/nodes/").await, 404, unknown);
    refused(&bench.get("/v1/acl/tokens").await, 401, "ACL support disabled");
    for path in ["/v1/session/create", "/v1/txn", "/v1/snapshot", "/v1/operator/raft/configuration"] {
        let answer = bench.get(path).await;
        assert_eq!(answer.status, StatusCode::NOT_IMPLEMENTED, "{path}");
        assert!(answer.text.starts_with("needs consensus; weft has none"), "{path}");
    }
    let text = "Unknown service ID \"x\". Ensure that the service ID is passed, not the service name.";
    refused(&bench.get("/v1/agent/service/x").await, 404, text);
}

#[tokio::test]
async fn policy_is_read_by_everybody_and_written_only_where_an_operator_s_key_is() {
    let bench = Bench::new();
    assert_eq!(bench.get("/v1/connect/intentions").await.json(), json!([]));
    let exact = "/v1/connect/intentions/exact?source=web&destination=db";
    refused(&bench.get(exact).await, 404, "Intention not found");
    let answer = bench.put(exact, r#"{"Action":"allow"}"#).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.text.contains("WEFT_OPERATOR") && answer.text.contains("policy_authority"), "{}", answer.text);
    assert_eq!(bench.put(exact, r#"{"Action":"allow","Colour":1}"#).await.status, StatusCode::BAD_REQUEST);
    let by_id = "/v1/connect/intentions/7f1b4f0c-0000-5000-8000-000000000000";
    refused(&bench.get(by_id).await, 404, "Unknown intention ID: 7f1b4f0c-0000-5000-8000-000000000000");
    refused(
        &bench.put(by_id, r#"{"Action":"allow"}"#).await,
        404,
        "Unknown intention ID: 7f1b4f0c-0000-5000-8000-000000000000",
    );
    assert_eq!(bench.get("/v1/connect/intentions/web").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(bench.get("/v1/connect/intentions?filter=x").await.status, StatusCode::BAD_REQUEST);
    let check = bench.get("/v1/connect/intentions/check?source=web&destination=db").await.json();
    assert_eq!(check, json!({"Allowed": true, "Rule": "default"}));
    assert_eq!(bench.get("/v1/connect/intentions/match?by=all&name=db").await.status, StatusCode::BAD_REQUEST);
    let why = bench.get("/v1/mesh/why?source=shop&destination=web&path=/a").await.json();
    assert_eq!((&why["Allowed"], &why["Policy"]["Rule"]), (&json!(true), &json!("default")));
    let instances: Vec<&serde_json::Value> =
        why["Instances"].as_array().unwrap().iter().map(|one| &one["Why"]).collect();
    assert_eq!(instances, [&json!("takes calls"), &json!("takes calls")]);
    assert_eq!(bench.get("/v1/config/nonsense").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(bench.get("/v1/config/service-defaults").await.json(), json!([]));
}

#[tokio::test]
async fn methods_are_named_where_another_is_used() {
    let bench = Bench::new();
    let answer = bench.put("/v1/catalog/nodes", "").await;
    refused(&answer, 405, "method PUT not allowed");
    assert_eq!(answer.headers["allow"], "GET,HEAD,OPTIONS");
    let answer = bench.call(Method::OPTIONS, "/v1/agent/leave", "").await;
    assert_eq!((answer.status, &answer.headers["allow"]), (StatusCode::OK, &"PUT,OPTIONS".parse().unwrap()));
    assert_eq!(bench.get("/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn options_that_cannot_be_honoured_are_refused() {
    let bench = Bench::new();
    for (query, status, part) in [
        ("filter=x", 400, "Invalid filter: selector x is not valid; there are Checks, Node.Address"),
        ("index=x", 400, "Invalid index"),
        ("index=1&wait=x", 400, "Invalid wait time"),
        ("max_stale=x", 400, "max_stale"),
    ] {
        let answer = bench.get(&format!("/v1/health/service/web?{query}")).await;
        assert_eq!(answer.status.as_u16(), status, "{query}: {}", answer.text);
        assert!(answer.text.contains(part), "{query}: {}", answer.text);
    }
    let taken = "/v1/health/service/web?stale&leader&cached&max_stale=10s&dc=dc1&ns=&index=0";
    assert_eq!(bench.get(taken).await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_blocking_query_sleeps_through_changes_of_others_and_wakes_at_its_own() {
    let bench = Bench::new();
    let index = bench.get("/v1/health/service/web").await.index();
    let mut waiting = tokio_test_task(bench.get(&format!("/v1/health/service/web?index={index}&wait=10m")));
    bench.publish(|next| {
        let db = service("db", &[node_entry(1, MemberStatus::Alive)], HealthStatus::Passing, next.index);
        next.services.insert(db.name.clone(), Arc::new(db));
    });
    tokio::time::advance(Duration::from_mins(1)).await;
    assert!(is_pending(&mut waiting).await);
    let changed = bench.publish(|next| {
        let web = service("web", &[node_entry(1, MemberStatus::Alive)], HealthStatus::Passing, next.index);
        next.services.insert(web.name.clone(), Arc::new(web));
    });
    assert_eq!(waiting.await.unwrap().index(), changed);
}

#[tokio::test(start_paused = true)]
async fn a_service_may_be_awaited_before_it_exists_and_watched_until_it_is_gone() {
    let bench = Bench::new();
    let index = bench.get("/v1/catalog/service/db").await.index();
    assert_eq!(index, snapshot().index);
    let mut waiting = tokio_test_task(bench.get(&format!("/v1/catalog/service/db?index={index}")));
    bench.publish(|_| {});
    assert!(is_pending(&mut waiting).await);
    let came = bench.publish(|next| {
        let db = service("db", &[node_entry(1, MemberStatus::Alive)], HealthStatus::Passing, next.index);
        next.services.insert(db.name.clone(), Arc::new(db));
    });
    assert_eq!(waiting.await.unwrap().index(), came);
    let waiting = tokio_test_task(bench.get(&format!("/v1/catalog/service/db?index={came}")));
    let gone = bench.publish(|next| {
        next.services.remove("db");
        next.gone_services.insert("db".parse().unwrap(), next.index);
    });
    let answer = waiting.await.unwrap();
    assert_eq!((answer.index(), answer.text.as_str()), (gone, "[]"));
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_in_its_time_and_at_once_for_a_foreign_index_or_a_stop() {
    let bench = Bench::new();
    let started = clock::now();
    assert_eq!(bench.get("/v1/health/service/web?index=1003&wait=16s").await.index(), 1003);
    let took = clock::now() - started;
    assert!(took >= Duration::from_secs(16) && took <= Duration::from_millis(17_010), "{took:?}");
    let started = clock::now();
    assert_eq!(bench.get("/v1/health/service/web?index=999999").await.index(), 1003);
    assert_eq!(bench.get("/v1/health/service/web?index=1").await.index(), 1003);
    assert_eq!(clock::now(), started);
    let waiting = tokio_test_task(bench.get("/v1/health/service/web?index=1003"));
    bench.stop.cancel();
    assert_eq!(waiting.await.unwrap().index(), 1003);
    assert_eq!(clock::now(), started);
}

#[tokio::test(start_paused = true)]
async fn what_operators_sign_is_awaited_on_each_of_its_lists() {
    let bench = Bench::new();
    for path in [
        "/v1/connect/intentions",
        "/v1/config/service-defaults",
        "/v1/config/service-intentions",
        "/v1/discovery-chain/web",
    ] {
        let index = bench.get(path).await.index();
        let mut waiting = tokio_test_task(bench.get(&format!("{path}?index={index}")));
        bench.publish(|next| next.services.clear());
        assert!(is_pending(&mut waiting).await, "{path}: a service is nothing to it");
        let changed = bench.publish(|next| next.policy_index = next.index);
        assert_eq!(waiting.await.unwrap().index(), changed, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_queries_are_bounded_and_counted() {
    let bench = Bench::new();
    let uri = "/v1/health/service/web?index=1003";
    let mut waiting = [tokio_test_task(bench.get(uri)), tokio_test_task(bench.get(uri))];
    for task in &mut waiting {
        assert!(is_pending(task).await);
    }
    refused(&bench.get(uri).await, 429, "Too many blocking queries: 2 wait already");
    let metrics = bench.get("/v1/agent/metrics?format=prometheus").await.text;
    assert!(metrics.contains("weft_api_blocking_queries 2"), "{metrics}");
    bench.stop.cancel();
    for task in waiting {
        assert_eq!(task.await.unwrap().status, StatusCode::OK);
    }
    let metrics = bench.metrics.render().unwrap();
    assert!(metrics.contains("weft_api_blocking_queries 0"), "{metrics}");
    assert!(
        metrics.contains(r#"weft_api_requests_total{code="429",endpoint="/v1/health/service/{name}"} 1"#),
        "{metrics}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_list_of_nodes_wakes_when_a_node_goes() {
    let bench = Bench::new();
    let index = bench.get("/v1/catalog/nodes").await.index();
    let mut waiting = tokio_test_task(bench.get(&format!("/v1/catalog/nodes?index={index}")));
    bench.publish(|_| {});
    assert!(is_pending(&mut waiting).await);
    let gone = bench.publish(|next| {
        next.nodes.remove("n2");
    });
    assert_eq!(waiting.await.unwrap().index(), gone);
}

#[tokio::test(start_paused = true)]
async fn a_content_hash_is_awaited_until_the_service_changes() {
    let bench = Bench::new();
    let answer = bench.get("/v1/agent/service/web-1").await;
    let hash = answer.json()["ContentHash"].as_str().unwrap().to_owned();
    assert_eq!(answer.headers["x-consul-contenthash"], hash.as_str());
    let mut waiting = tokio_test_task(bench.get(&format!("/v1/agent/service/web-1?hash={hash}")));
    assert!(is_pending(&mut waiting).await);
    bench.registry.state.send_modify(|state| {
        let state = Arc::make_mut(state);
        let service = state.services.get_mut("web-1").unwrap();
        Arc::make_mut(service).definition.record.port = 9090;
    });
    assert_eq!(waiting.await.unwrap().json()["Port"], 9090);
}

#[tokio::test]
async fn every_path_asks_for_a_set_token() {
    let bench = Bench::with(Some("s3cret"), 2);
    for path in ["/", "/v1/status/leader", "/v1/kv/x", "/nowhere"] {
        assert_eq!(bench.get(path).await.status, StatusCode::FORBIDDEN, "{path}");
    }
    assert_eq!(bench.get("/v1/status/leader?token=s3cret").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_page_of_another_site_changes_nothing() {
    let bench = Bench::new();
    let request = |host: &str, origin: &str| {
        let request = Request::put("/v1/agent/leave").header("host", host).header("origin", origin);
        request.extension(Arrival::Loopback).body(Body::empty()).unwrap()
    };
    let answer = bench.send(request("127.0.0.1:8500", "https://evil.example")).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let answer = bench.send(request("evil.example", "http://evil.example")).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(!bench.leave.is_cancelled());
}

#[tokio::test]
async fn listening_refuses_an_open_door_and_names_a_taken_port() {
    let config = |addr: &str, tokens| ApiConfig {
        listen: vec![addr.parse().unwrap()],
        https: None,
        socket: None,
        tokens,
        names: Vec::new(),
    };
    let open = serve::bind(&config("0.0.0.0:0", Vec::new()), None).await.err().unwrap();
    assert!(matches!(open, ApiError::TokenNeeded { .. }));
    assert!(open.to_string().contains("-client"));
    assert!(serve::bind(&config("0.0.0.0:0", vec![ApiToken::new("x", Right::Read)]), None).await.is_ok());
    let first = serve::bind(&config("127.0.0.1:0", Vec::new()), None).await.unwrap();
    let taken = first.addrs[0].to_string();
    let second = serve::bind(&config(&taken, Vec::new()), None).await.err().unwrap().to_string();
    assert!(second.contains(&taken) && second.contains("in use") && second.contains("-client"), "{second}");
}

#[tokio::test]
async fn a_socket_serves_requests_until_the_stop() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let bench = Bench::new();
    let listening = serve::bind(&on_loopback(None), None).await.unwrap();
    let addr = listening.addrs[0];
    let mut server = tokio::task::JoinSet::new();
    server.spawn(serve::run(listening, bench.router.clone(), serve::Limits::default(), bench.stop.clone()));
    let mut client = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!("GET /v1/health/service/web?index=1003 HTTP/1.1\r\nHost: {addr}\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    while !bench.metrics.render().unwrap().contains("weft_api_blocking_queries 1") {
        tokio::task::yield_now().await;
    }
    bench.stop.cancel();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("x-consul-index: 1003"), "{answer}");
    server.join_next().await.unwrap().unwrap();
}

#[tokio::test]
async fn maintenance_sets_and_ends_a_check_that_is_set_by_hand() {
    let bench = Bench::new();
    refused(&bench.put("/v1/agent/maintenance", "").await, 400, "Missing value for enable");
    refused(&bench.put("/v1/agent/maintenance?enable=x", "").await, 400, "Invalid value for enable: \"x\"");
    let unknown = "Unknown service ID \"x\". Ensure that the service ID is passed, not the service name.";
    refused(&bench.put("/v1/agent/service/maintenance/x?enable=true", "").await, 404, unknown);
    assert_eq!(bench.put("/v1/agent/maintenance?enable=false", "").await.status, StatusCode::OK);
    // Whoever may change checks does not thereby end maintenance, nor begin it.
    let own = "check ids of maintenance are the agent's own: PUT /v1/agent/maintenance?enable=…, or …/service/maintenance/:id";
    for path in ["deregister/_node_maintenance", "fail/_node_maintenance", "deregister/_service_maintenance:web-1"] {
        refused(&bench.put(&format!("/v1/agent/check/{path}"), "").await, 400, own);
    }
    let check = r#"{"ID": "_node_maintenance", "Name": "x", "TTL": "10s", "Status": "critical"}"#;
    refused(&bench.put("/v1/agent/check/register", check).await, 400, own);
    assert!(bench.registry.orders.lock().unwrap().is_empty(), "it was off");
    let on = bench.put("/v1/agent/service/maintenance/web-1?enable=true&reason=broken+disk", "").await;
    assert_eq!(on.status, StatusCode::OK);
    let orders = bench.registry.orders.lock().unwrap();
    let [RegistryOrder::RegisterCheck(check)] = orders.as_slice() else { panic!("{orders:?}") };
    assert_eq!((check.id.as_str(), check.notes.as_str()), ("_service_maintenance:web-1", "broken disk"));
    assert_eq!((&check.probe, check.initial), (&crate::registry::Probe::Static, HealthStatus::Critical));
}

#[tokio::test]
async fn a_load_balancer_reads_the_status_code() {
    let bench = Bench::new();
    let answer = bench.get("/v1/agent/health/service/id/web-1").await;
    assert_eq!((answer.status, &answer.json()["AggregatedStatus"]), (StatusCode::OK, &json!("passing")));
    assert_eq!(answer.json()["Service"]["Service"], "web");
    assert_eq!(answer.json()["Checks"][0]["CheckID"], "service:web-1");
    refused(&bench.get("/v1/agent/health/service/id/x").await, 404, "ServiceId x not found");
    refused(&bench.get("/v1/agent/health/service/name/x").await, 404, "ServiceName x not found");
    for (status, code) in [(HealthStatus::Warning, 429), (HealthStatus::Critical, 503)] {
        bench.registry.state.send_modify(|state| {
            let state = Arc::make_mut(state);
            for check in state.checks.values_mut() {
                Arc::make_mut(check).status = status;
            }
        });
        refused(&bench.get("/v1/agent/health/service/name/web?format=text").await, code, status.as_str());
        let listed = bench.get("/v1/agent/health/service/name/web").await;
        let body: serde_json::Value = serde_json::from_str(&listed.text).unwrap();
        assert_eq!((listed.status.as_u16(), &body[0]["AggregatedStatus"]), (code, &json!(status.as_str())));
    }
}

#[tokio::test]
async fn a_reload_says_what_takes_a_restart() {
    let answer = Bench::new().put("/v1/agent/reload", "").await;
    refused(&answer, 200, "workers changed: it takes a restart of the agent\n");
}

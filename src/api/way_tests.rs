//! `/v1/mesh/why` where config entries lead a call elsewhere.

use std::sync::Arc;

use serde_json::{Value, json};

use super::fake::Bench;
use crate::authz::{Action, Guard, Intention, Origin, Table, from_json};
use crate::traffic::{Entries, Ready, Traffic};
use crate::upstream;

/// Has entries (kind, name, JSON) in force, and denies calls to `dark`, and requests of `web` that begin with `/closed`.
fn bench(list: &[(&str, &str, Value)]) -> Bench {
    let bench = Bench::new();
    let mut entries = Entries::default();
    for (kind, name, value) in list {
        entries.add(kind, name, Ready::new(kind, value).unwrap());
        upstream::check(kind, value).unwrap();
    }
    let deny = Intention::plain("*".parse().unwrap(), "dark".parse().unwrap(), Action::Deny);
    let closed = json!({"SourceName": "*", "DestinationName": "web", "Permissions": [
        {"Action": "deny", "HTTP": {"PathPrefix": "/closed"}}, {"Action": "deny", "HTTP": {"Header": [{"Name": "x-bad", "Present": true}]}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/"}}]});
    let intentions = [deny, from_json(&closed, None).unwrap()];
    let guards = intentions.map(|one| Arc::new(Guard::compile(one, Origin::default()).unwrap()));
    bench.publish(|snapshot| {
        snapshot.traffic = Arc::new(Traffic::new(entries, &Traffic::default(), Vec::new()));
        snapshot.upstreams = Arc::new(upstream::table(list.iter().map(|(kind, name, value)| (*kind, *name, value))));
        snapshot.policy = Arc::new(Table::new(Action::Allow, guards, Vec::new()));
    });
    bench
}

async fn why(bench: &Bench, more: &str) -> Value {
    bench.get(&format!("/v1/mesh/why?source=shop&destination=web{more}")).await.json()
}

fn http(name: &str) -> (&'static str, &str, Value) {
    ("service-defaults", name, json!({"Protocol": "http"}))
}

#[tokio::test]
async fn the_service_that_is_called_in_the_end_is_judged_with_what_it_gets() {
    let routes = json!({"Routes": [
        {"Match": {"HTTP": {"PathPrefix": "/api/"}}, "Destination": {"PrefixRewrite": "/closed/", "HostRewrite": "inner"}},
        {"Match": {"HTTP": {"PathPrefix": "/dark"}}, "Destination": {"Service": "dark", "RequestTimeout": "3s"}},
        {"Match": {"HTTP": {"PathPrefix": "/mark"}}, "Destination": {"RequestHeaders": {"Set": {"x-bad": "1"}}}},
        {"Match": {"HTTP": {"PathExact": "/old"}}, "Redirect": {"Path": "/new"}},
    ]});
    let rates = json!({"Protocol": "http", "RateLimits": {"InstanceLevel": {"RequestsPerSecond": 9, "Routes": [
        {"PathPrefix": "/closed", "RequestsPerSecond": 1}]}}});
    let bench = bench(&[("service-router", "web", routes), ("service-defaults", "web", rates)]);

    let rewritten = why(&bench, "&path=/api/x?y=1").await;
    assert_eq!((&rewritten["Allowed"], &rewritten["Policy"]["Rule"]), (&json!(false), &json!("*:web")), "{rewritten}");
    let route = &rewritten["Way"]["Route"];
    assert_eq!((&route["At"], &route["Of"], &route["SentPath"]), (&json!(0), &json!(4), &json!("/closed/x?y=1")));
    assert_eq!(
        (&route["SentHost"], &route["Definition"]["Match"]["HTTP"]["PathPrefix"]),
        (&json!("inner"), &json!("/api/"))
    );
    assert_eq!(rewritten["Way"]["Legs"][0]["RateLimits"][0]["PathPrefix"], "/closed", "{rewritten}");

    assert_eq!(why(&bench, "&path=/mark").await["Allowed"], false, "a header that the route sets");
    let dark = why(&bench, "&path=/dark").await;
    assert_eq!((&dark["Allowed"], &dark["Policy"]["Rule"]), (&json!(false), &json!("*:dark")), "{dark}");
    assert_eq!(dark["Verdict"], "denied by intention *:dark (precedence 8), at dark");
    assert_eq!((&dark["Instances"], &dark["Way"]["Legs"][0]["RequestTimeout"]), (&json!([]), &json!("3s")));
    assert_eq!(dark["Way"]["Legs"][0]["Registered"], false, "nobody has it");
    assert_eq!(rewritten["Way"]["Legs"][0]["Registered"], true);
    let remedies = dark["ToChange"].to_string();
    assert!(remedies.contains("weft intention create -allow shop dark"), "{remedies}");

    let redirect = why(&bench, "&path=/old").await;
    assert_eq!((&redirect["Allowed"], &redirect["Way"]["Legs"]), (&json!(true), &json!([])), "{redirect}");
    assert!(redirect["Verdict"].as_str().unwrap().starts_with("answered here with 302"), "{redirect}");

    let rest = why(&bench, "&path=/other").await;
    assert_eq!((&rest["Allowed"], &rest["Way"]["Route"]["At"]), (&json!(true), &Value::Null), "{rest}");
    assert_eq!(rest["Way"]["Legs"][0]["RateLimits"][0]["RequestsPerSecond"], 9.0, "{rest}");
    assert_eq!(rest["Instances"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn every_leg_is_told_with_its_share_and_a_caller_that_stays_has_one() {
    let subsets = json!({"Subsets": {"none": {"Filter": "Service.Meta.version == v9"}},
        "Failover": {"none": {"Service": "web"}}, "LoadBalancer": {"Policy": "maglev"}});
    let splits = json!({"Sticky": {"Header": "x-user"}, "Splits": [
        {"Weight": 89.99, "ServiceSubset": "none"}, {"Weight": 10, "Service": "dark"}, {"Weight": 0.01}]});
    let faults = json!({"Faults": [{"Match": {"HTTP": {"PathPrefix": "/slow"}}, "Delay": {"Duration": "1s"}}]});
    let bench = bench(&[
        ("service-resolver", "web", subsets),
        ("service-splitter", "web", splits),
        ("service-faults", "web", faults),
        http("web"),
    ]);
    let drawn = why(&bench, "&path=/slow/x").await;
    let legs = drawn["Way"]["Legs"].as_array().unwrap();
    let shown: Vec<String> = legs
        .iter()
        .map(|leg| format!("{:.2} {} {}", leg["Weight"].as_f64().unwrap(), leg["Target"], leg["Allowed"]))
        .collect();
    assert_eq!(shown, ["89.99 \"none.web\" true", "10.00 \"dark\" false", "0.01 \"web\" true"], "{drawn}");
    assert_eq!(legs[0]["LoadBalancer"]["Policy"], "maglev");
    assert_eq!(drawn["Way"]["Faults"][0]["Delay"]["Duration"], "1s");
    // One of the ways is denied: that one is told, and whom no target takes is left out.
    assert_eq!((&drawn["Allowed"], &drawn["Policy"]["Rule"]), (&json!(false), &json!("*:dark")));
    let targets: Vec<&Value> = drawn["Instances"].as_array().unwrap().iter().map(|one| &one["Targets"]).collect();
    assert_eq!(targets, [&json!(["web"]), &json!(["web"])], "{drawn}");

    let stays = why(&bench, "&path=/&header=x-user:ann").await;
    let legs = stays["Way"]["Legs"].as_array().unwrap();
    assert_eq!((legs.len(), &legs[0]["Weight"], &stays["Way"]["Faults"]), (1, &json!(100.0), &json!([])), "{stays}");
    // Without a request: what no route matches, and every fault that it may meet.
    let unasked = why(&bench, "").await;
    assert_eq!(unasked["Way"]["Legs"].as_array().unwrap().len(), 3, "{unasked}");
    assert_eq!(unasked["Way"]["Faults"].as_array().unwrap().len(), 1, "{unasked}");

    let chain = bench.get("/v1/discovery-chain/web").await.json();
    assert_eq!(chain["Chain"]["Faults"][0]["Delay"]["Duration"], "1s", "{chain}");
    assert_eq!(chain["Chain"]["Nodes"]["splitter:web"]["Sticky"], json!({"Header": "x-user"}), "{chain}");
    assert_eq!(chain["Chain"]["Nodes"]["resolver:none.web"]["LoadBalancer"]["Policy"], "maglev", "{chain}");
}

#[tokio::test]
async fn an_instance_that_no_target_takes_is_left_out_and_a_subset_of_nobody_says_what_to_do() {
    let subsets = json!({"DefaultSubset": "none", "Subsets": {"none": {"Filter": "Service.Meta.version == v9"}}});
    let bench = bench(&[("service-resolver", "web", subsets)]);
    let shown = why(&bench, "").await;
    let instances = shown["Instances"].as_array().unwrap();
    assert!(instances.iter().all(|one| one["Why"] == "left out: it is none of none.web"), "{shown}");
    assert_eq!((instances.len(), &shown["Way"]["Route"]["At"]), (2, &Value::Null));
    let remedies = shown["ToChange"].to_string();
    assert!(remedies.contains("none of the 2 instances of web belongs to none.web"), "{remedies}");
}

#[tokio::test]
async fn a_call_of_grpc_is_hedged_where_its_route_says_so_and_silence_is_shown() {
    let hedge = |grpc: bool| json!({"Routes": [{"Destination": {"Hedge": {"Delay": "50ms", "GRPC": grpc}}}]});
    for (protocol, grpc, want) in [("grpc", true, true), ("grpc", false, false), ("http", false, true)] {
        let bench = bench(&[
            ("service-router", "web", hedge(grpc)),
            ("service-defaults", "web", json!({"Protocol": protocol})),
            ("service-resolver", "web", json!({"IdleTimeout": "90s"})),
        ]);
        let told = why(&bench, "&path=/shop.Cart/Add").await;
        assert_eq!(told["Way"]["Route"]["Hedged"], want, "{protocol}, {grpc}: {told}");
        assert_eq!(told["Way"]["Legs"][0]["IdleTimeout"], "90s");
    }
}

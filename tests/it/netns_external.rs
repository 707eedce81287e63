//! Nodes without an agent, between real agents: registered at one, found at the other by HTTP and DNS; they outlive a restart of
//! their agent, fail with it, and leave with it. The mesh calls none of them.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::agent::{Agent, Ca, Spec, path};
use crate::clients::{found, program};
use crate::lab::Lab;
use crate::wait::until;

/// Waits until the passing instances of `db` at `agent` are on exactly these nodes.
#[track_caller]
fn wait_db(agent: &Agent, want: &[&str]) {
    until(&format!("{} finds db on {want:?}", agent.name), || {
        let list = agent.try_get("/v1/health/service/db?passing")?.json();
        let node = |one: &Value| one["Node"]["Node"].as_str().unwrap_or("?").to_owned();
        let seen: Vec<String> = list.as_array().map(|list| list.iter().map(node).collect()).unwrap_or_default();
        if seen == want { Ok(()) } else { Err(list.to_string()) }
    });
}

#[test]
fn what_is_registered_at_one_agent_is_found_at_the_other_and_lives_with_its_agent() {
    let Some([dig]) = found("dig", [program("dig")]) else { return };
    let Some(lab) = Lab::new(2) else { return };
    let ca = Ca::init("external.test");
    let issuer = ca.issuer();
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)]));
    // It may speak for db and for nothing else.
    let join = ca.token("n2", "db", "1h");
    let second = Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &join]);
    let n2 = Agent::start(&second);
    for agent in [&n1, &n2] {
        agent.wait_members(&["n1=1", "n2=1"]);
    }
    let ask = |words: &[&str]| {
        let mut command = Command::new(&dig);
        command.args(["@127.0.0.1", "-p", "8600", "+short", "+tries=1", "+time=5"]).args(words);
        let out = lab.host(1).run(|| command.stdin(Stdio::null()).output().unwrap());
        String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect::<Vec<String>>()
    };

    let check = |status: &str| json!({"CheckID": "db-up", "ServiceID": "db-1", "Status": status, "Output": "by hand"});
    let body = json!({
        "Node": "db-host",
        "Address": "192.0.2.77",
        "NodeMeta": {"external-node": "true"},
        "Service": {"ID": "db-1", "Service": "db", "Tags": ["primary"], "Port": 5432},
        "Check": check("passing"),
    });
    let answer = n2.put("/v1/catalog/register", &body.to_string());
    assert_eq!((answer.status, answer.body.as_str()), (200, "true"), "shown at once by the agent that took it");
    assert_eq!(n2.get("/v1/health/service/db")[0]["Checks"][1]["Output"], "by hand");
    wait_db(&n1, &["db-host"]);
    assert_eq!(n1.get("/v1/catalog/nodes")[0]["Node"], "db-host");
    assert_eq!(ask(&["db.service.weft"]), ["192.0.2.77"]);
    assert_eq!(ask(&["primary.db.service.consul", "SRV"]), ["1 1 5432 c000024d.addr.dc1.consul."]);
    assert_eq!(ask(&["db-host.node.weft"]), ["192.0.2.77"]);

    // A change at its agent ends a wait at the other.
    let index = n1.try_get("/v1/health/service/db").unwrap().header("x-consul-index").unwrap().to_owned();
    let woken = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| n1.get(&format!("/v1/health/service/db?index={index}&wait=60s")));
        let down = json!({"Node": "db-host", "SkipNodeUpdate": true, "Check": check("critical")});
        n2.put_ok("/v1/catalog/register", &down.to_string());
        waiting.join().unwrap()
    });
    assert_eq!(woken[0]["Checks"][1]["Status"], "critical", "{woken}");
    assert!(ask(&["db.service.weft"]).is_empty());
    n2.put_ok("/v1/catalog/register", &body.to_string());
    wait_db(&n1, &["db-host"]);

    // Scope, the mesh's own names, and who wrote it.
    let refused = |agent: &Agent, body: &Value, status: u16, want: &str| {
        let answer = agent.put("/v1/catalog/register", &body.to_string());
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.body.contains(want), "{}", answer.body);
    };
    refused(
        &n2,
        &json!({"Node": "x", "Address": "192.0.2.1", "Service": {"Service": "pay"}}),
        403,
        "serve scope is `db`",
    );
    refused(&n2, &json!({"Node": "n1", "Address": "192.0.2.1"}), 400, "node of the mesh");
    refused(&n1, &body, 400, "agent of n2");
    let why = n1.get("/v1/mesh/why?source=web&destination=db");
    assert_eq!(why["Verdict"], "allowed, but there is no instance to send it to", "{why}");
    assert!(why["ToChange"].to_string().contains("without an agent"), "{why}");

    // Its agent dies: it counts as failed everywhere. Its agent comes back: it was on disk.
    let dir = n2.kill();
    n1.wait_members(&["n1=1", "n2=4"]);
    wait_db(&n1, &[]);
    assert_eq!(n1.get("/v1/health/service/db")[0]["Checks"][0]["Status"], "critical");
    let mut n2 = Agent::spawn(&second, dir);
    n2.wait_ready();
    wait_db(&n2, &["db-host"]);
    wait_db(&n1, &["db-host"]);
    assert_eq!(n2.get("/v1/health/service/db")[0]["Checks"][1]["Output"], "by hand");

    // A part of it goes, and comes again.
    n2.put_ok("/v1/catalog/deregister", r#"{"Node": "db-host", "ServiceID": "db-1"}"#);
    wait_db(&n1, &[]);
    assert_eq!(ask(&["db-host.node.weft"]), ["192.0.2.77"], "the node stays");
    n2.put_ok("/v1/catalog/register", &body.to_string());
    wait_db(&n1, &["db-host"]);

    // Its agent leaves: it goes along.
    n2.put_ok("/v1/agent/leave", "");
    assert!(n2.wait_exit().0.success());
    n1.wait_members(&["n1=1", "n2=3"]);
    until("all of it is gone", || {
        let (nodes, services) = (n1.get("/v1/catalog/nodes"), n1.get("/v1/catalog/services"));
        let is_gone = nodes.as_array().is_some_and(|nodes| nodes.len() == 1) && services.get("db").is_none();
        if is_gone { Ok(()) } else { Err(format!("{nodes} {services}")) }
    });
    assert!(ask(&["db.service.weft"]).is_empty() && ask(&["db-host.node.weft"]).is_empty());
}

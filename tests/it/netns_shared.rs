//! What all agents share, between real agents: keys and values over a split and a crash, events, prepared queries.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, path};
use crate::clients::{found, program};
use crate::lab::{Host, Lab};
use crate::wait::{until, until_within};

/// The largest value, in bytes.
const VALUE_BYTES_MAX: usize = 512 * 1024;

/// A mesh of agents with a key-value store, whose first host issues.
struct Mesh {
    token: String,
    dir: TempDir,
    ca: Ca,
}

impl Mesh {
    fn new(lab: &Lab) -> (Self, Agent) {
        let (ca, dir) = (Ca::init("lab.test"), TempDir::new().unwrap());
        let mesh = Self { token: ca.token("n*", "*", "1h"), dir, ca };
        let file = mesh.file();
        std::fs::write(&file, "kv {\n  enabled = true\n}\n").unwrap();
        let issuer = mesh.ca.issuer();
        let args = ["-issuer", path(&issuer), "-config-file", path(&file)];
        let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &args));
        (mesh, n1)
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("kv.hcl")
    }

    fn spec<'a>(&self, host: &Host, name: &'a str) -> Spec<'a> {
        let file = self.file();
        Spec::on(host, name, &["-join", "10.77.0.1", "-token", &self.token, "-config-file", path(&file)])
    }
}

/// The value of a key, raw; the status where there is none.
fn value(agent: &Agent, key: &str) -> Result<String, String> {
    let answer = agent.try_get(&format!("/v1/kv/{key}?raw"))?;
    if answer.status == 200 { Ok(answer.body) } else { Err(answer.status.to_string()) }
}

#[track_caller]
fn wait_value(agents: &[&Agent], key: &str, want: Result<&str, &str>) {
    for agent in agents {
        until(&format!("{} has {key}", agent.name), || {
            let seen = value(agent, key);
            let is_there = seen.as_deref().map_err(String::as_str) == want;
            if is_there { Ok(()) } else { Err(seen.unwrap_or_else(|why| why).chars().take(80).collect()) }
        });
    }
}

#[track_caller]
fn put(agent: &Agent, key: &str, value: &str) {
    let answer = agent.put(&format!("/v1/kv/{key}"), value);
    assert_eq!((answer.status, answer.body.as_str()), (200, "true"), "{key}");
}

#[track_caller]
fn delete(agent: &Agent, key: &str) {
    let answer = agent.call(agent.api, "DELETE", &format!("/v1/kv/{key}"), &[], "").unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "true"), "{key}");
}

#[test]
fn keys_spread_outlive_a_split_with_the_newest_and_a_crash_and_what_was_deleted_stays_so() {
    let Some(lab) = Lab::new(4) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let [n2, n3] = [(2, "n2"), (3, "n3")].map(|(at, name)| Agent::start(&mesh.spec(&lab.host(at), name)));
    for agent in [&n1, &n2, &n3] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    put(&n1, "app/flag", "on");
    put(&n2, "app/gone", "soon");
    let large = "x".repeat(VALUE_BYTES_MAX);
    put(&n3, "large", &large);
    wait_value(&[&n1, &n2, &n3], "app/flag", Ok("on"));
    wait_value(&[&n1, &n2, &n3], "app/gone", Ok("soon"));
    wait_value(&[&n1, &n2, &n3], "large", Ok(&large));

    // A change under the prefix ends a wait on another agent.
    let index = n3.try_get("/v1/kv/app/?recurse").unwrap().header("x-consul-index").unwrap().to_owned();
    let woken = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| n3.try_get(&format!("/v1/kv/app/?recurse&index={index}&wait=60s")).unwrap());
        put(&n1, "app/woken", "1");
        waiting.join().unwrap()
    });
    assert_eq!(woken.json().as_array().unwrap().len(), 3, "{}", woken.body);

    lab.split(&[lab.host(3)], &[lab.host(1), lab.host(2)]);
    n1.wait_members(&["n1=1", "n2=1", "n3=4"]);
    put(&n1, "app/flag", "from n1");
    delete(&n1, "app/gone");
    put(&n3, "app/flag", "from n3, later");
    put(&n3, "app/alone", "3");
    wait_value(&[&n2], "app/flag", Ok("from n1"));
    wait_value(&[&n2], "app/gone", Err("404"));
    wait_value(&[&n3], "app/gone", Ok("soon"));
    for at in 1..=3 {
        lab.heal(&lab.host(at));
    }
    for agent in [&n1, &n2, &n3] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    wait_value(&[&n1, &n2, &n3], "app/flag", Ok("from n3, later"));
    wait_value(&[&n1, &n2, &n3], "app/gone", Err("404"));
    wait_value(&[&n1, &n2, &n3], "app/alone", Ok("3"));

    // What was answered is on disk: an agent that was killed has it before it meets anybody.
    put(&n2, "app/kept", "by n2");
    let dir = n2.kill();
    lab.cut(&lab.host(2));
    let n2 = Agent::spawn(&mesh.spec(&lab.host(2), "n2"), dir);
    n2.wait_ready();
    for (key, want) in [("app/kept", Ok("by n2")), ("app/flag", Ok("from n3, later")), ("app/gone", Err("404"))] {
        assert_eq!(value(&n2, key).as_deref().map_err(String::as_str), want, "{key}");
    }
    assert_eq!(value(&n2, "large").unwrap().len(), VALUE_BYTES_MAX);
    lab.heal(&lab.host(2));

    // A newcomer gets all of it; one without the store says so, and holds nothing of it.
    let args = ["-join", "10.77.0.1", "-token", &mesh.token];
    let without = Agent::start(&Spec::on(&lab.host(4), "n4", &args));
    let refused = without.try_get("/v1/kv/app/flag").unwrap();
    assert_eq!(refused.status, 501);
    assert!(refused.body.contains("kv { enabled = true }"), "{}", refused.body);
    let dir = without.kill();
    let newcomer = Agent::spawn(&mesh.spec(&lab.host(4), "n4"), dir);
    newcomer.wait_ready();
    wait_value(&[&newcomer], "app/flag", Ok("from n3, later"));
    wait_value(&[&newcomer], "large", Ok(&large));
}

#[test]
fn a_node_with_less_room_takes_what_fits_says_so_and_takes_the_rest_once_there_is_room() {
    let Some(lab) = Lab::new(2) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let small = mesh.dir.path().join("small.hcl");
    std::fs::write(&small, "kv {\n  enabled = true\n  bytes_max = 1048576\n}\n").unwrap();
    let args = ["-join", "10.77.0.1", "-token", &mesh.token, "-config-file", path(&small)];
    let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &args));
    n1.wait_members(&["n1=1", "n2=1"]);
    // Peers may bring twice a MiB: five of them.
    let large = "x".repeat(400 * 1024);
    let keys = ["big/1", "big/2", "big/3", "big/4", "big/5", "big/6", "big/7"];
    for key in keys {
        put(&n1, key, &large);
    }
    let held = |agent: &Agent| keys.into_iter().filter(|key| value(agent, key).is_ok()).collect::<Vec<_>>();
    until("n2 holds what fits", || if held(&n2).len() == 5 { Ok(()) } else { Err(format!("{:?}", held(&n2))) });
    // Comparisons come in rounds; one of the two says what to do.
    until("the difference is told", || {
        let logs = [n1.log(), n2.log()];
        let is_told = |log: &String| log.contains("set `kv { bytes_max }` to the same on every agent");
        if logs.iter().any(is_told) { Ok(()) } else { Err(logs.concat()) }
    });
    assert_eq!(held(&n2).len(), 5, "no comparison brings more than fits");
    // Its own clients may bring a MiB alone, and hear why nothing more is taken.
    let refused = n2.put("/v1/kv/own", "1");
    assert_eq!(refused.status, 507, "{}", refused.body);
    assert!(refused.body.contains("raise the limit on every agent"), "{}", refused.body);
    // What is small goes on as before, both ways, and both live.
    put(&n1, "small", "1");
    wait_value(&[&n2], "small", Ok("1"));
    put(&n2, "small", "2");
    wait_value(&[&n1], "small", Ok("2"));
    for key in held(&n2) {
        delete(&n1, key);
    }
    // By a comparison, which n2 begins within 5 s of the first deletion; the rare ones come 30 s apart, give or take a quarter.
    until_within(Duration::from_secs(15), "n2 takes the others once there is room", || {
        let both = [held(&n1), held(&n2)];
        if both.iter().all(|held| held.len() == 2) { Ok(()) } else { Err(format!("{both:?}")) }
    });
}

#[test]
fn events_and_prepared_queries_are_known_to_every_agent() {
    let Some(lab) = Lab::new(3) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let [n2, n3] = [(2, "n2"), (3, "n3")].map(|(at, name)| Agent::start(&mesh.spec(&lab.host(at), name)));
    for agent in [&n1, &n2, &n3] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    n2.put_ok("/v1/agent/service/register", r#"{"ID":"web-1","Name":"web","Port":80}"#);
    let fired = n1.put("/v1/event/fire/deploy?service=^web$", "v2").json();
    let names = |agent: &Agent| -> Vec<String> {
        let list = agent.get("/v1/event/list");
        list.as_array().unwrap().iter().map(|event| event["Name"].as_str().unwrap().to_owned()).collect()
    };
    until("the event is on the node with the service", || {
        let list = n2.get("/v1/event/list");
        if list[0]["ID"] == fired["ID"] { Ok(()) } else { Err(list.to_string()) }
    });
    n1.put("/v1/event/fire/all", "").json();
    until("everybody has an event for everybody", || {
        let seen = names(&n3);
        if seen == ["all"] { Ok(()) } else { Err(format!("{seen:?}")) }
    });

    let query = json!({"Name": "web-anywhere", "Service": {"Service": "web"}}).to_string();
    let made = n1.call(n1.api, "POST", "/v1/query", &[], &query).unwrap();
    assert_eq!(made.status, 200, "{}", made.body);
    until("another agent executes the query", || {
        let answer = n3.try_get("/v1/query/web-anywhere/execute")?;
        let nodes = if answer.status == 200 { answer.json()["Nodes"].clone() } else { Value::Null };
        if nodes[0]["Node"]["Node"] == "n2" { Ok(()) } else { Err(format!("{} {}", answer.status, answer.body)) }
    });
    let Some([dig]) = found("dig", [program("dig")]) else { return };
    let ask = |name: &str| {
        let mut command = Command::new(&dig);
        command.args(["@127.0.0.1", "-p", "8600", "+short", "+tries=1", "+time=5", name]);
        let out = lab.host(3).run(|| command.stdin(Stdio::null()).output().unwrap());
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    until("another agent executes the query by DNS", || {
        let seen = ask("web-anywhere.query.consul");
        if seen == "10.77.0.2" { Ok(()) } else { Err(seen) }
    });
    let id = made.json()["ID"].as_str().unwrap().to_owned();
    assert_eq!(n1.call(n1.api, "DELETE", &format!("/v1/query/{id}"), &[], "").unwrap().status, 200);
    until("a query that was deleted is no name", || {
        let seen = ask("web-anywhere.query.consul");
        if seen.is_empty() { Ok(()) } else { Err(seen) }
    });
}

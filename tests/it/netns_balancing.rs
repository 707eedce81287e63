//! Balancing, limits and ejection on real agents: settings come in signed entries, and a sick instance is avoided by nodes
//! that never called it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::{Agent, Ca, Spec, path};
use crate::app::App;
use crate::http::Answer;
use crate::lab::Lab;
use crate::netns_identity::weft_on_ok;
use crate::netns_policy::{metric, operator};
use crate::wait::until;

const CALLER: &str = r#"{"Name":"caller","Port":1,"Connect":{"SidecarService":{"Proxy":{"Upstreams":[
    {"DestinationName":"web","LocalBindPort":9393}]}}}}"#;

/// Four agents: `web-1` on n1 and `web-2` on n2; n1, n3 and n4 have a caller.
struct Cluster {
    agents: Vec<Agent>,
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    fn start() -> Option<Self> {
        let lab = Lab::new(4)?;
        let ca = Ca::init("lab.test");
        let issuer = ca.issuer();
        let mut agents = vec![Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)]))];
        let token = ca.token("n*", "web,caller", "1h");
        for (number, name) in [(2, "n2"), (3, "n3"), (4, "n4")] {
            agents.push(Agent::start(&Spec::on(&lab.host(number), name, &["-join", "10.77.0.1", "-token", &token])));
        }
        for agent in &agents {
            agent.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
        }
        for (at, id) in [(0, "web-1"), (1, "web-2")] {
            let web = json!({"ID": id, "Name": "web", "Port": 7001, "Protocol": "http"});
            agents[at].put_ok("/v1/agent/service/register", &web.to_string());
        }
        for at in [0, 2, 3] {
            agents[at].put_ok("/v1/agent/service/register", CALLER);
            agents[at].wait_passing("web", &["web-1", "web-2"]);
        }
        Some(Self { agents, ca, lab })
    }

    /// Signs `entry` and brings it to the mesh.
    #[track_caller]
    fn write(&self, entry: &Value) {
        let file = self.ca.dir().join("entry.json");
        std::fs::write(&file, entry.to_string()).unwrap();
        let signer = self.ca.dir().join("alice.operator");
        if !signer.exists() {
            operator(&self.ca, "alice", "config");
        }
        let args = ["config", "write", path(&file), "-operator", path(&signer)];
        weft_on_ok(&self.lab.host(1), &args);
    }

    fn call(&self, at: usize, path: &str, headers: &[(&str, &str)]) -> Answer {
        let port = "127.0.0.1:9393".parse().unwrap();
        self.agents[at].call(port, "GET", path, &[&[("host", "web")], headers].concat(), "").unwrap()
    }

    fn why(&self, at: usize) -> Value {
        self.agents[at].get("/v1/mesh/why?source=caller&destination=web")
    }

    /// Waits until every worker of an agent balances by `policy`.
    #[track_caller]
    fn wait_policy(&self, at: usize, policy: &str) {
        until(&format!("{} balances by {policy}", self.agents[at].name), || {
            let why = self.why(at);
            let workers = why["Workers"].as_array().cloned().unwrap_or_default();
            let has = |worker: &Value| {
                let balancing = &worker["Balancing"];
                balancing["Policy"] == policy && (policy != "maglev" || balancing["HasTable"] == true)
            };
            let all = !workers.is_empty() && workers.iter().all(has);
            if all { Ok(()) } else { Err(why["Workers"].to_string()) }
        });
    }
}

/// What `weft why` says of an instance.
fn instance<'w>(why: &'w Value, id: &str) -> &'w Value {
    why["Instances"].as_array().unwrap().iter().find(|one| one["ID"] == id).unwrap()
}

#[test]
fn a_sick_instance_is_ejected_and_avoided_by_a_node_that_never_called_it() {
    let Some(cluster) = Cluster::start() else { return };
    let addr = "127.0.0.1:7001".parse().unwrap();
    let _good = App::http(Some(&cluster.lab.host(1)), addr, "good");
    let (_broken, met) = App::broken(Some(&cluster.lab.host(2)), addr);
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "round_robin"}}));
    for at in [0, 2, 3] {
        cluster.wait_policy(at, "round_robin");
    }
    // Two callers find out by themselves.
    for at in [0, 2] {
        until("the instance that fails is ejected", || {
            cluster.call(at, "/", &[]);
            let why = cluster.why(at);
            let broken = instance(&why, "web-2");
            if broken["Breaker"] == "open" { Ok(()) } else { Err(broken.to_string()) }
        });
        assert!(metric(&cluster.agents[at], "weft_balancer_ejections_total{cause=\"consecutive\"}") >= 1.0);
    }
    // The third one hears of it, and of who says so.
    until("n4 hears of the ejection", || {
        let why = cluster.why(3);
        let lowered = |worker: &Value| {
            worker["Balancing"]["Instances"].as_array().unwrap().iter().any(|one| one["LoweredByReports"] == true)
        };
        let by = instance(&why, "web-2")["ReportedBy"].clone();
        let all = why["Workers"].as_array().unwrap().iter().all(lowered);
        if by == json!(["n1", "n3"]) && all { Ok(()) } else { Err(why.to_string()) }
    });
    let before = met.load(std::sync::atomic::Ordering::SeqCst);
    let failed = (0..10).filter(|_| cluster.call(3, "/", &[]).status == 503).count();
    let met = met.load(std::sync::atomic::Ordering::SeqCst) - before;
    // In turn it would have been 5 of 10; a tenth of a share is one call of each worker, or two.
    assert!(failed <= 3 && met <= 3, "{failed} of 10 failed, the instance met {met}");
}

#[test]
fn signed_entries_set_affinity_limits_and_rates_and_bad_ones_are_refused_with_every_problem() {
    let Some(cluster) = Cluster::start() else { return };
    let addr = "127.0.0.1:7001".parse().unwrap();
    let _one = App::http(Some(&cluster.lab.host(1)), addr, "one");
    let _two = App::http(Some(&cluster.lab.host(2)), addr, "two");
    let bad =
        json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "best", "SlowStart": "soon"}});
    let file = cluster.ca.dir().join("bad.json");
    std::fs::write(&file, bad.to_string()).unwrap();
    operator(&cluster.ca, "alice", "config");
    let signer = cluster.ca.dir().join("alice.operator");
    let out = crate::netns_identity::weft_on(
        &cluster.lab.host(1),
        &["config", "write", path(&file), "-operator", path(&signer)],
    );
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("LoadBalancer.Policy") && said.contains("LoadBalancer.SlowStart"),
        "{said}"
    );

    // A header's values stay each with one instance, and all together meet both; who has no cookie gets one.
    cluster.write(
        &json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "maglev", "HashPolicies": [
        {"Field": "header", "FieldValue": "x-user", "Terminal": true},
        {"Field": "cookie", "FieldValue": "stay", "CookieConfig": {"TTL": "1m", "Path": "/"}}]}}),
    );
    cluster.wait_policy(2, "maglev");
    let who = |answer: &Answer| answer.body.split(' ').next().unwrap_or_default().to_owned();
    let mut met = BTreeSet::new();
    for user in 0..16 {
        let user = user.to_string();
        let asked: BTreeSet<String> = (0..4).map(|_| who(&cluster.call(2, "/", &[("x-user", &user)]))).collect();
        assert_eq!(asked.len(), 1, "user {user}");
        met.extend(asked);
    }
    assert_eq!(met.len(), 2, "{met:?}");
    let first = cluster.call(2, "/", &[]);
    let cookie = first.header("set-cookie").expect("a cookie is given").split(';').next().unwrap().to_owned();
    for _ in 0..8 {
        let again = cluster.call(2, "/", &[("cookie", &cookie)]);
        assert_eq!((who(&again), again.header("set-cookie")), (who(&first), None));
    }

    // Two requests a caller, then one in ten seconds.
    let rates = json!({"InstanceLevel": {"RequestsPerSecond": 0.1, "RequestsMaxBurst": 2, "Per": "source"}});
    cluster.write(&json!({"Kind": "service-defaults", "Name": "web", "Protocol": "http", "RateLimits": rates}));
    let limited = until("the rate is limited", || {
        let answer = cluster.call(2, "/", &[("x-user", "7")]);
        if answer.status == 429 { Ok(answer) } else { Err(format!("{} {}", answer.status, answer.body)) }
    });
    assert_eq!(limited.header("x-weft-reason"), Some("rate_limited"));
    assert_eq!(limited.header("ratelimit-policy"), Some("\"weft\";q=2;w=20"));
    let seconds: u64 = limited.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=10).contains(&seconds), "{seconds}");
    assert_eq!(limited.header("ratelimit"), Some(format!("\"weft\";r=0;t={seconds}").as_str()));
    cluster.write(&json!({"Kind": "service-defaults", "Name": "web", "Protocol": "http"}));
    until("the rate is not limited", || match cluster.call(2, "/", &[("x-user", "7")]).status {
        200 => Ok(()),
        other => Err(other.to_string()),
    });

    // No request at all from this caller: refused at once, by name.
    let guard = json!({"Defaults": {"Limits": {"MaxConcurrentRequests": 0}}});
    cluster.write(&json!({"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": guard}));
    let refused = until("the limit is in force", || {
        let answer = cluster.call(2, "/", &[("x-user", "7")]);
        if answer.status == 503 { Ok(answer) } else { Err(answer.status.to_string()) }
    });
    assert_eq!(refused.header("x-weft-overflow"), Some("requests"));
    assert!(metric(&cluster.agents[2], "weft_balancer_overflow_total{limit=\"requests\"}") >= 1.0);
    assert_eq!(cluster.why(2)["Workers"][0]["Balancing"]["Limits"]["Requests"]["Most"], 0);
}

/// Calls `web` from three nodes at once for `time`; what passed and what was refused for the rate.
fn storm(cluster: &Cluster, time: Duration) -> (f64, f64, Duration) {
    let began = Instant::now();
    let calls = |at: usize| {
        let (mut passed, mut refused) = (0_u32, 0_u32);
        while began.elapsed() < time {
            let answer = cluster.call(at, "/", &[]);
            match answer.status {
                200 => passed += 1,
                429 => refused += 1,
                other => panic!("{other} {}", answer.body),
            }
            // The pace of the load: 200 a second from each node.
            std::thread::sleep(Duration::from_millis(5));
        }
        (passed, refused)
    };
    let counts: Vec<(u32, u32)> = std::thread::scope(|scope| {
        let callers = [0, 2, 3].map(|at| scope.spawn(move || calls(at)));
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    let sum = |of: fn(&(u32, u32)) -> u32| counts.iter().map(of).map(f64::from).sum();
    (sum(|one| one.0), sum(|one| one.1), began.elapsed())
}

#[test]
fn three_nodes_share_one_limit_and_one_that_is_asked_alone_gets_nearly_all_of_it() {
    const LIMIT: f64 = 60.0;
    const BURST: f64 = 30.0;
    let Some(cluster) = Cluster::start() else { return };
    let addr = "127.0.0.1:7001".parse().unwrap();
    let _apps = [1, 2, 3].map(|host| App::http(Some(&cluster.lab.host(host)), addr, "web"));
    for (at, id) in [(0, "web-1"), (1, "web-2"), (2, "web-3")] {
        let web = json!({"ID": id, "Name": "web", "Port": 7001, "Protocol": "http", "Meta": {"is": id}});
        cluster.agents[at].put_ok("/v1/agent/service/register", &web.to_string());
    }
    for at in [0, 2, 3] {
        cluster.agents[at].wait_passing("web", &["web-1", "web-2", "web-3"]);
    }
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "round_robin", "Zones": "ignore"}}));
    let rates = json!({"InstanceLevel": {"RequestsPerSecond": LIMIT, "RequestsMaxBurst": 30, "Scope": "cluster"}});
    cluster.write(&json!({"Kind": "service-defaults", "Name": "web", "Protocol": "http", "RateLimits": rates}));
    until("the rate is limited", || match storm(&cluster, Duration::from_secs(1)) {
        (_, refused, _) if refused > 0.0 => Ok(()),
        (passed, ..) => Err(format!("{passed} passed")),
    });
    // Each node by itself would let through 60 a second, 180 together.
    // A machine that stands still for a while asks for less than the limit, and says nothing about it.
    let (passed, refused, took) =
        until("more is asked for than may pass", || match storm(&cluster, Duration::from_secs(8)) {
            all @ (_, refused, _) if refused > 0.0 => Ok(all),
            (passed, ..) => Err(format!("{passed} passed, none was refused")),
        });
    let (whole, bound) = (LIMIT * took.as_secs_f64(), LIMIT * took.as_secs_f64() + BURST + 3.0);
    println!(
        "all three are asked: {passed} of {whole:.0} passed in {took:?}, {refused} were refused; bound {bound:.0}"
    );
    assert!(passed <= bound, "{passed} passed, {bound} are the bound");
    assert!(passed >= 0.7 * whole, "{passed} passed of {whole} that may");

    // One node alone is asked: an equal part would be 20 a second.
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "DefaultSubset": "one",
        "Subsets": {"one": {"Filter": "Service.Meta.is == \"web-1\""}}}));
    until("one node has nearly all of the limit", || {
        let (passed, _, took) = storm(&cluster, Duration::from_secs(3));
        let whole = LIMIT * took.as_secs_f64();
        println!("one is asked: {passed} of {whole:.0} passed in {took:?}");
        assert!(passed <= whole + BURST + 3.0, "{passed} passed of {whole}");
        if passed >= 0.75 * whole { Ok(()) } else { Err(format!("{passed} of {whole}")) }
    });
    assert!(metric(&cluster.agents[0], "weft_gossip_demand_reports_total{way=\"sent\"}") >= 1.0);
    assert!(metric(&cluster.agents[0], "weft_gossip_demand_reports_total{way=\"heard\"}") >= 1.0);
}

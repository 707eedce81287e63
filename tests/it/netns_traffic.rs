//! What config entries make of requests, on real agents: routes, splits, subsets, failover, retries, timeouts, faults, mirrors.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::{Agent, Ca, Spec, path};
use crate::app::{App, Either};
use crate::clients::{found, program};
use crate::http::Answer;
use crate::lab::Lab;
use crate::netns_identity::{weft_on, weft_on_ok};
use crate::netns_policy::{metric, operator};
use crate::wait::until;

const ALLOW: &str = "-default-intention-policy=allow";
const CALLER: &str = r#"{"Name":"caller","Port":1,"Connect":{"SidecarService":{"Proxy":{"Upstreams":[
    {"DestinationName":"web","LocalBindPort":9393}]}}}}"#;

/// Three agents: `n1` issues and calls, `n2` and `n3` serve.
struct Cluster {
    n1: Agent,
    n2: Agent,
    n3: Agent,
    operator: PathBuf,
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    fn start() -> Option<Self> {
        let lab = Lab::new(3)?;
        let ca = Ca::init("lab.test");
        let issuer = ca.issuer();
        let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer), ALLOW]));
        let token = ca.token("n*", "web,shadow,caller", "1h");
        let join = ["-join", "10.77.0.1", "-token", &token, ALLOW];
        let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &join));
        let n3 = Agent::start(&Spec::on(&lab.host(3), "n3", &join));
        for agent in [&n1, &n2, &n3] {
            agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
        }
        n1.put_ok("/v1/agent/service/register", CALLER);
        let operator = operator(&ca, "alice", "config");
        Some(Self { n1, n2, n3, operator, ca, lab })
    }

    /// Registers an instance of `name` on host `number`, and starts its app.
    fn serve(&self, number: usize, name: &str, id: &str, app: (u16, u16, Duration)) -> App {
        let (port, status, delay) = app;
        let addr = format!("127.0.0.1:{port}").parse().unwrap();
        let app = App::http_as(Some(&self.lab.host(number)), addr, id, status, delay);
        let agent = if number == 2 { &self.n2 } else { &self.n3 };
        let body = json!({"Name": name, "ID": id, "Port": port, "Protocol": "http", "Meta": {"version": id}});
        agent.put_ok("/v1/agent/service/register", &body.to_string());
        app
    }

    /// Writes an entry with `weft config write`, in force on the caller's agent when it returns.
    #[track_caller]
    fn write(&self, entry: &Value) {
        let file = self.file(entry);
        weft_on_ok(&self.lab.host(1), &["config", "write", path(&file), "-operator", path(&self.operator)]);
    }

    fn file(&self, entry: &Value) -> PathBuf {
        let file = self.ca.dir().join("entry.json");
        std::fs::write(&file, entry.to_string()).unwrap();
        file
    }

    #[track_caller]
    fn delete(&self, kind: &str, name: &str) {
        let args = ["config", "delete", "-kind", kind, "-name", name, "-operator", path(&self.operator)];
        weft_on_ok(&self.lab.host(1), &args);
    }

    fn try_call(&self, target: &str, headers: &[(&str, &str)]) -> Result<Answer, String> {
        let headers = [&[("host", "web")], headers].concat();
        self.n1.call("127.0.0.1:9393".parse().unwrap(), "GET", target, &headers, "")
    }

    #[track_caller]
    fn call(&self, target: &str, headers: &[(&str, &str)]) -> Answer {
        self.try_call(target, headers).unwrap()
    }

    /// The id of the instance that answers.
    #[track_caller]
    fn who(&self, target: &str, headers: &[(&str, &str)]) -> String {
        let answer = self.call(target, headers);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body.split(' ').next().unwrap().to_owned()
    }
}

fn resolver(more: &Value) -> Value {
    let mut entry = json!({"Kind": "service-resolver", "Name": "web", "DefaultSubset": "v1", "Subsets": {
        "v1": {"Filter": "Service.Meta.version == v1"}, "v2": {"Filter": "Service.Meta.version == v2"}}});
    entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    entry
}

fn router(routes: &Value) -> Value {
    json!({"Kind": "service-router", "Name": "web", "Routes": routes})
}

#[test]
fn requests_are_routed_split_and_failed_over_as_config_entries_say() {
    let Some(cluster) = Cluster::start() else { return };
    let _v1 = cluster.serve(2, "web", "v1", (7001, 200, Duration::ZERO));
    let _v2 = cluster.serve(3, "web", "v2", (7002, 200, Duration::ZERO));
    cluster.n1.wait_passing("web", &["v1", "v2"]);

    // By header to a subset; everything else to the default one; rewritten and redirected.
    cluster.write(&resolver(&json!({})));
    cluster.write(&router(&json!([
        {"Match": {"HTTP": {"Header": [{"Name": "x-canary", "Exact": "1"}]}}, "Destination": {"ServiceSubset": "v2"}},
        {"Match": {"HTTP": {"PathPrefix": "/api/"}}, "Destination": {"PrefixRewrite": "/inner/"}},
        {"Match": {"HTTP": {"PathExact": "/old"}}, "Redirect": {"Code": 301, "Path": "/new"}},
    ])));
    for _ in 0..20 {
        assert_eq!(cluster.who("/", &[]), "v1");
        assert_eq!(cluster.who("/", &[("x-canary", "1")]), "v2");
    }
    let rewritten = cluster.call("/api/x?y=1", &[]);
    assert!(rewritten.body.starts_with("v1 GET /inner/x?y=1 "), "{}", rewritten.body);
    let redirect = cluster.call("/old", &[]);
    assert_eq!((redirect.status, redirect.header("location")), (301, Some("/new")));

    // A tenth goes to the other: 600 calls, 60 expected, four standard deviations (29) on either side.
    cluster.write(&json!({"Kind": "service-splitter", "Name": "web", "Sticky": {"Header": "x-user"},
        "Splits": [{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "ServiceSubset": "v2"}]}));
    let met = (0..600).filter(|_| cluster.who("/", &[]) == "v2").count();
    assert!((31..=89).contains(&met), "{met} of 600 went to v2, with a weight of 10 %");
    let first = cluster.who("/", &[("x-user", "ann")]);
    assert!((0..30).all(|_| cluster.who("/", &[("x-user", "ann")]) == first), "a caller moves");

    // Every agent shows the same chain, and `weft why` has it.
    until("n3 shows the chain", || {
        let shown = cluster.n3.try_get("/v1/discovery-chain/web")?.json();
        let splits = shown.pointer("/Chain/Nodes/splitter:web/Splits").cloned().unwrap_or_default();
        let want =
            json!([{"Weight": 90.0, "NextNode": "resolver:v1.web"}, {"Weight": 10.0, "NextNode": "resolver:v2.web"}]);
        if splits == want { Ok(()) } else { Err(shown.to_string()) }
    });
    let why = cluster.n1.get("/v1/mesh/why?source=caller&destination=web&method=GET&path=/");
    assert_eq!(why.pointer("/Chain/Chain/StartNode"), Some(&json!("router:web")), "{why:#}");

    // What leads nowhere is refused where it is written, with every problem and its field.
    let bad = json!({"Kind": "service-splitter", "Name": "web", "Colour": 1, "Splits": [{"Weight": 50, "ServiceSubset": "v9"}]});
    let refuse = |entry: &Value| {
        let file = cluster.file(entry);
        let out =
            weft_on(&cluster.lab.host(1), &["config", "write", path(&file), "-operator", path(&cluster.operator)]);
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let said = refuse(&bad);
    assert!(said.contains("Colour is no field") && said.contains("weights of 100 together"), "{said}");
    assert!(said.contains("names subset \"v9\""), "{said}");
    // An unknown field, an expression that does not compile, a wrong type, a value out of bounds, two that contradict each
    // other, a reference to what there is not: all of them in one go.
    let said = refuse(&json!({"Kind": "service-router", "Name": "web", "Colour": 1, "Routes": [
        {"Match": {"HTTP": {"PathRegex": "("}}},
        {"Destination": {"NumRetries": "three"}},
        {"Destination": {"IdleTimeout": "48h"}},
        {"Destination": {"RequestTimeout": "1s", "PerTryTimeout": "2s"}},
        {"Match": {"HTTP": {"PathPrefix": "/x"}}, "Destination": {"ServiceSubset": "v9"}}]}));
    for part in [
        "Colour is no field of this entry",
        "Routes[0].Match.HTTP.PathRegex is refused",
        "Routes[1].Destination.NumRetries must be a whole number",
        "Routes[2].Destination.IdleTimeout must be from 1ms to 24h",
        "Routes[3].Destination.PerTryTimeout = 2s must be shorter",
        "Routes[4] names subset \"v9\"",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }

    // Without its instances a subset fails over, and comes back.
    cluster.write(&resolver(&json!({"Failover": {"v2": {"ServiceSubset": "v1"}}})));
    cluster.n3.put_ok("/v1/agent/service/maintenance/v2?enable=true", "");
    until("v2 fails over to v1", || match cluster.try_call("/", &[("x-canary", "1")]) {
        Ok(answer) if answer.status == 200 && answer.body.starts_with("v1 ") => Ok(()),
        other => Err(format!("{:?}", other.map(|answer| answer.body))),
    });
    cluster.n3.put_ok("/v1/agent/service/maintenance/v2?enable=false", "");
    until("v2 is back", || match cluster.who("/", &[("x-canary", "1")]).as_str() {
        "v2" => Ok(()),
        other => Err(other.to_owned()),
    });
}

#[test]
fn retries_save_requests_timeouts_say_why_and_a_fault_goes_by_one_command() {
    let Some(cluster) = Cluster::start() else { return };
    let _good = cluster.serve(2, "web", "good", (7001, 200, Duration::ZERO));
    let _bad = cluster.serve(3, "web", "bad", (7002, 503, Duration::ZERO));
    let _shadow = cluster.serve(3, "shadow", "shadow", (7003, 200, Duration::from_secs(2)));
    cluster.n1.wait_passing("web", &["bad", "good"]);
    cluster.n1.wait_passing("shadow", &["shadow"]);

    // In turns and without ejection, or the sick instance would soon see no request.
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "round_robin"}}));
    cluster.write(&json!({"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": {"Defaults": {
        "PassiveHealthCheck": {"EnforcingConsecutive5xx": 0}}}}));
    until("the caller takes turns", || {
        let why = cluster.n1.get("/v1/mesh/why?source=caller&destination=web");
        let workers = why["Workers"].as_array().cloned().unwrap_or_default();
        let all = workers.iter().all(|worker| worker["Balancing"]["Policy"] == "round_robin");
        if all && !workers.is_empty() { Ok(()) } else { Err(why["Workers"].to_string()) }
    });
    let failed = |count: usize| (0..count).filter(|_| cluster.call("/", &[]).status != 200).count();
    assert!(failed(40) > 5, "half of the instances answer 503");
    cluster.write(&router(&json!([{"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {
        "NumRetries": 2, "RetryOnStatusCodes": [503], "RetryBackoff": {"BaseInterval": "1ms"}, "RequestTimeout": "700ms"}}])));
    assert_eq!(failed(100), 0, "a retry meets the other instance");
    assert!(metric(&cluster.n1, "weft_http_retries_saved_total{destination_service=\"web\"}") >= 20.0);

    let begun = Instant::now();
    let late = cluster.call("/hang", &[]);
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
    assert_eq!((late.status, late.header("x-weft-reason")), (504, Some("timeout")), "{}", late.body);
    assert!(late.body.contains("did not answer within 700ms"), "{}", late.body);

    // On and off by one command each.
    cluster.write(
        &json!({"Kind": "service-faults", "Name": "web", "Faults": [{"Abort": {"Percent": 100, "HTTPStatus": 418}}]}),
    );
    let broken = cluster.call("/", &[]);
    assert_eq!((broken.status, broken.header("x-weft-reason")), (418, Some("fault")), "{}", broken.body);
    cluster.delete("service-faults", "web");
    assert_eq!(failed(10), 0);

    // A mirror that takes two seconds slows nothing.
    cluster.write(&router(&json!([{"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {
        "NumRetries": 2, "RetryOnStatusCodes": [503], "Mirror": {"Service": "shadow", "Percent": 100}}}])));
    let begun = Instant::now();
    assert_eq!(failed(10), 0);
    assert!(begun.elapsed() < Duration::from_secs(2), "ten requests took {:?} with a mirror of 2 s", begun.elapsed());
    until("the mirror got its copies", || {
        let sent = metric(&cluster.n1, "weft_http_mirrored_total{destination_service=\"shadow\",outcome=\"sent\"}");
        if sent >= 10.0 { Ok(()) } else { Err(format!("{sent} copies")) }
    });
}

#[test]
fn a_hedge_takes_the_tail_of_a_slow_instance_whose_app_sees_its_callers_leave() {
    const SLOW: Duration = Duration::from_secs(2);
    let Some(cluster) = Cluster::start() else { return };
    let _fast = cluster.serve(2, "web", "fast", (7001, 200, Duration::ZERO));
    let (_slow, left) = App::slow(Some(&cluster.lab.host(3)), "127.0.0.1:7002".parse().unwrap(), SLOW);
    let slow = json!({"Name": "web", "ID": "slow", "Port": 7002, "Protocol": "http"});
    cluster.n3.put_ok("/v1/agent/service/register", &slow.to_string());
    cluster.n1.wait_passing("web", &["fast", "slow"]);
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "round_robin"}}));
    let worst = |count: usize| {
        let call = |_| {
            let begun = Instant::now();
            assert_eq!(cluster.call("/", &[]).status, 200);
            begun.elapsed()
        };
        (0..count).map(call).max().unwrap()
    };
    assert!(worst(4) >= SLOW, "half of the instances take 2 s");

    let hedge =
        |hedge: Value| router(&json!([{"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"Hedge": hedge}}]));
    let file = cluster.file(&hedge(json!({"Delay": "0ms", "MaxRequests": 9, "Writes": ["POST"]})));
    let args = ["config", "write", path(&file), "-operator", path(&cluster.operator)];
    let out = weft_on(&cluster.lab.host(1), &args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success());
    for part in ["Hedge.Delay must be", "Hedge.MaxRequests must be", "Hedge.Writes[0] must be PUT or DELETE"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }

    cluster.write(&hedge(json!({"Delay": "50ms"})));
    let worst = worst(20);
    assert!(worst < SLOW * 3 / 4, "the worst of 20 took {worst:?}");
    let won = metric(&cluster.n1, "weft_http_hedges_total{destination_service=\"web\",outcome=\"won\"}");
    assert!(won >= 5.0, "{won} of 20 were answered by the other instance");
    until("the slow app sees its callers leave", || match left.load(Ordering::SeqCst) {
        count @ 5.. => Ok(count),
        count => Err(count.to_string()),
    });
}

#[test]
fn only_trusted_hops_say_for_whom_they_ask_and_nobody_says_who_calls() {
    let Some(cluster) = Cluster::start() else { return };
    let _app = App::heads(Some(&cluster.lab.host(2)), "127.0.0.1:7001".parse().unwrap());
    let web = json!({"Name": "web", "ID": "web", "Port": 7001, "Protocol": "http"});
    cluster.n2.put_ok("/v1/agent/service/register", &web.to_string());
    // A port that others reach: an ingress.
    let upstream = json!({"DestinationName": "web", "LocalBindAddress": "10.77.0.1", "LocalBindPort": 9394});
    let edge = json!({"Name": "edge", "Port": 2, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}});
    cluster.n1.put_ok("/v1/agent/service/register", &edge.to_string());
    cluster.n1.wait_passing("web", &["web"]);
    let said = [
        ("host", "web"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-real-ip", "203.0.113.9"),
        ("x-forwarded-client-cert", "URI=spiffe://lab.test/svc/admin"),
    ];
    let seen = |from: &Agent| {
        let answer = from.call("10.77.0.1:9394".parse().unwrap(), "GET", "/", &said, "")?;
        if answer.status == 200 { Ok(answer.body) } else { Err(format!("{} {}", answer.status, answer.body)) }
    };
    let of_stranger = until("the ingress is open", || seen(&cluster.n3));
    assert!(of_stranger.contains("x-forwarded-for: 10.77.0.3\n"), "{of_stranger}");
    assert!(!of_stranger.contains("203.0.113.9"), "{of_stranger}");

    cluster.write(&json!({"Kind": "proxy-defaults", "Name": "global", "TrustedHops": ["10.77.0.3", "192.0.2.0/24"]}));
    let of_hop = seen(&cluster.n3).unwrap();
    assert!(
        of_hop.contains("x-forwarded-for: 203.0.113.9\n") && of_hop.contains("x-real-ip: 203.0.113.9\n"),
        "{of_hop}"
    );
    let of_stranger = seen(&cluster.n2).unwrap();
    assert!(of_stranger.contains("x-forwarded-for: 10.77.0.2\n"), "{of_stranger}");
    for head in [&of_hop, &of_stranger] {
        assert!(head.contains("x-forwarded-client-cert: URI=spiffe://lab.test/svc/edge/node/n1\n"), "{head}");
        assert!(!head.contains("admin"), "{head}");
    }
}

#[test]
fn hosts_cookies_another_service_and_success_rates_decide_as_entries_say() {
    let Some(cluster) = Cluster::start() else { return };
    let _v1 = cluster.serve(2, "web", "v1", (7001, 200, Duration::ZERO));
    let _v2 = cluster.serve(3, "web", "v2", (7002, 200, Duration::ZERO));
    let _heads = App::heads(Some(&cluster.lab.host(3)), "127.0.0.1:7003".parse().unwrap());
    let shadow = json!({"Name": "shadow", "ID": "shadow", "Port": 7003, "Protocol": "http"});
    cluster.n3.put_ok("/v1/agent/service/register", &shadow.to_string());
    cluster.n1.wait_passing("web", &["v1", "v2"]);
    cluster.n1.wait_passing("shadow", &["shadow"]);

    // The app of a route gets the host that the route says.
    cluster.write(&router(&json!([{"Match": {"HTTP": {"PathPrefix": "/inner"}},
        "Destination": {"Service": "shadow", "HostRewrite": "inner.example"}}])));
    let head = cluster.call("/inner", &[]).body.to_ascii_lowercase();
    assert!(head.starts_with("get /inner ") && head.contains("host: inner.example\n"), "{head}");
    assert!(!head.contains("host: web\n"), "{head}");
    cluster.delete("service-router", "web");

    // Each value of a cookie takes the same split, and all together meet both: by chance one alone in a case of 32,768.
    cluster.write(&resolver(&json!({"Failover": {"*": {"Service": "shadow"}}})));
    cluster.write(&json!({"Kind": "service-splitter", "Name": "web", "Sticky": {"Cookie": "who"},
        "Splits": [{"Weight": 50, "ServiceSubset": "v1"}, {"Weight": 50, "ServiceSubset": "v2"}]}));
    let met: BTreeSet<String> = (0..16)
        .map(|user| {
            let cookie = format!("other=1; who=u{user}");
            let first = cluster.who("/", &[("cookie", &cookie)]);
            assert!((0..8).all(|_| cluster.who("/", &[("cookie", &cookie)]) == first), "user {user} moves");
            first
        })
        .collect();
    assert_eq!(met.len(), 2, "{met:?}");
    cluster.delete("service-splitter", "web");

    // Without an instance of its own the service's calls go to another one.
    for (agent, id) in [(&cluster.n2, "v1"), (&cluster.n3, "v2")] {
        agent.put_ok(&format!("/v1/agent/service/maintenance/{id}?enable=true"), "");
    }
    until("another service answers", || match cluster.try_call("/over", &[]) {
        Ok(answer) if answer.status == 200 && answer.body.starts_with("GET /over ") => Ok(()),
        other => Err(format!("{:?}", other.map(|answer| answer.body))),
    });
    for (agent, id) in [(&cluster.n2, "v1"), (&cluster.n3, "v2")] {
        agent.put_ok(&format!("/v1/agent/service/maintenance/{id}?enable=false"), "");
    }
    cluster.n1.wait_passing("web", &["v1", "v2"]);

    // An instance whose success rate lies far below the others' is ejected, though none of them fails often in a row.
    let (_broken, met) = App::broken(Some(&cluster.lab.host(3)), "127.0.0.1:7004".parse().unwrap());
    let broken = json!({"Name": "web", "ID": "broken", "Port": 7004, "Protocol": "http"});
    cluster.n3.put_ok("/v1/agent/service/register", &broken.to_string());
    cluster.n1.wait_passing("web", &["broken", "v1", "v2"]);
    cluster.write(&json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "round_robin"}}));
    let eject = |panic: u32| {
        cluster.write(&json!({"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": {"Defaults": {
            "PassiveHealthCheck": {"MaxFailures": 0, "Interval": "1s", "PanicThreshold": panic, "BaseEjectionTime": "5m",
                "SuccessRate": {"MinimumHosts": 3, "RequestVolume": 3, "StdevFactor": 1.0}}}}}));
    };
    eject(50);
    let workers = || {
        let why = cluster.n1.get("/v1/mesh/why?source=caller&destination=web");
        why["Workers"].as_array().cloned().unwrap_or_default()
    };
    until("every worker has ejected it by its rate", || {
        for _ in 0..20 {
            cluster.call("/", &[]);
        }
        let is_open = |worker: &Value| {
            let all = worker["Balancing"]["Instances"].as_array().cloned().unwrap_or_default();
            all.iter().any(|one| one["ID"] == "broken" && one["Breaker"] == "open")
        };
        let workers = workers();
        if !workers.is_empty() && workers.iter().all(is_open) { Ok(()) } else { Err(json!(workers).to_string()) }
    });
    assert!(metric(&cluster.n1, "weft_balancer_ejections_total{cause=\"success_rate\"}") >= 1.0);
    let asked = met.load(Ordering::SeqCst);
    assert_eq!((0..20).filter(|_| cluster.call("/", &[]).status != 200).count(), 0);
    assert_eq!(met.load(Ordering::SeqCst), asked, "it is asked while its breaker is open");

    // Two of three are fewer than 90 %: ejections are not looked at.
    eject(90);
    let failed = (0..30).filter(|_| cluster.call("/", &[]).status == 503).count();
    assert!((8..=12).contains(&failed), "{failed} of 30 went to the one that fails");
    assert!(workers().iter().all(|worker| worker["Balancing"]["Panics"] == true), "{:?}", workers());
}

/// What changes while calls go on; each leaves the service as good as it was.
fn changes(round: usize) -> Vec<Value> {
    let (is_even, policy) = (round.is_multiple_of(2), ["maglev", "random", "least_request", "round_robin"][round % 4]);
    let (first, second, protocol) = if is_even { ("v1", "v2", "http2") } else { ("v2", "v1", "http") };
    vec![
        json!({"Kind": "service-splitter", "Name": "web",
            "Splits": [{"Weight": 99.99, "ServiceSubset": first}, {"Weight": 0.01, "ServiceSubset": second}]}),
        router(&json!([{"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"RequestTimeout": "20s"}}])),
        resolver(&json!({"DefaultSubset": second, "LoadBalancer": {"Policy": policy}})),
        json!({"Kind": "service-defaults", "Name": "web", "Protocol": protocol, "RateLimits": {"InstanceLevel": {
            "RequestsPerSecond": 500_000 + round, "RequestsMaxBurst": 500_000, "Per": "source"}}}),
        json!({"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": {"Defaults": {
            "Limits": {"MaxConcurrentRequests": 900 + round, "MaxRequestsPerInstance": 500}}}}),
        json!({"Kind": "service-faults", "Name": "web", "Faults": [
            {"Delay": {"Percent": 0, "Duration": "1s"}, "Abort": {"Percent": 0, "HTTPStatus": 503}}]}),
    ]
}

#[test]
fn entries_change_under_load_and_no_request_is_lost() {
    const ROUNDS: usize = 8;
    const BATCH: u32 = 400;
    let Some(cluster) = Cluster::start() else { return };
    let (two, three) = (cluster.lab.host(2), cluster.lab.host(3));
    let _apps = [(&two, 7001, "v1"), (&three, 7002, "v2")]
        .map(|(host, port, name)| Either::start(host, SocketAddr::from(([127, 0, 0, 1], port)), name));
    for (agent, port, id) in [(&cluster.n2, 7001, "v1"), (&cluster.n3, 7002, "v2")] {
        let web = json!({"Name": "web", "ID": id, "Port": port, "Protocol": "http", "Meta": {"version": id}});
        agent.put_ok("/v1/agent/service/register", &web.to_string());
    }
    cluster.n1.wait_passing("web", &["v1", "v2"]);
    cluster.write(&resolver(&json!({})));
    assert_eq!(cluster.who("/", &[]), "v1");
    let done = AtomicBool::new(false);
    // A connection for each request, over HTTP/1.1.
    let one_by_one = || {
        let (mut called, mut lost) = (0u32, Vec::new());
        while !done.load(Ordering::Relaxed) {
            called += 1;
            match cluster.try_call("/", &[]) {
                Ok(answer) if answer.status == 200 => {}
                Ok(answer) => lost.push(format!("{} {}", answer.status, answer.body)),
                Err(why) => lost.push(why),
            }
        }
        (called, lost)
    };
    // Many at once on few connections, over HTTP/2.
    let [h2load] = found("h2load", [program("h2load")]).map_or([None], |found| found.map(Some));
    let in_streams = || {
        let (mut called, mut lost) = (0u32, Vec::new());
        while let Some(h2load) = h2load.as_deref().filter(|_| !done.load(Ordering::Relaxed)) {
            let batch = BATCH.to_string();
            let mut command = Command::new(h2load);
            command.args(["-n", &batch, "-c", "2", "-m", "8", "http://127.0.0.1:9393/"]).stdin(Stdio::null());
            let out = cluster.lab.host(1).run(|| command.output().unwrap());
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            called += BATCH;
            if !said.contains(&format!("{BATCH} succeeded, 0 failed")) {
                lost.push(said);
            }
        }
        (called, lost)
    };
    let (by_http1, by_http2) = std::thread::scope(|scope| {
        let loads = (scope.spawn(one_by_one), scope.spawn(in_streams));
        for round in 0..ROUNDS {
            for entry in changes(round) {
                cluster.write(&entry);
            }
            for (kind, name) in [("service-router", "web"), ("service-faults", "web"), ("service-defaults", "caller")] {
                cluster.delete(kind, name);
            }
        }
        cluster.delete("service-splitter", "web");
        cluster.delete("service-defaults", "web");
        done.store(true, Ordering::Relaxed);
        (loads.0.join().unwrap(), loads.1.join().unwrap())
    });
    for (called, lost) in [by_http1.clone(), by_http2.clone()] {
        assert_eq!(lost, Vec::<String>::new(), "of {called}");
    }
    assert!(by_http1.0 > 100 && (h2load.is_none() || by_http2.0 > 1_000), "{} and {}", by_http1.0, by_http2.0);
}

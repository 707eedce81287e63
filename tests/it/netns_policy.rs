//! Policy on real agents: operators write it, every node enforces it, nobody else changes it.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use weft::authz::{Action, Intention};
use weft::clock;
use weft::pki::{DocumentKey, SpkiHash};
use weft::policy::{Content, Document, DocumentId, DocumentKind, IntentionBody};

use crate::agent::{Agent, Ca, Spec, path, weft, weft_ok};
use crate::app::App;
use crate::lab::Lab;
use crate::netns_identity::{Stream, weft_on, weft_on_ok};
use crate::wait::until;

pub(crate) const DENY: &str = "-default-intention-policy=deny";
const RAW: &str = r#"{"Name":"raw","Port":7000}"#;
const WEB: &str = r#"{"Name":"web","Port":7001,"Protocol":"http"}"#;
const CALLER: &str = r#"{"Name":"caller","Port":1,"Connect":{"SidecarService":{"Proxy":{"Upstreams":[
    {"DestinationName":"raw","LocalBindPort":9292},{"DestinationName":"web","LocalBindPort":9393}]}}}}"#;
const WEB_PORT: &str = "127.0.0.1:9393";

/// Runs `weft ca operator create` and returns the operator's file.
#[track_caller]
pub(crate) fn operator(ca: &Ca, name: &str, may: &str) -> PathBuf {
    let (dir, out) = (ca.dir(), ca.dir().join(format!("{name}.operator")));
    weft_ok(&["ca", "operator", "create", "-name", name, "-may", may, "-ca", path(&dir), "-out", path(&out)]);
    out
}

/// Three agents that deny by default: `n1` issues, `n2` serves raw and web, `n3` calls them.
struct Cluster {
    n1: Agent,
    n2: Agent,
    n3: Agent,
    _apps: [App; 2],
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    fn start() -> Option<Self> {
        let lab = Lab::new(4)?;
        let ca = Ca::init("lab.test");
        let issuer = ca.issuer();
        let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer), DENY]));
        let token = ca.token("n*", "raw,web,caller", "1h");
        let join = ["-join", "10.77.0.1", "-token", &token, DENY];
        let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &join));
        let n3 = Agent::start(&Spec::on(&lab.host(3), "n3", &join));
        for agent in [&n1, &n2, &n3] {
            agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
        }
        let apps = [
            App::tcp(Some(&lab.host(2)), "127.0.0.1:7000".parse().unwrap(), "raw"),
            App::http(Some(&lab.host(2)), "127.0.0.1:7001".parse().unwrap(), "web"),
        ];
        n2.put_ok("/v1/agent/service/register", RAW);
        n2.put_ok("/v1/agent/service/register", WEB);
        n3.put_ok("/v1/agent/service/register", CALLER);
        n3.wait_passing("raw", &["raw"]);
        n3.wait_passing("web", &["web"]);
        n1.wait_passing("caller", &["caller"]);
        Some(Self { n1, n2, n3, ca, lab, _apps: apps })
    }

    /// Calls web from the caller's host.
    fn call(&self, method: &str, path: &str) -> Result<crate::http::Answer, String> {
        self.n3.call(WEB_PORT.parse().unwrap(), method, path, &[("host", "web")], "")
    }

    /// Waits until a call is answered with `status`.
    #[track_caller]
    fn wait_status(&self, method: &str, path: &str, status: u16) -> crate::http::Answer {
        until(&format!("{method} {path} is answered with {status}"), || match self.call(method, path) {
            Ok(answer) if answer.status == status => Ok(answer),
            Ok(answer) => Err(format!("{} {}", answer.status, answer.body)),
            Err(why) => Err(why),
        })
    }

    /// Runs `weft` on the host of n1 with an operator's file.
    #[track_caller]
    fn sign(&self, operator: &Path, args: &[&str]) -> String {
        weft_on_ok(&self.lab.host(1), &[args, &["-operator", path(operator)]].concat())
    }
}

/// Whether `agent` allows a stream from caller to raw, and by which rule.
pub(crate) fn verdict(agent: &Agent) -> Result<(bool, String), String> {
    let answer = agent.try_get("/v1/connect/intentions/check?source=caller&destination=raw")?.json();
    Ok((answer["Allowed"].as_bool().unwrap_or(false), answer["Rule"].as_str().unwrap_or("?").to_owned()))
}

#[track_caller]
pub(crate) fn wait_verdict(agent: &Agent, want: bool, rule: &str) {
    until(&format!("{} decides {want} by {rule}", agent.name), || match verdict(agent)? {
        (allowed, by) if allowed == want && by == rule => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// A metric's value; 0 if the series is not there.
pub(crate) fn metric(agent: &Agent, series: &str) -> f64 {
    let text = agent.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
    let line = text.lines().find(|line| line.starts_with(series));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
}

#[test]
fn a_denied_caller_hears_a_clear_answer_and_a_change_cuts_what_is_open() {
    let Some(cluster) = Cluster::start() else { return };
    let alice = operator(&cluster.ca, "alice", "intentions");
    let Cluster { n2, n3, lab, .. } = &cluster;

    // Nothing is allowed: the app gets a reset, HTTP a 403 with the reason.
    let answer = cluster.wait_status("GET", "/", 403);
    assert!(answer.headers.contains(&("x-weft-reason".to_owned(), "forbidden".to_owned())), "{:?}", answer.headers);
    assert!(answer.body.contains("no intention allows it"), "{}", answer.body);
    let refused = n3.inside(|| {
        TcpStream::connect("127.0.0.1:9292").and_then(|mut stream| std::io::Read::read(&mut stream, &mut [0]))
    });
    assert!(matches!(&refused, Err(_) | Ok(0)), "{refused:?}");
    assert!(metric(n3, "weft_policy_denied_total{reporter=\"source\",rule=\"default\"}") >= 2.0);
    let check =
        |args: &[&str]| weft_on(&lab.host(3), &[&["intention", "check", "caller"], args].concat()).status.code();
    assert_eq!(check(&["raw"]), Some(2));
    assert_eq!(check(&["raw", "-http-addr", "127.0.0.1:1"]), Some(1));

    // Allowed: it passes, on the node that was not told as well.
    let printed = cluster.sign(&alice, &["intention", "create", "caller", "raw"]);
    assert!(printed.contains("2 of 2 other members confirmed"), "{printed}");
    let stream = Stream::open(n3);
    assert_eq!(check(&["raw"]), Some(0));
    let again = weft_on(&lab.host(1), &["intention", "create", "caller", "raw", "-operator", path(&alice)]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("-replace"), "{again:?}");

    // Changed under load: the open stream ends within a second, and no other begins.
    let file = cluster.ca.dir().join("deny");
    let (out, version) = (path(&file), ["-document-version", "2"]);
    weft_ok(
        &[&["intention", "create", "-deny", "caller", "raw", "-operator", path(&alice), "-out", out], &version[..]]
            .concat(),
    );
    let denial = STANDARD.decode(std::fs::read_to_string(&file).unwrap().trim()).unwrap();
    let begun = Instant::now();
    assert_eq!(offer(&cluster.n1, &denial).status, 200);
    let answered = begun.elapsed();
    let cut = stream.cut().saturating_duration_since(begun);
    println!("intention: the stream was cut {cut:.2?} after the order, which was answered after {answered:.2?}");
    assert!(cut < Duration::from_secs(1), "it lived for {cut:?}");
    wait_verdict(n3, false, "caller:raw");
    until("the cut is counted", || match metric(n2, "weft_policy_cut_total{rule=\"caller:raw\"}") {
        count if count >= 1.0 => Ok(()),
        count => Err(count.to_string()),
    });

    // By request: methods and paths, also where the path is disguised.
    let file = cluster.ca.dir().join("web.json");
    let permissions = json!({"SourceName": "caller", "DestinationName": "web", "Permissions": [
        {"Action": "deny", "HTTP": {"PathPrefix": "/admin"}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/", "Methods": ["GET"]}}]});
    std::fs::write(&file, permissions.to_string()).unwrap();
    cluster.sign(&alice, &["intention", "create", "-file", path(&file)]);
    let answer = cluster.wait_status("GET", "/public?x", 200);
    assert!(answer.body.starts_with("web GET /public?x"), "{}", answer.body);
    for (method, target) in [("GET", "/admin/x"), ("GET", "/a/../admin"), ("GET", "/%61dmin"), ("POST", "/public")] {
        let answer = cluster.call(method, target).unwrap();
        assert_eq!(answer.status, 403, "{method} {target}: {}", answer.body);
        assert!(answer.body.contains("caller:web"), "{}", answer.body);
    }
    assert_eq!(check(&["web", "-path", "/public"]), Some(0));
    assert_eq!(check(&["web", "-path", "/public", "-method", "PUT"]), Some(2));
    assert_eq!(check(&["web"]), Some(2), "permissions deny what nobody looks into");

    // Why, in words and for programs.
    let why = weft_on_ok(&lab.host(3), &["why", "caller", "web", "-path", "/admin"]);
    for part in [
        "denied by intention caller:web",
        "precedence 9",
        "by alice",
        "n2",
        "passing",
        "takes calls",
        "spiffe://lab.test/svc/caller/node/n3",
        "chain of n2: node until",
        "<- root until",
        "balances by peak_ewma; under way from here: 0 of 1024 requests,",
        "compared",
        "To let it pass",
    ] {
        assert!(why.contains(part), "no {part:?} in:\n{why}");
    }
    let why: Value =
        serde_json::from_str(&weft_on_ok(&lab.host(1), &["why", "caller", "raw", "-format=json"])).unwrap();
    assert_eq!((&why["Allowed"], &why["Policy"]["Rule"]), (&json!(false), &json!("caller:raw")), "{why}");
    assert!(why["ToChange"][0].as_str().unwrap().contains("-replace"), "{why}");
    // From a node that has neither end: the caller's chain as far as its node publishes it.
    let chain = &why["SourceInstances"][0]["Certificate"];
    assert_eq!(why["SourceInstances"][0]["Node"], "n3");
    assert!(chain["Ends"].is_string() && chain["IssuerEnds"].is_string() && chain["RootEnds"].is_string(), "{why}");
    assert!(why["Data"]["DocumentsComparedSeconds"].is_u64(), "{why}");

    // Dry run: counted, not enforced.
    cluster.sign(&alice, &["intention", "create", "caller", "raw", "-replace"]);
    cluster.sign(&alice, &["intention", "create", "-deny", "-audit", "caller", "web", "-replace"]);
    cluster.sign(&alice, &["intention", "create", "*", "web"]);
    cluster.wait_status("POST", "/admin", 200);
    assert!(
        metric(n2, "weft_policy_audited_total{action=\"deny\",reporter=\"destination\",rule=\"caller:web\"}") >= 1.0
    );
    cluster.sign(&alice, &["intention", "delete", "caller", "web"]);
    let list = weft_on_ok(&lab.host(3), &["intention", "list"]);
    assert!(!list.lines().any(|line| line.starts_with("caller") && line.contains("web")), "{list}");
}

/// Signs an intention with a key, whatever its scope: what an insider would do.
fn forge(key: &DocumentKey, name: &str, version: u64, body: &IntentionBody) -> Document {
    let content = Content {
        trust_domain: "lab.test".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Intention, name: name.parse().unwrap() },
        version,
        not_before: clock::wall(),
        not_after: key.validity().unwrap().1,
        signer: SpkiHash([0; 32]),
        body: body.to_bytes().unwrap(),
    };
    Document::sign(content, key).unwrap()
}

pub(crate) fn offer(agent: &Agent, document: &[u8]) -> crate::http::Answer {
    agent.put("/v1/mesh/document", &json!({"Document": STANDARD.encode(document)}).to_string())
}

#[test]
fn scenario_17_what_an_insider_brings_is_refused_everywhere_and_scenario_16_poison_is_quarantined() {
    let Some(cluster) = Cluster::start() else { return };
    let Cluster { n1, n2, n3, ca, lab, _apps } = cluster;
    let (n1, n3, ca, lab) = (&n1, &n3, &ca, &lab);
    let sign =
        |operator: &Path, args: &[&str]| weft_on_ok(&lab.host(1), &[args, &["-operator", path(operator)]].concat());
    let (alice, ci) = (operator(ca, "alice", "intentions"), operator(ca, "ci", "intentions:web*,config:web*"));
    sign(&alice, &["intention", "create", "caller", "raw"]);
    for agent in [n1, &n2, n3] {
        wait_verdict(agent, true, "caller:raw");
    }
    let old = n1.get("/v1/mesh/export")["Documents"][0]["Document"].as_str().unwrap().to_owned();
    sign(&alice, &["intention", "create", "-deny", "caller", "raw", "-replace"]);
    for agent in [n1, &n2, n3] {
        wait_verdict(agent, false, "caller:raw");
    }

    // An operator outside its scope: refused by its own command, and by each node if it goes round that.
    let local = weft_on(&lab.host(1), &["intention", "create", "caller", "raw", "-replace", "-operator", path(&ci)]);
    assert!(String::from_utf8_lossy(&local.stderr).contains("may sign `intentions:web*,config:web*`"), "{local:?}");
    let allow = IntentionBody(Some(Intention::plain("caller".parse().unwrap(), "raw".parse().unwrap(), Action::Allow)));
    let outside = forge(&DocumentKey::load_operator(&ci).unwrap(), "caller:raw", 9, &allow);
    // A CA of the same name, whose operator may everything; a signature of which one bit was changed.
    let foreign = Ca::init("lab.test");
    let stranger =
        forge(&DocumentKey::load_operator(&operator(&foreign, "alice", "*")).unwrap(), "caller:raw", 9, &allow);
    let mut altered = forge(&DocumentKey::load_operator(&alice).unwrap(), "caller:raw", 9, &allow).to_bytes();
    *altered.last_mut().unwrap() ^= 1;
    let misnamed = forge(&DocumentKey::load_operator(&alice).unwrap(), "caller:web", 9, &allow);
    for agent in [n1, &n2, n3] {
        for (bytes, part) in [
            (outside.to_bytes(), "may sign"),
            (stranger.to_bytes(), "not believed"),
            (altered.clone(), "not believed"),
            (misnamed.to_bytes(), "must be named"),
        ] {
            let answer = offer(agent, &bytes);
            assert!(
                answer.status == 403 && answer.body.contains(part),
                "{}: {} {}",
                agent.name,
                answer.status,
                answer.body
            );
        }
        // A replay is old news.
        let answer = offer(agent, &STANDARD.decode(&old).unwrap());
        assert_eq!(answer.json()["Outcome"], "older");
        assert_eq!(verdict(agent).unwrap(), (false, "caller:raw".to_owned()));
        let refusal = agent.put("/v1/connect/intentions/exact?source=caller&destination=raw", r#"{"Action":"allow"}"#);
        assert!(
            refusal.status == 403
                && refusal.body.contains("WEFT_OPERATOR")
                && refusal.body.contains("policy_authority")
        );
    }

    // Poison: signed by one who may, and of no use to any node. What was in force stays; the next good version counts.
    let poison = json!({"SourceName": "caller", "DestinationName": "raw", "Permissions": [
        {"Action": "allow", "HTTP": {"PathRegex": "/(((a{99}){99}){99})"}}]});
    let poison = IntentionBody(Some(weft::authz::from_json(&poison, None).unwrap()));
    let key = DocumentKey::load_operator(&alice).unwrap();
    // Callers are let in at this moment, and go on so.
    assert_eq!(offer(n3, &forge(&key, "caller:raw", 10, &allow).to_bytes()).status, 200);
    for agent in [n1, &n2, n3] {
        wait_verdict(agent, true, "caller:raw");
    }
    let open = Stream::open(n3);
    assert_eq!(offer(n3, &forge(&key, "caller:raw", 11, &poison).to_bytes()).status, 200);
    for agent in [n1, &n2, n3] {
        until(&format!("{} quarantines the poison", agent.name), || {
            let info = agent.try_get("/v1/mesh/info")?.json();
            let shown = info["Policy"]["Quarantined"].to_string();
            if shown.contains("caller:raw version 11") { Ok(()) } else { Err(shown) }
        });
        assert_eq!(verdict(agent).unwrap(), (true, "caller:raw".to_owned()));
        assert!(metric(agent, "weft_policy_quarantined ") >= 1.0);
    }
    // The proxies keep serving by the last good version: what is open goes on, and more opens.
    let _another = Stream::open(n3);
    assert!(open.is_open());
    sign(&alice, &["intention", "create", "-deny", "caller", "raw", "-replace"]);
    open.cut();
    for agent in [n1, &n2, n3] {
        wait_verdict(agent, false, "caller:raw");
        assert!(metric(agent, "weft_policy_quarantined ") < 1.0);
    }
    sign(&alice, &["intention", "create", "caller", "raw", "-replace"]);
    for agent in [n1, &n2, n3] {
        wait_verdict(agent, true, "caller:raw");
    }

    // A restart keeps it, a newcomer learns it, and an operator that is taken back said nothing.
    let n2 = restart(n2, lab, 2, "n2");
    assert_eq!(verdict(&n2).unwrap(), (true, "caller:raw".to_owned()), "policy is in force before the API answers");
    let token = ca.token("n4", "web", "1h");
    let n4 = Agent::start(&Spec::on(&lab.host(4), "n4", &["-join", "10.77.0.1", "-token", &token, DENY]));
    wait_verdict(&n4, true, "caller:raw");
    let dir = ca.dir();
    weft_on_ok(&lab.host(1), &["ca", "operator", "revoke", "alice", "-ca", path(&dir)]);
    for agent in [n1, &n2, n3, &n4] {
        wait_verdict(agent, false, "default");
    }
    let list = weft_on_ok(&lab.host(1), &["ca", "operator", "list", "-ca", path(&dir)]);
    assert!(list.lines().any(|line| line.starts_with("alice") && line.contains("revoked")), "{list}");
    let refused = weft_on(&lab.host(1), &["intention", "create", "caller", "raw", "-operator", path(&alice)]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("revoked"), "{refused:?}");
}

fn restart(agent: Agent, lab: &Lab, number: usize, name: &'static str) -> Agent {
    let data = agent.kill();
    let agent = Agent::spawn(&Spec::on(&lab.host(number), name, &[DENY]), data);
    agent.wait_ready();
    agent
}

#[test]
fn scenario_13_two_operators_on_two_sides_of_a_partition_end_with_one_winner_and_an_alarm() {
    let Some(cluster) = Cluster::start() else { return };
    let Cluster { n1, n2, n3, ca, lab, .. } = &cluster;
    let (alice, bob) = (operator(ca, "alice", "intentions"), operator(ca, "bob", "intentions"));
    let (left, right) = ([lab.host(1), lab.host(2)], [lab.host(3)]);
    lab.split(&left, &right);
    weft_on_ok(&lab.host(1), &["intention", "create", "caller", "raw", "-operator", path(&alice)]);
    weft_on_ok(&lab.host(3), &["intention", "create", "-deny", "caller", "raw", "-operator", path(&bob)]);
    assert_eq!((verdict(n1).unwrap().0, verdict(n3).unwrap().0), (true, false));
    for host in left.iter().chain(&right) {
        lab.heal(host);
    }
    let agents = [n1, n2, n3];
    until("all agree", || {
        let hashes: Vec<Value> =
            agents.iter().map(|agent| agent.get("/v1/mesh/documents")["SetHash"].clone()).collect();
        if hashes.iter().all(|hash| *hash == hashes[0]) { Ok(()) } else { Err(format!("{hashes:?}")) }
    });
    // By the documents: the tables follow them a moment later.
    let says = n1.get("/v1/mesh/documents")["Documents"][0]["Says"][0].as_str().unwrap().to_owned();
    let is_allowed = says.ends_with("allow");
    for (agent, number) in agents.into_iter().zip(1..) {
        wait_verdict(agent, is_allowed, "caller:raw");
        until("the fork is shown", || {
            let out = weft_on(&lab.host(number), &["config", "list"]);
            let (shown, warned) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            if shown.contains("1 FORK") && warned.contains("two contents") { Ok(()) } else { Err(shown.into_owned()) }
        });
        assert!(metric(agent, "weft_documents_forks ") >= 1.0);
    }
    cluster.sign(&alice, &["intention", "create", "caller", "raw", "-replace"]);
    for agent in agents {
        wait_verdict(agent, true, "caller:raw");
    }
}

#[test]
fn an_agent_with_policy_authority_signs_for_clients_with_the_token_and_a_backup_restores_all() {
    let ca = Ca::init("lab.test");
    let (issuer, authority) = (ca.issuer(), operator(&ca, "gateway", "intentions,config"));
    let token = ca.dir().join("admin-token");
    std::fs::write(&token, "0123456789abcdef-admin").unwrap();
    let flags =
        ["-issuer", path(&issuer), DENY, "-policy-authority", path(&authority), "-admin-token-file", path(&token)];
    let agent = Agent::start_with_token(&Spec::loopback(30, "n1", &flags), "0123456789abcdef-admin");
    let api = agent.api;
    let call = |method: &str, target: &str, body: &str| {
        crate::http::request(api, method, target, &[("x-consul-token", "0123456789abcdef-admin")], body).unwrap()
    };
    let exact = "/v1/connect/intentions/exact?source=web&destination=db";
    assert_eq!(crate::http::request(api, "PUT", exact, &[], r#"{"Action":"allow"}"#).unwrap().status, 403);
    assert_eq!(call("GET", exact, "").status, 404);
    let put = call("PUT", exact, r#"{"Action":"allow","Description":"shop"}"#);
    assert_eq!((put.status, put.body.as_str()), (200, "true"));
    // It counts as soon as it is answered.
    let check = call("GET", "/v1/connect/intentions/check?source=web&destination=db", "").json();
    assert_eq!(check, json!({"Allowed": true, "Rule": "web:db"}));
    let read = call("GET", exact, "").json();
    assert_eq!(
        (&read["Action"], &read["Precedence"], &read["Description"]),
        (&json!("allow"), &json!(9), &json!("shop"))
    );
    assert_eq!(call("PUT", "/v1/connect/intentions/exact?source=*&destination=db", r#"{"Action":"deny"}"#).status, 200);
    let matched = call("GET", "/v1/connect/intentions/match?by=destination&name=db", "").json();
    let precedences: Vec<&Value> = matched["db"].as_array().unwrap().iter().map(|one| &one["Precedence"]).collect();
    assert_eq!(precedences, [&json!(9), &json!(8)]);
    let authorize = r#"{"Target":"db","ClientCertURI":"spiffe://lab.test/svc/api/node/n9","ClientCertSerial":""}"#;
    let authorized = call("POST", "/v1/agent/connect/authorize", authorize).json();
    assert_eq!(authorized["Authorized"], false);
    assert!(authorized["Reason"].as_str().unwrap().contains("*:db"), "{authorized}");

    by_id(&call);
    by_entry(&call);

    let entry = r#"{"Kind":"service-defaults","Name":"web","Protocol":"http"}"#;
    assert_eq!(call("PUT", "/v1/config?cas=0", entry).body, "true");
    assert_eq!(call("PUT", "/v1/config?cas=0", entry).body, "false");
    assert_eq!(call("PUT", "/v1/config?cas=1", entry).body, "true");
    let read = call("GET", "/v1/config/service-defaults/web", "").json();
    assert_eq!((&read["Protocol"], &read["ModifyIndex"]), (&json!("http"), &json!(2)));
    assert_eq!(call("GET", "/v1/config/service-defaults", "").json().as_array().unwrap().len(), 1);
    assert_eq!(call("PUT", "/v1/config", r#"{"Kind":"nonsense","Name":"web"}"#).status, 400);
    assert_eq!(call("DELETE", "/v1/config/service-defaults/web", "").status, 200);
    assert_eq!(call("GET", "/v1/config/service-defaults/web", "").status, 404);
    assert_eq!(call("PUT", "/v1/config", entry).body, "true");

    // A backup, brought to a mesh of the same CA that lost everything.
    let backup = ca.dir().join("backup.json");
    let (address, secret) = (api.to_string(), "0123456789abcdef-admin");
    weft_ok(&["export", "-out", path(&backup), "-http-addr", &address, "-token", secret]);
    let text = std::fs::read_to_string(&backup).unwrap();
    assert!(text.contains("\"SourceName\": \"web\"") && text.contains("\"Protocol\": \"http\""), "{text}");
    let fresh = Agent::start(&Spec::loopback(31, "n1", &["-issuer", path(&issuer), DENY]));
    let imported = weft_ok(&["import", path(&backup), "-http-addr", &fresh.api.to_string()]);
    assert!(imported.contains("0 refused"), "{imported}");
    let restored = fresh.get("/v1/connect/intentions/check?source=web&destination=db");
    assert_eq!(restored["Allowed"], true);
    assert_eq!(fresh.get("/v1/config/service-defaults/web")["Protocol"], "http");
    let signed = weft_ok(&[
        "import",
        path(&backup),
        "-sign",
        "-operator",
        path(&authority),
        "-http-addr",
        &fresh.api.to_string(),
    ]);
    assert!(signed.contains("signed as version 2"), "{signed}");
    let outside = weft(&["config", "write", path(&backup), "-http-addr", &fresh.api.to_string()]);
    assert!(String::from_utf8_lossy(&outside.stderr).contains("Kind"), "{outside:?}");
}

/// Consul's older endpoints, by id.
fn by_id(call: &impl Fn(&str, &str, &str) -> crate::http::Answer) {
    let all = "/v1/connect/intentions";
    let body = r#"{"SourceName":"cart","DestinationName":"db","SourceType":"consul","Action":"allow"}"#;
    let created = call("POST", all, body);
    assert_eq!(created.status, 200, "{}", created.body);
    let id = created.json()["ID"].as_str().unwrap().to_owned();
    let one = format!("{all}/{id}");
    let read = call("GET", &one, "").json();
    assert_eq!((&read["ID"], &read["SourceName"], &read["ModifyIndex"]), (&json!(id), &json!("cart"), &json!(1)));
    let listed = call("GET", all, "").json();
    assert!(listed.as_array().unwrap().iter().any(|one| one["ID"] == id.as_str()), "{listed}");
    let again = call("POST", all, body);
    assert!(again.status == 409 && again.body.contains(&id), "{} {}", again.status, again.body);
    // What a client read it may write back, changed; not as another's.
    let mut changed = read.clone();
    changed["Action"] = json!("deny");
    let put = call("PUT", &one, &changed.to_string());
    assert_eq!((put.status, put.json()), (200, json!({"ID": id})));
    assert_eq!(call("GET", &one, "").json()["Action"], "deny");
    changed["SourceName"] = json!("other");
    assert_eq!(call("PUT", &one, &changed.to_string()).status, 400);
    let foreign =
        r#"{"ID":"7f1b4f0c-0000-5000-8000-000000000000","SourceName":"a","DestinationName":"b","Action":"deny"}"#;
    assert_eq!(call("POST", all, foreign).status, 400);
    // Deleted and made again, it has the same id.
    assert_eq!(call("DELETE", &one, "").body, "true");
    assert_eq!(call("GET", &one, "").status, 404);
    assert_eq!(call("DELETE", &one, "").body, "true");
    assert_eq!(call("PUT", &one, body).status, 404);
    assert_eq!(call("POST", all, body).json()["ID"], id.as_str());
    assert_eq!(call("DELETE", &one, "").status, 200);
}

/// All intentions about a service as one config entry.
fn by_entry(call: &impl Fn(&str, &str, &str) -> crate::http::Answer) {
    let one = "/v1/config/service-intentions/shop";
    let entry = json!({"Kind": "service-intentions", "Name": "shop", "Sources": [
        {"Name": "web", "Action": "allow"},
        {"Name": "cart", "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/a"}}]}]});
    assert_eq!(call("PUT", "/v1/config?cas=1", &entry.to_string()).body, "false");
    assert_eq!(call("PUT", "/v1/config?cas=0", &entry.to_string()).body, "true");
    let read = call("GET", one, "").json();
    assert_eq!((read["Sources"].as_array().unwrap().len(), &read["ModifyIndex"]), (2, &json!(2)), "{read}");
    let check = |source: &str| {
        call("GET", &format!("/v1/connect/intentions/check?source={source}&destination=shop"), "").json()["Allowed"]
            .clone()
    };
    assert_eq!((check("web"), check("cart")), (json!(true), json!(false)));
    // One source changed, one taken out, one new.
    let changed = json!({"Kind": "service-intentions", "Name": "shop", "Sources": [
        {"Name": "web", "Action": "deny"}, {"Name": "*", "Action": "allow"}]});
    assert_eq!(call("PUT", "/v1/config?cas=2", &changed.to_string()).body, "true");
    assert_eq!((check("web"), check("cart")), (json!(false), json!(true)));
    let listed = call("GET", "/v1/config/service-intentions", "").json();
    assert!(listed.as_array().unwrap().iter().any(|one| one["Name"] == "shop"), "{listed}");
    assert_eq!(call("DELETE", one, "").status, 200);
    assert_eq!(call("GET", one, "").status, 404);
    assert_eq!(call("GET", "/v1/connect/intentions/exact?source=web&destination=shop", "").status, 404);
}

#[test]
fn what_ends_soon_is_told_in_log_metrics_and_lists() {
    let ca = Ca::init("lab.test");
    let dir = ca.dir();
    let out = dir.join("short.operator");
    weft_ok(&[
        "ca",
        "operator",
        "create",
        "-name",
        "short",
        "-may",
        "intentions",
        "-ttl",
        "1h",
        "-ca",
        path(&dir),
        "-out",
        path(&out),
    ]);
    let token = dir.join("admin-token");
    std::fs::write(&token, "0123456789abcdef-admin").unwrap();
    let issuer = ca.issuer();
    let flags = ["-issuer", path(&issuer), DENY, "-policy-authority", path(&out), "-admin-token-file", path(&token)];
    // Fifty minutes on, ten of the operator's hour are left.
    let mut spec = Spec::loopback(32, "n1", &flags);
    spec.wrap = crate::agent::at_offset("+50m");
    let agent = Agent::start_with_token(&spec, "0123456789abcdef-admin");
    let (address, secret) = (agent.api.to_string(), "0123456789abcdef-admin");
    let client = ["-http-addr", address.as_str(), "-token", secret];
    weft_ok(&[&["intention", "create", "web", "db", "-operator", path(&out)], &client[..]].concat());
    for verb in ["intention", "config"] {
        let listed = weft(&[&[verb, "list"], &client[..]].concat());
        let (shown, warned) = (String::from_utf8_lossy(&listed.stdout), String::from_utf8_lossy(&listed.stderr));
        assert!(shown.contains("ENDS SOON"), "{shown}");
        assert!(warned.contains("operator short") && warned.contains("import -sign"), "{warned}");
    }
    let metric = |series: &str| {
        let shown = [("x-consul-token", secret)];
        let text = agent.call(agent.api, "GET", "/v1/agent/metrics?format=prometheus", &shown, "").unwrap().body;
        let line = text.lines().find(|line| line.starts_with(series)).map(str::to_owned);
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
    };
    until("the metrics and the log tell it", || {
        let (ending, first, own) = (
            metric("weft_policy_ending "),
            metric("weft_policy_first_end_days "),
            metric("weft_policy_authority_end_days "),
        );
        let is_near = |days: Option<f64>| days.is_some_and(|days| (0.0..0.0105).contains(&days));
        let log = agent.log();
        let told = log.lines().filter(|line| line.contains("policy ends soon") && line.contains("short")).count();
        let own_told = log.lines().filter(|line| line.contains("policy_authority ends soon")).count();
        let is_told = ending == Some(1.0) && is_near(first) && is_near(own) && told == 1 && own_told == 1;
        if is_told { Ok(()) } else { Err(format!("{ending:?} {first:?} {own:?} {told} {own_told}")) }
    });
}

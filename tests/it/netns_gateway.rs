//! A gateway into the mesh, on real agents: calls of a host that has no agent come in by it, in its name; its ports follow its
//! entry while it runs; DNS and the API say where it is.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::{Agent, Ca, Spec, path};
use crate::app::App;
use crate::clients::{found, program};
use crate::http::{Answer, request};
use crate::lab::Lab;
use crate::netns_identity::{weft_on, weft_on_ok};
use crate::netns_policy::{DENY, operator};
use crate::wait::until;

/// `n1` issues and has the gateway, `n2` serves; the third host has no agent: clients live there, and an app that `n2` stands
/// in for.
struct Cluster {
    n1: Agent,
    n2: Agent,
    operator: PathBuf,
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    fn start() -> Option<Self> {
        let lab = Lab::new(3)?;
        let ca = Ca::init("edge.test");
        let issuer = ca.issuer();
        let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer), DENY]));
        let token = ca.token("n2", "web,legacy", "1h");
        let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token, DENY]));
        for agent in [&n1, &n2] {
            agent.wait_members(&["n1=1", "n2=1"]);
        }
        let operator = operator(&ca, "alice", "intentions,config");
        Some(Self { n1, n2, operator, ca, lab })
    }

    #[track_caller]
    fn sign(&self, args: &[&str]) {
        weft_on_ok(&self.lab.host(1), &[args, &["-operator", path(&self.operator)]].concat());
    }

    /// Writes an entry; returns what was said beside.
    #[track_caller]
    fn write(&self, entry: &Value) -> String {
        let file = self.ca.dir().join("entry.json");
        std::fs::write(&file, entry.to_string()).unwrap();
        let args = ["config", "write", path(&file), "-operator", path(&self.operator)];
        let out = weft_on(&self.lab.host(1), &args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        said
    }

    #[track_caller]
    fn listen(&self, listeners: &Value) {
        let said = self.write(&json!({"Kind": "ingress-gateway", "Name": "edge", "Listeners": listeners}));
        assert_eq!(said, "", "an entry that acts is written without a warning");
    }

    /// Calls the gateway from outside.
    fn call(&self, port: u16, host: &str, path: &str) -> Result<Answer, String> {
        self.lab.host(3).run(|| request(at(port), "GET", path, &[("host", host)], ""))
    }

    #[track_caller]
    fn wait_status(&self, (port, host): (u16, &str), status: u16) -> Answer {
        until(&format!("port {port} answers {status} for {host}"), || match self.call(port, host, "/x") {
            Ok(answer) if answer.status == status => Ok(answer),
            Ok(answer) => Err(format!("{} {}", answer.status, answer.body)),
            Err(why) => Err(why),
        })
    }

    #[track_caller]
    fn wait_closed(&self, port: u16) {
        let connect = || self.lab.host(3).run(|| TcpStream::connect_timeout(&at(port), Duration::from_secs(5)));
        until(&format!("port {port} is closed"), || match connect() {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// How the gateway's agent says that a port fares.
    fn state(&self, port: u16) -> Result<String, String> {
        let info = self.n1.try_get("/v1/mesh/info")?.json();
        let listeners = info["UpstreamListeners"].as_array().cloned().unwrap_or_default();
        let found = listeners.iter().find(|one| one["Bind"] == at(port).to_string());
        found.map(|one| format!("{}: {}", one["Destination"], one["State"])).ok_or_else(|| info.to_string())
    }
}

/// The gateway's own address is that of its agent.
fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 77, 0, 1], port))
}

fn http(port: u16, services: &Value) -> Value {
    json!({"Port": port, "Protocol": "http", "Services": services})
}

fn bytes(port: u16, service: &str) -> Value {
    json!({"Port": port, "Services": [{"Name": service}]})
}

/// The ports of gateways that DNS at `n2` names for a service, in order; none where dig is not installed.
fn ingress_ports(lab: &Lab, service: &str) -> Option<Vec<String>> {
    let [dig] = found("dig", [program("dig")])?;
    let mut command = Command::new(&dig);
    command.args(["@127.0.0.1", "-p", "8600", "+short", "+tries=1", "+time=5", "SRV"]);
    command.arg(format!("{service}.ingress.weft"));
    let out = lab.host(2).run(|| command.stdin(Stdio::null()).output().unwrap());
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut ports: Vec<String> =
        said.lines().filter_map(|line| line.split_whitespace().nth(2).map(str::to_owned)).collect();
    ports.sort();
    Some(ports)
}

/// Every agent knows by which gateway a service is reached.
fn is_known_to_all(cluster: &Cluster) {
    let Cluster { n2, lab, .. } = cluster;
    let gateways = n2.get("/v1/health/ingress/web?passing");
    assert_eq!(
        (&gateways[0]["Node"]["Node"], &gateways[0]["Service"]["Kind"]),
        (&json!("n1"), &json!("ingress-gateway"))
    );
    let led_to = n2.get("/v1/catalog/gateway-services/edge");
    let rows: Vec<String> =
        led_to.as_array().unwrap().iter().map(|row| format!("{} {}", row["Service"]["Name"], row["Port"])).collect();
    assert_eq!(rows, ["\"web\" 8080", "\"legacy\" 9000"], "{led_to}");
    if let Some([dig]) = found("dig", [program("dig")]) {
        let ask = |words: &[&str]| {
            let mut command = Command::new(&dig);
            command.args(["@127.0.0.1", "-p", "8600", "+short", "+tries=1", "+time=5"]).args(words);
            let out = lab.host(2).run(|| command.stdin(Stdio::null()).output().unwrap());
            String::from_utf8_lossy(&out.stdout).trim().to_owned()
        };
        assert_eq!(ask(&["web.ingress.weft"]), "10.77.0.1");
        assert_eq!(ask(&["web.ingress.consul", "SRV"]), "1 1 8080 n1.node.dc1.consul.");
        assert_eq!(ask(&["edge.ingress.weft"]), "");
    }
}

/// Every agent knows which ports of the gateway could not be opened: here 8082, until `taken` is dropped.
fn closed_ports_are_told_to_all(cluster: &Cluster, taken: TcpListener) {
    let Cluster { n1, n2, lab, .. } = cluster;
    let health = |want: &str| {
        until(&format!("the gateway is {want} everywhere"), || {
            let list = n2.try_get("/v1/health/service/edge")?.json();
            let checks = list[0]["Checks"].as_array().cloned().unwrap_or_default();
            let own = checks.iter().find(|check| check["CheckID"] == "gateway:edge");
            if own.is_some_and(|check| check["Status"] == want) { Ok(()) } else { Err(list.to_string()) }
        });
    };
    health("warning");
    let said = n1.get("/v1/agent/checks")["gateway:edge"]["Output"].to_string();
    assert!(said.contains("ports open: 2; port 8082: 10.77.0.1:8082 is in use"), "{said}");
    // Nobody is sent to the port that is not there, and the others are told of as before.
    assert_eq!(n2.get("/v1/health/ingress/solo"), json!([]), "8082 alone leads to it");
    assert_eq!(n2.get("/v1/health/ingress/web").as_array().map(Vec::len), Some(1));
    until("DNS names the open port alone", || match ingress_ports(lab, "web") {
        Some(ports) if ports != ["8081"] => Err(format!("{ports:?}")),
        _ => Ok(()),
    });
    cluster.listen(&json!([http(8082, &json!([{"Name": "web", "Hosts": ["*"]}]))]));
    health("critical");
    assert_eq!(n2.get("/v1/health/ingress/web?passing"), json!([]), "nobody is sent to it");
    let told_once = |path: &str| {
        until(&format!("{path} tells of the gateway"), || match n2.try_get(path)?.json() {
            one if one.as_array().is_some_and(|list| list.len() == 1) => Ok(()),
            other => Err(other.to_string()),
        });
    };
    told_once("/v1/health/ingress/web");
    drop(taken);
    health("passing");
    told_once("/v1/health/ingress/web?passing");
}

/// What is kept without an effect says so, and what cannot be is refused with every problem.
fn entries_that_do_nothing_are_told(cluster: &Cluster) {
    let said =
        cluster.write(&json!({"Kind": "mesh", "Name": "mesh", "TransparentProxy": {"MeshDestinationsOnly": true}}));
    assert!(said.contains("warning") && said.contains("has no effect"), "{said}");
    let bad = json!({"Kind": "ingress-gateway", "Name": "edge", "TLS": {"Enabled": true}, "Listeners": [{"Port": 0, "Services": []}]});
    let file = cluster.ca.dir().join("bad.json");
    std::fs::write(&file, bad.to_string()).unwrap();
    let refused =
        weft_on(&cluster.lab.host(1), &["config", "write", path(&file), "-operator", path(&cluster.operator)]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    for part in ["TLS.Enabled is refused", "Listeners[0].Port must be", "Listeners[0].Services are missing"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn calls_from_outside_come_in_by_a_gateway_in_its_name_and_its_ports_follow_its_entry() {
    let Some(cluster) = Cluster::start() else { return };
    let Cluster { n1, n2, lab, .. } = &cluster;
    let _web = App::http(Some(&lab.host(2)), "127.0.0.1:7001".parse().unwrap(), "web");
    // No agent runs where it is: n2 relays to its address, as Consul's terminating gateways do.
    let _legacy = App::tcp(Some(&lab.host(3)), "10.77.0.3:7002".parse().unwrap(), "legacy");
    n2.put_ok("/v1/agent/service/register", r#"{"Name": "web", "Port": 7001, "Protocol": "http"}"#);
    n2.put_ok("/v1/agent/service/register", r#"{"Name": "legacy", "Address": "10.77.0.3", "Port": 7002}"#);
    n1.put_ok("/v1/agent/service/register", r#"{"Name": "edge", "Kind": "ingress-gateway"}"#);
    n1.wait_passing("web", &["web"]);
    n1.wait_passing("legacy", &["legacy"]);
    n2.wait_passing("edge", &["edge"]);
    cluster.wait_closed(8080);

    // Its entry opens its ports; nothing is allowed yet, neither requests nor bytes.
    let shop =
        http(8080, &json!([{"Name": "web", "Hosts": ["shop.example"], "ResponseHeaders": {"Set": {"x-edge": "1"}}}]));
    cluster.listen(&json!([shop, bytes(9000, "legacy")]));
    let denied = cluster.wait_status((8080, "shop.example"), 403);
    assert!(denied.body.contains("edge") && denied.body.contains("web"), "{}", denied.body);
    let greeting = |stream: &mut TcpStream| -> Result<(), String> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).map_err(|error| error.to_string())?;
        assert_eq!(&greeting, b"hello from legacy\n");
        Ok(())
    };
    let connect = || -> Result<TcpStream, String> {
        let stream = lab.host(3).run(|| TcpStream::connect_timeout(&at(9000), Duration::from_secs(5)));
        let mut stream = stream.map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        greeting(&mut stream).map(|()| stream)
    };
    assert!(connect().is_err(), "bytes pass without an intention");

    // The gateway is the source that intentions name.
    cluster.sign(&["intention", "create", "edge", "web"]);
    cluster.sign(&["intention", "create", "edge", "legacy"]);
    let answer = cluster.wait_status((8080, "shop.example"), 200);
    assert!(answer.body.starts_with("web GET /x "), "{}", answer.body);
    assert!(answer.body.contains("/svc/edge/node/n1"), "the app sees who calls: {}", answer.body);
    assert_eq!(answer.header("x-edge"), Some("1"));
    let mut held = until("bytes pass to an app without an agent", connect);
    let unknown = cluster.call(8080, "web.ingress.weft", "/").unwrap();
    assert_eq!((unknown.status, unknown.header("x-weft-reason")), (404, Some("unknown_host")), "{}", unknown.body);
    assert!(unknown.body.contains("names no service that ingress gateway `edge` leads to"), "{}", unknown.body);
    let why = n1.get("/v1/mesh/why?source=edge&destination=web");
    assert!(why["Allowed"] == true && why["SourceIsHere"] == true, "{why}");

    is_known_to_all(&cluster);

    // The entry changes: a port comes, one goes, one is another program's; what is open goes on.
    let taken = lab.host(1).run(|| TcpListener::bind(at(8082)).unwrap());
    let named = http(8081, &json!([{"Name": "*"}]));
    let other = http(8082, &json!([{"Name": "web", "Hosts": ["*"]}, {"Name": "solo"}]));
    cluster.listen(&json!([named, other, bytes(9000, "legacy")]));
    assert!(cluster.wait_status((8081, "web.ingress.weft"), 200).body.starts_with("web GET /x "));
    assert_eq!(cluster.call(8081, "legacy.ingress.weft", "/").unwrap().status, 404, "it takes no requests");
    cluster.wait_closed(8080);
    held.write_all(b"still").unwrap();
    let mut echo = [0; 5];
    held.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still");
    until("the port that is taken is told", || match cluster.state(8082)? {
        state if state.contains("ingress gateway edge") && state.contains("in use") => Ok(()),
        state => Err(state),
    });
    assert!(n1.log().contains("cannot listen on a local port") && n1.log().contains("10.77.0.1:8082"));
    closed_ports_are_told_to_all(&cluster, taken);
    cluster.wait_status((8082, "anything.example"), 200);
    let named = http(8081, &json!([{"Name": "*"}]));
    cluster.listen(&json!([named, bytes(9000, "legacy")]));

    // What an intention denies from here on ends.
    cluster.sign(&["intention", "create", "-deny", "-replace", "edge", "legacy"]);
    until("what is open ends", || match held.write_all(b"x").and_then(|()| held.read_exact(&mut [0])) {
        Err(_) => Ok(()),
        Ok(()) => Err("it echoes".to_owned()),
    });

    entries_that_do_nothing_are_told(&cluster);

    // As another kind of service it has no ports to tell of.
    n1.put_ok("/v1/agent/service/register", r#"{"Name": "edge", "Port": 1}"#);
    until("the checks of its ports are gone", || {
        let checks = n1.try_get("/v1/agent/checks")?.json();
        let left = checks.as_object().is_some_and(|all| all.keys().any(|id| id.starts_with("gateway:")));
        if left { Err(checks.to_string()) } else { Ok(()) }
    });

    // Without its registration it has no ports, and nobody says that it has.
    n1.put_ok("/v1/agent/service/deregister/edge", "");
    for port in [8081, 9000] {
        cluster.wait_closed(port);
    }
    until("no gateway is known", || match n2.get("/v1/health/ingress/web") {
        none if none == json!([]) => Ok(()),
        some => Err(some.to_string()),
    });
}

//! UDP services on real agents: datagrams pass whole and apart, within the path's size, as far as intentions allow, past
//! instances that go; and an unmodified DNS client meets an unmodified DNS server through the mesh.

use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::agent::{Agent, Ca, Spec, path};
use crate::dns::has_clients;
use crate::lab::{Host, Lab};
use crate::netns_identity::weft_on_ok;
use crate::netns_policy::{DENY, metric, operator};
use crate::wait::until;

const CALLER: &str = r#"{"Name":"caller","Port":1,"Connect":{"SidecarService":{"Proxy":{"Upstreams":[
    {"DestinationName":"echo","LocalBindPort":9494}]}}}}"#;
const UPSTREAM: &str = "127.0.0.1:9494";
const APP: &str = "127.0.0.1:7100";
/// What passes on any path at once, and what no path with an MTU of 1,500 carries.
const ALWAYS_FITS: usize = 1_150;
const TOO_LARGE: usize = 1_500;

/// An app that answers `who` with its name and everything else with what it got; stops when dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    /// Datagrams that it got.
    got: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(host: &Host, name: &str) -> Self {
        let socket = host.run(|| UdpSocket::bind(APP).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let (stop, got) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopping, counting, name) = (Arc::clone(&stop), Arc::clone(&got), name.to_owned());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_507];
            while !stopping.load(Ordering::SeqCst) {
                let Ok((bytes, from)) = socket.recv_from(&mut buffer) else { continue };
                counting.fetch_add(1, Ordering::SeqCst);
                let answer = if &buffer[..bytes] == b"who" { name.as_bytes() } else { &buffer[..bytes] };
                let _caller_is_gone = socket.send_to(answer, from);
            }
        });
        Self { stop, got, thread: Some(thread) }
    }

    fn got(&self) -> usize {
        self.got.load(Ordering::SeqCst)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _panicked = self.thread.take().map(JoinHandle::join);
    }
}

/// An app on the caller's host.
struct Client(UdpSocket);

impl Client {
    fn on(host: &Host) -> Self {
        let socket = host.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        socket.connect(UPSTREAM).unwrap();
        Self(socket)
    }

    fn send(&self, payload: &[u8]) {
        // A port that is not there yet refuses.
        let _refused = self.0.send(payload);
    }

    fn receive(&self, within: Duration) -> Result<Vec<u8>, String> {
        self.0.set_read_timeout(Some(within)).unwrap();
        let mut buffer = vec![0; 65_507];
        let bytes = self.0.recv(&mut buffer).map_err(|error| error.to_string())?;
        buffer.truncate(bytes);
        Ok(buffer)
    }

    /// The instance that answers, asked until one does that is `wanted`.
    #[track_caller]
    fn wait_who(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let who = until(what, || {
            self.send(b"who");
            let name = String::from_utf8(self.receive(Duration::from_millis(300))?).unwrap();
            if wanted(&name) { Ok(name) } else { Err(name) }
        });
        // What was asked before is answered before what is asked last.
        let mut number = 0_u32;
        until("what was asked before is answered", || {
            number += 1;
            let mark = format!("mark {number}");
            self.send(mark.as_bytes());
            while self.receive(Duration::from_secs(1))? != mark.as_bytes() {}
            Ok::<(), String>(())
        });
        who
    }
}

/// `n1` issues and calls; the others serve.
struct Cluster {
    agents: Vec<Agent>,
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    fn start(hosts: u8, args: &[&str]) -> Option<Self> {
        let lab = Lab::new(hosts)?;
        let ca = Ca::init("lab.test");
        let issuer = ca.issuer();
        let mut agents =
            vec![Agent::start(&Spec::on(&lab.host(1), "n1", &[&["-issuer", path(&issuer)], args].concat()))];
        let token = ca.token("n*", "echo,caller", "1h");
        let join = [&["-join", "10.77.0.1", "-token", &token], args].concat();
        for number in 2..=hosts {
            let name = format!("n{number}");
            agents.push(Agent::start(&Spec::on(&lab.host(number.into()), &name, &join)));
        }
        let members: Vec<String> = (1..=hosts).map(|number| format!("n{number}=1")).collect();
        let members: Vec<&str> = members.iter().map(String::as_str).collect();
        agents.iter().for_each(|agent| agent.wait_members(&members));
        agents[0].put_ok("/v1/agent/service/register", CALLER);
        Some(Self { agents, ca, lab })
    }

    fn serve(&self, number: usize, more: &Value) {
        let mut body = json!({"Name": "echo", "ID": format!("echo-{number}"), "Port": 7100});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.agents[number - 1].put_ok("/v1/agent/service/register", &body.to_string());
    }
}

fn dropped(agent: &Agent, reason: &str) -> f64 {
    metric(
        agent,
        &format!(
            "weft_udp_dropped_datagrams_total{{connection_security=\"mutual_tls\",destination_service=\"echo\",reason=\"{reason}\""
        ),
    )
}

#[test]
fn datagrams_pass_whole_and_apart_and_flows_move_past_instances_that_go() {
    let Some(mut cluster) = Cluster::start(3, &[]) else { return };
    let host = cluster.lab.host(1);
    let _apps = [Echo::start(&cluster.lab.host(2), "echo-2"), Echo::start(&cluster.lab.host(3), "echo-3")];
    for number in [2, 3] {
        cluster.serve(number, &json!({"Protocol": "udp"}));
    }
    cluster.agents[0].wait_passing("echo", &["echo-2", "echo-3"]);
    let clients = [Client::on(&host), Client::on(&host)];
    let mut who = clients.each_ref().map(|client| client.wait_who("the mesh carries datagrams", |_| true));

    // Of random sizes, several under way, two callers at once.
    let mut seed = 0xda7a_u64;
    println!("seed {seed:#x}");
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap()
    };
    for round in 0..100_u8 {
        let mut sent = [Vec::new(), Vec::new()];
        for (mark, (client, sent)) in clients.iter().zip(&mut sent).enumerate() {
            for _ in 0..4 {
                let payload = vec![round.wrapping_mul(2) | u8::try_from(mark).unwrap(); next() % ALWAYS_FITS + 4];
                client.send(&payload);
                sent.push(payload);
            }
        }
        for (client, mut sent) in clients.iter().zip(sent) {
            let receive = |_: &Vec<u8>| client.receive(Duration::from_secs(10)).expect("nothing is lost here");
            let mut received: Vec<Vec<u8>> = sent.iter().map(receive).collect();
            sent.sort();
            received.sort();
            assert!(received == sent, "round {round}: {:?}", received.iter().map(Vec::len).collect::<Vec<_>>());
        }
    }
    for (client, who) in clients.iter().zip(&who) {
        assert_eq!(&client.wait_who("the flow is carried", |_| true), who, "a flow stays with its instance");
    }

    // Too large: dropped, counted, told once.
    for _ in 0..3 {
        clients[0].send(&[0; TOO_LARGE]);
    }
    clients[0].wait_who("what fits passes", |_| true);
    assert!((dropped(&cluster.agents[0], "oversize") - 3.0).abs() < 0.5);
    assert_eq!(cluster.agents[0].log().matches("too large for the path").count(), 1);

    // An instance in maintenance loses its flows to the other, and so does an agent that stops.
    let first = who[0].strip_prefix("echo-").unwrap().parse::<usize>().unwrap();
    let maintenance = |on: bool| {
        let path = format!("/v1/agent/service/maintenance/echo-{first}?enable={on}");
        cluster.agents[first - 1].put_ok(&path, "");
    };
    maintenance(true);
    who[0] = clients[0].wait_who("the flow leaves an instance in maintenance", |name| name != who[0]);
    maintenance(false);
    cluster.agents[0].wait_passing("echo", &["echo-2", "echo-3"]);
    assert_eq!(clients[0].wait_who("the flow is carried", |_| true), who[0], "it does not come back by itself");
    let second = 5 - first;
    cluster.agents[second - 1].signal(Signal::SIGTERM);
    clients[0].wait_who("the flow leaves an agent that stops", |name| name != who[0]);
    let (status, log) = cluster.agents[second - 1].wait_exit();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    // And one that is killed.
    let third = Agent::start(&Spec::on(
        &cluster.lab.host(second),
        "n9",
        &["-join", "10.77.0.1", "-token", &cluster.ca.token("n9", "echo", "1h")],
    ));
    third.put_ok("/v1/agent/service/register", r#"{"Name":"echo","ID":"echo-9","Port":7100,"Protocol":"udp"}"#);
    cluster.agents[0].wait_passing("echo", &[&format!("echo-{first}"), "echo-9"]);
    let survivor = format!("echo-{second}");
    drop(cluster.agents.remove(first - 1).kill());
    clients[0].wait_who("the flow leaves an agent that was killed", |name| name == survivor);
}

#[test]
fn intentions_decide_over_flows_before_they_begin_and_while_they_last() {
    let Some(cluster) = Cluster::start(2, &[DENY]) else { return };
    let alice = operator(&cluster.ca, "alice", "intentions");
    let sign = |args: &[&str]| {
        let words = [&["intention", "create"], args, &["caller", "echo", "-operator", path(&alice)]].concat();
        weft_on_ok(&cluster.lab.host(1), &words);
    };
    let app = Echo::start(&cluster.lab.host(2), "echo-2");
    cluster.serve(2, &json!({"Protocol": "udp"}));
    cluster.agents[0].wait_passing("echo", &["echo-2"]);
    let client = Client::on(&cluster.lab.host(1));
    let wait_denied = |more_than: f64| {
        until("datagrams are denied", || {
            client.send(b"who");
            match dropped(&cluster.agents[0], "denied") {
                count if count > more_than => Ok(()),
                count => Err(count.to_string()),
            }
        });
    };
    wait_denied(2.0);
    assert_eq!(app.got(), 0);
    sign(&[]);
    client.wait_who("an allowed flow is carried", |name| name == "echo-2");
    let before = dropped(&cluster.agents[0], "denied");
    sign(&["-deny", "-replace"]);
    until("the open flow is cut", || match metric(&cluster.agents[1], "weft_policy_cut_total{rule=\"caller:echo\"}") {
        count if count >= 1.0 => Ok(()),
        count => Err(count.to_string()),
    });
    let got = app.got();
    wait_denied(before + 2.0);
    assert_eq!(app.got(), got);
}

/// A program on a host that runs until it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _already_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn dig_asks_dnsmasq_through_the_mesh_once_an_entry_says_that_the_service_is_udp() {
    if !has_clients() {
        return;
    }
    let Some(cluster) = Cluster::start(2, &[]) else { return };
    let alice = operator(&cluster.ca, "alice", "config");
    let text = "x".repeat(200);
    let words = [
        "--keep-in-foreground".to_owned(),
        "--no-resolv".to_owned(),
        "--no-hosts".to_owned(),
        "--conf-file=/dev/null".to_owned(),
        "--pid-file=".to_owned(),
        "--user=root".to_owned(),
        "--port=7100".to_owned(),
        "--listen-address=127.0.0.1".to_owned(),
        "--bind-interfaces".to_owned(),
        "--address=/app.test/10.9.8.7".to_owned(),
        format!("--txt-record=long.test,{text},{text},{text},{text}"),
    ];
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command.args(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _dnsmasq = Running(cluster.lab.host(2).run(|| command.spawn().expect("dnsmasq starts")));
    cluster.serve(2, &json!({}));
    cluster.agents[0].wait_passing("echo", &["echo-2"]);
    let file = cluster.ca.dir().join("entry.json");
    std::fs::write(&file, json!({"Kind": "service-defaults", "Name": "echo", "Protocol": "udp"}).to_string()).unwrap();
    weft_on_ok(&cluster.lab.host(1), &["config", "write", path(&file), "-operator", path(&alice)]);
    let dig = |question: &str| {
        let ask = || {
            Command::new("dig")
                .args("@127.0.0.1 -p 9494 +short +tries=1 +time=2".split(' '))
                .args(question.split(' '))
                .output()
        };
        let out = cluster.lab.host(1).run(|| ask().expect("dig starts"));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    until("dig is answered", || match dig("app.test").as_str() {
        "10.9.8.7" => Ok(()),
        other => Err(other.to_owned()),
    });
    // Each from a port of its own, so each a flow.
    let opened = || {
        metric(
            &cluster.agents[0],
            "weft_udp_flows_opened_total{connection_security=\"mutual_tls\",destination_service=\"echo\"",
        )
    };
    let before = opened();
    for port in 20_000..20_020 {
        assert_eq!(dig(&format!("app.test -b 127.0.0.1#{port}")), "10.9.8.7");
    }
    assert!((opened() - before - 20.0).abs() < 0.5, "{} flows for 20 questions", opened() - before);
    let long = dig("long.test TXT +bufsize=1232");
    assert_eq!(long.matches('x').count(), 800, "{long}");
    let info = cluster.agents[0].get("/v1/mesh/info");
    assert!(info.to_string().contains("listening (udp)"), "{info}");
    let chain = cluster.agents[0].get("/v1/discovery-chain/echo");
    assert_eq!(chain.pointer("/Chain/Protocol"), Some(&json!("udp")), "{chain}");
}

//! Identity on real agents: what is taken back is cut everywhere, what ended is renewed, roots follow one another.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::agent::{Agent, Ca, Spec, WEFT, at_offset, path, weft_ok};
use crate::app::App;
use crate::lab::{Host, Lab};
use crate::wait::until;

const RAW_UPSTREAM: &str = "127.0.0.1:9292";
const RAW: &str = r#"{"Name":"raw","Port":7000}"#;
const CALLER: &str = r#"{"Name":"caller","Port":1,"Connect":{"SidecarService":{"Proxy":{"Upstreams":[
    {"DestinationName":"raw","LocalBindPort":9292}]}}}}"#;

/// Runs `weft` on `host` to its end.
pub(crate) fn weft_on(host: &Host, args: &[&str]) -> Output {
    host.run(|| Command::new(WEFT).args(args).env_remove("WEFT_HTTP_ADDR").output().expect("the binary starts"))
}

/// Runs `weft` on `host`, which must succeed; returns what it printed.
#[track_caller]
pub(crate) fn weft_on_ok(host: &Host, args: &[&str]) -> String {
    let out = weft_on(host, args);
    assert!(out.status.success(), "weft {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A stream through the mesh that carries a byte back and forth until it breaks.
pub(crate) struct Stream {
    thread: std::thread::JoinHandle<Instant>,
    echoed: Arc<AtomicU64>,
}

impl Stream {
    /// Opens it from `agent`'s host and waits for the app's greeting.
    #[track_caller]
    pub(crate) fn open(agent: &Agent) -> Self {
        let addr: SocketAddr = RAW_UPSTREAM.parse().unwrap();
        let mut stream = until("a stream to raw greets", || {
            let stream = agent.inside(|| TcpStream::connect(addr)).map_err(|e| e.to_string())?;
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut first = [0; 1];
            (&stream).read_exact(&mut first).map_err(|e| e.to_string())?;
            Ok(stream)
        });
        let echoed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&echoed);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 256];
            // A reset or an end, whichever comes, is the last byte.
            while stream.write_all(b"x").is_ok() && stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                count.fetch_add(1, Ordering::Relaxed);
            }
            Instant::now()
        });
        let stream = Self { thread, echoed };
        until("the stream echoes", || match stream.echoed.load(Ordering::Relaxed) {
            0..100 => Err("not yet".to_owned()),
            _ => Ok(()),
        });
        stream
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits for its end and returns when that was.
    #[track_caller]
    pub(crate) fn cut(self) -> Instant {
        until("the stream is cut", || if self.is_open() { Err("it lives".to_owned()) } else { Ok(()) });
        self.thread.join().unwrap()
    }
}

/// Three agents: `n1` issues, `n2` serves raw, `n3` calls it.
struct Cluster {
    n1: Agent,
    n2: Agent,
    n3: Agent,
    ca: Ca,
    lab: Lab,
    app: App,
}

fn cluster() -> Option<Cluster> {
    let lab = Lab::new(4)?;
    let ca = Ca::init("lab.test");
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]));
    let token = ca.token("n*", "raw,caller", "1h");
    let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token]));
    let n3 = Agent::start(&Spec::on(&lab.host(3), "n3", &["-join", "10.77.0.1", "-token", &token]));
    for agent in [&n1, &n2, &n3] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    let app = App::tcp(Some(&lab.host(2)), loopback(7000), "raw");
    n2.put_ok("/v1/agent/service/register", RAW);
    for caller in [&n1, &n3] {
        caller.put_ok("/v1/agent/service/register", CALLER);
        caller.wait_passing("raw", &["raw"]);
    }
    Some(Cluster { n1, n2, n3, ca, lab, app })
}

#[test]
fn scenario_19_a_revoked_node_is_cut_everywhere_within_a_second_and_stays_out() {
    let Some(Cluster { n1, n2, n3, ca, lab, app: _app }) = cluster() else { return };
    let streams = [Stream::open(&n1), Stream::open(&n3)];
    let dir = ca.dir();
    // Signed before the clock runs: how fast a program starts is not what is measured.
    let file = dir.join("revocation");
    weft_on_ok(&lab.host(1), &["revoke", "n2", "-ca", path(&dir), "-reason", "disk stolen", "-out", path(&file)]);
    let order = STANDARD.decode(std::fs::read_to_string(&file).unwrap().trim()).unwrap();
    let begun = Instant::now();
    let answer = crate::netns_policy::offer(&n1, &order).json();
    let returned = begun.elapsed();
    let cuts = streams.map(|stream| stream.cut().saturating_duration_since(begun));
    println!("revoke: streams cut after {cuts:.2?}, the order was answered after {returned:.2?}: {answer}");
    for cut in cuts {
        assert!(cut < Duration::from_secs(1), "a stream lived for {cut:?}");
    }
    assert_eq!(answer["Confirmed"], 1, "{answer}");

    // Marked down at once, its records dropped, on the node that was told and on the one that was not.
    for agent in [&n1, &n3] {
        agent.wait_members(&["n1=1", "n2=4", "n3=1"]);
        agent.wait_passing("raw", &[]);
        let metrics = agent.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
        assert!(metrics.contains("weft_identity_connections_closed_total{reason=\"revoked\"}"), "{metrics}");
    }
    let list = weft_on_ok(&lab.host(3), &["revoke", "-list"]);
    assert!(list.contains("node n2") && list.contains("disk stolen") && list.contains("operator"), "{list}");
    let again = weft_on_ok(&lab.host(3), &["revoke", "n2", "-ca", path(&dir)]);
    assert!(again.contains("version 2"), "{again}");

    // A restart with its certificate, and a renewal with its key, both get nowhere; nor does its name from elsewhere.
    let data = n2.kill();
    let n2 = Agent::spawn(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1"]), data);
    n2.wait_ready();
    let refused = n2.put("/v1/agent/join/10.77.0.1", "");
    assert!(refused.status >= 400 && refused.body.contains("revoked"), "{}", refused.body);
    n1.wait_members(&["n1=1", "n2=4", "n3=1"]);
    n3.wait_passing("raw", &[]);

    // A restarted member still refuses it: the document is on disk.
    let data = n3.kill();
    let n3 = Agent::spawn(&Spec::on(&lab.host(3), "n3", &[]), data);
    n3.wait_ready();
    let list = weft_on_ok(&lab.host(3), &["revoke", "-list"]);
    assert!(list.contains("node n2"), "{list}");

    // The host is sound again: a new token and another name let it in, and the newcomer learns what is revoked.
    drop(n2);
    let token = ca.token("n4", "raw", "1h");
    let n4 = Agent::start(&Spec::on(&lab.host(2), "n4", &["-join", "10.77.0.1", "-token", &token]));
    n4.put_ok("/v1/agent/service/register", RAW);
    n3.wait_passing("raw", &["raw"]);
    until("the newcomer holds the revocation", || {
        let list = weft_on_ok(&lab.host(2), &["revoke", "-list"]);
        if list.contains("node n2") { Ok(()) } else { Err(list) }
    });
}

#[test]
fn scenario_19_a_node_that_was_off_when_it_was_revoked_joins_as_a_new_identity_with_a_new_token() {
    let Some(lab) = Lab::new(2) else { return };
    let ca = Ca::init("lab.test");
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]));
    let start =
        |token: &str, data| Agent::spawn(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", token]), data);
    let old = ca.token("n2", "raw", "1h");
    let n2 = start(&old, tempfile::TempDir::new().unwrap());
    n1.wait_members(&["n1=1", "n2=1"]);
    let key_of_n2 = || {
        until("n1 holds the records of n2", || {
            let shown = n1.try_get("/v1/mesh/certificates")?.json();
            let of = shown.as_array().unwrap().iter().find(|shown| shown["Node"] == "n2");
            of.map(|of| of["Intermediate"]["Key"].as_str().unwrap().to_owned()).ok_or_else(|| shown.to_string())
        })
    };
    let revoked = key_of_n2();
    let data = n2.kill();
    n1.wait_members(&["n1=1", "n2=4"]);
    // By its key: a name that is revoked takes a minute until it can be certified again.
    weft_on_ok(&lab.host(1), &["revoke", &revoked, "-ca", path(&ca.dir())]);

    // The token in its unit file is the one that it has used: it starts as it did before, and is refused.
    let n2 = start(&old, data);
    n2.wait_ready();
    until("n2 is told why nobody answers", || {
        let log = n2.log();
        if log.contains("certificate is revoked: the mesh refuses it") { Ok(()) } else { Err(log) }
    });
    n1.wait_members(&["n1=1", "n2=4"]);

    let data = n2.kill();
    let n2 = start(&ca.token("n2", "raw", "1h"), data);
    n2.wait_ready();
    assert!(n2.log().contains("discarding it and joining as a new identity"), "{}", n2.log());
    n1.wait_members(&["n1=1", "n2=1"]);
    assert_ne!(key_of_n2(), revoked);
}

#[test]
fn scenario_19_a_revoked_issuer_takes_its_nodes_along_and_a_retired_one_does_not() {
    let Some(lab) = Lab::new(4) else { return };
    let ca = Ca::init("lab.test");
    let dir = ca.dir();
    crate::agent::weft_ok(&["ca", "issuer", "create", "-ca", path(&dir)]);
    crate::agent::weft_ok(&["ca", "issuer", "create", "-ca", path(&dir)]);
    let issuer = |number: u32| dir.join(format!("issuer-{number}"));
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer(1))]));
    let start = |number: usize, name: &'static str| {
        let issuer = issuer(u32::try_from(number).unwrap());
        let agent = Agent::start(&Spec::on(&lab.host(number), name, &["-issuer", path(&issuer), "-join", "10.77.0.1"]));
        n1.wait_members(if number == 2 { &["n1=1", "n2=1"] } else { &["n1=1", "n2=1", "n3=1"] });
        agent
    };
    let n2 = start(2, "n2");
    let n3 = start(3, "n3");

    // Retired: its own node stays a member, and newcomers that ask it are led to another issuer.
    weft_on_ok(&lab.host(1), &["ca", "issuer", "retire", "issuer-3", "-ca", path(&dir)]);
    let list = weft_on_ok(&lab.host(1), &["ca", "issuer", "list", "-ca", path(&dir)]);
    assert!(list.lines().any(|line| line.starts_with("issuer-3") && line.contains("retired")), "{list}");
    let token = ca.token("n4", "raw", "1h");
    let n4 = Agent::start(&Spec::on(&lab.host(4), "n4", &["-join", "10.77.0.3", "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    let issuer_of = |name: &str| {
        until(&format!("n1 holds the records of {name}"), || {
            let shown = n1.try_get("/v1/mesh/certificates")?.json();
            let of = shown.as_array().unwrap().iter().find(|shown| shown["Node"] == name);
            of.map(|of| of["Issuer"]["Key"].as_str().unwrap().to_owned()).ok_or_else(|| shown.to_string())
        })
    };
    assert_ne!(issuer_of("n4"), issuer_of("n3"), "a retired issuer certified a newcomer");

    // Revoked: the node that it certified is gone from every other, at once.
    weft_on_ok(&lab.host(1), &["revoke", "issuer-2", "-ca", path(&dir)]);
    for agent in [&n1, &n3, &n4] {
        until(&format!("{} drops n2", agent.name), || {
            let members = agent.members()?;
            let is_out = members.contains(&"n2=4".to_owned()) && members.contains(&"n3=1".to_owned());
            if is_out { Ok(()) } else { Err(format!("{members:?}")) }
        });
    }
    let list = weft_on_ok(&lab.host(1), &["ca", "issuer", "list", "-ca", path(&dir)]);
    assert!(list.lines().any(|line| line.starts_with("issuer-2") && line.contains("revoked")), "{list}");
    drop(n2);
}

#[test]
fn scenario_20_a_root_is_replaced_under_load_and_a_node_that_was_off_comes_back() {
    let Some(Cluster { n1, n2, n3, ca, lab, app: _app }) = cluster() else { return };
    let token = ca.token("n4", "raw", "1h");
    let n4 = Agent::start(&Spec::on(&lab.host(4), "n4", &["-join", "10.77.0.1", "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    let off = n4.kill();
    n1.wait_members(&["n1=1", "n2=1", "n3=1", "n4=4"]);
    let (alice, ca_dir) = (ca.dir().join("alice.operator"), ca.dir());
    let create = ["ca", "operator", "create", "-name", "alice", "-may", "intentions", "-ca", path(&ca_dir)];
    weft_ok(&[&create[..], &["-out", path(&alice)]].concat());
    weft_on_ok(&lab.host(1), &["intention", "create", "web", "raw", "-operator", path(&alice)]);

    // Load: one long stream, and a new connection after the other.
    let long = Stream::open(&n3);
    let (stop, done, failed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let dir = ca.dir();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.host(3).enter();
            while !stop.load(Ordering::Relaxed) {
                let mut greeting = [0; 5];
                let called = TcpStream::connect(RAW_UPSTREAM).and_then(|mut stream| {
                    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                    stream.read_exact(&mut greeting)
                });
                if called.is_err() { &failed } else { &done }.fetch_add(1, Ordering::Relaxed);
            }
        });
        let root = |agent: &Agent, node: &str| {
            let shown = agent.try_get("/v1/mesh/certificates").ok()?.json();
            let of = shown.as_array()?.iter().find(|shown| shown["Node"] == node)?.clone();
            of["Root"].as_str().map(str::to_owned)
        };
        let before = root(&n1, "n1");
        assert!(before.is_some());
        let begun = Instant::now();
        let printed = weft_on_ok(&lab.host(1), &["ca", "rotate", "-ca", path(&dir)]);
        let early = weft_on(&lab.host(1), &["ca", "rotate", "-ca", path(&dir), "-finish"]);
        let early = String::from_utf8_lossy(&early.stderr).into_owned();
        until("all three stand under the new root", || {
            let roots = ["n1", "n2", "n3"].map(|node| root(&n2, node));
            let is_new = roots.iter().all(|root| root.is_some() && *root == roots[0] && *root != before);
            if is_new { Ok(()) } else { Err(format!("{roots:?}")) }
        });
        println!("rotation: every node under the new root after {:.1?}: {printed}", begun.elapsed());
        assert!(early.contains("publish under the old root"), "-finish must wait for all: {early}");
        stop.store(true, Ordering::Relaxed);
    });
    println!("rotation: {} connections, {} failed", done.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
    assert_eq!(failed.load(Ordering::Relaxed), 0, "of {} connections", done.load(Ordering::Relaxed));
    assert!(long.is_open(), "the long stream was cut after {} echoes", long.echoed.load(Ordering::Relaxed));

    // Off throughout: it knows the old root alone, and walks.
    let n4 = Agent::spawn(&Spec::on(&lab.host(4), "n4", &["-join", "10.77.0.1"]), off);
    n4.wait_ready();
    for agent in [&n1, &n4] {
        until(&format!("{} sees n4 back", agent.name), || {
            let members = agent.members()?;
            if members == ["n1=1", "n2=1", "n3=1", "n4=1"] { Ok(()) } else { Err(format!("{members:?}; {}", n4.log())) }
        });
    }
    until("n4 stands under the new root", || {
        let shown = n1.try_get("/v1/mesh/certificates")?.json();
        let roots: Vec<_> = shown.as_array().unwrap().iter().map(|shown| shown["Root"].clone()).collect();
        if roots.len() == 4 && roots.iter().all(|root| *root == roots[0]) { Ok(()) } else { Err(format!("{shown}")) }
    });
    let finished = weft_on_ok(&lab.host(1), &["ca", "rotate", "-ca", path(&dir), "-finish"]);
    assert!(finished.contains("Signed again what alice had signed"), "{finished}");
    n3.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    n3.wait_passing("raw", &["raw"]);
    // What was in force is in force everywhere, under the new root alone; the operator goes on once it has adopted.
    for number in 1..=4 {
        until("the intention stands, signed by the root", || {
            let shown = weft_on(&lab.host(number), &["config", "list"]);
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            if shown.contains("web:raw  2        root") { Ok(()) } else { Err(shown) }
        });
    }
    let change = ["intention", "create", "-replace", "-deny", "web", "raw", "-operator", path(&alice)];
    let refused = weft_on(&lab.host(4), &change);
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("revoked"), "the certificate under the old root: {refused}");
    let renewed = dir.join("operators/alice.crt");
    weft_ok(&["ca", "operator", "adopt", path(&renewed), "-operator", path(&alice)]);
    weft_on_ok(&lab.host(4), &change);
    drop((long, n2));
}

/// Puts `spec` at another wall time; monotonic clocks go on as they are.
fn at(offset: &str, mut spec: Spec<'static>) -> Spec<'static> {
    spec.wrap = at_offset(offset);
    spec
}

#[test]
fn scenario_18_services_authenticate_for_days_with_every_issuer_gone() {
    let Some(Cluster { n1, n2, n3, ca: _ca, lab, app: _app }) = cluster() else { return };
    drop(n1);
    let (data2, data3) = (n2.kill(), n3.kill());
    // Six days later no leaf of theirs is good, nobody renews their own certificates, and those have a day left.
    // The cluster lived for a second, too short to keep its peers: they are named.
    let n2 = Agent::spawn(&at("+6d", Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.3"])), data2);
    let n3 = Agent::spawn(&at("+6d", Spec::on(&lab.host(3), "n3", &["-join", "10.77.0.2"])), data3);
    for agent in [&n2, &n3] {
        agent.wait_ready();
        until(&format!("{} sees the other", agent.name), || {
            let members = agent.members()?;
            let is_seen = members.contains(&"n2=1".to_owned()) && members.contains(&"n3=1".to_owned());
            if is_seen { Ok(()) } else { Err(format!("{members:?}")) }
        });
    }
    n3.wait_passing("raw", &["raw"]);
    let stream = Stream::open(&n3);
    assert!(stream.is_open());
    until("n2 says that nobody renews its certificate", || {
        let log = n2.log();
        if log.contains("could not renew the node's certificate") { Ok(()) } else { Err(log) }
    });
    assert!(stream.is_open(), "a renewal that fails cuts nothing");
}

#[test]
fn scenario_18_an_issuer_renews_over_the_mesh_past_half_life_and_no_stream_is_cut() {
    let Some(Cluster { n1, n2, n3, ca, lab, app: _app }) = cluster() else { return };
    let (data1, data2, data3) = (n1.kill(), n2.kill(), n3.kill());
    // Past 60 % of the seven days of n2 and n3: due for renewal, and good.
    let issuer: &'static str = Box::leak(path(&ca.issuer()).to_owned().into_boxed_str());
    let n1 = Agent::spawn(&at("+106h", Spec::on(&lab.host(1), "n1", &["-issuer", issuer])), data1);
    let n2 = Agent::spawn(&at("+106h", Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1"])), data2);
    let n3 = Agent::spawn(&at("+106h", Spec::on(&lab.host(3), "n3", &["-join", "10.77.0.1"])), data3);
    for agent in [&n1, &n2, &n3] {
        agent.wait_ready();
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    n3.wait_passing("raw", &["raw"]);
    let stream = Stream::open(&n3);
    for agent in [&n2, &n3] {
        until(&format!("{} is renewed", agent.name), || {
            let log = agent.log();
            if log.contains("renewed the node's certificate") { Ok(()) } else { Err(log) }
        });
    }
    let echoed = stream.echoed.load(Ordering::Relaxed);
    until("the stream goes on", || match stream.echoed.load(Ordering::Relaxed) {
        more if more > echoed + 100 => Ok(()),
        same => Err(format!("{same} echoes")),
    });
    assert!(stream.is_open() && n1.log().contains("renewed a node's certificate"), "{}", n1.log());
    Stream::open(&n3);
}

#[test]
fn scenario_21_everything_expired_recovers_by_itself_with_the_certificates_on_disk() {
    let Some(lab) = Lab::new(3) else { return };
    let ca = Ca::init("lab.test");
    let issuer = ca.issuer();
    let first = Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)]);
    let token = ca.token("n2", "raw", "1h");
    let n1 = Agent::start(&first);
    let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    let (data1, data2) = (n1.kill(), n2.kill());

    // A month later: every certificate on disk has ended, the token too. A plain restart is the one command.
    let n1 = Agent::spawn(&at("+31d", Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)])), data1);
    let n2 = Agent::spawn(&at("+31d", Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1"])), data2);
    n1.wait_ready();
    n2.wait_ready();
    n1.wait_members(&["n1=1", "n2=1"]);
    assert!(n2.log().contains("asking an issuer to renew it"), "{}", n2.log());

    // A host whose clock is weeks behind is told so, and by how much.
    let token = ca.token_at("+31d", "n3", "raw", "1h");
    let spec = Spec::on(&lab.host(3), "n3", &["-join", "10.77.0.1", "-token", &token]);
    let mut n3 = Agent::spawn(&spec, tempfile::TempDir::new().unwrap());
    let (status, log) = n3.wait_exit();
    assert!(!status.success() && log.contains("clocks differ by"), "{log}");

    // Another seven weeks off: past the 30 days in which a key renews itself. The restart says why it is refused and
    // what to do; a start with a new token is again one command, and the node keeps its name and its data.
    let (data1, data2) = (n1.kill(), n2.kill());
    let n1 = Agent::spawn(&at("+80d", Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)])), data1);
    n1.wait_ready();
    let mut n2 = Agent::spawn(&at("+80d", Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1"])), data2);
    let (status, log) = n2.wait_exit();
    assert!(!status.success() && log.contains("join again"), "{log}");
    let token = ca.token_at("+80d", "n2", "raw", "1h");
    let again = Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token]);
    let n2 = Agent::spawn(&at("+80d", again), n2.kill());
    n2.wait_ready();
    n1.wait_members(&["n1=1", "n2=1"]);
}

#[test]
fn a_single_use_token_is_refused_to_a_second_host_and_a_revoked_one_to_all() {
    let Some(lab) = Lab::new(3) else { return };
    let ca = Ca::init("lab.test");
    let dir = ca.dir();
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]));
    let make = |uses: &str| {
        let made = crate::agent::weft_ok(&[
            "token",
            "create",
            "-ca",
            path(&dir),
            "-node",
            "n*",
            "-serve",
            "raw",
            "-uses",
            uses,
        ]);
        made.trim().to_owned()
    };
    let once = make("1");
    let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &once]));
    n1.wait_members(&["n1=1", "n2=1"]);
    let refused = |name: &'static str, token: &str| {
        let spec = Spec::on(&lab.host(3), name, &["-join", "10.77.0.1", "-token", token]);
        let mut agent = Agent::spawn(&spec, tempfile::TempDir::new().unwrap());
        let (status, log) = agent.wait_exit();
        assert!(!status.success(), "{log}");
        log
    };
    let log = refused("n3", &once);
    assert!(log.contains("good for 1 uses"), "{log}");
    assert!(n1.log().contains("join refused"), "the issuer reports it: {}", n1.log());
    let list = weft_on_ok(&lab.host(1), &["token", "list", "-ca", path(&dir)]);
    assert!(list.contains("2 of 1") || list.contains("1 of 1"), "{list}");

    let many = make("0");
    let list = weft_on_ok(&lab.host(1), &["token", "list", "-ca", path(&dir)]);
    let line = list.lines().find(|line| line.contains("of any")).unwrap_or_else(|| panic!("{list}"));
    let id = line.split_whitespace().next().unwrap().to_owned();
    weft_on_ok(&lab.host(2), &["token", "revoke", &id, "-ca", path(&dir)]);
    let log = refused("n3", &many);
    assert!(log.contains("token is revoked"), "{log}");
    let list = weft_on_ok(&lab.host(1), &["token", "list", "-ca", path(&dir)]);
    assert!(list.lines().any(|line| line.starts_with(&id) && line.contains("revoked")), "{list}");
    drop(n2);
}

/// Figures for people: `cargo test --test it figures_of_revocation -- --ignored --nocapture`.
#[test]
#[ignore = "prints figures; starts a hundred agents"]
fn figures_of_revocation_at_3_20_and_100_agents() {
    for count in [3_u8, 20, 100] {
        let Some(lab) = Lab::new(1) else { return };
        let ca = Ca::init("lab.test");
        let (dir, issuer) = (ca.dir(), ca.issuer());
        let token = ca.token("n*", "", "1h");
        let names: Vec<String> = (1..=count).map(|number| format!("n{number:03}")).collect();
        let begun = Instant::now();
        let mut agents: Vec<Agent> = Vec::new();
        for (name, number) in names.iter().zip(1..=count) {
            let ip = std::net::IpAddr::from([127, 0, 1, number]);
            let first = ["-issuer", path(&issuer), "-workers", "1"];
            let further = ["-join", "127.0.1.1", "-token", &token, "-workers", "1"];
            let args: &[&str] = if number == 1 { &first } else { &further };
            let spec = Spec { bind: ip, client: ip, ..Spec::on(&lab.host(1), name, args) };
            agents.push(Agent::start(&spec));
        }
        let want: Vec<String> = names.iter().map(|name| format!("{name}=1")).collect();
        let want: Vec<&str> = want.iter().map(String::as_str).collect();
        agents[0].wait_members(&want);
        println!("{count} agents are members after {:.1?}", begun.elapsed());
        // The last one: its document is held, enforced and confirmed by all others.
        let printed = weft_on_ok(
            &lab.host(1),
            &["revoke", names.last().unwrap(), "-ca", path(&dir), "-http-addr", "127.0.1.1:8500"],
        );
        println!("{count} agents: {}", printed.trim());
    }
}

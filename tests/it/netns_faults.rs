//! What breaks meshes, on real agents (the numbers are those of the scenarios): name conflicts, restarts, pauses,
//! splits, power loss, isolation, leaving and dying under load, joining late, a clock that jumped.
//!
//! The times are printed (`cargo test --test it faults -- --nocapture`). The bounds are wide: this machine may be busy.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, WEFT, at_offset, path};
use crate::app::App;
use crate::http::request;
use crate::lab::{Host, Lab};
use crate::wait::until;

const WEB_UPSTREAM: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9191);

/// Agents `n1` (the issuer) to `nN` on hosts of the same numbers; `spare` more hosts stand empty.
struct Fleet {
    agents: Vec<Agent>,
    token: String,
    _ca: Ca,
    lab: Lab,
}

impl Fleet {
    fn start(count: u8, spare: u8) -> Option<Self> {
        let lab = Lab::new(count + spare)?;
        let ca = Ca::init("lab.test");
        let mut agents = vec![Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]))];
        let token = ca.token("n*", "*", "1h");
        for number in 2..=count {
            let name = format!("n{number}");
            agents.push(Agent::start(&Spec::on(&lab.host(number.into()), &name, &joining(&token))));
        }
        let fleet = Self { agents, token, _ca: ca, lab };
        fleet.all_see(&(1..=count).map(|number| format!("n{number}=1")).collect::<Vec<_>>());
        Some(fleet)
    }

    fn agent(&self, number: usize) -> &Agent {
        let name = format!("n{number}");
        self.agents.iter().find(|agent| agent.name == name).expect("it runs")
    }

    /// Takes an agent out; the others are what `agents` holds.
    fn take(&mut self, number: usize) -> Agent {
        let name = format!("n{number}");
        let at = self.agents.iter().position(|agent| agent.name == name).expect("it runs");
        self.agents.remove(at)
    }

    #[track_caller]
    fn all_see<S: AsRef<str>>(&self, want: &[S]) {
        let want: Vec<&str> = want.iter().map(AsRef::as_ref).collect();
        self.agents.iter().for_each(|agent| agent.wait_members(&want));
    }

    /// Waits until every agent shows these passing instances of `service`.
    #[track_caller]
    fn all_pass(&self, service: &str, want: &[&str]) {
        self.agents.iter().for_each(|agent| agent.wait_passing(service, want));
    }
}

fn joining(token: &str) -> [&str; 4] {
    ["-join", "10.77.0.1", "-token", token]
}

fn service(id: &str) -> String {
    format!(r#"{{"ID":"{id}","Name":"{id}","Port":8080}}"#)
}

/// Starts an agent again on what is in `dir`.
fn restart(host: &Host, name: &str, dir: TempDir) -> Agent {
    Agent::spawn(&Spec::on(host, name, &[]), dir)
}

/// Prints a figure for people.
fn figure(what: &str, time: Duration) {
    println!("figure: {what}: {:.2} s", time.as_secs_f64());
}

/// Fails if `time` is over `bound`.
#[track_caller]
fn within(what: &str, time: Duration, bound: Duration) {
    figure(what, time);
    assert!(time <= bound, "{what} took {time:?}, over {bound:?}");
}

/// The address that `agent` shows for the member `name`.
fn address_of(agent: &Agent, name: &str) -> Vec<String> {
    let members = agent.get("/v1/agent/members");
    let of = |member: &Value| {
        (member["Name"] == name).then(|| format!("{}={}", member["Addr"].as_str().unwrap_or("?"), member["Status"]))
    };
    members.as_array().into_iter().flatten().filter_map(of).collect()
}

/// Members that `agent` logged as failed.
fn failures_logged(agent: &Agent) -> Vec<String> {
    let log = agent.log();
    let named = log.lines().filter(|line| line.contains("member failed"));
    named.filter_map(|line| Some(line.split("member=").nth(1)?.split(' ').next()?.to_owned())).collect()
}

/// What `weft members` prints, both streams.
fn members_printed(agent: &Agent) -> String {
    let out = agent.inside(|| Command::new(WEFT).args(["members"]).output().unwrap());
    String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
}

/// The hash of all records that `agent` holds.
fn records_hash(agent: &Agent) -> Result<String, String> {
    let info = agent.try_get("/v1/mesh/info")?.json();
    info["RecordsHash"].as_str().map(str::to_owned).ok_or_else(|| info.to_string())
}

fn is_isolated(agent: &Agent) -> Result<bool, String> {
    Ok(agent.try_get("/v1/mesh/members")?.json()["Isolated"] == true)
}

/// Requests one after the other, until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    running: Option<JoinHandle<()>>,
}

#[derive(Debug, Default, Clone)]
struct Seen {
    answered: usize,
    failed: Vec<String>,
    slowest: Duration,
}

impl Load {
    /// Calls the upstream from `host` with GET, which may be tried again elsewhere.
    fn start(host: &Host) -> Self {
        Self::at_pace(host, Duration::ZERO)
    }

    /// Calls it after each answer and a `pause`.
    fn at_pace(host: &Host, pause: Duration) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let (stopping, counted, host) = (Arc::clone(&stop), Arc::clone(&seen), host.clone());
        let running = std::thread::spawn(move || {
            host.run(move || {
                while !stopping.load(Ordering::SeqCst) {
                    let begun = Instant::now();
                    let answer = request(WEB_UPSTREAM, "GET", "/x", &[], "");
                    let mut seen = counted.lock().unwrap();
                    seen.slowest = seen.slowest.max(begun.elapsed());
                    match answer {
                        Ok(answer) if answer.status == 200 => seen.answered += 1,
                        Ok(answer) => seen.failed.push(format!("{} {}", answer.status, answer.body)),
                        Err(why) => seen.failed.push(why),
                    }
                    drop(seen);
                    std::thread::sleep(pause);
                }
            });
        });
        Self { stop, seen, running: Some(running) }
    }

    fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until so many more requests were answered.
    #[track_caller]
    fn wait_for_more(&self, more: usize) {
        let before = self.seen().answered;
        until(&format!("{more} more requests are answered"), || match self.seen() {
            seen if seen.answered >= before + more => Ok(()),
            seen => Err(format!("{seen:?}")),
        });
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(running) = self.running.take() {
            let _panicked = running.join();
        }
    }
}

/// Puts web on the agents `numbers` and its caller on `caller`; waits until it can be called.
fn with_web(fleet: &Fleet, numbers: &[usize], caller: usize) -> Vec<App> {
    with_service(fleet, "web", numbers, caller)
}

/// Puts `service` on the agents `numbers` and its caller on `caller`; waits until it can be called.
fn with_service(fleet: &Fleet, service: &str, numbers: &[usize], caller: usize) -> Vec<App> {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 8080));
    let mut apps = Vec::new();
    for number in numbers {
        apps.push(App::http(Some(&fleet.lab.host(*number)), loopback, &format!("app{number}")));
        let own = format!(r#"{{"ID":"{service}-{number}","Name":"{service}","Port":8080,"Protocol":"http"}}"#);
        fleet.agent(*number).put_ok("/v1/agent/service/register", &own);
    }
    let (port, caller) = (WEB_UPSTREAM.port(), fleet.agent(caller));
    let upstream = format!(r#"{{"DestinationName":"{service}","LocalBindPort":{port}}}"#);
    let sidecar = format!(r#"{{"SidecarService":{{"Proxy":{{"Upstreams":[{upstream}]}}}}}}"#);
    caller.put_ok("/v1/agent/service/register", &format!(r#"{{"Name":"caller","Port":1,"Connect":{sidecar}}}"#));
    let ids: Vec<String> = numbers.iter().map(|number| format!("{service}-{number}")).collect();
    caller.wait_passing(service, &ids.iter().map(String::as_str).collect::<Vec<_>>());
    until(&format!("{service} can be called"), || match caller.call(WEB_UPSTREAM, "GET", "/x", &[], "")? {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.body),
    });
    apps
}

#[test]
fn scenario_04_a_name_that_lives_is_refused_with_both_addresses_and_a_dead_one_is_free() {
    let Some(mut fleet) = Fleet::start(3, 1) else { return };
    // A copy of a disk: the same name, key and certificate, and a greater generation.
    let copy = TempDir::new().unwrap();
    let from = fleet.agent(2).dir().join("data");
    assert!(Command::new("cp").args(["-a", path(&from), path(copy.path())]).status().unwrap().success());
    let twin = restart(&fleet.lab.host(4), "n2", copy);
    until("the newcomer names both addresses", || {
        let log = twin.log();
        let is_named = log.lines().any(|line| line.contains("10.77.0.2:8301") && line.contains("10.77.0.4:8301"));
        if is_named { Ok(()) } else { Err(log) }
    });
    for number in [1, 3] {
        assert_eq!(address_of(fleet.agent(number), "n2"), ["10.77.0.2=1"]);
    }
    fleet.agent(2).put_ok("/v1/agent/service/register", &service("mine"));
    fleet.all_pass("mine", &["mine"]);

    drop(fleet.take(2));
    let killed = Instant::now();
    for agent in &fleet.agents {
        until("the name has gone to the newcomer", || match address_of(agent, "n2") {
            seen if seen == ["10.77.0.4=1"] => Ok(()),
            seen => Err(format!("{seen:?}")),
        });
    }
    figure("4: a dead name is taken over by the one that was refused, after", killed.elapsed());
}

#[test]
fn scenario_05_a_restart_within_a_second_leaves_one_live_identity_at_the_old_or_a_new_address() {
    let Some(mut fleet) = Fleet::start(3, 1) else { return };
    fleet.agent(2).put_ok("/v1/agent/service/register", &service("kept"));
    fleet.all_pass("kept", &["kept"]);
    for (number, addr) in [(2, "10.77.0.2=1"), (4, "10.77.0.4=1")] {
        let dir = fleet.take(2).kill();
        let begun = Instant::now();
        let again = restart(&fleet.lab.host(number), "n2", dir);
        for agent in &fleet.agents {
            let generation = |agent: &Agent| -> Result<u64, String> {
                let members = agent.try_get("/v1/mesh/members")?.json();
                let n2 = members["Members"].as_array().into_iter().flatten().find(|member| member["Name"] == "n2");
                n2.and_then(|n2| n2["Generation"].as_u64()).ok_or_else(|| "no n2".to_owned())
            };
            let wanted = if number == 2 { 2 } else { 3 };
            until("the next life is seen", || match (generation(agent)?, address_of(agent, "n2")) {
                (seen, addrs) if seen == wanted && addrs == [addr] => Ok(()),
                other => Err(format!("{other:?}")),
            });
            agent.wait_passing("kept", &["kept"]);
        }
        within(&format!("5: back and routed at {addr}"), begun.elapsed(), Duration::from_secs(3));
        again.wait_ready();
        fleet.agents.push(again);
        fleet.all_see(&["n1=1", "n2=1", "n3=1"]);
    }
}

#[test]
fn scenario_06_a_stopped_process_is_unrouted_and_back_at_once_and_nobody_else_flaps() {
    let Some(fleet) = Fleet::start(4, 0) else { return };
    fleet.agent(2).put_ok("/v1/agent/service/register", &service("paused"));
    fleet.all_pass("paused", &["paused"]);
    let others = [1, 3, 4];
    let stopped = Instant::now();
    fleet.agent(2).signal(Signal::SIGSTOP);
    for number in others {
        fleet.agent(number).wait_passing("paused", &[]);
    }
    within("6: SIGSTOP, unrouted at all after", stopped.elapsed(), Duration::from_secs(5));
    std::thread::sleep(Duration::from_secs(10).saturating_sub(stopped.elapsed()));
    fleet.agent(2).signal(Signal::SIGCONT);
    let continued = Instant::now();
    for number in others {
        fleet.agent(number).wait_passing("paused", &["paused"]);
    }
    within("6: SIGCONT, back at all after", continued.elapsed(), Duration::from_secs(2));
    fleet.all_see(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    for number in others {
        let failed = failures_logged(fleet.agent(number));
        assert!(failed.iter().all(|name| name == "n2"), "n{number} accused {failed:?}");
    }
    assert_eq!(failures_logged(fleet.agent(2)), Vec::<String>::new(), "it slept: nobody else failed");
}

#[test]
fn scenario_07_both_halves_of_a_split_serve_their_own_and_are_one_again_after_it() {
    let Some(fleet) = Fleet::start(4, 0) else { return };
    let sides = [[1, 2], [3, 4]];
    let hosts = sides.map(|side| side.map(|number| fleet.lab.host(number)));
    // Each side has a service of its own and calls it all the time, a hundred times a second.
    let _apps = sides.map(|[near, far]| with_service(&fleet, &format!("own-{near}"), &[near], far));
    let loads = hosts.each_ref().map(|[_, far]| Load::at_pace(far, Duration::from_millis(10)));
    loads.iter().for_each(|load| load.wait_for_more(50));
    fleet.lab.split(&hosts[0], &hosts[1]);
    let begun = Instant::now();
    for (number, want) in [
        (1, ["n1=1", "n2=1", "n3=4", "n4=4"]),
        (2, ["n1=1", "n2=1", "n3=4", "n4=4"]),
        (3, ["n1=4", "n2=4", "n3=1", "n4=1"]),
        (4, ["n1=4", "n2=4", "n3=1", "n4=1"]),
    ] {
        fleet.agent(number).wait_members(&want);
    }
    figure("7: a split is known to all after", begun.elapsed());
    // What each half registers meanwhile, it serves; the other hears of it when the split is over.
    for [near, far] in sides {
        fleet.agent(near).put_ok("/v1/agent/service/register", &service(&format!("split-{near}")));
        fleet.agent(far).wait_passing(&format!("split-{near}"), &[&format!("split-{near}")]);
    }
    loads.iter().for_each(|load| load.wait_for_more(50));
    assert_ne!(records_hash(fleet.agent(1)).unwrap(), records_hash(fleet.agent(3)).unwrap());
    std::thread::sleep(Duration::from_secs(60).saturating_sub(begun.elapsed()));
    for host in hosts.iter().flatten() {
        fleet.lab.heal(host);
    }
    let healed = Instant::now();
    for service in ["split-1", "split-3"] {
        fleet.all_pass(service, &[service]);
    }
    fleet.all_see(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    until("all hold the same", || {
        let hashes: BTreeSet<String> = fleet.agents.iter().map(records_hash).collect::<Result<_, _>>()?;
        if hashes.len() == 1 { Ok(()) } else { Err(format!("{hashes:?}")) }
    });
    within("7: healed, all hold the same after", healed.elapsed(), Duration::from_secs(5));
    loads.iter().for_each(|load| load.wait_for_more(50));
    for (side, seen) in sides.iter().zip(loads.each_ref().map(Load::seen)) {
        println!("figure: 7: {} requests within {side:?}, slowest {:?}", seen.answered, seen.slowest);
        assert!(seen.failed.is_empty(), "within {side:?}: {} answered, failed: {:?}", seen.answered, seen.failed);
    }
    for (side, others) in [(sides[0], ["n3", "n4"]), (sides[1], ["n1", "n2"])] {
        for number in side {
            let failed = failures_logged(fleet.agent(number));
            assert!(failed.iter().all(|name| others.contains(&name.as_str())), "n{number} accused {failed:?}");
        }
    }
}

#[test]
fn scenario_08_half_of_the_mesh_returns_without_its_seed_from_the_peers_on_disk() {
    let Some(mut fleet) = Fleet::start(5, 0) else { return };
    fleet.agent(2).put_ok("/v1/agent/service/register", &service("eight"));
    fleet.all_pass("eight", &["eight"]);
    // The first peers are kept at once, changes every 5 s.
    std::thread::sleep(Duration::from_secs(7));
    let dirs: Vec<TempDir> = (1..=5).map(|number| fleet.take(number).kill()).collect();
    let begun = Instant::now();
    for (number, dir) in (1..=5).zip(dirs) {
        if (2..=3).contains(&number) {
            fleet.agents.push(restart(&fleet.lab.host(number), &format!("n{number}"), dir));
        }
    }
    for agent in &fleet.agents {
        agent.wait_ready();
    }
    for agent in &fleet.agents {
        for name in ["n2", "n3"] {
            until("the two find each other", || match address_of(agent, name) {
                seen if seen.len() == 1 && seen[0].ends_with("=1") => Ok(()),
                seen => Err(format!("{seen:?}")),
            });
        }
    }
    fleet.all_pass("eight", &["eight"]);
    within("8: power loss, half returns without the seed after", begun.elapsed(), Duration::from_secs(20));
}

#[test]
fn scenario_09_an_isolated_node_says_so_and_recovers_unaided() {
    let Some(fleet) = Fleet::start(4, 0) else { return };
    let host = fleet.lab.host(2);
    let alone = fleet.agent(2);
    assert!(!is_isolated(alone).unwrap());
    fleet.lab.cut(&host);
    let cut = Instant::now();
    until("the isolated node says so", || if is_isolated(alone)? { Ok(()) } else { Err("not yet".to_owned()) });
    figure("9: isolation is noticed after", cut.elapsed());
    let printed = members_printed(alone);
    assert!(printed.contains("isolated"), "{printed}");
    let about = alone.get("/v1/agent/self");
    assert_eq!(about["Stats"]["weft"]["isolated"], "true", "{about}");
    let metrics = alone.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
    assert!(metrics.contains("\nweft_membership_isolated 1"), "{metrics}");
    let lines = alone.log().lines().filter(|line| line.contains("isolated")).count();
    assert_eq!(lines, 1, "one line, not one a round");
    for number in [1, 3, 4] {
        fleet.agent(number).wait_members(&["n1=1", "n2=4", "n3=1", "n4=1"]);
        figure(&format!("9: n{number} takes the isolated node for failed after"), cut.elapsed());
        assert!(!is_isolated(fleet.agent(number)).unwrap());
    }
    std::thread::sleep(Duration::from_secs(12).saturating_sub(cut.elapsed()));
    fleet.lab.heal(&host);
    let healed = Instant::now();
    fleet.all_see(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    within("9: an isolated node is back after", healed.elapsed(), Duration::from_secs(15));
    assert!(!is_isolated(alone).unwrap());
    assert!(!members_printed(alone).contains("isolated"));
}

#[test]
fn scenario_10_a_leave_is_seen_by_all_and_fails_no_request() {
    let Some(mut fleet) = Fleet::start(4, 0) else { return };
    let _apps = with_web(&fleet, &[1, 2], 3);
    let load = Load::start(&fleet.lab.host(3));
    load.wait_for_more(50);
    let mut leaver = fleet.take(2);
    let begun = Instant::now();
    leaver.put_ok("/v1/agent/leave", "");
    fleet.all_pass("web", &["web-1"]);
    within("10: a leave is seen by all after", begun.elapsed(), Duration::from_millis(500));
    let (status, log) = leaver.wait_exit();
    assert!(status.success(), "{log}");
    assert!(log.contains("goodbye was heard"), "the leaver knows that it was heard: {log}");
    fleet.all_see(&["n1=1", "n2=3", "n3=1", "n4=1"]);
    load.wait_for_more(50);
    let seen = load.seen();
    assert!(seen.failed.is_empty(), "{} answered, failed: {:?}", seen.answered, seen.failed);
    println!("figure: 10: {} requests, none failed, slowest {:?}", seen.answered, seen.slowest);
}

#[test]
fn a_rolling_restart_of_agents_under_load_loses_no_request_that_is_safe_to_retry() {
    let Some(mut fleet) = Fleet::start(4, 0) else { return };
    let _apps = with_web(&fleet, &[2, 4], 3);
    let caller = fleet.lab.host(3);
    let loads: Vec<Load> = (0..4).map(|_| Load::start(&caller)).collect();
    loads.iter().for_each(|load| load.wait_for_more(20));
    for number in [2, 4, 2, 4] {
        // Slow ones, so that some are under way at the agent that stops: those are finished first.
        let slow: Vec<JoinHandle<Result<u16, String>>> = (0..4)
            .map(|_| {
                let caller = caller.clone();
                let ask = || request(WEB_UPSTREAM, "GET", "/hang", &[], "").map(|answer| answer.status);
                std::thread::spawn(move || caller.run(ask))
            })
            .collect();
        loads.iter().for_each(|load| load.wait_for_more(5));
        let mut old = fleet.take(number);
        old.signal(Signal::SIGTERM);
        let (status, log) = old.wait_exit();
        assert!(status.success(), "{log}");
        for one in slow {
            assert_eq!(one.join().unwrap(), Ok(200), "a slow request was cut by the drain of n{number}");
        }
        let again = restart(&fleet.lab.host(number), &format!("n{number}"), old.kill());
        again.wait_ready();
        fleet.agents.push(again);
        fleet.all_pass("web", &["web-2", "web-4"]);
        loads.iter().for_each(|load| load.wait_for_more(20));
    }
    let all: Vec<Seen> = loads.iter().map(Load::seen).collect();
    let (answered, slowest) =
        (all.iter().map(|seen| seen.answered).sum::<usize>(), all.iter().map(|seen| seen.slowest).max());
    println!("figure: a rolling restart: {answered} requests, slowest {slowest:?}");
    assert!(all.iter().all(|seen| seen.failed.is_empty()), "{all:?}");
}

#[test]
fn scenario_12_a_joiner_gets_the_whole_catalogue() {
    let Some(mut fleet) = Fleet::start(4, 1) else { return };
    for number in 1..=4 {
        fleet.agent(number).put_ok("/v1/agent/service/register", &service(&format!("of-{number}")));
    }
    for number in 1..=4 {
        let name = format!("of-{number}");
        fleet.all_pass(&name, &[&name]);
    }
    // One left, one died: a joiner hears of the dead one's instances, as failing, and of nothing that left.
    let mut left = fleet.take(4);
    left.put_ok("/v1/agent/leave", "");
    left.wait_exit();
    drop(fleet.take(3));
    fleet.all_see(&["n1=1", "n2=1", "n3=4", "n4=3"]);
    let newcomer = Agent::start(&Spec::on(&fleet.lab.host(5), "n5", &joining(&fleet.token)));
    let begun = Instant::now();
    let catalogue = |agent: &Agent| -> Result<Value, String> { Ok(agent.try_get("/v1/catalog/services")?.json()) };
    until("the joiner holds what n1 holds", || match (catalogue(&newcomer)?, catalogue(fleet.agent(1))?) {
        (seen, held) if seen == held && seen.get("of-1").is_some() => Ok(()),
        (seen, held) => Err(format!("{seen} and {held}")),
    });
    figure("12: a joiner holds the whole catalogue after", begun.elapsed());
    newcomer.wait_passing("of-1", &["of-1"]);
    newcomer.wait_passing("of-3", &[]);
    newcomer.wait_passing("of-4", &[]);
    let dead = newcomer.get("/v1/health/service/of-3");
    assert_eq!(dead.as_array().unwrap().len(), 1, "the dead node's instance is shown: {dead}");
    assert!(catalogue(&newcomer).unwrap().get("of-4").is_none(), "what left is gone");
}

#[test]
fn scenario_12_a_joiner_gets_a_catalogue_that_fills_more_than_a_frame() {
    // Three states of 60 KiB, nearly the most that one may have: together they nearly fill a frame.
    const SERVICES: usize = 470;
    let Some(mut fleet) = Fleet::start(1, 4) else { return };
    let files = TempDir::new().unwrap();
    for number in 2..=4 {
        let one = |at| format!(r#"{{"id":"s{number}-{at}","name":"service-{at}","port":8000,"tags":["v1"]}}"#);
        let services: Vec<String> = (0..SERVICES).map(one).collect();
        let file = files.path().join(format!("{number}.json"));
        std::fs::write(&file, format!(r#"{{"services":[{}]}}"#, services.join(","))).unwrap();
        let args = [&joining(&fleet.token)[..], &["-config-file", path(&file)]].concat();
        let agent = Agent::start(&Spec::on(&fleet.lab.host(number), &format!("n{number}"), &args));
        fleet.agents.push(agent);
    }
    fleet.agents.push(Agent::start(&Spec::on(&fleet.lab.host(5), "n5", &joining(&fleet.token))));
    let begun = Instant::now();
    let last = SERVICES - 1;
    fleet.all_pass(
        &format!("service-{last}"),
        &[2, 3, 4].map(|number| format!("s{number}-{last}")).each_ref().map(String::as_str),
    );
    figure("12: 1,410 instances are everywhere after", begun.elapsed());
}

#[test]
fn scenario_15_a_clock_an_hour_back_across_a_restart_keeps_its_name_and_its_records() {
    let Some(mut fleet) = Fleet::start(3, 0) else { return };
    fleet.agent(2).put_ok("/v1/agent/service/register", &service("before"));
    fleet.all_pass("before", &["before"]);
    let host = fleet.lab.host(2);
    let back = |dir, offset: &str| {
        let mut spec = Spec::on(&host, "n2", &[]);
        spec.wrap = at_offset(offset);
        Agent::spawn(&spec, dir)
    };
    // It goes on from the time at which it last ran: the others take its certificates, and it takes theirs.
    let again = back(fleet.take(2).kill(), "-1h");
    again.wait_ready();
    let begun = Instant::now();
    again.put_ok("/v1/agent/service/register", &service("after"));
    again.put_ok("/v1/agent/service/deregister/before", "");
    fleet.agents.push(again);
    fleet.all_see(&["n1=1", "n2=1", "n3=1"]);
    fleet.all_pass("after", &["after"]);
    fleet.all_pass("before", &[]);
    figure("15: a clock that went back by an hour: name and records won after", begun.elapsed());
    let log = fleet.agent(2).log();
    assert!(log.contains("going on from that time: set the clock"), "{log}");
    // And a second time, as the first run kept that time.
    let again = back(fleet.take(2).kill(), "-1h");
    again.wait_ready();
    fleet.agents.push(again);
    fleet.all_see(&["n1=1", "n2=1", "n3=1"]);
}

#[test]
fn scenario_15_a_kept_time_that_was_wrong_is_not_believed_and_an_operator_may_remove_it() {
    let Some(mut fleet) = Fleet::start(3, 0) else { return };
    let host = fleet.lab.host(2);
    let kept = |dir: &TempDir| dir.path().join("data/clock");
    // The clock was two days ahead, once.
    let dir = fleet.take(2).kill();
    let wall = || weft::clock::wall().0;
    std::fs::write(kept(&dir), format!("{}\n", wall() + 2 * 86_400)).unwrap();
    let again = restart(&host, "n2", dir);
    again.wait_ready();
    fleet.agents.push(again);
    fleet.all_see(&["n1=1", "n2=1", "n3=1"]);
    let log = fleet.agent(2).log();
    assert!(log.contains("going by the clock as it is"), "{log}");
    // What is not believed is not kept either.
    let dir = fleet.take(2).kill();
    let now: u64 = std::fs::read_to_string(kept(&dir)).unwrap().trim().parse().unwrap();
    assert!(now <= wall(), "{now}");
    // Without the file an hour is an hour: the node's own certificate begins later, and it names the clock.
    std::fs::remove_file(kept(&dir)).unwrap();
    let mut spec = Spec::on(&host, "n2", &[]);
    spec.wrap = at_offset("-1h");
    let off = Agent::spawn(&spec, dir);
    until("it names the clock", || {
        let log = off.log();
        if log.contains("set the clock") { Ok(()) } else { Err(log) }
    });
    fleet.all_see(&["n1=1", "n2=4", "n3=1"]);
}

#[test]
fn scenario_24_callers_fail_over_when_agents_are_killed_and_the_last_two_serve_each_other() {
    let Some(mut fleet) = Fleet::start(5, 0) else { return };
    let _apps = with_web(&fleet, &[1, 2], 3);
    let load = Load::start(&fleet.lab.host(3));
    load.wait_for_more(50);
    let killed = Instant::now();
    drop(fleet.take(2));
    fleet.all_pass("web", &["web-1"]);
    within("24: kill -9 is unrouted at all after", killed.elapsed(), Duration::from_secs(10));
    let is_seen = |agent: &Agent| agent.log().contains("says that its port is closed member=n2");
    assert!(fleet.agents.iter().any(is_seen), "nobody was told by the dead agent's host");
    load.wait_for_more(50);
    let seen = load.seen();
    println!("figure: 24: {} answered, {} failed, slowest {:?}", seen.answered, seen.failed.len(), seen.slowest);
    // Nobody waits for the tunnel's idle limit of 15 s.
    assert!(seen.slowest < Duration::from_secs(12), "{:?}", seen.slowest);
    // One request at most was on its way in the app that died with its answer.
    assert!(seen.failed.len() <= 1, "{:?}", seen.failed);
    for number in [4, 5] {
        drop(fleet.take(number));
    }
    fleet.all_see(&["n1=1", "n2=4", "n3=1", "n4=4", "n5=4"]);
    load.wait_for_more(50);
    assert!(load.seen().failed.len() <= 1, "{:?}", load.seen().failed);
}

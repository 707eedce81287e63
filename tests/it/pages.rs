//! The pages of examples/ about who takes a call, who is left out, limits, bytes, gRPC and zones: typed as `examples` types
//! them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::clients::{found, installed};
use crate::examples::{Terminal, Traffic, blocks, command, copy};
use crate::lab::Lab;
use crate::wait::until;

/// What `uniq -c` printed: how many answers each instance gave, by its name.
fn counts(said: &str) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for line in said.lines() {
        let mut words = line.split_whitespace();
        if let (Some(Ok(count)), Some(name)) = (words.next().map(str::parse::<u32>), words.next()) {
            *counts.entry(name.to_owned()).or_default() += count;
        }
    }
    counts
}

fn of(counts: &BTreeMap<String, u32>, name: &str) -> u32 {
    counts.get(name).copied().unwrap_or(0)
}

/// The Python of the clients, if it has `module`.
fn python_with(module: &str) -> Option<PathBuf> {
    let imports = format!("import {module}");
    let has_it = |python: &PathBuf| {
        Command::new(python).args(["-c", &imports]).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    installed("py/bin/python3").filter(has_it)
}

/// What a shell is told so that `python3` is this one.
fn first_on_path(python: &Path) -> String {
    format!("export PATH={}:$PATH", python.parent().unwrap().display())
}

#[test]
fn the_pages_about_who_takes_a_call_and_who_is_left_out_do_what_they_say() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));

    let spread = traffic.page("spread.md");
    let waves: Vec<&String> = spread.iter().filter(|line| line.contains("/tail")).collect();
    let mut slow_ones = |entry: &str, wave: &str| {
        traffic.terminal.say(command(&spread, entry));
        let said = traffic.terminal.say(wave);
        let counts = counts(&said);
        assert_eq!(of(&counts, "v1") + of(&counts, "v2"), 40, "{entry}: {said}");
        of(&counts, "v2")
    };
    // Each of two workers takes turns by itself.
    let in_turn = slow_ones("turns.json", waves[0]);
    assert!((18..=22).contains(&in_turn), "{in_turn} of 40 went to v2");
    // Five standard deviations are 16.
    let by_chance = slow_ones("random.json", waves[1]);
    assert!((4..=36).contains(&by_chance), "{by_chance} of 40 went to v2");
    // One at a time from each worker: how many that are in all depends on how long the others take on this machine.
    let least = slow_ones("least.json", waves[2]);
    assert!((1..18).contains(&least), "{least} of 40 went to v2, which takes a second for each");
    let why = traffic.terminal.say(command(&spread, "weft why"));
    assert!(why.contains("balances by least_request"), "{why}");
    let deletes = "weft config delete -kind service-resolver -name web";
    traffic.terminal.say(deletes);

    traffic.terminal.say(command(&spread, "affinity.json"));
    until("each user stays with one instance", || {
        let said = traffic.terminal.say(command(&spread, "for user"));
        let lines: Vec<&str> = said.lines().collect();
        if lines.len() == 12 && lines[..6] == lines[6..] { Ok(()) } else { Err(said) }
    });
    let first = traffic.terminal.say(command(&spread, "/first"));
    assert!(first.contains("set-cookie: stay="), "{first}");
    let again = traffic.terminal.say(command(&spread, "/again"));
    assert!(again.lines().count() == 1 && again.ends_with("/again 200"), "{again}");
    traffic.terminal.say(deletes);

    traffic.terminal.say(command(&spread, "slow-start.json"));
    let before = traffic.terminal.say(command(&spread, "ten each"));
    assert!((8..=12).contains(&of(&counts(&before), "v1")), "{before}");
    traffic.terminal.start(command(&spread, "7007 v3"));
    until("the third one is up", || match traffic.terminal.say("curl localhost:7007/seen") {
        said if said.starts_with("v3") => Ok(()),
        said => Err(said),
    });
    traffic.terminal.say(command(&spread, "third.json"));
    let new = traffic.terminal.say(command(&spread, "/new"));
    assert!(of(&counts(&new), "v3") <= 10, "a new instance gets its whole share at once: {new}");
    traffic.terminal.say(command(&spread, "sleep"));
    let old = traffic.terminal.say(command(&spread, "/old"));
    assert!((17..=23).contains(&of(&counts(&old), "v3")), "{old}");
    traffic.terminal.say(command(&spread, "weighted.json"));
    traffic.terminal.say(command(&spread, "heavy.json"));
    until("the heavy one takes its share", || {
        // Each of two workers counts by itself.
        let said = traffic.terminal.say(command(&spread, "9191/heavy"));
        let met = counts(&said);
        let is_so = (28..=32).contains(&of(&met, "v3")) && (13..=17).contains(&of(&met, "v1"));
        if is_so { Ok(()) } else { Err(said) }
    });
    traffic.put_back(&spread);

    let ejection = traffic.page("ejection.md");
    traffic.terminal.say(command(&ejection, "turns.json"));
    traffic.terminal.say(command(&ejection, "ejection.json"));
    let sick: Vec<&String> = ejection.iter().filter(|line| line.contains("/sick")).collect();
    until("the instance that fails is left out", || {
        let failed = traffic.terminal.say(sick[0]);
        let why = traffic.terminal.say(command(&ejection, "weft why"));
        let meanwhile = traffic.terminal.say(command(&ejection, "/meanwhile"));
        let is_out = why.contains("breaker of web-v2") && meanwhile == "v1 /meanwhile 200";
        if is_out { Ok(()) } else { Err(format!("{failed}\n{why}\n{meanwhile}")) }
    });
    traffic.terminal.say(command(&ejection, "sleep"));
    // One request of each worker has tried it; from then on they take turns.
    let well = traffic.terminal.say(command(&ejection, "/well"));
    assert!((3..=6).contains(&of(&counts(&well), "v2")), "{well}");
    traffic.terminal.say(command(&ejection, "fail-closed.json"));
    until("the service fails closed", || match traffic.terminal.say(sick[1]) {
        said if !said.contains("v1 /sick") && !said.contains("v2 /sick") && said.contains("`web` fails closed") => {
            Ok(())
        }
        said => Err(said),
    });
    traffic.put_back(&ejection);
}

#[test]
fn the_page_about_rates_and_queues_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));
    let limits = traffic.page("limits.md");
    traffic.terminal.say(command(&limits, "other.json"));
    until("the other caller's port is open", || match traffic.terminal.say("curl localhost:9194/") {
        said if said.ends_with("/ 200") => Ok(()),
        said => Err(said),
    });
    traffic.terminal.say(command(&limits, "rates.json"));
    for (part, want) in
        [("ann ann ben", "200 429 200"), ("1 2 3 4 5 6", "200 200 200 200 429 429"), ("9194/", "200 200 200 200")]
    {
        assert_eq!(traffic.terminal.say(command(&limits, part)), want, "{part}");
    }
    let limited = traffic.terminal.say(command(&limits, "/limited")).to_ascii_lowercase();
    assert!(
        limited.contains(" 429 ") && limited.contains("retry-after:") && limited.contains("ratelimit:"),
        "{limited}"
    );
    traffic.terminal.say(command(&limits, "service-defaults -name web"));
    traffic.terminal.say(command(&limits, "deregister"));

    traffic.terminal.say(command(&limits, "waiting.json"));
    traffic.terminal.say(command(&limits, "an answer takes"));
    until("some wait, and are answered", || {
        let said = traffic.terminal.say(command(&limits, "some waited"));
        // One that waited took longer than the 300 ms of the app, and less than twice as much and a bit.
        let waited = |line: &str| {
            let seconds = line.strip_prefix("200 ").and_then(|seconds| seconds.parse::<f64>().ok());
            seconds.is_some_and(|seconds| (0.45..0.8).contains(&seconds))
        };
        if said.lines().any(waited) { Ok(()) } else { Err(said) }
    });
    until("who finds four waiting is refused", || match traffic.terminal.say(command(&limits, "seq 30")) {
        said if said.contains(" 503 pending") && said.contains(" 200 ") => Ok(()),
        said => Err(said),
    });
    traffic.terminal.say(command(&limits, "adaptive.json"));
    until("each worker has found a limit", || {
        traffic.terminal.say(command(&limits, "seq 20"));
        let said = traffic.terminal.say(command(&limits, "AdaptiveLimit"));
        let has_number = |line: &str| line.ends_with(|last: char| last.is_ascii_digit());
        if !said.is_empty() && said.lines().all(has_number) { Ok(()) } else { Err(said) }
    });
    traffic.put_back(&limits);
}

#[test]
fn the_page_about_what_an_instance_bears_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));
    let page = traffic.page("adaptive.md");
    // How many calls were answered with 200 in time.
    let good = |said: &str| {
        let what = said.split(": ").nth(1).unwrap_or("").split(", ");
        what.filter_map(|what| what.strip_prefix("200 ")?.parse::<u32>().ok()).sum::<u32>()
    };
    let mut say = |part: &str| traffic.terminal.say(command(&page, part));
    // A machine that stands still for a while makes all calls late.
    until("nearly all of half of what the apps bear is answered", || {
        let half = say("half of what");
        if good(&half) > 100 { Ok(()) } else { Err(half) }
    });
    let without = say("three times as much");
    say("sleep 15");
    say("adaptive.json");
    say("each worker finds out");
    let with = say("most of 800");
    // A machine with other work to do gets less out of the apps.
    assert!(good(&with) > 300 && good(&with) > 3 * good(&without), "{without}, and with it {with}");
    assert!(with.contains("refused (instances)"), "{with}");
    let (limits, counted) = (say("AdaptiveLimit"), say("balancer_"));
    assert!(limits.lines().count() >= 2 && counted.contains("limit=\"instances\""), "{limits}\n{counted}");
    traffic.put_back(&page);
}

#[test]
fn the_page_about_bytes_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));

    let bytes = traffic.page("bytes.md");
    for start in ["7004 raw-1", "7005 raw-2"] {
        traffic.terminal.start(command(&bytes, start));
    }
    traffic.terminal.say(command(&bytes, "raw.json"));
    until("both answer, and are told who calls", || {
        let who = traffic.terminal.say(command(&bytes, "/who"));
        let met = counts(&traffic.terminal.say(command(&bytes, "seq 20")));
        let is_told =
            who.contains(" for spiffe://") && who.contains("/svc/raw-client/node/") && who.ends_with("at 127.0.0.1");
        if is_told && of(&met, "raw-1") > 0 && of(&met, "raw-2") > 0 { Ok(()) } else { Err(format!("{who} {met:?}")) }
    });
    traffic.terminal.say(command(&bytes, "raw-affinity.json"));
    until("an address stays with one instance", || {
        // By chance they would all meet one in one of 500 cases.
        let said = traffic.terminal.say(command(&bytes, "/here"));
        if said.lines().count() == 1 && said.starts_with("raw-") { Ok(()) } else { Err(said) }
    });
    traffic.terminal.say(command(&bytes, "raw-limits.json"));
    until("a second connection is reset", || {
        traffic.terminal.say(command(&bytes, "/hold"));
        traffic.terminal.say(command(&bytes, "sleep"));
        match traffic.terminal.say(command(&bytes, "/second")) {
            said if said.contains("curl: (5") => Ok(()),
            said => Err(said),
        }
    });
    traffic.terminal.say(command(&bytes, "-name raw-client"));
    traffic.terminal.say(command(&bytes, "raw-faults.json"));
    until("half are reset, and all are put off", || {
        let said = traffic.terminal.say(command(&bytes, "300 ms more"));
        let calls: Vec<(&str, f64)> = said
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(status, time)| Some((status, time.parse().ok()?)))
            .collect();
        let met = |status: &str| calls.iter().any(|call| call.0 == status);
        let all_put_off = calls.len() == 10 && calls.iter().all(|call| call.1 >= 0.3);
        if all_put_off && met("000") && met("200") { Ok(()) } else { Err(said) }
    });
    let counted = traffic.terminal.say(command(&bytes, "connections_closed"));
    for flag in ["FI", "DI", "UO"] {
        let is_it = |line: &str| line.contains("\"raw\"") && line.contains(&format!("response_flags=\"{flag}\""));
        assert!(counted.lines().any(is_it), "{flag}: {counted}");
    }
    traffic.terminal.say(command(&bytes, "service-faults -name raw"));
    traffic.terminal.say(command(&bytes, "raw-idle.json"));
    until("silence ends a connection", || {
        let began = Instant::now();
        match traffic.terminal.say(command(&bytes, "two seconds")) {
            // Well before the app answers, after three.
            said if said.contains("curl: (5") && began.elapsed().as_secs_f64() >= 2.0 => Ok(()),
            said => Err(said),
        }
    });
    traffic.put_back(&bytes);
}

#[test]
fn the_page_about_grpc_does_what_it_says() {
    let Some([python]) = found("grpcio", [python_with("grpc")]) else { return };
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));
    traffic.terminal.say(&first_on_path(&python));
    let grpc = traffic.page("grpc.md");
    for start in ["7008 v1", "7009 v2"] {
        traffic.terminal.start(command(&grpc, start));
    }
    for line in ["rpc.json", "rpc-subsets.json", "rpc-router.json"] {
        traffic.terminal.say(command(&grpc, line));
    }
    let mut wait = |part: &str, want: &str| {
        until(&format!("{part} is answered with {want}"), || match traffic.terminal.say(command(&grpc, part)) {
            said if said.starts_with(want) => Ok(()),
            said => Err(said),
        });
    };
    wait("Add apples", "v1 /shop.Cart/Add apples");
    wait("List all", "v2 /shop.Admin/List all");
    wait("/shop.Cart/Hang", "DEADLINE_EXCEEDED");
    traffic.terminal.say(command(&grpc, "rpc-faults.json"));
    let mut wait = |part: &str, want: &str| {
        let said = traffic.terminal.say(command(&grpc, part));
        assert!(said.starts_with(want), "{part}: {said}");
    };
    wait("Add pears", "RESOURCE_EXHAUSTED");
    wait("List again", "v2 /shop.Admin/List again");
    for line in ["service-faults -name rpc", "rpc-turns.json"] {
        traffic.terminal.say(command(&grpc, line));
    }
    let mut wait = |part: &str, is_it: &dyn Fn(&str) -> bool| {
        until(part, || match traffic.terminal.say(command(&grpc, part)) {
            said if is_it(&said) => Ok(()),
            said => Err(said),
        });
    };
    wait("Tail slow", &|said| {
        said.contains("v1 /shop.Catalog/Tail slow") && said.contains("v2 /shop.Catalog/Tail slow")
    });
    wait("Fail missed", &|said| said.contains("v1 /shop.Stock/Fail missed") && said.contains("UNAVAILABLE not here"));
    traffic.terminal.say(command(&grpc, "rpc-again.json"));
    let mut say = |part: &str| traffic.terminal.say(command(&grpc, part));
    let (quick, found, counted) = (say("Tail quick"), say("Fail found"), say("grep -E"));
    let all_v1 = |said: &str, count| said.lines().filter(|line| line.starts_with("v1 ")).count() == count;
    assert!(all_v1(&quick, 6) && all_v1(&found, 4), "{quick}\n{found}\n{counted}");
    assert!(counted.contains("outcome=\"won\"") && counted.contains("retries_saved_total"), "{counted}");
    traffic.put_back(&grpc);
}

#[test]
fn the_page_about_whom_proxies_ask_for_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut traffic = Traffic::begin(&lab.host(1), copy(temp.path()));
    let hops = traffic.page("hops.md");
    traffic.terminal.say(command(&hops, "open.json"));
    let here = traffic.terminal.say(&format!("{}; echo $here", command(&hops, "hostname")));
    assert!(here.starts_with("10."), "{here:?}");
    let mut wait = |part: &str, want: &str| {
        until(&format!("{part} is answered: {want}"), || match traffic.terminal.say(command(&hops, part)) {
            said if said.contains(want) => Ok(()),
            said => Err(said),
        });
    };
    wait("?stranger", &format!("from {here} by open/"));
    wait("?app", "from 203.0.113.7 by open/");
    wait("hops.json", "");
    wait("?proxy", "from 203.0.113.7 by open/");
    wait("?certificate", " by open/");
    traffic.put_back(&hops);
}

/// Starts the agents of a page, the block of each in a terminal of its own: the first at 127.0.0.1, the next at 127.0.0.2.
fn agents(lab: &Lab, dir: &Path, blocks: &[Vec<String>]) -> Vec<Terminal> {
    let mut agents = Vec::new();
    for (at, block) in blocks.iter().enumerate() {
        let mut terminal = Terminal::open(&lab.host(1), dir);
        for line in block {
            if line.starts_with("weft agent") { terminal.start(line) } else { drop(terminal.say(line)) }
        }
        until("the agent is up", || match terminal.say(&format!("weft members -http-addr 127.0.0.{}:8500", at + 1)) {
            said if said.contains("alive") => Ok(()),
            said => Err(said),
        });
        agents.push(terminal);
    }
    agents
}

#[test]
fn the_page_about_what_agents_hear_of_a_sick_instance_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let hearsay = blocks(&fs::read_to_string(dir.join("examples/hearsay/README.md")).unwrap());
    let _agents = agents(&lab, &dir, &hearsay[..4]);
    let mut terminal = Terminal::open(&lab.host(1), &dir);
    let page = &hearsay[4];
    terminal.say(&page[0]);
    for start in ["7001 v1", "7002 v2"] {
        terminal.start(command(page, start));
    }
    terminal.say(command(page, "operator create"));
    until("d knows both", || match terminal.say("curl 127.0.0.4:8500/v1/health/service/web?passing") {
        said if said.contains("web-v1") && said.contains("web-v2") => Ok(()),
        said => Err(said),
    });
    for file in ["turns.json", "three.json"] {
        let said = terminal.say(command(page, file));
        assert!(!said.to_lowercase().contains("error"), "{file}: {said}");
    }
    until("the entries are in force at the callers", || {
        let shown = |at| format!("curl -s '127.0.0.{at}:8500/v1/discovery-chain/web'");
        let said = [2, 3, 4].map(|at| terminal.say(&shown(at)));
        if said.iter().all(|said| said.contains("round_robin")) { Ok(()) } else { Err(said.concat()) }
    });
    until("d hears of what b found", || {
        let failed = terminal.say(command(page, "b finds out"));
        match terminal.say(command(page, "d hears of it")) {
            said if said.contains("ejected by b") && !said.contains("ejected by b, c") => Ok(()),
            said => Err(format!("{failed}\n{said}")),
        }
    });
    until("d hears of what c found", || {
        let failed = terminal.say(command(page, "c finds out"));
        match terminal.say(command(page, "by b, c")) {
            said if said.contains("web-v2") && said.ends_with("ejected by b, c") => Ok(()),
            said => Err(format!("{failed}\n{said}")),
        }
    });
    let said = terminal.say(command(page, "never called it"));
    let met = counts(&said);
    assert!(of(&met, "v1") + of(&met, "v2") == 20 && of(&met, "v2") <= 4, "{said}");
}

#[test]
fn the_page_about_zones_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let zones = blocks(&fs::read_to_string(dir.join("examples/zones/README.md")).unwrap());
    let _agents = agents(&lab, &dir, &zones[..2]);
    let mut terminal = Terminal::open(&lab.host(1), &dir);
    let page = zones[2..].concat();
    terminal.say(&page[0]);
    for start in ["7001 north-1", "7002 north-2", "7003 south-1"] {
        terminal.start(command(&page, start));
    }
    terminal.say(command(&page, "operator create"));
    until("all three are found", || {
        let said = terminal.say("curl localhost:8500/v1/health/service/web?passing");
        if said.matches("\"web-").count() >= 3 { Ok(()) } else { Err(said) }
    });
    let maint: Vec<&String> = page.iter().filter(|line| line.starts_with("weft maint")).collect();
    assert_eq!(maint.len(), 8, "{maint:?}");
    let until_met = |terminal: &mut Terminal, part: &str, is_it: &dyn Fn(u32, u32, u32) -> bool| {
        until(part, || {
            let said = terminal.say(command(&page, part));
            let met = counts(&said);
            if is_it(of(&met, "north-1"), of(&met, "north-2"), of(&met, "south-1")) { Ok(()) } else { Err(said) }
        });
    };
    let back = |terminal: &mut Terminal, lines: &[&String]| {
        for line in lines {
            let said = terminal.say(line);
            assert!(!said.to_lowercase().contains("error"), "{line}: {said}");
        }
    };
    until_met(&mut terminal, "zone alone", &|first, second, south| {
        first + second == 60 && first > 0 && second > 0 && south == 0
    });
    back(&mut terminal, &maint[..1]);
    // 140 and 60 are expected; 6.5 is the standard deviation.
    until_met(&mut terminal, "/half", &|first, second, south| {
        second == 0 && (27..=93).contains(&south) && first + south == 200
    });
    back(&mut terminal, &maint[1..2]);
    until_met(&mut terminal, "/none", &|_, _, south| south == 20);
    back(&mut terminal, &maint[2..4]);

    terminal.say(command(&page, "failover.json"));
    back(&mut terminal, &maint[4..5]);
    until_met(&mut terminal, "/one", &|first, _, _| first == 20);
    back(&mut terminal, &maint[5..6]);
    until_met(&mut terminal, "/over", &|_, _, south| south == 20);
    back(&mut terminal, &maint[6..]);

    terminal.say(command(&page, "ignore.json"));
    until_met(&mut terminal, "/all", &|first, second, south| {
        [first, second, south].iter().all(|one| (18..=22).contains(one))
    });
}

#[test]
fn the_page_about_telemetry_does_what_it_says() {
    let Some([python]) = found("opentelemetry-proto", [python_with("opentelemetry.proto")]) else { return };
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), dir.join("tests")).unwrap();
    let page = blocks(&fs::read_to_string(dir.join("examples/telemetry/README.md")).unwrap()).concat();
    let mut terminal = Terminal::open(&lab.host(1), &dir);
    terminal.say(&first_on_path(&python));
    terminal.say(command(&page, "echo take"));
    terminal.say(command(&page, "collector.py"));
    for start in ["weft agent", "7001 v1", "7002 v2"] {
        terminal.start(command(&page, start));
    }
    until("the request is answered", || match terminal.say(command(&page, "traceparent")) {
        said if said.ends_with("/traced 200") => Ok(()),
        said => Err(said),
    });
    terminal.say(command(&page, "sleep"));
    let spans = terminal.say(command(&page, "grep 0af7"));
    let spans: Vec<Value> = spans.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last_two: Vec<&Value> = spans.iter().rev().take(2).collect();
    let below = |parent: &Value| last_two.iter().any(|span| &span["parent"] == parent);
    assert!(last_two.len() == 2 && below(&Value::from("b7ad6b7169203331")), "{spans:?}");
    assert!(last_two.iter().any(|span| below(&span["span"])), "one span is below the other: {spans:?}");
    let point = terminal.say(command(&page, "grep http.client"));
    assert!(point.contains("\"signal\": \"point\"") && point.contains("http.client.request.duration"), "{point}");
}

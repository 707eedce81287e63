//! What examples/ tells people to type is typed here, in a namespace of its own, and does what the page says.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::agent::WEFT;
use crate::clients::program;
use crate::lab::{Host, Lab};
use crate::wait::{PATIENCE, until, until_within};

/// Ends what a line printed.
const MARK: &str = "--typed--";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// A terminal of a host: a shell that is typed into.
pub(crate) struct Terminal {
    shell: Child,
    keys: ChildStdin,
    lines: Receiver<String>,
}

impl Terminal {
    pub(crate) fn open(host: &Host, dir: &Path) -> Self {
        let bin = Path::new(WEFT).parent().unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("bash");
        // Without a terminal curl shows a meter.
        fs::write(dir.join(".curlrc"), "silent\nshow-error\n").unwrap();
        command.current_dir(dir).env("CURL_HOME", dir).env("PATH", path).env_remove("WEFT_HTTP_ADDR").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut shell = host.run(|| command.spawn().expect("bash starts"));
        let mut keys = shell.stdin.take().unwrap();
        writeln!(keys, "exec 2>&1").unwrap();
        let read = BufReader::new(shell.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || read.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { shell, keys, lines }
    }

    /// Types one command; returns what it printed.
    #[track_caller]
    pub(crate) fn say(&mut self, command: &str) -> String {
        writeln!(self.keys, "{command}\necho; echo {MARK}").unwrap();
        let (began, mut said) = (Instant::now(), String::new());
        loop {
            let left = (2 * PATIENCE).saturating_sub(began.elapsed());
            let line =
                self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("`{command}` does not end; it said: {said}"));
            if line == MARK {
                return said.trim_end().to_owned();
            }
            said.push_str(&line);
            said.push('\n');
        }
    }

    /// Types a command that runs on; an app that takes TCP is then waited for: calls that come before it is up are held
    /// against its instance, which is left out for longer than a test is patient.
    pub(crate) fn start(&mut self, command: &str) {
        let command = command.split("   #").next().unwrap().trim_end().trim_end_matches('&');
        self.say(&format!("{command} > /dev/null 2>&1 &"));
        let port_after = |program: &&str| command.split_once(*program)?.1.split(' ').next()?.parse::<u16>().ok();
        if let Some(port) = ["app.py ", "rpc.py serve "].iter().find_map(port_after) {
            let is_up = format!("(: < /dev/tcp/127.0.0.1/{port}) 2> /dev/null");
            self.say(&format!("for _ in $(seq 400); do {is_up} && break; sleep 0.05; done"));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.shell.id()).unwrap());
        let _gone_already = killpg(group, Signal::SIGKILL);
        let _reaped = self.shell.wait();
    }
}

/// The blocks of commands of a page; each a list of commands, of which a loop over several lines is one.
pub(crate) fn blocks(page: &str) -> Vec<Vec<String>> {
    let (mut blocks, mut open, mut rest): (Vec<Vec<String>>, bool, String) = (Vec::new(), false, String::new());
    for line in page.lines() {
        match (open, line) {
            (false, "```sh") => {
                open = true;
                blocks.push(Vec::new());
            }
            (true, "```") => open = false,
            (true, line) => {
                rest.push_str(line);
                rest.push('\n');
                if !rest.starts_with("for ") || rest.contains("done") {
                    blocks.last_mut().unwrap().push(std::mem::take(&mut rest).trim_end().to_owned());
                }
            }
            _ => {}
        }
    }
    blocks
}

/// The command of a block that begins so.
#[track_caller]
pub(crate) fn command<'c>(commands: &'c [String], part: &str) -> &'c str {
    let found: Vec<&String> = commands.iter().filter(|command| command.contains(part)).collect();
    assert!(found.len() == 1, "`{part}` is in {found:?} of {commands:#?}");
    found[0]
}

/// Copies examples/ so that nothing is kept outside of `to`.
pub(crate) fn copy(to: &Path) -> PathBuf {
    let kept = to.join("kept");
    fs::create_dir_all(&kept).unwrap();
    let mut dirs = vec![examples()];
    while let Some(dir) = dirs.pop() {
        let there = to.join("examples").join(dir.strip_prefix(examples()).unwrap());
        fs::create_dir_all(&there).unwrap();
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let text = fs::read_to_string(&path).unwrap().replace("/tmp/weft", &kept.display().to_string());
                fs::write(there.join(path.file_name().unwrap()), text).unwrap();
            }
        }
    }
    to.to_owned()
}

#[test]
fn every_entry_of_examples_and_of_the_pages_about_entries_is_taken() {
    let mut entries: Vec<(String, Value)> = Vec::new();
    for dir in fs::read_dir(examples()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_some_and(|end| end == "json") {
                let value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
                if value.get("Kind").is_some() {
                    entries.push((path.display().to_string(), value));
                }
            }
        }
    }
    for page in ["balancing.md", "gateways.md", "traffic.md"] {
        let text = fs::read_to_string(examples().parent().unwrap().join("api").join(page)).unwrap();
        for block in text.split("```json\n").skip(1) {
            let block = block.split("```").next().unwrap();
            entries
                .push((page.to_owned(), serde_json::from_str(block).unwrap_or_else(|error| panic!("{page}: {error}"))));
        }
    }
    assert!(entries.len() >= 10, "{}", entries.len());
    for (at, value) in &entries {
        let (kind, name) = (value["Kind"].as_str().unwrap(), value["Name"].as_str().unwrap());
        weft::policy::check_entry(&value.to_string()).unwrap_or_else(|error| panic!("{at}: {error}"));
        let dir = Path::new(at).parent();
        let others = entries.iter().filter(|(other, value)| Path::new(other).parent() == dir && value["Kind"] != kind);
        let others = others.map(|(_, value)| (value["Kind"].as_str().unwrap(), value["Name"].as_str().unwrap(), value));
        weft::traffic::check_write(others, (kind, name, Some(value))).unwrap_or_else(|error| panic!("{at}: {error}"));
    }
}

/// Every kind of config entry.
const KINDS: [&str; 7] = [
    "ingress-gateway",
    "proxy-defaults",
    "service-defaults",
    "service-faults",
    "service-resolver",
    "service-router",
    "service-splitter",
];

/// The pages of examples/traffic, typed one after the other into one terminal.
pub(crate) struct Traffic {
    pub(crate) terminal: Terminal,
    dir: PathBuf,
    /// The services that there are at the beginning.
    services: String,
}

impl Traffic {
    /// Starts what the pages stand on, in `dir`.
    #[track_caller]
    pub(crate) fn begin(host: &Host, dir: PathBuf) -> Self {
        let mut traffic = Self { terminal: Terminal::open(host, &dir), dir, services: String::new() };
        let readme = traffic.page("README.md");
        for start in ["weft agent", "7001 v1", "7002 v2"] {
            traffic.terminal.start(command(&readme, start));
        }
        traffic.both_answer(command(&readme, "curl"));
        traffic.services = traffic.services();
        traffic
    }

    /// The commands of a page.
    pub(crate) fn page(&self, name: &str) -> Vec<String> {
        blocks(&fs::read_to_string(self.dir.join("examples/traffic").join(name)).unwrap()).concat()
    }

    /// Types the lines at the end of a page that put back what it changed; then all must be as it was before.
    #[track_caller]
    pub(crate) fn put_back(&mut self, page: &[String]) {
        let puts_back =
            |line: &&String| line.starts_with("weft config delete") || line.starts_with("weft services deregister");
        let first = page.len() - page.iter().rev().take_while(puts_back).count();
        for line in &page[first..] {
            let said = self.terminal.say(line);
            assert!(!said.to_lowercase().contains("error"), "{line}: {said}");
        }
        for kind in KINDS {
            let left = self.terminal.say(&format!("curl localhost:8500/v1/config/{kind}"));
            assert_eq!(left, "[]", "a {kind} is left");
        }
        until("the services are as before", || match self.services() {
            services if services == self.services => Ok(()),
            services => Err(services),
        });
        self.both_answer("curl localhost:9191/");
    }

    /// Waits until `call` is answered by both versions. What a page made of one of them (an ejection, slow answers) is
    /// forgotten within a minute.
    #[track_caller]
    fn both_answer(&mut self, call: &str) {
        until_within(2 * PATIENCE, "the two versions answer", || {
            let said = format!("{}{}", self.terminal.say(call), self.terminal.say(call));
            if said.contains("v1 / 200") && said.contains("v2 / 200") { Ok(()) } else { Err(said) }
        });
    }

    fn services(&mut self) -> String {
        self.terminal.say("curl localhost:8500/v1/catalog/services")
    }

    /// Waits until the agent's way to `web` has `word` in it.
    #[track_caller]
    fn until_in_force(&mut self, word: &str) {
        until("the entry is in force", || match self.terminal.say("curl -s localhost:8500/v1/discovery-chain/web") {
            said if said.contains(word) => Ok(()),
            said => Err(said),
        });
    }
}

#[test]
fn the_pages_about_other_services_deadlines_and_edges_do_what_they_say() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let mut traffic = Traffic::begin(&lab.host(1), dir);

    let elsewhere = traffic.page("elsewhere.md");
    traffic.terminal.start(command(&elsewhere, "7003 shadow"));
    // A copy that comes before the app is up is gone.
    until("the shadow is up", || match traffic.terminal.say(command(&elsewhere, "/seen")) {
        said if said == "shadow 0" => Ok(()),
        said => Err(said),
    });
    traffic.terminal.say(command(&elsewhere, "services register"));
    traffic.terminal.say(command(&elsewhere, "mirror.json"));
    traffic.until_in_force("\"Mirror\"");
    let copied = traffic.terminal.say(command(&elsewhere, "/copied"));
    assert_eq!(copied.matches(" /copied 200 4 bytes").count(), 5, "{copied}");
    assert!(!copied.contains("shadow"), "{copied}");
    until("the mirror got its copies", || match traffic.terminal.say(command(&elsewhere, "/seen")) {
        said if said == "shadow 5" => Ok(()),
        said => Err(said),
    });
    assert!(traffic.terminal.say(command(&elsewhere, "grep mirrored")).contains("outcome=\"sent\""));
    traffic.terminal.say(command(&elsewhere, "-kind service-router"));
    traffic.terminal.say(command(&elsewhere, "redirect.json"));
    until("web's calls are led elsewhere", || match traffic.terminal.say(command(&elsewhere, "/moved")) {
        said if said == "shadow /moved 200" => Ok(()),
        said => Err(said),
    });
    assert!(traffic.terminal.say(command(&elsewhere, "discovery-chain")).contains("shadow"));
    traffic.put_back(&elsewhere);

    let deadlines = traffic.page("deadlines.md");
    traffic.terminal.say(command(&deadlines, "deadlines.json"));
    traffic.until_in_force("\"400ms\"");
    let mut timed = |part: &str, status: &str, seconds: std::ops::Range<f64>| {
        let began = Instant::now();
        let said = traffic.terminal.say(command(&deadlines, part));
        let took = began.elapsed().as_secs_f64();
        assert!(said.contains(status) && seconds.contains(&took), "{part}: after {took} s: {said}");
    };
    timed("two tries", "504 Gateway", 0.8..9.0);
    timed("are enough", " /slow?patient=yes 200", 2.9..9.0);
    timed("no byte", "504 Gateway", 1.0..9.0);
    timed("hurry", "504 Gateway", 0.2..9.0);
    traffic.put_back(&deadlines);

    let edges = traffic.page("edges.md");
    assert!(traffic.terminal.say(command(&edges, "/h2")).starts_with("HTTP/2 200"));
    let head = traffic.terminal.say(command(&edges, "-I")).to_ascii_lowercase();
    assert!(head.contains("200 ok") && head.contains("content-length: 13") && !head.contains("v1"), "{head}");
    let hints = traffic.terminal.say(command(&edges, "/hints"));
    assert!(hints.starts_with("HTTP/1.1 103") && hints.contains("HTTP/1.1 200"), "{hints}");
    assert!(traffic.terminal.say(command(&edges, "/trailers")).contains("x-sum: 5"));
    assert!(traffic.terminal.say(command(&edges, "/upload")).contains(" /upload 200 1000000 bytes"));
    assert_eq!(traffic.terminal.say(command(&edges, "ws.py")), "HTTP/1.1 101 Switching Protocols\nhello\nand again");
    assert!(traffic.terminal.say(command(&edges, "CONNECT")).contains(" 501 "));
    assert!(traffic.terminal.say(command(&edges, "/twice")).contains(" 400 "));
    assert_eq!(traffic.terminal.say(command(&edges, "/large")), "431");
    assert!(traffic.terminal.say(command(&edges, "grep malformed")).contains("weft_http_malformed_total"));
    traffic.put_back(&edges);
}

#[test]
fn the_pages_about_traffic_do_what_they_say() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let mut traffic = Traffic::begin(&lab.host(1), dir);

    let routing = traffic.page("routing.md");
    traffic.terminal.say(command(&routing, "subsets.json"));
    traffic.terminal.say(command(&routing, "router.json"));
    assert_eq!(traffic.terminal.say(command(&routing, "default subset")), "v1 / 200");
    let canary = traffic.terminal.say(command(&routing, "x-canary"));
    assert!(canary.contains("v2 / 200") && canary.contains("x-version: v2"), "{canary}");
    assert_eq!(traffic.terminal.say(command(&routing, "/api/cart")), "v1 /cart 200");
    let moved = traffic.terminal.say(command(&routing, "/old"));
    assert!(moved.contains("301") && moved.contains("/new"), "{moved}");
    traffic.put_back(&routing);

    let splitting = traffic.page("splitting.md");
    traffic.terminal.say(command(&splitting, "subsets.json"));
    traffic.terminal.say(command(&splitting, "splitter.json"));
    let counts = traffic.terminal.say(command(&splitting, "seq 100"));
    let of = |version: &str| {
        let line = counts.lines().find(|line| line.contains(version)).map_or("0", str::trim);
        line.split(' ').next().unwrap().parse::<u32>().unwrap()
    };
    assert!(of("v1") + of("v2") == 100 && of("v1") >= 70, "{counts}");
    assert_eq!(traffic.terminal.say(command(&splitting, "ann")).lines().count(), 1);
    traffic.put_back(&splitting);

    let resilience = traffic.page("resilience.md");
    traffic.terminal.say(command(&resilience, "subsets.json"));
    let failing: Vec<&String> = resilience.iter().filter(|line| line.contains("/fail")).collect();
    assert!(traffic.terminal.say(failing[0]).contains(" 503"), "nothing fails");
    traffic.terminal.say(command(&resilience, "router.json"));
    let mended = traffic.terminal.say(failing[1]);
    assert!(!mended.contains(" 503") && mended.lines().count() == 10, "{mended}");
    assert!(traffic.terminal.say(command(&resilience, "grep retries")).contains("weft_"));
    let slow = traffic.terminal.say(command(&resilience, "/slow"));
    assert!(slow.contains("504") && slow.contains("500ms"), "{slow}");
    traffic.terminal.say(command(&resilience, "enable=true"));
    until("v1 answers for v2", || match traffic.terminal.say(command(&resilience, "x-canary")) {
        said if said.contains("v1 /") => Ok(()),
        said => Err(said),
    });
    traffic.terminal.say(command(&resilience, "enable=false"));
    traffic.put_back(&resilience);

    let hedging = traffic.page("hedging.md");
    traffic.terminal.say(command(&hedging, "turns.json"));
    let calls: Vec<&String> = hedging.iter().filter(|line| line.contains("/tail")).collect();
    let slowest = |said: String| said.lines().map(|line| line.parse::<f64>().unwrap()).fold(0.0, f64::max);
    until("calls meet the slow instance", || match slowest(traffic.terminal.say(calls[0])) {
        seconds if seconds >= 1.0 => Ok(()),
        seconds => Err(seconds.to_string()),
    });
    traffic.terminal.say(command(&hedging, "hedge.json"));
    let hedged = slowest(traffic.terminal.say(calls[1]));
    let hedges = traffic.terminal.say(command(&hedging, "grep hedges"));
    assert!(hedged < 0.9, "the slowest took {hedged} s: {hedges}");
    assert!(hedges.contains("outcome=\"won\""), "{hedges}");
    traffic.put_back(&hedging);

    let overload = traffic.page("overload.md");
    traffic.terminal.say(command(&overload, "limits.json"));
    until("what matters least is refused", || {
        traffic.terminal.say(command(&overload, "/hold"));
        traffic.terminal.say(command(&overload, "sleep"));
        match traffic.terminal.say(command(&overload, "sheddable")) {
            said if said.contains(" 503") && said.contains("x-weft-overflow: priority") => Ok(()),
            said => Err(said),
        }
    });
    let plain = traffic.terminal.say(command(&overload, "/plain"));
    assert!(plain.contains(" 503") && plain.contains("x-weft-overflow: priority"), "{plain}");
    let high = traffic.terminal.say(command(&overload, "priority: high"));
    assert!(high.contains("200 OK"), "{high}");
    let why = traffic.terminal.say(command(&overload, "weft why"));
    assert!(why.contains(" of 5 requests"), "{why}");
    assert!(traffic.terminal.say(command(&overload, "balancer_overflow")).contains("limit=\"priority\""));
    traffic.put_back(&overload);

    let faults = traffic.page("faults.md");
    traffic.terminal.say(command(&faults, "faults.json"));
    until("half of them fail", || {
        let said = traffic.terminal.say(command(&faults, "/pay"));
        if said.contains("503") && said.contains("200") { Ok(()) } else { Err(said) }
    });
    assert!(traffic.terminal.say(command(&faults, "/cut")).contains("curl: (5"), "not cut");
    let began = Instant::now();
    traffic.terminal.say(command(&faults, "time curl"));
    assert!(began.elapsed() >= Duration::from_millis(300));
    traffic.put_back(&faults);
    assert!(!traffic.terminal.say(command(&faults, "/cut")).contains("curl: ("), "still cut");
}

#[test]
fn the_page_about_udp_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let page = blocks(&fs::read_to_string(dir.join("examples/udp/README.md")).unwrap()).concat();
    let mut terminal = Terminal::open(&lab.host(1), &dir);
    for start in ["weft agent", "7101 echo-1", "7102 echo-2"] {
        terminal.start(command(&page, start));
    }
    until("one instance answers five times", || {
        let said = terminal.say(command(&page, "9494 100 5"));
        let lines: Vec<&str> = said.lines().collect();
        let is_one = lines.len() == 5 && lines.iter().all(|line| *line == lines[0]);
        if is_one && said.starts_with("echo-") && said.ends_with("got 100 bytes") { Ok(()) } else { Err(said) }
    });
    let large = terminal.say(command(&page, "60000"));
    assert_eq!(large.matches("no answer").count(), 2, "{large}");
    let counted = terminal.say(command(&page, "grep"));
    let is_counted = |line: &str| line.contains("reason=\"oversize\"") && line.ends_with(" 2");
    assert!(counted.lines().any(is_counted), "{counted}");
    assert!(terminal.say(command(&page, "weft info")).contains("listening (udp)"));
}

#[test]
fn the_page_about_gateways_does_what_it_says() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let page = blocks(&fs::read_to_string(dir.join("examples/ingress/README.md")).unwrap()).concat();
    let mut terminal = Terminal::open(&lab.host(1), &dir);
    for start in ["weft agent", "7001 v1"] {
        terminal.start(command(&page, start));
    }
    until("the agent is up", || match terminal.say("weft members") {
        said if said.contains("alive") => Ok(()),
        said => Err(said),
    });
    terminal.say(command(&page, "ingress/edge.json"));
    until("the app answers by its host", || match terminal.say(command(&page, "/cart")) {
        said if said.contains("v1 /cart 200") && said.contains("x-edge: yes") => Ok(()),
        said => Err(said),
    });
    assert!(terminal.say(command(&page, "other.example")).contains(" 404 "));
    assert_eq!(terminal.say(command(&page, "/bytes")), "v1 /bytes 200");
    if program("dig").is_some() {
        let said = terminal.say(command(&page, "dig "));
        assert!(said.contains(" 8080 ") && said.contains(" 9000 "), "{said}");
    }
    assert!(terminal.say(command(&page, "gateway-services")).contains("\"GatewayKind\":\"ingress-gateway\""));
    terminal.say(command(&page, "create -deny"));
    until("the intention is in force", || match terminal.say(command(&page, "/denied")) {
        said if said.contains("edge") && !said.contains("200") => Ok(()),
        said => Err(said),
    });
    terminal.say(command(&page, "intention delete"));
    until("it is gone", || match terminal.say(command(&page, "/allowed")) {
        said if said == "v1 /allowed 200" => Ok(()),
        said => Err(said),
    });
    terminal.say(command(&page, "edge-names"));
    until("the other port is open", || match terminal.say(command(&page, "/names")) {
        said if said == "v1 /names 200" => Ok(()),
        said => Err(said),
    });
    let info = terminal.say(command(&page, "weft info"));
    assert!(info.contains("127.0.0.1:8081") && info.contains("ingress gateway edge"), "{info}");
}

#[test]
fn the_pages_about_three_hosts_and_balancing_do_what_they_say() {
    let Some(lab) = Lab::new(1) else { return };
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(temp.path());
    let host = lab.host(1);
    let page = |name: &str| blocks(&fs::read_to_string(dir.join("examples").join(name)).unwrap());
    let three = page("three-hosts/README.md");
    let open = |of: &str| Terminal::open(&host, &dir.join("examples").join(of));
    let mut agents: Vec<Terminal> = Vec::new();
    for (block, address) in three.iter().zip(["127.0.0.1", "127.0.0.2", "127.0.0.3"]) {
        let mut terminal = open("three-hosts");
        if let Some(init) = block.iter().find(|line| line.starts_with("weft ca init")) {
            terminal.say(init);
        }
        terminal.start(command(block, "weft agent"));
        until("the agent is up", || match terminal.say(&format!("weft members -http-addr {address}:8500")) {
            said if said.contains("alive") => Ok(()),
            said => Err(said),
        });
        agents.push(terminal);
    }
    let mut terminal = open("three-hosts");
    let calls = three[3].last().unwrap();
    for line in &three[3][..three[3].len() - 1] {
        let said = terminal.say(line);
        assert!(!said.to_lowercase().contains("error") && !said.contains("Usage"), "{line}: {said}");
    }
    until("both answer", || {
        let said = terminal.say(calls);
        if said.contains("web-1") && said.contains("web-2") { Ok(()) } else { Err(said) }
    });

    let balancing = page("balancing/README.md").concat();
    terminal.say("cd ../balancing");
    let write = |terminal: &mut Terminal, file: &str| {
        let line = balancing.iter().find(|line| line.contains(file)).unwrap_or_else(|| panic!("{file} is on no page"));
        let said = terminal.say(line);
        assert!(!said.to_lowercase().contains("error"), "{line}: {said}");
    };
    write(&mut terminal, "operator create");
    write(&mut terminal, "web-http.json");
    write(&mut terminal, "web-affinity.json");
    until("each user stays with one instance", || {
        let said = terminal.say(command(&balancing, "x-user"));
        let lines: Vec<&str> = said.lines().collect();
        if lines.len() == 8 && lines[..4] == lines[4..] && lines.contains(&"web-1") && lines.contains(&"web-2") {
            Ok(())
        } else {
            Err(said)
        }
    });
    write(&mut terminal, "-kind service-resolver");
    write(&mut terminal, "web-rate.json");
    until("the rate is limited", || {
        let said = terminal.say(command(&balancing, "retry-after"));
        let is_told =
            said.lines().any(|line| line.strip_prefix("429 ").is_some_and(|after| after.parse::<u32>().is_ok()));
        if is_told { Ok(()) } else { Err(said) }
    });
    write(&mut terminal, "web-cluster.json");
    until("the rate of both hosts is limited", || {
        let said = terminal.say(command(&balancing, "seq 300"));
        if said.contains("200") && said.contains("429") { Ok(()) } else { Err(said) }
    });
    assert!(terminal.say(command(&balancing, "demand_reports")).contains("weft_gossip_demand_reports_total"));
    write(&mut terminal, "web-http.json");
    write(&mut terminal, "shop-limits.json");
    until("the limit of the caller is shown", || {
        let said = terminal.say("curl -s '127.0.0.3:8500/v1/mesh/why?source=shop&destination=web'");
        if said.contains("\"Most\":50") || said.contains("\"Most\": 50") { Ok(()) } else { Err(said) }
    });
    terminal.say(command(&balancing, "kill %2"));
    let (ask, show) = (command(&balancing, "seq 40"), command(&balancing, "[a-z-]*"));
    until("the sick instance is left out", || {
        let said = format!("{} {}", terminal.say(ask), terminal.say(show));
        if said.contains("open") { Ok(()) } else { Err(said) }
    });
    terminal.say(command(&balancing, "touch"));
    let (ask, show) = (command(&balancing, "seq 80"), command(&balancing, "grep -c"));
    until("the instance that got well is back", || {
        let said = format!("{} {}", terminal.say(ask), terminal.say(show));
        if said.ends_with(" 0") && !said.contains("500") { Ok(()) } else { Err(said) }
    });
    write(&mut terminal, "-name shop");
    write(&mut terminal, "-kind service-defaults -name web");
}

//! Checks and files on real agents: reload without flapping, statuses over a restart, scripts, aliases.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, WEFT, loopback_ip, path, weft};
use crate::wait::until;

/// An issuer of its own on this run's address `last`, with files of its own.
struct Rig {
    ca: Ca,
    files: TempDir,
    agent: Agent,
    args: Vec<String>,
    last: u8,
}

impl Rig {
    fn start(last: u8, files: &[(&str, &str)], extra: &[&str]) -> Self {
        let ca = Ca::init("checks.test");
        let dir = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let mut args = vec!["-issuer".to_owned(), path(&ca.issuer()).to_owned()];
        args.extend(["-config-dir".to_owned(), path(dir.path()).to_owned()]);
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        let agent = Agent::start(&Spec::loopback(last, "n1", &words));
        Self { ca, files: dir, agent, args, last }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.files.path().join(name);
        fs::write(&file, text).unwrap();
        file
    }

    /// Runs `weft reload`; how it ended, and what it said to standard error.
    fn reload(&self) -> (bool, String) {
        let out = weft(&["reload", "-http-addr", &self.agent.api.to_string()]);
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    }

    fn check(&self, id: &str) -> Value {
        self.agent.get("/v1/agent/checks")[id].clone()
    }

    #[track_caller]
    fn wait_status(&self, id: &str, want: &str) {
        until(&format!("{id} is {want}"), || {
            let check = self.check(id);
            if check["Status"] == want { Ok(()) } else { Err(check.to_string()) }
        });
    }

    /// Ends the agent by a signal and starts it again with its data.
    fn restart(mut self) -> Self {
        self.agent.signal(Signal::SIGTERM);
        self.agent.wait_exit();
        let words: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let data = self.agent.kill();
        let agent = Agent::spawn(&Spec::loopback(self.last, "n1", &words), data);
        agent.wait_ready();
        Self { agent, ..self }
    }
}

/// The number of a process, from the file that it writes it to.
#[track_caller]
fn pid_in(file: &Path) -> i32 {
    until("the script says its number", || {
        let text = fs::read_to_string(file).map_err(|error| error.to_string())?;
        text.trim().parse().map_err(|_| text)
    })
}

#[test]
fn a_reload_touches_what_changed_and_nothing_else() {
    let app = TcpListener::bind((loopback_ip(60), 0)).unwrap();
    let target = app.local_addr().unwrap();
    let web = |notes: &str| {
        format!(
            "service {{\n  name = \"web\"\n  port = 80\n  check {{\n    tcp = \"{target}\"\n    interval = \"1s\"\n    notes = \"{notes}\"\n  }}\n}}\n"
        )
    };
    let disk = "check {\n  id = \"disk\"\n  name = \"disk\"\n  ttl = \"1h\"\n  status = \"passing\"\n}\n";
    let db = "service {\n  name = \"db\"\n  port = 81\n}\n";
    let rig = Rig::start(60, &[("web.hcl", &web("a")), ("db.hcl", db), ("disk.hcl", disk)], &[]);
    rig.wait_status("service:web", "passing");
    rig.agent.put_ok("/v1/agent/service/register", r#"{"Name":"api","Port":82,"Check":{"TTL":"1h"}}"#);
    // What the catalogue shows follows what the agent shows.
    rig.agent.wait_passing("web", &["web"]);
    let index = || rig.agent.get("/v1/health/service/web")[0]["Service"]["ModifyIndex"].clone();
    let before = index();

    // SIGHUP: one service goes, one comes, web is not touched.
    fs::remove_file(rig.files.path().join("db.hcl")).unwrap();
    rig.file("cache.json", r#"{"services": [{"name": "cache", "port": 83}]}"#);
    rig.agent.signal(Signal::SIGHUP);
    until("the files are read", || {
        let services = rig.agent.get("/v1/agent/services");
        let names: Vec<&String> = services.as_object().unwrap().keys().collect();
        if names == ["api", "cache", "web"] { Ok(()) } else { Err(format!("{names:?}")) }
    });
    assert_eq!(index(), before, "web was not published again");

    // A changed check keeps its status at the moment of the change, though its run comes later.
    rig.file("web.hcl", &web("b").replace("1s", "1h"));
    assert_eq!(rig.check("disk")["Status"], "passing");
    fs::remove_file(rig.files.path().join("disk.hcl")).unwrap();
    assert_eq!(rig.reload(), (true, String::new()));
    assert_eq!(rig.check("disk"), Value::Null, "a check of a file that is gone is gone");
    let check = rig.check("service:web");
    assert_eq!((&check["Status"], &check["Notes"]), (&"passing".into(), &"b".into()));

    // What takes a restart is named; the log level does not.
    rig.file("agent.hcl", "log_level = \"debug\"\ndatacenter = \"dc9\"\n");
    let (done, said) = rig.reload();
    assert!(done && said.contains("datacenter changed: it takes a restart"), "{said}");
    assert!(!said.contains("log_level"), "{said}");
    until("the log has details", || if rig.agent.log().contains("DEBUG") { Ok(()) } else { Err(String::new()) });

    // A bad file changes nothing, and is named with its line.
    rig.file("cache.json", "{\"services\": [{\"name\": \"other\", \"port\": 83}]}");
    let bad = rig.file(
        "z.hcl",
        "service {\n  name = \"z\"\n  check {\n    http = \"http://x\"\n    intervall = \"1s\"\n  }\n}\n",
    );
    let (done, said) = rig.reload();
    assert!(!done && said.contains(&format!("{}:5: ", bad.display())) && said.contains("intervall"), "{said}");
    rig.agent.signal(Signal::SIGHUP);
    until("the log names the file", || {
        let log = rig.agent.log();
        if log.contains("configuration is not reloaded") { Ok(()) } else { Err(log) }
    });
    assert!(rig.agent.get("/v1/agent/services")["cache"].is_object(), "nothing is taken of the other files either");
    let out = weft(&["validate", path(rig.files.path())]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains(":5: "), "{}", String::from_utf8_lossy(&out.stderr));

    // An ID of the API's is not taken over.
    fs::remove_file(&bad).unwrap();
    rig.file("cache.json", r#"{"service": {"name": "api", "port": 1}}"#);
    let (done, said) = rig.reload();
    assert!(!done && said.contains("registered by the API"), "{said}");
}

#[test]
fn statuses_and_maintenance_outlast_a_restart() {
    let file = "service {\n  name = \"db\"\n  port = 81\n  check {\n    ttl = \"1h\"\n  }\n}\n";
    let rig = Rig::start(61, &[("db.hcl", file)], &[]);
    rig.agent.put_ok("/v1/agent/service/register", r#"{"Name":"web","Port":80,"Check":{"TTL":"1h"}}"#);
    rig.agent.put_ok("/v1/agent/check/pass/service:web", "");
    rig.agent.put_ok("/v1/agent/check/warn/service:db", "");
    rig.agent.put_ok("/v1/agent/service/maintenance/web?enable=true&reason=disk", "");
    let rig = rig.restart();
    let of = |id: &str| rig.check(id)["Status"].clone();
    assert_eq!((of("service:web"), of("service:db")), ("passing".into(), "warning".into()));
    let maintenance = rig.check("_service_maintenance:web");
    assert_eq!((&maintenance["Status"], &maintenance["Notes"]), (&"critical".into(), &"disk".into()));
    let health = |wanted: &str| rig.agent.try_get(&format!("/v1/agent/health/service/{wanted}?format=text")).unwrap();
    assert_eq!((health("id/web").status, health("id/web").body.as_str()), (503, "maintenance"));
    assert_eq!(health("name/db").status, 429);
    rig.agent.put_ok("/v1/agent/service/maintenance/web?enable=false", "");
    assert_eq!(health("id/web").status, 200);
    assert_eq!(health("id/nope").status, 404);
}

#[test]
fn a_script_is_run_only_if_allowed_and_killed_with_its_group() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("pid");
    let line = format!("sleep 600 & echo $$ > {}.new; mv {0}.new {0}; wait", file.display());
    let local = format!(
        "enable_local_script_checks = true\ncheck {{\n  name = \"hangs\"\n  args = [\"sh\", \"-c\", \"{line}\"]\n  interval = \"1s\"\n  timeout = \"1s\"\n}}\n"
    );
    let rig = Rig::start(62, &[("checks.hcl", &local)], &[]);
    let leader = pid_in(&file);
    until("the check tells of the timeout", || {
        let output = rig.check("hangs")["Output"].to_string();
        if output.contains("killed after the timeout of 1s") { Ok(()) } else { Err(output) }
    });
    let group = nix::unistd::Pid::from_raw(leader);
    until("the group of the first run is gone", || match nix::sys::signal::killpg(group, None) {
        Err(_) => Ok(()),
        Ok(()) => Err(format!("group {group} lives")),
    });
    let body = r#"{"Name":"api","Args":["true"],"Interval":"1s"}"#;
    let answer = rig.agent.put("/v1/agent/check/register", body);
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert!(answer.body.contains("enable_script_checks"), "{}", answer.body);
    let docker = r#"{"Name":"d","DockerContainerID":"x","Args":["true"],"Interval":"1s"}"#;
    assert_eq!(rig.agent.put("/v1/agent/check/register", docker).status, 400);

    // With the right, and stopped in the middle of a run: nothing stays behind.
    rig.file("checks.hcl", "enable_script_checks = true\n");
    assert!(rig.reload().0);
    assert_eq!(rig.check("hangs"), Value::Null);
    fs::remove_file(&file).unwrap();
    let value = serde_json::json!({"Name": "slow", "Args": ["sh", "-c", line], "Interval": "1s", "Timeout": "10m"});
    rig.agent.put_ok("/v1/agent/check/register", &value.to_string());
    let group = nix::unistd::Pid::from_raw(pid_in(&file));
    rig.agent.put_ok("/v1/agent/check/deregister/slow", "");
    until("the group of the removed check is gone", || match nix::sys::signal::killpg(group, None) {
        Err(_) => Ok(()),
        Ok(()) => Err(format!("group {group} lives")),
    });
    rig.agent.put_ok("/v1/agent/check/register", &body.replace("api", "e"));
    rig.wait_status("e", "passing");
}

#[test]
fn an_alias_follows_a_service_of_its_node_and_of_another() {
    let rig = Rig::start(63, &[], &[]);
    let token = rig.ca.token("n2", "*", "1h");
    let join = loopback_ip(63).to_string();
    let n2 = Agent::start(&Spec::loopback(64, "n2", &["-join", &join, "-token", &token]));
    rig.agent.wait_members(&["n1=1", "n2=1"]);
    for agent in [&rig.agent, &n2] {
        agent.put_ok("/v1/agent/service/register", r#"{"Name":"db","Port":80,"Check":{"TTL":"1h"}}"#);
    }
    rig.agent.put_ok("/v1/agent/check/register", r#"{"Name":"own","AliasService":"db"}"#);
    let far = r#"{"Name":"web","Port":81,"Check":{"CheckID":"far","AliasNode":"n2","AliasService":"db"}}"#;
    rig.agent.put_ok("/v1/agent/service/register", far);
    rig.agent.put_ok("/v1/agent/check/pass/service:db", "");
    assert_eq!(rig.check("own")["Status"], "passing", "at once");
    rig.wait_status("far", "critical");
    n2.put_ok("/v1/agent/check/pass/service:db", "");
    rig.wait_status("far", "passing");
    rig.agent.put_ok("/v1/agent/check/fail/service:db", "");
    assert_eq!(rig.check("own")["Status"], "critical");
    n2.put_ok("/v1/agent/check/warn/service:db", "");
    rig.wait_status("far", "warning");
    n2.kill();
    rig.wait_status("far", "critical");
}

#[test]
fn the_unit_file_reloads_by_the_signal_that_the_agent_takes() {
    let unit = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/weft.service")).unwrap();
    assert!(unit.lines().any(|line| line == "ExecReload=/bin/kill --signal HUP $MAINPID"));
    let help = std::process::Command::new(WEFT).args(["reload", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&help.stdout).contains("weft validate"), "the help names the next step");
}

//! Real agents: the binary, started by its command line.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::http::{Answer, request};
use crate::lab::Host;
use crate::wait::until;

/// The binary under test.
pub(crate) const WEFT: &str = env!("CARGO_BIN_EXE_weft");

/// Runs `weft` to its end.
pub(crate) fn weft(args: &[&str]) -> Output {
    Command::new(WEFT).args(args).env_remove("WEFT_HTTP_ADDR").output().expect("the binary starts")
}

/// Runs `weft`, which must succeed, and returns its standard output.
#[track_caller]
pub(crate) fn weft_ok(args: &[&str]) -> String {
    let out = weft(args);
    assert!(out.status.success(), "weft {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A mesh CA in a directory of its own.
pub(crate) struct Ca {
    dir: TempDir,
}

impl Ca {
    /// Runs `weft ca init`.
    #[track_caller]
    pub(crate) fn init(trust_domain: &str) -> Self {
        let dir = TempDir::new().unwrap();
        weft_ok(&["ca", "init", "-dir", path(&dir.path().join("ca")), "-trust-domain", trust_domain]);
        Self { dir }
    }

    /// The CA's directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// The first issuer's directory.
    pub(crate) fn issuer(&self) -> PathBuf {
        self.dir().join("issuer-1")
    }

    /// Runs `weft token create`.
    #[track_caller]
    pub(crate) fn token(&self, node: &str, serve: &str, ttl: &str) -> String {
        self.token_under(Vec::new(), node, serve, ttl)
    }

    /// Runs `weft token create` at another wall time: see [`at_offset`].
    #[track_caller]
    pub(crate) fn token_at(&self, offset: &str, node: &str, serve: &str, ttl: &str) -> String {
        self.token_under(at_offset(offset), node, serve, ttl)
    }

    #[track_caller]
    fn token_under(&self, mut words: Vec<String>, node: &str, serve: &str, ttl: &str) -> String {
        let dir = self.dir();
        let verb = [WEFT, "token", "create", "-ca", path(&dir), "-node", node, "-serve", serve, "-ttl", ttl];
        words.extend(owned(&verb));
        let out = Command::new(&words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{words:?}: {e}"));
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let token = text.lines().find(|line| line.starts_with("weft1-"));
        token.unwrap_or_else(|| panic!("no token in: {text}")).trim().to_owned()
    }
}

/// What to put before a command line that is to see wall time moved by `offset` (`+90m`, `-2h`, `+31d`); monotonic clocks go
/// on as they are. Not `faketime` itself: killed, it leaves a semaphore behind, and refuses to run when its process number
/// comes round again.
pub(crate) fn at_offset(offset: &str) -> Vec<String> {
    let libraries = std::fs::read_dir("/usr/lib").expect("/usr/lib can be listed");
    let mut candidates = libraries.flatten().map(|entry| entry.path().join("faketime/libfaketime.so.1"));
    let library = candidates.find(|path| path.exists()).expect("libfaketime is installed (package faketime)");
    let preload = format!("LD_PRELOAD={}", path(&library));
    let offset = format!("FAKETIME={offset}");
    owned(&["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DISABLE_SHM=1", &offset, &preload])
}

/// Returns a path as text.
pub(crate) fn path(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// How to start an agent.
pub(crate) struct Spec<'a> {
    /// Its node name.
    pub(crate) name: &'a str,
    /// The namespace; none: this one.
    pub(crate) host: Option<Host>,
    /// `-bind`.
    pub(crate) bind: IpAddr,
    /// `-client`.
    pub(crate) client: IpAddr,
    /// Everything else (`-issuer`, `-join`, `-token` …).
    pub(crate) args: Vec<String>,
    /// Put before the command line: see [`at_offset`].
    pub(crate) wrap: Vec<String>,
}

impl<'a> Spec<'a> {
    /// An agent on `host`, its API on that namespace's loopback.
    pub(crate) fn on(host: &Host, name: &'a str, args: &[&str]) -> Self {
        let client = Ipv4Addr::LOCALHOST.into();
        Self { name, host: Some(host.clone()), bind: host.ip, client, args: owned(args), wrap: Vec::new() }
    }

    /// An agent on a loopback address of this host.
    pub(crate) fn loopback(last: u8, name: &'a str, args: &[&str]) -> Self {
        let ip = loopback_ip(last);
        Self { name, host: None, bind: ip, client: ip, args: owned(args), wrap: Vec::new() }
    }
}

/// A loopback address of this test process alone: runs side by side do not meet.
pub(crate) fn loopback_ip(last: u8) -> IpAddr {
    let [.., high, low] = std::process::id().to_be_bytes();
    IpAddr::from([127, 64 + high % 64, low, last])
}

/// Three numbers of loopback addresses for the demo, apart from [`loopback_ip`]'s.
pub(crate) fn demo_subnet() -> String {
    let [.., high, low] = std::process::id().to_be_bytes();
    format!("127.{}.{low}", 128 + high % 64)
}

fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|&arg| arg.to_owned()).collect()
}

/// A running agent; killed when dropped. Its data directory lives as long as this value and can be used again.
pub(crate) struct Agent {
    /// Its node name.
    pub(crate) name: String,
    child: Child,
    dir: TempDir,
    host: Option<Host>,
    /// Its HTTP API.
    pub(crate) api: SocketAddr,
}

impl Agent {
    /// Starts an agent and waits until its API answers.
    #[track_caller]
    pub(crate) fn start(spec: &Spec<'_>) -> Self {
        let agent = Self::spawn(spec, TempDir::new().unwrap());
        agent.wait_ready();
        agent
    }

    /// Starts an agent whose API asks for a token, and waits until it answers.
    #[track_caller]
    pub(crate) fn start_with_token(spec: &Spec<'_>, token: &str) -> Self {
        let agent = Self::spawn(spec, TempDir::new().unwrap());
        until(&format!("{} answers", agent.name), || {
            let shown = [("x-consul-token", token)];
            match agent.call(agent.api, "GET", "/v1/agent/self", &shown, "") {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(format!("{} {}", answer.status, answer.body)),
                Err(why) => Err(format!("{why}; log:\n{}", agent.log())),
            }
        });
        agent
    }

    /// Starts an agent and waits for nothing.
    #[track_caller]
    pub(crate) fn spawn(spec: &Spec<'_>, dir: TempDir) -> Self {
        let mut words: Vec<String> = Vec::new();
        if let Some(host) = &spec.host {
            words.extend(owned(&["ip", "netns", "exec", &host.netns]));
        }
        words.extend(spec.wrap.iter().cloned());
        words.extend(owned(&[WEFT, "agent", "-node", spec.name]));
        if !spec.args.iter().any(|arg| arg == "-data-dir") {
            words.extend(owned(&["-data-dir", path(&dir.path().join("data"))]));
        }
        words.extend([format!("-bind={}", spec.bind), format!("-client={}", spec.client)]);
        // Tests that are not about policy let everybody call.
        if !spec.args.iter().any(|arg| arg.starts_with("-default-intention-policy")) {
            words.push("-default-intention-policy=allow".to_owned());
        }
        words.extend(spec.args.iter().cloned());
        let log = File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // A wrapper may run the agent as its own child: the group ends with it.
        command.process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{words:?}: {e}"));
        let api = SocketAddr::new(spec.client, 8500);
        Self { name: spec.name.to_owned(), child, dir, host: spec.host.clone(), api }
    }

    /// Waits until the API answers.
    #[track_caller]
    pub(crate) fn wait_ready(&self) {
        until(&format!("{} answers", self.name), || match self.try_get("/v1/agent/self") {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(format!("{} {}", answer.status, answer.body)),
            Err(why) => Err(format!("{why}; log:\n{}", self.log())),
        });
    }

    /// Runs `work` where the agent's apps live: in its namespace, if it has one.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.host {
            Some(host) => host.run(work),
            None => work(),
        }
    }

    /// Sends one request to `addr` from the agent's host.
    pub(crate) fn call(
        &self,
        addr: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer, String> {
        self.inside(|| request(addr, method, path, headers, body))
    }

    /// GET on the API.
    pub(crate) fn try_get(&self, path: &str) -> Result<Answer, String> {
        self.call(self.api, "GET", path, &[], "")
    }

    /// GET on the API, which must answer 200 with JSON.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Value {
        let answer = self.try_get(path).unwrap();
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// PUT on the API.
    #[track_caller]
    pub(crate) fn put(&self, path: &str, body: &str) -> Answer {
        self.call(self.api, "PUT", path, &[], body).unwrap()
    }

    /// PUT that must answer 200.
    #[track_caller]
    pub(crate) fn put_ok(&self, path: &str, body: &str) {
        let answer = self.put(path, body);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }

    /// The members as `name=status`, in order.
    pub(crate) fn members(&self) -> Result<Vec<String>, String> {
        let answer = self.try_get("/v1/agent/members")?;
        let list = answer.json();
        let one = |m: &Value| format!("{}={}", m["Name"].as_str().unwrap_or("?"), m["Status"]);
        let mut members: Vec<String> = list.as_array().map(|list| list.iter().map(one).collect()).unwrap_or_default();
        members.sort();
        Ok(members)
    }

    /// Waits until the members are exactly `want` (`name=status`, 1 alive, 3 left, 4 failed).
    #[track_caller]
    pub(crate) fn wait_members(&self, want: &[&str]) {
        until(&format!("{} sees {want:?}", self.name), || {
            let seen = self.members()?;
            if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }

    /// Waits until the catalogue lists exactly these nodes. A member is listed a little after it is known to live: once its
    /// own records arrived.
    #[track_caller]
    pub(crate) fn wait_nodes(&self, want: &[&str]) {
        until(&format!("{} lists the nodes {want:?}", self.name), || {
            let list = self.try_get("/v1/catalog/nodes")?.json();
            let names =
                list.as_array().into_iter().flatten().map(|node| node["Node"].as_str().unwrap_or("?").to_owned());
            let seen: Vec<String> = names.collect();
            if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }

    /// Waits until `service` has exactly these passing instances (by id).
    #[track_caller]
    pub(crate) fn wait_passing(&self, service: &str, want: &[&str]) {
        until(&format!("{} sees {want:?} passing for {service}", self.name), || {
            let list = self.try_get(&format!("/v1/health/service/{service}?passing"))?.json();
            let id = |entry: &Value| entry["Service"]["ID"].as_str().unwrap_or("?").to_owned();
            let mut seen: Vec<String> = list.as_array().map(|list| list.iter().map(id).collect()).unwrap_or_default();
            seen.sort();
            if seen == want { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal` to this agent's process.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Kills it with SIGKILL and returns its data directory.
    pub(crate) fn kill(mut self) -> TempDir {
        let _already_ended = self.child.kill();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.dir, TempDir::new().unwrap())
    }

    /// Waits for its end; returns how it ended and its log.
    #[track_caller]
    pub(crate) fn wait_exit(&mut self) -> (ExitStatus, String) {
        let name = self.name.clone();
        let status = until(&format!("{name} ends"), || match self.child.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err(format!("it runs; log:\n{}", self.log())),
        });
        (status, self.log())
    }

    /// All that it printed.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Its data directory's parent.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!(
                "-- last lines of {}'s log\n{}",
                self.name,
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        let group = format!("-{}", self.child.id());
        let _already_ended = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        let _already_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

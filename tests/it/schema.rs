//! schemathesis (PyPI) reads `api/openapi.yaml` and asks a real agent, in a network namespace of its own, whatever the document
//! allows and what it does not: seeded, bounded. Statuses must be documented, a 5xx must mean something, nothing may hang.
//! `tests/clients/schema_hooks.py` has the checks. Where schemathesis is missing (`tests/clients/install.sh`) the test says so.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, path};
use crate::clients::{found, installed};
use crate::lab::Host;

/// Cases of each endpoint in the phase that draws them: with all endpoints about a minute on two cores that have nothing else to do.
const EXAMPLES: &str = "15";
/// The same cases in every run.
const SEED: &str = "7";
/// Far above what it takes: beyond it something hangs.
const LONGEST: Duration = Duration::from_mins(10);

/// A network namespace with loopback alone: what a generated address or check names is nowhere.
struct Nowhere(Host);

impl Nowhere {
    fn new() -> Option<Self> {
        let host = Host { netns: format!("wf{}-api", std::process::id()), ip: Ipv4Addr::LOCALHOST.into() };
        let ip =
            |args: &[&str]| Command::new("ip").args(args).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
        if ip(&["netns", "add", &host.netns]) && ip(&["-n", &host.netns, "link", "set", "lo", "up"]) {
            return Some(Self(host));
        }
        assert!(std::env::var_os("WEFT_REQUIRE_NETNS").is_none_or(|v| v != "1"), "no network namespaces");
        eprintln!("SKIPPED: needs root and network namespaces");
        None
    }
}

impl Drop for Nowhere {
    fn drop(&mut self) {
        let _gone = Command::new("ip").args(["netns", "del", &self.0.netns]).status();
    }
}

#[test]
fn whatever_the_document_allows_is_answered_as_it_says() {
    let Some([schemathesis]) = found("schemathesis", [installed("py/bin/schemathesis")]) else { return };
    let Some(nowhere) = Nowhere::new() else { return };
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (ca, dir) = (Ca::init("schema.test"), TempDir::new().unwrap());
    let kv = dir.path().join("kv.hcl");
    std::fs::write(&kv, "kv { enabled = true }\n").unwrap();
    let agent = Agent::start(&Spec {
        name: "n1",
        host: Some(nowhere.0.clone()),
        bind: loopback,
        client: loopback,
        args: ["-issuer", path(&ca.issuer()), "-config-file", path(&kv)].map(str::to_owned).to_vec(),
        wrap: Vec::new(),
    });
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let begun = Instant::now();
    let out = Command::new("timeout")
        .arg(LONGEST.as_secs().to_string())
        .args(["ip", "netns", "exec", &nowhere.0.netns])
        .arg(&schemathesis)
        .arg("run")
        .arg(root.join("api/openapi.yaml"))
        .args(["--url", &format!("http://{}", agent.api), "--workers", "2", "--no-color", "--no-shrink"])
        .args(["--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", SEED])
        .args(["--checks", "status_code_conformance,no_surprise,errors_are_text", "--request-timeout", "15"])
        .args(["--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"])
        .args(["--generation-database", "none"])
        // The one ends the agent, the other ends when its reader does.
        .args(["--exclude-path", "/v1/agent/leave", "--exclude-path", "/v1/agent/monitor"])
        .env("SCHEMATHESIS_HOOKS", "schema_hooks")
        .env("PYTHONPATH", root.join("tests/clients"))
        .current_dir(dir.path())
        .output()
        .expect("timeout runs");
    let text = String::from_utf8_lossy(&out.stdout);
    let told = format!("{text}\n{}", String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "after {:?}:\n{told}", begun.elapsed());
    assert!(text.contains("No issues found") || text.contains("passed"), "it checked something:\n{told}");
    println!("schemathesis took {:?}\n{text}", begun.elapsed());
    // It is well, and nobody else's words were lost on it.
    agent.wait_members(&["n1=1"]);
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}

//! Who may import whom: walks src/ and holds every `crate::` path against the rules of src/ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module, and what it may import.
type Rule = (&'static str, &'static [&'static str]);

/// What each module may import of the crate's modules; a module that stands not here fails the test.
fn rules() -> BTreeMap<&'static str, &'static [&'static str]> {
    const FOUNDATION: &[&str] = &["clock", "model", "wire"];
    let mut rules = BTreeMap::from([
        ("model", &[][..]),
        ("clock", &[]),
        ("alarm", &["clock"]),
        ("wire", &["model"]),
        ("supervise", &[]),
        ("unix_socket", &[]),
        ("hearsay", &[]),
        ("metrics", &[]),
        ("telemetry", &[]),
        ("pki", FOUNDATION),
        ("authz", &["model"]),
        ("policy", &["authz", "clock", "model", "pki", "traffic", "upstream", "wire"]),
        ("lww", &["model"]),
        ("membership", FOUNDATION),
        ("replica", FOUNDATION),
        // Expressions over paths have the bounds of those in intentions.
        ("upstream", &["authz", "model"]),
        ("trace", &["clock", "model"]),
        // The host's roots are `pki`'s.
        ("otlp", &["clock", "metrics", "pki", "supervise", "telemetry", "trace"]),
        ("routing", &["model", "catalogue", "clock", "upstream"]),
        ("traffic", &["authz", "filter", "model"]),
        ("catalogue", &["authz", "model", "replica", "traffic", "upstream"]),
        // Rows of what all agents share, executed against the snapshot.
        ("prepared", &["catalogue", "lww", "model"]),
        ("store", &["model", "wire", "clock", "registry"]),
        ("join", &["clock", "hearsay", "model", "pki", "policy", "wire", "transport"]),
        ("transport", &["alarm", "clock", "hearsay", "metrics", "model", "pki", "supervise"]),
        ("registry", &["catalogue", "clock", "metrics", "model", "pki", "store", "supervise", "telemetry", "wire"]),
        (
            "gossip",
            &[
                "alarm",
                "authz",
                "catalogue",
                "clock",
                "hearsay",
                "lww",
                "membership",
                "metrics",
                "model",
                "pki",
                "policy",
                "registry",
                "replica",
                "store",
                "supervise",
                "telemetry",
                "traffic",
                "transport",
                "upstream",
                "wire",
            ],
        ),
        // No input or output: the simulator runs it.
        ("gossip/engine", &["clock", "membership", "model", "replica", "store", "wire"]),
        (
            "proxy",
            &[
                "authz",
                "catalogue",
                "clock",
                "hearsay",
                "metrics",
                "model",
                "pki",
                "routing",
                "telemetry",
                "trace",
                "traffic",
                "transport",
                "upstream",
            ],
        ),
    ]);
    rules.extend(outer_rules());
    rules
}

/// Those of what stands around the mesh: interfaces, and what reads the configuration.
fn outer_rules() -> Vec<Rule> {
    vec![
        (
            "api",
            &[
                "authz",
                "catalogue",
                "clock",
                "filter",
                "gossip",
                "hearsay",
                "lww",
                "metrics",
                "model",
                "pki",
                "policy",
                "prepared",
                "registry",
                "supervise",
                "telemetry",
                "traffic",
                "unix_socket",
                "upstream",
            ],
        ),
        ("filter", &["model"]),
        ("dns", &["catalogue", "clock", "metrics", "model", "prepared", "supervise"]),
        ("workload", &["clock", "metrics", "model", "pki", "registry", "supervise", "telemetry", "unix_socket"]),
        // Of api, dns, otlp, trace and workload: the form of their own blocks.
        (
            "config",
            &[
                "api",
                "authz",
                "dns",
                "gossip",
                "model",
                "otlp",
                "registry",
                "telemetry",
                "trace",
                "unix_socket",
                "workload",
            ],
        ),
    ]
}

/// Modules that may import everything: the composition root.
const ROOTS: &[&str] = &["node", "lib", "fuzz"];

#[test]
fn every_module_imports_only_what_its_rule_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rules = rules();
    let (mut problems, mut imports) = (Vec::new(), 0);
    for file in rust_files(&root) {
        let inside = file.strip_prefix(&root).unwrap();
        let top = inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        let part = inside.parent().unwrap().to_str().unwrap();
        // A part of a module may have a rule of its own.
        let module = if rules.contains_key(part) { part } else { top };
        if ROOTS.contains(&module) || file.ends_with("fuzz.rs") {
            continue;
        }
        let Some(allowed) = rules.get(module) else {
            problems.push(format!("{}: module `{module}` has no rule", inside.display()));
            continue;
        };
        for (number, target) in imported(&fs::read_to_string(&file).unwrap()) {
            imports += 1;
            // Agents are built without `fuzz`: no code of theirs can use it.
            if target != module && target != "fuzz" && !allowed.contains(&target.as_str()) {
                problems.push(format!("{}:{number}: `{module}` may not import `{target}`", inside.display()));
            }
        }
    }
    assert!(imports > 50, "the walk found only {imports} imports: it no longer reads the sources");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn no_module_leads_back_to_itself_but_the_registry_and_its_store() {
    let rules = rules();
    let leads_back = |start: &str| {
        let (mut seen, mut ahead) = (BTreeSet::new(), vec![start]);
        while let Some(module) = ahead.pop() {
            let allowed = rules.get(module).copied().unwrap_or_default();
            if allowed.contains(&start) {
                return true;
            }
            ahead.extend(allowed.iter().filter(|next| seen.insert(**next)));
        }
        false
    };
    let circles: Vec<&str> = rules.keys().copied().filter(|module| leads_back(module)).collect();
    // What is registered is kept as it was defined.
    assert_eq!(circles, ["registry", "store"]);
}

#[test]
fn bincode_is_named_in_wire_alone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let names: Vec<PathBuf> = rust_files(&root)
        .into_iter()
        .filter(|file| {
            fs::read_to_string(file)
                .unwrap()
                .lines()
                .any(|l| !l.trim_start().starts_with("//") && l.contains("bincode::"))
        })
        .collect();
    assert_eq!(names, [root.join("wire.rs")]);
}

#[test]
fn pure_cores_read_no_clock_and_name_no_task_socket_or_source_of_randomness() {
    const FORBIDDEN: [&str; 6] = ["clock::now", "clock::wall", "rand::random", "rand::rng()", "std::net::Udp", "quinn"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut problems = Vec::new();
    const CORES: [&str; 12] = [
        "membership",
        "replica",
        "gossip/engine",
        "policy",
        "authz",
        "routing",
        "upstream",
        "filter",
        "traffic",
        "lww",
        "proxy/udp/share.rs",
        "proxy/udp/table.rs",
    ];
    for core in CORES {
        for file in rust_files(&root.join(core)) {
            let source = fs::read_to_string(&file).unwrap();
            let code = source.lines().enumerate().take_while(|(_, line)| line.trim() != "#[cfg(test)]");
            let is_simulation = file.components().any(|part| part.as_os_str() == "sim") || file.ends_with("sim.rs");
            let is_test = is_simulation || file.ends_with("tests.rs") || file.ends_with("fuzz.rs");
            for (at, line) in code.filter(|(_, line)| !is_test && !line.trim_start().starts_with("//")) {
                let tokio = line.contains("tokio::") && !line.contains("tokio::time::Instant");
                if tokio || FORBIDDEN.iter().any(|name| line.contains(name)) {
                    problems.push(format!("{}:{}: {}", file.display(), at + 1, line.trim()));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    if dir.is_file() {
        return vec![dir.to_owned()];
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The first segments of all `crate::…` paths outside comments and outside the tests at a file's end.
fn imported(source: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, line) in source.lines().enumerate() {
        if line.trim() == "#[cfg(test)]" {
            break;
        }
        if line.trim_start().starts_with("//") {
            continue;
        }
        for part in line.split("crate::").skip(1) {
            let names = match part.strip_prefix('{') {
                Some(list) => list.split(',').map(str::trim).collect(),
                None => vec![part],
            };
            for name in names {
                let name: String = name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                if !name.is_empty() && name.chars().next().is_some_and(char::is_lowercase) {
                    found.push((at + 1, name));
                }
            }
        }
    }
    found
}

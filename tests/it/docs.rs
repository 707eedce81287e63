//! The documents say what the program does.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::agent::{path, weft};

/// Every `weft_…` metric name in double quotes under src/.
fn metrics_in_source(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            metrics_in_source(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let code = source.split("#[cfg(test)]").next().unwrap_or_default();
            found.extend(code.split('"').filter(|text| is_metric(text)).map(str::to_owned));
        }
    }
}

fn is_metric(text: &str) -> bool {
    text.starts_with("weft_")
        && text.len() > 8
        && text.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut source = BTreeSet::new();
    metrics_in_source(&root.join("src"), &mut source);
    let text = fs::read_to_string(root.join("api/metrics.md")).unwrap();
    let documented: BTreeSet<String> = text
        .lines()
        .filter(|l| l.starts_with("| `weft_"))
        .filter_map(|l| l.split('`').nth(1))
        .map(str::to_owned)
        .collect();
    assert!(source.len() > 20, "found only {} metrics in the sources", source.len());
    let missing: Vec<_> = source.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&source).collect();
    assert!(missing.is_empty() && stale.is_empty(), "not in api/metrics.md: {missing:?}; not in src/: {stale:?}");
}

#[test]
fn the_readme_names_the_two_commands_that_exist() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(readme.contains("cargo run --release -- demo") && readme.contains("\ncargo test "));
    assert!(readme.contains("a stolen node can write any key"), "the README says what is not protected");
}

/// Adds the name of every function under `dir`.
fn functions_in_source(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions_in_source(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let names = source.lines().filter_map(|line| line.split_once("fn ")?.1.split(['(', '<']).next());
            found.extend(names.map(str::to_owned));
        }
    }
}

/// Whether a word in backquotes is the name of a test: a sentence of five words or more.
fn is_test_name(text: &str) -> bool {
    let is_name = text.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit());
    is_name && text.matches('_').count() >= 4 && !text.starts_with("weft_")
}

#[test]
fn the_map_names_tests_that_exist_and_those_of_every_scenario() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut functions = BTreeSet::new();
    for dir in ["src", "tests"] {
        functions_in_source(&root.join(dir), &mut functions);
    }
    let text = fs::read_to_string(root.join("src/ARCHITECTURE.md")).unwrap();
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    let named: BTreeSet<String> = quoted.filter(|text| is_test_name(text)).map(str::to_owned).collect();
    let stale: Vec<_> = named.difference(&functions).collect();
    assert!(stale.is_empty(), "named in src/ARCHITECTURE.md and not there: {stale:?}");
    let scenarios: Vec<_> = functions.iter().filter(|name| name.starts_with("scenario_")).collect();
    assert!(scenarios.len() > 50, "found only {} tests of scenarios", scenarios.len());
    let missing: Vec<_> = scenarios.into_iter().filter(|name| !named.contains(*name)).collect();
    assert!(missing.is_empty(), "tests of scenarios that src/ARCHITECTURE.md does not name: {missing:?}");
    for number in 1..=17 {
        assert!(text.contains(&format!("\n| {number} | ")), "src/ARCHITECTURE.md has no row of scenario {number}");
    }
}

/// The pieces of configuration of a page: its blocks of HCL, and what stands in backquotes as `key { … = … }`.
fn configuration_of(page: &str) -> (Vec<String>, Vec<String>) {
    let blocks = page.split("```hcl\n").skip(1).filter_map(|rest| rest.split("```").next());
    let is_piece = |text: &&str| {
        let key = text.split([' ', '{']).next().unwrap_or_default();
        let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        is_key && text.contains('{') && text.contains(" = ") && text.ends_with('}') && !text.contains(" … ")
    };
    let lines = page.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter(is_piece);
    (blocks.map(str::to_owned).collect(), lines.map(str::to_owned).collect())
}

#[test]
fn what_the_pages_show_of_configuration_is_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = fs::read_dir(root.join("api")).unwrap().map(|entry| entry.unwrap().path());
    let pages = pages.chain([root.join("README.md"), root.join("deploy/README.md")]);
    let dir = tempfile::TempDir::new().unwrap();
    let mut count = 0;
    let mut wrong = Vec::new();
    for page in pages.filter(|page| page.extension().is_some_and(|end| end == "md")) {
        let (blocks, lines) = configuration_of(&fs::read_to_string(&page).unwrap());
        for (piece, is_whole) in blocks.iter().map(|text| (text, false)).chain(lines.iter().map(|text| (text, true))) {
            let file = dir.path().join("piece.hcl");
            fs::write(&file, piece).unwrap();
            let said = weft(&["validate", path(&file)]);
            let said = String::from_utf8_lossy(&said.stderr);
            // Values may be left out, and blocks may be config entries.
            if said.contains("no valid HCL") || (is_whole && said.contains("is not known")) {
                wrong.push(format!("{}: {piece}: {said}", page.display()));
            }
            count += 1;
        }
    }
    assert!(count > 10, "found only {count} pieces");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

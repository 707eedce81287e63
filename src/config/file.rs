//! Config files to JSON values: HCL and JSON say the same.
//!
//! HCL attributes must be plain values: there are no variables and no functions to refer to. A block that stands once
//! is an object, one that is repeated a list; blocks that Consul reads as lists are lists even when alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hcl::eval::{Context, Evaluate};
use hcl::structure::Structure;
use serde_json::{Map, Value};

use super::locate::line_of;
use super::problem::{Problem, Source};
use crate::telemetry::Chain;

/// Largest config file: hundreds of services with their checks fit many times over.
pub const FILE_BYTES_MAX: usize = 1024 * 1024;
/// Deepest nesting of brackets: parsing recurses, and real files need about six.
const NESTING_MAX: usize = 64;
/// Most operator characters on a line: in HCL each one recurses, and a plain value needs one (`-1`). Rulers in comments
/// and long names with dashes stay far below.
const OPERATORS_MAX: usize = 256;
/// Most files in one config directory: an entry per service, with room.
const DIRECTORY_FILES_MAX: usize = 4096;
/// Blocks that are lists however often they stand.
const LIST_BLOCKS: [&str; 4] = ["services", "checks", "upstreams", "Upstreams"];

/// A parsed file: its path and its top-level keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Where it was read.
    pub path: Arc<Path>,
    /// Its content.
    pub root: Map<String, Value>,
}

/// The languages of a config file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Language {
    Hcl,
    Json,
}

/// Lists the config files of a directory in lexical order: `*.hcl` and `*.json`, not recursively.
///
/// # Errors
/// If the directory cannot be read or holds too many files.
pub fn list_directory(dir: &Path) -> Result<Vec<PathBuf>, Problem> {
    let path: Arc<Path> = Arc::from(dir);
    let refuse = |err: std::io::Error| Problem::file(&path, format!("cannot be read as a directory: {err}"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(refuse)? {
        let file = entry.map_err(refuse)?.path();
        if language_of(&file).is_some() && file.is_file() {
            files.push(file);
        }
        if files.len() > DIRECTORY_FILES_MAX {
            return Err(Problem::file(&path, format!("holds more than {DIRECTORY_FILES_MAX} config files")));
        }
    }
    files.sort();
    Ok(files)
}

/// Reads one config file; the language follows from its name.
///
/// # Errors
/// Every reason why the file cannot be used.
pub fn read_document(file: &Path) -> Result<Document, Vec<Problem>> {
    let path: Arc<Path> = Arc::from(file);
    let (language, text) = read_text(&path).map_err(|rule| vec![Problem::file(&path, rule)])?;
    parse(&path, &text, language)
}

/// As [`read_document`]; `-` is standard input, in JSON if it begins with `{` and else in HCL.
///
/// # Errors
/// As [`read_document`].
pub fn read_document_or_input(file: &Path) -> Result<Document, Vec<Problem>> {
    if file != Path::new("-") {
        return read_document(file);
    }
    let path: Arc<Path> = Arc::from(Path::new("standard input"));
    let text = bounded_text(std::io::stdin().lock()).map_err(|rule| vec![Problem::file(&path, rule)])?;
    let language = if text.trim_start().starts_with('{') { Language::Json } else { Language::Hcl };
    parse(&path, &text, language)
}

/// Adds to each problem the line where its key stands, as far as its file can still be read.
pub(super) fn locate(problems: &mut [Problem]) {
    let mut texts: BTreeMap<Arc<Path>, Option<(Language, String)>> = BTreeMap::new();
    for problem in problems {
        let Source::File(path) = &problem.source else { continue };
        if problem.line.is_some() || problem.key.is_empty() {
            continue;
        }
        let text = texts.entry(Arc::clone(path)).or_insert_with(|| read_text(path).ok());
        let line = text.as_ref().and_then(|(language, text)| line_of(text, *language, &problem.key));
        problem.line = line;
    }
}

fn read_text(file: &Path) -> Result<(Language, String), String> {
    let open = std::fs::File::open(file).map_err(|err| format!("cannot be read: {err}"))?;
    let language = language_of(file).ok_or_else(|| "a config file is named *.hcl or *.json".to_owned())?;
    Ok((language, bounded_text(open)?))
}

fn bounded_text(from: impl std::io::Read) -> Result<String, String> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(FILE_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
    from.take(limit).read_to_end(&mut bytes).map_err(|err| format!("cannot be read: {err}"))?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(format!("is larger than {FILE_BYTES_MAX} bytes"));
    }
    String::from_utf8(bytes).map_err(|err| format!("is not UTF-8: {err}"))
}

/// Parses `text` as the file `path` would be.
#[cfg(test)]
pub(super) fn parse_text(path: &Path, text: &str) -> Result<Document, Vec<Problem>> {
    let path: Arc<Path> = Arc::from(path);
    match language_of(&path) {
        Some(language) => parse(&path, text, language),
        None => Err(vec![Problem::file(&path, "a config file is named *.hcl or *.json")]),
    }
}

fn language_of(file: &Path) -> Option<Language> {
    match file.extension()?.to_str()? {
        "hcl" => Some(Language::Hcl),
        "json" => Some(Language::Json),
        _ => None,
    }
}

fn parse(path: &Arc<Path>, text: &str, language: Language) -> Result<Document, Vec<Problem>> {
    let fail = |rule: String| vec![Problem::file(path, rule)];
    if let Some(reason) = too_deep(text) {
        return Err(fail(reason));
    }
    let root = match language {
        Language::Json => match serde_json::from_str(text)
            .map_err(|err| vec![Problem::file(path, format!("is no valid JSON: {err}")).on_line(err.line().max(1))])?
        {
            Value::Object(root) => root,
            _ => return Err(fail("must hold one JSON object".to_owned())),
        },
        Language::Hcl => {
            let body = hcl::parse(text).map_err(|err| vec![not_hcl(path, &err)])?;
            let mut hcl = HclReader { path, problems: Vec::new() };
            let root = hcl.body(&body, "");
            if !hcl.problems.is_empty() {
                return Err(hcl.problems);
            }
            root
        }
    };
    Ok(Document { path: Arc::clone(path), root })
}

fn not_hcl(path: &Arc<Path>, err: &hcl::Error) -> Problem {
    match err {
        hcl::Error::Parse(err) => {
            // Not the line itself: it may hold a secret.
            let (at, message) = (err.location(), err.message());
            let mut rule = format!("is no valid HCL: {message}, at column {}", at.column());
            // Consul reads a block with all its attributes on one line.
            if err.line().contains('{') {
                rule += "; on one line write a block as `key = { a = 1, b = 2 }`, or give each attribute its own line";
            }
            Problem::file(path, rule).on_line(at.line())
        }
        err => Problem::file(path, format!("is no valid HCL: {}", Chain(err))),
    }
}

/// Says why the text nests too deeply to be parsed by recursion, if it does. Brackets in texts count too.
fn too_deep(text: &str) -> Option<String> {
    let (mut depth, mut operators) = (0_usize, 0_usize);
    for byte in text.bytes() {
        match byte {
            b'{' | b'[' | b'(' => depth += 1,
            b'}' | b']' | b')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        match byte {
            b'!' | b'-' | b'?' => operators += 1,
            b'\n' | b',' | b'"' => operators = 0,
            _ => {}
        }
        if depth > NESTING_MAX {
            return Some(format!("nests more than {NESTING_MAX} brackets"));
        }
        if operators > OPERATORS_MAX {
            return Some(format!("has more than {OPERATORS_MAX} operators on a line"));
        }
    }
    None
}

/// Turns HCL into JSON, noting what is no plain value.
struct HclReader<'a> {
    path: &'a Arc<Path>,
    problems: Vec<Problem>,
}

impl HclReader<'_> {
    fn refuse(&mut self, key: &str, rule: impl Into<String>) {
        let source = super::problem::Source::File(Arc::clone(self.path));
        self.problems.push(Problem::new(source, key, None, rule));
    }

    fn body(&mut self, body: &hcl::Body, parent: &str) -> Map<String, Value> {
        let mut object = Map::new();
        let mut attributes = Vec::new();
        for structure in body {
            let name = match structure {
                Structure::Attribute(attribute) => attribute.key(),
                Structure::Block(block) => block.identifier(),
            };
            let mut key = parent.to_owned();
            let dot = if parent.is_empty() { "" } else { "." };
            // Writing to a String cannot fail.
            let _written = write!(key, "{dot}{name}");
            match structure {
                Structure::Attribute(attribute) => {
                    let Some(value) = self.expression(attribute.expr(), &key) else { continue };
                    if object.insert(name.to_owned(), value).is_some() {
                        self.refuse(&key, "is given more than once");
                    }
                    attributes.push(name);
                }
                Structure::Block(block) => {
                    if !block.labels().is_empty() {
                        self.refuse(&key, "takes no label: write the name inside the block, as `name = \"…\"`");
                    }
                    let value = Value::Object(self.body(block.body(), &key));
                    if attributes.contains(&name) {
                        self.refuse(&key, "is given both as a value and as a block");
                        continue;
                    }
                    add_block(&mut object, name, value);
                }
            }
        }
        object
    }

    fn expression(&mut self, expression: &hcl::Expression, key: &str) -> Option<Value> {
        let value = match expression.evaluate(&Context::new()) {
            Ok(value) => value,
            Err(err) => {
                self.refuse(key, format!("must be a plain value: {}", Chain(&err)));
                return None;
            }
        };
        match serde_json::to_value(value) {
            Ok(value) => Some(value),
            Err(err) => {
                self.refuse(key, format!("cannot be represented: {err}"));
                None
            }
        }
    }
}

/// Adds a block to its parent: the second of a name makes a list.
fn add_block(object: &mut Map<String, Value>, name: &str, value: Value) {
    match object.get_mut(name) {
        Some(Value::Array(list)) => list.push(value),
        Some(first) => {
            let first_value = first.take();
            *first = Value::Array(vec![first_value, value]);
        }
        None if LIST_BLOCKS.contains(&name) => {
            object.insert(name.to_owned(), Value::Array(vec![value]));
        }
        None => {
            object.insert(name.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn hcl(text: &str) -> Result<Value, String> {
        match parse_text(Path::new("a.hcl"), text) {
            Ok(document) => Ok(Value::Object(document.root)),
            Err(problems) => Err(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        }
    }

    #[test]
    fn blocks_and_attributes_become_json() {
        let text = r#"
            node_name = "web-1" # a comment
            ports { mesh = 8301 }
            node_meta = { rack = "a1" }
            retry_join = ["10.0.0.1", "10.0.0.2"]
            shift = -1
            service {
              name = "web"
              check { http = "http://127.0.0.1:80/" }
              proxy {
                upstreams { destination_name = "db" }
              }
            }
            service { name = "db" }
        "#;
        let want = json!({
            "node_name": "web-1", "ports": {"mesh": 8301}, "node_meta": {"rack": "a1"},
            "retry_join": ["10.0.0.1", "10.0.0.2"], "shift": -1,
            "service": [
                {"name": "web", "check": {"http": "http://127.0.0.1:80/"},
                 "proxy": {"upstreams": [{"destination_name": "db"}]}},
                {"name": "db"},
            ],
        });
        assert_eq!(hcl(text), Ok(want));
    }

    #[test]
    fn what_is_no_plain_value_is_refused_by_key() {
        #[track_caller]
        fn check(text: &str, want: &str) {
            let refused = hcl(text).unwrap_err();
            assert!(refused.contains(want), "{refused}");
        }
        check("node_name = var.name", "a.hcl: node_name: must be a plain value");
        check("ports { http = env(\"P\") }", "a.hcl: ports.http: must be a plain value");
        check("service \"web\" {}", "a.hcl: service: takes no label");
        check("a = ", "a.hcl:1: is no valid HCL");
        check("service { name = \"web\" port = 80 }", "write a block as `key = { a = 1, b = 2 }`");
        check("a = 1\na {}\n", "a");
    }

    #[test]
    fn every_bad_expression_of_a_file_is_reported() {
        let refused = hcl("a = x\nb = y\nc = 1\n").unwrap_err();
        assert_eq!(refused.lines().filter(|line| line.contains("must be a plain value")).count(), 2, "{refused}");
    }

    #[test]
    fn absurd_nesting_is_refused_before_it_is_parsed() {
        for text in
            ["[".repeat(100_000), "a = ".to_owned() + &"!".repeat(100_000), "a = ".to_owned() + &"-".repeat(100_000)]
        {
            assert!(hcl(&text).is_err());
            assert!(parse_text(Path::new("a.json"), &text).is_err());
        }
    }

    #[test]
    fn the_deepest_text_that_is_let_through_fits_the_stack() {
        for text in
            ["!".repeat(OPERATORS_MAX) + "true", "-".repeat(OPERATORS_MAX) + "1", "1?1:".repeat(OPERATORS_MAX) + "1"]
        {
            let _parsed = hcl(&format!("# {}\na = {text}\n", "-".repeat(100)));
        }
        let _parsed = hcl(&("a = ".to_owned() + &"[".repeat(NESTING_MAX) + &"]".repeat(NESTING_MAX)));
        assert!(hcl("# !\n").is_ok() && hcl(&format!("#{}\na = {}", "-".repeat(100), "!".repeat(100_000))).is_err());
    }

    #[test]
    fn other_names_and_other_shapes_are_refused() {
        assert!(parse_text(Path::new("a.yaml"), "{}").is_err());
        assert!(parse_text(Path::new("a.json"), "[]").is_err());
        assert!(read_document(Path::new("/nonexistent/a.hcl")).is_err());
    }

    #[test]
    fn a_directory_is_read_in_lexical_order_without_other_files() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.hcl", "a.json", "c.hcl.bak", "README", "10.hcl"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> =
            list_directory(dir.path()).unwrap().iter().map(|f| f.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["10.hcl", "a.json", "b.hcl"]);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in "(?s).{0,200}") {
            let _unused = parse_text(Path::new("a.hcl"), &text);
            let _unused = parse_text(Path::new("a.json"), &text);
        }

        #[test]
        fn text_made_of_hcl_tokens_is_parsed_or_refused_without_a_panic(
            tokens in prop::collection::vec(prop::sample::select(vec![
                "a", "service", "{", "}", "[", "]", "=", "\"", "${", "%{", "<<E\n", "\nE\n", "1", "-", "!", "?", ":",
                "for", "in", "if", ".", ",", "\n", "#", "(", ")", "1e999", "null", "==", "/*", "*/", " ",
            ]), 0..40),
        ) {
            let _unused = parse_text(Path::new("a.hcl"), &tokens.concat());
        }
    }
}

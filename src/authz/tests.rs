//! Decisions against a naive reference, and the rules that it is easy to get wrong.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::model::ServiceName;

fn guard(intention: Intention) -> Arc<Guard> {
    Arc::new(Guard::compile(intention, Origin::default()).unwrap())
}

fn table(default: Action, intentions: &[Intention]) -> Table {
    Table::new(default, intentions.iter().cloned().map(guard), Vec::new())
}

fn service(name: &str) -> ServiceName {
    name.parse().unwrap()
}

fn plain(source: &str, destination: &str, action: Action) -> Intention {
    Intention::plain(source.parse().unwrap(), destination.parse().unwrap(), action)
}

#[track_caller]
fn check(table: &Table, source: Option<&str>, destination: &str, want: Action, rule: &str) {
    let source = source.map(service);
    let decision = table.of_stream(source.as_ref(), &service(destination), |_, _| unreachable!());
    assert_eq!((decision.action, decision.rule()), (want, rule));
}

#[test]
fn the_most_exact_intention_decides_alone() {
    let all = [
        plain("*", "*", Action::Deny),
        plain("web", "*", Action::Allow),
        plain("*", "db", Action::Deny),
        plain("web", "db", Action::Allow),
    ];
    let table = table(Action::Allow, &all);
    check(&table, Some("web"), "db", Action::Allow, "web:db");
    check(&table, Some("api"), "db", Action::Deny, "*:db");
    check(&table, Some("web"), "mail", Action::Allow, "web:*");
    check(&table, Some("api"), "mail", Action::Deny, "*:*");
    check(&table, None, "db", Action::Deny, "*:db");
    check(&table, None, "mail", Action::Deny, "*:*");
    check(&Table::empty(Action::Allow), Some("a"), "b", Action::Allow, "default");
    check(&Table::empty(Action::Deny), Some("a"), "b", Action::Deny, "default");
    assert_eq!(all.map(|one| one.precedence()), [5, 6, 8, 9]);
}

#[test]
fn an_audited_intention_tells_and_the_next_one_decides() {
    let mut audited = plain("web", "db", Action::Deny);
    audited.mode = Mode::Audit;
    let table = table(Action::Deny, &[audited, plain("*", "db", Action::Allow)]);
    let mut told = Vec::new();
    let (web, db) = (service("web"), service("db"));
    let decision = table.of_stream(Some(&web), &db, |guard, action| told.push((guard.name().to_string(), action)));
    assert_eq!((decision.action, decision.rule()), (Action::Allow, "*:db"));
    assert_eq!(told, [("web:db".to_owned(), Action::Deny)]);
}

fn with_permissions(permissions: &serde_json::Value) -> Intention {
    from_json(&json!({"SourceName": "web", "DestinationName": "db", "Permissions": permissions}), None).unwrap()
}

#[track_caller]
fn ask(table: &Table, method: &str, path: &str, headers: &[(&'static str, &str)]) -> Action {
    let headers: HeaderMap = headers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
        .collect();
    let request = Request { method, path, headers: &headers };
    table.of_request(Some(&service("web")), &service("db"), &request, |_, _| {}).action
}

#[test]
fn permissions_look_at_the_request_in_order_and_leave_the_rest_to_the_default() {
    let intention = with_permissions(&json!([
        {"Action": "deny", "HTTP": {"PathPrefix": "/admin"}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/", "Methods": ["GET", "HEAD"]}},
        {"Action": "allow", "HTTP": {"PathRegex": "/v[0-9]+/items", "Methods": ["POST"],
            "Header": [{"Name": "x-team", "Prefix": "shop"}, {"Name": "x-debug", "Present": true, "Invert": true}]}},
    ]));
    let table = table(Action::Deny, &[intention]);
    for (method, path, headers, want) in [
        ("GET", "/a?b", &[][..], Action::Allow),
        ("GET", "/admin/x", &[], Action::Deny),
        ("GET", "/a/../admin", &[], Action::Deny),
        ("GET", "/admin/../a", &[], Action::Deny),
        ("GET", "/%61dmin", &[], Action::Deny),
        ("GET", "//admin", &[], Action::Deny),
        ("GET", "/x/%2e%2e/admin", &[], Action::Deny),
        ("GET", "/a//../b", &[], Action::Deny),
        ("GET", "/Admin", &[], Action::Allow),
        ("get", "/a", &[], Action::Deny),
        ("GET", "/a/b/../c", &[], Action::Allow),
        ("GET", "/a%2fb", &[], Action::Deny),
        ("PUT", "/a", &[], Action::Deny),
        ("POST", "/v1/items", &[("x-team", "shop-1")], Action::Allow),
        ("POST", "/v1/items/x", &[("x-team", "shop-1")], Action::Deny),
        ("POST", "/v1/items", &[("x-team", "mail")], Action::Deny),
        ("POST", "/v1/items", &[("x-team", "shop"), ("x-debug", "")], Action::Deny),
    ] {
        assert_eq!(ask(&table, method, path, headers), want, "{method} {path} {headers:?}");
    }
    let decision = table.of_stream(Some(&service("web")), &service("db"), |_, _| {});
    assert_eq!((decision.action, decision.rule()), (Action::Deny, "web:db"), "nobody sees a stream's requests");
}

#[test]
fn a_regex_matches_the_whole_path_and_a_bad_or_huge_one_is_refused() {
    let regex = |text: &str| with_permissions(&json!([{"Action": "allow", "HTTP": {"PathRegex": text}}]));
    let whole = table(Action::Deny, &[regex("/a|/b")]);
    for (path, want) in [("/a", Action::Allow), ("/b", Action::Allow), ("/ax", Action::Deny), ("/x/b", Action::Deny)] {
        assert_eq!(ask(&whole, "GET", path, &[]), want, "{path}");
    }
    for bad in ["(", "/a)|(?:.*", "((((a{100}){100}){100}){100})", r"(?=x)", r"\1"] {
        let refused = Guard::compile(regex(bad), Origin::default()).unwrap_err();
        assert!(matches!(refused, CompileError::Regex { .. }), "{bad}: {refused}");
        assert!(!refused.to_string().contains('\n'), "one line for the log: {refused}");
    }
}

#[test]
fn a_denied_method_is_denied_in_any_writing() {
    let table = table(
        Action::Deny,
        &[with_permissions(&json!([
            {"Action": "deny", "HTTP": {"Methods": ["DELETE"]}},
            {"Action": "allow", "HTTP": {"PathPrefix": "/"}},
        ]))],
    );
    for (method, want) in [("DELETE", Action::Deny), ("delete", Action::Deny), ("PUT", Action::Allow)] {
        assert_eq!(ask(&table, method, "/a", &[]), want, "{method}");
    }
}

#[test]
fn an_expression_is_not_tried_on_more_than_its_bound() {
    let table = table(
        Action::Deny,
        &[with_permissions(&json!([
            {"Action": "deny", "HTTP": {"PathRegex": "/admin.*"}},
            {"Action": "deny", "HTTP": {"Header": [{"Name": "x-a", "Regex": "b.*"}]}},
            {"Action": "allow", "HTTP": {"PathPrefix": "/"}},
        ]))],
    );
    let (short, long) = ("a".repeat(4095), "a".repeat(4096));
    for (path, value, want) in [
        (format!("/{short}"), &short, Action::Allow),
        (format!("/{long}"), &short, Action::Deny),
        ("/".to_owned(), &format!("{long}a"), Action::Deny),
    ] {
        assert_eq!(ask(&table, "GET", &path, &[("x-a", value)]), want, "{} and {} bytes", path.len(), value.len());
    }
}

#[test]
fn the_worst_expressions_that_compile_are_matched_in_bounded_time() {
    // Each is exponential where expressions are matched by trying; here the work is at most size x length.
    let worst = json!([
        {"Action": "allow", "HTTP": {"PathRegex": "/(a|a)*(a|a)*(a|a)*(a|a)*b"}},
        {"Action": "allow", "HTTP": {"PathRegex": "/(a*)*(a*)*c"}},
        {"Action": "allow", "HTTP": {"PathRegex": "/.*a[ab]{300}d"}},
    ]);
    let table = table(Action::Deny, &[with_permissions(&worst)]);
    let path = format!("/{}", "a".repeat(4000));
    // Tried one way after the other, any of them would not end within a lifetime.
    assert_eq!(ask(&table, "GET", &path, &[]), Action::Deny);
}

/// The definition, word by word, with nothing prepared.
fn naive(default: Action, all: &[Intention], source: Option<&str>, destination: &str) -> (Action, String) {
    let fits = |party: &Party, name: Option<&str>| party.is_any() || name == Some(party.as_str());
    let mut fitting: Vec<&Intention> =
        all.iter().filter(|one| fits(&one.source, source) && fits(&one.destination, Some(destination))).collect();
    fitting.sort_by_key(|one| std::cmp::Reverse(one.precedence()));
    let decides = fitting.into_iter().find(|one| one.mode == Mode::Enforce);
    let action = |one: &Intention| if one.rule == Rule::Action(Action::Allow) { Action::Allow } else { Action::Deny };
    decides.map_or((default, "default".to_owned()), |one| (action(one), one.name()))
}

fn some_intention() -> impl Strategy<Value = Intention> {
    let name = || prop_oneof![Just("*"), Just("a"), Just("b"), Just("c"), Just("d")];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    (name(), name(), action, prop_oneof![3 => Just(Mode::Enforce), 1 => Just(Mode::Audit)])
        .prop_map(|(source, destination, action, mode)| Intention { mode, ..plain(source, destination, action) })
}

proptest! {
    #[test]
    fn a_table_decides_as_the_naive_reference_does(
        drawn in proptest::collection::vec(some_intention(), 0..24), allows: bool,
        calls in proptest::collection::vec((0usize..5, 0usize..5), 1..16),
    ) {
        // One of each name, as the documents' names make sure.
        let mut all: Vec<Intention> = Vec::new();
        for one in drawn {
            all.retain(|other| other.name() != one.name());
            all.push(one);
        }
        let default = if allows { Action::Allow } else { Action::Deny };
        let table = table(default, &all);
        for (source, destination) in calls {
            let source = [None, Some("a"), Some("b"), Some("c"), Some("x")][source];
            let destination = ["a", "b", "c", "d", "y"][destination];
            let named = source.map(service);
            let decision = table.of_stream(named.as_ref(), &service(destination), |_, _| {});
            prop_assert_eq!((decision.action, decision.rule().to_owned()), naive(default, &all, source, destination));
        }
    }
}

/// One test of a path or a value, as an operator writes it and as the definition reads it. Expressions are a table: what they
/// mean is said beside them.
fn fits(kind: &str, text: &str, value: &str) -> bool {
    match (kind, text) {
        ("Exact", text) => value == text,
        ("Prefix", text) => value.starts_with(text),
        ("Suffix", text) => value.ends_with(text),
        ("Contains", text) => value.contains(text),
        ("Regex", "/a(/.*)?") => value == "/a" || value.starts_with("/a/"),
        ("Regex", "[^b]*") => !value.contains('b'),
        ("Regex", "shop|bo?ok") => ["shop", "book", "bok"].contains(&value),
        _ => unreachable!("{kind} {text}"),
    }
}

/// How a text is tested, and which.
type Test = (&'static str, &'static str);

#[derive(Debug, Clone)]
struct Rules {
    action: Action,
    path: Option<Test>,
    methods: Vec<&'static str>,
    /// Name, test (none: present), inverted.
    headers: Vec<(&'static str, Option<Test>, bool)>,
}

fn one_of<T: Clone + std::fmt::Debug + 'static>(of: &'static [T]) -> impl Strategy<Value = T> {
    proptest::sample::select(of)
}

fn some_rules() -> impl Strategy<Value = Rules> {
    let paths = one_of(&[
        ("Exact", "/a"),
        ("Prefix", "/a"),
        ("Prefix", "/"),
        ("Exact", "/a/b"),
        ("Regex", "/a(/.*)?"),
        ("Regex", "[^b]*"),
    ]);
    let tests = one_of(&[
        ("Exact", "shop"),
        ("Prefix", "s"),
        ("Suffix", "k"),
        ("Contains", "oo"),
        ("Regex", "shop|bo?ok"),
        ("Regex", "[^b]*"),
    ]);
    let header = (one_of(&["x-a", "x-b"]), proptest::option::of(tests), any::<bool>());
    let methods = proptest::collection::vec(one_of(&["GET", "PUT", "DELETE"]), 0..3);
    let action = one_of(&[Action::Allow, Action::Deny]);
    (action, proptest::option::of(paths), methods, proptest::collection::vec(header, 0..3))
        .prop_map(|(action, path, methods, headers)| Rules { action, path, methods, headers })
}

impl Rules {
    fn to_json(&self) -> serde_json::Value {
        let mut http = json!({"Methods": self.methods});
        if let Some((kind, text)) = self.path {
            http[format!("Path{kind}")] = json!(text);
        }
        let header = |(name, test, invert): &(&str, Option<Test>, bool)| {
            let mut shape = json!({"Name": name, "Invert": invert});
            match test {
                None => shape["Present"] = json!(true),
                Some((kind, text)) => shape[*kind] = json!(text),
            }
            shape
        };
        http["Header"] = self.headers.iter().map(header).collect();
        json!({"Action": self.action.as_str(), "HTTP": http})
    }

    /// The definition: every test must pass; of a header's values one.
    fn holds(&self, method: &str, path: &str, headers: &[(&'static str, &str)]) -> bool {
        let header = |(name, test, invert): &(&str, Option<Test>, bool)| {
            let mut values = headers.iter().filter(|(own, _)| own == name).map(|(_, value)| value);
            let passes = match test {
                None => values.next().is_some(),
                Some((kind, text)) => values.any(|value| fits(kind, text, value)),
            };
            passes != *invert
        };
        self.path.is_none_or(|(kind, text)| fits(kind, text, path))
            && (self.methods.is_empty() || self.methods.contains(&method))
            && self.headers.iter().all(header)
    }
}

proptest! {
    #[test]
    fn permissions_decide_as_the_naive_reference_does(
        drawn in proptest::collection::vec(some_rules(), 1..6), allows: bool,
        method in one_of(&["GET", "PUT", "DELETE", "HEAD"]),
        path in one_of(&["/", "/a", "/a/b", "/ab", "/a/c/b", "/c"]),
        query in one_of(&["", "?", "?x=/a/../b", "?%2f"]),
        headers in proptest::collection::vec((one_of(&["x-a", "x-b"]), one_of(&["shop", "book", "bok", "k", "", "ship"])), 0..4),
    ) {
        let default = if allows { Action::Allow } else { Action::Deny };
        let permissions: serde_json::Value = drawn.iter().map(Rules::to_json).collect();
        let table = table(default, &[with_permissions(&permissions)]);
        let found = drawn.iter().find(|rules| rules.holds(method, path, &headers));
        let asked: Vec<(&'static str, &str)> = headers.clone();
        let map: HeaderMap = asked.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect();
        let target = format!("{path}{query}");
        let request = Request { method, path: &target, headers: &map };
        let decision = table.of_request(Some(&service("web")), &service("db"), &request, |_, _| {});
        prop_assert_eq!(decision.action, found.map_or(default, |rules| rules.action), "{:?}", drawn);
        prop_assert_eq!(decision.rule(), "web:db");
    }
}

/// The path as an app may read it: any of the four steps taken or left out, in their usual order.
fn reading(path: &str, steps: u8) -> String {
    let mut text = path.split('?').next().unwrap().to_owned();
    if steps & 1 != 0 {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'%' {
                bytes.push(byte);
                continue;
            }
            let digits = [rest.next(), rest.next()].map(|digit| char::from(digit.unwrap_or(b'x')).to_digit(16));
            let [Some(high), Some(low)] = digits else { return text };
            bytes.push(u8::try_from(high * 16 + low).unwrap());
        }
        let Ok(decoded) = String::from_utf8(bytes) else { return text };
        text = decoded;
    }
    if steps & 2 != 0 {
        text = text.split('/').map(|segment| segment.split(';').next().unwrap()).collect::<Vec<_>>().join("/");
    }
    if steps & 4 != 0 {
        while text.contains("//") {
            text = text.replace("//", "/");
        }
    }
    if steps & 8 != 0 {
        // RFC 3986 §5.2.4: an empty segment is one that `..` takes away.
        let mut kept: Vec<&str> = Vec::new();
        let segments: Vec<&str> = text.split('/').skip(1).collect();
        for (at, segment) in segments.iter().enumerate() {
            let is_last = at + 1 == segments.len();
            match *segment {
                "." => {}
                ".." => drop(kept.pop()),
                other => kept.push(other),
            }
            if is_last && matches!(*segment, "." | "..") {
                kept.push("");
            }
        }
        text = format!("/{}", kept.join("/"));
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn a_path_that_passes_leads_nowhere_forbidden_however_an_app_reads_it(
        pieces in proptest::collection::vec(
            one_of(&["/", "/", "a", "b", "admin", "..", ".", ";", ";x", "%2e", "%61", "%2f", "%25", "%", "//", "%3b"]), 0..10),
    ) {
        let target = format!("/{}", pieces.concat());
        let deny = json!({"Action": "deny", "HTTP": {"PathPrefix": "/admin"}});
        let deny_below = json!({"Action": "deny", "HTTP": {"PathPrefix": "/a/b"}});
        let all = json!({"Action": "allow", "HTTP": {"PathPrefix": "/"}});
        let some = json!({"Action": "allow", "HTTP": {"PathPrefix": "/a/"}});
        for (permissions, is_forbidden) in [
            (json!([deny, deny_below, all]), (|path| path.starts_with("/admin") || path.starts_with("/a/b")) as fn(&str) -> bool),
            (json!([some]), |path| !path.starts_with("/a/")),
        ] {
            let table = table(Action::Deny, &[with_permissions(&permissions)]);
            if ask(&table, "GET", &target, &[]) == Action::Allow {
                for steps in 0..16 {
                    let read = reading(&target, steps);
                    prop_assert!(!is_forbidden(&read), "{} passes and may be read as {} ({:04b})", target, read, steps);
                }
            }
        }
    }
}

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
    }
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

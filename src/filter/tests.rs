use proptest::prelude::*;

use super::fuzz::instance;
use super::*;
use crate::model::Instance;

#[track_caller]
fn is_match(text: &str) -> bool {
    Filter::parse::<Instance>(text).unwrap_or_else(|error| panic!("{text}: {error}")).is_match(&instance())
}

#[track_caller]
fn refused(text: &str) -> FilterError {
    match Filter::parse::<Instance>(text) {
        Ok(filter) => panic!("{text} was taken as {filter}"),
        Err(error) => error,
    }
}

#[test]
fn every_operator_answers_by_the_type_of_its_field() {
    for text in [
        "",
        "  \t",
        "Service.Service == web",
        "Service.Service == \"web\"",
        "Service.Service == `web`",
        "Service.Service != db",
        "Service.ID == web-1",
        "eb in Service.Service",
        "Service.Service contains eb",
        "db not in Service.Service",
        "Service.Service not contains db",
        "Service.Service matches \"^w.b$\"",
        "Service.Service matches `^\\w+$`",
        "Service.Service not matches `\\d`",
        "Service.Kind is empty",
        "Service.Service is not empty",
        "v1 in Service.Tags",
        "Service.Tags contains blue",
        "\"v\" not in Service.Tags",
        "Service.Tags is not empty",
        "rack in Service.Meta",
        "Service.Meta contains \"a.b\"",
        "Service.Meta.rack == r1",
        "Service.Meta[\"rack\"] == r1",
        "Service.Meta[\"a.b\"] == dotted",
        "Node.Meta.zone matches `z[0-9]`",
        "Node.Node == n1 and Node.Datacenter == dc1",
        "Service.Port == 8080",
        "Service.Port != -1",
        "Service.Weights.Passing == 10",
        "Service.EnableTagOverride == true",
        "Service.EnableTagOverride != FALSE",
        "lan in Service.TaggedAddresses",
        "Service.TaggedAddresses.lan.Address == 10.1.0.7",
        "Service.TaggedAddresses[\"lan\"].Port == 80",
        "Checks is not empty",
    ] {
        assert!(is_match(text), "{text}");
        if !text.trim().is_empty() {
            assert!(!is_match(&format!("not ({text})")), "{text}");
        }
    }
}

#[test]
fn what_is_not_there_equals_nothing_and_is_empty() {
    for text in [
        "Service.Meta.none != r1",
        "Service.Meta.none is empty",
        "x not in Service.Meta.none",
        "Service.Meta.none not matches `.*`",
        "Service.TaggedAddresses.wan.Port != 80",
    ] {
        assert!(is_match(text), "{text}");
        assert!(!is_match(&format!("not {text}")), "{text}");
    }
    assert!(!is_match("Service.Meta.none == \"\""));
}

#[test]
fn and_binds_tighter_than_or_and_not_tighter_than_both() {
    const YES: &str = "Service.Port == 8080";
    const NO: &str = "Service.Port == 1";
    for (text, want) in [
        (format!("{YES} or {YES} and {NO}"), true),
        (format!("({YES} or {YES}) and {NO}"), false),
        (format!("not {NO} and {NO}"), false),
        (format!("not ({NO} and {NO})"), true),
        (format!("not not {YES}"), true),
        (format!("{NO} and {NO} or {YES}"), true),
        (format!("\n(({YES}))and\t{YES}"), true),
    ] {
        assert_eq!(is_match(&text), want, "{text}");
    }
}

#[test]
fn an_error_names_the_place_and_what_would_be_right() {
    #[track_caller]
    fn check(text: &str, parts: &[&str]) {
        let error = refused(text).to_string();
        for part in parts {
            assert!(error.contains(part), "{text}: {error}");
        }
    }
    check("Service.Servce == web", &["selector Service.Servce is not valid", "Service.Service", "Node.Meta"]);
    check("Service.Port.x == 1", &["selector Service.Port.x is not valid"]);
    check("Service.Meta.a.b == 1", &["Service.Meta.a.b is a map of texts", "NAME[\"key\"]"]);
    check("Service.Tags == v1", &["Service.Tags is a list of texts: it takes in"]);
    check("Service.Port matches `1`", &["Service.Port is a number: it takes =="]);
    check("Service.Port is empty", &["Service.Port is a number"]);
    check("x in Checks", &["Checks is a list of records"]);
    check("Service.Port == http", &["a whole number", "\"http\""]);
    check("Service.EnableTagOverride == yes", &["true or false", "\"yes\""]);
    check("Service.Service ==", &["at character 19", "a value", "found the end"]);
    check("Service.Service = web", &["at character 17", "'='"]);
    check("Service.Service web", &["at character 17", "an operator", "\"web\""]);
    check("(Service.Port == 1", &["`)`", "the end"]);
    check("Service.Port == 1)", &["at character 18", "the end", "\")\""]);
    check("Service.Service == \"web", &["a closing quote"]);
    check("Service.Service == `web", &["a closing `"]);
    check("Service.Service matches \"\\d\"", &["an escape", "`…`"]);
    check("Service.Service matches `(`", &["regular expression", "unclosed group"]);
    check("ä == 1", &["at character 1", "in quotes"]);
    check("any Service.Tags as t { t == v1 }", &["at character"]);
}

#[test]
fn length_depth_and_regular_expressions_are_bounded() {
    let long = format!("Service.Service == {}", "x".repeat(EXPRESSION_BYTES_MAX));
    assert_eq!(refused(&long), FilterError::TooLong { found: long.len() });
    let nested = |depth: usize| format!("{}Service.Port == 1{}", "(".repeat(depth), ")".repeat(depth));
    assert!(!is_match(&nested(DEPTH_MAX)));
    assert_eq!(refused(&nested(DEPTH_MAX + 1)), FilterError::TooDeep);
    assert_eq!(refused(&format!("{}Service.Port == 1", "not ".repeat(DEPTH_MAX + 1))), FilterError::TooDeep);
    let many = |count: usize| vec!["Service.ID matches `x`"; count].join(" or ");
    assert!(!is_match(&many(REGEXES_MAX)));
    assert_eq!(refused(&many(REGEXES_MAX + 1)), FilterError::Regexes);
    assert!(matches!(refused("Service.ID matches `(?:a{1000}){1000}`"), FilterError::Regex { .. }));
    // As many tests as the length allows are a matter of microseconds.
    let wide = vec!["a in Service.ID"; EXPRESSION_BYTES_MAX / 20].join(" or ");
    assert!(!is_match(&wide));
}

#[test]
fn every_field_of_an_instance_is_read_with_its_kind() {
    let instance = instance();
    for (name, kind) in Instance::FIELDS {
        assert_eq!(instance.value(name).kind(), Some(*kind), "{name}");
    }
    assert!(instance.value("Service.Nothing").kind().is_none());
}

/// A condition that the test decides by itself, beside the expression that says the same.
#[derive(Debug, Clone)]
struct Said {
    text: String,
    holds: bool,
}

fn said() -> impl Strategy<Value = Said> {
    let port = (8078_u16..8083).prop_map(|port| Said { text: format!("Service.Port == {port}"), holds: port == 8080 });
    let tag = "[a-z]{1,4}|v1|blue|\"|\\\\".prop_map(|tag| {
        let holds = tag == "v1" || tag == "blue";
        Said { text: format!("{} in Service.Tags", token::Quoted(&tag)), holds }
    });
    let part = "[web]{0,4}".prop_map(|part| {
        let holds = !"web".contains(&part);
        Said { text: format!("Service.Service not contains `{part}`"), holds }
    });
    let key = "rack|a\\.b|[a-z]{1,3}".prop_map(|key| {
        let holds = key == "rack" || key == "a.b";
        Said { text: format!("Service.Meta[{}] is not empty", token::Quoted(&key)), holds }
    });
    let leaf = prop_oneof![port, tag, part, key];
    leaf.prop_recursive(5, 48, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|said| Said { text: format!("not ({})", said.text), holds: !said.holds }),
            prop::collection::vec(inner.clone(), 1..4)
                .prop_map(|parts| Said { text: join_all(&parts, " and "), holds: parts.iter().all(|part| part.holds) }),
            prop::collection::vec(inner, 1..4)
                .prop_map(|parts| Said { text: join_all(&parts, " or "), holds: parts.iter().any(|part| part.holds) }),
        ]
    })
}

fn join_all(parts: &[Said], word: &str) -> String {
    parts.iter().map(|part| format!("({})", part.text)).collect::<Vec<_>>().join(word)
}

proptest! {
    #[test]
    fn an_expression_means_what_its_parts_mean(said in said()) {
        if said.text.len() <= EXPRESSION_BYTES_MAX {
            let filter = Filter::parse::<Instance>(&said.text).unwrap();
            prop_assert_eq!(filter.is_match(&instance()), said.holds);
            let again = Filter::parse::<Instance>(&filter.to_string()).unwrap();
            prop_assert_eq!(again.to_string(), filter.to_string());
            prop_assert_eq!(again.is_match(&instance()), said.holds);
        }
    }

    #[test]
    fn any_text_is_a_filter_or_an_error_and_never_a_panic(text in "\\PC{0,80}") {
        let _unused = super::fuzz::expression(text.as_bytes());
    }
}

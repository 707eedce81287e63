use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{HealthStatus, Instance, NodeInfo, ServiceRecord, TextMap, Weights, fixture};

#[track_caller]
fn ready(kind: &str, value: &Value) -> Ready {
    Ready::new(kind, value).unwrap_or_else(|problems| panic!("{kind}: {problems}"))
}

#[track_caller]
fn refused(kind: &str, value: &Value) -> String {
    Ready::new(kind, value).map(|_| ()).expect_err("it is refused").to_string()
}

/// Entries of `(kind, name, JSON)`.
fn entries(list: &[(&str, &str, Value)]) -> Entries {
    let mut entries = Entries::default();
    for (kind, name, value) in list {
        entries.add(kind, name, ready(kind, value));
    }
    entries
}

fn chain(list: &[(&str, &str, Value)], service: &str) -> Chain {
    let chain = entries(list).chain(&service.parse().unwrap());
    chain.unwrap_or_else(|problems| panic!("{problems}"))
}

fn headers(list: &[(&str, &str)]) -> HeaderMap {
    let pair =
        |(name, value): &(&str, &str)| (HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
    list.iter().map(pair).collect()
}

fn asked<'r>(method: &'r str, path: &'r str, headers: &'r HeaderMap) -> Asked<'r> {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    Asked { method, path, query, headers }
}

/// The id of the target that a request goes to, with a draw of `draw`.
fn target_of(chain: &Chain, path: &str, headers: &HeaderMap, draw: u64) -> String {
    match &chain.route(&asked("GET", path, headers)).unwrap().action {
        Action::Redirect(redirect) => format!("{}", redirect.code),
        Action::Forward(forward) => forward.split.leg(headers, draw).unwrap().to.target.id.clone(),
    }
}

fn route(http: &Value, service: &str) -> Value {
    json!({"Match": {"HTTP": http}, "Destination": {"Service": service}})
}

#[test]
fn the_first_route_that_matches_wins_by_every_kind_of_test() {
    let router = json!({"Routes": [
        route(&json!({"PathExact": "/exact"}), "exact"),
        route(&json!({"PathPrefix": "/v1/", "Methods": ["PUT"]}), "put"),
        route(&json!({"PathPrefix": "/v1/"}), "prefix"),
        route(&json!({"PathRegex": "/r[0-9]+"}), "regex"),
        route(&json!({"PathExact": "/CASE", "CaseInsensitive": true}), "case"),
        route(&json!({"Header": [{"Name": "X-A", "Exact": "1"}]}), "h-exact"),
        route(&json!({"Header": [{"Name": "x-b", "Prefix": "pre"}, {"Name": "x-b", "Suffix": "post"}]}), "h-both"),
        route(&json!({"Header": [{"Name": "x-c", "Regex": "a+"}]}), "h-regex"),
        route(&json!({"Header": [{"Name": "x-d", "Present": true}]}), "h-present"),
        route(&json!({"Header": [{"Name": "x-e", "Contains": "MID", "IgnoreCase": true}]}), "h-contains"),
        route(&json!({"QueryParam": [{"Name": "q", "Exact": "1"}]}), "q-exact"),
        route(&json!({"QueryParam": [{"Name": "p", "Present": true}]}), "q-present"),
        route(&json!({"PathPrefix": "/not", "Header": [{"Name": "x-f", "Present": true, "Invert": true}]}), "inverted"),
    ]});
    let chain = chain(&[("service-router", "web", router)], "web");
    routes_to(&chain, "GET", "/exact", &[], "exact");
    routes_to(&chain, "GET", "/exact?x=1", &[("x-a", "1")], "exact");
    routes_to(&chain, "GET", "/exact/", &[], "web");
    routes_to(&chain, "PUT", "/v1/x", &[], "put");
    routes_to(&chain, "GET", "/v1/x", &[], "prefix");
    routes_to(&chain, "GET", "/r42", &[], "regex");
    routes_to(&chain, "GET", "/r42x", &[], "web");
    routes_to(&chain, "GET", "/case", &[], "case");
    routes_to(&chain, "GET", "/", &[("x-a", "2"), ("x-a", "1")], "h-exact");
    routes_to(&chain, "GET", "/", &[("x-b", "pre-post")], "h-both");
    routes_to(&chain, "GET", "/", &[("x-b", "pre")], "web");
    routes_to(&chain, "GET", "/", &[("x-c", "aaa")], "h-regex");
    routes_to(&chain, "GET", "/", &[("x-d", "")], "h-present");
    routes_to(&chain, "GET", "/", &[("x-e", "amidst")], "h-contains");
    routes_to(&chain, "GET", "/?a=2&q=1", &[], "q-exact");
    routes_to(&chain, "GET", "/?p", &[], "q-present");
    routes_to(&chain, "GET", "/not", &[], "inverted");
    routes_to(&chain, "GET", "/not", &[("x-f", "1")], "web");
}

#[track_caller]
fn routes_to(chain: &Chain, method: &str, path: &str, given: &[(&str, &str)], want: &str) {
    let headers = headers(given);
    let route = chain.route(&asked(method, path, &headers)).unwrap();
    let Action::Forward(forward) = &route.action else { panic!("a redirect") };
    assert_eq!(forward.split.leg(&headers, 0).unwrap().to.target.id, want, "{method} {path} {given:?}");
}

/// Tests of few texts, so that rules meet, overlap and shadow each other.
fn matches() -> impl Strategy<Value = Match> {
    let word = || prop::sample::select(vec!["a", "b", "ab", "A"]);
    let path = prop::option::of(prop_oneof![
        prop::collection::vec(word(), 0..3).prop_map(|parts| TextTest::Exact(format!("/{}", parts.join("/")))),
        prop::collection::vec(word(), 0..3).prop_map(|parts| TextTest::Prefix(format!("/{}", parts.join("/")))),
        prop::sample::select(vec!["/a.*", "/[ab]", "/(a|b)/.*", ".*b"])
            .prop_map(|text| TextTest::Regex(text.to_owned())),
    ]);
    let test = move || {
        prop_oneof![
            word().prop_map(|text| TextTest::Exact(text.to_owned())),
            word().prop_map(|text| TextTest::Prefix(text.to_owned())),
            word().prop_map(|text| TextTest::Suffix(text.to_owned())),
            Just(TextTest::Present),
            Just(TextTest::Regex("a+".to_owned())),
        ]
    };
    let header =
        (prop::sample::select(vec!["x-a", "x-b"]), test(), prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    let header = header.prop_map(|(name, test, is_inverted, ignores_case)| HeaderTest {
        name: name.to_owned(),
        test,
        is_inverted,
        ignores_case,
    });
    let query = (prop::sample::select(vec!["q", "r"]), test())
        .prop_map(|(name, test)| QueryTest { name: name.to_owned(), test });
    let methods = prop::collection::vec(prop::sample::select(vec!["GET".to_owned(), "PUT".to_owned()]), 0..2);
    let lists = (prop::collection::vec(header, 0..2), prop::collection::vec(query, 0..2), methods);
    (path, prop::bool::weighted(0.2), lists).prop_map(|(path, ignores_case, (headers, query, methods))| Match {
        path,
        ignores_case,
        headers,
        query,
        methods,
    })
}

proptest! {
    #[test]
    fn the_index_finds_what_a_walk_through_all_rules_finds(
        rules in prop::collection::vec(matches(), 0..40),
        path in "(/[abA]{0,2}){1,3}",
        query in prop::option::of("[qr](=[abA]{0,2})?(&[qr]=[ab]){0,2}"),
        values in prop::collection::vec(("x-[ab]", "[abA]{0,2}"), 0..4),
        method in prop::sample::select(vec!["GET", "PUT"]),
    ) {
        let matcher = Matcher::new(&rules).unwrap();
        let list: Vec<(&str, &str)> = values.iter().map(|(name, value)| (&**name, &**value)).collect();
        let headers = headers(&list);
        let asked = Asked { method, path: &path, query: query.as_deref(), headers: &headers };
        prop_assert_eq!(matcher.first(&asked), matcher.first_of_all(&asked));
    }

    #[test]
    fn any_json_is_read_without_a_panic(text in "[\\[{:\"a-zA-Z0-9,}\\]]{0,60}", kind in prop::sample::select(KINDS.to_vec())) {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| json!({"Routes": text, "Splits": [text], "Subsets": {text: {}}}));
        drop(Ready::new(kind, &value));
    }
}

proptest! {
    // Each case draws 10,000 times.
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn weights_are_met_to_a_hundredth_of_a_percent(mut cuts in prop::collection::vec(1u16..10_000, 0..6), draws in prop::collection::vec(any::<u64>(), 20)) {
        cuts.sort_unstable();
        cuts.dedup();
        let weights: Vec<u16> = cuts.iter().copied().chain([10_000]).scan(0, |begun, until| {
            let weight = until - *begun;
            *begun = until;
            Some(weight)
        }).collect();
        let splits: Vec<Value> = weights.iter().enumerate()
            .map(|(at, weight)| json!({"Weight": f64::from(*weight) / 100.0, "Service": format!("s{at}")})).collect();
        let chain = chain(&[("service-splitter", "web", json!({"Splits": splits}))], "web");
        let none = HeaderMap::new();
        // A draw in the middle of every hundredth of a percent meets each part as often as its weight says.
        let mut met: BTreeMap<String, u16> = BTreeMap::new();
        for hundredth in 0..10_000u128 {
            let draw = u64::try_from(((hundredth * 2 + 1) << 64) / 20_000).unwrap();
            *met.entry(target_of(&chain, "/", &none, draw)).or_default() += 1;
        }
        let want: BTreeMap<String, u16> = weights.iter().enumerate().map(|(at, weight)| (format!("s{at}"), *weight)).collect();
        prop_assert_eq!(met, want);
        for draw in draws.into_iter().chain([0, u64::MAX]) {
            target_of(&chain, "/", &none, draw);
        }
    }
}

#[test]
fn splitters_that_lead_to_splitters_are_flattened_and_their_weights_multiplied() {
    let chain = chain(
        &[
            ("service-splitter", "web", json!({"Splits": [{"Weight": 25, "Service": "new"}, {"Weight": 75}]})),
            ("service-splitter", "new", json!({"Splits": [{"Weight": 0.04, "Service": "canary"}, {"Weight": 99.96}]})),
        ],
        "web",
    );
    let Action::Forward(forward) = &chain.routes[0].action else { panic!("a redirect") };
    let legs: Vec<(&str, u64)> = forward.split.legs.iter().map(|leg| (&*leg.to.target.id, leg.until)).collect();
    assert_eq!(legs, [("canary", SHARES / 10_000), ("new", SHARES / 4), ("web", SHARES)]);
}

#[test]
fn a_caller_stays_with_its_split_by_header_or_cookie_on_every_node() {
    let split = |sticky: Value| json!({"Sticky": sticky, "Splits": [{"Weight": 50, "Service": "a"}, {"Weight": 50, "Service": "b"}]});
    let by_header = chain(&[("service-splitter", "web", split(json!({"Header": "x-user"})))], "web");
    let by_cookie = chain(&[("service-splitter", "web", split(json!({"Cookie": "sid"})))], "web");
    let mut met = BTreeMap::new();
    for user in 0..1_000 {
        let user = format!("user-{user}");
        let as_header = headers(&[("x-user", &user)]);
        let cookie = format!("a=1; sid={user}; b=2");
        let as_cookie = headers(&[("cookie", &cookie)]);
        let first = target_of(&by_header, "/", &as_header, 0);
        for draw in [1, u64::MAX / 2, u64::MAX] {
            assert_eq!(target_of(&by_header, "/", &as_header, draw), first);
            assert_eq!(target_of(&by_cookie, "/", &as_cookie, draw), first);
        }
        *met.entry(first).or_insert(0) += 1;
    }
    assert!(met.values().all(|count| (450..550).contains(count)), "{met:?}");
    // The value of the hash is part of the contract: another version of weft must send callers to the same split.
    assert_eq!(stable_hash(b"user-1"), STABLE_HASH_OF_USER_1);
    let none = HeaderMap::new();
    assert_ne!(target_of(&by_header, "/", &none, 0), target_of(&by_header, "/", &none, u64::MAX));
}

const STABLE_HASH_OF_USER_1: u64 = 0x41a2_fca5_c684_01c5;

#[test]
fn resolvers_lead_through_redirects_default_subsets_and_failover() {
    let subsets = json!({"v1": {"Filter": "Service.Meta.version == v1"}, "v2": {"Filter": "Service.Meta.version == v2", "OnlyPassing": true}});
    let list = [
        (
            "service-resolver",
            "web",
            json!({"DefaultSubset": "v1", "Subsets": subsets, "ConnectTimeout": "2s", "RequestTimeout": "9s", "Failover": {
                "v2": {"Targets": [{"ServiceSubset": "v1"}, {"Service": "backup"}]},
                "*": {"Service": "backup", "Datacenters": ["dc2", "dc3"]}}}),
        ),
        ("service-resolver", "old", json!({"Redirect": {"Service": "web", "ServiceSubset": "v2"}})),
        ("service-resolver", "near", json!({"Failover": {"*": {"Datacenters": ["dc2"]}}})),
    ];
    let web = resolves_to(&list, "web", "v1.web", &["backup.dc2", "backup.dc3"]);
    assert_eq!(
        (web.connect_timeout, web.request_timeout),
        (Some(Duration::from_secs(2)), Some(Duration::from_secs(9)))
    );
    resolves_to(&list, "old", "v2.web", &["v1.web", "backup"]);
    resolves_to(&list, "near", "near.local", &["near.dc2"]);

    let takes = |target: &Target, version: &str, datacenter: &str, status| {
        target.takes(&instance(version, datacenter, status), "dc1")
    };
    let v2 = &chain(&list, "old").stream.target;
    assert!(
        takes(&web.target, "v1", "dc1", HealthStatus::Warning)
            && !takes(&web.target, "v2", "dc1", HealthStatus::Passing)
    );
    assert!(takes(v2, "v2", "dc9", HealthStatus::Passing) && !takes(v2, "v2", "dc1", HealthStatus::Warning));
    let near = chain(&list, "near").stream;
    assert!(
        takes(&near.target, "", "dc1", HealthStatus::Passing) && !takes(&near.target, "", "dc2", HealthStatus::Passing)
    );
    assert!(
        takes(&near.failover[0], "", "dc2", HealthStatus::Passing)
            && !takes(&near.failover[0], "", "dc1", HealthStatus::Passing)
    );
}

#[track_caller]
fn resolves_to(list: &[(&str, &str, Value)], service: &str, target: &str, failover: &[&str]) -> Arc<Resolved> {
    let resolved = chain(list, service).stream;
    assert_eq!(resolved.target.id, target);
    assert_eq!(resolved.failover.iter().map(|target| &*target.id).collect::<Vec<_>>(), failover);
    resolved
}

fn instance(version: &str, datacenter: &str, status: HealthStatus) -> Instance {
    let info = NodeInfo { datacenter: datacenter.to_owned(), ..fixture::node_info("n1") };
    let record = ServiceRecord {
        meta: [("version", version.into())].into_iter().collect::<TextMap<Box<str>>>(),
        port: 80,
        weights: Weights { passing: 1, warning: 1 },
        protocol: Protocol::Http,
        ..ServiceRecord::new("w".parse().unwrap(), "web".parse().unwrap())
    };
    Instance { status, ..fixture::instance(fixture::node_entry(info), record) }
}

#[test]
fn an_attempt_has_less_time_than_the_resolvers_that_its_route_leads_to_give_the_whole() {
    #[track_caller]
    fn problems(destination: &Value) -> String {
        let entries = entries(&[
            ("service-router", "web", json!({"Routes": [{"Destination": destination}]})),
            ("service-splitter", "web", json!({"Splits": [{"Weight": 50}, {"Weight": 50, "Service": "shadow"}]})),
            ("service-resolver", "web", json!({"RequestTimeout": "9s"})),
            ("service-resolver", "shadow", json!({"Redirect": {"Service": "dark"}})),
            ("service-resolver", "dark", json!({"RequestTimeout": "2s"})),
        ]);
        entries.chain(&"web".parse().unwrap()).map_or_else(|problems| problems.to_string(), |_| String::new())
    }
    let bad = [
        ("PerTryTimeout = 2s", json!({"PerTryTimeout": "2s"})),
        ("Hedge.Delay = 3s", json!({"Hedge": {"Delay": "3s"}})),
    ];
    for (name, destination) in bad {
        let said = problems(&destination);
        let want =
            format!("service-router:web Routes[0].Destination.{name} must be shorter than RequestTimeout = 2s of");
        assert!(said.contains(&want) && said.contains("service-resolver dark"), "{said}");
    }
    assert_eq!(problems(&json!({"PerTryTimeout": "1s", "Hedge": {"Delay": "500ms"}})), "");
    assert_eq!(problems(&json!({"PerTryTimeout": "1s", "Hedge": {"Delay": "p95"}})), "");
    // A route's own timeout is the one that counts.
    assert_eq!(problems(&json!({"PerTryTimeout": "3s", "RequestTimeout": "4s"})), "");
}

#[test]
fn a_zone_is_a_subset_and_fails_over_to_another() {
    // As api/traffic.md has it.
    let resolver = json!({"DefaultSubset": "z1", "Failover": {"z1": {"ServiceSubset": "z2"}}, "Subsets": {
        "z1": {"Filter": "Node.Meta.zone == z1"}, "z2": {"Filter": "Node.Meta.zone == z2"}}});
    let chain = chain(&[("service-resolver", "web", resolver)], "web");
    let zone = |zone: &str| {
        let mut info = fixture::node_info("n1");
        info.meta.insert("zone".to_owned(), zone.to_owned());
        let record = ServiceRecord { port: 80, ..ServiceRecord::new("w".parse().unwrap(), "web".parse().unwrap()) };
        fixture::instance(fixture::node_entry(info), record)
    };
    let [near, far] = [&chain.stream.target, &chain.stream.failover[0]];
    for (at, is_near, is_far) in [("z1", true, false), ("z2", false, true), ("", false, false)] {
        let instance = zone(at);
        assert_eq!((near.takes(&instance, "dc1"), far.takes(&instance, "dc1")), (is_near, is_far), "{at:?}");
    }
}

#[test]
fn what_stands_in_place_of_a_prefix_joins_the_rest_by_one_slash() {
    #[track_caller]
    fn check(matched: &Value, put: &str, path: &str, want: &str) {
        let route = json!({"Match": {"HTTP": matched}, "Destination": {"PrefixRewrite": put}});
        let chain = chain(&[("service-router", "web", json!({"Routes": [route]}))], "web");
        let none = HeaderMap::new();
        let found = chain.route(&asked("GET", path, &none)).unwrap();
        assert_eq!(found.path(path).as_deref(), Some(want), "{path}");
    }
    let prefix = |text: &str| json!({"PathPrefix": text});
    check(&prefix("/api"), "/", "/api/x?y=1", "/x?y=1");
    check(&prefix("/api"), "/", "/api", "/");
    check(&prefix("/api"), "/", "/api?y", "/?y");
    check(&prefix("/api/"), "/v2", "/api/x", "/v2/x");
    check(&prefix("/api"), "/v2", "/api/x", "/v2/x");
    check(&prefix("/api"), "/v2", "/apix", "/v2x");
    check(&json!({"PathExact": "/a"}), "/b/c", "/a?x=1", "/b/c?x=1");
}

#[test]
fn headers_are_taken_out_then_set_then_added() {
    let edit = json!({"Add": {"x-add": "2"}, "Set": {"x-set": "new"}, "Remove": ["x-gone", "x-set"]});
    let route = json!({"Destination": {"RequestHeaders": edit}});
    let chain = chain(&[("service-router", "web", json!({"Routes": [route]}))], "web");
    let mut found = headers(&[("x-add", "1"), ("x-set", "old"), ("x-set", "older"), ("x-gone", "1")]);
    let Action::Forward(forward) = &chain.routes[0].action else { panic!("a redirect") };
    forward.request_headers.apply(&mut found);
    assert_eq!(found, headers(&[("x-add", "1"), ("x-add", "2"), ("x-set", "new")]));
}

#[test]
fn faults_strike_their_share_of_the_requests_that_match() {
    let faults = json!({"Faults": [
        {"Match": {"HTTP": {"PathPrefix": "/slow"}}, "Delay": {"Percent": 25, "Duration": "100ms"}},
        {"Match": {"HTTP": {"PathPrefix": "/bad"}}, "Abort": {"Percent": 0.01, "HTTPStatus": 503}},
        {"Match": {"HTTP": {"PathPrefix": "/rst"}}, "Abort": {"Reset": true}},
    ]});
    let chain = chain(&[("service-faults", "web", faults)], "web");
    let (faults, none) = (chain.faults.as_ref().unwrap(), HeaderMap::new());
    let strike = |path, draw| faults.strike(&asked("GET", path, &none), (draw, draw));
    let quarter = u32::MAX / 4;
    assert_eq!(strike("/slow", quarter), (Some(Duration::from_millis(100)), None));
    assert_eq!(strike("/slow", quarter + 2), (None, None));
    assert_eq!(strike("/bad", u32::MAX / 10_000), (None, Some(&Abort::Http(503))));
    assert_eq!(strike("/bad", u32::MAX / 9_999 + 2), (None, None));
    assert_eq!(strike("/rst", u32::MAX), (None, Some(&Abort::Reset)));
    assert_eq!(strike("/", 0), (None, None));
}

#[test]
fn every_problem_of_an_entry_is_named_at_once_with_its_path() {
    let text = refused(
        "service-router",
        &json!({"Kind": "service-router", "Name": "web", "Colour": 1, "Routes": [
            {"Match": {"HTTP": {"PathExact": "a", "PathPrefix": "/b", "PathRegex": "(", "Methods": ["get"]}}},
            {"Match": {"HTTP": {"Header": [{"Name": "x y", "Exact": "1", "Prefix": "2"}, {"Name": "x-a"}]}}},
            {"Destination": {"Service": "a b", "RequestTimeout": "1s", "PerTryTimeout": "1s", "IdleTimeout": "1y",
                "NumRetries": 11, "RetryOn": ["6xx"], "RetryOnStatusCodes": [200], "PrefixRewrite": "/x",
                "RequestHeaders": {"Set": {"Host": "x", "x-weft-hops": "1"}}, "Namespace": "team"}},
            {"Redirect": {"Code": 305}, "Destination": {}},
            {"Match": {"HTTP": {"Methods": ["POST", "PUT"]}}, "Destination": {"RequestTimeout": "50ms",
                "Hedge": {"Delay": "50ms", "MaxRequests": 4, "Writes": ["POST"], "Budget": 1}}},
            {"Destination": {"Hedge": {"Delay": "p100"}}},
            {"Destination": {"Hedge": {"Delay": "1us"}}},
            {"Destination": {"Hedge": {}}},
        ]}),
    );
    for part in [
        "Colour is no field of this entry",
        "Routes[0].Match.HTTP.PathExact must begin with `/`",
        "Routes[0].Match.HTTP.PathPrefix is the second test of the path",
        "Routes[0].Match.HTTP.PathRegex is refused: regular expression `(`",
        "Routes[0].Match.HTTP.Methods[0] must be a method in upper case",
        "Routes[1].Match.HTTP.Header[0].Name must be a header's name",
        "Routes[1].Match.HTTP.Header[0].Prefix is the second test",
        "Routes[1].Match.HTTP.Header[1] must have one of Present, Exact",
        "Routes[2].Destination.Service is no service's name",
        "Routes[2].Destination.PerTryTimeout = 1s must be shorter than RequestTimeout = 1s",
        "Routes[2].Destination.IdleTimeout is wrong: `1y` is no duration",
        "Routes[2].Destination.NumRetries must be a whole number from 0 to 10",
        "Routes[2].Destination.RetryOn[0] must be one of 5xx",
        "Routes[2].Destination.RetryOnStatusCodes[0] must be a status from 400 to 599",
        "Routes[2].Destination.PrefixRewrite needs a PathPrefix",
        "the host is changed by HostRewrite",
        "`x-weft-hops` frames messages or is weft's own",
        "Routes[2].Destination.Namespace is refused",
        "Routes[3].Redirect.Code must be 301",
        "Routes[3] has Redirect and Destination",
        "Routes[4].Destination.Hedge.MaxRequests must be a whole number from 2 to 3",
        "Routes[4].Destination.Hedge.Writes[0] must be PUT or DELETE",
        "Routes[4].Destination.Hedge.Writes must name one of the route's Methods",
        "Routes[4].Destination.Hedge.Budget is no field",
        "Routes[4].Destination.Hedge.Delay = 50ms must be shorter than RequestTimeout = 50ms",
        "Routes[5].Destination.Hedge.Delay must be a duration such as 50ms, or a percentile from p50 to p99",
        "Routes[6].Destination.Hedge.Delay must be from 1ms to 24h",
        "Routes[7].Destination.Hedge.Delay must be given",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_route_says_when_and_what_it_hedges() {
    use super::hedge::{Delay, Hedge};
    #[track_caller]
    fn check(hedge: &Value, want: &Hedge) {
        let router = json!({"Routes": [{"Destination": {"Hedge": hedge}}]});
        let chain = chain(&[("service-router", "web", router)], "web");
        let Action::Forward(forward) = &chain.routes[0].action else { panic!("a redirect") };
        assert_eq!(forward.hedge.as_ref(), Some(want));
        let Action::Forward(rest) = &chain.routes[1].action else { panic!("a redirect") };
        assert_eq!(rest.hedge, None, "what no route matches is not hedged");
    }
    let hedge = |delay, requests, writes| Hedge { delay, requests, writes, grpc: false };
    check(&json!({"Delay": "50ms"}), &hedge(Delay::Fixed(Duration::from_millis(50)), 2, Vec::new()));
    let writes = vec![http::Method::PUT, http::Method::DELETE];
    check(
        &json!({"delay": "p95", "max_requests": 3, "Writes": ["PUT", "DELETE"]}),
        &hedge(Delay::Percentile(95), 3, writes),
    );
    let grpc = Hedge { grpc: true, ..hedge(Delay::Percentile(50), 2, Vec::new()) };
    check(&json!({"delay": "p50", "GRPC": true}), &grpc);
}

#[test]
fn other_kinds_are_read_as_strictly() {
    #[track_caller]
    fn check(kind: &str, value: &Value, part: &str) {
        let text = refused(kind, value);
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let splits = |list: Value| json!({"Splits": list});
    check("service-splitter", &splits(json!([{"Weight": 99.99}])), "weights of 100 together, and have 99.99");
    check(
        "service-splitter",
        &splits(json!([{"Weight": 0.005}, {"Weight": 99.995}])),
        "Splits[0].Weight must be a percentage",
    );
    check("service-splitter", &splits(json!([])), "at least one");
    check("service-splitter", &json!({"Splits": [{"Weight": 100}], "Sticky": {}}), "Sticky.Header or Cookie");
    check("service-resolver", &json!({"DefaultSubset": "v1"}), "DefaultSubset = \"v1\" must be one of Subsets");
    check(
        "service-resolver",
        &json!({"Subsets": {"v1": {"Filter": "Service.Colour == 1"}}}),
        "Subsets[\"v1\"].Filter is refused",
    );
    check("service-resolver", &json!({"Failover": {"v9": {"Service": "x"}}}), "must be `*` or one of Subsets");
    check("service-resolver", &json!({"Failover": {"*": {}}}), "must have either Targets");
    check("service-resolver", &json!({"Redirect": {"Service": "a"}, "Subsets": {"v1": {}}}), "goes with neither");
    check("service-defaults", &json!({"Protocol": "sctp"}), "Protocol must be tcp");
    check("service-defaults", &json!({"MutualTLSMode": "permissive"}), "weft does nothing with it");
    check("proxy-defaults", &json!({"Config": {"envoy_x": 1}}), "Config.envoy_x is no field");
    check("proxy-defaults", &json!({"TrustedHops": ["10.0.0.0/8", "10.0.0.1/8"]}), "TrustedHops[1] must be 0 after");
    check("proxy-defaults", &json!({"TrustedHops": "10.0.0.0/8"}), "TrustedHops must be a list");
    check("service-defaults", &json!({"TrustedHops": ["10.0.0.0/8"]}), "TrustedHops is no field");
    check("service-faults", &json!({"Faults": [{}]}), "Faults[0] must have Delay or Abort");
    check("service-faults", &json!({"Faults": [{"Abort": {"Reset": true, "HTTPStatus": 500}}]}), "only one of them");
    check("service-faults", &json!([]), "must be an object");
    let many: Vec<Value> = (0..200).map(|at| route(&json!({"PathRegex": format!("/{at}")}), "x")).collect();
    check("service-router", &json!({"Routes": many}), "at most 128");
    // Keys as Consul takes them, and what others read.
    ready(
        "service-router",
        &json!({"routes": [{"match": {"http": {"path_prefix": "/"}}, "destination": {"num_retries": 1}}]}),
    );
    ready("service-resolver", &json!({"LoadBalancer": {"Policy": "maglev"}, "Meta": {"a": "b"}, "ModifyIndex": 7}));
    ready("service-defaults", &json!({"Protocol": "grpc", "UpstreamConfig": {"Defaults": {}}, "Mode": ""}));
}

#[test]
fn who_may_say_for_whom_it_asks_is_in_the_proxy_defaults() {
    let mut entries = Entries::default();
    entries.add("proxy-defaults", "global", ready("proxy-defaults", &json!({"TrustedHops": ["10.1.0.0/16"]})));
    let traffic = Traffic::new(entries, &Traffic::default(), Vec::new());
    let trusts = |traffic: &Traffic, addr: &str| traffic.trusts(addr.parse().unwrap());
    assert!(trusts(&traffic, "10.1.2.3") && !trusts(&traffic, "10.2.2.3"));
    assert!(!trusts(&Traffic::default(), "10.1.2.3") && trusts(&Traffic::default(), "127.0.0.1"));
}

#[test]
fn references_that_lead_nowhere_or_in_circles_are_refused_where_they_are_written() {
    let splits =
        |service: &str, subset: &str| json!({"Splits": [{"Weight": 100, "Service": service, "ServiceSubset": subset}]});
    let v1 = json!({"Subsets": {"v1": {}}});
    let held = [
        ("service-splitter", "b", splits("a", "")),
        ("service-resolver", "x", json!({"Redirect": {"Service": "y"}})),
        ("service-resolver", "web", v1.clone()),
        ("service-splitter", "web", splits("", "v1")),
    ];
    let check = |kind: &str, name: &str, value: Option<&Value>| {
        let others = held.iter().map(|(kind, name, value)| (*kind, *name, value));
        check_write(others, (kind, name, value)).map_err(|problems| problems.to_string())
    };
    let refused = |kind: &str, name: &str, value: Option<&Value>, part: &str| {
        let text = check(kind, name, value).expect_err(part);
        assert!(text.contains(part), "{part:?} is not in {text}");
    };
    refused(
        "service-splitter",
        "a",
        Some(&splits("b", "")),
        "leads in a circle: service-splitter:a -> service-splitter:b -> service-splitter:a",
    );
    refused("service-resolver", "y", Some(&json!({"Redirect": {"Service": "x"}})), "leads in a circle");
    refused(
        "service-splitter",
        "c",
        Some(&splits("web", "v2")),
        "names subset \"v2\", which the service-resolver of web does not have",
    );
    refused(
        "service-router",
        "c",
        Some(&json!({"Routes": [{"Destination": {"Service": "z", "ServiceSubset": "v1"}}]})),
        "Routes[0] names subset \"v1\" of service z",
    );
    refused("service-resolver", "web", None, "names subset \"v1\"");
    refused("service-resolver", "web", Some(&json!({})), "names subset \"v1\"");
    refused("service-defaults", "web", Some(&json!({"Protocol": "tcp"})), "service-splitter:web needs requests");
    // Two services may stand in for each other, and one for a third that does so too.
    let over = |to: &str| json!({"Failover": {"*": {"Service": to}}});
    let pair = [("service-resolver", "p", over("q")), ("service-resolver", "q", over("r"))];
    let others = || pair.iter().map(|(kind, name, value)| (*kind, *name, value));
    assert!(check_write(others(), ("service-resolver", "q", Some(&over("p")))).is_ok());
    assert!(check_write(others(), ("service-resolver", "r", Some(&over("p")))).is_ok());
    // A redirect back is a circle all the same, and ends.
    let back = json!({"Redirect": {"Service": "y"}});
    let pair = [("service-resolver", "x", over("y")), ("service-resolver", "z", back)];
    let others = pair.iter().map(|(kind, name, value)| (*kind, *name, value));
    let redirect = json!({"Redirect": {"Service": "z"}});
    assert!(check_write(others, ("service-resolver", "y", Some(&redirect))).is_err());
    // 50 parts of 50 parts of 50 parts that all lead back: named, and soon.
    let wide = |to: &str| json!({"Splits": (0..50).map(|_| json!({"Weight": 2, "Service": to})).collect::<Vec<_>>()});
    let names = ["s0", "s1", "s2", "s3", "s4", "s5"];
    let wide: Vec<Value> = names.iter().cycle().skip(1).take(names.len()).map(|to| wide(to)).collect();
    let others = names.iter().zip(&wide).skip(1).map(|(name, value)| ("service-splitter", *name, value));
    let text = check_write(others, ("service-splitter", "s0", wide.first())).expect_err("a circle").to_string();
    assert!(text.contains("circle") || text.contains("splitters"), "{text}");
    assert_eq!(check("service-splitter", "web", None), Ok(()));
    assert_eq!(check("service-resolver", "y", Some(&json!({"Redirect": {"Service": "z"}}))), Ok(()));
}

#[test]
fn what_is_wrong_in_an_entry_and_where_it_leads_nowhere_is_named_in_one_go() {
    let held = json!({"Subsets": {"v1": {}}});
    let check = |kind: &str, value: &Value| {
        let others = [("service-resolver", "web", &held)];
        let problems = check_write(others, (kind, "web", Some(value))).expect_err("it is refused");
        problems.0.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let route =
        |path: &str, destination: Value| json!({"Match": {"HTTP": {"PathPrefix": path}}, "Destination": destination});
    let bad = json!({"Colour": 1, "Routes": [
        route("/a", json!({"ServiceSubset": "v9"})),
        {"Destination": {"ServiceSubset": "v9"}, "Redirect": {"Host": "x"}},
        route("/b", json!({"ServiceSubset": "v8", "NumRetries": 11})),
        {"Match": {"HTTP": {"PathRegex": "("}}},
        route("/c", json!({"RequestTimeout": "1s", "PerTryTimeout": "2s"})),
        route("/d", json!({"ServiceSubset": "v7"})),
        route("/e", json!({"Mirror": {"Service": "nobody", "ServiceSubset": "v1"}})),
        route("/f", json!({"ServiceSubset": "v1"})),
    ]});
    let named = check("service-router", &bad);
    let expected = [
        "Routes[1] has Redirect and Destination",
        "Routes[2].Destination.NumRetries must be",
        "Routes[3].Match.HTTP.PathRegex is refused",
        "Routes[4].Destination.PerTryTimeout = 2s must be shorter",
        "Colour is no field",
        "service-router:web Routes[0] names subset \"v9\", which the service-resolver of web does not have",
        "service-router:web Routes[5] names subset \"v7\"",
        "service-router:web Routes[6].Destination.Mirror names subset \"v1\" of service nobody",
    ];
    assert_eq!(named.len(), expected.len(), "{named:#?}");
    for part in expected {
        assert!(named.iter().any(|problem| problem.starts_with(part)), "{part:?} is not in {named:#?}");
    }
    let bad = json!({"Splits": [{"Weight": 50, "ServiceSubset": "v9"}, {"Weight": 40, "Service": "a b", "ServiceSubset": "v1"}]});
    let named = check("service-splitter", &bad);
    let expected = ["Splits[1].Service is no service's name", "Splits must have weights of 100 together"];
    for part in expected {
        assert!(named.iter().any(|problem| problem.starts_with(part)), "{part:?} is not in {named:#?}");
    }
    assert!(named.iter().any(|problem| problem.contains("Splits[0] names subset \"v9\"")), "{named:#?}");
    // A resolver's own subsets are its own to name; nobody else's way through it is held against it.
    let named = check("service-resolver", &json!({"DefaultSubset": "v9", "Subsets": {"v1": {"Filter": "Service."}}}));
    assert_eq!(named.len(), 2, "{named:#?}");
}

#[test]
fn what_cannot_be_compiled_keeps_its_last_good_chain_and_hurts_no_other() {
    let good = entries(&[
        ("service-resolver", "web", json!({"Subsets": {"v1": {}}})),
        ("service-splitter", "web", json!({"Splits": [{"Weight": 100, "ServiceSubset": "v1"}]})),
    ]);
    let first = Traffic::new(good.clone(), &Traffic::default(), Vec::new());
    let mut broken = good;
    broken.remove("service-resolver", "web");
    broken.add("service-resolver", "api", ready("service-resolver", &json!({"RequestTimeout": "1s"})));
    let second = Traffic::new(broken.clone(), &first, Vec::new());
    let web = "web".parse().unwrap();
    assert!(Arc::ptr_eq(first.chain(&web).unwrap(), second.chain(&web).unwrap()));
    assert!(second.chain(&"api".parse().unwrap()).is_some());
    assert_eq!(
        second.quarantined().iter().map(|one| (&*one.name, one.has_older)).collect::<Vec<_>>(),
        [("chain:web", true)]
    );
    // Without a good one, the service is called as if nothing were said of it.
    let fresh = Traffic::new(broken, &Traffic::default(), Vec::new());
    assert!(fresh.chain(&web).is_none());
    assert!(!fresh.quarantined()[0].has_older);
}

#[test]
fn a_chain_is_shown_in_consul_s_shape() {
    let chain = chain(
        &[
            ("service-router", "web", json!({"Routes": [route(&json!({"PathPrefix": "/admin"}), "admin")]})),
            (
                "service-splitter",
                "web",
                json!({"Splits": [{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "Service": "next"}]}),
            ),
            (
                "service-resolver",
                "web",
                json!({"IdleTimeout": "5m", "Subsets": {"v1": {"Filter": "Service.Meta.version == v1"}}}),
            ),
        ],
        "web",
    );
    let shown = show(&chain, "http", "dc1");
    let at = |path: &str| shown.pointer(path).cloned().unwrap_or_else(|| panic!("{path} is not in {shown:#}"));
    assert_eq!(at("/Chain/StartNode"), "router:web");
    assert_eq!(at("/Chain/Nodes/router:web/Routes/0/NextNode"), "resolver:admin");
    assert_eq!(at("/Chain/Nodes/router:web/Routes/0/Definition/Match/HTTP/PathPrefix"), "/admin");
    assert_eq!(at("/Chain/Nodes/router:web/Routes/1/NextNode"), "splitter:web");
    assert_eq!(at("/Chain/Nodes/splitter:web/Splits/0"), json!({"Weight": 90.0, "NextNode": "resolver:v1.web"}));
    assert_eq!(at("/Chain/Nodes/resolver:v1.web/Resolver/Target"), "v1.web");
    assert_eq!(at("/Chain/Nodes/resolver:v1.web/Resolver/IdleTimeout"), "300s");
    assert_eq!(at("/Chain/Targets/v1.web/Subset/Filter"), "Service.Meta.version == v1");
    assert_eq!(at("/Chain/Targets/next/Service"), "next");
}

//! Reads config entries in Consul's JSON, strictly: every problem is named, with its field's path.

use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use serde_json::Value;

use super::entry::{
    Abort, Defaults, Destination, Entry, Fault, HeaderEdit, MirrorRule, Place, Redirect, Resolver, Route, Split,
    Splitter, Sticky, SubsetRule, Then,
};
use super::fields::{Node, Object, Problems};
use super::gateway;
use super::hedge::{DELAY_MIN, Delay, Hedge, REQUESTS_MAX};
use super::hops::Network;
use super::matcher::{HeaderTest, Match, QueryTest, TextTest};
use super::retry::{Condition, Retry};
use super::subset::Filter;
use crate::model::Protocol;

/// Most routes of one router.
pub const ROUTES_MAX: usize = 1024;
/// Most path expressions of one router: they share one set, of 1 MiB at most.
pub const PATH_REGEXES_MAX: usize = 128;
/// Most expressions over headers and query of one router or list of faults: 64 KiB each.
const OTHER_REGEXES_MAX: usize = 64;
/// Most splits of one splitter.
const SPLITS_MAX: usize = 64;
/// Most subsets of one resolver.
const SUBSETS_MAX: usize = 64;
/// Most targets of one failover.
const FAILOVER_MAX: usize = 16;
/// Most faults of one service.
const FAULTS_MAX: usize = 32;
/// Most networks whose callers may say for whom they ask: each is held against callers from elsewhere.
const HOPS_MAX: usize = 64;
/// Most tests of headers, and as many of the query and of methods, of one match.
const TESTS_MAX: usize = 16;
/// Most headers that are added, set or removed at one place.
const EDITS_MAX: usize = 32;
/// Longest path, value or expression, in bytes.
const TEXT_BYTES_MAX: usize = 1024;
/// Longest timeout or delay: beyond a day it is a mistake in the unit.
const TIME_MAX: Duration = Duration::from_hours(24);
/// Headers that frame a message, end at the first hop or are weft's own.
const HEADERS_OWN: [&str; 10] = [
    "host",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "x-forwarded-client-cert",
    "expect",
];

/// Reads an entry whose kind and name were checked already.
///
/// # Errors
/// Every problem at once, each with its field's path.
pub(super) fn read(kind: &str, value: &Value) -> Result<Entry, Problems> {
    let mut problems = Problems::default();
    let mut object = Object::open(String::new(), value, &mut problems);
    let problems = &mut problems;
    // What an answer of the API holds may come back.
    for name in ["Kind", "Name", "CreateIndex", "ModifyIndex", "Hash"] {
        object.take(name);
    }
    object.tenancy(problems);
    for (_, node) in object.map("Meta", 64, problems) {
        node.text(problems);
    }
    let entry = match kind {
        "service-router" => router(&mut object, problems),
        "service-splitter" => splitter(&mut object, problems),
        "service-resolver" => resolver(&mut object, problems),
        "service-defaults" => defaults(&mut object, problems),
        "proxy-defaults" => proxy_defaults(&mut object, problems),
        "service-faults" => faults(&mut object, problems),
        "ingress-gateway" => gateway::read(&mut object, problems),
        _ => return Ok(Entry::Other),
    };
    object.finish(problems);
    std::mem::take(problems).or(entry)
}

fn router(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let routes = object.list("Routes", ROUTES_MAX, problems);
    let routes: Vec<Route> = routes.into_iter().filter_map(|node| route(&node, problems)).collect();
    bound_regexes(routes.iter().map(|route| &route.when), "Routes", problems);
    Entry::Router(routes)
}

fn bound_regexes<'m>(all: impl Iterator<Item = &'m Match>, path: &str, problems: &mut Problems) {
    let (mut paths, mut others) = (0, 0);
    let is_regex = |test: &TextTest| usize::from(matches!(test, TextTest::Regex(_)));
    for one in all {
        paths += one.path.as_ref().map_or(0, is_regex);
        others += one.headers.iter().map(|header| is_regex(&header.test)).sum::<usize>();
        others += one.query.iter().map(|query| is_regex(&query.test)).sum::<usize>();
    }
    if paths > PATH_REGEXES_MAX {
        problems.add(path, format!("have {paths} path expressions; at most {PATH_REGEXES_MAX} are allowed"));
    }
    if others > OTHER_REGEXES_MAX {
        problems.add(
            path,
            format!("have {others} expressions over headers and query; at most {OTHER_REGEXES_MAX} are allowed"),
        );
    }
}

fn route(node: &Node<'_>, problems: &mut Problems) -> Option<Route> {
    let mut object = node.object(problems);
    let when = matching(&mut object, problems);
    let redirect = object.object("Redirect", problems).map(|object| self::redirect(object, &when, problems));
    let destination = object.object("Destination", problems).map(|object| self::destination(object, &when, problems));
    object.finish(problems);
    let then = match (redirect, destination) {
        (Some(redirect), None) => Then::Redirect(redirect),
        (None, destination) => Then::Forward(Box::new(destination.unwrap_or_default())),
        (Some(_), Some(_)) => {
            problems.add(&*node.path, "has Redirect and Destination: give one of them");
            return None;
        }
    };
    Some(Route { when, then })
}

/// `Match.HTTP` of a route or fault.
fn matching(object: &mut Object<'_>, problems: &mut Problems) -> Match {
    let mut found = Match::default();
    let Some(mut outer) = object.object("Match", problems) else { return found };
    if let Some(mut http) = outer.object("HTTP", problems) {
        for name in ["PathExact", "PathPrefix", "PathRegex"] {
            let path = http.path_of(name);
            let Some(text) = http.text(name, problems).and_then(|text| bounded(text, &path, problems)) else {
                continue;
            };
            let test = match name {
                "PathExact" => TextTest::Exact(text),
                "PathPrefix" => TextTest::Prefix(text),
                _ => TextTest::Regex(text),
            };
            match &test {
                TextTest::Exact(text) | TextTest::Prefix(text) if !text.starts_with('/') => {
                    problems.add(&*path, "must begin with `/`");
                }
                TextTest::Regex(text) => check_regex(text, &path, problems),
                _ => {}
            }
            if found.path.replace(test).is_some() {
                problems.add(path, "is the second test of the path: give one of PathExact, PathPrefix and PathRegex");
            }
        }
        found.ignores_case = http.flag("CaseInsensitive", problems);
        for node in http.list("Header", TESTS_MAX, problems) {
            let mut header = node.object(problems);
            let name = header.path_of("Name");
            let text = header.text("Name", problems).unwrap_or_default().to_ascii_lowercase();
            if HeaderName::try_from(&*text).is_err() {
                problems.add(name, format!("must be a header's name, and is {text:?}"));
            }
            let ignores_case = header.flag("IgnoreCase", problems);
            let is_inverted = header.flag("Invert", problems);
            let names = ["Present", "Exact", "Prefix", "Suffix", "Contains", "Regex"];
            if let Some(test) = text_test(&mut header, &names, &node.path, problems) {
                found.headers.push(HeaderTest { name: text, test, is_inverted, ignores_case });
            }
            header.finish(problems);
        }
        for node in http.list("QueryParam", TESTS_MAX, problems) {
            let mut query = node.object(problems);
            let name = query.text("Name", problems).unwrap_or_default().to_owned();
            if name.is_empty() {
                problems.add(query.path_of("Name"), "must be given");
            }
            if let Some(test) = text_test(&mut query, &["Present", "Exact", "Regex"], &node.path, problems) {
                found.query.push(QueryTest { name, test });
            }
            query.finish(problems);
        }
        for (path, method) in http.texts("Methods", TESTS_MAX, problems) {
            if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b"-_".contains(&b)) {
                problems.add(path, "must be a method in upper case");
            }
            found.methods.push(method.to_owned());
        }
        http.finish(problems);
    }
    outer.finish(problems);
    found
}

fn text_test(object: &mut Object<'_>, names: &[&str], path: &str, problems: &mut Problems) -> Option<TextTest> {
    let mut found = None;
    for name in names {
        let own = object.path_of(name);
        let test = if *name == "Present" {
            object.flag(name, problems).then_some(TextTest::Present)
        } else {
            let text = object.text(name, problems).and_then(|text| bounded(text, &own, problems));
            text.map(|text| match *name {
                "Exact" => TextTest::Exact(text),
                "Prefix" => TextTest::Prefix(text),
                "Suffix" => TextTest::Suffix(text),
                "Contains" => TextTest::Contains(text),
                _ => TextTest::Regex(text),
            })
        };
        let Some(test) = test else { continue };
        if let TextTest::Regex(text) = &test {
            check_regex(text, &own, problems);
        }
        if found.replace(test).is_some() {
            problems.add(own, format!("is the second test: give one of {}", names.join(", ")));
        }
    }
    if found.is_none() {
        problems.add(path, format!("must have one of {}", names.join(", ")));
    }
    found
}

fn bounded(text: &str, path: &str, problems: &mut Problems) -> Option<String> {
    if text.len() > TEXT_BYTES_MAX {
        problems.add(path, format!("has {} bytes; at most {TEXT_BYTES_MAX} are allowed", text.len()));
        return None;
    }
    Some(text.to_owned())
}

fn check_regex(text: &str, path: &str, problems: &mut Problems) {
    if let Err(error) = crate::authz::whole(text) {
        problems.add(path, format!("is refused: {error}"));
    }
}

/// A timeout within its bound.
fn time(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Option<Duration> {
    let path = object.path_of(name);
    let time = object.duration(name, problems)?;
    if time > TIME_MAX || time < Duration::from_millis(1) {
        problems.add(path, "must be from 1ms to 24h");
    }
    Some(time)
}

/// What stands in place of a prefix: only where there is one.
fn prefix_rewrite(object: &mut Object<'_>, when: &Match, problems: &mut Problems) -> Option<String> {
    let path = object.path_of("PrefixRewrite");
    let text = object.text("PrefixRewrite", problems).and_then(|text| bounded(text, &path, problems))?;
    if !text.starts_with('/') || text.bytes().any(|b| !b.is_ascii_graphic() || b"?#".contains(&b)) {
        problems.add(&*path, "must be a path that begins with `/`");
    }
    if !matches!(when.path, Some(TextTest::Prefix(_) | TextTest::Exact(_))) {
        problems.add(path, "needs a PathPrefix or PathExact to stand in place of");
    }
    Some(text)
}

fn redirect(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Redirect {
    let code = object.number("Code", (301, 308), problems).unwrap_or(302);
    if matches!(code, 304..=306) {
        problems.add(object.path_of("Code"), "must be 301, 302, 303, 307 or 308");
    }
    let scheme = object.text("Scheme", problems).map(str::to_owned);
    if scheme.as_deref().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        problems.add(object.path_of("Scheme"), "must be http or https");
    }
    let host = authority(&mut object, "Host", problems);
    let path = object.text("Path", problems).map(str::to_owned);
    if path.as_ref().is_some_and(|path| !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic())) {
        problems.add(object.path_of("Path"), "must begin with `/` and have no spaces");
    }
    let prefix_rewrite = prefix_rewrite(&mut object, when, problems);
    if path.is_none() && host.is_none() && scheme.is_none() && prefix_rewrite.is_none() {
        problems
            .add(object.path_of("Host"), "or Scheme, Path or PrefixRewrite must be given: the caller would come back");
    }
    object.finish(problems);
    Redirect { code: u16::try_from(code).unwrap_or(302), scheme, host, path, prefix_rewrite }
}

fn authority(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Option<String> {
    let path = object.path_of(name);
    let text = object.text(name, problems)?;
    if text.contains('@') || http::uri::Authority::try_from(text).is_err() {
        problems.add(path, "must be a host, with or without a port");
    }
    Some(text.to_owned())
}

fn destination(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Destination {
    object.tenancy(problems);
    let found = Destination {
        service: object.service("Service", problems),
        subset: subset(&mut object, "ServiceSubset", problems),
        prefix_rewrite: prefix_rewrite(&mut object, when, problems),
        host_rewrite: authority(&mut object, "HostRewrite", problems),
        request_timeout: time(&mut object, "RequestTimeout", problems),
        per_try_timeout: time(&mut object, "PerTryTimeout", problems),
        idle_timeout: time(&mut object, "IdleTimeout", problems),
        retry: retry(&mut object, problems),
        hedge: object.object("Hedge", problems).and_then(|object| hedge(object, when, problems)),
        mirror: object.object("Mirror", problems).and_then(|object| mirror(object, problems)),
        request_headers: edits(&mut object, "RequestHeaders", problems),
        response_headers: edits(&mut object, "ResponseHeaders", problems),
    };
    if let (Some(per_try), Some(timeout)) = (found.per_try_timeout, found.request_timeout)
        && per_try >= timeout
    {
        let rule = format!("= {per_try:?} must be shorter than RequestTimeout = {timeout:?}: else no attempt follows");
        problems.add(object.path_of("PerTryTimeout"), rule);
    }
    if let Some(Hedge { delay: Delay::Fixed(delay), .. }) = found.hedge {
        let limits = [("PerTryTimeout", found.per_try_timeout), ("RequestTimeout", found.request_timeout)];
        for (name, limit) in limits.into_iter().filter_map(|(name, limit)| Some((name, limit?))) {
            if delay >= limit {
                let rule = format!("= {delay:?} must be shorter than {name} = {limit:?}: else nothing is hedged");
                problems.add(format!("{}.Delay", object.path_of("Hedge")), rule);
            }
        }
    }
    object.finish(problems);
    found
}

fn hedge(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Option<Hedge> {
    let requests = object.number("MaxRequests", (2, REQUESTS_MAX.into()), problems).unwrap_or(2);
    let mut writes = Vec::new();
    for (path, method) in object.texts("Writes", 2, problems) {
        match method {
            "PUT" => writes.push(http::Method::PUT),
            "DELETE" => writes.push(http::Method::DELETE),
            _ => problems.add(path, "must be PUT or DELETE: no other method that writes may be repeated"),
        }
    }
    let covers = |method: &String| {
        matches!(&**method, "GET" | "HEAD" | "OPTIONS" | "TRACE") || writes.iter().any(|write| write == &**method)
    };
    if !when.methods.is_empty() && !when.methods.iter().any(covers) {
        problems
            .add(object.path_of("Writes"), "must name one of the route's Methods: none of them is hedged otherwise");
    }
    let path = object.path_of("Delay");
    let delay = delay(&mut object, &path, problems);
    object.finish(problems);
    Some(Hedge { delay: delay?, requests: u32::try_from(requests).unwrap_or(2), writes })
}

/// A duration, or `p50` to `p99`.
fn delay(object: &mut Object<'_>, path: &str, problems: &mut Problems) -> Option<Delay> {
    let Some(node) = object.take("Delay") else {
        problems.add(path, "must be given: a duration such as 50ms, or a percentile such as p95");
        return None;
    };
    if let Some(text) = node.value.as_str().and_then(|text| text.strip_prefix('p')) {
        let percent = text.parse().ok().filter(|percent| (50..=99).contains(percent));
        if percent.is_none() {
            problems.add(path, "must be a duration such as 50ms, or a percentile from p50 to p99");
        }
        return percent.map(Delay::Percentile);
    }
    let delay = node.duration(problems);
    if delay.is_none_or(|delay| delay < DELAY_MIN || delay > TIME_MAX) {
        problems.add(path, "must be from 1ms to 24h, or a percentile from p50 to p99");
    }
    delay.map(Delay::Fixed)
}

fn subset(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Option<String> {
    let path = object.path_of(name);
    let text = object.text(name, problems)?;
    check_subset_name(text, &path, problems);
    Some(text.to_owned())
}

fn check_subset_name(text: &str, path: &str, problems: &mut Problems) {
    let is_label = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    if text.is_empty() || text.len() > 63 || !text.bytes().all(is_label) {
        problems.add(path, "must be a subset's name: 1 to 63 letters, digits, `-`, `_`");
    }
}

fn retry(object: &mut Object<'_>, problems: &mut Problems) -> Option<Retry> {
    let times = object.number("NumRetries", (0, 10), problems);
    let mut conditions = Vec::new();
    if object.flag("RetryOnConnectFailure", problems) {
        conditions.push(Condition::ConnectFailure);
    }
    for (path, text) in object.texts("RetryOn", TESTS_MAX, problems) {
        match text.parse() {
            Ok(condition) => conditions.push(condition),
            Err(rule) => problems.add(path, rule),
        }
    }
    for node in object.list("RetryOnStatusCodes", 64, problems) {
        match node.value.as_u64().filter(|code| (400..600).contains(code)).and_then(|code| u16::try_from(code).ok()) {
            Some(code) => conditions.push(Condition::Status(code)),
            None => problems.add(node.path, "must be a status from 400 to 599"),
        }
    }
    let (mut base, mut most) = (None, None);
    if let Some(mut backoff) = object.object("RetryBackoff", problems) {
        base = time(&mut backoff, "BaseInterval", problems);
        most = time(&mut backoff, "MaxInterval", problems);
        if let (Some(base), Some(most)) = (base, most)
            && most < base
        {
            problems.add(backoff.path_of("MaxInterval"), "must not be shorter than BaseInterval");
        }
        backoff.finish(problems);
    }
    conditions.sort();
    conditions.dedup();
    if times.is_none() && conditions.is_empty() && base.is_none() && most.is_none() {
        return None;
    }
    // Consul retries once where conditions are given without a number.
    let times = times.and_then(|times| u32::try_from(times).ok()).unwrap_or(1);
    Some(Retry::new(times, conditions, base, most))
}

fn mirror(mut object: Object<'_>, problems: &mut Problems) -> Option<MirrorRule> {
    let service = object.service("Service", problems);
    if service.is_none() {
        problems.add(object.path_of("Service"), "must be given");
    }
    let subset = subset(&mut object, "ServiceSubset", problems);
    let share = object.percent("Percent", problems).unwrap_or(10_000);
    object.finish(problems);
    Some(MirrorRule { service: service?, subset, share })
}

pub(super) fn edits(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> HeaderEdit {
    let Some(mut object) = object.object(name, problems) else { return HeaderEdit::default() };
    let mut edit = HeaderEdit {
        add: pairs(&mut object, "Add", problems),
        set: pairs(&mut object, "Set", problems),
        remove: Vec::new(),
    };
    for (path, text) in object.texts("Remove", EDITS_MAX, problems) {
        edit.remove.extend(header_name(text, path, problems));
    }
    object.finish(problems);
    edit
}

fn pairs(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Vec<(HeaderName, HeaderValue)> {
    let mut found = Vec::new();
    for (key, node) in object.map(name, EDITS_MAX, problems) {
        let (name, text) = (header_name(key, node.path.clone(), problems), node.text(problems));
        let Some(text) = text.and_then(|text| bounded(text, &node.path, problems)) else { continue };
        match HeaderValue::try_from(text) {
            Ok(value) => found.extend(name.map(|name| (name, value))),
            Err(_) => problems.add(node.path, "must be a header's value"),
        }
    }
    found
}

fn header_name(text: &str, path: String, problems: &mut Problems) -> Option<HeaderName> {
    let name = HeaderName::try_from(text).ok();
    match &name {
        None => problems.add(path, format!("must be a header's name, and is {text:?}")),
        Some(name) if name == http::header::HOST => {
            problems.add(path, "is refused: the host is changed by HostRewrite");
        }
        Some(name)
            if HEADERS_OWN.contains(&name.as_str())
                || name.as_str().starts_with("x-weft-")
                || name.as_str().starts_with("proxy-") =>
        {
            problems.add(path, format!("is refused: `{name}` frames messages or is weft's own"));
        }
        Some(_) => {}
    }
    name
}

fn splitter(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let mut splits = Vec::new();
    let list = object.list("Splits", SPLITS_MAX, problems);
    if list.is_empty() {
        problems.add("Splits", "must have at least one element");
    }
    for node in list {
        let mut split = node.object(problems);
        split.tenancy(problems);
        let weight = split.percent("Weight", problems).unwrap_or_default();
        splits.push(Split {
            weight,
            service: split.service("Service", problems),
            subset: subset(&mut split, "ServiceSubset", problems),
            request_headers: edits(&mut split, "RequestHeaders", problems),
            response_headers: edits(&mut split, "ResponseHeaders", problems),
        });
        split.finish(problems);
    }
    let sum: u32 = splits.iter().map(|split| u32::from(split.weight)).sum();
    if sum != 10_000 && !splits.is_empty() {
        problems.add("Splits", format!("must have weights of 100 together, and have {}.{:02}", sum / 100, sum % 100));
    }
    let sticky = object.object("Sticky", problems).and_then(|mut sticky| {
        let path = sticky.path_of("Header");
        let header = sticky.text("Header", problems).and_then(|text| {
            let name = HeaderName::try_from(text).ok();
            if name.is_none() {
                problems.add(&*path, "must be a header's name");
            }
            name.map(Sticky::Header)
        });
        let cookie = sticky.text("Cookie", problems).map(|text| Sticky::Cookie(text.to_owned()));
        sticky.finish(problems);
        if header.is_some() == cookie.is_some() {
            problems.add(path, "or Cookie must be given, and not both");
        }
        header.or(cookie)
    });
    Entry::Splitter(Splitter { splits, sticky })
}

fn place(mut object: Object<'_>, problems: &mut Problems) -> Place {
    object.tenancy(problems);
    let found = Place {
        service: object.service("Service", problems),
        subset: subset(&mut object, "ServiceSubset", problems),
        datacenter: object.text("Datacenter", problems).map(str::to_owned),
    };
    object.finish(problems);
    found
}

fn resolver(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let mut found = Resolver {
        connect_timeout: time(object, "ConnectTimeout", problems),
        request_timeout: time(object, "RequestTimeout", problems),
        default_subset: subset(object, "DefaultSubset", problems),
        ..Resolver::default()
    };
    // Read by what balances.
    object.leave("LoadBalancer");
    object.leave("PrioritizeByLocality");
    for (name, node) in object.map("Subsets", SUBSETS_MAX, problems) {
        check_subset_name(name, &node.path, problems);
        let mut subset = node.object(problems);
        let path = subset.path_of("Filter");
        let filter = subset.text("Filter", problems).and_then(|text| bounded(text, &path, problems));
        let filter = filter.and_then(|text| match Filter::parse(&text) {
            Ok(filter) => Some(filter),
            Err(why) => {
                problems.add(path, format!("is refused: {why}"));
                None
            }
        });
        let only_passing = subset.flag("OnlyPassing", problems);
        subset.finish(problems);
        found.subsets.insert(name.to_owned(), SubsetRule { filter, only_passing });
    }
    if let Some(redirect) = object.object("Redirect", problems) {
        let path = redirect.path_of("Service");
        let redirect = place(redirect, problems);
        if redirect == Place::default() {
            problems.add(path, "or ServiceSubset or Datacenter must be given");
        }
        found.redirect = Some(redirect);
    }
    for (name, node) in object.map("Failover", SUBSETS_MAX, problems) {
        found.failover.insert(name.to_owned(), failover(&node, problems));
        if name != "*" && !found.subsets.contains_key(name) {
            problems.add(node.path, "must be `*` or one of Subsets");
        }
    }
    if let Some(default) = &found.default_subset
        && !found.subsets.contains_key(default)
    {
        problems.add("DefaultSubset", format!("= {default:?} must be one of Subsets"));
    }
    if found.redirect.is_some() && !(found.subsets.is_empty() && found.failover.is_empty()) {
        problems.add("Redirect", "goes with neither Subsets nor Failover: the service that it leads to has its own");
    }
    Entry::Resolver(Box::new(found))
}

/// Consul's two ways: a list of targets, or one service in several datacenters.
fn failover(node: &Node<'_>, problems: &mut Problems) -> Vec<Place> {
    let mut object = node.object(problems);
    object.refuse(&["Policy"], problems);
    let targets: Vec<Place> = object
        .list("Targets", FAILOVER_MAX, problems)
        .into_iter()
        .map(|node| {
            let object = node.object(problems);
            place(object, problems)
        })
        .collect();
    let (service, subset) = (object.service("Service", problems), subset(&mut object, "ServiceSubset", problems));
    let datacenters = object.texts("Datacenters", FAILOVER_MAX, problems);
    object.tenancy(problems);
    object.finish(problems);
    let has_place = service.is_some() || subset.is_some() || !datacenters.is_empty();
    if has_place != targets.is_empty() {
        problems.add(&*node.path, "must have either Targets, or Service, ServiceSubset or Datacenters");
    }
    let one = Place { service, subset, datacenter: None };
    match (targets.is_empty(), datacenters.is_empty()) {
        (false, _) => targets,
        (true, true) => vec![one],
        (true, false) => {
            datacenters.iter().map(|(_, name)| Place { datacenter: Some((*name).to_owned()), ..one.clone() }).collect()
        }
    }
}

fn protocol(node: Option<Node<'_>>, problems: &mut Problems) -> Option<Protocol> {
    let node = node?;
    let text = node.text(problems).filter(|text| !text.is_empty())?;
    text.parse().map_err(|_| problems.add(node.path, "must be tcp, http, http2, grpc or udp")).ok()
}

fn defaults(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let protocol = protocol(object.take("Protocol"), problems);
    // Read by what limits and ejects.
    for name in ["UpstreamConfig", "RateLimits"] {
        object.take(name);
    }
    object.refuse(
        &[
            "MeshGateway",
            "Expose",
            "ExternalSNI",
            "TransparentProxy",
            "Mode",
            "MutualTLSMode",
            "Destination",
            // One tunnel carries the calls of a service from a node: there are no connections to count.
            "MaxInboundConnections",
            "LocalConnectTimeoutMs",
            "LocalRequestTimeoutMs",
            "BalanceInboundConnections",
            "EnvoyExtensions",
        ],
        problems,
    );
    Entry::Defaults(Defaults { protocol, ..Defaults::default() })
}

fn proxy_defaults(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let mut protocol = None;
    if let Some(mut config) = object.object("Config", problems) {
        protocol = self::protocol(config.take("protocol"), problems);
        config.finish(problems);
    }
    let hops = object.texts("TrustedHops", HOPS_MAX, problems).into_iter();
    let trusted_hops =
        hops.filter_map(|(path, text)| text.parse::<Network>().map_err(|rule| problems.add(path, rule)).ok());
    let trusted_hops = trusted_hops.collect();
    // Read by what balances.
    object.leave("PrioritizeByLocality");
    object.refuse(
        &[
            "MeshGateway",
            "Expose",
            "TransparentProxy",
            "Mode",
            "MutualTLSMode",
            "AccessLogs",
            "EnvoyExtensions",
            "FailoverPolicy",
        ],
        problems,
    );
    Entry::Defaults(Defaults { protocol, trusted_hops })
}

fn faults(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let mut faults = Vec::new();
    for node in object.list("Faults", FAULTS_MAX, problems) {
        let mut object = node.object(problems);
        let when = matching(&mut object, problems);
        let delay = object.object("Delay", problems).and_then(|mut delay| {
            let share = delay.percent("Percent", problems).unwrap_or(10_000);
            let time = time(&mut delay, "Duration", problems);
            if time.is_none() {
                problems.add(delay.path_of("Duration"), "must be given");
            }
            delay.finish(problems);
            Some((share, time?))
        });
        let abort = object.object("Abort", problems).and_then(|object| abort(object, problems));
        if delay.is_none() && abort.is_none() {
            problems.add(&*node.path, "must have Delay or Abort");
        }
        object.finish(problems);
        faults.push(Fault { when, delay, abort });
    }
    bound_regexes(faults.iter().map(|fault| &fault.when), "Faults", problems);
    Entry::Faults(faults)
}

fn abort(mut object: Object<'_>, problems: &mut Problems) -> Option<(u16, Abort)> {
    let share = object.percent("Percent", problems).unwrap_or(10_000);
    let http = object.number("HTTPStatus", (200, 599), problems).and_then(|code| u16::try_from(code).ok());
    let grpc = object.number("GRPCStatus", (1, 16), problems).and_then(|code| u8::try_from(code).ok());
    let reset = object.flag("Reset", problems);
    let path = object.path_of("HTTPStatus");
    object.finish(problems);
    match (http, grpc, reset) {
        (Some(code), None, false) => Some((share, Abort::Http(code))),
        (None, Some(code), false) => Some((share, Abort::Grpc(code))),
        (None, None, true) => Some((share, Abort::Reset)),
        _ => {
            problems.add(path, "or GRPCStatus or Reset must be given, and only one of them");
            None
        }
    }
}

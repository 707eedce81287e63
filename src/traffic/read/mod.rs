//! Reads config entries in Consul's JSON, strictly: every problem is named, with its field's path.
//!
//! What a route or a fault is about is read by `matching`, what becomes of a route's requests by `route`.

mod matching;
pub(super) mod route;

use std::time::Duration;

use http::header::HeaderName;
use serde_json::Value;

use self::matching::{bound_regexes, matching};
use self::route::{edits, route};
use super::entry::{Abort, Defaults, Entry, Fault, Place, Resolver, Route, Split, Splitter, Sticky, SubsetRule};
use super::fields::{Node, Object, Problems};
use super::gateway;
use super::hops::Network;
use super::subset::Filter;
use crate::model::Protocol;

/// Most routes of one router.
pub const ROUTES_MAX: usize = 1024;
/// Most path expressions of one router: they share one set, of 1 MiB at most.
pub const PATH_REGEXES_MAX: usize = 128;
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
/// Longest path, value or expression, in bytes.
const TEXT_BYTES_MAX: usize = 1024;
/// Longest timeout or delay: beyond a day it is a mistake in the unit.
const TIME_MAX: Duration = Duration::from_hours(24);

/// Reads an entry whose kind and name were checked already, as far as it goes: with every problem at once, each with its
/// field's path. What has one is left out, or as if it were not given; lists keep their places.
pub(super) fn read(kind: &str, value: &Value) -> (Entry, Problems) {
    let mut problems = Problems::default();
    let entry = entry(kind, value, &mut problems);
    (entry, problems)
}

fn entry(kind: &str, value: &Value, problems: &mut Problems) -> Entry {
    let mut object = Object::open(String::new(), value, problems);
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
        _ => return Entry::Other,
    };
    object.finish(problems);
    entry
}

fn router(object: &mut Object<'_>, problems: &mut Problems) -> Entry {
    let routes = object.list("Routes", ROUTES_MAX, problems);
    let routes: Vec<Route> = routes.into_iter().map(|node| route(&node, problems)).collect();
    bound_regexes(routes.iter().map(|route| &route.when), "Routes", problems);
    Entry::Router(routes)
}

fn bounded(text: &str, path: &str, problems: &mut Problems) -> Option<String> {
    if text.len() > TEXT_BYTES_MAX {
        problems.add(path, format!("has {} bytes; at most {TEXT_BYTES_MAX} are allowed", text.len()));
        return None;
    }
    Some(text.to_owned())
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
        idle_timeout: time(object, "IdleTimeout", problems),
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

//! Reads the settings out of config entries in Consul's JSON, with weft's own fields beside them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::read::{Fields, Problems};
use super::{
    Algorithm, Balance, Callers, Ejection, Guard, HashField, HashPolicy, InPanic, Limits, MadeCookie, PathRegex,
    Priority, RING_POINTS, RING_POINTS_MAX, Rate, RateKey, RatePath, RateRule, RateRules, RateScope, SuccessRate,
    Table,
};
use crate::model::ServiceName;

/// Sources of a key; the last that give something count together.
const HASH_POLICIES_MAX: usize = 8;
/// Upstreams of one service with settings of their own.
const OVERRIDES_MAX: usize = 256;
/// Rules of one service: each request is held against them in order.
const RATE_RULES_MAX: usize = 64;
/// Expressions of one service: each is held against every request that no rule before it takes.
const RATE_REGEXES_MAX: usize = 16;
/// Fields of Consul's that weft does nothing with, of an upstream.
const WITHOUT_EFFECT: [&str; 10] = [
    "Protocol",
    "ConnectTimeoutMs",
    "EnvoyListenerJSON",
    "EnvoyClusterJSON",
    "MeshGateway",
    "BalanceOutboundConnections",
    "Namespace",
    "Partition",
    "Peer",
    "SamenessGroup",
];
/// Longest time that may be set.
const LONGEST: Duration = Duration::from_hours(24);
/// Largest count that may be set: what a worker holds, many times over.
const COUNT_MAX: u32 = 1_000_000;

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it stands.
    pub field: String,
    /// What it must be.
    pub rule: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.rule)
    }
}

/// What one entry sets.
#[derive(Debug, Default)]
struct Entry {
    balance: Option<Balance>,
    /// Whether zones come first, where the entry says so.
    zones: Option<bool>,
    default: Option<Guard>,
    overrides: BTreeMap<ServiceName, Guard>,
    rates: Option<RateRules>,
}

/// Compiles what `entries` (kind, name, JSON) set. Entries with problems set nothing: they were refused when they were
/// written, so only another version of weft may have let them in.
pub fn table<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str, &'a Value)>) -> Table {
    let mut table = Table::default();
    // What holds where a resolver does not say; its entry may come after theirs.
    let (mut unsaid, mut by_default) = (Vec::new(), None);
    for (kind, name, value) in entries {
        let Ok(entry) = read(kind, value) else { continue };
        if kind == "proxy-defaults" {
            by_default = entry.zones;
            continue;
        }
        let Ok(name) = name.parse::<ServiceName>() else { continue };
        if let Some(balance) = entry.balance {
            if entry.zones.is_none() {
                unsaid.push(name.clone());
            }
            table.balances.insert(name.clone(), Arc::new(balance));
        }
        if entry.default.is_some() || !entry.overrides.is_empty() {
            let overrides = entry.overrides.into_iter().map(|(of, guard)| (of, Arc::new(guard))).collect();
            table.callers.insert(name.clone(), Callers { default: entry.default.map(Arc::new), overrides });
        }
        if let Some(rates) = entry.rates {
            table.rates.insert(name, Arc::new(rates));
        }
    }
    if let Some(prefers_zone) = by_default {
        Arc::make_mut(&mut table.default_balance).prefers_zone = prefers_zone;
        for name in unsaid {
            if let Some(balance) = table.balances.get_mut(&name) {
                Arc::make_mut(balance).prefers_zone = prefers_zone;
            }
        }
    }
    table
}

/// Checks the parts of an entry that this module reads; the rest of the entry is others' to check.
///
/// # Errors
/// Every problem that was found.
pub fn check(kind: &str, value: &Value) -> Result<(), Vec<Problem>> {
    read(kind, value).map(drop)
}

fn read(kind: &str, value: &Value) -> Result<Entry, Vec<Problem>> {
    let mut problems = Problems::default();
    let mut entry = Entry::default();
    if let Value::Object(map) = value {
        let mut fields = Fields::of_entry(map);
        match kind {
            "service-resolver" => {
                if let Some(value) = fields.take("LoadBalancer") {
                    let (balance, zones) = read_balance(value, &mut problems);
                    (entry.balance, entry.zones) = (Some(balance), zones);
                }
                let by_locality = read_locality(&mut fields, &mut problems);
                if by_locality.is_some() && entry.zones.is_some() && by_locality != entry.zones {
                    problems.add("PrioritizeByLocality.Mode", "must not say another thing than LoadBalancer.Zones");
                }
                entry.zones = entry.zones.or(by_locality);
                if let Some(prefers_zone) = entry.zones {
                    entry.balance.get_or_insert_default().prefers_zone = prefers_zone;
                }
            }
            "proxy-defaults" => entry.zones = read_locality(&mut fields, &mut problems),
            "service-defaults" => {
                if let Some(value) = fields.take("UpstreamConfig") {
                    read_upstreams(value, &mut entry, &mut problems);
                }
                entry.rates = fields.take("RateLimits").map(|value| read_rates(value, &mut problems));
            }
            _ => {}
        }
        fields.ignore_rest();
    }
    if problems.0.is_empty() { Ok(entry) } else { Err(problems.0) }
}

/// Reads `service-resolver.LoadBalancer`.
///
/// # Errors
/// Every problem that was found.
pub fn balance(value: &Value) -> Result<Balance, Vec<Problem>> {
    alone(|problems| read_balance(value, problems).0)
}

/// Reads `UpstreamConfig.*.Limits`.
///
/// # Errors
/// Every problem that was found.
pub fn limits(value: &Value) -> Result<Limits, Vec<Problem>> {
    alone(|problems| read_limits("Limits", value, problems))
}

/// Reads `UpstreamConfig.*.PassiveHealthCheck`.
///
/// # Errors
/// Every problem that was found.
pub fn passive_health_check(value: &Value) -> Result<Ejection, Vec<Problem>> {
    alone(|problems| read_ejection("PassiveHealthCheck", value, problems))
}

/// Reads `service-defaults.RateLimits`.
///
/// # Errors
/// Every problem that was found.
pub fn rate_limits(value: &Value) -> Result<RateRules, Vec<Problem>> {
    alone(|problems| read_rates(value, problems))
}

fn alone<T>(read: impl FnOnce(&mut Problems) -> T) -> Result<T, Vec<Problem>> {
    let mut problems = Problems::default();
    let value = read(&mut problems);
    if problems.0.is_empty() { Ok(value) } else { Err(problems.0) }
}

/// `PrioritizeByLocality.Mode`: whether zones come first, if it says so.
fn read_locality(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<bool> {
    let value = fields.take("PrioritizeByLocality")?;
    let mut object = Fields::of("PrioritizeByLocality", value, problems);
    let prefers = match object.text("Mode", problems).unwrap_or_default() {
        "" => None,
        "none" => Some(false),
        "failover" => Some(true),
        _ => {
            problems.add(object.at("Mode"), "must be failover or none");
            None
        }
    };
    object.finish(problems);
    prefers
}

/// Also tells whether it says if zones come first.
fn read_balance(value: &Value, problems: &mut Problems) -> (Balance, Option<bool>) {
    let mut fields = Fields::of("LoadBalancer", value, problems);
    let mut balance = Balance::default();
    let policy = fields.text("Policy", problems).unwrap_or_default().to_ascii_lowercase();
    let choices = read_choices(&mut fields, problems);
    let (points_min, points_max) = read_ring(&mut fields, problems);
    balance.algorithm = match policy.as_str() {
        "" => Algorithm::Auto,
        "peak_ewma" => Algorithm::PeakEwma,
        "least_request" => Algorithm::LeastRequest { choices },
        "round_robin" | "weighted" => Algorithm::RoundRobin,
        "random" => Algorithm::Random,
        "ring_hash" => Algorithm::RingHash { points_min, points_max },
        "maglev" => Algorithm::Maglev,
        _ => {
            let rule = "must be peak_ewma, least_request, round_robin, weighted, random, ring_hash or maglev";
            problems.add(fields.at("Policy"), rule);
            Algorithm::Auto
        }
    };
    for (at, policy) in fields.list("HashPolicies", HASH_POLICIES_MAX, problems).iter().enumerate() {
        let path = format!("LoadBalancer.HashPolicies[{at}]");
        balance.hash.extend(read_hash_policy(&path, policy, problems));
    }
    if !balance.hash.is_empty() && !balance.algorithm.is_hash() {
        problems.add(fields.at("HashPolicies"), "needs the Policy ring_hash or maglev");
    }
    balance.slow_start = fields.duration("SlowStart", LONGEST, problems).unwrap_or_default();
    let mut zones = None;
    if let Some(text) = fields.text("Zones", problems) {
        match text {
            "prefer" => zones = Some(true),
            "ignore" => zones = Some(false),
            _ => problems.add(fields.at("Zones"), "must be prefer or ignore"),
        }
    }
    balance.prefers_zone = zones.unwrap_or(balance.prefers_zone);
    if let Some(factor) = fields.decimal("Overprovisioning", 1.0..=10.0, problems) {
        balance.overprovisioning = factor;
    }
    fields.finish(problems);
    (balance, zones)
}

fn read_choices(fields: &mut Fields<'_>, problems: &mut Problems) -> u8 {
    let Some(value) = fields.take("LeastRequestConfig") else { return 2 };
    let mut config = Fields::of("LoadBalancer.LeastRequestConfig", value, problems);
    let choices = config.number("ChoiceCount", 2..=16, problems).unwrap_or(2);
    config.finish(problems);
    u8::try_from(choices).unwrap_or(2)
}

fn read_ring(fields: &mut Fields<'_>, problems: &mut Problems) -> (u32, u32) {
    let Some(value) = fields.take("RingHashConfig") else { return (RING_POINTS, RING_POINTS_MAX) };
    let mut config = Fields::of("LoadBalancer.RingHashConfig", value, problems);
    let most = config.number("MaximumRingSize", 1..=RING_POINTS_MAX, problems).unwrap_or(RING_POINTS_MAX);
    let least = config.number("MinimumRingSize", 1..=RING_POINTS_MAX, problems).unwrap_or(RING_POINTS.min(most));
    if least > most {
        problems.add(config.at("MinimumRingSize"), "must not be greater than MaximumRingSize");
    }
    config.finish(problems);
    (least, most.max(least))
}

fn read_hash_policy(path: &str, value: &Value, problems: &mut Problems) -> Option<HashPolicy> {
    let mut fields = Fields::of(path, value, problems);
    let kind = fields.text("Field", problems).unwrap_or_default();
    let name = fields.text("FieldValue", problems).unwrap_or_default();
    let by_source = fields.flag("SourceIP", problems).unwrap_or_default();
    let terminal = fields.flag("Terminal", problems).unwrap_or_default();
    let make = fields.take("CookieConfig").map(|value| {
        let mut config = Fields::of(&fields.at("CookieConfig"), value, problems);
        let is_session = config.flag("Session", problems).unwrap_or_default();
        let ttl = config.duration("TTL", LONGEST * 365, problems).filter(|ttl| !ttl.is_zero());
        let path = config.text("Path", problems).unwrap_or_default().to_owned();
        if is_session && ttl.is_some() {
            problems.add(config.at("Session"), "must not be given with TTL");
        }
        if !path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b';') {
            problems.add(config.at("Path"), "must be a path of printable letters without `;`");
        }
        config.finish(problems);
        MadeCookie { ttl, path }
    });
    let is_cookie = kind == "cookie";
    if make.is_some() && !is_cookie {
        problems.add(fields.at("CookieConfig"), "needs the Field cookie");
    }
    let field = match (kind, by_source) {
        ("", true) if name.is_empty() => Some(HashField::SourceIp),
        ("header", false) => name.parse().ok().map(HashField::Header),
        ("cookie", false) if is_token(name) => Some(HashField::Cookie { name: name.to_owned(), make }),
        ("query_parameter", false) if !name.is_empty() => Some(HashField::Query(name.to_owned())),
        _ => None,
    };
    if field.is_none() {
        problems.add(path, "needs a Field (header, cookie, query_parameter) and its FieldValue, or SourceIP alone");
    }
    fields.finish(problems);
    Some(HashPolicy { field: field?, terminal })
}

/// Tells whether `name` may name a cookie (RFC 9110 §5.6.2).
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn read_upstreams(value: &Value, entry: &mut Entry, problems: &mut Problems) {
    let mut fields = Fields::of("UpstreamConfig", value, problems);
    if let Some(value) = fields.take("Defaults") {
        let mut defaults = Fields::of("UpstreamConfig.Defaults", value, problems);
        entry.default = read_guard(&mut defaults, "UpstreamConfig.Defaults", problems);
        defaults.refuse(&WITHOUT_EFFECT, problems);
        defaults.finish(problems);
    }
    for (at, value) in fields.list("Overrides", OVERRIDES_MAX, problems).iter().enumerate() {
        let path = format!("UpstreamConfig.Overrides[{at}]");
        let mut one = Fields::of(&path, value, problems);
        let name = one.text("Name", problems).unwrap_or_default().parse::<ServiceName>();
        let guard = read_guard(&mut one, &path, problems);
        match (name, guard) {
            (Ok(name), Some(guard)) => drop(entry.overrides.insert(name, guard)),
            (Ok(_), None) => {}
            (Err(error), _) => problems.add(one.at("Name"), format!("must name a service: {error}")),
        }
        one.refuse(&WITHOUT_EFFECT, problems);
        one.finish(problems);
    }
    fields.finish(problems);
}

fn read_guard(fields: &mut Fields<'_>, path: &str, problems: &mut Problems) -> Option<Guard> {
    let limits = fields.take("Limits").map(|value| read_limits(&format!("{path}.Limits"), value, problems));
    let ejection = fields
        .take("PassiveHealthCheck")
        .map(|value| read_ejection(&format!("{path}.PassiveHealthCheck"), value, problems));
    if limits.is_none() && ejection.is_none() {
        return None;
    }
    Some(Guard { limits: limits.unwrap_or_default(), ejection: ejection.unwrap_or_default() })
}

fn read_limits(path: &str, value: &Value, problems: &mut Problems) -> Limits {
    let mut fields = Fields::of(path, value, problems);
    let standard = Limits::default();
    let mut priority = |name: &str, problems: &mut Problems| {
        let text = fields.text(name, problems)?;
        text.parse::<Priority>().map_err(|rule| problems.add(fields.at(name), rule)).ok()
    };
    let (usual, highest) = (priority("Priority", problems), priority("PriorityMax", problems));
    let priority_max = highest.unwrap_or(standard.priority_max);
    // What may claim little is little.
    let priority = usual.unwrap_or(standard.priority.min(priority_max));
    if priority > priority_max {
        problems
            .add(fields.at("Priority"), format!("= {priority} must not be higher than PriorityMax = {priority_max}"));
    }
    let limits = Limits {
        connections: fields.number("MaxConnections", 0..=COUNT_MAX, problems).unwrap_or(standard.connections),
        pending: fields.number("MaxPendingRequests", 0..=COUNT_MAX, problems).unwrap_or(standard.pending),
        requests: fields.number("MaxConcurrentRequests", 0..=COUNT_MAX, problems).unwrap_or(standard.requests),
        retries: fields.number("MaxConcurrentRetries", 0..=COUNT_MAX, problems).unwrap_or(standard.retries),
        per_instance: fields.number("MaxRequestsPerInstance", 1..=COUNT_MAX, problems),
        is_adaptive: fields.flag("AdaptiveConcurrency", problems).unwrap_or_default(),
        priority,
        priority_max,
    };
    fields.finish(problems);
    limits
}

fn read_ejection(path: &str, value: &Value, problems: &mut Problems) -> Ejection {
    let mut fields = Fields::of(path, value, problems);
    let mut ejection = Ejection::default();
    let second = Duration::from_secs(1);
    let mut duration = |name: &str, to: &mut Duration, problems: &mut Problems| {
        if let Some(given) = fields.duration(name, LONGEST, problems) {
            if given < second / 100 {
                problems.add(fields.at(name), "must be 10ms or more");
            }
            *to = given;
        }
    };
    duration("Interval", &mut ejection.interval, problems);
    duration("BaseEjectionTime", &mut ejection.base, problems);
    duration("MaxEjectionTime", &mut ejection.longest, problems);
    ejection.longest = ejection.longest.max(ejection.base);
    if let Some(failures) = fields.number("MaxFailures", 0..=COUNT_MAX, problems) {
        ejection.consecutive = failures;
    }
    if let Some(percent) = fields.number("EnforcingConsecutive5xx", 0..=100, problems) {
        // What is enforced in some cases only cannot be explained: all or none.
        match percent {
            0 => ejection.consecutive = 0,
            100 => {}
            _ => problems.add(fields.at("EnforcingConsecutive5xx"), "must be 0 or 100"),
        }
    }
    if fields.flag("GatewayFailuresOnly", problems).unwrap_or_default() {
        ejection.counts_every_5xx = false;
    }
    if let Some(percent) = fields.number("MaxEjectionPercent", 0..=100, problems) {
        ejection.percent_max = percent;
    }
    if let Some(value) = fields.take("SuccessRate") {
        let mut rate = Fields::of(&fields.at("SuccessRate"), value, problems);
        let standard = SuccessRate { instances_min: 5, requests_min: 100, deviations: 1.9 };
        let is_on = rate.flag("Enabled", problems).unwrap_or(true);
        let read = SuccessRate {
            instances_min: rate.number("MinimumHosts", 2..=COUNT_MAX, problems).unwrap_or(standard.instances_min),
            requests_min: rate.number("RequestVolume", 1..=COUNT_MAX, problems).unwrap_or(standard.requests_min),
            deviations: rate.decimal("StdevFactor", 0.1..=100.0, problems).unwrap_or(standard.deviations),
        };
        rate.finish(problems);
        ejection.success_rate = is_on.then_some(read);
    }
    if let Some(percent) = fields.number("PanicThreshold", 0..=100, problems) {
        ejection.panic_percent = percent;
    }
    if fields.flag("FailClosed", problems).unwrap_or_default() {
        ejection.in_panic = InPanic::FailClosed;
    }
    fields.finish(problems);
    ejection
}

fn read_rates(value: &Value, problems: &mut Problems) -> RateRules {
    let mut fields = Fields::of("RateLimits", value, problems);
    let (mut rules, mut regexes) = (Vec::new(), 0);
    if let Some(value) = fields.take("InstanceLevel") {
        let path = "RateLimits.InstanceLevel";
        let mut level = Fields::of(path, value, problems);
        for (at, value) in level.list("Routes", RATE_RULES_MAX, problems).iter().enumerate() {
            let path = format!("{path}.Routes[{at}]");
            let mut route = Fields::of(&path, value, problems);
            let on = read_path(&mut route, &path, problems);
            if let RatePath::Regex(_) = on {
                regexes += 1;
                if regexes > RATE_REGEXES_MAX {
                    problems.add(
                        route.at("PathRegex"),
                        format!("is one too many: at most {RATE_REGEXES_MAX} in a service"),
                    );
                }
            }
            rules.extend(read_rate(&mut route, &path, on, problems));
            route.finish(problems);
        }
        let has_own = rules.len();
        rules.extend(read_rate(&mut level, path, RatePath::Any, problems));
        if rules.is_empty() && problems.0.is_empty() && has_own == 0 {
            problems.add(path, "needs RequestsPerSecond or Routes");
        }
        level.finish(problems);
    }
    fields.finish(problems);
    RateRules { rules }
}

fn read_path(route: &mut Fields<'_>, path: &str, problems: &mut Problems) -> RatePath {
    let mut given = |name: &str| route.text(name, problems).filter(|text| !text.is_empty());
    let (exact, prefix, regex) = (given("PathExact"), given("PathPrefix"), given("PathRegex"));
    match (exact, prefix, regex) {
        (Some(exact), None, None) => RatePath::Exact(exact.to_owned()),
        (None, Some(prefix), None) => RatePath::Prefix(prefix.to_owned()),
        (None, None, Some(regex)) => match PathRegex::new(regex) {
            Ok(regex) => RatePath::Regex(regex),
            Err(error) => {
                problems.add(route.at("PathRegex"), format!("cannot be used: {error}"));
                RatePath::Any
            }
        },
        _ => {
            problems.add(path, "needs one of PathExact, PathPrefix and PathRegex");
            RatePath::Any
        }
    }
}

fn read_rate(fields: &mut Fields<'_>, path: &str, on: RatePath, problems: &mut Problems) -> Option<RateRule> {
    let per_second = fields.decimal("RequestsPerSecond", 0.001..=f64::from(COUNT_MAX), problems);
    let burst = fields.number("RequestsMaxBurst", 1..=COUNT_MAX, problems);
    let key = match fields.text("Per", problems) {
        None | Some("") => RateKey::All,
        Some("source") => RateKey::Source,
        Some(text) => {
            let name = text.strip_prefix("header:").and_then(|name| name.parse().ok());
            if name.is_none() {
                problems.add(fields.at("Per"), "must be source or header:NAME");
            }
            name.map_or(RateKey::All, RateKey::Header)
        }
    };
    let scope = match fields.text("Scope", problems) {
        None | Some("" | "node") => RateScope::Node,
        Some("cluster") => {
            if matches!(key, RateKey::Header(_)) {
                // Any caller could make up values without end, and each would be a limit that all nodes speak of.
                problems
                    .add(fields.at("Scope"), "must be node where Per is a header: cluster is for source, or for all");
            }
            RateScope::Cluster
        }
        Some(_) => {
            problems.add(fields.at("Scope"), "must be node or cluster");
            RateScope::Node
        }
    };
    let Some(per_second) = per_second else {
        if burst.is_some() || on != RatePath::Any {
            problems.add(format!("{path}.RequestsPerSecond"), "must be given");
        }
        return None;
    };
    // As Consul: the burst is one second's worth unless it is given.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0.001 to 1,000,000, rounded up")]
    let burst = burst.unwrap_or(per_second.ceil() as u32).max(1);
    Some(RateRule { path: on, key, rate: Rate { per_second, burst }, scope })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_given_has_the_defaults_that_the_field_uses() {
        let read = balance(&json!({"Policy": "ring_hash", "HashPolicies": [
            {"Field": "header", "FieldValue": "x-user", "Terminal": true},
            {"field": "cookie", "field_value": "seen", "cookie_config": {"ttl": "1h30m", "path": "/"}},
            {"source_ip": true}]}))
        .unwrap();
        assert_eq!(read.algorithm, Algorithm::RingHash { points_min: 1024, points_max: RING_POINTS_MAX });
        assert_eq!(
            read.hash[0],
            HashPolicy { field: HashField::Header(http::HeaderName::from_static("x-user")), terminal: true }
        );
        let made = MadeCookie { ttl: Some(Duration::from_mins(90)), path: "/".to_owned() };
        assert_eq!(read.hash[1].field, HashField::Cookie { name: "seen".to_owned(), make: Some(made) });
        assert_eq!(read.hash[2].field, HashField::SourceIp);
        assert_eq!(balance(&json!({})).unwrap(), Balance::default());
        let read = passive_health_check(&json!({"Interval": 2_000_000_000u64, "MaxFailures": 7})).unwrap();
        assert_eq!((read.interval, read.consecutive, read.percent_max), (Duration::from_secs(2), 7, 10));
        let read = limits(&json!({"MaxConnections": 512})).unwrap();
        assert_eq!((read.connections, read.requests, read.retries), (512, 1024, 1024));
        assert_eq!((read.priority, read.priority_max), (Priority::Normal, Priority::Normal));
        let read = limits(&json!({"PriorityMax": "low"})).unwrap();
        assert_eq!((read.priority, read.priority_max), (Priority::Low, Priority::Low));
        let read = limits(&json!({"PriorityMax": "high"})).unwrap();
        assert_eq!((read.priority, read.priority_max), (Priority::Normal, Priority::High));
        let read = rate_limits(&json!({"InstanceLevel": {"RequestsPerSecond": 10, "Per": "source",
            "Routes": [{"PathPrefix": "/slow", "RequestsPerSecond": 0.5, "RequestsMaxBurst": 2}]}}))
        .unwrap();
        assert_eq!(read.rules.len(), 2);
        assert_eq!(read.rules[0].rate, Rate { per_second: 0.5, burst: 2 });
        assert_eq!((read.rules[1].rate.burst, &read.rules[1].key), (10, &RateKey::Source));
    }

    #[test]
    fn every_problem_is_named_with_its_field() {
        let bad = json!({"Kind": "service-resolver", "Name": "web", "LoadBalancer": {"Policy": "best", "SlowStart": "soon",
            "Zones": 3, "HashPolicies": [{"Field": "header"}], "Wieght": 1, "LeastRequestConfig": {"ChoiceCount": 1}}});
        let named = |kind: &str, value: &Value| {
            let mut fields: Vec<String> = check(kind, value).unwrap_err().into_iter().map(|one| one.field).collect();
            fields.sort();
            fields
        };
        assert_eq!(
            named("service-resolver", &bad),
            [
                "LoadBalancer.HashPolicies[0]",
                "LoadBalancer.LeastRequestConfig.ChoiceCount",
                "LoadBalancer.Policy",
                "LoadBalancer.SlowStart",
                "LoadBalancer.Wieght",
                "LoadBalancer.Zones",
            ]
        );
        let bad = json!({"UpstreamConfig": {"Defaults": {"Limits": {"MaxConnections": -1, "Priority": "high"}, "Protocol": "http"},
            "Overrides": [{"Name": "", "PassiveHealthCheck": {"MaxEjectionPercent": 101, "EnforcingConsecutive5xx": 50}}]},
            "RateLimits": {"InstanceLevel": {"RequestsMaxBurst": 1, "Routes": [{"RequestsPerSecond": 1}]}}});
        assert_eq!(
            named("service-defaults", &bad),
            [
                "RateLimits.InstanceLevel.RequestsPerSecond",
                "RateLimits.InstanceLevel.Routes[0]",
                "UpstreamConfig.Defaults.Limits.MaxConnections",
                "UpstreamConfig.Defaults.Limits.Priority",
                "UpstreamConfig.Defaults.Protocol",
                "UpstreamConfig.Overrides[0].Name",
                "UpstreamConfig.Overrides[0].PassiveHealthCheck.EnforcingConsecutive5xx",
                "UpstreamConfig.Overrides[0].PassiveHealthCheck.MaxEjectionPercent",
            ]
        );
    }

    #[test]
    fn a_rate_s_scope_and_expression_are_read_and_what_cannot_hold_is_refused() {
        let read = rate_limits(&json!({"InstanceLevel": {"RequestsPerSecond": 10, "Scope": "cluster", "Per": "source",
            "Routes": [{"PathRegex": "/v[0-9]+/items", "RequestsPerSecond": 1, "Scope": "node"}]}}))
        .unwrap();
        assert_eq!((read.rules[0].scope, read.rules[1].scope), (RateScope::Node, RateScope::Cluster));
        assert!(read.rules[0].path.matches("/v12/items") && !read.rules[0].path.matches("/v12/items/1"));
        assert!(!read.rules[0].path.matches(&format!("/v{}/items", "1".repeat(5_000))), "longer than its bound");
        let named = |rule: Value| {
            let problems = rate_limits(&json!({"InstanceLevel": {"Routes": [rule]}})).unwrap_err();
            problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let said = named(json!({"PathRegex": "/a(", "RequestsPerSecond": 1}));
        assert!(said.contains("Routes[0].PathRegex cannot be used"), "{said}");
        let said =
            named(json!({"PathPrefix": "/a", "RequestsPerSecond": 1, "Scope": "cluster", "Per": "header:x-user"}));
        assert!(said.contains("Scope must be node where Per is a header"), "{said}");
        let said = named(json!({"PathPrefix": "/a", "PathRegex": "/b", "RequestsPerSecond": 1, "Scope": "world"}));
        assert!(said.contains("needs one of") && said.contains("Scope must be node or cluster"), "{said}");
        let many: Vec<Value> =
            (0..17).map(|at| json!({"PathRegex": format!("/{at}"), "RequestsPerSecond": 1})).collect();
        assert_eq!(rate_limits(&json!({"InstanceLevel": {"Routes": many}})).unwrap_err().len(), 1);
    }

    #[test]
    fn locality_is_what_the_resolver_says_else_the_proxy_defaults_say_else_preferred() {
        let prefers = |resolver: &Value, global: Option<&Value>| {
            let entries = [("service-resolver", "web", resolver)].into_iter();
            let table = table(entries.chain(global.map(|value| ("proxy-defaults", "global", value))));
            let of = |name: &str| table.balance(&name.parse().unwrap()).prefers_zone;
            (of("web"), of("other"))
        };
        let mode = |mode: &str| json!({"PrioritizeByLocality": {"Mode": mode}});
        assert_eq!(prefers(&json!({}), None), (true, true));
        assert_eq!(prefers(&mode("none"), None), (false, true));
        assert_eq!(prefers(&json!({"LoadBalancer": {"Policy": "random"}}), Some(&mode("none"))), (false, false));
        assert_eq!(prefers(&mode("failover"), Some(&mode("none"))), (true, false));
        assert_eq!(prefers(&json!({"LoadBalancer": {"Zones": "prefer"}}), Some(&mode("none"))), (true, false));
        assert!(check("service-resolver", &mode("near")).is_err() && check("proxy-defaults", &mode("near")).is_err());
        let both = json!({"LoadBalancer": {"Zones": "ignore"}, "PrioritizeByLocality": {"Mode": "failover"}});
        assert!(check("service-resolver", &both).is_err(), "two things at once");
    }

    #[test]
    fn what_weft_does_nothing_with_is_refused_unless_it_says_nothing() {
        let upstream = |value: Value| check("service-defaults", &json!({"UpstreamConfig": {"Defaults": value}}));
        assert!(upstream(json!({"MeshGateway": {"Mode": ""}, "ConnectTimeoutMs": 0, "Protocol": ""})).is_ok());
        for (name, value) in
            [("MeshGateway", json!({"Mode": "local"})), ("ConnectTimeoutMs", json!(5)), ("Limit", json!({}))]
        {
            let problems = upstream(json!({ name: value })).unwrap_err();
            assert_eq!(problems[0].field, format!("UpstreamConfig.Defaults.{name}"));
        }
    }

    #[test]
    fn an_override_goes_before_the_caller_s_default_and_both_before_weft_s() {
        let defaults = json!({"UpstreamConfig": {"Defaults": {"Limits": {"MaxConcurrentRequests": 7}},
            "Overrides": [{"Name": "db", "Limits": {"MaxConcurrentRequests": 3}}]}});
        let resolver = json!({"LoadBalancer": {"Policy": "maglev"}});
        let table = table([("service-defaults", "web", &defaults), ("service-resolver", "db", &resolver)]);
        let name = |text: &str| text.parse::<ServiceName>().unwrap();
        let requests = |source: Option<&str>, destination: &str| {
            let source = source.map(name);
            table.guard(source.as_ref(), &name(destination)).limits.requests
        };
        assert_eq!(requests(Some("web"), "db"), 3);
        assert_eq!(requests(Some("web"), "api"), 7);
        assert_eq!(requests(Some("api"), "db"), 1024);
        assert_eq!(requests(None, "db"), 1024);
        assert!(table.has_caller(Some(&name("web"))) && !table.has_caller(Some(&name("api"))));
        assert_eq!(table.balance(&name("db")).algorithm, Algorithm::Maglev);
        assert_eq!(table.hashed().count(), 1);
    }
}

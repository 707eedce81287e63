//! The keys of DNS: `domain`, `alt_domain`, `recursors`, `addresses.dns`, `ports.dns` and the block `dns_config`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;

use super::problem::{Problem, Source};
use super::raw::{Given, Raw};
use super::{DNS_PORT_DEFAULT, RECURSOR_TIMEOUT_MAX};
use crate::dns::{DnsConfig, LISTEN_MAX, RECURSORS_MAX};

/// Keys of `dns_config` that mean nothing here: every agent answers from what it knows, and always compresses.
const CONSUL_ONLY: [&str; 9] = [
    "allow_stale",
    "max_stale",
    "use_cache",
    "cache_max_age",
    "disable_compression",
    "recursor_strategy",
    "enable_additional_node_meta_txt",
    "prefer_namespace",
    "features",
];
/// Longest TTL, in seconds (RFC 2181 §8).
const TTL_MAX_S: u32 = i32::MAX.unsigned_abs();
/// The port of DNS where a recursor names none.
const RECURSOR_PORT: u16 = 53;

/// What files and flags say of DNS.
#[derive(Debug, Default)]
pub(crate) struct RawDns {
    pub(crate) port: Option<Given<i64>>,
    addresses: Option<Given<String>>,
    domain: Option<Given<String>>,
    alt_domain: Option<Given<String>>,
    recursors: Vec<Given<String>>,
    recursor_timeout: Option<Given<Duration>>,
    node_ttl: Option<Given<Duration>>,
    service_ttl: BTreeMap<String, Given<Duration>>,
    /// Where one of them is read to.
    one_service_ttl: Option<Given<Duration>>,
    udp_answer_limit: Option<Given<u64>>,
    a_record_limit: Option<Given<u64>>,
    enable_truncate: Option<Given<bool>>,
    only_passing: Option<Given<bool>>,
    near: Option<Given<String>>,
    soa_refresh: Option<Given<Duration>>,
    soa_retry: Option<Given<Duration>>,
    soa_expire: Option<Given<Duration>>,
    soa_minimum: Option<Given<Duration>>,
}

impl Raw {
    /// Takes a top-level key of DNS.
    pub(super) fn add_dns(&mut self, source: &Source, key: &str, value: Value) {
        match key {
            "domain" => self.text(source, key, value, |raw| &mut raw.dns.domain),
            "alt_domain" => self.text(source, key, value, |raw| &mut raw.dns.alt_domain),
            "recursors" => self.recursors(source, value),
            "addresses" => self.addresses(source, value),
            _ => self.dns_config(source, value),
        }
    }

    /// Takes `ports.dns`: a port, or -1.
    pub(super) fn add_dns_port(&mut self, source: &Source, key: &str, value: &Value) {
        match value.as_i64() {
            Some(value) => self.dns.port = Some(Given { value, source: source.clone(), key: key.to_owned() }),
            None => self.mistyped(source, key, value, "must be a port, 1 to 65535, or -1 for off"),
        }
    }

    fn recursors(&mut self, source: &Source, value: Value) {
        let list = match value {
            Value::Array(list) => list,
            one => vec![one],
        };
        for (at, value) in list.into_iter().enumerate() {
            let key = format!("recursors[{at}]");
            match value {
                Value::String(value) => self.dns.recursors.push(Given { value, source: source.clone(), key }),
                other => self.mistyped(source, &key, &other, "must be an address in quotes"),
            }
        }
    }

    fn addresses(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "addresses", &value, "must be a block of texts");
        };
        for (name, value) in map {
            let key = format!("addresses.{name}");
            match name.as_str() {
                "dns" => self.text(source, &key, value, |raw| &mut raw.dns.addresses),
                "http" => self.text(source, &key, value, |raw| &mut raw.http_api.address),
                "https" => self.text(source, &key, value, |raw| &mut raw.http_api.https_address),
                "grpc" | "grpc_tls" => self.warn(source, &key, "has no effect: weft serves no gRPC"),
                _ => self.unknown(source, &key),
            }
        }
    }

    fn dns_config(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "dns_config", &value, "must be a block");
        };
        for (name, value) in map {
            let key = format!("dns_config.{name}");
            match name.as_str() {
                "node_ttl" => self.duration(source, &key, &value, |raw| &mut raw.dns.node_ttl),
                "service_ttl" => self.service_ttl(source, &key, value),
                "udp_answer_limit" => self.count(source, &key, &value, |raw| &mut raw.dns.udp_answer_limit),
                "a_record_limit" => self.count(source, &key, &value, |raw| &mut raw.dns.a_record_limit),
                "enable_truncate" => self.switch(source, &key, &value, |raw| &mut raw.dns.enable_truncate),
                "only_passing" => self.switch(source, &key, &value, |raw| &mut raw.dns.only_passing),
                "near" => self.text(source, &key, value, |raw| &mut raw.dns.near),
                "recursor_timeout" => self.duration(source, &key, &value, |raw| &mut raw.dns.recursor_timeout),
                "soa" => self.soa(source, &key, value),
                name if CONSUL_ONLY.contains(&name) => {
                    self.warn(source, &key, "has no effect: every agent answers at once from what it knows");
                }
                _ => self.unknown(source, &key),
            }
        }
    }

    fn service_ttl(&mut self, source: &Source, key: &str, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, key, &value, "must be a block of durations by service");
        };
        for (name, value) in map {
            let key = format!("{key}.{name}");
            self.duration(source, &key, &value, |raw| &mut raw.dns.one_service_ttl);
            if let Some(given) = self.dns.one_service_ttl.take() {
                self.dns.service_ttl.insert(name.to_ascii_lowercase(), given);
            }
        }
    }

    fn soa(&mut self, source: &Source, key: &str, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, key, &value, "must be a block of seconds");
        };
        for (name, value) in map {
            let key = format!("{key}.{name}");
            // Bare numbers are seconds here, as in Consul's files.
            let value = value.as_u64().map_or(value, |seconds| Value::String(format!("{seconds}s")));
            match name.as_str() {
                "refresh" => self.duration(source, &key, &value, |raw| &mut raw.dns.soa_refresh),
                "retry" => self.duration(source, &key, &value, |raw| &mut raw.dns.soa_retry),
                "expire" => self.duration(source, &key, &value, |raw| &mut raw.dns.soa_expire),
                "min_ttl" => self.duration(source, &key, &value, |raw| &mut raw.dns.soa_minimum),
                _ => self.unknown(source, &key),
            }
        }
    }
}

/// Resolves what was said of DNS for an agent whose API is at `client`; none if it is off.
pub(super) fn resolve(raw: RawDns, client: IpAddr, problems: &mut Vec<Problem>) -> Option<DnsConfig> {
    let mut check = Check { problems };
    let port = match &raw.port {
        None => Some(DNS_PORT_DEFAULT),
        Some(given) if given.value == -1 => None,
        Some(given) => match u16::try_from(given.value) {
            Ok(port) if port > 0 => Some(port),
            _ => {
                check.refuse(given, "must be a port, 1 to 65535, or -1 for off");
                None
            }
        },
    };
    let addresses = check.addresses(raw.addresses.as_ref(), client);
    let listen: Vec<SocketAddr> =
        port.into_iter().flat_map(|port| addresses.iter().map(move |ip| SocketAddr::new(*ip, port))).collect();
    let mut config = DnsConfig::on(listen);
    if let Some(domain) = check.parsed(raw.domain.as_ref()) {
        config.domain = domain;
    }
    match &raw.alt_domain {
        Some(given) if given.value.is_empty() => config.alt_domain = None,
        given => {
            if let Some(domain) = check.parsed(given.as_ref()) {
                config.alt_domain = Some(domain);
            }
        }
    }
    // Named twice, a domain needs no second one.
    config.alt_domain = config.alt_domain.filter(|alt| *alt != config.domain);
    config.recursors = check.recursors(&raw.recursors, &config.listen);
    check.timing(&raw, &mut config);
    for (slot, given) in
        [(&mut config.udp_answer_limit, &raw.udp_answer_limit), (&mut config.a_record_limit, &raw.a_record_limit)]
    {
        if let Some(given) = given {
            *slot = usize::try_from(given.value).unwrap_or(usize::MAX);
        }
    }
    config.enable_truncate = raw.enable_truncate.is_some_and(|given| given.value);
    config.near = check.parsed(raw.near.as_ref().filter(|given| !given.value.is_empty()));
    config.only_passing = raw.only_passing.is_some_and(|given| given.value);
    (!config.listen.is_empty()).then_some(config)
}

struct Check<'a> {
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    fn refuse<T: Display>(&mut self, given: &Given<T>, rule: impl Into<String>) {
        self.problems.push(given.problem(rule));
    }

    fn parsed<T: std::str::FromStr<Err: Display>>(&mut self, given: Option<&Given<String>>) -> Option<T> {
        let given = given?;
        given.value.parse().map_err(|error: T::Err| self.refuse(given, error.to_string())).ok()
    }

    /// Consul's form: addresses with white space between them.
    fn addresses(&mut self, given: Option<&Given<String>>, client: IpAddr) -> Vec<IpAddr> {
        let Some(given) = given else { return vec![client] };
        let mut addresses: Vec<IpAddr> = Vec::new();
        for text in given.value.split_whitespace() {
            match text.parse() {
                Ok(ip) if !addresses.contains(&ip) => addresses.push(ip),
                Ok(_) => {}
                Err(_) => self.refuse(given, "must be IP addresses without ports, with spaces between them"),
            }
        }
        if addresses.is_empty() || addresses.len() > LISTEN_MAX {
            self.refuse(given, format!("must name 1 to {LISTEN_MAX} addresses"));
        }
        addresses
    }

    fn recursors(&mut self, given: &[Given<String>], listen: &[SocketAddr]) -> Vec<SocketAddr> {
        if let Some(over) = given.get(RECURSORS_MAX) {
            self.refuse(over, format!("is one too many: at most {RECURSORS_MAX} recursors are asked"));
        }
        let mut recursors = Vec::new();
        for one in given {
            let ip = one.value.parse().map(|ip: IpAddr| SocketAddr::new(ip, RECURSOR_PORT));
            match ip.or_else(|_| one.value.parse::<SocketAddr>()) {
                Ok(addr) if addr.ip().is_unspecified() || addr.port() == 0 => {
                    self.refuse(one, "must be an address that can be asked");
                }
                Ok(addr) if listen.contains(&addr) => {
                    self.refuse(one, "is this agent itself: name the resolver that knows the other names");
                }
                Ok(addr) if recursors.contains(&addr) => {}
                Ok(addr) => recursors.push(addr),
                Err(_) => self.refuse(one, "must be an IP address, or one with :PORT"),
            }
        }
        recursors
    }

    fn timing(&mut self, raw: &RawDns, config: &mut DnsConfig) {
        if let Some(given) = &raw.recursor_timeout {
            config.recursor_timeout = given.value;
            if given.value.is_zero() || given.value > RECURSOR_TIMEOUT_MAX {
                let rule = format!("must be above 0 and at most {}s", RECURSOR_TIMEOUT_MAX.as_secs());
                self.problems.push(seconds_problem(given, rule));
            }
        }
        for (name, given) in &raw.service_ttl {
            let seconds = self.seconds(Some(given), 0);
            config.service_ttl.by_name.insert(name.clone(), seconds);
        }
        config.node_ttl_s = self.seconds(raw.node_ttl.as_ref(), 0);
        let soa = &mut config.soa;
        soa.refresh_s = self.seconds(raw.soa_refresh.as_ref(), soa.refresh_s);
        soa.retry_s = self.seconds(raw.soa_retry.as_ref(), soa.retry_s);
        soa.expire_s = self.seconds(raw.soa_expire.as_ref(), soa.expire_s);
        soa.minimum_s = self.seconds(raw.soa_minimum.as_ref(), soa.minimum_s);
    }

    /// Whole seconds, rounded down: DNS knows no others.
    fn seconds(&mut self, given: Option<&Given<Duration>>, default: u32) -> u32 {
        let Some(given) = given else { return default };
        match u32::try_from(given.value.as_secs()) {
            Ok(seconds) if seconds <= TTL_MAX_S => seconds,
            _ => {
                self.problems.push(seconds_problem(given, format!("must be at most {TTL_MAX_S}s")));
                default
            }
        }
    }
}

fn seconds_problem(given: &Given<Duration>, rule: String) -> Problem {
    let value = format!("{:?}", given.value);
    Problem::new(given.source.clone(), given.key.clone(), Some(value), rule)
}

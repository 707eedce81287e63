//! The raw form to a [`Config`]: defaults, and every rule that a value or a pair of values must keep.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::address::{ip_rule, is_join_target, join_rule};
use super::dns;
use super::http_api;
use super::raw::{Given, Raw};
use super::telemetry;
use super::{
    Config, ConfigError, DATACENTER_DEFAULT, DNS_PORT_DEFAULT, DRAIN_TIMEOUT_DEFAULT, DRAIN_TIMEOUT_MAX,
    HTTP_PORT_DEFAULT, Host, IdentitySource, JOIN_MAX, KV_BYTES_MAX, KV_BYTES_MIN, MESH_PORT_DEFAULT, Mode,
    NODE_META_KEY_BYTES_MAX, NODE_META_MAX, NODE_META_VALUE_BYTES_MAX, OnTerminate, PolicyAuthority, Problem,
    RECONNECT_TIMEOUT_DEFAULT, RECONNECT_TIMEOUT_MAX, RECONNECT_TIMEOUT_MIN, SHARED_HTTP_PORT_DEFAULT, Secret, Source,
    Storage, TRUST_DOMAIN_DEV, Validated, WORKERS_MAX,
};
use crate::api::ApiToken;
use crate::authz::Action;
use crate::dns::DnsConfig;
use crate::gossip::KV_BYTES_DEFAULT;
use crate::model::{NodeName, ServeScope, TrustDomain};
use crate::registry::definition::{
    DefinitionDefaults, DefinitionError, check_from_json, service_from_json, without_effect,
};
use crate::registry::{self, CheckDefinition, CheckSettings, ScriptPolicy, ServiceDefinition};
use crate::telemetry::{Chain, Filter, LogFormat};
use crate::unix_socket::SOCKET_PATH_BYTES_MAX;
use crate::workload::WorkloadConfig;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Stands in for an address that could not be found; the problem noted with it keeps it out of any `Config`.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// Longest token file, in bytes: a token is far below it.
const TOKEN_FILE_BYTES_MAX: u64 = 16 * 1024;
/// Longest datacenter name, in bytes: one DNS label.
const DATACENTER_BYTES_MAX: usize = 63;

/// Checks `raw`, fills in defaults.
pub(super) fn resolve(mut raw: Raw, mode: Mode, host: &Host) -> Result<Config, ConfigError> {
    let problems = std::mem::take(&mut raw.problems);
    let mut resolver = Resolver { raw, mode, host, problems };
    let config = resolver.config();
    match config {
        Some(config) if resolver.problems.is_empty() => Ok(config),
        _ => Err(ConfigError { problems: resolver.problems }),
    }
}

/// Checks `raw` as [`resolve`] does, apart from what is missing in it.
pub(super) fn validate(mut raw: Raw, mode: Mode, host: &Host) -> Result<Validated, ConfigError> {
    let problems = std::mem::take(&mut raw.problems);
    let mut resolver = Resolver { raw, mode, host, problems };
    let config = resolver.config();
    let (missing, problems): (Vec<Problem>, Vec<Problem>) =
        resolver.problems.into_iter().partition(|problem| problem.source == Source::Unset);
    if problems.is_empty() {
        Ok(Validated { warnings: config.map_or(resolver.raw.warnings, |config| config.warnings), missing })
    } else {
        Err(ConfigError { problems })
    }
}

/// `-dev` without files or flags.
pub(super) fn dev(node: NodeName, ip: IpAddr) -> Config {
    Config {
        node_name: node,
        datacenter: DATACENTER_DEFAULT.to_owned(),
        storage: Storage::Memory,
        mesh_bind: SocketAddr::new(ip, MESH_PORT_DEFAULT),
        mesh_advertise: SocketAddr::new(ip, MESH_PORT_DEFAULT),
        http_addr: Some(SocketAddr::new(ip, HTTP_PORT_DEFAULT)),
        shared_http_addr: Some(SocketAddr::new(ip, SHARED_HTTP_PORT_DEFAULT)),
        dns: Some(DnsConfig::on(vec![SocketAddr::new(ip, DNS_PORT_DEFAULT)])),
        upstream_ip: ip,
        join: Vec::new(),
        identity: IdentitySource::Dev { trust_domain: dev_trust_domain(), serve: everything() },
        trust_domain: None,
        node_meta: BTreeMap::new(),
        workers: default_workers(std::thread::available_parallelism().map_or(1, NonZeroUsize::get)),
        admin_token: None,
        api_tokens: Vec::new(),
        https: None,
        api_socket: None,
        default_policy: Action::Allow,
        policy_authority: PolicyAuthority::Dev,
        on_terminate: OnTerminate::Leave,
        drain_timeout: DRAIN_TIMEOUT_DEFAULT,
        reconnect_timeout: RECONNECT_TIMEOUT_DEFAULT,
        kv_bytes_max: None,
        workload_api: None,
        otlp: None,
        services: Vec::new(),
        checks: Vec::new(),
        scripts: ScriptPolicy::Off,
        check_settings: CheckSettings::default(),
        log_filter: Filter::default(),
        log_format: LogFormat::Text,
        warnings: Vec::new(),
    }
}

/// One worker per core.
fn default_workers(cores: usize) -> NonZeroUsize {
    NonZeroUsize::new(cores.min(WORKERS_MAX)).unwrap_or(NonZeroUsize::MIN)
}

fn dev_trust_domain() -> TrustDomain {
    TRUST_DOMAIN_DEV.parse().expect("the constant is a trust domain")
}

fn everything() -> ServeScope {
    "*".parse().expect("a star is a pattern")
}

struct Addresses {
    mesh_bind: SocketAddr,
    mesh_advertise: SocketAddr,
    client: IpAddr,
    http: Option<http_api::Place>,
    shared_http: Option<SocketAddr>,
    upstream_ip: IpAddr,
}

struct Resolver<'a> {
    raw: Raw,
    mode: Mode,
    host: &'a Host,
    problems: Vec<Problem>,
}

impl Resolver<'_> {
    /// Works through every key, so that every problem is noted; none if a part without default is missing.
    fn config(&mut self) -> Option<Config> {
        let node_name = self.node_name();
        let datacenter = self.datacenter();
        let storage = self.storage();
        let addresses = self.addresses();
        let join = self.join();
        let trust_domain = self.trust_domain();
        let identity = self.identity(&join, trust_domain.as_ref());
        let raw = std::mem::take(&mut self.raw.http_api);
        let https = http_api::https(&raw, addresses.client, self.raw.ca_file.as_ref(), &mut self.problems);
        self.raw.warnings.extend(http_api::idle(&raw, https.as_ref()));
        let api_socket = http_api::socket(&raw, &mut self.problems);
        let https_given = raw.https_address.clone().or_else(|| self.raw.client_addr.clone());
        let has_others = !raw.tokens.is_empty();
        let api_tokens = http_api::tokens(raw.tokens, &mut self.problems);
        let admin_token = self.admin_token();
        if self.raw.admin_token.is_none() && self.raw.admin_token_file.is_none() && !has_others {
            let secure = https.as_ref().map(|https| (https.addr, https_given));
            http_api::refuse_open(&[addresses.http.clone(), secure], &mut self.problems);
        }
        let default_policy = self.default_policy();
        let policy_authority = self.policy_authority(admin_token.is_some() || !api_tokens.is_empty());
        let node_meta = self.node_meta();
        let workers = self.workers();
        let drain_timeout = self.drain_timeout();
        let reconnect_timeout = self.reconnect_timeout();
        let kv_bytes_max = self.kv_bytes_max();
        let workload_api = self.workload_api();
        let otlp = telemetry::otlp(std::mem::take(&mut self.raw.otlp), &mut self.problems);
        let dns = dns::resolve(std::mem::take(&mut self.raw.dns), addresses.client, &mut self.problems);
        let log_filter = self.parsed(self.raw.log_level.clone()).unwrap_or_default();
        let scripts = self.scripts();
        let check_settings = self.check_settings();
        let defaults = DefinitionDefaults { bind_ip: addresses.upstream_ip, datacenter: &datacenter };
        let services = self.services(&defaults, scripts);
        let checks = self.checks(&defaults, scripts);
        if let Err(error) = registry::stand_together(&services, &checks) {
            self.problems.push(Problem::unset("services", error.to_string()));
        }
        let leaves = self.raw.leave_on_terminate.as_ref().is_none_or(|given| given.value);
        let json = self.raw.log_json.as_ref().is_some_and(|given| given.value);
        Some(Config {
            node_name: node_name?,
            datacenter,
            storage: storage?,
            mesh_bind: addresses.mesh_bind,
            mesh_advertise: addresses.mesh_advertise,
            http_addr: addresses.http.map(|(addr, _)| addr),
            shared_http_addr: addresses.shared_http,
            dns,
            upstream_ip: addresses.upstream_ip,
            join,
            identity,
            trust_domain,
            node_meta,
            workers,
            admin_token,
            api_tokens,
            https,
            api_socket,
            default_policy,
            policy_authority,
            on_terminate: if leaves { OnTerminate::Leave } else { OnTerminate::Stay },
            drain_timeout,
            reconnect_timeout,
            kv_bytes_max,
            workload_api,
            otlp,
            services,
            checks,
            scripts,
            check_settings,
            log_filter,
            log_format: if json { LogFormat::Json } else { LogFormat::Text },
            warnings: std::mem::take(&mut self.raw.warnings),
        })
    }

    /// Parses a value that was given; a bad one is noted.
    fn parsed<T: FromStr<Err: std::error::Error + 'static>>(&mut self, given: Option<Given<String>>) -> Option<T> {
        let given = given?;
        match given.value.parse() {
            Ok(value) => Some(value),
            Err(err) => {
                self.problems.push(given.problem(Chain(&err).to_string()));
                None
            }
        }
    }

    fn refuse<T: Display>(&mut self, given: &Given<T>, rule: impl Into<String>) {
        self.problems.push(given.problem(rule));
    }

    /// The key-value store is off unless it is turned on.
    fn kv_bytes_max(&mut self) -> Option<u64> {
        let bytes_max = match self.raw.kv_bytes_max.clone() {
            Some(given) if !(KV_BYTES_MIN..=KV_BYTES_MAX).contains(&given.value) => {
                self.refuse(&given, format!("must be {KV_BYTES_MIN} to {KV_BYTES_MAX} bytes"));
                KV_BYTES_DEFAULT
            }
            Some(given) => given.value,
            None => KV_BYTES_DEFAULT,
        };
        self.raw.kv_enabled.as_ref().is_some_and(|given| given.value).then_some(bytes_max)
    }

    fn node_name(&mut self) -> Option<NodeName> {
        if let Some(given) = self.raw.node_name.clone() {
            return self.parsed(Some(given));
        }
        let name = self.host.node_name();
        if name.is_none() {
            let rule = "is not set, and this host's name makes no node name: pass -node NAME";
            self.problems.push(Problem::unset("node_name", rule));
        }
        name
    }

    fn datacenter(&mut self) -> String {
        let Some(given) = self.raw.datacenter.clone() else { return DATACENTER_DEFAULT.to_owned() };
        let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
        let fits = (1..=DATACENTER_BYTES_MAX).contains(&given.value.len());
        if !fits || !given.value.chars().all(is_allowed) {
            self.refuse(&given, "must be 1 to 63 lower-case letters, digits, `-` or `_`");
        }
        given.value
    }

    fn storage(&mut self) -> Option<Storage> {
        match (self.raw.data_dir.clone(), self.mode) {
            (None, Mode::Dev) => Some(Storage::Memory),
            (None, Mode::Durable) => {
                self.problems.push(Problem::unset(
                    "data_dir",
                    "must be set: pass -data-dir DIR, where the agent keeps its identity and state (or -dev, to keep nothing)",
                ));
                None
            }
            (Some(given), Mode::Dev) => {
                self.refuse(&given, "must not be set with -dev, which keeps everything in memory");
                None
            }
            (Some(given), Mode::Durable) if given.value.is_empty() => {
                self.refuse(&given, "must not be empty");
                None
            }
            (Some(given), Mode::Durable) => Some(Storage::Directory(PathBuf::from(given.value))),
        }
    }

    fn ip(&mut self, given: Option<Given<String>>) -> Option<IpAddr> {
        let given = given?;
        let ip = given.value.parse().ok();
        if ip.is_none() {
            self.refuse(&given, ip_rule(&given.value));
        }
        ip
    }

    fn addresses(&mut self) -> Addresses {
        let mesh_port = self.port(self.raw.mesh_port.clone(), MESH_PORT_DEFAULT, 1);
        let shared_default = if self.mode == Mode::Dev { SHARED_HTTP_PORT_DEFAULT } else { 0 };
        let shared_port = self.port(self.raw.shared_http_port.clone(), shared_default, 0);
        let bind = self.bind_ip();
        let advertise = self.advertise_ip(bind);
        let client = match self.ip(self.raw.client_addr.clone()) {
            Some(ip) => ip,
            // One address for all: several agents then run on one host by `-bind` alone.
            None if self.mode == Mode::Dev && bind.is_loopback() => bind,
            None => LOOPBACK,
        };
        let given = self.raw.client_addr.clone();
        let http = http_api::http(&mut self.raw.http_api, client, given.as_ref(), &mut self.problems);
        if http.as_ref().is_some_and(|(addr, _)| addr.port() == shared_port) {
            let rule = format!("must differ from ports.http = {shared_port}");
            match self.raw.shared_http_port.clone() {
                Some(given) => self.refuse(&given, rule),
                None => self.problems.push(Problem::unset("ports.shared_http", rule)),
            }
        }
        Addresses {
            mesh_bind: SocketAddr::new(bind, mesh_port),
            mesh_advertise: SocketAddr::new(advertise, mesh_port),
            client,
            http,
            shared_http: (shared_port != 0).then(|| SocketAddr::new(client, shared_port)),
            upstream_ip: if client.is_loopback() { client } else { LOOPBACK },
        }
    }

    fn port(&mut self, given: Option<Given<u64>>, default: u16, least: u16) -> u16 {
        let Some(given) = given else { return default };
        match u16::try_from(given.value) {
            Ok(port) if port >= least => port,
            _ => {
                self.refuse(&given, format!("must be a port, {least} to 65535"));
                default
            }
        }
    }

    fn bind_ip(&mut self) -> IpAddr {
        if self.raw.bind_addr.is_some() {
            return self.ip(self.raw.bind_addr.clone()).unwrap_or(NOWHERE);
        }
        if self.mode == Mode::Dev {
            return LOOPBACK;
        }
        match self.host.primary_address() {
            Ok(ip) => ip,
            Err(candidates) => {
                let found: Vec<String> = candidates.iter().map(ToString::to_string).collect();
                let reason = match found.as_slice() {
                    [] => "this host has no address but loopback".to_owned(),
                    _ => format!("this host has several addresses ({})", found.join(", ")),
                };
                let rule = format!("is not set and {reason}: pass -bind IP, the address that other nodes reach");
                self.problems.push(Problem::unset("bind_addr", rule));
                NOWHERE
            }
        }
    }

    fn advertise_ip(&mut self, bind: IpAddr) -> IpAddr {
        let Some(given) = self.raw.advertise_addr.clone() else {
            if let Some(bound) = self.raw.bind_addr.clone().filter(|_| bind.is_unspecified())
                && bound.value.parse::<IpAddr>().is_ok()
            {
                self.refuse(&bound, "is every address: pass -advertise IP too, the one that other nodes reach");
            }
            return bind;
        };
        let Some(ip) = self.ip(Some(given.clone())) else { return bind };
        if ip.is_unspecified() || ip.is_multicast() {
            self.refuse(&given, "must be an address that other nodes reach");
        }
        if ip.is_ipv4() != bind.is_ipv4() && !bind.is_unspecified() {
            self.refuse(&given, format!("must be of the same IP version as bind_addr = {bind}"));
        }
        ip
    }

    fn join(&mut self) -> Vec<String> {
        let given = std::mem::take(&mut self.raw.join);
        if let Some(over) = given.get(JOIN_MAX) {
            self.problems.push(over.problem(format!("is one too many: at most {JOIN_MAX} join addresses are allowed")));
        }
        let mut targets = Vec::new();
        for target in given {
            if !is_join_target(&target.value) {
                self.refuse(&target, join_rule(&target.value));
            } else if self.mode == Mode::Dev {
                self.refuse(&target, "must not be set with -dev, whose CA in memory no other agent knows");
            } else if !targets.contains(&target.value) {
                targets.push(target.value);
            }
        }
        targets
    }

    fn trust_domain(&mut self) -> Option<TrustDomain> {
        self.parsed(self.raw.trust_domain.clone())
    }

    fn identity(&mut self, join: &[String], trust_domain: Option<&TrustDomain>) -> IdentitySource {
        let serve = self.parsed::<ServeScope>(self.raw.serve.clone()).unwrap_or_else(everything);
        let issuer = self.raw.issuer.clone();
        let token = self.secret(self.raw.token.clone(), self.raw.token_file.clone());
        let token_given = self.raw.token.clone().or_else(|| self.raw.token_file.clone());
        if self.mode == Mode::Dev {
            for given in [issuer, token_given].into_iter().flatten() {
                self.refuse(&given, "must not be set with -dev, which makes its own CA in memory");
            }
            let trust_domain = trust_domain.cloned().unwrap_or_else(dev_trust_domain);
            return IdentitySource::Dev { trust_domain, serve };
        }
        if let (Some(serve), None) = (self.raw.serve.clone(), &issuer) {
            self.refuse(
                &serve,
                "works with -issuer only: on other nodes the join token sets the scope (weft token create -serve)",
            );
        }
        match (issuer, token_given) {
            (Some(issuer), token_given) => {
                if let Some(token_given) = token_given {
                    self.refuse(&token_given, "must not be set beside issuer: an issuer certifies itself");
                }
                match std::fs::metadata(&issuer.value) {
                    Ok(meta) if meta.is_dir() => {}
                    Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                        self.refuse(&issuer, "cannot be read: it and its files must belong to the agent's user");
                    }
                    _ => {
                        self.refuse(&issuer, "must be a directory that `weft ca init` or `weft ca issuer create` made");
                    }
                }
                IdentitySource::Issuer { dir: PathBuf::from(issuer.value), serve }
            }
            (None, Some(token_given)) => {
                if join.is_empty() {
                    self.refuse(&token_given, "needs an address to join: pass -join ADDR, or set retry_join");
                }
                token.map_or(IdentitySource::Stored, IdentitySource::Token)
            }
            (None, None) => IdentitySource::Stored,
        }
    }

    /// Takes a secret from its key or from the file that the other key names.
    fn secret(&mut self, inline: Option<Given<String>>, file: Option<Given<String>>) -> Option<Secret> {
        let text = match (inline, file) {
            (Some(inline), Some(file)) => {
                self.refuse(&file, format!("must not be set beside {}", inline.key));
                return None;
            }
            (Some(inline), None) if inline.value.trim().is_empty() => {
                self.refuse(&inline, "must not be empty");
                return None;
            }
            (Some(inline), None) => inline.value,
            (None, Some(file)) => match read_secret(Path::new(&file.value)) {
                Ok(text) => text,
                Err(rule) => {
                    self.refuse(&file, rule);
                    return None;
                }
            },
            (None, None) => return None,
        };
        Some(Secret::new(text.trim()))
    }

    fn admin_token(&mut self) -> Option<ApiToken> {
        let (inline, file) = (self.raw.admin_token.clone(), self.raw.admin_token_file.clone());
        let token = self.secret(inline.clone(), file.clone())?;
        if let Some(inline) = inline.as_ref().filter(|_| http_api::is_in_clear(&token)) {
            self.raw.warn(
                &inline.source,
                &inline.key,
                "stands in clear in this file: write its digest, admin_token = \"sha256:…\" (printf %s TOKEN | sha256sum)",
            );
        }
        Some(http_api::admin_token(&inline.or(file)?, &token, &mut self.problems))
    }

    fn default_policy(&mut self) -> Action {
        let by_mode = if self.mode == Mode::Dev { Action::Allow } else { Action::Deny };
        let Some(given) = self.raw.default_intention_policy.clone() else { return by_mode };
        match given.value.as_str() {
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            _ => {
                self.refuse(&given, "must be \"allow\" or \"deny\"");
                by_mode
            }
        }
    }

    fn policy_authority(&mut self, has_admin_token: bool) -> PolicyAuthority {
        match (self.raw.policy_authority.clone(), self.mode) {
            (Some(given), Mode::Dev) => {
                self.refuse(&given, "must not be set with -dev, which signs with its own CA in memory");
                PolicyAuthority::Dev
            }
            (None, Mode::Dev) => PolicyAuthority::Dev,
            (None, Mode::Durable) => PolicyAuthority::None,
            (Some(given), Mode::Durable) => {
                if !has_admin_token {
                    self.refuse(
                        &given,
                        "needs an admin token, or every program on this host could write policy: set admin_token_file too",
                    );
                }
                if !Path::new(&given.value).is_file() {
                    self.refuse(&given, "must be a file that `weft ca operator create` made");
                }
                PolicyAuthority::File(PathBuf::from(given.value))
            }
        }
    }

    fn node_meta(&mut self) -> BTreeMap<String, String> {
        let given = std::mem::take(&mut self.raw.node_meta);
        if given.len() > NODE_META_MAX
            && let Some(last) = given.values().next_back()
        {
            self.refuse(last, format!("is one of {} pairs; at most {NODE_META_MAX} are allowed", given.len()));
        }
        let mut meta = BTreeMap::new();
        for (name, value) in given {
            let named = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
            if name.is_empty() || name.len() > NODE_META_KEY_BYTES_MAX || !named {
                self.refuse(&value, "needs a key of 1 to 128 letters, digits, `-` or `_`");
            }
            if value.value.len() > NODE_META_VALUE_BYTES_MAX {
                self.refuse(&value, format!("must have at most {NODE_META_VALUE_BYTES_MAX} bytes"));
            }
            meta.insert(name, value.value);
        }
        meta
    }

    fn workers(&mut self) -> NonZeroUsize {
        let Some(given) = self.raw.workers.clone() else { return default_workers(self.host.cores) };
        let count = usize::try_from(given.value).ok().filter(|count| *count <= WORKERS_MAX);
        count.and_then(NonZeroUsize::new).unwrap_or_else(|| {
            self.refuse(&given, format!("must be 1 to {WORKERS_MAX}"));
            NonZeroUsize::MIN
        })
    }

    fn drain_timeout(&mut self) -> std::time::Duration {
        let Some(given) = self.raw.drain_timeout.clone() else { return DRAIN_TIMEOUT_DEFAULT };
        if given.value > DRAIN_TIMEOUT_MAX {
            let value = Some(format!("{:?}", given.value));
            self.problems.push(Problem::new(given.source, given.key, value, "must be at most 1h"));
        }
        given.value
    }

    fn reconnect_timeout(&mut self) -> std::time::Duration {
        let Some(given) = self.raw.reconnect_timeout.clone() else { return RECONNECT_TIMEOUT_DEFAULT };
        if !(RECONNECT_TIMEOUT_MIN..=RECONNECT_TIMEOUT_MAX).contains(&given.value) {
            let value = Some(format!("{:?}", given.value));
            self.problems.push(Problem::new(given.source, given.key, value, "must be 8h to 2160h (90 days)"));
        }
        given.value
    }

    fn workload_api(&mut self) -> Option<WorkloadConfig> {
        let group = self.raw.workload_group.clone();
        let Some(given) = self.raw.workload_socket.clone() else {
            if let Some(group) = group {
                self.refuse(&group, "has no effect without workload_api.socket");
            }
            return None;
        };
        if let Some(group) = group.as_ref().filter(|group| group.value.is_empty()) {
            self.refuse(group, "must be the name or number of a group");
        }
        let socket = PathBuf::from(&given.value);
        if !socket.is_absolute() || given.value.len() > SOCKET_PATH_BYTES_MAX || socket.file_name().is_none() {
            let rule = format!("must be an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes");
            self.refuse(&given, rule);
        }
        Some(WorkloadConfig { socket, group: group.map(|group| group.value) })
    }

    fn scripts(&mut self) -> ScriptPolicy {
        let is_on = |given: &Option<Given<bool>>| given.as_ref().is_some_and(|given| given.value);
        match (is_on(&self.raw.enable_script_checks), is_on(&self.raw.enable_local_script_checks)) {
            (true, _) => ScriptPolicy::All,
            (false, true) => ScriptPolicy::Files,
            (false, false) => ScriptPolicy::Off,
        }
    }

    fn check_settings(&mut self) -> CheckSettings {
        let mut settings = CheckSettings::default();
        if let Some(given) = self.raw.ca_file.clone() {
            let path = PathBuf::from(&given.value);
            self.problems.extend(http_api::not_certificates(&given));
            settings.ca_file = Some(path);
        }
        for (given, slot) in [
            (self.raw.docker_socket.clone(), &mut settings.docker_socket),
            (self.raw.dbus_socket.clone(), &mut settings.dbus_socket),
        ] {
            let Some(given) = given else { continue };
            *slot = PathBuf::from(given.value.strip_prefix("unix://").unwrap_or(&given.value));
            if !slot.is_absolute() {
                self.problems.push(given.problem("must be the absolute path of a unix socket"));
            }
        }
        settings
    }

    fn services(&mut self, defaults: &DefinitionDefaults<'_>, scripts: ScriptPolicy) -> Vec<ServiceDefinition> {
        let mut services: Vec<ServiceDefinition> = Vec::new();
        for given in std::mem::take(&mut self.raw.services) {
            match service_from_json(&given.value, defaults) {
                Ok(service) if services.iter().any(|other| other.record.id == service.record.id) => {
                    let id = service.record.id.to_string();
                    let rule = "is the ID of another service of this configuration: give one of them an `id`";
                    self.problems.push(Problem::new(given.source, given.key + ".id", Some(id), rule));
                }
                Ok(service) => {
                    self.may_run(&given, &service.checks, scripts);
                    for (path, why) in without_effect(&given.value) {
                        self.raw.warn(&given.source, &format!("{}.{path}", given.key), why);
                    }
                    services.push(service);
                }
                Err(err) => self.problems.push(definition_problem(given, &err)),
            }
        }
        services
    }

    fn checks(&mut self, defaults: &DefinitionDefaults<'_>, scripts: ScriptPolicy) -> Vec<CheckDefinition> {
        let mut checks: Vec<CheckDefinition> = Vec::new();
        for given in std::mem::take(&mut self.raw.checks) {
            match check_from_json(&given.value, defaults) {
                Ok(check) if checks.iter().any(|other| other.id == check.id) => {
                    let id = check.id.to_string();
                    let rule = "is the ID of another check of this configuration: give one of them an `id`";
                    self.problems.push(Problem::new(given.source, given.key + ".id", Some(id), rule));
                }
                Ok(check) => {
                    self.may_run(&given, std::slice::from_ref(&check), scripts);
                    checks.push(check);
                }
                Err(err) => self.problems.push(definition_problem(given, &err)),
            }
        }
        checks
    }

    /// Notes checks that run programs where that is not allowed.
    fn may_run(&mut self, given: &Given<serde_json::Value>, checks: &[CheckDefinition], scripts: ScriptPolicy) {
        if scripts != ScriptPolicy::Off {
            return;
        }
        for check in checks.iter().filter(|check| check.probe.runs_a_program()) {
            let rule = format!(
                "has a check that runs a program ({}): set enable_local_script_checks = true to allow those of the agent's files",
                check.id
            );
            self.problems.push(Problem::new(given.source.clone(), given.key.clone(), None, rule));
        }
    }
}

/// Notes what is wrong with a service or check, at the field that is at fault.
fn definition_problem(given: Given<serde_json::Value>, error: &DefinitionError) -> Problem {
    let key = match error.path() {
        Some(path) => format!("{}.{path}", given.key),
        None => given.key.clone(),
    };
    Problem::new(given.source, key, None, Chain(error).to_string())
}

/// Reads a file that holds nothing but a secret.
fn read_secret(path: &Path) -> Result<String, String> {
    let meta = std::fs::metadata(path).map_err(|err| format!("cannot be read: {err}"))?;
    if !meta.is_file() || meta.len() > TOKEN_FILE_BYTES_MAX {
        return Err(format!("must be a file of at most {TOKEN_FILE_BYTES_MAX} bytes that holds nothing but the token"));
    }
    let text = std::fs::read_to_string(path).map_err(|err| format!("cannot be read: {err}"))?;
    if text.trim().is_empty() { Err("is an empty file; it must hold the token".to_owned()) } else { Ok(text) }
}

//! The raw form: what files and flags say, typed but not checked against each other. All of it is optional.
//!
//! Later settings replace earlier ones; lists are appended to, maps are merged key by key.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};

use super::consul;
use super::dns::RawDns;
use super::duration::parse_duration;
use super::http_api::RawHttpApi;
use super::problem::{Problem, Source, Warning};
use super::telemetry::RawOtlp;

/// Keys whose values are never shown.
const SECRET: [&str; 2] = ["token", "admin_token"];

/// A value with where it came from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Given<T> {
    pub(crate) value: T,
    pub(crate) source: Source,
    pub(crate) key: String,
}

impl<T: std::fmt::Display> Given<T> {
    /// Notes that this value breaks `rule`.
    pub(crate) fn problem(&self, rule: impl Into<String>) -> Problem {
        let value = (!SECRET.contains(&self.key.as_str())).then(|| self.value.to_string());
        Problem::new(self.source.clone(), self.key.clone(), value, rule)
    }
}

/// A setting from outside the files.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The flag as it is typed, `-node`.
    pub flag: &'static str,
    /// The config key that it stands for, `node_name`, `ports.http`.
    pub key: &'static str,
    /// Its value, as it would stand in a JSON file.
    pub value: Value,
}

/// Every key that a file or a flag may set.
#[derive(Debug, Default)]
pub(crate) struct Raw {
    pub(crate) node_name: Option<Given<String>>,
    pub(crate) datacenter: Option<Given<String>>,
    pub(crate) data_dir: Option<Given<String>>,
    pub(crate) bind_addr: Option<Given<String>>,
    pub(crate) advertise_addr: Option<Given<String>>,
    pub(crate) client_addr: Option<Given<String>>,
    pub(crate) mesh_port: Option<Given<u64>>,
    pub(crate) shared_http_port: Option<Given<u64>>,
    pub(crate) join: Vec<Given<String>>,
    pub(crate) node_meta: BTreeMap<String, Given<String>>,
    pub(crate) log_level: Option<Given<String>>,
    pub(crate) log_json: Option<Given<bool>>,
    pub(crate) trust_domain: Option<Given<String>>,
    pub(crate) issuer: Option<Given<String>>,
    pub(crate) token: Option<Given<String>>,
    pub(crate) token_file: Option<Given<String>>,
    pub(crate) serve: Option<Given<String>>,
    pub(crate) workers: Option<Given<u64>>,
    pub(crate) admin_token: Option<Given<String>>,
    pub(crate) admin_token_file: Option<Given<String>>,
    pub(crate) default_intention_policy: Option<Given<String>>,
    pub(crate) policy_authority: Option<Given<String>>,
    pub(crate) leave_on_terminate: Option<Given<bool>>,
    pub(crate) drain_timeout: Option<Given<Duration>>,
    pub(crate) reconnect_timeout: Option<Given<Duration>>,
    pub(crate) kv_enabled: Option<Given<bool>>,
    pub(crate) kv_bytes_max: Option<Given<u64>>,
    pub(crate) workload_socket: Option<Given<String>>,
    pub(crate) workload_group: Option<Given<String>>,
    pub(crate) enable_script_checks: Option<Given<bool>>,
    pub(crate) enable_local_script_checks: Option<Given<bool>>,
    pub(crate) ca_file: Option<Given<String>>,
    pub(crate) docker_socket: Option<Given<String>>,
    pub(crate) dbus_socket: Option<Given<String>>,
    pub(crate) dns: RawDns,
    pub(crate) http_api: RawHttpApi,
    pub(crate) otlp: RawOtlp,
    pub(crate) services: Vec<Given<Value>>,
    pub(crate) checks: Vec<Given<Value>>,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) problems: Vec<Problem>,
}

impl Raw {
    /// Adds what one file says.
    pub(crate) fn add_file(&mut self, path: &std::sync::Arc<std::path::Path>, root: Map<String, Value>) {
        let source = Source::File(std::sync::Arc::clone(path));
        for (key, value) in root {
            self.add(&source, &key, value);
        }
    }

    /// Adds what a flag says.
    pub(crate) fn add_setting(&mut self, setting: &Setting) {
        let source = Source::Flag(setting.flag);
        match setting.key.split_once('.') {
            Some(("ports", port)) => self.add_port(&source, port, &setting.value),
            Some(("workload_api", key)) => self.add_workload(&source, key, setting.value.clone()),
            Some(("telemetry", key)) => {
                self.add_otlp(&source, key.strip_prefix("otlp.").unwrap_or(key), setting.value.clone());
            }
            _ => self.add(&source, setting.key, setting.value.clone()),
        }
    }

    fn add(&mut self, source: &Source, key: &str, value: Value) {
        match key {
            "node_name" => self.text(source, key, value, |raw| &mut raw.node_name),
            "datacenter" => self.text(source, key, value, |raw| &mut raw.datacenter),
            "data_dir" => self.text(source, key, value, |raw| &mut raw.data_dir),
            "bind_addr" => self.text(source, key, value, |raw| &mut raw.bind_addr),
            "advertise_addr" => self.text(source, key, value, |raw| &mut raw.advertise_addr),
            "client_addr" => self.text(source, key, value, |raw| &mut raw.client_addr),
            "log_level" => self.text(source, key, value, |raw| &mut raw.log_level),
            "trust_domain" => self.text(source, key, value, |raw| &mut raw.trust_domain),
            "issuer" => self.text(source, key, value, |raw| &mut raw.issuer),
            "token" => self.text(source, key, value, |raw| &mut raw.token),
            "token_file" => self.text(source, key, value, |raw| &mut raw.token_file),
            "serve" => self.text(source, key, value, |raw| &mut raw.serve),
            "admin_token" => self.text(source, key, value, |raw| &mut raw.admin_token),
            "admin_token_file" => self.text(source, key, value, |raw| &mut raw.admin_token_file),
            "default_intention_policy" => self.text(source, key, value, |raw| &mut raw.default_intention_policy),
            "policy_authority" => self.text(source, key, value, |raw| &mut raw.policy_authority),
            "ca_file" => self.text(source, key, value, |raw| &mut raw.ca_file),
            "docker_socket" => self.text(source, key, value, |raw| &mut raw.docker_socket),
            "dbus_socket" => self.text(source, key, value, |raw| &mut raw.dbus_socket),
            "enable_script_checks" => self.switch(source, key, &value, |raw| &mut raw.enable_script_checks),
            "enable_local_script_checks" => self.switch(source, key, &value, |raw| &mut raw.enable_local_script_checks),
            "tls" => self.tls(source, value),
            "verify_incoming" | "verify_incoming_https" => self.add_verify_incoming(source, key, &value),
            "log_json" => self.switch(source, key, &value, |raw| &mut raw.log_json),
            "leave_on_terminate" => self.switch(source, key, &value, |raw| &mut raw.leave_on_terminate),
            "workers" => self.count(source, key, &value, |raw| &mut raw.workers),
            "drain_timeout" => self.duration(source, key, &value, |raw| &mut raw.drain_timeout),
            "reconnect_timeout" => self.duration(source, key, &value, |raw| &mut raw.reconnect_timeout),
            "retry_join" | "start_join" => self.joins(source, key, value),
            "node_meta" => self.node_meta(source, value),
            "ports" => self.ports(source, value),
            "workload_api" => self.workload(source, value),
            "kv" => self.kv(source, value),
            "telemetry" => self.add_telemetry(source, value),
            "domain" | "alt_domain" | "recursors" | "addresses" | "dns_config" => self.add_dns(source, key, value),
            "unix_sockets" => self.add_unix_sockets(source, value),
            "api_token" | "api_tokens" => self.definitions(source, key, value, |raw| &mut raw.http_api.tokens),
            "service" | "services" => self.definitions(source, key, value, |raw| &mut raw.services),
            "check" | "checks" => self.definitions(source, key, value, |raw| &mut raw.checks),
            "http_config" => self.add_http_config(source, value),
            _ => match consul::without_effect(key) {
                Some(why) => self.warn(source, key, why),
                None => self.unknown(source, key),
            },
        }
    }

    pub(super) fn warn(&mut self, source: &Source, key: &str, text: &str) {
        self.warnings.push(Warning { source: source.clone(), key: key.to_owned(), text: text.to_owned() });
    }

    pub(super) fn unknown(&mut self, source: &Source, key: &str) {
        let rule = "is not known: check its spelling, or take it out";
        self.problems.push(Problem::new(source.clone(), key, None, rule));
    }

    pub(super) fn mistyped(&mut self, source: &Source, key: &str, value: &Value, rule: &str) {
        let shown = (!SECRET.contains(&key)).then(|| value.to_string());
        self.problems.push(Problem::new(source.clone(), key, shown, rule));
    }

    pub(super) fn text(
        &mut self,
        source: &Source,
        key: &str,
        value: Value,
        slot: fn(&mut Self) -> &mut Option<Given<String>>,
    ) {
        match value {
            Value::String(value) => {
                *slot(self) = Some(Given { value, source: source.clone(), key: key.to_owned() });
            }
            other => self.mistyped(source, key, &other, "must be a text in quotes"),
        }
    }

    pub(super) fn switch(
        &mut self,
        source: &Source,
        key: &str,
        value: &Value,
        slot: fn(&mut Self) -> &mut Option<Given<bool>>,
    ) {
        match value.as_bool() {
            Some(value) => *slot(self) = Some(Given { value, source: source.clone(), key: key.to_owned() }),
            None => self.mistyped(source, key, value, "must be true or false"),
        }
    }

    pub(super) fn count(
        &mut self,
        source: &Source,
        key: &str,
        value: &Value,
        slot: fn(&mut Self) -> &mut Option<Given<u64>>,
    ) {
        match value.as_u64() {
            Some(value) => *slot(self) = Some(Given { value, source: source.clone(), key: key.to_owned() }),
            None => self.mistyped(source, key, value, "must be a whole number, 0 or more"),
        }
    }

    pub(super) fn duration(
        &mut self,
        source: &Source,
        key: &str,
        value: &Value,
        slot: fn(&mut Self) -> &mut Option<Given<Duration>>,
    ) {
        let parsed = match value {
            Value::String(text) => parse_duration(text),
            // Consul's JSON takes bare numbers as nanoseconds.
            _ => {
                value.as_u64().map(Duration::from_nanos).ok_or_else(|| "must be a duration such as \"10s\"".to_owned())
            }
        };
        match parsed {
            Ok(value) => {
                *slot(self) = Some(Given { value, source: source.clone(), key: key.to_owned() });
            }
            Err(rule) => self.mistyped(source, key, value, &rule),
        }
    }

    fn joins(&mut self, source: &Source, key: &str, value: Value) {
        let list = match value {
            Value::Array(list) => list,
            one => vec![one],
        };
        for (at, value) in list.into_iter().enumerate() {
            let key = format!("{key}[{at}]");
            match value {
                Value::String(value) => self.join.push(Given { value, source: source.clone(), key }),
                other => self.mistyped(source, &key, &other, "must be an address or name in quotes"),
            }
        }
    }

    fn node_meta(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "node_meta", &value, "must be a block of texts");
        };
        for (name, value) in map {
            let key = format!("node_meta.{name}");
            match value {
                Value::String(value) => {
                    self.node_meta.insert(name, Given { value, source: source.clone(), key });
                }
                other => self.mistyped(source, &key, &other, "must be a text in quotes"),
            }
        }
    }

    fn ports(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "ports", &value, "must be a block of numbers");
        };
        for (name, value) in map {
            self.add_port(source, &name, &value);
        }
    }

    fn add_port(&mut self, source: &Source, name: &str, value: &Value) {
        let key = format!("ports.{name}");
        match name {
            "mesh" => self.count(source, &key, value, |raw| &mut raw.mesh_port),
            "http" => self.add_api_port(source, &key, value, |raw| &mut raw.http_api.http_port),
            "shared_http" => self.count(source, &key, value, |raw| &mut raw.shared_http_port),
            "dns" => self.add_dns_port(source, &key, value),
            "https" => self.add_api_port(source, &key, value, |raw| &mut raw.http_api.port),
            _ if consul::is_port(name) => {
                self.warn(
                    source,
                    &key,
                    "has no effect: weft listens on ports.mesh, ports.http, ports.https, ports.shared_http and ports.dns",
                );
            }
            _ => self.unknown(source, &key),
        }
    }

    /// Consul's `tls` block: of it, `defaults.ca_file` says whom checks believe, `https` as whom the HTTP API is served, and
    /// `verify_incoming` of both that its clients show a certificate.
    fn tls(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "tls", &value, "must be a block");
        };
        for (name, value) in map {
            let key = format!("tls.{name}");
            let Value::Object(mut inner) = value else {
                self.mistyped(source, &key, &value, "must be a block");
                continue;
            };
            if name == "defaults"
                && let Some(value) = inner.remove("ca_file")
            {
                self.text(source, "tls.defaults.ca_file", value, |raw| &mut raw.ca_file);
            }
            if name == "defaults"
                && let Some(value) = inner.remove("verify_incoming")
            {
                self.add_verify_incoming(source, "tls.defaults.verify_incoming", &value);
            }
            if name == "https" {
                self.add_https_block(source, &mut inner);
            }
            for key in inner.keys().map(|inner| format!("{key}.{inner}")) {
                self.warn(source, &key, "has no effect: the mesh has certificates of its own (weft ca init)");
            }
        }
    }

    fn kv(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "kv", &value, "must be a block, such as kv { enabled = true }");
        };
        for (name, value) in map {
            let key = format!("kv.{name}");
            match name.as_str() {
                "enabled" => self.switch(source, &key, &value, |raw| &mut raw.kv_enabled),
                "bytes_max" => self.count(source, &key, &value, |raw| &mut raw.kv_bytes_max),
                _ => self.unknown(source, &key),
            }
        }
    }

    fn workload(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "workload_api", &value, "must be a block of texts");
        };
        for (name, value) in map {
            self.add_workload(source, &name, value);
        }
    }

    fn add_workload(&mut self, source: &Source, name: &str, value: Value) {
        let key = format!("workload_api.{name}");
        match name {
            "socket" => self.text(source, &key, value, |raw| &mut raw.workload_socket),
            "group" => self.text(source, &key, value, |raw| &mut raw.workload_group),
            _ => self.unknown(source, &key),
        }
    }

    fn definitions(&mut self, source: &Source, key: &str, value: Value, slot: fn(&mut Self) -> &mut Vec<Given<Value>>) {
        let one = !value.is_array();
        let list = match value {
            Value::Array(list) => list,
            other => vec![other],
        };
        for (at, value) in list.into_iter().enumerate() {
            let key = if one { key.to_owned() } else { format!("{key}[{at}]") };
            if value.is_object() {
                slot(self).push(Given { value, source: source.clone(), key });
            } else {
                self.mistyped(source, &key, &value, "must be a block");
            }
        }
    }
}

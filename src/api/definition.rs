//! The `Definition` of a check of this agent: what it does, in the words that registered it.
//!
//! Left out, beside what has its default: header values and bodies, which may hold secrets and which every local user could
//! read here. A header shows its name with an empty list.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::registry::CheckDefinition;
use crate::registry::definition::{Probe, Target, TlsOptions};

/// Keys and values in Consul's names; empty for a check that is set by hand.
pub(super) fn of(check: &CheckDefinition) -> BTreeMap<String, Value> {
    let mut shape = BTreeMap::new();
    let mut put = |key: &str, value: Value| {
        let is_default = match &value {
            Value::String(text) => text.is_empty(),
            Value::Bool(on) => !on,
            Value::Number(number) => number.as_u64() == Some(0),
            Value::Object(map) => map.is_empty(),
            Value::Null => true,
            Value::Array(_) => false,
        };
        if !is_default {
            shape.insert(key.to_owned(), value);
        }
    };
    match &check.probe {
        Probe::Periodic { target, interval, timeout } => {
            target_of(target, &mut put);
            put("Interval", span(*interval));
            put("Timeout", span(*timeout));
        }
        Probe::Ttl { ttl } => put("TTL", span(*ttl)),
        Probe::Alias { node, service } => {
            put("AliasNode", json!(node));
            put("AliasService", json!(service));
        }
        Probe::Static => {}
    }
    put("SuccessBeforePassing", json!(check.success_before_passing));
    put("FailuresBeforeWarning", json!(check.failures_before_warning));
    put("FailuresBeforeCritical", json!(check.failures_before_critical));
    put("DeregisterCriticalServiceAfter", check.deregister_critical_after.map_or(Value::Null, span));
    shape
}

fn target_of(target: &Target, put: &mut impl FnMut(&str, Value)) {
    match target {
        Target::Http(http) => {
            put("HTTP", json!(http.url));
            put("Method", json!(http.method));
            put("Header", http.headers.keys().map(|name| (name.clone(), json!([]))).collect());
            put("DisableRedirects", json!(http.disable_redirects));
            tls_of(Some(&http.tls), put);
        }
        Target::Tcp { target, tls } => {
            put("TCP", json!(target));
            put("TCPUseTLS", json!(tls.is_some()));
            tls_of(tls.as_ref(), put);
        }
        Target::Udp { target } => put("UDP", json!(target)),
        Target::Grpc { target, service, tls } => {
            let joint = if service.is_empty() { "" } else { "/" };
            put("GRPC", json!(format!("{target}{joint}{service}")));
            put("GRPCUseTLS", json!(tls.is_some()));
            tls_of(tls.as_ref(), put);
        }
        Target::H2ping { target, tls } => {
            put("H2PING", json!(target));
            put("H2PingUseTLS", json!(tls.is_some()));
            tls_of(tls.as_ref(), put);
        }
        Target::Script { args } => put("Args", json!(args)),
        Target::OsService { unit } => put("OSService", json!(unit)),
        Target::Docker { container, shell, args } => {
            put("DockerContainerID", json!(container));
            put("Shell", json!(shell));
            put("Args", json!(args));
        }
    }
}

fn tls_of(tls: Option<&TlsOptions>, put: &mut impl FnMut(&str, Value)) {
    if let Some(TlsOptions { server_name, skip_verify }) = tls {
        put("TLSServerName", json!(server_name));
        put("TLSSkipVerify", json!(skip_verify));
    }
}

/// A Go duration: whole seconds where it can be.
fn span(time: Duration) -> Value {
    let text =
        if time.subsec_nanos() == 0 { format!("{}s", time.as_secs()) } else { format!("{}ms", time.as_millis()) };
    Value::String(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::definition::{DefinitionDefaults, check_from_json};

    #[test]
    fn a_check_shows_what_it_was_registered_with_and_no_secret() {
        #[track_caller]
        fn check(given: &Value, want: &Value) {
            let mut given = given.clone();
            given["Name"] = json!("c");
            let defaults = DefinitionDefaults { bind_ip: "127.0.0.1".parse().unwrap(), datacenter: "dc1" };
            let definition = check_from_json(&given, &defaults).unwrap();
            assert_eq!(json!(of(&definition)), *want, "{given}");
        }
        check(&json!({"TTL": "90s"}), &json!({"TTL": "90s"}));
        check(
            &json!({"HTTP": "http://h/", "Header": {"Authorization": ["s3cret"]}, "Body": "s3cret", "Interval": "1500ms",
                    "Timeout": "2s", "FailuresBeforeCritical": 3, "DeregisterCriticalServiceAfter": "90m"}),
            &json!({"HTTP": "http://h/", "Method": "GET", "Header": {"Authorization": []}, "Interval": "1500ms", "Timeout": "2s",
                    "FailuresBeforeWarning": 3, "FailuresBeforeCritical": 3, "DeregisterCriticalServiceAfter": "5400s"}),
        );
        check(
            &json!({"GRPC": "h:1/s", "GRPCUseTLS": true, "TLSSkipVerify": true, "Interval": "10s"}),
            &json!({"GRPC": "h:1/s", "GRPCUseTLS": true, "TLSSkipVerify": true, "Interval": "10s", "Timeout": "10s"}),
        );
        check(&json!({"AliasService": "db-1"}), &json!({"AliasService": "db-1"}));
        check(
            &json!({"Args": ["sh", "-c", "true"], "Interval": "10s"}),
            &json!({"Args": ["sh", "-c", "true"], "Interval": "10s", "Timeout": "10s"}),
        );
    }
}

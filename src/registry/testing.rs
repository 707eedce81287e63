//! Definitions for the registry's tests.

use std::time::Duration;

use serde_json::{Value, json};

use super::definition::{DefinitionDefaults, OUTPUT_BYTES_MAX, service_from_json};
use super::{CheckDefinition, Probe, ServiceDefinition};
use crate::model::HealthStatus;

pub(crate) const DEFAULTS: DefinitionDefaults<'_> =
    DefinitionDefaults { bind_ip: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), datacenter: "dc1" };

pub(crate) fn ttl_check(id: &str, service: Option<&str>, ttl_secs: u64) -> CheckDefinition {
    CheckDefinition {
        id: id.parse().unwrap(),
        name: id.to_owned(),
        notes: String::new(),
        service: service.map(|service| service.parse().unwrap()),
        probe: Probe::Ttl { ttl: Duration::from_secs(ttl_secs) },
        initial: HealthStatus::Critical,
        success_before_passing: 0,
        failures_before_warning: 0,
        failures_before_critical: 0,
        output_bytes_max: OUTPUT_BYTES_MAX,
        deregister_critical_after: None,
    }
}

#[track_caller]
pub(crate) fn service(value: &Value) -> ServiceDefinition {
    service_from_json(value, &DEFAULTS).unwrap()
}

pub(crate) fn named(name: &str) -> ServiceDefinition {
    service(&json!({"Name": name, "Port": 8080}))
}

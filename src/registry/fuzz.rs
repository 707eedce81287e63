//! What a client's body, a file or the system bus can say: see `crate::fuzz`.

use std::net::{IpAddr, Ipv4Addr};

use super::checks::decode_bus_message;
use super::definition::{
    DEREGISTER_AFTER_MIN, DefinitionDefaults, INTERVAL_MIN, OUTPUT_BYTES_MAX, check_from_json, duration_from_text,
    external_from_json, removal_from_json, service_from_json,
};
use super::{CheckDefinition, ExternalNode, Probe};
use crate::wire;

const DEFAULTS: DefinitionDefaults<'_> =
    DefinitionDefaults { bind_ip: IpAddr::V4(Ipv4Addr::LOCALHOST), datacenter: "dc1" };

/// The first byte says what follows: a service's body, a check's, a node's without an agent, a duration, a message of the bus.
pub(crate) fn definition(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind {
        b's' => {
            let Ok(value) = serde_json::from_slice(rest) else { return };
            let Ok(service) = service_from_json(&value, &DEFAULTS) else { return };
            survives(&service);
            for (at, check) in service.checks.iter().enumerate() {
                assert_eq!(check.service.as_ref(), Some(&service.record.id));
                assert!(service.checks.iter().take(at).all(|other| other.id != check.id), "two checks of one id");
                holds(check);
            }
        }
        b'c' => {
            let Ok(value) = serde_json::from_slice(rest) else { return };
            let Ok(check) = check_from_json(&value, &DEFAULTS) else { return };
            survives(&check);
            holds(&check);
        }
        b'e' => {
            let Ok(value) = serde_json::from_slice(rest) else { return };
            let _removal = removal_from_json(&value);
            let Ok(written) = external_from_json(&value) else { return };
            let scope = "*".parse().expect("everything is a scope");
            let Ok(node) = ExternalNode::written(None, written.body, &scope) else { return };
            survives(&node);
            let ids: Vec<_> = node.record.checks.iter().map(|check| &check.id).collect();
            assert!(ids.is_sorted_by(|a, b| a < b), "checks stand in order, each id once");
        }
        b'd' => {
            let Ok(text) = std::str::from_utf8(rest) else { return };
            let Ok(duration) = duration_from_text(text) else { return };
            // Whole milliseconds are exact far beyond any timer.
            let millis = duration.as_millis();
            let again = duration_from_text(&format!("{millis}ms")).expect("a duration that was read can be written");
            assert!(again.abs_diff(duration).as_millis() <= 1 + millis / 1_000_000_000, "{text}");
        }
        _ => decode_bus_message(rest.to_vec()),
    }
}

fn survives<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let bytes = wire::encode(value).expect("what was decoded encodes");
    assert_eq!(wire::decode::<T>(&bytes, bytes.len()).as_ref().ok(), Some(value));
}

/// The rules that every check that comes out keeps.
fn holds(check: &CheckDefinition) {
    assert!(check.failures_before_warning <= check.failures_before_critical);
    assert!((1..=OUTPUT_BYTES_MAX).contains(&check.output_bytes_max));
    assert!(check.deregister_critical_after.is_none_or(|after| after >= DEREGISTER_AFTER_MIN));
    match &check.probe {
        Probe::Periodic { interval, timeout, .. } => assert!(*interval >= INTERVAL_MIN && !timeout.is_zero()),
        Probe::Ttl { ttl } => assert!(!ttl.is_zero()),
        Probe::Alias { node, service } => assert!(node.is_some() || service.is_some()),
        Probe::Static => panic!("maintenance is no definition"),
    }
}

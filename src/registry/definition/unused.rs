//! Settings of Consul's sidecars that mean nothing where the agent is the proxy. They are taken, so that a team's definitions
//! load, and told: by the answer to a registration, by a warning about a file. What limits or opens anything is not among
//! them: it is refused.

use serde_json::Value;

use super::fields::{Field, Fields};

/// Most settings that are told of one definition.
const TOLD_MAX: usize = 32;

/// Says why a setting in a proxy's `Config` has no effect, by its folded name; none: it has one, or is refused.
pub(super) fn why_unused(name: &str) -> Option<&'static str> {
    Some(match name {
        "envoyprometheusbindaddr"
        | "envoystatsbindaddr"
        | "envoystatsdurl"
        | "envoydogstatsdurl"
        | "envoystatstags"
        | "envoystatsconfigjson"
        | "envoystatssinksjson"
        | "envoystatsflushinterval"
        | "envoyreadybindaddress"
        | "envoyreadybindport"
        | "envoytelemetrycollectorbindsocketdir"
        | "telemetrycollectorbindsocketdir" => {
            "has no effect: there is no Envoy; the agent's metrics are at /v1/agent/metrics, and OTLP exports them (telemetry { otlp { … } })"
        }
        "bindaddress" | "bindport" => "has no effect: calls come in by the agent's mesh port",
        "balanceinboundconnections" | "balanceoutboundconnections" => {
            "has no effect: the kernel shares connections among the agent's workers"
        }
        "localconnecttimeoutms" => "has no effect: the agent waits 3 s for the app to take a connection",
        "connecttimeoutms" => "has no effect: ConnectTimeout of a service-resolver says it",
        _ => return None,
    })
}

/// Lists the settings of a service's definition that are taken without effect: where each stands, and why. Of what is no
/// definition it lists nothing.
pub fn without_effect(definition: &Value) -> Vec<(String, &'static str)> {
    let root = Field { path: String::new(), value: definition };
    let sidecar = inner(&root, "connect").and_then(|connect| inner(&connect, "sidecarservice"));
    let proxies = [Some(root), sidecar].into_iter().flatten().filter_map(|holder| inner(&holder, "proxy"));
    let mut told = Vec::new();
    for proxy in proxies {
        let upstreams = inner(&proxy, "upstreams").and_then(|field| field.elements().ok()).unwrap_or_default();
        for holder in std::iter::once(proxy).chain(upstreams) {
            let Some(config) = inner(&holder, "config") else { continue };
            let Ok(mut config) = Fields::of(&config) else { continue };
            told.extend(config.take_unused(why_unused));
            if told.len() >= TOLD_MAX {
                told.truncate(TOLD_MAX);
                return told;
            }
        }
    }
    told
}

fn inner<'a>(holder: &Field<'a>, name: &str) -> Option<Field<'a>> {
    Fields::of(holder).ok()?.take(&[name]).ok()?
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::definition::service_from_json;
    use crate::registry::testing::DEFAULTS;

    #[test]
    fn settings_of_envoy_s_own_are_taken_and_told_and_those_that_change_calls_are_refused() {
        let service = |config: Value, upstream: Value| {
            json!({"Name": "web", "Port": 1, "connect": {"sidecar_service": {"proxy": {"config": config,
                "upstreams": [{"destination_name": "db", "local_bind_port": 2, "config": upstream}]}}}})
        };
        let usual = service(
            json!({"envoy_prometheus_bind_addr": "0.0.0.0:9102", "local_connect_timeout_ms": 1000, "protocol": "http"}),
            json!({"connect_timeout_ms": 5000}),
        );
        assert_eq!(service_from_json(&usual, &DEFAULTS).unwrap().record.protocol, crate::model::Protocol::Http);
        let told = without_effect(&usual);
        let paths: Vec<&str> = told.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "connect.sidecar_service.proxy.config.envoy_prometheus_bind_addr",
                "connect.sidecar_service.proxy.config.local_connect_timeout_ms",
                "connect.sidecar_service.proxy.upstreams[0].config.connect_timeout_ms",
            ]
        );
        assert!(told.iter().all(|(_, why)| why.starts_with("has no effect: ")));
        for refused in ["max_inbound_connections", "local_request_timeout_ms", "envoy_public_listener_json", "limits"] {
            let error = service_from_json(&service(json!({refused: 1}), json!({})), &DEFAULTS).unwrap_err().to_string();
            assert!(error.contains(&format!("proxy.config.{refused}")), "{error}");
            let error = service_from_json(&service(json!({}), json!({refused: 1})), &DEFAULTS).unwrap_err().to_string();
            assert!(error.contains(&format!("upstreams[0].config.{refused}")), "{error}");
        }
        assert!(without_effect(&json!({"Name": "web", "Proxy": {"Config": {"protocol": "http"}}})).is_empty());
        assert!(without_effect(&json!([1])).is_empty());
        let many: Vec<Value> = (0..100).map(|_| json!({"Config": {"connect_timeout_ms": 1}})).collect();
        assert_eq!(without_effect(&json!({"Proxy": {"Upstreams": many}})).len(), TOLD_MAX);
    }
}

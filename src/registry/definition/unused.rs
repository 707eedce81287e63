//! Settings of Consul's sidecars that mean nothing where the agent is the proxy. They are taken, so that a team's definitions
//! load, and told: by the answer to a registration, by a warning about a file. What limits or opens anything is not among
//! them: it is refused. A service that nobody can call is told as well.

use serde_json::Value;

use super::fields::{Field, Fields};

/// Most settings that are told of one definition.
const TOLD_MAX: usize = 32;

/// What a service without a port is good for.
const NO_PORT: &str = "is not given: nobody can call the service through the mesh; the catalogue and DNS alone have it";

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

/// Lists what a service's definition will not do, contrary to what may be meant: where each setting stands, and why. Of what
/// is no definition it lists nothing.
pub fn without_effect(definition: &Value) -> Vec<(String, &'static str)> {
    let root = Field { path: String::new(), value: definition };
    let sidecar = inner(&root, "connect").and_then(|connect| inner(&connect, "sidecarservice"));
    let mut told = Vec::new();
    if is_beyond_reach(&root) {
        told.push(("Port".to_owned(), NO_PORT));
    }
    let proxies = [Some(root), sidecar].into_iter().flatten().filter_map(|holder| inner(&holder, "proxy"));
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

/// Tells whether nobody can call the service, and it calls nobody.
fn is_beyond_reach(root: &Field<'_>) -> bool {
    let Ok(mut fields) = Fields::of(root) else { return false };
    let is_named = matches!(fields.take(&["name", "service"]), Ok(Some(_)));
    let has_no_port = match fields.take(&["port"]) {
        Ok(port) => port.is_none_or(|port| port.value.as_u64() == Some(0)),
        Err(_) => false,
    };
    is_named && has_no_port && ["kind", "proxy", "connect"].iter().all(|name| matches!(fields.take(&[name]), Ok(None)))
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
    fn a_service_without_a_port_that_calls_nobody_is_told_what_that_means() {
        for (definition, is_told) in [
            (json!({"Name": "web"}), true),
            (json!({"name": "web", "tags": ["a"], "port": 0}), true),
            (json!({"Name": "web", "Port": 80}), false),
            (json!({"Name": "api", "Proxy": {"Upstreams": []}}), false),
            (json!({"Name": "edge", "Kind": "ingress-gateway"}), false),
            (json!({"Port": 80}), false),
        ] {
            assert_eq!(!without_effect(&definition).is_empty(), is_told, "{definition}");
        }
    }

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

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::registry::testing::DEFAULTS;

#[track_caller]
fn refused(value: &Value, want: &str) {
    let error = service_from_json(value, &DEFAULTS).unwrap_err().to_string();
    assert!(error.contains(want), "{error}");
}

#[test]
fn the_proxy_protocol_is_for_tcp_and_of_one_version() {
    let asks = |protocol: &str, version: &str| json!({"Name": "db", "Port": 1, "Protocol": protocol, "Meta": {META_PROXY_PROTOCOL: version}});
    assert!(service_from_json(&asks("tcp", "v2"), &DEFAULTS).is_ok());
    refused(&asks("http", "v2"), "protocol tcp");
    refused(&asks("tcp", "v1"), "the value is \"v2\"");
}

#[test]
fn a_gateway_says_where_it_listens_and_nothing_that_its_entry_says() {
    let gateway = |more: Value| {
        let mut value = json!({"Name": "edge", "Kind": "ingress-gateway", "Port": 8080});
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        value
    };
    for (more, listens) in [
        (json!({}), "0.0.0.0:0"),
        (json!({"Address": "10.0.0.7"}), "10.0.0.7:0"),
        (json!({"Address": "edge.example"}), "0.0.0.0:0"),
        (json!({"Address": "192.0.2.1", "Proxy": {"LocalServiceAddress": "10.0.0.7", "Config": {}}}), "10.0.0.7:0"),
    ] {
        let service = service_from_json(&gateway(more), &DEFAULTS).unwrap();
        assert_eq!((service.app_addr, &*service.record.kind), (listens.parse().unwrap(), "ingress-gateway"));
        assert_eq!(service.record.port, 8080);
    }
    let upstreams = json!({"Proxy": {"Upstreams": [{"DestinationName": "db", "LocalBindPort": 1}]}});
    refused(
        &gateway(upstreams),
        "Invalid Proxy: a gateway has the ports that the config entry ingress-gateway edge lists",
    );
    refused(&gateway(json!({"Proxy": {"LocalServicePort": 9}})), "Invalid Proxy: a gateway has the ports");
    refused(
        &gateway(json!({"Connect": {"SidecarService": {}}})),
        "Invalid Connect: a gateway is in the mesh by itself",
    );
    refused(&gateway(json!({"Connect": {"Native": true}})), "Invalid Connect");
}

#[test]
fn a_full_registration_is_read_field_by_field() {
    let value = json!({
        "ID": "web-1", "Name": "web", "Kind": "", "Tags": ["v1"], "Address": "", "Port": 8080, "SocketPath": "",
        "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 8080}}, "Meta": {"k": "v"},
        "EnableTagOverride": false, "Weights": {"Passing": 2, "Warning": 1}, "Locality": null,
        "Check": null,
        "Checks": [
            {"TTL": "15s", "Status": "passing"},
            {"HTTP": "http://127.0.0.1:8080/", "Interval": "10s", "Timeout": 5_000_000_000u64, "Header": {"X": ["y"]},
             "DeregisterCriticalServiceAfter": "1s", "TLSSkipVerify": true, "ServiceID": "ignored"}],
        "Proxy": {"DestinationServiceName": "web", "LocalServicePort": 9000, "Mode": "", "MeshGateway": {}, "Expose": {},
            "Upstreams": [{"DestinationType": "service", "DestinationName": "db", "Datacenter": "",
                "LocalBindPort": 9191, "Config": {"protocol": "grpc"}}],
            "Config": {}},
        "Connect": {"Native": false, "SidecarService": {"Proxy": {"Config": {"protocol": "http"}}}},
    });
    let service = service_from_json(&value, &DEFAULTS).unwrap();
    assert_eq!(service.record.id.as_str(), "web-1");
    assert_eq!(service.record.protocol, Protocol::Http);
    assert_eq!(service.record.weights.passing, 2);
    assert_eq!(service.app_addr, "127.0.0.1:9000".parse().unwrap());
    assert!(service.sidecar && !service.native);
    let upstream = &service.upstreams[0];
    assert_eq!((upstream.bind, upstream.protocol), ("127.0.0.1:9191".parse().unwrap(), Some(Protocol::Grpc)));
    let ids: Vec<_> = service.checks.iter().map(|check| check.id.as_str()).collect();
    assert_eq!(ids, ["service:web-1:1", "service:web-1:2"]);
    assert_eq!(service.checks[0].initial, HealthStatus::Passing);
    assert_eq!(service.checks[0].name, "Service 'web' check");
    let Probe::Periodic { timeout, target: Target::Http(_), .. } = &service.checks[1].probe else { panic!("HTTP") };
    assert_eq!(*timeout, Duration::from_secs(5));
    assert_eq!(service.checks[1].deregister_critical_after, Some(DEREGISTER_AFTER_MIN));
}

#[test]
fn times_and_outputs_of_checks_are_brought_within_their_bounds() {
    let read =
        |check: Value| service_from_json(&json!({"Name": "web", "Check": check}), &DEFAULTS).unwrap().checks.remove(0);
    let interval = |text: &str| match read(json!({"TCP": "x:1", "Interval": text})).probe {
        Probe::Periodic { interval, .. } => interval,
        other => panic!("{other:?}"),
    };
    assert_eq!(["100ms", "1s", "90s"].map(interval), [1, 1, 90].map(Duration::from_secs));
    let output = |bytes: u32| read(json!({"TTL": "9s", "OutputMaxSize": bytes})).output_bytes_max;
    assert_eq!([0, 100, 4096, 1_000_000].map(output), [4096, 100, 4096, 4096]);
    let gone =
        |text: &str| read(json!({"TTL": "9s", "DeregisterCriticalServiceAfter": text})).deregister_critical_after;
    assert_eq!(["1s", "90m", "0s"].map(gone), [Some(Duration::from_mins(1)), Some(Duration::from_mins(90)), None]);
}

#[test]
fn an_acl_token_says_nothing_and_is_not_kept() {
    let read = |value: Value| service_from_json(&value, &DEFAULTS).unwrap();
    let with = read(json!({"Name": "web", "Token": "secret", "Check": {"TTL": "1m", "Token": "secret"}}));
    assert_eq!(with, read(json!({"Name": "web", "Check": {"TTL": "1m"}})));
}

#[test]
fn case_and_snake_case_do_not_matter() {
    let value = json!({"name": "web", "PORT": 80, "enable_tag_override": true, "check": {"ttl": "9s", "check_id": "c"},
        "connect": {"sidecar_service": {}}, "tagged_addresses": {"lan": {"address": "a"}}});
    let service = service_from_json(&value, &DEFAULTS).unwrap();
    assert!(service.sidecar && service.record.enable_tag_override);
    assert_eq!(service.checks[0].id.as_str(), "c");
}

#[test]
fn bad_registrations_say_what_is_wrong() {
    refused(&json!({"Port": 1}), "Missing service name");
    refused(&json!({"Name": "a b"}), "Invalid service name: service name `a b`");
    refused(&json!({"Name": "a", "Address": "0.0.0.0"}), "Invalid service address");
    refused(&json!({"Name": "a", "Address": "::"}), "Invalid service address");
    refused(&json!({"Name": "a", "Weights": {"Passing": 0}}), "Invalid Weights: Passing");
    refused(&json!({"Name": "a", "Port": 70000}), "Request decode failed: `Port` must be a whole number");
    refused(&json!({"Name": "a", "Port": "80"}), "`Port` must be a number, and is a string");
    refused(&json!({"Name": "a", "Foo": 1}), "Request decode failed: unknown field `Foo`");
    refused(&json!({"Name": "a", "name": "b"}), "one field twice");
    refused(&json!(["x"]), "must be an object");
    let upstream = |value| json!({"Name": "a", "Proxy": {"Upstreams": [value]}});
    refused(&upstream(json!({"Bar": 1})), "unknown field `Proxy.Upstreams[0].Bar`");
    refused(&upstream(json!({"DestinationName": "b"})), "LocalBindPort");
    let other = upstream(json!({"DestinationName": "b", "LocalBindPort": 1, "Datacenter": "dc2"}));
    refused(
        &other,
        "Invalid Proxy.Upstreams[0].Datacenter: an upstream in another datacenter than the agent's own, \"dc1\"",
    );
    let own = upstream(json!({"DestinationName": "b", "LocalBindPort": 1, "Datacenter": "dc1"}));
    assert_eq!(service_from_json(&own, &DEFAULTS).unwrap().upstreams.len(), 1);
    refused(&json!({"Name": "a", "Proxy": {"Mode": "transparent"}}), "a transparent proxy is not supported");
    refused(&json!({"Name": "a", "Proxy": {"Expose": {"Checks": true}}}), "Proxy.Expose");
    refused(&json!({"Name": "a", "Proxy": {"Config": {"envoy_x": 1}}}), "Proxy.Config.envoy_x");
    refused(&json!({"Name": "a", "SocketPath": "/run/x"}), "Invalid SocketPath");
    refused(&json!({"Name": "a", "Kind": "connect-proxy"}), "SidecarService");
    refused(&json!({"Name": "a", "Protocol": "smtp"}), "Invalid Protocol");
}

#[test]
fn bad_checks_say_what_is_wrong() {
    #[track_caller]
    fn check(check: &Value, want: &str) {
        refused(&json!({"Name": "a", "Check": check}), want);
    }
    check(&json!({"HTTP": "http://x/"}), "Invalid check: a check of kind HTTP needs an Interval");
    check(&json!({"HTTP": "/x", "Interval": "1s"}), "must begin with http://");
    check(&json!({"TCP": "x", "Interval": "1s"}), "host:port");
    check(&json!({"TTL": "1s", "Interval": "1s"}), "Invalid check: Interval and TTL exclude each other");
    check(&json!({"TTL": "1s", "Status": "good"}), "Status for checks must 'passing', 'warning', 'critical'");
    check(&json!({"TTL": "1 second"}), "`Check.TTL` is wrong: `1 second` is no duration");
    check(&json!({"TTL": -5}), "no duration in nanoseconds");
    check(&json!({"Notes": "x"}), "it says not what to do: give one of HTTP, TCP, UDP");
    check(&json!({"TTL": "1s", "FailuresBeforeWarning": 3, "FailuresBeforeCritical": 2}), "FailuresBeforeWarning (3)");
    check(&json!({"HTTP": "http://x", "Interval": "1s", "Header": {"a b": ["c"]}}), "no valid name");
    check(
        &json!({"HTTP": "http://x", "TCP": "x:1", "Interval": "1s"}),
        "Invalid check: HTTP and TCP exclude each other",
    );
    check(&json!({"Args": ["true"], "TTL": "1s"}), "Args and TTL exclude each other");
    check(&json!({"AliasService": "x", "Interval": "1s"}), "an alias check takes neither Interval nor TTL");
    check(&json!({"Script": "true", "Interval": "1s"}), "give Args, a list");
    check(&json!({"Args": [""], "Interval": "1s"}), "must name a program");
    check(&json!({"GRPC": "x/svc", "Interval": "1s"}), "GRPC \"x\" must read host:port");
    check(&json!({"UDP": "x:0", "Interval": "1s"}), "a port from 1 to 65535");
    check(&json!({"TCP": "x:1", "TCPUseTLS": true, "TLSServerName": "a b", "Interval": "1s"}), "TLSServerName \"a b\"");
    check(&json!({"OSService": "a b", "Interval": "1s"}), "systemd unit");
    check(&json!({"DockerContainerID": "../x", "Args": ["x"], "Interval": "1s"}), "DockerContainerID must be");
    check(&json!({"DockerContainerID": "x", "Interval": "1s"}), "Args must name a program");
    check(&json!({"AliasNode": "n", "AliasServic": "x"}), "unknown field `Check.AliasServic`");
    let twice = json!({"Name": "a", "Checks": [{"TTL": "1s", "CheckID": "x"}, {"TTL": "2s", "CheckID": "x"}]});
    refused(&twice, "two checks have the id \"x\"");
}

#[test]
fn a_check_by_itself_has_a_name_and_may_have_a_service() {
    let value = json!({"ID": "mem", "Name": "Memory in use", "TTL": "30s", "ServiceID": "web"});
    let check = check_from_json(&value, &DEFAULTS).unwrap();
    assert_eq!((check.id.as_str(), check.service.unwrap().as_str()), ("mem", "web"));
    let refused = |value| check_from_json(&value, &DEFAULTS).unwrap_err();
    assert_eq!(refused(json!({"TTL": "30s"})), DefinitionError::MissingCheckName);
    assert!(refused(json!({"Name": "a b", "TTL": "1s"})).to_string().contains("check ID"));
}

#[test]
fn every_kind_of_check_is_read_in_any_spelling() {
    #[track_caller]
    fn check(mut value: Value, kind: &str, want: Option<&Target>) {
        value["name"] = json!("c");
        let probe = check_from_json(&value, &DEFAULTS).unwrap().probe;
        assert_eq!(probe.kind(), kind);
        let target = match probe {
            Probe::Periodic { target, .. } => Some(target),
            _ => None,
        };
        assert_eq!(target.as_ref(), want);
    }
    let tls = |server_name: &str, skip_verify| TlsOptions { server_name: server_name.to_owned(), skip_verify };
    let (target, none) = ("h:1".to_owned(), tls("", false));
    let value = json!({"tcp": "h:1", "tcp_use_tls": true, "tls_server_name": "n", "interval": "1s"});
    check(value, "tcp", Some(&Target::Tcp { target: target.clone(), tls: Some(tls("n", false)) }));
    check(json!({"Udp": "h:1", "interval": "1s"}), "udp", Some(&Target::Udp { target: target.clone() }));
    let value = json!({"grpc": "h:1/a.b", "grpc_use_tls": true, "tls_skip_verify": true, "interval": "1s"});
    let want = Target::Grpc { target: target.clone(), service: "a.b".to_owned(), tls: Some(tls("", true)) };
    check(value, "grpc", Some(&want));
    let value = json!({"GRPC": "h:1", "interval": "1s"});
    check(value, "grpc", Some(&Target::Grpc { target: target.clone(), service: String::new(), tls: None }));
    let want = |tls| Target::H2ping { target: target.clone(), tls };
    check(json!({"h2ping": "h:1", "interval": "1s"}), "h2ping", Some(&want(Some(none))));
    check(json!({"h2ping": "h:1", "h2ping_use_tls": false, "interval": "1s"}), "h2ping", Some(&want(None)));
    for key in ["Args", "args", "ScriptArgs", "script_args"] {
        let args = vec!["a".to_owned(), "b".to_owned()];
        check(json!({key: ["a", "b"], "interval": "1s"}), "script", Some(&Target::Script { args }));
    }
    let value = json!({"docker_container_id": "c1", "args": ["a"], "interval": "1s"});
    let want = Target::Docker { container: "c1".to_owned(), shell: "/bin/sh".to_owned(), args: vec!["a".to_owned()] };
    check(value, "docker", Some(&want));
    let unit = "a@1.service".to_owned();
    check(json!({"os_service": "a@1.service", "interval": "1s"}), "os_service", Some(&Target::OsService { unit }));
    check(json!({"alias_service": "db-1", "alias_node": "n2"}), "alias", None);
    check(json!({"AliasNode": "n2"}), "alias", None);
    check(json!({"ttl": "5s"}), "ttl", None);
}

#[test]
fn headers_and_body_do_not_print() {
    let value =
        json!({"Name": "c", "HTTP": "http://h", "Interval": "1s", "Body": "pass", "Header": {"X-Key": ["word"]}});
    let shown = format!("{:?}", check_from_json(&value, &DEFAULTS).unwrap());
    assert!(shown.contains("X-Key") && !shown.contains("word") && !shown.contains("\"pass\""), "{shown}");
}

#[test]
fn deep_nesting_is_refused_without_a_panic() {
    let mut value = json!({});
    for _ in 0..120 {
        value = json!([value]);
    }
    refused(&json!({"Name": "a", "Proxy": {"Expose": value}}), "Proxy.Expose");
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[0-9a-z:/.]{0,12}".prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "Name",
        "ID",
        "Port",
        "Address",
        "Tags",
        "Meta",
        "Weights",
        "Check",
        "Checks",
        "TTL",
        "HTTP",
        "TCP",
        "Interval",
        "Timeout",
        "Proxy",
        "Connect",
        "SidecarService",
        "Upstreams",
        "Config",
        "protocol",
        "DestinationName",
        "LocalBindPort",
        "Passing",
        "Header",
        "Status",
        "Args",
        "GRPC",
        "UDP",
        "H2PING",
        "AliasService",
        "DockerContainerID",
        "OSService",
        "TLSServerName",
        "x",
    ]);
    leaf.prop_recursive(5, 60, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_value_decodes_or_is_refused(value in any_value()) {
        let _unused = check_from_json(&value, &DEFAULTS);
        if let Ok(service) = service_from_json(&value, &DEFAULTS) {
            let bytes = crate::wire::encode(&service).unwrap();
            prop_assert_eq!(crate::wire::decode::<ServiceDefinition>(&bytes, bytes.len()).unwrap(), service);
        }
    }
}

//! The specification of the configuration, as tables.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

#[test]
fn every_problem_of_every_source_is_reported_in_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("a.hcl", "node_name = \"a b\"\nnode_nmae = \"x\"\nports {\n http = 99999\n mush = 1\n}\nworkers = \"two\"\n");
    write("b.json", r#"{"datacenter": "DC 1", "retry_join": ["ok", "not ok", 7], "log_level": "loud"}"#);
    write("c.hcl", "client_addr = \n");
    let settings = vec![
        Setting { flag: "-bind", key: "bind_addr", value: json!("here") },
        Setting { flag: "-drain-timeout", key: "drain_timeout", value: json!("10") },
    ];
    let inputs = Inputs { mode: Mode::Durable, paths: vec![dir.path().to_path_buf()], settings };
    let text = load(&inputs, &host()).unwrap_err().to_string();
    for want in [
        "a.hcl:1: node_name = a b: node name `a b` has the character ' '",
        "a.hcl:2: node_nmae: is not known",
        "a.hcl:4: ports.http = 99999: must be a port, 1 to 65535",
        "a.hcl:5: ports.mush: is not known",
        "a.hcl:7: workers = \"two\": must be a whole number",
        "b.json:1: datacenter = DC 1: must be 1 to 63 lower-case",
        "b.json:1: retry_join[1] = not ok: must be a host name",
        "b.json:1: retry_join[2] = 7: must be an address or name in quotes",
        "b.json:1: log_level = loud: `loud` is no log level",
        "c.hcl:1: is no valid HCL",
        "-bind (bind_addr) = here: must be an IP address",
        "-drain-timeout (drain_timeout) = \"10\": `10` is no duration",
        "data_dir: must be set",
    ] {
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
    assert!(text.starts_with("the configuration has 13 problems\n"), "{text}");
}

#[test]
fn the_key_value_store_is_off_unless_it_is_turned_on_within_its_bounds() {
    let bytes_max = |kv: Value| load_json(Mode::Dev, json!({"kv": kv})).unwrap().kv_bytes_max;
    assert_eq!(load_json(Mode::Dev, json!({})).unwrap().kv_bytes_max, None);
    assert_eq!(bytes_max(json!({"enabled": false, "bytes_max": 2_000_000})), None);
    assert_eq!(bytes_max(json!({"enabled": true})), Some(16 * 1024 * 1024));
    assert_eq!(bytes_max(json!({"enabled": true, "bytes_max": 2_000_000})), Some(2_000_000));
    for (kv, want) in [
        (json!({"enabled": true, "bytes_max": 1000}), "kv.bytes_max = 1000: must be 1048576 to 1073741824 bytes"),
        (json!({"enabled": "yes"}), "kv.enabled"),
        (json!({"cas": true}), "kv.cas: is not known"),
        (json!(true), "must be a block, such as kv { enabled = true }"),
    ] {
        let text = load_json(Mode::Dev, json!({"kv": kv})).unwrap_err().to_string();
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
}

#[test]
fn each_rule_between_keys_is_named_with_what_to_do() {
    #[track_caller]
    fn check(mode: Mode, value: Value, want: &str) {
        let text = load_json(mode, value).unwrap_err().to_string();
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
    let durable = Mode::Durable;
    check(durable, json!({"client_addr": "0.0.0.0"}), "client_addr = 0.0.0.0: is not loopback");
    check(durable, json!({"bind_addr": "0.0.0.0"}), "bind_addr = 0.0.0.0: is every address: pass -advertise IP");
    check(durable, json!({"advertise_addr": "0.0.0.0"}), "must be an address that other nodes reach");
    check(durable, json!({"advertise_addr": "fd00::1"}), "must be of the same IP version");
    check(durable, json!({"token": "weft1-x"}), "token: needs an address to join");
    check(durable, json!({"token": ""}), "token: must not be empty");
    check(durable, json!({"token_file": "/nonexistent"}), "token_file = /nonexistent: cannot be read");
    check(durable, json!({"token": "x", "token_file": "y", "retry_join": ["s"]}), "must not be set beside token");
    check(durable, json!({"issuer": "/nonexistent"}), "issuer = /nonexistent: must be a directory");
    check(durable, json!({"issuer": "/", "token": "x"}), "token: must not be set beside issuer");
    check(
        durable,
        json!({"workload_api": {"socket": "w.sock"}}),
        "workload_api.socket = w.sock: must be an absolute path",
    );
    check(durable, json!({"workload_api": {"socket": format!("/{}", "x".repeat(107))}}), "at most 107 bytes");
    check(durable, json!({"workload_api": {"group": "apps"}}), "workload_api.group = apps: has no effect without");
    check(durable, json!({"workload_api": {"mode": "0777"}}), "workload_api.mode: is not known");
    check(durable, json!({"serve": "web"}), "serve = web: works with -issuer only");
    check(durable, json!({"issuer": "/", "serve": "a,,b"}), "serve = a,,b: serve scope `a,,b` has a malformed");
    check(durable, json!({"admin_token": "short"}), "admin_token: must be at least 16");
    check(durable, json!({"ports": {"shared_http": 8500}}), "must differ from ports.http = 8500");
    check(durable, json!({"ports": {"mesh": 0}}), "ports.mesh = 0: must be a port, 1 to 65535");
    check(durable, json!({"workers": 0}), "workers = 0: must be 1 to 128");
    check(durable, json!({"drain_timeout": "2h"}), "must be at most 1h");
    check(durable, json!({"reconnect_timeout": "1h"}), "reconnect_timeout = 3600s: must be 8h to 2160h");
    check(durable, json!({"node_meta": {"a b": "x"}}), "node_meta.a b = x: needs a key of");
    check(durable, json!({"trust_domain": "PROD"}), "trust domain `PROD` has the character 'P'");
    check(durable, json!({"service": 7}), "service = 7: must be a block");
    check(
        durable,
        json!({"services": [{"name": "web"}, {"name": "web"}]}),
        "services[1].id = web: is the ID of another",
    );
    check(Mode::Dev, json!({"data_dir": "/d"}), "data_dir = /d: must not be set with -dev");
    check(Mode::Dev, json!({"retry_join": "10.0.0.1"}), "must not be set with -dev");
    check(Mode::Dev, json!({"issuer": "/"}), "issuer = /: must not be set with -dev");
}

#[test]
fn a_problem_never_shows_a_secret() {
    let text =
        load_json(Mode::Durable, json!({"admin_token": "hunter2", "token": "weft1-hush"})).unwrap_err().to_string();
    assert!(text.contains("admin_token: ") && !text.contains("hunter2") && !text.contains("hush"), "{text}");
    let config = load_json(Mode::Durable, json!({"admin_token": "0123456789abcdef"})).unwrap();
    assert!(!format!("{config:?}").contains("0123456789abcdef"));
}

#[test]
fn hcl_and_json_say_the_same() {
    let hcl = r#"
        node_name = "web-2"
        datacenter = "eu-1"
        data_dir = "/var/lib/weft"
        bind_addr = "0.0.0.0"
        advertise_addr = "10.0.0.2"
        client_addr = "127.0.0.2"
        retry_join = ["10.0.0.1", "seed.example:8301"]
        token = "weft1-abc"
        node_meta { rack = "a1" }
        ports {
          http = 8501
          shared_http = 8081
        }
        drain_timeout = "1m30s"
        reconnect_timeout = "24h"
        leave_on_terminate = false
        log_json = true
        workers = 3
    "#;
    let json = json!({
        "node_name": "web-2", "datacenter": "eu-1", "data_dir": "/var/lib/weft", "bind_addr": "0.0.0.0",
        "advertise_addr": "10.0.0.2", "client_addr": "127.0.0.2", "retry_join": ["10.0.0.1", "seed.example:8301"],
        "token": "weft1-abc", "node_meta": {"rack": "a1"}, "ports": {"http": 8501, "shared_http": 8081},
        "drain_timeout": 90_000_000_000_u64, "reconnect_timeout": "24h", "leave_on_terminate": false, "log_json": true, "workers": 3,
    });
    let from_hcl = load_text("a.hcl", hcl).unwrap();
    let from_json = load_text("a.json", &json.to_string()).unwrap();
    assert_eq!(from_hcl, from_json);
    assert_eq!(from_hcl.mesh_advertise, "10.0.0.2:8301".parse().unwrap());
    assert_eq!(from_hcl.mesh_bind, "0.0.0.0:8301".parse().unwrap());
    assert_eq!(from_hcl.http_addr, "127.0.0.2:8501".parse().ok());
    assert_eq!(from_hcl.upstream_ip, "127.0.0.2".parse::<IpAddr>().unwrap());
    assert_eq!(from_hcl.drain_timeout, Duration::from_secs(90));
    assert_eq!(from_hcl.reconnect_timeout, Duration::from_hours(24));
    assert_eq!(from_hcl.identity, IdentitySource::Token(Secret::new("weft1-abc")));
    assert_eq!(from_hcl.on_terminate, OnTerminate::Stay);
}

#[test]
fn later_files_replace_values_append_lists_and_merge_maps_and_flags_come_last() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let shared =
        "node_name = \"first\"\ndata_dir = \"/d\"\nretry_join = [\"a\"]\nnode_meta {\n x = \"1\"\n y = \"1\"\n}\n";
    write("10.hcl", shared);
    write("20.json", r#"{"node_name": "second", "retry_join": ["b", "a"], "node_meta": {"y": "2"}, "workers": 2}"#);
    let settings = vec![
        Setting { flag: "-join", key: "retry_join", value: json!("c") },
        Setting { flag: "-workers", key: "workers", value: json!(4) },
    ];
    let config = load(&Inputs { mode: Mode::Durable, paths: vec![dir.path().into()], settings }, &host()).unwrap();
    assert_eq!(config.node_name.as_str(), "second");
    assert_eq!(config.join, ["a", "b", "c"]);
    assert_eq!(config.node_meta, BTreeMap::from([("x".into(), "1".into()), ("y".into(), "2".into())]));
    assert_eq!(config.workers.get(), 4);
}

#[test]
fn files_named_one_by_one_merge_in_the_order_of_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let (z, a) = (dir.path().join("z.hcl"), dir.path().join("a.hcl"));
    std::fs::write(&z, "node_name = \"z\"\ndata_dir = \"/d\"\n").unwrap();
    std::fs::write(&a, "node_name = \"a\"\n").unwrap();
    let name = |paths: Vec<PathBuf>| {
        load(&Inputs { paths, ..Inputs::default() }, &host()).unwrap().node_name.as_str().to_owned()
    };
    assert_eq!(name(vec![z.clone(), a.clone()]), "a");
    assert_eq!(name(vec![a, z]), "z");
}

#[test]
fn without_settings_an_agent_takes_its_host_s_name_and_only_address() {
    let config = load_json(Mode::Durable, json!({})).unwrap();
    assert_eq!(config.node_name.as_str(), "host-1");
    assert_eq!(config.mesh_bind, "10.0.0.9:8301".parse().unwrap());
    assert_eq!(config.mesh_advertise, config.mesh_bind);
    assert_eq!(config.http_addr, "127.0.0.1:8500".parse().ok());
    assert_eq!(config.shared_http_addr, None);
    assert_eq!(config.identity, IdentitySource::Stored);
    assert_eq!(config.workers.get(), 2);
    assert_eq!(config.on_terminate, OnTerminate::Leave);
}

#[test]
fn the_keys_of_dns_become_its_configuration() {
    let hcl = r#"
        data_dir = "/d"
        client_addr = "127.0.0.3"
        domain = "Mesh.Example."
        alt_domain = ""
        recursors = ["192.0.2.53", "[2001:db8::53]:5353", "192.0.2.53"]
        addresses { dns = "127.0.0.4  ::1" }
        ports { dns = 53 }
        dns_config {
          node_ttl = "10s"
          service_ttl = { "*" = "1s", "Web" = "1m" }
          udp_answer_limit = 5
          a_record_limit = 2
          enable_truncate = true
          only_passing = true
          near = "_ip"
          recursor_timeout = "500ms"
          soa { min_ttl = 7 }
          allow_stale = true
        }
    "#;
    let config = load_text("a.hcl", hcl).unwrap();
    let dns = config.dns.unwrap();
    assert_eq!(dns.listen, ["127.0.0.4:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    assert_eq!((dns.domain.as_str(), dns.alt_domain), ("mesh.example", None));
    assert_eq!(dns.recursors, ["192.0.2.53:53".parse().unwrap(), "[2001:db8::53]:5353".parse().unwrap()]);
    assert_eq!((dns.node_ttl_s, dns.service_ttl.of("web"), dns.service_ttl.of("db")), (10, 60, 1));
    assert_eq!((dns.udp_answer_limit, dns.a_record_limit, dns.soa.minimum_s), (5, 2, 7));
    assert!(dns.enable_truncate && dns.only_passing);
    assert_eq!(dns.near, Some(crate::dns::Near::Asker));
    assert_eq!(dns.recursor_timeout, Duration::from_millis(500));
    assert!(config.warnings.iter().any(|warning| warning.key == "dns_config.allow_stale"));

    let plain = load_json(Mode::Durable, json!({"client_addr": "127.0.0.2"})).unwrap().dns.unwrap();
    assert_eq!(plain, DnsConfig::on(vec!["127.0.0.2:8600".parse().unwrap()]));
    let off = load_text("a.hcl", "data_dir = \"/d\"\nports {\n dns = -1\n}\n").unwrap();
    assert_eq!(off.dns, None);
}

#[test]
fn what_is_wrong_with_the_keys_of_dns_is_named() {
    #[track_caller]
    fn check(value: Value, want: &str) {
        let text = load_json(Mode::Durable, value).unwrap_err().to_string();
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
    check(json!({"ports": {"dns": 0}}), "ports.dns = 0: must be a port, 1 to 65535, or -1");
    check(json!({"ports": {"dns": "x"}}), "ports.dns = \"x\": must be a port");
    check(json!({"domain": "a..b"}), "domain = a..b: must be a domain");
    check(json!({"recursors": ["dns.example"]}), "recursors[0] = dns.example: must be an IP address");
    check(json!({"recursors": "127.0.0.1:8600"}), "recursors[0] = 127.0.0.1:8600: is this agent itself");
    check(json!({"recursors": ["0.0.0.0"]}), "must be an address that can be asked");
    check(json!({"addresses": {"dns": "localhost"}}), "addresses.dns = localhost: must be IP addresses");
    check(json!({"addresses": {"serf": "127.0.0.1"}}), "addresses.serf: is not known");
    check(json!({"dns_config": {"near": "n2"}}), "dns_config.near = n2: must be `_agent`");
    check(json!({"dns_config": {"ttl": 1}}), "dns_config.ttl: is not known");
    check(
        json!({"dns_config": {"recursor_timeout": "1m"}}),
        "dns_config.recursor_timeout = 60s: must be above 0 and at most 10s",
    );
    check(
        json!({"dns_config": {"service_ttl": {"web": "x"}}}),
        "dns_config.service_ttl.web = \"x\": `x` is no duration",
    );
}

#[test]
fn a_host_that_leaves_doubts_is_told_which_flags_to_pass() {
    let host = Host { name: None, addresses: vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()], cores: 1 };
    let text = load(&Inputs::default(), &host).unwrap_err().to_string();
    assert!(text.contains("node_name: ") && text.contains("pass -node NAME"), "{text}");
    assert!(text.contains("several addresses (10.0.0.1, 10.0.0.2): pass -bind IP"), "{text}");
}

#[test]
fn dev_mode_is_loopback_memory_and_everything_on() {
    let loaded = load(&Inputs { mode: Mode::Dev, ..Inputs::default() }, &host()).unwrap();
    let made = Config::dev("host-1".parse().unwrap(), [127, 0, 0, 1].into());
    assert_eq!(Config { workers: made.workers, ..loaded }, made);
    assert_eq!(made.shared_http_addr, Some("127.0.0.1:8480".parse().unwrap()));
    assert_eq!(made.storage, Storage::Memory);
}

#[test]
fn keys_of_consul_s_servers_are_accepted_with_a_warning() {
    let value = json!({"server": true, "bootstrap_expect": 3, "raft_protocol": 3, "acl": {}, "connect": {"enabled": true},
        "ports": {"grpc": 8502},
        "service": {"name": "web", "port": 80, "proxy": {"config": {"envoy_stats_bind_addr": "0.0.0.0:1"}}}});
    let warnings = load_json(Mode::Durable, value).unwrap().warnings;
    let (of_service, keys): (Vec<&str>, Vec<&str>) =
        warnings.iter().map(|warning| warning.key.as_str()).partition(|key| key.starts_with("service"));
    assert_eq!(keys, ["acl", "bootstrap_expect", "connect", "ports.grpc", "raft_protocol", "server"]);
    assert!(of_service.len() == 1 && of_service[0].ends_with(".proxy.config.envoy_stats_bind_addr"), "{of_service:?}");
    assert!(warnings.iter().all(|warning| warning.to_string().contains("has no effect")));
}

#[test]
fn the_file_of_a_consul_client_loads_and_each_key_without_effect_says_what_stands_in_its_place() {
    let hcl = r#"
        datacenter = "dc1"
        data_dir = "/opt/consul"
        log_level = "WARN"
        server = false
        client_addr = "0.0.0.0"
        addresses {
          http = "127.0.0.1"
          https = "127.0.0.1"
          grpc = "127.0.0.1"
          dns = "127.0.0.1"
        }
        ports {
          http = 8500
          https = 8501
          grpc_tls = -1
          sidecar_min_port = 21000
        }
        retry_join = ["10.0.0.1", "seed.example"]
        encrypt = "secret"
        auto_encrypt {
          tls = true
        }
        verify_incoming_rpc = true
        tls {
          defaults {
            verify_outgoing = true
          }
          internal_rpc {
            verify_server_hostname = true
          }
        }
        acl {
          enabled = true
          tokens {
            default = "secret"
          }
        }
        telemetry {
          prometheus_retention_time = "60s"
        }
        performance {
          raft_multiplier = 1
        }
        rejoin_after_leave = true
        skip_leave_on_interrupt = true
        enable_syslog = true
        disable_update_check = true
        ui_config {
          enabled = false
        }
        limits {
          http_max_conns_per_client = 100
        }
        http_config {
          block_endpoints = []
          response_headers {
            X-Frame-Options = "DENY"
          }
        }
        watches = [{ type = "services", args = ["/bin/true"] }]
        service {
          name = "web"
          port = 80
        }
    "#;
    let config = load_text("consul.hcl", hcl).unwrap();
    let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
    // What opens nothing beyond loopback needs no token.
    assert_eq!(
        (config.http_addr, config.https.as_ref().map(|https| https.addr)),
        (Some(loopback(8500)), Some(loopback(8501)))
    );
    assert_eq!(config.dns.unwrap().listen, [loopback(8600)]);
    let said: BTreeMap<String, String> =
        config.warnings.iter().map(|warning| (warning.key.clone(), warning.text.clone())).collect();
    for (key, instead) in [
        ("acl", "api_token"),
        ("telemetry.prometheus_retention_time", "/v1/agent/metrics"),
        ("watches", "weft watch"),
        ("ui_config", "weft top"),
        ("skip_leave_on_interrupt", "leave_on_terminate"),
        ("enable_syslog", "standard error"),
        ("auto_encrypt", "weft ca init"),
        ("addresses.grpc", "no gRPC"),
        ("ports.sidecar_min_port", "ports.mesh"),
        ("verify_incoming_rpc", "mutual TLS always"),
        ("http_config.response_headers", "its own headers"),
    ] {
        let text = said.get(key).unwrap_or_else(|| panic!("nothing is said of {key}: {said:?}"));
        assert!(text.starts_with("has no effect: ") && text.contains(instead), "{key}: {text}");
    }
    assert!(!format!("{said:?}").contains("secret"));
}

#[test]
fn what_would_open_an_agent_wider_than_its_file_says_is_refused() {
    #[track_caller]
    fn check(value: Value, want: &str) {
        let text = load_json(Mode::Durable, value).unwrap_err().to_string();
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
    check(
        json!({"http_config": {"block_endpoints": ["/v1/agent/"]}}),
        "http_config.block_endpoints: is not known to weft",
    );
    check(json!({"http_config": {"allow_write_http_from": ["127.0.0.0/8"]}}), "api_token");
    check(json!({"addresses": {"http": "0.0.0.0"}}), "addresses.http = 0.0.0.0: is not loopback");
    check(json!({"addresses": {"http": "127.0.0.1 10.0.0.1"}}), "must be one IP address, or unix://");
    check(json!({"addresses": {"https": "x"}, "ports": {"https": 8501}}), "addresses.https = x: must be an IP address");
    check(json!({"bind_addr": "{{ GetPrivateIP }}"}), "bind_addr = {{ GetPrivateIP }}: is a template");
    check(json!({"retry_join": ["provider=aws tag_key=x"]}), "asks a cloud for addresses");
}

#[test]
fn a_socket_stands_in_the_place_of_the_port_unless_an_address_stands_beside_it() {
    #[track_caller]
    fn refused(value: Value, want: &str) {
        let text = load_json(Mode::Durable, value).unwrap_err().to_string();
        assert!(text.contains(want), "missing {want:?} in:\n{text}");
    }
    #[track_caller]
    fn check(value: Value, want: (Option<&str>, Option<&str>, Option<&str>)) {
        let given = value.to_string();
        let config = load_json(Mode::Durable, value).unwrap_or_else(|error| panic!("{given}: {error}"));
        let socket = config.api_socket.map(|socket| socket.path.display().to_string());
        let (http, https) = (config.http_addr, config.https.map(|https| https.addr));
        let shown = [http, https].map(|addr| addr.map(|addr| addr.to_string()));
        assert_eq!((shown[0].as_deref(), shown[1].as_deref(), socket.as_deref()), want, "{given}");
    }
    let socket = "unix:///run/weft/http.sock";
    let path = Some("/run/weft/http.sock");
    check(json!({"addresses": {"http": socket}}), (None, None, path));
    // Nobody reaches the socket from beyond this host: no token is due.
    check(json!({"addresses": {"http": socket}, "client_addr": "0.0.0.0"}), (None, None, path));
    for both in [format!("{socket} 127.0.0.3"), format!("127.0.0.3  {socket}")] {
        check(json!({"addresses": {"http": both}}), (Some("127.0.0.3:8500"), None, path));
    }
    check(json!({"ports": {"http": -1, "https": 8501}}), (None, Some("127.0.0.1:8501"), None));
    check(json!({"ports": {"http": -1}, "addresses": {"http": socket}}), (None, None, path));
    check(json!({"ports": {"http": -1, "https": 8501, "shared_http": 8500}}), (None, Some("127.0.0.1:8501"), None));
    refused(json!({"ports": {"http": -1}}), "ports.http = -1: leaves the agent without an API: name ports.https");
    refused(json!({"ports": {"http": -1, "https": -1}}), "ports.http = -1: leaves the agent without an API");
    refused(json!({"ports": {"http": 0}}), "ports.http = 0: must be a port, 1 to 65535, or -1 to turn it off");
    refused(json!({"addresses": {"http": ""}}), "must be one IP address, or unix://");
    refused(json!({"addresses": {"http": format!("{socket} unix:///x")}}), "or both with a space between them");
    refused(json!({"addresses": {"http": format!("{socket} 10.0.0.1")}}), "addresses.http = 10.0.0.1: is not loopback");
    let beyond = json!({"ports": {"http": -1, "https": 8501}, "client_addr": "10.0.0.9"});
    refused(beyond, "client_addr = 10.0.0.9: is not loopback");
}

#[test]
fn verify_incoming_asks_for_a_ca_where_https_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    let made = rcgen::generate_simple_self_signed(["ca.example".to_owned()]).unwrap();
    std::fs::write(&ca, made.cert.pem()).unwrap();
    let ca = ca.to_str().unwrap();
    let load = |extra: Value| {
        let mut value = json!({"ports": {"https": 8501}});
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        load_json(Mode::Durable, value)
    };
    let asks = |extra: Value| load(extra).unwrap().https.unwrap().client_ca.is_some();
    for asking in [
        json!({"tls": {"https": {"ca_file": ca, "verify_incoming": true}}}),
        json!({"tls": {"https": {"ca_file": ca}, "defaults": {"verify_incoming": true}}}),
        json!({"tls": {"defaults": {"ca_file": ca, "verify_incoming": true}}}),
        json!({"ca_file": ca, "verify_incoming": true}),
        json!({"ca_file": ca, "verify_incoming": false, "verify_incoming_https": true}),
    ] {
        assert!(asks(asking.clone()), "{asking}");
    }
    for not in [
        json!({"tls": {"https": {"ca_file": ca}}}),
        json!({"tls": {"https": {"ca_file": ca, "verify_incoming": false}, "defaults": {"verify_incoming": true}}}),
        json!({"verify_incoming": false, "verify_incoming_rpc": true}),
    ] {
        assert!(!asks(not.clone()), "{not}");
    }
    for key in ["verify_incoming", "verify_incoming_https"] {
        let text = load(json!({ key: true })).unwrap_err().to_string();
        assert!(text.contains(&format!("{key} = true: needs tls.https.ca_file too")), "{text}");
        let text = load(json!({ key: "yes" })).unwrap_err().to_string();
        assert!(text.contains("must be true or false"), "{text}");
        // Without HTTPS there is nothing to let in.
        let warnings = load_json(Mode::Durable, json!({ key: true })).unwrap().warnings;
        assert!(warnings[0].text.contains("mutual TLS always"), "{warnings:?}");
    }
    // A later file replaces what an earlier one said by the same key.
    let mut raw = raw::Raw::default();
    for (file, asks) in [("a.json", true), ("b.json", false)] {
        let value = json!({"data_dir": "/d", "ports": {"https": 8501}, "ca_file": ca, "verify_incoming": asks});
        raw.add_file(&std::sync::Arc::from(std::path::Path::new(file)), value.as_object().unwrap().clone());
    }
    assert_eq!(resolve::resolve(raw, Mode::Durable, &host()).unwrap().https.unwrap().client_ca, None);
    let text = load(json!({"tls": {"https": {"ca_file": "/nonexistent", "verify_incoming": true}}})).unwrap_err();
    assert!(text.to_string().contains("tls.https.ca_file = /nonexistent: cannot be read"), "{text}");
    let idle = load(json!({"tls": {"https": {"ca_file": ca}}})).unwrap().warnings;
    assert!(idle[0].text.contains("without tls.https.verify_incoming"), "{idle:?}");
}

#[test]
fn an_admin_token_is_its_digest_or_in_clear_with_a_warning() {
    const TOKEN: &str = "0123456789abcdef";
    const DIGEST: &str = "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f";
    let token = crate::api::ApiToken::new(TOKEN, crate::api::Right::Operator);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let load = |value: Value| load_json(Mode::Durable, value);
    let of_file = |text: &str| {
        std::fs::write(&file, text).unwrap();
        load(json!({"admin_token_file": file.to_str().unwrap()}))
    };
    let in_clear = load(json!({"admin_token": TOKEN})).unwrap();
    assert_eq!(in_clear.admin_token.as_ref(), Some(&token));
    assert!(in_clear.warnings[0].to_string().contains("sha256sum"), "{:?}", in_clear.warnings);
    for config in [
        load(json!({"admin_token": format!("sha256:{DIGEST}")})).unwrap(),
        of_file(&format!("sha256:{DIGEST}\n")).unwrap(),
        of_file(TOKEN).unwrap(),
    ] {
        assert_eq!((config.admin_token.as_ref(), config.warnings.as_slice()), (Some(&token), [].as_slice()));
    }
    for bad in ["sha256:", "sha256:9f9f", &format!("sha256:{DIGEST}0"), &format!("sha256: {DIGEST}")] {
        let text = of_file(bad).unwrap_err().to_string();
        assert!(text.contains("64 hexadecimal digits after sha256:"), "{bad}: {text}");
    }
}

#[test]
fn a_secret_file_is_read_and_trimmed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "weft1-abc\n").unwrap();
    let value = json!({"token_file": path.to_str().unwrap(), "retry_join": "10.0.0.1"});
    assert_eq!(load_json(Mode::Durable, value).unwrap().identity, IdentitySource::Token(Secret::new("weft1-abc")));
}

#[test]
fn services_of_files_take_the_client_address_for_their_upstreams() {
    let text = r#"
        data_dir = "/d"
        client_addr = "127.0.0.3"
        service {
          name = "web"
          port = 8080
          proxy {
            upstreams {
              destination_name = "db"
              local_bind_port = 9191
            }
          }
        }
        service {
          name = "db"
          port = 5432
        }
    "#;
    let config = load_text("a.hcl", text).unwrap();
    let names: Vec<&str> = config.services.iter().map(|service| service.record.id.as_str()).collect();
    assert_eq!(names, ["web", "db"]);
    assert_eq!(config.services[0].upstreams[0].bind, "127.0.0.3:9191".parse().unwrap());
}

#[test]
fn upstreams_that_ask_for_one_port_are_a_problem_of_the_configuration() {
    let text = "data_dir = \"/d\"\nnode_name = \"n\"\nservice {\n  name = \"api\"\n  connect {\n    sidecar_service {\n      proxy {\n        upstreams = [{ destination_name = \"web\", local_bind_port = 9191 }, { destination_name = \"db\", local_bind_port = 9191 }]\n      }\n    }\n  }\n}\n";
    let problems = load_text("a.hcl", text).unwrap_err();
    assert!(problems.contains("9191 is asked for by service \"api\" (to web)"), "{problems}");
    assert!(load_text("a.hcl", &text.replacen("9191", "9192", 1)).is_ok());
}

#[test]
fn the_shipped_configurations_are_valid() {
    let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let load_path = |path: &str| load(&Inputs { paths: vec![top.join(path)], ..Inputs::default() }, &host());
    let packaged = load_path("deploy/weft.d").unwrap();
    assert_eq!(packaged.services.len(), 1);
    assert_eq!(packaged.warnings, []);
    for path in ["examples/three-hosts/web-2.hcl", "examples/three-hosts/client.hcl"] {
        assert_eq!(load_path(path).unwrap().join, ["127.0.0.1"], "{path}");
    }
    // Its issuer is made by the reader of the example.
    let problems = load_path("examples/three-hosts/web-1.hcl").unwrap_err().problems;
    assert_eq!(problems.iter().map(|problem| problem.key.as_str()).collect::<Vec<_>>(), ["issuer"]);
    for path in ["service-web-1.hcl", "service-web-2.hcl", "service-shop.hcl"] {
        let document = read_document(&top.join("examples/three-hosts").join(path)).unwrap();
        let defaults =
            crate::registry::definition::DefinitionDefaults { bind_ip: [127, 0, 0, 1].into(), datacenter: "dc1" };
        crate::registry::definition::service_from_json(&document.root["service"], &defaults).unwrap();
    }
}

proptest! {
    #[test]
    fn any_value_of_any_key_is_taken_or_refused_without_a_panic(
        key in prop::sample::select(vec![
            "node_name", "datacenter", "data_dir", "bind_addr", "advertise_addr", "client_addr", "ports", "retry_join",
            "node_meta", "log_level", "log_json", "trust_domain", "serve", "workers", "drain_timeout", "server", "x",
            "service", "check",
        ]),
        value in json_value(),
    ) {
        let _unused = load_json(Mode::Durable, json!({key: value}));
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{0,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn host() -> Host {
    let addresses = vec![[127, 0, 0, 1].into(), [10, 0, 0, 9].into()];
    Host { name: Some("host-1.example".to_owned()), addresses, cores: 2 }
}

/// Resolves `value` as the only file; a data directory is added where none is given.
fn load_json(mode: Mode, mut value: Value) -> Result<Config, ConfigError> {
    let root = value.as_object_mut().unwrap();
    if mode == Mode::Durable {
        root.entry("data_dir").or_insert_with(|| json!("/d"));
    }
    let mut raw = raw::Raw::default();
    raw.add_file(&std::sync::Arc::from(std::path::Path::new("a.json")), root.clone());
    resolve::resolve(raw, mode, &host())
}

fn load_text(name: &str, text: &str) -> Result<Config, String> {
    let documents = file::parse_text(std::path::Path::new(name), text).map_err(|problems| format!("{problems:?}"))?;
    let mut raw = raw::Raw::default();
    raw.add_file(&documents.path, documents.root);
    resolve::resolve(raw, Mode::Durable, &host()).map_err(|err| err.to_string())
}

//! Keys of Consul's files that mean nothing to weft: they are taken, so that a team's files load, and each is answered with
//! what stands in its place. What would open an agent wider than its author wrote is refused instead.

use serde_json::Value;

use super::problem::{Problem, Source};
use super::raw::Raw;

/// Ports of Consul's that weft has not.
const PORTS: [&str; 9] = [
    "grpc",
    "grpc_tls",
    "serf_lan",
    "serf_wan",
    "server",
    "sidecar_min_port",
    "sidecar_max_port",
    "expose_min_port",
    "expose_max_port",
];
/// Keys of `http_config` that close endpoints, or close them to some.
const CLOSING: [&str; 2] = ["block_endpoints", "allow_write_http_from"];

/// Tells whether `name` is a key of Consul's block `ports` that weft has not.
pub(super) fn is_port(name: &str) -> bool {
    PORTS.contains(&name)
}

/// Says why a key of Consul's has no effect, and what stands in its place; none: it is none of these.
pub fn without_effect(key: &str) -> Option<&'static str> {
    let key = match key {
        _ if key.starts_with("acl_") => "acl",
        _ if key.starts_with("raft_") => "server",
        _ => key,
    };
    of_the_mesh(key).or_else(|| of_the_host(key))
}

/// Keys about servers, other agents, and what is said between them.
fn of_the_mesh(key: &str) -> Option<&'static str> {
    Some(match key {
        "acl" | "enable_acl_replication" | "session_ttl_min" => {
            "has no effect: weft has no ACLs; tokens of the API are admin_token_file and api_token, calls are decided by intentions"
        }
        "server"
        | "bootstrap"
        | "bootstrap_expect"
        | "autopilot"
        | "performance"
        | "rpc"
        | "non_voting_server"
        | "read_replica"
        | "server_rejoin_age_max"
        | "use_streaming_backend"
        | "discovery_max_stale" => "has no effect: weft has no servers, every agent answers from what it knows",
        "primary_datacenter"
        | "primary_gateways"
        | "primary_gateways_interval"
        | "retry_join_wan"
        | "start_join_wan"
        | "retry_interval_wan"
        | "retry_max_wan"
        | "advertise_addr_wan"
        | "advertise_addr_wan_ipv4"
        | "advertise_addr_wan_ipv6"
        | "serf_wan"
        | "serf_wan_allowed_cidrs"
        | "gossip_wan"
        | "reconnect_timeout_wan"
        | "translate_wan_addrs"
        | "peering" => "has no effect: there is one mesh of all datacenters, whose agents reach each other",
        "connect" => "has no effect: the mesh is always on, and its CA is made by weft ca init",
        "encrypt"
        | "encrypt_verify_incoming"
        | "encrypt_verify_outgoing"
        | "disable_keyring_file"
        | "auto_encrypt"
        | "auto_config"
        | "verify_incoming_rpc"
        | "verify_outgoing"
        | "verify_server_hostname"
        | "ca_path"
        | "tls_min_version"
        | "tls_cipher_suites"
        | "tls_prefer_server_cipher_suites" => {
            "has no effect: between agents there is mutual TLS always, by the mesh's own certificates (weft ca init)"
        }
        "cert_file" | "key_file" => {
            "has no effect: the mesh has certificates of its own; those of HTTPS stand in tls { https { … } }"
        }
        "enable_agent_tls_for_checks" => {
            "has no effect: checks show no certificate; tls.defaults.ca_file says whom they believe"
        }
        "gossip_lan" | "serf_lan" | "serf_lan_allowed_cidrs" | "disable_coordinates" => {
            "has no effect: gossip goes over ports.mesh and keeps its own time; who may join, tokens say (weft token create)"
        }
        "retry_interval" | "retry_max" | "rejoin_after_leave" => {
            "has no effect: an agent asks its seeds, and the peers on its disk, until one answers"
        }
        "segment" | "segments" | "partition" | "license_path" | "audit" | "reporting" | "cloud" => {
            "has no effect: weft has neither partitions nor segments, nor a licence key"
        }
        _ => return None,
    })
}

/// Keys about the agent on its own host.
fn of_the_host(key: &str) -> Option<&'static str> {
    Some(match key {
        "skip_leave_on_interrupt" => "has no effect: leave_on_terminate decides for both signals",
        "node_id" | "disable_host_node_id" => "has no effect: the agent makes an id of its own and keeps it on disk",
        "log_file"
        | "log_rotate_bytes"
        | "log_rotate_duration"
        | "log_rotate_max_files"
        | "enable_syslog"
        | "syslog_facility" => {
            "has no effect: the log goes to standard error, for the service manager to keep (journalctl -u weft)"
        }
        "pid_file" => "has no effect: the service manager knows the process; nothing is forked",
        "enable_debug" => "has no effect: weft debug collects what is known of an agent",
        "watches" => "has no effect: run weft watch for each, as a service of its own",
        "config_entries" => "has no effect: entries are signed; write each once with weft config write",
        "ui" | "ui_dir" | "ui_config" | "ui_content_path" => {
            "has no effect: weft has no web interface; weft top, weft why and weft info show an agent"
        }
        "limits"
        | "http_max_header_bytes"
        | "default_query_time"
        | "max_query_time"
        | "cache"
        | "xds"
        | "check_update_interval"
        | "check_output_max_size"
        | "discard_check_output"
        | "disable_http_unprintable_char_filter"
        | "enable_central_service_config" => {
            "has no effect: the agent has bounds of its own, and the outputs of checks stay on it"
        }
        "locality" => "has no effect: node_meta { zone = \"…\" } says where a node is (api/balancing.md)",
        "disable_remote_exec" | "disable_update_check" | "disable_anonymous_signature" | "experiments" => {
            "has no effect: weft has none of this"
        }
        _ => return None,
    })
}

impl Raw {
    /// Takes Consul's block `http_config`, of which weft has nothing.
    pub(super) fn add_http_config(&mut self, source: &Source, value: Value) {
        let Value::Object(map) = value else {
            return self.mistyped(source, "http_config", &value, "must be a block");
        };
        for (name, value) in map {
            let key = format!("http_config.{name}");
            let is_empty = value.as_array().is_some_and(Vec::is_empty);
            if CLOSING.contains(&name.as_str()) && !is_empty {
                let rule = "is not known to weft, and the API would stand open without it: give its clients tokens of the right \"read\" or \"services\" (api_token), then take it out";
                self.problems.push(Problem::new(source.clone(), key, None, rule));
            } else {
                self.warn(source, &key, "has no effect: the agent has bounds of its own, and sends its own headers");
            }
        }
    }
}

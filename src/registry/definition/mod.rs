//! Services and checks as they are registered, and how Consul's JSON becomes them.
//!
//! ```text
//!   API body, config file -> serde_json::Value -> fields (case, aliases, unknown names) -> service, check -> definition
//! ```
//!
//! Invariants: decoding is total, whatever the value; a definition that comes out is valid by itself (what other
//! services of the node have to say to it is the registry's business); no field of the input is ignored: it is used,
//! or it is empty, or it is told that it has no effect (`unused`), or the whole is refused with the field's path.
//! Not here: Consul's JSON on the way out (`api`).

mod check;
mod external;
mod fields;
mod service;
mod unused;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::model::{CheckId, HealthStatus, InstanceId, Protocol, ServiceName, ServiceRecord};

pub use self::check::check_from_json;
pub use self::external::{InDatacenter, external_from_json, removal_from_json};
pub use self::service::service_from_json;
pub use self::unused::without_effect;
#[cfg(any(test, fuzzing))]
pub(crate) use crate::model::duration::parse as duration_from_text;

/// Output that is kept of a check, in bytes (Consul's default and weft's bound).
pub const OUTPUT_BYTES_MAX: usize = 4096;
/// Shortest interval of a check; a shorter one is raised to it.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Shortest time after which a critical service is deregistered; a shorter one is raised to it.
pub const DEREGISTER_AFTER_MIN: Duration = Duration::from_mins(1);
/// How long a check may take where its definition names no timeout.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// The pair of a service's `Meta` that asks for a header of the PROXY protocol before each TCP connection; its value is `v2`.
pub const META_PROXY_PROTOCOL: &str = "proxy-protocol";

/// What a definition leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefinitionDefaults<'a> {
    /// Where upstream ports listen unless they name an address: the agent's `-client` address if it is a loopback one.
    pub bind_ip: IpAddr,
    /// The agent's own datacenter: the only one that an upstream may name.
    pub datacenter: &'a str,
}

/// Why a JSON value is no definition; the text is the body of a 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    /// A field that Consul's shape does not have.
    #[error("Request decode failed: unknown field `{path}`")]
    UnknownField {
        /// Where it stands.
        path: String,
    },
    /// A value of the wrong type or range.
    #[error("Request decode failed: `{path}` {problem}")]
    Decode {
        /// Where it stands.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No name.
    #[error("Missing service name")]
    MissingServiceName,
    /// No name.
    #[error("Missing check name")]
    MissingCheckName,
    /// An address that nobody can dial.
    #[error("Invalid service address")]
    ServiceAddress,
    /// A check that contradicts itself or lacks something.
    #[error("Invalid check: {0}")]
    Check(String),
    /// Weights outside their range.
    #[error("Invalid Weights: {0}")]
    Weights(String),
    /// No status of a check.
    #[error("Status for checks must 'passing', 'warning', 'critical'")]
    Status,
    /// Any other value that breaks a rule.
    #[error("Invalid {path}: {problem}")]
    Invalid {
        /// Where it stands.
        path: String,
        /// The rule.
        problem: String,
    },
    /// A field of Consul's that this version does not act on.
    #[error("Invalid {path}: {what} is not supported by this version of weft; leave the field out")]
    Unsupported {
        /// Where it stands.
        path: String,
        /// What it asks for.
        what: String,
    },
}

impl DefinitionError {
    /// Returns the field that is at fault, as a path from the definition, where it is known.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::UnknownField { path }
            | Self::Decode { path, .. }
            | Self::Invalid { path, .. }
            | Self::Unsupported { path, .. } => Some(path),
            // A check of several says first where it stands.
            Self::Check(text) => text.split_once(": ").map(|(path, _)| path).filter(|path| !path.contains(' ')),
            _ => None,
        }
    }
}

/// A service as its owner registered it: by the API or a file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServiceDefinition {
    /// What other nodes see.
    pub record: ServiceRecord,
    /// A unix socket instead of a port; empty: none.
    pub socket_path: String,
    /// Where mesh traffic is relayed to: `Proxy.LocalServiceAddress:LocalServicePort`, else the service's own address, else 127.0.0.1:port.
    pub app_addr: SocketAddr,
    /// Local ports that it asks for.
    pub upstreams: Vec<UpstreamDefinition>,
    /// Whether `Connect.SidecarService` was given: a synthetic `<id>-sidecar-proxy` is then shown.
    pub sidecar: bool,
    /// Whether `Connect.Native` was given.
    pub native: bool,
    /// Its checks, ids resolved (`service:<id>`, `service:<id>:1..n`).
    pub checks: Vec<CheckDefinition>,
}

/// One upstream of a service.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UpstreamDefinition {
    /// Where calls go.
    pub destination: ServiceName,
    /// The local port's address; default 127.0.0.1 (in an agent with `-client 127.0.0.N`: that address).
    pub bind: SocketAddr,
    /// `Config.protocol`.
    pub protocol: Option<Protocol>,
}

/// A check as it was registered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CheckDefinition {
    /// Unique on the node.
    pub id: CheckId,
    /// For people; default `Service '<name>' check`.
    pub name: String,
    /// For people.
    pub notes: String,
    /// The instance that it is about.
    pub service: Option<InstanceId>,
    /// What is done.
    pub probe: Probe,
    /// Status before the first result; default critical.
    pub initial: HealthStatus,
    /// Passing results in a row before it passes.
    pub success_before_passing: u32,
    /// Failures in a row before it warns.
    pub failures_before_warning: u32,
    /// Failures in a row before it is critical.
    pub failures_before_critical: u32,
    /// Output kept, in bytes; at most 4096.
    pub output_bytes_max: usize,
    /// Deregisters the service after it was critical for so long; at least 1 min.
    pub deregister_critical_after: Option<Duration>,
}

/// What a check does.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Probe {
    /// Looks again and again.
    Periodic {
        /// At what, and how.
        target: Target,
        /// How often; at least 1 s.
        interval: Duration,
        /// How long a look may take; default 10 s.
        timeout: Duration,
    },
    /// Waits for the app to say that it lives.
    Ttl {
        /// Critical after so long without a word.
        ttl: Duration,
    },
    /// Follows the worst check of another service or of a node.
    Alias {
        /// The node, by name or id; none: this one.
        node: Option<String>,
        /// The service; none: the node as a whole.
        service: Option<InstanceId>,
    },
    /// Set by hand (maintenance).
    Static,
}

/// What a periodic check looks at.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Target {
    /// Requests a URL: 2xx passes, 429 warns, all else is critical.
    Http(HttpTarget),
    /// Connects, and shakes hands where TLS is wanted.
    Tcp {
        /// `host:port`
        target: String,
        /// With TLS.
        tls: Option<TlsOptions>,
    },
    /// Sends an empty datagram: a refusal is critical, an answer or silence passes.
    Udp {
        /// `host:port`
        target: String,
    },
    /// Asks by grpc.health.v1: SERVING passes.
    Grpc {
        /// `host:port`
        target: String,
        /// The service asked about; empty: the server as a whole.
        service: String,
        /// With TLS.
        tls: Option<TlsOptions>,
    },
    /// Sends an HTTP/2 PING.
    H2ping {
        /// `host:port`
        target: String,
        /// With TLS; the default.
        tls: Option<TlsOptions>,
    },
    /// Runs a program of this host: 0 passes, 1 warns, all else is critical.
    Script {
        /// The program and its arguments; no shell.
        args: Vec<String>,
    },
    /// Asks systemd about a unit.
    OsService {
        /// `nginx.service`
        unit: String,
    },
    /// Runs a program in a container; judged like a script.
    Docker {
        /// Name or id.
        container: String,
        /// Put before `args`; default `/bin/sh`.
        shell: String,
        /// Its arguments.
        args: Vec<String>,
    },
}

/// What an HTTP check asks. Headers and body print no values: they may hold secrets.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HttpTarget {
    /// `http://…` or `https://…`
    pub url: String,
    /// Default GET.
    pub method: String,
    /// Extra headers.
    pub headers: BTreeMap<String, Vec<String>>,
    /// Request body.
    pub body: String,
    /// Whether redirects stay unfollowed.
    pub disable_redirects: bool,
    /// For https.
    pub tls: TlsOptions,
}

impl fmt::Debug for HttpTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, method, headers, body, disable_redirects, tls } = self;
        let names: Vec<&String> = headers.keys().collect();
        let mut out = f.debug_struct("HttpTarget");
        out.field("url", url).field("method", method).field("headers", &names).field("body_bytes", &body.len());
        out.field("disable_redirects", disable_redirects).field("tls", tls).finish()
    }
}

/// How a check's TLS differs from the usual.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TlsOptions {
    /// The name asked for and verified; empty: the host of the target.
    pub server_name: String,
    /// Whether the certificate is not verified.
    pub skip_verify: bool,
}

impl Target {
    /// Whether a program of the operator's choice is run: off unless the agent's configuration allows it.
    pub fn runs_a_program(&self) -> bool {
        matches!(self, Self::Script { .. } | Self::Docker { .. })
    }
}

impl Probe {
    /// Returns the kind as Consul names it: `http`, `tcp`, `ttl`, `maintenance` ….
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Periodic { target, .. } => match target {
                Target::Http(_) => "http",
                Target::Tcp { .. } => "tcp",
                Target::Udp { .. } => "udp",
                Target::Grpc { .. } => "grpc",
                Target::H2ping { .. } => "h2ping",
                Target::Script { .. } => "script",
                Target::OsService { .. } => "os_service",
                Target::Docker { .. } => "docker",
            },
            Self::Ttl { .. } => "ttl",
            Self::Alias { .. } => "alias",
            Self::Static => "maintenance",
        }
    }

    /// Whether it runs a program of the operator's choice.
    pub fn runs_a_program(&self) -> bool {
        matches!(self, Self::Periodic { target, .. } if target.runs_a_program())
    }
}

#[cfg(test)]
mod tests;

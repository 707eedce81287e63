//! Configuration: files and flags to one complete, valid [`Config`].
//!
//! ```text
//!   *.hcl, *.json -> file -> Document --+
//!   flags ------------------> Setting --+-> raw (typed, optional) -> resolve (+ Host, defaults) -> Config
//!                                                                                      \-> ConfigError (every problem)
//! ```
//!
//! Invariants: a `Config` from [`load`] is valid; nothing in it needs a second check. Flags win over files, later
//! files over earlier ones; lists are appended to, maps merged. One run reports every problem. Secrets never print.
//! Not here: the environment (the command line reads it), definitions of services (`registry::definition`), starting
//! anything (`node`).

mod address;
mod consul;
mod dns;
mod duration;
mod file;
mod host;
mod http_api;
mod locate;
mod problem;
mod raw;
mod resolve;
mod telemetry;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use consul::without_effect;
pub use duration::parse_duration;
pub use file::{Document, FILE_BYTES_MAX, list_directory, read_document, read_document_or_input};
pub use host::Host;
pub use problem::{ConfigError, Problem, Source, Warning};
pub use raw::Setting;

use crate::api::{ApiToken, HttpsConfig};
use crate::authz::Action;
use crate::dns::DnsConfig;
use crate::model::{NodeName, ServeScope, TrustDomain};
use crate::otlp::OtlpConfig;
use crate::registry::{CheckDefinition, CheckSettings, ScriptPolicy, ServiceDefinition};
use crate::telemetry::{Filter, LogFormat};
use crate::unix_socket::SocketConfig;
use crate::workload::WorkloadConfig;

/// The mesh port: Consul's port between agents, so that firewalls of its users know it.
pub const MESH_PORT_DEFAULT: u16 = 8301;
/// The HTTP API's port: Consul's, so that its clients find it.
pub const HTTP_PORT_DEFAULT: u16 = 8500;
/// The port of DNS: Consul's, so that what forwards to it stays as it is.
pub const DNS_PORT_DEFAULT: u16 = 8600;
/// Longest wait for one recursor: whoever asks has given up by then.
pub const RECURSOR_TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// The shared HTTP port where it is on: beside the API's, and rarely taken.
pub const SHARED_HTTP_PORT_DEFAULT: u16 = 8480;
/// Consul's default datacenter.
pub const DATACENTER_DEFAULT: &str = "dc1";
/// The trust domain of `-dev`, where none is named.
pub const TRUST_DOMAIN_DEV: &str = "dev.weft";
/// How long open streams may finish at a stop: longer than a slow request, far below systemd's 90 s.
pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// Longest drain: beyond an hour a stop is no stop.
pub const DRAIN_TIMEOUT_MAX: Duration = Duration::from_hours(1);
/// How long a failed member is remembered: serf's and Consul's default, a long weekend.
pub const RECONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_hours(72);
/// Shortest such time: Consul's bound; a night without power must not lose members.
pub const RECONNECT_TIMEOUT_MIN: Duration = Duration::from_hours(8);
/// Longest such time: members are held in memory.
pub const RECONNECT_TIMEOUT_MAX: Duration = Duration::from_hours(24 * 90);
/// Most data-plane workers: the first byte of a connection id names one of at most 128.
pub const WORKERS_MAX: usize = 128;
/// Most join addresses: a seed list, not an inventory.
pub const JOIN_MAX: usize = 256;
/// Smallest key-value store, in bytes: one value of the largest size.
pub const KV_BYTES_MIN: u64 = 1024 * 1024;
/// Largest key-value store, in bytes: every agent holds it in memory.
pub const KV_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Most pairs of node meta: Consul's bound.
pub const NODE_META_MAX: usize = 64;
/// Longest key of node meta, in bytes: Consul's bound.
pub const NODE_META_KEY_BYTES_MAX: usize = 128;
/// Longest value of node meta, in bytes: Consul's bound.
pub const NODE_META_VALUE_BYTES_MAX: usize = 512;
/// Shortest admin token, in bytes: below it, guessing is practical.
pub const ADMIN_TOKEN_BYTES_MIN: usize = 16;

/// Everything an agent needs to know before it starts. Complete and valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This node's name.
    pub node_name: NodeName,
    /// Its datacenter: 1 to 63 lower-case letters, digits, `-`, `_`.
    pub datacenter: String,
    /// Where it keeps its state.
    pub storage: Storage,
    /// Where the mesh's UDP port is bound.
    pub mesh_bind: SocketAddr,
    /// Where other nodes reach it: never an unspecified address.
    pub mesh_advertise: SocketAddr,
    /// Where the HTTP API listens, loopback unless a token is set; none: over TLS or at its socket alone.
    pub http_addr: Option<SocketAddr>,
    /// Where the shared HTTP port listens; none: it is off.
    pub shared_http_addr: Option<SocketAddr>,
    /// How names are answered by DNS; none: it is off.
    pub dns: Option<DnsConfig>,
    /// Where upstream ports are bound that name no address: always loopback.
    pub upstream_ip: IpAddr,
    /// Seeds: names, addresses, `host:port`. Retried until one answers.
    pub join: Vec<String>,
    /// How the node gets its identity.
    pub identity: IdentitySource,
    /// The trust domain that the identity must be of, if the operator named one.
    pub trust_domain: Option<TrustDomain>,
    /// Free key-value pairs that other nodes see.
    pub node_meta: BTreeMap<String, String>,
    /// Data-plane workers, 1 to [`WORKERS_MAX`].
    pub workers: NonZeroUsize,
    /// The API's token, as its digest; none: loopback clients need none.
    pub admin_token: Option<ApiToken>,
    /// Further tokens of the API, each with its right.
    pub api_tokens: Vec<ApiToken>,
    /// Where the API is served over TLS; none: it is not.
    pub https: Option<HttpsConfig>,
    /// The unix socket of the API; none: there is none.
    pub api_socket: Option<SocketConfig>,
    /// What is decided of calls that no intention is about: deny, and allow with `-dev`.
    pub default_policy: Action,
    /// Where this agent has the right to sign policy for clients of its API from.
    pub policy_authority: PolicyAuthority,
    /// Whether a termination signal leaves the mesh.
    pub on_terminate: OnTerminate,
    /// How long open streams may finish at a stop.
    pub drain_timeout: Duration,
    /// How long a failed member is remembered and called, [`RECONNECT_TIMEOUT_MIN`] at least.
    pub reconnect_timeout: Duration,
    /// Most bytes of keys and values that clients may write in the whole mesh; none: the key-value store is off.
    pub kv_bytes_max: Option<u64>,
    /// Where the SPIFFE Workload API listens; none: it is off.
    pub workload_api: Option<WorkloadConfig>,
    /// Where spans and metrics are exported; none: nowhere.
    pub otlp: Option<OtlpConfig>,
    /// Services from files, ids unique.
    pub services: Vec<ServiceDefinition>,
    /// Node-level checks from files, ids unique.
    pub checks: Vec<CheckDefinition>,
    /// Which checks may run programs.
    pub scripts: ScriptPolicy,
    /// What checks use of the host.
    pub check_settings: CheckSettings,
    /// Which events are logged.
    pub log_filter: Filter,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Settings without effect, and secrets in clear; the node logs them at its start.
    pub warnings: Vec<Warning>,
}

/// Where an agent keeps its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// In memory: gone at the end (`-dev`).
    Memory,
    /// In a directory of its own.
    Directory(PathBuf),
}

/// How a node gets its identity at its first start; later starts find it on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentitySource {
    /// A CA in memory, of this agent alone (`-dev`).
    Dev {
        /// Its trust domain.
        trust_domain: TrustDomain,
        /// What the node may serve.
        serve: ServeScope,
    },
    /// The node is an issuer and certifies itself.
    Issuer {
        /// Directory of the issuer's key and certificate.
        dir: PathBuf,
        /// What the node may serve.
        serve: ServeScope,
    },
    /// The node shows a join token to an issuer, through an address of `Config::join`.
    Token(Secret),
    /// The data directory holds the identity of an earlier start.
    Stored,
}

/// By whose right an agent signs policy for clients of its API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyAuthority {
    /// It signs nothing: operators sign on their own hosts.
    None,
    /// By that of the operator whose file this is (`weft ca operator create`).
    File(PathBuf),
    /// By that of the operator of its own CA in memory (`-dev`).
    Dev,
}

/// What a termination signal does beside draining.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTerminate {
    /// Says goodbye: the others see `left`.
    Leave,
    /// Says nothing: the others see `failed`, until it is back.
    Stay,
}

/// A text that never prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text: for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// Whether the agent is for trying things out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// State in a data directory, identity from a mesh CA.
    #[default]
    Durable,
    /// `-dev`: loopback, CA and state in memory, everything on.
    Dev,
}

/// Where the settings of one agent come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inputs {
    /// Whether `-dev` was given.
    pub mode: Mode,
    /// Files and directories, in the order in which they were named; of a directory `*.hcl` and `*.json` are read.
    pub paths: Vec<PathBuf>,
    /// Flags, in order.
    pub settings: Vec<Setting>,
}

/// Reads the files of `inputs`, adds its flags, fills in defaults and checks everything.
///
/// Reads files (config, token, admin token), looks nothing up and binds nothing.
///
/// # Errors
/// Every problem that was found.
pub fn load(inputs: &Inputs, host: &Host) -> Result<Config, ConfigError> {
    resolve::resolve(read(inputs), inputs.mode, host).map_err(located)
}

/// What [`validate`] found in files without a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validated {
    /// Settings without effect, and secrets in clear.
    pub warnings: Vec<Warning>,
    /// What an agent still needs, from flags or other files: empty if the inputs are a whole configuration.
    pub missing: Vec<Problem>,
}

/// Checks `inputs` as [`load`] does; what they leave out is no fault, so that parts (a file of services) can be checked.
///
/// # Errors
/// Every problem of what the inputs do say.
pub fn validate(inputs: &Inputs, host: &Host) -> Result<Validated, ConfigError> {
    resolve::validate(read(inputs), inputs.mode, host).map_err(located)
}

fn read(inputs: &Inputs) -> raw::Raw {
    let mut raw = raw::Raw::default();
    for path in &inputs.paths {
        let files = if path.is_dir() { list_directory(path) } else { Ok(vec![path.clone()]) };
        match files {
            Ok(files) => files.iter().for_each(|file| match read_document(file) {
                Ok(document) => raw.add_file(&document.path, document.root),
                Err(problems) => raw.problems.extend(problems),
            }),
            Err(problem) => raw.problems.push(problem),
        }
    }
    for setting in &inputs.settings {
        raw.add_setting(setting);
    }
    raw
}

/// Adds the lines of the files to the problems.
fn located(mut error: ConfigError) -> ConfigError {
    file::locate(&mut error.problems);
    error
}

impl Config {
    /// Returns the config of `weft agent -dev` for a node named `node` on the loopback address `ip`.
    ///
    /// The ports are the defaults; a test sets them to 0 in the fields.
    pub fn dev(node: NodeName, ip: IpAddr) -> Self {
        resolve::dev(node, ip)
    }
}

#[cfg(test)]
mod tests;

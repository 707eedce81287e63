//! The SPIFFE Workload API: apps of this host fetch their certificates and the roots by a unix socket, with any SPIFFE client.
//!
//! ```text
//!   app --unix socket, gRPC--> serve (who connects: SO_PEERCRED) -> rpc -> feed --+-- attest: whose services are its user's
//!                                             one message per change <-----------+-- wallet: a key for each service
//! ```
//!
//! Invariants: a caller gets the certificates of the services that name its user, and nobody gets the node's own; the keys
//! given out are not the proxy's; connections, streams and messages are bounded, per user too; a stream holds one message.
//! Not here: JWT-SVIDs (weft's identities are certificates: those methods answer `UNIMPLEMENTED`), federation.
//! Source: SPIFFE Workload API and SPIFFE Workload Endpoint, of which this is the `X.509-SVID` profile.

mod attest;
mod authority;
mod feed;
mod message;
mod metrics;
mod rpc;
mod serve;
mod socket;
mod wallet;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::metrics::Metrics;
use crate::pki::Identity;
use crate::registry::RegistryHandle;
use crate::supervise::Tasks;

use self::feed::Source;
pub use attest::META_USER;

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// The socket's path: absolute, at most [`SOCKET_PATH_BYTES_MAX`] bytes.
    pub socket: PathBuf,
    /// A group of this host whose members may connect; none: the agent's user and root alone.
    pub group: Option<String>,
}

/// Longest path of a unix socket, in bytes: `sun_path` has 108 with the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What the API needs of the agent.
pub struct WorkloadParams<'a> {
    /// Where it listens.
    pub config: WorkloadConfig,
    /// What is registered here, and for whom.
    pub registry: RegistryHandle,
    /// What mints certificates.
    pub identity: Arc<Identity>,
    /// Where its metrics go.
    pub metrics: &'a Metrics,
    /// Where its tasks run.
    pub tasks: &'a Tasks,
    /// Ends it: streams end with `UNAVAILABLE`, the socket's file is removed.
    pub stop: CancellationToken,
}

/// Why the API does not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The socket's path is in use.
    #[error("another process serves {}: give each agent a workload_api.socket of its own", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something stands in the way that is not removed.
    #[error("{} is {what}; nothing was removed: choose another workload_api.socket, or move it away", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// There is no such group.
    #[error("this host has no group `{0}`: correct workload_api.group, or make the group")]
    Group(String),
    /// The operating system refuses.
    #[error("cannot {action} the socket {}; its directory must exist and be the agent's to write", path.display())]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A metric of that name exists.
    #[error("cannot register the metrics of the Workload API")]
    Metrics(#[source] prometheus::Error),
}

/// The Workload API.
#[derive(Debug)]
pub struct WorkloadApi;

impl WorkloadApi {
    /// Opens the socket and serves it in `params.tasks`.
    ///
    /// Must be called inside a tokio runtime. A socket's file that nobody serves is taken over, if it is the agent's user's.
    ///
    /// # Errors
    /// [`WorkloadError`]; nothing is served then.
    pub fn start(params: WorkloadParams<'_>) -> Result<(), WorkloadError> {
        let WorkloadParams { config, registry, identity, metrics, tasks, stop } = params;
        let meter = metrics::Meter::new(metrics).map_err(WorkloadError::Metrics)?;
        let listening = socket::bind(&config)?;
        info!(socket = %config.socket.display(), group = config.group, "the SPIFFE Workload API is up");
        let source = Arc::new(Source::new(registry.subscribe(), identity, stop));
        tasks.spawn("workload-api", serve::run(listening, source, meter, tasks.clone()));
        Ok(())
    }
}

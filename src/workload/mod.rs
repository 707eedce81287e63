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
mod wallet;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::metrics::Metrics;
use crate::pki::Identity;
use crate::registry::RegistryHandle;
use crate::supervise::Tasks;
use crate::unix_socket::{self, SocketConfig, SocketError};

use self::feed::Source;
pub use attest::META_USER;

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// The socket's path: absolute, at most [`unix_socket::SOCKET_PATH_BYTES_MAX`] bytes.
    pub socket: PathBuf,
    /// A group of this host whose members may connect; none: the agent's user and root alone.
    pub group: Option<String>,
}

impl WorkloadConfig {
    fn socket(&self) -> SocketConfig {
        SocketConfig { path: self.socket.clone(), group: self.group.clone(), key: "workload_api.socket" }
    }
}

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
    /// The socket cannot be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
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
        let listening = unix_socket::bind(&config.socket())?;
        info!(socket = %config.socket.display(), group = config.group, "the SPIFFE Workload API is up");
        let source = Arc::new(Source::new(registry.subscribe(), identity, stop));
        tasks.spawn("workload-api", serve::run(listening, source, meter, tasks.clone()));
        Ok(())
    }
}

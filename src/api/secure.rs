//! HTTPS: with the node's own identity, or with a certificate that the operator gives.
//!
//! The node's own has its SPIFFE ID and no DNS name: clients check it as SPIFFE says, under the mesh's root. For clients that
//! check names there are files.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::ApiError;
use crate::pki::Identity;

/// What the agent says it speaks.
const ALPN: &[u8] = b"http/1.1";

/// Where the API is served over TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpsConfig {
    /// Where it listens.
    pub addr: SocketAddr,
    /// As whom.
    pub certificate: Certificate,
}

/// The certificate that clients see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificate {
    /// The node's own, always the current one.
    Own,
    /// From files in PEM: the chain, its leaf first, and the key. Read at the start.
    Files {
        /// The chain.
        chain: PathBuf,
        /// The key.
        key: PathBuf,
    },
}

/// Makes the server side of TLS.
///
/// # Errors
/// [`ApiError::Certificate`] if a file cannot be read or the key is not the certificate's.
pub(super) fn server(certificate: &Certificate, identity: &Arc<Identity>) -> Result<Arc<ServerConfig>, ApiError> {
    match certificate {
        Certificate::Own => identity.server_config_public(ALPN).map_err(|error| ApiError::Certificate {
            path: PathBuf::from("the node's own identity"),
            reason: crate::telemetry::Chain(&error).to_string(),
        }),
        Certificate::Files { chain, key } => from_files(chain, key),
    }
}

fn from_files(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, ApiError> {
    let failed = |path: &Path, reason: String| ApiError::Certificate { path: path.to_owned(), reason };
    let read = CertificateDer::pem_file_iter(chain).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| failed(chain, error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed(chain, "it holds no certificate in PEM".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| failed(chain, error.to_string()))?.with_no_client_auth();
    let mut config = builder.with_single_cert(certificates, private).map_err(|error| failed(key, error.to_string()))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

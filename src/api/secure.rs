//! HTTPS: with the node's own identity, or with a certificate that the operator gives.
//!
//! The node's own has its SPIFFE ID and no DNS name: clients check it as SPIFFE says, under the mesh's root. For clients that
//! check names there are files, which a reload reads again: certificates end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

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
    /// From files in PEM: the chain, its leaf first, and the key. Read at the start and at each reload.
    Files {
        /// The chain.
        chain: PathBuf,
        /// The key.
        key: PathBuf,
    },
}

/// A certificate of files: connections see what was read last.
#[derive(Debug)]
pub struct FileCertificate {
    chain: PathBuf,
    key: PathBuf,
    shown: ArcSwap<CertifiedKey>,
}

impl FileCertificate {
    fn load(chain: &Path, key: &Path) -> Result<Self, ApiError> {
        let shown = ArcSwap::new(read(chain, key)?);
        Ok(Self { chain: chain.to_owned(), key: key.to_owned(), shown })
    }

    /// Reads the files again; what is shown stays as it is until [`show`](Self::show).
    ///
    /// # Errors
    /// [`ApiError::Certificate`] if a file cannot be read or the key is not the certificate's.
    pub fn read(&self) -> Result<Arc<CertifiedKey>, ApiError> {
        read(&self.chain, &self.key)
    }

    /// Shows `fresh` to the connections that come; returns whether it is another certificate than before.
    pub fn show(&self, fresh: Arc<CertifiedKey>) -> bool {
        let is_other = self.shown.load().cert != fresh.cert;
        self.shown.store(fresh);
        is_other
    }
}

impl ResolvesServerCert for FileCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.shown.load_full())
    }
}

/// The server side of TLS, and its files if it has any.
pub(super) type Secured = (Arc<ServerConfig>, Option<Arc<FileCertificate>>);

/// Makes the server side of TLS.
///
/// # Errors
/// As [`FileCertificate::read`].
pub(super) fn server(certificate: &Certificate, identity: &Arc<Identity>) -> Result<Secured, ApiError> {
    match certificate {
        Certificate::Own => {
            let own = identity.server_config_public(ALPN).map_err(|error| ApiError::Certificate {
                path: PathBuf::from("the node's own identity"),
                reason: crate::telemetry::Chain(&error).to_string(),
            })?;
            Ok((own, None))
        }
        Certificate::Files { chain, key } => {
            let files = Arc::new(FileCertificate::load(chain, key)?);
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| failed(chain, error.to_string()))?.with_no_client_auth();
            let shown: Arc<dyn ResolvesServerCert> = Arc::<FileCertificate>::clone(&files);
            let mut config = builder.with_cert_resolver(shown);
            config.alpn_protocols = vec![ALPN.to_vec()];
            Ok((Arc::new(config), Some(files)))
        }
    }
}

fn failed(path: &Path, reason: String) -> ApiError {
    ApiError::Certificate { path: path.to_owned(), reason }
}

fn read(chain: &Path, key: &Path) -> Result<Arc<CertifiedKey>, ApiError> {
    let read = CertificateDer::pem_file_iter(chain).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| failed(chain, error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed(chain, "it holds no certificate in PEM".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, error.to_string()))?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let certified = CertifiedKey::from_der(certificates, private, &provider);
    certified.map(Arc::new).map_err(|error| failed(key, error.to_string()))
}

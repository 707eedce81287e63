//! HTTPS: with the node's own identity, or with a certificate that the operator gives.
//!
//! The node's own has its SPIFFE ID and no DNS name: clients check it as SPIFFE says, under the mesh's root. For clients that
//! check names there are files, which a reload reads again: certificates end. A client's certificate is asked for where the
//! operator names the CA that it must lead to; it opens the door and stands for no token.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};

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
    /// PEM file of the CA whose clients alone are let in; none: clients need no certificate.
    pub client_ca: Option<PathBuf>,
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

/// What HTTPS has of files, as connections see it: the certificate, and whose clients are let in. Read at the start and at each
/// reload.
#[derive(Debug)]
pub struct HttpsFiles {
    certificate: Option<Arc<FileCertificate>>,
    clients: Option<Arc<Clients>>,
}

/// What [`HttpsFiles::read`] found in the files.
#[derive(Debug)]
pub struct FreshFiles {
    certificate: Option<Arc<CertifiedKey>>,
    clients: Option<Believed>,
}

impl HttpsFiles {
    /// Reads the files again; what is in force stays as it is until [`show`](Self::show).
    ///
    /// # Errors
    /// [`ApiError::Certificate`] if a file cannot be read or the key is not the certificate's, [`ApiError::ClientCa`] if the
    /// clients' CA cannot be used.
    pub fn read(&self) -> Result<FreshFiles, ApiError> {
        let certificate = self.certificate.as_ref().map(|files| read(&files.chain, &files.key)).transpose()?;
        let clients = self.clients.as_ref().map(|clients| Believed::read(&clients.ca)).transpose()?;
        Ok(FreshFiles { certificate, clients })
    }

    /// Takes `fresh` for the connections that come; returns whether it is other than before.
    pub fn show(&self, fresh: FreshFiles) -> bool {
        let mut is_other = false;
        if let (Some(files), Some(fresh)) = (&self.certificate, fresh.certificate) {
            is_other |= files.shown.load().cert != fresh.cert;
            files.shown.store(fresh);
        }
        if let (Some(clients), Some(fresh)) = (&self.clients, fresh.clients) {
            is_other |= clients.believed.load().certificates != fresh.certificates;
            clients.believed.store(Arc::new(fresh));
        }
        is_other
    }
}

/// A certificate of files.
#[derive(Debug)]
struct FileCertificate {
    chain: PathBuf,
    key: PathBuf,
    shown: ArcSwap<CertifiedKey>,
}

impl ResolvesServerCert for FileCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.shown.load_full())
    }
}

/// Lets in clients that show a certificate of a CA, which is in a file.
#[derive(Debug)]
struct Clients {
    ca: PathBuf,
    believed: ArcSwap<Believed>,
}

/// Certificates of a CA, and what checks clients by them.
#[derive(Debug)]
struct Believed {
    certificates: Vec<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Believed {
    fn read(ca: &Path) -> Result<Self, ApiError> {
        let unusable = |reason: String| ApiError::ClientCa { path: ca.to_owned(), reason };
        let certificates = read_certificates(ca).map_err(unusable)?;
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| unusable(error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        Ok(Self { certificates, verifier: verifier.map_err(|error| unusable(error.to_string()))? })
    }
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hint is any: the CA may be another one after a reload.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.believed.load().verifier.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.believed.load().verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.believed.load().verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.believed.load().verifier.supported_verify_schemes()
    }
}

/// The server side of TLS, and its files if it has any.
pub(super) type Secured = (Arc<ServerConfig>, Option<Arc<HttpsFiles>>);

/// Makes the server side of TLS.
///
/// # Errors
/// As [`HttpsFiles::read`].
pub(super) fn server(https: &HttpsConfig, identity: &Arc<Identity>) -> Result<Secured, ApiError> {
    let clients = match &https.client_ca {
        Some(ca) => Some(Arc::new(Clients { ca: ca.clone(), believed: ArcSwap::from_pointee(Believed::read(ca)?) })),
        None => None,
    };
    let verifier = clients.clone().map(|clients| -> Arc<dyn ClientCertVerifier> { clients });
    let (config, certificate) = match &https.certificate {
        Certificate::Own => {
            let own = identity.server_config_public(ALPN, verifier).map_err(|error| ApiError::Certificate {
                path: PathBuf::from("the node's own identity"),
                reason: crate::telemetry::Chain(&error).to_string(),
            })?;
            (own, None)
        }
        Certificate::Files { chain, key } => {
            let shown = ArcSwap::new(read(chain, key)?);
            let files = Arc::new(FileCertificate { chain: chain.clone(), key: key.clone(), shown });
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| failed(chain, error.to_string()))?;
            let shown: Arc<dyn ResolvesServerCert> = Arc::<FileCertificate>::clone(&files);
            let mut config = match verifier {
                None => builder.with_no_client_auth().with_cert_resolver(shown),
                Some(verifier) => {
                    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(shown);
                    // Who resumes a session is not checked anew.
                    config.session_storage = Arc::new(NoServerSessionStorage {});
                    config.send_tls13_tickets = 0;
                    config
                }
            };
            config.alpn_protocols = vec![ALPN.to_vec()];
            (Arc::new(config), Some(files))
        }
    };
    let files = HttpsFiles { certificate, clients };
    let has_files = files.certificate.is_some() || files.clients.is_some();
    Ok((config, has_files.then(|| Arc::new(files))))
}

fn failed(path: &Path, reason: String) -> ApiError {
    ApiError::Certificate { path: path.to_owned(), reason }
}

fn read(chain: &Path, key: &Path) -> Result<Arc<CertifiedKey>, ApiError> {
    let certificates = read_certificates(chain).map_err(|reason| failed(chain, reason))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, error.to_string()))?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let certified = CertifiedKey::from_der(certificates, private, &provider);
    certified.map(Arc::new).map_err(|error| failed(key, error.to_string()))
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err("it holds no certificate in PEM".to_owned()),
        read => read.map_err(|error| error.to_string()),
    }
}

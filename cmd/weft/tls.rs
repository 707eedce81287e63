//! TLS to an agent's HTTPS port: the certificate is checked by its DNS name or address, or, for a node's own, by its SPIFFE ID.
//!
//! A node's certificate has its SPIFFE ID and no DNS name (api/openapi.yaml), so the ID must be named: any node of the mesh has a
//! certificate that leads to the mesh's root, and the command line wants to talk to one of them and not to any.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webpki::{EndEntityCert, KeyUsage};
use weft::pki::ServerCheck;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

/// The host's CA certificates, where Debian and its kin keep them.
const HOST_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// What a SPIFFE ID begins with.
const SPIFFE: &str = "spiffe://";

/// Whom the command line believes, and who it is itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trust {
    /// PEM file of the CA certificates that an agent's must lead to. Default: the host's.
    pub(crate) roots: Option<PathBuf>,
    /// The name that an agent's certificate must have. Default: the host.
    pub(crate) name: Option<String>,
    /// PEM files of the certificate and the key that an agent is shown where it asks.
    pub(crate) own: Option<(PathBuf, PathBuf)>,
}

/// Shakes hands over `stream` with the agent at `host`.
///
/// # Errors
/// Unreadable files, a name that is none, a certificate that is not believed.
pub(crate) async fn shake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    host: &str,
    trust: &Trust,
) -> anyhow::Result<TlsStream<S>> {
    let roots = Arc::new(read(trust.roots.as_deref().unwrap_or(Path::new(HOST_ROOTS)))?);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let (verifier, asked): (Arc<dyn ServerCertVerifier>, &str) = match trust.name.as_deref() {
        Some(id) if id.starts_with(SPIFFE) => {
            let by_id = ById { roots, id: id.to_owned(), provider: Arc::clone(&provider) };
            let check = move |leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>], now| {
                by_id.check(leaf, others, now).map_err(refusal)
            };
            (Arc::new(ServerCheck::new(provider, check)), host)
        }
        name => (WebPkiServerVerifier::builder_with_provider(roots, provider).build()?, name.unwrap_or(host)),
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let config = match &trust.own {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let shown = chain.display();
            let read = CertificateDer::pem_file_iter(chain).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            let chain = read.with_context(|| format!("cannot read the certificate in {shown}"))?;
            let private = PrivateKeyDer::from_pem_file(key);
            let private = private.with_context(|| format!("cannot read the key in {}", key.display()))?;
            builder.with_client_auth_cert(chain, private).with_context(|| format!("cannot show {shown}"))?
        }
    };
    let asked = ServerName::try_from(asked.to_owned()).with_context(|| format!("`{asked}` is no name of a server"))?;
    Ok(TlsConnector::from(Arc::new(config)).connect(asked, stream).await?)
}

fn read(file: &Path) -> anyhow::Result<RootCertStore> {
    let shown = file.display();
    let certificates = CertificateDer::pem_file_iter(file).with_context(|| format!("cannot read {shown}"))?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.with_context(|| format!("{shown} is no PEM file of certificates"))?)?;
    }
    if roots.is_empty() {
        bail!("{shown} holds no certificate");
    }
    Ok(roots)
}

fn refusal(error: anyhow::Error) -> rustls::Error {
    let error = Arc::<dyn std::error::Error + Send + Sync>::from(error.into_boxed_dyn_error());
    rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(error)))
}

/// Believes a chain to `roots` whose leaf has `id` as its URI name.
struct ById {
    roots: Arc<RootCertStore>,
    id: String,
    provider: Arc<CryptoProvider>,
}

impl ById {
    fn check(&self, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>], now: UnixTime) -> anyhow::Result<()> {
        let parsed = EndEntityCert::try_from(leaf).map_err(|error| anyhow!("{error}"))?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let usage = KeyUsage::server_auth();
        let path = parsed.verify_for_usage(algorithms, &self.roots.roots, others, now, usage, None, None);
        path.map_err(|error| anyhow!("{error}"))?;
        let (_, leaf) = X509Certificate::from_der(leaf)?;
        let names = leaf.subject_alternative_name()?.map(|extension| extension.value.general_names.as_slice());
        let mut uris = names.unwrap_or_default().iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let shown = uris.next().unwrap_or("no SPIFFE ID");
        if shown != self.id {
            bail!("it is of {shown}, not of {}", self.id);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
    use rustls::ServerConfig;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const ID: &str = "spiffe://t.test/node/n1";

    /// A CA's certificate in a file, and a server that has the address 127.0.0.1 and, if wanted, the SPIFFE ID alone.
    fn rig(san: SanType) -> (tempfile::TempDir, TlsAcceptor) {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = ca.self_signed(&ca_key).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), root.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![san];
        let leaf = params.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)
            .unwrap();
        (dir, TlsAcceptor::from(Arc::new(config)))
    }

    fn believing(dir: &tempfile::TempDir, name: Option<&str>) -> Trust {
        Trust { roots: Some(dir.path().join("ca.pem")), name: name.map(ToOwned::to_owned), own: None }
    }

    #[tokio::test]
    async fn a_server_is_believed_by_its_address_or_by_the_id_that_was_named_and_by_nothing_else() {
        let address = SanType::IpAddress("127.0.0.1".parse().unwrap());
        let id = SanType::URI(ID.try_into().unwrap());
        for (san, name, want) in [
            (address.clone(), None, Ok(())),
            (address.clone(), Some("other.test"), Err("NotValidForName")),
            (address, Some(ID), Err("no SPIFFE ID")),
            (id.clone(), Some(ID), Ok(())),
            (id.clone(), Some("spiffe://t.test/node/n2"), Err(ID)),
            (id, None, Err("NotValidForName")),
        ] {
            let (dir, acceptor) = rig(san);
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let trust = believing(&dir, name);
            let (shaken, _accepted) = tokio::join!(shake(ours, "127.0.0.1", &trust), acceptor.accept(theirs));
            match (shaken, want) {
                (Ok(_), Ok(())) => {}
                (Err(error), Err(part)) => {
                    let text = format!("{error:?}");
                    let text = text.replace("not valid for name", "NotValidForName");
                    assert!(text.contains(part), "{name:?}: {text}");
                }
                (shaken, want) => panic!("{name:?}: wanted {want:?}, got {:?}", shaken.map(drop)),
            }
        }
        // Another root's certificate is nobody's.
        let (dir, _) = rig(SanType::URI(ID.try_into().unwrap()));
        let (_other, acceptor) = rig(SanType::URI(ID.try_into().unwrap()));
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let trust = believing(&dir, Some(ID));
        let (shaken, _accepted) = tokio::join!(shake(ours, "127.0.0.1", &trust), acceptor.accept(theirs));
        // The two roots have one name: it is the signature that does not fit.
        let text = format!("{:?}", shaken.unwrap_err());
        assert!(text.contains("InvalidSignature") || text.contains("UnknownIssuer"), "{text}");
    }
}

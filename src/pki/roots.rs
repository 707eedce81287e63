//! The certificates of CAs that this host believes, for servers outside the mesh.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tracing::warn;

/// Where systems keep the certificates of the CAs that they believe.
const HOST_ROOTS: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Reads whom the host believes, and those of `ca_file` (PEM) beside. Blocks on the disk.
///
/// # Errors
/// If `ca_file` cannot be used; what of the host's cannot be read is logged.
pub(crate) fn host_roots(ca_file: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for path in HOST_ROOTS {
        let Ok(found) = CertificateDer::pem_file_iter(path) else { continue };
        let (_believed, ignored) = roots.add_parsable_certificates(found.filter_map(Result::ok));
        if ignored > 0 {
            warn!(path, ignored, "certificates of the host cannot be read");
        }
        break;
    }
    if let Some(path) = ca_file {
        let refuse = |why: String| format!("CA file {} cannot be used: {why}", path.display());
        let found = CertificateDer::pem_file_iter(path).map_err(|error| refuse(error.to_string()))?;
        let mut count = 0;
        for certificate in found {
            let certificate = certificate.map_err(|error| refuse(error.to_string()))?;
            roots.add(certificate).map_err(|error| refuse(error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(refuse("it holds no certificate in PEM".to_owned()));
        }
    }
    Ok(roots)
}

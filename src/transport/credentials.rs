//! What the endpoints need of an identity: a seam, so that tests bring throw-away certificates.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use super::error::Chain;
use super::live::{LiveConnections, LiveEntry};
use crate::clock::{self, UnixSeconds};
use crate::model::{NodeName, ServiceName};
use crate::pki::{self, Identity, PeerIdentity, Plane, Presented};

/// The dialing side of TLS and how long its certificate lasts.
#[derive(Debug, Clone)]
pub(crate) struct ClientTls {
    /// Shows the certificate, checks the server's.
    pub(crate) config: Arc<rustls::ClientConfig>,
    /// End of the certificate shown.
    pub(crate) not_after: UnixSeconds,
}

/// Certificates and their verification, for either side of a connection.
pub(crate) trait Credentials: fmt::Debug + Send + Sync {
    /// Makes the accepting side of `plane`.
    fn server(&self, plane: Plane) -> Result<Arc<rustls::ServerConfig>, String>;

    /// Makes the dialing side of `plane`, which speaks as `source`, or as the node where that is none.
    fn client(&self, plane: Plane, source: Option<&ServiceName>, expect: Option<NodeName>)
    -> Result<ClientTls, String>;

    /// Tells who showed `chain`, leaf first, and what is to be remembered of it; nothing where nothing is ever revoked.
    fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<(PeerIdentity, Option<Presented>), String>;

    /// Looks again whether what was shown is revoked.
    fn recheck(&self, _shown: &Presented) -> Result<(), String> {
        Ok(())
    }
}

/// The node's own identity as the endpoints use it.
#[derive(Debug)]
pub(crate) struct NodeCredentials(pub(crate) Arc<Identity>);

impl Credentials for NodeCredentials {
    fn server(&self, plane: Plane) -> Result<Arc<rustls::ServerConfig>, String> {
        self.0.server_config(plane).map_err(|error| Chain(&error).to_string())
    }

    fn client(
        &self,
        plane: Plane,
        source: Option<&ServiceName>,
        expect: Option<NodeName>,
    ) -> Result<ClientTls, String> {
        let svid = match source {
            Some(service) => self.0.service_svid(service, clock::wall()).map_err(|error| Chain(&error).to_string())?,
            None => self.0.node_svid(),
        };
        let config = self.0.client_config(plane, &svid, expect).map_err(|error| Chain(&error).to_string())?;
        Ok(ClientTls { config, not_after: svid.not_after })
    }

    fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<(PeerIdentity, Option<Presented>), String> {
        let verified = pki::verify_presented(chain, &self.0.bundle(), clock::wall());
        let (peer, shown) = verified.map_err(|error| Chain(&error).to_string())?;
        Ok((peer, Some(shown)))
    }

    fn recheck(&self, shown: &Presented) -> Result<(), String> {
        self.0.bundle().revoked.check(shown).map_err(|error| error.to_string())
    }
}

/// Tells who the peer of `connection` is, and remembers the connection in `live` while the entry lives.
///
/// # Errors
/// If it showed no certificate, or one that does not verify.
pub(crate) fn peer_of(
    credentials: &dyn Credentials,
    live: &LiveConnections,
    connection: &quinn::Connection,
) -> Result<(PeerIdentity, Option<LiveEntry>), String> {
    let shown = connection.peer_identity().ok_or("the peer showed no certificate")?;
    let chain = shown.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| "the peer showed no X.509 chain")?;
    let (peer, shown) = credentials.verify(&chain)?;
    let Some(shown) = shown else { return Ok((peer, None)) };
    let entry = live.add(connection.clone(), shown.clone());
    // What was revoked since the check above is seen here; what is revoked from here on, by `live`.
    credentials.recheck(&shown)?;
    Ok((peer, Some(entry)))
}

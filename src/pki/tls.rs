//! rustls: TLS 1.3 only, weft's verifier on both sides, no session resumption, no 0-RTT.
//!
//! ```text
//!   server: resolver shows the node's current leaf (join: with the root)    client: shows one SVID
//!           ClientVerifier -> verify::check_peer                            ServerVerifier -> verify::check_peer + expect
//! ```
//!
//! Not here: connections and their limits (`transport`), the join exchange (`join`).

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig, SignatureScheme,
};

use super::certificate::root_digest;
use super::verify::{self, VerifyError};
use super::{Identity, PkiError, Plane, Svid, TrustBundle};
use crate::clock::{self, UnixSeconds};
use crate::model::{NodeName, SpiffeId, TrustDomain};

/// The data plane.
pub const ALPN_TUNNEL: &[u8] = b"weft-tunnel/1";
/// Membership and replication.
pub const ALPN_GOSSIP: &[u8] = b"weft-gossip/1";
/// Joining and renewal.
pub const ALPN_JOIN: &[u8] = b"weft-join/1";

impl Plane {
    /// The plane's ALPN.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Tunnel => ALPN_TUNNEL,
            Self::Gossip => ALPN_GOSSIP,
            Self::Join => ALPN_JOIN,
        }
    }

    /// The plane of an ALPN.
    pub fn from_alpn(alpn: &[u8]) -> Option<Self> {
        [Self::Tunnel, Self::Gossip, Self::Join].into_iter().find(|plane| plane.alpn() == alpn)
    }
}

/// A verifier's refusal inside a rustls error: rustls and quinn print errors by `Debug`, so that shows the whole text.
struct Refusal(VerifyError);

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for Refusal {}

fn refusal(err: VerifyError) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Refusal(err)))))
}

#[derive(Debug)]
struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(clock::wall().0)))
    }
}

/// AES-128-GCM first: ChaCha20 halves bulk throughput, AES-256 buys nothing here.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let cipher_suites = vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
    };
    Arc::clone(PROVIDER.get_or_init(make))
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

fn whole(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Vec<CertificateDer<'static>> {
    let bound = verify::CHAIN_CERTIFICATES_MAX;
    // One more than is accepted, so that a longer chain is refused for its length.
    std::iter::once(end_entity).chain(intermediates.iter().take(bound)).map(|der| der.clone().into_owned()).collect()
}

macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("weft speaks TLS 1.3 only".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    };
}

/// Whether a client may come without a certificate: a newcomer has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientAuth {
    Required,
    Optional,
}

#[derive(Debug)]
struct ClientVerifier {
    identity: Arc<Identity>,
    auth: ClientAuth,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.auth == ClientAuth::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = whole(end_entity, intermediates);
        let bundle = self.identity.bundle();
        verify::check_peer(&chain, &bundle, UnixSeconds(now.as_secs())).map_err(refusal)?;
        Ok(ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

#[derive(Debug)]
struct ServerVerifier {
    identity: Arc<Identity>,
    expect: Option<NodeName>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = whole(end_entity, intermediates);
        let bundle = self.identity.bundle();
        let peer = verify::check_peer(&chain, &bundle, UnixSeconds(now.as_secs())).map_err(refusal)?;
        let is_expected = self.expect.as_ref().is_none_or(|expect| *expect == peer.node);
        // A server speaks as a node: a service's SVID proves less than a server claims.
        if !is_expected || !matches!(peer.id, SpiffeId::Node { .. }) {
            let expected = self.expect.as_ref().map_or_else(|| "any node".to_owned(), |node| format!("node {node}"));
            return Err(refusal(VerifyError::Unexpected { expected, found: peer.id.to_string() }));
        }
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

/// What a newcomer or a renewing node believes.
#[derive(Debug, Clone)]
enum Pin {
    /// A root by its SHA-256, for one trust domain.
    Root([u8; 32], TrustDomain),
    Bundle(TrustBundle),
}

/// Checks a seed on the join plane and keeps what it found.
///
/// Where only the time is wrong the handshake passes, with the doubt noted: the caller then asks for the seed's clock,
/// tells it nothing, and reports both clocks. Where the root is unknown it passes too: the caller asks for the links that
/// lead to it from a root that is known, and tells it nothing before they do.
#[derive(Debug)]
pub(crate) struct JoinVerifier {
    pin: Pin,
    now: UnixSeconds,
    refused: OnceLock<VerifyError>,
    doubt: OnceLock<VerifyError>,
    bundle: OnceLock<TrustBundle>,
    stranger: OnceLock<(Vec<CertificateDer<'static>>, VerifyError)>,
}

impl JoinVerifier {
    /// Accepts the root with this SHA-256, for nodes of `domain`: a newcomer. One root may stand above several meshes.
    pub(crate) fn pinning(root_digest: [u8; 32], domain: TrustDomain, now: UnixSeconds) -> Arc<Self> {
        Self::new(Pin::Root(root_digest, domain), now)
    }

    /// Accepts the roots of a bundle: a renewal.
    pub(crate) fn trusting(bundle: TrustBundle, now: UnixSeconds) -> Arc<Self> {
        Self::new(Pin::Bundle(bundle), now)
    }

    fn new(pin: Pin, now: UnixSeconds) -> Arc<Self> {
        let (refused, doubt, bundle, stranger) = Default::default();
        Arc::new(Self { pin, now, refused, doubt, bundle, stranger })
    }

    /// Why the seed was refused.
    pub(crate) fn refused(&self) -> Option<&VerifyError> {
        self.refused.get()
    }

    /// What is wrong with the time of the seed's chain.
    pub(crate) fn doubt(&self) -> Option<&VerifyError> {
        self.doubt.get()
    }

    /// Why the seed's root is unknown here; it may have followed one that is known.
    pub(crate) fn stranger(&self) -> Option<&VerifyError> {
        self.stranger.get().map(|(_, error)| error)
    }

    /// Checks the stranger's chain against the roots that a walk has led to.
    pub(crate) fn check_walked(&self, walked: &TrustBundle) -> Result<(), VerifyError> {
        match self.stranger.get() {
            Some((chain, _)) => self.check_by(chain, walked.clone()),
            None => Ok(()),
        }
    }

    /// The verified roots.
    pub(crate) fn bundle(&self) -> Option<&TrustBundle> {
        self.bundle.get()
    }

    /// rustls client side for the join plane.
    pub(crate) fn client_config(self: &Arc<Self>) -> Result<ClientConfig, PkiError> {
        let verifier: Arc<Self> = Arc::clone(self);
        let mut config = ClientConfig::builder_with_details(provider(), Arc::new(Clock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        finish_client(&mut config, Plane::Join);
        Ok(config)
    }

    fn check(&self, chain: &[CertificateDer<'_>]) -> Result<(), VerifyError> {
        let bundle = match &self.pin {
            Pin::Bundle(bundle) => bundle.clone(),
            Pin::Root(digest, domain) => {
                let bounded = chain.iter().take(verify::CHAIN_CERTIFICATES_MAX);
                let root = bounded.into_iter().find(|der| root_digest(der) == *digest);
                verify::bundle_of(root.ok_or(VerifyError::WrongRoot)?, domain)?
            }
        };
        self.check_by(chain, bundle)
    }

    fn check_by(&self, chain: &[CertificateDer<'_>], bundle: TrustBundle) -> Result<(), VerifyError> {
        // The last of four is the root, which the bundle holds or does not.
        let shown = match chain {
            [leaf, node, issuer, _root] => vec![leaf.clone(), node.clone(), issuer.clone()],
            other => other.to_vec(),
        };
        let peer = match verify::check_peer(&shown, &bundle, self.now) {
            Err(doubt @ (VerifyError::NotYetValid { .. } | VerifyError::Expired { .. })) => {
                let at = shown
                    .iter()
                    .try_fold(UnixSeconds(0), |at, der| verify::validity_of(der).map(|(from, _)| at.max(from)))?;
                let peer = verify::check_peer(&shown, &bundle, at)?;
                let _first = self.doubt.set(doubt);
                peer
            }
            checked => checked?,
        };
        if !matches!(peer.id, SpiffeId::Node { .. }) {
            return Err(VerifyError::Unexpected { expected: "any node".to_owned(), found: peer.id.to_string() });
        }
        let _first = self.bundle.set(bundle);
        Ok(())
    }
}

impl ServerCertVerifier for JoinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = whole(end_entity, intermediates);
        match self.check(&chain) {
            Ok(()) => {}
            // The mesh may have another root by now: the seed is asked to prove it, and told nothing before.
            Err(error @ (VerifyError::WrongRoot | VerifyError::Path { .. }))
                if chain.len() <= verify::CHAIN_CERTIFICATES_MAX =>
            {
                let _first = self.stranger.set((chain, error));
            }
            Err(error) => {
                let _first = self.refused.set(error.clone());
                return Err(refusal(error));
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

fn certified_key(chain: Vec<CertificateDer<'static>>, svid: &Svid) -> Result<Arc<CertifiedKey>, PkiError> {
    let key = provider().key_provider.load_private_key(svid.key.clone_key()).map_err(PkiError::Tls)?;
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}

/// The node's certificate, for peers and for newcomers.
#[derive(Debug)]
pub(super) struct NodeCertificates {
    peers: Arc<CertifiedKey>,
    newcomers: Arc<CertifiedKey>,
}

impl NodeCertificates {
    pub(super) fn new(svid: &Svid, root: Option<&CertificateDer<'static>>) -> Result<Self, PkiError> {
        let mut with_root = svid.chain.clone();
        with_root.extend(root.cloned());
        Ok(Self { peers: certified_key(svid.chain.clone(), svid)?, newcomers: certified_key(with_root, svid)? })
    }
}

#[derive(Debug)]
struct Resolver(Arc<Identity>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificates = self.0.certified(clock::wall());
        let is_newcomer = hello.alpn().is_some_and(|mut offered| offered.any(|alpn| alpn == ALPN_JOIN));
        Some(Arc::clone(if is_newcomer { &certificates.newcomers } else { &certificates.peers }))
    }
}

fn finish_client(config: &mut ClientConfig, plane: Plane) {
    config.alpn_protocols = vec![plane.alpn().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
}

impl Identity {
    /// rustls server side for one plane: node SVID by a resolver that always hands out the current one; client
    /// certificates required and checked by `verify_peer` (Join: none asked, and the root is appended to the chain).
    pub fn server_config(self: &Arc<Self>, plane: Plane) -> Result<Arc<ServerConfig>, PkiError> {
        match plane {
            Plane::Join => self.server(&[ALPN_JOIN], None),
            Plane::Tunnel | Plane::Gossip => self.server(&[plane.alpn()], Some(self.peers(ClientAuth::Required))),
        }
    }

    /// rustls server side of the control socket: gossip and join, told apart by ALPN.
    ///
    /// A client certificate is asked for and checked where it is shown, but not required: the caller refuses a gossip
    /// connection for which [`Identity::peer_of`] finds no peer.
    pub fn server_config_control(self: &Arc<Self>) -> Result<Arc<ServerConfig>, PkiError> {
        self.server(&[ALPN_GOSSIP, ALPN_JOIN], Some(self.peers(ClientAuth::Optional)))
    }

    /// rustls server side for clients that are not of the mesh: the node's SVID, always the current one. `clients` checks the
    /// certificates that they show; none: they show none.
    pub fn server_config_public(
        self: &Arc<Self>,
        alpn: &[u8],
        clients: Option<Arc<dyn ClientCertVerifier>>,
    ) -> Result<Arc<ServerConfig>, PkiError> {
        self.server(&[alpn], clients)
    }

    fn peers(self: &Arc<Self>, auth: ClientAuth) -> Arc<dyn ClientCertVerifier> {
        Arc::new(ClientVerifier { identity: Arc::clone(self), auth })
    }

    fn server(
        self: &Arc<Self>,
        alpns: &[&[u8]],
        clients: Option<Arc<dyn ClientCertVerifier>>,
    ) -> Result<Arc<ServerConfig>, PkiError> {
        let builder = ServerConfig::builder_with_details(provider(), Arc::new(Clock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => builder.with_client_cert_verifier(clients),
        };
        let mut config = builder.with_cert_resolver(Arc::new(Resolver(Arc::clone(self))));
        config.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Arc::new(config))
    }

    /// rustls client side: shows `svid`, accepts only a server whose verified node is `expect` (None: any node of the domain).
    pub fn client_config(
        self: &Arc<Self>,
        plane: Plane,
        svid: &Svid,
        expect: Option<NodeName>,
    ) -> Result<Arc<ClientConfig>, PkiError> {
        let verifier = Arc::new(ServerVerifier { identity: Arc::clone(self), expect });
        let mut config = ClientConfig::builder_with_details(provider(), Arc::new(Clock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(svid.chain.clone(), svid.key.clone_key())
            .map_err(PkiError::Tls)?;
        finish_client(&mut config, plane);
        Ok(Arc::new(config))
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;

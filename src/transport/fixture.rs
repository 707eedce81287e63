//! Connections for tests of what goes over one: two endpoints on loopback, without the mesh's identities.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::Ipv4Addr;
use std::sync::Arc;

use quinn::{ClientConfig, Connection, Endpoint, ServerConfig, TransportConfig};

/// Both ends of one connection; the endpoints live as long as the pair.
pub(crate) struct Pair {
    pub(crate) dialer: Connection,
    pub(crate) listener: Connection,
    pub(crate) endpoints: [Endpoint; 2],
}

/// Makes one with quinn's own settings.
pub(crate) async fn pair() -> Pair {
    pair_with(TransportConfig::default()).await
}

/// Makes one; `settings` are those of both ends.
pub(crate) async fn pair_with(settings: TransportConfig) -> Pair {
    let settings = Arc::new(settings);
    let made = rcgen::generate_simple_self_signed(["peer".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut server = ServerConfig::with_single_cert(vec![certificate.clone()], key).unwrap();
    server.transport_config(Arc::clone(&settings));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    client.transport_config(settings);
    let listener = Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let dialer = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let dial = dialer.connect_with(client, listener.local_addr().unwrap(), "peer").unwrap();
    let accept = async { listener.accept().await.unwrap().await };
    let (dialled, accepted) = tokio::join!(dial, accept);
    Pair { dialer: dialled.unwrap(), listener: accepted.unwrap(), endpoints: [dialer, listener] }
}

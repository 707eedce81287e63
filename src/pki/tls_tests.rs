use std::net::{Ipv4Addr, SocketAddr};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};

use super::super::{EphemeralCa, ephemeral};
use super::*;
use crate::model::ServiceName;

fn ca(domain: &str) -> EphemeralCa {
    ephemeral(&domain.parse().unwrap(), clock::wall()).unwrap()
}

fn identity(ca: &EphemeralCa, node: &str) -> Arc<Identity> {
    let now = clock::wall();
    let authority = ca.issuer().self_certify(&node.parse().unwrap(), &"web".parse().unwrap(), now).unwrap();
    Identity::new(authority, now).unwrap()
}

struct Handshake {
    client: Result<quinn::Connection, quinn::ConnectionError>,
    server: Result<quinn::Connection, quinn::ConnectionError>,
    _endpoints: [quinn::Endpoint; 2],
}

async fn handshake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Handshake {
    let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap()));
    let listener = quinn::Endpoint::server(server, loopback).unwrap();
    let dialer = quinn::Endpoint::client(loopback).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).unwrap()));
    let connecting = dialer.connect_with(client, listener.local_addr().unwrap(), "weft").unwrap();
    let accept = async { listener.accept().await.unwrap().await };
    let (client, server) = tokio::join!(connecting, accept);
    Handshake { client, server, _endpoints: [listener, dialer] }
}

fn service(name: &str) -> ServiceName {
    name.parse().unwrap()
}

#[tokio::test]
async fn a_node_and_a_service_reach_the_node_that_they_dialled() {
    let ca = ca("td");
    let (a, b) = (identity(&ca, "a"), identity(&ca, "b"));
    let server = b.server_config(Plane::Tunnel).unwrap();
    let web = a.service_svid(&service("web"), clock::wall()).unwrap();
    for svid in [a.node_svid(), web] {
        let config = a.client_config(Plane::Tunnel, &svid, Some("b".parse().unwrap())).unwrap();
        let shaken = handshake(Arc::clone(&server), config).await;
        let seen_by_client = a.peer_of(&shaken.client.unwrap(), clock::wall()).unwrap().unwrap();
        let seen_by_server = b.peer_of(&shaken.server.unwrap(), clock::wall()).unwrap().unwrap();
        assert_eq!(seen_by_client.node.as_str(), "b");
        assert_eq!(seen_by_server.id, svid.id);
    }
}

#[tokio::test]
async fn a_server_that_is_not_the_expected_node_is_refused_with_the_whole_text() {
    let ca = ca("td");
    let (a, b) = (identity(&ca, "a"), identity(&ca, "b"));
    let config = a.client_config(Plane::Gossip, &a.node_svid(), Some("c".parse().unwrap())).unwrap();
    let error = handshake(b.server_config(Plane::Gossip).unwrap(), config).await.client.unwrap_err().to_string();
    assert!(error.contains("was dialled: the address belongs to another node"), "{error}");
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_name() {
    let (a, b) = (identity(&ca("one"), "a"), identity(&ca("two"), "b"));
    let config = a.client_config(Plane::Gossip, &a.node_svid(), None).unwrap();
    let error = handshake(b.server_config(Plane::Gossip).unwrap(), config).await.client.unwrap_err().to_string();
    assert!(error.contains("peer is of trust domain `two`"), "{error}");
}

#[tokio::test]
async fn an_expired_client_leaf_and_a_leaf_outside_its_scope_are_refused_by_the_server() {
    let ca = ca("td");
    let (a, b) = (identity(&ca, "a"), identity(&ca, "b"));
    let old = clock::wall().minus(Duration::from_secs(7200));
    let expired = a.authority().mint_node(old).unwrap();
    let id = "spiffe://td/svc/db/node/a".parse().unwrap();
    let escalated = a.authority().mint(id, clock::wall()).unwrap();
    for (svid, want) in [(expired, "was valid until"), (escalated, "may not speak for service `db`")] {
        let config = a.client_config(Plane::Tunnel, &svid, None).unwrap();
        let error = handshake(b.server_config(Plane::Tunnel).unwrap(), config).await.server.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_but_for_the_control_socket() {
    let ca = ca("td");
    let a = identity(&ca, "a");
    let verifier = JoinVerifier::trusting(ca.issuer().bundle().clone(), clock::wall());
    let mut config = verifier.client_config().unwrap();
    config.alpn_protocols = vec![ALPN_GOSSIP.to_vec()];
    let config = Arc::new(config);
    assert!(handshake(a.server_config(Plane::Gossip).unwrap(), Arc::clone(&config)).await.server.is_err());
    let shaken = handshake(a.server_config_control().unwrap(), config).await;
    assert_eq!(a.peer_of(&shaken.server.unwrap(), clock::wall()).unwrap(), None);
}

#[tokio::test]
async fn a_newcomer_is_shown_the_root_and_peers_are_not() {
    let ca = ca("td");
    let a = identity(&ca, "a");
    let digest = root_digest(&ca.issuer().bundle().roots[0]);
    let verifier = JoinVerifier::pinning(digest, "td".parse().unwrap(), clock::wall());
    let config = Arc::new(verifier.client_config().unwrap());
    let shaken = handshake(a.server_config_control().unwrap(), config).await;
    let chain = shaken.client.unwrap().peer_identity().unwrap().downcast::<Vec<CertificateDer<'static>>>().unwrap();
    assert_eq!(chain.len(), 4);
    assert_eq!(verifier.bundle(), Some(ca.issuer().bundle()));
}

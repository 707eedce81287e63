//! What identity costs: handshakes with weft's own verifier on both sides, and the steps in them. One thread each: the
//! inverse of a time is the rate of one core.

use std::hint::black_box;
use std::net::UdpSocket;
use std::sync::Arc;

use criterion::Criterion;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::runtime::Runtime;
use weft::clock;
use weft::model::ServiceName;
use weft::pki::{
    CaDir, DocumentKey, Identity, Issuer, NodeAuthority, Revoked, Signatory, SpkiHash, verify_document, verify_peer,
    verify_signed_by_node,
};
use weft::transport::ControlTransport;

/// Full handshakes, and what one is made of.
pub(crate) fn identity(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = CaDir::init(&dir.path().join("ca"), &"bench.weft".parse().expect("a valid domain"), clock::wall())
        .expect("a fresh CA");
    let issuer = Issuer::load(&ca.path().join("issuer-1")).expect("it was just made");
    handshakes(c, &issuer);
    steps(c, &issuer);
    documents(c, &ca);
}

fn authority(issuer: &Issuer, node: &str) -> NodeAuthority {
    let (node, scope) = (node.parse().expect("a valid name"), "web,api-*".parse().expect("a valid scope"));
    issuer.self_certify(&node, &scope, clock::wall()).expect("a new issuer certifies")
}

/// Both sides of a connection on one thread, until the server has verified the client: no session is ever resumed
/// (`pki::tls`), so this is what every new connection costs.
fn handshakes(c: &mut Criterion, issuer: &Issuer) {
    let runtime: Runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a thread");
    let _inside = runtime.enter();
    let [server, client] = ["server", "client"].map(|name| {
        let identity = Identity::new(authority(issuer, name), clock::wall()).expect("a fresh authority");
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.set_nonblocking(true).expect("a socket option");
        let addr = socket.local_addr().expect("it is bound");
        (ControlTransport::new(socket, identity, [7; 64]).expect("TLS is configured"), addr)
    });
    let (server, addr) = server;
    let (client, _) = client;
    c.bench_function("identity/full_handshake_both_sides", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                let (dialled, accepted) = tokio::join!(client.connect(addr, None), server.accept());
                let (connection, _) = dialled.expect("the server is believed");
                let accepted = accepted.expect("the server listens");
                assert!(accepted.peer.is_some(), "the client is verified");
                connection.close(0u32.into(), b"");
                accepted.connection.close(0u32.into(), b"");
            });
        });
    });
}

fn steps(c: &mut Criterion, issuer: &Issuer) {
    let now = clock::wall();
    let authority = authority(issuer, "node");
    let bundle = issuer.bundle();
    let web: ServiceName = "web".parse().expect("a valid name");
    let leaf = authority.mint_service(&web, now).expect("within the scope");
    c.bench_function("identity/verify_peer_chain", |bencher| {
        bencher.iter(|| verify_peer(black_box(&leaf.chain), bundle, now).is_ok());
    });
    let signature = authority.sign(b"a head").expect("it holds its key");
    c.bench_function("identity/verify_published_chain_and_signature", |bencher| {
        bencher
            .iter(|| verify_signed_by_node(authority.chain(), black_box(b"a head"), &signature, bundle, now).is_ok());
    });
    c.bench_function("identity/mint_service_leaf", |bencher| {
        bencher.iter(|| authority.mint_service(black_box(&web), now).is_ok());
    });
    c.bench_function("identity/certify_node", |bencher| {
        bencher.iter(|| issuer.self_certify(authority.node(), authority.scope(), now).is_ok());
    });
    c.bench_function("identity/new_key_and_request", |bencher| {
        bencher.iter(|| {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("randomness");
            CertificateParams::default().serialize_request(&key).is_ok()
        });
    });
}

fn documents(c: &mut Criterion, ca: &CaDir) {
    let key = DocumentKey::load(ca.path(), Signatory::Operator).expect("it was just made");
    let bundle = Arc::new(key.bundle().expect("a root of weft's"));
    let content = [7; 200];
    let signature = key.sign(&content).expect("it holds its key");
    let now = clock::wall();
    c.bench_function("identity/verify_document", |bencher| {
        bencher.iter(|| verify_document(key.certificate(), black_box(&content), &signature, &bundle, now).is_ok());
    });
    let many = (0..2_000_u64).map(|number| {
        let mut hash = [0; 32];
        hash.iter_mut().zip(number.to_be_bytes()).for_each(|(to, from)| *to = from);
        Revoked::Key(SpkiHash(hash))
    });
    let revoked: weft::pki::Revocations = many.collect();
    let unknown = SpkiHash([9; 32]);
    c.bench_function("identity/look_up_among_2000_revoked_keys", |bencher| {
        bencher.iter(|| revoked.has_key(black_box(&unknown)));
    });
}

//! The API over its socket, spoken to by another implementation of HTTP/2 framing: hyper's client.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::attest::META_USER;
use super::feed::Source;
use super::message::{BundlesResponse, SvidsResponse, unframe};
use super::{WorkloadConfig, metrics, serve};
use crate::clock;
use crate::metrics::Metrics;
use crate::pki::{EphemeralCa, Identity, TrustBundle, ephemeral, verify_peer};
use crate::registry::definition::{DefinitionDefaults, service_from_json};
use crate::registry::{LocalService, LocalState};
use crate::supervise::Tasks;
use crate::unix_socket;

const SVIDS: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
const EMPTY: &[u8] = b"\0\0\0\0\0";

struct Bench {
    ca: EphemeralCa,
    identity: Arc<Identity>,
    registry: watch::Sender<Arc<LocalState>>,
    metrics: Metrics,
    stop: CancellationToken,
    tasks: Tasks,
    dir: tempfile::TempDir,
}

/// Services by name, each with its `workload-user`.
fn registered(services: &[(&str, Option<&str>)]) -> Arc<LocalState> {
    let mut state = LocalState::default();
    for (name, user) in services {
        let meta = user.map_or(serde_json::json!({}), |user| serde_json::json!({ META_USER: user }));
        let body = serde_json::json!({"Name": name, "Port": 80, "Meta": meta});
        let defaults = DefinitionDefaults { bind_ip: "127.0.0.1".parse().unwrap(), datacenter: "dc1" };
        let definition = service_from_json(&body, &defaults).unwrap();
        let id = definition.record.id.clone();
        state.services.insert(id, Arc::new(LocalService { definition, create_index: 1, modify_index: 1 }));
    }
    Arc::new(state)
}

impl Bench {
    fn new(services: &[(&str, Option<&str>)]) -> Self {
        let now = clock::wall();
        let ca = ephemeral(&"prod.example".parse().unwrap(), now).unwrap();
        let own = ca.issuer().self_certify(&"n1".parse().unwrap(), &"web,api".parse().unwrap(), now).unwrap();
        let identity = Identity::new(own, now).unwrap();
        let registry = watch::Sender::new(registered(services));
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let tasks = Tasks::new(CancellationToken::new());
        let dir = tempfile::tempdir().unwrap();
        let listening =
            unix_socket::bind(&WorkloadConfig { socket: dir.path().join("w"), group: None }.socket()).unwrap();
        let source = Arc::new(Source::new(registry.subscribe(), Arc::clone(&identity), stop.clone()));
        let meter = metrics::Meter::new(&metrics).unwrap();
        tasks.spawn("workload-api", serve::run(listening, source, meter, tasks.clone()));
        Self { ca, identity, registry, metrics, stop, tasks, dir }
    }

    async fn connect(&self) -> SendRequest<Full<Bytes>> {
        let stream = UnixStream::connect(self.dir.path().join("w")).await.unwrap();
        let (send, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        self.tasks.spawn("client", async move { drop(connection.await) });
        send
    }

    async fn call(&self, path: &str) -> Response<Incoming> {
        self.connect().await.send_request(request(path)).await.unwrap()
    }

    fn rotate(&self) {
        let now = clock::wall();
        let next = self.ca.issuer().self_certify(&"n1".parse().unwrap(), &"web,api".parse().unwrap(), now).unwrap();
        self.identity.replace_authority(next, now).unwrap();
    }
}

fn request(path: &str) -> Request<Full<Bytes>> {
    Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("workload.spiffe.io", "true")
        .body(Full::from(Bytes::from_static(EMPTY)))
        .unwrap()
}

fn own_uid() -> String {
    nix::unistd::geteuid().to_string()
}

/// The next message of a stream, or the trailers.
async fn next(answer: &mut Response<Incoming>) -> Result<Bytes, HeaderMap> {
    let frame = answer.frame().await.expect("the stream goes on").unwrap();
    match frame.into_data() {
        Ok(data) => Ok(Bytes::copy_from_slice(unframe(&data).expect("one whole message"))),
        Err(frame) => Err(frame.into_trailers().unwrap()),
    }
}

#[track_caller]
fn assert_status(headers: &HeaderMap, code: &str, says: &str) {
    assert_eq!(headers["grpc-status"], code, "{headers:?}");
    let message = headers["grpc-message"].to_str().unwrap();
    assert!(message.contains(says), "{message}");
}

/// DER certificates, one after the other.
fn certificates(mut bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    use x509_parser::prelude::FromDer as _;
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (rest, _) = x509_parser::certificate::X509Certificate::from_der(bytes).unwrap();
        let (one, _) = bytes.split_at(bytes.len() - rest.len());
        found.push(CertificateDer::from(one.to_vec()));
        bytes = rest;
    }
    found
}

#[tokio::test]
async fn a_user_gets_the_certificates_of_its_services_and_a_new_message_at_each_change() {
    let uid = own_uid();
    let bench = Bench::new(&[("web", Some(&uid)), ("api", Some("1")), ("db", Some(&uid))]);
    let mut answer = bench.call(SVIDS).await;
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    let first = SvidsResponse::decode(next(&mut answer).await.unwrap()).unwrap();
    // api is another user's; db lies outside the node's scope.
    let [web] = first.svids.as_slice() else { panic!("{first:?}") };
    assert_eq!((web.spiffe_id.as_str(), web.hint.as_str()), ("spiffe://prod.example/svc/web/node/n1", "web"));
    let peer = verify_peer(&certificates(&web.chain), &bench.identity.bundle(), clock::wall()).unwrap();
    assert_eq!(peer.id.to_string(), web.spiffe_id);
    assert_eq!(certificates(&web.bundle), bench.identity.bundle().roots);
    let of_proxy = bench.identity.service_svid(&"web".parse().unwrap(), clock::wall()).unwrap();
    assert_ne!(web.key, of_proxy.key.secret_der(), "an app never holds the proxy's key");
    // Another call gets the same certificate.
    let again = SvidsResponse::decode(next(&mut bench.call(SVIDS).await).await.unwrap()).unwrap();
    assert_eq!(again, first);

    bench.rotate();
    let second = SvidsResponse::decode(next(&mut answer).await.unwrap()).unwrap();
    assert_ne!((&second.svids[0].chain, &second.svids[0].key), (&web.chain, &web.key));

    bench.registry.send_replace(registered(&[("web", Some(&uid)), ("api", Some(&uid))]));
    let third = SvidsResponse::decode(next(&mut answer).await.unwrap()).unwrap();
    let ids: Vec<&str> = third.svids.iter().map(|svid| svid.hint.as_str()).collect();
    assert_eq!(ids, ["api", "web"]);
    assert_eq!(third.svids[1], second.svids[0], "what did not change stays");

    let mut bundle = TrustBundle::clone(&bench.identity.bundle());
    let other = ephemeral(&"prod.example".parse().unwrap(), clock::wall()).unwrap();
    bundle.roots.insert(0, other.issuer().bundle().roots[0].clone());
    bench.identity.set_bundle(bundle, clock::wall());
    let fourth = SvidsResponse::decode(next(&mut answer).await.unwrap()).unwrap();
    assert_eq!(certificates(&fourth.svids[0].bundle).len(), 2);

    bench.registry.send_replace(registered(&[]));
    assert_status(&next(&mut answer).await.unwrap_err(), "7", "no identity issued");
    let metrics = bench.metrics.render().unwrap();
    assert!(metrics.contains("weft_workload_calls_total{code=\"OK\",method=\"FetchX509SVID\"} 2"), "{metrics}");
}

#[tokio::test]
async fn the_roots_are_streamed_and_a_stopping_agent_says_so() {
    let bench = Bench::new(&[("web", Some(&own_uid()))]);
    let mut answer = bench.call(BUNDLES).await;
    let first = BundlesResponse::decode(next(&mut answer).await.unwrap()).unwrap();
    let roots = &first.bundles["spiffe://prod.example"];
    assert_eq!(certificates(roots), bench.identity.bundle().roots);
    // A renewal changes no root: the next word is the last.
    bench.rotate();
    bench.stop.cancel();
    assert_status(&next(&mut answer).await.unwrap_err(), "14", "the agent stops");
    tokio::time::timeout(Duration::from_secs(10), bench.tasks.join()).await.expect("every task ends");
    assert!(!bench.dir.path().join("w").exists(), "the socket's file goes with the agent");
}

#[tokio::test]
async fn a_call_that_breaks_a_rule_is_refused_with_the_status_of_the_rule() {
    #[track_caller]
    fn check(answer: &Response<Incoming>, code: &str, says: &str) {
        assert_eq!(answer.status(), 200, "gRPC tells by its own status");
        assert_status(answer.headers(), code, says);
    }
    let bench = Bench::new(&[("web", Some("4000000")), ("api", Some("nobody-of-that-name"))]);
    let mut send = bench.connect().await;
    for path in [SVIDS, BUNDLES] {
        check(&send.send_request(request(path)).await.unwrap(), "7", META_USER);
    }
    let mut bare = request(SVIDS);
    bare.headers_mut().remove("workload.spiffe.io");
    check(&send.send_request(bare).await.unwrap(), "3", "workload.spiffe.io");
    let mut wrong = request(SVIDS);
    wrong.headers_mut().insert("workload.spiffe.io", "True".parse().unwrap());
    check(&send.send_request(wrong).await.unwrap(), "3", "workload.spiffe.io");
    for path in ["FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID", "Nothing"] {
        let call = request(&format!("/SpiffeWorkloadAPI/{path}"));
        check(&send.send_request(call).await.unwrap(), "12", "X.509-SVIDs");
    }
    for body in [&b""[..], b"\0", b"\x01\0\0\0\0", b"\0\0\0\0\x09", &[0; 8192]] {
        let call = request(SVIDS).map(|_| Full::from(Bytes::copy_from_slice(body)));
        check(&send.send_request(call).await.unwrap(), "3", "one small message");
    }
}

#[tokio::test]
async fn a_user_holds_a_bounded_number_of_connections() {
    let bench = Bench::new(&[("web", Some(&own_uid()))]);
    let mut held = Vec::new();
    for _ in 0..serve::CONNECTIONS_PER_USER_MAX {
        let mut send = bench.connect().await;
        let mut answer = send.send_request(request(SVIDS)).await.unwrap();
        next(&mut answer).await.unwrap();
        held.push((send, answer));
    }
    let stream = UnixStream::connect(bench.dir.path().join("w")).await.unwrap();
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    bench.tasks.spawn("client", async move { drop(connection.await) });
    assert!(send.send_request(request(SVIDS)).await.is_err(), "it is closed");
    drop(held.pop());
    // The place comes back when the server sees the end.
    while bench.metrics.render().unwrap().contains("weft_workload_streams_active 32") {
        tokio::task::yield_now().await;
    }
}

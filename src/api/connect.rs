//! Consul's certificates for apps that speak TLS themselves: `connect/ca/roots`, `ca/leaf/:service`, `connect/authorize`.
//!
//! A leaf comes with its key, as Consul's does: a private key stays on its host, so it is served to loopback and to the unix
//! socket alone, whatever token is shown, and to nobody for whom a proxy says that it asks.
//! Roots and leaf block as other reads do (`?index=&wait=`): until the roots change, until the leaf is renewed.

use http::StatusCode;
use serde_json::{Value, json};

use super::agent::json_body;
use super::block;
use super::call::{Call, Meta, Refusal, Reply};
use super::mesh::rfc3339;
use super::query::Blocking;
use crate::clock;
use crate::model::{ServiceName, SpiffeId};
use crate::pki::{self, PkiError};

/// What a chain of certificates in PEM is (RFC 8555 §9.1).
const PEM_CHAIN: &str = "application/pem-certificate-chain";

/// `GET /v1/agent/connect/ca/roots` and `/v1/connect/ca/roots`; with `pem` the certificates alone.
pub(super) async fn roots(call: Call) -> Result<Reply, Refusal> {
    let (blocking, pem) = (Blocking::parse(&call.query)?, call.query.switch("pem")?);
    let authority = &call.shared.authority;
    let (bundle, index) = block::wait_on(&call, blocking, authority.subscribe(), || Ok(authority.bundle())).await?;
    if pem {
        let body = bundle.roots.iter().map(|root| pki::pem("CERTIFICATE", root)).collect::<String>().into_bytes();
        let meta = Meta { index: Some(index.max(1)), content_hash: None };
        return Ok(Reply::Bytes { status: StatusCode::OK, body, content_type: PEM_CHAIN, meta });
    }
    let mut roots = Vec::new();
    for (at, root) in bundle.roots.iter().enumerate() {
        let facts = pki::facts_of(root)?;
        roots.push(json!({
            "ID": facts.key.to_string(),
            "Name": format!("weft root of {}", bundle.trust_domain),
            "SerialNumber": facts.serial,
            "SigningKeyID": facts.key.to_string(),
            "ExternalTrustDomain": bundle.trust_domain.as_str(),
            "NotBefore": rfc3339(facts.not_before),
            "NotAfter": rfc3339(facts.not_after),
            "RootCert": pki::pem("CERTIFICATE", root),
            "IntermediateCerts": Value::Null,
            "Active": at == 0,
            "PrivateKeyType": "ec",
            "PrivateKeyBits": 256,
            "CreateIndex": index,
            "ModifyIndex": index,
        }));
    }
    let active = roots.first().and_then(|root| root.get("ID")).cloned().unwrap_or(Value::Null);
    let trust_domain = bundle.trust_domain.as_str();
    let answer = json!({"ActiveRootID": active, "TrustDomain": trust_domain, "Roots": roots});
    Reply::at_index(&call, &answer, index)
}

/// `GET /v1/agent/connect/ca/leaf/:service`
pub(super) async fn leaf(call: Call) -> Result<Reply, Refusal> {
    refuse_the_network(&call)?;
    let service: ServiceName =
        call.argument.parse().map_err(|error| Refusal::bad(format!("Invalid service name: {error}")))?;
    let blocking = Blocking::parse(&call.query)?;
    let authority = &call.shared.authority;
    let read = || Ok(authority.svid(&service)?);
    let (svid, index) = block::wait_on(&call, blocking, authority.subscribe(), read).await?;
    let leaf = svid.chain.first().ok_or_else(|| Refusal::internal("the certificate has no chain"))?;
    let facts = pki::facts_of(leaf)?;
    let answer = json!({
        "SerialNumber": facts.serial,
        "CertPEM": svid.chain.iter().map(|der| pki::pem("CERTIFICATE", der)).collect::<String>(),
        "PrivateKeyPEM": pki::pem("PRIVATE KEY", svid.key.secret_der()),
        "Service": service,
        "ServiceURI": svid.id.to_string(),
        "ValidAfter": rfc3339(svid.not_before),
        "ValidBefore": rfc3339(svid.not_after),
        "CreateIndex": index,
        "ModifyIndex": index,
    });
    Reply::at_index(&call, &answer, index)
}

/// Headers of proxies that say for whom they ask; weft's own adds the first to what comes through the mesh.
const ASKED_FOR: [&str; 3] = ["x-forwarded-client-cert", "x-forwarded-for", "forwarded"];

/// Lets pass who asks on this host: a private key is no matter for the network.
fn refuse_the_network(call: &Call) -> Result<(), Refusal> {
    let is_far = call.peer.is_some_and(|ip| !ip.is_loopback());
    if is_far || ASKED_FOR.iter().any(|name| call.headers.contains_key(*name)) {
        return Err(Refusal::forbidden(
            "Permission denied: a certificate comes with its private key: ask at this agent's loopback address or unix socket, and not through a proxy",
        ));
    }
    Ok(())
}

/// `POST /v1/agent/connect/authorize`: the app has verified the chain and asks whether its caller may.
pub(super) async fn authorize(call: Call) -> Result<Reply, Refusal> {
    let (target, uri) = parse_question(&json_body(&call)?)?;
    let (authorized, reason) = decide(&call, &uri, &target);
    Reply::json(&call, &json!({"Authorized": authorized, "Reason": reason}))
}

/// Reads who is called and who calls; keys in any case and in snake_case, unknown ones refused by name.
fn parse_question(body: &Value) -> Result<(ServiceName, String), Refusal> {
    let decode = |what: &str| Refusal::bad(format!("Request decode failed: {what}"));
    let fields = body.as_object().ok_or_else(|| decode("the body must be an object"))?;
    // The serial number decides nothing: revocation is by node and key.
    let mut given = [""; 3];
    for (key, value) in fields {
        let name = key.to_ascii_lowercase().replace('_', "");
        let mut slots = ["target", "clientcerturi", "clientcertserial"].into_iter().zip(&mut given);
        let slot = slots.find(|(known, _)| *known == name).map(|(_, slot)| slot);
        let slot = slot.ok_or_else(|| decode(&format!("unknown field {key:?}")))?;
        *slot = value.as_str().ok_or_else(|| decode(&format!("{key} must be a string")))?;
    }
    let [target, uri, _serial] = given;
    if target.is_empty() || uri.is_empty() {
        return Err(Refusal::bad("Target and ClientCertURI must be given"));
    }
    let target = target.parse().map_err(|error| Refusal::bad(format!("Invalid Target: {error}")))?;
    Ok((target, uri.to_owned()))
}

fn decide(call: &Call, uri: &str, target: &ServiceName) -> (bool, String) {
    let (bundle, _) = call.shared.authority.bundle();
    let Ok(id) = uri.parse::<SpiffeId>() else {
        return (false, "the caller's URI is no SPIFFE id of weft's".to_owned());
    };
    if *id.trust_domain() != bundle.trust_domain {
        return (
            false,
            format!("the caller is of trust domain `{}`, not `{}`", id.trust_domain(), bundle.trust_domain),
        );
    }
    let Some(node) = id.node() else { return (false, "the caller's certificate does not authenticate".to_owned()) };
    // The chain itself is not shown here: the newest revocation of its node is all that can be held against it.
    if let Some(until) = bundle.revoked.node_until(node) {
        return (false, format!("certificates of node `{node}` up to {} are revoked", rfc3339(until)));
    }
    let snapshot = call.shared.snapshot.load();
    let decision = snapshot.policy.of_stream(id.service(), target, |_, _| {});
    let source = id.service().map_or("a node", ServiceName::as_str);
    let by = match decision.by {
        Some(guard) => format!("intention {} (precedence {})", guard.name(), guard.intention().precedence()),
        None => "the default, for no intention is about it".to_owned(),
    };
    (decision.is_allowed(), format!("{source} -> {target}: {} by {by}", decision.action))
}

impl From<PkiError> for Refusal {
    fn from(error: PkiError) -> Self {
        match &error {
            PkiError::OutsideScope { .. } => Self::forbidden(format!("Permission denied: {error}")),
            PkiError::Expired { .. } => Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl From<pki::VerifyError> for Refusal {
    fn from(error: pki::VerifyError) -> Self {
        Self::internal(error.to_string())
    }
}

impl super::seam::Authority for pki::Identity {
    fn bundle(&self) -> (std::sync::Arc<pki::TrustBundle>, u64) {
        self.bundle_at()
    }

    fn svid(&self, service: &ServiceName) -> Result<(std::sync::Arc<pki::Svid>, u64), PkiError> {
        self.service_svid_at(service, clock::wall())
    }

    fn subscribe(&self) -> tokio::sync::watch::Receiver<()> {
        Self::subscribe(self)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::{Method, Request};

    use super::super::fake::Bench;
    use super::super::guard::Peer;
    use super::*;

    #[tokio::test]
    async fn a_private_key_is_for_this_host_alone_whatever_token_is_shown() {
        let bench = Bench::with(Some("s3cret"), 2);
        let ask = |peer: Option<&str>, header: Option<&str>| {
            let mut request = Request::get("/v1/agent/connect/ca/leaf/web?token=s3cret");
            if let Some(peer) = peer {
                request = request.extension(Peer(peer.parse().unwrap()));
            }
            if let Some(header) = header {
                request = request.header(header, "10.0.0.1");
            }
            bench.send(request.body(Body::empty()).unwrap())
        };
        for near in [None, Some("127.0.0.1"), Some("127.0.0.9"), Some("::1")] {
            assert_eq!(ask(near, None).await.status, StatusCode::OK, "{near:?}");
        }
        let proxied =
            ["x-forwarded-for", "Forwarded", "x-forwarded-client-cert"].map(|header| (Some("127.0.0.1"), Some(header)));
        for (peer, header) in [(Some("10.0.0.1"), None), (Some("fd00::1"), None)].into_iter().chain(proxied) {
            let answer = ask(peer, header).await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN, "{peer:?} {header:?}");
            assert!(answer.text.contains("loopback address or unix socket"), "{}", answer.text);
            assert!(!answer.text.contains("PRIVATE KEY"));
        }
    }

    #[tokio::test]
    async fn roots_come_as_certificates_alone_where_they_are_asked_for_so() {
        let bench = Bench::new();
        for path in ["/v1/agent/connect/ca/roots", "/v1/connect/ca/roots"] {
            let (whole, pem) = (bench.get(path).await, bench.get(&format!("{path}?pem=true")).await);
            assert_eq!(pem.headers["content-type"], PEM_CHAIN, "{path}");
            assert_eq!((json!(pem.text), pem.index()), (whole.json()["Roots"][0]["RootCert"].clone(), whole.index()));
            assert_eq!(bench.get(&format!("{path}?pem=false")).await.text, whole.text, "{path}");
        }
    }

    #[tokio::test]
    async fn a_question_to_authorize_is_read_by_the_rules_of_all_bodies() {
        let bench = Bench::new();
        let uri = "spiffe://prod.example/svc/api/node/n2";
        for method in [Method::POST, Method::PUT] {
            for body in [
                json!({"target": "web", "CLIENTCERTURI": uri}),
                json!({"Target": "web", "client_cert_uri": uri, "client_cert_serial": "01"}),
            ] {
                let answer = bench.call(method.clone(), "/v1/agent/connect/authorize", &body.to_string()).await;
                assert_eq!(answer.json()["Authorized"], true, "{body}: {}", answer.text);
            }
        }
        for (body, want) in [
            ("{", "Request decode failed: "),
            ("[]", "Request decode failed: the body must be an object"),
            (r#"{"Target": 1}"#, "Request decode failed: Target must be a string"),
            (r#"{"Target": "web", "Source": "api"}"#, "Request decode failed: unknown field \"Source\""),
            (r#"{"Target": "web"}"#, "Target and ClientCertURI must be given"),
        ] {
            let answer = bench.call(Method::POST, "/v1/agent/connect/authorize", body).await;
            assert_eq!(answer.status.as_u16(), 400, "{body}");
            assert!(answer.text.starts_with(want), "{body}: {}", answer.text);
        }
    }
}

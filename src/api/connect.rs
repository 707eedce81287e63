//! Consul's certificates for apps that speak TLS themselves: `connect/ca/roots`, `ca/leaf/:service`, `connect/authorize`.
//!
//! A leaf comes with its key, as Consul's does: whoever reaches this API can speak as a service of this node, as it can by
//! an upstream port. So it is served where registrations are, to loopback or with the admin token.
//! Roots and leaf block as other reads do (`?index=&wait=`): until the roots change, until the leaf is renewed.

use http::StatusCode;
use serde_json::{Value, json};

use super::block;
use super::call::{Call, Refusal, Reply};
use super::mesh::rfc3339;
use super::query::Blocking;
use crate::clock;
use crate::model::{ServiceName, SpiffeId};
use crate::pki::{self, PkiError};

/// `GET /v1/agent/connect/ca/roots` and `/v1/connect/ca/roots`
pub(super) async fn roots(call: Call) -> Result<Reply, Refusal> {
    let blocking = Blocking::parse(&call.query)?;
    let authority = &call.shared.authority;
    let (bundle, index) = block::wait_on(&call, blocking, authority.subscribe(), || Ok(authority.bundle())).await?;
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

/// `POST /v1/agent/connect/authorize`: the app has verified the chain and asks whether its caller may.
pub(super) async fn authorize(call: Call) -> Result<Reply, Refusal> {
    let body: Value = serde_json::from_slice(&call.body).map_err(|error| Refusal::bad(format!("no JSON: {error}")))?;
    let field = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
    let (target, uri) = (field("Target"), field("ClientCertURI"));
    if target.is_empty() || uri.is_empty() {
        return Err(Refusal::bad("Target and ClientCertURI must be given"));
    }
    let target: ServiceName = target.parse().map_err(|error| Refusal::bad(format!("Invalid Target: {error}")))?;
    let (authorized, reason) = decide(&call, uri, &target);
    Reply::json(&call, &json!({"Authorized": authorized, "Reason": reason}))
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

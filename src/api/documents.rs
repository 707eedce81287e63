//! `/v1/mesh/document…`: signed documents, and the certificates that they may name.
//!
//! Whoever reaches the API may bring a document: its signature is what counts, and every node checks it.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde_json::{Value, json};

use super::TokenUse;
use super::call::{Call, Refusal, Reply};
use super::mesh::rfc3339;
use super::write::{entries_in_effect, in_effect};
use crate::authz;
use crate::clock;
use crate::gossip::{DocumentBody, DocumentView, NodeCertificates, OfferError};
use crate::pki::CertificateFacts;
use crate::policy::{DocumentDigest, DocumentKind, Notice, Offered, Refused};

/// `PUT /v1/mesh/document`: the body is `{"Document": "<base64>"}`.
pub(super) async fn offer(call: Call) -> Result<Reply, Refusal> {
    let body: Value = serde_json::from_slice(&call.body).map_err(|error| Refusal::bad(format!("no JSON: {error}")))?;
    let text = body.get("Document").and_then(Value::as_str);
    let text = text.ok_or_else(|| Refusal::bad("the body must be {\"Document\": \"<base64>\"}"))?;
    let bytes = STANDARD.decode(text.trim()).map_err(|_| Refusal::bad("Document is not base64"))?;
    let (before, traffic_before) = {
        let snapshot = call.shared.snapshot.load();
        (snapshot.policy_index, snapshot.traffic_index)
    };
    let spread = call.shared.membership.offer(bytes).await?;
    let DocumentDigest { id, version, .. } = &spread.digest;
    if id.kind == DocumentKind::Intention && spread.offered == Offered::Stored {
        in_effect(&call.shared, id.name.as_str(), *version, before).await;
    }
    if id.kind == DocumentKind::Config && spread.offered == Offered::Stored {
        entries_in_effect(&call.shared, traffic_before).await;
    }
    let mut answer = digest(&spread.digest);
    let outcome = match spread.offered {
        Offered::Stored => "stored",
        Offered::Known => "known",
        Offered::Older => "older",
    };
    merge(&mut answer, json!({"Outcome": outcome, "Confirmed": spread.confirmed, "Alive": spread.alive}));
    Reply::json(&call, &answer)
}

/// `GET /v1/mesh/documents`
pub(super) async fn list(call: Call) -> Result<Reply, Refusal> {
    let view = call.shared.membership.documents();
    let documents: Vec<Value> = view.documents.iter().map(|view| document(view)).collect();
    Reply::json(&call, &json!({"SetHash": format!("{:016x}", view.set_hash), "Documents": documents}))
}

/// `GET /v1/mesh/export`: every document, in words and as it travels.
pub(super) async fn export(call: Call) -> Result<Reply, Refusal> {
    let view = call.shared.membership.documents();
    let shape = |view: &Arc<DocumentView>| {
        let mut shape = document(view);
        let body = match &view.body {
            DocumentBody::Intention(Some(intention)) => authz::to_json(intention, view.digest.version),
            DocumentBody::Config(Some(entry)) => entry.clone(),
            DocumentBody::Intention(None) | DocumentBody::Config(None) | DocumentBody::Trust => Value::Null,
        };
        merge(&mut shape, json!({"Body": body, "Document": STANDARD.encode(&view.bytes)}));
        shape
    };
    let documents: Vec<Value> = view.documents.iter().map(shape).collect();
    let trust_domain = call.shared.authority.bundle().0.trust_domain.to_string();
    Reply::json(&call, &json!({"TrustDomain": trust_domain, "Documents": documents}))
}

/// `GET /v1/mesh/certificates`
pub(super) async fn certificates(call: Call) -> Result<Reply, Refusal> {
    let certificates = call.shared.membership.certificates().await?;
    let shapes: Vec<Value> = certificates.iter().map(certificate).collect();
    Reply::json(&call, &shapes)
}

/// `GET /v1/mesh/tokens`: the uses that this agent, if it is an issuer, has counted.
pub(super) async fn tokens(call: Call) -> Result<Reply, Refusal> {
    let read = Arc::clone(&call.shared.token_uses);
    let uses =
        tokio::task::spawn_blocking(move || read()).await.map_err(|error| Refusal::internal(error.to_string()))?;
    let shape = |used: TokenUse| {
        let id = uuid::Uuid::from_bytes(used.id).to_string();
        json!({"ID": id, "Uses": used.uses, "NotAfter": rfc3339(used.not_after)})
    };
    let shapes: Vec<Value> = uses.map_err(Refusal::internal)?.into_iter().map(shape).collect();
    Reply::json(&call, &shapes)
}

fn document(view: &DocumentView) -> Value {
    let mut shape = digest(&view.digest);
    let rest = json!({
        "Signer": view.signer,
        "SignerKey": view.signer_key,
        "NotBefore": rfc3339(view.not_before),
        "NotAfter": rfc3339(view.not_after),
        "NotAfterUnix": view.not_after.0,
        "EndsSoon": view.says_policy() && view.notice(clock::wall()) != Notice::Far,
        "Says": view.says,
        "Reason": view.reason,
        "Fork": view.is_forked,
        "Deleted": view.is_deletion(),
    });
    merge(&mut shape, rest);
    shape
}

fn digest(digest: &DocumentDigest) -> Value {
    json!({
        "Kind": digest.id.kind.to_string(),
        "Name": digest.id.name.as_str(),
        "Version": digest.version,
        "Hash": format!("{:016x}", digest.hash),
    })
}

fn certificate(shown: &NodeCertificates) -> Value {
    let facts = |facts: &CertificateFacts| {
        json!({
            "Serial": facts.serial,
            "Key": facts.key.to_string(),
            "NotBefore": rfc3339(facts.not_before),
            "NotAfter": rfc3339(facts.not_after),
            "NotAfterUnix": facts.not_after.0,
        })
    };
    json!({"Node": shown.node, "Intermediate": facts(&shown.intermediate), "Issuer": facts(&shown.issuer),
        "Root": shown.root.map(|key| key.to_string())})
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

impl From<OfferError> for Refusal {
    fn from(error: OfferError) -> Self {
        let status = match &error {
            OfferError::Document(_) => StatusCode::BAD_REQUEST,
            OfferError::Refused(Refused::Full) | OfferError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            OfferError::Refused(_) => StatusCode::FORBIDDEN,
            OfferError::Closed => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

//! Documents as people and the API see them.

use std::sync::Arc;

use super::{DocumentBody, DocumentView};
use crate::authz::{Intention, Rule};
use crate::model::NodeName;
use crate::pki::{DocumentSigner, Revoked};
use crate::policy::{ConfigBody, DocumentKind, DocumentSet, Held, IntentionBody, RevocationBody, RootLink};

/// The nodes that a document takes back.
pub(super) fn revoked_nodes(held: &Held) -> Vec<NodeName> {
    let body = RevocationBody::from_bytes(&held.document.content().body);
    let node = |entry: Revoked| if let Revoked::Node { node, .. } = entry { Some(node) } else { None };
    body.map_or_else(|_| Vec::new(), |body| body.entries.into_iter().filter_map(node).collect())
}

/// Shows what is held at the start.
pub(in crate::gossip) fn views(set: &DocumentSet) -> Vec<Arc<DocumentView>> {
    set.iter().map(|held| Arc::new(view(held, false))).collect()
}

/// Reads one.
pub(super) fn view(held: &Held, is_forked: bool) -> DocumentView {
    let content = held.document.content();
    // The bodies were checked when the document was taken.
    let body = match content.id.kind {
        DocumentKind::Bundle | DocumentKind::Revocation => DocumentBody::Trust,
        DocumentKind::Intention => {
            DocumentBody::Intention(IntentionBody::from_bytes(&content.body).ok().and_then(|body| body.0))
        }
        DocumentKind::Config => {
            let text = ConfigBody::from_bytes(&content.body).ok().and_then(|body| body.0);
            DocumentBody::Config(text.and_then(|text| serde_json::from_str(&text).ok()))
        }
    };
    let (says, reason) = match content.id.kind {
        DocumentKind::Revocation => RevocationBody::from_bytes(&content.body).map_or_else(
            |_| (Vec::new(), String::new()),
            |body| (body.entries.iter().map(describe).collect(), body.reason),
        ),
        DocumentKind::Bundle => {
            let root =
                RootLink::from_bytes(&content.body).ok().and_then(|link| crate::pki::spki(&link.certificate()).ok());
            (root.map(|key| format!("root {key}")).into_iter().collect(), String::new())
        }
        DocumentKind::Intention | DocumentKind::Config => match &body {
            DocumentBody::Intention(Some(intention)) => (vec![describe_intention(intention)], String::new()),
            DocumentBody::Config(Some(_)) => (vec![content.id.name.as_str().replacen(':', " ", 1)], String::new()),
            _ => (vec!["deleted".to_owned()], String::new()),
        },
    };
    DocumentView {
        digest: held.document.digest(),
        signer: match &held.signer {
            DocumentSigner::Root => "root".to_owned(),
            DocumentSigner::Operator(name) => name.to_string(),
        },
        signer_key: content.signer.to_string(),
        signer_begins: crate::pki::validity(held.document.certificate())
            .map_or(content.not_before, |(begins, _)| begins),
        not_before: content.not_before,
        not_after: content.not_after,
        says,
        reason,
        is_forked,
        body,
        bytes: held.document.to_bytes(),
    }
}

fn describe_intention(intention: &Intention) -> String {
    let what = match &intention.rule {
        Rule::Action(action) => action.to_string(),
        Rule::Permissions(list) => format!("{} permissions", list.len()),
    };
    let dry = if intention.mode == crate::authz::Mode::Audit { " (audit)" } else { "" };
    format!("{} -> {}: {what}{dry}", intention.source, intention.destination)
}

fn describe(entry: &Revoked) -> String {
    match entry {
        Revoked::Key(key) => format!("key {key}"),
        Revoked::Node { node, until } => format!("node {node}, certified until {}", crate::pki::Utc(*until)),
        Revoked::Token(id) => format!("token {}", uuid::Uuid::from_bytes(*id)),
        Revoked::Issuer { key, from } => format!("issuer {key}, retired from {}", crate::pki::Utc(*from)),
    }
}

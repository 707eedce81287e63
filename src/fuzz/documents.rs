//! Signed documents, and what they say.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use super::{NOW, fixture};
use crate::authz::{self, Action, Guard, Origin, Request, Rule, Table};
use crate::policy::{
    ConfigBody, Document, DocumentName, DocumentSet, IntentionBody, Offered, RevocationBody, RootLink, check_entry,
    entry_ends, intention_ends, walk,
};

/// A document in its one encoding; if a set takes it, an operator or the root signed it.
pub(super) fn document(bytes: &[u8]) {
    let Ok(document) = Document::from_bytes(bytes) else { return };
    assert_eq!(document.to_bytes(), bytes, "a document that has two encodings");
    let body = &document.content().body;
    if let Ok(revocation) = RevocationBody::from_bytes(body) {
        assert_eq!(revocation.to_bytes().unwrap(), *body);
    }
    if let Ok(link) = RootLink::from_bytes(body) {
        assert_eq!(link.to_bytes().unwrap(), *body);
    }
    let fixture = fixture();
    let mut set = DocumentSet::new(&fixture.bundle);
    if set.offer(document.clone(), NOW).is_ok() {
        let signed = fixture.documents.iter().find(|known| known.signed_bytes() == document.signed_bytes());
        let signed = signed.expect("a document that nobody signed counts");
        // However its signature is written, it is the same document: one digest, one version, no fork.
        let hash = set.set_hash();
        assert_eq!(set.offer(signed.clone(), NOW).unwrap(), Offered::Known);
        assert_eq!((set.set_hash(), set.forks().count(), set.len()), (hash, 0, 1));
    }
    let links = [document.to_bytes()];
    let roots = walk(&fixture.bundle, &links, NOW);
    assert!(roots.len() <= 2, "{} roots", roots.len());
}

/// The body of an intention; whether it is one. It says the same in JSON, is named by its ends, and allows nothing that it does
/// not say; what denies all allows nobody, whatever is asked.
pub(super) fn intention(bytes: &[u8]) -> bool {
    let Ok(body) = IntentionBody::from_bytes(bytes) else { return false };
    assert_eq!(body.to_bytes().unwrap(), bytes, "a body that has two encodings");
    let Some(intention) = body.0 else { return true };
    let shape = authz::to_json(&intention, 1);
    assert_eq!(authz::from_json(&shape, None).as_ref(), Ok(&intention), "in JSON it says something else: {shape}");
    let name: DocumentName = intention.name().parse().expect("two services and a colon are a name");
    assert_eq!(intention_ends(&name), Some((intention.source.clone(), intention.destination.clone())));
    let Ok(guard) = Guard::compile(intention.clone(), Origin::default()) else { return true };
    let table = Table::new(Action::Deny, [Arc::new(guard)], Vec::new());
    let says_allow = match &intention.rule {
        Rule::Action(action) => *action == Action::Allow,
        Rule::Permissions(list) => list.iter().any(|one| one.action == Action::Allow),
    };
    let (web, db) = ("web".parse().unwrap(), "db".parse().unwrap());
    let headers = HeaderMap::from_iter([(http::header::ACCEPT, HeaderValue::from_static("a"))]);
    for path in ["/", "/a", "/a/../b", "/a%2fb", "", "*", "/v1/items?x=/a"] {
        for method in ["GET", "PUT", "get"] {
            let request = Request { method, path, headers: &headers };
            let decision = table.of_request(Some(&web), &db, &request, |_, _| {});
            assert!(says_allow || !decision.is_allowed(), "{method} {path} passes what allows nothing");
        }
    }
    let is_plain = matches!(intention.rule, Rule::Action(Action::Allow));
    assert!(is_plain || !table.of_stream(Some(&web), &db, |_, _| {}).is_allowed(), "a stream passes permissions");
    true
}

/// The body of a config entry; whether it is one. It is named by what it says, and says the same when it is written again.
pub(super) fn entry(bytes: &[u8]) -> bool {
    let Ok(body) = ConfigBody::from_bytes(bytes) else { return false };
    assert_eq!(body.to_bytes().unwrap(), bytes, "a body that has two encodings");
    let Some(text) = body.0 else { return true };
    let Ok((kind, name)) = check_entry(&text) else { return false };
    let id: DocumentName = format!("{kind}:{name}").parse().expect("a kind and a name are a document's name");
    assert_eq!(entry_ends(&id), Some((kind.as_str(), name.as_str())));
    let value: Value = serde_json::from_str(&text).unwrap();
    if let Ok(again) = check_entry(&value.to_string()) {
        assert_eq!(again, (kind, name), "written again it is another entry");
    }
    true
}

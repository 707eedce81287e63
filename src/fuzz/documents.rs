//! Signed documents.

use super::{NOW, fixture};
use crate::policy::{Document, DocumentSet, Offered, RevocationBody, RootLink, walk};

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

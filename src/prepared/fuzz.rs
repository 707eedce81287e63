//! What a client's body can say: see `crate::fuzz`.

#![allow(clippy::unwrap_used, reason = "a target fails by panicking")]

use std::sync::Arc;

use super::{Book, Definition};
use crate::lww::{Body, Row, Stamp};

/// Names that queries are asked by: none, what templates begin with, what they are made of, what has no place to cut.
const NAMES: [&str; 6] = ["", "geo-db", "GEO-", "${name.full}", "é-ü", "a.b"];

/// The body of a prepared query; whether it is one. What is kept of it is the same query when it is read again, is found by its
/// name, and every name that it takes as a template becomes a query or nothing.
pub(crate) fn definition(bytes: &[u8]) -> bool {
    let Ok(definition) = Definition::parse(bytes) else { return false };
    let kept = serde_json::to_vec(&definition).unwrap();
    assert_eq!(Definition::parse(&kept).as_ref(), Ok(&definition), "written again it is another query");
    let _seconds = definition.ttl_s();
    let stamp = Stamp { ms: 1, count: 0, node: "n1".parse().unwrap() };
    let body = Some(Arc::new(Body { flags: 0, value: kept }));
    let row = (Arc::from("id"), Row { stamp, sum: 0, body, created: 1, modified: 1 });
    let book = Book::of([&row]);
    assert_eq!(book.find("id").as_ref(), Some(&definition));
    if !definition.name.is_empty() && !definition.is_template() {
        assert_eq!(book.find(&definition.name.to_ascii_uppercase()).as_ref(), Some(&definition));
    }
    for name in NAMES.into_iter().chain([definition.name.as_str()]) {
        let found = book.find(name);
        assert!(found.is_none_or(|found| found.dns == definition.dns), "another query answers");
    }
    true
}

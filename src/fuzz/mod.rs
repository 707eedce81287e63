//! What fuzzers call: one function for each form of bytes that a stranger or a peer can send.
//!
//! ```text
//!   tests/fuzz (cargo-fuzz) --\
//!   tests below: corpus, seeded mutations --> run(target, bytes) -> the parser, then the rule that must hold
//! ```
//!
//! A target panics where a rule is broken: something panics inside, what was read does not survive being written, or a
//! signature counts for more than was signed. The last is checked against the signed things of the corpus: whatever is
//! made of their bytes, nothing is believed that says something else than they do.
//!
//! Only in tests and under `cfg(fuzzing)` (which cargo-fuzz sets): no agent carries it.
//! Not here: the exchanges around the bytes (their own tests), how much is sent (bounds of the streams).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a target fails by panicking"
)]

mod documents;
mod fixture;
mod gossip;
mod rules;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::fixture::{NONCE, NOW, fixture};
use crate::wire;

/// One form of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and that of its corpus below tests/fuzz/corpus.
    pub name: &'static str,
    run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: [Target; 21] = [
    Target { name: "extension", run: crate::pki::fuzz::extension },
    Target { name: "chain", run: crate::pki::fuzz::chain },
    Target { name: "token", run: crate::pki::fuzz::token },
    Target { name: "join", run: crate::pki::fuzz::join },
    Target { name: "operator", run: |bytes| said(crate::pki::fuzz::operator(bytes)) },
    Target { name: "document", run: documents::document },
    Target { name: "shared", run: |bytes| said(crate::gossip::fuzz_shared(bytes)) },
    Target { name: "documents", run: |bytes| said(crate::gossip::fuzz_documents(bytes)) },
    Target { name: "intention", run: |bytes| said(documents::intention(bytes)) },
    Target { name: "entry", run: |bytes| said(documents::entry(bytes)) },
    Target { name: "rules", run: |bytes| said(rules::entries(bytes)) },
    Target { name: "packet", run: crate::membership::fuzz::packet },
    Target { name: "exchange", run: gossip::exchange },
    Target { name: "delta", run: gossip::delta },
    Target { name: "preamble", run: crate::proxy::fuzz::preamble },
    Target { name: "head", run: crate::proxy::fuzz::head },
    Target { name: "definition", run: crate::registry::fuzz::definition },
    Target { name: "prepared", run: |bytes| said(crate::prepared::fuzz::definition(bytes)) },
    Target { name: "dns", run: crate::dns::fuzz::message },
    Target { name: "query", run: crate::api::fuzz::query },
    Target { name: "filter", run: |bytes| said(crate::filter::fuzz::expression(bytes)) },
];

/// Whether the bytes were taken is for the tests of the corpus alone.
fn said(_is_taken: bool) {}

/// Runs the target of this name on `bytes`.
///
/// # Panics
/// If a rule is broken, or there is no such target.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of TARGETS");
    (target.run)(bytes);
}

/// Decodes a message; what decodes must survive being encoded, in no more bytes than it came in.
pub(crate) fn stable<T: Serialize + DeserializeOwned>(bytes: &[u8], bytes_max: usize) -> Option<T> {
    let value: T = wire::decode(bytes, bytes_max).ok()?;
    let again = wire::encode(&value).expect("what was decoded encodes");
    assert!(again.len() <= bytes.len(), "{} bytes became {}", bytes.len(), again.len());
    let back: T = wire::decode(&again, bytes_max).expect("what was encoded decodes");
    assert_eq!(wire::encode(&back).unwrap(), again, "an encoding that does not stand");
    Some(value)
}

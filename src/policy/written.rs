//! The bodies of intentions and config entries: what is written, or that it is deleted.
//!
//! A deletion is a newer version that says nothing: a document that is gone could come back with any node that was off.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document::{DocumentError, DocumentName, decode_body};
use crate::authz::{Intention, Party};
use crate::traffic;
use crate::upstream;
use crate::wire;

/// Largest config entry, in bytes of its JSON.
pub const ENTRY_BYTES_MAX: usize = 32 * 1024;

/// Kinds of config entries, as Consul names them, and weft's own `service-faults`. Intentions are documents of their own.
pub const ENTRY_KINDS: [&str; 10] = [
    "service-defaults",
    "proxy-defaults",
    "service-router",
    "service-splitter",
    "service-resolver",
    "service-faults",
    "mesh",
    "ingress-gateway",
    "terminating-gateway",
    "exported-services",
];

/// Those of them that are kept and spread as they are, and that nothing acts on: for clients that write them.
pub const INERT_KINDS: [&str; 3] = ["mesh", "terminating-gateway", "exported-services"];

/// An intention; none: it is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentionBody(pub Option<Intention>);

impl IntentionBody {
    /// Writes the body.
    ///
    /// # Errors
    /// [`DocumentError::Decode`] if it does not encode.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DocumentError> {
        wire::encode(self).map_err(DocumentError::Decode)
    }

    /// Reads a body and holds it against its bounds.
    ///
    /// # Errors
    /// [`DocumentError`]: malformed, not canonical, or over a bound.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        let body: Self = decode_body(bytes)?;
        match body.0.as_ref().map(Intention::check) {
            Some(Err(error)) => Err(DocumentError::Intention(error)),
            _ => Ok(body),
        }
    }
}

/// Takes the two ends out of the name of an intention's document, `source:destination`.
pub fn intention_ends(name: &DocumentName) -> Option<(Party, Party)> {
    let (source, destination) = name.as_str().split_once(':')?;
    Some((source.parse().ok()?, destination.parse().ok()?))
}

/// A config entry; none: it is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigBody(pub Option<String>);

impl ConfigBody {
    /// Writes the body.
    ///
    /// # Errors
    /// [`DocumentError::Decode`] if it does not encode.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DocumentError> {
        wire::encode(self).map_err(DocumentError::Decode)
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`DocumentError`]: malformed or not canonical.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        decode_body(bytes)
    }
}

/// Takes kind and name out of the name of a config entry's document, `kind:name`.
pub fn entry_ends(name: &DocumentName) -> Option<(&str, &str)> {
    let (kind, entry) = name.as_str().split_once(':')?;
    (ENTRY_KINDS.contains(&kind) && is_entry_name(entry)).then_some((kind, entry))
}

fn is_entry_name(name: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !name.is_empty() && name.len() <= 63 && name.bytes().all(is_allowed)
}

/// Reads a config entry in JSON: an object whose `Kind` and `Name` are known ones; returns both.
///
/// # Errors
/// [`DocumentError::Entry`] saying what it must be like.
pub fn check_entry(text: &str) -> Result<(String, String), DocumentError> {
    let (kind, name, value) = entry_head(text)?;
    upstream::check(&kind, &value).map_err(|problems| {
        let named: Vec<String> = problems.iter().map(ToString::to_string).collect();
        DocumentError::Entry(named.join("; "))
    })?;
    Ok((kind, name))
}

/// Reads kind, name and JSON of an entry that is to be written, and holds it against what every entry must be like. Where
/// how instances are called is wrong, what is wrong with its requests is named, too: one write shows all there is to mend.
///
/// # Errors
/// [`DocumentError::Entry`].
pub(super) fn check_written(text: &str) -> Result<(String, String), DocumentError> {
    let (kind, name, value) = entry_head(text)?;
    let Err(problems) = upstream::check(&kind, &value) else { return Ok((kind, name)) };
    let mut named: Vec<String> = problems.iter().map(ToString::to_string).collect();
    if let Err(others) = traffic::Ready::new(&kind, &value) {
        named.extend(others.0.iter().map(ToString::to_string));
    }
    Err(DocumentError::Entry(named.join("; ")))
}

fn entry_head(text: &str) -> Result<(String, String, Value), DocumentError> {
    let bad = |rule: &str| DocumentError::Entry(rule.to_owned());
    if text.len() > ENTRY_BYTES_MAX {
        return Err(bad("a config entry has at most 32 KiB"));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| DocumentError::Entry(error.to_string()))?;
    let Value::Object(fields) = value else { return Err(bad("a config entry is a JSON object")) };
    let field = |wanted: &str| {
        let found = fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found.and_then(|(_, value)| value.as_str()).unwrap_or_default().to_owned()
    };
    let (kind, mut name) = (field("Kind"), field("Name"));
    // Consul's one entry of its kind.
    if kind == "mesh" && name.is_empty() {
        "mesh".clone_into(&mut name);
    }
    if kind == "service-intentions" {
        return Err(bad(
            "intentions are no config entries here: use `weft intention create`, one per source, or PUT /v1/config of an agent with policy_authority",
        ));
    }
    if !ENTRY_KINDS.contains(&kind.as_str()) {
        return Err(DocumentError::Entry(format!("Kind {kind:?} is none of {}", ENTRY_KINDS.join(", "))));
    }
    if kind == "proxy-defaults" && name != "global" {
        return Err(bad("the Name of proxy-defaults is \"global\""));
    }
    if is_entry_name(&name) {
        Ok((kind, name, Value::Object(fields)))
    } else {
        Err(bad("Name must be 1 to 63 letters, digits, `-`, `_`, `.`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_by_someone_or_said_to_be_without_effect() {
        let mut known: Vec<&str> = traffic::KINDS.iter().chain(&INERT_KINDS).copied().collect();
        let mut all = ENTRY_KINDS.to_vec();
        known.sort_unstable();
        all.sort_unstable();
        assert_eq!(known, all);
    }

    #[test]
    fn what_is_wrong_with_balancing_and_with_requests_is_named_at_once() {
        let text =
            r#"{"Kind":"service-resolver","Name":"web","LoadBalancer":{"Policy":"best"},"ConnectTimeout":"soon"}"#;
        let said = check_written(text).unwrap_err().to_string();
        assert!(said.contains("LoadBalancer.Policy") && said.contains("ConnectTimeout"), "{said}");
    }
}

//! What the operators have taken back: keys, nodes' certificates, tokens, issuers.
//!
//! A key is named by its SPKI hash: the same key stays revoked in another certificate, and a signature that is written
//! differently (ECDSA allows it) changes nothing. A node is named with a time, because it may have renewed its key
//! without anybody having seen the new one: whatever was made for that name until then is refused.
//!
//! Not here: who may revoke and how the word spreads (`policy`, `gossip`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;

use super::verify::VerifyError;
use crate::clock::UnixSeconds;
use crate::model::NodeName;

/// SHA-256 of a certificate's SubjectPublicKeyInfo in DER (as RFC 7469 §2.4 pins it).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpkiHash(pub [u8; 32]);

impl SpkiHash {
    /// Hashes the key of a parsed certificate.
    pub(super) fn of(certificate: &X509Certificate<'_>) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, certificate.public_key().raw).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpkiHash({self})")
    }
}

/// The text is no SPKI hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an SPKI hash is 64 hexadecimal digits")]
pub struct SpkiHashError;

impl FromStr for SpkiHash {
    type Err = SpkiHashError;

    fn from_str(text: &str) -> Result<Self, SpkiHashError> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SpkiHashError);
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            let pair = text.get(at * 2..at * 2 + 2).ok_or(SpkiHashError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| SpkiHashError)?;
        }
        Ok(Self(bytes))
    }
}

/// One thing that is taken back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Revoked {
    /// A key, wherever in a chain it stands.
    Key(SpkiHash),
    /// Every certificate of a node that begins at this time or before.
    Node {
        /// The node.
        node: NodeName,
        /// The latest beginning that is refused.
        until: UnixSeconds,
    },
    /// A join token, by its id.
    Token([u8; 16]),
    /// An issuer that is retired: what it signs from this time on is refused, what it signed before stays good.
    Issuer {
        /// Its key.
        key: SpkiHash,
        /// When it ends.
        from: UnixSeconds,
    },
}

/// What is revoked at one moment. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocations(Arc<Lists>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Lists {
    keys: BTreeSet<SpkiHash>,
    nodes: BTreeMap<NodeName, UnixSeconds>,
    tokens: BTreeSet<[u8; 16]>,
    retired: BTreeMap<SpkiHash, UnixSeconds>,
}

impl FromIterator<Revoked> for Revocations {
    fn from_iter<I: IntoIterator<Item = Revoked>>(entries: I) -> Self {
        let mut lists = Lists::default();
        for entry in entries {
            match entry {
                Revoked::Key(key) => drop(lists.keys.insert(key)),
                Revoked::Token(id) => drop(lists.tokens.insert(id)),
                // Two words on one name: the one that refuses more.
                Revoked::Node { node, until } => {
                    let held = lists.nodes.entry(node).or_insert(until);
                    *held = until.max(*held);
                }
                Revoked::Issuer { key, from } => {
                    let held = lists.retired.entry(key).or_insert(from);
                    *held = from.min(*held);
                }
            }
        }
        Self(Arc::new(lists))
    }
}

impl Revocations {
    /// Tells whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        *self.0 == Lists::default()
    }

    /// Tells whether a key is revoked.
    pub fn has_key(&self, key: &SpkiHash) -> bool {
        self.0.keys.contains(key)
    }

    /// Up to which beginning a node's certificates are revoked, if they are.
    pub fn node_until(&self, node: &NodeName) -> Option<UnixSeconds> {
        self.0.nodes.get(node).copied()
    }

    /// Tells whether a token is revoked.
    pub fn has_token(&self, id: &[u8; 16]) -> bool {
        self.0.tokens.contains(id)
    }

    /// Tells whether an issuer may sign at `now`: it is neither revoked nor retired.
    pub fn may_issue(&self, issuer: &SpkiHash, now: UnixSeconds) -> bool {
        !self.has_key(issuer) && self.0.retired.get(issuer).is_none_or(|from| now < *from)
    }

    /// Checks what a peer showed.
    ///
    /// # Errors
    /// [`VerifyError::Revoked`], [`VerifyError::NodeRevoked`] or [`VerifyError::IssuerRetired`].
    pub fn check(&self, shown: &Presented) -> Result<(), VerifyError> {
        for (role, key) in shown.keys() {
            if self.has_key(&key) {
                return Err(VerifyError::Revoked { role, key });
            }
        }
        if let Some(until) = self.0.nodes.get(&shown.node)
            && shown.made <= *until
        {
            return Err(VerifyError::NodeRevoked { node: shown.node.clone(), until: *until });
        }
        match self.0.retired.get(&shown.issuer) {
            Some(from) if shown.made >= *from => Err(VerifyError::IssuerRetired { key: shown.issuer, from: *from }),
            _ => Ok(()),
        }
    }
}

/// What stays remembered of a verified chain, so that it can be held against later revocations without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presented {
    /// The leaf's key; none for a published chain, which has no leaf.
    pub leaf: Option<SpkiHash>,
    /// The node intermediate's key.
    pub intermediate: SpkiHash,
    /// The issuer's key.
    pub issuer: SpkiHash,
    /// The node.
    pub node: NodeName,
    /// Beginning of the node intermediate.
    pub made: UnixSeconds,
    /// End of the node intermediate or its issuer, the earlier.
    pub signers_end: UnixSeconds,
}

impl Presented {
    fn keys(&self) -> impl Iterator<Item = (&'static str, SpkiHash)> {
        let leaf = self.leaf.map(|key| ("leaf", key));
        leaf.into_iter().chain([("node", self.intermediate), ("issuer", self.issuer)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> SpkiHash {
        SpkiHash([byte; 32])
    }

    fn shown() -> Presented {
        Presented {
            leaf: Some(key(1)),
            intermediate: key(2),
            issuer: key(3),
            node: "a".parse().unwrap(),
            made: UnixSeconds(1000),
            signers_end: UnixSeconds(9000),
        }
    }

    #[test]
    fn a_key_is_refused_anywhere_in_the_chain_and_named_by_its_place() {
        #[track_caller]
        fn check(entries: &[Revoked], want: Option<&VerifyError>) {
            let revocations: Revocations = entries.iter().cloned().collect();
            assert_eq!(revocations.check(&shown()).err().as_ref(), want);
        }
        check(&[], None);
        check(&[Revoked::Key(key(9))], None);
        for (role, byte) in [("leaf", 1), ("node", 2), ("issuer", 3)] {
            check(&[Revoked::Key(key(byte))], Some(&VerifyError::Revoked { role, key: key(byte) }));
        }
    }

    #[test]
    fn a_node_is_refused_for_what_was_made_until_then_and_not_after() {
        let node: NodeName = "a".parse().unwrap();
        let revoked = |until| Revoked::Node { node: node.clone(), until: UnixSeconds(until) };
        let refused = |entries: Vec<Revoked>| entries.into_iter().collect::<Revocations>().check(&shown()).is_err();
        assert!(refused(vec![revoked(1000)]));
        assert!(!refused(vec![revoked(999)]), "a certificate made later was granted by the operator");
        assert!(refused(vec![revoked(1000), revoked(5)]) && refused(vec![revoked(5), revoked(1000)]));
        let other = Revoked::Node { node: "b".parse().unwrap(), until: UnixSeconds(5000) };
        assert!(!refused(vec![other]));
    }

    #[test]
    fn a_retired_issuer_keeps_what_it_signed_before() {
        let retired = |from| Revocations::from_iter([Revoked::Issuer { key: key(3), from: UnixSeconds(from) }]);
        assert_eq!(retired(1001).check(&shown()), Ok(()));
        assert!(matches!(retired(1000).check(&shown()), Err(VerifyError::IssuerRetired { .. })));
        assert!(retired(1000).may_issue(&key(3), UnixSeconds(999)));
        assert!(!retired(1000).may_issue(&key(3), UnixSeconds(1000)));
        assert!(retired(1000).may_issue(&key(4), UnixSeconds(1000)));
    }

    #[test]
    fn a_hash_survives_its_text() {
        let hash = SpkiHash([0xa7; 32]);
        assert_eq!(hash.to_string().parse(), Ok(hash));
        for bad in ["", "a7", &"g".repeat(64), &"a".repeat(65), &"é".repeat(32)] {
            assert_eq!(bad.parse::<SpkiHash>(), Err(SpkiHashError), "{bad}");
        }
    }
}

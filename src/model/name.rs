//! Names: of nodes, services, instances, checks and the trust domain.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest node or service name, in bytes: one DNS label (RFC 1035 §2.3.4).
pub const NAME_BYTES_MAX: usize = 63;
/// Longest instance or check id, in bytes.
pub const ID_BYTES_MAX: usize = 255;
/// Longest trust domain, in bytes (SPIFFE-ID §2.1).
pub const TRUST_DOMAIN_BYTES_MAX: usize = 255;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("{what} is empty")]
    Empty {
        /// The kind of name.
        what: &'static str,
    },
    /// The text is longer than the bound.
    #[error("{what} `{start}…` has {bytes} bytes; at most {bytes_max} are allowed")]
    TooLong {
        /// The kind of name.
        what: &'static str,
        /// The beginning of the text.
        start: String,
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// A character outside the allowed set.
    #[error("{what} `{text}` has the character {found:?}; allowed are {allowed}")]
    Character {
        /// The kind of name.
        what: &'static str,
        /// The text.
        text: String,
        /// The offending character.
        found: char,
        /// The allowed set, in words.
        allowed: &'static str,
    },
}

/// What kind of text a name type takes.
struct Rule {
    what: &'static str,
    bytes_max: usize,
    allowed: &'static str,
    is_allowed: fn(char) -> bool,
    starts_with: fn(char) -> bool,
}

impl Rule {
    fn parse(&self, text: &str) -> Result<Arc<str>, NameError> {
        let what = self.what;
        let Some(first) = text.chars().next() else { return Err(NameError::Empty { what }) };
        if text.len() > self.bytes_max {
            let start = text.chars().take(16).collect();
            return Err(NameError::TooLong { what, start, bytes: text.len(), bytes_max: self.bytes_max });
        }
        let bad = if (self.starts_with)(first) { text.chars().find(|c| !(self.is_allowed)(*c)) } else { Some(first) };
        match bad {
            Some(found) => Err(NameError::Character { what, text: text.to_owned(), found, allowed: self.allowed }),
            None => Ok(Arc::from(text)),
        }
    }
}

const LABEL_ALLOWED: &str = "letters, digits, `-`, `_` and `.`, beginning with a letter or digit";

const ID_ALLOWED: &str = "printable characters but white space: write `-` or `_` in its place";

fn is_label(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

fn is_alphanumeric(c: char) -> bool {
    c.is_ascii_alphanumeric()
}

fn is_printable(c: char) -> bool {
    !c.is_control() && !c.is_whitespace()
}

macro_rules! name {
    ($(#[$meta:meta])* $type:ident, $rule:expr) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            const RULE: Rule = $rule;

            /// Returns the text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// Tells whether another value holds the same text in memory.
            pub fn is_shared(&self) -> bool {
                Arc::strong_count(&self.0) > 1
            }

            /// Tells whether both are one text in memory.
            pub fn shares_text(&self, other: &Self) -> bool {
                Arc::ptr_eq(&self.0, &other.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::RULE.parse(text).map(Self)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name!(
    /// The name of a node: unique among live members, 1 to 63 bytes.
    NodeName,
    Rule {
        what: "node name",
        bytes_max: NAME_BYTES_MAX,
        allowed: LABEL_ALLOWED,
        is_allowed: is_label,
        starts_with: is_alphanumeric
    }
);
name!(
    /// The name of a service, 1 to 63 bytes.
    ServiceName,
    Rule {
        what: "service name",
        bytes_max: NAME_BYTES_MAX,
        allowed: LABEL_ALLOWED,
        is_allowed: is_label,
        starts_with: is_alphanumeric
    }
);
name!(
    /// The id of a service instance, unique on its node (Consul's service ID), 1 to 255 bytes without white space.
    InstanceId,
    Rule {
        what: "service ID",
        bytes_max: ID_BYTES_MAX,
        allowed: ID_ALLOWED,
        is_allowed: is_printable,
        starts_with: is_printable
    }
);
name!(
    /// The id of a check, unique on its node, 1 to 255 bytes without white space.
    CheckId,
    Rule {
        what: "check ID",
        bytes_max: ID_BYTES_MAX,
        allowed: ID_ALLOWED,
        is_allowed: is_printable,
        starts_with: is_printable
    }
);
name!(
    /// A trust domain (SPIFFE-ID §2.1): lower-case letters, digits, `.`, `-`, `_`; 1 to 255 bytes.
    TrustDomain,
    Rule {
        what: "trust domain",
        bytes_max: TRUST_DOMAIN_BYTES_MAX,
        allowed: "lower-case letters, digits, `.`, `-` and `_`, beginning with a letter or digit",
        is_allowed: |c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_'),
        starts_with: |c| c.is_ascii_lowercase() || c.is_ascii_digit()
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_it_was_parsed_from() {
        assert_eq!("web-1".parse::<NodeName>().unwrap().as_str(), "web-1");
        assert_eq!("api_v2.x".parse::<ServiceName>().unwrap().to_string(), "api_v2.x");
        assert_eq!("service:web-1:2".parse::<CheckId>().unwrap().as_str(), "service:web-1:2");
    }

    #[test]
    fn bad_names_say_what_is_wrong_with_them() {
        let check = |text: &str, want: &str| {
            let got = text.parse::<ServiceName>().unwrap_err().to_string();
            assert!(got.contains(want), "{got}");
        };
        check("", "service name is empty");
        check("a b", "' '");
        check("-a", "'-'");
        check("ä", "'ä'");
        let spaced = "web 1".parse::<InstanceId>().unwrap_err().to_string();
        assert!(spaced.contains("`web 1` has the character ' '") && spaced.contains("write `-` or `_`"), "{spaced}");
        check(&"a".repeat(64), "has 64 bytes; at most 63");
        assert!("Prod".parse::<TrustDomain>().is_err());
    }
}

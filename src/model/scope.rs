//! Which services a node may serve: patterns over service names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::name::{NAME_BYTES_MAX, NameError};

/// A name or a pattern of names: letters, digits, `-`, `_`, `.` and `*` for any run of characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern(String);

impl NamePattern {
    /// Tells whether `name` matches: every `*` stands for zero or more characters.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let mut last = None;
        for part in parts {
            // The part before this one may end anywhere, so the leftmost place serves.
            if let Some(middle) = last.replace(part) {
                match str::find(rest, middle) {
                    Some(at) => rest = rest.get(at + middle.len()..).unwrap_or_default(),
                    None => return false,
                }
            }
        }
        match last {
            Some(tail) => rest.ends_with(tail),
            None => rest.is_empty(),
        }
    }

    /// Returns the pattern's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NamePattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let what = "name pattern";
        if text.is_empty() {
            return Err(NameError::Empty { what });
        }
        if text.len() > NAME_BYTES_MAX {
            let start = text.chars().take(16).collect();
            return Err(NameError::TooLong { what, start, bytes: text.len(), bytes_max: NAME_BYTES_MAX });
        }
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '*');
        match text.chars().find(|c| !is_allowed(*c)) {
            Some(found) => Err(NameError::Character {
                what,
                text: text.to_owned(),
                found,
                allowed: "letters, digits, `-`, `_`, `.` and `*`",
            }),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for NamePattern {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.0
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Most patterns in one scope.
pub const SCOPE_PATTERNS_MAX: usize = 64;

/// Why a text is no serve scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// A pattern is malformed.
    #[error("serve scope `{text}` has a malformed pattern")]
    Pattern {
        /// The scope's text.
        text: String,
        /// What is wrong.
        #[source]
        source: NameError,
    },
    /// More patterns than allowed.
    #[error("serve scope has {found} patterns; at most {SCOPE_PATTERNS_MAX} are allowed")]
    TooMany {
        /// Their number.
        found: usize,
    },
}

/// The services that a node may serve and speak as: a union of patterns, `web,api-*`. The empty scope serves nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<NamePattern>", into = "Vec<NamePattern>")]
pub struct ServeScope(Vec<NamePattern>);

impl TryFrom<Vec<NamePattern>> for ServeScope {
    type Error = ScopeError;

    fn try_from(patterns: Vec<NamePattern>) -> Result<Self, ScopeError> {
        if patterns.len() > SCOPE_PATTERNS_MAX {
            return Err(ScopeError::TooMany { found: patterns.len() });
        }
        Ok(Self(patterns))
    }
}

impl From<ServeScope> for Vec<NamePattern> {
    fn from(scope: ServeScope) -> Self {
        scope.0
    }
}

impl ServeScope {
    /// Tells whether the scope covers the service `name`.
    pub fn covers(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(name))
    }

    /// Returns the patterns.
    pub fn patterns(&self) -> &[NamePattern] {
        &self.0
    }
}

impl FromStr for ServeScope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let pattern =
            |part: &str| part.trim().parse().map_err(|source| ScopeError::Pattern { text: text.to_owned(), source });
        let patterns = text.split(',').map(pattern).collect::<Result<Vec<NamePattern>, _>>()?;
        Self::try_from(patterns)
    }
}

impl fmt::Display for ServeScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, pattern) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{pattern}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        #[track_caller]
        fn check(pattern: &str, name: &str, want: bool) {
            assert_eq!(pattern.parse::<NamePattern>().unwrap().matches(name), want, "{pattern} on {name}");
        }
        check("web", "web", true);
        check("web", "web2", false);
        check("web-*", "web-", true);
        check("web-*", "web-12", true);
        check("web-*", "we", false);
        check("*", "x", true);
        check("a*b*c", "a1b2c", true);
        check("a*b*c", "abcb", false);
        check("a*a", "a", false);
        check("*-db", "users-db", true);
        check("*b*", "abc", true);
        check("a**c", "abc", true);
    }

    #[test]
    fn a_scope_is_a_union_and_the_empty_one_covers_nothing() {
        let scope: ServeScope = "web, api-*".parse().unwrap();
        assert!(scope.covers("web") && scope.covers("api-2") && !scope.covers("payments"));
        assert_eq!(scope.to_string(), "web,api-*");
        assert!(!"".parse::<ServeScope>().unwrap().covers("web"));
        assert!("web,,x".parse::<ServeScope>().is_err());
    }
}

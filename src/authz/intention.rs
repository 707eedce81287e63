//! What an operator writes: who may call whom, and which requests.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::{NameError, ServiceName};

/// Largest intention, in bytes of its texts together: beside its signature it must fit a document.
pub const INTENTION_BYTES_MAX: usize = 32 * 1024;
/// Most permissions of one intention: the first match is sought one by one.
const PERMISSIONS_MAX: usize = 64;
/// Most methods of one permission: HTTP has nine.
const METHODS_MAX: usize = 16;
/// Most headers of one permission.
const HEADERS_MAX: usize = 16;
/// Most regular expressions of one intention, of its paths and headers together: each may take some 100 KiB once compiled.
const REGEXES_MAX: usize = 32;
/// Headers of which the destination sees none, or not what the caller sent: they end at the first hop (RFC 9110 §7.6.1), or
/// are weft's own. A permission over them would never match, and deny or allow something else than its author meant.
const HEADERS_UNSEEN: [&str; 7] =
    ["host", "connection", "keep-alive", "te", "transfer-encoding", "upgrade", "x-forwarded-client-cert"];
/// Beginnings of such headers.
const HEADERS_UNSEEN_PREFIXES: [&str; 2] = ["proxy-", "x-weft-"];
/// Longest path, header value or regex, in bytes.
const TEXT_BYTES_MAX: usize = 1024;
/// Longest description, in bytes: Consul's bound.
const DESCRIPTION_BYTES_MAX: usize = 512;
/// Most pairs of meta, and the longest key and value in bytes: Consul's bounds.
const META_MAX: (usize, usize, usize) = (64, 128, 512);

/// One end of a call: a service, or any.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Party {
    /// `*`
    Any,
    /// A service.
    Service(ServiceName),
}

impl Party {
    /// The name, or `*`.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Any => "*",
            Self::Service(name) => name.as_str(),
        }
    }

    /// Whether it stands for any service.
    pub fn is_any(&self) -> bool {
        matches!(self, Self::Any)
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Party {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text == "*" { Ok(Self::Any) } else { text.parse().map(Self::Service) }
    }
}

impl TryFrom<String> for Party {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Party> for String {
    fn from(party: Party) -> Self {
        party.as_str().to_owned()
    }
}

/// What becomes of a call. On the wire the number of the variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// It passes.
    Allow,
    /// It is refused.
    Deny,
}

impl Action {
    /// `allow` or `deny`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether an intention counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// It decides.
    Enforce,
    /// Dry run: what it would decide is logged and counted, the next intention decides.
    Audit,
}

/// How a request's path is told, without its query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathRule {
    /// The whole path.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// The whole path by a regular expression.
    Regex(String),
}

/// What a header must be like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeaderTest {
    /// It is there.
    Present,
    /// The whole value.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// Its end.
    Suffix(String),
    /// Any part of it.
    Contains(String),
    /// The whole value by a regular expression.
    Regex(String),
}

/// A test of one header; of several values one must pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderRule {
    /// Name in lower case.
    pub name: String,
    /// The test.
    pub test: HeaderTest,
    /// Whether it must fail.
    pub is_inverted: bool,
}

/// What becomes of the requests that it matches: all of its tests must pass; none: every request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permission {
    /// What becomes of them.
    pub action: Action,
    /// The path; none: any.
    pub path: Option<PathRule>,
    /// Methods in upper case; none: any.
    pub methods: Vec<String>,
    /// Headers.
    pub headers: Vec<HeaderRule>,
}

/// What an intention says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// The same of every call.
    Action(Action),
    /// By request, in order; where none matches, the default decides.
    Permissions(Vec<Permission>),
}

/// Who may call whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intention {
    /// The caller.
    pub source: Party,
    /// The called.
    pub destination: Party,
    /// What is decided.
    pub rule: Rule,
    /// Whether it counts.
    pub mode: Mode,
    /// For people.
    pub description: String,
    /// For tools.
    pub meta: BTreeMap<String, String>,
}

/// Why an intention is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntentionError {
    /// There are none, or too many.
    #[error("an intention has an action, or 1 to {PERMISSIONS_MAX} permissions; this one has {found}")]
    Permissions {
        /// How many.
        found: usize,
    },
    /// A permission is malformed.
    #[error("permission {number}: {rule}")]
    Permission {
        /// Which one, from 1.
        number: usize,
        /// What it must be like.
        rule: &'static str,
    },
    /// It has too many regular expressions.
    #[error(
        "an intention has at most {REGEXES_MAX} regular expressions; this one has {found}: join some by `|`, or use prefixes"
    )]
    Regexes {
        /// How many.
        found: usize,
    },
    /// A text is too long.
    #[error("{what} is over its bound of {bytes_max} bytes")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// The bound.
        bytes_max: usize,
    },
}

impl Intention {
    /// An intention that allows or denies every call.
    pub fn plain(source: Party, destination: Party, action: Action) -> Self {
        let (description, meta) = (String::new(), BTreeMap::new());
        Self { source, destination, rule: Rule::Action(action), mode: Mode::Enforce, description, meta }
    }

    /// How exact it is, in Consul's numbers: 9, 8, 6 or 5.
    pub fn precedence(&self) -> u8 {
        match (self.source.is_any(), self.destination.is_any()) {
            (false, false) => 9,
            (true, false) => 8,
            (false, true) => 6,
            (true, true) => 5,
        }
    }

    /// Its name among all: `source:destination`.
    pub fn name(&self) -> String {
        format!("{}:{}", self.source, self.destination)
    }

    /// Its id for Consul's older endpoints: a UUID of version 5 over its name, the same on every node and for every version.
    pub fn id(&self) -> uuid::Uuid {
        uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, self.name().as_bytes())
    }

    /// Holds it against the bounds; regular expressions are not looked into.
    ///
    /// # Errors
    /// The bound that it breaks.
    pub fn check(&self) -> Result<(), IntentionError> {
        let too_long = |what, bytes_max| Err(IntentionError::TooLong { what, bytes_max });
        if self.description.len() > DESCRIPTION_BYTES_MAX {
            return too_long("the description", DESCRIPTION_BYTES_MAX);
        }
        let (pairs, key, value) = META_MAX;
        if self.meta.len() > pairs || self.meta.iter().any(|(k, v)| k.len() > key || v.len() > value) {
            return too_long("meta (64 pairs, keys of 128, values of 512 bytes)", key + value);
        }
        let Rule::Permissions(permissions) = &self.rule else { return Ok(()) };
        if permissions.is_empty() || permissions.len() > PERMISSIONS_MAX {
            return Err(IntentionError::Permissions { found: permissions.len() });
        }
        for (at, permission) in permissions.iter().enumerate() {
            permission.check().map_err(|rule| IntentionError::Permission { number: at + 1, rule })?;
        }
        let regexes = permissions.iter().map(Permission::regexes).sum();
        if regexes > REGEXES_MAX {
            return Err(IntentionError::Regexes { found: regexes });
        }
        let bytes: usize = permissions.iter().flat_map(Permission::texts).map(str::len).sum();
        if bytes > INTENTION_BYTES_MAX { too_long("the intention", INTENTION_BYTES_MAX) } else { Ok(()) }
    }
}

impl Permission {
    fn check(&self) -> Result<(), &'static str> {
        if self.methods.len() > METHODS_MAX || self.headers.len() > HEADERS_MAX {
            return Err("at most 16 methods and 16 headers");
        }
        if self.texts().any(|text| text.len() > TEXT_BYTES_MAX) {
            return Err("a path, value or regex has at most 1024 bytes");
        }
        let is_rooted = |path: &str| path.starts_with('/');
        if let Some(PathRule::Exact(path) | PathRule::Prefix(path)) = &self.path
            && (!is_rooted(path) || path.contains(['?', '#']))
        {
            return Err("a path begins with `/` and has no query");
        }
        let is_method = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
        if !self.methods.iter().all(is_method) {
            return Err("a method is in upper case, as GET");
        }
        let is_name = |rule: &HeaderRule| {
            let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
            !rule.name.is_empty() && rule.name.bytes().all(is_allowed)
        };
        if !self.headers.iter().all(is_name) {
            return Err("a header's name is in lower case, as x-team");
        }
        let is_unseen = |rule: &HeaderRule| {
            HEADERS_UNSEEN.contains(&rule.name.as_str())
                || HEADERS_UNSEEN_PREFIXES.iter().any(|prefix| rule.name.starts_with(prefix))
        };
        if self.headers.iter().any(is_unseen) {
            return Err(
                "the destination does not see this header (host, connection, te, upgrade, x-forwarded-client-cert, \
                        proxy-*, x-weft-* and the like): test another",
            );
        }
        // An empty text tests nothing, or only empty values: its author forgot something.
        let is_empty = |rule: &HeaderRule| match &rule.test {
            HeaderTest::Present => false,
            HeaderTest::Exact(text)
            | HeaderTest::Prefix(text)
            | HeaderTest::Suffix(text)
            | HeaderTest::Contains(text)
            | HeaderTest::Regex(text) => text.is_empty(),
        };
        let is_regexless = matches!(&self.path, Some(PathRule::Regex(text)) if text.is_empty());
        if is_regexless || self.headers.iter().any(is_empty) {
            return Err("a regex or a header's value is not empty");
        }
        Ok(())
    }

    fn regexes(&self) -> usize {
        let in_headers = self.headers.iter().filter(|header| matches!(header.test, HeaderTest::Regex(_)));
        usize::from(matches!(self.path, Some(PathRule::Regex(_)))) + in_headers.count()
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let path = self.path.as_ref().map(|path| match path {
            PathRule::Exact(text) | PathRule::Prefix(text) | PathRule::Regex(text) => text.as_str(),
        });
        let headers = self.headers.iter().flat_map(|header| {
            let value = match &header.test {
                HeaderTest::Present => "",
                HeaderTest::Exact(text)
                | HeaderTest::Prefix(text)
                | HeaderTest::Suffix(text)
                | HeaderTest::Contains(text)
                | HeaderTest::Regex(text) => text,
            };
            [header.name.as_str(), value]
        });
        path.into_iter().chain(self.methods.iter().map(String::as_str)).chain(headers)
    }
}

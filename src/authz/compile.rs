//! An intention made ready: its regular expressions compiled, its names shared.

use std::sync::Arc;

use http::HeaderMap;
use http::header::HeaderName;
use regex::bytes::{Regex, RegexBuilder};

use super::intention::{Action, HeaderRule, HeaderTest, Intention, Mode, PathRule, Permission, Rule};
use super::path::{self, Seen};
use super::table::Request;

/// Largest compiled regular expression, in bytes, and as much again for its cache in each worker: hundreds of alternatives
/// of path rules fit. With at most 32 expressions in an intention that is 2 MiB, and 2 MiB per worker.
const REGEX_BYTES_MAX: usize = 64 * 1024;
/// Longest path or header value that an expression is tried on, in bytes; a request with a longer one is denied. Matching is
/// linear in it, at worst with the expression's size as the factor.
pub const REGEX_INPUT_BYTES_MAX: usize = 4096;

/// Why an intention cannot be made ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A regular expression is malformed or too large.
    #[error("regular expression `{text}` is refused: {reason}")]
    Regex {
        /// The expression.
        text: String,
        /// Why, in the library's words.
        reason: String,
    },
    /// A header's name.
    #[error("`{0}` is no header's name")]
    Header(String),
}

/// Where a guard comes from, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// Version of its document.
    pub version: u64,
    /// Who signed it.
    pub signer: String,
}

/// An intention that is ready to decide.
#[derive(Debug)]
pub struct Guard {
    intention: Intention,
    name: Arc<str>,
    origin: Origin,
    permissions: Option<Box<[Ready]>>,
}

#[derive(Debug)]
struct Ready {
    action: Action,
    path: Option<Text>,
    methods: Vec<String>,
    headers: Vec<Header>,
}

#[derive(Debug)]
enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
    Regex(Regex),
}

#[derive(Debug)]
struct Header {
    name: HeaderName,
    /// None: it must be there.
    test: Option<Text>,
    is_inverted: bool,
}

impl Guard {
    /// Makes `intention` ready.
    ///
    /// # Errors
    /// [`CompileError`] naming the expression.
    pub fn compile(intention: Intention, origin: Origin) -> Result<Self, CompileError> {
        let permissions = match &intention.rule {
            Rule::Action(_) => None,
            Rule::Permissions(list) => Some(list.iter().map(ready).collect::<Result<Box<[Ready]>, _>>()?),
        };
        let name = Arc::from(intention.name());
        Ok(Self { intention, name, origin, permissions })
    }

    /// Stands for an intention that cannot be made ready: it denies what that one is about.
    pub fn closed(mut intention: Intention, origin: Origin) -> Self {
        intention.rule = Rule::Action(Action::Deny);
        let name = Arc::from(intention.name());
        Self { intention, name, origin, permissions: None }
    }

    /// What an operator wrote.
    pub fn intention(&self) -> &Intention {
        &self.intention
    }

    /// `source:destination`.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Where it comes from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether it decides.
    pub(super) fn is_enforced(&self) -> bool {
        self.intention.mode == Mode::Enforce
    }

    /// Decides over a stream of bytes: permissions deny it, for nobody sees its requests.
    pub(super) fn stream(&self) -> Action {
        match &self.intention.rule {
            Rule::Action(action) => *action,
            Rule::Permissions(_) => Action::Deny,
        }
    }

    /// Decides over a request; none: the default does.
    pub(super) fn request(&self, request: &Request<'_>, default: Action) -> Action {
        let permissions = match (&self.permissions, &self.intention.rule) {
            (Some(permissions), _) => permissions,
            (None, Rule::Action(action)) => return *action,
            (None, Rule::Permissions(_)) => return Action::Deny,
        };
        let decide = |path: &str| {
            let found = permissions.iter().find(|permission| permission.matches(path, request));
            found.map_or(default, |permission| permission.action)
        };
        if permissions.iter().any(|permission| permission.is_overlong(request)) {
            return Action::Deny;
        }
        match path::look(request.path) {
            Seen::Plain(path) => decide(path),
            Seen::Both(raw, normal) if decide(raw) == Action::Allow => decide(&normal),
            Seen::Both(..) | Seen::Ambiguous => Action::Deny,
        }
    }
}

impl Ready {
    fn matches(&self, path: &str, request: &Request<'_>) -> bool {
        self.path.as_ref().is_none_or(|rule| rule.matches(path.as_bytes()))
            && (self.methods.is_empty() || self.methods.iter().any(|method| self.is_method(method, request.method)))
            && self.headers.iter().all(|header| header.matches(request.headers) != header.is_inverted)
    }
}

impl Ready {
    /// Methods are case-sensitive (RFC 9110 §9.1); apps may not know, so a denial holds for all writings.
    fn is_method(&self, wanted: &str, found: &str) -> bool {
        wanted == found || (self.action == Action::Deny && wanted.eq_ignore_ascii_case(found))
    }

    /// Whether a regular expression would be tried on more than is good.
    fn is_overlong(&self, request: &Request<'_>) -> bool {
        let is_regex = |text: &Text| matches!(text, Text::Regex(_));
        (request.path.len() > REGEX_INPUT_BYTES_MAX && self.path.as_ref().is_some_and(is_regex))
            || self.headers.iter().filter(|header| header.test.as_ref().is_some_and(is_regex)).any(|header| {
                request.headers.get_all(&header.name).iter().any(|value| value.len() > REGEX_INPUT_BYTES_MAX)
            })
    }
}

impl Header {
    fn matches(&self, headers: &HeaderMap) -> bool {
        match &self.test {
            None => headers.contains_key(&self.name),
            Some(text) => headers.get_all(&self.name).iter().any(|value| text.matches(value.as_bytes())),
        }
    }
}

impl Text {
    fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_bytes(),
            Self::Prefix(text) => value.starts_with(text.as_bytes()),
            Self::Suffix(text) => value.ends_with(text.as_bytes()),
            Self::Contains(text) => std::str::from_utf8(value).is_ok_and(|value| value.contains(text.as_str())),
            Self::Regex(regex) => regex.is_match(value),
        }
    }
}

fn ready(permission: &Permission) -> Result<Ready, CompileError> {
    let path = permission.path.as_ref().map(|path| match path {
        PathRule::Exact(text) => Ok(Text::Exact(text.clone())),
        PathRule::Prefix(text) => Ok(Text::Prefix(text.clone())),
        PathRule::Regex(text) => regex(text),
    });
    Ok(Ready {
        action: permission.action,
        path: path.transpose()?,
        methods: permission.methods.clone(),
        headers: permission.headers.iter().map(header).collect::<Result<_, _>>()?,
    })
}

fn header(rule: &HeaderRule) -> Result<Header, CompileError> {
    let name = HeaderName::try_from(rule.name.as_str()).map_err(|_| CompileError::Header(rule.name.clone()))?;
    let test = match &rule.test {
        HeaderTest::Present => None,
        HeaderTest::Exact(text) => Some(Text::Exact(text.clone())),
        HeaderTest::Prefix(text) => Some(Text::Prefix(text.clone())),
        HeaderTest::Suffix(text) => Some(Text::Suffix(text.clone())),
        HeaderTest::Contains(text) => Some(Text::Contains(text.clone())),
        HeaderTest::Regex(text) => Some(regex(text)?),
    };
    Ok(Header { name, test, is_inverted: rule.is_inverted })
}

fn regex(text: &str) -> Result<Text, CompileError> {
    whole(text).map(Text::Regex)
}

/// Compiles an expression that must match the whole text, in linear time (no look-around, no back-references).
///
/// # Errors
/// [`CompileError::Regex`]: malformed, or larger than its bound once compiled.
pub fn whole(text: &str) -> Result<Regex, CompileError> {
    let whole = format!("^(?:{text})$");
    let build = |text: &str| {
        RegexBuilder::new(text).unicode(false).size_limit(REGEX_BYTES_MAX).dfa_size_limit(REGEX_BYTES_MAX).build()
    };
    match build(&whole) {
        // `a)|(?:b` is whole between our brackets and not by itself.
        Ok(regex) if build(text).is_ok() => Ok(regex),
        Ok(_) => Err(CompileError::Regex { text: text.to_owned(), reason: "its brackets do not match".to_owned() }),
        // The library draws the expression over several lines; the last one says what is wrong.
        Err(error) => {
            let drawn = error.to_string();
            let reason = drawn.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Err(CompileError::Regex { text: text.to_owned(), reason })
        }
    }
}

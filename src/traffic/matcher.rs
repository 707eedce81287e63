//! Which rule a request meets first, found without looking at all of them.
//!
//! ```text
//!   every rule stands in one place, by its rarest test:
//!     exact path -> map      header or query with an exact value -> map of maps      path prefix -> sorted list
//!     path regex -> one set of all expressions                                        anything else -> looked at in order
//!   a request visits the places that it leads to; each holds its rules in order, and the smallest that matches wins
//! ```
//!
//! Prefixes are sorted as bytes and each knows the longest other one that it begins with. All texts between a prefix and a
//! path that begins with it begin with it too, so the last prefix that is not greater than the path leads, from parent to
//! parent, to every prefix of the path.
//!
//! Invariants: the answer is the one of a walk through all rules in order (`tests`); nothing is decoded: paths and queries
//! are taken as they stand in the request; an expression is tried on 4 KiB at most, and a longer text does not match.

use std::borrow::Cow;

use foldhash::HashMap;
use http::HeaderMap;
use http::header::HeaderName;
use regex::bytes::{Regex, RegexSet, RegexSetBuilder};

use crate::authz::{CompileError, REGEX_INPUT_BYTES_MAX, whole};

/// Largest set of all path expressions of one list, in bytes: 128 of them share it, and each worker may cache as much.
const SET_BYTES_MAX: usize = 1024 * 1024;

/// What a rule is held against.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'r> {
    /// The method, in upper case.
    pub method: &'r str,
    /// The path, without its query.
    pub path: &'r str,
    /// The query, without its question mark.
    pub query: Option<&'r str>,
    /// The headers.
    pub headers: &'r HeaderMap,
}

/// What a text must be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextTest {
    /// It is there.
    Present,
    /// It is this.
    Exact(String),
    /// It begins with this.
    Prefix(String),
    /// It ends with this.
    Suffix(String),
    /// It has this in it.
    Contains(String),
    /// All of it matches.
    Regex(String),
}

/// A test of a header's values: one of them must pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderTest {
    /// Which header, in lower case.
    pub name: String,
    /// What a value must be like.
    pub test: TextTest,
    /// Whether the test must fail instead.
    pub is_inverted: bool,
    /// Whether case is ignored.
    pub ignores_case: bool,
}

/// A test of a query parameter: one of its values must pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryTest {
    /// Which parameter.
    pub name: String,
    /// What a value must be like.
    pub test: TextTest,
}

/// What a request must be like; without tests, every request is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// The path's test: exact, prefix or expression.
    pub path: Option<TextTest>,
    /// Whether the path's case is ignored.
    pub ignores_case: bool,
    /// All must pass.
    pub headers: Vec<HeaderTest>,
    /// All must pass.
    pub query: Vec<QueryTest>,
    /// One of them; none: all.
    pub methods: Vec<String>,
}

/// A text's test, ready.
#[derive(Debug)]
struct Text {
    ignores_case: bool,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Present,
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    Contains(Box<str>),
    Regex(Regex),
}

impl Text {
    fn new(test: &TextTest, ignores_case: bool) -> Result<Self, CompileError> {
        let fold = |text: &String| if ignores_case { text.to_ascii_lowercase() } else { text.clone() };
        let bytes = |text: &String| fold(text).into_bytes().into_boxed_slice();
        let kind = match test {
            TextTest::Present => Kind::Present,
            TextTest::Exact(text) => Kind::Exact(bytes(text)),
            TextTest::Prefix(text) => Kind::Prefix(bytes(text)),
            TextTest::Suffix(text) => Kind::Suffix(bytes(text)),
            TextTest::Contains(text) => Kind::Contains(fold(text).into()),
            TextTest::Regex(text) => Kind::Regex(whole(&pattern(text, ignores_case))?),
        };
        Ok(Self { ignores_case, kind })
    }

    fn matches(&self, value: &[u8]) -> bool {
        let value = if self.ignores_case { Cow::Owned(value.to_ascii_lowercase()) } else { Cow::Borrowed(value) };
        match &self.kind {
            Kind::Present => true,
            Kind::Exact(text) => *value == **text,
            Kind::Prefix(text) => value.starts_with(text),
            Kind::Suffix(text) => value.ends_with(text),
            Kind::Contains(text) => std::str::from_utf8(&value).is_ok_and(|value| value.contains(&**text)),
            Kind::Regex(regex) => value.len() <= REGEX_INPUT_BYTES_MAX && regex.is_match(&value),
        }
    }
}

fn pattern(text: &str, ignores_case: bool) -> String {
    if ignores_case { format!("(?i:{text})") } else { text.to_owned() }
}

#[derive(Debug)]
struct Header {
    name: HeaderName,
    text: Text,
    is_inverted: bool,
}

/// A rule, ready: what is left to test once its place was visited.
#[derive(Debug)]
struct Rule {
    path: Option<Text>,
    headers: Box<[Header]>,
    query: Box<[(Box<str>, Text)]>,
    methods: Box<[Box<str>]>,
}

impl Rule {
    fn new(wanted: &Match) -> Result<Self, CompileError> {
        let header = |test: &HeaderTest| {
            let name = HeaderName::try_from(&*test.name).map_err(|_| CompileError::Header(test.name.clone()))?;
            Ok(Header { name, text: Text::new(&test.test, test.ignores_case)?, is_inverted: test.is_inverted })
        };
        let query = |test: &QueryTest| Ok((Box::from(&*test.name), Text::new(&test.test, false)?));
        Ok(Self {
            path: wanted.path.as_ref().map(|path| Text::new(path, wanted.ignores_case)).transpose()?,
            headers: wanted.headers.iter().map(header).collect::<Result<_, CompileError>>()?,
            query: wanted.query.iter().map(query).collect::<Result<_, CompileError>>()?,
            methods: wanted.methods.iter().map(|method| Box::from(&**method)).collect(),
        })
    }

    fn matches(&self, asked: &Asked<'_>, is_path_known: bool) -> bool {
        (self.methods.is_empty() || self.methods.iter().any(|method| **method == *asked.method))
            && (is_path_known || self.path.as_ref().is_none_or(|path| path.matches(asked.path.as_bytes())))
            && self.headers.iter().all(|header| {
                let values = asked.headers.get_all(&header.name);
                values.iter().any(|value| header.text.matches(value.as_bytes())) != header.is_inverted
            })
            && self.query.iter().all(|(name, text)| {
                pairs(asked.query).any(|(key, value)| key == &**name && text.matches(value.as_bytes()))
            })
    }
}

/// The parameters of a query, as they stand in it; one without `=` has an empty value.
fn pairs(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    let parts = query.unwrap_or_default().split('&').filter(|part| !part.is_empty());
    parts.map(|part| part.split_once('=').unwrap_or((part, "")))
}

/// Rules of one place, in order.
type Places = Vec<u32>;

/// Path prefixes, found by the path.
#[derive(Debug, Default)]
struct Prefixes {
    /// In order of their bytes.
    list: Vec<(Box<[u8]>, Places)>,
    /// The longest other prefix that each begins with.
    parents: Vec<Option<u32>>,
}

impl Prefixes {
    fn new(mut rules: Vec<(Box<[u8]>, u32)>) -> Self {
        rules.sort();
        let mut this = Self::default();
        for (prefix, at) in rules {
            match this.list.last_mut() {
                Some((last, places)) if *last == prefix => places.push(at),
                _ => this.list.push((prefix, vec![at])),
            }
        }
        // The list is sorted, so the prefixes of an entry are on the way from its neighbour to the root.
        for at in 0..this.list.len() {
            let own = this.list.get(at).map_or(&[][..], |(prefix, _)| prefix);
            let mut parent = at.checked_sub(1);
            while let Some(candidate) = parent {
                let found = this.list.get(candidate).is_some_and(|(prefix, _)| own.starts_with(prefix));
                if found {
                    break;
                }
                parent = this.parents.get(candidate).copied().flatten().map(|parent| parent as usize);
            }
            this.parents.push(parent.and_then(|parent| u32::try_from(parent).ok()));
        }
        this
    }

    /// Calls `visit` with the rules of each prefix of `path`.
    fn each(&self, path: &[u8], mut visit: impl FnMut(&Places)) {
        let after = self.list.partition_point(|(prefix, _)| **prefix <= *path);
        let mut at = after.checked_sub(1);
        while let Some(candidate) = at {
            if let Some((prefix, places)) = self.list.get(candidate)
                && path.starts_with(prefix)
            {
                visit(places);
            }
            at = self.parents.get(candidate).copied().flatten().map(|parent| parent as usize);
        }
    }
}

/// Exact values of one header or query parameter.
type Values = HashMap<Box<[u8]>, Places>;

/// Rules in order, found by their rarest test. Immutable.
#[derive(Debug, Default)]
pub struct Matcher {
    rules: Box<[Rule]>,
    exact: HashMap<Box<[u8]>, Places>,
    prefixes: Prefixes,
    headers: Box<[(HeaderName, Values)]>,
    query: HashMap<Box<str>, Values>,
    /// One expression per rule of `in_set`.
    set: Option<RegexSet>,
    in_set: Places,
    /// Rules that stand nowhere else.
    others: Places,
}

impl Matcher {
    /// Makes `rules` ready; the first that matches wins.
    ///
    /// # Errors
    /// [`CompileError`] naming the expression or header.
    pub fn new<'m>(rules: impl IntoIterator<Item = &'m Match>) -> Result<Self, CompileError> {
        let mut this = Self::default();
        let (mut ready, mut prefixes, mut expressions) = (Vec::new(), Vec::new(), Vec::new());
        let mut headers: Vec<(HeaderName, Values)> = Vec::new();
        for (at, wanted) in rules.into_iter().enumerate() {
            let at = u32::try_from(at).unwrap_or(u32::MAX);
            ready.push(Rule::new(wanted)?);
            let exact_header = wanted.headers.iter().find_map(|test| match &test.test {
                TextTest::Exact(value) if !test.is_inverted && !test.ignores_case => {
                    Some((HeaderName::try_from(&*test.name).ok()?, value))
                }
                _ => None,
            });
            let exact_query = wanted.query.iter().find_map(|test| match &test.test {
                TextTest::Exact(value) => Some((&test.name, value)),
                _ => None,
            });
            match (&wanted.path, wanted.ignores_case) {
                (Some(TextTest::Exact(path)), false) => this.exact.entry(bytes(path)).or_default().push(at),
                _ if exact_header.is_some() || exact_query.is_some() => {
                    let (values, value) = match (exact_header, exact_query) {
                        (Some((name, value)), _) => {
                            let found = headers.iter().position(|(known, _)| *known == name);
                            let found = found.unwrap_or_else(|| {
                                headers.push((name, Values::default()));
                                headers.len() - 1
                            });
                            (headers.get_mut(found).map(|(_, values)| values), value)
                        }
                        (None, Some((name, value))) => (Some(this.query.entry(Box::from(&**name)).or_default()), value),
                        (None, None) => continue,
                    };
                    if let Some(values) = values {
                        values.entry(bytes(value)).or_default().push(at);
                    }
                }
                (Some(TextTest::Prefix(path)), false) if !path.is_empty() => prefixes.push((bytes(path), at)),
                (Some(TextTest::Regex(text)), ignores_case) => {
                    expressions.push(format!("^(?:{})$", pattern(text, ignores_case)));
                    this.in_set.push(at);
                }
                _ => this.others.push(at),
            }
        }
        this.rules = ready.into();
        this.prefixes = Prefixes::new(prefixes);
        this.headers = headers.into();
        // A set costs an allocation per request: few expressions are tried one by one.
        if this.in_set.len() > 2 {
            let set = RegexSetBuilder::new(&expressions)
                .unicode(false)
                .size_limit(SET_BYTES_MAX)
                .dfa_size_limit(SET_BYTES_MAX)
                .build();
            let too_large = |error: regex::Error| CompileError::Regex {
                text: format!("all {} path expressions together", expressions.len()),
                reason: error.to_string().lines().last().unwrap_or_default().to_owned(),
            };
            this.set = Some(set.map_err(too_large)?);
        }
        Ok(this)
    }

    /// Whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Finds the first rule that `asked` matches, as its place in the list.
    pub fn first(&self, asked: &Asked<'_>) -> Option<usize> {
        let mut best = u32::MAX;
        let path = asked.path.as_bytes();
        let mut visit = |places: &Places, is_path_known: bool| {
            for at in places.iter().take_while(|at| **at < best) {
                if self.rules.get(*at as usize).is_some_and(|rule| rule.matches(asked, is_path_known)) {
                    best = *at;
                    return;
                }
            }
        };
        if !self.exact.is_empty()
            && let Some(places) = self.exact.get(path)
        {
            visit(places, true);
        }
        for (name, values) in &self.headers {
            for value in asked.headers.get_all(name) {
                if let Some(places) = values.get(value.as_bytes()) {
                    visit(places, false);
                }
            }
        }
        if !self.query.is_empty() {
            for (key, value) in pairs(asked.query) {
                if let Some(places) = self.query.get(key).and_then(|values| values.get(value.as_bytes())) {
                    visit(places, false);
                }
            }
        }
        self.prefixes.each(path, |places| visit(places, true));
        visit(&self.others, false);
        match &self.set {
            None => visit(&self.in_set, false),
            // Nothing in the set can come before what was found.
            Some(_) if self.in_set.first().is_none_or(|first| *first >= best) => {}
            Some(set) if path.len() <= REGEX_INPUT_BYTES_MAX => {
                for at in set.matches(path) {
                    if let Some(at) = self.in_set.get(at) {
                        let is_better = *at < best;
                        if is_better && self.rules.get(*at as usize).is_some_and(|rule| rule.matches(asked, true)) {
                            best = *at;
                            break;
                        }
                    }
                }
            }
            Some(_) => {}
        }
        (best != u32::MAX).then_some(best as usize)
    }

    /// Finds the same by looking at every rule in order: the reference that tests hold [`Matcher::first`] against.
    #[cfg(test)]
    pub(super) fn first_of_all(&self, asked: &Asked<'_>) -> Option<usize> {
        self.rules.iter().position(|rule| rule.matches(asked, false))
    }
}

fn bytes(text: &str) -> Box<[u8]> {
    text.as_bytes().into()
}

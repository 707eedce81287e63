//! Consul's filter expressions: parsed once against the fields that there are, evaluated on their values, never on JSON text.
//!
//! ```text
//!   Service.Meta["rack"] == "r1" and not ("old" in Service.Tags or Checks is empty)
//!
//!   or  := and { "or" and }      and := not { "and" not }      not := "not" not | "(" or ")" | test
//!   test := selector ( "==" | "!=" | ["not"] "contains" | ["not"] "matches" ) value
//!         | selector "is" ["not"] "empty"
//!         | value ["not"] "in" selector
//!   selector := word { "." word | "[" string "]" }     value := word | number | "string" | `raw string`
//! ```
//!
//! Source: the grammar of HashiCorp's go-bexpr as Consul's API pages describe it. What is not there is so handled as Consul
//! handles it: a key that a map lacks equals nothing, matches nothing, holds nothing and is empty.
//! Wider than Consul's: words may hold `-`, so that `ServiceID == web-1` needs no quotes; a text may be tested for emptiness.
//! Narrower: `any` and `all` with a bound name, and selectors as JSON pointers; both are refused as syntax.
//!
//! Invariants: length, depth and the size of regular expressions are bounded, so that matching one record takes a time linear
//! in its texts; a filter that was parsed never fails.
//! Not here: which records there are (`api`, `routing`), how an expression travels (a query, a config entry).

mod entry;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod parse;
#[cfg(test)]
mod tests;
mod token;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use regex::bytes::Regex;

use crate::model::TextMap;

/// Longest expression, in bytes: hundreds of tests.
pub const EXPRESSION_BYTES_MAX: usize = 4096;
/// Deepest nesting of brackets and `not`: each level is a frame of the parser's stack.
pub const DEPTH_MAX: usize = 32;
/// Most regular expressions in a filter; each is compiled to at most [`REGEX_BYTES_MAX`].
pub const REGEXES_MAX: usize = 8;
/// Largest compiled regular expression, in bytes, and as much again for its cache.
pub const REGEX_BYTES_MAX: usize = 64 * 1024;

/// A record that can be filtered.
pub trait Fields {
    /// Its fields: dotted name in Consul's spelling, and what each holds.
    const FIELDS: &'static [(&'static str, Kind)];

    /// Reads the field `name` of [`Fields::FIELDS`], as a value of its kind; [`Value::Absent`] for any other name.
    fn value(&self, name: &str) -> Value<'_>;
}

/// What a field holds; decides which tests it takes and which keys follow its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Text,
    /// A whole number.
    Number,
    /// True or false.
    Flag,
    /// A list of texts.
    Texts,
    /// Texts by key.
    Pairs,
    /// Tagged addresses by tag, each with an `Address` (text) and a `Port` (number).
    Addresses,
    /// A list of records: it can be empty or not.
    List,
}

impl Kind {
    /// Names the kind and the tests that it takes, for people.
    fn describe(self) -> &'static str {
        match self {
            Self::Text => "a text: it takes ==, !=, in, not in, contains, matches, is empty",
            Self::Number => "a number: it takes == and !=",
            Self::Flag => "true or false: it takes == and !=",
            Self::Texts => "a list of texts: it takes in, not in, contains, is empty",
            Self::Pairs => {
                "a map of texts: it takes in, not in, contains (of keys), is empty; a value of it is NAME.key or NAME[\"key\"]"
            }
            Self::Addresses => {
                "a map of addresses: it takes in, not in, contains (of keys), is empty; a value of it is NAME.key.Address or NAME.key.Port"
            }
            Self::List => "a list of records: it takes is empty and is not empty",
        }
    }
}

/// The value of a field.
#[derive(Clone)]
pub enum Value<'a> {
    /// Of [`Kind::Text`].
    Text(Cow<'a, str>),
    /// Of [`Kind::Number`].
    Number(u64),
    /// Of [`Kind::Flag`].
    Flag(bool),
    /// Of [`Kind::Texts`].
    Texts(&'a [Box<str>]),
    /// Of [`Kind::Pairs`].
    Pairs(&'a dyn Pairs),
    /// Of [`Kind::Addresses`].
    Addresses(&'a TextMap<(Box<str>, u16)>),
    /// Of [`Kind::List`]: how many records it has.
    List(usize),
    /// There is none.
    Absent,
}

impl<'a> Value<'a> {
    /// Wraps a text.
    pub fn text(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }

    /// Returns what it is; none if it is absent.
    pub fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::Text(_) => Kind::Text,
            Self::Number(_) => Kind::Number,
            Self::Flag(_) => Kind::Flag,
            Self::Texts(_) => Kind::Texts,
            Self::Pairs(_) => Kind::Pairs,
            Self::Addresses(_) => Kind::Addresses,
            Self::List(_) => Kind::List,
            Self::Absent => return None,
        })
    }
}

/// Texts by key, in whichever map they are.
pub trait Pairs {
    /// Returns the text under `key`.
    fn text(&self, key: &str) -> Option<Cow<'_, str>>;
    /// Tells whether there is none.
    fn has_none(&self) -> bool;
}

impl Pairs for BTreeMap<String, String> {
    fn text(&self, key: &str) -> Option<Cow<'_, str>> {
        self.get(key).map(|text| Cow::Borrowed(text.as_str()))
    }

    fn has_none(&self) -> bool {
        self.is_empty()
    }
}

impl Pairs for TextMap<Box<str>> {
    fn text(&self, key: &str) -> Option<Cow<'_, str>> {
        self.get(key).map(|text| Cow::Borrowed(&**text))
    }

    fn has_none(&self) -> bool {
        self.is_empty()
    }
}

/// Why an expression is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// It is too long.
    #[error("the expression has {found} bytes; at most {EXPRESSION_BYTES_MAX} are taken")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// It is nested too deep.
    #[error("the expression is nested deeper than {DEPTH_MAX} levels of brackets and `not`")]
    TooDeep,
    /// It does not follow the grammar.
    #[error("at character {at}: expected {expected}, found {found}")]
    Syntax {
        /// Which character, from 1.
        at: usize,
        /// What would be right.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// There is no such field.
    #[error("selector {selector} is not valid; there are {}", names.join(", "))]
    UnknownSelector {
        /// As it was written.
        selector: String,
        /// The fields that there are.
        names: Vec<&'static str>,
    },
    /// The field holds something else than the test is about.
    #[error("{selector} is {}", kind.describe())]
    WrongType {
        /// As it was written.
        selector: String,
        /// What it holds.
        kind: Kind,
    },
    /// The value is none of the field's kind.
    #[error("{selector} is {}, and {value:?} is none", if *kind == Kind::Flag { "true or false" } else { "a whole number" })]
    WrongValue {
        /// As it was written.
        selector: String,
        /// What it holds.
        kind: Kind,
        /// As it was written.
        value: String,
    },
    /// A regular expression is malformed or too large.
    #[error("regular expression {text:?} is refused: {reason}")]
    Regex {
        /// The expression.
        text: String,
        /// Why, in the library's words.
        reason: String,
    },
    /// There are too many regular expressions.
    #[error("the expression has more than {REGEXES_MAX} regular expressions")]
    Regexes,
}

/// A parsed expression.
#[derive(Debug)]
pub struct Filter(Expr);

impl Filter {
    /// Parses `text` for records of the type `T`; blank text passes everything.
    ///
    /// # Errors
    /// [`FilterError`] where it is malformed, too large, or says something of a field that `T` does not have.
    pub fn parse<T: Fields>(text: &str) -> Result<Self, FilterError> {
        parse::parse(text, T::FIELDS).map(Self)
    }

    /// Tells whether `record` passes. The record's type is the one that the filter was parsed for; fields that it lacks are
    /// absent, as keys are that a map lacks.
    pub fn is_match<T: Fields>(&self, record: &T) -> bool {
        self.0.holds(record)
    }
}

/// Writes an expression that parses to the same filter.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// An expression. Lists are never nested in lists of their own kind.
#[derive(Debug)]
enum Expr {
    /// All hold; without any it holds.
    All(Vec<Expr>),
    /// One of at least two holds.
    Any(Vec<Expr>),
    Not(Box<Expr>),
    Test(Test),
}

/// What is asked of one value.
#[derive(Debug)]
struct Test {
    /// Of the record's fields.
    field: &'static str,
    /// Of a map.
    key: Option<Box<str>>,
    /// Of a tagged address.
    part: Option<Part>,
    question: Question,
    is_negated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Address,
    Port,
}

#[derive(Debug)]
enum Question {
    Is(Box<str>),
    IsNumber(i128),
    IsFlag(bool),
    /// A part of a text, an element of a list, a key of a map.
    Holds(Box<str>),
    Matches(Box<Regex>),
    IsEmpty,
}

impl Expr {
    fn holds<T: Fields>(&self, record: &T) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|part| part.holds(record)),
            Self::Any(parts) => parts.iter().any(|part| part.holds(record)),
            Self::Not(inner) => !inner.holds(record),
            Self::Test(test) => test.question.is_so(&test.select(record)) != test.is_negated,
        }
    }
}

impl Test {
    /// Reads what the selector leads to.
    fn select<'a, T: Fields>(&self, record: &'a T) -> Value<'a> {
        let value = record.value(self.field);
        let Some(key) = self.key.as_deref() else { return value };
        match (value, self.part) {
            (Value::Pairs(pairs), None) => pairs.text(key).map_or(Value::Absent, Value::Text),
            (Value::Addresses(tagged), Some(part)) => match (tagged.get(key), part) {
                (Some((address, _)), Part::Address) => Value::text(address),
                (Some((_, port)), Part::Port) => Value::Number(u64::from(*port)),
                (None, _) => Value::Absent,
            },
            _ => Value::Absent,
        }
    }
}

impl Question {
    /// Answers it for `value`; a value of another kind is as good as absent.
    fn is_so(&self, value: &Value<'_>) -> bool {
        match (self, value) {
            (Self::Is(wanted), Value::Text(text)) => **wanted == **text,
            (Self::IsNumber(wanted), Value::Number(number)) => *wanted == i128::from(*number),
            (Self::IsFlag(wanted), Value::Flag(flag)) => wanted == flag,
            (Self::Holds(part), Value::Text(text)) => text.contains(&**part),
            (Self::Holds(element), Value::Texts(texts)) => texts.contains(element),
            (Self::Holds(key), Value::Pairs(pairs)) => pairs.text(key).is_some(),
            (Self::Holds(key), Value::Addresses(tagged)) => tagged.get(key).is_some(),
            (Self::Matches(regex), Value::Text(text)) => regex.is_match(text.as_bytes()),
            (Self::IsEmpty, Value::Text(text)) => text.is_empty(),
            (Self::IsEmpty, Value::Texts(texts)) => texts.is_empty(),
            (Self::IsEmpty, Value::Pairs(pairs)) => pairs.has_none(),
            (Self::IsEmpty, Value::Addresses(tagged)) => tagged.is_empty(),
            (Self::IsEmpty, Value::List(length)) => *length == 0,
            (Self::IsEmpty, Value::Absent) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(parts) => join(f, parts, " and "),
            Self::Any(parts) => join(f, parts, " or "),
            Self::Not(inner) => {
                f.write_str("not ")?;
                bracketed(f, inner)
            }
            Self::Test(test) => fmt::Display::fmt(test, f),
        }
    }
}

fn join(f: &mut fmt::Formatter<'_>, parts: &[Expr], word: &str) -> fmt::Result {
    for (at, part) in parts.iter().enumerate() {
        if at > 0 {
            f.write_str(word)?;
        }
        bracketed(f, part)?;
    }
    Ok(())
}

fn bracketed(f: &mut fmt::Formatter<'_>, part: &Expr) -> fmt::Result {
    match part {
        Expr::All(_) | Expr::Any(_) => write!(f, "({part})"),
        Expr::Not(_) | Expr::Test(_) => fmt::Display::fmt(part, f),
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.is_negated { "not " } else { "" };
        if let Question::Holds(what) = &self.question {
            write!(f, "{} {not}in ", token::Quoted(what))?;
        }
        f.write_str(self.field)?;
        if let Some(key) = &self.key {
            write!(f, "[{}]", token::Quoted(key))?;
        }
        if let Some(part) = self.part {
            write!(f, ".{part:?}")?;
        }
        let equals = if self.is_negated { "!=" } else { "==" };
        match &self.question {
            Question::Is(text) => write!(f, " {equals} {}", token::Quoted(text)),
            Question::IsNumber(number) => write!(f, " {equals} {number}"),
            Question::IsFlag(flag) => write!(f, " {equals} {flag}"),
            Question::Matches(regex) => write!(f, " {not}matches {}", token::Quoted(regex.as_str())),
            Question::IsEmpty => write!(f, " is {not}empty"),
            Question::Holds(_) => Ok(()),
        }
    }
}

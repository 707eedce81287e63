//! From tokens to an expression, each test held against the fields that there are.

use regex::bytes::RegexBuilder;

use super::token::{Quoted, Token, TokenKind, character, split};
use super::{
    DEPTH_MAX, EXPRESSION_BYTES_MAX, Expr, FilterError, Kind, Part, Question, REGEX_BYTES_MAX, REGEXES_MAX, Test,
};

type Schema = &'static [(&'static str, Kind)];

/// Parses `text` for records with `fields`.
pub(super) fn parse(text: &str, fields: Schema) -> Result<Expr, FilterError> {
    if text.len() > EXPRESSION_BYTES_MAX {
        return Err(FilterError::TooLong { found: text.len() });
    }
    let mut parser = Parser { text, tokens: split(text)?, at: 0, fields, depth: 0, regexes: 0 };
    if parser.tokens.is_empty() {
        return Ok(Expr::All(Vec::new()));
    }
    let parsed = parser.any()?;
    match parser.peek() {
        None => Ok(parsed),
        Some(_) => Err(parser.expected("`and`, `or` or the end")),
    }
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token>,
    at: usize,
    fields: Schema,
    depth: usize,
    regexes: usize,
}

/// What a selector leads to.
struct Selected {
    written: String,
    field: &'static str,
    key: Option<Box<str>>,
    part: Option<Part>,
    kind: Kind,
}

/// The operators that stand between a selector and its value.
enum Operator {
    Equal,
    Contains,
    Matches,
}

impl Parser<'_> {
    fn any(&mut self) -> Result<Expr, FilterError> {
        let mut parts = vec![self.all()?];
        while self.take_word("or") {
            parts.push(self.all()?);
        }
        Ok(one_or(parts, Expr::Any, |part| match part {
            Expr::Any(inner) => Ok(inner),
            other => Err(other),
        }))
    }

    fn all(&mut self) -> Result<Expr, FilterError> {
        let mut parts = vec![self.not()?];
        while self.take_word("and") {
            parts.push(self.not()?);
        }
        Ok(one_or(parts, Expr::All, |part| match part {
            Expr::All(inner) => Ok(inner),
            other => Err(other),
        }))
    }

    fn not(&mut self) -> Result<Expr, FilterError> {
        let is_negated = self.take_word("not");
        if !is_negated && !self.take(&TokenKind::Open) {
            return self.test().map(Expr::Test);
        }
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(FilterError::TooDeep);
        }
        let parsed = if is_negated {
            Expr::Not(Box::new(self.not()?))
        } else {
            let inner = self.any()?;
            if !self.take(&TokenKind::Close) {
                return Err(self.expected("`)`, `and` or `or`"));
            }
            inner
        };
        self.depth -= 1;
        Ok(parsed)
    }

    fn test(&mut self) -> Result<Test, FilterError> {
        if self.begins_with_value() {
            let what = self.value()?;
            let is_negated = self.take_word("not");
            if !self.take_word("in") {
                return Err(self.expected("`in` or `not in`"));
            }
            let selected = self.selector()?;
            let question = selected.holds(what)?;
            return Ok(selected.asked(question, is_negated));
        }
        let selected = self.selector()?;
        if self.take_word("is") {
            let is_negated = self.take_word("not");
            if !self.take_word("empty") {
                return Err(self.expected("`empty` or `not empty`"));
            }
            if matches!(selected.kind, Kind::Number | Kind::Flag) {
                return Err(selected.wrong_type());
            }
            return Ok(selected.asked(Question::IsEmpty, is_negated));
        }
        let (operator, is_negated) = self.operator()?;
        let value = self.value()?;
        let question = match operator {
            Operator::Equal => selected.equals(value)?,
            Operator::Contains => selected.holds(value)?,
            Operator::Matches if selected.kind == Kind::Text => self.regex(value)?,
            Operator::Matches => return Err(selected.wrong_type()),
        };
        Ok(selected.asked(question, is_negated))
    }

    /// Tells whether the test that follows is `value in selector`.
    fn begins_with_value(&self) -> bool {
        let word = |ahead: usize| match self.tokens.get(self.at + ahead).map(|token| &token.kind) {
            Some(TokenKind::Word(word)) => Some(word.as_str()),
            _ => None,
        };
        let is_text = matches!(self.peek(), Some(TokenKind::Text(_)));
        is_text || word(1) == Some("in") || (word(1) == Some("not") && word(2) == Some("in"))
    }

    fn operator(&mut self) -> Result<(Operator, bool), FilterError> {
        if self.take(&TokenKind::Equal) {
            return Ok((Operator::Equal, false));
        }
        if self.take(&TokenKind::NotEqual) {
            return Ok((Operator::Equal, true));
        }
        let is_negated = self.take_word("not");
        if self.take_word("contains") {
            return Ok((Operator::Contains, is_negated));
        }
        if self.take_word("matches") {
            return Ok((Operator::Matches, is_negated));
        }
        Err(self.expected("an operator: ==, !=, in, not in, contains, matches, is empty, is not empty"))
    }

    fn value(&mut self) -> Result<String, FilterError> {
        match self.peek() {
            Some(TokenKind::Word(value) | TokenKind::Text(value)) => {
                let value = value.clone();
                self.at += 1;
                Ok(value)
            }
            _ => Err(self.expected("a value: a word, a number or a quoted text")),
        }
    }

    fn selector(&mut self) -> Result<Selected, FilterError> {
        const PART: &str = "a selector: names between dots, keys as [\"key\"]";
        let Some(TokenKind::Word(first)) = self.peek() else { return Err(self.expected(PART)) };
        let mut written = first.clone();
        let mut parts: Vec<String> = first.split('.').map(str::to_owned).collect();
        self.at += 1;
        loop {
            if self.take(&TokenKind::OpenKey) {
                let Some(TokenKind::Text(key)) = self.peek() else { return Err(self.expected("a quoted key")) };
                written.extend(["[", &Quoted(key).to_string(), "]"]);
                parts.push(key.clone());
                self.at += 1;
                if !self.take(&TokenKind::CloseKey) {
                    return Err(self.expected("`]`"));
                }
                continue;
            }
            // After a key a dot goes on.
            match self.peek() {
                Some(TokenKind::Word(more)) if written.ends_with(']') && more.starts_with('.') => {
                    written.push_str(more);
                    parts.extend(more.split('.').skip(1).map(str::to_owned));
                    self.at += 1;
                }
                _ => break,
            }
        }
        self.resolve(written, &parts)
    }

    /// Finds the field that `parts` begin with and the key and part that are left.
    fn resolve(&self, written: String, parts: &[String]) -> Result<Selected, FilterError> {
        let begins = |name: &str| {
            parts.len() >= name.split('.').count() && name.split('.').eq(parts.iter().take(name.split('.').count()))
        };
        let found = self.fields.iter().filter(|(name, _)| begins(name)).max_by_key(|(name, _)| name.len());
        let unknown = |selector: &str| FilterError::UnknownSelector {
            selector: selector.to_owned(),
            names: self.fields.iter().map(|(name, _)| *name).collect(),
        };
        let Some(&(field, kind)) = found else { return Err(unknown(&written)) };
        let left = parts.get(field.split('.').count()..).unwrap_or_default();
        let (key, part, kind) = match (kind, left) {
            (_, []) => (None, None, kind),
            (Kind::Pairs, [key]) => (Some(key), None, Kind::Text),
            (Kind::Addresses, [key, part]) if part == "Address" => (Some(key), Some(Part::Address), Kind::Text),
            (Kind::Addresses, [key, part]) if part == "Port" => (Some(key), Some(Part::Port), Kind::Number),
            (Kind::Pairs | Kind::Addresses, _) => return Err(FilterError::WrongType { selector: written, kind }),
            _ => return Err(unknown(&written)),
        };
        Ok(Selected { written, field, key: key.map(|key| key.as_str().into()), part, kind })
    }

    fn regex(&mut self, text: String) -> Result<Question, FilterError> {
        self.regexes += 1;
        if self.regexes > REGEXES_MAX {
            return Err(FilterError::Regexes);
        }
        let mut builder = RegexBuilder::new(&text);
        builder.unicode(false).size_limit(REGEX_BYTES_MAX).dfa_size_limit(REGEX_BYTES_MAX);
        let regex = builder.build().map_err(|error| {
            // The library draws the expression over several lines; the last one says what is wrong.
            let drawn = error.to_string();
            let reason = drawn.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            FilterError::Regex { text, reason }
        })?;
        Ok(Question::Matches(Box::new(regex)))
    }

    fn peek(&self) -> Option<&TokenKind> {
        self.tokens.get(self.at).map(|token| &token.kind)
    }

    fn take(&mut self, kind: &TokenKind) -> bool {
        let is_there = self.peek() == Some(kind);
        self.at += usize::from(is_there);
        is_there
    }

    fn take_word(&mut self, word: &str) -> bool {
        let is_there = matches!(self.peek(), Some(TokenKind::Word(own)) if own == word);
        self.at += usize::from(is_there);
        is_there
    }

    /// Says that something else should stand here.
    fn expected(&self, expected: &'static str) -> FilterError {
        let here = self.tokens.get(self.at);
        FilterError::Syntax {
            at: character(self.text, here.map_or(self.text.len(), |token| token.at)),
            expected,
            found: here.map_or_else(|| "the end".to_owned(), |token| token.kind.to_string()),
        }
    }
}

impl Selected {
    fn asked(self, question: Question, is_negated: bool) -> Test {
        Test { field: self.field, key: self.key, part: self.part, question, is_negated }
    }

    fn wrong_type(&self) -> FilterError {
        FilterError::WrongType { selector: self.written.clone(), kind: self.kind }
    }

    fn equals(&self, value: String) -> Result<Question, FilterError> {
        let wrong = |value: String| FilterError::WrongValue { selector: self.written.clone(), kind: self.kind, value };
        match self.kind {
            Kind::Text => Ok(Question::Is(value.into())),
            Kind::Number => value.parse().map(Question::IsNumber).map_err(|_| wrong(value)),
            Kind::Flag => match value.to_ascii_lowercase().as_str() {
                "true" | "t" | "1" => Ok(Question::IsFlag(true)),
                "false" | "f" | "0" => Ok(Question::IsFlag(false)),
                _ => Err(wrong(value)),
            },
            Kind::Texts | Kind::Pairs | Kind::Addresses | Kind::List => Err(self.wrong_type()),
        }
    }

    fn holds(&self, what: String) -> Result<Question, FilterError> {
        match self.kind {
            Kind::Text | Kind::Texts | Kind::Pairs | Kind::Addresses => Ok(Question::Holds(what.into())),
            Kind::Number | Kind::Flag | Kind::List => Err(self.wrong_type()),
        }
    }
}

/// Makes a list of `parts`, each list of the same kind among them opened; a single part is itself.
fn one_or(parts: Vec<Expr>, list: fn(Vec<Expr>) -> Expr, open: impl Fn(Expr) -> Result<Vec<Expr>, Expr>) -> Expr {
    let mut flat = Vec::with_capacity(parts.len());
    for part in parts {
        match open(part) {
            Ok(inner) => flat.extend(inner),
            Err(part) => flat.push(part),
        }
    }
    if flat.len() > 1 {
        return list(flat);
    }
    flat.pop().unwrap_or(Expr::All(Vec::new()))
}

//! Splits an expression into words, strings and signs.

use std::fmt;
use std::iter::Peekable;
use std::str::CharIndices;

use super::FilterError;

/// A piece of an expression, with the byte that it begins at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) at: usize,
    pub(super) kind: TokenKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Letters, digits and `_ / . -`: keywords, selectors, numbers, bare values.
    Word(String),
    /// A quoted text, its escapes read.
    Text(String),
    Equal,
    NotEqual,
    Open,
    Close,
    OpenKey,
    CloseKey,
}

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) => write!(f, "{word:?}"),
            Self::Text(_) => f.write_str("a quoted text"),
            Self::Equal => f.write_str("\"==\""),
            Self::NotEqual => f.write_str("\"!=\""),
            Self::Open => f.write_str("\"(\""),
            Self::Close => f.write_str("\")\""),
            Self::OpenKey => f.write_str("\"[\""),
            Self::CloseKey => f.write_str("\"]\""),
        }
    }
}

/// A text in double quotes, as [`split`] reads it.
pub(super) struct Quoted<'a>(pub(super) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                _ => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

/// Splits `text`.
///
/// # Errors
/// [`FilterError::Syntax`] where a character begins nothing, or a string does not end.
pub(super) fn split(text: &str) -> Result<Vec<Token>, FilterError> {
    let mut tokens = Vec::new();
    let mut rest = text.char_indices().peekable();
    while let Some((at, c)) = rest.next() {
        let kind = match c {
            ' ' | '\t' | '\r' | '\n' => continue,
            '(' => TokenKind::Open,
            ')' => TokenKind::Close,
            '[' => TokenKind::OpenKey,
            ']' => TokenKind::CloseKey,
            '=' | '!' if rest.next_if(|(_, next)| *next == '=').is_some() => {
                if c == '=' {
                    TokenKind::Equal
                } else {
                    TokenKind::NotEqual
                }
            }
            '"' => TokenKind::Text(quoted(text, at, &mut rest)?),
            '`' => TokenKind::Text(raw(text, at, &mut rest)?),
            _ if is_of_word(c) => {
                let mut word = String::from(c);
                while let Some((_, next)) = rest.next_if(|(_, next)| is_of_word(*next)) {
                    word.push(next);
                }
                TokenKind::Word(word)
            }
            _ => return Err(syntax(text, at, "a selector, a value or an operator; other texts stand in quotes", c)),
        };
        tokens.push(Token { at, kind });
    }
    Ok(tokens)
}

fn is_of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || ['_', '/', '.', '-'].contains(&c)
}

type Rest<'a> = Peekable<CharIndices<'a>>;

fn raw(text: &str, at: usize, rest: &mut Rest<'_>) -> Result<String, FilterError> {
    let mut inside = String::new();
    for (_, c) in rest {
        if c == '`' {
            return Ok(inside);
        }
        inside.push(c);
    }
    Err(syntax(text, at, "a closing `", '`'))
}

/// Reads up to the closing quote, with Go's escapes.
fn quoted(text: &str, at: usize, rest: &mut Rest<'_>) -> Result<String, FilterError> {
    let mut inside = String::new();
    while let Some((here, c)) = rest.next() {
        match c {
            '"' => return Ok(inside),
            '\\' => {
                let escaped = rest.next().map(|(_, escaped)| escaped);
                let code = |digits, rest: &mut Rest<'_>| hex(digits, rest).and_then(char::from_u32);
                let read = match escaped {
                    Some(same @ ('"' | '\\')) => Some(same),
                    Some('n') => Some('\n'),
                    Some('t') => Some('\t'),
                    Some('r') => Some('\r'),
                    Some('u') => code(4, rest),
                    Some('U') => code(8, rest),
                    _ => None,
                };
                inside.push(read.ok_or_else(|| {
                    syntax(
                        text,
                        here,
                        "an escape (\\\\ \\\" \\n \\t \\r \\u1234); a regular expression is easier in `…`",
                        '\\',
                    )
                })?);
            }
            _ => inside.push(c),
        }
    }
    Err(syntax(text, at, "a closing quote", '"'))
}

fn hex(digits: u32, rest: &mut Rest<'_>) -> Option<u32> {
    let mut code = 0_u32;
    for _ in 0..digits {
        let (_, digit) = rest.next_if(|(_, c)| c.is_ascii_hexdigit())?;
        code = code.checked_mul(16)?.checked_add(digit.to_digit(16)?)?;
    }
    Some(code)
}

fn syntax(text: &str, at: usize, expected: &'static str, found: char) -> FilterError {
    FilterError::Syntax { at: character(text, at), expected, found: format!("{found:?}") }
}

/// Counts the characters up to the byte `at`, from 1.
pub(super) fn character(text: &str, at: usize) -> usize {
    1 + text.char_indices().take_while(|(own, _)| *own < at).count()
}

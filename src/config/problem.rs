//! What is wrong with a configuration: every problem of a run, each with where it came from, key, value and rule.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Longest part of a value that a problem shows, in characters: one line of a terminal.
const VALUE_SHOWN_CHARS_MAX: usize = 80;

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A config file.
    File(Arc<Path>),
    /// A flag, as it is typed: `-node`.
    Flag(&'static str),
    /// Nowhere: the key is missing, or a default does not fit this host.
    Unset,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the setting came from.
    pub source: Source,
    /// The line in the file, from 1, where it is known.
    pub line: Option<usize>,
    /// The key, with its path (`ports.mesh`, `services[0]`); empty if the file as a whole is at fault.
    pub key: String,
    /// The value as it would stand in JSON, cut to one line; none if it is missing or secret.
    pub value: Option<String>,
    /// The rule that is broken, and what to do.
    pub rule: String,
}

impl Problem {
    /// Notes a broken rule of `key` from `source`; `value` is cut to one line.
    pub(crate) fn new(source: Source, key: impl Into<String>, value: Option<String>, rule: impl Into<String>) -> Self {
        let value = value.map(|value| match value.char_indices().nth(VALUE_SHOWN_CHARS_MAX) {
            Some((at, _)) => format!("{}…", value.get(..at).unwrap_or_default()),
            None => value,
        });
        Self { source, line: None, key: key.into(), value, rule: rule.into() }
    }

    /// Adds the line.
    pub(crate) fn on_line(mut self, line: usize) -> Self {
        self.line = Some(line);
        self
    }

    /// Notes a key that is missing.
    pub(crate) fn unset(key: &str, rule: impl Into<String>) -> Self {
        Self::new(Source::Unset, key, None, rule)
    }

    /// Notes a file that cannot be used at all.
    pub(crate) fn file(path: &Arc<Path>, rule: impl Into<String>) -> Self {
        Self::new(Source::File(Arc::clone(path)), "", None, rule)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) => {
                write!(f, "{}", path.display())?;
                if let Some(line) = self.line {
                    write!(f, ":{line}")?;
                }
                if !self.key.is_empty() {
                    write!(f, ": {}", self.key)?;
                }
            }
            Source::Flag(flag) => write!(f, "{flag} ({})", self.key)?,
            Source::Unset => write!(f, "{}", self.key)?,
        }
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, ": {}", self.rule)
    }
}

/// A setting that has no effect, or another one than its author may expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Where the setting came from.
    pub source: Source,
    /// The key.
    pub key: String,
    /// What becomes of it.
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = Problem::new(self.source.clone(), self.key.clone(), None, self.text.clone());
        problem.fmt(f)
    }
}

/// A configuration that cannot be used: all of its problems, at least one, files in reading order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Every problem found.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        write!(f, "the configuration has {count} problem{}", if count == 1 { "" } else { "s" })?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

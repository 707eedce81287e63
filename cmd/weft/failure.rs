//! How a verb fails: a chain of causes, and the next step.

use std::fmt;

/// An error that ends a verb, with what to do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    hint: Option<String>,
}

impl Failure {
    /// Adds the next step.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Fails with a sentence.
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self { error: anyhow::Error::msg(text.into()), hint: None }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), hint: None }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        for cause in self.error.chain().skip(1) {
            write!(f, "\n  caused by: {cause}")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_prints_its_causes_and_the_next_step_line_by_line() {
        let error = anyhow::Error::new(std::io::Error::other("refused")).context("cannot reach the agent");
        let text = Failure::from(error).hint("start one").to_string();
        assert_eq!(text, "error: cannot reach the agent\n  caused by: refused\n  start one");
    }
}

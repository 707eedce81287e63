//! Which instances belong to a subset.

use std::sync::Arc;

use crate::filter;
use crate::model::Instance;

/// A filter expression over instances, as in the health endpoints. Cheap to clone; equal if its text is.
#[derive(Debug, Clone)]
pub struct Filter {
    text: Arc<str>,
    filter: Arc<filter::Filter>,
}

impl Filter {
    /// Parses an expression.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, filter::FilterError> {
        let filter = filter::Filter::parse::<Instance>(text)?;
        Ok(Self { text: text.into(), filter: Arc::new(filter) })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether `instance` passes.
    pub fn matches(&self, instance: &Instance) -> bool {
        self.filter.is_match(instance)
    }
}

impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Filter {}

//! The registry of metrics and its text format. Each module registers its own struct of handles here.
//!
//! Handles are lock-free; label lookups take a lock, so hot paths look up once and keep the handle.

use prometheus::{Registry, TextEncoder};

/// All metrics of one agent. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// Makes an empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the registry that modules add to.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Adds a collector; a name can be added once.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn add<C: prometheus::core::Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    /// Renders every metric in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    /// If a family is inconsistent.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

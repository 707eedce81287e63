//! The registry of metrics and its text format. Each module registers its own struct of handles here.
//!
//! Handles are lock-free; label lookups take a lock, so hot paths look up once and keep the handle. Series of pairs of services,
//! of which there may be many over time, expire ([`expiry`]).

mod expiry;

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{Registry, TextEncoder};
use tokio::time::Instant;

use self::expiry::Expire;
pub(crate) use self::expiry::{Expiring, Family, Held};

/// All metrics of one agent. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: Registry,
    expiring: Arc<Mutex<Vec<Arc<dyn Expire>>>>,
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

    /// Adds a family whose idle series expire.
    ///
    /// # Errors
    /// If the name is taken.
    pub(crate) fn add_expiring<F: Family>(&self, family: F) -> Result<Expiring<F>, prometheus::Error> {
        let expiring = Expiring::of(self.add(family)?);
        self.expiring.lock().unwrap_or_else(PoisonError::into_inner).push(expiring.sweeper());
        Ok(expiring)
    }

    /// Drops the series that are idle for long enough by `now`; to be called every half minute or so.
    pub(crate) fn expire(&self, now: Instant) {
        let families = self.expiring.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for family in families {
            family.expire(now);
        }
    }

    /// Renders every metric in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    /// If a family is inconsistent.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

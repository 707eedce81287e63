//! Makes the chains of requests out of config entries, beside everything that must not wait.
//!
//! Invariants: an entry that did not change is not compiled again; one that cannot be read, or makes its compiler panic, is
//! quarantined: its last good version stays in force.
//! Not here: what an entry means (`traffic`), which documents count (`policy`).

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use tracing::error;

use super::documents::{DocumentBody, DocumentView};
use crate::metrics::Metrics;
use crate::policy::entry_ends;
use crate::traffic::{Entries, KINDS, Quarantined, Ready, Traffic};

/// An entry as it was made ready, or was not.
struct Made {
    version: u64,
    hash: u64,
    /// The newest version that could be read.
    ready: Option<Ready>,
    failed: Option<Quarantined>,
}

/// Keeps what was made ready.
pub(super) struct Chains {
    made: BTreeMap<String, Made>,
    current: Arc<Traffic>,
    services: prometheus::IntGauge,
    quarantined: prometheus::IntGauge,
}

impl Chains {
    pub(super) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        use prometheus::IntGauge;
        Ok(Self {
            made: BTreeMap::new(),
            current: Arc::default(),
            services: metrics.add(IntGauge::new("weft_traffic_chains", "Services that config entries route.")?)?,
            quarantined: metrics.add(IntGauge::new(
                "weft_traffic_quarantined",
                "Config entries and chains that cannot be made ready: an older version, or none, is in force.",
            )?)?,
        })
    }

    /// Makes the chains of all services; the same value if nothing changed. Blocks while expressions are compiled.
    pub(super) fn traffic(&mut self, documents: &[Arc<DocumentView>]) -> Arc<Traffic> {
        let mut before = std::mem::take(&mut self.made);
        let (mut entries, mut quarantined, mut is_changed) = (Entries::default(), Vec::new(), false);
        for view in documents {
            let DocumentBody::Config(Some(value)) = &view.body else { continue };
            let id = &view.digest.id.name;
            let Some((kind, name)) = entry_ends(id).filter(|(kind, _)| KINDS.contains(kind)) else { continue };
            let known = before.remove(id.as_str());
            let is_same = |made: &Made| (made.version, made.hash) == (view.digest.version, view.digest.hash);
            let made = match known {
                Some(made) if is_same(&made) => made,
                known => {
                    is_changed = true;
                    renew(view, (kind, value), known)
                }
            };
            if let Some(ready) = &made.ready {
                entries.add(kind, name, ready.clone());
            }
            quarantined.extend(made.failed.clone());
            self.made.insert(id.as_str().to_owned(), made);
        }
        if is_changed || !before.is_empty() {
            let traffic = Traffic::new(entries, &self.current, quarantined);
            for one in traffic.quarantined() {
                if !self.current.quarantined().contains(one) {
                    let (name, reason, has_older) = (&one.name, &one.reason, one.has_older);
                    error!(entry = %name, reason, has_older, "a config entry is quarantined: write it anew");
                }
            }
            let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            self.services.set(count(traffic.len()));
            self.quarantined.set(count(traffic.quarantined().len()));
            self.current = Arc::new(traffic);
        }
        Arc::clone(&self.current)
    }
}

fn renew(view: &DocumentView, (kind, value): (&str, &serde_json::Value), known: Option<Made>) -> Made {
    let made = std::panic::catch_unwind(AssertUnwindSafe(|| Ready::new(kind, value)));
    let made = match made {
        Ok(made) => made.map_err(|problems| problems.to_string()),
        Err(_panic) => Err("it made the compiler panic".to_owned()),
    };
    let (version, hash) = (view.digest.version, view.digest.hash);
    match made {
        Ok(ready) => Made { version, hash, ready: Some(ready), failed: None },
        Err(reason) => {
            let ready = known.and_then(|made| made.ready);
            let name = view.digest.id.name.as_str().to_owned();
            let failed = Some(Quarantined { name, reason, has_older: ready.is_some() });
            Made { version, hash, ready, failed }
        }
    }
}

//! Families of metrics whose idle series go: services come and go, and a pair that called once is no series for ever.
//!
//! ```text
//!   with(labels) -> Held: counts without a lock --dropped--> idle --10 min of nothing--> gone --with--> begins at 0
//! ```
//!
//! A series lives while somebody holds a handle of it and for [`IDLE_MAX`] more; one that shows something open (a gauge that is
//! not 0) does not go. So nothing that is counted is ever lost: a handle leads to the series that is shown, and what is counted
//! in passing holds one meanwhile. Who keeps handles has to let go of those that it does not use.
//! Not here: a clock (the sweeper brings `now`), metrics whose series are few and known.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::HashMap;
use prometheus::core::Collector;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use tokio::time::Instant;

/// A series that nobody holds goes after this long: twice the 5 min in which Prometheus still shows what a scrape has not.
pub(super) const IDLE_MAX: Duration = Duration::from_mins(10);

/// A metric with labels.
pub(crate) trait Family: Collector + Clone + fmt::Debug + 'static {
    /// One of its series.
    type Metric: Clone + fmt::Debug + Send + Sync + 'static;

    /// Returns the series of `labels`, made if there is none.
    fn series(&self, labels: &[&str]) -> Self::Metric;

    /// Drops the series of `labels`.
    fn remove(&self, labels: &[&str]);

    /// Tells whether a series shows something that lasts.
    fn is_open(metric: &Self::Metric) -> bool;
}

macro_rules! family {
    ($family:ty, $metric:ty, $is_open:expr) => {
        impl Family for $family {
            type Metric = $metric;

            fn series(&self, labels: &[&str]) -> $metric {
                self.with_label_values(labels)
            }

            fn remove(&self, labels: &[&str]) {
                let _is_gone_already = self.remove_label_values(labels);
            }

            fn is_open(metric: &$metric) -> bool {
                let is_open: fn(&$metric) -> bool = $is_open;
                is_open(metric)
            }
        }
    };
}

family!(IntCounterVec, IntCounter, |_| false);
family!(HistogramVec, Histogram, |_| false);
family!(IntGaugeVec, IntGauge, |gauge| gauge.get() != 0);

/// A handle of a series, which does not go while this lives.
#[derive(Debug, Clone)]
pub(crate) struct Held<M> {
    metric: M,
    _held: Arc<()>,
}

impl<M> Deref for Held<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.metric
    }
}

/// A family whose idle series expire. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Expiring<F: Family>(Arc<Inner<F>>);

impl<F: Family> Clone for Expiring<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// The values of a series' labels, in order.
type Labels = Box<[Box<str>]>;

#[derive(Debug)]
struct Inner<F: Family> {
    family: F,
    series: Mutex<HashMap<Labels, Series<F::Metric>>>,
}

#[derive(Debug)]
struct Series<M> {
    metric: M,
    held: Arc<()>,
    /// When a sweep first found that nobody holds it.
    idle_since: Option<Instant>,
}

impl<F: Family> Expiring<F> {
    pub(super) fn of(family: F) -> Self {
        Self(Arc::new(Inner { family, series: Mutex::default() }))
    }

    pub(super) fn sweeper(&self) -> Arc<dyn Expire> {
        Arc::<Inner<F>>::clone(&self.0)
    }

    /// Returns the series of `labels`, made if there is none: takes a lock and writes the labels down.
    pub(crate) fn with(&self, labels: &[&str]) -> Held<F::Metric> {
        let key: Labels = labels.iter().map(|label| Box::from(*label)).collect();
        let mut all = self.0.lock();
        let series = all.entry(key).or_insert_with(|| {
            let metric = self.0.family.series(labels);
            Series { metric, held: Arc::default(), idle_since: None }
        });
        series.idle_since = None;
        Held { metric: series.metric.clone(), _held: Arc::clone(&series.held) }
    }
}

impl<F: Family> Inner<F> {
    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Series<F::Metric>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a sweep asks of each family.
pub(super) trait Expire: fmt::Debug + Send + Sync {
    /// Drops the series that are idle for [`IDLE_MAX`].
    fn expire(&self, now: Instant);
}

impl<F: Family> Expire for Inner<F> {
    fn expire(&self, now: Instant) {
        // Under the lock nobody gets a handle: one that is not held cannot be counted by.
        self.lock().retain(|labels, series| {
            if Arc::strong_count(&series.held) > 1 || F::is_open(&series.metric) {
                series.idle_since = None;
                return true;
            }
            let is_kept = now < *series.idle_since.get_or_insert(now) + IDLE_MAX;
            if !is_kept {
                let labels: Vec<&str> = labels.iter().map(|label| &**label).collect();
                self.family.remove(&labels);
            }
            is_kept
        });
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, Opts};
    use proptest::prelude::*;

    use super::super::Metrics;
    use super::*;

    const SWEEP: Duration = Duration::from_secs(30);

    fn counters(metrics: &Metrics) -> Expiring<IntCounterVec> {
        metrics.add_expiring(IntCounterVec::new(Opts::new("calls", "Calls."), &["service"]).unwrap()).unwrap()
    }

    /// Sweeps from `from` on for `span`, as an agent does; returns the end.
    fn pass(metrics: &Metrics, from: Instant, span: Duration) -> Instant {
        let mut now = from;
        while now < from + span {
            now += SWEEP;
            metrics.expire(now);
        }
        now
    }

    fn shows(metrics: &Metrics, line: &str) -> bool {
        metrics.render().unwrap().lines().any(|shown| shown == line)
    }

    #[test]
    fn what_nobody_counts_for_ten_minutes_goes_and_begins_again_at_one() {
        let (metrics, start) = (Metrics::new(), crate::clock::now());
        let calls = counters(&metrics);
        calls.with(&["web"]).inc_by(7);
        let mut now = pass(&metrics, start, IDLE_MAX);
        assert!(shows(&metrics, "calls{service=\"web\"} 7"), "ten minutes from the first sweep on");
        // What is counted now and then stays, to the second.
        for _ in 0..5 {
            now = pass(&metrics, now, IDLE_MAX.checked_sub(SWEEP).unwrap());
            calls.with(&["api"]).inc();
        }
        assert!(!metrics.render().unwrap().contains("web"));
        assert!(shows(&metrics, "calls{service=\"api\"} 5"));
        calls.with(&["web"]).inc();
        assert!(shows(&metrics, "calls{service=\"web\"} 1"));
        pass(&metrics, now, IDLE_MAX + SWEEP);
        assert_eq!(metrics.render().unwrap(), "");
        assert!(calls.0.lock().is_empty());
    }

    #[test]
    fn a_handle_that_is_kept_leads_to_what_is_shown_however_long_it_rests() {
        let (metrics, start) = (Metrics::new(), crate::clock::now());
        let calls = counters(&metrics);
        let kept = calls.with(&["web"]);
        let now = pass(&metrics, start, 3 * IDLE_MAX);
        kept.inc();
        assert!(shows(&metrics, "calls{service=\"web\"} 1"));
        let copy = kept.clone();
        drop(kept);
        let now = pass(&metrics, now, 3 * IDLE_MAX);
        copy.inc();
        assert!(shows(&metrics, "calls{service=\"web\"} 2"));
        drop(copy);
        pass(&metrics, now, IDLE_MAX + SWEEP);
        assert!(!metrics.render().unwrap().contains("web"));
    }

    #[test]
    fn a_gauge_that_is_not_0_stays_though_nobody_holds_it_and_a_histogram_goes() {
        let (metrics, start) = (Metrics::new(), crate::clock::now());
        let open = metrics.add_expiring(IntGaugeVec::new(Opts::new("open", "Open."), &["service"]).unwrap()).unwrap();
        let took = HistogramVec::new(HistogramOpts::new("took", "Time."), &["service"]).unwrap();
        let took = metrics.add_expiring(took).unwrap();
        open.with(&["web"]).inc();
        open.with(&["api"]).set(0);
        took.with(&["web"]).observe(1.0);
        let now = pass(&metrics, start, 2 * IDLE_MAX);
        assert_eq!(metrics.render().unwrap().lines().filter(|line| !line.starts_with('#')).count(), 1);
        assert!(shows(&metrics, "open{service=\"web\"} 1"));
        open.with(&["web"]).dec();
        let now = pass(&metrics, now, IDLE_MAX);
        assert!(shows(&metrics, "open{service=\"web\"} 0"), "it changed");
        pass(&metrics, now, 2 * SWEEP);
        assert_eq!(metrics.render().unwrap(), "");
    }

    proptest! {
        /// What was shown when a series went, and what is shown at the end, is all that was counted.
        #[test]
        fn nothing_that_is_counted_is_lost(
            steps in prop::collection::vec((0_u8..5, 0_usize..3, 0_u64..8), 0..120),
        ) {
            let (metrics, mut now) = (Metrics::new(), crate::clock::now());
            let calls = counters(&metrics);
            let names = ["a", "b", "c"];
            let mut held: Vec<(usize, Held<IntCounter>)> = Vec::new();
            let (mut counted, mut gone) = ([0_u64; 3], [0_u64; 3]);
            let shown = |calls: &Expiring<IntCounterVec>, at: usize| {
                calls.0.lock().get(&[Box::from(names[at])][..]).map(|series| series.metric.get())
            };
            for (what, at, minutes) in steps {
                match what {
                    0 => held.push((at, calls.with(&[names[at]]))),
                    1 => held.retain(|(of, _)| *of != at),
                    2 => for (_, handle) in held.iter().filter(|(of, _)| *of == at) {
                        handle.inc();
                        counted[at] += 1;
                    },
                    3 => {
                        calls.with(&[names[at]]).inc();
                        counted[at] += 1;
                    }
                    _ => {
                        let before = [0, 1, 2].map(|at| shown(&calls, at));
                        now += Duration::from_mins(minutes);
                        metrics.expire(now);
                        for at in 0..3 {
                            if shown(&calls, at).is_none() {
                                gone[at] += before[at].unwrap_or(0);
                            }
                        }
                    }
                }
            }
            for at in 0..3 {
                prop_assert_eq!(gone[at] + shown(&calls, at).unwrap_or(0), counted[at]);
                let line = format!("calls{{service=\"{}\"}} {}", names[at], shown(&calls, at).unwrap_or(0));
                prop_assert_eq!(shows(&metrics, &line), shown(&calls, at).is_some());
            }
        }
    }
}

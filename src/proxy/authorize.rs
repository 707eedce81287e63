//! Asks the intentions, at either end of a call, and counts what they say.
//!
//! The destination decides, by the identity that the tunnel's certificate proves. The source asks as well, so that its
//! app hears a clear answer at once; nothing rests on that.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounterVec, Opts};
use tokio::time::Instant;
use tracing::info;

use super::calls::{Admitted, Call};
use super::head;
use super::metrics::Reporter;
use super::worker::Worker;
use crate::authz::{Action, Decision, Guard, Request, Table};
use crate::clock;
use crate::metrics::Metrics;
use crate::model::ServiceName;
use crate::pki::PeerIdentity;

/// What audited intentions say is logged at most this often per worker; it is always counted.
const AUDIT_LOG_REST: Duration = Duration::from_secs(1);

/// A caller may not call a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Denied {
    /// The intention that says so, `default`, or `certificate`.
    pub(crate) rule: Arc<str>,
}

impl Denied {
    fn by(decision: &Decision<'_>) -> Self {
        Self { rule: decision.by.map_or_else(|| Arc::from("default"), |guard| Arc::clone(guard.name())) }
    }

    /// Says it to the caller's people.
    pub(crate) fn text(&self, source: Option<&ServiceName>, destination: &ServiceName) -> String {
        let source = source.map_or("this node", ServiceName::as_str);
        match &*self.rule {
            "default" => format!(
                "`{source}` may not call `{destination}`: no intention allows it and the default is deny; \
                 `weft intention create -allow {source} {destination}` would"
            ),
            "certificate" => format!("`{source}` may not call `{destination}`: the caller's certificate has ended"),
            rule => {
                format!("`{source}` may not call `{destination}`: intention {rule} denies it (`weft why` explains)")
            }
        }
    }
}

/// What is counted of decisions. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct PolicyMetrics {
    denied: IntCounterVec,
    audited: IntCounterVec,
    cut: IntCounterVec,
    logged_at: Rc<Cell<Option<Instant>>>,
}

/// The series of the whole agent, from which each worker makes its own [`PolicyMetrics`].
#[derive(Debug, Clone)]
pub(crate) struct PolicySeries {
    denied: IntCounterVec,
    audited: IntCounterVec,
    cut: IntCounterVec,
}

impl PolicySeries {
    /// Makes the metrics and adds them to the registry.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counters =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntCounterVec::new(Opts::new(name, help), labels)?);
        Ok(Self {
            denied: counters("weft_policy_denied_total", "Calls that were denied.", &["reporter", "rule"])?,
            audited: counters(
                "weft_policy_audited_total",
                "Calls that an audited intention would have decided.",
                &["reporter", "rule", "action"],
            )?,
            cut: counters("weft_policy_cut_total", "Open streams that a changed intention ended.", &["rule"])?,
        })
    }

    /// Handles for one worker.
    pub(crate) fn of_worker(&self) -> PolicyMetrics {
        let Self { denied, audited, cut } = self.clone();
        PolicyMetrics { denied, audited, cut, logged_at: Rc::default() }
    }
}

impl PolicyMetrics {
    /// Decides over a stream of bytes and counts a denial.
    pub(crate) fn stream(
        &self,
        table: &Table,
        reporter: Reporter,
        source: Option<&ServiceName>,
        destination: &ServiceName,
    ) -> Result<(), Denied> {
        let decision = table.of_stream(source, destination, |guard, action| self.audited(reporter, guard, action));
        self.conclude(reporter, &decision)
    }

    /// Decides over a request and counts a denial.
    pub(crate) fn request(
        &self,
        table: &Table,
        reporter: Reporter,
        (source, destination): (Option<&ServiceName>, &ServiceName),
        request: &Request<'_>,
    ) -> Result<(), Denied> {
        let on_audit = |guard: &Guard, action| self.audited(reporter, guard, action);
        let decision = table.of_request(source, destination, request, on_audit);
        self.conclude(reporter, &decision)
    }

    fn conclude(&self, reporter: Reporter, decision: &Decision<'_>) -> Result<(), Denied> {
        if decision.is_allowed() {
            return Ok(());
        }
        self.denied.with_label_values(&[reporter.as_str(), decision.rule()]).inc();
        Err(Denied::by(decision))
    }

    fn audited(&self, reporter: Reporter, guard: &Guard, action: Action) {
        self.audited.with_label_values(&[reporter.as_str(), guard.name(), action.as_str()]).inc();
        let now = clock::now();
        if self.logged_at.get().is_none_or(|at| now - at >= AUDIT_LOG_REST) {
            self.logged_at.set(Some(now));
            info!(intention = %guard.name(), %action, "an audited intention would have decided a call");
        }
    }

    /// Drops the series of intentions that are gone.
    fn forget(&self, before: &Table, after: &Table) {
        for guard in before.guards().filter(|guard| after.guard(guard.name()).is_none()) {
            let rule: &str = guard.name();
            let _never_counted = self.cut.remove_label_values(&[rule]);
            for reporter in [Reporter::Source, Reporter::Destination] {
                let _never_counted = self.denied.remove_label_values(&[reporter.as_str(), rule]);
                for action in [Action::Allow, Action::Deny] {
                    let labels = [reporter.as_str(), rule, action.as_str()];
                    let _never_counted = self.audited.remove_label_values(&labels);
                }
            }
        }
    }
}

/// Refuses a caller whose certificate has ended.
pub(crate) fn in_time(peer: &PeerIdentity) -> Result<(), Denied> {
    if clock::wall_at_tick() < peer.not_after { Ok(()) } else { Err(Denied { rule: Arc::from("certificate") }) }
}

/// Ends open streams of peers as intentions change.
pub(super) async fn run(worker: &Rc<Worker>) {
    let mut changes = worker.snapshot().subscribe();
    let mut table = Arc::clone(&changes.borrow_and_update().policy);
    while changes.changed().await.is_ok() {
        let next = Arc::clone(&changes.borrow_and_update().policy);
        if Arc::ptr_eq(&table, &next) {
            continue;
        }
        let metrics = worker.http.policy();
        let cut = worker.calls.cut(|call| {
            let decision = decide_again(&next, call);
            if !decision.is_allowed() {
                metrics.cut.with_label_values(&[decision.rule()]).inc();
            }
            decision.is_allowed()
        });
        if cut > 0 {
            info!(streams = cut, worker = worker.index, "changed intentions ended open streams");
        }
        if worker.index == 0 {
            metrics.forget(&table, &next);
        }
        table = next;
    }
    // The publisher is gone: what is in force stays.
    worker.closes().await;
}

fn decide_again<'t>(table: &'t Table, call: &Call) -> Decision<'t> {
    let source = call.peer.id.service();
    let Admitted::Request(head) = &call.admitted else { return table.of_stream(source, &call.service, |_, _| {}) };
    match head::decode_request(head) {
        Ok(head) => table.of_request(source, &call.service, &request_of(&head), |_, _| {}),
        Err(_) => table.of_stream(source, &call.service, |_, _| {}),
    }
}

/// What permissions look at in a request that came through a tunnel.
pub(crate) fn request_of(head: &head::RequestHead) -> Request<'_> {
    Request { method: head.method.as_str(), path: head.path.path(), headers: &head.headers }
}

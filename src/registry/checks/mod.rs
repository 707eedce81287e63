//! Checks: what a result means (`state`), and the tasks that run them.
//!
//! ```text
//!   Runners::start(check) -> task: wait, take a permit, probe, report -> Report -> registry's task -> CheckState
//! ```
//!
//! Invariants: a check never runs twice at once; at most [`RUNS_AT_ONCE_MAX`] checks run at once on the node; a
//! stopped check reports nothing that counts, because its epoch is over.
//! Not here: what happens to a status (`task`).

mod http;
mod state;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval_at, timeout};

pub(crate) use self::state::{Change, CheckState, Outcome};
use super::metrics::RegistryMetrics;
use super::{CheckDefinition, Probe};
use crate::clock;
use crate::model::{CheckId, HealthStatus};

/// Most checks that run at once on a node: each holds a socket, and a host's apps are few.
pub(crate) const RUNS_AT_ONCE_MAX: usize = 64;

/// Results that wait for the registry's task: one for each check that can run, twice.
const REPORTS_MAX: usize = 2 * RUNS_AT_ONCE_MAX;

/// The result of one run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) id: CheckId,
    /// Which start of the check it belongs to.
    pub(crate) epoch: u64,
    pub(crate) outcome: Outcome,
}

/// A check that runs; it stops when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) epoch: u64,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The tasks of all checks that run by themselves.
pub(crate) struct Runners {
    tasks: JoinSet<()>,
    permits: Arc<Semaphore>,
    reports: mpsc::Sender<Report>,
    metrics: RegistryMetrics,
    epoch: u64,
}

impl Runners {
    pub(crate) fn new(metrics: RegistryMetrics) -> (Self, mpsc::Receiver<Report>) {
        let (reports, receiver) = mpsc::channel(REPORTS_MAX);
        let permits = Arc::new(Semaphore::new(RUNS_AT_ONCE_MAX));
        (Self { tasks: JoinSet::new(), permits, reports, metrics, epoch: 0 }, receiver)
    }

    /// Starts a check that runs by itself; none for one that waits to be told.
    pub(crate) fn start(&mut self, definition: &CheckDefinition) -> Option<Running> {
        let (Probe::Http { interval, .. } | Probe::Tcp { interval, .. }) = definition.probe else { return None };
        self.epoch += 1;
        let runner = Runner {
            definition: definition.clone(),
            epoch: self.epoch,
            interval,
            permits: Arc::clone(&self.permits),
            reports: self.reports.clone(),
            metrics: self.metrics.clone(),
        };
        Some(Running { epoch: self.epoch, task: self.tasks.spawn(runner.run()) })
    }

    /// Waits for the end of a task; pending while there is none.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn ended(&mut self) -> Result<(), JoinError> {
        match self.tasks.join_next().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Stops all checks and waits until none runs.
    pub(crate) async fn shutdown(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// One check's task.
struct Runner {
    definition: CheckDefinition,
    epoch: u64,
    interval: Duration,
    permits: Arc<Semaphore>,
    reports: mpsc::Sender<Report>,
    metrics: RegistryMetrics,
}

impl Runner {
    async fn run(self) {
        // Spread over the interval, so that the checks of a restarted agent do not all fire at once.
        let first = self.interval.mul_f64(rand::random_range(0.0..1.0));
        let mut ticks = interval_at(clock::now() + first, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Ok(permit) = self.permits.acquire().await else { return };
            let begin = clock::now();
            let outcome = Box::pin(probe(&self.definition.probe)).await;
            drop(permit);
            self.metrics.count_run(self.definition.probe.kind(), outcome.status, clock::now() - begin);
            let report = Report { id: self.definition.id.clone(), epoch: self.epoch, outcome };
            if self.reports.send(report).await.is_err() {
                return;
            }
        }
    }
}

async fn probe(probe: &Probe) -> Outcome {
    match probe {
        Probe::Http { url, method, headers, body, disable_redirects, timeout: limit, .. } => {
            let redirects = if *disable_redirects { http::Redirects::Ignore } else { http::Redirects::Follow };
            let request = http::Request { url, method, headers, body, redirects };
            let late = || format!("HTTP {method} {url}: no answer within {limit:?}");
            timeout(*limit, http::run(&request)).await.unwrap_or_else(|_| critical(late()))
        }
        Probe::Tcp { target, timeout: limit, .. } => match timeout(*limit, TcpStream::connect(target)).await {
            Ok(Ok(_stream)) => {
                Outcome { status: HealthStatus::Passing, output: format!("TCP connect {target}: Success") }
            }
            Ok(Err(error)) => critical(format!("TCP connect {target}: {error}")),
            Err(_) => critical(format!("TCP connect {target}: no answer within {limit:?}")),
        },
        Probe::Ttl { .. } | Probe::Static => critical("this check does not run by itself".to_owned()),
    }
}

fn critical(output: String) -> Outcome {
    Outcome { status: HealthStatus::Critical, output }
}

#[cfg(test)]
mod tests;

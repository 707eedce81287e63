//! Checks: when they run (`schedule`), what they do (a file for each kind), what a result means (`state`).
//!
//! ```text
//!   registry's task --orders--> Runner task: Schedule (pure) -> a task for each run: a kind's `run`, with its timeout
//!         ^                                                          |
//!         +------------ Report (id, epoch, outcome) <----------------+
//! ```
//!
//! Invariants: a check never runs twice at once; each lane of the schedule bounds how many run; a check that was replaced
//! or removed reports nothing that counts, because its epoch is over, and its run is cut off.
//! Not here: what happens to a status (`task`), checks that wait to be told (TTL) or that follow others (`alias`).

pub(crate) mod alias;
mod docker;
mod h2;
mod http;
mod net;
mod os_service;
mod schedule;
mod script;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

pub use self::net::CheckSettings;
pub(crate) use self::net::Tools;
use self::net::critical;
use self::schedule::{Lane, Schedule, Start};
pub(crate) use self::state::{Change, CheckState, Outcome};
use super::metrics::RegistryMetrics;
use super::{CheckDefinition, Probe, Target};
use crate::clock;
use crate::model::CheckId;

/// Results that wait for the registry's task: as many as sockets' checks run; beyond that a run waits to tell.
const REPORTS_MAX: usize = 1024;
/// Batches of orders that wait for the runner, which only moves them into its tables.
const ORDERS_MAX: usize = 16;

/// The result of one run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) id: CheckId,
    /// Which start of the check it belongs to.
    pub(crate) epoch: u64,
    pub(crate) outcome: Outcome,
}

/// What the registry tells the runner.
#[derive(Debug)]
enum Order {
    Start { definition: Arc<CheckDefinition>, epoch: u64 },
    Stop { id: CheckId },
}

/// The checks that run by themselves, as the registry's task sees them.
pub(crate) struct Runners {
    /// The runner: joined at the end.
    task: JoinSet<()>,
    orders: Option<mpsc::Sender<Vec<Order>>>,
    pending: Vec<Order>,
    epoch: u64,
}

impl Runners {
    /// Starts the runner.
    pub(crate) fn new(metrics: RegistryMetrics, tools: Arc<Tools>) -> (Self, mpsc::Receiver<Report>) {
        let (reports, receiver) = mpsc::channel(REPORTS_MAX);
        let (orders, incoming) = mpsc::channel(ORDERS_MAX);
        let mut task = JoinSet::new();
        let runner = Runner {
            schedule: Schedule::default(),
            jobs: BTreeMap::new(),
            runs: JoinSet::new(),
            running: HashMap::new(),
            reports,
            metrics,
            tools,
        };
        task.spawn(runner.run(incoming));
        (Self { task, orders: Some(orders), pending: Vec::new(), epoch: 0 }, receiver)
    }

    /// Starts a check that runs by itself and returns its epoch; none for one that does not. Takes effect at [`flush`].
    ///
    /// [`flush`]: Self::flush
    pub(crate) fn start(&mut self, definition: &Arc<CheckDefinition>) -> Option<u64> {
        let Probe::Periodic { .. } = definition.probe else { return None };
        self.epoch += 1;
        self.pending.push(Order::Start { definition: Arc::clone(definition), epoch: self.epoch });
        Some(self.epoch)
    }

    /// Stops a check and cuts off its run. Takes effect at [`flush`](Self::flush).
    pub(crate) fn stop(&mut self, id: &CheckId) {
        self.pending.push(Order::Stop { id: id.clone() });
    }

    /// Hands over what was started and stopped.
    pub(crate) async fn flush(&mut self) {
        if let (false, Some(orders)) = (self.pending.is_empty(), &self.orders) {
            // A runner that is gone panicked: `ended` tells.
            let _gone = orders.send(std::mem::take(&mut self.pending)).await;
        }
    }

    /// Waits for the runner's end; it ends early only by a panic.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn ended(&mut self) -> Result<(), JoinError> {
        match self.task.join_next().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Stops all checks and waits until none runs.
    pub(crate) async fn shutdown(&mut self) {
        self.orders = None;
        while self.task.join_next().await.is_some() {}
    }
}

/// A check that runs by itself.
struct Job {
    definition: Arc<CheckDefinition>,
    epoch: u64,
    run: Option<AbortHandle>,
}

/// The task that starts every run.
struct Runner {
    schedule: Schedule,
    jobs: BTreeMap<CheckId, Job>,
    runs: JoinSet<Duration>,
    /// Which check a run is of.
    running: HashMap<tokio::task::Id, (CheckId, u64, Instant)>,
    reports: mpsc::Sender<Report>,
    metrics: RegistryMetrics,
    tools: Arc<Tools>,
}

impl Runner {
    async fn run(mut self, mut orders: mpsc::Receiver<Vec<Order>>) {
        loop {
            while let Some(start) = self.schedule.poll(clock::now()) {
                self.launch(&start);
            }
            let due = self.schedule.poll_timeout();
            let timer = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                batch = orders.recv() => match batch {
                    Some(batch) => batch.into_iter().for_each(|order| self.take(order)),
                    None => break,
                },
                Some(ended) = self.runs.join_next_with_id() => self.note_end(ended),
                () = timer => {}
            }
        }
        self.runs.shutdown().await;
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Start { definition, epoch } => {
                let Probe::Periodic { target, interval, .. } = &definition.probe else { return };
                let lane = if target.runs_a_program() { Lane::Process } else { Lane::Net };
                let (id, pace) = (definition.id.clone(), (lane, *interval));
                self.stop(&id);
                // Spread over the interval, so that the checks of a restarted agent do not all fire at once.
                self.schedule.insert(id.clone(), epoch, pace, rand::random_range(0.0..1.0), clock::now());
                self.jobs.insert(id, Job { definition, epoch, run: None });
            }
            Order::Stop { id } => self.stop(&id),
        }
    }

    fn stop(&mut self, id: &CheckId) {
        self.schedule.remove(id);
        if let Some(run) = self.jobs.remove(id).and_then(|job| job.run) {
            run.abort();
        }
    }

    fn launch(&mut self, start: &Start) {
        let now = clock::now();
        let Some(job) = self.jobs.get_mut(&start.id).filter(|job| job.epoch == start.epoch) else {
            self.schedule.finished(&start.id, start.epoch, Duration::ZERO, now);
            return;
        };
        self.metrics.note_start(start.late);
        let run = once(
            Arc::clone(&job.definition),
            job.epoch,
            Arc::clone(&self.tools),
            self.reports.clone(),
            self.metrics.clone(),
        );
        let run = self.runs.spawn(run);
        self.running.insert(run.id(), (start.id.clone(), start.epoch, now));
        job.run = Some(run);
    }

    fn note_end(&mut self, ended: Result<(tokio::task::Id, Duration), JoinError>) {
        let now = clock::now();
        let (task, took) = match ended {
            Ok((task, took)) => (task, Some(took)),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(error) => (error.id(), None),
        };
        let Some((id, epoch, begun)) = self.running.remove(&task) else { return };
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.epoch == epoch) {
            job.run = None;
        }
        self.schedule.finished(&id, epoch, took.unwrap_or_else(|| now - begun), now);
    }
}

/// Runs a check once and tells what it found; returns how long it took.
async fn once(
    definition: Arc<CheckDefinition>,
    epoch: u64,
    tools: Arc<Tools>,
    reports: mpsc::Sender<Report>,
    metrics: RegistryMetrics,
) -> Duration {
    let begin = clock::now();
    let outcome = Box::pin(probe(&definition, &tools)).await;
    let took = clock::now() - begin;
    metrics.count_run(definition.probe.kind(), outcome.status, took);
    // Where nobody listens the agent is stopping.
    let _unheard = reports.send(Report { id: definition.id.clone(), epoch, outcome }).await;
    took
}

async fn probe(definition: &CheckDefinition, tools: &Tools) -> Outcome {
    let Probe::Periodic { target, timeout: limit, .. } = &definition.probe else {
        return critical("this check does not run by itself".to_owned());
    };
    let late = |what: &str| critical(format!("{what}: no answer within {limit:?}"));
    let (what, run) = match target {
        Target::Http(target) => {
            let what = format!("HTTP {} {}", target.method, target.url);
            (what, timeout(*limit, http::run(tools, target)).await)
        }
        Target::Tcp { target, tls } => {
            (format!("TCP connect {target}"), timeout(*limit, tools.tcp(target, tls.as_ref())).await)
        }
        Target::Udp { target } => (format!("UDP connect {target}"), timeout(*limit, tools.udp(target, *limit)).await),
        Target::Grpc { target, service, tls } => {
            (format!("gRPC check {target}"), timeout(*limit, h2::grpc(tools, target, service, tls.as_ref())).await)
        }
        Target::H2ping { target, tls } => {
            (format!("HTTP2 ping {target}"), timeout(*limit, h2::ping(tools, target, tls.as_ref())).await)
        }
        // It keeps what was put out until the timeout.
        Target::Script { args } => return script::run(definition, args, *limit).await,
        Target::OsService { unit } => {
            let settings = tools.settings();
            (format!("OS service {unit}"), timeout(*limit, os_service::run(&settings.dbus_socket, unit)).await)
        }
        Target::Docker { container, shell, args } => {
            let settings = tools.settings();
            let command: Vec<&str> = std::iter::once(shell.as_str()).chain(args.iter().map(String::as_str)).collect();
            let run = docker::run(&settings.docker_socket, container, &command, definition.output_bytes_max);
            (format!("Docker container {container}"), timeout(*limit, run).await)
        }
    };
    run.unwrap_or_else(|_| late(&what))
}

/// Reads a message of the system bus, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn decode_bus_message(bytes: Vec<u8>) {
    let _read_or_refused = os_service::decode(bytes);
}

/// Says why this host cannot run checks of this kind, if it cannot.
pub(crate) async fn unavailable(tools: &Tools, probe: &Probe) -> Option<String> {
    let Probe::Periodic { target, .. } = probe else { return None };
    let settings = tools.settings();
    let (what, socket) = match target {
        Target::OsService { .. } => ("os_service checks ask systemd over D-Bus", &settings.dbus_socket),
        Target::Docker { .. } => ("docker checks need the Docker Engine", &settings.docker_socket),
        _ => return None,
    };
    let error = UnixStream::connect(socket).await.err()?;
    Some(format!("{what}, which is not available on this host: cannot connect to {}: {error}", socket.display()))
}

#[cfg(test)]
mod tests;

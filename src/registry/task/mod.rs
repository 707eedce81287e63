//! The task that owns the registry.
//!
//! An order goes: rules (pure) -> disk -> memory -> published -> answered. A result of a check goes: state machine ->
//! published; its status reaches the disk with the others of the same second.

mod orders;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::checks::{Change, CheckState, Report, Runners, Running};
use super::metrics::RegistryMetrics;
use super::rules;
use super::{
    CheckDefinition, LocalCheck, LocalService, LocalState, Probe, Publication, RegistryError, RegistryParams,
    RegistryStartError, ScopeSource, ServiceDefinition,
};
use crate::catalogue::{LocalInstance, LocalView, UpstreamListener};
use crate::clock;
use crate::model::{CheckId, Entry, EntryKey, HealthStatus, InstanceId};
use crate::store::{Store, StoreError};

/// Longest output of a check in a log line, in characters.
const LOGGED_CHARS_MAX: usize = 160;
/// How long statuses gather before one commit writes them: an fsync per second at most, however many checks flap.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// How long to wait after a write that failed in the background.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What a handle asks for.
#[derive(Debug)]
pub(super) enum Order {
    RegisterService { definition: Box<ServiceDefinition>, replace_existing_checks: bool },
    DeregisterService { id: InstanceId },
    RegisterCheck { definition: Box<CheckDefinition> },
    DeregisterCheck { id: CheckId },
    UpdateTtl { id: CheckId, status: HealthStatus, output: String },
    ReplaceConfig { services: Vec<ServiceDefinition> },
}

/// An order and where its answer goes.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) order: Order,
    pub(super) answer: oneshot::Sender<Result<(), RegistryError>>,
}

/// Who registered a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Api,
    Config,
}

struct HeldService {
    shown: Arc<LocalService>,
    origin: Origin,
}

struct HeldCheck {
    shown: Arc<LocalCheck>,
    /// Registered by itself: it is in the store by itself.
    alone: bool,
    state: CheckState,
    running: Option<Running>,
}

enum Event {
    Stop,
    Command(Command),
    Report(Report),
    Ended(Result<(), JoinError>),
    Timeout,
}

/// Owns what is registered.
pub(super) struct Task {
    store: Store,
    scope: ScopeSource,
    services: BTreeMap<InstanceId, HeldService>,
    checks: BTreeMap<CheckId, HeldCheck>,
    /// Statuses of before the restart, until their checks are there.
    kept: BTreeMap<CheckId, HealthStatus>,
    /// Checks whose status is not on disk yet.
    unwritten: BTreeSet<CheckId>,
    write_at: Option<Instant>,
    index: u64,
    runners: Runners,
    reports: mpsc::Receiver<Report>,
    commands: mpsc::Receiver<Command>,
    state: watch::Sender<Arc<LocalState>>,
    publication: watch::Sender<Arc<Publication>>,
    metrics: RegistryMetrics,
}

impl Task {
    /// Loads the store, takes the config's services, starts the checks and publishes.
    pub(super) async fn load(
        params: RegistryParams,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Self, RegistryStartError> {
        let metrics = RegistryMetrics::new(&params.metrics).map_err(RegistryStartError::Metrics)?;
        let loaded =
            blocking(params.store.clone(), |store| Ok((store.services()?, store.checks()?, store.check_statuses()?)));
        let (services, checks, statuses) = loaded.await.map_err(RegistryStartError::Store)?;
        let (runners, reports) = Runners::new(metrics.clone());
        let mut task = Self {
            store: params.store,
            scope: params.scope,
            services: BTreeMap::new(),
            checks: BTreeMap::new(),
            kept: statuses.into_iter().collect(),
            unwritten: BTreeSet::new(),
            write_at: None,
            index: params.first_index,
            runners,
            reports,
            commands,
            state: watch::Sender::new(Arc::default()),
            publication: watch::Sender::new(Arc::default()),
            metrics,
        };
        let now = clock::now();
        task.config_is_right(&params.config_services).map_err(RegistryStartError::Config)?;
        for service in params.config_services {
            task.set_service(service, Origin::Config, now);
        }
        for service in services {
            task.load_service(service, now);
        }
        for check in checks {
            task.load_check(check, now);
        }
        task.kept.clear();
        task.publish();
        Ok(task)
    }

    /// Returns readers of what is published.
    pub(super) fn subscribe(&self) -> (watch::Receiver<Arc<LocalState>>, watch::Receiver<Arc<Publication>>) {
        (self.state.subscribe(), self.publication.subscribe())
    }

    /// Runs until `stop`; the last statuses are on disk when it ends.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            match self.next_event(&stop).await {
                Event::Stop => break,
                Event::Command(Command { order, answer }) => {
                    let result = self.execute(order).await;
                    self.publish();
                    // A caller that went away wants no answer.
                    let _unwanted = answer.send(result);
                }
                Event::Report(report) => self.take_report(report),
                Event::Ended(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Event::Ended(_) => {}
                Event::Timeout => self.handle_timeout().await,
            }
        }
        self.runners.shutdown().await;
        self.write_statuses().await;
    }

    /// Waits for what comes next.
    ///
    /// Cancel safe: every branch is.
    async fn next_event(&mut self, stop: &CancellationToken) -> Event {
        let due = self.checks.values().filter_map(|check| check.state.poll_timeout()).chain(self.write_at).min();
        let timer = async {
            match due {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Event::Stop,
            Some(command) = self.commands.recv() => Event::Command(command),
            () = timer => Event::Timeout,
            Some(report) = self.reports.recv() => Event::Report(report),
            ended = self.runners.ended() => Event::Ended(ended),
        }
    }

    /// Holds the services of config files against each other and against those of the API.
    fn config_is_right(&self, config: &[ServiceDefinition]) -> Result<(), RegistryError> {
        let scope = (self.scope)();
        let mut seen = BTreeSet::new();
        for service in config {
            let id = service.record.id.as_str();
            rules::in_scope(service, &scope)?;
            if !seen.insert(id) {
                return Err(RegistryError::Invalid(format!("two services of the config files have the ID {id:?}")));
            }
            if self.services.get(id).is_some_and(|held| held.origin == Origin::Api) {
                return Err(RegistryError::Invalid(format!(
                    "service ID {id:?} is registered by the API: deregister it first, or change the file's ID"
                )));
            }
        }
        let of_api = self.services.values().filter(|held| held.origin == Origin::Api);
        let services: Vec<_> = of_api.map(|held| &held.shown.definition).chain(config).collect();
        let stays = |check: &&CheckDefinition| {
            check.service.as_ref().is_none_or(|id| services.iter().any(|service| service.record.id == *id))
        };
        rules::hold_together(&services, &self.alone().filter(stays).collect::<Vec<_>>())
    }

    fn load_service(&mut self, service: ServiceDefinition, now: Instant) {
        let id = &service.record.id;
        let services: Vec<_> = self.definitions().chain([&service]).collect();
        let mut fits = rules::in_scope(&service, &(self.scope)()).and_then(|()| rules::hold_together(&services, &[]));
        if self.services.contains_key(id) {
            fits = Err(RegistryError::Invalid("a config file has a service with its ID".to_owned()));
        }
        match fits {
            Ok(()) => self.set_service(service, Origin::Api, now),
            Err(error) => warn!(service = %id, %error, "stored service is left out; it stays on disk"),
        }
    }

    fn load_check(&mut self, check: CheckDefinition, now: Instant) {
        let is_held = check.service.as_ref().is_none_or(|id| self.services.contains_key(id));
        let services: Vec<_> = self.definitions().collect();
        let alone: Vec<_> = self.alone().chain([&check]).collect();
        match rules::hold_together(&services, &alone) {
            Ok(()) if is_held => self.set_check(check, true, now),
            Ok(()) => warn!(check = %check.id, "stored check is left out, for its service is; it stays on disk"),
            Err(error) => warn!(check = %check.id, %error, "stored check is left out; it stays on disk"),
        }
    }

    fn definitions(&self) -> impl Iterator<Item = &ServiceDefinition> {
        self.services.values().map(|held| &held.shown.definition)
    }

    fn alone(&self) -> impl Iterator<Item = &CheckDefinition> {
        self.checks.values().filter(|check| check.alone).map(|check| &check.shown.definition)
    }

    /// Puts a service in place, with its checks; checks that its definition had and has not are dropped.
    fn set_service(&mut self, definition: ServiceDefinition, origin: Origin, now: Instant) {
        let id = definition.record.id.clone();
        let old = self.services.get(&id).map(|held| Arc::clone(&held.shown));
        let old_checks = old.as_ref().map(|old| old.definition.checks.as_slice()).unwrap_or_default();
        for check in old_checks {
            if !definition.checks.iter().any(|new| new.id == check.id) {
                self.drop_check(&check.id);
            }
        }
        let shown = match old {
            Some(old) if old.definition == definition => old,
            old => {
                self.index += 1;
                let create_index = old.map_or(self.index, |old| old.create_index);
                Arc::new(LocalService { definition: definition.clone(), create_index, modify_index: self.index })
            }
        };
        self.services.insert(id.clone(), HeldService { shown, origin });
        for check in definition.checks {
            self.set_check(check, false, now);
        }
        // Checks that stand alone show the service's name and tags.
        let ids: Vec<_> = self.checks.keys().cloned().collect();
        for check in ids {
            self.show_check(&check);
        }
    }

    /// Puts a check in place. The status of one with the same id stays; one that did not change runs on.
    fn set_check(&mut self, definition: CheckDefinition, alone: bool, now: Instant) {
        let id = definition.id.clone();
        if let Some(held) = self.checks.get_mut(&id)
            && held.shown.definition == definition
        {
            held.alone = alone;
            return;
        }
        let before = self.checks.remove(&id).map(|held| held.state.status());
        // What is set by hand says itself what it is.
        let kept = before.or_else(|| self.kept.get(&id).copied()).filter(|_| definition.probe != Probe::Static);
        let state = CheckState::new(&definition, kept, now);
        let running = self.runners.start(&definition);
        let shown = Arc::new(LocalCheck {
            definition,
            status: state.status(),
            output: String::new(),
            service_name: String::new(),
            service_tags: Box::default(),
        });
        self.checks.insert(id.clone(), HeldCheck { shown, alone, state, running });
        self.note_change(&id, Change::Status);
    }

    fn drop_check(&mut self, id: &CheckId) {
        self.checks.remove(id);
        self.unwritten.remove(id);
    }

    fn note_change(&mut self, id: &CheckId, change: Change) {
        if change == Change::Status {
            self.unwritten.insert(id.clone());
            self.write_at.get_or_insert(clock::now() + FLUSH_AFTER);
        }
        if change != Change::None {
            self.show_check(id);
        }
    }

    fn show_check(&mut self, id: &CheckId) {
        let Some(held) = self.checks.get_mut(id) else { return };
        let service = held.shown.definition.service.as_ref().and_then(|id| self.services.get(id));
        let record = service.map(|service| &service.shown.definition.record);
        let shown = LocalCheck {
            definition: held.shown.definition.clone(),
            status: held.state.status(),
            output: held.state.output().to_owned(),
            service_name: record.map(|record| record.name.to_string()).unwrap_or_default(),
            service_tags: record.map(|record| record.tags.clone()).unwrap_or_default(),
        };
        if *held.shown != shown {
            held.shown = Arc::new(shown);
        }
    }

    fn take_report(&mut self, report: Report) {
        let Some(check) = self.checks.get_mut(&report.id) else { return };
        if check.running.as_ref().is_none_or(|running| running.epoch != report.epoch) {
            return;
        }
        let before = check.state.status();
        let change = check.state.record(report.outcome, clock::now());
        if change == Change::Status {
            // The status line; an app's whole page belongs into the API's answer, not into the log.
            let (status, output) = (check.state.status(), check.state.output().lines().next().unwrap_or_default());
            let output: String = output.chars().take(LOGGED_CHARS_MAX).collect();
            info!(check = %report.id, %before, %status, output, "check changed");
        }
        self.note_change(&report.id, change);
        self.publish();
    }

    /// Expires TTLs, deregisters what was critical for too long, writes statuses.
    async fn handle_timeout(&mut self) {
        let now = clock::now();
        let mut changed = Vec::new();
        let mut due = BTreeSet::new();
        for (id, check) in &mut self.checks {
            let change = check.state.handle_timeout(now);
            if change != Change::None {
                changed.push((id.clone(), change));
            }
            if check.state.deregister_due(now) {
                due.extend(check.shown.definition.service.clone());
                // Counted anew, so that a disk that fails is not asked again at once.
                check.state.postpone_deregistration(now);
            }
        }
        for (id, change) in changed {
            info!(check = %id, "TTL of check expired");
            self.note_change(&id, change);
        }
        for id in due {
            warn!(service = %id, "service was critical for too long and is deregistered");
            if let Err(error) = self.deregister_service(&id).await {
                warn!(service = %id, %error, "cannot deregister service");
            }
        }
        if self.write_at.is_some_and(|at| now >= at) {
            self.write_statuses().await;
        }
        self.publish();
    }

    async fn write_statuses(&mut self) {
        self.write_at = None;
        let statuses: Vec<_> =
            self.unwritten.iter().filter_map(|id| Some((id.clone(), self.checks.get(id)?.state.status()))).collect();
        if statuses.is_empty() {
            return;
        }
        match self.on_disk(move |store| store.put_check_statuses(&statuses)).await {
            Ok(()) => self.unwritten.clear(),
            Err(error) => {
                warn!(%error, "cannot keep the status of checks");
                self.write_at = Some(clock::now() + RETRY_AFTER);
            }
        }
    }

    async fn on_disk(
        &self,
        change: impl FnOnce(&Store) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), RegistryError> {
        blocking(self.store.clone(), change).await.map_err(|error| RegistryError::Store(chain(&error)))
    }

    /// Shows what is registered to the readers, each only what changed for it.
    fn publish(&self) {
        let state = LocalState {
            services: self.services.iter().map(|(id, held)| (id.clone(), Arc::clone(&held.shown))).collect(),
            checks: self.checks.iter().map(|(id, held)| (id.clone(), Arc::clone(&held.shown))).collect(),
        };
        let publication = publication(&state);
        self.metrics.show(state.services.len(), state.checks.values().map(|check| check.status));
        replace_if_changed(&self.state, state);
        replace_if_changed(&self.publication, publication);
    }
}

fn replace_if_changed<T: PartialEq>(sender: &watch::Sender<Arc<T>>, value: T) {
    sender.send_if_modified(|held| {
        let changed = **held != value;
        if changed {
            *held = Arc::new(value);
        }
        changed
    });
}

/// Derives what other nodes and the data plane get.
fn publication(state: &LocalState) -> Publication {
    let mut records = BTreeMap::new();
    let mut view = LocalView::default();
    let mut upstreams = BTreeSet::new();
    for (id, service) in &state.services {
        let definition = &service.definition;
        let record = &definition.record;
        records.insert(EntryKey::Service(id.clone()), Entry::Service(record.clone().into()));
        upstreams.extend(definition.upstreams.iter().map(|upstream| UpstreamListener {
            bind: upstream.bind,
            source: record.name.clone(),
            destination: upstream.destination.clone(),
            protocol: upstream.protocol,
        }));
        // A service without a port only calls; there is nothing to relay to.
        if definition.app_addr.port() > 0 {
            let (service, protocol) = (record.name.clone(), record.protocol);
            view.instances.insert(id.clone(), LocalInstance { service, app_addr: definition.app_addr, protocol });
        }
    }
    for (id, check) in &state.checks {
        let record = rules::check_record(&check.definition, check.status);
        records.insert(EntryKey::Check(id.clone()), Entry::Check(record.into()));
    }
    view.upstreams = upstreams.into_iter().collect();
    Publication { records, view }
}

/// Runs `call` where blocking is allowed.
async fn blocking<T: Send + 'static>(
    store: Store,
    call: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(move || call(&store)).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down: the task's next await never returns.
            Err(_cancelled) => std::future::pending().await,
        },
    }
}

/// Renders an error with its causes: the answer of the API is one text.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string does not fail.
        let _infallible = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

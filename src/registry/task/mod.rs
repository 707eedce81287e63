//! The task that owns the registry.
//!
//! An order goes: rules (pure) -> disk -> memory -> published -> answered. A result of a check goes: state machine ->
//! published; its status reaches the disk with the others of the same second. What is published changes in place, check
//! by check: ten thousand checks make a thousand results a second.

mod changes;
mod orders;
mod publish;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::checks::alias::AliasTarget;
use super::checks::{Change, CheckState, Outcome, Report, Runners, Tools, unavailable};
use super::metrics::RegistryMetrics;
use super::rules::{self, Spread};
use super::{
    CheckDefinition, ConfigDefinitions, ExternalNode, ExternalPart, ExternalWrite, LocalCheck, LocalService,
    LocalState, Probe, Publication, RegistryError, RegistryParams, RegistryStartError, ScopeSource, ScriptPolicy,
    ServiceDefinition, external,
};
use crate::clock;
use crate::model::{CheckId, HealthStatus, InstanceId, NodeName};
use crate::store::{Store, StoreError};

/// Longest output of a check in a log line, in characters.
const LOGGED_CHARS_MAX: usize = 160;
/// How long statuses gather before one commit writes them: an fsync per second at most, however many checks flap.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// Results that are taken before they are published together.
const REPORTS_AT_ONCE_MAX: usize = 256;
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
    ReplaceConfig(Box<ConfigDefinitions>),
    RegisterExternal(Box<ExternalWrite>),
    DeregisterExternal { node: NodeName, part: ExternalPart },
    NoteRemote { statuses: BTreeMap<AliasTarget, Outcome> },
}

/// An order and where its answer goes.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) order: Order,
    pub(super) answer: oneshot::Sender<Result<(), RegistryError>>,
}

/// Who registered a service or a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Api,
    Config,
}

struct HeldService {
    shown: Arc<LocalService>,
    origin: Origin,
}

struct HeldCheck {
    shown: Arc<LocalCheck>,
    /// Registered by itself, by whom; none: it is part of its service's definition.
    alone: Option<Origin>,
    state: CheckState,
    /// Of the run whose reports count.
    epoch: Option<u64>,
    /// Its place in `Task::deadlines`.
    deadline: Option<Instant>,
}

enum Event {
    Stop,
    Command(Command),
    /// In `Task::batch`.
    Reports,
    Ended(Result<(), JoinError>),
    Timeout,
}

/// Readers of what is published, and of the aliases that follow other nodes.
pub(super) type Readers =
    (watch::Receiver<Arc<LocalState>>, watch::Receiver<Arc<Publication>>, watch::Receiver<Arc<BTreeSet<AliasTarget>>>);

/// Owns what is registered.
pub(super) struct Task {
    store: Store,
    node: NodeName,
    gateway_ip: IpAddr,
    scope: ScopeSource,
    scripts: ScriptPolicy,
    services: BTreeMap<InstanceId, HeldService>,
    checks: BTreeMap<CheckId, HeldCheck>,
    externals: BTreeMap<NodeName, Arc<ExternalNode>>,
    /// Statuses of before the restart, until their checks are there.
    kept: BTreeMap<CheckId, HealthStatus>,
    /// When checks have something to do by themselves.
    deadlines: BTreeSet<(Instant, CheckId)>,
    /// What changed since the last publication.
    dirty: publish::Dirty,
    /// How checks are told to others.
    spread: Spread,
    /// What aliases of other nodes say.
    remote: BTreeMap<AliasTarget, Outcome>,
    wanted: watch::Sender<Arc<BTreeSet<AliasTarget>>>,
    /// Results taken from `reports`.
    batch: Vec<Report>,
    /// Checks whose status is not on disk yet.
    unwritten: BTreeSet<CheckId>,
    write_at: Option<Instant>,
    /// Counts with each write of statuses.
    changes: changes::ChangeLog,
    index: u64,
    tools: Arc<Tools>,
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
        let loaded = blocking(params.store.clone(), |store| {
            Ok((store.services()?, store.checks()?, store.check_statuses()?, store.externals()?))
        });
        let (services, checks, statuses, externals) = loaded.await.map_err(RegistryStartError::Store)?;
        let settings = params.check_settings.clone();
        let tools = blocking_call(move || Tools::new(settings)).await.map_err(RegistryStartError::Checks)?;
        let tools = Arc::new(tools);
        let (runners, reports) = Runners::new(metrics.clone(), Arc::clone(&tools));
        let mut task = Self {
            store: params.store,
            node: params.node,
            gateway_ip: params.gateway_ip,
            scope: params.scope,
            scripts: params.config.scripts,
            services: BTreeMap::new(),
            checks: BTreeMap::new(),
            externals: BTreeMap::new(),
            kept: statuses.into_iter().collect(),
            deadlines: BTreeSet::new(),
            dirty: publish::Dirty::default(),
            spread: Spread::Each,
            remote: BTreeMap::new(),
            wanted: watch::Sender::new(Arc::default()),
            batch: Vec::new(),
            unwritten: BTreeSet::new(),
            write_at: None,
            changes: changes::ChangeLog::default(),
            index: params.first_index,
            tools,
            runners,
            reports,
            commands,
            state: watch::Sender::new(Arc::default()),
            publication: watch::Sender::new(Arc::default()),
            metrics,
        };
        let now = clock::now();
        task.config_is_right(&params.config.services, &[], params.config.scripts)
            .map_err(RegistryStartError::Config)?;
        for service in params.config.services {
            task.warn_unavailable(&service.checks).await;
            task.set_service(service, Origin::Config, now);
        }
        for service in services {
            task.load_service(service, now);
        }
        for check in params.config.checks {
            task.warn_unavailable(std::slice::from_ref(&check)).await;
            task.load_check(check, Origin::Config, now);
        }
        for check in checks {
            task.load_check(check, Origin::Api, now);
        }
        for node in externals {
            task.load_external(node);
        }
        task.kept.clear();
        task.publish();
        Ok(task)
    }

    /// Returns readers of what is published.
    pub(super) fn subscribe(&self) -> Readers {
        (self.state.subscribe(), self.publication.subscribe(), self.wanted.subscribe())
    }

    /// Runs until `stop`; the last statuses are on disk when it ends.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            self.runners.flush().await;
            match self.next_event(&stop).await {
                Event::Stop => break,
                Event::Command(Command { order, answer }) => {
                    let result = self.execute(order).await;
                    self.publish();
                    // A caller that went away wants no answer.
                    let _unwanted = answer.send(result);
                }
                Event::Reports => {
                    for report in std::mem::take(&mut self.batch) {
                        self.take_report(report);
                    }
                    self.publish();
                }
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
        let due = self.deadlines.first().map(|(at, _)| *at).into_iter().chain(self.write_at).min();
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
            1.. = self.reports.recv_many(&mut self.batch, REPORTS_AT_ONCE_MAX) => Event::Reports,
            ended = self.runners.ended() => Event::Ended(ended),
        }
    }

    /// Holds what config files define against each other and against what the API registered.
    fn config_is_right(
        &self,
        config: &[ServiceDefinition],
        checks: &[CheckDefinition],
        scripts: ScriptPolicy,
    ) -> Result<(), RegistryError> {
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
            rules::may_run(&service.checks, scripts, Origin::Config)?;
        }
        rules::may_run(checks, scripts, Origin::Config)?;
        let of_api = self.services.values().filter(|held| held.origin == Origin::Api);
        let services: Vec<_> = of_api.map(|held| &held.shown.definition).chain(config).collect();
        let has = |id: &InstanceId| services.iter().any(|service| service.record.id == *id);
        for check in checks {
            let id = check.id.as_str();
            if let Some(service) = check.service.as_ref().filter(|service| !has(service)) {
                let service = service.as_str();
                return Err(RegistryError::Invalid(format!(
                    "check {id:?} is about service {service:?}, which is not here"
                )));
            }
            if self.checks.get(id).is_some_and(|held| held.alone == Some(Origin::Api)) {
                return Err(RegistryError::Invalid(format!(
                    "check ID {id:?} is registered by the API: deregister it first, or change the file's ID"
                )));
            }
        }
        let stays = |check: &&CheckDefinition| check.service.as_ref().is_none_or(has);
        let alone: Vec<_> = self.alone(Some(Origin::Api)).filter(stays).chain(checks).collect();
        rules::hold_together(&services, &alone, self.external_bytes()).map(drop)
    }

    fn load_service(&mut self, service: ServiceDefinition, now: Instant) {
        let id = &service.record.id;
        let services: Vec<_> = self.definitions().chain([&service]).collect();
        let mut fits = rules::in_scope(&service, &(self.scope)())
            .and_then(|()| rules::may_run(&service.checks, self.scripts, Origin::Api))
            .and_then(|()| rules::hold_together(&services, &[], 0).map(drop));
        if self.services.contains_key(id) {
            fits = Err(RegistryError::Invalid("a config file has a service with its ID".to_owned()));
        }
        match fits {
            Ok(()) => self.set_service(service, Origin::Api, now),
            Err(error) => warn!(service = %id, %error, "stored service is left out; it stays on disk"),
        }
    }

    /// Takes a check of a config file or of the disk at the start.
    fn load_check(&mut self, check: CheckDefinition, origin: Origin, now: Instant) {
        let is_held = check.service.as_ref().is_none_or(|id| self.services.contains_key(id));
        let services: Vec<_> = self.definitions().collect();
        let alone: Vec<_> = self.alone(None).chain([&check]).collect();
        let fits = rules::may_run(std::slice::from_ref(&check), self.scripts, origin)
            .and_then(|()| rules::hold_together(&services, &alone, 0));
        match fits {
            Ok(_) if is_held => self.set_check(check, Some(origin), now),
            Ok(_) => warn!(check = %check.id, "check is left out, for its service is not here"),
            Err(error) => warn!(check = %check.id, %error, "check is left out"),
        }
    }

    /// Takes a node without an agent of the disk at the start.
    fn load_external(&mut self, node: ExternalNode) {
        let name = node.record.name.clone();
        let (node, outside) = node.within(&(self.scope)());
        if outside > 0 {
            warn!(
                node = %name,
                services = outside,
                "services of a node without an agent are outside this node's serve scope and are left out; they stay on disk until the node is written again"
            );
        }
        let mut externals = self.externals.clone();
        externals.insert(name.clone(), Arc::new(node));
        match self.external_fits(&externals) {
            Ok(()) => {
                self.externals = externals;
                self.dirty.structure = true;
            }
            Err(error) => warn!(node = %name, %error, "stored node without an agent is left out; it stays on disk"),
        }
    }

    /// Holds nodes without an agent against their own bounds and against what is registered.
    fn external_fits(&self, externals: &BTreeMap<NodeName, Arc<ExternalNode>>) -> Result<(), RegistryError> {
        let bytes = external::are_bounded(externals)?;
        let services: Vec<_> = self.definitions().collect();
        rules::hold_together(&services, &self.alone(None).collect::<Vec<_>>(), bytes).map(drop)
    }

    /// How many bytes of the records nodes without an agent take.
    fn external_bytes(&self) -> usize {
        external::bytes(self.externals.values())
    }

    /// Tells of checks that this host cannot run; what they need may come up later.
    async fn warn_unavailable(&self, checks: &[CheckDefinition]) {
        for check in checks {
            if let Some(why) = unavailable(&self.tools, &check.probe).await {
                warn!(check = %check.id, why, "check cannot run for the time being");
            }
        }
    }

    fn definitions(&self) -> impl Iterator<Item = &ServiceDefinition> {
        self.services.values().map(|held| &held.shown.definition)
    }

    /// Checks that stand alone, of one origin or of all.
    fn alone(&self, origin: Option<Origin>) -> impl Iterator<Item = &CheckDefinition> {
        let is_it = move |check: &&HeldCheck| check.alone.is_some_and(|of| origin.is_none_or(|wanted| wanted == of));
        self.checks.values().filter(is_it).map(|check| &*check.shown.definition)
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
        self.dirty.structure = true;
        for check in definition.checks {
            self.set_check(check, None, now);
        }
        // Checks that stand alone show the service's name and tags.
        let of_this = |check: &&HeldCheck| check.shown.definition.service.as_ref() == Some(&id);
        let ids: Vec<_> = self.checks.values().filter(of_this).map(|check| check.shown.definition.id.clone()).collect();
        for check in ids {
            self.show_check(&check);
        }
    }

    /// Puts a check in place. The status of one with the same id stays; one that did not change runs on.
    fn set_check(&mut self, definition: CheckDefinition, alone: Option<Origin>, now: Instant) {
        let id = definition.id.clone();
        if let Some(held) = self.checks.get_mut(&id)
            && *held.shown.definition == definition
        {
            held.alone = alone;
            return;
        }
        let held = self.checks.remove(&id);
        if let Some(at) = held.as_ref().and_then(|held| held.deadline) {
            self.deadlines.remove(&(at, id.clone()));
        }
        let (before, output) = held.map(|held| (held.state.status(), held.state.output().to_owned())).unzip();
        // What is set by hand says itself what it is.
        let kept = before.or_else(|| self.kept.get(&id).copied()).filter(|_| definition.probe != Probe::Static);
        let definition = Arc::new(definition);
        let state = CheckState::new(&definition, kept, output.unwrap_or_default(), now);
        self.runners.stop(&id);
        let epoch = self.runners.start(&definition);
        let shown = Arc::new(LocalCheck {
            definition,
            status: state.status(),
            output: state.output().to_owned(),
            service_name: String::new(),
            service_tags: Box::default(),
        });
        self.checks.insert(id.clone(), HeldCheck { shown, alone, state, epoch, deadline: None });
        self.dirty.structure = true;
        self.note_change(&id, Change::Status);
    }

    fn drop_check(&mut self, id: &CheckId) {
        if let Some(at) = self.checks.remove(id).and_then(|held| held.deadline) {
            self.deadlines.remove(&(at, id.clone()));
        }
        self.runners.stop(id);
        self.unwritten.remove(id);
        self.dirty.structure = true;
    }

    fn note_change(&mut self, id: &CheckId, change: Change) {
        self.rearm(id);
        if change == Change::Status {
            self.unwritten.insert(id.clone());
            self.write_at.get_or_insert(clock::now() + FLUSH_AFTER);
        }
        if change != Change::None {
            self.dirty.note(id, change);
            self.show_check(id);
        }
    }

    /// Puts a check's next deadline where the timer finds it.
    fn rearm(&mut self, id: &CheckId) {
        let Some(held) = self.checks.get_mut(id) else { return };
        let (old, new) = (held.deadline, held.state.poll_timeout());
        held.deadline = new;
        if old != new {
            old.map(|at| self.deadlines.remove(&(at, id.clone())));
            new.map(|at| self.deadlines.insert((at, id.clone())));
        }
    }

    fn show_check(&mut self, id: &CheckId) {
        let Some(held) = self.checks.get_mut(id) else { return };
        let service = held.shown.definition.service.as_ref().and_then(|id| self.services.get(id));
        let record = service.map(|service| &service.shown.definition.record);
        let shown = LocalCheck {
            definition: Arc::clone(&held.shown.definition),
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
        if check.epoch != Some(report.epoch) {
            return;
        }
        let before = check.state.status();
        let change = check.state.record(report.outcome, clock::now());
        if change == Change::Status {
            // The status line; an app's whole page belongs into the API's answer, not into the log.
            let (status, output) = (check.state.status(), check.state.output().lines().next().unwrap_or_default());
            if self.changes.admit(status) {
                let output: String = output.chars().take(LOGGED_CHARS_MAX).collect();
                info!(check = %report.id, %before, %status, output, "check changed");
            }
        }
        self.note_change(&report.id, change);
    }

    /// Expires TTLs, deregisters what was critical for too long, writes statuses.
    async fn handle_timeout(&mut self) {
        let now = clock::now();
        let mut due = BTreeSet::new();
        while let Some((at, id)) = self.deadlines.first().cloned().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(at, id.clone()));
            let Some(check) = self.checks.get_mut(&id) else { continue };
            check.deadline = None;
            let change = check.state.handle_timeout(now);
            if check.state.deregister_due(now) {
                due.extend(check.shown.definition.service.clone());
                // Counted anew, so that a disk that fails is not asked again at once.
                check.state.postpone_deregistration(now);
            }
            if change == Change::Status && self.changes.admit(check.state.status()) {
                info!(check = %id, "TTL of check expired");
            }
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
        if let Some(more) = self.changes.end() {
            let changes::Counts { passing, warning, critical } = more;
            info!(count = more.all(), passing, warning, critical, "more checks changed within the same second");
        }
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
}

/// Asks the store, where blocking is allowed.
async fn blocking<T: Send + 'static>(
    store: Store,
    call: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    blocking_call(move || call(&store)).await
}

/// Runs `call` where blocking is allowed.
async fn blocking_call<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(call).await {
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

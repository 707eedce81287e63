//! Makes the table of intentions, and the chains of requests (`traffic`), out of the documents, away from everything that must not wait.
//!
//! ```text
//!   documents --watch--> Compiler --one intention--> thread "weft-policy": Guard | refused | panic | too slow
//!                           |                                                  \-> quarantine
//!                           +-- Table --watch--> gossip's task --> Snapshot --> data plane
//! ```
//!
//! Invariants: what is in force is replaced only by what was made ready; an intention that cannot be is quarantined:
//! its last good version stays in force, and where there is none, the calls that it is about are denied; all others go
//! on. A document that did not change is not made ready again.
//! Not here: what an intention means (`authz`), which documents count (`policy`).

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::documents::{DocumentBody, DocumentView, DocumentsView};
use super::traffic::Chains;
use crate::authz::{Action, CompileError, Guard, Intention, Origin, Quarantined, Table};
use crate::clock;
use crate::metrics::Metrics;
use crate::policy::{DocumentKind, entry_ends};
use crate::traffic::Traffic;
use crate::upstream;

/// Most time of the processor for one intention: a hundred times what a large one takes.
const WORK_MAX: Duration = Duration::from_millis(100);
/// Longest wait for it on a busy host.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Makes one intention ready; tests put a worse one in its place.
type Make = fn(Intention, Origin) -> Result<Guard, CompileError>;

/// An intention as it was made ready, or was not.
struct Made {
    version: u64,
    hash: u64,
    guard: Arc<Guard>,
    /// Why `guard` is an older version, or denies.
    failed: Option<Quarantined>,
}

/// The thread, and what it has done.
struct Bench {
    jobs: mpsc::SyncSender<(Intention, Origin)>,
    done: mpsc::Receiver<(Result<Guard, String>, Duration)>,
}

impl Bench {
    fn start(make: Make) -> Result<Self, String> {
        let (jobs, queue) = mpsc::sync_channel::<(Intention, Origin)>(1);
        let (results, done) = mpsc::sync_channel(1);
        let run = move || {
            for (intention, origin) in queue {
                let begun = clock::thread_time();
                let made = std::panic::catch_unwind(AssertUnwindSafe(|| make(intention, origin)));
                let made = match made {
                    Ok(made) => made.map_err(|error| error.to_string()),
                    Err(_panic) => Err("it made the compiler panic".to_owned()),
                };
                let worked = clock::thread_time().saturating_sub(begun);
                if results.send((made, worked)).is_err() {
                    return;
                }
            }
        };
        let started = std::thread::Builder::new().name("weft-policy".to_owned()).spawn(run);
        started.map_err(|error| format!("no thread to compile it on: {error}"))?;
        Ok(Self { jobs, done })
    }
}

/// What documents say, ready for the data plane.
#[derive(Debug, Clone)]
pub(super) struct Compiled {
    pub(super) table: Arc<Table>,
    pub(super) traffic: Arc<Traffic>,
}

/// Keeps what was made ready.
pub(super) struct Compiler {
    chains: Chains,
    default: Action,
    make: Make,
    bench: Option<Bench>,
    made: BTreeMap<String, Made>,
    metrics: PolicyMetrics,
}

struct PolicyMetrics {
    intentions: prometheus::IntGauge,
    quarantined: prometheus::IntGauge,
}

impl Compiler {
    pub(super) fn new(default: Action, metrics: &Metrics) -> Result<Self, prometheus::Error> {
        use prometheus::IntGauge;
        let chains = Chains::new(metrics)?;
        let metrics = PolicyMetrics {
            intentions: metrics.add(IntGauge::new("weft_policy_intentions", "Intentions that are known.")?)?,
            quarantined: metrics.add(IntGauge::new(
                "weft_policy_quarantined",
                "Intentions that cannot be made ready: an older version, or a denial, is in force.",
            )?)?,
        };
        Ok(Self { chains, default, make: Guard::compile, bench: None, made: BTreeMap::new(), metrics })
    }

    /// Makes both. Blocks as [`Compiler::table`].
    pub(super) fn compile(&mut self, documents: &[Arc<DocumentView>]) -> Compiled {
        Compiled { table: Arc::new(self.table(documents)), traffic: self.chains.traffic(documents) }
    }

    /// Makes the table. Blocks while intentions are made ready, [`WAIT_MAX`] for each at most.
    fn table(&mut self, documents: &[Arc<DocumentView>]) -> Table {
        let mut before = std::mem::take(&mut self.made);
        for view in documents {
            let DocumentBody::Intention(Some(intention)) = &view.body else { continue };
            let name = view.digest.id.name.as_str();
            let known = before.remove(name);
            let is_same = |made: &Made| (made.version, made.hash) == (view.digest.version, view.digest.hash);
            let made = match known {
                Some(made) if is_same(&made) => made,
                known => self.renew(view, intention, known),
            };
            self.made.insert(name.to_owned(), made);
        }
        let quarantined: Vec<Quarantined> = self.made.values().filter_map(|made| made.failed.clone()).collect();
        self.metrics.intentions.set(i64::try_from(self.made.len()).unwrap_or(i64::MAX));
        self.metrics.quarantined.set(i64::try_from(quarantined.len()).unwrap_or(i64::MAX));
        Table::new(self.default, self.made.values().map(|made| Arc::clone(&made.guard)), quarantined)
    }

    fn renew(&mut self, view: &DocumentView, intention: &Intention, before: Option<Made>) -> Made {
        let (version, hash) = (view.digest.version, view.digest.hash);
        let origin = Origin { version, signer: view.signer.clone() };
        match self.make_ready(intention.clone(), origin.clone()) {
            Ok(guard) => Made { version, hash, guard: Arc::new(guard), failed: None },
            Err(reason) => {
                let in_force = before.as_ref().and_then(|made| match &made.failed {
                    None => Some(made.version),
                    Some(failed) => failed.in_force,
                });
                let name = intention.name();
                error!(intention = %name, version, reason, ?in_force, "an intention is quarantined: write it anew");
                let guard = match before {
                    Some(before) if in_force.is_some() => before.guard,
                    _ => Arc::new(Guard::closed(intention.clone(), origin)),
                };
                Made { version, hash, guard, failed: Some(Quarantined { name, version, reason, in_force }) }
            }
        }
    }

    fn make_ready(&mut self, intention: Intention, origin: Origin) -> Result<Guard, String> {
        let bench = match self.bench.take() {
            Some(bench) => bench,
            None => Bench::start(self.make)?,
        };
        bench.jobs.send((intention, origin)).map_err(|_| "the compiler's thread ended".to_owned())?;
        // A thread that does not answer is left to itself; the next intention gets another.
        let (made, worked) =
            bench.done.recv_timeout(WAIT_MAX).map_err(|_| format!("it took longer than {WAIT_MAX:?}"))?;
        self.bench = Some(bench);
        if worked > WORK_MAX {
            return Err(format!("it took {worked:?} of the processor; at most {WORK_MAX:?} are given"));
        }
        made
    }
}

/// Compiles what the config entries say of how instances are called.
pub(super) fn upstreams(documents: &[Arc<DocumentView>]) -> upstream::Table {
    let entry = |view: &'_ Arc<DocumentView>| {
        let DocumentBody::Config(Some(value)) = &view.body else { return None };
        let (kind, name) = entry_ends(&view.digest.id.name)?;
        Some((kind.to_owned(), name.to_owned(), value.clone()))
    };
    let entries: Vec<_> = documents.iter().filter_map(entry).collect();
    upstream::table(entries.iter().map(|(kind, name, value)| (kind.as_str(), name.as_str(), value)))
}

/// Makes a table of each new set of documents, until `stop`.
pub(super) async fn run(
    mut compiler: Compiler,
    mut documents: watch::Receiver<Arc<DocumentsView>>,
    (tables, settings): (watch::Sender<Compiled>, watch::Sender<Arc<upstream::Table>>),
    stop: CancellationToken,
) {
    let (mut seen, mut seen_entries) = (Vec::new(), Vec::new());
    loop {
        let view = Arc::clone(&documents.borrow_and_update());
        let entries = view.documents.iter().filter(|view| view.digest.id.kind == DocumentKind::Config);
        let digests: Vec<(u64, u64)> = entries.map(|view| (view.digest.version, view.digest.hash)).collect();
        if digests != seen_entries {
            settings.send_replace(Arc::new(upstreams(&view.documents)));
            seen_entries = digests;
        }
        let said = view.documents.iter().filter(|view| view.digest.id.kind.is_policy());
        let digests: Vec<(DocumentKind, u64, u64)> =
            said.map(|view| (view.digest.id.kind, view.digest.version, view.digest.hash)).collect();
        if digests != seen {
            let begun = clock::now();
            let work = tokio::task::spawn_blocking(move || {
                let compiled = compiler.compile(&view.documents);
                (compiler, compiled)
            });
            let Ok((back, compiled)) = work.await else {
                return error!("the intentions' compiler panicked; what is in force stays until the agent restarts");
            };
            compiler = back;
            let (intentions, chains) = (compiled.table.guards().len(), compiled.traffic.len());
            info!(intentions, chains, took = ?clock::now() - begun, "policy in force");
            tables.send_replace(compiled);
            seen = digests;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = documents.changed() => if changed.is_err() { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::{Mode, Party, Rule};
    use crate::clock::UnixSeconds;
    use crate::model::ServiceName;
    use crate::policy::{DocumentDigest, DocumentId};

    fn compiler(make: Make) -> Compiler {
        Compiler { make, ..Compiler::new(Action::Allow, &Metrics::new()).unwrap() }
    }

    fn intention(source: &str, action: Action) -> Intention {
        Intention::plain(source.parse().unwrap(), "db".parse().unwrap(), action)
    }

    fn view(version: u64, intention: Intention) -> Arc<DocumentView> {
        let id = DocumentId { kind: DocumentKind::Intention, name: intention.name().parse().unwrap() };
        Arc::new(DocumentView {
            digest: DocumentDigest { id, version, hash: version },
            signer: "alice".to_owned(),
            signer_key: String::new(),
            signer_begins: UnixSeconds(0),
            not_before: UnixSeconds(0),
            not_after: UnixSeconds(0),
            says: Vec::new(),
            reason: String::new(),
            is_forked: false,
            body: DocumentBody::Intention(Some(intention)),
            bytes: Vec::new(),
        })
    }

    #[track_caller]
    fn check(table: &Table, source: &str, want: Action, version: u64) {
        let (source, db): (ServiceName, ServiceName) = (source.parse().unwrap(), "db".parse().unwrap());
        let decision = table.of_stream(Some(&source), &db, |_, _| {});
        let found = decision.by.map_or(0, |guard| guard.origin().version);
        assert_eq!((decision.action, found), (want, version));
    }

    /// Refuses, panics or works too long, as the description says.
    fn moody(intention: Intention, origin: Origin) -> Result<Guard, CompileError> {
        match intention.description.as_str() {
            "refuse" => Err(CompileError::Header("x".to_owned())),
            "panic" => panic!("as the test wants it"),
            "slow" => {
                let begun = clock::thread_time();
                while clock::thread_time().saturating_sub(begun) < WORK_MAX * 2 {
                    std::hint::spin_loop();
                }
                Guard::compile(intention, origin)
            }
            _ => Guard::compile(intention, origin),
        }
    }

    #[test]
    fn scenario_16_a_poison_intention_is_quarantined_and_its_last_good_version_stays() {
        for mood in ["refuse", "panic", "slow"] {
            let mut compiler = compiler(moody);
            let good = view(1, intention("web", Action::Deny));
            check(&compiler.table(std::slice::from_ref(&good)), "web", Action::Deny, 1);
            let poison = Intention { description: mood.to_owned(), ..intention("web", Action::Allow) };
            let other = view(7, intention("api", Action::Deny));
            let table = compiler.table(&[view(2, poison.clone()), Arc::clone(&other)]);
            check(&table, "web", Action::Deny, 1);
            check(&table, "api", Action::Deny, 7);
            let quarantined = table.quarantined();
            assert_eq!(quarantined.len(), 1, "{mood}");
            assert_eq!(
                (quarantined[0].name.as_str(), quarantined[0].version, quarantined[0].in_force),
                ("web:db", 2, Some(1))
            );
            // Another poisoned version keeps the good one; a good one ends it.
            let table = compiler.table(&[view(3, poison)]);
            check(&table, "web", Action::Deny, 1);
            assert_eq!(table.quarantined()[0].in_force, Some(1));
            let table = compiler.table(&[view(4, intention("web", Action::Allow))]);
            check(&table, "web", Action::Allow, 4);
            assert!(table.quarantined().is_empty());
        }
    }

    #[test]
    fn a_poison_intention_without_a_good_version_denies_what_it_is_about() {
        let mut compiler = compiler(moody);
        let poison = Intention { description: "panic".to_owned(), ..intention("web", Action::Allow) };
        let table = compiler.table(&[view(1, poison.clone())]);
        check(&table, "web", Action::Deny, 1);
        check(&table, "api", Action::Allow, 0);
        assert_eq!(table.quarantined()[0].in_force, None);
        assert_eq!(compiler.metrics.quarantined.get(), 1);
        // A dry run denies nobody.
        let table = compiler.table(&[view(2, Intention { mode: Mode::Audit, ..poison })]);
        check(&table, "web", Action::Allow, 0);
    }

    #[test]
    fn what_did_not_change_is_not_made_ready_again() {
        let mut compiler = compiler(moody);
        let good = view(1, intention("web", Action::Deny));
        let first = compiler.table(std::slice::from_ref(&good));
        let second = compiler.table(&[good, view(1, intention("api", Action::Deny))]);
        assert!(Arc::ptr_eq(first.guard("web:db").unwrap(), second.guard("web:db").unwrap()));
        let deleted = compiler.table(&[]);
        assert_eq!(deleted.guards().len(), 0);
    }

    #[test]
    fn a_thousand_intentions_are_ready_at_once() {
        let mut compiler = compiler(Guard::compile);
        let views: Vec<_> = (0..1000).map(|at| view(1, intention(&format!("s{at}"), Action::Deny))).collect();
        let table = compiler.table(&views);
        assert_eq!(table.guards().len(), 1000);
        assert!(matches!(table.guard("s7:db").unwrap().intention().rule, Rule::Action(Action::Deny)));
        assert_eq!(table.guard("s7:db").unwrap().intention().source, Party::Service("s7".parse().unwrap()));
    }
}

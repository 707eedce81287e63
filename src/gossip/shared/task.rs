//! The task: `select -> apply`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::carry::{self, Asked, Compare, Compared, Maps, News, Page, Taken, Verdict};
use super::crowded::Crowded;
use super::disk::{self, Stored, Times};
use super::{
    Answer, Changes, KV_BYTES_DEFAULT, ORIGIN_PUSHES, Order, SharedError, SharedHandle, SharedMetrics, SharedParams,
    SharedStore, Space, WAITERS_MAX, WARNED_EVERY, WRITING_BYTES_MAX, Write,
};
use crate::clock;
use crate::gossip::Members;
use crate::gossip::carrier::{self, Around, Carrier, FORWARDS};
use crate::gossip::exchange::ExchangeError;
use crate::gossip::talk::answer;
use crate::hearsay::Excerpt;
use crate::lww::{AHEAD_MS_MAX, Merged, Record, Refused, Scope, Table};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::supervise::catch_blocking;

/// What is known of other replicas goes to disk this often.
const TIMES_KEPT_EVERY: Duration = Duration::from_mins(1);

#[derive(Debug)]
struct Waiter {
    scope: Scope,
    index: u64,
    reply: oneshot::Sender<()>,
}

type WriteReply = oneshot::Sender<Result<(), SharedError>>;

/// A write to the disk that ended, with what the disk did not take.
#[derive(Debug)]
struct Written(Vec<WriteReply>, Result<(), (String, Changes)>);

enum Event {
    Stop,
    Order(Order),
    Carried(carrier::Event<Maps>),
    Written(Written),
    Wake,
}

/// The task's state.
pub(in crate::gossip) struct Task {
    own: NodeName,
    tables: BTreeMap<Space, Table>,
    waiters: BTreeMap<Space, Vec<Waiter>>,
    store: Arc<dyn SharedStore>,
    orders: mpsc::Receiver<Order>,
    carrier: Carrier<Maps>,
    metrics: SharedMetrics,
    crowded: Crowded,
    /// Writes to the disk.
    work: JoinSet<Written>,
    /// What goes to the disk next, and who waits for it; one write runs at a time.
    changes: BTreeMap<String, Option<Vec<u8>>>,
    changed_bytes: usize,
    writers: Vec<WriteReply>,
    is_writing: bool,
    /// A batch is owed that the disk refused.
    is_owed: bool,
    /// It is tried again: at a round, or with a client's write.
    is_retry_due: bool,
    /// When it was said last that records are refused.
    warned_at: Option<Instant>,
    times_kept_at: Instant,
    stop: CancellationToken,
}

impl Task {
    pub(in crate::gossip) fn new(
        params: SharedParams,
        around: Around,
        (first_index, stop): (u64, CancellationToken),
        members: watch::Receiver<Arc<Members>>,
        (orders_sender, orders): (mpsc::Sender<Order>, mpsc::Receiver<Order>),
        metrics: &Metrics,
    ) -> Result<(Self, SharedHandle), prometheus::Error> {
        let handle = SharedHandle { orders: orders_sender.clone() };
        let (tables, unwanted) = load(&params, first_index);
        let cargo = Maps { task: orders_sender, spaces: tables.keys().copied().collect() };
        let task = Self {
            own: around.own.clone(),
            tables,
            waiters: BTreeMap::new(),
            store: params.store,
            orders,
            carrier: Carrier::new(cargo, around, members, rand::random()),
            metrics: SharedMetrics::new(metrics)?,
            crowded: Crowded::default(),
            work: JoinSet::new(),
            changes: unwanted.into_iter().map(|name| (name, None)).collect(),
            changed_bytes: 0,
            writers: Vec::new(),
            is_writing: false,
            is_owed: false,
            is_retry_due: false,
            warned_at: None,
            times_kept_at: clock::now(),
            stop,
        };
        for (space, table) in &task.tables {
            task.metrics.show(*space, table);
        }
        Ok((task, handle))
    }

    pub(in crate::gossip) async fn run(mut self) {
        loop {
            match self.select().await {
                Event::Stop => break,
                Event::Order(order) => self.order(order),
                Event::Carried(event) => self.carried(event),
                Event::Written(written) => self.written(written),
                Event::Wake => {}
            }
            self.start_write();
        }
        self.carrier.stop().await;
        while self.is_writing {
            match self.work.join_next().await {
                Some(Ok(written)) => self.written(written),
                Some(Err(error)) => error!(%error, "a write of shared records failed in itself"),
                None => break,
            }
        }
        self.keep_times();
        // What peers brought is answered already; clients whose write is under way hear that the agent stops.
        let (changes, store) = (self.take_changes(), self.store);
        if !changes.is_empty()
            && let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.write(&changes)).await
        {
            error!(error, "shared records could not be kept on disk; others bring them again");
        }
    }

    /// Waits for the next event. Cancel safe: every branch is.
    async fn select(&mut self) -> Event {
        let has_room = self.changed_bytes < WRITING_BYTES_MAX;
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(written) = self.work.join_next() => match written {
                Ok(written) => Event::Written(written),
                Err(error) => {
                    error!(%error, "a write of shared records failed in itself");
                    Event::Wake
                }
            },
            Some(order) = self.orders.recv(), if has_room => Event::Order(order),
            event = self.carrier.next() => Event::Carried(event),
        }
    }

    // Orders.

    fn order(&mut self, order: Order) {
        match order {
            Order::Read(space, scope, reply) => answer(reply, self.read(space, &scope)),
            Order::Wait(space, scope, index, reply) => self.wait(space, scope, index, reply),
            Order::Write(space, write, reply) => match self.write(space, write) {
                Ok(()) => self.writers.push(reply),
                Err(error) => answer(reply, Err(error)),
            },
            Order::Peer(asked) => self.asked(asked),
        }
    }

    fn read(&self, space: Space, scope: &Scope) -> Result<Answer, SharedError> {
        let table = self.tables.get(&space).ok_or(SharedError::Off)?;
        let rows = table.read(scope).map(|(key, row, _)| (Arc::clone(key), row.clone())).collect();
        Ok(Answer { rows, index: table.index_of(scope), newest: table.index() })
    }

    fn wait(&mut self, space: Space, scope: Scope, index: u64, reply: oneshot::Sender<()>) {
        let Some(table) = self.tables.get(&space) else { return };
        if table.index_of(&scope) > index {
            return answer(reply, ());
        }
        let waiters = self.waiters.entry(space).or_default();
        if waiters.len() >= WAITERS_MAX {
            waiters.retain(|waiter| !waiter.reply.is_closed());
        }
        // Dropping the reply says that there is no place.
        if waiters.len() < WAITERS_MAX {
            waiters.push(Waiter { scope, index, reply });
        }
    }

    fn write(&mut self, space: Space, write: Write) -> Result<(), SharedError> {
        let now_ms = clock::wall_ms();
        let table = self.tables.get_mut(&space).ok_or(SharedError::Off)?;
        let written = match write {
            Write::Put { key, body } => table.put(&key, body, &self.own, now_ms).map(|record| vec![record]),
            Write::Delete(scope) => {
                let keys: Vec<Arc<str>> = table.read(&scope).map(|(key, ..)| Arc::clone(key)).collect();
                table.delete_all(&keys, &self.own, now_ms)
            }
        };
        let label = if written.is_ok() { "ok" } else { "refused" };
        self.metrics.writes.with_label_values(&[space.as_str(), label]).inc();
        let keys: Vec<Arc<str>> = written?.into_iter().map(|record| record.key).collect();
        for key in &keys {
            self.changed(space, key);
        }
        self.carrier.spread(keys.into_iter().map(|key| News { space, key }), ORIGIN_PUSHES, None);
        Ok(())
    }

    fn asked(&mut self, asked: Asked) {
        match asked {
            Asked::Judge(space, head, reply) => {
                let now_ms = clock::wall_ms();
                let table = self.tables.get(&space);
                let judged = table.map(|table| table.would_take(&head.key, &head.stamp, head.value_bytes(), now_ms));
                let verdict = match judged {
                    None => Verdict::Off,
                    Some(Ok(Merged::Taken)) => Verdict::Send,
                    Some(Ok(Merged::Known)) => Verdict::Held,
                    Some(Ok(Merged::Older)) => Verdict::Older,
                    Some(Err(refused)) => {
                        self.refused(&head.stamp.node, space, &refused);
                        Verdict::Refused(refused.to_string())
                    }
                };
                let is_known = self.tables.get(&space).and_then(|table| table.row(&head.key));
                let is_known = is_known.is_some_and(|row| row.stamp == head.stamp);
                answer(reply, if is_known && verdict == Verdict::Send { Verdict::Held } else { verdict });
            }
            Asked::Take(peer, space, record, reply) => answer(reply, self.take(&peer, space, record)),
            Asked::Compared(space, theirs, reply) => answer(reply, self.compared(space, &theirs)),
            Asked::Summary(space, reply) => {
                let table = self.tables.get(&space);
                answer(reply, table.map(|table| (table.summary(clock::wall_ms()), table.buckets().to_vec())));
            }
            Asked::Digests(space, bucket, after, reply) => {
                let page = self.tables.get(&space).map(|table| table.digests(bucket, after, carry::PAGE_DIGESTS));
                let (digests, is_last) = page.unwrap_or((Vec::new(), true));
                answer(reply, Page { digests, is_last });
            }
            Asked::Record(space, key, reply) => {
                answer(reply, self.tables.get(&space).and_then(|table| table.record(&key)));
            }
            Asked::Plan(space, theirs, bucket, digests, reply) => {
                let plan =
                    self.tables.get_mut(&space).map(|table| table.plan(&theirs, bucket, &digests, clock::wall_ms()));
                let plan = plan.unwrap_or_default();
                if !plan.dropped.is_empty() {
                    warn!(
                        space = space.as_str(),
                        records = plan.dropped.len(),
                        "this node was away for longer than deletions are remembered: records that the others no longer have were dropped"
                    );
                }
                for key in &plan.dropped {
                    self.changed(space, key);
                }
                answer(reply, plan);
            }
        }
    }

    /// Takes a peer's record.
    fn take(&mut self, peer: &NodeName, space: Space, record: Record) -> Taken {
        let Some(table) = self.tables.get_mut(&space) else { return Taken::Off };
        let (key, writer) = (Arc::clone(&record.key), record.stamp.node.clone());
        let merged = table.merge(record, clock::wall_ms());
        let label = match &merged {
            Ok(Merged::Taken) => "taken",
            Ok(Merged::Known) => "known",
            Ok(Merged::Older) => "older",
            Err(Refused::Full { .. } | Refused::Deletions { .. }) => "full",
            Err(_) => "refused",
        };
        self.metrics.taken.with_label_values(&[space.as_str(), label]).inc();
        match &merged {
            Ok(Merged::Taken) => {
                self.changed(space, &key);
                self.carrier.spread([News { space, key }], FORWARDS, Some(peer));
            }
            Ok(Merged::Known | Merged::Older) => {}
            Err(refused) => {
                debug!(%peer, space = space.as_str(), error = %refused, "a peer's shared record is refused");
                self.refused(&writer, space, refused);
            }
        }
        Taken::Judged(merged)
    }

    /// Notes that a peer's record is refused; says so if its writer's clock is ahead.
    fn refused(&mut self, writer: &NodeName, space: Space, refused: &Refused) {
        if let Some(table) = self.tables.get(&space) {
            self.crowded.note(space, refused, table);
        }
        if matches!(refused, Refused::Ahead { .. }) && self.may_warn() {
            warn!(%writer, space = space.as_str(), error = %refused, "a shared record is refused: its writer's clock is ahead, or this node's is behind");
        }
    }

    /// Whether to say that records are refused; once in [`WARNED_EVERY`].
    fn may_warn(&mut self) -> bool {
        let now = clock::now();
        if self.warned_at.is_some_and(|at| now < at + WARNED_EVERY) {
            return false;
        }
        self.warned_at = Some(now);
        true
    }

    fn compared(&mut self, space: Space, theirs: &crate::lww::Summary) -> Compared {
        let Some(table) = self.tables.get_mut(&space) else { return Compared::Off };
        let now_ms = clock::wall_ms();
        let summary = table.summary(now_ms);
        if summary.set_hash == theirs.set_hash {
            table.synced(now_ms);
            return Compared::Same;
        }
        Compared::Differs { summary, buckets: table.buckets().to_vec() }
    }

    // What follows from a change.

    /// Notes that `key` is another: for the disk, for those who wait, for the metrics, for what found no room.
    fn changed(&mut self, space: Space, key: &str) {
        let Some(table) = self.tables.get_mut(&space) else { return };
        let now_ms = clock::wall_ms();
        let purged = if table.is_over(now_ms) { table.purge(now_ms) } else { Vec::new() };
        let keys = purged.iter().map(|key| &**key).chain([key]);
        if space.is_durable() {
            for key in keys.clone() {
                let bytes = table.row(key).map(disk::row);
                self.changed_bytes += bytes.as_ref().map_or(0, Vec::len);
                self.changes.insert(disk::name(space, key), bytes);
            }
            if !purged.is_empty() {
                self.changes.insert(disk::times_name(space), Some(disk::times(times(table))));
            }
        }
        self.metrics.show(space, table);
        if self.crowded.has_room_again(space, table) {
            self.carrier.look_soon();
        }
        let table = &*table;
        let keys: Vec<&str> = keys.collect();
        if let Some(waiters) = self.waiters.get_mut(&space) {
            let is_touched = |waiter: &mut Waiter| keys.iter().any(|key| waiter.scope.covers(key));
            for waiter in waiters.extract_if(.., is_touched).collect::<Vec<_>>() {
                if table.index_of(&waiter.scope) > waiter.index {
                    answer(waiter.reply, ());
                } else {
                    waiters.push(waiter);
                }
            }
        }
    }

    /// Lets what is known of other replicas go to the disk; not while rows are owed, which it speaks about.
    fn keep_times(&mut self) {
        if self.is_owed {
            return;
        }
        for (space, table) in self.tables.iter().filter(|(space, _)| space.is_durable()) {
            self.changes.insert(disk::times_name(*space), Some(disk::times(times(table))));
        }
    }

    fn take_changes(&mut self) -> Changes {
        self.changed_bytes = 0;
        std::mem::take(&mut self.changes).into_iter().collect()
    }

    /// Brings what has changed to the disk, unless a write runs.
    fn start_write(&mut self) {
        if self.is_writing || (self.changes.is_empty() && self.writers.is_empty()) {
            return;
        }
        if self.is_owed && !self.is_retry_due && self.writers.is_empty() {
            return;
        }
        self.is_writing = true;
        self.is_retry_due = false;
        let (changes, writers) = (self.take_changes(), std::mem::take(&mut self.writers));
        let store = Arc::clone(&self.store);
        self.work.spawn_blocking(move || {
            let written = catch_blocking("shared", || if changes.is_empty() { Ok(()) } else { store.write(&changes) });
            // Another write begins only once this one has ended.
            let written =
                written.unwrap_or_else(|| Err("the write failed in itself; the log has the reason".to_owned()));
            Written(writers, written.map_err(|error| (error, changes)))
        });
    }

    fn written(&mut self, Written(writers, written): Written) {
        self.is_writing = false;
        self.is_owed = false;
        let written = written.map_err(|(error, owed)| {
            error!(error, "shared records count but are not on disk; they are written again at the next turn");
            self.is_owed = true;
            for (name, bytes) in owed {
                // What has changed since is newer.
                self.changes.entry(name).or_insert(bytes);
            }
            error
        });
        for writer in writers {
            answer(writer, written.clone().map_err(SharedError::Store));
        }
    }

    // Spreading.

    fn carried(&mut self, event: carrier::Event<Maps>) {
        match event {
            carrier::Event::Pushed { to, item, result } => self.pushed(&to.name, item.space, result),
            carrier::Event::Compared(peer, result) => self.comparison_ended(&peer, result),
            carrier::Event::Round => self.tick(clock::now()),
        }
    }

    fn pushed(&mut self, to: &NodeName, space: Space, result: Result<Option<Verdict>, ExchangeError>) {
        let label = match &result {
            Ok(None) => return,
            Ok(Some(Verdict::Held | Verdict::Older | Verdict::Off)) => "ok",
            Ok(Some(Verdict::Send | Verdict::Refused(_) | Verdict::Busy)) => "refused",
            Err(_) => "failed",
        };
        self.metrics.pushes.with_label_values(&[label]).inc();
        match result {
            Ok(Some(Verdict::Refused(reason))) => {
                let reason = Excerpt(&reason);
                if self.may_warn() {
                    warn!(peer = %to, space = space.as_str(), %reason, "peer refuses a shared record");
                } else {
                    debug!(peer = %to, space = space.as_str(), %reason, "peer refuses a shared record");
                }
            }
            Ok(_) => {}
            Err(error) => debug!(peer = %to, error = error.explain(None), "shared record was not pushed"),
        }
    }

    fn comparison_ended(&mut self, peer: &NodeName, result: Result<Vec<(Space, Compare)>, ExchangeError>) {
        self.metrics.comparisons.with_label_values(&[if result.is_ok() { "ok" } else { "failed" }]).inc();
        let compared = match result {
            Ok(compared) => compared,
            Err(error) => return debug!(%peer, error = error.explain(None), "shared records were not compared"),
        };
        let now_ms = clock::wall_ms();
        for (space, compare) in &compared {
            if matches!(compare, Compare::Equal | Compare::Differed { is_even: true })
                && let Some(table) = self.tables.get_mut(space)
            {
                table.synced(now_ms);
            }
        }
        for (space, _) in compared.iter().filter(|(_, compare)| *compare == Compare::Refused) {
            if self.may_warn() {
                warn!(
                    %peer,
                    space = space.as_str(),
                    "two nodes hold different shared records and one refuses what the other has: set `kv {{ bytes_max }}` to the same on every agent, delete some records, and check the clocks"
                );
            }
        }
    }

    /// Lets go what is over; what the disk refused is written again.
    fn tick(&mut self, now: Instant) {
        self.is_retry_due = self.is_owed;
        let is_due = now.saturating_duration_since(self.times_kept_at) >= TIMES_KEPT_EVERY;
        for (space, table) in &mut self.tables {
            let purged = table.purge(clock::wall_ms());
            self.metrics.show(*space, table);
            if self.crowded.has_room_again(*space, table) {
                self.carrier.look_soon();
            }
            if !space.is_durable() {
                continue;
            }
            self.changes.extend(purged.iter().map(|key| (disk::name(*space, key), None)));
            if !purged.is_empty() {
                self.changes.insert(disk::times_name(*space), Some(disk::times(times(table))));
            }
        }
        if is_due {
            self.keep_times();
            self.times_kept_at = now;
            for waiters in self.waiters.values_mut() {
                waiters.retain(|waiter| !waiter.reply.is_closed());
            }
        }
    }
}

fn times(table: &Table) -> Times {
    let summary = table.summary(clock::wall_ms());
    Times { synced_ms: summary.synced_ms, purged_ms: summary.purged_ms }
}

/// Reads the rows of the last run, and the names of those that are unreadable.
fn load(params: &SharedParams, first_index: u64) -> (BTreeMap<Space, Table>, Vec<String>) {
    let is_on = |space: &Space| *space != Space::Kv || params.kv_bytes_max.is_some();
    let kv_bytes_max = params.kv_bytes_max.unwrap_or(KV_BYTES_DEFAULT);
    let limits = |space: Space| space.limits(kv_bytes_max);
    let spaces = Space::ALL.into_iter().filter(is_on);
    let mut tables: BTreeMap<Space, Table> =
        spaces.map(|space| (space, Table::new(limits(space), first_index))).collect();
    let mut unwanted = Vec::new();
    let kv = disk::name(Space::Kv, "");
    // Of a map that is off: kept on disk for the day when it is on again.
    let without = params.kv_bytes_max.is_none().then_some(kv.as_str());
    let rows = params.store.rows(without).unwrap_or_else(|error| {
        error!(error, "shared records of the last run cannot be read; others bring them again");
        Vec::new()
    });
    let (now_ms, mut ahead) = (clock::wall_ms(), 0_usize);
    for (name, bytes) in rows {
        match disk::read(&name, &bytes) {
            // Left on disk: if this node's clock is behind, they are good, and a newer write takes their place.
            Some(Stored::Row { record, .. }) if record.stamp.ms > now_ms.saturating_add(AHEAD_MS_MAX) => ahead += 1,
            Some(Stored::Row { space, record, created, modified }) => {
                if let Some(table) = tables.get_mut(&space) {
                    table.restore(record, created, modified);
                }
            }
            Some(Stored::Times(space, times)) => {
                if let Some(table) = tables.get_mut(&space) {
                    table.restore_times(times.synced_ms.min(now_ms), times.purged_ms);
                }
            }
            None => {
                warn!(record = name, "a shared record on disk is unreadable and is removed; others bring it again");
                unwanted.push(name);
            }
        }
    }
    if ahead > 0 {
        warn!(
            records = ahead,
            "shared records on disk are from the future and do not count: this node's clock was ahead, or is behind; write them again once it is right"
        );
    }
    (tables, unwanted)
}

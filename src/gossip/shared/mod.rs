//! The owner of what all agents hold in common and any of them may write: keys and values, prepared queries, user
//! events.
//!
//! ```text
//!   API --write--> lww::Table --> disk --> answer          readers, watchers <-- orders
//!                      |  ^
//!        pushes (head, then the value if it is wanted)      comparisons: summary, buckets, digests, records
//! ```
//!
//! One last-writer-wins map (`lww`) for each [`Space`]. A write is pushed to [`ORIGIN_PUSHES`] members and passed on by each that
//! did not have it to three others; comparisons with random members heal what was missed, also what found no room before some
//! was freed (`crowded`). The pushes and the rhythm of the
//! comparisons are the carrier's (`gossip::carrier`). A member vouches for what it passes on with the certificate of its connection: every node of the mesh may write every key, so a
//! signature of each writer would prove nothing more.
//!
//! Invariants: a client's write is on disk before it is answered; what a peer sends is bounded before it is read; values
//! that are received at once are bounded over all peers; a map that is off here holds nothing, and says so.
//! Not here: which row wins (`lww`), what rows mean (`api`).

mod carry;
mod crowded;
mod disk;
mod task;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

#[cfg(any(test, fuzzing))]
pub(crate) use self::carry::fuzz as fuzz_shared;
pub(super) use self::carry::serve;
pub(super) use self::task::Task;
use super::carrier::Places;
use crate::lww::{Body, Keep, Limits, Refused, Row, Scope, Table};
use crate::metrics::Metrics;

/// How many members the first node pushes a write to: all of a small mesh.
const ORIGIN_PUSHES: usize = 16;
/// Most pushes under way at once; each may hold a value.
const PUSHES_MAX: usize = 16;
/// Most of them to one peer: a slow one leaves half of the places to others.
const PUSHES_PER_PEER_MAX: usize = 8;
/// Most pushes that wait, by key; beyond it a write is left to the comparisons.
const PUSHES_WAITING_MAX: usize = 4096;
/// Longest push, its handshake included.
const PUSH_TIME_MAX: Duration = Duration::from_secs(10);
/// Most comparisons under way at once that this node began.
const COMPARES_MAX: usize = 2;
/// Most values of more than a frame that are received at once, over all peers: 8 MiB.
const RECEIVING_MAX: usize = 16;
/// Most of them from one peer: three that read slowly leave a quarter to others.
const RECEIVING_PER_PEER_MAX: usize = 4;
/// So often it is said at most that records are refused.
const WARNED_EVERY: Duration = Duration::from_mins(1);
/// Most orders that wait: each may hold a value of 512 KiB.
const ORDERS_MAX: usize = 64;
/// Orders wait while so many bytes are on their way to the disk.
const WRITING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most readers that wait for a change.
const WAITERS_MAX: usize = 16_384;

/// Largest value of the key-value store, in bytes: Consul's bound.
pub const KV_VALUE_BYTES_MAX: usize = 512 * 1024;
/// Longest key, in bytes.
pub const KV_KEY_BYTES_MAX: usize = 512;
/// What the key-value store holds in all, unless told otherwise, in bytes.
pub const KV_BYTES_DEFAULT: u64 = 16 * 1024 * 1024;
/// Most keys: lists of all of them are answered from memory.
const KV_KEYS_MAX: usize = 65_536;
/// How long a deletion is remembered.
const TOMBSTONE_LEASE: Duration = Duration::from_hours(24);
/// Most deletions that are remembered: all keys that peers may bring can be deleted at once; some 24 MB with keys of 60 bytes.
const TOMBSTONES_MAX: usize = 2 * KV_KEYS_MAX;
/// Most user events that are remembered: Consul's bound.
pub const EVENTS_MAX: usize = 256;
/// Largest event, in bytes, with its name and filters: 256 of them are 1 MiB.
pub const EVENT_BYTES_MAX: usize = 4096;
/// Most prepared queries, and the largest, in bytes.
const QUERIES_MAX: usize = 1024;
const QUERY_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of prepared queries, and of events.
const RECORDS_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Which map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Space {
    /// Keys and values of clients.
    Kv,
    /// Prepared queries, by id.
    Query,
    /// User events, by id; in memory alone.
    Event,
}

impl Space {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kv, Self::Query, Self::Event];

    /// Its name in metrics and on disk.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Query => "query",
            Self::Event => "event",
        }
    }

    /// Whether it outlives the process.
    fn is_durable(self) -> bool {
        self != Self::Event
    }

    fn limits(self, kv_bytes_max: u64) -> Limits {
        let tombstone_lease_ms = u64::try_from(TOMBSTONE_LEASE.as_millis()).unwrap_or(u64::MAX);
        let limits = Limits {
            bytes_max: RECORDS_BYTES_MAX,
            rows_max: QUERIES_MAX,
            key_bytes_max: KV_KEY_BYTES_MAX,
            value_bytes_max: QUERY_BYTES_MAX,
            tombstones_max: TOMBSTONES_MAX,
            tombstone_lease_ms,
            keep: Keep::All,
        };
        match self {
            Self::Kv => {
                Limits { bytes_max: kv_bytes_max, rows_max: KV_KEYS_MAX, value_bytes_max: KV_VALUE_BYTES_MAX, ..limits }
            }
            Self::Query => limits,
            Self::Event => {
                Limits { rows_max: EVENTS_MAX, value_bytes_max: EVENT_BYTES_MAX, keep: Keep::Newest, ..limits }
            }
        }
    }
}

/// Rows on their way to the disk: key, and bytes or none to remove it.
pub type Changes = Vec<(String, Option<Vec<u8>>)>;

/// Keeps rows for the next start. Calls block: they are made outside the task.
pub trait SharedStore: Send + Sync + 'static {
    /// Returns every row that is kept, but those whose name begins with `without`: these are not even read.
    ///
    /// # Errors
    /// A text for people.
    fn rows(&self, without: Option<&str>) -> Result<Vec<(String, Vec<u8>)>, String>;
    /// Writes all of `changes`, or none.
    ///
    /// # Errors
    /// A text for people.
    fn write(&self, changes: &Changes) -> Result<(), String>;
}

/// What the shared maps need.
pub struct SharedParams {
    /// Most bytes of keys and values; none: the key-value store is off here.
    pub kv_bytes_max: Option<u64>,
    /// Where they are kept.
    pub store: Arc<dyn SharedStore>,
}

impl fmt::Debug for SharedParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedParams").field("kv_bytes_max", &self.kv_bytes_max).finish_non_exhaustive()
    }
}

/// Why an order to the shared maps failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SharedError {
    /// The map is off on this agent.
    #[error(
        "weft's key-value store is off on this agent: set `kv {{ enabled = true }}` in its configuration and restart it"
    )]
    Off,
    /// The write does not fit.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The disk refuses it.
    #[error("the write counts, but cannot be kept on disk ({0}): after a restart this node learns it from others")]
    Store(String),
    /// Too many wait already.
    #[error("too many readers wait for a change: {WAITERS_MAX}")]
    Crowded,
    /// The agent is stopping.
    #[error("agent is shutting down")]
    Closed,
}

/// What is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// Its value.
        body: Body,
    },
    /// Deletes what is there.
    Delete(Scope),
}

/// What was asked for, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The live rows, in order of key.
    pub rows: Vec<(Arc<str>, Row)>,
    /// The index of the last change to the scope.
    pub index: u64,
    /// The newest index of the map.
    pub newest: u64,
}

/// What the task is asked.
#[derive(Debug)]
pub(super) enum Order {
    Read(Space, Scope, oneshot::Sender<Result<Answer, SharedError>>),
    /// Answered once the index of the scope is above this one.
    Wait(Space, Scope, u64, oneshot::Sender<()>),
    Write(Space, Write, oneshot::Sender<Result<(), SharedError>>),
    Peer(carry::Asked),
}

/// Talks to the task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedHandle {
    orders: mpsc::Sender<Order>,
}

impl SharedHandle {
    /// What `scope` of `space` holds here.
    ///
    /// # Errors
    /// [`SharedError::Off`], [`SharedError::Closed`].
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn read(&self, space: Space, scope: Scope) -> Result<Answer, SharedError> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Order::Read(space, scope, reply)).await.map_err(|_| SharedError::Closed)?;
        answer.await.map_err(|_| SharedError::Closed)?
    }

    /// Returns once the index of `scope` is above `index`.
    ///
    /// # Errors
    /// [`SharedError::Crowded`] if too many wait.
    /// # Cancel safety
    /// Cancelling gives the place back.
    pub async fn changed(&self, space: Space, scope: Scope, index: u64) -> Result<(), SharedError> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Order::Wait(space, scope, index, reply)).await.map_err(|_| SharedError::Closed)?;
        answer.await.map_err(|_| SharedError::Crowded)
    }

    /// Carries out `write`; returns when it is on disk. It spreads by itself.
    ///
    /// # Errors
    /// [`SharedError`]; with [`SharedError::Store`] the write counts.
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn write(&self, space: Space, write: Write) -> Result<(), SharedError> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Order::Write(space, write, reply)).await.map_err(|_| SharedError::Closed)?;
        answer.await.map_err(|_| SharedError::Closed)?
    }
}

/// The task's desk: where streams of peers bring their questions.
#[derive(Debug, Clone)]
pub(super) struct Desk {
    pub(super) orders: mpsc::Sender<Order>,
    /// Places for values that are received.
    pub(super) places: Places,
}

/// Makes the two ends of the task's queue.
pub(super) fn queue() -> (Desk, mpsc::Receiver<Order>) {
    let (orders, received) = mpsc::channel(ORDERS_MAX);
    (Desk { orders, places: Places::new(RECEIVING_MAX, RECEIVING_PER_PEER_MAX) }, received)
}

/// What the shared maps count.
#[derive(Debug, Clone)]
struct SharedMetrics {
    records: prometheus::IntGaugeVec,
    bytes: prometheus::IntGaugeVec,
    tombstones: prometheus::IntGaugeVec,
    writes: prometheus::IntCounterVec,
    taken: prometheus::IntCounterVec,
    pushes: prometheus::IntCounterVec,
    comparisons: prometheus::IntCounterVec,
}

impl SharedMetrics {
    fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        use prometheus::{IntCounterVec, IntGaugeVec, Opts};
        let gauge = |name: &str, help: &str| metrics.add(IntGaugeVec::new(Opts::new(name, help), &["space"])?);
        let counter =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntCounterVec::new(Opts::new(name, help), labels)?);
        Ok(Self {
            records: gauge("weft_shared_records", "Records that all agents share, without deletions.")?,
            bytes: gauge("weft_shared_bytes", "Bytes of the records that all agents share, as limits count them.")?,
            tombstones: gauge("weft_shared_tombstones", "Deletions of shared records that are remembered.")?,
            writes: counter(
                "weft_shared_writes_total",
                "Writes of this agent's clients to shared records.",
                &["space", "result"],
            )?,
            taken: counter("weft_shared_received_total", "Shared records that peers brought.", &["space", "result"])?,
            pushes: counter("weft_shared_pushes_total", "Shared records pushed to members.", &["result"])?,
            comparisons: counter(
                "weft_shared_comparisons_total",
                "Comparisons of shared records that this agent began.",
                &["result"],
            )?,
        })
    }

    fn show(&self, space: Space, table: &Table) {
        let (records, bytes, tombstones) = table.size();
        let label = [space.as_str()];
        let shown = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.records.with_label_values(&label).set(shown(records as u64));
        self.bytes.with_label_values(&label).set(shown(bytes));
        self.tombstones.with_label_values(&label).set(shown(tombstones as u64));
    }
}

/// A handle to maps that always have just changed, and their task, which ends after so many reads.
#[cfg(test)]
pub(crate) fn restless(reads: usize) -> (SharedHandle, impl Future<Output = ()> + Send + 'static) {
    use super::talk::answer;
    let (orders, mut received) = mpsc::channel(ORDERS_MAX);
    let task = async move {
        let mut left = reads;
        while let (1.., Some(order)) = (left, received.recv().await) {
            match order {
                Order::Read(_, _, reply) => {
                    left -= 1;
                    answer(reply, Ok(Answer { rows: Vec::new(), index: 1, newest: 1 }));
                }
                Order::Wait(_, _, _, reply) => answer(reply, ()),
                other => panic!("nobody asks that: {other:?}"),
            }
        }
    };
    (SharedHandle { orders }, task)
}

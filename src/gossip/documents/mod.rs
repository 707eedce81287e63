//! The owner of the document set: takes documents, enforces them at once, keeps them, spreads them.
//!
//! ```text
//!   API (weft revoke) --offer--\                     /-> trust: identity's bundle, open connections, records
//!   a peer's push --------------> DocumentSet -------+-> disk
//!   a peer's comparison --------/                    \-> pushes: origin to all alive, others to a few
//! ```
//!
//! The highest class of gossip: a document is pushed on streams of its own the moment it counts, over connections that
//! are open where there are any; SWIM's packets and syncs of records do not stand before it. The node that an operator
//! tells pushes to everybody and says how many confirmed; whoever learns a document passes it to three others, so
//! that it also reaches those whom the first node does not; and each comparison with a random member (about every 5 s,
//! every 30 s while nothing differs, three at once after a join) heals what was missed.
//!
//! A peer whose documents are refused again and again is not listened to for a while (`patience`); policy that ends soon is
//! told (`ends`).
//!
//! Invariants: a document is enforced before it is passed on; what a peer sends is checked before it is kept; pushes,
//! frames and exchanges are bounded; a set that was evened out has the same hash on both sides.
//! Not here: what a good document is (`policy`), what a verifier believes (`pki`).

mod carry;
mod ends;
mod patience;
mod shown;
mod task;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use crate::authz::{Action, Intention};
use crate::clock::UnixSeconds;
use crate::metrics::Metrics;
use crate::pki::TrustBundle;
use crate::policy::{DocumentDigest, DocumentError, DocumentSet, Notice, Offered, Refused, notice};

#[cfg(any(test, fuzzing))]
pub(crate) use self::carry::fuzz as fuzz_documents;
pub(super) use self::carry::serve;
pub(super) use self::shown::views;
pub(super) use self::task::Task;

/// Most members that the first node pushes to itself.
const ORIGIN_PUSHES_MAX: usize = 256;
/// Most pushes under way at once: each may cost a handshake.
const PUSHES_MAX: usize = 64;
/// Most of them to one peer: so many streams of one connection it reads at once.
const PUSHES_PER_PEER_MAX: usize = 16;
/// Most pushes that wait; beyond it a document is left to the comparisons.
const PUSHES_WAITING_MAX: usize = 4096;
/// Longest push, its handshake included: a lost handshake packet costs QUIC a second.
const PUSH_TIME_MAX: Duration = Duration::from_secs(2);
/// How often one push is begun; the repeats are for orders that still wait for this member.
const PUSH_TRIES_MAX: u8 = 2;
/// How long an operator's order waits for confirmations.
const CONFIRM_TIME_MAX: Duration = Duration::from_secs(5);
/// Most orders and questions that wait.
const ORDERS_MAX: usize = 256;
/// Most comparisons under way at once that this node began.
const COMPARES_MAX: usize = 4;
/// Most bytes of documents in one frame; the digests take the rest.
const GIVEN_BYTES_MAX: usize = 96 * 1024;
/// Most links between roots that newcomers are shown: nobody is off for longer than so many rotations.
const LINKS_MAX: usize = 8;
/// Most members whose clocks are remembered.
const CLOCKS_MAX: usize = 32;

/// Keeps documents for the next start. Calls block: they are made outside the task.
pub trait DocumentStore: Send + Sync + 'static {
    /// Keeps `bytes` under `key` in place of what was there.
    ///
    /// # Errors
    /// A text for people.
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), String>;
    /// Forgets what is kept under `key`.
    ///
    /// # Errors
    /// A text for people.
    fn remove(&self, key: &str) -> Result<(), String>;
}

/// Hears the set and what follows from it.
pub type OnTrust = Arc<dyn Fn(&DocumentSet, &TrustBundle) + Send + Sync>;

/// What the documents need.
pub struct DocumentsParams {
    /// What is held at the start.
    pub set: DocumentSet,
    /// What is decided of calls that no intention is about.
    pub default_policy: Action,
    /// Where it is kept.
    pub store: Arc<dyn DocumentStore>,
    /// Called at once when something else is to be believed: closes connections. Must not block.
    pub on_trust: OnTrust,
}

impl fmt::Debug for DocumentsParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DocumentsParams").field("set", &self.set).finish_non_exhaustive()
    }
}

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The bytes are no document.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The set refuses it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The disk refuses it; it counts nevertheless until the agent stops.
    #[error("the document counts, but cannot be kept on disk ({0}): after a restart this node learns it from others")]
    Store(String),
    /// The agent is stopping.
    #[error("agent is shutting down")]
    Closed,
}

/// What became of an operator's document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spread {
    /// The document.
    pub digest: DocumentDigest,
    /// What this node made of it.
    pub offered: Offered,
    /// Members, this node left out, that said within 5 s that they hold it.
    pub confirmed: usize,
    /// Members that are alive, this node left out.
    pub alive: usize,
}

/// A document for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentView {
    /// Which one.
    pub digest: DocumentDigest,
    /// `root`, or the operator's name.
    pub signer: String,
    /// Hash of the signer's key.
    pub signer_key: String,
    /// Beginning of the signer's certificate.
    pub signer_begins: UnixSeconds,
    /// Beginning.
    pub not_before: UnixSeconds,
    /// End.
    pub not_after: UnixSeconds,
    /// What it takes back or leads to, one text each.
    pub says: Vec<String>,
    /// Why, in the operator's words.
    pub reason: String,
    /// Two contents of this version were signed.
    pub is_forked: bool,
    /// What it says, where that is policy.
    pub body: DocumentBody,
    /// The document as it travels.
    pub bytes: Vec<u8>,
}

impl DocumentView {
    /// Whether it is policy that says something: no deletion.
    pub fn says_policy(&self) -> bool {
        matches!(self.body, DocumentBody::Intention(Some(_)) | DocumentBody::Config(Some(_)))
    }

    /// Whether it takes an intention or a config entry back.
    pub fn is_deletion(&self) -> bool {
        matches!(self.body, DocumentBody::Intention(None) | DocumentBody::Config(None))
    }

    /// How near its end is, by the life of its signer's certificate.
    pub fn notice(&self, now: UnixSeconds) -> Notice {
        notice(self.signer_begins, self.not_after, now)
    }
}

/// What a document of policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentBody {
    /// It is no policy.
    Trust,
    /// An intention; none: it is deleted.
    Intention(Option<Intention>),
    /// A config entry; none: it is deleted.
    Config(Option<serde_json::Value>),
}

/// How far the members' clocks are from this one's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClockSkew {
    /// The median of the members' clocks less this one's, in seconds.
    pub median_seconds: f64,
    /// The largest distance, in seconds.
    pub max_seconds: f64,
    /// How many members were asked lately.
    pub peers: usize,
}

/// What is held at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DocumentsView {
    /// In order of kind and name.
    pub documents: Vec<Arc<DocumentView>>,
    /// Equal on two nodes that hold the same.
    pub set_hash: u64,
    /// None: nobody was asked yet.
    pub skew: Option<ClockSkew>,
    /// When a comparison with another member last ended; none: there was none yet.
    pub compared_at: Option<UnixSeconds>,
    /// The documents that lead from root to root, the latest [`LINKS_MAX`], in order of the walk.
    pub links: Vec<Vec<u8>>,
}

/// What the task is asked.
#[derive(Debug)]
pub(super) enum Order {
    Offer(Vec<u8>, oneshot::Sender<Result<Spread, OfferError>>),
    /// A question of a peer, to be answered on its stream.
    Peer(carry::Asked),
}

/// Talks to the task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DocumentsHandle {
    orders: mpsc::Sender<Order>,
    pub(super) view: watch::Receiver<Arc<DocumentsView>>,
}

impl DocumentsHandle {
    /// Takes a document, enforces it here, pushes it to every living member and returns how many confirmed.
    ///
    /// # Errors
    /// [`OfferError`]; with [`OfferError::Store`] the document counts.
    /// # Cancel safety
    /// Cancelling forgets the answer.
    pub async fn offer(&self, bytes: Vec<u8>) -> Result<Spread, OfferError> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Order::Offer(bytes, reply)).await.map_err(|_| OfferError::Closed)?;
        answer.await.map_err(|_| OfferError::Closed)?
    }

    /// What is held.
    pub fn view(&self) -> Arc<DocumentsView> {
        Arc::clone(&self.view.borrow())
    }
}

/// Makes the two ends of the task's queue.
pub(super) fn queue() -> (mpsc::Sender<Order>, mpsc::Receiver<Order>) {
    mpsc::channel(ORDERS_MAX)
}

/// What the documents count.
#[derive(Debug, Clone)]
struct DocumentMetrics {
    held: prometheus::IntGauge,
    forks: prometheus::IntGauge,
    offered: prometheus::IntCounterVec,
    pushes: prometheus::IntCounterVec,
    skew: prometheus::Gauge,
    first_end: prometheus::Gauge,
    ending: prometheus::IntGauge,
}

impl DocumentMetrics {
    fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        use prometheus::{Gauge, IntCounterVec, IntGauge, Opts};
        let offered = Opts::new("weft_documents_offered_total", "Documents offered by operators and peers.");
        let pushes = Opts::new("weft_documents_pushes_total", "Documents pushed to members.");
        Ok(Self {
            held: metrics.add(IntGauge::new("weft_documents_held", "Signed documents that are held.")?)?,
            forks: metrics.add(IntGauge::new(
                "weft_documents_forks",
                "Documents of which two contents of one version were signed.",
            )?)?,
            offered: metrics.add(IntCounterVec::new(offered, &["result"])?)?,
            pushes: metrics.add(IntCounterVec::new(pushes, &["result"])?)?,
            first_end: metrics.add(Gauge::new(
                "weft_policy_first_end_days",
                "Days until the first intention or config entry ends; +Inf where there is none.",
            )?)?,
            ending: metrics.add(IntGauge::new(
                "weft_policy_ending",
                "Intentions and config entries that end soon, with their operator's certificate.",
            )?)?,
            skew: metrics
                .add(Gauge::new("weft_clock_skew_seconds", "Median of other members' clocks less this one's.")?)?,
        })
    }
}

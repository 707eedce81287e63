//! What two agents say about documents, on one bidirectional stream.
//!
//! ```text
//!   Push(document)       -> Took
//!   Compare(hash, clock) -> Compared(clock, digests where the hashes differ)
//!        Given(what the other lacks, own digests) -> Given(what the beginner lacks)
//! ```

use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{COMPARES_MAX, Order, PUSH_TIME_MAX, PUSHES_MAX, PUSHES_PER_PEER_MAX, PUSHES_WAITING_MAX};
use crate::clock;
use crate::gossip::carrier::{Bounds, Cargo, Found};
use crate::gossip::engine::{Message, Request};
use crate::gossip::exchange::ExchangeError;
use crate::gossip::talk::{Talk, ask};
use crate::model::NodeName;
use crate::policy::{DocumentDigest, HeldDigest};
use crate::wire::{self, FRAME_BYTES_MAX};

/// Longest exchange about documents.
const TIME_MAX: Duration = Duration::from_secs(10);

/// The first frame's content.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    /// News.
    Push(Vec<u8>),
    /// Are we equal? `clock_ms`: wall time in milliseconds.
    Compare { set_hash: u64, clock_ms: u64 },
}

/// The answer to a push.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::gossip) enum Took {
    /// It is held, from now on or from before.
    Held,
    /// A newer one is held.
    Older,
    /// It is refused, for this reason.
    Refused(String),
}

/// The answer to a comparison.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::gossip) struct Compared {
    pub(in crate::gossip) clock_ms: u64,
    /// None: the sets are equal.
    pub(super) digests: Option<Vec<HeldDigest>>,
}

/// Documents for the other side.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::gossip) struct Given {
    pub(super) documents: Vec<Vec<u8>>,
    /// The giver's own, so that the other can answer.
    pub(super) digests: Vec<HeldDigest>,
}

/// A question for the task.
#[derive(Debug)]
pub(in crate::gossip) enum Asked {
    Pushed(NodeName, Vec<u8>, oneshot::Sender<Took>),
    Compared(u64, oneshot::Sender<Compared>),
    /// What a comparison brought; the answer is what the other side lacks.
    Given(NodeName, Given, oneshot::Sender<Given>),
    /// What this node has that is news to the digests, and its own.
    Lacking(Vec<HeldDigest>, oneshot::Sender<Given>),
    Summary(oneshot::Sender<u64>),
}

impl From<Asked> for Order {
    fn from(asked: Asked) -> Self {
        Self::Peer(asked)
    }
}

/// A document for a peer.
#[derive(Debug, Clone)]
pub(in crate::gossip) struct News {
    pub(super) digest: DocumentDigest,
    pub(super) bytes: Arc<Vec<u8>>,
    /// How many pushes to this member went before.
    pub(super) tries: u8,
}

/// What a comparison told.
#[derive(Debug, Clone, Copy)]
pub(in crate::gossip) struct Compare {
    /// The other's wall time less this one's, in milliseconds.
    pub(super) ahead_ms: i64,
    /// Neither side held what the other did not.
    pub(super) was_equal: bool,
}

/// Documents as a carrier's cargo: asks the task that owns them.
#[derive(Debug, Clone)]
pub(super) struct Documents(pub(super) mpsc::Sender<Order>);

impl Cargo for Documents {
    const BOUNDS: Bounds = Bounds {
        name: "documents",
        pushes_max: PUSHES_MAX,
        pushes_per_peer_max: PUSHES_PER_PEER_MAX,
        pushes_waiting_max: PUSHES_WAITING_MAX,
        push_time_max: PUSH_TIME_MAX,
        compares_max: COMPARES_MAX,
        compare_time_max: TIME_MAX,
    };
    type Item = News;
    type Took = Took;
    type Compared = Compare;

    async fn push(self, connection: Connection, news: News) -> Result<Took, ExchangeError> {
        let mut talk = open(&connection, &Said::Push(news.bytes.to_vec())).await?;
        talk.finish();
        talk.hear().await
    }

    /// Evens out what fits one frame each way.
    async fn compare(self, connection: Connection, peer: NodeName) -> Result<Compare, ExchangeError> {
        let task = &self.0;
        let set_hash = ask(task, Asked::Summary).await?;
        let asked_ms = clock::wall_ms();
        let mut talk = open(&connection, &Said::Compare { set_hash, clock_ms: asked_ms }).await?;
        let compared: Compared = talk.hear().await?;
        // The peer read its clock about half-way.
        let middle_ms = asked_ms.midpoint(clock::wall_ms());
        let ahead_ms = i64::try_from(compared.clock_ms).unwrap_or(i64::MAX).saturating_sub_unsigned(middle_ms);
        let was_equal = compared.digests.is_none();
        if let Some(digests) = compared.digests {
            let given = ask(task, |reply| Asked::Lacking(digests, reply)).await?;
            talk.say(&given).await?;
            let back: Given = talk.hear().await?;
            ask(task, |reply| Asked::Given(peer, back, reply)).await?;
        }
        talk.end().await;
        Ok(Compare { ahead_ms, was_equal })
    }

    fn found(compared: &Compare) -> Found {
        if compared.was_equal { Found::Equal } else { Found::Differed }
    }
}

async fn open(connection: &Connection, said: &Said) -> Result<Talk, ExchangeError> {
    Talk::open(connection, &Message::Request(Request::Documents(wire::encode(said)?))).await
}

/// Answers what `peer` says about documents; `first` is the content of its first frame.
pub(in crate::gossip) async fn serve(
    peer: NodeName,
    first: Vec<u8>,
    talk: &mut Talk,
    task: &mpsc::Sender<Order>,
) -> Result<(), ExchangeError> {
    let answered = async {
        match wire::decode::<Said>(&first, FRAME_BYTES_MAX)? {
            Said::Push(document) => {
                let took = ask(task, |reply| Asked::Pushed(peer, document, reply)).await?;
                talk.say(&took).await?;
            }
            Said::Compare { set_hash, clock_ms: _ } => {
                let compared = ask(task, |reply| Asked::Compared(set_hash, reply)).await?;
                talk.say(&compared).await?;
                if compared.digests.is_some() {
                    let given: Given = talk.hear().await?;
                    let back = ask(task, |reply| Asked::Given(peer, given, reply)).await?;
                    talk.say(&back).await?;
                }
            }
        }
        talk.end().await;
        Ok(())
    };
    tokio::time::timeout(TIME_MAX, answered).await.unwrap_or(Err(ExchangeError::Late))
}

/// A message about documents: the first byte says which, the rest is a frame; whether it decodes. See `crate::fuzz`.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) -> bool {
    use crate::fuzz::stable;
    let Some((kind, frame)) = bytes.split_first() else { return false };
    match kind {
        0 => stable::<Said>(frame, FRAME_BYTES_MAX).is_some(),
        1 => stable::<Took>(frame, FRAME_BYTES_MAX).is_some(),
        2 => stable::<Compared>(frame, FRAME_BYTES_MAX).is_some(),
        _ => stable::<Given>(frame, FRAME_BYTES_MAX).is_some(),
    }
}

//! What two agents say about documents, on one bidirectional stream.
//!
//! ```text
//!   Push(document)       -> Took
//!   Compare(hash, clock) -> Compared(clock, digests where the hashes differ)
//!        Given(what the other lacks, own digests) -> Given(what the beginner lacks)
//! ```

use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::Order;
use crate::gossip::engine::{Message, Request};
use crate::gossip::exchange::{ExchangeError, ended};
use crate::model::NodeName;
use crate::policy::HeldDigest;
use crate::wire::{self, FRAME_BYTES_MAX};

/// Longest exchange about documents.
pub(super) const TIME_MAX: Duration = Duration::from_secs(10);

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

/// Asks the task.
async fn ask<T>(
    task: &mpsc::Sender<Order>,
    question: impl FnOnce(oneshot::Sender<T>) -> Asked,
) -> Result<T, ExchangeError> {
    let (reply, answer) = oneshot::channel();
    task.send(Order::Peer(question(reply))).await.map_err(|_| ExchangeError::Closed)?;
    answer.await.map_err(|_| ExchangeError::Closed)
}

async fn say<T: Serialize>(send: &mut SendStream, value: &T) -> Result<(), ExchangeError> {
    Ok(wire::write_frame(send, &wire::encode(value)?).await?)
}

async fn hear<T: DeserializeOwned>(recv: &mut RecvStream) -> Result<T, ExchangeError> {
    let frame = wire::read_frame(recv, FRAME_BYTES_MAX).await?;
    Ok(wire::decode(&frame, FRAME_BYTES_MAX)?)
}

async fn open(connection: &Connection, said: &Said) -> Result<(SendStream, RecvStream), ExchangeError> {
    let (mut send, recv) = connection.open_bi().await?;
    let first = Message::Request(Request::Documents(wire::encode(said)?));
    wire::write_frame(&mut send, &first.encode()?).await?;
    Ok((send, recv))
}

/// Pushes a document.
pub(super) async fn push(connection: &Connection, document: Vec<u8>) -> Result<Took, ExchangeError> {
    let (mut send, mut recv) = open(connection, &Said::Push(document)).await?;
    let _finished_before = send.finish();
    hear(&mut recv).await
}

/// What a comparison told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compare {
    /// The other's wall time less this one's, in milliseconds.
    pub(super) ahead_ms: i64,
    /// Neither side held what the other did not.
    pub(super) was_equal: bool,
}

/// Compares with a peer and evens out what fits one frame each way.
pub(super) async fn compare(
    connection: &Connection,
    peer: NodeName,
    task: &mpsc::Sender<Order>,
    clock_ms: impl Fn() -> u64,
) -> Result<Compare, ExchangeError> {
    let set_hash = ask(task, Asked::Summary).await?;
    let asked_ms = clock_ms();
    let (mut send, mut recv) = open(connection, &Said::Compare { set_hash, clock_ms: asked_ms }).await?;
    let compared: Compared = hear(&mut recv).await?;
    // The peer read its clock about half-way.
    let middle_ms = asked_ms.midpoint(clock_ms());
    let ahead_ms = i64::try_from(compared.clock_ms).unwrap_or(i64::MAX).saturating_sub_unsigned(middle_ms);
    let was_equal = compared.digests.is_none();
    if let Some(digests) = compared.digests {
        let given = ask(task, |reply| Asked::Lacking(digests, reply)).await?;
        say(&mut send, &given).await?;
        let back: Given = hear(&mut recv).await?;
        ask(task, |reply| Asked::Given(peer, back, reply)).await?;
    }
    let _finished_before = send.finish();
    ended(&mut recv).await;
    Ok(Compare { ahead_ms, was_equal })
}

/// Answers what `peer` says about documents; `first` is the content of its first frame.
pub(in crate::gossip) async fn serve(
    peer: NodeName,
    first: Vec<u8>,
    (send, recv): (&mut SendStream, &mut RecvStream),
    task: &mpsc::Sender<Order>,
) -> Result<(), ExchangeError> {
    let answered = async {
        match wire::decode::<Said>(&first, FRAME_BYTES_MAX)? {
            Said::Push(document) => {
                let took = ask(task, |reply| Asked::Pushed(peer, document, reply)).await?;
                say(send, &took).await?;
            }
            Said::Compare { set_hash, clock_ms: _ } => {
                let compared = ask(task, |reply| Asked::Compared(set_hash, reply)).await?;
                say(send, &compared).await?;
                if compared.digests.is_some() {
                    let given: Given = hear(recv).await?;
                    let back = ask(task, |reply| Asked::Given(peer, given, reply)).await?;
                    say(send, &back).await?;
                }
            }
        }
        let _finished_before = send.finish();
        ended(recv).await;
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

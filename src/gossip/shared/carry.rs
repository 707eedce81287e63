//! What two agents say about shared maps, on one bidirectional stream.
//!
//! ```text
//!   Push(head)       -> Verdict: Send -> value -> Verdict
//!   Compare(summary) -> Off | Same | Differs(summary, buckets)
//!        then the beginner asks, as often as it takes:
//!        Digests(bucket, after) -> page     Want(key) -> head, value     Take(head) -> Verdict [value -> Verdict]
//!        End
//! ```
//! A value follows its head in raw frames of at most [`CHUNK_BYTES`]; its length is in the head, and bounded.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{Desk, KV_VALUE_BYTES_MAX, Order, PLACE_WAIT_MAX, Space};
use crate::gossip::engine::{Message, Request};
use crate::gossip::exchange::{ExchangeError, ended};
use crate::lww::{BUCKETS, Body, Digest, KeyHash, Merged, Plan, Record, Refused, Stamp, Summary};
use crate::model::NodeName;
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Longest comparison; what is left then is for the next one.
pub(super) const COMPARE_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest time that one value or one answer takes.
const STEP_TIME_MAX: Duration = Duration::from_secs(10);
/// Largest piece of a value.
const CHUNK_BYTES: usize = 128 * 1024;
/// Most digests in one frame, each at most 110 bytes long.
pub(super) const PAGE_DIGESTS: usize = 1024;
/// Most frames of digests of one bucket: twice the keys that a map holds may hash to one.
const PAGES_MAX: usize = 160;
/// A peer that refused so many records in one comparison is given no more.
const REFUSALS_MAX: usize = 256;

/// The first frame's content.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    Push { space: Space, head: Head },
    Compare { space: Space, summary: Summary },
}

/// A record without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::gossip) struct Head {
    pub(super) key: String,
    pub(super) stamp: Stamp,
    /// The flags, and the length of the value in bytes; none: it was deleted.
    pub(super) body: Option<(u64, u32)>,
}

impl Head {
    fn of(record: &Record) -> Self {
        let length = |body: &Arc<Body>| u32::try_from(body.value.len()).unwrap_or(u32::MAX);
        let body = record.body.as_ref().map(|body| (body.flags, length(body)));
        Self { key: record.key.to_string(), stamp: record.stamp.clone(), body }
    }

    fn with(self, value: Vec<u8>) -> Record {
        let body = self.body.map(|(flags, _)| Arc::new(Body { flags, value }));
        Record { key: self.key.into(), stamp: self.stamp, body }
    }

    pub(super) fn value_bytes(&self) -> Option<usize> {
        self.body.map(|(_, length)| usize::try_from(length).unwrap_or(usize::MAX))
    }
}

/// What is made of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::gossip) enum Verdict {
    /// The value is wanted.
    Send,
    /// It is held, from now on or from before.
    Held,
    /// A newer one is held.
    Older,
    /// It is refused, for this reason.
    Refused(String),
    /// The map is off.
    Off,
}

/// What the task made of a record that a peer brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gossip) enum Taken {
    /// The map is off.
    Off,
    /// What the map made of it.
    Judged(Result<Merged, Refused>),
}

impl From<Taken> for Verdict {
    fn from(taken: Taken) -> Self {
        match taken {
            Taken::Off => Self::Off,
            Taken::Judged(Ok(Merged::Taken | Merged::Known)) => Self::Held,
            Taken::Judged(Ok(Merged::Older)) => Self::Older,
            Taken::Judged(Err(refused)) => Self::Refused(refused.to_string()),
        }
    }
}

/// The answer to a comparison.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::gossip) enum Compared {
    /// The map is off.
    Off,
    /// Nothing differs.
    Same,
    /// These do.
    Differs { summary: Summary, buckets: Vec<u64> },
}

/// A question of the beginner of a comparison.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    Digests { bucket: u8, after: Option<KeyHash> },
    Want(KeyHash),
    Take(Head),
    End,
}

/// Some digests of a bucket.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::gossip) struct Page {
    pub(super) digests: Vec<Digest>,
    pub(super) is_last: bool,
}

/// A question for the task.
#[derive(Debug)]
pub(in crate::gossip) enum Asked {
    /// Would this be taken? None: the map is off.
    Judge(Space, Head, oneshot::Sender<Verdict>),
    Take(NodeName, Space, Record, oneshot::Sender<Taken>),
    Compared(Space, Summary, oneshot::Sender<Compared>),
    /// How this node presents itself, with its buckets; none: the map is off.
    Summary(Space, oneshot::Sender<Option<(Summary, Vec<u64>)>>),
    Digests(Space, u8, Option<KeyHash>, oneshot::Sender<Page>),
    Record(Space, KeyHash, oneshot::Sender<Option<Record>>),
    Plan(Space, Summary, u8, Vec<Digest>, oneshot::Sender<Plan>),
}

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
    let frame = within(wire::read_frame(recv, FRAME_BYTES_MAX)).await??;
    Ok(wire::decode(&frame, FRAME_BYTES_MAX)?)
}

async fn within<T>(step: impl Future<Output = T>) -> Result<T, ExchangeError> {
    tokio::time::timeout(STEP_TIME_MAX, step).await.map_err(|_| ExchangeError::Late)
}

async fn say_value(send: &mut SendStream, record: &Record) -> Result<(), ExchangeError> {
    let Some(body) = &record.body else { return Ok(()) };
    for chunk in body.value.chunks(CHUNK_BYTES) {
        wire::write_frame(send, chunk).await?;
    }
    Ok(())
}

/// Reads the value that `head` announces.
async fn hear_value(recv: &mut RecvStream, head: Head) -> Result<Record, ExchangeError> {
    let bytes = head.value_bytes().unwrap_or(0);
    if bytes > KV_VALUE_BYTES_MAX {
        return Err(WireError::TooLarge { bytes, bytes_max: KV_VALUE_BYTES_MAX }.into());
    }
    let mut value = Vec::new();
    let read = async {
        while value.len() < bytes {
            let chunk = wire::read_frame(recv, CHUNK_BYTES.min(bytes - value.len())).await?;
            if chunk.is_empty() {
                return Err(WireError::Empty);
            }
            value.extend_from_slice(&chunk);
        }
        Ok(())
    };
    within(read).await??;
    Ok(head.with(value))
}

async fn open(connection: &Connection, said: &Said) -> Result<(SendStream, RecvStream), ExchangeError> {
    let (mut send, recv) = connection.open_bi().await?;
    let first = Message::Request(Request::Shared(wire::encode(said)?));
    wire::write_frame(&mut send, &first.encode()?).await?;
    Ok((send, recv))
}

/// Pushes a record: its head, and its value if that is wanted.
pub(super) async fn push(connection: &Connection, space: Space, record: &Record) -> Result<Verdict, ExchangeError> {
    let (mut send, mut recv) = open(connection, &Said::Push { space, head: Head::of(record) }).await?;
    let mut verdict: Verdict = hear(&mut recv).await?;
    if verdict == Verdict::Send {
        say_value(&mut send, record).await?;
        verdict = hear(&mut recv).await?;
    }
    let _finished_before = send.finish();
    Ok(verdict)
}

/// What a comparison told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    /// The map is off there, or here.
    Off,
    /// Both sides held the same.
    Equal,
    /// They did not; and whether they do now, as far as is known.
    Differed { is_even: bool },
    /// They did not, and still do not: one refused all that the other has more.
    Refused,
}

/// Compares one map with a peer and evens out what there is time for.
pub(super) async fn compare(
    connection: &Connection,
    peer: &NodeName,
    space: Space,
    task: &mpsc::Sender<Order>,
) -> Result<Compare, ExchangeError> {
    let Some((summary, own)) = ask(task, |reply| Asked::Summary(space, reply)).await? else { return Ok(Compare::Off) };
    let (mut send, mut recv) = open(connection, &Said::Compare { space, summary }).await?;
    let compared: Compared = hear(&mut recv).await?;
    let outcome = match compared {
        Compared::Off => Compare::Off,
        Compared::Same => Compare::Equal,
        Compared::Differs { summary, buckets } => {
            let mut levelling =
                Levelling { send: &mut send, recv: &mut recv, peer, space, task, summary, counts: Counts::default() };
            let differing = own.iter().zip(&buckets).zip(0..BUCKETS).filter(|((own, other), _)| own != other);
            for bucket in differing.filter_map(|(_, at)| u8::try_from(at).ok()) {
                levelling.bucket(bucket).await?;
            }
            let counts = levelling.counts;
            say(&mut send, &Ask::End).await?;
            let refused = counts.full + counts.refused;
            if refused > 0 && counts.evened == 0 && counts.failed == 0 {
                Compare::Refused
            } else {
                Compare::Differed { is_even: refused == 0 && counts.failed == 0 }
            }
        }
    };
    let _finished_before = send.finish();
    ended(&mut recv).await;
    Ok(outcome)
}

/// One side of a comparison that found a difference.
struct Levelling<'a> {
    send: &'a mut SendStream,
    recv: &'a mut RecvStream,
    peer: &'a NodeName,
    space: Space,
    task: &'a mpsc::Sender<Order>,
    summary: Summary,
    counts: Counts,
}

/// What became of the records of a comparison.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    evened: usize,
    /// For which there is no room here.
    full: usize,
    /// That the other side refused.
    refused: usize,
    failed: usize,
}

impl Levelling<'_> {
    async fn bucket(&mut self, bucket: u8) -> Result<(), ExchangeError> {
        let (mut digests, mut after, space) = (Vec::new(), None, self.space);
        for _ in 0..PAGES_MAX {
            say(self.send, &Ask::Digests { bucket, after }).await?;
            let page: Page = hear(self.recv).await?;
            after = page.digests.last().map(|digest| digest.key);
            digests.extend(page.digests);
            if page.is_last || after.is_none() {
                break;
            }
        }
        let summary = self.summary;
        let plan = ask(self.task, |reply| Asked::Plan(space, summary, bucket, digests, reply)).await?;
        let live = plan.pull.into_iter().map(|key| (key, false));
        for (key, is_deleted) in plan.pull_deleted.into_iter().map(|key| (key, true)).chain(live) {
            // One value that has no room is enough: the others of a larger peer would be carried here in vain.
            if self.counts.full > 0 && !is_deleted {
                break;
            }
            say(self.send, &Ask::Want(key)).await?;
            let head: Option<Head> = hear(self.recv).await?;
            // It went meanwhile: the next comparison tells.
            let Some(head) = head else { continue };
            let record = hear_value(self.recv, head).await?;
            let peer = self.peer.clone();
            match ask(self.task, |reply| Asked::Take(peer, space, record, reply)).await? {
                Taken::Judged(Ok(_)) => self.counts.evened += 1,
                Taken::Judged(Err(Refused::Full { .. } | Refused::Deletions { .. })) => self.counts.full += 1,
                Taken::Judged(Err(_)) | Taken::Off => self.counts.failed += 1,
            }
        }
        for key in plan.give {
            if self.counts.refused >= REFUSALS_MAX {
                break;
            }
            let Some(record) = ask(self.task, |reply| Asked::Record(space, key, reply)).await? else { continue };
            say(self.send, &Ask::Take(Head::of(&record))).await?;
            let mut verdict: Verdict = hear(self.recv).await?;
            if verdict == Verdict::Send {
                say_value(self.send, &record).await?;
                verdict = hear(self.recv).await?;
            }
            match verdict {
                Verdict::Held | Verdict::Older => self.counts.evened += 1,
                Verdict::Refused(_) => self.counts.refused += 1,
                Verdict::Send | Verdict::Off => self.counts.failed += 1,
            }
        }
        Ok(())
    }
}

/// Answers what `peer` says about shared maps; `first` is the content of its first frame.
pub(in crate::gossip) async fn serve(
    peer: NodeName,
    first: Vec<u8>,
    (send, recv): (&mut SendStream, &mut RecvStream),
    desk: &Desk,
) -> Result<(), ExchangeError> {
    let answered = async {
        match wire::decode::<Said>(&first, FRAME_BYTES_MAX)? {
            Said::Push { space, head } => take(&peer, space, head, (&mut *send, &mut *recv), desk).await?,
            Said::Compare { space, summary } => {
                let compared = ask(&desk.orders, |reply| Asked::Compared(space, summary, reply)).await?;
                say(send, &compared).await?;
                if matches!(compared, Compared::Differs { .. }) {
                    answer_questions(&peer, space, (&mut *send, &mut *recv), desk).await?;
                }
            }
        }
        let _finished_before = send.finish();
        ended(recv).await;
        Ok(())
    };
    tokio::time::timeout(COMPARE_TIME_MAX, answered).await.unwrap_or(Err(ExchangeError::Late))
}

async fn answer_questions(
    peer: &NodeName,
    space: Space,
    (send, recv): (&mut SendStream, &mut RecvStream),
    desk: &Desk,
) -> Result<(), ExchangeError> {
    let task = &desk.orders;
    loop {
        match hear::<Ask>(recv).await? {
            Ask::Digests { bucket, after } => {
                let page = ask(task, |reply| Asked::Digests(space, bucket, after, reply)).await?;
                say(send, &page).await?;
            }
            Ask::Want(key) => {
                let record = ask(task, |reply| Asked::Record(space, key, reply)).await?;
                say(send, &record.as_ref().map(Head::of)).await?;
                if let Some(record) = record {
                    say_value(send, &record).await?;
                }
            }
            Ask::Take(head) => take(peer, space, head, (&mut *send, &mut *recv), desk).await?,
            Ask::End => return Ok(()),
        }
    }
}

/// Judges a record by its head and takes it, with its value, if it is news.
async fn take(
    peer: &NodeName,
    space: Space,
    head: Head,
    (send, recv): (&mut SendStream, &mut RecvStream),
    desk: &Desk,
) -> Result<(), ExchangeError> {
    let judged = head.clone();
    let mut verdict = ask(&desk.orders, |reply| Asked::Judge(space, judged, reply)).await?;
    if verdict == Verdict::Send {
        let has_value = head.body.is_some();
        // A place for as long as the value is read: it is at most ten seconds. What fits in one frame takes none.
        let place = if head.value_bytes().is_some_and(|bytes| bytes > CHUNK_BYTES) {
            let Ok(place) = tokio::time::timeout(PLACE_WAIT_MAX, desk.places.take(peer)).await else {
                return say(send, &Verdict::Refused("busy with other values: again later".to_owned())).await;
            };
            place
        } else {
            None
        };
        if has_value {
            say(send, &verdict).await?;
        }
        let record = hear_value(recv, head).await?;
        let peer = peer.clone();
        verdict = ask(&desk.orders, |reply| Asked::Take(peer, space, record, reply)).await?.into();
        drop(place);
    }
    say(send, &verdict).await
}

/// A message about shared maps: the first byte says which, the rest is a frame; whether it decodes. See `crate::fuzz`.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) -> bool {
    use crate::fuzz::stable;
    let Some((kind, frame)) = bytes.split_first() else { return false };
    match kind {
        0 => stable::<Said>(frame, FRAME_BYTES_MAX).is_some(),
        1 => stable::<Verdict>(frame, FRAME_BYTES_MAX).is_some(),
        2 => stable::<Compared>(frame, FRAME_BYTES_MAX).is_some(),
        3 => stable::<Ask>(frame, FRAME_BYTES_MAX).is_some(),
        4 => stable::<Page>(frame, FRAME_BYTES_MAX).is_some(),
        _ => stable::<Option<Head>>(frame, FRAME_BYTES_MAX).is_some(),
    }
}

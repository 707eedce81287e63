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

use quinn::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{
    COMPARES_MAX, Desk, KV_VALUE_BYTES_MAX, Order, PUSH_TIME_MAX, PUSHES_MAX, PUSHES_PER_PEER_MAX, PUSHES_WAITING_MAX,
    Space,
};
use crate::gossip::carrier::{Bounds, Cargo, Found};
use crate::gossip::engine::{Message, Request};
use crate::gossip::exchange::ExchangeError;
use crate::gossip::talk::{CHUNK_BYTES, Talk, ask};
use crate::lww::{BUCKETS, Body, Digest, KeyHash, Merged, Plan, Record, Refused, Stamp, Summary, key_hash};
use crate::model::NodeName;
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Longest comparison; what is left then is for the next one.
const COMPARE_TIME_MAX: Duration = Duration::from_secs(30);
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
    /// There is no place for a value of this size: again later.
    Busy,
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

impl From<Asked> for Order {
    fn from(asked: Asked) -> Self {
        Self::Peer(asked)
    }
}

/// A key that was written, for a peer. Its record is read when the push begins: a newer one may have come.
#[derive(Debug, Clone)]
pub(in crate::gossip) struct News {
    pub(super) space: Space,
    pub(super) key: Arc<str>,
}

/// Shared maps as a carrier's cargo: asks the task that owns them.
#[derive(Debug, Clone)]
pub(super) struct Maps {
    pub(super) task: mpsc::Sender<Order>,
    /// Those that are on.
    pub(super) spaces: Arc<[Space]>,
}

impl Cargo for Maps {
    const BOUNDS: Bounds = Bounds {
        name: "shared records",
        pushes_max: PUSHES_MAX,
        pushes_per_peer_max: PUSHES_PER_PEER_MAX,
        pushes_waiting_max: PUSHES_WAITING_MAX,
        push_time_max: PUSH_TIME_MAX,
        compares_max: COMPARES_MAX,
        compare_time_max: COMPARE_TIME_MAX,
    };
    type Item = News;
    /// None: the record went before its turn came.
    type Took = Option<Verdict>;
    type Compared = Vec<(Space, Compare)>;

    async fn push(self, connection: Connection, News { space, key }: News) -> Result<Option<Verdict>, ExchangeError> {
        let record = ask(&self.task, |reply| Asked::Record(space, key_hash(&key), reply)).await?;
        match record {
            Some(record) => push(&connection, space, &record).await.map(Some),
            None => Ok(None),
        }
    }

    async fn compare(self, connection: Connection, peer: NodeName) -> Result<Self::Compared, ExchangeError> {
        let mut outcomes = Vec::new();
        for &space in &*self.spaces {
            outcomes.push((space, compare(&connection, &peer, space, &self.task).await?));
        }
        Ok(outcomes)
    }

    fn found(compared: &Self::Compared) -> Found {
        let differs = compared.iter().any(|(_, compare)| matches!(compare, Compare::Differed { .. }));
        if differs { Found::Differed } else { Found::Equal }
    }
}

impl Talk {
    async fn say_value(&mut self, record: &Record) -> Result<(), ExchangeError> {
        match &record.body {
            Some(body) => self.say_bytes(&body.value).await,
            None => Ok(()),
        }
    }

    /// Hears the value that `head` announces.
    async fn hear_value(&mut self, head: Head) -> Result<Record, ExchangeError> {
        let bytes = head.value_bytes().unwrap_or(0);
        if bytes > KV_VALUE_BYTES_MAX {
            return Err(WireError::TooLarge { bytes, bytes_max: KV_VALUE_BYTES_MAX }.into());
        }
        let value = self.hear_bytes(bytes).await?;
        Ok(head.with(value))
    }

    /// Hears what the other side makes of `record`, whose head was said; says its value if that is wanted.
    async fn hear_verdict(&mut self, record: &Record) -> Result<Verdict, ExchangeError> {
        let mut verdict: Verdict = self.hear().await?;
        if verdict == Verdict::Send {
            self.say_value(record).await?;
            verdict = self.hear().await?;
        }
        Ok(verdict)
    }
}

async fn open(connection: &Connection, said: &Said) -> Result<Talk, ExchangeError> {
    Talk::open(connection, &Message::Request(Request::Shared(wire::encode(said)?))).await
}

/// Pushes a record: its head, and its value if that is wanted.
async fn push(connection: &Connection, space: Space, record: &Record) -> Result<Verdict, ExchangeError> {
    let mut talk = open(connection, &Said::Push { space, head: Head::of(record) }).await?;
    let verdict = talk.hear_verdict(record).await?;
    talk.finish();
    if verdict == Verdict::Busy { Err(ExchangeError::Busy) } else { Ok(verdict) }
}

/// What a comparison told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::gossip) enum Compare {
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
async fn compare(
    connection: &Connection,
    peer: &NodeName,
    space: Space,
    task: &mpsc::Sender<Order>,
) -> Result<Compare, ExchangeError> {
    let Some((summary, own)) = ask(task, |reply| Asked::Summary(space, reply)).await? else { return Ok(Compare::Off) };
    let mut talk = open(connection, &Said::Compare { space, summary }).await?;
    let compared: Compared = talk.hear().await?;
    let outcome = match compared {
        Compared::Off => Compare::Off,
        Compared::Same => Compare::Equal,
        Compared::Differs { summary, buckets } => {
            let counts = Counts::default();
            let mut levelling = Levelling { talk: &mut talk, peer, space, task, summary, counts };
            let differing = own.iter().zip(&buckets).zip(0..BUCKETS).filter(|((own, other), _)| own != other);
            for bucket in differing.filter_map(|(_, at)| u8::try_from(at).ok()) {
                levelling.bucket(bucket).await?;
            }
            let counts = levelling.counts;
            talk.say(&Ask::End).await?;
            if counts.is_busy {
                return Err(ExchangeError::Busy);
            }
            let refused = counts.full + counts.refused;
            if refused > 0 && counts.evened == 0 && counts.failed == 0 {
                Compare::Refused
            } else {
                Compare::Differed { is_even: refused == 0 && counts.failed == 0 }
            }
        }
    };
    talk.end().await;
    Ok(outcome)
}

/// One side of a comparison that found a difference.
struct Levelling<'a> {
    talk: &'a mut Talk,
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
    /// The other side had no place for a value: no more is given to it this time.
    is_busy: bool,
}

impl Levelling<'_> {
    async fn bucket(&mut self, bucket: u8) -> Result<(), ExchangeError> {
        let (mut digests, mut after, space) = (Vec::new(), None, self.space);
        for _ in 0..PAGES_MAX {
            self.talk.say(&Ask::Digests { bucket, after }).await?;
            let page: Page = self.talk.hear().await?;
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
            self.talk.say(&Ask::Want(key)).await?;
            let head: Option<Head> = self.talk.hear().await?;
            // It went meanwhile: the next comparison tells.
            let Some(head) = head else { continue };
            let record = self.talk.hear_value(head).await?;
            let peer = self.peer.clone();
            match ask(self.task, |reply| Asked::Take(peer, space, record, reply)).await? {
                Taken::Judged(Ok(_)) => self.counts.evened += 1,
                Taken::Judged(Err(Refused::Full { .. } | Refused::Deletions { .. })) => self.counts.full += 1,
                Taken::Judged(Err(_)) | Taken::Off => self.counts.failed += 1,
            }
        }
        for key in plan.give {
            if self.counts.refused >= REFUSALS_MAX || self.counts.is_busy {
                break;
            }
            let Some(record) = ask(self.task, |reply| Asked::Record(space, key, reply)).await? else { continue };
            self.talk.say(&Ask::Take(Head::of(&record))).await?;
            match self.talk.hear_verdict(&record).await? {
                Verdict::Held | Verdict::Older => self.counts.evened += 1,
                Verdict::Refused(_) => self.counts.refused += 1,
                Verdict::Busy => self.counts.is_busy = true,
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
    talk: &mut Talk,
    desk: &Desk,
) -> Result<(), ExchangeError> {
    let answered = async {
        match wire::decode::<Said>(&first, FRAME_BYTES_MAX)? {
            Said::Push { space, head } => take(&peer, space, head, talk, desk).await?,
            Said::Compare { space, summary } => {
                let compared = ask(&desk.orders, |reply| Asked::Compared(space, summary, reply)).await?;
                talk.say(&compared).await?;
                if matches!(compared, Compared::Differs { .. }) {
                    answer_questions(&peer, space, talk, desk).await?;
                }
            }
        }
        talk.end().await;
        Ok(())
    };
    tokio::time::timeout(COMPARE_TIME_MAX, answered).await.unwrap_or(Err(ExchangeError::Late))
}

async fn answer_questions(peer: &NodeName, space: Space, talk: &mut Talk, desk: &Desk) -> Result<(), ExchangeError> {
    let task = &desk.orders;
    loop {
        match talk.hear::<Ask>().await? {
            Ask::Digests { bucket, after } => {
                let page = ask(task, |reply| Asked::Digests(space, bucket, after, reply)).await?;
                talk.say(&page).await?;
            }
            Ask::Want(key) => {
                let record = ask(task, |reply| Asked::Record(space, key, reply)).await?;
                talk.say(&record.as_ref().map(Head::of)).await?;
                if let Some(record) = record {
                    talk.say_value(&record).await?;
                }
            }
            Ask::Take(head) => take(peer, space, head, talk, desk).await?,
            Ask::End => return Ok(()),
        }
    }
}

/// Judges a record by its head and takes it, with its value, if it is news.
async fn take(peer: &NodeName, space: Space, head: Head, talk: &mut Talk, desk: &Desk) -> Result<(), ExchangeError> {
    let judged = head.clone();
    let mut verdict = ask(&desk.orders, |reply| Asked::Judge(space, judged, reply)).await?;
    if verdict == Verdict::Send {
        // A place for as long as the value is read: it is at most ten seconds. What fits in one frame takes none.
        let place = if head.value_bytes().is_some_and(|bytes| bytes > CHUNK_BYTES) {
            let Some(place) = desk.places.take(peer).await else { return talk.say(&Verdict::Busy).await };
            Some(place)
        } else {
            None
        };
        if head.body.is_some() {
            talk.say(&verdict).await?;
        }
        let record = talk.hear_value(head).await?;
        let peer = peer.clone();
        verdict = ask(&desk.orders, |reply| Asked::Take(peer, space, record, reply)).await?.into();
        drop(place);
    }
    talk.say(&verdict).await
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

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::super::{KV_BYTES_DEFAULT, queue};
    use super::*;
    use crate::gossip::carrier::Places;
    use crate::gossip::engine::Stage;
    use crate::gossip::talk::answer;
    use crate::lww::Table;
    use crate::transport::fixture::pair;

    const NOW_MS: u64 = 1_800_000_000_000;

    /// Answers as the task does, from one map that differs from every other.
    async fn stand_in(mut orders: mpsc::Receiver<Order>, mut table: Table) {
        while let Some(order) = orders.recv().await {
            let Order::Peer(asked) = order else { panic!("only peers ask: {order:?}") };
            let presented = |table: &Table| (table.summary(NOW_MS), table.buckets().to_vec());
            match asked {
                Asked::Judge(_, _, reply) => answer(reply, Verdict::Send),
                Asked::Take(_, _, record, reply) => answer(reply, Taken::Judged(table.merge(record, NOW_MS))),
                Asked::Compared(_, _, reply) => {
                    let (summary, buckets) = presented(&table);
                    answer(reply, Compared::Differs { summary, buckets });
                }
                Asked::Summary(_, reply) => answer(reply, Some(presented(&table))),
                Asked::Digests(_, bucket, after, reply) => {
                    let (digests, is_last) = table.digests(bucket, after, PAGE_DIGESTS);
                    answer(reply, Page { digests, is_last });
                }
                Asked::Record(_, key, reply) => answer(reply, table.record(&key)),
                Asked::Plan(_, theirs, bucket, digests, reply) => {
                    answer(reply, table.plan(&theirs, bucket, &digests, NOW_MS));
                }
            }
        }
    }

    #[tokio::test]
    async fn a_large_value_without_a_place_is_neither_refused_nor_equal_but_offered_again() {
        let (near, far): (NodeName, NodeName) = ("near".parse().unwrap(), "far".parse().unwrap());
        let map = || Table::new(Space::Kv.limits(KV_BYTES_DEFAULT), 1);
        let (pair, mut tasks) = (pair().await, JoinSet::new());
        let (mut far_desk, far_orders) = queue();
        far_desk.places = Places::new(1, 1);
        let place = far_desk.places.take(&"other".parse().unwrap()).await.unwrap();
        tasks.spawn(stand_in(far_orders, map()));
        let (listener, peer) = (pair.listener.clone(), near.clone());
        tasks.spawn(async move {
            while let Ok((send, recv)) = listener.accept_bi().await {
                let mut talk = Talk { send, recv };
                let first = Stage::Asked.decode(&talk.hear_frame(FRAME_BYTES_MAX).await.unwrap()).unwrap();
                let Message::Request(Request::Shared(said)) = first else { panic!("{first:?}") };
                serve(peer.clone(), said, &mut talk, &far_desk).await.unwrap();
            }
        });
        let (near_desk, near_orders) = queue();
        let mut table = map();
        table.put("large", Body { flags: 0, value: vec![7; CHUNK_BYTES + 1] }, &near, NOW_MS).unwrap();
        tasks.spawn(stand_in(near_orders, table));
        let maps = Maps { task: near_desk.orders, spaces: [Space::Kv].into() };

        let news = News { space: Space::Kv, key: "large".into() };
        let pushed = maps.clone().push(pair.dialer.clone(), news.clone()).await;
        assert!(matches!(pushed, Err(ExchangeError::Busy)), "{pushed:?}");
        let compared = maps.clone().compare(pair.dialer.clone(), far.clone()).await;
        assert!(matches!(compared, Err(ExchangeError::Busy)), "{compared:?}");
        drop(place);
        let compared = maps.clone().compare(pair.dialer.clone(), far).await.unwrap();
        assert_eq!(compared, [(Space::Kv, Compare::Differed { is_even: true })]);
        assert_eq!(maps.push(pair.dialer.clone(), news).await.unwrap(), Some(Verdict::Held));
    }
}

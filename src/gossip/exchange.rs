//! Carries the messages of exchanges over QUIC: one bidirectional stream each, bounded frames, an end to waiting.
//!
//! ```text
//!   begin: open -> say -> hear -> the actor's step -> say ... again on a new stream, or done
//!   serve:         accepted stream -> hear -> the actor's step -> say ... done
//! ```
//!
//! Frames are decoded here, so that the gossip task sees messages alone. Every stream ends within [`TIME_MAX`].
//!
//! Not here: the messages (`engine::message`) and the steps (`engine::answer`).

use std::collections::BTreeMap;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;

use super::actor::Input;
use super::documents;
use super::engine::{HelloReply, Message, Request, Stage, Step};
use super::shared;
use super::talk::{Talk, ask};
use crate::membership::MeshId;
use crate::model::NodeName;
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Where streams that are no exchange of the engine's are brought.
#[derive(Debug, Clone)]
pub(super) struct Desks {
    pub(super) documents: mpsc::Sender<documents::Order>,
    pub(super) shared: shared::Desk,
}

/// Longest time of one stream, in virtue of which a stalled peer holds nothing for ever.
pub(super) const TIME_MAX: Duration = Duration::from_secs(10);

/// How long a peer is waited for that is asked for its round trips: a client of the API waits for the answer.
const ROUND_TRIPS_TIME_MAX: Duration = Duration::from_secs(1);
/// Longest frame of round trips: those to 256 peers, each with a name of 63 bytes, are 18 KiB.
const ROUND_TRIPS_BYTES_MAX: usize = 32 * 1024;

/// Why an exchange ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    /// It took longer than [`TIME_MAX`].
    #[error("peer did not answer within {} s", TIME_MAX.as_secs())]
    Late,
    /// A frame could not be read or written.
    #[error("exchange failed")]
    Wire(#[from] WireError),
    /// The connection ended.
    #[error("connection lost")]
    Connection(#[from] quinn::ConnectionError),
    /// There is no connection and none can be made.
    #[error("{0}")]
    Unreachable(String),
    /// The peer has no place left for what it is given.
    #[error("peer is busy with what it receives from others")]
    Busy,
    /// This agent stops.
    #[error("agent is shutting down")]
    Closed,
    /// It panicked; the log has the reason.
    #[error("exchange failed in itself")]
    Panicked,
}

impl ExchangeError {
    /// Returns the error with its causes; where the connection ended, its reason says most.
    pub(super) fn explain(&self, connection: Option<&Connection>) -> String {
        if let Some(reason) = connection.and_then(Connection::close_reason) {
            return format!("connection lost: {reason}");
        }
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

/// What the engine's exchanges say and hear on a stream.
impl Talk {
    async fn tell(&mut self, message: &Message) -> Result<(), ExchangeError> {
        self.say_frame(&message.encode()?).await
    }

    async fn hear_at(&mut self, stage: Stage) -> Result<Message, ExchangeError> {
        if stage.awaits_end() {
            // The peer ends the stream when it has taken everything.
            self.end().await;
            return Ok(Message::End);
        }
        let frame = self.hear_frame(FRAME_BYTES_MAX).await?;
        Ok(stage.decode(&frame)?)
    }

    /// Hears (`heard` comes first, if it is there) and says until this stream is done; returns what is said on the next one, if there is one.
    async fn run(
        &mut self,
        peer: &NodeName,
        mut stage: Stage,
        mut heard: Option<Message>,
        actor: &mpsc::Sender<Input>,
    ) -> Result<Option<(Message, Stage)>, ExchangeError> {
        loop {
            let message = match heard.take() {
                Some(message) => message,
                None => self.hear_at(stage).await?,
            };
            let step = ask(actor, |reply| Input::Heard { peer: peer.clone(), stage, message, reply }).await?;
            let again = match step {
                Step::Say(message, next) => {
                    self.tell(&message).await?;
                    stage = next;
                    continue;
                }
                Step::Again(message, next) => Some((message, next)),
                Step::Last(message) => {
                    self.tell(&message).await?;
                    None
                }
                Step::Done => None,
            };
            self.end().await;
            return Ok(again);
        }
    }
}

async fn within<T>(exchange: impl Future<Output = Result<T, ExchangeError>>) -> Result<T, ExchangeError> {
    tokio::time::timeout(TIME_MAX, exchange).await.unwrap_or(Err(ExchangeError::Late))
}

/// Says hello.
pub(super) async fn hello(connection: &Connection, own: MeshId) -> Result<HelloReply, ExchangeError> {
    let reply = within(async {
        let mut talk = Talk::open(connection, &Message::Request(Request::Hello(own))).await?;
        talk.hear_at(Stage::Greeting).await
    });
    match reply.await? {
        Message::Hello(reply) => Ok(reply),
        _ => Err(ExchangeError::Closed),
    }
}

/// Asks the peer at the other end of `connection` for its round trips, by node.
pub(super) async fn round_trips(connection: &Connection) -> Result<BTreeMap<NodeName, Duration>, ExchangeError> {
    let asked = async {
        let mut talk = Talk::open(connection, &Message::Request(Request::RoundTrips)).await?;
        talk.finish();
        let frame = talk.hear_frame(ROUND_TRIPS_BYTES_MAX).await?;
        let told: Vec<(NodeName, u32)> = wire::decode(&frame, ROUND_TRIPS_BYTES_MAX)?;
        talk.ended().await;
        Ok(told.into_iter().map(|(node, micros)| (node, Duration::from_micros(micros.into()))).collect())
    };
    tokio::time::timeout(ROUND_TRIPS_TIME_MAX, asked).await.unwrap_or(Err(ExchangeError::Late))
}

/// Tells a peer this node's round trips, in microseconds.
async fn tell_round_trips(talk: &mut Talk, actor: &mpsc::Sender<Input>) -> Result<(), ExchangeError> {
    let measured = ask(actor, Input::RoundTrips).await?;
    let micros = |trip: Duration| u32::try_from(trip.as_micros()).unwrap_or(u32::MAX);
    let told: Vec<(NodeName, u32)> = measured.into_iter().map(|(node, trip)| (node, micros(trip))).collect();
    talk.say(&told).await?;
    talk.end().await;
    Ok(())
}

/// Carries an exchange that the engine began to its end, on as many streams as it takes.
pub(super) async fn begin(
    connection: Connection,
    peer: NodeName,
    first: (Message, Stage),
    actor: mpsc::Sender<Input>,
) -> Result<(), ExchangeError> {
    let mut next = Some(first);
    while let Some((message, stage)) = next {
        next = within(async {
            let mut talk = Talk::open(&connection, &message).await?;
            talk.run(&peer, stage, None, &actor).await
        })
        .await?;
    }
    Ok(())
}

/// Answers what `peer` asks on one stream.
pub(super) async fn serve(
    peer: NodeName,
    streams: (SendStream, RecvStream),
    actor: mpsc::Sender<Input>,
    desks: Desks,
) -> Result<(), ExchangeError> {
    let mut talk = Talk { send: streams.0, recv: streams.1 };
    let first = within(talk.hear_at(Stage::Asked)).await?;
    match first {
        Message::Request(Request::Documents(said)) => documents::serve(peer, said, &mut talk, &desks.documents).await,
        Message::Request(Request::Shared(said)) => shared::serve(peer, said, &mut talk, &desks.shared).await,
        Message::Request(Request::RoundTrips) => within(tell_round_trips(&mut talk, &actor)).await,
        first => within(talk.run(&peer, Stage::Asked, Some(first), &actor)).await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinSet;

    use super::*;
    use crate::gossip::engine::{Held, SyncReply, Trade};
    use crate::model::Generation;
    use crate::transport::fixture::pair;

    fn desks() -> Desks {
        Desks { documents: documents::queue().0, shared: shared::queue().0 }
    }

    fn id() -> MeshId {
        MeshId::new("b".parse().unwrap(), "10.0.0.2:8301".parse().unwrap(), Generation::default())
    }

    #[tokio::test]
    async fn a_peer_tells_its_round_trips_and_one_that_is_silent_is_given_up() {
        let pair = pair().await;
        let mut tasks = JoinSet::new();
        let (actor, mut inputs) = mpsc::channel(8);
        tasks.spawn(async move {
            while let Some(input) = inputs.recv().await {
                let Input::RoundTrips(reply) = input else { panic!("nothing else is asked") };
                let hour = Duration::from_hours(2);
                let measured = [("c", Duration::from_micros(700)), ("d", hour)];
                reply.send(measured.map(|(node, trip)| (node.parse().unwrap(), trip)).into()).unwrap();
            }
        });
        let listener = pair.listener.clone();
        tasks.spawn(async move {
            let streams = listener.accept_bi().await.unwrap();
            let desks = Desks { documents: documents::queue().0, shared: shared::queue().0 };
            serve(id().name, streams, actor, desks).await.unwrap();
        });
        let told = round_trips(&pair.dialer).await.unwrap();
        let most = Duration::from_micros(u32::MAX.into());
        assert_eq!(told, [("c", Duration::from_micros(700)), ("d", most)].map(|(n, t)| (n.parse().unwrap(), t)).into());
        // Nobody accepts the next stream.
        assert!(matches!(round_trips(&pair.dialer).await, Err(ExchangeError::Late)));
    }

    /// Answers like an engine whose replica differs until `delivered` reaches 2: once on either side.
    fn step(peer: &NodeName, stage: Stage, message: Message, delivered: &AtomicUsize) -> Step {
        match (stage, message) {
            (Stage::Asked, Message::Request(Request::Sync { set_hash: 7, .. })) => {
                if delivered.load(Ordering::SeqCst) < 2 {
                    let buckets = SyncReply::Buckets(vec![1; 64]);
                    return Step::Say(Message::Sync(buckets), Stage::Comparing);
                }
                Step::Last(Message::Sync(SyncReply::Same))
            }
            (Stage::Asked, Message::Request(Request::Hello(id))) => {
                assert_eq!(*peer, id.name);
                Step::Last(Message::Hello(HelloReply::Refused("not today".to_owned())))
            }
            (Stage::Asked, Message::Request(Request::Pull(_))) => Step::Last(Message::Deltas(Vec::new())),
            (Stage::Opening { rounds_left }, Message::Sync(SyncReply::Buckets(theirs))) => {
                assert_eq!(theirs, vec![1; 64]);
                let held = Held { buckets: vec![3], digests: Vec::new() };
                Step::Say(Message::Held(held), Stage::Trading { rounds_left })
            }
            (Stage::Comparing, Message::Held(held)) => {
                assert_eq!(held.buckets, [3]);
                Step::Say(Message::Trade(Trade::default()), Stage::Taking)
            }
            (Stage::Trading { rounds_left }, Message::Trade(_)) => {
                delivered.fetch_add(1, Ordering::SeqCst);
                Step::Say(Message::Deltas(Vec::new()), Stage::Ending { rounds_left })
            }
            (Stage::Ending { rounds_left }, Message::End) => {
                let again = Request::Sync { set_hash: 7, farewells: Vec::new() };
                Step::Again(Message::Request(again), Stage::Opening { rounds_left: rounds_left - 1 })
            }
            (Stage::Taking, Message::Deltas(_)) => {
                delivered.fetch_add(1, Ordering::SeqCst);
                Step::Done
            }
            (Stage::Opening { .. }, Message::Sync(SyncReply::Same)) | (Stage::Pulling, _) => Step::Done,
            (stage, message) => panic!("{message:?} where {stage:?} was awaited"),
        }
    }

    async fn stand_in(mut inputs: mpsc::Receiver<Input>, delivered: Arc<AtomicUsize>) {
        while let Some(input) = inputs.recv().await {
            let Input::Heard { peer, stage, message, reply } = input else { panic!("no packets here") };
            drop(reply.send(step(&peer, stage, message, &delivered)));
        }
    }

    #[tokio::test]
    async fn a_sync_ends_when_both_sides_have_delivered_and_hold_the_same() {
        let pair = pair().await;
        let delivered = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let (near, near_inputs) = mpsc::channel(8);
        let (far, far_inputs) = mpsc::channel(8);
        tasks.spawn(stand_in(near_inputs, Arc::clone(&delivered)));
        tasks.spawn(stand_in(far_inputs, Arc::clone(&delivered)));
        let listener = pair.listener.clone();
        tasks.spawn(async move {
            while let Ok(streams) = listener.accept_bi().await {
                serve(id().name, streams, far.clone(), desks()).await.unwrap();
            }
        });
        let first = Message::Request(Request::Sync { set_hash: 7, farewells: Vec::new() });
        let sync = begin(pair.dialer.clone(), id().name, (first, Stage::Opening { rounds_left: 2 }), near.clone());
        sync.await.unwrap();
        assert_eq!(delivered.load(Ordering::SeqCst), 2);
        let reply = hello(&pair.dialer, id()).await.unwrap();
        assert!(matches!(reply, HelloReply::Refused(reason) if reason == "not today"));
        let pull = (Message::Request(Request::Pull(Vec::new())), Stage::Pulling);
        begin(pair.dialer.clone(), id().name, pull, near).await.unwrap();
    }

    #[tokio::test]
    async fn garbage_and_oversized_requests_end_the_exchange_and_not_the_connection() {
        let pair = pair().await;
        let (actor, _inputs) = mpsc::channel(1);
        for frame in [&b"\x00\x00\x00\x03\x01\xff\xff"[..], b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"] {
            let (mut send, _recv) = pair.dialer.open_bi().await.unwrap();
            send.write_all(frame).await.unwrap();
            let streams = pair.listener.accept_bi().await.unwrap();
            let result = serve(id().name, streams, actor.clone(), desks()).await;
            assert!(matches!(result, Err(ExchangeError::Wire(_))), "{result:?}");
        }
        assert!(pair.listener.close_reason().is_none());
    }
}

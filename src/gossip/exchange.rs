//! What two agents say on a stream: hello, pull, sync. Both sides.
//!
//! ```text
//!   Hello(id)            -> Welcome{id, members, goodbyes} | Refused | Outdated
//!   Pull(digests)        -> deltas
//!   Sync(hash, goodbyes) -> Same | Buckets(hashes)
//!        Digests of the differing buckets -> deltas that the beginner lacks, digests of what it has newer
//!        deltas ->
//! ```
//!
//! Every exchange is one bidirectional stream of bounded frames and ends within [`TIME_MAX`].

use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::actor::Input;
use crate::membership::{Leave, Life, MemberEntry, MeshId};
use crate::model::NodeName;
use crate::replica::{Delta, Digest};
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Longest time of one exchange, in virtue of which a stalled peer holds nothing for ever.
pub(super) const TIME_MAX: Duration = Duration::from_secs(10);
/// Most bytes of deltas in one frame; room is left for the other fields.
pub(super) const DELTAS_BYTES_MAX: usize = FRAME_BYTES_MAX - 64 * 1024;
/// Most digests in one frame: 4096 with the longest names fill it by less than its bound.
pub(super) const DIGESTS_MAX: usize = 2048;
/// Most members in a welcome, each at most 110 bytes long.
pub(super) const WELCOME_MEMBERS_MAX: usize = 1500;

/// The first frame of a stream.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Hello(MeshId),
    Pull(Vec<Digest>),
    Sync { set_hash: u64, farewells: Vec<Leave> },
}

/// The answer to a hello.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum HelloReply {
    /// Come in.
    Welcome { id: MeshId, members: Vec<MemberEntry>, farewells: Vec<Leave> },
    /// Stay out, with the reason.
    Refused(String),
    /// The name is free and a later life of it is remembered: come again with a greater one.
    Outdated(Life),
}

/// The answer to the opening of a sync.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum SyncReply {
    /// Nothing differs.
    Same,
    /// What each bucket holds.
    Buckets(Vec<u64>),
}

/// The differing buckets and what one side holds in them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) buckets: Vec<u8>,
    pub(super) digests: Vec<Digest>,
}

/// What one side sends of its own and asks of the other.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Trade {
    pub(super) deltas: Vec<Delta>,
    pub(super) wanted: Vec<Digest>,
}

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
    /// This agent stops.
    #[error("agent is shutting down")]
    Closed,
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

/// The stream of one exchange.
struct Talk {
    send: SendStream,
    recv: RecvStream,
}

impl Talk {
    async fn say<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), ExchangeError> {
        Ok(wire::write_frame(&mut self.send, &wire::encode(message)?).await?)
    }

    async fn hear<T: DeserializeOwned>(&mut self) -> Result<T, ExchangeError> {
        let frame = wire::read_frame(&mut self.recv, FRAME_BYTES_MAX).await?;
        Ok(wire::decode(&frame, FRAME_BYTES_MAX)?)
    }
}

async fn within<T>(exchange: impl Future<Output = Result<T, ExchangeError>>) -> Result<T, ExchangeError> {
    tokio::time::timeout(TIME_MAX, exchange).await.unwrap_or(Err(ExchangeError::Late))
}

/// Asks the actor.
async fn ask<T>(
    actor: &mpsc::Sender<Input>,
    question: impl FnOnce(oneshot::Sender<T>) -> Input,
) -> Result<T, ExchangeError> {
    let (reply, answer) = oneshot::channel();
    actor.send(question(reply)).await.map_err(|_| ExchangeError::Closed)?;
    answer.await.map_err(|_| ExchangeError::Closed)
}

/// Says hello.
pub(super) async fn hello(connection: &Connection, own: MeshId) -> Result<HelloReply, ExchangeError> {
    within(async {
        let (send, recv) = connection.open_bi().await?;
        let mut talk = Talk { send, recv };
        talk.say(&Request::Hello(own)).await?;
        talk.hear().await
    })
    .await
}

/// Asks for what the peer has newer than `have`.
pub(super) async fn pull(connection: &Connection, have: Vec<Digest>) -> Result<Vec<Delta>, ExchangeError> {
    within(async {
        let (send, recv) = connection.open_bi().await?;
        let mut talk = Talk { send, recv };
        talk.say(&Request::Pull(have)).await?;
        talk.hear().await
    })
    .await
}

/// Compares with `peer` and evens out, at most `rounds` times; returns whether both hold the same at the end.
pub(super) async fn sync(
    connection: Connection,
    peer: NodeName,
    actor: mpsc::Sender<Input>,
    rounds: usize,
) -> Result<bool, ExchangeError> {
    for _ in 0..rounds {
        if within(sync_once(&connection, &peer, &actor)).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn sync_once(
    connection: &Connection,
    peer: &NodeName,
    actor: &mpsc::Sender<Input>,
) -> Result<bool, ExchangeError> {
    let (set_hash, farewells) = ask(actor, Input::Summary).await?;
    let (send, recv) = connection.open_bi().await?;
    let mut talk = Talk { send, recv };
    talk.say(&Request::Sync { set_hash, farewells }).await?;
    let SyncReply::Buckets(theirs) = talk.hear().await? else { return Ok(true) };
    let held: Held = ask(actor, |reply| Input::Differing(theirs, reply)).await?;
    talk.say(&held).await?;
    let trade: Trade = talk.hear().await?;
    let deltas = ask(actor, |reply| Input::Deliver(peer.clone(), trade, reply)).await?;
    talk.say(&deltas).await?;
    let _finished_before = talk.send.finish();
    // The peer ends the stream when it has applied them: the next round then sees the result.
    let _end = talk.recv.read_to_end(0).await;
    Ok(false)
}

/// Answers what `peer` asks on one stream.
pub(super) async fn serve(
    peer: NodeName,
    streams: (SendStream, RecvStream),
    actor: mpsc::Sender<Input>,
) -> Result<(), ExchangeError> {
    let mut talk = Talk { send: streams.0, recv: streams.1 };
    within(async {
        match talk.hear().await? {
            Request::Hello(id) => {
                let reply: HelloReply = ask(&actor, |reply| Input::Hello(peer, id, reply)).await?;
                talk.say(&reply).await?;
            }
            Request::Pull(have) => {
                let deltas: Vec<Delta> = ask(&actor, |reply| Input::Pull(have, reply)).await?;
                talk.say(&deltas).await?;
            }
            Request::Sync { set_hash, farewells } => {
                let reply = ask(&actor, |reply| Input::Sync(set_hash, farewells, reply)).await?;
                talk.say(&reply).await?;
                if let SyncReply::Buckets(_) = reply {
                    let held: Held = talk.hear().await?;
                    let trade = ask(&actor, |reply| Input::Compare(held, reply)).await?;
                    talk.say(&trade).await?;
                    let deltas = talk.hear().await?;
                    let trade = Trade { deltas, wanted: Vec::new() };
                    ask(&actor, |reply| Input::Deliver(peer, trade, reply)).await?;
                }
            }
        }
        let _finished_before = talk.send.finish();
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use quinn::{ClientConfig, Endpoint, ServerConfig};
    use tokio::task::JoinSet;

    use super::*;
    use crate::membership::MeshId;
    use crate::model::Generation;

    /// Two ends of one connection over loopback; the endpoints live as long as the pair.
    struct Pair {
        dialer: Connection,
        listener: Connection,
        _endpoints: [Endpoint; 2],
    }

    async fn pair() -> Pair {
        let made = rcgen::generate_simple_self_signed(vec!["peer".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let server = ServerConfig::with_single_cert(vec![certificate.clone()], key).unwrap();
        let listener = Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let client = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
        let dialer = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr().unwrap();
        let dial = async { dialer.connect_with(client, addr, "peer").unwrap().await.unwrap() };
        let accept = async { listener.accept().await.unwrap().await.unwrap() };
        let (dialled, accepted) = tokio::join!(dial, accept);
        Pair { dialer: dialled, listener: accepted, _endpoints: [dialer, listener] }
    }

    fn id() -> MeshId {
        MeshId::new("b".parse().unwrap(), "10.0.0.2:8301".parse().unwrap(), Generation::default())
    }

    /// Answers like an actor whose replica differs until `delivered` reaches 2: once on either side.
    async fn stand_in(mut inputs: mpsc::Receiver<Input>, delivered: Arc<AtomicUsize>) {
        while let Some(input) = inputs.recv().await {
            match input {
                Input::Summary(reply) => drop(reply.send((7, Vec::new()))),
                Input::Sync(7, _, reply) if delivered.load(Ordering::SeqCst) < 2 => {
                    drop(reply.send(SyncReply::Buckets(vec![1; 64])));
                }
                Input::Sync(_, _, reply) => drop(reply.send(SyncReply::Same)),
                Input::Differing(theirs, reply) => {
                    assert_eq!(theirs, vec![1; 64]);
                    drop(reply.send(Held { buckets: vec![3], digests: Vec::new() }));
                }
                Input::Compare(held, reply) => {
                    assert_eq!(held.buckets, [3]);
                    drop(reply.send(Trade::default()));
                }
                Input::Deliver(_, _, reply) => {
                    delivered.fetch_add(1, Ordering::SeqCst);
                    drop(reply.send(Vec::new()));
                }
                Input::Hello(peer, id, reply) => {
                    assert_eq!(peer, id.name);
                    drop(reply.send(HelloReply::Refused("not today".to_owned())));
                }
                Input::Pull(_, reply) => drop(reply.send(Vec::new())),
                Input::Packet(..) | Input::Unreadable(_) => panic!("no packets here"),
            }
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
                serve(id().name, streams, far.clone()).await.unwrap();
            }
        });
        let is_same = sync(pair.dialer.clone(), id().name, near, 3).await.unwrap();
        assert!(is_same);
        assert_eq!(delivered.load(Ordering::SeqCst), 2);
        let reply = hello(&pair.dialer, id()).await.unwrap();
        assert!(matches!(reply, HelloReply::Refused(reason) if reason == "not today"));
        assert!(pull(&pair.dialer, Vec::new()).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn garbage_and_oversized_requests_end_the_exchange_and_not_the_connection() {
        let pair = pair().await;
        let (actor, _inputs) = mpsc::channel(1);
        for frame in [&b"\x00\x00\x00\x03\x01\xff\xff"[..], b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"] {
            let (mut send, _recv) = pair.dialer.open_bi().await.unwrap();
            send.write_all(frame).await.unwrap();
            let streams = pair.listener.accept_bi().await.unwrap();
            let result = serve(id().name, streams, actor.clone()).await;
            assert!(matches!(result, Err(ExchangeError::Wire(_))), "{result:?}");
        }
        assert!(pair.listener.close_reason().is_none());
    }
}

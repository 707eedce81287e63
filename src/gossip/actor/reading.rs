//! What comes on a connection, and a packet that goes on a stream of its own.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use quinn::{Connection, ConnectionError};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tracing::{debug, error};

use super::Input;
use super::share::{PLACES, Share};
use crate::clock;
use crate::gossip::exchange::{self, Desks, ExchangeError};
use crate::gossip::metrics::GossipMetrics;
use crate::membership::PACKET_BYTES_MAX;
use crate::model::NodeName;
use crate::wire::{self, WireError};

/// Most streams of one peer that are served at once.
const STREAMS_PER_PEER_MAX: usize = 16;

/// Sends a packet that does not fit a datagram.
pub(super) async fn send_on_stream(connection: &Connection, packet: &[u8]) -> Result<(), ExchangeError> {
    let mut stream = connection.open_uni().await?;
    wire::write_frame(&mut stream, packet).await?;
    let _finished_before = stream.finish();
    Ok(())
}

/// What a reader of connections has.
#[derive(Debug, Clone)]
pub(super) struct Reader {
    pub(super) share: Arc<Share>,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) desks: Desks,
    pub(super) metrics: GossipMetrics,
}

/// Reads datagrams and streams of one connection until it ends, as far as the peer's share goes; returns why it ended.
pub(super) async fn read_connection(peer: NodeName, connection: Connection, reader: Reader) -> ConnectionError {
    let reason = reader.read_until_end(&peer, &connection).await;
    // What lies in its buffer came before: a goodbye may be among it.
    while let Some(place) = reader.share.try_place()
        && let Some(Ok(packet)) = connection.read_datagram().now_or_never()
    {
        reader.hand_over(&peer, packet, place);
    }
    reason
}

impl Reader {
    async fn read_until_end(&self, peer: &NodeName, connection: &Connection) -> ConnectionError {
        let mut streams = JoinSet::new();
        let mut read = 0_usize;
        loop {
            let has_room = streams.len() < STREAMS_PER_PEER_MAX;
            let datagram = async {
                let place = self.share.ready().await;
                (connection.read_datagram().await, place)
            };
            tokio::select! {
                (datagram, place) = datagram => {
                    match datagram {
                        Ok(packet) => self.hand_over(peer, packet, place),
                        Err(reason) => return reason,
                    }
                    read += 1;
                    if read.is_multiple_of(PLACES) {
                        // A buffer full of them is there without waiting: others have their turn.
                        tokio::task::yield_now().await;
                    }
                }
                // It ends where there is no place for a datagram as well.
                reason = connection.closed() => return reason,
                stream = connection.accept_uni(), if has_room => {
                    match stream {
                        Ok(stream) => drop(streams.spawn(read_packet(peer.clone(), stream, self.clone()))),
                        Err(reason) => return reason,
                    }
                }
                stream = connection.accept_bi(), if has_room => {
                    let stream = match stream {
                        Ok(stream) => stream,
                        Err(reason) => return reason,
                    };
                    let (peer, inputs, desks) = (peer.clone(), self.inputs.clone(), self.desks.clone());
                    streams.spawn(async move {
                        if let Err(error) = exchange::serve(peer.clone(), stream, inputs, desks).await {
                            debug!(%peer, error = error.explain(None), "exchange failed");
                        }
                    });
                }
                Some(ended) = streams.join_next() => {
                    if let Err(error) = ended {
                        error!(%peer, %error, "stream task failed");
                    }
                }
            }
        }
    }

    fn hand_over(&self, peer: &NodeName, packet: Bytes, place: OwnedSemaphorePermit) {
        self.share.took(clock::now());
        if self.inputs.try_send(Input::Packet { from: peer.clone(), packet, place }).is_err() {
            self.metrics.dropped.with_label_values(&["queue_full"]).inc();
        }
    }
}

/// Reads one packet that did not fit a datagram.
async fn read_packet(from: NodeName, mut stream: quinn::RecvStream, reader: Reader) {
    let read = tokio::time::timeout(exchange::TIME_MAX, wire::read_frame(&mut stream, PACKET_BYTES_MAX));
    let input = match read.await {
        Ok(Ok(packet)) => {
            let place = reader.share.ready().await;
            reader.share.took(clock::now());
            Input::Packet { from, packet: packet.into(), place }
        }
        Ok(Err(WireError::TooLarge { .. })) => Input::Unreadable { from, reason: "too_large" },
        Ok(Err(_)) | Err(_) => Input::Unreadable { from, reason: "malformed" },
    };
    // The actor is gone only when the agent stops.
    let _stopping = reader.inputs.send(input).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gossip::actor::fixture::wait;
    use crate::gossip::actor::share::Shares;
    use crate::gossip::{documents, shared};
    use crate::metrics::Metrics;
    use crate::transport::fixture::pair;

    /// What reads a connection of `peer` alone, and where that arrives.
    fn reader_of(peer: &NodeName) -> (Reader, mpsc::Receiver<Input>) {
        let (inputs, queue) = mpsc::channel(4 * PLACES);
        let metrics = GossipMetrics::new(&Metrics::new()).unwrap();
        let desks = Desks { documents: documents::queue().0, shared: shared::queue().0 };
        (Reader { share: Shares::default().of(peer, clock::now()), inputs, desks, metrics }, queue)
    }

    #[tokio::test]
    async fn a_peer_that_floods_fills_its_share_of_the_queue_and_another_s_packet_finds_its_place() {
        let (flooding, quiet) = (pair().await, pair().await);
        let [insider, other] = ["insider", "other"].map(|name| name.parse::<NodeName>().unwrap());
        let (inputs, mut queue) = mpsc::channel(4 * PLACES);
        let metrics = GossipMetrics::new(&Metrics::new()).unwrap();
        let (mut shares, mut readers) = (Shares::default(), JoinSet::new());
        for (peer, pair) in [(&insider, &flooding), (&insider, &flooding), (&other, &quiet)] {
            let desks = Desks { documents: documents::queue().0, shared: shared::queue().0 };
            let (share, inputs, metrics) = (shares.of(peer, clock::now()), inputs.clone(), metrics.clone());
            let reader = Reader { share, inputs, desks, metrics };
            readers.spawn(read_connection(peer.clone(), pair.listener.clone(), reader));
        }
        for _ in 0..2_000 {
            flooding.dialer.send_datagram_wait(vec![1, 2].into()).await.unwrap();
        }
        let received = || flooding.listener.stats().frame_rx.datagram;
        wait(|| queue.len() == PLACES && received() > 512).await;
        quiet.dialer.send_datagram(vec![3].into()).unwrap();
        wait(|| queue.len() > PLACES).await;
        let waiting: Vec<Input> = std::iter::from_fn(|| queue.try_recv().ok()).collect();
        let of = |peer: &NodeName| {
            waiting.iter().filter(|input| matches!(input, Input::Packet { from, .. } if from == peer)).count()
        };
        assert_eq!((of(&insider), of(&other), waiting.len()), (PLACES, 1, PLACES + 1));
        assert_eq!(metrics.dropped.with_label_values(&["queue_full"]).get(), 0);
        // They are acted upon, and the next ones come.
        drop(waiting);
        wait(|| queue.len() == PLACES).await;
    }

    #[tokio::test]
    async fn a_peer_s_streams_are_served_so_many_at_once_and_the_next_when_one_ends() {
        let pair = pair().await;
        let peer: NodeName = "insider".parse().unwrap();
        let (reader, mut queue) = reader_of(&peer);
        let (mut tasks, listener) = (JoinSet::new(), pair.listener.clone());
        tasks.spawn(async move { drop(read_connection(peer, listener, reader).await) });
        // Packets that begin and do not end.
        let mut begun = Vec::new();
        for _ in 0..STREAMS_PER_PEER_MAX {
            let mut stream = pair.dialer.open_uni().await.unwrap();
            stream.write_all(&[0]).await.unwrap();
            begun.push(stream);
        }
        send_on_stream(&pair.dialer, &[1, 2]).await.unwrap();
        wait(|| pair.listener.stats().frame_rx.stream > STREAMS_PER_PEER_MAX as u64).await;
        // Each of them is a turn in which a stream would be taken as well.
        for _ in 0..50 {
            pair.dialer.send_datagram(vec![3].into()).unwrap();
            let input = queue.recv().await;
            assert!(matches!(&input, Some(Input::Packet { packet, .. }) if **packet == [3]), "{input:?}");
        }
        begun.remove(0).reset(0_u32.into()).unwrap();
        let ended = queue.recv().await;
        assert!(matches!(ended, Some(Input::Unreadable { .. })), "{ended:?}");
        let next = queue.recv().await;
        assert!(matches!(&next, Some(Input::Packet { packet, .. }) if **packet == [1, 2]), "{next:?}");
    }

    #[tokio::test]
    async fn a_peer_is_read_at_its_pace_by_datagrams_and_by_streams() {
        for is_datagram in [true, false] {
            let pair = pair().await;
            let peer: NodeName = "insider".parse().unwrap();
            let (reader, mut queue) = reader_of(&peer);
            let (mut tasks, listener, begun) = (JoinSet::new(), pair.listener.clone(), clock::now());
            tasks.spawn(async move { drop(read_connection(peer, listener, reader).await) });
            let dialer = pair.dialer.clone();
            tasks.spawn(async move {
                // Until the test ends the connection.
                while dialer.close_reason().is_none() {
                    let _ended = if is_datagram {
                        dialer.send_datagram_wait(vec![1, 2].into()).await.is_err()
                    } else {
                        send_on_stream(&dialer, &[1, 2]).await.is_err()
                    };
                }
            });
            // A burst of 512, and then one in 2 ms.
            for _ in 0..512 + 200 {
                let input = tokio::time::timeout(std::time::Duration::from_secs(20), queue.recv()).await;
                assert!(matches!(input, Ok(Some(Input::Packet { .. }))), "{input:?}");
            }
            // As many as there are places for streams may go ahead of their time.
            assert!(begun.elapsed() >= std::time::Duration::from_millis(340), "{:?}", begun.elapsed());
            tasks.shutdown().await;
        }
    }
}

//! What comes on a connection, and a packet that goes on a stream of its own.

use quinn::Connection;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, error};

use super::Input;
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

/// Reads datagrams and streams of one connection until it ends.
pub(super) async fn read_connection(
    peer: NodeName,
    connection: Connection,
    inputs: mpsc::Sender<Input>,
    desks: Desks,
    metrics: GossipMetrics,
) {
    let mut streams = JoinSet::new();
    loop {
        let has_room = streams.len() < STREAMS_PER_PEER_MAX;
        tokio::select! {
            datagram = connection.read_datagram() => {
                let Ok(packet) = datagram else { return };
                if inputs.try_send(Input::Packet(peer.clone(), packet)).is_err() {
                    metrics.dropped.with_label_values(&["queue_full"]).inc();
                }
            }
            stream = connection.accept_uni(), if has_room => {
                let Ok(stream) = stream else { return };
                streams.spawn(read_packet(peer.clone(), stream, inputs.clone()));
            }
            stream = connection.accept_bi(), if has_room => {
                let Ok(stream) = stream else { return };
                let (peer, inputs, desks) = (peer.clone(), inputs.clone(), desks.clone());
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

/// Reads one packet that did not fit a datagram.
async fn read_packet(peer: NodeName, mut stream: quinn::RecvStream, inputs: mpsc::Sender<Input>) {
    let read = tokio::time::timeout(exchange::TIME_MAX, wire::read_frame(&mut stream, PACKET_BYTES_MAX));
    let input = match read.await {
        Ok(Ok(packet)) => Input::Packet(peer, packet.into()),
        Ok(Err(WireError::TooLarge { .. })) => Input::Unreadable("too_large"),
        Ok(Err(_)) | Err(_) => Input::Unreadable("malformed"),
    };
    // The actor is gone only when the agent stops.
    let _stopping = inputs.send(input).await;
}

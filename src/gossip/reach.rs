//! A connection to a member for streams: the one that is open, or one that gossip dials among its own.

use quinn::Connection;
use tokio::sync::{mpsc, oneshot};

use super::Command;
use super::exchange::ExchangeError;
use crate::model::NodeName;

/// Asks gossip for a connection to `peer`.
///
/// # Cancel safety
/// Cancelling forgets the answer; the dial goes on.
pub(super) async fn reach(gossip: mpsc::Sender<Command>, peer: NodeName) -> Result<Connection, ExchangeError> {
    let (reply, answer) = oneshot::channel();
    gossip.send(Command::Reach(peer, reply)).await.map_err(|_| ExchangeError::Closed)?;
    answer.await.map_err(|_| ExchangeError::Closed)?.map_err(ExchangeError::Unreachable)
}

//! A connection to a member: the one that is open, or a new one.

use quinn::Connection;
use tokio::sync::{mpsc, oneshot};

use super::exchange::ExchangeError;
use super::{Command, MemberView};
use crate::transport::ControlTransport;

/// Finds the open connection to `peer`, or dials one and hands it to gossip.
pub(super) async fn reach(
    gossip: mpsc::Sender<Command>,
    transport: ControlTransport,
    peer: MemberView,
) -> Result<Connection, ExchangeError> {
    let (reply, answer) = oneshot::channel();
    gossip.send(Command::Link(peer.name.clone(), reply)).await.map_err(|_| ExchangeError::Closed)?;
    if let Some(connection) = answer.await.map_err(|_| ExchangeError::Closed)? {
        return Ok(connection);
    }
    let dialled = transport.connect(peer.addr, Some(peer.name.clone())).await;
    let (connection, _) = dialled.map_err(|error| ExchangeError::Unreachable(error.to_string()))?;
    let adopt = Command::Adopt { peer: peer.name, addr: peer.addr, connection: connection.clone() };
    gossip.send(adopt).await.map_err(|_| ExchangeError::Closed)?;
    Ok(connection)
}

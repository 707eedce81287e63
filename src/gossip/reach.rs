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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::fixture::pair;

    type Reply = oneshot::Sender<Result<Connection, String>>;

    /// What becomes of a request that gossip answers so.
    async fn reached(answer: impl FnOnce(Reply)) -> Result<Connection, ExchangeError> {
        let (gossip, mut commands) = mpsc::channel(1);
        let told = async {
            let Some(Command::Reach(peer, reply)) = commands.recv().await else { panic!("it asks for a connection") };
            assert_eq!(peer.as_str(), "n1");
            answer(reply);
        };
        tokio::join!(reach(gossip, "n1".parse().unwrap()), told).0
    }

    #[tokio::test]
    async fn gossip_gives_a_connection_or_the_reason_why_there_is_none() {
        let pair = pair().await;
        let given = pair.dialer.clone();
        let connection = reached(|reply| reply.send(Ok(given)).unwrap()).await.unwrap();
        assert_eq!(connection.stable_id(), pair.dialer.stable_id());
        let refused = reached(|reply| reply.send(Err("it is no member any more".to_owned())).unwrap()).await;
        assert!(matches!(&refused, Err(ExchangeError::Unreachable(why)) if why == "it is no member any more"));
    }

    #[tokio::test]
    async fn who_asks_while_the_agent_stops_is_not_left_waiting() {
        assert!(matches!(reached(drop).await, Err(ExchangeError::Closed)), "gossip ends with the request in hand");
        let (gossip, commands) = mpsc::channel(1);
        drop(commands);
        assert!(matches!(reach(gossip, "n1".parse().unwrap()).await, Err(ExchangeError::Closed)), "it has ended");
    }
}

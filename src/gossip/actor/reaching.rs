//! Who waits for a connection to a member, to open streams on it: the carriers of documents and shared records.
//!
//! They have no dials of their own: one dial for each peer, whoever wants it, within the bounds of [`Links`](super::Links).

use std::collections::BTreeMap;

use quinn::Connection;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Actor, answer};
use crate::gossip::links::Purpose;
use crate::model::NodeName;

/// Gets the connection, or why there is none.
pub(in crate::gossip) type ReachReply = oneshot::Sender<Result<Connection, String>>;

/// Who waits, by member: as many as the carriers have pushes and comparisons under way, each of which gives up by itself.
#[derive(Debug, Default)]
pub(super) struct Reaching(BTreeMap<NodeName, Vec<ReachReply>>);

impl Actor {
    /// Answers with a connection to `peer`, at once if there is one, or when a dial has ended.
    pub(super) fn reach(&mut self, peer: NodeName, reply: ReachReply, now: Instant) {
        if let Some(connection) = self.links.open(&peer) {
            return answer(reply, Ok(connection.clone()));
        }
        let Some(id) = self.engine.membership().member(&peer).map(|member| member.id.clone()) else {
            return answer(reply, Err("it is no member any more".to_owned()));
        };
        if !self.links.want(&id, Purpose::Streams, now) {
            return answer(reply, Err("it was dialled in vain a moment ago".to_owned()));
        }
        self.reaching.0.retain(|_, waiting| {
            waiting.retain(|reply| !reply.is_closed());
            !waiting.is_empty()
        });
        self.reaching.0.entry(peer).or_default().push(reply);
        self.dial_next();
    }

    /// Tells whether anybody waits for a connection to `peer`.
    pub(super) fn is_reached_for(&self, peer: &NodeName) -> bool {
        self.reaching.0.contains_key(peer)
    }

    /// Gives the connection that there is to those who wait for one to `peer`.
    pub(super) fn reached(&mut self, peer: &NodeName) {
        let Some(waiting) = self.reaching.0.remove(peer) else { return };
        let connection = self.links.open(peer).cloned().ok_or_else(|| "the connection ended at once".to_owned());
        for reply in waiting {
            answer(reply, connection.clone());
        }
    }

    /// Tells those who wait for a connection to `peer` that none comes.
    pub(super) fn not_reached(&mut self, peer: &NodeName, reason: &str) {
        if self.links.open(peer).is_none()
            && let Some(waiting) = self.reaching.0.remove(peer)
        {
            for reply in waiting {
                answer(reply, Err(reason.to_owned()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::gossip::actor::fixture::Lone;

    #[tokio::test]
    async fn who_gave_up_waiting_is_not_kept_and_who_waits_is() {
        let mut lone = Lone::new();
        let [far, other] = ["far", "other"].map(|name| lone.peer(name).id.name);
        let now = clock::now();
        for _ in 0..100 {
            let (reply, given_up) = oneshot::channel();
            drop(given_up);
            lone.actor.reach(far.clone(), reply, now);
        }
        let (reply, _waits) = oneshot::channel();
        lone.actor.reach(other.clone(), reply, now);
        let (reply, _waits_too) = oneshot::channel();
        lone.actor.reach(other.clone(), reply, now);
        let kept: Vec<_> = lone.actor.reaching.0.iter().map(|(peer, waiting)| (peer.clone(), waiting.len())).collect();
        assert_eq!(kept, [(other, 2)]);
    }
}

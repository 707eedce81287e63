//! Connections to peers: what opens one, what leaves on it, what its end means.
//!
//! ```text
//!   accepted, joined, dialled -> watch (a reader each) -> links -> who waits: packets, carriers
//!   send -> links -> datagram | stream | dial -> dial_ended, superseded
//! ```
//!
//! Not here: which connection is used, and what is dialled next (`links`); what is read (`reading`).

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, ConnectionError};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::reading::{Reader, read_connection, send_on_stream};
use super::{Actor, Done};
use crate::clock;
use crate::gossip::exchange;
use crate::gossip::links::{Dial, Purpose, Sent};
use crate::gossip::targets::{self, DialError};
use crate::membership::MeshId;
use crate::model::{NodeName, SpiffeId};
use crate::supervise::catch;
use crate::transport::Accepted;

/// Most packets under way on streams at once.
const STREAM_SENDS_MAX: usize = 256;

/// A connection that is over.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) peer: NodeName,
    /// The peer's life that was known when it was opened, or an earlier one.
    pub(super) life: Option<MeshId>,
    pub(super) stable_id: usize,
    pub(super) round_trip: Duration,
    /// None: its reader panicked.
    pub(super) reason: Option<ConnectionError>,
}

impl Actor {
    pub(super) fn accepted(&mut self, accepted: Accepted, now: Instant) {
        let Some(peer) = accepted.peer else {
            accepted.connection.close(0u32.into(), b"not a gossip connection");
            return;
        };
        if !matches!(peer.id, SpiffeId::Node { .. }) {
            self.service_spoke(&peer.id);
            accepted.connection.close(0u32.into(), b"not a node's certificate");
            return;
        }
        if peer.node == self.engine.node().name {
            self.twin_connected(accepted.connection.remote_address());
            accepted.connection.close(0u32.into(), b"own name");
            return;
        }
        let id = self.engine.membership().member(&peer.node).map(|member| member.id.clone());
        self.watch(&peer.node, id.clone(), accepted.connection.clone());
        let waiting = self.links.accepted(&self.engine.membership().id().name, &peer.node, accepted.connection);
        if let Some(id) = id {
            self.resend(&id, waiting, now);
        }
        self.reached(&peer.node);
    }

    /// Reads everything that comes on `connection`, of `peer` in its `life`, as far as that is known.
    pub(super) fn watch(&mut self, peer: &NodeName, life: Option<MeshId>, connection: Connection) {
        let reader = Reader {
            share: self.shares.of(peer, clock::now()),
            inputs: self.inputs_sender.clone(),
            desks: self.desks.clone(),
            metrics: self.metrics.clone(),
        };
        let peer = peer.clone();
        self.work.spawn(async move {
            // What is left of it goes with its end.
            let reading = read_connection(peer.clone(), connection.clone(), reader);
            let reason = catch("connection", reading).await;
            if reason.is_none() {
                // The peer must not go on with one that nobody reads.
                connection.close(0u32.into(), b"its reader failed");
            }
            let (stable_id, round_trip) = (connection.stable_id(), connection.rtt());
            Done::ConnectionEnded(Ended { peer, life, stable_id, round_trip, reason })
        });
    }

    /// A connection has ended. One that its peer's process has forgotten says that this process is another.
    pub(super) fn connection_ended(&mut self, ended: &Ended, now: Instant) {
        self.links.ended(&ended.peer, ended.stable_id);
        if let (Some(life), Some(ConnectionError::Reset)) = (&ended.life, &ended.reason) {
            self.reset_heard(life, ended.round_trip, now);
        }
    }

    /// A packet of `peer`'s cannot be read. One that goes on so is shown the door: each costs a look.
    pub(super) fn unreadable(&mut self, peer: &NodeName) {
        let now = clock::now();
        if !self.shares.is_unreadable(peer, now) {
            return;
        }
        let reason = "too many packets that cannot be read";
        self.links.close(peer, reason);
        self.not_reached(peer, reason);
        if let Some(left_out) = self.told.unreadable.due(now) {
            warn!(%peer, left_out, "peer sends packets that cannot be read, another version or a stolen key; its connections are closed");
        }
    }

    pub(super) fn resend(&mut self, to: &MeshId, packets: Vec<Bytes>, now: Instant) {
        for packet in packets {
            self.send(to, packet, now);
        }
    }

    pub(super) fn send(&mut self, to: &MeshId, packet: Bytes, now: Instant) {
        let bytes = packet.len() as u64;
        match self.links.send(to, packet, now) {
            Sent::Datagram => {
                self.metrics.sent_datagram.inc();
                self.metrics.sent_bytes.inc_by(bytes);
            }
            Sent::Stream(connection, packet) if self.stream_sends < STREAM_SENDS_MAX => {
                self.stream_sends += 1;
                self.metrics.sent_stream.inc();
                self.metrics.sent_bytes.inc_by(bytes);
                self.work.spawn(async move {
                    // A packet may be lost, on a stream as well.
                    let sending = tokio::time::timeout(exchange::TIME_MAX, send_on_stream(&connection, &packet));
                    let _lost = catch("packet", sending).await;
                    Done::PacketSent
                });
            }
            Sent::Stream(..) => self.metrics.dropped.with_label_values(&["streams"]).inc(),
            Sent::Queued => {}
            Sent::Dial(dial) => self.dial(dial),
            Sent::Dropped(reason) => self.metrics.dropped.with_label_values(&[reason]).inc(),
        }
    }

    /// Returns the round trips that are known. Members that no connection leads to are dialled, as far as there is room, so
    /// that whoever asks again knows more.
    pub(super) fn round_trips(&mut self, now: Instant) -> BTreeMap<NodeName, Duration> {
        if !self.links.is_full() {
            self.engine.membership().alive().for_each(|id| self.links.acquaint(id, now));
            self.dial_next();
        }
        self.links.round_trips()
    }

    pub(super) fn dial_next(&mut self) {
        while let Some(dial) = self.links.next_dial() {
            self.dial(dial);
        }
    }

    fn dial(&mut self, Dial { to, purpose, is_superseded }: Dial) {
        let transport = self.transport.clone();
        self.work.spawn(async move {
            let dial = targets::dial(&transport, to.addr, Some(to.name.clone()));
            match catch("dial", is_superseded.run_until_cancelled(dial)).await {
                Some(Some(dialled)) => Done::Dialled(to, purpose, dialled.map(|(connection, _)| connection)),
                Some(None) => Done::Superseded(to.name, purpose),
                None => Done::Dialled(to, purpose, Err(DialError::Failed("the dial failed in itself".to_owned()))),
            }
        });
    }

    /// A dial was given up because the peer's own connection came first. If that one has ended since, whoever has waited from
    /// then on is told of no dial: there is another one, or none comes.
    pub(super) fn superseded(&mut self, peer: &NodeName, purpose: Purpose, now: Instant) {
        self.links.dial_ended(peer, purpose);
        let is_awaited = self.links.has_waiting(peer) || self.is_reached_for(peer);
        if self.links.open(peer).is_none() && is_awaited {
            let id = self.engine.membership().member(peer).map(|member| member.id.clone());
            if id.is_none_or(|id| !self.links.want(&id, purpose, now)) {
                self.not_reached(peer, "the peer's connection ended at once");
            }
        }
        self.dial_next();
    }

    /// A dial has brought a connection, or the reason why there is none.
    pub(super) fn dial_ended(
        &mut self,
        to: &MeshId,
        purpose: Purpose,
        dialled: Result<Connection, DialError>,
        now: Instant,
    ) {
        match dialled {
            Ok(connection) => {
                self.metrics.dials.with_label_values(&["ok"]).inc();
                self.watch(&to.name, Some(to.clone()), connection.clone());
                let waiting = self.links.dialled(to, purpose, connection);
                self.resend(to, waiting, now);
                self.reached(&to.name);
            }
            Err(error) => {
                if matches!(error, DialError::Refused(_)) {
                    self.port_refused(to, now);
                }
                let reason = error.text();
                debug!(peer = %to.name, reason, "dial failed");
                self.metrics.dials.with_label_values(&["failed"]).inc();
                let lost = self.links.dial_failed(&to.name, purpose, now);
                self.not_reached(&to.name, &reason);
                self.metrics.dropped.with_label_values(&["no_link"]).inc_by(lost as u64);
            }
        }
        self.dial_next();
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::gossip::actor::fixture::Lone;
    use crate::gossip::actor::{Input, share};

    #[tokio::test]
    async fn who_waits_for_a_dial_that_gave_way_to_a_connection_that_has_ended_gets_another() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let name = far.id.name.clone();
        assert!(name < lone.actor.engine.node().name, "this side's dial gives way");
        // A dial runs, which nobody answers, and the peer's own connection comes.
        let (first, given) = oneshot::channel();
        lone.actor.reach(name.clone(), first, clock::now());
        let theirs = lone.is_dialled_by(&far).await;
        given.await.unwrap().unwrap();
        // That one ends before the actor hears of the end of its dial.
        theirs.close(0u32.into(), b"test");
        let (mut has_ended, mut superseded) = (false, None);
        while !has_ended || superseded.is_none() {
            match lone.actor.work.join_next().await.unwrap().unwrap() {
                done @ Done::ConnectionEnded(_) => {
                    has_ended = true;
                    lone.actor.done(done, clock::now());
                }
                Done::Superseded(peer, purpose) => superseded = Some((peer, purpose)),
                done => panic!("{done:?}"),
            }
        }
        let (second, given) = oneshot::channel();
        lone.actor.reach(name.clone(), second, clock::now());
        let (peer, purpose) = superseded.unwrap();
        lone.actor.superseded(&peer, purpose, clock::now());
        let accepted = async { tokio::join!(given, far.transport.accept()) };
        let (given, _accepted) = lone.run(accepted).await;
        assert!(given.unwrap().unwrap().close_reason().is_none());
        // Where no dial may begin, they are told so.
        let now = clock::now();
        lone.actor.links.close(&name, "test");
        let (third, given) = oneshot::channel();
        lone.actor.reach(name.clone(), third, now);
        lone.actor.links.dial_failed(&name, Purpose::Streams, now);
        lone.actor.superseded(&name, Purpose::Streams, now);
        assert!(given.await.unwrap().unwrap_err().contains("ended at once"));
    }

    #[tokio::test]
    async fn one_of_the_own_name_is_counted_and_let_go() {
        let mut lone = Lone::new();
        let twin = lone.restarted("own", std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let transport = lone.actor.transport.clone();
        let (dialled, accepted) = tokio::join!(twin.connect(lone.addr, None), transport.accept());
        lone.actor.accepted(accepted.unwrap(), clock::now());
        assert_eq!(lone.actor.metrics.conflicts.get(), 1);
        assert!(lone.actor.links.open(&"own".parse().unwrap()).is_none());
        let (connection, _) = dialled.unwrap();
        let reason = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await.unwrap().to_string();
        assert!(reason.contains("own name"), "{reason}");
    }

    #[tokio::test]
    async fn a_service_s_certificate_does_not_speak_for_its_node() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let transport = lone.actor.transport.clone();
        let (dialled, accepted) = tokio::join!(far.transport.connect(lone.addr, None), transport.accept());
        let mut accepted = accepted.unwrap();
        accepted.peer.as_mut().unwrap().id = "spiffe://test.example/svc/web/node/far".parse().unwrap();
        lone.actor.accepted(accepted, clock::now());
        assert!(lone.actor.links.open(&far.id.name).is_none());
        let (connection, _) = dialled.unwrap();
        let reason = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await.unwrap().to_string();
        assert!(reason.contains("not a node's certificate"), "{reason}");
    }

    #[tokio::test]
    async fn a_peer_that_goes_on_sending_what_nobody_can_read_loses_its_connections() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let theirs = lone.is_dialled_by(&far).await;
        let ours = lone.actor.links.open(&far.id.name).unwrap().clone();
        let junk = |lone: &mut Lone| {
            let places = std::sync::Arc::new(tokio::sync::Semaphore::new(1));
            let place = places.try_acquire_owned().unwrap();
            let packet = Input::Packet { from: far.id.name.clone(), packet: Bytes::from_static(&[7, 7]), place };
            lone.actor.input(packet, clock::now());
            lone.actor.settle(clock::now());
        };
        (0..share::PATIENCE).for_each(|_| junk(&mut lone));
        assert!(ours.close_reason().is_none(), "another version may be at work");
        junk(&mut lone);
        let reason = tokio::time::timeout(Duration::from_secs(20), theirs.closed()).await.unwrap().to_string();
        assert!(reason.contains("cannot be read"), "{reason}");
        assert!(lone.actor.links.open(&far.id.name).is_none());
    }
}

//! What sockets tell of peers beside SWIM: closed ports, and whether the holder of a name answers.
//!
//! ```text
//!   next two members on the ring -> a watch each: two bytes each beat (550 ms) -> refused -> the engine, at once
//!   a dial that is refused --------------------------------------------^
//!   others met a refusal -> the port is asked once, by who looks closer --^
//!   a packet of QUIC's is refused -> hint: the member is asked -> silent for 150 ms -----^
//!   packets that QUIC acknowledges, and what comes on tunnels -> signs of life, before each verdict
//! ```
//!
//! A process that dies closes its port, and its host says so: two watchers per member see that within a watch period,
//! in a mesh of any size, for 110 B/s. Everything else (a host without power, a firewall that drops) is SWIM's to find.
//!
//! A hint may be forged by whoever can forge a source address, so it counts only with silence.
//!
//! Not here: the sockets (`transport::port`, `transport::refusals`), what follows from a refusal (`membership`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::Connection;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::info;

use super::beat::Rhythm;
use super::{Actor, Done, Incumbent, Message, Step, answer};
use crate::gossip::targets::{self, DialError};
use crate::membership::MeshId;
use crate::model::NodeName;
use crate::supervise::catch;

/// How long a member whose host is said to refuse may take to show that it lives, beside twice the round trip.
const LIFE_SHOWS_IN: Duration = Duration::from_millis(150);
/// Most ports that are asked at once on others' word: as many members as may fail together in a rack. Past it the
/// membership's own checks tell.
const QUESTIONS_MAX: usize = 64;
/// Most holders of names that are asked at once; a newcomer past it is judged by what is known.
const CHALLENGES_MAX: usize = 8;
/// How long the holder of a name may take to answer: a handshake on a slow path.
const CHALLENGE_TIME_MAX: Duration = Duration::from_millis(400);

/// A newcomer that waits for the answer to its hello.
#[derive(Debug)]
pub(super) struct Challenge {
    pub(super) peer: NodeName,
    pub(super) id: MeshId,
    pub(super) reply: oneshot::Sender<Step>,
}

/// What the address of a name's holder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// It proved its name there.
    Answers,
    /// Its host says that nobody has the port.
    Refuses,
    /// Nothing in time, or it could not prove its name.
    Silent,
}

impl Holder {
    /// Decides whether the name of a member that counts as alive is free. Silence frees none: the holder's machine, or this
    /// one, may be loaded or stopped for a moment, and whether it lives is the membership's verdict, a few seconds away.
    fn judge(self) -> Incumbent {
        match self {
            Self::Answers | Self::Silent => Incumbent::Answers,
            Self::Refuses => Incumbent::Silent,
        }
    }
}

/// The watches that run: as many as the membership watches, two.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<MeshId, AbortHandle>);

impl Actor {
    /// Watches the ports of the next members by name, at each beat.
    pub(super) fn watch_successors(&mut self, now: Instant) {
        let membership = self.engine.membership();
        let wanted = membership.watched();
        let rhythm = Rhythm::of(membership.ring_rank(), self.engine.generation().nonce);
        self.beat.set(rhythm, !wanted.is_empty(), now);
        self.watches.0.retain(|id, watch| {
            let is_kept = wanted.contains(id) && !watch.is_finished();
            if !is_kept {
                watch.abort();
            }
            is_kept
        });
        for id in wanted {
            if self.watches.0.contains_key(&id) {
                continue;
            }
            let (transport, watched, asks) = (self.transport.clone(), id.clone(), self.beat.asks());
            let watch = self.work.spawn(async move {
                transport.port_refused(watched.addr, asks).await;
                Done::PortRefused(watched)
            });
            self.watches.0.insert(id, watch);
        }
    }

    /// Asks the ports that are watched, and lets the engine check a member in the same wake-up, if the beat is due.
    pub(super) fn keep_beat(&mut self, now: Instant) {
        let Some(at) = self.beat.at().filter(|at| *at <= now) else { return };
        self.beat.strike(now);
        self.turn(now, |engine, turn| engine.beat(now.saturating_duration_since(at), turn));
    }

    /// Tells the engine from which of `peers` something has come, be it an acknowledgement or a tunnel's datagram.
    pub(super) fn tell_signs_of_life(&mut self, peers: impl IntoIterator<Item = NodeName>, now: Instant) {
        let tunnels = |peer: &NodeName| self.tunnels.received_from(peer);
        for (peer, came_at) in self.links.signs_of_life(peers, tunnels, now) {
            self.turn(now, |engine, turn| engine.evidence_alive(&peer, came_at, turn));
        }
    }

    /// The host of `id` says that nobody has its port.
    pub(super) fn port_refused(&mut self, id: &MeshId, now: Instant) {
        if let Some(watch) = self.watches.0.remove(id) {
            watch.abort();
        }
        // Those that are gone are called for days, and refuse every time.
        if self.engine.membership().alive().any(|alive| alive == id) {
            info!(member = %id.name, addr = %id.addr, "the member's host says that its port is closed");
            self.metrics.ports_refused.inc();
            self.turn(now, |engine, turn| engine.evidence_crashed(&id.name, turn));
        }
    }

    /// The host at `addr` is said to refuse a packet of QUIC's: whoever lives there is asked.
    pub(super) fn refusal_heard(&mut self, addr: SocketAddr, now: Instant) {
        let Some(id) = self.engine.membership().alive().find(|id| id.addr == addr).cloned() else { return };
        if self.doubted.len() >= QUESTIONS_MAX || !self.doubted.insert(id.clone()) {
            return;
        }
        // What it acknowledged before is no answer: it is dated before this look, and what comes from here on at this look.
        self.tell_signs_of_life([id.name.clone()], now);
        self.turn(now, |engine, turn| engine.question(&id.name, turn));
        let round_trip = self.links.open(&id.name).map(Connection::rtt).unwrap_or_default();
        let until = now + LIFE_SHOWS_IN + 2 * round_trip;
        self.work.spawn(async move {
            tokio::time::sleep_until(until).await;
            Done::PortDoubted { id, since: now }
        });
    }

    /// The member has had its time to answer.
    pub(super) fn port_doubted(&mut self, id: &MeshId, since: Instant, now: Instant) {
        self.doubted.remove(id);
        self.drain_inputs(now);
        self.tell_signs_of_life([id.name.clone()], now);
        let answered = self.engine.membership().answered_at(&id.name);
        if answered.is_none_or(|at| at < since) {
            self.port_refused(id, now);
        } else {
            self.metrics.refusals_answered.inc();
        }
    }

    /// Asks whether the host of `id` refuses its port: others say so.
    pub(super) fn ask_port(&mut self, id: MeshId) {
        if self.asked.len() >= QUESTIONS_MAX || !self.asked.insert(id.clone()) {
            return;
        }
        let transport = self.transport.clone();
        self.work.spawn(async move {
            let is_refused = catch("question", transport.is_port_refused(id.addr)).await.unwrap_or(false);
            Done::PortAsked(id, is_refused)
        });
    }

    /// The host of `id` was asked.
    pub(super) fn port_asked(&mut self, id: &MeshId, is_refused: bool, now: Instant) {
        self.asked.remove(id);
        if is_refused {
            self.port_refused(id, now);
        }
    }

    /// Answers a hello; where its name lives elsewhere, the holder is asked first: by a handshake, which proves its name, and
    /// over the connection that it may have, which takes it less.
    pub(super) fn greeted(&mut self, challenge: Challenge, now: Instant) {
        let incumbent = self.engine.incumbent(&challenge.peer, &challenge.id).cloned();
        let Some(incumbent) = incumbent.filter(|_| self.challenges < CHALLENGES_MAX) else {
            return self.welcome(challenge, Incumbent::Unasked);
        };
        self.challenges += 1;
        self.turn(now, |engine, turn| engine.question(&incumbent.name, turn));
        let transport = self.transport.clone();
        self.work.spawn(async move {
            let dial = targets::dial(&transport, incumbent.addr, Some(incumbent.name));
            let holder = match catch("challenge", tokio::time::timeout(CHALLENGE_TIME_MAX, dial)).await {
                Some(Ok(Ok((connection, _)))) => {
                    connection.close(0u32.into(), b"asked whether you live");
                    Holder::Answers
                }
                Some(Ok(Err(DialError::Refused(_)))) => Holder::Refuses,
                Some(Ok(Err(DialError::Failed(_))) | Err(_)) | None => Holder::Silent,
            };
            Done::Challenged(challenge, holder)
        });
    }

    /// The holder of a name was asked.
    pub(super) fn challenged(&mut self, challenge: Challenge, holder: Holder, now: Instant) {
        self.challenges -= 1;
        self.drain_inputs(now);
        self.tell_signs_of_life([challenge.id.name.clone()], now);
        self.welcome(challenge, holder.judge());
    }

    fn welcome(&mut self, challenge: Challenge, incumbent: Incumbent) {
        let Challenge { peer, id, reply } = challenge;
        let hello = self.engine.hello(&peer, &id, incumbent);
        answer(reply, Step::Last(Message::Hello(hello)));
    }

    /// The goodbye was heard, or has had its time.
    pub(super) fn goodbye_over(&mut self) {
        self.is_goodbye_over = true;
        self.leaving.drain(..).for_each(|reply| answer(reply, ()));
    }
}

#[cfg(test)]
mod tests {
    use crate::clock;
    use crate::gossip::actor::fixture::{Lone, late, wait};
    use crate::model::MemberStatus;

    #[tokio::test]
    async fn an_acknowledgement_of_the_question_answers_a_refusal_and_one_of_before_does_not() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let _theirs = lone.is_dialled_by(&far).await;
        let ours = lone.actor.links.open(&far.id.name).unwrap().clone();
        let heard = || ours.stats().udp_rx.datagrams;
        // Its QUIC acknowledges, its gossip says nothing: it has not come so far, or its answer was lost.
        let (before, asked) = (heard(), clock::now());
        lone.actor.refusal_heard(far.id.addr, asked);
        lone.actor.settle(asked);
        wait(|| heard() > before).await;
        lone.actor.port_doubted(&far.id, asked, late(asked));
        assert_eq!(lone.status(&far), Some(MemberStatus::Alive));
        assert_eq!((lone.actor.metrics.refusals_answered.get(), lone.actor.metrics.ports_refused.get()), (1, 0));
        // Something is sent and acknowledged before the next refusal, and nothing after it.
        let now = late(asked);
        lone.actor.turn(now, |engine, turn| engine.question(&far.id.name, turn));
        let before = heard();
        lone.actor.settle(now);
        wait(|| heard() > before).await;
        let asked = late(now);
        lone.actor.refusal_heard(far.id.addr, asked);
        lone.actor.port_doubted(&far.id, asked, late(asked));
        assert_eq!(lone.status(&far), Some(MemberStatus::Failed));
        assert_eq!((lone.actor.metrics.refusals_answered.get(), lone.actor.metrics.ports_refused.get()), (1, 1));
    }
    #[tokio::test]
    async fn what_comes_on_a_tunnel_is_a_sign_of_life_of_a_member_that_is_in_question() {
        let mut lone = Lone::new();
        let (far, other) = (lone.peer("far"), lone.peer("other"));
        // The tunnels are whatever the table holds: here what a third endpoint has to `far`.
        let (dialled, accepted) = tokio::join!(other.transport.connect(far.id.addr, None), far.transport.accept());
        let (near_end, far_end) = (dialled.unwrap().0, accepted.unwrap().connection);
        lone.actor.tunnels = other.transport.live().clone();
        let asked = clock::now();
        for peer in [&far, &other] {
            lone.actor.turn(asked, |engine, turn| engine.question(&peer.id.name, turn));
        }
        lone.actor.settle(asked);
        let looked = late(asked);
        let names = || [far.id.name.clone(), other.id.name.clone()];
        lone.actor.tell_signs_of_life(names(), looked);
        let answered = |lone: &Lone| names().map(|name| lone.actor.engine.membership().answered_at(&name));
        assert_eq!(answered(&lone), [None, None], "what had come before says nothing");
        let before = near_end.stats().udp_rx.datagrams;
        far_end.send_datagram(vec![7].into()).unwrap();
        wait(|| near_end.stats().udp_rx.datagrams > before).await;
        lone.actor.tell_signs_of_life(names(), late(looked));
        assert_eq!(answered(&lone), [Some(looked), None]);
    }
}

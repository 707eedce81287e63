//! What sockets tell of peers beside SWIM: closed ports, and whether the holder of a name answers.
//!
//! ```text
//!   next two members on the ring -> a watch each: two bytes every 500 ms -> refused -> the engine, at once
//!   a dial that is refused --------------------------------------------^
//!   others met a refusal -> the port is asked once, by who looks closer --^
//!   a packet of QUIC's is refused -> hint: the member is asked -> silent for 150 ms -----^
//!   packets that QUIC acknowledges -> signs of life, before each verdict
//! ```
//!
//! A process that dies closes its port, and its host says so: two watchers per member see that within a watch period,
//! in a mesh of any size, for 120 B/s. Everything else (a host without power, a firewall that drops) is SWIM's to find.
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

use super::{Actor, Done, Incumbent, Message, Step, answer};
use crate::gossip::targets::{self, DialError};
use crate::membership::MeshId;
use crate::model::NodeName;
use crate::supervise::catch;
use crate::transport::Rhythm;

/// How often a watcher asks. The two watchers of a member take turns by wall time, so that where the hosts' clocks agree
/// within 50 ms one asks within 300 ms. Where they do not, the phases are random: 450 ms in 99 of 100 cases, less what
/// the packets of QUIC hear.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// The watchers of a member: as many predecessors on the ring as a node has successors that it watches.
const WATCHERS: u32 = 2;
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

/// The watches that run, each with its turn among the watchers of that member: as many as the membership watches, two.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<MeshId, (Turns, AbortHandle)>);

/// Which of the watchers of a member this node is: the last before it on the ring, or the one before that.
type Turns = u32;

impl Actor {
    /// Watches the ports of the next members by name.
    pub(super) fn watch_successors(&mut self) {
        let watched = self.engine.membership().watched();
        let wanted: Vec<(MeshId, Turns)> = watched.into_iter().zip(0..).collect();
        self.watches.0.retain(|id, (turn, watch)| {
            let is_wanted = wanted.iter().any(|(wanted, at)| wanted == id && at == turn);
            let is_kept = is_wanted && !watch.is_finished();
            if !is_kept {
                watch.abort();
            }
            is_kept
        });
        for (id, turn) in wanted {
            if self.watches.0.contains_key(&id) {
                continue;
            }
            let (transport, watched) = (self.transport.clone(), id.clone());
            let rhythm = rhythm(&id, turn);
            let watch = self.work.spawn(async move {
                transport.port_refused(watched.addr, rhythm).await;
                Done::PortRefused(watched)
            });
            self.watches.0.insert(id, (turn, watch));
        }
    }

    /// Tells the engine which of `peers` acknowledge what they are sent.
    pub(super) fn tell_signs_of_life(&mut self, peers: impl IntoIterator<Item = NodeName>, now: Instant) {
        for (peer, came_at) in self.links.signs_of_life(peers, now) {
            self.turn(now, |engine, turn| engine.evidence_alive(&peer, came_at, turn));
        }
    }

    /// The host of `id` says that nobody has its port.
    pub(super) fn port_refused(&mut self, id: &MeshId, now: Instant) {
        if let Some((_, watch)) = self.watches.0.remove(id) {
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
        // What it acknowledged before is no answer.
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
        if answered.is_none_or(|at| at <= since) {
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

/// When the watcher of `id` whose turn is `turn` asks. Every member has a phase of its own, which its watchers know alike.
fn rhythm(id: &MeshId, turn: Turns) -> Rhythm {
    let every_ms = u64::try_from(WATCH_EVERY.as_millis()).unwrap_or(u64::MAX);
    let own = Duration::from_millis(id.life.generation.nonce % every_ms);
    Rhythm { every: WATCH_EVERY, phase: own + WATCH_EVERY / WATCHERS * turn }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Generation;

    #[test]
    fn the_watchers_of_a_member_ask_in_turn_and_members_are_not_asked_in_step() {
        let id = |nonce| {
            MeshId::new("a".parse().unwrap(), "10.0.0.1:8301".parse().unwrap(), Generation { number: 1, nonce })
        };
        let gap = rhythm(&id(77), 1).phase.saturating_sub(rhythm(&id(77), 0).phase);
        assert_eq!(gap, WATCH_EVERY / 2);
        assert_ne!(rhythm(&id(77), 0), rhythm(&id(78), 0));
    }
}

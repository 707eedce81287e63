//! What sockets tell of peers beside SWIM: closed ports, and whether the holder of a name answers.
//!
//! ```text
//!   next two members on the ring -> a watch each: two bytes each beat (550 ms) -> refused -> the engine, at once
//!   a dial that is refused --------------------------------------------^
//!   others met a refusal -> the port is asked once, by who looks closer --^
//!   a packet of QUIC's is refused -> hint: the member is asked -> silent for 150 ms -----^
//!   a connection is reset, its life the present one -> asked anew -> silent for 500 ms --^
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
/// The same after a reset, beside four round trips: it takes a handshake.
const LIFE_SHOWS_ANEW_IN: Duration = Duration::from_millis(500);
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

/// What says that a member is gone; neither is believed while it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hint {
    /// ICMP: nobody has its port. Whoever can forge a source address can forge it.
    Refusal,
    /// QUIC: its process does not know a connection that was open (RFC 9000 §10.3).
    Reset,
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
        self.has_crashed(id, Hint::Refusal, now);
    }

    /// Takes `id` for gone at once, and tells the others.
    fn has_crashed(&mut self, id: &MeshId, hint: Hint, now: Instant) {
        if let Some(watch) = self.watches.0.remove(id) {
            watch.abort();
        }
        // Those that are gone are called for days, and refuse every time.
        if !self.engine.membership().alive().any(|alive| alive == id) {
            return;
        }
        match hint {
            Hint::Refusal => {
                info!(member = %id.name, addr = %id.addr, "the member's host says that its port is closed");
                self.metrics.ports_refused.inc();
            }
            Hint::Reset => {
                info!(member = %id.name, addr = %id.addr, "the member has forgotten its connection and does not answer");
                self.metrics.resets.with_label_values(&["silent"]).inc();
            }
        }
        self.turn(now, |engine, turn| engine.evidence_crashed(&id.name, turn));
    }

    /// The host at `addr` is said to refuse a packet of QUIC's: whoever lives there is asked.
    pub(super) fn refusal_heard(&mut self, addr: SocketAddr, now: Instant) {
        let Some(id) = self.engine.membership().alive().find(|id| id.addr == addr).cloned() else { return };
        let round_trip = self.links.open(&id.name).map(Connection::rtt).unwrap_or_default();
        self.doubt(id, Hint::Refusal, LIFE_SHOWS_IN + 2 * round_trip, now);
    }

    /// A connection to `id`, while it lived that life, was reset: the process there does not know it. It is another one, or it
    /// has closed the connection and its word was lost. Either is asked over a new connection, and tells its life.
    pub(super) fn reset_heard(&mut self, id: &MeshId, round_trip: Duration, now: Instant) {
        if self.engine.membership().alive().any(|alive| alive == id) {
            self.doubt(id.clone(), Hint::Reset, LIFE_SHOWS_ANEW_IN + 4 * round_trip, now);
        }
    }

    /// Asks `id` whether it lives, which it may take `time` to show.
    fn doubt(&mut self, id: MeshId, hint: Hint, time: Duration, now: Instant) {
        if self.doubted.len() >= QUESTIONS_MAX || !self.doubted.insert(id.clone()) {
            return;
        }
        // What it acknowledged before is no answer: it is dated before this look, and what comes from here on at this look.
        self.tell_signs_of_life([id.name.clone()], now);
        self.turn(now, |engine, turn| engine.question(&id.name, turn));
        self.work.spawn(async move {
            tokio::time::sleep_until(now + time).await;
            Done::Doubted { id, hint, since: now }
        });
    }

    /// The member has had its time to answer.
    pub(super) fn doubted(&mut self, id: &MeshId, hint: Hint, since: Instant, now: Instant) {
        self.doubted.remove(id);
        self.drain_inputs(now);
        self.tell_signs_of_life([id.name.clone()], now);
        let answered = self.engine.membership().answered_at(&id.name);
        if answered.is_none_or(|at| at < since) {
            return self.has_crashed(id, hint, now);
        }
        match hint {
            Hint::Refusal => self.metrics.refusals_answered.inc(),
            Hint::Reset => self.metrics.resets.with_label_values(&["answered"]).inc(),
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
    use quinn::ConnectionError;

    use super::*;
    use crate::clock;
    use crate::gossip::actor::connections::Ended;
    use crate::gossip::actor::fixture::{Lone, Peer, late, wait};
    use crate::membership::Life;
    use crate::model::{Generation, MemberStatus};

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
        lone.actor.doubted(&far.id, Hint::Refusal, asked, late(asked));
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
        lone.actor.doubted(&far.id, Hint::Refusal, asked, late(asked));
        assert_eq!(lone.status(&far), Some(MemberStatus::Failed));
        assert_eq!((lone.actor.metrics.refusals_answered.get(), lone.actor.metrics.ports_refused.get()), (1, 1));
        // Who is gone refuses for days.
        lone.actor.port_refused(&far.id, late(asked));
        assert_eq!(lone.actor.metrics.ports_refused.get(), 1);
    }
    #[tokio::test]
    async fn what_others_say_has_no_more_members_asked_at_once_than_fail_together_in_a_rack() {
        let mut lone = Lone::new();
        let (far, now) = (lone.peer("far"), clock::now());
        let others: Vec<MeshId> = (0..QUESTIONS_MAX)
            .map(|at| MeshId::new(format!("n{at}").parse().unwrap(), far.id.addr, Generation::default()))
            .collect();
        lone.actor.doubted = others.iter().cloned().collect();
        lone.actor.asked = others.iter().cloned().collect();
        lone.actor.refusal_heard(far.id.addr, now);
        lone.actor.ask_port(far.id.clone());
        assert!(!lone.actor.doubted.contains(&far.id) && !lone.actor.asked.contains(&far.id));
        lone.actor.doubted.remove(&others[0]);
        lone.actor.asked.remove(&others[0]);
        lone.actor.refusal_heard(far.id.addr, now);
        lone.actor.ask_port(far.id.clone());
        assert!(lone.actor.doubted.contains(&far.id) && lone.actor.asked.contains(&far.id));
    }

    #[tokio::test]
    async fn a_newcomer_past_the_bound_on_challenges_is_judged_by_what_is_known() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let generation = Generation { number: far.id.life.generation.number + 1, nonce: 1 };
        let id = MeshId::new(far.id.name.clone(), "127.0.0.1:1".parse().unwrap(), generation);
        let mut greet = |under_way| {
            let (reply, given) = oneshot::channel();
            lone.actor.challenges = under_way;
            lone.actor.greeted(Challenge { peer: id.name.clone(), id: id.clone(), reply }, clock::now());
            given
        };
        let mut asked = greet(CHALLENGES_MAX - 1);
        assert!(asked.try_recv().is_err(), "the holder is asked first");
        let mut unasked = greet(CHALLENGES_MAX);
        assert!(unasked.try_recv().is_ok());
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
    /// A connection of the peer in `life` ends.
    fn ends(lone: &mut Lone, peer: &Peer, life: Option<MeshId>, reason: ConnectionError, now: Instant) {
        let reason = Some(reason);
        let ended = Ended { peer: peer.id.name.clone(), life, stable_id: 0, round_trip: Duration::ZERO, reason };
        lone.actor.done(Done::ConnectionEnded(ended), now);
    }

    #[tokio::test]
    async fn a_reset_has_the_life_asked_that_it_speaks_of_and_silence_convicts_it() {
        let mut lone = Lone::new();
        let far = lone.peer("far");
        let resets = |lone: &Lone, result| lone.actor.metrics.resets.with_label_values(&[result]).get();
        let now = clock::now();
        // Another end, another life and a life that is not known say nothing.
        let earlier = MeshId::with_life(far.id.name.clone(), far.id.addr, Life::default());
        ends(&mut lone, &far, Some(far.id.clone()), ConnectionError::TimedOut, now);
        ends(&mut lone, &far, Some(earlier), ConnectionError::Reset, now);
        ends(&mut lone, &far, None, ConnectionError::Reset, now);
        assert!(lone.actor.doubted.is_empty());
        // Its CLOSE was lost: it answers.
        ends(&mut lone, &far, Some(far.id.clone()), ConnectionError::Reset, now);
        assert!(lone.actor.doubted.contains(&far.id));
        assert!(lone.actor.engine.membership().in_question().contains(&far.id.name), "it is asked");
        lone.actor.turn(now, |engine, turn| engine.evidence_alive(&far.id.name, late(now), turn));
        lone.actor.doubted(&far.id, Hint::Reset, now, late(now));
        assert_eq!((lone.status(&far), resets(&lone, "answered")), (Some(MemberStatus::Alive), 1));
        // It does not.
        let now = late(late(now));
        ends(&mut lone, &far, Some(far.id.clone()), ConnectionError::Reset, now);
        lone.actor.doubted(&far.id, Hint::Reset, now, late(now));
        assert_eq!((lone.status(&far), resets(&lone, "silent")), (Some(MemberStatus::Failed), 1));
        assert_eq!(lone.actor.metrics.ports_refused.get(), 0);
    }
    #[tokio::test]
    async fn a_crashed_process_whose_port_another_has_at_once_is_found_by_the_reset() {
        let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut lone = Lone::new();
        let first = runtime();
        let far = {
            let _inside = first.enter();
            lone.peer("far")
        };
        let theirs = lone.is_dialled_by(&far).await;
        // By what a reset is known: a client says it in a frame after the handshake.
        let ours = lone.actor.links.open(&far.id.name).unwrap().clone();
        wait(|| ours.stats().frame_rx.new_connection_id > 0).await;
        // A crash: its tasks end where they are, so that nothing is said when the handles go.
        tokio::task::spawn_blocking(move || first.shutdown_timeout(Duration::from_secs(20))).await.unwrap();
        let Peer { id, transport, .. } = far;
        drop((theirs, transport));
        let mut socket = None;
        wait(|| {
            socket = std::net::UdpSocket::bind(id.addr).ok();
            socket.is_some()
        })
        .await;
        // The next life has the port, and does not come as far as gossip.
        let second = runtime();
        let _reborn = {
            let _inside = second.enter();
            lone.restarted("far", socket.unwrap())
        };
        let now = clock::now();
        lone.actor.turn(now, |engine, turn| engine.question(&id.name, turn));
        lone.actor.settle(now);
        let silent = lone.actor.metrics.resets.with_label_values(&["silent"]);
        lone.run(wait(|| silent.get() == 1)).await;
        let member = lone.actor.engine.membership().member(&id.name).unwrap();
        assert_eq!(member.status, MemberStatus::Failed);
        second.shutdown_background();
    }
}

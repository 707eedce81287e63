//! Exchanges and attempts to join between simulated agents: what `gossip::exchange` and `gossip::targets` do.
//!
//! Every message is encoded and decoded as on a stream. Losses delay it; a cut, a stopped or a dead peer holds it up
//! until the stream's time limit ends the exchange.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use weft::gossip::engine::{Attempt, Ending, Exchange, JoinCause, JoinOutcome, Message, Request, Stage, Step};

use super::links::Connection;
use super::world::{Event, World};

/// As `gossip::exchange`.
const TIME_MAX: Duration = Duration::from_secs(10);
/// As `gossip::targets`: attempts side by side, how many answers end one of the engine's own, and how long others may still
/// come after the first.
const PARALLEL_MAX: usize = 16;
const JOIN_ENOUGH: usize = 3;
const JOIN_GRACE: Duration = Duration::from_millis(300);
/// How often a message that a cut holds up is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// Who of the two is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Beginner,
    Answerer,
}

/// What an exchange is for.
#[derive(Debug, Clone)]
enum Purpose {
    Engine(Exchange),
    /// `connection` is closed unless the peer lets the host in.
    Join {
        attempt: u64,
        addr: SocketAddr,
        connection: u64,
    },
}

/// An exchange under way. The beginner is first.
#[derive(Debug)]
pub(crate) struct Talk {
    hosts: [usize; 2],
    boots: [u32; 2],
    stages: [Stage; 2],
    purpose: Purpose,
    connection: Option<Connection>,
    /// Counts the streams, so that the deadline of an earlier one is void.
    stream: u32,
}

/// An attempt to join under way.
#[derive(Debug)]
pub(crate) struct Joining {
    host: usize,
    boot: u32,
    cause: JoinCause,
    waiting: VecDeque<SocketAddr>,
    running: usize,
    outcome: JoinOutcome,
}

/// Names what a message on a stream is for.
fn class_of(message: &Message) -> &'static str {
    match message {
        Message::Request(Request::Hello(_)) | Message::Hello(_) => "stream: hello",
        Message::Request(Request::Pull(_)) | Message::Deltas(_) => "stream: pull",
        Message::End => "stream: end",
        _ => "stream: comparison",
    }
}

fn index(side: Side) -> usize {
    match side {
        Side::Beginner => 0,
        Side::Answerer => 1,
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Beginner => Side::Answerer,
        Side::Answerer => Side::Beginner,
    }
}

impl World {
    fn boot_of(&self, host: usize) -> Option<u32> {
        self.hosts[host].process.as_ref().map(|process| process.boot)
    }

    /// Begins an exchange that an engine wants; without a connection it ends at once.
    pub(crate) fn begin(&mut self, host: usize, peer: &str, exchange: Exchange, first: (Message, Stage)) {
        if matches!(exchange, Exchange::Sync(_)) && !self.settings.has_syncs {
            self.turn(host, |engine, turn| engine.handle_end(&exchange, Ending::Failed, turn));
            return;
        }
        let linked = self.hosts_named(peer).find_map(|to| self.open_link(host, to).map(|connection| (to, connection)));
        let Some((to, connection)) = linked.filter(|_| self.settings.has_exchanges) else {
            self.turn(host, |engine, turn| engine.handle_end(&exchange, Ending::NoLink, turn));
            return;
        };
        self.exchanges_begun += 1;
        let boots = [self.boot_of(host).unwrap(), connection.peer_boot];
        let stages = [first.1, Stage::Asked];
        let purpose = Purpose::Engine(exchange);
        self.open_talk(
            Talk { hosts: [host, to], boots, stages, purpose, connection: Some(connection), stream: 0 },
            first.0,
        );
    }

    fn open_talk(&mut self, talk: Talk, first: Message) {
        self.talk_number += 1;
        let number = self.talk_number;
        self.talks.insert(number, talk);
        self.after(TIME_MAX, Event::StreamTimeout { talk: number, stream: 0 });
        self.say(number, Side::Answerer, &first);
    }

    /// Puts a message on its way to `to`.
    fn say(&mut self, number: u64, to: Side, message: &Message) {
        let Some(talk) = self.talks.get(&number) else { return };
        let bytes = message.encode().expect("messages of an engine fit their frame");
        let [from_host, to_host] = [talk.hosts[index(other(to))], talk.hosts[index(to)]];
        let stream = talk.stream;
        let packets = 1 + bytes.len() as u64 / 1200;
        let traffic = &mut self.hosts[from_host].traffic;
        traffic.stream_bytes += bytes.len() as u64 + 4;
        traffic.stream_packets += packets;
        // Every second one is acknowledged with nothing else, a single one as well: nothing answers the last.
        self.hosts[to_host].traffic.acks += packets.div_ceil(2);
        self.classify(class_of(message), packets, bytes.len() as u64 + 4);
        let time = self.net.stream_time(from_host, to_host, bytes.len(), &mut self.rng);
        self.after(time, Event::Frame { talk: number, stream, to, bytes });
    }

    /// A message arrives, or would.
    pub(crate) fn frame(&mut self, number: u64, stream: u32, to: Side, bytes: Vec<u8>) {
        let Some(talk) = self.talks.get(&number).filter(|talk| talk.stream == stream) else { return };
        let at = index(to);
        let (host, peer) = (talk.hosts[at], talk.hosts[1 - at]);
        if !self.net.passes(peer, host) {
            // Sent again until the deadline of the stream.
            return self.after(RETRY, Event::Frame { talk: number, stream, to, bytes });
        }
        let Some(boot) = self.boot_of(host) else { return };
        if boot != talk.boots[at] {
            return self.end_talk(number, Ending::Failed);
        }
        let process = self.hosts[host].process.as_mut().unwrap();
        if process.is_paused {
            process.inbox.push_back(Event::Frame { talk: number, stream, to, bytes });
            return;
        }
        let talk = self.talks.get(&number).unwrap();
        let stage = talk.stages[at];
        let connection = talk.connection;
        if let Some(connection) = connection.filter(|_| to == Side::Answerer) {
            // An exchange on a connection that the other side has closed meanwhile breaks off.
            if !self.holds(host, peer, connection) {
                return self.end_talk(number, Ending::Failed);
            }
        }
        let message = if stage.awaits_end() { Message::End } else { stage.decode(&bytes).expect("it was encoded so") };
        if let (Message::Hello(reply), Some(Talk { purpose: Purpose::Join { attempt, addr, connection }, .. })) =
            (&message, self.talks.get(&number))
        {
            let (attempt, addr, connection, reply) = (*attempt, *addr, *connection, reply.clone());
            self.talks.remove(&number);
            let judged = Attempt::judge(reply, &self.hosts[peer].name, addr);
            if !matches!(judged, Ok(Attempt::Joined(_))) {
                self.close_one(host, peer, connection);
            }
            return self.join_answered(attempt, addr, judged);
        }
        let name = self.hosts[peer].name.clone();
        let step = self.turn(host, |engine, turn| engine.handle_message(&name, stage, message, turn));
        if let Some(step) = step {
            self.take_step(number, to, step);
        }
    }

    fn take_step(&mut self, number: u64, side: Side, step: Step) {
        match step {
            Step::Say(message, stage) => {
                if let Some(talk) = self.talks.get_mut(&number) {
                    talk.stages[index(side)] = stage;
                }
                self.say(number, other(side), &message);
            }
            Step::Again(message, stage) => {
                let Some(talk) = self.talks.get_mut(&number) else { return };
                talk.stream += 1;
                talk.stages = [stage, Stage::Asked];
                let stream = talk.stream;
                self.after(TIME_MAX, Event::StreamTimeout { talk: number, stream });
                self.say(number, Side::Answerer, &message);
            }
            Step::Last(message) => self.say(number, other(side), &message),
            // The answerer's end is what the beginner may wait for; the beginner's own end is the end of all.
            Step::Done if side == Side::Answerer => self.say(number, Side::Beginner, &Message::End),
            Step::Done => self.end_talk(number, Ending::Complete),
        }
    }

    /// The host that a message of an exchange goes to.
    pub(crate) fn hearer(&self, number: u64, to: Side) -> Option<usize> {
        Some(self.talks.get(&number)?.hosts[index(to)])
    }

    /// The time limit of a stream.
    pub(crate) fn stream_timeout(&mut self, number: u64, stream: u32) {
        if self.talks.get(&number).is_some_and(|talk| talk.stream == stream) {
            self.end_talk(number, Ending::Failed);
        }
    }

    fn end_talk(&mut self, number: u64, ending: Ending) {
        let Some(talk) = self.talks.remove(&number) else { return };
        match talk.purpose {
            Purpose::Engine(exchange) => {
                if self.boot_of(talk.hosts[0]) == Some(talk.boots[0]) {
                    self.turn(talk.hosts[0], |engine, turn| engine.handle_end(&exchange, ending, turn));
                }
            }
            Purpose::Join { attempt, addr, connection } => {
                self.close_one(talk.hosts[0], talk.hosts[1], connection);
                self.join_answered(attempt, addr, Err(format!("{addr}: the connection was lost")));
            }
        }
    }

    // Joining.

    /// Tries each of `targets` once, some side by side.
    pub(crate) fn start_join(&mut self, host: usize, cause: JoinCause, targets: &[String]) {
        let own = self.hosts[host].addr;
        let mut outcome = JoinOutcome::default();
        let mut waiting = VecDeque::new();
        for target in targets {
            match target.parse::<SocketAddr>() {
                Ok(addr) if addr != own => waiting.push_back(addr),
                Ok(addr) => outcome.failed.push((target.clone(), format!("{addr} is this agent itself"))),
                Err(error) => outcome.failed.push((target.clone(), error.to_string())),
            }
        }
        self.talk_number += 1;
        let attempt = self.talk_number;
        let boot = self.boot_of(host).unwrap();
        self.joinings.insert(attempt, Joining { host, boot, cause, waiting, running: 0, outcome });
        self.join_on(attempt);
    }

    fn join_on(&mut self, attempt: u64) {
        while let Some(joining) = self.joinings.get_mut(&attempt).filter(|joining| joining.running < PARALLEL_MAX) {
            let Some(addr) = joining.waiting.pop_front() else { break };
            joining.running += 1;
            let host = joining.host;
            let time = self.handshake(host, addr);
            self.hosts[host].traffic.dials += 1;
            let begun = self.now;
            self.after(time, Event::JoinDialled { attempt, addr, begun });
        }
        if self.joinings.get(&attempt).is_some_and(|joining| joining.running == 0) {
            self.join_over(attempt);
        }
    }

    /// Tells the engine what has come of an attempt so far, and gives up what still runs.
    pub(crate) fn join_over(&mut self, attempt: u64) {
        let Some(joining) = self.joinings.remove(&attempt) else { return };
        let of = |talk: &Talk| matches!(talk.purpose, Purpose::Join { attempt: of, .. } if of == attempt);
        let mut running: Vec<u64> = self.talks.iter().filter(|(_, talk)| of(talk)).map(|(number, _)| *number).collect();
        running.sort_unstable();
        for number in running {
            self.end_talk(number, Ending::Failed);
        }
        if self.boot_of(joining.host) == Some(joining.boot) {
            let (cause, outcome) = (joining.cause, joining.outcome);
            self.turn(joining.host, |engine, turn| engine.handle_joined(cause, outcome, turn));
        }
    }

    /// The host that attempts to join.
    pub(crate) fn joiner(&self, attempt: u64) -> Option<usize> {
        Some(self.joinings.get(&attempt)?.host)
    }

    /// The end of a dial for an attempt to join.
    pub(crate) fn join_dialled(&mut self, attempt: u64, addr: SocketAddr, begun: Duration) {
        let Some(joining) = self.joinings.get(&attempt) else { return };
        let (host, boot) = (joining.host, joining.boot);
        if self.boot_of(host) != Some(boot) {
            self.joinings.remove(&attempt);
            return;
        }
        let Some(to) = self.reaches(host, addr) else {
            if let Some(wait) = self.next_flight(begun) {
                return self.after(wait, Event::JoinDialled { attempt, addr, begun });
            }
            return self.join_answered(attempt, addr, Err(format!("{addr} did not answer in time")));
        };
        if self.hosts[to].name == self.hosts[host].name {
            let refusal = format!("the agent at {addr} is named {} too", self.hosts[host].name);
            return self.join_answered(attempt, addr, Err(refusal));
        }
        let connection = self.connect(host, to, None);
        let boots = [boot, self.boot_of(to).unwrap()];
        let hello = Message::Request(Request::Hello(self.hosts[host].id().unwrap().clone()));
        let purpose = Purpose::Join { attempt, addr, connection };
        let stages = [Stage::Greeting, Stage::Asked];
        self.open_talk(Talk { hosts: [host, to], boots, stages, purpose, connection: None, stream: 0 }, hello);
    }

    fn join_answered(&mut self, attempt: u64, addr: SocketAddr, answer: Result<Attempt, String>) {
        let Some(joining) = self.joinings.get_mut(&attempt) else { return };
        joining.running -= 1;
        match answer {
            Ok(Attempt::Joined(welcomed)) => {
                joining.outcome.joined.push(welcomed);
                if joining.cause == JoinCause::Engine {
                    match joining.outcome.joined.len() {
                        1 => self.after(JOIN_GRACE, Event::JoinEnough { attempt }),
                        JOIN_ENOUGH.. => return self.join_over(attempt),
                        _ => {}
                    }
                }
            }
            Ok(Attempt::Outdated(life)) => {
                joining.outcome.outdated = joining.outcome.outdated.max(Some(life));
                joining.outcome.failed.push((addr.to_string(), "a later life is remembered there".to_owned()));
            }
            Err(reason) => joining.outcome.failed.push((addr.to_string(), reason)),
        }
        self.join_on(attempt);
    }
}

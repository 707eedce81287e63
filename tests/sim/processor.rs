//! One machine that all agents of a world share: what an agent does takes time, and who has something to do waits for a
//! processor.
//!
//! ```text
//!   event -> what has arrived for its host -> ready, in order -> a processor is free: all of it, at once -> it happens
//! ```
//!
//! So what agents send each other slows them down, as on a developer's machine or a small host with many containers. As the
//! agent does, a host takes in what has arrived before its timers run.
//!
//! Not here: what a start costs beside its handshakes, and memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::world::{Event, World};

/// What agents take of the machine that they share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    /// How many hosts it serves at once.
    pub(crate) processors: usize,
    /// What a packet takes, a message on a stream, or a timer.
    pub(crate) step: Duration,
    /// What a handshake takes, both sides together.
    pub(crate) handshake: Duration,
}

/// Packets that wait in one host's socket.
const WAITING_MAX: usize = 256;

/// Who waits for a processor, and who has one.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    arrived: BTreeMap<usize, Vec<Event>>,
    ready: VecDeque<usize>,
    running: BTreeSet<usize>,
}

impl World {
    /// Lets `event` wait for its host's turn; returns it if it needs none.
    pub(crate) fn arrive(&mut self, event: Event) -> Option<Event> {
        let Some(machine) = self.settings.machine else { return Some(event) };
        if let Event::Wake { host, boot } = event {
            let process = self.hosts[host].process.as_ref();
            process.filter(|process| process.boot == boot && process.wake_at == Some(self.now))?;
        }
        let Some((host, _)) = self.work(&event, machine) else { return Some(event) };
        let arrived = self.turns.arrived.entry(host).or_default();
        if arrived.len() >= WAITING_MAX && matches!(event, Event::Packet { .. }) {
            self.dropped += 1;
            return None;
        }
        arrived.push(event);
        if arrived.len() == 1 && !self.turns.running.contains(&host) {
            self.turns.ready.push_back(host);
        }
        self.give_turns(machine);
        None
    }

    /// Whom `event` keeps busy, and for how long; none: it takes no processor.
    fn work(&self, event: &Event, machine: Machine) -> Option<(usize, Duration)> {
        let (host, time) = match event {
            Event::Wake { host, .. } => (*host, machine.step),
            Event::Packet { to, .. } => (*to, machine.step),
            Event::Frame { talk, to, .. } => (self.hearer(*talk, *to)?, machine.step),
            Event::Dialled { from, .. } => (*from, machine.handshake),
            Event::JoinDialled { attempt, .. } => (self.joiner(*attempt)?, machine.handshake),
            _ => return None,
        };
        self.hosts[host].is_up().then_some((host, time))
    }

    fn give_turns(&mut self, machine: Machine) {
        while self.turns.running.len() < machine.processors
            && let Some(host) = self.turns.ready.pop_front()
        {
            let events = self.turns.arrived.remove(&host).unwrap_or_default();
            // What is void by now takes nothing.
            let time: Duration = events.iter().filter_map(|event| Some(self.work(event, machine)?.1)).sum();
            self.turns.running.insert(host);
            self.after(time, Event::TurnOver { host, events });
        }
    }

    /// Carries out what a host did in its turn, and gives the processor to the next.
    pub(crate) fn turn_over(&mut self, host: usize, events: Vec<Event>) {
        self.is_draining = true;
        for event in events {
            match event {
                Event::Wake { host, boot } => {
                    if let Some(process) = self.hosts[host].process.as_mut().filter(|process| process.boot == boot) {
                        process.wake_at = None;
                    }
                }
                event => self.happen(event),
            }
        }
        self.is_draining = false;
        // Its timers, if they are due.
        self.turn(host, |_, _| ());
        self.turns.running.remove(&host);
        if self.turns.arrived.contains_key(&host) {
            self.turns.ready.push_back(host);
        }
        if let Some(machine) = self.settings.machine {
            self.give_turns(machine);
        }
    }
}

//! Signed documents in a simulated mesh: the set that ships (`weft::policy`), carried by a model of `gossip::documents`.
//!
//! ```text
//!   offer at a host -> pushed to all that it sees alive -> each learner to three others; every 5 s one comparison per host
//! ```
//!
//! The signatures are real ones, by the keys of a CA that is made for the run: which of two forks has the smaller hash
//! differs between runs, and nothing else does.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use rand::RngExt as _;
use rand::seq::IteratorRandom as _;
use weft::clock::UnixSeconds;
use weft::pki::{CaDir, DocumentKey, Revoked, Signatory, SpkiHash};
use weft::policy::{Content, Document, DocumentId, DocumentKind, DocumentSet, HeldDigest, Offered, RevocationBody};

use super::scenarios::SECOND;
use super::world::{WALL, World};

/// As `gossip::carrier`.
const FORWARDS: usize = 3;
/// As there after a difference; what is equal is compared every 30 s there.
const COMPARE_EVERY: Duration = Duration::from_secs(5);

/// What is on its way between two hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Carried {
    Push(Vec<u8>),
    Compare(u64),
    Compared(Vec<HeldDigest>),
    Given(Vec<Vec<u8>>),
}

/// When, a number that makes it unique, from, to.
type Way = (Duration, u64, usize, usize);

/// The documents of every host of a world, which must all have been added.
pub(crate) struct Documents {
    pub(crate) sets: Vec<DocumentSet>,
    pub(crate) operator: DocumentKey,
    next_compare: Vec<Duration>,
    ways: BinaryHeap<Reverse<Way>>,
    carried: HashMap<u64, Carried>,
    number: u64,
    /// Documents that were refused: host and reason.
    pub(crate) refused: Vec<(usize, String)>,
}

/// The true wall time at the beginning.
pub(crate) fn wall() -> UnixSeconds {
    UnixSeconds(WALL)
}

impl Documents {
    pub(crate) fn new(world: &mut World) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        CaDir::init(&path, &"sim".parse().unwrap(), wall()).unwrap();
        let [root, operator] = [Signatory::Root, Signatory::Operator].map(|who| DocumentKey::load(&path, who).unwrap());
        let bundle = root.bundle().unwrap();
        let count = world.hosts.len();
        let mut first = || world.now + COMPARE_EVERY.mul_f64(world.rng.random_range(0.0..1.0));
        Self {
            sets: (0..count).map(|_| DocumentSet::new(&bundle)).collect(),
            operator,
            next_compare: (0..count).map(|_| first()).collect(),
            ways: BinaryHeap::new(),
            carried: HashMap::new(),
            number: 0,
            refused: Vec::new(),
        }
    }

    /// A revocation of one key, signed by the operator; `body` replaces its content.
    pub(crate) fn sign(&self, name: &str, version: u64, key: u8, body: Option<Vec<u8>>) -> Document {
        let revocation =
            RevocationBody { entries: vec![Revoked::Key(SpkiHash([key; 32]))], reason: "simulated".to_owned() };
        let content = Content {
            trust_domain: "sim".parse().unwrap(),
            id: DocumentId { kind: DocumentKind::Revocation, name: name.parse().unwrap() },
            version,
            not_before: wall(),
            not_after: wall().plus(Duration::from_hours(24)),
            signer: SpkiHash([0; 32]),
            body: body.unwrap_or_else(|| revocation.to_bytes().unwrap()),
        };
        Document::sign(content, &self.operator).unwrap()
    }

    /// Takes `bytes` at `host` and passes them on if they count; `is_origin`: an operator gave them to this host.
    pub(crate) fn take(&mut self, world: &mut World, host: usize, bytes: &[u8], is_origin: bool) {
        let now = wall().plus(world.now);
        let outcome = Document::from_bytes(bytes).map_err(|error| error.to_string());
        let outcome = outcome.and_then(|it| self.sets[host].offer(it, now).map_err(|error| error.to_string()));
        match outcome {
            Ok(Offered::Stored) => {
                let others = alive(world, host);
                let chosen = if is_origin { others } else { others.into_iter().sample(&mut world.rng, FORWARDS) };
                for to in chosen {
                    self.send(world, host, to, Carried::Push(bytes.to_vec()));
                }
            }
            Ok(Offered::Known | Offered::Older) => {}
            Err(reason) => self.refused.push((host, reason)),
        }
    }

    fn send(&mut self, world: &mut World, from: usize, to: usize, what: Carried) {
        let bytes = match &what {
            Carried::Push(bytes) => bytes.len(),
            Carried::Compare(_) => 20,
            Carried::Compared(digests) => digests.len() * 80,
            Carried::Given(documents) => documents.iter().map(Vec::len).sum(),
        };
        let time = world.net.stream_time(from, to, bytes, &mut world.rng);
        self.number += 1;
        self.carried.insert(self.number, what);
        self.ways.push(Reverse((world.now + time, self.number, from, to)));
    }

    /// Runs the world and its documents for `time`.
    pub(crate) fn run(&mut self, world: &mut World, time: Duration) {
        self.run_until(world, time, |_| false);
    }

    /// Runs until `done` or until `limit` has passed; returns how long it took.
    pub(crate) fn run_until(
        &mut self,
        world: &mut World,
        limit: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Option<Duration> {
        let begin = world.now;
        while world.now < begin + limit {
            if done(self) {
                return Some(world.now - begin);
            }
            world.run(SECOND / 100);
            while let Some(Reverse((at, number, from, to))) = self.ways.peek().copied()
                && at <= world.now
            {
                self.ways.pop();
                let what = self.carried.remove(&number).unwrap();
                // Where nothing passes the stream ends with its time limit, without effect.
                if world.net.passes(from, to) && world.hosts[to].is_up() {
                    self.arrived(world, from, to, what);
                }
            }
            for host in 0..self.sets.len() {
                if self.next_compare[host] <= world.now && world.hosts[host].is_up() {
                    self.next_compare[host] = world.now + COMPARE_EVERY.mul_f64(world.rng.random_range(0.75..1.25));
                    if let Some(peer) = alive(world, host).into_iter().choose(&mut world.rng) {
                        let hash = self.sets[host].set_hash();
                        self.send(world, host, peer, Carried::Compare(hash));
                    }
                }
            }
        }
        done(self).then_some(limit)
    }

    fn arrived(&mut self, world: &mut World, from: usize, to: usize, what: Carried) {
        match what {
            Carried::Push(bytes) => self.take(world, to, &bytes, false),
            Carried::Compare(hash) if hash != self.sets[to].set_hash() => {
                let digests = self.sets[to].digests();
                self.send(world, to, from, Carried::Compared(digests));
            }
            Carried::Compare(_) => {}
            Carried::Compared(theirs) => {
                let newer = self.sets[to].newer_than(&theirs, usize::MAX);
                if !newer.is_empty() {
                    self.send(world, to, from, Carried::Given(newer));
                }
                let given = self.sets[from].newer_than(&self.sets[to].digests(), usize::MAX);
                if !given.is_empty() {
                    self.send(world, from, to, Carried::Given(given));
                }
            }
            Carried::Given(documents) => {
                for bytes in documents {
                    self.take(world, to, &bytes, false);
                }
            }
        }
    }

    pub(crate) fn are_equal(&self) -> bool {
        self.sets.iter().all(|set| set.set_hash() == self.sets[0].set_hash())
    }
}

/// Hosts that `host` sees alive.
fn alive(world: &World, host: usize) -> Vec<usize> {
    if world.hosts[host].process.is_none() {
        return Vec::new();
    }
    let ids: Vec<_> = world.engine(host).membership().alive().cloned().collect();
    ids.iter().filter_map(|id| world.host_named(id)).collect()
}

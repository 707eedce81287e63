//! When each check runs. Pure.
//!
//! ```text
//!   insert -> waiting in its lane, by time -> poll: due, and the lane has room -> running -> finished -> waiting
//! ```
//!
//! Invariants: a check never runs twice at once; at most [`Lane::runs_max`] run of each lane; the one that waits longest
//! goes first. A check whose last run was slow waits in a lane of its own, so that targets that hang hold back each
//! other and not the rest. Runs keep their times (no drift) unless one was missed: then the interval begins anew.
//! Not here: what a run does, what becomes of its result.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::CheckId;

/// A run that takes longer is slow: a hundred times what an app of the same host takes.
pub(crate) const SLOW_AFTER: Duration = Duration::from_secs(2);

/// What runs compete for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// Sockets.
    Net,
    /// Sockets that were slow the last time.
    SlowNet,
    /// Programs.
    Process,
    /// Programs that were slow the last time.
    SlowProcess,
}

const LANES: [Lane; 4] = [Lane::Net, Lane::SlowNet, Lane::Process, Lane::SlowProcess];

impl Lane {
    /// Most runs at once: with their sockets, buffers and programs this bounds what checks hold of the host.
    pub(crate) fn runs_max(self) -> usize {
        match self {
            Self::Net => 1024,
            Self::SlowNet => 256,
            Self::Process => 32,
            Self::SlowProcess => 8,
        }
    }

    fn after(self, took: Duration) -> Self {
        match (self, took >= SLOW_AFTER) {
            (Self::Net | Self::SlowNet, false) => Self::Net,
            (Self::Net | Self::SlowNet, true) => Self::SlowNet,
            (Self::Process | Self::SlowProcess, false) => Self::Process,
            (Self::Process | Self::SlowProcess, true) => Self::SlowProcess,
        }
    }
}

/// A run to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) id: CheckId,
    pub(crate) epoch: u64,
    /// How long after its time.
    pub(crate) late: Duration,
}

#[derive(Debug)]
struct Job {
    epoch: u64,
    interval: Duration,
    lane: Lane,
    /// The time of the next run, or of the one that goes on.
    at: Instant,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: BTreeSet<(Instant, CheckId)>,
    running: usize,
}

/// The runs of all checks of a node.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    jobs: BTreeMap<CheckId, Job>,
    queues: BTreeMap<Lane, Queue>,
    /// Runs that go on, of checks that may be gone or replaced since.
    running: BTreeMap<(CheckId, u64), Lane>,
}

impl Schedule {
    /// Adds a check whose first run comes after the share `offset` (0 to 1) of its interval; one of the same id is
    /// replaced.
    pub(crate) fn insert(
        &mut self,
        id: CheckId,
        epoch: u64,
        (lane, interval): (Lane, Duration),
        offset: f64,
        now: Instant,
    ) {
        self.remove(&id);
        let at = now + interval.mul_f64(offset.clamp(0.0, 1.0));
        self.queue(lane).waiting.insert((at, id.clone()));
        self.jobs.insert(id, Job { epoch, interval, lane, at });
    }

    /// Drops a check; a run that goes on counts until it is finished.
    pub(crate) fn remove(&mut self, id: &CheckId) {
        if let Some(job) = self.jobs.remove(id) {
            self.queue(job.lane).waiting.remove(&(job.at, id.clone()));
        }
    }

    /// Returns the next run that is due and has room.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Start> {
        for lane in LANES {
            let queue = self.queue(lane);
            if queue.running >= lane.runs_max() || queue.waiting.first().is_none_or(|(at, _)| *at > now) {
                continue;
            }
            let (at, id) = queue.waiting.pop_first()?;
            queue.running += 1;
            let epoch = self.jobs.get(&id).map_or(0, |job| job.epoch);
            self.running.insert((id.clone(), epoch), lane);
            return Some(Start { id, epoch, late: now.saturating_duration_since(at) });
        }
        None
    }

    /// Takes note of the end of a run that took `took`.
    pub(crate) fn finished(&mut self, id: &CheckId, epoch: u64, took: Duration, now: Instant) {
        let Some(lane) = self.running.remove(&(id.clone(), epoch)) else { return };
        self.queue(lane).running -= 1;
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.epoch == epoch) else { return };
        job.lane = lane.after(took);
        job.at += job.interval;
        if job.at <= now {
            job.at = now + job.interval;
        }
        let (lane, at) = (job.lane, job.at);
        self.queue(lane).waiting.insert((at, id.clone()));
    }

    /// Returns when `poll` has something to say, as long as nothing is finished.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let has_room = |(lane, queue): &(&Lane, &Queue)| queue.running < lane.runs_max();
        let first = |(_, queue): (&Lane, &Queue)| queue.waiting.first().map(|(at, _)| *at);
        self.queues.iter().filter(has_room).filter_map(first).min()
    }

    fn queue(&mut self, lane: Lane) -> &mut Queue {
        self.queues.entry(lane).or_default()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const NET: (Lane, Duration) = (Lane::Net, Duration::from_secs(10));

    fn id(name: &str) -> CheckId {
        name.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_keeps_its_time_however_long_it_takes_within_the_interval() {
        let begin = crate::clock::now();
        let mut schedule = Schedule::default();
        schedule.insert(id("a"), 1, NET, 0.5, begin);
        for round in 0..5u32 {
            let due = begin + SECOND * (5 + 10 * round);
            assert_eq!(schedule.poll_timeout(), Some(due));
            assert_eq!(schedule.poll(due - SECOND / 2), None);
            let start = schedule.poll(due + SECOND / 4).unwrap();
            assert_eq!((start.epoch, start.late), (1, SECOND / 4));
            assert_eq!((schedule.poll(due + SECOND * 60), schedule.poll_timeout()), (None, None), "it runs already");
            schedule.finished(&id("a"), 1, SECOND, due + SECOND * (1 + round));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_missed_run_is_not_made_up_for() {
        let begin = crate::clock::now();
        let mut schedule = Schedule::default();
        schedule.insert(id("a"), 1, NET, 0.0, begin);
        schedule.poll(begin).unwrap();
        let end = begin + SECOND * 35;
        schedule.finished(&id("a"), 1, SECOND * 35, end);
        assert_eq!(schedule.poll_timeout(), Some(end + SECOND * 10));
    }

    #[tokio::test(start_paused = true)]
    async fn targets_that_hang_hold_back_each_other_and_not_the_rest() {
        let begin = crate::clock::now();
        let mut schedule = Schedule::default();
        let slow = Lane::SlowNet.runs_max() + 50;
        for at in 0..slow {
            schedule.insert(id(&format!("hangs-{at}")), 1, NET, 0.0, begin);
        }
        let mut starts = 0;
        while schedule.poll(begin).is_some() {
            starts += 1;
        }
        assert_eq!(starts, slow, "they are not known as slow yet");
        let now = begin + SECOND * 10;
        for at in 0..slow {
            schedule.finished(&id(&format!("hangs-{at}")), 1, SECOND * 10, now);
        }
        schedule.insert(id("good"), 1, NET, 0.0, now + SECOND * 10);
        let due = now + SECOND * 10;
        let started: Vec<Start> = std::iter::from_fn(|| schedule.poll(due)).collect();
        assert_eq!(started.len(), Lane::SlowNet.runs_max() + 1);
        assert_eq!(started[0].id, id("good"));
        assert_eq!(schedule.poll_timeout(), None, "the rest waits for an end, not for a time");
        schedule.finished(&id("hangs-0"), 1, SECOND, due);
        assert!(schedule.poll(due).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_is_replaced_or_gone_holds_its_place_until_its_run_ends() {
        let begin = crate::clock::now();
        let mut schedule = Schedule::default();
        let process = (Lane::Process, SECOND);
        for at in 0..Lane::Process.runs_max() {
            schedule.insert(id(&at.to_string()), 1, process, 0.0, begin);
        }
        while schedule.poll(begin).is_some() {}
        schedule.insert(id("0"), 2, process, 0.0, begin);
        schedule.remove(&id("1"));
        assert_eq!(schedule.poll(begin), None);
        // The end of the old run starts the new one, and reschedules nothing of the old one.
        schedule.finished(&id("0"), 1, SECOND, begin);
        let start = schedule.poll(begin).unwrap();
        assert_eq!((start.id, start.epoch), (id("0"), 2));
        schedule.finished(&id("1"), 1, SECOND, begin);
        assert_eq!(schedule.poll(begin + SECOND * 60), None);
        assert_eq!(schedule.poll_timeout(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_checks_are_spread_and_each_keeps_its_rate() {
        let seed = 7;
        let mut rng = StdRng::seed_from_u64(seed);
        let begin = crate::clock::now();
        let mut schedule = Schedule::default();
        for at in 0..10_000 {
            schedule.insert(id(&at.to_string()), 1, NET, rng.random_range(0.0..1.0), begin);
        }
        let mut by_second = [0u32; 60];
        while let Some(at) = schedule.poll_timeout().filter(|at| *at < begin + SECOND * 60) {
            let start = schedule.poll(at).unwrap();
            assert_eq!(start.late, Duration::ZERO, "seed {seed}");
            by_second[usize::try_from((at - begin).as_secs()).unwrap()] += 1;
            schedule.finished(&start.id, 1, Duration::from_millis(3), at);
        }
        assert_eq!(by_second.iter().sum::<u32>(), 60_000);
        assert!(by_second.iter().all(|count| (850..1150).contains(count)), "seed {seed}: {by_second:?}");
    }
}

//! The network: latency by region, loss (of all, of one host, one-way), duplicates, reordering, cuts.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;

/// One-way latency inside a region.
const NEAR: Duration = Duration::from_micros(250);
/// One-way latency to the next region; each region further adds as much.
const FAR: Duration = Duration::from_millis(12);

/// What happens to packets between hosts.
#[derive(Debug, Default, Clone)]
pub(crate) struct Net {
    /// Hosts stand in regions in turn; 0 and 1 mean a single one.
    pub(crate) regions: usize,
    /// Part of all packets that is lost.
    pub(crate) loss: f64,
    /// Part of all packets that comes twice.
    pub(crate) duplicate: f64,
    /// Part of all packets that is held up and overtaken.
    pub(crate) reorder: f64,
    /// Part of the packets to this host that is lost, by host.
    pub(crate) loss_in: Vec<f64>,
    /// Part of the packets from this host that is lost, by host.
    pub(crate) loss_out: Vec<f64>,
    /// Hosts of different sides do not reach each other.
    pub(crate) side: Vec<u8>,
    /// Pairs (from, to) that nothing passes.
    pub(crate) cuts: BTreeSet<(usize, usize)>,
}

impl Net {
    pub(crate) fn add_host(&mut self) {
        self.loss_in.push(0.0);
        self.loss_out.push(0.0);
        self.side.push(0);
    }

    /// Tells whether packets pass from `from` to `to` at all.
    pub(crate) fn passes(&self, from: usize, to: usize) -> bool {
        self.side[from] == self.side[to] && (self.cuts.is_empty() || !self.cuts.contains(&(from, to)))
    }

    /// Returns the part of the packets from `from` to `to` that is lost.
    pub(crate) fn loss_of(&self, from: usize, to: usize) -> f64 {
        1.0 - (1.0 - self.loss) * (1.0 - self.loss_out[from]) * (1.0 - self.loss_in[to])
    }

    pub(crate) fn is_lost(&self, from: usize, to: usize, rng: &mut StdRng) -> bool {
        let loss = self.loss_of(from, to);
        loss > 0.0 && rng.random_bool(loss.min(1.0))
    }

    /// Draws a one-way latency: the distance and up to as much again, rarely ten times as much near.
    pub(crate) fn latency(&self, from: usize, to: usize, rng: &mut StdRng) -> Duration {
        let regions = self.regions.max(1);
        let (a, b) = (from % regions, to % regions);
        let distance = NEAR + FAR * u32::try_from(a.abs_diff(b)).unwrap();
        let jitter = if rng.random_bool(0.01) { NEAR * 10 } else { NEAR };
        distance.mul_f64(rng.random_range(1.0..1.3)) + jitter.mul_f64(rng.random_range(0.0..1.0))
    }

    /// Returns when the copies of one packet arrive; none if it is lost.
    pub(crate) fn carry(&self, from: usize, to: usize, rng: &mut StdRng) -> Vec<Duration> {
        let mut arrivals = Vec::new();
        if !self.passes(from, to) {
            return arrivals;
        }
        let copies = if self.duplicate > 0.0 && rng.random_bool(self.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            if self.is_lost(from, to, rng) {
                continue;
            }
            let held = self.reorder > 0.0 && rng.random_bool(self.reorder);
            let delay = if held { Duration::from_millis(rng.random_range(1..80)) } else { Duration::ZERO };
            arrivals.push(self.latency(from, to, rng) + delay);
        }
        arrivals
    }

    /// Draws how long a stream takes for `bytes` from `from` to `to`: what is lost is sent again after QUIC's probe
    /// time-out, which doubles. A cut is looked at when it would arrive.
    pub(crate) fn stream_time(&self, from: usize, to: usize, bytes: usize, rng: &mut StdRng) -> Duration {
        let latency = self.latency(from, to, rng);
        let mut time = latency + Duration::from_nanos(8 * bytes as u64);
        let probe = (latency * 4).max(Duration::from_millis(30));
        // One loss is found by the packets behind it; only the loss of a whole flight costs a time-out.
        let flights = u32::try_from(bytes / 12_000).unwrap_or(u32::MAX).min(20) + 1;
        for _ in 0..flights {
            let mut wait = probe;
            while self.is_lost(from, to, rng) && time < Duration::from_secs(30) {
                time += wait;
                wait *= 2;
            }
        }
        time
    }
}

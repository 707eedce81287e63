//! Congestion control of tunnels: Cubic, which is spared the losses that no queue explains.
//!
//! ```text
//!   loss --> few of all that was sent (2 %), and answers come as fast as ever? --yes--> the window stays
//!                                        | no
//!                                        v
//!                                      Cubic
//! ```
//!
//! Cubic takes every lost packet for a full queue and gives back three tenths of its window. On a path that loses one packet
//! in a hundred by itself, a tunnel that carries all requests between two nodes then lives on a few dozen packets in flight.
//! BBR (draft-ietf-ccwg-bbr §5.5.10.2) tolerates 2 % of loss in a round; here the same bound is taken over some hundred
//! packets, and only while the round trip says that there is no queue, so that a flow which fills a deep buffer gives way
//! to others as Cubic does.
//!
//! Its window is at least that of some packets ([`WINDOW_PACKETS_MIN`]): with jumbo frames Cubic's first would be one.
//!
//! Invariants: what Cubic is told, it is told as it happened; ECN marks, persistent congestion (RFC 9002 §7.6) and the loss that
//! ends slow start are always told. Beside that it notes what leaves ([`Departures`]), which quinn tells nobody else.
//! Not here: what a lost packet is (quinn, RFC 9002 §6).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};
use quinn_proto::RttEstimator;

use super::tune::UNACKNOWLEDGED_MAX;

/// Lost bytes in a thousand up to which loss may be the path's own: BBR's `LossThresh`.
const LOSS_PERMILLE_MAX: u64 = 20;
/// Packets over which loss is counted, at least; at most twice as many. Of 256 packets that are lost at 1 % more than 2 % are
/// gone once in twenty times, of 512 once in a hundred.
const COUNTED_PACKETS: u64 = 256;
/// Packets that may be on the way at least: one more than the peer leaves unacknowledged, and one because quinn sends while
/// there is room for more than a packet. RFC 9002 §7.2 says two, of which the peer would leave both for 25 ms; BBR has four.
pub(super) const WINDOW_PACKETS_MIN: u64 = UNACKNOWLEDGED_MAX as u64 + 2;
/// Round trip above the shortest one that is not yet a queue: two agents on busy hosts wait for a processor as long as that.
const QUEUE_MAX: Duration = Duration::from_millis(5);

/// What left by a path, noted by its controller. The connection's own thread writes it.
#[derive(Debug, Default)]
pub(crate) struct Departures {
    sent: AtomicU64,
    drained_at: AtomicU64,
}

impl Departures {
    /// Bytes that left, packets' headers included.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// What [`Departures::sent`] was when an acknowledgement last found that all there was to send had left.
    pub(crate) fn drained_at(&self) -> u64 {
        self.drained_at.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    fn drained(&self) {
        self.drained_at.store(self.sent(), Ordering::Relaxed);
    }
}

/// Returns what leaves by the path that `connection` takes: another one after the peer's address changed. None where the
/// connection was not made by this module's parent.
pub(crate) fn departures(connection: &quinn::Connection) -> Option<Arc<Departures>> {
    let own = connection.congestion_state().into_any().downcast::<Tolerant>().ok()?;
    Some(Arc::clone(&own.departures))
}

/// Makes a [`Tolerant`] per path.
#[derive(Debug, Default)]
pub(super) struct TolerantConfig(Arc<CubicConfig>);

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant {
            cubic: Cubic::new(Arc::clone(&self.0), now, current_mtu),
            losses: Losses::new(current_mtu),
            has_left_slow_start: false,
            departures: Arc::default(),
        })
    }
}

/// Cubic behind [`Losses`].
#[derive(Debug, Clone)]
struct Tolerant {
    cubic: Cubic,
    losses: Losses,
    has_left_slow_start: bool,
    /// Shared by copies: quinn makes one where an address changes but not the host.
    departures: Arc<Departures>,
}

impl Controller for Tolerant {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.departures.add(bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        if app_limited {
            self.departures.drained();
        }
        self.losses.arrived(bytes, rtt.get(), rtt.min());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        let is_tolerable = self.losses.lost(lost_bytes);
        // ECN marks come with no lost bytes: a router says that it queues.
        if is_tolerable && self.has_left_slow_start && !is_persistent_congestion && lost_bytes > 0 {
            return;
        }
        self.has_left_slow_start = true;
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.losses.mtu = new_mtu.into();
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().max(WINDOW_PACKETS_MIN * self.losses.mtu)
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What arrived and what was lost of the last packets, and whether they met a queue.
#[derive(Debug, Clone)]
struct Losses {
    /// Bytes of a packet.
    mtu: u64,
    /// Bytes of the span that is being counted, and of the one before it.
    now: Span,
    before: Span,
    has_queue: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Span {
    arrived: u64,
    lost: u64,
}

impl Losses {
    fn new(mtu: u16) -> Self {
        Self { mtu: mtu.into(), now: Span::default(), before: Span::default(), has_queue: false }
    }

    /// Takes in an acknowledged packet; `rtt` is smoothed, `rtt_min` the path's shortest.
    fn arrived(&mut self, bytes: u64, rtt: Duration, rtt_min: Duration) {
        self.has_queue = rtt > 2 * rtt_min + QUEUE_MAX;
        self.now.arrived += bytes;
        self.turn();
    }

    /// Takes in lost packets; returns true if the path may have lost them by itself.
    fn lost(&mut self, bytes: u64) -> bool {
        self.now.lost += bytes;
        self.turn();
        let lost = self.now.lost + self.before.lost;
        // A young connection has sent too little to tell: what is not yet known counts as arrived.
        let all = (self.now.arrived + self.before.arrived + lost).max(COUNTED_PACKETS * self.mtu);
        !self.has_queue && lost * 1_000 <= all * LOSS_PERMILLE_MAX
    }

    fn turn(&mut self) {
        if self.now.arrived + self.now.lost >= COUNTED_PACKETS * self.mtu {
            self.before = std::mem::take(&mut self.now);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const MTU: u16 = 1_452;

    /// Sends `packets` with a chance of loss; returns how many losses were passed on, in a thousand packets.
    fn told(loss: f64, rtt: Duration, rtt_min: Duration) -> u64 {
        let mut rng = StdRng::seed_from_u64(7);
        let mut losses = Losses::new(MTU);
        let packets = 100_000;
        let told = (0..packets).filter(|_packet| {
            if rng.random_bool(loss) {
                return !losses.lost(MTU.into());
            }
            losses.arrived(MTU.into(), rtt, rtt_min);
            false
        });
        told.count() as u64 * 1_000 / packets
    }

    #[test]
    fn what_a_path_loses_by_itself_is_not_told_and_what_a_queue_drops_is() {
        let (fast, queued) = (Duration::from_micros(400), Duration::from_millis(8));
        assert_eq!(told(0.005, fast, fast), 0);
        // Of ten losses in a thousand packets: next to none.
        assert!(told(0.01, fast, fast) <= 1, "{}", told(0.01, fast, fast));
        // Congestion that shows in losses alone (a shallow buffer), and in waiting alone.
        assert!(told(0.05, fast, fast) >= 45, "{}", told(0.05, fast, fast));
        assert_eq!(told(0.01, queued, fast), told(1.0 - 0.99, queued, fast));
        assert!(told(0.01, queued, fast) >= 9);
        // A far peer's round trip is no queue, twice that is.
        assert!(told(0.01, Duration::from_millis(90), Duration::from_millis(80)) <= 1);
        assert!(told(0.01, Duration::from_millis(180), Duration::from_millis(80)) >= 9);
    }

    #[test]
    fn the_end_of_slow_start_marks_of_routers_and_persistent_congestion_are_told() {
        let now = crate::clock::now().into_std();
        let controller = || Arc::new(TolerantConfig::default()).build(now, MTU);
        let at = |seconds| now + Duration::from_secs(seconds);
        let window =
            |control: &dyn Controller| control.clone_box().into_any().downcast::<Tolerant>().unwrap().cubic.window();
        let mut control = controller();
        let start = window(&*control);
        control.on_congestion_event(at(1), at(1), false, MTU.into());
        let reduced = window(&*control);
        assert!(reduced < start, "slow start ends");
        control.on_congestion_event(at(2), at(2), false, MTU.into());
        assert_eq!(window(&*control), reduced, "one packet of 256");
        control.on_congestion_event(at(3), at(3), false, 0);
        let marked = window(&*control);
        assert!(marked < reduced, "an ECN mark");
        control.on_congestion_event(at(4), at(4), true, MTU.into());
        assert!(window(&*control) < marked, "persistent congestion");
        // As much as Cubic would: a burst of loss.
        let (mut tolerant, mut cubic) = (controller(), Arc::new(CubicConfig::default()).build(now, MTU));
        for second in 1..5 {
            for control in [&mut tolerant, &mut cubic] {
                control.on_congestion_event(at(second), at(second), false, 20 * u64::from(MTU));
            }
        }
        assert_eq!(window(&*tolerant), cubic.window());
    }

    #[test]
    fn more_packets_may_be_on_the_way_than_the_peer_leaves_unacknowledged_whatever_the_path_s_mtu_and_losses() {
        let now = crate::clock::now().into_std();
        for mtu in [1_200, MTU, 6_500, 8_972] {
            let mut control = Arc::new(TolerantConfig::default()).build(now, 1_200);
            // The search for the path's MTU ends before much was sent.
            control.on_mtu_update(mtu);
            for seconds in 0..3 {
                // As quinn does: it sends while a packet more stays below the window.
                let packets = (control.window() - 1) / u64::from(mtu);
                assert!(packets > UNACKNOWLEDGED_MAX.into(), "{packets} packets of {mtu}, after {seconds} s");
                let at = now + Duration::from_secs(seconds);
                control.on_congestion_event(at, at, true, mtu.into());
            }
        }
    }
}

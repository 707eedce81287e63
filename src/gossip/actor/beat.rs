//! The beat: when this node asks the ports of those that it watches, and checks one of them, in one wake-up.
//!
//! ```text
//!   rank on the ring, wall time -> Rhythm -> at -> the actor wakes: ports are asked, the engine checks one
//! ```
//!
//! The two watchers of a member beat half a period apart by wall time, so that where the hosts' clocks agree within 50 ms one
//! asks within 365 ms; where they do not, the phases are random: within 495 ms in 99 of 100 cases, less what the packets of
//! QUIC hear. Not here: the questions (`evidence`), the checks (`membership`).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock;
use crate::membership::WATCH_PERIOD;

/// By how much the beats of a mesh are spread: agents that share a host do not all wake at once.
const SPREAD_MS: u64 = 40;

/// When a node beats: at wall times that are `phase` after a multiple of `every`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rhythm {
    /// Some milliseconds at least.
    every: Duration,
    /// Less than a period.
    phase: Duration,
}

impl Rhythm {
    /// That of the node of this rank among so many living; `nonce` is its own.
    ///
    /// Its neighbours on the ring, which watch one of those that it watches too, beat half a period before and after it. On a
    /// ring of an odd number the last one beats in between: two members are asked twice within a quarter of a period, and then
    /// not for three. Of two, each is alone with the other and asks twice as often.
    pub(super) fn of((rank, living): (usize, usize), nonce: u64) -> Self {
        let phase = match (rank % 2, living % 2) {
            (0, 1) if rank + 1 == living => WATCH_PERIOD / 4,
            (0, _) => Duration::ZERO,
            _ => WATCH_PERIOD / 2,
        };
        let every = if living == 2 { WATCH_PERIOD / 2 } else { WATCH_PERIOD };
        Self { every, phase: phase + Duration::from_millis(nonce % SPREAD_MS) }
    }

    /// Returns how long it is to the next beat that is not upon us: a quarter of a period at least.
    fn rest(self, wall_ms: u64) -> Duration {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (every, phase) = (millis(self.every).max(1), millis(self.phase));
        let since = wall_ms.wrapping_add(every).wrapping_sub(phase % every) % every;
        let rest = every - since;
        Duration::from_millis(if rest < every / 4 { rest + every } else { rest })
    }
}

/// The next beat, and those who ask ports at it.
#[derive(Debug)]
pub(super) struct Beat {
    rhythm: Rhythm,
    /// None: nobody is watched.
    at: Option<Instant>,
    asks: watch::Sender<()>,
}

impl Beat {
    /// Rests until somebody is watched.
    pub(super) fn new(rhythm: Rhythm) -> Self {
        Self { rhythm, at: None, asks: watch::Sender::new(()) }
    }

    /// When the next one is due; none: nobody is watched.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// Goes on in `rhythm` after the next beat, while `is_watching`.
    pub(super) fn set(&mut self, rhythm: Rhythm, is_watching: bool, now: Instant) {
        self.rhythm = rhythm;
        self.at = is_watching.then(|| self.at.unwrap_or_else(|| now + rhythm.rest(clock::wall_ms())));
    }

    /// Has the ports asked that are watched.
    pub(super) fn strike(&mut self, now: Instant) {
        self.asks.send_replace(());
        self.at = Some(now + self.rhythm.rest(clock::wall_ms()));
    }

    /// Changes at each beat.
    pub(super) fn asks(&self) -> watch::Receiver<()> {
        self.asks.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECHECK: Duration = Duration::from_millis(27);

    #[test]
    fn the_two_watchers_of_a_member_beat_in_turn_in_a_mesh_of_any_size() {
        for living in 3..60 {
            for nonce in [0, 39, 12_345] {
                let phase = |rank: usize| {
                    let at = rank % living;
                    // Neighbours differ in their nonces as much as they can.
                    Rhythm::of((at, living), if at.is_multiple_of(3) { nonce } else { 0 }).phase
                };
                for member in 0..living {
                    let (last, before) = (phase(member + living - 1), phase(member + living - 2));
                    let gap = last.abs_diff(before);
                    let longest = gap.max(WATCH_PERIOD.saturating_sub(gap)) + RECHECK;
                    assert!(longest < Duration::from_millis(500), "{living}: member {member}: {longest:?}");
                    let is_even = living % 2 == 0 || member > 1;
                    assert!(!is_even || longest < Duration::from_millis(345), "{living}: member {member}: {longest:?}");
                }
            }
        }
        let alone = Rhythm::of((1, 2), 39);
        assert!(alone.every + RECHECK < Duration::from_millis(345), "{alone:?}");
    }

    #[test]
    fn a_beat_comes_at_its_wall_times_and_a_slow_clock_does_not_make_two_of_it() {
        let every = Duration::from_millis(500);
        let beats = |phase| {
            let rhythm = Rhythm { every, phase: Duration::from_millis(phase) };
            let mut now: u64 = 1_700_000_000_123;
            std::iter::repeat_with(move || {
                now += u64::try_from(rhythm.rest(now).as_millis()).unwrap();
                now
            })
        };
        for (first, second) in beats(130).zip(beats(380)).take(20) {
            assert_eq!((first % 500, second % 500), (130, 380));
        }
        let gaps: Vec<u64> = beats(499).take(9).collect();
        assert!(gaps.windows(2).all(|pair| pair[1] - pair[0] == 500), "{gaps:?}");
        assert_eq!(Rhythm { every, phase: Duration::ZERO }.rest(999), Duration::from_millis(501));
    }

    #[test]
    fn it_rests_while_nobody_is_watched_and_a_new_rhythm_puts_no_beat_off() {
        let now = clock::now();
        let (one, other) = (Rhythm::of((0, 4), 0), Rhythm::of((1, 4), 0));
        let mut beat = Beat::new(one);
        assert_eq!(beat.at(), None);
        beat.set(one, true, now);
        let at = beat.at().unwrap();
        assert!(at > now && at <= now + WATCH_PERIOD * 5 / 4);
        for later in 0..100 {
            beat.set(if later % 2 == 0 { other } else { one }, true, now + Duration::from_millis(later));
        }
        assert_eq!(beat.at(), Some(at));
        let mut asks = beat.asks();
        beat.strike(at);
        assert!(asks.has_changed().unwrap() && beat.at().unwrap() > at);
        asks.mark_unchanged();
        beat.set(one, false, at);
        assert_eq!(beat.at(), None);
    }
}

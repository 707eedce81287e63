//! The wall time that a node keeps on disk, so that a clock that went back while it was off costs it nothing.
//!
//! ```text
//!   start:       file `clock` -> believable? -> clock::hold: wall time goes on from there
//!   every 30 s:  wall time -> file `clock`;  held, and refuted -> clock::let_go
//!                refuted: the other members' clocks are nearer to the host's, or nobody answers for 5 min
//! ```
//!
//! Certificates of an hour make a host whose clock is an hour back a stranger to everybody. Right after a restart the node
//! knows better what time it is: later than when it last looked. That word may be wrong too (the clock was ahead then), so it
//! counts for a day's difference at most, and only while others agree: by the clocks that they tell (`gossip::documents`), or, where
//! the difference is so large that nobody lets the node in, by silence. A node that was off for longer than its clock went back learns nothing from the file.
//!
//! Not here: a clock that goes back while the node runs (leaves are minted anew, `pki::Identity`; the host's clock is followed).

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::clock::{self, Kept};
use crate::gossip::GossipHandle;
use crate::store::Store;
use crate::telemetry::Chain;

/// How often the time is kept: with the 60 s by which certificates begin in the past, a node that is off for less than
/// half a minute takes all that the others show it.
const KEEP_EVERY: Duration = Duration::from_secs(30);
/// A held clock at which nobody answers for so long is let go. Others that start after the same power loss are up by then.
const LET_GO_AFTER: Duration = Duration::from_mins(5);
/// A difference below this is a clock that is being set, and nobody's concern.
const TOLD_FROM: Duration = Duration::from_secs(10);

/// Takes up the wall time where the last run left it.
pub(super) fn take_up(store: &Store) {
    let (Some(kept), Some(file)) = (store.kept_wall(), store.clock_file()) else { return };
    match clock::hold(kept) {
        Kept::Ahead(by) if by >= TOLD_FROM => warn!(
            seconds = by.as_secs(),
            file = %file.display(),
            "this host's clock is behind the time at which the agent last ran; going on from that time: set the clock (if it \
             is right and that time was not, the agent finds out by the other members within 5 min; to have it at once, stop it and remove the file)"
        ),
        Kept::Ahead(by) => debug!(?by, "the clock is a little behind the time at which the agent last ran"),
        Kept::TooFar(by) => warn!(
            seconds = by.as_secs(),
            believed_seconds = clock::HELD_AHEAD_MAX.as_secs(),
            file = %file.display(),
            "this host's clock is far behind the time at which the agent last ran; going by the clock as it is: if it is wrong, \
             set it and start the agent again"
        ),
        Kept::Past => {}
    }
}

/// Keeps the wall time, and lets a wrong one go, until `stop`.
pub(super) async fn keep(store: Store, gossip: GossipHandle, stop: CancellationToken) {
    let (mut held, mut is_refused) = (Held::default(), false);
    loop {
        // At once, too: a time that was not believed is not asked about again.
        write(&store, &mut is_refused).await;
        tokio::select! {
            () = stop.cancelled() => return write(&store, &mut is_refused).await,
            () = tokio::time::sleep(KEEP_EVERY) => {}
        }
        let ahead = clock::held_ahead();
        let skew = gossip.documents().view().skew.map(|skew| skew.median_seconds);
        match held.look(ahead, Others { is_isolated: gossip.members().isolated, skew_seconds: skew }, clock::now()) {
            Some(Turn::LetGo) => {
                clock::let_go();
                warn!(
                    seconds = ahead.as_secs(),
                    "the others do not go by the time of the last run, or do not answer at it; going by this host's clock, which is behind it"
                );
            }
            Some(Turn::CaughtUp) => info!("this host's clock has caught up with the time of the last run"),
            None => {}
        }
    }
}

/// Keeps this moment's wall time; says so once while the disk refuses it.
async fn write(store: &Store, is_refused: &mut bool) {
    let (store, now) = (store.clone(), clock::wall());
    let kept = tokio::task::spawn_blocking(move || store.keep_wall(now)).await;
    let Ok(Err(error)) = kept else { return *is_refused = false };
    if !std::mem::replace(is_refused, true) {
        warn!(error = %Chain(&error), "cannot keep the wall time; a clock that goes back before the next start will not be noticed");
    }
}

/// What a node knows of the other members' clocks.
#[derive(Debug, Clone, Copy)]
struct Others {
    /// Nobody answers.
    is_isolated: bool,
    /// Median of their clocks less this one's, as it is held; none: none was measured.
    skew_seconds: Option<f64>,
}

impl Others {
    /// Whether their clocks are nearer to the host's than to one that is held `ahead` of it.
    fn go_by_the_host(self, ahead: Duration) -> bool {
        self.skew_seconds.is_some_and(|skew| skew < -0.5 * ahead.as_secs_f64())
    }
}

/// What becomes of a held clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    LetGo,
    CaughtUp,
}

/// How it goes with a clock that is held.
#[derive(Debug, Default)]
struct Held {
    was_held: bool,
    alone_since: Option<Instant>,
}

impl Held {
    /// Looks by how much the clock is held `ahead`, and what the others say to it.
    fn look(&mut self, ahead: Duration, others: Others, now: Instant) -> Option<Turn> {
        if ahead.is_zero() {
            self.alone_since = None;
            return std::mem::take(&mut self.was_held).then_some(Turn::CaughtUp);
        }
        self.was_held = true;
        self.alone_since = others.is_isolated.then(|| self.alone_since.unwrap_or(now));
        let is_long_alone = self.alone_since.is_some_and(|since| now.saturating_duration_since(since) >= LET_GO_AFTER);
        if !is_long_alone && !others.go_by_the_host(ahead) {
            return None;
        }
        *self = Self::default();
        Some(Turn::LetGo)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    const SILENT: Others = Others { is_isolated: true, skew_seconds: None };

    #[test]
    fn a_held_clock_at_which_nobody_answers_for_five_minutes_is_let_go() {
        let (mut held, begin) = (Held::default(), clock::now());
        for seconds in (0..300).step_by(30) {
            assert_eq!(held.look(HOUR, SILENT, begin + Duration::from_secs(seconds)), None, "after {seconds} s");
        }
        assert_eq!(held.look(HOUR, SILENT, begin + LET_GO_AFTER), Some(Turn::LetGo));
        assert_eq!(held.look(Duration::ZERO, SILENT, begin + 2 * LET_GO_AFTER), None, "it is told once");
    }

    #[test]
    fn a_held_clock_is_let_go_where_the_others_go_by_the_hosts() {
        for (ahead_seconds, skew_seconds, verdict) in [
            // They go by the time that is held; it lags by what passed since it was kept.
            (3600, 0.0, None),
            (3600, 45.0, None),
            (300, -2.0, None),
            // They go by the host's.
            (300, -300.0, Some(Turn::LetGo)),
            (300, -290.0, Some(Turn::LetGo)),
            (20, -19.0, Some(Turn::LetGo)),
        ] {
            let others = Others { is_isolated: false, skew_seconds: Some(skew_seconds) };
            let seen = Held::default().look(Duration::from_secs(ahead_seconds), others, clock::now());
            assert_eq!(seen, verdict, "{ahead_seconds} s ahead, {skew_seconds} s");
        }
    }

    #[test]
    fn a_held_clock_at_which_somebody_answers_holds_until_the_hosts_has_caught_up() {
        let (mut held, begin) = (Held::default(), clock::now());
        for minutes in 0..600 {
            // Alone for four minutes of five.
            let others = Others { is_isolated: minutes % 5 != 4, skew_seconds: None };
            assert_eq!(held.look(HOUR, others, begin + Duration::from_mins(minutes)), None, "after {minutes} min");
        }
        let others = Others { is_isolated: false, skew_seconds: None };
        assert_eq!(held.look(Duration::ZERO, others, begin + 10 * HOUR), Some(Turn::CaughtUp));
        assert_eq!(held.look(Duration::ZERO, others, begin + 11 * HOUR), None);
    }
}

//! How near an end is that somebody must do something about: an operator's certificate takes its documents along.

use std::time::Duration;

use crate::clock::UnixSeconds;

const DAY: Duration = Duration::from_hours(24);

/// How near an end is, the nearest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// Nobody needs to care.
    Far,
    /// 14 days are left, or a quarter of a shorter life: time to plan.
    Soon,
    /// 3 days, or a tenth.
    Near,
    /// A day, or a twentieth.
    Last,
    /// It is over.
    Ended,
}

/// Tells how near the end of something is that lasts from `begins` to `ends`.
pub fn notice(begins: UnixSeconds, ends: UnixSeconds, now: UnixSeconds) -> Notice {
    if now > ends {
        return Notice::Ended;
    }
    let (life, left) = (ends.since(begins), ends.since(now));
    let is_within = |most: Duration, share: u32| left <= most.min(life / share);
    match () {
        () if is_within(DAY, 20) => Notice::Last,
        () if is_within(3 * DAY, 10) => Notice::Near,
        () if is_within(14 * DAY, 4) => Notice::Soon,
        () => Notice::Far,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_weeks_ahead_and_of_a_short_life_by_its_share() {
        #[track_caller]
        fn check(life: Duration, left: Duration, want: Notice) {
            let (begins, ends) = (UnixSeconds(1_000_000), UnixSeconds(1_000_000).plus(life));
            assert_eq!(notice(begins, ends, ends.minus(left)), want, "{left:?} of {life:?}");
        }
        let (year, minute) = (365 * DAY, Duration::from_mins(1));
        check(year, 15 * DAY, Notice::Far);
        check(year, 14 * DAY, Notice::Soon);
        check(year, 3 * DAY, Notice::Near);
        check(year, DAY, Notice::Last);
        check(year, Duration::ZERO, Notice::Last);
        check(60 * minute, 16 * minute, Notice::Far);
        check(60 * minute, 15 * minute, Notice::Soon);
        check(60 * minute, 6 * minute, Notice::Near);
        check(60 * minute, 3 * minute, Notice::Last);
        assert_eq!(notice(UnixSeconds(1), UnixSeconds(2), UnixSeconds(3)), Notice::Ended);
    }
}

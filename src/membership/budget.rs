//! How many signatures one peer can make this node check.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::NodeName;

/// One window of counting.
const WINDOW: Duration = Duration::from_secs(1);
/// Checks in a window on behalf of one sender: it passes on what it verified, at most 7 statements in each of 15 packets.
const PER_SENDER_MAX: u32 = 105;
/// Checks in a window in all: a quarter of a core at 0.25 ms each (a chain and a signature).
const ALL_MAX: u32 = 1000;
/// Accusations of one accuser in a window of ten: who watches two members and probes one finds far fewer dead.
const PER_ACCUSER_MAX: u32 = 64;
const ACCUSER_WINDOW: Duration = Duration::from_secs(10);

/// Counts per window; the maps are cleared with it, so they hold at most the senders of one window.
#[derive(Debug)]
pub(super) struct Budget {
    ends: Instant,
    all: u32,
    senders: BTreeMap<NodeName, u32>,
    accusers_end: Instant,
    accusers: BTreeMap<NodeName, u32>,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            ends: now + WINDOW,
            all: 0,
            senders: BTreeMap::new(),
            accusers_end: now + ACCUSER_WINDOW,
            accusers: BTreeMap::new(),
        }
    }

    /// Takes one check on behalf of `sender`; false if there is none left.
    pub(super) fn take(&mut self, sender: &NodeName, now: Instant) -> bool {
        if now >= self.ends {
            self.ends = now + WINDOW;
            self.all = 0;
            self.senders.clear();
        }
        let spent = self.senders.entry(sender.clone()).or_default();
        if *spent >= PER_SENDER_MAX || self.all >= ALL_MAX {
            return false;
        }
        *spent += 1;
        self.all += 1;
        true
    }

    /// Takes one accusation of `accuser`; false if it accuses too many.
    pub(super) fn accuse(&mut self, accuser: &NodeName, now: Instant) -> bool {
        if now >= self.accusers_end {
            self.accusers_end = now + ACCUSER_WINDOW;
            self.accusers.clear();
        }
        let spent = self.accusers.entry(accuser.clone()).or_default();
        *spent = spent.saturating_add(1);
        *spent <= PER_ACCUSER_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sender_cannot_spend_what_others_need() {
        let now = crate::clock::now();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut budget = Budget::new(now);
        let taken = (0..1000).filter(|_| budget.take(&a, now)).count();
        assert_eq!(taken, usize::try_from(PER_SENDER_MAX).unwrap());
        assert!(budget.take(&b, now));
        assert!(budget.take(&a, now + WINDOW));
        let accused = (0..1000).filter(|_| budget.accuse(&a, now)).count();
        assert_eq!(accused, usize::try_from(PER_ACCUSER_MAX).unwrap());
        assert!(budget.accuse(&a, now + ACCUSER_WINDOW));
    }

    #[test]
    fn all_senders_together_cost_no_more_than_a_quarter_of_a_core() {
        let now = crate::clock::now();
        let mut budget = Budget::new(now);
        let mut spend = |at| {
            let senders = (0..100).map(|number| format!("n{number}").parse::<NodeName>().unwrap());
            senders.map(|name| (0..1000).filter(|_| budget.take(&name, at)).count()).sum::<usize>()
        };
        let most = usize::try_from(ALL_MAX).unwrap();
        assert_eq!((spend(now), spend(now), spend(now + WINDOW)), (most, 0, most));
    }
}

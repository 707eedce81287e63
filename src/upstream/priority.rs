//! What is refused first when a service has as much as it bears.

use std::fmt;
use std::str::FromStr;

/// How much a request matters, the least first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A copy of weft's own (hedging): it may be left out at any time. Nobody can claim it.
    Spare,
    /// May be refused at any time: prefetching, batches.
    Sheddable,
    /// Later will do.
    Low,
    /// What says nothing.
    #[default]
    Normal,
    /// Must get through: sign-in, payment, health.
    High,
}

impl Priority {
    /// Those that may be claimed, the least first.
    pub const CLAIMED: [Self; 4] = [Self::Sheddable, Self::Low, Self::Normal, Self::High];

    /// Returns the word of `x-weft-priority`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spare => "spare",
            Self::Sheddable => "sheddable",
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }

    /// Returns the part of a limit of `most` that requests of this priority may fill, all of them together; `highest` is
    /// what requests of the pair may claim at most.
    ///
    /// Normal ones have it all, unless some may be high: then the last tenth is kept for those. A limit that is not 0 leaves
    /// room for one of each.
    pub fn part_of(self, most: u32, highest: Self) -> u32 {
        let percent: u64 = match self {
            Self::Spare | Self::Sheddable => 60,
            Self::Low => 80,
            Self::Normal if highest == Self::High => 90,
            Self::Normal | Self::High => 100,
        };
        let part = u64::from(most) * percent / 100;
        u32::try_from(part).unwrap_or(most).max(most.min(1))
    }

    /// Whether a request waits where all instances are busy; others are refused at once.
    pub fn waits(self) -> bool {
        self >= Self::Normal
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::CLAIMED.into_iter().find(|one| one.as_str().eq_ignore_ascii_case(text));
        found.ok_or_else(|| "must be high, normal, low or sheddable".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_priorities_fill_less_of_a_limit_and_normal_ones_all_of_it_unless_some_are_high() {
        let parts = |most, highest| Priority::CLAIMED.map(|one| one.part_of(most, highest));
        assert_eq!(parts(100, Priority::Normal), [60, 80, 100, 100]);
        assert_eq!(parts(100, Priority::High), [60, 80, 90, 100]);
        assert_eq!(parts(1, Priority::High), [1, 1, 1, 1]);
        assert_eq!(parts(0, Priority::High), [0, 0, 0, 0]);
        assert_eq!(parts(u32::MAX, Priority::Normal)[3], u32::MAX);
    }

    #[test]
    fn nobody_can_claim_to_be_a_copy() {
        assert!("spare".parse::<Priority>().is_err());
        assert_eq!("HIGH".parse(), Ok(Priority::High));
    }
}

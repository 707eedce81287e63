//! Randomness from a seed, and the hash of a call's key. Neither is for secrets.

use std::cell::Cell;

/// Draws numbers (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014: `SplitMix64`).
#[derive(Debug, Clone)]
pub(super) struct Draw(Cell<u64>);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        mix(state)
    }

    /// Draws from 0 to `end - 1`; 0 where that is nothing.
    pub(super) fn below(&self, end: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(end);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// Draws from 0 to 1, 1 excluded.
    pub(super) fn unit(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let drawn = (self.next() >> 11) as f64;
        drawn / 9_007_199_254_740_992.0
    }
}

/// Spreads the bits of a number over all 64.
pub(super) fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Hashes bytes, the same on every node (FNV-1a, its bits spread).
pub fn key_of(bytes: &[u8]) -> u64 {
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

//! What others bring about in the log: told seldom, and shortly.
//!
//! Whoever reaches a port can have something refused as often as it likes, and who speaks with this agent can give reasons of
//! any length. Counters count each time; a line is for the first ones, and says how many were left out since the one before.
//!
//! Invariants: a [`Seldom`] has at most so many lines written in a minute, whatever comes; an [`Excerpt`] is one line of at
//! most [`EXCERPT_CHARS_MAX`] characters and the length of the whole.
//! Not here: what is worth a line, and what is counted (each module).

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Lines are counted over this time.
const WINDOW: Duration = Duration::from_mins(1);
/// What a log line gives of another's text: a sentence of weft's own fits.
const EXCERPT_CHARS_MAX: usize = 256;

/// When a kind of line was written.
#[derive(Debug)]
pub struct Seldom {
    most: u32,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    /// Since when lines are counted, and how many were written since.
    window: Option<(Instant, u32)>,
    left_out: u64,
}

impl Default for Seldom {
    /// One line a minute.
    fn default() -> Self {
        Self::new(1)
    }
}

impl Seldom {
    /// At most `most` lines a minute.
    pub fn new(most: u32) -> Self {
        Self { most, told: Mutex::default() }
    }

    /// Returns how many lines were left out since the last one if one is to be written at `now`, and takes it for written;
    /// none: this one is left out.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut guard = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let told = &mut *guard;
        let (_, lines) = match &mut told.window {
            Some(window) if now.saturating_duration_since(window.0) < WINDOW => window,
            window => window.insert((now, 0)),
        };
        if *lines >= self.most {
            told.left_out = told.left_out.saturating_add(1);
            return None;
        }
        *lines += 1;
        Some(std::mem::take(&mut told.left_out))
    }
}

/// The beginning of what somebody else says, on one line; to be recorded with `%`.
#[derive(Debug, Clone, Copy)]
pub struct Excerpt<'a>(pub &'a str);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for char in chars.by_ref().take(EXCERPT_CHARS_MAX) {
            // Line ends, and what moves a terminal's cursor, reverses text or hides it.
            if char == '\\' || char.escape_debug().len() == 1 || matches!(char, '"' | '\'') {
                write!(f, "{char}")?;
            } else {
                write!(f, "{}", char.escape_debug())?;
            }
        }
        match chars.as_str().len() {
            0 => Ok(()),
            _ => write!(f, "... ({} bytes in all)", self.0.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn so_many_lines_are_written_in_a_minute_and_the_next_one_says_how_many_were_not() {
        #[track_caller]
        fn check(most: u32, want: &[(u64, u64)]) {
            let (told, now) = (Seldom::new(most), clock::now());
            let due = |second: u64| Some((second, told.due(now + Duration::from_secs(second))?));
            assert_eq!((0..130).filter_map(due).collect::<Vec<_>>(), want);
        }
        check(1, &[(0, 0), (60, 59), (120, 59)]);
        check(3, &[(0, 0), (1, 0), (2, 0), (60, 57), (61, 0), (62, 0), (120, 57), (121, 0), (122, 0)]);
        check(0, &[]);
    }

    #[test]
    fn what_others_say_is_one_short_line() {
        assert_eq!(Excerpt("no `web`: it's \"full\" (é) C:\\x").to_string(), "no `web`: it's \"full\" (é) C:\\x");
        assert_eq!(Excerpt("a\r\nERROR forged\u{1b}[2J\u{202e}").to_string(), "a\\r\\nERROR forged\\u{1b}[2J\\u{202e}");
        let long = "é".repeat(EXCERPT_CHARS_MAX + 1);
        let shown = Excerpt(&long).to_string();
        assert_eq!(shown, format!("{}... (514 bytes in all)", "é".repeat(EXCERPT_CHARS_MAX)));
        assert_eq!(Excerpt(&long[2..]).to_string(), long[2..]);
    }
}

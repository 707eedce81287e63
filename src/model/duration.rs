//! Durations as Go writes them: `10s`, `1h30m`, `1.5s`, `500ms`.

use std::time::Duration;

/// Longest duration, in nanoseconds: Go's own bound, some 292 years.
const NANOS_MAX: f64 = 9.223_372_036_854_775e18;

/// Parses a duration; negative ones are refused.
///
/// # Errors
/// A sentence that names the text.
pub fn parse(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is no duration; write it like 10s, 500ms or 1h30m");
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    if unsigned == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = unsigned;
    let mut nanos = 0.0;
    while !rest.is_empty() {
        let number_ends = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let (number, tail) = rest.split_at(number_ends);
        let unit_ends = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_ends);
        let number: f64 = number.parse().map_err(|_| bad())?;
        nanos += number * unit_nanos(unit).ok_or_else(bad)?;
        rest = tail;
    }
    if unsigned.is_empty() {
        return Err(bad());
    }
    from_nanos(nanos).ok_or_else(|| format!("`{text}` is too long a duration"))
}

/// Returns the duration of `nanos` nanoseconds, if it is one.
pub fn from_nanos(nanos: f64) -> Option<Duration> {
    let is_inside = nanos.is_finite() && (0.0..=NANOS_MAX).contains(&nanos);
    // Microseconds are exact up to 285 years in the 53 bits of a float's mantissa; no timer is finer.
    is_inside.then(|| Duration::try_from_secs_f64(nanos / 1e9).ok()).flatten()
}

fn unit_nanos(unit: &str) -> Option<f64> {
    match unit {
        "ns" => Some(1.0),
        "us" | "µs" | "μs" => Some(1e3),
        "ms" => Some(1e6),
        "s" => Some(1e9),
        "m" => Some(60e9),
        "h" => Some(3600e9),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn go_durations_are_read_as_go_reads_them() {
        #[track_caller]
        fn check(text: &str, want_ms: u64) {
            assert_eq!(parse(text), Ok(Duration::from_millis(want_ms)), "{text}");
        }
        check("10s", 10_000);
        check("1h30m", 5_400_000);
        check("500ms", 500);
        check("1.5s", 1500);
        check("+2m", 120_000);
        check("0", 0);
        check("1000us", 1);
    }

    #[test]
    fn other_texts_are_no_durations() {
        for text in ["", "10", "s", "-1s", "1d", "1s5", "1 s", "..s", "99999999999h", "+"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "[0-9.a-zµ+-]{0,20}|.{0,20}") {
            let _unused = parse(&text);
        }
    }
}

//! Durations as Consul's users write them: `1h30m`, `250ms`.

use std::time::Duration;

/// Reads a duration: decimal numbers with the units `ns`, `us`, `ms`, `s`, `m`, `h`, in a row (`1h30m`, `1.5s`).
///
/// A bare `0` is zero; any other number without a unit is refused, since its unit would be a guess.
///
/// # Errors
/// A sentence that says which form is expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is no duration: write a number and a unit (ms, s, m, h), as in 30s or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(refuse());
    }
    while !rest.is_empty() {
        let digits_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refuse)?;
        let (number, tail) = rest.split_at(digits_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let nanoseconds: u128 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(refuse()),
        };
        total = total.checked_add(part(number, nanoseconds).ok_or_else(refuse)?).ok_or_else(refuse)?;
        rest = tail;
    }
    Ok(total)
}

/// Multiplies a decimal number by a unit, exactly; digits below a nanosecond are dropped.
fn part(number: &str, unit_nanoseconds: u128) -> Option<Duration> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanoseconds = whole.checked_mul(unit_nanoseconds)?;
    let mut place = unit_nanoseconds;
    for digit in fraction.chars() {
        place /= 10;
        nanoseconds = nanoseconds.checked_add(place * u128::from(digit.to_digit(10)?))?;
    }
    Some(Duration::from_nanos(u64::try_from(nanoseconds).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_add_up() {
        #[track_caller]
        fn check(text: &str, want: Duration) {
            assert_eq!(parse_duration(text), Ok(want), "{text}");
        }
        check("10s", Duration::from_secs(10));
        check("1h30m", Duration::from_secs(5400));
        check("1.5s", Duration::from_millis(1500));
        check("250ms", Duration::from_millis(250));
        check(".5s", Duration::from_millis(500));
        check("0", Duration::ZERO);
        check("0s", Duration::ZERO);
    }

    #[test]
    fn a_number_without_a_unit_is_refused() {
        for text in ["", "10", "s", "1x", "-1s", "1.2.3s", ".s", "1s ", "99999999999999999999h", "1d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,40}") {
            let _unused = parse_duration(&text);
        }

        #[test]
        fn milliseconds_survive_their_text(ms in 0..u64::from(u32::MAX)) {
            prop_assert_eq!(parse_duration(&format!("{ms}ms")), Ok(Duration::from_millis(ms)));
        }
    }
}

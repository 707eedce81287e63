//! Reads the fields of a JSON object strictly: every problem is kept with its path, unknown fields included.

use std::time::Duration;

use serde_json::{Map, Value};

use super::shape::Problem;

/// Problems named of one entry; more would not be read.
const PROBLEMS_MAX: usize = 32;

/// What is wrong so far.
#[derive(Debug, Default)]
pub(super) struct Problems(pub(super) Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        if self.0.len() < PROBLEMS_MAX {
            self.0.push(Problem { field: field.into(), rule: rule.into() });
        }
    }
}

/// An object; names are taken in any case and in snake_case.
pub(super) struct Fields<'a> {
    path: String,
    left: Vec<(&'a str, &'a Value)>,
}

impl<'a> Fields<'a> {
    /// Takes `value` as an object at `path`.
    pub(super) fn of(path: &str, value: &'a Value, problems: &mut Problems) -> Self {
        let map = value.as_object();
        if map.is_none() {
            problems.add(path, "must be an object");
        }
        let left = map.into_iter().flatten().map(|(name, value)| (name.as_str(), value)).collect();
        Self { path: path.to_owned(), left }
    }

    /// The fields of a whole entry.
    pub(super) fn of_entry(map: &'a Map<String, Value>) -> Self {
        Self { path: String::new(), left: map.iter().map(|(name, value)| (name.as_str(), value)).collect() }
    }

    /// Where a field stands.
    pub(super) fn at(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field out; `null` counts as not given.
    pub(super) fn take(&mut self, name: &str) -> Option<&'a Value> {
        let is_it = |(given, _): &(&str, &Value)| {
            given
                .bytes()
                .filter(|byte| *byte != b'_')
                .map(|byte| byte.to_ascii_lowercase())
                .eq(name.bytes().map(|byte| byte.to_ascii_lowercase()))
        };
        let at = self.left.iter().position(is_it)?;
        let (_, value) = self.left.swap_remove(at);
        (!value.is_null()).then_some(value)
    }

    /// A whole number in `range`.
    pub(super) fn number(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<u32>,
        problems: &mut Problems,
    ) -> Option<u32> {
        let value = self.take(name)?;
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|one| range.contains(one));
        if number.is_none() {
            problems.add(self.at(name), format!("must be a whole number from {} to {}", range.start(), range.end()));
        }
        number
    }

    /// A number in `range`.
    pub(super) fn decimal(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<f64>,
        problems: &mut Problems,
    ) -> Option<f64> {
        let value = self.take(name)?;
        let number = value.as_f64().filter(|number| range.contains(number));
        if number.is_none() {
            problems.add(self.at(name), format!("must be a number from {} to {}", range.start(), range.end()));
        }
        number
    }

    /// A text.
    pub(super) fn text(&mut self, name: &str, problems: &mut Problems) -> Option<&'a str> {
        let value = self.take(name)?;
        let text = value.as_str();
        if text.is_none() {
            problems.add(self.at(name), "must be a text");
        }
        text
    }

    /// Yes or no.
    pub(super) fn flag(&mut self, name: &str, problems: &mut Problems) -> Option<bool> {
        let value = self.take(name)?;
        let flag = value.as_bool();
        if flag.is_none() {
            problems.add(self.at(name), "must be true or false");
        }
        flag
    }

    /// A list.
    pub(super) fn list(&mut self, name: &str, most: usize, problems: &mut Problems) -> &'a [Value] {
        match self.take(name) {
            None => &[],
            Some(Value::Array(list)) if list.len() <= most => list,
            Some(_) => {
                problems.add(self.at(name), format!("must be a list of at most {most}"));
                &[]
            }
        }
    }

    /// A duration from zero to `longest`: Go's text (`1m30s`) or nanoseconds.
    pub(super) fn duration(&mut self, name: &str, longest: Duration, problems: &mut Problems) -> Option<Duration> {
        let value = self.take(name)?;
        let duration = match value {
            Value::String(text) => go_duration(text),
            value => value.as_u64().map(Duration::from_nanos),
        };
        let duration = duration.filter(|duration| *duration <= longest);
        if duration.is_none() {
            problems.add(self.at(name), format!("must be a duration such as 30s or 1m30s, at most {longest:?}"));
        }
        duration
    }

    /// Takes fields of Consul's that weft does nothing with: only what says nothing passes.
    pub(super) fn refuse(&mut self, names: &[&str], problems: &mut Problems) {
        for name in names {
            if self.take(name).is_some_and(|value| !says_nothing(value)) {
                problems.add(self.at(name), "is refused: weft does nothing with it");
            }
        }
    }

    /// Leaves everything that is left to others.
    pub(super) fn ignore_rest(&mut self) {
        self.left.clear();
    }

    /// Names what was not taken.
    pub(super) fn finish(self, problems: &mut Problems) {
        for (name, _) in &self.left {
            problems.add(self.at(name), "is unknown");
        }
    }
}

/// Whether a value says nothing: what Consul writes for an absent field.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "default",
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
    }
}

/// Reads a duration as Go writes it: numbers with units in a row.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|byte: char| !byte.is_ascii_digit() && byte != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|byte: char| byte.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "" if text == "0" => 0.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = tail;
    }
    Some(total)
}

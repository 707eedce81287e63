//! Reads JSON strictly and goes on after a mistake, so that one run names every problem.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::model::{ServiceName, duration};

/// Most problems that are listed; a hostile entry must not fill a terminal.
const PROBLEMS_MAX: usize = 64;
/// Longest key that is repeated in a problem, in characters.
const KEY_CHARS_MAX: usize = 64;

/// What is wrong in an entry, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field, as `Routes[0].Match.HTTP.PathRegex`.
    pub path: String,
    /// What it must be.
    pub rule: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.rule)
    }
}

/// Everything that is wrong in an entry; at most [`PROBLEMS_MAX`] are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Notes a problem.
    pub fn add(&mut self, path: impl Into<String>, rule: impl Into<String>) {
        if self.0.len() < PROBLEMS_MAX {
            self.0.push(Problem { path: path.into(), rule: rule.into() });
        }
    }

    /// `value` if there was no problem.
    ///
    /// # Errors
    /// The problems.
    pub fn or<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if at == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Node<'v> {
    pub(super) path: String,
    pub(super) value: &'v Value,
}

/// An object whose fields are taken out one by one; what is left at the end is unknown.
pub(super) struct Object<'v> {
    path: String,
    left: BTreeMap<String, (&'v str, &'v Value)>,
}

/// Names a field regardless of case and underscores.
fn fold(key: &str) -> String {
    key.chars().filter(|c| *c != '_').flat_map(char::to_lowercase).collect()
}

/// Whether a value says nothing: what Consul writes for an absent field.
pub(super) fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
    }
}

impl<'v> Node<'v> {
    fn wants(&self, wanted: &str, problems: &mut Problems) {
        problems.add(&*self.path, format!("must be {wanted}"));
    }

    pub(super) fn text(&self, problems: &mut Problems) -> Option<&'v str> {
        let text = self.value.as_str();
        if text.is_none() {
            self.wants("a text", problems);
        }
        text
    }

    pub(super) fn object(&self, problems: &mut Problems) -> Object<'v> {
        Object::open(self.path.clone(), self.value, problems)
    }

    pub(super) fn duration(&self, problems: &mut Problems) -> Option<Duration> {
        let read = match self.value {
            Value::String(text) if text.is_empty() => return None,
            Value::String(text) => duration::parse(text),
            Value::Number(number) => {
                number.as_u64().map(Duration::from_nanos).ok_or_else(|| format!("`{number}` is no duration"))
            }
            _ => Err("a duration is written like \"10s\"".to_owned()),
        };
        match read {
            Ok(duration) => Some(duration).filter(|duration| !duration.is_zero()),
            Err(why) => {
                problems.add(&*self.path, format!("is wrong: {why}"));
                None
            }
        }
    }
}

impl<'v> Object<'v> {
    /// Opens an object; another value is a problem and reads as an empty one.
    pub(super) fn open(path: String, value: &'v Value, problems: &mut Problems) -> Self {
        let mut left = BTreeMap::new();
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    if let Some((first, _)) = left.insert(fold(key), (key.as_str(), value)) {
                        problems.add(&*path, format!("has one field twice: `{first}` and `{key}`"));
                    }
                }
            }
            _ => problems.add(if path.is_empty() { "the entry".to_owned() } else { path.clone() }, "must be an object"),
        }
        Self { path, left }
    }

    /// Where `name` stands, or would.
    pub(super) fn path_of(&self, name: &str) -> String {
        let name: String = name.chars().take(KEY_CHARS_MAX).collect();
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field by Consul's name for it; null is absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Node<'v>> {
        let (key, value) = self.left.remove(&fold(name))?;
        (!value.is_null()).then(|| Node { path: self.path_of(key), value })
    }

    /// A text; absent and empty are `None`.
    pub(super) fn text(&mut self, name: &str, problems: &mut Problems) -> Option<&'v str> {
        self.take(name)?.text(problems).filter(|text| !text.is_empty())
    }

    pub(super) fn flag(&mut self, name: &str, problems: &mut Problems) -> bool {
        let Some(node) = self.take(name) else { return false };
        node.value.as_bool().unwrap_or_else(|| {
            node.wants("true or false", problems);
            false
        })
    }

    /// A whole number of `low` to `high`.
    pub(super) fn number(&mut self, name: &str, (low, high): (u64, u64), problems: &mut Problems) -> Option<u64> {
        let node = self.take(name)?;
        let number = node.value.as_u64().filter(|number| (low..=high).contains(number));
        if number.is_none() {
            node.wants(&format!("a whole number from {low} to {high}"), problems);
        }
        number
    }

    /// A share in percent, 0 to 100 with at most two decimals; in units of 0.01 %.
    pub(super) fn percent(&mut self, name: &str, problems: &mut Problems) -> Option<u16> {
        let node = self.take(name)?;
        let hundredths =
            node.value.as_f64().filter(|percent| (0.0..=100.0).contains(percent)).map(|percent| percent * 100.0);
        // Two decimals are exact to far less than this in a float.
        let whole = hundredths.filter(|share| (share - share.round()).abs() < 1e-6);
        if whole.is_none() {
            node.wants("a percentage from 0 to 100 in steps of 0.01", problems);
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 10,000 by the check above")]
        whole.map(|share| share.round() as u16)
    }

    /// A duration; absent, empty and zero are `None`.
    pub(super) fn duration(&mut self, name: &str, problems: &mut Problems) -> Option<Duration> {
        self.take(name)?.duration(problems)
    }

    /// The elements of a list; absent: none. More than `most` are a problem.
    pub(super) fn list(&mut self, name: &str, most: usize, problems: &mut Problems) -> Vec<Node<'v>> {
        let Some(node) = self.take(name) else { return Vec::new() };
        let Value::Array(values) = node.value else {
            node.wants("a list", problems);
            return Vec::new();
        };
        if values.len() > most {
            problems.add(&*node.path, format!("has {} elements; at most {most} are allowed", values.len()));
        }
        let element = |(at, value)| Node { path: format!("{}[{at}]", node.path), value };
        values.iter().take(most).enumerate().map(element).collect()
    }

    pub(super) fn texts(&mut self, name: &str, most: usize, problems: &mut Problems) -> Vec<(String, &'v str)> {
        let list = self.list(name, most, problems);
        list.into_iter().filter_map(|node| Some((node.path.clone(), node.text(problems)?))).collect()
    }

    pub(super) fn object(&mut self, name: &str, problems: &mut Problems) -> Option<Self> {
        Some(self.take(name)?.object(problems))
    }

    /// The fields of an object whose keys are free.
    pub(super) fn map(&mut self, name: &str, most: usize, problems: &mut Problems) -> Vec<(&'v str, Node<'v>)> {
        let Some(node) = self.take(name) else { return Vec::new() };
        let Value::Object(map) = node.value else {
            node.wants("an object", problems);
            return Vec::new();
        };
        if map.len() > most {
            problems.add(&*node.path, format!("has {} fields; at most {most} are allowed", map.len()));
        }
        let field = |(key, value): (&'v String, &'v Value)| {
            let short: String = key.chars().take(KEY_CHARS_MAX).collect();
            (key.as_str(), Node { path: format!("{}[{short:?}]", node.path), value })
        };
        map.iter().take(most).map(field).collect()
    }

    pub(super) fn service(&mut self, name: &str, problems: &mut Problems) -> Option<ServiceName> {
        let path = self.path_of(name);
        let text = self.text(name, problems)?;
        text.parse().map_err(|error| problems.add(path, format!("is no service's name: {error}"))).ok()
    }

    /// Takes the fields of Consul's tenancies, which weft has not.
    pub(super) fn tenancy(&mut self, problems: &mut Problems) {
        for name in ["Namespace", "Partition", "Peer", "SamenessGroup"] {
            let Some(node) = self.take(name) else { continue };
            if !matches!(node.value.as_str(), Some("" | "default")) {
                problems.add(node.path, "is refused: weft has neither namespaces, partitions nor peers");
            }
        }
    }

    /// Takes fields of Consul's that weft does nothing with: only what says nothing passes.
    pub(super) fn refuse(&mut self, names: &[&str], problems: &mut Problems) {
        for name in names {
            if let Some(node) = self.take(name).filter(|node| !says_nothing(node.value)) {
                problems.add(node.path, "is refused: weft does nothing with it");
            }
        }
    }

    /// Takes a field that another module reads.
    pub(super) fn leave(&mut self, name: &str) -> Option<&'v Map<String, Value>> {
        self.take(name)?.value.as_object()
    }

    /// Ends the object: every field that is left is unknown.
    pub(super) fn finish(self, problems: &mut Problems) {
        for (key, _) in self.left.values() {
            problems.add(self.path_of(key), "is no field of this entry");
        }
    }
}

//! Reads a JSON object the way Consul's clients write it: any case, snake_case aliases, null for absent.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};

use super::DefinitionError;
use crate::model::duration;

/// Values nested deeper than this are never taken for empty.
const EMPTY_DEPTH_MAX: usize = 16;

/// An object whose fields are taken out one by one; what is left at the end is unknown.
pub(super) struct Fields<'a> {
    path: String,
    left: BTreeMap<String, (&'a str, &'a Value)>,
}

/// A value and where it stands.
pub(super) struct Field<'a> {
    pub(super) path: String,
    pub(super) value: &'a Value,
}

/// Names a field regardless of case and underscores.
fn fold(key: &str) -> String {
    key.chars().filter(|c| *c != '_').flat_map(char::to_lowercase).collect()
}

/// Tells whether a value says nothing: null, false, 0, "" and lists and objects of such.
fn is_empty(value: &Value, depth: usize) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => depth < EMPTY_DEPTH_MAX && values.iter().all(|value| is_empty(value, depth + 1)),
        Value::Object(map) => depth < EMPTY_DEPTH_MAX && map.values().all(|value| is_empty(value, depth + 1)),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl<'a> Field<'a> {
    pub(super) fn wrong(&self, problem: impl Into<String>) -> DefinitionError {
        DefinitionError::Decode { path: self.path.clone(), problem: problem.into() }
    }

    fn wants(&self, wanted: &str) -> DefinitionError {
        self.wrong(format!("must be {wanted}, and is {}", kind(self.value)))
    }

    pub(super) fn is_empty(&self) -> bool {
        is_empty(self.value, 0)
    }

    pub(super) fn text(&self) -> Result<&'a str, DefinitionError> {
        self.value.as_str().ok_or_else(|| self.wants("a string"))
    }

    pub(super) fn map(&self) -> Result<&'a Map<String, Value>, DefinitionError> {
        self.value.as_object().ok_or_else(|| self.wants("an object"))
    }

    /// The list's elements; an object stands for a list of itself, as one block of a config file does.
    pub(super) fn elements(&self) -> Result<Vec<Field<'a>>, DefinitionError> {
        match self.value {
            Value::Array(values) => {
                let element = |(at, value)| Field { path: format!("{}[{at}]", self.path), value };
                Ok(values.iter().enumerate().map(element).collect())
            }
            Value::Object(_) => Ok(vec![Field { path: self.path.clone(), value: self.value }]),
            _ => Err(self.wants("a list")),
        }
    }

    pub(super) fn texts(&self) -> Result<Vec<String>, DefinitionError> {
        let Value::Array(_) = self.value else { return Err(self.wants("a list of strings")) };
        self.elements()?.iter().map(|element| element.text().map(str::to_owned)).collect()
    }

    fn whole_number(&self, most: u64) -> Result<u64, DefinitionError> {
        let Value::Number(number) = self.value else { return Err(self.wants("a number")) };
        let found = number.as_u64().filter(|found| *found <= most);
        found.ok_or_else(|| self.wrong(format!("must be a whole number from 0 to {most}, and is {number}")))
    }

    fn duration(&self) -> Result<Duration, DefinitionError> {
        match self.value {
            Value::String(text) if text.is_empty() => Ok(Duration::ZERO),
            Value::String(text) => duration::parse(text).map_err(|problem| self.wrong(format!("is wrong: {problem}"))),
            Value::Number(number) => {
                let exact = number.as_u64().filter(|nanos| i64::try_from(*nanos).is_ok()).map(Duration::from_nanos);
                let duration = exact.or_else(|| number.as_f64().and_then(duration::from_nanos));
                duration.ok_or_else(|| self.wrong(format!("is no duration in nanoseconds: {number}")))
            }
            _ => Err(self.wants("a duration such as \"10s\", or a number of nanoseconds")),
        }
    }
}

impl<'a> Fields<'a> {
    /// Opens the object in `field`.
    pub(super) fn of(field: &Field<'a>) -> Result<Self, DefinitionError> {
        let mut left = BTreeMap::new();
        let map = field.value.as_object().ok_or_else(|| match field.path.as_str() {
            "" => DefinitionError::Decode {
                path: "body".into(),
                problem: format!("must be an object, and is {}", kind(field.value)),
            },
            _ => field.wants("an object"),
        })?;
        for (key, value) in map {
            if let Some((first, _)) = left.insert(fold(key), (key.as_str(), value)) {
                return Err(field.wrong(format!("has one field twice: `{first}` and `{key}`")));
            }
        }
        Ok(Self { path: field.path.clone(), left })
    }

    fn path_of(&self, key: &str) -> String {
        // A hostile key must not fill the error.
        let key: String = key.chars().take(64).collect();
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }

    /// Where a field that may be absent would stand.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Takes the field that one of `names` (folded: lower case, no underscore) stands for; null is absent.
    pub(super) fn take(&mut self, names: &[&str]) -> Result<Option<Field<'a>>, DefinitionError> {
        let mut found: Option<Field<'a>> = None;
        for name in names {
            let Some((key, value)) = self.left.remove(*name) else { continue };
            let field = Field { path: self.path_of(key), value };
            if value.is_null() {
                continue;
            }
            if let Some(first) = found {
                return Err(field.wrong(format!("says the same as `{}`: give one of them", first.path)));
            }
            found = Some(field);
        }
        Ok(found)
    }

    pub(super) fn text(&mut self, names: &[&str]) -> Result<String, DefinitionError> {
        self.take(names)?.map_or(Ok(String::new()), |field| field.text().map(str::to_owned))
    }

    pub(super) fn flag(&mut self, names: &[&str]) -> Result<bool, DefinitionError> {
        self.flag_or(names, false)
    }

    /// A flag that is not simply off where it is left out.
    pub(super) fn flag_or(&mut self, names: &[&str], default: bool) -> Result<bool, DefinitionError> {
        let flag = |field: Field<'_>| field.value.as_bool().ok_or_else(|| field.wants("true or false"));
        self.take(names)?.map_or(Ok(default), flag)
    }

    pub(super) fn number(&mut self, names: &[&str]) -> Result<Option<u32>, DefinitionError> {
        let number = |field: Field<'_>| {
            field.whole_number(u64::from(u32::MAX)).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
        };
        self.take(names)?.map(number).transpose()
    }

    pub(super) fn port(&mut self, names: &[&str]) -> Result<u16, DefinitionError> {
        let port = |field: Field<'_>| {
            field.whole_number(u64::from(u16::MAX)).map(|port| u16::try_from(port).unwrap_or(u16::MAX))
        };
        self.take(names)?.map_or(Ok(0), port)
    }

    /// A duration; absent, empty and zero are `None`.
    pub(super) fn duration(&mut self, names: &[&str]) -> Result<Option<Duration>, DefinitionError> {
        let duration = self.take(names)?.map(|field| field.duration()).transpose()?;
        Ok(duration.filter(|duration| !duration.is_zero()))
    }

    pub(super) fn texts(&mut self, names: &[&str]) -> Result<Vec<String>, DefinitionError> {
        self.take(names)?.map_or(Ok(Vec::new()), |field| field.texts())
    }

    /// A free map of strings; its keys stay as they are.
    pub(super) fn pairs(&mut self, names: &[&str]) -> Result<BTreeMap<String, String>, DefinitionError> {
        let Some(field) = self.take(names)? else { return Ok(BTreeMap::new()) };
        let pair = |(key, value): (&String, &'a Value)| {
            let key_start: String = key.chars().take(64).collect();
            let field = Field { path: format!("{}.{key_start}", field.path), value };
            Ok((key.clone(), field.text()?.to_owned()))
        };
        field.map()?.iter().map(pair).collect()
    }

    /// Takes a field that weft has no use for: only an empty value passes.
    pub(super) fn refuse(&mut self, names: &[&str], what: &str) -> Result<(), DefinitionError> {
        match self.take(names)? {
            Some(field) if !field.is_empty() => {
                Err(DefinitionError::Unsupported { path: field.path, what: what.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Takes the fields of which `why` tells, by their folded names, why they have no effect; returns where they stand.
    pub(super) fn take_unused(&mut self, why: fn(&str) -> Option<&'static str>) -> Vec<(String, &'static str)> {
        let unused = self.left.extract_if(.., |name, _| why(name).is_some());
        let unused: Vec<(String, &str)> = unused.map(|(name, (key, _))| (name, key)).collect();
        unused.into_iter().filter_map(|(name, key)| Some((self.path_of(key), why(&name)?))).collect()
    }

    /// Ends the object: every field that is left is unknown.
    pub(super) fn finish(self) -> Result<(), DefinitionError> {
        match self.left.values().next() {
            Some((key, _)) => Err(DefinitionError::UnknownField { path: self.path_of(key) }),
            None => Ok(()),
        }
    }
}

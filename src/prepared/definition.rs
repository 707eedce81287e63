//! What a prepared query says, read strictly, and how a template is rendered.

use std::collections::BTreeMap;

use regex::bytes::{Captures, Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::model::duration;

/// Largest compiled expression of a template, in bytes.
const REGEXP_BYTES_MAX: usize = 64 * 1024;
/// Most places of a query that are looked at, and most entries of each of its lists.
const LIST_MAX: usize = 32;

/// A prepared query.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct Definition {
    /// Empty: it is found by its id alone, or it is the template of all names.
    pub(crate) name: String,
    pub(crate) template: Template,
    pub(crate) service: ServiceQuery,
    #[serde(rename = "DNS")]
    pub(crate) dns: DnsOptions,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct Template {
    /// `name_prefix_match`, or empty: it is none.
    #[serde(rename = "Type")]
    kind: String,
    regexp: String,
    remove_empty_tags: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct ServiceQuery {
    pub(crate) service: String,
    pub(crate) failover: Failover,
    pub(crate) only_passing: bool,
    #[serde(rename = "IgnoreCheckIDs")]
    pub(crate) ignore_check_ids: Vec<String>,
    pub(crate) near: String,
    pub(crate) tags: Vec<String>,
    pub(crate) node_meta: BTreeMap<String, String>,
    pub(crate) service_meta: BTreeMap<String, String>,
    pub(crate) connect: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct Failover {
    pub(crate) nearest_n: usize,
    pub(crate) datacenters: Vec<String>,
    pub(crate) targets: Vec<Target>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct Target {
    pub(crate) service: String,
    pub(crate) datacenter: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DnsOptions {
    #[serde(rename = "TTL")]
    pub(crate) ttl: String,
}

/// Every field, as it is written in answers.
const FIELDS: [&str; 24] = [
    "Name",
    "Template",
    "Type",
    "Regexp",
    "RemoveEmptyTags",
    "Service",
    "Failover",
    "NearestN",
    "Datacenters",
    "Datacenter",
    "Targets",
    "OnlyPassing",
    "IgnoreCheckIDs",
    "Near",
    "Tags",
    "NodeMeta",
    "ServiceMeta",
    "Connect",
    "DNS",
    "TTL",
    "ID",
    "Session",
    "Token",
    "Peer",
];

impl Definition {
    /// Reads a client's body; keys in any case, with or without underscores. What comes back from `GET` is taken too.
    ///
    /// # Errors
    /// A text for a 400.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(body).map_err(|error| format!("Request decode failed: {error}"))?;
        let Value::Object(mut fields) = canonical(value) else {
            return Err("Request decode failed: the body must be an object".to_owned());
        };
        for field in ["ID", "CreateIndex", "ModifyIndex"] {
            fields.remove(field);
        }
        for (field, why) in [
            ("Session", "Invalid query: a session needs consensus; weft has none"),
            ("Token", "Invalid query: weft has no ACL tokens; leave Token out"),
        ] {
            if fields.remove(field).is_some_and(|value| value.as_str() != Some("")) {
                return Err(why.to_owned());
            }
        }
        let definition: Self =
            serde_json::from_value(Value::Object(fields)).map_err(|error| format!("Request decode failed: {error}"))?;
        definition.check()?;
        Ok(definition)
    }

    /// Refuses what no agent executes; returns a template's expression, compiled.
    ///
    /// # Errors
    /// A text for a 400.
    pub(crate) fn check(&self) -> Result<Option<Regex>, String> {
        let (service, failover) = (&self.service, &self.service.failover);
        if service.service.is_empty() {
            return Err("Invalid query: Must provide a service name to query".to_owned());
        }
        if !matches!(service.near.as_str(), "" | "_agent") {
            return Err(
                "Invalid query: Near is \"_agent\" or empty: an agent measures its own round trips only".to_owned()
            );
        }
        let regex = match self.template.kind.as_str() {
            "" if self.template.regexp.is_empty() => None,
            "name_prefix_match" => self.template.compile()?,
            _ => return Err("Invalid query: Template.Type is \"name_prefix_match\" or empty".to_owned()),
        };
        if !self.dns.ttl.is_empty() && duration::parse(&self.dns.ttl).is_err() {
            return Err("Invalid query: DNS.TTL is a duration, such as \"10s\"".to_owned());
        }
        let lists = [service.tags.len(), service.ignore_check_ids.len(), failover.datacenters.len()];
        let is_long =
            lists.into_iter().chain([failover.targets.len(), failover.nearest_n]).any(|count| count > LIST_MAX);
        if is_long || service.node_meta.len() > LIST_MAX || service.service_meta.len() > LIST_MAX {
            return Err(format!("Invalid query: each list has at most {LIST_MAX} entries"));
        }
        Ok(regex)
    }

    /// Tells whether it is found by names that begin as its own.
    pub(crate) fn is_template(&self) -> bool {
        self.template != Template::default()
    }

    /// Returns how long an answer by DNS holds, in seconds; none: as the configuration says of the service.
    pub(crate) fn ttl_s(&self) -> Option<u32> {
        let ttl = duration::parse(&self.dns.ttl).ok().filter(|_| !self.dns.ttl.is_empty())?;
        Some(u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX))
    }

    /// Renders this template for `name`, which begins as its own name does in any case, by its compiled expression; none: the
    /// outcome is no query.
    pub(super) fn render(&self, name: &str, regex: Option<&Regex>) -> Option<Self> {
        let captures = regex.and_then(|regex| regex.captures(name.as_bytes()));
        let (prefix, suffix) = name.split_at_checked(self.name.len())?;
        let mut service = serde_json::to_value(&self.service).ok()?;
        walk(&mut service, &|text| interpolate(text, (name, prefix, suffix), captures.as_ref()));
        let mut rendered = Self { service: serde_json::from_value(service).ok()?, ..self.clone() };
        if self.template.remove_empty_tags {
            rendered.service.tags.retain(|tag| !tag.is_empty());
        }
        Some(rendered)
    }
}

impl Template {
    fn compile(&self) -> Result<Option<Regex>, String> {
        if self.regexp.is_empty() {
            return Ok(None);
        }
        let mut builder = RegexBuilder::new(&self.regexp);
        let built = builder.unicode(false).size_limit(REGEXP_BYTES_MAX).dfa_size_limit(REGEXP_BYTES_MAX).build();
        built.map(Some).map_err(|error| format!("Invalid query: Template.Regexp: {error}"))
    }
}

/// Writes the keys of every object as they stand in [`FIELDS`], but those of the maps that clients fill.
fn canonical(value: Value) -> Value {
    let fold = |key: &str| key.replace('_', "").to_ascii_lowercase();
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| {
                let known = FIELDS.iter().find(|field| fold(field) == fold(&key));
                let key = known.map_or(key, |field| (*field).to_owned());
                let value = if key.ends_with("Meta") { value } else { canonical(value) };
                (key, value)
            });
            Value::Object(fields.collect::<Map<String, Value>>())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(canonical).collect()),
        other => other,
    }
}

/// Replaces every text in `value`.
fn walk(value: &mut Value, replace: &impl Fn(&str) -> String) {
    match value {
        Value::String(text) => *text = replace(text),
        Value::Array(list) => list.iter_mut().for_each(|value| walk(value, replace)),
        Value::Object(fields) => fields.values_mut().for_each(|value| walk(value, replace)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Replaces `${name.full}`, `${name.prefix}`, `${name.suffix}` and `${match(N)}`; what is none of these becomes nothing.
fn interpolate(text: &str, (name, prefix, suffix): (&str, &str, &str), captures: Option<&Captures<'_>>) -> String {
    let (mut rendered, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("${") {
        rendered.push_str(before);
        let Some((variable, after)) = after.split_once('}') else {
            rest = "";
            break;
        };
        let number = variable.strip_prefix("match(").and_then(|number| number.strip_suffix(')')?.trim().parse().ok());
        let captured = number.and_then(|number| captures?.get(number));
        match variable.trim() {
            "name.full" => rendered.push_str(name),
            "name.prefix" => rendered.push_str(prefix),
            "name.suffix" => rendered.push_str(suffix),
            _ => {
                let captured = captured.map(|found| String::from_utf8_lossy(found.as_bytes()));
                rendered.push_str(&captured.unwrap_or_default());
            }
        }
        rest = after;
    }
    rendered.push_str(rest);
    rendered
}

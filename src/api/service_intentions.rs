//! `/v1/config` with the kind `service-intentions`: all intentions about one destination as one entry, as Consul's tools write them.
//!
//! Underneath stays one signed document per source. So a write is not one step: nodes may see some of its sources before the
//! others, and of two writers at once each source ends with one of the two. The entry's index is the sum of its documents'
//! versions, which every change raises.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::call::{Call, Refusal};
use super::write::{Expect, signer, write};
use crate::authz::{self, Intention, Party};
use crate::gossip::{DocumentBody, DocumentsView};
use crate::policy::{Draft, intention_ends};

/// The kind.
pub(super) const KIND: &str = "service-intentions";
/// Most sources of one entry: each is a document to sign and spread before the answer.
const SOURCES_MAX: usize = 128;

/// What is held about one destination.
#[derive(Default)]
struct About<'v> {
    sources: Vec<&'v Intention>,
    index: u64,
}

fn abouts(view: &DocumentsView) -> BTreeMap<Party, About<'_>> {
    let mut found: BTreeMap<Party, About<'_>> = BTreeMap::new();
    for view in &view.documents {
        let DocumentBody::Intention(body) = &view.body else { continue };
        let Some((_, destination)) = intention_ends(&view.digest.id.name) else { continue };
        let about = found.entry(destination).or_default();
        about.index = about.index.saturating_add(view.digest.version);
        about.sources.extend(body);
    }
    found
}

/// The entries that are held, in order of name; of one destination or of all.
pub(super) fn held(view: &DocumentsView, name: Option<&str>) -> Vec<Value> {
    let wanted = |(destination, about): &(Party, About<'_>)| {
        !about.sources.is_empty() && name.is_none_or(|name| destination.as_str() == name)
    };
    abouts(view).into_iter().filter(wanted).map(|(destination, about)| shape(&destination, &about)).collect()
}

fn shape(destination: &Party, about: &About<'_>) -> Value {
    let source = |intention: &&Intention| {
        let Value::Object(mut fields) = authz::to_json(intention, 0) else { return Value::Null };
        let mut shape =
            json!({"Name": intention.source.as_str(), "Type": "consul", "LegacyID": intention.id().to_string()});
        for key in ["Action", "Permissions", "Precedence", "Description", "Audit"] {
            // A source with an action has no list, not an empty one.
            let value = fields.remove(key).filter(|value| value.as_array().is_none_or(|list| !list.is_empty()));
            if let (Some(value), Value::Object(shape)) = (value, &mut shape) {
                shape.insert(key.to_owned(), value);
            }
        }
        shape
    };
    let mut sources = about.sources.clone();
    sources.sort_by_key(|one| (std::cmp::Reverse(one.precedence()), one.name()));
    let meta = sources.first().map(|one| one.meta.clone()).unwrap_or_default();
    json!({
        "Kind": KIND,
        "Name": destination.as_str(),
        "Sources": sources.iter().map(source).collect::<Vec<Value>>(),
        "Meta": meta,
        "CreateIndex": about.index,
        "ModifyIndex": about.index,
    })
}

/// Writes what differs from the entry: sources that it does not list are deleted. False: `expect` is not met.
///
/// # Errors
/// 400 before anything is written, if one source is malformed; whatever a write refuses.
pub(super) async fn put(call: &Call, entry: &Value, expect: Expect) -> Result<bool, Refusal> {
    let (destination, wanted) = read(entry)?;
    signer(&call.shared)?;
    let (drafts, index) = {
        let view = call.shared.membership.documents();
        let mut all = abouts(&view);
        let about = all.remove(&destination).unwrap_or_default();
        let named: BTreeSet<&Party> = wanted.iter().map(|one| &one.source).collect();
        let mut drafts = Vec::new();
        for one in wanted.iter().filter(|one| !about.sources.contains(one)) {
            drafts.push(Draft::intention(one.clone())?);
        }
        for gone in about.sources.iter().filter(|one| !named.contains(&one.source)) {
            drafts.push(Draft::no_intention(&gone.source, &gone.destination)?);
        }
        (drafts, if about.sources.is_empty() { 0 } else { about.index })
    };
    if matches!(expect, Expect::Version(wanted) if wanted != index) {
        return Ok(false);
    }
    for draft in drafts {
        write(&call.shared, draft, Expect::Any).await?;
    }
    Ok(true)
}

/// Deletes every intention about `name`. False: `expect` is not met.
///
/// # Errors
/// Whatever a write refuses.
pub(super) async fn delete(call: &Call, name: &str, expect: Expect) -> Result<bool, Refusal> {
    let party: Party = name.parse().map_err(|error| Refusal::bad(format!("Invalid name: {error}")))?;
    put(call, &json!({"Kind": KIND, "Name": party.as_str(), "Sources": []}), expect).await
}

/// Reads an entry: the destination, and one intention per source.
fn read(entry: &Value) -> Result<(Party, Vec<Intention>), Refusal> {
    let bad = |text: String| Refusal::bad(format!("Request decode failed: {text}"));
    let fields = entry.as_object().ok_or_else(|| bad("a config entry is a JSON object".to_owned()))?;
    let (mut name, mut sources, mut meta) = ("", &Vec::new(), Value::Null);
    for (key, value) in fields {
        match key.replace('_', "").to_ascii_lowercase().as_str() {
            "name" => name = value.as_str().unwrap_or_default(),
            "sources" => sources = value.as_array().ok_or_else(|| bad("Sources must be a list".to_owned()))?,
            "meta" => meta = value.clone(),
            "kind" | "createindex" | "modifyindex" | "hash" => {}
            // Consul's enterprise names, where they name the only one that is there.
            "namespace" | "partition" if matches!(value.as_str(), Some("" | "default")) => {}
            _ => return Err(bad(format!("unknown field {key:?}"))),
        }
    }
    let destination: Party = name.parse().map_err(|error| bad(format!("Name: {error}")))?;
    if sources.len() > SOURCES_MAX {
        return Err(bad(format!("{} sources; at most {SOURCES_MAX} are accepted", sources.len())));
    }
    let mut wanted: Vec<Intention> = Vec::new();
    for (at, source) in sources.iter().enumerate() {
        let fields = source.as_object().ok_or_else(|| bad(format!("source {} is no object", at + 1)))?;
        let one = authz::from_json(&intention(fields, &destination, &meta), None)
            .map_err(|error| bad(format!("source {}: {error}", at + 1)))?;
        if wanted.iter().any(|other| other.source == one.source) {
            return Err(bad(format!("source {} stands there twice", one.source)));
        }
        wanted.push(one);
    }
    Ok((destination, wanted))
}

/// A source in the shape of an intention by itself.
fn intention(source: &Map<String, Value>, destination: &Party, meta: &Value) -> Value {
    let mut fields = Map::new();
    for (key, value) in source {
        let name = match key.replace('_', "").to_ascii_lowercase().as_str() {
            "name" => "SourceName",
            "type" => "SourceType",
            "namespace" => "SourceNS",
            "partition" => "SourcePartition",
            "peer" => "SourcePeer",
            "legacyid" | "legacymeta" | "legacycreatetime" | "legacyupdatetime" => continue,
            _ => key,
        };
        fields.insert(name.to_owned(), value.clone());
    }
    fields.insert("DestinationName".to_owned(), json!(destination.as_str()));
    fields.insert("Meta".to_owned(), meta.clone());
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::Action;

    #[test]
    fn an_entry_is_one_intention_per_source_and_what_is_malformed_is_named() {
        let entry = json!({"Kind": KIND, "Name": "db", "Meta": {"team": "shop"}, "Sources": [
            {"Name": "web", "Action": "allow", "Type": "consul", "Precedence": 9},
            {"Name": "*", "Action": "deny", "Description": "the rest"}]});
        let (destination, wanted) = read(&entry).unwrap();
        assert_eq!((destination.as_str(), wanted.len()), ("db", 2));
        let mut web = Intention::plain("web".parse().unwrap(), "db".parse().unwrap(), Action::Allow);
        web.meta.insert("team".to_owned(), "shop".to_owned());
        assert_eq!(wanted[0], web);
        let about = About { sources: wanted.iter().collect(), index: 3 };
        let shown = shape(&destination, &about);
        assert_eq!((&shown["Sources"][1]["Name"], &shown["ModifyIndex"]), (&json!("*"), &json!(3)));
        assert_eq!(shown["Sources"][0].get("Permissions"), None, "an action, and no empty list beside it");
        assert_eq!(read(&shown).unwrap().1, wanted, "what was read can be written back");
        for (entry, part) in [
            (json!({"Name": "a b"}), "Name"),
            (json!({"Name": "db", "Colour": 1}), "Colour"),
            (json!({"Name": "db", "Sources": [{"Name": "web"}]}), "source 1: either Action"),
            (json!({"Name": "db", "Sources": [{"Name": "web", "Action": "allow", "Peer": "east"}]}), "peers"),
            (json!({"Name": "db", "Sources": vec![json!({"Name": "web", "Action": "allow"}); 2]}), "twice"),
        ] {
            let refused = read(&entry).unwrap_err().text;
            assert!(refused.contains(part), "{entry}: {refused}");
        }
    }
}

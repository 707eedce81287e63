//! Intentions in Consul's JSON.
//!
//! ```json
//! {"SourceName":"web","DestinationName":"db","SourceType":"consul","Action":"allow","Precedence":9,"Audit":false}
//! ```
//!
//! `Audit` is weft's own. Keys are taken in any case and in snake_case; unknown ones are refused by name.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::intention::{
    Action, HeaderRule, HeaderTest, Intention, IntentionError, Mode, Party, PathRule, Permission, Rule,
};
use crate::model::NameError;

/// Why JSON is no intention.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A field is unknown.
    #[error("unknown field {0:?}")]
    Unknown(String),
    /// A field has another type or value.
    #[error("{field} must be {want}")]
    Field {
        /// Which.
        field: String,
        /// What it must be.
        want: &'static str,
    },
    /// A field is missing.
    #[error("{0} must be given")]
    Missing(&'static str),
    /// Consul's enterprise features.
    #[error("{field} = {value:?}: weft has neither namespaces, partitions nor peers")]
    Tenancy {
        /// Which.
        field: String,
        /// Its value.
        value: String,
    },
    /// A name is malformed.
    #[error("{field}: {reason}")]
    Name {
        /// Which.
        field: &'static str,
        /// What is wrong.
        reason: NameError,
    },
    /// Body and address name different services.
    #[error("the body is about {body}, the request about {asked}")]
    Other {
        /// The body's.
        body: String,
        /// The request's.
        asked: String,
    },
    /// Action and permissions are both given, or neither.
    #[error("either Action or Permissions must be given, and not both")]
    ActionOrPermissions,
    /// A bound is broken.
    #[error(transparent)]
    Intention(#[from] IntentionError),
}

/// Writes an intention; `version` stands for both indexes.
pub fn to_json(intention: &Intention, version: u64) -> Value {
    let mut shape = json!({
        "ID": intention.id().to_string(),
        "Description": intention.description,
        "SourceNS": "default",
        "SourceName": intention.source.as_str(),
        "DestinationNS": "default",
        "DestinationName": intention.destination.as_str(),
        "SourceType": "consul",
        "Meta": intention.meta,
        "Precedence": intention.precedence(),
        "CreateIndex": version,
        "ModifyIndex": version,
    });
    if let Value::Object(fields) = &mut shape {
        match &intention.rule {
            Rule::Action(action) => {
                fields.insert("Action".to_owned(), json!(action.as_str()));
                fields.insert("Permissions".to_owned(), json!([]));
            }
            Rule::Permissions(list) => {
                let list: Vec<Value> = list.iter().map(permission_to_json).collect();
                fields.insert("Permissions".to_owned(), Value::from(list));
            }
        }
        if intention.mode == Mode::Audit {
            fields.insert("Audit".to_owned(), Value::Bool(true));
        }
    }
    shape
}

fn permission_to_json(permission: &Permission) -> Value {
    let mut http = Map::new();
    if let Some(path) = &permission.path {
        let (key, text) = match path {
            PathRule::Exact(text) => ("PathExact", text),
            PathRule::Prefix(text) => ("PathPrefix", text),
            PathRule::Regex(text) => ("PathRegex", text),
        };
        http.insert(key.to_owned(), json!(text));
    }
    if !permission.methods.is_empty() {
        http.insert("Methods".to_owned(), json!(permission.methods));
    }
    if !permission.headers.is_empty() {
        let header = |rule: &HeaderRule| {
            let (key, value) = match &rule.test {
                HeaderTest::Present => ("Present", Value::Bool(true)),
                HeaderTest::Exact(text) => ("Exact", json!(text)),
                HeaderTest::Prefix(text) => ("Prefix", json!(text)),
                HeaderTest::Suffix(text) => ("Suffix", json!(text)),
                HeaderTest::Contains(text) => ("Contains", json!(text)),
                HeaderTest::Regex(text) => ("Regex", json!(text)),
            };
            let mut shape = Map::from_iter([("Name".to_owned(), json!(rule.name)), (key.to_owned(), value)]);
            if rule.is_inverted {
                shape.insert("Invert".to_owned(), Value::Bool(true));
            }
            Value::Object(shape)
        };
        http.insert("Header".to_owned(), permission.headers.iter().map(header).collect());
    }
    json!({"Action": permission.action.as_str(), "HTTP": http})
}

/// Reads an intention and holds it against its bounds; `asked` is whom the request is about, if it says so.
///
/// # Errors
/// [`ShapeError`] naming the field.
pub fn from_json(value: &Value, asked: Option<(Party, Party)>) -> Result<Intention, ShapeError> {
    let fields = Fields::of("the intention", value)?;
    let (mut source, mut destination) = (None, None);
    let (mut action, mut permissions) = (None, Vec::new());
    let mut intention = Intention::plain(Party::Any, Party::Any, Action::Deny);
    for (name, key, value) in fields.iter() {
        match key.as_str() {
            "sourcename" => source = Some(party("SourceName", text(name, value)?)?),
            "destinationname" => destination = Some(party("DestinationName", text(name, value)?)?),
            "action" if !text(name, value)?.is_empty() => action = Some(parse_action(name, value)?),
            "permissions" => permissions = list(name, value)?.iter().map(permission).collect::<Result<_, _>>()?,
            "description" => text(name, value)?.clone_into(&mut intention.description),
            "meta" => intention.meta = meta(name, value)?,
            "audit" if flag(name, value)? => intention.mode = Mode::Audit,
            "sourcens"
            | "destinationns"
            | "sourcepartition"
            | "destinationpartition"
            | "sourcepeer"
            | "sourcesamenessgroup" => match text(name, value)? {
                "" | "default" => {}
                other => return Err(ShapeError::Tenancy { field: name.to_owned(), value: other.to_owned() }),
            },
            "sourcetype" if !matches!(text(name, value)?, "" | "consul") => {
                return Err(ShapeError::Field { field: name.to_owned(), want: "\"consul\"" });
            }
            // What an answer holds may come back.
            "action" | "audit" | "sourcetype" | "id" | "precedence" | "createindex" | "modifyindex" | "createdat"
            | "updatedat" | "hash" => {}
            _ => return Err(ShapeError::Unknown(name.to_owned())),
        }
    }
    (intention.source, intention.destination) = ends(source, destination, asked)?;
    intention.rule = match (action, permissions.is_empty()) {
        (Some(action), true) => Rule::Action(action),
        (None, false) => Rule::Permissions(permissions),
        _ => return Err(ShapeError::ActionOrPermissions),
    };
    intention.check()?;
    Ok(intention)
}

fn ends(
    source: Option<Party>,
    destination: Option<Party>,
    asked: Option<(Party, Party)>,
) -> Result<(Party, Party), ShapeError> {
    let Some((asked_source, asked_destination)) = asked else {
        let source = source.ok_or(ShapeError::Missing("SourceName"))?;
        return Ok((source, destination.ok_or(ShapeError::Missing("DestinationName"))?));
    };
    let body =
        (source.unwrap_or_else(|| asked_source.clone()), destination.unwrap_or_else(|| asked_destination.clone()));
    if body.0 == asked_source && body.1 == asked_destination {
        return Ok(body);
    }
    let name = |ends: &(Party, Party)| format!("{} -> {}", ends.0, ends.1);
    Err(ShapeError::Other { body: name(&body), asked: name(&(asked_source, asked_destination)) })
}

fn permission(value: &Value) -> Result<Permission, ShapeError> {
    let (mut action, mut rule) = (None, None);
    for (name, key, value) in Fields::of("a permission", value)?.iter() {
        match key.as_str() {
            "action" => action = Some(parse_action(name, value)?),
            "http" => rule = Some(http_rule(value)?),
            _ => return Err(ShapeError::Unknown(name.to_owned())),
        }
    }
    let (path, methods, headers) = rule.ok_or(ShapeError::Missing("Permissions[].HTTP"))?;
    Ok(Permission { action: action.ok_or(ShapeError::Missing("Permissions[].Action"))?, path, methods, headers })
}

type HttpRule = (Option<PathRule>, Vec<String>, Vec<HeaderRule>);

fn http_rule(value: &Value) -> Result<HttpRule, ShapeError> {
    let (mut path, mut methods, mut headers) = (None, Vec::new(), Vec::new());
    for (name, key, value) in Fields::of("HTTP", value)?.iter() {
        let make: fn(String) -> PathRule = match key.as_str() {
            "pathexact" => PathRule::Exact,
            "pathprefix" => PathRule::Prefix,
            "pathregex" => PathRule::Regex,
            "methods" => {
                let read = |value: &Value| text(name, value).map(str::to_owned);
                methods = list(name, value)?.iter().map(read).collect::<Result<_, _>>()?;
                continue;
            }
            "header" | "headers" => {
                headers = list(name, value)?.iter().map(header).collect::<Result<_, _>>()?;
                continue;
            }
            _ => return Err(ShapeError::Unknown(name.to_owned())),
        };
        let text = text(name, value)?;
        if !text.is_empty() && path.replace(make(text.to_owned())).is_some() {
            return Err(ShapeError::Field { field: name.to_owned(), want: "the only one of the path's three" });
        }
    }
    Ok((path, methods, headers))
}

fn header(value: &Value) -> Result<HeaderRule, ShapeError> {
    let (mut header, mut test, mut is_inverted) = (String::new(), None, false);
    for (name, key, value) in Fields::of("Header", value)?.iter() {
        let make: fn(String) -> HeaderTest = match key.as_str() {
            "name" => {
                header = text(name, value)?.to_ascii_lowercase();
                continue;
            }
            "invert" => {
                is_inverted = flag(name, value)?;
                continue;
            }
            "present" => |_| HeaderTest::Present,
            "exact" => HeaderTest::Exact,
            "prefix" => HeaderTest::Prefix,
            "suffix" => HeaderTest::Suffix,
            "contains" => HeaderTest::Contains,
            "regex" => HeaderTest::Regex,
            _ => return Err(ShapeError::Unknown(name.to_owned())),
        };
        let is_given = if key == "present" { flag(name, value)? } else { !text(name, value)?.is_empty() };
        let value = value.as_str().unwrap_or_default().to_owned();
        if is_given && test.replace(make(value)).is_some() {
            return Err(ShapeError::Field { field: name.to_owned(), want: "the only test of its header" });
        }
    }
    let test = test.ok_or(ShapeError::Missing("Header[].Present, Exact, Prefix, Suffix, Contains or Regex"))?;
    Ok(HeaderRule { name: header, test, is_inverted })
}

fn party(field: &'static str, text: &str) -> Result<Party, ShapeError> {
    text.parse().map_err(|reason| ShapeError::Name { field, reason })
}

fn parse_action(name: &str, value: &Value) -> Result<Action, ShapeError> {
    match value.as_str().map(str::to_ascii_lowercase).as_deref() {
        Some("allow") => Ok(Action::Allow),
        Some("deny") => Ok(Action::Deny),
        _ => Err(ShapeError::Field { field: name.to_owned(), want: "\"allow\" or \"deny\"" }),
    }
}

fn meta(name: &str, value: &Value) -> Result<BTreeMap<String, String>, ShapeError> {
    let want = || ShapeError::Field { field: name.to_owned(), want: "an object of texts" };
    match value {
        Value::Null => Ok(BTreeMap::new()),
        Value::Object(map) => {
            map.iter().map(|(k, v)| Ok((k.clone(), v.as_str().ok_or_else(want)?.to_owned()))).collect()
        }
        _ => Err(want()),
    }
}

fn text<'v>(name: &str, value: &'v Value) -> Result<&'v str, ShapeError> {
    match value {
        Value::Null => Ok(""),
        other => other.as_str().ok_or_else(|| ShapeError::Field { field: name.to_owned(), want: "a text" }),
    }
}

fn flag(name: &str, value: &Value) -> Result<bool, ShapeError> {
    match value {
        Value::Null => Ok(false),
        other => other.as_bool().ok_or_else(|| ShapeError::Field { field: name.to_owned(), want: "true or false" }),
    }
}

fn list<'v>(name: &str, value: &'v Value) -> Result<&'v [Value], ShapeError> {
    match value {
        Value::Null => Ok(&[]),
        Value::Array(list) => Ok(list),
        _ => Err(ShapeError::Field { field: name.to_owned(), want: "a list" }),
    }
}

/// An object's fields, by their name in lower case without underscores.
struct Fields<'v>(&'v Map<String, Value>);

impl<'v> Fields<'v> {
    fn of(what: &str, value: &'v Value) -> Result<Self, ShapeError> {
        value.as_object().map(Self).ok_or_else(|| ShapeError::Field { field: what.to_owned(), want: "an object" })
    }

    fn iter(&self) -> impl Iterator<Item = (&'v str, String, &'v Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), name.replace('_', "").to_ascii_lowercase(), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intention_survives_its_json() {
        let value = json!({
            "source_name": "web", "DestinationName": "db", "SourceType": "consul", "Description": "x", "Audit": true,
            "Permissions": [
                {"Action": "allow", "HTTP": {"PathPrefix": "/a", "Methods": ["GET"], "Header": [
                    {"Name": "X-Team", "Exact": "shop"}, {"Name": "x-y", "Present": true, "Invert": true}]}},
                {"Action": "deny", "HTTP": {"PathRegex": "/b.*"}},
            ],
        });
        let intention = from_json(&value, None).unwrap();
        let shape = to_json(&intention, 7);
        assert_eq!((&shape["Precedence"], &shape["ModifyIndex"]), (&json!(9), &json!(7)));
        assert_eq!(from_json(&shape, None).unwrap(), intention);
        assert_eq!(shape["Permissions"][0]["HTTP"]["Header"][0]["Name"], "x-team");
        let plain = from_json(&json!({"SourceName": "web", "DestinationName": "db", "Action": "deny"}), None).unwrap();
        let shape = to_json(&plain, 8);
        assert_eq!((&shape["Action"], &shape["Permissions"]), (&json!("deny"), &json!([])));
        assert_eq!(from_json(&shape, None).unwrap(), plain, "what was read can be written");
    }

    #[test]
    fn what_is_no_intention_is_refused_by_the_name_of_its_field() {
        #[track_caller]
        fn check(value: &Value, part: &str) {
            let error = from_json(value, None).unwrap_err().to_string();
            assert!(error.contains(part), "{value}: {error}");
        }
        let with = |extra: Value| {
            let mut value = json!({"SourceName": "web", "DestinationName": "db", "Action": "allow"});
            value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            value
        };
        check(&json!([]), "an object");
        check(&json!({"SourceName": "web", "Action": "allow"}), "DestinationName");
        check(&with(json!({"Colour": 1})), "Colour");
        check(&with(json!({"Action": "maybe"})), "allow");
        check(&with(json!({"Action": ""})), "either Action or Permissions");
        check(&with(json!({"SourceNS": "team"})), "namespaces");
        check(&with(json!({"SourceName": "a b"})), "SourceName");
        let permitted = |http: Value| with(json!({"Action": "", "Permissions": [{"Action": "allow", "HTTP": http}]}));
        check(&with(json!({"Permissions": [{"Action": "allow", "HTTP": {}}]})), "not both");
        check(&permitted(json!({"PathExact": "/a", "PathPrefix": "/b"})), "only one");
        check(&permitted(json!({"PathExact": "a"})), "begins with `/`");
        check(&permitted(json!({"Methods": ["get"]})), "upper case");
        check(&permitted(json!({"Header": [{"Name": "x"}]})), "Present");
        for unseen in ["Host", "te", "x-weft-hops", "Proxy-Authorization"] {
            check(&permitted(json!({"Header": [{"Name": unseen, "Present": true}]})), "does not see this header");
        }
        let many: Vec<Value> =
            (0..33).map(|at| json!({"Action": "deny", "HTTP": {"PathRegex": format!("/{at}")}})).collect();
        check(&with(json!({"Action": "", "Permissions": many})), "at most 32 regular expressions");
    }

    #[test]
    fn the_request_names_the_ends_and_the_body_may_not_say_otherwise() {
        let asked = || Some((Party::Any, "db".parse().unwrap()));
        let intention = from_json(&json!({"Action": "deny"}), asked()).unwrap();
        assert_eq!(intention.name(), "*:db");
        let other = from_json(&json!({"Action": "deny", "SourceName": "web"}), asked()).unwrap_err();
        assert_eq!(other.to_string(), "the body is about web -> db, the request about * -> db");
    }
}

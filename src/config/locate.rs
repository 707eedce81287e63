//! Where a key stands in a config file: its line, for messages.
//!
//! JSON is read by the HCL parser, for a JSON object is an HCL expression too; where it does not take one, a key has no
//! line. A key that is not there has the line of the deepest part of its path that is.

use std::ops::Range;

use hcl_edit::Span as _;
use hcl_edit::expr::{Expression, ObjectKey};
use hcl_edit::parser::{parse_body, parse_expr};
use hcl_edit::structure::{Body, Structure};

use super::file::Language;

/// Returns the line, from 1, of the key path `key` (`service[1].check.ttl`).
pub(super) fn line_of(text: &str, language: Language, key: &str) -> Option<usize> {
    let segments: Vec<Segment<'_>> = key.split('.').filter(|part| !part.is_empty()).map(Segment::parse).collect();
    let at = match language {
        Language::Hcl => in_body(&parse_body(text).ok()?, &segments),
        Language::Json => in_expression(&parse_expr(text.trim_end()).ok()?, &segments),
    }?;
    Some(1 + text.get(..at.start)?.bytes().filter(|byte| *byte == b'\n').count())
}

/// A part of a path: `service`, `service[1]`.
struct Segment<'a> {
    name: &'a str,
    index: Option<usize>,
}

impl<'a> Segment<'a> {
    fn parse(part: &'a str) -> Self {
        let split = part.strip_suffix(']').and_then(|part| part.rsplit_once('['));
        let indexed = split.and_then(|(name, index)| Some((name, index.parse().ok()?)));
        match indexed {
            Some((name, index)) => Self { name, index: Some(index) },
            None => Self { name: part, index: None },
        }
    }

    /// Names in messages keep their own spelling, or the documented one.
    fn is(&self, name: &str) -> bool {
        let fold = |text: &str| -> String { text.chars().filter(|c| *c != '_').flat_map(char::to_lowercase).collect() };
        fold(self.name) == fold(name)
    }
}

fn in_body(body: &Body, segments: &[Segment<'_>]) -> Option<Range<usize>> {
    let (first, rest) = segments.split_first()?;
    let name = |structure: &Structure| match structure {
        Structure::Attribute(attribute) => first.is(attribute.key.as_str()),
        Structure::Block(block) => first.is(block.ident.as_str()),
    };
    let found: Vec<&Structure> = body.iter().filter(|structure| name(structure)).collect();
    let single = found.len() == 1;
    match found.get(if single { 0 } else { first.index.unwrap_or(0) })? {
        Structure::Attribute(attribute) => {
            in_value(&attribute.value, first.index, rest).or_else(|| attribute.key.span())
        }
        Structure::Block(block) => in_body(&block.body, rest).or_else(|| block.ident.span()),
    }
}

/// Goes on in the value of a key that was found.
fn in_value(value: &Expression, index: Option<usize>, rest: &[Segment<'_>]) -> Option<Range<usize>> {
    match (value, index) {
        (Expression::Array(list), Some(index)) => {
            let element = list.get(index)?;
            in_expression(element, rest).or_else(|| element.span())
        }
        _ => in_expression(value, rest),
    }
}

fn in_expression(expression: &Expression, segments: &[Segment<'_>]) -> Option<Range<usize>> {
    let (first, rest) = segments.split_first()?;
    let Expression::Object(object) = expression else { return None };
    let found = object.iter().find(|(key, _)| match key {
        ObjectKey::Ident(ident) => first.is(ident.as_str()),
        ObjectKey::Expression(Expression::String(text)) => first.is(text.as_str()),
        ObjectKey::Expression(_) => false,
    });
    let (key, value) = found?;
    in_value(value.expr(), first.index, rest).or_else(|| key.span()).or_else(|| value.expr().span())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_line_where_it_stands_or_that_of_what_is_around_it() {
        let text = "node_name = \"a\"\nservice {\n  name = \"b\"\n}\nservice {\n  name = \"c\"\n  check {\n    ttl = 5\n  }\n}\n\
                    checks = [\n  { name = \"d\" },\n  { name = \"e\",\n    ttl = \"x\" },\n]\n";
        let check = |key: &str, want| assert_eq!(line_of(text, Language::Hcl, key), want, "{key}");
        check("node_name", Some(1));
        check("service[0]", Some(2));
        check("service[1].Check.TTL", Some(8));
        check("service[1].check.absent", Some(7));
        check("checks[1].ttl", Some(14));
        check("checks[1]", Some(13));
        check("absent", None);
        let json = "{\n  \"service\": {\n    \"name\": \"a\",\n    \"check\": {\"http\": \"http://x\",\n      \"interval\": 1}\n  },\n  \"checks\": [{},\n   {\"ttl\": \"x\"}]\n}\n";
        let check = |key: &str, want| assert_eq!(line_of(json, Language::Json, key), want, "{key}");
        check("service.check.interval", Some(5));
        check("checks[1].ttl", Some(8));
    }
}

//! Reads what a rule is about: `Match.HTTP`.

use http::header::HeaderName;

use super::{PATH_REGEXES_MAX, TESTS_MAX, bounded};
use crate::traffic::fields::{Object, Problems};
use crate::traffic::matcher::{HeaderTest, Match, QueryTest, TextTest};

/// Most expressions over headers and query of one router or list of faults: 64 KiB each.
const OTHER_REGEXES_MAX: usize = 64;

/// `Match.HTTP` of a route or fault.
pub(super) fn matching(object: &mut Object<'_>, problems: &mut Problems) -> Match {
    let mut found = Match::default();
    let Some(mut outer) = object.object("Match", problems) else { return found };
    if let Some(mut http) = outer.object("HTTP", problems) {
        for name in ["PathExact", "PathPrefix", "PathRegex"] {
            let path = http.path_of(name);
            let Some(text) = http.text(name, problems).and_then(|text| bounded(text, &path, problems)) else {
                continue;
            };
            let test = match name {
                "PathExact" => TextTest::Exact(text),
                "PathPrefix" => TextTest::Prefix(text),
                _ => TextTest::Regex(text),
            };
            match &test {
                TextTest::Exact(text) | TextTest::Prefix(text) if !text.starts_with('/') => {
                    problems.add(&*path, "must begin with `/`");
                }
                TextTest::Regex(text) => check_regex(text, &path, problems),
                _ => {}
            }
            if found.path.replace(test).is_some() {
                problems.add(path, "is the second test of the path: give one of PathExact, PathPrefix and PathRegex");
            }
        }
        found.ignores_case = http.flag("CaseInsensitive", problems);
        for node in http.list("Header", TESTS_MAX, problems) {
            let mut header = node.object(problems);
            let name = header.path_of("Name");
            let text = header.text("Name", problems).unwrap_or_default().to_ascii_lowercase();
            if HeaderName::try_from(&*text).is_err() {
                problems.add(name, format!("must be a header's name, and is {text:?}"));
            }
            let ignores_case = header.flag("IgnoreCase", problems);
            let is_inverted = header.flag("Invert", problems);
            let names = ["Present", "Exact", "Prefix", "Suffix", "Contains", "Regex"];
            if let Some(test) = text_test(&mut header, &names, &node.path, problems) {
                found.headers.push(HeaderTest { name: text, test, is_inverted, ignores_case });
            }
            header.finish(problems);
        }
        for node in http.list("QueryParam", TESTS_MAX, problems) {
            let mut query = node.object(problems);
            let name = query.text("Name", problems).unwrap_or_default().to_owned();
            if name.is_empty() {
                problems.add(query.path_of("Name"), "must be given");
            }
            if let Some(test) = text_test(&mut query, &["Present", "Exact", "Regex"], &node.path, problems) {
                found.query.push(QueryTest { name, test });
            }
            query.finish(problems);
        }
        for (path, method) in http.texts("Methods", TESTS_MAX, problems) {
            if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b"-_".contains(&b)) {
                problems.add(path, "must be a method in upper case");
            }
            found.methods.push(method.to_owned());
        }
        http.finish(problems);
    }
    outer.finish(problems);
    found
}

fn text_test(object: &mut Object<'_>, names: &[&str], path: &str, problems: &mut Problems) -> Option<TextTest> {
    let mut found = None;
    for name in names {
        let own = object.path_of(name);
        let test = if *name == "Present" {
            object.flag(name, problems).then_some(TextTest::Present)
        } else {
            let text = object.text(name, problems).and_then(|text| bounded(text, &own, problems));
            text.map(|text| match *name {
                "Exact" => TextTest::Exact(text),
                "Prefix" => TextTest::Prefix(text),
                "Suffix" => TextTest::Suffix(text),
                "Contains" => TextTest::Contains(text),
                _ => TextTest::Regex(text),
            })
        };
        let Some(test) = test else { continue };
        if let TextTest::Regex(text) = &test {
            check_regex(text, &own, problems);
        }
        if found.replace(test).is_some() {
            problems.add(own, format!("is the second test: give one of {}", names.join(", ")));
        }
    }
    if found.is_none() {
        problems.add(path, format!("must have one of {}", names.join(", ")));
    }
    found
}

fn check_regex(text: &str, path: &str, problems: &mut Problems) {
    if let Err(error) = crate::authz::whole(text) {
        problems.add(path, format!("is refused: {error}"));
    }
}

/// Holds the expressions of all matches of one entry against their bounds.
pub(super) fn bound_regexes<'m>(all: impl Iterator<Item = &'m Match>, path: &str, problems: &mut Problems) {
    let (mut paths, mut others) = (0, 0);
    let is_regex = |test: &TextTest| usize::from(matches!(test, TextTest::Regex(_)));
    for one in all {
        paths += one.path.as_ref().map_or(0, is_regex);
        others += one.headers.iter().map(|header| is_regex(&header.test)).sum::<usize>();
        others += one.query.iter().map(|query| is_regex(&query.test)).sum::<usize>();
    }
    if paths > PATH_REGEXES_MAX {
        problems.add(path, format!("have {paths} path expressions; at most {PATH_REGEXES_MAX} are allowed"));
    }
    if others > OTHER_REGEXES_MAX {
        problems.add(
            path,
            format!("have {others} expressions over headers and query; at most {OTHER_REGEXES_MAX} are allowed"),
        );
    }
}

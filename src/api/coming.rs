//! Compares the page "Coming from Consul" of `api/README.md` with the route table, both ways.

use super::fake::Bench;
use super::routes::{REFUSED, ROUTES};

const PAGE: &str = include_str!("../../api/README.md");

/// One row of the table of endpoints: patterns, mark.
fn rows() -> Vec<(Vec<&'static str>, &'static str)> {
    let table = PAGE.split("\n## Endpoints\n").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("the section");
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let mut cells = row.split(" | ");
        let paths = cells.next().unwrap_or_default().split('`').filter(|text| text.starts_with('/')).collect();
        (paths, cells.next().unwrap_or_default())
    })
    .collect()
}

fn covers(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix("/*") {
        Some(prefix) => path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        None => pattern == path,
    }
}

/// Marks of the rows that cover `path`.
fn marks(path: &str) -> Vec<&'static str> {
    let rows = rows().into_iter();
    rows.filter(|(patterns, _)| patterns.iter().any(|pattern| covers(pattern, path))).map(|(_, mark)| mark).collect()
}

#[test]
fn every_endpoint_of_consul_s_is_on_the_page_once_as_it_is_served() {
    for route in ROUTES.iter().filter(|route| route.path != "/" && !route.path.starts_with("/v1/mesh/")) {
        let marks = marks(route.path);
        let is_right = matches!(marks.as_slice(), ["same" | "differs"]);
        assert!(
            is_right,
            "{} is served; api/README.md must say `same` or `differs` once, and says {marks:?}",
            route.path
        );
    }
    for (prefix, _, text) in REFUSED {
        let path = prefix.trim_end_matches('/');
        let marks = marks(path);
        let is_right = matches!(marks.as_slice(), ["refused" | "not yet"]);
        assert!(
            is_right,
            "{path} is refused ({text}); api/README.md must say `refused` or `not yet` once, and says {marks:?}"
        );
    }
}

#[test]
fn the_page_names_nothing_that_the_agent_does_not_do() {
    let rows = rows();
    assert!(rows.len() > 20, "only {} rows were found", rows.len());
    for (patterns, mark) in rows {
        for pattern in patterns {
            let served = ROUTES.iter().any(|route| covers(pattern, route.path));
            let refused = REFUSED.iter().any(|(prefix, ..)| covers(pattern, prefix.trim_end_matches('/')));
            let is_right = match mark {
                "same" | "differs" => served,
                "refused" => refused && !served,
                "not yet" => !served,
                other => panic!("{pattern}: unknown mark {other:?}"),
            };
            assert!(is_right, "{pattern} is marked {mark:?}; served: {served}, refused: {refused}");
        }
    }
}

#[tokio::test]
async fn what_is_refused_says_why_whatever_stands_behind_its_prefix() {
    let bench = Bench::new();
    for (prefix, status, text) in REFUSED {
        for path in [format!("{prefix}x"), format!("{prefix}/x?y")] {
            let answer = bench.get(&path).await;
            assert_eq!((answer.status, answer.text.as_str()), (*status, *text), "{path}");
        }
    }
}

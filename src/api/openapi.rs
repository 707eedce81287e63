//! Compares `api/openapi.yaml` with the route table, both ways, and with what stands around every handler.

use std::collections::{BTreeMap, BTreeSet};

use super::query::is_of_one_agent;
use super::routes::ROUTES;

const DOCUMENT: &str = include_str!("../../api/openapi.yaml");

/// What is never long enough to take room.
const SHORT: [&str; 4] = ["/", "/v1/agent/version", "/v1/status/leader", "/v1/connect/intentions/check"];

/// Reads (method, path) of every operation: under `paths:`, paths stand at two blanks and methods at four.
fn documented(document: &str) -> BTreeSet<(String, String)> {
    let mut operations = BTreeSet::new();
    let mut path = "";
    let inside = document.lines().skip_while(|line| *line != "paths:").skip(1);
    for line in inside.take_while(|line| line.is_empty() || line.starts_with(' ')) {
        let Some(key) = line.trim_start().strip_suffix(':') else { continue };
        match line.len() - line.trim_start().len() {
            2 => path = key,
            4 => {
                operations.insert((key.to_ascii_uppercase(), path.to_owned()));
            }
            _ => {}
        }
    }
    operations
}

#[test]
fn the_document_and_the_router_list_the_same_endpoints() {
    let served: BTreeSet<(String, String)> =
        // OpenAPI has no word for a parameter that takes the rest of the path.
        ROUTES.iter().map(|route| (route.method.to_string(), route.path.replace("{*", "{"))).collect();
    assert_eq!(served.len(), ROUTES.len(), "an endpoint stands in the table twice");
    let documented = documented(DOCUMENT);
    let missing: Vec<_> = served.difference(&documented).collect();
    let invented: Vec<_> = documented.difference(&served).collect();
    assert!(missing.is_empty() && invented.is_empty(), "not documented: {missing:?}; not served: {invented:?}");
}

/// Reads the lines of every operation, by (path, method).
fn bodies(document: &str) -> BTreeMap<(&str, &str), Vec<&str>> {
    let (mut path, mut method, mut bodies) = ("", "", BTreeMap::<_, Vec<_>>::new());
    let inside = document.lines().skip_while(|line| *line != "paths:").skip(1);
    for line in inside.take_while(|line| line.is_empty() || line.starts_with(' ')) {
        let text = line.trim_start();
        match line.len() - text.len() {
            2 => path = text,
            4 => method = text,
            _ => bodies.entry((path, method)).or_default().push(text),
        }
    }
    bodies
}

#[test]
fn every_operation_documents_the_statuses_of_what_stands_around_its_handler() {
    let bodies = bodies(DOCUMENT);
    assert_eq!(bodies.len(), ROUTES.len());
    for (operation, lines) in bodies {
        let refers = |to: &str| lines.iter().any(|line| line.contains(&format!("#/components/parameters/{to}'")));
        let (path, method) = (operation.0.trim_end_matches(':'), operation.1);
        // Of these alone is the body read, whether or not the handler looks at it.
        let has_body = matches!(method, "put:" | "post:");
        let is_write = has_body || method == "delete:";
        let writes_policy = is_write && ["/v1/config", "/v1/connect/intentions"].iter().any(|of| path.starts_with(of));
        let writes_records = is_write && ["/v1/kv/", "/v1/query"].iter().any(|of| path.starts_with(of));
        let asks_gossip = ["/v1/coordinate/node", "/v1/mesh/why"].iter().any(|of| path.starts_with(of));
        let shows_certificates = path.contains("/connect/ca/");
        let has_datacenter = !is_of_one_agent(operation.0);
        assert_eq!(refers("dc"), has_datacenter, "{operation:?}: whether it takes `dc`");
        // The guard, the head's limits; the body's; places for those who wait, room for long answers; datacenters that are not there; an agent that
        // stops, where other tasks of it are asked; limits of what all share.
        let expected = [
            ("400", true),
            ("403", true),
            ("431", true),
            ("408", has_body),
            ("413", has_body),
            ("429", refers("index") || refers("hash") || (method == "get:" && !SHORT.contains(&path))),
            ("500", has_datacenter || writes_policy || writes_records || shows_certificates),
            ("503", refers("near") || asks_gossip || writes_policy || writes_records),
            ("507", writes_records),
        ];
        for (status, is_due) in expected {
            let is_documented = lines.iter().any(|line| line.starts_with(&format!("'{status}':")));
            assert!(is_documented || !is_due, "{operation:?} can answer {status}, and the document does not say so");
        }
    }
}

#[test]
fn the_reader_sees_paths_and_methods_only() {
    let document = "info:\n  x:\npaths:\n  /a/{b}:\n    get:\n      responses:\n    put:\ncomponents:\n  y:\n    z:\n";
    let want = [("GET", "/a/{b}"), ("PUT", "/a/{b}")].map(|(method, path)| (method.to_owned(), path.to_owned()));
    assert_eq!(documented(document), BTreeSet::from(want));
}

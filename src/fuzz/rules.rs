//! Config entries about requests, as operators write them: one entry, or a list of entries that meet.

use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::model::ServiceName;
use crate::policy::ENTRY_BYTES_MAX;
use crate::traffic::{Action, Asked, Chain, Entries, Ready, Resolved, SHARES, Traffic, check_write, show};
use crate::upstream;

/// Entries of one input.
const ENTRIES_MAX: usize = 8;

/// Reads entries; whether all of them are good. What can be read compiles or says why, and a chain leads somewhere for every
/// request; of what was refused, each problem names a field.
pub(super) fn entries(bytes: &[u8]) -> bool {
    if bytes.len() > ENTRY_BYTES_MAX {
        return false;
    }
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
    let list = match value {
        Value::Array(list) => list,
        one => vec![one],
    };
    let (mut entries, mut held, mut are_good) = (Entries::default(), Vec::new(), !list.is_empty());
    for value in list.into_iter().take(ENTRIES_MAX) {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, name) = (text("Kind"), text("Name"));
        let checked = upstream::check(&kind, &value);
        for problem in checked.as_ref().err().into_iter().flatten() {
            assert!(!problem.field.is_empty() && !problem.rule.is_empty(), "a problem of nothing: {problem}");
        }
        match Ready::new(&kind, &value) {
            Ok(ready) => entries.add(&kind, &name, ready),
            Err(problems) => {
                assert!(!problems.0.is_empty(), "refused for nothing");
                are_good = false;
            }
        }
        are_good &= checked.is_ok();
        held.push((kind, name, value));
    }
    let table = upstream::table(held.iter().map(|(kind, name, value)| (kind.as_str(), name.as_str(), value)));
    let traffic = Traffic::new(entries, &Traffic::default(), Vec::new());
    for (_, name, _) in &held {
        let Ok(service) = name.parse::<ServiceName>() else { continue };
        let _balance = table.balance(&service);
        if let Some(rules) = table.rates(&service) {
            for rule in &rules.rules {
                assert!(rule.rate.per_second > 0.0 && rule.rate.burst >= 1, "a rate of nothing");
                let _matches = rule.path.matches("/a/b");
            }
        }
        if let Some(chain) = traffic.chain(&service) {
            follow(chain);
        }
        for listener in traffic.gateway(&service).iter().flat_map(|gateway| &gateway.listeners) {
            assert!(listener.port > 0 && !listener.services.is_empty(), "a port that leads nowhere");
            assert_eq!(listener.stream().is_some(), !listener.protocol.is_http(), "bytes have one service");
            for host in ["", "a", "a.b", "A.ingress.b.", ".ingress.", "*"] {
                let Some((name, exposed)) = listener.find(host) else { continue };
                assert!(exposed.service.as_ref().is_none_or(|named| *named == name), "a host of another's");
            }
        }
    }
    if let Some((last, others)) = held.split_last() {
        let others = others.iter().map(|(kind, name, value)| (kind.as_str(), name.as_str(), value));
        let written = check_write(others, (&last.0, &last.1, Some(&last.2)));
        assert!(
            !are_good || !traffic.quarantined().is_empty() || written.is_ok(),
            "good entries are refused: {written:?}"
        );
    }
    are_good && traffic.quarantined().is_empty()
}

/// Asks a chain for requests of all kinds: each has a route, and each route an end.
fn follow(chain: &Chain) {
    leads_somewhere(&chain.stream);
    let mut headers = HeaderMap::new();
    headers.insert("x-a", HeaderValue::from_static("b"));
    headers.insert("cookie", HeaderValue::from_static("stay=1; other"));
    for (path, query) in [("/", None), ("/a/b", Some("x=1&y")), ("*", None), ("", Some("")), ("/%2e/", Some("=&=="))] {
        for method in ["GET", "POST", "M-SEARCH"] {
            let route =
                chain.route(&Asked { method, path, query, headers: &headers }).expect("a route for every request");
            let _rewritten = route.path(path);
            let Action::Forward(forward) = &route.action else { continue };
            assert_eq!(forward.split.legs.last().expect("a leg").until, SHARES, "shares that are not whole");
            for draw in [0, 1, u64::MAX / 2, u64::MAX] {
                leads_somewhere(&forward.split.leg(&headers, draw).expect("a leg for every draw").to);
            }
        }
    }
    let shown = show(chain, "http", "dc1");
    assert!(shown.pointer("/Chain/StartNode").is_some(), "{shown}");
}

fn leads_somewhere(to: &Resolved) {
    for target in std::iter::once(&to.target).chain(&to.failover) {
        let takes_some = target.subset.is_some() || target.datacenter.is_some();
        assert_eq!(target.view.is_some(), takes_some, "a choice of instances without a turn of its own: {}", target.id);
    }
}

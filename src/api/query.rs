//! Query strings: parameters, Go durations, and the options that every read takes.

use std::time::Duration;

use axum::extract::Query as Form;
use http::{StatusCode, Uri};

use super::call::{Call, Refusal};
use crate::model::NodeName;

/// A blocking query waits so long where it names no time (Consul's default).
const WAIT_DEFAULT: Duration = Duration::from_mins(5);
/// Longest wait of a blocking query (Consul's cap).
const WAIT_MAX: Duration = Duration::from_mins(10);
/// Most parameters of one request: no endpoint takes as many.
const PARAMETERS_MAX: usize = 128;

/// The parameters of a request, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses the query of `uri`.
    pub(super) fn parse(uri: &Uri) -> Result<Self, Refusal> {
        let Form(pairs) = Form::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|error| Refusal::bad(format!("Invalid query string: {error}")))?;
        if pairs.len() > PARAMETERS_MAX {
            return Err(Refusal::bad(format!("Invalid query string: more than {PARAMETERS_MAX} parameters")));
        }
        Ok(Self(pairs))
    }

    /// Returns the first value of `name`.
    pub(super) fn first(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Returns the first value of `name` that is not empty.
    pub(super) fn given(&self, name: &str) -> Option<&str> {
        self.first(name).filter(|value| !value.is_empty())
    }

    /// Returns every value of `name`, in order.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Tells whether `name` is there, with or without a value.
    pub(super) fn has(&self, name: &str) -> bool {
        self.first(name).is_some()
    }

    /// Reads `name` as a switch: there and neither `false` nor `0`.
    ///
    /// # Errors
    /// 400 for any other value.
    pub(super) fn switch(&self, name: &str) -> Result<bool, Refusal> {
        match self.first(name).map(str::to_ascii_lowercase).as_deref() {
            None | Some("false" | "0" | "f") => Ok(false),
            Some("" | "true" | "1" | "t") => Ok(true),
            Some(value) => Err(Refusal::bad(format!("Invalid value for {name}: {value:?}"))),
        }
    }
}

/// How a read is to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocking {
    /// Answer when the index is above this; 0: at once.
    pub(super) index: u64,
    /// Longest wait, without jitter.
    pub(super) wait: Duration,
}

/// Whose distances order an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Near {
    /// This agent's.
    Here,
    /// Those of the node that the request comes from, by its address.
    Asker,
    /// Those of the node of this name.
    Node(NodeName),
}

/// The options that every read of the catalogue takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReadOptions {
    pub(super) blocking: Blocking,
    /// The datacenter that is asked for.
    pub(super) datacenter: String,
    /// Where the answer is ordered from.
    pub(super) near: Option<Near>,
    /// `node-meta=k:v`, all of which must hold.
    pub(super) node_meta: Vec<(String, String)>,
}

impl ReadOptions {
    /// Reads them from `call`.
    ///
    /// # Errors
    /// 400 for malformed and unsupported options, 500 for an unknown datacenter.
    pub(super) fn parse(call: &Call) -> Result<Self, Refusal> {
        let query = &call.query;
        for name in ["peer", "sg"] {
            if query.given(name).is_some() {
                return Err(Refusal::bad(format!(
                    "Invalid query parameter: {name:?} is not supported by this version of weft"
                )));
            }
        }
        if let Some(text) = query.given("max_stale") {
            parse_duration(text).ok_or_else(|| Refusal::bad(format!("Invalid max_stale duration: {text:?}")))?;
        }
        let node_meta = query.all("node-meta").map(|pair| {
            let (key, value) = pair.split_once(':').unwrap_or((pair, ""));
            (key.to_owned(), value.to_owned())
        });
        let node_meta = node_meta.collect();
        let near = match query.given("near") {
            None => None,
            Some(here) if here == "_agent" || here == call.shared.node.name.as_str() => Some(Near::Here),
            Some("_ip") => Some(Near::Asker),
            Some(other) => Some(Near::Node(
                other.parse().map_err(|error| Refusal::bad(format!("Invalid near: {other:?}: {error}")))?,
            )),
        };
        Ok(Self { blocking: Blocking::parse(query)?, datacenter: datacenter(call)?, near, node_meta })
    }
}

impl Blocking {
    /// Reads `index` and `wait`.
    pub(super) fn parse(query: &Query) -> Result<Self, Refusal> {
        let index = match query.given("index") {
            Some(text) => text.parse().map_err(|_| Refusal::bad("Invalid index"))?,
            None => 0,
        };
        let wait = match query.given("wait") {
            Some(text) => parse_duration(text).ok_or_else(|| Refusal::bad("Invalid wait time"))?,
            None => Duration::ZERO,
        };
        let wait = if wait.is_zero() { WAIT_DEFAULT } else { wait.min(WAIT_MAX) };
        Ok(Self { index, wait })
    }
}

/// Refuses what no endpoint can honour: namespaces and partitions; and of endpoints that tell of the mesh, an unknown
/// datacenter and an answer that is to be stale and consistent. As Consul's, those of one agent do not look at the latter.
///
/// # Errors
/// 400; 500 for the datacenter.
pub(super) fn refuse_unknown_places(call: &Call, path: &str) -> Result<(), Refusal> {
    refuse_tenancy(call)?;
    if is_of_one_agent(path) {
        return Ok(());
    }
    if call.query.has("stale") && call.query.has("consistent") {
        return Err(Refusal::bad("Cannot combine ?stale with ?consistent: they ask for opposite things"));
    }
    datacenter(call).map(drop)
}

/// Tells whether the endpoint at `path` is about the asked agent, or weft's own: there is no `dc` in it.
pub(super) fn is_of_one_agent(path: &str) -> bool {
    !path.starts_with("/v1/") || path.starts_with("/v1/agent/") || path.starts_with("/v1/mesh/")
}

/// Refuses namespaces and partitions, in the query and in Consul's headers.
pub(super) fn refuse_tenancy(call: &Call) -> Result<(), Refusal> {
    for (name, header) in [("ns", "x-consul-namespace"), ("partition", "x-consul-partition")] {
        if call.query.given(name).is_some() || call.headers.get(header).is_some_and(|value| !value.is_empty()) {
            return Err(Refusal::bad(format!(
                "Invalid query parameter: {name:?}: weft has neither namespaces nor partitions"
            )));
        }
    }
    Ok(())
}

/// Returns the datacenter that is asked for: the agent's own where none is named.
fn datacenter(call: &Call) -> Result<String, Refusal> {
    let own = &call.shared.node.datacenter;
    let Some(wanted) = call.query.given("dc").filter(|wanted| wanted != own) else { return Ok(own.clone()) };
    let snapshot = call.shared.snapshot.load();
    if snapshot.nodes.values().any(|node| node.info.datacenter == wanted) {
        return Ok(wanted.to_owned());
    }
    Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "No path to datacenter"))
}

/// Parses a Go duration that is not negative: `10s`, `1h30m`, `1.5s`, `100ms`, `0`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(digits)?;
        let unit_bytes = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_bytes)?;
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = tail;
    }
    text.contains(|c: char| c.is_ascii_digit()).then_some(total)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Request;
    use proptest::prelude::*;

    use super::super::fake::Bench;
    use super::super::routes::{ROUTES, Route};
    use super::*;

    #[track_caller]
    fn parse(text: &str) -> Query {
        Query::parse(&text.parse().unwrap()).unwrap()
    }

    #[test]
    fn go_durations_are_read_as_go_reads_them() {
        #[track_caller]
        fn check(text: &str, want: Option<Duration>) {
            assert_eq!(parse_duration(text), want, "{text}");
        }
        check("10s", Some(Duration::from_secs(10)));
        check("1h30m", Some(Duration::from_mins(90)));
        check("1.5s", Some(Duration::from_millis(1500)));
        check("10000ms", Some(Duration::from_secs(10)));
        check("0", Some(Duration::ZERO));
        check("0s", Some(Duration::ZERO));
        for bad in ["", "s", "10", "-5s", "5x", "1s2", ".", "+", "99999999999999999999999h", "1..s"] {
            check(bad, None);
        }
    }

    #[test]
    fn waits_have_a_default_and_a_cap() {
        #[track_caller]
        fn check(query: &str, index: u64, minutes: u64) {
            let want = Blocking { index, wait: Duration::from_mins(minutes) };
            assert_eq!(Blocking::parse(&parse(query)), Ok(want));
        }
        check("/x", 0, 5);
        check("/x?index=7", 7, 5);
        check("/x?index=7&wait=0s", 7, 5);
        check("/x?index=7&wait=2m", 7, 2);
        check("/x?index=&wait=3h", 0, 10);
    }

    #[test]
    fn bad_indexes_and_waits_are_refused() {
        assert_eq!(Blocking::parse(&parse("/x?index=-1")), Err(Refusal::bad("Invalid index")));
        assert_eq!(Blocking::parse(&parse("/x?index=99999999999999999999")), Err(Refusal::bad("Invalid index")));
        assert_eq!(Blocking::parse(&parse("/x?index=1&wait=soon")), Err(Refusal::bad("Invalid wait time")));
    }

    #[test]
    fn a_switch_is_on_by_its_name_alone() {
        assert_eq!(parse("/x?passing").switch("passing"), Ok(true));
        assert_eq!(parse("/x?passing=1").switch("passing"), Ok(true));
        assert_eq!(parse("/x?passing=false").switch("passing"), Ok(false));
        assert_eq!(parse("/x").switch("passing"), Ok(false));
        assert!(parse("/x?passing=maybe").switch("passing").is_err());
    }

    #[tokio::test]
    async fn no_endpoint_takes_a_namespace_and_none_of_the_mesh_an_unknown_datacenter() {
        let bench = Bench::new();
        for Route { method, path, .. } in ROUTES {
            let filled =
                path.replace("{*entry}", "service-defaults/web").replace("{*key}", "a").replace(['{', '}'], "");
            let mut cases = vec![("ns=team", 400, "namespaces"), ("partition=p", 400, "partitions")];
            if !is_of_one_agent(path) {
                cases.extend([("dc=dc9", 500, "No path to datacenter"), ("stale&consistent", 400, "opposite")]);
            }
            for (query, status, part) in cases {
                let answer = bench.call(method.clone(), &format!("{filled}?{query}"), "").await;
                assert_eq!(answer.status.as_u16(), status, "{method} {path}?{query}: {}", answer.text);
                assert!(answer.text.contains(part), "{method} {path}?{query}: {}", answer.text);
            }
            let with_header = Request::builder().method(method).uri(&filled).header("x-consul-namespace", "team");
            let answer = bench.send(with_header.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.status.as_u16(), 400, "{method} {path}: {}", answer.text);
            assert!(answer.text.contains("namespaces"), "{method} {path}: {}", answer.text);
        }
        assert!(bench.orders().is_empty() && !bench.leave.is_cancelled(), "nothing was done");
        for of_this_agent in ["/v1/agent/self?dc=dc9", "/v1/agent/services?stale&consistent", "/v1/mesh/info?dc=dc9"] {
            assert_eq!(bench.get(of_this_agent).await.status, StatusCode::OK, "{of_this_agent}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_duration_or_not_without_a_panic(text in "[0-9.hmsnuµ+-]{0,24}") {
            let _unused = parse_duration(&text);
        }
    }
}

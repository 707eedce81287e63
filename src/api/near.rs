//! How far nodes are from each other: round trips that QUIC measures on gossip's connections. They order lists
//! (`?near=_agent`, `?near=NODE`, `?near=_ip`) and stand behind Consul's network coordinates (`/v1/coordinate/…`).
//!
//! An agent measures its own round trips. For an order from another node that node's agent is asked, once in [`KEPT`]
//! however many wait for it; where it cannot be asked its own records come first and the others stay as they were.
//! As coordinates the round trips are a star with this agent in the middle:
//! every node at the origin, as high as its round trip, so that the distance from this agent is what was measured, and the
//! distance of two others is the way through this agent: never less than the shortest one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::call::{Call, Refusal, Reply};
use super::index::Topic;
use super::query::{Near, ReadOptions};
use super::{block, catalog};
use crate::clock;
use crate::model::NodeName;

/// The height that a node has at least, in seconds: Serf's, ten microseconds.
const HEIGHT_MIN_SECONDS: f64 = 1e-5;
/// Where every node stands.
const ORIGIN: [f64; 8] = [0.0; 8];
/// The error of a coordinate that was never measured: Vivaldi's start.
const ERROR_UNMEASURED: f64 = 1.5;

/// So long another node's answer orders lists: distances change slowly, and thousands of queries may wake at once.
const KEPT: Duration = Duration::from_secs(5);
/// Most nodes whose answers are kept; with no place free an order is unknown. Each has 20 KiB at most.
const KEPT_MAX: usize = 256;

/// What other nodes told of their round trips.
#[derive(Debug, Default)]
pub(super) struct Distances(Mutex<BTreeMap<NodeName, Told>>);

#[derive(Debug, Clone)]
struct Told {
    asked: Instant,
    /// Whoever comes while the node is asked waits for the same answer.
    trips: Arc<OnceCell<RoundTrips>>,
}

impl Distances {
    /// Returns the place of `node`'s answer: an empty one if it has to be asked; none: all places are taken.
    fn of(&self, node: &NodeName, now: Instant) -> Option<Arc<OnceCell<RoundTrips>>> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, one| now < one.asked + KEPT);
        if !told.contains_key(node) && told.len() >= KEPT_MAX {
            return None;
        }
        let new = || Told { asked: now, trips: Arc::default() };
        Some(Arc::clone(&told.entry(node.clone()).or_insert_with(new).trips))
    }
}

/// Round trips from one node, by node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RoundTrips(BTreeMap<NodeName, Duration>);

impl RoundTrips {
    /// Measures, if `options` ask for an order by distance.
    ///
    /// # Errors
    /// 503 if the agent stops.
    pub(super) async fn wanted(call: &Call, options: &ReadOptions) -> Result<Option<Self>, Refusal> {
        let from = match &options.near {
            None => return Ok(None),
            Some(Near::Here) => call.shared.node.name.clone(),
            Some(Near::Node(name)) => name.clone(),
            Some(Near::Asker) => match asker(call) {
                Some(name) => name,
                // As Consul: who is no node gets no order.
                None => return Ok(None),
            },
        };
        if from == call.shared.node.name { Self::now(call).await.map(Some) } else { Self::of(call, from).await }
    }

    /// Asks another node; none if there is none of that name, or too many others are asked.
    async fn of(call: &Call, node: NodeName) -> Result<Option<Self>, Refusal> {
        if !call.shared.snapshot.load().nodes.contains_key(&node) {
            return Ok(None);
        }
        let Some(cell) = call.shared.distances.of(&node, clock::now()) else { return Ok(None) };
        let ask = || async {
            let mut told = call.shared.membership.round_trips_of(node.clone()).await?.unwrap_or_default();
            told.insert(node.clone(), Duration::ZERO);
            Ok::<Self, Refusal>(Self(told))
        };
        cell.get_or_try_init(ask).await.cloned().map(Some)
    }

    /// Measures.
    pub(super) async fn now(call: &Call) -> Result<Self, Refusal> {
        let mut measured = call.shared.membership.round_trips().await?;
        measured.insert(call.shared.node.name.clone(), Duration::ZERO);
        Ok(Self(measured))
    }

    /// Orders `records` by the distance of their nodes, those that nobody measured last; equals keep their order.
    pub(super) fn order<T>(&self, records: &mut [T], node: impl Fn(&T) -> &str) {
        records.sort_by_key(|record| self.0.get(node(record)).copied().unwrap_or(Duration::MAX));
    }

    /// Returns them by node.
    pub(super) fn into_map(self) -> BTreeMap<NodeName, Duration> {
        self.0
    }

    /// The coordinate of `node`.
    fn coordinate(&self, node: &NodeName) -> Value {
        let measured = self.0.get(node).map(Duration::as_secs_f64);
        let height =
            measured.map_or(HEIGHT_MIN_SECONDS, |seconds| (seconds - HEIGHT_MIN_SECONDS).max(HEIGHT_MIN_SECONDS));
        let error = if measured.is_some() { 0.0 } else { ERROR_UNMEASURED };
        json!({
            "Node": node,
            "Segment": "",
            "Coord": {"Vec": ORIGIN, "Error": error, "Adjustment": 0.0, "Height": height},
        })
    }
}

/// Returns the node that the request comes from: by `X-Forwarded-For`, as a proxy says it, else by the connection's
/// address; whoever comes from this host is at this agent's.
fn asker(call: &Call) -> Option<NodeName> {
    let said =
        call.headers.get("x-forwarded-for").and_then(|list| list.to_str().ok()?.split(',').next()?.trim().parse().ok());
    let ip: IpAddr = match said.or(call.peer) {
        Some(ip) if !ip.is_loopback() => ip,
        _ => return Some(call.shared.node.name.clone()),
    };
    let snapshot = call.shared.snapshot.load();
    snapshot.nodes.values().find(|node| node.info.mesh_addr.ip() == ip).map(|node| node.info.name.clone())
}

/// `GET /v1/coordinate/nodes`: every node that is shown, in order of name.
pub(super) async fn nodes(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Nodes).await?;
    let trips = RoundTrips::now(&call).await?;
    let shown = snapshot.nodes.values().filter(|node| catalog::is_shown(node, &options));
    let coordinates: Vec<Value> = shown.map(|node| trips.coordinate(&node.info.name)).collect();
    Reply::at_index(&call, &coordinates, index)
}

/// `GET /v1/coordinate/node/:node`
pub(super) async fn node(call: Call) -> Result<Reply, Refusal> {
    let options = ReadOptions::parse(&call)?;
    let (snapshot, index) = block::wait(&call, options.blocking, Topic::Nodes).await?;
    let trips = RoundTrips::now(&call).await?;
    let found = snapshot.nodes.get(call.argument.as_str()).filter(|node| catalog::is_shown(node, &options));
    let Some(node) = found else {
        let text = format!("no node is named {:?}; GET /v1/catalog/nodes lists them", call.argument);
        return Ok(Reply::absent(text, index));
    };
    Reply::at_index(&call, &[trips.coordinate(&node.info.name)], index)
}

/// `GET /v1/mesh/round-trips?from=NODE`: what that node's agent measured, in seconds by node; without `from` this agent's.
/// A node that cannot be asked within a second has but itself.
pub(super) async fn round_trips(call: Call) -> Result<Reply, Refusal> {
    let own = &call.shared.node.name;
    let from: NodeName = match call.query.given("from") {
        Some(text) => text.parse().map_err(|error| Refusal::bad(format!("Invalid from: {text:?}: {error}")))?,
        None => own.clone(),
    };
    let trips = if from == *own {
        RoundTrips::now(&call).await?
    } else if call.shared.snapshot.load().nodes.contains_key(&from) {
        let crowded = || Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many nodes are asked already; ask again");
        RoundTrips::of(&call, from.clone()).await?.ok_or_else(crowded)?
    } else {
        let text = format!("no node is named {:?}; GET /v1/catalog/nodes lists them", from.as_str());
        return Err(Refusal::new(StatusCode::NOT_FOUND, text));
    };
    let seconds: BTreeMap<NodeName, f64> = trips.0.into_iter().map(|(node, trip)| (node, trip.as_secs_f64())).collect();
    Reply::json(&call, &json!({"From": from, "Seconds": seconds}))
}

/// `GET /v1/coordinate/datacenters`: this agent for its datacenter; weft measures nodes, not datacenters.
pub(super) async fn datacenters(call: Call) -> Result<Reply, Refusal> {
    let own = &call.shared.node;
    let coordinate = RoundTrips::default().coordinate(&own.name);
    Reply::json(&call, &json!([{"Datacenter": own.datacenter, "AreaID": "wan", "Coordinates": [coordinate]}]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_of_so_many_nodes_are_kept_for_a_while() {
        let (distances, now) = (Distances::default(), clock::now());
        let of = |number: usize, at: Instant| distances.of(&format!("n{number}").parse().unwrap(), at);
        for number in 0..KEPT_MAX {
            assert!(of(number, now).is_some(), "{number}");
        }
        assert!(of(KEPT_MAX, now).is_none(), "no place is free");
        let (first, again) = (of(0, now).unwrap(), of(0, now + KEPT / 2).unwrap());
        assert!(Arc::ptr_eq(&first, &again), "who has a place keeps it");
        assert!(of(KEPT_MAX, now + KEPT).is_some(), "places come free");
    }
}

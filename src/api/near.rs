//! How far the other nodes are: round trips that QUIC measures on gossip's connections. They order lists (`?near=_agent`)
//! and stand behind Consul's network coordinates (`/v1/coordinate/…`).
//!
//! An agent measures its own round trips and nobody else's. As coordinates they are a star with this agent in the middle:
//! every node at the origin, as high as its round trip, so that the distance from this agent is what was measured, and the
//! distance of two others is the way through this agent: never less than the shortest one.

use std::collections::BTreeMap;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply};
use super::index::Topic;
use super::query::{Near, ReadOptions};
use super::{block, catalog};
use crate::model::NodeName;

/// The height that a node has at least, in seconds: Serf's, ten microseconds.
const HEIGHT_MIN_SECONDS: f64 = 1e-5;
/// Where every node stands.
const ORIGIN: [f64; 8] = [0.0; 8];
/// The error of a coordinate that was never measured: Vivaldi's start.
const ERROR_UNMEASURED: f64 = 1.5;

/// Round trips from this agent, by node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RoundTrips(BTreeMap<NodeName, Duration>);

impl RoundTrips {
    /// Measures, if `options` ask for an order by distance.
    ///
    /// # Errors
    /// 503 if the agent stops.
    pub(super) async fn wanted(call: &Call, options: &ReadOptions) -> Result<Option<Self>, Refusal> {
        match options.near {
            None => Ok(None),
            Some(Near::Here) => Self::now(call).await.map(Some),
        }
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
        return Err(Refusal::new(StatusCode::NOT_FOUND, text));
    };
    Reply::at_index(&call, &[trips.coordinate(&node.info.name)], index)
}

/// `GET /v1/coordinate/datacenters`: this agent for its datacenter; weft measures nodes, not datacenters.
pub(super) async fn datacenters(call: Call) -> Result<Reply, Refusal> {
    let own = &call.shared.node;
    let coordinate = RoundTrips::default().coordinate(&own.name);
    Reply::json(&call, &json!([{"Datacenter": own.datacenter, "AreaID": "wan", "Coordinates": [coordinate]}]))
}

//! Whose distances order the instances of an answer (`dns_config.near`): this agent's, or those of the node that asks.
//!
//! ```text
//!   asker's IP -> node -> kept round trips of that node --(old, or none)--> asked again, beside the answer
//! ```
//!
//! Invariants: no answer waits for a measure: one that comes first is shuffled; each node is asked once in
//! [`FRESH`] at most; kept measures are bounded in number and in age.
//! Not here: who measures (`gossip`), the order itself (`answer`).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::model::NodeName;

/// So old a measure is renewed: distances change slowly.
const FRESH: Duration = Duration::from_secs(10);
/// So old a measure orders nothing: who cannot be asked for so long may be elsewhere.
const KEPT: Duration = Duration::from_mins(1);
/// Most nodes whose measures are kept; the oldest go first, but none that was asked within [`FRESH`]. Each has some 30 KiB at
/// most, a few hundred bytes in a small mesh.
const NODES_MAX: usize = 256;

/// Round trips from one node, by node.
pub type Trips = BTreeMap<NodeName, Duration>;

/// Tells how far nodes are from each other.
pub trait RoundTrips: Send + Sync {
    /// Asks the agent of `node`, this one too, what it measured; none if it cannot be asked.
    fn from(&self, node: NodeName) -> BoxFuture<'static, Option<Trips>>;
}

/// From where answers are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Near {
    /// This agent.
    Agent,
    /// The node at the asker's address; no node there: answers are shuffled.
    Asker,
}

/// Why a text names no such place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be `_agent` (this agent's round trips) or `_ip` (those of the node that asks), or left out for shuffled answers"
)]
pub struct NearError;

impl FromStr for Near {
    type Err = NearError;

    fn from_str(text: &str) -> Result<Self, NearError> {
        match text {
            "_agent" => Ok(Self::Agent),
            "_ip" => Ok(Self::Asker),
            _ => Err(NearError),
        }
    }
}

/// What nodes told of their round trips.
pub(super) struct Distances {
    source: Arc<dyn RoundTrips>,
    kept: Mutex<BTreeMap<NodeName, Kept>>,
}

impl fmt::Debug for Distances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Distances").field("kept", &self.kept).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
struct Kept {
    asked: Instant,
    told: Instant,
    trips: Arc<Trips>,
}

/// Whether somebody has to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewal {
    Due,
    NotDue,
}

impl Distances {
    pub(super) fn new(source: Arc<dyn RoundTrips>) -> Self {
        Self { source, kept: Mutex::default() }
    }

    /// Returns what is known of `node` at `now`. If a renewal is due the caller must [`Distances::ask`]; it is due once.
    pub(super) fn of(&self, node: &NodeName, now: Instant) -> (Option<Arc<Trips>>, Renewal) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(one) = kept.get_mut(node) {
            let known = (now < one.told + KEPT).then(|| Arc::clone(&one.trips));
            if now < one.asked + FRESH {
                return (known, Renewal::NotDue);
            }
            one.asked = now;
            return (known, Renewal::Due);
        }
        if kept.len() >= NODES_MAX {
            let old = kept.iter().filter(|(_, one)| now >= one.asked + FRESH);
            let oldest = old.min_by_key(|(_, one)| one.asked).map(|(name, _)| name.clone());
            // With no place the answer is shuffled and nobody is asked: what was told could not be kept.
            let Some(oldest) = oldest else { return (None, Renewal::NotDue) };
            kept.remove(&oldest);
        }
        // Nothing is known yet: older than anything that is kept.
        kept.insert(node.clone(), Kept { asked: now, told: now, trips: Arc::default() });
        (None, Renewal::Due)
    }

    /// Asks `node` and keeps what it tells, its own distance of nothing included.
    pub(super) async fn ask(&self, node: NodeName, now: Instant) {
        let Some(mut trips) = self.source.from(node.clone()).await else { return };
        trips.insert(node.clone(), Duration::ZERO);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(one) = kept.get_mut(&node) {
            *one = Kept { told: now, trips: Arc::new(trips), asked: one.asked };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nearby;

    impl RoundTrips for Nearby {
        fn from(&self, node: NodeName) -> BoxFuture<'static, Option<Trips>> {
            let told = (node.as_str() != "dumb").then(|| [("n2".parse().unwrap(), Duration::from_millis(2))].into());
            Box::pin(async move { told })
        }
    }

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_measure_is_renewed_once_in_a_while_used_meanwhile_and_forgotten_at_last() {
        let distances = Distances::new(Arc::new(Nearby));
        let start = Instant::now();
        assert_eq!(distances.of(&name("n1"), start), (None, Renewal::Due));
        assert_eq!(distances.of(&name("n1"), start).1, Renewal::NotDue, "somebody asks already");
        distances.ask(name("n1"), start).await;
        let (trips, due) = distances.of(&name("n1"), start + FRESH / 2);
        let want = Trips::from([(name("n1"), Duration::ZERO), (name("n2"), Duration::from_millis(2))]);
        assert_eq!((trips.as_deref(), due), (Some(&want), Renewal::NotDue));
        assert_eq!(distances.of(&name("n1"), start + FRESH), (Some(Arc::new(want)), Renewal::Due));
        assert_eq!(distances.of(&name("n1"), start + KEPT), (None, Renewal::Due), "nobody renewed it");
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_are_bounded_and_one_that_cannot_be_asked_orders_nothing() {
        let distances = Distances::new(Arc::new(Nearby));
        let start = Instant::now();
        assert_eq!(distances.of(&name("dumb"), start).1, Renewal::Due);
        distances.ask(name("dumb"), start).await;
        assert!(distances.of(&name("dumb"), start).0.is_none_or(|trips| trips.is_empty()));
        for at in 0..NODES_MAX + 5 {
            let _first = distances.of(&name(&format!("n{at}")), start + Duration::from_millis(1));
        }
        assert_eq!(distances.kept.lock().unwrap().len(), NODES_MAX);
        assert_eq!(distances.of(&name("late"), start), (None, Renewal::NotDue), "all were asked just now");
        assert_eq!(distances.of(&name("late"), start + FRESH), (None, Renewal::Due), "the oldest gives way");
        assert_eq!(distances.kept.lock().unwrap().len(), NODES_MAX);
    }

    #[test]
    fn the_two_places_have_consul_s_names() {
        assert_eq!(("_agent".parse(), "_ip".parse()), (Ok(Near::Agent), Ok(Near::Asker)));
        assert_eq!("n1".parse::<Near>(), Err(NearError));
    }
}

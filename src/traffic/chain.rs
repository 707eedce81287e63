//! The compiled routing of one service: what a request meets on its way, ready to be asked.
//!
//! ```text
//!   faults -> routes, first match -> redirect
//!                               \--> split: by weight, or by what a caller sticks to -> target -> failover targets
//! ```

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header;
use serde_json::Value;

use super::compile::Router;
use super::entry::{Abort, Fault, HeaderEdit, Redirect, Resolver, Sticky};
use super::hedge::Hedge;
use super::matcher::{Asked, Match, Matcher};
use super::retry::Retry;
use super::subset::Filter;
use crate::model::{HealthStatus, Instance, ServiceName};

/// The whole of a split's shares: products of weights in units of 0.01 % are exact down to the third splitter.
pub const SHARES: u64 = 1_000_000_000_000;

/// Instances that requests may go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Of which service.
    pub service: ServiceName,
    /// Which subset: its name and what it takes.
    pub subset: Option<Subset>,
    /// Only those of this datacenter; empty: of this node's.
    pub datacenter: Option<String>,
    /// Under which name the selection keeps its turn; none: all of the service.
    pub view: Option<ServiceName>,
    /// Subset, service and datacenter in one text, as Consul names a target.
    pub id: String,
}

/// What a subset takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subset {
    /// Its name.
    pub name: String,
    /// None: all.
    pub filter: Option<Filter>,
    /// Whether warning ones are left out.
    pub only_passing: bool,
}

impl Target {
    /// Tells whether `instance` belongs to it, seen from a node in datacenter `here`.
    pub fn takes(&self, instance: &Instance, here: &str) -> bool {
        let is_there = match self.datacenter.as_deref() {
            None => true,
            Some("") => instance.node.info.datacenter == here,
            Some(name) => instance.node.info.datacenter == name,
        };
        is_there
            && self.subset.as_ref().is_none_or(|subset| {
                (!subset.only_passing || instance.status == HealthStatus::Passing)
                    && subset.filter.as_ref().is_none_or(|filter| filter.matches(instance))
            })
    }
}

/// Where a share of the requests goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// First.
    pub target: Arc<Target>,
    /// In this order, where none before it can take a request.
    pub failover: Vec<Arc<Target>>,
    /// Connecting an instance.
    pub connect_timeout: Option<Duration>,
    /// Where no route says so.
    pub request_timeout: Option<Duration>,
    /// Without a byte either way, of connections of bytes and upgraded ones.
    pub idle_timeout: Option<Duration>,
}

impl Resolved {
    /// A target with nothing around it.
    pub fn plain(target: Arc<Target>) -> Self {
        Self { target, failover: Vec::new(), connect_timeout: None, request_timeout: None, idle_timeout: None }
    }

    /// The same, with the times that `resolver` gives.
    pub(super) fn timed(self, resolver: &Resolver) -> Self {
        let Resolver { connect_timeout, request_timeout, idle_timeout, .. } = *resolver;
        Self { connect_timeout, request_timeout, idle_timeout, ..self }
    }
}

/// One part of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leg {
    /// The sum of all shares up to and with this one, of [`SHARES`].
    pub until: u64,
    /// Where it goes.
    pub to: Arc<Resolved>,
    /// Of the request, after the route's.
    pub request_headers: HeaderEdit,
    /// Of the response, before the route's.
    pub response_headers: HeaderEdit,
}

/// How the requests of a route are shared out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// In order of `until`; never empty, and the last one's is [`SHARES`].
    pub legs: Vec<Leg>,
    /// What a caller stays by.
    pub sticky: Option<Sticky>,
}

impl Split {
    /// Returns the leg that a caller stays with by what its headers say, whatever is drawn; none: it is drawn.
    pub fn kept(&self, headers: &HeaderMap) -> Option<&Leg> {
        self.sticky.as_ref()?.value(headers)?;
        self.leg(headers, 0)
    }

    /// Takes the leg of a request; `draw` is uniform over its range.
    pub fn leg(&self, headers: &HeaderMap, draw: u64) -> Option<&Leg> {
        let [leg] = &*self.legs else {
            let draw = self.sticky.as_ref().and_then(|sticky| sticky.value(headers)).map_or(draw, stable_hash);
            // The upper half of the product: `draw` scaled to the shares without a remainder's bias.
            let place = u64::try_from((u128::from(draw) * u128::from(SHARES)) >> 64).unwrap_or(0);
            return self.legs.get(self.legs.partition_point(|leg| leg.until <= place));
        };
        Some(leg)
    }
}

impl Sticky {
    /// The value that a caller stays by.
    fn value<'h>(&self, headers: &'h HeaderMap) -> Option<&'h [u8]> {
        let value = match self {
            Self::Header(name) => headers.get(name)?.as_bytes(),
            Self::Cookie(name) => headers.get_all(header::COOKIE).iter().find_map(|value| {
                let pairs = value.as_bytes().split(|b| *b == b';').map(<[u8]>::trim_ascii);
                pairs.filter_map(|pair| pair.strip_prefix(name.as_bytes())).find_map(|rest| rest.strip_prefix(b"="))
            })?,
        };
        (!value.is_empty()).then_some(value)
    }
}

/// A hash that is the same on every node and in every version: FNV-1a (64 bits), its bits mixed once more as in murmur3.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// A copy of a share of a route's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Where to.
    pub to: Arc<Target>,
    /// Which share, in units of 0.01 %.
    pub share: u16,
}

/// What becomes of the requests of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// They go on.
    Forward(Box<Forward>),
    /// Their callers go elsewhere.
    Redirect(Redirect),
}

/// How requests go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Where to.
    pub split: Arc<Split>,
    /// In place of the authority.
    pub host: Option<String>,
    /// From the request's head to the response's end.
    pub request_timeout: Option<Duration>,
    /// One attempt, up to the response's head.
    pub per_try_timeout: Option<Duration>,
    /// Without a byte of the response.
    pub idle_timeout: Option<Duration>,
    /// What is tried again.
    pub retry: Option<Retry>,
    /// What is sent a second time before it is answered.
    pub hedge: Option<Hedge>,
    /// Who gets a copy.
    pub mirror: Option<Mirror>,
    /// Of the request.
    pub request_headers: HeaderEdit,
    /// Of the response.
    pub response_headers: HeaderEdit,
}

/// A route of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its place in the router, from 0; none: the route for all the rest.
    pub at: Option<usize>,
    /// What the path rewrite takes away, and what it puts there.
    pub rewrite: Option<(usize, String)>,
    /// What becomes of its requests.
    pub action: Action,
}

impl Route {
    /// The path that is sent, its query included.
    pub fn path(&self, path_and_query: &str) -> Option<String> {
        let (taken, put) = self.rewrite.as_ref()?;
        let rest = path_and_query.get(*taken..).unwrap_or_default();
        // `/v1/` for `/` leaves no `//`, and `/v1` for `/` on `/v1/x` none either.
        let rest = if put.ends_with('/') { rest.strip_prefix('/').unwrap_or(rest) } else { rest };
        let was_at_slash = taken.checked_sub(1).and_then(|at| path_and_query.as_bytes().get(at)) == Some(&b'/');
        let joins = !was_at_slash || put.ends_with('/') || rest.is_empty() || rest.starts_with(['/', '?']);
        Some(format!("{put}{}{rest}", if joins { "" } else { "/" }))
    }
}

/// Faults of a service, ready.
#[derive(Debug, Default)]
pub struct Faults {
    pub(super) matcher: Matcher,
    pub(super) list: Vec<Fault>,
    /// As they were written, for people.
    pub(super) written: Vec<Value>,
}

impl Faults {
    /// The fault that a request meets, or without one a connection of bytes, as it was written.
    pub fn met(&self, asked: Option<&Asked<'_>>) -> Option<&Value> {
        let at = match asked {
            Some(asked) => self.matcher.first(asked),
            None => self.list.iter().position(|fault| fault.when == Match::default()),
        };
        self.written.get(at?)
    }

    /// All of them, as they were written.
    pub fn all(&self) -> &[Value] {
        &self.written
    }

    /// What the first fault that matches does to this request; `draws` are uniform over their range.
    pub fn strike(&self, asked: &Asked<'_>, draws: (u32, u32)) -> (Option<Duration>, Option<&Abort>) {
        let found = self.matcher.first(asked).and_then(|at| self.list.get(at));
        let Some(Fault { delay, abort, .. }) = found else { return (None, None) };
        (
            delay.filter(|(share, _)| is_hit(*share, draws.0)).map(|(_, delay)| delay),
            abort.as_ref().filter(|(share, _)| is_hit(*share, draws.1)).map(|(_, abort)| abort),
        )
    }

    /// What the first fault that is about all requests does to a connection of bytes: a delay before it is carried, and whether
    /// it is reset then; a status means nothing there.
    pub fn strike_stream(&self, draws: (u32, u32)) -> (Option<Duration>, bool) {
        let Some(Fault { delay, abort, .. }) = self.list.iter().find(|fault| fault.when == Match::default()) else {
            return (None, false);
        };
        let delay = delay.filter(|(share, _)| is_hit(*share, draws.0)).map(|(_, delay)| delay);
        (delay, abort.as_ref().is_some_and(|(share, abort)| *abort == Abort::Reset && is_hit(*share, draws.1)))
    }
}

/// Whether a draw falls into a share in units of 0.01 %.
pub fn is_hit(share: u16, draw: u32) -> bool {
    (u64::from(draw) * 10_000) >> 32 < u64::from(share)
}

/// Everything about the requests to one service. Immutable.
#[derive(Debug)]
pub struct Chain {
    /// Which service.
    pub service: ServiceName,
    /// What is broken on purpose.
    pub faults: Option<Arc<Faults>>,
    /// Finds a route; none: there is one alone.
    pub(super) router: Option<Arc<Router>>,
    /// In order; the last is for all the rest.
    pub routes: Vec<Route>,
    /// Where streams of bytes go: what the resolver alone says.
    pub stream: Arc<Resolved>,
}

impl Chain {
    /// A route of the router as it was written; none: it is the one for all the rest.
    pub fn written(&self, route: &Route) -> Option<&Value> {
        self.router.as_ref()?.written.get(route.at?)
    }

    /// Finds the route of a request: the first that matches, or the one for all the rest.
    pub fn route(&self, asked: &Asked<'_>) -> Option<&Route> {
        let at = self.router.as_ref().and_then(|router| router.matcher.first(asked));
        at.map_or_else(|| self.routes.last(), |at| self.routes.get(at))
    }
}

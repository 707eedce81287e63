//! Config entries about requests.
//!
//! What is weft's own beside Consul's fields: `HostRewrite`, `PerTryTimeout`, `RetryBackoff`, `Hedge` and `Mirror` of a
//! route's destination, `Redirect` of a route, `Sticky` of a splitter, `IdleTimeout` of a resolver, `TrustedHops` of `proxy-defaults`, and the
//! whole kind `service-faults`.
//! `LoadBalancer`, `UpstreamConfig`, `RateLimits` and the like are others' to read: they pass here as they are.

use std::collections::BTreeMap;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};

use super::gateway::Gateway;
use super::hedge::Hedge;
use super::hops::TrustedHops;
use super::matcher::Match;
use super::retry::Retry;
use super::subset::Filter;
use crate::model::{Protocol, ServiceName};

/// Headers that are changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderEdit {
    /// Added to those of the name.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Put in place of those of the name.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Taken out.
    pub remove: Vec<HeaderName>,
}

impl HeaderEdit {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.set.is_empty() && self.remove.is_empty()
    }

    /// Changes `headers`: takes out, then sets, then adds.
    pub fn apply(&self, headers: &mut http::HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }
}

/// A copy of some requests to another service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MirrorRule {
    /// Where to.
    pub service: ServiceName,
    /// Which subset of it.
    pub subset: Option<String>,
    /// Which share, in units of 0.01 %.
    pub share: u16,
}

/// Where a route's requests go, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Destination {
    /// None: the router's own service.
    pub service: Option<ServiceName>,
    /// Straight to this subset, past a splitter.
    pub subset: Option<String>,
    /// In place of the path prefix (or exact path) that matched.
    pub prefix_rewrite: Option<String>,
    /// In place of the authority.
    pub host_rewrite: Option<String>,
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
    pub mirror: Option<MirrorRule>,
    /// Of the request.
    pub request_headers: HeaderEdit,
    /// Of the response.
    pub response_headers: HeaderEdit,
}

/// An answer that sends the caller elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub code: u16,
    /// None: `http`.
    pub scheme: Option<String>,
    /// None: the request's.
    pub host: Option<String>,
    /// The whole path, its query included; none: the request's.
    pub path: Option<String>,
    /// In place of the prefix that matched.
    pub prefix_rewrite: Option<String>,
}

/// What becomes of a request that a route matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Then {
    /// It goes on.
    Forward(Box<Destination>),
    /// Its caller goes elsewhere.
    Redirect(Redirect),
}

/// A route of a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// Which requests.
    pub when: Match,
    /// What becomes of them.
    pub then: Then,
}

/// Which split a caller stays with: by the hash of this value, where the request has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sticky {
    /// A header's value.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(String),
}

/// A share of a service's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// In units of 0.01 %.
    pub weight: u16,
    /// None: the splitter's own service.
    pub service: Option<ServiceName>,
    /// Which subset.
    pub subset: Option<String>,
    /// Of the request.
    pub request_headers: HeaderEdit,
    /// Of the response.
    pub response_headers: HeaderEdit,
}

/// `service-splitter`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splitter {
    /// Together 100 %.
    pub splits: Vec<Split>,
    /// Whether callers stay with theirs.
    pub sticky: Option<Sticky>,
}

/// Which instances of a service belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsetRule {
    /// What they have in common; none: all.
    pub filter: Option<Filter>,
    /// Whether warning ones are left out.
    pub only_passing: bool,
}

/// A place of a redirect or failover.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// None: the resolver's own service.
    pub service: Option<ServiceName>,
    /// Which subset.
    pub subset: Option<String>,
    /// Only instances of this datacenter.
    pub datacenter: Option<String>,
}

/// `service-resolver`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Connecting an instance.
    pub connect_timeout: Option<Duration>,
    /// Where no route says so.
    pub request_timeout: Option<Duration>,
    /// Without a byte either way, of connections of bytes and upgraded ones.
    pub idle_timeout: Option<Duration>,
    /// By name.
    pub subsets: BTreeMap<String, SubsetRule>,
    /// Where none is named.
    pub default_subset: Option<String>,
    /// All requests go there instead.
    pub redirect: Option<Place>,
    /// By subset or `*`: where to, in order, if no instance can take requests.
    pub failover: BTreeMap<String, Vec<Place>>,
}

/// `service-defaults` and `proxy-defaults`, as far as they are about requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Defaults {
    /// How its traffic is parsed, where the registration does not say.
    pub protocol: Option<Protocol>,
    /// Who before weft may say for whom it asks; of `proxy-defaults`.
    pub trusted_hops: TrustedHops,
}

/// What is broken on purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Abort {
    /// An answer with this status.
    Http(u16),
    /// An answer with this gRPC status.
    Grpc(u8),
    /// The connection (HTTP/1.1) or stream (HTTP/2) is reset.
    Reset,
}

/// A fault of a service: it meets callers before anything is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Which requests.
    pub when: Match,
    /// How many wait, in units of 0.01 %, and how long.
    pub delay: Option<(u16, Duration)>,
    /// How many fail, in units of 0.01 %, and how.
    pub abort: Option<(u16, Abort)>,
}

/// A config entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// `service-router`
    Router(Vec<Route>),
    /// `service-splitter`
    Splitter(Splitter),
    /// `service-resolver`
    Resolver(Box<Resolver>),
    /// `service-defaults`, and `proxy-defaults` for all.
    Defaults(Defaults),
    /// `service-faults`
    Faults(Vec<Fault>),
    /// `ingress-gateway`
    Gateway(Gateway),
    /// A kind that nothing acts on.
    Other,
}

//! From config entries to one chain per service.
//!
//! ```text
//!   Ready (one entry, by itself) --add--> Entries --chain--> router -> splitters, flattened -> resolvers, redirects followed
//! ```
//!
//! Consul's order: a router's destination goes on to the splitter of the service that it names, or with a subset straight to
//! its resolver; a split goes on to the splitter of another service, and to the resolver of its own; a redirect goes on to the
//! resolver of the other service; a failover target has no failover of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::chain::{
    Action, Chain, Faults, Forward, Leg, Mirror, Resolved, Route, SHARES, Split, Subset, Target, stable_hash,
};
use super::entry::{
    Defaults, Destination, Entry, HeaderEdit, Place, Resolver, Route as Rule, Splitter, SubsetRule, Then,
};
use super::fields::Problems;
use super::gateway::Gateway;
use super::hedge::{Delay, Hedge};
use super::hops::TrustedHops;
use super::matcher::{Match, Matcher, TextTest};
use super::read::read;
use super::subset::Filter;
use crate::model::{Protocol, ServiceName};

/// Longest way of splitters into splitters, and of redirects: far above what people can follow.
const DEPTH_MAX: usize = 8;
/// Most legs of one split once its splitters are flattened.
const LEGS_MAX: usize = 256;
/// Most splitters that one chain goes into on the way: those that end in a circle make no part.
const STEPS_MAX: usize = 4096;

/// A router, ready.
#[derive(Debug)]
pub struct Router {
    pub(super) matcher: Matcher,
    routes: Vec<Rule>,
    /// As they were written, for people.
    pub(super) written: Vec<Value>,
}

/// An entry that is valid by itself, its expressions compiled.
#[derive(Debug, Clone)]
pub enum Ready {
    /// `service-router`
    Router(Arc<Router>),
    /// `service-splitter`
    Splitter(Arc<Splitter>),
    /// `service-resolver`
    Resolver(Arc<Resolver>),
    /// `service-defaults` and `proxy-defaults`
    Defaults(Defaults),
    /// `service-faults`
    Faults(Arc<Faults>),
    /// `ingress-gateway`
    Gateway(Arc<Gateway>),
    /// Nothing acts on it.
    Other,
}

impl Ready {
    /// Reads an entry and compiles its expressions.
    ///
    /// # Errors
    /// Every problem at once, each with its field's path.
    pub fn new(kind: &str, value: &Value) -> Result<Self, Problems> {
        let (ready, problems) = Self::read(kind, value);
        problems.or(ready)
    }

    /// Does the same with an entry of which something is wrong as well, as far as that goes: enough to see where it leads.
    pub(super) fn read(kind: &str, value: &Value) -> (Self, Problems) {
        let (entry, mut problems) = read(kind, value);
        let is_good = problems.0.is_empty();
        let mut compiled = |path: &str, tests: &mut dyn Iterator<Item = &Match>| {
            let made = if is_good { Matcher::new(tests) } else { Matcher::new(std::iter::empty()) };
            made.unwrap_or_else(|error| {
                problems.add(path, format!("cannot be compiled: {error}"));
                Matcher::default()
            })
        };
        let ready = match entry {
            Entry::Router(routes) => {
                let matcher = compiled("Routes", &mut routes.iter().map(|route| &route.when));
                Self::Router(Arc::new(Router { matcher, routes, written: written(value, "Routes") }))
            }
            Entry::Splitter(splitter) => Self::Splitter(Arc::new(splitter)),
            Entry::Resolver(resolver) => Self::Resolver(Arc::new(*resolver)),
            Entry::Defaults(defaults) => Self::Defaults(defaults),
            Entry::Faults(faults) => {
                let matcher = compiled("Faults", &mut faults.iter().map(|fault| &fault.when));
                Self::Faults(Arc::new(Faults { matcher, list: faults, written: written(value, "Faults") }))
            }
            Entry::Gateway(gateway) => Self::Gateway(Arc::new(gateway)),
            Entry::Other => Self::Other,
        };
        (ready, problems)
    }
}

/// The elements of a list of an entry, as they stand in it.
fn written(entry: &Value, list: &str) -> Vec<Value> {
    let mut fields = entry.as_object().into_iter().flatten();
    let found = fields.find(|(key, _)| key.eq_ignore_ascii_case(list)).and_then(|(_, value)| value.as_array());
    found.cloned().unwrap_or_default()
}

/// All entries that are in force.
#[derive(Debug, Clone, Default)]
pub struct Entries {
    routers: BTreeMap<ServiceName, Arc<Router>>,
    splitters: BTreeMap<ServiceName, Arc<Splitter>>,
    resolvers: BTreeMap<ServiceName, Arc<Resolver>>,
    defaults: BTreeMap<ServiceName, Defaults>,
    faults: BTreeMap<ServiceName, Arc<Faults>>,
    gateways: BTreeMap<ServiceName, Arc<Gateway>>,
    global: Defaults,
}

impl Entries {
    /// Adds an entry, in place of the one of its kind and name.
    pub fn add(&mut self, kind: &str, name: &str, entry: Ready) {
        if kind == "proxy-defaults" {
            if let Ready::Defaults(defaults) = entry {
                self.global = defaults;
            }
            return;
        }
        let Ok(name) = name.parse() else { return };
        match entry {
            Ready::Router(router) => drop(self.routers.insert(name, router)),
            Ready::Splitter(splitter) => drop(self.splitters.insert(name, splitter)),
            Ready::Resolver(resolver) => drop(self.resolvers.insert(name, resolver)),
            Ready::Defaults(defaults) => drop(self.defaults.insert(name, defaults)),
            Ready::Faults(faults) => drop(self.faults.insert(name, faults)),
            Ready::Gateway(gateway) => drop(self.gateways.insert(name, gateway)),
            Ready::Other => {}
        }
    }

    /// Takes an entry out.
    pub fn remove(&mut self, kind: &str, name: &str) {
        match kind {
            "service-router" => drop(self.routers.remove(name)),
            "service-splitter" => drop(self.splitters.remove(name)),
            "service-resolver" => drop(self.resolvers.remove(name)),
            "service-defaults" => drop(self.defaults.remove(name)),
            "service-faults" => drop(self.faults.remove(name)),
            "ingress-gateway" => drop(self.gateways.remove(name)),
            "proxy-defaults" => self.global = Defaults::default(),
            _ => {}
        }
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        let says_defaults = !self.defaults.is_empty() || self.global != Defaults::default();
        self.services().next().is_none() && !says_defaults && self.gateways.is_empty()
    }

    /// The services that have a chain, some of them twice.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        let of_requests = self.routers.keys().chain(self.splitters.keys());
        of_requests.chain(self.resolvers.keys()).chain(self.faults.keys())
    }

    /// How long nothing may move either way on connections of bytes to a service, and on upgraded ones, if an entry says so.
    pub(super) fn idle_timeout(&self, service: &ServiceName) -> Option<Duration> {
        self.resolvers.get(service)?.idle_timeout
    }

    pub(super) fn has_protocols(&self) -> bool {
        self.global.protocol.is_some() || self.defaults.values().any(|defaults| defaults.protocol.is_some())
    }

    pub(super) fn gateways(&self) -> &BTreeMap<ServiceName, Arc<Gateway>> {
        &self.gateways
    }

    /// Listeners of gateways that take another kind of traffic than entries say that their services have.
    pub(super) fn gateway_conflicts(&self) -> Problems {
        let mut problems = Problems::default();
        for (name, gateway) in &self.gateways {
            for (at, listener) in gateway.listeners.iter().enumerate() {
                for (of, exposed) in listener.services.iter().enumerate() {
                    let Some(service) = &exposed.service else { continue };
                    let Some(said) = self.protocol(service).filter(|said| !listener.takes(*said)) else { continue };
                    let (own, said) = (listener.protocol.as_str(), said.as_str());
                    let path = format!("ingress-gateway:{name} Listeners[{at}].Services[{of}]");
                    let by = "by its service-defaults or proxy-defaults";
                    problems.add(path, format!("is {service}, whose protocol is {said} {by}; the listener's is {own}"));
                }
            }
        }
        problems
    }

    /// Who before weft may say for whom it asks.
    pub(super) fn trusted_hops(&self) -> &TrustedHops {
        &self.global.trusted_hops
    }

    /// How a service's traffic is parsed, if an entry says so.
    pub fn protocol(&self, service: &ServiceName) -> Option<Protocol> {
        self.defaults.get(service).and_then(|defaults| defaults.protocol).or(self.global.protocol)
    }

    /// Compiles the chain of a service.
    ///
    /// # Errors
    /// Every reference that leads nowhere or in a circle.
    pub fn chain(&self, service: &ServiceName) -> Result<Chain, Problems> {
        let mut problems = Problems::default();
        if let Some(protocol) = self.protocol(service).filter(|protocol| !protocol.is_http()) {
            for (kind, is_there) in [
                ("service-router", self.routers.contains_key(service)),
                ("service-splitter", self.splitters.contains_key(service)),
            ] {
                if is_there {
                    problems.add(
                        format!("{kind}:{service}"),
                        format!("needs requests, and service-defaults say that the protocol is {}", protocol.as_str()),
                    );
                }
            }
        }
        let router = self.routers.get(service).cloned();
        let mut routes = Vec::new();
        for (at, rule) in router.iter().flat_map(|router| router.routes.iter().enumerate()) {
            let path = format!("service-router:{service} Routes[{at}]");
            routes.push(self.route(service, at, rule, &path, &mut problems));
        }
        let split = self.split(service, None, &format!("service {service}"), &mut problems);
        let rest = Destination::default();
        routes.push(Route { at: None, rewrite: None, action: Action::Forward(Box::new(forward(&rest, split, None))) });
        let stream = self.resolve(service, None, &mut Way::new(format!("service {service}")), &mut problems);
        let chain =
            Chain { service: service.clone(), faults: self.faults.get(service).cloned(), router, routes, stream };
        problems.or(chain)
    }

    fn route(&self, service: &ServiceName, at: usize, rule: &Rule, path: &str, problems: &mut Problems) -> Route {
        let taken = match &rule.when.path {
            Some(TextTest::Prefix(text) | TextTest::Exact(text)) => text.len(),
            _ => 0,
        };
        match &rule.then {
            Then::Redirect(redirect) => {
                let rewrite = redirect.prefix_rewrite.clone().map(|put| (taken, put));
                Route { at: Some(at), rewrite, action: Action::Redirect(redirect.clone()) }
            }
            Then::Forward(to) => {
                let split = self.split(to.service.as_ref().unwrap_or(service), to.subset.as_deref(), path, problems);
                let mirror = to.mirror.as_ref().map(|mirror| {
                    let mut way = Way::new(format!("{path}.Destination.Mirror"));
                    let resolved = self.resolve(&mirror.service, mirror.subset.as_deref(), &mut way, problems);
                    Mirror { to: Arc::clone(&resolved.target), share: mirror.share }
                });
                fits_in_time(to, &split, path, problems);
                let rewrite = to.prefix_rewrite.clone().map(|put| (taken, put));
                Route { at: Some(at), rewrite, action: Action::Forward(Box::new(forward(to, split, mirror))) }
            }
        }
    }

    /// Where the requests to a service go: its splitter, or with a subset straight to its resolver.
    fn split(&self, service: &ServiceName, subset: Option<&str>, path: &str, problems: &mut Problems) -> Arc<Split> {
        let mut split = Split { legs: Vec::new(), sticky: None };
        if subset.is_some() {
            let to = self.resolve(service, subset, &mut Way::new(path.to_owned()), problems);
            split.legs.push(leg(SHARES, to, HeaderEdit::default(), HeaderEdit::default()));
        } else {
            let edits = (HeaderEdit::default(), HeaderEdit::default());
            self.flatten(service, SHARES, &edits, &mut Way::new(path.to_owned()), &mut split, problems);
        }
        // What rounding left over.
        if let Some(last) = split.legs.last_mut() {
            last.until = SHARES;
        }
        if split.legs.len() > LEGS_MAX {
            problems.add(path, format!("is split into {} parts; at most {LEGS_MAX} are allowed", split.legs.len()));
        }
        Arc::new(split)
    }

    /// Adds the legs of a service's splitter, those of the splitters that it leads to among them.
    fn flatten(
        &self,
        service: &ServiceName,
        share: u64,
        edits: &(HeaderEdit, HeaderEdit),
        way: &mut Way,
        into: &mut Split,
        problems: &mut Problems,
    ) {
        let begun = |into: &Split| into.legs.last().map_or(0, |leg| leg.until);
        let Some(splitter) = self.splitters.get(service) else {
            let to = self.resolve(service, None, &mut way.clone(), problems);
            into.legs.push(leg(begun(into) + share, to, edits.0.clone(), edits.1.clone()));
            return;
        };
        way.steps += 1;
        if way.steps > STEPS_MAX {
            if way.steps == STEPS_MAX + 1 {
                problems.add(&*way.path, format!("leads through more than {STEPS_MAX} splitters"));
            }
            return;
        }
        if into.legs.len() > LEGS_MAX || !way.enter("service-splitter", service, problems) {
            return;
        }
        into.sticky = into.sticky.take().or_else(|| splitter.sticky.clone());
        for (at, split) in splitter.splits.iter().enumerate() {
            let next = split.service.as_ref().unwrap_or(service);
            let share = u64::try_from(u128::from(share) * u128::from(split.weight) / 10_000).unwrap_or(0);
            // The outer splitter's edits of a request come first, and those of a response last.
            let edits = (join(&edits.0, &split.request_headers), join(&split.response_headers, &edits.1));
            if split.subset.is_some() || next == service {
                let mut own = Way::new(format!("service-splitter:{service} Splits[{at}]"));
                let to = self.resolve(next, split.subset.as_deref(), &mut own, problems);
                into.legs.push(leg(begun(into) + share, to, edits.0, edits.1));
            } else {
                self.flatten(next, share, &edits, way, into, problems);
            }
        }
        way.seen.pop();
    }

    /// Follows the resolver of a service.
    fn resolve(
        &self,
        service: &ServiceName,
        subset: Option<&str>,
        way: &mut Way,
        problems: &mut Problems,
    ) -> Arc<Resolved> {
        let Some(resolver) = self.resolvers.get(service) else {
            if let Some(subset) = subset {
                problems.add(
                    &*way.path,
                    format!("names subset {subset:?} of service {service}, which has no service-resolver"),
                );
            }
            return Arc::new(Resolved::plain(Arc::new(target(service, None, None))));
        };
        if !way.enter("service-resolver", service, problems) {
            return Arc::new(Resolved::plain(Arc::new(target(service, None, None))));
        }
        if let Some(redirect) = &resolver.redirect {
            return self.redirected(service, resolver, redirect, way, problems);
        }
        let subset = subset.or(resolver.default_subset.as_deref());
        let rule = self.subset_of(service, subset, &way.path, problems);
        if !way.fails_over {
            return Arc::new(Resolved::plain(Arc::new(target(service, subset.zip(rule), None))));
        }
        let places = subset.and_then(|subset| resolver.failover.get(subset)).or_else(|| resolver.failover.get("*"));
        let is_own = |place: &Place| place.service.as_ref().is_none_or(|name| name == service);
        // A failover to other datacenters only makes sense for what stays in this one.
        let stays = places.is_some_and(|places| places.iter().any(|place| is_own(place) && place.datacenter.is_some()));
        let failover = places.into_iter().flatten().map(|place| {
            let (name, own) = (place.service.as_ref().unwrap_or(service), place.subset.as_deref());
            if let (true, Some(datacenter)) = (is_own(place), &place.datacenter) {
                let own = own.or(subset);
                let rule = self.subset_of(service, own, &way.path, problems);
                return Arc::new(target(service, own.zip(rule), Some(datacenter.clone())));
            }
            let path = format!("service-resolver:{service} Failover");
            if is_own(place) {
                let rule = self.subset_of(service, own.or(resolver.default_subset.as_deref()), &path, problems);
                return Arc::new(target(service, own.or(resolver.default_subset.as_deref()).zip(rule), None));
            }
            // A target's own failover does not count: two services may stand in for each other.
            let mut way = Way { path, fails_over: false, ..Way::new(String::new()) };
            let found = Arc::clone(&self.resolve(name, own, &mut way, problems).target);
            match &place.datacenter {
                None => found,
                Some(_) => Arc::new(in_datacenter(&found, place.datacenter.clone())),
            }
        });
        let failover = failover.collect();
        let target = Arc::new(target(service, subset.zip(rule), stays.then(String::new)));
        Arc::new(Resolved { failover, ..Resolved::plain(target).timed(resolver) })
    }

    fn redirected(
        &self,
        service: &ServiceName,
        resolver: &Resolver,
        redirect: &Place,
        way: &mut Way,
        problems: &mut Problems,
    ) -> Arc<Resolved> {
        let next = redirect.service.as_ref().unwrap_or(service);
        let mut found = if next == service {
            let rule = self.subset_of(service, redirect.subset.as_deref(), &way.path, problems);
            let target = Arc::new(target(service, redirect.subset.as_deref().zip(rule), None));
            Resolved::plain(target).timed(resolver)
        } else {
            way.path = format!("service-resolver:{service} Redirect");
            Resolved::clone(&self.resolve(next, redirect.subset.as_deref(), way, problems))
        };
        if redirect.datacenter.is_some() {
            found.target = Arc::new(in_datacenter(&found.target, redirect.datacenter.clone()));
        }
        Arc::new(found)
    }

    fn subset_of<'e>(
        &'e self,
        service: &ServiceName,
        subset: Option<&str>,
        path: &str,
        problems: &mut Problems,
    ) -> Option<&'e SubsetRule> {
        let subset = subset?;
        let rule = self.resolvers.get(service).and_then(|resolver| resolver.subsets.get(subset));
        if rule.is_none() {
            problems
                .add(path, format!("names subset {subset:?}, which the service-resolver of {service} does not have"));
        }
        rule
    }
}

/// Where a compilation is, for problems and against circles.
#[derive(Clone)]
struct Way {
    path: String,
    seen: Vec<(&'static str, ServiceName)>,
    /// Whether failover counts.
    fails_over: bool,
    /// Splitters that were gone into, those that lead nowhere included.
    steps: usize,
}

impl Way {
    fn new(path: String) -> Self {
        Self { path, seen: Vec::new(), fails_over: true, steps: 0 }
    }

    /// Goes into an entry; false: it would go round, or too deep.
    fn enter(&mut self, kind: &'static str, service: &ServiceName, problems: &mut Problems) -> bool {
        let is_seen = self.seen.iter().any(|(known, name)| *known == kind && name == service);
        self.seen.push((kind, service.clone()));
        if !is_seen && self.seen.len() <= DEPTH_MAX {
            return true;
        }
        let names: Vec<String> = self.seen.iter().map(|(kind, name)| format!("{kind}:{name}")).collect();
        self.seen.pop();
        let what = if is_seen { "leads in a circle" } else { "leads through too many entries" };
        problems.add(&*self.path, format!("{what}: {}", names.join(" -> ")));
        false
    }
}

/// Holds the times of one attempt against those that the resolvers of a route without a timeout of its own give it whole.
fn fits_in_time(to: &Destination, split: &Split, path: &str, problems: &mut Problems) {
    let limits = split.legs.iter().filter_map(|leg| Some((leg.to.request_timeout?, &leg.to.target.service)));
    let Some((limit, service)) = limits.min().filter(|_| to.request_timeout.is_none()) else { return };
    let hedge = match to.hedge {
        Some(Hedge { delay: Delay::Fixed(delay), .. }) => Some(delay),
        _ => None,
    };
    let parts =
        [("PerTryTimeout", to.per_try_timeout, "no attempt follows"), ("Hedge.Delay", hedge, "nothing is hedged")];
    for (name, time, so) in parts {
        if let Some(time) = time.filter(|time| *time >= limit) {
            let whole = format!("RequestTimeout = {limit:?} of service-resolver {service}");
            problems.add(
                format!("{path}.Destination.{name}"),
                format!("= {time:?} must be shorter than {whole}, for the route has none: else {so}"),
            );
        }
    }
}

fn leg(until: u64, to: Arc<Resolved>, request_headers: HeaderEdit, response_headers: HeaderEdit) -> Leg {
    Leg { until, to, request_headers, response_headers }
}

fn join(first: &HeaderEdit, then: &HeaderEdit) -> HeaderEdit {
    let mut joined = first.clone();
    joined.add.extend(then.add.iter().cloned());
    joined.set.extend(then.set.iter().cloned());
    joined.remove.extend(then.remove.iter().cloned());
    joined
}

fn forward(to: &Destination, split: Arc<Split>, mirror: Option<Mirror>) -> Forward {
    Forward {
        split,
        host: to.host_rewrite.clone(),
        request_timeout: to.request_timeout,
        per_try_timeout: to.per_try_timeout,
        idle_timeout: to.idle_timeout,
        retry: to.retry.clone(),
        hedge: to.hedge.clone(),
        mirror,
        request_headers: to.request_headers.clone(),
        response_headers: to.response_headers.clone(),
    }
}

fn target(service: &ServiceName, subset: Option<(&str, &SubsetRule)>, datacenter: Option<String>) -> Target {
    let subset = subset.map(|(name, rule)| Subset {
        name: name.to_owned(),
        filter: rule.filter.clone(),
        only_passing: rule.only_passing,
    });
    named(Target { service: service.clone(), subset, datacenter, view: None, id: String::new() })
}

fn in_datacenter(found: &Target, datacenter: Option<String>) -> Target {
    named(Target { datacenter, ..found.clone() })
}

/// Gives a target its id, and a view where it takes some of its service's instances only.
fn named(mut target: Target) -> Target {
    let subset = target.subset.as_ref().map(|subset| format!("{}.", subset.name)).unwrap_or_default();
    let datacenter = match target.datacenter.as_deref() {
        None => String::new(),
        Some("") => ".local".to_owned(),
        Some(name) => format!(".{name}"),
    };
    target.id = format!("{subset}{}{datacenter}", target.service);
    if target.subset.is_some() || target.datacenter.is_some() {
        // No id of a target is longer than a name may be; `..` is in no name that people give. What a subset takes is part
        // of it: while an older chain stays in force beside a newer one, both may name one subset.
        let start: String = target.service.as_str().chars().take(40).collect();
        let takes = target.subset.as_ref().map(|subset| {
            let filter = subset.filter.as_ref().map_or("", Filter::as_str);
            format!("{}\0{filter}", u8::from(subset.only_passing))
        });
        let named = format!("{}\0{}", target.id, takes.unwrap_or_default());
        target.view = format!("{start}..{:016x}", stable_hash(named.as_bytes())).parse().ok();
    }
    target
}

//! Where a call goes in the end, as config entries lead it: what `/v1/mesh/why` decides and asks about.
//!
//! ```text
//!   chain of the named service -> fault -> route -> redirect
//!                                             \--> legs: target and what stands in for it, who decides, limits
//! ```
//!
//! A question with a request takes its route; one without, of a service of requests, the way of what no route matches; of any
//! other service the way of a stream. As the data plane does (`proxy::http::routed`), intentions are asked about the service
//! that is called in the end, with the path and headers that it gets.

use std::sync::Arc;

use http::Method;
use serde_json::{Value, json};

use super::intention::Asked;
use crate::authz::Decision;
use crate::catalogue::Snapshot;
use crate::model::{Instance, Protocol, ServiceName};
use crate::traffic::{self, Action, Chain, HeaderEdit, Redirect, Resolved, Route, SHARES, Split, Target};
use crate::upstream::{show_balance, show_rate};

/// A share of the calls.
pub(super) struct Leg<'t> {
    /// Of [`SHARES`].
    share: u64,
    /// Whom it calls.
    pub(super) to: Arc<Resolved>,
    /// What intentions say.
    pub(super) decision: Decision<'t>,
    /// What the called service limits.
    rates: Vec<Value>,
}

/// The way of a call.
pub(super) struct Way<'t> {
    snapshot: &'t Snapshot,
    chain: &'t Chain,
    /// How calls to the named service are carried.
    protocol: Protocol,
    /// None: the question is about a stream of bytes.
    route: Option<&'t Route>,
    /// A request is known.
    is_known: bool,
    method: Method,
    /// What the app gets in place of the request's path, if another one.
    sent: Option<String>,
    faults: Vec<Value>,
    sticky: bool,
    /// Those with a share, in order; none: a redirect answers.
    pub(super) legs: Vec<Leg<'t>>,
}

/// What is to be known of a request for a leg: the question, and what the app gets in place of its path.
#[derive(Clone, Copy)]
struct Sent<'a> {
    asked: &'a Asked,
    path: Option<&'a str>,
    edits: [&'a HeaderEdit; 2],
}

impl<'t> Way<'t> {
    /// Follows a call from `source` by `chain`, that of the service which it names.
    pub(super) fn of(snapshot: &'t Snapshot, chain: &'t Chain, source: Option<&ServiceName>, asked: &Asked) -> Self {
        let protocol = snapshot.protocol(&chain.service).unwrap_or_default();
        let whole = asked.path.as_deref().unwrap_or("/");
        let (path, query) = whole.split_once('?').map_or((whole, None), |(path, query)| (path, Some(query)));
        // gRPC says POST of every call.
        let usual = if protocol == Protocol::Grpc { "POST" } else { "GET" };
        let method = asked.method.as_deref().unwrap_or(usual);
        let request = traffic::Asked { method, path, query, headers: &asked.headers };
        let is_known = asked.is_request();
        let route = match (is_known, protocol.is_http()) {
            (true, _) => chain.route(&request),
            (false, true) => chain.routes.last(),
            (false, false) => None,
        };
        let faults = chain.faults.as_ref().map(|faults| match (is_known, protocol.is_http()) {
            (true, _) => faults.met(Some(&request)).into_iter().cloned().collect(),
            (false, true) => faults.all().to_vec(),
            (false, false) => faults.met(None).into_iter().cloned().collect(),
        });
        let mut way = Self {
            snapshot,
            chain,
            protocol,
            route,
            is_known,
            method: method.parse().unwrap_or_default(),
            sent: route.filter(|_| is_known).and_then(|route| route.path(whole)),
            faults: faults.unwrap_or_default(),
            sticky: false,
            legs: Vec::new(),
        };
        let none = HeaderEdit::default();
        match route.map(|route| &route.action) {
            None => {
                let sent = Sent { asked, path: None, edits: [&none, &none] };
                way.legs.push(way.leg(source, SHARES, &chain.stream, sent));
            }
            Some(Action::Redirect(_)) => {}
            Some(Action::Forward(forward)) => {
                let path = way.sent.clone();
                for (share, leg) in shares(&forward.split, asked) {
                    let edits = [&forward.request_headers, &leg.request_headers];
                    let sent = Sent { asked, path: path.as_deref(), edits };
                    way.legs.push(way.leg(source, share, &leg.to, sent));
                }
                way.sticky = forward.split.sticky.is_some();
            }
        }
        way
    }

    fn leg(&self, source: Option<&ServiceName>, share: u64, to: &Arc<Resolved>, sent: Sent<'_>) -> Leg<'t> {
        let Sent { asked, path, edits } = sent;
        let service = &to.target.service;
        let mut got = Asked {
            method: asked.method.clone(),
            path: path.map(str::to_owned).or_else(|| asked.path.clone()),
            headers: asked.headers.clone(),
        };
        if self.is_known {
            for edit in edits {
                edit.apply(&mut got.headers);
            }
            // Headers alone make a request too, and the edits may have taken them out.
            got.path.get_or_insert_with(|| "/".to_owned());
        }
        let path = got.path.as_deref().unwrap_or("/");
        let rates = self.snapshot.upstreams.rates(service).map(|rules| {
            let of_request = self.is_known.then(|| rules.of_path(path)).into_iter().flatten();
            let of_stream = if self.is_known { None } else { rules.of_stream() };
            let rule = |at: usize| rules.rules.get(at).map(show_rate);
            of_request.chain(of_stream).filter_map(rule).collect()
        });
        let decision = got.decide(&self.snapshot.policy, source, service);
        Leg { share, to: Arc::clone(to), decision, rates: rates.unwrap_or_default() }
    }

    /// Where callers are sent in place of being answered.
    pub(super) fn redirect(&self) -> Option<&'t Redirect> {
        match &self.route?.action {
            Action::Redirect(redirect) => Some(redirect),
            Action::Forward(_) => None,
        }
    }

    /// The leg that decides over the call: the first that is denied, or the first.
    pub(super) fn deciding(&self) -> Option<&Leg<'t>> {
        self.legs.iter().find(|leg| !leg.decision.is_allowed()).or_else(|| self.legs.first())
    }

    /// The service that is named.
    pub(super) fn named(&self) -> &'t ServiceName {
        &self.chain.service
    }

    /// Where the legs lead, each place once, with the number of its first leg.
    pub(super) fn places(&self) -> Vec<(usize, &Arc<Resolved>)> {
        let mut found: Vec<(usize, &Arc<Resolved>)> = Vec::new();
        for (at, leg) in self.legs.iter().enumerate() {
            if !found.iter().any(|(_, to)| **to == leg.to) {
                found.push((at, &leg.to));
            }
        }
        found
    }

    /// The targets that calls may go to, each once: those of the legs first, then what stands in for them.
    pub(super) fn targets(&self) -> Vec<&Arc<Target>> {
        let mut found: Vec<&Arc<Target>> = Vec::new();
        let first = self.legs.iter().map(|leg| &leg.to.target);
        for target in first.chain(self.legs.iter().flat_map(|leg| &leg.to.failover)) {
            if !found.contains(&target) {
                found.push(target);
            }
        }
        found
    }

    /// Tells whether `instance` belongs to a target, seen from this node.
    pub(super) fn takes(&self, target: &Target, instance: &Instance) -> bool {
        let here = self.snapshot.nodes.get(&self.snapshot.local_node).map_or("", |node| &node.info.datacenter);
        target.takes(instance, here)
    }

    /// Tells whether any node has a service of this name, an agent on it or not.
    fn is_registered(&self, service: &ServiceName) -> bool {
        self.snapshot.services.contains_key(service) || self.snapshot.externals.services().contains_key(service)
    }

    /// Shows the way.
    pub(super) fn shown(&self) -> Value {
        json!({
            "Protocol": self.protocol.as_str(),
            "Faults": self.faults,
            "Route": self.route.map(|route| self.route(route)),
            "Sticky": self.sticky,
            "Legs": self.legs.iter().map(|leg| self.shown_leg(leg)).collect::<Vec<Value>>(),
        })
    }

    fn route(&self, route: &Route) -> Value {
        let (mut mirror, mut hedged, mut host) = (None, false, None);
        if let Action::Forward(forward) = &route.action {
            mirror = forward
                .mirror
                .as_ref()
                .map(|mirror| json!({"Target": mirror.to.id, "Percent": f64::from(mirror.share) / 100.0}));
            let is_grpc = self.protocol == Protocol::Grpc;
            hedged = self.is_known && forward.hedge.as_ref().is_some_and(|hedge| hedge.covers(&self.method, is_grpc));
            host.clone_from(&forward.host);
        }
        json!({
            "At": route.at,
            "Of": self.chain.routes.iter().filter(|route| route.at.is_some()).count(),
            "Definition": self.chain.written(route),
            "SentPath": self.sent,
            "SentHost": host,
            "Hedged": hedged,
            "Mirror": mirror,
        })
    }

    fn shown_leg(&self, leg: &Leg<'_>) -> Value {
        #[expect(clippy::cast_precision_loss, reason = "shares are below 2^53")]
        let weight = leg.share as f64 * 100.0 / SHARES as f64;
        let (target, subset) = (&leg.to.target, leg.to.target.subset.as_ref());
        let failover: Vec<&str> = leg.to.failover.iter().map(|target| &*target.id).collect();
        let route_timeout = match self.route.map(|route| &route.action) {
            Some(Action::Forward(forward)) => forward.request_timeout,
            _ => None,
        };
        let timeout = route_timeout.or(leg.to.request_timeout).filter(|_| self.route.is_some());
        json!({
            "Weight": weight,
            "Target": target.id,
            "Service": target.service,
            "Registered": self.is_registered(&target.service),
            "Filter": subset.and_then(|subset| subset.filter.as_ref()).map(traffic::Filter::as_str),
            "OnlyPassing": subset.is_some_and(|subset| subset.only_passing),
            "Failover": failover,
            "ConnectTimeout": leg.to.connect_timeout.map(|time| format!("{time:?}")),
            "RequestTimeout": timeout.map(|time| format!("{time:?}")),
            "IdleTimeout": leg.to.idle_timeout.map(|time| format!("{time:?}")),
            "LoadBalancer": show_balance(self.snapshot.upstreams.balance(&target.service)),
            "RateLimits": leg.rates,
            "Allowed": leg.decision.is_allowed(),
            "Rule": leg.decision.rule(),
        })
    }
}

/// The legs that calls may take, each with its share: where a caller stays with one, that alone.
fn shares<'s>(split: &'s Split, asked: &Asked) -> Vec<(u64, &'s traffic::Leg)> {
    if let Some(leg) = split.kept(&asked.headers) {
        return vec![(SHARES, leg)];
    }
    let mut begun = 0;
    let share = |leg: &'s traffic::Leg| {
        let share = leg.until.saturating_sub(begun);
        begun = leg.until;
        (share, leg)
    };
    split.legs.iter().map(share).filter(|(share, _)| *share > 0).collect()
}

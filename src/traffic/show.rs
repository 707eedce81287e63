//! A chain for people, in the shape of Consul's `/v1/discovery-chain`.

use std::collections::BTreeMap;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use serde_json::{Map, Value, json};

use super::chain::{Action, Chain, Resolved, SHARES, Split, Target};
use super::entry::{HeaderEdit, Sticky};

/// How long connecting an instance may take where no resolver says so: shown, and in force in `proxy`.
const CONNECT_TIMEOUT_SHOWN: Duration = Duration::from_secs(5);

/// Shows a chain; `protocol` is the service's.
pub fn show(chain: &Chain, protocol: &str, datacenter: &str) -> Value {
    let mut seen = Seen { nodes: Map::new(), targets: BTreeMap::new() };
    let name = chain.service.as_str();
    let has_router = chain.router.is_some();
    let mut routes = Vec::new();
    let mut start = String::new();
    for (at, route) in chain.routes.iter().enumerate() {
        let definition = match (route.at, chain.router.as_ref()) {
            (Some(at), Some(router)) => router.written.get(at).cloned().unwrap_or_default(),
            _ => json!({"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"Service": name}}),
        };
        let next = match &route.action {
            Action::Redirect(_) => String::new(),
            Action::Forward(forward) => {
                if let Some(mirror) = &forward.mirror {
                    seen.target(&mirror.to);
                }
                let split = match route.at {
                    None => name.to_owned(),
                    Some(_) => format!("{name}/{at}"),
                };
                seen.split(&split, &forward.split)
            }
        };
        start.clone_from(&next);
        routes.push(json!({"Definition": definition, "NextNode": next}));
    }
    if has_router {
        start = format!("router:{name}");
        seen.nodes.insert(start.clone(), json!({"Type": "router", "Name": name, "Routes": routes}));
    }
    let faults = chain.faults.as_ref().map(|faults| &*faults.written).unwrap_or_default();
    json!({"Chain": {
        "ServiceName": name,
        "Namespace": "default",
        "Partition": "default",
        "Datacenter": datacenter,
        "Protocol": protocol,
        "StartNode": start,
        "Nodes": seen.nodes,
        "Targets": seen.targets,
        "Faults": faults,
    }})
}

fn add(shape: &mut Value, name: &str, value: Value) {
    if let Value::Object(fields) = shape {
        fields.insert(name.to_owned(), value);
    }
}

/// What a caller stays by, as its entry says it.
fn sticky_of(sticky: &Sticky) -> Value {
    match sticky {
        Sticky::Header(name) => json!({"Header": name.as_str()}),
        Sticky::Cookie(name) => json!({"Cookie": name}),
    }
}

/// Changes of headers, as entries say them.
fn edits_of(edit: &HeaderEdit) -> Value {
    let pairs = |list: &[(HeaderName, HeaderValue)]| {
        let pair = |(name, value): &(HeaderName, HeaderValue)| {
            (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned().into())
        };
        list.iter().map(pair).collect::<Map<String, Value>>()
    };
    let removed: Vec<&str> = edit.remove.iter().map(HeaderName::as_str).collect();
    json!({"Add": pairs(&edit.add), "Set": pairs(&edit.set), "Remove": removed})
}

struct Seen {
    nodes: Map<String, Value>,
    targets: BTreeMap<String, Value>,
}

impl Seen {
    fn split(&mut self, name: &str, split: &Split) -> String {
        if let ([leg], None) = (&*split.legs, &split.sticky) {
            return self.resolver(&leg.to);
        }
        let mut begun = 0;
        let mut splits = Vec::new();
        for leg in &split.legs {
            let node = self.resolver(&leg.to);
            #[expect(clippy::cast_precision_loss, reason = "shares are below 2^53")]
            let weight = (leg.until - begun) as f64 * 100.0 / SHARES as f64;
            begun = leg.until;
            let mut shown = json!({"Weight": weight, "NextNode": node});
            let edits = [("RequestHeaders", &leg.request_headers), ("ResponseHeaders", &leg.response_headers)];
            for (name, edit) in edits.into_iter().filter(|(_, edit)| !edit.is_empty()) {
                add(&mut shown, name, edits_of(edit));
            }
            splits.push(shown);
        }
        let node = format!("splitter:{name}");
        let mut shown = json!({"Type": "splitter", "Name": name, "Splits": splits});
        if let Some(sticky) = &split.sticky {
            add(&mut shown, "Sticky", sticky_of(sticky));
        }
        self.nodes.insert(node.clone(), shown);
        node
    }

    fn resolver(&mut self, resolved: &Resolved) -> String {
        self.target(&resolved.target);
        let failover: Vec<&str> = resolved.failover.iter().map(|target| &*target.id).collect();
        for target in &resolved.failover {
            self.target(target);
        }
        let shown = |time: Option<Duration>| time.map_or_else(|| "0s".to_owned(), |time| format!("{time:?}"));
        let connect = resolved.connect_timeout.unwrap_or(CONNECT_TIMEOUT_SHOWN);
        let node = format!("resolver:{}", resolved.target.id);
        let mut says = json!({
            "Default": resolved.target.view.is_none() && failover.is_empty() && resolved.connect_timeout.is_none(),
            "ConnectTimeout": shown(Some(connect)),
            "RequestTimeout": shown(resolved.request_timeout),
            "Target": resolved.target.id,
        });
        if resolved.idle_timeout.is_some() {
            add(&mut says, "IdleTimeout", shown(resolved.idle_timeout).into());
        }
        if !failover.is_empty() {
            add(&mut says, "Failover", json!({"Targets": failover}));
        }
        self.nodes.insert(node.clone(), json!({"Type": "resolver", "Name": resolved.target.id, "Resolver": says}));
        node
    }

    fn target(&mut self, target: &Target) {
        let subset = target.subset.as_ref();
        let shape = json!({
            "ID": target.id,
            "Service": target.service,
            "ServiceSubset": subset.map(|subset| &*subset.name).unwrap_or_default(),
            "Namespace": "default",
            "Partition": "default",
            "Datacenter": target.datacenter.as_deref().unwrap_or_default(),
            "Subset": {
                "Filter": subset.and_then(|subset| subset.filter.as_ref()).map(super::Filter::as_str).unwrap_or_default(),
                "OnlyPassing": subset.is_some_and(|subset| subset.only_passing),
            },
        });
        self.targets.insert(target.id.clone(), shape);
    }
}

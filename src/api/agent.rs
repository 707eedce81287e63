//! `/v1/agent/…`: this agent, its services, its view of the members.

use std::collections::BTreeMap;

use http::StatusCode;
use prometheus::proto::MetricType;
use serde_json::{Value, json};

use super::call::{Call, Meta, Refusal, Reply, TEXT, cut};
use super::query::Blocking;
use super::seam::{GossipOrder, RegistryOrder};
use super::sift::{Member, Own};
use super::{Shared, block, shape, sift, status};
use crate::clock;
use crate::filter::Filter;
use crate::gossip::MemberView;
use crate::metrics::Metrics;
use crate::model::{InstanceId, MemberStatus};
use crate::registry::definition::{DefinitionDefaults, service_from_json, without_effect};
use crate::registry::{LocalState, RegistryError};

/// `GET /v1/agent/services`: by id, synthetic proxies among them.
pub(super) async fn services(call: Call) -> Result<Reply, Refusal> {
    let filter = sift::filter::<Own<'_>>(&call)?;
    let state = call.shared.registry.state();
    Reply::json(&call, &local_services(&call.shared, &state, &filter))
}

/// `GET /v1/agent/service/:id`; with `hash` it waits until the service's content hash is another.
pub(super) async fn service(call: Call) -> Result<Reply, Refusal> {
    let blocking = Blocking::parse(&call.query)?;
    let known = call.query.given("hash").unwrap_or_default();
    let mut updates = call.shared.registry.subscribe();
    let (mut found, mut hash) = one_service(&call)?;
    if hash == known {
        let _place = block::take_place(&call)?;
        let deadline = clock::now() + block::with_jitter(blocking.wait);
        while hash == known {
            let woken = tokio::select! {
                () = call.shared.stop.cancelled() => break,
                woken = tokio::time::timeout_at(deadline, updates.changed()) => woken,
            };
            if !matches!(woken, Ok(Ok(()))) {
                break;
            }
            (found, hash) = one_service(&call)?;
        }
    }
    if let Some(object) = found.as_object_mut() {
        object.insert("ContentHash".to_owned(), json!(hash));
    }
    Reply::json_with(&call, &found, Meta { index: None, content_hash: Some(hash) })
}

/// Returns the service that the path names, with its content hash.
fn one_service(call: &Call) -> Result<(Value, String), Refusal> {
    let state = call.shared.registry.state();
    let id = &call.argument;
    let everything = Filter::parse::<Own<'_>>("").expect("nothing is a filter that passes everything");
    let found = local_services(&call.shared, &state, &everything).remove(id);
    let found = found.ok_or_else(|| RegistryError::UnknownService { id: id.clone() })?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, found.to_string().as_bytes());
    // 64 bits tell a change apart; Consul's hashes are as long.
    let hash = digest.as_ref().iter().take(8).fold(0u64, |hash, byte| hash << 8 | u64::from(*byte));
    Ok((found, format!("{hash:016x}")))
}

fn local_services(shared: &Shared, state: &LocalState, filter: &Filter) -> BTreeMap<String, Value> {
    let datacenter = &shared.node.datacenter;
    let mut shapes = BTreeMap::new();
    for service in state.services.values() {
        let definition = &service.definition;
        let id = definition.record.id.as_str();
        if filter.is_match(&Own { definition, mesh_port: None }) {
            shapes.insert(id.to_owned(), shape::agent_service(definition, datacenter));
        }
        let sidecar = shape::sidecar_id(id);
        let port = shared.node.mesh_addr.port();
        let is_there = definition.sidecar && !state.services.contains_key(sidecar.as_str());
        if is_there && filter.is_match(&Own { definition, mesh_port: Some(port) }) {
            shapes.insert(sidecar, shape::agent_sidecar(definition, datacenter, port));
        }
    }
    shapes
}

/// `PUT /v1/agent/service/register`: the body says which settings are taken without effect; it is empty where there are none.
pub(super) async fn register(call: Call) -> Result<Reply, Refusal> {
    let replace_existing_checks = call.query.switch("replace-existing-checks")?;
    let body = json_body(&call)?;
    let definition = Box::new(service_from_json(&body, &defaults(&call))?);
    let order = RegistryOrder::RegisterService { definition, replace_existing_checks };
    call.shared.registry.carry_out(order).await?;
    let notes: Vec<String> = without_effect(&body).into_iter().map(|(path, why)| format!("{path} {why}")).collect();
    Ok(noted(&notes))
}

/// `PUT /v1/agent/service/deregister/:id`
pub(super) async fn deregister(call: Call) -> Result<Reply, Refusal> {
    let id = &call.argument;
    let id: InstanceId = id.parse().map_err(|_| RegistryError::UnknownService { id: id.clone() })?;
    call.shared.registry.carry_out(RegistryOrder::DeregisterService(id)).await?;
    Ok(Reply::Empty)
}

/// `GET /v1/agent/members`; `wan` names a pool that weft does not have.
pub(super) async fn members(call: Call) -> Result<Reply, Refusal> {
    if call.query.switch("wan")? {
        return Reply::json(&call, &json!([]));
    }
    let filter = sift::filter::<Member>(&call)?;
    let members = call.shared.membership.members();
    let shown = members.members.iter().filter(|member| filter.is_match(&sifted(member)));
    let shapes: Vec<Value> = shown.map(member).collect();
    Reply::json(&call, &shapes)
}

/// A member as filters see it.
fn sifted(member: &MemberView) -> Member {
    Member {
        name: member.name.to_string(),
        addr: member.addr.ip().to_string(),
        port: member.addr.port(),
        status: member.status.code(),
        tags: tags(member).into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
    }
}

/// What its node has not published yet is left out.
fn tags(member: &MemberView) -> BTreeMap<&'static str, &str> {
    let mut tags = BTreeMap::from([("role", "node")]);
    if let Some(info) = &member.info {
        tags.extend([("dc", info.datacenter.as_str()), ("id", info.id.as_str()), ("build", info.build.as_str())]);
    }
    tags
}

/// A member, in serf's shape.
fn member(member: &MemberView) -> Value {
    let tags = tags(member);
    json!({
        "Name": member.name,
        "Addr": member.addr.ip().to_string(),
        "Port": member.addr.port(),
        "Tags": tags,
        "Status": member.status.code(),
        "ProtocolMin": 1,
        "ProtocolMax": 5,
        "ProtocolCur": 2,
        "DelegateMin": 2,
        "DelegateMax": 5,
        "DelegateCur": 4,
    })
}

/// `GET /v1/agent/self`
pub(super) async fn this(call: Call) -> Result<Reply, Refusal> {
    let shared = &call.shared;
    let node = &shared.node;
    let state = shared.registry.state();
    let members = shared.membership.members();
    let own = members.members.iter().find(|member| member.name == node.name).map(member);
    let count = |status| members.members.iter().filter(|member| member.status == status).count().to_string();
    let about = json!({
        "Config": {
            "Datacenter": node.datacenter,
            "PrimaryDatacenter": node.datacenter,
            "NodeName": node.name,
            "NodeID": node.id,
            "Revision": node.revision,
            "Server": false,
            "Version": node.version,
            "BuildDate": "",
        },
        "DebugConfig": {},
        // A coordinate that was never measured (Vivaldi's start): the origin, with the largest error.
        "Coord": {"Vec": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "Error": 1.5, "Adjustment": 0.0, "Height": 1e-5},
        "Member": own,
        "Stats": {
            "agent": {"checks": state.checks.len().to_string(), "services": state.services.len().to_string()},
            "consul": {"leader_addr": status::representative(shared), "server": "false"},
            "serf_lan": {
                "members": members.members.len().to_string(),
                "failed": count(MemberStatus::Failed),
                "left": count(MemberStatus::Left),
            },
            "weft": {"isolated": members.isolated.to_string()},
        },
        "Meta": node.meta,
        "xDS": {"SupportedProxies": {}, "Ports": {"Plaintext": -1, "TLS": -1}},
    });
    Reply::json(&call, &about)
}

/// `GET /v1/agent/version`
pub(super) async fn version(call: Call) -> Result<Reply, Refusal> {
    let node = &call.shared.node;
    let version = json!({"SHA": node.revision, "BuildDate": "", "HumanVersion": node.version, "FIPS": ""});
    Reply::json(&call, &version)
}

/// `GET /v1/agent/metrics`: Consul's JSON, or Prometheus' text with `format=prometheus`.
pub(super) async fn metrics(call: Call) -> Result<Reply, Refusal> {
    match call.query.given("format") {
        Some("prometheus") => {}
        None => return Reply::json(&call, &metrics_shape(&call.shared.metrics)),
        Some(other) => {
            return Err(Refusal::bad(format!("Invalid format: {other:?}: it is `prometheus`, or left out for JSON")));
        }
    }
    let rendered = call.shared.metrics.render();
    let body = rendered.map_err(|error| Refusal::internal(format!("metrics cannot be rendered: {error}")))?;
    Ok(Reply::Text { body, content_type: "text/plain; version=0.0.4; charset=utf-8" })
}

/// The metrics in the shape of Consul's JSON; counts since the start, where Consul's are of ten seconds.
fn metrics_shape(metrics: &Metrics) -> Value {
    let (mut gauges, mut counters, mut samples) = (Vec::new(), Vec::new(), Vec::new());
    for family in metrics.registry().gather() {
        for metric in family.get_metric() {
            let labels: BTreeMap<&str, &str> =
                metric.get_label().iter().map(|label| (label.name(), label.value())).collect();
            let name = family.name();
            match family.get_field_type() {
                MetricType::GAUGE => {
                    gauges.push(json!({"Name": name, "Value": metric.get_gauge().get_value(), "Labels": labels}));
                }
                MetricType::COUNTER => {
                    let sum = metric.get_counter().get_value();
                    // A counter is a whole number, exact in a float up to 2^53.
                    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "see above")]
                    let count = sum as u64;
                    counters.push(json!({"Name": name, "Count": count, "Sum": sum, "Labels": labels}));
                }
                MetricType::HISTOGRAM => {
                    let histogram = metric.get_histogram();
                    let (count, sum) = (histogram.get_sample_count(), histogram.get_sample_sum());
                    #[allow(clippy::cast_precision_loss, reason = "a mean is no exact number")]
                    let mean = if count == 0 { 0.0 } else { sum / count as f64 };
                    samples.push(json!({"Name": name, "Count": count, "Sum": sum, "Mean": mean, "Labels": labels}));
                }
                _ => {}
            }
        }
    }
    let now = i64::try_from(clock::wall().0).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
    let timestamp = now.map_or_else(String::new, |now| {
        format!("{} {:02}:{:02}:{:02} +0000 UTC", now.date(), now.hour(), now.minute(), now.second())
    });
    json!({"Timestamp": timestamp, "Gauges": gauges, "Points": [], "Counters": counters, "Samples": samples})
}

/// `PUT /v1/agent/join/:addr`
pub(super) async fn join(call: Call) -> Result<Reply, Refusal> {
    if call.query.switch("wan")? {
        return Err(Refusal::bad("weft has one pool of members, no WAN pool: join without ?wan"));
    }
    call.shared.membership.carry_out(GossipOrder::Join(call.argument.clone())).await?;
    Ok(Reply::Empty)
}

/// `PUT /v1/agent/leave`: answers first; the node then leaves and stops.
pub(super) async fn leave(call: Call) -> Result<Reply, Refusal> {
    call.shared.leave.cancel();
    Ok(Reply::Empty)
}

/// `PUT /v1/agent/reload`: the body says what takes a restart; it is empty where all was taken.
pub(super) async fn reload(call: Call) -> Result<Reply, Refusal> {
    let notes = (call.shared.reload)().await.map_err(Refusal::bad)?;
    Ok(noted(&notes))
}

/// Answers that it is done, with a line for each of `notes`.
fn noted(notes: &[String]) -> Reply {
    if notes.is_empty() {
        return Reply::Empty;
    }
    Reply::Text { body: cut(notes.join("\n") + "\n"), content_type: TEXT }
}

/// `PUT /v1/agent/force-leave/:node`
pub(super) async fn force_leave(call: Call) -> Result<Reply, Refusal> {
    let prune = call.query.switch("prune")?;
    let unknown = || Refusal::new(StatusCode::NOT_FOUND, format!("no member is named {:?}", call.argument));
    let name = call.argument.parse().map_err(|_| unknown())?;
    call.shared.membership.carry_out(GossipOrder::ForceLeave { name, prune }).await?;
    Ok(Reply::Empty)
}

/// Parses the body; serde_json bounds the depth at 128.
pub(super) fn json_body(call: &Call) -> Result<Value, Refusal> {
    serde_json::from_slice(&call.body).map_err(|error| Refusal::bad(format!("Request decode failed: {error}")))
}

/// What a definition falls back to on this agent.
pub(super) fn defaults(call: &Call) -> DefinitionDefaults<'_> {
    DefinitionDefaults { bind_ip: call.shared.defaults_ip, datacenter: &call.shared.node.datacenter }
}

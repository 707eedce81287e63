//! `/v1/mesh/…`: weft's own endpoints.

use std::sync::Arc;

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::call::{Call, Refusal, Reply};
use crate::clock::{self, UnixSeconds};
use crate::gossip::MemberView;
use crate::model::MemberStatus;

/// `GET /v1/mesh/info`: what `weft info` prints.
pub(super) async fn info(call: Call) -> Result<Reply, Refusal> {
    let shared = &call.shared;
    let certificates = (shared.certificates)();
    let members = shared.membership.members();
    let alive = members.members.iter().filter(|member| member.status == MemberStatus::Alive).count();
    let listeners = (shared.listeners)();
    let listeners = listeners
        .iter()
        .map(|listener| json!({"Bind": listener.bind, "Destination": listener.destination, "State": listener.state}));
    let skew = shared.membership.documents().skew;
    let clock = skew.map_or(
        Value::Null,
        |skew| json!({"SkewSeconds": skew.median_seconds, "LargestSeconds": skew.max_seconds, "Peers": skew.peers}),
    );
    let policy = Arc::clone(&shared.snapshot.load().policy);
    // None while the agent stops.
    let records = shared.membership.records_hash().await.ok().map(|hash| format!("{hash:016x}"));
    let forks = shared.membership.documents().documents.iter().filter(|view| view.is_forked).count();
    let info = json!({
        "Node": shared.node.name,
        "NodeID": shared.node.id,
        "Datacenter": shared.node.datacenter,
        "Version": shared.node.version,
        "TrustDomain": certificates.trust_domain,
        "SpiffeID": certificates.spiffe_id,
        "ServeScope": certificates.serve_scope,
        "Certificates": {
            "NodeEnds": rfc3339(certificates.node_ends),
            "IntermediateEnds": rfc3339(certificates.intermediate_ends),
        },
        "MeshAddress": shared.node.mesh_addr.to_string(),
        "Workers": shared.node.workers,
        "UpstreamListeners": listeners.collect::<Vec<Value>>(),
        "Members": {"Alive": alive, "Known": members.members.len()},
        "Isolated": members.isolated,
        "RecordsHash": records,
        "Clock": clock,
        "Policy": {
            "Intentions": policy.guards().len(),
            "Default": policy.default_action().as_str(),
            "Quarantined": policy.quarantined().iter().map(|one| format!("{} version {}: {}", one.name, one.version, one.reason)).collect::<Vec<_>>(),
            "Forks": forks,
            "SignsForClients": shared.policy_key.is_some(),
        },
    });
    Reply::json(&call, &info)
}

/// `GET /v1/mesh/members`: what `weft members` prints; the times that Consul's shape has no place for.
pub(super) async fn members(call: Call) -> Result<Reply, Refusal> {
    let (members, now) = (call.shared.membership.members(), clock::now());
    let shape = |member: &MemberView| {
        let forgotten = member.forgotten_at.map(|at| at.saturating_duration_since(now).as_secs());
        json!({
            "Name": member.name,
            "Address": member.addr.to_string(),
            "Status": member.status.as_str(),
            "Seconds": now.saturating_duration_since(member.since).as_secs(),
            "ForgottenInSeconds": forgotten,
            "Generation": member.generation.number,
            "Build": member.info.as_ref().map(|info| &info.build),
            "Datacenter": member.info.as_ref().map(|info| &info.datacenter),
        })
    };
    let shapes: Vec<Value> = members.members.iter().map(shape).collect();
    Reply::json(&call, &json!({"Isolated": members.isolated, "Members": shapes}))
}

/// Writes `at` as RFC 3339 in UTC.
pub(super) fn rfc3339(at: UnixSeconds) -> String {
    let seconds = i64::try_from(at.0).unwrap_or(i64::MAX);
    // Beyond the year 9999 the calendar ends.
    let Ok(t) = OffsetDateTime::from_unix_timestamp(seconds) else { return format!("{} s after 1970", at.0) };
    let (month, day) = (u8::from(t.month()), t.day());
    format!("{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", t.year(), t.hour(), t.minute(), t.second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(UnixSeconds(1_700_000_000)), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(UnixSeconds(u64::MAX)), "18446744073709551615 s after 1970");
    }
}

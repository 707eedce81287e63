//! `/v1/status/…`: weft has no leader; clients that ask for one get the same member from every agent that sees the same members.

use super::Shared;
use super::call::{Call, Refusal, Reply};
use crate::model::MemberStatus;

/// `GET /v1/status/leader`: the mesh address of the alive member whose name comes first.
pub(super) async fn leader(call: Call) -> Result<Reply, Refusal> {
    Reply::json(&call, &representative(&call.shared))
}

/// `GET /v1/status/peers`: the mesh addresses of the alive members, in order of name.
pub(super) async fn peers(call: Call) -> Result<Reply, Refusal> {
    let members = call.shared.membership.members();
    let alive = members.members.iter().filter(|member| member.status == MemberStatus::Alive);
    let addrs: Vec<String> = alive.map(|member| member.addr.to_string()).collect();
    Reply::json(&call, &addrs)
}

/// Returns the address that stands for a leader; this node's own while the membership is empty.
pub(super) fn representative(shared: &Shared) -> String {
    let members = shared.membership.members();
    let alive = members.members.iter().filter(|member| member.status == MemberStatus::Alive);
    let first = alive.min_by(|a, b| a.name.cmp(&b.name));
    first.map_or(shared.node.mesh_addr, |member| member.addr).to_string()
}

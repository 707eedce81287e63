//! `/v1/catalog/register` and `/v1/catalog/deregister`: nodes that no agent runs on, written at this agent.
//!
//! They are records of this agent: signed by it, within its serve scope, gone with it. What an agent runs on is registered at
//! that agent.

use std::sync::Arc;

use http::StatusCode;

use super::Shared;
use super::agent::json_body;
use super::call::{Call, Refusal, Reply};
use super::seam::RegistryOrder;
use super::write::externals_in_effect;
use crate::model::{MemberStatus, NodeName};
use crate::registry::definition::{InDatacenter, external_from_json, removal_from_json};

/// `PUT /v1/catalog/register`
pub(super) async fn register(call: Call) -> Result<Reply, Refusal> {
    let InDatacenter { body: write, datacenter } = external_from_json(&json_body(&call)?)?;
    is_own(&call, &datacenter)?;
    if is_of_an_agent(&call.shared, &write.node) {
        return Err(Refusal::bad(format!(
            "Invalid Node: {:?} is a node of the mesh, and its agent tells of it: register at that agent (PUT /v1/agent/service/register), or give this node another name",
            write.node.as_str()
        )));
    }
    is_written_here(&call.shared, &write.node, "register it there")?;
    let node = write.node.clone();
    carry_out(&call.shared, &node, RegistryOrder::RegisterExternal(Box::new(write))).await?;
    Reply::json(&call, &true)
}

/// `PUT /v1/catalog/deregister`: what is not there is gone already.
pub(super) async fn deregister(call: Call) -> Result<Reply, Refusal> {
    let InDatacenter { body: (node, part), datacenter } = removal_from_json(&json_body(&call)?)?;
    is_own(&call, &datacenter)?;
    let is_here = call.shared.registry.state().externals.contains_key(&node);
    // One that was written here before an agent came up under its name goes all the same.
    if !is_here && is_of_an_agent(&call.shared, &node) {
        return Err(Refusal::bad(format!(
            "Invalid Node: {:?} is a node of the mesh: deregister its services at its agent (PUT /v1/agent/service/deregister/:id), or let a node that failed go (PUT /v1/agent/force-leave/{node})",
            node.as_str()
        )));
    }
    if !is_here {
        is_written_here(&call.shared, &node, "deregister it there")?;
    }
    carry_out(&call.shared, &node.clone(), RegistryOrder::DeregisterExternal { node, part }).await?;
    Reply::json(&call, &true)
}

/// Carries an order about `node` out, and waits until what this agent answers is as new: whoever wrote may read at once, as
/// from Consul's catalogue.
async fn carry_out(shared: &Shared, node: &NodeName, order: RegistryOrder) -> Result<(), Refusal> {
    let written = || shared.registry.state().externals.get(node).cloned();
    let (before, was_shown) = (written(), Arc::clone(&shared.snapshot.load().externals));
    shared.registry.carry_out(order).await?;
    if written() != before {
        externals_in_effect(shared, &was_shown).await;
    }
    Ok(())
}

/// Refuses another datacenter than the agent's own, in the body as in the query.
fn is_own(call: &Call, named: &str) -> Result<(), Refusal> {
    let own = call.shared.node.datacenter.as_str();
    let asked = [named, call.query.given("dc").unwrap_or_default()];
    let Some(other) = asked.into_iter().find(|other| !other.is_empty() && *other != own) else { return Ok(()) };
    let snapshot = call.shared.snapshot.load();
    if snapshot.nodes.values().any(|node| node.info.datacenter == other) {
        return Err(Refusal::bad(format!(
            "Invalid Datacenter: this agent is in {own:?}: send the request to an agent of {other:?}, whose record it will be"
        )));
    }
    Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "No path to datacenter"))
}

/// Tells whether an agent has the name and has not left.
fn is_of_an_agent(shared: &Shared, name: &NodeName) -> bool {
    let is_there = |status| status != MemberStatus::Left;
    let members = shared.membership.members();
    let is_member = members.members.iter().any(|member| member.name == *name && is_there(member.status));
    let snapshot = shared.snapshot.load();
    is_member || *name == shared.node.name || snapshot.nodes.get(name).is_some_and(|node| is_there(node.status))
}

/// Refuses what another agent that lives has written: of two writers nobody could say which counts.
fn is_written_here(shared: &Shared, name: &NodeName, what_to_do: &str) -> Result<(), Refusal> {
    let snapshot = shared.snapshot.load();
    let mut others = snapshot.externals.named(name).filter(|node| node.status == MemberStatus::Alive);
    let other = others.find_map(|node| node.writer().filter(|writer| **writer != shared.node.name));
    match other {
        Some(other) => Err(Refusal::bad(format!(
            "Invalid Node: {:?} was registered at the agent of {other}, which tells of it: {what_to_do}",
            name.as_str()
        ))),
        None => Ok(()),
    }
}

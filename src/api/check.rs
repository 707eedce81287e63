//! `/v1/agent/check…`: the checks of this agent.

use std::collections::BTreeMap;

use serde_json::Value;

use super::agent::{defaults, json_body};
use super::call::{Call, Refusal, Reply};
use super::maintain::{NODE_MAINTENANCE, SERVICE_MAINTENANCE};
use super::seam::RegistryOrder;
use super::shape::Check;
use super::sift;
use crate::model::{CheckId, HealthStatus};
use crate::registry::RegistryError;
use crate::registry::definition::check_from_json;

/// `GET /v1/agent/checks`: by id.
pub(super) async fn list(call: Call) -> Result<Reply, Refusal> {
    let filter = sift::filter::<Check<'_>>(&call)?;
    let state = call.shared.registry.state();
    let node = call.shared.node.name.as_str();
    let all = state.checks.iter().map(|(id, check)| (id.as_str(), Check::local(check, node)));
    let checks: BTreeMap<&str, Check<'_>> = all.filter(|(_, check)| filter.is_match(check)).collect();
    Reply::json(&call, &checks)
}

/// `PUT /v1/agent/check/register`
pub(super) async fn register(call: Call) -> Result<Reply, Refusal> {
    let definition = check_from_json(&json_body(&call)?, &defaults(&call))?;
    refuse_maintenance(definition.id.as_str())?;
    call.shared.registry.carry_out(RegistryOrder::RegisterCheck(Box::new(definition))).await?;
    Ok(Reply::Empty)
}

/// `PUT /v1/agent/check/deregister/:id`
pub(super) async fn deregister(call: Call) -> Result<Reply, Refusal> {
    call.shared.registry.carry_out(RegistryOrder::DeregisterCheck(check_id(&call)?)).await?;
    Ok(Reply::Empty)
}

/// `PUT /v1/agent/check/pass/:id`
pub(super) async fn pass(call: Call) -> Result<Reply, Refusal> {
    set(call, HealthStatus::Passing).await
}

/// `PUT /v1/agent/check/warn/:id`
pub(super) async fn warn(call: Call) -> Result<Reply, Refusal> {
    set(call, HealthStatus::Warning).await
}

/// `PUT /v1/agent/check/fail/:id`
pub(super) async fn fail(call: Call) -> Result<Reply, Refusal> {
    set(call, HealthStatus::Critical).await
}

/// Sets a TTL check, with the query's `note` as its output.
async fn set(call: Call, status: HealthStatus) -> Result<Reply, Refusal> {
    let output = call.query.first("note").unwrap_or_default().to_owned();
    let order = RegistryOrder::UpdateTtl { id: check_id(&call)?, status, output };
    call.shared.registry.carry_out(order).await?;
    Ok(Reply::Empty)
}

/// `PUT /v1/agent/check/update/:id`: `{"Status", "Output"}`.
pub(super) async fn update(call: Call) -> Result<Reply, Refusal> {
    let (status, output) = parse_update(&json_body(&call)?)?;
    let order = RegistryOrder::UpdateTtl { id: check_id(&call)?, status, output };
    call.shared.registry.carry_out(order).await?;
    Ok(Reply::Empty)
}

/// Reads the two fields; keys in any case, unknown ones refused by name.
fn parse_update(body: &Value) -> Result<(HealthStatus, String), Refusal> {
    let decode = |what: &str| Refusal::bad(format!("Request decode failed: {what}"));
    let fields = body.as_object().ok_or_else(|| decode("the body must be an object"))?;
    let (mut status, mut output) = ("", "");
    for (key, value) in fields {
        let field = match key.to_ascii_lowercase().as_str() {
            "status" => &mut status,
            "output" => &mut output,
            _ => return Err(decode(&format!("unknown field {key:?}"))),
        };
        *field = value.as_str().ok_or_else(|| decode(&format!("{key} must be a string")))?;
    }
    let status = match status {
        "passing" => HealthStatus::Passing,
        "warning" => HealthStatus::Warning,
        "critical" => HealthStatus::Critical,
        other => return Err(Refusal::bad(format!("Invalid check status: {other:?}"))),
    };
    Ok((status, output.to_owned()))
}

/// Parses the path's check ID; a text that can be none is unknown.
fn check_id(call: &Call) -> Result<CheckId, Refusal> {
    let id = &call.argument;
    refuse_maintenance(id)?;
    id.parse().map_err(|_| RegistryError::UnknownCheck { id: id.clone() }.into())
}

/// Maintenance has checks of its own: who may change any check must not thereby put the node into it or end it.
fn refuse_maintenance(id: &str) -> Result<(), Refusal> {
    if id == NODE_MAINTENANCE || id.starts_with(SERVICE_MAINTENANCE) {
        let text = "check ids of maintenance are the agent's own: PUT /v1/agent/maintenance?enable=…, or …/service/maintenance/:id";
        return Err(Refusal::bad(text));
    }
    Ok(())
}

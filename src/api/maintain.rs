//! Maintenance, and what a load balancer asks this agent about its own services.

use http::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Refusal, Reply, TEXT};
use super::seam::RegistryOrder;
use super::shape::{self, Check};
use crate::model::{CheckId, HealthStatus, InstanceId};
use crate::registry::{CheckDefinition, LocalCheck, LocalService, LocalState, Probe, RegistryError};

/// Consul's name of the check that keeps a node out.
pub(super) const NODE_MAINTENANCE: &str = "_node_maintenance";
/// What the name of the check that keeps a service out begins with.
pub(super) const SERVICE_MAINTENANCE: &str = "_service_maintenance:";
/// What is noted where nobody gave a reason.
const REASON_DEFAULT: &str = "maintenance was turned on without a reason";

/// `PUT /v1/agent/maintenance?enable=true&reason=…`
pub(super) async fn node(call: Call) -> Result<Reply, Refusal> {
    set(&call, NODE_MAINTENANCE.to_owned(), None).await
}

/// `PUT /v1/agent/service/maintenance/:id?enable=true&reason=…`
pub(super) async fn service(call: Call) -> Result<Reply, Refusal> {
    let unknown = || RegistryError::UnknownService { id: call.argument.clone() };
    let id: InstanceId = call.argument.parse().map_err(|_| unknown())?;
    if !call.shared.registry.state().services.contains_key(&id) {
        return Err(unknown().into());
    }
    set(&call, format!("{SERVICE_MAINTENANCE}{id}"), Some(id)).await
}

async fn set(call: &Call, check: String, service: Option<InstanceId>) -> Result<Reply, Refusal> {
    if call.query.given("enable").is_none() {
        return Err(Refusal::bad("Missing value for enable"));
    }
    // In any case, as Go reads it: Python's clients send `True`.
    let enable = call.query.switch("enable")?;
    let id: CheckId = check.parse().map_err(|error| Refusal::bad(format!("Invalid service ID: {error}")))?;
    let is_on = call.shared.registry.state().checks.contains_key(&id);
    let order = match (enable, is_on) {
        (true, _) => RegistryOrder::RegisterCheck(Box::new(definition(id, service, call.query.given("reason")))),
        (false, true) => RegistryOrder::DeregisterCheck(id),
        (false, false) => return Ok(Reply::Empty),
    };
    call.shared.registry.carry_out(order).await?;
    Ok(Reply::Empty)
}

fn definition(id: CheckId, service: Option<InstanceId>, reason: Option<&str>) -> CheckDefinition {
    let what = if service.is_some() { "Service" } else { "Node" };
    CheckDefinition {
        id,
        name: format!("{what} Maintenance Mode"),
        notes: reason.filter(|reason| !reason.is_empty()).unwrap_or(REASON_DEFAULT).to_owned(),
        service,
        probe: Probe::Static,
        initial: HealthStatus::Critical,
        success_before_passing: 0,
        failures_before_warning: 0,
        failures_before_critical: 0,
        output_bytes_max: crate::registry::definition::OUTPUT_BYTES_MAX,
        deregister_critical_after: None,
    }
}

/// `GET /v1/agent/health/service/id/:id`: 200 passing, 429 warning, 503 critical or in maintenance, 404 unknown.
pub(super) async fn health_by_id(call: Call) -> Result<Reply, Refusal> {
    let state = call.shared.registry.state();
    let absent = || Refusal::new(StatusCode::NOT_FOUND, format!("ServiceId {} not found", call.argument));
    let found = state.services.get(call.argument.as_str()).ok_or_else(absent)?;
    let judged = Judged::of(&state, found);
    let body = judged.shape(&call);
    answer(&call, judged.word, &body)
}

/// `GET /v1/agent/health/service/name/:name`: the worst of all instances here, each listed.
pub(super) async fn health_by_name(call: Call) -> Result<Reply, Refusal> {
    let state = call.shared.registry.state();
    let named = |service: &&std::sync::Arc<LocalService>| service.definition.record.name.as_str() == call.argument;
    let judged: Vec<Judged<'_>> =
        state.services.values().filter(named).map(|found| Judged::of(&state, found)).collect();
    let Some(worst) = judged.iter().map(|judged| judged.word).max() else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, format!("ServiceName {} not found", call.argument)));
    };
    let body: Vec<Value> = judged.iter().map(|judged| judged.shape(&call)).collect();
    answer(&call, worst, &json!(body))
}

/// The aggregated status; maintenance outranks all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Word {
    Status(HealthStatus),
    Maintenance,
}

impl Word {
    fn as_str(self) -> &'static str {
        match self {
            Self::Status(status) => status.as_str(),
            Self::Maintenance => "maintenance",
        }
    }
}

/// A service of this agent with all that decides over it: its own checks and the node's.
struct Judged<'a> {
    service: &'a LocalService,
    checks: Vec<&'a LocalCheck>,
    word: Word,
}

impl<'a> Judged<'a> {
    fn of(state: &'a LocalState, service: &'a LocalService) -> Self {
        let id = &service.definition.record.id;
        let counts = |check: &&LocalCheck| check.definition.service.as_ref().is_none_or(|of| of == id);
        let checks: Vec<&LocalCheck> = state.checks.values().map(|check| &**check).filter(counts).collect();
        let word = if checks.iter().any(|check| check.definition.probe == Probe::Static) {
            Word::Maintenance
        } else {
            Word::Status(HealthStatus::worst(checks.iter().map(|check| check.status)))
        };
        Self { service, checks, word }
    }

    fn shape(&self, call: &Call) -> Value {
        let facts = &call.shared.node;
        let checks: Vec<Check<'_>> = self.checks.iter().map(|check| Check::local(check, facts.name.as_str())).collect();
        json!({
            "AggregatedStatus": self.word.as_str(),
            "Service": shape::agent_service(&self.service.definition, &facts.datacenter),
            "Checks": checks,
        })
    }
}

fn answer(call: &Call, word: Word, body: &Value) -> Result<Reply, Refusal> {
    let status = match word {
        Word::Status(HealthStatus::Passing) => StatusCode::OK,
        Word::Status(HealthStatus::Warning) => StatusCode::TOO_MANY_REQUESTS,
        Word::Status(HealthStatus::Critical) | Word::Maintenance => StatusCode::SERVICE_UNAVAILABLE,
    };
    if call.query.given("format") == Some("text") {
        return Ok(Reply::Judged { status, body: word.as_str().into(), content_type: TEXT });
    }
    let written = serde_json::to_vec(body).map_err(|error| Refusal::internal(error.to_string()))?;
    Ok(Reply::Judged { status, body: written, content_type: "application/json" })
}

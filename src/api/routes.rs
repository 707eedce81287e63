//! The table of endpoints, the router made from it, and what stands around every handler.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts as _, RawPathParams, Request};
use axum::response::Response;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use super::call::{Call, Coding, Handler, Refusal, Reply, TEXT};
use super::guard::{Arrival, Peer, Right};
use super::query::{self, Query};
use super::{
    BODY_BYTES_MAX, Shared, agent, catalog, check, connect, documents, entry, event, external, gateway, health, host,
    intention, kv, maintain, mesh, monitor, near, prepared, status, why,
};
use crate::clock;

/// A client has so long to send its body: 1 MiB over the slowest link that is worth waiting for.
const BODY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// One endpoint.
pub(super) struct Route {
    pub(super) method: Method,
    /// With at most one parameter, `{…}`.
    pub(super) path: &'static str,
    /// What a token must allow.
    pub(super) right: Right,
    pub(super) handler: Handler,
}

/// Makes a row of the table from a method, a path, an `async fn(Call) -> Result<Reply, Refusal>`, and the right that it takes:
/// where none is named, reading for GET and an operator's for everything else.
macro_rules! route {
    (GET $path:literal $handler:path) => { route!(GET $path $handler, Read) };
    ($method:ident $path:literal $handler:path) => { route!($method $path $handler, Operator) };
    ($method:ident $path:literal $handler:path, $right:ident) => {
        Route { method: Method::$method, path: $path, right: Right::$right, handler: |call| $handler(call).boxed() }
    };
}

/// Every endpoint. The router and the check of `api/openapi.yaml` are made from this table.
pub(super) const ROUTES: &[Route] = &[
    route!(GET "/" root),
    route!(GET "/v1/agent/services" agent::services),
    route!(GET "/v1/agent/service/{id}" agent::service),
    route!(PUT "/v1/agent/service/register" agent::register, Services),
    route!(PUT "/v1/agent/service/deregister/{id}" agent::deregister, Services),
    route!(PUT "/v1/agent/service/maintenance/{id}" maintain::service, Services),
    route!(PUT "/v1/agent/maintenance" maintain::node),
    route!(GET "/v1/agent/health/service/id/{id}" maintain::health_by_id),
    route!(GET "/v1/agent/health/service/name/{name}" maintain::health_by_name),
    route!(GET "/v1/agent/checks" check::list),
    route!(PUT "/v1/agent/check/register" check::register, Services),
    route!(PUT "/v1/agent/check/deregister/{id}" check::deregister, Services),
    route!(PUT "/v1/agent/check/pass/{id}" check::pass, Services),
    route!(PUT "/v1/agent/check/warn/{id}" check::warn, Services),
    route!(PUT "/v1/agent/check/fail/{id}" check::fail, Services),
    route!(PUT "/v1/agent/check/update/{id}" check::update, Services),
    route!(GET "/v1/agent/members" agent::members),
    route!(GET "/v1/agent/self" agent::this),
    route!(GET "/v1/agent/version" agent::version),
    route!(GET "/v1/agent/metrics" agent::metrics),
    route!(GET "/v1/agent/host" host::host),
    route!(GET "/v1/agent/monitor" monitor::monitor),
    route!(PUT "/v1/agent/join/{addr}" agent::join),
    route!(PUT "/v1/agent/leave" agent::leave),
    route!(PUT "/v1/agent/reload" agent::reload),
    route!(PUT "/v1/agent/force-leave/{node}" agent::force_leave),
    route!(GET "/v1/agent/connect/ca/roots" connect::roots),
    route!(GET "/v1/agent/connect/ca/leaf/{service}" connect::leaf, Services),
    route!(POST "/v1/agent/connect/authorize" connect::authorize, Read),
    route!(PUT "/v1/agent/connect/authorize" connect::authorize, Read),
    route!(GET "/v1/connect/ca/roots" connect::roots),
    route!(GET "/v1/connect/intentions" intention::list),
    route!(POST "/v1/connect/intentions" intention::create),
    route!(GET "/v1/connect/intentions/{id}" intention::read_by_id),
    route!(PUT "/v1/connect/intentions/{id}" intention::put_by_id),
    route!(DELETE "/v1/connect/intentions/{id}" intention::delete_by_id),
    route!(GET "/v1/connect/intentions/exact" intention::read),
    route!(PUT "/v1/connect/intentions/exact" intention::put),
    route!(DELETE "/v1/connect/intentions/exact" intention::delete),
    route!(GET "/v1/connect/intentions/match" intention::matching),
    route!(GET "/v1/connect/intentions/check" intention::check),
    route!(PUT "/v1/config" entry::put),
    route!(GET "/v1/config/{*entry}" entry::read),
    route!(DELETE "/v1/config/{*entry}" entry::delete),
    route!(GET "/v1/discovery-chain/{service}" entry::discovery_chain),
    route!(PUT "/v1/catalog/register" external::register, Services),
    route!(PUT "/v1/catalog/deregister" external::deregister, Services),
    route!(GET "/v1/catalog/datacenters" catalog::datacenters),
    route!(GET "/v1/catalog/nodes" catalog::nodes),
    route!(GET "/v1/catalog/services" catalog::services),
    route!(GET "/v1/catalog/service/{name}" catalog::service),
    route!(GET "/v1/catalog/connect/{name}" catalog::connect),
    route!(GET "/v1/catalog/node/{name}" catalog::node),
    route!(GET "/v1/catalog/node-services/{name}" catalog::node_services),
    route!(GET "/v1/catalog/gateway-services/{name}" gateway::services),
    route!(GET "/v1/health/service/{name}" health::service),
    route!(GET "/v1/health/connect/{name}" health::connect),
    route!(GET "/v1/health/ingress/{name}" health::ingress),
    route!(GET "/v1/health/node/{name}" health::node),
    route!(GET "/v1/health/checks/{name}" health::checks),
    route!(GET "/v1/health/state/{state}" health::state),
    route!(GET "/v1/coordinate/datacenters" near::datacenters),
    route!(GET "/v1/coordinate/nodes" near::nodes),
    route!(GET "/v1/coordinate/node/{name}" near::node),
    route!(GET "/v1/kv/" kv::get),
    route!(PUT "/v1/kv/" kv::put),
    route!(DELETE "/v1/kv/" kv::delete),
    route!(GET "/v1/kv/{*key}" kv::get),
    route!(PUT "/v1/kv/{*key}" kv::put),
    route!(DELETE "/v1/kv/{*key}" kv::delete),
    route!(GET "/v1/query" prepared::list),
    route!(POST "/v1/query" prepared::create),
    route!(GET "/v1/query/{id}" prepared::one),
    route!(PUT "/v1/query/{id}" prepared::update),
    route!(DELETE "/v1/query/{id}" prepared::delete),
    route!(GET "/v1/query/{id}/execute" prepared::execute),
    route!(GET "/v1/query/{id}/explain" prepared::explain),
    route!(PUT "/v1/event/fire/{name}" event::fire),
    route!(GET "/v1/event/list" event::list),
    route!(GET "/v1/status/leader" status::leader),
    route!(GET "/v1/status/peers" status::peers),
    route!(GET "/v1/mesh/info" mesh::info),
    route!(GET "/v1/mesh/members" mesh::members),
    route!(GET "/v1/mesh/round-trips" near::round_trips),
    route!(GET "/v1/mesh/documents" documents::list),
    route!(PUT "/v1/mesh/document" documents::offer),
    route!(GET "/v1/mesh/export" documents::export),
    route!(GET "/v1/mesh/why" why::why),
    route!(GET "/v1/mesh/certificates" documents::certificates),
    route!(GET "/v1/mesh/tokens" documents::tokens),
];

/// Groups of Consul's that weft refuses on purpose: prefix, status, text.
pub(super) const REFUSED: &[(&str, StatusCode, &str)] = &[
    ("/v1/acl/", StatusCode::UNAUTHORIZED, "ACL support disabled"),
    ("/v1/agent/token/", StatusCode::UNAUTHORIZED, "ACL support disabled"),
    (
        "/v1/connect/ca/configuration",
        StatusCode::NOT_IMPLEMENTED,
        "no agent configures the mesh CA: weft ca init makes it, weft ca rotate replaces its root",
    ),
    ("/v1/peering", StatusCode::NOT_IMPLEMENTED, "weft has one mesh of all datacenters, and no peers beside it"),
    (
        "/v1/coordinate/update",
        StatusCode::NOT_IMPLEMENTED,
        "weft measures round trips by itself: no client sets a coordinate",
    ),
    (
        "/v1/session/",
        StatusCode::NOT_IMPLEMENTED,
        "needs consensus; weft has none: sessions and locks need one order of writes",
    ),
    ("/v1/txn", StatusCode::NOT_IMPLEMENTED, "needs consensus; weft has none: transactions need one order of writes"),
    (
        "/v1/snapshot",
        StatusCode::NOT_IMPLEMENTED,
        "needs consensus; weft has none: every agent holds its own records, there is no one state to save",
    ),
    ("/v1/operator/", StatusCode::NOT_IMPLEMENTED, "needs consensus; weft has none: there are no servers to operate"),
];

/// Makes the router.
pub(super) fn router(shared: &Arc<Shared>) -> Router {
    let mut router = Router::new();
    let mut done: Vec<&'static str> = Vec::new();
    for Route { path, .. } in ROUTES {
        if done.contains(path) {
            continue;
        }
        done.push(path);
        let shared = Arc::clone(shared);
        router = router.route(path, axum::routing::any(move |request| dispatch(Arc::clone(&shared), path, request)));
    }
    let shared = Arc::clone(shared);
    router.fallback(move |request| {
        let response = unknown(&shared, request);
        async move { response }
    })
}

/// Answers one request to the endpoint at `path`.
async fn dispatch(shared: Arc<Shared>, path: &'static str, request: Request) -> Response {
    let started = clock::now();
    let asks_to_wait = request.uri().query().is_some_and(|query| query.contains("index=") || query.contains("hash="));
    let meter = shared.meter.clone();
    let response = answer(shared, path, request).await.unwrap_or_else(Refusal::into_response);
    let took = (!asks_to_wait).then(|| clock::now() - started);
    meter.count(path, response.status(), took);
    response
}

/// Guards, picks the method, reads the body and calls the handler.
async fn answer(shared: Arc<Shared>, path: &'static str, request: Request) -> Result<Response, Refusal> {
    let (mut parts, body) = request.into_parts();
    let method = if parts.method == Method::HEAD { Method::GET } else { parts.method.clone() };
    let route = ROUTES.iter().find(|route| route.path == path && route.method == method);
    let query = admit(&shared, &parts, route.map_or(Right::Read, |route| route.right))?;
    let Some(route) = route else { return Ok(other_method(path, &parts.method)) };
    let argument = argument(&mut parts).await?;
    let body = match method {
        Method::PUT | Method::POST => read_body(&parts, body).await?,
        // What says nothing there has no body that would be waited for (RFC 9110 §9.3.1).
        _ => Bytes::new(),
    };
    let coding = Coding::of(&parts.headers);
    let peer = parts.extensions.get::<Peer>().map(|peer| peer.0);
    let room = Arc::clone(&shared.room);
    let call = Call { shared, query, headers: parts.headers, peer, argument, body };
    query::refuse_unknown_places(&call, path)?;
    Ok((route.handler)(call).await?.into_response(coding, &room))
}

/// Checks token, Host and Origin; returns the query.
fn admit(shared: &Shared, parts: &Parts, needed: Right) -> Result<Query, Refusal> {
    let query = Query::parse(&parts.uri)?;
    let from = parts.extensions.get::<Arrival>().copied().unwrap_or(Arrival::Loopback);
    shared.guard.admit(&parts.headers, &parts.uri, &query, from, needed)?;
    Ok(query)
}

/// `OPTIONS`, and methods that the endpoint does not have.
fn other_method(path: &'static str, method: &Method) -> Response {
    let mut allowed: Vec<&str> =
        ROUTES.iter().filter(|route| route.path == path).map(|route| route.method.as_str()).collect();
    if allowed.contains(&"GET") {
        allowed.push("HEAD");
    }
    allowed.push("OPTIONS");
    let mut response = if method == Method::OPTIONS {
        Response::new(Body::empty())
    } else {
        Refusal::new(StatusCode::METHOD_NOT_ALLOWED, format!("method {method} not allowed")).into_response()
    };
    let allowed = HeaderValue::try_from(allowed.join(",")).expect("method names are plain text");
    response.headers_mut().insert(header::ALLOW, allowed);
    response
}

/// Returns the path's one parameter, decoded.
async fn argument(parts: &mut Parts) -> Result<String, Refusal> {
    let params = RawPathParams::from_request_parts(parts, &()).await;
    let params = params.map_err(|_| Refusal::bad("Invalid URL path: a segment is not UTF-8"))?;
    Ok(params.iter().next().map(|(_, value)| value.to_owned()).unwrap_or_default())
}

/// Reads a body of at most [`BODY_BYTES_MAX`].
async fn read_body(parts: &Parts, body: Body) -> Result<Bytes, Refusal> {
    let too_large =
        || Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("Request body is larger than {BODY_BYTES_MAX} bytes"));
    let announced = parts.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: u64| bytes > BODY_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let read = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_BYTES_MAX).collect()).await;
    let late = |_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "Request body did not arrive in time");
    match read.map_err(late)? {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => Err(Refusal::bad(format!("Request body cannot be read: {error}"))),
    }
}

/// Answers every path that is no endpoint.
fn unknown(shared: &Shared, request: Request) -> Response {
    let (parts, _body) = request.into_parts();
    let refusal = admit(shared, &parts, Right::Read).map_or_else(|refusal| refusal, |_| not_found(parts.uri.path()));
    shared.meter.count("other", refusal.status, None);
    refusal.into_response()
}

fn not_found(path: &str) -> Refusal {
    let refused = REFUSED.iter().find(|(prefix, ..)| path.starts_with(prefix));
    match refused {
        Some((_, status, text)) => Refusal::new(*status, *text),
        None => Refusal::new(StatusCode::NOT_FOUND, "Invalid URL path: not a recognized HTTP API endpoint"),
    }
}

/// `GET /`: something answers here.
async fn root(call: Call) -> Result<Reply, Refusal> {
    let body = format!("weft {} on {}\n", call.shared.node.version, call.shared.node.name);
    Ok(Reply::Text { body, content_type: TEXT })
}

//! The checks over HTTP/2: gRPC's health protocol (grpc.health.v1), and a bare PING (RFC 9113 §6.7).

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::{Either, select};
use prost::Message as _;

use super::net::{Io, Tools, critical, passing, split};
use super::state::Outcome;
use crate::registry::definition::TlsOptions;

/// Most bytes of an answer that are read: a health answer has seven.
const ANSWER_BYTES_MAX: usize = 4096;
/// Largest header list that is taken, in bytes.
const HEADERS_BYTES_MAX: u32 = 64 * 1024;
/// `SERVING` of grpc.health.v1.
const SERVING: i32 = 1;

/// `grpc.health.v1.HealthCheckRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthRequest {
    #[prost(string, tag = "1")]
    pub(super) service: String,
}

/// `grpc.health.v1.HealthCheckResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthResponse {
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
}

/// Puts the five bytes of gRPC's framing before a message.
pub(super) fn framed(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    frame.put_slice(&message.encode_to_vec());
    frame.freeze()
}

/// The gRPC check.
pub(super) async fn grpc(tools: &Tools, target: &str, service: &str, tls: Option<&TlsOptions>) -> Outcome {
    let what = if service.is_empty() { target.to_owned() } else { format!("{target}/{service}") };
    match ask(tools, target, service, tls).await {
        Ok(SERVING) => passing(format!("gRPC check {what}: success")),
        Ok(status) => {
            let name = match status {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "a status that is not defined",
            };
            critical(format!("gRPC check {what}: {name}"))
        }
        Err(problem) => critical(format!("gRPC check {what}: {problem}")),
    }
}

async fn ask(tools: &Tools, target: &str, service: &str, tls: Option<&TlsOptions>) -> Result<i32, String> {
    let (host, port) = split(target);
    let io = tools.open(host, port, tls, Some("h2")).await?;
    let (client, connection) = handshake(io).await?;
    let exchange = async {
        let mut client = client.ready().await.map_err(|error| error.to_string())?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let request = http::Request::post(format!("{scheme}://{target}/grpc.health.v1.Health/Check"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", concat!("weft/", env!("CARGO_PKG_VERSION")))
            .body(())
            .map_err(|error| error.to_string())?;
        let (response, mut stream) = client.send_request(request, false).map_err(|error| error.to_string())?;
        let message = framed(&HealthRequest { service: service.to_owned() });
        stream.send_data(message, true).map_err(|error| error.to_string())?;
        read_answer(response.await.map_err(|error| error.to_string())?).await
    };
    match select(std::pin::pin!(exchange), std::pin::pin!(connection)).await {
        Either::Left((answer, _connection)) => answer,
        Either::Right((Err(error), _exchange)) => Err(error.to_string()),
        Either::Right((Ok(()), exchange)) => exchange.await,
    }
}

async fn read_answer(response: http::Response<h2::RecvStream>) -> Result<i32, String> {
    if response.status() != http::StatusCode::OK {
        return Err(format!("HTTP status {}", response.status()));
    }
    // An error may come with the head alone.
    grpc_status(response.headers()).unwrap_or(Ok(()))?;
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(|error| error.to_string())?;
        // What was taken is given back, or the peer's window would close.
        body.flow_control().release_capacity(data.len()).map_err(|error| error.to_string())?;
        bytes.extend_from_slice(&data);
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(format!("the answer is larger than {ANSWER_BYTES_MAX} bytes"));
        }
    }
    let trailers = body.trailers().await.map_err(|error| error.to_string())?.unwrap_or_default();
    grpc_status(&trailers).unwrap_or_else(|| Err("the answer ends without grpc-status".to_owned()))?;
    let Some(([0, ..], message)) = bytes.split_at_checked(5) else {
        return Err("the answer is no gRPC message".to_owned());
    };
    let answer =
        HealthResponse::decode(message).map_err(|error| format!("the answer is no health message: {error}"))?;
    Ok(answer.status)
}

/// Returns what `grpc-status` says, if it is there.
fn grpc_status(headers: &http::HeaderMap) -> Option<Result<(), String>> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status")? {
        "0" => Some(Ok(())),
        // What grpc.health.v1 says of a service that it does not know.
        "5" => Some(Err("the server does not know the service (NOT_FOUND)".to_owned())),
        "12" => Some(Err("the server does not offer grpc.health.v1 (UNIMPLEMENTED)".to_owned())),
        code => Some(Err(format!("grpc-status {code}: {}", text("grpc-message").unwrap_or_default()))),
    }
}

/// The H2PING check.
pub(super) async fn ping(tools: &Tools, target: &str, tls: Option<&TlsOptions>) -> Outcome {
    match ping_once(tools, target, tls).await {
        Ok(()) => passing(format!("HTTP2 ping {target}: success")),
        Err(problem) => critical(format!("HTTP2 ping {target}: {problem}")),
    }
}

async fn ping_once(tools: &Tools, target: &str, tls: Option<&TlsOptions>) -> Result<(), String> {
    let (host, port) = split(target);
    let io = tools.open(host, port, tls, Some("h2")).await?;
    let (_client, mut connection) = handshake(io).await?;
    let mut pings = connection.ping_pong().ok_or("no PING can be sent")?;
    let ping = pings.ping(h2::Ping::opaque());
    match select(std::pin::pin!(ping), std::pin::pin!(connection)).await {
        Either::Left((Ok(_pong), _)) => Ok(()),
        Either::Left((Err(error), _)) | Either::Right((Err(error), _)) => Err(error.to_string()),
        Either::Right((Ok(()), _)) => Err("the connection was closed before the answer".to_owned()),
    }
}

type Handshaken = (h2::client::SendRequest<Bytes>, h2::client::Connection<Box<dyn Io>, Bytes>);

async fn handshake(io: Box<dyn Io>) -> Result<Handshaken, String> {
    let mut builder = h2::client::Builder::new();
    builder.enable_push(false).max_header_list_size(HEADERS_BYTES_MAX);
    builder.handshake(io).await.map_err(|error| error.to_string())
}

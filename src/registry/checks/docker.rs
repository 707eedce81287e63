//! The Docker check: a program in a container, by the Engine's API over its unix socket.
//!
//! ```text
//!   POST /containers/ID/exec -> exec id -> POST /exec/EID/start (output, framed) -> GET /exec/EID/json -> exit code
//! ```
//!
//! Not here: the container's own health. A program that overruns its time goes on in the container: Docker cannot stop it.

use std::path::Path;

use bytes::Bytes;
use futures_util::future::{Either, select};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::net::critical;
use super::script::judge;
use super::state::Outcome;

/// Largest JSON answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Bytes before each piece of output: stream, three zeros, length.
const FRAME_HEAD_BYTES: usize = 8;
/// Most bytes of framed output that are read; what is kept is bounded by the check.
const OUTPUT_READ_MAX: usize = 1024 * 1024;

/// Runs the check once; the caller bounds the time.
pub(super) async fn run(socket: &Path, container: &str, command: &[&str], bytes_max: usize) -> Outcome {
    match exec(socket, container, command, bytes_max).await {
        Ok((code, output)) => Outcome { status: judge(Some(code)), output },
        Err(problem) => critical(format!("Docker container {container}: {problem}")),
    }
}

async fn exec(socket: &Path, container: &str, command: &[&str], bytes_max: usize) -> Result<(i64, String), String> {
    let create =
        json!({"AttachStdout": true, "AttachStderr": true, "AttachStdin": false, "Tty": false, "Cmd": command});
    let path = format!("/containers/{container}/exec");
    let created = request(socket, Method::POST, &path, Some(&create), ANSWER_BYTES_MAX).await?;
    let created: Value = serde_json::from_slice(&created).map_err(|error| format!("its answer is no JSON: {error}"))?;
    let is_id = |id: &&str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let id = created.get("Id").and_then(Value::as_str).filter(is_id).ok_or("it gave no id of the program")?;
    let start = json!({"Detach": false, "Tty": false});
    let output = request(socket, Method::POST, &format!("/exec/{id}/start"), Some(&start), OUTPUT_READ_MAX).await?;
    let about = request(socket, Method::GET, &format!("/exec/{id}/json"), None, ANSWER_BYTES_MAX).await?;
    let about: Value = serde_json::from_slice(&about).map_err(|error| format!("its answer is no JSON: {error}"))?;
    let code = about.get("ExitCode").and_then(Value::as_i64).ok_or("it gave no exit code")?;
    Ok((code, unframed(&output, bytes_max)))
}

/// Takes the output out of its frames, at most `bytes_max` of it.
fn unframed(mut framed: &[u8], bytes_max: usize) -> String {
    let mut output = Vec::new();
    while let Some(([_, _, _, _, length @ ..], rest)) = framed.split_at_checked(FRAME_HEAD_BYTES)
        && output.len() < bytes_max
    {
        let length = length.iter().fold(0_usize, |length, byte| length << 8 | usize::from(*byte)).min(rest.len());
        let (piece, after) = rest.split_at(length);
        let room = piece.len().min(bytes_max - output.len());
        output.extend_from_slice(piece.get(..room).unwrap_or_default());
        framed = after;
    }
    String::from_utf8_lossy(&output).into_owned()
}

/// Sends one request over a connection of its own; an answer above `bytes_max` is cut.
async fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
    bytes_max: usize,
) -> Result<Vec<u8>, String> {
    let stream = UnixStream::connect(socket).await;
    let stream = stream.map_err(|error| format!("cannot connect to {}: {error}", socket.display()))?;
    let handshake = hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|error| error.to_string())?;
    let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
    let request = Request::builder().method(method).uri(path).header("host", "docker");
    let request = request.header("content-type", "application/json").body(Full::new(body));
    let request = request.map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let mut incoming = response.into_body();
        let mut bytes = Vec::new();
        while let Some(frame) = incoming.frame().await {
            let Ok(data) = frame.map_err(|error| error.to_string())?.into_data() else { continue };
            let room = data.len().min(bytes_max.saturating_sub(bytes.len()));
            bytes.extend_from_slice(data.get(..room).unwrap_or_default());
        }
        if status.is_success() { Ok(bytes) } else { Err(refusal(status, &bytes)) }
    };
    match select(std::pin::pin!(answer), std::pin::pin!(connection)).await {
        Either::Left((answer, _connection)) => answer,
        Either::Right((_ended, answer)) => answer.await,
    }
}

/// What Docker says about a request that it refuses.
fn refusal(status: StatusCode, bytes: &[u8]) -> String {
    let message = serde_json::from_slice::<Value>(bytes).ok();
    let message = message.as_ref().and_then(|value| value.get("message")).and_then(Value::as_str);
    format!("Docker answers {status}: {}", message.unwrap_or("no reason given"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_taken_out_of_its_frames_and_cut() {
        let framed = b"\x01\0\0\0\0\0\0\x03one\x02\0\0\0\0\0\0\x03two\x01\0\0\0\xff\xff\xff\xffend";
        assert_eq!(unframed(framed, 100), "onetwoend");
        assert_eq!(unframed(framed, 4), "onet");
        assert_eq!(unframed(b"\x01\0\0", 4), "");
    }
}

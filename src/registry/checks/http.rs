//! The HTTP check: one request over TCP, with TLS for https; redirects followed.

use bytes::Bytes;
use futures_util::future::{Either, select};
use http::header::{AUTHORIZATION, COOKIE, HOST, LOCATION, PROXY_AUTHORIZATION, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;

use super::net::Tools;
use super::state::Outcome;
use crate::model::HealthStatus;
use crate::registry::definition::{HttpTarget, OUTPUT_BYTES_MAX, TlsOptions};

/// Most redirects that one run follows (Go's default, so Consul's).
const REDIRECTS_MAX: usize = 10;
/// Largest response head, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Runs the check once; the caller bounds the time.
pub(super) async fn run(tools: &Tools, target: &HttpTarget) -> Outcome {
    match follow(tools, target).await {
        Ok((status, body)) => {
            let health = match status {
                status if status.is_success() => HealthStatus::Passing,
                StatusCode::TOO_MANY_REQUESTS => HealthStatus::Warning,
                _ => HealthStatus::Critical,
            };
            let output = format!("HTTP {} {}: {status} Output: {body}", target.method, target.url);
            Outcome { status: health, output }
        }
        Err(problem) => {
            let output = format!("HTTP {} {}: {problem}", target.method, target.url);
            Outcome { status: HealthStatus::Critical, output }
        }
    }
}

async fn follow(tools: &Tools, target: &HttpTarget) -> Result<(StatusCode, String), String> {
    let mut uri: Uri = target.url.parse().map_err(|error| format!("no URL: {error}"))?;
    let mut method = Method::from_bytes(target.method.as_bytes()).map_err(|error| error.to_string())?;
    let mut body = Bytes::copy_from_slice(target.body.as_bytes());
    let mut headers = HeaderMap::new();
    for (name, values) in &target.headers {
        for value in values {
            let name = HeaderName::try_from(name.as_str()).map_err(|error| error.to_string())?;
            headers.append(name, HeaderValue::try_from(value.as_str()).map_err(|error| error.to_string())?);
        }
    }
    for _ in 0..=REDIRECTS_MAX {
        let request = Request { uri: &uri, method: &method, headers: &headers, body: body.clone(), tls: &target.tls };
        let (status, location, text) = exchange(tools, request).await?;
        let is_redirect = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
        let (true, Some(location), false) = (is_redirect, location, target.disable_redirects) else {
            return Ok((status, text));
        };
        let next = resolve(&uri, &location).ok_or_else(|| format!("{status} to {location:?}, which is no http URL"))?;
        if next.authority() != uri.authority() {
            // Credentials are for the host that they were given for.
            for name in [HOST, AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION] {
                headers.remove(name);
            }
        }
        if !matches!(status.as_u16(), 307 | 308) && method != Method::HEAD {
            method = Method::GET;
            body = Bytes::new();
        }
        uri = next;
    }
    Err(format!("more than {REDIRECTS_MAX} redirects"))
}

/// Resolves the `Location` of a redirect against the URL that was asked (RFC 3986 §5.2, without dot segments).
fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let (authority, scheme) = (base.authority()?, base.scheme_str()?);
    let location = location.split('#').next().unwrap_or_default();
    let path = base.path();
    let text = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{path}{location}")
    } else if location.split(['/', '?']).next().is_some_and(|start| start.contains(':')) {
        location.to_owned()
    } else {
        let (dir, _) = path.rsplit_once('/').unwrap_or_default();
        format!("{scheme}://{authority}{dir}/{location}")
    };
    let uri: Uri = text.parse().ok()?;
    (matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty()))
        .then_some(uri)
}

/// One exchange.
struct Request<'a> {
    uri: &'a Uri,
    method: &'a Method,
    headers: &'a HeaderMap,
    body: Bytes,
    tls: &'a TlsOptions,
}

/// Sends one request and reads at most `OUTPUT_BYTES_MAX` bytes of the answer.
async fn exchange(tools: &Tools, request: Request<'_>) -> Result<(StatusCode, Option<String>, String), String> {
    let Request { uri, method, headers, body, tls } = request;
    let authority = uri.authority().ok_or("no host in the URL")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let is_tls = uri.scheme_str() == Some("https");
    let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let stream = tools.open(host, port, is_tls.then_some(tls), Some("http/1.1")).await;
    let stream = stream.map_err(|error| format!("cannot connect: {error}"))?;
    let mut builder = hyper::client::conn::http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES_MAX);
    let handshake = builder.handshake::<_, Full<Bytes>>(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|error| error.to_string())?;

    let target = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let mut request = http::Request::builder().method(method).uri(target);
    // The port belongs into Host, a password does not (RFC 9110 §7.2).
    let host_value = authority.as_str().rsplit('@').next().unwrap_or_default();
    request = request.header(USER_AGENT, concat!("weft/", env!("CARGO_PKG_VERSION")));
    if !headers.contains_key(HOST) {
        request = request.header(HOST, host_value);
    }
    let mut request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
    for (name, value) in headers {
        request.headers_mut().append(name.clone(), value.clone());
    }
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut incoming = response.into_body();
        let mut text = Vec::new();
        while text.len() < OUTPUT_BYTES_MAX {
            // A body that breaks off does not undo the status.
            let Some(Ok(frame)) = incoming.frame().await else { break };
            if let Ok(data) = frame.into_data() {
                text.extend_from_slice(data.get(..OUTPUT_BYTES_MAX.min(data.len())).unwrap_or_default());
            }
        }
        text.truncate(OUTPUT_BYTES_MAX);
        Ok((status, location, String::from_utf8_lossy(&text).into_owned()))
    };
    // The connection has to be driven beside the exchange; it may end first, with all of the answer already read.
    match select(std::pin::pin!(answer), std::pin::pin!(connection)).await {
        Either::Left((answer, _connection)) => answer,
        Either::Right((_ended, answer)) => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_resolved_against_the_url_that_was_asked() {
        #[track_caller]
        fn check(location: &str, want: Option<&str>) {
            let base: Uri = "http://h:81/a/b?x=1".parse().unwrap();
            assert_eq!(resolve(&base, location).map(|uri| uri.to_string()).as_deref(), want, "{location}");
        }
        check("/c", Some("http://h:81/c"));
        check("c#top", Some("http://h:81/a/c"));
        check("?y", Some("http://h:81/a/b?y"));
        check("//other/c", Some("http://other/c"));
        check("http://other/", Some("http://other/"));
        check("https://other/", Some("https://other/"));
        check("ftp://other/", None);
        check("ftp:x", None);
    }
}

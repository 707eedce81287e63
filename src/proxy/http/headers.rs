//! Which headers cross the mesh (RFC 9110 §7.6.1), who is called (RFC 9112 §3.2), for whom, and how far a request went.

use std::cell::RefCell;
use std::net::IpAddr;

use base64::Engine as _;
use foldhash::HashSet;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, InvalidUri};
use http::{Method, Request, Response, StatusCode, Version};

use super::answer::{Reason, Refusal};
use super::metrics::Flag;
use crate::proxy::head::{HeadWriter, ResponseHead};

/// The identity of the caller, given to the app (Envoy's name and shape).
pub(crate) const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// How many outbound proxies a request has passed. Apps that forward headers forward it; that shows loops.
pub(crate) const HOPS: HeaderName = HeaderName::from_static("x-weft-hops");
/// Makes a request findable in logs.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How proxies say for whom they ask: by this one's kin, `Forwarded` (RFC 7239) and `X-Real-IP`.
const FORWARDED_PREFIX: &str = "x-forwarded-";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
/// Prefix of headers between neighbours (RFC 9110 §11.7, and `Proxy-Connection`).
const PROXY_PREFIX: &str = "proxy-";
/// Prefix of weft's own headers.
const WEFT_PREFIX: &str = "x-weft-";
/// Longest chain of services: far above real call depths, and a loop reaches it within milliseconds.
const HOPS_MAX: u8 = 32;
/// Most headers of a request: hyper refuses more on HTTP/1.1 by itself.
const HEADERS_MAX: usize = 100;

/// Writes the headers that cross the mesh.
///
/// Left out: hop-by-hop headers and those that `Connection` names, but for those that say for whom a request is; `host`, weft's
/// own and the client identity; and `content-length` beside `transfer-encoding`, which overrides it (RFC 9112 §6.3).
pub(crate) fn write(headers: &HeaderMap, writer: &mut HeadWriter<'_>) {
    let nominated = Nominated::of(headers);
    let is_chunked = headers.contains_key(header::TRANSFER_ENCODING);
    for (name, value) in headers {
        if name == header::TE || (is_chunked && name == header::CONTENT_LENGTH) {
            continue;
        }
        if is_dropped(name) || nominated.as_ref().is_some_and(|nominated| nominated.holds(name)) {
            continue;
        }
        writer.header(name, value.as_bytes());
    }
    if has_token(headers, &header::TE, "trailers") {
        writer.header(&header::TE, b"trailers");
    }
}

/// Tells whether a name is one that weft alone says, with `_` for `-`: apps behind CGI's conventions (WSGI, PHP) read both
/// as one.
fn is_disguised(name: &HeaderName) -> bool {
    let text = name.as_str();
    text.contains('_') && {
        let plain = text.replace('_', "-");
        CLIENT_CERT == plain.as_str() || plain.starts_with(WEFT_PREFIX)
    }
}

/// Takes out what says who calls, however it is written: peers' words do not count.
pub(crate) fn forget_identity(headers: &mut HeaderMap) {
    headers.remove(CLIENT_CERT);
    let disguised: Vec<HeaderName> = headers.keys().filter(|name| is_disguised(name)).cloned().collect();
    for name in disguised {
        headers.remove(name);
    }
}

fn is_dropped(name: &HeaderName) -> bool {
    let text = name.as_str();
    if text.starts_with(WEFT_PREFIX) || text.starts_with(PROXY_PREFIX) || is_disguised(name) {
        return true;
    }
    match text.len() {
        4 => text == "host",
        7 => text == "upgrade",
        10 => text == "connection" || text == "keep-alive",
        17 => text == "transfer-encoding",
        23 => *name == CLIENT_CERT,
        _ => false,
    }
}

/// Tells whether a name is not for `Connection` to take away: a caller could have the app not hear from where it calls, and by
/// what the request is found in logs.
fn goes_to_the_end(token: &[u8]) -> bool {
    let begins =
        |prefix: &str| token.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()));
    let is_it = |name: &HeaderName| name.as_str().as_bytes().eq_ignore_ascii_case(token);
    begins(FORWARDED_PREFIX) || [header::FORWARDED, REAL_IP, REQUEST_ID].iter().any(is_it)
}

/// The headers of a message that its `Connection` lists, beyond its own options and what goes to the end. They are no more
/// than the message has, however many names are listed.
struct Nominated(HashSet<HeaderName>);

impl Nominated {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut names = HashSet::default();
        for value in headers.get_all(header::CONNECTION) {
            for token in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                let known = [&b"keep-alive"[..], b"close", b"upgrade", b"te", b"content-length"];
                if !token.is_empty()
                    && !known.iter().any(|known| known.eq_ignore_ascii_case(token))
                    && !goes_to_the_end(token)
                    && let Ok(name) = HeaderName::from_bytes(token)
                    && headers.contains_key(&name)
                {
                    names.insert(name);
                }
            }
        }
        if names.is_empty() { None } else { Some(Self(names)) }
    }

    fn holds(&self, name: &HeaderName) -> bool {
        self.0.contains(name)
    }
}

/// Tells whether a comma-separated header holds `token`.
pub(crate) fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers.get_all(name).iter().any(|value| {
        let tokens = value.as_bytes().split(|byte| *byte == b',');
        tokens.map(<[u8]>::trim_ascii).any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
    })
}

/// Returns the protocol that a request asks to change to. Cleartext HTTP/2 is not among them: it is spoken at once.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<&HeaderValue> {
    let upgrade = headers.get(header::UPGRADE)?;
    let asks = has_token(headers, &header::CONNECTION, "upgrade") && !has_token(headers, &header::UPGRADE, "h2c");
    asks.then_some(upgrade)
}

/// Tells whether what follows a request without a body may be something else than HTTP. As the gate sees it: so a request
/// that it did not read on after is the last of its connection, or leaves HTTP.
pub(crate) fn leaves_http<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let asks = headers.contains_key(header::UPGRADE) && !has_token(headers, &header::UPGRADE, "h2c");
    request.version() < Version::HTTP_2 && (asks || request.method() == Method::CONNECT)
}

/// Makes the upgrade of an extended CONNECT for a WebSocket (RFC 8441 §5), as an app over HTTP/1.1 understands it.
pub(crate) fn websocket_of_h2<B>(request: &mut Request<B>) {
    let protocol = request.extensions().get::<hyper::ext::Protocol>();
    if request.method() != Method::CONNECT || protocol.is_none_or(|name| name.as_str() != "websocket") {
        return;
    }
    *request.method_mut() = Method::GET;
    // RFC 6455 §4.1: 16 random bytes. What the app makes of them ends here: HTTP/2 needs no proof that it understood.
    let key = base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 16]>());
    let headers = request.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(key) = HeaderValue::try_from(key) {
        headers.insert(header::SEC_WEBSOCKET_KEY, key);
    }
}

/// Makes the answer of a switch to another protocol for a caller over `version`.
pub(crate) fn switched<B>(response: &mut Response<B>, version: Version) {
    let headers = response.headers_mut();
    if version < Version::HTTP_2 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    } else {
        headers.remove(header::UPGRADE);
        headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        *response.status_mut() = StatusCode::OK;
    }
}

/// Joins the cookies of a request over HTTP/2, which may come in pieces (RFC 9113 §8.2.3): routes, keys and apps over HTTP/1.1
/// know one header of them.
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let mut pieces = headers.get_all(header::COOKIE).iter();
    let (Some(first), Some(second)) = (pieces.next(), pieces.next()) else { return };
    let mut joined = first.as_bytes().to_vec();
    for piece in std::iter::once(second).chain(pieces) {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(piece.as_bytes());
    }
    if let Ok(joined) = HeaderValue::try_from(joined) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Tells whether a caller's body waits for a word of the app's (RFC 9110 §10.1.1). Over HTTP/2 the caller alone decides:
/// nothing tells it that the app asks, so what it sends is passed on.
pub(crate) fn awaits_continue(parts: &Parts) -> bool {
    parts.version == Version::HTTP_11 && expects_continue(&parts.headers)
}

/// Tells whether a head says that its body may wait.
pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Tells whether another answer follows (RFC 9110 §15.2).
pub(crate) fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}

/// Writes an interim answer as HTTP/1.1 has it.
pub(crate) fn interim_text(head: &ResponseHead) -> Vec<u8> {
    let reason = head.status.canonical_reason().unwrap_or("Interim");
    let mut text = format!("HTTP/1.1 {} {reason}\r\n", head.status.as_u16()).into_bytes();
    for (name, value) in &head.headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            text.extend_from_slice(part);
        }
    }
    text.extend_from_slice(b"\r\n");
    text
}

/// Writes trailers. Left out: what frames or routes a message or says who calls, which apps that join trailers and headers
/// would believe (RFC 9110 §6.5.1).
pub(crate) fn write_trailers(trailers: &HeaderMap, writer: &mut HeadWriter<'_>) {
    for (name, value) in trailers {
        if !is_dropped(name) && *name != header::CONTENT_LENGTH && *name != header::TE {
            writer.header(name, value.as_bytes());
        }
    }
}

/// Tells whether a message is gRPC's: `application/grpc`, alone, with a `+` and how messages are encoded, or with parameters
/// (gRPC over HTTP/2, "Requests"). Not gRPC-Web's (`application/grpc-web`, `…-web-text`), whose status is in its body.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let split = headers.get(header::CONTENT_TYPE).and_then(|value| value.as_bytes().split_at_checked(GRPC.len()));
    split.is_some_and(|(media, rest)| {
        media.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';' | b' ' | b'\t'))
    })
}

/// Checks a caller's request and returns its authority, as it came. `known` is the Host of its connection's last request.
pub(crate) fn check<B>(request: &Request<B>, known: &RefCell<Option<Authority>>) -> Result<Option<Authority>, Refusal> {
    let bad = |text| Refusal { status: StatusCode::BAD_REQUEST, flag: Flag::Refused, reason: Reason::BadRequest, text };
    if request.headers().len() > HEADERS_MAX {
        return Err(Refusal {
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            flag: Flag::Refused,
            reason: Reason::HeadTooLarge,
            text: format!("the request has more than {HEADERS_MAX} headers"),
        });
    }
    if request.method() == Method::CONNECT {
        return Err(Refusal {
            status: StatusCode::NOT_IMPLEMENTED,
            flag: Flag::Refused,
            reason: Reason::BadRequest,
            text:
                "CONNECT is not offered: weft leads to services of the mesh; over HTTP/2 it takes `:protocol` websocket"
                    .to_owned(),
        });
    }
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(bad("the request has more than one Host".to_owned()));
    }
    let uri = request.uri().authority();
    let host = match host {
        Some(host) => Some(host_of(host, known).map_err(|_| bad("the request's Host is malformed".to_owned()))?),
        None => None,
    };
    let authority = match (uri, host) {
        (Some(uri), Some(host)) if *uri != host => {
            return Err(bad(format!("the request names two authorities: `{uri}` and Host `{host}`")));
        }
        (Some(uri), _) => Some(uri.clone()),
        (None, host) => host,
    };
    match authority {
        Some(authority) if authority.as_str().contains('@') => {
            Err(bad("the request's authority holds user information".to_owned()))
        }
        None if request.version() > Version::HTTP_10 => Err(bad("the request has no Host".to_owned())),
        authority => Ok(authority),
    }
}

/// Longest Host that a connection remembers: names have at most 253 bytes, and a port.
const KNOWN_HOST_BYTES_MAX: usize = 260;

/// Parses a Host that is not `known` already: a connection's requests name the same at most times.
fn host_of(value: &HeaderValue, known: &RefCell<Option<Authority>>) -> Result<Authority, InvalidUri> {
    let same = known.borrow().as_ref().filter(|known| known.as_str().as_bytes() == value.as_bytes()).cloned();
    if let Some(same) = same {
        return Ok(same);
    }
    let host = Authority::try_from(value.as_bytes())?;
    if value.len() <= KNOWN_HOST_BYTES_MAX {
        known.replace(Some(host.clone()));
    }
    Ok(host)
}

/// Takes out what a caller that is no trusted hop says of those before it, and says where it is itself.
pub(crate) fn forget_forwarded(headers: &mut HeaderMap, from: Option<IpAddr>) {
    let is_said = |name: &&HeaderName| {
        let plain = name.as_str().replace('_', "-");
        plain.starts_with(FORWARDED_PREFIX) || header::FORWARDED == plain.as_str() || REAL_IP == plain.as_str()
    };
    let said: Vec<HeaderName> = headers.keys().filter(is_said).cloned().collect();
    for name in said {
        headers.remove(name);
    }
    if let Some(from) = from.and_then(|from| HeaderValue::try_from(from.to_canonical().to_string()).ok()) {
        headers.insert(FORWARDED_FOR, from);
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
}

/// Returns the number of hops to send, one more than came.
pub(crate) fn next_hop(headers: &HeaderMap) -> Result<u8, Refusal> {
    let came = match headers.get(HOPS) {
        None => 0,
        Some(value) => value.to_str().ok().and_then(|text| text.parse::<u8>().ok()).unwrap_or(u8::MAX),
    };
    if came < HOPS_MAX {
        return Ok(came.saturating_add(1));
    }
    Err(Refusal {
        status: StatusCode::LOOP_DETECTED,
        flag: Flag::Refused,
        reason: Reason::Loop,
        text: format!("the request passed {came} proxies of the mesh: a service calls itself (`{HOPS}`)"),
    })
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::proxy::head::{Inbox, Payload};

    fn crossing(headers: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        let mut out = BytesMut::new();
        let mut writer = HeadWriter::response(&mut out, Payload::Empty, StatusCode::OK);
        write(&map, &mut writer);
        writer.finish().unwrap();
        let mut inbox = Inbox::default();
        inbox.push(out.freeze());
        inbox.take_response().unwrap().unwrap().headers
    }

    #[test]
    fn hop_by_hop_headers_and_those_that_connection_names_stay_behind() {
        let headers = crossing(&[
            ("connection", "keep-alive, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic x"),
            ("proxy-connection", "close"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("upgrade", "h2c"),
            ("host", "web"),
            ("x-forwarded-client-cert", "URI=spiffe://td/node/forged"),
            ("x-weft-hops", "9"),
            ("x-weft-anything", "1"),
            ("x_forwarded-client_cert", "URI=spiffe://td/node/forged"),
            ("x_weft_hops", "9"),
            ("traceparent", "00-1-2-01"),
            ("accept", "a"),
            ("accept", "b"),
        ]);
        assert_eq!(headers.len(), 4, "{headers:?}");
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers["traceparent"], "00-1-2-01");
        assert_eq!(headers.get_all("accept").iter().count(), 2);
    }

    #[test]
    fn names_with_weft_s_prefix_or_a_proxy_s_stay_behind_whatever_their_length() {
        for prefix in [WEFT_PREFIX, PROXY_PREFIX] {
            for length in prefix.len() + 1..40 {
                let name = format!("{prefix}{}", "a".repeat(length - prefix.len()));
                assert!(crossing(&[(name.as_str(), "1")]).is_empty(), "{name}");
            }
        }
    }

    #[test]
    fn connection_takes_away_what_it_names_however_many_names_come_before() {
        let mut listed: Vec<String> = (0..3_000).map(|at| format!("x-{at}")).collect();
        listed.push("x-secret".to_owned());
        let listed = listed.join(",");
        let headers = crossing(&[("connection", listed.as_str()), ("x-secret", "1"), ("x-2999", "1"), ("x-3000", "1")]);
        let names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-3000"]);
    }

    #[test]
    fn connection_takes_nothing_away_that_says_for_whom_a_request_is() {
        let kept = ["x-forwarded-for", "x-forwarded-proto", "forwarded", "x-real-ip", "x-request-id"];
        let mut sent: Vec<(&str, &str)> = kept.iter().map(|name| (*name, "1")).collect();
        sent.push(("connection", "close, X-Forwarded-For, x-forwarded-proto, Forwarded"));
        sent.push(("connection", "X-Real-IP,X-REQUEST-ID, x-hop"));
        sent.push(("x-hop", "1"));
        let headers = crossing(&sent);
        let names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, kept);
    }

    #[test]
    fn headers_that_join_traces_pass_as_they_came() {
        let trace = [
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("tracestate", "congo=t61rcWkgMzE"),
            ("tracestate", "rojo=00f067aa0ba902b7"),
            ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1"),
            ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
            ("x-b3-spanid", "e457b5a2e4d86bd1"),
            ("x-b3-parentspanid", "05e3ac9a4f6e3b90"),
            ("x-b3-sampled", "1"),
            ("x-b3-flags", "1"),
            ("x-request-id", "4fd1"),
        ];
        let came = crossing(&trace);
        // Lists go on in their order (W3C Trace Context §3.3.1.4).
        let came: Vec<(&str, &str)> =
            came.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(came, trace);
    }

    #[test]
    fn what_a_stranger_says_of_those_before_it_is_forgotten_and_where_it_is_is_said() {
        let forged = ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"];
        let forged = forged.map(|name| (HeaderName::from_static(name), HeaderValue::from_static("10.0.0.1")));
        let mut headers = HeaderMap::from_iter(forged);
        headers.append(FORWARDED_FOR, HeaderValue::from_static("10.0.0.2"));
        headers.append("x_forwarded_for", HeaderValue::from_static("10.0.0.3"));
        headers.append("x_real_ip", HeaderValue::from_static("10.0.0.3"));
        headers.insert(header::ACCEPT, HeaderValue::from_static("a"));
        forget_forwarded(&mut headers, "::ffff:192.0.2.7".parse().ok());
        let mut left: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("accept", "a"), ("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "http")]);
        forget_forwarded(&mut headers, None);
        assert_eq!(headers.len(), 1, "{headers:?}");
    }

    #[track_caller]
    fn check_authority(uri: &str, hosts: &[&str], expected: Option<&str>) {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header("host", *host);
        }
        let found = check(&request.body(()).unwrap(), &RefCell::default()).ok().flatten();
        assert_eq!(found.as_ref().map(Authority::as_str), expected, "{uri} {hosts:?}");
    }

    #[test]
    fn one_authority_is_needed_and_two_must_agree() {
        check_authority("/", &["web:80"], Some("web:80"));
        check_authority("http://web/", &["WEB"], Some("web"));
        check_authority("http://web/", &[], Some("web"));
        check_authority("http://web/", &["api"], None);
        check_authority("/", &["web", "web"], None);
        check_authority("/", &[], None);
        check_authority("/", &["a b"], None);
        check_authority("/", &["u@web"], None);
    }

    #[test]
    fn grpc_is_told_by_its_media_type_and_grpc_web_is_another() {
        let is_it = |value: &'static str| {
            is_grpc(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(value))]))
        };
        for grpc in
            ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "Application/GRPC ; a=b"]
        {
            assert!(is_it(grpc), "{grpc}");
        }
        for other in [
            "application/grpc-web",
            "application/grpc-web+proto",
            "application/grpc-web-text",
            "application/grpcx",
            "application/grp",
            "text/plain; a=application/grpc",
            "",
        ] {
            assert!(!is_it(other), "{other}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn a_request_that_went_round_too_often_is_refused() {
        let mut headers = HeaderMap::new();
        assert_eq!(next_hop(&headers).ok(), Some(1));
        headers.insert(HOPS, HeaderValue::from_static("31"));
        assert_eq!(next_hop(&headers).ok(), Some(32));
        for bad in ["32", "255", "-1", "x"] {
            headers.insert(HOPS, HeaderValue::from_static(bad));
            assert_eq!(next_hop(&headers).err().map(|refusal| refusal.status), Some(StatusCode::LOOP_DETECTED));
        }
    }
}

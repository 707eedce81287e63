//! Spans as OTLP has them, by the semantic conventions for HTTP (stable) and for RPC.

use bytes::Bytes;
use http::{Method, Version};

use super::message::{
    HAS_IS_REMOTE, IS_REMOTE, KIND_CLIENT, KIND_SERVER, Origin, ResourceSpans, SCHEMA_URL, STATUS_ERROR, ScopeSpans,
    SpanMessage, Status, TracesRequest, number, text,
};
use crate::trace::{Asked, Side, Span};

/// Methods with a name of their own (RFC 9110, RFC 5789); others are `_OTHER`.
const METHODS: [Method; 9] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::CONNECT,
    Method::OPTIONS,
    Method::TRACE,
    Method::PATCH,
];
/// Longest method of a caller's own that is shown, in bytes.
const METHOD_BYTES_MAX: usize = 32;
/// Statuses of gRPC that are the server's fault (semantic conventions for gRPC): UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED,
/// INTERNAL, UNAVAILABLE, DATA_LOSS.
const GRPC_SERVER_ERRORS: [u8; 6] = [2, 4, 12, 13, 14, 15];

/// Puts spans into one request.
pub(super) fn request(origin: &Origin, spans: &[Span]) -> TracesRequest {
    let spans = spans.iter().map(message).collect();
    TracesRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(origin.resource.clone()),
            scope_spans: vec![ScopeSpans { scope: Some(origin.scope.clone()), spans }],
            schema_url: SCHEMA_URL.to_owned(),
        }],
    }
}

fn message(span: &Span) -> SpanMessage {
    let Span { context, parent, state, side, began_ns, asked, ended } = span;
    let took_ns = u64::try_from(ended.took.as_nanos()).unwrap_or(u64::MAX);
    let error = error(*side, (ended.status, ended.grpc, ended.flag));
    let status = error.as_ref().map(|_| Status { code: STATUS_ERROR });
    let remote = if parent.is_some() { HAS_IS_REMOTE | IS_REMOTE } else { HAS_IS_REMOTE };
    let mut attributes = asked_attributes(asked);
    if ended.status != 0 {
        attributes.push(number("http.response.status_code", ended.status));
    }
    attributes.extend(ended.grpc.map(|code| number("rpc.grpc.status_code", code)));
    attributes.extend(error.map(|error| text("error.type", error)));
    let source = ended.source.as_ref().map_or("_node", |name| name.as_str());
    let destination = ended.destination.as_ref().map_or("_unknown", |name| name.as_str());
    attributes.extend([
        text("weft.source_service", source),
        text("weft.destination_service", destination),
        text("weft.response_flags", ended.flag),
    ]);
    SpanMessage {
        trace_id: Bytes::copy_from_slice(&context.trace_id),
        span_id: Bytes::copy_from_slice(&context.span_id),
        trace_state: state.as_deref().unwrap_or_default().to_owned(),
        parent_span_id: parent.map(|parent| Bytes::copy_from_slice(&parent)).unwrap_or_default(),
        name: name(asked, destination),
        kind: match side {
            Side::Source => KIND_CLIENT,
            Side::Destination => KIND_SERVER,
        },
        start_time_unix_nano: *began_ns,
        end_time_unix_nano: began_ns.saturating_add(took_ns),
        attributes,
        status,
        flags: u32::from(context.flags) | remote,
    }
}

fn asked_attributes(asked: &Asked) -> Vec<super::message::KeyValue> {
    let Asked { method, path, host, version, is_grpc } = asked;
    let mut attributes = Vec::with_capacity(14);
    attributes.push(text("http.request.method", method_name(method)));
    if !METHODS.contains(method) {
        let own = method.as_str();
        let own = own.get(..METHOD_BYTES_MAX).unwrap_or(own);
        attributes.push(text("http.request.method_original", own));
    }
    attributes.extend([text("url.scheme", "http"), text("url.path", &**path)]);
    if let Some((host, port)) = host {
        attributes.push(text("server.address", &**host));
        attributes.extend(port.map(|port| number("server.port", port)));
    }
    let version = match *version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    attributes.push(text("network.protocol.version", version));
    if *is_grpc {
        attributes.push(text("rpc.system", "grpc"));
        if let Some((service, method)) = rpc(path) {
            attributes.extend([text("rpc.service", service), text("rpc.method", method)]);
        }
    }
    attributes
}

fn method_name(method: &Method) -> &str {
    if METHODS.contains(method) { method.as_str() } else { "_OTHER" }
}

/// Returns what a path of gRPC's calls: `/package.Service/Method`.
fn rpc(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix('/')?.rsplit_once('/').filter(|(service, method)| !service.is_empty() && !method.is_empty())
}

/// The name is of few values: paths are not in it, but for those of gRPC, which name methods.
fn name(asked: &Asked, destination: &str) -> String {
    match rpc(&asked.path).filter(|_| asked.is_grpc) {
        Some((service, method)) => format!("{service}/{method}"),
        // `_OTHER` is `HTTP` in names (semantic conventions for HTTP spans, "Name").
        None if !METHODS.contains(&asked.method) => format!("HTTP {destination}"),
        None => format!("{} {destination}", asked.method),
    }
}

/// `error.type` of a request that failed: a caller's span fails by 4xx too, for it is the caller's.
pub(super) fn error(side: Side, (status, grpc, flag): (u16, Option<u8>, &str)) -> Option<String> {
    if status == 0 {
        return Some(flag.to_owned());
    }
    let worst = match side {
        Side::Source => 400,
        Side::Destination => 500,
    };
    if status >= worst {
        return Some(status.to_string());
    }
    let is_failed = |code: &u8| match side {
        Side::Source => *code != 0,
        Side::Destination => GRPC_SERVER_ERRORS.contains(code),
    };
    if let Some(code) = grpc.filter(is_failed) {
        return Some(code.to_string());
    }
    // A head came, and then the answer broke.
    matches!(flag, "UR" | "UT" | "DC").then(|| flag.to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::otlp::message::{AnyValue, KeyValue, Resource, Scope, Value};
    use crate::trace::{Ended, SpanContext};

    pub(in crate::otlp) fn origin() -> Origin {
        Origin {
            resource: Resource { attributes: vec![text("service.name", "weft")] },
            scope: Scope { name: "weft".to_owned(), version: "0".to_owned() },
        }
    }

    pub(in crate::otlp) fn span(number: u8) -> Span {
        Span {
            context: SpanContext { trace_id: [1; 16], span_id: [number; 8], flags: 3 },
            parent: Some([9; 8]),
            state: Some("a=1".into()),
            side: Side::Source,
            began_ns: 1_000,
            asked: Asked {
                method: Method::GET,
                path: "/a".into(),
                host: Some(("web.weft".into(), Some(8480))),
                version: Version::HTTP_11,
                is_grpc: false,
            },
            ended: Ended {
                source: None,
                destination: Some("web".parse().unwrap()),
                status: 200,
                grpc: None,
                flag: "-",
                took: Duration::from_micros(2),
            },
        }
    }

    fn shown(message: &SpanMessage) -> Vec<(String, String)> {
        let value = |value: &Option<AnyValue>| match value.as_ref().and_then(|any| any.value.clone()) {
            Some(Value::Text(text)) => text,
            Some(Value::Number(number)) => number.to_string(),
            None => String::new(),
        };
        message.attributes.iter().map(|KeyValue { key, value: of }| (key.clone(), value(of))).collect()
    }

    #[track_caller]
    fn check(message: &SpanMessage, want: &[(&str, &str)]) {
        let shown = shown(message);
        for (key, value) in want {
            assert!(shown.contains(&((*key).to_owned(), (*value).to_owned())), "{key}={value} is not in {shown:?}");
        }
    }

    #[test]
    fn a_request_is_shown_by_the_names_of_the_conventions() {
        let made = message(&span(7));
        assert_eq!((made.name.as_str(), made.kind, &made.status), ("GET web", KIND_CLIENT, &None));
        assert_eq!((made.start_time_unix_nano, made.end_time_unix_nano), (1_000, 3_000));
        assert_eq!((&made.span_id[..], &made.parent_span_id[..]), (&[7; 8][..], &[9; 8][..]));
        assert_eq!((made.trace_state.as_str(), made.flags), ("a=1", 0x303));
        check(
            &made,
            &[
                ("http.request.method", "GET"),
                ("url.path", "/a"),
                ("server.address", "web.weft"),
                ("server.port", "8480"),
                ("network.protocol.version", "1.1"),
                ("http.response.status_code", "200"),
                ("weft.source_service", "_node"),
                ("weft.destination_service", "web"),
                ("weft.response_flags", "-"),
            ],
        );
        assert!(shown(&made).iter().all(|(key, _)| key != "error.type" && key != "rpc.system"), "{made:?}");
        let mut other = span(1);
        (other.asked.method, other.parent) = (Method::from_bytes(b"PROPFIND").unwrap(), None);
        let made = message(&other);
        assert_eq!((made.name.as_str(), made.flags, made.parent_span_id.len()), ("HTTP web", 0x103, 0));
        check(&made, &[("http.request.method", "_OTHER"), ("http.request.method_original", "PROPFIND")]);
    }

    #[test]
    fn what_failed_says_by_what_and_whose_fault_it_is_depends_on_the_side() {
        #[track_caller]
        fn failed(side: Side, status: u16, grpc: Option<u8>, flag: &'static str, want: Option<&str>) {
            let mut span = span(1);
            span.side = side;
            span.ended = Ended { status, grpc, flag, ..span.ended };
            let made = message(&span);
            let error = shown(&made).into_iter().find(|(key, _)| key == "error.type").map(|(_, value)| value);
            assert_eq!(error.as_deref(), want, "{side:?} {status} {grpc:?} {flag}");
            assert_eq!(made.status.map(|status| status.code), want.map(|_| STATUS_ERROR));
        }
        for side in [Side::Source, Side::Destination] {
            failed(side, 302, None, "-", None);
            failed(side, 503, None, "UH", Some("503"));
            failed(side, 0, None, "DC", Some("DC"));
            failed(side, 200, None, "UR", Some("UR"));
            failed(side, 200, Some(0), "-", None);
            failed(side, 200, Some(14), "-", Some("14"));
        }
        failed(Side::Source, 404, None, "-", Some("404"));
        failed(Side::Destination, 404, None, "-", None);
        failed(Side::Source, 200, Some(5), "-", Some("5"));
        failed(Side::Destination, 200, Some(5), "-", None);
    }

    #[test]
    fn a_call_of_grpc_has_its_method_s_name() {
        let mut span = span(1);
        (span.side, span.asked.is_grpc, span.asked.path) = (Side::Destination, true, "/a.b.Greeter/Say".into());
        span.ended.grpc = Some(0);
        let made = message(&span);
        assert_eq!((made.name.as_str(), made.kind), ("a.b.Greeter/Say", KIND_SERVER));
        check(
            &made,
            &[
                ("rpc.system", "grpc"),
                ("rpc.service", "a.b.Greeter"),
                ("rpc.method", "Say"),
                ("rpc.grpc.status_code", "0"),
            ],
        );
        span.asked.path = "/nothing".into();
        assert_eq!(message(&span).name, "GET web");
    }
}

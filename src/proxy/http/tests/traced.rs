//! Spans of requests that pass, and what the headers of traces say to the app.

use prometheus::IntCounter;
use serde_json::json;

use super::routed::{OK, UNAVAILABLE, counts, route, say, scripted};
use super::*;
use crate::trace::{Share, Side, Span};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

/// A worker that records `share` of the undecided requests; without a share it exports nothing.
fn worker(share: Option<u16>) -> (Rc<Loopback>, mpsc::Receiver<Span>) {
    let mut worker = Loopback::new(Limits::default());
    let (queue, spans) = mpsc::channel(16);
    let counter = || IntCounter::new("spans", "Spans.").unwrap();
    let share = share.map(|parts| Share::of_parts(parts).unwrap());
    Rc::get_mut(&mut worker).unwrap().http.tracer =
        share.map(|share| Tracer::new(share, queue, (counter(), counter())));
    (worker, spans)
}

async fn traced(share: Option<u16>, protocol: Protocol) -> (Setup, mpsc::Receiver<Span>) {
    let (worker, spans) = worker(share);
    let (addr, messages) = app(protocol).await;
    worker.add(addr, protocol).await;
    let port = worker.listen(false).await;
    (Setup { worker, port, messages }, spans)
}

/// Sends a request with `headers`; returns those of traces that the app saw, one a line.
async fn seen_by_app(setup: &Setup, headers: &[(&'static str, String)]) -> Vec<String> {
    let mut client = client(setup.port).await;
    let mut request = get("/path?secret=1");
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    let response = client.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let is_of_trace = |line: &&str| ["trace", "b3", "x-b3"].iter().any(|start| line.starts_with(start));
    body_text(response).await.lines().filter(is_of_trace).map(str::to_owned).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

fn came(flags: &str) -> (&'static str, String) {
    ("traceparent", format!("00-{TRACE}-{SPAN}-{flags}"))
}

/// The spans of both sides, the source's first.
async fn both(spans: &mut mpsc::Receiver<Span>) -> [Span; 2] {
    let mut both = [spans.recv().await.unwrap(), spans.recv().await.unwrap()];
    both.sort_by_key(|span| span.side == Side::Destination);
    assert_eq!(both.each_ref().map(|span| span.side), [Side::Source, Side::Destination]);
    both
}

#[test]
fn each_side_makes_a_span_below_the_one_that_came_and_the_app_is_below_the_last() {
    run(async {
        for protocol in [Protocol::Http, Protocol::Http2] {
            let (setup, mut spans) = traced(Some(0), protocol).await;
            let seen = seen_by_app(&setup, &[came("01"), ("tracestate", "a=1".to_owned())]).await;
            let [source, destination] = both(&mut spans).await;
            for span in [&source, &destination] {
                assert_eq!(hex(&span.context.trace_id), TRACE);
                assert_eq!((&*span.asked.path, span.ended.status, span.ended.flag), ("/path", 200, "-"));
                assert_eq!(span.ended.source, Some("api".parse().unwrap()));
                assert_eq!(span.ended.destination, Some("web".parse().unwrap()));
                assert_eq!(span.state.as_deref(), Some("a=1"));
            }
            assert_eq!(source.parent.map(|parent| hex(&parent)).as_deref(), Some(SPAN));
            assert_eq!(destination.parent, Some(source.context.span_id));
            let own = hex(&destination.context.span_id);
            assert_eq!(seen, [format!("traceparent=00-{TRACE}-{own}-01"), "tracestate=a=1".to_owned()]);
        }
    });
}

#[test]
fn what_is_not_recorded_passes_as_it_came() {
    run(async {
        let b3 = ("b3", format!("{TRACE}-{SPAN}-0"));
        let state = ("tracestate", "a=1".to_owned());
        for (share, headers) in [
            (None, vec![came("01"), state.clone()]),
            (None, vec![]),
            (Some(Share::ALL), vec![came("00"), state.clone()]),
            (Some(Share::ALL), vec![b3]),
            (Some(0), vec![]),
            (Some(0), vec![("traceparent", "broken".to_owned()), state]),
        ] {
            let (setup, mut spans) = traced(share, Protocol::Http).await;
            let seen = seen_by_app(&setup, &headers).await;
            let want: Vec<String> = headers.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let mut sorted = want.clone();
            sorted.sort();
            assert_eq!(seen, sorted, "{share:?}");
            assert!(spans.try_recv().is_err());
        }
    });
}

#[test]
fn a_request_of_no_trace_begins_one_by_its_share_and_the_app_sees_it() {
    run(async {
        let (setup, mut spans) = traced(Some(Share::ALL), Protocol::Http).await;
        let seen = seen_by_app(&setup, &[]).await;
        let [source, destination] = both(&mut spans).await;
        assert_eq!((source.parent, destination.parent), (None, Some(source.context.span_id)));
        let (trace, own) = (hex(&source.context.trace_id), hex(&destination.context.span_id));
        assert_eq!(seen, [format!("traceparent=00-{trace}-{own}-03")]);
    });
}

#[test]
fn a_caller_that_speaks_b3_is_answered_in_b3() {
    run(async {
        let (setup, mut spans) = traced(Some(0), Protocol::Http).await;
        let seen = seen_by_app(&setup, &[("b3", format!("{TRACE}-{SPAN}-1"))]).await;
        let [source, destination] = both(&mut spans).await;
        let [above, own] = [source, destination].map(|span| hex(&span.context.span_id));
        assert_eq!(seen, [format!("b3={TRACE}-{own}-1-{above}"), format!("traceparent=00-{TRACE}-{own}-01")]);
    });
}

#[test]
fn a_retry_is_in_the_caller_s_span_and_each_attempt_that_arrives_is_one_below_it() {
    run(async {
        let (worker, mut spans) = worker(Some(Share::ALL));
        let (addr, _messages) = scripted(&[UNAVAILABLE, OK]).await;
        worker.add(addr, Protocol::Http).await;
        say(&worker, &[route(&json!({"NumRetries": 2, "RetryOnStatusCodes": [503]}))]);
        let port = worker.listen(false).await;
        let response = client(port).await.send_request(get("/")).await.unwrap();
        assert_eq!((response.status(), body_text(response).await.as_str()), (StatusCode::OK, "ok"));
        counts(&worker, "weft_http_retries_total{destination_service=\"web\",reason=\"status\"}", 1);
        let mut all = [spans.recv().await.unwrap(), spans.recv().await.unwrap(), spans.recv().await.unwrap()];
        all.sort_by_key(|span| (span.side == Side::Destination, span.ended.status));
        let [source, second, first] = all;
        assert_eq!([&source, &first, &second].map(|span| span.ended.status), [200, 503, 200]);
        assert_eq!((first.parent, second.parent), (Some(source.context.span_id), Some(source.context.span_id)));
        assert!(spans.try_recv().is_err());
    });
}

#[test]
fn what_weft_answers_itself_is_a_span_that_says_why() {
    run(async {
        let (worker, mut spans) = worker(Some(0));
        let port = worker.listen(false).await;
        let mut request = get("/");
        let (name, value) = came("01");
        request.headers_mut().insert(name, value.parse().unwrap());
        let response = client(port).await.send_request(request).await.unwrap();
        assert_eq!(response.status(), 503);
        let span = spans.recv().await.unwrap();
        assert_eq!((span.side, span.ended.status, span.ended.flag), (Side::Source, 503, "UH"));
        counts(
            &worker,
            "weft_http_requests_total{connection_security=\"unknown\",destination_service=\"web\",grpc_response_status=\"\",reporter=\"source\",response_code=\"503\",response_flags=\"UH\",source_service=\"api\"}",
            1,
        );
    });
}

#[test]
fn who_is_outside_has_nothing_recorded_and_continues_no_trace_where_spans_are_exported() {
    run(async {
        let sent = [came("01"), ("tracestate", "a=1".to_owned()), ("b3", "1".to_owned())];
        let left = |share: Option<u16>, from: &str| {
            let connection = outbound::Connection::of_caller(worker(share).0, from.parse().unwrap());
            let mut headers = HeaderMap::new();
            for (name, value) in &sent {
                headers.insert(*name, value.parse().unwrap());
            }
            connection.believe(&mut headers);
            sent.iter().filter(|(name, _)| headers.contains_key(*name)).count()
        };
        assert_eq!(left(Some(0), "192.0.2.7"), 0);
        assert_eq!(left(Some(0), "127.0.0.9"), 3);
        assert_eq!(left(None, "192.0.2.7"), 3, "what is not exported is nobody's business");
    });
}

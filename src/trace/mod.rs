//! Spans of the requests that pass: which are recorded, what is known of each, and where it is put for export.
//!
//! ```text
//!   headers -> read -> sampled? -- no: nothing, and the headers pass as they came
//!                         \ yes -> OpenSpan -> inject (the parent of what comes next) -> end -> bounded queue -> otlp
//! ```
//!
//! Each side of a call makes one span per request: the caller's agent a CLIENT span, the app's agent a SERVER span below it.
//! Retries and hedges are in the caller's span; each attempt that reaches an agent is a SERVER span of its own.
//!
//! Invariants: where a request is not recorded nothing is allocated; a worker waits for nobody, and what finds no room is
//! counted and dropped; only the caller's side begins traces, so that no request is drawn for twice.
//! Not here: encoding and sending (`otlp`), whose headers are believed (`proxy::http::outbound`).

mod context;

use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Method, Version};
use prometheus::IntCounter;
use tokio::sync::mpsc;

pub use self::context::SpanContext;
use self::context::{Came, RANDOM, SAMPLED};
use crate::clock;
use crate::model::ServiceName;

/// Spans that wait to be sent, of the whole agent: a second of 2,000 sampled requests, some 2 MiB at most.
pub const QUEUE_MAX: usize = 2_048;
/// Longest path and host of a span, in bytes (Envoy's bound of `max_path_tag_length`).
pub const TEXT_BYTES_MAX: usize = 256;
/// Bits of a trace's id that are random (W3C Trace Context, level 2, §3.2.2.3.2).
const RANDOM_BITS: u32 = 56;

/// How many of the requests that no caller has decided about are recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share(u16);

impl Share {
    /// All of them, in parts per ten thousand.
    pub const ALL: u16 = 10_000;

    /// Takes parts per ten thousand; none beyond [`Share::ALL`].
    pub fn of_parts(parts: u16) -> Option<Self> {
        (parts <= Self::ALL).then_some(Self(parts))
    }

    /// Tells whether a trace with this id is recorded: whoever reads the id by the same share decides alike.
    fn takes(self, trace_id: [u8; 16]) -> bool {
        let random = u128::from_be_bytes(trace_id) & ((1 << RANDOM_BITS) - 1);
        random * u128::from(Self::ALL) < (u128::from(self.0) << RANDOM_BITS)
    }
}

/// Which agent of a call makes a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The caller's.
    Source,
    /// The app's.
    Destination,
}

/// What is known of a request when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its method.
    pub method: Method,
    /// Its path without the query, which holds what is nobody's business; at most [`TEXT_BYTES_MAX`] bytes.
    pub path: Box<str>,
    /// The host that it names, and the port if one is named.
    pub host: Option<(Box<str>, Option<u16>)>,
    /// What the app and its agent speak.
    pub version: Version,
    /// It is a call of gRPC.
    pub is_grpc: bool,
}

impl Asked {
    /// Keeps what a span shows of a request.
    pub(crate) fn of(
        (method, path): (&Method, Option<&PathAndQuery>),
        authority: Option<&Authority>,
        (version, is_grpc): (Version, bool),
    ) -> Self {
        let host = authority.map(|authority| (cut(authority.host()), authority.port_u16()));
        let path = cut(path.map_or("/", PathAndQuery::path));
        Self { method: method.clone(), path, host, version, is_grpc }
    }
}

fn cut(text: &str) -> Box<str> {
    text.get(..text.floor_char_boundary(TEXT_BYTES_MAX)).unwrap_or_default().into()
}

/// What is known of a request when it is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The calling service; none: the node itself.
    pub source: Option<ServiceName>,
    /// The called service; none: there is none of that name.
    pub destination: Option<ServiceName>,
    /// 0: the caller left before there was one.
    pub status: u16,
    /// 0 to 16.
    pub grpc: Option<u8>,
    /// `response_flags` of the metrics.
    pub flag: &'static str,
    /// How long it took.
    pub took: Duration,
}

/// One request at one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its own place.
    pub context: SpanContext,
    /// The span that it is below; none: its trace begins here.
    pub parent: Option<[u8; 8]>,
    /// `tracestate` as it came.
    pub state: Option<Box<str>>,
    /// Who makes it.
    pub side: Side,
    /// When it began, in nanoseconds since the Unix epoch.
    pub began_ns: u64,
    /// How it began.
    pub asked: Asked,
    /// How it ended.
    pub ended: Ended,
}

/// Decides about spans and puts them into the queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    share: Share,
    queue: mpsc::Sender<Span>,
    /// Spans that found no room.
    full: IntCounter,
    /// Spans that ended after the export had.
    late: IntCounter,
}

impl Tracer {
    /// Puts spans into `queue`; counts in `full` what finds no room, and in `late` what nobody takes any more.
    pub fn new(share: Share, queue: mpsc::Sender<Span>, (full, late): (IntCounter, IntCounter)) -> Self {
        Self(Arc::new(Inner { share, queue, full, late }))
    }

    /// Begins the span of a request if it is to be recorded; `asked` is asked then alone.
    pub(crate) fn begin(
        &self,
        side: Side,
        headers: &HeaderMap,
        asked: impl FnOnce() -> Asked,
    ) -> Option<Box<OpenSpan>> {
        let begun = |flags| (SpanContext { trace_id: random(), span_id: random(), flags }, None);
        let below = |parent: SpanContext| {
            (SpanContext { span_id: random(), flags: parent.flags | SAMPLED, ..parent }, Some(parent.span_id))
        };
        let (context, parent) = match (context::read(headers), side) {
            (Came::Sampled(Some(parent)), _) => below(parent),
            (Came::Sampled(None), Side::Source) => begun(SAMPLED | RANDOM),
            (Came::Undecided(parent), Side::Source) if self.0.share.takes(parent.trace_id) => below(parent),
            (Came::Nothing, Side::Source) if self.0.share != Share::default() => {
                let begun = begun(SAMPLED | RANDOM);
                if !self.0.share.takes(begun.0.trace_id) {
                    return None;
                }
                begun
            }
            _ => return None,
        };
        let (state, began_ns) = (context::state(headers), clock::wall_ns());
        Some(Box::new(OpenSpan { tracer: self.clone(), context, parent, state, side, began_ns, asked: asked() }))
    }
}

/// Takes out whatever `headers` tell of a trace: who said it is not believed.
pub(crate) fn forget(headers: &mut HeaderMap) {
    context::forget(headers);
}

/// Ids are never all zero.
fn random<const N: usize>() -> [u8; N] {
    loop {
        let mut bytes = [0; N];
        rand::fill(&mut bytes);
        if bytes != [0; N] {
            return bytes;
        }
    }
}

/// The span of a request under way. Dropped without an end it was never there.
#[derive(Debug)]
pub(crate) struct OpenSpan {
    tracer: Tracer,
    context: SpanContext,
    parent: Option<[u8; 8]>,
    state: Option<Box<str>>,
    side: Side,
    began_ns: u64,
    asked: Asked,
}

impl OpenSpan {
    /// Returns its place: the parent of what comes next.
    pub(crate) fn context(&self) -> SpanContext {
        self.context
    }

    /// Ends it and has it exported.
    pub(crate) fn end(self, ended: Ended) {
        let Self { tracer, context, parent, state, side, began_ns, asked } = self;
        match tracer.0.queue.try_send(Span { context, parent, state, side, began_ns, asked, ended }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => tracer.0.full.inc(),
            Err(mpsc::error::TrySendError::Closed(_)) => tracer.0.late.inc(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    /// A tracer that records `share` of what nobody decided, its queue of `room`, and what counts what finds none.
    fn tracer(share: u16, room: usize) -> (Tracer, mpsc::Receiver<Span>, IntCounter) {
        let counter = |name| IntCounter::new(name, "Spans.").unwrap();
        let ((queue, spans), full) = (mpsc::channel(room), counter("full"));
        let share = Share::of_parts(share).unwrap();
        (Tracer::new(share, queue, (full.clone(), counter("late"))), spans, full)
    }

    fn asked() -> Asked {
        let (path, host) = ("/a?token=b".parse().unwrap(), "web.weft:80".parse().unwrap());
        Asked::of((&Method::GET, Some(&path)), Some(&host), (Version::HTTP_11, false))
    }

    fn ended() -> Ended {
        let took = Duration::from_millis(3);
        Ended { source: None, destination: Some("web".parse().unwrap()), status: 200, grpc: None, flag: "-", took }
    }

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    const SAMPLED_ONE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

    #[test]
    fn the_caller_s_decision_is_obeyed_and_only_the_source_draws_for_the_undecided() {
        #[track_caller]
        fn check(share: u16, side: Side, headers: &HeaderMap, want: bool) {
            let (tracer, _spans, _) = tracer(share, 1);
            let is_begun = tracer.begin(side, headers, asked).is_some();
            assert_eq!(is_begun, want, "{share} {side:?} {headers:?}");
        }
        for side in [Side::Source, Side::Destination] {
            check(0, side, &headers("traceparent", SAMPLED_ONE), true);
            check(Share::ALL, side, &headers("traceparent", UNSAMPLED), false);
            check(Share::ALL, side, &headers("b3", "0"), false);
            check(0, side, &HeaderMap::new(), false);
        }
        let undecided = headers("b3", "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331");
        for came in [&HeaderMap::new(), &undecided] {
            check(Share::ALL, Side::Source, came, true);
            check(Share::ALL, Side::Destination, came, false);
            check(0, Side::Source, came, false);
        }
        check(0, Side::Source, &headers("b3", "1"), true);
    }

    #[test]
    fn a_span_is_below_the_one_that_came_and_shows_no_query() {
        let (tracer, mut spans, _) = tracer(0, 1);
        let open = tracer.begin(Side::Source, &headers("traceparent", SAMPLED_ONE), asked).unwrap();
        let context = open.context();
        open.end(ended());
        let span = spans.try_recv().unwrap();
        assert_eq!((span.context, span.side), (context, Side::Source));
        assert_eq!(span.parent, Some(0xb7ad_6b71_6920_3331_u64.to_be_bytes()));
        assert_ne!(Some(span.context.span_id), span.parent);
        assert_eq!((&*span.asked.path, span.asked.host), ("/a", Some(("web.weft".into(), Some(80)))));
        assert_eq!(span.ended, ended());
    }

    #[test]
    fn spans_that_find_no_room_are_counted_and_an_open_one_that_is_dropped_is_none() {
        let (tracer, mut spans, full) = tracer(Share::ALL, 2);
        let begin = || tracer.begin(Side::Source, &HeaderMap::new(), asked).unwrap();
        drop(begin());
        for _ in 0..5 {
            begin().end(ended());
        }
        assert_eq!(full.get(), 3);
        let first = spans.try_recv().unwrap();
        assert_eq!((first.parent, first.context.flags), (None, SAMPLED | RANDOM));
        assert!(spans.try_recv().is_ok() && spans.try_recv().is_err());
    }

    #[test]
    fn a_share_takes_its_part_of_the_ids() {
        let took = |parts: u16| {
            let share = Share::of_parts(parts).unwrap();
            // Ids that are spread evenly over the random bits.
            let ids = (0..10_000_u128).map(|at| (at << RANDOM_BITS).div_ceil(10_000) + (1 << 100));
            ids.filter(|id| share.takes(id.to_be_bytes())).count()
        };
        assert_eq!([0, 1, 250, 10_000].map(took), [0, 1, 250, 10_000]);
        assert_eq!(Share::of_parts(10_001), None);
    }

    #[test]
    fn long_texts_are_cut() {
        let path = format!("/{}", "x".repeat(1_000)).parse().unwrap();
        let asked = Asked::of((&Method::GET, Some(&path)), None, (Version::HTTP_2, true));
        assert_eq!(asked.path.len(), TEXT_BYTES_MAX);
    }
}

//! What tells which trace a request belongs to: `traceparent` (W3C Trace Context, level 2) and B3, single and multi.
//!
//! Invariants: reading changes nothing and takes bounded time; what is not well-formed is as if it were not there; what is
//! written is well-formed. `tracestate` is never read, and passes as it came as long as its trace goes on.
//! Not here: who is believed (`proxy::http::outbound`), what is sampled (the parent module).

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The flag of a request whose spans are recorded.
pub(super) const SAMPLED: u8 = 1;
/// The flag of a trace whose id is random (level 2).
pub(super) const RANDOM: u8 = 2;
/// Bytes of a `traceparent` of version 00.
const TRACEPARENT_BYTES: usize = 55;
/// Longest `tracestate` that a span shows: what the standard asks everybody to pass on.
const TRACESTATE_BYTES_MAX: usize = 512;
const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// One span's place: the trace and the span, which is the parent of whatever comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanContext {
    /// Not all zero.
    pub trace_id: [u8; 16],
    /// Not all zero.
    pub span_id: [u8; 8],
    /// `trace-flags`: bit 0 says that it is recorded, bit 1 that the trace's id is random.
    pub flags: u8,
}

/// What a request's headers say of its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    /// Nothing.
    Nothing,
    /// That nothing of it is recorded.
    Unsampled,
    /// That it is recorded; none: in a trace that is to be begun.
    Sampled(Option<SpanContext>),
    /// To which trace it belongs; whoever reads it decides (B3 alone has that).
    Undecided(SpanContext),
}

/// Reads a request's headers; B3 counts where there is no `traceparent`.
pub(super) fn read(headers: &HeaderMap) -> Came {
    match traceparent(headers) {
        Some(context) if context.flags & SAMPLED != 0 => Came::Sampled(Some(context)),
        Some(_) => Came::Unsampled,
        None => b3(headers),
    }
}

/// Takes out whatever tells of a trace.
pub(super) fn forget(headers: &mut HeaderMap) {
    for name in [TRACEPARENT, TRACESTATE, B3, B3_TRACE, B3_SPAN, B3_PARENT, B3_SAMPLED, B3_FLAGS] {
        headers.remove(name);
    }
}

/// Returns `tracestate` as a span shows it, if its trace goes on: lists of one header, cut at nothing, or none at all.
pub(super) fn state(headers: &HeaderMap) -> Option<Box<str>> {
    traceparent(headers)?;
    let mut joined = String::new();
    for value in headers.get_all(TRACESTATE) {
        let text = value.to_str().ok()?;
        if joined.len() + text.len() >= TRACESTATE_BYTES_MAX {
            return None;
        }
        if !joined.is_empty() {
            joined.push(',');
        }
        joined.push_str(text);
    }
    (!joined.is_empty()).then(|| joined.into_boxed_str())
}

impl SpanContext {
    /// Makes it the parent of what comes next: in `traceparent`, and in B3 where the request has B3 of the same trace.
    pub fn inject(&self, headers: &mut HeaderMap) {
        // The state of another trace, or of none, says nothing of this one (§3.3).
        if traceparent(headers).is_none_or(|came| came.trace_id != self.trace_id) {
            headers.remove(TRACESTATE);
        }
        let mut text = [0; TRACEPARENT_BYTES];
        put(&mut text, 0, b"00-");
        put_hex(&mut text, 3, &self.trace_id);
        put(&mut text, 35, b"-");
        put_hex(&mut text, 36, &self.span_id);
        put(&mut text, 52, b"-");
        put_hex(&mut text, 53, &[self.flags]);
        set(headers, TRACEPARENT, &text);
        self.inject_b3(headers);
    }

    fn inject_b3(&self, headers: &mut HeaderMap) {
        let mut span = [0; 16];
        put_hex(&mut span, 0, &self.span_id);
        if let Some(came) = only(headers, &B3) {
            let parts = B3Parts::of_single(came.as_bytes());
            if let Some(text) = parts.and_then(|parts| self.b3_of(parts, &span)) {
                set(headers, B3, &text);
            }
        }
        let Some(parts) = B3Parts::of_multi(headers) else { return };
        if parts.ids.is_some_and(|(trace_id, ..)| trace_id != self.trace_id) {
            return;
        }
        if let Some((_, _, parent)) = parts.ids {
            let mut text = [0; 16];
            put_hex(&mut text, 0, &parent);
            set(headers, B3_PARENT, &text);
        } else {
            let mut text = [0; 32];
            put_hex(&mut text, 0, &self.trace_id);
            set(headers, B3_TRACE, &text);
        }
        set(headers, B3_SPAN, &span);
        if parts.state == B3State::Undecided {
            headers.insert(B3_SAMPLED, HeaderValue::from_static("1"));
        }
    }

    /// Writes a `b3` that follows `parts`; none: it is about another trace.
    fn b3_of(&self, parts: B3Parts, span: &[u8; 16]) -> Option<Vec<u8>> {
        let mut trace = [0; 32];
        put_hex(&mut trace, 0, &self.trace_id);
        let mut text = Vec::with_capacity(68);
        match parts.ids {
            Some((trace_id, ..)) if trace_id != self.trace_id => return None,
            // A short id stays short: who knows no other goes on with it.
            Some((_, true, _)) => text.extend_from_slice(trace.get(16..)?),
            Some(_) | None => text.extend_from_slice(&trace),
        }
        text.push(b'-');
        text.extend_from_slice(span);
        text.extend_from_slice(if parts.state == B3State::Debug { b"-d" } else { b"-1" });
        if let Some((_, _, parent)) = parts.ids {
            let mut came = [0; 16];
            put_hex(&mut came, 0, &parent);
            text.push(b'-');
            text.extend_from_slice(&came);
        }
        Some(text)
    }
}

/// Reads `traceparent` (§3.2): one header, version 00, or a later one that begins like it.
fn traceparent(headers: &HeaderMap) -> Option<SpanContext> {
    let text = only(headers, &TRACEPARENT)?.as_bytes();
    let part = |from: usize, to: usize| text.get(from..to);
    let [version] = unhex::<1>(part(0, 2)?)?;
    let is_whole = match version {
        0 => text.len() == TRACEPARENT_BYTES,
        0xff => false,
        _ => text.get(TRACEPARENT_BYTES).is_none_or(|next| *next == b'-'),
    };
    let is_parted = [2, 35, 52].iter().all(|at| text.get(*at) == Some(&b'-'));
    let context = SpanContext {
        trace_id: unhex(part(3, 35)?)?,
        span_id: unhex(part(36, 52)?)?,
        flags: unhex::<1>(part(53, 55)?)?.first()? & (SAMPLED | RANDOM),
    };
    let is_named = context.trace_id != [0; 16] && context.span_id != [0; 8];
    (is_whole && is_parted && is_named).then_some(context)
}

/// Reads B3: the single header, or else the many.
fn b3(headers: &HeaderMap) -> Came {
    let single = only(headers, &B3).and_then(|value| B3Parts::of_single(value.as_bytes()));
    let Some(parts) = single.or_else(|| B3Parts::of_multi(headers)) else { return Came::Nothing };
    let context = |flags| parts.ids.map(|(trace_id, _, span_id)| SpanContext { trace_id, span_id, flags });
    match (parts.state, context(SAMPLED)) {
        (B3State::Denied, _) => Came::Unsampled,
        (B3State::Accepted | B3State::Debug, context) => Came::Sampled(context),
        (B3State::Undecided, Some(context)) => Came::Undecided(context),
        (B3State::Undecided, None) => Came::Nothing,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum B3State {
    Undecided,
    Denied,
    Accepted,
    /// Recorded whatever samplers say.
    Debug,
}

/// What B3 says. Source: openzipkin/b3-propagation.
#[derive(Debug, Clone, Copy)]
struct B3Parts {
    /// The trace, whether its id came with 16 digits, and the span.
    ids: Option<([u8; 16], bool, [u8; 8])>,
    state: B3State,
}

impl B3Parts {
    /// `TRACE-SPAN[-STATE[-PARENT]]`, or `STATE` alone.
    fn of_single(text: &[u8]) -> Option<Self> {
        let state = |text: &[u8]| match text {
            b"0" => Some(B3State::Denied),
            b"1" => Some(B3State::Accepted),
            b"d" => Some(B3State::Debug),
            _ => None,
        };
        let mut parts = text.split(|byte| *byte == b'-');
        let first = parts.next()?;
        let Some(span) = parts.next() else { return Some(Self { ids: None, state: state(first)? }) };
        let state = parts.next().map_or(Some(B3State::Undecided), state)?;
        let is_parent = |text: &[u8]| unhex::<8>(text).is_some();
        if !parts.next().is_none_or(is_parent) || parts.next().is_some() {
            return None;
        }
        Some(Self { ids: Some(Self::ids(first, span)?), state })
    }

    /// `x-b3-*`; none: none of them says anything.
    fn of_multi(headers: &HeaderMap) -> Option<Self> {
        let text = |name: HeaderName| only(headers, &name).map(HeaderValue::as_bytes);
        let is_debug = text(B3_FLAGS) == Some(b"1");
        let state = match text(B3_SAMPLED) {
            _ if is_debug => B3State::Debug,
            // The words are of old tracers.
            Some(b"1" | b"true") => B3State::Accepted,
            Some(b"0" | b"false") => B3State::Denied,
            Some(_) | None => B3State::Undecided,
        };
        let ids = text(B3_TRACE).zip(text(B3_SPAN)).and_then(|(trace, span)| Self::ids(trace, span));
        (ids.is_some() || state != B3State::Undecided).then_some(Self { ids, state })
    }

    fn ids(trace: &[u8], span: &[u8]) -> Option<([u8; 16], bool, [u8; 8])> {
        let is_short = trace.len() == 16;
        let trace_id = if is_short {
            let mut wide = [0; 16];
            wide.get_mut(8..)?.copy_from_slice(&unhex::<8>(trace)?);
            wide
        } else {
            unhex::<16>(trace)?
        };
        let span_id = unhex::<8>(span)?;
        (trace_id != [0; 16] && span_id != [0; 8]).then_some((trace_id, is_short, span_id))
    }
}

/// Returns a header that stands once.
fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: &[u8]) {
    if let Ok(value) = HeaderValue::from_bytes(text) {
        headers.insert(name, value);
    }
}

fn put(out: &mut [u8], at: usize, text: &[u8]) {
    for (slot, byte) in out.iter_mut().skip(at).zip(text) {
        *slot = *byte;
    }
}

/// Writes bytes in lower-case digits.
fn put_hex(out: &mut [u8], at: usize, bytes: &[u8]) {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    for (slot, digit) in out.iter_mut().skip(at).zip(digits) {
        *slot = DIGITS.get(usize::from(digit)).copied().unwrap_or(b'0');
    }
}

/// Reads lower-case digits, as many as `N` bytes have.
fn unhex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    if text.len() != N * 2 {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = (digit(*high)? << 4) | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";
    /// The span that is made on the way.
    const OWN: SpanContext = SpanContext {
        trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes(),
        span_id: [7; 8],
        flags: 1,
    };

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        map
    }

    fn parent(flags: u8) -> SpanContext {
        SpanContext { trace_id: unhex(TRACE.as_bytes()).unwrap(), span_id: unhex(SPAN.as_bytes()).unwrap(), flags }
    }

    #[test]
    fn a_traceparent_is_read_as_the_standard_says_and_anything_else_is_nothing() {
        #[track_caller]
        fn check(text: &str, want: Came) {
            assert_eq!(read(&headers(&[("traceparent", text)])), want, "{text}");
        }
        let ids = format!("{TRACE}-{SPAN}");
        check(&format!("00-{ids}-01"), Came::Sampled(Some(parent(1))));
        check(&format!("00-{ids}-03"), Came::Sampled(Some(parent(3))));
        // Bits that level 2 does not know are not passed on.
        check(&format!("00-{ids}-fd"), Came::Sampled(Some(parent(1))));
        check(&format!("00-{ids}-00"), Came::Unsampled);
        check(&format!("00-{ids}-02"), Came::Unsampled);
        check(&format!("cc-{ids}-01"), Came::Sampled(Some(parent(1))));
        check(&format!("cc-{ids}-01-what-comes-later"), Came::Sampled(Some(parent(1))));
        for bad in [
            format!("ff-{ids}-01"),
            format!("00-{ids}-01-more"),
            format!("cc-{ids}-01.more"),
            format!("00-{ids}-1"),
            format!("00-{ids}-0g"),
            format!("00-{ids}"),
            format!("0-{ids}-01"),
            format!("00_{ids}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_ascii_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{SPAN}-{TRACE}-01"),
            String::new(),
        ] {
            check(&bad, Came::Nothing);
        }
        let twice = format!("00-{ids}-01");
        assert_eq!(read(&headers(&[("traceparent", &twice), ("traceparent", &twice)])), Came::Nothing);
    }

    #[test]
    fn b3_counts_where_there_is_no_traceparent_in_one_header_or_many() {
        #[track_caller]
        fn check(pairs: &[(&str, &str)], want: Came) {
            assert_eq!(read(&headers(pairs)), want, "{pairs:?}");
        }
        let wide = u128::from(u64::from_be_bytes(parent(1).span_id)).to_be_bytes();
        let short = SpanContext { trace_id: wide, ..parent(1) };
        check(&[("b3", &format!("{TRACE}-{SPAN}-1"))], Came::Sampled(Some(parent(1))));
        check(&[("b3", &format!("{TRACE}-{SPAN}-d-{SPAN}"))], Came::Sampled(Some(parent(1))));
        check(&[("b3", &format!("{SPAN}-{SPAN}-1"))], Came::Sampled(Some(short)));
        check(&[("b3", &format!("{TRACE}-{SPAN}"))], Came::Undecided(parent(1)));
        check(&[("b3", &format!("{TRACE}-{SPAN}-0"))], Came::Unsampled);
        check(&[("b3", "0")], Came::Unsampled);
        check(&[("b3", "1")], Came::Sampled(None));
        for bad in ["", "x", "1-", &format!("{TRACE}-{SPAN}-2"), &format!("{TRACE}-{SPAN}-1-x"), &format!("{TRACE}-1")]
        {
            check(&[("b3", bad)], Came::Nothing);
        }
        let ids = [("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
        check(&ids, Came::Undecided(parent(1)));
        check(&[ids[0], ids[1], ("x-b3-sampled", "1")], Came::Sampled(Some(parent(1))));
        check(&[ids[0], ids[1], ("x-b3-sampled", "false")], Came::Unsampled);
        check(&[ids[0], ids[1], ("x-b3-sampled", "0"), ("x-b3-flags", "1")], Came::Sampled(Some(parent(1))));
        check(&[("x-b3-sampled", "1")], Came::Sampled(None));
        check(&[ids[0]], Came::Nothing);
        let unsampled = format!("00-{TRACE}-{SPAN}-00");
        check(&[("traceparent", &unsampled), ("b3", "1")], Came::Unsampled);
        check(&[("traceparent", "broken"), ("b3", "0")], Came::Unsampled);
    }

    #[test]
    fn what_goes_on_names_the_new_parent_in_the_forms_that_came() {
        #[track_caller]
        fn check(pairs: &[(&str, &str)], want: &[(&str, &str)]) {
            let mut map = headers(pairs);
            OWN.inject(&mut map);
            let mut found: Vec<(String, String)> =
                map.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
            found.sort();
            let own = format!("00-{TRACE}-0707070707070707-01");
            let mut want: Vec<(String, String)> =
                want.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            want.push(("traceparent".to_owned(), own));
            want.sort();
            assert_eq!(found, want, "{pairs:?}");
        }
        let own = "0707070707070707";
        let came = format!("00-{TRACE}-{SPAN}-01");
        check(&[], &[]);
        check(
            &[("traceparent", &came), ("tracestate", "a=1"), ("tracestate", "b=2")],
            &[("tracestate", "a=1"), ("tracestate", "b=2")],
        );
        check(&[("traceparent", "broken"), ("tracestate", "a=1")], &[]);
        check(&[("b3", &format!("{TRACE}-{SPAN}-d"))], &[("b3", &format!("{TRACE}-{own}-d-{SPAN}"))]);
        check(&[("b3", &format!("{TRACE}-{SPAN}"))], &[("b3", &format!("{TRACE}-{own}-1-{SPAN}"))]);
        check(&[("b3", "1")], &[("b3", &format!("{TRACE}-{own}-1"))]);
        // Another trace than that of the traceparent: not weft's to say.
        let other = format!("{SPAN}{SPAN}-{SPAN}-1");
        check(&[("traceparent", &came), ("b3", &other)], &[("b3", &other)]);
        check(
            &[("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-sampled", "1")],
            &[("x-b3-traceid", TRACE), ("x-b3-spanid", own), ("x-b3-parentspanid", SPAN), ("x-b3-sampled", "1")],
        );
        check(&[("x-b3-sampled", "1")], &[("x-b3-traceid", TRACE), ("x-b3-spanid", own), ("x-b3-sampled", "1")]);
        let short = SpanContext { trace_id: u128::from(u64::from_be_bytes(OWN.span_id)).to_be_bytes(), ..OWN };
        let mut map = headers(&[("b3", &format!("{own}-{SPAN}-1"))]);
        short.inject(&mut map);
        assert_eq!(map["b3"], format!("{own}-{own}-1-{SPAN}"));
    }

    #[test]
    fn a_span_shows_the_state_of_the_trace_that_goes_on_within_its_bound() {
        let came = format!("00-{TRACE}-{SPAN}-01");
        let of = |pairs: &[(&str, &str)]| state(&headers(pairs)).map(String::from);
        assert_eq!(
            of(&[("traceparent", &came), ("tracestate", "a=1"), ("tracestate", "b=2")]),
            Some("a=1,b=2".to_owned())
        );
        assert_eq!(of(&[("tracestate", "a=1")]), None);
        assert_eq!(of(&[("traceparent", &came), ("tracestate", &"a".repeat(512))]), None);
        let mut map = headers(&[("traceparent", &came), ("b3", "1"), ("x-b3-flags", "1"), ("accept", "a")]);
        forget(&mut map);
        assert_eq!(map.len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again_and_nothing_panics(trace in 1_u128.., span in 1_u64.., flags in 0_u8..4, junk in "[ -~]{0,80}") {
            let context = SpanContext { trace_id: trace.to_be_bytes(), span_id: span.to_be_bytes(), flags };
            let mut map = headers(&[("b3", &junk), ("x-b3-traceid", &junk), ("x-b3-spanid", &junk), ("x-b3-sampled", &junk)]);
            let _any = read(&map);
            context.inject(&mut map);
            prop_assert_eq!(traceparent(&map), Some(context));
        }
    }
}

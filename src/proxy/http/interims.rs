//! Interim answers (1xx) of an app: seen where its bytes are read, heard by who waits for the answer.
//!
//! ```text
//!   request --> begin() --> app's connection: bytes of an answer's beginning --see()--> heads --> poll_next()
//!                                                       \--> hyper, which skips 1xx by itself
//! ```
//!
//! hyper tells of them as well, to a function in the request's extensions: five allocations for each request, and next to no
//! request has any. Here one place per connection serves all its requests, one after the other.
//! Invariants: bytes are looked at from a request's beginning to its final head and no longer; hyper gets all of them,
//! unchanged, and decides what they are. What cannot be an interim head is left to it.
//! Not here: which of them are passed on to callers over HTTP/1.0 (`attempt`).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use super::attempt::INTERIM_MAX;
use crate::proxy::head::HEAD_BYTES_MAX;

/// How every interim answer begins but for its version's last digit: `HTTP/1.1 103`.
const BEGINNING: &[u8] = b"HTTP/1.";
/// Bytes of a head's end: `\\n\\r\\n`.
const LONGEST_END: usize = 3;
/// Most headers of one that is heard: hyper fails at more.
const HEADERS_MAX: usize = 100;

/// Where those of one connection, or of one request, are put.
#[derive(Debug, Default)]
pub(super) struct Interims {
    heard: Mutex<Heard>,
    /// Some are there: spares those who look the lock.
    is_any: AtomicBool,
    /// The next bytes that go to the app are a request's.
    is_begun: AtomicBool,
    /// The next bytes that the app sends begin an answer, or go on with an interim one.
    is_expected: AtomicBool,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Heard {
    heads: VecDeque<(StatusCode, HeaderMap)>,
    /// How many there were in all.
    count: usize,
    has_continue: bool,
    /// The beginning of a head whose end has not come; at most [`HEAD_BYTES_MAX`].
    partial: Vec<u8>,
}

impl Heard {
    /// Counts another one; tells whether it is passed on. The first 100 always is: it lets the body go.
    fn takes(&mut self, status: StatusCode) -> bool {
        self.count = self.count.saturating_add(1);
        let is_first_continue = status == StatusCode::CONTINUE && !std::mem::replace(&mut self.has_continue, true);
        is_first_continue || self.count <= INTERIM_MAX
    }
}

impl Interims {
    /// Begins a request: what the one before it left is forgotten, and `cx` is woken by what comes.
    pub(super) fn begin(&self, cx: &Context<'_>) {
        let mut heard = self.heard();
        if heard.count > 0 || !heard.partial.is_empty() {
            *heard = Heard::default();
        }
        drop(heard);
        self.is_any.store(false, Ordering::Relaxed);
        // Not yet what is read: an app that says something unasked says it before it has the request.
        self.is_begun.store(true, Ordering::Relaxed);
        self.waker.register(cx.waker());
    }

    /// Ends a request whose answer is whole: nobody waits any more.
    pub(super) fn end(&self) {
        self.is_begun.store(false, Ordering::Relaxed);
        self.is_expected.store(false, Ordering::Relaxed);
        drop(self.waker.take());
    }

    /// Tells whether what is read next has to be shown.
    pub(super) fn is_expected(&self) -> bool {
        self.is_expected.load(Ordering::Relaxed)
    }

    /// Notes that bytes go to the app: after [`Interims::begin`] the request's, and an answer comes next.
    pub(super) fn sent(&self) {
        if self.is_begun.load(Ordering::Relaxed) {
            self.is_begun.store(false, Ordering::Relaxed);
            self.is_expected.store(true, Ordering::Relaxed);
        }
    }

    /// Looks at what was read. A head is parsed once, when its end has come, in however many pieces.
    pub(super) fn see(&self, bytes: &[u8]) {
        let mut heard = self.heard();
        // The final head comes whole at most times.
        if heard.partial.is_empty() && !may_be_interim(bytes) {
            self.is_expected.store(false, Ordering::Relaxed);
            return;
        }
        let mut partial = std::mem::take(&mut heard.partial);
        drop(heard);
        let (mut used, mut end_from) = (0, partial.len().saturating_sub(LONGEST_END - 1));
        partial.extend_from_slice(bytes);
        let looks_on = loop {
            let blank = tail(&partial, used).iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            used += blank;
            let rest = tail(&partial, used);
            if !may_be_interim(rest) {
                break false;
            }
            if !has_end(tail(&partial, end_from.max(used))) {
                break rest.len() <= HEAD_BYTES_MAX;
            }
            let Some((length, status, headers)) = first_of(rest) else { break false };
            let _is_passed_on = self.put(status, headers);
            used += length;
            end_from = used;
        };
        if looks_on {
            partial.drain(..used);
            self.heard().partial = partial;
        } else {
            self.is_expected.store(false, Ordering::Relaxed);
        }
    }

    /// Adds one; tells whether it is passed on.
    pub(super) fn put(&self, status: StatusCode, headers: HeaderMap) -> bool {
        let mut heard = self.heard();
        if !heard.takes(status) {
            return false;
        }
        heard.heads.push_back((status, headers));
        self.is_any.store(true, Ordering::Release);
        drop(heard);
        self.waker.wake();
        true
    }

    /// Tells whether there ever was one.
    pub(super) fn were_any(&self) -> bool {
        self.heard().count > 0
    }

    /// Takes the next one, or has the task of `cx` woken by it.
    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<(StatusCode, HeaderMap)> {
        self.waker.register(cx.waker());
        if !self.is_any.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let mut heard = self.heard();
        let next = heard.heads.pop_front();
        self.is_any.store(!heard.heads.is_empty(), Ordering::Release);
        drop(heard);
        next.map_or(Poll::Pending, Poll::Ready)
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whether bytes may begin an interim answer: quickly, for nearly none does.
fn may_be_interim(bytes: &[u8]) -> bool {
    match bytes.strip_prefix(BEGINNING) {
        // Version and space, and the first digit of the status.
        Some(rest) => !matches!(rest, [_, b' ', digit, ..] if *digit != b'1'),
        // Empty lines may come first (RFC 9112 §2.2).
        None => BEGINNING.starts_with(bytes) || matches!(bytes.first(), Some(b'\r' | b'\n')),
    }
}

/// Tells whether a head ends in `bytes`: with an empty line.
fn has_end(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|end| end == b"\n\n") || bytes.windows(LONGEST_END).any(|end| end == b"\n\r\n")
}

fn tail(bytes: &[u8], from: usize) -> &[u8] {
    bytes.get(from..).unwrap_or_default()
}

/// Reads the interim head that `bytes` begin with, and its length; none: it is no such head, or none that hyper takes.
fn first_of(bytes: &[u8]) -> Option<(usize, StatusCode, HeaderMap)> {
    let mut room = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut room);
    let Ok(httparse::Status::Complete(length)) = response.parse(bytes) else { return None };
    let status = StatusCode::from_u16(response.code?).ok().filter(|status| super::headers::is_interim(*status))?;
    let headers = response.headers.iter().map(|header| {
        let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(header.value).ok()?))
    });
    Some((length, status, headers.collect::<Option<HeaderMap>>()?))
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker_ref;

    use super::*;

    const EARLY: &[u8] = b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n";
    const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    const FINAL: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

    /// Shows `reads` to a connection that has begun a request; returns what it heard, and whether it looks on.
    fn heard(interims: &Interims, reads: &[&[u8]]) -> (Vec<(u16, usize)>, bool) {
        let cx = Context::from_waker(noop_waker_ref());
        interims.begin(&cx);
        interims.sent();
        reads.iter().take_while(|_| interims.is_expected()).for_each(|read| interims.see(read));
        let mut heads = Vec::new();
        while let Poll::Ready((status, headers)) = interims.poll_next(&cx) {
            heads.push((status.as_u16(), headers.len()));
        }
        (heads, interims.is_expected())
    }

    #[test]
    fn the_ninth_interim_answer_is_left_out_but_the_first_100_never_is() {
        let mut heard = Heard::default();
        let passed = (0..20).filter(|_| heard.takes(StatusCode::EARLY_HINTS)).count();
        assert_eq!(passed, INTERIM_MAX);
        assert!(heard.takes(StatusCode::CONTINUE));
        assert!(!heard.takes(StatusCode::CONTINUE));
        assert!(!heard.takes(StatusCode::EARLY_HINTS));
    }

    #[test]
    fn heads_are_heard_however_they_are_cut_and_nothing_after_the_final_one() {
        let interims = Interims::default();
        let all = [CONTINUE, EARLY, EARLY, FINAL, EARLY].concat();
        let expected = (vec![(100, 0), (103, 1), (103, 1)], false);
        let with_blanks = [b"\r\n\n", CONTINUE, b"\r\n", EARLY, EARLY, FINAL].concat();
        assert_eq!(heard(&interims, &with_blanks.chunks(7).collect::<Vec<_>>()), expected, "empty lines come first");
        assert_eq!(heard(&interims, &[&all]), expected, "in one read");
        for cut in 1..all.len() {
            let (one, two) = all.split_at(cut);
            assert_eq!(heard(&interims, &[one, two]), expected, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = all.chunks(1).collect();
        assert_eq!(heard(&interims, &bytes), expected, "byte by byte");
        assert_eq!(heard(&interims, &[EARLY]), (vec![(103, 1)], true));
        assert!(interims.were_any());
        // The next request on the connection hears nothing of the last one's.
        assert_eq!(heard(&interims, &[FINAL]), (vec![], false));
        assert!(!interims.were_any());
    }

    #[test]
    fn what_an_app_says_before_the_request_went_out_or_after_it_was_answered_is_not_heard() {
        let interims = Interims::default();
        let cx = Context::from_waker(noop_waker_ref());
        interims.sent();
        assert!(!interims.is_expected(), "nothing was asked");
        interims.begin(&cx);
        assert!(!interims.is_expected(), "the request has not gone out");
        interims.sent();
        assert!(interims.is_expected());
        interims.see(EARLY);
        interims.end();
        assert!(!interims.is_expected());
        // The body of a request that is answered already goes on.
        interims.sent();
        assert!(!interims.is_expected());
    }

    #[test]
    fn what_is_no_interim_answer_is_not_looked_at_again() {
        let interims = Interims::default();
        let switching = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n";
        for other in
            [&b"HTTP/1.1 200"[..], b"HTTP/1.0 404 x\r\n", b"HTTP/2 103", b"hello", b"HTTP/1.1 1x3 \r\n\r\n", switching]
        {
            assert_eq!(heard(&interims, &[other, EARLY]), (vec![], false), "{}", other.escape_ascii());
        }
        // A head that does not end is kept up to the bound.
        let long = [&EARLY[..EARLY.len() - 2], &b"x: y\r\n".repeat(HEAD_BYTES_MAX / 6)].concat();
        let reads: Vec<&[u8]> = long.chunks(4096).collect();
        assert_eq!(heard(&interims, &reads), (vec![], false));
        assert!(interims.heard().partial.is_empty());
    }
}

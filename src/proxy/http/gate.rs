//! What a caller sends over HTTP/1.1, looked at before hyper reads it: framing in doubt goes no further.
//!
//! ```text
//!   socket -> Gate: head lines -> body by length | by chunks -> next head        -> hyper
//!                     \__ in doubt: a byte that no head may hold (hyper answers 400), or the end of what hyper sees
//! ```
//!
//! hyper resolves what it could refuse (it drops Content-Length beside Transfer-Encoding, takes a bare LF for the end of a
//! line, leaves out codings before `chunked`), and tells nobody. Nothing can be smuggled past weft by that, for messages
//! are framed anew; but a proxy or an app that reads such a request otherwise than weft does is one that somebody attacks.
//!
//! Invariants: what passes is framed for hyper as it is here, so that each head is looked at, also of pipelined requests;
//! at most [`HEAD_BYTES_MAX`] bytes of an unfinished line are kept. A pure core.
//! Not here: what else makes a head malformed (hyper, `headers::check`), answers' framing, HTTP/2.

use crate::proxy::head::HEAD_BYTES_MAX;

/// Longest extension of a chunk, in bytes: nobody sends any, and hyper counts them over the whole body.
const EXTENSION_BYTES_MAX: u32 = 256;
/// Most digits of a chunk's size and of a Content-Length: what u64 holds in any case.
const HEX_DIGITS_MAX: u8 = 15;
const DIGITS_MAX: usize = 18;

/// Why a request's framing is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Content-Length and Transfer-Encoding (RFC 9112 §6.3).
    TwoFramings,
    /// Content-Length more than once, or not plain digits.
    Length,
    /// A coding other than `chunked` alone (RFC 9112 §6.1).
    Coding,
    /// A line that ends in LF alone, or holds a CR (RFC 9112 §2.2).
    LineEnd,
    /// A NUL.
    Nul,
    /// A line that goes on in the next (RFC 9112 §5.2).
    Fold,
    /// Blanks before a colon (RFC 9112 §5.1).
    Blank,
    /// A chunk whose size or end cannot be read (RFC 9112 §7.1).
    Chunk,
}

impl Doubt {
    /// The metrics' word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::TwoFramings => "two_framings",
            Self::Length => "content_length",
            Self::Coding => "transfer_coding",
            Self::LineEnd => "line_end",
            Self::Nul => "nul",
            Self::Fold => "folded_line",
            Self::Blank => "blank_before_colon",
            Self::Chunk => "chunk",
        }
    }
}

/// Where the doubt is: hyper gets what comes before `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stop {
    pub(crate) at: usize,
    pub(crate) doubt: Doubt,
    /// In a head: a byte that no head may hold makes hyper answer 400. In a body its end does.
    pub(crate) in_head: bool,
}

/// What the head under way says so far.
#[derive(Debug, Default, Clone, Copy)]
struct Head {
    /// Its first line has come.
    began: bool,
    length: Option<u64>,
    is_chunked: bool,
    /// It asks to leave HTTP: by Upgrade (not to h2c, which weft does not offer so) or by CONNECT.
    has_upgrade: bool,
    has_h2c: bool,
    is_connect: bool,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// Between two messages or in a head's lines.
    #[default]
    Head,
    /// In a body of a known length.
    Length(u64),
    /// In the digits of a chunk's size.
    Size {
        bytes: u64,
        digits: u8,
    },
    /// After them, up to CR.
    Extension {
        bytes: u64,
        count: u32,
    },
    /// LF of the size's line.
    SizeEnd(u64),
    /// In a chunk's bytes.
    Chunk(u64),
    /// CR and LF after them.
    ChunkCr,
    ChunkLf,
    /// In the lines after the last chunk.
    Trailers,
    /// What follows a request to leave HTTP is not read as HTTP; if it is refused, the connection ends.
    Open,
    /// Nothing goes further.
    Stopped,
}

/// One connection's framing.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: State,
    head: Head,
    /// The beginning of a line that the next bytes end.
    line: Vec<u8>,
}

impl Gate {
    /// Looks at the next bytes.
    ///
    /// # Errors
    /// [`Stop`] if the framing is in doubt; from then on nothing passes.
    pub(crate) fn look(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let (was, read) = (self.state, self.step(rest));
            match read {
                Ok(count) => at += count,
                Err((count, doubt)) => {
                    self.state = State::Stopped;
                    self.line = Vec::new();
                    return Err(Stop { at: at + count, doubt, in_head: matches!(was, State::Head) });
                }
            }
        }
        Ok(())
    }

    /// Tells whether a doubt ended it.
    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state, State::Stopped)
    }

    /// Reads at least one byte of `bytes`, which is not empty; returns how many.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, (usize, Doubt)> {
        let Some(&first) = bytes.first() else { return Ok(0) };
        let skip = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        self.state = match self.state {
            State::Head | State::Trailers => return self.line(bytes),
            State::Open => return Ok(bytes.len()),
            State::Length(left) => {
                let count = skip(left);
                let left = left - count as u64;
                self.state = if left == 0 { State::Head } else { State::Length(left) };
                return Ok(count);
            }
            State::Chunk(left) => {
                let count = skip(left);
                let left = left - count as u64;
                self.state = if left == 0 { State::ChunkCr } else { State::Chunk(left) };
                return Ok(count);
            }
            State::Size { bytes, digits } => match (first, char::from(first).to_digit(16)) {
                (_, Some(digit)) if digits < HEX_DIGITS_MAX => {
                    State::Size { bytes: bytes * 16 + u64::from(digit), digits: digits + 1 }
                }
                (b'\r', _) if digits > 0 => State::SizeEnd(bytes),
                (b';' | b' ' | b'\t', _) if digits > 0 => State::Extension { bytes, count: 0 },
                _ => return Err((0, Doubt::Chunk)),
            },
            State::Extension { bytes, count } => match first {
                b'\r' => State::SizeEnd(bytes),
                b'\n' | 0 => return Err((0, Doubt::Chunk)),
                _ if count >= EXTENSION_BYTES_MAX => return Err((0, Doubt::Chunk)),
                _ => State::Extension { bytes, count: count + 1 },
            },
            State::SizeEnd(bytes) => match (first, bytes) {
                (b'\n', 0) => State::Trailers,
                (b'\n', bytes) => State::Chunk(bytes),
                _ => return Err((0, Doubt::Chunk)),
            },
            State::ChunkCr if first == b'\r' => State::ChunkLf,
            State::ChunkLf if first == b'\n' => State::Size { bytes: 0, digits: 0 },
            State::ChunkCr | State::ChunkLf | State::Stopped => return Err((0, Doubt::Chunk)),
        };
        Ok(1)
    }

    /// Reads up to the end of a line.
    fn line(&mut self, bytes: &[u8]) -> Result<usize, (usize, Doubt)> {
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            // hyper refuses what is longer, by itself and without an end of the line.
            let room = HEAD_BYTES_MAX.saturating_sub(self.line.len()).min(bytes.len());
            self.line.extend_from_slice(bytes.get(..room).unwrap_or_default());
            return Ok(bytes.len());
        };
        let part = bytes.get(..end).unwrap_or_default();
        let joined = if self.line.is_empty() {
            None
        } else {
            self.line.extend_from_slice(part);
            Some(std::mem::take(&mut self.line))
        };
        let line = joined.as_deref().unwrap_or(part);
        let ended = match line.strip_suffix(b"\r") {
            Some(text) if text.contains(&b'\r') => Err(Doubt::LineEnd),
            Some(text) if text.contains(&0) => Err(Doubt::Nul),
            Some(text) if matches!(self.state, State::Trailers) => self.trailer(text),
            Some(text) => self.head_line(text),
            None => Err(Doubt::LineEnd),
        };
        ended.map(|()| end + 1).map_err(|doubt| (end, doubt))
    }

    fn trailer(&mut self, text: &[u8]) -> Result<(), Doubt> {
        if text.is_empty() {
            self.state = State::Head;
        } else if is_folded(text) {
            return Err(Doubt::Fold);
        }
        Ok(())
    }

    /// Takes note of a head's line, without its end.
    fn head_line(&mut self, text: &[u8]) -> Result<(), Doubt> {
        if text.is_empty() {
            // Lines before a request are skipped (RFC 9112 §2.2).
            if self.head.began {
                self.state = self.framing();
                self.head = Head::default();
            }
            return Ok(());
        }
        if !self.head.began {
            self.head.began = true;
            self.head.is_connect = text.starts_with(b"CONNECT ");
            return Ok(());
        }
        if is_folded(text) {
            return Err(Doubt::Fold);
        }
        // Without a colon hyper refuses it.
        let Some(colon) = text.iter().position(|byte| *byte == b':') else { return Ok(()) };
        let (name, value) = text.split_at(colon);
        if name.last().is_some_and(u8::is_ascii_whitespace) {
            return Err(Doubt::Blank);
        }
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        match name.len() {
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                self.head.has_upgrade = true;
                let mut protocols = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                self.head.has_h2c |= protocols.any(|protocol| protocol.eq_ignore_ascii_case(b"h2c"));
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let is_first = self.head.length.is_none();
                self.head.length = digits(value).filter(|_| is_first).map(Some).ok_or(Doubt::Length)?;
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.head.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Doubt::Coding);
                }
                self.head.is_chunked = true;
            }
            _ => {}
        }
        if self.head.is_chunked && self.head.length.is_some() { Err(Doubt::TwoFramings) } else { Ok(()) }
    }

    /// How the bytes after a head are framed.
    fn framing(&self) -> State {
        let Head { length, is_chunked, has_upgrade, has_h2c, is_connect, .. } = self.head;
        match length {
            None if is_chunked => State::Size { bytes: 0, digits: 0 },
            Some(length) if length > 0 => State::Length(length),
            _ if is_connect || (has_upgrade && !has_h2c) => State::Open,
            _ => State::Head,
        }
    }
}

fn is_folded(text: &[u8]) -> bool {
    matches!(text.first(), Some(b' ' | b'\t'))
}

/// Reads a Content-Length (RFC 9112 §6.2: digits alone).
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > DIGITS_MAX || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Looks at `bytes` in pieces of `size`; returns where it stopped.
    fn look(bytes: &[u8], size: usize) -> Option<Stop> {
        let mut gate = Gate::default();
        let mut before = 0;
        for piece in bytes.chunks(size) {
            if let Err(stop) = gate.look(piece) {
                assert!(gate.is_stopped() && gate.look(b"GET").is_err(), "nothing passes after a doubt");
                return Some(Stop { at: before + stop.at, ..stop });
            }
            before += piece.len();
        }
        None
    }

    #[track_caller]
    fn check(request: &str, doubt: Option<(Doubt, bool)>) {
        // Also as the second request of a connection, after each kind of body.
        let firsts = [
            "",
            "\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 8\r\n\r\n\r\nGET\n \0",
            "POST / HTTP/1.1\r\nTRANSFER-encoding:chunked\r\n\r\n5;a=b\r\n\r\n\0\n \r\n0 \r\nx-a: b\r\n\r\n",
        ];
        for first in firsts {
            let whole = format!("{first}{request}");
            for size in [1, 2, 7, whole.len()] {
                let found = look(whole.as_bytes(), size);
                assert_eq!(found.map(|stop| (stop.doubt, stop.in_head)), doubt, "{whole:?} in pieces of {size}");
                assert!(found.is_none_or(|stop| stop.at >= first.len()), "{found:?} of {whole:?}");
            }
        }
    }

    #[test]
    fn framing_in_doubt_is_found_wherever_it_stands() {
        let post = |headers: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
        let chunked = |body: &str| format!("{}{body}", post("transfer-encoding: chunked\r\n"));
        for (request, doubt) in [
            (post("content-length: 3\r\ntransfer-encoding: chunked\r\n"), Doubt::TwoFramings),
            (post("Transfer-Encoding: chunked\r\nx: y\r\nContent-length: 3\r\n"), Doubt::TwoFramings),
            (post("content-length: 3\r\ncontent-length: 3\r\n"), Doubt::Length),
            (post("content-length: 3\r\ncontent-length: 4\r\n"), Doubt::Length),
            (post("content-length: 3, 3\r\n"), Doubt::Length),
            (post("content-length: +3\r\n"), Doubt::Length),
            (post("content-length: \r\n"), Doubt::Length),
            (post("content-length: 99999999999999999999\r\n"), Doubt::Length),
            (post("transfer-encoding: gzip, chunked\r\n"), Doubt::Coding),
            (post("transfer-encoding: chunked, identity\r\n"), Doubt::Coding),
            (post("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n"), Doubt::Coding),
            (post("transfer-encoding: xchunked\r\n"), Doubt::Coding),
            (post("x-a: b\n"), Doubt::LineEnd),
            (post("x-a: b\rc\r\n"), Doubt::LineEnd),
            ("GET / HTTP/1.1\nhost: a\r\n\r\n".to_owned(), Doubt::LineEnd),
            ("GET / HTTP/1.1\r\nhost: a\r\n\n".to_owned(), Doubt::LineEnd),
            ("\nGET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), Doubt::LineEnd),
            (post("x-a: \0\r\n"), Doubt::Nul),
            (post("x-a: b\r\n c\r\n"), Doubt::Fold),
            (post("content-length : 3\r\n"), Doubt::Blank),
        ] {
            check(&request, Some((doubt, true)));
        }
        for body in [
            "x",
            "\r\n",
            "5\n",
            "-5\r\n",
            "0x5\r\n",
            "1000000000000000\r\n",
            "1\r\nab",
            "1\r\na\n",
            "5;a=\nb\r\n",
            "5 \r5",
        ] {
            check(&chunked(body), Some((Doubt::Chunk, false)));
        }
        check(&chunked(&format!("5;{}\r\n", "a".repeat(300))), Some((Doubt::Chunk, false)));
        check(&chunked("0\r\nx-a: b\nx-c: d\r\n\r\n"), Some((Doubt::LineEnd, false)));
        check(&chunked("0\r\nx-a: b\r\n c\r\n\r\n"), Some((Doubt::Fold, false)));
    }

    #[test]
    fn what_is_well_framed_passes() {
        for request in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length:0\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: \t5 \r\n\r\n\n\n\n\n\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\nA\r\n0123456789\r\n000\r\n\r\n",
            "GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\0\n\r raw",
            "CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n\0\n\r raw",
        ] {
            check(request, None);
        }
        // A body is read by its length, whatever the head asks for besides.
        check("POST / HTTP/1.1\r\nupgrade: raw\r\ncontent-length: 1\r\n\r\na\n", Some((Doubt::LineEnd, true)));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(bytes in "[GA1\r\n:; 0,]{0,60}", size in 1_usize..9) {
            let heads = ["", "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", "POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n"];
            for head in heads {
                let whole = format!("{head}{bytes}");
                prop_assert_eq!(look(whole.as_bytes(), whole.len().max(1)), look(whole.as_bytes(), size));
            }
        }
    }
}

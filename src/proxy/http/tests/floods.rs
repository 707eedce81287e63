//! Callers that flood an HTTP/2 connection, frame by frame over a raw socket: each is stopped within a bound, and the
//! others go on.

use super::*;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// What a flood may send before it is stopped: what the sockets between both hold, and weft's own bounds.
const FLOOD_BYTES_MAX: usize = 64 << 20;

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A head block for `GET http://web/hang`: static entries and literals without indexing (RFC 7541 §6).
fn block() -> Vec<u8> {
    [&[0x82, 0x86, 0x04, 5][..], b"/hang", &[0x01, 3], b"web"].concat()
}

/// Sends `flood` again and again without reading; returns how many bytes went out before the connection took no more.
async fn flood(stream: &mut TcpStream, mut flood: impl FnMut() -> Vec<u8>) -> usize {
    let mut sent = 0;
    while sent < FLOOD_BYTES_MAX {
        let bytes = flood();
        // A connection that is read no more is full within milliseconds, and stays so.
        match tokio::time::timeout(Duration::from_millis(500), stream.write_all(&bytes)).await {
            Ok(Ok(())) => sent += bytes.len(),
            Ok(Err(_closed)) => return sent,
            Err(_full) => return sent,
        }
    }
    sent
}

/// Reads what the server says until it ends the connection; returns the reason of its GOAWAY, if it says one.
async fn goaway(stream: &mut TcpStream) -> Option<u32> {
    let mut bytes = Vec::new();
    let _reset = stream.read_to_end(&mut bytes).await;
    let mut rest = &bytes[..];
    while rest.len() >= 9 {
        let length = usize::from(rest[0]) << 16 | usize::from(rest[1]) << 8 | usize::from(rest[2]);
        if rest[3] == GOAWAY {
            let code = rest.get(13..17)?;
            let code = u32::from_be_bytes(code.try_into().unwrap());
            if code != 0 {
                return Some(code);
            }
        }
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    None
}

async fn begin(port: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
    stream
}

/// Others are served as before.
async fn assert_serves(setup: &Setup) {
    let answer = raw(setup.port, b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// ENHANCE_YOUR_CALM, PROTOCOL_ERROR, COMPRESSION_ERROR, FRAME_SIZE_ERROR: each is an end that names its reason.
const ENDS: [u32; 4] = [11, 1, 9, 6];

#[test]
fn requests_that_are_reset_at_once_end_the_connection_before_many_reach_the_app() {
    run(async {
        let mut setup = setup().await;
        let mut stream = begin(setup.port).await;
        let mut id = 1;
        let many = |id: &mut u32| {
            let mut bytes = Vec::new();
            for _ in 0..1000 {
                bytes.extend(frame(HEADERS, END_STREAM | END_HEADERS, *id, &block()));
                bytes.extend(frame(RST_STREAM, 0, *id, &8_u32.to_be_bytes()));
                *id += 2;
            }
            bytes
        };
        flood(&mut stream, || many(&mut id)).await;
        let mut reached = 0;
        while let Ok(message) = setup.messages.try_recv() {
            reached += usize::from(message == "GET /hang");
        }
        assert!(reached <= 64, "{reached} of {} requests reached the app", id / 2);
        assert_eq!(goaway(&mut stream).await.unwrap_or(11), 11, "ENHANCE_YOUR_CALM");
        assert_serves(&setup).await;
    });
}

#[test]
fn a_head_without_end_is_cut_off() {
    run(async {
        let setup = setup().await;
        let mut stream = begin(setup.port).await;
        stream.write_all(&frame(HEADERS, END_STREAM, 1, &block())).await.unwrap();
        // Literals without indexing, 8 KiB each.
        let line = [&[0x00, 3][..], b"x-a", &[0x7f, 0x81, 0x3f], &[b'y'; 8192]].concat();
        let sent = flood(&mut stream, || frame(CONTINUATION, 0, 1, &line)).await;
        assert!(sent < FLOOD_BYTES_MAX, "{sent} bytes of one head were taken");
        let code = goaway(&mut stream).await;
        assert!(code.is_none_or(|code| ENDS.contains(&code)), "{code:?}");
        assert_serves(&setup).await;
    });
}

#[test]
fn who_does_not_read_the_answers_to_ping_and_settings_is_not_read_either() {
    run(async {
        let setup = setup().await;
        for one in [frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100])] {
            let mut stream = begin(setup.port).await;
            let sent = flood(&mut stream, || one.repeat(4096)).await;
            assert!(sent < FLOOD_BYTES_MAX, "{sent} bytes were answered to nobody");
            assert_serves(&setup).await;
        }
    });
}

#[test]
fn frames_that_break_the_rules_end_the_connection() {
    run(async {
        let mut setup = setup().await;
        let head = || frame(HEADERS, END_HEADERS, 1, &block());
        let bad: [(&str, Vec<u8>); 9] = [
            ("DATA on stream 0", frame(DATA, 0, 0, b"x")),
            ("DATA on an idle stream", frame(DATA, 0, 5, b"x")),
            ("HEADERS on stream 0", frame(HEADERS, END_HEADERS, 0, &block())),
            ("HEADERS of an even stream", frame(HEADERS, END_HEADERS | END_STREAM, 2, &block())),
            ("CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1, &block())),
            ("another frame inside a head", [frame(HEADERS, 0, 1, &block()), frame(PING, 0, 0, &[0; 8])].concat()),
            ("SETTINGS of a wrong length", frame(SETTINGS, 0, 0, &[0; 5])),
            ("PING of a wrong length", frame(PING, 0, 0, &[0; 7])),
            ("a frame over the size", [head(), frame(DATA, 0, 1, &vec![0; 20_000])].concat()),
        ];
        for (what, bytes) in bad {
            let mut stream = begin(setup.port).await;
            let _closed = stream.write_all(&bytes).await;
            let ended = tokio::time::timeout(Duration::from_secs(5), goaway(&mut stream)).await;
            let code = ended.unwrap_or_else(|_| panic!("{what}: the connection goes on"));
            assert!(code.is_some_and(|code| (1..=13).contains(&code)), "{what}: {code:?}");
        }
        while let Ok(message) = setup.messages.try_recv() {
            assert!(["GET /hang", "dropped"].contains(&message.as_str()), "{message}");
        }
        assert_serves(&setup).await;
    });
}

#[test]
fn heads_that_http2_forbids_reset_their_stream_and_never_reach_the_app() {
    run(async {
        let mut setup = setup().await;
        let literal = |name: &str, value: &str| {
            let [name_len, value_len] = [name.len(), value.len()].map(|len| u8::try_from(len).unwrap());
            [&[0x00, name_len], name.as_bytes(), &[value_len], value.as_bytes()].concat()
        };
        let bad = [
            ("an upper-case name", literal("X-Upper", "1")),
            ("connection", literal("connection", "close")),
            ("transfer-encoding", literal("transfer-encoding", "chunked")),
            ("upgrade", literal("upgrade", "h2c")),
            ("te other than trailers", literal("te", "gzip")),
            ("a pseudo-header after a header", [literal("x-a", "b"), literal(":path", "/b")].concat()),
            ("an unknown pseudo-header", literal(":other", "b")),
            ("a second path", literal(":path", "/b")),
            ("a line end in a value", literal("x-a", "b\r\nhost: other")),
            ("a NUL in a value", literal("x-a", "b\0")),
            ("another Host", literal("host", "other")),
        ];
        for (what, more) in bad {
            let mut stream = begin(setup.port).await;
            let head = [block(), more].concat();
            stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &head)).await.unwrap();
            let mut seen = Vec::new();
            let refused = async {
                // A reset of the stream, a GOAWAY with a reason, or an answer of weft's own.
                while !(is_in(&seen, RST_STREAM) || is_in(&seen, GOAWAY) || is_in(&seen, HEADERS)) {
                    if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
            };
            let ended = tokio::time::timeout(Duration::from_secs(5), refused).await;
            assert!(ended.is_ok(), "{what}: nothing came of it");
            assert!(setup.messages.try_recv().is_err(), "{what} reached the app");
        }
        assert_serves(&setup).await;
    });
}

/// Tells whether a frame of `kind` is among `bytes`.
fn is_in(bytes: &[u8], kind: u8) -> bool {
    let mut rest = bytes;
    while rest.len() >= 9 {
        let length = usize::from(rest[0]) << 16 | usize::from(rest[1]) << 8 | usize::from(rest[2]);
        if rest[3] == kind {
            return true;
        }
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    false
}

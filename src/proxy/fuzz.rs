//! Fuzz targets of this module; see `crate::fuzz`.

#![allow(clippy::unwrap_used, reason = "a target fails by panicking")]

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

use super::head::{BodyDecoder, HeadWriter, Inbox, RequestHead, ResponseHead, decode_request};
use super::preamble::{PREAMBLE_BYTES_MAX, Preamble};

/// The first bytes of a stream.
pub(crate) fn preamble(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    match Preamble::decode(&mut buffer) {
        Ok(Some(preamble)) => {
            assert!(bytes.ends_with(&buffer), "what follows is left alone");
            let again = preamble.encode();
            assert!(again.len() <= PREAMBLE_BYTES_MAX);
            assert_eq!(Preamble::decode(&mut BytesMut::from(&again[..])), Ok(Some(preamble.clone())));
            let at_hand = |instance: &str, service: &str| Some((instance.parse().unwrap(), service.parse().unwrap()));
            assert_eq!(Preamble::decode_with(&mut BytesMut::from(bytes), at_hand), Ok(Some(preamble)));
        }
        Ok(None) => {
            assert_eq!(&buffer[..], bytes);
            assert!(bytes.len() < PREAMBLE_BYTES_MAX, "more is awaited than a preamble has");
        }
        Err(_) => {}
    }
}

/// A head and a body: the first byte says which end reads it.
pub(crate) fn head(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let mut inbox = Inbox::default();
    inbox.push(Bytes::copy_from_slice(bytes));
    match kind {
        0 => {
            let Ok(Some(block)) = inbox.take_block() else { return };
            let Ok(head) = decode_request(&block) else { return };
            let again = written(&head);
            let mut second = Inbox::default();
            second.push(again);
            let back = decode_request(&second.take_block().unwrap().expect("it is whole")).expect("it is a head");
            assert_eq!(format!("{head:?}"), format!("{back:?}"));
        }
        1 => {
            let Ok(Some(head)) = inbox.take_response() else { return };
            let mut second = Inbox::default();
            second.push(answered(&head));
            let back = second.take_response().unwrap().expect("it is whole");
            assert_eq!(format!("{head:?}"), format!("{back:?}"));
        }
        _ => {}
    }
    let mut decoder = BodyDecoder::default();
    let mut passed = 0;
    while let Ok(Some(frame)) = decoder.next(&mut inbox) {
        passed += frame.data_ref().map_or(1, Bytes::len);
        assert!(passed <= bytes.len() + 1, "more comes out than went in");
    }
}

fn put(mut writer: HeadWriter<'_>, headers: &HeaderMap) {
    for (name, value) in headers {
        writer.header(name, value.as_bytes());
    }
    writer.finish().expect("what was read fits a head");
}

fn written(head: &RequestHead) -> Bytes {
    let mut out = BytesMut::new();
    let authority = head.authority.as_ref().map_or("", |authority| authority.as_str());
    let target = (authority.as_bytes(), head.path.as_str().as_bytes());
    put(HeadWriter::request(&mut out, head.payload, &head.method, target), &head.headers);
    out.freeze()
}

fn answered(head: &ResponseHead) -> Bytes {
    let mut out = BytesMut::new();
    put(HeadWriter::response(&mut out, head.payload, head.status), &head.headers);
    out.freeze()
}

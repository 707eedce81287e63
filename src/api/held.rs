//! A body that holds its room until it has left: the permit goes with the bytes, piece by piece, to whoever writes them out.
//! The answer says so ([`HoldsRoom`]): its client must take it at a pace of its own (`serve`).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

/// Bytes that are handed over at once. A writer keeps or copies what it was handed: the rest holds the room meanwhile.
const PIECE_BYTES: usize = 16 * 1024;

/// Marks an answer, among its extensions, whose body holds room.
#[derive(Debug, Clone, Copy)]
pub(super) struct HoldsRoom {
    /// Of the body as it leaves.
    pub(super) bytes: usize,
}

/// Makes a body of `bytes` that gives `room` back when the last of it was written or dropped.
pub(super) fn body(bytes: Vec<u8>, room: OwnedSemaphorePermit) -> Body {
    Body::new(Pieces { left: Bytes::from_owner(Owned { bytes, _room: room }) })
}

struct Owned {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Slices of one allocation.
struct Pieces {
    left: Bytes,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        let piece = match self.left.len() {
            0 => return Poll::Ready(None),
            // Nothing is left that would hold the room.
            1..=PIECE_BYTES => std::mem::take(&mut self.left),
            _ => self.left.split_to(PIECE_BYTES),
        };
        Poll::Ready(Some(Ok(http_body::Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body::Body as _;
    use http_body_util::BodyExt as _;
    use tokio::sync::Semaphore;

    use super::*;

    fn held(bytes: usize) -> (Arc<Semaphore>, Body) {
        let places = Arc::new(Semaphore::new(1));
        let room = Arc::clone(&places).try_acquire_owned().unwrap();
        (places, body(vec![7; bytes], room))
    }

    #[tokio::test]
    async fn room_is_held_until_the_last_piece_is_gone() {
        let (places, mut body) = held(2 * PIECE_BYTES + 1);
        assert_eq!(body.size_hint().exact(), Some(2 * PIECE_BYTES as u64 + 1));
        let mut pieces = Vec::new();
        while let Some(frame) = body.frame().await {
            pieces.push(frame.unwrap().into_data().unwrap());
        }
        assert!(body.is_end_stream());
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [PIECE_BYTES, PIECE_BYTES, 1]);
        drop(body);
        let last = pieces.pop();
        drop(pieces);
        assert_eq!(places.available_permits(), 0, "one piece is not written yet");
        drop(last);
        assert_eq!(places.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_client_that_goes_away_gives_it_back() {
        let (places, mut body) = held(3 * PIECE_BYTES);
        let first = body.frame().await.unwrap().unwrap();
        drop(first);
        assert_eq!(places.available_permits(), 0);
        drop(body);
        assert_eq!(places.available_permits(), 1);
        let (places, body) = held(0);
        assert!(body.is_end_stream());
        drop(body);
        assert_eq!(places.available_permits(), 1);
    }
}

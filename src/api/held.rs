//! Room for answers on their way: what waits for a slow reader is bounded in sum, over all connections.
//!
//! An answer of more than [`FREE_BYTES_MAX`] takes room for its bytes as they leave; where there is none it is refused. The body
//! holds its room until it has left: the permit goes with the bytes, piece by piece, to whoever writes them out. The answer says
//! so ([`HoldsRoom`]): its client must take it at a pace, and where another is refused for want of room ([`WantsRoom`]), those
//! who are behind are given up first (`serve`).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use prometheus::IntCounter;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use super::call::Refusal;
use crate::clock;
use crate::hearsay::Seldom;

/// Most bytes of answers that hold room at once, in KiB: 128 MiB.
pub(super) const ROOM_KIB_MAX: usize = 128 * 1024;
/// Longest answer that holds no room, in bytes, as it leaves: half of what a connection may buffer anyway.
pub(super) const FREE_BYTES_MAX: usize = 16 * 1024;

/// Bytes that are handed over at once. A writer keeps or copies what it was handed: the rest holds the room meanwhile.
const PIECE_BYTES: usize = 16 * 1024;

/// Marks an answer, among its extensions, whose body holds room.
#[derive(Debug, Clone, Copy)]
pub(super) struct HoldsRoom {
    /// Of the body as it leaves.
    pub(super) bytes: usize,
}

/// Marks an answer, among its extensions, that stands in the place of one for which there was no room.
#[derive(Debug, Clone, Copy)]
pub(super) struct WantsRoom {
    /// Of the answer that was refused.
    pub(super) bytes: usize,
}

/// Where answers take their room.
#[derive(Debug)]
pub(super) struct Room {
    /// KiB.
    places: Arc<Semaphore>,
    refused: IntCounter,
    told: Seldom,
}

impl Room {
    /// Makes room for [`ROOM_KIB_MAX`]; counts in `refused` who gets none.
    pub(super) fn new(refused: IntCounter) -> Self {
        Self { places: Arc::new(Semaphore::new(ROOM_KIB_MAX)), refused, told: Seldom::default() }
    }

    /// Takes room for an answer of `bytes` until the permit is dropped. One that is larger than all there is takes all.
    ///
    /// # Errors
    /// 429; a line of the log says so once a minute.
    pub(super) fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        let kib = u32::try_from(bytes.div_ceil(1024).clamp(1, ROOM_KIB_MAX)).unwrap_or(u32::MAX);
        Arc::clone(&self.places).try_acquire_many_owned(kib).map_err(|_| {
            self.refused.inc();
            if let Some(left_out) = self.told.due(clock::now()) {
                let mib_max = ROOM_KIB_MAX / 1024;
                warn!(bytes, mib_max, left_out, "refused an answer of the HTTP API: others wait for slow clients");
            }
            Refusal::without_room(bytes)
        })
    }

    /// What takes the room, for tests that look at it.
    #[cfg(test)]
    pub(super) fn places(&self) -> &Arc<Semaphore> {
        &self.places
    }

    /// Makes `bytes` the body of `response`. They hold `taken`, or else take room here unless they are few.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(super) fn fill(
        &self,
        response: &mut Response,
        mut bytes: Vec<u8>,
        taken: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Refusal> {
        if taken.is_none() && bytes.len() <= FREE_BYTES_MAX {
            *response.body_mut() = Body::from(bytes);
            return Ok(());
        }
        let taken = match taken {
            Some(taken) => taken,
            None => self.take(bytes.len())?,
        };
        // A writer's vector is up to twice as large as what is in it.
        bytes.shrink_to_fit();
        response.extensions_mut().insert(HoldsRoom { bytes: bytes.len() });
        *response.body_mut() = body(bytes, taken);
        Ok(())
    }
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
    use http_body::Body as _;
    use http_body_util::BodyExt as _;

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

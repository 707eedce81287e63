//! One stream of an exchange: bounded frames, bounded steps, and a question to the task that knows the answer.
//!
//! ```text
//!   open: first frame (which exchange) -> say, hear ... -> end
//! ```
//!
//! Not here: what is said (`engine::message`, `documents::carry`, `shared::carry`).

use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use super::engine::Message;
use super::exchange::ExchangeError;
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Longest time that one frame, or one run of raw bytes, is waited for.
const STEP_TIME_MAX: Duration = Duration::from_secs(10);
/// Largest frame of raw bytes.
pub(super) const CHUNK_BYTES: usize = 128 * 1024;

/// One bidirectional stream. Frames say how long they are, so that what is cut off never looks whole.
pub(super) struct Talk {
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
}

impl Talk {
    /// Opens a stream and says `first` on it.
    pub(super) async fn open(connection: &Connection, first: &Message) -> Result<Self, ExchangeError> {
        let (send, recv) = connection.open_bi().await?;
        let mut talk = Self { send, recv };
        talk.say_frame(&first.encode()?).await?;
        Ok(talk)
    }

    /// Says one value, as one frame.
    pub(super) async fn say<T: Serialize>(&mut self, value: &T) -> Result<(), ExchangeError> {
        self.say_frame(&wire::encode(value)?).await
    }

    pub(super) async fn say_frame(&mut self, frame: &[u8]) -> Result<(), ExchangeError> {
        Ok(wire::write_frame(&mut self.send, frame).await?)
    }

    /// Hears one value, of one frame of at most [`FRAME_BYTES_MAX`].
    pub(super) async fn hear<T: DeserializeOwned>(&mut self) -> Result<T, ExchangeError> {
        let frame = self.hear_frame(FRAME_BYTES_MAX).await?;
        Ok(wire::decode(&frame, FRAME_BYTES_MAX)?)
    }

    pub(super) async fn hear_frame(&mut self, bytes_max: usize) -> Result<Vec<u8>, ExchangeError> {
        let heard = tokio::time::timeout(STEP_TIME_MAX, wire::read_frame(&mut self.recv, bytes_max));
        Ok(heard.await.map_err(|_| ExchangeError::Late)??)
    }

    /// Says raw bytes, in frames of at most [`CHUNK_BYTES`]; nothing where there are none.
    pub(super) async fn say_bytes(&mut self, bytes: &[u8]) -> Result<(), ExchangeError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.say_frame(chunk).await?;
        }
        Ok(())
    }

    /// Hears as many raw bytes as were announced, which the caller has bounded, all of them in one step's time.
    pub(super) async fn hear_bytes(&mut self, bytes: usize) -> Result<Vec<u8>, ExchangeError> {
        let mut heard = Vec::new();
        let reading = async {
            while heard.len() < bytes {
                let chunk = wire::read_frame(&mut self.recv, CHUNK_BYTES.min(bytes - heard.len())).await?;
                if chunk.is_empty() {
                    return Err(WireError::Empty);
                }
                heard.extend_from_slice(&chunk);
            }
            Ok(())
        };
        tokio::time::timeout(STEP_TIME_MAX, reading).await.map_err(|_| ExchangeError::Late)??;
        Ok(heard)
    }

    /// Says that nothing more comes from this side.
    pub(super) fn finish(&mut self) {
        let _finished_before = self.send.finish();
    }

    /// Takes the end of the peer's stream: a stream that is dropped before costs a packet that says so, and another for
    /// the answer to that. Whatever comes in its place is as good as an end.
    pub(super) async fn ended(&mut self) {
        let _end = self.recv.read_to_end(0).await;
    }

    /// Ends this side and waits for the other.
    pub(super) async fn end(&mut self) {
        self.finish();
        self.ended().await;
    }
}

/// Puts a question to the task behind `task` and waits for its answer.
pub(super) async fn ask<O: From<Q>, Q, T>(
    task: &mpsc::Sender<O>,
    question: impl FnOnce(oneshot::Sender<T>) -> Q,
) -> Result<T, ExchangeError> {
    let (reply, answer) = oneshot::channel();
    task.send(question(reply).into()).await.map_err(|_| ExchangeError::Closed)?;
    answer.await.map_err(|_| ExchangeError::Closed)
}

/// Answers if the other side still waits.
pub(super) fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    let _unwanted = reply.send(value);
}

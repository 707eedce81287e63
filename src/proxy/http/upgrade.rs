//! Raw bytes after a 101, or on an extended CONNECT, both ways, with half-close; silence ends them as it ends TCP.

use std::cell::Cell;
use std::time::Duration;

use bytes::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use quinn::RecvStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::debug;

use super::body::{BodyError, TunnelSend};
use crate::clock;
use crate::proxy::relay::silence;

/// Bytes read from the app at once: one write of a WebSocket frame of usual size.
const READ_BYTES: usize = 8 * 1024;

/// One side of an upgraded connection, taken back from hyper.
pub(crate) enum Raw {
    /// A connection of its own, and what hyper read beyond the head.
    Tcp { stream: TcpStream, read: Bytes },
    /// A stream of an HTTP/2 connection; dropped before its end it is reset.
    Stream(Box<TokioIo<Upgraded>>),
}

impl Raw {
    /// Takes the connection out of `I`; what is no `I` is an HTTP/2 stream.
    pub(crate) fn of<I>(upgraded: Upgraded) -> Self
    where
        I: hyper::rt::Read + hyper::rt::Write + Into<TcpStream> + Unpin + 'static,
    {
        match upgraded.downcast::<I>() {
            Ok(parts) => Self::Tcp { stream: parts.io.into(), read: parts.read_buf },
            Err(upgraded) => Self::Stream(Box::new(TokioIo::new(upgraded))),
        }
    }
}

/// Why an upgraded connection ended early.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("the app's connection broke")]
    App(#[source] std::io::Error),
    #[error("the tunnel's stream broke")]
    Tunnel(#[source] BodyError),
    #[error("nothing moved for {0:?}")]
    Silence(Duration),
}

/// Relays until both directions ended; a failure of either aborts both, and so does silence for `idle`.
pub(crate) async fn relay(raw: Raw, send: TunnelSend, recv: RecvStream, received: Bytes, idle: Duration) {
    let relayed = match raw {
        Raw::Tcp { mut stream, read } => {
            let relayed = both(stream.split(), read, (send, recv), received, idle).await;
            if relayed.is_err() {
                // RST, not FIN: the app must not take a broken stream for a finished one.
                let _closed = stream.set_zero_linger();
            }
            relayed
        }
        Raw::Stream(stream) => both(tokio::io::split(stream), Bytes::new(), (send, recv), received, idle).await,
    };
    if let Err(error) = relayed {
        debug!(error = %error, "upgraded connection aborted");
    }
}

async fn both(
    (mut from_app, mut to_app): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    read: Bytes,
    (mut send, mut recv): (TunnelSend, RecvStream),
    received: Bytes,
    idle: Duration,
) -> Result<(), RelayError> {
    let moved_at = Cell::new(clock::now());
    let moves = || moved_at.set(clock::now());
    let up = async {
        send.write(&mut [read]).await.map_err(RelayError::Tunnel)?;
        let mut buffer = bytes::BytesMut::new();
        loop {
            buffer.reserve(READ_BYTES);
            let count = tokio::select! {
                biased;
                count = from_app.read_buf(&mut buffer) => count.map_err(RelayError::App)?,
                error = send.stopped() => return Err(RelayError::Tunnel(error)),
            };
            if count == 0 {
                send.finish();
                return Ok(());
            }
            send.write(&mut [buffer.split().freeze()]).await.map_err(RelayError::Tunnel)?;
            moves();
        }
    };
    let down = async {
        to_app.write_all(&received).await.map_err(RelayError::App)?;
        loop {
            let chunk = recv.read_chunk(READ_BYTES.saturating_mul(8), true).await;
            match chunk.map_err(|error| RelayError::Tunnel(BodyError::Read(error)))? {
                Some(chunk) => {
                    to_app.write_all(&chunk.bytes).await.map_err(RelayError::App)?;
                    to_app.flush().await.map_err(RelayError::App)?;
                    moves();
                }
                None => return to_app.shutdown().await.map_err(RelayError::App),
            }
        }
    };
    tokio::select! {
        ended = async { tokio::try_join!(up, down) } => ended.map(|((), ())| ()),
        () = silence(&moved_at, idle) => Err(RelayError::Silence(idle)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::relay::IDLE_TIMEOUT;
    use crate::transport::fixture::pair_with;

    #[tokio::test]
    async fn an_hour_of_silence_ends_an_upgraded_stream_and_each_byte_begins_it_anew() {
        let mut patient = quinn::TransportConfig::default();
        patient.max_idle_timeout(None);
        let pair = pair_with(patient).await;
        let (mut send, recv) = pair.dialer.open_bi().await.unwrap();
        send.write_all(b"!").await.unwrap();
        let (mut far_send, mut far_recv) = pair.listener.accept_bi().await.unwrap();
        far_recv.read_exact(&mut [0]).await.unwrap();
        let (mut app, own) = tokio::io::duplex(64);

        // From here on an hour is over at once if nothing happens in it.
        tokio::time::pause();
        let talk = async {
            for turn in 0..4 {
                tokio::time::sleep(Duration::from_mins(59)).await;
                if turn % 2 == 0 {
                    app.write_all(b"x").await.unwrap();
                    far_recv.read_exact(&mut [0]).await.unwrap();
                } else {
                    far_send.write_all(b"y").await.unwrap();
                    app.read_exact(&mut [0]).await.unwrap();
                }
            }
            clock::now()
        };
        let ends = (TunnelSend::new(send), recv);
        let relayed = both(tokio::io::split(own), Bytes::new(), ends, Bytes::new(), IDLE_TIMEOUT);
        let (ended, last) = tokio::join!(relayed, talk);
        assert!(matches!(ended, Err(RelayError::Silence(IDLE_TIMEOUT))), "{ended:?}");
        let silence = clock::now() - last;
        assert!((Duration::from_mins(59)..Duration::from_mins(61)).contains(&silence), "{silence:?}");
        assert!(matches!(far_recv.read(&mut [0]).await, Err(quinn::ReadError::Reset(_))), "it looks finished");
    }
}

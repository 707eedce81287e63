//! Raw bytes after a 101, or on an extended CONNECT, both ways, with half-close.

use bytes::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use quinn::RecvStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::debug;

use super::body::{BodyError, TunnelSend};

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
}

/// Relays until both directions ended; a failure of either aborts both.
pub(crate) async fn relay(raw: Raw, send: TunnelSend, recv: RecvStream, received: Bytes) {
    let relayed = match raw {
        Raw::Tcp { mut stream, read } => {
            let relayed = both(stream.split(), read, (send, recv), received).await;
            if relayed.is_err() {
                // RST, not FIN: the app must not take a broken stream for a finished one.
                let _closed = stream.set_zero_linger();
            }
            relayed
        }
        Raw::Stream(stream) => both(tokio::io::split(stream), Bytes::new(), (send, recv), received).await,
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
) -> Result<(), RelayError> {
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
                }
                None => return to_app.shutdown().await.map_err(RelayError::App),
            }
        }
    };
    tokio::try_join!(up, down).map(|((), ())| ())
}

//! Raw bytes after a 101, both ways, with half-close.

use bytes::Bytes;
use quinn::RecvStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::debug;

use super::body::{BodyError, TunnelSend};

/// Bytes read from the app at once: one write of a WebSocket frame of usual size.
const READ_BYTES: usize = 8 * 1024;

/// One side of an upgraded connection, taken back from hyper.
pub(crate) struct Raw {
    /// The connection.
    pub(crate) stream: TcpStream,
    /// What hyper read beyond the head.
    pub(crate) read: Bytes,
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
pub(crate) async fn relay(raw: Raw, mut send: TunnelSend, mut recv: RecvStream, received: Bytes) {
    let Raw { mut stream, read } = raw;
    let relayed = {
        let (mut from_app, mut to_app) = stream.split();
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
                    Some(chunk) => to_app.write_all(&chunk.bytes).await.map_err(RelayError::App)?,
                    None => return to_app.shutdown().await.map_err(RelayError::App),
                }
            }
        };
        tokio::try_join!(up, down).map(|((), ())| ())
    };
    if let Err(error) = relayed {
        debug!(error = %error, "upgraded connection aborted");
        // RST, not FIN: the app must not take a broken stream for a finished one.
        let _closed = stream.set_zero_linger();
    }
}

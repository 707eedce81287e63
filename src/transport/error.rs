//! Why a connection did not come about, in words that say what to do.

use std::fmt;
use std::net::SocketAddr;

use quinn::ConnectionError;

use crate::model::NodeName;

/// Why a peer could not be connected. The text names the address and, for TLS failures, what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nothing came back.
    #[error("no answer from {addr}: is an agent running there, and do firewalls let UDP port {} pass both ways?", addr.port())]
    NoAnswer {
        /// Who was dialled.
        addr: SocketAddr,
    },
    /// The other agents say that the node failed, while it was dialled.
    #[error("{node} at {addr} has failed, as the other agents say: is its agent running (`weft members`)?")]
    NodeFailed {
        /// Who was dialled.
        addr: SocketAddr,
        /// Whose address it is.
        node: NodeName,
    },
    /// One side refused the other's certificate, or there was none that both could use.
    #[error(
        "TLS with {addr} failed: {reason}; compare trust domain, CA and clocks of both hosts (`weft info` shows them)"
    )]
    Tls {
        /// Who was dialled.
        addr: SocketAddr,
        /// What TLS said.
        reason: String,
    },
    /// Another node answers at the address.
    #[error("{addr} is {found}, not {wanted}: the address has moved to another node")]
    WrongNode {
        /// Who was dialled.
        addr: SocketAddr,
        /// Who was meant.
        wanted: NodeName,
        /// Who answered.
        found: NodeName,
    },
    /// The peer is there and closed the connection.
    #[error("{addr} closed the connection: {reason}")]
    Closed {
        /// Who was dialled.
        addr: SocketAddr,
        /// What it said.
        reason: String,
    },
    /// This side could not even begin.
    #[error("cannot dial {addr}: {reason}")]
    Local {
        /// Who was to be dialled.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
}

impl ConnectError {
    /// Sorts what QUIC says about a connection to `addr`.
    pub(crate) fn from_quic(addr: SocketAddr, error: &ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::NoAnswer { addr },
            ConnectionError::TransportError(inner) if is_tls(inner.code.into()) => {
                Self::Tls { addr, reason: format!("its certificate is refused here ({})", inner.reason) }
            }
            ConnectionError::ConnectionClosed(close) if is_tls(close.error_code.into()) => {
                let said = String::from_utf8_lossy(&close.reason);
                Self::Tls { addr, reason: format!("it refuses this node's certificate ({}: {said})", close.error_code) }
            }
            ConnectionError::LocallyClosed => Self::Local { addr, reason: "the agent is stopping".to_owned() },
            other => Self::Closed { addr, reason: other.to_string() },
        }
    }

    /// Returns a word for metrics: `no_answer`, `node_failed`, `tls`, `wrong_node`, `closed`, `local`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoAnswer { .. } => "no_answer",
            Self::NodeFailed { .. } => "node_failed",
            Self::Tls { .. } => "tls",
            Self::WrongNode { .. } => "wrong_node",
            Self::Closed { .. } => "closed",
            Self::Local { .. } => "local",
        }
    }
}

/// TLS alerts are the codes 0x100 to 0x1ff (RFC 9001 §4.8).
fn is_tls(code: u64) -> bool {
    (0x100..0x200).contains(&code)
}

/// Prints an error with its sources: `cannot read x: permission denied`.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0, f)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_names_the_port_and_what_to_look_at() {
        let error = ConnectError::from_quic("10.0.0.1:8301".parse().unwrap(), &ConnectionError::TimedOut);
        let text = error.to_string();
        assert!(
            text.contains("10.0.0.1:8301") && text.contains("UDP port 8301") && text.contains("firewall"),
            "{text}"
        );
    }

    #[test]
    fn a_refused_certificate_says_which_side_refused() {
        let addr = "10.0.0.1:8301".parse().unwrap();
        let local = quinn_error(48, "invalid peer certificate: UnknownIssuer");
        let text = ConnectError::from_quic(addr, &local).to_string();
        assert!(text.contains("refused here") && text.contains("UnknownIssuer"), "{text}");
    }

    fn quinn_error(alert: u8, reason: &str) -> ConnectionError {
        let mut error = ConnectionError::TransportError(quinn::TransportErrorCode::crypto(alert).into());
        if let ConnectionError::TransportError(inner) = &mut error {
            reason.clone_into(&mut inner.reason);
        }
        error
    }
}

//! How the endpoints are tuned; each figure was measured on two cores.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig,
    VarInt,
};

use super::congestion::TolerantConfig;
use super::steer::{self, Lane, SteeringIds};
use crate::pki::Plane;

/// Streams that a caller may have open on a fresh tunnel: quinn pays for each at the handshake (100: 35 KB, 0.4 ms;
/// 1,000: 165 KB). A busy tunnel is given more while it lives ([`TUNNEL_STREAMS_MAX`]).
pub(crate) const TUNNEL_STREAMS: u32 = 100;
/// Streams that one tunnel grows to at most: the connections that one worker accepts.
pub(crate) const TUNNEL_STREAMS_MAX: u32 = 16_384;
/// Streams of each kind on a gossip connection: eight syncs at once and room for pulls.
const GOSSIP_STREAMS: u32 = 32;
/// Streams on a join connection: one exchange and its repetition.
const JOIN_STREAMS: u32 = 4;
/// The windows of one plane's connections, in bytes.
struct Windows {
    /// Of one stream.
    stream: u32,
    /// Of all streams together: what one peer can make this side hold.
    connection: u32,
    /// What this side has sent and the peer not yet acknowledged.
    send: u32,
}

/// A stream fills a LAN's bandwidth-delay product. The connection's window is that of all streams of a fresh tunnel, so
/// that apps which do not read stop their own streams and nobody else's; memory is used only by what waits unread.
const TUNNEL_WINDOWS: Windows = Windows { stream: 2 << 20, connection: 200 << 20, send: 16 << 20 };
/// A frame of gossip has at most 256 KiB.
const GOSSIP_WINDOWS: Windows = Windows { stream: 512 << 10, connection: 4 << 20, send: 4 << 20 };
/// Strangers get room for one exchange, whose frames have at most 16 KiB.
const JOIN_WINDOWS: Windows = Windows { stream: 32 << 10, connection: 64 << 10, send: 64 << 10 };
/// Upper bound of MTU discovery: what a jumbo frame of 9,000 bytes has room for, over IPv4. quinn sends 10 segments per
/// GSO call, which may have 64 KiB: the socket lets it send as many as fit (`transport/socket.rs`).
const MTU_BOUND_BYTES: u16 = 8_972;
/// Packets of a tunnel that the peer may leave unacknowledged until it has something to send, or 25 ms have passed (QUIC's
/// Acknowledgement Frequency, draft-ietf-quic-ack-frequency; without it one, RFC 9000 §13.2.2). A gap is acknowledged at once.
/// More than these may always be on the way ([`super::congestion::WINDOW_PACKETS_MIN`]), so that nobody who sends much
/// waits for those 25 ms. quinn-proto 0.11.19 asks for it once per tunnel: where that packet is lost, the peer goes by the RFC.
pub(super) const UNACKNOWLEDGED_MAX: u8 = 3;
/// Keeps the mapping in a stateful firewall (30 s in the strictest), and notices a host that lost its power.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Silence after which a tunnel is given up, and what waits on it tried elsewhere: three keep-alives.
const TUNNEL_IDLE: Duration = Duration::from_secs(15);
/// Silence after which a join connection is given up.
const JOIN_IDLE: Duration = Duration::from_secs(30);
/// Silence after which a gossip connection is given up. A member is probed by one other about once in (members x probe
/// period): with 256 links that is 3 min, and a shorter limit would buy a handshake for nearly every probe. A peer that
/// restarts resets what it does not know; one that is gone is closed when membership says so.
const GOSSIP_IDLE: Duration = Duration::from_mins(10);
/// Datagrams that wait for their reader, or to be sent, in bytes: about 200 packets, 2 ms at 1 Gbit/s.
const DATAGRAM_BUFFER_BYTES: usize = 256 << 10;
/// Connection attempts that wait to be accepted, per endpoint; quinn refuses the next.
const INCOMING_MAX: usize = 1_024;
/// What waiting attempts may hold together, in bytes.
const INCOMING_BYTES: u64 = 4 << 20;
/// Handshakes that one endpoint runs at once: 256 take a tenth of a second of one core.
pub(crate) const HANDSHAKES_MAX: usize = 256;
/// From this many running handshakes on a newcomer proves its address first (RFC 9000 §8.1.2).
pub(crate) const RETRY_FROM: usize = 64;
/// A handshake takes at most this long.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Which side of a connection is tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Dialer,
    Listener,
}

/// Configures the endpoint of `lane`.
pub(super) fn endpoint(reset_key: &[u8; 64], lane: Lane) -> EndpointConfig {
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, reset_key);
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(move || Box::new(SteeringIds(lane)));
    if let Lane::Worker { .. } = lane {
        config.max_udp_payload_size(MTU_BOUND_BYTES).expect("the bound lies within 1,200 and 65,527");
    }
    config
}

/// Configures the accepting side of `plane`.
///
/// # Errors
/// If the TLS configuration has no cipher suite for QUIC's first packets.
pub(crate) fn server(plane: Plane, tls: Arc<rustls::ServerConfig>) -> Result<ServerConfig, String> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| error.to_string())?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(plane, Role::Listener));
    config.migration(true).max_incoming(INCOMING_MAX).incoming_buffer_size_total(INCOMING_BYTES);
    Ok(config)
}

/// Configures the dialing side of `plane`: its first datagram leads to the socket that serves the plane.
///
/// A dialer that does not use this (its first connection id is steered elsewhere) meets the wrong TLS side.
///
/// # Errors
/// If the TLS configuration has no cipher suite for QUIC's first packets.
pub fn client(plane: Plane, tls: Arc<rustls::ClientConfig>) -> Result<ClientConfig, String> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(plane, Role::Dialer));
    config.initial_dst_cid_provider(Arc::new(move || steer::first_id(plane)));
    Ok(config)
}

fn transport(plane: Plane, role: Role) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let idle = |limit: Duration| IdleTimeout::try_from(limit).expect("minutes fit the wire's milliseconds");
    let windows = match plane {
        Plane::Tunnel => TUNNEL_WINDOWS,
        Plane::Gossip => GOSSIP_WINDOWS,
        Plane::Join => JOIN_WINDOWS,
    };
    config.stream_receive_window(windows.stream.into());
    config.receive_window(windows.connection.into());
    config.send_window(windows.send.into());
    config.enable_segmentation_offload(true);
    match plane {
        Plane::Tunnel => {
            // Only the caller opens streams.
            let streams = if role == Role::Listener { TUNNEL_STREAMS } else { 0 };
            config.max_concurrent_bidi_streams(streams.into()).max_concurrent_uni_streams(VarInt::from_u32(0));
            // UDP's. Nothing is set aside: the buffers are lists, and a tunnel without flows has empty ones.
            config.datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES));
            config.datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES).max_idle_timeout(Some(idle(TUNNEL_IDLE)));
            // The caller alone knows which tunnels it keeps.
            config.keep_alive_interval((role == Role::Dialer).then_some(KEEP_ALIVE));
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(MTU_BOUND_BYTES);
            config.mtu_discovery_config(Some(discovery));
            config.congestion_controller_factory(Arc::new(TolerantConfig::default()));
            let mut acknowledged = AckFrequencyConfig::default();
            acknowledged
                .ack_eliciting_threshold(VarInt::from_u32(UNACKNOWLEDGED_MAX.into()))
                .reordering_threshold(VarInt::from_u32(1));
            config.ack_frequency_config(Some(acknowledged));
        }
        Plane::Gossip => {
            config.max_concurrent_bidi_streams(GOSSIP_STREAMS.into()).max_concurrent_uni_streams(GOSSIP_STREAMS.into());
            config.datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES));
            config.datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES).max_idle_timeout(Some(idle(GOSSIP_IDLE)));
            // A search takes some seven packets of 1,400 bytes each way, three times what the handshake takes, and
            // packets of SWIM fit the least that a path may carry.
            config.mtu_discovery_config(None);
        }
        Plane::Join => {
            config.max_concurrent_bidi_streams(JOIN_STREAMS.into()).max_concurrent_uni_streams(VarInt::from_u32(0));
            config.datagram_receive_buffer_size(None).max_idle_timeout(Some(idle(JOIN_IDLE)));
            config.mtu_discovery_config(None);
        }
    }
    Arc::new(config)
}

//! The PROXY protocol's header, version 2, by which an app over TCP learns who calls it (haproxy's `proxy-protocol.txt` §2.2).
//!
//! ```text
//!   signature 12 | 0x21 | family and TCP | u16 length | addresses, ports | SSL TLV { verified, CN = the caller's SPIFFE id }
//! ```
//!
//! The address is that of the caller's agent, as QUIC knows it: the mesh proves identities, and an address that a peer
//! merely says would be one to lie about. Written only: a header that comes from outside is bytes of the app's like any
//! other. Not here: which service asks for it (its registration).

use std::net::{IpAddr, SocketAddr};

use crate::model::SpiffeId;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, a relayed connection.
const VERSION_COMMAND: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// PP2_TYPE_SSL, and PP2_SUBTYPE_SSL_CN in it.
const TYPE_SSL: u8 = 0x20;
const TYPE_SSL_CN: u8 = 0x22;
/// PP2_CLIENT_SSL and PP2_CLIENT_CERT_CONN: over TLS, with a certificate shown on this connection.
const CLIENT: u8 = 0x03;

/// Writes the header of a call by `caller` from `from`, to the app at `to`.
pub(super) fn header(from: SocketAddr, to: SocketAddr, caller: &SpiffeId) -> Vec<u8> {
    let (from, to) = (canonical(from), canonical(to));
    let mut body = Vec::with_capacity(160);
    let family = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend_from_slice(&source.octets());
            body.extend_from_slice(&destination.octets());
            TCP4
        }
        (source, destination) => {
            for ip in [source, destination] {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                body.extend_from_slice(&ip.octets());
            }
            TCP6
        }
    };
    for port in [from.port(), to.port()] {
        body.extend_from_slice(&port.to_be_bytes());
    }
    let mut ssl = vec![CLIENT, 0, 0, 0, 0];
    put(&mut ssl, TYPE_SSL_CN, caller.to_string().as_bytes());
    put(&mut body, TYPE_SSL, &ssl);
    let mut header = SIGNATURE.to_vec();
    header.extend_from_slice(&[VERSION_COMMAND, family]);
    header.extend_from_slice(&length(&body));
    header.extend_from_slice(&body);
    header
}

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&length(value));
    out.extend_from_slice(value);
}

/// A SPIFFE id has at most 2 KiB, so everything fits.
fn length(bytes: &[u8]) -> [u8; 2] {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes()
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_specification_has_it() {
        let id: SpiffeId = "spiffe://td/svc/api/node/n1".parse().unwrap();
        let cn = id.to_string();
        let header = header("[::ffff:10.0.0.1]:8301".parse().unwrap(), "127.0.0.1:80".parse().unwrap(), &id);
        let (ssl, whole) = (5 + 3 + cn.len(), 12 + 3 + 5 + 3 + cn.len());
        let expected = [
            b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\0".as_slice(),
            &[u8::try_from(whole).unwrap(), 10, 0, 0, 1, 127, 0, 0, 1, 0x20, 0x6d, 0, 80],
            &[0x20, 0, u8::try_from(ssl).unwrap(), 3, 0, 0, 0, 0, 0x22, 0, u8::try_from(cn.len()).unwrap()],
            cn.as_bytes(),
        ];
        assert_eq!(header, expected.concat());
        let six = super::header("[2001:db8::1]:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap(), &id);
        assert_eq!(
            (six[13], &six[16..18], &six[32..52]),
            (0x21, &[0x20, 1][..], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1, 0, 1, 0, 2][..])
        );
    }
}

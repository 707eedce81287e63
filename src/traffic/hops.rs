//! Which callers may say for whom they ask: proxies before weft, by their addresses (`TrustedHops` of `proxy-defaults`).
//!
//! Apps of this host, which call from loopback, always may. Not here: which headers say so (`proxy::http::headers`).

use std::net::IpAddr;
use std::str::FromStr;

/// Networks of proxies before weft.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedHops(Vec<Network>);

impl TrustedHops {
    /// Tells whether a caller at `addr` is believed.
    pub fn holds(&self, addr: IpAddr) -> bool {
        let addr = addr.to_canonical();
        addr.is_loopback() || self.0.iter().any(|network| network.holds(addr))
    }
}

impl FromIterator<Network> for TrustedHops {
    fn from_iter<I: IntoIterator<Item = Network>>(networks: I) -> Self {
        Self(networks.into_iter().collect())
    }
}

/// A network: `10.0.0.0/8`, `fd00::/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    addr: IpAddr,
    /// How many bits, from the first on, all its addresses share.
    bits: u32,
}

impl Network {
    fn holds(self, addr: IpAddr) -> bool {
        self.addr.is_ipv4() == addr.is_ipv4() && (leading(self.addr) ^ leading(addr)) & mask(self.bits) == 0
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (addr, bits) = text.split_once('/').map_or((text, None), |(addr, bits)| (addr, Some(bits)));
        let wanted = || "must be an address, or a network like 10.0.0.0/8".to_owned();
        let addr: IpAddr = addr.parse().map_err(|_| wanted())?;
        let most = if addr.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(wanted))?;
        if leading(addr) & !mask(bits) != 0 {
            return Err(format!("must be 0 after its first {bits} bits"));
        }
        Ok(Self { addr, bits })
    }
}

/// An address's bits from the left.
fn leading(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => u128::from(addr.to_bits()) << 96,
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

/// The first `bits` bits.
fn mask(bits: u32) -> u128 {
    u128::MAX.checked_shl(128_u32.saturating_sub(bits)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(networks: &[&str], addr: &str, is_held: bool) {
        let hops: TrustedHops = networks.iter().map(|text| text.parse::<Network>().unwrap()).collect();
        assert_eq!(hops.holds(addr.parse().unwrap()), is_held, "{networks:?} {addr}");
    }

    #[test]
    fn a_network_holds_its_own_addresses_and_loopback_is_always_believed() {
        for (addr, is_held) in [("127.0.0.1", true), ("::1", true), ("::ffff:127.3.0.1", true), ("10.0.0.1", false)] {
            check(&[], addr, is_held);
        }
        check(&["10.0.0.0/8"], "10.255.3.4", true);
        check(&["10.0.0.0/8"], "::ffff:10.255.3.4", true);
        check(&["10.0.0.0/8"], "11.0.0.1", false);
        check(&["192.168.1.7"], "192.168.1.7", true);
        check(&["192.168.1.7"], "192.168.1.6", false);
        check(&["192.168.1.0/31", "fd00::/8"], "192.168.1.1", true);
        check(&["192.168.1.0/31", "fd00::/8"], "fd12::9", true);
        check(&["192.168.1.0/31", "fd00::/8"], "fe80::1", false);
        // An address of one kind is in no network of the other.
        check(&["0.0.0.0/0"], "203.0.113.9", true);
        check(&["0.0.0.0/0"], "2001:db8::1", false);
        check(&["::/0"], "203.0.113.9", false);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "proxy", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0"] {
            assert!(text.parse::<Network>().unwrap_err().contains("10.0.0.0/8"), "{text}");
        }
        assert!("10.0.0.1/8".parse::<Network>().unwrap_err().contains("first 8 bits"));
    }
}

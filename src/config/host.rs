//! What a configuration takes from the host it runs on: gathered once, so that resolving stays a pure function.

use std::net::{IpAddr, Ipv4Addr};

use crate::model::NodeName;

/// Facts about this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// The host name, if it can be read.
    pub name: Option<String>,
    /// The addresses of its interfaces.
    pub addresses: Vec<IpAddr>,
    /// Cores that this process may use; at least 1.
    pub cores: usize,
}

impl Host {
    /// Reads the facts of this host; what cannot be read stays empty.
    pub fn read() -> Self {
        let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let mut addresses: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
            .map(|interfaces| {
                let address = |interface: nix::ifaddrs::InterfaceAddress| {
                    let storage = interface.address?;
                    let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
                };
                interfaces.filter_map(address).collect()
            })
            .unwrap_or_default();
        addresses.sort();
        addresses.dedup();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { name, addresses, cores }
    }

    /// Makes a node name of the host name: its first label, bad characters replaced by `-`; none if nothing is left.
    pub(crate) fn node_name(&self) -> Option<NodeName> {
        let label = self.name.as_deref()?.split('.').next()?;
        let replace = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '-' };
        let cleaned: String = label.chars().map(replace).collect();
        cleaned.trim_matches('-').parse().ok()
    }

    /// Returns the address that other hosts reach, if there is no doubt which one it is.
    ///
    /// # Errors
    /// The candidates: none, or more than one.
    pub(crate) fn primary_address(&self) -> Result<IpAddr, Vec<IpAddr>> {
        let classes: [fn(&IpAddr) -> bool; 3] = [is_private_v4, is_public_v4, is_routed_v6];
        for is_of_class in classes {
            let candidates: Vec<IpAddr> = self.addresses.iter().filter(|ip| is_of_class(ip)).copied().collect();
            match candidates.as_slice() {
                [] => {}
                [only] => return Ok(*only),
                _ => return Err(candidates),
            }
        }
        Err(Vec::new())
    }
}

fn is_private_v4(ip: &IpAddr) -> bool {
    match ip {
        // 100.64.0.0/10 is the shared address space of RFC 6598, which overlay networks use.
        IpAddr::V4(v4) => v4.is_private() || (*v4 & Ipv4Addr::new(255, 192, 0, 0)) == Ipv4Addr::new(100, 64, 0, 0),
        IpAddr::V6(_) => false,
    }
}

fn is_public_v4(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !is_private_v4(ip) && !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(_) => false,
    }
}

fn is_routed_v6(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_name_becomes_a_node_name_if_anything_is_left_of_it() {
        #[track_caller]
        fn check(host: &str, want: Option<&str>) {
            let got = Host { name: Some(host.to_owned()), ..Host::default() }.node_name();
            assert_eq!(got.as_ref().map(NodeName::as_str), want, "{host}");
        }
        check("web-1", Some("web-1"));
        check("web-1.prod.example.com", Some("web-1"));
        check("büro pc", Some("b-ro-pc"));
        check("-", None);
        check("", None);
        check(&"x".repeat(80), None);
    }

    #[test]
    fn the_address_is_the_only_private_one_or_else_the_only_other_one() {
        #[track_caller]
        fn check(addresses: &[&str], want: Result<&str, usize>) {
            let host = Host { addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(), ..Host::default() };
            let got = host.primary_address().map_err(|candidates| candidates.len());
            assert_eq!(got, want.map(|ip| ip.parse().unwrap()), "{addresses:?}");
        }
        check(&["127.0.0.1", "10.0.0.7", "203.0.113.9", "fe80::1"], Ok("10.0.0.7"));
        check(&["127.0.0.1", "203.0.113.9"], Ok("203.0.113.9"));
        check(&["127.0.0.1", "100.64.1.2"], Ok("100.64.1.2"));
        check(&["::1", "fd00::5", "fe80::1"], Ok("fd00::5"));
        check(&["10.0.0.7", "192.168.1.2"], Err(2));
        check(&["127.0.0.1", "::1", "169.254.0.3"], Err(0));
    }
}

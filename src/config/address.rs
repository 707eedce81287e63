//! What an address in a configuration may look like, and what is said of one that may not.

use std::net::{IpAddr, SocketAddr};

/// Tells whether `text` is a name, an address, or either with a port. Names are not looked up.
pub(super) fn is_join_target(text: &str) -> bool {
    let is_host = |host: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        (1..=253).contains(&host.len()) && host.chars().all(allowed)
    };
    if text.parse::<IpAddr>().is_ok() || text.parse::<SocketAddr>().is_ok_and(|addr| addr.port() != 0) {
        return true;
    }
    match text.rsplit_once(':') {
        Some((host, port)) => is_host(host) && port.parse::<u16>().is_ok_and(|port| port != 0),
        None => is_host(text),
    }
}

/// Says what an address to join must be; Consul's way to ask a cloud for it is told apart.
pub(super) fn join_rule(text: &str) -> &'static str {
    if text.contains("provider=") {
        "asks a cloud for addresses, which weft does not: give a DNS name that leads to some agents, or their addresses"
    } else if text.contains("{{") {
        "is a template, and weft fills none in: write the address"
    } else {
        "must be a host name, an IP address, or either with :PORT"
    }
}

/// Says what an IP address must be; Consul's templates are told apart.
pub(super) fn ip_rule(text: &str) -> &'static str {
    if text.contains("{{") {
        "is a template, and weft fills none in: write the address, or leave bind_addr out to take the host's only private one"
    } else {
        "must be an IP address, one alone and without a port"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_consul_reads_and_weft_does_not_is_told_apart() {
        assert!(join_rule("provider=aws tag_key=consul").contains("a DNS name"));
        assert!(join_rule("{{ GetPrivateIP }}").contains("is a template"));
        assert!(join_rule("a b").contains(":PORT"));
        assert!(ip_rule("{{ GetPrivateIP }}").contains("is a template"));
        assert!(ip_rule("10.0.0.1:80").contains("without a port"));
        for (text, is_one) in [("seed", true), ("seed.example:8301", true), ("::1", true), ("a:0", false), ("", false)]
        {
            assert_eq!(is_join_target(text), is_one, "{text}");
        }
    }
}

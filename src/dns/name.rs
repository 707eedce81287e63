//! What a name asks for: labels to [`Lookup`], without looking anything up.
//!
//! ```text
//!   v1 . web . service . dc1 . consul
//!   tag  name  kind      dc    domain        kind: service node addr virtual connect ingress query
//! ```
//!
//! Labels come in lower case, leftmost first, without the root. Every list of labels has exactly one meaning; names of one
//! of the domains never leave it.
//! Not here: whether what is asked for exists (`answer`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a name asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lookup<'a> {
    /// Something of the domain with this number.
    Own(usize, Asked<'a>),
    /// The name of an address: `4.3.2.1.in-addr.arpa`, nibbles below `ip6.arpa`.
    Pointer(IpAddr),
    /// None of weft's names.
    Foreign,
}

/// What is asked for within a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked<'a> {
    /// The domain itself.
    Apex,
    /// `ns`: the agent that answers.
    NameServer,
    /// `[tag.]svc.service[.dc]`
    Service(ServiceName<'a>),
    /// `_svc._tcp.service[.dc]`, `_svc._tag.service[.dc]` (RFC 2782).
    Located(ServiceName<'a>),
    /// `node.node[.dc]`; node names may hold dots.
    Node {
        /// Joined by dots.
        name: String,
        /// Where.
        datacenter: Option<&'a str>,
    },
    /// `c000020a.addr[.dc]`
    Address {
        /// Written in the name.
        ip: IpAddr,
        /// Where.
        datacenter: Option<&'a str>,
    },
    /// `svc.virtual[.dc]`
    Virtual(ServiceName<'a>),
    /// `svc.connect[.dc]`
    Connect(ServiceName<'a>),
    /// `svc.ingress[.dc]`
    Ingress(ServiceName<'a>),
    /// `q.query[.dc]`, `_q._tcp.query[.dc]`: a prepared query, by name or id, which may hold dots.
    Query {
        /// Joined by dots.
        name: String,
        /// Where.
        datacenter: Option<&'a str>,
    },
    /// A name with others below it and nothing of its own; it is there if the datacenter is.
    Branch {
        /// Where.
        datacenter: Option<&'a str>,
    },
    /// No such name.
    Nothing,
}

/// A service, and which of its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServiceName<'a> {
    pub(super) name: &'a str,
    /// Those with this tag.
    pub(super) tag: Option<&'a str>,
    /// Those of this datacenter; none: the agent's own.
    pub(super) datacenter: Option<&'a str>,
}

/// Longest list of labels that can be one of weft's names: a node name of 63 bytes holds 32 labels at most, a kind, a datacenter and a
/// domain come after it.
const LABELS_MAX: usize = 64;

/// The kinds, each with others below it.
const KINDS: [&str; 7] = ["service", "node", "addr", "virtual", "connect", "ingress", "query"];

/// Reads `labels`; `domains` hold the labels of each domain, in lower case.
pub(super) fn parse<'a>(labels: &[&'a str], domains: &[Vec<String>]) -> Lookup<'a> {
    // The longest domain decides, so that one may lie within the other.
    let below = domains.iter().enumerate().filter(|(_, domain)| is_below(labels, domain));
    if let Some((at, domain)) = below.max_by_key(|(_, domain)| domain.len()) {
        let inside = labels.get(..labels.len() - domain.len()).unwrap_or_default();
        let asked = if labels.len() > LABELS_MAX { Asked::Nothing } else { inside_of_domain(inside) };
        return Lookup::Own(at, asked);
    }
    match labels {
        [rest @ .., "in-addr", "arpa"] => ipv4_of(rest).map_or(Lookup::Foreign, Lookup::Pointer),
        [rest @ .., "ip6", "arpa"] => ipv6_of(rest).map_or(Lookup::Foreign, Lookup::Pointer),
        _ => Lookup::Foreign,
    }
}

fn is_below(labels: &[&str], domain: &[String]) -> bool {
    labels.len() >= domain.len() && labels.iter().rev().zip(domain.iter().rev()).all(|(label, own)| label == own)
}

fn inside_of_domain<'a>(labels: &[&'a str]) -> Asked<'a> {
    match labels {
        [] => Asked::Apex,
        ["ns"] => Asked::NameServer,
        [rest @ .., kind] if KINDS.contains(kind) => of_kind(kind, rest, None),
        [rest @ .., kind, datacenter] if KINDS.contains(kind) => of_kind(kind, rest, Some(datacenter)),
        [datacenter] => Asked::Branch { datacenter: Some(datacenter) },
        _ => Asked::Nothing,
    }
}

fn of_kind<'a>(kind: &str, labels: &[&'a str], datacenter: Option<&'a str>) -> Asked<'a> {
    let service = |name, tag| ServiceName { name, tag, datacenter };
    match (kind, labels) {
        (_, []) | ("service", ["_tcp"]) => Asked::Branch { datacenter },
        ("service", [name]) => Asked::Service(service(name, None)),
        ("service", [first, second]) => match (first.strip_prefix('_'), second.strip_prefix('_')) {
            (Some(name), Some(how)) => Asked::Located(service(name, (how != "tcp").then_some(how))),
            _ => Asked::Service(service(second, Some(first))),
        },
        ("node", name) => Asked::Node { name: name.join("."), datacenter },
        ("addr", [hex]) => ip_of_hex(hex).map_or(Asked::Nothing, |ip| Asked::Address { ip, datacenter }),
        ("virtual", [name]) => Asked::Virtual(service(name, None)),
        ("connect", [name]) => Asked::Connect(service(name, None)),
        ("ingress", [name]) => Asked::Ingress(service(name, None)),
        ("query", [first, second]) if second.starts_with('_') && first.len() > 1 && first.starts_with('_') => {
            Asked::Query { name: first.get(1..).unwrap_or_default().to_owned(), datacenter }
        }
        ("query", name) => Asked::Query { name: name.join("."), datacenter },
        _ => Asked::Nothing,
    }
}

/// Writes `ip` as the label before `addr`.
pub(super) fn hex_of_ip(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => format!("{:08x}", u32::from(v4)),
        IpAddr::V6(v6) => format!("{:032x}", u128::from(v6)),
    }
}

fn ip_of_hex(text: &str) -> Option<IpAddr> {
    // `from_str_radix` takes a sign.
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    match text.len() {
        8 => u32::from_str_radix(text, 16).ok().map(|bits| Ipv4Addr::from(bits).into()),
        32 => u128::from_str_radix(text, 16).ok().map(|bits| Ipv6Addr::from(bits).into()),
        _ => None,
    }
}

fn ipv4_of(labels: &[&str]) -> Option<IpAddr> {
    let octet = |label: &&str| {
        let plain = label.len() == 1 || !label.starts_with('0');
        label.parse::<u8>().ok().filter(|_| plain && label.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let octets: Vec<u8> = labels.iter().rev().map(octet).collect::<Option<_>>()?;
    <[u8; 4]>::try_from(octets).ok().map(IpAddr::from)
}

fn ipv6_of(labels: &[&str]) -> Option<IpAddr> {
    let nibble = |label: &&str| match label.as_bytes() {
        [digit] => char::from(*digit).to_digit(16),
        _ => None,
    };
    if labels.len() != 32 {
        return None;
    }
    let bits = labels.iter().rev().try_fold(0_u128, |bits, label| Some((bits << 4) | u128::from(nibble(label)?)))?;
    Some(Ipv6Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn domains() -> Vec<Vec<String>> {
        vec![vec!["weft".to_owned()], vec!["mesh".to_owned(), "example".to_owned()]]
    }

    #[track_caller]
    fn check(name: &str, want: &Lookup<'_>) {
        let labels: Vec<&str> = name.split('.').filter(|label| !label.is_empty()).collect();
        assert_eq!(parse(&labels, &domains()), *want, "{name}");
    }

    fn service<'a>(name: &'a str, tag: Option<&'a str>, datacenter: Option<&'a str>) -> ServiceName<'a> {
        ServiceName { name, tag, datacenter }
    }

    #[test]
    fn every_row_of_the_table_is_read() {
        let own = |asked| Lookup::Own(0, asked);
        check("weft", &own(Asked::Apex));
        check("ns.weft", &own(Asked::NameServer));
        check("web.service.weft", &own(Asked::Service(service("web", None, None))));
        check("web.service.dc2.weft", &own(Asked::Service(service("web", None, Some("dc2")))));
        check("v1.web.service.weft", &own(Asked::Service(service("web", Some("v1"), None))));
        check("v1.web.service.dc2.weft", &own(Asked::Service(service("web", Some("v1"), Some("dc2")))));
        check("_web._tcp.service.weft", &own(Asked::Located(service("web", None, None))));
        check("_web._v1.service.dc2.weft", &own(Asked::Located(service("web", Some("v1"), Some("dc2")))));
        check("n1.node.weft", &own(Asked::Node { name: "n1".to_owned(), datacenter: None }));
        check("a.b.node.dc2.weft", &own(Asked::Node { name: "a.b".to_owned(), datacenter: Some("dc2") }));
        let ip = "192.0.2.10".parse().unwrap();
        check("c000020a.addr.dc1.weft", &own(Asked::Address { ip, datacenter: Some("dc1") }));
        let ip = "2001:db8::1".parse().unwrap();
        check("20010db8000000000000000000000001.addr.weft", &own(Asked::Address { ip, datacenter: None }));
        check("web.virtual.weft", &own(Asked::Virtual(service("web", None, None))));
        check("web.connect.dc1.weft", &own(Asked::Connect(service("web", None, Some("dc1")))));
        check("web.ingress.weft", &own(Asked::Ingress(service("web", None, None))));
        check("web.ingress.dc1.weft", &own(Asked::Ingress(service("web", None, Some("dc1")))));
        check("a.web.ingress.weft", &own(Asked::Nothing));
        let query = |name: &str, datacenter| own(Asked::Query { name: name.to_owned(), datacenter });
        check("q.query.weft", &query("q", None));
        check("a.b.query.dc1.weft", &query("a.b", Some("dc1")));
        check("_q._tcp.query.weft", &query("q", None));
        check("web.service.mesh.example", &Lookup::Own(1, Asked::Service(service("web", None, None))));
        check("10.2.0.192.in-addr.arpa", &Lookup::Pointer("192.0.2.10".parse().unwrap()));
        let nibbles = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        check(nibbles, &Lookup::Pointer("2001:db8::1".parse().unwrap()));
    }

    #[test]
    fn names_above_others_are_branches() {
        for name in [
            "service.weft",
            "node.weft",
            "addr.weft",
            "virtual.weft",
            "connect.weft",
            "query.weft",
            "ingress.weft",
            "_tcp.service.weft",
        ] {
            check(name, &Lookup::Own(0, Asked::Branch { datacenter: None }));
        }
        for name in ["dc1.weft", "service.dc1.weft", "_tcp.service.dc1.weft"] {
            check(name, &Lookup::Own(0, Asked::Branch { datacenter: Some("dc1") }));
        }
    }

    #[test]
    fn extra_labels_and_strangers_are_told_apart() {
        for name in [
            "a.b.web.service.weft",
            "web.service.dc1.more.weft",
            "x.web.virtual.weft",
            "x.y.weft",
            "zz.addr.weft",
            "+0000001.addr.weft",
            "x.c000020a.addr.weft",
            "a._web._tcp.service.weft",
            "x.ns.weft",
        ] {
            check(name, &Lookup::Own(0, Asked::Nothing));
        }
        for name in [
            "",
            "example",
            "web.service.consul",
            "weft.com",
            "2.0.192.in-addr.arpa",
            "010.2.0.192.in-addr.arpa",
            "+1.2.0.192.in-addr.arpa",
            "ip6.arpa",
            "arpa",
        ] {
            check(name, &Lookup::Foreign);
        }
        let long = "x.".repeat(100) + "node.weft";
        check(&long, &Lookup::Own(0, Asked::Nothing));
    }

    proptest! {
        #[test]
        fn an_address_survives_its_label(bits in any::<u128>(), short in any::<u32>()) {
            for ip in [IpAddr::from(Ipv6Addr::from(bits)), IpAddr::from(Ipv4Addr::from(short))] {
                prop_assert_eq!(ip_of_hex(&hex_of_ip(ip)), Some(ip));
            }
        }

        #[test]
        fn any_labels_are_read_without_a_panic(
            labels in prop::collection::vec(prop::sample::select(vec![
                "weft", "example", "mesh", "service", "node", "_tcp", "_", "a", "dc1", "addr", "c000020a", "arpa", "in-addr", "ip6", "1", "ns", "é",
            ]), 0..40),
        ) {
            let _unused = parse(&labels, &domains());
        }
    }
}

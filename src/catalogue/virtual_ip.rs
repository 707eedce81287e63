//! Virtual IPs: an address of 240.0.0.0/4 for each service name, without anybody who hands them out.
//!
//! ```text
//!   name --SHA-256--> 4 candidates c1 c2 c3 c4, of the name alone
//!   address of x in S   = the first candidate of x that no other name of S has among its four
//!   service at a in S   = the only name of S that has a among its four; none if two have it
//! ```
//!
//! S is what this agent knows: the names in the catalogue and those that went lately ([`super::Snapshot::gone_services`]).
//!
//! Invariants, with their proofs (tests below hold them over random sets in a space where names collide):
//! 1. Agreement: all is a function of S, without order, clock or store. Equal catalogues give equal addresses, also after
//!    a restart.
//! 2. **Never another's**: an address that any agent gave for x at any time leads, at every agent that knows x, to x or to
//!    nothing. Proof: it is a candidate of x by x's name alone. An agent whose S holds x finds x among those who have it; if x
//!    is the only one it answers x, otherwise nobody. This needs no agreement of the two agents' S, which gossip gives only
//!    in the end: a name that comes can take an address away (it leads nowhere, the app asks anew, the TTL is 0) and never
//!    hand it over. Whoever went is in S still, so an address does not pass from one that goes to one that stays.
//! 3. Existence: x has an address unless each of its four is another's candidate. Of 10,000 names that happens to about
//!    one in 10^15 by chance: 40,000 candidates among 2^28 addresses meet a given one with probability 1.5 * 10^-4.
//!    On purpose it takes names that hash onto all four (2^28 hashes each) and a certificate whose scope lets a node serve
//!    them; x then has no virtual IP and keeps all its other names.
//! 4. Stability: an address changes only when a name that has it among its candidates comes or is forgotten.
//!
//! Not here: DNS (`dns`), capturing the traffic.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use aws_lc_rs::digest::{SHA256, digest};

use crate::model::ServiceName;

/// First address of 240.0.0.0/4 that is given out; 240.0.0.0 itself is left out.
const FIRST: u32 = 0xf000_0001;
/// Addresses from there on; 255.255.255.255, the limited broadcast, is left out.
const COUNT: u32 = 0x0fff_fffe;
/// Candidates of a name: see invariant 3.
const CANDIDATES: usize = 4;
/// Keeps these hashes apart from all others of names.
const DOMAIN: &[u8] = b"weft virtual ip 1\0";

/// Tells whether `ip` lies in the range of virtual IPs, given out or not.
pub fn is_virtual(ip: Ipv4Addr) -> bool {
    u32::from(ip) >= FIRST - 1
}

/// Who has which address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VirtualIps {
    names: HashMap<ServiceName, [Ipv4Addr; CANDIDATES]>,
    claims: HashMap<Ipv4Addr, Claim>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Claim {
    One(ServiceName),
    Several,
}

impl VirtualIps {
    /// Gives every one of `names` its address. Takes about a microsecond a name.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a ServiceName>) -> Self {
        Self::within(COUNT, names)
    }

    /// As [`VirtualIps::of`], among `count` addresses: tests take few.
    fn within<'a>(count: u32, names: impl IntoIterator<Item = &'a ServiceName>) -> Self {
        let mut these = Self::default();
        for name in names {
            let own = candidates(name, count);
            if these.names.insert(name.clone(), own).is_some() {
                continue;
            }
            for (at, ip) in own.iter().enumerate() {
                // A name may have a candidate twice.
                if own.iter().take(at).any(|before| before == ip) {
                    continue;
                }
                let claim = these.claims.entry(*ip);
                claim.and_modify(|claim| *claim = Claim::Several).or_insert_with(|| Claim::One(name.clone()));
            }
        }
        these
    }

    /// Tells whether these are the addresses of exactly `names`, each given once.
    pub fn is_of<'a>(&self, names: impl IntoIterator<Item = &'a ServiceName>) -> bool {
        let mut count = 0;
        let all = names.into_iter().inspect(|_| count += 1).all(|name| self.names.contains_key(name));
        all && count == self.names.len()
    }

    /// Returns the address of `name`; none if it is not among the names, or others have all its candidates.
    pub fn address(&self, name: &ServiceName) -> Option<Ipv4Addr> {
        let own = self.names.get(name)?;
        own.iter().copied().find(|ip| self.service_at(*ip) == Some(name))
    }

    /// Returns the service that `ip` leads to; none if nobody or more than one has it among its candidates.
    pub fn service_at(&self, ip: Ipv4Addr) -> Option<&ServiceName> {
        match self.claims.get(&ip)? {
            Claim::One(name) => Some(name),
            Claim::Several => None,
        }
    }
}

/// The candidates of `name` among `count` addresses, best first.
fn candidates(name: &ServiceName, count: u32) -> [Ipv4Addr; CANDIDATES] {
    let hash = digest(&SHA256, &[DOMAIN, name.as_str().as_bytes()].concat());
    let mut words = hash.as_ref().chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes));
    std::array::from_fn(|_| {
        let offset = words.next().unwrap_or_default() % u64::from(count);
        Ipv4Addr::from(FIRST + u32::try_from(offset).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn names(numbers: impl IntoIterator<Item = u16>) -> Vec<ServiceName> {
        numbers.into_iter().map(|number| format!("s{number}").parse().unwrap()).collect()
    }

    #[test]
    fn addresses_stand_for_ever() {
        // What apps and firewalls were told: a change of these is a break.
        let all = names([1, 2, 3]);
        let ips = VirtualIps::of(&all);
        let shown: Vec<String> = all.iter().map(|name| ips.address(name).unwrap().to_string()).collect();
        assert_eq!(shown, GOLDEN);
        for name in &all {
            assert_eq!(ips.service_at(ips.address(name).unwrap()), Some(name));
        }
    }

    /// Of `s1`, `s2` and `s3`.
    const GOLDEN: [&str; 3] = ["243.147.98.94", "240.75.165.30", "246.199.105.131"];

    #[test]
    fn ten_thousand_names_have_ten_thousand_addresses_in_the_range() {
        let all = names(0..10_000);
        let ips = VirtualIps::of(&all);
        let given: BTreeSet<Ipv4Addr> = all.iter().map(|name| ips.address(name).unwrap()).collect();
        assert_eq!(given.len(), 10_000);
        assert!(
            given.iter().all(|ip| is_virtual(*ip) && *ip != Ipv4Addr::BROADCAST && *ip != Ipv4Addr::new(240, 0, 0, 0))
        );
        assert!(!is_virtual(Ipv4Addr::new(239, 255, 255, 255)));
        assert!(ips.is_of(&all) && !ips.is_of(all.iter().skip(1)) && !ips.is_of(&names(0..10_001)));
    }

    #[test]
    fn of_two_names_that_share_an_address_neither_has_it() {
        // Among 64 addresses, some two of these names have the same first candidate.
        let all = names(0..40);
        let first = |name: &ServiceName| candidates(name, 64)[0];
        let (a, b) = all
            .iter()
            .flat_map(|a| all.iter().map(move |b| (a, b)))
            .find(|(a, b)| a != b && first(a) == first(b))
            .expect("40 names among 64 addresses");
        let alone = VirtualIps::within(64, [a]);
        assert_eq!(alone.address(a), Some(first(a)));
        let both = VirtualIps::within(64, [a, b]);
        assert_eq!(both.service_at(first(a)), None);
        assert_ne!(both.address(a), Some(first(a)));
        assert_ne!(both.address(b), Some(first(a)));
        assert_eq!(both, VirtualIps::within(64, [b, a]), "no matter who came first");
    }

    proptest! {
        /// Invariants 1 and 2, where names collide all the time.
        #[test]
        fn an_address_of_a_service_leads_to_it_or_nowhere_at_whoever_knows_it(
            here in prop::collection::btree_set(0_u16..60, 1..40),
            there in prop::collection::btree_set(0_u16..60, 1..40),
        ) {
            let (here, there) = (names(here), names(there));
            let one = VirtualIps::within(97, &here);
            let other = VirtualIps::within(97, &there);
            prop_assert_eq!(&one, &VirtualIps::within(97, here.iter().rev()));
            for name in &here {
                let Some(ip) = one.address(name) else { continue };
                prop_assert_eq!(one.service_at(ip), Some(name));
                if there.contains(name) {
                    let led_to = other.service_at(ip);
                    prop_assert!(led_to.is_none() || led_to == Some(name), "{} gave {} to {:?}", ip, name, led_to);
                }
            }
        }
    }
}

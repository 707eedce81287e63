//! Tables of consistent hashing: a ring of points (Karger et al., 1997) and Maglev's table (Eisenbud et al., 2016).
//!
//! They hold every published instance, whatever its health: one that may not be called is passed over, and its calls come
//! back to it. So a check that flaps makes no new table, and tables of all nodes are the same where the catalogue is.
//! Made beside the data plane and shared by its workers; a table is at most 1 MiB.

use crate::catalogue::ServiceEntry;
use crate::model::{InstanceId, NodeName};
use crate::upstream::Algorithm;

use super::draw::{key_of, mix};

/// Places of Maglev's table: a prime over 100 times the instances that it is good for.
pub const MAGLEV_PLACES: u32 = 65_537;
/// Instances in a table; those beyond take no keyed calls.
pub const MEMBERS_MAX: usize = 4096;
/// Services with a table; those beyond it are hashed instance by instance, which takes longer with many.
pub const TABLES_MAX: usize = 64;
/// Points of an instance on a ring, while all have room: shares then differ by a tenth.
const POINTS_EACH: u32 = 100;

/// An instance in a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its node.
    pub node: NodeName,
    /// Its id there.
    pub id: InstanceId,
    /// Its share, 1 to 65,535.
    pub weight: u32,
}

impl Member {
    fn seed(&self) -> u64 {
        member_key(&self.node, &self.id)
    }
}

/// Hashes an instance's name.
pub(super) fn member_key(node: &NodeName, id: &InstanceId) -> u64 {
    mix(key_of(node.as_str().as_bytes()).rotate_left(1) ^ key_of(id.as_str().as_bytes()))
}

#[derive(Debug)]
enum Places {
    /// Points in order, each with its member.
    Ring(Box<[(u64, u32)]>),
    Maglev(Box<[u32]>),
}

/// Which instance has which keys.
#[derive(Debug)]
pub struct HashTable {
    algorithm: Algorithm,
    members: Vec<Member>,
    places: Places,
}

impl HashTable {
    /// Returns the instances of `service` as they would stand in a table.
    pub fn members_of(service: &ServiceEntry) -> Vec<Member> {
        let member = |instance: &std::sync::Arc<crate::model::Instance>| Member {
            node: instance.node.info.name.clone(),
            id: instance.record.id.clone(),
            weight: instance.record.weights.passing.clamp(1, 65_535),
        };
        service.instances.iter().take(MEMBERS_MAX).map(member).collect()
    }

    /// Makes a table; none for an algorithm without one or no members. Takes some 10 ms for 1,000 members.
    pub fn new(algorithm: Algorithm, members: Vec<Member>) -> Option<Self> {
        if members.is_empty() {
            return None;
        }
        let places = match algorithm {
            Algorithm::RingHash { points_min, points_max } => Places::Ring(ring(&members, points_min, points_max)),
            Algorithm::Maglev => Places::Maglev(maglev(&members)),
            _ => return None,
        };
        Some(Self { algorithm, members, places })
    }

    /// Tells whether the table is what [`HashTable::new`] would make.
    pub fn is_for(&self, algorithm: Algorithm, members: &[Member]) -> bool {
        self.algorithm == algorithm && self.members == members
    }

    /// Returns the members.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns the members that come into question for `key`, the best first; one may come again.
    pub fn walk(&self, key: u64) -> impl Iterator<Item = usize> + '_ {
        let (length, start) = match &self.places {
            Places::Ring(points) => (points.len(), points.partition_point(|(point, _)| *point < key)),
            Places::Maglev(places) => (places.len(), usize::try_from(key % u64::from(MAGLEV_PLACES)).unwrap_or(0)),
        };
        (0..length).filter_map(move |step| {
            let at = start.wrapping_add(step).checked_rem(length)?;
            let member = match &self.places {
                Places::Ring(points) => points.get(at)?.1,
                Places::Maglev(places) => *places.get(at)?,
            };
            usize::try_from(member).ok()
        })
    }
}

fn ring(members: &[Member], least: u32, most: u32) -> Box<[(u64, u32)]> {
    let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
    let total = u64::from(count.saturating_mul(POINTS_EACH).max(least).min(most.max(1)));
    let weights: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    let mut points = Vec::new();
    for (at, member) in (0u32..).zip(members) {
        // Everybody has a point, however little its weight.
        let own = (total.saturating_mul(u64::from(member.weight)) / weights.max(1)).max(1);
        let seed = member.seed();
        points.extend((0..own).map(|number| (mix(seed ^ mix(number.wrapping_add(1))), at)));
    }
    points.sort_unstable();
    points.into()
}

fn maglev(members: &[Member]) -> Box<[u32]> {
    const FREE: u32 = u32::MAX;
    let places = u64::from(MAGLEV_PLACES);
    // The paper's permutation of a member: offset + n * skip.
    let mut turns: Vec<(u64, u64, f64)> = members
        .iter()
        .map(|member| {
            let seed = member.seed();
            (mix(seed ^ 1) % places, mix(seed ^ 2) % (places - 1) + 1, 0.0)
        })
        .collect();
    let heaviest = members.iter().map(|member| member.weight).max().unwrap_or(1);
    let mut table = vec![FREE; usize::try_from(places).unwrap_or_default()];
    let mut left = table.len();
    while left > 0 {
        for (number, (member, (next, skip, credit))) in (0u32..).zip(members.iter().zip(&mut turns)) {
            // The heaviest takes one place a round, the others their share of it.
            *credit += f64::from(member.weight) / f64::from(heaviest);
            if *credit < 1.0 || left == 0 {
                continue;
            }
            *credit -= 1.0;
            loop {
                let at = usize::try_from(*next).unwrap_or_default();
                *next = (*next + *skip) % places;
                if let Some(place) = table.get_mut(at).filter(|place| **place == FREE) {
                    *place = number;
                    left -= 1;
                    break;
                }
            }
        }
    }
    table.into()
}

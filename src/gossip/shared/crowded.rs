//! Maps that had no room for what peers brought: once they hold less, a comparison may bring it.
//!
//! While nothing can be done about a difference the comparisons are as rare as those that find none, so nobody else would ask
//! for it soon.

use std::collections::BTreeMap;

use super::Space;
use crate::lww::{Refused, Table};

/// How much a map held: live rows, their bytes, tombstones.
type Held = (usize, u64, usize);

/// What the maps held when they last refused a peer's record for want of room; at most one for each [`Space`].
#[derive(Debug, Default)]
pub(super) struct Crowded(BTreeMap<Space, Held>);

impl Crowded {
    /// Notes that `table` refused a peer's record, if that was for want of room.
    pub(super) fn note(&mut self, space: Space, refused: &Refused, table: &Table) {
        if matches!(refused, Refused::Full { .. } | Refused::Deletions { .. }) {
            self.0.insert(space, table.size());
        }
    }

    /// Whether `table` holds less of something than when it refused a record; true once for each refusal.
    pub(super) fn has_room_again(&mut self, space: Space, table: &Table) -> bool {
        let Some((rows, bytes, tombstones)) = self.0.get(&space) else { return false };
        let (rows_now, bytes_now, tombstones_now) = table.size();
        let is_freed = rows_now < *rows || bytes_now < *bytes || tombstones_now < *tombstones;
        is_freed && self.0.remove(&space).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lww::Body;
    use crate::model::NodeName;

    const NOW_MS: u64 = 1_800_000_000_000;

    fn put(table: &mut Table, key: &str, bytes: usize, node: &NodeName) {
        table.put(key, Body { flags: 0, value: vec![7; bytes] }, node, NOW_MS).unwrap();
    }

    #[test]
    fn a_map_that_refused_for_want_of_room_tells_once_when_it_holds_less() {
        let node: NodeName = "n1".parse().unwrap();
        let (mut table, mut crowded) = (Table::new(Space::Kv.limits(4096), 1), Crowded::default());
        put(&mut table, "a", 1000, &node);
        put(&mut table, "b", 1000, &node);
        let full = table.put("c", Body { flags: 0, value: vec![7; 4000] }, &node, NOW_MS).unwrap_err();
        assert!(matches!(full, Refused::Full { .. }), "{full:?}");

        assert!(!crowded.has_room_again(Space::Kv, &table), "nothing was refused");
        crowded.note(Space::Kv, &Refused::Ahead { ahead_ms: 90_000 }, &table);
        table.delete("a", &node, NOW_MS).unwrap();
        assert!(!crowded.has_room_again(Space::Kv, &table), "not for want of room");

        crowded.note(Space::Kv, &full, &table);
        assert!(!crowded.has_room_again(Space::Kv, &table), "nothing has gone since");
        put(&mut table, "d", 10, &node);
        assert!(!crowded.has_room_again(Space::Kv, &table), "it holds more");
        table.delete("b", &node, NOW_MS).unwrap();
        assert!(!crowded.has_room_again(Space::Query, &table), "another map");
        assert!(crowded.has_room_again(Space::Kv, &table));
        table.delete("d", &node, NOW_MS).unwrap();
        assert!(!crowded.has_room_again(Space::Kv, &table), "once for each refusal");
    }
}

//! Rows as they are kept: `SPACE/KEY` leads to a head (a message, after its length as big-endian `u32`) and the value.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Space;
use crate::lww::{Body, Record, Row, Stamp};
use crate::wire::{self, FRAME_BYTES_MAX};

/// What stands before a value.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    stamp: Stamp,
    /// None: it was deleted.
    flags: Option<u64>,
    created: u64,
    modified: u64,
}

/// What is known of other replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Times {
    pub(super) synced_ms: u64,
    pub(super) purged_ms: u64,
}

/// What one row on disk holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Row { space: Space, record: Record, created: u64, modified: u64 },
    Times(Space, Times),
}

/// The name of a row.
pub(super) fn name(space: Space, key: &str) -> String {
    format!("{}/{key}", space.as_str())
}

/// The name of the times of a space; no row has it, for it has no `/`.
pub(super) fn times_name(space: Space) -> String {
    format!("times-{}", space.as_str())
}

/// Writes a row.
pub(super) fn row(row: &Row) -> Vec<u8> {
    let flags = row.body.as_ref().map(|body| body.flags);
    let head = Head { stamp: row.stamp.clone(), flags, created: row.created, modified: row.modified };
    let head = wire::encode(&head).expect("a head is far below a frame");
    let value = row.body.as_ref().map_or(&[][..], |body| body.value.as_slice());
    let head_bytes = u32::try_from(head.len()).expect("a head is far below a frame");
    let mut bytes = Vec::with_capacity(4 + head.len() + value.len());
    bytes.extend_from_slice(&head_bytes.to_be_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(value);
    bytes
}

/// Writes the times of a space.
pub(super) fn times(times: Times) -> Vec<u8> {
    wire::encode(&times).expect("two numbers are far below a frame")
}

/// Reads what stands under `name`; none: it is of another build, or damaged.
pub(super) fn read(name: &str, bytes: &[u8]) -> Option<Stored> {
    if let Some(space) = Space::ALL.into_iter().find(|space| times_name(*space) == name) {
        return Some(Stored::Times(space, wire::decode(bytes, FRAME_BYTES_MAX).ok()?));
    }
    let (space, key) = name.split_once('/')?;
    let space = Space::ALL.into_iter().find(|known| known.as_str() == space)?;
    let (length, rest) = bytes.split_first_chunk()?;
    let (head, value) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    let Head { stamp, flags, created, modified } = wire::decode(head, FRAME_BYTES_MAX).ok()?;
    let body = flags.map(|flags| Arc::new(Body { flags, value: value.to_vec() }));
    Some(Stored::Row { space, record: Record { key: key.into(), stamp, body }, created, modified })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_as_it_was_written_and_damage_is_none() {
        let stamp = Stamp { ms: 7, count: 1, node: "a".parse().unwrap() };
        for body in [None, Some(Arc::new(Body { flags: 9, value: vec![0, 1, 2] }))] {
            let held = Row { stamp: stamp.clone(), sum: 0, body: body.clone(), created: 3, modified: 4 };
            let bytes = row(&held);
            let record = Record { key: "a/b".into(), stamp: stamp.clone(), body };
            let want = Stored::Row { space: Space::Kv, record, created: 3, modified: 4 };
            assert_eq!(read("kv/a/b", &bytes), Some(want));
            assert_eq!(read("nothing/a/b", &bytes), None);
            assert_eq!(read("kv/a/b", &bytes[..6]), None);
        }
        let now = Times { synced_ms: 5, purged_ms: 6 };
        assert_eq!(read("times-query", &times(now)), Some(Stored::Times(Space::Query, now)));
    }
}

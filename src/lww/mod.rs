//! Last-writer-wins maps that every agent holds: keys and values, prepared queries, user events.
//!
//! ```text
//!   put, delete --> stamp (hybrid clock, node) --> row     Summary -> buckets -> digests -> plan: pull, give, drop
//!   a peer's record --> newer by (stamp, sum)? --> row       (what two replicas say to each other; `gossip::shared` carries it)
//! ```
//!
//! A pure core. Invariants: merging is commutative, associative and idempotent, for rows are ordered by (stamp, sum) and the
//! greater one stays; what a peer can fill has a bound ([`Limits`]); a stamp more than [`AHEAD_MS_MAX`] ahead of the own clock
//! is refused, or one bad clock would win for ever.
//!
//! Deleting leaves a tombstone, for [`Limits::tombstone_lease_ms`] and while there are at most [`Limits::tombstones_max`]
//! (none goes by number in its first ten minutes: a local writer is refused then, and peers beyond twice as many). What was dropped last is the horizon `purged_ms`. A replica that last evened out before another's horizon may hold what was
//! deleted since: it takes the other's state, that is, it drops rows from before the horizon that the other has not. Two halves
//! that were apart for longer than that, both alive, are merged as they are: then a deleted row can come back.
//! Not here: who may write, disk, streams (`gossip::shared`).

mod stamp;
mod table;

#[cfg(test)]
mod sim;

pub use stamp::{AHEAD_MS_MAX, HybridClock, Stamp};
pub use table::{
    BUCKETS, Body, Digest, Keep, KeyHash, Limits, Merged, Plan, Record, Refused, Row, Scope, Summary, Table, key_hash,
};

//! One replica of a map.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use aws_lc_rs::digest::{self, Context, SHA256};
use serde::{Deserialize, Serialize};

use super::stamp::{AHEAD_MS_MAX, HybridClock, Stamp};
use crate::model::NodeName;

/// Rows are compared in so many groups: 65,536 rows make lists of 256.
pub const BUCKETS: usize = 256;
/// What a row costs beside its key and value, in bytes, as it is counted.
const ROW_BYTES: u64 = 128;
/// A tombstone reaches all that are in reach within this time, in milliseconds: several comparisons.
const SPREAD_MS: u64 = 60_000;
/// Peers may fill a map to so many times what a local writer may: two sides of a split fill it once each.
const PEERS_FACTOR: u64 = 2;

/// A tombstone younger than this goes only with its time, in milliseconds: it may not have reached everybody yet.
const YOUNG_MS: u64 = 600_000;
/// After looking for tombstones that may go, and finding none, nobody looks again for so long, in milliseconds.
const LOOK_AGAIN_MS: u64 = 10_000;

/// Stands for a key: the first half of its SHA-256.
pub type KeyHash = [u8; 16];

/// What a map may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of keys, values and rows that local writers may make.
    pub bytes_max: u64,
    /// Most rows that local writers may make.
    pub rows_max: usize,
    /// Longest key, in bytes.
    pub key_bytes_max: usize,
    /// Longest value, in bytes.
    pub value_bytes_max: usize,
    /// Most tombstones; beyond it the oldest go first, but none of the last ten minutes. Peers may bring twice as many.
    pub tombstones_max: usize,
    /// How long a tombstone is kept, in milliseconds.
    pub tombstone_lease_ms: u64,
    /// What gives way when it is full.
    pub keep: Keep,
}

/// What gives way when a map is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: writes are refused.
    All,
    /// The oldest rows.
    Newest,
}

/// What a key is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Body {
    /// The client's own number.
    pub flags: u64,
    /// The bytes.
    pub value: Vec<u8>,
}

/// A write, as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What was written.
    pub key: Arc<str>,
    /// When and by whom.
    pub stamp: Stamp,
    /// What to; none: it was deleted.
    pub body: Option<Arc<Body>>,
}

impl Record {
    /// Orders two writes of one stamp, which an honest writer does not make, and makes buckets differ.
    fn sum(&self) -> u64 {
        let mut sha = Context::new(&SHA256);
        sha.update(&(self.key.len() as u64).to_le_bytes());
        sha.update(self.key.as_bytes());
        sha.update(&self.stamp.ms.to_le_bytes());
        sha.update(&self.stamp.count.to_le_bytes());
        sha.update(&(self.stamp.node.as_str().len() as u64).to_le_bytes());
        sha.update(self.stamp.node.as_str().as_bytes());
        if let Some(body) = &self.body {
            sha.update(&body.flags.to_le_bytes());
            sha.update(&body.value);
        }
        sha.finish().as_ref().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// A key's state at this replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// When it was written, and by whom.
    pub stamp: Stamp,
    /// The record's sum.
    pub sum: u64,
    /// Its value; none: it was deleted.
    pub body: Option<Arc<Body>>,
    /// This replica's index when the key appeared.
    pub created: u64,
    /// This replica's index of the last change.
    pub modified: u64,
}

/// A row, for comparing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// The key.
    pub key: KeyHash,
    /// When it was written, and by whom.
    pub stamp: Stamp,
    /// The record's sum.
    pub sum: u64,
    /// Whether it was deleted.
    pub is_deleted: bool,
}

/// A replica as it presents itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Equal where the rows are.
    pub set_hash: u64,
    /// Wall time of the last comparison that evened everything out, in milliseconds; 0: there was none.
    pub synced_ms: u64,
    /// Stamp of the newest tombstone that was dropped, in milliseconds; 0: none was.
    pub purged_ms: u64,
    /// Rows from before this stamp are not taken, in milliseconds: there are newer ones enough.
    pub oldest_ms: u64,
}

impl Summary {
    /// Whether deletions may have been forgotten since this replica was last even with another.
    fn is_behind(&self, other: &Self) -> bool {
        self.synced_ms.saturating_add(SPREAD_MS) < other.purged_ms
    }
}

/// What to do about one bucket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Deleted keys to ask for, before the others: they make room.
    pub pull_deleted: Vec<KeyHash>,
    /// Live keys to ask for.
    pub pull: Vec<KeyHash>,
    /// Keys to give.
    pub give: Vec<KeyHash>,
    /// Keys that were dropped here: the other has the newer state.
    pub dropped: Vec<Arc<str>>,
}

/// What became of a peer's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// It is the newest.
    Taken,
    /// It was held already.
    Known,
    /// A newer one is held.
    Older,
}

/// Why a write is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The key is empty or too long.
    #[error("a key has 1 to {bytes_max} bytes; this one has {bytes}")]
    Key {
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The value is too long.
    #[error("value has {bytes} bytes; at most {bytes_max} are kept")]
    Value {
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// There is no room.
    #[error(
        "{bytes} of {bytes_max} bytes and {rows} of {rows_max} keys are in use: delete some, or raise the limit on every agent"
    )]
    Full {
        /// What is in use.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
        /// Keys in use.
        rows: usize,
        /// The bound.
        rows_max: usize,
    },
    /// Too many deletions are remembered, and all of them are young.
    #[error(
        "{tombstones} deletions are remembered, most of them from the last ten minutes, and {tombstones_max} may be: try again in some minutes"
    )]
    Deletions {
        /// How many are.
        tombstones: usize,
        /// The bound.
        tombstones_max: usize,
    },
    /// The writer's clock is ahead.
    #[error("written {ahead_ms} ms in the future: check the clocks")]
    Ahead {
        /// By how much.
        ahead_ms: u64,
    },
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// One key.
    Key(String),
    /// Every key that begins so.
    Prefix(String),
}

impl Scope {
    /// Whether `key` is part of it.
    pub fn covers(&self, key: &str) -> bool {
        match self {
            Self::Key(own) => own == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }
}

/// One replica.
#[derive(Debug, Clone)]
pub struct Table {
    limits: Limits,
    rows: BTreeMap<Arc<str>, Row>,
    by_hash: BTreeMap<KeyHash, Arc<str>>,
    buckets: Vec<u64>,
    clock: HybridClock,
    /// Of live rows.
    bytes: u64,
    live: usize,
    index: u64,
    /// The index of the last row that left without a trace.
    floor: u64,
    synced_ms: u64,
    purged_ms: u64,
    /// Until then no tombstone is old enough to go by number.
    look_again_ms: u64,
}

impl Table {
    /// Makes an empty replica whose indexes begin at `first_index`.
    pub fn new(limits: Limits, first_index: u64) -> Self {
        Self {
            limits,
            rows: BTreeMap::new(),
            by_hash: BTreeMap::new(),
            buckets: vec![0; BUCKETS],
            clock: HybridClock::default(),
            bytes: 0,
            live: 0,
            index: first_index.max(1),
            floor: first_index.max(1),
            synced_ms: 0,
            purged_ms: 0,
            look_again_ms: 0,
        }
    }

    /// Takes a row of the last run as it was; its indexes are kept, and new ones begin above them.
    pub fn restore(&mut self, record: Record, created: u64, modified: u64) {
        self.clock.observe(&record.stamp);
        self.index = self.index.max(modified);
        let sum = record.sum();
        self.place(record.key, Row { stamp: record.stamp, sum, body: record.body, created, modified });
    }

    /// Takes what is known from the last run: see [`Summary`].
    pub fn restore_times(&mut self, synced_ms: u64, purged_ms: u64) {
        (self.synced_ms, self.purged_ms) = (synced_ms, purged_ms);
    }

    /// Live rows, their bytes as they are counted, and tombstones.
    pub fn size(&self) -> (usize, u64, usize) {
        (self.live, self.bytes, self.tombstones())
    }

    fn tombstones(&self) -> usize {
        self.rows.len().saturating_sub(self.live)
    }

    /// What it may hold.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The state of `key`, deleted or not.
    pub fn row(&self, key: &str) -> Option<&Row> {
        self.rows.get(key)
    }

    /// The live rows of `scope`, in order of key.
    pub fn read<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = (&'a Arc<str>, &'a Row, &'a Arc<Body>)> {
        self.within(scope).filter_map(|(key, row)| Some((key, row, row.body.as_ref()?)))
    }

    /// The index of the last change to `scope`; that of the replica's beginning, where there was none.
    pub fn index_of(&self, scope: &Scope) -> u64 {
        self.within(scope).map(|(_, row)| row.modified).max().unwrap_or(0).max(self.floor)
    }

    /// The greatest index that was given out.
    pub fn index(&self) -> u64 {
        self.index
    }

    fn within<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = (&'a Arc<str>, &'a Row)> {
        let start = match scope {
            Scope::Key(text) | Scope::Prefix(text) => text.as_str(),
        };
        let from = self.rows.range::<str, _>((Bound::Included(start), Bound::Unbounded));
        from.take_while(move |(key, _)| scope.covers(key))
    }

    /// Writes as `node`.
    ///
    /// # Errors
    /// [`Refused`]; nothing is changed then.
    pub fn put(&mut self, key: &str, body: Body, node: &NodeName, now_ms: u64) -> Result<Record, Refused> {
        self.is_timely(now_ms)?;
        self.has_room(key, Some(body.value.len()), 1)?;
        let record = Record { key: key.into(), stamp: self.clock.tick(now_ms, node), body: Some(Arc::new(body)) };
        self.set(record.clone());
        Ok(record)
    }

    /// Deletes as `node` what is there; none: nothing is.
    ///
    /// # Errors
    /// [`Refused::Ahead`], [`Refused::Deletions`]; nothing is changed then.
    pub fn delete(&mut self, key: &str, node: &NodeName, now_ms: u64) -> Result<Option<Record>, Refused> {
        let held = self.rows.get_key_value(key).map(|(key, _)| Arc::clone(key));
        Ok(self.delete_all(held.as_slice(), node, now_ms)?.pop())
    }

    /// Deletes as `node` what is there of `keys`; all or none.
    ///
    /// # Errors
    /// [`Refused::Ahead`], [`Refused::Deletions`]; nothing is changed then.
    pub fn delete_all(&mut self, keys: &[Arc<str>], node: &NodeName, now_ms: u64) -> Result<Vec<Record>, Refused> {
        let is_live = |key: &&Arc<str>| self.rows.get(&***key).is_some_and(|row| row.body.is_some());
        let live: Vec<&Arc<str>> = keys.iter().filter(is_live).collect();
        if live.is_empty() {
            return Ok(Vec::new());
        }
        self.may_delete(live.len(), now_ms)?;
        let mut records = Vec::with_capacity(live.len());
        for key in live {
            let record = Record { key: Arc::clone(key), stamp: self.clock.tick(now_ms, node), body: None };
            self.set(record.clone());
            records.push(record);
        }
        Ok(records)
    }

    /// Tells whether a local writer may delete `count` keys.
    fn may_delete(&mut self, count: usize, now_ms: u64) -> Result<(), Refused> {
        self.is_timely(now_ms)?;
        let (tombstones, tombstones_max) = (self.tombstones(), self.limits.tombstones_max);
        let excess = tombstones.saturating_add(count).saturating_sub(tombstones_max);
        if excess == 0 {
            return Ok(());
        }
        let refused = Refused::Deletions { tombstones, tombstones_max };
        if tombstones >= tombstones_max && now_ms < self.look_again_ms {
            return Err(refused);
        }
        let may_go = |row: &&Row| row.body.is_none() && row.stamp.ms.saturating_add(YOUNG_MS) < now_ms;
        let old = self.rows.values().filter(may_go).take(excess).count();
        if old == 0 {
            self.look_again_ms = now_ms.saturating_add(LOOK_AGAIN_MS);
        }
        if old < excess { Err(refused) } else { Ok(()) }
    }

    /// Refuses to write with a stamp that no peer would take.
    fn is_timely(&self, now_ms: u64) -> Result<(), Refused> {
        let ahead_ms = self.clock.ahead_ms(now_ms);
        if ahead_ms > AHEAD_MS_MAX { Err(Refused::Ahead { ahead_ms }) } else { Ok(()) }
    }

    /// What [`Self::merge`] would say of a record of this stamp, for which no value was seen.
    pub fn would_take(
        &self,
        key: &str,
        stamp: &Stamp,
        value_bytes: Option<usize>,
        now_ms: u64,
    ) -> Result<Merged, Refused> {
        if stamp.ms > now_ms.saturating_add(AHEAD_MS_MAX) {
            return Err(Refused::Ahead { ahead_ms: stamp.ms.saturating_sub(now_ms) });
        }
        let judged = match self.rows.get(key) {
            Some(row) if row.stamp > *stamp => Merged::Older,
            None if value_bytes.is_none() && stamp.ms <= self.purged_ms => Merged::Older,
            None if stamp.ms < self.oldest_ms() => Merged::Older,
            // Of an equal stamp the sum may be another: only the whole record tells.
            Some(_) | None => Merged::Taken,
        };
        if judged == Merged::Taken {
            self.has_room(key, value_bytes, PEERS_FACTOR)?;
        }
        Ok(judged)
    }

    /// Takes another replica's record, if it is the newest.
    ///
    /// # Errors
    /// [`Refused`]; nothing is changed then.
    pub fn merge(&mut self, record: Record, now_ms: u64) -> Result<Merged, Refused> {
        let value_bytes = record.body.as_ref().map(|body| body.value.len());
        let judged = self.would_take(&record.key, &record.stamp, value_bytes, now_ms)?;
        if judged != Merged::Taken {
            return Ok(judged);
        }
        if let Some(row) = self.rows.get(&record.key) {
            match (&row.stamp, row.sum).cmp(&(&record.stamp, record.sum())) {
                std::cmp::Ordering::Equal => return Ok(Merged::Known),
                std::cmp::Ordering::Greater => return Ok(Merged::Older),
                std::cmp::Ordering::Less => {}
            }
        }
        self.clock.observe(&record.stamp);
        self.set(record);
        Ok(Merged::Taken)
    }

    fn has_room(&self, key: &str, value_bytes: Option<usize>, factor: u64) -> Result<(), Refused> {
        let Limits { bytes_max, rows_max, key_bytes_max, value_bytes_max, keep, .. } = self.limits;
        if key.is_empty() || key.len() > key_bytes_max {
            return Err(Refused::Key { bytes: key.len(), bytes_max: key_bytes_max });
        }
        let Some(bytes) = value_bytes else { return self.has_room_for_tombstone(key) };
        if bytes > value_bytes_max {
            return Err(Refused::Value { bytes, bytes_max: value_bytes_max });
        }
        let held = self.rows.get(key).filter(|row| row.body.is_some());
        let freed = held.map_or(0, |row| cost(key, row.body.as_deref()));
        let wanted = self.bytes.saturating_sub(freed).saturating_add(ROW_BYTES + (key.len() + bytes) as u64);
        let rows = self.live + usize::from(held.is_none());
        let rows_most = (rows_max as u64).saturating_mul(factor);
        // Who frees some may go on writing, though others filled it beyond the bound.
        let has_no_bytes = wanted > bytes_max.saturating_mul(factor) && wanted > self.bytes;
        let has_no_rows = rows as u64 > rows_most && held.is_none();
        let is_full = has_no_bytes || has_no_rows;
        if keep == Keep::All && is_full {
            return Err(Refused::Full { bytes: self.bytes, bytes_max, rows: self.live, rows_max });
        }
        Ok(())
    }

    /// Whether a peer's tombstone has room.
    fn has_room_for_tombstone(&self, key: &str) -> Result<(), Refused> {
        let (tombstones, tombstones_max) = (self.tombstones(), self.limits.tombstones_max);
        let is_one = self.rows.get(key).is_some_and(|row| row.body.is_none());
        if !is_one && tombstones as u64 >= (tombstones_max as u64).saturating_mul(PEERS_FACTOR) {
            return Err(Refused::Deletions { tombstones, tombstones_max });
        }
        Ok(())
    }

    /// Puts `record` in place with the next index.
    fn set(&mut self, record: Record) {
        self.index = self.index.saturating_add(1);
        let sum = record.sum();
        let known = self.rows.get(&record.key).filter(|row| row.body.is_some());
        let created = known.map_or(self.index, |row| row.created);
        let row = Row { stamp: record.stamp, sum, body: record.body, created, modified: self.index };
        self.place(record.key, row);
    }

    fn place(&mut self, key: Arc<str>, row: Row) {
        self.remove(&key);
        self.flip(key_hash(&key), row.sum);
        if row.body.is_some() {
            self.live += 1;
            self.bytes = self.bytes.saturating_add(cost(&key, row.body.as_deref()));
        }
        self.by_hash.insert(key_hash(&key), Arc::clone(&key));
        self.rows.insert(key, row);
    }

    fn remove(&mut self, key: &str) -> Option<Row> {
        let row = self.rows.remove(key)?;
        let hash = key_hash(key);
        self.by_hash.remove(&hash);
        self.flip(hash, row.sum);
        if row.body.is_some() {
            self.live = self.live.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(cost(key, row.body.as_deref()));
        }
        Some(row)
    }

    fn flip(&mut self, hash: KeyHash, sum: u64) {
        if let Some(bucket) = self.buckets.get_mut(usize::from(bucket_of(&hash))) {
            *bucket ^= sum;
        }
    }

    /// Whether there is more than [`Self::purge`] would leave, leases aside. Cheap.
    pub fn is_over(&self, now_ms: u64) -> bool {
        let has_rows_too_many = self.limits.keep == Keep::Newest && self.live > self.limits.rows_max;
        let has_tombstones_too_many = self.tombstones() > self.limits.tombstones_max && now_ms >= self.look_again_ms;
        has_tombstones_too_many || has_rows_too_many
    }

    /// Lets tombstones go whose time is over or that are too many (then an eighth more, so that it is seldom, but none that is
    /// younger than ten minutes), and the oldest rows of a map that keeps the newest; returns the keys that left.
    pub fn purge(&mut self, now_ms: u64) -> Vec<Arc<str>> {
        let tombstones = self.tombstones();
        let lease_ms = self.limits.tombstone_lease_ms;
        let mut dead: Vec<(u64, Arc<str>)> = Vec::new();
        if tombstones > 0 {
            let all = self.rows.iter().filter(|(_, row)| row.body.is_none());
            dead.extend(all.map(|(key, row)| (row.stamp.ms, Arc::clone(key))));
            dead.sort_unstable();
        }
        let most = self.limits.tombstones_max;
        let too_many = if dead.len() > most { dead.len() - (most - most / 8) } else { 0 };
        let older = |than_ms: u64| dead.iter().filter(|(ms, _)| ms.saturating_add(than_ms) < now_ms).count();
        let (over, old) = (older(lease_ms), older(YOUNG_MS));
        dead.truncate(too_many.min(old).max(over));
        let mut left = Vec::with_capacity(dead.len());
        for (ms, key) in dead {
            if let Some(row) = self.remove(&key) {
                self.floor = self.floor.max(row.modified);
                self.purged_ms = self.purged_ms.max(ms);
                left.push(key);
            }
        }
        if self.tombstones() > most {
            self.look_again_ms = now_ms.saturating_add(LOOK_AGAIN_MS);
        }
        while self.limits.keep == Keep::Newest && self.live > self.limits.rows_max {
            let rows = self.rows.iter().filter(|(_, row)| row.body.is_some());
            let oldest = rows.min_by_key(|(_, row)| (&row.stamp, row.sum)).map(|(key, _)| Arc::clone(key));
            let Some(oldest) = oldest else { break };
            self.vanish(&oldest);
            left.push(oldest);
        }
        left
    }

    /// Takes a live row out without a tombstone; readers of everything see a change.
    fn vanish(&mut self, key: &str) {
        self.remove(key);
        self.index = self.index.saturating_add(1);
        self.floor = self.index;
    }

    /// The stamp before which rows are not taken; 0: any is.
    fn oldest_ms(&self) -> u64 {
        if self.limits.keep == Keep::All || self.live < self.limits.rows_max {
            return 0;
        }
        self.rows.values().map(|row| row.stamp.ms).min().unwrap_or(0)
    }

    // Comparing with another replica.

    /// How this replica presents itself; a time that lies in the future, by a clock that was ahead, counts as `now_ms`.
    pub fn summary(&self, now_ms: u64) -> Summary {
        let set_hash = self.buckets.iter().zip(1u64..).fold(0, |hash, (bucket, at)| {
            let mixed = (bucket ^ at).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            if *bucket == 0 { hash } else { hash ^ mixed.rotate_left(23) }
        });
        Summary {
            set_hash,
            synced_ms: self.synced_ms.min(now_ms),
            purged_ms: self.purged_ms,
            oldest_ms: self.oldest_ms(),
        }
    }

    /// The sums of the buckets.
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }

    /// At most `most` digests of `bucket` after key `after`, in order; and whether these are the last.
    pub fn digests(&self, bucket: u8, after: Option<KeyHash>, most: usize) -> (Vec<Digest>, bool) {
        let mut least = [0; 16];
        if let Some(first) = least.first_mut() {
            *first = bucket;
        }
        let from = after.map_or(Bound::Included(least), Bound::Excluded);
        let mut rest = self.by_hash.range((from, Bound::Unbounded)).take_while(|(hash, _)| bucket_of(hash) == bucket);
        let listed = rest.by_ref().take(most).filter_map(|(hash, key)| Some(digest_of(*hash, self.rows.get(key)?)));
        let listed = listed.collect();
        (listed, rest.next().is_none())
    }

    /// The record of a key.
    pub fn record(&self, key: &KeyHash) -> Option<Record> {
        let key = self.by_hash.get(key)?;
        let row = self.rows.get(key)?;
        Some(Record { key: Arc::clone(key), stamp: row.stamp.clone(), body: row.body.clone() })
    }

    /// Compares `bucket` with the other replica's digests of it, all of them, and drops what was deleted meanwhile.
    pub fn plan(&mut self, other: &Summary, bucket: u8, theirs: &[Digest], now_ms: u64) -> Plan {
        let own = self.summary(now_ms);
        let other = &Summary { synced_ms: other.synced_ms.min(now_ms), ..*other };
        let (am_behind, are_behind) = (own.is_behind(other), other.is_behind(&own));
        let mut plan = Plan::default();
        let theirs: BTreeMap<KeyHash, &Digest> = theirs.iter().map(|digest| (digest.key, digest)).collect();
        for (key, digest) in &theirs {
            let held = self.by_hash.get(key).and_then(|key| self.rows.get(key));
            let wanted = if let Some(row) = held {
                (&row.stamp, row.sum) < (&digest.stamp, digest.sum)
            } else {
                // What it could have missed the deletion of, and what is deleted and forgotten here.
                let is_suspect = digest.is_deleted || (are_behind && !am_behind);
                let is_lost = is_suspect && digest.stamp.ms <= own.purged_ms;
                !is_lost && digest.stamp.ms >= own.oldest_ms
            };
            if wanted && bucket_of(key) == bucket {
                if digest.is_deleted { plan.pull_deleted.push(*key) } else { plan.pull.push(*key) }
            }
        }
        let (mine, _) = self.digests(bucket, None, usize::MAX);
        for digest in mine {
            match theirs.get(&digest.key) {
                Some(held) if (&held.stamp, held.sum) >= (&digest.stamp, digest.sum) => {}
                None if digest.stamp.ms < other.oldest_ms => {}
                None if digest.stamp.ms > other.purged_ms => plan.give.push(digest.key),
                None if digest.is_deleted => {}
                None if am_behind && !are_behind => {
                    let Some(key) = self.by_hash.get(&digest.key).cloned() else { continue };
                    self.vanish(&key);
                    plan.dropped.push(key);
                }
                Some(_) | None => plan.give.push(digest.key),
            }
        }
        plan
    }

    /// Notes that this replica was even with another at `now_ms`.
    pub fn synced(&mut self, now_ms: u64) {
        self.synced_ms = self.synced_ms.max(now_ms);
    }
}

fn digest_of(key: KeyHash, row: &Row) -> Digest {
    Digest { key, stamp: row.stamp.clone(), sum: row.sum, is_deleted: row.body.is_none() }
}

/// What a live row counts.
fn cost(key: &str, body: Option<&Body>) -> u64 {
    ROW_BYTES + (key.len() + body.map_or(0, |body| body.value.len())) as u64
}

/// Returns the hash that stands for `key`.
pub fn key_hash(key: &str) -> KeyHash {
    digest::digest(&SHA256, key.as_bytes()).as_ref().first_chunk().copied().unwrap_or_default()
}

fn bucket_of(hash: &KeyHash) -> u8 {
    hash.first().copied().unwrap_or_default()
}

//! How often tokens were used here (issuers).

use std::time::Duration;

use redb::ReadableTable as _;

use super::{Store, StoreError, TOKENS, decode, encode};
use crate::clock::{self, UnixSeconds};
use crate::wire::{self, FRAME_BYTES_MAX};

/// How long the uses of a token are remembered after its end: longer than any clock that still lets it in is wrong.
pub(super) const TOKEN_KEPT_AFTER_END: Duration = Duration::from_hours(24);
/// A newcomer that lost the answer asks again within this time; later the same key is a use like any other, for a key
/// that was stolen with its node must not live on by the token that brought it in.
const TOKEN_REPEAT_WITHIN: Duration = Duration::from_mins(10);
/// Most keys that are remembered of one token.
const TOKEN_KEYS_MAX: usize = 64;

/// How often a token was used, and until when that matters.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct TokenUses {
    uses: u32,
    not_after: u64,
    /// The latest keys that used it, oldest first, each with the time of its first use.
    keys: Vec<([u8; 32], UnixSeconds)>,
}

/// How often a token was used here, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenCount {
    /// The token's id.
    pub id: [u8; 16],
    /// Uses.
    pub uses: u32,
    /// The token's end.
    pub not_after: UnixSeconds,
}

impl Store {
    /// Counts one use of token `id` by `key` and returns how many there were before (issuers); none if the same key used
    /// it within the last ten minutes: then nothing is counted.
    ///
    /// The count is kept until `not_after` (seconds since the epoch) and a day; counts past that go at each call.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn count_token_use(&self, id: [u8; 16], not_after: u64, key: [u8; 32]) -> Result<Option<u32>, StoreError> {
        self.count_token_use_at(id, not_after, key, clock::wall())
    }

    /// Returns how often each token was used here.
    ///
    /// # Errors
    /// [`StoreError`] if the file fails.
    pub fn token_counts(&self) -> Result<Vec<TokenCount>, StoreError> {
        let uses = self.values::<TokenUses>(TOKENS)?;
        let count = |(key, uses): (String, TokenUses)| {
            let id = *key.parse::<uuid::Uuid>().ok()?.as_bytes();
            Some(TokenCount { id, uses: uses.uses, not_after: UnixSeconds(uses.not_after) })
        };
        Ok(uses.into_iter().filter_map(count).collect())
    }

    pub(super) fn count_token_use_at(
        &self,
        id: [u8; 16],
        not_after: u64,
        used_by: [u8; 32],
        now: UnixSeconds,
    ) -> Result<Option<u32>, StoreError> {
        let key = uuid::Uuid::from_bytes(id).to_string();
        let path = &self.inner.path;
        // One transaction: two joins at once must not both be the first.
        self.write(|transaction| {
            let mut table = transaction.open_table(TOKENS)?;
            let is_kept = |_: &str, bytes: &[u8]| {
                let uses = wire::decode::<TokenUses>(bytes, FRAME_BYTES_MAX);
                // What does not decode is kept: a use too many is worse than a stale line.
                uses.map_or(true, |uses| UnixSeconds(uses.not_after).plus(TOKEN_KEPT_AFTER_END) >= now)
            };
            table.retain(is_kept)?;
            let kept = table.get(key.as_str())?.map(|bytes| decode(path, TOKENS, &key, bytes.value()));
            let mut uses = match kept.transpose() {
                Ok(kept) => kept.unwrap_or(TokenUses { uses: 0, not_after, keys: Vec::new() }),
                Err(error) => return Ok(Err(error)),
            };
            let is_repeat =
                |(key, at): &([u8; 32], UnixSeconds)| *key == used_by && now <= at.plus(TOKEN_REPEAT_WITHIN);
            if uses.keys.iter().any(is_repeat) {
                return Ok(Ok(None));
            }
            let before = uses.uses;
            uses.uses = before.saturating_add(1);
            if uses.keys.len() >= TOKEN_KEYS_MAX {
                uses.keys.remove(0);
            }
            uses.keys.push((used_by, now));
            match encode(&key, &uses) {
                Ok(bytes) => table.insert(key.as_str(), bytes.as_slice())?,
                Err(error) => return Ok(Err(error)),
            };
            Ok(Ok(Some(before)))
        })?
    }
}

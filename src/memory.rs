//! Has the allocator give memory back.
//!
//! mimalloc returns freed pages to the system a second after, but looks whether any are due only when a thread takes or
//! frees a whole page. An agent that falls idle does neither, and would keep what its start or a burst of connections
//! took: 2 to 5 MB of the one, up to 16 KiB per connection of the other. So it takes and frees one now and then.
//!
//! Under another allocator this does nothing. Not here: what takes memory.

use std::hint::black_box;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How often an agent looks: an idle one gives back within this and a second. A few microseconds each.
const EVERY: Duration = Duration::from_secs(5);
/// A block that has a page to itself (from 512 KiB on); none of it is touched.
const BLOCK_BYTES: usize = 1 << 20;
/// A thread keeps an empty page for 16 more requests that find no free block.
const REQUESTS: usize = 32;

/// Gives back what this thread freed, and what all threads freed more than a second ago.
pub(crate) fn give_back() {
    for _ in 0..REQUESTS {
        drop(black_box(Vec::<u8>::with_capacity(BLOCK_BYTES)));
    }
}

/// Gives memory back now and then, until `stop`.
///
/// # Cancel safety
/// Cancelling ends it.
pub(crate) async fn keep_small(stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
        give_back();
    }
}

//! Requests that wait for an instance of a service, where all of them have as much as they bear.
//!
//! ```text
//!   enter -> by priority, then in order -> called, one for each call that ends -> picks again -> leaves, the next is called
//!                                   \-> its time is over: refused
//! ```
//!
//! How long one may wait is controlled delay (CoDel's idea for servers: Maurer, "Fail at Scale", ACM Queue 13/8, 2015). A
//! queue that was empty a moment ago holds a burst: its calls may wait as long as an answer takes. One that has been there
//! for longer than that is no burst: what waits there longer than a twentieth of it is refused, and those that are
//! admitted wait hardly at all.
//!
//! Invariants: a place is taken out when its [`Turn`] is dropped; somebody is called for each call that ends and each turn
//! that leaves, as long as there is one; nobody waits longer than [`WAIT_MAX`].
//! Not here: how many may wait (`usage`), the timer (`proxy`).

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use super::seat::{Common, Waiting};
use crate::upstream::Priority;

/// Nobody waits longer: a caller that has not been answered by then asks again.
pub const WAIT_MAX: Duration = Duration::from_secs(3);
/// A burst may last this long in any case (the interval of CoDel, RFC 8289 §4.3).
const BURST_MIN: Duration = Duration::from_millis(100);
/// In a queue that lasts, this part of the time of a burst (the target of CoDel, RFC 8289 §4.3).
const LASTING_PART: u32 = 20;

/// The most urgent first, then in order.
type Key = (Reverse<Priority>, u64);

#[derive(Debug, Default)]
struct Waiter {
    is_called: bool,
    waker: Option<Waker>,
}

/// Who waits.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Key, Waiter>,
    next: u64,
    /// Since when somebody has been waiting, and somebody of high priority; none: nobody is.
    since: Option<Instant>,
    since_high: Option<Instant>,
}

impl Queue {
    /// Whether a newcomer would pass somebody who waits and matters as much.
    pub(super) fn is_before(&self, priority: Priority) -> bool {
        self.waiting.first_key_value().is_some_and(|((Reverse(first), _), _)| *first >= priority)
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How long a newcomer may wait, where answers take `typical`.
    fn patience(&self, priority: Priority, typical: Duration, now: Instant) -> Duration {
        let burst = typical.clamp(BURST_MIN, WAIT_MAX);
        // Who goes first waits in a queue of its own, as it were.
        let since = if priority == Priority::High { self.since_high } else { self.since };
        let is_lasting = since.is_some_and(|since| now.saturating_duration_since(since) > burst);
        if is_lasting { burst / LASTING_PART } else { burst }
    }

    fn enter(&mut self, priority: Priority, now: Instant) -> Key {
        self.since.get_or_insert(now);
        if priority == Priority::High {
            self.since_high.get_or_insert(now);
        }
        let key = (Reverse(priority), self.next);
        self.next += 1;
        self.waiting.insert(key, Waiter::default());
        key
    }

    /// Calls the first who was not called; returns what wakes it.
    #[must_use]
    pub(super) fn call(&mut self) -> Option<Waker> {
        let waiter = self.waiting.values_mut().find(|waiter| !waiter.is_called)?;
        waiter.is_called = true;
        waiter.waker.take()
    }

    fn leave(&mut self, key: Key) {
        self.waiting.remove(&key);
        if !self.is_before(Priority::High) {
            self.since_high = None;
        }
        if self.waiting.is_empty() {
            self.since = None;
        }
    }
}

/// A call's place in the queue, while this lives.
#[derive(Debug)]
pub struct Turn {
    common: Rc<Common>,
    key: Key,
    until: Instant,
    _counted: Waiting,
}

impl Turn {
    pub(super) fn enter(common: &Rc<Common>, counted: Waiting, priority: Priority, now: Instant) -> Self {
        let typical = Duration::from_secs_f64(common.typical.get().max(0.0) / 1e9);
        let mut queue = common.queue.borrow_mut();
        let until = now + queue.patience(priority, typical, now);
        let key = queue.enter(priority, now);
        drop(queue);
        Self { common: Rc::clone(common), key, until, _counted: counted }
    }

    /// When it is refused.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Waits until it may pick again; the next time it waits to be called anew.
    pub fn poll_called(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut queue = self.common.queue.borrow_mut();
        let Some(waiter) = queue.waiting.get_mut(&self.key) else { return Poll::Ready(()) };
        if std::mem::take(&mut waiter.is_called) {
            return Poll::Ready(());
        }
        waiter.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waker = {
            let mut queue = self.common.queue.borrow_mut();
            queue.leave(self.key);
            // There may be room for more than one: whoever comes next finds out.
            queue.call()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_burst_may_wait_as_long_as_an_answer_takes_and_a_queue_that_lasts_hardly() {
        use Priority::{High, Normal};
        let (mut queue, now) = (Queue::default(), crate::clock::now());
        let patience = |queue: &Queue, priority, typical: u32, after: u32| {
            queue.patience(priority, MS * typical, now + MS * after)
        };
        assert_eq!(patience(&queue, Normal, 1, 0), MS * 100);
        assert_eq!(patience(&queue, Normal, 400, 0), MS * 400);
        assert_eq!(patience(&queue, Normal, 60_000, 0), WAIT_MAX);
        let first = queue.enter(Normal, now);
        assert_eq!(patience(&queue, Normal, 1, 100), MS * 100);
        assert_eq!(patience(&queue, Normal, 1, 101), MS * 5);
        assert_eq!(patience(&queue, Normal, 400, 401), MS * 20);
        // Those who go first do not wait behind the others.
        assert_eq!(patience(&queue, High, 1, 101), MS * 100);
        let high = queue.enter(High, now + MS * 101);
        assert_eq!(patience(&queue, High, 1, 202), MS * 5);
        queue.leave(high);
        assert_eq!(patience(&queue, High, 1, 202), MS * 100);
        // Empty once, and it is a burst again.
        queue.leave(first);
        queue.enter(Normal, now + MS * 200);
        assert_eq!(patience(&queue, Normal, 1, 201), MS * 100);
    }

    #[test]
    fn the_most_urgent_is_called_first_and_equals_in_order() {
        let (mut queue, now) = (Queue::default(), crate::clock::now());
        let keys =
            [Priority::Normal, Priority::High, Priority::Normal, Priority::High].map(|one| queue.enter(one, now));
        let mut called = Vec::new();
        for _ in 0..5 {
            assert!(queue.call().is_none(), "nobody left a waker");
            let is_new = |key: &&Key| queue.waiting[*key].is_called && !called.contains(*key);
            let new = keys.iter().find(is_new).copied();
            called.extend(new);
        }
        assert_eq!(called, [keys[1], keys[3], keys[0], keys[2]]);
        assert!(queue.is_before(Priority::High) && queue.is_before(Priority::Low));
        queue.leave(keys[1]);
        queue.leave(keys[3]);
        assert!(!queue.is_before(Priority::High) && queue.is_before(Priority::Normal));
    }
}

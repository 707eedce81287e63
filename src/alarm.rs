//! Timers of a quiet thread: one alarm of the kernel's for all of them, so that an idle agent wakes when something is due
//! and at no other time.
//!
//! ```text
//!   sleep_until(at) --poll--> Queue: (at, waker), earliest first --arm--> timerfd --epoll--> ring: wakes what is due
//! ```
//!
//! tokio keeps its timers in wheels of slots: a timer that is further away than 64 ms wakes the thread at the edge of its
//! slot, to be sorted anew, and a timer before all others writes to the runtime's own eventfd, which wakes it once more.
//! A busy thread does not notice; of the wake-ups of an idle agent more than half were of these two kinds.
//!
//! Invariants: no timer rings early; one rings [`SLACK`] late at most, as far as the host lets the thread run; a timer that
//! was dropped or moved away wakes nobody (its thread perhaps, once).
//! Not here: the data plane's workers, which keep tokio's timers. Threads without [`install`] get tokio's as well: so
//! virtual time works in tests.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tracing::error;

use crate::clock;

/// Timers so close to each other ring together, when the last of them is due. tokio's own timers count in milliseconds too.
const SLACK: Duration = Duration::from_millis(1);

thread_local! {
    static OF_THREAD: RefCell<Option<Arc<Alarms>>> = const { RefCell::new(None) };
}

/// What is to ring, and when. Pure.
#[derive(Debug, Default)]
struct Queue {
    due: BTreeMap<(Instant, u64), Waker>,
    /// When the kernel rings, if it does.
    armed: Option<Instant>,
    last_id: u64,
}

impl Queue {
    fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Enters a timer, or its new waker.
    fn wait(&mut self, at: Instant, id: u64, waker: &Waker) {
        self.due.entry((at, id)).and_modify(|old| old.clone_from(waker)).or_insert_with(|| waker.clone());
    }

    fn forget(&mut self, at: Instant, id: u64) {
        self.due.remove(&(at, id));
    }

    /// The kernel has rung: takes out what is due.
    fn rung(&mut self, now: Instant) -> Vec<Waker> {
        self.armed = None;
        let mut due = Vec::new();
        while let Some(first) = self.due.first_entry() {
            if first.key().0 > now {
                break;
            }
            due.push(first.remove());
        }
        due
    }

    /// When the kernel is to ring in place of when it does now; `None` if that is right, or nobody waits.
    fn rearm(&mut self) -> Option<Instant> {
        let (first, _id) = *self.due.first_key_value()?.0;
        if self.armed.is_some_and(|at| first <= at && at <= first + SLACK) {
            return None;
        }
        self.armed = Some(first + SLACK);
        self.armed
    }
}

/// The timers of one thread.
struct Alarms {
    kernel: TimerFd,
    queue: Mutex<Queue>,
}

impl Alarms {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, at: Instant, id: u64, waker: &Waker, now: Instant) {
        let mut queue = self.queue();
        queue.wait(at, id, waker);
        self.arm(&mut queue, now);
    }

    fn arm(&self, queue: &mut Queue, now: Instant) {
        let Some(at) = queue.rearm() else { return };
        // Zero would take the alarm off.
        let span = at.saturating_duration_since(now).max(Duration::from_nanos(1));
        let once = Expiration::OneShot(TimeSpec::from_duration(span));
        if let Err(error) = self.kernel.set(once, TimerSetTimeFlags::empty()) {
            // Not known to happen. The next timer that is waited for tries again.
            queue.armed = None;
            error!(%error, "the kernel's timer cannot be set; timers may come late");
        }
    }

    fn ring(&self, now: Instant) {
        let due = {
            let mut queue = self.queue();
            let due = queue.rung(now);
            self.arm(&mut queue, now);
            due
        };
        for waker in due {
            waker.wake();
        }
    }
}

impl fmt::Debug for Alarms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alarms").field("queue", &self.queue()).finish_non_exhaustive()
    }
}

/// A duplicate of the timer's descriptor, on the current runtime.
#[expect(deprecated, reason = "what takes its place is unsafe to call")]
fn register(kernel: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(kernel, Interest::READABLE)
}

/// As long as this lives, its thread's timers are the kernel's.
#[derive(Debug)]
#[must_use = "timers of this thread end to ring with it"]
pub struct Installed {
    _ringing: JoinSet<()>,
}

impl Drop for Installed {
    fn drop(&mut self) {
        OF_THREAD.take();
    }
}

/// Gives this thread, of a current-thread runtime that runs now, timers of its own: those that [`sleep_until`] makes here
/// from now on. They need what is returned to be kept.
///
/// # Errors
/// The kernel's, which has no descriptor left.
pub fn install() -> io::Result<Installed> {
    let kernel = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    let rings = register(kernel.as_fd().try_clone_to_owned()?)?;
    let alarms = Arc::new(Alarms { kernel, queue: Mutex::default() });
    let of_ring = Arc::clone(&alarms);
    let mut ringing = JoinSet::new();
    ringing.spawn(async move {
        loop {
            match rings.readable().await {
                // Never read: setting the timer anew takes back what it has counted.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return error!(%error, "the kernel's timer is gone"),
            }
            of_ring.ring(clock::now());
        }
    });
    OF_THREAD.set(Some(alarms));
    Ok(Installed { _ringing: ringing })
}

/// Waits until `at`, by the alarm of this thread if it has one, by tokio's timers otherwise.
///
/// # Cancel safety
/// Dropping it takes the time out.
pub fn sleep_until(at: Instant) -> Alarm {
    let own = OF_THREAD.with_borrow(Clone::clone);
    Alarm(match own {
        Some(alarms) => {
            let id = alarms.queue().id();
            Timer::Own { alarms, at, id, is_entered: false }
        }
        None => Timer::Wheel(Box::pin(tokio::time::sleep_until(at))),
    })
}

/// What [`sleep_until`] returns.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Alarm(Timer);

#[derive(Debug)]
enum Timer {
    Own { alarms: Arc<Alarms>, at: Instant, id: u64, is_entered: bool },
    Wheel(Pin<Box<Sleep>>),
}

impl Alarm {
    /// Waits until `time` instead; the time before is forgotten.
    pub fn reset(&mut self, time: Instant) {
        match &mut self.0 {
            Timer::Own { alarms, at, id, is_entered } => {
                if std::mem::take(is_entered) {
                    alarms.queue().forget(*at, *id);
                }
                *at = time;
            }
            // `Sleep::reset` to a later time would leave the old entry in the wheel, which wakes the thread at the old time.
            Timer::Wheel(sleep) => sleep.set(tokio::time::sleep_until(time)),
        }
    }
}

impl Future for Alarm {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Timer::Own { alarms, at, id, is_entered } => {
                let now = clock::now();
                if now < *at {
                    *is_entered = true;
                    alarms.wait(*at, *id, cx.waker(), now);
                    return Poll::Pending;
                }
                if std::mem::take(is_entered) {
                    alarms.queue().forget(*at, *id);
                }
                Poll::Ready(())
            }
            Timer::Wheel(sleep) => sleep.as_mut().poll(cx),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Timer::Own { alarms, at, id, is_entered: true } = &self.0 {
            alarms.queue().forget(*at, *id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_kernel_rings_for_the_earliest_and_neighbours_share_a_ring() {
        let (mut queue, start, waker) = (Queue::default(), clock::now(), Waker::noop());
        let [far, near, beside] = [queue.id(), queue.id(), queue.id()];
        assert_eq!(queue.rearm(), None);
        queue.wait(start + ms(500), far, waker);
        assert_eq!(queue.rearm(), Some(start + ms(500) + SLACK));
        assert_eq!(queue.rearm(), None, "it is set");
        queue.wait(start + ms(20), near, waker);
        assert_eq!(queue.rearm(), Some(start + ms(20) + SLACK));
        queue.wait(start + ms(20) + SLACK / 2, beside, waker);
        assert_eq!(queue.rearm(), None, "they ring together");
        assert_eq!(queue.rung(start + ms(20) + SLACK).len(), 2);
        assert_eq!(queue.rearm(), Some(start + ms(500) + SLACK));
        // What nobody waits for any longer does not ring, and what was set for it is set anew for the next.
        let next = queue.id();
        queue.wait(start + ms(900), next, waker);
        queue.forget(start + ms(500), far);
        assert_eq!(queue.rearm(), Some(start + ms(900) + SLACK));
        assert_eq!(queue.rung(start + ms(899)).len(), 0, "none rings early");
        assert_eq!(queue.rearm(), Some(start + ms(900) + SLACK), "a ring for nothing sets the alarm again");
    }

    #[test]
    fn a_timer_that_is_asked_again_wakes_the_last_who_asked() {
        let (mut queue, at) = (Queue::default(), clock::now());
        let [first, last] = [Arc::new(Count::default()), Arc::new(Count::default())];
        let id = queue.id();
        queue.wait(at, id, &Waker::from(Arc::clone(&first)));
        queue.wait(at, id, &Waker::from(Arc::clone(&last)));
        queue.rung(at).into_iter().for_each(Waker::wake);
        assert_eq!([first, last].map(|count| count.0.load(Ordering::Relaxed)), [0, 1]);
    }

    #[tokio::test]
    async fn timers_of_a_thread_ring_in_their_order_and_not_early() {
        let _installed = install().unwrap();
        let start = clock::now();
        let mut moved = sleep_until(start + ms(3_600_000));
        tokio::select! {
            biased;
            () = &mut moved => panic!("an hour early"),
            () = sleep_until(start + ms(30)) => {}
        }
        assert!(start.elapsed() >= ms(30));
        moved.reset(start + ms(40));
        moved.await;
        assert!(start.elapsed() >= ms(40));
        // One that is due already does not wait.
        sleep_until(start).await;
        let alarms = OF_THREAD.with_borrow(Clone::clone).unwrap();
        assert!(alarms.queue().due.is_empty());
    }

    #[tokio::test]
    async fn a_thread_without_an_alarm_of_its_own_has_the_wheel() {
        drop(install().unwrap());
        assert!(matches!(sleep_until(clock::now()).0, Timer::Wheel(_)));
    }
}

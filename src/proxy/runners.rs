//! Tasks that serve peers' streams, kept for the next stream.
//!
//! ```text
//!   stream -> an idle runner? its seat : a new task -> serve -> seat in the idle list, until the next stream
//! ```
//!
//! A task per stream would move its state, some kilobytes, into a fresh allocation and out of it for every request.
//! Invariant: at most [`IDLE_MAX`] runners wait; one that has served leaves when there are more. Not here: how a stream
//! is served (`inbound`).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Runners that wait for a stream, per worker: as many as requests are under way at once on a busy one.
const IDLE_MAX: usize = 256;

/// Where a waiting runner gets its next job.
struct Seat<J> {
    job: Cell<Option<J>>,
    waker: Cell<Option<Waker>>,
}

/// The runners of one worker that wait.
pub(super) struct Runners<J> {
    idle: RefCell<Vec<Rc<Seat<J>>>>,
}

impl<J> Default for Runners<J> {
    fn default() -> Self {
        Self { idle: RefCell::default() }
    }
}

impl<J> Runners<J> {
    /// Gives `job` to a runner that waits; gives it back if none does.
    pub(super) fn give(&self, job: J) -> Option<J> {
        let Some(seat) = self.idle.borrow_mut().pop() else { return Some(job) };
        seat.job.set(Some(job));
        if let Some(waker) = seat.waker.take() {
            waker.wake();
        }
        None
    }

    /// Serves `job`, and then whatever is given, until too many wait.
    ///
    /// # Cancel safety
    /// Dropping the future drops the job that it serves; a job that it was given and has not begun is dropped too.
    pub(super) async fn run<F: Future<Output = ()>>(&self, mut job: J, serve: impl Fn(J) -> F) {
        let seat = Rc::new(Seat { job: Cell::new(None), waker: Cell::new(None) });
        loop {
            serve(job).await;
            {
                let mut idle = self.idle.borrow_mut();
                if idle.len() >= IDLE_MAX {
                    return;
                }
                idle.push(Rc::clone(&seat));
            }
            job = poll_fn(|cx| {
                if let Some(job) = seat.job.take() {
                    return Poll::Ready(job);
                }
                seat.waker.set(Some(cx.waker().clone()));
                Poll::Pending
            })
            .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs every task until none goes on by itself.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn a_runner_that_has_served_takes_the_next_job_and_surplus_ones_leave() {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.build_local(tokio::runtime::LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let runners = Rc::new(Runners::default());
            let served = Rc::new(Cell::new(0));
            let start = |job: usize| {
                let (runners, served) = (Rc::clone(&runners), Rc::clone(&served));
                tokio::task::spawn_local(async move {
                    runners
                        .run(job, |job| {
                            served.set(served.get() + job);
                            async {}
                        })
                        .await;
                })
            };
            assert_eq!(runners.give(1), Some(1), "nobody waits yet");
            let first = start(1);
            settle().await;
            assert_eq!((served.get(), runners.idle.borrow().len()), (1, 1));
            for job in [10, 100] {
                assert_eq!(runners.give(job), None);
                settle().await;
            }
            assert_eq!((served.get(), runners.idle.borrow().len()), (111, 1));
            let more: Vec<_> = (0..IDLE_MAX).map(|_| start(0)).collect();
            settle().await;
            assert_eq!(runners.idle.borrow().len(), IDLE_MAX);
            assert!(!first.is_finished());
            assert_eq!(more.iter().filter(|task| task.is_finished()).count(), 1);
        });
    }
}

//! Named tasks that are joined; a panic of one stops the node, loudly.
//!
//! ```text
//!   Tasks::spawn("gossip", …) -> JoinSet -> Tasks::run: first panic or early end of a critical task => stop
//! ```
//!
//! [`catch`] is for work that an owner task begins and counts: the owner hears of its end, and gives its place back, also
//! when it panicked.
//!
//! Not here: what the tasks do, the order of a shutdown (`node`).

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// How a set of tasks ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskFailure {
    /// A task panicked.
    #[error("task `{name}` panicked: {message}")]
    Panicked {
        /// The task's name.
        name: &'static str,
        /// What it said.
        message: String,
    },
}

/// Owns the node's tasks. Cloning shares the set.
#[derive(Clone)]
pub struct Tasks {
    set: Arc<Mutex<JoinSet<()>>>,
    failure: Arc<Mutex<Option<TaskFailure>>>,
    stop: CancellationToken,
}

impl Tasks {
    /// Makes an empty set whose first panic cancels `stop`.
    pub fn new(stop: CancellationToken) -> Self {
        Self { set: Arc::default(), failure: Arc::default(), stop }
    }

    /// Starts `task` on the current runtime under `name`.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let failure = Arc::clone(&self.failure);
        let stop = self.stop.clone();
        let guarded = async move {
            let caught = futures_util::FutureExt::catch_unwind(AssertUnwindSafe(task)).await;
            if let Err(payload) = caught {
                let message = panic_message(payload.as_ref());
                error!(task = name, message, "task panicked; the node stops");
                if let Ok(mut slot) = failure.lock() {
                    slot.get_or_insert(TaskFailure::Panicked { name, message });
                }
                stop.cancel();
            }
        };
        if let Ok(mut set) = self.set.lock() {
            // Ended tasks are reaped here, so that short-lived ones do not pile up.
            while set.try_join_next().is_some() {}
            set.spawn(guarded);
        }
    }

    /// Returns the first failure, if any task panicked.
    pub fn failure(&self) -> Option<TaskFailure> {
        self.failure.lock().ok().and_then(|slot| slot.clone())
    }

    /// Waits until every task has ended.
    ///
    /// # Cancel safety
    /// Cancelling aborts the tasks that are left.
    pub async fn join(&self) {
        let mut set = match self.set.lock() {
            Ok(mut set) => std::mem::take(&mut *set),
            Err(_) => return,
        };
        while set.join_next().await.is_some() {}
    }
}

/// Runs `future`, a piece of work called `name`; none: it panicked, which is logged.
///
/// # Cancel safety
/// That of `future`.
pub async fn catch<F: Future>(name: &'static str, future: F) -> Option<F::Output> {
    caught(name, futures_util::FutureExt::catch_unwind(AssertUnwindSafe(future)).await)
}

/// Does the same with what blocks.
pub fn catch_blocking<T>(name: &'static str, run: impl FnOnce() -> T) -> Option<T> {
    caught(name, catch_unwind(AssertUnwindSafe(run)))
}

fn caught<T>(name: &'static str, result: std::thread::Result<T>) -> Option<T> {
    result
        .inspect_err(|payload| {
            let message = panic_message(payload.as_ref());
            error!(work = name, message, "a piece of work panicked; the agent goes on without it");
        })
        .ok()
}

/// Returns the text of a panic's payload.
fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_stops_the_node_and_names_the_task() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        tasks.spawn("doomed", async { panic!("boom") });
        stop.cancelled().await;
        tasks.join().await;
        assert_eq!(tasks.failure(), Some(TaskFailure::Panicked { name: "doomed", message: "boom".to_owned() }));
    }

    #[tokio::test]
    async fn who_began_a_piece_of_work_hears_of_its_panic() {
        assert_eq!(catch("work", async { 1 }).await, Some(1));
        assert_eq!(catch("doomed", async { panic!("boom") }).await, None::<()>);
        assert_eq!(catch_blocking("work", || 1), Some(1));
        assert_eq!(catch_blocking("doomed", || panic!("boom")), None::<()>);
    }
}

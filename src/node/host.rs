//! The thread of what serves this host's own programs: HTTP API, registry with its checks, Workload API.
//!
//! ```text
//!   caller's runtime (`weft-control`): mesh port, gossip, documents, joins     one thread: nothing in it wakes another
//!   `weft-host`:                       API, registry, checks, Workload API     a long answer stands before no probe
//!   `weft-dns`, `weft-worker-N`:       DNS; the data plane
//! ```
//!
//! Not here: what the parts do, who starts them (`node`).

use std::future::Future;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of one thread, which ends without waiting when this is dropped.
#[derive(Debug)]
pub(super) struct HostThread {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl HostThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's, where it gives no thread or no event queue.
    pub(super) fn start() -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("weft-host").enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Polls `start` where it is awaited, but what it spawns, binds and times belongs to this thread.
    ///
    /// # Cancel safety
    /// That of `start`.
    pub(super) async fn within<T>(&self, start: impl Future<Output = T>) -> T {
        let mut start = std::pin::pin!(start);
        std::future::poll_fn(|cx| {
            let _here = self.handle.enter();
            start.as_mut().poll(cx)
        })
        .await
    }
}

impl Drop for HostThread {
    fn drop(&mut self) {
        // An agent is dropped inside a runtime, where waiting for threads is not allowed; its tasks were joined before.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::supervise::Tasks;

    #[tokio::test]
    async fn what_is_started_within_runs_on_the_thread_of_its_own() {
        let host = HostThread::start().unwrap();
        let name = || std::thread::current().name().map(str::to_owned);
        let (tell, told) = oneshot::channel();
        let tasks = Tasks::new(CancellationToken::new());
        host.within(async { tasks.spawn("named", async move { tell.send(name()).unwrap() }) }).await;
        let there = told.await.unwrap();
        assert_eq!(there.as_deref(), Some("weft-host"));
        assert_ne!(name(), there, "the caller stays where it is");
    }
}

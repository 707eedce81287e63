//! Waiting on a level with a deadline: the only way that these tests wait.

use std::time::{Duration, Instant};

/// How long a level may take on a loaded two-core machine before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Polls `probe` until it gives a value; fails after [`PATIENCE`], naming `what` and the last state that `probe` told.
#[track_caller]
pub(crate) fn until<T>(what: &str, probe: impl FnMut() -> Result<T, String>) -> T {
    until_within(PATIENCE, what, probe)
}

/// Waits as [`until`] does, for what may take longer by design.
#[track_caller]
pub(crate) fn until_within<T>(patience: Duration, what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match probe() {
            Ok(value) => return value,
            Err(state) if begun.elapsed() > patience => {
                panic!("after {patience:?} still not: {what}; last seen: {state}")
            }
            // The pause between two looks at a level, not a wait for a time.
            Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
}

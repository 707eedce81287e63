//! Who waits for what: one task looks at each snapshot and wakes only those whose topic changed.
//!
//! ```text
//!   Snapshot --> run: for each watched topic, its index --(grew)--> that topic's watchers
//! ```
//!
//! A watcher registers its topic, then looks at the newest snapshot, then sleeps: what is published later is seen by the
//! task's pass after it, and the topic stands there by then. A sleeping watcher holds no snapshot.
//!
//! Invariants: a topic is kept while somebody watches it; an unrelated change costs one look-up per watched topic, however
//! many watch it, and where nodes are watched one pass over the catalogue for all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::Shared;
use super::index::{ListIndexes, Topic};
use crate::catalogue::Snapshot;

/// The watched topics.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    topics: Mutex<HashMap<Topic, Watched>>,
}

/// A topic that somebody watches.
#[derive(Debug)]
struct Watched {
    /// The index of the last change that its watchers were woken for.
    woken: watch::Sender<u64>,
    /// How many watch it. Not asked of the channel: two that leave at once would each still count the other's end of it.
    watchers: usize,
}

impl Watchers {
    /// Starts to watch `topic`, whose index is `seen`; the topic stops being watched with its last watcher.
    pub(super) fn watch(&self, topic: Topic, seen: u64) -> Watcher<'_> {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Watched { woken: watch::Sender::new(seen), watchers: 0 };
        let watched = topics.entry(topic.clone()).or_insert_with(fresh);
        watched.watchers += 1;
        let woken = watched.woken.subscribe();
        drop(topics);
        Watcher { of: self, topic, woken }
    }

    /// Wakes the watchers of every topic that changed.
    fn tell(&self, snapshot: &Snapshot, lists: &ListIndexes) {
        let topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        for (topic, watched) in &*topics {
            let index = topic.index(snapshot, lists);
            watched.woken.send_if_modified(|seen| {
                let is_news = index > *seen;
                *seen = index.max(*seen);
                is_news
            });
        }
    }
}

/// One that waits.
#[derive(Debug)]
pub(super) struct Watcher<'a> {
    of: &'a Watchers,
    topic: Topic,
    woken: watch::Receiver<u64>,
}

impl Watcher<'_> {
    /// Returns when the topic changed; never if it does not.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing.
    pub(super) async fn changed(&mut self) {
        if self.woken.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        let mut topics = self.of.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(watched) = topics.get_mut(&self.topic) else { return };
        watched.watchers -= 1;
        if watched.watchers == 0 {
            topics.remove(&self.topic);
        }
    }
}

/// Looks at every snapshot until the API stops or the last publisher is gone.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut updates = shared.snapshot.subscribe();
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            changed = updates.changed() => if changed.is_err() { return },
        }
        let snapshot = Arc::clone(&updates.borrow_and_update());
        shared.watchers.tell(&snapshot, &shared.indexes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{node_entry, service, snapshot};
    use super::*;
    use crate::model::{HealthStatus, MemberStatus};

    #[test]
    fn a_change_of_one_service_wakes_its_own_watchers_and_those_of_the_list() {
        let (watchers, lists) = (Watchers::default(), ListIndexes::default());
        let mut snapshot = snapshot();
        let at = |topic: &Topic| topic.index(&snapshot, &lists);
        let topics = [
            Topic::Service("web".to_owned()),
            Topic::Service("db".to_owned()),
            Topic::Services,
            Topic::Nodes,
            Topic::Policy,
        ];
        let seen = topics.each_ref().map(at);
        let all: Vec<Watcher<'_>> =
            topics.into_iter().zip(seen).map(|(topic, seen)| watchers.watch(topic, seen)).collect();
        watchers.tell(&snapshot, &lists);
        assert!(all.iter().all(|watcher| !watcher.woken.has_changed().unwrap()), "nothing changed");

        snapshot.index += 1;
        let db = service("db", &[node_entry(1, MemberStatus::Alive)], HealthStatus::Passing, snapshot.index);
        snapshot.services.insert(db.name.clone(), Arc::new(db));
        watchers.tell(&snapshot, &lists);
        let woken: Vec<bool> = all.iter().map(|watcher| watcher.woken.has_changed().unwrap()).collect();
        assert_eq!(woken, [false, true, true, false, false]);
    }

    #[test]
    fn a_topic_goes_with_its_last_watcher() {
        let watchers = Watchers::default();
        let topic = || Topic::Service("web".to_owned());
        let (first, second) = (watchers.watch(topic(), 1), watchers.watch(topic(), 1));
        let count = || watchers.topics.lock().unwrap().len();
        assert_eq!(count(), 1);
        drop(first);
        assert_eq!(count(), 1);
        drop(second);
        assert_eq!(count(), 0);
    }

    #[test]
    fn watchers_that_leave_at_once_leave_no_topic_behind() {
        let watchers = Watchers::default();
        let topic = || Topic::Service("web".to_owned());
        for round in 0..5_000 {
            let pair = [watchers.watch(topic(), 1), watchers.watch(topic(), 1)];
            let gate = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                for watcher in pair {
                    let gate = &gate;
                    scope.spawn(move || {
                        gate.wait();
                        drop(watcher);
                    });
                }
            });
            assert_eq!(watchers.topics.lock().unwrap().len(), 0, "round {round}");
        }
    }
}

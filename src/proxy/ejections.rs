//! What stands beside the workers for balancing: the ledger of ejections that others hear of, and the maker of tables.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::catalogue::{Snapshot, SnapshotReader};
use crate::clock;
use crate::model::{EJECTIONS_MAX, EjectionsRecord, InstanceId, NodeName, ServiceName};
use crate::routing::{HashTable, Notice, Shared, TABLES_MAX};

/// A record of ejections is news to the whole mesh: at most one in this time.
const PUBLISH_REST: Duration = Duration::from_secs(1);
/// Ejections that are kept in mind; of these the first [`EJECTIONS_MAX`] by name are told.
const LEDGER_MAX: usize = 1024;
/// Tables are looked after at most this often, however fast the catalogue changes.
const TABLES_REST: Duration = Duration::from_millis(100);

/// What is ejected here, and until when.
#[derive(Debug, Default)]
struct Ledger(BTreeMap<(NodeName, InstanceId), Instant>);

impl Ledger {
    fn take(&mut self, notice: Notice) {
        let key = (notice.node, notice.instance);
        match notice.until {
            Some(until) if self.0.len() < LEDGER_MAX || self.0.contains_key(&key) => drop(self.0.insert(key, until)),
            Some(_) => {}
            None => drop(self.0.remove(&key)),
        }
    }

    /// Drops what is over.
    fn expire(&mut self, now: Instant) {
        self.0.retain(|_, until| *until > now);
    }

    fn next_end(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }

    fn record(&self) -> EjectionsRecord {
        EjectionsRecord { instances: self.0.keys().take(EJECTIONS_MAX).cloned().collect() }
    }
}

/// Publishes what the workers eject, until they are gone.
pub(super) async fn tell(mut noticed: mpsc::Receiver<Notice>, ejected: watch::Sender<Arc<EjectionsRecord>>) {
    let mut ledger = Ledger::default();
    loop {
        let end = ledger.next_end();
        let over = async {
            match end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            notice = noticed.recv() => match notice {
                Some(notice) => ledger.take(notice),
                None => return,
            },
            () = over => {}
        }
        while let Ok(notice) = noticed.try_recv() {
            ledger.take(notice);
        }
        ledger.expire(clock::now());
        let record = ledger.record();
        let is_news = ejected.send_if_modified(|published| {
            let is_news = **published != record;
            if is_news {
                *published = Arc::new(record);
            }
            is_news
        });
        if is_news {
            tokio::time::sleep(PUBLISH_REST).await;
        }
    }
}

/// Makes the tables of hashes as the catalogue and the settings want them, until the catalogue ends.
pub(super) async fn tables(balancing: Arc<Shared>, snapshot: SnapshotReader) {
    let mut changes = snapshot.subscribe();
    loop {
        let newest = Arc::clone(&changes.borrow_and_update());
        if newest.upstreams.hashed().next().is_some() || !balancing.tables().is_empty() {
            let balancing = Arc::clone(&balancing);
            // A large table takes milliseconds: not on a thread that others wait for.
            let _stopping = tokio::task::spawn_blocking(move || renew(&balancing, &newest)).await;
        }
        tokio::time::sleep(TABLES_REST).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Makes what is missing or old; keeps the rest.
fn renew(balancing: &Shared, snapshot: &Snapshot) {
    let before = balancing.tables();
    let mut after: BTreeMap<ServiceName, Arc<HashTable>> = BTreeMap::new();
    let mut is_changed = false;
    for (name, balance) in snapshot.upstreams.hashed().take(TABLES_MAX) {
        let Some(service) = snapshot.services.get(name) else { continue };
        let members = HashTable::members_of(service);
        let kept = before.get(name).filter(|table| table.is_for(balance.algorithm, &members));
        let table = kept.cloned().or_else(|| {
            is_changed = true;
            HashTable::new(balance.algorithm, members).map(Arc::new)
        });
        after.extend(table.map(|table| (name.clone(), table)));
    }
    if is_changed || after.len() != before.len() {
        balancing.set_tables(after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Cause;

    fn notice(instance: &str, until: Option<Instant>) -> Notice {
        Notice {
            service: "web".parse().unwrap(),
            node: "a".parse().unwrap(),
            instance: instance.parse().unwrap(),
            until,
            cause: Cause::Consecutive,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ejections_are_told_once_a_second_at_most_and_end_by_themselves() {
        let (notices, noticed) = mpsc::channel(8);
        let (ejected, mut told) = watch::channel(Arc::default());
        let begun = clock::now();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(tell(noticed, ejected));
        notices.send(notice("one", Some(begun + Duration::from_secs(30)))).await.unwrap();
        told.changed().await.unwrap();
        assert_eq!(told.borrow_and_update().instances.len(), 1);
        notices.send(notice("two", Some(begun + Duration::from_secs(9)))).await.unwrap();
        told.changed().await.unwrap();
        assert_eq!(told.borrow_and_update().instances.len(), 2);
        assert!(clock::now() - begun >= PUBLISH_REST);
        notices.send(notice("one", None)).await.unwrap();
        told.changed().await.unwrap();
        assert_eq!(told.borrow_and_update().instances.len(), 1);
        told.changed().await.unwrap();
        assert!(told.borrow_and_update().instances.is_empty());
        assert_eq!((clock::now() - begun).as_secs(), 9);
        drop(notices);
        task.join_next().await.unwrap().unwrap();
    }

    #[test]
    fn so_many_ejections_are_kept_in_mind_and_what_is_known_changes_all_the_same() {
        let (mut ledger, now) = (Ledger::default(), clock::now());
        for at in 0..LEDGER_MAX + 10 {
            ledger.take(notice(&format!("i{at}"), Some(now)));
        }
        assert_eq!((ledger.0.len(), ledger.record().instances.len()), (LEDGER_MAX, EJECTIONS_MAX));
        let later = now + Duration::from_secs(9);
        ledger.take(notice("i0", Some(later)));
        ledger.expire(now);
        assert_eq!(ledger.0.values().copied().collect::<Vec<_>>(), [later]);
    }
}

use super::tokens::TOKEN_KEPT_AFTER_END;
use super::*;
use crate::clock::UnixSeconds;

fn id(text: &str) -> CheckId {
    text.parse().unwrap()
}

#[test]
fn after_the_disk_refused_the_next_call_opens_the_file_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put_node_name(&"n1".parse().unwrap()).unwrap();
    // What redb says of every call after an I/O error.
    let refused = store.failed(redb::Error::PreviousIo);
    assert!(matches!(refused, StoreError::Transaction { .. }));
    let away = dir.path().join("away");
    std::fs::rename(dir.path().join(STORE_FILE), &away).unwrap();
    assert!(store.node_name().is_err(), "the file cannot be opened, so the old handle is not used on");
    std::fs::rename(&away, dir.path().join(STORE_FILE)).unwrap();
    assert_eq!(store.node_name().unwrap().unwrap().as_str(), "n1");
    assert_eq!(store.next_generation().unwrap(), 1);
    assert!(Store::open(dir.path()).is_err(), "the lock is held again");
}

#[test]
fn what_is_kept_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/data");
    let store = Store::open(&path).unwrap();
    let (node_id, key) = (store.node_id().unwrap(), store.reset_key().unwrap());
    assert_eq!(store.next_generation().unwrap(), 1);
    store.put_identity(b"secret").unwrap();
    store.put_node_name(&"web-1".parse().unwrap()).unwrap();
    let peer = StoredPeer { name: "a".parse().unwrap(), addr: "10.0.0.1:8301".parse().unwrap(), alive: true };
    store.put_peers(std::slice::from_ref(&peer)).unwrap();
    store.put_check_status(&id("c"), HealthStatus::Warning).unwrap();
    store.put_check_statuses(&[(id("d"), HealthStatus::Passing)]).unwrap();
    drop(store);

    let store = Store::open(&path).unwrap();
    assert_eq!((store.node_id().unwrap(), store.reset_key().unwrap()), (node_id, key));
    assert_eq!(store.next_generation().unwrap(), 2);
    assert_eq!(store.identity().unwrap().unwrap(), b"secret");
    assert_eq!(store.node_name().unwrap().unwrap().as_str(), "web-1");
    assert_eq!(store.peers().unwrap(), [peer]);
    let statuses = [(id("c"), HealthStatus::Warning), (id("d"), HealthStatus::Passing)];
    assert_eq!(store.check_statuses().unwrap(), statuses);
    store.remove_check(&id("c")).unwrap();
    assert_eq!(store.check_statuses().unwrap().len(), 1);
}

#[test]
fn the_wall_time_is_kept_in_a_file_that_may_be_removed_or_spoilt() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.kept_wall(), None);
    for seconds in [1_800_000_000, 5] {
        store.keep_wall(UnixSeconds(seconds)).unwrap();
        assert_eq!(store.kept_wall(), Some(UnixSeconds(seconds)), "what was kept last, not what is greatest");
    }
    let file = dir.path().join(CLOCK_FILE);
    assert_eq!(store.clock_file(), Some(file.clone()));
    for spoilt in ["", "soon", "-1", "5 6", &"9".repeat(40)] {
        std::fs::write(&file, spoilt).unwrap();
        assert_eq!(store.kept_wall(), None, "{spoilt}");
    }
    std::fs::remove_file(&file).unwrap();
    assert_eq!(store.kept_wall(), None);
    let memory = Store::in_memory().unwrap();
    memory.keep_wall(UnixSeconds(5)).unwrap();
    assert_eq!((memory.clock_file(), memory.kept_wall()), (None, None));
}

#[test]
fn the_file_and_its_directory_are_the_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    drop(Store::open(&path).unwrap());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&path.join(STORE_FILE))), (0o700, 0o600));
    std::fs::set_permissions(path.join(STORE_FILE), Permissions::from_mode(0o644)).unwrap();
    drop(Store::open(&path).unwrap());
    assert_eq!(mode(&path.join(STORE_FILE)), 0o600);
}

#[test]
fn a_second_agent_is_refused_while_the_first_one_runs() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("in use by another agent"));
    drop(first);
    Store::open(dir.path()).unwrap();
}

#[test]
fn a_directory_that_cannot_be_made_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    let error = Store::open(&file.join("data")).unwrap_err();
    assert!(matches!(error, StoreError::Directory { .. }), "{error}");
    assert!(error.to_string().contains("-data-dir"), "{error}");
}

#[test]
fn a_file_that_is_no_database_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(STORE_FILE);
    let garbage = b"not a database, but worth keeping".repeat(400);
    std::fs::write(&file, &garbage).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().contains("weft.redb") && error.to_string().contains("token"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), garbage);
}

#[test]
fn damage_anywhere_is_found_at_opening_or_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(STORE_FILE);
    let store = Store::open(dir.path()).unwrap();
    store.put_identity(&[7; 5000]).unwrap();
    store.next_generation().unwrap();
    drop(store);
    let good = std::fs::read(&file).unwrap();
    let used = good.iter().rposition(|byte| *byte != 0).unwrap();
    let mut refused = 0;
    for part in 0..24 {
        let at = used * part / 24;
        let mut bad = good.clone();
        for byte in bad.iter_mut().skip(at).take(700) {
            *byte ^= 0x5a;
        }
        std::fs::write(&file, &bad).unwrap();
        match Store::open(dir.path()) {
            Err(error) => {
                assert!(matches!(error, StoreError::Corrupt { .. } | StoreError::Format { .. }), "{at}: {error:?}");
                refused += 1;
            }
            Ok(store) => {
                assert_eq!(store.identity().unwrap(), Some(vec![7; 5000]), "damage at {at}");
                assert_eq!(store.next_generation().unwrap(), 2);
            }
        }
    }
    assert!(refused > 0, "no damage was found");
    std::fs::write(&file, good.get(..good.len() / 2).unwrap()).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Corrupt { .. })));
}

#[test]
fn a_file_left_by_a_killed_agent_opens() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.next_generation().unwrap();
    // The bytes on disk while the agent runs are what `kill -9` leaves behind.
    std::fs::copy(dir.path().join(STORE_FILE), copy.path().join(STORE_FILE)).unwrap();
    assert_eq!(Store::open(copy.path()).unwrap().next_generation().unwrap(), 2);
}

#[test]
fn uses_of_a_token_are_counted_until_a_day_after_its_end() {
    let store = Store::in_memory().unwrap();
    let day = TOKEN_KEPT_AFTER_END.as_secs();
    let count = |id: u8, not_after: u64, key: u8, now: u64| {
        store.count_token_use_at([id; 16], not_after, [key; 32], UnixSeconds(now)).unwrap()
    };
    assert_eq!(count(1, 100, 1, 50), Some(0));
    assert_eq!(count(1, 100, 2, 60), Some(1));
    assert_eq!(count(2, 900, 3, 60), Some(0));
    assert_eq!(count(1, 100, 4, 100 + day), Some(2));
    count(2, 900, 5, 101 + day);
    let left = [TokenCount { id: [2; 16], uses: 2, not_after: UnixSeconds(900) }];
    assert_eq!(store.token_counts().unwrap(), left);
}

#[test]
fn the_same_key_may_repeat_its_use_of_a_token_for_ten_minutes() {
    let store = Store::in_memory().unwrap();
    let count = |key: u8, now: u64| store.count_token_use_at([1; 16], 9000, [key; 32], UnixSeconds(now)).unwrap();
    assert_eq!(count(1, 1000), Some(0));
    assert_eq!((count(1, 1001), count(1, 1600)), (None, None));
    assert_eq!(count(2, 1002), Some(1), "another key is another use");
    assert_eq!(count(1, 1601), Some(2), "and so is the same key later on");
}

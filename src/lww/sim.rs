//! Simulated meshes of replicas: random writers, splits, absences, in virtual time, from a seed.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::model::NodeName;

const LEASE_MS: u64 = 3_600_000;
const BEGIN_MS: u64 = 1_800_000_000_000;

fn limits() -> Limits {
    Limits {
        bytes_max: 1 << 20,
        rows_max: 1000,
        key_bytes_max: 64,
        value_bytes_max: 256,
        tombstones_max: 1000,
        tombstone_lease_ms: LEASE_MS,
        keep: Keep::All,
    }
}

struct Agent {
    name: NodeName,
    table: Table,
    /// How far its clock is off, in milliseconds.
    skew_ms: i64,
    is_on: bool,
    side: usize,
}

struct Mesh {
    agents: Vec<Agent>,
    now_ms: u64,
    rng: StdRng,
}

impl Mesh {
    fn new(count: usize, limits: &Limits, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let agents = (0..count).map(|at| Agent {
            name: format!("n{at}").parse().unwrap(),
            table: Table::new(limits.clone(), 1),
            skew_ms: rng.random_range(-500..500),
            is_on: true,
            side: 0,
        });
        Self { agents: agents.collect(), now_ms: BEGIN_MS, rng }
    }

    fn clock(&self, at: usize) -> u64 {
        self.now_ms.saturating_add_signed(self.agents[at].skew_ms)
    }

    fn put(&mut self, at: usize, key: &str, value: &str) -> Record {
        let now_ms = self.clock(at);
        let agent = &mut self.agents[at];
        let body = Body { flags: 0, value: value.as_bytes().to_vec() };
        agent.table.put(key, body, &agent.name, now_ms).unwrap()
    }

    fn delete(&mut self, at: usize, key: &str) -> Option<Record> {
        let now_ms = self.clock(at);
        let agent = &mut self.agents[at];
        agent.table.delete(key, &agent.name, now_ms).unwrap()
    }

    /// What `gossip::shared` does over a stream: `one` compares with `other`.
    fn compare(&mut self, one: usize, other: usize) {
        let (a_ms, b_ms) = (self.clock(one), self.clock(other));
        let [a, b] = self.agents.get_disjoint_mut([one, other]).unwrap();
        let theirs = b.table.summary(b_ms);
        if a.table.summary(a_ms).set_hash == theirs.set_hash {
            b.table.synced(b_ms);
        } else {
            let differing = |(at, (x, y)): (usize, (&u64, &u64))| (x != y).then(|| u8::try_from(at).unwrap());
            let buckets: Vec<u8> =
                a.table.buckets().iter().zip(b.table.buckets()).enumerate().filter_map(differing).collect();
            for bucket in buckets {
                let (mut digests, mut after) = (Vec::new(), None);
                loop {
                    let (page, is_last) = b.table.digests(bucket, after, 3);
                    after = page.last().map(|digest| digest.key);
                    digests.extend(page);
                    if is_last {
                        break;
                    }
                }
                let plan = a.table.plan(&theirs, bucket, &digests, a_ms);
                for key in plan.pull_deleted.into_iter().chain(plan.pull) {
                    let _refused = a.table.merge(b.table.record(&key).unwrap(), a_ms);
                }
                for key in plan.give {
                    let _refused = b.table.merge(a.table.record(&key).unwrap(), b_ms);
                }
            }
        }
        for (table, now_ms) in [(&mut a.table, a_ms), (&mut b.table, b_ms)] {
            if table.is_over(now_ms) {
                table.purge(now_ms);
            }
        }
        // The other side does not know whether it was evened out: its own comparison tells.
        a.table.synced(a_ms);
    }

    /// Each agent that is on compares with a random one on its side; time goes on by `ms`.
    fn round(&mut self, ms: u64) {
        for at in 0..self.agents.len() {
            let others: Vec<usize> = (0..self.agents.len())
                .filter(|&other| {
                    other != at && self.agents[other].is_on && self.agents[other].side == self.agents[at].side
                })
                .collect();
            if self.agents[at].is_on && !others.is_empty() {
                let other = others[self.rng.random_range(0..others.len())];
                self.compare(at, other);
            }
            let now_ms = self.clock(at);
            if self.agents[at].is_on {
                self.agents[at].table.purge(now_ms);
            }
        }
        self.now_ms += ms;
    }

    fn settle(&mut self) {
        for _ in 0..40 {
            self.round(1000);
        }
    }

    fn values(&self, at: usize) -> BTreeMap<String, Vec<u8>> {
        let all = Scope::Prefix(String::new());
        self.agents[at].table.read(&all).map(|(key, _, body)| (key.to_string(), body.value.clone())).collect()
    }
}

#[test]
fn whatever_is_written_on_two_sides_of_a_split_ends_equal_everywhere_with_the_newest() {
    for seed in 0..16 {
        let mut mesh = Mesh::new(7, &limits(), seed);
        let mut newest: BTreeMap<String, Record> = BTreeMap::new();
        for step in 0..400 {
            if step == 100 {
                mesh.agents.iter_mut().enumerate().for_each(|(at, agent)| agent.side = at % 2);
            }
            if step == 300 {
                mesh.agents.iter_mut().for_each(|agent| agent.side = 0);
            }
            let (at, key) = (mesh.rng.random_range(0..7), format!("k/{}", mesh.rng.random_range(0..30)));
            let written = if mesh.rng.random_bool(0.3) {
                mesh.delete(at, &key)
            } else {
                Some(mesh.put(at, &key, &format!("{step} by {at}")))
            };
            if let Some(record) = written {
                let held = newest.entry(key).or_insert_with(|| record.clone());
                if held.stamp < record.stamp {
                    *held = record;
                }
            }
            if mesh.rng.random_bool(0.3) {
                mesh.round(500);
            }
        }
        mesh.settle();
        let want: BTreeMap<String, Vec<u8>> =
            newest.into_iter().filter_map(|(key, record)| Some((key, record.body?.value.clone()))).collect();
        for at in 0..7 {
            assert_eq!(mesh.values(at), want, "seed {seed}, agent {at}");
            let hash = |at: usize| mesh.agents[at].table.summary(mesh.now_ms).set_hash;
            assert_eq!(hash(at), hash(0), "seed {seed}, agent {at}");
        }
    }
}

#[test]
fn what_was_deleted_stays_deleted_for_a_node_that_was_away_within_the_lease() {
    check_absence(LEASE_MS / 2);
}

#[test]
fn a_node_that_was_away_for_longer_than_the_lease_takes_the_others_state() {
    check_absence(LEASE_MS * 3);
}

/// A node is off for `away_ms`, while the others delete half of what there is; it writes when it is back.
fn check_absence(away_ms: u64) {
    for seed in 0..8 {
        let mut mesh = Mesh::new(4, &limits(), seed);
        for at in 0..40 {
            mesh.put(at % 4, &format!("k{at}"), "old");
        }
        mesh.settle();
        mesh.agents[3].is_on = false;
        mesh.now_ms += 70_000;
        for at in 0..20 {
            assert!(mesh.delete(at % 3, &format!("k{at}")).is_some(), "seed {seed}");
        }
        let step = away_ms / 30;
        for _ in 0..30 {
            mesh.round(step);
        }
        mesh.agents[3].is_on = true;
        mesh.put(3, "mine", "new");
        mesh.settle();
        let want: BTreeSet<String> = (20..40).map(|at| format!("k{at}")).chain(["mine".to_owned()]).collect();
        for at in 0..4 {
            let keys: BTreeSet<String> = mesh.values(at).into_keys().collect();
            assert_eq!(keys, want, "seed {seed}, agent {at}");
        }
        let dead = |at: usize| mesh.agents[at].table.size().2;
        assert_eq!(dead(0), if away_ms < LEASE_MS { 20 } else { 0 }, "seed {seed}");
    }
}

#[test]
fn a_mesh_that_was_off_as_a_whole_keeps_what_it_had() {
    let mut mesh = Mesh::new(3, &limits(), 5);
    mesh.put(0, "kept", "1");
    mesh.put(1, "gone", "1");
    mesh.settle();
    mesh.delete(1, "gone");
    mesh.settle();
    mesh.now_ms += LEASE_MS * 10;
    mesh.settle();
    for at in 0..3 {
        assert_eq!(mesh.values(at).into_keys().collect::<Vec<_>>(), ["kept"]);
    }
}

#[test]
fn a_buffer_of_the_newest_ends_equal_and_bounded() {
    for seed in 0..8 {
        let limits = Limits { keep: Keep::Newest, rows_max: 16, ..limits() };
        let mut mesh = Mesh::new(5, &limits, seed);
        let mut all = Vec::new();
        for at in 0..100usize {
            let record = mesh.put(at % 5, &format!("event-{at}"), "x");
            all.push((record.stamp, record.key.to_string()));
            if at % 7 == 0 {
                mesh.round(100);
            }
        }
        mesh.settle();
        all.sort();
        let want: BTreeSet<String> = all.iter().rev().take(16).map(|(_, key)| key.clone()).collect();
        for at in 0..5 {
            let keys: BTreeSet<String> = mesh.values(at).into_keys().collect();
            assert_eq!(keys, want, "seed {seed}, agent {at}");
        }
    }
}

#[test]
fn a_local_writer_is_refused_when_it_is_full_and_deleting_makes_room() {
    let (node, mut table): (NodeName, _) =
        ("a".parse().unwrap(), Table::new(Limits { bytes_max: 2000, ..limits() }, 1));
    let body = || Body { flags: 0, value: vec![0; 200] };
    let mut held = 0;
    let refused = loop {
        match table.put(&format!("k{held}"), body(), &node, BEGIN_MS) {
            Ok(_) => held += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(held, 6, "330 bytes each");
    assert!(matches!(refused, Refused::Full { bytes: 1980, bytes_max: 2000, .. }), "{refused:?}");
    assert!(table.put("k0", body(), &node, BEGIN_MS).is_ok(), "a value may be replaced");
    assert!(table.delete("k1", &node, BEGIN_MS).unwrap().is_some());
    assert!(table.put("other", Body { flags: 0, value: vec![0; 190] }, &node, BEGIN_MS).is_ok());
    // A peer may bring as much again, and no more.
    let mut peers = 0;
    loop {
        let stamp = Stamp { ms: BEGIN_MS, count: 0, node: "b".parse().unwrap() };
        let record = Record { key: format!("p{peers}").into(), stamp, body: Some(body().into()) };
        match table.merge(record, BEGIN_MS) {
            Ok(merged) => assert_eq!(merged, Merged::Taken),
            Err(refused) => break assert!(matches!(refused, Refused::Full { .. })),
        }
        peers += 1;
    }
    assert_eq!(peers, 6);
}

#[test]
fn a_writer_ahead_of_time_does_not_win_for_ever_and_two_contents_of_one_stamp_end_alike() {
    let mut tables = [Table::new(limits(), 1), Table::new(limits(), 1)];
    let node: NodeName = "liar".parse().unwrap();
    let record = |ms, value: &str| Record {
        key: "k".into(),
        stamp: Stamp { ms, count: 0, node: node.clone() },
        body: Some(Body { flags: 0, value: value.as_bytes().to_vec() }.into()),
    };
    let refused = tables[0].merge(record(BEGIN_MS + AHEAD_MS_MAX + 1, "x"), BEGIN_MS);
    assert_eq!(refused, Err(Refused::Ahead { ahead_ms: AHEAD_MS_MAX + 1 }));
    for (table, order) in tables.iter_mut().zip([["a", "b"], ["b", "a"]]) {
        for value in order {
            table.merge(record(BEGIN_MS, value), BEGIN_MS).unwrap();
        }
    }
    let [one, other] = tables;
    assert_eq!(one.row("k").map(|row| &row.body), other.row("k").map(|row| &row.body));
    assert_eq!(one.summary(BEGIN_MS), other.summary(BEGIN_MS));
}

#[test]
fn a_clock_that_was_far_ahead_lets_nobody_write_what_peers_would_refuse() {
    let (node, mut table): (NodeName, _) = ("a".parse().unwrap(), Table::new(limits(), 1));
    let body = || Body { flags: 0, value: Vec::new() };
    let hour_ms = 3_600_000;
    table.put("k", body(), &node, BEGIN_MS + hour_ms).unwrap();
    table.synced(BEGIN_MS + hour_ms);
    let refused = Refused::Ahead { ahead_ms: hour_ms };
    assert_eq!(table.put("k", body(), &node, BEGIN_MS), Err(refused.clone()));
    assert_eq!(table.delete("k", &node, BEGIN_MS), Err(refused));
    assert_eq!(table.summary(BEGIN_MS).synced_ms, BEGIN_MS);
    assert!(table.put("k", body(), &node, BEGIN_MS + hour_ms - AHEAD_MS_MAX).is_ok());
}

#[test]
fn more_deletions_than_are_remembered_in_one_instant_bring_no_key_back() {
    for seed in 0..8 {
        let limits = Limits { tombstones_max: 16, ..limits() };
        let mut mesh = Mesh::new(4, &limits, seed);
        for at in 0..40 {
            mesh.put(at % 4, &format!("k{at}"), "old");
        }
        mesh.settle();
        // Ten at each of three, before any of them has heard of the others'.
        for at in 0..30 {
            assert!(mesh.delete(at % 3, &format!("k{at}")).is_some(), "seed {seed}");
        }
        mesh.settle();
        let want: BTreeSet<String> = (30..40).map(|at| format!("k{at}")).collect();
        for at in 0..4 {
            let keys: BTreeSet<String> = mesh.values(at).into_keys().collect();
            assert_eq!(keys, want, "seed {seed}, agent {at}");
        }
        let (now_ms, node) = (mesh.clock(0), mesh.agents[0].name.clone());
        let table = &mut mesh.agents[0].table;
        let refused = table.delete("k30", &node, now_ms);
        assert_eq!(refused, Err(Refused::Deletions { tombstones: 30, tombstones_max: 16 }), "seed {seed}");
        assert!(table.delete("k30", &node, now_ms + 700_000).unwrap().is_some(), "they are old by now");
        assert_eq!(table.purge(now_ms + 700_000).len(), 31 - 14, "down to seven eighths, the oldest first");
        assert!(!mesh.values(0).contains_key("k0"));
    }
}

#[test]
fn peers_may_bring_twice_as_many_deletions_and_no_more() {
    let mut table = Table::new(Limits { tombstones_max: 8, ..limits() }, 1);
    let mut merge = |at: u32| {
        let stamp = Stamp { ms: BEGIN_MS, count: at, node: "b".parse().unwrap() };
        table.merge(Record { key: format!("k{at}").into(), stamp, body: None }, BEGIN_MS)
    };
    assert!((0..16).all(|at| merge(at) == Ok(Merged::Taken)));
    assert_eq!(merge(16), Err(Refused::Deletions { tombstones: 16, tombstones_max: 8 }));
}

#[test]
fn an_index_tells_of_its_own_scope_and_never_goes_back() {
    let (node, mut table): (NodeName, _) = ("a".parse().unwrap(), Table::new(limits(), 100));
    let body = || Body { flags: 0, value: Vec::new() };
    let app = Scope::Prefix("app/".to_owned());
    assert_eq!(table.index_of(&app), 100);
    table.put("app/one", body(), &node, BEGIN_MS).unwrap();
    let first = table.index_of(&app);
    table.put("other", body(), &node, BEGIN_MS).unwrap();
    assert_eq!(table.index_of(&app), first, "another prefix's change is none");
    table.delete("app/one", &node, BEGIN_MS).unwrap();
    let deleted = table.index_of(&app);
    assert!(deleted > first);
    assert_eq!(table.purge(BEGIN_MS + LEASE_MS + 1).len(), 1);
    assert!(table.index_of(&app) >= deleted);
    let row = table.put("app/one", body(), &node, BEGIN_MS).map(|_| table.row("app/one").cloned()).unwrap().unwrap();
    assert_eq!(row.created, row.modified, "what comes back after a deletion is new");
}

//! What an instance costs every agent of the mesh.

// The rules for imports end at this line (tests/it/imports.rs).
#[cfg(test)]
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Builder;
use crate::clock::UnixSeconds;
use crate::model::{
    CheckRecord, Entry, EntryKey, Generation, HealthStatus, MemberStatus, NodeInfo, NodeName, Protocol, ServiceRecord,
};
use crate::replica::{Delta, Digest, HeadSigner, HeadVerifier, Params, Replica, VerifiedHead};
use crate::wire::{self, FRAME_BYTES_MAX};

const NODES: usize = 100;
const INSTANCES_PER_NODE: usize = 100;
const SERVICES: usize = 1000;
const NOW: UnixSeconds = UnixSeconds(1_700_000_000);

/// What is asked of the allocator for a plain instance, in replica and catalogue together, its part of its node included.
const BYTES_PER_INSTANCE_MAX: usize = 540;
/// What is asked for besides while one node's records change.
const CHANGE_BYTES_MAX: u64 = 512 * 1024;

#[test]
fn a_plain_instance_takes_at_most_540_bytes_and_a_change_of_a_node_a_bounded_number() {
    let frames: Vec<Vec<u8>> = (0..NODES).map(|node| frame(node, HealthStatus::Passing)).collect();
    let changed = frame(7, HealthStatus::Critical);
    let (mut replica, mut builder) = (Replica::new(name(NODES), generation(1), Params::default()), None);
    let held = allocation_counter::measure(|| {
        let mut made = Builder::new(name(NODES), 1);
        for (node, frame) in frames.iter().enumerate() {
            take(&mut replica, &mut made, node, frame);
        }
        builder = Some((made.build().unwrap(), made));
    });
    let (before, mut builder) = builder.unwrap();
    assert_eq!(
        before.services.values().map(|service| service.instances.len()).sum::<usize>(),
        NODES * INSTANCES_PER_NODE
    );
    let each = usize::try_from(held.bytes_current).unwrap() / (NODES * INSTANCES_PER_NODE);
    println!("{each} bytes per instance");
    assert!(each <= BYTES_PER_INSTANCE_MAX, "{each} bytes per instance");

    let mut after = None;
    let change = allocation_counter::measure(|| {
        replica.remove(&name(7));
        take(&mut replica, &mut builder, 7, &changed);
        after = builder.build();
    });
    println!("{} bytes more at most while a node's {INSTANCES_PER_NODE} instances change", change.bytes_max);
    assert!(change.bytes_max <= CHANGE_BYTES_MAX, "{} bytes", change.bytes_max);
    let after = after.unwrap();
    let of_others = |at: &usize| *at / INSTANCES_PER_NODE != 7;
    let service = (0..SERVICES).find(of_others).map(service_name).unwrap();
    assert!(Arc::ptr_eq(
        &before.services[service.as_str()].instances[0],
        &after.services[service.as_str()].instances[0]
    ));
}

fn take(replica: &mut Replica, builder: &mut Builder, node: usize, frame: &[u8]) {
    let delta: Delta = wire::decode(frame, FRAME_BYTES_MAX).unwrap();
    replica.apply(&delta, &Trusting(name(node)), NOW).unwrap();
    builder.set_node(&name(node), replica.state(&name(node)), MemberStatus::Alive);
}

/// A node's whole state, as it arrives.
fn frame(node: usize, status: HealthStatus) -> Vec<u8> {
    let mut replica = Replica::new(name(node), generation(1), Params::default());
    let info = Entry::Node(Arc::new(NodeInfo {
        id: "6e2e5bd4-0f3e-4f0c-9a43-1b1a4b8f0a11".to_owned(),
        name: name(node),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "0.1.0".to_owned(),
        issuer: false,
    }));
    let entries = (0..INSTANCES_PER_NODE).flat_map(|at| instance(node * INSTANCES_PER_NODE + at, status));
    let records: BTreeMap<EntryKey, Entry> = entries.chain([info]).map(|entry| (entry.key(), entry)).collect();
    replica.publish(records, &NoSignature, NOW).unwrap();
    wire::encode(&replica.delta_for(&Digest::none(name(node))).unwrap()).unwrap()
}

/// A plain instance: name, id, port, address, a tag and a check.
fn instance(at: usize, status: HealthStatus) -> [Entry; 2] {
    let service = service_name(at);
    let id = format!("{service}-{at}");
    let record = ServiceRecord {
        tags: ["v1".into()].into(),
        address: "10.0.0.1".into(),
        port: 8080,
        protocol: Protocol::Http,
        ..ServiceRecord::new(id.parse().unwrap(), service.parse().unwrap())
    };
    let check = CheckRecord {
        id: format!("service:{id}").parse().unwrap(),
        name: "Service check".into(),
        status,
        notes: Box::default(),
        service: Some(record.id.clone()),
        kind: "http".into(),
    };
    [Entry::Service(record.into()), Entry::Check(check.into())]
}

fn service_name(at: usize) -> String {
    format!("service-{}", at % SERVICES)
}

fn name(number: usize) -> NodeName {
    format!("node-{number}").parse().unwrap()
}

fn generation(number: u64) -> Generation {
    Generation { number, nonce: 1 }
}

struct NoSignature;

impl HeadSigner for NoSignature {
    fn chain(&self) -> Vec<Vec<u8>> {
        vec![vec![0; 700]; 2]
    }
    fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(vec![0; 71])
    }
}

struct Trusting(NodeName);

impl HeadVerifier for Trusting {
    fn verify(&self, _chain: &[Vec<u8>], _message: &[u8], _signature: &[u8]) -> Result<VerifiedHead, String> {
        let not_after = NOW.plus(Duration::from_hours(24));
        Ok(VerifiedHead { node: self.0.clone(), scope: "*".parse().unwrap(), not_after })
    }
}

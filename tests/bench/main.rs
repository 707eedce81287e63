//! Benchmarks: `cargo bench`. Micro-benchmarks of the pure cores leave signatures out: they cost the same whatever weft
//! does; `identity` measures those. `hot_path` has the steps of a request one by one, `proxied_request` is its whole path through two agents.

mod hot_path;
mod identity;
mod request;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use weft::clock::UnixSeconds;
use weft::model::{Entry, EntryKey, Generation, NodeInfo, NodeName, Protocol, ServeScope, ServiceRecord};
use weft::replica::{Delta, Digest, HeadSigner, HeadVerifier, Params, Replica, VerifiedHead};
use weft::wire;

const NOW: UnixSeconds = UnixSeconds(1_700_000_000);
const SERVICES_PER_NODE: usize = 20;

/// Proves nothing and costs nothing: the benchmark is about the merge.
struct NoSignature;

impl HeadSigner for NoSignature {
    fn chain(&self) -> Vec<Vec<u8>> {
        vec![vec![0; 700]; 2]
    }
    fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(vec![0; 71])
    }
}

/// Believes that everything is `node-0`'s.
struct Trusting(NodeName, ServeScope);

impl HeadVerifier for Trusting {
    fn verify(&self, _chain: &[Vec<u8>], _message: &[u8], _signature: &[u8]) -> Result<VerifiedHead, String> {
        let not_after = NOW.plus(Duration::from_hours(24));
        Ok(VerifiedHead { node: self.0.clone(), scope: self.1.clone(), not_after })
    }
}

fn name(text: &str) -> NodeName {
    text.parse().expect("a valid name")
}

fn service(at: usize, port: u16) -> Entry {
    Entry::Service(Arc::new(ServiceRecord {
        tags: ["v1".into(), "blue".into()].into(),
        meta: [("team", "shop".into())].into_iter().collect(),
        address: "10.0.0.1".into(),
        port,
        protocol: Protocol::Http,
        ..ServiceRecord::new(
            format!("web-{at}").parse().expect("a valid id"),
            format!("service-{at}").parse().expect("a valid name"),
        )
    }))
}

fn records(node: &str, services: impl Iterator<Item = Entry>) -> BTreeMap<EntryKey, Entry> {
    let info = Entry::Node(Arc::new(NodeInfo {
        id: "6e2e5bd4-0f3e-4f0c-9a43-1b1a4b8f0a11".to_owned(),
        name: name(node),
        mesh_addr: "10.0.0.1:8301".parse().expect("a valid address"),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "0.1.0".to_owned(),
        issuer: false,
    }));
    services.chain([info]).map(|entry| (entry.key(), entry)).collect()
}

/// Services 0 to `count`; only the first one's port is given: one entry changes with it.
fn services(count: usize, port: u16) -> impl Iterator<Item = Entry> {
    (0..count).map(move |at| service(at, if at == 0 { port } else { 80 }))
}

fn publisher(node: &str, services: impl Iterator<Item = Entry>) -> Replica {
    let mut replica = Replica::new(name(node), Generation { number: 1, nonce: 1 }, Params::default());
    replica.publish(records(node, services), &NoSignature, NOW).expect("within the bounds");
    replica
}

fn whole(replica: &Replica, node: &str) -> Delta {
    replica.delta_for(&Digest::none(name(node))).expect("published")
}

fn codec(c: &mut Criterion) {
    let delta = whole(&publisher("node-0", services(SERVICES_PER_NODE, 80)), "node-0");
    let bytes = wire::encode(&delta).expect("within the bounds");
    c.bench_function(&format!("wire/encode_delta_{}_bytes", bytes.len()), |bencher| {
        bencher.iter(|| wire::encode(black_box(&delta)));
    });
    c.bench_function(&format!("wire/decode_delta_{}_bytes", bytes.len()), |bencher| {
        bencher.iter(|| wire::decode::<Delta>(black_box(&bytes), wire::FRAME_BYTES_MAX));
    });
}

fn merge(c: &mut Criterion) {
    let verifier = Trusting(name("node-0"), "*".parse().expect("a valid scope"));
    let mut writer = publisher("node-0", services(SERVICES_PER_NODE, 80));
    let first = whole(&writer, "node-0");
    let change = writer.publish(records("node-0", services(SERVICES_PER_NODE, 81)), &NoSignature, NOW);
    let change = change.expect("within the bounds").expect("a port changed");
    let empty = || Replica::new(name("reader"), Generation { number: 1, nonce: 1 }, Params::default());
    let with_first = || {
        let mut replica = empty();
        replica.apply(&first, &verifier, NOW).expect("a valid delta");
        replica
    };
    c.bench_function("merge/whole_state_20_services", |bencher| {
        bencher.iter_batched_ref(empty, |replica| replica.apply(&first, &verifier, NOW).is_ok(), BatchSize::SmallInput);
    });
    c.bench_function("merge/one_change_of_20_services", |bencher| {
        bencher.iter_batched_ref(
            with_first,
            |replica| replica.apply(&change, &verifier, NOW).is_ok(),
            BatchSize::SmallInput,
        );
    });
    let mut replica = with_first();
    c.bench_function("merge/stale", |bencher| {
        bencher.iter(|| replica.apply(black_box(&first), &verifier, NOW).is_ok());
    });
}

criterion_group!(
    benches,
    hot_path::heads,
    hot_path::route,
    hot_path::hosts,
    hot_path::authorize,
    hot_path::chain,
    codec,
    merge,
    identity::identity,
    request::proxied_request
);
criterion_main!(benches);
